"""A sheet of records as a model sees them: the marked image, its turns, and on a green ground what is trained.

    python data/records.py preview mine.json --images photos -n 12

What its font lacks (Chinese and emoji, for two) is drawn as empty boxes, here only.
"""

import itertools
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from chat import IMAGE
from commandline import check_ours, save_image
from data.batches import encode_prompt
from data.records import Records
from overlay import draw
from tokenizer import Stream, Tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int], trained: list[bool]) -> list[tuple[str, bool]]:
    """A conversation as runs of text: what is trained, and what is not."""
    names, stream, runs = {IMAGE: "<image>", **{i: n for n, i in tokenizer.specials.items()}}, Stream(tokenizer), []
    for i, learned in zip(ids, trained):
        text = stream.flush() + names[i] if i in names else stream.push(i)
        if runs and runs[-1][1] == learned:
            text = runs.pop()[0] + text
        runs.append((text, learned))
    return runs


def check_sheet(out: Path) -> None:
    """ValueError: not a name for a sheet, or a file lies there that is not ours."""
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise ValueError(f"can't write a sheet as {out}; expected a name that ends in .png, in a folder that exists")
    check_ours(out)


def preview(path: Path, images: Path, n: int, out: Path, tokenizer: Tokenizer, template: str, side: int = 320) -> None:
    """A sheet of n samples from all over a file, or of all: the marked image, and under it the turns, what is trained on
    green."""
    check_sheet(out)
    records = Records([path], images)
    if n < 1 or not len(records):
        raise ValueError(f"n is {n}, and {path} has {len(records)} records; expected 1 or more")
    n = min(n, len(records))
    tiles = []
    for k in range(n):
        sample = records[k * len(records) // n]
        runs = pieces(tokenizer, *encode_prompt(sample, tokenizer, template))
        marked = Image.new("RGB", (side, 0))
        if sample.image is not None:
            marked = ImageOps.contain(draw(sample.image, sample.markers), (side, side))
        bottom = write_runs(Image.new("RGB", (side, 1)), marked.height + 4, runs)  # only to see where it ends
        tile = Image.new("RGB", (side, bottom + 8), "white")
        tile.paste(marked, (0, 0))
        write_runs(tile, marked.height + 4, runs)
        tiles.append(tile)
    columns = min(4, n)
    rows = [tiles[i : i + columns] for i in range(0, n, columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    page = Image.new("RGB", (columns * (side + 8) - 8, sum(heights)), "white")
    for y, row in zip([0, *itertools.accumulate(heights)], rows):
        for column, tile in enumerate(row):
            page.paste(tile, (column * (side + 8), y))
    save_image(page, out)


def write_runs(tile: Image.Image, y: int, runs: list[tuple[str, bool]]) -> int:
    """Text in lines, from height y on; returns where it ends. Trained runs have a green ground."""
    pen, x, line = ImageDraw.Draw(tile), 2, 14
    for text, learned in runs:
        for word in re.findall(r"\n|[^\s]+|[^\S\n]+", text):
            width = pen.textlength(word) if word != "\n" else 0
            if word == "\n" or x + width > tile.width - 2:
                x, y = 2, y + line
            if word != "\n":
                pen.rectangle((x, y, x + width, y + line - 2), fill="#b5e8b5") if learned else None
                pen.text((x, y), word, fill="black")
                x += width
    return y + line
