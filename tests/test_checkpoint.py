"""checkpoint.py and layouts.py: every layout in, Hugging Face's out, strictly. All files are small and made here.

    python -m pytest tests/test_checkpoint.py      # the comparison with transformers is tests/compare_transformers.py
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import files
import halves
import layouts
from chat import IMAGE
from clip import CLIP, TextConfig, VisionConfig, preprocess
from generate import generate
from llama import LlamaConfig
from tokenizer import Tokenizer
from vipllava import ViPLLaVA, ViPLLaVAConfig

VISION = VisionConfig(image_size=21, patch_size=7, width=24, layers=11, heads=3, mlp=40)
TEXT = LlamaConfig(width=32, layers=5, heads=8, kv_heads=2, mlp=56, context=128, rope_theta=5e3, eps=1e-4)
TOKENIZER = Tokenizer.train(["the red arrow points to a blue box"] * 3, 301)
VOCAB = TOKENIZER.vocab_size
VISION_JSON = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 11, "num_attention_heads": 3,
               "image_size": 21, "patch_size": 7}
TEXT_JSON = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 5, "num_attention_heads": 8,
             "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-4, "rope_theta": 5e3,
             "vocab_size": VOCAB}


def make(**more) -> ViPLLaVA:
    text = replace(TEXT, vocab_size=VOCAB)
    torch.manual_seed(0)
    model = ViPLLaVA(ViPLLaVAConfig(VISION, text, **{"image_token_id": VOCAB, **more})).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module")
def model() -> ViPLLaVA:
    return make()


def same_answers(a: ViPLLaVA, b: ViPLLaVA) -> bool:
    """The same logits, to the last bit, and the same sampled tokens?"""
    ids = torch.tensor([[1, 7] + [IMAGE] * 9 + [8, 260]])
    pixels = torch.randn(1, 3, 21, 21, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x, y = (m.llama.lm_head(m(ids, pixels))[..., :VOCAB] for m in (a, b))
    assert x.std() > 0.1  # a model of zeros would agree with any other
    options = dict(max_new_tokens=9, temperature=1.0)
    seeds = [torch.Generator().manual_seed(2) for _ in (a, b)]
    one, two = (list(generate(m, [[1, 7, IMAGE, 8]], pixels, generator=g, **options)) for m, g in zip((a, b), seeds))
    return torch.equal(x, y) and one == two and len(one) == 9


# Written out by hand from the published files, not made by the code under test.
HUB = {
    "vision.class_embedding": "vision_tower.vision_model.embeddings.class_embedding",
    "vision.patch_embedding.weight": "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "vision.position_embedding.weight": "vision_tower.vision_model.embeddings.position_embedding.weight",
    "vision.pre_layernorm.bias": "vision_tower.vision_model.pre_layrnorm.bias",
    "vision.layers.7.self_attn.q_proj.weight": "vision_tower.vision_model.encoder.layers.7.self_attn.q_proj.weight",
    "vision.layers.7.layer_norm2.weight": "vision_tower.vision_model.encoder.layers.7.layer_norm2.weight",
    "vision.post_layernorm.weight": "vision_tower.vision_model.post_layernorm.weight",
    "projector.layernorm.weight": "multi_modal_projector.projector_layernorm.weight",
    "projector.linear_1.bias": "multi_modal_projector.linear_1.bias",
    "projector.linear_2.weight": "multi_modal_projector.linear_2.weight",
    "llama.embed_tokens.weight": "language_model.model.embed_tokens.weight",
    "llama.layers.3.mlp.gate_proj.weight": "language_model.model.layers.3.mlp.gate_proj.weight",
    "llama.norm.weight": "language_model.model.norm.weight",
    "llama.lm_head.weight": "language_model.lm_head.weight",
}


def new_style(hub: str) -> str:
    return hub.replace("vision_tower.vision_model.", "vision_tower.")


def in_memory(hub: str) -> str:
    hub = new_style(hub).replace("language_model.model.", "language_model.")
    return hub.removeprefix("language_model.") if "lm_head" in hub else "model." + hub


def official(hub: str) -> str:
    for old, new in (("vision_tower.", "model.vision_tower.vision_tower."), ("language_model.", ""),
                     ("multi_modal_projector.projector_layernorm", "model.mm_projector.clip_layernorm"),
                     ("multi_modal_projector.linear_1", "model.mm_projector.final_linear.0"),
                     ("multi_modal_projector.linear_2", "model.mm_projector.final_linear.2")):
        hub = hub.replace(old, new)
    return hub


def in_memory_4(hub: str) -> str:
    return in_memory(hub).replace("model.vision_tower.", "model.vision_tower.vision_model.")


SPELLINGS = {"hub": str, "transformers 5": new_style, "in memory": in_memory, "in memory, 4.x": in_memory_4,
             "official": official}


def test_names(model):
    """Guards against: a part renamed to another's place, CLIP's misspelling lost, a name with no way back."""
    for ours, hub in HUB.items():
        assert layouts.hub_name(ours) == hub
        for spell in SPELLINGS.values():
            assert layouts.rename(spell(hub)) == ours, spell(hub)
    assert in_memory(HUB["llama.norm.weight"]) == "model.language_model.norm.weight"
    assert official(HUB["projector.linear_2.weight"]) == "model.mm_projector.final_linear.2.weight"
    assert official(HUB["llama.norm.weight"]) == "model.norm.weight"
    for ours in model.state_dict():
        assert layouts.rename(layouts.hub_name(ours)) == layouts.rename(ours) == ours


# -- layouts, written by hand ----------------------------------------------------------------------------------------


def write(folder: Path, config: dict, tensors: dict, kind: str = "safetensors", tokenizer=TOKENIZER) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:  # shards of a third each
        end, stem = ("safetensors", "model") if kind == "safetensors shards" else ("bin", "pytorch_model")
        files = [f"{stem}-{i + 1:05}-of-00003.{end}" for i in range(3)]
        places = {name: files[3 * i // len(tensors)] for i, name in enumerate(tensors)}
        for file in files:
            shard = {name: tensors[name] for name in tensors if places[name] == file}
            save_file(shard, folder / file) if end == "safetensors" else torch.save(shard, folder / file)
        index = folder / f"{stem}.{end}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def tensors_of(model, spell, begin=("",)) -> dict:
    state = {n: x.detach().clone() for n, x in model.state_dict().items() if n.startswith(begin)}
    return {spell(layouts.hub_name(n)): x for n, x in state.items()}


HF = {"model_type": "vipllava", "image_token_index": VOCAB, "text_config": TEXT_JSON, "vision_config": VISION_JSON}
OFFICIAL = {"model_type": "llava", "mm_vision_tower": "clip_4layers_336", "vision_config": VISION_JSON, **TEXT_JSON}
KINDS = ("safetensors", "bin", "safetensors shards", "bin shards")


def write_clip(folder: Path, model) -> Path:
    """A whole CLIP, whose image tower is the model's."""
    torch.manual_seed(5)
    text = TextConfig(vocab_size=99, context=17, width=36, layers=2, heads=6, mlp=52)
    clip = CLIP(VISION, text, projection=20)
    clip.vision_model.load_state_dict(model.vision.state_dict())
    text_json = {"vocab_size": 99, "max_position_embeddings": 17, "hidden_size": 36, "num_hidden_layers": 2,
                 "num_attention_heads": 6, "intermediate_size": 52}
    config = {"model_type": "clip", "vision_config": VISION_JSON, "text_config": text_json, "projection_dim": 20}
    tensors = {}
    for name, x in clip.state_dict().items():
        tower, _, rest = name.partition(".")
        rest = "embeddings." + rest if "_embedding" in rest else rest.replace("pre_layernorm", "pre_layrnorm")
        rest = "encoder." + rest if rest.startswith("layers.") else rest.replace("final_layern", "final_layer_n")
        tensors[f"{tower}.{rest}" if tower.endswith("_model") else name] = x
    tensors["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    tensors["text_model.embeddings.position_ids"] = torch.arange(17)[None]
    write(folder, config, tensors, "bin")
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["hub", "transformers 5", "in memory"])
def test_hugging_face_layout(tmp_path, model, spelling, kind):
    """Guards against: a spelling of which a tensor is lost or misplaced, which would load and babble."""
    write(tmp_path, HF, tensors_of(model, SPELLINGS[spelling]), kind)
    loaded, tokenizer = checkpoint.load(tmp_path, "cpu")
    assert loaded.config == model.config and not loaded.training
    assert all(p.requires_grad and p.is_contiguous() and p.dtype == torch.float32 for p in loaded.parameters())
    assert tokenizer.encode("the red arrow") == TOKENIZER.encode("the red arrow")
    assert same_answers(loaded, model)


