"""The small world's benchmarks: truths worked out again from pixels and from what the records say."""

import collections
import json
import re

import numpy as np
import pytest
from PIL import Image

from commandline import run
from data import benchmarks, scenes
from data.batches import SCENES
from data.readers import LETTER
from data.scenes import OBJECT_COLORS, SHAPES
from overlay import phrase


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "files"
    benchmarks.write(folder, 24)
    return folder


def load(world, name):
    return json.loads((world / name).read_text())


def color_at(image: Image.Image, box) -> str:
    """The object's color that most of a box's pixels are nearest to, of those that are near one at all."""
    pixels = np.asarray(image.crop(box)).reshape(-1, 1, 3).astype(int)
    distances = np.abs(pixels - np.array(list(OBJECT_COLORS.values()))).max(axis=2)  # (pixels, colors)
    near = distances.argmin(axis=1)[distances.min(axis=1) < 20]
    return list(OBJECT_COLORS)[np.bincount(near).argmax()]


def test_visual7w_asks_for_one_of_four(world):
    """Guards against an answer that is no choice, and against a question whose truth is another box: by the pixels."""
    records = load(world, "v7w-test.json")
    for record in records:
        assert len(record["bboxes"]) == 4 and record["bboxes"].count(record["answer"]) == 1
        x0, y0, x1, y1 = record["answer"]
        if "at the" in record["question"]:
            place = record["question"].removeprefix("Which object is at the ").removesuffix("?")
            row, column = int(3 * (y0 + y1) / 2 / 224), int(3 * (x0 + x1) / 2 / 224)
            assert scenes.POSITIONS[row][column] == place
        else:
            named = next(color for color in OBJECT_COLORS if f" {color}" in record["question"])
            crop = np.asarray(Image.open(world / record["image"]).crop((x0, y0, x1, y1))).reshape(-1, 3)
            near = np.abs(crop.astype(int) - OBJECT_COLORS[named]).max(axis=1) < 24
            assert near.mean() > 0.2, record
    assert len({record["bboxes"].index(record["answer"]) for record in records}) == 4  # and not always the first


def test_look_twice_counts_what_the_marker_shows():
    """Guards against a count of another shape, of all objects, or of the marked object's color."""
    counts = []
    for i in range(40):
        made = benchmarks.point_qa(benchmarks.generator_for("test", 0, i, 2), 64)
        (record,) = made.records
        (thing,) = (thing for thing in made.scene.objects if [list(thing.box)] == record["bboxes"])
        counts.append((sum(other.shape == thing.shape for other in made.scene.objects), len(made.scene.objects)))
        assert record["answer"] == str(counts[-1][0])
    assert sum(count < total for count, total in counts) > 25  # the marker decides


def test_vcr_s_reason_is_the_answer_s(world):
    """Guards against a rationale that explains another answer; the boxes tell which is true."""
    for record in load(world, "vcr-val.json"):
        boxes = load(world, record["meta_dir"].removeprefix("./dataset/"))["boxes"]
        (a,), (b,) = record["question"][1], record["question"][4]
        dx, dy = ((boxes[a][k] + boxes[a][k + 2] - boxes[b][k] - boxes[b][k + 2]) / 2 for k in (0, 1))
        way = ("left of" if dx < 0 else "right of") if abs(dx) >= abs(dy) else ("above" if dy < 0 else "below")
        assert record["answer_choices"][record["answer_label"]] == [[a], f"is {way}", [b], "."]
        assert record["rationale_choices"][record["rationale_label"]] == [[a], benchmarks.WAYS[way], [b], "."]
        assert len({json.dumps(choice) for choice in record["answer_choices"]}) == 4


def test_triplets_and_grounded_captions_are_true(world):
    """Guards against a subject and an object exchanged, and against groups of boxes that other words stand before."""
    for record in load(world, "vg_rel-test.json"):
        (a, b), (subject, way, thing) = record["bboxes"], record["answer"].strip("()").split(", ")
        assert color_at(Image.open(world / record["image"]), a) == subject.split()[-2], record
        assert color_at(Image.open(world / record["image"]), b) == thing.split()[-2], record
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[way]
        assert sign * (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) > 0
    for record in load(world, "flickr30k-test.json"):
        told = record["grounding"].removeprefix("from left to right ").split(", ")
        assert len(told) == len(record["bbox"]) > 1
        for k, (text, (box,)) in enumerate(zip(told, record["bbox"])):
            assert text.endswith(f" <bbox{k}>") and color_at(Image.open(world / record["image"]), box) == text.split()[-3], record
        assert [box for (box,) in record["bbox"]] == sorted((box for (box,) in record["bbox"]), key=lambda b: b[0] + b[2])


