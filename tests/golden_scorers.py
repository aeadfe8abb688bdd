"""What the official programs make of random texts: writes tests/golden/scorers.json. Not run by pytest.

    pip install pycocoevalcap numpy tqdm      # the file is of pycocoevalcap 1.2; its tokenizer wants java (17)
    git -C ViP-LLaVA show HEAD:llava/eval/m4c_evaluator.py > /tmp/m4c_evaluator.py
    python tests/golden_scorers.py /tmp/m4c_evaluator.py
    python tests/golden_scorers.py --check 5000 /tmp/m4c_evaluator.py    # new texts: ours against theirs

Captions: the words by PTBTokenizer, the scores by Cider, for all items and for the first few alone. Texts: after
EvalAIAnswerProcessor, the class of the file given. Pairs: right or wrong by the line of model_vqa_loader_vip.py that
counts. Nothing of ours is used for the file.
"""

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

ROOT = Path(__file__).resolve().parent.parent
FEW = (1, 2, 7)

WORDS = """
    the the the the a a a an of on in with at to is and and by near man woman dog cat horse umpire boy girl giraffe
    zebra bus truck chair bowl pizza laptop red blue green grey brown white black striped small big left right front
    behind holding wearing sitting standing looking furthest closest one two three who that his her not man's woman's
    dogs' it's isn't doesn't can't won't couldn't've they're she's I'm we've he'd cannot gonna wanna gotta don’t boy’s
    t-shirt dark-haired half-eaten 3-year-old no-one's man-made two-tier jack-o-lantern o'clock o'neil 'cause
    rock'n'roll y'all ma'am ol' 5 12 1st 2nd 20th 2x4 3d 10:30 10:30am 1,000 2.5 0.75 -1 +2 1/2 3/4 24/7 #5 #tag $4.50
    £3 50% 90° 6ft 1980s '90s no. 1.5-inch red/green and/or he/she w/o U.S. D.C. a.m. p.m. Mr. Dr. St. Ave. vs. etc.
    STOP CAFE MacBook Coca-Cola (left) (front [blurry] {x} "STOP" 'no' “go” `ok' & + x=5 * ** ~ | < > @home man.The
    bowl,the cup;a ... .. … -- - – — !! ?! ???
    """.split()
ENDS = ["", "", "", "", ".", ".", ".", " .", "!", "?", "...", "!!", "?!", ";", ":", ",", " -", '"', "'", ")"]

VQA_WORDS = """
    a an the A An THE none zero one Two THREE four five six seven eight nine TEN eleven yes no red dog's dogs' cat
    t-shirt x=-1 -1 0.75 3/4 1,000 3,4 $4.50 50% 10:30 5. 5.5. .5 1.a U.S. a.b e-mail and/or C++ a_b C# AT&T Straße
    ÉTÉ ΑΣ İ 图 ½
    """.split()
MARKS = list(";/[]\"{}()=+\\_-><@`,?!.:'*&#%$~|^") + ["...", "--", "'s", "’s"]
GAPS = [" "] * 12 + ["  ", "\n", "\t", "\u00a0", "\r\n", ""]


def join(rng: random.Random, words: list[str], ends: list[str]) -> str:
    """A caption of words: sometimes with commas, capitals, brackets or quotes around a word, and with some end."""
    around = ["{},", "({})", '"{}"', "'{}'", "{}.", "{};"]
    words = [rng.choice(around).format(word) if (word[0] + word[-1]).isalnum() and rng.random() < 0.06 else word
             for word in words]
    change = rng.choices([str, str.lower, str.capitalize, str.upper], [10, 4, 5, 1])[0]
    return change(" ".join(words)) + rng.choice(ends)


def caption_items(rng: random.Random, n: int) -> list[tuple[str, list[str]]]:
    """Answers and their one to five truths: variants of one phrase each, words exchanged, dropped or said twice."""
    items = []
    for _ in range(n):
        phrase = rng.choices(WORDS, k=rng.randint(1, 11))
        variants = []
        for _ in range(rng.randint(2, 6)):
            words = [rng.choice(WORDS) if rng.random() < 0.2 else word for word in phrase]
            words = [word for word in words for _ in range(rng.choices([1, 0, 2], [0.85, 0.1, 0.05])[0])]
            variants.append(join(rng, words, ENDS))
        items.append((variants[0] if rng.random() < 0.97 else "", variants[1:]))
    return items


def ptb(captions: list[list[str]]) -> list[list[str]]:
    """The words of each caption, joined by single spaces."""
    found = PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(captions)})
    assert [len(found[i]) for i in range(len(captions))] == [len(texts) for texts in captions]
    return [[" ".join(text.split()) for text in found[i]] for i in range(len(captions))]


