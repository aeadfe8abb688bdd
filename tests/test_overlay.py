"""overlay.py: sampled markers lie where they should and look as the released code's, and mistakes are refused."""
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import overlay
from overlay import (COLORS, CONSTANT, EVALUATION, KINDS, RELEASED, Distribution, Marker, Region, draw,
                     make_marker, phrase, sample_marker)

W, H = SIZE = (96, 70)
GREY = (90, 100, 110)


def blank(size=SIZE, color=GREY):
    return Image.new("RGB", size, color)


def touched(before, after):
    """(H, W) bool: the pixels that changed."""
    return (np.asarray(before) != np.asarray(after)).any(2)


def star(cx, cy, outer, inner, n=7):
    """A concave polygon: most of its bounds, and often its centre of a chord, is not inside."""
    return tuple((cx + r * math.cos(a), cy + r * math.sin(a))
                 for i in range(2 * n) for r, a in [((outer, inner)[i % 2], math.pi * i / n)])


def even_odd(polygon, x, y):
    """The rule of the ray once more, in numpy, so that the test does not use the code's own."""
    p = np.array(polygon)
    q = np.roll(p, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = p[:, 0] + (q[:, 0] - p[:, 0]) * (y - p[:, 1]) / (q[:, 1] - p[:, 1])
    return bool((((p[:, 1] > y) != (q[:, 1] > y)) & (x < at)).sum() % 2)


HORSESHOE = ((10, 8), (80, 8), (80, 60), (66, 60), (66, 18), (24, 18), (24, 60), (10, 60))      # its centre is a hole
PARTS = (star(20, 22, 15, 5), star(70, 50, 17, 4), ((40.5, 5), (60, 6), (58, 9.5)))
BITMAP = np.zeros((H, W), bool)
BITMAP[12:30, 20:24] = BITMAP[40:44, 50:90] = BITMAP[69, 95] = True      # two bars, and a pixel in the corner
PIXEL = np.zeros((H, W), bool)
PIXEL[33, 47] = True
LINE = np.zeros((H, W), bool)
LINE[69, :] = True

REGIONS = {
    "box": Region(box=(20.3, 10.8, 70.5, 50.25)),
    "polygon": Region(polygons=(HORSESHOE,)),
    "star": Region(box=(30, 15, 70, 55), polygons=(star(50, 35, 20, 6),)),
    "parts": Region(polygons=PARTS),
    "bitmap": Region(bitmap=BITMAP),
    "thin box": Region(box=(94.8, 2, 95.2, 68)),
    "one pixel box": Region(box=(47, 33, 48, 34)),
    "one pixel polygon": Region(polygons=(((47, 33), (48, 33), (48, 34), (47, 34)),)),
    "no area": Region(polygons=(((47, 33), (47, 33), (47, 33)),)),
    "one pixel bitmap": Region(bitmap=PIXEL),
    "line": Region(bitmap=LINE),
    "corner": Region(box=(90, 64, 96, 70)),
    "whole": Region(box=(0, 0, W, H)),
    "whole polygon": Region(polygons=(((0, 0), (W, 0), (W, H), (0, H)),)),
    "over the border": Region(box=(-9, -7, 30, 200)),
    "around the image": Region(box=(-9, -7, 130, 200)),
    "parts over the border": Region(polygons=(star(2, 3, 20, 7), star(90, 80, 30, 9), (200, 9, 220, 9, 210, 30))),
}


def lies_inside(region, x, y):
    if not (0 <= x < W and 0 <= y < H):
        return False
    if region.bitmap is not None:
        return bool(region.bitmap[int(y), int(x)])
    if region.polygons:
        return any(even_odd(polygon, x, y) for polygon in region.polygons)
    x0, y0, x1, y1 = region.box
    return x0 - 0.005 <= x <= x1 + 0.005 and y0 - 0.005 <= y <= y1 + 0.005      # a box is rounded to 1/100 pixel


# -- sampling --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_every_region(kind, name):
    """Guards: the released `point` crashes without a mask; an ellipse around the whole image is invisible, and draw
    would then raise in mid-training; a one-pixel or straight region never gets its triangle."""
    generator = np.random.default_rng(1)
    for _ in range(20):
        m = sample_marker(REGIONS[name], SIZE, generator, kind)
        assert m.kind == kind
        assert touched(blank(), draw(blank(), [replace(m, alpha=1, color=(1, 2, 3))])).any()


@pytest.mark.parametrize("name", [name for name in REGIONS if name != "no area"])
@pytest.mark.parametrize("kind, points", [("triangle", slice(0, 3)), ("point", slice(0, 1)),
                                          ("scribble", slice(0, 4)), ("arrow", slice(-1, None))])
def test_points_lie_inside(kind, points, name):
    """Guards: a point in the hole of a concave mask, in the gap between parts, or outside the image. The released
    code's arrow points at the centre of the box, which for the horseshoe is never part of the object."""
    generator = np.random.default_rng(2)
    for _ in range(150 if "pixel" not in name else 20):
        m = sample_marker(REGIONS[name], SIZE, generator, kind)
        for x, y in m.points[points]:
            assert lies_inside(REGIONS[name], x, y), (m, x, y)


def test_points_cover_the_whole_mask():
    """Guards: a fallback that always gives the same spot. 1,200 draws miss a pixel of 120 with probability 5e-3."""
    mask = np.zeros((H, W), bool)
    mask[5:15, 7:13] = mask[40:50, 70:76] = True
    generator, hit = np.random.default_rng(3), np.zeros((H, W), bool)
    for _ in range(400):
        for x, y in sample_marker(Region(bitmap=mask), SIZE, generator, "triangle").points:
            hit[int(y), int(x)] = True
    assert hit.sum() == 120 == mask.sum()


def test_scribbles_stay_in_one_part():
    """Guards: a stroke across the gap between two polygons; the released code scribbles in any one of them."""
    used, generator = set(), np.random.default_rng(4)
    for _ in range(60):
        m = sample_marker(REGIONS["parts"], SIZE, generator, "scribble")
        homes = [i for i, part in enumerate(PARTS) if all(even_odd(part, *p) for p in m.points)]
        assert len(homes) == 1
        used.update(homes)
    assert used == {0, 1, 2}


@pytest.mark.parametrize("name", ["box", "polygon", "parts", "bitmap", "line", "thin box", "one pixel bitmap"])
def test_no_triangle_is_flat(name):
    """Guards: slivers that look like a line; above all where the region is one."""
    generator, largest = np.random.default_rng(5), 0
    for limit in (150, 100):
        for _ in range(60):
            p = np.array(sample_marker(REGIONS[name], SIZE, generator, "triangle",
                                       distribution=replace(RELEASED, triangle_max_angle=limit)).points)
            u, v = np.roll(p, 1, 0) - p, np.roll(p, 2, 0) - p      # (3, 2)
            angles = np.degrees(np.arccos((u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)))
            assert angles.max() <= limit + 1e-6 and abs(angles.sum() - 180) < 1e-6
            largest = max(largest, angles.max())
    assert largest > 90


def many(kind, n=400, size=(448, 672), distribution=RELEASED, color=None):
    generator, region = np.random.default_rng(6), Region(box=(100, 150, 260, 250))
    return [sample_marker(region, size, generator, kind, color, distribution) for _ in range(n)]


@pytest.mark.parametrize("kind, low, high", [("rectangle", 2, 8), ("ellipse", 2, 8), ("triangle", 2, 8),
                                             ("scribble", 2, 12), ("mask contour", 1, 2), ("arrow", 1, 6)])
def test_widths_scale(kind, low, high):
    """Guards: widths in pixels of the image instead of 336ths of its longer side; an end of the range that never
    comes (of at most 31 widths, 400 draws miss an end with probability 4e-6)."""
    for size, s in (((448, 672), 2), ((336, 300), 1), ((1008, 270), 3)):
        widths = {m.width for m in many(kind, size=size)}
        assert (min(widths), max(widths)) == (low * s, high * s)
    assert {m.width for m in many(kind, 50, size=(300, 280))} <= set(range(max(1, int(low * 300 / 336)), high + 1))


def test_ranges_of_the_released_code():
    """Guards: each figure of method and table, at s = 2 on a box of 160 x 100 around (180, 200)."""
    ratios = np.array([np.subtract(m.points[1], m.points[0]) / (160, 100) for m in many("ellipse")])
    assert 0.9999 <= ratios.min() < 1.02 and 1.48 < ratios.max() <= 1.5001
    assert np.abs(ratios[:, 0] - ratios[:, 1]).max() < 1e-3      # one factor for both axes
    assert {m.points for m in many("rectangle", 5)} == {((100, 150), (260, 250))}
    points = many("point")
    r = [math.sqrt(m.radii[0] * m.radii[1]) for m in points]
    assert 9.98 < min(r) < 12 and 38 < max(r) < 40.02
    round_ = sum(m.radii[0] == m.radii[1] for m in points) / len(points)
    assert 0.4 < round_ < 0.6                                                     # 4 sigma
    stretch = [math.sqrt(m.radii[0] / m.radii[1]) for m in points]
    assert 0.5 <= min(stretch) + 1e-3 and min(stretch) < 0.55 and 1.9 < max(stretch) < 2.001
    x, y = np.array([m.points[0] for m in many("point", 2000)]).T
    assert abs(x.mean() - 180) < 1 and abs(y.mean() - 200) < 1
    assert abs(x.var() / (2 * 160 / 8) - 1) < 0.15 and abs(y.var() / (2 * 100 / 8) - 1) < 0.15
    alphas = [m.alpha * 255 for m in many("arrow", 2000)]
    assert (round(min(alphas)), round(max(alphas))) == (96, 255)
    alphas = [m.alpha * 255 for m in many("mask", 2000)]
    assert (round(min(alphas)), round(max(alphas))) == (48, 128)


def test_arrows_of_the_released_code():
    """Guards: tip, length, head and bend of the table; here the shorter side is 100, so lengths are 80 to 100."""
    arrows = many("arrow", 2000)
    tips = np.array([m.points[-1] for m in arrows])
    assert (abs(tips - (180, 200)) <= (40.01, 25.01)).all() and (abs(tips - (180, 200)).max(0) > (39, 24)).all()
    lengths = np.array([math.dist(m.points[0], m.points[-1]) + m.head for m in arrows])
    assert 79.9 < lengths.min() < 81 and 99 < lengths.max() < 100.1
    heads = np.array([m.head for m in arrows]) / lengths
    assert 0.199 < heads.min() < 0.21 and 0.49 < heads.max() < 0.501
    x, y = (np.array([m.points[0] for m in arrows]) - tips).T
    assert np.histogram(np.arctan2(y, x), 8, (-math.pi, math.pi))[0].min() > 180      # of 250 expected
    bent = [m for m in arrows if len(m.points) == 3]
    assert 0.45 < len(bent) / len(arrows) < 0.55 and 0.45 < np.mean([m.filled for m in arrows]) < 0.55
    bends = [np.abs(np.array(m.points[1]) - (np.array(m.points[0]) + m.points[2]) / 2).max() for m in bent]
    assert 9 < max(bends) <= 10.02
    small = Region(box=(100, 150, 104, 152))
    for m in (sample_marker(small, (448, 672), np.random.default_rng(i), "arrow") for i in range(100)):
        assert m.head >= 12 and math.dist(m.points[0], m.points[-1]) >= m.head - 0.05      # 6 s, and a shaft to see


def test_held_out_ranges():
    """Guards: a field of Distribution that the code does not read."""
    d = Distribution(kinds=("arrow", "point"), colors=("aqua", "gold"), named_color=1, alpha=(0.6, 0.6),
                     arrow_angle=(0, 90), arrow_width=(4, 4), arrow_filled=1, arrow_wobbly=0, arrow_head=(0.3, 0.3),
                     arrow_length=(0.5, 30), arrow_offset=0,
                     point_radius=(9, 9), point_stretched=1, point_stretch=(2, 2))
    drawn = many(None, 300, distribution=d)
    assert {m.kind for m in drawn} == {"arrow", "point"}
    assert {m.color for m in drawn} == {COLORS["aqua"], COLORS["gold"]} and {m.alpha for m in drawn} == {0.6}
    for m in drawn:
        if m.kind == "point":
            assert m.radii == (36, 9)
            continue
        (ax, ay), (x, y) = m.points
        assert (x, y) == (180, 200) and ax >= x and ay >= y and m.width == 8 and m.filled
        assert 50 <= math.dist((ax, ay), (x, y)) / 0.7 + 0.05 and math.dist((ax, ay), (x, y)) / 0.7 <= 60.05
    dark = replace(RELEASED, named_color=0, rgb=(0, 40))
    assert max(max(m.color) for m in many("mask", 50, distribution=dark)) <= 40
    assert {(m.width, m.alpha * 255) for m in many("rectangle", 30, distribution=EVALUATION)} == {(6, 128)}
    assert {m.radii for m in many("point", 30, distribution=CONSTANT)} == {(16, 16)}
    for kind in ("rectangle", "ellipse", "triangle", "scribble", "mask contour"):
        field = "contour_width" if kind == "mask contour" else f"{kind}_width"
        assert {m.width for m in many(kind, 20, distribution=replace(RELEASED, **{field: (17, 17)}))} == {34}
    wide = many("ellipse", 20, distribution=replace(RELEASED, ellipse_scale=(2, 2)))
    assert {m.points[1][0] - m.points[0][0] for m in wide} == {320}


def test_colors_and_phrases():
    """Guards: a name that is not what was drawn; a forced color that is ignored; all eight phrases, word by word."""
    drawn = many(None, 800)
    assert {m.kind for m in drawn} == set(KINDS)
    named = [m for m in drawn if m.color in COLORS.values()]
    assert 0.42 < len(named) / len(drawn) < 0.58 and {m.color for m in named} == set(COLORS.values())
    expected = {"rectangle": "within the red rectangle", "ellipse": "within the red ellipse",
                "triangle": "with the red triangle", "point": "at the red point", "scribble": "with the red scribble",
                "mask": "with the red mask", "mask contour": "with the red mask contour",
                "arrow": "pointed to by the red arrow"}
    for kind, words in expected.items():
        red = many(kind, 1, color="red")[0]
        assert phrase(red) == words and phrase(replace(red, color="#ff0001")) == words.replace("red ", "")
        assert phrase(replace(red, color="lime")) == words.replace("red", "lime")
    assert many("mask", 1, color="#0A141e")[0].color == (10, 20, 30)


GOLDEN = {      # color, width, alpha * 255, points, rx, ry, head, filled
    "rectangle": ((128, 0, 128), 1, 175, ((20.0, 10.0), (70.0, 50.0)), 0.0, 0.0, 0.0, True),
    "ellipse": ((128, 0, 128), 1, 175, ((9.5, 7.63), (80.5, 60.37)), 0.0, 0.0, 0.0, True),
    "triangle": ((128, 0, 128), 1, 175, ((68.14, 8.92), (11.12, 10.94), (18.36, 35.51)), 0.0, 0.0, 0.0, True),
    "point": ((128, 0, 128), 1, 175, ((16.23, 33.8),), 2.17, 4.16, 0.0, True),
    "scribble": ((128, 0, 128), 2, 175, ((68.14, 8.92), (11.12, 10.94), (18.36, 35.51), (11.27, 38.13)),
                 0.0, 0.0, 0.0, True),
    "mask": ((128, 0, 128), 1, 88, (), 0.0, 0.0, 0.0, True),
    "mask contour": ((128, 0, 128), 1, 175, (), 0.0, 0.0, 0.0, True),
    "arrow": ((128, 0, 128), 1, 175, ((100.62, 52.85), (87.95, 52.53), (76.75, 53.03)), 0.0, 0.0, 7.91, True),
}


def summary(m):
    return m.color, m.width, round(m.alpha * 255), m.points, *m.radii, m.head, m.filled


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_marker(kind):
    """Guards: a draw from something else than the generator, and last bits of sin and log that differ between
    platforms: these numbers hold on each of them."""
    region = Region(box=(20, 10, 70, 50), polygons=(HORSESHOE,))
    first, again = (sample_marker(region, SIZE, np.random.default_rng(11), kind) for _ in range(2))
    assert first == again and hash(first) == hash(again)
    assert draw(blank(), [first]).tobytes() == draw(blank(), [again]).tobytes()
    assert summary(first) == GOLDEN[kind]


# -- drawing ---------------------------------------------------------------------------------------------------------

def reference(image, m):
    """A marker the slow way: on a transparent canvas of the image's size, then composited over the image."""
    canvas = Image.new("RGBA", image.size)
    pen, ink, s = ImageDraw.Draw(canvas), (*m.color, round(255 * m.alpha)), max(image.size) / 336
    if m.kind in ("rectangle", "ellipse"):
        getattr(pen, m.kind)(list(m.points), outline=ink, width=m.width)
    elif m.kind == "triangle":
        pen.line([*m.points, m.points[0]], fill=ink, width=m.width, joint="curve")
    elif m.kind == "point":
        (x, y), (rx, ry) = m.points[0], m.radii
        pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=ink)
    elif m.kind == "scribble":
        p, last = np.array(m.points), None
        for t in np.linspace(0, 1, int(1000 * s)):
            p01, p12, p23 = (p[i] + t * (p[i + 1] - p[i]) for i in range(3))       # de Casteljau
            p012, p123 = p01 + t * (p12 - p01), p12 + t * (p23 - p12)
            now = tuple(p012 + t * (p123 - p012))
            if last:
                pen.line([last, now], fill=ink, width=m.width)
            last = now
    elif m.kind == "mask":
        for polygon in m.mask.polygons:
            pen.polygon(polygon, fill=ink)
    elif m.kind == "mask contour":
        for polygon in m.mask.polygons:
            for dx in range(-m.width, m.width + 1):
                for dy in range(-m.width, m.width + 1):
                    pen.polygon([(x + dx, y + dy) for x, y in polygon], outline=ink)
    else:
        pen.line(m.points[::-1], fill=ink, width=m.width)      # the released code begins at the tip
        (x, y), turn = m.points[-1], math.radians(60)
        angle = math.atan2(m.points[0][1] - y, m.points[0][0] - x)
        head = [(x + m.head * math.cos(angle + turn), y + m.head * math.sin(angle + turn)), (x, y),
                (x + m.head * math.cos(angle - turn), y + m.head * math.sin(angle - turn))]
        pen.polygon(head, fill=ink) if m.filled else pen.line(head, fill=ink, width=m.width)
    return Image.alpha_composite(image.convert("RGBA"), canvas).convert("RGB")


