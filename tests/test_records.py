"""Records: what is marked, named, asked and trained, for every kind; and what is said about a bad one."""

import copy
import json
import re

import numpy as np
import pytest
from PIL import Image

from chat import IMAGE, encode_chat
from commandline import run
from data import readers, records
from data import preview as preview_module
from data.preview import pieces
from data.readers import kind_of
from data.records import BadRecord, Records, annotate, choose_looks, to_sample
from overlay import COLORS, KINDS, draw, phrase

SIZE = (200, 140)
BOX, OTHER = [10, 10, 60, 50], [90, 30, 150, 110]
TALK = [{"from": "human", "value": "<image>\nWhat is here?"}, {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "It sits."}]


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


OFFICIAL = {
    "refcocog": {"id": "refcocog-17", "image": "a.png", "bboxes": [BOX], "answer": "the umpire behind the batter",
                 "segmentations": [[[12, 12, 50, 12, 50, 40, 30, 48]]]},
    "refcocog-gpt4v": {"id": "refcocog-gpt4v-3", "image": "a.png", "bboxes": [BOX], "segmentations": [None],
                       "conversations": talk("What is the person <bbox> doing?", "The person <bbox> is running.")},
    "vg_rel": {"id": "vg_rel-5", "image": "a.png", "bboxes": [BOX, OTHER], "answer": "(man, riding, horse)"},
    "vg_rel-gpt4v": {"id": "vg_rel-gpt4v-5", "image": "a.png", "bboxes": [BOX, OTHER],
                     "conversations": talk("<image>\nWhat joins <bbox0> and <bbox1>?", "<bbox1> holds <bbox0>.")},
    "vcr": {"id": "vcr-52941", "image": "a.png", "meta_dir": "./dataset/meta/x.json", "class_names": ["person", "dog", "cup"],
            "question": ["Why is", [0], "pointing at", [2], "?"],
            "answer_choices": [[[0, 2], "are angry", "."], ["No", "."], ["Yes", "."], ["Never", "."]], "answer_label": 2,
            "rationale_choices": [[[1], "is late", "."], ["So", "."], ["Thus", "."], ["As", "."]], "rationale_label": 0},
    "flickr30k": {"id": "flickr30k-9", "image": "a.png", "bbox": [[[10, 10, 50, 90]], [[60, 40, 120, 90], [130, 40, 180, 90]]],
                  "grounding": "a man <bbox0> throws two frisbees <bbox1> in a park"},
    "v7w": {"id": "v7w-2", "image": "a.png", "question": "Which is the tallest building?", "answer": OTHER,
            "bboxes": [BOX, [70, 1, 80, 9], OTHER, [1, 60, 40, 99]]},
    "pointQA_twice": {"id": "pointQA_twice-4", "image": "a.png", "bboxes": [BOX], "answer": "2",
                      "general_question": "How many of these are there?"},
    "conversations": {"id": "000000033471", "image": "a.png", "conversations": TALK},
    "regions": {"image": "a.png", "regions": [{"box": BOX}, {"polygons": [[90, 30, 150, 30, 120, 110]]}, {"mask": "m.png"}],
                "conversations": talk("Is <region0> left of <region1> and <region2>?", "No, <region1> is.")},
}
MARKERS = {"refcocog": 1, "refcocog-gpt4v": 1, "vg_rel": 2, "vg_rel-gpt4v": 2, "flickr30k": 3, "v7w": 4, "pointQA_twice": 1,
           "conversations": 0, "regions": 3}
ALLOWED = {"vg_rel": {"rectangle", "ellipse"}, "vg_rel-gpt4v": {"rectangle", "ellipse"}, "v7w": {"rectangle"},
           "vcr": set(KINDS) - {"point"}, "flickr30k": {"rectangle", "ellipse", "arrow"}, "pointQA_twice": {"rectangle"}}


