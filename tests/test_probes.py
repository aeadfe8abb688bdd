"""Probes: they read what is there, and nothing else."""

import json

import numpy as np
import pytest
import torch

from clip import CLIPVision, VisionConfig
from commandline import run
from evals import probes
from evals.probes import beside, crossed, evenly, ink_of, look, marked_scene, place, probe
from overlay import KINDS, make_marker

CONFIG = VisionConfig(image_size=42, patch_size=14, width=24, layers=2, heads=3, mlp=40)


def test_a_probe_finds_what_is_planted_and_nothing_in_noise():
    """Guards against a probe that is tested on what it learned from: noise is learned by heart, and tested at chance."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(900, 40, generator=g), torch.randint(5, (900,), generator=g)
    assert probe(x[:600], y[:600], x[600:], y[600:]) < 0.3 * 300
    x[torch.arange(900), y] += 4.0
    assert probe(x[:600], y[:600], x[600:], y[600:]) > 0.9 * 300
    assert probe(1000 * x[:600] + 7, y[:600], 1000 * x[600:] + 7, y[600:]) > 0.9 * 300  # whatever the scale


def test_places_are_found_and_neighbours_count():
    """Guards against a score that is not the same for all patches, and neighbours across the image's border."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 9, 16, generator=g), torch.randint(9, (300,), generator=g)
    x[torch.arange(300), y] += torch.linspace(-2, 2, 16)
    assert place(x[:200], y[:200], x[200:], y[200:], 3) > 95
    near = beside(torch.arange(9), torch.tensor([0, 4, 5]), 3)  # of a grid of 3 x 3
    assert near[:, 0].nonzero().flatten().tolist() == [0, 1, 3, 4] and near[:, 1].all()
    assert near[:, 2].nonzero().flatten().tolist() == [1, 2, 4, 5, 7, 8]


@pytest.mark.parametrize("kind, geometry, expected", [
    ("rectangle", (20, 30, 60, 90), (40, 60)), ("arrow", (70, 40), None), ("point", (25, 75), (25, 75)),
])
def test_the_middle_is_that_of_what_is_drawn(kind, geometry, expected):
    """Guards against the middle of the object that is meant: a marker's own pixels are asked for."""
    for color in ("#000000", "#ffffff", "yellow"):
        x, y = (pixels.mean() for pixels in ink_of(make_marker(kind, geometry, (100, 100), color=color), (100, 100)))
        assert 0 < x < 100 and 0 < y < 100
        assert expected is None or (abs(x - expected[0]) < 1 and abs(y - expected[1]) < 1)


def test_patches_that_a_line_crosses_and_those_beside():
    """Guards against rows taken for columns, a patch with a trace of ink that counts as free of it, and guesses that
    do better than half, as one of the answers is more frequent."""
    line = make_marker("rectangle", (55, 5, 95, 35), (120, 120), color="red", width=4)
    around = crossed(ink_of(line, (120, 120)), 120, 4).view(4, 4)
    assert around.tolist() == [[0, 1, 1, 1], [0, -1, 1, -1], [-1, 0, 0, 0], [-1] * 4]
    corner = np.arange(121) // 2, np.arange(121) % 2  # two pixels thick, one of them in the third patch
    assert crossed(corner, 120, 4)[:4].tolist() == [1, 1, -1, -1]
    y = torch.tensor([1, -1, 0, 0, 1, 0, 0, -1, 0])
    some = evenly(y, 0)
    assert sorted(y[some].tolist()) == [0, 0, 1, 1] and len(set(some.tolist())) == 4


def test_scenes_take_turns_and_only_arrows_point():
    """Guards against a direction of a rectangle, and against truths of other objects: by the words of the scene."""
    for i in range(16):
        image, truth = marked_scene(i, "test", 0, 64)
        again, _ = marked_scene(i, "test", 0, 64)
        assert image.tobytes() == again.tobytes() and KINDS[truth["kind"]] == KINDS[i % 8]
        assert ("direction" in truth) == (KINDS[i % 8] == "arrow") and 0 <= truth.get("direction", 0) < 8
        assert all(0 <= v < 1 for v in truth["place"])


def test_the_patch_in_the_middle_is_looked_at(monkeypatch):
    """Guards against rows taken for columns, and patches counted with the class token."""
    tower = CLIPVision(CONFIG)

    def states(pixels, layers):
        numbers = torch.arange(10.0)[None, :, None].expand(len(pixels), 10, 24)  # the class token is 0, patches 1 … 9
        return [numbers] * len(layers)

    monkeypatch.setattr(tower, "hidden_states", states)
    pooled, patches, answers, places, inks = look(tower, 70, "test", 0, 60)
    assert pooled.shape == (3, 70, 48) and patches.shape == (3, 70, 9, 24) and inks.shape == (70, 9)
    for i in range(70):
        x, y = marked_scene(i, "test", 0, 60)[1]["place"]
        assert places[i] == 3 * int(3 * y) + int(3 * x) and pooled[0, i, 0] == places[i] + 1 and pooled[0, i, 24] == 5
    assert (answers["direction"] >= 0).tolist() == [i % 8 == KINDS.index("arrow") for i in range(70)]
    assert (look(tower, 70, "test", 0, 60, ("arrow",))[2]["direction"] >= 0).all()


def test_the_command_prints_a_row_for_each_question(tmp_path, capsys):
    """Guards against a table whose columns are not the depths, and against numbers that differ twice."""
    for name in ("a", "b"):
        flags = ["-n", "128", "--side", "64", "--device", "cpu", "--out", str(tmp_path / name)]
        assert run(probes.main, flags) == 0
    said = json.loads((tmp_path / "a").read_text())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name in (*probes.QUESTIONS, "position", "ink"):
        assert len(said[name]["accuracy"]) == 8 and all(low <= v <= high for v, (low, high) in
                                                        zip(said[name]["accuracy"], said[name]["interval"]))
    assert said["color"]["accuracy"][7] > said["color"]["chance"] + 20
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["depth", *map(str, range(8)), "chance"] and len(out) == 2 * 7


@pytest.mark.parametrize("flags, words", [
    (["-n", "7"], "argument -n: 7 came; expected 128 or more"), (["--seed", "-1"], "--seed: -1 came"), (["--clip", "tiny"], "expected clip"),
    (["--model", "nosuch"], "no model 'nosuch'"), (["--side", "x"], "'x' came; expected a whole number"),
    (["--model", "mine", "--clip", "other"], "not allowed with"),
])
def test_a_mistake_is_one_line(flags, words, capsys):
    assert run(probes.main, ["--device", "cpu", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
