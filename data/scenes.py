"""Scenes of coloured objects whose truth is known exactly: the small world that is learned from, and tested on.

A photograph has to be annotated; a drawn scene annotates itself. Each one holds 2-6 objects unless told, each a shape in
a color, each in its own cell of a 3 x 3 grid, so that "bottom left" names one object and no two objects touch:

    sample_scene  generator -> Scene      what is where: all the randomness
    render        Scene     -> image      the same scene is always the same picture
    caption       Scene     -> "top left: a red star. center: a large blue ring."
    marked_scene  generator -> Scene, some of its objects, and for each a marker: seen, and told from the others

What may be asked about them is in questions.py; benchmarks.py asks as the paper's data sets do; write.py makes files.

Two pitfalls. A marker may vanish in what it lies on (a red point on a red star): then it is sampled again. And two
markers in one image must be told apart by their words: their kinds differ, or both have named and unlike colors.
"""
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from overlay import KINDS, RELEASED, Distribution, Marker, Region, phrase, sample_marker

# -- what a scene may hold; all lengths in parts of the image's shorter side -----------------------------------------
# No triangle: "the red triangle" would name both an object and a marker. No gray: backgrounds are grayish.
OBJECT_COLORS = {"red": (205, 25, 40), "orange": (255, 128, 10), "yellow": (255, 232, 60), "green": (20, 150, 50),
                 "blue": (30, 70, 225), "purple": (130, 30, 160), "white": (250, 250, 250), "black": (15, 15, 15)}
DIAMETERS = {"small": (0.22, 0.26), "large": (0.30, 0.36)}   # the gap keeps the word "large" from being a coin toss
P_LARGE = 0.5
ROTATION, STRETCH, BRIGHTNESS = math.radians(20), 0.12, 0.06   # each is the most in either direction
REACH = 1.42          # how many radii around an object are free of others: its box's corners, and most ellipses
CELL_EDGE = 0.04      # centers keep this far from the borders of their cell: position words are never a close call
PLACING_TRIES = 16
BACKGROUNDS = ("flat", "gradient", "stripes", "noise")
# What only rich scenes have:
TEXTURES, P_TEXTURE = ("plain", "striped", "dotted"), (0.6, 0.2, 0.2)
LETTERED, P_TEXT = ("circle", "square", "heart", "star"), 0.5   # shapes with room for a letter or a digit, if plain
LETTERS, DIGITS = "ABCDEFGHKLMNPRSTUVXYZ", "123456789"

# RELEASED is meant for 336 pixels: at 112 many of its strokes are thinner than a pixel, and faint. BOLD stays seen.
BOLD = Distribution(alpha=(0.7, 1), mask_alpha=(0.3, 0.5), rectangle_width=(6, 10), ellipse_width=(6, 10),
                    ellipse_scale=(1.1, 1.4), triangle_width=(5, 8), point_radius=(12, 20), point_spread=1 / 32,
                    scribble_width=(7, 12), contour_width=(3, 5), arrow_width=(5, 8), arrow_length=(1.0, 110),
                    arrow_head=(0.35, 0.5), arrow_head_min=18)

P_MARKERS = (0.4, 0.3, 0.3)   # that one, two, three objects are marked
CLEAR = 1.3           # how many times the smaller of two offsets, or of two differences in color, the larger must be
CONTRAST = 80         # alpha x distance in RGB, between a marker and what lies under it
MASKED = 45           # distance in RGB, between an object's color and its tint under a mask
UNLIKE = 130          # distance in RGB, between the colors of two markers of the same kind
SPLITS = {"train": 0, "val": 1, "test": 2}
POSITIONS = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))


@dataclass(frozen=True)
class Object:
    shape: str
    color: str
    size: str                                # "small" or "large"
    rgb: tuple[int, int, int]
    polygon: tuple[tuple[float, float], ...]  # pixels; drawn exactly so
    box: tuple[float, float, float, float]    # the polygon's bounds
    texture: str = "plain"                   # one of TEXTURES
    text: str = ""                           # a letter or a digit in its middle

    @property
    def center(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def region(self) -> Region:
        return Region(box=self.box, polygons=(self.polygon,))


@dataclass(frozen=True)
class Background:
    kind: str
    colors: tuple[tuple[int, int, int], tuple[int, int, int]]
    slope: tuple[float, float] = (0.0, 0.0)   # gradient, stripes: periods over the width and over the height
    seed: int = 0                             # noise


@dataclass(frozen=True)
class Scene:
    size: tuple[int, int]
    objects: tuple[Object, ...]
    background: Background


# -- shapes: unit polygons, centered on their bounds, within a circle of radius 1 ------------------------------------
def _arc(start, stop, radius=1.0, x=0.0, points=36):
    angles = np.radians(np.linspace(start, stop, points))
    return np.stack([x + radius * np.cos(angles), radius * np.sin(angles)], 1)


def _star(angles=np.radians(np.arange(-90, 270, 36))):
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.resize([1, 0.48], 10)[:, None]


def _heart(t=np.linspace(0, 2 * np.pi, 40, endpoint=False)):
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1)


