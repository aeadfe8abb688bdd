"""Drawn scenes as files: records in the official formats, a task to fine-tune on, pictures to look at.

    python -m data.write records OUT -n 100 --split test   official records: RefCOCOg regions and LLaVA captions
    python -m data.write houses OUT -n 200                 a task to fine-tune on, in our own format
    python -m data.write sheet sheet.png                   twelve samples with their questions, to look at
    python -m data.write example examples/scene.png        one fixed scene, and
    python -m data.write rich examples/rich.png            another, with textures, a letter and digits
    python -m data.write three examples/three.png          a third, of three things
    python -m data.write markers examples/markers.png      the eight markers on the first

Of pictures, only those that a command here has written are replaced.
"""
import contextlib
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw

from commandline import Parser, at_least, check_ours, run, save_image
from data.questions import marker_sample
from data.scenes import (BOLD, SHAPES, SPLITS, Background, Scene, caption, describe, generator_for, make_object, render,
                         sample_scene)
from overlay import KINDS, draw, phrase, sample_marker


def records(out: str | Path, n: int, seed: int = 0, side: int = 224, split: str = "test") -> None:
    """n scenes as official records: OUT/images/*.png, OUT/regions.json (RefCOCOg), OUT/captions.json (LLaVA)."""
    with staged(out, n, side) as folder:
        regions, captions = [], []
        for i in range(n):
            generator = generator_for(split, seed, i)
            scene = sample_scene(generator, (side, side))
            thing = scene.objects[generator.integers(len(scene.objects))]
            image = f"images/{i:06d}.png"
            render(scene).save(folder / image)
            regions.append({"id": f"refcocog-{i}", "image": image, "bboxes": [thing.box],
                            "segmentations": [[flat(thing)]], "answer": describe(thing)})
            captions.append({"id": f"scene-{i}", "image": image,
                             "conversations": [{"from": "human", "value": "<image>"},
                                               {"from": "gpt", "value": caption(scene)}]})
        for name, said in (("regions", regions), ("captions", captions)):
            (folder / f"{name}.json").write_text(json.dumps(said, indent=1) + "\n")


def houses(out: str | Path, n: int, seed: int = 0, side: int = 224) -> None:
    """A task that no weights of ours know, in our own format: OUT/train.json and OUT/test.json, n records each, about
    scenes that may have houses in them. In every other one it is a house that is asked about, if there is one."""
    with staged(out, n, side) as folder:
        for split in ("train", "test"):
            told = []
            for i in range(n):
                generator = generator_for(split, seed, i)
                others = generator.permutation(list(SHAPES))[:3].tolist()
                scene = sample_scene(generator, (side, side), n=int(generator.integers(3, 6)), shapes=("house", *others))
                wanted = [t for t in scene.objects if (t.shape == "house") == (i % 2 == 0)] or scene.objects
                thing = wanted[generator.integers(len(wanted))]
                image = f"images/{split}-{i:06d}.png"
                render(scene).save(folder / image)
                told.append({"id": f"house-{i}", "image": image,
                             "regions": [{"box": thing.box, "polygons": [flat(thing)]}],
                             "conversations": [{"from": "human", "value": "What is <region0>?"},
                                               {"from": "gpt", "value": describe(thing)}]})
            (folder / f"{split}.json").write_text(json.dumps(told, indent=1) + "\n")


def flat(thing):
    return [value for point in thing.polygon for value in point]


