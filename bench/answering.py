"""Those that answer in a race, on the same random weights: ours, transformers' and gpt-fast's.

Each is made in a process of its own by (args, folder, precision), args being those of bench.speed, and times itself:

    answer() -> seconds to the first token (None: not told), seconds a token after it, tokens
    look()   -> seconds for --images pictures
    load()   -> seconds until there is a model, and until its weights have been read
    turn()   -> ours alone: seconds to the first token of a second question, with the first turn's memory and without
    read()   -> ours alone: bytes that a token has to read
"""

import argparse
import gc
import importlib.util
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
from bench.training import config_of
from chat import IMAGE
from generate import Memory, compile_steps, generate
from vipllava import expand

NEXT = 20  # tokens of a chat's second question
ANSWER = 16  # of its first answer


def request(args: argparse.Namespace) -> tuple[list[int], torch.Tensor]:
    """Ids with one IMAGE, and pixels."""
    generator, config = torch.Generator().manual_seed(1), config_of(args)
    words = torch.randint(3, config.image_token_id, (args.words,), generator=generator).tolist()
    S = config.vision.image_size
    return [1, IMAGE, *words[1:]], torch.randn(1, 3, S, S, generator=generator)


def pictures(args: argparse.Namespace) -> torch.Tensor:
    """(--images, 3, S, S)"""
    S = config_of(args).vision.image_size
    return torch.randn(args.images, 3, S, S, generator=torch.Generator().manual_seed(2))


def finished(device: torch.device) -> float:
    """The time, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def touch(model: torch.nn.Module) -> float:
    """Read a number of every page; weights that a kernel has laid out anew have all been read."""
    plain = [x.detach().flatten() for x in model.state_dict().values() if x.layout == torch.strided]
    return sum(x[:: 4096 // x.element_size()].float().sum().item() for x in plain)


class Ours:
    def __init__(self, args: argparse.Namespace, folder: str, precision: str):
        self.quantize = precision if precision.startswith("int") else ""
        self.dtype = torch.bfloat16 if self.quantize else getattr(torch, precision)
        self.args, self.folder, self.memory, self.many = args, folder, Memory(), None
        self.ids, self.pixels = request(args)
        self._load()
        if args.compile:
            compile_steps(self.model)

    def _load(self) -> None:
        self.model, _ = checkpoint.load(self.folder, self.args.device, self.dtype, quantize=self.quantize)

    def load(self) -> tuple[float, float]:
        """Seconds until there is a model, and until its weights have been read."""
        self.model = self.many = None
        torch.compiler.reset()  # which keeps weights, too
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        began = time.perf_counter()
        self._load()
        returned = finished(self.args.device) - began
        touch(self.model)
        return returned, time.perf_counter() - began

    def read(self) -> int:
        """Bytes that a token has to read: the decoder's weights, and keys and values in the middle of the answer, of as
        many bits as the model has otherwise (on a CPU they are kept in 32, see generate.kept_in)."""
        state = self.model.llama.state_dict()
        text, length = self.model.config.text, len(expand(self.ids, self.model.config.vision.patches))
        size = self.model.llama.embed_tokens.weight.itemsize
        kept = 2 * text.layers * text.kv_heads * text.head_width * size * (length + self.args.tokens // 2)
        return kept + sum(x.nbytes for name, x in state.items() if not name.startswith("embed_tokens"))

    def answer(self) -> tuple[float, float, list[int]]:
        """Seconds to the first token, seconds a token after it, tokens."""
        self.memory.forget()
        times, tokens = [time.perf_counter()], []
        for (token,) in generate(self.model, [self.ids], self.pixels, max_new_tokens=self.args.tokens, memory=self.memory):
            times.append(time.perf_counter())
            tokens.append(token)
        return times[1] - times[0], (times[-1] - times[1]) / max(1, len(tokens) - 1), tokens

    @torch.no_grad()
    def look(self) -> float:
        """Seconds for --images pictures, which are on the device already."""
        if self.many is None:
            self.many = pictures(self.args).to(self.args.device, self.dtype)
        began = finished(self.args.device)
        self._patches(self.many)
        return finished(self.args.device) - began

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_images(pixels)

    def turn(self) -> tuple[float, float]:
        """Seconds to the first token of a second question: with the first turn's memory, and without."""
        self.memory.forget()
        said = [t for (t,) in generate(self.model, [self.ids], self.pixels, max_new_tokens=ANSWER, memory=self.memory)]
        chat, seconds = [*self.ids, *said, *range(5, 5 + NEXT)], []
        for _ in ("with it", "without"):
            began = time.perf_counter()
            next(generate(self.model, [chat], self.pixels, max_new_tokens=1, memory=self.memory))
            seconds.append(time.perf_counter() - began)
            self.memory.forget()
        return tuple(seconds)


