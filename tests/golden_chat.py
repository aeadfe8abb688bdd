"""Make golden/tiny.model, a small sentencepiece model, and golden/chat.json, what sentencepiece makes of texts and
prompts with it. tests/test_chat.py and test_tokenizer.py compare with them; nothing of ours is used for that.

Needs `pip install sentencepiece protobuf` (the files are of sentencepiece 0.2.3). Run from anywhere:

    python tests/golden_chat.py
    python tests/golden_chat.py --check tokenizer.model     # ours against sentencepiece: 20,000 random texts
"""

import io
import json
import random
import re
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"

SENTENCES = """
A red arrow points to the small dog near the tree. The dog is looking at the blue ball on the grass.
What is within the rectangle? Within the green rectangle there is a white cup with hot tea.
Is the person inside the ellipse taller than the person inside the triangle? Yes, she is a little taller.
How many birds are there? There are 12 birds, 7 of them on the roof and 5 in the sky.
Describe the object pointed to by the yellow arrow. It is a wooden chair; its back is broken.
USER: What does the sign say? ASSISTANT: The sign says "STOP".
Human: Why is the man laughing? Assistant: Because the cat has stolen his hat!
    def area(box):
        x0, y0, x1, y1 = box
        return (x1 - x0) * (y1 - y0)
Der große Hund läuft über die Straße. Où est la fenêtre de la façade?
Καλημέρα κόσμε. Красный мяч лежит на траве. 图中红色方框里是什么？
### a ## b # c <b>bold</b> e-mail: someone@example.com, 50% off (today only) … it's done
""".strip("\n")

CASES = [
    "", " ", "  ", "a", " a", "a ", "  a  ", "Hello, world!", "The dog is looking at the blue ball.", "a    b   c  d",
    "line one\nline two", "para one\n\npara two\n", "\n", "\n\n", "\na", " \n ", "col1\tcol2\t\tcol3", "\r\n",
    "\x00\x01\x7f", "Größe: Straße, Übermut", "é vs e\u0301", "Καλημέρα κόσμε", "图中红色方框里是什么？", "ما هذا؟",
    "नमस्ते", "한국어",
    "A cat 🐱 and a family 👨\u200d👩\u200d👧", "🏴\U000e0067\U000e0062", "\ufeffbom", "\u3000wide\u00a0space",
    "\ufffd", "under▁score ▁ lit", "▁", "▁▁", "<s>", "</s>", "<unk>", "<s> a </s>", "<0x0A> and <unk> stay text",
    "<0xE2><0x96>",
    "<image>", "<image>\nWhat is this?", "###", "####", "#", "A.###Human: hi", "<|eot_id|>", "12345", "3.14", "it's",
    *(" " * n + "x" for n in range(2, 40)), *("x" + " " * n for n in (2, 3, 5, 8, 16, 17, 33)),
]

HUMAN = ("A chat between a curious human and an artificial intelligence assistant. "
         "The assistant gives helpful, detailed, and polite answers to the human's questions.")
VISION = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
          "user provides, and assist the user with a variety of tasks using natural language.")
Q1, A1, Q2, A2 = "What is in the red rectangle?", "A dog.", "And what colour\nis it?", "White, I think!"
ONE, TWO = [[Q1, None, True]], [[Q1, A1, True], [Q2, A2, False]]
PROMPTS = [                              # template, turns as (question, answer, image), the prompt with its marks
    ("llava_v1", ONE, f"{HUMAN} USER: <image>\n{Q1} ASSISTANT:"),
    ("llava_v1", TWO, f"{HUMAN} USER: <image>\n{Q1} ASSISTANT: {A1}</s>USER: {Q2} ASSISTANT: {A2}</s>"),
    ("llava_v1", [[Q1, A1, True], [Q2, None, True]],
     f"{HUMAN} USER: <image>\n{Q1} ASSISTANT: {A1}</s>USER: <image>\n{Q2} ASSISTANT:"),
    ("llava_v0", ONE, f"{HUMAN}###Human: <image>\n{Q1}###Assistant:"),
    ("llava_v0", TWO, f"{HUMAN}###Human: <image>\n{Q1}###Assistant: {A1}###Human: {Q2}###Assistant: {A2}###"),
    ("plain", [["", "A dog on the grass.", True]], "<image>A dog on the grass.\n"),
    ("plain", [["", None, True]], "<image>"),
    ("llava_phi_3", ONE, f"<|system|>\n{VISION}<|end|>\n<|user|>\n<image>\n{Q1}<|end|>\n<|assistant|>\n"),
    ("llava_phi_3", TWO, f"<|system|>\n{VISION}<|end|>\n<|user|>\n<image>\n{Q1}<|end|>\n<|assistant|>\n{A1}<|end|>\n"
                         f"<|user|>\n{Q2}<|end|>\n<|assistant|>\n{A2}<|end|>\n"),
]
IMAGE, PHI_3 = -200, {"<|endoftext|>": 500, "<|assistant|>": 501, "<|system|>": 506, "<|end|>": 507, "<|user|>": 510}


