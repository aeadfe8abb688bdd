"""Training: one loop that takes samples (image, markers, turns), draws, encodes, and lowers the loss of the answers.

The paper's order at any scale: captions first (what is there, and where), then questions about marked objects. From
nothing to the small model that ships in weights/tiny, on a laptop's CPU:

    python train.py tiny-captions --out runs/captions
    python train.py tiny-markers --model runs/captions --out runs/markers
    python sample.py --model runs/markers --image examples/scene.png --arrow 322,92 "What is this?"

A run folder holds the model in the layout that checkpoint.load reads, the state that resumes it (state.pt) and a log
(log.jsonl). The same command continues a run that was stopped, by Ctrl-C, SIGTERM or a crash: sample i of a run is a
function of (seed, i) alone, so the continuation sees what the uninterrupted run would have seen.

    sample     (image, markers, turns)     data.scenes
    ids        (T,)      chat.encode_chat, each IMAGE expanded to N places
    labels     (T,)      the id where the answer is, IGNORE elsewhere: known by construction
    pixels     (3, S, S) overlay.draw, then clip.preprocess
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import checkpoint
import llama
from chat import HUMAN, encode_chat
from clip import VisionConfig, preprocess
from commandline import Parser, check_device, run
from data import scenes
from evals.scenes import evaluate
from overlay import draw
from tokenizer import Tokenizer
from vipllava import IGNORE, ViPLLaVA, ViPLLaVAConfig, expand, pad


SOURCES = {
    "captions": scenes.caption_sample,
    "markers": scenes.marker_sample,
    "marked": scenes.marked_caption_sample,
    # wider strokes, easier to begin with
    "bold-markers": functools.partial(scenes.marker_sample, distribution=scenes.BOLD),
    "bold-marked": functools.partial(scenes.marked_caption_sample, distribution=scenes.BOLD),
}


def parse_mix(text: str) -> tuple[list[str], list[float]]:
    """ "markers=3,captions=1" -> (["markers", "captions"], [0.75, 1.0]), the upper bounds of a uniform draw."""
    shares = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        if name not in SOURCES:
            raise ValueError(f"unknown data source {name!r}; expected {', '.join(SOURCES)}, as in markers=3,captions=1")
        try:
            shares[name] = float(share or 1)
        except ValueError:
            raise ValueError(f"the share of {name} is {share!r}; expected a number, such as {name}=3") from None
        if not 0 < shares[name] < math.inf:
            raise ValueError(f"the share of {name} is {share}; expected more than 0")
    total, bounds = sum(shares.values()), []
    for share in shares.values():
        bounds.append((bounds[-1] if bounds else 0.0) + share / total)
    return list(shares), bounds[:-1] + [1.0]


@dataclass(frozen=True)
class Recipe:
    """All that decides what a run computes; every field is a flag of the command line."""

    data: str  # sources and their shares, such as "markers=3,captions=1"
    steps: int
    batch: int = 32  # samples a step; on a plateau more steps help more than larger ones
    lr: float = 1e-3  # the peak: linear warm-up, then a cosine to zero
    warmup: float = 0.03  # of the steps
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # largest norm of the gradient
    side: int = 224  # of a scene, in pixels
    seed: int = 0

    def __post_init__(self):
        parse_mix(self.data)
        for name, low in (("steps", 1), ("batch", 1), ("side", 32), ("seed", 0), ("weight_decay", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {low} or more")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}; expected a part of the steps, 0 to 1")


RECIPES = {
    "tiny-captions": Recipe("captions", steps=5000),
    "tiny-markers": Recipe("markers=2,bold-markers=3,marked=2,bold-marked=2", steps=10_000),
}
TINY = ViPLLaVAConfig(
    vision=VisionConfig(image_size=112, patch_size=14, width=128, layers=7, heads=4, mlp=512),
    text=llama.SIZES["tiny"],
    feature_layers=(-2, -3, -4, -5, 1),
)
POOL = 8  # batches


# -- data ------------------------------------------------------------------------------------------------------------


class Scenes(Dataset):
    """Sample i, drawn and encoded: (ids, labels, pixels). The same for the same (recipe.seed, i), in any process."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, config: ViPLLaVAConfig):
        self.recipe, self.tokenizer, self.config = recipe, tokenizer, config
        self.sources, self.bounds = parse_mix(recipe.data)

    def __getitem__(self, index: int) -> tuple[list[int], list[int], torch.Tensor]:
        generator = scenes.generator_for("train", self.recipe.seed, index)
        u = generator.random()
        source = next(s for s, bound in zip(self.sources, self.bounds) if u < bound)
        return encode(SOURCES[source](generator, (self.recipe.side,) * 2), self.tokenizer, self.config)


