"""Tokens: from text to ids and back, with the tokenizers of LLaMA, Vicuna, Phi-3, Llama-3 and CLIP.

The work of a byte-pair encoding is done by the `tokenizers` library. Here is what stands around it: files are read
(sentencepiece's own format too, by a small parser), special tokens are known by name but never found in a text, and
text comes out as it is made, token by token.

    tokenizer = Tokenizer.load("weights/tiny")        # a folder, a tokenizer.json or a tokenizer.model
    ids = tokenizer.encode("the red </s>")            # "</s>" is four letters here; its id is tokenizer.eos
    stream = Stream(tokenizer)
    text = "".join(stream.push(i) for i in ids) + stream.flush()

Pitfalls
- LLaMA's tokenizer puts a space, its dummy prefix, before every text that it is given.
- What has no piece becomes bytes, so a token may be half a character: `Stream` waits for the other half.
- transformers 5 reads a tokenizer.model wrongly where spaces run together; sentencepiece is the truth that the tests
  compare with.
"""

import codecs
import json
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer as BPETokenizer, models, normalizers, pre_tokenizers, trainers

BYTES = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}        # pieces for what has no piece


# -- files of tokenizers ---------------------------------------------------------------------------------------------
# All become the content of a tokenizer.json: {"model": {"vocab": …, "merges": …}, …}

def read_sentencepiece(path: str | Path) -> tuple[dict, dict]:
    """A sentencepiece tokenizer.model as the contents of a tokenizer.json and a tokenizer_config.json.

    The file has scores and no merges: of all neighbours that join to a piece, those of the highest score join first,
    and of a tie the leftmost. So the merges are all cuts of pieces in two pieces, by score, and of a tie (all pieces
    of spaces have one score) those first whose left half is longest: a run of spaces then grows from the left.
    ValueError: it is another file, or a model that does not treat text as LLaMA's does.
    """
    path = Path(path)
    try:
        pieces, trainer, normalizer = _read_model_proto(path.read_bytes())
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, struct.error):
        raise ValueError(f"{path}: not a sentencepiece model, or a damaged one") from None
    kinds = sorted({kind for _, _, kind in pieces})
    got = {"model type": trainer.get(3, 1), "byte fallback": trainer.get(35, 0), "kinds of pieces": kinds,
           "replacements": len(normalizer.get(2, b"")), "spaces removed": normalizer.get(4, 1),
           "spaces marked": normalizer.get(5, 1)}
    wanted = {"model type": 2, "byte fallback": 1, "kinds of pieces": [1, 2, 3, 6], "replacements": 0, "spaces removed": 0,
              "spaces marked": 1}
    if got != wanted:
        raise ValueError(f"{path}: expected a model as LLaMA's, {wanted}, got {got}")
    normal = {text: score for text, score, kind in pieces if kind == 1}
    merges = [(text[:cut], text[cut:]) for text in normal for cut in range(1, len(text))]
    merges = [(left, right) for left, right in merges if left in normal and right in normal]
    merges.sort(key=lambda pair: (-normal[pair[0] + pair[1]], -len(pair[0])))
    specials = {text: i for i, (text, _, kind) in enumerate(pieces) if kind in (2, 3)}
    beside = path.with_name("added_tokens.json")               # Phi-3: the names of the ids above the pieces
    specials.update(read_json(beside) if beside.is_file() else {})
    ends = (("bos_token", trainer.get(41, 1)), ("eos_token", trainer.get(42, 2)))       # none is -1, read as 2⁶⁴ - 1
    config = {name: pieces[i][0] for name, i in ends if i < len(pieces)}
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    return _llama_json(vocab, merges, specials, prefix=bool(normalizer.get(3, 1))), config


