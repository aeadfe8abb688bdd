"""ViP-Bench: 303 answers, six capabilities, and a judge on the loopback that fails in every way."""

import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from commandline import run
from data import benchmarks
from evals import judge as judge_file
from evals import vipbench
from evals.judge import Cache, Judge, NoGrade, parse_grade

COUNTS = {"rec": 240, "ocr": 89, "know": 59, "math": 31, "rel": 28, "lang": 16}  # of the real one's 303


@pytest.fixture
def server(monkeypatch):
    """A judge at server.url that says what server.say(prompt, how often it was asked) says, or fails as it says."""
    monkeypatch.setattr(judge_file, "PAUSE", 0.0)
    for name in judge_file.KEYS:
        monkeypatch.delenv(name, raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append((self.path, self.headers.get("Authorization"), body))
                prompt = body["messages"][0]["content"]
                say = server.say(prompt, sum(prompt in r[2]["messages"][0]["content"] for r in server.requests))
            if isinstance(say, float):
                time.sleep(say)
                return  # without a word
            status, text = say if isinstance(say, tuple) else (200, json.dumps({"choices": [{"message": {"content": say}}]}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.lock, server.requests, server.say = threading.Lock(), [], lambda prompt, times: "1.0"
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_judge_s_prompt_is_the_published_one():
    """Guards against an edit of the words that grades come from: they would no longer stand beside the paper's."""
    assert hashlib.sha256(judge_file.PROMPT.encode()).hexdigest()[:16] == "ca1865b6fe91ec5b"


def test_what_the_judge_reads_and_how_long_it_is_given(tmp_path, server, monkeypatch):
    """Guards against a truth whose parts run into its <AND>, and a busy server that is asked again at once."""
    judge, pauses = Judge(server.url, "judge", Cache(tmp_path / "judge.jsonl")), []
    assert [judge.grade("What?", "a<AND>b<OR>c", "d", 0) for _ in range(2)] == [1, 1] and len(server.requests) == 1
    assert server.requests[-1][2]["messages"][0]["content"] == judge_file.PROMPT + "\nWhat? | a <AND> b <OR> c | d | "
    server.say = lambda prompt, times: (503, "busy")
    monkeypatch.setattr(judge_file, "PAUSE", 2.0)
    monkeypatch.setattr(judge.over, "wait", pauses.append)
    with pytest.raises(ConnectionError, match="after 5 tries"):
        judge.grade("What?", "a", "another", 0)
    assert pauses == [0, 2, 4, 8, 16]
    judge.over.wait = lambda seconds: True
    with pytest.raises(ConnectionError, match="not asked any more"):  # as after Ctrl-C
        judge.grade("What?", "a", "another", 0)
    assert len(server.requests) == 6


@pytest.mark.parametrize("head, words", [
    (b"HTTP/1.1 500 no\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "after 5 tries: status 500"),
    (b"HTTP/1.1 500 no\r\nContent-Length: 9\r\n\r\n", "after 5 tries: status 500"),
    (b"HTTP/1.1 302 there\r\nLocation: http://127.0.0.1:9/other\r\n\r\n", "refuses: status 302, it is at http://127.0.0.1:9/other"),
    (b"HTTP/1.1 200 ok\r\n\r\n" + b"[" * 200_000, "no chat completion .RecursionError"),
])
def test_a_judge_whose_errors_are_broken(tmp_path, monkeypatch, head, words):
    """Guards against: a traceback, or a judge that isn't asked again, over what it says of its error; a question that is asked
    elsewhere without its words; a reply that is nested deeply."""
    monkeypatch.setattr(judge_file, "PAUSE", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while True:
                try:
                    with listening.accept()[0] as there:
                        there.sendall(head)
                        there.shutdown(socket.SHUT_WR)
                        while there.recv(100_000):
                            pass
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        judge = Judge(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "judge", Cache(tmp_path / "judge.jsonl"), timeout=5.0)
        with pytest.raises((ConnectionError, ValueError), match=words):
            judge.grade("What?", "a", "b", 0)
        listening.shutdown(socket.SHUT_RDWR)


def prediction(prompt: str) -> str:
    return prompt.rsplit(" | ", 2)[1]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """As many questions as the real one has, with its capabilities' counts; and a file of 303 answers."""
    folder, generator = tmp_path_factory.mktemp("bench"), np.random.default_rng(0)
    named = {name: set(generator.permutation(303)[:count].tolist()) for name, count in COUNTS.items()}
    for i in range(303):  # each takes one at least: rec moves to those that are left out, which it may leave twice
        if not any(i in items for items in named.values()):
            spare = next(k for k in sorted(named["rec"]) if sum(k in items for items in named.values()) > 1)
            named["rec"] = named["rec"] - {spare} | {i}
    meta = {f"v1_{i}": {"image_source": "a.png", "image": f"v1_{i}_0.png", "question": "What is <obj>?",
                        "answer": f"thing {i}<OR>item {i}", "capability": [n for n in COUNTS if i in named[n]]}
            for i in range(303)}
    (folder / "vip-bench-meta-data.json").write_text(json.dumps(meta))
    (folder / "human/images").mkdir(parents=True)
    lines = [{"question_id": i, "image": f"v1_{i}_0.png", "text": "What is within the red box?"} for i in range(303)]
    (folder / "human/questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = {f"v1_{i}": f"It is thing {i}." if i % 3 == 0 else f"It is thing {i + 1}." for i in range(303)}
    (folder / "mine.json").write_text(json.dumps(answers, indent=2))
    return folder


def score(bench, out, *flags):
    return run(vipbench.main, ["--results", str(bench / "mine.json"), "--data", str(bench), "--split", "human",
                               "--out", str(out), *flags])


def test_303_answers_are_scored_as_the_evaluator_does(bench, tmp_path, server, capsys):
    """Guards against capabilities that are weighed wrongly: the judge grades 0.0, 0.1, … 1.0 by an answer's number, and
    the published evaluator's formula, 100 x sum / count of each capability's items, is worked out here again."""

    def grade(prompt: str) -> float:
        return int("".join(filter(str.isdigit, prediction(prompt)))) % 11 / 10

    server.say = lambda prompt, times: f"{grade(prompt)}"
    assert score(bench, tmp_path, "--judge-url", server.url, "--judge-runs", "2") == 0
    meta, answers = (json.loads((bench / name).read_text()) for name in ("vip-bench-meta-data.json", "mine.json"))
    table = json.loads((tmp_path / "judge-results.json").read_text())["rows"]
    for name, count in COUNTS.items():
        grades = [grade(f"a | b | {answers[k]} | ") for k, truth in meta.items() if name in truth["capability"]]
        said = table[vipbench.CAPABILITIES[name]]
        assert said["score"] == pytest.approx(100 * sum(grades) / count, abs=1e-3) and said["n"] == count == len(grades)
    assert table["all"]["n"] == 303 and len(server.requests) == 2 * 303
    path, _, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["max_tokens"] == 3 and body["temperature"] == 0
    assert body["messages"][0]["content"].startswith(judge_file.PROMPT + "\nWhat is within the red box? | thing ")
    out = capsys.readouterr().out
    assert "by match (not GPT-4), mine" in out and "published, 7b" in out and "2 runs: " in out and "deviation 0.00" in out
    offline = json.loads((tmp_path / "results.json").read_text())
    assert offline["rows"]["all"]["score"] == pytest.approx(100 / 3, abs=1e-3) and offline["published"] == {}


def test_a_second_scoring_asks_nobody(bench, tmp_path, server):
    """Guards against a second bill, and against grades that are taken for another answer, run or judge."""
    for _ in range(2):
        assert score(bench, tmp_path, "--judge-url", server.url, "--judge-runs", "1") == 0
        assert len(server.requests) == 303
    assert score(bench, tmp_path, "--judge-url", server.url, "--judge-runs", "2") == 0
    assert len(server.requests) == 2 * 303
    assert score(bench, tmp_path, "--judge-url", server.url, "--judge-runs", "1", "--judge-model", "other") == 0
    assert len(server.requests) == 3 * 303


def test_a_judge_that_dies_half_way_loses_nothing(bench, tmp_path, server, capsys):
    """Guards against grades that are kept in memory until the end; the last line of the file is cut, as by a kill."""
    server.say = lambda prompt, times: "0.5" if len(server.requests) <= 100 else (503, "too busy")
    assert score(bench, tmp_path, "--judge-url", server.url, "--judge-runs", "1", "--judge-threads", "1") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "gives no reply after 5 tries: status 503, too busy" in err
    kept = (tmp_path / "judge.jsonl").read_text()
    assert kept.count("\n") == 100
    (tmp_path / "judge.jsonl").write_text(kept + '{"key": "12')
    server.requests.clear()
    server.say = lambda prompt, times: "0.5"
    assert score(bench, tmp_path, "--judge-url", server.url, "--judge-runs", "1") == 0
    assert len(server.requests) == 203
    assert {json.loads(line)["score"] for line in (tmp_path / "judge.jsonl").read_text().splitlines()} == {0.5}
    assert json.loads((tmp_path / "judge-results.json").read_text())["rows"]["all"]["score"] == 50


def test_half_a_grade_spoils_no_other(tmp_path):
    """Guards against a grade that is added to the half line of a run that was cut within its first."""
    (tmp_path / "judge.jsonl").write_text('{"key": "a", "sco')
    Cache(tmp_path / "judge.jsonl").put("b", 0.5)
    assert Cache(tmp_path / "judge.jsonl").get("b") == 0.5


@pytest.mark.parametrize("line", ['{"key": "a", "score": 7}', '{"key": "a", "score": "x"}', '{"key": [1], "score": 1}'])
def test_a_grade_that_is_none_is_not_taken_up(tmp_path, line):
    """Guards against a traceback, and against 700 % in a table."""
    (tmp_path / "judge.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="judge.jsonl holds the grade .*take it away"):
        Cache(tmp_path / "judge.jsonl")


def test_nonsense_is_asked_for_again_then_named(bench, tmp_path, server, capsys):
    """Guards against a 0.0 for an answer that nobody graded: one is never graded, one at the third time, the others at once."""

    def say(prompt, times):
        last = next(line for line in prompt.split("\n") if line.startswith("What is within the red box?"))
        if "thing 7 <OR>" in last:
            return "It depends"
        return "perhaps" if "thing 9 <OR>" in last and "Predict the correctness" not in prompt else "1.0"

    server.say = say
    assert score(bench, tmp_path, "--judge-url", server.url, "--judge-runs", "1") == 2
    err = capsys.readouterr().err
    assert "gave 1 of 303 answers no grade, v1_7 first: 'It depends' came" in err and err.count("\n") == 1
    assert not (tmp_path / "judge-results.json").exists() and (tmp_path / "judge.jsonl").read_text().count("\n") == 302
    heats = [body["temperature"] for _, _, body in server.requests if "thing 7 <OR>" in body["messages"][0]["content"]]
    assert heats == [0, 0.5, 1.0, 1.5, 2.0] and len(server.requests) == 301 + 2 + 5
    server.say = lambda prompt, times: "0"
    assert score(bench, tmp_path, "--judge-url", server.url, "--judge-runs", "1") == 0
    assert len(server.requests) == 301 + 2 + 5 + 1


@pytest.mark.parametrize("trouble", [(500, "oops"), (429, "slow down"), 0.6, (200, "<html>"), (200, '{"choices": []}')])
def test_a_busy_judge_is_asked_again(trouble, server, tmp_path):
    """Guards against giving up at the first failure: status 500 and 429, no word in time, a reply of another form."""
    server.say = lambda prompt, times: trouble if times < 3 else "0.7"
    judge = Judge(server.url, "some", Cache(tmp_path / "judge.jsonl"), timeout=0.3)
    assert judge.grade("What?", "7", "It is 7.", run=0) == 0.7 and len(server.requests) == 3


def test_silence_is_not_waited_out(server, tmp_path):
    """Guards against a time limit that nobody keeps: the server would say nothing for ten seconds, and then hang up."""
    server.say = lambda prompt, times: 2.0
    with pytest.raises(ConnectionError, match="TimeoutError: timed out"):
        Judge(server.url, "some", Cache(tmp_path / "judge.jsonl"), timeout=0.1).grade("What?", "7", "7", run=0)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_ends_at_once(status, bench, tmp_path, server, capsys):
    """Guards against 303 x 5 tries with a wrong key, each a minute long."""
    server.say = lambda prompt, times: (status, "no such key")
    assert score(bench, tmp_path, "--judge-url", server.url, "--judge-threads", "1") == 2
    err = capsys.readouterr().err
    assert f"refuses: status {status}, no such key" in err and len(server.requests) == 1


def test_no_judge_there(bench, tmp_path, server, capsys):
    """Guards against a traceback, and against a proxy that is asked for this machine's own servers."""
    assert score(bench, tmp_path, "--judge-url", "http://127.0.0.1:9/v1", "--judge-threads", "2") == 2
    assert "gives no reply after 5 tries" in capsys.readouterr().err


def test_the_key_and_no_proxy(server, tmp_path, monkeypatch):
    """Guards against a key that is not sent, or that a file keeps; and a proxy between this machine and itself."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    judge = Judge(server.url + "/", "some", Cache(tmp_path / "judge.jsonl"))
    assert judge.grade("What?", "7", "7", run=0) == 1 and server.requests[0][1] == "Bearer sk-secret"
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()


@pytest.mark.parametrize("key", ["sk-secret\r", "sk-secret€", "sk secret"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_told(key, bench, tmp_path, server, monkeypatch, capsys):
    """Guards against a secret in an error message, and against five tries for what is wrong for good."""
    monkeypatch.setenv("JUDGE_API_KEY", key)
    assert score(bench, tmp_path, "--judge-url", server.url) == 2 and not server.requests
    assert "the key in JUDGE_API_KEY" in (err := capsys.readouterr().err) and "secret" not in err


@pytest.mark.parametrize("reply, grade", [
    ("1.0", 1.0), ("0", 0.0), (" 0.3 |", 0.3), (".5", 0.5), ("1", 1.0), ("0.5\n", 0.5),
    ("1.5", None), ("-1", None), ("", None), ("one", None), ("0.5.1", None), ("10", None), ("0.5x", None),
    ("1/2", None), ("0,5", None), ("1%", None), ("0/10", None), ("1:2", None), ("0.5|", 0.5), ("0.5 because", 0.5),
])
def test_grades(reply, grade):
    """Guards against 10 that is read as 1, and against words that are read as 0."""
    assert parse_grade(reply) == grade


def test_no_grade_is_told_apart(server, tmp_path):
    server.say = lambda prompt, times: "maybe"
    with pytest.raises(NoGrade, match="'maybe' came"):
        Judge(server.url, "some", Cache(tmp_path / "judge.jsonl")).grade("What?", "7", "7", run=0)


@pytest.mark.parametrize("change, words", [
    (lambda a: a.pop("v1_3"), "has 302 answers; expected 303"), (lambda a: a.update(v2_0="x"), "has 304 answers"),
    (lambda a: a.update(v1_0=7), "holds no answers"),
])
def test_other_results_are_refused(change, words, bench, tmp_path, capsys):
    """Guards against a mean over the answers that happen to be there."""
    answers = json.loads((bench / "mine.json").read_text())
    change(answers)
    (tmp_path / "other.json").write_text(json.dumps(answers))
    assert score(bench, tmp_path / "out", "--results", str(tmp_path / "other.json")) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [
    (["--judge-url", "localhost:8000"], "expected http://… or https://…"), (["--judge-runs", "0"], "judge-runs is 0"),
    (["--judge-threads", "0"], "judge-threads is 0"), (["--judge-timeout", "0"], "judge-timeout is 0"),
    (["--split", "dog"], "invalid choice: 'dog'"), (["--split", "bbox"], "no file"), (["--data", "nosuch"], "no file nosuch"),
    (["--results", "nosuch.json"], "no file nosuch.json"),
])
def test_a_mistake_is_one_line(flags, words, bench, tmp_path, capsys):
    assert score(bench, tmp_path / "out", *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, text, words", [
    ("vip-bench-meta-data.json", "[]", "the file is None; expected an answer and capabilities"),
    ("vip-bench-meta-data.json", '{"v1_0": {"answer": "a", "capability": ["smell"]}}', "v1_0 is {'answer'"),
    ("vip-bench-meta-data.json", '{"v1_0": {"answer": "a", "capability": [["rec"]]}}', "v1_0 is {'answer'"),
    ("vip-bench-meta-data.json", '{"v1_0": {"answer": "a", "capability": 5}}', "v1_0 is {'answer'"),
    ("vip-bench-meta-data.json", "[" * 100_000, "can't be read as JSON"),
    ("vip-bench-meta-data.json", "{", "can't be read as JSON"),
    ("human/questions.jsonl", '{"question_id": "0", "text": "a"}', "line 1: question_id is '0'; expected a whole number"),
    ("human/questions.jsonl", '{"question_id": 7, "text": "a"}\n{"question_id": 7, "text": "b"}', "line 2: question_id 7 came already"),
    ("human/questions.jsonl", '{"question_id": 0, "text": "a"}', "asks 1 questions, the meta data know 303"),
])
def test_damaged_files_are_named(name, text, words, bench, tmp_path, capsys):
    for file in ("vip-bench-meta-data.json", "human/questions.jsonl", "mine.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text((bench / file).read_text())
    (tmp_path / name).write_text(text)
    assert score(tmp_path, tmp_path / "out") == 2
    assert words in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_a_model_s_answers_are_what_the_evaluator_takes(tmp_path, server):
    """Guards against keys that the public evaluator does not know, and against splits with other truths."""
    benchmarks.write(tmp_path / "world", 6, side=112)
    data, answers = tmp_path / "world/ViP-Bench", {}
    for split in ("bbox", "human"):
        out = tmp_path / split
        assert run(vipbench.main, ["--data", str(data), "--split", split, "--out", str(out), "--device", "cpu",
                                   "--judge-url", server.url]) == 0
        answers[split] = json.loads((out / f"{split}.json").read_text())
        assert list(answers[split]) == [f"v1_{i}" for i in range(6)] and all(answers[split].values())
        assert json.loads((out / "judge-results.json").read_text())["rows"]["all"]["score"] == 100
        again = ["--data", str(data), "--split", split, "--results", str(out / f"{split}.json"), "--out", str(tmp_path / "again")]
        assert run(vipbench.main, again) == 0
        rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (out, tmp_path / "again")]
        assert rows[0] == rows[1]
    assert answers["bbox"] != answers["human"]


def test_a_missing_image_is_wrong_and_nobody_is_asked_about_it(tmp_path, server, capsys):
    """Guards against keys of no question in the results, and a judge that is paid for nothing."""
    benchmarks.write(tmp_path / "world", 6, side=112)
    data, out = tmp_path / "world/ViP-Bench", tmp_path / "out"
    (data / "bbox/images/v1_2_0.png").unlink()
    flags = ["--data", str(data), "--out", str(out), "--device", "cpu", "--judge-url", server.url, "--judge-runs", "1"]
    assert run(vipbench.main, flags) == 0
    answers = json.loads((out / "bbox.json").read_text())
    assert list(answers) == [f"v1_{i}" for i in range(6)] and [name for name in answers if not answers[name]] == ["v1_2"]
    assert len(server.requests) == 5
    assert json.loads((out / "judge-results.json").read_text())["rows"]["all"]["score"] == pytest.approx(100 * 5 / 6, abs=0.01)
    assert "line 3, 2: image v1_2_0.png is not in" in capsys.readouterr().out
