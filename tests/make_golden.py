"""Make tests/golden/*.npz: what transformers computes for the shapes, weights and inputs of cases.py.

    pip install torch transformers pillow numpy        # made with transformers 5.23, torch 2.13, on a CPU
    python tests/make_golden.py [training …]        # all files, or those named

Only this script needs transformers. It reads nothing of ours but cases.py, so that a mistake of ours can't reach the
golden files; names are mapped here by hand, and all is computed in float32 (20 steps of training: float64), with the
explicit attention formula.
"""

import re
import sys

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPVisionModel

import cases

# -- configurations and names: ours -> theirs ------------------------------------------------------------------------


def clip_tower(c: dict) -> dict:
    return dict(
        hidden_size=c["width"], num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
        intermediate_size=c["mlp"], layer_norm_eps=c["eps"], hidden_act="quick_gelu",
    )


def vision_config(c: dict) -> dict:
    return dict(clip_tower(c), image_size=c["image_size"], patch_size=c["patch_size"])


def llama_config(c: dict) -> dict:
    return dict(
        vocab_size=c["vocab_size"], hidden_size=c["width"], num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"], num_key_value_heads=c["kv_heads"], intermediate_size=c["mlp"],
        max_position_embeddings=c["context"], rms_norm_eps=c["eps"], bos_token_id=None, eos_token_id=None,
        pad_token_id=None, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
    )


RENAMES = (  # regular expressions on their names, in memory
    (r"^model\.vision_tower\.", "vision."),
    (r"^model\.multi_modal_projector\.projector_layernorm", "projector.layernorm"),
    (r"^model\.multi_modal_projector\.", "projector."),
    (r"^model\.language_model\.", "llama."),
    (r"^model\.", ""),
    (r"(^|\.)embeddings\.", r"\1"),
    (r"(^|\.)encoder\.layers\.", r"\1layers."),
    (r"pre_layrnorm", "pre_layernorm"),
    (r"final_layer_norm", "final_layernorm"),
)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def our_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


@torch.no_grad()
def fill(model, seed: int, whole: bool = False):
    """Give each of their parameters the value of ours; a fused one is the parts of ours, one after the other."""
    for name, parameter in model.named_parameters():
        name = our_name(name)
        if whole and name == "lm_head.weight":
            name = "llama.lm_head.weight"
        fused = next((f for f in FUSED if f in name), None)
        if fused is None:
            parameter.copy_(cases.weight(name, parameter.shape, seed))
            continue
        config, D = model.config, model.config.hidden_size // model.config.num_attention_heads
        rows = {
            "qkv_proj": [D * n for n in (config.num_attention_heads,) + 2 * (config.num_key_value_heads,)],
            "gate_up_proj": 2 * [config.intermediate_size],
        }[fused]
        names = [name.replace(fused, part) for part in FUSED[fused]]
        parameter.copy_(torch.cat([cases.weight(m, (n, parameter.size(1)), seed) for m, n in zip(names, rows)]))
    return model.eval()


# -- what each file holds --------------------------------------------------------------------------------------------


def make_clip() -> dict:
    out = {}
    for name, case in cases.VISION.items():
        config = CLIPVisionConfig(**vision_config(case["vision"]), attn_implementation="eager")
        model = fill(CLIPVisionModel(config), case["seed"])
        pixels = cases.random_pixels(case["images"], config.image_size, case["seed"])
        states = model(pixels, output_hidden_states=True).hidden_states
        assert len(states) == config.num_hidden_layers + 1
        out[f"{name}/features"] = torch.cat([states[i][:, 1:] for i in case["layers"]], dim=-1)
    for name, case in cases.CONTRASTIVE.items():
        v, t = case["vision"], case["text"]
        config = CLIPConfig(
            vision_config=vision_config(v),
            text_config=dict(
                clip_tower(t), vocab_size=t["vocab_size"], max_position_embeddings=t["context"],
                eos_token_id=t["vocab_size"] - 1, bos_token_id=None, pad_token_id=None,
            ),
            projection_dim=case["projection"], attn_implementation="eager",
        )
        model = fill(CLIPModel(config), case["seed"])
        pixels = cases.random_pixels(case["images"], v["image_size"], case["seed"])
        result = model(input_ids=cases.contrastive_ids(case), pixel_values=pixels)
        out[f"{name}/image"], out[f"{name}/text"] = result.image_embeds, result.text_embeds
        out[f"{name}/logits"] = result.logits_per_image
    return out


