"""Is an answer right? Five scorers, pure functions of text: no model, no file, no judge on the network.

| function  | for                            | answers with                                                         |
|-----------|--------------------------------|----------------------------------------------------------------------|
| exact     | Visual7W, PointQA, VCR         | right or wrong, as the released ViP-LLaVA evaluation counts          |
| normalise | VQA data sets                  | the text after the VQA clean-up; compare two of them with ==         |
| matches   | ViP-Bench, without GPT-4       | the share of the truth that is found: 0.0 to 1.0                     |
| tokenize  | captions                       | the words that caption metrics count                                 |
| cider_d   | RefCOCOg and other captions    | CIDEr-D of each item (arXiv 1411.5726); their mean is the corpus's   |

Pitfalls. `normalise` and `tokenize` keep the faults of the programs that published numbers come from: repaired, they
would give other numbers. `matches` has no such past and reads numbers with care. CIDEr-D weighs words by how rare they
are among *all* truths given, so that the scores of a part of a data set are not a part of its scores.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}


def exact(answer: str, truth: str) -> bool:
    """Equal but for case and the answer's outer white space. The truth's is not forgiven; nor is a full stop."""
    return answer.strip().lower() == truth.lower()


# -- the clean-up of VQA ---------------------------------------------------------------------------------------------

CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"""
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in CONTRACTED.split()  # with one apostrophe forgotten:
                for i, letter in enumerate(word) if letter == "'"}            # dont, couldnt've, couldn'tve
CONTRACTIONS["somebody'd"] = "somebodyd"  # backwards in the table that everybody uses
VQA_WORDS = NUMBERS | {"none": "0"}


def normalise(text: str) -> str:
    """A text as the evaluation of VQA compares it: lower case, digits for zero to ten, no articles, no punctuation.

    Other punctuation than commas, question marks and full stops becomes a space ("t-shirt" -> "t shirt"); but if it
    touches a space *anywhere* in the text, it vanishes everywhere ("t-shirt - red" -> "tshirt red"). A full stop stays
    before a digit, "none" is 0. Faults that published numbers contain: "-1" becomes "1", "3/4" becomes "3 4", "3,4"
    becomes "34", "the dog's" becomes "dog 's", and of the full stops only the first 32 go.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    before = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in ';/[]"{}()=+\\_-><@`!':
        text = text.replace(mark, "" if mark + " " in before or " " + mark in before else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [VQA_WORDS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


# -- ViP-Bench without its judge -------------------------------------------------------------------------------------

PIECES = re.compile(r"""
    (?:(?<![^\W_])(?<!\))-)? (?:\d+(?:[.:/]\d+)+ | \.\d+ | \d+(?![^\W_]))    # 0.75, 3/4, .5, -1; no sign in x-1
  | (?<=[^\W_])'[^\W_]+                                                      # the 's of dog's
  | [^\W_]+                                                                  # a word; 2x, 1st
  | [=+^%$€£°]                                                               # of x = 0.75, of $4.50
