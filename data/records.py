"""Records -> samples: whatever a file says about an image becomes Sample(image, markers, turns), and trains.

Of a record come regions and sentences with gaps for them; a generator chooses how each region is marked, and fills the
marker's words into the gaps:

    {"image": "dog.jpg", "regions": [{"box": [20, 30, 200, 180]}],
     "conversations": [{"from": "human", "value": "What is <region0>?"}, {"from": "gpt", "value": "A dog."}]}

    -> a scribble on the dog, "What is with the blue scribble?", "A dog."; another time a red arrow

| record         | told by         | kinds of marker                      | what is asked (released code)         |
| -------------- | --------------- | ------------------------------------ | ------------------------------------- |
| our own        | "regions"       | all, or what its "markers" say       | its conversations, <region0>, …       |
| refcocog       | id "refcocog-…" | all                                  | describe the object in a short phrase |
| refcocog-gpt4v | id              | all                                  | its conversations, <bbox>             |
| vg_rel         | id              | rectangle, ellipse                   | a triplet (subject, relation, object) |
| vg_rel-gpt4v   | id              | rectangle, ellipse                   | its conversations, <bbox0>, <bbox1>   |
| vcr            | id              | all but point                        | a question and why; half with choices |
| vcr-choice     | id              | all                                  | VCR as its evaluation asks: a letter  |
| flickr30k      | id              | rectangle, ellipse, arrow            | describe the image and what is marked |
| v7w            | id              | rectangle, of constant width         | one of four, by its letter            |
| pointQA_twice  | id              | the red rectangle, of constant width | how many of these are there           |
| LLaVA's        | "conversations" | none                                 | its conversations, with image or none |

Where we leave the released code: a record with an image always shows it; a marker that must be named is named, also in
refcocog, and also where its color has no name; several markers can be told apart by their words; a record that is bad
is never swapped for another. Boxes are x0, y0, x1, y1, polygons x, y, x, y, …, in pixels of the upright image.

    python data/records.py check mix.json --images DIR        every bad record, by line, id and reason
    python data/records.py preview mix.json --images DIR      a sheet of marked images; what is trained is highlighted
"""

import itertools
import json
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

if not __package__:  # run as a file: what it imports lies one floor up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import Image

from chat import TEMPLATES, Turn
from clip import open_image, read_mask
from commandline import Parser, run
from data.index import JSONFile
from hub import find
from overlay import (COLORS, CONSTANT, EVALUATION, KINDS, RELEASED, Distribution, Marker, Region, phrase, rgb_of,
                     sample_marker)  # fmt: skip
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """What is asked about a marked image. The image, unmarked, is opened when it is first looked at."""

    open: Callable[[], Image.Image] | None
    markers: tuple[Marker, ...]
    turns: tuple[Turn, ...]

    @cached_property
    def image(self) -> Image.Image | None:
        return None if self.open is None else self.open()


# -- looks: how several regions are marked so that words can tell them apart ------------------------------------------


@dataclass(frozen=True)
class Look:
    """A kind and a color: all that overlay.phrase needs."""

    kind: str
    color: tuple[int, int, int]


def choose_looks(generator: np.random.Generator, n: int, kinds: Sequence[str], given=(), crowded=False) -> list[Look]:
    """n looks, no two with the same words. Of a kind that occurs once, every other color has no name; of one that
    occurs more often, all have names, and different ones. given: for each, a dict that may hold "kind" and "color".
    crowded: more regions than words are no error."""
    given = list(given) or [{}] * n
    chosen = [one.get("kind") for one in given]
    for i in range(n):
        free = [kind for kind in kinds if crowded or chosen.count(kind) < len(COLORS)]
        if chosen[i] is None and not free:
            raise ValueError(f"{n} regions; expected at most {len(COLORS) * len(kinds)}, or none could be told apart")
        chosen[i] = chosen[i] or free[generator.integers(len(free))]
    looks = []
    for i, kind in enumerate(chosen):
        fixed = [rgb_of(one["color"]) for k, one in zip(chosen, given) if k == kind and "color" in one]
        taken = fixed + [look.color for look in looks if look.kind == kind]
        names = [name for name, rgb in COLORS.items() if rgb not in taken]
        if "color" in given[i]:
            color = rgb_of(given[i]["color"])
        elif chosen.count(kind) == 1 and generator.random() < 0.5 or crowded and not names:
            color = tuple(generator.integers(256, size=3).tolist())
        elif not names:
            raise ValueError(f"{chosen.count(kind)} markers of the kind {kind}; expected {len(COLORS)} at most")
        else:
            color = COLORS[names[generator.integers(len(names))]]
        looks.append(Look(kind, color))
    words = [phrase(look) for look in looks]
    if len(set(words)) < n and not crowded:
        twice = next(word for word in words if words.count(word) > 1)
        raise ValueError(f'two markers would both be "{twice}"; expected other kinds or colors')
    return looks


