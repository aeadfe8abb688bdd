"""generate.py: greedy tokens as transformers', batches, stops, what a chat remembers, several questions about one image.

    python -m pytest tests/test_generate.py
"""

import contextlib
import types
import weakref
from dataclasses import replace

import pytest
import torch

from cases import NEW_TOKENS, VIPLLAVA, fill, load_golden, random_pixels
from conftest import with_compiler
import quant
from chat import IMAGE
from generate import (Memory, QuarteredLinear, Replayed, common, compile_steps, delayed, generate, kept_in, replayed_decode,
                      replayed_prefill)
from test_vipllava import CONFIG, PROMPTS, inputs_of, model_of, small
from vipllava import ViPLLaVA, expand


@pytest.fixture(scope="module")
def golden():
    return load_golden("vipllava")


def answers(model: ViPLLaVA, prompts: list, pixels: torch.Tensor | None, **options) -> list[list[int]]:
    """generate(), row by row; a row that has ended must stay ended."""
    steps = list(generate(model, prompts, pixels, **options))
    rows = [list(row) for row in zip(*steps)] or [[] for _ in prompts]
    for row in rows:
        assert None not in row or row[row.index(None) :] == [None] * (len(row) - row.index(None)), row
    return [[token for token in row if token is not None] for row in rows]


@pytest.mark.parametrize("name", VIPLLAVA)
def test_32_greedy_tokens_match_transformers(name, golden):
    """Guards against: a cache or a mask that is right for the prompt and wrong for what follows; images of one row
    given to another; the rows that were never trained sampled. All prompts at once, in one padded batch."""
    model, (prompts, pixels) = model_of(name), inputs_of(name)
    expected = [golden[f"{name}/greedy/{i}"].tolist() for i in range(len(prompts))]
    assert answers(model, prompts, pixels, max_new_tokens=NEW_TOKENS) == expected


@pytest.mark.parametrize("seed", range(1, 7))
def test_a_batch_equals_batch_one(seed):
    """Guards against: an answer that depends on its neighbours: padding seen, images handed to the wrong row."""
    model, pixels = small(seed)
    together = answers(model, PROMPTS, pixels, max_new_tokens=16)
    images = iter(pixels)
    for prompt, answer in zip(PROMPTS, together):
        mine = [next(images) for _ in range(prompt.count(IMAGE))]
        assert answers(model, [prompt], torch.stack(mine) if mine else None, max_new_tokens=16) == [answer]


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_full_forward():
    """Guards against: a token sampled from the logits of the token before."""
    model, pixels = small(2)
    (answer,) = answers(model, PROMPTS[:1], pixels[:1], max_new_tokens=12)
    ids = expand(PROMPTS[0], CONFIG.vision.patches)
    for token in answer:
        logits = model.llama.lm_head(model(torch.tensor([ids]), pixels[:1]))[0, -1, : CONFIG.image_token_id]
        assert token == logits.argmax().item()
        ids.append(token)


def test_stop_ids_end_their_row_only():
    """Guards against: a stop token shown to the reader, one row ending all, an ended row that speaks again."""
    model, pixels = small(3)
    free = answers(model, PROMPTS, pixels, max_new_tokens=16)
    stops = sorted({token for row in free for token in row})
    assert len(stops) > 5
    for stop in [{s} for s in stops] + [set(stops[:2]), set(stops)]:
        cut = [next((i for i, token in enumerate(row) if token in stop), len(row)) for row in free]
        steps = list(generate(model, PROMPTS, pixels, max_new_tokens=16, stop_ids=stop))
        assert len(steps) == max(cut)
        assert [[step[b] for step in steps][:n] for b, n in enumerate(cut)] == [row[:n] for row, n in zip(free, cut)]
        assert all(step[b] is None for b, n in enumerate(cut) for step in steps[n:])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_untrained_rows_are_never_sampled(temperature):
    """Guards against: ids that no tokenizer knows. Here they are by far the likeliest."""
    model, pixels = small(4)

    def run() -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        return answers(model, PROMPTS, pixels, max_new_tokens=12, temperature=temperature, generator=generator)

    before = run()
    with torch.no_grad():
        model.llama.lm_head.weight[37:] = torch.tensor([[1e4], [-1e4], [1e4]])
    assert run() == before