def _unit(points):
    points = np.array(points, float)
    points -= (points.min(0) + points.max(0)) / 2
    return points / np.hypot(*points.T).max()


SHAPES = {name: _unit(points) for name, points in {
    "circle": _arc(0, 350),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "star": _star(),
    "cross": [(-1, -.3), (-.3, -.3), (-.3, -1), (.3, -1), (.3, -.3), (1, -.3),
              (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3), (-1, .3)],
    "heart": _heart(),
    "ring": np.concatenate([_arc(90, 450), _arc(450, 90, 0.52)]),   # one polygon: an upright slit joins the rims
    "moon": np.concatenate([_arc(57.8, 302.2), _arc(275.6, 84.4, 0.85, x=0.45)]),    # where the two circles meet
    "bar": [(-1, -.32), (1, -.32), (1, .32), (-1, .32)],
    "hourglass": [(-.9, -1), (.9, -1), (.2, 0), (.9, 1), (-.9, 1), (-.2, 0)],
    "bolt": [(.4, -1), (-.85, .25), (-.2, .25), (-.4, 1), (.85, -.35), (.2, -.35)],
}.items()}

EXTRA = {"house": _unit([(-.85, -.1), (0, -1), (.85, -.1), (.85, 1), (-.85, 1)])}   # in no scene unless asked for


def make_object(shape: str, color: str, size: str, center: tuple[float, float], radius: float, rotation: float = 0.0,
                stretch: float = 1.0, brightness: float = 1.0) -> Object:
    """Center and radius in pixels; `stretch` makes it wider (> 1) or taller (< 1), never beyond the radius."""
    cos, sin = math.cos(rotation), math.sin(rotation)
    points = {**SHAPES, **EXTRA}[shape] * (radius * min(stretch, 1), radius / max(stretch, 1))
    points = np.round(points @ ((cos, sin), (-sin, cos)) + center, 2)
    rgb = tuple(min(255, round(channel * brightness)) for channel in OBJECT_COLORS[color])
    box = (*points.min(0).tolist(), *points.max(0).tolist())
    return Object(shape, color, size, rgb, tuple(map(tuple, points.tolist())), box)


