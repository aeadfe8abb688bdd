"""The benchmarks run; what they measure is not tested here."""

import importlib.util
import json

import pytest
import torch

import checkpoint
from bench import bits, images, kernels, lookup, records, sides, speed, training
from commandline import run
from data.scenes import generator_for
from evals.scenes import sample_of


@pytest.mark.parametrize("trained", ["language", "lora"])
def test_training_steps(capsys, trained):
    """Guards against a benchmark that has rotted: without transformers, ours alone is timed."""
    flags = ["--size", "tiny", "--layers", "2", "--batch", "1", "--tokens", "8", "--steps", "1", "--warmup", "1", "--device", "cpu"]
    assert run(training.main, [*flags, "--train", trained]) == 0
    out, told = (text.splitlines() for text in capsys.readouterr())
    assert "tiny (2.2 M)" in out[0] and "samples/s" in out[1] and json.loads(out[-1])["ours"]["peak"] > 0
    assert [line.split("; ")[0] for line in told] == ["warm-up", "step"] and told[1].startswith("step; ours ")


@pytest.mark.parametrize("flags", [["--image-size", "0"], ["--image-size", "-14"], ["--peak-tflops", "-1"], ["--peak-tflops", "nan"]])
def test_sizes_and_peaks_that_are_none(capsys, flags):
    """Guards against a flag that is passed over, and a traceback."""
    assert run(training.main, ["--device", "cpu", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and flags[0] in err


def test_records(capsys):
    """Guards against records of the benchmark's mix that are bad: a check of them would be quick for no reason."""
    assert run(records.main, ["-n", "14"]) == 0
    out = capsys.readouterr().out
    assert out.count("14 good, 0 bad") == 2 and "largest process" in out


def test_speed(capsys, monkeypatch):
    """Guards against a benchmark that has rotted; --alone that goes against transformers, where it is installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: name == "transformers" or find(name, *more))
    flags = ["--alone", "--words", "4", "--tokens", "3", "--repeat", "1", "--precision", "int8", "--device", "cpu"]
    assert run(speed.main, ["--size", "tiny", "--layers", "2", *flags]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("tiny, 2 layers, ")
    assert [line.split()[0] for line in out[2:7]] == ["decode", "prefill", "load", "…", "second"]
    found = json.loads(out[-1])["results"]["ours int8"]
    assert len(found["answers"][0][2]) == 3 and len(found["turns"]) == 1 and found["peak"] > 0


def test_speed_of_some_measures(capsys):
    """Guards against a table that wants what was not measured."""
    flags = ["--alone", "--size", "tiny", "--layers", "1", "--repeat", "1", "--precision", "float32", "--device", "cpu"]
    assert run(speed.main, [*flags, "--words", "4", "--measure", "load", "look"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[2:6]] == ["1", "load", "…", "peak"]
    assert json.loads(out[-1])["results"]["ours float32"]["answers"] == []


def test_kernels(capsys):
    """Guards against a benchmark that has rotted, and a later token that is told with what only the first one needs."""
    flags = ["--size", "tiny", "--layers", "2", "--words", "4", "--tokens", "3", "--rows", "2", "--precision", "float32", "--device", "cpu"]
    assert run(kernels.main, flags) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out[:6:3]] == ["the first token", "a later token"]
    calls = {what: work["calls"] for what, work in json.loads(out[-1]).items()}
    products = {what: sum(n for name, n in found.items() if name in ("aten::mm", "aten::addmm")) for what, found in calls.items()}
    assert products["a later token"] == 2 * 7 + 1 < products["the first token"]  # a block's seven, and the head
    assert not calls["a later token"].get("aten::mkldnn_convolution")  # which cuts an image into patches


def test_other_tokens_are_told():
    """Guards against a race between two that say different things."""
    answers = lambda *said: {"answers": [(0.1, 0.1, list(tokens)) for tokens in said]}
    same = {"ours bfloat16": answers("ab", "ab"), "transformers bfloat16": answers("ac"), "ours float32": answers("ab")}
    assert speed.differing(same) == [] and speed.differing(same | {"transformers float32": answers("ab")}) == []
    assert "expected the same in 32 bits" in speed.differing(same | {"transformers float32": answers("ac")})[0]
    assert "expected the same each time" in speed.differing(same | {"ours int8": answers("ab", "ab", "ad")})[0]


def test_another_gpt_fast_is_refused(tmp_path, capsys):
    """Guards against a race that ends after its weights were written, as the clone is of another time."""
    flags = ["--size", "tiny", "--device", "cpu", "--gpt-fast", str(tmp_path)]
    assert run(speed.main, flags) == 2 and "expected a clone of gpt-fast" in capsys.readouterr().err
    (tmp_path / "model.py").write_text("def forward(self, mask, idx: Tensor, input_pos=None): ...")
    assert run(speed.main, flags) == 2 and "expected that of gpt-fast's commit 32971d3" in capsys.readouterr().err


def test_a_side_says_what_went_wrong():
    """Guards against "too little memory?" for a mistake in the code."""
    with pytest.raises(RuntimeError, match="mine: TypeError: int"):
        sides.Side("mine", int, [1]).start()
    with pytest.raises(MemoryError, match="no room"):  # in one line
        sides.Side("mine", no_memory).start()


def no_memory():
    raise torch.OutOfMemoryError("no room")


class Idle:
    def __init__(self, *arguments):
        pass


def test_a_side_s_memory_is_its_own():
    """Guards against a peak that a process takes over from the one that started it."""
    large = torch.ones(2**28, dtype=torch.float32, device="cpu")  # 1 GB
    large += 1
    del large
    side = sides.Side("idle", Idle)
    side.start()
    side.stop()
    assert 1e7 < side.peak < 0.8e9


def test_flops():
    """Guards against a limit that is not one: the 7B model's numbers, counted by hand."""
    config = speed.SIZES["7b"]
    assert speed.prefill_flops(config, 64) == pytest.approx(8.81e12, rel=0.01)


def test_images(capsys):
    """Guards against a benchmark that has rotted."""
    assert run(images.main, ["--repeat", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 9


def test_bits(capsys):
    """Guards against a benchmark that has rotted, and against bits in the wrong order: fewer cost more."""
    assert run(bits.main, ["--size", "tiny", "--tokens", "32", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 1e-4 < found["int8"]["error"] < found["int4"]["error"] < 0.3 and found["bfloat16"]["error"] < 0.02
    assert run(bits.main, ["--tokens", "1"]) == 2


def test_lookup(capsys):
    """Guards against drafts of another place, accepted tokens that are wrong, and a benchmark that has rotted."""
    assert lookup.proposed([1, 2, 3, 4, 1, 2, 5, 6, 7, 8, 9, 1, 2]) == [5, 6, 7, 8]  # the latest time
    assert lookup.proposed([1, 2, 3]) == [] == lookup.proposed([1])
    assert lookup.steps_of([1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7, 8]) == 2  # 3, then four accepted and the 8 after them
    assert lookup.steps_of([1, 2, 3], [7, 8, 9]) == 2 and lookup.steps_of([1], [7]) == 0
    flags = ["--size", "tiny", "--layers", "1", "-n", "1", "--precision", "int8", "--device", "cpu"]
    assert run(lookup.main, flags) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    gains = found["tokens a step"]
    assert min(gain for gain in gains.values() if gain is not None) >= 1 and gains["v7w"] is None and found["cost"]["int8"] > 0


def test_a_caption_ends_with_its_line():
    """Guards against gains that are counted on what nobody reads: captions end with a newline, not with </s>."""
    model, tokenizer = checkpoint.load("tiny", "cpu", torch.float32)
    sample = sample_of("captions", generator_for("test", 0, 0), (224, 224))
    assert sample.is_caption
    _, said = lookup.answered(model, tokenizer, sample)
    assert 1 < len(said) < 60 and tokenizer.decode(said).endswith("\n") and "\n" not in tokenizer.decode(said[:-1])
