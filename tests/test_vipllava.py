"""vipllava.py: parity with transformers (tests/golden, made by make_golden.py), splice, loss.

    python -m pytest tests/test_vipllava.py
"""

import pytest
import torch

from cases import CONTRASTIVE, LLAMA, LOGITS_KEPT, TRAINING_RATE, TRAINING_STEPS, VIPLLAVA, VISION
from cases import equal_dimensions, fill, fingerprint, load_golden, projector_features, prompts_of, random_pixels
from cases import relative_error, training_rows
from chat import IMAGE
from clip import VisionConfig
from generate import generate
from llama import LlamaConfig
from vipllava import IGNORE, ViPLLaVA, ViPLLaVAConfig, expand, pad


@pytest.fixture(scope="module")
def golden():
    return load_golden("vipllava")


def model_of(name: str) -> ViPLLaVA:
    case = VIPLLAVA[name]
    config = ViPLLaVAConfig(
        vision=VisionConfig(**case["vision"]),
        text=LlamaConfig(**case["text"]),
        feature_layers=case["feature_layers"],
        image_token_id=case["image_token_id"],
    )
    return fill(ViPLLaVA(config), case["seed"])


def inputs_of(name: str) -> tuple[list[list[int]], torch.Tensor]:
    """The prompts of a case and all their images, in reading order."""
    case = VIPLLAVA[name]
    prompts = prompts_of(case, IMAGE)
    return prompts, random_pixels(sum(p.count(IMAGE) for p in prompts), case["vision"]["image_size"], case["seed"])


CONFIG = ViPLLaVAConfig(  # 9 patches an image
    vision=VisionConfig(image_size=6, patch_size=2, width=12, layers=5, heads=4, mlp=16),
    text=LlamaConfig(vocab_size=40, width=28, layers=2, heads=7, kv_heads=1, mlp=20, context=100),
    feature_layers=(-2, 1),
    image_token_id=37,
)
PROMPTS = [[1, IMAGE, 5, 6, 7], [1, 8, 9], [1, 10, IMAGE, 11, IMAGE, 12], [1, IMAGE]]  # 1, 0, 2 and 1 images


def small(seed: int = 1) -> tuple[ViPLLaVA, torch.Tensor]:
    """A model, and the four images of PROMPTS."""
    return fill(ViPLLaVA(CONFIG), seed), random_pixels(4, 6, seed)


# -- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VIPLLAVA)
@torch.no_grad()
def test_projector_matches_transformers(name, golden):
    """Guards against: the tanh or the quick GELU, eps 1e-6, a norm for each layer in place of one for all."""
    patches = model_of(name).projector(projector_features(VIPLLAVA[name]))
    assert relative_error(patches, golden[f"{name}/projector"]) < 1e-5


@pytest.mark.parametrize("name", VIPLLAVA)
@torch.no_grad()
def test_logits_match_transformers(name, golden):
    """Guards against: feature layers joined in another order, patches spliced column by column or at the wrong place,
    positions that skip the image."""
    model, (prompts, pixels) = model_of(name), inputs_of(name)
    images = iter(pixels)
    for i, prompt in enumerate(prompts):
        mine = [next(images) for _ in range(prompt.count(IMAGE))]
        ids = torch.tensor([expand(prompt, model.config.vision.patches)])
        logits = model.llama.lm_head(model(ids, torch.stack(mine) if mine else None))[0, -LOGITS_KEPT:]
        assert relative_error(logits, golden[f"{name}/logits/{i}"]) < 1e-4


