"""Experiments: what a frozen tower sees is what it saw, variants learn, trials are true, and a cut run goes on."""

import json
import statistics
import sys

import numpy as np
import pytest
import torch

import checkpoint
import contrast
import quant
from chat import IMAGE
from clip import VisionConfig, preprocess
from commandline import run
from data.scenes import generator_for, render
from evals import experiments, figures, trials
from evals.experiments import Lab, Budget, main, row
from evals.variants import (Course, Lessons, States, Stored, Variant, by_coordinates, examine, exercise, lesson,
                            start, teach)
from llama import LlamaConfig
from overlay import KINDS, draw, phrase
from recipe import Recipe
from train import tiny_model
from vipllava import IGNORE, ViPLLaVAConfig

SIZE = (64, 64)


@pytest.fixture(scope="module")
def small():
    """A random model of 9 patches and 3 blocks, and its tokenizer."""
    vision = VisionConfig(image_size=24, patch_size=8, width=20, layers=3, heads=5, mlp=28)
    text = LlamaConfig(1024, width=24, layers=2, heads=4, kv_heads=2, mlp=36, context=256)
    return tiny_model(Recipe("markers", steps=1, side=64), ViPLLaVAConfig(vision, text, feature_layers=(-2, 1)))


def lessons(n, split="train"):
    return [lesson(generator_for(split, 0, i), SIZE) for i in range(n)]


def states(small, tmp_path, some, picture="marked"):
    return States(tmp_path / f"{picture}.npy", small[0].vision, lambda i: getattr(some[i], picture), len(some))


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_a_variant_sees_what_the_tower_saw(small, tmp_path):
    """Guards against another depth, or a class token among the patches: features from the file and from the tower."""
    some, (model, _) = lessons(3), small
    kept = states(small, tmp_path, some)
    assert kept[0].shape == (4, 9, 20)
    pixels = torch.stack([preprocess(one.marked, 24) for one in some])
    for layers in ((-2, 1), (0,), (3, 2)):
        expected = model.vision(pixels, layers)
        found = Stored()(torch.stack([kept[i] for i in range(3)]), layers)
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=4e-3 * expected.abs().max().item())


def test_a_cut_file_of_states_is_gone_on_with(small, tmp_path):
    """Guards against a file that is made anew each time, and against one with holes."""
    some, seen = lessons(5), []

    def picture(i):
        if len(seen) == 4 and i == 4:
            seen.append("cut")
            raise KeyboardInterrupt
        seen.append(i)
        return some[i].marked

    with pytest.raises(KeyboardInterrupt):
        States(tmp_path / "a.npy", small[0].vision, picture, 5, batch=2)
    again = States(tmp_path / "a.npy", small[0].vision, picture, 5, batch=2)
    assert seen == [0, 1, 2, 3, "cut", 4]
    whole = states(small, tmp_path, some)
    assert all(torch.allclose(again[i], whole[i], atol=1e-2) for i in range(5))
    with pytest.raises(ValueError, match="expected .* remove it"):
        States(tmp_path / "a.npy", small[0].vision, picture, 4)


# -- variants --------------------------------------------------------------------------------------------------------


def test_a_prompt_shows_all_pictures_and_points_in_its_variant_s_words(small, tmp_path):
    """Guards against labels shifted by a second picture, and against a marker's words where coordinates are meant."""
    some, (model, tokenizer) = lessons(4), small
    kept = {name: states(small, tmp_path, some, name) for name in ("marked", "unmarked")}
    one = Lessons(some, kept, Variant("a", (1,)), tokenizer, model.config)
    two = Lessons(some, kept, Variant("b", (1,), ("marked", "unmarked"), by_coordinates), tokenizer, model.config)
    for i in range(4):
        a, b = one[i], two[i + 4]  # after the last comes the first again
        assert a.ids.count(IMAGE) == 9 and b.ids.count(IMAGE) == 18 and len(b.ids) == len(b.labels)
        assert [k for k in a.labels if k != IGNORE] == [k for k in b.labels if k != IGNORE]
        said = [tokenizer.decode([k for k in x.ids if k != IMAGE]) for x in (a, b)]
        (x0, y0, x1, y1), words = some[i].things[0].box, phrase(some[i].markers[0])
        assert by_coordinates(some[i], 0) == f"within the box ({x0 / .64:.0f}, {y0 / .64:.0f}, {x1 / .64:.0f}, {y1 / .64:.0f})"
        assert words in said[0] and words not in said[1] and by_coordinates(some[i], 0) in said[1]
    micro = two.collate([two[0], two[1]])
    assert micro.pixels.shape == (4, 4, 9, 20) and torch.equal(micro.pixels[3], kept["unmarked"][1])


