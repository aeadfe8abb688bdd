"""CLIP from scratch: the eye of ViP-LLaVA (Radford et al., arXiv 2103.00020; ViP-LLaVA, section 3.1).

A ViT cuts the image into patches and refines them block by block. Its last layers, the paper argues, know *what* is there
but have forgotten *where the red line ran*; ViP-LLaVA therefore reads several depths at once and joins them per patch:

    image  (any size, upright RGB)
    pixels (B, 3, S, S)        preprocess: pad to a square, resize, normalise
    x      (B, 1 + N, C)       class token and N = (S / patch)^2 patch embeddings, plus positions
    hidden_states[0]           after pre_layernorm
    hidden_states[i]           after block i, for i = 1 … L
    features (B, N, 5 · C)     CLIPVision(config)(pixels, (-2, -5, -8, -11, 6)), the class token dropped

Pitfalls
  * A layer's number is an index into the L + 1 hidden states, so with L = 24 the released (-2, -5, -8, -11, 6) are the
    outputs of blocks 23, 20, 17, 14 and 6. The paper's text says 24, 21, 18, 15 and 6: the weights follow the code.
  * ViT-L/14-336 has 24 layers *and* a 24 x 24 grid. Do not take one for the other.
  * The tower was trained with quick_gelu, x · sigmoid(1.702 x); the exact GELU silently costs accuracy.

The text tower and the contrastive head are here too, so that an official CLIP checkpoint loads whole:

    clip, tokenize = load_clip("openai/clip-vit-large-patch14-336")           # checkpoint.py
    clip(pixels, tokenize(["a red arrow", "a blue box"])).softmax(dim=-1)     # zero-shot, (B, number of texts)

Letters: B batch, T tokens, N patches, C channels (width), H heads, D head width, L layers, S image side.
"""

import math
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP was trained on, RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOR = tuple(int(255 * m) for m in MEAN)  # (122, 116, 104)


# -- images -> pixels ------------------------------------------------------------------------------------------------


