"""Weights: one strict way in, from everybody's layouts (layouts.py), and one way out.

    model, tokenizer = load("7b")                    # a short name, a name on the hub, or a folder: see hub.find
    model, tokenizer = load("mucai/vip-llava-13b")   # official layout; `clip` names a tower where none is inside
    model, tokenizer = load_parts("lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336", "mm_projector.bin")
    save(model, tokenizer, "runs/mine")              # Hugging Face's layout: transformers reads it, and `load`
    clip, tokenize = load_clip("openai/clip-vit-large-patch14-336")

Loading is strict: a tensor that is missing, unexpected or of another shape is an error that names it. The model is
built without memory (on the "meta" device); files are mapped, and tensor after tensor is converted and let go. Where
nothing is to be converted the parameters *are* the mapped files, which must then stay as they are while the model
lives (to rename another file over them, as `save` does, is fine; Windows refuses it while the model lives).

Pitfalls
  * Hugging Face wants an embedding row for the image token, the official layout has none. `save` appends rows; none
    from image_token_id on is ever sampled.
  * Hugging Face's processor crops the centre of an image, and markers near the border vanish. clip.preprocess pads.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

import halves
import lora
import quant
from chat import stop_ids
from clip import CLIP
from commandline import check_device, with_bar
from files import Part, weight_files, write_tensors
from hub import find
from layouts import (CLIP_REST, FIVE, METHOD, OFFICIAL, clip_config_json, clip_configs, clip_name, config_json,
                     hub_name, image_processor, join_configs, rename, rows_written, section, text_config,
                     vision_config)
from tokenizer import CLIPTokenizer, Tokenizer, read_json, write_json
from vipllava import Projector, ViPLLaVA, ViPLLaVAConfig

DEFAULT_CLIP = "openai/clip-vit-large-patch14-336"


# -- in --------------------------------------------------------------------------------------------------------------


def load(
    path_or_name, device=None, dtype: torch.dtype | str | None = None, clip=None, quantize: str = "", ready: bool = True
) -> tuple[ViPLLaVA, Tokenizer]:
    """A ViP-LLaVA in Hugging Face's or the official layout, in eval mode, and its tokenizer.

    path_or_name: see `find`. device: None is CUDA where there is one. dtype: "stored" is that of the files, None leaves
    it to `default_dtype`. clip: another CLIP whose image tower is to be used; DEFAULT_CLIP's is where the official layout
    has none inside. quantize: "int8" or "int4", see quant.py, and `ready` for use, not to be saved. A folder with an
    adapter (lora.py) gives its base with the adapter merged.
    """
    model, tokenizer = _load(find(path_or_name), device, dtype, clip, quantize)
    return quant.pack(model) if ready else model, tokenizer


def sources(path_or_name) -> list[Path]:
    """The folders that `load` reads: the model's own, and an adapter's base's. See `find` for what it raises."""
    folders = [find(path_or_name).resolve()]
    with contextlib.suppress(FileNotFoundError):  # of a base: `load` will say so
        while (what := lora.about(folders[-1])) and (base := find(what["base"]).resolve()) not in folders:
            folders.append(base)
    return folders


def stored_dtype(path_or_name) -> torch.dtype:
    """The dtype of a model's weights in their files, which are not quantised; for an adapter, its base's. See `find` for what
    it raises."""
    return Part(weight_files(sources(path_or_name)[-1])).dtype


