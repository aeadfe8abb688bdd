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
from pathlib import Path

import numpy as np

from commandline import run
from data.records import Plan, Sample, field, sentence, vcr_choices, vcr_regions, vcr_words
from evals.benchmark import Benchmark, ask, flags, prepare, report, right, row, rows
from overlay import EVALUATION

PUBLISHED = {"base 7B tuned on VCR": "Q->A 87.7, QA->R 89.8, Q->AR 78.9"}
WHY = (  # the words that the paper's model was tested with
    "I give you a question and its answer, I need you to provide a rationale explaining why the answer is right. "
    '"{}" The answer is "{}".What is the rationale for this decision?'
)


def read(step: str, kind: str, record: dict, images: Path, generator: np.random.Generator) -> Plan:
    """step: "qa" asks for the answer, "qar" for the reason."""
    asked, (choices, label) = [field(record, "question", list)], vcr_choices(record, "answer")
    if step == "qar":
        asked = [*asked, choices[label]]
        choices, label = vcr_choices(record, "rationale")
    if len(choices) != 4:
        raise ValueError(f"{len(choices)} choices; expected four")
    things, groups = vcr_regions(record, images, [*asked, *choices])

    def write(words):
        said = vcr_words(record["class_names"], things, words)
        asked_in_words = [sentence(text, said) for text in asked]
        question = WHY.format(*asked_in_words) if step == "qar" else asked_in_words[0]
        options = "\n".join(f"{letter}. {sentence(text, said)}" for letter, text in zip("ABCD", choices))
        question = f"{question}\n{options}\nAnswer with the option's letter from the given choices directly."
        return [(question, "ABCD"[label])]

    return Plan(groups, write, (kind,), EVALUATION, crowded=True)


def tags(record: dict, sample: Sample) -> dict[str, str]:
    count = len(sample.markers)
    return {"markers": str(count) if count < 6 else "6 or more", "asks": str(record["question"][0]).split()[0].lower()}


def main(argv: list[str]) -> None:
    parser = flags("vcr", "VCR: the answer, the reason, and both.")
    parser.add_argument("--marker", choices=("point", "rectangle"), default="point", help="on things (point)")
    args = prepare(parser.parse_args(argv), "vcr", ["marker"])
    lines = {}
    for step in ("qa", "qar"):
        lines[step] = ask(Benchmark(step, partial(read, step, args.marker), tags, mode="squeeze"), args)
    answers, reasons = ([right(line) for line in lines[step]] for step in lines)
    table = {"Q->A": row(answers), "QA->R": row(reasons), "Q->AR": row([a and r for a, r in zip(answers, reasons)])}
    for step, scores, name in (("qa", answers, "Q->A"), ("qar", reasons, "QA->R")):
        table |= {f"{name} {tag}": said for tag, said in rows(lines[step], scores).items() if tag != "all"}
    report("VCR", args, lines["qa"] + lines["qar"], table, PUBLISHED)


if __name__ == "__main__":
    sys.exit(run(main))
