"""Draw the marker: region + style -> pixels. ViP-LLaVA (arXiv 2312.00784), section 3, its visual prompts.

The idea of the whole method is in this file: a region is not described to the model in coordinates or special
tokens. It is *drawn onto the image*, half transparent, and the words of the question point at the drawing:

    marker = sample_marker(Region(box=(40, 60, 200, 180)), image.size, np.random.default_rng(0))   # all randomness
    image = draw(image, [marker])                                                                  # none
    question = f"What is the object {phrase(marker)}?"                       # "... within the red rectangle?"

A `Region` is what is meant: a box, polygons or a bitmap. A `Marker` is what is drawn. A person's own comes from
`make_marker("rectangle", (40, 60, 200, 180), image.size, color="blue")` and goes the same way.

Eight kinds. Numbers are pixels of an image whose longer side is 336; they scale by s = max(width, height) / 336.
| kind         | Marker.points     | distribution, the released code's           | the paper, where it differs   |
|--------------|-------------------|---------------------------------------------|-------------------------------|
| rectangle    | two corners       | the box; line 2-8                           |                               |
| ellipse      | two corners       | bounds x 1-1.5; line 2-8                    |                               |
| triangle     | 3 inside the mask | no angle over 150 degrees; line 2-8         |                               |
| point        | centre, inside    | normal, variance side / 8; radius 5-20      | anywhere inside the mask      |
| scribble     | Bezier, 4 inside  | cubic; line 2-12                            | quadratic, 3 points           |
| mask         | none: Marker.mask | filled; alpha 48-128 of 255                 | alpha as for the others       |
| mask contour | none: Marker.mask | outline, grown by 1-2                       |                               |
| arrow        | tail, (bend,) tip | tip within side / 4 of the centre; line 1-6 | within side / 2               |
Alpha: code 96-255 of 255, paper 0.5-1. `Distribution` has a name for every range.

Where we leave the released code: centres, corners, control points and tips always lie inside mask and image (there,
all but the tip give up after some tries, and the tip is never moved into the mask); the variance of a centre and the
wobble of a shaft scale by s too; a shaft is at least as long as its head; a sampled ellipse can be seen (there, not
where it runs around the whole image). Of a region that reaches over the border, the visible part is meant.

Pitfalls. Coordinates are pixels of the upright original image, origin top left: draw first, resize later. Pixel i
covers [i, i + 1), but Pillow draws both ends: a box from 3 to 5 is three pixels wide. Edges are hard, as the official
weights saw them. Geometry is rounded to 1/100 pixel, lest the last bit of a platform's sine change a marker.

    python overlay.py markers.png          # writes a sheet of the eight markers, each with its phrase
"""
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real

import numpy as np
from PIL import Image, ImageDraw

WORDS = {"rectangle": "within", "ellipse": "within", "triangle": "with", "point": "at", "scribble": "with",
         "mask": "with", "mask contour": "with", "arrow": "pointed to by"}
KINDS = tuple(WORDS)
COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
          "fuchsia": (255, 0, 255), "aqua": (0, 255, 255), "orange": (255, 165, 0), "purple": (128, 0, 128),
          "gold": (255, 215, 0)}
NAMES = {rgb: name for name, rgb in COLORS.items()}
SHEET = "markers.png"
LIMIT = 100_000      # pixels: a coordinate beyond it is a mistake, and Pillow would walk along it for minutes


# -- what is meant, and what is drawn --------------------------------------------------------------------------------

def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")


def rgb_of(color: str | Sequence[int]) -> tuple[int, int, int]:
    """(r, g, b) of one of the nine names, of "#rrggbb", or of a triple of whole numbers 0..255; else ValueError."""
    if isinstance(color, str):
        if color in COLORS:
            return COLORS[color]
        if len(color) == 7 and color[0] == "#" and set(color[1:]) <= set("0123456789abcdefABCDEF"):
            return tuple(bytes.fromhex(color[1:]))
    elif isinstance(color, (tuple, list)) and len(color) == 3 and all(c in range(256) for c in color):
        return tuple(int(c) for c in color)
    raise ValueError(f"unknown color {color!r}: expected #rrggbb or one of {', '.join(COLORS)}")


