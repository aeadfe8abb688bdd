"""Scenes: do they show what they claim? Every claim is checked against pixels or geometry."""
import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data import scenes
from data.questions import marker_sample
from data.scenes import (BACKGROUNDS, OBJECT_COLORS, POSITIONS, SHAPES, Background, Scene, caption, describe, generator_for,
                         make_object, marked_scene, relation, render, sample_markers, sample_scene)
from data.write import example_scene
from overlay import KINDS, draw

SIZE = (224, 192)   # not square, so that an exchange of width and height shows
GRAY = Background("flat", ((128, 128, 128),) * 2)


def many(n=200, size=SIZE, split="train"):
    return [sample_scene(generator_for(split, 5, i), size) for i in range(n)]


def inside(thing, size):
    """Pixels well inside the polygon, by a plain filling at thrice the size: independent of render's masks."""
    fine = Image.new("L", (size[0] * 3, size[1] * 3))
    ImageDraw.Draw(fine).polygon([(3 * x, 3 * y) for x, y in thing.polygon], fill=255)
    return np.array(fine.reduce(3).resize(size)) == 255   # (H, W)


def test_there_are_ten_shapes_and_eight_colors():
    """Guards against a shape or color lost from the tables, or two shapes that are one polygon under two names."""
    assert len(SHAPES) == 10 and len(OBJECT_COLORS) == 8
    for a, b in itertools.combinations(OBJECT_COLORS.values(), 2):
        assert math.dist(a, b) > 100, (a, b)
    masks = {shape: inside(make_object(shape, "red", "small", (12, 12), 11), (24, 24)) for shape in SHAPES}
    for a, b in itertools.combinations(masks, 2):
        overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
        assert overlap < 0.8, f"{a} and {b} share {overlap:.2f} of their pixels"


def test_what_is_drawn_is_what_is_said():
    """Guards against polygons that lie elsewhere than the drawn object (x and y exchanged, an offset, a later object
    on top) and against a color word that is not the color seen."""
    for scene in many(40):
        pixels = np.array(render(scene)).astype(int)
        for thing in scene.objects:
            mask = inside(thing, scene.size)
            assert mask.sum() > 40, (thing.shape, mask.sum())
            seen = np.median(pixels[mask], 0)
            assert (abs(pixels[mask] - thing.rgb).max(1) <= 40).mean() > 0.97, thing
            nearest = min(OBJECT_COLORS, key=lambda name: math.dist(OBJECT_COLORS[name], seen))
            assert nearest == thing.color


def test_nothing_else_is_drawn():
    """Guards against masks that bleed: outside every object's box the picture is the bare background."""
    for scene in many(20):
        pixels = np.array(render(scene))
        bare = np.array(render(Scene(scene.size, (), scene.background)))
        for x0, y0, x1, y1 in (thing.box for thing in scene.objects):
            bare[math.floor(y0):math.ceil(y1), math.floor(x0):math.ceil(x1)] = \
                pixels[math.floor(y0):math.ceil(y1), math.floor(x0):math.ceil(x1)]
        assert (pixels == bare).all()


def test_boxes_bound_polygons_and_lie_in_the_image():
    """Guards against boxes of the unrotated shape, and objects cut off by the border."""
    for scene in many(300):
        for thing in scene.objects:
            x, y = zip(*thing.polygon)
            assert thing.box == (min(x), min(y), max(x), max(y))
            assert 0 <= thing.box[0] and 0 <= thing.box[1] and thing.box[2] <= SIZE[0] and thing.box[3] <= SIZE[1]


def test_nine_objects_always_fit():
    """Guards against: nine objects that are all large at first, once in 512 scenes, of which one stays so and does not
    fit."""
    for i in range(1200):
        assert len(sample_scene(generator_for("test", 0, i), SIZE, 9).objects) == 9


def test_objects_keep_their_distance_and_differ():
    """Guards against a marker round one object that covers another, and against two red stars in one scene: which is
    "the red star"? A rectangle around one must hold no point of another, nor an ellipse 1.4 times as wide."""
    for scene in many(300):
        assert 2 <= len(scene.objects) <= 6
        assert len({(thing.shape, thing.color) for thing in scene.objects}) == len(scene.objects)
        for a, b in itertools.permutations(scene.objects, 2):
            (x, y), (x0, y0, x1, y1) = a.center, a.box
            reach = [math.hypot((px - x) / (x1 - x0), (py - y) / (y1 - y0)) * 2 for px, py in b.polygon]
            assert min(reach) > 1.4, (a, b)
            assert not any(x0 < px < x1 and y0 < py < y1 for px, py in b.polygon), (a, b)



def test_the_ring_has_a_hole_and_no_seam():
    """Guards against a ring that is a disk, and against the seam that Pillow leaves along a nearly level slit."""
    for i in range(60):
        u, v, turn = generator_for("val", 0, i).random(3)
        thing = make_object("ring", "white", "small", (20 + u, 20 + v), 16, 0.7 * turn - 0.35)
        pixels = np.array(render(Scene((40, 40), (thing,), GRAY)))[..., 0]
        assert pixels[20, 20] == 128
        for angle in np.linspace(0, 2 * np.pi, 300):
            x, y = 20 + u + 12.2 * np.cos(angle), 20 + v + 12.2 * np.sin(angle)
            assert pixels[int(y), int(x)] == 250, (i, angle)


