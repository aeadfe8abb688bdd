"""The paper's claims, and questions that it leaves open, asked of a small model in a small world.

    python -m evals.experiments overlay                  one experiment: RUN/overlay.json and, with matplotlib, .png
    python -m evals.experiments all --quick --precision bfloat16 --compile      the shape of every figure
    python -m evals.experiments all --device cuda

| experiment | question                                                            | what is trained                 |
| ---------- | ------------------------------------------------------------------- | ------------------------------- |
| overlay    | is a marker best drawn, told as coordinates, or shown beside?       | a variant for each, and seed    |
| layers     | which depths of CLIP must be joined, for which marker?              | a variant for each, and seed    |
| probes     | what does a linear layer read off each depth?                       | probes                          |
| unseen     | how far beyond the markers of training does it work?                | one on narrow bands, for a seed |
| kinds      | which of the eight markers is understood best?                      | nothing                         |
| numbers    | how many markers may one picture bear?                              | nothing                         |
| beyond     | does a marker harm questions about the whole picture?               | nothing                         |
| breaking   | clutter, occlusion, noise, …: when does it break?                   | nothing                         |
| clips      | which size of CLIP, and of its patches, sees markers?               | CLIPs                           |

What is trained is the language model and a new projector, on one file of what the frozen tower sees (variants.py). Each
number stands with a 95 % interval, and beside what chance gives: over seeds Student's, of one run the test set's
(Wilson; of shares a bootstrap). The same command goes on with a run that was cut; what is done is not done again.
"""

import hashlib
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import checkpoint
import contrast
import train
from clip import VisionConfig
from commandline import Parser, at_least, check_device, run
from data.records import Sample
from data.scenes import generator_for
from evals import figures, probes, trials
from evals.benchmark import answer, check_folder, interval, interval_of_mean, read_json, replace_file
from evals.variants import Course, Lessons, States, Variant, by_coordinates, examine, exercise, lesson, start, teach
from overlay import KINDS
from parallel import Place
from recipe import Habits, read_recipe
from tokenizer import Tokenizer
from vipllava import ViPLLaVA

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # t of 97.5 %, n seeds


@dataclass(frozen=True)
class Budget:
    """How much is done."""

    lessons: int = 12_000  # that a variant learns from
    steps: int = 600  # of 32 lessons
    exercises: int = 800  # that a number is counted on
    seeds: int = 3
    probed: int = 4000  # scenes that a probe learns from
    clip_steps: int = 800  # of 64 pairs


QUICK = Budget(lessons=1200, steps=120, exercises=96, seeds=1, probed=512, clip_steps=8)


# -- numbers ---------------------------------------------------------------------------------------------------------


def row(series: str, x: str | float, results: Sequence[Sequence[float]], chance: float) -> dict:
    """A point of a figure, in percent. results: of each seed what every exercise scored, 0 to 1."""
    means, n = [statistics.mean(scores) for scores in results], len(results[0])
    mean = statistics.mean(means)
    if len(means) > 1:
        reach = STUDENT[len(means)] * statistics.stdev(means) / math.sqrt(len(means))
        low, high = max(0.0, mean - reach), min(1.0, mean + reach)
    elif set(results[0]) <= {0, 1}:
        low, high = interval(sum(results[0]), n)
    else:
        low, high = interval_of_mean(results[0])
    said = {"accuracy": mean, "low": low, "high": high, "chance": chance}
    said = {"series": series, "x": x, **{k: round(100 * v, 2) for k, v in said.items()}, "n": n, "seeds": len(means)}
    return said | {"each": [round(100 * one, 2) for one in means]}  # of each seed: two variants are compared seed by seed