@contextlib.contextmanager
def staged(out, n, side):
    """A folder beside `out` to write into, renamed when complete; `out` must be new or empty."""
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; expected a new or an empty one")
    if n < 1 or side < 32:
        raise ValueError(f"n is {n} and size {side}; expected at least 1 image of at least 32 pixels")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        (staging / "images").mkdir()
        yield staging
        staging.chmod(0o755)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sheet(path: str | Path, seed: int = 0, side: int = 224, columns: int = 4) -> None:
    """Twelve marked samples with their questions and answers, as one image."""
    line = 12
    samples = [marker_sample(generator_for("val", seed, i), (side, side), kinds=(kind,))
               for i, kind in enumerate((KINDS * 2)[:12])]
    texts = ["\n".join(row for turn in sample.turns for row in wrap(f"{turn.question} {turn.answer}", side // 6))
             for sample in samples]
    tile = side + 8, side + line * (2 + max(text.count("\n") for text in texts))
    page = Image.new("RGB", (columns * tile[0], len(samples) // columns * tile[1]), "white")
    for i, (sample, text) in enumerate(zip(samples, texts)):
        x, y = i % columns * tile[0], i // columns * tile[1]
        page.paste(draw(sample.image, sample.markers), (x, y))
        ImageDraw.Draw(page).text((x + 2, y + side + 2), text, fill="black", spacing=2)
    save_image(page, Path(path))


def example_scene() -> Scene:
    """The fixed scene of the README: 448 x 448, five objects placed by hand."""
    objects = (make_object("star", "red", "large", (104, 112), 72, -0.15),
               make_object("ring", "blue", "large", (322, 92), 66),
               make_object("heart", "yellow", "large", (232, 232), 62, 0.1),
               make_object("moon", "white", "small", (96, 350), 54, -0.2),
               make_object("cross", "green", "large", (352, 346), 66, 0.2))
    return Scene((448, 448), objects, Background("gradient", ((112, 118, 132), (160, 150, 142)), (0.2, 0.3)))


GRAY = Background("flat", 2 * ((138, 136, 130),))


def rich_scene() -> Scene:
    """A fixed scene for all that may be asked: 448 x 448, textures, a letter, digits, and two of a shape."""
    objects = (make_object("star", "red", "large", (100, 96), 70, 0.1),
               make_object("circle", "yellow", "large", (330, 90), 66),
               make_object("ring", "green", "small", (215, 225), 54),
               make_object("square", "blue", "large", (92, 350), 66, -0.1),
               make_object("star", "purple", "small", (236, 372), 52, -0.2),
               make_object("bar", "orange", "large", (362, 330), 68, 0.2))
    dress = ({"text": "T"}, {"text": "8"}, {"texture": "striped"}, {"text": "2"}, {}, {"texture": "dotted"})
    objects = tuple(replace(thing, **more) for thing, more in zip(objects, dress))
    return Scene((448, 448), objects, GRAY)


def three_things() -> Scene:
    """A fixed scene of few things, two of a shape: 448 x 448."""
    star = replace(make_object("star", "green", "large", (350, 130), 66, -0.2), texture="striped")
    objects = make_object("star", "red", "large", (100, 110), 70, 0.1), make_object("ring", "blue", "small", (235, 300), 54), star
    return Scene((448, 448), objects, GRAY)


def eight_markers(path: str | Path, side: int = 224) -> None:
    """The fixed scene eight times, each time with another marker on its heart, and the words that point at it."""
    scene, generator = example_scene(), generator_for("val", 0, 3)
    heart = next(thing for thing in scene.objects if thing.shape == "heart")
    page = Image.new("RGB", (4 * (side + 8) - 8, 2 * (side + 24)), "white")
    colors = ("red", "blue", "purple", "fuchsia", "blue", "red", "blue", "lime")
    for i, (kind, color) in enumerate(zip(KINDS, colors)):
        marker = sample_marker(heart.region, scene.size, generator, kind, color, BOLD)
        x, y = i % 4 * (side + 8), i // 4 * (side + 24)
        page.paste(draw(render(scene), [marker]).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        ImageDraw.Draw(page).text((x + 2, y + side + 4), phrase(marker), fill="black")
    save_image(page, Path(path))


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m data.write", description="Drawn scenes as files.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("records", help="scenes as official records")
    command.add_argument("out", help="a new or empty folder")
    command.add_argument("-n", type=int, default=100, help="images (100)")
    command.add_argument("--seed", type=partial(at_least, 0), default=0, help="0 or more (0)")
    command.add_argument("--size", type=int, default=224, help="side of an image in pixels (224)")
    command.add_argument("--split", choices=SPLITS, default="test", help="which scenes (test)")
    command = commands.add_parser("houses", help="records of a task that no weights of ours know")
    command.add_argument("out", help="a new or empty folder")
    command.add_argument("-n", type=int, default=200, help="records to train on, and as many to test (200)")
    pictures = {"sheet": ("twelve samples to look at", sheet),
                "example": ("one fixed scene", lambda path: save_image(render(example_scene()), path)),
                "rich": ("another", lambda path: save_image(render(rich_scene()), path)),
                "three": ("a third, of three things", lambda path: save_image(render(three_things()), path)),
                "markers": ("the eight markers on it", eight_markers)}
    for name, (text, _) in pictures.items():
        commands.add_parser(name, help=text).add_argument("out", type=Path, help="the image to write, such as out.png")
    args = parser.parse_args(argv)
    if args.command == "records":
        records(args.out, args.n, args.seed, args.size, args.split)
    elif args.command == "houses":
        houses(args.out, args.n)
    else:
        if args.out.suffix.lower() not in (".png", ".jpg") or not args.out.parent.is_dir():
            raise ValueError(f"can't write {args.out}; expected a name that ends in .png or .jpg, in a folder that exists")
        check_ours(args.out)
        pictures[args.command][1](args.out)


if __name__ == "__main__":
    sys.exit(run(main))
