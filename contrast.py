"""CLIP from captioned scenes: which caption belongs to which image? (Radford et al., arXiv 2103.00020, section 2.3)

    python train.py tiny-clip --out runs/clip                                               both towers, from nothing
    python train.py tiny-captions --train language --clip runs/clip --out runs/captions     then all but its tower

A batch of B images has B captions, and for each a false one in which two things have changed places. An image must find
its own caption among all 2B, and a caption its own image among the B:

    logits (B, 2B)   scale x cosine of an image and a text; on the diagonal they belong together
    loss             mean of the cross-entropies along the rows, and down the first B columns

Captions of other scenes are told apart by a glance at the colors. The false ones are not: they make CLIP learn what is
where, and what a marker marks, which is what a language model will ask it. Most scenes are unmarked; in a few a marker
is drawn and the caption mentions it, as annotated pictures on the web have it.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset

from clip import CLIP, TextConfig, VisionConfig, preprocess
from data.batches import Example, Micro
from data.scenes import Scene, caption, generator_for, marked_scene, render, sample_scene
from overlay import draw
from tokenizer import CLIPTokenizer

P_MARKED = 0.2  # of the scenes
CONTEXT = 160  # tokens of a caption at most
VISION = VisionConfig(image_size=112, patch_size=14, width=128, layers=7, heads=4, mlp=512)
TEXT = dict(context=CONTEXT, width=128, layers=3, heads=4, mlp=512)
PROJECTION = 128


# -- scenes, and what is true and false about them -------------------------------------------------------------------


def captioned(generator: np.random.Generator, size: tuple[int, int]):
    """A marked image, its caption, and a false one."""
    things = markers = ()
    if generator.random() < P_MARKED:
        scene, things, markers = marked_scene(generator, size, n_markers=1, rich=True)
    else:
        scene = sample_scene(generator, size, rich=True)
    marked = [(scene.objects.index(thing), marker) for thing, marker in zip(things, markers)]
    image = draw(render(scene), markers)
    return image, told(scene, marked), told(*falsify(scene, marked, generator))


def told(scene: Scene, marked) -> str:
    return caption(scene, [(scene.objects[i], marker) for i, marker in marked])


def falsify(scene: Scene, marked, generator: np.random.Generator):
    """The same words, wrongly joined: the marker on another object, or two objects with their colors, or themselves,
    exchanged."""
    i, j = generator.permutation(len(scene.objects))[:2].tolist()
    if marked and generator.random() < 0.5:
        ((k, marker),) = marked
        return scene, [(j if k != j else i, marker)]
    a, b, objects = scene.objects[i], scene.objects[j], list(scene.objects)
    if a.color != b.color and a.shape != b.shape and generator.random() < 0.5:
        objects[i], objects[j] = replace(a, color=b.color), replace(b, color=a.color)
    else:
        objects[i], objects[j] = replace(a, box=b.box), replace(b, box=a.box)
    return replace(scene, objects=tuple(objects)), marked


class Pairs(Dataset):
    """Example j: an image, and the ids of its two captions, one after the other."""

    def __init__(self, tokenize: CLIPTokenizer, config: VisionConfig, seed: int, side: int, split: str = "train"):
        self.tokenize, self.config, self.seed, self.split = tokenize, config, seed, split
        self.image_size = (side, side)

    def __getitem__(self, j: int) -> Example:
        image, true, false = captioned(generator_for(self.split, self.seed, j), self.image_size)
        ids = [self.tokenize.encode(text) for text in (true, false)]
        return Example(f"scene {j}", ids, [], preprocess(image, self.config.image_size))

    def size(self, j: int) -> int:
        return 0  # all are about as long, and short

    def forget(self) -> None:
        pass

    def collate(self, examples: list[Example]) -> Micro:
        """ids (2B, T), the true captions first; labels (B, 2): each image counts as one token."""
        ids = self.tokenize.pad([e.ids[k] for k in (0, 1) for e in examples])
        return Micro([e.name for e in examples], ids, torch.ones(len(examples), 2, dtype=torch.long),
                     torch.stack([e.pixels for e in examples]))  # fmt: skip


class Contrast(nn.Module):
    """The summed loss of a batch, as a module: in place of parallel.Objective."""

    def __init__(self, model: CLIP, low: torch.dtype):
        super().__init__()
        self.model, self.low = model, low

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixels.device.type, self.low, enabled=self.low != torch.float32):
            logits = self.model(pixels, ids).float()  # (B, 2B)
        own = torch.arange(len(logits), device=logits.device)
        rows = F.cross_entropy(logits, own, reduction="sum")
        columns = F.cross_entropy(logits[:, : len(logits)].T, own, reduction="sum")
        return (rows + columns) / 2


def tiny_clip(seed: int) -> tuple[CLIP, CLIPTokenizer]:
    """A random CLIP whose image tower is that of the small model, and a tokenizer for what captions say."""
    texts = []
    for j in range(2000):
        texts += captioned(generator_for("train", seed, j), (64, 64))[1:]
    tokenize = CLIPTokenizer.train(texts, 700, CONTEXT)
    torch.manual_seed(seed)
    return CLIP(VISION, TextConfig(len(tokenize.vocab), **TEXT), PROJECTION), tokenize


@torch.inference_mode()
def held_out_pairs(model: CLIP, data: Pairs, n: int = 512) -> dict[str, float]:
    """How often an image's own caption fits better than its false one; and than all others of 64."""
    true, first = 0, 0
    for start in range(0, n, 64):
        micro = data.collate([data[j] for j in range(start, start + 64)])
        device = next(model.parameters()).device
        logits = model(micro.pixels.to(device), micro.ids.to(device)).cpu()  # (64, 128)
        own = logits[:, :64].diagonal()
        true += int((own > logits[:, 64:].diagonal()).sum())
        first += int((logits[:, :64].argmax(dim=1) == torch.arange(64)).sum())
    return {"true": round(true / n, 3), "first of 64": round(first / n, 3)}
