"""Training: one loop from drawn scenes to the paper's stages and LoRA; it lowers the loss of the answers.

    python train.py tiny-captions --out runs/captions                                       a small model from nothing
    python train.py tiny-markers --model runs/captions --out runs/markers                   on a laptop's CPU
    python train.py lora --model 7b --data mine.json --images photos --micro 4 --out runs/mine        your own records
    torchrun --nproc-per-node 8 train.py stage2 --parallel fsdp --micro 4 --recompute --model DIR --data mix.json …

A run folder gets checkpoints, a log (log.jsonl) and in the end the model, in the layout that checkpoint.load reads, or
the adapter. The same command continues a run that was stopped, by Ctrl-C, SIGTERM or a crash: the newest whole
checkpoint is taken up, and what a step learns from is a function of (seed, step) alone (data/batches.py).

    loss of a step = sum of the answers' cross-entropies / number of their tokens, over all processes and micro-batches

so one process with 8 samples, two with 4 and four micro-batches of 2 compute the same. Weights that are trained are
kept in float32. With bfloat16, the default on a GPU, the arithmetic is done in it, and frozen ones that came in 16 bits,
or lie under an adapter, are stored in it (but not with FSDP, which casts by itself).
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.utils.checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import Dataset

import checkpoint
import contrast
import hub
import llama
import lora
import states
from chat import HUMAN
from commandline import Parser, amount, at_least, check_ours, run
from data import scenes
from data.batches import SCENES, Examples, Micro, RecordSource, SceneSource, batches, parse_mix, text_sample
from data.records import BadRecord, Records
from evals.benchmark import answer, look, prompt
from evals.scenes import evaluate
from evals.scorers import exact
from files import checksum
from journal import Journal, plot
from muon import Muon, is_hidden_matrix
from parallel import Objective, Place, find_place, gradients, lowered, spread
from recipe import OPTIMIZERS, RECIPES, TRAINED, Habits, Recipe, read_recipe, schedule
from tokenizer import Tokenizer
from vipllava import ViPLLaVA, ViPLLaVAConfig, expand

TINY = ViPLLaVAConfig(
    vision=contrast.VISION,
    text=llama.SIZES["tiny"],
    feature_layers=(-2, -3, -4, -5, 1),
)


# -- what is trained -------------------------------------------------------------------------------------------------


def freeze(model: ViPLLaVA, recipe: Recipe, low: torch.dtype) -> None:
    """Parameters that are trained: float32, with gradients. The others, also those of CLIP's blocks beyond the deepest
    that is looked at: of dtype `low`, without."""
    idle = ("vision.post_layernorm.", *(f"vision.layers.{i}." for i in range(model.config.depth, model.config.vision.layers)))
    if recipe.train == "lora":
        generator = torch.Generator().manual_seed(recipe.seed)
        lora.add(model, recipe.rank, recipe.alpha, recipe.targets.split(","), generator)
    for name, p in model.named_parameters():
        learns = name.startswith(TRAINED[recipe.train]) or ".lora_" in name
        p.requires_grad_(learns and not name.startswith(idle))
        p.data = p.data.to(torch.float32 if p.requires_grad else low)


def compile_blocks(model: ViPLLaVA) -> None:
    """torch.compile the blocks, each once for all layers."""
    for block in (*model.vision.layers, *model.llama.layers):
        block.forward = torch.compile(block.forward)


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, for all or for what Muon leaves. Matrices decay, vectors don't; the projector may have a rate of its own."""
    groups = {"adamw": {}, "muon": {}}
    for name, p in model.named_parameters():
        if p.requires_grad:
            which = "muon" if recipe.optimizer == "muon" and is_hidden_matrix(name, p) else "adamw"
            lr = recipe.projector_lr if name.startswith("projector.") and recipe.projector_lr else recipe.lr
            decay = recipe.weight_decay if p.dim() > 1 else 0.0
            alike = {"params": [], "lr": lr, "peak": lr, "weight_decay": decay}
            groups[which].setdefault((lr, decay), alike)["params"].append(p)
    make = {"adamw": functools.partial(torch.optim.AdamW, betas=(0.9, recipe.beta2), fused=True), "muon": Muon}
    return [make[which](list(of.values())) for which, of in groups.items() if of]


