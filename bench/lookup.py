"""Would prompt lookup pay? What it would bring, and what it costs.

It speculates that an answer repeats: what followed the last two tokens when they came before,
in the prompt or the answer, is proposed, and one step of the decoder tells how much of that is what it would have said
itself. Greedy answers stay the same, to the token (Saxena, "Prompt Lookup Decoding", 2023; speculative decoding: Leviathan
et al., arXiv 2211.17192).

    python -m bench.lookup --size 1b

Two numbers decide, and both are measured here:

  * how many tokens such a step would bring: counted on greedy answers of the small model to what it was taught to answer;
  * what it costs: a step of 1 + DRAFT tokens beside one of a single token, after 640 tokens, at --size.

It pays where the first is larger, by more than what proposing and taking back would cost.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial

import torch

import checkpoint
from bench.answering import Ours, finished
from bench.sides import alone
from bench.training import SIZES, config_of, write_weights
from chat import TEMPLATES, stop_ids
from commandline import Parser, at_least, check_device, run
from data.scenes import generator_for
from evals.benchmark import look, prompt, template_of
from evals.scenes import TASKS, sample_of
from generate import generate, kept_in
from llama import KVCache
from tokenizer import Stream

FOUND = 2  # tokens that must have come before,
DRAFT = 4  # and tokens after them that are proposed
SO_FAR = 640


def proposed(tokens: Sequence[int]) -> list[int]:
    """What followed when the last FOUND tokens came before, the latest time; [] if they never did."""
    end = tuple(tokens[-FOUND:])
    for i in range(len(tokens) - FOUND - 1, -1, -1):
        if tuple(tokens[i : i + FOUND]) == end:
            return list(tokens[i + FOUND : i + FOUND + DRAFT])
    return []


def steps_of(asked: Sequence[int], answer: Sequence[int]) -> int:
    """Steps after the first token until the whole answer has been said."""
    steps, i = 0, 1
    while i < len(answer):
        draft, true = proposed([*asked, *answer[:i]]), answer[i:]
        i += 1 + next((k for k, pair in enumerate(zip(draft, true)) if pair[0] != pair[1]), min(len(draft), len(true)))
        steps += 1
    return steps


def answered(model, tokenizer, sample) -> tuple[list[int], list[int]]:
    """The ids that ask, and those of the greedy answer."""
    ids, template = prompt(model, tokenizer, sample), template_of(model, sample)
    stream, said = Stream(tokenizer, TEMPLATES[template].stop), []
    stop = stop_ids(tokenizer, template)
    for (token,) in generate(model, [ids], look(model, sample)[None], max_new_tokens=100, stop_ids=stop):
        said.append(token)
        stream.push(token)
        if stream.stopped:
            break
    return ids, said


def gains(model, tokenizer, n: int) -> dict[str, float | None]:
    """Task -> tokens a step, of n greedy answers each; None where each is a single token, which takes no step."""
    found = {}
    for task in ("markers", *TASKS):
        tokens = steps = 0
        for i in range(n):
            name = "arrow" if task == "markers" else task
            sample = sample_of(name, generator_for("test", 0, i), (224, 224))
            asked, answer = answered(model, tokenizer, sample)
            tokens, steps = tokens + max(0, len(answer) - 1), steps + steps_of(asked, answer)
        found[task] = tokens / steps if steps else None
    return found


@torch.no_grad()
def cost(args: argparse.Namespace, folder: str, precision: str, repeat: int = 7) -> float:
    """Seconds of a step of 1 + DRAFT tokens, in parts of those of a step of one."""
    model = Ours(args, folder, precision).model
    weight, times = model.llama.embed_tokens.weight, []
    for T in (1, 1 + DRAFT):
        cache = KVCache(model.config.text, torch.zeros(1, dtype=torch.long, device=weight.device), SO_FAR + 64, kept_in(weight))
        embeds, seconds = torch.randn(1, T, weight.size(1), dtype=weight.dtype, device=weight.device), []
        for _ in range(2 + repeat):
            cache.length.fill_(SO_FAR)
            began = finished(weight.device)
            model.llama.lm_head(model.llama(embeds, cache))  # what is proposed is compared at every place
            seconds.append(finished(weight.device) - began)
        times.append(statistics.median(seconds[2:]))
    return times[1] / times[0]


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.lookup", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1b", help="of which a step's cost is measured (1b)")
    parser.add_argument("--layers", type=partial(at_least, 1), help="of the decoder: fewer, to try something out (the size's own)")
    parser.add_argument("-n", type=partial(at_least, 1), default=50, help="answers of each task (50)")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16", "int8", "int4"), default=["bfloat16", "int8", "int4"])
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    args.device, args.words, args.compile = check_device(args.device), 2, False
    said = {"tokens a step": gains(*checkpoint.load("tiny", args.device), args.n)}
    for task, gain in said["tokens a step"].items():
        print(f"{task:24} {'no step' if gain is None else f'{gain:.2f} tokens a step'}")
    with tempfile.TemporaryDirectory() as folder:
        alone(write_weights, config_of(args), "bfloat16", args.device, f"{folder}/model")
        said["cost"] = {precision: cost(args, f"{folder}/model", precision) for precision in args.precision}
    for precision, times in said["cost"].items():
        print(f"{precision:24} a step of {1 + DRAFT} tokens costs {times:.2f} steps of one")
    print(json.dumps(said))


if __name__ == "__main__":
    sys.exit(run(main))
