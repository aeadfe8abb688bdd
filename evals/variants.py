"""Variants of a small model, trained in minutes: the image tower is frozen, so what it says is kept on disk.

    generator -> Lesson     a scene, its markers, and what is asked about them; the words that point are still a gap
    States                  a file with every depth of the tower for n lessons, (n, L + 1, N, C) in 16 bits, kept once
    Variant                 which depths a projector gets, of which pictures, and in which words a question points
    teach                   a language model and a new projector, trained by train.train on such a file
    examine                 exact answers about held-out lessons

All variants of one experiment start from the same language model, with a projector of their own, and see the same
lessons in the same order.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch.utils.data import Dataset

import train
from chat import IMAGE, Turn, encode_chat
from clip import preprocess
from data.batches import Example, Micro, collate, with_patches
from data.scenes import Object, Scene, describe, marked_scene, position, render
from evals.benchmark import complete, replace_file
from overlay import Marker, draw, phrase
from parallel import Objective, Place
from recipe import Habits, Recipe
from tokenizer import Tokenizer
from vipllava import ViPLLaVA


# -- lessons ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What may be asked about a scene. {} in a question is where the words go that point at the thing."""

    scene: Scene
    markers: tuple[Marker, ...]
    things: tuple[Object, ...]  # that the markers mark
    asked: tuple[tuple[str, int, str], ...]  # a question, which thing it is about, its answer

    @cached_property
    def unmarked(self) -> Image.Image:
        return render(self.scene)

    @cached_property
    def marked(self) -> Image.Image:
        return draw(self.unmarked, self.markers)

    def turns(self, words: Callable[["Lesson", int], str]) -> list[Turn]:
        return [Turn(question.format(words(self, k)), said, image=i == 0) for i, (question, k, said) in enumerate(self.asked)]


def by_marker(lesson: Lesson, k: int) -> str:
    """"within the red rectangle"."""
    return phrase(lesson.markers[k])


def by_coordinates(lesson: Lesson, k: int) -> str:
    """"within the box (12, 30, 45, 61)": x0, y0, x1, y1 in percent of the image's sides."""
    width, height = lesson.scene.size
    x0, y0, x1, y1 = lesson.things[k].box
    return f"within the box ({100 * x0 / width:.0f}, {100 * y0 / height:.0f}, {100 * x1 / width:.0f}, {100 * y1 / height:.0f})"


def lesson(generator: np.random.Generator, size: tuple[int, int], **marking) -> Lesson:
    """About one to three marked things, in any order: what each is, and where. marking: see scenes.marked_scene."""
    scene, things, markers = marked_scene(generator, size, **marking)
    asked = []
    for k, thing in enumerate(things):
        asked += [("What is {}?", k, describe(thing)), ("Where is the object {}?", k, position(scene, thing))]
    return Lesson(scene, markers, things, tuple(asked[i] for i in generator.permutation(len(asked))))


def exercise(generator: np.random.Generator, size: tuple[int, int], kind: str, **marking) -> Lesson:
    """One marker, one question: "What is …?"."""
    scene, things, markers = marked_scene(generator, size, (kind,), 1, **marking)
    return Lesson(scene, markers, things, (("What is {}?", 0, describe(things[0])),))


# -- what a frozen tower sees ------------------------------------------------------------------------------------------


class States:
    """A file with the tower's hidden states for pictures 0 … n - 1, all depths. It is made once; where a run was cut, the
    file is completed."""

    def __init__(self, path: Path, tower, pictures: Callable[[int], Image.Image], n: int, batch: int = 64):
        config = tower.config
        shape = (n, config.layers + 1, config.patches, config.width)
        counter = path.with_suffix(".json")
        done = json.loads(counter.read_text())["done"] if counter.is_file() and path.is_file() else 0
        if not done:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.array = np.lib.format.open_memmap(path, "r+" if done else "w+", np.float16, None if done else shape)
        if self.array.shape != shape:
            raise ValueError(f"{path} holds states of the shape {self.array.shape}; expected {shape}: remove it")
        layers, device = tuple(range(config.layers + 1)), tower.class_embedding.device
        for first in range(done, n, batch):
            some = range(first, min(first + batch, n))
            pixels = torch.stack([preprocess(pictures(i), config.image_size) for i in some]).to(device)
            with torch.no_grad():
                states = torch.stack(tower.hidden_states(pixels, layers), dim=1)[:, :, 1:]  # (B, L + 1, N, C)
            self.array[some.start : some.stop] = states.half().cpu().numpy()
            self.array.flush()
            replace_file(counter, json.dumps({"done": some.stop}))

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.array[i].astype(np.float32))