def make_projector() -> dict:
    """The projector alone, on features small enough for its eps to matter."""
    out = {}
    for name, case in cases.VIPLLAVA.items():
        model = vipllava(case)
        features = cases.projector_features(case)
        out[f"{name}/projector"] = model.model.multi_modal_projector(features)
    return out


def make_llama() -> dict:
    out = {}
    for name, case in cases.LLAMA.items():
        c = case["llama"]
        if "window" in c:
            config = Phi3Config(
                **llama_config(c), sliding_window=c["window"], original_max_position_embeddings=c["context"],
                attn_implementation="eager",
            )
            model = fill(Phi3ForCausalLM(config), case["seed"])
        else:
            model = fill(LlamaForCausalLM(LlamaConfig(**llama_config(c), attn_implementation="eager")), case["seed"])
        ids = cases.random_ids((1, case["tokens"]), c["vocab_size"], case["seed"])
        out[f"{name}/ids"] = ids
        out[f"{name}/logits"] = model(input_ids=ids, use_cache=False).logits
        out[f"{name}/decoded"] = cached(model, ids, torch.ones_like(ids), case["prefill"])
        out[f"{name}/batch"] = left_padded(model, cases.llama_batch(case, ids), ids[:, : cases.BATCH_STEPS])
    return out


def cached(model, ids, mask, prefill: int) -> torch.Tensor:
    """ids (B, T), the first `prefill` at once, the others one by one -> logits after each call, (B, steps, V)."""
    cache, logits = None, []
    for begin, end in [(0, prefill)] + [(t, t + 1) for t in range(prefill, ids.size(1))]:
        positions = (mask[:, :end].cumsum(dim=-1) - 1).clamp(min=0)[:, begin:end]
        result = model(
            input_ids=ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache,
            use_cache=True,
        )
        cache = result.past_key_values
        logits.append(result.logits[:, -1])
    return torch.stack(logits, dim=1)


