"""What a person typed: is it the marker that was meant, and are the words the marker's? Mistakes are in test_sample.py."""

import pytest

from overlay import KINDS, make_marker
from pointing import FLAGS, fill_in, parse_marker

SIZE = (400, 300)


@pytest.mark.parametrize("flag, text, expected", [
    ("arrow", "210,140", ([210, 140], {})),
    ("arrow", " 210 , 140 ", ([210, 140], {})),
    ("arrow", "210,140:", ([210, 140], {})),
    ("arrow", "-1.5,2e1,3,4:head=open", ([-1.5, 20, 3, 4], {"filled": False})),
    ("rectangle", "1,2,3,4:color=#0102ff,width=4", ([1, 2, 3, 4], {"color": (1, 2, 255), "width": 4})),
    ("ellipse", "1,2,3,4:alpha=0.7", ([1, 2, 3, 4], {"alpha": 0.7})),
    ("point", "5,6:radius=2.5", ([5, 6], {"radius": 2.5})),
    ("mask", "1,2,3,4,5,6:color=blue", ([1, 2, 3, 4, 5, 6], {"color": (0, 0, 255)})),
    ("mask", "a.png", ("a.png", {})),
    ("mask", "C:\\masks\\a.png", ("C:\\masks\\a.png", {})),
    ("mask", "C:/masks/a.png", ("C:/masks/a.png", {})),
    ("mask", "C:a.png", ("C:a.png", {})),
    ("mask", "C:\\masks\\a.png:color=red", ("C:\\masks\\a.png", {"color": (255, 0, 0)})),
    ("contour", "/tmp/a=1,b.png:width=2", ("/tmp/a=1,b.png", {"width": 2})),
    ("contour", "/tmp/a:b/c=1,2.png", ("/tmp/a:b/c=1,2.png", {})),
    ("contour", "a:b.png:", ("a:b.png", {})),
])
def test_a_marker_is_parsed(flag, text, expected):
    """Guards against options cut off at a drive's colon or sought inside a path, and numbers read as a path."""
    assert parse_marker(flag, text) == expected


def test_every_kind_has_a_flag():
    """Guards against a kind that can't be drawn from the command line."""
    assert sorted(kind for kind, *_ in FLAGS.values()) == sorted(KINDS)


def test_placeholders():
    """Guards against phrases in the wrong order, and against braces that are no placeholder being read as one."""
    markers = [make_marker("arrow", [9, 9], SIZE), make_marker("rectangle", [1, 2, 3, 4], SIZE, color="#102030")]
    assert fill_in("{2} or {1}, {x} {-1} {{1}}?", markers) == (
        "within the rectangle or pointed to by the red arrow, {x} {-1} {pointed to by the red arrow}?")
    assert fill_in(None, markers) == "What is pointed to by the red arrow?"
    assert fill_in("What is this? {} { 1 }", []) == "What is this? {} { 1 }"


@pytest.mark.parametrize("question", [None, "What is {1}?", "What is {3} to {2}?"])
def test_markers_that_are_mentioned_have_words_of_their_own(question):
    """Guards against "at the red point" where there are two of them, of which the model can't know which is meant."""
    places = ((9, 9), "red"), ((90, 9), "blue"), ((9, 90), "red")
    markers = [make_marker("point", at, SIZE, color=color) for at, color in places]
    with pytest.raises(ValueError, match=r"but \{[13]\} would be \"at the red point\", too; expected other kinds or colors"):
        fill_in(question, markers)
    assert fill_in("Where is {2}?", markers) == "Where is at the blue point?"
