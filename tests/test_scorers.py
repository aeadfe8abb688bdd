"""evals/scorers.py against the official programs (golden/scorers.json, see golden_scorers.py), and by hand."""

import json
import math

import pytest

from conftest import GOLDEN_FOLDER, one_line
from evals.scorers import CONTRACTIONS, cider_d, exact, matches, normalise, tokenize

GOLDEN = json.loads((GOLDEN_FOLDER / "scorers.json").read_text(encoding="utf-8"))
FEW = (1, 2, 7)
RAW = [texts for texts, _, _ in GOLDEN["captions"]]
WORDS = [texts for _, texts, _ in GOLDEN["captions"]]
SCORES = [score for _, _, score in GOLDEN["captions"]]


def ours(items, **how):
    return cider_d([texts[0] for texts in items], [texts[1:] for texts in items], **how)


def close(scores):
    return pytest.approx(scores, rel=1e-9, abs=1e-12)


# -- exact -----------------------------------------------------------------------------------------------------------

def test_exact_equals_the_released_line():
    """Guards against casefold for lower (ß = ss), and against white space forgiven in the truth."""
    assert len(GOLDEN["exact"]) >= 200 and 50 < sum(right for _, _, right in GOLDEN["exact"]) < 200
    assert [exact(answer, truth) for answer, truth, _ in GOLDEN["exact"]] == [right for _, _, right in GOLDEN["exact"]]


@pytest.mark.parametrize("answer, truth, right", [
    (" Yes\n", "yes", True), ("yes", "YES", True), ("yes.", "yes", False), ("yes", "yes ", False), ("", "", True),
    ("the dog", "dog", False), ("Straße", "STRASSE", False),
])
def test_exact(answer, truth, right):
    """Guards against an accuracy that forgives a full stop or an article."""
    assert exact(answer, truth) is right


# -- normalise -------------------------------------------------------------------------------------------------------

def test_normalise_equals_the_official_class():
    """Guards against a contraction, a number or a mark missing; each contraction of the official table occurs."""
    assert len(GOLDEN["normalised"]) >= 200
    wrong = [(text, normalise(text), theirs) for text, theirs in GOLDEN["normalised"] if normalise(text) != theirs]
    assert wrong == []


@pytest.mark.parametrize("text, theirs", [
    ("The man's T-shirt.", "man 's t shirt"), ("t-shirt - red", "tshirt red"), ("None of a dozen", "0 of dozen"),
    ("Ten, zero", "10 0"), ("dont couldnt've couldn'tve", "don't couldn't've couldn't've"), ("somebody'd", "somebodyd"),
    ("-1", "1"), ("3/4", "3 4"), ("0.75, 3/4", "0.75 3 4"), ("0.75 or 3/4 ?!", "0.75 or 3 4"), ("x = 3/4", "x 3 4"),
    ("1/2 /", "12"), ("x/(y(z", "x y z"), ("3,4", "34"), ("5.", "5"), ("$4.50", "$4.50"),
    ("a\tb\nc", "b c"), (" ?! ", ""),
    ("." * 33 + "a", ".a"), (". " * 33, "."),
])
def test_normalise(text, theirs):
    """Guards against faults repaired: the rule of the touching space, minus signs, the 32 full stops. By hand."""
    assert normalise(text) == theirs


def test_contractions_lead_to_words_with_their_apostrophe():
    """Guards against a list of words cut at the wrong place: all but one entry add exactly one apostrophe."""
    odd = {word for word, whole in CONTRACTIONS.items() if len(whole) != len(word) + 1 or whole.count("'") < 1}
    assert odd == {"somebody'd"} and CONTRACTIONS["yall"] == "y'all" and "its" not in CONTRACTIONS


# -- matches ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, truth, score", [
    ("Yes, tomatoes.", "yes<AND>tomato<OR>tomatoes", 1.0), ("A tomato", "yes<AND>tomato<OR>tomatoes", 0.5),
    ("yes", "yes<AND>tomato<OR>tomatoes", 0.5), ("no", "yes<AND>tomato<OR>tomatoes", 0.0),
    ("red and green", "red<OR>blue<AND>green<AND>white", 2 / 3), ("x = -1 or x = -5", "-1 <AND> -5", 1.0),
    ("x = -5 or 5", "-1 <AND> -5", 0.5), ("x = 3", "-1 <AND> -5", 0.0),
])
def test_or_binds_tighter_than_and(answer, truth, score):
    """Guards against (yes and tomato) or tomatoes, and against all or nothing in place of a share."""
    assert matches(answer, truth) == pytest.approx(score)


