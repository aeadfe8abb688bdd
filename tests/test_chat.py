"""chat.py: prompts against the official rule (golden/chat.json, see golden_chat.py), and what is trained of them."""

import pytest
from tokenizers import Tokenizer as BPETokenizer

from chat import EOS, IMAGE, TEMPLATES, Template, Turn, encode_chat, stop_ids
from conftest import GOLDEN, one_line
from tokenizer import Tokenizer

HOSTILE = ["<s>", "</s>", "<unk>", "<image>", "a</s>b", "<|end|>", "<|eot_id|>", "<|user|>\n", "###", "<0x0A>"]
ANSWERS = ["", "A dog.", " spaced", "\nnew line", "\n", "\n\n\n", "  ", "#", "##", "###", "A###", "…🐱", "▁", *HOSTILE]


def first_turn(template, answer=None, question="What is this?"):
    return Turn("" if template == "plain" else question, answer, image=True)


@pytest.mark.parametrize("case", GOLDEN["prompts"], ids=lambda case: case["template"])
def test_prompts_equal_the_official_rule(tiny, phi_3, case):
    """Bugs: a character of a template wrong; a cut that changes ids; no prefix after </s> or the image."""
    tokenizer = phi_3 if case["template"] == "llava_phi_3" else tiny
    assert encode_chat(tokenizer, case["template"], [Turn(*turn) for turn in case["turns"]])[0] == case["ids"]


def test_llama_3_prompt_equals_the_string_with_special_tokens(llama_3_file):
    """Bug: a character of the template wrong. The tokenizers library finds the special tokens in the whole string."""
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    before = "<|begin_of_text|>" + head.format("system") + (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the "
        "user provides, and assist the user with a variety of tasks using natural language.<|eot_id|>")
    before += head.format("user")
    after = "\nWhat is it?<|eot_id|>" + head.format("assistant") + "A cat.<|eot_id|>" + head.format("user")
    after += "Red?<|eot_id|>" + head.format("assistant")
    whole = BPETokenizer.from_file(str(llama_3_file))
    expected = whole.encode(before).ids + [IMAGE] + whole.encode(after).ids
    tokenizer = Tokenizer.load(llama_3_file)
    assert encode_chat(tokenizer, "llava_llama_3", [Turn("What is it?", "A cat.", True), Turn("Red?")])[0] == expected
    eot, end = (whole.token_to_id(name) for name in ("<|eot_id|>", "<|end_of_text|>"))
    assert stop_ids(tokenizer, "llava_llama_3") == {eot, end}


# -- text remains text -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", TEMPLATES)
def test_special_strings_in_a_text_are_letters(tokenizers, template):
    """Bug: a user writes "</s>" or "<image>" and ends the turn, or shows the model an image that is not there."""
    tokenizer = tokenizers[template]
    special = set(tokenizer.specials.values()) | {IMAGE}

    def structure(text):
        turns = [first_turn(template, text, text)]
        ids, _ = encode_chat(tokenizer, template, turns)
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " "), text
        return [i for i in ids if i in special]

    for text in HOSTILE + list(tokenizer.specials):
        assert structure(text) == structure("plain words"), text
    assert structure(EOS.name) == structure("plain words")


def test_a_later_turn_may_bring_an_image(tiny):
    """Bug: the image put before the first question, or dropped."""
    ids, _ = encode_chat(tiny, "llava_v1", [Turn("a", "b"), Turn("c", image=True)])
    assert ids.count(IMAGE) == 1 and ids.index(IMAGE) > ids.index(tiny.eos)


