"""llama.py: parity with transformers (tests/golden, made by make_golden.py), the cache, padding, RoPE, sampling.

    python -m pytest tests/test_llama.py
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cases import BATCH_STEPS, LLAMA, fill, llama_batch, load_golden, random_pixels, relative_error
from llama import SIZES, KVCache, Llama, LlamaConfig, RMSNorm, rope_table, rotate, sample

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    return load_golden("llama")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def llama_of(name: str) -> Llama:
    return fill(Llama(LlamaConfig(**LLAMA[name]["llama"])), LLAMA[name]["seed"])


def full_logits(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    """ids (B, T) -> logits (B, T, V), without a cache."""
    return model.lm_head(model(model.embed_tokens(ids)))


def new_cache(model: Llama, start=(0,), slots: int = 40, dtype=torch.float32) -> KVCache:
    return KVCache(model.config, torch.tensor(start), slots, dtype)


def left_padded(model: Llama, rows: list, fill_value: float = 0.0) -> tuple[torch.Tensor, list[int]]:
    """Embeddings (B, T, C) of unequal rows, `fill_value` in the padding; where each row starts."""
    longest = max(map(len, rows))
    start = [longest - len(row) for row in rows]
    embeds = torch.full((len(rows), longest, model.config.width), fill_value)
    for out, row, s in zip(embeds, rows, start):
        out[s:] = model.embed_tokens(row)
    return embeds, start


def batch_logits(model: Llama, rows: list, after: torch.Tensor, fill_value: float = 0.0) -> torch.Tensor:
    """Left-padded rows, all followed by the ids `after` (n,) -> logits (B, 1 + n, V)."""
    embeds, start = left_padded(model, rows, fill_value)
    cache = new_cache(model, start)
    logits = [model.prefill(embeds, cache)]
    for token in after:
        logits.append(model.decode(token.expand(len(rows)), cache))
    return torch.stack(logits, dim=1)


# -- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLAMA)
def test_logits_match_transformers(name, golden):
    """Guards against: interleaved RoPE, another theta, key heads dealt out in turn in place of in groups, eps 1e-6, a
    window off by one (the case "windowed"), a norm left out."""
    logits = full_logits(llama_of(name), golden[f"{name}/ids"])
    assert relative_error(logits, golden[f"{name}/logits"]) < TOLERANCE


@pytest.mark.parametrize("name", LLAMA)
def test_cached_decode_matches_transformers(name, golden):
    """Guards against: positions that start again at 0 after the prompt, empty slots attended to."""
    model, ids, prompt = llama_of(name), golden[f"{name}/ids"], LLAMA[name]["prefill"]
    cache = new_cache(model)
    logits = [model.prefill(model.embed_tokens(ids[:, :prompt]), cache)]
    logits += [model.decode(ids[:, t], cache) for t in range(prompt, ids.size(1))]
    assert relative_error(torch.stack(logits, dim=1), golden[f"{name}/decoded"]) < TOLERANCE


@pytest.mark.parametrize("name", LLAMA)
def test_left_padded_batch_matches_transformers(name, golden):
    """Guards against: padding attended to, rows cut apart wrongly, a window counted from the padding."""
    ids = golden[f"{name}/ids"]
    logits = batch_logits(llama_of(name), llama_batch(LLAMA[name], ids), ids[0, :BATCH_STEPS])
    assert relative_error(logits, golden[f"{name}/batch"]) < TOLERANCE


def test_the_golden_window_matters(golden):
    """Guards against: a golden file so short that it would pass without any window."""
    model = llama_of("windowed")
    model.config = replace(model.config, window=None)
    assert relative_error(full_logits(model, golden["windowed/ids"]), golden["windowed/logits"]) > 0.01


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLAMA)
def test_decode_equals_the_full_forward(name, golden):
    """Guards against: a cache that loses, doubles or misplaces a token."""
    model, ids = llama_of(name), golden[f"{name}/ids"]
    expected, cache = full_logits(model, ids), new_cache(model)
    for t in range(ids.size(1)):
        logits = model.decode(ids[:, t], cache)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-4)
        assert cache.length == t + 1


@pytest.mark.parametrize("name", LLAMA)
@pytest.mark.parametrize("first", [1, 4, 9])
def test_prefill_in_two_parts_equals_one(name, first, golden):
    """Guards against: a second part that sees its own future, or whose positions start again."""
    model, ids = llama_of(name), golden[f"{name}/ids"]
    embeds, cache = model.embed_tokens(ids), new_cache(model)
    model.prefill(embeds[:, :first], cache)
    logits = model.prefill(embeds[:, first:], cache)
    torch.testing.assert_close(logits, full_logits(model, ids)[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LLAMA)
def test_a_fresh_cache_equals_any_other(name, golden):
    """Guards against: keys that are seen but not kept, or the empty slots after them; a window forgotten."""
    model, ids = llama_of(name), golden[f"{name}/ids"]
    found = []
    for fresh in (False, True):
        cache = new_cache(model)
        logits = [model.prefill(model.embed_tokens(ids[:, :7]), cache, fresh)]
        logits += [model.decode(ids[:, t], cache) for t in range(7, ids.size(1))]
        found.append(torch.stack(logits))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_spare_slots_change_nothing(golden):
    """Guards against: the zeros in slots not yet written taking part in the softmax, as exp(0) is 1."""
    model, ids = llama_of("grouped"), golden["grouped/ids"]
    exact, spare = (model.prefill(model.embed_tokens(ids), new_cache(model, slots=n)) for n in (ids.size(1), 64))
    torch.testing.assert_close(exact, spare, rtol=1e-5, atol=1e-5)


def test_a_full_cache_is_not_overrun(golden):
    """Guards against: the token after the last slot overwriting an earlier one."""
    model, ids = llama_of("grouped"), golden["grouped/ids"]
    cache = new_cache(model, slots=ids.size(1))
    model.prefill(model.embed_tokens(ids), cache)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model.decode(ids[:, 0], cache)


def test_bfloat16_model_and_cache(golden):
    """Guards against: a float32 table, mask or norm that meets bfloat16 weights; 8 bits give about 1 %."""
    model, ids = llama_of("grouped").to(torch.bfloat16), golden["grouped/ids"]
    cache = new_cache(model, dtype=torch.bfloat16)
    logits = [model.prefill(model.embed_tokens(ids[:, :7]), cache)]
    logits += [model.decode(ids[:, t], cache) for t in range(7, ids.size(1))]
    assert logits[0].dtype == cache.layers[0][0].dtype == torch.bfloat16
    assert relative_error(torch.stack(logits, dim=1), golden["grouped/decoded"]) < 0.1


# -- left padding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLAMA)
def test_a_padded_batch_equals_batch_one(name, golden):
    """Guards against: an answer that depends on what else was asked at the same time."""
    model, ids = llama_of(name), golden[f"{name}/ids"]
    rows, after = llama_batch(LLAMA[name], ids), ids[0, :4]
    together = batch_logits(model, rows, after)
    alone = torch.cat([batch_logits(model, [row], after) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LLAMA)
@pytest.mark.parametrize("shared", [1, 3, 6])
def test_rows_that_go_on_from_one_beginning_equal_rows_alone(name, shared, golden):
    """Guards against: positions or a window that count the padding between beginning and rest; rest that sees it."""
    model, ids = llama_of(name), golden[f"{name}/ids"]
    rows = [torch.cat([ids[0, :shared], row]) for row in (ids[0, 2:3], ids[0, 3:9], ids[0, 5:8])]
    after = ids[0, :4]
    alone = torch.cat([batch_logits(model, [row], after) for row in rows])
    beginning = new_cache(model)
    model(model.embed_tokens(ids[:, :shared]), beginning)
    embeds, start = left_padded(model, [row[shared:] for row in rows], fill_value=1e4)
    cache = beginning.continued(shared, shared + torch.tensor(start), slots=40)
    logits = [model.prefill(embeds, cache)] + [model.decode(token.expand(len(rows)), cache) for token in after]
    torch.testing.assert_close(torch.stack(logits, dim=1), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LLAMA)
@pytest.mark.parametrize("garbage", [1.0, 1e4, 1e18])
def test_what_lies_in_the_padding_never_leaks(name, garbage, golden):
    """Guards against: padding masked by a large number, not minus infinity; NaN from a row that sees nothing."""
    model, ids = llama_of(name), golden[f"{name}/ids"]
    rows, after = llama_batch(LLAMA[name], ids), ids[0, :2]
    clean, dirty = batch_logits(model, rows, after), batch_logits(model, rows, after, garbage)
    assert dirty.isfinite().all()
    torch.testing.assert_close(dirty, clean, rtol=1e-4, atol=1e-4)


def test_positions_count_from_where_a_row_starts(monkeypatch, golden):
    """Guards against: positions that count the padding too. The result is the same but for rounding, which grows."""
    model, ids, seen = llama_of("grouped"), golden["grouped/ids"], []

    def record(positions, *rest):
        seen.append(positions)
        return rope_table(positions, *rest)

    monkeypatch.setattr("llama.rope_table", record)
    batch_logits(model, [ids[0, :2], ids[0, :4]], ids[0, :1])
    assert [p.tolist() for p in seen] == [[[0, 0, 0, 1], [0, 1, 2, 3]], [[2], [4]]]


def test_every_token_sees_at_least_itself():
    """Guards against: a softmax over nothing, which is NaN on some devices and not on others."""
    model, slots = llama_of("windowed"), torch.arange(9)
    mask = model._cached_mask(slots[2:], new_cache(model, (0, 8), slots=9))
    assert mask.shape == (2, 1, 7, 9)
    assert mask.any(dim=-1).all()


@pytest.mark.parametrize("name", LLAMA)
def test_the_future_is_never_seen(name, golden):
    """Guards against: a causal mask off by one."""
    model, ids = llama_of(name), golden[f"{name}/ids"]
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % model.config.vocab_size
    before, after = full_logits(model, ids)[0], full_logits(model, changed)[0]
    assert torch.equal(before[:6], after[:6])
    assert not torch.allclose(before[6], after[6], atol=1e-2)


def test_a_token_sees_the_window_and_no_more():
    """Guards against: a window of one token more or less. One layer carries a change window - 1 tokens far."""
    config = LlamaConfig(vocab_size=31, width=20, layers=1, heads=5, kv_heads=1, mlp=24, window=4)
    model = fill(Llama(config), seed=8)

    def step_by_step(model: Llama, ids: torch.Tensor) -> torch.Tensor:
        cache = new_cache(model)
        return torch.stack([model.decode(column, cache) for column in ids.T], dim=1)

    for length, place in ((12, 2), (5, 0), (4, 0)):  # 5 is the shortest text that the window cuts
        ids = torch.arange(length)[None]
        changed = ids.clone()
        changed[0, place] = 30
        expected = [place <= t < place + 4 for t in range(length)]
        for logits in (full_logits, step_by_step):
            difference = (logits(model, ids) - logits(model, changed)).abs().amax(dim=(0, 2))
            assert (difference > 1e-3).tolist() == expected, difference


# -- leaves, against explicit formulas -------------------------------------------------------------------------------


def test_grouped_attention_is_softmax_of_scaled_products():
    """Guards against: query head h served by key head h % K in place of h // (H / K), another scale."""
    config = LlamaConfig(width=24, heads=6, kv_heads=2, layers=1, mlp=8, vocab_size=9)
    attention = fill(Llama(config), seed=9).layers[0].self_attn
    T, D = 5, config.head_width
    x = random_pixels(1, 24, seed=9)[0, :, :T]  # (3, 5, 24)
    cos, sin = rope_table(torch.arange(T)[None], config, torch.float32)
    heads = []
    for h in range(config.heads):
        q = attention.q_proj(x)[:, :, h * D : (h + 1) * D]  # (B, T, D)
        group = h // (config.heads // config.kv_heads)
        k, v = (p(x)[:, :, group * D : (group + 1) * D] for p in (attention.k_proj, attention.v_proj))
        q, k = (rotate(y[:, None], cos, sin)[:, 0] for y in (q, k))
        scores = q @ k.transpose(1, 2) / math.sqrt(D) + torch.full((T, T), float("-inf")).triu(1)
        heads.append(scores.softmax(dim=-1) @ v)
    expected = attention.o_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x, cos, sin), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("position", [0, 1, 7, 300])
