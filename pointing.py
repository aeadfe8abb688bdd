"""What a person typed becomes what is drawn, and the words for it: `--arrow 210,140:color=blue` and "What is {1}?".

    marker = place("arrow", "210,140:color=blue", image)      # overlay.Marker, or ValueError with what would be right
    question = fill_in("What is {1}?", [marker])              # "What is pointed to by the blue arrow?"

Eight flags, one for each kind of marker, and options after a colon. All is in pixels of the upright image.
"""

import os
import re

from PIL import Image

from clip import read_mask
from overlay import COLORS, Marker, Region, draw, make_marker, phrase, rgb_of

LINE = ("color", "width", "alpha")
POLYGON = "x0,y0,x1,y1,x2,y2,… (a polygon) or a PNG file (every pixel that is not 0)"
FLAGS = {  # flag: overlay's kind, what its value looks like, how many numbers that may be, its options
    "rectangle": ("rectangle", "x0,y0,x1,y1", [4], LINE),
    "ellipse": ("ellipse", "x0,y0,x1,y1 (the box around it)", [4], LINE),
    "arrow": ("arrow", "x,y (tip) or x0,y0,x1,y1 (tail, tip)", [2, 4], (*LINE, "head")),
    "point": ("point", "x,y", [2], ("color", "radius", "alpha")),
    "triangle": ("triangle", "x0,y0,x1,y1 (the box around it) or x0,y0,x1,y1,x2,y2", [4, 6], LINE),
    "scribble": ("scribble", "x0,y0,x1,y1,… (2 or more points)", range(4, 10**6, 2), LINE),
    "mask": ("mask", POLYGON, range(6, 10**6, 2), ("color", "alpha")),
    "contour": ("mask contour", POLYGON, range(6, 10**6, 2), LINE),
}


def _between(kind, low, high):
    """A reader of numbers, whole (int) or not (float), from low to high."""

    def read(text):
        value = kind(text)
        if not low <= value <= high:  # NaN is not
            raise ValueError
        return value

    return read


OPTIONS = {  # name: reader, what is right, name in overlay.make_marker
    "color": (rgb_of, f"#rrggbb or one of {', '.join(COLORS)}", "color"),
    "width": (_between(int, 1, 10_000), "a whole number of pixels, 1 or more", "width"),
    "alpha": (_between(float, 1 / 255, 1), "a number from 1/255 (hardly visible) to 1 (opaque)", "alpha"),
    "radius": (_between(float, 0.5, 10_000), "a number of pixels, 0.5 or more", "radius"),
    "head": ({"filled": True, "open": False}.__getitem__, "filled or open", "filled"),
}


def parse_marker(flag: str, text: str) -> tuple[list[float] | str, dict]:
    """ "210,140:color=blue" -> ([210.0, 140.0], {"color": (0, 0, 255)}): numbers, or a mask's path, and the style.

    Options follow the last colon, unless that is a drive's (C:) or a slash follows it; so a path that holds a colon
    itself can be written with another one at its end. ValueError where `text` isn't what FLAGS and OPTIONS say.
    """
    kind, form, counts, names = FLAGS[flag]
    where, options = re.fullmatch(r"(.*?)(?:(?<!^[A-Za-z]):([^:/\\]*))?", text, re.DOTALL).groups()
    try:
        geometry = [float(number) for number in where.split(",")]
    except ValueError:
        geometry = os.path.expanduser(where)  # no shell stands before a chat, nor does one look behind --mask=
    if isinstance(geometry, str) and (not where.strip() or "mask" not in kind):
        raise ValueError(f"expected {form}, got {short(where)}")
    if isinstance(geometry, list) and len(geometry) not in counts:
        raise ValueError(f"expected {form}, got {len(geometry)} number{'s' * (len(geometry) > 1)}")
    style = {}
    for option in options.split(",") if options else ():
        name, _, value = option.partition("=")
        if name not in names:
            raise ValueError(f"unknown option {short(option)}; expected {'=… or '.join(names)}=…")
        read, right, keyword = OPTIONS[name]
        if keyword in style:
            raise ValueError(f"{name} is given twice; expected it once")
        try:
            style[keyword] = read(value)
        except (ValueError, KeyError):
            raise ValueError(f"{name} is {value!r}; expected {right}") from None
    return geometry, style


def files_of(flag: str, text: str) -> list[str]:
    """The file that the marker is read from, where there is one."""
    geometry, _ = parse_marker(flag, text)
    return [geometry] if isinstance(geometry, str) else []


def place(flag: str, text: str, image: Image.Image) -> Marker:
    """The marker that `--flag text` means on this image; ValueError, with both, where it is none that can be seen."""
    kind = FLAGS[flag][0]
    try:
        geometry, style = parse_marker(flag, text)
        for name in ("width", "radius"):
            if style.get(name, 0) > (side := max(image.size)):
                raise ValueError(f"{name} is {style[name]}; expected at most the image's longer side, {side}")
        if isinstance(geometry, str):
            if not os.path.isfile(geometry):
                raise ValueError(f"no such file; expected {FLAGS[flag][1]}")
            geometry = read_mask(geometry)
        elif "mask" in kind:
            geometry = [geometry]  # one polygon
        elif kind == "triangle" and len(geometry) == 4:
            x0, y0, x1, y1 = Region(box=geometry).box
            geometry = [(x0 + x1) / 2, y0, x1, y1, x0, y1]
        placed = make_marker(kind, geometry, image.size, **style)
        draw(image, [placed])  # refuses what lies outside
        if kind in ("arrow", "point") and not all(0 <= v < side for v, side in zip(geometry[-2:], image.size)):
            x, y = geometry[-2:]
            what = "tip" if kind == "arrow" else "centre"
            raise ValueError(f"the {what} is {x:g},{y:g}; expected a place on the image, {image.width} x {image.height}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag} {short(text)}: {error}") from None
    return placed


def fill_in(question: str | None, markers: list[Marker]) -> str:
    """The question with marker 1's phrase for {1}, and so on; other braces are text. None asks about the first. ValueError:
    there is no such marker, or another one with the same words; or {} or { 1 }, where there are markers."""
    if question is None and markers:
        question = "What is {1}?"
    if question is not None and not question.strip():
        raise ValueError("the question has no words; expected some, or no question at all, to ask about the first marker")
    if question is None:
        raise ValueError("there is no question; expected one in quotes, or a marker to ask about, as --arrow 40,60")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the question has {question[error.start]!r}, half a character; expected Unicode") from None

    def words(match):
        proper = re.fullmatch("[0-9]+", match[1])
        if not proper and not markers:
            return match[0]
        number = int(match[1]) if proper else 0
        if not 1 <= number <= len(markers):
            known = " or ".join(f"{{{i}}}" for i in range(1, len(markers) + 1)) or "none, as there is no marker"
            raise ValueError(f"the question mentions marker {match[0]}; expected {known}")
        said = phrase(markers[number - 1])
        if same := [i for i, marker in enumerate(markers, 1) if i != number and phrase(marker) == said]:
            raise ValueError(f'the question mentions marker {match[0]}, but {{{same[0]}}} would be "{said}", too; '
                             "expected other kinds or colors, as in :color=blue")
        return said

    return re.sub(r"\{(\s*\d*\s*)\}", words, question)


def short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