def _read_model_proto(data):
    """Pieces as (text, score, kind), and the fields of trainer_spec and normalizer_spec by number.

    ModelProto (sentencepiece_model.proto), as far as it matters:
        1 pieces, repeated   1 text, 2 score, 3 kind: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
        2 trainer_spec       3 model_type, 35 byte_fallback, 41 bos_id, 42 eos_id
        3 normalizer_spec    2 replacements, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces
    """
    pieces, specs = [], {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, 1)))
        elif number in (2, 3):
            specs[number] = dict(_fields(value))
    return pieces, specs[2], specs[3]


def _fields(data):
    """Yield (number, value) of a protobuf message: a varint as int, the rest as bytes. IndexError: cut short."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            if at + size > len(data):
                raise IndexError(f"field {number} has {size} bytes, {len(data) - at} are left")
            yield number, data[at:at + size]
            at += size


def _llama_json(vocab, merges, specials, prefix=True):
    """The content of a tokenizer.json for a BPE of LLaMA's kind."""
    return {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, **_llama_steps(prefix),
            "added_tokens": [_added(name, i) for name, i in specials.items()],
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
                      "merges": merges}}


def _llama_steps(prefix):
    """What LLaMA's tokenizer.json of 2023 does around the BPE. (Later ones give no prefix after an image.)"""
    def replace(old, new):
        return {"type": "Replace", "pattern": {"String": old}, "content": new}

    before = [{"type": "Prepend", "prepend": "▁"}] * prefix + [replace(" ", "▁")]
    after = [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    after += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    return {"normalizer": {"type": "Sequence", "normalizers": before}, "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": after}}


def _adds_prefix(spec, source):
    """Does a tokenizer.json of LLaMA's kind add the dummy prefix, by a normalizer (2023) or a Metaspace (later)?"""
    steps = []
    for step in (spec.get("normalizer"), spec.get("pre_tokenizer")):
        steps += (step.get("normalizers") or step.get("pretokenizers") or [step]) if step else []
    schemes = {"Replace": "never", "Prepend": "always", "Metaspace": None}
    if any(step["type"] not in schemes or step.get("split", step["type"] == "Metaspace") for step in steps):
        raise ValueError(f"{source}: expected steps Prepend, Replace or unsplit Metaspace, got {json.dumps(steps)}")
    return any((schemes[step["type"]] or step["prepend_scheme"]) != "never" for step in steps)


def _added(name, i):
    """An entry of added_tokens; transformers will find it in any text, unlike us."""
    return {"id": i, "content": name, "special": True,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _begin_with(bos, i):
    """A post_processor that puts the token `bos` first, as transformers does with LLaMA's."""
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair,
            "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}}}


def _find_ends(specials, config, source):
    """The ids of bos and eos: by the names in tokenizer_config.json, else by the usual ones."""
    usual = (("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<|endoftext|>", "<|endoftext|>"))
    usual = next((pair for pair in usual if set(pair) <= set(specials)), (None, None))
    ids = []
    for key, name in zip(("bos_token", "eos_token"), usual):
        token = config.get(key) or name
        token = token["content"] if isinstance(token, dict) else token
        if token not in specials:
            raise ValueError(f"{source}: {key} is {token}, which is none of its special tokens: "
                             f"{', '.join(specials) or 'it has none'}; a tokenizer_config.json beside it names it")
        ids.append(specials[token])
    return ids


def _token_bytes(vocab, marks_spaces):
    """id -> the bytes that a token stands for."""
    if marks_spaces:
        return {i: BYTES.get(piece) or piece.replace("▁", " ").encode() for piece, i in vocab.items()}
    # GPT-2's alphabet: a byte that prints in Latin-1 is its own character, the others are U+0100 and following.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    value = {chr(byte): byte for byte in prints}
    value.update({chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(prints)))})
    return {i: bytes(value[letter] for letter in piece) for piece, i in vocab.items()}


def read_json(path: Path) -> dict:
    """The object in a JSON file. FileNotFoundError: there is no such file; ValueError: it holds something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def write_json(path: Path, content: dict) -> None:
    """Written beside and renamed, so that nobody reads half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


# -- text ↔ ids ------------------------------------------------------------------------------------------------------

