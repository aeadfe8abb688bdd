"""contrast.py: captions that are false in one thing, the loss by its formula, and a CLIP that is trained and found again."""

import json
import re
from collections import Counter

import pytest
import torch

import checkpoint
import contrast
from clip import CLIP, TextConfig, VisionConfig
from commandline import run
from contrast import Contrast, Pairs, captioned, falsify, held_out_pairs, told
from data.scenes import TEXTURES, generator_for, marked_scene, sample_scene
from tokenizer import CLIPTokenizer
from train import main, tiny_model, Recipe

FLAGS = ["--batch", "4", "--log-every", "1", "--device", "cpu", "--side", "64"]


def words(text: str) -> Counter:
    return Counter("a" if word == "an" else word for word in re.findall(r"\w+", text))


def facts(text: str) -> set[str]:
    return {part.replace(" an ", " a ") for part in text.rstrip(".").split(". ")}


# -- captions --------------------------------------------------------------------------------------------------------


def test_false_captions_have_the_same_words_and_two_other_facts():
    """Guards against false captions that can be told by their words alone, and against true ones that are called false."""
    marked = 0
    for j in range(300):
        _, true, false = captioned(generator_for("val", 0, j), (64, 64))
        assert words(true) == words(false) and len(facts(true) - facts(false)) == 2 == len(facts(false) - facts(true))
        marked += any(f" {word} " in true for word in ("within", "with the", "pointed", "at the"))
    assert marked > 30


def test_a_false_caption_may_move_the_marker_the_colors_or_the_things():
    """Guards against a kind of falsehood that never comes; each is needed for what CLIP is to learn."""
    seen = Counter()
    for j in range(200):
        generator = generator_for("val", 1, j)
        scene, things, markers = marked_scene(generator, (64, 64), n_markers=1, rich=True)
        marked = [(scene.objects.index(things[0]), markers[0])]
        other, moved = falsify(scene, marked, generator)
        assert told(other, moved) != told(scene, marked)
        if moved != marked:
            seen["marker"] += other is scene
        else:
            changed = [(a, b) for a, b in zip(scene.objects, other.objects) if a != b]
            assert len(changed) == 2
            seen["colors" if changed[0][0].box == changed[0][1].box else "places"] += 1
    assert min(seen["marker"], seen["colors"], seen["places"]) > 20, seen


def test_rich_scenes_have_textures_and_signs_and_plain_ones_stay_as_they_were():
    """Guards against rich draws that change the plain scenes that weights were tested on."""
    rich = [sample_scene(generator_for("val", 0, i), rich=True) for i in range(60)]
    plain = [sample_scene(generator_for("val", 0, i)) for i in range(60)]
    for a, b in zip(rich, plain):
        assert [(x.shape, x.color, x.box) for x in a.objects] == [(x.shape, x.color, x.box) for x in b.objects]
        texts = [thing.text for thing in a.objects if thing.text]
        assert len(texts) == len(set(texts))
    things = [thing for scene in rich for thing in scene.objects]
    assert {thing.texture for thing in things} == set(TEXTURES) and sum(bool(thing.text) for thing in things) > 15
    assert all(not thing.text and thing.texture == "plain" for scene in plain for thing in scene.objects)


# -- loss ------------------------------------------------------------------------------------------------------------

SMALL = VisionConfig(image_size=28, patch_size=14, width=24, layers=2, heads=3, mlp=40)


def small_clip(tokenize) -> CLIP:
    torch.manual_seed(0)
    return CLIP(SMALL, TextConfig(len(tokenize.vocab), context=160, width=16, layers=1, heads=2, mlp=20), projection=12)


@pytest.fixture(scope="module")
def tokenize():
    texts = [text for j in range(60) for text in captioned(generator_for("train", 0, j), (64, 64))[1:]]
    return CLIPTokenizer.train(texts, 600, 160)