def _load(folder: Path, device, dtype, clip, quantize: str, heirs: tuple[Path, ...] = ()) -> tuple[ViPLLaVA, Tokenizer]:
    """heirs: the adapters whose base the folder is."""
    if what := lora.about(folder):
        if folder.resolve() in heirs:
            raise ValueError(f"{folder} is an adapter whose base, {what['base']}, leads back to it; expected a whole model")
        try:
            base = find(what["base"])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} is an adapter of a model that can't be found: {error}") from None
        model, tokenizer = _load(base, device, dtype, clip, "", (*heirs, folder.resolve()))
        if model.config.quantized:
            raise ValueError(f"{folder} is an adapter of {what['base']}, which is {model.config.quantized}; expected 16 bits")
        model = lora.merge(lora.load(model, folder)).requires_grad_(True)
        model.config = replace(model.config, template=what["template"] or model.config.template)
        return quant.quantize(model, quantize) if quantize else model, tokenizer
    config = read_json(folder / "config.json")
    kind, tower = config.get("model_type"), str(config.get("mm_vision_tower"))
    official = kind in OFFICIAL and "clip_4layers_336" in tower
    if kind != "vipllava" and not official:
        raise ValueError(
            f"{folder}/config.json says model_type {kind!r}, mm_vision_tower {tower!r}; expected vipllava, or "
            f"{', '.join(OFFICIAL)} with clip_4layers_336"
        )
    method = section(config, "quantization_config", {}).get("quant_method", "")
    schemes = {METHOD + scheme: scheme for scheme in quant.SCHEMES}
    if method not in ("", *schemes):
        raise ValueError(f"{folder}/config.json says quant_method {method!r}; expected none, or {' or '.join(schemes)}")
    parts = [Part(weight_files(folder), ("vision.",) if clip else (), schemes.get(method, ""))]
    vision = section(config, "vision_config", None)
    if official and not clip and not any(name.startswith("vision.") for name in parts[0].shapes):
        clip = DEFAULT_CLIP
    if clip:
        part, vision = _tower(clip)
        parts.append(part)
    text = config if official else section(config, "text_config", {})
    return _assemble(config, text, vision, parts, Tokenizer.load(folder), device, dtype, quantize=quantize)


def load_parts(llm, clip=DEFAULT_CLIP, projector=None, device=None, dtype: torch.dtype | None = None):
    """A ViP-LLaVA from a language model (Vicuna, Llama-3, Phi-3), a CLIP and an mm_projector.bin, and its tokenizer.

    Each is a folder or a name, see `find`; `projector` may be the file. None makes a new one for FIVE layers, from
    PyTorch's global generator: the start of stage 1.
    """
    folder = find(llm)
    part, vision = _tower(clip)
    parts = [Part(weight_files(folder)), part]
    if projector is not None:
        file = Path(os.path.expanduser(projector))
        parts.append(Part((file if file.is_file() else find(projector) / "mm_projector.bin",)))
    text = read_json(folder / "config.json")
    return _assemble({}, text, vision, parts, Tokenizer.load(folder), device, dtype, fresh=projector is None)


def _tower(clip) -> tuple[Part, dict]:
    """The image tower of a CLIP checkpoint, and its config."""
    folder = find(clip)
    return Part(weight_files(folder), drop=CLIP_REST), section(_clip_config(folder), "vision_config", {})


def _clip_config(folder: Path) -> dict:
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise ValueError(f"{folder / 'config.json'} says model_type {config.get('model_type')!r}; expected clip")
    return config


def _assemble(
    config, text, vision, parts, tokenizer, device, dtype, fresh=False, quantize=""
) -> tuple[ViPLLaVA, Tokenizer]:
    """Configs of the whole, of the decoder and of the tower, and files -> a model; `fresh`: with a new projector."""
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    text = text_config(text, rows=shapes.get("llama.embed_tokens.weight", (0,))[0])
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} pieces, the model {text.vocab_size} rows for them; "
                         "expected the model's own")
    vision = vision_config(vision)
    inputs = shapes.get("projector.layernorm.weight", (len(FIVE) * vision.width,))[0]
    config = join_configs(config, text, vision, inputs, tokenizer)
    with torch.device("meta"), Unfilled():
        model = ViPLLaVA(config)
    if parts[0].scheme:
        quant.swap(model, parts[0].scheme)
    projector = {f"projector.{name}": x for name, x in Projector(config).state_dict().items()} if fresh else {}
    return fill(model, parts, device, dtype, projector, quantize), tokenizer


# -- a model, filled --------------------------------------------------------------------------------------------------


