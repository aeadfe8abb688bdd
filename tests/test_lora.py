"""LoRA: the same function merged and unmerged, and a file that goes with its base."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import checkpoint
import lora
import quant
from clip import VisionConfig
from commandline import run
from llama import LlamaConfig
from vipllava import ViPLLaVA, ViPLLaVAConfig

VISION = VisionConfig(image_size=24, patch_size=8, width=20, layers=2, heads=5, mlp=28)


@pytest.fixture
def base(tmp_path, tiny):
    """A random model, saved: its folder."""
    torch.manual_seed(5)
    text = LlamaConfig(tiny.vocab_size + 2, width=24, layers=3, heads=4, kv_heads=2, mlp=36, context=64)
    model = ViPLLaVA(ViPLLaVAConfig(VISION, text, (-2, 1), image_token_id=tiny.vocab_size))
    with torch.no_grad():
        for p in model.llama.parameters():
            p.mul_(10 if p.dim() > 1 else 1)  # far from zero, so that every matrix counts
    checkpoint.save(model, tiny, tmp_path / "base")
    return tmp_path / "base"


def load(folder):
    return checkpoint.load(folder, "cpu", torch.float32)[0]


def logits(model, seed=0):
    embeds = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(seed))
    return model.llama.lm_head(model.llama(embeds)).detach()


def learn(model, seed=1):
    """As if trained: B is no longer zero, and the projector has moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in lora.adapters(model).values():
            part.lora_B.copy_(torch.randn(part.lora_B.shape, generator=generator))
        model.projector.linear_1.bias += 1
    return model


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_a_new_adapter_changes_nothing_and_trains_little(base):
    """Guards against a base that moves, a projector left frozen, and a start that is no longer the base."""
    model = load(base)
    before = logits(model)
    lora.add(model, rank=3, alpha=6)
    assert torch.equal(logits(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".lora_" in n or n.startswith("projector.")}
    assert len(lora.adapters(model)) == 3 * 7 and all(part.lora_A.abs().min() > 0 for part in lora.adapters(model).values())


def test_the_formula(base):
    """Guards against a scale that is forgotten or squared, and A and B exchanged."""
    part = lora.adapters(learn(lora.add(load(base), rank=3, alpha=6)))["llama.layers.1.mlp.up_proj"]
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    expected = x @ part.base.weight.T + 6 / 3 * (x @ part.lora_A.T) @ part.lora_B.T
    assert relative(part(x), expected) < 1e-6


def test_merged_and_unmerged_agree(base):
    """Guards against a merge that adds another change than the one trained."""
    model = load(base)
    before = logits(model)
    learn(lora.add(model, rank=3, alpha=6))
    apart = logits(model)
    assert relative(apart, before) > 0.1
    assert relative(logits(lora.merge(model)), apart) < 1e-4 and not lora.adapters(model)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in load(base).named_parameters()}


def test_targets(base):
    """Guards against targets that are read and not used, and a misspelled one that is passed over."""
    model = lora.add(load(base), rank=2, alpha=2, targets=("q_proj", "down_proj", "lm_head"))
    assert {name.rpartition(".")[2] for name in lora.adapters(model)} == {"q_proj", "down_proj", "lm_head"}
    assert len(lora.adapters(model)) == 2 * len(model.llama.layers) + 1
    with pytest.raises(ValueError, match="targets 'q'; expected one or more of q_proj"):
        lora.add(load(base), rank=2, alpha=2, targets=("q",))
    for rank, alpha in ((0, 1), (2, 0), (2, float("nan"))):
        with pytest.raises(ValueError, match="expected a rank of 1 or more"):
            lora.add(load(base), rank, alpha)