@pytest.mark.parametrize("count", [0, 1, 5])
def test_max_new_tokens(count):
    """Guards against: one token more, or one step of the model more than tokens are wanted."""
    model, pixels = small()
    calls = []
    model.llama.register_forward_hook(lambda module, args, out: calls.append(args[0].size(1)))
    steps = list(generate(model, PROMPTS[:2], pixels[:1], max_new_tokens=count))
    assert [len(step) for step in steps] == [2] * count
    assert calls[1:] == [1] * (count - 1)


def test_tokens_come_as_they_are_made():
    """Guards against: the whole answer computed before its first word is shown."""
    model, pixels = small()
    calls = []
    model.llama.register_forward_hook(lambda module, args, out: calls.append(args[0].size(1)))
    stream = generate(model, PROMPTS[:1], pixels[:1], max_new_tokens=50)
    next(stream)
    assert calls == [13]  # the prompt: 4 words and 9 patches
    next(stream)
    assert calls == [13, 1]


def test_what_does_not_fit_the_context_is_refused_before_any_work(monkeypatch):
    """Guards against: an answer cut short without a word, or minutes of work before the error."""
    model, pixels = small()
    monkeypatch.setattr(model, "encode_images", None)  # calling it would be a TypeError
    monkeypatch.setattr(model.llama, "prefill", None)
    with pytest.raises(ValueError, match="23 tokens and 78 are to follow; the model's context is 100"):
        next(generate(model, [[1, IMAGE] + [5] * 13], pixels[:1], max_new_tokens=78))


def test_what_just_fits_is_answered():
    """Guards against: a limit one too low, or a cache one slot too small."""
    model, pixels = small()
    (answer,) = answers(model, [[1, IMAGE] + [5] * 13], pixels[:1], max_new_tokens=77)
    assert len(answer) == 77


def test_sampling_follows_its_generator():
    """Guards against: a draw from PyTorch's global generator. Two answers of 20 tokens are equal by chance ~never."""
    model, pixels = small(5)

    def run(seed: int, **options) -> list[list[int]]:
        torch.rand(2)
        generator = torch.Generator().manual_seed(seed)
        return answers(model, PROMPTS, pixels, max_new_tokens=20, temperature=1.2, generator=generator, **options)

    assert run(1) == run(1) != run(2)
    greedy = answers(model, PROMPTS, pixels, max_new_tokens=20)
    assert run(1, top_k=1) == run(2, top_p=1e-6) == greedy != run(1)  # the options arrive


def test_bfloat16_model_takes_float32_pixels():
    """Guards against: pixels or a cache whose type is not the weights'."""
    model, pixels = small()
    assert [len(row) for row in answers(model.bfloat16(), PROMPTS, pixels, max_new_tokens=4)] == [4] * 4


def test_a_cpu_keeps_keys_and_values_in_32_bits():
    """Guards against: attention in 16 bits, which takes a CPU twice as long; a result that stays in 32."""
    model, pixels = small(3)
    memory = Memory()
    assert len(answers(model.bfloat16(), PROMPTS[:1], pixels[:1], max_new_tokens=4, memory=memory)[0]) == 4
    assert {kept.dtype for kept in sum(memory.cache.layers, ())} == {torch.float32}
    embeds = torch.randn(1, 3, CONFIG.text.width, dtype=torch.bfloat16)
    assert model.llama(embeds, memory.cache).dtype == torch.bfloat16
    assert kept_in(torch.empty(0, device="meta", dtype=torch.bfloat16)) == torch.bfloat16


def test_a_prompt_without_image_in_a_batch_without_images():
    """Guards against: pixels needed where there are none."""
    model, _ = small()
    assert len(answers(model, [[1, 2, 3], [4]], None, max_new_tokens=3)[0]) == 3


def test_generate_leaves_no_graph_and_no_trace():
    """Guards against: memory that grows with every answer; a second answer that remembers the first."""
    model, pixels = small(6)
    graphs = []
    model.llama.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    first = answers(model, PROMPTS, pixels, max_new_tokens=8)
    answers(model, [[5, 6, IMAGE]], pixels[2:3], max_new_tokens=8)
    assert answers(model, PROMPTS, pixels, max_new_tokens=8) == first
    assert graphs == [False] * 24


