"""Drills: what the benchmarks ask in one question comes here in smaller steps, as one letter teaches too little at once.

| drill      | what is asked                                                                     | a step on the way to |
| ---------- | --------------------------------------------------------------------------------- | -------------------- |
| told-apart | of two to four marked things: what each is, which one is meant, how two lie       | v7w, vg_rel          |
| found      | which of two to four marked things is the red star, or green, each in turn        | v7w                  |
| options    | no picture: which of four options says so, by its letter                          | v7w, vcr             |
| said       | no picture: any of four marked things, and the letter of the one that was said    | v7w                  |
| choices    | which of four looks, places, markers or relations, by its letter                  | v7w, vcr             |
| …-spelled  | v7w's or vcr-choice's choice in words first, then its letter                      | v7w, vcr             |
| counted    | which shape is marked, and where it is seen again, before how often               | pointQA              |
| signs      | of a lone thing, large or small: which letter or number is on it                  | vip-ocr, vip-math    |
| lettered   | of several things with letters and numbers: which is on each marked one           | vip-ocr              |
| added      | which numbers are on two marked things, and their sum, asked before or after      | vip-math             |
| …-steps    | vip-math's sum, each number asked for before                                      | vip-math             |

Each is a function of a generator and a size in pixels, as in questions.py; train.py's mixes know them by these names.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from chat import Turn
from data import benchmarks, scenes
from data.benchmarks import SIGN, SUM
from data.readers import LETTER, TRIPLET
from data.records import Sample
from data.scenes import Object, Scene, is_clear, look_of, position, render, sample_scene
from overlay import COLORS, CONSTANT, KINDS, RELEASED, Marker, phrase

WAYS = list(benchmarks.WAYS)
SPELL = "Answer with the option in words, and its letter."
SEEN_FROM = "Where is the object {}, seen from the object {}?"


def spelled(kind: str, generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """A choice twice: first the right option in words, with its letter, then the letter alone, as the benchmark wants
    it. Asked for letters only, a small model stays at chance for tens of thousands of questions."""
    choice = benchmarks.sample(kind, generator, size)
    (turn,) = choice.turns
    words = re.search(rf"^{turn.answer}\. (.*)$", turn.question, re.MULTILINE)[1]
    first = Turn(turn.question.replace(LETTER, SPELL), f"{words.rstrip('.')}: {turn.answer}", image=True)
    return replace(choice, turns=(first, replace(turn, image=False)))


def counted(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """Look twice, step by step: which shape is marked, where it is seen again, and only then how often."""
    made = benchmarks.point_qa(generator, size[0])
    looked = benchmarks.read(made, "pointQA_twice", generator)
    (box,), things = made.records[0]["bboxes"], scenes.reading_order(made.scene)
    shape = next(thing.shape for thing in things if list(thing.box) == box)
    places = ", ".join(position(made.scene, thing) for thing in things if thing.shape == shape)
    question = "Which shape is the object within the rectangle, and where are all objects of this shape?"
    return replace(looked, turns=(Turn(question, f"{shape}: {places}", image=True), replace(looked.turns[0], image=False)))


def signs(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """One thing, nearly half of the time as small as in other scenes, at most as large as the picture, and what is on it.
    What a letter is shows when it is large and alone: among other things, from ten pixels of it, a small model had not
    found out."""
    scene = sample_scene(generator, size, n=1, shapes=scenes.LETTERED)
    (plain,), (u, turn, *place) = scene.objects, generator.random(4).tolist()
    radius = (0.11 + 0.37 * u * u) * min(size)
    center = tuple(radius + 1 + v * (side - 2 * radius - 2) for v, side in zip(place, size))
    thing = scenes.make_object(plain.shape, plain.color, "large", center, radius, scenes.ROTATION * (2 * turn - 1))
    sign = generator.choice(list(scenes.LETTERS + scenes.DIGITS)).item()
    scene = replace(scene, objects=(replace(thing, text=sign),))
    return _dialogue(scene, (), [("Which letter or number is it?", sign), ("What is it?", f"{plain.color} {plain.shape}")])


def lettered(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """One to four things, each with a letter or number: what is on each marked one, and which one bears it."""
    total = int(generator.integers(1, 5))
    count = int(generator.integers(1, total + 1))
    scene, things, markers = _marked(generator, size, count, total, shapes=scenes.LETTERED)
    borne = dict(zip(scene.objects, generator.permutation(list(scenes.LETTERS + scenes.DIGITS)).tolist()))
    asked = []
    for thing, words in zip(things, map(phrase, markers)):
        sign = borne[thing]
        kind = "number" if sign in scenes.DIGITS else "letter"
        asked.append((SIGN.format(kind, words), sign))
        if total > 1:
            asked.append((f"Which object has the {kind} {sign}?", f"The object {words}"))
    return _dialogue(benchmarks.bearing(scene, borne), markers, [asked[k] for k in generator.permutation(len(asked))])


def added(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """Two marked things with a number each, and their sum, which is asked for before the numbers or after them."""
    scene, things, markers = _marked(generator, size, 2, int(generator.integers(2, 5)), shapes=scenes.LETTERED)
    digits, words = generator.integers(1, 10, size=2).tolist(), list(map(phrase, markers))
    asked = [(SIGN.format("number", word), str(digit)) for word, digit in zip(words, digits)]
    asked.insert(2 * int(generator.integers(2)), (SUM.format(*words), str(sum(digits))))
    return _dialogue(benchmarks.bearing(scene, dict(zip(things, map(str, digits)))), markers, asked)


def summed(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """ViP-Bench's sum, before which each number is asked for by a question of its own."""
    scene, things, markers, question, total = benchmarks.vip_question(generator, size, "math")
    signs = {thing.box: thing.text for thing in scene.objects}
    asked = [(SIGN.format("number", phrase(marker)), signs[thing.box]) for thing, marker in zip(things, markers)]
    return _dialogue(scene, markers, [*asked, (question, total)])


