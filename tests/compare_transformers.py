"""Compares checkpoint.py with transformers: the same weights must answer the same. Not run by pytest.

    pip install transformers torch tokenizers safetensors pillow
    python tests/compare_transformers.py    # prints the largest relative error of each comparison, fails above 2e-6

All models are random, small, of pairwise different dimensions, and made here: nothing is downloaded. An error of 0 is
no accident: both call the same PyTorch kernels in the same order. That the comparison can fail is checked each time.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

import checkpoint
import layouts
from chat import IMAGE, Turn, encode_chat
from clip import VisionConfig
from generate import generate
from llama import LlamaConfig
from tokenizer import Tokenizer
from vipllava import ViPLLaVA, ViPLLaVAConfig, expand

VISION = VisionConfig(image_size=28, patch_size=7, width=24, layers=12, heads=3, mlp=40)
TEXT = dict(width=32, layers=3, heads=4, kv_heads=2, mlp=56, context=512, rope_theta=5e3, eps=1e-4)


def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the red arrow points to a blue box, not to the green ellipse 0123456789"] * 3, 333)


def randomize(model, seed=0):
    """Norms and biases too: at 1 and 0 a mistake in them would not show."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return model.eval()


def report(what, ours, theirs):
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{what:64} {error:.1e}")
    assert error < 2e-6, what


def compare(what, ours: ViPLLaVA, theirs, tok):
    """Logits at every position of two prompts with an image, then a greedy answer."""
    c, g = ours.config, torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, c.vision.image_size, c.vision.image_size, generator=g)
    prompt, _ = encode_chat(tok, "llava_v1", [Turn("What is in the red box?", image=True)])
    rows = torch.tensor([expand(prompt, c.vision.patches)] * 2)  # (2, T)
    rows[1, -3:] = 5
    theirs_ids = rows.where(rows != IMAGE, c.image_token_id)
    with torch.no_grad():
        a = ours.llama.lm_head(ours(rows, pixels))
        b = theirs(input_ids=theirs_ids, pixel_values=pixels).logits
    report(what + ": logits", a, b)
    answer = [step[0] for step in generate(ours, [prompt], pixels[:1], max_new_tokens=20)]
    silent = list(range(c.image_token_id, c.text.vocab_size))
    assert theirs.generation_config.suppress_tokens in (None, silent)  # `save` wrote it
    theirs.generation_config.update(suppress_tokens=silent, eos_token_id=None)
    same = theirs.generate(input_ids=theirs_ids[:1], pixel_values=pixels[:1], attention_mask=rows[:1] * 0 + 1,
                           max_new_tokens=20, do_sample=False)[0, rows.size(1) :].tolist()
    assert answer == same, (answer, same)
    with torch.no_grad():
        ours.projector.layernorm.weight[0] *= 2
        wrong = ours.llama.lm_head(ours(rows, pixels))
    assert (wrong - b).abs().max() > 1e-4 * b.abs().max(), "the comparison can't tell a wrong weight"


def ours_to_theirs(tmp):
    tok = tokenizer()
    for what, layers, window in (("5 layers", layouts.FIVE, None), ("1 layer, window", (-2,), 9)):
        text = LlamaConfig(tok.vocab_size, window=window, **TEXT)
        model = randomize(ViPLLaVA(ViPLLaVAConfig(VISION, text, layers, 1e-4, tok.vocab_size)))
        checkpoint.save(model, tok, tmp / "ours", shard_bytes=40_000)
        theirs, info = transformers.VipLlavaForConditionalGeneration.from_pretrained(
            tmp / "ours", dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), info
        again, tok2 = checkpoint.load(tmp / "ours", "cpu", torch.float32)
        compare(f"saved here, loaded by transformers ({what})", again, theirs, tok)
        auto = transformers.AutoTokenizer.from_pretrained(tmp / "ours")
        words = "the red arrow, not  the box"
        assert auto(words, add_special_tokens=False).input_ids == tok2.encode(words)
        assert auto.convert_tokens_to_ids("<image>") == theirs.config.image_token_id == again.config.image_token_id
        processor = transformers.AutoImageProcessor.from_pretrained(tmp / "ours")
        print("   ", type(theirs.model.language_model).__name__, type(auto).__name__, type(processor).__name__)


