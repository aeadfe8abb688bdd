"""Weights in 8 or 4 bits: a decoder that reads half or a quarter as many bytes for a token.

Each token that is generated needs every weight once, and fetching them is what takes the time, as far as kernels keep up
(README says how far). So only they are made smaller; what is computed with stays in 16 or 32 bits ("weight-only"):

    int8   w ≈ scale · q            q = -127 … 127, a scale for each row (each output)
    int4   w ≈ scale · q + low      q = 0 … 15, a scale and a lowest value for each GROUP of a row's inputs

Quantised are the decoder's matrices, its head included; CLIP, the projector, word embeddings and norms stay.

    model, tokenizer = checkpoint.load("7b", quantize="int8")      # as they are read: 16 bits are never in memory whole
    python quant.py 7b runs/7b-int4 --bits 4                       # once; then --model runs/7b-int4

Which way is the fastest depends on the device and on how many rows x has: one for each new token, all of the prompt's.
For int8 a CPU that has instructions for it multiplies whole numbers; another one has PyTorch's kernel for few rows, and
unpacks the weights for many, block by block (see halves.py). On a GPU torch.compile joins unpacking and product into
one. For int4 both have PyTorch's kernels; they are slow for many rows, for which the weights are unpacked, too.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from halves import BLOCK, converting_product, joined, product_type, reuses_memory, rows_of, scratch

GROUP = 128  # inputs that share a scale, in 4 bits
# With fewer rows of x than so many, PyTorch's kernel is faster than to unpack the weights and multiply:
FEW = 32  # int8 on a CPU, int4 on a GPU
SOME = 128  # int4 on a CPU
TARGET = re.compile(r"llama\.(lm_head|layers\.\d+\.(self_attn|mlp)\.\w+_proj)\.(weight|scale|low)")


class Int8Linear(nn.Module):
    """x (…, in) -> (…, out), by whole numbers and a scale for each row."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(outputs))
        self.packed = False

    @staticmethod
    def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """(out, in) -> the buffers."""
        low, high = weight.aminmax(dim=1)
        scale = torch.maximum(-low, high).float() / 127  # (out,)
        q = weight.to(torch.float32, copy=True).mul_(1 / scale.clamp(min=1e-30)[:, None]).round_()
        return {"weight": q.to(torch.int8), "scale": scale}

    def pack(self) -> None:
        """Lay the weights out as this CPU's kernel wants them: in blocks, or where a multiple of 64 bytes begins."""
        if self.weight.device.type == "cpu":
            self.packed = multiplies_whole_numbers()
            if self.packed:
                self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)
            elif self.weight.data_ptr() % 64:  # a file is mapped to any place
                self.weight = self.weight.clone()

    def prepare(self, x: torch.Tensor) -> "torch.Tensor | Fixed16":
        """What `forward` takes instead of x, too, so that layers with the same input need not each make it anew."""
        return fixed16(x) if self.packed else x

    def forward(self, x: "torch.Tensor | Fixed16") -> torch.Tensor:
        if self.packed:
            x = x if isinstance(x, Fixed16) else fixed16(x)
            product = opaque_fixed16_product if torch.compiler.is_compiling() else fixed16_product
            return product(x.q, x.step, self.weight, self.scale).to(x.dtype).unflatten(0, x.shape)
        rows = rows_of(x)
        if x.device.type == "cpu" and len(rows) < FEW and x.size(-1) % 32 == 0:  # reads beyond the end of others
            product = opaque_int8_product if torch.compiler.is_compiling() else int8_product
            y = product(rows, self.weight, self.scale)
        else:
            kind = product_type(x)
            if kind is torch.float16:  # which sums of whole numbers up to 127 soon exceed
                kind = torch.bfloat16
            y = converting_product(rows.to(kind), self.weight) * self.scale.to(kind)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class Fixed16(NamedTuple):
    """x (…, in) in whole numbers of 16 bits, as two of 8 bits without a sign: 256 (high - 128) + (low - 128) steps."""

    q: torch.Tensor  # (2 rows, in), all the high ones first
    step: torch.Tensor  # (rows, 1)
    dtype: torch.dtype  # x's
    shape: tuple[int, ...]  # x's, but for its last


