"""The command line: does it ask what was asked, and say what is wrong with what can't be?

    python -m tests.test_sample        # the table of bad inputs and what is answered, as Markdown
"""

import collections
import contextlib
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # a model's name that is none must not be looked up from here

import checkpoint
import clip
import hub
import llama
import sample
from chat import HUMAN, Turn, encode_chat
from clip import VisionConfig, open_image
from commandline import run
from llama import LlamaConfig
from overlay import draw, make_marker, phrase
from pointing import FLAGS
from tokenizer import Tokenizer
from vipllava import ViPLLaVA, ViPLLaVAConfig

SIZE = (400, 300)  # of photo.jpg


# -- files to ask about: a photograph, a random model, and whatever else a person may give ---------------------------


def make_model(folder: Path) -> None:
    texts = [f"{HUMAN} USER: ASSISTANT: What is {phrase(make_marker('arrow', [9, 9], SIZE))}? A dog. Human ### a b c"]
    tokenizer = Tokenizer.train(texts * 3, 400)
    V = tokenizer.vocab_size
    vision = VisionConfig(image_size=28, patch_size=7, width=24, layers=3, heads=2, mlp=40)
    text = LlamaConfig(V + 2, width=40, layers=2, heads=5, kv_heads=1, mlp=56, context=320)
    torch.manual_seed(0)
    checkpoint.save(ViPLLaVA(ViPLLaVAConfig(vision, text, (-2, 1), image_token_id=V)).eval(), tokenizer, folder)


