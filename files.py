"""Weight files: found in a folder, mapped, checked, and read tensor by tensor under our names.

    files = weight_files(folder)             # one .safetensors or .bin, or all that an index names
    Part(files).shapes                       # our names -> shapes; nothing is read yet
    Part(files).read(device, dtype)          # one tensor after the other, converted

A mapped file's pages come from the disk when they are first touched, and count as memory from then on: so where tensors
stay as they are, they *are* the file; where they are converted, a file is let go of bit by bit; and for a GPU
threads read a .safetensors file into two small buffers, of which one is filled while the other travels: no page is touched.
"""

import itertools
import json
import pickle
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
        advice = isinstance(error, pickle.UnpicklingError)  # PyTorch's, to read it as a program
        reason = "it is no dict of tensors" if advice else str(error).strip().split("\n")[0]
        raise ValueError(f"{path} can't be read as weights ({reason}); is the file whole?") from None
    if not isinstance(tensors, dict) or not all(map(_is_plain, tensors.keys(), tensors.values())):
        raise ValueError(f"{path} holds a {type(tensors).__name__}; expected a dict of names and dense tensors")
    return {name: x.detach() for name, x in tensors.items() if some is None or name in some}


def _is_plain(name, x) -> bool:
    return isinstance(name, str) and isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta


def checksum(path: Path) -> int:
    """Of all of a file's bytes: another one means other bytes."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            total = zlib.crc32(block, total)
    return total


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """A .safetensors file that anybody may read. OSError: it can't be written; what there is of it goes."""
    try:
        save_file(tensors, path, about or {"format": "pt"})
        path.chmod(0o644)  # safetensors lets nobody but its owner read it
    except (SafetensorError, OSError, RuntimeError) as error:  # a RuntimeError: two of the tensors share memory
        path.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written ({(str(error).strip() or type(error).__name__).splitlines()[0]})") from None