@pytest.mark.parametrize("name", VIPLLAVA)
def test_training_matches_transformers(name):
    """Guards against: labels shifted by one, a loss over the padding, a gradient lost on its way to CLIP or through the
    patches; and over 20 steps of AdamW, what such a mistake adds up to."""
    golden, case, model = load_golden("training"), VIPLLAVA[name], model_of(name).double()
    rows, labels = training_rows(case, IMAGE)
    patches = model.config.vision.patches
    labels = [[label for i, label in zip(*pair) for _ in expand([i], patches)] for pair in zip(rows, labels)]
    pixels = random_pixels(sum(row.count(IMAGE) for row in rows), case["vision"]["image_size"], case["seed"])
    pixels = pixels.double()
    ids = pad([expand(row, patches) for row in rows], 0, side="right")[0]
    labels = pad(labels, IGNORE, side="right")[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    losses = []
    for _ in range(TRAINING_STEPS):
        loss = model.loss(ids, labels, pixels)
        loss.backward()
        if not losses:
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            ours, theirs = fingerprint(grads), golden[f"{name}/gradients"]
            assert ours.shape == theirs.shape
            assert ((ours - theirs).abs() / theirs[:, :1]).max() < 1e-5
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    expected = golden[f"{name}/losses"]
    assert abs(losses[0] / expected[0].item() - 1) < 1e-5 and losses[-1] < 0.9 * losses[0]
    assert relative_error(torch.tensor(losses, dtype=torch.float64), expected) < 1e-4
    ours, theirs = fingerprint({n: p for n, p in model.named_parameters() if n in grads}), golden[f"{name}/weights"]
    assert ((ours - theirs).abs() / theirs[:, :1]).max() < 1e-4


# -- splice ----------------------------------------------------------------------------------------------------------


def test_splice_puts_patches_in_reading_order():
    """Guards against: patches placed column by column over the batch, or words moved."""
    model, _ = small()
    patches = torch.arange(2 * 2 * 28.0).view(2, 2, 28)  # two images of two patches
    ids = torch.tensor([[3, IMAGE, IMAGE, 4, 5], [6, 7, IMAGE, 8, IMAGE]])
    embeds = model.splice(ids, patches)
    words = model.llama.embed_tokens.weight
    expected = [[words[3], patches[0, 0], patches[0, 1], words[4], words[5]]]
    expected += [[words[6], words[7], patches[1, 0], words[8], patches[1, 1]]]
    assert torch.equal(embeds, torch.stack([torch.stack(row) for row in expected]))


def test_splice_casts_patches_to_the_words_type():
    """Guards against: a float32 vision tower beside a bfloat16 language model ending in an error, or in float32."""
    model, _ = small()
    model.llama.bfloat16()
    assert model.splice(torch.tensor([[3, IMAGE]]), torch.ones(1, 1, 28)).dtype == torch.bfloat16


@pytest.mark.parametrize("images", [None, 1, 3])
def test_as_many_places_as_patches(images):
    """Guards against: masked_scatter dropping patches that are too many; an image in a prompt that nobody gave."""
    model, pixels = small()
    given = None if images is None else pixels[:images]
    ids = torch.tensor([expand([1, IMAGE, IMAGE, 2], CONFIG.vision.patches)])
    count = 9 * (images or 0)
    with pytest.raises(ValueError, match=f"18 image places, the images give {count} patches"):
        model(ids, given)
    with pytest.raises(ValueError, match=f"mention 2 images; got {images or 0}"):
        next(generate(model, [[1, IMAGE, IMAGE, 2]], given, max_new_tokens=2))


def test_the_image_reaches_every_later_token_and_none_before():
    """Guards against: bidirectional attention over the patches, an image that changes nothing."""
    model, pixels = small()
    ids = torch.tensor([expand([1, 2, IMAGE, 3], CONFIG.vision.patches)])
    with torch.no_grad():
        one, other = model(ids, pixels[:1])[0], model(ids, pixels[1:2])[0]
    assert torch.equal(one[:2], other[:2])
    assert ((one[2:] - other[2:]).abs().amax(dim=-1) > 1e-3).all()


def test_expand_and_pad():
    """Guards against: padding on the other side; a start that counts the row's length instead of its beginning."""
    assert expand([1, IMAGE, 2, IMAGE], 3) == [1, IMAGE, IMAGE, IMAGE, 2, IMAGE, IMAGE, IMAGE]
    left, start = pad([[1, 2, 3], [4]], 0, side="left")
    assert left.tolist() == [[1, 2, 3], [0, 0, 4]] and start.tolist() == [0, 2]
    right, start = pad([[1, 2, 3], [4]], IGNORE, side="right")
    assert right.tolist() == [[1, 2, 3], [4, IGNORE, IGNORE]] and start.tolist() == [0, 0]


# -- loss ------------------------------------------------------------------------------------------------------------


def training_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the second padded on the right: question, image, answer; ids and labels (2, T)."""
    rows = [expand([1, IMAGE, 5, 6, 7, 8, 2], 9), expand([1, 3, IMAGE, 9, 2], 9)]
    labels = [[IGNORE] * 11 + [6, IGNORE, 8, 2], [IGNORE] * 11 + [9, 2]]
    assert [len(r) for r in rows] == [len(r) for r in labels] == [15, 13]
    return pad(rows, 0, side="right")[0], pad(labels, IGNORE, side="right")[0]


def test_loss_is_the_mean_cross_entropy_of_the_trained_labels():
    """Guards against: labels shifted twice or not at all, a mean over rows in place of tokens, padding trained."""
    model, pixels = small()
    ids, labels = training_batch()
    log_probabilities = model.llama.lm_head(model(ids, pixels[:2])).log_softmax(dim=-1)
    trained = [(0, 10, 6), (0, 12, 8), (0, 13, 2), (1, 10, 9), (1, 11, 2)]  # row, place that predicts, label
    expected = -sum(log_probabilities[place] for place in trained) / len(trained)
    rows = []
    model.llama.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // out.size(-1)))
    torch.testing.assert_close(model.loss(ids, labels, pixels[:2]), expected)
    assert rows == [len(trained)]  # the head's work is for nothing elsewhere


def test_padding_on_the_right_changes_no_loss():
    """Guards against: an attention over padding, rows that see each other."""
    model, pixels = small()
    ids, labels = training_batch()
    together = model.loss(ids, labels, pixels[:2])
    one = model.loss(ids[:1], labels[:1], pixels[:1])
    other = model.loss(ids[1:, :13], labels[1:, :13], pixels[1:2])
    torch.testing.assert_close(together, (3 * one + 2 * other) / 5)


def test_ignored_labels_give_no_gradient():
    """Guards against: IGNORE taken as a class. What stands after the only trained label has no part."""
    model, pixels = small()
    ids = torch.tensor([expand([1, IMAGE, 5, 6, 20, 21], 9)])
    labels = torch.full_like(ids, IGNORE)
    labels[0, -3] = 6  # predicted where 5 stands
    model.loss(ids, labels, pixels[:1]).backward()
    moved = model.llama.embed_tokens.weight.grad.abs().sum(dim=-1) > 0
    assert moved.nonzero().flatten().tolist() == [1, 5]

    hidden = model(ids, pixels[:1])[0, -4].detach()
    probabilities = model.llama.lm_head(hidden).softmax(dim=-1)
    probabilities[6] -= 1
    torch.testing.assert_close(model.llama.lm_head.weight.grad, probabilities[:, None] * hidden, rtol=1e-4, atol=1e-5)


def test_every_part_is_trained_through_the_loss():
    """Guards against: a detached splice, a projector that learns nothing. CLIP's last layer is not used."""
    model, pixels = small()
    ids, labels = training_batch()
    model.loss(ids, labels, pixels[:2]).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):  # adds the same to all of a query's scores, which softmax ignores
            trained = parameter.grad is not None and bool(parameter.grad.any())
            assert trained != name.startswith(("vision.layers.4", "vision.post_layernorm")), name