def test_the_loss_is_the_formula(tokenize):
    """Guards against false captions that count as images' own, and a loss of one direction only: by probabilities."""
    model, pairs = small_clip(tokenize), Pairs(tokenize, SMALL, 0, 64)
    micro = pairs.collate([pairs[j] for j in range(5)])
    logits = model(micro.pixels, micro.ids).detach()
    assert logits.shape == (5, 10) and micro.labels.shape == (5, 2)
    rows, columns = logits.softmax(dim=1), logits[:, :5].softmax(dim=0)
    expected = -(rows.diagonal().log().sum() + columns.diagonal().log().sum()) / 2
    loss = Contrast(model, torch.float32)(micro.ids, micro.labels, micro.pixels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_pairs_are_the_same_twice_and_padded_by_the_end(tokenize):
    """Guards against pairs that depend on who draws them, and against padding that hides the end of a text."""
    a, b = (Pairs(tokenize, SMALL, 3, 64) for _ in range(2))
    assert torch.equal(a[7].pixels, b[7].pixels) and a[7].ids == b[7].ids != a[8].ids
    micro = a.collate([a[j] for j in range(6)])
    for row, ids in zip(micro.ids.tolist(), [a[j].ids[k] for k in (0, 1) for j in range(6)]):
        assert row[: len(ids)] == ids and set(row[len(ids) :]) <= {tokenize.end} and ids.index(tokenize.end) == len(ids) - 1
    assert max(tokenize.vocab.values()) == tokenize.end


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tokenize):
    monkeypatch.setattr(contrast, "tiny_clip", lambda seed: (small_clip(tokenize), tokenize))
    monkeypatch.setattr(contrast, "held_out_pairs", lambda model, data: {"true": 0.5})


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_cut_run_goes_on_exactly_and_the_clip_is_found_again(small, tokenize, tmp_path, capsys):
    """Guards against a stage that forgets optimizer or place, and against a checkpoint that is another CLIP."""
    main(["tiny-clip", "--steps", "8", "--save-every", "4", "--out", str(tmp_path / "whole"), *FLAGS])
    for entry in (tmp_path / "whole/states").iterdir():  # as if it had been cut after step 4
        if entry.name.endswith("8"):
            entry.rename(tmp_path / "later")
    before = {line["step"]: line["loss"] for line in log(tmp_path / "whole") if "loss" in line}
    main(["tiny-clip", "--steps", "8", "--save-every", "4", "--out", str(tmp_path / "whole"), *FLAGS])
    after = {line["step"]: line["loss"] for line in log(tmp_path / "whole") if "loss" in line}
    assert after == before and sorted(after) == list(range(1, 9))
    model, again = checkpoint.load_clip(tmp_path / "whole", "cpu", torch.float32)
    pixels, texts = torch.randn(2, 3, 28, 28), ["top left: a red star.", "center: a striped blue ring."]
    assert torch.equal(again(texts), tokenize(texts)) and model(pixels, again(texts)).shape == (2, 2)
    assert "vision_model" in capsys.readouterr().out
    checkpoint.save_clip(model, again, tmp_path / "copy")
    other, _ = checkpoint.load_clip(tmp_path / "copy", "cpu", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_a_small_model_takes_the_tower_of_a_clip(tmp_path):
    """Guards against a tower that is made anew, without a word."""
    clip, tokenize = contrast.tiny_clip(5)
    checkpoint.save_clip(clip, tokenize, tmp_path / "clip")
    model, _ = tiny_model(Recipe("captions", steps=1, side=64), str(tmp_path / "clip"))
    ours, theirs = model.vision.state_dict(), clip.vision_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_learns(tokenize):
    """Guards against a gradient that does not reach a tower: 8 pairs are known by heart after 60 steps."""
    model, pairs = small_clip(tokenize), Pairs(tokenize, SMALL, 0, 64)
    micro, objective = pairs.collate([pairs[j] for j in range(8)]), Contrast(model, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        losses.append(objective(micro.ids, micro.labels, micro.pixels) / 8)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.2 * losses[0]


def test_held_out_counts(tokenize):
    """Guards against counting the wrong way round: a CLIP that knows nothing is right half of the time, of 64 once."""
    table = held_out_pairs(small_clip(tokenize), Pairs(tokenize, SMALL, 0, 64, "val"), 128)
    assert 0.3 < table["true"] < 0.7 and table["first of 64"] < 0.1


@pytest.mark.parametrize("flags, words", [
    (["--micro", "2"], "micro-batches, or no steps, came with contrast"), (["--steps", "0"], "no steps"),
    (["--parallel", "fsdp"], "expected one, as each image is held against all others"),
    (["--model", "tiny"], "says model_type 'vipllava'; expected clip"),
])  # fmt: skip
def test_a_mistake_is_one_line(flags, words, tmp_path, capsys):
    assert run(main, ["tiny-clip", "--out", str(tmp_path / "run"), *FLAGS, *flags]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