def _numbers(values, what):
    try:
        if any(isinstance(v, (bool, np.bool_, str)) for v in values):      # a bitmap's row, a text
            raise TypeError
        values = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        raise ValueError(f"{what} needs numbers, got {values!r:.200}") from None
    for v in values:
        if not -LIMIT <= v <= LIMIT:      # NaN fails this as well
            raise ValueError(f"{what} needs numbers within -{LIMIT}..{LIMIT} pixels, got {v}")
    return values


def _points(values, what):
    """((x, y), ...) of pairs, or of flat numbers x, y, x, y, ... as COCO writes polygons."""
    values = tuple(values) if np.iterable(values) else (values,)
    if not values or not np.iterable(values[0]):
        flat = _numbers(values, what)
        values = tuple(zip(flat[::2], flat[1::2])) if len(flat) % 2 == 0 else (flat,)
    for pair in values:
        if not np.iterable(pair) or len(pair) != 2:
            raise ValueError(f"{what} needs pairs x, y, got {pair!r}")
    return tuple(_numbers(pair, what) for pair in values)


def _bits(bitmap):
    """A copy, as bool. Probabilities and logits are refused: which of them is in the mask, nobody has said."""
    bitmap = np.array(bitmap)
    if bitmap.dtype != bool and not np.isin(bitmap, (0, 1)).all() and bitmap.dtype.kind not in "ui":
        raise ValueError(f"a bitmap needs true and false, got {bitmap.dtype} other than 0 and 1: compare it with a threshold")
    return bitmap.astype(bool)


@dataclass(frozen=True, eq=False)
class Region:
    """What is meant, in pixels of the original image: a box (x0, y0, x1, y1) or a mask or both. The mask is polygons,
    each of pairs or of flat numbers, of which the union is meant, or a bitmap (height, width) of the image's size.
    ValueError if it is malformed. Regions compare by content."""
    box: tuple | None = None
    polygons: tuple = ()
    bitmap: np.ndarray | None = None

    def __post_init__(self):
        box = None if self.box is None else _numbers(self.box, "a box")
        if box is not None and (len(box) != 4 or box[2] <= box[0] or box[3] <= box[1]):
            raise ValueError(f"a box needs x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {box}")
        polygons = () if self.polygons is None else tuple(_points(polygon, "a polygon") for polygon in self.polygons)
        for polygon in polygons:
            if len(polygon) < 3:
                raise ValueError(f"a polygon needs at least 3 points, got {len(polygon)}")
        bitmap = None if self.bitmap is None else _bits(self.bitmap)
        if bitmap is not None:
            if bitmap.ndim != 2 or not bitmap.any():
                raise ValueError(f"a bitmap needs shape (height, width) and a pixel that is set, got {bitmap.shape} "
                                 f"with {bitmap.sum()} set")
            bitmap.setflags(write=False)
        for name, value in (("box", box), ("polygons", polygons), ("bitmap", bitmap)):
            object.__setattr__(self, name, value)
        if polygons and bitmap is not None or not self.has_mask and box is None:
            raise ValueError("a region needs a box, polygons or a bitmap, and not both of the latter")

    def _key(self):
        return self.box, self.polygons, None if self.bitmap is None else (self.bitmap.shape, self.bitmap.tobytes())

    def __eq__(self, other):
        return isinstance(other, Region) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    @property
    def has_mask(self):
        return bool(self.polygons) or self.bitmap is not None

    @property
    def bounds(self):
        """x0, y0, x1, y1 of the mask, at least one pixel wide and high; without a mask, the box."""
        if self.bitmap is not None:
            xs, ys = np.flatnonzero(self.bitmap.any(0)), np.flatnonzero(self.bitmap.any(1))
            return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
        if not self.polygons:
            return self.box
        xs, ys = zip(*(point for polygon in self.polygons for point in polygon))
        return min(xs), min(ys), max(max(xs), min(xs) + 1), max(max(ys), min(ys) + 1)