class Transformers:
    """generate of VipLlavaForConditionalGeneration, on a GPU with its static cache, which it compiles by itself."""

    def __init__(self, args: argparse.Namespace, folder: str, precision: str):
        self.args, self.folder, self.dtype, self.many = args, folder, getattr(torch, precision), None
        ids, self.pixels = request(args)
        config = config_of(args)
        row = [config.image_token_id if i == IMAGE else i for i in expand(ids, config.vision.patches)]
        self.ids = torch.tensor([row], device=args.device)
        self.pixels = self.pixels.to(args.device, self.dtype)
        self._load()
        self.model.generation_config.cache_implementation = "static" if args.device.type == "cuda" else None

    def _load(self) -> None:
        from transformers import VipLlavaForConditionalGeneration, logging

        logging.disable_progress_bar()
        self.model = VipLlavaForConditionalGeneration.from_pretrained(self.folder, dtype=self.dtype).eval().to(self.args.device)

    load, look = Ours.load, Ours.look

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixels).pooler_output

    def answer(self) -> tuple[float, float, list[int]]:
        from transformers import StoppingCriteria

        times = [time.perf_counter()]

        class Clock(StoppingCriteria):
            def __call__(self, ids, scores, **_):
                ids[0, -1].item()  # has come from the device
                times.append(time.perf_counter())
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        n = self.args.tokens
        out = self.model.generate(input_ids=self.ids, pixel_values=self.pixels, attention_mask=torch.ones_like(self.ids),
                                  max_new_tokens=n, min_new_tokens=n, do_sample=False, stopping_criteria=[Clock()])
        return times[1] - times[0], (times[-1] - times[1]) / max(1, n - 1), out[0, self.ids.size(1) :].tolist()


class GPTFast:
    """The Transformer of a clone's model.py, its decoding step compiled as its generate.py does."""

    def __init__(self, args: argparse.Namespace, folder: str, precision: str):
        spec = importlib.util.spec_from_file_location("gpt_fast", args.gpt_fast / "model.py")
        theirs = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = theirs
        spec.loader.exec_module(theirs)
        text, config = config_of(args).text, config_of(args)
        self.args, self.length = args, config.vision.patches + args.words
        sizes = theirs.ModelArgs(block_size=self.length + args.tokens, vocab_size=text.vocab_size, n_layer=text.layers,
                                 n_head=text.heads, n_local_heads=text.kv_heads, dim=text.width,
                                 intermediate_size=text.mlp, norm_eps=text.eps)
        torch.set_default_dtype(getattr(torch, precision))
        with torch.device(args.device), torch.no_grad():
            self.model = theirs.Transformer(sizes).eval()
            self.model.setup_caches(1, self.length + args.tokens)
        self.step = lambda ids, place: self.model(ids, place)[:, -1].argmax(-1, keepdim=True).int()
        torch._inductor.config.coordinate_descent_tuning = args.device.type == "cuda"
        self.decode = torch.compile(self.step, mode="reduce-overhead", fullgraph=True) if args.compile else self.step

    @torch.no_grad()
    def answer(self) -> tuple[None, float, list[int]]:
        device, n = self.args.device, self.args.tokens
        token = self.step(torch.ones(1, self.length, dtype=torch.int, device=device), torch.arange(self.length, device=device))
        token.item()
        began, said = time.perf_counter(), [token]
        place = torch.tensor([self.length], device=device)
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(n - 1):
                said.append(self.decode(said[-1], place).clone())
                place += 1
        said = torch.cat(said).flatten().tolist()
        return None, (time.perf_counter() - began) / (n - 1), said


def check_gpt_fast(path: Path) -> None:
    """ValueError: it is not the model.py that is known here."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; expected a clone of gpt-fast")
    if "def forward(self, idx: Tensor, input_pos" not in path.read_text(encoding="utf-8"):
        raise ValueError(f"{path} has another Transformer.forward; expected that of gpt-fast's commit 32971d3")


KINDS = {"ours": Ours, "transformers": Transformers, "gpt-fast": GPTFast}
