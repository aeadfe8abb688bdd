"""The training loop, on a model small enough to take a step in milliseconds."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import train
from chat import IMAGE
from clip import VisionConfig
from data import scenes
from evals.scenes import answer
from llama import LlamaConfig
from train import IGNORE, Recipe, Scenes, collate, encode, learning_rate, main, parse_mix, tiny_model
from vipllava import ViPLLaVA, ViPLLaVAConfig

FLAGS = ["--batch", "3", "--side", "64", "--log", "1", "--evals", "1000", "--workers", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def minute_model(monkeypatch):
    """The tiny model, tinier: 9 patches, two blocks of each kind."""
    vision = VisionConfig(image_size=24, patch_size=8, width=20, layers=2, heads=5, mlp=28)
    text = LlamaConfig(1024, width=24, layers=3, heads=4, kv_heads=2, mlp=36, context=256)
    monkeypatch.setattr(train, "TINY", ViPLLaVAConfig(vision, text, feature_layers=(-2, 1)))


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_labels_are_exactly_the_answers():
    """Guards against labels shifted by the expansion of the image, against a trained question, an untrained end."""
    model, tokenizer = tiny_model(Recipe("markers", steps=1, side=64))
    for index in range(20):
        sample = scenes.marker_sample(scenes.generator_for("train", 0, index), (64, 64))
        ids, labels, pixels = encode(sample, tokenizer, model.config)
        assert len(ids) == len(labels) and pixels.shape == (3, 24, 24)
        assert ids.count(IMAGE) == model.config.vision.patches == 9
        assert all(label in (IGNORE, i) for i, label in zip(ids, labels))
        answers, current = [], []
        for label in labels:
            if label == tokenizer.eos:
                answers.append(tokenizer.decode(current).strip())
                current = []
            elif label != IGNORE:
                current.append(label)
        assert answers == [turn.answer for turn in sample.turns]


def test_padding_is_not_trained():
    """Guards against a loss that learns to write padding: its labels must be IGNORE."""
    short, long = ([5, 6], [IGNORE, 6], torch.zeros(3, 2, 2)), ([5, 6, 7], [IGNORE, 6, 7], torch.ones(3, 2, 2))
    ids, labels, pixels = collate([short, long])
    assert ids.tolist() == [[5, 6, 0], [5, 6, 7]] and labels.tolist() == [[IGNORE, 6, IGNORE], [IGNORE, 6, 7]]
    assert pixels.shape == (2, 3, 2, 2) and pixels[1].min() == 1


def test_samples_depend_on_seed_and_index_only():
    """Guards against a shared random stream, with which workers or a resumed run would see other data."""
    recipe = Recipe("markers=3,captions=1", steps=1, side=64)
    model, tokenizer = tiny_model(recipe)
    data = Scenes(recipe, tokenizer, model.config)
    ahead = [data[i] for i in (7, 3)]
    again = [data[i] for i in (7, 3)]
    assert all(a[0] == b[0] and torch.equal(a[2], b[2]) for a, b in zip(ahead, again))
    other = Scenes(dataclasses.replace(recipe, seed=1), tokenizer, model.config)
    assert not torch.equal(ahead[0][2], other[7][2])


def test_batches_are_each_sample_once_of_like_length_and_the_same_after_a_resume():
    """Guards against samples lost or repeated at a pool's end, against padding, and against another order after a stop."""
    recipe = Recipe("markers", steps=train.POOL + 3, batch=4, side=64)
    rows = [([1] * (1 + i * 37 % 50) + [i], [IGNORE] * (2 + i * 37 % 50), torch.zeros(1)) for i in range(2 * train.POOL * 4)]
    whole = [ids for ids, _, _ in train.batches(rows, recipe, 0, 0)]
    assert len(whole) == recipe.steps
    seen = [int(row[row > 1].max()) if (row > 1).any() else 1 for ids in whole[: train.POOL] for row in ids]
    assert len(set(seen)) >= train.POOL * 4 - 1  # sample 1 is marked by a 1, as its filling is
    padding = sum((ids == 0).sum().item() for ids in whole[1:]) / sum(ids.numel() for ids in whole[1:])
    assert padding < 0.15
    for first in (1, train.POOL - 1, train.POOL + 1):
        rest = [ids for ids, _, _ in train.batches(rows, recipe, first, 0)]
        assert len(rest) == recipe.steps - first and all(torch.equal(a, b) for a, b in zip(rest, whole[first:]))