@dataclass(frozen=True)
class Marker:
    """What is drawn, in pixels of the original image; `draw` needs nothing else. ValueError if it is malformed."""
    kind: str
    points: tuple = ()                    # see the module's table; a scribble is a chain of cubic Beziers: 4, 7, ...
    mask: Region | None = None            # of mask and mask contour: a Region with polygons or a bitmap
    color: tuple = COLORS["red"]          # given as `rgb_of` takes it, kept as (r, g, b)
    width: int = 1                        # of the line, in whole pixels; a mask contour grows by it to either side
    alpha: float = 1.0                    # 0..1; at 1 nothing shines through
    radii: tuple = (0.0, 0.0)             # rx, ry of a point
    head: float = 0.0                     # length of an arrow's head
    filled: bool = True                   # filled or open head

    def __post_init__(self):
        check_kind(self.kind)
        radii = self.radii if isinstance(self.radii, (tuple, list)) else (self.radii,)
        for name, value in (("alpha", self.alpha), ("width", self.width), ("head", self.head), *(("radii", r) for r in radii)):
            if not isinstance(value, Real):
                raise ValueError(f"{name} needs a number, got {value!r}")
        if len(radii) != 2:
            raise ValueError(f"radii need rx and ry, got {self.radii}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha needs to lie within 0..1, got {self.alpha}")
        if not 0 < self.width <= LIMIT:
            raise ValueError(f"width needs to be over 0 pixels, got {self.width}")
        points = tuple((round(x, 2), round(y, 2)) for x, y in _points(self.points, f"a {self.kind}"))
        for name, value in (("points", points), ("color", rgb_of(self.color)), ("head", round(self.head, 2)),
                            ("width", max(1, round(self.width))), ("radii", tuple(round(r, 2) for r in self.radii))):
            object.__setattr__(self, name, value)
        needs, fits = self._needs()
        if not fits:
            raise ValueError(f"{self.kind} needs {needs}, got {points}")

    def _needs(self):
        """What the geometry of this kind needs, in words, and whether it is so."""
        p, n = self.points, len(self.points)
        if self.kind in ("mask", "mask contour"):
            return "polygons or a bitmap, and no points", n == 0 and self.mask is not None and self.mask.has_mask
        if self.kind in ("rectangle", "ellipse"):
            return "x0, y0, x1, y1 with x0 < x1 and y0 < y1", n == 2 and p[0][0] < p[1][0] and p[0][1] < p[1][1]
        if self.kind == "triangle":
            return "three points that are not on one line", n == 3 and _largest_angle(p) < 179.9
        if self.kind == "point":
            return f"one x, y and radii over 0, here {self.radii}", n == 1 and all(0 < r <= LIMIT for r in self.radii)
        if self.kind == "scribble":
            return "4, 7, 10, ... control points that are not all equal", n > 3 and n % 3 == 1 and len(set(p)) > 1
        return (f"a tail, a tip apart from it, and a head of 0 or more pixels, here {self.head}",
                n in (2, 3) and p[0] != p[-1] and 0 <= self.head <= LIMIT)


def _largest_angle(points):
    """The largest angle of a triangle in degrees; 180 where two corners coincide."""
    largest = 0.0
    for i in range(3):
        (x, y), (ax, ay), (bx, by) = points[i], points[i - 1], points[i - 2]
        ax, ay, bx, by = ax - x, ay - y, bx - x, by - y
        if ax == ay == 0:
            return 180.0
        largest = max(largest, abs(math.atan2(ax * by - ay * bx, ax * bx + ay * by)))
    return math.degrees(largest)


def phrase(marker: Marker) -> str:
    """The words that point at a marker: "within the red rectangle", or "within the rectangle" if no name fits."""
    return " ".join(filter(None, (WORDS[marker.kind], "the", NAMES.get(marker.color), marker.kind)))


def scale_of(size: tuple[int, int]) -> float:
    """The unit s of all widths and lengths, max(width, height) / 336, for an image of `size` = (width, height)."""
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not min(size) > 0:
        raise ValueError(f"size is {size!r}; expected an image's width and height, of 1 or more pixels")
    return max(size) / 336


# -- made by hand ----------------------------------------------------------------------------------------------------

def make_marker(kind: str, geometry, size: tuple[int, int], color="red", width: float | None = None,
                alpha: float = 128 / 255, radius: float | None = None, filled: bool = True) -> Marker:
    """A Marker of what a person gives, in pixels of an image of `size` = (width, height). ValueError if malformed.

    geometry   rectangle, ellipse: x0, y0, x1, y1 | triangle: three x, y | point: x, y | scribble: two or more x, y,
               joined by a smooth stroke | arrow: tail and tip, or the tip alone | mask, mask contour: a list of
               polygons, or a bitmap (height, width). Points are pairs or flat numbers.
    defaults   width 3 s (mask contour 1 s); radius of a point 8 s; alpha as in the official evaluations.
    """
    check_kind(kind)
    s = scale_of(size)
    style = {"color": color, "alpha": alpha, "width": max(3 * s, 1) if width is None else width}
    if kind in ("mask", "mask contour"):
        style["width"] = max(s, 1) if width is None else width
        bitmap = getattr(geometry, "ndim", 0) == 2
        return Marker(kind, mask=Region(bitmap=geometry) if bitmap else Region(polygons=geometry), **style)
    points = _points(geometry, kind)
    if kind == "point":
        return Marker(kind, points, radii=(max(8 * s, 1) if radius is None else radius,) * 2, **style)
    if kind == "scribble":
        return Marker(kind, _stroke(points), **style)
    if kind == "arrow" and points:
        points = (_tail(points[0], size), points[0]) if len(points) == 1 else points
        head = max(0.35 * math.dist(points[0], points[-1]), 6 * s)
        return Marker(kind, points, head=head, filled=filled, **style)
    return Marker(kind, points, **style)


