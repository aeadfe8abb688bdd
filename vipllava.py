"""ViP-LLaVA: a picture with markers drawn on it, joined to a language model (Cai et al., arXiv 2312.00784, section 3).

The whole method is in this file's few lines: CLIP looks at the *marked* image, features of five of its layers are
joined, a small projector turns each patch into something that reads like a word, and LLaMA answers.

    pixels   (I, 3, S, S)      the marked images of a batch, in the order in which the prompts mention them
    features (I, N, 5 · Cv)    vision(pixels, feature_layers), a clip.CLIPVision
    patches  (I, N, C)         projector: LayerNorm -> Linear -> GELU -> Linear
    ids      (B, T)            prompts; chat.IMAGE, which stands for an image, repeated for each of its N patches
    embeds   (B, T, C)         splice: word embeddings, and patches where IMAGE stood
    logits   (B, V)            llama.Llama

Nothing tells the model where a marker is, except the marker's own pixels.

Pitfalls
  * The projector's GELU is the exact one (erf); CLIP's is quick_gelu.
  * Image patches take ordinary positions and are masked causally, like words.
  * Embedding rows from `image_token_id` on, the image's own among them, were added when a checkpoint was converted;
    nobody trained them, so nothing here ever samples them.

    model, tokenizer = checkpoint.load("tiny")
    for (token,) in generate(model, [ids], pixels, max_new_tokens=64, stop_ids={tokenizer.eos}): ...     # generate.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from chat import IMAGE
from clip import CLIPVision, VisionConfig
from llama import Llama, LlamaConfig

IGNORE = -100  # a label that is not trained


@dataclass(frozen=True)
class ViPLLaVAConfig:
    vision: VisionConfig = VisionConfig()
    text: LlamaConfig = LlamaConfig(vocab_size=32064)
    feature_layers: tuple[int, ...] = (-2, -5, -8, -11, 6)  # hidden states of CLIP, see clip.py
    projector_eps: float = 1e-5
    image_token_id: int = 32000  # ids below it are words
    template: str = "llava_v1"  # the conversation format that the weights were trained with, see chat.py
    quantized: str = ""  # "int8" or "int4": how the decoder's weights are kept, see quant.py

    @property
    def depth(self) -> int:
        """How many of CLIP's blocks run: up to the deepest layer that is looked at."""
        return max(i % (self.vision.layers + 1) for i in self.feature_layers)  # -1 is the last of L + 1 states


class Projector(nn.Module):
    """Features of several CLIP layers -> embeddings of the language model, patch by patch."""

    def __init__(self, config: ViPLLaVAConfig):
        super().__init__()
        joined = len(config.feature_layers) * config.vision.width
        self.layernorm = nn.LayerNorm(joined, eps=config.projector_eps)  # the layers' scales differ widely
        self.linear_1 = nn.Linear(joined, config.text.width)
        self.linear_2 = nn.Linear(config.text.width, config.text.width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features (I, N, L · Cv) -> patches (I, N, C)."""
        return self.linear_2(F.gelu(self.linear_1(self.layernorm(features))))


class ViPLLaVA(nn.Module):
    def __init__(self, config: ViPLLaVAConfig):
        super().__init__()
        self.config = config
        self.vision = CLIPVision(config.vision)
        self.projector = Projector(config)
        self.llama = Llama(config.text)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (I, 3, S, S) -> patches (I, N, C)."""
        return self.projector(self.vision(pixels, self.config.feature_layers))

    def splice(self, ids: torch.Tensor, patches: torch.Tensor | None) -> torch.Tensor:
        """ids (B, T) with N times IMAGE an image, patches (I, N, C) -> embeds (B, T, C).

        ids may be on the CPU, where to check them makes no GPU wait. Raises ValueError for an id that is no word, and
        when places and patches are not equally many.
        """
        places = ids == IMAGE  # (B, T)
        words = ids.masked_fill(places, 0)  # (B, T), the places to be overwritten
        if words.min() < 0 or words.max() >= self.config.text.vocab_size:
            rows = self.config.text.vocab_size
            raise ValueError(f"ids of {int(words.min())} … {int(words.max())}; expected 0 … {rows - 1}, or IMAGE")
        given = 0 if patches is None else patches.size(0) * patches.size(1)
        if places.sum() != given:
            raise ValueError(f"the prompts hold {int(places.sum())} image places, the images give {given} patches")
        embeds = self.llama.embed_tokens(words.to(self.llama.embed_tokens.weight.device))  # (B, T, C)
        if patches is None:
            return embeds
        return embeds.masked_scatter(places[:, :, None].to(embeds.device), patches.to(embeds.dtype))

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor | None = None, unseen: torch.Tensor | None = None):
        """ids (B, T), padded on the right if at all, and pixels (I, 3, S, S) -> hidden (B, T, C) for llama.lm_head.

        unseen: more images, which are encoded and change nothing (parallel.py says what for).
        """
        embeds = self.splice(ids, None if pixels is None else self.encode_images(pixels))
        if unseen is not None:
            embeds = embeds + 0.0 * self.encode_images(unseen).sum()
        return self.llama(embeds)

    def loss(self, ids: torch.Tensor, labels: torch.Tensor, pixels=None, unseen=None, reduction="mean") -> torch.Tensor:
        """Cross-entropy of the next token over the labels (B, T) that are not IGNORE, their "mean" or "sum".

        The head, the largest matrix of a small model, is applied only where a label is trained. ValueError: none is.
        """
        hidden = self(ids, pixels, unseen)[:, :-1]  # the state at t predicts the label at t + 1
        target = labels[:, 1:]
        trained = target != IGNORE
        if not trained.any():
            raise ValueError(f"none of the labels {tuple(labels.shape)} is trained: all, but perhaps the first, are {IGNORE}")
        return F.cross_entropy(self.llama.lm_head(hidden[trained]).float(), target[trained], reduction=reduction)


# -- batches ---------------------------------------------------------------------------------------------------------


def expand(ids: Sequence[int], patches: int) -> list[int]:
    """One IMAGE for an image -> one IMAGE for each of its patches."""
    return [i for token in ids for i in ([token] * patches if token == IMAGE else [token])]


def pad(rows: Sequence[Sequence[int]], fill: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length -> (B, T), filled up on the "left" or "right"; and where each row starts, (B,)."""
    assert side in ("left", "right"), side
    longest = max(map(len, rows))
    start = [longest - len(row) if side == "left" else 0 for row in rows]
    table = torch.full((len(rows), longest), fill)
    for row, s, out in zip(rows, start, table):
        out[s : s + len(row)] = torch.tensor(row)
    return table, torch.tensor(start)
