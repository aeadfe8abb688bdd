"""A benchmark: ask a model about every record of a file, keep what it answers, count what is right.

    records.json  ->  marked images and questions  ->  OUT/answers.jsonl, as they come  ->  a table, OUT/results.json

What is drawn and asked is a function of (seed, record), and answers are greedy; so a second run gives the same number,
with any batch, any number of processes and the records in any order. (To the digit in float32, which a CPU takes; in
16 bits, as on a GPU unless told otherwise, a batch may decide a near tie between two words.) A run that was cut goes on
where it stopped. A bad record is listed, asked again the next time, and until then it is wrong: the denominator is
always the whole file.

A line of answers.jsonl has the released evaluation's keys; "metadata" says which record it answers, what is true, and
what the breakdowns go by. evals/visual7w.py shows all that a benchmark is.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import checkpoint
from chat import TEMPLATES, encode_chat, stop_ids
from clip import preprocess
from commandline import Parser, at_least, check_device, with_bar
from data.index import JSONFile
from data.readers import Plan
from data.records import MALFORMED, BadRecord, Sample, bad_record, to_sample
from evals.scorers import exact
from generate import generate
from hub import NAMES, find
from overlay import draw
from tokenizer import Stream, Tokenizer
from vipllava import ViPLLaVA, expand


@dataclass(frozen=True)
class Benchmark:
    name: str  # of its files of answers
    read: Callable[[dict, Path, np.random.Generator], Plan]  # how a record becomes a question
    tags: Callable[[dict, Sample], dict[str, str]]  # what breakdowns go by
    max_new_tokens: int = 128
    mode: str = "pad"  # see clip.preprocess


# -- answers ---------------------------------------------------------------------------------------------------------


def template_of(model: ViPLLaVA, sample: Sample) -> str:
    """The template of a sample's prompt: the model's, or where nothing is asked, "plain", as its caption is wanted."""
    return "plain" if sample.is_caption else model.config.template


def prompt(model: ViPLLaVA, tokenizer: Tokenizer, sample: Sample, said: Sequence[str] = ()) -> list[int]:
    """The ids of a sample's first question, or, after those that were answered so, of the next."""
    turns = [replace(turn, answer=text) for turn, text in zip(sample.turns, [*said, None])]
    return encode_chat(tokenizer, template_of(model, sample), turns)[0]


def look(model: ViPLLaVA, sample: Sample, mode="pad") -> torch.Tensor:
    """The pixels (3, S, S) of a sample's marked image. mode: see clip.preprocess."""
    return preprocess(draw(sample.image, sample.markers), model.config.vision.image_size, mode)


def answer(model: ViPLLaVA, tokenizer: Tokenizer, samples: Sequence[Sample], max_new_tokens: int, pixels=None, said=None):
    """The greedy answer to each sample's first question, a list of texts. pixels: of each sample, if not as `look`. said:
    of each, the answers to its first questions; the next is asked."""
    said = said or [()] * len(samples)
    pixels, texts = pixels or [look(model, sample) for sample in samples], [""] * len(samples)
    templates = [template_of(model, sample) for sample in samples]
    for template in sorted(set(templates)):  # which decides what an answer ends with
        group = [i for i, one in enumerate(templates) if one == template]
        prompts = [prompt(model, tokenizer, samples[i], said[i]) for i in group]
        found = complete(model, tokenizer, template, prompts, torch.stack([pixels[i] for i in group]), max_new_tokens)
        for i, text in zip(group, found):
            texts[i] = text
    return texts


def complete(model: ViPLLaVA, tokenizer: Tokenizer, template: str, prompts: Sequence[list[int]], pixels: torch.Tensor,
             max_new_tokens: int) -> list[str]:
    """The greedy answer to each prompt, as text."""
    streams = [Stream(tokenizer, TEMPLATES[template].stop) for _ in prompts]
    texts = [""] * len(prompts)
    stop = stop_ids(tokenizer, template)
    for tokens in generate(model, prompts, pixels, max_new_tokens=max_new_tokens, stop_ids=stop):
        for i, token in enumerate(tokens):
            if token is not None and not streams[i].stopped:
                texts[i] += streams[i].push(token)
        if all(stream.stopped for stream in streams):
            break
    return [(text + stream.flush()).strip() for text, stream in zip(texts, streams)]


@dataclass(frozen=True)
class Question:
    """A record, ready to be asked about."""

    id: str
    sample: Sample
    pixels: torch.Tensor
    about: dict  # what is true, and the tags


