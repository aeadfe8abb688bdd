"""The training loop, on a model small enough to take a step in milliseconds."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import checkpoint
import clip
import journal
import llama
import lora
import states
import train
from chat import Turn
from clip import VisionConfig, preprocess
from commandline import run
from conftest import one_line
from data import questions, scenes
from data.batches import Examples, SceneSource, collate, encode
from data.records import Sample
from evals.scenes import answer
from kill_training import kill
from llama import LlamaConfig
from overlay import make_marker
from parallel import Place, gradients
from recipe import OPTIMIZERS, RECIPES, Habits, Recipe, read_recipe, schedule
from train import freeze, main, tiny_model
from vipllava import IGNORE, ViPLLaVA, ViPLLaVAConfig

ROOT = Path(train.__file__).parent
TINIER = ViPLLaVAConfig(
    VisionConfig(image_size=24, patch_size=8, width=20, layers=3, heads=5, mlp=28),
    LlamaConfig(1024, width=24, layers=2, heads=4, kv_heads=2, mlp=36, context=256), feature_layers=(-2, 1),
)
FLAGS = ["--batch", "3", "--side", "64", "--log-every", "1", "--eval-every", "1000", "--device", "cpu"]


@pytest.fixture(autouse=True)
def tinier_model(monkeypatch):
    """The tiny model, tinier: 9 patches, three blocks and two."""
    monkeypatch.setattr(train, "TINY", TINIER)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with such a model, random, from which processes can start."""
    folder = tmp_path_factory.mktemp("base") / "base"
    checkpoint.save(*tiny_model(Recipe("markers", steps=1, side=64), TINIER), folder)
    return folder


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Records of a person's own: 12, of which some have no image, and one is bad; of mixed.json every second has none."""
    folder = tmp_path_factory.mktemp("mine")
    records = []
    for i in range(12):
        sample = questions.test_sample(scenes.generator_for("train", 3, i), (64, 64))
        sample.image.save(folder / f"{i}.png")
        talk = [{"from": "human", "value": "What is <region0>?"}, {"from": "gpt", "value": sample.turns[0].answer}]
        records.append({"id": f"mine-{i}", "image": f"{i}.png", "regions": [{"box": [9, 9, 40, 50]}], "conversations": talk})
    text = [{"from": "human", "value": "What is a ring?"}, {"from": "gpt", "value": "a shape"}]
    records[4] = {"id": "text-4", "conversations": text}
    records[7] = {"id": "text-7", "conversations": text}
    mixed = [record if i % 2 else {"id": f"text-{i}", "conversations": [text[0], talk[1]]} for i, record in enumerate(records)]
    (folder / "mixed.json").write_text(json.dumps(mixed))
    (folder / "good.json").write_text(json.dumps(records))
    (folder / "bad.json").write_text(json.dumps([*records[:5], {**records[5], "image": "none.png"}, *records[6:]]))
    return folder


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return {line["step"]: (line["loss"], line["norm"]) for line in log(folder) if "loss" in line}