@pytest.mark.parametrize("kind", KINDS)
def test_official_layout(tmp_path, model, kind):
    """Guards against: rotary_emb.inv_freq of the released files taken for a weight; an image id among the words."""
    tensors = tensors_of(model, official)
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(5)}
    loaded, _ = checkpoint.load(write(tmp_path, OFFICIAL, tensors, kind), "cpu")
    assert loaded.config == model.config
    assert same_answers(loaded, model)


def test_tower_from_clip(tmp_path, model):
    """Guards against: no tower where the official layout has none; a tower asked for that is not the one used."""
    clip = write_clip(tmp_path / "clip", model)
    bare = write(tmp_path / "bare", OFFICIAL, tensors_of(model, official, ("llama.", "projector.")), "bin shards")
    assert same_answers(checkpoint.load(bare, "cpu", clip=clip)[0], model)
    other = make()
    other.vision.class_embedding.data += 1
    whole = write(tmp_path / "whole", OFFICIAL, tensors_of(other, official))
    assert same_answers(checkpoint.load(whole, "cpu")[0], other)
    assert same_answers(checkpoint.load(whole, "cpu", clip=clip)[0], model)


def test_parts(tmp_path, model):
    """Guards against: parts that don't join; a projector that a person gave but that was made anew."""
    clip = write_clip(tmp_path / "clip", model)
    tensors = tensors_of(model, official, ("llama.",))
    llm = write(tmp_path / "llm", {"model_type": "llama", **TEXT_JSON}, tensors, "bin")
    folder = tmp_path / "pretrain"
    folder.mkdir()
    torch.save(tensors_of(model, official, ("projector.",)), folder / "mm_projector.bin")
    for projector in (folder, folder / "mm_projector.bin"):
        loaded, _ = checkpoint.load_parts(llm, clip, projector, device="cpu")
        assert loaded.config == model.config
        assert same_answers(loaded, model)
    fresh, _ = checkpoint.load_parts(llm, clip, device="cpu")
    assert fresh.config == model.config
    assert torch.equal(fresh.llama.norm.weight, model.llama.norm.weight)
    assert not torch.equal(fresh.projector.linear_1.weight, model.projector.linear_1.weight)
    assert fresh.projector.linear_1.weight.std() > 0 and not any(p.is_meta for p in fresh.parameters())
    (folder / "config.json").write_text(json.dumps(OFFICIAL))
    with pytest.raises(FileNotFoundError, match="load_parts"):
        checkpoint.load(folder)