def png_of(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT"
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def make_files(folder: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.jpg")
    (folder / "cut.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:5000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("This is no image.\n")
    (folder / "bomb.png").write_bytes(png_of(30_000, 30_000))
    Image.fromarray(np.ones((20, 30), np.float32)).save(folder / "float.tiff")
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    Image.fromarray(mask).save(folder / "black.png")
    mask[50:90, 60:200] = 1
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:, 1:]).save(folder / "narrow.png")
    make_model(folder / "model")
    for name in ("folder", "llm", "noweights", "cutweights", "otherweights", "cuttokenizer", "notjson"):
        (folder / name).mkdir()
    for name in ("noweights", "cutweights", "otherweights", "cuttokenizer"):
        shutil.copytree(folder / "model", folder / name, dirs_exist_ok=True)
    (folder / "noweights/model.safetensors").unlink()
    weights = (folder / "model/model.safetensors").read_bytes()
    (folder / "cutweights/model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = (folder / "model/config.json").read_text()
    other = config.replace('"intermediate_size": 56', '"intermediate_size": 58')
    (folder / "otherweights/config.json").write_text(other)
    (folder / "cuttokenizer/tokenizer.json").write_text('{"model": ')
    (folder / "llm/config.json").write_text('{"model_type": "llama"}')
    (folder / "notjson/config.json").write_text("model_type: vipllava\n")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.chdir(files)
    return files


def ask(*argv, model="model"):
    """main() with a small answer: (status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(sample.main, [*argv, "--model", model] if model else list(argv))
    return status, out.getvalue(), err.getvalue()


def listing(folder: Path) -> set:
    return {(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


# -- the table of bad inputs -----------------------------------------------------------------------------------------

LONG = "word " * 400
BAD = [  # what follows `python sample.py --image photo.jpg` (400 x 300 pixels), and a part of what is answered
    # numbers: how many, and which
    ("--rectangle 20,30,200", "expected x0,y0,x1,y1, got 3 numbers"),
    ("--rectangle 20,30,200,180,5", "got 5 numbers"),
    ("--ellipse 20,30", "(the box around it), got 2 numbers"),
    ("--arrow 210", "expected x,y (tip) or x0,y0,x1,y1 (tail, tip), got 1 number"),
    ("--arrow 1,2,3", "got 3 numbers"),
    ("--arrow 1,2,3,4,5,6", "got 6 numbers"),
    ("--point 5", "expected x,y, got 1 number"),
    ("--point 5,6,7", "expected x,y, got 3 numbers"),
    ("--triangle 30,40", "or x0,y0,x1,y1,x2,y2, got 2 numbers"),
    ("--triangle 10,10,20,20,30", "got 5 numbers"),
    ("--scribble 30,40", "(2 or more points), got 2 numbers"),
    ("--scribble 30,40,50", "got 3 numbers"),
    ("--point ''", "expected x,y, got ''"),
    ("--point here", "expected x,y, got 'here'"),
    ("--rectangle 20,30,,180", "got '20,30,,180'"),
    ("--arrow '210;140'", "got '210;140'"),
    ("--arrow '210 140'", "got '210 140'"),
    ("--point nan,5", "got nan"),
    ("--point inf,5", "got inf"),
    ("--point 1e9,5", "within -100000..100000 pixels, got 1000000000.0"),
    ("--rectangle 20,30,200,nan", "got nan"),
    # where they lie
    ("--rectangle 200,30,20,180", "needs x0, y0, x1, y1 with x0 < x1 and y0 < y1"),
    ("--rectangle 20,30,20,180", "with x0 < x1 and y0 < y1"),
    ("--ellipse 20,180,200,30", "with x0 < x1 and y0 < y1"),
    ("--triangle 20,180,200,30", "with x0 < x1 and y0 < y1"),
    ("--triangle 10,10,20,20,30,30", "three points that are not on one line"),
    ("--arrow 50,50,50,50", "a tip apart from it"),
    ("--scribble 50,50,50,50", "two different points"),
    ("--point 500,50", "lies on the image, 400 x 300"),
    ("--point -50,-50", "lies on the image"),
    ("--arrow 900,900", "lies on the image"),
    ("--arrow 350,150,450,150", "the tip is 450,150; expected a place on the image, 400 x 300"),
    ("--arrow 210,-1", "the tip is 210,-1; expected a place on the image"),
    ("--point 400,50", "the centre is 400,50; expected a place on the image, 400 x 300"),
    ("--point -0.5,50", "the centre is -0.5,50; expected a place on the image"),
    ("--rectangle 401,10,450,60", "lies on the image"),
    ("--rectangle -50,-50,450,350", "lies on the image"),
    ("--scribble 0,900,100,950", "lies on the image"),
    ("--mask 500,0,600,0,600,100", "lies on the image"),
    ("--point 50,50 --point 50,900", "point '50,900': "),
    # options
    ("--arrow 210,140:colour=blue", "unknown option 'colour=blue'; expected color=… or width=… or alpha=… or head=…"),
    ("--arrow 210,140:blue", "unknown option 'blue'; expected color=…"),
    ("--arrow 210,140:radius=3", "unknown option 'radius=3'"),
    ("--point 210,140:width=3", "unknown option 'width=3'; expected color=… or radius=… or alpha=…"),
    ("--arrow 210,140:color=green", "color is 'green'; expected #rrggbb or one of red, lime, blue"),
    ("--arrow 210,140:color=#12345", "color is '#12345'; expected #rrggbb"),
    ("--arrow 210,140:color=", "color is ''; expected #rrggbb"),
    ("--arrow 210,140:color=red,color=blue", "color is given twice"),
    ("--arrow 210,140:color=red,,", "unknown option ''"),
    ("--rectangle 20,30,200,180:width=0", "width is '0'; expected a whole number of pixels, 1 or more"),
    ("--rectangle 20,30,200,180:width=-3", "width is '-3'"),
    ("--rectangle 20,30,200,180:width=2.5", "width is '2.5'"),
    ("--rectangle 20,30,200,180:width=thick", "width is 'thick'"),
    ("--rectangle 20,30,200,180:width=401", "width is 401; expected at most the image's longer side, 400"),
    ("--rectangle 20,30,200,180:alpha=2", "alpha is '2'; expected a number from 1/255"),
    ("--rectangle 20,30,200,180:alpha=0", "alpha is '0'"),
    ("--rectangle 20,30,200,180:alpha=nan", "alpha is 'nan'"),
    ("--point 210,140:radius=0", "radius is '0'; expected a number of pixels"),
    ("--arrow 210,140:head=round", "head is 'round'; expected filled or open"),
    # masks
    ("--mask missing.png", "no such file; expected x0,y0,x1,y1,x2,y2,… (a polygon) or a PNG"),
    ("--mask folder", "no such file; expected x0,y0,x1,y1,x2,y2,… (a polygon) or a PNG"),
    ("--mask text.jpg", "text.jpg is not an image; expected a JPEG, PNG"),
    ("--mask black.png", "a pixel that is set"),
    ("--mask narrow.png", "399"),
    ("--mask ''", "(a polygon) or a PNG file"),
    ("--mask 10,10,20,20", "(every pixel that is not 0), got 4 numbers"),
    ("--contour 10,10,20,20,30", "got 5 numbers"),
    ("--contour 10,10,20,20,30,y", "no such file; expected x0,y0"),
    ("--mask mask.png:width=3", "unknown option 'width=3'; expected color=… or alpha=…"),
    # the image
    ("--image missing.jpg --point 5,5", "no image file at missing.jpg"),
    ("--image folder --point 5,5", "no image file at folder"),
    ("--image text.jpg --point 5,5", "text.jpg is not an image; expected a JPEG, PNG"),
    ("--image empty.jpg --point 5,5", "empty.jpg is not an image"),
    ("--image cut.jpg --point 5,5", "is the file whole?"),
    ("--image bomb.png --point 5,5", "the limit; shrink it"),
    ("--image float.tiff --point 5,5", "expected 8 or 16 bits"),
    ("--image '' --point 5,5", "no image file at ."),
    ("--image photo.jpg --image photo.jpg 'What is this?'", "--image is given twice"),
    ("--image", "expected one argument"),
    # the question
    ("", "there is no question"),
    ("''", "the question has no words"),
    ("--point 5,5 ' '", "the question has no words"),
    ("--point 5,5 --arrow 50,60 'What is {3}?'", "the question mentions marker {3}; expected {1} or {2}"),
    ("--point 5,5 --point 50,60", '{2} would be "at the red point", too; expected other kinds or colors, as in :color=blue'),
    ("--point 5,5 'What is {0}?'", "mentions marker {0}; expected {1}"),
    ("--point 5,5 'What is { 1 }?'", "the question mentions marker { 1 }; expected {1}"),
    ("--point 5,5 'What is {}?'", "the question mentions marker {}; expected {1}"),
    ("--point 5,5 'What is {١}?'", "the question mentions marker {١}; expected {1}"),
    ("'What is {1}?'", "expected none, as there is no marker"),
    ("What is this?", "more than one question, 'What' and 'is'; expected one, in quotes"),
    ("'What?' --point 5,5 'Where?'", "more than one question, 'What?' and 'Where?'"),
    ("'What is \udc80?'", "the question has '\\udc80', half a character"),
    (f"'{LONG}'", "expected at most 320 in all"),
    ("'What is this?' --max-new-tokens 300", "with 300 for the answer; expected at most 320 in all"),
    # how to answer
    ("'What is this?' --max-new-tokens 0", "--max-new-tokens is 0; expected 1 or more"),
    ("'What is this?' --max-new-tokens many", "invalid int value: 'many'"),
    ("'What is this?' --temperature -1", "--temperature is -1.0; expected 0, or a number of 1e-6 or more"),
    ("'What is this?' --temperature 1e-7", "--temperature is 1e-07; expected 0, or a number of 1e-6 or more"),
    ("'What is this?' --temperature nan", "--temperature is nan"),
    ("'What is this?' --temperature inf", "--temperature is inf"),
    ("'What is this?' --temperature hot", "invalid float value: 'hot'"),
    ("'What is this?' --top-p 0", "--top-p is 0.0; expected more than 0, at most 1"),
    ("'What is this?' --top-p 2", "--top-p is 2.0"),
    ("'What is this?' --seed -1", "--seed is -1; expected 0 to 2^63 - 1"),
    ("'What is this?' --seed 1.5", "invalid int value: '1.5'"),
    ("'What is this?' --seed 1 --seed 2", "--seed is given twice"),
    ("'What is this?' --colour red", "unknown flag --colour; expected --image, --rectangle"),
    ("'What is this?' --rect 1,2,3,4", "unknown flag --rect;"),
    ("'What is this?' --device tpu", "there is no device 'tpu' here; expected cpu"),
    ("'What is this?' --device cuda:99", "there is no device 'cuda:99' here; expected cpu"),
    ("'What is this?' --device meta", "there is no device 'meta' here"),
    ("'What is this?' --dtype int3", "invalid choice: 'int3' (choose from"),
    # the model
    ("'What is this?' --model nosuch", "no model 'nosuch' here; expected a folder, a short name"),
    ("'What is this?' --model nobody/nothing", "nobody/nothing"),
    ("'What is this?' --model photo.jpg", "no model 'photo.jpg' here; expected a folder"),
    ("'What is this?' --model folder", "config.json is missing"),
    ("'What is this?' --model llm", "expected vipllava"),
    ("'What is this?' --model notjson", "not valid JSON"),
    ("'What is this?' --model noweights", "expected model.safetensors"),
    ("'What is this?' --model cutweights", "is the file whole?"),
    ("'What is this?' --model otherweights", "58"),
    ("'What is this?' --model cuttokenizer", "tokenizer.json"),
    # what to do with the answer
    ("'What is this?' --json --chat", "--chat came with --json; expected one of them"),
    ("'What is this?' --show a.png --chat", "--chat came with --show"),
    ("'What is this?' --show a.xyz", "can't save an image as 'a.xyz'; expected a name that ends in .png, .jpg"),
    ("'What is this?' --show a", "can't save an image as 'a'; expected a name that ends in"),
    ("'What is this?' --show none/a.png", "there is no folder none"),
    ("'What is this?' --show photo.jpg", "can't save photo.jpg, which is an image that was given; expected another name"),
    ("--mask mask.png --show mask.png", "can't save mask.png, which is an image that was given"),
    ("'What is this?' --show mask.png", "mask.png is there already, and doesn't say that it was drawn here"),
    ("'What is this?' --show cut.jpg", "cut.jpg is there already"),
    ("'What is this?' --show bomb.png", "bomb.png is there already"),
    (f"'{LONG}' --show a.png", "expected at most 320 in all"),
    (f"'{LONG}' --json", "expected at most 320 in all"),
]


def command_line(case: str) -> list[str]:
    argv = shlex.split(case)
    argv = argv if "--image" in argv else ["--image", "photo.jpg", *argv]
    return argv if "--model" in argv else [*argv, "--model", "model"]


@pytest.mark.parametrize("case, part", BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_bad_input_ends_in_one_line(case, part, here):
    """Guards against a traceback, a usage dump, a message that says only that something is wrong, a status that a
    script takes for success, a mistake that is overlooked, and a file or half an answer left behind."""
    before = listing(here)
    status, out, err = ask(*command_line(case), model=None)
    assert (status, out) == (2, ""), (status, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert part in err
    assert listing(here) == before


def test_the_table_is_long_and_has_no_case_twice():
    """Guards against cases lost, and against one that hides another."""
    assert len(BAD) >= 65 and len({case for case, _ in BAD}) == len(BAD)


def python(files, *argv, **options):
    argv = [sys.executable, str(Path(sample.__file__).resolve()), *argv]
    return subprocess.Popen(argv, cwd=files, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def test_the_program_itself_exits_with_2(files):
    """Guards against a status that main() returns and nobody passes on."""
    process = python(files, "--image", "photo.jpg", "--arrow", "900,900")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1) and err.startswith("error: arrow '900,900'"), err


def test_ctrl_c_ends_quietly(files):
    """Guards against a traceback at Ctrl-C, in the middle of a chat, and against status 0 or 1."""
    argv = ["--image", "photo.jpg", "--model", "model", "--max-new-tokens", "3", "--chat"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts with & does not hear it
    process = python(files, *argv, preexec_fn=heard)
    process.stdin.write("What is this?\n")
    process.stdin.flush()
    process.stdout.readline()  # the answer: soon it waits for the next question
    for _ in range(10):  # a signal that comes right before it begins to wait is seen after the waiting only
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "error" not in err, (process.returncode, err)


def test_ctrl_c_while_loading(here, monkeypatch):
    """Guards against a Ctrl-C that only the chat expects, and a marked image that is written though nothing came."""
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ask("--image", "photo.jpg", "--point", "5,5", "--show", "never.png") == (130, "", "")
    assert not Path("never.png").exists()


# -- markers ---------------------------------------------------------------------------------------------------------


ALL = {
    "rectangle": "20,30,200,180", "ellipse": "20,30,200,180", "arrow": "210,140", "point": "64,80",
    "triangle": "20,30,200,180", "scribble": "30,40,60,80,90,50", "mask": "mask.png", "contour": "mask.png",
}


@pytest.mark.parametrize("flag", ALL)
def test_every_kind_is_drawn(flag, here):
    """Guards against a flag that draws another kind, or ignores its options: what is saved is what overlay draws."""
    shown, image = Path("shown.png"), open_image("photo.jpg")
    value = f"{ALL[flag]}:color=blue,alpha=1"
    status, _, err = ask("--image", "photo.jpg", f"--{flag}", value, "--show", "shown.png", "--max-new-tokens", "2")
    assert status == 0, err
    saved = np.asarray(Image.open(shown))
    shown.unlink()
    geometry = clip.read_mask(ALL[flag]) if "mask" in ALL[flag] else [float(v) for v in ALL[flag].split(",")]
    geometry = [110, 30, 200, 180, 20, 180] if flag == "triangle" else geometry
    marker = make_marker(FLAGS[flag][0], geometry, SIZE, color="blue", alpha=1)
    assert (saved == np.asarray(draw(image, [marker]))).all() and (saved == (0, 0, 255)).all(axis=2).sum() > 50
    assert not list(here.glob("*.part*"))


@pytest.mark.parametrize("order", [("point", "rectangle"), ("rectangle", "point")])
def test_flags_are_drawn_in_their_order(order, here):
    """Guards against markers sorted by kind, as with a list for each flag: the later one must lie on top."""
    values = {"point": "50,50:color=blue,alpha=1,radius=9", "rectangle": "50,20,150,80:color=lime,alpha=1,width=4"}
    argv = [text for flag in order for text in (f"--{flag}", values[flag])]
    assert ask("--image", "photo.jpg", *argv, "--show", "order.png", "--max-new-tokens", "2")[0] == 0
    top = {"point": (0, 0, 255), "rectangle": (0, 255, 0)}[order[1]]
    assert Image.open("order.png").getpixel((51, 50)) == top
    Path("order.png").unlink()


def test_a_negative_coordinate_is_no_flag(here):
    """Guards against argparse, which takes "-5,10,…" for an unknown flag; boxes and tails may reach over the border."""
    for marker in (["--rectangle", "-5,10,60,70"], ["--arrow", "-5,10,60,70"], ["--point", "399.5,299.5"]):
        assert ask("--image", "photo.jpg", *marker, "--max-new-tokens", "1")[0] == 0


def test_a_marker_is_placed_on_the_image_that_a_person_sees(here):
    """Guards against coordinates that count before the EXIF rotation."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown upright
    Image.open("photo.jpg").save("turned.jpg", exif=exif)
    point = "290,390:color=blue,alpha=1"  # outside 400 x 300
    status, _, err = ask("--image", "turned.jpg", "--point", point, "--show", "upright.png", "--max-new-tokens", "1")
    assert status == 0, err
    image = Image.open("upright.png")
    assert image.size == (300, 400) and image.getpixel((290, 390)) == (0, 0, 255)
    Path("upright.png").unlink(), Path("turned.jpg").unlink()


@pytest.mark.parametrize("name, mode", [
    ("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.png", "RGBA"), ("a.png", "P"), ("a.png", "I;16"), ("a.png", "1"),
    ("a.png", "LA"), ("a.webp", "RGBA"), ("a.gif", "P"), ("a.tiff", "RGB"), ("a.bmp", "RGB"),
])
def test_images_of_all_sorts(name, mode, here):
    """Guards against a mode that reaches drawing or CLIP unconverted."""
    values = (np.arange(30 * 40) % 251).reshape(30, 40)
    gray = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    gray.convert(mode).save(name)
    status, _, err = ask("--image", name, "--point", "9,9", "--max-new-tokens", "1")
    assert status == 0, err
    Path(name).unlink()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".TIFF"])
