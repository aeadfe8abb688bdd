"""Scenes: do they show what they claim? Every claim is checked against pixels or geometry."""
import itertools
import json
import math
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from chat import Turn
from commandline import run
from data import scenes
from data.records import Records
from data.scenes import (BACKGROUNDS, OBJECT_COLORS, POSITIONS, SHAPES, Background, Scene, caption, caption_sample,
                         describe, example_scene, generator_for, main, make_object, marked_caption_sample,
                         marker_sample, relation, render, sample_markers, sample_scene, test_sample, write)
from overlay import KINDS, draw, make_marker, phrase

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


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_marks_visibly_the_object_that_is_asked_about(kind):
    """Guards against a marker on another object than the answer's, an invisible one, and an image marked already."""
    for i in range(12):
        generator = generator_for("test", 1, i)
        sample = test_sample(generator, SIZE, kind)
        scene = sample_scene(generator_for("test", 1, i), SIZE)
        (marker,), (turn,) = sample.markers, sample.turns
        assert marker.kind == kind and turn.image and turn.question == f"What is {phrase(marker)}?"
        assert sample.image.tobytes() == render(scene).tobytes()
        change = abs(np.array(draw(sample.image, sample.markers)).astype(int) - np.array(sample.image)).max(2)
        assert (change > 20).sum() >= 8, marker
        rows, columns = np.nonzero(change)
        thing, = (t for t in scene.objects if describe(t) == turn.answer)
        x0, y0, x1, y1 = thing.box
        pad = 6 + max(x1 - x0, y1 - y0) / 4   # an ellipse may be 1.5 times as wide as its object
        touched = (columns >= x0 - pad) & (columns < x1 + pad) & (rows >= y0 - pad) & (rows < y1 + pad)
        assert touched.any(), (thing, marker)
        if kind != "arrow":
            assert touched.mean() > 0.95, (thing, marker)


@pytest.mark.parametrize("kinds", [KINDS, ("rectangle",), ("arrow", "mask contour")])
def test_markers_of_one_image_are_told_apart_by_words(kinds):
    """Guards against two red arrows, and against "the arrow" beside "the red arrow": either fits both markers."""
    for i in range(60):
        sample = marker_sample(generator_for("train", 2, i), SIZE, kinds, n_markers=3)
        phrases = [phrase(marker) for marker in sample.markers]
        assert len(set(phrases)) == 3
        for a, b in itertools.permutations(sample.markers, 2):
            assert a.kind != b.kind or not phrase(a).endswith(f"the {a.kind}"), phrases
        assert [turn.image for turn in sample.turns] == [True] + [False] * (len(sample.turns) - 1)
        assert {marker.kind for marker in sample.markers} <= set(kinds)


def test_every_form_of_question_comes_up_with_its_kind_of_answer():
    """Guards against a form that a changed probability has made unreachable, and answers of the wrong form."""
    turns = [turn for i in range(400) for turn in marker_sample(generator_for("train", 3, i), (64, 64)).turns]
    for start in ("What is this?", "What is within", "What color ", "What shape ", "Where is this?", "Where is the object ",
                  "How are the two ", "How are the objects ", "Describe the image."):
        assert any(turn.question.startswith(start) for turn in turns), start
    for turn in turns:
        if turn.question.startswith("What color"):
            assert turn.answer in OBJECT_COLORS
        elif turn.question.startswith("What shape"):
            assert turn.answer in SHAPES
        elif turn.question.startswith("Where is"):
            assert turn.answer in sum(POSITIONS, ())
        elif turn.question.startswith("What is"):
            assert turn.answer.split()[1] in OBJECT_COLORS and turn.answer.split()[2] in SHAPES


def test_answers_belong_to_their_markers():
    """Guards against questions and answers in different orders, and relations with the two exchanged."""
    pairs = 0
    for i in range(150):
        sample = marker_sample(generator_for("train", 4, i), SIZE, n_markers=2)
        questions = {turn.question: turn.answer for turn in sample.turns}
        nouns = {marker: questions.get(f"What is {phrase(marker)}?") for marker in sample.markers}
        for question, answer in questions.items():
            if "related" in question and all(nouns.values()):
                two = "two" in question  # nobody can see which was drawn first: the left or upper one is named first
                order = sorted(sample.markers, key=lambda m: answer.index(nouns[m].split(" ", 1)[1]) if two else question.index(phrase(m)))
                first, second = (nouns[m].split(" ", 1)[1] for m in order)
                assert answer.startswith(f"The {first} is ") and answer.endswith(f" the {second}.")
                assert not two or "is left of" in answer or "is above" in answer
                pairs += 1
    assert pairs > 20


def test_where_it_is_and_what_it_is_agree():
    """Guards against the position of another object: the caption of the same image has the two side by side."""
    seen = 0
    for i in range(200):
        sample = marker_sample(generator_for("train", 5, i), SIZE)
        answers = {turn.question: turn.answer for turn in sample.turns}
        for marker in sample.markers:
            where, what = answers.get(f"Where is the object {phrase(marker)}?"), answers.get(f"What is {phrase(marker)}?")
            if where and what and "Describe the image." in answers:
                noun = what.split(" ", 1)[1]
                assert re.search(rf"(^|\. ){where}: an? (large )?{noun}\.", answers["Describe the image."])
                seen += 1
    assert seen > 10