@pytest.mark.parametrize("kind", benchmarks.OFFICIAL)
def test_samples_for_training_are_what_their_files_would_be(kind):
    """Guards against a way past the disk that asks other things, or marks nothing."""
    for i in range(5):
        one, two = (benchmarks.sample(kind, scenes.generator_for("train", 0, i), (96, 96)) for _ in range(2))
        assert one.turns == two.turns and one.image.size == (96, 96) and one.turns[0].image
        assert all(turn.answer and turn.question for turn in one.turns) and len(one.markers) >= 1


def test_vcr_is_trained_as_it_is_tested():
    """Guards against a model that learns "(B)" where the evaluation wants "B"."""
    seen = set()
    for i in range(30):
        (turn,) = benchmarks.sample("vcr-choice", scenes.generator_for("train", 0, i), (64, 64)).turns
        assert turn.answer in "ABCD" and "\nD. The object" in turn.question and turn.question.endswith(LETTER)
        seen.add((turn.answer, "rationale" in turn.question))
    assert len(seen) == 8


def test_vip_bench_is_trained_as_it_is_asked():
    """Guards against gaps that stay, alternatives in an answer, and signs that nobody sees."""
    seen = {}
    for i in range(60):
        sample = benchmarks.vip_sample(scenes.generator_for("train", 0, i), (64, 64))
        (turn,) = sample.turns
        assert "<" not in turn.question + turn.answer and all(phrase(marker) in turn.question for marker in sample.markers)
        seen[turn.question.split("object")[0]] = turn.answer
        if "What letter" in turn.question:
            assert turn.answer in scenes.LETTERS
        if "sum" in turn.question:
            assert 2 <= int(turn.answer) <= 18 and len(sample.markers) == 2
    assert len(seen) == 6


@pytest.mark.parametrize("capability, words", [("rec", "What is"), ("ocr", "letter"), ("know", "corners|lines of symmetry"), ("math", "sum"),
                                               ("rel", "related"), ("lang", "Describe")])
def test_one_capability_alone(capability, words):
    """Guards against a capability that asks another one's questions, and descriptions in an order that nobody knows."""
    for i in range(8):
        sample = SCENES[f"vip-{capability}"](scenes.generator_for("train", 0, i), (64, 64))
        assert re.search(words, sample.turns[0].question)
        if capability == "lang":
            (scene,) = sample.open.args
            marked, *others = sample.turns[0].answer.split(", ")
            assert [look for look in map(scenes.look_of, scenes.reading_order(scene)) if look != marked] == \
                   [look for look in others if look != marked]


