"""States of a run: all that makes a stopped run go on as if it had not been stopped.

    out/states/step-00000250/    the trained weights and the optimizers' moments, by torch.distributed.checkpoint:
                             each process writes its share, and any number of processes reads them again
    out/states/step-00000250/about.json    step, recipe and base

A state is written beside and renamed, so it is whole or not there; the last `keep` stay. Frozen weights are not in it,
they come from the base; nor are samples, as each is a function of (seed, number) alone. Where the newest state can't
be read (a disk that was full, a file cut short), the one before is taken, and that is said.
"""

import contextlib
import json
import logging
import os
import pickle
import shutil
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)  # what can't be read is said here
OPTIONS = StateDictOptions(ignore_frozen_params=True)
UNREADABLE = (dcp.CheckpointException, RuntimeError, OSError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError,
              zipfile.BadZipFile)
PATIENCE = 10  # seconds: so long the workers of a process that was killed may outlive it


def _is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """The folder is this process's while it trains. ValueError: it is another's, which would lose states."""
    out.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":  # Windows has no such locks
        yield
        return
    from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock

    folder = os.open(out, os.O_RDONLY)
    try:
        for seconds in range(PATIENCE, -1, -1):
            try:
                flock(folder, LOCK_EX | LOCK_NB)
                break
            except BlockingIOError:
                if not seconds:
                    raise ValueError(f"another process trains in {out}; expected to wait for its end, or another --out") from None
                time.sleep(1)
            except OSError:  # a network's file system has none, either
                break
        yield
    finally:
        with contextlib.suppress(OSError):
            flock(folder, LOCK_UN)  # for its workers, too, which have it as well
        os.close(folder)


def save(out: Path, model, optimizers, step: int, about: dict, keep: int) -> None:
    """Write the state after `step` steps, and remove all but the last `keep`."""
    folder = out / "states" / f"step-{step:08}"
    beside = folder.with_name(f".{folder.name}.part")
    if _is_first_process():
        for half in folder.parent.glob(".step-*.part"):  # whose save was cut
            shutil.rmtree(half, ignore_errors=True)
        beside.mkdir(parents=True)
    _wait()
    weights, moments = get_state_dict(model, optimizers, options=OPTIONS)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=beside)
    except (RuntimeError, dcp.CheckpointException) as error:  # PyTorch's, of a disk that is full
        reasons = [reason for reason, *_ in getattr(error, "failures", {}).values()] or [error]
        if _is_first_process():
            shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"{beside} can't be written ({(str(reasons[0]) or 'why, is not said').splitlines()[0]}); is the disk full?") from None
    if _is_first_process():
        (beside / "about.json").write_text(json.dumps({"step": step, **about}, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
        folders = _newest_first(out)
        at = folders.index(folder)
        for old in (*folders[:at], *folders[at + keep :]):  # what is newer could not be read when the run went on
            shutil.rmtree(old)
    _wait()


def load(out: Path, model, optimizers, about: dict) -> int:
    """Take up the newest whole state in `out`: the number of steps done, 0 where there is none.

    ValueError: it is of another run (recipe or base differ), or there are states and none can be read.
    """
    folders = _newest_first(out)
    for folder in folders:
        try:
            found = json.loads((folder / "about.json").read_text())
            _same_run(out, found, about)
            weights, moments = get_state_dict(model, optimizers, options=OPTIONS)
            state = {"model": weights, "optimizer": moments}
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                           options=StateDictOptions(ignore_frozen_params=True, strict=False))
        except AnotherRun:
            raise
        except UNREADABLE as error:
            if _is_first_process():
                print(f"{folder} can't be read ({type(error).__name__}); the state before it is taken", flush=True)
            continue
        if _is_first_process():
            print(f"resumed {folder}", flush=True)
        return found["step"]
    if folders:
        raise ValueError(f"none of {len(folders)} states in {out / 'states'} can be read; expected one, or another --out")
    return 0


class AnotherRun(ValueError):
    """A folder holds states of a run with another recipe or another base."""


def _same_run(out: Path, found: dict, about: dict) -> None:
    then, now = {"base": found["base"], **found["recipe"]}, {"base": about["base"], **about["recipe"]}
    same = then.keys() & now.keys()  # a field that is new had its default then
    if changed := [f"{key} {then[key]}, now {now[key]}" for key in now if key in same and then[key] != now[key]]:
        expected = "expected the same flags, or another --out"
        raise AnotherRun(f"{out} holds a run with another recipe ({'; '.join(changed)}); {expected}")


def _newest_first(out: Path) -> list[Path]:
    return sorted((out / "states").glob("step-*"), reverse=True)
