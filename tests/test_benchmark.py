"""Benchmarks, end to end on the small world's files: what is asked, kept, counted, and the same twice."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import evals.benchmark as benchmark
from commandline import run
from data import benchmarks
from data.batches import SCENES
from data.index import JSONFile
from data.records import check
from data.scenes import generator_for
from evals import pointqa, refcocog, vcr, vipbench, visual7w
from evals.benchmark import interval_of_mean, row, rows, size_of_region

N = 10
EVALUATORS = {
    "visual7w": (visual7w, "v7w-test.json"),
    "pointqa": (pointqa, "pointQA_twice_test.json"),
    "vcr": (vcr, "vcr-val.json"),
    "refcocog": (refcocog, "refcocog-val.json"),
    "vipbench": (vipbench, "ViP-Bench"),
}
KEPT = {"vcr": ("qa", "qar")}  # of the others: answers.jsonl


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "files"
    benchmarks.write(folder, N, seed=5, side=112)  # a seed whose questions get three letters or more
    return folder


def evaluate(name, data, out, *flags):
    module, file = EVALUATORS[name]
    return run(module.main, ["--data", str(data / file), "--out", str(out), "--device", "cpu", *flags])


def texts(out, name) -> list[dict]:
    """For each file of answers: id and number of records -> text."""
    files = [out / f"{file}.jsonl" for file in KEPT.get(name, ["answers"])]
    return [sorted((line["question_id"], line["text"]) for line in benchmark.read_lines(file)) for file in files]


# -- the same number twice -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_run(world, tmp_path_factory):
    """Every evaluator once, one question at a time."""
    out = tmp_path_factory.mktemp("first")
    for name in EVALUATORS:
        assert evaluate(name, world, out / name, "--batch", "1") == 0
    return out


@pytest.mark.parametrize("name", EVALUATORS)
def test_twice_and_in_batches_the_same(name, world, first_run, tmp_path):
    """Guards against unseeded markers, sampled answers, padding that is looked at, and times in what is written."""
    assert evaluate(name, world, tmp_path, "--batch", "8") == 0
    for file in sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*.json*")):
        assert (tmp_path / file).read_bytes() == (first_run / name / file).read_bytes(), file
    assert len({text for file in texts(tmp_path, name) for _, text in file}) > 2  # and not because all are alike


def test_two_processes_the_same(world, first_run, tmp_path):
    """Guards against answers that come in another order, or that depend on who gives them."""
    assert evaluate("visual7w", world, tmp_path, "--processes", "2", "--batch", "3") == 0
    assert (tmp_path / "answers.jsonl").read_bytes() == (first_run / "visual7w/answers.jsonl").read_bytes()


KILLED = """
import multiprocessing, time
from evals import benchmark

def answer(ranks):
    benchmark._start(None, None, ranks, 1)
    print("ready", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ranks = context.SimpleQueue()
    ranks.put(0)
    context.Process(target=answer, args=(ranks,)).start()
    time.sleep(60)
"""


def test_a_killed_run_leaves_no_process(tmp_path):
    """Guards against processes that answer, each with a model in memory, for a first one that was killed."""
    (tmp_path / "killed.py").write_text(KILLED)
    path = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, "killed.py"], cwd=tmp_path, stdout=subprocess.PIPE, env=path) as first:
        assert first.stdout.readline() == b"ready\n"
        first.kill()
        began = time.monotonic()
        assert first.stdout.read() == b""  # which ends once nobody is left to write into it
    assert time.monotonic() - began < 30


def test_a_process_that_cannot_load_says_so(world, tmp_path, capsys):
    """Guards against workers that are started again and again, without a word."""
    shutil.copytree("weights/tiny", tmp_path / "tiny")
    (tmp_path / "tiny/model.safetensors").write_bytes(b"no weights")
    flags = ["--model", str(tmp_path / "tiny"), "--processes", "2", "--batch", "2"]
    assert evaluate("visual7w", world, tmp_path / "out", *flags) == 2
    assert "model.safetensors" in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize("name", ["visual7w", "pointqa", "vcr"])
def test_order_changes_nothing(name, world, first_run, tmp_path):
    """Guards against markers that are drawn by a record's place in the file."""
    file = EVALUATORS[name][1]
    records = json.loads((world / file).read_text())
    (tmp_path / file).write_text(json.dumps(records[::-1]))
    assert evaluate(name, tmp_path, tmp_path / "out", "--images", str(world)) == 0
    assert texts(tmp_path / "out", name) == texts(first_run / name, name)


def test_a_cut_run_goes_on(world, first_run, tmp_path, monkeypatch):
    """Guards against a run that begins anew, or that trips over the half of a line that a killed one left."""
    shutil.copytree(first_run / "visual7w", tmp_path / "out")
    whole = (tmp_path / "out/answers.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "out/answers.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:30])
    asked, answer = [], benchmark.answer
    monkeypatch.setattr(benchmark, "answer", lambda m, t, samples, *rest: asked.extend(samples) or answer(m, t, samples, *rest))
    assert evaluate("visual7w", world, tmp_path / "out") == 0
    assert (tmp_path / "out/answers.jsonl").read_bytes() == whole and len(asked) == N - 4


