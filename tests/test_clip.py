"""clip.py: parity with transformers (tests/golden, made by make_golden.py), opening images, preprocessing, errors.

    python -m pytest tests/test_clip.py
"""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cases import CONTRASTIVE, IMAGE_SIZES, IMAGES, VISION, contrastive_ids, fill, load_golden, random_image
from cases import random_pixels, relative_error
from clip import CLIP, MEAN, PAD_COLOR, STD, CLIPText, CLIPVision, TextConfig, VisionConfig
from clip import open_image, preprocess, read_mask, upright

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    return load_golden("clip")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def vision_of(case: dict) -> CLIPVision:
    return fill(CLIPVision(VisionConfig(**case["vision"])), case["seed"])


def small_vision() -> tuple[CLIPVision, torch.Tensor]:
    case = VISION["one layer"]
    return vision_of(case), random_pixels(2, case["vision"]["image_size"], seed=1)


# -- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION)
def test_features_match_transformers(name, golden):
    """Guards against: exact GELU, eps 1e-6, a layer's index off by one, the class token kept, layers out of order."""
    case = VISION[name]
    pixels = random_pixels(case["images"], case["vision"]["image_size"], case["seed"])
    features = vision_of(case)(pixels, case["layers"])
    assert relative_error(features, golden[f"{name}/features"]) < TOLERANCE


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_head_matches_transformers(name, golden):
    """Guards against: a text tower that sees ahead, the state of the last pad in place of the first end of text, a
    missing final norm, vectors not normalised, the scale not exponentiated."""
    case = CONTRASTIVE[name]
    config = VisionConfig(**case["vision"]), TextConfig(**case["text"])
    model = fill(CLIP(*config, case["projection"]), case["seed"])
    pixels, ids = random_pixels(case["images"], config[0].image_size, case["seed"]), contrastive_ids(case)
    assert relative_error(model.encode_image(pixels), golden[f"{name}/image"]) < TOLERANCE
    assert relative_error(model.encode_text(ids), golden[f"{name}/text"]) < TOLERANCE
    assert relative_error(model(pixels, ids), golden[f"{name}/logits"]) < TOLERANCE


# -- the tower -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_softmax_of_scaled_products(causal):
    """Guards against: a scale of the whole width in place of the head's, heads cut out along the wrong axis."""
    attention = small_vision()[0].layers[0].self_attn
    x = random_pixels(1, 24, seed=2)[0, :, :5]  # (3, 5, 24)
    B, T, C = x.size()
    D = C // attention.heads
    y = torch.empty(B, T, C)
    for h in range(attention.heads):
        q, k, v = (p(x)[:, :, h * D : (h + 1) * D] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        scores = q @ k.transpose(1, 2) / D**0.5  # (B, T, T)
        if causal:
            scores = scores + torch.full((T, T), float("-inf")).triu(1)
        y[:, :, h * D : (h + 1) * D] = scores.softmax(dim=-1) @ v
    torch.testing.assert_close(attention(x, causal), attention.out_proj(y), rtol=1e-5, atol=1e-5)


def test_hidden_state_zero_is_the_normalised_embeddings():
    """Guards against: state 0 taken before pre_layernorm, patches column by column, the class token last."""
    model, pixels = small_vision()
    (state,) = model.hidden_states(pixels, (0,))
    P, grid = model.config.patch_size, model.config.image_size // model.config.patch_size
    row, column = 1, 3  # patch number row * grid + column
    patch = pixels[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P]  # (B, 3, P, P)
    x = (patch[:, None] * model.patch_embedding.weight).sum(dim=(2, 3, 4))  # (B, C)
    x = model.pre_layernorm(x + model.position_embedding.weight[1 + row * grid + column])
    torch.testing.assert_close(state[:, 1 + row * grid + column], x, rtol=1e-4, atol=1e-6)
    first = model.pre_layernorm(model.class_embedding + model.position_embedding.weight[0])
    torch.testing.assert_close(state[:, 0], first.expand(2, -1), rtol=1e-5, atol=1e-6)


def test_negative_and_positive_layers_name_the_same_states():
    """Guards against: -1 taken as the last block of L instead of the last of L + 1 states."""
    model, pixels = small_vision()
    L = model.config.layers
    for i in range(L + 1):
        assert torch.equal(model(pixels, (i,)), model(pixels, (i - L - 1,)))


def test_released_layers_are_blocks_23_20_17_14_and_6():
    """Guards against: reading the paper's text (24, 21, 18, 15, 6) in place of the released code."""
    config = VisionConfig(image_size=10, patch_size=5, width=6, layers=24, heads=2, mlp=8)
    model = fill(CLIPVision(config), seed=3)
    pixels = random_pixels(1, 10, seed=3)
    states = []
    for block in model.layers:
        block.register_forward_hook(lambda module, args, out: states.append(out))
    features = model(pixels, (-2, -5, -8, -11, 6))
    assert torch.equal(features, torch.cat([states[i - 1][:, 1:] for i in (23, 20, 17, 14, 6)], dim=-1))


@pytest.mark.parametrize("layers, blocks", [((0,), 0), ((3, 1), 3), ((-2,), 7), ((2, -1), 8), ((-9,), 0)])
def test_no_block_beyond_the_deepest_is_computed(layers, blocks):
    """Guards against: paying for block 24, whose output the model never uses."""
    model, pixels = small_vision()
    calls = []
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda module, args, out, i=i: calls.append(i))
    model(pixels, layers)
    assert calls == list(range(blocks))