def _tail(tip, size):
    """50 s pixels from the tip, aslant and towards the middle; less where the image is too narrow for that."""
    step = 50 * scale_of(size) / math.sqrt(2)
    return tuple(min(v + step, side - 1) if v < side / 2 else max(v - step, 0) for v, side in zip(tip, size))


def _stroke(points):
    """A Catmull-Rom curve through n points, as 3 n - 2 Bezier control points."""
    if len(set(points)) < 2:
        raise ValueError(f"scribble needs at least two different points, got {points}")
    around, controls = [points[0], *points, points[-1]], [points[0]]
    for (ax, ay), (bx, by), (cx, cy), (dx, dy) in zip(around, around[1:], around[2:], around[3:]):
        controls += [(bx + (cx - ax) / 6, by + (cy - ay) / 6), (cx - (dx - bx) / 6, cy - (dy - by) / 6), (cx, cy)]
    return controls


# -- sampled ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Distribution:
    """Every range that `sample_marker` draws from; the defaults are the released code's. Widen one, or hold one out:
    `dataclasses.replace(RELEASED, arrow_angle=(0, 90))`. Widths, radii and lengths are pixels at 336: they scale."""
    kinds: tuple = KINDS
    colors: tuple = tuple(COLORS)
    named_color: float = 0.5              # probability of a named color; else any rgb, and the phrase names none
    rgb: tuple = (0, 255)                 # each channel of an unnamed color
    alpha: tuple = (96 / 255, 1)
    mask_alpha: tuple = (48 / 255, 128 / 255)
    rectangle_width: tuple = (2, 8)
    ellipse_width: tuple = (2, 8)
    ellipse_scale: tuple = (1, 1.5)       # one factor for both axes
    triangle_width: tuple = (2, 8)
    triangle_max_angle: float = 150       # degrees
    point_radius: tuple = (5, 20)
    point_stretched: float = 0.5          # probability of radii r * a and r / a instead of r
    point_stretch: tuple = (0.5, 2)       # a
    point_spread: float = 1 / 8           # variance of the centre, in square pixels per pixel of the side
    scribble_width: tuple = (2, 12)
    contour_width: tuple = (1, 2)         # growth to either side of the outline
    arrow_width: tuple = (1, 6)
    arrow_offset: float = 0.25            # the tip's largest distance from the centre, per side of the box
    arrow_length: tuple = (0.8, 50)       # between this times the shorter side and this many pixels
    arrow_angle: tuple = (0, 360)         # degrees, from tip to tail: 0 to the right, 90 down
    arrow_head: tuple = (0.2, 0.5)        # per length
    arrow_head_min: float = 6
    arrow_filled: float = 0.5             # probability of a filled head, else an open one
    arrow_wobbly: float = 0.5             # probability of a bent shaft
    arrow_wobble: float = 5               # the bend's largest shift, in x and in y


RELEASED = Distribution()
CONSTANT = replace(RELEASED, rectangle_width=(3, 3), point_radius=(8, 8), point_stretched=0)      # Visual7W, PointQA
EVALUATION = replace(CONSTANT, alpha=(128 / 255, 128 / 255), mask_alpha=(128 / 255, 128 / 255))


def _uniform(generator, low, high):
    return low + (high - low) * generator.random()


def _whole(generator, low, high):
    return int(generator.integers(int(low), int(high) + 1))


def _check_size(region, size):
    if region and region.bitmap is not None and region.bitmap.shape != (size[1], size[0]):
        h, w = region.bitmap.shape
        raise ValueError(f"the bitmap is {w} x {h} pixels, the image {size[0]} x {size[1]}")