def encode(sample: scenes.Sample, tokenizer: Tokenizer, config: ViPLLaVAConfig):
    """One sample -> ids and labels (T,), pixels (3, S, S)."""
    template = config.template if sample.turns[0].question else "plain"
    ids, trained = encode_chat(tokenizer, template, sample.turns)
    labels = [i if t else IGNORE for i, t in zip(ids, trained)]
    labels = [label for i, label in zip(ids, labels) for _ in expand([i], config.vision.patches)]
    pixels = preprocess(draw(sample.image, sample.markers), config.vision.image_size)
    return expand(ids, config.vision.patches), labels, pixels


def collate(rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> ids (B, T), labels (B, T), pixels (B, 3, S, S). Padded on the right, where causal attention never looks."""
    ids, labels, pixels = zip(*rows)
    return pad(ids, 0, side="right")[0], pad(labels, IGNORE, side="right")[0], torch.stack(pixels)


def batches(data: Dataset, recipe: Recipe, first: int, workers: int) -> Iterator:
    """The batches of steps first … recipe.steps - 1. A pool of samples is sorted by length before it is cut into POOL
    batches, which come in random order: so hardly anything of a batch is padding."""
    pools = range(first // POOL, -(-recipe.steps // POOL))
    indices = [range(p * POOL * recipe.batch, (p + 1) * POOL * recipe.batch) for p in pools]
    loader = DataLoader(data, batch_sampler=indices, collate_fn=list, num_workers=workers)
    for pool, rows in zip(pools, loader):
        rows = sorted(rows, key=lambda row: len(row[0]))
        for place, k in enumerate(np.random.default_rng([recipe.seed, pool]).permutation(POOL)):
            if first <= pool * POOL + place < recipe.steps:
                yield collate(rows[k * recipe.batch : (k + 1) * recipe.batch])


# -- the loop --------------------------------------------------------------------------------------------------------


def learning_rate(step: int, recipe: Recipe) -> float:
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))


def train(model: ViPLLaVA, tokenizer: Tokenizer, recipe: Recipe, out: Path, *, workers, log, evals, save) -> None:
    """Train to recipe.steps, or on from out/state.pt. log, evals, save: print, measure and save every so many steps."""
    device = model.llama.embed_tokens.weight.device
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    first = load_state(out, model, optimizer, recipe)
    data = batches(Scenes(recipe, tokenizer, model.config), recipe, first, workers)
    stopping = stop_signals()
    began, seen = time.perf_counter(), 0
    for step, (ids, labels, pixels) in enumerate(data, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        model.train()
        loss = model.loss(ids.to(device), labels.to(device), pixels.to(device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        if not norm.isfinite():
            raise ValueError(f"the loss is {loss.item()} and its gradient {norm.item()} at step {step}; lower --lr")
        optimizer.step()
        optimizer.zero_grad()

        done, seen = step + 1, seen + len(ids)
        if done % log == 0 or done == recipe.steps:
            rate = seen / (time.perf_counter() - began)
            left = (recipe.steps - done) * recipe.batch / rate / 60
            lr = learning_rate(step, recipe)
            report(out, step=done, loss=round(loss.item(), 4), lr=round(lr, 7), norm=round(norm.item(), 3),
                   rate=round(rate, 1), left=round(left, 1))
            began, seen = time.perf_counter(), 0
        if done % evals == 0 or done == recipe.steps:
            report(out, step=done, accuracy=held_out_accuracy(model.eval(), tokenizer, recipe))
            began = time.perf_counter()
        stop = bool(stopping)  # read once: a signal may come at any moment
        if done % save == 0 or done == recipe.steps or stop:
            save_state(out, model, optimizer, recipe, done)
            checkpoint.save(model, tokenizer, out)
        if stop:
            sys.exit(f"stopped after step {done} of {recipe.steps}; the same command continues")


def held_out_accuracy(model: ViPLLaVA, tokenizer: Tokenizer, recipe: Recipe, n: int = 256) -> dict[str, float]:
    """Exact matches on held-out scenes, by kind of marker; of whole captions, where a run trains on nothing else."""
    source = "captions" if parse_mix(recipe.data)[0] == ["captions"] else "markers"
    table = evaluate(model, tokenizer, n, source=source, split="val", seed=recipe.seed, side=recipe.side)
    table["all"] = tuple(map(sum, zip(*table.values())))
    return {name: round(right / seen, 3) for name, (right, seen) in table.items()}


def stop_signals() -> list[int]:
    """A list that Ctrl-C or SIGTERM fills, so that a step is finished and saved before the run ends."""
    stopping = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: stopping.append(number))
    return stopping


def report(out: Path, **fields) -> None:
    """One line to read, and the same as JSON in log.jsonl."""
    units = {"rate": "samples/s", "left": "min left"}
    print("  ".join(f"{v} {units[k]}" if k in units else f"{k} {v}" for k, v in fields.items()), flush=True)
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(fields) + "\n")


def save_state(out: Path, model, optimizer, recipe: Recipe, step: int) -> None:
    """All that the next step depends on, written beside and renamed."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"recipe": dataclasses.asdict(recipe), "step": step}
    torch.save(state, out / "state.pt.part")
    os.replace(out / "state.pt.part", out / "state.pt")


def load_state(out: Path, model, optimizer, recipe: Recipe) -> int:
    """The number of steps already done in this folder: 0 in a new one."""
    if not (out / "state.pt").exists():
        return 0
    try:
        state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
        before, now = state["recipe"], dataclasses.asdict(recipe)
    except (RuntimeError, KeyError, TypeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{out}/state.pt can't be read ({type(error).__name__}); is it whole?") from None
    if changed := [f"{key} {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]]:
        expected = "expected the same flags, or another --out"
        raise ValueError(f"{out} holds a run with another recipe ({'; '.join(changed)}); {expected}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"resumed {out} at step {state['step']} of {recipe.steps}", flush=True)
    return state["step"]


# -- a small model from nothing --------------------------------------------------------------------------------------


def tiny_model(recipe: Recipe) -> tuple[ViPLLaVA, Tokenizer]:
    """A random ViP-LLaVA of TINY's sizes, 2.5 M parameters, and a tokenizer that knows the words of the scenes."""
    texts = []
    for index in range(1000):
        for source in SOURCES.values():
            sample = source(scenes.generator_for("train", recipe.seed, index), (recipe.side,) * 2)
            texts += [t for turn in sample.turns for t in (turn.question, turn.answer)]
    texts += [HUMAN + " USER: ", " ASSISTANT:"] * 1000
    tokenizer = Tokenizer.train(texts, 1024)
    torch.manual_seed(recipe.seed)
    text = dataclasses.replace(TINY.text, vocab_size=tokenizer.vocab_size + 2)  # and <image>, <pad>
    return ViPLLaVA(dataclasses.replace(TINY, text=text, image_token_id=tokenizer.vocab_size)), tokenizer


# -- command line ----------------------------------------------------------------------------------------------------


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Train a ViP-LLaVA.")
    parser.add_argument("recipe", choices=RECIPES, help="what to train; flags override its fields")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; a run that is in it is continued")
    parser.add_argument("--model", help="start from these weights (a name or folder); without it, a small random model")
    for field in dataclasses.fields(Recipe):
        recipes = ", ".join(f"{name} has {getattr(recipe, field.name)}" for name, recipe in RECIPES.items())
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=field.type, default=argparse.SUPPRESS, metavar="…", help=recipes)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    for name, default, low, text in (
        ("workers", 0, 0, "processes that draw; on few cores they slow training down"),
        ("log", 50, 1, "steps between two lines"),
        ("evals", 500, 1, "steps between two measurements on held-out scenes"),
        ("save", 250, 1, "steps between two checkpoints"),
    ):
        number = functools.partial(at_least, low)
        parser.add_argument(f"--{name}", type=number, default=default, help=f"{text} ({default})")
    return parser.parse_args(argv)


def at_least(low: int, text: str) -> int:
    if int(text) < low:
        raise argparse.ArgumentTypeError(f"{text} came; expected {low} or more")
    return int(text)


def main(argv: list[str]) -> None:
    args = arguments(argv)
    names = [field.name for field in dataclasses.fields(Recipe)]
    recipe = dataclasses.replace(RECIPES[args.recipe], **{n: getattr(args, n) for n in names if hasattr(args, n)})
    device = check_device(args.device)
    checkpoint.check_target(args.out)
    model, tokenizer = checkpoint.load(args.model, device, torch.float32) if args.model else tiny_model(recipe)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {recipe}", flush=True)
    every = {"log": args.log, "evals": args.evals, "save": args.save}
    train(model.to(device), tokenizer, recipe, args.out, workers=args.workers, **every)


if __name__ == "__main__":
    sys.exit(run(main))