class Stream:
    """Text as its tokens come: `push` returns what is certain, `flush` the rest; joined, they are the decoded text.

    Bytes wait until their character is whole. With `stop`, text that may be its beginning waits too; once it has
    come, `stopped` is true, and neither it nor anything after it is ever returned.
    """

    def __init__(self, tokenizer, stop=""):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self._at_start = "", True

    def push(self, i: int) -> str:
        """The text that token id `i` makes certain, maybe none. ValueError: the tokenizer has no such id."""
        piece = self.tokenizer.token_bytes(i, self._at_start)
        if piece is None:                                      # a special token
            return ""
        self._at_start = False
        return self._release(self._utf8.decode(piece))

    def flush(self) -> str:
        """The text that was held back, half a character as U+FFFD. Call once, at the end."""
        text = self._release(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, new):
        text, self._held = self._held + new, ""
        if self.stopped:
            return ""
        if self.stop and self.stop in text:
            self.stopped = True
            return text[:text.index(self.stop)]
        longest = min(len(self.stop) - 1, len(text))
        waits = next((n for n in range(longest, 0, -1) if text.endswith(self.stop[:n])), 0)
        certain = len(text) - waits
        self._held = text[certain:]
        return text[:certain]


class Tokenizer:
    """A byte-pair encoding that knows special tokens by name and never looks for them in a text.

    Two families: LLaMA's (Vicuna, Phi-3), from sentencepiece, which writes a space as ▁ and a character without a
    piece as bytes <0x00> … <0xFF>; and the byte-level one of Llama-3. `spec` is the content of a tokenizer.json,
    `config` that of the tokenizer_config.json beside it. ValueError: another kind, or bos and eos cannot be told.

    bos, eos     ids
    specials     name -> id; left out by `decode`
    vocab_size   number of pieces. Added tokens and a model's padding rows have ids from here on; when sampling, allow
                 none of them but `stop_ids`.
    """

    def __init__(self, spec, config=None, source="tokenizer.json"):
        model = spec.get("model", {}) if isinstance(spec, dict) else {}
        self.marks_spaces = bool(model.get("byte_fallback"))
        byte_level = "ByteLevel" in json.dumps(model and spec.get("pre_tokenizer"))
        has_bytes = self.marks_spaces and BYTES.keys() <= model.get("vocab", {}).keys()
        if model.get("type") != "BPE" or not (has_bytes or byte_level):
            raise ValueError(f"{source}: expected a BPE, with byte fallback (LLaMA) or byte-level (Llama-3), got "
                             f"{'neither' if model.get('type') == 'BPE' else model.get('type', 'no tokenizer')}")
        self.specials = {token["content"]: token["id"] for token in spec.get("added_tokens", ())}
        if wrong := [name for name, i in self.specials.items() if type(i) is not int]:
            raise ValueError(f"{source}: the added token {wrong[0]!r} has the id {self.specials[wrong[0]]!r}; expected a whole number")
        self.bos, self.eos = _find_ends(self.specials, config or {}, source)
        self.prefix = self.marks_spaces and _adds_prefix(spec, source)
        self.spec = dict(spec, **_llama_steps(self.prefix)) if self.marks_spaces else spec
        self._special_ids = set(self.specials.values())
        vocab = {piece: i for piece, i in model["vocab"].items() if i not in self._special_ids}
        self.vocab_size = max(vocab.values()) + 1
        self._bytes = _token_bytes(vocab, self.marks_spaces)
        self._space_byte = vocab.get("<0x20>")                 # a space, but not a dummy prefix
        bare = dict(spec, added_tokens=[], post_processor=None, truncation=None, padding=None)
        bare["model"] = dict(model, vocab=vocab, unk_token=None)
        if self.marks_spaces:                                  # `encode` does the steps before the BPE
            bare.update(normalizer=None, pre_tokenizer=None, model=dict(bare["model"], ignore_merges=False))
        try:
            self._bpe = BPETokenizer.from_str(json.dumps(bare))
        except Exception as error:                             # the tokenizers package raises nothing more precise
            raise ValueError(f"{source}: {error}") from None

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """Ids of a text: no BOS, no special tokens, whatever it says. `prefix`: with LLaMA's dummy prefix."""
        text.encode("utf-8")                                   # a lone surrogate is refused here: a ValueError
        if self.marks_spaces:
            text = (" " + text if text and prefix and self.prefix else text).replace(" ", "▁")
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: without special tokens, without the dummy prefix, with U+FFFD for bytes that are not UTF-8."""
        stream = Stream(self)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def token_bytes(self, i: int, at_start: bool = False) -> bytes:
        """The bytes of token `i`, None if it is special; `at_start` of a text, they are without the dummy prefix."""
        if i in self._special_ids:
            return None
        if i not in self._bytes:
            raise ValueError(f"no token has the id {i}; the tokenizer has {self.vocab_size} pieces")
        piece = self._bytes[i]
        return piece[1:] if at_start and self.prefix and i != self._space_byte and piece.startswith(b" ") else piece

    def special(self, name: str) -> int:
        """The id of the special token `name`, or of "bos" and "eos". ValueError: there is none."""
        ids = {**self.specials, "bos": self.bos, "eos": self.eos}
        if name not in ids:
            raise ValueError(f"the tokenizer has no token {name}, which the template needs; it has {', '.join(ids)}")
        return ids[name]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a tokenizer.json, from sentencepiece's tokenizer.model, or from a folder: the first of them it has.

        FileNotFoundError: there is none. ValueError: it is damaged, or of a kind that is not supported.
        """
        path = Path(path)
        if path.is_dir():
            names = [name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
            if not names:
                raise FileNotFoundError(f"{path}: neither tokenizer.json nor tokenizer.model in this folder")
            path = path / names[0]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if path.suffix != ".json":
            return cls(*read_sentencepiece(path), source=path)
        config = path.with_name("tokenizer_config.json")
        try:
            return cls(read_json(path), read_json(config) if config.is_file() else None, source=path)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no tokenizer that can be read ({type(error).__name__}: {error})") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A tokenizer of LLaMA's kind, learned from texts (an iterable): `vocab_size` pieces, fewer if words run out.

        Ids: 0 <unk>, 1 <s>, 2 </s>, 3 … 258 the bytes, then the characters of the texts, then what merges. A piece
        lies in one word or one run of signs, or is a digit; newlines and other control characters remain bytes.
        """
        names = ["<unk>", "<s>", "</s>", *BYTES]
        words = Regex(r"▁?[\p{L}\p{M}]+|▁?\p{N}|▁?[^\p{L}\p{M}\p{N}▁\x00-\x1f\x7f]+|▁")
        bpe = BPETokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)        # what is no word is removed
        bpe.train_from_iterator((("▁" + text).replace(" ", "▁") for text in texts),
                                trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=names, show_progress=False))
        model = json.loads(bpe.to_str())["model"]
        if len(model["vocab"]) > vocab_size:
            raise ValueError(f"vocab_size {vocab_size}: the bytes and characters alone are {len(model['vocab'])}")
        return cls(_llama_json(model["vocab"], model["merges"], {name: i for i, name in enumerate(names[:3])}))

    def save(self, folder: str | Path, extra: dict[str, int] | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`, as transformers' AutoTokenizer reads them.

        extra: name -> id of more special tokens, such as {"<image>": 32000, "<pad>": 32001}; transformers wants the
        model's image_token_index among them. ValueError: a name or an id is taken.
        """
        specials = {**self.specials, **(extra or {})}
        new = {name: i for name, i in specials.items() if name not in self.specials}
        free = set(new.values()) - self._special_ids - self._bytes.keys()
        if specials != {**specials, **self.specials} or len(free) < len(new):
            raise ValueError(f"special tokens {extra}: a name or an id is taken, or there twice")
        added = self.spec["added_tokens"] + [_added(name, i) for name, i in new.items()]
        names = {i: name for name, i in specials.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                  "bos_token": names[self.bos], "eos_token": names[self.eos]}
        config.update({f"{kind}_token": f"<{kind}>" for kind in ("unk", "pad") if f"<{kind}>" in specials})
        spec = dict(self.spec, added_tokens=added, model=dict(self.spec["model"]))
        spec["model"]["vocab"] = {**spec["model"]["vocab"], **specials}    # else they get the next ids, gaps or not
        spec["post_processor"] = spec.get("post_processor") or _begin_with(names[self.bos], self.bos)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tokenizer.json", spec)
        write_json(folder / "tokenizer_config.json", config)


# -- CLIP's ----------------------------------------------------------------------------------------------------------

LAST = 0xE000  # Unicode's first character for private use


def _pairs(merges: list) -> list[tuple[str, str]]:
    """Merges of a tokenizer.json, which are "a b" or ["a", "b"]."""
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]


