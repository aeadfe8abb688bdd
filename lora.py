"""LoRA: fine-tune by two thin matrices beside each large one (Hu et al., arXiv 2106.09685).

A linear layer's weight W (out, in) stays as it is; what is learned is a change of low rank, B A · alpha / rank:

    y = W x + (alpha / rank) · B (A x)       A (rank, in) random, B (out, rank) zero: at first, nothing is changed

With rank 16 the adapters of a 7B model are 40 million numbers of 7 billion, so they fit where gradients and moments of
all the others would not. An adapter is one small file, which names the model that it belongs to, and knows its weights
again; the projector, small too, is trained with it and lies in the same file.

    add(model, rank=16, alpha=32)            # freezes all else but the projector
    save(model, "runs/mine", base="7b")      # adapter.safetensors
    model, tokenizer = checkpoint.load("runs/mine")   # finds the base, adds, merges
    merge(model)                             # W += (alpha / rank) · B A: as fast as without

    python lora.py runs/mine runs/merged     # a whole checkpoint in Hugging Face's layout
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from chat import TEMPLATES
from files import write_tensors

FILE = "adapter.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all of a block's
HEAD = "lm_head"  # a target, too, where words have to be said that the base has never said


class LoRALinear(nn.Module):
    """A frozen linear layer without bias, and its change of low rank. x (…, in) -> (…, out)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        there = {"device": base.weight.device, "dtype": torch.float32}  # as small steps count
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **there))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **there))
        bound = 1 / math.sqrt(base.in_features)
        with torch.no_grad():
            self.lora_A.copy_(torch.rand(self.lora_A.shape, generator=generator, dtype=torch.float32) * 2 * bound - bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.base(x) + self.scale * change

    def merged(self) -> nn.Linear:
        """One linear layer that computes the same."""
        with torch.no_grad():
            self.base.weight += (self.scale * self.lora_B @ self.lora_A).to(self.base.weight.dtype)
        return self.base


def add(model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = TARGETS, generator=None) -> nn.Module:
    """Put a LoRALinear in the place of every target of model.llama; only these and the projector are trained then.

    generator: of the matrices A, on the CPU; None is PyTorch's global one. ValueError for a rank that is no rank, for a
    target of which the decoder has none, and for a model that is quantised or has adapters already.
    """
    if not isinstance(rank, int) or rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"rank {rank} and alpha {alpha}; expected a rank of 1 or more and an alpha above 0")
    if not targets or not {*targets} <= {*TARGETS, HEAD}:
        raise ValueError(f"targets {', '.join(targets)!r}; expected one or more of {', '.join((*TARGETS, HEAD))}")
    if model.config.quantized or adapters(model):
        what = f"is {model.config.quantized}" if model.config.quantized else "has adapters"
        raise ValueError(f"the model {what} already; expected one of 16 or 32 bits a weight, all of whose adapters are merged")
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    # While the model is whole, and nothing is added: `save` writes it down.
    model.adapted = {"digest": digest(model.llama), "tower": digest(model.vision)}
    blocks = [part for block in model.llama.layers for part in (block.self_attn, block.mlp)]
    for part in (*blocks, model.llama):
        for name in [name for name in (*TARGETS, HEAD) if name in targets and hasattr(part, name)]:  # always in this order
            setattr(part, name, LoRALinear(getattr(part, name), rank, alpha, generator))
    return model


def digest(part: nn.Module) -> str:
    """A fingerprint of decoder or image tower, the signs of some weights: the same in every precision, while another
    training flips some. "" on the meta device, where weights have no values."""
    signs = torch.cat([weight.detach().flatten()[:1024].signbit() for weight in part.parameters()])
    return "" if signs.is_meta else hashlib.sha256(np.packbits(signs.cpu().numpy()).tobytes()).hexdigest()[:12]


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


def merge(model: nn.Module) -> nn.Module:
    """Every change of low rank goes into its layer's weight, and the LoRALinears go."""
    for name, part in adapters(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, part.merged())
    return model


# -- files -----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path, base: str, state: dict | None = None) -> None:
    """Write folder/adapter.safetensors: the matrices A and B, the projector, and what they belong to. state: the
    model's, where its own tensors are shares of several processes. ValueError: there are none, or a whole model is in the
    folder, which would not be found any more."""
    import checkpoint  # which imports this file

    parts = adapters(model)
    if not parts:
        raise ValueError("the model has no adapters; expected one that lora.add was given")
    folder = checkpoint.check_target(folder, adapter=True)
    first = next(iter(parts.values()))
    rank, targets = first.lora_A.size(0), sorted({name.rpartition(".")[2] for name in parts})
    what = {"base": base, **model.adapted, "rank": rank, "alpha": first.scale * rank, "targets": targets,
            "template": model.config.template}
    state = {name: x for name, x in (state or model.state_dict()).items() if _of_adapter(name)}
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{FILE}.part"
    write_tensors({name: x.cpu().contiguous() for name, x in state.items()}, beside, {"about": json.dumps(what)})
    os.replace(beside, folder / FILE)


def _of_adapter(name: str) -> bool:
    """Is this one of the tensors that an adapter's file holds?"""
    return ".lora_" in name or name.startswith("projector.")


def about(folder: str | Path) -> dict | None:
    """base and its digests (of decoder and image tower), rank, alpha, targets, template of the adapter in a folder; None
    where there is none."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            what = json.loads(file.metadata()["about"])
        kinds = {"base": str, "rank": int, "alpha": (int, float), "targets": list}
        if not all(isinstance(what[key], kind) for key, kind in kinds.items()):
            raise TypeError
        what = {"digest": None, "tower": None, "template": None} | what  # it may be older than these are told
        if what["template"] not in (None, *TEMPLATES):
            raise KeyError(what["template"])
        return what
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} can't be read as an adapter ({type(error).__name__}); is the file whole?") from None


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the adapter of a folder, and its projector, to the model that it belongs to; strictly."""
    what, path = about(folder), Path(folder) / FILE
    if what is None:
        raise FileNotFoundError(f"no {FILE} in {folder}")
    add(model, what["rank"], what["alpha"], what["targets"])
    own = {name: x for name, x in model.state_dict().items() if _of_adapter(name)}
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    wrong = sorted(own.keys() ^ found.keys()) + [n for n in own.keys() & found.keys() if own[n].shape != found[n].shape]
    if wrong:
        raise ValueError(f"{path} doesn't fit {what['base']}: {wrong[0]}, and {len(wrong) - 1} more; expected its base")
    if any(what[part] not in (None, found) for part, found in model.adapted.items()):
        raise ValueError(f"{path} was trained on other weights than {what['base']} has now; expected those, or to train again")
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(found[name])
    return model


def main(argv: list[str]) -> None:
    import checkpoint
    from commandline import Parser

    parser = Parser(description="Merge an adapter into its base: a whole checkpoint.")
    parser.add_argument("adapter", help=f"the folder with {FILE}")
    parser.add_argument("out", help="the folder to write")
    args = parser.parse_args(argv)
    if about(args.adapter) is None:
        raise FileNotFoundError(f"no {FILE} in {args.adapter}")
    checkpoint.check_free(args.out)
    checkpoint.save(*checkpoint.load(args.adapter, "cpu", "stored"), args.out)


if __name__ == "__main__":
    from commandline import run

    sys.exit(run(main))