def start(*argv, processes=1, **options):
    """The program itself, in one process or several."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *several, "train.py", *map(str, argv)], cwd=ROOT, text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(*argv, **options):
    process = start(*argv, **options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return out


# -- the rules -------------------------------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_ends_near_zero():
    """Guards against a schedule that starts at its peak or never comes down."""
    recipe = Recipe("captions", steps=200, warmup=0.1)
    rates = [schedule(step, recipe) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 20) and max(rates) == rates[19] == rates[20] == 1
    assert rates[110] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    cold = [schedule(step, dataclasses.replace(recipe, warmup=0.0)) for step in range(200)]
    assert cold[0] == 1 > cold[1] and cold[100] == pytest.approx(0.5)  # none is none


TRAINED = {  # what each kind of training moves, and what it must not
    "all": ({"vision.layers.0", "vision.class", "projector", "llama.layers", "llama.lm_head"}, {"vision.layers.2", "vision.post"}),
    "language": ({"projector", "llama.layers", "llama.embed_tokens", "llama.lm_head"}, {"vision"}),
    "projector": ({"projector"}, {"vision", "llama"}),
    "lora": ({"projector", "llama.layers.0.mlp.up_proj.lora_A"}, {"vision", "llama.embed", "llama.layers.0.mlp.up_proj.base"}),
}


def task_of(model, tokenizer, source) -> train.Task:
    objective = train.Objective(model, torch.float32, several=False)
    return train.Task(objective, Examples(source, tokenizer, model.config, False, 2048), lambda state: None)


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_trained_moves_and_nothing_else(kind, tmp_path):
    """Guards against a frozen part that learns, a part that should learn and does not, and unused blocks of CLIP that
    only take memory (and that DDP would wait for)."""
    recipe = Recipe("markers", train=kind, steps=2, side=64, batch=2, lr=0.1, rank=2, alpha=4, length=300)
    model, tokenizer = tiny_model(recipe)
    freeze(model, recipe, torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    source, place = SceneSource("markers", 0, 64), Place(torch.device("cpu"))
    train.train(task_of(model, tokenizer, source), recipe, tmp_path, "base", place, Habits())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    yes, no = TRAINED[kind]
    assert all(any(name.startswith(part) for name in moved) for part in yes)
    assert not any(name.startswith(part) for name in moved for part in no)


def test_what_is_frozen_is_16_bits_and_what_learns_32():
    """Guards against small steps lost in bfloat16, and against twice the memory for what never changes."""
    recipe = Recipe("markers", train="lora", steps=1, rank=2)
    model, _ = tiny_model(recipe)
    freeze(model, recipe, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_parameter_groups():
    """Guards against norms that decay, and a projector without its own learning rate."""
    recipe = Recipe("markers", train="language", steps=1, lr=0.5, projector_lr=0.25, weight_decay=0.1)
    model, _ = tiny_model(recipe)
    freeze(model, recipe, torch.float32)
    names = {id(p): name for name, p in model.named_parameters()}
    (optimizer,) = train.make_optimizers(model, recipe)
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.dim() > 1 else 0.0)
            assert group["peak"] == (0.25 if names[id(p)].startswith("projector.") else 0.5)


def examples(n, recipe=Recipe("markers", steps=1, side=64)):
    model, tokenizer = tiny_model(recipe)
    data = Examples(SceneSource(recipe.data, 0, 64), tokenizer, model.config, False, 300)
    return model, [data[j] for j in range(n)]


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (2, 2, 2, 2), (5, 3), (1,) * 8])
def test_micro_batches_compute_one_loss(sizes):
    """Guards against a mean of means: answers are of unequal length, so it would weigh samples by their company."""
    model, rows = examples(8)
    whole = collate(rows)
    expected = model.loss(whole.ids, whole.labels, whole.pixels)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = iter(rows)
    micros = [collate([next(rows) for _ in range(n)]) for n in sizes]
    loss, tokens = gradients(train.Objective(model, torch.float32, several=False), micros, Place(torch.device("cpu")))
    assert loss == pytest.approx(expected.item(), rel=1e-5) and tokens == int((whole.labels[:, 1:] != IGNORE).sum())
    for name, p in model.named_parameters():
        if name in wanted:
            assert (p.grad - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max() + 1e-8, name


def test_a_loss_that_is_no_number_names_its_samples(tmp_path, monkeypatch):
    """Guards against a run that goes on with NaN, and one that stops without a word where to look."""
    recipe = Recipe("markers", steps=3, side=64, batch=2, lr=1.0)
    model, tokenizer = tiny_model(recipe)
    freeze(model, recipe, torch.float32)
    with torch.no_grad():
        model.projector.linear_1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the loss is nan .* at step 0, on scene \d+, scene \d+; lower --lr"):
        task = task_of(model, tokenizer, SceneSource("markers", 0, 64))
        train.train(task, recipe, tmp_path, "", Place(torch.device("cpu")), Habits())


# -- runs ------------------------------------------------------------------------------------------------------------


def test_loss_falls(tmp_path, capsys):
    """Guards against a step that updates nothing: the loss at random is about ln 500, and must fall at once."""
    main(["tiny-captions", "--out", str(tmp_path / "run"), "--steps", "25", "--lr", "0.01", "--plot", *FLAGS])
    seen = losses(tmp_path / "run")
    assert seen[1][0] > 5.5 and seen[25][0] < 4
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    assert "no loss.png" not in capsys.readouterr().out
    main(["tiny-captions", "--out", str(tmp_path / "short"), "--steps", "1", "--plot", *FLAGS])
    assert "no loss.png: the log has 1 losses; expected two or more" in capsys.readouterr().out
    Image.new("RGB", (9, 9)).save(tmp_path / "loss.png")
    with pytest.raises(ValueError, match="loss.png is there already, and doesn't say that it was drawn here"):
        main(["tiny-captions", "--out", str(tmp_path), "--steps", "25", "--plot", *FLAGS])


def stop_at_5(command):
    """A run of 8 steps that gets SIGTERM in its fifth."""
    step = journal.Journal.step

    def stopping(self, done, *rest):
        step(self, done, *rest)
        if done == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="stopped after step 5 of 8"):
        patch.setattr(journal.Journal, "step", stopping)
        main(command)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stopped_run_continues_exactly(optimizer, tmp_path, capfd):
    """Guards against a resume that forgets an optimizer, the schedule or the place in the data: bit for bit."""
    command = ["tiny-markers", "--steps", "8", "--save-every", "100", "--optimizer", optimizer, *FLAGS, "--out"]
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    main([*command, str(tmp_path / "whole")])
    stop_at_5([*command, str(tmp_path / "cut")])
    assert capfd.readouterr().err == "stopping after this step\n"
    main([*command, str(tmp_path / "cut")])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "resumed" in capfd.readouterr().out and losses(tmp_path / "cut") == losses(tmp_path / "whole")
    models = [checkpoint.load(tmp_path / name, "cpu", torch.float32)[0].state_dict() for name in ("cut", "whole")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_a_run_stopped_before_its_first_line_continues(tmp_path):
    """Guards against "the same command continues", which is refused then: the model that is there has no log."""
    command = ["tiny-markers", "--steps", "8", *FLAGS, "--log-every", "100", "--out", str(tmp_path / "run")]
    stop_at_5(command)
    main(command)
    assert [line["step"] for line in log(tmp_path / "run") if "lr" in line] == [5, 8]


KILLED = {"whole": [], "lora": ["--rank", "2", "--alpha", "4"], "two processes": []}


@pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="finds processes in Linux's /proc")
@pytest.mark.parametrize("kind", KILLED)
def test_kill_9(kind, base, tmp_path):
    """Guards against half a state that is taken for a whole one, and losses told twice: killed in the middle of a step or
    of a save, twice, a run ends with the losses of one that never was. (tests/kill_training.py: 20 times.)"""
    recipe = "lora" if kind == "lora" else "tiny-markers"
    argv = [recipe, "--model", base, "--data", "markers", "--steps", "16", "--lr", "0.01", "--save-every", "2", *FLAGS, *KILLED[kind]]
    argv = [*argv, "--batch", "4"]
    processes = 2 if kind == "two processes" else 1
    finish(*argv, "--out", tmp_path / "never", processes=processes)
    for step in (3, 11):
        process = start(*argv, "--out", tmp_path / "often", processes=processes)
        for line in process.stdout:
            if line.startswith(f"step {step} "):
                kill(tmp_path / "often")
                break
        process.wait()
    finish(*argv, "--out", tmp_path / "often", processes=processes)
    assert losses(tmp_path / "often") == losses(tmp_path / "never") and len(losses(tmp_path / "never")) == 16


def curve(name, mine, out, *flags, processes=1):
    """The losses of a run on scenes, or on records of which some have no image; and the model that it makes."""
    good, mixed = ([mine / f"{name}.json", "--images", mine] for name in ("good", "mixed"))
    recipe, source, steps, lr = {"scenes": ("stage2", ["markers"], 50, 1e-4), "mine": ("stage2", good, 6, 1e-3),
                                 "projector": ("stage1", [*mixed, "--micro", "1"], 4, 1e-3)}[name]
    finish(recipe, "--model", "tiny", "--data", *source, "--steps", steps, "--lr", lr, "--side", "112",
           "--batch", "4", "--seed", "1", "--log-every", "1", "--eval-every", "1000", "--device", "cpu", "--out", out, *flags,
           processes=processes)
    assert len(losses(out)) == steps
    return losses(out), checkpoint.load(out, "cpu", torch.float32)[0].state_dict()


@pytest.fixture(scope="module")
def curves_of_one(mine, tmp_path_factory):
    return {name: curve(name, mine, tmp_path_factory.mktemp("one") / name) for name in ("scenes", "mine", "projector")}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_curve_of_one(parallel, mine, curves_of_one, tmp_path):
    """Guards against samples seen twice, a loss that is averaged wrongly, and processes that wait for each other where
    one has an image and the other has none; in one of the steps on "mine" no sample has any. "projector": where nothing
    of an empty image's turn but the projector learns, and a step takes several turns."""
    for name, (one, weights) in curves_of_one.items():
        two, other = curve(name, mine, tmp_path / name, "--parallel", parallel, processes=2)
        error = max(abs(two[step][0] - one[step][0]) / max(one[step][0], 1) for step in one)  # a small loss is not more exact
        assert error < 1e-5, (name, error)
        assert all((weights[key] - other[key]).abs().max() < 1e-4 for key in weights)