def _visible(box, size):
    """The part of a box that lies on the image."""
    x0, y0 = (round(max(v, 0), 2) for v in box[:2])
    x1, y1 = (round(min(v, side), 2) for v, side in zip(box[2:], size))
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"the region {tuple(box)} lies outside the image of {size[0]} x {size[1]} pixels")
    return x0, y0, x1, y1


def _in_polygon(polygon, x, y):
    """Even-odd rule: how many edges does a ray to the right cross?"""
    inside, (ax, ay) = False, polygon[-1]
    for bx, by in polygon:
        if (ay > y) != (by > y) and x < (bx - ax) * (y - ay) / (by - ay) + ax:
            inside = not inside
        ax, ay = bx, by
    return inside


class _Inside:
    """Where a region covers the image. A mask is rasterized within its own bounds only, and its pixels are
    listed only where one is to be chosen."""

    def __init__(self, region, size):
        self.box = x0, y0, x1, y1 = _visible(region.bounds, size)
        self.polygons, self.mask = region.polygons, None
        if region.has_mask:
            self.left, self.top = int(x0), int(y0)
            crop = self.left, self.top, min(int(x1) + 1, size[0]), min(int(y1) + 1, size[1])
            self.mask = _raster(region, crop)      # (h, w) of the crop
            if not self.mask.any():
                raise ValueError(f"the region within {self.box} covers no pixel of the image")

    @cached_property
    def pixels(self):
        return np.flatnonzero(self.mask)

    def holds(self, x, y):
        if self.mask is None:
            return self.box[0] <= x < self.box[2] and self.box[1] <= y < self.box[3]
        row, column = math.floor(y) - self.top, math.floor(x) - self.left
        return (0 <= row < self.mask.shape[0] and 0 <= column < self.mask.shape[1] and bool(self.mask[row, column])
                and (not self.polygons or any(_in_polygon(polygon, x, y) for polygon in self.polygons)))

    def cell(self, generator):
        """x0, y0, x1, y1 of a random pixel of the mask; of a box, a random square as wide as its shorter side."""
        if self.mask is None:
            x0, y0, x1, y1 = self.box
            side = min(x1 - x0, y1 - y0)
            x, y = _uniform(generator, x0, x1 - side), _uniform(generator, y0, y1 - side)
            return x, y, x + side, y + side
        row, column = divmod(int(self.pixels[int(generator.random() * len(self.pixels))]), self.mask.shape[1])
        return self.left + column, self.top + row, self.left + column + 1, self.top + row + 1

    def point(self, generator, cell=None):
        """A random x, y, uniform over the region, or over one cell of it. Of a polygon so thin that 50 tries miss it,
        a pixel that it crosses is good enough."""
        for _ in range(50):
            x0, y0, x1, y1 = cell or (self.box if self.mask is None else self.cell(generator))
            x, y = (math.floor(100 * _uniform(generator, *span)) / 100 for span in ((x0, x1), (y0, y1)))
            if self.holds(x, y):
                break
        return x, y

    def near(self, generator, shift, tries):
        """The first point centre + shift() that lies inside; after so many tries, any that does."""
        for _ in range(tries):
            dx, dy = shift()
            x, y = round((self.box[0] + self.box[2]) / 2 + dx, 2), round((self.box[1] + self.box[3]) / 2 + dy, 2)
            if self.holds(x, y):
                return x, y
        return self.point(generator)


def _one_part(region, size, generator):
    """Points and scribbles stay in one of several polygons, as in the released code."""
    parts = [part for part in (Region(polygons=(polygon,)) for polygon in region.polygons)
             if part.bounds[0] < size[0] and part.bounds[1] < size[1] and part.bounds[2] > 0 and part.bounds[3] > 0]
    return _Inside(parts[_whole(generator, 0, len(parts) - 1)] if len(parts) > 1 else region, size)


# One function a kind: (region, size of the image, generator, distribution, s) -> the geometry of the Marker.

def _sample_rectangle(region, size, generator, d, s):
    return {"points": _visible(region.box or region.bounds, size)}


def _sample_ellipse(region, size, generator, d, s):
    x0, y0, x1, y1 = _visible(region.bounds, size)
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    for _ in range(100):
        factor = _uniform(generator, *d.ellipse_scale) / 2
        rx, ry = factor * (x1 - x0), factor * (y1 - y0)
        if (max(cx, size[0] - 1 - cx) / rx) ** 2 + (max(cy, size[1] - 1 - cy) / ry) ** 2 > 1.02:
            return {"points": (cx - rx, cy - ry, cx + rx, cy + ry)}      # a corner of the image lies outside of it
    raise ValueError(f"an ellipse about {region.bounds} times {d.ellipse_scale} would lie outside the image")