# -- what a record says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """groups[i]: the regions that share look i. write: the words of all looks -> pairs of question and answer."""

    groups: list[list[Region]]
    write: Callable[[list[str]], list[tuple[str, str]]]
    kinds: Sequence[str] = KINDS
    distribution: Distribution = RELEASED
    given: Sequence[dict] = ()
    crowded: bool = False  # where colors with names run out, others are taken: then words can't tell all apart


KIND_NAMES = {str: "text", list: "a list", dict: "an object", int: "a whole number"}


def field(record: dict, key: str, kind: type):
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        shown = "missing" if key not in record else repr(value)[:60]
        raise ValueError(f"{key} is {shown}; expected {KIND_NAMES[kind]}")
    return value


def boxes_of(record: dict, n: int | None = None) -> list[list[Region]]:
    """One group for each of "bboxes", with the polygons of "segmentations" where there are any."""
    boxes = field(record, "bboxes", list)
    masks = record.get("segmentations") or [None] * len(boxes)
    if len(masks) != len(boxes) or not boxes or len(boxes) != (n or len(boxes)):
        expected = f"{n or 'one or more'} boxes, and as many segmentations, if any"
        raise ValueError(f"{len(boxes)} bboxes and {len(masks)} segmentations; expected {expected}")
    return [[region_of(box, mask)] for box, mask in zip(boxes, masks)]


def region_of(box, polygons) -> Region:
    """Polygons of two points and fewer, which COCO has, are no part of it."""
    if polygons is not None and not isinstance(polygons, list):
        raise ValueError(f"a segmentation is {repr(polygons)[:60]}; expected polygons, each x, y, x, y, …")
    return Region(box=box, polygons=[p for p in polygons or () if len(list(np.ravel(p))) >= 6])


