"""How fast an answer comes: ours and transformers', in one run on the same weights.

    python -m bench.speed --size 1b                                    on a CPU: 16 bits, 8, 4, and 32
    python -m bench.speed --size 7b --compile --gpt-fast ../gpt-fast   on a GPU; beside gpt-fast's commit 32971d3, too
    python -m bench.speed --size 7b --layers 4 --compile               its shapes, in a fraction of the time
    python -m bench.speed --size 7b --alone --precision bfloat16 --measure load
    python -m bench.speed --size tiny --tokens 8 --repeat 1            does it run?

| --measure | line        | what is timed                                                                         |
| --------- | ----------- | ------------------------------------------------------------------------------------- |
| answer    | prefill     | from pixels and ids (the image, and --words after it) to the first token              |
|           | decode      | a token after that, the mean of --tokens                                              |
| look      | images      | --images pictures at once through CLIP and the projector                              |
| turn      | second turn | of a chat, to its first token: with what is kept of the first, against starting over  |
| load      | load        | from a folder to a model                                                              |
|           | … touched   | and until a number of each page of its weights has been read                          |

Each side (answering.py) is a process; they take turns, and what counts are medians after a warm-up, in which whatever
is compiled is compiled (its time is told). Limits are measured in the same run: for decode the bytes that a token has
to read, over the most that a copy or a matrix-vector product moves here; for prefill its operations, over what a large
matrix product reaches (with 16 bits a weight in 16 or 32 bits, whichever is faster here). Each side must say the same
tokens whenever it is timed, and in 32 bits both sides the same; in 16, where near ties may fall otherwise, it is told how
many are. Weights are random, of the true shapes. gpt-fast has no eyes: it is given as many words as there are patches,
and random weights of its own; only its decode in 16 bits is compared.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from bench.answering import KINDS, check_gpt_fast, finished
from bench.sides import Side, alone
from bench.training import SIZES, config_of, matmul_tflops, write_weights
from commandline import Parser, at_least, check_device, run
from vipllava import ViPLLaVAConfig

MEASURES = ("answer", "look", "turn", "load")
WIDTHS = ("bfloat16", "float32")  # of large matrix products


# -- limits ------------------------------------------------------------------------------------------------------------


def bandwidth(device: torch.device) -> float:
    """The most bytes a second that a copy, or a matrix-vector product, of a large tensor moved."""
    big = torch.ones(2**31 if device.type == "cuda" else 2**27, device=device)  # 8 or 0.5 GB: a launch's time is nothing
    matrix, other, vector = big.view(-1, 4096), torch.empty_like(big), torch.zeros(4096, device=device)
    best = 0.0
    for work, moved in ((lambda: other.copy_(big), 2 * big.nbytes), (lambda: matrix @ vector, big.nbytes)):
        for _ in range(6):
            began = finished(device)
            work()
            best = max(best, moved / (finished(device) - began))
    return best


def limits(device: torch.device) -> tuple[float, ...]:
    """Bytes a second, and TFLOP/s in each of WIDTHS. Taken before and after the race, and their mean counts: on a machine
    that is shared with others both change by the minute."""
    found = bandwidth(device), *(matmul_tflops(device, getattr(torch, kind)) for kind in WIDTHS)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # all memory is the race's
    return found


def image_flops(config: ViPLLaVAConfig) -> float:
    """FLOPs of an image: the tower, as far as it is looked at, and the projector."""
    vision, text, N = config.vision, config.text, config.vision.patches
    C, wide = vision.width, len(config.feature_layers) * vision.width
    tower = config.depth * (2 * (N + 1) * (4 * C * C + 2 * C * vision.mlp) + 4 * (N + 1) ** 2 * C) + 6 * N * vision.patch_size**2 * C
    return tower + 2 * N * (wide * text.width + text.width**2)


def prefill_flops(config: ViPLLaVAConfig, words: int) -> float:
    """FLOPs until the first token: an image, the decoder, and the head on the last token."""
    text, T = config.text, config.vision.patches + words
    heads = 2 * text.width**2 + 2 * text.width * text.kv_heads * text.head_width
    decoder = text.layers * (2 * T * (heads + 3 * text.width * text.mlp) + 2 * T * T * text.width)  # attention is causal
    return image_flops(config) + decoder + 2 * text.width * text.vocab_size


# -- the race ----------------------------------------------------------------------------------------------------------


def race(args: argparse.Namespace, folder: str, sides: list[tuple[str, str]]) -> dict[str, dict]:
    """(name, precision) -> what was measured, by "name precision"; all sides in turns."""
    open_sides = [Side(f"{name} {precision}", KINDS[name], args, folder, precision) for name, precision in sides]
    seeing = [side for side in open_sides if not side.name.startswith("gpt-fast")]
    found = {side.name: {"answers": [], "looks": [], "turns": [], "loads": []} for side in open_sides}

    def measure(what: str, sides: list[Side], warm: int = 0, repeat: int = args.repeat) -> None:
        """Of each side side(what), `repeat` times after `warm` times; said on stderr, as a run may take long."""
        rounds = [[side(what) for side in sides] for _ in range(warm + repeat)]
        for side, values in zip(sides, zip(*rounds)):
            found[side.name][f"{what}s"] = values[warm:]
            print(f"{side.name}: {what}", *(f"{str(value):.45}" for value in values[warm:]), sep="; ", file=sys.stderr)

    for side in open_sides:
        side.start()
    if "answer" in args.measure:
        for side in open_sides:
            began = time.perf_counter()
            side("answer")
            found[side.name]["warm-up"] = time.perf_counter() - began
            side("answer")  # a GPU's steps are recorded now
            print(f"{side.name}: ready after {found[side.name]['warm-up']:.1f} s", file=sys.stderr)
        measure("answer", open_sides)
    if "look" in args.measure:
        measure("look", seeing, warm=2)
    ours = [side for side in open_sides if side.name.startswith("ours")]
    if "turn" in args.measure:
        measure("turn", ours, warm=2)
    for side in ours:
        found[side.name]["read"] = side("read")
    if "load" in args.measure:
        measure("load", seeing, warm=1)
    for side in open_sides:
        side.stop()
        found[side.name]["peak"] = side.peak
    return found


def median(values) -> float | None:
    return statistics.median(values) if values and None not in values else None


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.speed", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--layers", type=partial(at_least, 1), help="of the decoder: fewer, to try something out (the size's own)")
    parser.add_argument("--words", type=partial(at_least, 2), default=64, help="after the image (64)")
    parser.add_argument("--tokens", type=partial(at_least, 2), default=32, help="of an answer (32)")
    parser.add_argument("--images", type=partial(at_least, 1), help="pictures at once (32 on a GPU, else 1)")
    parser.add_argument("--repeat", type=partial(at_least, 1), default=5, help="times that each is measured (5)")
    parser.add_argument("--precision", nargs="*", choices=("bfloat16", "int8", "int4", "float32"),
                        default=["bfloat16", "int8", "int4", "float32"], help="of ours; theirs have the first and last")
    parser.add_argument("--gpt-fast", type=Path, help="a clone of it, to compare decode with, too")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--compile", action="store_true", help="our steps by torch.compile")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=MEASURES, help="what is timed (all)")
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    args.device = check_device(args.device)
    args.images = (32 if args.device.type == "cuda" else 1) if args.images is None else args.images
    if args.gpt_fast:
        check_gpt_fast(args.gpt_fast / "model.py")
    installed = not args.alone and importlib.util.find_spec("transformers")
    peers = ["transformers"] * bool(installed) + ["gpt-fast"] * bool(args.gpt_fast)
    said, before = {"limits": {}, "results": {}}, limits(args.device)
    with tempfile.TemporaryDirectory() as folder:
        alone(write_weights, config_of(args), "bfloat16", args.device, f"{folder}/model")
        for group in (["bfloat16", "int8", "int4"], ["float32"]):
            if ours := [("ours", precision) for precision in args.precision if precision in group]:
                found = race(args, f"{folder}/model", ours + [(peer, group[0]) for peer in peers])
                after = limits(args.device)
                speed, *peaks = map(statistics.mean, zip(before, after))
                peak = dict(zip(WIDTHS, peaks))
                report(args, config_of(args), found, peers, speed, peak)
                said["limits"][group[0]] = {"bytes/s": speed, "TFLOP/s": peak}
                said["results"] |= found
                before, peers = after, [peer for peer in peers if peer != "gpt-fast"]  # in 32 bits a GPU has no room for it
    print(json.dumps(said))
    if wrong := differing(said["results"]):
        raise ValueError("; ".join(wrong))


def differing(results: dict[str, dict]) -> list[str]:
    """Who said other tokens than before, and where both sides should have said the same in 32 bits and didn't."""
    said = {side: [answer[2] for answer in found["answers"]] for side, found in results.items() if found["answers"]}
    wrong = [f"{side} said {first}, then {other}; expected the same each time"
             for side, (first, *others) in said.items() for other in others if other != first]
    mine, theirs = (said.get(f"{name} float32", [None])[0] for name in ("ours", "transformers"))
    if None not in (mine, theirs) and mine != theirs:
        wrong.append(f"ours said {mine}, transformers {theirs}; expected the same in 32 bits")
    return wrong


