"""CLIP from captioned scenes: which caption belongs to which image? (Radford et al., arXiv 2103.00020, section 2.3)

    python train.py tiny-clip --out runs/clip                                               both towers, from nothing
    python train.py tiny-align --model runs/text --clip runs/clip --out runs/align          its tower in a small model

A caption tells of two things of a scene, as captions on the web leave much out. A batch of B images has B captions, and
for each K others that are false in one thing: a shape, a color, a place, or which marker is drawn, and on what. And each
thing in all images has a phrase ("a striped red star within the blue ellipse"); where there are markers, or a letter or
digit on it, it has others, too, that are wrong about them: R phrases. Three questions, whose losses are added:

    which caption is whose?             logits (B, B), both ways, as in the paper
    which of its own 1 + K is true?     logits (B, 1 + K)
    which phrase is a patch's?          logits (P, R), P patches on which a thing lies (as in RegionCLIP, arXiv 2112.09106)

Captions of other scenes are told apart by a glance at the colors; the false ones are not. And without phrases the class
token learns to look at edges by itself: the patches, which are all that a language model gets to see, then know no more
in the last block than in the first (evals/probes.py). CLIP's 400 million pictures bring that about; these few don't.
Six of ten scenes are unmarked. On the others are one to three markers, as on annotated pictures on the web: the caption
tells of the first, the phrases of all.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from clip import CLIP, TextConfig, VisionConfig, preprocess
from data.batches import Example, Micro
from data.scenes import (DIGITS, LETTERS, OBJECT_COLORS, SHAPES, UNLIKE, Object, Scene, caption, cell, generator_for,
                         marked_scene, render, sample_scene, tell)
from overlay import COLORS, KINDS, Marker, draw, phrase, sample_marker
from parallel import lowered
from tokenizer import CLIPTokenizer
from vipllava import IGNORE

P_MARKED = 0.4  # of the scenes
P_THINGS = (0.2, 0.2, 0.2, 0.15, 0.15, 0.1)  # that an unmarked scene has one, two, … six
TOLD = 2  # things in a caption at most
FALSE = 3  # false captions of an image: K
PATCHES = -2  # the depth that phrases are asked of: a language model reads no deeper (vipllava.py)
CONTEXT = 64  # tokens of a caption at most
VISION = VisionConfig(image_size=112, patch_size=14, width=128, layers=7, heads=4, mlp=512)
TEXT = dict(context=CONTEXT, width=128, layers=3, heads=4, mlp=512)
PROJECTION = 128


# -- scenes, and what is true and false about them -------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What a caption says of an object: its looks, and the marker that points at it."""

    thing: Object
    marker: Marker | None = None


@dataclass(frozen=True)
class Captioned:
    scene: Scene
    markers: tuple[Marker, ...]
    true: str
    false: tuple[str, ...]  # FALSE of them
    phrases: tuple[str, ...]  # of each object of the scene
    rivals: tuple[str, ...]  # the same objects, wrong about their markers, or about their letters and digits

    def image(self) -> Image.Image:
        return draw(render(self.scene), self.markers)


def captioned(generator: np.random.Generator, size: tuple[int, int]) -> Captioned:
    """A scene, marked or not, and what is said of it. Rivals: every thing with another's marker, or none; marked things
    with a marker of a wrong kind or hue; lettered ones with another letter or digit."""
    if generator.random() < P_MARKED:
        scene, things, markers = marked_scene(generator, size, rich=True)
        told = [Told(things[0], markers[0])]
    else:
        scene, things, markers = sample_scene(generator, size, 1 + int(generator.choice(6, p=P_THINGS)), rich=True), (), ()
        told = []
    others = [thing for thing in scene.objects if not told or thing is not told[0].thing]
    told += [Told(others[i]) for i in generator.permutation(len(others))[: TOLD - len(told)]]
    false = tuple(caption_of(scene, falsify(generator, scene, told)) for _ in range(FALSE))
    own = {id(thing): phrase(marker) for thing, marker in zip(things, markers)}
    phrases = tuple(tell(thing, own.get(id(thing))) for thing in scene.objects)
    rivals = [tell(thing, said) for thing in scene.objects for said in (None, *own.values()) if said != own.get(id(thing))]
    mistaken = (_mistaken(generator, scene, Told(*both)) for both in zip(things, markers))
    rivals += [tell(thing, phrase(marker)) for thing, marker in zip(things, mistaken)]
    for thing in scene.objects:
        if thing.text:
            wrong = replace(thing, text=_another(generator, DIGITS if thing.text in DIGITS else LETTERS, thing.text))
            rivals.append(tell(wrong, own.get(id(thing))))
    return Captioned(scene, markers, caption_of(scene, told), false, phrases, tuple(rivals))