@pytest.mark.parametrize("kind", KINDS)
def test_draws_as_the_released_code(kind):
    """Guards: a crop that shifts or cuts the drawing, a head at another angle, other curves, other blending. The two
    agree but for a level of rounding, and for single pixels of curves and heads, which are not computed alike."""
    generator = np.random.default_rng(8)
    noise = Image.fromarray(generator.integers(0, 256, (H * 3, W * 3, 3)).astype(np.uint8))
    for size in (SIZE, (W * 3, H * 3)):
        image = noise.crop((0, 0, *size))
        for polygons in ((HORSESHOE,), PARTS):
            for _ in range(6):
                m = sample_marker(Region(polygons=polygons), size, generator, kind)
                off = np.abs(np.asarray(draw(image, [m])).astype(int) - np.asarray(reference(image, m))).max(2)
                assert (off > 1).sum() <= (2 if kind in ("arrow", "scribble") else 0), m


def test_exact_color_and_hard_edges():
    """Guards: blending that does not reach the color at alpha 1, antialiasing, and alpha that is not what it says."""
    for kind in KINDS:
        m = sample_marker(REGIONS["box"], SIZE, np.random.default_rng(9), kind, color="purple")
        pixels = np.asarray(draw(blank(), [replace(m, alpha=1)])).reshape(-1, 3)
        assert {tuple(map(int, p)) for p in pixels} == {GREY, COLORS["purple"]}
        assert draw(blank(), [replace(m, alpha=0)]).tobytes() == blank().tobytes()
        half = replace(m, alpha=0.4, color=(200, 100, 50))
        pixels = np.asarray(draw(blank(color=(0, 0, 0)), [half])).reshape(-1, 3)
        assert {tuple(map(int, p)) for p in pixels} == {(0, 0, 0), (80, 40, 20)}      # one blend: no shade between


