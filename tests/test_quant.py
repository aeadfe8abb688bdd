"""quant.py: how near the smaller weights are, that every way of multiplying by them agrees, and checkpoints of them.

    python -m pytest tests/test_quant.py
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import one_line, with_compiler
from safetensors.torch import load_file, save_file

import checkpoint
import lora
import quant
import sample
from cases import relative_error
from chat import IMAGE
from clip import VisionConfig
from commandline import run
from generate import generate
from llama import LlamaConfig, side_by_side
from quant import GROUP, SCHEMES, Int4Linear, Int8Linear
from vipllava import ViPLLaVA, ViPLLaVAConfig


def layer_of(scheme: str, weight: torch.Tensor):
    layer = SCHEMES[scheme](weight.size(1), weight.size(0))
    layer.load_state_dict(SCHEMES[scheme].compress(weight), assign=True)
    return layer


def weight_of(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Rows and groups of very different sizes, one of them all zero, one constant."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= 10 ** (3 * torch.rand(outputs, inputs // GROUP, 1, generator=generator) - 3).expand(-1, -1, GROUP).flatten(1)
    weight[0], weight[1] = 0, 0.37
    return weight


def dense(layer) -> torch.Tensor:
    """What the layer's numbers stand for, (out, in), by the definition."""
    if isinstance(layer, Int8Linear):
        return layer.weight * layer.scale[:, None]
    low, high = layer.weight & 15, layer.weight >> 4
    q = torch.stack([low, high], dim=-1).flatten(1).float()  # in turns
    return q * layer.scale.repeat_interleave(GROUP, dim=1) + layer.low.repeat_interleave(GROUP, dim=1)


# -- layers ------------------------------------------------------------------------------------------------------------


def test_eight_bits_are_near():
    """Guards against: one scale for all rows, numbers cut off instead of rounded, a division by a row of zeros."""
    weight = weight_of(64, 256)
    layer = layer_of("int8", weight)
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().amax(dim=1)[2:].eq(127).all()
    assert ((dense(layer) - weight).abs() <= 0.5001 * weight.abs().amax(dim=1, keepdim=True) / 127).all()


def test_four_bits_are_near():
    """Guards against: one scale for several groups, zero taken for the middle, 16 steps where there are 15."""
    weight = weight_of(64, 512)
    layer = layer_of("int4", weight)
    assert layer.weight.dtype == torch.uint8 and layer.weight.shape == (64, 256)
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    allowed = 0.5 * (high - low) / 15 + 0.01 * low.abs().maximum(high.abs())  # scale and low have 8 bits of precision
    assert ((dense(layer).unflatten(1, (-1, GROUP)) - groups).abs() <= allowed).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 256), (40, 128), (1024, 384)])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (3, 50)])