def test_windowed_text_model_generates_past_its_window():
    """Guards against: a window counted from the padding, or applied to the prompt only."""
    config = replace(CONFIG, text=replace(CONFIG.text, window=6))
    model, pixels = fill(ViPLLaVA(config), 7), random_pixels(4, 6, 7)
    together = answers(model, PROMPTS, pixels, max_new_tokens=12)
    assert together[1] == answers(model, [PROMPTS[1]], None, max_new_tokens=12)[0]
    ids = PROMPTS[1] + together[1]
    with torch.no_grad():
        logits = model.llama.lm_head(model(torch.tensor([ids])))[0, :, : config.image_token_id]
    assert logits.argmax(dim=-1)[len(PROMPTS[1]) - 1 : -1].tolist() == together[1]


def test_an_answer_may_take_what_the_context_leaves():
    """Guards against a default length that no prompt fits into, in a model whose context is short: 100 here."""
    model, pixels = small()
    rows = answers(model, PROMPTS[:1], pixels[:1])
    assert len(rows[0]) == 100 - len(expand(PROMPTS[0], 9))
    with pytest.raises(ValueError, match="the model's context is 100"):
        answers(model, [[1] * 100], None)


# -- nothing twice -----------------------------------------------------------------------------------------------------


@pytest.fixture
def work(monkeypatch):
    """What has been computed since the last look: images encoded, and tokens that went through the decoder."""

    class Work(dict):
        def watch(self, model: ViPLLaVA) -> None:
            encode = model.encode_images
            monkeypatch.setattr(model, "encode_images", lambda pixels: self.add("images", len(pixels)) or encode(pixels))
            model.llama.register_forward_hook(lambda module, args, out: self.add("tokens", args[0].size(0) * args[0].size(1)))

        def add(self, name: str, count: int) -> None:
            self[name] += count

        def since(self) -> tuple[int, int]:
            seen = self["images"], self["tokens"]
            self.update(images=0, tokens=0)
            return seen

    return Work(images=0, tokens=0)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_chat_with_a_memory_says_the_same_and_computes_only_what_is_new(seed, window, work):
    """Guards against: positions that start again, an answer's last token counted as computed, a stale image."""
    config = replace(CONFIG, text=replace(CONFIG.text, window=window))
    model, pixels = fill(ViPLLaVA(config), seed), random_pixels(2, 6, seed)
    work.watch(model)
    memory, chat = Memory(), [1, IMAGE, 5, 6]
    for turn, (image, question, expected) in enumerate([
        (0, [], (1, 12 + 7)),  # a word, 9 patches, two words; 8 tokens, of which the last is not decoded
        (0, [9, 10], (0, 1 + 2 + 7)),  # that one, and the question
        (1, [11], (1, 12 + 8 + 2 + 8 + 1 + 7)),  # another image: all of it anew
        (1, [12, 13, 14], (0, 1 + 3 + 7)),
    ]):
        chat += question
        given = pixels[image : image + 1]
        (answer,) = answers(model, [chat], given, max_new_tokens=8, memory=memory)
        assert work.since() == expected, turn
        assert [answer] == answers(model, [chat], given, max_new_tokens=8)
        work.since()
        chat = chat + answer


def test_a_memory_of_other_words_is_used_as_far_as_it_goes(work):
    """Guards against: keys of words that were edited. The same prompt again costs one token."""
    model, pixels = small(2)
    work.watch(model)
    memory, options = Memory(), {"max_new_tokens": 5}
    answers(model, [[1, IMAGE, 5, 6, 7, 8]], pixels[:1], memory=memory, **options)
    for prompt, tokens in (([1, IMAGE, 5, 6, 20, 8], 2), ([1, IMAGE, 5, 6, 20, 8], 1), ([1, IMAGE, 5], 1), ([2, IMAGE, 5], 11)):
        work.since()
        (answer,) = answers(model, [prompt], pixels[:1], memory=memory, **options)
        assert work.since() == (0, tokens + 4)
        assert [answer] == answers(model, [prompt], pixels[:1], **options)


