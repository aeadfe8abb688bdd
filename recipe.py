"""What a training run is: a recipe decides all that it computes, habits how often and how loudly it says so.

    recipes/stage2.toml     ->  Recipe(train="language", batch=128, lr=2e-5, …)     read_recipe("stage2")
    train.py stage2 --lr 1e-5                                                       every field is a flag

The paper's three stages and LoRA are files of a few lines in recipes/; so are the stages of the small model.
"""

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import lora
from chat import TEMPLATES

TRAINED = {  # what may be trained: the beginnings of the parameters' names
    "all": ("",),
    "language": ("projector.", "llama."),
    "projector": ("projector.",),
    "lora": ("projector.",),  # and what lora.py adds
    "contrast": ("",),  # both towers of a CLIP, see contrast.py
}
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Recipe:
    """All that decides what a run computes; every field is a flag of the command line."""

    data: str = ""  # files of records, a,b.json; or scenes and their shares, such as markers=3,captions=1
    train: str = "all"  # one of TRAINED
    epochs: float = 1.0  # over the records; what the last step lacks then is taken from one more
    steps: int = 0  # 0: as many as the epochs have
    batch: int = 32  # samples a step, over all processes; on a plateau more steps help more than larger ones
    lr: float = 1e-3  # the peak: linear warm-up, then a cosine to zero
    projector_lr: float = 0.0  # 0: lr
    warmup: float = 0.03  # of the steps
    optimizer: str = "adamw"  # or "muon", for matrices between hidden states (muon.py), and AdamW for the rest
    weight_decay: float = 0.0
    beta2: float = 0.98  # of AdamW: how long it remembers the size of gradients
    grad_clip: float = 1.0  # largest norm of the gradient
    template: str = ""  # of the prompts, then the model's; "": as it is, "plain": answers alone, without questions
    length: int = 2048  # tokens of a sample, its image included; more is a bad record
    rank: int = 128  # of LoRA
    alpha: float = 256.0
    targets: str = ",".join(lora.TARGETS)
    side: int = 224  # of a scene, in pixels
    seed: int = 0

    def __post_init__(self):
        for name, choices in (("train", TRAINED), ("template", ("", *TEMPLATES)), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(filter(None, choices))}")
        lows = {"steps": 0, "batch": 1, "side": 32, "seed": 0, "weight_decay": 0, "projector_lr": 0, "length": 1, "rank": 1}
        for name, low in lows.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {low} or more")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}; expected less than 2^63")
        for name in ("lr", "grad_clip", "epochs", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}; expected a part of the steps, 0 to 1")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 is {self.beta2}; expected 0 or more, and less than 1")


RECIPES = {path.stem: path for path in sorted((Path(__file__).resolve().parent / "recipes").glob("*.toml"))}


def read_recipe(name: str) -> Recipe:
    """One of RECIPES, or a .toml file with some of Recipe's fields. ValueError: there is none, or a field is wrong."""
    path = RECIPES.get(name, Path(name))
    if path.suffix != ".toml" or not path.is_file():
        raise ValueError(f"no recipe {name}; expected one of {', '.join(RECIPES)}, or a .toml file")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} can't be read as TOML: {error}") from None
    if given.get("steps") and "epochs" in given:
        raise ValueError(f"{path}: steps {given['steps']} and epochs {given['epochs']} came; expected one of them")
    types = {field.name: field.type for field in dataclasses.fields(Recipe)}
    for key, value in given.items():
        kind = types.get(key)
        if kind is None:
            raise ValueError(f"{path}: there is no field {key!r}; expected some of {', '.join(types)}")
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{path}: {key} is {value!r}; expected {KIND_NAMES[kind]}")
    return Recipe(**given)


KIND_NAMES = {str: "a text", int: "a whole number", float: "a number"}


def schedule(step: int, recipe: Recipe) -> float:
    """The learning rate in parts of its peak: transformers' cosine with warm-up, but for the warm-up's length, which is
    rounded to the nearest step, not up, and its being a step ahead: it begins above 0, and the peak comes twice."""
    warm = max(recipe.warmup > 0, round(recipe.warmup * recipe.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))


@dataclass(frozen=True)
class Habits:
    """How often, how fast and how loud; nothing of it changes what is learned."""

    log_every: int = 50  # steps between two lines
    eval_every: int = 500  # steps between two measurements
    save_every: int = 250  # steps between two states
    keep: int = 2  # states that stay
    workers: int = 0  # processes that make samples, besides the one that trains
    micro: int = 0  # samples of a forward pass at most; 0: a process's share of the batch
    skip_bad: bool = False  # count and list bad records instead of stopping
    plot: bool = False  # draw loss.png at the end
    peak_tflops: float = 0.0  # of a device, to report MFU against