def test_a_state_that_is_cut_short_is_passed_over(tmp_path, capsys):
    """Guards against a run that can't go on because its last state can't be read, and one that begins anew in silence."""
    command = ["tiny-captions", "--out", str(tmp_path / "run"), "--steps", "6", "--save-every", "2", "--keep", "3", *FLAGS]
    main(command)
    expected, folders = losses(tmp_path / "run"), sorted((tmp_path / "run" / "states").iterdir())
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000004", "step-00000006"]
    for folder in folders[1:]:
        file = next(folder.glob("*.distcp"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    main(command)
    out = capsys.readouterr().out
    assert out.count("can't be read") == 2 and f"resumed {folders[0]}" in out and losses(tmp_path / "run") == expected
    newer = shutil.copytree(folders[2], folders[2].with_name("step-00000009"))
    (newer / ".metadata").write_bytes(b"")
    shutil.rmtree(folders[2])
    newer.with_name(".step-00000005.part").mkdir()  # a save that was cut
    main(command)  # on from 4
    assert sorted((tmp_path / "run" / "states").iterdir()) == folders
    for folder in sorted((tmp_path / "run" / "states").iterdir()):
        (folder / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 3 states in .* can be read; expected one, or another --out"):
        main(command)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """Guards against a state that is replaced by half of the next one."""
    command = ["tiny-captions", "--out", str(tmp_path / "run"), "--steps", "4", "--save-every", "2", *FLAGS]
    whole = states.dcp.save

    def full(state, checkpoint_id):
        if "00000004" in str(checkpoint_id):
            (Path(checkpoint_id) / "__0_0.distcp").write_bytes(b"half")
            raise reason
        return whole(state, checkpoint_id=checkpoint_id)

    monkeypatch.setattr(states.dcp, "save", full)
    position = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    no_space = states.dcp.CheckpointException("", {0: (OSError(28, "No space left on device"), None)})
    for reason, words in ((position, "unexpected pos"), (no_space, "No space left")):
        with pytest.raises(OSError, match=f"00000004.part can't be written .*{words}"):
            main(command)
        assert [f.name for f in (tmp_path / "run" / "states").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    monkeypatch.setattr(train, "TINY", TINIER)
    main(command)
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]
    assert [f.name for f in sorted((tmp_path / "run" / "states").iterdir())] == ["step-00000002", "step-00000004"]


def test_another_recipe_or_base_does_not_continue_a_run(base, tmp_path):
    """Guards against a run that silently goes on with a changed learning rate, or upon other weights."""
    main(["tiny-captions", "--out", str(tmp_path / "run"), "--steps", "1", *FLAGS])
    with pytest.raises(ValueError, match="lr 0.001, now 0.5"):
        main(["tiny-captions", "--out", str(tmp_path / "run"), "--steps", "1", "--lr", "0.5", *FLAGS])
    with pytest.raises(ValueError, match="precision float32, now bfloat16"):
        main(["tiny-captions", "--out", str(tmp_path / "run"), "--steps", "1", "--precision", "bfloat16", *FLAGS])
    with pytest.raises(ValueError, match="base , now .*base"):
        main(["tiny-captions", "--out", str(tmp_path / "run"), "--steps", "1", "--model", str(base), *FLAGS])
    argv = ["tiny-align", "--model", str(tmp_path / "base"), "--steps", "1", "--out", str(tmp_path / "other"), *FLAGS]
    shutil.copytree(base, tmp_path / "base")
    main(argv)
    shutil.rmtree(tmp_path / "base")
    checkpoint.save(*tiny_model(Recipe("markers", steps=1, side=64, seed=1), TINIER), tmp_path / "base")
    with pytest.raises(ValueError, match="the base's digest [0-9a-f]{12}, now [0-9a-f]{12}"):
        main(argv)


def test_a_run_begun_before_a_field_was_there_goes_on(tmp_path):
    """Guards against a run that a newer version refuses: what is new had its default then."""
    argv = ["tiny-captions", "--out", str(tmp_path / "run"), "--steps", "1", *FLAGS]
    main(argv)
    (about,) = (tmp_path / "run" / "states").glob("*/about.json")
    said = json.loads(about.read_text())
    del said["recipe"]["beta2"]
    about.write_text(json.dumps(said))
    main(argv)
    with pytest.raises(ValueError, match="lr 0.001, now 0.5"):
        main([*argv, "--lr", "0.5"])


def test_other_records_do_not_continue_a_run(base, mine, tmp_path):
    """Guards against a run that goes on with records that were changed under their old name."""
    records = json.loads((mine / "good.json").read_text())
    (tmp_path / "some.json").write_text(json.dumps(records))
    argv = ["stage2", "--model", str(base), "--data", str(tmp_path / "some.json"), "--images", str(mine), "--batch", "4",
            "--length", "300", "--device", "cpu", "--out", str(tmp_path / "run")]
    main(argv)
    main(argv)
    with pytest.raises(ValueError, match="images .*mine.*, now .*others"):
        main([*argv, "--images", str(shutil.copytree(mine, tmp_path / "others"))])
    (tmp_path / "some.json").write_text(json.dumps(records[:-1]))
    with pytest.raises(ValueError, match="bytes of .*some.json [0-9]+, now [0-9]+"):
        main([*argv, "--steps", "3"])
    (tmp_path / "some.json").write_text(json.dumps(records).replace("ring", "disc"))  # of the same length
    with pytest.raises(ValueError, match="checksum of .*some.json [0-9]+, now [0-9]+"):
        main([*argv, "--steps", "3"])


def test_a_state_knows_how_many_were_bad(base, mine, tmp_path):
    """Guards against a count that a killed run forgets, as its last line is older than its state."""
    argv = ["stage2", "--model", str(base), "--data", str(mine / "bad.json"), "--images", str(mine), "--batch", "4", "--skip-bad",
            "--length", "300", "--device", "cpu", "--out", str(tmp_path / "run"), "--steps", "6", "--save-every", "2", "--log-every", "6"]
    main(argv)
    lines = [line for line in log(tmp_path / "run") if "lr" in line]
    assert [line["step"] for line in lines] == [2, 4, 6] and lines[-1]["bad"] == 2


def test_a_run_does_not_bury_where_it_begins(base, tmp_path, monkeypatch):
    """Guards against weights that are overwritten by their own training, an adapter that names itself as its base, also
    because it was moved there, and a model beside an adapter, which alone would be found."""
    shutil.copytree(base, tmp_path / "base")
    model, argv = str(tmp_path / "base"), ["--data", "markers", "--steps", "1", *FLAGS]
    with pytest.raises(ValueError, match="is the model to start from"):
        main(["tiny-markers", "--model", model, *argv, "--out", model])
    with pytest.raises(ValueError, match="holds a model, config.json; expected another folder for an adapter"):
        main(["lora", "--model", model, *argv, "--rank", "2", "--out", model])
    main(["lora", "--model", model, *argv, "--rank", "2", "--out", str(tmp_path / "mine")])
    for recipe, start, words in (("lora", str(tmp_path / "mine"), "is the model to start from"),
                                 ("tiny-markers", model, "holds an adapter, adapter.safetensors")):
        with pytest.raises(ValueError, match=words):
            main([recipe, "--model", start, *argv, "--out", str(tmp_path / "mine")])
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="mine is an adapter of a model that can't be found"):
        checkpoint.load(tmp_path / "mine")
    (tmp_path / "mine").rename(tmp_path / "base")  # where its base was
    with pytest.raises(ValueError, match="an adapter whose base, .*base, leads back to it"):
        checkpoint.load(tmp_path / "base")


def test_nothing_but_bad_records_is_no_run(base, mine, tmp_path):
    """Guards against an adapter or a model of which nobody says that it has learned nothing."""
    (tmp_path / "some.json").write_text(json.dumps(json.loads((mine / "bad.json").read_text())[5:6]))
    argv = ["stage2", "--model", str(base), "--data", str(tmp_path / "some.json"), "--images", str(mine), "--skip-bad",
            "--steps", "2", "--length", "300", "--device", "cpu", "--out", str(tmp_path / "run")]
    for _ in range(2):  # nor does a second try find a run that is over
        with pytest.raises(ValueError, match="all records were bad, see .*bad-0.txt"):
            main(argv)
    main([*argv[:-1], str(tmp_path / "good"), "--data", str(mine / "good.json"), "--batch", "4"])
    assert (tmp_path / "good" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="none of 1 records to measure on has an image"):
        (tmp_path / "texts.json").write_text(json.dumps(json.loads((mine / "good.json").read_text())[4:5]))
        main([*argv[:4], str(mine / "good.json"), *argv[5:-1], str(tmp_path / "other"), "--valid", str(tmp_path / "texts.json")])


def test_a_model_that_no_run_wrote_is_not_replaced(base, tmp_path, capsys):
    """Guards against --out weights/tiny, which would replace the model that ships by one of a few steps."""
    folder = shutil.copytree(base, tmp_path / "shipped")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert run(main, ["tiny-markers", "--steps", "1", *FLAGS, "--out", str(folder)]) == 2
    assert "holds a model that no training wrote there" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_another_tower_does_not_continue_a_run(base, tmp_path, monkeypatch):
    """Guards against a projector that was learned on one image tower, published with another."""
    monkeypatch.setattr(train, "take_tower", lambda model, clip: None)
    argv = ["tiny-align", "--model", str(base), "--steps", "1", *FLAGS, "--out", str(tmp_path / "run")]
    main([*argv, "--clip", "one"])
    with pytest.raises(ValueError, match="the image tower of one, now .*the image tower of two"):
        main([*argv, "--clip", "two"])
    other = lambda model, clip: model.vision.class_embedding.data.neg_()
    monkeypatch.setattr(train, "take_tower", other)  # the same name, and other weights
    with pytest.raises(ValueError, match="the image tower's digest [0-9a-f]{12}, now [0-9a-f]{12}"):
        main([*argv, "--clip", "one"])


def test_two_runs_in_a_folder_are_refused(base, tmp_path, capsys, monkeypatch):
    """Guards against two that remove each other's states, and write into one log; workers that outlive the first are none."""
    monkeypatch.setattr(states, "PATIENCE", 0)
    with states.alone(tmp_path / "run"):
        assert run(main, ["tiny-markers", "--model", str(base), "--steps", "1", *FLAGS, "--out", str(tmp_path / "run")]) == 2
    assert "another process trains in" in capsys.readouterr().err and not list((tmp_path / "run").iterdir())
    with states.alone(tmp_path / "run"):  # it was let go of
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60], daemon=True)
        worker.start()
    with states.alone(tmp_path / "run"):
        worker.kill()