def summary(model: nn.Module) -> str:
    """How many parameters of each part are trained, and how many are frozen."""
    lines = []
    for name, part in model.named_children():
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in part.parameters() if not p.requires_grad)
        lines.append(f"{name:17} {trained:>13,} trained   {frozen:>13,} frozen")
    return "\n".join(lines)


# -- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and what comes of it."""

    objective: nn.Module  # (ids, labels, pixels) of a micro-batch -> its summed loss; .model is what is trained
    data: Dataset  # as data.batches.Examples
    publish: Callable[[dict], None]  # writes what the run has made, of the whole model's tensors
    measure: Callable | None = None  # of the model: the accuracy to report, or accuracies by name
    measure_first: bool = False  # before the first step, too
    flops: float = 0.0  # of a token, to report MFU
    origin: dict[str, int | str] = dataclasses.field(default_factory=dict)  # what else a run keeps to, by name


def update(objective, optimizers, trained: list, micros: list[Micro], recipe: Recipe, step: int, place: Place):
    """One step of the optimizers: the mean loss of its answer tokens, and the norm of the gradient before clipping."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak"] * schedule(step, recipe)
    objective.train()
    loss, tokens = gradients(objective, micros, place)
    norm = nn.utils.clip_grad_norm_(trained, recipe.grad_clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if tokens and not math.isfinite(loss + norm):
        names = ", ".join(name for micro in micros for name in micro.names)
        raise ValueError(f"the loss is {loss} and its gradient {norm} at step {step}, on {names}; lower --lr")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm


def train(task: Task, recipe: Recipe, out: Path, base: str, place: Place, habits: Habits, parallel="ddp",
          low=torch.float32, stopping=()) -> None:
    """Train to recipe.steps, or on from a state in `out`. stopping: once there is something in it, the run saves and
    ends, see stop_signals."""
    out.mkdir(parents=True, exist_ok=True)
    model, measure = task.objective.model, task.measure
    objective = spread(task.objective, parallel, place)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, recipe)
    about = {"recipe": dataclasses.asdict(recipe) | task.origin, "base": base}
    first = states.load(out, model, optimizers, about)
    if first == recipe.steps and place.rank == 0:
        print(f"all {first} steps of this run are done", flush=True)
    journal = Journal(out, first, habits, place, task.flops)
    steps = batches(task.data, recipe.batch, recipe.seed, first, recipe.steps, micro=habits.micro, rank=place.rank,
                    world=place.world, workers=habits.workers, pin=place.device.type == "cuda")
    if measure and first == 0 and task.measure_first:
        with lowered(place.device, low):
            journal.measure(0, lambda: measure(model.eval()))
    learned = 0
    for step, (micros, bad) in enumerate(steps, first):
        if not habits.skip_bad and place.max(bool(bad)):  # in the records of any of the processes
            if step > first and place.max(learned):
                states.save(out, model, optimizers, step, about, habits.keep)  # to go on from with --skip-bad
            raise bad[0] if bad else SystemExit(2)
        journal.bad(bad)
        learned += sum(len(micro.names) for micro in micros)
        loss, norm = update(objective, optimizers, trained, micros, recipe, step, place)
        done = step + 1
        journal.step(done, recipe, micros, loss, norm)
        if measure and (done % habits.eval_every == 0 or done == recipe.steps):
            with lowered(place.device, low):
                journal.measure(done, lambda: measure(model.eval()))
        stop = place.max(bool(stopping))  # on any of the processes: all stop after the same step
        due = done % habits.save_every == 0 or done == recipe.steps or stop
        if due:
            journal.tell(done, recipe, loss, norm)  # a run is known by its log, which counts the bad records of a state
        if due and (first or place.max(learned)):  # as long as all were bad there is nothing to keep
            states.save(out, model, optimizers, done, about, habits.keep)
        if stop:
            break
    if first == 0 and not place.max(learned):
        raise ValueError(f"all records were bad, see {journal.list}; nothing has been learned")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=recipe.train == "lora")
    state = get_model_state_dict(model, options=options)  # an adapter has nothing of what is frozen
    if place.rank == 0:
        task.publish(state)
    if place.world > 1:
        dist.barrier()
    if habits.plot and place.rank == 0:
        plot(out)
    if first < recipe.steps and done < recipe.steps:
        sys.exit(f"stopped after step {done} of {recipe.steps}; the same command continues")


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM fills, so that a step is finished and saved before the run ends."""
    stopping, names = [], (signal.SIGINT, signal.SIGTERM)

    def stop(number, frame):
        if not stopping:
            os.write(2, b"stopping after this step\n")  # print may be at work just now
        stopping.append(number)

    before = [signal.signal(name, stop) for name in names]
    try:
        yield stopping
    finally:
        for name, handler in zip(names, before):
            signal.signal(name, handler)