PHI_NAMES = {"<|endoftext|>": VOCAB, "<|assistant|>": VOCAB + 1, "<|end|>": VOCAB + 4}


def test_phi_3_stacked_weights(tmp_path, model):
    """Guards against: q, k, v cut in equal thirds (there are fewer key heads), gate taken for up, no window, and the
    end of a Phi-3 answer never sampled: <|end|> lies above the pieces."""
    config = {**OFFICIAL, "model_type": "llava_phi3", "sliding_window": 19, "vocab_size": VOCAB + 9}
    tensors = tensors_of(model, official)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(9, 32)])
    for i in range(5):
        at = f"model.layers.{i}."
        qkv = [tensors.pop(f"{at}self_attn.{n}_proj.weight") for n in "qkv"]
        assert [x.size(0) for x in qkv] == [32, 8, 8]
        tensors[f"{at}self_attn.qkv_proj.weight"] = torch.cat(qkv)
        gate_up = [tensors.pop(f"{at}mlp.{n}_proj.weight") for n in ("gate", "up")]
        tensors[f"{at}mlp.gate_up_proj.weight"] = torch.cat(gate_up)
    added = [{"id": i, "content": name, "special": True} for name, i in PHI_NAMES.items()]
    spec = {**TOKENIZER.spec, "added_tokens": TOKENIZER.spec["added_tokens"] + added}
    folder = write(tmp_path / "phi", config, tensors, tokenizer=Tokenizer(spec))
    loaded, tokenizer = checkpoint.load(folder, "cpu")
    assert loaded.config.text.window == 19 and loaded.config.template == "llava_phi_3"
    assert loaded.config.image_token_id == VOCAB + 5  # one above <|end|>
    checkpoint.save(loaded, tokenizer, tmp_path / "again")  # slices of one matrix are saved as matrices
    again, _ = checkpoint.load(tmp_path / "again", "cpu")
    assert again.config.text.window == 19 and again.config.template == "llava_phi_3"
    for m in (loaded, again):
        m.config = model.config  # the comparison is about the words that both have
        assert same_answers(m, model)


# -- strict ----------------------------------------------------------------------------------------------------------


def fails(folder, *words, error=ValueError) -> bool:
    """Is it refused, in one line that has all of these words?"""
    with pytest.raises(error) as caught:
        checkpoint.load(folder, "cpu")
    print(caught.value)
    return "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path, model):
    """Guards against: strict=False in any disguise."""
    tensors = tensors_of(model, str)
    gone = tensors.pop("language_model.model.layers.2.mlp.up_proj.weight")
    tensors["language_model.model.layers.2.mlp.bias"] = torch.ones(3, 4)
    tensors["vision_tower.vision_model.post_layernorm.bias"] = torch.ones(25)
    assert gone.shape == (56, 32)
    assert fails(write(tmp_path, HF, tensors), "llama.layers.2.mlp.up_proj.weight [56, 32] is missing",
                 "llama.layers.2.mlp.bias [3, 4] is unexpected",
                 "vision.post_layernorm.bias is [25] in the file, [24] by the config")
    shorter = {name: x for name, x in tensors.items() if "layers" not in name}
    assert fails(write(tmp_path, HF, shorter), "more")


