"""What a training run says: a line now and then, its log, and a picture of the loss.

    step 100  loss 1.019  lr 0.000159  norm 4.01  samples/s 61.9  tokens/s 1.49e+04  min left 85.3

The same as JSON is in RUN/log.jsonl, where a run that is taken up again goes on from the state that it starts with.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from commandline import save_image
from data.batches import Micro
from parallel import Place
from recipe import Habits, Recipe, schedule


class Journal:
    """A line now and then, the same as JSON in log.jsonl, and each process's bad records in bad-0.txt, bad-1.txt, …"""

    def __init__(self, out: Path, first: int, habits: Habits, place: Place, flops: float):
        self.out, self.habits, self.place, self.flops = out, habits, place, flops
        self.speaks = place.rank == 0  # of several processes one
        self.began, self.samples, self.tokens, self.skipped, self.told = time.perf_counter(), 0, 0, 0, first
        if self.speaks and (out / "log.jsonl").is_file():  # steps after the state that is taken up will be told again
            lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
            lines = [line for line in lines if line.endswith(b"\n")]  # the last may be half a one
            try:
                kept = [line for line in lines if json.loads(line)["step"] <= first and first]
            except (ValueError, LookupError, TypeError):
                raise ValueError(f"{out / 'log.jsonl'} is no log of a run; expected lines of JSON: take it away") from None
            if lines and not first and any(out.glob("*.safetensors")):
                raise ValueError(f"{out} holds what a run has made, and no state to go on from; expected another --out")
            (out / "log.jsonl.part").write_bytes(b"".join(kept))
            os.replace(out / "log.jsonl.part", out / "log.jsonl")
            self.skipped = max((json.loads(line).get("bad", 0) for line in kept), default=0)
        self.list = out / f"bad-{place.rank}.txt"
        if not first:
            self.list.unlink(missing_ok=True)
        self.listed = set(self.list.read_text(encoding="utf-8").splitlines()) if self.list.is_file() else set()

    def bad(self, records: list) -> None:
        """Count them; list each that is not listed yet."""
        self.skipped += len(records)
        said = (str(record).encode("utf-8", "backslashreplace").decode() for record in records)  # an id may be half an emoji
        new = {one: None for one in said if one not in self.listed}
        if new:
            with open(self.list, "a", encoding="utf-8") as file:
                file.writelines(f"{one}\n" for one in new)
            self.listed |= new.keys()

    def step(self, done: int, recipe: Recipe, micros: list[Micro], loss: float, norm: float) -> None:
        self.samples += sum(len(micro.names) for micro in micros)
        self.tokens += sum(micro.ids.numel() for micro in micros)
        if done % self.habits.log_every == 0 or done == recipe.steps:
            self.tell(done, recipe, loss, norm)

    def tell(self, done: int, recipe: Recipe, loss: float, norm: float) -> None:
        """The line of a step, once: where one is due, with each state, and where the run stops."""
        if done == self.told:
            return
        self.told = done
        samples, tokens, skipped = (self.place.sum(x) for x in (self.samples, self.tokens, self.skipped))
        seconds = time.perf_counter() - self.began
        said = {"step": done, "loss": loss, "lr": recipe.lr * schedule(done - 1, recipe), "norm": norm,
                "samples/s": samples / seconds, "tokens/s": tokens / seconds}
        if self.habits.peak_tflops:
            said["MFU"] = self.flops * tokens / seconds / (1e12 * self.habits.peak_tflops * self.place.world)
        if skipped:
            said["bad"] = int(skipped)
        if samples:
            said["min left"] = (recipe.steps - done) * recipe.batch * seconds / samples / 60
        self.report(**said)
        self.began, self.samples, self.tokens = time.perf_counter(), 0, 0

    def report(self, **said) -> None:
        said = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in said.items()}
        if self.speaks:
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in said.items()), flush=True)
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(said) + "\n")

    def measure(self, done: int, accuracy: Callable) -> None:
        """Report accuracy(); the time that it takes is not counted as training."""
        began = time.perf_counter()
        self.report(step=done, accuracy=accuracy())
        self.began += time.perf_counter() - began


def plot(out: Path, width: int = 640, height: int = 360) -> None:
    """loss.png: the loss of every line of the log over the steps, the scale logarithmic."""
    points = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    points = [(p["step"], p["loss"]) for p in points if (p.get("loss") or 0) > 0]
    if len(points) < 2:
        print(f"no loss.png: the log has {len(points)} losses; expected two or more, see --log-every", flush=True)
        return
    last, low, high = points[-1][0], min(v for _, v in points), max(v for _, v in points)
    scale = math.log(high / low) or 1.0
    image = Image.new("RGB", (width, height), "white")
    pen, (x0, y0, x1, y1) = ImageDraw.Draw(image), (60, 10, width - 10, height - 30)
    pen.rectangle((x0, y0, x1, y1), outline="black")
    pen.line([(x0 + (x1 - x0) * step / last, y1 - (y1 - y0) * math.log(v / low) / scale) for step, v in points], fill="blue")
    for text, place in ((f"{high:.3g}", (8, y0)), (f"{low:.3g}", (8, y1 - 12)), (f"step {last}", (x1 - 70, y1 + 8))):
        pen.text(place, text, fill="black")
    save_image(image, out / "loss.png")
