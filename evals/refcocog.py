"""RefCOCOg, region captions: describe the marked object in a short phrase. CIDEr-D here, METEOR by its own program.

    python -m evals.refcocog --model DIR --data refcocog-val.json --images DIR                    all eight markers
    python -m evals.refcocog --model DIR --data refcocog-val.json --images DIR --marker ellipse

Records about the same box of the same image are one question with several true phrases. The released code has no
script for this benchmark: markers are drawn as for the others, alpha 128 of 255, and asked about by their words.

METEOR needs Java and tables of synonyms. So OUT/coco-annotations.json and OUT/coco-results.json are written, in the
format of the COCO caption evaluation, which prints it (and CIDEr once more):

    pip install pycocotools pycocoevalcap
    python -c "from pycocotools.coco import COCO; from pycocoevalcap.eval import COCOEvalCap as E
    truth = COCO('OUT/coco-annotations.json'); E(truth, truth.loadRes('OUT/coco-results.json')).evaluate()"
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

from commandline import run
from data.index import JSONFile
from data.readers import Plan, boxes_of, field
from data.records import Sample
from evals.benchmark import Benchmark, ask, flags, prepare, replace_file, report, rows, size_of_region
from evals.scorers import cider_d
from overlay import EVALUATION, KINDS

PUBLISHED = {"base 7B tuned on RefCOCOg": "CIDEr 105.9, METEOR 16.6"}


def read(kinds: tuple[str, ...], record: dict, images: Path, generator: np.random.Generator) -> Plan:
    truth = field(record, "answer", str)

    def write(words):
        return [(f"Describe the object {words[0]}. Please provide a short phrase.", truth)]

    return Plan(boxes_of(record, 1), write, kinds, EVALUATION)


def tags(record: dict, sample: Sample) -> dict[str, str]:
    return {"marker": sample.markers[0].kind, "region": size_of_region(record["bboxes"][0], sample.image.size)}


def regions(file: JSONFile) -> dict[int, list[str]]:
    """The first record of each region -> the phrases of all. A record without a phrase is a region of its own."""
    first, truths = {}, {}
    for k in range(len(file)):
        try:
            record = file[k]
            region, phrase = json.dumps([record["image"], record["bboxes"]]), field(record, "answer", str)
            phrase.encode()  # ValueError: it has half a character
            if not phrase.strip():
                raise ValueError("the phrase is empty")
            truths.setdefault(first.setdefault(region, k), []).append(phrase)
        except (ValueError, KeyError):
            truths[k] = []
    return truths


def write_coco(out: Path, lines: list[dict], truths: list[list[str]]) -> None:
    """The two files of the COCO caption evaluation, of regions that have phrases; an image's id is the number of its
    region's first record."""
    told = [(line, texts) for line, texts in zip(lines, truths) if texts]
    lines, truths = [line for line, _ in told], [texts for _, texts in told]
    ids = [line["metadata"]["record"] for line in lines]
    captions = [{"image_id": k, "caption": text} for k, texts in zip(ids, truths) for text in texts]
    truth = {"info": {}, "licenses": [], "type": "captions", "images": [{"id": k} for k in ids],
             "annotations": [{"id": i, **caption} for i, caption in enumerate(captions)]}
    results = [{"image_id": k, "caption": line["text"]} for k, line in zip(ids, lines)]
    for name, said in (("annotations", truth), ("results", results)):
        replace_file(out / f"coco-{name}.json", json.dumps(said) + "\n")


def main(argv: list[str]) -> None:
    parser = flags("refcocog", "RefCOCOg: captions of marked regions.")
    parser.add_argument("--marker", choices=KINDS, help="how regions are marked (any of the eight)")
    args = prepare(parser.parse_args(argv), "refcocog", ["marker"])
    truths = regions(JSONFile(args.data))
    kinds = (args.marker,) if args.marker else KINDS
    lines = ask(Benchmark("answers", partial(read, kinds), tags), args, list(truths))
    phrases = [truths[line["metadata"]["record"]] for line in lines]
    told = [k for k, texts in enumerate(phrases) if texts]  # the others' score is 0
    found = dict(zip(told, cider_d([lines[k]["text"] for k in told], [phrases[k] for k in told])))
    cider = [found.get(k, 0.0) for k in range(len(lines))]
    write_coco(args.out, lines, phrases)
    report("RefCOCOg, CIDEr-D", args, lines, rows(lines, cider), PUBLISHED)
    print(f"METEOR: the COCO caption evaluation takes {args.out}/coco-annotations.json and coco-results.json")


if __name__ == "__main__":
    sys.exit(run(main))