def report(args, config, results, peers, speed: float, peak: dict[str, float]) -> None:
    """The table of one race."""
    cuda = args.device.type == "cuda"
    machine = torch.cuda.get_device_name(args.device) if cuda else (
        f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ["torch", *peers] if name != "gpt-fast")
    most = {"bfloat16": max(peak.values()), "float32": peak["float32"]}  # 16 bits may be multiplied in 32
    flops, length = prefill_flops(config, args.words), config.vision.patches + args.words
    print(f"{args.size}, {config.text.layers} layers, {length} tokens of prompt, {args.tokens} of answer; {machine}; {versions}; limits: "
          f"{speed / 1e9:.1f} GB/s, {peak['bfloat16']:.3g} TFLOP/s in bfloat16, {peak['float32']:.3g} in float32")
    print(f"{'':22}{'ours':>12}" + "".join(f"{name:>14}{'ratio':>8}" for name in peers) + f"{'of limit':>10}")

    def line(what: str, mine: float, others: list[float | None], share: float | None = None) -> None:
        said = "".join(f"{1e3 * other:11.2f} ms{other / mine:8.2f}" if other else 22 * " " for other in others)
        print(f"{what:22}{1e3 * mine:9.2f} ms{said}" + (f"{share:10.0%}" if share is not None else ""))

    for name, found in results.items():
        who, precision = name.split()
        if who != "ours":
            continue
        wide = "float32" if precision == "float32" else "bfloat16"
        rivals = [results[f"{peer} {wide}"] for peer in peers]
        if found["answers"]:
            first, later = (median([answer[k] for answer in found["answers"]]) for k in (0, 1))
            theirs = [[median([answer[k] for answer in rival["answers"]]) for rival in rivals] for k in (0, 1)]
            line(f"decode {precision}", later, theirs[1], found["read"] / later / speed)
            line(f"prefill {precision}", first, theirs[0], flops / first / 1e12 / most[wide])
        if found["looks"] and not precision.startswith("int"):
            seen, *others = (median(side["looks"]) for side in (found, *rivals))
            share = args.images * image_flops(config) / seen / 1e12 / most[wide]
            line(f"{args.images} image{'s' * (args.images > 1)} {precision}", seen, others, share)
        for k, what in enumerate((f"load {precision}", "… touched")) if found["loads"] else ():
            mine, *others = (median([load[k] for load in side["loads"]]) for side in (found, *rivals))
            line(what, mine, others)
        if found["turns"]:
            with_memory, anew = (median([turn[k] for turn in found["turns"]]) for k in (0, 1))
            print(f"{f'second turn {precision}':22}{1e3 * with_memory:9.2f} ms; starting over {1e3 * anew:.2f} ms, "
                  f"{anew / with_memory:.1f} times")
        if found["answers"] and "transformers" in peers:
            tokens, other = (side["answers"][0][2] for side in (found, rivals[0]))
            same = next((i for i, (a, b) in enumerate(zip(tokens, other)) if a != b), len(tokens))
            print(f"{'':22}the first {same} of {len(tokens)} tokens are those of transformers")
        first_call = f"first call {found['warm-up']:.1f} s" if found["answers"] else ""
        memory = [f"peak memory {found['peak'] / 1e9:.2f} GB", *(f"{peer} {r['peak'] / 1e9:.2f} GB" for peer, r in zip(peers, rivals))]
        print(f"{'':22}" + "; ".join(filter(None, [*memory, first_call])), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