def caption_of(scene: Scene, told: list[Told]) -> str:
    marked = [(one.thing, phrase(one.marker)) for one in told if one.marker]
    return caption(replace(scene, objects=tuple(one.thing for one in told)), marked)


def falsify(generator: np.random.Generator, scene: Scene, told: list[Told]) -> list[Told]:
    """The same, but for one thing that is not so."""
    told, marker, several = list(told), told[0].marker, len(told) > 1
    i = int(generator.integers(len(told)))
    j = (i + 1) % len(told)
    thing = told[i].thing
    changes = ["shape", "shape", "color", "place"] + ["exchange"] * several
    changes += ["kind", "hue"] * bool(marker) + ["on another"] * bool(marker and several)
    change = changes[generator.integers(len(changes))]
    if change == "shape":
        told[i] = replace(told[i], thing=replace(thing, shape=_another(generator, SHAPES, thing.shape)))
    elif change == "color":
        told[i] = replace(told[i], thing=replace(thing, color=_another(generator, OBJECT_COLORS, thing.color)))
    elif change == "place":
        told[i] = replace(told[i], thing=_moved(scene, thing, _another(generator, np.ndindex(3, 3), cell(scene, thing))))
    elif change == "exchange":
        other = told[j].thing
        told[i] = replace(told[i], thing=replace(thing, box=other.box))
        told[j] = replace(told[j], thing=replace(other, box=thing.box))
    elif change == "on another":
        told[0], told[1] = replace(told[0], marker=None), replace(told[1], marker=marker)
    else:
        told[0] = replace(told[0], marker=_mistaken(generator, scene, told[0], change))
    return told


def _another(generator: np.random.Generator, choices, than):
    choices = [choice for choice in choices if choice != than]
    return choices[generator.integers(len(choices))]


def _mistaken(generator: np.random.Generator, scene: Scene, told: Told, about: str | None = None) -> Marker:
    """Its marker, but of another kind, or of a hue that nobody takes for its own: many colors have no name."""
    about = about or ("kind", "hue")[generator.integers(2)]
    kind = _another(generator, KINDS, told.marker.kind) if about == "kind" else told.marker.kind
    color = told.marker.color
    if about == "hue":
        unlike = [name for name, rgb in COLORS.items() if math.dist(rgb, color) >= UNLIKE]
        color = unlike[generator.integers(len(unlike))]
    return sample_marker(told.thing.region, scene.size, generator, kind, color)


def _moved(scene: Scene, thing: Object, place: tuple[int, int]) -> Object:
    """Into another of the nine cells."""
    (row, column), (width, height) = cell(scene, thing), scene.size
    dx, dy = (place[1] - column) * width / 3, (place[0] - row) * height / 3
    x0, y0, x1, y1 = thing.box
    return replace(thing, box=(x0 + dx, y0 + dy, x1 + dx, y1 + dy))


class Pairs(Dataset):
    """Example j: an image, and the ids of its captions, the true one first."""

    def __init__(self, tokenize: CLIPTokenizer, config: VisionConfig, seed: int, side: int, split: str = "train"):
        self.tokenize, self.config, self.seed, self.split = tokenize, config, seed, split
        self.image_size, self._ready = (side, side), {}

    def pair(self, j: int) -> Captioned:
        return captioned(generator_for(self.split, self.seed, j), self.image_size)

    def size(self, j: int) -> int:
        """How long its caption is: batches of like ones have little padding, and images that are harder to tell apart."""
        self._ready[j] = self.pair(j)
        return len(self._ready[j].true)

    def forget(self) -> None:
        self._ready.clear()

    def __getitem__(self, j: int) -> Example:
        """ids: of the captions, the true one first, then of the phrases and their rivals. labels (1 + N,): which phrase is
        a patch's, after an IGNORE, as parallel.gradients counts labels from the second on."""
        pair = self._ready.pop(j, None) or self.pair(j)
        ids = [self.tokenize.encode(text) for text in (pair.true, *pair.false, *pair.phrases, *pair.rivals)]
        grid = self.config.image_size // self.config.patch_size
        labels = np.full((grid, grid), IGNORE)
        for k, thing in enumerate(pair.scene.objects):
            (x0, y0, x1, y1), (width, height) = thing.box, pair.scene.size
            rows, columns = (slice(round(grid * low / side), max(round(grid * high / side), round(grid * low / side) + 1))
                             for low, high, side in ((y0, y1, height), (x0, x1, width)))
            labels[rows, columns] = k
        return Example(f"scene {j}", ids, [IGNORE, *labels.flatten().tolist()], preprocess(pair.image(), self.config.image_size))

    def collate(self, examples: list[Example]) -> Micro:
        """ids (B + B K + R, T): true captions, false ones, each scene's phrases and rivals. labels (B, 1 + N): the number of
        the phrase, or IGNORE."""
        captions = [e.ids[k] for k in range(1 + FALSE) for e in examples]
        phrases = [ids for e in examples for ids in e.ids[1 + FALSE :]]
        firsts = np.cumsum([0] + [len(e.ids) - 1 - FALSE for e in examples])
        labels = torch.tensor([[k if k == IGNORE else first + k for k in e.labels] for e, first in zip(examples, firsts)])
        return Micro([e.name for e in examples], self.tokenize.pad(captions + phrases), labels,
                     torch.stack([e.pixels for e in examples]))