@pytest.mark.parametrize("layers", [(), (9,), (-10,), (2, 40)])
def test_a_layer_that_is_not_there_is_refused(layers):
    """Guards against: Python's modulo quietly choosing another layer."""
    model, pixels = small_vision()
    with pytest.raises(ValueError, match="feature layers .*-9…8"):
        model(pixels, layers)


@pytest.mark.parametrize("shape", [(2, 3, 34, 35), (2, 3, 42, 42), (2, 1, 35, 35), (3, 35, 35)])
def test_pixels_of_another_shape_are_refused(shape):
    """Guards against: an error deep in the convolution, or a picture of another size read with wrong positions."""
    with pytest.raises(ValueError, match=r"expected \(B, 3, 35, 35\)"):
        small_vision()[0](torch.zeros(shape), (0,))


@pytest.mark.parametrize("wrong", [dict(patch_size=6), dict(heads=5)])
def test_sizes_that_do_not_divide_are_refused(wrong):
    """Guards against: pixels at the border that no patch covers, channels that no head reads."""
    with pytest.raises(ValueError, match="multiple"):
        CLIPVision(replace(small_vision()[0].config, **wrong))


def test_images_of_a_batch_do_not_touch():
    """Guards against: attention across the batch."""
    model, pixels = small_vision()
    both = model(pixels, (-1, 2))
    alone = torch.cat([model(p[None], (-1, 2)) for p in pixels])
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-5)


def test_text_state_is_taken_at_the_first_end_of_text():
    """Guards against: padding (with end of text itself) changing what a text means; a text that is too long."""
    config = TextConfig(vocab_size=20, context=9, width=12, layers=2, heads=3, mlp=16)
    model = fill(CLIPText(config), seed=4)
    short, long = torch.tensor([[5, 3, 19]]), torch.tensor([[5, 3, 19, 19, 19, 19]])
    torch.testing.assert_close(model(short), model(long), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(short), model(torch.tensor([[3, 5, 19]])), rtol=1e-2)
    with pytest.raises(ValueError, match="10 tokens.*at most 9"):
        model(torch.zeros(1, 10, dtype=torch.long))


# -- preprocess ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize("width, height", IMAGES)
def test_preprocess_matches(mode, size, width, height):
    """Mode crop against transformers' CLIPImageProcessor, pad against the official expand2square. Guards against:
    bilinear for bicubic, resizing before padding, an offset rounded the other way, a mean colour rounded up, BGR."""
    image = Image.fromarray(random_image(width, height, seed=51))
    golden = load_golden("preprocess")[f"{mode} {size} {width}x{height}"]
    ours = preprocess(image, size, mode)
    assert ours.dtype == torch.float32
    assert relative_error(ours, golden) < TOLERANCE


def test_pad_keeps_the_border_and_crop_loses_it():
    """Guards against: the two modes exchanged. A red line at the left border must survive the default."""
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (0, 0, 2, 20))
    redness = {mode: (lambda p: (p[0] - p[1]).max().item())(preprocess(image, 40, mode)) for mode in ("pad", "crop")}
    assert redness["pad"] > 3 > 1 > redness["crop"]
    assert torch.equal(preprocess(image, 40), preprocess(image, 40, "pad"))


