"""Records -> samples: whatever a file says about an image becomes Sample(image, markers, turns), and trains.

Of a record come regions and sentences with gaps for them; a generator chooses how each region is marked, and fills the
marker's words into the gaps:

    {"image": "dog.jpg", "regions": [{"box": [20, 30, 200, 180]}],
     "conversations": [{"from": "human", "value": "What is <region0>?"}, {"from": "gpt", "value": "A dog."}]}

    -> a scribble on the dog, "What is with the blue scribble?", "A dog."; another time a red arrow

What each official data set's record says and asks, and where we leave the released code, is in readers.py.

    python data/records.py check mix.json --images DIR        every bad record, by line, id and reason; what only shows
                                                              when pixels or tokens are made, training tells
    python data/records.py preview mix.json --images DIR      a sheet of marked images; what is trained is highlighted
"""

import itertools
import multiprocessing
import re
import signal
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

if not __package__:  # run as a file: what it imports lies one floor up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import ExifTags, Image

from chat import TEMPLATES, Turn
from clip import open_image
from commandline import Parser, run, with_bar
from data.index import JSONFile
from data.readers import READERS, Plan, field, inside, kind_of
from hub import find
from overlay import COLORS, Marker, phrase, rgb_of, sample_marker
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

    @property
    def is_caption(self) -> bool:
        """Nothing is asked: what is said tells of the image, in the template "plain"."""
        return len(self.turns) == 1 and not self.turns[0].question


# -- looks: how several regions are marked so that words can tell them apart ------------------------------------------


@dataclass(frozen=True)
class Look:
    """A kind and a color: all that overlay.phrase needs."""

    kind: str
    color: tuple[int, int, int]


def choose_looks(generator: np.random.Generator, n: int, kinds: Sequence[str], given=(), crowded=False) -> list[Look]:
    """n looks, no two with the same words: kinds first, then colors. A kind that only one has gets, half of the time, any
    rgb, which the words leave out; one that several have a different color with a name each. given: for each look, a dict
    that may hold "kind" and "color". crowded: more regions than words are no error."""
    given = list(given) or [{}] * n
    chosen = [one.get("kind") for one in given]
    for i in range(n):
        fixed = given[i].get("color")
        same = [k for k, one in zip(chosen, given) if fixed and "color" in one and rgb_of(one["color"]) == rgb_of(fixed)]
        free = [kind for kind in kinds if crowded or chosen.count(kind) < len(COLORS) and kind not in same]
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


# -- a record -> a sample --------------------------------------------------------------------------------------------


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
            if max(-x0, x1 - size[0]) > size[0] or max(-y0, y1 - size[1]) > size[1]:
                raise ValueError(f"a region of {(x0, y0, x1, y1)} is not of an image of {size[0]} x {size[1]} pixels")
            if region.bitmap is None and max(x1 - x0, y1 - y0) < 1:  # parts of the image, it seems
                raise ValueError(f"a region of {(x0, y0, x1, y1)} is smaller than a pixel; expected pixels")
    looks, markers = _mark(plan, generator, size)
    pairs = plan.write([phrase(look) for look in looks])
    turns = tuple(Turn(asked, told, size is not None and i == 0) for i, (asked, told) in enumerate(pairs))
    for number, turn in enumerate(turns, 1):
        if not turn.answer.strip() or not (turn.question.strip() or turn.image):
            raise ValueError(f"question {number} has no {'words' if turn.answer.strip() else 'answer'}")
        if half := re.search("[\ud800-\udfff]", turn.question + turn.answer):
            raise ValueError(f"half a character, {half[0]!r}, in question {number} or its answer; expected whole ones")
    return tuple(markers), turns


def _mark(plan: Plan, generator: np.random.Generator, size) -> tuple[list[Look], list[Marker]]:
    """Looks and markers; other looks where these leave a region without a marker, such as a triangle in a line."""
    for attempt in range(20):
        looks = choose_looks(generator, len(plan.groups), plan.kinds, plan.given, plan.crowded)
        pairs = [(look, region) for look, group in zip(looks, plan.groups) for region in group]
        try:
            return looks, [sample_marker(region, size, generator, look.kind, look.color, plan.distribution)
                           for look, region in pairs]
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
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format == "TIFF":  # Pillow itself turns one as it is loaded, and takes away its tag
                    image.load()
                if image.mode == "F":
                    raise ValueError(f"{path} has floating-point pixels; expected 8 or 16 bits")
                width, height = image.size
                return (height, width) if image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8) else (width, height)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, the limit; shrink it") from None
    except (OSError, SyntaxError, TypeError, struct.error) as error:
        raise ValueError(f"{path} can't be read as an image ({type(error).__name__}); is the file whole?") from None


MALFORMED = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError, OSError)  # of a bad record


class BadRecord(ValueError):
    """Which record is bad, where it stands, and why."""

    def __init__(self, path: Path, where: str, name: str, reason: str):
        super().__init__(path, where, name, reason)
        self.path, self.where = path, where
        self.id, self.reason = (" ".join(str(text).split()) for text in (name, reason))  # in one line

    def __str__(self) -> str:
        return f"{self.path}, {self.where}, {self.id}: {self.reason}"


def bad_record(file: JSONFile, k: int, record, error: Exception) -> BadRecord:
    name = record.get("id", record.get("question_id", "without id")) if isinstance(record, dict) else "without id"
    reason = str(error) if isinstance(error, ValueError) else f"malformed ({type(error).__name__}: {error})"
    return BadRecord(file.path, file.where(k), name, reason)


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


def check_range(task: tuple[JSONFile, Path, range]) -> tuple[Counter, list[tuple[str, str, str]]]:
    """How many records of a range are good, by kind, and (where, id, reason) of the others. Images are not decoded."""
    file, images, numbers = task
    good, bad = Counter(), []
    for k in numbers:
        try:
            record, _ = _read(file, k, images, np.random.default_rng([0, 0, k]))
            good[kind_of(record)] += 1
        except BadRecord as error:
            bad.append((error.where, error.id, error.reason))
    return good, bad


def check(path: Path, images: Path) -> int:
    """Print every bad record and how many are good, by kind; returns how many are bad."""
    file, good, bad = JSONFile(path), Counter(), 0
    if not len(file):
        raise ValueError(f"{path} has no records; expected one or more")
    tasks = [(file, images, range(first, min(first + 1000, len(file)))) for first in range(0, len(file), 1000)]
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends the others
    with multiprocessing.Pool(None, signal.signal, ignore) as pool:
        for some, wrong in with_bar(pool.imap(check_range, tasks), "records", len(tasks), unit="k"):
            good += some
            bad += len(wrong)
            for where, name, reason in wrong:
                print(f"{where}, {name}: {reason}")
    for kind in sorted(good):
        print(f"{kind:15} {good[kind]:>9,} good")
    print(f"{'all':15} {good.total():>9,} good, {bad:,} bad")
    return bad


def main(argv: list[str]) -> None:
    parser = Parser(prog="data/records.py", description="Look at the records that train a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("check", "name every record that can't be read"), ("preview", "draw some, what is trained on green")):
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
