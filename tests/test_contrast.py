"""contrast.py: captions that are false in one thing, the loss by its formula, and a CLIP that is trained and found again."""

import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

import checkpoint
import contrast
from clip import CLIP, TextConfig, VisionConfig
from commandline import run
from contrast import Contrast, Pairs, Told, caption_of, captioned, falsify, held_out_pairs
from data.scenes import TEXTURES, generator_for, marked_scene, sample_scene
from overlay import phrase
from tokenizer import CLIPTokenizer
from recipe import Recipe
from train import main, take_tower, tiny_model
from vipllava import IGNORE

FLAGS = ["--batch", "4", "--log-every", "1", "--device", "cpu", "--side", "64"]


def facts(text: str) -> set[str]:
    return set(text.rstrip(".").split(". "))


# -- captions --------------------------------------------------------------------------------------------------------


def test_true_captions_are_true_and_false_ones_false():
    """Guards against false captions that happen to be true: all that is true of a scene is in its whole caption."""
    marked = 0
    for j in range(300):
        pair = captioned(generator_for("val", 0, j), (64, 64))
        marker = pair.markers[0] if pair.markers else None
        all_true = {fact for thing in pair.scene.objects for fact in facts(caption_of(pair.scene, [Told(thing)]))}
        if marker:
            (thing,) = (t for t in pair.scene.objects if facts(caption_of(pair.scene, [Told(t, marker)])) & facts(pair.true))
            all_true = all_true - facts(caption_of(pair.scene, [Told(thing)]))
            all_true |= facts(caption_of(pair.scene, [Told(thing, marker)]))
        assert facts(pair.true) <= all_true and len(pair.false) == contrast.FALSE
        for text in pair.false:
            assert len(facts(text)) == len(facts(pair.true)) and 1 <= len(facts(text) - all_true) <= 2, (pair.true, text)
        words = [phrase(one) for one in pair.markers]
        signs = sum(bool(thing.text) for thing in pair.scene.objects)
        assert len(pair.rivals) == len(words) * (len(pair.scene.objects) + 1) + signs and not set(pair.rivals) & set(pair.phrases)
        assert all(re.search("with the (letter [A-Z]|number [1-9])", said) for said in pair.rivals[len(pair.rivals) - signs :])
        assert sum(said.endswith(tuple(words)) for said in pair.phrases if words) == len(words)
        marked += marker is not None
        assert pair.image().size == (64, 64)
    assert 80 < marked < 160


def test_every_kind_of_falsehood_comes():
    """Guards against one that never does; each is needed for what CLIP is to learn."""
    seen = Counter()
    for j in range(400):
        generator = generator_for("val", 1, j)
        scene, (thing,), (marker,) = marked_scene(generator, (64, 64), n_markers=1, rich=True)
        other = next(t for t in scene.objects if t is not thing)
        a, b = falsify(generator, scene, [Told(thing, marker), Told(other)])
        for one, was in ((a, thing), (b, other)):
            seen["shape"] += one.thing.shape != was.shape
            seen["color"] += one.thing.color != was.color
        moved = (a.thing.box != thing.box) + (b.thing.box != other.box)
        seen["place"] += moved == 1
        seen["exchange"] += moved == 2
        seen["on another"] += a.marker is None and b.marker is marker
        if a.marker is not None:
            seen["kind"] += a.marker.kind != marker.kind
            seen["hue"] += a.marker.color != marker.color
            assert a.marker.color == marker.color or math.dist(a.marker.color, marker.color) > 100  # or it would be true
    assert sum(seen.values()) == 400 and min(seen.values()) > 25 and len(seen) == 7, seen


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
    pairs = [captioned(generator_for("train", 0, j), (64, 64)) for j in range(60)]
    texts = [text for pair in pairs for text in (pair.true, *pair.false, *pair.phrases)]
    return CLIPTokenizer.train(texts, 600, 160)


