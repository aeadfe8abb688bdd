"""What a linear layer can read off each depth of a frozen CLIP: where geometry fades, and where meaning comes.

    python -m evals.probes --model tiny                  the image tower of a ViP-LLaVA
    python -m evals.probes --clip runs/clip -n 8000      of a CLIP

Scenes with one marker each, of all kinds; for the direction, arrows only. Probes are logistic regressions, trained on
one part of the scenes and tested on the other; a table gives the tested accuracy in percent for every depth, beside the
chance of naming the commonest answer.

    kind            which of the eight markers         \
    direction       where an arrow points to, of eight  | from the patch in the marker's middle, and the patches' mean
    color, shape    of the object that is marked       /
    position        which patch, or one beside it, the marker's middle lies in: one linear score for each patch, softmax
    ink             does the marker cross this patch? From the patch alone, of as many that it crosses as of such beside
                    them that it doesn't: is it still known at this depth where exactly a line ran?

Whoever asks for kind, direction, color or shape is told where the marker's middle is, as attention might find it: what
is read is what the features say there. For most markers that is a place on the object itself.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoint
from clip import CLIPVision, preprocess
from commandline import Parser, at_least, check_device, run
from data.scenes import OBJECT_COLORS, SHAPES, generator_for, render, sample_scene, until_marked
from evals.benchmark import interval, replace_file
from overlay import KINDS, Marker, draw

QUESTIONS = ("kind", "direction", "color", "shape")
PLACED = 1000  # scenes whose patches are kept, to ask for position and ink
DECAY = 1e-3  # of a probe's weights


# -- what is seen, and what is true ----------------------------------------------------------------------------------


def ink_of(marker: Marker, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixels that the marker changes on a blank image."""
    blank = Image.new("RGB", size, "black" if sum(marker.color) > 384 else "white")
    return np.nonzero(np.any(np.asarray(draw(blank, [marker])) != np.asarray(blank), axis=2))[::-1]


