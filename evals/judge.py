"""ViP-Bench's judge: how right is an answer, from 0.0 to 1.0? Any endpoint that speaks OpenAI's protocol.

    judge = Judge("http://127.0.0.1:8000/v1", "some-model", Cache("judge.jsonl"))
    judge.grade("What is the number within the red box?", "7<OR>seven", "It is 7.", run=0)      # 1.0

The judge is shown a few graded examples, the question, the truth and the answer, and completes the grade: PROMPT is
the one of the published evaluator, as grades by other words could not stand beside the paper's. Each grade is kept on
disk at once, by judge, question, truth, answer and run: to ask again costs nothing, and a run that was cut goes on.

Failures: what is wrong for good (no such model, no permission) ends the run; a server that is busy, broken or silent is
asked again, more and more slowly, and then ends the run; a reply that is no grade is asked for again, more freely, and
then raises NoGrade for this answer alone.
"""

import hashlib
import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from evals.benchmark import dumps, read_lines, write_lines

# The words of the published evaluator, scripts/eval/vip-bench_evaluator.py, after MM-Vet's (arXiv 2308.02490).
EXAMPLES = (
    "What is x in the equation within the yellow rectangle? | -1 <AND> -5 | x = 3 | 0.0",
    "What is x in the equation within the yellow rectangle? | -1 <AND> -5 | x = -1 | 0.5",
    "What is x in the equation within the yellow rectangle? | -1 <AND> -5 | x = -5 | 0.5",
    "What is x in the equation within the red rectangle? | -1 <AND> -5 | x = -5 or 5 | 0.5",
    "What is x in the equation within the orange rectangle? | -1 <AND> -5 | x = -1 or x = -5 | 1.0",
)
MEME = (
    "Can you explain this meme within the blue rectangle? | This meme is poking fun at the fact that the names of "
    "the countries Iceland and Greenland are misleading. Despite its name, Iceland is known for its beautiful green "
    "landscapes, while Greenland is mostly covered in ice and snow. The meme is saying that the person has trust "
    "issues because the names of these countries do not accurately represent their landscapes."
)
MEME_EXAMPLES = (
    "The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy "
    "and Greenland isn't very green. | 0.4",
    "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite "
    "its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I "
    "have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The "
    "humor in this meme is derived from the unexpected contrast between the names of the countries and their actual "
    "physical characteristics. | 1.0",
)
PROMPT = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> "
    "in the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n\nQuestion | Ground truth | Prediction "
    "| Correctness\n--- | --- | --- | ---\n"
) + "".join(f"{line}\n" for line in (*EXAMPLES, *(f"{MEME} | {graded}" for graded in MEME_EXAMPLES)))
AGAIN = "\nPredict the correctness of the answer (digit): "
KEYS = ("JUDGE_API_KEY", "OPENAI_API_KEY")  # of the environment; a server of one's own may need none
TRIES = 5
PAUSE = 2.0  # seconds before the second try; twice as long before each further one


def secret() -> str:
    """The judge's key, or nothing."""
    return next((os.environ[name] for name in KEYS if os.environ.get(name)), "")


def check_address(url: str) -> None:
    """ValueError: this is none, or the key can't be sent."""
    if not re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[^\s/\[\]]+)(/\S*)?", url):
        raise ValueError(f"judge-url is {url}; expected http://… or https://…")
    if not re.fullmatch(r"[!-~]*", secret()):
        raise ValueError(f"the key in {' or '.join(KEYS)} has a space, an end of line or a letter that no key has")


class NoGrade(ValueError):
    """The judge replies, but not with a grade."""


class Over(ConnectionError):
    """Another question has failed for good, or Ctrl-C came."""


class Cache:
    """Grades in a file of JSON lines; a thread may add one while others read."""

    def __init__(self, path: str | Path):
        self.path, self._lock = Path(path), threading.Lock()
        lines = read_lines(self.path, ["key", "score"])
        for key, score in ((line["key"], line["score"]) for line in lines):
            if not isinstance(key, str) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
                raise ValueError(f"{self.path} holds the grade {score!r} of {key!r:.20}; expected 0.0 to 1.0: take it away")
        self._grades = {line["key"]: line["score"] for line in lines}
        if self.path.is_file():
            write_lines(self.path, lines)  # without the half of a line that a cut run may have left

    def get(self, key: str) -> float | None:
        return self._grades.get(key)

    def put(self, key: str, score: float, **about) -> None:
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(dumps({"key": key, "score": score, **about}))
            self._grades[key] = score


@dataclass(frozen=True)
class Judge:
    url: str  # up to and with /v1
    model: str
    cache: Cache
    timeout: float = 60.0  # seconds for a reply
    over: threading.Event = field(default_factory=threading.Event)  # once it is set nobody is asked any more

    def key(self, question: str, truth: str, answer: str, run: int) -> str:
        said = [self.url.rstrip("/"), self.model, PROMPT, question, truth, answer, run]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def grade(self, question: str, truth: str, answer: str, run: int) -> float:
        """0.0 to 1.0. NoGrade: the replies are none; ConnectionError, ValueError: there are no replies."""
        key = self.key(question, truth, answer, run)
        if (known := self.cache.get(key)) is not None:
            return known
        truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        request = PROMPT + "\n" + " | ".join([question, truth, answer, ""])
        for attempt in range(TRIES):
            reply = self.complete(request + AGAIN * (attempt > 0), 0.5 * attempt)
            score = parse_grade(reply)
            if score is not None:
                self.cache.put(key, score, reply=reply, run=run)
                return score
        raise NoGrade(f"{reply[:40]!r} came; expected a grade, 0.0 to 1.0")

    def complete(self, text: str, temperature: float) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": 3,
                "temperature": temperature}
        for attempt in range(TRIES):
            if self.over.wait(PAUSE * 2 ** (attempt - 1) if attempt else 0):
                raise Over(f"the judge at {self.url} is not asked any more")
            try:
                reply = self._post(json.dumps(body).encode())
                return str(json.loads(reply)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}, {beginning(error)}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise ValueError(f"the judge at {self.url} refuses: {problem}") from None
            except (OSError, http.client.HTTPException) as error:  # no server, no reply in time, a cut one
                problem = f"{type(error).__name__}: {error}"
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                problem = f"a reply that is no chat completion ({type(error).__name__}: {error})"
        raise ConnectionError(f"the judge at {self.url} gives no reply after {TRIES} tries: {problem}")

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, {"Content-Type": "application/json"})
        if secret():
            request.add_unredirected_header("Authorization", f"Bearer {secret()}")  # for this server, and no other
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")  # no proxy stands before it
        opener = urllib.request.build_opener(NoRedirect, *([urllib.request.ProxyHandler({})] if local else []))
        with opener.open(request, timeout=self.timeout) as reply:
            return reply.read()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Elsewhere urllib would ask without the question, by a GET. As it is, the status is an error."""

    def redirect_request(self, *_):
        return None


def beginning(error: urllib.error.HTTPError) -> str:
    """What a server says of its error, if that comes."""
    if place := error.headers.get("Location"):
        return f"it is at {place}"
    try:
        return error.read(200).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def parse_grade(reply: str) -> float | None:
    """ "0.5", "1" or "0.5 |" -> the number, if it is one from 0 to 1."""
    match = re.match(r"\s*(\d*\.?\d+)(?=\s|\||$)", reply)
    return float(match[1]) if match and 0 <= float(match[1]) <= 1 else None