def dialogue(record: dict) -> list[tuple[str, str]]:
    """The questions and answers of "conversations"; what comes before the first question is left out, as the released
    code does. <image> may stand once, in the first question; it goes, as chat.py places the image."""
    said = field(record, "conversations", list)
    said = list(itertools.dropwhile(lambda turn: turn.get("from") == "gpt", said))
    speakers, values = [turn.get("from") for turn in said], [field(turn, "value", str) for turn in said]
    if not said or speakers != ["human", "gpt"] * (len(said) // 2):
        who = ", ".join(map(str, speakers)) or "nobody"
        raise ValueError(f"conversations of {who}; expected human and gpt in turns")
    places = [i for i, value in enumerate(values) for _ in range(value.count("<image>"))]
    if places not in ([], [0]) or places and not record.get("image"):
        where = f"{len(places)} times <image>, in turns {', '.join(str(i + 1) for i in places)}"
        raise ValueError(f"{where}; expected it once at most, in the first, and an image with it")
    values[0] = values[0].replace("<image>", "").strip()
    return list(zip(values[::2], values[1::2]))


def fill_in(pairs: list[tuple[str, str]], tag: str, words: list[str]) -> list[tuple[str, str]]:
    """<tag0> -> words[0], and so on; <tag> -> words[0]."""

    def word(match):
        number = int(match[1] or 0)
        if number >= len(words):
            raise ValueError(f"{match[0]} in conversations, and {len(words)} regions; expected one that is there")
        return words[number]

    return [tuple(re.sub(rf"<{tag}(\d*)>", word, text) for text in pair) for pair in pairs]


def _pick(generator: np.random.Generator, forms: Sequence):
    return forms[generator.integers(len(forms))]


# -- one function a kind of record: (record, folder of images, generator) -> Plan ------------------------------------


def _regions(record, images, generator) -> Plan:
    groups = []
    for number, given in enumerate(field(record, "regions", list)):
        if not isinstance(given, dict) or not given or given.keys() - {"box", "polygons", "mask"}:
            raise ValueError(f"region {number} is {repr(given)[:60]}; expected box, polygons or mask")
        bitmap = None
        if "mask" in given:
            bitmap = read_mask(str(inside(images, field(given, "mask", str), "mask")))
        groups.append([Region(box=given.get("box"), polygons=given.get("polygons", ()), bitmap=bitmap)])
    given = record.get("markers") or []
    if given and len(given) != len(groups):
        raise ValueError(f"{len(given)} markers and {len(groups)} regions; expected as many, or no markers")
    given = [{"kind": one} if isinstance(one, str) else one or {} for one in given]
    for one in given:
        if one.keys() - {"kind", "color"} or one.get("kind", "point") not in KINDS:
            raise ValueError(f"a marker is {one}; expected a kind ({', '.join(KINDS)}) and perhaps a color")
    pairs = dialogue(record)
    return Plan(groups, lambda words: fill_in(pairs, "region", words), given=given)


def _conversations(record, images, generator) -> Plan:
    pairs = dialogue(record)
    return Plan([], lambda words: pairs)


def _refcocog(record, images, generator) -> Plan:
    answer, bare = field(record, "answer", str), generator.random() < 0.25
    form = _pick(generator, ("Describe the object with the visual prompt.", "Describe the pointed region."))
    form = form if bare else "Describe the object {}."
    return Plan(boxes_of(record, 1), lambda words: [(f"{form.format(*words)} Please provide a short phrase.", answer)])


def _refcocog_gpt4v(record, images, generator) -> Plan:
    pairs = dialogue(record)
    return Plan(boxes_of(record), lambda words: fill_in(pairs, "bbox", words))


TRIPLET = (
    "Please describe the relationship between the subject {} and the object {}. Provide a short triplet (subject, "
    "relationship, object) to represent this. Here, the subject and object are noun phrases, and the relationship can "
    "be verbs or prepositions."
)
AROUND = ("rectangle", "ellipse")


def _vg_rel(record, images, generator) -> Plan:
    answer = field(record, "answer", str)
    return Plan(boxes_of(record, 2), lambda words: [(TRIPLET.format(*words), answer)], AROUND)


def _vg_rel_gpt4v(record, images, generator) -> Plan:
    pairs = dialogue(record)
    return Plan(boxes_of(record), lambda words: fill_in(pairs, "bbox", words), AROUND)


LETTER = "Answer with the option's letter from the given choices directly."


def _v7w(record, images, generator) -> Plan:
    question, boxes = field(record, "question", str), field(record, "bboxes", list)
    if len(boxes) != 4 or boxes.count(record.get("answer")) != 1:
        raise ValueError(f"the answer {record.get('answer')} is not one of {len(boxes)} bboxes; expected one of four")
    letter = "ABCD"[boxes.index(record["answer"])]

    def write(words):
        choices = "\n".join(f"{letter}. The object {word}" for letter, word in zip("ABCD", words))
        return [(f"{question}\n{choices}\n{LETTER}", letter)]

    return Plan(boxes_of(record, 4), write, ("rectangle",), CONSTANT)


def _point_qa(record, images, generator) -> Plan:
    question, answer = field(record, "general_question", str), str(record.get("answer", ""))
    if not answer:
        raise ValueError("answer is missing; expected a number or a word")
    text = f"{question} The exemplary object is within the rectangle."
    text += "\nAnswer the question using a single word or phrase."
    red = [{"kind": "rectangle", "color": "red"}]
    return Plan(boxes_of(record, 1), lambda words: [(text, answer)], ("rectangle",), CONSTANT, red)


DESCRIBE = {
    True: ("Describe the image, and say which visual prompt points at each object that you mention.",
           "Please describe the image in a sentence that names both the marked objects and their visual prompts."),
    False: ("Describe the image and the objects that visual prompts point at, without the visual prompts themselves.",
            "Please describe the image in a sentence about the marked objects, but do not mention how they are marked."),
}  # fmt: skip


def _flickr30k(record, images, generator) -> Plan:
    caption, groups = field(record, "grounding", str), field(record, "bbox", list)
    named, hinted = generator.random() < 0.5, generator.random() < 0.5
    question = _pick(generator, DESCRIBE[bool(named)])

    def write(words):
        bare = [word.split(" ", 1)[1].removeprefix("to by ") for word in words]  # "the red arrow"
        hint = f" The visual prompts are: {', '.join(bare)}." if hinted else ""
        ((text, _),) = fill_in([(caption, "")], "bbox", words if named else [""] * len(words))
        text = " ".join(text.split())
        text = text[:1].upper() + text[1:]
        return [(question + hint, text if text.endswith((".", "!", "?")) else f"{text}.")]

    regions = [[Region(box=box) for box in boxes] for boxes in groups]
    return Plan(regions, write, ("rectangle", "ellipse", "arrow"))


VCR_ASK = ("{}", "Look at the image and answer: {}", "Here is a question about the image. {}")
VCR_CHOICES = ("Choose one of these: ", "The choices are: ", "Pick one: ")
VCR_WHY = ("Why?", "Why do you think so?", "How can you tell?", "What is the reason?", "Please explain your answer.")
VCR_ANSWER = ("({0})", "The best answer is ({0})", "({0}) {1}", "Answer ({0}): {1}")


def _vcr(record, images, generator) -> Plan:
    rounds = []  # (question or None, texts to choose from, which is right)
    for asked, key in ((field(record, "question", list), "answer"), (None, "rationale")):
        choices, right = vcr_choices(record, key)
        rounds.append((asked, choices, right) if generator.random() < 0.5 else (asked, choices[right : right + 1], 0))
    texts = [text for asked, choices, _ in rounds for text in ([asked] if asked else []) + choices]
    things, groups = vcr_regions(record, images, texts)
    forms = [(_pick(generator, VCR_ASK), _pick(generator, VCR_WHY), _pick(generator, VCR_CHOICES)) for _ in rounds]
    endings = [_pick(generator, VCR_ANSWER) for _ in rounds]
    names = ["object" if generator.random() < 0.5 else name for name in record["class_names"]]

    def write(words):
        said = vcr_words(names, things, words)
        pairs = []
        for (asked, choices, right), (ask, why, choose), ending in zip(rounds, forms, endings):
            told = [sentence(choice, said) for choice in choices]
            question = why if asked is None else ask.format(sentence(asked, said))
            if len(told) > 1:
                question += f" {choose}" + " ".join(f"({letter}) {text}" for letter, text in zip("ABCD", told))
            answer = ending.format("ABCD"[right], told[right]) if len(told) > 1 else told[right]
            pairs.append((question, answer))
        return pairs

    return Plan(groups, write, tuple(kind for kind in KINDS if kind != "point"))


VCR_REASON = (  # the words that the paper's model was tested with
    "I give you a question and its answer, I need you to provide a rationale explaining why the answer is right. "
    '"{}" The answer is "{}".What is the rationale for this decision?'
)


def vcr_choice(step: str, kind: str, record: dict, images: Path, generator: np.random.Generator) -> Plan:
    """As VCR's evaluation asks: four choices, and a letter. step: "qa" asks for the answer, "qar" for the reason."""
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
        question = VCR_REASON.format(*asked_in_words) if step == "qar" else asked_in_words[0]
        options = "\n".join(f"{letter}. {sentence(text, said)}" for letter, text in zip("ABCD", choices))
        return [(f"{question}\n{options}\n{LETTER}", "ABCD"[label])]

    return Plan(groups, write, (kind,), EVALUATION, crowded=True)


def _vcr_choice(record, images, generator) -> Plan:
    step, kind = ("qa", "qar")[generator.integers(2)], _pick(generator, KINDS)
    return replace(vcr_choice(step, kind, record, images, generator), distribution=RELEASED)


def vcr_choices(record: dict, key: str) -> tuple[list, int]:
    """The choices of a VCR record for its "answer" or its "rationale", and which of them is right."""
    choices, right = field(record, f"{key}_choices", list), field(record, f"{key}_label", int)
    if not 0 <= right < len(choices) <= 4:
        raise ValueError(f"{key}_label is {right} of {len(choices)} choices; expected one of four at most")
    return choices, right


def vcr_regions(record: dict, images: Path, texts: list[list]) -> tuple[list[int], list[list[Region]]]:
    """The numbers of the objects that the texts speak of, and the region of each, from the file "meta_dir", or from
    "meta", its content."""
    names = field(record, "class_names", list)
    meta = record.get("meta") or _vcr_meta(inside(images, field(record, "meta_dir", str), "meta_dir"))
    boxes, masks = field(meta, "boxes", list), field(meta, "segms", list)
    things = sorted({i for text in texts for part in text if isinstance(part, list) for i in part})
    here = min(len(names), len(boxes), len(masks))
    if things and not all(type(i) is int and 0 <= i < here for i in things):
        raise ValueError(f"objects {things} are mentioned; expected whole numbers below {here}, which are there")
    polygons = [[np.ravel(p).tolist() for p in masks[i] if len(p) >= 4] for i in things]
    return things, [[Region(box=boxes[i][:4], polygons=p)] for i, p in zip(things, polygons)]


def _vcr_meta(path: Path) -> dict:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        field(meta, "boxes", list), field(meta, "segms", list)
        return meta
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"meta_dir {path} can't be read: {error}") from None


