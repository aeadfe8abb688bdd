"""Single questions about single markers, as the experiments vary them: which attribute is new, and what stands in the way.

    ATTRIBUTES   name -> bands of training, values to test, and a Trial of such a value; all else is as in training
    BREAKING     name -> levels of a difficulty, and a Trial of such a level
    narrow_lesson, of_kind, of_many, described, zero_shot

Everything is drawn from a generator. A Trial is a Sample that knows what naming one of its scene's objects at random
would score.
"""

import colorsys
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageFilter

from chat import Turn
from clip import preprocess
from contrast import Told, caption_of
from data.records import Sample
from data.scenes import Object, Scene, caption, describe, generator_for, render, sample_scene, until_marked
from evals.variants import Lesson, lesson
from overlay import KINDS, RELEASED, Marker, draw, make_marker, phrase, sample_marker, scale_of

LINES = ("rectangle", "ellipse", "triangle", "scribble", "arrow")  # kinds whose line has a width


@dataclass(frozen=True)
class Trial(Sample):
    chance: float = 0.0


def trial(scene: Scene, thing: Object, marker: Marker, image: Image.Image | None = None) -> Trial:
    """What is it that the marker marks? image: if it is not the scene with this marker alone."""
    turn = Turn(f"What is {phrase(marker)}?", describe(thing), image=True)
    shown = (lambda: image) if image else (lambda: draw(render(scene), [marker]))
    return Trial(shown, (), (turn,), 1 / len(scene.objects))


def one_marked(generator, size, kinds=KINDS, accept=lambda scene, thing, marker: True, n=None, distribution=RELEASED):
    """A scene of n objects (2 to 6 unless told), one of them, and its marker, such that accept(scene, thing, marker)."""
    draw_scene = lambda: sample_scene(generator, size, n or int(generator.integers(2, 7)))
    fits = lambda scene, things, markers: accept(scene, *things, *markers)
    scene, (thing,), (marker,) = until_marked(draw_scene, generator, 1, kinds, distribution, fits)
    return scene, thing, marker


def of_kind(generator, size, kind: str) -> Trial:
    return trial(*one_marked(generator, size, (kind,)))


def of_many(generator, size, count: int) -> Trial:
    """Eight things, `count` of them marked; a question about the first."""
    scene, things, markers = until_marked(lambda: sample_scene(generator, size, 8), generator, count)
    return trial(scene, things[0], markers[0], draw(render(scene), markers))


# -- attributes beyond the bands of training ---------------------------------------------------------------------------


def hue(marker: Marker) -> float:
    """Degrees: 0 is red, 120 green, 240 blue."""
    return 360 * colorsys.rgb_to_hsv(*(channel / 255 for channel in marker.color))[0]


def across(scene: Scene, thing: Object) -> float:
    """Where an object's middle lies, in percent of the width."""
    return 100 * thing.center[0] / scene.size[0]


BAND = (3, 5)  # pixels at 336, as in overlay.Distribution
NARROW = replace(RELEASED, rectangle_width=BAND, ellipse_width=BAND, triangle_width=BAND, scribble_width=BAND,
                 arrow_width=BAND, alpha=(0.6, 0.8), mask_alpha=(0.35, 0.45), named_color=0.0, ellipse_scale=(1.0, 1.2),
                 arrow_wobbly=0.0, arrow_angle=(0, 180))
LEARNED = tuple(kind for kind in KINDS if kind != "triangle")
HUES, PLACES = (0, 240), (0, 67)


def _narrow(scene, thing, marker) -> bool:
    return HUES[0] <= hue(marker) <= HUES[1] and across(scene, thing) < PLACES[1]


def narrow_lesson(generator, size) -> Lesson:
    """A lesson whose markers all come from the narrow bands."""
    while True:
        one = lesson(generator, size, kinds=LEARNED, n_markers=int(generator.integers(1, 3)), distribution=NARROW)
        if all(_narrow(one.scene, thing, marker) for thing, marker in zip(one.things, one.markers)):
            return one


@dataclass(frozen=True)
class Attribute:
    unit: str
    band: tuple | None  # of training: the lowest and the highest value, or all names; None: never met
    values: tuple  # to test
    make: Callable[[np.random.Generator, tuple[int, int], object], Trial]

    def inside(self, value) -> bool:
        if self.band is None or isinstance(value, str):
            return self.band is not None and value in self.band
        return self.band[0] <= value <= self.band[1]


def _learned(generator, size, kinds=LEARNED, accept=_narrow, **fields):
    """As in training, but for these fields of the distribution."""
    return one_marked(generator, size, kinds, accept, distribution=replace(NARROW, **fields))


def _thick(generator, size, value) -> Trial:
    scene, thing, marker = _learned(generator, size, [kind for kind in LINES if kind in LEARNED])
    return trial(scene, thing, replace(marker, width=value * scale_of(size)))


def _opaque(generator, size, value) -> Trial:
    scene, thing, marker = _learned(generator, size, [kind for kind in LEARNED if kind != "mask"])
    return trial(scene, thing, replace(marker, alpha=value))