# -- what is said ----------------------------------------------------------------------------------------------------


def flops_per_token(model: ViPLLaVA) -> float:
    """FLOPs of a token in the decoder, attention's products left out: 2 a weight forward, 2 backward, and 2 for the
    gradient of a weight that is trained."""
    weights = [p for name, p in model.llama.named_parameters() if p.dim() > 1 and "embed" not in name]
    return sum(p.numel() * (6 if p.requires_grad else 4) for p in weights)


def held_out_scenes(model: ViPLLaVA, tokenizer: Tokenizer, recipe: Recipe, n: int = 256) -> dict[str, float]:
    """Exact matches on held-out scenes, by kind of marker; of whole captions, where a run trains on nothing else."""
    source = "captions" if parse_mix(recipe.data)[0] == ["captions"] else "markers"
    table = evaluate(model, tokenizer, n, source=source, split="val", seed=recipe.seed, side=recipe.side)
    return {name: round(right / seen, 3) for name, (right, seen) in table.items()}


ANSWER = 64  # tokens of an answer that is measured, at most


def to_measure_on(model: ViPLLaVA, tokenizer: Tokenizer, records: Records, n: int = 256) -> tuple[list[int], list[BadRecord]]:
    """Up to n records with images, from all over, and those that are bad: each is read once, while no training is lost."""
    good, bad, longest = [], [], model.config.text.context - ANSWER
    for k in [k * len(records) // n for k in range(n)] if len(records) > n else range(len(records)):
        try:
            if (sample := records[k]).open:
                look(model, sample)
                length = len(expand(prompt(model, tokenizer, sample), model.config.vision.patches))
                if length > longest:
                    raise records.bad(k, f"a question of {length} tokens; expected at most {longest}")
                good.append(k)
        except ValueError as error:  # an image that is too long and thin, for one
            bad.append(error if isinstance(error, BadRecord) else records.bad(k, str(error)))
    return good, bad


def held_out_records(model: ViPLLaVA, tokenizer: Tokenizer, records: Records, chosen: list[int]) -> float:
    """Exact matches, case folded, of the first answers of the chosen records."""
    right = 0
    for first in range(0, len(chosen), 16):
        group = [records[k] for k in chosen[first : first + 16]]  # read again: their images go with them
        for sample, text in zip(group, answer(model, tokenizer, group, ANSWER)):
            right += exact(text, sample.turns[0].answer.strip())
    return round(right / len(chosen), 3)


# -- a small model from nothing --------------------------------------------------------------------------------------


def tiny_model(recipe: Recipe, config: ViPLLaVAConfig | None = None) -> tuple[ViPLLaVA, Tokenizer]:
    """A random ViP-LLaVA, of TINY's sizes unless told (2.6 M parameters), and a tokenizer for the words of the scenes."""
    config, tokenizer = config or TINY, tokenizer_of_scenes(recipe.seed, recipe.side)
    torch.manual_seed(recipe.seed)
    text = dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size + 2)  # and <image>, <pad>
    return ViPLLaVA(dataclasses.replace(config, text=text, image_token_id=tokenizer.vocab_size)), tokenizer


@functools.cache  # to make up so many texts takes seconds
def tokenizer_of_scenes(seed: int, side: int) -> Tokenizer:
    texts = []
    for index in range(10_000):
        sample = text_sample(scenes.generator_for("train", seed, index), (side, side))
        texts += [t for turn in sample.turns for t in (turn.question, turn.answer)]
    texts += [HUMAN + " USER: ", " ASSISTANT:"] * 1000
    return Tokenizer.train(texts, 1024)


def take_tower(model: ViPLLaVA, clip: str) -> None:
    """Give the model the image tower of a CLIP, a name or folder. ValueError: it is of another shape."""
    tower = checkpoint.load_clip(clip, "cpu", torch.float32)[0].vision_model
    if tower.config != model.config.vision:
        raise ValueError(f"{clip} has an image tower of {tower.config}; expected the model's, {model.config.vision}")
    model.vision = tower