class Stored(nn.Module):
    """Stands where the image tower stood: what comes as pixels are all its states (I, L + 1, N, C) already."""

    def forward(self, pixels: torch.Tensor, layers: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([pixels[:, i] for i in layers], dim=-1)


# -- variants --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    name: str
    layers: tuple[int, ...]
    pictures: tuple[str, ...] = ("marked",)  # which pictures of a lesson a prompt shows, one after the other
    words: Callable[[Lesson, int], str] = by_marker

    def trains_like(self, depths: int) -> str:
        """The same text for variants that differ in their names alone; depths: how many the tower has."""
        layers = " ".join(str(k % depths) for k in self.layers)
        return f"{'+'.join(self.pictures)} {self.words.__name__} {layers}"


class Lessons(Dataset):
    """Examples for train.train: lesson j of a variant; after the last comes the first again."""

    def __init__(self, lessons: Sequence[Lesson], states: dict[str, States], variant: Variant, tokenizer: Tokenizer, config):
        self.lessons, self.states, self.variant = lessons, states, variant
        self.tokenizer, self.config = tokenizer, config

    def size(self, j: int) -> int:
        return len(self.lessons[j % len(self.lessons)].asked)

    def forget(self) -> None:
        pass

    @staticmethod
    def collate(examples: list[Example]) -> Micro:
        """As of data.batches, but an example may have several pictures."""
        micro = collate(examples)
        return replace(micro, pixels=micro.pixels.flatten(0, 1))

    def prompt(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """ids with IMAGE for every picture, and which are trained."""
        ids, trained = encode_chat(self.tokenizer, self.config.template, turns)
        place, more = ids.index(IMAGE), len(self.variant.pictures) - 1
        return ids[:place] + [IMAGE] * more + ids[place:], trained[:place] + [False] * more + trained[place:]

    def pixels(self, i: int) -> torch.Tensor:
        return torch.stack([self.states[name][i] for name in self.variant.pictures])  # (pictures, L + 1, N, C)

    def __getitem__(self, j: int) -> Example:
        i = j % len(self.lessons)
        prompt = self.prompt(self.lessons[i].turns(self.variant.words))
        return Example(f"lesson {i}", *with_patches(*prompt, self.config.vision.patches), self.pixels(i))


def start(base: ViPLLaVA, layers: Sequence[int], seed: int) -> ViPLLaVA:
    """base's language model, with a new projector for these depths and without a tower."""
    torch.manual_seed(seed)
    model = ViPLLaVA(replace(base.config, feature_layers=tuple(layers)))
    model.vision = Stored()
    model.llama.load_state_dict(base.llama.state_dict())
    return model.to(base.llama.embed_tokens.weight.device)


@dataclass(frozen=True)
class Course:
    """How a variant is trained."""

    steps: int
    batch: int = 32
    lr: float = 1e-3
    projector_lr: float = 4e-3  # it is new; with the language model's rate some seeds are far from done after 600 steps
    low: torch.dtype = torch.float32  # in which is computed
    compile: bool = False


def teach(model: ViPLLaVA, lessons: Lessons, course: Course, seed: int, out: Path) -> None:
    """Train projector and language model; a run that was cut goes on, one that is over is loaded. out: a folder named after
    what is trained."""
    recipe = Recipe(data=out.name, train="language", steps=course.steps, batch=course.batch, lr=course.lr,
                    projector_lr=course.projector_lr, seed=seed)
    train.freeze(model, recipe, torch.float32)
    if course.compile:
        for block in model.llama.layers:
            block.compile()
    place = Place(model.llama.embed_tokens.weight.device, 0, 1)
    habits = Habits(log_every=max(1, course.steps // 4), keep=1)
    task = train.Task(Objective(model, course.low, False), lessons, publish=lambda state: None)
    train.train(task, recipe, out, out.name, place, habits)


def examine(model: ViPLLaVA, lessons: Lessons, batch: int = 50) -> list[bool]:
    """For each lesson: is its first question answered exactly?"""
    right = []
    for first in range(0, len(lessons.lessons), batch):
        some = range(first, min(first + batch, len(lessons.lessons)))
        turns = [lessons.lessons[i].turns(lessons.variant.words)[0] for i in some]
        prompts = [lessons.prompt([replace(turn, answer=None)])[0] for turn in turns]
        pixels = torch.cat([lessons.pixels(i) for i in some])
        texts = complete(model, lessons.tokenizer, model.config.template, prompts, pixels, max_new_tokens=16)
        right += [text == turn.answer for text, turn in zip(texts, turns)]
    return right