def test_rope_turns_channel_i_with_channel_i_plus_half(theta, position):
    """Guards against: interleaved pairs (2i, 2i + 1), the other direction of rotation, frequencies of another D."""
    config = LlamaConfig(width=24, heads=4, kv_heads=2, rope_theta=theta)  # D = 6
    x = torch.tensor([0.3, -1.2, 0.7, 2.0, 0.1, -0.4])
    expected = torch.empty(6)
    for i in range(3):
        angle = position * theta ** (-2 * i / 6)
        expected[i] = x[i] * math.cos(angle) - x[i + 3] * math.sin(angle)
        expected[i + 3] = x[i + 3] * math.cos(angle) + x[i] * math.sin(angle)
    cos, sin = rope_table(torch.tensor([[position]]), config, torch.float32)
    torch.testing.assert_close(rotate(x[None, None, None], cos, sin)[0, 0, 0], expected, rtol=1e-4, atol=1e-4)


def test_rope_scores_depend_on_the_distance_only():
    """Guards against: a rotation that is not one, such as sine and cosine of different angles in the two halves."""
    config = LlamaConfig(width=16, heads=2, kv_heads=1)
    q, k = random_pixels(1, 8, seed=10)[0, 0, :2]  # (8,) each

    def score(i: int, j: int) -> float:
        cos, sin = rope_table(torch.tensor([[i, j]]), config, torch.float32)
        turned = rotate(torch.stack([q, k])[None, None], cos, sin)[0, 0]
        return (turned[0] @ turned[1]).item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4) == pytest.approx(score(5, 0), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(4, 9), abs=1e-2)


