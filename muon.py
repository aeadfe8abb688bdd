"""Muon: the step of a matrix is its momentum, made orthogonal (Jordan et al., kellerjordan.github.io/posts/muon, 2024).

    momentum   m <- 0.95 m + 0.05 gradient
    step       w <- w - lr · 0.2 sqrt(longer side) · orthogonal(0.05 gradient + 0.95 m)

A gradient is nearly all along a few directions, and so are Adam's steps; orthogonal() gives every direction the same
length, so that rare ones are learned, too, and a small model from nothing leaves its plateaus early (README has figures).
The factor makes a step about as large as one of AdamW, whose rates and decay then serve both (Liu et al., arXiv
2502.16982, section 2.2). As all steps have one length, a gradient of zero ends none: momentum goes on as fast as before.

It is for matrices between hidden states. Embeddings, the head, vectors and CLIP's patches are left to AdamW:

    optimizers = [torch.optim.AdamW(others, lr=1e-3), Muon(matrices, lr=1e-3)]

torch.optim.Muon computes the same in bfloat16, a matrix at a time, which on a CPU takes longer, and many times as long
where there are no instructions for bfloat16. Here matrices of one shape go together, in their own dtype.
"""

import math

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial; they drive most singular values into 0.7 … 1.2, and fast
ROUNDS = 5


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(N, R, C) -> (N, R, C): of each U S V^T about U V^T, by Newton and Schulz's iteration: products only, no SVD."""
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT).mT
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(ROUNDS):
        gram = x @ x.mT  # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram²) x
    return x


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Does Muon suit it? name: as named_parameters() gives it."""
    return parameter.dim() == 2 and "embed" not in name and "lm_head" not in name


class Muon(torch.optim.Optimizer):
    """Of matrices alone; lr and weight_decay as AdamW's. ValueError: a parameter is no matrix, or a number out of range."""

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        if not (0 <= lr < math.inf and 0 <= momentum < 1 and 0 <= weight_decay < math.inf):
            raise ValueError(f"lr {lr}, momentum {momentum}, weight_decay {weight_decay}; expected 0 or more, and a momentum below 1")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dim() != 2:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} came to Muon; expected matrices")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            alike = {}
            for p in (p for p in group["params"] if p.grad is not None):
                alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
            for parameters in alike.values():
                self._step(parameters, **group)
        return loss

    def _step(self, parameters: list[torch.Tensor], lr: float, momentum: float, weight_decay: float, **_) -> None:
        """Of parameters of one shape."""
        ahead = []
        for p in parameters:
            if p not in self.state:
                self.state[p]["momentum"] = torch.zeros_like(p)
            moving = self.state[p]["momentum"]
            moving.lerp_(p.grad, 1 - momentum)
            ahead.append(p.grad.lerp(moving, momentum))
        size = lr * 0.2 * max(parameters[0].shape) ** 0.5
        for p, direction in zip(parameters, orthogonal(torch.stack(ahead))):
            p.mul_(1 - lr * weight_decay).sub_(direction, alpha=size)
