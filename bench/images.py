"""Pictures: from a JPEG file to a tensor, and a marker drawn, beside the path that the authors' code takes.

    python -m bench.images                                 beside transformers' image processor, if it is installed
    python -m bench.images --official ../ViP-LLaVA         and the authors' drawing, of a clone (needs shapely and scipy)

The official path pads to a square and leaves resizing, cropping and normalising to CLIPImageProcessor; it draws a
marker onto an empty image of the whole size, and blends that with all of the other. Ours blends the marker's own box.
The same pixels are asserted: of the tensors, and of a rectangle. Medians of --repeat; one thread.
"""

import importlib.metadata
import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip import MEAN, PAD_COLOR, STD, preprocess, upright
from commandline import Parser, at_least, run
from overlay import KINDS, Region, draw, make_marker, sample_marker

SIDE = 336
BOX = (200, 140, 420, 330)
POLYGON = (200, 140, 420, 150, 400, 330, 300, 250, 210, 320)
COLOR, WIDTH, ALPHA = (255, 0, 0), 4, 160 / 255


def jpeg(size: tuple[int, int]) -> bytes:
    """A picture of smooth random colors, compressed."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def our_tensor(data: bytes) -> torch.Tensor:
    return preprocess(upright(Image.open(io.BytesIO(data))), SIDE)


def official_tensor() -> Callable[[bytes], torch.Tensor]:
    from transformers import CLIPImageProcessor

    size = {"shortest_edge": SIDE}
    crop = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(size=size, crop_size=crop, image_mean=list(MEAN), image_std=list(STD))

    def tensor(data: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), PAD_COLOR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return processor.preprocess(square, return_tensors="pt")["pixel_values"][0]

    return tensor


def official_drawing(folder: Path) -> Callable:
    """image_blending of the authors' llava/visual_prompt_generator.py."""
    path = folder / "llava" / "visual_prompt_generator.py"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; expected a clone of the authors' repository")
    spec = importlib.util.spec_from_file_location("official", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"{path} can't be used: {error}; expected shapely and scipy") from None
    return module.image_blending


def median_ms(work: Callable[[], object], others: list[Callable[[], object]], repeat: int) -> list[float]:
    """Of each of them, in turns."""
    times = [[] for _ in (work, *others)]
    for _ in range(repeat):
        for one, spent in zip((work, *others), times):
            began = time.perf_counter()
            one()
            spent.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(spent) for spent in times]


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.images", description=__doc__.split("\n")[0])
    parser.add_argument("--official", type=Path, help="a clone of the authors' repository")
    parser.add_argument("--repeat", type=partial(at_least, 1), default=200, help="times that each is measured (200)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    size, peers, rows = (640, 480), ["transformers"] if importlib.util.find_spec("transformers") else [], {}
    data = jpeg(size)
    theirs = official_tensor() if peers else None
    if theirs and not torch.allclose(our_tensor(data), theirs(data), atol=1e-5):
        raise ValueError("the tensors differ; expected the same")
    rows["JPEG to tensor"] = median_ms(lambda: our_tensor(data), [lambda: theirs(data)] if theirs else [], args.repeat)

    image = upright(Image.open(io.BytesIO(data)))
    blend = official_drawing(args.official) if args.official else None
    if blend:
        marker = make_marker("rectangle", BOX, size, COLOR, WIDTH, ALPHA)
        other = blend(image, "rectangle", list(BOX), rgb_value=COLOR, alpha=round(255 * ALPHA), width=WIDTH * SIDE / max(size))
        if np.abs(np.asarray(draw(image, [marker])).astype(int) - np.asarray(other)).max() > 1:
            raise ValueError("the rectangles differ; expected the same, but for rounding")
    region = Region(box=BOX, polygons=(POLYGON,))
    for kind in KINDS:
        generator = np.random.default_rng(0)
        ours = lambda: draw(image, [sample_marker(region, size, generator, kind, COLOR)])
        official = lambda: blend(image, kind, [*BOX], [[*POLYGON]], rgb_value=COLOR)
        rows[f"draw: {kind}"] = median_ms(ours, [official] if blend else [], args.repeat)
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("pillow", "numpy", *peers))
    print(f"{size[0]} x {size[1]}, to {SIDE}; {packages}")
    for name, (mine, *others) in rows.items():
        print(f"{name:22}{mine:8.2f} ms" + "".join(f"   official {other:8.2f} ms   ratio {other / mine:.2f}" for other in others))
    print(json.dumps(rows))


if __name__ == "__main__":
    sys.exit(run(main))
