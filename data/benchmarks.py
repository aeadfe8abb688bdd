"""The paper's benchmarks in the small world of data/scenes.py, written in the official formats: images and JSON.

    python -m data.benchmarks OUT -n 200
    python -m evals.visual7w --data OUT/v7w-test.json          and likewise all but vg_rel and flickr30k, to train on

| file                         | about n scenes                                                                   |
| ---------------------------- | -------------------------------------------------------------------------------- |
| OUT/v7w-test.json            | which of four boxes is meant, by look or by place                                |
| OUT/pointQA_twice_test.json  | how many objects have the shape of the marked one                                |
| OUT/vcr-val.json, OUT/vcr    | how one object lies to another, and the reason                                   |
| OUT/refcocog-val.json        | a phrase for a region; some regions have two                                     |
| OUT/vg_rel-test.json         | subject, relation, object, of two marked objects                                 |
| OUT/flickr30k-test.json      | a caption of marked objects                                                      |
| OUT/ViP-Bench                | free questions in turn, for all six capabilities; letters and digits on objects  |

Two things the pictures show otherwise than the answers say. Shapes are stretched by up to 12 %, and corners and lines of
symmetry are those of the shape before. And a mask tints its object, of RefCOCOg and VCR too, where the answer is the color
without it: at half transparency, in one of two such questions another of the eight colors is nearer then. (In Flickr30k's
captions neighbours may be a pixel apart: from left to right is then hard to tell.)

A record's scene is a function of (split, seed, its number, the benchmark), and no training sees the split "test". With
`--split train` the files are called v7w-train.json, and so on, and train.py reads them.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from chat import Turn
from commandline import Parser, at_least, run
from data import scenes
from data.records import Sample, annotate
from data.scenes import (DIGITS, LETTERED, LETTERS, SPLITS, Object, Scene, describe, is_clear, look_of, position, relation,
                         render, sample_scene)
from data.write import flat, staged
from overlay import draw, phrase
from overlay import KINDS

CORNERS = {"square": 4, "bar": 4, "hourglass": 6, "bolt": 6, "star": 10, "cross": 12}
MIRRORS = {"square": 4, "bar": 2, "hourglass": 2, "bolt": 0, "star": 5, "cross": 4, "heart": 1, "moon": 1}
P_CORNERS = 2 / 3  # where a shape has them: in half of the questions


def generator_for(split: str, seed: int, i: int, benchmark: int) -> np.random.Generator:
    return np.random.default_rng([SPLITS[split], seed, i, benchmark])  # a stream that data/scenes.py never uses


# -- one of each: (generator, side of the scene) -> the records about one picture --------------------------------------


@dataclass(frozen=True)
class Made:
    """A scene, and what is asked about it: official records, but for "id" and "image", which `named` adds."""

    scene: Scene
    records: list[dict]

    def named(self, kind: str, i: int, image: str) -> list[dict]:
        return [{"id": f"{kind}-{i}", "image": image, **record} for record in self.records]


def visual7w(generator: np.random.Generator, side: int) -> Made:
    scene = sample_scene(generator, (side, side), n=int(generator.integers(4, 7)), rich=True)
    things = [scene.objects[k] for k in generator.permutation(len(scene.objects))[:4]]
    wanted = things[generator.integers(4)]
    asked = [f"Which is the {wanted.color} {wanted.shape}?", f"Which object is at the {position(scene, wanted)}?"]
    if sum(thing.color == wanted.color for thing in things) == 1:
        asked.append(f"Which object is {wanted.color}?")
    question = asked[generator.integers(len(asked))]
    boxes = [list(thing.box) for thing in things]
    return Made(scene, [{"question": question, "bboxes": boxes, "answer": list(wanted.box)}])


def point_qa(generator: np.random.Generator, side: int) -> Made:
    shapes = generator.permutation(list(scenes.SHAPES))[:2].tolist()
    scene = sample_scene(generator, (side, side), n=int(generator.integers(2, 8)), shapes=shapes, rich=True)
    thing = scene.objects[generator.integers(len(scene.objects))]
    count = sum(other.shape == thing.shape for other in scene.objects)
    question = "How many objects of this shape are there?"
    return Made(scene, [{"bboxes": [list(thing.box)], "answer": str(count), "general_question": question}])


WAYS = {  # the answer, and its reason
    "left of": "is farther left than",
    "right of": "is farther right than",
    "above": "is higher than",
    "below": "is lower than",
}


def way_of(a: Object, b: Object) -> str:
    """One of WAYS: how the first lies to the second."""
    return next(way for way in WAYS if f" is {way} the " in relation(a, b))


def _clear_pair(generator: np.random.Generator, side: int) -> tuple[Scene, int, int, str]:
    """A scene, two of its objects by their numbers, and how the first lies to the second."""
    while True:
        scene = sample_scene(generator, (side, side), rich=True)
        pairs = [(a, b) for a, one in enumerate(scene.objects) for b, other in enumerate(scene.objects)
                 if a != b and is_clear(one, other)]
        if pairs:
            a, b = pairs[generator.integers(len(pairs))]
            return scene, a, b, way_of(scene.objects[a], scene.objects[b])


def vcr(generator: np.random.Generator, side: int) -> Made:
    """With "meta", the content of the file that "meta_dir" is to name."""
    scene, a, b, way = _clear_pair(generator, side)
    answers, reasons = ([list(WAYS)[k] for k in generator.permutation(4)] for _ in range(2))
    meta = {"boxes": [[*thing.box, 1.0] for thing in scene.objects],
            "segms": [[[list(point) for point in thing.polygon]] for thing in scene.objects]}
    return Made(scene, [{
        "class_names": ["object"] * len(scene.objects), "question": ["Where is", [a], ",", "seen from", [b], "?"],
        "answer_choices": [[[a], f"is {answer}", [b], "."] for answer in answers],
        "answer_label": answers.index(way),
        "rationale_choices": [[[a], WAYS[reason], [b], "."] for reason in reasons],
        "rationale_label": reasons.index(way), "meta": meta,
    }])


def refcocog(generator: np.random.Generator, side: int) -> Made:
    """One or two records, as a region may have several phrases."""
    scene = sample_scene(generator, (side, side), rich=True)
    thing = scene.objects[generator.integers(len(scene.objects))]
    phrases = [describe(thing), f"the {thing.color} {thing.shape} at the {position(scene, thing)}"]
    region = {"bboxes": [list(thing.box)], "segmentations": [[flat(thing)]]}
    return Made(scene, [{**region, "answer": text} for text in phrases[: 1 + generator.integers(2)]])


def vg_rel(generator: np.random.Generator, side: int) -> Made:
    scene, a, b, way = _clear_pair(generator, side)
    subject, thing = scene.objects[a], scene.objects[b]
    answer = f"({look_of(subject)}, {way}, {look_of(thing)})"
    return Made(scene, [{"bboxes": [list(subject.box), list(thing.box)], "answer": answer}])


def flickr30k(generator: np.random.Generator, side: int) -> Made:
    """A caption whose objects are marked: in it, <bbox0> stands behind the words that group 0 of the boxes shows."""
    scene = sample_scene(generator, (side, side), n=int(generator.integers(2, 5)), rich=True)
    things = sorted(scene.objects, key=lambda thing: thing.center)
    told = ", ".join(f"{describe(thing)} <bbox{k}>" for k, thing in enumerate(things))
    return Made(scene, [{"bbox": [[list(thing.box)] for thing in things], "grounding": f"from left to right {told}"}])


# -- ViP-Bench -------------------------------------------------------------------------------------------------------


SIGN = "What {} is on the object {}?"
SUM = "What is the sum of the numbers on the objects {} and {}?"

# (generator, scene, the things that are marked) -> the scene as it is to be, a question, and its truth


def _recognise(generator, scene, things):
    return scene, "What is the object <obj>?", look_of(things[0])


def _read_letter(generator, scene, things):
    letter = LETTERS[generator.integers(len(LETTERS))]
    return bearing(scene, {things[0]: letter}), SIGN.format("letter", "<obj>"), letter


def _count_corners_or_mirrors(generator, scene, things):
    shape = things[0].shape
    if shape in CORNERS and generator.random() < P_CORNERS:
        return scene, "How many corners does the object <obj> have?", str(CORNERS[shape])
    return scene, "How many lines of symmetry does the object <obj> have?", str(MIRRORS[shape])


def _add(generator, scene, things):
    digits = [DIGITS[i] for i in generator.integers(len(DIGITS), size=2)]
    return bearing(scene, dict(zip(things, digits))), SUM.format("<obj>", "<obj1>"), str(sum(map(int, digits)))


def _relate(generator, scene, things):
    said = [relation(*pair).removeprefix("The ").rstrip(".") for pair in (things, things[::-1])]
    return scene, "How are the objects <obj> and <obj1> related?", "<OR>".join(said)


def _tell(generator, scene, things):
    """The marked one first, then the others as one reads: an order that cannot be known cannot be learned."""
    others = (thing for thing in scenes.reading_order(scene) if thing is not things[0])
    looks = "<AND>".join(map(look_of, (things[0], *others)))
    return scene, "What is the object <obj>? Describe the image, too.", looks


def bearing(scene: Scene, signs: dict[Object, str]) -> Scene:
    """The same, but these objects are plain and bear these signs, and no other object bears any."""
    objects = [replace(thing, text=signs.get(thing, ""), texture="plain" if thing in signs else thing.texture)
               for thing in scene.objects]
    return replace(scene, objects=tuple(objects))


TASKS = (  # how it is asked, how many things are marked, of which shapes, and the capabilities that it takes
    (_recognise, 1, tuple(scenes.SHAPES), ("rec",)),
    (_read_letter, 1, LETTERED, ("ocr",)),
    (_count_corners_or_mirrors, 1, tuple(MIRRORS), ("rec", "know")),
    (_add, 2, LETTERED, ("ocr", "math")),
    (_relate, 2, tuple(scenes.SHAPES), ("rec", "rel")),
    (_tell, 1, tuple(scenes.SHAPES), ("rec", "lang")),
)
CAPABILITIES = tuple(takes[-1] for *_, takes in TASKS)  # the last is what a task is there for
MARKED_BY = {"bbox": ("rectangle",), "human": ("ellipse", "scribble", "arrow")}  # by tight boxes, as if by hand


def vip_bench(folder: Path, n: int, split: str, seed: int, side: int) -> None:
    meta, lines = {}, {by: [] for by in MARKED_BY}
    for name in ("source_image", *(f"{by}/images" for by in MARKED_BY)):
        (folder / name).mkdir(parents=True)
    for i in range(n):
        capabilities = TASKS[i % len(TASKS)][-1]
        generator = generator_for(split, seed, i, len(OFFICIAL) + 1)
        scene, things, marked, question, truth = _vip_item(generator, i % len(TASKS), side, MARKED_BY)
        image, source, name = render(scene), f"v1_{i}.png", f"v1_{i}_0.png"
        meta[f"v1_{i}"] = {"image_source": source, "image": name, "question": question, "answer": truth,
                           "capability": list(capabilities)}
        image.save(folder / "source_image" / source)
        boxes = [{"label": f"obj{k or ''}", "shape_type": "rectangle", "points": [thing.box[:2], thing.box[2:]]}
                 for k, thing in enumerate(things)]
        said = {"shapes": boxes, "imagePath": source, "imageWidth": side, "imageHeight": side}
        (folder / "source_image" / f"v1_{i}.json").write_text(json.dumps(said) + "\n")
        for by, markers in marked.items():
            text = _fill_in(question, markers)
            draw(image, markers).save(folder / by / "images" / name)
            lines[by].append({"question_id": i, "image": name, "text": text, "category": "_".join(capabilities)})
    (folder / "vip-bench-meta-data.json").write_text(json.dumps(meta, indent=1) + "\n")
    for by, said in lines.items():
        (folder / by / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))


def vip_sample(generator: np.random.Generator, size: tuple[int, int], capability: str | None = None) -> Sample:
    """One for training."""
    scene, _, markers, question, answer = vip_question(generator, size, capability)
    return Sample(partial(render, scene), markers, (Turn(question, answer, image=True),))


def vip_question(generator: np.random.Generator, size: tuple[int, int], capability: str | None = None):
    """A scene, the things that are marked in it, their markers, of all kinds, a question, and of several right answers
    the first. capability: the one it is there for; None: any."""
    task = CAPABILITIES.index(capability) if capability else int(generator.integers(len(TASKS)))
    scene, things, marked, question, truth = _vip_item(generator, task, size[0], {"any": KINDS})
    answer = truth.split("<OR>")[0].replace("<AND>", ", ")
    return scene, things, marked["any"], _fill_in(question, marked["any"]), answer


def _fill_in(question, markers):
    for k, marker in enumerate(markers):
        question = question.replace(f"<obj{k or ''}>", phrase(marker))
    return question


def _vip_item(generator, task: int, side: int, kinds_by: dict[str, Sequence[str]]):
    """A scene, the things that are marked, their markers by each way to mark, a question with <obj>, and its truth."""
    ask, count, shapes, _ = TASKS[task]
    while True:
        scene = sample_scene(generator, (side, side), n=int(generator.integers(2, 6)), shapes=shapes, rich=True)
        stream = generator.integers(2**31)
        try:
            marked = {}
            for by, kinds in kinds_by.items():  # from the same stream, so that they mark the same things
                things, marked[by] = scenes.sample_markers(np.random.default_rng(stream), scene, count, kinds, scenes.BOLD)
        except scenes.NoMarkerError:
            continue
        if count == 1 or is_clear(*things):
            break
    scene, question, truth = ask(generator, scene, things)
    return scene, things, marked, question, truth


# -- command ---------------------------------------------------------------------------------------------------------


# official kind -> how one is made, and the official name of the file that is tested on
OFFICIAL = {
    "v7w": (visual7w, "v7w-test"),
    "pointQA_twice": (point_qa, "pointQA_twice_test"),
    "vcr": (vcr, "vcr-val"),
    "refcocog": (refcocog, "refcocog-val"),
    "vg_rel": (vg_rel, "vg_rel-test"),
    "flickr30k": (flickr30k, "flickr30k-test"),
}


def sample(kind: str, generator: np.random.Generator, size: tuple[int, int]) -> Sample:
    """One of a kind for training, read as its record would be, but nothing touches the disk. "vcr-choice": VCR as its
    evaluation asks."""
    return read(OFFICIAL[kind.split("-")[0]][0](generator, size[0]), kind, generator)


def read(made: Made, kind: str, generator: np.random.Generator) -> Sample:
    """What training is shown of it."""
    markers, turns = annotate(made.named(kind, 0, "")[0], Path(), generator, made.scene.size)
    return Sample(partial(render, made.scene), markers, turns)


def file_name(official: str, split: str) -> str:
    """The name of a benchmark's file: the official one is of the split that is tested on."""
    return official if split == "test" else re.sub("(test|val)$", split, official)


