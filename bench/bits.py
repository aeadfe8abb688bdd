"""What 16, 8 and 4 bits cost in accuracy: logits of a random decoder of true shapes, beside those of 32 bits.

    python -m bench.bits --size 7b

Block after block is made, run in each precision on what its own blocks before gave, and forgotten: a 7B model needs
3 GB. Prints the error of the logits, relative to their norm, and at how many positions the likeliest token is the same.
Random weights are the hard case for the second: their logits lie close together. What it costs a trained model:

    python quant.py tiny runs/tiny-int4 --bits 4 && python -m evals.scenes --model runs/tiny-int4 -n 2000
"""

import copy
import json
import sys
from functools import partial

import torch
import torch.nn as nn

from bench.training import SIZES
from commandline import Parser, at_least, check_device, run
from llama import Block, LlamaConfig, RMSNorm, rope_table
from quant import SCHEMES


def in_precision(module: nn.Module, precision: str) -> nn.Module:
    """A copy, its linear layers in this precision."""
    if precision in ("float32", "bfloat16"):
        return copy.deepcopy(module).to(getattr(torch, precision))
    if isinstance(module, nn.Linear):
        layer = SCHEMES[precision](module.in_features, module.out_features).to(module.weight.device)
        layer.load_state_dict(SCHEMES[precision].compress(module.weight))
        layer.pack()
        return layer
    other = copy.copy(module)
    other._modules = {name: in_precision(child, precision) for name, child in module.named_children()}
    return other


@torch.no_grad()
def errors(config: LlamaConfig, tokens: int, device: torch.device, seed: int = 0) -> dict[str, dict[str, float]]:
    """Precision -> the logits' relative error, and the share of positions with the same likeliest token."""
    torch.manual_seed(seed)

    def random(module: nn.Module) -> nn.Module:
        for p in module.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        return module

    with device:
        x = torch.randn(1, tokens, config.width)
        positions = torch.arange(tokens)[None]
        hidden = {precision: x for precision in ("float32", "bfloat16", *SCHEMES)}
        for i in range(config.layers + 1):
            last = i == config.layers
            if last:
                made = nn.Sequential(RMSNorm(config.width, config.eps), nn.Linear(config.width, config.vocab_size, bias=False))
            else:
                made = Block(config)
            random(made)
            for precision, x in hidden.items():
                dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
                context = () if last else rope_table(positions, config, dtype)
                hidden[precision] = in_precision(made, precision)(x.to(dtype), *context)
    true = hidden.pop("float32")[0]
    found = {}
    for precision, logits in hidden.items():
        same = (logits[0].argmax(dim=-1) == true.argmax(dim=-1)).float().mean().item()
        found[precision] = {"error": ((logits[0].float() - true).norm() / true.norm()).item(), "same": same}
    return found


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.bits", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b", help="whose shapes (7b)")
    parser.add_argument("--tokens", type=partial(at_least, 2), default=64, help="of a random text (64)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: cuda where there is one)")
    args = parser.parse_args(argv)
    found = errors(SIZES[args.size].text, args.tokens, check_device(args.device))
    for precision, said in found.items():
        print(f"{precision:9} relative error of the logits {said['error']:.4f}, the same likeliest token {said['same']:.0%}")
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(run(main))
