"""Evaluation on held-out scenes: what is counted, against what."""

from collections import Counter

import pytest

import evals.scenes as scenes_eval
from commandline import run
from data import benchmarks, questions, scenes
from evals.scenes import chance, evaluate, interval
from overlay import KINDS


def test_exact_answers_are_counted_by_kind(monkeypatch):
    """Guards against an accuracy that counts near misses, or mixes up the kinds of marker."""

    def right_about_arrows(model, tokenizer, samples, max_new_tokens, said):
        return [s.turns[0].answer if s.markers[0].kind == "arrow" else s.turns[0].answer + "s" for s in samples]

    monkeypatch.setattr(scenes_eval, "answer", right_about_arrows)
    table = evaluate(None, None, 41, side=64, batch=9)
    by_kind = {kind: (5 * (kind == "arrow"), 6 if kind == "rectangle" else 5) for kind in KINDS}
    assert table == by_kind | {"all": (5, 41)}


def test_every_task_of_training_is_asked_and_counted(monkeypatch, capsys):
    """Guards against a task that is left out, and against the commonest answer of other questions."""
    asked = []

    def one_letter(model, tokenizer, samples, max_new_tokens, said):
        turns = [sample.turns[len(texts)] for sample, texts in zip(samples, said)]
        asked.extend(turn for turn in turns if "sum" in turn.question or not said[0] and "What number" not in turn.question)
        return ["A"] * len(samples)

    monkeypatch.setattr(scenes_eval, "answer", one_letter)
    monkeypatch.setattr(scenes_eval.checkpoint, "load", lambda *args: (None, None))
    assert run(scenes_eval.main, ["--tasks", "-n", "20", "--side", "64", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(scenes_eval.TASKS) and len(asked) == 20 * len(lines)
    spelled = {f"{name}-spelled" for name in ("v7w", "vcr-choice")}
    drilled = {"signs", "vip-math-steps", *spelled, *(f"vip-{name}" for name in benchmarks.CAPABILITIES)}
    assert {"captions", "marked", *benchmarks.OFFICIAL, "vcr-choice", *drilled} == set(scenes_eval.TASKS)
    for k, line in enumerate(lines):
        answers = Counter(turn.answer for turn in asked[20 * k : 20 * k + 20])
        assert f"({answers['A']} of 20)" in line and line.endswith(f"{max(answers.values()) / 20:5.1%}")
    assert "v7w" in lines[2] and int(lines[2].split("(")[1].split()[0]) > 0


def test_steps_are_asked_after_the_model_s_own_answers(monkeypatch):
    """Guards against steps that are told the truth, and against counting another answer than the last."""

    def off_by_one(model, tokenizer, samples, max_new_tokens, said):  # in the numbers, not in their sum
        turns = [sample.turns[len(texts)] for sample, texts in zip(samples, said)]
        assert all(["sum" in turn.question for turn in turns]) == (len(said[0]) == 2)
        for sample, texts in zip(samples, said):
            assert texts == [f"{turn.answer}?" for turn in sample.turns[: len(texts)]]
        return [turn.answer if len(said[0]) == 2 else f"{turn.answer}?" for turn in turns]

    monkeypatch.setattr(scenes_eval, "answer", off_by_one)
    assert evaluate(None, None, 9, source="vip-math-steps", side=64)["all"] == (9, 9)
    assert 0.05 < scenes_eval.commonest("vip-math-steps", 100, side=64) < 0.3  # of sums, not of numbers


def test_unmarked_asks_the_same_without_markers(monkeypatch):
    """Guards against a baseline without markers that still sees them, or that is asked something else."""
    seen = []
    monkeypatch.setattr(scenes_eval, "answer", lambda m, t, samples, limit, said: seen.extend(samples) or [""] * len(samples))
    evaluate(None, None, 8, side=64)
    evaluate(None, None, 8, side=64, unmarked=True)
    assert all(len(s.markers) == 1 for s in seen[:8]) and all(s.markers == () for s in seen[8:])
    assert [s.turns for s in seen[:8]] == [s.turns for s in seen[8:]]


def test_held_out_scenes_are_not_those_of_training():
    """Guards against a test split that repeats the training stream."""
    generators = [scenes.generator_for(split, 0, 0) for split in scenes.SPLITS]
    pictures = {questions.test_sample(generator, (64, 64), "point").image.tobytes() for generator in generators}
    assert len(pictures) == len(scenes.SPLITS) == 3


def test_chance_is_one_over_the_objects_of_the_scenes_asked_about():
    """Guards against a chance level of other scenes: the objects are counted again from the caption of the same ones."""
    n = 30
    captions = [questions.caption_sample(scenes.generator_for("test", 0, i), (64, 64)).turns[0].answer for i in range(n)]
    assert chance(n, side=64) == pytest.approx(sum(1 / caption.count(".") for caption in captions) / n)


@pytest.mark.parametrize("right, seen, low, high", [(90, 100, 0.8256, 0.9448), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)])
def test_interval(right, seen, low, high):
    """Guards against the simple interval, which is [1, 1] at ten of ten. Values from Wilson's formula by hand."""
    assert interval(right, seen) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize("flags, words", [
    (["-n", "7"], "argument -n: 7 came; expected 8 or more"), (["--seed", "-1"], "--seed: -1 came; expected 0 or more"),
    (["--side", "8"], "--side: 8 came; expected 32 or more"),
    (["--split", "dev"], "invalid choice: 'dev'"), (["--device", "abacus"], "no device 'abacus'"),
    (["--model", "nosuch"], "no model 'nosuch'"),
])
def test_a_mistake_is_one_line(flags, words, capsys):
    """Guards against tracebacks and usage pages."""
    assert run(scenes_eval.main, flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err