def test_a_log_that_was_taken_away_is_no_end(base, tmp_path, capsys):
    """Guards against advice to take a damaged log away, after which the run is taken for somebody's model."""
    argv = ["tiny-markers", "--model", str(base), "--steps", "2", *FLAGS, "--out", str(tmp_path / "run")]
    main(argv)
    (tmp_path / "run" / "log.jsonl").write_text("[]\n")
    assert run(main, argv) == 2 and "take it away" in capsys.readouterr().err
    (tmp_path / "run" / "log.jsonl").unlink()
    main(argv)
    assert "all 2 steps of this run are done" in capsys.readouterr().out
    (about,) = (tmp_path / "run" / "states").glob("*/about.json")
    about.write_text("[]")
    assert run(main, argv) == 2 and "none of 1 states" in capsys.readouterr().err


def test_what_a_base_is_called(tmp_path, monkeypatch):
    """Guards against an adapter that names a folder which only happens to be called like the weights that were meant."""
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    Path("mine").mkdir()
    names = {name: train.resolved(name) for name in ("tiny", "mine", "owner/name", None)}
    assert names == {"tiny": "tiny", "mine": str(tmp_path / "mine"), "owner/name": "owner/name", None: ""}


def test_a_template_is_the_models_from_then_on(base, tmp_path):
    """Guards against a model that is asked in another form than it has learned."""
    main(["tiny-markers", "--model", str(base), "--steps", "1", "--template", "llava_v0", *FLAGS, "--out", str(tmp_path / "run")])
    assert checkpoint.load(tmp_path / "run", "cpu")[0].config.template == "llava_v0"


