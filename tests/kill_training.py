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
import shutil
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
    if not Path("/proc/self/cmdline").is_file():
        parser.error("processes are found in Linux's /proc, which is not here")
    draw, killed, runs = random.Random(args.seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        never, often = Path(folder) / "never", Path(folder) / "often"
        began, process = time.perf_counter(), start(never, args)
        while not (never / "log.jsonl").exists():
            time.sleep(0.05)
        until_first = time.perf_counter() - began
        assert process.wait() == 0
        stepping = time.perf_counter() - began - until_first
        while len(killed) < args.n:  # one run after the other, each killed several times
            process = start(often, args)
            moment = time.perf_counter() + draw.uniform(0.5 * until_first, until_first + 0.4 * stepping)
            while process.poll() is None and time.perf_counter() < moment:
                time.sleep(0.01)
            if process.poll() is None:  # while it imports, loads, steps or saves
                kill(often)
                process.wait()
                states = sorted((often / "states").glob("step-*")) if (often / "states").is_dir() else []
                killed.append(int(states[-1].name.removeprefix("step-")) if states else 0)
                if len(killed) < args.n:
                    continue
                assert start(often, args).wait() == 0
            runs += 1
            if losses(often) != losses(never) or len(losses(never)) != args.steps:
                print(f"OTHER LOSSES after kills at saved steps {killed}")
                return 1
            shutil.rmtree(often)
    print(f"{len(killed)} kills of {runs} runs of {args.steps} steps, at saved steps {killed}: the same losses, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
