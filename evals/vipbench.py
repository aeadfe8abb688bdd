"""ViP-Bench: 303 free questions about marked regions, six capabilities, graded from 0 to 1 (section 4.3 of the paper).

    python -m evals.vipbench --model 7b --data ViP-Bench --split bbox
    python -m evals.vipbench --results vip-llava-7b-human.json --data ViP-Bench --split human --judge-url URL

    DIR/SPLIT/questions.jsonl, DIR/SPLIT/images    what is asked; markers are in the images: tight boxes, or by hand
    DIR/vip-bench-meta-data.json                   what is true, and the capabilities that it takes
    OUT/SPLIT.json                                 {"v1_0": answer, …}: what the public evaluator takes

Two judges. The match, offline: the share of the truth's parts that the answer holds; it is no measure beside the
paper's numbers. And any endpoint of OpenAI's protocol (--judge-url, its key in JUDGE_API_KEY or OPENAI_API_KEY), asked
five times about every answer, as in the paper; with GPT-4 as the judge, that is the paper's score. A capability's score
is 100 times the mean over the questions that take it; an interval is of that mean (bootstrap over questions).
"""

import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from commandline import run, with_bar
from data.index import JSONFile
from data.readers import Plan, field
from data.records import Sample
from evals.benchmark import Benchmark, ask, flags, prepare, read_json, replace_file, report, row
from evals.judge import Cache, Judge, NoGrade, Over, check_address
from evals.scorers import matches

CAPABILITIES = {"rec": "Rec", "ocr": "OCR", "know": "Know", "math": "Math", "rel": "Rel", "lang": "Lang"}
PUBLISHED = {  # by GPT-4: the six capabilities, and all
    "bbox": {"7b": "56.7 19.4 49.7 10.0 50.4 33.8, all 48.4", "13b": "56.3 24.6 53.4 15.5 50.0 53.8, all 48.3",
             "llama3": "all 45.4", "phi3": "all 49.0", "GPT-4V": "all 55.9"},
    "human": {"7b": "56.7 21.2 47.1 12.3 50.4 36.2, all 48.3", "13b": "55.4 26.9 49.3 15.5 48.6 41.9, all 48.2",
              "llama3": "all 45.0", "phi3": "all 48.2", "GPT-4V": "all 53.3"},
}


# -- files -----------------------------------------------------------------------------------------------------------


def read_truths(path: Path) -> dict[str, dict]:
    """v1_0 -> its "answer" and "capability". ValueError, with the name, for an item that lacks them."""
    truths = read_json(path)
    for name, truth in truths.items() if isinstance(truths, dict) else [("the file", None)]:
        needs = truth.get("capability") if isinstance(truth, dict) and isinstance(truth.get("answer"), str) else None
        if not needs or not isinstance(needs, list) or any(need not in list(CAPABILITIES) for need in needs):
            raise ValueError(f"{path}: {name} is {str(truth)[:60]}; expected an answer and capabilities "
                             f"({', '.join(CAPABILITIES)})")
    return truths


def read_questions(path: Path) -> dict[str, str]:
    """v1_0 -> the question, in the words of the split."""
    file, questions = JSONFile(path), {}
    for k in range(len(file)):
        try:
            name, text = f"v1_{field(file[k], 'question_id', int)}", field(file[k], "text", str)
            if name in questions:
                raise ValueError(f"question_id {name[3:]} came already; expected each once")
            questions[name] = text
        except ValueError as error:
            raise ValueError(f"{path}, {file.where(k)}: {error}") from None
    return questions