@pytest.fixture
def images(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[100:130, 20:70] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    (tmp_path / "meta").mkdir()
    meta = {"boxes": [[*BOX, 0.9], [*OTHER, 0.8], [20, 60, 60, 99, 0.7]],
            "segms": [[[[12, 12], [50, 12], [50, 40], [30, 48]]], [], [[[20, 60], [21, 61]]]]}
    (tmp_path / "meta" / "x.json").write_text(json.dumps(meta))
    return tmp_path


def many(kind, images, n=60):
    return [to_sample(OFFICIAL[kind], images, np.random.default_rng([7, i])) for i in range(n)]


@pytest.mark.parametrize("kind", OFFICIAL)
def test_every_kind_is_read_as_what_it_is(kind, images):
    """Guards against a kind taken for another, an image shown twice or never (the released code shows none in two
    kinds), markers too few, and kinds of marker that these records are not trained with."""
    assert kind_of(OFFICIAL[kind]) == kind
    seen = set()
    for sample in many(kind, images):
        assert sample.image.size == SIZE and [turn.image for turn in sample.turns] == [True] + [False] * (len(sample.turns) - 1)
        text = "\n".join(t for turn in sample.turns for t in (turn.question, turn.answer))
        assert not re.search(r"<image>|<bbox\d*>|<region\d+>|\{|\}|  ", text), text
        assert len(sample.markers) == MARKERS[kind] if kind in MARKERS else 2 <= len(sample.markers) <= 3
        seen |= {marker.kind for marker in sample.markers}
    if OFFICIAL[kind] is not OFFICIAL["conversations"]:
        assert seen == ALLOWED.get(kind, set(KINDS))


@pytest.mark.parametrize("kind", [kind for kind in OFFICIAL if kind not in ("conversations", "pointQA_twice")])
def test_every_marker_is_named_and_told_from_the_others(kind, images):
    """Guards against the released code's prompts that lose a marker's words: always in refcocog, and where a color has
    no name in flickr30k; and against two markers of one kind and color."""
    named = 0
    for sample in many(kind, images):
        text = " ".join(t for turn in sample.turns for t in (turn.question, turn.answer))
        words = {phrase(marker) for marker in sample.markers}
        looks = {(marker.kind, marker.color) for marker in sample.markers}
        assert len(words) == len(looks) and len(looks) >= len(sample.markers) - (kind == "flickr30k")
        kinds = [kind for kind, _ in looks]
        assert all(kinds.count(kind) == 1 or color in COLORS.values() for kind, color in looks)
        hidden = kind == "refcocog" and re.search("visual prompt|pointed region", text)
        hidden = hidden or kind == "flickr30k" and re.search("without the visual|do not mention", text)
        assert hidden or all(word in text for word in words), (text, words)
        named += not hidden
    assert named > 15


def test_exact_prompts(images):
    """Guards against prompts that the released weights were not trained on."""
    (v7w,), (rel,), (point,) = (many(kind, images, 1)[0].turns for kind in ("v7w", "vg_rel", "pointQA_twice"))
    lines = v7w.question.split("\n")
    assert lines[0] == "Which is the tallest building?" and v7w.answer == "C"
    assert re.fullmatch(r"C\. The object within the (\w+ )?rectangle", lines[3])
    assert lines[5] == "Answer with the option's letter from the given choices directly."
    assert re.match(r"Please describe the relationship between the subject within the (\w+ )?(rectangle|ellipse) and the "
                    r"object within the (\w+ )?(rectangle|ellipse)\. Provide a short triplet", rel.question)
    assert point.question == ("How many of these are there? The exemplary object is within the rectangle.\n"
                              "Answer the question using a single word or phrase.")
    assert many("conversations", images, 1)[0].turns[0].question == "What is here?"


def test_vcr_says_who_and_what_is_right(images):
    """Guards against a wrong letter, a choice without its letter, people of another number, and boxes of others."""
    letters = 0
    for sample in many("vcr", images, 100):
        asked, why = sample.turns
        assert re.match(r"(Look at the image and answer: |Here is a question about the image\. )?Why is the (person|object) "
                        r".+ pointing at the (cup|object) .+\?", asked.question)
        if "(A)" in asked.question:
            letters += 1
            assert "(C) Yes." in asked.question and "(C)" in asked.answer and "No." not in asked.answer
        else:
            assert asked.answer == "Yes."
        assert "(A)" in why.answer if "(A)" in why.question else why.answer.endswith("is late.")
    assert 30 < letters < 70


def test_the_mask_decides_where_a_marker_lies(images):
    """Guards against segmentations that are read and not used: points of the third region lie in its mask."""
    record = dict(OFFICIAL["regions"], markers=["rectangle", {"kind": "ellipse", "color": "lime"}, "point"])
    for i in range(30):
        first, second, point = to_sample(record, images, np.random.default_rng(i)).markers
        assert (first.kind, second.kind, second.color) == ("rectangle", "ellipse", COLORS["lime"])
        assert 20 <= point.points[0][0] < 70 and 100 <= point.points[0][1] < 130


def test_looks_use_all_that_words_can_tell_apart():
    """Guards against an endless loop or a repeated look when there are many regions: 18 is all that two kinds hold."""
    for seed in range(20):
        looks = choose_looks(np.random.default_rng(seed), 18, ("rectangle", "ellipse"))
        assert len({phrase(look) for look in looks}) == 18
    with pytest.raises(ValueError, match="10 markers of the kind arrow; expected 9 at most"):
        choose_looks(np.random.default_rng(0), 10, KINDS, [{"kind": "arrow"}] * 10)
    with pytest.raises(ValueError, match="19 regions; expected at most 18"):
        choose_looks(np.random.default_rng(0), 19, ("rectangle", "ellipse"))


@pytest.mark.parametrize("given", [
    [{"color": "red"}, {"color": "#ff0000"}], [{"kind": "arrow", "color": "red"}, {"color": "red"}],
    [{"color": "red"}, {"kind": "arrow", "color": "red"}, {}],
])
def test_a_given_color_leaves_the_words_apart(given):
    """Guards against a record that is bad now and then, and trains until it is: kinds are chosen by what colors are given."""
    for seed in range(100):
        looks = choose_looks(np.random.default_rng(seed), len(given), KINDS, given)
        assert len({phrase(look) for look in looks}) == len(given)


def test_images_may_be_links(images, tmp_path_factory):
    """Guards against a folder that is put together of links, as the official mix's often is, refused as outside itself."""
    links = tmp_path_factory.mktemp("links")
    (links / "all").symlink_to(images)
    (links / "b.png").symlink_to(images / "a.png")
    for name in ("all/a.png", "b.png"):
        assert to_sample(dict(OFFICIAL["v7w"], image=name), links, np.random.default_rng(0)).image.size == SIZE


def test_a_mask_that_may_lie_beyond_the_image(images):
    """Guards against a marker that can't be drawn, found as training goes: the outline here lies around the image."""
    around = [-10, -10, SIZE[0] + 10, -10, SIZE[0] + 10, SIZE[1] + 10, -10, SIZE[1] + 10]
    record = {"image": "a.png", "regions": [{"polygons": [around]}], "conversations": talk("What is <region0>?", "all")}
    samples = [to_sample(record, images, np.random.default_rng(seed)) for seed in range(60)]
    assert "mask" in {sample.markers[0].kind for sample in samples}
    for sample in samples:
        draw(Image.new("RGB", SIZE), sample.markers)


@pytest.mark.parametrize("name", ["turned.tif", "turned.jpg"])
def test_the_size_of_a_turned_image(name, images):
    """Guards against boxes of a picture that lies on its side: of a TIFF, Pillow has turned the size already."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(images / name, exif=exif)
    assert records.size_of(images / name) == (20, 30)


def test_sentences_close_where_words_have_gone(images):
    """Guards against "a man , smiling": what stands before a comma may be a marker's words, which half of the time go."""
    record = dict(OFFICIAL["flickr30k"], grounding="a man <bbox0>, smiling, throws <bbox1> .")
    told = {sample.turns[0].answer for i in range(20) for sample in [to_sample(record, images, np.random.default_rng(i))]}
    assert "A man, smiling, throws." in told and len(told) > 5
    assert not any(" ," in text or " ." in text for text in told)
    record["grounding"] = "1,000 men <bbox0> walk with a dog ,a cat , <bbox1>"
    told = {sample.turns[0].answer for i in range(20) for sample in [to_sample(record, images, np.random.default_rng(i))]}
    assert "1,000 men walk with a dog, a cat." in told, told


def test_words_of_vcr_stand_as_in_the_released_code():
    """Guards against prompts in other letters than those that the tuned weights have seen."""
    said = {0: "the person at the red point"}
    assert readers.sentence([[0], "'s hand", "."], said) == "The person at the red point 's hand."
    assert readers.sentence(["he holds", [0], ",", "or not", "?"], said) == "he holds the person at the red point, or not?"


def test_a_question_without_an_image_stays_as_it_is(images):
    """Guards against code whose first line loses its place; the released code strips only where <image> stood."""
    said = talk("  def f():\n", "It is a function.")
    sample = to_sample({"id": "text", "conversations": said}, images, np.random.default_rng(0))
    assert sample.turns[0].question == "  def f():\n"


def test_an_image_beyond_all_limits_is_a_bad_record(images, monkeypatch):
    """Guards against a run that ends at one image, and can't even be told to skip it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for width in (21, 70):  # of the first Pillow only warns, and training refuses it
        Image.new("1", (width, 50)).save(images / f"huge-{width}.png")
        (images / "mix.json").write_text(json.dumps([dict(OFFICIAL["v7w"], image=f"huge-{width}.png")]))
        with pytest.raises(BadRecord, match=f"huge-{width}.png has more than 1,000 pixels, the limit"):
            Records([images / "mix.json"], images)[0]


def test_text_alone(images):
    """Guards against a record without image that gets one, or that is refused for a word that is a gap elsewhere."""
    record = {"id": "x", "conversations": talk("Hello", "Hi from <region>.amazonaws.com, {region1}")}
    sample = to_sample(record, images, np.random.default_rng(0))
    assert sample.image is None and sample.markers == () and not sample.turns[0].image


def test_what_is_trained_is_the_answers(tiny, images):
    """Guards against a mask that is shifted, or an <image> in a text: what is trained decodes to the answers."""
    for kind in OFFICIAL:
        for sample in many(kind, images, 5):
            ids, trained = encode_chat(tiny, "llava_v1", sample.turns)
            learned = [i for i, t in zip(ids, trained) if t]
            assert ids.count(IMAGE) == 1
            assert tiny.decode(i for i in learned if i != tiny.eos).split() == " ".join(t.answer for t in sample.turns).split()
            runs = pieces(tiny, ids, trained)
            assert [text.strip().removesuffix("</s>") for text, learned in runs if learned] == [t.answer for t in sample.turns]


BAD = [
    ("conversations", "image", "none.png", "image none.png is not in"),
    ("conversations", "image", "../secret.png", "lies outside"),
    ("conversations", "image", "/etc/hostname", "lies outside"),
    ("conversations", "image", 7, "image is 7; expected text"),
    ("conversations", "conversations", TALK[:3], "conversations of human, gpt, human; expected human and gpt in turns"),
    ("conversations", "conversations", [], "conversations of nobody"),
    ("conversations", "conversations", talk("<image> <image>", "x"), "2 times <image>, in turns 1, 1; expected it once"),
    ("conversations", "conversations", talk("Hi", "x", "<image>", "y"), "1 times <image>, in turns 3"),
    ("conversations", "conversations", talk("Hi", ""), "question 1 has no answer"),
    ("conversations", "conversations", [{"from": "human"}, {"from": "gpt"}], "value is missing; expected text"),
    ("conversations", "bboxes", [BOX], "bboxes, but no \"regions\", and the id '000000033471' is of no kind"),
    ("conversations", "conversations", talk("Is <region0> red?", "x"), '<region0>, but no "regions"'),
    ("conversations", "conversations", talk("Why?", "<bbox>"), '<bbox>, but no "regions"'),
    ("refcocog", "answer", None, "answer is None; expected text"),
    ("refcocog", "bboxes", [BOX, BOX], "2 bboxes and 1 segmentations; expected 1 boxes"),
    ("refcocog", "bboxes", [[60, 10, 10, 50]], "a box needs x0, y0, x1, y1"),
    ("refcocog", "bboxes", [[300, 10, 400, 50]], "a region of (300.0, 10.0, 400.0, 50.0) lies outside the image, 200 x 140"),
    ("refcocog", "segmentations", [{"counts": "abc"}], "a segmentation is {'counts': 'abc'}; expected polygons"),
    ("refcocog-gpt4v", "conversations", talk("Who is <bbox1>?", "x"), "<bbox1> in conversations, and 1 regions"),
    ("vg_rel", "bboxes", [BOX], "1 bboxes"),
    ("v7w", "answer", [0, 0, 1, 1], "is not one of 4 bboxes"),
    ("v7w", "bboxes", [OTHER] * 4, "is not one of 4 bboxes"),
    ("vcr", "meta_dir", "./dataset/meta/none.json", "is not in"),
    ("vcr", "question", [None], "'[None]' is among the texts"), ("vcr", "question", [[]], "'[[]]' is among the texts"),
    ("vcr", "answer_choices", ["He is.", "She is.", "It is.", "No."], "'He is.' is among the texts; expected lists of words"),
    ("vcr", "answer_label", 4, "answer_label is 4 of 4 choices"),
    ("vcr", "question", [[9], "runs"], "objects [0, 1, 2, 9] are mentioned; expected whole numbers below 3"),
    ("refcocog", "segmentations", [[10, 10, 50, 10, 50, 50]], "a polygon of a segmentation is 10; expected a list"),
    ("refcocog", "bboxes", [[10**400, 10, 40, 50]], "OverflowError"),
    ("flickr30k", "grounding", "a man <bbox2>", "<bbox2> in conversations, and 2 regions"),
    ("flickr30k", "bbox", [[BOX], []], "group 1 of bbox has no boxes"),
    ("pointQA_twice", "answer", None, "answer is None; expected a number or a word"),
    ("pointQA_twice", "general_question", None, "expected text"),
    ("regions", "regions", [{"circle": 3}], "region 0 is {'circle': 3}; expected box, polygons or mask"),
    ("regions", "regions", [{"mask": "none.png"}], "mask none.png is not in"),
    ("regions", "regions", [{"box": [10, 10, 20, 20], "polygons": [[100, 90, 120, 90, 120, 110]]}] * 3, "region 0 has the box (10.0, "),
    ("regions", "markers", ["arrow"], "1 markers and 3 regions"),
    ("regions", "markers", ["arrow", "cross", "point"], "a marker is {'kind': 'cross'}; expected a kind"),
    ("regions", "markers", [{"kind": "arrow", "color": "red"}] * 3, 'two markers would both be "pointed to by the red arrow"'),
    ("regions", "image", None, "regions, and no image"),
    ("regions", "regions", [{"box": [0.1, 0.2, 0.5, 0.6]}] * 3, "a region of (0.1, 0.2, 0.5, 0.6) is smaller than a pixel"),
    ("regions", "regions", [{"box": [20, 30, 9000, 80]}] * 3, "(20.0, 30.0, 9000.0, 80.0) is not of an image of 200 x 140"),
    ("regions", "conversations", talk("Is <Region0> red?", "x"), "<Region0> in conversations; expected <region0>"),
    ("regions", "conversations", talk("Is it red?", "<region 1> is"), "<region 1> in conversations; expected <region1>"),
    *(("regions", "conversations", talk(f"Is {gap} red?", "x"), f"{gap} in conversations; expected <region0>")
      for gap in ("<bbox0>", "<region_0>", "<region-0>", "<regions0>", "<Reg0>", "[region0]", "{region 0}")),
    ("conversations", "conversations", talk("Is [region0] red?", "x"), "[region0] in conversations; expected <region0>"),
    ("conversations", "conversations", ["x", "y"], "conversations hold 'x'; expected objects with from and value"),
    ("conversations", "conversations", talk("Hi", "a \ud83d"), "half a character, '\\ud83d', in question 1 or its answer"),
    ("regions", "markers", "arrow", "markers is 'arrow'; expected a list"),
    ("regions", "markers", [5, 5, 5], "a marker is 5; expected a kind"),
    ("conversations", "marker", ["arrow"], 'a field "marker"; expected "markers"'),
    ("conversations", "Regions", [{"box": BOX}], 'a field "Regions"; expected "regions"'),
]


@pytest.mark.parametrize("kind, key, value, words", BAD, ids=[f"{kind} {key} {i}" for i, (kind, key, *_) in enumerate(BAD)])
def test_a_bad_record_is_named_with_its_reason(kind, key, value, words, images):
    """Guards against a record that is swapped for another in silence, and a message that does not help to find it."""
    good, bad = OFFICIAL[kind], {**copy.deepcopy(OFFICIAL[kind]), key: value}
    (images / "mix.json").write_text(json.dumps([good, bad, good], indent=1))
    data = Records([images / "mix.json"], images)
    assert data[0].turns and data[2].turns
    with pytest.raises(BadRecord) as caught:
        data[1]
    error = caught.value
    line = (images / "mix.json").read_text().split("\n").index(" },") + 2
    assert words in error.reason and error.where == f"line {line}" and error.id == bad.get("id", "without id")
    assert str(error).startswith(f"{images / 'mix.json'}, line {line}, ") and "\n" not in str(error)


@pytest.mark.parametrize("kind", ["vcr", "vcr-choice"])
@pytest.mark.parametrize("key", ["answer_choices", "rationale_choices"])
def test_vcr_is_bad_whatever_is_drawn(kind, key, images):
    """Guards against a record that `check` calls good, and a later epoch, which draws another of its choices, bad."""
    record = {**copy.deepcopy(OFFICIAL["vcr"]), "id": f"{kind}-5"}
    record[key][3] = [[7], "runs"]
    for seed in range(12):
        with pytest.raises(ValueError, match="7.* are mentioned; expected whole numbers below 3"):
            to_sample(record, images, np.random.default_rng(seed))


def test_an_id_is_a_line(images):
    """Guards against a list of bad records that has one twice, as its id has several lines."""
    (images / "mix.json").write_text(json.dumps([{**OFFICIAL["v7w"], "id": "v7w-a\nb\u2028c", "answer": 3}]))
    with pytest.raises(BadRecord) as caught:
        Records([images / "mix.json"], images)[0]
    assert caught.value.id == "v7w-a b c" and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("gap", ["<region0>", "<bbox1>"])
def test_a_gap_without_an_image_is_no_text(gap, images):
    """Guards against: a question about a marker, trained as text alone."""
    record = {"photo": "a.png", "conversations": talk(f"What is {gap}?", "x")}
    with pytest.raises(ValueError, match=f'{gap}, but no "regions"; expected "image" and "regions"'):
        to_sample(record, images, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["img", "image_path", "Picture"])
def test_an_image_by_another_name_is_no_text(name, images):
    """Guards against: a question about an image that nobody shows."""
    record = {"id": "x", name: "a.png", "conversations": talk("What is it?", "x")}
    with pytest.raises(ValueError, match=f'a field "{name}"; expected "image"'):
        to_sample(record, images, np.random.default_rng(0))


def test_a_sample_depends_on_seed_epoch_and_index_only(images):
    """Guards against a shared random stream: then workers, or a resumed run, would see other markers."""
    (images / "a.json").write_text(json.dumps([OFFICIAL["refcocog"]] * 3))
    (images / "b.jsonl").write_text(json.dumps(OFFICIAL["vg_rel"]) + "\n")
    data = Records([images / "a.json", images / "b.jsonl"], images)
    assert len(data) == 4 and len(data[3].markers) == 2
    first = [data[i].markers for i in range(4)]
    assert [data[i].markers for i in (3, 2, 1, 0)] == first[::-1] and first[0] != first[1]
    assert all(data.sample(i, epoch=1).markers != first[i] for i in range(4))
    assert Records(data.files and [images / "a.json"], images, seed=1)[0].markers != first[0]


def test_a_damaged_image_is_a_bad_record(images):
    """Guards against a crash, or a gray square, where a download was cut: by its header, and by its pixels."""
    Image.open(images / "a.png").save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:2000])
    (images / "text.png").write_text("not an image")
    mix = [dict(OFFICIAL["v7w"], image=name) for name in ("text.png", "cut.jpg")]
    (images / "mix.json").write_text(json.dumps(mix))
    data = Records([images / "mix.json"], images)
    with pytest.raises(BadRecord, match="line 1, record 1, v7w-2: .*text.png can't be read as an image"):
        data[0]
    sample = data[1]
    with pytest.raises(BadRecord, match="line 1, record 2, v7w-2: .*cut.jpg can't be read as an image"):
        sample.image


def test_an_image_of_floats_is_a_bad_record(images):
    """Guards against a check that calls good what training refuses: no pixel is needed to see it."""
    Image.new("F", SIZE).save(images / "float.tif")
    with pytest.raises(ValueError, match="float.tif has floating-point pixels; expected 8 or 16 bits"):
        records.size_of(images / "float.tif")


def test_check_names_every_bad_record(images, capsys):
    """Guards against a check that stops at the first bad record, or counts them as good."""
    mix = [*OFFICIAL.values(), {"id": "odd"}, dict(OFFICIAL["v7w"], image="none.png"), 7]
    (images / "mix.jsonl").write_text("\n".join(map(json.dumps, mix)))
    with pytest.raises(SystemExit) as end:
        run(records.main, ["check", str(images / "mix.jsonl"), "--images", str(images)])
    said = capsys.readouterr().out
    assert end.value.code == 1
    assert "line 11, odd: " in said and "line 12, v7w-2: image none.png" in said and "line 13, without id: line 13 holds" in said
    assert f"{'all':15} {10:>9,} good, 3 bad" in said and said.count(" good") == 11
    (images / "mix.jsonl").write_text("\n".join(map(json.dumps, mix[:10])))
    assert run(records.main, ["check", str(images / "mix.jsonl"), "--images", str(images)]) == 0


def test_a_preview_shows_the_prompt_of_training(images, tiny, monkeypatch):
    """Guards against another template than training takes: "plain" where nothing is asked, or where it is wanted."""
    captions = dict(OFFICIAL["conversations"], conversations=talk("<image>", "A dog."))
    (images / "mix.json").write_text(json.dumps([captions, OFFICIAL["conversations"]]))
    shown = []
    monkeypatch.setattr(preview_module, "write_runs", lambda tile, y, runs: shown.append("".join(t for t, _ in runs)) or y)
    for template in ("llava_v1", "plain"):
        preview_module.preview(images / "mix.json", images, 2, images / "sheet.png", tiny, template)
    assert ["USER" in text for text in shown[::2]] == [False, True, False, False]  # each is measured first


def test_a_preview_replaces_previews_only(images, capsys):
    """Guards against a photo that is lost to a sheet of that name."""
    (images / "mix.json").write_text(json.dumps([OFFICIAL["refcocog"]]))
    photo, argv = (images / "a.png").read_bytes(), ["preview", str(images / "mix.json"), "--images", str(images), "--out"]
    assert run(records.main, [*argv, str(images / "a.png")]) == 2 and "doesn't say that it was drawn here" in capsys.readouterr().err
    assert run(records.main, [*argv, str(images / "mix.json")]) == 2 and "ends in .png" in capsys.readouterr().err
    assert (images / "a.png").read_bytes() == photo
    assert [run(records.main, [*argv, str(images / "sheet.png")]) for _ in range(2)] == [0, 0]


def test_a_preview_shows_the_whole_of_a_long_conversation(images):
    """Guards against a sheet that ends in the middle of an answer."""
    long = dict(OFFICIAL["conversations"], conversations=talk("Tell all.", "word " * 9000))
    (images / "mix.json").write_text(json.dumps([long]))
    assert run(records.main, ["preview", str(images / "mix.json"), "--images", str(images), "--out", str(images / "long.png")]) == 0
    page = np.asarray(Image.open(images / "long.png").convert("RGB"))
    assert len(page) > 5000 and (page[-40:-8] == (0xB5, 0xE8, 0xB5)).all(2).any(1).sum() > 8


def test_preview_shows_markers_and_what_is_trained(images):
    """Guards against a sheet without markers, or without the green ground under answers."""
    (images / "mix.json").write_text(json.dumps(list(OFFICIAL.values())))
    out = images / "sheet.png"
    argv = ["preview", str(images / "mix.json"), "--images", str(images), "-n", "10", "--out", str(out)]
    assert run(records.main, argv) == 0
    page = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert page.shape[1] == 4 * 328 - 8 and (page == (0xB5, 0xE8, 0xB5)).all(2).sum() > 10_000


@pytest.mark.parametrize("argv, words", [
    (["check", "none.json"], "no file none.json"), (["check", "mix.json", "--images", "none"], "no folder none"),
    (["preview", "mix.json", "-n", "0"], "n is 0, and mix.json has 1 records"), (["look"], "invalid choice"),
    (["check", "empty.json"], "empty.json has no records; expected one or more"),
])
def test_a_mistake_is_one_line(argv, words, images, monkeypatch, capsys):
    """Guards against tracebacks."""
    monkeypatch.chdir(images)
    (images / "mix.json").write_text(json.dumps([OFFICIAL["v7w"]]))
    (images / "empty.json").write_text("[]")
    assert run(records.main, argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_annotate_needs_no_pixels(images):
    """Guards against a check that says other things than training: markers and turns are the same without decoding."""
    for kind, record in OFFICIAL.items():
        sample = to_sample(record, images, np.random.default_rng(3))
        assert annotate(record, images, np.random.default_rng(3), SIZE) == (sample.markers, sample.turns)