@dataclass(frozen=True)
class Part:
    """The files of one checkpoint; what our names begin with that is not wanted from them; how they are quantised."""

    files: tuple[Path, ...]
    drop: tuple[str, ...] = ()
    scheme: str = ""

    @cached_property
    def _stamps(self) -> dict[Path, tuple[int, ...]]:
        return {file: stamp(file) for file in self.files}

    def open(self, file: Path, some: Collection[str] | None = None, how=open_file) -> dict[str, torch.Tensor]:
        """Our names -> the tensors in `file`, or those that it calls `some`; mapped, not yet read, where `how` is open_file."""
        found, tensors = how(file, some), {}
        if stamp(file) != self._stamps[file]:
            raise ValueError(f"{file} was replaced while it was read; expected it to stay")
        for theirs, mapped in found.items():
            for name, x in split_fused(rename(theirs), mapped):
                if theirs.endswith(BUFFERS) or name.startswith(self.drop):
                    continue
                if name in tensors:
                    raise ValueError(f"{file} holds {name} twice, the second time as {theirs}")
                if self.quantized(name):
                    wanted = quant.WHOLE[self.scheme] if name.endswith("weight") else torch.float32
                    if x.dtype != wanted:
                        raise ValueError(f"{file}: {theirs} is {x.dtype}; expected {wanted}")
                elif not x.is_floating_point():
                    raise ValueError(f"{file}: {theirs} is {x.dtype}; expected floating point, not quantised weights")
                tensors[name] = x
        return tensors

    def quantized(self, name: str) -> bool:
        return bool(self.scheme and quant.TARGET.fullmatch(name))

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of the files', mapped, not yet read."""
        found = {}
        for file in self._stamps:  # which are taken before the first is opened
            tensors = self.open(file)
            if twice := found.keys() & tensors.keys():
                raise ValueError(f"{file} holds {min(twice)}, which another file holds too")
            found |= tensors
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(x.shape) for name, x in self.tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """That of the first tensor that is not quantised."""
        return next(x.dtype for name, x in self.tensors.items() if not self.quantized(name))

    def read(self, device: torch.device, dtype: torch.dtype, passing=False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor as `dtype` (what is quantised: as it is) on `device`. passing: most are not kept as they come.

        Pages of a mapped file are memory in use once they are read. Where tensors are converted, or only pass by, the file
        is opened anew for every 32nd part of it, which lets go of those before (but for a page or so of each tensor).
        """
        wanted = {name: x.dtype if self.quantized(name) else dtype for name, x in self.tensors.items()}
        as_is = not passing and device.type == "cpu" and all(x.dtype == wanted[name] for name, x in self.tensors.items())
        if as_is:
            places = set()
            for name, x in self.tensors.items():
                x = x.contiguous()
                yield name, x.clone() if x.data_ptr() in places else x  # in a .bin two may be one and the same
                places.add(x.data_ptr())
            return
        carrier = Carrier(device) if device.type == "cuda" else None
        for file in self.files:
            sizes = {theirs: x.nbytes for theirs, x in open_file(file).items()}
            for some in groups(sizes, max(sum(sizes.values()) // 32, SMALL)):
                tensors = self.open(file, some, carrier.open if carrier else open_file)
                for name in list(tensors):
                    x = tensors.pop(name)
                    yield name, x.to(device, wanted[name], copy=not carrier).contiguous()
                x = tensors = None  # the old mapping goes before the new one comes


def stamp(file: Path) -> tuple[int, ...]:
    """What differs once a file has been replaced, or written to."""
    about = file.stat()
    return about.st_size, about.st_mtime_ns


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


# -- onto a GPU ------------------------------------------------------------------------------------------------------

CHUNK = 2**22  # bytes that a thread reads at once


class Carrier:
    """Tensors of files, onto a GPU. Straight from a mapped file, it would wait for each page."""

    def __init__(self, device: torch.device, buffers: Sequence[tuple[torch.Tensor, torch.cuda.Event]] = ()):
        """buffers: memory that the GPU fetches from by itself, and when it last had done so."""
        new = ((torch.empty(2**26, dtype=torch.uint8, device="cpu", pin_memory=True), torch.cuda.Event()) for _ in range(2))
        self._device, self._threads = device, ThreadPoolExecutor(16)
        self._buffers = itertools.cycle(buffers or new)

    def open(self, path: Path, some: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """What open_file returns, on the GPU."""
        mapped, tensors = open_file(path, some), {}
        begins = data_begins(path) if path.suffix == ".safetensors" else {}
        for name, x in mapped.items():
            read = partial(self._from_file, path, begins[name]) if begins else partial(from_memory, x)
            tensors[name] = self._fill(torch.empty(x.shape, dtype=x.dtype, device=self._device), read)
        return tensors

    def _fill(self, there: torch.Tensor, read: Callable[[torch.Tensor, int], None]) -> torch.Tensor:
        """read(bytes of a buffer, how many came before) fills one buffer while the other's bytes travel."""
        target, at = there.view(-1).view(torch.uint8), 0
        while at < len(target):
            buffer, free = next(self._buffers)
            n = min(len(buffer), len(target) - at)
            free.synchronize()
            read(buffer[:n], at)
            target[at : at + n].copy_(buffer[:n], non_blocking=True)
            with torch.cuda.device_of(there):  # its stream, whichever GPU is the current one
                free.record()
            at += n
        return there

    def _from_file(self, path: Path, begin: int, to: torch.Tensor, at: int) -> None:
        to = memoryview(to.numpy())
        parts = [(begin + at + k, to[k : k + CHUNK]) for k in range(0, len(to), CHUNK)]
        list(self._threads.map(lambda part: read_part(path, *part), parts))


def from_memory(x: torch.Tensor, to: torch.Tensor, at: int) -> None:
    to.copy_(x.reshape(-1).view(torch.uint8)[at : at + len(to)])


def data_begins(path: Path) -> dict[str, int]:
    """Where in a .safetensors file each tensor's bytes begin."""
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n))
    return {name: 8 + n + about["data_offsets"][0] for name, about in header.items() if name != "__metadata__"}


def read_part(path: Path, begin: int, to: memoryview) -> None:
    """The file's bytes from `begin` on, till `to` is full."""
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        if file.readinto(to) != len(to):
            raise ValueError(f"{path} ended early; is the file whole?")