def cider(answers: list[str], truths: list[list[str]]) -> list[float]:
    _, scores = Cider().compute_score(dict(enumerate(truths)), {i: [text] for i, text in enumerate(answers)})
    return [float(score) for score in scores]


def vqa_texts(rng: random.Random, n: int, contractions: list[str]) -> list[str]:
    """Texts of words and marks in any company; each of the contractions, from all of which an apostrophe is missing."""
    texts = [". " * 40 + "end.", "." * 31 + "1.", "", " ", "?", "the"]
    for i in range(n - len(texts)):
        words = rng.choices(VQA_WORDS, k=rng.randint(0, 5)) + [contractions[i % len(contractions)]]
        rng.shuffle(words)
        words = [rng.choice([str, str, str.upper, str.capitalize])(word) for word in words]
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(words))
            mark = rng.choice(MARKS)
            words[at] = rng.choice([words[at] + mark, mark + words[at], words[at] + " " + mark, words[at] + mark + "x"])
        texts.append("".join(word + rng.choice(GAPS) for word in words))
    return texts


def exact_pairs(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Answers and truths that differ in nothing, in case, in white space, in a full stop or in all."""
    pairs = []
    for _ in range(n):
        words = ["yes", "no", "a", "the", "red", "ball", "5", "Straße", "ΑΣ", "ÉTÉ", "İs"]
        truth = " ".join(rng.choices(words, k=rng.randint(1, 3)))
        answer = truth if rng.random() < 0.8 else "the " + truth
        answer, truth = (rng.choice([str, str.upper, str.lower, str.title])(text) for text in (answer, truth))
        answer = rng.choice(["", "", " ", "\n"]) + answer + rng.choice(["", "", "", " ", "\n", ".", "\u00a0"])
        pairs.append((answer, truth + rng.choice(["", "", "", "", "", " ", "."])))
    return pairs


def load_reference(path: str):
    spec = importlib.util.spec_from_file_location("m4c_evaluator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EvalAIAnswerProcessor()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Write tests/golden/scorers.json, or compare with new texts.")
    parser.add_argument("reference", help="llava/eval/m4c_evaluator.py of a checkout of ViP-LLaVA")
    parser.add_argument("--check", type=int, metavar="N", help="compare on N new items of each kind")
    args = parser.parse_args(argv)
    n, rng = args.check or 240, random.Random(1 if args.check else 0)
    processor = load_reference(args.reference)
    items = caption_items(rng, n)
    tokens = ptb([[answer, *truths] for answer, truths in items])
    answers, truths = [texts[0] for texts in tokens], [texts[1:] for texts in tokens]
    scores = cider(answers, truths)
    few = {k: cider(answers[:k], truths[:k]) for k in FEW}
    texts = vqa_texts(rng, n, sorted(processor.CONTRACTIONS))
    normalised = [(text, processor(text)) for text in texts]
    pairs = [(answer, truth, answer.strip().lower() == truth.lower()) for answer, truth in exact_pairs(rng, n)]
    if args.check:
        return check(items, tokens, scores, normalised)
    rows = {
        "captions": [[[raw, *more], texts, score] for (raw, more), texts, score in zip(items, tokens, scores)],
        "few": [few[k] for k in FEW], "normalised": normalised, "exact": pairs,
    }
    blocks = (f'"{name}":[\n' + ",\n".join(json.dumps(row, separators=(",", ":")) for row in block) + "\n]"
              for name, block in rows.items())
    path = ROOT / "tests" / "golden" / "scorers.json"
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
    print(f"{n} captions, mean {sum(scores) / n:.3f}; {sum(pair[2] for pair in pairs)} of {n} pairs right; "
          f"{path.stat().st_size} bytes")


def check(items, tokens, scores, normalised) -> None:
    sys.path.insert(0, str(ROOT))
    from evals.scorers import cider_d, normalise, tokenize

    lines = [(raw, cut) for (answer, truths), texts in zip(items, tokens) for raw, cut in zip([answer, *truths], texts)]
    wrong = [(raw, cut) for raw, cut in lines if tokenize(raw) != cut.split()]
    for raw, cut in wrong[:10]:
        print(f"{raw!r}\n    theirs {cut}\n    ours   {' '.join(tokenize(raw))}")
    print(f"words agree in {len(lines) - len(wrong)} of {len(lines)} captions")
    same_words = cider_d([texts[0] for texts in tokens], [texts[1:] for texts in tokens], cut=str.split)
    from_raw = cider_d([answer for answer, _ in items], [truths for _, truths in items])
    for name, ours in (("their words", same_words), ("our words", from_raw)):
        print(f"CIDEr-D of {name}: the largest difference is {max(abs(a - b) for a, b in zip(ours, scores)):.1e}")
    print(f"normalise agrees on {sum(normalise(text) == theirs for text, theirs in normalised)} of {len(normalised)}")


if __name__ == "__main__":
    main(sys.argv[1:])
