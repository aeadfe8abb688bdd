"""How long a check of a million records takes, and how much memory.

    python -m bench.records -n 1000000

Writes a mix of seven kinds of record, official ones and our own, about a few images into a temporary folder, runs
`python data/records.py check` on it twice (the second start has the index), and prints seconds and the largest memory of
a process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from bench.sides import largest
from commandline import Parser, at_least, run
from data import scenes

ROOT = Path(__file__).resolve().parent.parent


def records(i: int, image: str, scene: scenes.Scene):
    """The i-th record of a mix: one of seven kinds, in turn."""
    boxes = [list(thing.box) for thing in scene.objects]
    flat = [round(v, 2) for point in scene.objects[0].polygon for v in point]
    talk = [{"from": "human", "value": "Describe the image."}, {"from": "gpt", "value": scenes.caption(scene)}]
    about = [{"from": "human", "value": "What is <region0>?"}, {"from": "gpt", "value": scenes.describe(scene.objects[0])}]
    return (
        {"id": f"refcocog-{i}", "image": image, "bboxes": boxes[:1], "segmentations": [[flat]], "answer": "a thing"},
        {"id": f"vg_rel-{i}", "image": image, "bboxes": boxes[:2], "answer": "(this, beside, that)"},
        {"id": f"v7w-{i}", "image": image, "question": "Which one?", "bboxes": boxes[:4], "answer": boxes[1]},
        {"id": f"pointQA_twice-{i}", "image": image, "bboxes": boxes[:1], "general_question": "How many?", "answer": "2"},
        {"id": f"flickr30k-{i}", "image": image, "bbox": [boxes[:1], boxes[1:3]], "grounding": "one <bbox0> and two <bbox1>"},
        {"id": f"{i:012}", "image": image, "conversations": talk * 3},
        {"id": i, "image": image, "regions": [{"polygons": [flat]}], "conversations": about},
    )[i % 7]


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.records", description=__doc__.split("\n")[0])
    parser.add_argument("-n", type=partial(at_least, 1), default=1_000_000, help="records (1000000)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder, made = Path(folder), []
        for k in range(100):
            scene = scenes.sample_scene(scenes.generator_for("train", 0, k), (224, 224), n=5)
            scenes.render(scene).save(folder / f"{k}.jpg")
            made.append((f"{k}.jpg", scene))
        with open(folder / "mix.json", "w") as file:
            for i in range(args.n):
                file.write(("[" if i == 0 else ",\n") + json.dumps(records(i, *made[i % 100])))
            file.write("]\n")
        size = (folder / "mix.json").stat().st_size
        for which in ("first", "second"):
            began = time.perf_counter()
            command = [sys.executable, "data/records.py", "check", str(folder / "mix.json"), "--images", str(folder)]
            said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            seconds = time.perf_counter() - began
            print(f"{which} check: {args.n:,} records, {size / 1e6:.0f} MB, {seconds:.0f} s on {os.cpu_count()} cores, "
                  f"largest process {largest(children=True) / 1e6:.0f} MB; {said.strip().splitlines()[-1].strip()}")


if __name__ == "__main__":
    sys.exit(run(main))