def test_a_generator_gives_the_same_adapter(base):
    """Guards against matrices from a shared random stream: a run could not be repeated."""
    made = [lora.add(load(base), 3, 6, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    first, again, other = (next(iter(lora.adapters(model).values())).lora_A for model in made)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_saved_loaded_and_merged(base, tmp_path, capsys):
    """Guards against an adapter that only the process that trained it can use: from its folder, and as a checkpoint."""
    model = learn(lora.add(load(base), rank=3, alpha=6, targets=("q_proj", "up_proj", "lm_head")))
    lora.save(model, tmp_path / "mine", str(base))
    whole = (base / "model.safetensors").stat().st_size
    assert (tmp_path / "mine" / lora.FILE).stat().st_size < whole / 2
    digests = {"digest": lora.digest(load(base).llama), "tower": lora.digest(load(base).vision)}
    assert lora.about(tmp_path / "mine") == {"base": str(base), **digests, "rank": 3, "alpha": 6.0,
                                             "targets": ["lm_head", "q_proj", "up_proj"], "template": "llava_v1"}
    loaded = load(tmp_path / "mine")
    assert relative(logits(loaded), logits(model)) < 1e-5 and not lora.adapters(loaded)
    assert torch.equal(loaded.projector.linear_1.bias, model.projector.linear_1.bias)
    assert run(lora.main, [str(tmp_path / "mine"), str(tmp_path / "merged")]) == 0
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        kept = {file.get_tensor(name).dtype for name in file.keys()}
    assert checkpoint.load(tmp_path / "merged", "cpu")[0].config.template == "llava_v1"
    assert kept == {torch.float32}  # as the base's, however little memory there is
    assert torch.equal(logits(load(tmp_path / "merged")), logits(loaded))
    weights = (base / "model.safetensors").read_bytes()
    assert run(lora.main, [str(tmp_path / "mine"), str(base)]) == 2 and "holds a model already" in capsys.readouterr().err
    assert run(quant.main, [str(tmp_path / "mine"), str(base)]) == 2 and "holds a model already" in capsys.readouterr().err
    assert (base / "model.safetensors").read_bytes() == weights
    assert run(lora.main, [str(base), str(tmp_path / "other")]) == 2 and "no adapter.safetensors in" in capsys.readouterr().err


def test_a_template_goes_with_the_adapter(base, tmp_path):
    """Guards against an adapter that is asked in another form than it has learned; an old one says nothing of it."""
    model = lora.add(load(base), rank=3, alpha=6)
    for template, name in (("llava_v0", "new"), (None, "old")):
        model.config = replace(model.config, template=template)
        lora.save(model, tmp_path / name, str(base))
    assert [load(tmp_path / name).config.template for name in ("new", "old")] == ["llava_v0", "llava_v1"]
    model.config = replace(model.config, template="another")
    lora.save(model, tmp_path / "odd", str(base))
    with pytest.raises(ValueError, match="can't be read as an adapter"):
        lora.about(tmp_path / "odd")


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    """Guards against matrices of one model in another, or some of them only."""
    lora.save(lora.add(load(base), rank=3, alpha=6), tmp_path / "mine", str(base))
    model = load(base)
    model.llama.layers = model.llama.layers[:2]
    with pytest.raises(ValueError, match=r"doesn't fit .*layers\.2\."):
        lora.load(model, tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="no adapter.safetensors in"):
        lora.load(model, base)
    half, tokenizer = checkpoint.load(base, "cpu", torch.float16)
    assert lora.load(half, tmp_path / "mine")  # the same weights, if rounded
    for part in ("vision", "llama"):
        model = load(base)
        with torch.no_grad():
            for weight in getattr(model, part).parameters():
                weight += 0.1 * weight.std() * torch.randn_like(weight)
        another = tmp_path / part
        checkpoint.save(model, tokenizer, another)
        lora.save(lora.add(load(base), rank=3, alpha=6), tmp_path / f"on {part}", str(another))
        with pytest.raises(ValueError, match=f"was trained on other weights than .*{part} has now"):
            checkpoint.load(tmp_path / f"on {part}")
    file = tmp_path / "mine" / lora.FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="can't be read as an adapter"):
        checkpoint.load(tmp_path / "mine")


def test_what_cannot_have_an_adapter_is_refused(base, tmp_path):
    """Guards against a first adapter that a second one freezes, an AttributeError for a quantised model, and files that do not
    load: of a model with adapters, a quantised one beside them, an adapter beside a whole model, which hides it."""
    model = lora.add(load(base), 2, 4.0, ["q_proj"])
    with pytest.raises(ValueError, match="has adapters already"):
        lora.add(model, 2, 4.0, ["v_proj"])
    assert all(part.lora_A.requires_grad for part in lora.adapters(model).values())
    with pytest.raises(ValueError, match="adapters that are not merged"):
        checkpoint.save(model, None, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    with pytest.raises(ValueError, match="the model has an adapter, llama.layers.0"):
        quant.quantize(model, "int8")
    with pytest.raises(ValueError, match="expected another folder for an adapter"):
        lora.save(model, base, "somewhere")
    with pytest.raises(ValueError, match="no adapters"):
        lora.save(load(base), tmp_path / "none", "somewhere")
    with pytest.raises(ValueError, match="is int8 already"):
        lora.add(quant.quantize(load(base), "int8"), 2, 4.0)
    for rank, targets, words in ((2.5, ["q_proj"], "rank 2.5"), (2, [], "expected one or more of q_proj")):
        with pytest.raises(ValueError, match=words):
            lora.add(load(base), rank, 4.0, targets)


def test_an_adapter_is_float32_whatever_the_default(base):
    """Guards against small steps that are rounded away."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = lora.add(load(base), 2, 4.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}