def test_every_promised_format_is_written(suffix, here):
    """Guards against a name that is accepted and then can't be saved; a file of ours is replaced, but for BMP, which can't
    say that it is one."""
    path = Path(f"shown{suffix}")
    again = 2 if suffix == ".bmp" else 0
    for color, status in (("red", 0), ("blue", again)) if not again else (("blue", 0), ("red", again)):
        whole = f"0,0,400,0,400,300,0,300:alpha=1,color={color}"
        assert ask("--image", "photo.jpg", "--mask", whole, "--show", str(path), "--max-new-tokens", "1")[0] == status
    saved = np.asarray(Image.open(path)).astype(int)
    assert saved.shape == (SIZE[1], SIZE[0], 3) and abs(saved - (0, 0, 255)).max() < 4
    path.unlink()


def test_the_marked_image_is_written_whole_or_not_at_all(here, monkeypatch):
    """Guards against half a file where the disk is full."""
    def fail(self, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    before = listing(here)
    status, _, err = ask("--image", "photo.jpg", "--point", "9,9", "--show", "full.png", "--max-new-tokens", "1")
    assert status == 2 and "No space left" in err and listing(here) == before


# -- questions and answers -------------------------------------------------------------------------------------------


def test_json(here):
    """Guards against other output beside the object, ids that aren't those of the prompt, and rates that aren't what
    the seconds say."""
    status, out, err = ask("--image", "photo.jpg", "--arrow", "210,140", "--max-new-tokens", "7", "--json")
    data = json.loads(out)
    assert (status, out.count("\n"), err) == (0, 1, "(cut after 7 tokens)\n")
    assert list(data) == ["model", "prompt", "input_ids", "output_ids", "answer", "seconds", "tokens_per_second"]
    model, tokenizer = checkpoint.load("model")
    question = "What is pointed to by the red arrow?"
    assert data["input_ids"] == encode_chat(tokenizer, "llava_v1", [Turn(question, image=True)])[0]
    assert data["prompt"] == f"<s>{HUMAN} USER: <image>\n{question} ASSISTANT:"
    assert len(data["output_ids"]) == 7 and data["answer"] == tokenizer.decode(data["output_ids"])
    seconds, rate = data["seconds"], data["tokens_per_second"]
    assert list(seconds) == ["load", "prefill", "decode"] and min(seconds.values()) > 0
    length = len(data["input_ids"]) - 1 + model.config.vision.patches
    assert rate == pytest.approx({"prefill": length / seconds["prefill"], "decode": 6 / seconds["decode"]})


def test_what_is_printed_is_the_answer_and_depends_on_the_markers(here):
    """Guards against a streamed answer that differs from the whole, and against markers that the model never sees."""
    argv = ["--image", "photo.jpg", "What is this?", "--max-new-tokens", "9"]
    mask = "0,0,400,0,400,300,0,300"
    plain, marked = (json.loads(ask(*argv, *more, "--json")[1]) for more in ([], ["--mask", mask]))
    assert ask(*argv)[1] == plain["answer"] + "\n"
    model, tokenizer = checkpoint.load("model")
    image, turns = open_image("photo.jpg"), [Turn("What is this?", image=True)]
    markers = [make_marker("mask", [[0, 0, 400, 0, 400, 300, 0, 300]], SIZE)]
    for result, drawn in ((plain, []), (marked, markers)):
        ids = [i for i, _ in sample.ask(model, tokenizer, image, drawn, turns, max_new_tokens=9) if i is not None]
        assert ids == result["output_ids"]


def test_the_marked_pixels_reach_the_model(here):
    """Guards against an answer about the unmarked image: the first logits must differ."""
    model, tokenizer = checkpoint.load("model")
    seen = []
    model.vision.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image, turns = open_image("photo.jpg"), [Turn("What is this?", image=True)]
    for markers in ([], [make_marker("rectangle", [100, 100, 300, 200], SIZE, width=20)]):
        list(sample.ask(model, tokenizer, image, markers, turns, max_new_tokens=1))
    assert seen[0].shape == (1, 3, 28, 28) and (seen[0] != seen[1]).any()


def test_a_question_that_is_answered_is_refused(here):
    """Guards against a model that goes on after an answer's end, where a turn was meant to have no answer."""
    model, tokenizer = checkpoint.load("model")
    turns = [Turn("What is this?", "A dog.", image=True)]
    with pytest.raises(ValueError, match="the last turn has an answer, 'A dog.'; expected a question alone"):
        sample.ask(model, tokenizer, open_image("photo.jpg"), [], turns)


def test_a_seed_repeats_an_answer(here):
    """Guards against a seed or a temperature that is ignored: two of 30 random tokens are not equal by chance."""
    argv = ["--image", "photo.jpg", "What?", "--temperature", "1.5", "--max-new-tokens", "30"]
    one, same, other = (ask(*argv, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert one == same != other


def says(monkeypatch, ids: list[int], template: str):
    """In place of a model: one that answers with these ids."""
    monkeypatch.setattr(sample, "generate", lambda *_, **options: ([i] for i in ids))
    config = SimpleNamespace(template=template, vision=SimpleNamespace(image_size=28, patches=16),
                             text=SimpleNamespace(context=4000))
    return SimpleNamespace(config=config)


def test_an_empty_answer_has_no_rate(here, monkeypatch):
    """Guards against a division by zero, and a prefill that took no time, where the first token ends the answer."""
    tokenizer = Tokenizer.load("model")
    model = says(monkeypatch, [], "llava_v1")
    result = sample.answer(model, tokenizer, Image.new("RGB", SIZE), [], [Turn("What?", image=True)], echo=False)
    data = sample.report(model, tokenizer, "none", result, 0.0)
    assert (data["answer"], data["output_ids"], data["tokens_per_second"]["decode"]) == ("", [], None)
    assert data["seconds"]["prefill"] > 0 and data["seconds"]["decode"] == 0


def test_a_template_that_ends_with_a_text(monkeypatch):
    """Guards against "###" in an answer of llava_v0, and against calling an answer cut that had ended."""
    tokenizer = Tokenizer.train([f"{HUMAN} Human: Assistant: A dog. ###"] * 3, 400)
    ids = tokenizer.encode("A dog.###Human: more")
    model = says(monkeypatch, ids, "llava_v0")
    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        result = sample.answer(model, tokenizer, Image.new("RGB", SIZE), [], [Turn("What?", image=True)])
    assert result.text == "A dog." and out.getvalue() == "A dog.\n" and err.getvalue() == ""


def test_an_answer_may_be_as_long_as_the_context(here):
    """Guards against a default length that a small model can't hold."""
    model, tokenizer = checkpoint.load("model")
    prompt, limit = sample.fit(model, tokenizer, [Turn("What?", image=True)], None)
    assert len(prompt) - 1 + model.config.vision.patches + limit == model.config.text.context


def test_compile_gives_the_same_tokens(here, monkeypatch):
    """Guards against --compile that compiles nothing, or wraps what `generate` does not call. The compiler itself
    takes half a minute, so a stand-in counts."""
    calls = collections.Counter()
    count = lambda forward: lambda *args: calls.update([type(forward.__self__)]) or forward(*args)
    monkeypatch.setattr(torch, "compile", count)
    argv = ["--image", "photo.jpg", "What?", "--max-new-tokens", "9", "--json"]
    plain, compiled = (json.loads(ask(*argv, *more)[1]) for more in ([], ["--compile"]))
    assert plain["output_ids"] == compiled["output_ids"]
    config = checkpoint.load("model")[0].config
    blocks = max(i % (config.vision.layers + 1) for i in config.feature_layers)
    steps = 2 + 9  # warmed up first; what was computed there is not counted as fast
    expected = {clip.Block: 2 * blocks, llama.Block: steps * config.text.layers, llama.RMSNorm: steps, torch.nn.Linear: steps}
    assert calls == expected


# -- a conversation --------------------------------------------------------------------------------------------------


class Echo:
    """In place of a model: remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, image, markers, turns):
        self.asked.append((image, [phrase(m) for m in markers], turns))
        return SimpleNamespace(text=f"answer {len(self.asked)}")


def converse(monkeypatch, *lines):
    """(what the model was asked, what was said on stderr) of a chat."""
    echo, err = Echo(), io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    with contextlib.redirect_stderr(err):
        sample.Chat(echo, Path("photo.jpg"), open_image("photo.jpg"), [], []).run()
    return echo.asked, err.getvalue().splitlines()


def test_a_chat_has_turns_and_markers(here, monkeypatch):
    """Guards against turns that are forgotten, an image in every turn, and a later marker that is never seen."""
    asked, said = converse(monkeypatch, "/arrow\t40,60", "What is {1}?", "", "/rectangle 20,30,200,180:color=blue",
                           "And {2}?", "/undo", "So?")
    red, blue = "pointed to by the red arrow", "within the blue rectangle"
    assert [markers for _, markers, _ in asked] == [[red], [red, blue], [red]]
    first, second = Turn(f"What is {red}?", "answer 1", image=True), Turn(f"And {blue}?", "answer 2")
    assert asked[2][2] == [first, second, Turn("So?")]
    assert said == [f"{{1}} is {red}", f"{{2}} is {blue}", f"removed what was {blue}"]


def test_another_image_begins_another_conversation(here, monkeypatch):
    """Guards against markers and turns of the old image that stay; /new keeps the image and its markers."""
    Image.new("RGB", (50, 40)).save("other.png")
    asked, said = converse(monkeypatch, "/point 9,9", "What?", "/new", "Why?", "/image other.png", "Who?")
    Path("other.png").unlink()
    assert [turns for _, _, turns in asked] == [[Turn(q, image=True)] for q in ("What?", "Why?", "Who?")]
    assert [len(markers) for _, markers, _ in asked] == [1, 1, 0] and asked[2][0].size == (50, 40)
    assert said[-1] == "a new conversation about other.png, 50 x 40 pixels, with 0 markers"


CHAT_BAD = [
    ("/foo", "unknown command /foo; expected a question, a marker (/rectangle"), ("/", "unknown command /;"),
    ("/arrow", "expected x,y (tip)"), ("/arrow 900,900", "nothing of the arrow"), ("/point 5,5:width=3", "unknown option"),
    ("What is {2}?", "mentions marker {2}; expected {1}"), ("/image missing.jpg", "no image file at missing.jpg"),
    ("/image", "expected /image FILE"), ("/show", "expected /show FILE"), ("/undo 1", "/undo came with '1'; expected nothing"),
    ("/new house", "expected nothing after it"), ("/quit now", "expected nothing after it"), ("/show photo.jpg", "which is an image that was given"),
    ("/mask narrow.png", "399"),
    ("/show mask.png", "mask.png is there already, and doesn't say that it was drawn here; expected another name"),
]


@pytest.mark.parametrize("line, part", CHAT_BAD, ids=[line for line, _ in CHAT_BAD])
def test_a_mistake_changes_nothing_in_a_chat(line, part, here, monkeypatch):
    """Guards against a chat that ends with a mistake, or loses its image, markers or turns by it."""
    asked, said = converse(monkeypatch, "/point 9,9", "What?", line, "Why?")
    assert len(asked) == 2 and len(asked[1][1]) == 1 and asked[1][0].size == SIZE and len(asked[1][2]) == 2
    assert said[1].startswith("error: ") and part in said[1] and len(said) == 2


def test_two_markers_of_a_chat_with_the_same_words(here, monkeypatch):
    """Guards against a question about "the red point" once there is a second one, and a chat that ends with it."""
    lines = "/point 9,9", "What is {1}?", "/point 90,9", "What is {1}?", "/undo", "What is {1}?"
    asked, said = converse(monkeypatch, *lines)
    assert len(asked) == 2 and said[2].startswith("error: ") and 'but {2} would be "at the red point", too' in said[2]


def test_undo_without_a_marker_help_and_show(here, monkeypatch):
    """Guards against commands that nothing else calls."""
    lines = "/undo", "/help", "/point 9,9:color=blue,alpha=1", "/show chat.png", "/quit", "never"
    _, said = converse(monkeypatch, *lines)
    assert said[0].startswith("error: there is no marker") and said[-1] == "saved chat.png"
    assert all(any(f"/{flag}" in line for line in said) for flag in (*ALL, "undo", "show", "new", "image", "quit"))
    assert Image.open("chat.png").getpixel((9, 9)) == (0, 0, 255)
    Path("chat.png").unlink()


def test_a_chat_knows_the_home_folder_and_ends_with_its_reader(here, monkeypatch, tmp_path):
    """Guards against ~ as the name of a folder, as no shell stands before a chat's commands; and against a chat that goes
    on and on for `… --chat | head -1`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (50, 40)).save(tmp_path / "mine.png")
    Image.new("L", (50, 40), 255).save(tmp_path / "mask.png")
    _, said = converse(monkeypatch, "/image ~/mine.png", "/mask ~/mask.png", "/show ~/shown.png")
    assert "50 x 40" in said[0] and said[1].startswith("{1} is") and said[2].startswith("saved") and (tmp_path / "shown.png").is_file()
    monkeypatch.setattr(Echo, "__call__", lambda *args: (_ for _ in ()).throw(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        converse(monkeypatch, "What?", "Why?")


def test_a_mask_is_not_lost_to_show(here, monkeypatch):
    """Guards against a mask that the marked image is written over, given in the chat or before it."""
    Image.new("L", SIZE, 255).save("mine.png")
    before = Path("mine.png").read_bytes()
    _, said = converse(monkeypatch, "/mask mine.png", "/undo", "/show mine.png")
    assert "which is an image that was given" in said[-1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("/show mine.png\n"))
    _, _, err = ask("--image", "photo.jpg", "--mask", "mine.png", "--chat")
    assert "which is an image that was given" in err and Path("mine.png").read_bytes() == before
    Path("mine.png").unlink()


def test_an_earlier_image_is_not_lost_to_show(here, monkeypatch):
    """Guards against the first image of a chat that is written over once there is a second, and against /show that fails
    as an earlier image has gone."""
    Image.new("RGB", (50, 40)).save("other.png")
    before = Path("photo.jpg").read_bytes()
    _, said = converse(monkeypatch, "/image other.png", "/show photo.jpg", "/image photo.jpg", "/show other.png")
    assert all("which is an image that was given" in line for line in said[1::2]) and Path("photo.jpg").read_bytes() == before
    monkeypatch.setattr(Echo, "__call__", lambda *args: Path("other.png").unlink() or SimpleNamespace(text=""))
    _, said = converse(monkeypatch, "/image other.png", "What?", "/show photo.jpg", "/show new.png")
    assert "which is an image that was given" in said[1] and said[2] == "saved new.png"
    Path("new.png").unlink()


@pytest.mark.parametrize("seen", [True, False])
def test_the_prompt_is_for_a_person(here, monkeypatch, seen):
    """Guards against "> " among the answers, where these go to a file, and against none for a person who types."""

    class Terminal(io.StringIO):
        isatty = lambda self: True

    monkeypatch.setattr(sys, "stdin", Terminal("What?\n"))
    out, err = Terminal() if seen else io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sample.Chat(Echo(), Path("photo.jpg"), open_image("photo.jpg"), [], []).run()
    assert (out.getvalue(), err.getvalue()) == (("> > ", "") if seen else ("", "> > "))


def test_a_chat_that_outgrows_the_context(here, monkeypatch):
    """Guards against a chat that ends, or forgets silently, where the model's context ends."""
    lines = ["What is this thing over there?"] * 12 + ["/new", "What?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    status, out, err = ask("--image", "photo.jpg", "--chat", "--max-new-tokens", "20")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 0 and errors and all("/new starts over" in line for line in errors), err
    assert err.splitlines()[-2].startswith("a new conversation") and err.splitlines()[-1] == "(cut after 20 tokens)"


# -- the documentation -----------------------------------------------------------------------------------------------


def documented() -> list[str]:
    text = sample.__doc__.replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("python sample.py")]


@pytest.mark.parametrize("command", documented())
def test_the_commands_of_the_docstring_run(command, here, monkeypatch):
    """Guards against examples that have rotted."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("/arrow 40,60\nWhat is {2}?\n"))
    status, out, err = ask(*shlex.split(command)[2:], "--max-new-tokens", "3")
    assert status == 0 and out, err
    Path("marked.png").unlink(missing_ok=True)


def test_help(capsys):
    """Guards against a % in a help text, which argparse stumbles over only when someone asks for help."""
    with pytest.raises(SystemExit) as end:
        sample.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(f"--{flag} " in text for flag in (*ALL, "image", "show", "compile"))


def table() -> str:
    """BAD as Markdown."""
    rows, start = ["| `python sample.py` … | answer, exit status 2 |", "|---|---|"], Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(make_files(Path(folder)))
        for case, _ in BAD:
            shown = case if "--image" in case else f"--image photo.jpg {case}".strip()
            answer = ask(*command_line(case), model=None)[2].strip()
            shown = re.sub(r"(word ){9,}", "word word … ", shown).encode("utf-8", "backslashreplace").decode()
            rows.append(f"| `{shown}` | `{answer.replace(str(hub.WEIGHTS.parent) + os.sep, '')}` |")
        os.chdir(start)
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