# -- scenes ----------------------------------------------------------------------------------------------------------
def sample_scene(generator: np.random.Generator, size: tuple[int, int] = (224, 224), n: int | None = None,
                 shapes: Sequence[str] = tuple(SHAPES), rich: bool = False) -> Scene:
    """A scene of n objects (2-6 unless told), no two alike in both shape and color, none near another. rich: some have
    a texture, or bear a letter or a digit, each another one."""
    n = int(generator.integers(2, 7)) if n is None else n
    if not 1 <= n <= 9:
        raise ValueError(f"n is {n}; expected 1 to 9 objects, one for each cell of the 3 x 3 grid")
    places = _place(generator, size, n)
    looks, colors = generator.permutation(len(shapes) * len(OBJECT_COLORS))[:n].tolist(), list(OBJECT_COLORS)
    objects = []
    for look, (name, center, radius), jitter in zip(looks, places, (2 * generator.random((n, 3)) - 1).tolist()):
        objects.append(make_object(shapes[look // len(colors)], colors[look % len(colors)], name, center, radius,
                                   ROTATION * jitter[0], 1 + STRETCH * jitter[1], 1 + BRIGHTNESS * jitter[2]))
    if rich:
        signs = iter(generator.permutation(list(LETTERS + DIGITS)).tolist())
        objects = [_dress(generator, thing, next(signs)) for thing in objects]
    return Scene(tuple(size), tuple(objects), _sample_background(generator))


def _dress(generator, thing, sign):
    u, v = generator.random(2).tolist()
    texture = TEXTURES[(u >= P_TEXTURE[0]) + (u >= P_TEXTURE[0] + P_TEXTURE[1])]
    bears = texture == "plain" and thing.shape in LETTERED and v < P_TEXT
    return replace(thing, texture=texture, text=sign if bears else "")


def _place(generator, size, n):
    """(size name, center, radius) for n objects in n cells, no two in each other's reach.

    Each failed try pulls the centers nearer to the middles of their cells; every other one makes a large object
    small, and the last but one all that are left. Small objects in the middles always fit ((REACH + 1) x 0.13 < 1/3),
    so the last try cannot fail.
    """
    width, height = size
    cells = generator.permutation(9)[:n].tolist()
    large = (generator.random(n) < P_LARGE).tolist()
    for patience in range(PLACING_TRIES, -1, -1):
        places = []
        for cell, is_large, (u, v, w) in zip(cells, large, generator.random((n, 3)).tolist()):
            name = "large" if is_large else "small"
            low, high = DIAMETERS[name]
            radius = (low + (high - low) * w) / 2 * min(width, height)
            calm = patience / PLACING_TRIES
            center = (_coordinate(cell % 3, u, calm, radius, width), _coordinate(cell // 3, v, calm, radius, height))
            places.append((name, center, radius))
        if all(math.dist(a, b) > REACH * max(r, s) + min(r, s)
               for i, (_, a, r) in enumerate(places) for _, b, s in places[:i]):
            return places
        if patience == 1:
            large = [False] * n
        elif patience % 2 and True in large:
            large[large.index(True)] = False
    raise AssertionError(f"{n} small objects in the middles of their cells did not fit: {places}")


def _coordinate(cell, u, calm, radius, side):
    """Along one axis: a center in the cell 0, 1 or 2, `calm` (0-1) times a random offset u (0-1) from its middle."""
    middle, room = (cell + 0.5) / 3, 1 / 3 - 2 * CELL_EDGE
    return min(max((middle + calm * room * (u - 0.5)) * side, radius + 1), side - radius - 1)


def _sample_background(generator):
    """Muted on purpose: between black and white, and too gray to pass for a color."""
    kind = BACKGROUNDS[generator.integers(len(BACKGROUNDS))]
    base = 105 + 60 * generator.random() + 30 * (generator.random(3) - 0.5)
    other = base + (36 * generator.random() - 18) + 16 * (generator.random(3) - 0.5)
    periods = 0.45 if kind == "gradient" else 3 + 7 * generator.random()
    angle = 2 * math.pi * generator.random()
    colors = tuple(tuple(color.round().astype(int).tolist()) for color in (base, other))
    slope = (periods * math.cos(angle), periods * math.sin(angle))
    return Background(kind, colors, slope, int(generator.integers(2**31)))


# -- pictures --------------------------------------------------------------------------------------------------------
def render(scene: Scene, supersample: int = 4) -> Image.Image:
    """The scene as an RGB image: the background, then each object through a mask drawn `supersample` times finer."""
    image = _background_image(scene.background, scene.size)
    for thing in scene.objects:
        x0, y0 = math.floor(thing.box[0]), math.floor(thing.box[1])
        w, h = math.ceil(thing.box[2]) - x0, math.ceil(thing.box[3]) - y0
        mask = Image.new("L", (w * supersample, h * supersample))
        # Pillow counts pixel centers, polygons count pixel corners: hence the half
        outline = [((x - x0) * supersample - 0.5, (y - y0) * supersample - 0.5) for x, y in thing.polygon]
        ImageDraw.Draw(mask).polygon(outline, fill=255)
        mask = mask.reduce(supersample)
        image.paste(thing.rgb, (x0, y0), mask)
        if thing.texture != "plain":
            pattern = _pattern(thing, mask.size)
            image.paste(_second_tone(thing.rgb), (x0, y0), ImageChops.multiply(mask, pattern))
        if thing.text:
            write_on(image, thing, thing.text)
    return image


def _second_tone(rgb):
    """Of the same hue: darker where the color is bright, else brighter."""
    end = 0 if sum(rgb) > 3 * 128 else 255
    return tuple(round(0.5 * channel + 0.5 * end) for channel in rgb)


def _pattern(thing, size):
    """Where the second tone goes: slanted stripes, or dots, as large as the object asks for."""
    x, y = np.meshgrid(*map(np.arange, size))
    if thing.texture == "striped":
        period = max(size) / 4
        on = (x + y) % period < period / 2
    else:
        period = max(size) / 4.5
        on = np.hypot(x % period - period / 2, y % period - period / 2) < 0.36 * period
    return Image.fromarray((255 * on).astype(np.uint8))


@lru_cache
def _font(size):
    return ImageFont.load_default(size)


def write_on(image: Image.Image, thing: Object, text: str) -> None:
    """Text in the middle of an object, in black or white, whichever is farther from its color."""
    bright = sum(thing.rgb) > 3 * 128
    font = _font(round((thing.box[2] - thing.box[0]) / 2))
    ImageDraw.Draw(image).text(thing.center, text, fill="black" if bright else "white", font=font, anchor="mm")


def _background_image(background, size):
    """Any background is a field of bytes and a palette: 0 is one color, 128 the other, and 256 would be 0 again."""
    if background.kind == "flat":
        return Image.new("RGB", size, background.colors[0])
    if background.kind == "noise":
        grains = np.random.default_rng(background.seed).integers(0, 129, (16, 16), dtype=np.uint8)
        field = Image.fromarray(grains).resize(size, Image.Resampling.BILINEAR)
    else:                                                  # periods along x and y; a byte wraps by itself
        along = [(256 * slope / side * np.arange(side)).astype(np.int32).astype(np.uint8)
                 for slope, side in zip(background.slope, size)]
        field = Image.fromarray(along[0][None, :] + along[1][:, None])   # (H, W)
    mix = (1 - np.cos(np.arange(256) * np.pi / 128)) / 2                  # (256,) 0 … 1 … 0
    first, second = np.array(background.colors, float)
    palette = (first + mix[:, None] * (second - first)).round().astype(np.uint8)
    field.putpalette(palette.tobytes())
    return field.convert("RGB")


# -- words -----------------------------------------------------------------------------------------------------------
def look_of(thing: Object) -> str:
    """'red star', 'striped orange ring'."""
    return f"{'' if thing.texture == 'plain' else thing.texture + ' '}{thing.color} {thing.shape}"


def describe(thing: Object) -> str:
    """'a red star', 'an orange ring', 'a striped orange ring'."""
    look = look_of(thing)
    return f"{'an' if look[0] in 'aeiou' else 'a'} {look}"


def cell(scene: Scene, thing: Object) -> tuple[int, int]:
    """(row, column) of the 3 x 3 grid that an object's center lies in."""
    (x, y), (width, height) = thing.center, scene.size
    return int(3 * y / height), int(3 * x / width)


def position(scene: Scene, thing: Object) -> str:
    """'bottom left'."""
    row, column = cell(scene, thing)
    return POSITIONS[row][column]


def caption(scene: Scene, marked: Iterable[tuple[Object, str]] = ()) -> str:
    """Every object in reading order, its position first: a model can say where to look before it looks there. Of the
    pairs (object, phrase) in `marked` the object is said to be "within the red rectangle", and so on."""
    words = {id(thing): said for thing, said in marked}
    told = ((thing, tell(thing, words.get(id(thing)))) for thing in reading_order(scene))
    return " ".join(f"{position(scene, thing)}: {text}." for thing, text in told)


def reading_order(scene: Scene) -> list[Object]:
    return sorted(scene.objects, key=lambda thing: (*cell(scene, thing), thing.center[0]))


def tell(thing: Object, marked: str | None = None) -> str:
    """'a red star', 'a large striped orange ring with the letter K within the red rectangle'."""
    noun = describe(thing) if thing.size == "small" else f"a large {look_of(thing)}"
    sign = f"with the {'number' if thing.text in DIGITS else 'letter'} {thing.text}" if thing.text else None
    return " ".join(filter(None, (noun, sign, marked)))


def relation(a: Object, b: Object) -> str:
    """'The red star is left of the blue ring.', by the longer of the two offsets between their centers."""
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    if abs(dx) >= abs(dy):
        word = "left of" if dx < 0 else "right of"
    else:
        word = "above" if dy < 0 else "below"
    return f"The {a.color} {a.shape} is {word} the {b.color} {b.shape}."


def is_clear(a: Object, b: Object) -> bool:
    """Is one offset between their centers so much longer than the other that the relation is no close call?"""
    short, long = sorted(abs(p - q) for p, q in zip(a.center, b.center))
    return long >= CLEAR * short


# -- randomness, and markers ------------------------------------------------------------------------------------------
def generator_for(split: str, seed: int, index: int) -> np.random.Generator:
    """The random stream of one sample: no split shares one, and neither workers nor resuming change it."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    return np.random.default_rng([SPLITS[split], seed, index])


class NoMarkerError(ValueError):
    """No marker of this kind can be seen on this object and told from the others."""


def marked_scene(generator: np.random.Generator, size: tuple[int, int], kinds: Sequence[str] = KINDS,
                 n_markers: int | None = None, distribution: Distribution = RELEASED, rich: bool = False):
    """A scene, some of its objects, and their markers."""
    choice = generator.random()
    if n_markers is None:
        n_markers = 1 + (choice >= P_MARKERS[0]) + (choice >= P_MARKERS[0] + P_MARKERS[1])
    if not 1 <= n_markers <= 6:
        raise ValueError(f"n_markers is {n_markers}; expected 1 to 6, the most objects of a scene")
    scene = sample_scene(generator, size, n=int(generator.integers(max(2, n_markers), 7)), rich=rich)
    for _ in range(20):  # other objects and kinds, where these leave no marker that can be seen and told apart
        try:
            return scene, *sample_markers(generator, scene, n_markers, kinds, distribution)
        except NoMarkerError as error:
            last = error
    raise last


def sample_markers(generator: np.random.Generator, scene: Scene, n: int, kinds: Sequence[str] = KINDS,
                   distribution: Distribution = RELEASED) -> tuple[tuple[Object, ...], tuple[Marker, ...]]:
    """n objects of the scene, and for each a visible marker which words can tell from the others."""
    if not 1 <= n <= len(scene.objects) or not kinds:
        raise ValueError(f"{n} markers of {len(kinds)} kinds for {len(scene.objects)} objects; expected one or more "
                         "of each, and no more markers than objects")
    things = [scene.objects[i] for i in generator.permutation(len(scene.objects))[:n]]
    kinds = [kinds[i] for i in generator.integers(len(kinds), size=n)]
    markers = []
    for thing, kind in zip(things, kinds):
        for _ in range(1000):
            marker = sample_marker(thing.region, scene.size, generator, kind=kind, distribution=distribution)
            rivals = [other for other in markers if other.kind == kind]
            named = kinds.count(kind) == 1 or not phrase(marker).endswith(f"the {kind}")
            if named and _is_visible(marker, thing, scene) and all(_far(marker, r.color, UNLIKE) for r in rivals):
                break
        else:
            raise NoMarkerError(f"no visible {kind} in 1000 tries that differs from {len(markers)} other markers")
        markers.append(marker)
    return tuple(things), tuple(markers)


def until_marked(draw: Callable[[], Scene], generator: np.random.Generator, n: int, kinds: Sequence[str] = KINDS,
                 distribution: Distribution = RELEASED, accept: Callable[..., bool] = lambda *marked: True):
    """The first scene of draw(), draw(), … that can be marked, and as accept(scene, things, markers) likes it: all three."""
    while True:
        scene = draw()
        try:
            things, markers = sample_markers(generator, scene, n, kinds, distribution)
        except NoMarkerError:
            continue
        if accept(scene, things, markers):
            return scene, things, markers


def _far(marker, rgb, least, weight=1.0):
    return weight * math.dist(marker.color, rgb) >= least


def _is_visible(marker, thing, scene):
    """Does the marker contrast with what is under it: the background, and unless it runs around it, the object?

    A mask tints its object. The tint must be unlike the object's color, or no one could see the mask, yet clearly
    nearer to it than to any other, or no one could tell the answer: yellow may turn a red star into an orange one.
    """
    if marker.kind == "mask":
        tint = [(1 - marker.alpha) * a + marker.alpha * b for a, b in zip(thing.rgb, marker.color)]
        own, *others = sorted(OBJECT_COLORS, key=thing.color.__ne__)
        near = math.dist(tint, OBJECT_COLORS[own])
        return near >= MASKED and all(math.dist(tint, OBJECT_COLORS[other]) >= CLEAR * near for other in others)
    under = scene.background.colors
    if marker.kind not in ("rectangle", "ellipse"):
        under = (*under, thing.rgb)
    return all(_far(marker, rgb, CONTRAST, marker.alpha) for rgb in under)