def test_epochs_that_are_typed_count(base, mine, tmp_path):
    """Guards against --epochs that a recipe's own steps outweigh in silence."""
    data = ["--data", str(mine / "good.json"), "--images", str(mine), "--epochs", "1"]
    main(["tiny-markers", "--model", str(base), *data, *FLAGS, "--batch", "4", "--out", str(tmp_path / "run")])
    assert max(losses(tmp_path / "run")) == 3


def test_what_a_run_has_made_is_not_made_anew(tmp_path):
    """Guards against a finished run that is trained again, and its model lost, where its states were taken away; and
    somebody's own file that happens to be called log.jsonl."""
    argv = ["tiny-captions", "--steps", "1", *FLAGS, "--out"]
    main([*argv, str(tmp_path / "run")])
    shutil.rmtree(tmp_path / "run" / "states")
    before = {item.name: item.read_bytes() for item in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match="holds what a run has made, and no state to go on from"):
        main([*argv, str(tmp_path / "run")])
    assert {item.name: item.read_bytes() for item in (tmp_path / "run").iterdir() if item.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match="log.jsonl is no log of a run"):
        main([*argv, str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "log.jsonl").read_text() == "mine\n"


def test_somebody_elses_model_is_refused_before_training(tmp_path):
    """Guards against hours of training whose result can't be saved."""
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="not saved from here"):
        main(["tiny-captions", "--out", str(tmp_path), "--steps", "1", *FLAGS])
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_rate_does_not_count_the_time_of_a_measurement(tmp_path, monkeypatch):
    """Guards against samples of before a measurement over the seconds since: a rate that doubles, or one that halves."""
    now = [0.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])
    book = journal.Journal(tmp_path, 0, Habits(log_every=2), Place(torch.device("cpu")), 1.0)
    micro, recipe = SimpleNamespace(names=["a"] * 8, ids=torch.zeros(8, 5)), Recipe("markers", steps=4)

    def slow():
        now[0] += 100
        return 0.5

    for done in (1, 2):
        now[0] += 2
        book.step(done, recipe, [micro], 1.0, 1.0)
        book.measure(done, slow)
    assert [line["samples/s"] for line in log(tmp_path) if "loss" in line] == [4.0]


def test_a_run_is_a_model_that_loads(tmp_path):
    """Guards against a run folder that only the training loop can read: it answers after checkpoint.load."""
    main(["tiny-markers", "--out", str(tmp_path / "run"), "--steps", "1", *FLAGS])
    model, tokenizer = checkpoint.load(str(tmp_path / "run"), "cpu", torch.float32)
    assert isinstance(model, ViPLLaVA)
    sample = questions.test_sample(scenes.generator_for("val", 0, 0), (64, 64))
    assert len(answer(model, tokenizer, [sample], 8)) == 1


def test_an_adapter_is_trained_on_ones_own_records(mine, tmp_path):
    """Guards against an adapter that is saved as it began: it learns 12 answers by heart, and they come from its folder."""
    argv = ["lora", "--model", "tiny", "--data", str(mine / "good.json"), "--images", str(mine), "--epochs", "40",
            "--batch", "4", "--lr", "0.005", "--projector-lr", "0.005", "--rank", "8", "--alpha", "16", "--length", "300",
            "--valid", str(mine / "good.json"), "--device", "cpu"]
    main([*argv, "--out", str(tmp_path / "run")])
    lines = log(tmp_path / "run")
    assert lines[0]["step"] == 0 and lines[0]["accuracy"] < 0.5  # before
    assert lines[-1]["step"] == 120 and lines[-1]["accuracy"] >= 0.8
    assert lora.about(tmp_path / "run")["base"] == "tiny" and not (tmp_path / "run" / "model.safetensors").exists()
    model, tokenizer = checkpoint.load(tmp_path / "run", "cpu", torch.float32)
    data = train.Records([mine / "good.json"], mine)
    chosen, bad = train.to_measure_on(model, tokenizer, data)
    assert len(chosen) == 10 and not bad
    assert train.held_out_records(model, tokenizer, data, chosen) == lines[-1]["accuracy"]