def test_a_marker_does_not_blend_twice():
    """Guards: darker spots where shaft and head, corners, a stroke's own crossings or two polygons overlap."""
    overlapping = [((10, 10), (60, 10), (60, 40)), ((30, 5), (70, 30), (20, 60))]
    for m in (Marker("arrow", ((10, 60), (50, 30)), width=9, head=25, alpha=0.5),
              Marker("arrow", ((10, 60), (20, 20), (50, 30)), width=9, head=25, alpha=0.5, filled=False),
              Marker("scribble", ((10, 10), (90, 60), (90, 10), (10, 60)), width=9, alpha=0.5),
              Marker("triangle", ((10, 10), (80, 20), (30, 60)), width=9, alpha=0.5),
              Marker("mask", mask=Region(polygons=overlapping), alpha=0.5),
              Marker("mask contour", mask=Region(polygons=overlapping), width=4, alpha=0.5)):
        assert len(np.unique(np.asarray(draw(blank(), [m])).reshape(-1, 3), axis=0)) == 2, m


def test_markers_blend_in_order():
    """Guards: all markers on one canvas, where the later hides the earlier instead of tinting it."""
    box = Region(polygons=(((10, 10), (50, 10), (50, 50), (10, 50)),))
    red, blue = Marker("mask", mask=box, alpha=0.6), Marker("mask", mask=box, color="blue", alpha=0.4)
    assert draw(blank(color=(0, 0, 0)), [red, blue]).getpixel((30, 30)) == (92, 0, 102)
    assert draw(blank(color=(0, 0, 0)), [blue, red]).getpixel((30, 30)) == (153, 0, 41)
    step = draw(draw(blank(), [red]), [blue])
    assert step.tobytes() == draw(blank(), [red, blue]).tobytes()