def test_every_way_to_multiply_agrees(scheme, dtype, shape, rows):
    """Guards against: a kernel that wants another layout, or rows of another shape; few and many rows; shapes that the
    kernel can't take."""
    weight = weight_of(*shape)
    layer = layer_of(scheme, weight)
    x = torch.randn(*rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = F.linear(x.double(), dense(layer).double()).float()
    plain = layer(x)
    assert plain.dtype == dtype and plain.shape == (*rows, shape[0])
    assert relative_error(plain.float(), expected) < 0.012
    layer.pack()
    assert layer.packed == (shape[0] % 64 == 0 if scheme == "int4" else quant.multiplies_whole_numbers())
    assert relative_error(layer(x).float(), expected) < 0.012


def test_a_large_number_in_half_precision(monkeypatch):
    """Guards against: infinity on a GPU, which multiplies in the type of x, where whole weights make large sums."""
    monkeypatch.setattr(quant, "product_type", lambda x: x.dtype)
    weight = torch.zeros(64, 128)
    weight[:, 5] = 2.0
    x = torch.zeros(40, 128, dtype=torch.float16)
    x[:, 5] = 1300
    y = layer_of("int8", weight)(x)
    assert y.dtype == torch.float16 and (y - 2600).abs().max() < 20


@pytest.mark.skipif(
    not torch.cpu._is_vnni_supported() or "ONEDNN_MAX_CPU_ISA" in os.environ, reason="no instructions for 8 bits to test"
)
def test_whole_numbers_keep_sixteen_bits():
    """Guards against: sums that are cut off at 16 bits, one row's size taken for all, a wrong zero point, another result
    where it is compiled."""
    generator = torch.Generator().manual_seed(1)
    assert quant.multiplies_whole_numbers()
    layer = layer_of("int8", weight_of(192, 512))
    weight = dense(layer).double()
    layer.pack()
    x = torch.randn(40, 512, generator=generator) * 10 ** torch.linspace(-6, 4, 40)[:, None]
    x[3], x[4], x[5, 7] = 0, -1, 1e6
    before, y = x.clone(), layer(x)
    assert torch.equal(x, before) and y[3].eq(0).all()
    limit = x.abs().amax(dim=1, keepdim=True).double() / 32512 / 2 * weight.abs().sum(dim=1)  # half a step of each input
    assert ((y - x.double() @ weight.T).abs() <= 1.01 * limit + 1e-6 * y.abs()).all()
    compiled = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y, rtol=0, atol=0)


@with_compiler
@pytest.mark.parametrize("rows", [1, 7, 150])
@pytest.mark.parametrize("scheme, whole", [("int8", True), ("int8", False), ("int4", False)])
def test_the_compiler_multiplies_alike(monkeypatch, scheme, whole, rows):
    """Guards against a kernel that the compiler's last stage has no use for, or another one for as many rows."""
    torch.compiler.reset()
    can = quant.multiplies_whole_numbers()
    monkeypatch.setattr(quant, "multiplies_whole_numbers", lambda: whole and can)
    layer = layer_of(scheme, weight_of(192, 512))
    layer.pack()
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True)(x)
        assert y.dtype == x.dtype and relative_error(y.float(), layer(x).float()) < 0.01
    torch.compiler.reset()


@pytest.mark.parametrize("scheme", ["", *SCHEMES])
def test_layers_side_by_side_share_what_is_prepared(scheme, monkeypatch):
    """Guards against: an input made ready for each layer anew, and one that layers without such a form can't take."""
    weights = [weight_of(128, 256), weight_of(192, 256)]
    layers = [layer_of(scheme, weight) if scheme else torch.nn.Linear(256, len(weight)) for weight in weights]
    quant.pack(torch.nn.ModuleList(layers))
    x, calls, fixed16 = torch.randn(2, 3, 256), [], quant.fixed16
    alone = [layer(x) for layer in layers]
    monkeypatch.setattr(quant, "fixed16", lambda x: calls.append(1) or fixed16(x))
    for y, expected in zip(side_by_side(x, *layers), alone, strict=True):
        assert torch.equal(y, expected)
    assert len(calls) == (scheme == "int8" and layers[0].packed)


