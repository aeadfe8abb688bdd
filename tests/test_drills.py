"""Drills: what they say is worked out again from pixels, boxes and the benchmarks' own questions."""

import collections
import dataclasses

import numpy as np
import pytest

from data import benchmarks, drills, scenes
from data.batches import SCENES
from data.drills import SPELL
from data.readers import LETTER
from data.scenes import SHAPES
from overlay import COLORS, phrase
from test_data_benchmarks import color_at


@pytest.mark.parametrize("kind", ["v7w", "vcr-choice"])
def test_a_choice_is_spelled_out_before_its_letter_is_asked_for(kind):
    """Guards against words of one option with the letter of another, and a second question that is not the benchmark's."""
    for i in range(30):
        (plain,) = benchmarks.sample(kind, scenes.generator_for("val", 0, i), (96, 96)).turns
        first, second = drills.spelled(kind, scenes.generator_for("val", 0, i), (96, 96)).turns
        assert second == dataclasses.replace(plain, image=False) and first.image
        words, letter = first.answer.split(": ")
        assert letter == plain.answer and plain.question.splitlines()[1:] != first.question.splitlines()[1:]
        assert any(line.rstrip(".") == f"{letter}. {words}" for line in plain.question.splitlines())


def test_marked_things_are_told_apart():
    """Guards against a marker's words with another thing's look, place or relation: by the pixels in its box."""
    asked = collections.Counter()
    for i in range(80):
        sample = drills.told_apart(scenes.generator_for("val", 0, i), (112, 112))
        if {marker.kind for marker in sample.markers} != {"rectangle"} or len(sample.markers) < 2:
            continue
        boxes = {phrase(marker): np.ravel(marker.points) for marker in sample.markers}
        color = {words: color_at(sample.image, tuple(box)) for words, box in boxes.items()}
        center = {words: (box[:2] + box[2:]) / 2 for words, box in boxes.items()}
        assert len(boxes) == len(sample.markers) and sample.turns[0].image and not any(turn.image for turn in sample.turns[1:])
        for turn in sample.turns:
            said = sorted((turn.question.find(words), words) for words in boxes if words in turn.question)
            if turn.question.startswith("What is"):
                assert color[said[0][1]] in turn.answer
            elif turn.question.startswith("Which is"):
                assert color[turn.answer.removeprefix("The object ")] in turn.question
            elif turn.question.startswith("Which object is at"):
                x, y = (3 * center[turn.answer.removeprefix("The object ")] / 112).astype(int)
                assert f"at the {scenes.POSITIONS[y][x]}?" in turn.question
            else:
                (_, first), (_, second) = said
                x, y = center[first] - center[second]
                way = ("left of", "right of")[int(x > 0)] if abs(x) > abs(y) else ("above", "below")[int(y > 0)]
                assert way in turn.answer
                if turn.question.startswith("Where"):
                    assert turn.answer == f"The object {first} is {way} the object {second}."
                else:
                    one, two = turn.answer.strip("()").split(f", {way}, ")
                    assert color[first] in one and color[second] in two
            asked[turn.question.split()[0]] += 1
    assert min(asked.values()) > 10 and len(asked) == 4, asked


def test_a_thing_is_found_among_the_marked():
    """Guards against the marker of another thing, a color that two of them have, and things that are never asked for."""
    asked = collections.Counter()
    for i in range(80):
        sample = drills.found(scenes.generator_for("val", 0, i), (112, 112))
        assert {turn.answer for turn in sample.turns} == {f"The object {phrase(marker)}" for marker in sample.markers}
        assert [turn.image for turn in sample.turns] == [True] + [False] * (len(sample.markers) - 1)
        if {marker.kind for marker in sample.markers} != {"rectangle"} or len(sample.markers) < 2:
            continue
        color = {f"The object {phrase(marker)}": color_at(sample.image, tuple(np.ravel(marker.points))) for marker in sample.markers}
        for turn in sample.turns:
            words = turn.question.rstrip("?").split()
            alone = words[1] == "object"  # "Which object is green?", "Which is the green star?"
            assert words[-1 if alone else -2] == color[turn.answer] and (not alone or list(color.values()).count(words[-1]) == 1)
            asked[len(sample.markers), alone] += 1
    assert len(asked) == 6 and min(asked.values()) > 5, asked


def test_a_count_is_told_step_by_step():
    """Guards against a list of places that does not bear the count out, and a second question that is not the benchmark's."""
    for i in range(30):
        (plain,) = benchmarks.sample("pointQA_twice", scenes.generator_for("val", 0, i), (96, 96)).turns
        first, second = drills.counted(scenes.generator_for("val", 0, i), (96, 96)).turns
        shape, places = first.answer.split(": ")
        assert second == dataclasses.replace(plain, image=False) and first.image and shape in SHAPES
        assert len(set(places.split(", "))) == int(plain.answer) and set(places.split(", ")) <= set(sum(scenes.POSITIONS, ()))


