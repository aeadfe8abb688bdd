"""Answers: prompts and marked images in, tokens out, one at a time, and nothing is computed twice.

    for (token,) in generate(model, [ids], pixels, max_new_tokens=64, stop_ids={tokenizer.eos}): ...

    embeds (B, T, C)   words and patches of the prompts, padded on the left
    logits (B, V)      llama.prefill(embeds, cache): the prompts at once
    token  (B,)        sample(logits); then logits = llama.decode(token, cache), again and again

What is kept
  * of an answer: keys and values of all tokens so far (llama.KVCache);
  * of a chat: a Memory. Its next question costs only its own tokens; the image is encoded again, and all of the chat
    computed anew, only when a marker has changed it;
  * of several questions about one marked image: the image is encoded once, and what the prompts begin with in common,
    the image among it, goes through the decoder once.

A GPU is never waited for while there is something to do: the next steps are launched before a step's token has come
to the host, so that a token which ends the answer is seen AHEAD steps late, and what followed it is dropped.
"""

import functools
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from numbers import Integral

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from chat import IMAGE
from llama import KVCache, Llama, sample
from vipllava import ViPLLaVA, ViPLLaVAConfig, expand, pad

AHEAD = 2  # steps that a GPU is given before the token of the first is read
# Few shapes, as each one is compiled anew:
BUCKET = 64  # replayed_prefill fills a lone prompt up to a multiple of so many tokens
ROOM = 256  # its cache has a multiple of so many slots, and at least doubles once outgrown


