"""Weights of 16 bits on a CPU: half the bytes of 32, and several ways to multiply by them, none of them always the fastest.

    widen(model)     every nn.Linear of 16 bits becomes a HalfLinear, which takes

    one row of x     a token: PyTorch's own kernel, or compiled, a loop over four rows of the weight at once; either waits
                     for memory, and what counts is how many bytes a core fetches ahead
    many rows        a prompt: float32's product, where a CPU's instructions for 16 bits are slow or missing; the weight is
                     converted block by block, into the same memory
    between          oneDNN's, in 16 bits

quant.py does the same with what it unpacks of 8 and 4 bits.
"""

import math
import threading
from itertools import repeat

import torch
import torch.nn as nn
import torch.nn.functional as F

BLOCK = 2**22  # numbers of a weight that are converted, or unpacked, at once


def is_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return "GenuineIntel" in file.read(1000)
    except OSError:  # no Linux
        return False


# Rows of a product from which float32 is faster on this CPU than a type's own instructions, if it has any: few have for
# float16, and Intel's for bfloat16, without AMX, are half as fast as float32's, so that converting pays soon.
WIDE = {torch.float16: 32}
if torch.backends.cpu.get_cpu_capability() == "AVX2" or not torch.cpu._is_avx512_bf16_supported():
    WIDE[torch.bfloat16] = 32
elif is_intel() and not torch.cpu._is_amx_tile_supported():
    WIDE[torch.bfloat16] = 256


def product_type(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a product of the rows of x is fastest."""
    rows = x.numel() // x.size(-1)
    return torch.float32 if x.device.type == "cpu" and rows >= WIDE.get(x.dtype, math.inf) else x.dtype


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """(…, in) -> (rows, in), one after the other in memory: kernels go by the stride even of a lone row."""
    return x.flatten().view(-1, x.size(-1))


class HalfLinear(nn.Linear):
    """A linear layer of 16 bits on a CPU: for one row by PyTorch's own kernel, or the compiler's, and for many in float32,
    where that is faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.numel() // x.size(-1)
        if count == 1:
            product = compiled_row_product if torch.compiler.is_compiling() else row_product
            return product(x, self.weight, self.bias)
        kind = product_type(x)
        bias = None if self.bias is None else self.bias.to(kind)
        return converting_product(x.to(kind), self.weight, bias).to(x.dtype)


def widen(model: nn.Module) -> None:
    """Every linear layer of 16 bits becomes a HalfLinear."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = HalfLinear


# -- one row -----------------------------------------------------------------------------------------------------------


switching = threading.Lock()  # oneDNN is on or off for all threads


def row_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear without oneDNN, which would have it: its product of one row reads, depending on the CPU, weights at a
    quarter to two thirds of memory's speed, PyTorch's own at half of it or nearly all."""
    with switching:
        before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        try:
            return F.linear(x, weight, bias)
        finally:
            torch.backends.mkldnn.enabled = before


def compiled_row_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear for the compiler, which makes a loop of it that reads four rows of the weight at once: a CPU fetches ahead for
    each, so that two cores read half as much again as of one row after the other."""
    row = x.flatten().float()
    y = torch.cat([(part.float() * row).sum(dim=1) for part in weight.chunk(4)])
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], -1)


# -- many rows ---------------------------------------------------------------------------------------------------------


class Scratch(threading.local):
    """Room for a block of a weight in another type, the same each time. New memory a CPU's system has to clear first, page by
    page, and takes longer for it than it takes to fill."""

    memory = None

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if self.memory is None or self.memory.nbytes < size:
            self.memory = torch.empty(max(size, 4 * BLOCK), dtype=torch.uint8, device="cpu")
        return self.memory[:size].view(dtype).view(shape)


scratch = Scratch()


def reuses_memory(x: torch.Tensor) -> bool:
    """May a product with x overwrite the last one's weights? Not where gradients, or a compiler, still want them."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def converting_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear with a weight of another type, which becomes x's; on a CPU block by block of its outputs."""
    if weight.dtype == x.dtype or not reuses_memory(x):
        return F.linear(x, weight.to(x.dtype), bias)
    parts = weight.split(max(1, BLOCK // weight.size(1)))
    biases = repeat(None) if bias is None else bias.split(len(parts[0]))
    return joined([F.linear(x, scratch.room(w.shape, x.dtype).copy_(w), b) for w, b in zip(parts, biases)])


def joined(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Blocks of outputs, (…, some) each -> all of them, (…, out)."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
