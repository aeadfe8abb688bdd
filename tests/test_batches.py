"""Batches: each sample once, of like length, the same for any number of workers and processes."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from chat import IMAGE, Turn
from clip import VisionConfig
from data import questions, scenes
from data.batches import POOL, Examples, RecordSource, SceneSource, batches, collate, encode, parse_mix
from data.records import BadRecord
from llama import LlamaConfig
from recipe import Recipe
from train import tiny_model
from vipllava import IGNORE, ViPLLaVAConfig


@pytest.fixture(scope="module")
def small():
    """A random model of 9 patches, and its tokenizer."""
    vision = VisionConfig(image_size=24, patch_size=8, width=20, layers=2, heads=5, mlp=28)
    text = LlamaConfig(1024, width=24, layers=3, heads=4, kv_heads=2, mlp=36, context=256)
    return tiny_model(Recipe("markers", steps=1, side=64), ViPLLaVAConfig(vision, text, feature_layers=(-2, 1)))


def examples(small, mix="markers", seed=0):
    return Examples(SceneSource(mix, seed, 64), small[1], small[0].config, False, 1000)


def test_labels_are_exactly_the_answers(small):
    """Guards against labels shifted by the expansion of the image, against a trained question, an untrained end."""
    model, tokenizer = small
    for index in range(20):
        sample = questions.marker_sample(scenes.generator_for("train", 0, index), (64, 64))
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


def test_a_dialogue_keeps_its_turns(small):
    """Guards against a dialogue that begins with a caption, of which nothing else is trained."""
    model, tokenizer = small
    sample = questions.marker_sample(scenes.generator_for("train", 0, 0), (64, 64))
    turns = (Turn("", "a red star", image=True), Turn("What color?", "blue"))
    learned = []
    for n in (1, 2):
        _, labels, _ = encode(dataclasses.replace(sample, turns=turns[:n]), tokenizer, model.config)
        learned.append(tokenizer.decode(i for i in labels if i not in (IGNORE, tokenizer.eos)).split())
    assert learned == [["a", "red", "star"], ["a", "red", "star", "blue"]]


def test_padding_is_not_trained(small):
    """Guards against a loss that learns to write padding: its labels must be IGNORE."""
    rows = [examples(small)[0], examples(small)[1]]
    rows[0] = dataclasses.replace(rows[0], ids=[5, 6], labels=[IGNORE, 6], pixels=None)
    rows[1] = dataclasses.replace(rows[1], ids=[5, 6, 7], labels=[IGNORE, 6, 7])
    micro = collate(rows)
    assert micro.ids.tolist() == [[5, 6, 0], [5, 6, 7]] and micro.labels.tolist() == [[IGNORE, 6, IGNORE], [IGNORE, 6, 7]]
    assert micro.pixels.shape == (1, 3, 24, 24) and micro.names == ["scene 0", "scene 1"]


def test_samples_depend_on_seed_and_number_only(small):
    """Guards against a shared random stream, with which workers or a resumed run would see other data."""
    ahead, again = [examples(small)[i] for i in (7, 3)], [examples(small)[i] for i in (7, 3)]
    assert all(a.ids == b.ids and torch.equal(a.pixels, b.pixels) for a, b in zip(ahead, again))
    assert not torch.equal(ahead[0].pixels, examples(small, seed=1)[7].pixels)


def test_mix_is_drawn_in_its_shares(small):
    """Guards against shares that are read but not used. 400 draws of a 3:1 mix: five sigma is 0.11."""
    assert parse_mix("markers=3,captions=1") == (["markers", "captions"], [0.75, 1.0])
    source = SceneSource("markers=3,captions=1", 0, 64)
    plain = [source.sample(j).turns[0].question == "" for j in range(400)]
    assert abs(sum(plain) / 400 - 0.25) < 0.11


def names(steps):
    return [[name for micro in micros for name in micro.names] for micros, bad in steps]


def test_each_sample_once_of_like_length_and_the_same_after_a_resume(small):
    """Guards against samples lost or repeated at a pool's end, against padding, and another order after a stop."""
    last, batch = POOL + 3, 4
    steps = list(batches(examples(small), batch, 0, 0, last))
    whole = names(steps)
    assert len(whole) == last and all(len(step) == batch for step in whole)
    assert sorted(n for step in whole[:POOL] for n in step) == sorted(f"scene {j}" for j in range(POOL * batch))
    assert len({n for step in whole for n in step}) == last * batch
    ids = [micro.ids for micros, _ in steps[:POOL] for micro in micros]
    assert sum((x == 0).sum().item() for x in ids) / sum(x.numel() for x in ids) < 0.1
    lengths = [x.size(1) for x in ids]
    assert lengths != sorted(lengths)  # but long ones do not come last
    for first in (1, POOL - 1, POOL + 1):
        assert names(batches(examples(small), batch, 0, first, last)) == whole[first:]


