"""What a record says: one function for each official data set, and one for our own, (record, images, generator) -> Plan.

A Plan holds regions, and a function that writes questions and answers once the markers' words are known:

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
is never swapped for another; what training asks about VCR and Flickr30k is said in other words, and in fewer. Boxes are
x0, y0, x1, y1, polygons x, y, x, y, …, in pixels of the upright image.
"""

import difflib
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clip import read_mask
from overlay import CONSTANT, EVALUATION, KINDS, RELEASED, Distribution, Region


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


def inside(images: Path, name: str, what: str) -> Path:
    """The file of that name, which must lie in the folder of images, if as a link; the official "./dataset" is that folder."""
    path = images / re.sub(r"^\./(dataset/)?", "", name)
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(images)):
        raise ValueError(f"{what} {name} lies outside {images}")
    if not path.is_file():
        raise ValueError(f"{what} {name} is not in {images}")
    return path


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
    for polygon in polygons or ():
        if not isinstance(polygon, list):
            raise ValueError(f"a polygon of a segmentation is {repr(polygon)[:60]}; expected a list x, y, x, y, …")
    return Region(box=box, polygons=[p for p in polygons or () if len(list(np.ravel(p))) >= 6])


def dialogue(record: dict) -> list[tuple[str, str]]:
    """The questions and answers of "conversations"; what comes before the first question is left out, as the released
    code does. <image> may stand once, in the first question; it goes, as chat.py places the image."""
    said = field(record, "conversations", list)
    if odd := [turn for turn in said if not isinstance(turn, dict)]:
        raise ValueError(f"conversations hold {repr(odd[0])[:60]}; expected objects with from and value")
    said = list(itertools.dropwhile(lambda turn: turn.get("from") == "gpt", said))
    speakers, values = [turn.get("from") for turn in said], [field(turn, "value", str) for turn in said]
    if not said or speakers != ["human", "gpt"] * (len(said) // 2):
        who = ", ".join(map(str, speakers)) or "nobody"
        raise ValueError(f"conversations of {who}; expected human and gpt in turns")
    places = [i for i, value in enumerate(values) for _ in range(value.count("<image>"))]
    if places not in ([], [0]) or places and not record.get("image"):
        where = f"{len(places)} times <image>, in turns {', '.join(str(i + 1) for i in places)}"
        raise ValueError(f"{where}; expected it once at most, in the first, and an image with it")
    if places:
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


OURS = ("image", "regions", "markers", "conversations")  # what our own records have; others may say what they like beside
IMAGES = ("img", "image_path", "image_file", "picture")  # what others call it
# What stands for a region, and what is meant to.
GAPS = re.compile(r"<\s*(?:regions?|reg|bbox)[\s_-]*\d*\s*>|[\[{]\s*(?:regions?|reg|bbox)[\s_-]*\d+\s*[\]}]", re.IGNORECASE)


def refuse_misspelt(record: dict) -> None:
    """ValueError: a field that is meant to be one of ours, or a gap that nothing would fill: it would train without."""
    for key in record:
        for meant in difflib.get_close_matches(key.lower(), OURS, 1, 0.85):
            if meant not in record:
                raise ValueError(f'a field "{key}"; expected "{meant}"')
    if "image" not in record and (other := [key for key in record if key.lower() in IMAGES]):
        raise ValueError(f'a field "{other[0]}"; expected "image"')
    for text in itertools.chain(*dialogue(record)) if record.get("image") else ():
        for gap in GAPS.findall(text):
            if not re.fullmatch(r"<region\d*>", gap) and ("regions" in record or not re.fullmatch(r"<bbox\d*>", gap)):
                raise ValueError(f"{gap} in conversations; expected <region{re.sub(r'[^0-9]', '', gap)}>")


def _regions(record, images, generator) -> Plan:
    refuse_misspelt(record)
    groups = []
    for number, given in enumerate(field(record, "regions", list)):
        if not isinstance(given, dict) or not given or given.keys() - {"box", "polygons", "mask"}:
            raise ValueError(f"region {number} is {repr(given)[:60]}; expected box, polygons or mask")
        bitmap = None
        if "mask" in given:
            bitmap = read_mask(str(inside(images, field(given, "mask", str), "mask")))
        region = Region(box=given.get("box"), polygons=given.get("polygons", ()), bitmap=bitmap)
        x0, y0, x1, y1 = region.bounds
        if region.box and not (region.box[0] < x1 and x0 < region.box[2] and region.box[1] < y1 and y0 < region.box[3]):
            raise ValueError(f"region {number} has the box {region.box}, and its mask is within {region.bounds}; expected x0, y0, x1, y1")
        groups.append([region])
    given = field(record, "markers", list) if record.get("markers") else []
    if given and len(given) != len(groups):
        raise ValueError(f"{len(given)} markers and {len(groups)} regions; expected as many, or no markers")
    given = [{"kind": one} if isinstance(one, str) else one or {} for one in given]
    for one in given:
        if not isinstance(one, dict) or one.keys() - {"kind", "color"} or one.get("kind", "point") not in KINDS:
            raise ValueError(f"a marker is {one}; expected a kind ({', '.join(KINDS)}) and perhaps a color")
    pairs = dialogue(record)
    return Plan(groups, lambda words: fill_in(pairs, "region", words), given=given)


def _conversations(record, images, generator) -> Plan:
    refuse_misspelt(record)
    pairs = dialogue(record)
    meant = [key for key in ("bbox", "bboxes", "segmentations", "markers") if key in record]
    number = r"\d*" if record.get("image") else r"\d+"  # a text alone may speak of a <region>, as in addresses of servers
    meant += re.findall(rf"<(?:region|bbox){number}>", " ".join(text for pair in pairs for text in pair))
    if meant:  # it would be trained without a marker
        official = f', and the id {record["id"]!r} is of no kind that reads it' if "id" in record else ""
        expected = '"regions"' if record.get("image") else '"image" and "regions"'
        raise ValueError(f'{meant[0]}, but no "regions"{official}; expected {expected}')
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
    question, answer = field(record, "general_question", str), record.get("answer")
    if not isinstance(answer, (int, str)) or isinstance(answer, bool) or answer == "":
        shown = "missing" if "answer" not in record else repr(answer)[:60]
        raise ValueError(f"answer is {shown}; expected a number or a word")
    text = f"{question} The exemplary object is within the rectangle."
    text += "\nAnswer the question using a single word or phrase."
    red = [{"kind": "rectangle", "color": "red"}]
    return Plan(boxes_of(record, 1), lambda words: [(text, str(answer))], ("rectangle",), CONSTANT, red)


DESCRIBE = {
    True: ("Describe the image, and say which visual prompt points at each object that you mention.",
           "Please describe the image in a sentence that names both the marked objects and their visual prompts."),
    False: ("Describe the image and the objects that visual prompts point at, without the visual prompts themselves.",
            "Please describe the image in a sentence about the marked objects, but do not mention how they are marked."),
}


def _flickr30k(record, images, generator) -> Plan:
    caption, groups = field(record, "grounding", str), field(record, "bbox", list)
    named, hinted = generator.random() < 0.5, generator.random() < 0.5
    question = _pick(generator, DESCRIBE[bool(named)])

    def write(words):
        bare = [word.split(" ", 1)[1].removeprefix("to by ") for word in words]  # "the red arrow"
        hint = f" The visual prompts are: {', '.join(bare)}." if hinted else ""
        ((text, _),) = fill_in([(caption, "")], "bbox", words if named else [""] * len(words))
        text = re.sub(r" ([,.;:!?])", r"\1", " ".join(text.split())).rstrip(",")  # before which words may have gone
        text = re.sub(r",(?=[^\W\d])", ", ", text[:1].upper() + text[1:])
        return [(question + hint, text if text.endswith((".", "!", "?")) else f"{text}.")]

    regions = [[Region(box=box) for box in boxes] for boxes in groups]
    if not all(regions):
        raise ValueError(f"group {regions.index([])} of bbox has no boxes; expected one or more in each")
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
    every = [record["question"], *(text for key in ("answer", "rationale") for text in vcr_choices(record, key)[0])]
    things, groups = vcr_regions(record, images, texts, every)  # a record is good or bad, whatever is drawn
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
    texts = [*asked, *choices]
    things, groups = vcr_regions(record, images, texts, texts)

    def write(words):
        said = vcr_words(record["class_names"], things, words)
        asked_in_words = [sentence(text, said) for text in asked]
        question = VCR_REASON.format(*asked_in_words) if step == "qar" else asked_in_words[0]
        options = "\n".join(f"{letter}. {sentence(text, said)}" for letter, text in zip("ABCD", choices))
        return [(f"{question}\n{options}\n{LETTER}", "ABCD"[label])]

    return Plan(groups, write, (kind,), EVALUATION, crowded=True)


def _vcr_choice(record, images, generator) -> Plan:
    chosen, kind = generator.integers(2), _pick(generator, KINDS)
    plans = [vcr_choice(step, kind, record, images, generator) for step in ("qa", "qar")]  # good or bad, whichever is drawn
    return replace(plans[chosen], distribution=RELEASED)


def vcr_choices(record: dict, key: str) -> tuple[list, int]:
    """The choices of a VCR record for its "answer" or its "rationale", and which of them is right."""
    choices, right = field(record, f"{key}_choices", list), field(record, f"{key}_label", int)
    if not 0 <= right < len(choices) <= 4:
        raise ValueError(f"{key}_label is {right} of {len(choices)} choices; expected one of four at most")
    return choices, right


def vcr_regions(record: dict, images: Path, texts: list[list], every: list[list]) -> tuple[list[int], list[list[Region]]]:
    """The numbers of the objects that the texts speak of, and the region of each, from the file "meta_dir", or from
    "meta", its content. ValueError: one of `every`, the texts and others, is none, or speaks of what is not there."""
    for text in every:
        if not isinstance(text, list) or not text or not all(isinstance(part, str) or isinstance(part, list) and part for part in text):
            raise ValueError(f"{str(text)[:60]!r} is among the texts; expected lists of words and of lists of objects")
    names = field(record, "class_names", list)
    meta = record.get("meta") or _vcr_meta(inside(images, field(record, "meta_dir", str), "meta_dir"))
    boxes, masks = field(meta, "boxes", list), field(meta, "segms", list)
    mentioned = lambda texts: {i for text in texts for part in text if isinstance(part, list) for i in part}
    here = min(len(names), len(boxes), len(masks))
    if not all(type(i) is int and 0 <= i < here for i in mentioned(every)):
        raise ValueError(f"objects {sorted(mentioned(every))} are mentioned; expected whole numbers below {here}, which are there")
    things = sorted(mentioned(texts))
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
    """["Why is", [0, 2], "here", "?"] -> "Why is the person … and the dog … here?". As in the released code, only an object
    at the beginning gets a capital, and all but a lone mark of punctuation stands apart: "the person … 's hand"."""
    text = ""
    for part in parts:
        more = " and ".join(said[i] for i in part) if isinstance(part, list) else part
        text += more if not text or more in {".", ",", "?", "!", ":", ";"} else f" {more}"
    return text[:1].upper() + text[1:] if parts and isinstance(parts[0], list) else text


READERS = {
    "regions": _regions, "conversations": _conversations, "refcocog": _refcocog, "refcocog-gpt4v": _refcocog_gpt4v,
    "vg_rel": _vg_rel, "vg_rel-gpt4v": _vg_rel_gpt4v, "vcr": _vcr, "vcr-choice": _vcr_choice, "flickr30k": _flickr30k, "v7w": _v7w,
    "pointQA_twice": _point_qa,
}


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