def test_angles_are_float32_whatever_the_weights():
    """Guards against: positions in bfloat16, where 257 is 256. Only the results are rounded, by at most 2^-9."""
    config = LlamaConfig(width=16, heads=2, kv_heads=1)
    positions = torch.tensor([[256, 257, 1999]])
    for exact, rounded in zip(*(rope_table(positions, config, dtype) for dtype in (torch.float32, torch.bfloat16))):
        assert rounded.dtype == torch.bfloat16
        assert (exact - rounded.float()).abs().max() <= 2**-9


def test_rmsnorm_formula_and_float16():
    """Guards against: a mean subtracted, a standard deviation for the root mean square, float16 overflow."""
    norm = RMSNorm(5, eps=0.1)
    norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    x = torch.tensor([3.0, -1.0, 2.0, 0.5, 4.0])
    torch.testing.assert_close(norm(x), x / (x.pow(2).sum() / 5 + 0.1).sqrt() * norm.weight)
    large = norm.half()(1000 * x.half())  # squares beyond 65504, float16's largest number
    assert large.dtype == torch.float16
    torch.testing.assert_close(large, (x / x.square().mean().sqrt() * norm.weight.float()).half(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("wrong", [dict(heads=5), dict(kv_heads=4), dict(width=18, heads=6, kv_heads=3)])
def test_sizes_that_do_not_divide_are_refused(wrong):
    """Guards against: channels that no head reads; an odd head, whose middle channel has no partner to turn with."""
    with pytest.raises(ValueError, match="heads must divide width"):
        Llama(replace(LlamaConfig(vocab_size=9, width=24, layers=1, heads=6, kv_heads=3, mlp=8), **wrong))


@pytest.mark.parametrize(
    "name, count",
    [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("llama3-8b", 8_030_261_248), ("phi3-mini", 3_821_079_552)],
)
def test_named_sizes_have_the_published_number_of_parameters(name, count):
    """Guards against: a wrong size in the table. The numbers are those of the published weight files."""
    with torch.device("meta"):
        model = Llama(SIZES[name])
    assert sum(p.numel() for p in model.parameters()) == count


# -- sampling --------------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([0.10, 0.40, 0.05, 0.30, 0.15])  # by likelihood: 1, 3, 4, 0, 2


def draws(count: int = 4000, probabilities: torch.Tensor = PROBABILITIES, seed: int = 1, **options) -> torch.Tensor:
    """The frequency of each token in `count` draws."""
    logits = probabilities.log().expand(count, -1)
    ids = sample(logits, generator=torch.Generator().manual_seed(seed), **options)
    return ids.bincount(minlength=probabilities.numel()) / count


def test_temperature_zero_takes_the_likeliest():
    """Guards against: argmax over rows in place of tokens."""
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 4.0]])
    assert sample(logits).tolist() == [1, 0]
    assert sample(logits, temperature=0, top_k=2, top_p=0.5).tolist() == [1, 0]


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(temperature=1.0), [0.10, 0.40, 0.05, 0.30, 0.15]),
        (dict(temperature=0.5), [0.01, 0.16, 0.0025, 0.09, 0.0225]),
        (dict(temperature=2.0), [0.10**0.5, 0.40**0.5, 0.05**0.5, 0.30**0.5, 0.15**0.5]),
        (dict(temperature=1.0, top_k=2), [0, 0.40, 0, 0.30, 0]),
        (dict(temperature=1.0, top_k=5), [0.10, 0.40, 0.05, 0.30, 0.15]),
        (dict(temperature=1.0, top_k=99), [0.10, 0.40, 0.05, 0.30, 0.15]),
        (dict(temperature=1.0, top_p=0.65), [0, 0.40, 0, 0.30, 0]),
        (dict(temperature=1.0, top_p=0.75), [0, 0.40, 0, 0.30, 0.15]),  # 0.70 < 0.75: the one that crosses stays
        (dict(temperature=1.0, top_k=3, top_p=0.80), [0, 0.40, 0, 0.30, 0]),  # of what top_k left, 0.7 / 0.85 > 0.8
        (dict(temperature=0.5, top_p=0.80), [0, 0.16, 0, 0.09, 0]),  # after temperature, 0.25 / 0.285 > 0.8
    ],
)
def test_frequencies(options, expected):
    """Guards against: the temperature multiplied, the three steps in another order, top_p that drops the token that
    crosses the bound. 4000 draws: a frequency strays by 0.04, five standard deviations, once in 10^6."""
    expected = torch.tensor(expected) / sum(expected)
    frequencies = draws(**options)
    assert (frequencies[expected == 0] == 0).all(), frequencies
    assert ((frequencies - expected).abs() < 0.04).all(), frequencies


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-9), dict(top_p=1e-50), dict(top_p=0.39), dict(temperature=1e-3)])
def test_one_token_always_remains(options):
    """Guards against: top_p below the largest probability leaving nothing, and NaN."""
    assert draws(count=50, **(dict(temperature=1.0) | options)).tolist() == [0, 1, 0, 0, 0]


