"""VCR: a question about marked people and things, and why; four choices each (Zellers et al., arXiv 1811.10830).

    python -m evals.vcr --model DIR --data vcr-val.json --images DIR                      points, as the paper tests
    python -m evals.vcr --model DIR --data vcr-val.json --images DIR --marker rectangle

    Q->A     the question                        -> which answer is right
    QA->R    the question and its right answer   -> which reason is right
    Q->AR    both, on the same record: a record whose answer is right and whose reason is not counts nothing

All things that the words speak of are marked, each in another color (beyond nine also in colors without names, as
words have no more); images are squeezed to a square, not padded, as in the paper's evaluation.
"""

import sys
from functools import partial

from commandline import run
from data.readers import vcr_choice
from data.records import Sample
from evals.benchmark import Benchmark, ask, flags, prepare, report, right, row, rows

PUBLISHED = {"base 7B tuned on VCR": "Q->A 87.7, QA->R 89.8, Q->AR 78.9"}


def tags(record: dict, sample: Sample) -> dict[str, str]:
    count = len(sample.markers)
    return {"markers": str(count) if count < 6 else "6 or more", "asks": str(record["question"][0]).split()[0].lower()}


def main(argv: list[str]) -> None:
    parser = flags("vcr", "VCR: the answer, the reason, and both.")
    parser.add_argument("--marker", choices=("point", "rectangle"), default="point", help="on things (point)")
    args = prepare(parser.parse_args(argv), "vcr", ["marker"])
    lines = {}
    for step in ("qa", "qar"):
        lines[step] = ask(Benchmark(step, partial(vcr_choice, step, args.marker), tags, mode="squeeze"), args)
    answers, reasons = ([right(line) for line in lines[step]] for step in lines)
    table = {"Q->A": row(answers), "QA->R": row(reasons), "Q->AR": row([a and r for a, r in zip(answers, reasons)])}
    for step, scores, name in (("qa", answers, "Q->A"), ("qar", reasons, "QA->R")):
        table |= {f"{name} {tag}": said for tag, said in rows(lines[step], scores).items() if tag != "all"}
    report("VCR", args, lines["qa"] + lines["qar"], table, PUBLISHED)


if __name__ == "__main__":
    sys.exit(run(main))