def test_answers_of_another_run_are_not_taken(world, first_run, tmp_path, capsys):
    """Guards against one table from two seeds, or from weights that have changed since."""
    shutil.copytree(first_run / "visual7w", tmp_path / "out")
    before = (tmp_path / "out/answers.jsonl").read_bytes()
    assert evaluate("visual7w", world, tmp_path / "out", "--seed", "1") == 2
    assert "holds answers of another run (seed 0, now 1)" in capsys.readouterr().err
    assert evaluate("visual7w", world, tmp_path / "out", "--images", str(tmp_path)) == 2
    assert f"another run (images {world.resolve()}, now {tmp_path.resolve()})" in capsys.readouterr().err
    shutil.copytree("weights/tiny", tmp_path / "tiny")
    assert evaluate("visual7w", world, tmp_path / "mine", "--model", str(tmp_path / "tiny")) == 0
    (tmp_path / "tiny/model.safetensors").touch()
    assert evaluate("visual7w", world, tmp_path / "mine", "--model", str(tmp_path / "tiny")) == 2
    assert "another run (weights " in capsys.readouterr().err
    (tmp_path / "out/run.json").unlink()
    assert evaluate("visual7w", world, tmp_path / "out", "--seed", "1") == 2
    assert "holds answers, and no run.json that says of what" in capsys.readouterr().err
    assert (tmp_path / "out/answers.jsonl").read_bytes() == before


# -- what is bad -----------------------------------------------------------------------------------------------------


