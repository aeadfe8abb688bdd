"""Weight files: read in groups, and carried to a GPU in pieces. What is refused, and every layout: test_checkpoint.py."""

import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import files


@pytest.mark.parametrize("limit, expected", [(1, ["a", "b", "c", "d"]), (5, ["ab", "c", "d"]), (10**6, ["abcd"])])
def test_groups(limit, expected):
    """Guards against: a tensor that is in no group, or in two; groups that grow far beyond the limit."""
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1}
    assert ["".join(group) for group in files.groups(sizes, limit)] == expected


class Fence:
    """Stands for a GPU's event; the buffer may be written to again only once it has been waited for."""

    def __init__(self):
        self.busy, self.waited = False, 0

    def record(self):
        assert not self.busy
        self.busy = True

    def synchronize(self):
        self.waited += self.busy
        self.busy = False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 9), (64, 4)])
def test_carried_in_pieces(dtype, shape, tmp_path, monkeypatch):
    """Guards against: a piece lost, doubled or in another's place, a buffer filled again before it has been fetched."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(50).to(dtype)
    monkeypatch.setattr(files, "CHUNK", 10)
    for name, write in (("x.safetensors", save_file), ("x.bin", torch.save)):
        write({"a": torch.zeros(3), "x": x, "z": x + 1}, tmp_path / name)
        fences = [Fence(), Fence()]
        carrier = files.Carrier(torch.device("cpu"), [(torch.zeros(24, dtype=torch.uint8), fence) for fence in fences])
        y = carrier.open(tmp_path / name, ["x"])["x"]
        assert y.dtype == dtype
        torch.testing.assert_close(y, x, rtol=0, atol=0)
        pieces = -(-x.nbytes // 24)
        assert sum(fence.waited for fence in fences) == max(0, pieces - 2)


@pytest.mark.parametrize("passing", [False, True])
def test_a_file_that_is_replaced_is_no_longer_read(tmp_path, monkeypatch, passing):
    """Guards against a model of two: tensors of one that was saved anew while it was loaded."""
    monkeypatch.setattr(files, "SMALL", 1)
    path = tmp_path / "model.safetensors"
    names = [f"language_model.model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    save_file({name: torch.zeros(4, 4) for name in names}, path)
    part = files.Part((path,))
    reading = part.read(torch.device("cpu"), torch.float32 if passing else torch.bfloat16, passing)
    assert next(reading)[1].eq(0).all()
    save_file({name: torch.ones(4, 4) for name in names}, tmp_path / "new")
    os.utime(tmp_path / "new", ns=(0, 0))  # at another time, which clocks may not tell for two files so close
    (tmp_path / "new").replace(path)
    with pytest.raises(ValueError, match="model.safetensors was replaced while it was read"):
        list(reading)


def test_tensors_that_are_one_become_two(tmp_path):
    """Guards against a head and embeddings that share memory, so that an adapter merged into one changes the other."""
    shared = torch.randn(6, 4)
    torch.save({"lm_head.weight": shared, "model.embed_tokens.weight": shared}, tmp_path / "x.bin")
    (_, one), (_, two) = files.Part((tmp_path / "x.bin",)).read(torch.device("cpu"), torch.float32)
    assert torch.equal(one, shared) and torch.equal(two, shared) and one.data_ptr() != two.data_ptr()


@pytest.mark.parametrize("tensors", [{1: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}, {"a": torch.zeros(2, device="meta")}])
def test_what_is_no_plain_tensor_is_refused(tmp_path, tensors):
    """Guards against a traceback, and against weights without values."""
    torch.save(tensors, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="x.bin holds a dict; expected a dict of names and dense tensors"):
        files.open_file(tmp_path / "x.bin")


def test_tensors_that_share_memory_are_not_written(tmp_path):
    """Guards against a traceback of another library's."""
    x = torch.zeros(3)
    with pytest.raises(OSError, match="x.safetensors can't be written .*share memory"):
        files.write_tensors({"a": x, "b": x}, tmp_path / "x.safetensors")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    """Guards against a traceback of another library's, and half a file that looks like weights."""

    def full(tensors, path, about):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="x.safetensors can't be written .No space left"):
        files.write_tensors({}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_that_ends_early(tmp_path):
    """Guards against a tensor whose end is what the buffer held before."""
    (tmp_path / "short").write_bytes(b"12345")
    with pytest.raises(ValueError, match="short ended early; is the file whole"):
        files.read_part(tmp_path / "short", 2, memoryview(bytearray(4)))