def chosen(turn) -> tuple[str, list[str], str]:
    """A question, its four options, and the one whose letter is the answer, or its end."""
    question, *options, request = turn.question.splitlines()
    assert request == (LETTER if turn.answer in "ABCD" else SPELL) and [option[:3] for option in options] == ["A. ", "B. ", "C. ", "D. "]
    options = [option[3:] for option in options]
    right = options["ABCD".index(turn.answer[-1])]
    assert len(set(options)) == 4 and turn.answer in ("A", "B", "C", "D", f"{right.rstrip('.')}: {turn.answer[-1]}")
    return question, options, right


def test_a_letter_stands_for_the_right_one_of_four_options():
    """Guards against a letter of another option: looks, places, markers and relations are worked out from the pixels."""
    asked, letters = collections.Counter(), collections.Counter()
    for i in range(400):
        sample = drills.choices(scenes.generator_for("val", 0, i), (112, 112))
        (turn,) = sample.turns
        question, options, right = chosen(turn)
        assert turn.image and len(sample.markers) == 4
        if {marker.kind for marker in sample.markers} != {"rectangle"}:
            continue
        boxes = {phrase(marker): np.ravel(marker.points) for marker in sample.markers}
        center = {words: (box[:2] + box[2:]) / 2 for words, box in boxes.items()}
        color = {words: color_at(sample.image, tuple(box)) for words, box in boxes.items()}
        place = {words: scenes.POSITIONS[int(3 * y / 112)][int(3 * x / 112)] for words, (x, y) in center.items()}
        named, what = [words for words in boxes if words in question], " ".join(question.split()[:2])
        if what == "What is":
            assert color[named[0]] in right
        elif what == "Which is":
            assert color[right.removeprefix("The object ")] in question
        elif what == "Which object":
            assert f"at the {place[right.removeprefix('The object ')]}?" in question
        elif len(named) == 2:
            first, second = sorted(named, key=question.find)
            x, y = center[first] - center[second]
            way = ("left of", "right of")[int(x > 0)] if abs(x) > abs(y) else ("above", "below")[int(y > 0)]
            assert right == f"The object {first} is {way} the object {second}."
        else:
            assert right == place[named[0]]
        asked[what, len(named)] += 1
        letters[turn.answer[-1]] += 1
    assert min(asked.values()) > 10 and len(asked) == 5, asked
    assert min(letters.values()) > 20 and len(letters) == 4, letters


def test_an_option_is_found_by_its_words():
    """Guards against a letter of an option that doesn't say so, or of one of several that do; and against a picture."""
    letters, forms = collections.Counter(), collections.Counter()
    for i in range(300):
        sample = drills.options(scenes.generator_for("val", 0, i), (112, 112))
        (turn,) = sample.turns
        assert sample.image is None and not turn.image and not sample.markers
        question, options, right = chosen(turn)
        named = f"Which option says {right[0].lower()}{right[1:]}?"
        assert question == (named if len(turn.answer) == 1 else "Choose any option.")
        letters[turn.answer[-1]] += 1
        forms[right.split()[0] == "The", " is " in right, right in sum(scenes.POSITIONS, ()), len(turn.answer) > 1] += 1
    assert min(letters.values()) > 50 and len(letters) == 4, letters
    assert min(forms.values()) > 20 and len(forms) == 8, forms


def test_a_marked_thing_is_said_before_its_letter():
    """Guards against a letter of another option, a picture, and colors or letters that never come."""
    seen = collections.Counter()
    for i in range(300):
        sample = drills.said(scenes.generator_for("val", 0, i), (112, 112))
        (turn,) = sample.turns
        question, _, right = chosen(turn)
        assert sample.image is None and not turn.image and not sample.markers
        assert question == "Choose any option." and turn.answer == f"{right}: {turn.answer[-1]}"
        seen[turn.answer[-1]] += 1
        seen[right] += 1
    assert set(seen) == {*"ABCD", *(f"The object within the {color} rectangle" for color in COLORS)} and min(seen.values()) > 5


def test_a_rich_caption_tells_textures_and_signs():
    """Guards against: a drill that draws plain scenes, as "captions" does."""
    texts = [SCENES["rich-captions"](scenes.generator_for("train", 0, i), (64, 64)).turns[0].answer for i in range(40)]
    assert all(any(word in text for text in texts) for word in ("striped", "dotted", "with the letter", "with the number"))


