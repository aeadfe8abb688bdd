"""Training steps a second, ours and transformers', interleaved in one run on the same weights and batches.

    python -m bench.training --size tiny --batch 16                    on a CPU, in float32
    python -m bench.training --size 7b --train lora --precision bfloat16 --peak-tflops 989     on a GPU

A step is forward, backward and AdamW on `--tokens` words after one image. Both sides take turns, step by step, after
warm-up; the medians are compared, and the first losses, which must agree. Without transformers, ours alone is timed.
Weights are random, of the true shapes.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace

import torch

import checkpoint
import llama
import lora
from chat import IMAGE
from clip import VisionConfig
from commandline import Parser, check_device, run
from tokenizer import Tokenizer
from parallel import Objective
from train import RECIPES, TINY, TRAINED, flops_per_token, freeze, parameter_groups
from vipllava import ViPLLaVA, ViPLLaVAConfig

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
}


def batch_of(config: ViPLLaVAConfig, n: int, tokens: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids and labels (B, N + T), the last half trained, and pixels (B, 3, S, S)."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, config.image_token_id, (n, tokens), generator=generator)
    ids = torch.cat([torch.full((n, config.vision.patches), IMAGE), words], dim=1)
    labels = ids.clone()
    labels[:, : -tokens // 2] = -100
    S = config.vision.image_size
    return tuple(x.to(device) for x in (ids, labels, torch.randn(n, 3, S, S, generator=generator)))


def our_step(model: ViPLLaVA, recipe, batch, low):
    freeze(model, recipe, low)
    objective = Objective(model, low, several=False)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), fused=True)
    trained = int((batch[1][:, 1:] != -100).sum())

    def step() -> float:
        loss = objective(*batch) / trained
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def their_step(folder: str, recipe, batch, low, device):
    """The same with transformers' model of the same weights; LoRA's layers are ours, as transformers has none."""
    from transformers import VipLlavaForConditionalGeneration

    model = VipLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device)
    ids, labels, pixels = batch
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
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr, weight_decay=0.0, fused=True)
    ids = torch.where(ids == IMAGE, model.config.image_token_id, ids)

    def step() -> float:
        with torch.autocast(ids.device.type, low, enabled=low != torch.float32):
            loss = model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def timed(step, device) -> tuple[float, float]:
    began = time.perf_counter()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, loss


def race(sides: dict, steps: int, device, tolerance: float) -> tuple[dict[str, float], dict[str, float]]:
    """The sides in turn -> the first loss of each, which must agree, and the median seconds of a step after warm-up."""
    losses = {name: timed(step, device)[1] for name, step in sides.items()}
    if max(losses.values()) / min(losses.values()) - 1 > tolerance:
        raise ValueError(f"the first losses are {losses}; expected them to agree")
    for _ in range(2):
        for step in sides.values():
            timed(step, device)
    seconds = {name: [] for name in sides}
    for _ in range(steps):
        for name, step in sides.items():
            seconds[name].append(timed(step, device)[0])
    return losses, {name: statistics.median(times) for name, times in seconds.items()}


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.training", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--train", choices=TRAINED, default="all", help="what is trained (all)")
    parser.add_argument("--batch", type=int, default=16, help="samples a step (16)")
    parser.add_argument("--tokens", type=int, default=128, help="words after the image (128)")
    parser.add_argument("--steps", type=int, default=10, help="steps timed of each side (10)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true", help="our blocks by torch.compile")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, to print MFU against")
    args = parser.parse_args(argv)
    device, low, config = check_device(args.device), getattr(torch, args.precision), SIZES[args.size]
    torch.manual_seed(0)
    recipe = replace(RECIPES["lora"], train=args.train, lr=1e-4, projector_lr=0.0)
    tokenizer = Tokenizer.train(["a"], 300)
    config = replace(config, image_token_id=config.text.vocab_size - 64)
    model = ViPLLaVA(config)
    batch = batch_of(config, args.batch, args.tokens, device)
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            import transformers

            checkpoint.save(model, tokenizer, f"{folder}/model")
            sides["transformers"] = their_step(f"{folder}/model", recipe, batch, low, device)
        except ImportError:
            transformers = None
    if args.compile:
        for block in model.llama.layers:
            block.compile()
    sides["ours"] = our_step(model.to(device), recipe, batch, low)
    losses, medians = race(sides, args.steps, device, 1e-5 if low == torch.float32 else 1e-2)
    versions = f"torch {torch.__version__}" + (f", transformers {transformers.__version__}" if transformers else "")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.size} ({count:.1f} M), {args.train}, batch {args.batch}, {batch[0].size(1)} tokens, {args.precision}; {machine}; {versions}")
    flops = flops_per_token(model) * batch[0].numel()
    for name, median in medians.items():
        mfu = f"  MFU {flops / median / args.peak_tflops / 1e12:.1%}" if args.peak_tflops else ""
        print(f"{name:13} {args.batch / median:8.2f} samples/s  {1e3 * median:8.1f} ms a step{mfu}  loss {losses[name]:.5f}")
    if len(sides) > 1:
        print(f"ours x transformers {medians['transformers'] / medians['ours']:.2f}")
    if device.type == "cuda":
        print(f"peak memory of both {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    print(json.dumps({"seconds": medians, "losses": losses}))


if __name__ == "__main__":
    sys.exit(run(main))
