"""Kill a run with SIGKILL at random moments: does it end with the losses of one that was never killed? Bit for bit.

    python tests/kill_training.py -n 20                    the small model
    python tests/kill_training.py -n 20 --lora             an adapter on it
    python tests/kill_training.py -n 20 --processes 2      two processes that exchange gradients

Not run by pytest (tests/test_train.py kills twice). Prints one line, and exits with 1 where a loss differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(out: Path, args) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    recipe = ["lora", "--rank", "4", "--alpha", "8"] if args.lora else ["tiny-markers"]
    flags = ["--model", "tiny", "--data", "markers", "--steps", str(args.steps), "--batch", "4", "--save-every", "3"]
    flags += ["--log-every", "1", "--eval-every", "100000", "--device", "cpu", "--out", str(out)]
    return [sys.executable, *(several if args.processes > 1 else []), "train.py", *recipe, *flags]


def start(out: Path, args) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(out, args), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(out: Path) -> None:
    """SIGKILL to every process whose command line names this folder: torchrun's children are in groups of their own."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() and str(out).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:  # it ended by itself
            pass


def losses(out: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["norm"]) for line in lines if "loss" in line}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-n", type=int, default=20, help="kills (20)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, killed = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        never, often = Path(folder) / "never", Path(folder) / "often"
        began = time.perf_counter()
        assert start(never, args).wait() == 0
        whole = time.perf_counter() - began
        while len(killed) < args.n:
            process = start(often, args)
            time.sleep(draw.uniform(0.3, 1.0) * min(whole, 12))  # while it imports, loads, steps or saves
            if process.poll() is not None:
                break
            kill(often)
            process.wait()
            states = sorted((often / "states").glob("step-*")) if (often / "states").is_dir() else []
            killed.append(states[-1].name.removeprefix("step-").lstrip("0") if states else "0")
        assert start(often, args).wait() == 0
        same = losses(often) == losses(never) and len(losses(never)) == args.steps
        print(f"{len(killed)} kills, after saved steps {', '.join(killed)}: {'the same losses' if same else 'OTHER LOSSES'}")
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