def test_top_p_one_drops_nothing():
    """Guards against: cumulated rounding that reaches 1 before the last token. 10^-4 of 60000 draws are 6."""
    unlikely = torch.tensor([1e-4, 1 - 1e-4])
    assert 0 < draws(count=60000, probabilities=unlikely, temperature=1.0, top_p=1.0)[0] < 4e-4


def test_rows_are_sampled_by_themselves():
    """Guards against: one row's threshold used for all."""
    logits = torch.tensor([[0.0, 0.0, -50.0, -50.0], [-50.0, -50.0, 0.0, 0.0]]).repeat_interleave(100, dim=0)
    for options in (dict(top_k=2), dict(top_p=0.9)):
        ids = sample(logits, 1.0, generator=torch.Generator().manual_seed(2), **options)
        assert set(ids[:100].tolist()) == {0, 1} and set(ids[100:].tolist()) == {2, 3}


def test_the_generator_decides():
    """Guards against: a draw from PyTorch's global generator. 20 draws of 5 agree by chance once in 10^14."""
    logits = torch.zeros(20, 5)

    def one(seed: int) -> list[int]:
        torch.rand(3)
        return sample(logits, 1.0, generator=torch.Generator().manual_seed(seed)).tolist()

    assert one(3) == one(3) != one(4)
    state = torch.get_rng_state()
    sample(logits, 1.0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())


