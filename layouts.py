"""Layouts: what everybody calls the tensors and sizes of a ViP-LLaVA, and what we call them.

The same seven billion numbers are published under many names. We rename them all, by their beginnings (PREFIXES), to
one set, the module tree of vipllava.py:

    ours                    Hugging Face's hub                  official LLaVA
    vision.…                vision_tower.vision_model.…         model.vision_tower.vision_tower.vision_model.…
    projector.layernorm.…   multi_modal_projector.projector_…   model.mm_projector.clip_layernorm.…
    projector.linear_1.…    multi_modal_projector.linear_1.…    model.mm_projector.final_linear.0.…
    llama.…                 language_model.model.…              model.…
    llama.lm_head.…         language_model.lm_head.…            lm_head.…

A config.json, of the whole or of a part, becomes a config of ours, and ours becomes Hugging Face's. What it says that would
make another network, and that is not known here, is an error, never passed over.

Pitfalls
  * The config of llava-hf/vip-llava-7b-hf speaks of one feature layer; its projector was made for five. So we count
    the projector's inputs.
  * A size that a config leaves out is the default of the transformers class, not of the model: see TEXT and VISION.
  * Phi-3 fuses q, k and v in one matrix, and gate and up in another. Cut apart, it is a LLaMA.
  * Hugging Face wants an embedding row for the image token, the official layout has none: see rows_written.
"""

import functools
import math

import torch

from chat import TEMPLATES, stop_ids
from clip import CLIP, MEAN, STD, TextConfig, VisionConfig
from llama import LlamaConfig
from tokenizer import CLIPTokenizer, Tokenizer
from vipllava import ViPLLaVAConfig

FIVE = ViPLLaVAConfig.feature_layers  # the released models'
METHOD = "vip-llava-"  # "int8" or "int4" follows: of quant.py, nothing that transformers knows


# -- names -----------------------------------------------------------------------------------------------------------

PREFIXES = {  # ours: theirs on the hub (which `save` writes), then any other; the longest that fits counts
    "vision.": (
        "vision_tower.vision_model.",
        "vision_tower.",  # saved by transformers 5
        "model.vision_tower.",  # in memory there
        "model.vision_tower.vision_model.",  # in memory in its last 4.x
        "model.vision_tower.vision_tower.vision_model.",  # official
        "vision_model.",  # CLIP
    ),
    "projector.layernorm.": (
        "multi_modal_projector.projector_layernorm.",
        "model.multi_modal_projector.projector_layernorm.",
        "model.mm_projector.clip_layernorm.",  # official
    ),
    "projector.linear_1.": ("multi_modal_projector.linear_1.", "model.mm_projector.final_linear.0."),
    "projector.linear_2.": ("multi_modal_projector.linear_2.", "model.mm_projector.final_linear.2."),
    "projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "llama.lm_head.": ("language_model.lm_head.", "lm_head."),
    "llama.": ("language_model.model.", "model.language_model.", "model."),
    "text_model.": ("text_model.",),  # CLIP's
}
IN_CLIP = {  # ours: theirs, in each of CLIP's towers
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding.": "embeddings.patch_embedding.",
    "position_embedding.": "embeddings.position_embedding.",
    "token_embedding.": "embeddings.token_embedding.",
    "pre_layernorm.": "pre_layrnorm.",  # sic
    "layers.": "encoder.layers.",
    "final_layernorm.": "final_layer_norm.",
}
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # computed here, never loaded
CLIP_REST = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # ViP-LLaVA has no use for it

_BY_LENGTH = sorted(((t, ours) for ours, theirs in PREFIXES.items() for t in theirs), key=lambda pair: -len(pair[0]))


def _swap(name: str, pairs) -> str:
    """`name` with the first beginning that fits replaced by its partner."""
    return next((new + name[len(old) :] for old, new in pairs if name.startswith(old)), name)


