"""What all commands here do alike: a person's mistake ends in one line, `error: …`, and exit status 2.

    def main(argv):
        args = Parser(…).parse_args(argv)
        …

    if __name__ == "__main__":
        sys.exit(run(main))

A picture that is written where a person says tells that it was drawn here, and replaces only one that does: see
check_ours.
"""

import argparse
import contextlib
import math
import os
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import ExifTags, Image


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong with the flags is a ValueError like any other mistake, without the usage."""

    def error(self, message: str):
        raise ValueError(message)


def check_device(name: str | None) -> torch.device:
    """The device of that name; None is CUDA where there is one, else the CPU. ValueError: it is not here."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = ("cuda" if here["cuda"] else "cpu") if name is None else name
    try:
        found = torch.empty(0, device=device).device
        if found.type not in here or found.type == "cpu" and ":" in str(device):
            raise RuntimeError
    except (RuntimeError, AssertionError, TypeError) as error:  # an AssertionError where PyTorch was built without CUDA
        choices = " or ".join(name for name, there in here.items() if there)
        can_not = here.get(str(device).partition(":")[0]) and str(error)  # it is there, but can't be used
        why = f" ({str(error).splitlines()[0]})" if can_not else ""
        raise ValueError(f"there is no device {device!r} here{why}; expected {choices}") from None
    return torch.device(device)


def at_least(low: int, text: str) -> int:
    """A flag's whole number, of `low` or more: partial(at_least, 1) is a type for argparse."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} came; expected a whole number") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"{value} came; expected {low} or more")
    return value


def amount(text: str) -> float:
    """A flag's number, of 0 or more: a type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} came; expected a number of 0 or more")
    return value


def with_bar(items: Iterable, what: str, total: int, unit: str = "it") -> Iterable:
    """The same items, with a progress bar on stderr where a person watches."""
    if not total or not sys.stderr.isatty():
        return items
    from huggingface_hub.utils import tqdm  # half a second that nobody else needs to wait

    return tqdm(items, what, total, leave=False, unit=unit)


def out_of_memory(error: Exception) -> bool:
    """CUDA's memory has an exception of its own; for a CPU's (Linux, Windows) and Apple's PyTorch has but words."""
    words = "can't allocate memory", "not enough memory", "MPS backend out of memory", "Invalid buffer size"
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)


OURS = "drawn by ViP-LLaVA"  # the description of an image that a command here has written


def check_ours(path: Path) -> None:
    """ValueError: a file lies there that is not ours to replace: a photo, perhaps, that only exists once."""
    if path.exists():
        if not path.is_file():  # to open a pipe would wait for ever
            raise ValueError(f"can't save {path}, which is no plain file; expected another name")
        try:
            with Image.open(path) as image:
                ours = image.getexif().get(ExifTags.Base.ImageDescription) == OURS
        except (OSError, SyntaxError, TypeError, struct.error, ValueError, Image.DecompressionBombError):
            ours = False
        if not ours:
            raise ValueError(f"{path} is there already, and doesn't say that it was drawn here; expected another name")


def save_image(image: Image.Image, path: Path) -> None:
    """Written beside and renamed; with a description, by which `check_ours` knows it again (a BMP file has none)."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = OURS
    beside = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        image.save(beside, quality=95, exif=exif)  # quality: of JPEG and WebP
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def complain(error: Exception) -> None:
    """One line, whatever bytes a file's name has."""
    line = f"error: {' '.join(str(error).split())}"
    with contextlib.suppress(OSError):  # nobody reads it, and the exit status tells all the same
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """main(argv), by default of what was typed, and the exit status: 0, 2 after a mistake, 130 after Ctrl-C, 141 where
    nobody reads on, as in `… | head -1`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, mode))
    if argv is None:
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no characters, as Python takes them in argv
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 141
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        complain(error)
        return 2
    return 0