def test_a_variant_learns_and_its_tower_is_not_needed(small, tmp_path):
    """Guards against weights that are not trained, and an examination that counts others than the exact answers."""
    some, (base, tokenizer) = [exercise(generator_for("train", 0, i), SIZE, "mask") for i in range(4)], small
    kept = {"marked": states(small, tmp_path, some)}
    data = Lessons(some, kept, Variant("learn", (-2, 1)), tokenizer, base.config)
    model = start(base, (-2, 1), 0)
    assert all(torch.equal(a, b) for a, b in zip(model.llama.state_dict().values(), base.llama.state_dict().values()))
    assert examine(model.eval(), data) == [False] * 4
    teach(model, data, Course(120, batch=4, lr=5e-3), 0, tmp_path / "run")
    right = examine(model.eval(), data)
    assert sum(right) >= 3, right  # four answers by heart; a random model knows none
    other = Lessons([*some[1:], some[0]], kept, data.variant, tokenizer, base.config)  # each asked of another's picture
    assert sum(examine(model, other)) < sum(right)


# -- trials ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", trials.ATTRIBUTES)
def test_attributes_go_beyond_their_bands(name):
    """Guards against an attribute that is not varied, or a band in which nothing is tested."""
    attribute = trials.ATTRIBUTES[name]
    inside = [value for value in attribute.values if attribute.inside(value)]
    assert len(inside) < len(attribute.values) and (inside or attribute.band is None)
    pictures = []
    for value in (attribute.values[0], attribute.values[-1]):
        one, two = (attribute.make(generator_for("test", 0, 3), (224, 224), value) for _ in range(2))
        (turn,) = one.turns
        assert turn == two.turns[0] and turn.question.startswith("What is ") and turn.image and 1 / 6 <= one.chance <= 1 / 2
        assert np.array_equal(one.image, two.image) and one.image.size == (224, 224)
        pictures.append(np.asarray(one.image))
    assert not np.array_equal(*pictures)


def test_narrow_lessons_stay_in_all_bands():
    """Guards against a band that leaks: then the curve beyond it would mean nothing."""
    for i in range(20):
        one = trials.narrow_lesson(generator_for("train", 0, i), (224, 224))
        for thing, marker in zip(one.things, one.markers):
            assert marker.kind != "triangle" and trials.hue(marker) <= 240 and thing.center[0] < 0.67 * 224
            assert marker.kind == "mask" or 0.59 < marker.alpha < 0.81
            assert marker.kind not in trials.LINES or 2 <= marker.width <= 4  # 3 to 5 at 336, whole pixels at 224


@pytest.mark.parametrize("name", trials.BREAKING)
def test_difficulties_are_drawn(name):
    """Guards against a level that changes nothing."""
    trial = trials.BREAKING[name]
    pictures = [np.asarray(trial.make(generator_for("test", 0, 5), SIZE, level).image) for level in trial.levels]
    assert all(not np.array_equal(a, b) for a, b in zip(pictures, pictures[1:])) and pictures[0].shape == (64, 64, 3)


def test_a_covered_marker_is_gone_and_many_markers_are_there():
    """Guards against a cover over the objects, and against counts of markers that are not drawn."""
    scene, thing, marker = trials.one_marked(generator_for("test", 0, 1), SIZE)
    covered = trials._erased(generator_for("test", 0, 1), SIZE, 100)
    assert np.array_equal(covered.image, render(scene)) and covered.turns[0].answer.split()[-1] == thing.shape
    assert np.array_equal(trials._erased(generator_for("test", 0, 1), SIZE, 0).image, draw(render(scene), [marker]))
    assert trials.of_many(generator_for("test", 0, 2), (224, 224), 8).chance == 1 / 8
    assert [len(trials.described(generator_for("test", 0, 3), SIZE, marks).markers) for marks in range(4)] == [0, 1, 2, 3]


def test_an_overlapping_marker_comes_to_lie_on_the_one_asked_about(monkeypatch):
    """Guards against a level that changes nothing, and another that moves the marker which is asked about."""
    drawn, named = [], []
    monkeypatch.setattr(trials, "draw", lambda image, markers: drawn.append(markers) or image)
    monkeypatch.setattr(trials, "trial", lambda scene, thing, marker, image: named.append(thing))
    for i in range(4):
        levels = []
        for level in (0, 50, 100):
            trials._overlapping(generator_for("test", 0, i), SIZE, level)
            asked, other = drawn.pop()
            levels.append((asked, np.mean(other.points, axis=0)))
        (asked, start), (_, half), (again, end) = levels
        assert asked == again and np.allclose(half, (start + end) / 2, atol=0.02)  # a marker rounds its points
        assert np.allclose(end, named[-1].center, atol=1) and not np.allclose(start, end, atol=8)