def test_released_configuration():
    """Guards against: defaults that drift from the 7B checkpoint: 576 patches of 5 x 1024, a projector of 37,767,168;
    what no parameter's shape shows is listed here a second time."""
    with torch.device("meta"):
        model = ViPLLaVA(ViPLLaVAConfig())
    config = model.config
    assert config.vision.patches == 576 and config.vision.heads == 16 and config.vision.eps == 1e-5
    assert config.text.heads == 32 and config.text.context == 4096
    assert config.text.rope_theta == 10_000 and config.text.eps == 1e-5 and config.text.window is None
    assert config.feature_layers == (-2, -5, -8, -11, 6) and config.projector_eps == 1e-5
    assert config.image_token_id == 32000 and config.template == "llava_v1"
    assert sum(p.numel() for p in model.projector.parameters()) == 37_767_168
    assert sum(p.numel() for p in model.vision.parameters()) == 303_507_456
    assert sum(p.numel() for p in model.llama.parameters()) == 6_738_415_616 + 64 * 2 * 4096


def test_the_golden_cases_are_good():
    """Guards against: a case added with equal dimensions, which hide mix-ups; prompts with ids that are no words."""
    for table in (VISION, CONTRASTIVE, LLAMA, VIPLLAVA):
        assert [equal_dimensions(case) for case in table.values()] == [[]] * len(table)
    for case in VIPLLAVA.values():
        assert max(max(p) for p in prompts_of(case, IMAGE)) < case["image_token_id"]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_ids_that_are_neither_words_nor_images_are_refused():
    """Guards against a label's IGNORE among the ids, read as word 0."""
    with pytest.raises(ValueError, match=r"ids of -100 … 2; expected 0 … \d+, or IMAGE"):
        ViPLLaVA(CONFIG).splice(torch.tensor([[1, IGNORE, 2]]), None)


def test_loss_without_labels_is_refused():
    """Guards against the NaN of a mean over nothing, which would end a training run much later."""
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="none of the labels"):
        ViPLLaVA(CONFIG).loss(ids, torch.tensor([[1, IGNORE, IGNORE]]))