@pytest.mark.parametrize("n", range(1, 10))
def test_any_number_of_objects_is_placed(n):
    """Guards against a placement that gives up, never ends, or quietly returns fewer objects than were asked for."""
    for side in (32, 224):
        for i in range(40):
            assert len(sample_scene(generator_for("test", n, i), (side, side), n).objects) == n


def test_a_scene_of_no_or_ten_objects_is_refused():
    """Guards against an empty picture with a caption of nothing, and against a tenth object dropped in silence."""
    for n in (0, 10):
        with pytest.raises(ValueError, match=f"n is {n}; expected 1 to 9"):
            sample_scene(generator_for("test", 0, 0), n=n)


def test_captions_read_left_to_right_and_top_to_bottom():
    """Guards against objects in the order of drawing, rows and columns exchanged, and words that name two objects."""
    words = [word for row in POSITIONS for word in row]
    for scene in many(300):
        lines = caption(scene).removesuffix(".").split(". ")
        places = [line.split(":")[0] for line in lines]
        assert places == sorted(set(places), key=words.index)
        for line in lines:
            place, noun = line.split(": ")
            thing, = (t for t in scene.objects if noun.endswith(f" {t.color} {t.shape}"))
            assert ("large" in noun) == (thing.size == "large")
            column, row = words.index(place) % 3, words.index(place) // 3
            assert column <= 3 * thing.center[0] / SIZE[0] <= column + 1
            assert row <= 3 * thing.center[1] / SIZE[1] <= row + 1


def test_the_example_reads_as_it_should():
    """The words themselves, once: guards against a caption that is consistent but is not English."""
    assert caption(example_scene()) == ("top left: a large red star. top right: a large blue ring. "
                                        "center: a large yellow heart. bottom left: a white moon. "
                                        "bottom right: a large green cross.")


def test_articles():
    """Guards against "a orange ring", which a model would learn and every exact match would then need."""
    nouns = [describe(make_object("ring", color, "small", (9, 9), 8)) for color in OBJECT_COLORS]
    assert "an orange ring" in nouns and "a red ring" in nouns
    assert sum(noun.startswith("an ") for noun in nouns) == 1


def test_relations():
    """Guards against y taken to point up, the two exchanged, and the shorter offset deciding."""
    center = make_object("ring", "blue", "small", (100, 100), 10)
    for x, y, word in ((50, 110, "left of"), (150, 90, "right of"), (110, 50, "above"), (90, 150, "below")):
        other = make_object("star", "red", "small", (x, y), 10)
        assert relation(other, center) == f"The red star is {word} the blue ring."


def test_splits_share_no_stream_and_streams_repeat():
    """Guards against test scenes seen in training, and samples that depend on who drew them, or when."""
    draws = {(split, seed, i): generator_for(split, seed, i).random() for split in scenes.SPLITS
             for seed in range(3) for i in range(20)}
    assert len(set(draws.values())) == len(draws)
    for i in range(4):
        first, again = (marker_sample(generator_for("train", 1, i)) for _ in range(2))
        assert first.markers == again.markers and first.turns == again.turns
        assert first.image.tobytes() == again.image.tobytes()
    with pytest.raises(ValueError, match="split is 'dev'; expected one of train, val, test"):
        generator_for("dev", 0, 0)


def test_every_background_shape_and_color_comes_up():
    """Guards against an index that never reaches the last entry. Of 300 scenes, the odds that one of four backgrounds
    is missing are 4 x (3/4)^300, about 10^-37."""
    drawn = many(300)
    assert {scene.background.kind for scene in drawn} == set(BACKGROUNDS)
    things = [thing for scene in drawn for thing in scene.objects]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.color for thing in things} == set(OBJECT_COLORS)
    assert {thing.size for thing in things} == set(scenes.DIAMETERS)


def test_no_marker_vanishes_in_its_object():
    """Guards against a red point on a red star: no one could answer the question."""
    red = make_object("star", "red", "large", (100, 100), 40)
    scene = Scene((200, 200), (red,), GRAY)
    for i, kind in itertools.product(range(20), set(KINDS) - {"rectangle", "ellipse", "mask"}):
        _, (marker,) = sample_markers(generator_for("val", 6, i), scene, 1, (kind,))
        assert math.dist(marker.color, red.rgb) * marker.alpha > 60


@pytest.mark.parametrize("color", OBJECT_COLORS)
def test_a_mask_is_seen_and_leaves_the_color_recognizable(color):
    """Guards against a yellow mask that turns a red square into an orange one, and a mask as good as invisible."""
    thing = make_object("square", color, "large", (50, 50), 40)
    scene = Scene((100, 100), (thing,), GRAY)
    for i in range(30):
        _, markers = sample_markers(generator_for("val", 7, i), scene, 1, ("mask",))
        seen = draw(render(scene), markers).getpixel((50, 50))
        assert min(OBJECT_COLORS, key=lambda name: math.dist(OBJECT_COLORS[name], seen)) == color
        assert math.dist(seen, OBJECT_COLORS[color]) > 40


def test_more_markers_than_objects_are_refused():
    """Guards against markers dropped in silence, and against choosing from no kinds at all."""
    for n, kinds in ((6, KINDS), (1, ())):
        with pytest.raises(ValueError, match="no more markers than objects"):
            sample_markers(generator_for("val", 0, 0), example_scene(), n, kinds)
    with pytest.raises(ValueError, match="n_markers is 7; expected 1 to 6"):
        marked_scene(generator_for("val", 0, 0), SIZE, n_markers=7)
