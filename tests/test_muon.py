"""Muon's steps, beside what they stand for (an SVD) and beside PyTorch's own, in bfloat16."""

import math

import pytest
import torch

from muon import Muon, is_hidden_matrix, orthogonal
from recipe import Recipe
from train import make_optimizers, tiny_model


@pytest.mark.parametrize("shape", [(12, 12), (7, 30), (30, 7)])
def test_a_matrix_is_made_orthogonal(shape):
    """Guards against an iteration that diverges, one that turns tall matrices, and one that mixes its directions up."""
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * 100
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    seen = left.mT @ orthogonal(matrices) @ right.mT  # diagonal where the directions are those of the matrix
    lengths = seen.diagonal(dim1=-2, dim2=-1)
    assert (seen - torch.diag_embed(lengths)).abs().max() < 1e-3
    assert 0.3 < lengths.min() and lengths.max() < 1.25 and 0.7 < lengths.median()


def test_a_matrix_of_zeros_stays():
    """Guards against 0 / 0, where a part of the model has no gradient in a step."""
    assert torch.equal(orthogonal(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def test_steps_are_those_of_pytorch():
    """Guards against another momentum, another factor for a shape, a forgotten decay, and states that are exchanged."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((16, 16), (24, 16), (16, 24), (16, 16))] for _ in range(2))
    optimizers = [Muon(ours, lr=0.02, weight_decay=0.5),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")]
    for _ in range(6):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs):
        moved = (other - 1).norm()
        assert moved > 0.5 and (one - other).norm() < 0.01 * moved


def test_a_closure_is_called_once_and_its_loss_returned():
    """Guards against an optimizer that trainers of other libraries can't drive."""
    weight = torch.nn.Parameter(torch.ones(2, 3))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Muon([weight]).step(closure) == 6 and not torch.equal(weight.detach(), torch.ones(2, 3))


def test_vectors_are_refused():
    """Guards against a norm of one row that is stepped as if it were a matrix."""
    with pytest.raises(ValueError, match=r"a parameter of shape \(4,\) came to Muon; expected matrices"):
        Muon([torch.nn.Parameter(torch.ones(4))])


@pytest.mark.parametrize("given", [{"lr": -1.0}, {"lr": math.nan}, {"momentum": 1.0}, {"weight_decay": -0.1}])
def test_numbers_out_of_range_are_refused(given):
    """Guards against a step uphill, as AdamW does."""
    with pytest.raises(ValueError, match="expected 0 or more, and a momentum below 1"):
        Muon([torch.zeros(2, 2)], **given)


def test_what_is_for_muon_and_what_for_adamw():
    """Guards against embeddings whose rare words are moved as far as any, and matrices left to AdamW."""
    recipe = Recipe("markers", steps=1, optimizer="muon", weight_decay=0.1)
    model, _ = tiny_model(recipe)
    adamw, muon = make_optimizers(model, recipe)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert matrices | others == set(names.values()) and not matrices & others
    assert {name.rsplit(".", 2)[-2] for name in matrices} == {
        "q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj",
        "linear_1", "linear_2"}
    assert all(is_hidden_matrix(name, p) == (name in matrices) for name, p in model.named_parameters())
    assert {group["weight_decay"] for group in muon.param_groups} == {0.1}