def vcr_words(names: list[str], things: list[int], words: list[str]) -> dict[int, str]:
    """What each object is called: {2: "the person at the red point"}."""
    return {i: f"the {names[i]} {word}" for i, word in zip(things, words)}


def sentence(parts: list, said: dict[int, str]) -> str:
    """["Why is", [0, 2], "here", "?"] -> "Why is the person … and the dog … here?"."""
    text = ""
    for part in parts:
        more = " and ".join(said[i] for i in part) if isinstance(part, list) else str(part)
        text += more if not text or more[:1] in ".,?!:;'" else f" {more}"
    return text[:1].upper() + text[1:]


READERS = {
    "regions": _regions, "conversations": _conversations, "refcocog": _refcocog, "refcocog-gpt4v": _refcocog_gpt4v,
    "vg_rel": _vg_rel, "vg_rel-gpt4v": _vg_rel_gpt4v, "vcr": _vcr, "vcr-choice": _vcr_choice, "flickr30k": _flickr30k, "v7w": _v7w,
    "pointQA_twice": _point_qa,
}  # fmt: skip


def kind_of(record: dict) -> str:
    """Which of READERS reads it: the id's first word tells the official kinds, its second may be gpt4v."""
    if "regions" in record:
        return "regions"
    first, second, *_ = [*str(record.get("id")).split("-"), ""]
    for kind in (f"{first}-{second}", first):
        if kind in READERS and kind not in ("regions", "conversations"):
            return kind
    if "conversations" not in record:
        raise ValueError(f'neither "regions" nor "conversations", and the id {record.get("id")!r} is of no known kind')
    return "conversations"