@pytest.mark.parametrize("world, micro, workers", [(1, 2, 0), (2, 0, 0), (4, 1, 0), (1, 0, 2), (2, 1, 2)])
def test_the_samples_of_a_step_do_not_depend_on_who_takes_them(small, world, micro, workers):
    """Guards against a curve that changes with the number of processes, micro-batches or workers."""
    whole = names(batches(examples(small), 4, 0, 0, 10))
    shares = [list(batches(examples(small), 4, 0, 0, 10, micro=micro, rank=rank, world=world, workers=workers))
              for rank in range(world)]
    for step in range(10):
        micros = [micro for share in shares for micro in share[step][0]]
        assert sorted(n for m in micros for n in m.names) == sorted(whole[step])
        assert all(len(m.names) <= (micro or 4 // world) for m in micros)


@pytest.fixture
def files(tmp_path):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a ring"}]
    good = [{"id": f"good-{i}", "image": "a.png", "conversations": talk} for i in range(7)]
    (tmp_path / "good.json").write_text(json.dumps(good))
    (tmp_path / "bad.json").write_text(json.dumps([{"id": "bad-0", "image": "none.png", "conversations": talk}]))
    Image.fromarray(np.full((20, 30), 255, np.uint8)).save(tmp_path / "mask.png")
    small = {"id": "small", "image": "a.png", "regions": [{"mask": "mask.png"}], "conversations": talk}
    (tmp_path / "small.json").write_text(json.dumps([small]))
    return tmp_path


def test_every_epoch_has_each_record_once_in_another_order(files):
    """Guards against an order that repeats, and records left out at the end of an epoch."""
    source = RecordSource([files / "good.json"], files, seed=0)
    order = [source.place(j) for j in range(21)]
    assert [epoch for epoch, _ in order] == [0] * 7 + [1] * 7 + [2] * 7
    epochs = [[k for e, k in order if e == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert order == [RecordSource([files / "good.json"], files, seed=0).place(j) for j in range(21)]
    assert [k for _, k in order] != [RecordSource([files / "good.json"], files, seed=1).place(j)[1] for j in range(21)]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_records_come_beside_the_good_ones(small, files, workers):
    """Guards against a bad record that is swapped for another, and words lost on the way from a worker."""
    source = RecordSource([files / "good.json", files / "bad.json"], files, seed=0)
    data = Examples(source, small[1], small[0].config, False, 1000)
    steps = list(batches(data, 4, 0, 0, 2, workers=workers))
    bad = [record for _, records in steps for record in records]
    assert len(bad) == 1 and isinstance(bad[0], BadRecord) and "none.png is not in" in str(bad[0]) and bad[0].id == "bad-0"
    assert sum(len(step) for step in names(steps)) == 7


def test_a_mask_of_another_size_is_a_bad_record(small, files):
    """Guards against a traceback, in a worker above all, where the record's line is what a person needs."""
    source = RecordSource([files / "small.json"], files, seed=0)
    record = Examples(source, small[1], small[0].config, False, 1000)[0]
    assert isinstance(record, BadRecord) and record.id == "small" and "30 x 20 pixels, the image 60 x 40" in str(record)


def test_texts_are_what_is_said_without_the_picture(tmp_path):
    """Guards against a picture that is shown to a language model that is to learn words, and against one kind of text."""
    source = SceneSource("texts", 0, 64)
    samples = [source.sample(j) for j in range(120)]
    assert all(sample.image is None and not sample.markers and not sample.turns[0].image for sample in samples)
    questions = [sample.turns[0].question for sample in samples]
    for start in ("", "What is", "Which ", "How many", "Describe the object", "Please describe the relationship"):
        assert any(question.startswith(start) and bool(question) == bool(start) for question in questions), start
    assert samples[5].turns == source.sample(5).turns


def test_signals_are_for_the_first_process(small):
    """Guards against workers that SIGTERM to all processes of a run ends, before the step that needs them."""
    steps = batches(examples(small), 3, 0, 0, 8, workers=1)
    want = [micro.names for micros, _ in batches(examples(small), 3, 0, 0, 8) for micro in micros]
    got = [micro.names for micro in next(steps)[0]]
    for name in (signal.SIGTERM, signal.SIGINT):
        os.kill(steps._workers[0].pid, name)
    assert got + [micro.names for micros, _ in steps for micro in micros] == want