def test_padding_is_clips_mean():
    """Guards against: black bars, which the tower never saw. The integer mean is within half a level of zero."""
    top = preprocess(Image.new("RGB", (30, 10)), 30)[:, 0]
    assert PAD_COLOR == (122, 116, 104)
    assert top.abs().max() < 1 / 255 / min(STD)
    color = (torch.tensor(PAD_COLOR) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.equal(top, color[:, None].expand(3, 30))


def test_pixels_whatever_the_default():
    """Guards against: a mean and a deviation that are rounded where a program's default is 16 bits."""
    image = Image.new("RGB", (8, 8), (10, 200, 30))
    expected = preprocess(image, 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(preprocess(image, 8), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_squeeze_ignores_the_aspect_ratio():
    """Guards against: "squeeze" cropping or padding."""
    array = random_image(20, 10, seed=5)
    ours = preprocess(Image.fromarray(array), 10, "squeeze")
    small = np.asarray(Image.fromarray(array).resize((10, 10), Image.Resampling.BICUBIC)) / 255.0
    assert np.abs(ours.permute(1, 2, 0).numpy() - (small - MEAN) / STD).max() < TOLERANCE


@pytest.mark.parametrize("image, size, mode, words", [
    ("RGB", 8, "fit", "unknown mode 'fit'; expected"), ("L", 8, "pad", "RGB"),
    ("RGB", 0, "pad", "the size 0; expected 1 pixel or more"),
])
def test_preprocess_refuses(image, size, mode, words):
    """Guards against: a typing error in the mode read as another mode, a grey image with a shape that is not ours."""
    with pytest.raises(ValueError, match=words):
        preprocess(Image.new(image, (8, 8)), size, mode)


# -- open_image and upright ------------------------------------------------------------------------------------------


def saved(folder, image: Image.Image, name: str, **options):
    image.save(folder / name, **options)
    return folder / name


def picture() -> Image.Image:
    """24 x 16: a smooth slope, so that lossy formats keep it, with four different corners."""
    x, y = np.meshgrid(np.linspace(0, 1, 24), np.linspace(0, 1, 16))
    return Image.fromarray((255 * np.stack([x, y, 1 - x * y], axis=-1)).astype(np.uint8))


def difference(a: Image.Image, b: Image.Image) -> float:
    assert a.size == b.size, (a.size, b.size)
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max()


@pytest.mark.parametrize(
    "name, options, tolerance",
    [
        ("a.png", {}, 0),
        ("a.bmp", {}, 0),
        ("a.tiff", {}, 0),
        ("a.webp", {"lossless": True}, 0),
        ("a.jpg", {"quality": 95, "subsampling": 0}, 12),
        ("a.webp", {"quality": 95}, 24),
    ],
)
def test_common_files_open_as_rgb(name, options, tolerance, tmp_path):
    """Guards against: channels exchanged, a lazily opened file that is closed before its pixels are read."""
    image = open_image(str(saved(tmp_path, picture(), name, **options)))
    assert image.mode == "RGB"
    assert difference(image, picture()) <= tolerance


def test_the_suffix_does_not_matter(tmp_path):
    """Guards against: a format guessed from the name: on the web, half of all .jpg are something else."""
    assert difference(open_image(saved(tmp_path, picture(), "a.jpg", format="PNG")), picture()) == 0


def test_first_frame_of_an_animation(tmp_path):
    """Guards against: the last frame, or a strip of frames."""
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], duration=50, **options)
        assert open_image(path).getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_grey_keeps_its_range(name, tmp_path):
    """Guards against: clipping at 255, which turns a 16-bit picture white."""
    values = np.array([[0, 255, 256], [32768, 40000, 65535]], dtype=np.uint16)
    image = open_image(saved(tmp_path, Image.fromarray(values), name))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.repeat((values // 256).astype(np.uint8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_every_16_bit_mode(mode):
    """Guards against: big-endian samples read as little-endian ones (1 and 256 exchanged)."""
    image = Image.new(mode, (3, 2), 0x4321)
    assert np.array_equal(np.asarray(upright(image)), np.full((2, 3, 3), 0x43, dtype=np.uint8))


def test_cmyk_jpeg(tmp_path):
    """Guards against: inverted or raw CMYK planes taken as RGB."""
    image = open_image(saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg", quality=95))
    assert difference(image, Image.new("RGB", (16, 16), "red")) < 12


def test_palettes(tmp_path):
    """Guards against: palette indices taken as grey levels; the transparent colour's own RGB showing through."""
    image = Image.new("P", (4, 2), 7)
    image.putpalette([0, 0, 0] * 7 + [10, 200, 30] + [0, 0, 255])
    image.putpixel((3, 1), 8)
    opened = open_image(saved(tmp_path, image, "a.png"))
    assert opened.getpixel((0, 0)) == (10, 200, 30) and opened.getpixel((3, 1)) == (0, 0, 255)
    for name in ("b.png", "b.gif"):
        opened = open_image(saved(tmp_path, image, name, transparency=8))
        assert opened.getpixel((0, 0)) == (10, 200, 30) and opened.getpixel((3, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    "mode, color, seen",
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (90, 255), (90, 90, 90)),
    ],
)
def test_transparent_parts_lie_over_white(mode, color, seen, tmp_path):
    """Guards against: dropping alpha, which shows whatever was left under transparent pixels (often black)."""
    assert open_image(saved(tmp_path, Image.new(mode, (5, 3), color), "a.png")).getpixel((2, 1)) == seen


def test_transparent_color_without_alpha(tmp_path):
    """Guards against: forgetting PNG's tRNS chunk on grey and RGB images."""
    image = Image.new("RGB", (4, 2), (1, 2, 3))
    image.putpixel((0, 0), (4, 5, 6))
    opened = open_image(saved(tmp_path, image, "a.png", transparency=(1, 2, 3)))
    assert opened.getpixel((0, 0)) == (4, 5, 6) and opened.getpixel((1, 1)) == (255, 255, 255)


def test_one_bit(tmp_path):
    """Guards against: true read as level 1 of 255."""
    image = Image.new("1", (9, 2), 1)
    image.putpixel((8, 1), 0)
    opened = open_image(saved(tmp_path, image, "a.png"))
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((8, 1)) == (0, 0, 0)


# What the EXIF tag asks for, in NumPy terms: how the stored array becomes the upright one.
EXIF = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("orientation", EXIF)
def test_exif_orientation(orientation, name, tmp_path):
    """Guards against: markers drawn on a picture that lies on its side; 6 and 8, or 5 and 7, exchanged; a TIFF, which
    Pillow turns by itself, turned twice."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, picture(), name, exif=exif)
    assert np.array_equal(np.asarray(open_image(path)), EXIF[orientation](np.asarray(picture())))
    turned = upright(open_image(path))  # upright already: the tag must be gone
    assert np.array_equal(np.asarray(turned), EXIF[orientation](np.asarray(picture())))


def test_exif_orientation_of_a_transparent_image():
    """Guards against: the tag lost when transparency is laid over white first."""
    image = Image.new("RGBA", (3, 5), (9, 9, 9, 0))
    image.getexif()[0x0112] = 6
    assert upright(image).size == (5, 3)


def test_an_odd_tag_beside_the_orientation(tmp_path):
    """Guards against: a photo that any viewer shows, refused for another of its tags."""
    exif, image = Image.Exif(), Image.new("RGB", (30, 20))
    exif[0x0112], exif[0x0128] = 6, 2
    path = saved(tmp_path, image, "a.jpg", exif=exif)
    number, text = b"\x01\x28\0\3\0\0\0\1\0\2", b"\x01\x28\0\2\0\0\0\1a\0"  # the unit of the resolution
    assert path.read_bytes().count(number) == 1
    path.write_bytes(path.read_bytes().replace(number, text))
    assert open_image(path).size == (20, 30)


@pytest.mark.filterwarnings("ignore")  # of Pillow's, on what is damaged
def test_a_file_cut_short(tmp_path):
    """Guards against: the lower half of a picture silently grey; errors other than ValueError."""
    picture_of_noise = Image.fromarray(random_image(40, 40, seed=6))
    for name in ("a.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.tiff"):
        data = saved(tmp_path, picture_of_noise, name).read_bytes()
        for length in (0, 1, 5, 12, 30, len(data) // 3, len(data) // 2):
            (tmp_path / "cut").write_bytes(data[:length])
            with pytest.raises(ValueError) as error:
                open_image(tmp_path / "cut")
            assert "\n" not in str(error.value) and "cut" in str(error.value)


@pytest.mark.filterwarnings("ignore")  # of Pillow's, on what is damaged
def test_a_damaged_file_never_ends_in_another_error(tmp_path):
    """Guards against: struct.error, zlib.error, EOFError … of Pillow's readers reaching a person as a traceback."""
    generator = np.random.default_rng(7)
    for name in ("a.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.tiff"):
        data = bytearray(saved(tmp_path, Image.fromarray(random_image(9, 11, seed=7)), name).read_bytes())
        for _ in range(60):
            damaged = bytearray(data)
            for place in generator.integers(min(len(data), 200), size=3):
                damaged[place] = generator.integers(256)
            (tmp_path / "damaged").write_bytes(damaged)
            try:
                assert open_image(tmp_path / "damaged").mode == "RGB"
            except ValueError as error:
                assert "\n" not in str(error)


def test_a_broken_chunk_in_the_middle(tmp_path):
    """Guards against: the SyntaxError that Pillow raises when a PNG goes wrong after its header was read."""
    data = saved(tmp_path, Image.fromarray(random_image(200, 200, seed=8)), "a.png").read_bytes()
    assert data.count(b"IDAT") > 1
    (tmp_path / "a.png").write_bytes(data[::-1].replace(b"TADI", b"TA\x00I", 1)[::-1])  # the last such chunk
    with pytest.raises(ValueError, match="a.png can't be read as an image"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"just some text\n", b"<html>404</html>", bytes(100)])
def test_not_an_image(content, tmp_path):
    """Guards against: an HTML error page, saved as .jpg, ending in Pillow's own traceback."""
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="a.jpg is not an image; expected a JPEG"):
        open_image(tmp_path / "a.jpg")


def test_no_such_file(tmp_path):
    """Guards against: a folder given for a file ending in IsADirectoryError."""
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no image file at {path}"):
            open_image(path)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    """Guards against: Pillow's mere warning between the limit and twice the limit."""
    path = saved(tmp_path, Image.new("L", (30, 20)), "a.png")
    for limit in (599, 400, 100):  # a warning, a warning, an error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=f"more than {limit} pixels"):
            open_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert open_image(path).size == (30, 20)


def test_floating_point_pixels_are_refused(tmp_path):
    """Guards against: clipping a float TIFF of range 0 … 1 to black."""
    path = saved(tmp_path, Image.fromarray(np.full((4, 5), 0.5, dtype=np.float32)), "a.tiff")
    with pytest.raises(ValueError, match="no agreed range"):
        open_image(path)


def test_the_image_given_is_left_alone():
    """Guards against: upright() turning or laying over white in place."""
    image = Image.new("RGBA", (3, 5), (9, 9, 9, 0))
    image.getexif()[0x0112] = 6
    before = image.tobytes(), image.size
    upright(image)
    assert (image.tobytes(), image.size) == before


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "RGB", "RGBA", "LA"])
def test_a_mask_is_what_is_not_0(mode, tmp_path):
    """Guards against a mask of 0 and 1 read as black, a 16-bit one cut to its high byte, a palette's colors ignored,
    and transparent parts taken for white."""
    true = np.zeros((40, 60), bool)
    true[5:9, 6:20] = True
    if mode == "P":
        image = Image.fromarray(true.astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 128, 0, 0])
    elif mode in ("RGBA", "LA"):
        image = Image.new(mode, (60, 40), "white")
        image.putalpha(Image.fromarray(true))
    else:
        ones = true.astype(np.uint16 if mode == "I;16" else np.uint8)
        image = Image.fromarray(ones if mode == "I;16" else ones * (255 if mode == "1" else 1)).convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "some.png")
    assert (read_mask(tmp_path / "some.png") == true).all()


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_mask_is_no_jpeg(kind, tmp_path):
    """Guards against a mask with stray pixels around it, of the values that JPEG makes out of 0."""
    Image.new("L", (60, 40)).save(tmp_path / "some.png", kind)
    with pytest.raises(ValueError, match="some.png is a JPEG file; expected PNG, as JPEG changes pixels"):
        read_mask(tmp_path / "some.png")


