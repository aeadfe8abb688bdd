"""Weight files: found in a folder, mapped, checked, and read tensor by tensor under our names.

    files = weight_files(folder)             # one .safetensors or .bin, or all that an index names
    Part(files).shapes                       # our names -> shapes; nothing is read yet
    Part(files).read(device, dtype)          # one tensor after the other, converted

A mapped file's pages come from the disk when they are first touched, and count as memory from then on: so where tensors
stay as they are, they *are* the file; where they are converted, a file is let go of bit by bit; and a GPU gets them by
way of two small buffers, of which one is filled while the other travels.
"""

import itertools
import pickle
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import quant
from layouts import BUFFERS, rename, split_fused
from tokenizer import read_json

SMALL = 2**23  # bytes that are not worth to open a file anew for


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files with a folder's weights: safetensors before .bin, one file before shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return (folder / name,)
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder / f"{name}.index.json")
    hint = "; mm_projector.bin alone is for load_parts" if (folder / "mm_projector.bin").is_file() else ""
    raise FileNotFoundError(f"no weights in {folder}; expected model.safetensors, pytorch_model.bin or shards{hint}")


def _shards(index: Path) -> tuple[Path, ...]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f'{index} has no "weight_map" of tensors to files')
    shards = {file: index.parent / Path(file).name for file in sorted(set(places.values()))}
    held = {file: open_file(path).keys() for file, path in shards.items()}
    for name, file in places.items():
        if name not in held[file]:
            raise ValueError(f"{shards[file]} does not hold {name}, which {index.name} looks for there")
    return tuple(shards.values())


def open_file(path: Path, some: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .bin file by its own names for them, or some of them, mapped, not yet read."""
    if not path.is_file():
        raise FileNotFoundError(f"the weights {path} are missing")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in (file.keys() if some is None else some)}
        # What PyTorch wrote before version 1.6 is no zip file and can't be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} can't be read as weights ({reason}); is the file whole?") from None
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise ValueError(f"{path} holds a {type(tensors).__name__}; expected a dict of tensors")
    return {name: x.detach() for name, x in tensors.items() if some is None or name in some}


@dataclass(frozen=True)
class Part:
    """The files of one checkpoint; what our names begin with that is not wanted from them; how they are quantised."""

    files: tuple[Path, ...]
    drop: tuple[str, ...] = ()
    scheme: str = ""

    def open(self, file: Path, some: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """Our names -> the tensors in `file`, or those that it calls `some`, mapped, not yet read."""
        tensors = {}
        for theirs, mapped in open_file(file, some).items():
            for name, x in split_fused(rename(theirs), mapped):
                if theirs.endswith(BUFFERS) or name.startswith(self.drop):
                    continue
                if name in tensors:
                    raise ValueError(f"{file} holds {name} twice, the second time as {theirs}")
                if not x.is_floating_point() and not self.quantized(name):
                    raise ValueError(f"{file}: {theirs} is {x.dtype}; expected floating point, not quantised weights")
                tensors[name] = x
        return tensors

    def quantized(self, name: str) -> bool:
        return bool(self.scheme and quant.TARGET.fullmatch(name))

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of the files', on the meta device."""
        found = {}
        for file in self.files:
            tensors = self.open(file)
            if twice := found.keys() & tensors.keys():
                raise ValueError(f"{file} holds {min(twice)}, which another file holds too")
            found |= {name: torch.empty_like(x, device="meta") for name, x in tensors.items()}
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(x.shape) for name, x in self.tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor that is not quantised, and in a checkpoint of one piece of all."""
        return next(x.dtype for name, x in self.tensors.items() if not self.quantized(name))

    def read(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor as `dtype` (what is quantised: as it is) on `device`.

        Pages of a mapped file are memory in use once they are read. Where tensors are converted, the file is opened
        anew for every 32nd part of it, which lets go of those before (but for a page or so of each tensor).
        """
        wanted = {name: x.dtype if self.quantized(name) else dtype for name, x in self.tensors.items()}
        as_is = device.type == "cpu" and all(x.dtype == wanted[name] for name, x in self.tensors.items())
        buffers = itertools.cycle(pinned_buffers()) if device.type == "cuda" else None
        for file in self.files:
            sizes = {theirs: x.nbytes for theirs, x in open_file(file).items()}
            for some in [sizes] if as_is else groups(sizes, max(sum(sizes.values()) // 32, SMALL)):
                tensors = self.open(file, some)
                for name in list(tensors):
                    x = tensors[name]
                    x = carry(x, device, buffers) if buffers else x
                    yield name, (x if as_is else x.to(device, wanted[name], copy=not buffers)).contiguous()
                x = tensors = None  # the old mapping goes before the new one comes


def groups(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """The names, one after the other, in groups that end once they have reached the limit."""
    group, size = [], 0
    for name, more in sizes.items():
        group.append(name)
        size += more
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group


def pinned_buffers(size: int = 2**26) -> list[tuple[torch.Tensor, torch.cuda.Event]]:
    """Memory that a GPU fetches from by itself, and when it last had done so."""
    return [(torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]


def carry(x: torch.Tensor, device: torch.device, buffers: Iterator) -> torch.Tensor:
    """A mapped tensor, onto a GPU: all cores read its file into one buffer while the other's bytes travel. Straight from
    the file, one would wait for each page."""
    there = torch.empty(x.shape, dtype=x.dtype, device=device)
    source, target = (t.reshape(-1).view(torch.uint8) for t in (x, there))
    while source.numel():
        buffer, free = next(buffers)
        n = min(len(buffer), len(source))
        free.synchronize()
        buffer[:n].copy_(source[:n])
        target[:n].copy_(buffer[:n], non_blocking=True)
        free.record()
        source, target = source[n:], target[n:]
    return there