def test_a_bad_record_to_measure_on_shows_before_the_training(base, mine, tmp_path, capsys):
    """Guards against hours that end at the first measurement, and against --skip-bad that skips in training only."""
    records, images = json.loads((mine / "good.json").read_text()), tmp_path / "images"
    shutil.copytree(mine, images)
    Image.open(images / "0.png").save(images / "torn.jpg")
    (images / "torn.jpg").write_bytes((images / "torn.jpg").read_bytes()[:-99])  # its size can still be read
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a ring"}]
    torn = {"id": "torn", "image": "torn.jpg", "conversations": talk}
    long = {**torn, "image": "2.png", "conversations": [{"from": "human", "value": "What? " * 400}, talk[1]]}
    Image.new("1", (1, 60_000)).save(images / "thin.png")
    thin = {**torn, "id": "thin", "image": "thin.png"}
    (images / "valid.json").write_text(json.dumps([{**records[0], "image": "none.png"}, torn, long, thin, *records[4:]]))
    argv = ["lora", "--model", str(base), "--data", str(mine / "good.json"), "--images", str(images), "--rank", "2", "--epochs", "0.25",
            *FLAGS, "--valid", str(images / "valid.json"), "--out", str(tmp_path / "run")]
    assert run(main, argv) == 2
    assert "mine-0: image none.png is not in" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert run(main, [*argv, "--skip-bad"]) == 0
    out = capsys.readouterr().out
    assert out.count("not measured on: ") == 4 and "thin: an image of 1 x 60000 pixels is too long" in out
    assert log(tmp_path / "run")[-1]["step"] == 1


def test_an_adapter_is_all_that_is_gathered(base, tmp_path, monkeypatch):
    """Guards against 14 GB that are copied to the host, to write a few megabytes of them."""
    given = []
    monkeypatch.setattr(lora, "save", lambda model, folder, base, state: given.extend(state))
    main(["lora", "--model", str(base), "--data", "markers", "--steps", "1", "--rank", "2", *FLAGS, "--out", str(tmp_path / "run")])
    assert len(given) > 20 and all(".lora_" in name or name.startswith("projector.") for name in given)


