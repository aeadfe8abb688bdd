"""Samples -> batches: which samples a step takes, in which order, for which process, hardly padded.

Sample j of a run is a function of (seed, j), and which samples a step takes on the seed and their lengths. So neither
workers, nor processes, nor a stop and a start anew change what is learned from:

    j         0, 1, 2, …      over all epochs: each is a permutation of the records; scenes never repeat
    pool      POOL batches    sorted by the length of the texts, cut into batches, which come in random order
    batch     of one step     every world-th sample goes to a process, and its share is cut into micro-batches
    Micro     ids (B, T), labels (B, T), pixels (I, 3, S, S)    what the model takes at once
"""

import functools
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from chat import Turn, encode_chat
from clip import preprocess
from data import benchmarks, drills, questions, scenes
from data.records import BadRecord, Records, Sample
from overlay import draw
from tokenizer import Tokenizer
from vipllava import IGNORE, ViPLLaVAConfig, expand, pad


def text_sample(generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """What is said about some scene, without its picture: for a language model that can't speak yet. Half of the time a
    caption stands in the picture's place, so that there is something to read the answer from."""
    if generator.random() < 0.5:
        return questions.told_sample(generator, size)
    names = [name for name in SCENES if name != "texts" and name not in DRILLS]
    first, *others = SCENES[names[generator.integers(len(names))]](generator, size).turns
    return Sample(None, (), (replace(first, image=False), *others))


SCENES = {
    "texts": text_sample,
    "captions": questions.caption_sample,
    "markers": questions.marker_sample,
    "marked": questions.marked_caption_sample,
    # wider strokes, easier to begin with
    "bold-markers": functools.partial(questions.marker_sample, distribution=scenes.BOLD),
    "bold-marked": functools.partial(questions.marked_caption_sample, distribution=scenes.BOLD),
    # what the official data sets ask: v7w, pointQA_twice, vcr, refcocog, vg_rel, flickr30k
    **{kind: functools.partial(benchmarks.sample, kind) for kind in (*benchmarks.OFFICIAL, "vcr-choice")},
    "vip-bench": benchmarks.vip_sample,
}
DRILLS = {  # easier steps towards those (drills.py), captions that tell textures and signs, ViP-Bench by capability
    "rich-captions": functools.partial(questions.caption_sample, rich=True),
    "told-apart": drills.told_apart,
    "found": drills.found,
    "options": drills.options,
    "said": drills.said,
    "choices": drills.choices,
    "counted": drills.counted,
    "signs": drills.signs,
    "lettered": drills.lettered,
    "added": drills.added,
    "vip-math-steps": drills.summed,
    **{f"{kind}-spelled": functools.partial(drills.spelled, kind) for kind in ("v7w", "vcr-choice")},
    **{f"vip-{name}": functools.partial(benchmarks.vip_sample, capability=name) for name in benchmarks.CAPABILITIES},
}
SCENES |= DRILLS
POOL = 8  # batches


# -- where samples come from -----------------------------------------------------------------------------------------


def parse_mix(text: str) -> tuple[list[str], list[float]]:
    """ "markers=3,captions=1" -> (["markers", "captions"], [0.75, 1.0]), the upper bounds of a uniform draw."""
    shares = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        if name not in SCENES:
            choices = f"files of records, or some of {', '.join(SCENES)}, as in markers=3,captions=1"
            raise ValueError(f"data {part!r} is neither a file nor drawn here; expected {choices}")
        if name in shares:
            raise ValueError(f"{name} came twice in {text!r}; expected it once")
        try:
            shares[name] = float(share or 1)
        except ValueError:
            raise ValueError(f"the share of {name} is {share!r}; expected a number, such as {name}=3") from None
        if not 0 < shares[name] < math.inf:
            raise ValueError(f"the share of {name} is {share}; expected more than 0")
    total, bounds = sum(shares.values()), []
    for share in shares.values():
        bounds.append((bounds[-1] if bounds else 0.0) + share / total)
    return list(shares), bounds[:-1] + [1.0]


class SceneSource:
    """Drawn scenes without end."""

    def __init__(self, mix: str, seed: int, side: int):
        self.names, self.bounds = parse_mix(mix)
        self.is_text = set(self.names) <= {"texts", "options", "said"}  # no pictures
        self.seed, self.size = seed, (side, side)

    def sample(self, j: int) -> Sample:
        generator = scenes.generator_for("train", self.seed, j)
        u = generator.random()
        return SCENES[next(n for n, bound in zip(self.names, self.bounds) if u < bound)](generator, self.size)

    def name(self, j: int) -> str:
        return f"scene {j}"

    def bad(self, j: int, reason: str) -> BadRecord:
        return BadRecord(Path("scenes"), f"sample {j}", self.name(j), reason)


class RecordSource:
    """The records of files, epoch after epoch, each in an order of its own."""

    def __init__(self, files: list[Path], images: Path, seed: int):
        self.records, self.seed, self._orders = Records(files, images, seed), seed, {}
        if not len(self.records):
            raise ValueError(f"no records in {', '.join(map(str, files))}")

    def order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = dict([*self._orders.items()][-1:])  # two epochs may meet in a step
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
        return self._orders[epoch]

    def place(self, j: int) -> tuple[int, int]:
        """Epoch and record of sample j."""
        epoch, k = divmod(j, len(self.records))
        return epoch, int(self.order(epoch)[k])

    def sample(self, j: int) -> Sample:
        epoch, i = self.place(j)
        return self.records.sample(i, epoch)

    def name(self, j: int) -> str:
        file, k = self.records.place(self.place(j)[1])
        return f"{file.path.name} {file.where(k)}"

    def bad(self, j: int, reason: str) -> BadRecord:
        return self.records.bad(self.place(j)[1], reason)


# -- a sample -> what is trained on ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    name: str
    ids: list[int]  # (T,), IMAGE once for each patch
    labels: list[int]  # (T,), IGNORE where nothing is trained
    pixels: torch.Tensor | None  # (3, S, S)


def encode(sample: Sample, tokenizer: Tokenizer, config: ViPLLaVAConfig, plain: bool = False):
    """ids and labels (T,), pixels (3, S, S) or None. plain: as stage 1 of the paper, which leaves out what is asked and
    keeps an unmarked image's centre only. ValueError: several answers came for it, or what can't be encoded."""
    if plain and len(sample.turns) > 1:
        raise ValueError(f"{len(sample.turns)} answers for the template plain, which has one; expected another template")
    prompt = encode_prompt(sample, tokenizer, "plain" if plain else config.template)
    ids, labels = with_patches(*prompt, config.vision.patches)
    pixels = None
    if sample.image is not None:
        mode = "crop" if plain and not sample.markers else "pad"
        pixels = preprocess(draw(sample.image, sample.markers), config.vision.image_size, mode)
    return ids, labels, pixels


def encode_prompt(sample: Sample, tokenizer: Tokenizer, template: str) -> tuple[list[int], list[bool]]:
    """ids, one IMAGE for the image, and which are trained. Where nothing is asked, "plain" is the template."""
    if template == "plain" or sample.is_caption:
        template, turns = "plain", [Turn("", sample.turns[0].answer, sample.turns[0].image)]
    else:
        turns = sample.turns
    return encode_chat(tokenizer, template, turns)


def with_patches(ids: list[int], trained: list[bool], patches: int) -> tuple[list[int], list[int]]:
    """ids and labels (T,), one IMAGE for an image become one for each of its patches."""
    labels = [i if t else IGNORE for i, t in zip(ids, trained)]
    return expand(ids, patches), [label for i, label in zip(ids, labels) for _ in expand([i], patches)]


@dataclass
class Micro:
    names: list[str]
    ids: torch.Tensor  # (B, T), padded on the right, where causal attention never looks
    labels: torch.Tensor  # (B, T)
    pixels: torch.Tensor | None  # (I, 3, S, S), of those that have an image

    def pin_memory(self) -> "Micro":
        pinned = [None if x is None else x.pin_memory() for x in (self.ids, self.labels, self.pixels)]
        return Micro(self.names, *pinned)


def collate(examples: list[Example]) -> Micro:
    pixels = [e.pixels for e in examples if e.pixels is not None]
    ids, labels = pad([e.ids for e in examples], 0, "right")[0], pad([e.labels for e in examples], IGNORE, "right")[0]
    return Micro([e.name for e in examples], ids, labels, torch.stack(pixels) if pixels else None)


class Examples(Dataset):
    """Example j, or the BadRecord that it would come from: a worker's exceptions lose their words on the way."""

    def __init__(self, source, tokenizer: Tokenizer, config: ViPLLaVAConfig, plain: bool, length: int):
        self.source, self.tokenizer, self.config, self.plain = source, tokenizer, config, plain
        self.length, self._ready = length, {}

    def size(self, j: int) -> int:
        """About how long sample j's text is. The sample is kept until it is asked for, in this process."""
        try:
            sample = self._ready[j] = self.source.sample(j)
        except BadRecord:
            return 0
        return sum(len(turn.question) + len(turn.answer) for turn in sample.turns)

    def forget(self) -> None:
        self._ready.clear()

    collate = staticmethod(collate)

    def __getitem__(self, j: int) -> Example | BadRecord:
        try:
            sample = self._ready.pop(j, None) or self.source.sample(j)
            ids, labels, pixels = encode(sample, self.tokenizer, self.config, self.plain)
            if len(ids) > self.length:
                raise self.source.bad(j, f"{len(ids)} tokens; expected at most {self.length}")
        except BadRecord as error:
            return error
        except ValueError as error:  # a mask of another size than its image's, for one
            return self.source.bad(j, str(error))
        return Example(self.source.name(j), ids, labels, pixels)


# -- batches ---------------------------------------------------------------------------------------------------------


def _step(rows: list[Example | BadRecord], micro: int, join: Callable) -> tuple[list[Micro], list[BadRecord]]:
    good, bad = [r for r in rows if isinstance(r, Example)], [r for r in rows if isinstance(r, BadRecord)]
    return [join(good[i : i + micro]) for i in range(0, len(good), micro)], bad


def order(data: Examples, batch: int, seed: int, first: int, last: int) -> Iterator[list[int]]:
    """The samples of the steps first … last - 1 of a run that ends with the step last - 1."""
    for pool in range(first // POOL, -(-last // POOL)):
        steps = range(pool * POOL, min((pool + 1) * POOL, last))
        members = sorted(range(steps.start * batch, steps.stop * batch), key=data.size)
        for step, k in zip(steps, np.random.default_rng([seed, pool]).permutation(len(steps))):
            if step >= first:
                yield members[k * batch : (k + 1) * batch]
        data.forget()


def _leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM often come to all processes of a run: the first one finishes its step, for which it needs the others."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def batches(data: Examples, batch: int, seed: int, first: int, last: int, *, micro=0, rank=0, world=1, workers=0, pin=False):
    """For each of the steps first … last - 1 this process's micro-batches, and the bad records among them."""
    mine = (members[rank::world] for members in order(data, batch, seed, first, last))
    into_micros = functools.partial(_step, micro=micro or -(-batch // world), join=data.collate)
    return iter(DataLoader(data, batch_sampler=mine, collate_fn=into_micros, num_workers=workers, pin_memory=pin,
                           worker_init_fn=_leave_signals))