def write(out: str | Path, n: int, seed: int = 0, side: int = 224, split: str = "test") -> None:
    """n pictures of each kind, and the records about them, into a new or empty folder; all or nothing."""
    with staged(out, n, side) as folder:
        (folder / "vcr").mkdir()
        for number, (kind, (make, official)) in enumerate(OFFICIAL.items(), 1):
            records = []
            for i in range(n):
                made, image = make(generator_for(split, seed, i, number), side), f"images/{kind}-{i:06d}.png"
                render(made.scene).save(folder / image)
                for record in made.named(kind, i, image):
                    if "meta" in record:
                        record["meta_dir"] = f"./dataset/vcr/{i:06d}.json"
                        (folder / f"vcr/{i:06d}.json").write_text(json.dumps(record.pop("meta")) + "\n")
                    records.append(record)
            text = ",\n ".join(map(json.dumps, records))  # one a line
            (folder / f"{file_name(official, split)}.json").write_text(f"[{text}]\n")
        vip_bench(folder / "ViP-Bench", n, split, seed, side)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m data.benchmarks", description="The paper's benchmarks in a small world.")
    parser.add_argument("out", help="a new or empty folder")
    parser.add_argument("-n", type=int, default=200, help="pictures of each (200)")
    parser.add_argument("--seed", type=partial(at_least, 0), default=0, help="0 or more (0)")
    parser.add_argument("--size", type=int, default=224, help="side of an image in pixels (224)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which scenes (test)")
    args = parser.parse_args(argv)
    write(args.out, args.n, args.seed, args.size, args.split)


if __name__ == "__main__":
    sys.exit(run(main))
