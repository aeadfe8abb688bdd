"""One loss over several processes and micro-batches: that of one process with all the samples.

    loss of a step = sum of the answers' cross-entropies / number of their tokens, over all of them

A mean of means would weigh a sample by its company, as answers differ in length. So everybody sums, and divides by the
tokens of all. torchrun starts the processes; PyTorch's DDP or FSDP2 adds their gradients up.

    place = find_place(None)                                       # this process among the others, and its device
    objective = spread(Objective(model, torch.float32, place.world > 1), "ddp", place)
    loss, tokens = gradients(objective, micros, place)             # then clip, and let the optimizer step
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from commandline import check_device
from data.batches import Micro
from vipllava import IGNORE, ViPLLaVA


@dataclass(frozen=True)
class Place:
    """This process among `world` of them, and its device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def sum(self, value: float) -> float:
        """The sum over all processes."""
        if self.world == 1:
            return value
        x = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.item()

    def max(self, value: int) -> int:
        """The largest over all processes."""
        if self.world == 1:
            return value
        x = torch.tensor(value, device=self.device)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return int(x)


def find_place(device: str | None) -> Place:
    """What torchrun says in the environment; without it, the one process."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Place(check_device(device))
    if device and device.startswith("cuda:"):
        raise ValueError(f"--device is {device} for {world} processes; expected cuda: each takes the GPU of its own number")
    if device == "cuda" or device is None and torch.cuda.is_available():
        chosen = check_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    else:
        chosen = check_device(device)
    if chosen.type == "mps":
        raise ValueError(f"--device is mps for {world} processes; expected cpu or cuda, on which they can add up")
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Place(chosen, dist.get_rank(), world)


class _WideAttention(TorchFunctionMode):
    """Attention in 32 bits: on a CPU its gradient takes three times as long in 16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*(x.float() for x in args), **(kwargs or {})).to(args[-1].dtype)


@contextlib.contextmanager
def lowered(device: torch.device, low: torch.dtype) -> Iterator[None]:
    """What is computed within is computed in `low`, where that is fast and harmless."""
    if low == torch.float32:
        yield
        return
    with torch.autocast(device.type, low), _WideAttention() if device.type == "cpu" else contextlib.nullcontext():
        yield


class Objective(nn.Module):
    """The summed loss of a micro-batch, as one module whose forward DDP and FSDP can wrap.

    Both wait for every weight's gradient from every process, and FSDP for all to gather and give back the blocks' weights
    in one order. So of several processes one whose micro-batch has no image sends an empty one through CLIP and projector,
    and one that has no sample left sends two tokens of nothing with it through the decoder, which count 0.
    """

    def __init__(self, model: ViPLLaVA, low: torch.dtype, several: bool):
        super().__init__()
        self.model, self.low, self.several = model, low, several

    def forward(self, ids, labels, pixels) -> torch.Tensor:
        side, device = self.model.config.vision.image_size, self.model.projector.linear_1.weight.device
        counts = 1.0
        if ids is None:
            ids = labels = torch.zeros(1, 2, dtype=torch.long, device=device)
            counts = 0.0
        empty = torch.zeros(1, 3, side, side, device=device) if pixels is None and self.several else None
        with lowered(device, self.low):
            return counts * self.model.loss(ids, labels, pixels, empty, reduction="sum")


def spread(objective: Objective, parallel: str, place: Place) -> nn.Module:
    """The same, for several processes: whole copies (DDP), or each a share of every weight (FSDP2)."""
    if parallel == "fsdp":
        mesh = init_device_mesh(place.device.type, (place.world,))
        kept = objective.low if objective.low != torch.float32 else None
        shard = functools.partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(kept, torch.float32))
        model = objective.model
        used = model.vision.layers[: model.config.depth]  # with several micro-batches FSDP2 fails over a block that never runs
        for block in (*model.llama.layers, *used):
            shard(block)
        return shard(objective)
    if place.world > 1:
        return DistributedDataParallel(objective, device_ids=[place.device] if place.device.type == "cuda" else None)
    return objective


def gradients(objective: nn.Module, micros: list[Micro], place: Place) -> tuple[float, int]:
    """Backward through the micro-batches of a step -> the mean loss of all its answer tokens, and their number."""
    tokens = place.sum(sum(int((m.labels[:, 1:] != IGNORE).sum()) for m in micros))
    if not tokens:
        return math.nan, 0
    turns, total = place.max(len(micros)), 0.0
    for k in range(turns):
        micro = micros[k] if k < len(micros) else Micro([], None, None, None)
        inputs = [None if x is None else x.to(place.device, non_blocking=True) for x in (micro.ids, micro.labels, micro.pixels)]
        with _synchronised(objective, k == turns - 1):
            loss = objective(*inputs) * (place.world / tokens)  # both DDP and FSDP take the mean over processes
            if loss.requires_grad:  # or there is no image, and only the projector learns
                loss.backward()
        total += loss.detach()
    for p in objective.parameters():  # of a step without images; several processes exchange zeros then, and Adam moves on
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    return place.sum(float(total)) / place.world, int(tokens)


@contextlib.contextmanager
def _synchronised(objective: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged after the last micro-batch only."""
    if isinstance(objective, DistributedDataParallel) and not last:
        with objective.no_sync():
            yield
        return
    if hasattr(objective, "set_requires_gradient_sync"):
        objective.set_requires_gradient_sync(last)
    yield