def _sample_triangle(region, size, generator, d, s):
    inside = _Inside(region, size)
    for attempt in range(200):      # few triangles fit into a line of pixels, but many into each one of them
        cell = inside.cell(generator) if attempt >= 100 else None
        points = tuple(inside.point(generator, cell) for _ in range(3))
        if _largest_angle(points) <= d.triangle_max_angle:
            return {"points": points}
    raise ValueError(f"no triangle inside {region.bounds} has all angles up to {d.triangle_max_angle} degrees")


def _sample_point(region, size, generator, d, s):
    r = max(_whole(generator, d.point_radius[0] * s, d.point_radius[1] * s), 1)
    stretch = _uniform(generator, *d.point_stretch) if generator.random() < d.point_stretched else 1
    inside = _one_part(region, size, generator)
    x0, y0, x1, y1 = inside.box

    def normal():      # Box-Muller, from uniform numbers alone: numpy may change how its normal() makes them
        radius = math.sqrt(-2 * s * d.point_spread * math.log(1 - generator.random()))
        angle = math.tau * generator.random()
        return radius * math.cos(angle) * math.sqrt(x1 - x0), radius * math.sin(angle) * math.sqrt(y1 - y0)

    return {"points": (inside.near(generator, normal, 10),), "radii": (r * stretch, r / stretch)}


def _sample_scribble(region, size, generator, d, s):
    inside = _one_part(region, size, generator)
    return {"points": tuple(inside.point(generator) for _ in range(4))}


def _sample_mask(region, size, generator, d, s):
    x0, y0, x1, y1 = _visible(region.bounds, size)
    return {"mask": region if region.has_mask else Region(polygons=[(x0, y0, x0, y1, x1, y1, x1, y0)])}


def _sample_arrow(region, size, generator, d, s):
    inside = _Inside(region, size)
    sides = inside.box[2] - inside.box[0], inside.box[3] - inside.box[1]
    x, y = inside.near(
        generator, lambda: [side * _uniform(generator, -d.arrow_offset, d.arrow_offset) for side in sides], 50)
    length = _uniform(generator, d.arrow_length[0] * min(sides), d.arrow_length[1] * s)
    head = max(_uniform(generator, *d.arrow_head) * length, d.arrow_head_min * s)
    shaft, angle = max(length - head, head, 1), math.radians(_uniform(generator, *d.arrow_angle))
    ends = (x + shaft * math.cos(angle), y + shaft * math.sin(angle)), (x, y)
    if generator.random() < d.arrow_wobbly:
        bend = (sum(v) / 2 + s * _uniform(generator, -d.arrow_wobble, d.arrow_wobble) for v in zip(*ends))
        ends = ends[0], tuple(bend), ends[1]
    return {"points": ends, "head": head, "filled": generator.random() < d.arrow_filled}


SAMPLERS = {"rectangle": _sample_rectangle, "ellipse": _sample_ellipse, "triangle": _sample_triangle, "point": _sample_point,
            "scribble": _sample_scribble, "mask": _sample_mask, "mask contour": _sample_mask, "arrow": _sample_arrow}


def sample_marker(region: Region, size: tuple[int, int], generator: np.random.Generator, kind: str | None = None,
                  color=None, distribution: Distribution = RELEASED) -> Marker:
    """A random Marker for a region of an image of `size` = (width, height), drawn from a numpy Generator.

    kind None takes one of the distribution's kinds; color None a name about half the time, else any rgb. ValueError
    for an unknown kind or color, for a region outside the image, or of which this kind would show nothing, and for a
    bitmap that is not of the image's size.
    """
    d, s = distribution, scale_of(size)
    _check_size(region, size)
    visible = _visible(region.bounds, size)
    kind = d.kinds[_whole(generator, 0, len(d.kinds) - 1)] if kind is None else kind
    check_kind(kind)
    if color is None and generator.random() < d.named_color:
        color = d.colors[_whole(generator, 0, len(d.colors) - 1)]
    color = tuple(_whole(generator, *d.rgb) for _ in range(3)) if color is None else color
    low, high = d.mask_alpha if kind == "mask" else d.alpha
    alpha = _whole(generator, round(255 * low), round(255 * high)) / 255
    low, high = getattr(d, f"{kind.split()[-1]}_width", (1, 1))      # contour_width; a mask and a point have none
    width = max(_whole(generator, low * s, high * s), 1)
    marker = Marker(kind, color=color, alpha=alpha, width=width, **SAMPLERS[kind](region, size, generator, d, s))
    if marker.mask and visible != region.bounds:      # the mask, or its outline, may lie beyond the border
        _on_image(marker, size)
    return marker