def test_integer_weights_are_refused(tmp_path, model):
    """Guards against: quantised weights read as if their integers were values."""
    tensors = tensors_of(model, str)
    tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"].to(torch.int8)
    assert fails(write(tmp_path, HF, tensors), "lm_head", "int8")


def test_a_tensor_in_two_spellings_is_refused(tmp_path, model):
    """Guards against: two tensors for one parameter, of which the last one read would win."""
    tensors = tensors_of(model, str)
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"] + 1
    assert fails(write(tmp_path / "one", HF, tensors), "twice", "lm_head")
    far = {"lm_head.weight": tensors.pop("lm_head.weight"), **tensors}  # in the first shard, the other in the last
    assert fails(write(tmp_path / "shards", HF, far, "bin shards"), "another file", "lm_head")
    llm = write(tmp_path / "llm", {"model_type": "llama", **TEXT_JSON}, tensors_of(model, official))
    with pytest.raises(ValueError, match="came already; expected it once"):
        checkpoint.load_parts(llm, write_clip(tmp_path / "clip", model))


@pytest.mark.parametrize("kind", ["safetensors shards", "bin shards"])
def test_damaged_shards_are_named(tmp_path, model, kind):
    """Guards against: a download that stopped half way and ends in a traceback, or in a model of garbage."""
    write(tmp_path, HF, tensors_of(model, str), kind)
    victim = sorted(tmp_path.glob("*-00002-of-*"))[0]
    data = victim.read_bytes()
    for size in (len(data) - 100, 1000, 3, 0):
        victim.write_bytes(data[:size])
        assert fails(tmp_path, victim.name)
    victim.unlink()
    assert fails(tmp_path, victim.name, error=FileNotFoundError)
    victim.write_bytes(data)
    index = next(tmp_path.glob("*.index.json"))
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = victim.name
    index.write_text(json.dumps(content))
    assert fails(tmp_path, victim.name, "ghost")
    index.write_text(index.read_text()[:50])
    assert fails(tmp_path, index.name)


def test_bin_never_runs_code(tmp_path, model):
    """Guards against: a pickle that runs what its author wants."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    write(tmp_path, HF, {"x": Evil()}, "bin")
    assert fails(tmp_path, "pytorch_model.bin")
    assert not (tmp_path / "owned").exists()
    torch.save(tensors_of(model, str), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same_answers(checkpoint.load(tmp_path, "cpu")[0], model)  # the old format still loads


# -- configs ---------------------------------------------------------------------------------------------------------


def test_the_released_7b_config(tmp_path, model):
    """Guards against the traps of llava-hf/vip-llava-7b-hf: one feature layer named for a projector made for five, no
    sizes of the decoder, rope_theta in transformers 5's place."""
    config = {**HF, "vision_feature_layer": -2, "projector_layernorm": False}
    loaded, _ = checkpoint.load(write(tmp_path, config, tensors_of(model, str)), "cpu")
    assert loaded.config.feature_layers == (-2, -5, -8, -11, 6)
    config = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "model_type": "llama"}
    assert layouts.text_config(config, rows=32064) == LlamaConfig(32064)
    assert layouts.text_config({}, rows=7) == LlamaConfig(7, context=2048, eps=1e-6)
    five = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "num_key_value_heads": 8}
    five = layouts.text_config(five, rows=7)
    assert five.rope_theta == 5e5 and five.kv_heads == 8
    assert layouts.vision_config(None) == VisionConfig()
    assert layouts.vision_config({}) == VisionConfig(224, 32, 768, 12, 12, 3072)
    assert layouts.text_config({"sliding_window": 9}, 7).window is None  # LLaMA has none, whatever it says


@pytest.mark.parametrize("key", ["vision_feature_layer", "vision_feature_layers"])
@pytest.mark.parametrize("given, layers", [(-4, (-4,)), ([0], (0,)), ([3, -2], (3, -2)), ([1] * 5, (1,) * 5)])
def test_feature_layers_of_the_config(tmp_path, key, given, layers):
    """Guards against: five released layers for a model that was trained with others."""
    model = make(feature_layers=layers)
    loaded, _ = checkpoint.load(write(tmp_path, {**HF, key: given}, tensors_of(model, str)), "cpu")
    assert loaded.config == model.config


def test_layers_that_a_tower_lacks_are_refused(tmp_path):
    """Guards against: an error at the first image only, after a training perhaps."""
    assert fails(write(tmp_path, {**HF, "vision_feature_layer": [99]}, tensors_of(make(feature_layers=(1,)), str)), "feature layers (99,)")