def test_what_is_recomputed_is_compiled(base, tmp_path, monkeypatch):
    """Guards against a --compile that has no effect beside --recompute: PyTorch's checkpoint is not looked into."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda forward: lambda *args: calls.append(type(forward.__self__)) or forward(*args))
    argv = ["lora", "--model", str(base), "--data", "markers", "--steps", "1", "--rank", "2", *FLAGS, "--compile", "--out"]
    main([*argv, str(tmp_path / "plain")])
    once = calls.count(llama.Block), calls.count(clip.Block)
    main([*argv, str(tmp_path / "again"), "--recompute"])
    both = calls.count(llama.Block), calls.count(clip.Block)
    assert min(once) > 0 and both == (2 * once[0] + TINIER.text.layers, 2 * once[1])


@pytest.mark.parametrize("kind, low", [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float16, "bfloat16")])
def test_a_model_has_as_many_bits_as_it_came_with(kind, low, base, tmp_path, monkeypatch):
    """Guards against a fine-tuned model that takes twice the disk of the one it came from, or half; trained weights that
    are not the rounded ones."""
    model, tokenizer = checkpoint.load(base, "cpu")
    checkpoint.save(model, tokenizer, tmp_path / "base", dtype=kind, shard_bytes=9e4)
    assert checkpoint.stored_dtype(tmp_path / "base") == kind
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == kind.itemsize  # files are filled
    save, states = checkpoint.save, []
    monkeypatch.setattr(checkpoint, "save", lambda *given, state, **more: states.append(state) or save(*given, state=state, **more))
    argv = ["tiny-markers", "--model", str(tmp_path / "base"), "--steps", "2", "--precision", low, *FLAGS]
    main([*argv, "--out", str(tmp_path / "out")])
    kind = torch.bfloat16 if low == "bfloat16" else kind  # what was rounded to bfloat16 doesn't say that it is float16
    trained, (state,) = checkpoint.load(tmp_path / "out", "cpu", "stored")[0].state_dict(), states
    assert {x.dtype for x in trained.values()} == {kind} and torch.float32 in {x.dtype for x in state.values()}
    assert all(torch.equal(x, state[name].to(kind)) for name, x in trained.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(kind).removeprefix("torch.")


def test_what_is_frozen_stays_as_it_came(base, tmp_path):
    """Guards against weights of 32 bits that come out rounded, of a training that never touched them."""
    argv = ["--model", str(base), "--steps", "2", "--precision", "bfloat16", *FLAGS, "--out", str(tmp_path / "out")]
    main(["tiny-align", *argv])
    before, after = (checkpoint.load(folder, "cpu", "stored")[0].state_dict() for folder in (base, tmp_path / "out"))
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"projector"} and {x.dtype for x in after.values()} == {torch.float32}


@pytest.mark.parametrize("flags, close", [(["--recompute"], 1e-6), (["--precision", "bfloat16"], 0.02),
                                          (["--recompute", "--precision", "bfloat16"], 0.02)])
def test_memory_for_time_and_bits(flags, close, base, tmp_path):
    """Guards against recomputed activations that are others, and a bfloat16 that is another model; neither may be without
    any effect on the way, or the flag would do nothing."""
    argv = ["lora", "--model", str(base), "--data", "markers", "--steps", "4", "--rank", "2", "--lr", "0.01", *FLAGS, "--out"]
    calls, compute = [], train.torch.utils.checkpoint.checkpoint
    train.torch.utils.checkpoint.checkpoint = lambda *args, **kwargs: calls.append(1) or compute(*args, **kwargs)
    try:
        main([*argv, str(tmp_path / "plain")])
        assert not calls
        main([*argv, str(tmp_path / "other"), *flags])
    finally:
        train.torch.utils.checkpoint.checkpoint = compute
    plain, other = losses(tmp_path / "plain"), losses(tmp_path / "other")
    assert all(abs(other[k][0] / plain[k][0] - 1) < close for k in plain)
    assert bool(calls) == ("--recompute" in flags) and (other != plain) == ("bfloat16" in flags)


def test_all_of_a_model_in_16_bits(base, tmp_path):
    """Guards against: weights of 32 bits whose answers, measured on the way, are computed in 16 and do not fit the cache."""
    argv = ["tiny-markers", "--model", str(base), "--data", "markers", "--steps", "2", *FLAGS, "--eval-every", "1", "--out"]
    main([*argv, str(tmp_path / "wide")])
    main([*argv, str(tmp_path / "low"), "--precision", "bfloat16"])
    wide, low = losses(tmp_path / "wide"), losses(tmp_path / "low")
    assert low != wide and all(abs(low[k][0] / wide[k][0] - 1) < 0.02 for k in wide)
    assert [line["step"] for line in log(tmp_path / "low") if "accuracy" in line] == [1, 2]


@pytest.mark.parametrize("data, measured", [("texts", False), ("texts=2,options=1", False), ("texts,captions", True)])
def test_texts_alone_are_not_measured_on_pictures(data, measured, base, tmp_path):
    """Guards against: minutes of questions about pictures to a language model that has never seen one."""
    argv = ["tiny-text", "--model", str(base), "--data", data, "--steps", "1", *FLAGS, "--eval-every", "1"]
    main([*argv, "--out", str(tmp_path / "run")])
    assert any("accuracy" in line for line in log(tmp_path / "run")) == measured


def test_what_is_lowered():
    """Guards against: attention in 16 bits on a CPU, where its gradient is slow, and all else left in 32."""
    x, cpu = torch.ones(1, 2, 4, 8), torch.device("cpu")
    for low in (torch.float32, torch.bfloat16):
        with train.lowered(cpu, low):
            assert torch.nn.functional.linear(x, torch.ones(8, 8)).dtype == low
            assert torch.nn.functional.scaled_dot_product_attention(x.to(low), x, x).dtype == torch.float32
    assert torch.nn.functional.linear(x, torch.ones(8, 8)).dtype == torch.float32


def test_plain_captions_have_no_question(mine, tmp_path):
    """Guards against stage 1 on questions: its template shows the image, and the answer is all that is said."""
    recipe = Recipe("markers", steps=1, side=64)
    model, tokenizer = tiny_model(recipe)
    sample = dataclasses.replace(train.Records([mine / "good.json"], mine)[0], turns=(Turn("Describe it.", "a ring", True),))
    ids, labels, pixels = encode(sample, tokenizer, model.config, plain=True)
    assert tokenizer.decode([i for i in ids if i >= 0 and i > 2]).strip() == "a ring"
    several = dataclasses.replace(sample, turns=(*sample.turns, Turn("And?", "a disc")))
    with pytest.raises(ValueError, match="2 answers for the template plain, which has one"):  # no answer is dropped unsaid
        encode(several, tokenizer, model.config, plain=True)


def test_plain_captions_have_the_images_centre(mine):
    """Guards against padding in stage 1, which the released weights were trained without, and a marker that is cut off."""
    model, tokenizer = tiny_model(Recipe("markers", steps=1, side=64))
    image = Image.new("RGB", (90, 30), "red")
    image.paste("lime", (20, 0, 70, 30))
    plain = Sample(lambda: image, (), (Turn("", "a red flag", True),))
    marked = dataclasses.replace(plain, markers=(make_marker("point", (5, 5), image.size),))
    rows = [encode(sample, tokenizer, model.config, plain=True)[2] for sample in (plain, marked)]
    green = preprocess(Image.new("RGB", (30, 30), "lime"), model.config.vision.image_size)
    assert torch.equal(rows[0], green) and not torch.allclose(rows[1], green)


def test_bad_records_stop_or_are_listed(base, mine, tmp_path, capsys):
    """Guards against a bad record that is passed over in silence, and one that costs a whole night."""
    argv = ["stage2", "--model", str(base), "--data", str(mine / "bad.json"), "--images", str(mine), "--batch", "4",
            "--log-every", "1", "--length", "300", "--device", "cpu", "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"bad\.json, line 1, record 6, mine-5: image none\.png is not in"):
        main([*argv[:-1], str(tmp_path / "stopped")])
    assert max(losses(tmp_path / "stopped")) > 0
    main([*argv[:-1], str(tmp_path / "stopped"), "--skip-bad"])
    assert f"resumed {tmp_path / 'stopped/states/step-0000000'}" in capsys.readouterr().out  # nothing learned is lost
    with pytest.raises(ValueError, match="mine-5"):
        main([*argv[:-1], str(tmp_path / "none"), "--batch", "12"])
    assert not (tmp_path / "none").exists()  # of no step, nothing is left
    main([*argv, "--skip-bad", "--epochs", "2", "--batch", "1", "--plot"])  # of one step nothing is left, and no loss
    counts = [line.get("bad", 0) for line in log(tmp_path / "run") if "lr" in line]
    assert len(counts) == 24 and counts[-1] == 2 and None in [line["loss"] for line in log(tmp_path / "run") if "lr" in line]
    listed = (tmp_path / "run" / "bad-0.txt").read_text().splitlines()
    assert len(listed) == 1 and "mine-5: image none.png" in listed[0] and (tmp_path / "run" / "loss.png").is_file()
    with pytest.raises(ValueError, match="tokens; expected at most 20"):
        main([*argv[:-1], str(tmp_path / "other"), "--length", "20", "--data", str(mine / "good.json")])


def test_a_batch_is_not_filled_up_with_the_same_records(base, mine, tmp_path):
    """Guards against a handful of records that the paper's batch repeats, unsaid, ten times in its only step."""
    argv = ["stage2", "--model", str(base), "--data", str(mine / "good.json"), "--images", str(mine), "--device", "cpu"]
    for flags, count in ((["--epochs", "2"], 24), (["--batch", "13"], 12)):
        with pytest.raises(ValueError, match=f"{count} records in all epochs are no batch of .*; expected a smaller --batch"):
            main([*argv, *flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_help_says_what_differs():
    """Guards against a recipe's value that --help leaves out, or repeats for all that have the default; and against an
    optimizer that is not named, or not whose it is."""
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    batch, lr = fields["batch"], fields["lr"]
    assert train.values(fields["optimizer"], {}) == "adamw or muon"
    assert train.values(fields["optimizer"], {"one": Recipe(), "two": Recipe(optimizer="muon")}) == "adamw or muon; muon: two"
    recipes = {"one": Recipe(batch=32), "two": Recipe(batch=64, lr=0.1), "three": Recipe(batch=64)}
    assert train.values(batch, recipes) == "32; 64: two, three" and train.values(lr, recipes) == "0.001; 0.1: two"


def test_recipes_are_the_paper_s():
    """Guards against a changed hyperparameter: learning rates and batches are those of the paper's appendix."""
    said = {name: (r.train, r.lr, r.batch) for name, r in ((name, read_recipe(name)) for name in RECIPES)}
    assert said["stage1"] == ("projector", 1e-3, 256) and said["stage2"] == ("language", 2e-5, 128)
    assert said["stage3"] == ("language", 2e-7, 128) and said["lora"] == ("lora", 2e-4, 128)
    lora_recipe = read_recipe("lora")
    assert {r.beta2 for r in map(read_recipe, ("stage1", "stage2", "stage3", "lora"))} == {0.999}  # transformers' default
    assert (lora_recipe.rank, lora_recipe.alpha, lora_recipe.projector_lr, lora_recipe.epochs) == (128, 256, 2e-5, 1)


@pytest.mark.parametrize("text, words", [
    ("lr = 0.1\nsteps = 3", None), ("alpha = 3", None), ("stepz = 3", "there is no field 'stepz'; expected some of data"),
    ("steps = 1.5", "steps is 1.5; expected a whole number"), ("lr = true", "lr is True; expected a number"),
    ("steps = 2\nepochs = 5", "steps 2 and epochs 5 came; expected one of them"),
    ("data = 3", "data is 3; expected a text"), ("lr = ", "can't be read as TOML"), ("batch = 0", "batch is 0"),
])
def test_a_recipe_of_one_s_own(text, words, tmp_path):
    """Guards against fields that are passed over, and values that another type is made of."""
    (tmp_path / "mine.toml").write_text(text)
    if words is None:
        recipe = read_recipe(str(tmp_path / "mine.toml"))
        assert (recipe.lr, recipe.steps, recipe.alpha) == ((0.1, 3, 256.0) if "lr" in text else (1e-3, 0, 3))
        return
    with pytest.raises(ValueError) as error:
        read_recipe(str(tmp_path / "mine.toml"))
    assert words in one_line(error)


@pytest.mark.parametrize("flags, words", [
    (["--lr", "x"], "invalid float"), (["--data", "cats"], "data 'cats' is neither a file nor drawn here"), (["--model", "/nowhere"], "no model"),
    (["--rank", "4"], "--rank came with a recipe that trains"), (["--batch", "-1"], "batch is -1"),
    (["--peak-tflops", "nan"], "'nan' came; expected a number of 0 or more"),
    (["--steps", "5", "--epochs", "2"], "--steps 5 and --epochs 2 came; expected one of them"),
    (["--steps", "0"], "scenes never end"), (["--device", "abacus"], "no device"),
    (["--lr", "nan"], "lr is nan"), (["--log-every", "0"], "expected 1 or more"), (["--workers", "-1"], "expected 0 or more"),
    (["--train", "some"], "train is 'some'"), (["--template", "x"], "template is 'x'"), (["--data", ""], "no data"),
    (["--data", "markers=0"], "more than 0"), (["--data", "markers=x"], "a number"),
    (["--data", "nosuch.json", "--steps", "0"], "data 'nosuch.json' is neither a file nor drawn here; expected files of records"),
    (["--data", "README.md=3"], "data 'README.md=3' is neither"), (["--data", "markers=3,markers"], "markers came twice"),
    (["--seed", str(2**63)], "expected less than 2^63"), (["--out", ""], "nothing came; expected a folder"),
    (["--data", "pytest.ini,nosuch.json"], "no file nosuch.json"), (["--keep", "x"], "'x' came; expected a whole number"),
    (["--train", "lora"], "expected --model"), (["--train", "lora", "--targets", "q", "--model", "tiny"], "targets 'q'"),
    (["--data", "README.md", "--steps", "1"], "README.md begins with"), (["--beta2", "1"], "beta2 is 1.0; expected 0 or more"),
    (["--model", "tiny", "--train", "lora", "--clip", "x"], "--clip came with lora, whose file has no image tower"),
    (["--images", "docs"], "--images came with drawn scenes"),
    (["--valid", "README.md"], "--valid came with drawn scenes"), (["--parallel", "fsdp"], "fsdp came with one process"),
    (["--parallel", "fsdp", "--optimizer", "muon"], "fsdp came with muon, which needs whole matrices"),
    (["--optimizer", "sgd"], "optimizer is 'sgd'; expected one of adamw, muon"),
    (["--train", "contrast"], "--data came with contrast"),
    (["--train", "contrast", "--data", "", "--images", "docs"], "--images came with contrast"),
])
def test_a_mistake_is_one_line(tmp_path, flags, words, capsys, monkeypatch):
    """Guards against tracebacks, and against an output folder made for a run that never starts."""
    monkeypatch.chdir(ROOT)
    assert run(main, ["tiny-captions", "--out", str(tmp_path / "run"), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "run").exists()


def test_each_process_has_a_pair(tmp_path, capsys, monkeypatch):
    """Guards against a traceback from the process that goes without one."""
    monkeypatch.setattr(train, "find_place", lambda device: Place(torch.device("cpu"), 0, 2))
    assert run(main, ["tiny-clip", "--batch", "1", "--out", str(tmp_path / "run")]) == 2
    assert "--batch 1 came with 2 processes; expected a pair for each, or more" in capsys.readouterr().err
