"""Training steps a second, ours and transformers', in one run on the same weights and batches.

    python -m bench.training --size tiny --batch 16                    on a CPU, in float32
    python -m bench.training --size 1b --batch 1 --apart               where memory holds one side only
    python -m bench.training --size 7b --train lora --batch 2 --precision bfloat16 --compile          on a GPU of 80 GB

A step is forward, backward and AdamW on `--tokens` words after one image. Each side is a process of its own, so that
its peak memory can be told; after warm-up they take turns, step by step (--apart: one side after the other), and stderr
tells each step as it comes. The medians are compared, and the first losses, which must agree. Without transformers, ours
alone is timed. MFU: the decoder's FLOPs a second, in parts of what a large matrix product reaches here in the same
precision, or of --peak-tflops. Weights are random, of the true shapes.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

import checkpoint
import llama
import lora
from bench.sides import Side, alone
from chat import IMAGE
from clip import VisionConfig
from commandline import Parser, amount, at_least, check_device, run
from parallel import Objective
from recipe import TRAINED, Recipe, read_recipe
from tokenizer import Tokenizer
from train import TINY, compile_blocks, flops_per_token, freeze, make_optimizers
from vipllava import IGNORE, ViPLLaVA, ViPLLaVAConfig

SIZES = {
    "tiny": TINY,
    "100m": ViPLLaVAConfig(
        VisionConfig(image_size=224, patch_size=14, width=384, layers=12, heads=6, mlp=1536),
        llama.LlamaConfig(8192, width=640, layers=12, heads=10, kv_heads=10, mlp=1728, context=2048),
    ),
    "1b": ViPLLaVAConfig(
        VisionConfig(), llama.LlamaConfig(32000, width=2048, layers=16, heads=16, kv_heads=16, mlp=5632, context=2048)
    ),
    "7b": ViPLLaVAConfig(VisionConfig(), llama.LlamaConfig(32064)),
    "13b": ViPLLaVAConfig(VisionConfig(), replace(llama.SIZES["13b"], vocab_size=32064)),
}


# -- what both sides train -------------------------------------------------------------------------------------------


def config_of(args: argparse.Namespace) -> ViPLLaVAConfig:
    """The --size, with other --layers or another --image-size, where a command has these flags."""
    config = SIZES[args.size]
    vision = replace(config.vision, image_size=getattr(args, "image_size", None) or config.vision.image_size)
    text = replace(config.text, layers=args.layers or config.text.layers)
    return replace(config, vision=vision, text=text, image_token_id=text.vocab_size - 64)


def recipe_of(args: argparse.Namespace) -> Recipe:
    return replace(read_recipe("lora"), train=args.train, rank=args.rank, alpha=2.0 * args.rank, lr=1e-4, projector_lr=0.0)


def write_weights(config: ViPLLaVAConfig, precision: str, device: torch.device, folder: str) -> None:
    """A random model, as a checkpoint that both sides read."""
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, precision))
    with torch.device(device):
        model = ViPLLaVA(config)
    checkpoint.save(model, Tokenizer.train(["a"], 300), folder)


def batch_of(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids and labels (B, N + T), the last half of the words trained, and pixels (B, 3, S, S)."""
    config, generator = config_of(args), torch.Generator().manual_seed(1)
    words = torch.randint(3, config.image_token_id, (args.batch, args.tokens), generator=generator)
    ids = torch.cat([torch.full((args.batch, config.vision.patches), IMAGE), words], dim=1)
    labels = ids.clone()
    labels[:, : -args.tokens // 2] = IGNORE
    S = config.vision.image_size
    return tuple(x.to(args.device) for x in (ids, labels, torch.randn(args.batch, 3, S, S, generator=generator)))


# -- a step of each side: () -> the loss ------------------------------------------------------------------------------


def our_step(args: argparse.Namespace, folder: str) -> Callable[[], float]:
    recipe, low, batch = recipe_of(args), getattr(torch, args.precision), batch_of(args)
    model, _ = checkpoint.load(folder, args.device, low)
    freeze(model, recipe, low)
    if args.compile:
        compile_blocks(model)
    objective = Objective(model, low, several=False)
    (optimizer,) = make_optimizers(model, recipe)
    trained = int((batch[1][:, 1:] != IGNORE).sum())

    def step() -> float:
        loss = objective(*batch) / trained
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def their_step(args: argparse.Namespace, folder: str) -> Callable[[], float]:
    """The same with transformers' model of the same weights; LoRA's layers are ours, as transformers has none."""
    from transformers import VipLlavaForConditionalGeneration

    recipe, low, (ids, labels, pixels) = recipe_of(args), getattr(torch, args.precision), batch_of(args)
    model = VipLlavaForConditionalGeneration.from_pretrained(folder, dtype=low).to(args.device)
    model.requires_grad_(recipe.train == "all")
    if recipe.train != "all":
        model.model.multi_modal_projector.requires_grad_(True)
    if recipe.train == "language":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if recipe.train == "lora":
        generator = torch.Generator().manual_seed(recipe.seed)
        for block in model.model.language_model.layers:
            for part in (block.self_attn, block.mlp):
                for name in [name for name in lora.TARGETS if hasattr(part, name)]:
                    setattr(part, name, lora.LoRALinear(getattr(part, name), recipe.rank, recipe.alpha, generator))
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else low)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0, fused=True)
    ids = torch.where(ids == IMAGE, model.config.image_token_id, ids)

    def step() -> float:
        with torch.autocast(ids.device.type, low, enabled=low != torch.float32):
            loss = model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