def test_an_unknown_number_of_layers_is_refused(tmp_path):
    """Guards against: a guess at which three layers a projector was made for, or at which of two lists is meant."""
    assert fails(write(tmp_path, HF, tensors_of(make(feature_layers=(1, 2, 3)), str)), "3 layers", "vision_feature_layers")
    for both in ({"vision_feature_layers": [-2, -3]}, {"vision_feature_layers": [1, 2, 3], "vision_feature_layer": [3, 2, 1]}):
        (given, *_), width = both.values(), 12
        with pytest.raises(ValueError, match=re.escape(str(tuple(given)))):
            layouts.feature_layers(both, (5 if len(given) == 2 else 3) * width, width)
    assert layouts.feature_layers({"vision_feature_layers": [1, 2], "vision_feature_layer": -2}, 24, 12) == (1, 2)


@pytest.mark.parametrize("part, change, words", [
    ("text_config", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ("rope_type", "llama3")),
    ("text_config", {"rope_scaling": {"type": "longrope"}}, ("longrope",)),
    ("text_config", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor", "0.5")),
    ("text_config", {"head_dim": 8}, ("head_dim", "8", "4")),
    ("text_config", {"hidden_act": "gelu"}, ("gelu", "silu")),
    ("text_config", {"model_type": "gemma"}, ("gemma", "llama")),
    ("text_config", {"model_type": "mistral", "rms_norm_eps": ...}, ("lacks rms_norm_eps",)),
    ("vision_config", {"hidden_act": "gelu"}, ("gelu", "quick_gelu")),
    (None, {"model_type": "llava_next"}, ("llava_next", "vipllava")),
    (None, {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}, ("mm_vision_tower",)),
    (None, {"projector_hidden_act": "relu"}, ("relu", "gelu")),
    (None, {"vision_feature_select_strategy": "full"}, ("full", "default")),
    (None, {"mm_use_im_start_end": True}, ("mm_use_im_start_end True", "False")),
    (None, {"mm_vision_select_feature": "cls_patch"}, ("cls_patch", "'patch'")),
    (None, {"quantization_config": {"quant_method": "bitsandbytes"}}, ("bitsandbytes", "vip-llava-int8")),
    (None, {"template": "alpaca"}, ("alpaca", "llava_v1")),
    (None, {"template": ["llava_v1"]}, ("['llava_v1']", "llava_v0")),
    (None, {"quantization_config": {"quant_method": ["int8"]}}, ("['int8']", "vip-llava-int8")),
    ("text_config", {"hidden_size": "wide"}, ("hidden_size", "'wide'", "whole number")),
    ("text_config", {"num_hidden_layers": -1}, ("num_hidden_layers -1",)),
    ("text_config", {"intermediate_size": 12.5}, ("intermediate_size 12.5",)),
    ("text_config", {"num_attention_heads": True}, ("num_attention_heads True",)),
    ("text_config", {"rms_norm_eps": float("nan")}, ("rms_norm_eps nan",)),
    ("text_config", {"rope_parameters": [10]}, ("rope_parameters [10]", "object")),
    ("text_config", {"rope_theta": "10k"}, ("rope_theta '10k'",)),
    ("text_config", {"rope_parameters": {"rope_theta": 1e4}}, ("rope_theta 5000.0", "rope_theta 10000.0; expected the same")),
    ("text_config", {"intermediate_size": 10**30}, ("intermediate_size 1000000000",)),
    ("text_config", {"model_type": "mistral"}, ("a mistral, lacks sliding_window",)),
    (None, {"image_token_id": VOCAB + 1}, (f"image_token_index {VOCAB}, and image_token_id {VOCAB + 1}",)),
    (None, {"image_token_index": 3}, (f"<image> is token 3; expected {VOCAB} or more",)),
    ("vision_config", {"patch_size": 0}, ("patch_size 0",)),
    (None, {"vision_config": 7}, ("vision_config 7", "object")),
    (None, {"text_config": []}, ("text_config []", "object")),
    (None, {"image_token_index": "<image>"}, ("image_token_index '<image>'",)),
    (None, {"vision_feature_layer": "deep"}, ("deep",)),
])
def test_what_is_not_built_here_is_refused(tmp_path, model, part, change, words):
    """Guards against: weights of another network that load because the shapes agree, and answer nonsense."""
    config = {**HF, **change} if part is None else {**HF, part: {**HF[part], **change}}
    config = json.loads(json.dumps(config, default=lambda _: "gone"))
    for c in (config, config["text_config"]):
        [c.pop(key) for key in list(c) if c[key] == "gone"]
    assert fails(write(tmp_path, config, tensors_of(model, str)), *words)


def test_templates():
    """Guards against: a Llama-3 prompted as a Vicuna. The config decides, else the tokens that a template needs."""

    def join(config, tokenizer):
        return layouts.join_configs(config, TEXT, VISION, 120, tokenizer).template

    assert join({}, TOKENIZER) == "llava_v1"
    assert join({"mm_use_im_start_end": None}, TOKENIZER) == "llava_v1"  # as if it said nothing
    assert join({"template": "plain"}, TOKENIZER) == "plain"
    spec = dict(TOKENIZER.spec)
    for name, template in (("<|end|>", "llava_phi_3"), ("<|eot_id|>", "llava_llama_3")):
        spec["added_tokens"] = TOKENIZER.spec["added_tokens"] + [{"id": 900, "content": name, "special": True}]
        assert join({}, Tokenizer(spec)) == template


def test_an_answer_can_end():
    """Guards against a Llama-3 whose image stands before the tokens that end an answer: they would never be said."""
    ends = [{"id": VOCAB + 8, "content": "<|eot_id|>", "special": True}]
    tokenizer = Tokenizer({**TOKENIZER.spec, "added_tokens": [*TOKENIZER.spec["added_tokens"], *ends]})
    text = replace(TEXT, vocab_size=VOCAB + 16)
    assert layouts.join_configs({"image_token_index": VOCAB + 9}, text, VISION, 120, tokenizer).image_token_id == VOCAB + 9
    with pytest.raises(ValueError, match=f"<image> is token {VOCAB + 2}; expected {VOCAB + 9} or more"):
        layouts.join_configs({"image_token_index": VOCAB + 2}, text, VISION, 120, tokenizer)


def test_an_image_token_that_the_tokenizer_has(tmp_path):
    """Guards against: a decoder of another LLaVA, joined with a tower, that can't be saved once it is trained."""
    spec = {**TOKENIZER.spec, "added_tokens": [*TOKENIZER.spec["added_tokens"], {"id": VOCAB, "content": "<image>", "special": True}]}
    config = layouts.join_configs({}, replace(TEXT, vocab_size=VOCAB + 2), VISION, 120, Tokenizer(spec))
    assert config.image_token_id == VOCAB
    checkpoint.save(ViPLLaVA(config), Tokenizer(spec), tmp_path / "a")
    assert checkpoint.load(tmp_path / "a", "cpu")[0].config == config


# -- save ------------------------------------------------------------------------------------------------------------


def test_whole_numbers_get_no_other_type(tmp_path):
    """Guards against: quantised weights that are written as 16 bits, and never load again."""
    model, tokenizer = checkpoint.load("tiny", "cpu", "stored", quantize="int4", ready=False)
    with pytest.raises(ValueError, match="came with a model that is int4"):
        checkpoint.save(model, tokenizer, tmp_path / "a", dtype=torch.bfloat16)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path, dtype):
    """Guards against: anything lost on the way out; a dtype that changes; a mapped file overwritten."""
    first = make(feature_layers=(3, -2), projector_eps=1e-3, template="plain").to(dtype)
    checkpoint.save(first, TOKENIZER, tmp_path / "a")
    second, tokenizer = checkpoint.load(tmp_path / "a", "cpu", dtype)
    for name, x in first.state_dict().items():
        y = second.state_dict()[name][: x.size(0)] if x.dim() else second.state_dict()[name]
        assert y.dtype == dtype and torch.equal(x, y), name
    rows = second.config.text.vocab_size
    assert rows % 64 == 0 and rows - 64 < VOCAB + 2 <= rows  # a row for the image token, as Hugging Face needs
    assert replace(second.config, text=replace(second.config.text, vocab_size=VOCAB)) == first.config
    assert same_answers(second.float(), first.float())
    before = load_file(tmp_path / "a" / "model.safetensors")
    third, _ = checkpoint.load(tmp_path / "a", "cpu", dtype)
    checkpoint.save(third, tokenizer, tmp_path / "a")  # over the very files that it reads from
    after = load_file(tmp_path / "a" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_appended_rows_are_never_the_likeliest(tmp_path):
    """Guards against: rows of zeros, whose logit 0 wins wherever all words have less."""
    model = make()
    model.llama.lm_head.weight.data += 1
    checkpoint.save(model, TOKENIZER, tmp_path / "m")
    head = load_file(tmp_path / "m" / "model.safetensors")["language_model.lm_head.weight"]
    logits = head @ -torch.ones(32)
    assert logits.max() < 0 and logits.argmax() < VOCAB < len(logits)


def test_shards(tmp_path, model):
    """Guards against: shards that the index misplaces; old shards left beside new ones."""
    folder = tmp_path / "m"
    checkpoint.save(model, TOKENIZER, folder, shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and {f.name for f in files} == set(index["weight_map"].values())
    held = {name: f.name for f in files for name in load_file(f)}
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(x.nbytes for f in files for x in load_file(f).values())
    assert all(sum(x.nbytes for x in load_file(f).values()) <= 30_000 for f in files if len(load_file(f)) > 1)
    assert same_answers(checkpoint.load(folder, "cpu")[0], model)
    checkpoint.save(model, TOKENIZER, folder)
    assert [f.name for f in folder.glob("model*")] == ["model.safetensors"]
    assert same_answers(checkpoint.load(folder, "cpu")[0], model)


def test_save_touches_nobody_elses_files(tmp_path, model):
    """Guards against: a downloaded original overwritten; a run's log or state deleted with the old model."""
    theirs = write(tmp_path / "theirs", HF, tensors_of(model, str))
    held = {f.name: f.read_bytes() for f in theirs.iterdir()}
    with pytest.raises(ValueError, match="not saved from here"):
        checkpoint.save(model, TOKENIZER, theirs)
    assert {f.name: f.read_bytes() for f in theirs.iterdir()} == held
    with pytest.raises(ValueError, match="config.json is a file; expected a folder"):
        checkpoint.save(model, TOKENIZER, theirs / "config.json")
    run = tmp_path / "run"
    (run / "plots").mkdir(parents=True)
    (run / "state.pt").write_text("state")
    for _ in range(2):
        checkpoint.save(model, TOKENIZER, run)
        assert (run / "state.pt").read_text() == "state" and (run / "plots").is_dir()
        assert same_answers(checkpoint.load(run, "cpu")[0], model)
    assert {f.name for f in tmp_path.iterdir()} == {"theirs", "run"}


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_an_interrupted_save(tmp_path, model, monkeypatch, at):
    """Guards against: half old, half new weights that load. Stopped anywhere, it is the old model or an error."""
    folder = tmp_path / "m"
    checkpoint.save(model, TOKENIZER, folder, shard_bytes=60_000)
    other, calls, move = make(feature_layers=(1,)), [], Path.replace

    def stop(self, target):
        if self.parent != Path(target).parent:  # moves into the folder, not what is renamed within one
            calls.append(target)
            if len(calls) > at:
                raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(other, TOKENIZER, folder, shard_bytes=60_000)
    monkeypatch.undo()
    if at == 0:
        assert same_answers(checkpoint.load(folder, "cpu")[0], model)
    else:
        assert fails(folder, "half a vipllava")
    checkpoint.save(other, TOKENIZER, folder)  # and the folder can be used again
    assert same_answers(checkpoint.load(folder, "cpu")[0], other)


def test_a_failed_save_leaves_the_old_model(tmp_path, model, monkeypatch):
    """Guards against: a full disk that costs the last good model, or rubbish left beside it."""
    checkpoint.save(model, TOKENIZER, tmp_path / "m")

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(make(feature_layers=(1,)), TOKENIZER, tmp_path / "m")
    assert [f.name for f in tmp_path.iterdir()] == ["m"]
    assert same_answers(checkpoint.load(tmp_path / "m", "cpu")[0], model)


# -- dtype and memory ------------------------------------------------------------------------------------------------


def test_a_default_device_changes_nothing(tmp_path, model):
    """Guards against buffers that go where new tensors do, here to a device without memory."""
    checkpoint.save(model, TOKENIZER, tmp_path / "a")
    image = Image.new("RGB", (30, 20), "red")
    expected = preprocess(image, 21)
    with torch.device("meta"):
        assert torch.equal(preprocess(image, 21), expected)
        for dtype in (torch.float32, torch.bfloat16):
            loaded, _ = checkpoint.load(tmp_path / "a", "cpu", dtype)
            assert not any(p.is_meta for p in loaded.parameters())
            assert halves.scratch.room((3, 4), dtype).device.type == "cpu"


def test_default_dtype():
    """Guards against: 28 GB of float32 on a machine with 16, bfloat16 on a CPU that has room, and 16 bits turned into
    16 others on a GPU, which rounds them."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert checkpoint.default_dtype(cpu, 10**6, torch.float16) == torch.float32
    assert checkpoint.default_dtype(cpu, 10**15, torch.float16) == torch.bfloat16
    assert checkpoint.default_dtype(cuda, 10**6, torch.float32) == torch.bfloat16
    for stored in (torch.float16, torch.bfloat16):
        assert checkpoint.default_dtype(cuda, 10**6, stored) == stored


@pytest.mark.parametrize("options, words", [
    ({"dtype": "bf16"}, "dtype is 'bf16'; expected torch.float32, torch.bfloat16, torch.float16"),
    ({"dtype": torch.int8}, "dtype is torch.int8; expected torch.float32"),
    ({"device": "gpu"}, "no device 'gpu' here; expected cpu"),
    ({"device": "cuda:99"}, "no device 'cuda:99' here; expected cpu"),
])
def test_what_no_model_can_be_loaded_as_is_refused(tmp_path, model, options, words):
    """Guards against: weights rounded to whole numbers, and errors of PyTorch's about a device or dtype."""
    with pytest.raises(ValueError, match=words):
        checkpoint.load(write(tmp_path, HF, tensors_of(model, str)), **{"device": "cpu"} | options)


MEASURE = """
import sys, torch, checkpoint
peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
checkpoint.load(sys.argv[2], "cpu", torch.bfloat16, quantize=sys.argv[4], ready=False)  # so that no library's first use counts
before = peak()
model, _ = checkpoint.load(sys.argv[1], "cpu", getattr(torch, sys.argv[3]), quantize=sys.argv[4], ready=False)
assert all(p.max().item() < (1 if p.is_floating_point() else 128) for p in model.state_dict().values())  # use every page
print((peak() - before) / sum(p.nbytes for p in model.state_dict().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
@pytest.mark.parametrize("kind, source, target, quantize", [
    ("safetensors", "float16", "float32", ""), ("safetensors", "float16", "float16", ""), ("bin", "float32", "bfloat16", ""),
    ("safetensors", "bfloat16", "bfloat16", "int8"),
])
def test_peak_memory(tmp_path, model, kind, source, target, quantize):
    """Guards against: a second copy of the weights on the way in. Pages of a mapped file count too: converting a
    whole shard from them would give 1.5 to 3, and so would 16 bits that stay while 8 are made of them. (ru_maxrss would
    hide it all: a child inherits its parent's.)"""
    text = LlamaConfig(VOCAB, width=640, layers=13, heads=5, kv_heads=5, mlp=2100)
    sizes = {"hidden_size": 640, "num_hidden_layers": 13, "num_attention_heads": 5, "num_key_value_heads": 5}
    config = {**HF, "text_config": {**TEXT_JSON, **sizes, "intermediate_size": 2100}}
    with torch.device("meta"):
        big = ViPLLaVA(replace(model.config, text=text))
    dtype = getattr(torch, source)
    tensors = {layouts.hub_name(n): torch.full(p.shape, 0.01, dtype=dtype) for n, p in big.named_parameters()}
    write(tmp_path / "big", config, tensors, kind)
    write(tmp_path / "small", HF, tensors_of(model, str), kind)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(tmp_path / "small"), target, quantize]
    root = Path(checkpoint.__file__).parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < (1.6 if quantize else 1.15), done.stdout


# -- CLIP by itself --------------------------------------------------------------------------------------------------


def write_clip_tokenizer(folder: Path) -> dict[str, int]:
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    merges = [("r", "e"), ("re", "d</w>"), ("b", "o"), ("bo", "x</w>")]
    names = letters + [x + "</w>" for x in letters] + [a + b for a, b in merges]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    return vocab


def test_clip(tmp_path, model):
    """Guards against: CLIP's tensors lost on the way in; texts cut at 77 tokens in silence; a text that says
    <|endoftext|> ending there; an id that depends on capitals or spaces."""
    folder = write_clip(tmp_path / "clip", model)
    vocab = write_clip_tokenizer(folder)
    clip, tokenize = checkpoint.load_clip(folder, "cpu")
    assert len(clip.state_dict()) == len(torch.load(folder / "pytorch_model.bin")) - 2  # less two position_ids
    assert torch.equal(clip.vision_model.layers[3].mlp.fc1.weight, model.vision.layers[3].mlp.fc1.weight)
    begin, end, red, box = (vocab[n] for n in ("<|startoftext|>", "<|endoftext|>", "red</w>", "box</w>"))
    assert tokenize(["red", " A\n RED  box!"]).tolist() == [
        [begin, red, end, end, end, end],
        [begin, vocab["a</w>"], red, box, vocab["!</w>"], end],
    ]
    (row,) = tokenize(["<|endoftext|>"]).tolist()
    assert row.count(end) == 1 and len(row) > 5
    with pytest.raises(ValueError, match="18 tokens.* 17"):
        tokenize(["red " * 16])
    bpe = {"vocab": vocab, "merges": ["r e", "re d</w>", "b o", "bo x</w>"]}
    (folder / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match="vocab.json"):
        checkpoint.load_clip(folder, "cpu")
    for merges in (bpe["merges"], [m.split() for m in bpe["merges"]]):  # both spellings are in the wild
        (folder / "tokenizer.json").write_text(json.dumps({"model": {**bpe, "merges": merges}}))
        assert checkpoint.load_clip(folder, "cpu")[1](["red box"]).tolist() == [[begin, red, box, end]]
    with pytest.raises(ValueError, match="expected clip"):
        checkpoint.load_clip(write(tmp_path / "hf", HF, {}))