def test_a_marked_caption_says_the_marker_at_its_object():
    """Guards against a marker said of another object, or of none."""
    scene = example_scene()
    star, ring = scene.objects[:2]
    marked = [(ring, make_marker("ellipse", ring.box, scene.size, "blue")), (star, make_marker("rectangle", star.box, scene.size))]
    said = caption(scene, [(thing, phrase(marker)) for thing, marker in marked])
    assert said.startswith("top left: a large red star within the red rectangle. top right: a large blue ring within the blue ellipse. ")
    assert said.replace(" within the red rectangle", "").replace(" within the blue ellipse", "") == caption(scene)
    for i in range(60):
        sample = marked_caption_sample(generator_for("train", 6, i), SIZE)
        (turn,) = sample.turns
        assert turn.question == "" and turn.image and 1 <= len(sample.markers) <= 3
        assert all(turn.answer.count(f" {phrase(marker)}.") == 1 for marker in sample.markers)


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
        marker_sample(generator_for("val", 0, 0), n_markers=7)


def test_a_caption_sample_is_the_image_and_its_caption():
    """Guards against a stage-1 sample without its image, or with a question."""
    sample = caption_sample(generator_for("train", 0, 3), SIZE)
    scene = sample_scene(generator_for("train", 0, 3), SIZE)
    turn, = sample.turns
    assert sample.markers == () and turn.image and turn.question == "" and turn.answer == caption(scene)
    assert sample.image.tobytes() == render(scene).tobytes() and sample.image.size == SIZE


def test_written_records_are_official_and_say_what_the_pixels_say(tmp_path):
    """Guards against boxes as x, y, width, height, nested or unflattened polygons, missing images, and regions and
    captions that tell of different scenes."""
    assert run(main, ["write", str(tmp_path / "out"), "-n", "5", "--size", "96", "--seed", "7"]) == 0
    out = tmp_path / "out"
    regions, captions = (json.loads((out / f"{name}.json").read_text()) for name in ("regions", "captions"))
    assert len(regions) == len(captions) == 5 and len({record["id"] for record in regions}) == 5
    for region, told in zip(regions, captions):
        assert region["id"].split("-")[0] == "refcocog"
        (x0, y0, x1, y1), = region["bboxes"]
        (flat,), = region["segmentations"]
        assert [min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2])] == [x0, y0, x1, y1]
        image = Image.open(out / region["image"])
        assert image.size == (96, 96) and told["image"] == region["image"]
        human, gpt = told["conversations"]
        assert human == {"from": "human", "value": "<image>"} and gpt["from"] == "gpt"
        color, shape = region["answer"].split()[1:]
        assert f" {color} {shape}." in gpt["value"]
        pixels = np.array(image.crop((x0, y0, x1, y1))).reshape(-1, 3).astype(int)
        assert (abs(pixels - OBJECT_COLORS[color]).max(1) < 30).mean() > 0.2


def test_houses_are_records_of_a_new_task(tmp_path):
    """Guards against a fine-tuning example that teaches nothing new, whose records can't be read, or that is tested on
    what it was trained on."""
    assert run(main, ["houses", str(tmp_path / "out"), "-n", "30"]) == 0
    told = {}
    for split in ("train", "test"):
        data = Records([tmp_path / "out" / f"{split}.json"], tmp_path / "out")
        samples = list(data)
        assert len(samples) == 30 and all(len(sample.markers) == 1 and sample.image.size == (224, 224) for sample in samples)
        told[split] = [sample.turns[0].answer for sample in samples]
        assert 5 <= sum(answer.endswith("house") for answer in told[split]) <= 20
    assert told["train"] != told["test"] and not any("house" in caption(scene) for scene in many(50))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    """Guards against a run that mixes its files with those of another."""
    (tmp_path / "mine.txt").write_text("keep")
    assert run(main, ["write", str(tmp_path), "-n", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: ") and [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", 1)
    assert len(list((tmp_path / "empty" / "images").iterdir())) == 1


@pytest.mark.parametrize("arguments", [["write", "OUT", "-n", "0"], ["write", "OUT", "--split", "dev"], ["write"],
                                       ["write", "OUT", "-n", "many"], ["paint", "OUT"], [],
                                       ["sheet", "OUT/no/a.png"],
                                       ["write", "OUT", "--size", "5"], ["write", "OUT", "--seed", "-1"],
                                       ["example", "OUT.nosuchtype"]])
def test_bad_arguments_end_in_one_line(arguments, tmp_path, capsys):
    """Guards against tracebacks, usage pages, and half a folder left behind."""
    arguments = [argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]
    status = run(main, arguments)
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert list(tmp_path.iterdir()) == []


def test_sheet_and_example_are_images(tmp_path):
    """Guards against documented commands that no longer run."""
    for name in ("sheet", "example"):
        assert run(main, [name, str(tmp_path / f"{name}.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").width >= 4 * 224
    assert Image.open(tmp_path / "example.png").size == (448, 448)


def test_told_samples_hold_what_their_answers_are_read_from():
    """Guards against a caption of another scene, or one that leaves the markers out: nothing could be read from it."""
    for i in range(40):
        sample = scenes.told_sample(generator_for("train", 0, i), (64, 64))
        said, question = sample.turns[0].question.split("\n")
        assert sample.open is None and not any(turn.image for turn in sample.turns)
        for turn in [Turn(question, sample.turns[0].answer), *sample.turns[1:]]:
            if turn.question.startswith("What is ") and turn.question != "What is this?":
                words = turn.question.removeprefix("What is ").removesuffix("?")
                noun = turn.answer.split(" ", 1)[1]
                assert re.search(rf"{noun} {words}\.", said), (said, turn)