def open_image(path) -> Image.Image:
    """The image at `path`, upright and RGB: the one whose pixels a person points at.

    Raises FileNotFoundError when there is no such file, ValueError when it is not an image that Pillow reads or when
    it is larger than Pillow's limit against decompression bombs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image file at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return upright(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, the limit; shrink it") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image; expected a JPEG, PNG, WebP, GIF, BMP or TIFF file") from None
    except (OSError, SyntaxError, TypeError, struct.error, NotImplementedError) as error:  # Pillow's, of damaged files
        raise ValueError(f"{path} can't be read as an image ({error}); is the file whole?") from None
    except ValueError as error:
        raise ValueError(f"{path} can't be read as an image: {error}") from None


def read_mask(path: str) -> np.ndarray:
    """The pixels of an image file that are neither black nor transparent, (H, W) bool."""
    open_image(path)  # says it when that is no image
    with Image.open(path) as image:
        if image.format in ("JPEG", "MPO"):  # MPO: several JPEGs in one file
            raise ValueError(f"{path} is a JPEG file; expected PNG, as JPEG changes pixels")
        image = _turned(image)
        if image.mode[0] in "1LIF" and not image.has_transparency_data:  # numbers, of which 1 of 65535 counts too
            return np.asarray(image) != 0
        return np.asarray(image.convert("RGBA").convert("RGBa"))[:, :, :3].any(axis=2)  # a: times alpha


_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))


def _turned(image: Image.Image) -> Image.Image:
    """As its EXIF tag says. (Pillow's exif_transpose writes all other tags anew, too, and fails where one is odd.)"""
    image.load()  # Pillow itself turns a TIFF here, and takes away its tag
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is None:
        return image
    image = image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # it must not be turned again
        image.info.pop(key, None)
    return image


def upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF tag says, its first frame, as 8-bit RGB; transparent parts lie over white."""
    image = _turned(image)
    if image.mode.startswith("I"):  # 16 bits a pixel: keep the high byte, as Pillow's own convert would clip instead
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels of {values.min()} to {values.max()}; expected 8 or 16 bits")
        eight = image.mode == "I" and values.max() < 256  # kept in 32
        return Image.fromarray((values if eight else values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def preprocess(image: Image.Image, size: int, mode: str = "pad") -> torch.Tensor:
    """An upright RGB image as a normalised float tensor, shape (3, size, size).

    mode "pad" (the released models' way) centres the image on a square of CLIP's mean colour, so that no marker near
    the border is lost; "squeeze" ignores the aspect ratio (the paper's VCR evaluation); "crop" keeps the centre only
    (stage 1 of training, and Hugging Face's processor). Raises ValueError for any other mode, and for an image so long
    and thin that its square, or its resized strip, would have more than twice as many pixels as Pillow's limit.
    """
    if image.mode != "RGB":
        raise ValueError(f"preprocess got a {image.mode} image; expected RGB, as upright() returns")
    if mode not in ("pad", "squeeze", "crop"):
        raise ValueError(f'unknown mode {mode!r}; expected "pad", "squeeze" or "crop"')
    if size < 1:
        raise ValueError(f"preprocess got the size {size}; expected 1 pixel or more")
    w, h = image.size
    square = max(w, h) * (size if w > h else h)  # wide images are resized first, see below
    between = {"pad": square, "crop": size * size * max(w, h) // min(w, h)}.get(mode, 0)  # pixels on the way
    if between > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        what = "large" if w == h else "long and thin"
        raise ValueError(f"an image of {w} x {h} pixels is too {what} to {mode}; expected a smaller or squarer one")
    if mode == "pad" and w != h:
        side = max(w, h)
        if w > h:  # Pillow resizes all rows, then all columns: the rows of padding can come in between
            image = image.resize((size, h), Image.Resampling.BICUBIC)
        padded = Image.new("RGB", (size if w > h else side, side), PAD_COLOR)
        padded.paste(image, ((padded.width - image.width) // 2, (side - h) // 2))
        image = padded
    elif mode == "crop":
        short = min(w, h)
        image = image.resize((size * w // short, size * h // short), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float()  # (3, S, S)
    mean, std = (torch.tensor(of, dtype=torch.float32, device="cpu")[:, None, None] for of in (MEAN, STD))
    return pixels.div_(255).sub_(mean).div_(std)


# -- the transformer that both towers share --------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """The image tower; the defaults are ViT-L/14 at 336 pixels."""

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    eps: float = 1e-5

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """The text tower; the defaults are those beside ViT-L/14."""

    vocab_size: int = 49408
    context: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    eps: float = 1e-5


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        B, T, C = x.size()
        q = self.q_proj(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        v = self.v_proj(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick_gelu


class Block(nn.Module):
    def __init__(self, config: VisionConfig | TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.self_attn = Attention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config.width, config.mlp)

    def forward(self, x: torch.Tensor, causal: bool = False) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


def _init_weights(module: nn.Module) -> None:
    """Weights to start training from; loading a checkpoint replaces them all."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias) if module.bias is not None else None
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def _waves(grid: int, width: int) -> torch.Tensor:
    """Positions to start training from, (grid², width): sines and cosines of x and of y, of several wavelengths.

    With them one rule, "what is beside me?", holds everywhere at once; from random positions a tower learns it for each
    patch anew, and a small one was still at colors where this one knew places and shapes. (He et al., arXiv 2111.06377.)
    """
    frequencies = 10.0 ** -torch.linspace(0, 1, width // 4 + 1, device="cpu")[:-1]  # radians a patch
    y, x = torch.meshgrid(*2 * [torch.arange(grid, device="cpu")], indexing="ij")
    angles = torch.cat([axis.flatten()[:, None] * frequencies for axis in (x, y)], dim=1)  # (grid², width / 2)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 4))


# -- the two towers --------------------------------------------------------------------------------------------------


class CLIPVision(nn.Module):
    """The image tower. `CLIPVision(config)(pixels, layers)` returns the features of the layers asked for."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.image_size % config.patch_size or config.width % config.heads:
            raise ValueError(f"image_size must be a multiple of patch_size and width of heads; got {config}")
        self.config = config
        C, P = config.width, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.patch_embedding = nn.Conv2d(3, C, P, stride=P, bias=False)
        self.position_embedding = nn.Embedding(1 + config.patches, C)
        self.pre_layernorm = nn.LayerNorm(C, eps=config.eps)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.post_layernorm = nn.LayerNorm(C, eps=config.eps)  # only the contrastive head uses it
        nn.init.normal_(self.class_embedding, std=0.02)
        self.apply(_init_weights)
        if not self.class_embedding.is_meta:  # else all values are still to come
            self.position_embedding.weight.data[1:] = _waves(config.image_size // P, C)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, S, S) -> hidden state 0, (B, 1 + N, C)."""
        B, S = pixels.size(0), self.config.image_size
        if pixels.shape[1:] != (3, S, S):
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; expected (B, 3, {S}, {S})")
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, N, C), row by row
        x = torch.cat([self.class_embedding.expand(B, 1, -1), patches], dim=1)  # (B, 1 + N, C)
        return self.pre_layernorm(x + self.position_embedding.weight)

    def hidden_states(self, pixels: torch.Tensor, layers: tuple[int, ...]) -> list[torch.Tensor]:
        """The hidden states named by `layers`, in that order, each (B, 1 + N, C).

        No block beyond the deepest one asked for is computed. Raises ValueError for a layer that is not there.
        """
        L = self.config.layers
        if not layers or not all(-L - 1 <= i <= L for i in layers):
            expected = f"expected one or more of {-L - 1}…{L}, 0 being the embeddings"
            raise ValueError(f"feature layers {tuple(layers)}; {expected}")
        wanted = [i % (L + 1) for i in layers]  # -1 is the last of L + 1 states
        states = [self.embed(pixels)]
        for block in self.layers[: max(wanted)]:
            states.append(block(states[-1]))
        return [states[i] for i in wanted]

    def forward(self, pixels: torch.Tensor, layers: tuple[int, ...]) -> torch.Tensor:
        """pixels (B, 3, S, S) -> features (B, N, len(layers) · C), the class token dropped."""
        return torch.cat([x[:, 1:] for x in self.hidden_states(pixels, layers)], dim=-1)


class CLIPText(nn.Module):
    """The text tower: a causal transformer over at most `context` tokens."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_layernorm = nn.LayerNorm(config.width, eps=config.eps)
        self.apply(_init_weights)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T), each row ended (and padded) by the end-of-text token -> its state there, (B, C).

        End of text is the largest id of CLIP's vocabulary, so its first place is where argmax points.
        """
        B, T = ids.size()
        if T > self.config.context:
            raise ValueError(f"a text of {T} tokens; CLIP reads at most {self.config.context}")
        x = self.token_embedding(ids) + self.position_embedding.weight[:T]  # (B, T, C)
        for block in self.layers:
            x = block(x, causal=True)
        x = self.final_layernorm(x)
        return x[torch.arange(B, device=ids.device), ids.argmax(dim=-1)]  # (B, C)


class CLIP(nn.Module):
    """Both towers and the contrastive head: how well does each text describe each image?"""

    def __init__(self, vision: VisionConfig, text: TextConfig, projection: int = 768):
        super().__init__()
        self.vision_model = CLIPVision(vision)
        self.text_model = CLIPText(text)
        self.visual_projection = nn.Linear(vision.width, projection, bias=False)
        self.text_projection = nn.Linear(text.width, projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.visual_projection.apply(_init_weights)
        self.text_projection.apply(_init_weights)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, S, S), on any device -> unit vectors (B, projection)."""
        (x,) = self.vision_model.hidden_states(pixels.to(self.visual_projection.weight), (-1,))
        x = self.vision_model.post_layernorm(x[:, 0])  # the class token, (B, C)
        return F.normalize(self.visual_projection(x), dim=-1)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T), on any device -> unit vectors (B, projection)."""
        return F.normalize(self.text_projection(self.text_model(ids.to(self.text_projection.weight.device))), dim=-1)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, S, S), ids (M, T) -> logits (B, M): scaled cosine similarities."""
        return self.logit_scale.exp() * self.encode_image(pixels) @ self.encode_text(ids).T