def test_a_layout_that_is_not_known_is_left_to_its_kernel():
    """Guards against: numbers unpacked in another order than this CPU packs them, in whatever blocks."""
    layer = layer_of("int4", weight_of(128, 256))
    q = layer.numbers()
    layer.pack()
    assert layer.unlayout.func is quant.from_blocks and torch.equal(layer.unlayout(layer.weight), q.T)
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    layer.unlayout = layer.unpacked = None
    torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_a_gpus_layout_is_undone():
    """Guards against: numbers of a GPU's tiles in another order than its instructions take them (m16n8k16: a thread holds,
    of one output, inputs 2c, 2c + 1, 2c + 8, 2c + 9 of 16)."""
    q = torch.randint(16, (16, 256), generator=torch.Generator().manual_seed(1))
    packed = torch.zeros(2, 2, 32, 4, dtype=torch.int64)
    for n in range(16):
        for k in range(256):
            pair, odd = k % 32 // 16 * 2 + k % 16 // 8, k % 2
            packed[n // 8, k // 128, n % 8 * 4 + k % 8 // 2, k % 128 // 32] |= q[n, k] << 4 * (pair + 4 * odd)
    packed = torch.where(packed < 2**31, packed, packed - 2**32).int()
    assert torch.equal(quant.from_tiles(packed), q.T)


def test_4_bits_unpacked_in_blocks(monkeypatch):
    """Guards against blocks of outputs that are cut elsewhere than the kernel's layout has them."""
    layer, x = layer_of("int4", weight_of(448, 256)), torch.randn(quant.SOME, 256)
    layer.pack()
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr(quant, "BLOCK", 100 * 256)  # 64 of the 448 outputs at once
        torch.testing.assert_close(layer(x), whole)
    assert relative_error(layer(x), whole) < 1e-6  # where gradients are wanted, new memory


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, tiny):
    """A random model, saved in 16 bits: its folder. It has rows of words that need more when saved, as the official."""
    torch.manual_seed(5)
    text = LlamaConfig(tiny.vocab_size, width=128, layers=2, heads=4, kv_heads=2, mlp=256, context=64)
    vision = VisionConfig(image_size=24, patch_size=8, width=20, layers=2, heads=5, mlp=28)
    model = ViPLLaVA(ViPLLaVAConfig(vision, text, (-2, 1), image_token_id=tiny.vocab_size))
    with torch.no_grad():
        for p in model.llama.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    checkpoint.save(model.bfloat16(), tiny, tmp_path / "base")
    return tmp_path / "base"


def run_model(model) -> tuple[torch.Tensor, list]:
    """Logits of words about an image, and a greedy answer."""
    ids = torch.tensor([[1, *[IMAGE] * 9, 5, 6, 7]])
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1)).to(model.llama.norm.weight.dtype)
    with torch.no_grad():
        logits = model.llama.lm_head(model(ids, pixels))[0, :, : model.config.image_token_id].float()
    return logits, [token for (token,) in generate(model, [[1, IMAGE, 5, 6, 7]], pixels, max_new_tokens=8)]


