"""The benchmarks run; what they measure is not tested here."""

import json

from bench import records, training
from commandline import run


def test_training_steps(capsys):
    """Guards against a benchmark that has rotted: without transformers, ours alone is timed."""
    flags = ["--size", "tiny", "--batch", "1", "--tokens", "8", "--steps", "1", "--warmup", "1", "--device", "cpu"]
    assert run(training.main, flags) == 0
    out = capsys.readouterr().out.splitlines()
    assert "samples/s" in out[1] and json.loads(out[-1])["ours"]["peak"] > 0


def test_records(capsys):
    """Guards against records of the benchmark's mix that are bad: a check of them would be quick for no reason."""
    assert run(records.main, ["-n", "14"]) == 0
    out = capsys.readouterr().out
    assert out.count("14 good, 0 bad") == 2 and "largest process" in out
