"""JSON files as sequences."""

import json
import multiprocessing
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data import index
from data.index import JSONFile


def records(n=400):
    r = random.Random(0)
    odd = ['ü{["', "a\\", "\u2028é中", "}{],\n", "🐱"]
    return [{"id": f"x-{i}", "t": r.choice(odd) * r.randint(0, 9), "n": [1, {"a": []}]} for i in range(n)]


@pytest.mark.parametrize("window", [7, 64, 1 << 22])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii", [True, False])
def test_an_array_as_a_sequence(tmp_path, monkeypatch, window, indent, ascii):
    """Guards against a record cut at a window's end, a bracket in a text, a character of several bytes, and a line
    number that drifts: with windows of 7 bytes every record is cut many times."""
    monkeypatch.setattr(index, "WINDOW", window)
    path, wanted = tmp_path / "a.json", records()
    path.write_text("\n " + json.dumps(wanted, indent=indent, ensure_ascii=ascii) + "\n", encoding="utf-8")
    file = JSONFile(path)
    assert len(file) == 400 and list(file) == wanted and file[-1] == wanted[-1]
    text = path.read_bytes()
    for i in (0, 1, 77, 399):
        start = text.rindex(b"{", 0, text.index(f'"x-{i}"'.encode()))
        assert file.line(i) == text.count(b"\n", 0, start) + 1


def test_json_lines(tmp_path):
    """Guards against blank lines counted as records, and against a damaged line that takes the others with it."""
    path, wanted = tmp_path / "a.jsonl", records(3)
    lines = [json.dumps(wanted[0]), "", '{"half": ', json.dumps(wanted[1]), "[1]", json.dumps(wanted[2]), '{"x": ' + "[" * 100_000]
    path.write_text("\n".join(lines))
    file = JSONFile(path)
    assert [file[i] for i in (0, 2, 4)] == wanted and [file.line(i) for i in range(6)] == [1, 3, 4, 5, 6, 7]
    for i, words in ((1, "line 3 is not valid JSON"), (3, "line 5 holds a list; expected an object"),
                     (5, "line 7 is nested too deeply; expected")):
        with pytest.raises(ValueError, match=words):
            file[i]
    with pytest.raises(IndexError):
        file[6]


def test_where_a_record_stands(tmp_path):
    """Guards against a message that names line 1 for every record of a file that has one line."""
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2},\n{"a": 3},\n\n{"a": 4}, {"a": 5}]')
    where = list(map(JSONFile(path).where, range(5)))
    assert where == ["line 1, record 1", "line 1, record 2", "line 2", "line 4, record 4", "line 4, record 5"]


@pytest.mark.parametrize("text, words", [
    ('[{"a": 1},', "ends in its array, on line 1"), ('[{"a": 1}\n{"b": 1}]', "line 2: '{'; expected a comma or ]"), ("[1]", "line 1: '1'"),
    ('[{"a": 1}] x', "'x'"), ('[\n\n{"a"]', "line 3: a damaged record"), ("[,]", "','"),
    ('[{"x": ' + "[" * 100_000, "line 1: a record nested too deeply"), ("", "begins with b''"),
    ("text", "begins with b't'"), ("\ufeff[]", "without a byte order mark"), ('[{"a": 1},]', "']'; expected an object of"),
    ('{\n "a": 1\n}', "begins with an object over several lines; expected .* around"),
])
def test_a_damaged_file_is_refused(tmp_path, text, words):
    """Guards against an array of which only the first half is read, in silence."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        JSONFile(tmp_path / "a.json")


def test_the_second_start_reads_the_index_only(tmp_path, monkeypatch):
    """Guards against minutes of reading at each start, and against an index that outlives its file's content."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records(5)))
    assert isinstance(JSONFile(path)._table, np.memmap)
    monkeypatch.setattr(index, "_array", None)  # would be called
    assert list(JSONFile(path)) == records(5)
    monkeypatch.undo()
    path.write_text(json.dumps(records(6)))
    assert list(JSONFile(path)) == records(6)
    os.utime(path, ns=(0, 0))
    for damaged in (b"damaged", b"PK\x03\x04 no archive"):
        (tmp_path / ".a.json.index.npy").write_bytes(damaged)
        assert list(JSONFile(path)) == records(6)


def test_a_folder_that_cant_be_written(tmp_path, monkeypatch):
    """Guards against data on a read-only disk that can't be trained on."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records(5)))
    monkeypatch.setattr(index.np, "save", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    assert list(JSONFile(path)) == records(5)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]  # nothing half written stays


def test_a_number_too_long_for_python(tmp_path):
    """Guards against a traceback over an error that says less than others."""
    (tmp_path / "a.json").write_text('[{"n": %s}]' % ("9" * 5000))
    with pytest.raises(ValueError, match="line 1: a damaged record .Exceeds the limit"):
        JSONFile(tmp_path / "a.json")


def test_what_goes_to_another_process_is_small(tmp_path, monkeypatch):
    """Guards against a table of millions of records that is copied with every task."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records(5000)))
    file = JSONFile(path)
    assert len(pickle.dumps(file)) < 1000 and list(pickle.loads(pickle.dumps(file))) == records(5000)
    (tmp_path / ".a.json.index.npy").unlink()
    monkeypatch.setattr(index.np, "save", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    assert list(pickle.loads(pickle.dumps(JSONFile(path)))) == records(5000)


def _read(file):
    return [file[i]["id"] for i in range(len(file))]


def test_threads_read_each_its_own(tmp_path):
    """Guards against a file position that threads share: records that are another's, without a word."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records(3000)))
    file = JSONFile(path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(_read, [file] * 8)) == [[f"x-{i}" for i in range(3000)]] * 8


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="Windows has no fork")
def test_processes_read_each_for_itself(tmp_path):
    """Guards against a file position that forked processes share: each reads the other's records."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records(300)))
    file = JSONFile(path)
    assert file[0]["id"] == "x-0"  # opened before the fork
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_read, [file] * 8) == [[f"x-{i}" for i in range(300)]] * 8