def test_a_memory_outgrows_its_cache(monkeypatch):
    """Guards against: a chat that ends where its first answer's slots end; keys lost on the move."""
    monkeypatch.setattr("generate.ROOM", 8)
    monkeypatch.setattr("generate.BUCKET", 0)
    model, pixels = small(3)
    memory, chat, slots = Memory(), [1, IMAGE], []
    for _ in range(6):
        (answer,) = answers(model, [chat], pixels[:1], max_new_tokens=10, memory=memory)
        assert [answer] == answers(model, [chat], pixels[:1], max_new_tokens=10)
        slots.append(memory.cache.slots.numel())
        chat = chat + answer
    assert slots == [24, 48, 48, 96, 96, 96]  # of at most so many moves, each a recording on a GPU


@pytest.mark.parametrize("seen", range(5))
def test_a_memory_of_an_answer_that_nobody_heard_to_its_end(seen):
    """Guards against: tokens remembered that were chosen but never went through the decoder."""
    model, pixels = small(4)
    memory = Memory()
    stream = generate(model, PROMPTS[:1], pixels[:1], max_new_tokens=9, memory=memory)
    heard = [next(stream)[0] for _ in range(seen)]
    stream.close()
    chat = PROMPTS[0] + heard + [3]
    again = answers(model, [chat], pixels[:1], max_new_tokens=9, memory=memory)
    assert again == answers(model, [chat], pixels[:1], max_new_tokens=9)


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_that_is_given_up_late_does_not_touch_a_newer_ones_memory(seed):
    """Guards against: tokens of an older answer, taken for those whose keys the newer one left in the cache."""
    model, pixels = small(seed)
    memory, (one, other) = Memory(), ([1, IMAGE, 7, 8, 9, 10], [1, IMAGE, 11, 12, 13, 14])
    first = answers(model, [other], pixels[:1], max_new_tokens=4, memory=memory)
    stream = generate(model, [one], pixels[:1], max_new_tokens=9, memory=memory)
    next(stream)  # its keys stand where the other's stood
    assert answers(model, [other], pixels[:1], max_new_tokens=4, memory=memory) == first
    stream.close()
    for chat in (one + [3], other + first[0] + [3]):
        again = answers(model, [chat], pixels[:1], max_new_tokens=9, memory=memory)
        assert again == answers(model, [chat], pixels[:1], max_new_tokens=9)


@pytest.mark.parametrize("seed", range(6))
def test_an_image_that_is_changed_in_place_is_another(seed):
    """Guards against: an image compared with itself, and an answer about the one before."""
    model, pixels = small(seed)
    memory, given = Memory(), pixels[:1].clone()
    answers(model, PROMPTS[:1], given, max_new_tokens=9, memory=memory)
    given.copy_(pixels[1:2])
    again = answers(model, PROMPTS[:1], given, max_new_tokens=9, memory=memory)
    assert again == answers(model, PROMPTS[:1], pixels[1:2], max_new_tokens=9)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_several_questions_about_one_image_share_it(seed, window, work):
    """Guards against: padding between the common beginning and the questions that is seen, or counted as words."""
    config = replace(CONFIG, text=replace(CONFIG.text, window=window))
    model, pixels = fill(ViPLLaVA(config), seed), random_pixels(1, 6, seed)
    prompts = [[1, IMAGE, 5, 6], [1, IMAGE, 5, 7, 8, 9, 10], [1, IMAGE, 5, 6, 11]]
    work.watch(model)
    together = answers(model, prompts, pixels, max_new_tokens=8)
    assert work.since() == (1, 11 + 3 * 4 + 3 * 7)  # what is common; the longest rest and all answers, of each
    assert together == [answers(model, [prompt], pixels, max_new_tokens=8)[0] for prompt in prompts]
    long = [1, IMAGE, 5, 7, *range(8, 19)]  # what it has beyond the common beginning is as long as the other prompt
    for prompts in ([[1, IMAGE, 5, 6], long], [[1, IMAGE, 5], [2, IMAGE, 5]], [[1, 2, IMAGE], [1, IMAGE, 3]], [[1, IMAGE], [1, IMAGE, 4]]):
        together = answers(model, prompts, pixels, max_new_tokens=8)
        assert together == [answers(model, [prompt], pixels, max_new_tokens=8)[0] for prompt in prompts]