@functools.cache
def rename(name: str) -> str:
    """Any layout's name of a tensor -> ours. Our own names stay, and so do unknown ones."""
    for theirs, ours in _BY_LENGTH:
        if name.startswith(theirs):
            rest = name[len(theirs) :]
            in_clip = ours in ("vision.", "text_model.")
            return ours + (_swap(rest, ((t, o) for o, t in IN_CLIP.items())) if in_clip else rest)
    return name


def hub_name(name: str) -> str:
    """Our name of a tensor -> Hugging Face's, on the hub."""
    ours = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    rest = name[len(ours) :]
    return PREFIXES[ours][0] + (_swap(rest, IN_CLIP.items()) if ours == "vision." else rest)


def clip_name(name: str) -> str:
    """Our name of a tensor of a whole CLIP -> Hugging Face's."""
    tower, dot, rest = name.partition(".")
    return tower + dot + _swap(rest, IN_CLIP.items()) if tower in ("vision_model", "text_model") else name


def split_fused(name: str, x: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Phi-3's fused matrices -> LLaMA's; any other tensor alone. Rows are cut: nothing is copied."""
    if ".qkv_proj." in name:
        C = x.size(1)  # as many rows as columns are queries
        rows = [C, (x.size(0) - C) // 2, (x.size(0) - C) // 2]
        return [(name.replace("qkv_proj", n), p) for n, p in zip(("q_proj", "k_proj", "v_proj"), x.split(rows))]
    if ".gate_up_proj." in name:
        return [(name.replace("gate_up_proj", n), p) for n, p in zip(("gate_proj", "up_proj"), x.chunk(2))]
    return [(name, x)]


# -- configs, in ---------------------------------------------------------------------------------------------------------

# our field = (the key in Hugging Face's config, its default there)
TEXT = dict(
    vocab_size=("vocab_size", None), width=("hidden_size", 4096), layers=("num_hidden_layers", 32),
    heads=("num_attention_heads", 32), kv_heads=("num_key_value_heads", None), mlp=("intermediate_size", 11008),
    context=("max_position_embeddings", 2048), eps=("rms_norm_eps", 1e-6),
)
VISION = dict(
    image_size=("image_size", 224), patch_size=("patch_size", 32), width=("hidden_size", 768),
    mlp=("intermediate_size", 3072), layers=("num_hidden_layers", 12), heads=("num_attention_heads", 12),
    eps=("layer_norm_eps", 1e-5),
)
CLIP_TEXT = dict(
    vocab_size=("vocab_size", 49408), context=("max_position_embeddings", 77), width=("hidden_size", 512),
    mlp=("intermediate_size", 2048), layers=("num_hidden_layers", 12), heads=("num_attention_heads", 8),
    eps=("layer_norm_eps", 1e-5),
)
WHOLE = {  # of the whole model: the only value that is known here
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",  # the class token goes; the official layout's next
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,  # tokens around the image
}
LLAMAS = ("llama", "llava", "llava_llama")  # model_type of a decoder with TEXT's defaults
OTHERS = ("mistral", "phi3", "llava_phi3")  # with other defaults: they must spell everything out; may have a window
OFFICIAL = ("llava", "llava_llama", "llava_phi3")  # model_type of the whole, in the official layout


def _sizes(config: dict, table: dict, act: str) -> dict:
    if (given := config.get("hidden_act", act)) != act:
        raise ValueError(f"the config says hidden_act {given!r}; only {act!r} is known here")
    return {ours: _positive(config, key, default, whole=ours != "eps") for ours, (key, default) in table.items()}


def _positive(config: dict, key: str, default: float | None, whole: bool):
    value = default if config.get(key) is None else config[key]
    kind = int if whole else (int, float)
    most = 2**31 if whole else math.inf
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < most):
        raise ValueError(f"the config says {key} {value!r}; expected a {'whole ' * whole}number above 0")
    return value


def _one_of(given: dict, default: float, whole: bool):
    """The value of two keys for the same thing. ValueError: they contradict each other."""
    (key, value), (other, also) = given.items()
    if None not in (value, also) and value != also:
        raise ValueError(f"the config says {key} {value!r}, and {other} {also!r}; expected the same")
    return _positive(given, other if value is None else key, default, whole)


def section(config: dict, key: str, default: dict | None) -> dict | None:
    """An object inside a config."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, dict | None):
        raise ValueError(f"the config says {key} {value!r}; expected an object")
    return value


def vision_config(config: dict | None) -> VisionConfig:
    """From a "vision_config"; None, when there isn't any, is ViT-L/14-336."""
    return VisionConfig() if config is None else VisionConfig(**_sizes(config, VISION, "quick_gelu"))


def text_config(config: dict, rows: int) -> LlamaConfig:
    """From the config of a decoder; `rows` of embeddings where it doesn't say."""
    kind = config.get("model_type", "llama")
    if kind not in LLAMAS + OTHERS:
        raise ValueError(f"the language model is a {kind!r}; expected one of {', '.join(LLAMAS + OTHERS)}")
    needed = [key for key, _ in TEXT.values()] + ["sliding_window"] * (kind == "mistral")
    if kind in OTHERS and (silent := [key for key in needed if key not in config]):
        raise ValueError(f"the config of the language model, a {kind}, lacks {', '.join(silent)}")
    sizes = _sizes(config, TEXT, "silu")
    rope = {**section(config, "rope_scaling", {}), **section(config, "rope_parameters", {})}
    head_width = sizes["width"] // sizes["heads"]
    known = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1, "head_dim": head_width}
    for key, only in known.items():
        if (given := rope.get(key) or config.get(key) or only) != only:
            raise ValueError(f"the config of the language model says {key} {given!r}; only {only!r} is known here")
    sizes["vocab_size"] = sizes["vocab_size"] or rows
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    thetas = {"rope_theta": config.get("rope_theta"), "rope_parameters' rope_theta": rope.get("rope_theta")}
    theta = _one_of(thetas, 10_000, whole=False)
    window = _positive(config, "sliding_window", None, whole=True) if kind in OTHERS else None
    return LlamaConfig(**sizes, rope_theta=float(theta), window=window)