def read_results(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The answers of a results file, which must be those of the benchmark, all and no others."""
    results = read_json(path)
    if not isinstance(results, dict) or not all(isinstance(text, str) for text in results.values()):
        raise ValueError(f'{path} holds no answers; expected {{"v1_0": "…", …}}')
    wrong = sorted(results.keys() ^ set(names))
    if wrong:
        raise ValueError(f"{path} has {len(results)} answers; expected {len(names)}, as the benchmark has: {wrong[0]} "
                         f"and {len(wrong) - 1} more are in one of them only")
    return results


# -- questions and grades --------------------------------------------------------------------------------------------


def read(truths: dict[str, dict], record: dict, images: Path, generator: np.random.Generator) -> Plan:
    """Nothing is drawn: the images are marked."""
    text, truth = field(record, "text", str), truths[f"v1_{record['question_id']}"]["answer"]
    return Plan([], lambda words: [(text, truth)])


def tags(record: dict, sample: Sample) -> dict[str, str]:
    return {}


def table(truths: dict[str, dict], grades: dict[str, float]) -> dict[str, dict]:
    """A row for each capability that occurs, then all."""
    groups = {}
    for key, said in CAPABILITIES.items():
        groups[said] = [grades[name] for name, truth in truths.items() if key in truth["capability"]]
    groups["all"] = list(grades.values())
    return {said: row(scores) for said, scores in groups.items() if scores}


def judged(judge: Judge, questions: dict, truths: dict, answers: dict, runs: int, threads: int) -> list[dict]:
    """The grades of every run. No answer is wrong, and nobody is asked about it. ValueError, ConnectionError: some grades
    are missing; those that are there are kept."""
    tasks = [(name, number) for number in range(runs) for name in truths]
    over = judge.over  # one has failed for good, or Ctrl-C: the others need not be tried

    def one(task):
        name, number = task
        if over.is_set() or not answers[name]:
            return 0.0
        try:
            return judge.grade(questions[name], truths[name]["answer"], answers[name], number)
        except NoGrade as error:
            return error
        except Over:
            return 0.0  # whoever set it raises
        except BaseException:
            over.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        try:
            found = list(with_bar(pool.map(one, tasks), "judge", len(tasks)))
        finally:
            over.set()
    none = [(name, grade) for (name, _), grade in zip(tasks, found) if isinstance(grade, NoGrade)]
    if none:
        raise ValueError(f"the judge gave {len(none)} of {len(tasks)} answers no grade, {none[0][0]} first: "
                         f"{none[0][1]}; the others are kept: the same command asks for these again")
    grades = iter(found)
    return [{name: next(grades) for name in truths} for _ in range(runs)]


def main(argv: list[str]) -> None:
    parser = flags("vipbench", "ViP-Bench: free answers about marked regions.", folder=True)
    parser.add_argument("--split", choices=PUBLISHED, default="bbox", help="who marked: tight boxes, or people (bbox)")
    parser.add_argument("--results", type=Path, help="score the answers of this file; no model is asked")
    parser.add_argument("--judge-url", help="an endpoint of OpenAI's protocol, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--judge-model", default="gpt-4-0613", help="what it is to judge with (gpt-4-0613)")
    parser.add_argument("--judge-runs", type=int, default=5, help="grades of each answer (5)")
    parser.add_argument("--judge-threads", type=int, default=4, help="answers graded at once (4)")
    parser.add_argument("--judge-timeout", type=float, default=60.0, help="seconds to wait for a grade (60)")
    args = parser.parse_args(argv)
    for flag, low, high in (("judge_runs", 1, 1000), ("judge_threads", 1, 1000), ("judge_timeout", 1e-3, 86_400)):
        if not low <= getattr(args, flag) <= high:
            raise ValueError(f"{flag.replace('_', '-')} is {getattr(args, flag)}; expected {low} to {high}")
    if args.judge_url:
        check_address(args.judge_url)
    folder = args.data
    truths = read_truths(folder / "vip-bench-meta-data.json")
    args.data, args.images = folder / args.split / "questions.jsonl", folder / args.split / "images"
    questions = read_questions(args.data)
    if questions.keys() != truths.keys():
        known = f"{len(questions)} questions, the meta data know {len(truths)}"
        raise ValueError(f"{args.data} asks {known}; expected the same")
    if args.results:
        args.model, args.images = args.results.stem, folder
    args = prepare(args, f"vipbench-{args.split}", ["split"])
    if args.results:
        lines, answers = [], read_results(args.results, list(truths))
        args.out.mkdir(parents=True, exist_ok=True)
    else:
        lines = ask(Benchmark("answers", partial(read, truths), tags, max_new_tokens=1024), args)
        answers = dict.fromkeys(truths, "") | {name: line["text"] for name, line in zip(questions, lines)}
        replace_file(args.out / f"{args.split}.json", json.dumps(answers, indent=1) + "\n")
    offline = {name: matches(answers[name], truth["answer"]) for name, truth in truths.items()}
    report(f"ViP-Bench {args.split}, by match (not GPT-4)", args, lines, table(truths, offline), {})
    if args.judge_url:
        judge = Judge(args.judge_url, args.judge_model, Cache(args.out / "judge.jsonl"), args.judge_timeout)
        runs = judged(judge, questions, truths, answers, args.judge_runs, args.judge_threads)
        means = {name: statistics.mean(run[name] for run in runs) for name in truths}
        title = f"ViP-Bench {args.split}, by {args.judge_model}"
        report(title, args, lines, table(truths, means), PUBLISHED[args.split], "judge-results")
        totals = [100 * statistics.mean(run.values()) for run in runs]
        spread = statistics.pstdev(totals)
        print(f"{len(runs)} runs: {', '.join(f'{total:.1f}' for total in totals)}; standard deviation {spread:.2f}")


if __name__ == "__main__":
    sys.exit(run(main))