STEPS = {"transformers": their_step, "ours": our_step}


# -- the race --------------------------------------------------------------------------------------------------------


class Step:
    """A side's step, timed."""

    def __init__(self, name: str, args: argparse.Namespace, folder: str):
        self._step = STEPS[name](args, folder)

    def timed(self) -> tuple[float, float]:
        began = time.perf_counter()
        loss = self._step()  # whose number has come from the device
        return time.perf_counter() - began, loss


@dataclass
class Race:
    """A side after its steps."""

    name: str
    peak: int  # bytes
    times: tuple[float, ...]
    losses: tuple[float, ...]


def race(names: Sequence[str], args: argparse.Namespace) -> list[Race]:
    """All sides after their steps, in turns, or with --apart one side after the other."""
    done = []
    with tempfile.TemporaryDirectory() as folder:
        alone(write_weights, config_of(args), args.precision, args.device, f"{folder}/model")
        for group in [[name] for name in names] if args.apart else [names]:
            sides = [Side(name, Step, name, args, f"{folder}/model") for name in group]
            rounds = []
            for number in range(args.warmup + args.steps):
                rounds.append([side("timed") for side in sides])
                said = (f"{side.name} {seconds:.3f} s, loss {loss:.5f}" for side, (seconds, loss) in zip(sides, rounds[-1]))
                print("warm-up" if number < args.warmup else "step", *said, sep="; ", file=sys.stderr)
            for side, steps in zip(sides, zip(*rounds)):
                side.stop()
                done.append(Race(side.name, side.peak, *zip(*steps)))
    first = [side.losses[0] for side in done]
    if max(first) / min(first) - 1 > (1e-5 if args.precision == "float32" else 1e-2):
        raise ValueError(f"the first losses of {', '.join(names)} are {first}; expected them to agree")
    return done


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The most that a large matrix product reached here, of a few."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times, several = [], 10 if device.type == "cuda" else 1  # which together outlast the wait for them
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(several):
            product = a @ b
        product[0, 0].item()
        times.append((time.perf_counter() - began) / several)
    return 2 * side**3 / min(times) / 1e12


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.training", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--train", choices=[kind for kind in TRAINED if kind != "contrast"], default="language", help="what is trained (language)")
    parser.add_argument("--rank", type=partial(at_least, 1), default=128, help="of LoRA (128)")
    parser.add_argument("--batch", type=partial(at_least, 1), default=16, help="samples a step (16)")
    parser.add_argument("--tokens", type=partial(at_least, 2), default=128, help="words after the image (128)")
    parser.add_argument("--layers", type=partial(at_least, 1), help="of the decoder: fewer, to try something out (the size's own)")
    parser.add_argument("--image-size", type=partial(at_least, 1), help="side of the image in pixels (the size's own)")
    parser.add_argument("--steps", type=partial(at_least, 1), default=10, help="steps timed of each side (10)")
    parser.add_argument("--warmup", type=partial(at_least, 1), default=3, help="steps before them (3)")
    parser.add_argument("--apart", action="store_true", help="one side after the other")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true", help="our blocks by torch.compile")
    parser.add_argument("--peak-tflops", type=amount, default=0.0, help="MFU is a part of it (a matrix product's)")
    args = parser.parse_args(argv)
    args.device, low = check_device(args.device), getattr(torch, args.precision)
    with torch.device("meta"):
        model = ViPLLaVA(config_of(args))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    before = matmul_tflops(args.device, low)
    sides = race([name for name in STEPS if name == "ours" or importlib.util.find_spec(name)], args)
    peak = args.peak_tflops or max(before, matmul_tflops(args.device, low))
    freeze(model, recipe_of(args), low)
    installed = ["torch", *(side.name for side in sides if side.name != "ours")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)
    cuda = args.device.type == "cuda"
    machine = torch.cuda.get_device_name(args.device) if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    tokens = config_of(args).vision.patches + args.tokens
    what = f"{args.size} ({count:.1f} M), {args.train}, batch {args.batch} x {tokens} tokens, {args.precision}"
    print(f"{what}; {machine}; {versions}; MFU of {peak:.3g} TFLOP/s")
    medians = {side.name: statistics.median(side.times[args.warmup :]) for side in sides}
    for side in sides:
        median = medians[side.name]
        mfu = flops_per_token(model) * args.batch * tokens / median / 1e12 / peak
        print(f"{side.name:13} {args.batch / median:9.3g} samples/s  {1e3 * median:9.1f} ms a step  MFU {mfu:5.1%}  "
              f"peak memory {side.peak / 1e9:6.2f} GB  first loss {side.losses[0]:.5f}")
    if len(sides) > 1:
        print(f"ours x transformers {medians['transformers'] / medians['ours']:.2f}")
    print(json.dumps({side.name: {"seconds": side.times, "losses": side.losses, "peak": side.peak} for side in sides}))


if __name__ == "__main__":
    sys.exit(run(main))
