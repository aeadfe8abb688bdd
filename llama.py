"""LLaMA from scratch: the voice of ViP-LLaVA (Touvron et al., arXiv 2302.13971 and 2307.09288).

One decoder runs LLaMA-2 and Vicuna, Llama-3 (fewer key heads than query heads) and Phi-3-mini-4k (the same network
once its fused weights are split, with a sliding window). It takes embeddings, not ids, as an image enters as embeddings:

    embeds (B, T, C)   model.embed_tokens(ids), with patch embeddings spliced in
    hidden (B, T, C)   model(embeds): training, every position at once
    logits (B, V)      model.prefill(embeds, cache), the prompt; then model.decode(ids, cache), token by token

Pitfalls
  * RoPE comes in two conventions. Official *Hugging Face* weights expect "rotate-half": channel i turns together with
    channel i + D/2. (Meta's own files interleave channels 2i and 2i + 1; their q and k rows are permuted.)
  * Angles are computed in float32 whatever the weights' type: in bfloat16, position 257 is the same as position 256.
  * A batch of unequal prompts is padded on the *left*, so that all of them end in the same slot. `start` says where
    each row begins; positions count from there, and nothing before it is ever attended to.

Letters: B batch, T new tokens, S cache slots, C width, H heads, K key-value heads, D head width, L layers, V words.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder; the defaults are LLaMA-2-7B's, and Vicuna-7B-v1.5's."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp: int = 11008
    context: int = 4096  # tokens
    rope_theta: float = 10_000.0
    eps: float = 1e-5
    window: int | None = None  # a token sees this many, itself included; None: all before it

    @property
    def head_width(self) -> int:
        return self.width // self.heads


SIZES = {
    "tiny": LlamaConfig(1024, width=128, layers=4, heads=4, kv_heads=2, mlp=384, context=512),
    "phi3-mini": LlamaConfig(32064, width=3072, mlp=8192, window=2047),
    "7b": LlamaConfig(),
    "llama3-8b": LlamaConfig(128256, kv_heads=8, mlp=14336, context=8192, rope_theta=500_000.0),
    "13b": LlamaConfig(width=5120, layers=40, heads=40, kv_heads=40, mlp=13824),
}


class KVCache:
    """Keys and values of the tokens so far, in slots allocated once; every row of a batch fills the same slots.

    Row b's tokens lie in slots 0 … shared - 1, which all rows may begin with, and from start[b] on; what is between is
    padding, which has no position and is never attended to. `length`, a tensor on the device so that a step never waits
    for the host, counts the slots in use. `layers`: of each, its keys and values.
    """

    def __init__(self, config: LlamaConfig, start: torch.Tensor, slots: int, dtype: torch.dtype, shared: int = 0):
        shape = (start.size(0), config.kv_heads, slots, config.head_width)  # (B, K, S, D)
        empty = lambda: torch.zeros(shape, device=start.device, dtype=dtype)
        self.config, self.shared, self.start, self.dtype = config, shared, start, dtype
        self.layers = [(empty(), empty()) for _ in range(config.layers)]
        self.length = torch.zeros((), device=start.device, dtype=torch.long)
        self.slots = torch.arange(slots, device=start.device)  # (S,)
        self.real = (self.slots < shared) | (self.slots >= start[:, None])  # (B, S)

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots (T,) -> each token's place in its row's text, (B, T); padding has none, and any will do."""
        padding = (self.start - self.shared)[:, None]  # (B, 1)
        return torch.where(slots < self.shared, slots, (slots - padding).clamp(min=0))

    def continued(self, length: int, start: torch.Tensor, slots: int) -> "KVCache":
        """A new cache, all of whose rows begin with the first `length` tokens of this one's only row; start (B,) says
        in which slot each goes on."""
        cache = KVCache(self.config, start, slots, self.dtype, shared=length)
        for olds, news in zip(self.layers, cache.layers):
            for old, new in zip(olds, news):
                new[:, :, :length] = old[:, :, :length]
        cache.length.fill_(length)
        return cache