def clip_configs(config: dict) -> tuple[VisionConfig, TextConfig, int]:
    """Both towers of a whole CLIP, and how wide what they are projected to is."""
    text = TextConfig(**_sizes(section(config, "text_config", {}), CLIP_TEXT, "quick_gelu"))
    return vision_config(section(config, "vision_config", {})), text, _positive(config, "projection_dim", 512, whole=True)


def feature_layers(config: dict, inputs: int, width: int) -> tuple[int, ...]:
    """The layers of a tower `width` wide that a projector with so many inputs was made for."""
    given = {}
    for key in ("vision_feature_layers", "vision_feature_layer"):  # both are about, each for one and for many
        value = [] if config.get(key) is None else config[key]
        given[key] = tuple(value) if isinstance(value, list) else (value,)
        if not all(type(layer) is int for layer in given[key]):
            raise ValueError(f"the config says {key} {value!r}; expected whole numbers")
    fitting = {layers for layers in given.values() if len(layers) * width == inputs}
    if len(fitting) == 1:
        return fitting.pop()
    if max(map(len, given.values())) <= 1 and len(FIVE) * width == inputs:
        return FIVE
    raise ValueError(
        f"the projector reads {inputs} channels, the tower is {width} wide; expected {inputs / width:g} layers as "
        f'"vision_feature_layers" in the config, got {given}'
    )