def test_a_sign_is_the_one_that_is_drawn():
    """Guards against another sign on the thing than the one that is said, signs that never come, and things that hang over."""
    seen, widths = collections.Counter(), []
    for i in range(400):
        sample = drills.signs(scenes.generator_for("val", 0, i), (112, 84))
        (scene,) = sample.open.args
        (thing,), (asked, what) = scene.objects, sample.turns
        x0, y0, x1, y1 = thing.box
        assert 0 <= x0 < x1 <= 112 and 0 <= y0 < y1 <= 84 and not sample.markers
        assert what.answer == f"{thing.color} {thing.shape}" and (asked.image, what.image) == (True, False)
        seen[asked.answer] += 1
        widths.append(x1 - x0)
        if i < 20:
            bearing = {sign: dataclasses.replace(scene, objects=(dataclasses.replace(thing, text=sign),)) for sign in (*seen, "")}
            assert [sign for sign in bearing if scenes.render(bearing[sign]) == sample.image] == [asked.answer]
    assert len(seen) == 30 and min(widths) < 25 and max(widths) > 70


def _borne(sample) -> dict[str, str]:
    """A rectangle's words -> the sign on the thing in it, as drawn; nothing, where some are marked otherwise."""
    (scene,) = sample.open.args
    texts = {tuple(map(round, thing.box)): thing.text for thing in scene.objects}
    if {m.kind for m in sample.markers} != {"rectangle"}:
        return {}
    return {phrase(m): texts[tuple(map(round, np.ravel(m.points)))] for m in sample.markers}


def test_what_is_on_marked_things_is_told():
    """Guards against a sign of another thing than the one that is marked or told; things without one; a number that is
    called a letter."""
    asked, seen = collections.Counter(), set()
    for i in range(150):
        sample = drills.lettered(scenes.generator_for("val", 0, i), (112, 112))
        (scene,), borne = sample.open.args, _borne(sample)
        signs = [thing.text for thing in scene.objects]
        assert all(signs) and len(set(signs)) == len(signs) <= 4
        assert [turn.image for turn in sample.turns] == [k == 0 for k in range(len(sample.turns))]
        seen |= set(signs)
        for turn in sample.turns if borne else ():
            words = next(words for words in borne if words in turn.question + turn.answer)
            what = "number" if borne[words].isdigit() else "letter"
            if turn.question.startswith("Which"):
                assert (turn.question, turn.answer) == (f"Which object has the {what} {borne[words]}?", f"The object {words}")
            else:
                assert (turn.question, turn.answer) == (f"What {what} is on the object {words}?", borne[words])
            asked[turn.question[:5], len(scene.objects)] += 1
    assert len(seen) == 30 and len(asked) == 7  # nobody asks which object of one


def test_a_sum_is_that_of_the_numbers_that_are_drawn():
    """Guards against numbers of other things, a sum that always comes first or last, and another question for it than ViP-Bench's."""
    places = collections.Counter()
    for i in range(60):
        sample = drills.added(scenes.generator_for("val", 0, i), (112, 112))
        (scene,), borne = sample.open.args, _borne(sample)
        (place,) = (k for k, turn in enumerate(sample.turns) if "sum" in turn.question)
        numbers = [turn.answer for turn in sample.turns if "sum" not in turn.question]
        assert int(sample.turns[place].answer) == sum(map(int, numbers)) and sample.turns[0].image
        assert sorted(thing.text for thing in scene.objects if thing.text) == sorted(numbers)
        assert sample.turns[place].question == benchmarks.SUM.format(*map(phrase, sample.markers))
        if borne:
            assert list(borne.values()) == numbers
        places[place] += 1
    assert set(places) == {0, 2}


def test_a_sum_is_asked_for_after_its_numbers():
    """Guards against numbers the wrong way round, and against another sum than the benchmark's."""
    seen = 0
    for i in range(60):
        sample = drills.summed(scenes.generator_for("val", 0, i), (112, 112))
        plain = benchmarks.vip_sample(scenes.generator_for("val", 0, i), (112, 112), "math")
        *steps, last = sample.turns
        (asked,), (scene,), numbers = plain.turns, sample.open.args, [step.answer for step in steps]
        assert sample.markers == plain.markers and (last.question, last.answer) == (asked.question, asked.answer)
        assert int(last.answer) == sum(map(int, numbers)) and [turn.image for turn in sample.turns] == [True, False, False]
        assert all(phrase(marker) in step.question for marker, step in zip(sample.markers, steps))
        for number, marker in zip(numbers, sample.markers):
            if marker.kind in ("rectangle", "mask", "mask contour"):  # whose middle is the thing's
                points = np.reshape(marker.points or marker.mask.polygons[0], (-1, 2))
                middle = (points.min(0) + points.max(0)) / 2
                assert min(scene.objects, key=lambda thing: np.hypot(*(middle - thing.center))).text == number
                seen += 1
    assert seen > 20