@pytest.mark.parametrize("scheme, error, size", [("int8", 0.03, 0.55), ("int4", 0.5, 0.31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_loading_and_from_a_file_are_the_same(base, scheme, error, size, dtype, tmp_path):
    """Guards against: matrices swapped, a part left in 16 bits or one quantised that is not to be; a file read twice as
    other numbers."""
    plain, _ = checkpoint.load(base, "cpu", dtype)
    whole, tokenizer = checkpoint.load(base, "cpu", dtype, quantize=scheme)
    assert whole.config == replace(plain.config, quantized=scheme)
    kinds = {name for name, part in whole.named_modules() if isinstance(part, SCHEMES[scheme])}
    assert kinds == {n for n, part in plain.named_modules() if n.startswith("llama") and isinstance(part, torch.nn.Linear)}
    logits, answer = run_model(whole)
    assert 1e-4 < relative_error(logits, run_model(plain)[0]) < error

    assert run(quant.main, [str(base), str(tmp_path / "small"), "--bits", scheme[-1]]) == 0
    again, _ = checkpoint.load(tmp_path / "small", "cpu", dtype)
    assert again.config == replace(whole.config, text=again.config.text)  # which may have got rows
    torch.testing.assert_close(run_model(again)[0], logits, rtol=0.02, atol=0.05)
    assert run_model(again)[1] == answer
    kept = [(name, p) for name, p in checkpoint.load(base, "cpu", "stored")[0].state_dict().items() if name.startswith("pro")]
    stored = checkpoint.load(tmp_path / "small", "cpu", "stored")[0].state_dict()
    assert all(torch.equal(p, stored[name]) and p.dtype == torch.bfloat16 for name, p in kept)
    matrices = [p.nbytes for name, p in plain.state_dict().items() if quant.TARGET.fullmatch(name)]
    smaller = [x.nbytes for name, x in again.state_dict().items() if quant.TARGET.fullmatch(name)]
    assert sum(smaller) / sum(matrices) < size * 2 / dtype.itemsize


@pytest.mark.parametrize("scheme, part, dtype", [
    ("int8", "weight", torch.uint8), ("int8", "scale", torch.float16), ("int4", "weight", torch.int8), ("int4", "low", torch.int32),
])
def test_numbers_of_another_type_are_refused(base, tmp_path, scheme, part, dtype):
    """Guards against bits that are taken for another number, which answer nonsense, and a kernel's traceback."""
    assert run(quant.main, [str(base), str(tmp_path / "small"), "--bits", scheme[-1]]) == 0
    path = tmp_path / "small" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(f"down_proj.{part}"))
    save_file(tensors | {name: tensors[name].to(dtype)}, path)
    with pytest.raises(ValueError, match=f"{name} is {dtype}; expected torch.[a-z0-9]+"):
        checkpoint.load(tmp_path / "small", "cpu", torch.float32)


def test_an_adapter_is_merged_before(base, tmp_path):
    """Guards against: an adapter lost, or added to numbers that have been rounded."""
    model, _ = checkpoint.load(base, "cpu", torch.float32)
    lora.add(model, 4, 8.0, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for part in lora.adapters(model).values():
            part.lora_B.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    lora.save(model, tmp_path / "adapter", str(base))
    merged, _ = checkpoint.load(tmp_path / "adapter", "cpu", torch.float32)
    small, _ = checkpoint.load(tmp_path / "adapter", "cpu", torch.float32, quantize="int8")
    unchanged, _ = checkpoint.load(base, "cpu", torch.float32)
    near, far = (relative_error(run_model(small)[0], run_model(other)[0]) for other in (merged, unchanged))
    assert near < 0.1 and far > 5 * near


def test_what_is_refused(base, tmp_path, capsys):
    """Guards against: rounding twice, weights saved in one device's layout, training numbers that can't move."""
    small = str(tmp_path / "small")
    assert run(quant.main, [str(base), small]) == 0
    weights = (tmp_path / "small" / "model.safetensors").read_bytes()
    assert run(quant.main, [str(base), small, "--bits", "4"]) == 2 and "holds a model already" in capsys.readouterr().err
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == weights
    assert run(quant.main, [str(base), str(base)]) == 2 and "holds a model already" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'int4' of a model that is int8 already") as error:
        checkpoint.load(small, "cpu", quantize="int4")
    one_line(error)
    with pytest.raises(ValueError, match="quantize is 'int3'; expected int8 or int4"):
        checkpoint.load(base, "cpu", quantize="int3")
    model, tokenizer = checkpoint.load(base, "cpu", quantize="int4")
    with pytest.raises(ValueError, match="expected a model loaded with ready=False"):
        checkpoint.save(model, tokenizer, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    with pytest.raises(ValueError, match="a matrix of 100 inputs in 4 bits; expected a multiple of 128"):
        Int4Linear.compress(torch.zeros(8, 100))
    capsys.readouterr()
    import train

    assert run(train.main, ["tiny-markers", "--model", small, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {small} is int8; expected 16 or 32 bits a weight\n"
    lora.save(lora.add(checkpoint.load(base, "cpu")[0], 2, 4.0), tmp_path / "adapter", small)
    with pytest.raises(ValueError, match=f"an adapter of {small}, which is int8; expected 16 bits"):
        checkpoint.load(tmp_path / "adapter", "cpu")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_command_line(scheme, capsys):
    """Guards against: a flag that does nothing. The small model still knows the ring."""
    sizes = []
    real = checkpoint.load

    def load(*args, **options):
        model, tokenizer = real(*args, **options)
        sizes.append(model.config.quantized)
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", load)
        assert run(sample.main, ["--image", "examples/scene.png", "--arrow", "322,92", "What is this?", "--quantize", scheme]) == 0
    assert capsys.readouterr().out == "a blue ring\n" and sizes == [scheme]