def test_bfloat16_logits_are_divided_in_float32():
    """Guards against: 20.125 / 0.1 = 201 in bfloat16, in place of 201.25, which changes 0.777 to 0.731. 4000 draws
    stray by 0.033, five standard deviations, once in 10^6."""
    logits = torch.tensor([20.0, 20.125], dtype=torch.bfloat16).expand(4000, -1)
    ids = sample(logits, 0.1, generator=torch.Generator().manual_seed(5))
    assert ids.float().mean() == pytest.approx(1 / (1 + math.exp(-1.25)), abs=0.033)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(temperature=1.0, top_k=-1),
        dict(temperature=1.0, top_p=0.0),
        dict(temperature=1.0, top_p=1.01),
        dict(temperature=1.0, top_p=float("nan")),
        dict(temperature=0.0, top_p=-1.0),
    ],
)
def test_values_out_of_range_are_refused(options):
    """Guards against: a negative temperature, which prefers the least likely words, taken in silence."""
    with pytest.raises(ValueError, match="expected a temperature of 0 or at least 1e-6, top_k >= 0, 0 < top_p <= 1"):
        sample(torch.zeros(1, 5), **options)


def test_gradients_reach_every_parameter():
    """Guards against: a weight that is loaded but never used."""
    with torch.enable_grad():
        model = llama_of("grouped")
        ids = torch.arange(8)[None]
        F.cross_entropy(full_logits(model, ids)[0], ids[0]).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, -1.0, float("nan"), float("inf")])
def test_temperatures_that_overflow_are_refused(temperature):
    """Guards against logits / 1e-38, which is infinite, and a traceback from deep inside the sampler."""
    with pytest.raises(ValueError, match="expected a temperature of 0 or at least 1e-6"):
        sample(torch.randn(2, 5), temperature)


def test_a_small_temperature_is_greedy():
    """Guards against an overflow at the smallest temperature allowed: the likeliest token has all of the odds."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(sample(logits, 1e-6), logits.argmax(dim=-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature):
    """Guards against diverged weights that answer with the first word for ever."""
    with pytest.raises(ValueError, match="the logits are no numbers"):
        sample(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), temperature)
