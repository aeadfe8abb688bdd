"""What all commands do alike."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import commandline
import parallel
from commandline import Parser, amount, check_device, check_ours, out_of_memory, run, with_bar
from parallel import find_place

ROOT = Path(commandline.__file__).parent


@pytest.mark.parametrize(
    "error",
    [ValueError("two\nlines"), FileNotFoundError("gone"), MemoryError("full"), torch.OutOfMemoryError("full")],
)
def test_a_mistake_is_one_line_and_status_2(error, capsys):
    """Guards against a traceback for a mistake of a person, or of a machine that is too small."""

    def main(argv):
        raise error

    assert run(main, []) == 2
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


def test_a_cpu_without_memory_is_one_line(capsys):
    """Guards against a traceback where PyTorch has no exception of its own for what lacks."""
    assert run(lambda argv: torch.empty(10**14), []) == 2
    assert "can't allocate memory" in capsys.readouterr().err


@pytest.mark.parametrize("words, full", [
    ("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried", True),
    ("DefaultCPUAllocator: not enough memory: you tried to allocate 14 bytes.", True),
    ("MPS backend out of memory (MPS allocated: 9 GB)", True), ("Invalid buffer size: 14.00 GiB", True), ("a bug", False),
])
def test_memory_that_is_full_by_its_words(words, full):
    """Guards against a traceback on Windows and on Apple's GPUs."""
    assert out_of_memory(RuntimeError(words)) == full


def test_a_number_of_a_flag():
    assert amount("0") == 0 and amount("1e3") == 1000
    for text in ("-1", "nan", "inf", "two"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' came; expected a number of 0 or more"):
            amount(text)


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError])
def test_a_bug_is_no_mistake(error):
    """Guards against errors of ours that are told to a person as theirs."""

    def main(argv):
        raise error

    with pytest.raises(error):
        run(main, [])


def test_ctrl_c_and_success():
    """Guards against status 1 or a traceback after Ctrl-C, and a status other than 0 for a result."""

    def interrupted(argv):
        raise KeyboardInterrupt

    assert run(interrupted, []) == 130 and run(lambda argv: argv, []) == 0


def test_flags_that_are_wrong_are_one_line(capsys):
    """Guards against argparse's usage page."""
    assert run(lambda argv: Parser().parse_args(argv), ["--nosuch"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --nosuch\n"


def test_nobody_reads_on():
    """Guards against an error for `… | head -1`, and against Python's own complaint at its end."""
    code = "import sys; from commandline import run; sys.exit(run(lambda argv: print('a line\\n' * 10**5)))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141


def test_bytes_that_are_no_characters():
    """Guards against a question, or a file's name, that is another one than was typed, and a way of its own for each."""
    code = "import os, sys; from commandline import run; sys.exit(run(lambda argv: print(os.fsencode(input()))))"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=ROOT, input=b"n\xff.png\n", capture_output=True, timeout=60)
    assert (process.returncode, process.stdout.strip()) == (0, b"b'n\\xff.png'"), process


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_what_is_no_plain_file_is_not_written_over(tmp_path):
    """Guards against a pipe that is opened, which waits for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="no plain file"):
        check_ours(tmp_path / "pipe.png")


@pytest.mark.parametrize("closed, body, status", [
    pytest.param("2>/dev/full", "open('nosuch')", 2, marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")),
    ("<&-", "print(sys.stdin.read())", 0), (">&-", "print(1)", 0), ("2>&-", "open('nosuch')", 2),
    ("<&- >&- 2>&-", "print(sys.stdin.read())", 0),
])
def test_a_stream_that_is_closed_is_empty(closed, body, status):
    """Guards against a traceback where there is no stream, and an error's line on stdout, among the answers."""
    code = f"import sys; from commandline import run; sys.exit(run(lambda argv: {body}))"
    command = ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code]
    process = subprocess.run(command, cwd=ROOT, text=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert process.returncode == status and process.stdout.strip() == "" and process.stderr == ""


@pytest.mark.parametrize("name", ["cuda:99", "meta", "abacus", "cpu:3", ""])
def test_a_device_that_is_not_here_is_refused(name):
    """Guards against a device that is taken for another, or that is only missed when the weights have been read."""
    with pytest.raises(ValueError, match=f"no device {name!r} here; expected cpu"):
        check_device(name)
    assert check_device("cpu") == check_device(None) == torch.device("cpu")


def test_a_gpu_that_cannot_be_used_says_why(monkeypatch):
    """Guards against "no device None": a busy GPU is there, and taken where no device is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("it is busy\nat 0x1")))
    with pytest.raises(ValueError, match=r"no device 'cuda' here \(it is busy\); expected cpu or cuda"):
        check_device(None)
    with pytest.raises(ValueError, match=r"no device 'cuda' here \(it is busy\); expected cpu or cuda"):
        check_device("cuda")


def test_processes_cannot_add_up_on_apples_gpu(monkeypatch):
    """Guards against a traceback: torch.distributed knows CPUs and CUDA."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "check_device", lambda name: torch.device("mps"))
    with pytest.raises(ValueError, match="--device is mps for 2 processes; expected cpu or cuda"):
        find_place("mps")


def test_processes_take_gpus_of_their_own(monkeypatch):
    """Guards against a GPU that is named, and silently another; and a traceback where there are too few."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="--device is cuda:0 for 2 processes; expected cuda"):
        find_place("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="no device 'cuda:1' here"):
        find_place(None)


def test_a_bar_is_for_people(monkeypatch, capsys):
    """Guards against a bar in a log file, and one that loses an item."""
    assert list(with_bar(iter("abc"), "letters", 3)) == list("abc") and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(with_bar(iter("abc"), "letters", 3)) == list("abc") and "letters" in capsys.readouterr().err
