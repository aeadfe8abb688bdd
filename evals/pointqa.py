"""PointQA-LookTwice: how many of what is marked are there? (Mani et al., arXiv 2011.13681; ours section 4.)

    python -m evals.pointqa --model 7b --data pointQA_twice_test.json --images DIR

One red rectangle of constant width, alpha 128 of 255; the answer is a word or a number. Exact matches, case folded; in
a row of its own also after VQA's clean-up, for which "Two." is 2: a model of other habits is not worse at counting.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from commandline import run
from data.readers import READERS, Plan
from data.records import Sample
from evals.benchmark import Benchmark, ask, flags, prepare, report, right, row, rows, size_of_region
from evals.scorers import normalise
from overlay import EVALUATION

PUBLISHED = {"7b": "71.31", "13b": "71.77", "llama3": "70.2", "phi3": "69.6"}


def read(record: dict, images: Path, generator: np.random.Generator) -> Plan:
    return replace(READERS["pointQA_twice"](record, images, generator), distribution=EVALUATION)


def tags(record: dict, sample: Sample) -> dict[str, str]:
    return {"truth is": str(record["answer"]), "region": size_of_region(record["bboxes"][0], sample.image.size)}


BENCHMARK = Benchmark("answers", read, tags)


def main(argv: list[str]) -> None:
    args = prepare(flags("pointqa", "PointQA-LookTwice: how many of these?").parse_args(argv), "pointqa")
    lines = ask(BENCHMARK, args)
    table = rows(lines, [right(line) for line in lines])
    table["all, cleaned up"] = row([right(line, normalise) for line in lines])
    report("PointQA-LookTwice", args, lines, table, PUBLISHED)


if __name__ == "__main__":
    sys.exit(run(main))