def test_descriptions_are_scored_by_their_facts():
    """Guards against facts that count twice, and a number that is the true one whatever is said."""
    sample = trials.described(generator_for("test", 0, 3), SIZE, 0)
    true = sample.turns[0].answer
    facts = true.rstrip(".").split(". ")
    assert trials.facts_right(sample, true) == trials.number_right(sample, true) == 1.0
    assert trials.facts_right(sample, f"{facts[0]}. {facts[0]}.") == 1 / len(facts)
    assert trials.facts_right(sample, "") == trials.number_right(sample, "") == 0.0
    assert trials.number_right(sample, ". ".join(["top: a pig"] * len(facts))) == 1.0


def test_zero_shot_of_a_clip_that_knows_nothing_is_chance():
    """Guards against a right caption that can be told by its place: it is another one of the eight each time."""
    clip, tokenize = contrast.tiny_clip(0)
    found = trials.zero_shot(clip.eval(), tokenize, 48, SIZE)
    assert len(found) == 48 and sum(found) < 20  # chance 6; 20 or more: 1e-6


# -- results ---------------------------------------------------------------------------------------------------------


def test_intervals_are_student_s_over_seeds_and_wilson_s_of_one():
    """Guards against an interval that forgets the seeds: by the formula, of 80, 90 and 85 %."""
    seeds = [[1.0] * 80 + [0.0] * 20, [1.0] * 90 + [0.0] * 10, [1.0] * 85 + [0.0] * 15]
    said = row("s", 3, seeds, 0.25)
    reach = 4.30 * statistics.stdev([80, 90, 85]) / 3**0.5
    assert said["accuracy"] == 85 and said["chance"] == 25 and said["seeds"] == 3 and said["n"] == 100
    assert said["each"] == [80, 90, 85]
    assert said["low"] == pytest.approx(85 - reach, abs=0.01) and said["high"] == pytest.approx(85 + reach, abs=0.01)
    alone = row("s", 3, seeds[:1], 0.25)
    assert (alone["low"], alone["high"], alone["seeds"]) == (71.12, 86.66, 1)
    shares = row("s", 3, [[0.5] * 100], 0.0)  # parts of answers are no right and wrong: Wilson's would be 40 to 60
    assert (shares["low"], shares["high"]) == (50, 50)


BUDGET = Budget(lessons=6, steps=2, exercises=16, seeds=2, probed=128, clip_steps=1)


def lab(small, out):
    return Lab(*small, BUDGET, out, 64)


def test_every_variant_of_overlay_has_rows_and_nothing_is_done_twice(small, tmp_path, monkeypatch):
    """Guards against a variant that is left out, and against a run that begins anew."""
    rows = list(experiments.overlay(lab(small, tmp_path)))
    assert [r["x"] for r in rows] == ["all", *KINDS] * 4 and {r["seeds"] for r in rows} == {2}
    assert len({r["series"] for r in rows}) == 4 and all(r["n"] == (16 if r["x"] == "all" else 2) for r in rows)
    taught = []
    monkeypatch.setattr(experiments, "teach", lambda *args: (taught.append(args[-1].name), args[-1].mkdir(parents=True)))
    assert list(experiments.overlay(lab(small, tmp_path))) == rows and not taught
    list(experiments.layers(lab(small, tmp_path)))  # its first is overlay's first, "last" and "deep four" are depths, too
    assert len(taught) == len(set(taught)) == 2 * 4


def test_layers_take_each_depth_alone(small, tmp_path, monkeypatch):
    """Guards against depths that are not those of the model at hand."""
    monkeypatch.setattr(experiments, "teach", lambda *args: args[-1].mkdir(parents=True))
    rows = list(experiments.layers(lab(small, tmp_path)))
    assert list(dict.fromkeys(r["series"] for r in rows)) == ["five", "deep four", "last", *(f"depth {k}" for k in range(4))]


def test_unseen_tells_which_values_were_trained(small, tmp_path, monkeypatch):
    """Guards against a shaded band beside the trained one, and a tower that the examined model lacks."""
    monkeypatch.setattr(experiments, "teach", lambda *args: args[-1].mkdir(parents=True))
    monkeypatch.setattr(trials, "ATTRIBUTES", {name: trials.ATTRIBUTES[name] for name in ("alpha", "kind")})
    rows = list(experiments.unseen(lab(small, tmp_path)))
    assert [r["x"] for r in rows if r["trained"]] == [0.6, 0.7, 0.8, *trials.LEARNED] and len(rows) == 17