def test_only_the_marker_is_touched():
    """Guards: an image that is changed in place, rounding of pixels beside the marker, work on the whole image."""
    noise = Image.fromarray(np.random.default_rng(10).integers(0, 256, (H, W, 3)).astype(np.uint8))
    kept = noise.tobytes()
    for kind, geometry, box in (("rectangle", (20, 12, 40, 30), (20, 12, 41, 31)),
                                ("point", (50, 40), (45, 35, 56, 46)),
                                ("mask", [(20, 12, 40, 12, 40, 30)], (20, 12, 41, 31)),
                                ("mask contour", [(20, 12, 40, 12, 40, 30)], (19, 11, 42, 32))):
        m = make_marker(kind, geometry, SIZE, color="#010203", radius=5, alpha=1)
        after = draw(noise, [m])
        assert noise.tobytes() == kept and after is not noise
        rows, columns = np.nonzero(touched(noise, after))
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box
        x0, y0, x1, y1 = overlay._extent(m)
        assert x1 - x0 < 30 and y1 - y0 < 30
    assert draw(noise, []).tobytes() == kept and draw(noise.convert("L"), []).mode == "RGB"


def test_bitmaps_and_polygons_agree():
    """Guards: a bitmap that is drawn shifted, transposed, or cut at the border; its contour is computed apart."""
    polygon = ((12, 10), (40, 10), (40, 69), (12, 69))
    bitmap = np.zeros((H, W), bool)
    bitmap[10:70, 12:41] = True
    for kind in ("mask", "mask contour"):
        a, b = (draw(blank(), [make_marker(kind, g, SIZE, width=3)]) for g in ([polygon], bitmap))
        assert touched(blank(), a).any() and a.tobytes() == b.tobytes()