def left_padded(model, rows: list, after: torch.Tensor) -> torch.Tensor:
    """Unequal rows, all followed by the ids `after` (1, n) -> logits (B, 1 + n, V)."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(r), dtype=torch.long), r, after[0]]) for r in rows])
    mask = torch.stack([(torch.arange(ids.size(1)) >= longest - len(r)).long() for r in rows])
    return cached(model, ids, mask, longest)


def vipllava(case: dict):
    layers = case["feature_layers"]
    config = VipLlavaConfig(
        vision_config=dict(vision_config(case["vision"]), model_type="clip_vision_model"),
        text_config=dict(llama_config(case["text"]), model_type="llama"),
        image_token_index=case["image_token_id"], projector_layernorm_eps=1e-5, projector_hidden_act="gelu",
        vision_feature_layer=layers[0] if len(layers) == 1 else list(layers), attn_implementation="eager",
    )
    return fill(VipLlavaForConditionalGeneration(config), case["seed"], whole=True)


def make_vipllava() -> dict:
    out = make_projector()
    for name, case in cases.VIPLLAVA.items():
        model, image, v = vipllava(case), case["image_token_id"], case["vision"]
        patches = (v["image_size"] // v["patch_size"]) ** 2
        prompts = cases.prompts_of(case, image)
        pixels = cases.random_pixels(sum(p.count(image) for p in prompts), v["image_size"], case["seed"])
        seen = 0
        for i, prompt in enumerate(prompts):
            n = prompt.count(image)
            images, seen = {"pixel_values": pixels[seen : seen + n]} if n else {}, seen + n
            ids = torch.tensor([[t for word in prompt for t in [word] * (patches if word == image else 1)]])
            logits = model(input_ids=ids, use_cache=False, **images).logits[0]
            out[f"{name}/logits/{i}"] = logits[-cases.LOGITS_KEPT :]
            out[f"{name}/greedy/{i}"], margin = greedy(model, ids, images, case)
            print(f"  {name}, prompt {i}: smallest lead of a greedy token {margin:.1e} of the largest logit")
            assert margin > 1e-3, "a tie that rounding could break: change the seed"
    return out


def greedy(model, ids: torch.Tensor, images: dict, case: dict) -> tuple[torch.Tensor, float]:
    """Their own generate(), the rows that were never trained suppressed; and the closest call on the way."""
    untrained = list(range(case["image_token_id"], case["text"]["vocab_size"]))
    result = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **images, max_new_tokens=cases.NEW_TOKENS,
        do_sample=False, suppress_tokens=untrained, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )
    scores = torch.cat(result.scores)  # (32, V)
    first, second = scores.topk(2).values.T
    tokens = result.sequences[0, ids.size(1) :]
    assert len(tokens) == cases.NEW_TOKENS and len(set(tokens.tolist())) >= 8, tokens
    return tokens, ((first - second).min() / scores[scores.isfinite()].abs().max()).item()


@torch.enable_grad()
def make_training() -> dict:
    """Loss and gradients of a batch padded on the right, then AdamW: the losses of its steps, and the weights after.

    In float64, as these weights are steep: rounding in float32 alone changes a gradient by 2e-5.
    """
    out = {}
    for name, case in cases.VIPLLAVA.items():
        model, image, v = vipllava(case).double(), case["image_token_id"], case["vision"]
        patches = (v["image_size"] // v["patch_size"]) ** 2
        rows = []
        for ids, labels in zip(*cases.training_rows(case, image)):
            pairs = [p for i, label in zip(ids, labels) for p in [(i, label)] * (patches if i == image else 1)]
            rows.append(tuple(zip(*pairs)))
        longest, images = max(len(ids) for ids, _ in rows), sum(ids.count(image) for ids, _ in rows) // patches
        batch = {
            "input_ids": torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in rows]),
            "labels": torch.tensor([[*labels, *[-100] * (longest - len(labels))] for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            "pixel_values": cases.random_pixels(images, v["image_size"], case["seed"]).double(),
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=cases.TRAINING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        losses = []
        for _ in range(cases.TRAINING_STEPS):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            if not losses:
                grads = {our_whole_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
                out[f"{name}/gradients"] = cases.fingerprint(grads)
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        out[f"{name}/losses"] = torch.tensor(losses, dtype=torch.float64)
        trained = {our_whole_name(n): p for n, p in model.named_parameters() if our_whole_name(n) in grads}
        out[f"{name}/weights"] = cases.fingerprint(trained)
    return out


def our_whole_name(name: str) -> str:
    name = our_name(name)
    return "llama.lm_head.weight" if name == "lm_head.weight" else name


def make_preprocess() -> dict:
    out = {}
    for size in cases.IMAGE_SIZES:
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        for w, h in cases.IMAGES:
            pixels = cases.random_image(w, h, seed=51)
            theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
            out[f"crop {size} {w}x{h}"] = theirs.astype(np.float32)
            out[f"pad {size} {w}x{h}"] = padded(pixels, size)
    return out


def padded(pixels: np.ndarray, size: int) -> np.ndarray:
    """The official expand2square and normalisation, over again in NumPy: (H, W, 3) bytes -> (3, size, size)."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    h, w, _ = pixels.shape
    square = np.empty((max(w, h), max(w, h), 3), dtype=np.uint8)
    square[:] = [int(m * 255) for m in mean]
    if w > h:
        square[(w - h) // 2 : (w - h) // 2 + h] = pixels
    else:
        square[:, (h - w) // 2 : (h - w) // 2 + w] = pixels
    small = np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    return ((small / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)


@torch.no_grad()
def main() -> None:
    for table in (cases.VISION, cases.CONTRASTIVE, cases.LLAMA, cases.VIPLLAVA):
        for name, case in table.items():
            assert not cases.equal_dimensions(case), (name, cases.equal_dimensions(case))
    torch.set_num_threads(1)
    cases.GOLDEN.mkdir(exist_ok=True)
    makers = {"clip": make_clip, "llama": make_llama, "vipllava": make_vipllava, "training": make_training,
              "preprocess": make_preprocess}
    for name, make in makers.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        arrays = {key: np.asarray(value) for key, value in make().items()}
        np.savez_compressed(cases.GOLDEN / f"{name}.npz", **arrays)
        print(f"{name}.npz: {len(arrays)} arrays, {(cases.GOLDEN / f'{name}.npz').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