def fixed16(x: torch.Tensor) -> Fixed16:
    """A row's largest number becomes 32512 = 127 · 256 steps. 257 · 128 is 128 in both bytes, and 0.5 rounds."""
    rows = rows_of(x).float()
    step = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True).clamp_(min=1e-30) / 32512
    bits = (rows / step).add_(257 * 128 + 0.5).to(torch.int32)  # 384 … 65408
    low, high = bits.view(torch.uint8).unflatten(1, (-1, 4)).unbind(2)[:2]
    return Fixed16(torch.cat([high, low]), step, x.dtype, x.shape[:-1])


def fixed16_product(q: torch.Tensor, step: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q (2 rows, in), step (rows, 1) -> (rows, out) in float32. The only sums are of whole numbers, and exact."""
    zero = torch.zeros_like(scale, dtype=torch.int32)
    y = torch.ops.onednn.qlinear_pointwise(q, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
    high, low = y.view(2, len(step), -1)
    return low.add_(high, alpha=256).mul_(step)


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (rows, in) -> (rows, out) in bfloat16, by PyTorch's kernel for 8 bits."""
    return torch._weight_int8pack_mm(x.bfloat16(), weight, scale.bfloat16())


# torch.compile does not look into an operator: in one it would find some that it knows from other models' patterns only,
# in the other it fails over a scale that is computed.
opaque_fixed16_product = torch.library.custom_op("vipllava::fixed16_product", fixed16_product, mutates_args=())
opaque_fixed16_product.register_fake(lambda q, step, packed, scale: step.new_empty(len(step), len(scale)))
opaque_int8_product = torch.library.custom_op("vipllava::int8_product", int8_product, mutates_args=())
opaque_int8_product.register_fake(lambda x, weight, scale: x.new_empty(len(x), len(scale), dtype=torch.bfloat16))


@cache
def multiplies_whole_numbers() -> bool:
    """Has this CPU instructions that add products of 8 bits in 32? With older ones sums are cut off at 16."""
    x = torch.full((1, 512), 32512.0, dtype=torch.float32, device="cpu")
    weight, ones = torch.full((512, 512), 127, dtype=torch.int8, device="cpu"), torch.ones(512, dtype=torch.float32, device="cpu")
    try:
        q, step, *_ = fixed16(x)
        y = fixed16_product(q, step, torch.ops.onednn.qlinear_prepack(weight, None), ones)
    except (AttributeError, RuntimeError):  # PyTorch was built without oneDNN
        return False
    return bool((y == 512 * 127 * 32512).all())


class Int4Linear(nn.Module):
    """x (…, in) -> (…, out), by two numbers a byte, and a scale and a lowest value for each group of inputs."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(outputs, inputs // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(outputs, inputs // GROUP))
        self.register_buffer("low", torch.empty(outputs, inputs // GROUP))
        self.packed, self.kernel, self.unlayout = False, None, None  # see `pack`

    @staticmethod
    def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """(out, in) -> the buffers. ValueError: the inputs are no whole number of groups."""
        if weight.size(1) % GROUP:
            raise ValueError(f"a matrix of {weight.size(1)} inputs in 4 bits; expected a multiple of {GROUP}")
        groups = weight.float().unflatten(1, (-1, GROUP))  # (out, groups, GROUP)
        low, high = groups.aminmax(dim=2)
        scale = ((high - low) / 15).to(torch.bfloat16).float()  # kernels take 16 bits: q is made for what they see
        low = low.to(torch.bfloat16).float()
        q = ((groups - low[..., None]) / scale.clamp(min=1e-30)[..., None]).round().clamp(0, 15).to(torch.uint8)
        first, second = q.flatten(1).unflatten(1, (-1, 2)).unbind(2)
        return {"weight": first | second << 4, "scale": scale, "low": low}

    def numbers(self) -> torch.Tensor:
        """(out, in), 0 … 15."""
        return torch.stack([self.weight & 15, self.weight >> 4], dim=2).flatten(1)

    def pack(self) -> None:
        """Lay the weights out as this device's kernel wants them, where it has one for this shape."""
        outputs = self.scale.size(0)
        q, device = self.numbers(), self.weight.device.type
        if device == "cpu" and outputs % 64 == 0:
            self.kernel, self.unlayout = torch._weight_int4pack_mm_for_cpu, cpu_layout()
            self.weight = torch._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        elif device == "cuda" and outputs % 8 == 0:
            self.kernel, self.unlayout = torch._weight_int4pack_mm, gpu_layout(self.weight.device)
            self.weight = pack_for_gpu(q)
        else:
            return
        self.packed = True
        middle = self.low + 8 * self.scale  # kernels count from the middle
        self.scale = torch.stack([self.scale.T, middle.T], dim=2).bfloat16().contiguous()  # (groups, out, 2)
        self.low = None

    def unpacked(self, kind: torch.dtype, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What this device's layout of some outputs stands for, (in, out)."""
        q = self.unlayout(weight).unflatten(0, (-1, GROUP))  # (groups, GROUP, out)
        there = scratch.room(q.shape, kind) if reuses_memory(weight) else None
        q = q.to(kind) if there is None else there.copy_(q)
        scale, middle = scale.to(kind)[:, None].unbind(3)  # (groups, 1, out)
        return torch.addcmul(middle - 8 * scale, q, scale, out=there).flatten(0, 1)

    def unpacking_product(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, in) -> (rows, out); on a CPU block by block of its outputs."""
        kind, (groups, outputs, _) = product_type(x), self.scale.shape
        x = x.to(kind)
        tall = outputs // len(self.weight)  # outputs of a tile
        n = max(64, BLOCK // (groups * GROUP) // 64 * 64) if x.device.type == "cpu" else outputs
        blocks = zip(self.weight.split(n // tall), self.scale.split(n, dim=1))
        return joined([x @ self.unpacked(kind, *block) for block in blocks])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            rows = rows_of(x)
            if self.unlayout and len(rows) >= (SOME if x.device.type == "cpu" else FEW):
                y = self.unpacking_product(rows)
            else:
                y = self.kernel(rows.bfloat16(), self.weight, GROUP, self.scale)
            return y.to(x.dtype).unflatten(0, x.shape[:-1])
        groups = self.numbers().unflatten(1, (-1, GROUP)) * self.scale[..., None] + self.low[..., None]
        return F.linear(x, groups.flatten(1).to(x.dtype))


# -- how kernels want 4 bits -----------------------------------------------------------------------------------------


def from_blocks(packed: torch.Tensor, block: int) -> torch.Tensor:
    """Numbers (in, out) from a CPU's layout: blocks of outputs, whose first half lies in the lower four bits."""
    pairs = packed.view(-1, 2 * packed.size(1), block // 2).transpose(0, 1)  # (in, blocks, block / 2)
    return torch.cat([pairs & 15, pairs >> 4], dim=2).flatten(1)


def from_tiles(packed: torch.Tensor) -> torch.Tensor:
    """Numbers (in, out) from a GPU's layout: tiles of 8 outputs and 128 inputs, as its matrix units take them. Each of 32
    threads (output, c) has four words of eight numbers (a, h, b), of inputs 32 word + 16 h + 8 b + 2 c + a."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    numbers = packed.unflatten(2, (8, 4))[..., None] >> shifts & 15  # (tiles, tiles, output, c, word, number)
    tiles = numbers.unflatten(5, (2, 2, 2)).permute(1, 4, 6, 7, 3, 5, 0, 2)  # inputs in their order, then outputs
    return tiles.reshape(128 * packed.size(1), 8 * packed.size(0))


def pack_for_gpu(q: torch.Tensor) -> torch.Tensor:
    """Numbers (out, in) -> (out / 8, in / 128, 32, 4)"""
    return torch._convert_weight_to_int4pack(q[:, 1::2] | q[:, ::2] << 4, 8)


@cache
def cpu_layout() -> Callable | None:
    """Which of them undoes this CPU's packing; None: it is another one."""
    q = torch.arange(64 * 32, device="cpu").remainder(13).view(64, 32)
    packed = torch._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    known = (partial(from_blocks, block=block) for block in (64, 32))
    return next((back for back in known if torch.equal(back(packed), q.T)), None)


@cache
def gpu_layout(device: torch.device) -> Callable | None:
    """The same for a GPU's packing."""
    q = torch.arange(16 * 256, device=device).remainder(13).view(16, 256).to(torch.uint8)
    return from_tiles if torch.equal(from_tiles(pack_for_gpu(q)), q.T) else None


SCHEMES = {"int8": Int8Linear, "int4": Int4Linear}
WHOLE = {"int8": torch.int8, "int4": torch.uint8}  # what their weights are in a file


def quantize(model: nn.Module, scheme: str) -> nn.Module:
    """A model's own weights, made smaller."""
    tensors = dict(compress(model.state_dict().items(), scheme))
    swap(model, scheme).load_state_dict(tensors, assign=True)
    return model


def compress(tensors: Iterable[tuple[str, torch.Tensor]], scheme: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a model -> those of the same model after `swap`, one by one."""
    for name, x in tensors:
        if TARGET.fullmatch(name):
            stem = name.removesuffix("weight")
            yield from ((stem + part, y) for part, y in SCHEMES[scheme].compress(x).items())
        else:
            yield name, x


def swap(model: nn.Module, scheme: str) -> nn.Module:
    """Layers of the scheme, without values yet, in the place of the decoder's. ValueError: there is no such scheme,
    they are some already, or have an adapter."""
    if adapters := [name for name, _ in model.named_parameters() if ".lora_" in name]:
        raise ValueError(f"the model has an adapter, {adapters[0]}; expected lora.merge before")
    if scheme not in SCHEMES or model.config.quantized:
        already = f" of a model that is {model.config.quantized} already" * bool(model.config.quantized)
        raise ValueError(f"quantize is {scheme!r}{already}; expected {' or '.join(SCHEMES)}, once")
    model.config = replace(model.config, quantized=scheme)
    for name in [name for name in model.state_dict() if TARGET.fullmatch(name)]:
        parent, child = name.removesuffix(".weight").rsplit(".", 1)
        old = model.get_submodule(f"{parent}.{child}")
        with torch.device("meta"):
            setattr(model.get_submodule(parent), child, SCHEMES[scheme](old.in_features, old.out_features))
    return model


def pack(model: nn.Module) -> nn.Module:
    """The last step before use: the weights as this device's kernels want them. Layers that are laid out anew for it
    (`packed`) can't be saved any more, nor copied or cast."""
    for layer in model.modules():
        if isinstance(layer, tuple(SCHEMES.values())):
            layer.pack()
    return model


def main(argv: list[str]) -> None:
    import checkpoint
    from commandline import Parser

    parser = Parser(description="Write a checkpoint whose decoder has 8 or 4 bits a weight.")
    parser.add_argument("model", help="a name or folder")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of a weight (8)")
    args = parser.parse_args(argv)
    checkpoint.check_free(args.out)
    model, tokenizer = checkpoint.load(args.model, "cpu", "stored", quantize=f"int{args.bits}", ready=False)
    checkpoint.save(model, tokenizer, args.out)


if __name__ == "__main__":
    from commandline import run

    sys.exit(run(main))
