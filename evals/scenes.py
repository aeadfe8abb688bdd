"""How often does a model name the marked object? Held-out scenes, one marker each, exact matches only.

    python -m evals.scenes --model tiny -n 2000               by kind of marker
    python -m evals.scenes --model tiny -n 2000 --unmarked    the same questions, nothing drawn: only chance is left
    python -m evals.scenes --model tiny -n 2000 --tasks       the other tasks that training asks, n questions each

Scene i is the same for everyone: it depends on the split, the seed and i alone, and no training run has seen the split
"test". Kinds of marker take turns. Answers are greedy, so a second run prints the same numbers.
"""

import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import torch

import checkpoint
from commandline import Parser, at_least, check_device, run
from data import questions, scenes
from data.batches import DRILLS, SCENES
from data.records import Sample
from evals.benchmark import answer, interval
from overlay import KINDS

LEFT_OUT = ("texts", "markers", "bold-markers", "bold-marked", "vip-bench")  # ViP-Bench is there in its parts
MEASURED = [name for name in DRILLS if name.startswith("vip-") or name.endswith("-spelled") or name == "signs"]
STEPS = "-steps"  # of a task that ends so all questions are asked, each after the model's own answers; the last counts
TASKS = [name for name in SCENES if name not in LEFT_OUT and (name not in DRILLS or name in MEASURED)]


def evaluate(model, tokenizer, n: int, *, source="markers", split="test", seed=0, side=224, unmarked=False, batch=50):
    """Exact matches on scenes 0 … n - 1: name -> (right, seen), and "all". source is

    "markers"            one question about one marker; names are the kinds of marker
    another of SCENES    the first question of the task, whose name is the only one
    one with STEPS       all questions of the task, each after the model's answers so far; the last counts
    """
    right, seen, size = Counter(), Counter(), (side, side)
    for first in range(0, n, batch):
        group = range(first, min(first + batch, n))
        names = [KINDS[i % len(KINDS)] if source == "markers" else source for i in group]
        samples = [sample_of(name, scenes.generator_for(split, seed, i), size) for i, name in zip(group, names)]
        if unmarked:
            samples = [replace(sample, markers=()) for sample in samples]
        limit = 20 if source == "markers" else 100  # tokens
        said = [[] for _ in samples]
        for _ in samples[0].turns if source.endswith(STEPS) else (0,):
            for texts, text in zip(said, answer(model, tokenizer, samples, limit, said=said)):
                texts.append(text)
        for name, sample, texts in zip(names, samples, said):
            seen[name] += 1
            right[name] += texts[-1] == sample.turns[len(texts) - 1].answer
    return {name: (right[name], seen[name]) for name in seen} | {"all": (right.total(), seen.total())}


def sample_of(name: str, generator, size: tuple[int, int]) -> Sample:
    """A sample of a task, or of a kind of marker."""
    return questions.test_sample(generator, size, name) if name in KINDS else SCENES[name](generator, size)


def commonest(task: str, n: int, split="test", seed=0, side=224) -> float:
    """What always giving the commonest answer would score."""
    k = -1 if task.endswith(STEPS) else 0
    answers = Counter(sample_of(task, scenes.generator_for(split, seed, i), (side, side)).turns[k].answer for i in range(n))
    return max(answers.values()) / n


def chance(n: int, split="test", seed=0, side=224) -> float:
    """What naming one of the scene's objects at random would score: a sample draws its scene first, then the marker."""
    drawn = (scenes.sample_scene(scenes.generator_for(split, seed, i), (side, side)) for i in range(n))
    return sum(1 / len(scene.objects) for scene in drawn) / n


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m evals.scenes", description="Exact answers about marked objects.")
    parser.add_argument("--model", default="tiny", help="a name or folder (tiny)")
    parser.add_argument("-n", type=partial(at_least, len(KINDS)), default=2000, help="scenes (2000)")
    parser.add_argument("--unmarked", action="store_true", help="ask about markers that are not drawn")
    parser.add_argument("--tasks", action="store_true", help="the other tasks of training, n questions each")
    parser.add_argument("--split", choices=scenes.SPLITS, default="test", help="which scenes (test)")
    parser.add_argument("--seed", type=partial(at_least, 0), default=0, help="0 or more (0)")
    parser.add_argument("--side", type=partial(at_least, 32), default=224, help="of a scene, in pixels (224)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    args = parser.parse_args(argv)
    model, tokenizer = checkpoint.load(args.model, check_device(args.device), torch.float32)
    where = {"split": args.split, "seed": args.seed, "side": args.side}
    if args.tasks:
        width = max(map(len, TASKS))
        for task in TASKS:
            found = evaluate(model, tokenizer, args.n, source=task, unmarked=args.unmarked, **where)["all"]
            print(f"{_line(task.ljust(width), *found)}   the commonest answer {commonest(task, args.n, **where):5.1%}", flush=True)
        return
    for name, found in evaluate(model, tokenizer, args.n, unmarked=args.unmarked, **where).items():
        print(_line(name, *found))
    print(f"{'chance':13} {chance(args.n, **where):6.1%}   naming one of the scene's objects at random")


def _line(name: str, right: int, seen: int) -> str:
    low, high = interval(right, seen)
    return f"{name:13} {right / seen:6.1%}   95 % interval {low:5.1%} to {high:5.1%}   ({right} of {seen})"


if __name__ == "__main__":
    sys.exit(run(main))