# -- drawn -----------------------------------------------------------------------------------------------------------

def _raster(region, crop, outline=False):
    """The mask of a region, or its outline of one pixel, in the crop x0, y0, x1, y1: bool (y1 - y0, x1 - x0)."""
    x0, y0, x1, y1 = crop
    if region.bitmap is None:
        image = Image.new("L", (x1 - x0, y1 - y0))
        for polygon in region.polygons:
            pen, shifted = ImageDraw.Draw(image), [(x - x0, y - y0) for x, y in polygon]
            pen.line([*shifted, shifted[0]], fill=1) if outline else pen.polygon(shifted, fill=1)
        return np.asarray(image).view(bool)
    if not outline:
        return region.bitmap[y0:y1, x0:x1]
    h, w = region.bitmap.shape
    margin = 1 + max(-x0, -y0, x1 - w, y1 - h, 0)      # the crop, and the neighbours of its pixels, may lie outside
    b = np.pad(region.bitmap, margin)[y0 + margin - 1:y1 + margin + 1, x0 + margin - 1:x1 + margin + 1]
    return b[1:-1, 1:-1] & ~(b[:-2, 1:-1] & b[2:, 1:-1] & b[1:-1, :-2] & b[1:-1, 2:])


def _contour(m, crop):
    """The outline grown by w: every pixel becomes a square of 2 w + 1, first along one axis, then along the other."""
    w, (x0, y0, x1, y1) = m.width, crop
    line = _raster(m.mask, (x0 - w, y0 - w, x1 + w, y1 + w), outline=True)      # w more on each side
    for _ in range(2):
        span = 1
        while span < 2 * w + 1:      # doubled each time: `line` covers `span` pixels
            step = min(span, 2 * w + 1 - span)
            line, span = line[:-step] | line[step:], span + step
        line = line.T
    return line      # of the crop again


def _curve(points, steps):
    """The pixels along a chain of Beziers, `steps` points each, repetitions left out: flat whole numbers x, y, ..."""
    controls, t = np.array(points), np.linspace(0, 1, max(steps, 2))[:, None]
    xy = np.concatenate([(1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t ** 2 * c + t ** 3 * d
                         for a, b, c, d in (controls[i:i + 4] for i in range(0, len(controls) - 1, 3))])
    xy = xy.astype(int)      # (steps, 2); cut off, not rounded, as Pillow does
    xy = xy[np.r_[True, (xy[1:] != xy[:-1]).any(1)]]
    return (xy if len(xy) > 1 else np.repeat(xy, 2, 0)).ravel().tolist()


def _barbs(m):
    """The outer corners of an arrow's head: `head` pixels from the tip, 60 degrees to either side of the shaft."""
    (ax, ay), (x, y) = m.points[0], m.points[-1]
    unit = m.head / math.sqrt((ax - x) ** 2 + (ay - y) ** 2)
    dx, dy, sine = unit * (ax - x), unit * (ay - y), math.sqrt(0.75)
    return (x + dx / 2 - sine * dy, y + dy / 2 + sine * dx), (x + dx / 2 + sine * dy, y + dy / 2 - sine * dx)


def _extent(m):
    """x0, y0, x1, y1, whole numbers, around all that a marker can touch."""
    if m.mask:
        x0, y0, x1, y1 = m.mask.bounds
    else:
        xs, ys = zip(*m.points, *(_barbs(m) if m.kind == "arrow" else ()))
        x0, y0, x1, y1 = min(xs) - m.radii[0], min(ys) - m.radii[1], max(xs) + m.radii[0], max(ys) + m.radii[1]
    margin = m.width + 1
    return math.floor(x0) - margin, math.floor(y0) - margin, math.ceil(x1) + margin + 1, math.ceil(y1) + margin + 1


def _stencil(m, crop, steps):
    """One marker within the crop, black and white. Shaft and head share it, so they cannot blend twice."""
    if m.mask:
        return Image.fromarray(_contour(m, crop) if m.kind == "mask contour" else _raster(m.mask, crop))
    x0, y0, x1, y1 = crop
    image = Image.new("1", (x1 - x0, y1 - y0))
    pen, line = ImageDraw.Draw(image), {"fill": 1, "width": m.width}
    points = [(x - x0, y - y0) for x, y in m.points]
    if m.kind == "rectangle":
        pen.rectangle(points, outline=1, width=m.width)
    elif m.kind == "ellipse":
        pen.ellipse(points, outline=1, width=m.width)
    elif m.kind == "triangle":
        pen.line([*points, points[0]], joint="curve", **line)
    elif m.kind == "point":
        (x, y), (rx, ry) = points[0], m.radii
        pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=1, outline=1)
    elif m.kind == "scribble":
        pen.line(_curve(points, steps), **line)
    else:
        pen.line(points[::-1], **line)  # from the tip: Pillow's wide lines depend on it, by a pixel
        (ax, ay), (bx, by) = _barbs(m)
        head = [(ax - x0, ay - y0), points[-1], (bx - x0, by - y0)]
        pen.polygon(head, fill=1) if m.filled else pen.line(head, **line)
    return image


