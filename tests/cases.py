"""The shapes, weights and inputs that make_golden.py (with transformers) and the tests (with our models) share.

Nothing random is stored in tests/golden: both sides make the same numbers from a name and a seed. Uniform numbers of
NumPy's PCG64 are exact to the bit on every platform, so a golden file holds ids and outputs only.

In every shape all dimensions differ pairwise, or else a transposed view or a swapped pair would pass unseen. Only
heads and kv_heads are equal where queries are not grouped.
"""

import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


# -- weights and inputs from names -----------------------------------------------------------------------------------


def uniform(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float64 in -1 … 1, a pure function of its arguments."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).random(tuple(shape)) * 2 - 1


def weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The parameter of our name `name`, large enough that a mistake anywhere shows in the output.

    Norms are far from 1, biases far from 0, attention is far from uniform. The residual stream, from the embeddings
    to the last norm, is small (variance about 1e-3), so that an eps of 1e-6 in place of 1e-5 shows too. Not so in a
    whole model's llama: there a word is as large as a patch, or a greedy answer would be one word over and over.
    """
    u = uniform(name, shape, seed)
    layer, kind = ("." + name).split(".")[-2:]
    small = 1.0 if name.startswith("llama.") else 0.05
    if kind == "logit_scale":
        value = 2 + u
    elif "pre_layernorm" in layer:  # begins the residual stream
        value = 0.05 * (1 + 0.5 * u) if kind == "weight" else 0.02 * u
    elif "norm" in layer and kind == "weight":
        value = 1 + 0.5 * u
    elif "patch_embedding" in layer:
        value = 0.06 / np.prod(shape[1:]) ** 0.5 * u
    elif "embed" in name:
        value = small * u
    else:
        value = 0.3 * u if kind == "bias" else 1.5 * (3 / shape[1]) ** 0.5 * u  # deviation 1.5 / sqrt(fan-in)
        if layer in ("out_proj", "fc2", "o_proj", "down_proj"):  # adds to the residual stream
            value = small * value
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int):
    """Give every parameter of one of our models its value; returns the model, in eval mode."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weight(name, parameter.shape, seed))
    return model.eval()


def random_pixels(count: int, size: int, seed: int) -> torch.Tensor:
    """(count, 3, size, size) with the range of normalised pixels."""
    return torch.from_numpy((2 * uniform("pixels", (count, 3, size, size), seed)).astype(np.float32))


def random_ids(shape: tuple[int, ...], vocab_size: int, seed: int) -> torch.Tensor:
    return torch.from_numpy((np.random.default_rng([seed, 1]).random(shape) * vocab_size).astype(np.int64))


def random_image(width: int, height: int, seed: int) -> np.ndarray:
    """(height, width, 3) bytes: noise over a slope, so that a shift by one pixel is seen."""
    noise = np.random.default_rng([seed, width, height]).random((height, width, 3))
    slope = (np.arange(width)[None, :, None] + 2 * np.arange(height)[:, None, None]) / (width + 2 * height)
    return ((0.5 * noise + 0.5 * slope) * 255).astype(np.uint8)


def load_golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def relative_error(ours: torch.Tensor, golden: torch.Tensor) -> float:
    """Largest absolute error over the largest absolute value; shapes must agree, nothing is broadcast."""
    assert ours.shape == golden.shape, (ours.shape, golden.shape)
    return ((ours.double() - golden.double()).abs().max() / golden.double().abs().max()).item()


# -- shapes: keyword arguments of our configurations -----------------------------------------------------------------

VISION = {  # grid 5, 25 patches; grid 7, 49; grid 7, 49
    "one layer": dict(
        vision=dict(image_size=35, patch_size=7, width=24, layers=8, heads=6, mlp=40, eps=1e-5),
        layers=(-2,), images=2, seed=11,
    ),
    "released layers": dict(
        vision=dict(image_size=42, patch_size=6, width=32, layers=12, heads=4, mlp=44, eps=1e-5),
        layers=(-2, -5, -8, -11, 6), images=1, seed=12,
    ),
    "first and last": dict(
        vision=dict(image_size=28, patch_size=4, width=24, layers=8, heads=2, mlp=36, eps=1e-6),
        layers=(0, 8, -4, 3, -8), images=1, seed=13,
    ),
}

CONTRASTIVE = {  # lengths: of the texts, end of text included
    "wide eye": dict(
        vision=dict(image_size=35, patch_size=7, width=24, layers=8, heads=6, mlp=40, eps=1e-5),
        text=dict(vocab_size=61, context=11, width=36, layers=13, heads=2, mlp=28, eps=1e-5),
        projection=19, images=9, lengths=(9, 8, 7, 2, 5, 10, 3, 4, 6, 1, 9, 10), seed=21,
    ),
    "wide voice": dict(  # a large eps: unit length hides most of what the last norm's does
        vision=dict(image_size=20, patch_size=4, width=22, layers=8, heads=11, mlp=32, eps=1e-3),
        text=dict(vocab_size=53, context=13, width=42, layers=9, heads=7, mlp=29, eps=1e-3),
        projection=15, images=1, lengths=(12, 2, 7, 5, 11, 3, 8, 4, 9, 6), seed=22,
    ),
}

LLAMA = {
    "grouped": dict(
        llama=dict(vocab_size=97, width=48, layers=3, heads=6, kv_heads=2, mlp=80, context=64,
                   rope_theta=5e5, eps=1e-5),
        tokens=11, prefill=7, lengths=(5, 9, 1, 10), seed=31,
    ),
    "ungrouped": dict(
        llama=dict(vocab_size=83, width=40, layers=5, heads=4, kv_heads=4, mlp=56, context=70,
                   rope_theta=1e4, eps=1e-6),
        tokens=13, prefill=9, lengths=(11, 2, 6), seed=32,
    ),
    "one key head": dict(
        llama=dict(vocab_size=71, width=60, layers=4, heads=10, kv_heads=1, mlp=44, context=50,
                   rope_theta=1e4, eps=1e-5),
        tokens=17, prefill=8, lengths=(3, 12), seed=33,
    ),
    "windowed": dict(  # Phi-3, whose fused weights are these, one after the other
        llama=dict(vocab_size=89, width=56, layers=3, heads=4, kv_heads=2, mlp=40, context=72,
                   rope_theta=1e4, eps=1e-5, window=5),
        tokens=19, prefill=11, lengths=(4, 16, 9, 1, 6, 12), seed=34,
    ),
}

VIPLLAVA = {  # prompts: numbers of words, None for an image; seeds: greedy answers vary and are never nearly a tie
    "one layer": dict(
        vision=dict(image_size=35, patch_size=7, width=36, layers=8, heads=9, mlp=40, eps=1e-5),
        text=dict(vocab_size=97, width=60, layers=11, heads=10, kv_heads=2, mlp=52, context=128,
                  rope_theta=5e5, eps=1e-5),
        feature_layers=(-2,), image_token_id=91, prompts=((3, None, 4), (6,), (1, None, 2, None, 5)), seed=201,
    ),
    "released layers": dict(
        vision=dict(image_size=28, patch_size=4, width=48, layers=12, heads=6, mlp=44, eps=1e-5),
        text=dict(vocab_size=83, width=90, layers=2, heads=9, kv_heads=1, mlp=70, context=160,
                  rope_theta=1e4, eps=1e-5),
        feature_layers=(-2, -5, -8, -11, 6), image_token_id=77, prompts=((2, None, 6), (4,)), seed=102,
    ),
    "first and last": dict(
        vision=dict(image_size=42, patch_size=6, width=32, layers=11, heads=4, mlp=36, eps=1e-5),
        text=dict(vocab_size=89, width=90, layers=2, heads=9, kv_heads=9, mlp=76, context=170,
                  rope_theta=1e4, eps=1e-6),
        feature_layers=(0, 11, -2, 4, -9), image_token_id=80, prompts=((1, None, 3), (5, None)), seed=123,
    ),
}
NEW_TOKENS = 32
LOGITS_KEPT = 20  # of the last tokens of a prompt; the others only reach these through attention
BATCH_STEPS = 3  # tokens decoded after the left-padded batch

IMAGES = ((37, 53), (61, 20), (1, 9), (8, 1), (23, 23), (14, 29))  # width, height
IMAGE_SIZES = (14, 15)


def dimensions(case: dict) -> dict[str, int]:
    """Every size that occurs in a case's tensors, by name: those that are to differ."""
    sizes = {"channels": 3} if "vision" in case else {}
    for part in ("vision", "text", "llama"):
        c = case.get(part, {})
        sizes |= {f"{part} {key}": c[key] for key in c if key not in ("eps", "rope_theta")}
        if c:
            sizes[f"{part} head width"] = c["width"] // c["heads"]
        if part == "vision" and c:
            grid = c["image_size"] // c["patch_size"]
            sizes |= {"grid": grid, "patches": grid**2, "patches and class": grid**2 + 1}
    if "feature_layers" in case or "layers" in case:
        sizes["feature layers"] = len(case.get("feature_layers", case.get("layers")))
    if "lengths" in case:
        sizes |= {"rows": len(case["lengths"]), "longest row": max(case["lengths"])}
    return sizes | {key: case[key] for key in ("images", "projection", "image_token_id", "tokens") if key in case}


def equal_dimensions(case: dict) -> list[tuple[str, str]]:
    """The pairs of equal dimensions, heads and kv_heads left out: none in a good case."""
    pairs = [(a, b) for (a, m), (b, n) in combinations(dimensions(case).items(), 2) if m == n]
    return [(a, b) for a, b in pairs if not (a.endswith(" heads") and b.endswith(" kv_heads"))]


def projector_features(case: dict) -> torch.Tensor:
    """(2, 3, L · Cv), of a variance that an eps of 1e-6 in place of 1e-5 changes visibly."""
    width = len(case["feature_layers"]) * case["vision"]["width"]
    return torch.from_numpy((0.02 * uniform("features", (2, 3, width), case["seed"])).astype(np.float32))


def contrastive_ids(case: dict) -> torch.Tensor:
    """Texts that end with the largest id, and are padded with it, as CLIP's are."""
    end = case["text"]["vocab_size"] - 1
    ids = torch.full((len(case["lengths"]), max(case["lengths"])), end)
    for row, length in zip(ids, case["lengths"]):
        row[: length - 1] = random_ids((length - 1,), end, case["seed"] + length)
    return ids


def llama_batch(case: dict, ids: torch.Tensor) -> list[torch.Tensor]:
    """The unequal prompts of a case, cut from ids (1, T) at various places."""
    return [ids[0, i : i + n] for i, n in enumerate(case["lengths"])]


def prompts_of(case: dict, image: int) -> list[list[int]]:
    """The prompts of a ViP-LLaVA case, with one `image` id for each image."""
    prompts = []
    for i, parts in enumerate(case["prompts"]):
        prompts.append([])
        for j, n in enumerate(parts):
            seed = 100 * case["seed"] + 10 * i + j
            prompts[-1] += [image] if n is None else random_ids((n,), case["image_token_id"], seed).tolist()
    return prompts


def training_rows(case: dict, image: int) -> tuple[list[list[int]], list[list[int]]]:
    """Each prompt of a ViP-LLaVA case with an answer: ids, with one `image` id for each image, and labels."""
    rows = []
    for i, prompt in enumerate(prompts_of(case, image)):
        answer = random_ids((5 + 2 * i,), case["image_token_id"], 1000 * case["seed"] + i).tolist()
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    return tuple(map(list, zip(*rows)))


TRAINING_STEPS, TRAINING_RATE = 20, 1e-3


def fingerprint(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """(number of tensors, 2), by name: the norm, and the product with fixed random numbers.

    Without the keys' biases: a softmax does not see them, so their gradients are rounding errors around zero.
    """
    rows = []
    for name in sorted(name for name in values if not name.endswith("k_proj.bias")):
        x = values[name].detach().double()
        r = torch.from_numpy(uniform(f"fingerprint {name}", x.shape, 0))
        rows.append([x.norm().item(), (x * r).sum().item()])
    return torch.tensor(rows, dtype=torch.float64)