@pytest.mark.parametrize("answer", [
    "0.75", "It is 0.75.", "x=0.75", "x = 0.75", "The value of x is 3/4.", "**0.75**", "(0.75)", "0.75, I think",
])
def test_numbers_are_found_as_they_are_written(answer):
    """Guards against clean-up that breaks numbers up, as that of VQA does. The truth is one of ViP-Bench."""
    assert matches(answer, "0.75<OR>x=0.75<OR>3/4") == 1.0


@pytest.mark.parametrize("answer, part, found", [
    ("x is -1", "1", False), ("x=-1", "1", False), ("x=-1", "-1", True), ("x = \N{MINUS SIGN}1", "-1", True),
    ("1", "-1", False), ("x-1", "1", True), ("x-1", "-1", False), ("(x)-1", "-1", False), ("(-1)", "-1", True),
    ("0.75", "5", False), ("0.75", "75", False), ("0.75", "0", False), ("15", "5", False), ("15", "1", False),
    ("is 5.", "5", True), ("is 5.5.", "5.5", True), ("5, not 6", "5", True), ("1/2", "1", False), ("1/2", "2", False),
    ("-1/2", "1/2", False), (".5", "5", False), ("-.5", ".5", False), ("1st", "1", False), ("2x", "2", False),
    ("$4.50", "$4.50", True), ("$4.50", "4.50", True), ("4.50", "$4.50", False), ("$14.50", "$4.50", False),
    ("$1,000", "1000", True), ("1, 2,3", "2", True), ("1,000", "1", False), ("10:30am", "10:30", True),
    ("50%", "50", True), ("five dogs", "5", True), ("5 dogs", "five", True), ("90°", "90", True),
    ("10:30", "30", False),
])
def test_numbers_are_whole(answer, part, found):
    """Guards against 1 found in -1, 5 in 0.75 or 15, and against a full stop that hides the last number."""
    assert matches(answer, part) == float(found)


@pytest.mark.parametrize("answer, part, found", [
    ("a category", "cat", False), ("The cat's tail", "cat", True), ("it's", "s", False), ("The letter 'S'.", "S", True),
    ("a red  big ball", "red ball", False), ("the red, the ball", "red ball", True), ("T-shirt", "t shirt", True),
    ("the White House", "white house", True), ("snow", "no", False), ("ball red", "red ball", False),
    ("don’t", "don't", True), ("The answer is A.", "A", True), ("A cat", "A", False),
    ("red ball", "the red ball", True), ("café", "CAFÉ", True), ("", "yes", False), ("red", "red ball", False),
])
def test_words_are_whole_and_in_order(answer, part, found):
    """Guards against a search in the text's letters, and against words found anywhere instead of in one run."""
    assert matches(answer, part) == float(found)


@pytest.mark.parametrize("answer", ["", "yes", "the"])
@pytest.mark.parametrize("truth, score", [
    ("", 0), (" . ", 0), ("<OR>", 0), ("<AND>", 0), ("yes<AND>", 0.5), ("<OR>yes", 1),
])
def test_an_empty_part_is_never_found(answer, truth, score):
    """Guards against the empty run of words, which stands in every answer."""
    assert matches(answer, truth) == (score if answer == "yes" else 0)


# -- captions --------------------------------------------------------------------------------------------------------

def test_words_equal_those_of_the_official_tokenizer():
    """Guards against any rule of the pattern changed: all golden captions have the words of Stanford's tokenizer."""
    pairs = [(raw, words) for raws, texts in zip(RAW, WORDS) for raw, words in zip(raws, texts, strict=True)]
    assert len(RAW) >= 200 and {len(texts) - 1 for texts in RAW} == {1, 2, 3, 4, 5}
    wrong = [(raw, " ".join(tokenize(raw)), words) for raw, words in pairs if " ".join(tokenize(raw)) != words]
    assert wrong == []