def test_bad_records_are_wrong_and_asked_again(world, tmp_path, monkeypatch, capsys):
    """Guards against a denominator without the bad records, and against a number that stays when they are mended."""
    records = json.loads((world / "v7w-test.json").read_text())
    records[1]["bboxes"] = records[1]["bboxes"][:3]
    records[4]["image"] = "images/nosuch.png"
    (tmp_path / "v7w-test.json").write_text(json.dumps(records))
    shutil.copytree(world / "images", tmp_path / "images")
    monkeypatch.setattr(benchmark, "answer", lambda m, t, samples, *rest: [s.turns[0].answer for s in samples])
    assert evaluate("visual7w", tmp_path, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "v7w-1: the answer" in out and "v7w-4: image images/nosuch.png is not in" in out and "2 bad records" in out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["rows"]["all"]["score"] == 100 * (N - 2) / N and results["rows"]["all"]["n"] == N
    assert results["bad"] == ["v7w-1", "v7w-4"]
    shutil.copy(tmp_path / "images/v7w-000000.png", tmp_path / "images/nosuch.png")
    assert evaluate("visual7w", tmp_path, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["bad"] == ["v7w-1"]


def test_nothing_is_left_where_all_is_bad(world, tmp_path, monkeypatch, capsys):
    """Guards against: a slip of --images, after which the right folder is refused as another run's."""
    monkeypatch.setattr(benchmark, "answer", lambda m, t, samples, *rest: [s.turns[0].answer for s in samples])
    assert evaluate("visual7w", world, tmp_path / "out", "--images", str(tmp_path)) == 2
    assert f"all {N} records of" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert evaluate("visual7w", world, tmp_path / "out") == 0
    assert evaluate("visual7w", world, tmp_path / "new/out", "--images", str(tmp_path)) == 2 and not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/mine.jsonl").write_text('{"id": 1}\n')
    assert evaluate("visual7w", world, tmp_path / "old", "--images", str(tmp_path)) == 2
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["mine.jsonl"]


def test_what_a_cut_run_of_bad_records_leaves_is_no_run(world, first_run, tmp_path):
    """Guards against: a slip that was cut with Ctrl-C, after which the right command is refused; and a file of the same
    name that is somebody else's."""
    settings = json.loads((first_run / "visual7w/run.json").read_text()) | {"images": "elsewhere"}
    benchmark.write_lines(tmp_path / "answers.jsonl", [{"metadata": {"record": 0, "error": "none"}}])
    (tmp_path / "run.json").write_text('{"name": "mine"}')
    assert evaluate("visual7w", world, tmp_path) == 2 and (tmp_path / "run.json").read_text() == '{"name": "mine"}'
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert evaluate("visual7w", world, tmp_path) == 0
    assert texts(tmp_path, "visual7w") == texts(first_run / "visual7w", "visual7w")


def test_answers_beside_bad_records_keep_their_settings(world, tmp_path, monkeypatch):
    """Guards against answers of VCR's first half that lose what they are of where all of its second half is bad."""
    records = [record | {"rationale_label": 9} for record in json.loads((world / "vcr-val.json").read_text())]
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world/vcr-val.json").write_text(json.dumps(records))
    respond(monkeypatch, lambda sample: sample.turns[0].answer)
    assert evaluate("vcr", tmp_path / "world", tmp_path / "out") == 2
    assert (tmp_path / "out/qa.jsonl").is_file() and (tmp_path / "out/run.json").is_file()


@pytest.mark.parametrize("name", EVALUATORS)
@pytest.mark.parametrize("flags, words", [
    (["--seed", "-1"], "--seed: -1 came; expected 0 or more"), (["--batch", "0"], "--batch: 0 came"),
    (["--processes", "0"], "--processes: 0 came"),
    (["--images", "/nosuch"], "no folder /nosuch"), (["--device", "abacus"], "no device 'abacus'"),
    (["--model", "nosuch"], "no model 'nosuch'"), (["--data", "nosuch"], "no file nosuch"), (["--batch", "x"], "'x' came; expected a whole number"),
])
def test_a_mistake_is_one_line(name, flags, words, world, tmp_path, capsys):
    """Guards against tracebacks, usage pages, and folders that are made before the mistake is found."""
    if name == "vipbench" and flags[0] == "--images":
        words = "unrecognized arguments: --images"  # they have a place of their own
    assert evaluate(name, world, tmp_path / "out", *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()


def test_what_only_the_tags_or_the_pixels_show_is_bad_too(world, tmp_path, capsys):
    """Guards against a run that ends at one record: an empty question, and an image too long and thin to be padded."""
    records = json.loads((world / "v7w-test.json").read_text())
    records[3]["question"] = " "
    records[5] |= {"image": "thin.png"}
    shutil.copytree(world / "images", tmp_path / "images")
    Image.new("1", (2, 20_000)).save(tmp_path / "thin.png")
    boxes = [[0, 1 + 20 * i, 2, 10 + 20 * i] for i in range(4)]
    records[5] |= {"bboxes": boxes, "answer": boxes[1]}
    (tmp_path / "v7w-test.json").write_text(json.dumps(records))
    assert evaluate("visual7w", tmp_path, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "2 bad records" in out and "v7w-3: " in out and "v7w-5: an image of 2 x 20000 pixels is too long" in out


def test_a_damaged_file_of_answers_is_named(world, first_run, tmp_path, capsys):
    shutil.copytree(first_run / "pointqa", tmp_path / "out")
    for damaged in ("{\n{}\n", "{}\n", '{"key": 1}\n', "[]\n"):
        (tmp_path / "out/answers.jsonl").write_text(damaged)
        assert evaluate("pointqa", world, tmp_path / "out") == 2
        assert "answers.jsonl can't be read" in capsys.readouterr().err
    for about in ({}, None, {"record": 0}, {"record": [0], "truth": "A"}, {"record": 0, "truth": "A"}):
        benchmark.write_lines(tmp_path / "out/answers.jsonl", [{"metadata": about, "texts": "A"}])
        assert evaluate("pointqa", world, tmp_path / "out") == 2
        assert "holds lines that were not written here" in capsys.readouterr().err


def test_half_a_letter_is_half_a_line(tmp_path):
    """Guards against a run that can't go on: a line may be cut within a letter of several bytes. And against one that
    ends at half an emoji in a record, which UTF-8 has no bytes for."""
    lines = [{"text": "ein Stück"}, {"text": "\ud83d"}]
    benchmark.write_lines(tmp_path / "a.jsonl", lines)
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(whole + whole[: whole.index("ü".encode()) + 1])
    assert benchmark.read_lines(tmp_path / "a.jsonl", ["text"]) == lines


def test_what_a_caption_ends_with_is_not_what_an_answer_does():
    """Guards against a batch whose first sample decides what all of its answers end with."""
    tiny = checkpoint.load("tiny", "cpu", torch.float32)
    captions, questions = ([SCENES[name](generator_for("val", 0, i), (224, 224)) for i in range(2)] for name in ("captions", "markers"))
    captions = [replace(sample, turns=(replace(sample.turns[0], question=""),)) for sample in captions]
    apart = [text for sample in (*captions, *questions) for text in benchmark.answer(*tiny, [sample], 40)]
    mixed = benchmark.answer(*tiny, [*questions, *captions], 40)
    assert mixed[2:] + mixed[:2] == apart and len(set(apart)) > 2


# -- what is asked and counted ---------------------------------------------------------------------------------------


def respond(monkeypatch, say):
    """Every question is answered by say(sample), and the samples that were asked are returned."""
    asked = []
    monkeypatch.setattr(benchmark, "answer", lambda m, t, samples, *rest: asked.extend(samples) or list(map(say, samples)))
    return asked


@pytest.mark.parametrize("name", ["visual7w", "pointqa", "refcocog", "vipbench"])
def test_the_truth_is_right(name, world, tmp_path, monkeypatch):
    """Guards against a scorer that cannot give full marks, and against one that gives them to wrong answers."""
    respond(monkeypatch, lambda sample: sample.turns[0].answer.upper().replace("<AND>", " ").replace("<OR>", " or "))
    assert evaluate(name, world, tmp_path / "right") == 0
    respond(monkeypatch, lambda sample: "xyzzy")
    assert evaluate(name, world, tmp_path / "wrong") == 0
    right, wrong = (json.loads((tmp_path / f"{k}/results.json").read_text())["rows"]["all"] for k in ("right", "wrong"))
    assert wrong["score"] == 0 and (right["score"] > 300 if name == "refcocog" else right["score"] == 100)


def test_vcr_counts_both_on_the_same_record(world, tmp_path, monkeypatch):
    """Guards against Q->AR as a product of two means: answers are right for even records, reasons for the first six."""
    records = json.loads((world / "vcr-val.json").read_text())

    def say(sample):
        i = next(i for i, record in enumerate(records) if sample.open.args[0].name in record["image"])
        reason = "rationale" in sample.turns[0].question
        return sample.turns[0].answer if (i < 6 if reason else i % 2 == 0) else "E"

    asked = respond(monkeypatch, say)
    assert evaluate("vcr", world, tmp_path) == 0
    table = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [table[name]["score"] for name in ("Q->A", "QA->R", "Q->AR")] == [50, 60, 30]
    assert {marker.kind for sample in asked for marker in sample.markers} == {"point"}
    assert {round(255 * marker.alpha) for sample in asked for marker in sample.markers} == {128}
    assert all('" The answer is "' in sample.turns[0].question for sample in asked[N:])
    labels = [record[f"{key}_label"] for key in ("answer", "rationale") for record in records]
    assert [sample.turns[0].answer for sample in asked] == ["ABCD"[label] for label in labels] and len(set(labels)) > 1


def test_a_bad_record_of_vcr_is_listed_once(world, tmp_path, monkeypatch, capsys):
    """Guards against two bad records for one: it is asked about twice, and wrong both times."""
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world/images/vcr-000003.png").unlink()
    respond(monkeypatch, lambda sample: sample.turns[0].answer)
    assert evaluate("vcr", tmp_path / "world", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "1 bad records" in out and out.count("vcr-3: ") == 1
    table = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [table[name]["score"] for name in ("Q->A", "QA->R", "Q->AR")] == [90, 90, 90]


def test_vcr_squeezes_and_the_others_pad(world, tmp_path, monkeypatch):
    """Guards against one way of image handling for all: the paper's VCR evaluation ignores the aspect ratio."""
    modes = {}
    for name in EVALUATORS:
        def note(image, size, mode, name=name):
            modes.setdefault(name, set()).add(mode)
            return benchmark.torch.zeros(3, size, size)

        monkeypatch.setattr(benchmark, "preprocess", note)
        assert evaluate(name, world, tmp_path / name) == 0
    assert modes == {name: {"squeeze" if name == "vcr" else "pad"} for name in EVALUATORS}


def test_vcr_marks_more_things_than_colors_have_names(world, tmp_path, monkeypatch):
    """Guards against a record that counts as bad because eleven people are spoken of."""
    records = json.loads((world / "vcr-val.json").read_text())[:1]
    meta = json.loads((world / "vcr/000000.json").read_text())
    meta = {key: (values * 11)[:11] for key, values in meta.items()}
    (tmp_path / "vcr").mkdir()
    (tmp_path / "vcr/000000.json").write_text(json.dumps(meta))
    shutil.copytree(world / "images", tmp_path / "images")
    records[0] |= {"class_names": ["person"] * 11, "question": ["Where are", list(range(11)), "?"]}
    (tmp_path / "vcr-val.json").write_text(json.dumps(records))
    asked = respond(monkeypatch, lambda sample: "A")
    monkeypatch.setattr(benchmark.Respondent, "__init__", roomy(benchmark.Respondent.__init__))
    assert evaluate("vcr", tmp_path, tmp_path / "out") == 0
    assert [len(sample.markers) for sample in asked][0] == 11 and len({m.color for m in asked[0].markers}) == 11


def roomy(init):
    """A model whose context is not in the way."""

    def wrapped(self, *args):
        init(self, *args)
        object.__setattr__(self.model.config.text, "context", 4096)

    return wrapped


def test_visual7w_marks_four_boxes_of_one_width(world, tmp_path, monkeypatch):
    """Guards against the markers of training in an evaluation: width 3 at 336 pixels, alpha 128, four different colors."""
    asked = respond(monkeypatch, lambda sample: "A")
    assert evaluate("visual7w", world, tmp_path) == 0
    for sample in asked:
        assert [m.kind for m in sample.markers] == ["rectangle"] * 4 and len({m.color for m in sample.markers}) == 4
        assert {m.width for m in sample.markers} == {1} and {round(255 * m.alpha) for m in sample.markers} == {128}


def test_phrases_of_one_region_are_one_question(world, tmp_path, monkeypatch):
    """Guards against a region that counts twice, and against an answer that is held against half of its truths."""
    asked = respond(monkeypatch, lambda sample: sample.turns[0].answer)
    assert evaluate("refcocog", world, tmp_path, "--marker", "ellipse") == 0
    records = json.loads((world / "refcocog-val.json").read_text())
    assert len(asked) == N < len(records) and {m.kind for s in asked for m in s.markers} == {"ellipse"}
    truth = json.loads((tmp_path / "coco-annotations.json").read_text())
    answers = json.loads((tmp_path / "coco-results.json").read_text())
    assert len(truth["annotations"]) == len(records) and len(truth["images"]) == len(answers) == N
    assert {one["image_id"] for one in answers} == {one["id"] for one in truth["images"]}


def test_a_bad_record_does_not_stand_for_a_good_one(tmp_path):
    """Guards against a region that nobody asks about, because the first record of it has no phrase."""
    records = [{"image": "a.png", "bboxes": [[1, 2, 3, 4]], "answer": answer} for answer in (None, "a man", "the man")]
    (tmp_path / "some.json").write_text(json.dumps(records))
    assert refcocog.regions(JSONFile(tmp_path / "some.json")) == {0: [], 1: ["a man", "the man"]}


@pytest.mark.parametrize("answer", ["", " ", "half a \ud83d"])
def test_a_phrase_that_is_none_is_no_truth(world, tmp_path, monkeypatch, capsys, answer):
    """Guards against a bad record that hides behind a good one of the same region, and lowers its score."""
    respond(monkeypatch, lambda sample: sample.turns[0].answer)
    shutil.copytree(world / "images", tmp_path / "images")
    records = json.loads((world / "refcocog-val.json").read_text())
    (tmp_path / "refcocog-val.json").write_text(json.dumps([*records, {**records[0], "answer": answer}]))
    scores = []
    for folder in (world, tmp_path):
        assert evaluate("refcocog", folder, tmp_path / f"out-{folder.name}", "--marker", "ellipse") == 0
        said = json.loads((tmp_path / f"out-{folder.name}" / "results.json").read_text())
        scores.append((said["rows"]["all"]["score"] * said["rows"]["all"]["n"], len(said["bad"])))
    assert scores == [(pytest.approx(scores[1][0]), 0), (scores[1][0], 1)]


def test_a_table_that_nobody_reads_is_kept(world, tmp_path, monkeypatch):
    """Guards against results that are lost with `… | head -1`."""
    respond(monkeypatch, lambda sample: sample.turns[0].answer)
    monkeypatch.setattr("builtins.print", lambda *_, **__: (_ for _ in ()).throw(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        pointqa.main(["--data", str(world / "pointQA_twice_test.json"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert (tmp_path / "out" / "results.json").is_file()


def test_numbers_in_words_count_after_the_clean_up(world, tmp_path, monkeypatch):
    """Guards against a clean-up that leaks into the exact match, and one that is not done."""
    words = "zero one two three four five six seven".split()
    respond(monkeypatch, lambda sample: f"{words[int(sample.turns[0].answer)].title()}.")
    assert evaluate("pointqa", world, tmp_path) == 0
    table = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert table["all"]["score"] == 0 and table["all, cleaned up"]["score"] == 100


def test_rows_go_by_tags():
    """Guards against a breakdown whose parts don't add up, by hand: a bad record is in "all" only."""
    lines = [{"metadata": {"record": k, "truth": "A", "region": region}} for k, region in enumerate(["small", "small", "large"])]
    lines.append({"metadata": {"record": 3, "where": "line 9", "error": "no image"}})
    table = rows(lines, [True, False, True, False])
    assert {name: (said["score"], said["n"]) for name, said in table.items()} == {
        "all": (50, 4), "region large": (100, 1), "region small": (50, 2)}


def test_intervals_of_means():
    """Guards against an interval of proportions for grades: beside the mean ± 1.96 standard errors."""
    values = np.random.default_rng(1).random(400).tolist()
    low, high = interval_of_mean(values)
    error = 1.96 * np.std(values) / 20
    assert low == pytest.approx(np.mean(values) - error, abs=0.005) and high == pytest.approx(np.mean(values) + error, abs=0.005)
    assert row([0.0, 0.0, 0.0])["high"] == row([False] * 3)["high"] > 50  # matches count as answers do
    assert row([0.25, 0.75])["score"] == 50 and row([True] * 10)["low"] == pytest.approx(72.25, abs=0.01)


@pytest.mark.parametrize("box, name", [((0, 0, 34, 9), "small"), ((0, 0, 44, 50), "medium"), ((0, 0, 45, 50), "large")])
def test_sizes_of_regions(box, name):
    """Guards against a wide box that is taken for a large one: of 200 x 100 pixels, 1/8 is 17.7 and 1/3 47.1."""
    assert size_of_region(box, (200, 100)) == name


def test_a_prompt_without_room_for_an_answer_is_bad(world, tmp_path, capsys):
    """Guards against an answer that is cut by its batch's longest prompt: the limit is the model's, and it is said."""
    records = json.loads((world / "pointQA_twice_test.json").read_text())
    records[2]["general_question"] = "How many? " * 100
    (tmp_path / "pointQA_twice_test.json").write_text(json.dumps(records))
    assert evaluate("pointqa", tmp_path, tmp_path / "out", "--images", str(world)) == 0
    assert "pointQA_twice-2: " in (out := capsys.readouterr().out) and "expected them to fit the model's context of 512" in out


def test_readers_of_the_small_world_are_those_of_training(world):
    """Guards against files that only the evaluators can read."""
    for file in ("v7w-test", "pointQA_twice_test", "vcr-val", "refcocog-val"):
        assert check(Path(world / f"{file}.json"), world) == 0
        assert len(JSONFile(world / f"{file}.json")) >= N
