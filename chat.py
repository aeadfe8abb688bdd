"""Words: from the turns of a conversation to token ids and a label mask.

A prompt is a list of parts: texts, special tokens, and the place of the image. Only texts are tokenized; the others
are put in by their ids. So a question that holds "</s>" or "<image>" is a question about these letters. With Vicuna's
tokenizer, `encode_chat(tokenizer, "llava_v1", [Turn("What is in the red box?", "A dog.", image=True)])` is

    BOS "A chat between … USER: " IMAGE "\nWhat is in the red box? ASSISTANT:"           " A dog."       EOS
    1   319 13563 … 29901 29871   -200  29871 13 5618 338 297 278 2654 3800 29973 319 … 319 11203 29889  2
                                                                                  and these four are trained.
Pitfalls
- A text between special tokens or images is tokenized by itself, and LLaMA's tokenizer puts a space before each, its
  dummy prefix: hence the 29871 after the image. Vicuna was trained on this; other rules give other ids.
- Such a text is cut again where the model begins and ends to speak. BPE merges neighbours only, so a cut that no
  token would cross changes no id; and the prompt for sampling is a prefix of the ids for training, whatever the
  answer. (With Llama-3, an answer that begins with a newline would else melt into the two newlines before it.)
- An answer that the model wrote, decoded and encoded again, need not give the ids that were written.

Prompts and the rule for images are those of the released code (llava/conversation.py, tokenizer_image_token).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

IMAGE = -200                            # in a prompt: the patch embeddings of one image go here


# -- prompts: what stands around questions and answers ---------------------------------------------------------------

@dataclass(frozen=True)
class Special:
    """A token placed by its id, in contrast to a str, which is text whatever it says."""
    name: str


BOS, EOS = Special("bos"), Special("eos")          # by whatever name the tokenizer has them
EOT, END = Special("<|eot_id|>"), Special("<|end|>")


@dataclass(frozen=True)
class Turn:
    """A question, its answer (may be None in the last turn), and whether an image comes before the question."""
    question: str
    answer: str | None = None
    image: bool = False


@dataclass(frozen=True)
class Template:
    """opening, then for each turn: user, image, question, assistant, answer, end. The last two are trained."""
    opening: tuple = (BOS,)
    user: tuple = ()
    after_image: str = "\n"
    assistant: tuple = ()
    before_answer: str = ""
    end: tuple = (EOS,)
    stop_names: tuple = ()              # special tokens that end an answer, besides EOS
    stop: str = ""                      # text that ends an answer, for `Stream`
    prefix_everywhere: bool = True      # False: only a text after an image gets the tokenizer's dummy prefix


def _header(role):
    return Special("<|start_header_id|>"), role, Special("<|end_header_id|>"), "\n\n"


HUMAN = ("A chat between a curious human and an artificial intelligence assistant. "
         "The assistant gives helpful, detailed, and polite answers to the human's questions.")
VISION = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
          "user provides, and assist the user with a variety of tasks using natural language.")

TEMPLATES = {
    # Vicuna: what the 7B and 13B models were trained and evaluated with
    "llava_v1": Template(
        opening=(BOS, HUMAN + " "), user=("USER: ",), assistant=(" ASSISTANT:",), before_answer=" "),
    # the prompt on the model card at Hugging Face
    "llava_v0": Template(
        opening=(BOS, HUMAN + "###"), user=("Human: ",), assistant=("###Assistant:",), before_answer=" ",
        end=("###",), stop="###"),
    # The released training code lost the newline after the image; this is the prompt as documented, which has it.
    "llava_llama_3": Template(
        opening=(BOS, *_header("system"), VISION, EOT), user=_header("user"), assistant=(EOT, *_header("assistant")),
        end=(EOT,), stop_names=("<|eot_id|>", "<|end_of_text|>")),
    # Phi-3's tokenizer of the time put one dummy prefix before all that comes up to an image, special tokens too:
    # it is the " " before <|system|>. And the newline after an answer's <|end|> was trained.
    "llava_phi_3": Template(
        opening=(BOS, " ", Special("<|system|>"), "\n" + VISION, END, "\n"), user=(Special("<|user|>"), "\n"),
        assistant=(END, "\n", Special("<|assistant|>"), "\n"), end=(END, "\n"),
        stop_names=("<|end|>", "<|endoftext|>"), prefix_everywhere=False),
    # stage 1: an image and its caption, a line
    "plain": Template(after_image="", end=("\n",), stop="\n"),
}


def encode_chat(tokenizer, template_name: str, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """The prompt of `turns`: (ids, trained), with IMAGE for each image, and trained[t] true where ids[t] is learned.

    For sampling, the last answer is None and the ids end where the model is to speak; for training it is given, and
    the same ids go on. ValueError: an unknown template, a special token that the tokenizer lacks, no turn, an answer
    missing before the last turn, a question for "plain", text that is not Unicode.
    """
    template = _template(template_name)
    _check_turns(template_name, turns)
    ids, trained = [], []
    prefix = True                                              # does the next text get the dummy prefix?
    for (is_text, learn), run in groupby(_parts(template, turns), key=lambda p: (isinstance(p[0], str), p[1])):
        run = [part for part, _ in run]
        if is_text:
            text = "".join(run)
            new = tokenizer.encode(text, prefix)
            prefix = prefix and not text
        else:
            new = [IMAGE if part == IMAGE else tokenizer.special(part.name) for part in run]
            prefix = template.prefix_everywhere or run[-1] == IMAGE
        ids += new
        trained += [learn] * len(new)
    return ids, trained


def _parts(template, turns):
    """Yield (part, trained); a part is a str, a Special or IMAGE."""
    yield from ((part, False) for part in template.opening)
    for turn in turns:
        image = (IMAGE, template.after_image) if turn.image else ()
        for part in (*template.user, *image, turn.question, *template.assistant):
            yield part, False
        if turn.answer is not None:
            for part in (template.before_answer + turn.answer, *template.end):
                yield part, True


def _check_turns(template_name, turns):
    if not turns:
        raise ValueError("a prompt needs at least one turn, got none")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn.question, str) or not isinstance(turn.answer, str | None):
            raise ValueError(f"turn {number} is {turn}; expected text as its question and, if any, its answer")
    for number, turn in enumerate(turns[:-1], 1):
        if turn.answer is None:
            raise ValueError(f"turn {number} of {len(turns)} has no answer; only the last may go without")
    if template_name == "plain" and (len(turns) > 1 or turns[0].question):
        raise ValueError(f"template plain takes one turn with an empty question, got {len(turns)}, "
                         f"the first question being {turns[0].question!r}")


def _template(name):
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; choose from {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def stop_ids(tokenizer, template_name: str) -> set[int]:
    """The set of ids that end an answer. (llava_v0 and plain end at a text: `Stream(stop=TEMPLATES[name].stop)`.)"""
    names = _template(template_name).stop_names
    return {tokenizer.eos} | {tokenizer.specials[name] for name in names if name in tokenizer.specials}