def test_a_memory_goes_from_one_mode_to_another():
    """Guards against a cache that only torch.inference_mode may write into, as the first call was made under it."""
    (model, pixels), memory, prompt = small(1), Memory(), PROMPTS[0]
    expected = answers(model, [prompt], pixels[:1], max_new_tokens=4)
    for mode in (torch.inference_mode, contextlib.nullcontext, torch.inference_mode):
        with mode():
            assert answers(model, [prompt], pixels[:1], max_new_tokens=4, memory=memory) == expected


def test_a_memory_is_of_one_model():
    """Guards against the keys of one model that another's queries meet: a base, and what was tuned of it."""
    (first, pixels), (other, _), memory = small(1), small(2), Memory()
    prompt = PROMPTS[0]
    assert answers(first, [prompt], pixels[:1], max_new_tokens=4, memory=memory)
    assert answers(other, [prompt], pixels[:1], max_new_tokens=4, memory=memory) == answers(other, [prompt], pixels[:1], max_new_tokens=4)


def test_what_is_no_request_is_refused():
    """Guards against pixels of 0 to 255 that are taken for normalised ones, and tracebacks for tensors of ids."""
    model, pixels = small(1)
    for prompts, images, words in ((PROMPTS[:1], pixels[:1].to(torch.uint8), "pixels are torch.uint8"), (PROMPTS[:1], [1], "pixels are list"),
                                   (PROMPTS[:1], torch.tensor(0.0), r"pixels are torch.float32 \(\)"), (PROMPTS[:1], pixels[0], r"expected \(I, 3, S, S\)"),
                                   (torch.tensor([[1, 2]]), None, "expected a list of lists"), ([1, 2], None, "expected a list of lists"),
                                   (None, None, "expected a list of lists"), (["ab"], None, "expected a list of lists")):
        with pytest.raises(ValueError, match=words):
            next(generate(model, prompts, images, max_new_tokens=1))
    with pytest.raises(ValueError, match="a whole number of 0 or more tokens"):
        next(generate(model, PROMPTS[:1], pixels[:1], max_new_tokens=3.0))


def test_steps_are_launched_ahead_and_what_comes_too_late_is_dropped(monkeypatch):
    """Guards against: a GPU's answer that differs from a CPU's. The order of a GPU, made here on a CPU."""
    model, pixels = small(3)
    free = answers(model, PROMPTS, pixels, max_new_tokens=16)
    stop = set(free[0][4:6])
    expected = answers(model, PROMPTS, pixels, max_new_tokens=16, stop_ids=stop)
    monkeypatch.setattr("generate.delayed", lambda tokens, by: delayed(tokens, 2))
    assert answers(model, PROMPTS, pixels, max_new_tokens=16) == free
    assert answers(model, PROMPTS, pixels, max_new_tokens=16, stop_ids=stop) == expected
    memory, chat = Memory(), PROMPTS[0]
    for _ in range(3):
        (answer,) = answers(model, [chat], pixels[:1], max_new_tokens=9, stop_ids=stop, memory=memory)
        assert [answer] == answers(model, [chat], pixels[:1], max_new_tokens=9, stop_ids=stop)
        chat = chat + answer + [3]


def test_delayed():
    """Guards against: items lost at the end, or made before they are wanted."""
    made = []
    items = delayed((made.append(i) or i for i in range(5)), 2)
    assert next(items) == 0 and made == [0, 1, 2]
    assert list(items) == [1, 2, 3, 4]
    assert list(delayed(range(2), 3)) == [0, 1] and list(delayed([], 1)) == []


def test_common():
    """Guards against: a row that is the beginning of another."""
    assert [common(rows) for rows in ([[1, 2, 3], [1, 2]], [[1, 2, 3], [1, 4, 3]], [[1], [2]], [[], [1]], [[1, 2]])] == [2, 1, 0, 0, 2]