def _colored(generator, size, value) -> Trial:
    scene, thing, marker = _learned(generator, size, ("rectangle", "ellipse", "arrow"))
    color = tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(value / 360, 1, 1))
    return trial(scene, thing, replace(marker, color=color))


def _wide(generator, size, value) -> Trial:
    return trial(*_learned(generator, size, ("ellipse",), ellipse_scale=(value, value)))


def _turned(generator, size, value) -> Trial:
    return trial(*_learned(generator, size, ("arrow",), arrow_angle=(value, value)))


def _bent(generator, size, value) -> Trial:
    return trial(*_learned(generator, size, ("arrow",), arrow_wobbly=1.0, arrow_wobble=value))


def _by_hand(generator, size, value) -> Trial:
    """A rectangle as a hand draws it: a stroke along its sides, which strays by `value` pixels at 336."""
    scene, thing, marker = _learned(generator, size, ("rectangle",))
    (x0, y0), (x1, y1) = marker.points
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    path = [(a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t) for a, b in zip(corners, corners[1:]) for t in (0, 1 / 3, 2 / 3)]
    strayed = np.array([*path, corners[-1]]) + value * scale_of(size) * generator.standard_normal((len(path) + 1, 2))
    stroke = make_marker("scribble", strayed.tolist(), size, marker.color, marker.width, marker.alpha)
    return trial(scene, thing, marker, draw(render(scene), [stroke]))


def _placed(generator, size, value) -> Trial:
    def near(scene, thing, marker):
        return abs(across(scene, thing) - value) < 7.5 and HUES[0] <= hue(marker) <= HUES[1]

    return trial(*_learned(generator, size, accept=near))


def _of_kind(generator, size, value) -> Trial:
    return trial(*_learned(generator, size, (value,)))


ATTRIBUTES = {
    "thickness": Attribute("pixels at 336", BAND, (1, 2, 3, 4, 5, 6, 8, 11, 15), _thick),
    "alpha": Attribute("1 hides what is below", (0.6, 0.8), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), _opaque),
    "hue": Attribute("degrees: red 0, green 120, blue 240", HUES, tuple(range(0, 360, 30)), _colored),
    "size of an ellipse": Attribute("times the object's box", (1.0, 1.2), (0.6, 0.8, 1.0, 1.1, 1.2, 1.4, 1.7, 2.0), _wide),
    "angle of an arrow": Attribute("degrees from tip to tail", (0, 180), tuple(range(0, 360, 30)), _turned),
    "wobble of an arrow": Attribute("pixels at 336", (0, 0), (0, 3, 6, 9, 12, 16), _bent),
    "rectangle by hand": Attribute("strays by pixels at 336", None, (0, 2, 4, 6, 9, 12), _by_hand),
    "place": Attribute("percent of the width", PLACES, (15, 30, 45, 60, 70, 85), _placed),
    "kind": Attribute("", LEARNED, KINDS, _of_kind),
}


# -- what stands in the way ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difficulty:
    unit: str
    levels: tuple
    make: Callable[[np.random.Generator, tuple[int, int], float], Trial]


def _clutter(generator, size, level) -> Trial:
    return trial(*one_marked(generator, size, n=level))