class CLIPTokenizer:
    """CLIP's byte-pair encoding: lower case, words and signs apart, "</w>" at the end of each.

        tokenize = CLIPTokenizer.load(folder, context=77)
        tokenize(["a red star", "a ring"])             # ids (M, T), each row ended, and filled up, by end-of-text
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], context: int):
        self.vocab, self.merges, self.context = vocab, merges, context
        self.begin, self.end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        self._bpe = _clip_bpe(models.BPE(vocab, merges, end_of_word_suffix="</w>"))

    @classmethod
    def load(cls, folder: Path, context: int) -> "CLIPTokenizer":
        if (folder / "tokenizer.json").is_file():
            bpe = read_json(folder / "tokenizer.json")["model"]
            return cls(bpe["vocab"], _pairs(bpe["merges"]), context)
        if (folder / "merges.txt").is_file():
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            return cls(read_json(folder / "vocab.json"), merges, context)
        raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, context: int) -> "CLIPTokenizer":
        """Learned from texts: at most vocab_size pieces. The two special tokens come last, as CLIP's text tower finds
        the end of a text by its id, the largest.

        The trainer knows "</w>" as a suffix, but then numbers a word's last letters in another order each time. So it is
        given these as letters of their own, `LAST` further up, and they get their names afterwards."""
        split, bpe = _clip_bpe(models.BPE()), BPETokenizer(models.BPE())
        words = (word for text in texts for word, _ in split.pre_tokenizer.pre_tokenize_str(split.normalizer.normalize_str(text)))
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                      show_progress=False)
        bpe.train_from_iterator((word[:-1] + chr(LAST + ord(word[-1])) for word in words), trainer)
        model = json.loads(bpe.to_str())["model"]

        def named(piece: str) -> str:
            return f"{piece[:-1]}{chr(ord(piece[-1]) - LAST)}</w>" if ord(piece[-1]) >= LAST else piece

        names = [*map(named, sorted(model["vocab"], key=model["vocab"].get)), "<|startoftext|>", "<|endoftext|>"]
        merges = [(named(left), named(right)) for left, right in _pairs(model["merges"])]
        return cls({name: i for i, name in enumerate(names)}, merges, context)

    def save(self, folder: str | Path) -> None:
        """vocab.json and merges.txt, as transformers' CLIPTokenizer reads them."""
        write_json(Path(folder) / "vocab.json", self.vocab)
        lines = ["#version: 0.2", *(" ".join(merge) for merge in self.merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        ids = [self.begin, *self._bpe.encode(text).ids, self.end]
        if len(ids) > self.context:
            raise ValueError(f"a text of {len(ids)} tokens; CLIP reads at most {self.context}, both ends included")
        return ids

    def pad(self, rows: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [self.end] * (longest - len(row)) for row in rows])  # (M, T)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        if not texts:
            raise ValueError("no text to tokenize; expected a list of one or more")
        return self.pad([self.encode(text) for text in texts])


def _clip_bpe(model: models.BPE) -> BPETokenizer:
    bpe = BPETokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    split = pre_tokenizers.Split(Regex(words), "removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return bpe
