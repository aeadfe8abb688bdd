"""Where an answer's time goes: the kernels of its first token, and of one after that, slowest first.

    python -m bench.kernels --size 1b --layers 4                       on a CPU: PyTorch's operators
    python -m bench.kernels --size 7b --layers 4 --compile             on a GPU

PyTorch's profiler looks on at an answer of one token, and at one of --tokens more: what is in the second alone, divided by
--tokens, is a later token's. Time in which none runs is a line of its own. Weights are random, of the true shapes; how long
all of it takes when nobody looks on is told by bench.speed.
"""

import json
import sys
import tempfile
from collections import Counter
from functools import partial
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.answering import Ours
from bench.sides import alone
from bench.training import SIZES, config_of, write_weights
from commandline import Parser, at_least, check_device, run

IDLE = "(idle)"


class Work(NamedTuple):
    """Of each kernel by name."""

    seconds: Counter
    calls: Counter


def work(side: Ours, tokens: int) -> Work:
    """What was done for an answer of so many tokens."""
    cuda, seconds, calls = side.args.device.type == "cuda", Counter(), Counter()
    side.args.tokens = tokens
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        side.answer()
    events = [event for event in seen.events() if (event.device_type == DeviceType.CUDA) == cuda]
    for event in events:  # on a CPU one runs within another
        seconds[event.name] += (event.device_time_total if cuda else event.self_cpu_time_total) / 1e6
        calls[event.name] += 1
    span = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    seconds[IDLE] = max(0.0, span / 1e6 - sum(seconds.values()))
    return Work(seconds, calls)


def parts(side: Ours, tokens: int) -> dict[str, Work]:
    """Of the first token, and of each later one."""
    for n in (1, 1 + tokens) * 2:  # whatever is compiled, or recorded, is so now
        side.args.tokens = n
        side.answer()
    first, all_of_it = work(side, 1), work(side, 1 + tokens)
    later = (Counter({name: (x - old[name]) / tokens for name, x in new.items()}) for old, new in zip(first, all_of_it))
    return {"the first token": first, "a later token": Work(*later)}


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--layers", type=partial(at_least, 1), help="of the decoder: fewer, to see it sooner (the size's own)")
    parser.add_argument("--words", type=partial(at_least, 2), default=64, help="after the image (64)")
    parser.add_argument("--tokens", type=partial(at_least, 1), default=8, help="after the first (8)")
    parser.add_argument("--precision", choices=("bfloat16", "int8", "int4", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=partial(at_least, 1), default=12, help="kernels that are named (12)")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    args.device = check_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        alone(write_weights, config_of(args), "bfloat16", args.device, f"{folder}/model")
        found = parts(Ours(args, f"{folder}/model", args.precision), args.tokens)
    for what, (seconds, calls) in found.items():
        total = sum(seconds.values())
        print(f"{what}: {1e3 * total:.3f} ms, {sum(calls.values()):.0f} calls")
        for name, took in seconds.most_common(args.rows):
            print(f"{took / total:6.1%} {1e3 * took:10.3f} ms {calls[name]:7.1f} x  {name:.100}")
    print(json.dumps({what: {"seconds": dict(seconds), "calls": dict(calls)} for what, (seconds, calls) in found.items()}))


if __name__ == "__main__":
    sys.exit(run(main))