def _marked(generator: np.random.Generator, size: tuple[int, int], count: int, total: int | None = None, **options):
    """A rich scene with `count` marked things: half of the time by rectangles, alike but for their colors, as in v7w.
    total: things in all, else up to six; options of sample_scene."""
    rectangles = generator.random() < 0.5
    kinds, distribution = (("rectangle",), CONSTANT) if rectangles else (KINDS, RELEASED)

    def drawn() -> Scene:
        return sample_scene(generator, size, n=total or int(generator.integers(count, 7)), rich=True, **options)

    return scenes.until_marked(drawn, generator, count, kinds, distribution)


def _dialogue(scene: Scene, markers: Sequence[Marker], asked: Sequence[tuple[str, str]]) -> Sample:
    return Sample(partial(render, scene), tuple(markers), tuple(Turn(*pair, image=k == 0) for k, pair in enumerate(asked)))


def _which(generator: np.random.Generator, scene: Scene, thing: Object) -> str:
    asked = (f"Which is the {thing.color} {thing.shape}?", f"Which object is at the {position(scene, thing)}?")
    return asked[generator.integers(2)]


def told_apart(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """Two to four marked things: what each is, which of them is meant, how two lie to each other. A dialogue of many
    short answers teaches the eye what single questions, of a letter or a triplet, ask of it all at once."""
    count = int(generator.integers(2, 5))
    scene, things, markers = _marked(generator, size, count)
    said, asked = list(map(phrase, markers)), []
    for thing, words in zip(things, said):
        asked.append((f"What is the object {words}?", look_of(thing)))
        asked.append((_which(generator, scene, thing), f"The object {words}"))
    for a, b in zip(generator.permutation(count).tolist(), generator.permutation(count).tolist()):
        if a != b and is_clear(things[a], things[b]):
            asked += _both_ways(things[a], things[b], said[a], said[b])
    return _dialogue(scene, markers, [asked[k] for k in generator.permutation(len(asked))[:6]])


def found(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """The way back from what a thing is to its marker, of two to four marked things in turn. To name what is marked, a
    model looks for the marker; for this it has to look for the thing, which it doesn't learn from a question now and then."""
    count = int(generator.integers(2, 5))
    scene, things, markers = _marked(generator, size, count)
    asked = []
    for thing, marker in zip(things, markers):
        forms = [f"Which is the {thing.color} {thing.shape}?"]
        if sum(other.color == thing.color for other in things) == 1:
            forms.append(f"Which object is {thing.color}?")
        asked.append((forms[generator.integers(len(forms))], f"The object {phrase(marker)}"))
    return _dialogue(scene, markers, [asked[k] for k in generator.permutation(count)])


def _both_ways(a: Object, b: Object, *words: str) -> list[tuple[str, str]]:
    """How two marked things lie to each other, as a triplet and in a sentence."""
    way = benchmarks.way_of(a, b)
    return [(TRIPLET.format(*words), f"({look_of(a)}, {way}, {look_of(b)})"),
            (SEEN_FROM.format(*words), f"The object {words[0]} is {way} the object {words[1]}.")]


def choices(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """A question with four options about four marked things: which look, place, marker or relation, by its letter, half
    of the time with the option before it."""
    scene, things, markers = _marked(generator, size, 4)
    (k, other), looks = generator.permutation(4)[:2].tolist(), list(map(look_of, things))
    words, seen_from = phrase(markers[k]), phrase(markers[other])
    forms = [
        (f"What is the object {words}?", looks, k),
        (f"Where is the object {words}?", [position(scene, thing) for thing in things], k),
        (_which(generator, scene, things[k]), [f"The object {phrase(marker)}" for marker in markers], k),
    ]
    if is_clear(things[k], things[other]):
        ways = [f"The object {words} is {way} the object {seen_from}." for way in WAYS]
        forms.append((SEEN_FROM.format(words, seen_from), ways, WAYS.index(benchmarks.way_of(things[k], things[other]))))
    return _dialogue(scene, markers, [_by_letter(generator, *forms[generator.integers(len(forms))])])


def options(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """Without a picture: which of four options says so, or, said first, any of them. Whoever can't find the letter of what
    is said can't answer by a letter, however well the picture is understood."""

    def four(words: Sequence[str]) -> list[str]:
        return [words[k] for k in generator.permutation(len(words))[:4].tolist()]

    looks = [f"{color} {shape}" for color, shape in zip(four(list(scenes.OBJECT_COLORS)), four(list(scenes.SHAPES)))]
    marked = [f"The object within the {color} rectangle" for color in four(list(COLORS))]
    related = [f"{marked[0]} is {way} the object{marked[1].removeprefix('The object')}" for way in four(WAYS)]
    told = (looks, marked, related, four(sum(scenes.POSITIONS, ())))[generator.integers(4)]
    right = int(generator.integers(4))
    named = f"Which option says {told[right][0].lower()}{told[right][1:]}?"
    question, answer = _by_letter(generator, named, told, right)
    if len(answer) > 1:  # were it named, the letter could be found without looking at what was said first
        question = question.replace(named, "Choose any option.")
    return Sample(None, (), (Turn(question, answer),))


def said(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """As `options`, the option said before its letter, but all about marked things: of `options` one question in eight
    is, and a small model kept on guessing."""
    marked = [f"The object within the {color} rectangle" for color in generator.permutation(list(COLORS))[:4].tolist()]
    question, answer = _by_letter(generator, "Choose any option.", marked, int(generator.integers(4)), spell=True)
    return Sample(None, (), (Turn(question, answer),))


def _by_letter(generator, question: str, options: Sequence[str], right: int, spell: bool | None = None) -> tuple[str, str]:
    """The question with its four options in any order, as benchmarks write them, and the letter of the right one. spell: is
    the option to be said first? None is half of the time."""
    order = generator.permutation(4).tolist()
    told, letter = "\n".join(f"{letter}. {options[k]}" for letter, k in zip("ABCD", order)), "ABCD"[order.index(right)]
    if spell is None:
        spell = generator.random() >= 0.5
    if not spell:
        return f"{question}\n{told}\n{LETTER}", letter
    return f"{question}\n{told}\n{SPELL}", f"{options[right].rstrip('.')}: {letter}"