@pytest.mark.parametrize("text, words", [
    ("A man's t-shirt, isn't it?", "a man 's t-shirt is n't it"), ("They’re the dogs'.", "they 're the dogs"),
    ("Cannot, can't; gonna", "can not ca n't gon na"), ("'Twas o'clock 'til 'em", "'t was o'clock 'til 'em"),
    ("lemme rock 'n roll", "lem me rock 'n roll"), ("Mr.Smith", "mr.smith"),
    ("red/green/blue/black", "red/green/blue / black"),
    ("-1 a-1 +0.5 1,000 10:30am 1st", "-1 a-1 +0.5 1,000 10:30 am 1st"),
    ("Mr. X of the U.S. is on top.", "mr. x of the u.s. is on top"), ("option b. The end.", "option b. the end"),
    ("no. 5 is no.", "no. 5 is no"), ("the man.The dog", "the man.the dog"), ("a -- b … c - d — e", "a b c d e"),
    ("what?! what? no!!", "what ?! what no !!"), ('"a" `b\' “c”', "a b c"),
    ("(a) [b] {c}", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb-"),
    ("$5 £5 €5 5¢ 5%", "$ 5 # 5 $ 5 5 cents 5 %"), ("...", ""), ("", ""),
])
def test_tokenize(text, words):
    """Guards against each rule undone, and against brackets dropped, as the official list means but does not do."""
    assert tokenize(text) == words.split()


def test_cider_d_equals_the_official_scorer():
    """Guards against each term of the formula: the same numbers from the official words and from the texts."""
    assert ours(WORDS, cut=str.split) == close(SCORES)
    assert ours(RAW) == close(SCORES)
    assert max(SCORES) > 5 and min(SCORES) == 0 and len(set(SCORES)) > 200


@pytest.mark.parametrize("n, scores", list(zip(FEW, GOLDEN["few"])))
def test_cider_d_depends_on_the_items_given(n, scores):
    """Guards against frequencies kept from an earlier call. A single item scores 0, and so do the official scores."""
    assert ours(WORDS[:n], cut=str.split) == close(scores)
    assert n > 1 or scores == [0.0]


def test_cider_d_by_hand():
    """Guards against words of all truths that weigh something, and against the sum of four lengths for their mean.

    N = 2. "a" is in the truths of both items: weight log 2 - log 2 = 0; every other n-gram: log 2 =: w, also "red box",
    which is in none. Item 1, words: (red, box) and (red, ball): w^2 / (sqrt(2) w)^2 = 1/2; pairs: (a red, red box) and
    (a red, red ball): 1/2; triples: 0; fours: there are none, 0. 10 (1/2 + 1/2) / 4 = 2.5. Item 2: 1 + 1 + 1 + 0.
    """
    assert cider_d(["a red box", "A blue box."], [["a red ball"], ["a blue box"]]) == pytest.approx([2.5, 7.5])


def test_cider_d_by_hand_with_repetition_and_two_truths():
    """Guards against a missing minimum, a missing penalty of length, and the best truth taken for the mean of truths.

    Answer (3 red, ball), norm sqrt(10) w; first truth (red, ball), sqrt(2) w; shared min(3, 1) 1 + 1 = 2: 2 / sqrt(20).
    Pairs: (2 red red, red ball), sqrt(5) w; (red ball), w; shared 1: 1 / sqrt(5). Together 2 / sqrt(5). Two words more:
    exp(-2^2 / 72). The second truth shares nothing, which halves the score.
    """
    expected = 10 * (2 / math.sqrt(5)) / 4 * math.exp(-4 / 72) / 2
    assert cider_d(["red red red ball", ""], [["red ball", "blue"], ["green chair"]]) == pytest.approx([expected, 0])


@pytest.mark.parametrize("answers, truths", [([""], [["a dog"]]), (["a dog"], [["a dog"]]), (["a"], [[""]]), ([], [])])
def test_cider_d_of_one_item_is_zero(answers, truths):
    """Guards against a division by a norm of 0: nothing is rare where there is one item, nor in an empty text."""
    assert cider_d(answers, truths) == [0.0] * len(answers)


@pytest.mark.parametrize("answers, truths, words", [
    (["a", "b"], [["a"]], "2 answers for 1 items; expected one for each"),
    (["a"], ["a dog"], "the truths of item 0 are 'a dog'; expected a list"),
    (["a"], [[]], "the truths of item 0 are []; expected a list of at least one text"),
    (["a", "b"], [["a"], ()], "the truths of item 1 are (); expected a list of at least one text"),
])
def test_cider_d_mistakes(answers, truths, words):
    """Guards against answers cut off by zip, and against a text taken for a list of letters."""
    with pytest.raises(ValueError) as error:
        cider_d(answers, truths)
    assert words in one_line(error)
