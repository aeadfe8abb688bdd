"""Ask about what you point at: an image, markers and a question in, an answer out.

    python sample.py --image photo.jpg --arrow 210,140 "What is this?"
    python sample.py --image photo.jpg --rectangle 20,30,200,180:color=blue,width=4,alpha=0.7 \\
                     --scribble 30,40,60,80,90,50 "How are the objects {1} and {2} related?"
    python sample.py --image photo.jpg --point 64,80:radius=6 --show marked.png --json
    python sample.py --image photo.jpg --ellipse 20,30,200,180 --chat

The method is `ask`, the first function below. pointing.py reads the markers that a person typed.

  * Coordinates are pixels of the image as a person sees it (upright), x to the right, y down; widths and radii too.
  * Markers are drawn in the order of their flags. {1}, {2}, … in the question become the words that point at them.
  * A mistake ends in one line, `error: …`, and exit status 2; Ctrl-C in status 130.
"""

import argparse
import functools
import inspect
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

import checkpoint
import hub
from chat import IMAGE, TEMPLATES, Turn, encode_chat, stop_ids
from clip import open_image, preprocess
from commandline import Parser, check_device, check_ours, complain, out_of_memory, run, save_image
from generate import Memory, compile_steps, generate, room
from overlay import Marker, draw, phrase
from pointing import FLAGS, files_of, fill_in, place, short
from tokenizer import Stream, Tokenizer
from vipllava import expand


def ask(model, tokenizer, image, markers, turns, **sampling) -> Iterator[tuple[int | None, str]]:
    """Answer the last of `turns` about the marked image: pairs of a new id and the text that it makes certain, and at
    last None and the text that was still held back. sampling: max_new_tokens and so on, see generate.py."""
    if turns and turns[-1].answer is not None:
        raise ValueError(f"the last turn has an answer, {short(turns[-1].answer)}; expected a question alone")
    config = model.config
    marked = draw(image, markers)  # the method: what is meant is drawn
    pixels = preprocess(marked, config.vision.image_size)[None]  # (1, 3, S, S)
    ids, _ = encode_chat(tokenizer, config.template, turns)  # one IMAGE where the image goes
    tokens = generate(model, [ids], pixels, stop_ids=stop_ids(tokenizer, config.template), **sampling)
    return _speak(tokens, Stream(tokenizer, TEMPLATES[config.template].stop))


def _speak(tokens: Iterator[list[int]], stream: Stream) -> Iterator[tuple[int | None, str]]:
    for (token,) in tokens:
        yield token, stream.push(token)
        if stream.stopped:
            break
    yield None, stream.flush()


# -- one answer ------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    prompt: list[int]  # token ids, one IMAGE for the image
    ids: list[int]
    text: str
    times: list[float]  # seconds: when the pixels were ready, then when each token came (or that there is none)


def fit(model, tokenizer, turns, wanted: int | None) -> tuple[list[int], int]:
    """The prompt's ids and how many tokens may follow; `wanted` None is 512, or what the context leaves."""
    config = model.config
    prompt, _ = encode_chat(tokenizer, config.template, turns)
    patches, context = config.vision.patches, config.text.context
    length = len(expand(prompt, patches))
    limit = wanted or room(config, length)
    if length + limit > context:
        raise ValueError(f"the prompt has {length} tokens, {patches} of them the image, with {limit} for the answer; "
                         f"expected at most {context} in all (in a chat, /new starts over)")
    return prompt, limit


def answer(model, tokenizer, image, markers, turns, max_new_tokens=None, echo=True, **sampling) -> Answer:
    """All that `ask` gives, printed as it comes if `echo`."""
    prompt, limit = fit(model, tokenizer, turns, max_new_tokens)
    pairs = ask(model, tokenizer, image, markers, turns, max_new_tokens=limit, **sampling)
    result = Answer(prompt, [], "", [time.perf_counter()])
    for token, text in pairs:
        result.text += text
        if token is not None or not result.ids:
            result.times.append(time.perf_counter())
        if token is not None:
            result.ids.append(token)
        if echo:
            print(text, end="" if token is not None else "\n", flush=True)
    stop = TEMPLATES[model.config.template].stop
    if len(result.ids) == limit and not (stop and stop in tokenizer.decode(result.ids)):
        print(f"(cut after {limit} tokens)", file=sys.stderr)
    return result


def report(model, tokenizer, name: str, result: Answer, load: float) -> dict:
    """The object that --json prints: prefill is from the pixels to the first token, decode from there to the last."""
    start, first, *_ = result.times
    seconds = {"load": load, "prefill": first - start, "decode": result.times[-1] - first}
    tokens = {"prefill": len(expand(result.prompt, model.config.vision.patches)), "decode": len(result.ids) - 1}
    rates = {phase: count / seconds[phase] if seconds[phase] else None for phase, count in tokens.items()}
    ids = {"input_ids": result.prompt, "output_ids": result.ids}
    return {"model": name, "prompt": readable(tokenizer, result.prompt), **ids, "answer": result.text,
            "seconds": seconds, "tokens_per_second": rates}


def readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """A prompt's ids as text, special tokens and the image by their names."""
    names = {IMAGE: "<image>", **{i: name for name, i in tokenizer.specials.items()}}
    runs = [(name, list(run)) for name, run in itertools.groupby(ids, names.get)]
    return "".join(name * len(run) if name else tokenizer.decode(run) for name, run in runs)


def check_show(path: Path, *sources: Path | str) -> Path:
    """`path`, if the marked image that is made of `sources` can be written there."""
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"can't save an image as {str(path)!r}; expected a name that ends in {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"can't save {path}, as there is no folder {path.parent}; expected one that exists")
    if path.is_dir() or path.exists() and any(map(path.samefile, filter(os.path.exists, sources))):
        what = "a folder" if path.is_dir() else "an image that was given"
        raise ValueError(f"can't save {path}, which is {what}; expected another name")
    check_ours(path)
    return path


# -- a conversation --------------------------------------------------------------------------------------------------


class Chat:
    """Several turns about one image, which is drawn anew, with all markers so far, for every question. What has not
    changed is not computed again.

    /{kinds}
                 add a marker, as in /arrow 40,60:color=blue
    /undo        remove the last marker
    /show FILE   save the marked image
    /new         forget what was said
    /image FILE  a new conversation, about another image
    /help        this list
    /quit        end; anything else is a question
    """

    def __init__(self, answer, path: Path, image: Image.Image, markers: list[Marker], masks: list[str]):
        self.answer, self.path, self.image, self.markers, self.turns = answer, path, image, markers, []
        self.given = [path, *masks]  # all files that were opened

    def run(self) -> None:
        """Lines from stdin until it ends or /quit; a mistake is said, and changes nothing."""
        while True:
            prompt = "> " if sys.stdin.isatty() else ""
            if not sys.stdout.isatty():  # it has answers only
                print(prompt, end="", file=sys.stderr, flush=True)
                prompt = ""
            try:
                line = input(prompt).strip()
            except EOFError:
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    name, value = [*line[1:].split(None, 1), "", ""][:2]
                    print(self.command(name, value), file=sys.stderr)
                elif line:
                    self.ask(line)
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except (ValueError, OSError) as error:
                complain(error)

    def ask(self, question: str) -> None:
        turn = Turn(fill_in(question, self.markers), image=not self.turns)  # the image stands in the first turn
        result = self.answer(self.image, self.markers, [*self.turns, turn])
        self.turns.append(replace(turn, answer=result.text))

    def command(self, name: str, value: str) -> str:
        """Do it, and say what was done."""
        if name in ("undo", "new", "help", "quit") and value:
            raise ValueError(f"/{name} came with {short(value)}; expected nothing after it")
        if name in ("show", "image") and not value:
            raise ValueError(f"/{name} came alone; expected /{name} FILE")
        if name in FLAGS:
            self.markers = [*self.markers, place(name, value, self.image)]
            self.given = [*self.given, *files_of(name, value)]
            return f"{{{len(self.markers)}}} is {phrase(self.markers[-1])}"
        if name == "undo":
            if not self.markers:
                raise ValueError("there is no marker; expected one before /undo")
            *self.markers, last = self.markers
            return f"removed what was {phrase(last)}"
        if name == "show":
            save_image(draw(self.image, self.markers), check_show(Path(value).expanduser(), *self.given))
            return f"saved {value}"
        if name == "image":
            path = Path(value).expanduser()
            self.path, self.image, self.markers = path, open_image(path), []
            self.given = [*self.given, path]
        if name in ("image", "new"):
            self.turns = []
            size = f"{self.image.width} x {self.image.height} pixels"
            return f"a new conversation about {self.path}, {size}, with {len(self.markers)} markers"
        if name == "help":
            return inspect.cleandoc(self.__doc__).split("\n\n")[1].format(kinds=" /".join(FLAGS))
        raise ValueError(f"unknown command /{name}; expected a question, a marker (/{', /'.join(FLAGS)}), /undo, "
                         "/show, /new, /image, /help or /quit")