def make_model():
    """The model's bytes, with pieces of 2 to 16 spaces that all have the same score, -1e9, as LLaMA's have."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES.splitlines() * 3), model_writer=written, vocab_size=488,
        model_type="bpe", byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.995,
        hard_vocab_limit=False, num_threads=1, minloglevel=2)
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    for piece in model.pieces:
        if set(piece.piece) == {"▁"} and len(piece.piece) > 1:
            piece.score = -1e9
    present = {piece.piece for piece in model.pieces}
    for number in (6, 12, 16, 3, 15, 5, 7, 13, 11, 10, 14, 9, 2, 4, 8):
        if "▁" * number not in present:
            model.pieces.add(piece="▁" * number, score=-1e9)
    return model.SerializeToString()


def processors(model):
    """sentencepiece with the dummy prefix and without it."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    bare = sentencepiece_model_pb2.ModelProto.FromString(model)
    bare.normalizer_spec.add_dummy_prefix = False
    return [sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in (model, bare.SerializeToString())]


def random_texts(number):
    """Texts of pieces of CASES and of characters of many scripts, from a fixed seed."""
    draw = random.Random(2312)
    blocks = [(32, 126), (0, 31), (0xA1, 0x17F), (0x370, 0x3FF), (0x400, 0x44F), (0x600, 0x6FF), (0x4E00, 0x9FFF),
              (0x1F300, 0x1F6FF), (0x2570, 0x2590)]
    for _ in range(number):
        parts = []
        for _ in range(draw.randint(1, 6)):
            first, last = draw.choice(blocks)
            letters = "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 5)))
            word = draw.choice(SENTENCES.split()) + " "
            parts.append(draw.choice([draw.choice(CASES), " " * draw.randint(1, 6), word, letters]))
        yield "".join(parts)


def prompt_ids(with_prefix, without, template, prompt):
    """The official rule, on the prompt as one string: marks split it, what is between them is tokenized by itself."""
    ids, marks = [1], {"<image>": IMAGE, "</s>": 2, **PHI_3}
    for piece in re.split("(<image>)", prompt):
        if template == "llava_phi_3" and piece != "<image>":               # one prefix for the whole piece
            parts = re.split(r"(<\|\w+\|>)", piece)
            ids += with_prefix.encode(parts[0]) or without.encode(" ")
            ids += [i for part in parts[1:] for i in ([marks[part]] if part in marks else without.encode(part))]
        else:
            parts = re.split("(<image>|</s>)", piece)
            ids += [i for part in parts for i in ([marks[part]] if part in marks else with_prefix.encode(part))]
    return ids


def main():
    GOLDEN.mkdir(exist_ok=True)
    model = make_model()
    (GOLDEN / "tiny.model").write_bytes(model)
    with_prefix, without = processors(model)
    texts = [[text, with_prefix.encode(text)] for text in CASES + list(random_texts(150))]
    prompts = [{"template": template, "turns": turns, "ids": prompt_ids(with_prefix, without, template, prompt)}
               for template, turns, prompt in PROMPTS]
    content = {"pieces": with_prefix.vocab_size(), "added_tokens": PHI_3, "prompts": prompts,
               "texts": [[text, ids, with_prefix.decode(ids)] for text, ids in texts]}
    lines = [f'"{key}": {json.dumps(value, ensure_ascii=True)}' if key != "texts" else
             '"texts": [\n' + ",\n".join(json.dumps(row) for row in value) + "\n]" for key, value in content.items()]
    (GOLDEN / "chat.json").write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    print(f"{with_prefix.vocab_size()} pieces, {len(texts)} texts, {len(prompts)} prompts")


def check(path, number=20_000):
    """Compare our Tokenizer with sentencepiece on random texts: ids with the dummy prefix and without, and the text
    that ids give. Returns the number of mismatches."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tokenizer import Tokenizer
    ours, (with_prefix, without) = Tokenizer.load(path), processors(Path(path).read_bytes())
    wrong = 0
    for text in random_texts(number):
        ids = with_prefix.encode(text)
        same = ours.encode(text) == ids and ours.encode(text, False) == without.encode(text)
        if not same or ours.decode(ids) != with_prefix.decode(ids):
            wrong += 1
            print(f"mismatch: {text!r}")
    print(f"{number - wrong} of {number} random texts agree")
    return wrong


if __name__ == "__main__":
    sys.exit(check(sys.argv[2]) > 0 if sys.argv[1:2] == ["--check"] else main())