def test_mix_is_drawn_in_its_shares():
    """Guards against shares that are read but not used. 400 draws of a 3:1 mix: five sigma is 0.11."""
    assert parse_mix("markers=3,captions=1") == (["markers", "captions"], [0.75, 1.0])
    recipe = Recipe("markers=3,captions=1", steps=1, side=64)
    model, tokenizer = tiny_model(recipe)
    data = Scenes(recipe, tokenizer, model.config)
    plain = [data[i][0][1] == IMAGE for i in range(400)]  # a caption's image follows BOS
    assert abs(sum(plain) / 400 - 0.25) < 0.11


@pytest.mark.parametrize("mix, word", [("cats", "expected captions, markers"), ("markers=x", "a number"),
                                       ("markers=0", "more than 0"), ("markers=nan", "more than 0"), ("", "unknown")])
def test_bad_mix(mix, word):
    with pytest.raises(ValueError, match=word):
        parse_mix(mix)


def test_learning_rate_warms_up_and_ends_near_zero():
    """Guards against a schedule that starts at its peak or never comes down."""
    recipe = Recipe("captions", steps=200, lr=0.5, warmup=0.1)
    rates = [learning_rate(step, recipe) for step in range(200)]
    assert rates[0] == pytest.approx(0.5 / 20) and max(rates) == rates[19] == rates[20] == 0.5
    assert rates[110] == pytest.approx(0.25) and 0 < rates[-1] < 1e-4
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_loss_falls(tmp_path):
    """Guards against a step that updates nothing: the loss at random is about ln 500, and must fall at once."""
    main(["tiny-captions", "--out", str(tmp_path), "--steps", "25", "--lr", "0.01", *FLAGS])
    seen = losses(tmp_path)
    assert seen[1] > 5.5 and seen[25] < 4


def test_a_stopped_run_continues_exactly(tmp_path, monkeypatch, capsys):
    """Guards against a resume that forgets the optimizer, the schedule or the place in the data: bit for bit."""
    main(["tiny-markers", "--out", str(tmp_path / "whole"), "--steps", "8", "--save", "100", *FLAGS])
    report = train.report

    def stop_at_5(out, **fields):
        report(out, **fields)
        if fields["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    command = ["tiny-markers", "--out", str(tmp_path / "cut"), "--steps", "8", "--save", "100", *FLAGS]
    monkeypatch.setattr(train, "report", stop_at_5)
    with pytest.raises(SystemExit, match="stopped after step 5 of 8"):
        main(command)
    monkeypatch.setattr(train, "report", report)
    main(command)
    assert "at step 5 of 8" in capsys.readouterr().out
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True)["model"] for name in ("cut", "whole")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_another_recipe_does_not_continue_a_run(tmp_path):
    """Guards against a run that silently goes on with a changed learning rate."""
    main(["tiny-captions", "--out", str(tmp_path), "--steps", "1", *FLAGS])
    with pytest.raises(ValueError, match="lr 0.001, now 0.5"):
        main(["tiny-captions", "--out", str(tmp_path), "--steps", "1", "--lr", "0.5", *FLAGS])


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"not a state"])
def test_a_damaged_state_is_one_line(tmp_path, damage):
    """Guards against a traceback, and against a run that begins anew over what it can't read."""
    command = ["tiny-captions", "--out", str(tmp_path), "--steps", "1", *FLAGS]
    main(command)
    path = tmp_path / "state.pt"
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="state.pt can't be read .* is it whole") as caught:
        main(command)
    assert "\n" not in str(caught.value) and path.read_bytes() == before


def test_somebody_elses_model_is_refused_before_training(tmp_path):
    """Guards against hours of training whose result can't be saved."""
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="not saved from here"):
        main(["tiny-captions", "--out", str(tmp_path), "--steps", "1", *FLAGS])
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_run_is_a_model_that_loads(tmp_path):
    """Guards against a run folder that only the training loop can read: it answers after checkpoint.load."""
    main(["tiny-markers", "--out", str(tmp_path), "--steps", "1", *FLAGS])
    model, tokenizer = train.checkpoint.load(str(tmp_path), "cpu", torch.float32)
    assert isinstance(model, ViPLLaVA)
    state = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    sample = scenes.test_sample(scenes.generator_for("val", 0, 0), (64, 64))
    assert len(answer(model, tokenizer, [sample], 8)) == 1


@pytest.mark.parametrize("flags", [
    ["--lr", "x"], ["--data", "cats"], ["--model", "/nowhere"], ["--steps", "0"], ["--batch", "-1"],
    ["--device", "abacus"], ["--lr", "nan"], ["--log", "0"], ["--workers", "-1"],
])  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, flags):
    """Guards against tracebacks, and against an output folder made for a run that never starts."""
    command = [sys.executable, "train.py", "tiny-captions", "--out", str(tmp_path / "run"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(train.__file__))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