def test_compiled_steps_say_the_same(monkeypatch):
    """Guards against: a block that can't be one graph; one that is right for its first length only; one that is compiled
    anew for each layer. All but the last stage of the compiler, which needs one for C++."""
    whole, compiled, graphs = torch.compile, [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def front(function):
        compiled.append(type(function.__self__).__module__ + "." + type(function.__self__).__name__)
        return whole(function, backend=backend, fullgraph=True)

    def run() -> list:
        return [answers(model, [prompt], pixels[:1], max_new_tokens=12) for prompt in prompts]

    monkeypatch.setattr(torch, "compile", front)
    model, pixels = small(2)
    prompts = [PROMPTS[0], [1, IMAGE, 9], [1, IMAGE, 2, 3, 4, 5]]
    expected = run()
    compile_steps(model)
    assert run() == expected
    layers = model.config.vision.layers, model.config.text.layers
    assert compiled == ["clip.Block"] * layers[0] + ["llama.Block"] * layers[1] + ["llama.RMSNorm", "torch.nn.modules.linear.Linear"]
    assert len(graphs) < 12  # prompts of two lengths, steps of two


@with_compiler
@pytest.mark.parametrize("quantize", ["", "int8"])
def test_compiled_by_inductor_the_same_is_said(quantize):
    """Guards against what only the compiler's last stage gets wrong, on a CPU: fresh prompts, steps, and a chat's next turn."""
    torch.compiler.reset()
    model, pixels = small(2)
    if quantize:
        quant.pack(quant.quantize(model, quantize))

    def run() -> list:
        memory, chat, said = Memory(), PROMPTS[0], []
        for _ in range(2):
            said += answers(model, [chat], pixels[:1], max_new_tokens=6, memory=memory)
            chat = [*chat, *said[-1], 3, 4]
        return said

    expected = run()
    compile_steps(model)
    assert run() == expected
    torch.compiler.reset()


class Recording:
    """Stands for a CUDA graph, and for the recording of one: what was called while it was open is called again."""

    def __init__(self, calls: list):
        self.calls = calls

    def __enter__(self):
        self.calls.clear()

    def __exit__(self, *_):
        self.again, self.x, self.y = self.calls[0]

    def replay(self):
        self.y.copy_(self.again(self.x))

    def pool(self) -> str:
        return "pool"


def test_replayed(monkeypatch):
    """Guards against: a recording for another shape, flag or cache that is used; one that is lost while another cache is in
    use, or kept when its own has gone; a result that the next call overwrites; a first call, in which things are
    compiled, that is recorded."""
    calls, ran, pools = [], [], []

    def double(x: torch.Tensor, rest, flag="") -> torch.Tensor:
        y = 2 * x
        ran.append(len(x))
        calls.append((lambda x: 2 * x, x, y))
        return y

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Recording(calls))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: pools.append(pool) or graph)
    monkeypatch.setattr("generate.capture_stream", lambda device: None)
    Rest = type("Rest", (), {})
    replayed, one, other = Replayed(double), Rest(), Rest()
    asked = [([1.0], one), ([2.0], one), ([3.0], one), ([4.0, 5.0], one), ([6.0, 7.0], one), ([8.0], one)]
    asked += [([9.0], other), ([10.0], other), ([11.0], other), ([12.0], one)]
    rest, results = None, [replayed(torch.tensor(x), rest) for x, rest in asked]
    assert [y.tolist() for y in results] == [[2 * v for v in x] for x, _ in asked]
    assert ran == [1, 1, 2, 2, 1, 1]  # as it is and recorded, of each shape and cache
    assert pools == [None, "pool", None]  # of one cache all share their memory
    replayed(torch.tensor([13.0]), other, "flag")
    assert len(ran) == 7  # another flag is as another shape
    alive = weakref.ref(other)
    del other, asked, rest
    assert alive() is None  # a cache that nobody else has is not held


def test_a_first_call_that_was_interrupted_is_not_recorded_next():
    """Guards against Ctrl-C while things are compiled, after which they would be compiled while a graph is recorded."""
    ran = []

    def function(x: torch.Tensor, rest) -> torch.Tensor:
        ran.append(1)
        if len(ran) == 1:
            raise KeyboardInterrupt
        return x

    replayed, rest = Replayed(function), type("Rest", (), {})()
    replayed._record = lambda *_: pytest.fail("recorded")
    with pytest.raises(KeyboardInterrupt):
        replayed(torch.zeros(1), rest)
    assert replayed(torch.ones(1), rest).item() == 1