# -- command line ----------------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Once(argparse.Action):
    """A flag that may be given once: of two values, none is dropped unsaid."""

    def __call__(self, parser, namespace, value, flag):
        given = vars(namespace).setdefault("given", set())
        if flag in given:
            parser.error(f"{flag} is given twice; expected it once")
        given.add(flag)
        setattr(namespace, self.dest, value)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Ask a ViP-LLaVA about an image and what is marked on it.", allow_abbrev=False)
    parser.add_argument("question", nargs="*", help='in quotes; without it, "What is …?" about the first marker')
    one = functools.partial(parser.add_argument, action=Once)
    switch = functools.partial(parser.add_argument, action="store_true")
    one("--image", type=Path, metavar="FILE", help="JPEG, PNG, WebP, GIF, … (required)")
    note = "in pixels of the upright image; options follow a colon, as in 40,60:color=blue,width=4"
    group = parser.add_argument_group("markers", note)
    for flag, (_, form, _, options) in FLAGS.items():
        group.add_argument(f"--{flag}", dest="markers", action="append", type=lambda text, flag=flag: (flag, text),
                           default=[], metavar="…", help=f"{form}; {', '.join(options)}")
    one("--model", default="tiny", help=f"{', '.join(hub.NAMES)}, a hub name or a folder (default: tiny)")
    one("--show", type=Path, metavar="FILE", help="save the marked image here")
    switch("--chat", help="go on asking, a line a question; /help lists the commands")
    switch("--json", help="print one object: prompt, ids (-200 is the image), answer, seconds, tokens per second")
    one("--max-new-tokens", type=int, metavar="N", help="tokens of an answer (default: 512, or what the context has)")
    one("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default: 0)")
    one("--top-p", type=float, default=1.0, metavar="P", help="if T > 0, only the likeliest tokens that sum to P")
    one("--seed", type=int, default=0, metavar="N", help="if T > 0, the same seed gives the same answer (default: 0)")
    one("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    one("--dtype", choices=DTYPES, help="of the weights (default: the stored 16 bits on a GPU, float32 on a CPU with memory, else bfloat16)")
    one("--quantize", choices=("int8", "int4"), default="", help="fewer bits for the decoder's weights, see quant.py")
    switch("--compile", help="torch.compile the decoding: a slow start, which --json counts as loading, then faster")
    args, unknown = parser.parse_known_args(_attach_negatives(argv))
    if flags := [text for text in unknown if text.startswith("-")]:
        parser.error(f"unknown flag {flags[0]}; expected --image, --{', --'.join(FLAGS)} or what else --help lists")
    args.question += unknown
    return args


def _attach_negatives(argv: list[str]) -> list[str]:
    """--point -5,10 -> --point=-5,10, as argparse would take -5,10 for a flag."""
    joined = []
    for text in argv:
        if joined and joined[-1][2:] in FLAGS and re.match(r"-[\d.]", text):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def check(args: argparse.Namespace) -> None:
    """What can be told before a file is read. ValueError."""
    if args.image is None:
        raise ValueError("there is no image; expected --image and its file")
    if len(args.question) > 1:
        first, second = map(short, args.question[:2])
        raise ValueError(f"more than one question, {first} and {second}; expected one, in quotes")
    for flag, right, fine in (
        ("temperature", "0, or a number of 1e-6 or more", lambda value: value == 0 or 1e-6 <= value < math.inf),
        ("top-p", "more than 0, at most 1", lambda value: 0 < value <= 1),
        ("seed", "0 to 2^63 - 1", lambda value: 0 <= value < 2**63),
        ("max-new-tokens", "1 or more", lambda value: value is None or value >= 1),
    ):
        value = getattr(args, flag.replace("-", "_"))
        if not fine(value):
            raise ValueError(f"--{flag} is {value}; expected {right}")
    if args.chat and (args.json or args.show):
        other = "--json" if args.json else "--show (which a chat has as a command)"
        raise ValueError(f"--chat came with {other}; expected one of them")


def main(argv: list[str]) -> None:
    args = arguments(argv)
    check(args)
    device = check_device(args.device)
    image = open_image(args.image)
    markers = [place(flag, text, image) for flag, text in args.markers]
    question = args.question[0] if args.question else None
    turns = [] if args.chat and question is None else [Turn(fill_in(question, markers), image=True)]
    masks = [file for flag, text in args.markers for file in files_of(flag, text)]
    if args.show:
        check_show(args.show, args.image, *masks)

    began = time.perf_counter()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    model, tokenizer = checkpoint.load(args.model, device, DTYPES.get(args.dtype), quantize=args.quantize)
    opening = turns or [Turn("", image=True)]
    _, limit = fit(model, tokenizer, opening, args.max_new_tokens)
    memory = Memory()
    if args.compile:
        warm_up(model, tokenizer, image, opening, memory, args.chat, max_new_tokens=limit)
    load = time.perf_counter() - began

    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens,
                "generator": torch.Generator(device).manual_seed(args.seed)}
    say = functools.partial(answer, model, tokenizer, echo=not args.json, memory=memory, **sampling)
    if args.chat:
        chat = Chat(say, args.image, image, markers, masks)
        if question is not None:
            chat.ask(question)
        return chat.run()
    if args.show:
        save_image(draw(image, markers), args.show)
    result = say(image, markers, turns)
    if args.json:
        print(json.dumps(report(model, tokenizer, args.model, result, load)))


def warm_up(model, tokenizer, image: Image.Image, turns: list[Turn], memory: Memory, chat: bool, **sampling) -> None:
    """Compile the steps. Their first calls are what takes long: make them now, with the shapes to come."""
    compile_steps(model)
    on_gpu = model.llama.embed_tokens.weight.is_cuda
    try:
        for _ in range(1 + on_gpu):  # where it is recorded the second time
            memory.forget()
            for _ in range(1 + (on_gpu and chat)):  # the same again has the shape of a chat's next question
                list(itertools.islice(ask(model, tokenizer, image, [], turns, memory=memory, **sampling), 2))
        memory.forget()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        kind = type(error).__name__
        raise ValueError(f"--compile failed ({kind}); expected a C++ compiler, on a GPU Triton") from None


if __name__ == "__main__":
    sys.exit(run(main))
