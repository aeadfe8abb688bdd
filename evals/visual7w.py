"""Visual7W, pointing: which of four boxes does the question mean? (Zhu et al., arXiv 1511.03416; ours section 4.)

    python -m evals.visual7w --model 7b --data v7w-test.json --images DIR

Four rectangles of constant width, alpha 128 of 255, each of another color; the answer is a letter. Exact matches.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from commandline import run
from data.readers import READERS, Plan
from data.records import Sample
from evals.benchmark import Benchmark, ask, flags, prepare, report, right, rows, size_of_region
from overlay import EVALUATION

PUBLISHED = {"7b": "86.60", "13b": "87.91", "llama3": "84.3", "phi3": "85.3"}


def read(record: dict, images: Path, generator: np.random.Generator) -> Plan:
    return replace(READERS["v7w"](record, images, generator), distribution=EVALUATION)


def tags(record: dict, sample: Sample) -> dict[str, str]:
    first, size = record["question"].split()[0].lower(), size_of_region(record["answer"], sample.image.size)
    return {"asks": first, "region": size, "letter": sample.turns[0].answer}


BENCHMARK = Benchmark("answers", read, tags)


def main(argv: list[str]) -> None:
    args = prepare(flags("visual7w", "Visual7W: which of four?").parse_args(argv), "visual7w")
    lines = ask(BENCHMARK, args)
    report("Visual7W", args, lines, rows(lines, [right(line) for line in lines]), PUBLISHED)


if __name__ == "__main__":
    sys.exit(run(main))