# -- command line ----------------------------------------------------------------------------------------------------


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Train a ViP-LLaVA.")
    what = f"what to train: {', '.join(RECIPES)}, or a .toml file such as those in recipes/; flags override its fields"
    parser.add_argument("recipe", help=what)
    parser.add_argument("--out", type=folder, required=True, help="the run's folder; a run that is in it is continued")
    parser.add_argument("--model", help="start from these weights (a name or folder); without it, a small random model")
    parser.add_argument("--clip", help="the model gets the image tower of this CLIP: a name or folder")
    parser.add_argument("--images", type=Path, help="the folder that the records' images lie in (here)")
    parser.add_argument("--valid", type=Path, help="a file of records to measure exact answers on")
    recipes = {name: read_recipe(name) for name in RECIPES}
    for field in dataclasses.fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=field.type, default=argparse.SUPPRESS, metavar="…", help=values(field, recipes))
    parser.add_argument("--device", help="cpu, cuda, mps (default: cuda where there is one)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="of several processes (ddp)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks of decoder and image tower")
    parser.add_argument("--recompute", action="store_true", help="activations of the decoder's blocks: less memory")
    parser.add_argument("--skip-bad", action="store_true", help="count and list bad records instead of stopping")
    parser.add_argument("--plot", action="store_true", help="draw loss.png")
    parser.add_argument("--peak-tflops", type=amount, default=0.0, help="of a device, to report MFU against")
    for name, low, text in (
        ("micro", 0, "samples of a forward pass at most; 0: a process's share of the batch"),
        ("workers", 0, "processes that draw; on few cores they slow training down"),
        ("log_every", 1, "steps between two lines"),
        ("eval_every", 1, "steps between two measurements on held-out samples"),
        ("save_every", 1, "steps between two states"),
        ("keep", 1, "states that stay"),
    ):
        number, default = functools.partial(at_least, low), getattr(Habits, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=number, default=default, help=f"{text} ({default})")
    return parser.parse_args(argv)


def values(field: dataclasses.Field, recipes: dict[str, Recipe]) -> str:
    """A field's value, and what it is in the recipes that have another."""
    if field.name == "data":
        return f"files of records, a,b.json, or scenes and their shares, such as markers=3,captions=1: {', '.join(SCENES)}"
    default = " or ".join(OPTIMIZERS) if field.name == "optimizer" else str(field.default or "-")
    others = {}
    for name, recipe in recipes.items():
        others.setdefault(getattr(recipe, field.name), []).append(name)
    others.pop(field.default, None)
    return "; ".join([default, *(f"{value}: {', '.join(names)}" for value, names in others.items())])


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("nothing came; expected a folder")
    return Path(text)


def find_source(recipe: Recipe, images: Path):
    """Where the samples come from, and the recipe with as many steps as its epochs have."""
    names = recipe.data.split(",")
    if not recipe.data:
        raise ValueError(f"no data; expected --data with files of records, or with scenes: {', '.join(SCENES)}")
    missing = [name for name in names if not Path(name).is_file()]
    if missing == names:
        source = SceneSource(recipe.data, recipe.seed, recipe.side)
        if not recipe.steps:
            raise ValueError("steps is 0, and scenes never end; expected --steps")
        return source, recipe
    if missing:
        raise FileNotFoundError(f"no file {missing[0]}; expected all of {recipe.data} to be there")
    if not images.is_dir():
        raise ValueError(f"no folder {images}; expected the one that images lie in")
    source = RecordSource([Path(name) for name in names], images, recipe.seed)
    seen = recipe.epochs * len(source.records)
    if not recipe.steps and seen < recipe.batch:  # the step would be filled up with the same records
        raise ValueError(f"{seen:g} records in all epochs are no batch of {recipe.batch}; expected a smaller --batch or more --epochs")
    steps = recipe.steps or math.ceil(seen / recipe.batch)
    return source, dataclasses.replace(recipe, steps=steps)


def main(argv: list[str]) -> None:
    args = arguments(argv)
    fields = [field.name for field in dataclasses.fields(Recipe)]
    typed = {name: getattr(args, name) for name in fields if hasattr(args, name)}
    if typed.get("steps") and "epochs" in typed:
        raise ValueError(f"--steps {typed['steps']} and --epochs {typed['epochs']:g} came; expected one of them")
    if "epochs" in typed:
        typed["steps"] = 0  # the recipe's give way
    recipe = dataclasses.replace(read_recipe(args.recipe), **typed)
    for name in ("rank", "alpha", "targets"):
        if name in typed and recipe.train != "lora":
            raise ValueError(f"--{name} came with a recipe that trains {recipe.train!r}; expected one that trains 'lora'")
    target = checkpoint.check_target(args.out, adapter=recipe.train == "lora")
    if args.model and resolved(args.model) == str(target):
        raise ValueError(f"--out {args.out} is the model to start from; expected another folder")
    made = any((target / name).is_file() for name in ("config.json", lora.FILE))
    if made and not any((target / name).exists() for name in ("log.jsonl", "states")):
        raise ValueError(f"--out {args.out} holds a model that no training wrote there; expected another folder")
    if recipe.train == "lora" and not args.model:
        raise ValueError("an adapter has no base; expected --model")
    if args.plot:
        check_ours(target / "loss.png")
    place = find_place(args.device)
    torch.set_flush_denormal(True)  # a CPU works through numbers next to zero at a hundredth of its speed
    low = getattr(torch, args.precision or ("bfloat16" if place.device.type == "cuda" else "float32"))
    base = resolved(args.model)
    make = contrast_task if recipe.train == "contrast" else answer_task
    task, recipe = make(args, recipe, place, low)
    task.origin["precision"] = str(low).removeprefix("torch.")
    if args.clip:
        base += f" with the image tower of {resolved(args.clip)}"
    if place.rank == 0:
        print(f"{recipe}\n{summary(task.objective.model)}", flush=True)
    habits = Habits(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Habits)})
    new = not args.out.exists()
    try:
        with stop_signals() as stopping, states.alone(args.out) if place.rank == 0 else contextlib.nullcontext():
            train(task, recipe, args.out, base, place, habits, args.parallel, low, stopping)
    except BaseException:
        with contextlib.suppress(OSError):
            if new and place.rank == 0:
                args.out.rmdir()  # where nothing has been written
        raise
    if place.world > 1:
        dist.destroy_process_group()