@dataclass(frozen=True)
class Lab:
    """What the experiments share."""

    model: ViPLLaVA  # its tower is the frozen one, and its language model the one that variants start from
    tokenizer: Tokenizer
    budget: Budget
    out: Path
    side: int
    low: torch.dtype = torch.float32  # in which variants and CLIPs are trained
    compile: bool = False  # variants

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def kept(self, name: str, make: Callable[[], object]):
        """make(), or what it made before the run was cut."""
        path = self.out / "parts" / f"{name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(make()))
        return read_json(path)

    def ask(self, samples: Sequence[Sample], model: ViPLLaVA | None = None, limit: int = 16) -> list[str]:
        """The answers to the samples' questions."""
        groups = (samples[first : first + 50] for first in range(0, len(samples), 50))
        return [text for group in groups for text in answer(model or self.model, self.tokenizer, group, limit)]

    def exact(self, samples: Sequence[Sample], model: ViPLLaVA | None = None) -> list[bool]:
        return [text == sample.turns[0].answer for sample, text in zip(samples, self.ask(samples, model))]

    def lessons(self, split: str, n: int, make: Callable) -> list:
        return [make(generator_for(split, 0, i), self.size, i) for i in range(n)]

    def states(self, name: str, lessons: Sequence, picture: str = "marked") -> States:
        path = self.out / "states" / f"{name}-{picture}.npy"
        return States(path, self.model.vision, lambda i: getattr(lessons[i], picture), len(lessons))

    def trained(self, name: str, variant: Variant, lessons: Sequence, states: dict, seed: int, then: Callable):
        """What `then` finds about the variant, once it has been trained. name: of what it learns from; two experiments
        that train the same train it once."""
        name = f"{name} {variant.trains_like(self.model.config.vision.layers + 1)} {seed}"

        def make():
            model, folder = start(self.model, variant.layers, seed), self.out / "runs" / name
            course = Course(self.budget.steps, low=self.low, compile=self.compile)
            teach(model, Lessons(lessons, states, variant, self.tokenizer, model.config), course, seed, folder)
            with torch.compiler.set_stance("force_eager"):  # answering would compile each block for each length
                found = then(model.eval())
            shutil.rmtree(folder)
            return found

        return self.kept(name, make)


# -- experiments: each yields rows -----------------------------------------------------------------------------------


def _plain(generator, size, i):
    return lesson(generator, size)


def _one_each(generator, size, i):
    return exercise(generator, size, KINDS[i % len(KINDS)])


def _variants(lab: Lab, variants: Sequence[Variant]) -> Iterator[dict]:
    """Each variant's accuracy, for all kinds of marker and for each."""
    lessons, tests = lab.lessons("train", lab.budget.lessons, _plain), lab.lessons("test", lab.budget.exercises, _one_each)
    pictures = {picture for variant in variants for picture in variant.pictures}
    learned = {picture: lab.states("train", lessons, picture) for picture in sorted(pictures)}
    tested = {picture: lab.states("test", tests, picture) for picture in sorted(pictures)}
    chance = statistics.mean(1 / len(test.scene.objects) for test in tests)
    for variant in variants:
        data = Lessons(tests, tested, variant, lab.tokenizer, lab.model.config)
        found = [lab.trained("train", variant, lessons, learned, seed, lambda model: examine(model, data))
                 for seed in range(lab.budget.seeds)]
        yield row(variant.name, "all", found, chance)
        for k, kind in enumerate(KINDS):
            yield row(variant.name, kind, [scores[k :: len(KINDS)] for scores in found], chance)


def overlay(lab: Lab) -> Iterator[dict]:
    layers = lab.model.config.feature_layers
    return _variants(lab, (
        Variant("marked", layers),
        Variant("marked + unmarked tokens", layers, ("marked", "unmarked")),
        Variant("coordinates as text", layers, ("unmarked",), by_coordinates),
        Variant("unmarked", layers, ("unmarked",)),
    ))


def layers(lab: Lab) -> Iterator[dict]:
    five, depths = lab.model.config.feature_layers, lab.model.config.vision.layers + 1
    singles = [Variant(f"depth {k}", (k,)) for k in range(depths)]
    deep = tuple(k for k in five if k < 0) or five[:-1]
    return _variants(lab, [Variant("five", five), Variant("deep four", deep), Variant("last", (-2,)), *singles])


def probed(lab: Lab) -> Iterator[dict]:
    tables = [lab.kept(f"probes-{seed}", lambda: probes.table(lab.model.vision, lab.budget.probed, seed, lab.side))
              for seed in range(lab.budget.seeds)]
    for name, table in tables[0].items():
        for depth in range(len(table["accuracy"])):
            means = [[one[name]["accuracy"][depth] / 100] for one in tables]
            said = row(name, depth, means, statistics.mean(one[name]["chance"] / 100 for one in tables))
            if len(tables) == 1:
                said |= dict(zip(("low", "high"), table["interval"][depth]))
            yield said | {"n": table["n"], "unit": "depth"}