# -- label mask ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", TEMPLATES)
def test_exactly_the_answers_and_their_ends_are_trained(tokenizers, template):
    """Bug: a mask off by one, which teaches the question's last token or never teaches to stop."""
    tokenizer = tokenizers[template]
    turns = [first_turn(template, "A dog."), Turn("And this?", "Two </s> cats!")][:1 if template == "plain" else 2]
    ids, trained = encode_chat(tokenizer, template, turns)
    assert len(ids) == len(trained)
    runs, start = [], None
    for at, learn in enumerate(trained + [False]):
        if learn and start is None:
            start = at
        if not learn and start is not None:
            runs, start = runs + [ids[start:at]], None
    for turn, run in zip(turns, runs, strict=True):
        end = {"llava_v0": "###", "plain": "\n"}.get(template, "")
        if template == "llava_phi_3":      # in the released code the newline after <|end|> is trained, too
            assert tokenizer.decode(run[-1:]) == "\n"
            run = run[:-1]
        assert tokenizer.decode(run) == turn.answer + end
        if not end:
            assert run[-1] in stop_ids(tokenizer, template)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_prompt_is_a_prefix_of_what_is_trained(tokenizers, template, answer):
    """Bug: an answer's first token joins the prompt's last one in training, and is never met so when sampling."""
    tokenizer = tokenizers[template]
    prompt, untrained = encode_chat(tokenizer, template, [first_turn(template)])
    ids, trained = encode_chat(tokenizer, template, [first_turn(template, answer)])
    assert ids[:len(prompt)] == prompt and not any(untrained)
    assert trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_chat_grows_at_its_end(tokenizers, template, answer):
    """Bug: the next turn changes ids that are in the KV cache already."""
    tokenizer = tokenizers[template]
    before, _ = encode_chat(tokenizer, template, [first_turn(template, answer)])
    after, _ = encode_chat(tokenizer, template, [first_turn(template, answer), Turn("And?")])
    assert after[:len(before)] == before


def test_a_cut_that_no_token_crosses_changes_no_id(tiny):
    """Bug: the cut at an answer gives other ids than the official tokenization of the whole text."""
    for answer in ["A dog.", "", "12 birds", "it's\nred", "  Straße 图 "]:
        turns = [Turn("What?", answer, image=True), Turn("And?", answer)]
        ids, _ = encode_chat(tiny, "llava_v0", turns)
        whole = f"\nWhat?###Assistant: {answer}###Human: And?###Assistant: {answer}###"
        assert ids[ids.index(IMAGE) + 1:] == tiny.encode(whole), answer


# -- errors ----------------------------------------------------------------------------------------------------------

def test_mistakes_in_a_prompt_are_one_line(tiny):
    """Bug: a mistake of the user ends in a traceback, or in a prompt that means something else."""
    for template, turns in [
        ("vicuna", [Turn("a")]), ("llava_v1", []), ("llava_v1", [Turn("a"), Turn("b")]),
        ("llava_v1", [Turn("\ud800")]), ("plain", [Turn("a question", "b", True)]),
        ("plain", [Turn("", "a", True), Turn("", "b")]),
        ("llava_phi_3", [Turn("a")]), ("llava_llama_3", [Turn("a")]),
        ("llava_v1", [Turn(None)]), ("llava_v1", [Turn(b"a")]), ("llava_v1", [Turn("a", 5)]),
    ]:
        with pytest.raises(ValueError) as error:
            encode_chat(tiny, template, turns)
        one_line(error)
    with pytest.raises(ValueError, match="llava_v0"):
        stop_ids(tiny, "llava")


def test_an_empty_question_is_a_question(tiny):
    """Bug: an empty text loses its image or eats its neighbour's prefix."""
    ids, _ = encode_chat(tiny, "llava_v1", [Turn("", image=True)])
    assert ids[ids.index(IMAGE) + 1:] == tiny.encode("\n ASSISTANT:")


def test_stops(tiny, phi_3):
    """Bug: sampling runs past the end of an answer."""
    assert stop_ids(tiny, "llava_v1") == stop_ids(tiny, "llava_v0") == {2}
    assert stop_ids(phi_3, "llava_phi_3") == {2, 500, 507}
    assert Template().end == (EOS,)