# -- made by hand ----------------------------------------------------------------------------------------------------

def test_numbers_as_a_bitmap():
    """Guards: a mask of zeros and other whole numbers, or of 0.0 and 1.0, that is refused as a soft one."""
    for bitmap in (255 * BITMAP.astype(np.uint8), BITMAP.astype(np.float32), BITMAP.tolist()):
        assert Region(bitmap=bitmap) == Region(bitmap=BITMAP)


def test_made_by_hand():
    """Guards: defaults that ignore the image's size, geometry that is taken for something else."""
    big = (672, 448)
    assert make_marker("rectangle", (1, 2, 30, 40), big) == Marker(
        "rectangle", ((1, 2), (30, 40)), color="red", width=6, alpha=128 / 255)
    assert make_marker("triangle", [(1, 2), (30, 4), (5, 60)], big, color="#102030").color == (16, 32, 48)
    assert make_marker("point", (9, 8), big).radii == (16, 16)
    assert make_marker("point", (9, 8), big, radius=3).radii == (3, 3)
    stroke = make_marker("scribble", [(10, 10), (40, 20), (20, 50)], SIZE, width=1, alpha=1)
    assert len(stroke.points) == 7 and stroke.points[::3] == ((10, 10), (40, 20), (20, 50))
    (ax, ay), (bx, by), (cx, cy) = stroke.points[2:5]
    assert (bx - ax, by - ay) == pytest.approx((cx - bx, cy - by), abs=0.02)      # no kink where two curves meet
    on = touched(blank(), draw(blank(), [stroke]))
    assert on[10, 10] and on[20, 40] and on[50, 20]
    arrow = make_marker("arrow", (10, 60, 50, 20), SIZE)
    assert arrow.points == ((10, 60), (50, 20)) and arrow.head == 19.8 and arrow.filled
    assert make_marker("mask", BITMAP, SIZE).mask == Region(bitmap=BITMAP.copy()) != Region(bitmap=~BITMAP)
    given = BITMAP.copy()
    kept = make_marker("mask", given, SIZE)
    given[:] = True      # a frozen marker does not follow the array that it came from
    assert kept == make_marker("mask", BITMAP, SIZE) and not kept.mask.bitmap.flags.writeable
    assert Region(box=(1, 2, 3, 4), polygons=None) == Region((1, 2, 3, 4)) != Region((1, 2, 3, 5))
    assert pickle.loads(pickle.dumps(make_marker("mask", BITMAP, SIZE))) == make_marker("mask", BITMAP, SIZE)