def test_a_command_writes_results_and_refuses_other_flags(small, tmp_path, capsys, monkeypatch):
    """Guards against results of two models in one folder."""
    checkpoint.save(*small, tmp_path / "model")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    command = ["--model", str(tmp_path / "model"), "--side", "64", "--exercises", "16", "--device", "cpu", "--out"]
    for name, count in (("kinds", 8), ("numbers", 8), ("beyond", 8)):
        assert run(main, [name, *command, str(tmp_path / "out")]) == 0
        said = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert len(said["rows"]) == count and said["experiment"] == name and said["exercises"] == 16
    out, err = capsys.readouterr()
    assert "rectangle" in out and "pip install -r requirements-figures.txt" in err
    assert run(main, ["kinds", *command, str(tmp_path / "out"), "--seeds", "2"]) == 0  # more seeds may come later
    assert run(main, ["kinds", *command, str(tmp_path / "out"), "--steps", "5"]) == 2
    assert "speaks of another model or budget (steps 600, now 5); expected" in capsys.readouterr().err
    torch.nn.init.normal_(small[0].llama.norm.weight)
    checkpoint.save(*small, tmp_path / "model")  # trained anew under its name
    assert run(main, ["kinds", *command, str(tmp_path / "out")]) == 2
    assert "speaks of another model or budget (weights " in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize("flags, words", [
    (["nothing"], "invalid choice"), (["kinds", "--seeds", "99"], "at most 10 seeds"), (["kinds", "--lessons", "0"], "expected 1 or more"),
    (["kinds", "--exercises", "3"], "no less than 16 exercises"), (["kinds", "--model", "nowhere"], "nowhere"),
])
def test_a_mistake_is_one_line(flags, words, tmp_path, capsys):
    assert run(main, [*flags, "--out", str(tmp_path / "out")]) == 2
    assert words in (err := capsys.readouterr().err) and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_quantised_weights_are_refused(tmp_path, capsys):
    """Guards against a traceback: variants begin with a language model of 16 or 32 bits."""
    assert run(quant.main, ["tiny", str(tmp_path / "small"), "--bits", "8"]) == 0
    assert run(main, ["overlay", "--model", str(tmp_path / "small"), "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "is int8; expected 16 or 32 bits" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_panels_join_what_shares_its_values():
    """Guards against curves of different units in one panel."""
    rows = [row(series, x, [[1.0, 0.0]], 0.1) for series in ("a", "b") for x in ("p", "q")]
    rows += [row("c", x, [[1.0, 0.0]], 0.1) | {"unit": "pixels"} for x in (1, 2)]
    rows += [row("d", x, [[1.0, 0.0]], 0.1) | {"unit": "degrees"} for x in (1, 2)]
    rows += [row("e", x, [[1.0, 0.0]], 0.2) for x in ("p", "q")]  # another chance than a's and b's
    assert [list(panel) for panel in figures.panels(rows)] == [["a", "b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize("text", ["{}", "[1]", "no JSON", '{"rows": [{"x": 1}]}', '{"rows": []}',
                                  '{"experiment": "e", "model": "m", "rows": [{"series": "a", "x": 1, "accuracy": "high", "low": 0, "high": 1, "chance": 0}]}',
                                  '{"experiment": "e", "model": "m", "rows": [{"series": [], "x": 1, "accuracy": 1, "low": 0, "high": 1, "chance": 0}]}',
                                  '{"rows": [{"series": "a", "x": 1, "accuracy": 1, "low": 0, "high": 1, "chance": 0}]}', "[" * 100000])
def test_other_files_are_no_results(text, tmp_path, capsys):
    """Guards against a traceback where a folder's other files are given, too."""
    (tmp_path / "about.json").write_text(text)
    assert run(figures.main, ["--markdown", str(tmp_path / "about.json")]) == 2
    assert "about.json holds no results" in capsys.readouterr().err
    assert run(figures.main, [str(tmp_path / "about.json")]) == 2  # also where no figure can be drawn
    assert "about.json holds no results" in capsys.readouterr().err


def test_tables_have_a_line_a_series(tmp_path, capsys):
    """Guards against numbers under another value's name."""
    rows = [row(series, x, [[1.0] * right + [0.0] * (10 - right)], 0.1) for series, x, right in
            (("a", "p", 5), ("a", "q", 9), ("b", "p", 2), ("b", "q", 0))]
    (tmp_path / "r.json").write_text(json.dumps({"experiment": "r", "model": "tiny", "rows": rows}))
    assert run(figures.main, ["--markdown", str(tmp_path / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | p | q |" and lines[2].startswith("| a | 50.0 (23.7 to 76.3) | 90.0 (59.6 to 98.2) |")
    assert lines[3].startswith("| b | 20.0 ") and lines[-1] == "| chance | 10.0 | 10.0 |"