class Memory:
    """What the last call for a chat left: its image, and the tokens whose keys and values are in the cache. Of one model,
    whose weights stay as they are; with another nothing is known."""

    def __init__(self):
        self.cache: KVCache | None = None
        self.model = lambda: None  # or a weak reference
        self.forget()

    def forget(self) -> None:
        """Everything but the room that the cache takes."""
        self.pixels = self.patches = None
        self.ids: list[int] = []

    def look(self, model: ViPLLaVA, pixels: torch.Tensor | None) -> torch.Tensor | None:
        """The image's patches, (I, N, C)."""
        if self.model() is not model:
            self.model, self.cache = weakref.ref(model), None
            self.forget()
        if pixels is None:
            return None
        if self.pixels is None or not torch.equal(pixels.to(self.pixels.device), self.pixels):
            weight = model.llama.embed_tokens.weight
            self.patches, self.ids = model.encode_images(pixels.to(weight.device, weight.dtype)), []
            self.pixels = pixels.clone()  # the caller may draw into his
        return self.patches

    def recall(self, config: ViPLLaVAConfig, row: list[int], slots: int, like: torch.Tensor) -> int:
        """Make the cache ready for a prompt: room for `slots` tokens and BUCKET more, wound back to the beginning that it
        shares with `row`. Returns that beginning's length. `ids` is empty until `generate` ends."""
        slots += BUCKET
        known = common([self.ids, row[:-1]])  # the last one's logits are wanted in any case
        if self.cache is None or self.cache.slots.numel() < slots:
            before = 0 if self.cache is None else self.cache.slots.numel()
            slots = min(max(-(-slots // ROOM) * ROOM, 2 * before), config.text.context + BUCKET)
            with torch.inference_mode(False):  # whatever the next call is made under, it writes into the same
                start = torch.full((1,), known, device=like.device)
                new = self.cache.continued(known, start, slots) if known else KVCache(config.text, start, slots, kept_in(like))
            self.cache = new
        self.cache.length.fill_(known)
        self.ids = []
        return known


@torch.no_grad()
def generate(
    model: ViPLLaVA,
    prompts: Sequence[Sequence[int]],
    pixels: torch.Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    memory: Memory | None = None,
) -> Iterator[list[int | None]]:
    """Answer a batch of prompts, one token a row at a time: yields lists of B ids, None for a row that has ended.

    prompts: B lists of ids with one IMAGE for each image; pixels (I, 3, S, S): all their images in reading order, or a
    single one that each prompt mentions once. A row ends with any of stop_ids (which are not yielded) or after
    max_new_tokens; None is 512, or what the context leaves. Sampling options: see llama.sample. memory: of the chat
    that a lone prompt goes on with. Raises ValueError, before anything is computed, when prompts and images don't match
    or don't fit the context.
    """
    config, memory = model.config, memory or Memory()
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, (list, tuple)) for p in prompts):
        raise ValueError("the prompts are a tensor, or a single one, or something else; expected a list of lists of ids")
    rows = [expand(p, config.vision.patches) for p in prompts]
    if max_new_tokens is None:
        max_new_tokens = room(config, max(map(len, rows), default=0))
    shared = _check_request(config, prompts, rows, pixels, max_new_tokens)
    patches = memory.look(model, pixels)
    embeds, cache = _begin(model, rows, patches, shared, max_new_tokens, memory)
    mine = memory.ids
    fresh = {embeds.size(1)} == set(map(len, rows))  # nothing is known, and no row is padded
    choose = lambda logits: sample(logits[:, : config.image_token_id], temperature, top_k, top_p, generator)
    said, alive = [], [True] * len(rows)
    try:
        logits = model.llama.prefill(embeds, cache, fresh)
        tokens = steps(model.llama.decode, logits, cache, choose, max_new_tokens)
        for arrived in delayed(tokens, AHEAD if logits.is_cuda else 0):
            said.append(arrived())
            alive = [a and token not in stop_ids for a, token in zip(alive, said[-1])]
            if not any(alive):
                return
            yield [token if a else None for a, token in zip(alive, said[-1])]
    finally:
        if len(rows) == 1 and memory.ids is mine:  # no newer call has taken the cache
            memory.ids = (rows[0] + [token for (token,) in said])[: int(cache.length)]


def _begin(model, rows, patches, shared: bool, more: int, memory: Memory) -> tuple[torch.Tensor, KVCache]:
    """What of the prompts is still to be computed, embeds (B, T, C), and a cache with what is not; room for `more`."""
    text, weight = model.config.text, model.llama.embed_tokens.weight
    ids, start = pad(rows, 0, side="left")
    start = start.to(weight.device)
    embeds = model.splice(ids, patches.expand(len(rows), -1, -1) if shared else patches)
    slots = embeds.size(1) + more
    if len(rows) == 1:
        known = memory.recall(model.config, rows[0], slots, weight)
        return embeds[:, known:], memory.cache
    known = common([row[:-1] for row in rows]) if shared else 0
    if not known:
        return embeds, KVCache(text, start, slots, kept_in(weight))
    beginning = KVCache(text, start[:1] * 0, known, kept_in(weight))
    model.llama(embeds[:1, start[0] : start[0] + known], beginning)
    return embeds[:, known:], beginning.continued(known, start + known, slots)


def kept_in(weight: torch.Tensor) -> torch.dtype:
    """The type of keys and values: the weights', but on a CPU float32. Its attention takes half as long there as that of
    16 bits, though it reads twice as much."""
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


def steps(decode: Callable, logits: torch.Tensor, cache: KVCache, choose: Callable, n: int) -> Iterator[Callable[[], list[int]]]:
    """n tokens a row, none of which is waited for: yields functions that wait, and return B ids."""
    for step in range(n):
        token = choose(logits)  # (B,)
        yield to_host(token)
        if step + 1 < n:
            logits = decode(token, cache)


def to_host(token: torch.Tensor) -> Callable[[], list[int]]:
    """Begin to copy; the function that is returned waits for the copy alone."""
    if not token.is_cuda:
        return token.tolist
    copy, done = token.to("cpu", non_blocking=True), torch.cuda.Event()
    with torch.cuda.device_of(token):  # its stream, whichever GPU is the current one
        done.record()

    def wait() -> list[int]:
        done.synchronize()
        return copy.tolist()

    return wait


def delayed(items: Iterable, by: int) -> Iterator:
    """The same items, each only after `by` more have been made."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > by:
            yield waiting.popleft()
    yield from waiting


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((i for i, tokens in enumerate(zip(*rows)) if len(set(tokens)) > 1), min(map(len, rows)))


def room(config: ViPLLaVAConfig, length: int) -> int:
    """Tokens that an answer may have after a prompt of so many, where nobody says."""
    return max(1, min(512, config.text.context - length))


def _check_request(config, prompts, rows, pixels, max_new_tokens: int) -> bool:
    """Is one image meant for all prompts? ValueError: something doesn't match."""
    if not prompts or not all(prompts) or not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
        raise ValueError(
            f"{len(prompts)} prompts of {[len(p) for p in prompts]} tokens, max_new_tokens {max_new_tokens}; "
            "expected one prompt or more, none of them empty, and a whole number of 0 or more tokens to follow"
        )
    if pixels is not None and not (isinstance(pixels, torch.Tensor) and pixels.is_floating_point() and pixels.dim() == 4):
        what = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"pixels are {what}; expected (I, 3, S, S), each as clip.preprocess returns it")
    asked, given = [list(p).count(IMAGE) for p in prompts], 0 if pixels is None else len(pixels)
    shared = given == 1 and set(asked) == {1}
    if sum(asked) != given and not shared:
        raise ValueError(f"the prompts mention {sum(asked)} images; got {given}")
    longest, context = max(map(len, rows)), config.text.context
    if longest + max_new_tokens > context:
        raise ValueError(
            f"the prompt has {longest} tokens and {max_new_tokens} are to follow; the model's context is {context}"
        )
    return shared


# -- compiled ----------------------------------------------------------------------------------------------------------