class Unfilled(TorchFunctionMode):
    """Layers made within are not initialised. On the meta device that would change nothing, but import torch's compiler,
    and a small model would take twice as long to answer."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def fill(model: nn.Module, parts: list[Part], device, dtype, fresh=(), quantize="") -> nn.Module:
    """Give a model on the meta device its weights: from files, and from `fresh`, our names -> tensors; eval mode.
    quantize: as each is read, see quant.py."""
    if dtype not in (None, "stored", torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f'dtype is {dtype!r}; expected torch.float32, torch.bfloat16, torch.float16, "stored" or None')
    fresh = dict(fresh)
    found = {name: tuple(x.shape) for name, x in fresh.items()}
    for part in parts:
        if twice := found.keys() & part.shapes.keys():
            raise ValueError(f"{part.files[0].parent} holds {min(twice)}, which came already; expected it once")
        found |= part.shapes
    expected = {rename(name): tuple(x.shape) for name, x in model.state_dict().items()}
    wrong = [f"{n} {list(s)} is missing" for n, s in expected.items() if n not in found]
    wrong += [f"{n} {list(s)} is unexpected" for n, s in found.items() if n not in expected]
    both = [(n, list(found[n]), list(s)) for n, s in expected.items() if found.get(n, s) != s]
    wrong += [f"{n} is {theirs} in the file, {ours} by the config" for n, theirs, ours in both]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"the weights in {parts[0].files[0].parent} don't fit: {'; '.join(wrong[:4])}{more}")

    if quantize:
        quant.swap(model, quantize)
    device = check_device(device)
    size = sum(p.numel() for p in model.parameters()) + sum(x.nbytes for x in model.buffers()) // 4
    stored = parts[0].dtype
    dtype = stored if dtype == "stored" else dtype or default_dtype(device, size, stored)
    tensors = {name: x.to(device, dtype) for name, x in fresh.items()}
    pairs = (pair for part in parts for pair in part.read(device, dtype, passing=bool(quantize)))
    reading = with_bar(pairs, "weights", len(found) - len(fresh))
    tensors.update(quant.compress(reading, quantize) if quantize else reading)
    model.load_state_dict({name: tensors[rename(name)] for name in model.state_dict()}, assign=True)
    if dtype.itemsize == 2 and device.type == "cpu":
        halves.widen(model)
    return model.eval()


def default_dtype(device: torch.device, parameters: int, stored: torch.dtype) -> torch.dtype:
    """On an accelerator the 16 bits in which the weights are stored, else bfloat16; on a CPU float32, which is faster
    there, unless it exceeds the free memory."""
    if device.type != "cpu":
        return stored if stored.itemsize == 2 else torch.bfloat16
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):  # not Linux: count all of the memory, or what most computers have at least
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8e9
    with contextlib.suppress(OSError, ValueError):  # there is no limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))  # a container's
    return torch.float32 if 1.15 * 4 * parameters < free else torch.bfloat16


# -- out -------------------------------------------------------------------------------------------------------------

WRITTEN = re.compile(  # the files of a model
    r"((generation_|tokenizer_|preprocessor_|processor_)?config|tokenizer|model\.safetensors\.index)\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|vocab\.json|merges\.txt"
)


def save(model: ViPLLaVA, tokenizer: Tokenizer, folder, shard_bytes: float = 5e9, state: dict | None = None, dtype=None) -> None:
    """Write Hugging Face's VipLlava layout; the weights in files of at most `shard_bytes` (or of one tensor). state:
    the model's, where its own tensors are shares of several processes. dtype: of all weights; None: each one's own.

    All is written to a hidden folder beside. Where `folder` is new, that is renamed; else its files are moved over,
    and till the last has come config.json says so: a model is whole, or it doesn't load. A model that `save` wrote is
    replaced, other files stay. Raises ValueError, before anything is written, where another model would be lost, for
    adapters that are not merged, and for quantised weights that were made ready for one device, or get a dtype.
    """
    if any(getattr(layer, "packed", False) for layer in model.modules()):
        raise ValueError("the weights are laid out for one device; expected a model loaded with ready=False")
    if lora.adapters(model):
        raise ValueError("the model has adapters that are not merged; expected lora.merge before, or lora.save")
    if dtype and model.config.quantized:
        raise ValueError(f"dtype {dtype} came with a model that is {model.config.quantized}; expected None")
    with _beside(folder) as beside:
        _write_weights(model.config, state or model.state_dict(), beside, shard_bytes, dtype)
        _write_configs(model, tokenizer, beside, dtype or model.llama.embed_tokens.weight.dtype)


@contextlib.contextmanager
def _beside(folder) -> Iterator[Path]:
    """A hidden folder to write a model into; in the end it is put into `folder`, or removed after an error."""
    folder = check_target(folder)
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)  # of a save that was killed
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside)
        raise
    _publish(beside, folder)


def check_target(folder, adapter: bool = False) -> Path:
    """The folder, if `save` may write there, or `adapter`: lora.save. ValueError: a file or another model would be lost, or
    an adapter and a model lie in one folder, of which only the adapter would be found."""
    if not str(folder):
        raise ValueError("the folder is ''; expected a name")
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder, or a name that is free")
    beside = "config.json" if adapter else lora.FILE
    if (folder / beside).is_file():
        this, other = ("an adapter", "a model") if adapter else ("a model", "an adapter")
        raise ValueError(f"{folder} holds {other}, {beside}; expected another folder for {this}")
    if folder.is_dir() and any(WRITTEN.fullmatch(item.name) for item in folder.iterdir()):
        if "template" not in (read_json(folder / "config.json") if (folder / "config.json").is_file() else {}):
            raise ValueError(f"{folder} holds a model that was not saved from here; expected another folder")
    return folder


def check_free(folder) -> Path:
    """The same for a command that makes a model out of another: nothing that is there already is replaced."""
    folder = check_target(folder)
    if (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds a model already; expected a folder without one")
    return folder


def _publish(beside: Path, folder: Path) -> None:
    """Put what lies `beside` into `folder`."""
    if not folder.exists():
        beside.rename(folder)
        return
    write_json(beside / "half.json", {"model_type": f"half a vipllava: the rest is in {beside}", "template": None})
    (beside / "half.json").replace(folder / "config.json")
    new = {item.name for item in beside.iterdir()}
    for item in folder.iterdir():
        if WRITTEN.fullmatch(item.name) and item.name not in new:  # of an earlier model with more shards
            item.unlink()
    for name in sorted(new, key=lambda name: name == "config.json"):  # this one last
        (beside / name).replace(folder / name)
    beside.rmdir()


def _write_weights(config: ViPLLaVAConfig, state: dict, folder: Path, shard_bytes: float, dtype: torch.dtype | None) -> None:
    shards, size, more = [[]], 0, rows_written(config) - config.text.vocab_size
    for name, p in state.items():
        bytes_of = p.numel() * (dtype or p.dtype).itemsize
        if size and size + bytes_of > shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += bytes_of
    places, total = {}, 0
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        # On a CPU these are no copies, unless their type changes.
        tensors = {hub_name(name): state[name].to("cpu", dtype or state[name].dtype).contiguous() for name in names}
        for name in [name for name in names if more and name.startswith(("llama.embed_tokens.", "llama.lm_head."))]:
            x = tensors[hub_name(name)]
            # A head's mean row is never the likeliest token. (Quantised it is any row: transformers can't read it, we don't.)
            mean = x.float().mean(dim=0, keepdim=True).to(x.dtype)
            tensors[hub_name(name)] = torch.cat([x, mean.expand(more, *x.shape[1:])])
        write_tensors(tensors, folder / file)
        places.update(dict.fromkeys(tensors, file))
        total += sum(x.nbytes for x in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def _write_configs(model: ViPLLaVA, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    c, S, rows = model.config, model.config.vision.image_size, rows_written(model.config)
    pad = tokenizer.specials.get("<pad>", c.image_token_id + 1)
    tokenizer.save(folder, {"<image>": c.image_token_id, "<pad>": pad})
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": pad}
    about = {**config_json(c, rows), **ends, "torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", about)
    ends["eos_token_id"] = sorted(stop_ids(tokenizer, c.template))
    silent = list(range(c.image_token_id, rows))  # transformers shall not sample untrained rows either
    write_json(folder / "generation_config.json", {**ends, "suppress_tokens": silent})
    write_json(folder / "preprocessor_config.json", image_processor(S))
    words = {"processor_class": "LlavaProcessor", "patch_size": c.vision.patch_size, "image_token": "<image>"}
    words |= {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}  # the class token
    write_json(folder / "processor_config.json", words)


# -- CLIP by itself --------------------------------------------------------------------------------------------------


def load_clip(path_or_name: str | Path, device=None, dtype: torch.dtype | None = None) -> tuple[CLIP, CLIPTokenizer]:
    """A whole official CLIP and `tokenize`, texts -> ids (M, T), ended and padded to the longest by end-of-text."""
    folder = find(path_or_name)
    vision, text, projection = clip_configs(_clip_config(folder))
    with torch.device("meta"), Unfilled():
        model = CLIP(vision, text, projection)
    return fill(model, [Part(weight_files(folder))], device, dtype), CLIPTokenizer.load(folder, text.context)


def save_clip(clip: CLIP, tokenize: CLIPTokenizer, folder: str | Path) -> None:
    """Write a whole CLIP in Hugging Face's layout: `load_clip` and transformers' CLIPModel read it."""
    with _beside(folder) as beside:
        tensors = {clip_name(name): x.cpu().contiguous() for name, x in clip.state_dict().items()}
        write_tensors(tensors, beside / "model.safetensors")
        tokenize.save(beside)
        write_json(beside / "config.json", clip_config_json(clip, tokenize))
        write_json(beside / "preprocessor_config.json", image_processor(clip.vision_model.config.image_size))
