"""The tests run on the CPU; and tokenizers of the three kinds, small, that the tests of several files share."""

import json
import os
import shutil
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks, and in the processes that tests start
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"  # which sample.py would set for all tests after its own

import pytest
from tokenizers import Regex, Tokenizer as BPETokenizer, decoders, models, pre_tokenizers, trainers

from tokenizer import Tokenizer

GOLDEN_FOLDER = Path(__file__).parent / "golden"
TINY = GOLDEN_FOLDER / "tiny.model"
GOLDEN = json.loads((GOLDEN_FOLDER / "chat.json").read_text(encoding="utf-8"))  # see golden_chat.py
LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
with_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a compiler for C++")


@pytest.fixture(scope="session")
def tiny():
    return Tokenizer.load(TINY)


@pytest.fixture(scope="session")
def phi_3(tmp_path_factory):
    """tiny.model with Phi-3's special tokens, named as Phi-3 does in added_tokens.json beside it."""
    folder = tmp_path_factory.mktemp("phi_3")
    shutil.copy(TINY, folder / "tokenizer.model")
    (folder / "added_tokens.json").write_text(json.dumps(GOLDEN["added_tokens"]))
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def llama_3_file(tmp_path_factory):
    """A byte-level tokenizer.json with Llama-3's cut into words and its special tokens."""
    bpe = BPETokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    texts = [text for text, _, _ in GOLDEN["texts"]]
    bpe.train_from_iterator(["system\n\nuser\n\n\nassistant the cat is the red box.\n" * 3, *texts], trainer)
    bpe.add_special_tokens(LLAMA_3)
    path = tmp_path_factory.mktemp("llama_3") / "tokenizer.json"
    bpe.save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizers(tiny, phi_3, llama_3_file):
    return {"llava_v1": tiny, "llava_v0": tiny, "plain": tiny, "llava_phi_3": phi_3,
            "llava_llama_3": Tokenizer.load(llama_3_file)}


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) > 20
    return str(error.value)