def unseen(lab: Lab) -> Iterator[dict]:
    """One training on markers from narrow bands; then each attribute beyond its band, the others within theirs."""
    lessons = lab.lessons("train", lab.budget.lessons, lambda generator, size, i: trials.narrow_lesson(generator, size))
    learned = {"marked": lab.states("narrow", lessons)}
    points = [(name, value) for name, attribute in trials.ATTRIBUTES.items() for value in attribute.values]

    def examined(model):
        model.vision = lab.model.vision
        found = []
        for name, value in points:
            make = trials.ATTRIBUTES[name].make
            samples = [make(generator_for("test", 0, i), lab.size, value) for i in range(lab.budget.exercises // 2)]
            found.append([lab.exact(samples, model), statistics.mean(sample.chance for sample in samples)])
        return found

    variant = Variant("narrow", lab.model.config.feature_layers)
    tables = [lab.trained("narrow", variant, lessons, learned, seed, examined) for seed in range(lab.budget.seeds)]
    for k, (name, value) in enumerate(points):
        inside = trials.ATTRIBUTES[name].inside(value)
        said = {"trained": inside, "unit": trials.ATTRIBUTES[name].unit}
        yield row(name, value, [table[k][0] for table in tables], tables[0][k][1]) | said


def kinds(lab: Lab) -> Iterator[dict]:
    """The same things, marked by each kind in turn."""
    for kind in KINDS:
        yield _counted(lab, "whole model", kind, lambda generator: trials.of_kind(generator, lab.size, kind))


def numbers(lab: Lab) -> Iterator[dict]:
    for count in range(1, 9):
        series = "eight things, so many of them marked"
        yield _counted(lab, series, count, lambda generator: trials.of_many(generator, lab.size, count)) | {"unit": "markers"}


def breaking(lab: Lab) -> Iterator[dict]:
    for name, trial in trials.BREAKING.items():
        for level in trial.levels:
            yield _counted(lab, name, level, lambda generator: trial.make(generator, lab.size, level)) | {"unit": trial.unit}


def _counted(lab: Lab, series: str, x, make: Callable[[np.random.Generator], trials.Trial]) -> dict:
    def count():
        samples = [make(generator_for("test", 0, i)) for i in range(lab.budget.exercises // 2)]
        return [lab.exact(samples), statistics.mean(sample.chance for sample in samples)]

    scores, chance = lab.kept(f"{series}-{x}".replace("/", " of "), count)
    return row(series, x, [scores], chance)


def beyond(lab: Lab) -> Iterator[dict]:
    """"Describe the image." with none to three markers on it: facts told rightly, and things counted rightly."""
    for marks in range(4):
        samples = [trials.described(generator_for("test", 0, i), lab.size, marks) for i in range(lab.budget.exercises // 2)]
        texts = lab.kept(f"described-{marks}", lambda: lab.ask(samples, limit=100))
        right = {"facts of the caption": trials.facts_right, "number of things": trials.number_right}
        for name, score in right.items():
            scores = [score(*both) for both in zip(samples, texts)]
            yield row(name, marks, [scores], trials.chance_of(name, marks)) | {"unit": "markers"}


TOWERS = {f"{name}, patches of {patch}": VisionConfig(image_size=112, patch_size=patch, width=width, layers=depth,
                                                      heads=width // 32, mlp=4 * width)
          for name, (width, depth) in {"small": (64, 4), "medium": (128, 7), "large": (192, 9)}.items()
          for patch in (14, 8)}


def clips(lab: Lab) -> Iterator[dict]:
    """CLIPs of six sizes from nothing: which kind of marker, by the best caption and by the best depth's probe."""
    for name, config in TOWERS.items():
        found = lab.kept(f"clip-{name}", lambda: _clip(lab, name, config))
        yield row("zero-shot", name, [found["zero-shot"]], 1 / len(KINDS))
        yield row("probe", name, [[found["probe"]["accuracy"] / 100]], found["probe"]["chance"] / 100) | found["probe"]


def _clip(lab: Lab, name: str, config: VisionConfig) -> dict:
    device, folder = next(lab.model.parameters()).device, lab.out / "runs" / f"clip {name}"
    model, tokenize = contrast.tiny_clip(0, config)
    model.to(device)
    pairs = contrast.Pairs(tokenize, config, 0, lab.side)
    recipe = replace(read_recipe("tiny-clip"), steps=lab.budget.clip_steps)
    task = train.Task(contrast.Contrast(model, lab.low), pairs, publish=lambda state: None)
    train.train(task, recipe, folder, name, Place(device, 0, 1), Habits(log_every=200, keep=1))
    table = probes.table(model.vision_model.eval(), lab.budget.probed, 0, lab.side)["kind"]
    best = max(range(len(table["accuracy"])), key=table["accuracy"].__getitem__)
    low, high = table["interval"][best]
    zero = trials.zero_shot(model.eval(), tokenize, lab.budget.exercises, lab.size)
    shutil.rmtree(folder)
    said = {"accuracy": table["accuracy"][best], "low": low, "high": high, "chance": table["chance"], "n": table["n"]}
    return {"zero-shot": zero, "probe": said | {"depth": best}}


EXPERIMENTS = {"kinds": kinds, "numbers": numbers, "beyond": beyond, "breaking": breaking, "probes": probed,
               "overlay": overlay, "layers": layers, "unseen": unseen, "clips": clips}
MEASURES = {"probes": "read rightly", "beyond": "told rightly", "clips": "kinds of marker told rightly"}  # else exact answers


# -- command ---------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m evals.experiments", description="The paper's argument, in a small world.")
    parser.add_argument("experiment", choices=(*EXPERIMENTS, "all"), help="which")
    parser.add_argument("--model", default="tiny", help="whose tower and language model: a name or folder (tiny)")
    parser.add_argument("--out", type=Path, help="the folder of results (runs/experiments, or runs/quick)")
    parser.add_argument("--quick", action="store_true", help="the shape of every figure only")
    parser.add_argument("--side", type=int, default=224, help="of a scene, in pixels (224)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: cuda where there is one)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of training (float32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the variants that are trained, not CLIPs")
    for name, value in asdict(Budget()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=partial(at_least, 1), help=f"({value})")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in asdict(Budget()) if getattr(args, name) is not None}
    budget = Budget(**{**asdict(QUICK if args.quick else Budget()), **given})
    if budget.seeds > max(STUDENT) or budget.exercises < 2 * len(KINDS) or budget.probed < 128 or args.side < 32:
        raise ValueError(f"{budget}, side {args.side}; expected at most {max(STUDENT)} seeds, and no less than "
                         f"{2 * len(KINDS)} exercises, 128 probed scenes and a side of 32")
    out = args.out or Path("runs/quick" if args.quick else "runs/experiments")
    check_folder(out)
    model, tokenizer = checkpoint.load(args.model, check_device(args.device), torch.float32)
    if model.config.quantized:
        raise ValueError(f"{args.model} is {model.config.quantized}; expected 16 or 32 bits a weight")
    about = {"model": args.model, "weights": digest(model), "side": args.side, "precision": args.precision,
             "rates": [Course.lr, Course.projector_lr], **asdict(budget)}
    del about["seeds"]  # more of them may come later
    refuse_another(out, about)
    torch.set_flush_denormal(True)  # as train.py does
    lab = Lab(model, tokenizer, budget, out, args.side, getattr(torch, args.precision), args.compile)
    for name in EXPERIMENTS if args.experiment == "all" else [args.experiment]:
        rows = []
        for said in EXPERIMENTS[name](lab):
            rows.append(said)
            print("{series:36} {x!s:>24} {accuracy:6.1f}   ({low:.1f} to {high:.1f}; chance {chance:.1f})".format(**said), flush=True)
        measure = MEASURES.get(name, "exact answers")
        replace_file(out / f"{name}.json", json.dumps({"experiment": name, "measure": measure, **about, "rows": rows}, indent=1) + "\n")
        figures.draw(out / f"{name}.json")


def digest(model: ViPLLaVA) -> str:
    """A few letters that change with any of the weights: a folder may be trained anew under its old name."""
    sums = [p.detach().cpu().double().sum().item() for p in model.parameters()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:12]


def refuse_another(out: Path, about: dict) -> None:
    """The folder's results must be of these settings. ValueError: they are of others."""
    path = out / "about.json"
    then = read_json(path) if path.is_file() else about
    if not isinstance(then, dict):
        raise ValueError(f"{path} says nothing of a model or budget; expected another --out")
    if changed := [f"{key} {then.get(key)}, now {about.get(key)}" for key in {**then, **about} if then.get(key) != about.get(key)]:
        expected = "expected the same flags, or another --out"
        raise ValueError(f"{path} speaks of another model or budget ({'; '.join(changed)}); {expected}")
    out.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