def test_corners_and_lines_of_symmetry_are_those_of_the_shapes():
    """Guards against knowledge that is none: a shape is turned over along every line through its middle, and compared."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1.1, 1.1, 90)] * 2), -1).reshape(-1, 2)

    def inside(polygon, points):
        a, b = polygon, np.roll(polygon, -1, 0)
        crosses = (a[:, 1] > points[:, None, 1]) != (b[:, 1] > points[:, None, 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            x = (b[:, 0] - a[:, 0]) * (points[:, None, 1] - a[:, 1]) / (b[:, 1] - a[:, 1]) + a[:, 0]
        return (crosses & (points[:, None, 0] < x)).sum(1) % 2 == 1

    for shape, lines in benchmarks.MIRRORS.items():
        polygon = scenes.SHAPES[shape]
        full = inside(polygon, grid)
        middle, same = grid[full].mean(0), []
        for angle in np.radians(np.arange(180)):
            turned = (grid - middle) @ [[np.cos(2 * angle), np.sin(2 * angle)], [np.sin(2 * angle), -np.cos(2 * angle)]] + middle
            mirrored = inside(polygon, turned)
            same.append((mirrored & full).sum() / (mirrored | full).sum())
        peaks = [k for k in range(180) if same[k] > 0.93 and same[k - 1] <= same[k] > same[(k + 1) % 180]]
        assert len(peaks) == lines, (shape, peaks)
    asked = collections.Counter()
    for i in range(200):
        sample = SCENES["vip-know"](scenes.generator_for("train", 0, i), (64, 64))
        (scene,), (turn,) = sample.open.args, sample.turns
        truths = benchmarks.CORNERS if "corners" in turn.question else benchmarks.MIRRORS
        assert turn.answer in {str(truths[thing.shape]) for thing in scene.objects if thing.shape in truths}
        asked[turn.question.split(" does")[0]] += 1
    assert 70 < asked["How many corners"] < 130 and asked.keys() == {"How many corners", "How many lines of symmetry"}


def test_vip_bench_has_six_capabilities_and_two_splits(world):
    """Guards against splits that ask different things, against gaps that stay, and against truths of other objects."""
    folder = world / "ViP-Bench"
    meta = load(folder, "vip-bench-meta-data.json")
    assert {name for truth in meta.values() for name in truth["capability"]} == {"rec", "ocr", "know", "math", "rel", "lang"}
    lines = {split: [json.loads(line) for line in (folder / split / "questions.jsonl").read_text().splitlines()]
             for split in ("bbox", "human")}
    for k, (box, hand) in enumerate(zip(lines["bbox"], lines["human"])):
        truth, source = meta[f"v1_{k}"], load(folder / "source_image", f"v1_{k}.json")
        assert box["question_id"] == hand["question_id"] == k and box["image"] == truth["image"]
        assert "<" not in box["text"] + hand["text"] and "rectangle" in box["text"] and "rectangle" not in hand["text"]
        assert [shape["label"] for shape in source["shapes"]] == ["obj", "obj1"][: truth["question"].count("<obj")]
        plain, *marked = (np.asarray(Image.open(folder / path / truth["image" if "images" in path else "image_source"])).astype(int)
                          for path in ("source_image", "bbox/images", "human/images"))
        assert all((np.abs(one - plain).sum(axis=2) > 0).sum() > 20 for one in marked)
        if truth["capability"] == ["rec"]:
            *_, color, shape = truth["answer"].split()
            (x0, y0), (x1, y1) = source["shapes"][0]["points"]
            near = np.abs(plain - OBJECT_COLORS[color]).max(axis=2) < 24
            assert near[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1].mean() > 0.15 and shape in SHAPES


def test_letters_can_be_read(world):
    """Guards against a letter in its object's color: both black and white objects bear one that differs."""
    for thing in (scenes.make_object("circle", color, "large", (50, 50), 30) for color in OBJECT_COLORS):
        image = Image.new("RGB", (100, 100), thing.rgb)
        scenes.write_on(image, thing, "K")
        distances = np.hypot.reduce(np.asarray(image).astype(int) - thing.rgb, axis=2)
        assert (distances > 100).sum() > 50, thing.color


def test_files_are_the_same_twice_and_no_split_repeats_another(tmp_path):
    """Guards against unseeded files, and against test scenes in the training split."""
    for name, split in (("a", "test"), ("b", "test"), ("c", "train")):
        assert run(benchmarks.main, [str(tmp_path / name), "-n", "6", "--size", "64", "--split", split]) == 0
    files = {name: sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.*")) for name in "abc"}
    assert files["a"] == files["b"] and len(files["a"]) == len(files["c"]) > 50
    assert {path.name for path in set(files["c"]) - set(files["a"])} == {
        "v7w-train.json", "pointQA_twice_train.json", "vcr-train.json", "refcocog-train.json", "vg_rel-train.json",
        "flickr30k-train.json"}
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files["a"])
    pictures = [path for path in files["a"] if path.suffix == ".png"]
    assert all((tmp_path / "a" / path).read_bytes() != (tmp_path / "c" / path).read_bytes() for path in pictures)


@pytest.mark.parametrize("flags, words", [
    (["-n", "0"], "n is 0"), (["--size", "8"], "size 8"), (["--seed", "-1"], "--seed: -1 came"), (["--split", "dev"], "invalid choice"),
])
def test_a_mistake_is_one_line(flags, words, tmp_path, capsys):
    """Guards against tracebacks and half a folder."""
    assert run(benchmarks.main, [str(tmp_path / "out"), *flags]) == 2
    assert words in (err := capsys.readouterr().err) and err.count("\n") == 1 and list(tmp_path.iterdir()) == []