def resolved(name: str | None) -> str:
    """A model's short name, or its folder wherever one stands, or its name on the hub; in the order of hub.find."""
    return str(Path(name).resolve()) if name and name not in hub.NAMES and Path(name).is_dir() else name or ""


def contrast_task(args: argparse.Namespace, recipe: Recipe, place: Place, low: torch.dtype):
    """A CLIP that learns which caption is whose. Of several processes each holds its images against its own captions."""
    if args.parallel == "fsdp" or not recipe.steps:
        raise ValueError(f"--parallel {args.parallel} and {recipe.steps} steps came with contrast; expected ddp, and --steps")
    given = {flag: getattr(args, flag) for flag in ("micro", "compile", "recompute", "valid", "clip", "images")}
    given |= {"length": recipe.length != Recipe.length, "projector-lr": recipe.projector_lr}
    for flag, value in {**given, "data": recipe.data, "template": recipe.template}.items():
        if value:
            raise ValueError(f"--{flag} came with contrast, which has no use for it; expected none")
    if recipe.batch < place.world:
        raise ValueError(f"--batch {recipe.batch} came with {place.world} processes; expected a pair for each, or more")
    loaded = checkpoint.load_clip(args.model, place.device, torch.float32) if args.model else contrast.tiny_clip(recipe.seed)
    model, tokenize = loaded[0].to(place.device), loaded[1]
    pairs = functools.partial(contrast.Pairs, tokenize, model.vision_model.config, recipe.seed, recipe.side)

    def publish(state: dict) -> None:
        checkpoint.save_clip(model, tokenize, args.out)

    measure = functools.partial(contrast.held_out_pairs, data=pairs(split="val"))
    return Task(contrast.Contrast(model, low), pairs(split="train"), publish, measure), recipe