""", re.VERBOSE)


def _pieces(text: str) -> list[str]:
    text = text.lower().replace("’", "'").replace("\N{MINUS SIGN}", "-")
    text = re.sub(r"\b(?:an?|the)\s+(?=\w)", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return [NUMBERS.get(piece, piece) for piece in PIECES.findall(text)]


def matches(answer: str, truth: str) -> float:
    """Which share of the truth's parts the answer holds: the parts stand between <AND>s, each a choice between <OR>s.

    "yes<AND>tomato<OR>tomatoes" asks for yes and for either of the others. A part is found where its pieces follow one
    another in the answer. `normalise` would not do here: it takes the sign off -1 and turns 3/4 into "3 4" or "34".
    So numbers are single pieces, with sign, fraction and decimals: 1 is neither in -1 nor in 1/2, and 5 neither in
    0.75 nor in 15, but it is in "is 5.", "$5" and "x-5". Thousands lose their comma, zero to ten become digits,
    articles before a word go (a final "A" may be the answer), hyphens part words, other punctuation is skipped.
    An empty part is never found. GPT-4, the judge that ViP-Bench names, also sees what is said in other words:
    this score stays below its score on open questions, and above it where the right words stand in a wrong sentence.
    """
    def found(part: str) -> bool:
        wanted = _pieces(part)
        return bool(wanted) and any(held[i:i + len(wanted)] == wanted for i in range(len(held)))

    held, parts = _pieces(answer), truth.split("<AND>")
    return sum(any(found(choice) for choice in part.split("<OR>")) for part in parts) / len(parts)


# -- captions --------------------------------------------------------------------------------------------------------

SIGMA = 6  # words: how far lengths may differ in CIDEr-D
CAPTION_WORDS = re.compile(r"""                               # L a letter, A a letter or digit, E no more of these
    'n' | (?:n't | '(?:s|m|d|re|ve|ll|em|n|cause|til)) E       # what don't and dog's are cut into; rock 'n' roll
  | no\.(?=\s*\d) | A+\.(?=[,;:])                              # no. 5, but the answer is no; the yes. of "yes., no"
  | L+?(?=n'tE) | 't(?=(?:is|was)E)                            # do n't, 't is
  | can(?=notE) | (?:gon|wan)(?=naE) | got(?=taE) | (?:lem|gim)(?=meE)    # can not, gon na
  | (?:ma'am|ol') E | [dlo]'LAA+ | y'(?=L) | '[2-9]0sE                # o'clock, y' all, the '90s
  | A+(?:-L+){0,2} (?:/A+(?:-L+){0,2}){1,2}                    # red/green, 3/4
  | A(?:A|\.)* (?:-A+)+                                        # t-shirt, 1.5-inch, u.s.-based
  | (?:L(?:\.L)* | mrs? | ms | dr | st | mt | ft | ave | blvd | rd | jr | sr | co | inc | vs | etc) \.(?!L)
  | LA*(?:[.!?]LA*)*                                           # a word; two, where a space was forgotten
  | (?:(?<!-)[-+])? \d*(?:[.:,]\d+)+                           # 0.75, 1,000, 10:30
  | (?<!-)[-+]\d+ | A+                                         # -1; 5, 1st, 2x4
  | [#@]LA* | [!?]{2,} | \*+ | [\[\](){}#$%&+/<=>@\\^_|~°£€¢]  # symbols
""".replace("L", r"[^\W\d_]").replace("A", r"[^\W_]").replace("E", r"(?![^\W_])"), re.VERBOSE)
RENAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
           "£": "#", "€": "$", "¢": "cents"}


def tokenize(text: str) -> list[str]:
    """The words of a caption, nearly as the COCO evaluation cuts them: Stanford's tokenizer for the Penn Treebank.

    Lower case, first of all. Verb endings and 's stand alone ("do n't", "dog 's"); a few verbs are cut in two ("can
    not", "gon na"). One word is: what hyphens hold together; up to three parts between slashes; a number with its sign,
    points, commas and colons; letters with a full stop each ("u.s.", and a last "b." too); one of the abbreviations
    above; two words with a full stop and no space between. Single punctuation marks, dashes, dots and quotes are
    dropped. Symbols stay, "?!" too, and brackets: the evaluation means to drop those, but it looks for -LRB-, in
    capitals, among words in lower case, so that ( counts as the word -lrb-.

    Left out: smileys, web addresses, tags, telephone numbers, "B&W" as one word, a_b, rarer abbreviations and symbols.
    """
    return [RENAMED.get(word, word) for word in CAPTION_WORDS.findall(text.lower().replace("’", "'"))]


def ngrams(words: list[str]) -> Counter:
    """How often each run of one to four words occurs."""
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def cider_d(answers: Sequence[str], truths: Sequence[Sequence[str]],
            cut: Callable[[str], list[str]] = tokenize) -> list[float]:
    """CIDEr-D of each answer, 0 to 10, against the truths of its item. Papers print 100 x the mean of all items.

        w(g) = count of n-gram g in a text x (log N - log max(1, df(g)))     N items; df of them have g in a truth
        s_n  = sum over g of min(w_a(g), w_t(g)) w_t(g) / (|w_a| |w_t|)      answer a, truth t; n = 1, 2, 3, 4
        s    = exp(-(words in a - words in t)^2 / (2 SIGMA^2)) x (s_1 + s_2 + s_3 + s_4) / 4
        the score is 10 x the mean of s over the item's truths

    The minimum keeps an answer from gaining by saying a word again and again. What is in the truths of every item
    weighs nothing; hence with a single item every score is 0. `cut` makes words of a text.
    """
    if len(answers) != len(truths):
        raise ValueError(f"{len(answers)} answers for {len(truths)} items; expected one for each")
    for i, texts in enumerate(truths):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"the truths of item {i} are {texts!r}; expected a list of at least one text")
    words = [[cut(text) for text in texts] for texts in truths]
    items_with = Counter(gram for texts in words for gram in set().union(*map(ngrams, texts)))

    def weights(text: list[str]) -> list[dict]:  # one dictionary for each n
        by_length = [{}, {}, {}, {}]
        for gram, count in ngrams(text).items():
            by_length[len(gram) - 1][gram] = count * (math.log(len(truths)) - math.log(max(1, items_with[gram])))
        return by_length

    def similarity(answer: list[str], truth: list[str]) -> float:
        total = 0.0
        for a, t in zip(weights(answer), weights(truth)):
            shared = sum(min(w, t[gram]) * t[gram] for gram, w in a.items() if gram in t)
            if shared:
                total += shared / (math.hypot(*a.values()) * math.hypot(*t.values()))
        return total / 4 * math.exp(-(len(answer) - len(truth)) ** 2 / (2 * SIGMA ** 2))

    return [10 * sum(similarity(answer, text) for text in texts) / len(texts)
            for answer, texts in zip(map(cut, answers), words)]