def _tones(color, level):
    """A table for Image.point, what each value of red, of green and of blue becomes under `level` / 255 of a color."""
    sums = np.arange(256) * (255 - level) + np.array(color)[:, None] * level
    return ((sums + 127) // 255).ravel().tolist()      # rounded, as Pillow blends


def _on_image(m, size):
    """The crop x0, y0, x1, y1 of an image of this size that a marker may touch, and its stencil there."""
    x0, y0, x1, y1 = extent = _extent(m)
    crop = max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])
    visible = crop[0] < crop[2] and crop[1] < crop[3]
    stencil = _stencil(m, crop, int(1000 * scale_of(size))) if visible else None
    if stencil is None or not stencil.getbbox():
        raise ValueError(f"nothing of the {m.kind} within {extent} lies on the image, {size[0]} x {size[1]}")
    return crop, stencil


def draw(image: Image.Image, markers: Iterable[Marker]) -> Image.Image:
    """A new RGB image with the markers blended onto it in order. Under a marker a pixel becomes (1 - alpha) · pixel +
    alpha · color; all others keep their values. ValueError for a marker of which nothing lies on the image, for a bitmap
    that is not of the image's size, and for an image of which RGB would show something else: one of more than 8 bits, or
    transparent."""
    if isinstance(markers, Marker):
        raise ValueError(f"draw got one marker, {phrase(markers)}; expected a list of markers")
    if image.mode[0] in "IF" or image.has_transparency_data:
        raise ValueError(f"draw got a {image.mode} image with more than 8 bits or transparency; expected RGB")
    image = image.copy() if image.mode == "RGB" else image.convert("RGB")
    for m in markers:
        _check_size(m.mask, image.size)
        crop, stencil = _on_image(m, image.size)
        image.paste(image.crop(crop).point(_tones(m.color, round(255 * m.alpha))), crop, stencil)
    return image


def main(path: str) -> None:
    """Write a sheet of the eight markers of one concave region. ValueError: there is no such format, or a file already."""
    if not path.lower().endswith((".png", ".jpg")) or os.path.exists(path):
        raise ValueError(f"can't write {path}; expected a new name that ends in .png or .jpg")
    size, generator, sheet = (240, 180), np.random.default_rng(7), Image.new("RGB", (960, 360))
    region = Region(polygons=((60, 40, 180, 50, 170, 130, 120, 80, 70, 140),))
    for i, (kind, color) in enumerate(zip(KINDS, COLORS)):
        shape = make_marker("mask", region.polygons, size, color="#909090", alpha=1)
        sampled = sample_marker(region, size, generator, kind, color)
        tile = draw(Image.new("RGB", size, (225, 225, 225)), [shape, sampled])
        ImageDraw.Draw(tile).text((8, 160), phrase(sampled), fill="black")
        sheet.paste(tile, (i % 4 * 240, i // 4 * 180))
    sheet.save(path)


if __name__ == "__main__":
    try:
        if {"-h", "--help"} & {*sys.argv}:
            sys.exit(print("usage: python overlay.py [markers.png]: write a sheet of the eight markers"))
        main(sys.argv[1] if len(sys.argv) > 1 else SHEET)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