def record_nothing(self, pool, x, *rest):
    """Stands for Replayed._record where there is no GPU: its graph calls the function again."""
    kept, y = x.clone(), self.function(x, *rest)
    rest[0].length -= 1  # what is recorded doesn't run
    return types.SimpleNamespace(replay=lambda: y.copy_(self.function(kept, *rest)), pool=lambda: None), kept, y


@with_compiler
def test_a_step_as_a_gpu_takes_it_says_the_same(monkeypatch):
    """Guards against quarters of a product that don't belong together, and against places of another step or cache."""
    torch.compiler.reset()
    monkeypatch.setattr(Replayed, "_record", record_nothing)
    monkeypatch.setattr("generate.ROOM", 1)  # each chat's cache is of another size
    model, pixels = small(2)

    def run() -> list:
        prompts = PROMPTS[0], [1, IMAGE, 9], [1, IMAGE, 9, 8, 7]
        return [answers(model, [prompt], pixels[:1], max_new_tokens=8) for prompt in prompts]

    expected = run()
    for block in model.llama.layers:
        block.forward = torch.compile(block.forward)
    model.llama.decode = replayed_decode(model.llama)
    assert run() == expected
    assert isinstance(model.llama.layers[0].mlp.down_proj, QuarteredLinear)
    torch.compiler.reset()


@pytest.mark.parametrize("inputs", [64, 66])
def test_a_product_in_quarters(monkeypatch, inputs):
    """Guards against another product, where the inputs have no quarters too."""
    layer, x = torch.nn.Linear(inputs, 5, bias=False), torch.randn(1, 1, inputs)
    expected = layer(x)
    layer.__class__ = QuarteredLinear
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.expand(2, 3, -1)), expected.expand(2, 3, -1))


def test_a_prompt_that_is_filled_up_says_the_same(monkeypatch):
    """Guards against: fillings that are looked at, counted, or written beyond a cache that has no room for them; logits of
    a filling; a chat that goes on behind them; a plain prompt's recording for one that goes on."""
    recorded = []

    def record(self, pool, x, *rest):
        recorded.append(rest[1])
        kept, y = x.clone(), torch.empty_like(x)
        replay = lambda: y.copy_(self.function(kept, *rest))
        return types.SimpleNamespace(replay=replay, pool=lambda: None), kept, y

    def run() -> list:
        memory, said = Memory(), []
        for chat in [PROMPTS[0], [1, IMAGE, 9]] * 3:
            memory.forget()
            for more in ((), (3,), (4, 5, 6), (7, 8, 9)):
                chat = [*chat, *more]
                said += answers(model, [chat], pixels[:1], max_new_tokens=3, memory=memory)
                chat += said[-1]
        said += answers(model, [PROMPTS[0]], pixels[:1], max_new_tokens=1)
        return said + answers(model, PROMPTS[:1] * 2, pixels[:2], max_new_tokens=3)

    monkeypatch.setattr("generate.BUCKET", 8)
    monkeypatch.setattr("generate.ROOM", 1)
    monkeypatch.setattr(Replayed, "_record", record)
    model, pixels = small(2)
    expected = run()
    model.llama.prefill = replayed_prefill(model.llama)
    assert run() == expected
    assert set(recorded) == {False, True}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, images, new, words",
    [
        ([], 0, 1, "0 prompts"),
        ([[]], 0, 1, "none of them empty"),
        ([[1, 2], []], 0, 1, "none of them empty"),
        ([[1, 2]], 0, -1, "max_new_tokens -1"),
        ([[1, IMAGE, 2]], 0, 1, "mention 1 images; got 0"),
        ([[1, IMAGE, 2]], 2, 1, "mention 1 images; got 2"),
        ([[1, 2]], 1, 1, "mention 0 images; got 1"),
    ],
)
def test_requests_that_make_no_sense_are_refused_before_anything_runs(prompts, images, new, words):
    """Guards against an answer to a padding token, and against CLIP running for prompts that do not want it."""
    with torch.device("meta"):  # anything that ran would fail
        model = ViPLLaVA(CONFIG)
    side = CONFIG.vision.image_size
    pixels = torch.zeros(images, 3, side, side) if images else None
    with pytest.raises(ValueError, match=words):
        next(generate(model, prompts, pixels, max_new_tokens=new))