def fits(model: CLIP, ids: torch.Tensor, labels: torch.Tensor, pixels: torch.Tensor):
    """How well texts fit, scaled cosines: own (B, 1 + K), an image and its own captions, the true one first; all (B, B),
    images and true captions; patches (P, R), the labelled patches and the phrases."""
    B = len(pixels)
    last, read = model.vision_model.hidden_states(pixels, (-1, PATCHES))  # (B, 1 + N, C) each
    images, patches = (F.normalize(model.visual_projection(model.vision_model.post_layernorm(states)), dim=-1)
                       for states in (last[:, 0], read[labels != IGNORE]))
    texts, phrases = ids[: B * (1 + FALSE)], ids[B * (1 + FALSE) :]
    phrases = phrases[:, : int((phrases != phrases[:, -1:]).sum(dim=1).max()) + 1]  # they are shorter; end is the padding
    texts, phrases = (model.logit_scale.exp() * model.encode_text(x) for x in (texts, phrases))
    logits = (images @ texts.T).float()  # (B, B + B K)
    own = torch.stack([block.diagonal() for block in logits.split(B, dim=1)], dim=1)
    return own, logits[:, :B], (patches @ phrases.T).float()


class Contrast(nn.Module):
    """The loss of a batch, as a module in place of parallel.Objective: three means, added, times the number of labelled
    patches, as parallel.gradients divides by the number of labels."""

    def __init__(self, model: CLIP, low: torch.dtype):
        super().__init__()
        self.model, self.low = model, low

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        with lowered(pixels.device, self.low):
            own, all, patches = fits(self.model, ids, labels, pixels)
        diagonal = torch.arange(len(all), device=all.device)
        whose = (F.cross_entropy(all, diagonal) + F.cross_entropy(all.T, diagonal)) / 2
        true = F.cross_entropy(own, torch.zeros_like(diagonal))
        told, said = labels[labels != IGNORE], ids[own.numel() :]
        same = (said[:, None] == said[None]).all(dim=-1).fill_diagonal_(False)  # the same words are no rival
        patch = F.cross_entropy(patches.masked_fill(same[told], -math.inf), told)
        return (whose + true + patch) * len(told)


def tiny_clip(seed: int, vision: VisionConfig = VISION) -> tuple[CLIP, CLIPTokenizer]:
    """A random CLIP whose image tower is by default that of the small model, and a tokenizer for what captions say."""
    texts = []
    for j in range(2000):
        pair = captioned(generator_for("train", seed, j), (64, 64))
        texts += [pair.true, *pair.false, *pair.phrases]
    tokenize = CLIPTokenizer.train(texts, 700, CONTEXT)
    torch.manual_seed(seed)
    return CLIP(vision, TextConfig(len(tokenize.vocab), **TEXT), PROJECTION), tokenize


@torch.inference_mode()
def held_out_pairs(model: CLIP, data: Pairs, n: int = 512) -> dict[str, float]:
    """How often an image's own caption fits better than its false ones; than all others of 64; and how often a patch's
    own phrase fits better than all others of 64 images."""
    true, first, patch, labelled, device = 0, 0, 0, 0, next(model.parameters()).device
    for start in range(0, n, 64):
        micro = data.collate([data[j] for j in range(start, start + 64)])
        own, all, patches = (x.cpu() for x in fits(model, *(x.to(device) for x in (micro.ids, micro.labels, micro.pixels))))
        true += int((own.argmax(dim=1) == 0).sum())
        first += int((all.argmax(dim=1) == torch.arange(64)).sum())
        told, said = micro.labels[micro.labels != IGNORE], micro.ids[own.numel() :]
        patch += int((said[patches.argmax(dim=1)] == said[told]).all(dim=1).sum())
        labelled += len(told)
    return {"true": round(true / n, 3), "first of 64": round(first / n, 3), "patch": round(patch / labelled, 3)}