def crossed(ink: tuple[np.ndarray, np.ndarray], side: int, grid: int) -> torch.Tensor:
    """Which of grid x grid patches has ink on a twentieth of its pixels or more: 1; has none, but is beside such: 0; else
    -1. (N,)"""
    x, y = (grid * pixels // side for pixels in ink)
    pixels = torch.from_numpy(np.bincount(y * grid + x, minlength=grid * grid))
    inked = pixels >= 0.05 * (side / grid) ** 2
    numbers = torch.arange(grid * grid)
    near = beside(numbers, numbers[inked], grid).any(dim=1)
    return torch.where(inked, 1, torch.where(near & (pixels == 0), 0, -1))


def marked_scene(i: int, split: str, seed: int, side: int, kinds: Sequence[str] = KINDS):
    """A marked image, and the number of the right answer to each question; direction: only if it is an arrow."""
    generator, kind = generator_for(split, seed, i), kinds[i % len(kinds)]
    scene, (thing,), (marker,) = until_marked(lambda: sample_scene(generator, (side, side)), generator, 1, (kind,))
    ink = ink_of(marker, scene.size)
    truth = {"kind": KINDS.index(kind), "place": tuple(pixels.mean() / side for pixels in ink), "ink": ink,
             "color": list(OBJECT_COLORS).index(thing.color), "shape": list(SHAPES).index(thing.shape)}
    if kind == "arrow":
        (x0, y0), (x1, y1) = marker.points[0], marker.points[-1]  # from its tail to its tip
        truth["direction"] = round(math.atan2(y1 - y0, x1 - x0) / (math.pi / 4)) % 8
    return draw(render(scene), [marker]), truth


@torch.no_grad()
def look(tower: CLIPVision, n: int, split: str, seed: int, side: int, kinds: Sequence[str] = KINDS, batch: int = 64):
    """Of n scenes and every depth: pooled features (L + 1, n, 2C), and patches of the first ones (L + 1, m, N, C); for
    each question the answers (n,), -1 where there is none; of the first ones the number of the patch with the marker's
    middle (m,), and what `crossed` says of each patch (m, N)."""
    device, S = tower.class_embedding.device, tower.config.image_size
    grid = S // tower.config.patch_size
    pooled, patches, truths, places, inks = [], [], [], [], []
    layers = tuple(range(tower.config.layers + 1))
    for first in range(0, n, batch):
        images, answers = zip(*(marked_scene(i, split, seed, side, kinds) for i in range(first, min(first + batch, n))))
        pixels = torch.stack([preprocess(image, S) for image in images]).to(device, tower.class_embedding.dtype)
        states = torch.stack(tower.hidden_states(pixels, layers)).float()  # (L + 1, B, 1 + N, C)
        states = states[:, :, 1:].cpu()  # a language model never sees the class token
        here = [int(grid * y) * grid + int(grid * x) for x, y in (truth["place"] for truth in answers)]
        pooled.append(torch.cat([states[:, range(len(here)), here], states.mean(dim=2)], dim=-1))
        if first < PLACED:
            patches.append(states.half())
            inks += [crossed(truth["ink"], side, grid) for truth in answers]
        truths, places = truths + list(answers), places + here
    answers = {name: torch.tensor([truth.get(name, -1) for truth in truths]) for name in QUESTIONS}
    patches = torch.cat(patches, dim=1)
    return torch.cat(pooled, dim=1), patches, answers, torch.tensor(places[: patches.size(1)]), torch.stack(inks)


# -- probes ----------------------------------------------------------------------------------------------------------


def _minimise(loss: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> None:
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def probe(x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor) -> int:
    """How many of test_y (m,) a logistic regression gets right that learned y (n,) from x (n, D)."""
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, test_x = (x - mean) / std, (test_x - mean) / std
    weight = torch.zeros(int(y.max()) + 1, x.size(1), requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    _minimise(lambda: F.cross_entropy(F.linear(x, weight, bias), y) + DECAY * weight.square().sum(), [weight, bias])
    return int((F.linear(test_x, weight, bias).argmax(dim=1) == test_y).sum())


def beside(a: torch.Tensor, b: torch.Tensor, grid: int) -> torch.Tensor:
    """Are the patches a (N,) and b (m,) of grid x grid the same, or neighbours? (N, m)"""
    rows, columns = (a[:, None] // grid - b // grid).abs(), (a[:, None] % grid - b % grid).abs()
    return (rows <= 1) & (columns <= 1)


def place(x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor, grid: int) -> int:
    """How many of test_y (m,), numbers of patches, or patches beside them, the best linear score of a patch finds that
    learned y (n,) from x (n, N, C)."""
    x, test_x = x.float(), test_x.float()
    mean, std = x.mean(dim=(0, 1)), x.std(dim=(0, 1)) + 1e-6
    x, test_x = (x - mean) / std, (test_x - mean) / std
    weight = torch.zeros(x.size(2), requires_grad=True)
    _minimise(lambda: F.cross_entropy(x @ weight, y) + DECAY * weight.square().sum(), [weight])
    found = (test_x @ weight).argmax(dim=1)
    return int(beside(found, test_y, grid).diagonal().sum())


def evenly(y: torch.Tensor, seed: int) -> torch.Tensor:
    """Numbers of as many elements of y (m,) that are 1 as of such that are 0, drawn at random."""
    sides = [torch.nonzero(y == value).flatten() for value in (0, 1)]
    generator, n = torch.Generator().manual_seed(seed), min(map(len, sides))
    return torch.cat([side[torch.randperm(len(side), generator=generator)[:n]] for side in sides])


def table(tower: CLIPVision, n: int, seed: int, side: int) -> dict[str, dict]:
    """Question -> accuracy at each depth, its 95 % intervals, and chance, in percent; tested on n // 2 scenes."""
    results, grid = {}, tower.config.image_size // tower.config.patch_size
    for kinds, names in ((("arrow",), ("direction",)), (KINDS, ("kind", "color", "shape"))):
        x, patches, y, places, inks = look(tower, n, "val", seed, side, kinds)
        test_x, test_patches, test_y, test_places, test_inks = look(tower, n // 2, "test", seed, side, kinds)
        for name in names:
            counts = [probe(x[k], y[name], test_x[k], test_y[name]) for k in range(len(x))]
            results[name] = _row(counts, int((test_y[name] == y[name].mode().values).sum()), n // 2)
    near = beside(torch.arange(tower.config.patches), test_places, grid)  # (N, m)
    counts = [place(patches[k], places, test_patches[k], test_places, grid) for k in range(len(x))]
    results["position"] = _row(counts, int(near.sum(dim=1).max()), len(test_places))
    (y, some), (test_y, others) = ((ink.flatten(), evenly(ink.flatten(), seed)) for ink in (inks, test_inks))
    counts = [probe(patches[k].flatten(0, 1)[some].float(), y[some], test_patches[k].flatten(0, 1)[others].float(), test_y[others])
              for k in range(len(x))]
    results["ink"] = _row(counts, len(others) // 2, len(others))
    return results


def _row(counts: Sequence[int], chance: int, n: int) -> dict:
    percent = [[round(100 * value, 2) for value in (count / n, *interval(count, n))] for count in counts]
    return {"accuracy": [said[0] for said in percent], "interval": [said[1:] for said in percent],
            "chance": round(100 * chance / n, 2), "n": n}


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m evals.probes", description="What each depth of CLIP knows about markers.")
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--model", default="tiny", help="whose image tower is probed: a name or folder (tiny)")
    whose.add_argument("--clip", help="instead, a CLIP: a name or folder")
    parser.add_argument("-n", type=partial(at_least, 128), default=4000, help="scenes to learn from; half as many to test on (4000)")
    parser.add_argument("--seed", type=partial(at_least, 0), default=0, help="0 or more (0)")
    parser.add_argument("--side", type=partial(at_least, 32), default=224, help="of a scene, in pixels (224)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: cuda where there is one)")
    parser.add_argument("--out", type=Path, help="write the table as JSON, too")
    args = parser.parse_args(argv)
    if args.out and not args.out.parent.is_dir():
        raise ValueError(f"can't write {args.out}, as there is no folder {args.out.parent}; expected one that exists")
    device = check_device(args.device)
    if args.clip:
        tower = checkpoint.load_clip(args.clip, device, torch.float32)[0].vision_model
    else:
        tower = checkpoint.load(args.model, device, torch.float32)[0].vision
    results = table(tower, args.n, args.seed, args.side)
    print(f"{'depth':10}" + "".join(f"{depth:>6}" for depth in range(tower.config.layers + 1)) + "  chance")
    for name, said in results.items():
        cells = "".join(f"{value:6.1f}" for value in said["accuracy"])
        print(f"{name:10}{cells}  {said['chance']:6.1f}   (of {said['n']})")
    if args.out:
        replace_file(args.out, json.dumps({"of": args.clip or args.model, **results}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
