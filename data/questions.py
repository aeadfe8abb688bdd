"""What is asked about drawn scenes, and what the right answers are: samples to train on without a file.

    caption_sample         an image and its caption; nothing is asked
    marked_caption_sample  the same with markers, which the caption mentions
    marker_sample          "What is within the red rectangle?" -> "a blue ring", and where, and how two are related
    told_sample            the same questions about a caption instead of a picture
    test_sample            one marker, one question: what the held-out accuracy counts

Each is a function of a generator and a size in pixels. A Sample's image is unmarked: overlay.draw marks it.
"""
from collections.abc import Sequence
from functools import partial

import numpy as np

from chat import Turn
from data.records import Sample
from data.scenes import (caption, describe, is_clear, marked_scene, position, relation, render, sample_markers,
                         sample_scene)
from overlay import KINDS, RELEASED, Distribution, phrase

P_THIS, P_COLOR, P_SHAPE = 0.25, 0.08, 0.08  # "What is this?" (one marker only), "What color …", "What shape …"
P_WHERE, P_RELATION, P_DESCRIBE = 0.5, 0.5, 0.15  # further turns: where each is, how two are related, the whole image


def caption_sample(generator: np.random.Generator, size: tuple[int, int] = (224, 224), rich: bool = False) -> Sample:
    """An image and its caption, nothing asked: the plain template's pair. rich: see scenes.sample_scene."""
    scene = sample_scene(generator, size, rich=rich)
    return Sample(partial(render, scene), (), (Turn("", caption(scene), image=True),))


def marked_caption_sample(generator: np.random.Generator, size: tuple[int, int] = (224, 224),
                          distribution: Distribution = RELEASED) -> Sample:
    """The same of an image with one to three markers, which the caption mentions: what a marker is, and where."""
    scene, things, markers = marked_scene(generator, size, KINDS, None, distribution)
    return Sample(partial(render, scene), markers, (Turn("", caption(scene, zip(things, map(phrase, markers))), image=True),))


def test_sample(generator: np.random.Generator, size: tuple[int, int] = (224, 224), kind: str = "arrow") -> Sample:
    """One marker of this kind, "What is {phrase}?", one right answer: the held-out accuracy counts exact matches."""
    scene = sample_scene(generator, size)
    (thing,), (marker,) = sample_markers(generator, scene, 1, (kind,), RELEASED)
    return Sample(partial(render, scene), (marker,), (Turn(f"What is {phrase(marker)}?", describe(thing), image=True),))


test_sample.__test__ = False   # pytest would take it for a test


def marker_sample(generator: np.random.Generator, size: tuple[int, int] = (224, 224), kinds: Sequence[str] = KINDS,
                  n_markers: int | None = None, distribution: Distribution = RELEASED) -> Sample:
    """One to three marked objects; what each is, perhaps where, how two are related, and the whole, in any order."""
    scene, things, markers = marked_scene(generator, size, kinds, n_markers, distribution)
    return Sample(partial(render, scene), markers, _dialogue(generator, scene, things, markers))


def told_sample(generator: np.random.Generator, size: tuple[int, int] = (224, 224)) -> Sample:
    """The same questions without a picture: its caption stands in its place, for a language model that learns to read."""
    scene, things, markers = marked_scene(generator, size)
    first, *others = _dialogue(generator, scene, things, markers)
    said = caption(scene, zip(things, map(phrase, markers)))
    return Sample(None, (), (Turn(f"{said}\n{first.question}", first.answer), *others))


def _dialogue(generator, scene, things, markers) -> tuple[Turn, ...]:
    asked, alone = [], len(things) == 1
    for thing, marker in zip(things, markers):
        asked.append(_question(generator, thing, marker, alone))
        if generator.random() < P_WHERE:
            which = "this" if alone and generator.random() < P_THIS else f"the object {phrase(marker)}"
            asked.append((f"Where is {which}?", position(scene, thing)))
    if len(things) == 2 and is_clear(*things) and generator.random() < P_RELATION:
        asked.append(_related(generator, things, markers))
    if generator.random() < P_DESCRIBE:
        asked.append(("Describe the image.", caption(scene)))
    asked = [asked[i] for i in generator.permutation(len(asked))]
    return tuple(Turn(question, answer, image=i == 0) for i, (question, answer) in enumerate(asked))


def _question(generator, thing, marker, alone):
    choice = generator.random()
    if alone and choice < P_THIS:
        return "What is this?", describe(thing)
    choice = generator.random()
    if choice < P_COLOR:
        return f"What color is the object {phrase(marker)}?", thing.color
    if choice < P_COLOR + P_SHAPE:
        return f"What shape is the object {phrase(marker)}?", thing.shape
    return f"What is {phrase(marker)}?", describe(thing)


def _related(generator, things, markers):
    """About "the two", the left or upper one first, or about two phrases, in either order."""
    if generator.random() < 0.5:
        said = relation(*things)
        return "How are the two related?", said if "left of" in said or "above" in said else relation(*things[::-1])
    i, j = generator.permutation(2)
    question = f"How are the objects {phrase(markers[i])} and {phrase(markers[j])} related?"
    return question, relation(things[i], things[j])