def join_configs(config: dict, text: LlamaConfig, vision: VisionConfig, inputs: int, tokenizer: Tokenizer):
    """The whole model's configuration; what `config` leaves open the projector's inputs and the tokenizer tell."""
    for key, only in WHOLE.items():
        if (given := config.get(key)) not in (None, only):
            raise ValueError(f"the config says {key} {given!r}; only {only!r} is known here")
    needs = {"<|eot_id|>": "llava_llama_3", "<|end|>": "llava_phi_3"}  # tokens that only these templates have
    template = config.get("template") or next((needs[t] for t in needs if t in tokenizer.specials), "llava_v1")
    if template not in list(TEMPLATES):
        raise ValueError(f"the config says template {template!r}; expected one of {', '.join(TEMPLATES)}")
    # The official layout has no image token. Its first free id is the first without a token, or without a row.
    free = min(text.vocab_size, 1 + max(tokenizer.vocab_size - 1, *tokenizer.specials.values()))
    free = tokenizer.specials.get("<image>", free)  # a decoder may come from another LLaVA
    image = _one_of({key: config.get(key) for key in ("image_token_index", "image_token_id")}, free, whole=True)
    if image < (words := max(tokenizer.vocab_size, 1 + max(stop_ids(tokenizer, template)))):
        raise ValueError(f"<image> is token {image}; expected {words} or more, as nothing from it on is ever said")
    layers, L = feature_layers(config, inputs, vision.width), vision.layers
    if not all(-L - 1 <= i <= L for i in layers):
        raise ValueError(f"feature layers {layers} came with an image tower of {L}; expected some of {-L - 1}…{L}")
    return ViPLLaVAConfig(
        vision=vision,
        text=text,
        feature_layers=layers,
        projector_eps=_positive(config, "projector_layernorm_eps", 1e-5, whole=False),
        image_token_id=image,
        template=template,
    )


# -- configs, out ----------------------------------------------------------------------------------------------------


def rows_written(config: ViPLLaVAConfig) -> int:
    """Embedding rows in Hugging Face's layout: room for <image> and <pad>, to a multiple of 64 if more are needed."""
    needed = config.image_token_id + 2
    return config.text.vocab_size if needed <= config.text.vocab_size else -(-needed // 64) * 64


def image_processor(S: int) -> dict:
    """Hugging Face's preprocessor_config.json for images of S x S pixels."""
    image = {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3}
    image |= {"size": {"shortest_edge": S}, "do_center_crop": True, "crop_size": {"height": S, "width": S}}
    image |= {"do_rescale": True, "rescale_factor": 1 / 255}
    return image | {"do_normalize": True, "image_mean": MEAN, "image_std": STD}


def config_json(c: ViPLLaVAConfig, rows: int) -> dict:
    """Hugging Face's config.json with every size spelled out; "template" is our own."""
    text = {key: getattr(c.text, ours) for ours, (key, _) in TEXT.items()}
    text |= {"model_type": "llama", "vocab_size": rows, "hidden_act": "silu"}
    text |= {"rope_theta": c.text.rope_theta, "head_dim": c.text.head_width, "tie_word_embeddings": False}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": c.text.rope_theta}}  # transformers 5
    if c.text.window is not None:  # Mistral is LLaMA with a window
        text |= {"model_type": "mistral", "sliding_window": c.text.window}
    vision = {key: getattr(c.vision, ours) for ours, (key, _) in VISION.items()}
    scheme = {"quantization_config": {"quant_method": METHOD + c.quantized}} if c.quantized else {}
    return scheme | {
        "model_type": "vipllava",
        "architectures": ["VipLlavaForConditionalGeneration"],
        "template": c.template,
        "image_token_index": c.image_token_id,
        "image_seq_length": c.vision.patches,
        "vision_feature_layers": list(c.feature_layers),
        "vision_feature_layer": list(c.feature_layers),  # transformers 5
        "projector_hidden_act": "gelu",
        "projector_layernorm_eps": c.projector_eps,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **vision},
    }


def clip_config_json(clip: CLIP, tokenize: CLIPTokenizer) -> dict:
    """Hugging Face's config.json of a whole CLIP; "template" says that it was saved from here."""
    vision = {key: getattr(clip.vision_model.config, ours) for ours, (key, _) in VISION.items()}
    text = {key: getattr(clip.text_model.config, ours) for ours, (key, _) in CLIP_TEXT.items()}
    ends = {"bos_token_id": tokenize.begin, "eos_token_id": tokenize.end, "pad_token_id": tokenize.end}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "template": None,
        "projection_dim": clip.visual_projection.out_features,
        "logit_scale_init_value": 2.6592,
        "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **vision},
        "text_config": {"model_type": "clip_text_model", "hidden_act": "quick_gelu", **text, **ends},
    }
