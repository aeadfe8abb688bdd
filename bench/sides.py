"""Both sides of a comparison, each in a process of its own: its memory can be told, and they take turns."""

import contextlib
import multiprocessing
import sys
from collections.abc import Callable

try:
    import resource
except ImportError:  # on Windows
    resource = None

import torch

from commandline import out_of_memory

CONTEXT = multiprocessing.get_context("spawn")


def serve(make: Callable, arguments: tuple, pipe) -> None:
    """What `make` returns does what is asked for: (method, arguments) -> result; None ends it, with its peak memory."""
    try:
        work = make(*arguments)
        pipe.send("ready")
        while request := pipe.recv():
            method, given = request
            pipe.send(getattr(work, method)(*given))
    except Exception as error:
        if out_of_memory(error):
            error = MemoryError(str(error))
        told = isinstance(error, (ValueError, OSError, MemoryError))  # in one line
        return pipe.send(error if told else RuntimeError(f"{type(error).__name__}: {error}"))
    on_gpu = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    pipe.send(on_gpu or peak_memory())


def peak_memory() -> int:
    """The most bytes that this process ever had in memory. What getrusage tells, on Linux, begins with the most of the process
    that started it."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return largest()


def largest(children: bool = False) -> int:
    """What getrusage tells of this process, or of the largest that it has waited for, in bytes; 0: there is none here."""
    if resource is None:
        return 0
    told = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss
    return told * (1 if sys.platform == "darwin" else 1024)


class Side:
    """make(*arguments) in its process. Side.method(…) there is side("method", …) here."""

    def __init__(self, name: str, make: Callable, *arguments):
        self.name, self.peak, self._ready = name, 0, False
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = CONTEXT.Process(target=serve, args=(make, arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def start(self) -> None:
        """Wait until it is made; the first call does so, too. Several are made at the same time."""
        if not self._ready:
            self._ready = bool(self._receive())

    def _receive(self):
        try:
            found = self._pipe.recv()
        except EOFError:
            raise MemoryError(f"{self.name} ended early; too little memory? expected room for it") from None
        if isinstance(found, RuntimeError):
            raise RuntimeError(f"{self.name}: {found}")
        if isinstance(found, Exception):
            raise found
        return found

    def __call__(self, method: str, *arguments):
        self.start()
        self._pipe.send((method, arguments))
        return self._receive()

    def stop(self) -> None:
        """End it; `peak` is the largest memory that it took, in bytes: of a GPU, where it used one."""
        self._pipe.send(None)
        self.peak = self._receive()
        self._process.join()


def alone(function: Callable, *arguments) -> None:
    """function(*arguments) in a process that is gone, with its memory, afterwards."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise MemoryError(f"{function.__name__} ended with status {process.exitcode}; too little memory or disk?")
