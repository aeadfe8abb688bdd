"""halves.py: every way to multiply by weights of 16 bits comes to the same, with what it leaves behind.

    python -m pytest tests/test_halves.py
"""

import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import with_compiler

import halves
from cases import relative_error
from halves import HalfLinear


@pytest.mark.parametrize("wide", [None, 2, 32])
@pytest.mark.parametrize("bias", [False, True])
def test_sixteen_bits_may_be_multiplied_in_thirty_two(wide, bias, monkeypatch):
    """Guards against: a type that leaks out; on a CPU without bfloat16 the sum over inputs is exact in float32."""
    monkeypatch.setattr(halves, "WIDE", {torch.bfloat16: wide} if wide else {})
    layer = torch.nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16)
    model = torch.nn.Sequential(layer)
    halves.widen(model)
    assert type(layer) is HalfLinear
    for rows in (1, 2, 100):
        x = torch.randn(rows, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
        expected = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
        assert layer(x).dtype == torch.bfloat16 and layer(x[None]).shape == (1, rows, 48)
        assert relative_error(layer(x).float(), expected) < 0.01
    seen = []
    monkeypatch.setattr(F, "linear", lambda x, w, bias: seen.append((x.dtype, w.dtype, torch.backends.mkldnn.enabled)) or x)
    for rows in (1, 2, 100):
        layer(torch.zeros(rows, 64, dtype=torch.bfloat16))
    kinds = [torch.float32 if wide and rows >= wide else torch.bfloat16 for rows in (1, 2, 100)]
    assert seen == [(torch.bfloat16, torch.bfloat16, False), (kinds[1], kinds[1], True), (kinds[2], kinds[2], True)]


def test_many_rows_of_float16_are_multiplied_in_thirty_two():
    """Guards against: PyTorch's plain loop for a prompt, which takes several times as long."""
    kinds = [halves.product_type(torch.empty(rows, 8, dtype=torch.float16)) for rows in (31, 32)]
    assert kinds == [torch.float16, torch.float32]
    assert halves.product_type(torch.empty(99, 8, dtype=torch.float32)) == torch.float32
    assert halves.product_type(torch.empty(99, 8, dtype=torch.float16, device="meta")) == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_row_leaves_the_switch_as_it_was(dtype):
    """Guards against: oneDNN off for all that follows, after a mistake, too."""
    layer = torch.nn.Linear(64, 48, dtype=dtype)
    halves.widen(layer)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 1, 32, dtype=dtype))
    assert torch.backends.mkldnn.enabled


def test_threads_leave_the_switch_as_it_was(monkeypatch):
    """Guards against: oneDNN off for good, where one thread finds it off because another is multiplying, and says so last."""
    layer, inside, go = torch.nn.Linear(64, 48, dtype=torch.bfloat16), threading.Event(), threading.Event()
    halves.widen(layer)
    plain = F.linear

    def slow(*args):
        if threading.current_thread() is first:
            inside.set()
            go.wait(5)
        return plain(*args)

    monkeypatch.setattr(halves.F, "linear", slow)
    first, second = (threading.Thread(target=layer, args=[torch.zeros(1, 64, dtype=torch.bfloat16)]) for _ in range(2))
    first.start()
    inside.wait(5)
    second.start()
    second.join(0.2)  # it waits
    go.set()
    for thread in (first, second):
        thread.join()
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=with_compiler)])
@pytest.mark.parametrize("outputs, bias", [(48, False), (50, True), (3, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_row_when_compiled(backend, outputs, bias, dtype):
    """Guards against: rows in another order, those that a fourth leaves over, no bias, sums in 16 bits."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(1024, outputs, bias, dtype=dtype)
    layer.weight.data = torch.randn(outputs, 1024, generator=generator).to(dtype)
    halves.widen(layer)
    x = torch.randn(1, 1, 1024, generator=generator).to(dtype)
    with torch.no_grad():
        y = torch.compile(layer, backend=backend, fullgraph=True)(x)
        expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert y.shape == expected.shape and y.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=1e-4)  # rounded once, at the end


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_that_converts_its_weight_in_blocks(monkeypatch, bias):
    """Guards against: blocks in another order, a bias of another block, a result that the next product overwrites, memory
    that one mode has made and another can't write to."""
    monkeypatch.setattr(halves, "BLOCK", 100)  # 4 of the 17 outputs at once
    monkeypatch.setattr(halves, "scratch", halves.Scratch())
    x, weights = torch.randn(2, 3, 24), torch.randn(2, 17, 24).bfloat16()
    b = torch.randn(17) if bias else None
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            found = [halves.converting_product(x, w, b) for w in weights]
            for y, w in zip(found, weights):
                torch.testing.assert_close(y, F.linear(x, w.float(), b))


def test_gradients_go_through_the_weights_that_they_came_by():
    """Guards against memory that the next product writes to while the backward pass still wants the last one's weights."""
    x, weights = torch.randn(3, 24, requires_grad=True), torch.randn(2, 17, 24).bfloat16()
    sum(halves.converting_product(x, w).sum() for w in weights).backward()
    torch.testing.assert_close(x.grad, weights.float().sum(dim=(0, 1)).expand_as(x))