@pytest.mark.parametrize("size", [SIZE, (640, 480), (1000, 12), (5, 7)])
def test_an_arrow_to_a_tip_stays_on_the_image(size):
    """Guards: a tail beyond the border, or on its tip, wherever the tip is."""
    w, h = size
    for tip in ((0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1), (w / 2, h / 2), (w / 3, h - 1)):
        m = make_marker("arrow", [tip], size, color="blue", width=2)
        (x, y), end = m.points
        assert end == pytest.approx(tip, abs=0.005) and 0 <= x <= w - 1 and 0 <= y <= h - 1
        assert math.dist(m.points[0], end) > 0.5 and touched(blank(size), draw(blank(size), [m])).any()


def sampled(region, size=SIZE, **style):
    return sample_marker(region, size, np.random.default_rng(0), **style)


BOX, HAND_MASK, FAR_POINT = Region(box=(1, 2, 30, 40)), make_marker("mask", BITMAP, SIZE), Marker(
    "point", ((150, 20),), radii=(5, 5))
ERRORS = {
    "unknown kind 'square': expected one of rectangle, ellipse,": lambda: make_marker("square", (1, 2, 3, 4), SIZE),
    "unknown kind 'blob': expected one of rectangle,": lambda: sampled(BOX, kind="blob"),
    "unknown color 'pink': expected #rrggbb or one of red, lime": lambda: sampled(BOX, color="pink"),
    "unknown color '#12345g'": lambda: make_marker("point", (1, 2), SIZE, color="#12345g"),
    "unknown color \\(1, 2, 256\\)": lambda: Marker("point", ((1, 2),), color=(1, 2, 256), radii=(1, 1)),
    "got nan": lambda: make_marker("point", (1, math.nan), SIZE),
    "got inf": lambda: Region(box=(1, 2, math.inf, 4)),
    "got -inf": lambda: Region(polygons=[(1, 2, 3, 4, -math.inf, 6)]),
    "needs numbers, got": lambda: make_marker("point", (1, None), SIZE),
    "needs numbers within -100000..100000 pixels, got 1000000000.0": lambda: make_marker("point", (1, 1e9), SIZE),
    "x0 < x1 and y0 < y1, got \\(30.0, 2.0, 30.0, 40.0\\)": lambda: Region(box=(30, 2, 30, 40)),
    "x0 < x1 and y0 < y1, got \\(1.0, 9.0, 30.0, 4.0\\)": lambda: Region(box=(1, 9, 30, 4)),
    "x0 < x1 and y0 < y1, got \\(1.0, 9.0, 30.0\\)": lambda: Region(box=(1, 9, 30)),
    "rectangle needs x0": lambda: make_marker("rectangle", (10, 2, 10, 9), SIZE),
    "ellipse needs x0": lambda: make_marker("ellipse", (1, 9, 10, 2), SIZE),
    "triangle needs three points .* got \\(\\(1.0, 2.0\\)": lambda: make_marker("triangle", (1, 2, 3, 4), SIZE),
    "triangle needs three points that are not on one line": lambda: make_marker("triangle", (1, 1, 5, 5, 9, 9), SIZE),
    "got 5 numbers|got \\(1.0, 1.0, 5.0, 5.0, 9.0\\)": lambda: make_marker("triangle", (1, 1, 5, 5, 9), SIZE),
    "point needs one x, y and radii over 0": lambda: make_marker("point", (1, 2), SIZE, radius=0),
    "point needs one x, y": lambda: make_marker("point", (1, 2, 3, 4), SIZE),
    "alpha needs to lie within 0..1, got 1.5": lambda: make_marker("point", (1, 2), SIZE, alpha=1.5),
    "alpha needs to lie within 0..1, got nan": lambda: make_marker("point", (1, 2), SIZE, alpha=math.nan),
    "width needs to be over 0 pixels, got 0": lambda: make_marker("rectangle", (1, 2, 3, 4), SIZE, width=0),
    "width needs to be over 0 pixels, got -2": lambda: make_marker("rectangle", (1, 2, 3, 4), SIZE, width=-2),
    "alpha needs a number, got '0.5'": lambda: make_marker("point", (1, 2), SIZE, alpha="0.5"),
    "width needs a number, got '3'": lambda: make_marker("rectangle", (1, 2, 3, 4), SIZE, width="3"),
    "radii needs a number, got '3'": lambda: make_marker("point", (1, 2), SIZE, radius="3"),
    "radii need rx and ry, got 5": lambda: Marker("point", ((1, 2),), radii=5),
    "radii need rx and ry, got \\(5,\\)": lambda: Marker("rectangle", ((1, 2), (3, 4)), radii=(5,)),
    "head needs a number, got None": lambda: Marker("arrow", ((1, 2), (3, 4)), head=None),
    "size is None; expected an image's width and height": lambda: make_marker("rectangle", (1, 2, 3, 4), None),
    "size is \\(0, 0\\); expected an image's width and height": lambda: make_marker("rectangle", (1, 2, 3, 4), (0, 0)),
    "draw got one marker, at the red point; expected a list": lambda: draw(blank(), FAR_POINT),
    "at least two different points, got \\(\\(1.0, 2.0\\),\\)": lambda: make_marker("scribble", (1, 2), SIZE),
    "at least two different points, got \\(\\(1.0, 2.0\\), \\(1": lambda: make_marker("scribble", (1, 2, 1, 2), SIZE),
    "at least two different points, got \\(\\)": lambda: make_marker("scribble", (), SIZE),
    "scribble needs 4, 7, 10": lambda: Marker("scribble", ((1, 2), (3, 4))),
    "at least 3 points, got 2": lambda: make_marker("mask", [(1, 2, 3, 4)], SIZE),
    "a polygon needs pairs x, y, got \\(1.0,\\)": lambda: make_marker("mask", (1, 2, 3, 4, 5, 6), SIZE),
    "a tail, a tip apart from it": lambda: make_marker("arrow", (5, 6, 5, 6), SIZE),
    "arrow needs a tail, a tip .* got \\(\\)": lambda: make_marker("arrow", (), SIZE),
    "mask needs polygons or a bitmap": lambda: Marker("mask", mask=BOX),
    "mask contour needs polygons or a bitmap": lambda: Marker("mask contour", ((1, 2), (3, 4))),
    "a region needs a box, polygons or a bitmap": lambda: Region(),
    "and not both of the latter": lambda: Region(polygons=PARTS, bitmap=BITMAP),
    "got \\(70, 96\\) with 0 set": lambda: Region(bitmap=np.zeros((H, W))),
    "got \\(96,\\)": lambda: Region(bitmap=np.ones(W)),
    "a bitmap needs true and false, got float64": lambda: Region(bitmap=np.where(BITMAP, 0.9, 0.1)),      # probabilities
    "a bitmap needs true and false, got float32": lambda: Region(bitmap=np.where(BITMAP, 4, -4).astype("f4")),  # logits
    "a mask needs numbers|a polygon needs numbers, got \\(": lambda: make_marker("mask", BITMAP.tolist(), SIZE),
    "draw got a I;16 image": lambda: draw(Image.new("I;16", SIZE), [HAND_MASK]),
    "draw got a F image": lambda: draw(Image.new("F", SIZE), [HAND_MASK]),
    "draw got a RGBA image": lambda: draw(Image.new("RGBA", SIZE), [HAND_MASK]),
    "the bitmap is 96 x 70 pixels, the image 70 x 96": lambda: sampled(REGIONS["bitmap"], (H, W)),
    "the bitmap is 96 x 70 pixels, the image 97 x 70": lambda: draw(blank((97, 70)), [HAND_MASK]),
    "lies outside the image of 96 x 70 pixels": lambda: sampled(Region(box=(96, 0, 120, 40))),
    "lies outside the image of 96 x 70": lambda: sampled(Region(polygons=[(-9, 3, -2, 3, -5, 9)])),
    "covers no pixel of the image": lambda: sampled(Region(polygons=[(-90, -90, 300, -90, -80, -80, -90, 300)]),
                                                    kind="arrow"),
    "nothing of the point within .* lies on the image, 96 x 70": lambda: draw(blank(), [FAR_POINT]),
    "the rectangle within": lambda: draw(blank(), [make_marker("rectangle", (-20, -20, 200, 200), SIZE)]),
    "an ellipse about": lambda: sampled(REGIONS["whole"], kind="ellipse",
                                        distribution=replace(RELEASED, ellipse_scale=(2, 3))),
}


@pytest.mark.parametrize("message", ERRORS)
def test_mistakes_are_refused(message):
    """Guards: a mistake that is drawn as something else, ends in a TypeError, or whose message runs over a line."""
    with pytest.raises(ValueError, match=message) as error:
        ERRORS[message]()
    assert "\n" not in str(error.value)


def test_the_command_of_the_docstring(tmp_path):
    """Guards: a docstring whose command no longer runs."""
    root = Path(overlay.__file__).parent
    subprocess.run([sys.executable, "overlay.py", str(tmp_path / "markers.png")], cwd=root, check=True, timeout=60)
    sheet = Image.open(tmp_path / "markers.png")
    assert sheet.size == (960, 360) and len(sheet.getcolors(99999)) > 2 + len(KINDS)
    for name in ("markers.png", "markers.xyz", "nowhere/markers.png"):  # there already; no format; no folder
        command = [sys.executable, "overlay.py", str(tmp_path / name)]
        refused = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    bare = subprocess.run([sys.executable, str(root / "overlay.py")], cwd=tmp_path, capture_output=True, timeout=60)
    assert bare.returncode == 2  # its usual name is somebody's, too