def answer_task(args: argparse.Namespace, recipe: Recipe, place: Place, low: torch.dtype):
    """A ViP-LLaVA that learns to answer."""
    if args.parallel == "fsdp" and recipe.optimizer == "muon":
        raise ValueError("--parallel fsdp came with muon, which needs whole matrices; expected ddp, or adamw")
    if args.parallel == "fsdp" and place.world == 1:
        raise ValueError("--parallel fsdp came with one process; expected several, started by torchrun")
    source, recipe = find_source(recipe, args.images or Path("."))
    if args.clip and recipe.train == "lora":
        raise ValueError("--clip came with lora, whose file has no image tower; expected to train without")
    if args.images and isinstance(source, SceneSource):
        raise ValueError("--images came with drawn scenes; expected files of records with it")
    if args.valid and (isinstance(source, SceneSource) or recipe.template == "plain"):
        what = "with the template plain, in which nothing is asked" if recipe.template == "plain" else "with drawn scenes"
        raise ValueError(f"--valid came {what}; expected records with questions to train on")
    stored = {"lora": low, "projector": "stored"}.get(recipe.train, torch.float32)
    model, tokenizer = checkpoint.load(args.model, place.device, stored) if args.model else tiny_model(recipe)
    if model.config.quantized:
        raise ValueError(f"{args.model} is {model.config.quantized}; expected 16 or 32 bits a weight")
    kept = checkpoint.stored_dtype(args.model) if args.model else torch.float32
    # What is frozen may be rounded where it came in 16 bits, or where only an adapter is written.
    frozen = low if kept.itemsize == 2 or recipe.train == "lora" else torch.float32
    if args.clip:
        take_tower(model, args.clip)
    origin = {"the base's digest": lora.digest(model.llama)} if args.model else {}
    if args.model or args.clip:
        origin["the image tower's digest"] = lora.digest(model.vision)
    if recipe.template not in ("", "plain"):
        model.config = dataclasses.replace(model.config, template=recipe.template)
    freeze(model.to(place.device), recipe, torch.float32 if args.parallel == "fsdp" else frozen)  # FSDP casts by itself
    if args.compile:
        compile_blocks(model)
    if args.recompute:  # what is compiled: a checkpoint is not looked into
        for block in model.llama.layers:
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False,
                                              context_fn=lambda: (contextlib.nullcontext(), lowered(place.device, low)))
    measure = measured(args, recipe, place, model, tokenizer, source)

    def publish(state: dict) -> None:
        if recipe.train == "lora":
            lora.save(model, args.out, resolved(args.model), state)
        else:
            # What came in 16 bits goes in 16, those of training where it has any; states keep 32 of what is trained.
            wanted = (low if low.itemsize == 2 else kept) if kept.itemsize == 2 else None
            checkpoint.save(model, tokenizer, args.out, state=state, dtype=wanted)

    data = Examples(source, tokenizer, model.config, recipe.template == "plain", recipe.length)
    objective = Objective(model, low, place.world > 1)
    read = source.records.files if isinstance(source, RecordSource) else []
    origin |= {f"bytes of {file.path}": file.path.stat().st_size for file in read}  # all that older states know
    origin |= {f"checksum of {file.path}": checksum(file.path) for file in read}
    if read:
        origin["images"] = str((args.images or Path(".")).resolve())
    return Task(objective, data, publish, measure, bool(read), flops_per_token(model), origin), recipe


def measured(args: argparse.Namespace, recipe: Recipe, place: Place, model: ViPLLaVA, tokenizer: Tokenizer, source):
    """What measures the model on held-out samples, or None where there are none."""
    if args.parallel == "fsdp":  # no process has the whole model
        if args.valid:
            raise ValueError("--valid came with --parallel fsdp; expected ddp, or to measure the result afterwards")
        return None
    if isinstance(source, SceneSource):
        if source.is_text:
            return None
        measure = functools.partial(held_out_scenes, tokenizer=tokenizer, recipe=recipe)
    elif args.valid:
        records = Records([args.valid], args.images or Path("."))
        chosen, bad = to_measure_on(model, tokenizer, records)
        if bad and not args.skip_bad:
            raise bad[0]
        for error in bad if place.rank == 0 else ():
            print(f"not measured on: {error}", flush=True)
        if not chosen:
            raise ValueError(f"none of {len(records)} records to measure on has an image; expected some")
        measure = functools.partial(held_out_records, tokenizer=tokenizer, records=records, chosen=chosen)
    else:
        return None
    # Compiled, the blocks would be compiled anew for answers of any length.
    return torch.compiler.set_stance("force_eager")(measure) if args.compile else measure


if __name__ == "__main__":
    sys.exit(run(main))