def _erased(generator, size, level) -> Trial:
    """So many percent of the image, in squares of a 14th of its side, show no marker, only what lies beneath."""
    scene, thing, marker = one_marked(generator, size)
    plain, marked = render(scene), draw(render(scene), [marker])
    covered = generator.random((14, 14)) < level / 100
    mask = Image.fromarray((255 * covered).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return trial(scene, thing, marker, Image.composite(plain, marked, mask))


def _own_color(generator, size, level) -> Trial:
    """The marker's color, `level` percent of the way from its own to its object's."""
    scene, thing, marker = one_marked(generator, size, LINES)
    color = tuple(round(a + (b - a) * level / 100) for a, b in zip(marker.color, thing.rgb))
    altered = replace(marker, color=color)
    return trial(scene, thing, marker, draw(render(scene), [altered]))


def _noisy(generator, size, level) -> Trial:
    scene, thing, marker = one_marked(generator, size)
    pixels = np.asarray(draw(render(scene), [marker])) + level * generator.standard_normal((size[1], size[0], 3))
    return trial(scene, thing, marker, Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def _blurred(generator, size, level) -> Trial:
    scene, thing, marker = one_marked(generator, size)
    image = draw(render(scene), [marker]).filter(ImageFilter.GaussianBlur(level * scale_of(size)))
    return trial(scene, thing, marker, image)


def _compressed(generator, size, level) -> Trial:
    scene, thing, marker = one_marked(generator, size)
    file = io.BytesIO()
    draw(render(scene), [marker]).save(file, "JPEG", quality=level)
    return trial(scene, thing, marker, Image.open(file).convert("RGB"))


def _shrunken(thing: Object, factor: float) -> Object:
    x, y = thing.center
    polygon = tuple((x + factor * (px - x), y + factor * (py - y)) for px, py in thing.polygon)
    x0, y0, x1, y1 = thing.box
    box = (x + factor * (x0 - x), y + factor * (y0 - y), x + factor * (x1 - x), y + factor * (y1 - y))
    return replace(thing, polygon=polygon, box=box)


def _small(generator, size, level) -> Trial:
    """All objects at `level` percent of their size, and the marker on the small one."""

    def shrunken():
        scene = sample_scene(generator, size)
        return replace(scene, objects=tuple(_shrunken(thing, level / 100) for thing in scene.objects))

    scene, (thing,), (marker,) = until_marked(shrunken, generator, 1)
    return trial(scene, thing, marker)


def _overlapping(generator, size, level) -> Trial:
    """Another object's ellipse, moved `level` percent of the way onto the object that is asked about, and its marker."""
    scene, things, markers = until_marked(
        lambda: sample_scene(generator, size, int(generator.integers(2, 7))), generator, 2,
        ("rectangle", "arrow", "scribble", "point", "ellipse"),
        accept=lambda scene, things, markers: markers[1].kind == "ellipse" != markers[0].kind)
    (x, y), (to_x, to_y) = (thing.center for thing in reversed(things))
    dx, dy = level / 100 * (to_x - x), level / 100 * (to_y - y)
    other = replace(markers[1], points=tuple((px + dx, py + dy) for px, py in markers[1].points))
    return trial(scene, things[0], markers[0], draw(render(scene), [markers[0], other]))


def _disagreeing(generator, size, level) -> Trial:
    """`level` more markers with the same words on as many other objects; only the first one's object counts."""
    scene, thing, marker = one_marked(generator, size, ("rectangle", "ellipse", "arrow", "point"), n=4)
    others = [other for other in scene.objects if other is not thing][:level]
    more = [sample_marker(other.region, size, generator, marker.kind, marker.color) for other in others]
    return trial(scene, thing, marker, draw(render(scene), [marker, *more]))


BREAKING = {
    "clutter": Difficulty("objects", (2, 3, 4, 5, 6, 7, 8, 9), _clutter),
    "covered marker": Difficulty("percent of the image", (0, 20, 40, 60, 80, 95), _erased),
    "marker in the object's color": Difficulty("percent of the way", (0, 25, 50, 75, 100), _own_color),
    "noise": Difficulty("standard deviation, of 255", (0, 10, 20, 40, 60, 90), _noisy),
    "blur": Difficulty("pixels at 336", (0, 1, 2, 4, 6, 9), _blurred),
    "JPEG": Difficulty("quality", (95, 60, 30, 15, 8, 4), _compressed),
    "small objects": Difficulty("percent of their size", (100, 80, 65, 50, 40, 30), _small),
    "overlapping markers": Difficulty("percent of the way onto the other", (0, 25, 50, 75, 100), _overlapping),
    "markers that disagree": Difficulty("others with the same words", (0, 1, 2, 3), _disagreeing),
}


# -- beyond regions, and beyond language -------------------------------------------------------------------------------

def chance_of(what: str, marks: int) -> float:
    """Of a guess: facts are never guessed; scenes have 2 to 6 things, equally often, and no fewer than markers."""
    return 1 / (7 - max(2, marks)) if what == "number of things" else 0.0


def described(generator, size, marks: int) -> Trial:
    """The whole scene, to be described, with so many markers on it."""

    def enough():
        while True:
            scene = sample_scene(generator, size)
            if len(scene.objects) >= marks:
                return scene

    scene, _, markers = until_marked(enough, generator, marks) if marks else (enough(), (), ())
    return Trial(lambda: render(scene), markers, (Turn("Describe the image.", caption(scene), image=True),), 0.0)


def _facts(text: str) -> list[str]:
    return [fact for fact in text.rstrip(". ").split(". ") if fact]


def facts_right(sample: Sample, text: str) -> float:
    """Of the true caption's facts ("top left: a red star"), the share that the answer tells."""
    true = _facts(sample.turns[0].answer)
    return len(set(true) & set(_facts(text))) / len(true)


def number_right(sample: Sample, text: str) -> float:
    """Does the answer tell of as many things as there are?"""
    return float(len(_facts(text)) == len(_facts(sample.turns[0].answer)))


@torch.inference_mode()
def zero_shot(model, tokenize, n: int, size) -> list[float]:
    """Does a CLIP find which of eight captions is true, that differ in the kind of marker alone?"""
    found, device = [], next(model.parameters()).device
    for i in range(n):
        generator = generator_for("test", 0, i)
        scene, thing, marker = one_marked(generator, size, (KINDS[i % len(KINDS)],))
        said = []
        for kind in KINDS:
            other = marker if kind == marker.kind else sample_marker(thing.region, size, generator, kind, marker.color)
            said.append(caption_of(scene, [Told(thing, other)]))
        pixels = preprocess(draw(render(scene), [marker]), model.vision_model.config.image_size)[None].to(device)
        logits = model(pixels, tokenize(said).to(device))
        found.append(float(int(logits.argmax()) == KINDS.index(marker.kind)))
    return found
