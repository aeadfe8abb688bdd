"""How often does a model name the marked object? Held-out scenes, one marker each, exact matches only.

    python -m evals.scenes --model tiny -n 2000               by kind of marker
    python -m evals.scenes --model tiny -n 2000 --unmarked    the same questions, nothing drawn: only chance is left

Scene i is the same for everyone: it depends on the split, the seed and i alone, and no training run has seen the split
"test". Kinds of marker take turns. Answers are greedy, so a second run prints the same numbers.
"""

import functools
import math
import sys
from collections import Counter
from dataclasses import replace

import torch

import checkpoint
from chat import TEMPLATES, encode_chat, stop_ids
from clip import preprocess
from commandline import Parser, check_device, run
from data import scenes
from overlay import KINDS, draw
from tokenizer import Stream


def answer(model, tokenizer, samples: list[scenes.Sample], max_new_tokens: int) -> list[str]:
    """The greedy answer to each sample's first question; its caption, where nothing is asked."""
    template = model.config.template if samples[0].turns[0].question else "plain"
    prompts = [encode_chat(tokenizer, template, [replace(s.turns[0], answer=None)])[0] for s in samples]
    pixels = torch.stack([preprocess(draw(s.image, s.markers), model.config.vision.image_size) for s in samples])
    streams = [Stream(tokenizer, TEMPLATES[template].stop) for _ in samples]
    texts = [""] * len(samples)
    stop = stop_ids(tokenizer, template)
    for tokens in model.generate(prompts, pixels, max_new_tokens=max_new_tokens, stop_ids=stop):
        for i, token in enumerate(tokens):
            if token is not None and not streams[i].stopped:
                texts[i] += streams[i].push(token)
        if all(stream.stopped for stream in streams):
            break
    return [(text + stream.flush()).strip() for text, stream in zip(texts, streams)]


def evaluate(model, tokenizer, n: int, *, source="markers", split="test", seed=0, side=224, unmarked=False, batch=50):
    """Exact matches on scenes 0 … n - 1: name -> (right, seen). Names are the kinds of marker, or "captions" alone."""
    right, seen, size = Counter(), Counter(), (side, side)
    for first in range(0, n, batch):
        group = range(first, min(first + batch, n))
        names = [KINDS[i % len(KINDS)] if source == "markers" else source for i in group]
        samples = []
        for i, name in zip(group, names):
            make = scenes.caption_sample if name == "captions" else functools.partial(scenes.test_sample, kind=name)
            samples.append(make(scenes.generator_for(split, seed, i), size))
        if unmarked:
            samples = [replace(sample, markers=()) for sample in samples]
        limit = 100 if source == "captions" else 20  # tokens; the longest have under 60 and under 10
        for name, sample, text in zip(names, samples, answer(model, tokenizer, samples, limit)):
            seen[name] += 1
            right[name] += text == sample.turns[0].answer
    return {name: (right[name], seen[name]) for name in seen}


def interval(right: int, seen: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927)."""
    z, p = 1.96, right / seen
    middle, reach = p + z * z / (2 * seen), z * math.sqrt(p * (1 - p) / seen + z * z / (4 * seen * seen))
    return (middle - reach) / (1 + z * z / seen), (middle + reach) / (1 + z * z / seen)


def chance(n: int, split="test", seed=0, side=224) -> float:
    """What naming one of the scene's objects at random would score: a sample draws its scene first, then the marker."""
    drawn = (scenes.sample_scene(scenes.generator_for(split, seed, i), (side, side)) for i in range(n))
    return sum(1 / len(scene.objects) for scene in drawn) / n


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m evals.scenes", description="Exact answers about marked objects.")
    parser.add_argument("--model", default="tiny", help="a name or folder (tiny)")
    parser.add_argument("-n", type=int, default=2000, help="scenes (2000)")
    parser.add_argument("--unmarked", action="store_true", help="ask about markers that are not drawn")
    parser.add_argument("--split", choices=scenes.SPLITS, default="test", help="which scenes (test)")
    parser.add_argument("--seed", type=int, default=0, help="0 or more (0)")
    parser.add_argument("--side", type=int, default=224, help="of a scene, in pixels (224)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    args = parser.parse_args(argv)
    for flag, low in (("n", len(KINDS)), ("seed", 0), ("side", 32)):
        if getattr(args, flag) < low:
            raise ValueError(f"{flag} is {getattr(args, flag)}; expected {low} or more")
    model, tokenizer = checkpoint.load(args.model, check_device(args.device), torch.float32)
    where = {"split": args.split, "seed": args.seed, "side": args.side}
    table = evaluate(model, tokenizer, args.n, unmarked=args.unmarked, **where)
    table["all"] = tuple(map(sum, zip(*table.values())))
    for name, (right, seen) in table.items():
        low, high = interval(right, seen)
        print(f"{name:13} {right / seen:6.1%}   95 % interval {low:5.1%} to {high:5.1%}   ({right} of {seen})")
    print(f"{'chance':13} {chance(args.n, **where):6.1%}   naming one of the scene's objects at random")


if __name__ == "__main__":
    sys.exit(run(main))