# -- leaves ----------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()  # the mean of squares overflows float16
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rope_table(positions: torch.Tensor, config: LlamaConfig, dtype: torch.dtype):
    """Cosines and sines for positions (B, T): two tensors (B, 1, T, D), computed in float32, returned in `dtype`."""
    D = config.head_width
    frequency = config.rope_theta ** (-torch.arange(0, D, 2, device=positions.device).float() / D)  # (D / 2,)
    angle = positions[:, None, :, None].float() * frequency  # (B, 1, T, D / 2)
    angle = torch.cat([angle, angle], dim=-1)  # (B, 1, T, D): channels i and i + D / 2 share an angle
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair of channels (i, i + D/2) of x (B, H, T, D) by its position's angle."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D / 2) each
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def side_by_side(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """x through each of the layers. Quantised ones may want it in another form, which is made once."""
    x = layers[0].prepare(x) if hasattr(layers[0], "prepare") else x
    return [layer(x) for layer in layers]


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D = config.width, config.head_width
        self.head_width = D
        self.q_proj = nn.Linear(C, config.heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.kv_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.kv_heads * D, bias=False)
        self.o_proj = nn.Linear(config.heads * D, C, bias=False)

    def forward(self, x, cos, sin, mask=None, kept=None, slots=None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C). cos, sin (B, 1, T, D): see rope_table. mask (B, 1, T, S): true where a token may look;
        None: at x alone, causally. kept: the layer's keys and values in a cache, (B, K, S, D) each; those of x go into its
        `slots` (T,)."""
        B, T, C = x.size()
        projected = side_by_side(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.view(B, T, -1, self.head_width).transpose(1, 2) for y in projected)  # (B, H or K, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if kept is not None:
            for old, new in zip(kept, (k, v)):
                old.index_copy_(2, slots, new.to(old.dtype))  # under autocast the new one's is another
            if mask is not None:
                k, v = kept
        grouped = k.size(1) != q.size(1)  # each key head serves H / K query heads
        q = q.to(k.dtype)  # a cache may have more bits
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C).to(projected[0].dtype))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = side_by_side(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)  # SwiGLU


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, *context) -> torch.Tensor:
        """context: what Attention.forward takes after x."""
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


# -- the decoder -----------------------------------------------------------------------------------------------------


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        if config.width % config.heads or config.heads % config.kv_heads or config.head_width % 2:
            raise ValueError(f"heads must divide width, kv_heads heads, and a head's width be even; got {config}")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, embeds: torch.Tensor, cache: KVCache | None = None, fresh: bool = False) -> torch.Tensor:
        """embeds (B, T, C) -> hidden (B, T, C), normalised and ready for lm_head.

        Without a cache the T tokens are the whole text (training; padding, if any, on the right, where causal attention
        never looks back from). With a cache they follow the tokens in it; `fresh`: there are none, nor is any row padded
        on the left, so that attention is plainly causal.
        """
        slots, mask, cos, sin = self.places(embeds, cache, fresh)
        x = embeds
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, mask, None if cache is None else cache.layers[i], slots)
        if cache is not None:
            cache.length += embeds.size(1)
        return self.norm(x)

    def places(self, embeds: torch.Tensor, cache: KVCache | None, fresh: bool = False):
        """Of tokens (B, T, C): their slots (T,), which slots they may see, (B, 1, T, S), and their rope_table."""
        T = embeds.size(1)
        slots = torch.arange(T, device=embeds.device)  # (T,)
        # On Apple's GPUs is_causal has seen the future, in 16 bits (github.com/pytorch/pytorch/issues/195910).
        told = self._windowed(T) or embeds.device.type == "mps"
        if cache is None or fresh and not told:
            positions = slots[None]  # (1, T)
            mask = self._mask(positions, positions) if told else None
        else:
            slots = cache.length + slots
            positions, mask = cache.positions(slots), self._cached_mask(slots, cache)  # (B, T), (B, 1, T, S)
        return slots, mask, *rope_table(positions, self.config, embeds.dtype)

    def _windowed(self, T: int) -> bool:
        return self.config.window is not None and T > self.config.window

    def _mask(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Which keys at positions (B, S) each query at a position (B, T) may see: boolean, (B, 1, T, S)."""
        distance = (queries[:, :, None] - keys[:, None])[:, None]  # (B, 1, T, S)
        seen = distance >= 0
        return seen if self.config.window is None else seen & (distance < self.config.window)

    def _cached_mask(self, slots: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Which slots of the cache the tokens in `slots` (T,) may see: boolean, (B, 1, T, S)."""
        seen = self._mask(cache.positions(slots), cache.positions(cache.slots)) & cache.real[:, None, None]
        # A padding token sees itself: a softmax over nothing is NaN, and NaN times zero would reach the others.
        return seen | (slots[:, None] == cache.slots)

    def prefill(self, embeds: torch.Tensor, cache: KVCache, fresh: bool = False) -> torch.Tensor:
        """The prompt, embeds (B, T, C), into the cache -> logits of the token that follows it, (B, V). fresh: see forward."""
        return self.lm_head(self(embeds, cache, fresh)[:, -1])

    def decode(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """One token a row, ids (B,), into the cache -> logits of the next, (B, V)."""
        return self.lm_head(self(self.embed_tokens(ids[:, None]), cache)[:, -1])


# -- from logits to a token ------------------------------------------------------------------------------------------


def sample(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """logits (B, V) -> ids (B,).

    temperature 0 takes the likeliest token. Otherwise logits / temperature, then only the top_k likeliest (0: all),
    then only the likeliest ones whose probabilities first sum to top_p, as Hugging Face orders the three. `generator`
    lives on the logits' device; None is PyTorch's global one. Raises ValueError for a value out of range, and on a CPU,
    where it makes nobody wait, for logits that are no numbers.
    """
    if not ((temperature == 0 or 1e-6 <= temperature < float("inf")) and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}; expected a temperature of 0 or at least 1e-6, "
            "top_k >= 0, 0 < top_p <= 1"
        )
    if logits.device.type == "cpu" and logits.isnan().any():
        raise ValueError("the logits are no numbers; expected sound weights, and in float16 ones that don't exceed it")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the same odds, and nothing overflows
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, index = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens: 0 for the first, which stays
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, (before >= top_p) & (before > 0))
        logits = logits.masked_fill(drop, float("-inf"))
    # As torch.multinomial does it, which would make the host wait: of clocks that ring at these rates, the first.
    chances = logits.softmax(dim=-1)
    return (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(dim=-1)