def theirs_to_ours(tmp):
    tok = tokenizer()
    vision = dict(image_size=28, patch_size=7, hidden_size=24, num_hidden_layers=12, num_attention_heads=3,
                  intermediate_size=40)
    text = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=56, vocab_size=tok.vocab_size + 7, max_position_embeddings=512,
                rope_theta=5e3)
    for layers in ([-2, -5, -8, -11, 6], [-3], -3):
        config = transformers.VipLlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**text),
            image_token_index=tok.vocab_size, vision_feature_layer=layers,
        )
        theirs = randomize(transformers.VipLlavaForConditionalGeneration(config))
        folder = tmp / "theirs"
        shutil.rmtree(folder, ignore_errors=True)
        theirs.save_pretrained(folder)
        tok.save(folder)
        saved = load_file(folder / "model.safetensors")
        memory = {name: x.contiguous() for name, x in theirs.state_dict().items()}
        assert any(n.startswith("vision_tower.embeddings") for n in saved) or print("   the saved spelling changed")
        hub = {n.replace("vision_tower.", "vision_tower.vision_model.", 1) if "vision_tower.v" not in n else n: x
               for n, x in saved.items()}
        for what, tensors in (("as saved", saved), ("hub", hub), ("in memory", memory)):
            save_file(tensors, folder / "model.safetensors")
            ours, _ = checkpoint.load(folder, "cpu", torch.float32)
            compare(f"transformers' {what} spelling, layers {layers}", ours, theirs, tok)


def clip_towers(tmp):
    """CLIP as a whole, and its tokenizer from both kinds of files."""
    g = random.Random(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = letters + [x + "</w>" for x in letters]
    merges = []
    for word in ("photo", "red", "arrow", "the", "box", "blue"):
        parts = list(word[:-1]) + [word[-1] + "</w>"]
        while len(parts) > 1:
            i = g.randrange(len(parts) - 1)
            if (parts[i], parts[i + 1]) not in merges:
                merges.append((parts[i], parts[i + 1]))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
    names = list(dict.fromkeys(symbols + [a + b for a, b in merges])) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    config = transformers.CLIPConfig(
        text_config=dict(vocab_size=len(vocab), hidden_size=36, intermediate_size=52, num_hidden_layers=2,
                         projection_dim=20, num_attention_heads=6, max_position_embeddings=30,
                         eos_token_id=len(vocab) - 1),
        vision_config=dict(image_size=28, patch_size=7, hidden_size=24, num_hidden_layers=11, num_attention_heads=3,
                           intermediate_size=40, projection_dim=20),
        projection_dim=20,
    )
    theirs, folder = randomize(transformers.CLIPModel(config)), tmp / "clip"
    theirs.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    reference = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    ours, tokenize = checkpoint.load_clip(folder, "cpu", torch.float32)
    texts = ["a photo of the RED arrow", "blue box's 12  !!?? ünï\ncode 日本", ""]
    texts += ["".join(g.choices(" abRED'st.!,09ß\tboxé", k=g.randrange(14))) for _ in range(2000)]
    for text in texts:
        assert tokenize([text])[0].tolist() == reference(text).input_ids, (text, tokenize([text]), reference(text))
    print(f"{'CLIP: ids of ' + str(len(texts)) + ' texts':64} equal")
    reference.save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    _, tokenize2 = checkpoint.load_clip(folder, "cpu", torch.float32)
    assert all(tokenize2([t]).equal(tokenize([t])) for t in texts)
    ids, pixels = tokenize(texts[:3]), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        b = theirs(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))
        report("CLIP: logits", ours(pixels, ids), b.logits_per_image)
        checkpoint.save_clip(ours, tokenize, tmp / "saved clip")
        again = transformers.CLIPModel.from_pretrained(tmp / "saved clip")
        b = again(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))
        report("CLIP saved by us: logits", ours(pixels, ids), b.logits_per_image)
    reference = transformers.CLIPTokenizer.from_pretrained(tmp / "saved clip")
    assert all(tokenize([text])[0].tolist() == reference(text).input_ids for text in texts)
    return folder


def parts(tmp, clip):
    """Vicuna's kind, Llama-3's and Phi-3's: the language model of load_parts against transformers'."""
    tok = tokenizer()
    sizes = dict(vocab_size=tok.vocab_size, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, intermediate_size=56, pad_token_id=0)
    kinds = ((transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
             (transformers.Phi3Config, transformers.Phi3ForCausalLM, {"sliding_window": 9}))
    for config, kind, more in kinds:
        theirs, folder = randomize(kind(config(**sizes, **more))), tmp / kind.__name__
        theirs.save_pretrained(folder)
        tok.save(folder)
        ours, _ = checkpoint.load_parts(folder, clip, dtype=torch.float32, device="cpu")
        ids = torch.randint(0, tok.vocab_size, (2, 31))
        with torch.no_grad():
            report(f"parts, {kind.__name__}: logits", ours.llama.lm_head(ours(ids)), theirs(ids).logits)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}; largest error / largest value")
    with tempfile.TemporaryDirectory() as tmp:
        ours_to_theirs(Path(tmp))
        theirs_to_ours(Path(tmp))
        parts(Path(tmp), clip_towers(Path(tmp)))