def test_the_loss_is_the_formula(tokenize):
    """Guards against another image's false captions among the choices, a loss of one direction only, patches asked for
    other things' phrases, and rivals of the same words: by probabilities, image after image."""
    model, pairs = small_clip(tokenize), Pairs(tokenize, SMALL, 0, 64)
    drawn = [pairs.pair(i) for i in range(8)]
    assert any(pair.rivals for pair in drawn)
    drawn[1] = replace(drawn[1], phrases=drawn[0].phrases[:1] * len(drawn[1].phrases))  # as if all were alike
    pairs._ready = dict(enumerate(drawn))
    micro = pairs.collate([pairs[j] for j in range(8)])
    said = [text for pair in drawn for text in (*pair.phrases, *pair.rivals)]
    assert micro.ids.shape[0] == 8 * 4 + len(said) and micro.labels.shape == (8, 5)
    logits = model(micro.pixels, tokenize([pair.true for pair in drawn])).detach()
    rows, columns = logits.softmax(dim=1), logits.softmax(dim=0)
    expected = -(rows.diagonal().log().mean() + columns.diagonal().log().mean()) / 2
    for pair, pixels in zip(drawn, micro.pixels):
        own = model(pixels[None], tokenize([pair.true, *pair.false])).detach()[0]
        expected -= own.softmax(dim=0)[0].log() / 8
    (states,) = model.vision_model.hidden_states(micro.pixels, (-2,))  # the last but one, as LLaVA reads it
    vectors = model.visual_projection(model.vision_model.post_layernorm(states))
    fits = model.logit_scale.exp() * torch.nn.functional.normalize(vectors, dim=-1) @ model.encode_text(tokenize(said)).T
    losses = []
    for i, k in (micro.labels >= 0).nonzero().tolist():
        told = int(micro.labels[i, k])
        assert said[told] in drawn[i].phrases
        rivals = torch.tensor([j == told or text != said[told] for j, text in enumerate(said)])
        losses.append(-fits[i, k, rivals].softmax(dim=0)[int(rivals[:told].sum())].log())
    expected += torch.stack(losses).detach().mean()
    loss = Contrast(model, torch.float32)(micro.ids, micro.labels, micro.pixels) / len(losses)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_patches_have_the_phrase_of_what_lies_on_them(tokenize):
    """Guards against rows taken for columns, and a class token that is asked, too: by the middles of the objects."""
    config = VisionConfig(image_size=112, patch_size=14, width=24, layers=1, heads=3, mlp=40)
    pairs = Pairs(tokenize, config, 0, 112)
    for j in range(20):
        pair, labels = pairs.pair(j), torch.tensor(pairs[j].labels)
        assert labels[0] == IGNORE  # the class token
        for k, thing in enumerate(pair.scene.objects):
            x, y = (int(v / 14) for v in thing.center)
            assert labels[1 + 8 * y + x] == k
        assert (labels == IGNORE).sum() > 10


def test_pairs_are_the_same_twice_and_padded_by_the_end(tokenize):
    """Guards against pairs that depend on who draws them, and against padding that hides the end of a text."""
    a, b = (Pairs(tokenize, SMALL, 3, 64) for _ in range(2))
    assert b.size(7) == len(b.pair(7).true)  # keeps it
    assert torch.equal(a[7].pixels, b[7].pixels) and a[7].ids == b[7].ids != a[8].ids
    micro = a.collate([a[j] for j in range(6)])
    order = [a[j].ids[k] for k in range(4) for j in range(6)] + [ids for j in range(6) for ids in a[j].ids[4:]]
    for row, ids in zip(micro.ids.tolist(), order, strict=True):
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
    """Guards against a tower that is made anew, or of another shape, without a word."""
    clip, tokenize = contrast.tiny_clip(5)
    checkpoint.save_clip(clip, tokenize, tmp_path / "clip")
    model, _ = tiny_model(Recipe("captions", steps=1, side=64))
    take_tower(model, str(tmp_path / "clip"))
    ours, theirs = model.vision.state_dict(), clip.vision_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    checkpoint.save_clip(small_clip(tokenize), tokenize, tmp_path / "other")
    with pytest.raises(ValueError, match="expected the model's"):
        take_tower(model, str(tmp_path / "other"))


def test_it_learns(tokenize):
    """Guards against a gradient that does not reach a tower: 8 pairs are known by heart after 60 steps."""
    model, pairs = small_clip(tokenize), Pairs(tokenize, SMALL, 0, 64)
    micro, objective = pairs.collate([pairs[j] for j in range(8)]), Contrast(model, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        losses.append(objective(micro.ids, micro.labels, micro.pixels) / int((micro.labels >= 0).sum()))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]


def test_held_out_counts(tokenize):
    """Guards against counting the wrong way round: a CLIP that knows nothing is right once in four times, of 64 once."""
    table = held_out_pairs(small_clip(tokenize), Pairs(tokenize, SMALL, 0, 64, "val"), 128)
    assert 0.1 < table["true"] < 0.45 and table["first of 64"] < 0.1 and table["patch"] < 0.1


@pytest.mark.parametrize("flags, words", [
    (["--micro", "2"], "--micro came with contrast"), (["--length", "9"], "--length came"), (["--projector-lr", "1"], "--projector-lr came"),
    (["--steps", "0"], "0 steps"), (["--compile"], "--compile came"),
    (["--parallel", "fsdp"], "expected ddp"),
    (["--model", "tiny"], "says model_type 'vipllava'; expected clip"),
])
def test_a_mistake_is_one_line(flags, words, tmp_path, capsys):
    assert run(main, ["tiny-clip", "--out", str(tmp_path / "run"), *FLAGS, *flags]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
