"""A JSON file as a sequence: record i of millions, read alone, from a file that would not fit into memory.

    records = JSONFile("vip-llava_stage2_mix.json")     # an array of objects, or JSON lines: an object a line
    len(records), records[7], records.where(7)          # "line 8", for a message about it

A file is read through once, and where each record begins and ends is kept in a hidden file beside it: 24 bytes a
record, mapped the next time, which starts at once. The index is made anew when the file's size or time has changed.

Pitfall: bytes are read as Latin-1 while we look for the ends of records, one character a byte, so that positions in
the text are positions in the file. JSON's own signs are ASCII, and what is decoded on the way is thrown away.
"""

import contextlib
import json
import os
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

WINDOW = 1 << 22  # bytes read at a time
LONGEST = 1 << 26  # bytes of a record; a longer one is taken for a damaged file
SPACE = " \t\r\n"


class JSONFile(Sequence):
    """The records of a JSON array or of JSON lines. ValueError: it is neither, or damaged; FileNotFoundError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}")
        self._table = self._load() if self._index.is_file() else None
        if self._table is None:
            self._table = self._build()
        self._opened = None, None, None  # by which process, the file, and what its threads take turns by

    @property
    def _index(self) -> Path:
        return self.path.with_name(f".{self.path.name}.index.npy")

    def _stamp(self) -> list[int]:
        stat = self.path.stat()
        return [stat.st_size, stat.st_mtime_ns, -1]

    def _load(self) -> np.ndarray | None:
        try:
            table = np.load(self._index, mmap_mode="r")
        except (ValueError, OSError, EOFError, zipfile.BadZipFile):  # damaged: as good as none
            return None
        good = table.ndim == 2 and table.shape[1] == 3 and table.dtype == np.int64 and len(table)
        return table if good and table[0].tolist() == self._stamp() else None

    def _build(self) -> np.ndarray:
        stamp = self._stamp()
        with open(self.path, "rb") as file:
            first = next((b for b in iter(lambda: file.read(1), b"") if b not in (b" ", b"\t", b"\r", b"\n")), b"")
            if first not in (b"[", b"{"):
                hint = ", in UTF-8 without a byte order mark" if first == b"\xef" else ""
                raise ValueError(f"{self.path} begins with {first!r}; expected a JSON array or JSON lines{hint}")
            if first == b"{" and not file.readline().strip():
                raise ValueError(f"{self.path} begins with an object over several lines; expected [ and ] around all objects")
            file.seek(0)
            places = np.fromiter(_array(file, self.path) if first == b"[" else _lines(file), dtype=(np.int64, 3))
        table = np.concatenate([np.array([stamp], dtype=np.int64), places.reshape(-1, 3)])
        beside = self._index.with_name(f"{self._index.name}.{os.getpid()}.part")
        try:
            with open(beside, "wb") as file:
                np.save(file, table)
            beside.replace(self._index)
        except OSError:  # a folder that can't be written, or is full: the next start reads the file through again
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            return table
        return np.load(self._index, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._table) - 1

    def line(self, i: int) -> int:
        """The number of the line on which record i begins, the first being 1."""
        return int(self._table[1 + range(len(self))[i], 2])

    def where(self, i: int) -> str:
        """The line, and which record it is, the first being 1, where others begin on the same line."""
        i = range(len(self))[i]
        near = [k for k in (i - 1, i + 1) if 0 <= k < len(self)]
        return f"line {self.line(i)}" + (f", record {i + 1}" if self.line(i) in map(self.line, near) else "")

    def __getitem__(self, i: int) -> dict:
        start, end, _ = self._table[1 + range(len(self))[i]].tolist()
        owner, file, turns = self._opened
        if owner != os.getpid():  # each process reads through a file of its own
            file, turns = open(self.path, "rb", buffering=0), threading.Lock()
            self._opened = os.getpid(), file, turns
        with turns:
            file.seek(start)
            text = file.read(end - start)
        try:
            record = json.loads(text)
        except RecursionError:
            raise ValueError(f"{self.where(i)} is nested too deeply; expected a record") from None
        except ValueError as error:
            form = "expected an array of objects, or one whole object a line"
            raise ValueError(f"{self.where(i)} is not valid JSON ({error}); {form}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{self.where(i)} holds a {type(record).__name__}; expected an object")
        return record

    def __reduce__(self):
        """For another process: the path, as it maps the same index; the table where there is no index."""
        kept = {} if isinstance(self._table, np.memmap) else {"_table": np.asarray(self._table)}
        return _again, (self.path, kept)


def _again(path: Path, kept: dict) -> JSONFile:
    file = JSONFile.__new__(JSONFile)
    file.path, file._opened = path, (None, None, None)
    file._table = kept["_table"] if kept else file._load()
    return file if file._table is not None else JSONFile(path)


def _lines(file) -> Iterator[tuple[int, int, int]]:
    """(start, end, line number) of every line that is not blank."""
    start = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield start, start + len(line), number
        start += len(line)


def _array(file, path: Path) -> Iterator[tuple[int, int, int]]:
    """(start, end, line number) of every element of the array that the file holds."""
    decoder = json.JSONDecoder(strict=False)
    text, base, at = "", 0, 0  # text[0] is byte `base` of the file
    counted, line = 0, 1  # text[counted] lies on line `line`
    due = "["  # what is due: "[", then "first" element or "]", then "," or "]", then an "element" … and the "end"
    while True:
        while at < len(text) and text[at] in SPACE:
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if at == len(text):
            text, base, at, counted = file.read(WINDOW).decode("latin-1"), base + at, 0, 0
            if text:
                continue
            if due == "end":
                return
            raise ValueError(f"{path} ends in its array, on line {line}; is the file whole?")
        sign = text[at]
        if due in ("first", "element") and sign == "{":
            while True:
                try:
                    _, end = decoder.raw_decode(text, at)
                    break
                except RecursionError:
                    raise ValueError(f"{path}, line {line}: a record nested too deeply") from None
                except ValueError as error:  # damaged, or cut by the window
                    reason = getattr(error, "msg", error)  # a number too long for Python has none
                    more = "" if len(text) - at > LONGEST else file.read(max(WINDOW, len(text) - at)).decode("latin-1")
                    if not more:
                        raise ValueError(f"{path}, line {line}: a damaged record ({reason})") from None
                    text, base, at, counted = text[at:] + more, base + at, 0, 0
            yield base + at, base + end, line
            at, due = end, ","
        elif sign == "]" and due in ("first", ","):
            at, due = at + 1, "end"
        elif sign == due:
            at, due = at + 1, {"[": "first", ",": "element"}[sign]
        else:
            wanted = {"[": "[", "first": "an object or ]", "element": "an object", ",": "a comma or ]", "end": "the file's end"}
            raise ValueError(f"{path}, line {line}: {sign!r}; expected {wanted[due]} of a JSON array of objects")