def test_an_open_image_stays_usable(tmp_path):
    """Guards against: pixels that are read lazily from a file that was closed."""
    image = open_image(saved(tmp_path, picture(), "a.png"))
    (tmp_path / "a.png").unlink()
    assert ImageOps.mirror(image).size == (24, 16)
    image.save(io.BytesIO(), "PNG")


@pytest.mark.parametrize("size, mode, fine", [((1, 20_000), "pad", False), ((1, 11_000), "pad", True),
                                              ((20_000, 1), "pad", True), ((20_000, 1), "squeeze", True),
                                              ((20_000, 1), "crop", False)])
def test_an_image_too_long_and_thin_is_refused(size, mode, fine, monkeypatch):
    """Guards against an image of a few pixels that takes 30 GB to pad, and half a minute to crop."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90_000_000)
    image = Image.new("RGB", size)
    if fine:
        assert preprocess(image, 224, mode).shape == (3, 224, 224)
    else:
        with pytest.raises(ValueError, match="too long and thin"):
            preprocess(image, 224, mode)


def test_8_bits_kept_in_32():
    """Guards against: a mask or a picture of small whole numbers that comes out black."""
    values = np.array([[0, 7, 255]], dtype=np.int32)
    assert np.array_equal(np.asarray(upright(Image.fromarray(values)))[..., 0], values)


def test_pixels_beyond_16_bits_are_refused(tmp_path):
    """Guards against a 32-bit image whose bright parts all come out white."""
    Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="pixels of 0 to 70000; expected 8 or 16 bits$"):
        open_image(tmp_path / "deep.tif")