# -- a record -> a sample --------------------------------------------------------------------------------------------


def inside(images: Path, name: str, what: str) -> Path:
    """The file of that name, which must lie in the folder of images; the official "./dataset" is that folder."""
    path = images / re.sub(r"^\./(dataset/)?", "", name)
    if not path.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"{what} {name} lies outside {images}")
    if not path.is_file():
        raise ValueError(f"{what} {name} is not in {images}")
    return path


def image_of(record: dict, images: Path) -> Path | None:
    return inside(images, field(record, "image", str), "image") if record.get("image") else None


def annotate(record: dict, images: Path, generator, size: tuple[int, int] | None, read=None) -> tuple[tuple, tuple]:
    """The markers and the turns of a record whose upright image has this size, or which has none."""
    plan = (read or READERS[kind_of(record)])(record, images, generator)
    if size is None and plan.groups:
        raise ValueError("regions, and no image; expected one")
    for region in itertools.chain(*plan.groups):
        for x0, y0, x1, y1 in filter(None, (region.box, region.bounds)):
            if x0 >= size[0] or y0 >= size[1] or x1 <= 0 or y1 <= 0:
                raise ValueError(f"a region of {(x0, y0, x1, y1)} lies outside the image, {size[0]} x {size[1]}")
    looks, markers = _mark(plan, generator, size)
    pairs = plan.write([phrase(look) for look in looks])
    turns = tuple(Turn(asked, told, size is not None and i == 0) for i, (asked, told) in enumerate(pairs))
    for number, turn in enumerate(turns, 1):
        if not turn.answer.strip() or not (turn.question.strip() or turn.image):
            raise ValueError(f"question {number} has no {'words' if turn.answer.strip() else 'answer'}")
    return tuple(markers), turns


