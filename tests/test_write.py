"""Drawn scenes as files: do records say what the pixels say?"""
import json

import numpy as np
import pytest
from PIL import Image

from commandline import run
from data.records import Records
from data.scenes import OBJECT_COLORS, caption, generator_for, sample_scene
from data.write import main, records



def test_written_records_are_official_and_say_what_the_pixels_say(tmp_path):
    """Guards against boxes as x, y, width, height, nested or unflattened polygons, missing images, and regions and
    captions that tell of different scenes."""
    assert run(main, ["records", str(tmp_path / "out"), "-n", "5", "--size", "96", "--seed", "7"]) == 0
    out = tmp_path / "out"
    regions, captions = (json.loads((out / f"{name}.json").read_text()) for name in ("regions", "captions"))
    assert len(regions) == len(captions) == 5 and len({record["id"] for record in regions}) == 5
    for region, told in zip(regions, captions):
        assert region["id"].split("-")[0] == "refcocog"
        (x0, y0, x1, y1), = region["bboxes"]
        (flat,), = region["segmentations"]
        assert [min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2])] == [x0, y0, x1, y1]
        image = Image.open(out / region["image"])
        assert image.size == (96, 96) and told["image"] == region["image"]
        human, gpt = told["conversations"]
        assert human == {"from": "human", "value": "<image>"} and gpt["from"] == "gpt"
        color, shape = region["answer"].split()[1:]
        assert f" {color} {shape}." in gpt["value"]
        pixels = np.array(image.crop((x0, y0, x1, y1))).reshape(-1, 3).astype(int)
        assert (abs(pixels - OBJECT_COLORS[color]).max(1) < 30).mean() > 0.2


def test_houses_are_records_of_a_new_task(tmp_path):
    """Guards against a fine-tuning example that teaches nothing new, whose records can't be read, or that is tested on
    what it was trained on."""
    assert run(main, ["houses", str(tmp_path / "out"), "-n", "30"]) == 0
    told = {}
    for split in ("train", "test"):
        data = Records([tmp_path / "out" / f"{split}.json"], tmp_path / "out")
        samples = list(data)
        assert len(samples) == 30 and all(len(sample.markers) == 1 and sample.image.size == (224, 224) for sample in samples)
        told[split] = [sample.turns[0].answer for sample in samples]
        assert 5 <= sum(answer.endswith("house") for answer in told[split]) <= 20
    assert told["train"] != told["test"] and not any("house" in caption(sample_scene(generator_for("train", 5, i))) for i in range(50))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    """Guards against a run that mixes its files with those of another."""
    (tmp_path / "mine.txt").write_text("keep")
    assert run(main, ["records", str(tmp_path), "-n", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: ") and [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    records(tmp_path / "empty", 1)
    assert len(list((tmp_path / "empty" / "images").iterdir())) == 1


@pytest.mark.parametrize("arguments", [["records", "OUT", "-n", "0"], ["records", "OUT", "--split", "dev"], ["records"],
                                       ["records", "OUT", "-n", "many"], ["paint", "OUT"], [],
                                       ["sheet", "OUT/no/a.png"],
                                       ["records", "OUT", "--size", "5"], ["records", "OUT", "--seed", "-1"],
                                       ["example", "OUT.nosuchtype"]])
def test_bad_arguments_end_in_one_line(arguments, tmp_path, capsys):
    """Guards against tracebacks, usage pages, and half a folder left behind."""
    arguments = [argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]
    status = run(main, arguments)
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert list(tmp_path.iterdir()) == []


def test_sheet_and_example_are_images(tmp_path):
    """Guards against documented commands that no longer run, or that run but once."""
    for name in ("sheet", "example", "rich", "three", "markers") * 2:
        assert run(main, [name, str(tmp_path / f"{name}.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").width >= 4 * 224
    assert Image.open(tmp_path / "example.png").size == (448, 448)


@pytest.mark.parametrize("name", ["sheet", "example", "rich", "three", "markers"])
def test_a_picture_that_is_not_ours_is_not_replaced(name, tmp_path, capsys):
    """Guards against a photo that is lost to a picture of that name."""
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    assert run(main, [name, str(tmp_path / "photo.png")]) == 2 and (tmp_path / "photo.png").read_bytes() == before
    assert "photo.png is there already, and doesn't say that it was drawn here; expected" in capsys.readouterr().err