def compile_steps(model: ViPLLaVA) -> None:
    """torch.compile the blocks, each once for all layers; the first call for a shape is slow. On a GPU a look at an image,
    a lone prompt and a decoding step become CUDA graphs, too. Once is enough, and a second time changes nothing; a copy of
    the model would go on with this one's weights."""
    if isinstance(model.encode_images, Replayed):
        return
    torch._dynamo.config.recompile_limit = 64  # of the shapes that batches come in
    for part in (*model.vision.layers, *model.llama.layers, model.llama.norm, model.llama.lm_head):
        part.forward = torch.compile(part.forward)
    if model.llama.embed_tokens.weight.is_cuda:
        model.encode_images = Replayed(model.encode_images)
        model.llama.prefill, model.llama.decode = replayed_prefill(model.llama), replayed_decode(model.llama)


def replayed_prefill(llama: Llama) -> Callable:
    """llama.prefill, of which a lone prompt is filled up on the right, so that few shapes are compiled and recorded: what
    fills it comes last, so nobody looks back at it, and its slots are the next tokens'."""
    plain, replayed = llama.prefill, Replayed(llama.forward)

    def prefill(embeds: torch.Tensor, cache: KVCache, fresh: bool = False) -> torch.Tensor:
        B, T, C = embeds.size()
        if B > 1:  # whose cache is a new one each time
            return plain(embeds, cache, fresh)
        more = -T % BUCKET
        hidden = replayed(F.pad(embeds, (0, 0, 0, more)), cache, fresh)
        cache.length -= more
        return llama.lm_head(hidden[:, T - 1])

    return prefill


def replayed_decode(llama: Llama) -> Callable:
    """llama.decode by the compiler's own kernels, which outrun ready-made ones for one token.

    coordinate_descent_tuning   tunes them
    realize_reads_threshold     1: what a product reads is written once, where each of its rows would compute it anew
    SDPBackend.MATH             attention is made of plain operators, and so compiled, too
    Llama.places                dozens of small kernels otherwise, is compiled for a step
    QuarteredLinear             takes the place of each block's lone products
    """
    from torch._inductor import config  # not before it is needed: it takes long

    plain, places, compiled = llama.decode, llama.places, torch.compile(llama.places)
    llama.places = lambda embeds, *more: (compiled if embeds.size(1) == 1 else places)(embeds, *more)
    for block in llama.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):  # the others share a kernel
            if type(layer) is nn.Linear:
                layer.__class__ = QuarteredLinear

    def decode(ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        with config.patch(coordinate_descent_tuning=True, realize_reads_threshold=1), sdpa_kernel(SDPBackend.MATH):
            return plain(ids, cache)

    return Replayed(decode)


class QuarteredLinear(nn.Linear):
    """The compiler makes a row's product a loop over the inputs, which fetches too little at a time to keep a GPU's memory busy:
    here it takes one of each quarter at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() != self.in_features or self.in_features % 4 or not torch.compiler.is_compiling():
            return super().forward(x)
        a, b, c, d = (u * w for u, w in zip(x.flatten().float().chunk(4), self.weight.float().chunk(4, dim=1)))
        return (a + b + c + d).sum(dim=1).to(x.dtype).view(*x.shape[:-1], -1)


class Replayed:
    """function(x, cache, *flags) as CUDA graphs: a GPU runs through all kernels of one at a single command. One by one,
    Python takes longer to start them than they take.

    The first call with a cache and a shape of x (and flags) does what it always does, to compile as well; the second is
    recorded, and from then on only x's values, and those in the cache, differ. Recordings go when their cache does; those without
    a cache stay.
    """

    def __init__(self, function: Callable):
        self.function, self.recordings = function, weakref.WeakKeyDictionary()

    def __call__(self, x: torch.Tensor, *rest) -> torch.Tensor:
        known = self.recordings.setdefault(rest[0] if rest else self, {})
        key = x.shape, *rest[1:]
        if key not in known:
            y = self.function(x, *rest)
            known[key] = None  # now that all is compiled: no call was interrupted
            return y
        if known[key] is None:
            pool = next((recorded[0].pool() for recorded in known.values() if recorded), None)
            known[key] = self._record(pool, x, *rest)
        graph, kept, y = known[key]
        kept.copy_(x)
        graph.replay()
        return y.clone()  # as the graphs of a cache share their memory

    def _record(self, pool, x: torch.Tensor, *rest) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        """A graph, what it reads and what it writes. pool: the memory that it may use, of other graphs; None: its own."""
        graph, kept = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.device_of(x), torch.cuda.graph(graph, pool=pool, stream=capture_stream(x.device)):
            y = self.function(kept, *rest)
        return graph, kept, y


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that a GPU's graphs are recorded on: PyTorch has one for all GPUs, that of the first."""
    return torch.cuda.Stream(device)