class Respondent:
    """A model that answers records of a file, by their numbers: what one process does."""

    def __init__(self, benchmark: Benchmark, args, rank: int):
        device = args.device
        if device.type == "cuda" and device.index is None:  # of several GPUs each process takes another
            device = torch.device("cuda", rank % torch.cuda.device_count())
        self.benchmark, self.args, self.file = benchmark, args, JSONFile(args.data)
        self.model, self.tokenizer = checkpoint.load(args.model, device, args.dtype)
        self.limit = min(benchmark.max_new_tokens, self.model.config.text.context // 2)

    def question(self, k: int) -> Question | BadRecord:
        record = None
        try:
            record = self.file[k]
            sample = to_sample(record, self.args.images, generator_of(self.args.seed, record), self.benchmark.read)
            about = {"truth": sample.turns[0].answer, **self.benchmark.tags(record, sample)}
            length = len(expand(prompt(self.model, self.tokenizer, sample), self.model.config.vision.patches))
            if length + self.limit > self.model.config.text.context:
                raise ValueError(f"{length} tokens, and {self.limit} for the answer; expected them to fit the model's "
                                 f"context of {self.model.config.text.context}")
            name = record.get("id", record.get("question_id", k))
            return Question(name, sample, look(self.model, sample, self.benchmark.mode), about)
        except MALFORMED as error:
            return bad_record(self.file, k, record, error)

    def __call__(self, numbers: Sequence[int]) -> list[dict]:
        """A line for each of the records; their answers as one batch."""
        asked = [self.question(k) for k in numbers]
        good = [one for one in asked if isinstance(one, Question)]
        texts = iter(())
        if good:
            samples, pixels = [one.sample for one in good], [one.pixels for one in good]
            texts = iter(answer(self.model, self.tokenizer, samples, self.limit, pixels))
        return [self.line(k, one, next(texts) if isinstance(one, Question) else "") for k, one in zip(numbers, asked)]

    def line(self, k: int, one: Question | BadRecord, text: str) -> dict:
        about = one.about if isinstance(one, Question) else {"where": one.where, "error": one.reason}
        key = json.dumps([self.args.model, self.benchmark.name, k, one.id, text])
        return {"question_id": one.id, "text": text, "answer_id": hashlib.sha256(key.encode()).hexdigest()[:22],
                "model_id": self.args.model, "metadata": {"record": k, **about}}


def generator_of(seed: int, record: dict) -> np.random.Generator:
    """The random stream of a record: by what it says, not by where it stands."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype=np.uint32).tolist()])


# -- many answers ----------------------------------------------------------------------------------------------------


def ask(benchmark: Benchmark, args, numbers: Sequence[int] | None = None) -> list[dict]:
    """The lines of OUT/NAME.jsonl, in the order of the records (of all, unless `numbers` says which), after asking for
    those that are not there yet. ValueError: the folder holds answers of another run."""
    path = args.out / f"{benchmark.name}.jsonl"
    numbers = range(len(JSONFile(args.data))) if numbers is None else numbers
    if not numbers:
        raise ValueError(f"no records in {args.data}")
    before = read_lines(path, ["metadata"])
    if not all(map(is_answer, before)):
        raise ValueError(f"{path} holds lines that were not written here; expected another --out")
    done = {line["metadata"]["record"]: line for line in before if "error" not in line["metadata"]}
    missing = [k for k in numbers if k not in done]
    made = [folder for folder in (args.out, *args.out.parents) if not folder.exists()]
    check_settings(args)
    if path.is_file():  # what was bad is asked again, and half a line is dropped
        write_lines(path, list(done.values()))
    batches = [missing[i : i + args.batch] for i in range(0, len(missing), args.batch)]
    for lines in with_bar(respond(benchmark, args, batches), benchmark.name, len(batches), unit=f"x{args.batch}"):
        done.update({line["metadata"]["record"]: line for line in lines})
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(map(dumps, lines))
    if all("error" in done[k]["metadata"] for k in numbers):
        if not has_answers(args.out):
            path.unlink()
            (args.out / "run.json").unlink()
            with contextlib.suppress(OSError):  # something else is in it
                for folder in made:
                    folder.rmdir()
        about = done[numbers[0]]["metadata"]
        raise ValueError(f"all {len(numbers)} records of {args.data} are bad; {about['where']}: {about['error']}")
    return [done[k] for k in numbers]


def is_answer(line: dict) -> bool:
    """Is this a line of ours: an answer, or what was wrong with a bad record?"""
    about = line["metadata"]
    if not isinstance(about, dict) or not isinstance(about.get("record"), int):
        return False
    return "error" in about or "truth" in about and isinstance(line.get("text"), str)


def respond(benchmark: Benchmark, args, batches: list[list[int]]) -> Iterator[list[dict]]:
    """The lines of each batch, in order, by this process or by several. Nothing is loaded before it is needed."""
    processes = min(args.processes, len(batches))
    if processes <= 1:
        respondent = Respondent(benchmark, args, 0) if batches else None
        yield from map(respondent, batches)
        return
    context = multiprocessing.get_context("spawn")
    ranks = context.SimpleQueue()
    for rank in range(processes):
        ranks.put(rank)
    pool = ProcessPoolExecutor(processes, context, _start, (benchmark, args, ranks, processes))
    try:
        yield from pool.map(_work, batches)
    except BrokenProcessPool:
        raise MemoryError("a process that answers was killed (too little memory?); the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


_mine: dict = {}  # of a process of a pool: what it begins with, and its respondent


def _start(benchmark: Benchmark, args, ranks, processes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends the others
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _mine["begins"] = (benchmark, args, ranks.get())


def _end_with(parent) -> None:
    """Where the first process is killed, and ends nobody, this one would keep its model for ever."""
    parent.join()
    os._exit(1)


def _work(numbers: Sequence[int]) -> list[dict]:
    if "respondent" not in _mine:  # not in _start, whose errors nobody would hear
        _mine["respondent"] = Respondent(*_mine["begins"])
    return _mine["respondent"](numbers)


# -- files -----------------------------------------------------------------------------------------------------------


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from None


def check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path} is a file; expected a folder, or a name that is free")


def dumps(line: dict) -> str:
    """Half a character (of a text that was cut within an emoji) becomes its JSON escape: UTF-8 has none."""
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def replace_file(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")  # two commands may write to one folder
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)  # of a disk that is full


def write_lines(path: Path, lines: Sequence[dict]) -> None:
    replace_file(path, "".join(map(dumps, lines)))


def read_lines(path: Path, needed: Sequence[str] = ()) -> list[dict]:
    """The whole lines of a file of JSON lines, each an object with the keys that are needed; the last may have been cut.
    ValueError: one is another."""
    if not path.is_file():
        return []
    try:
        said = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        if not all(isinstance(one, dict) and one.keys() >= set(needed) for one in said):
            raise ValueError
        return said
    except ValueError:
        raise ValueError(f"{path} can't be read; expected lines of JSON: take it away, or give another --out") from None


def has_answers(folder: Path) -> bool:
    """Does a file there hold more than what was said of bad records? Other lines than ours, such as records, don't count."""
    abouts = [line.get("metadata") for file in folder.glob("*.jsonl") for line in read_lines(file)]
    return any(isinstance(about, dict) and "error" not in about for about in abouts)


def check_settings(args) -> None:
    """OUT/run.json says what the answers beside it are of; all of it must be the same. Without answers, it says nothing."""
    folder = find(args.model)
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns)
               for pattern in ("*.safetensors", "*.bin") for file in sorted(folder.glob(pattern))]
    settings = {"model": str(folder), "weights": _digest(json.dumps(weights).encode()),
                "data": _digest(args.data.read_bytes()), **args.settings}
    path = args.out / "run.json"
    if path.is_file():
        before = read_json(path)
        if not isinstance(before, dict):
            raise ValueError(f"{path} is not of a run; expected another --out")
        differences = [f"{key} {before.get(key)}, now {settings[key]}" for key in settings if settings[key] != before.get(key)]
        if not differences:
            return
        if has_answers(args.out) or not {"model", "weights", "data"} <= before.keys():
            raise ValueError(f"{args.out} holds answers of another run ({differences[0]}); expected the same, or another --out")
    elif has_answers(args.out):
        raise ValueError(f"{args.out} holds answers, and no run.json that says of what; expected another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(settings, indent=1) + "\n")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# -- scores ----------------------------------------------------------------------------------------------------------


def interval(right: int, seen: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927)."""
    z, p = 1.96, right / seen
    middle, reach = p + z * z / (2 * seen), z * math.sqrt(p * (1 - p) / seen + z * z / (4 * seen * seen))
    return max(0.0, (middle - reach) / (1 + z * z / seen)), min(1.0, (middle + reach) / (1 + z * z / seen))


def interval_of_mean(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean of any values: of `draws` means of as many values drawn anew (the bootstrap)."""
    values, generator = np.asarray(values, float), np.random.default_rng(0)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    return tuple(np.quantile(means, (0.025, 0.975)).tolist())


def row(scores: Sequence[bool] | Sequence[float]) -> dict:
    """The mean in percent, its 95 % interval, and of how many: of right and wrong, or of grades."""
    counted = set(scores) <= {0, 1}
    low, high = interval(sum(scores), len(scores)) if counted else interval_of_mean(scores)
    said = {"score": sum(scores) / len(scores), "low": low, "high": high}
    return {**{key: round(100 * value, 4) for key, value in said.items()}, "n": len(scores)}


def rows(lines: Sequence[dict], scores: Sequence[float]) -> dict[str, dict]:
    """ "all", and a row for each value of each tag, such as "region small"."""
    groups = {"all": list(scores)}
    for line, score in zip(lines, scores):
        for tag, value in line["metadata"].items():
            if tag not in ("record", "truth", "where", "error"):
                groups.setdefault(f"{tag} {value}", []).append(score)
    return {name: row(groups[name]) for name in ["all", *sorted(groups.keys() - {"all"})]}


def right(line: dict, clean: Callable[[str], str] = str) -> bool:
    """Is the answer the truth, but for case, once both are clean? A bad record's never is."""
    return "error" not in line["metadata"] and exact(clean(line["text"]), clean(line["metadata"]["truth"]))


def report(title: str, args, lines: Sequence[dict], table: dict[str, dict], published: dict[str, str],
           name="results") -> None:
    """Write OUT/NAME.json, which holds no times: twice the same; then print what was bad, and the table."""
    bad = {line["metadata"]["record"]: line for line in lines if "error" in line["metadata"]}
    results = {"benchmark": title, "model": args.model, "rows": table, "published": published,
               "bad": [line["question_id"] for line in bad.values()]}
    replace_file(args.out / f"{name}.json", json.dumps(results, indent=1) + "\n")
    for line in bad.values():
        about = line["metadata"]
        print(f"{args.data}, {about['where']}, {line['question_id']}: {about['error']}")
    seconds = time.perf_counter() - args.began
    print(f"{title}, {args.model}: {len(bad)} bad records, {seconds:.0f} s")
    for label, said in table.items():
        low, high = said["low"], said["high"]
        print(f"{label:24} {said['score']:6.2f}   95 % interval {low:6.2f} to {high:6.2f}   (of {said['n']})")
    for label, number in published.items():
        print(f"{'published, ' + label:24} {number}")


def size_of_region(box: Sequence[float], size: tuple[int, int]) -> str:
    """ "small" below 1/8, "large" from 1/3 on: the box's side beside the image's, of squares of the same areas."""
    part = math.sqrt(max(0.0, (box[2] - box[0]) * (box[3] - box[1])) / (size[0] * size[1]))
    return "small" if part < 1 / 8 else "medium" if part < 1 / 3 else "large"


# -- command line ----------------------------------------------------------------------------------------------------


def flags(name: str, about: str, folder: bool = False) -> Parser:
    """The flags that all benchmarks have. folder: the official files are one, with splits, and their images lie in it."""
    parser = Parser(prog=f"python -m evals.{name}", description=about)
    parser.add_argument("--model", default="tiny", help="a name or folder (tiny)")
    parser.add_argument("--data", type=Path, required=True, help=f"the official {'folder' if folder else 'file'}")
    if not folder:
        parser.add_argument("--images", type=Path, help="the folder that images lie in (that of --data)")
    usual = f"runs/evals/{name}{'-SPLIT' if folder else ''}-MODEL"
    parser.add_argument("--out", type=Path, help=f"the folder for answers and results ({usual})")
    parser.add_argument("--seed", type=partial(at_least, 0), default=0, help="of the markers, 0 or more (0)")
    parser.add_argument("--batch", type=partial(at_least, 1), default=8, help="questions at once (8)")
    parser.add_argument("--processes", type=partial(at_least, 1), default=1, help="that answer at the same time, by GPU (1)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"),
                        help="default: float32 on a CPU, else what the weights have")
    return parser


def prepare(args: argparse.Namespace, name: str, settings: Sequence[str] = ()) -> argparse.Namespace:
    """The same arguments, checked and completed. settings: flags of a benchmark's own that decide about answers."""
    args.began, args.device = time.perf_counter(), check_device(args.device)
    precision = args.precision or ("float32" if args.device.type == "cpu" else None)
    args.dtype = getattr(torch, precision) if precision else None
    args.settings = {flag: getattr(args, flag) for flag in ("seed", *settings)} | {"precision": precision or "own"}
    args.images = args.images or args.data.parent
    if not args.images.is_dir():
        raise ValueError(f"no folder {args.images}; expected the one that images lie in")
    args.settings["images"] = str(args.images.resolve())
    args.out = args.out or Path("runs/evals") / f"{name}-{args.model if args.model in NAMES else Path(args.model).name}"
    check_folder(args.out)
    return args