def _mark(plan: Plan, generator: np.random.Generator, size) -> tuple[list[Look], list[Marker]]:
    """Looks and markers; other looks where these leave a region without a marker, such as a triangle in a line."""
    for attempt in range(20):
        looks = choose_looks(generator, len(plan.groups), plan.kinds, plan.given, plan.crowded)
        pairs = [(look, region) for look, group in zip(looks, plan.groups) for region in group]
        try:
            return looks, [sample_marker(region, size, generator, look.kind, look.color, plan.distribution)
                           for look, region in pairs]  # fmt: skip
        except ValueError:
            if attempt == 19:
                raise


def to_sample(record: dict, images: Path, generator: np.random.Generator, read=None) -> Sample:
    """ValueError, with the reason, where the words or regions of a record are bad; if the image is, once it is opened.
    read: what plans the record, a function as in READERS; None is the one of its kind."""
    path = image_of(record, images)
    annotated = annotate(record, images, generator, size_of(path) if path else None, read)
    return Sample(partial(open_image, path) if path else None, *annotated)


@lru_cache(maxsize=100_000)
def size_of(path: Path) -> tuple[int, int]:
    """(width, height) of an image as it is seen, from its header."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(0x0112, 1) in (5, 6, 7, 8) else (width, height)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} can't be read as an image ({type(error).__name__}); is the file whole?") from None


MALFORMED = (ValueError, TypeError, AttributeError, KeyError, IndexError, OSError)  # all that a bad record may raise


class BadRecord(ValueError):
    """Which record is bad, where it stands, and why."""

    def __init__(self, path: Path, line: int, name: str, reason: str):
        super().__init__(path, line, name, reason)
        self.path, self.line, self.id, self.reason = path, line, name, " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}, {self.id}: {self.reason}"


def bad_record(file: JSONFile, k: int, record, error: Exception) -> BadRecord:
    name = record.get("id", record.get("question_id", "without id")) if isinstance(record, dict) else "without id"
    reason = str(error) if isinstance(error, ValueError) else f"malformed ({type(error).__name__}: {error})"
    return BadRecord(file.path, file.line(k), name, reason)


def _read(file: JSONFile, k: int, images: Path, generator: np.random.Generator) -> tuple[dict, Sample]:
    """Record k of a file, and its sample; BadRecord where it is none."""
    record = None
    try:
        record = file[k]
        return record, to_sample(record, images, generator)
    except MALFORMED as error:
        raise bad_record(file, k, record, error) from None


class Records:
    """The samples of one file or several, one after the other. Sample i of an epoch is a function of (seed, epoch, i)
    alone: neither workers nor resuming change it."""

    def __init__(self, files: Sequence[Path], images: Path, seed: int = 0):
        self.files, self.images, self.seed = [JSONFile(file) for file in files], images, seed
        self.ends = list(itertools.accumulate(map(len, self.files)))

    def __len__(self) -> int:
        return self.ends[-1]

    def place(self, i: int) -> tuple[JSONFile, int]:
        """The file that record i lies in, and which it is there."""
        i = range(len(self))[i]
        k = next(k for k, end in enumerate(self.ends) if i < end)
        return self.files[k], i - (self.ends[k - 1] if k else 0)

    def __getitem__(self, i: int) -> Sample:
        return self.sample(i, epoch=0)

    def sample(self, i: int, epoch: int) -> Sample:
        file, k = self.place(i)
        record, sample = _read(file, k, self.images, np.random.default_rng([self.seed, epoch, i]))
        return replace(sample, open=sample.open and partial(self._open, sample.open, file, k, record))

    def bad(self, i: int, reason: str) -> BadRecord:
        """What is wrong with record i, found later."""
        file, k = self.place(i)
        return bad_record(file, k, file[k], ValueError(reason))

    def _open(self, opened: Callable, file: JSONFile, k: int, record: dict) -> Image.Image:
        try:
            return opened()
        except (ValueError, OSError) as error:
            raise bad_record(file, k, record, error) from None


# -- commands --------------------------------------------------------------------------------------------------------


def check_range(task: tuple[JSONFile, Path, range]) -> tuple[Counter, list[tuple[int, str, str]]]:
    """How many records of a range are good, by kind, and (line, id, reason) of the others. Images are not decoded."""
    file, images, numbers = task
    good, bad = Counter(), []
    for k in numbers:
        try:
            record, _ = _read(file, k, images, np.random.default_rng([0, 0, k]))
            good[kind_of(record)] += 1
        except BadRecord as error:
            bad.append((error.line, error.id, error.reason))
    return good, bad


def check(path: Path, images: Path, processes: int | None = None) -> int:
    """Print every bad record and how many are good, by kind; returns how many are bad."""
    file, good, bad = JSONFile(path), Counter(), 0
    tasks = [(file, images, range(first, min(first + 1000, len(file)))) for first in range(0, len(file), 1000)]
    with multiprocessing.Pool(processes) as pool:
        for some, wrong in _with_bar(pool.imap(check_range, tasks), len(tasks)):
            good += some
            bad += len(wrong)
            for line, name, reason in wrong:
                print(f"line {line}, {name}: {reason}")
    for kind in sorted(good):
        print(f"{kind:15} {good[kind]:>9,} good")
    print(f"{'all':15} {good.total():>9,} good, {bad:,} bad")
    return bad


def _with_bar(items, total: int):
    if not sys.stderr.isatty():
        return items
    from huggingface_hub.utils import tqdm

    return tqdm(items, "records", total, unit="k")


def main(argv: list[str]) -> None:
    parser = Parser(prog="data/records.py", description="Look at the records that train a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("check", "name every bad record"), ("preview", "draw some, what is trained on green")):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", type=Path, help="a JSON array or JSON lines")
        command.add_argument("--images", type=Path, default=Path("."), help="the folder that images lie in (here)")
    command.add_argument("-n", type=int, default=12, help="records from all over the file (12)")
    command.add_argument("--out", type=Path, default=Path("preview.png"), help="the sheet to write (preview.png)")
    command.add_argument("--tokenizer", default="tiny", help="of this model, a name or folder (tiny)")
    command.add_argument("--template", choices=TEMPLATES, default="llava_v1", help="of the prompt (llava_v1)")
    args = parser.parse_args(argv)
    if not args.images.is_dir():
        raise ValueError(f"no folder {args.images}; expected the one that images lie in")
    if args.command == "check":
        if check(args.file, args.images):
            sys.exit(1)
    else:
        from data.preview import preview  # which reads records by this file

        tokenizer = Tokenizer.load(find(args.tokenizer))
        preview(args.file, args.images, args.n, args.out, tokenizer, args.template)


if __name__ == "__main__":
    sys.exit(run(main))
