"""Questions about scenes: is what is said the truth? Every claim is checked against pixels or geometry."""
import itertools
import re

import numpy as np
import pytest

from chat import Turn
from data.questions import caption_sample, marked_caption_sample, marker_sample, test_sample, told_sample
from data.scenes import OBJECT_COLORS, POSITIONS, SHAPES, caption, describe, generator_for, render, sample_scene
from data.write import example_scene
from overlay import KINDS, draw, make_marker, phrase

SIZE = (224, 192)   # not square, so that an exchange of width and height shows


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


def test_a_caption_sample_is_the_image_and_its_caption():
    """Guards against a stage-1 sample without its image, or with a question."""
    sample = caption_sample(generator_for("train", 0, 3), SIZE)
    scene = sample_scene(generator_for("train", 0, 3), SIZE)
    turn, = sample.turns
    assert sample.markers == () and turn.image and turn.question == "" and turn.answer == caption(scene)
    assert sample.image.tobytes() == render(scene).tobytes() and sample.image.size == SIZE


def test_told_samples_hold_what_their_answers_are_read_from():
    """Guards against a caption of another scene, or one that leaves the markers out: nothing could be read from it."""
    for i in range(40):
        sample = told_sample(generator_for("train", 0, i), (64, 64))
        said, question = sample.turns[0].question.split("\n")
        assert sample.open is None and not any(turn.image for turn in sample.turns)
        for turn in [Turn(question, sample.turns[0].answer), *sample.turns[1:]]:
            if turn.question.startswith("What is ") and turn.question != "What is this?":
                words = turn.question.removeprefix("What is ").removesuffix("?")
                noun = turn.answer.split(" ", 1)[1]
                assert re.search(rf"{noun} {words}\.", said), (said, turn)
