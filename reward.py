"""What a text is worth: what a rewrite earns, how a problem is asked, how an answer is read.

    1. the reward   gate, alignment, penalty (DART, arXiv 2605.26924; the formula is our reconstruction)
    2. prompts      the words in which a problem is put to a model
    3. token ids    the same as ids; where an answer ends
    4. reading      one spelling for characters and LaTeX, tokens, exact values of arithmetic
    5. answers      completion -> answer -> right or wrong
    6. programs     completion -> program -> whether its tests pass, in a sandbox
    7. cheats       what a rewrite can do to look good without being good
    8. kinds        what a problem of mathematics or of code asks for, and how its answers are read and judged

Nothing but the standard library is imported at the top: grading runs in worker processes that run this file afresh, and
a grader that first loads torch starts seconds late.
"""

from __future__ import annotations

import ast
import bisect
import functools
import itertools
import json
import logging
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

# ---------------------------------------------------------------------------------------------------------------------
# 1. The reward of a rewrite. Source: DART (arXiv 2605.26924) names the three parts, likelihood, correctness and
#    penalty. Its text and a link to its code are public, but we could not read them: the formula is our reconstruction.

# 0 or 1: worth nothing
HARD = ("early_answer", "no_reasoning", "mentions_source", "hedged", "false_arithmetic", "hardcodes_tests")
SOFT = ("padding", "repetition", "copies_problem")  # in [0, 1]: worth less


def mapper_reward(parts: dict, align: float, soft_weight: float, hard_weight: float) -> float:
    """R = clean * max(0, align - w_s * sum_k soft_k) - w_h * [a hard cheat]; `parts` is what `judge` returns.

    A clean text is never worth less than a wrong one, which has 0. Source: our reconstruction."""
    soft = sum(parts[name] for name in SOFT)
    return parts["clean"] * max(0.0, align - soft_weight * soft) - hard_weight * parts["cheating"]


def align_nll(A: float, A_expert: float, tau: float) -> float:
    """sigmoid((A(y|x) - A(y°|x)) / tau), in (0, 1): how much likelier than the expert's text.

    A are mean log-probabilities of a token in nats, tau > 0 likewise. Source: our reconstruction.
    """
    return 0.5 + 0.5 * math.tanh((A - A_expert) / (2 * tau))  # sigmoid(z) = 1/2 + 1/2 tanh(z/2), never overflows


def align_gain(A: float, A_expert: float, tau: float) -> float:
    """max(0, 2 sigmoid((A(y|x) - A(y°|x)) / tau) - 1), in [0, 1): as `align_nll`, but a copy of the expert's text gains
    nothing and earns nothing. By `align_nll` it earns 0.5 without a risk, which a real mapper finds (results/real.md).

    Source: ours."""
    return max(0.0, 2 * align_nll(A, A_expert, tau) - 1)


def align_kl(mapper_logprobs: typing.Sequence[float], target_logprobs: typing.Sequence[float], beta: float) -> float:
    """1 - beta * clip(D, 0, 2), D = mean_t clip(log M(y_t|p,y_<t) - log pi(y_t|c,y_<t), -5, 5): one sample of
    KL(M || pi), the mapper's own entropy included. Both: (T,) log-probabilities in nats of the rewrite's T >= 1 tokens
    (ZeroDivisionError for none). Source: our reconstruction."""
    gaps = [min(max(float(m) - float(t), -5.0), 5.0) for m, t in zip(mapper_logprobs, target_logprobs)]
    return 1 - beta * min(max(sum(gaps) / len(gaps), 0.0), 2.0)


def judge(
    problem: str,
    expert: str,
    rewrite: str,
    answer: str,
    ended: bool,
    correct: bool,
    min_fidelity: float,
    hard: typing.Sequence[str] = HARD,
    kind: str = "math",
) -> dict[str, float]:
    """All that is to be known of a rewrite but its likelihood. Source: our reconstruction.

    gate = ended, exactly one box (program), correct, the last arithmetic statement agrees with the box, fidelity >=
    min_fidelity; a program's fidelity is 1. `hard` names the terms that count as hard cheats; another name is a
    KeyError. All values are numbers: 0 or 1 for hard terms, one_answer, gate, cheating and clean; [0, 1] for soft
    terms, fidelity and copy; a ratio of characters.
    """
    parts = cheats(problem, expert, rewrite, answer, kind)
    found = KINDS[kind].found(rewrite)
    parts["fidelity"], agrees = KINDS[kind].consistent(expert, rewrite)
    parts["one_answer"] = float(len(found) == 1 and bool(found[0][2]))
    gate = ended and correct and parts["one_answer"] and agrees and parts["fidelity"] >= min_fidelity
    cheating = any(parts[name] for name in hard)
    return parts | {
        "gate": float(gate),
        "cheating": float(cheating),
        "clean": float(gate and not cheating),
        "length_ratio": len(rewrite) / max(len(expert), 1),
        "copy": _share(expert, rewrite, 4),
    }


# ---------------------------------------------------------------------------------------------------------------------
# 2. Prompts. The target is asked in exactly the same way in SFT, in scoring and in evaluation: base scores move by many
#    points with the prompt, so a second wording anywhere would compare prompts and not methods.


def solve_prompt(problem: str, kind: str = "math") -> str:
    """c(x): the plain question. SFT trains on it, A(y|x) conditions on it, evaluation asks it. `kind` is of KINDS."""
    return f"{problem}\n\n{KINDS[kind].asks}"


def map_prompt(problem: str, solution: str, kind: str = "math") -> str:
    """p(x, y°): problem and expert solution, for the mapper, which answers with a rewrite."""
    return (
        f"Problem:\n{problem}\n\nSolution:\n{solution}\n\n"
        "Rewrite this solution in your own words, as if you had solved the problem yourself. "
        f"Keep every step, and put {KINDS[kind].place}"
    )


def guided_prompt(problem: str, solution: str, kind: str = "math") -> str:
    """Mind the Gap's second attempt: solve the problem again, with the expert's solution in view."""
    return (
        f"Problem:\n{problem}\n\nHere is a worked solution, for you alone:\n{solution}\n\n"
        "Understand it first. Then solve the problem again in your own way, explaining each step, without copying or "
        f"mentioning what you were shown. Put {KINDS[kind].place}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# 3. Token ids. Training, scoring, rewriting and evaluation all turn text into ids here, and nowhere else.

# For every template: no thinking; and one date, since Llama 3.x writes today's into its prompt: a model that is trained
# today would be evaluated tomorrow under another prompt.
_TEMPLATE = dict(enable_thinking=False, date_string="26 Jul 2024")


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Token ids of one user turn, up to where the assistant starts to speak."""
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **_TEMPLATE)


def response_ids(tokenizer, text: str) -> list[int]:
    """Token ids of an assistant's answer with its stop id. No template renders it: templates trim and rewrite."""
    return tokenizer.encode(text, add_special_tokens=False) + [stop_id(tokenizer)]


def text_ids(tokenizer, problem: str, text: str, kind: str = "math") -> tuple[list[int], list[int]]:
    """What fine-tuning sees of a text: the ids of the plain question, and those of the text with its stop id."""
    return prompt_ids(tokenizer, solve_prompt(problem, kind)), response_ids(tokenizer, text)


@functools.lru_cache
def stop_id(tokenizer) -> int:
    """The one id that training puts behind an answer: what the chat template puts there, else the tokenizer's EOS."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False, **_TEMPLATE).rpartition("ANSWER")[2]
    ids = tokenizer.encode(after.lstrip(), add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id


@functools.lru_cache
def stop_ids(tokenizer) -> frozenset[int]:
    """Every id that ends an answer: `stop_id`, the tokenizer's EOS and those of the model's generation_config.

    Base models end with their EOS whatever the chat template says: sampling that knew the template's end alone would
    run on behind it, and count a finished answer as truncated.
    """
    from transformers import GenerationConfig

    try:
        more = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
    except OSError:  # a model without a generation_config.json
        more = None
    more = more if isinstance(more, list) else [more]
    return frozenset(i for i in (stop_id(tokenizer), tokenizer.eos_token_id, *more) if i is not None)


def decode(tokenizer, ids: typing.Sequence[int]) -> str:
    """Text of a completion without the id that ended it. Other special tokens stay visible: hiding them would hide a
    fault."""
    ended = len(ids) and ids[-1] in stop_ids(tokenizer)
    return tokenizer.decode(list(ids[:-1] if ended else ids), clean_up_tokenization_spaces=False)


def used_vocabulary(tokenizer) -> int:
    """Number of ids that mean something; embeddings are often padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


def load_tokenizer(folder: str):
    """The tokenizer of a model folder. Ends the program (SystemExit with one line) if it cannot say how a question is
    asked or where an answer ends."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        told = f"no tokenizer could be loaded ({str(error).splitlines()[0]}); give a Hugging Face model folder"
        raise SystemExit(f"{folder}: {told}") from None
    if not tokenizer.encode("1 + 1", add_special_tokens=False):
        raise SystemExit(f"{folder}: the tokenizer has no vocabulary; is tokenizer.json missing?")
    if not tokenizer.chat_template:
        plain = "{{ bos_token }}{% for m in messages %}{{ m.content }}\\n\\n{% endfor %}"
        told = "the tokenizer has no chat template; for a base model, put a file chat_template.jinja into the folder"
        raise SystemExit(f"{folder}: {told}, for plain text: {plain}")
    if stop_id(tokenizer) is None:
        told = "neither the chat template nor the tokenizer names an end-of-answer token; set eos_token"
        raise SystemExit(f"{folder}: {told}")
    return tokenizer


def check_same_tokenizer(one, other) -> None:
    """Ends the program unless ids mean the same in both: rewrites are exchanged as ids and scored as ids."""
    parts = {"vocabulary": lambda t: t.get_vocab(), "chat template": lambda t: t.chat_template}
    for name, part in (parts | {"end of an answer": stop_id}).items():
        if part(one) != part(other):
            told = f"{one.name_or_path} and {other.name_or_path} must share a tokenizer"
            raise SystemExit(f"{told}; they differ in: {name}")


# ---------------------------------------------------------------------------------------------------------------------
# 4. Reading. Characters and LaTeX get one spelling, the text becomes tokens, and what is arithmetic has an exact value.
#    Answers and the arithmetic inside of rewrites are read by the same few functions.

_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "≤": r"\le ", "≥": r"\ge "}
    | {"≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "±": r"\pm ", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt"}
    | {"∪": r"\cup ", "∈": r"\in ", "°": r"^\circ ", "⁄": "/", "。": ". ", "、": ", ", "→": r"\to ", "⇒": r"\to "}
)
_COMMANDS = {
    name: by
    for by, names in (
        *((r"\frac", "dfrac tfrac cfrac"), (r"\binom", "dbinom tbinom"), (r"\le", "leq leqslant"), (r"\ne", "neq")),
        *((r"\ge", "geq geqslant"), (r"\to", "implies Rightarrow"), (r"\emptyset", "varnothing"), ("(", "langle")),
        *((")", "rangle"), ("...", "ldots cdots dots"), (", ", "quad qquad"), (" ohm ", "Omega")),
        ("", "left right displaystyle textstyle limits big Big bigl bigr Bigl Bigr small large Large LARGE huge Huge"),
    )
    for name in names.split()
}
_TEXT = (
    r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt)|boldsymbol|underline|mbox|operatorname|rm|bf)\s?"
    r"\{((?:[^{}]|\{[^{}]*\})*)\}"
)
# units of one letter; in a formula without \text they are variables
_LETTERS = dict(zip("mgshLlJNVWAK", "meter gram second hour liter liter joule newton volt watt ampere kelvin".split()))
_DEGREES = dict(F=" degrees fahrenheit ", C=" degrees celsius ", K=" kelvin ")

_LATEX = [
    (r"\\([A-Za-z]+)", lambda m: _COMMANDS.get(m[1], m[0])),
    (r"\[asy\](?:(?!\[asy\])[\s\S])*?\[/asy\]", ""),  # a figure's program, in MATH
    (r"\\\\\s*\[[^\]\n]{0,9}\]", r"\\\\"),  # the distance of two rows
    (r"\{\\(rm|bf)[\s\\]+([^{}]*)\}", r"\\\1{\2}"),
    (r"(?<=\d)(?:\{,\}|,?\\[,!;:] ?|\\ )(?=\d{3}(?!\d))", ""),  # 1{,}000, 15,\!000, 2\,500
    (r"\\(?:text)?color\s?\{[a-z]+\}|(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;: ()]|~", " "),
    (r"(?<!\\)\\[\[\]]|\$\$|\\(?:begin|end)\{(?:align|equation|gather|split)\w*\*?\}", "\n"),
    (r"(?:[^\S\n]{0,9}(?:\\\\|\n)){1,9}[^\S\n]{0,9}&?[^\S\n]{0,9}(?==)", " "),  # a line that goes on with "= ..."
    (r"(\\(?:sin|cos|tan)\s?[({]?)(\d+)\s?\^\s?(?:\{\\circ\}|\\circ)", r"\1\\frac{\2\\pi}{180}"),
    (r"(?<=[\d)}])\^\s?(?:\{\\circ\}|\\circ)\Z", " degree"),  # the unit of an angle; nothing in a formula
    (r"\^\s?(?:\{\\circ\}|\\circ)\s*(?:\\[a-z]+\{\s?([FCK])\s?\}|([FCK])\b)", lambda m: _DEGREES[m[1] or m[2]]),
    (r"\^\s?(?:\{\\circ\}|\\circ)", ""),
    (r"(?<=\.)(\d*)\\dot\s?\{?(\d)\}?(?:(\d*)\\dot\s?\{?(\d)\}?)?", r"\1\\overline{\2\3\4}"),
    (
        r"(?<=[\d} /])\\(?:text|mathrm|mbox)\{\s*([mgshLlJNVWAK])\s*(\^\s?\{?\d\}?)?\s*\}",
        lambda m: f" {_LETTERS[m[1]]}{m[2] or ''}",
    ),
    *[(_TEXT, r" \1 ")] * 2,  # twice for \textbf{\text{...}}
    (r"\\(?:hat|vec)\s?\{([^{}]*)\}", r"\1"),
    (r"\(\s*\\begin\{smallmatrix\}|\\end\{smallmatrix\}\s*\)", lambda m: m[0].strip("( )").replace("small", "p")),
    (r"\\frac\s*(\d|\\pi(?![a-z]))", r"\\frac{\1}"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\d|\\pi(?![a-z]))", r"\\frac\1{\2}"),
    (r"(?<![A-Za-z])\\?sqrt\s*(?:\(([^()]*)\)|(\d))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}"),
    (r"(?<![\w.])(?:np|numpy|math)\.(?=[a-z])", ""),
    (r"(?<![A-Za-z])\\?exp\s*\(([^()]*)\)", r"e^{\1}"),
    (r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)|log|ln)(?=\s?\()", r"\\\1"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),  # Python's power; others are bold print
    (r"\*\*", ""),
    (r"\^\{(\w)\}", r"^\1"),
    (r"[^\S\n]{2,}", " "),
]
_LATEX = [(re.compile(pattern), by) for pattern, by in _LATEX]


def characters(text: str) -> str:
    """The text in ASCII signs and LaTeX commands, where it had others: x² √2 ½ ± full-width digits. Letters stay."""
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: "\\frac{" + unicodedata.normalize("NFKC", m[0]).replace("⁄", "}{") + "}", text)
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    return unicodedata.normalize("NFKC", text).translate(_CHARACTERS)


@functools.lru_cache(64)
def spelled(text: str) -> str:
    """The text with one spelling for each sign, command, distance and fraction; \\text{...} becomes its content."""
    text = characters(text)
    for pattern, by in _LATEX:
        text = pattern.sub(by, text)
    return text


# --- tokens ---

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_SMALL += ["seventeen", "eighteen", "nineteen"]
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: n for n, word in enumerate(_SMALL)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_SCALES = dict(dozen=12, hundred=100, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
_SCALE = "|".join(_SCALES)
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})[-\s](?:{'|'.join(_SMALL[1:10])})(?!\w)|(?:{'|'.join(_WORDS)})(?!\w))"
_IN_WORDS = rf"{_BELOW_100}(?:\s(?:{_SCALE})(?!\w)(?:,?\s(?:and\s)?{_BELOW_100})?)*"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+|\.(?=[*/]))?|\.[0-9]+)"
_PATTERNS = dict(  # of tokens, by name; the first that matches counts
    skip=r"[^\S\n]+|times(?=\s(?:\\times|[*x])\s)|\\?\$|&|\\(?:boxed|fbox)(?![a-z])",
    stop=r"\n|\\\\|[;?]|[.:](?![0-9.])|(?<=[A-Za-z]):|,(?![0-9]{3})|=>|[—✓✔∴•“”]"
    r"|\\(?:to|(?:Long)?rightarrow|iff|implies|checkmark|therefore)(?![a-z])",
    number=r"[0-9]*\.[0-9]{0,20}(?:\\overline\{[0-9]{1,20}\}|(?P<again>[0-9]{1,9}?)(?P=again){1,9}\.\.\.)"  # 0.1666...
    r"|(?:[0-9]+ ?)?\\frac\{[0-9]+\}\{0*[1-9][0-9]*\}"
    # 3 1/2; not "6 and 1/3 of", nor what `_tokens` takes apart
    r"|(?<![/.\d])(?P<whole>[0-9]+) (?:and )?(?P<above>[0-9]+)/(?P<below>0*[1-9][0-9]*)(?![\d.]|\s+of\b)"
    r"|(?:(?<=/ )|(?<=\\div )|(?<=divided by ))[0-9]+/0*[1-9][0-9]*(?![\d.])"  # the 1/3 of 2 / 1/3
    rf"|{_DIGITS}(?:e[-+]?[0-9]{{1,3}}(?!\w)|\s(?:{_SCALE})(?!\w))?|{_IN_WORDS}",
    percent=r"\\?%|per\s?cent(?!\w)",
    equals=r"=|(?:is\sequal\sto|equals|is|makes|gives)(?!\w)(?!\s(?:about|approximately|roughly)\s)",
    near=r"\\(?:approx|simeq)(?![a-z])|(?:is\s)?(?:about|approximately|roughly)(?!\w)",
    operator=r"\\(?:times|cdot|div)(?![a-z])|[-+*/^]|per(?=\s[a-z])|(?<=[\d\s)])x(?=\s?\\?\$?\d)"
    r"|(?:plus|minus|negative|times|(?:divided|multiplied)\sby)(?!\w)",
    factorial=r"(?<=[\d)}])!(?=\s?[-+*/=)}\\!(]|\Z)",
    open=r"[({]",
    close=r"[)}]",
    function=r"\\(?:frac|binom|Gamma|sqrt)(?![A-Za-z])",
    word=r"[^\W\d_]{2,}(?:['’][a-z]{1,2}(?!\w))?"
    r"|(?<=\d )(?P<unit>[mgshL])(?=\s?(?:[-+*/.,;)]|\\times|\Z|=\s?[\d.,]+\s(?:\w+/)?(?P=unit)(?!\w))"
    r"|\s(?!is|equals|makes|gives)[a-z]{2,})|(?<=[a-z]/)[mgshL](?!\w)",
    other=r"\\[A-Za-z]+|.",
)
_TOKEN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()), re.I | re.S)
_GOES_ON = re.compile(r"\s*(?:[-+*/=]|\\times|\\cdot)")
_KIND = dict(stop=";", number="n", percent="%", equals="=", near="~", factorial="!", open="(", close=")")
_KIND |= dict(function="f", word="w", other="?")  # an operator's kind is its sign
_OPERATORS = {"plus": "+", "minus": "-", "negative": "-", "times": "*", "multiplied by": "*", "x": "*", "per": "/"}
_OPERATORS |= {r"\times": "*", r"\cdot": "*", "divided by": "/", r"\div": "/"}


class Token(typing.NamedTuple):
    kind: str  # of _KIND, or + - * / ^
    text: str
    start: int  # characters from the beginning of the text
    end: int
    value: int | Fraction | None  # of a number, in digits or in words


def _number(text: str) -> int | Fraction | None:
    """7, 1,234.5, 1.5e3, 3 1/2, 0.\\overline{3}, 2.5 million, thirty-five; nothing for digits without end."""
    if len(text) > 80:
        return None
    if text.isdigit():
        return int(text)  # equal to the Fraction, and much faster
    text = text.lower().replace(",", "")
    if found := re.fullmatch(r"(\d*)\.(\d*?)(?:\\overline\{(\d+)\}|(\d+?)\4+\.\.\.)", text):
        whole, first, block = found[1] or "0", found[2], found[3] or found[4]
        return (int(whole + first) + Fraction(int(block), 10 ** len(block) - 1)) / 10 ** len(first)  # 0.333... is 3/9
    if "/" in text or "frac" in text:
        *whole, above, below = map(int, re.findall(r"\d+", text))
        return sum(whole) + Fraction(above, below)
    if re.search(r"\d", text):
        digits, *scale = text.split()
        return Fraction(digits) * (_SCALES[scale[0]] if scale else 1)
    total = part = 0
    for word in re.findall("[a-z]+", text):
        if word in ("hundred", "dozen"):
            part *= _SCALES[word]
        elif word in _SCALES:
            total, part = total + part * _SCALES[word], 0
        else:
            part += _WORDS.get(word, 0)  # "and" adds nothing
    return total + part


@functools.lru_cache(64)
def _tokens(text: str) -> tuple[Token, ...]:
    """Numbers, signs and words of a text in one spelling; spaces and dollar signs are left out."""
    found, end = [], 0
    while m := _TOKEN.match(text, end):
        (start, end), name, said, value = m.span(), m.lastgroup, m[0], None
        if name == "skip":
            continue
        if name == "number":
            if m["whole"]:
                result = found and found[-1].kind == "=" and "and" in said
                # no mixed number: 12-3=9 and 9/3=3, 6*4=24 and 1/3*24=8
                if int(m["above"]) >= int(m["below"]) or (result and _GOES_ON.match(text, end, end + 9)):
                    end, said = m.end("whole"), m["whole"]
            value = _number(said)
            name = "number" if value is not None else "other"
        kind = _KIND.get(name) or _OPERATORS.get(" ".join(said.lower().split()), said)
        found.append(Token(kind, said, start, end, value))
    return tuple(found)


# --- values: None is the value of anything that is no number, OverflowError says that nobody works it out ---

_BINDS = {"": 0, ")": 0, "+": 1, "-": 1, "*": 2, "/": 2, "^": 3, "!": 4, "%": 4}  # others follow as factors: 3(4), 2\pi
_BITS, _NESTED = 100_000, 10  # longest number that is worked out; deepest brackets that are read


def _apply(operator: str, one, other, terms: int = 1):
    """one + - * / ^ other, exactly; `terms` are the summands of a base that is not known."""
    if operator == "^" and other is not None:
        bits = 1 if one is None else max(part.bit_length() for part in Fraction(one).as_integer_ratio())
        if abs(other) * bits > (_BITS if bits > 1 else 20_000):
            raise OverflowError
        # (x+y+z)^{90}, multiplied out
        if one is None and math.comb(math.ceil(abs(other)) + terms - 1, terms - 1) > 3_000:
            raise OverflowError
    if one is None or other is None:
        return None
    if operator == "^":
        defined = Fraction(other).denominator == 1 and (one or other > 0)
        return Fraction(one) ** int(other) if defined else None
    if operator == "/":
        return Fraction(one) / other if other else None
    value = one + other if operator == "+" else one - other if operator == "-" else one * other
    if Fraction(value).numerator.bit_length() > _BITS:
        raise OverflowError
    return value


def _call(name: str, *arguments):
    """\\frac, \\binom, \\Gamma, \\sqrt (of squares alone), or ! of their arguments."""
    if None in arguments:
        return None
    if name == r"\frac":
        return _apply("/", *arguments)
    if name == r"\sqrt":
        root = Fraction(*(math.isqrt(max(part, 0)) for part in Fraction(arguments[0]).as_integer_ratio()))
        return root if root * root == arguments[0] else None
    if max(arguments) > (20_000 if name == r"\binom" else 5_000):
        raise OverflowError
    if any(Fraction(n).denominator > 1 or n < 0 for n in arguments) or name == r"\Gamma":
        return None
    return math.comb(*map(int, arguments)) if name == r"\binom" else math.factorial(int(arguments[0]))


def evaluate(tokens: typing.Sequence[Token], percent: int | Fraction = 1, roots=False) -> int | Fraction | None:
    """The exact value of + - * / ^ ! % ( ) \\frac \\binom \\sqrt on numbers; None if there is anything else.

    `percent` is what % multiplies by; with `roots` a root of what is no square has a value too, cut behind 30 decimals.
    OverflowError where a number would become longer than `_BITS`, or a long sum be multiplied out: nobody writes that
    as an answer, and whoever works it out does not come back.
    """
    if len(tokens) == 1:
        return tokens[0].value
    depth = list(itertools.accumulate({"(": 1, ")": -1}.get(t.kind, 0) for t in tokens))
    if not tokens or max(depth) > _NESTED or min(depth) < 0 or depth[-1]:
        return None
    rest = list(reversed(tokens))  # those still to be read, the next one at its end

    def kind() -> str:
        return rest[-1].kind if rest else ""

    def group():
        if kind() != "(":
            return None
        rest.pop()
        value = expression(1)
        rest.pop()  # brackets are balanced, and nothing else ends an expression in them
        return value

    def expression(least: int):
        """The value up to the first operator that binds less tightly than `least`."""
        start = len(rest)
        if kind() in ("", ")", "("):
            value = group()
        elif kind() in ("+", "-"):
            sign = -1 if rest.pop().kind == "-" else 1
            value = expression(3)  # -2^2 is -4
            value = None if value is None else sign * value
        elif kind() == "f":
            name = rest.pop().text
            arguments = [group() for _ in range(1 if name in (r"\Gamma", r"\sqrt") else 2)]
            value = _call(name, *arguments)
            if roots and name == r"\sqrt" and value is None and (arguments[0] or -1) > 0:
                value = Fraction(math.isqrt(int(arguments[0] * 10**60)), 10**30)
        else:
            value = rest.pop().value
        while (binds := _BINDS.get(kind(), 2)) >= least:
            if kind() == "!":
                value = _call(rest.pop().kind, value)
            elif kind() == "%":
                rest.pop()
                value = _apply("*", value, percent)
            elif kind() in "+-*/^":
                terms = 1 + sum(t.kind in "+-" for t in tokens[-start : -len(rest)]) if kind() == "^" else 1
                operator = rest.pop().kind
                value = _apply(operator, value, expression(binds + (operator != "^")), terms)
            else:  # 3(4) is a product, 3 4 is none, and what stands apart as in 3 (4) is a remark
                tight = kind() != "n" and tokens[-len(rest) - 1].end == rest[-1].start
                value = _apply("*", value if tight else None, expression(3))
        return value

    return expression(1)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Answers. An answer is found in the completion, both answers are read (one spelling; name and unit apart), and the
#    first kind that knows them compares them: equation, list of names, number, base, option, word, interval. What is
#    left is a formula: those go to math-verify, which may hang: only ever in workers, which die when their time is up.
#    Not read, on purpose: decimals for a root or \pi, a unit's other unit (1.5 hours and 90 minutes), 42 for 52_8.

SECONDS, MEMORY = 5, 4 << 30  # of CPU time and bytes for one comparison by math-verify
LONGEST, BRACKETS = 400, 40  # characters, opened brackets of an answer; what has more, or deeper ones, is wrong without
# a look: nesting costs the parser time in powers of two
# timeouts: out of time; errors: math-verify or the sandbox failed; refused: programs that break the sandbox's rules
FAILURES = {"timeouts": 0, "errors": 0, "refused": 0}
_POOL = ThreadPoolExecutor(min(4, os.cpu_count()))  # of threads that ask the workers; starts none before it is used
_LOCAL = threading.local()  # a thread's worker

_BOX = re.compile(r"\\(?:boxed|f(?:rame)?box)\s*(?=(\{|$))")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_TOLD = (  # where an answer is given without a box
    re.compile(r"<answer>(.{0,400}?)</answer>", re.S),
    re.compile(r"####[ \t]*(?=\W{0,20}\d)([^\n]+)"),
    re.compile(r"(?:\b(?:[Oo]ption|[Cc]hoice)\b\W{1,6}|选项?\s?)([A-J])\W*\Z"),
    # what follows lies in a lookahead, since one such phrase may stand inside another
    re.compile(
        r"(?i)(?:\b(?:answer|option|choice)\b(?:\s+is\b|\s*[:=])|答案(?:是|为)?\s*:?)"
        r"(?=(?:[:\s*]|\\\[){0,20}((?:[^\n.!]|\.(?=\d)|!(?=[\d)}])){1,400}))"
    ),
)
_END = re.compile(r"(?:\s{0,9}(?:</s>|<eos>|<end_of_turn>|<\|\w{1,20}\|>)){1,9}\s*\Z")
_AND = re.compile(r"[\s$\\()\[\]]{0,9}(?:,|\band\b|\bor\b|, and\b|, or\b)[\s$\\()\[\]]{0,9}(?:[A-Za-z]\w?\s*=\s*)?")
_REMARK = re.compile(  # behind an answer in a sentence: ", which ...", "because ...", "(seven)"
    r"(?:,\s+(?!and\b|or\b)[a-z]{3,}\b|\s+(?:because|since|so|as|where|when|which)\b"
    r"|\s+\((?:not\b.*|[A-Za-z ]{3,})\)).*"
)
_CLAUSE = re.compile(r"(?:[A-Za-z][A-Za-z'’]*\s+){2,}(?=[-$*\\]{0,4}\d)")  # "The train arrives at" 4:35
_NOT_JUST = frozenset("not no or than but except least most under over below above between never n't cannot".split())
_BOLD = re.compile(  # no heading, and nothing that its sentence goes on to count with
    r"\*\*(?!\s)([^*\n]{1,100}?)(?<!:)\*\*(?!\s{0,9}:|\s{0,9}\n\s{0,9}\S)"
    r"(?:(?<=[.!?]\*\*)|(?![^.!?\n]{0,99}(?:[,;]|\b(?:so|and|then|which)\b)[^.!?\n]{0,99}\d))"
    r"(?=(?:(?!\n\s{0,9}\n|\*\*)[\s\S]){0,600}\Z)"
)
# the last formula, with no number behind it
_FORMULA = re.compile(r"(?:\$\$?([^$]{1,400})\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\])[^0-9$]{0,400}\Z", re.S)
_WORD = re.compile(r"(?<![\\A-Za-z{])[^\W\d_]{2,}")  # no command, not \text{...}
_LAST = re.compile(
    rf"\(-?{_DIGITS}(?:,\s*-?{_DIGITS}){{1,3}}\)"
    rf"|(?:(?<![\w)])-)?\$?(?:\d+ \d+/\d+|\d+ out of \d+|\d*\\[dt]?frac\{{\d+\}}\{{\d+\}}"
    rf"|{_DIGITS}(?:/\d+|(?:\\sqrt\{{\d+\}})?(?:\s?\\pi)?))"
)
_NEGATED = re.compile(r"\b(?:not|cannot|never|unable|either\b.*\bor)\b|n['’]t\b", re.I)  # its last number is no answer
_EVASIVE = re.compile(
    r"\b(?:unable to|(?:can|could|do)(?: ?not|n['’]t) (?:work|solve|find|determine|tell|know|answer))\b", re.I
)


def boxes(text: str) -> list[tuple[int, int, str | None]]:
    """(start, end, content) of each \\boxed{...} or \\fbox{...}, in characters; content None if it is never closed.

    Braces are counted; a box inside a box belongs to the outer one's content.
    """
    found, end = [], 0
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue  # a box inside a box
        depth, end, content = 0, len(text), None
        for brace in _BRACE.finditer(text, match.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                end, content = brace.end(), text[match.end() + 1 : brace.start()].strip()
                break
        found.append((match.start(), end, content))
    return found


def answer_boxes(text: str) -> list[tuple[int, int, str | None]]:
    """Those of `boxes` that hold an answer: an empty one, or a bare "\\boxed", only speaks of boxes where a filled one
    stands. One that is never closed is filled, with None."""
    found = boxes(text)
    return [box for box in found if box[2] or (box[2] is None and "{" in text[box[0] :])] or found


def _is_bare(text: str) -> bool:
    """Whether a text is nothing but an expression, or a word or two."""
    if len(text) > 100 or not re.fullmatch(r"[^=\n]*|\W*[A-Za-z]\w?\s*=[^=\n]*", text):
        return False
    before, digit, _ = re.split(r"(\d|$)", text, maxsplit=1)
    words = _WORD.findall(text)
    return sum(map(len, words)) < 4 and not _WORD.search(before) if digit else len(words) < 3


def _unthought(completion: str) -> str | None:
    """What stands behind the last </think>; None where a <think> is never closed."""
    text = completion.rpartition("</think>")[2]
    return None if "<think>" in text else text


def extract_answer(completion: str) -> str | None:
    """The last box; without one an <answer>, a ####, what follows "answer is" or "answer:", what is **bold** in the
    last paragraph, the last formula if it is one line, the whole of a short text that is no prose, the last number or
    pair of numbers; None if there is nothing of all this.

    Only what stands behind </think> counts, if there is anything, and nothing behind a <think> that is never closed. A
    box that is never closed is no answer, and no number inside it becomes one. Boxes that are told in one breath
    ("\\boxed{3} and \\boxed{5}") are one list.
    """
    text = characters(completion)
    if (spoken := _unthought(text)) is None:
        return None
    text = spoken.strip() or text
    if text.rstrip().endswith(">"):
        text = _END.sub("", text)
    if found := answer_boxes(text):
        start, _, answer = found.pop()
        while answer and found and found[-1][2] and _AND.fullmatch(text, found[-1][1], start):
            start, _, content = found.pop()
            answer = f"{content}, {answer}"
        return answer or None
    for pattern in _TOLD:
        if found := pattern.findall(text):
            answer = found[-1].strip()
            clause = _CLAUSE.match(answer)
            if clause and not set(clause[0].lower().split()) & _NOT_JUST:
                answer = answer[clause.end() :]
            return _REMARK.sub("", answer) or answer or None
    if found := _BOLD.search(text):
        return extract_answer(found[1]) or found[1]
    if found := _FORMULA.search(text):
        answer = found[found.lastindex].strip()
        if "\n" not in answer:  # between a dollar of money and another sign, or in a text cut off, lie whole paragraphs
            return answer or None
    if _is_bare(text):
        return text.strip() or None
    found = list(_LAST.finditer(text))
    told = text if _EVASIVE.search(text) else re.split(r"[.!?]\s|\n", text[: found[-1].end()])[-1] if found else ""
    return found[-1][0] if found and not _NEGATED.search(told) else None


# --- reading an answer: name = value unit ---

_DIMENSIONS = (  # nearly any word may stand behind a number; these, in any form, contradict others of their line
    "second sec s;minute min;hour hr h;day;week wk;month;year yr",
    "cent;dollar usd buck;euro eur",
    "millimeter mm;centimeter cm centimetre;meter m metre;kilometer km kilometre kph;inch in;foot feet ft;yard yd"
    ";mile mi mph",
    "gram g;milligram mg;kilogram kg;ton;ounce oz;pound lb",
    "milliliter ml;liter l litre;pint pt;quart qt;gallon gal",
    "am;pm",
    "north;south;east;west",
    "fahrenheit;celsius;kelvin",
    "radian rad;degree deg",
    "percent;joule j kj;newton n;volt v;watt w kw;pascal pa;electronvolt ev",
    "byte;kilobyte kb;megabyte mb;gigabyte gb;terabyte tb",
    "hertz hz;kilohertz khz;megahertz mhz;gigahertz ghz",
    "square sq;cubic",
)
_NAMES = [(names.split(), line) for line in _DIMENSIONS for names in line.split(";")]  # of a unit, its own in front
_UNITS = {name + end: names[0] for names, _ in _NAMES for name in names for end in ("", "s", "es")}
_DIMENSION = {names[0]: line for names, line in _NAMES}
_PARTS = "third quarter fourth fifth sixth seventh eighth ninth tenth".split()
_NO_UNIT = frozenset(  # words that change what a number says
    "or and is are was not no to than from plus minus negative half halves squared cubed mod modulo maybe perhaps"
    " between twice double if sin cos tan log ln exp sqrt remainder".split()
    + [word + s for word in (*_SCALES, *_WORDS, *_PARTS, "score") for s in ("", "s")]
)
_LABEL = re.compile(  # words at the end, behind 5, } ), \pi, 3x or "million"
    rf"(?:(?<=[\d}})])|(?<=\\pi)|(?<=\\pi\s)|(?<=\d[a-z])(?=\s)|{'|'.join(f'(?<={scale})' for scale in _SCALES)})\s*"
    rf"(?!\s*(?:{_SCALE})\b)(?P<words>/?\s*(?:[^\W\d_]{{2,}}|[^\x00-\x7f]|[ap]\.\s?m|[a-z](?=/))"
    r"(?:[^\d\\={}()\[\],<>^_+*!]|\^\s?\{?-?\d\}?)*|\([A-Za-z ]{3,}\))\s*$"
)
_MONEY = str.maketrans({"€": " euros ", "£": " pounds sterling ", "¥": " yen ", "₹": " rupees ", "¢": " cents "})
_FRONT = re.compile(r"^\s*(?:\\\$|\$(?=[^$]*$)|US\$|(USD|EUR|euros|pounds sterling|yen|rupees|Rs\.?))\s*(?=[\d.])")
_MODULO = re.compile(r"\s*\(?\s*\\?[pb]?mod(?:ulo)?\s*[{(]?\s*(\w+)\s*[)}]?\s*\)?$")


def _matrix(rows: str) -> str:
    """[[1, 2], [3, 4]] in LaTeX."""
    cells = re.sub(r"\],\s?\[", r" \\\\ ", rows.strip("[]")).replace(",", " &")
    return rf"\begin{{pmatrix}} {cells} \end{{pmatrix}}"


_WORDING = [
    (r"\\?\$", ""),
    (r"\\?%", " percent "),
    (rf"(?i)(\d+)\s*\(({_IN_WORDS})\)\s*$", lambda m: m[1] if int(m[1]) == _number(m[2]) else m[0]),  # 7 (seven)
    (rf"(?i)^({_IN_WORDS})\s*\((\d+)\)", lambda m: m[2] if int(m[2]) == _number(m[1]) else m[0]),
    (r"^\s*(\d+) and (?=\d+/\d+\s*$)", r"\1 "),  # 1 and 1/2
    (r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", "")),  # 21 000
    (r"^\\\{\s*[A-Za-z](?:\s*\\in\s*\\mathbb\{?R\}?)?\s*(?:\\mid|[|:])(.*(?:[<>]|\\[lg]e).*)\\\}$", r"\1"),
    (r"(?<=\d )((?:week|day|hour|minute|feet|foot|yard|pound)s?),? and (?=\d)", r"\1 "),  # one quantity
    (r"\\begin\{cases\}([^&]*)\\end\{cases\}", lambda m: m[1].replace(r"\\", ", ")),  # a system
    (r"^\s*(\d+) dollars?,? and (\d+) cents?\s*$", lambda m: f"{int(m[1]) + int(m[2]) / 100:.2f} dollars"),
    (r"(?i)^(?:strictly )?between (\S+) and ([^\s,]+)$", r"(\1, \2)"),
    (r"(?i)^(?:strictly )?between (\S+) and ([^\s,]+),? inclusive$", r"[\1, \2]"),
    (r"(?i)^all (?:[a-z]+ )?(?:numbers|integers|values) (?:of )?(?=[a-z] ?[<>\\]|(?:greater|less|more) )", ""),
    (r"(?i)^(?:greater|more) than( or equal to)? ", lambda m: r"x \ge " if m[1] else "x > "),
    (r"(?i)^less than( or equal to)? ", lambda m: r"x \le " if m[1] else "x < "),
    (r"^(?:[Aa]ll real(?:s| numbers)|\\mathbb\{?R\}?)$", r"(-\\infty, \\infty)"),
    (r"^(\d+) to (\d+)$", r"\1:\2"),
    (r"^(\d+) (?:in|out of) (\d+)$", r"\1/\2"),
    (r"^(\d+)\s?\^?\s?\{?\s?(?:st|nd|rd|th)\s?\}?(?= [a-z]+$|$)", r"\1"),  # 5th
    (rf"(?i)\s*\(?\s*\bbase[\s-]+(\d+|{_IN_WORDS})\s*\)?$", r"_{\1}"),
    (r"^\[\[(?:[^\[\]]|\],\s?\[)*\]\]$", lambda m: _matrix(m[0])),
    (r"^[A-Z](?=\([-\d.\s,]+\)$)", ""),  # the point C(8, -2)
    (r"\s*,?\s+(?:and|or)\s+", ", "),
    (r"\s*,?\s*(?:(?:for (?:all|any|every|each)|where)\b|\\forall).*$", ""),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi"),
    (r"(?<=\{)\s+|\s+(?=\})", ""),
    (r",?\s*&\s*(?:(?:if|for|when) )?\s*", " & "),  # x, & if x > 0, \\ of cases
    (r"[,.]?\s*(?=\\\\[^&]*&|\\end\{c)", " "),
    (r"(?i)^\s*(?:(?:the )?(?:final )?answer(?: is|:)\s*|(?:[a-z]+,? ){1,6}(?:is|are|equals) (?=[-\d(\\]))", ""),
    (r"(?i)^\s*(?:either |(?:[a-z]+ ){0,4}[a-z]{3,}\s?:\s+(?=[-\d(\\]))", ""),
    (r"(?<=\d) (?=[A-Za-z](?![A-Za-z]))|(?<![\d.^_])1(?:\.0+)? ?(?!e[-+]?\d)(?=[a-z](?![A-Za-z]))", ""),  # 3 i, 1.0i
    (r"\+\s*(?:-|\(\s*-([\d.]+)\s*\))", r"-\1"),
    (r"^(?:\\approx|(?:about|approximately|exactly|only|just)\b|[\s+,;])+|(?:(?<!\.)\.|[;,\s\\])+$", ""),
    (r"(?<=\d)\s?:\s?(?=\d)", ":"),
    (r"^\(\s*([A-Za-z])\s*\)$|^\{([^{}]*)\}$", lambda m: m[1] or m[2]),
]
_WORDING = [(re.compile(pattern), by) for pattern, by in _WORDING]
_FAMILY = re.compile(r"[\s,;(]*\b([a-z])\s*\\in\s*\\mathbb\s?\{?[ZN]\}?\s*\)?$")
_EQUALS = re.compile(r"(?:=|\\equiv(?![a-z])|\\in(?![a-z]))(?![^{}]*(?<!\\)\})")  # not that of \sum_{k=1}
_INSIDE = re.compile(r"_\s*(?:\{[^{}]*\}|\w)|\^\s*\{?-1\}?|(?<=[\w}])\([\w, ]*\)$")  # of a name: m_{\max}, f^{-1}, f(2)
_NO_NAME = re.compile(r"[\d^!<>]|\\(?:sqrt|log|ln|infty|pi|cup|mathbb|[lg]e)(?![a-z])")


class Answer(typing.NamedTuple):
    text: str  # in one spelling, without name and unit
    value: int | Fraction | None  # exactly, of a number
    units: frozenset[str]  # those of _UNITS that stood behind it or, as money, in front
    name: str  # x of x = 5
    whole: str  # with the name


def _signed(text: str, sign: str) -> str:
    """The text with that sign for its first \\pm, or for all where there is an \\mp, which has the other one."""
    other = "-" if sign == "+" else "+"
    return text.replace(r"\pm", sign, -1 if r"\mp" in text else 1).replace(r"\mp", other)


def _pieces(text: str) -> list[str]:
    """A list's items: what stands between commas outside of brackets; \\pm makes two of one, twice four."""
    pieces, depth = [""], 0
    for sign in re.findall(r"\\?.", text, re.S):
        depth += (sign in ("(", "[", "{", r"\{")) - (sign in (")", "]", "}", r"\}"))
        if sign in (",", ";") and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += sign
    for _ in range(2):
        signed = [[_signed(p, sign) for sign in "+-"] if r"\pm" in p else [p] for p in pieces]
        pieces = [piece for pair in signed for piece in pair]
    return [re.sub(r"(^|[=(,])\s*\+\s*", r"\1", piece).strip() for piece in pieces]


def _units(words: str) -> frozenset[str] | None:
    """The known units among words behind a number: mile and hour of "miles per hour", none of "eggs left over".

    None if the words are no unit: "or 6", "squared", "divided by two", x.
    """
    found = re.findall(r"[^\W\d_]+", re.sub(r"\b([ap])\.\s?m\b", r"\1m", words.lower()))
    for word in found:
        known = word in _UNITS and (len(word) > 1 or re.search("[/^]", words))
        short = len(word) < 3 and word.isascii() and word not in ("of", "an", "at", "sq", "a")
        if word in _NO_UNIT or re.match("[\u0370-\u03ff]", word) or (short and not known):
            return None
    powers = [{"2": "square", "3": "cubic"}.get(n, "") for n in re.findall(r"\^\s?\{?(\d)", words)]
    return frozenset(_UNITS[word] for word in (*found, *powers) if word in _UNITS) if found else None


def _units_differ(one: frozenset[str], other: frozenset[str]) -> bool:
    """Cents and dollars, miles per hour and km/h, cm^2 and cm^3, kg and km; not cm and cm^2."""
    both = [{_DIMENSION.get(unit) for unit in units} for units in (one, other)]
    things = [dimensions - {_DIMENSION["square"]} for dimensions in both]
    if all(things) and not things[0] & things[1]:
        return True
    of = [[{unit for unit in units if _DIMENSION.get(unit) == d} for units in (one, other)] for d in both[0] & both[1]]
    return any(not a & b for a, b in of)


def _is_name(side: str) -> bool:
    """Whether a side of an equation only names what the other side is: x, f(2), m_{\\max}, m+n, \\frac{a}{b}, Area."""
    bare = _INSIDE.sub("", side)
    return bool(re.search("[A-Za-z]", bare)) and not _NO_NAME.search(bare)


@functools.lru_cache(4096)  # rollouts share their gold answers
def _read(answer: str) -> Answer:
    """An answer in one spelling, its name and units apart; what is too long for one stays as it is."""
    if len(answer) > LONGEST or (answer.isascii() and answer.isdigit()):
        return Answer(answer, _value(answer), frozenset(), "", answer)
    text, units = spelled(answer.translate(_MONEY)).strip(), frozenset()
    if front := _FRONT.search(text):
        text, units = text[front.end() :], _units(front[1] or "dollars") or units
    for pattern, by in _WORDING:
        text = pattern.sub(by, text)
    if modulo := _MODULO.search(text):
        text, units = text[: modulo.start()], frozenset({f"modulo {modulo[1]}"})
    if not re.search(r"[(\[]|\\\{", text):  # where (1,200) may be a pair
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if (inner := re.fullmatch(r"\\\{(.*)\\\}", text)) and r"\pm" in text:
        text = rf"\{{{', '.join(_pieces(inner[1]))}\}}"
    if family := _FAMILY.search(text):  # + k\pi, k \in \mathbb{Z}: the letter is of no account
        text = re.sub(rf"(?<![\\A-Za-z]){family[1]}(?![A-Za-z])", "n", text[: family.start()])
    pieces, names, values = _pieces(text), [], []
    for piece in pieces:
        sides = [side.strip() for side in _EQUALS.split(re.sub(r"\\approx.*", "", piece))]
        rest = [side for side in sides if len(sides) == 1 or not _is_name(side)] or sides[-1:]
        unknown = any(re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", side)) for side in rest)
        if len(rest) > 1 and (unknown or len({_value(side) for side in rest} - {None}) > 1):  # an equation, or 5 = 6
            names, values = [], pieces
            break
        names += [side for side in sides if side not in rest]
        values.append(rest[-1])
    text = ", ".join(values)
    label = _LABEL.search(text)
    found = _units(label["words"]) if label else None
    if found or (found is not None and (label[0][0].isspace() or not label[0].isascii())):  # 5kg, 12元, but not 5abc
        text, units = text[: label.start()], units | found
    return Answer(text, _value(text), units, ", ".join(dict.fromkeys(names)), ", ".join(pieces))


def normal_form(answer: str) -> str:
    """An answer's key in a majority vote: a number's exact value (1/2 for \\frac{1}{2} and 0.5), else its one spelling.

    Names in front and units behind are left out, so 5 km and 5 kg share a key; that x+1 is 1+x only `verify` finds out.
    """
    read = _read(answer)
    return read.text if read.value is None else str(read.value)


# --- comparing: each kind says True or False, or None where it does not know both answers ---

_BASE = re.compile(r"\(?([0-9][0-9A-F]*)\)?\s?_\s?\{?\s*(\w+)\s*\}?", re.I)
_LESS = str.maketrans(">", "<")
_RELATION = re.compile(r"\s*(<|>|\\[lg]e(?![a-z]))\s*")
_WITHOUT = re.compile(r"\\mathbb\{?R\}?\s*\\(?:setminus|backslash)\s*\\\{(.*)\\\}|[A-Za-z]\s*\\ne\s*(.*)")
_LITTLE = r"(?:the [a-z]+ is )?(?:(?:there|it|that|this|is|are|was|has|have|the|an?|exactly) )*"
_NOUN = "(?:solutions?|numbers?|functions?|triangles?|days?|series|sequence|angles?|roots?|people|values?)"
_LETTERED = re.compile(r"\(?([A-J])\)\s*(?=\S)")  # (B) in front of 12
_OPTION = re.compile(  # B, b, Option B, (B) 300, B because ..., not B or C, not A-B; A and I are words as well
    r"\W*(?:(?:[Oo]ption|[Cc]hoice)\s+)?([A-J]|[a-j](?=\W*$))(?:\W*$|[).:,\]}]+\s*(?!\W*[A-J]\b|.*\([A-J]\))|(?<![AI])\s+(?:-\s+)?[a-z]{2,})"
)


@functools.lru_cache(4096)
def _value(text: str) -> int | Fraction | None:
    """The exact value of an answer that is arithmetic on plain numbers."""
    if text.isascii() and text.isdigit() and len(text) <= 80:
        return int(text)
    try:
        return evaluate(_tokens(text)) if len(text) <= LONGEST else None
    except OverflowError:
        return None


def _equations_equal(answer: Answer, gold: Answer) -> bool | tuple[str, str] | None:
    """From either side, where both have a side that is worked out of letters: MR = SRMC, f = m a + b v."""
    if gold.value is not None or not (answer.name and gold.name):
        return None
    sides = [tuple(text.replace(" ", "") for text in (side.name, side.text)) for side in (answer, gold)]
    if sides[0] == sides[1][::-1]:
        return True
    worked_out = sides[0][0] != sides[1][0] and re.search(r"[-+*/^]|\\frac", sides[0][0] + sides[1][0])
    return _formulas_equal(*(side._replace(text=side.whole) for side in (answer, gold))) if worked_out else None


def _lists_equal(answer: Answer, gold: Answer) -> bool | tuple[str, str] | None:
    """Values that each have a name, in any order: x = 3, y = -4 for y = -4, x = 3."""
    if "=" not in answer.whole or "=" not in gold.whole:
        return None
    sides = []
    for side in (answer, gold):
        pieces = [piece.partition("=") for piece in _pieces(side.whole)]
        sides.append(zip(*sorted((name.strip(), value.strip()) for name, _, value in pieces)))
    (names, values), (wanted, golds) = sides
    if names != wanted or not len(names) == len(set(names)) > 1 or not all(values):
        return None
    return _formulas_equal(*(side._replace(text=f"({', '.join(v)})") for side, v in ((answer, values), (gold, golds))))


def _numbers_equal(answer: Answer, gold: Answer) -> bool | None:
    """Exactly: there is no tolerance, but for a fraction that a decimal of six places or more cuts or rounds."""
    if answer.value is None or gold.value is None:
        return None
    for decimal, fraction in ((answer, gold.value), (gold, answer.value)):
        places = len(decimal.text.partition(".")[2])
        if places >= 6 and decimal.text[-1].isdigit() and 10**LONGEST % Fraction(fraction).denominator:
            cut = (abs(fraction) - abs(decimal.value)) * 10**places  # what is missing, in units of the last place
            if (decimal.value < 0) == (fraction < 0) and (0 <= cut < 1 or abs(2 * cut) <= 1):
                return True
    return answer.value == gold.value


def _bases_equal(answer: Answer, gold: Answer) -> bool | None:
    """52_8 is neither 52 nor 52_9 (nor 42: which base was asked for is not known)."""
    sides = [_BASE.fullmatch(side.text) for side in (answer, gold)]
    if None in sides:
        return None if sides == [None, None] or (answer if sides[1] else gold).value is None else False
    return sides[0][1].upper() == sides[1][1].upper() and _value(sides[0][2]) == _value(sides[1][2])


def _options_equal(answer: Answer, gold: Answer) -> bool | None:
    option = re.fullmatch("[A-J]", gold.text) and _OPTION.match(answer.whole)
    return option[1].upper() == gold.text if option else None


def _words_equal(answer: Answer, gold: Answer) -> bool | None:
    """Words, times and ratios are equal or not: math-verify would multiply the letters."""
    words = re.fullmatch(r"(?=.*[A-Za-z]{3}|[Nn]o$)[A-Za-z' -]+|\d+(?::\d+)+", gold.text)
    told, wanted = (" ".join(side.text.lower().split()) for side in (answer, gold))
    wanted = re.sub(rf" {_NOUN}\Z", "", wanted)
    return bool(re.fullmatch(rf"{_LITTLE}{re.escape(wanted)}(?: {_NOUN})?", told)) if words else None


def _interval(text: str) -> str:
    """Values of x as intervals: x > 3 is (3, \\infty), 1 < x \\le 2 is (1, 2], \\mathbb{R}\\setminus\\{2\\} is
    (-\\infty, 2)\\cup(2, \\infty); "or" is a union; other texts stay as they are."""
    pieces = _pieces(text)
    if len(pieces) > 1:
        found = [_interval(piece) for piece in pieces]
        points = [piece for piece in pieces if piece in found]  # x < 0 or x = 1
        if found == pieces or None in map(_value, points):
            return text
        return r"\cup".join(rf"\{{{piece}\}}" if piece in points else piece for piece in found)
    if points := _WITHOUT.fullmatch(text):
        ends = sorted(_pieces(points[1] or points[2]), key=lambda point: _value(point) or 0)
        return r"\cup".join(f"({a}, {b})" for a, b in itertools.pairwise([r"-\infty", *ends, r"\infty"]))
    if size := re.fullmatch(r"\|[A-Za-z]\|\s*(<|>|\\[lg]e)\s*([^-+]+)", text):
        (sign, end), (low, high) = size.groups(), "()" if size[1] in "<>" else "[]"
        outside = rf"(-\infty, -{end}{high}\cup{low}{end}, \infty)"
        return f"{low}-{end}, {end}{high}" if sign in ("<", r"\le") else outside
    parts = _RELATION.split(text)  # value, sign, value, ...
    greater = {sign.startswith((">", "\\g")) for sign in parts[1::2]}
    if greater == {True}:  # read it from the other side
        parts.reverse()
    names = [i for i, part in enumerate(parts) if re.fullmatch("[A-Za-z]", part)]
    if len(greater) == 1 and len(names) == len(parts[::2]) > 1:  # c > b > a
        return "".join(part.translate(_LESS).replace("g", "l") if i % 2 else part for i, part in enumerate(parts))
    if len(greater) != 1 or len(names) != 1 or names[0] > 2 or len(parts) > names[0] + 3 or "" in parts:
        return text
    below, above = parts[: names[0]], parts[names[0] + 1 :]
    low = f"{'(' if below[1] in '<>' else '['}{below[0]}" if below else "(-\\infty"
    high = f"{above[1]}{')' if above[0] in '<>' else ']'}" if above else "\\infty)"
    return f"{low}, {high}"


def _intervals_equal(answer: Answer, gold: Answer) -> bool | tuple[str, str]:
    """As formulas, where a side that is an inequality or leaves points out is an interval."""
    return _formulas_equal(*(side._replace(text=_interval(side.text)) for side in (answer, gold)))


def _formulas_equal(answer: Answer, gold: Answer) -> bool | tuple[str, str]:
    """What is left for math-verify, unless it would cost too much or only one side has letters (not \\pi, e or i)."""
    one, other = ("".join(side.text.split()) if "{cases}" in side.text else side.text for side in (answer, gold))
    if one == other:
        return True
    if "=" in gold.text or ("=" in answer.text and gold.name):  # equations, of which one may be y = 2x
        sides = answer.whole, gold.whole
    elif "=" in answer.text or any(re.search(r"\(\d+(?:\s\d+)+\)", side.text) for side in (answer, gold)):
        return False  # 5 = 6; (1 3 2), a permutation and no product
    else:
        sides = answer.text, gold.text
    letters = [re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+|(?<![A-Za-z])[ei](?![A-Za-z])", "", side)) for side in sides]
    try:
        for side in sides:
            evaluate(_tokens(side))
    except OverflowError:
        return False
    return False if letters[0] and not letters[1] else sides


_KINDS = (_equations_equal, _lists_equal, _numbers_equal, _bases_equal, _options_equal, _words_equal, _intervals_equal)


def _quick(completion: str, gold: str) -> bool | tuple[str, str]:
    """The verdict, or the two spellings that math-verify has to compare."""
    answer = extract_answer(completion)
    if answer is None or len(answer) > LONGEST:
        return False
    brackets = [1 if bracket in "[({" else -1 for bracket in re.findall(r"[][(){}]", answer)]
    if brackets.count(1) > BRACKETS or max(itertools.accumulate(brackets), default=0) > _NESTED:
        return False
    found = boxes(gold)
    gold = _read((found[-1][2] or "") if found else gold)
    if gold.value is not None and not answer.isdigit():  # 574 g; in a formula it is a variable
        answer = re.sub(r"(?<=\d)\s+([gmshLlJNVWAK])(?=\W*$)", lambda m: " " + _LETTERS[m[1]], answer)
    answer = _read(answer)
    if not gold.text or (answer.units and gold.units and _units_differ(answer.units, gold.units)):
        return False
    if gold.value is not None and (option := _LETTERED.match(answer.text)):
        answer = _read(answer.whole[option.end() :])  # (B) 12
    if option := _LETTERED.match(gold.text):  # here too either of both will do
        letter = _options_equal(answer, _read(option[1]))
        return _quick(completion, gold.whole[option.end() :]) if letter is None else letter
    if answer.name != gold.name and {answer.name, gold.name} <= {"x", "y", "z"}:  # the lines x = 3 and y = 3
        return False
    return next(verdict for kind in _KINDS if (verdict := kind(answer, gold)) is not None)


def _serve() -> None:
    """A worker: reads [seconds, answer, gold], writes verdicts. The kernel ends it when a comparison outlasts its time:
    an alarm without a handler stops C code too, needs no signal in the caller, leaves nobody behind if that dies."""
    import resource  # not on Windows; the caller needs none of it

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not a verdict
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    _compare("1+x", "x+1")  # imports and builds its parser: no question pays for that with its time
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        seconds, answer, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdict = _compare(answer, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=out, flush=True)


def _compare(answer: str, gold: str) -> bool | None:
    """math-verify on the two answers alone, in a worker; None if it fails. Its own time-outs need SIGALRM: off.

    Two constants are compared here, to 50 digits: math-verify takes e^{-50} and e^{-51} for equal.
    """
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, I, Rational, Symbol, nsimplify

    try:
        sides = [
            parse(f"${side}$", [LatexExtractionConfig()], "no_fallback", "first_match", None, raise_on_error=True)
            for side in (gold, answer)
        ]
        if not all(sides):
            return False
        # the parser has symbols of one name that differ in what is assumed of them, and none that is the imaginary unit
        named = [{s: I if s.name == "i" else Symbol(s.name) for s in side[0].free_symbols} for side in sides]
        sides = [[side[0].xreplace(names), *side[1:]] for side, names in zip(sides, named)]
        one, other = (side[0] for side in sides)
        if all(isinstance(side, Expr) and side.is_number and side.is_finite for side in (one, other)):
            one, other = (nsimplify(side, rational=True) for side in (one, other))
            gap, size = (abs(number.evalf(80)) for number in (one - other, one))
            return bool(gap <= size * Rational(1, 10**50))
        return bool(verify(*sides, timeout_seconds=None, raise_on_error=True))
    except Exception:  # sympy and the parser raise nearly every class there is; the failure is counted
        return None


def _ask(pair: tuple[str, str]) -> bool | str:
    """A worker's verdict, or "errors" or "timeouts". Each thread of the pool has a worker of its own, made when needed.

    Plain child processes that run this file: they import no main script, so they work from a notebook, a thread or an
    unguarded script, and nothing is forked from a process that holds an engine.
    """

    def start():
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        _LOCAL.worker = subprocess.Popen([sys.executable, os.path.abspath(__file__)], **pipes)
        return _LOCAL.worker

    worker = getattr(_LOCAL, "worker", None) or start()
    try:
        worker.stdin.write(json.dumps([SECONDS, *pair]) + "\n")
        worker.stdin.flush()
        verdict = worker.stdout.readline()
    except BrokenPipeError:  # somebody else ended it
        verdict = ""
    if not verdict:
        worker.wait()
        start()  # it is ready, or nearly, when the next question comes
        return "timeouts" if worker.returncode == -signal.SIGPROF else "errors"
    return {"true": True, "false": False}.get(verdict.strip(), "errors")


# ---------------------------------------------------------------------------------------------------------------------
# 6. Programs. The answer to a problem of the kind "code" is the last closed ```python block of a completion. What is
#    gold is a test program that runs behind it. Three walls stand between a program and a pass that it did not earn:
#
#    the machine   bubblewrap: an empty system (interpreter, libraries, private /tmp; no /proc, /dev, /etc or home), no
#                  network, own process, IPC and host namespaces, nothing to be written but /tmp, dead with its parent;
#                  inside limits of CPU time, memory, files and their size, and no second process or thread at all;
#                  outside a wall clock, and an end to what is read.
#    the language  The tests run in the same interpreter, so a program must not reach beyond its own names: no dunders
#                  but `SAFE`, no frames, no files, of `MODULES` the public names alone, no base, change or private
#                  name of others' classes. So a result cannot say itself what it is equal to, and nothing that the
#                  tests use can be replaced. The price: an honest class with __eq__ or __lt__, or another import, is
#                  refused as well.
#    the secret    A pass is a word that is fetched behind the tests, from a file that no name leads to: neither an
#                  exit code nor what is printed passes.
#
#    Not covered: a fault of the interpreter or the kernel; weak tests (NaN where only "not above" is asked); a program
#    that looks its inputs up in disguise (`hardcodes_tests` sees literals); changes to objects that tests hand over.
#    Programs have a part of the standard library, which HumanEval and MBPP need; tests may have numpy as well.

WALL = 2 * SECONDS  # seconds by the clock for a program and its tests; SECONDS are those of CPU time
PROGRAM_MEMORY, PROGRAM_LENGTH = 1 << 30, 50_000  # bytes that a program may take; characters that one may have
MODULES = """__future__ array bisect cmath collections collections.abc copy datetime decimal fractions functools hashlib
heapq itertools json math operator random re statistics string struct sys textwrap time typing""".split()
WITHHELD = """attrgetter methodcaller update_wrapper wraps singledispatch singledispatchmethod total_ordering Formatter
get_type_hints ForwardRef evaluate_forward_ref _strptime mro ChainMap KeysView ItemsView ValuesView gi_frame gi_code
cr_frame cr_code ag_frame ag_code tb_frame tb_next f_back f_code f_globals f_locals f_builtins f_trace""".split()
# what takes names as text, lets an object of a program's decide what is equal, or leads to other frames and classes
SAFE = """__init__ __name__ __doc__ __str__ __repr__ __len__ __iter__ __next__ __getitem__ __setitem__ __call__
__enter__ __exit__ __slots__ __future__""".split()  # dunders by which no object can agree with a test
_FENCED = re.compile(  # a block up to a fence that is as long as its first and has no name, or to the end
    r"^ {0,3}(`{3,})[ \t]*([\w+-]*)[^`\n]*$(?:\n(.*?)^ {0,3}\1`*(?![ \t]*[\w+-])[^`\n]*$|.*\Z)", re.M | re.S
)


def programs(text: str) -> list[tuple[int, int, str | None]]:
    """(start, end, content) of each block fenced by ```python, in characters; content None if it is never closed."""
    return [(*m.span(), m[3]) for m in _FENCED.finditer(text) if m[2].lower() in ("python", "python3", "py")]


def extract_program(completion: str) -> str | None:
    """The last ```python block behind any </think>; None without a fence, or if the last one, or a <think>, is never
    closed."""
    found = programs(_unthought(completion.replace("\r\n", "\n")) or "")
    return found[-1][2] if found else None


def _inside(seconds: int, memory: int, modules: list, withheld: list, safe: list) -> None:
    """What runs in the sandbox: its source is handed to the interpreter there. Reads two lengths, program, tests from
    standard input, where the secret stays unread until the tests are through."""
    import _ast
    import builtins
    import os
    import resource
    import sys

    source, verdict = os.dup(0), os.dup(1)
    os.dup2(2, 0)  # 2 is /dev/null: nobody reads what a program prints, and `input` finds nothing
    os.dup2(2, 1)
    if os.getuid() == 0:  # root alone may have as many processes as it likes
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    for name, limit in dict(AS=memory, CPU=seconds, NPROC=0, NOFILE=32, FSIZE=1 << 20, CORE=0).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit + (name == "CPU")))  # told, then killed
    try:
        if os.fork() == 0:
            os._exit(1)
        sys.exit("the number of processes cannot be limited")
    except OSError:
        os.write(verdict, b".")

    def read(size):
        text = b""
        while more := os.read(source, size - len(text)):
            text += more
        return text.decode()

    class Refused(BaseException):
        pass

    def named(name):
        """Whether a program may use this name."""
        dunder = name[:2] == name[-2:] == "__" and len(name) > 4
        return name not in withheld and (name in safe or not dunder)

    def hidden(name):
        return name[0] == "_" and name not in safe

    def own(thing):
        """The thing, if a program may change it and see what is private: its classes, their objects, functions."""
        if isinstance(thing, type):
            free = thing.__module__ == "program"
        else:  # a context of decimal has fields to be set
            free = type(thing).__module__ in ("program", "decimal") or isinstance(thing, type(own))
        if not free:
            raise Refused
        return thing

    def compiled(text, mode):
        if type(text) is not str or any(sign in text for sign in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"):
            raise Refused  # signs that turn the direction of what is read: the text is not what it looks like
        tree = compile(text, "program", mode, _ast.PyCF_ONLY_AST, dont_inherit=True)
        todo = [tree]
        while todo:
            node = todo.pop()
            for field in node._fields:
                value = getattr(node, field, None)
                for one in value if isinstance(value, list) else [value]:
                    if isinstance(one, _ast.AST):
                        todo.append(one)
                    elif isinstance(one, str) and not isinstance(node, _ast.Constant) and not named(one):
                        raise Refused
            if isinstance(node, _ast.Attribute) and (not isinstance(node.ctx, _ast.Load) or hidden(node.attr)):
                place = dict(lineno=node.lineno, col_offset=node.col_offset)
                node.value = _ast.Call(_ast.Name(guard, _ast.Load(), **place), [node.value], [], **place)
        return compile(tree, "program", mode, dont_inherit=True)

    guard, shown = os.urandom(9).hex(), {}  # a name that no program knows
    namespace = type(sys.implementation)  # no module: an import that fails there looks among the real ones

    def shows(name):
        """A module's public names, in an object of the program's own."""
        if name not in modules:
            raise Refused
        if name not in shown:
            real = __import__(name, fromlist=["_"])
            public = getattr(real, "__all__", None) or [key for key in vars(real) if key[0] != "_"]
            if name == "sys":
                public = ["maxsize", "maxunicode", "float_info", "version_info", "setrecursionlimit", "exit"]
            found = {key: getattr(real, key) for key in public if key not in withheld}
            found = {key: value for key, value in found.items() if not isinstance(value, type(sys))}
            if name == "collections":
                found["abc"] = shows("collections.abc")
            shown[name] = namespace(**found)
        return shown[name]

    def imported(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "_strptime":  # no program can write that: it is datetime's own doing
            return __import__(name)
        found = shows(name)
        return found if fromlist else shows(name.partition(".")[0])

    def built(body, name, *bases, **more):
        """A class. Those of libraries ask methods of their own how they compare: none is a base."""
        for base in bases:
            free = isinstance(base, type) and base.__module__ in ("builtins", "program")
            if not free and getattr(base, "__origin__", base).__name__ not in ("NamedTuple", "TypedDict", "Generic"):
                raise Refused
        return builtins.__build_class__(body, name, *bases, **more)

    def attribute(thing, name, *default):
        if type(name) is not str or not named(name):
            raise Refused
        return getattr(own(thing) if hidden(name) else thing, name, *default)

    def change(thing, name, *value):
        if type(name) is not str or not named(name):
            raise Refused
        (setattr if value else delattr)(own(thing), name, *value)

    def kind(thing):
        """The type of an object: no class that makes classes, which could have any dunder, and no library's secret."""
        cls = type(thing)
        public = any(cls is value for names in shown.values() for value in vars(names).values())
        if isinstance(thing, type) or not (public or cls.__module__ in ("builtins", "program")):
            raise Refused
        return cls

    def running(mode):
        def run(text, globals=None, locals=None):
            if not {type(globals), type(locals)} <= {dict, type(None)}:  # others would be asked for each name
                raise Refused
            if globals is None:
                frame = sys._getframe(1)
                if frame.f_code.co_filename != "program":  # a library calls back: its names are not the program's
                    raise Refused
                return eval(compiled(text, mode), frame.f_globals, frame.f_locals if locals is None else locals)
            space = dict(globals) | {"__builtins__": given}  # a copy: `given` stays out of reach
            value = eval(compiled(text, mode), space, locals)
            globals.update({name: value for name, value in space.items() if name != "__builtins__"})
            return value

        return run

    def refuse(*_, **__):
        raise Refused

    given = {name: value for name, value in vars(builtins).items() if name[0] != "_"}
    given |= dict.fromkeys("open input compile globals locals vars breakpoint".split(), refuse)
    given |= dict(getattr=attribute, setattr=change, delattr=change, type=kind)
    given |= dict(eval=running("eval"), exec=running("exec"))
    given |= {guard: own, "__import__": imported, "__build_class__": built}
    try:
        program, tests = [read(int(length)) for length in read(20).split()]
        names = {"__name__": "program", "__builtins__": given}
        tree = compile(tests, "tests", "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)
        for node in tree.body:  # a program may leave out what its tests import at their top
            if not isinstance(node, (_ast.Import, _ast.ImportFrom)):
                break
            wanted = [alias.name for alias in node.names] if isinstance(node, _ast.Import) else [node.module]
            if set(wanted) <= set(modules):
                try:  # noqa: SIM105 (to import contextlib takes longer than most programs)
                    exec(compile(_ast.Module([node], []), "tests", "exec", dont_inherit=True), names)
                except ImportError:  # a name that is withheld
                    pass
        exec(compiled(program, "exec"), names)
        code, known = compile(tree, "tests", "exec", dont_inherit=True), vars(builtins)
        codes = [code]
        for one in codes:
            codes += [inner for inner in one.co_consts if isinstance(inner, type(code))]
        # no builtin and no module of the tests is the program's, unless they name nothing else: assert sum(10, 15) == 6
        bare = {name for one in codes for name in one.co_names} <= set(known)
        names = {k: v for k, v in names.items() if (bare or k not in known) and not isinstance(v, namespace)}
        sys.path.append("/packages")
        exec(code, names | {"__name__": "tests", "__builtins__": known})
        os.write(verdict, os.read(source, 64))
    except Refused:
        os.write(verdict, b"refused")
    except BaseException:  # whatever a program raises, its tests did not pass
        pass
    os._exit(0)


@functools.lru_cache
def _sandbox() -> list[str]:
    """The command of a sandboxed interpreter, without what limits and feeds it."""
    import importlib.util
    import inspect

    prefix, python = sys.base_prefix, os.path.realpath(sys._base_executable)
    command = "bwrap --unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try".split()
    # root sets the machine up as root and goes on as nobody, since the limit of processes does not bind root, not even
    # in a namespace of its own; others are nobody in such a namespace from the start
    root = "--cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID"
    command += (root if os.geteuid() == 0 else "--unshare-user --uid 65534 --gid 65534").split()
    command += "--die-with-parent --new-session --clearenv --setenv OPENBLAS_NUM_THREADS 1".split()
    command += ["--setenv", "LD_LIBRARY_PATH", "/python/lib", "--ro-bind", prefix, "/python"]
    for place in ("/usr", "/lib", "/lib64", "/nix"):
        command += ["--ro-bind-try", place, place]
    command += "--perms 0755 --dir /packages".split()
    if spec := importlib.util.find_spec("numpy"):
        for folder in (spec.submodule_search_locations[0], spec.submodule_search_locations[0] + ".libs"):
            command += ["--ro-bind-try", folder, f"/packages/{os.path.basename(folder)}"]
    command += "--size 16777216 --perms 1777 --tmpfs /tmp --remount-ro / --chdir /tmp".split()
    call = f"_inside({SECONDS}, {PROGRAM_MEMORY}, {MODULES}, {WITHHELD}, {SAFE})"
    inside = f"/python/{os.path.relpath(python, prefix)}"
    return [*command, inside, "-I", "-S", "-B", "-c", inspect.getsource(_inside) + call]


def _test(pair: tuple[str, str]) -> bool | str:
    """Whether a program passes its tests, in a sandbox of its own; or "refused", "timeouts", "errors"."""
    program, tests = (text.encode("utf-8", "replace") for text in pair)
    secret = os.urandom(24).hex().encode()
    with open(os.memfd_create("fed"), "w+b", buffering=0) as fed:
        fed.write(b"%10d%10d%b%b%b" % (len(program), len(tests), program, tests, secret))
        fed.seek(0)
        process = subprocess.Popen(_sandbox(), stdin=fed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    over, said = time.monotonic() + WALL, b""
    with process.stdout as out:
        while len(said) < 1024:  # a dot when the program starts, the secret or "refused": nothing longer is read
            ready = select.select([out], [], [], max(over - time.monotonic(), 0))[0]
            more = os.read(out.fileno(), 1024) if ready else b""
            if not more:
                break
            said += more
    try:
        died = process.wait(max(over - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.kill()  # and with it all that it started
        died = process.wait()
    if died in (-signal.SIGKILL, 128 + signal.SIGXCPU):
        return "timeouts"
    if said[:1] != b".":
        return "errors"
    return "refused" if said == b".refused" else said[1:] == secret


@functools.lru_cache
def _check_sandbox() -> None:
    """Ends the program with one line where no program can be run safely: nothing is ever run without the sandbox."""
    need = "problems of kind 'code' need a sandbox, and"
    hint = "install the package bubblewrap (0.8 or later; apt-get install bubblewrap)"
    if not shutil.which("bwrap"):
        raise SystemExit(f"{need} bwrap is not there: {hint}")
    if _test(("x = 1", "assert x == 1")) is not True:
        done = subprocess.run(_sandbox(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WALL)
        told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        hint += ", and allow it user namespaces, or run as an ordinary user"
        raise SystemExit(f"{need} bubblewrap cannot make one here ({told}): {hint}")


@functools.lru_cache(256)
def _parsed(code: str) -> ast.Module | None:
    """The program's tree; None for what is no program, or too deep to be looked at."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\\d" in a string without r
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _unfit_tests(tests: str) -> str:
    """What is wrong with a test program: it does not parse, or it asserts nothing."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"is no Python program ({error})"
    asserts = any(isinstance(node, (ast.Assert, ast.Raise, ast.Call)) for node in ast.walk(tree))
    return "" if asserts else "tests nothing: it has neither an assert nor a call"


def _quick_program(completion: str, tests: str) -> bool | tuple[str, str]:
    """False where there is no program to be run, else program and tests for `_test`."""
    program = extract_program(completion)
    return (program, tests) if program and program.strip() and len(program) <= PROGRAM_LENGTH else False


# ---------------------------------------------------------------------------------------------------------------------
# 7. Cheats. What a rewrite can do to look good without being good, one named term each.

# results of a text, tokens of a side: more are not looked at, it would take more than linear time
_MOST, _LONG = 1000, 200

# --- arithmetic statements: a statement is false only where no reading of it is true ---

_ANNOTATION = re.compile("<<([^<>]*)>>")  # GSM8K's 48/2 = <<48/2=24>>24
_NOT_BEFORE = frozenset("of half twice double third quarter sin cos tan log ln sqrt percent".split())
_NOT_AFTER = frozenset("more less fewer greater percent half halves thirds quarters mod modulo".split()) | set(_SCALES)
_NO_THING = _NO_UNIT | set(  # words behind a number that are not what is counted
    "times more less fewer greater of am pm cent cents because since so then thus hence when with which as but that we"
    " he she it they the an who his her their its this these".split()
)
_AMOUNTS = frozenset(  # behind whose "of" no share is taken
    "total sum cost amount volume area perimeter length width height weight distance price value profit speed".split()
)
_THINGS = "(?:w{1,3}(?:ow{1,2})?(?:/w{1,2})?|/w{1,2})"  # pens, cups of tea, miles per hour
# not the km of "= 90 km = 90,000 m"
_COUNTED = re.compile(rf"(?<=[n)%]){_THINGS}(?=[-+*)]|/(?!w))|(?<!=n)(?<!=n/n)(?<=[n)%]){_THINGS}(?=[=~])")
_BEHIND = re.compile("[^w;=~]*(w{1,3}(?:/w{1,2})?)")  # the first words of a right side
_REMAINDER = re.compile(r"[\s,(]*(?:with )?(?:a )?(?:remainder|r)(?: of)? ?(\d+)", re.I)


class Statement(typing.NamedTuple):
    left: int | Fraction
    right: int | Fraction
    position: int  # where the left side begins, in characters of the text in one spelling
    holds: bool
    equals: int  # where the right side begins
    end: int


def _without_units(tokens: typing.Sequence[Token]) -> tuple[list[Token], set[int]]:
    """The numbers and signs of 3 boxes * 8 pens = ..., $2/egg, 60 miles per hour; "20% of", "2/3 of" become times. And
    where those equality signs begin that have other units on either side: 3.6 * 10 seconds = 0.6 minutes.

    Numbers that only stand beside each other are kept apart by a token of the kind "_".
    """

    def units_of(words: typing.Sequence[Token]) -> set[str]:
        return {_UNITS[t.text.lower()] for t in words if t.text.lower() in _UNITS}

    no_thing = [t.kind in "w?" and t.text.lower() in _NO_THING for t in tokens]
    kinds = "".join(("o" if t.text == "of" else "?") if no else t.kind for t, no in zip(tokens, no_thing))
    spans = []  # of words that say what is counted, and the known units among them
    for m in _COUNTED.finditer(kinds):
        units = units_of(tokens[m.start() : m.end()])
        if units or m[0][0] == "/" or tokens[m.start() - 1].end < tokens[m.start()].start:  # not the h of 3h
            spans.append((*m.span(), units))
    left_out = {i for start, end, _ in spans for i in range(start, end)}
    for (a, b, one), (c, d, other) in itertools.pairwise(spans):
        if c == b + 2 and kinds[b] in "+-" and one and other and not one & other:  # 2 hours + 30 minutes
            left_out -= {*range(a, b), *range(c, d)}
    units_at = {start: units for start, _, units in spans}
    converted, said = set(), set()  # said: the units of a side so far
    for i, kind in enumerate(kinds):
        said |= units_at.get(i, set())
        if kind in "=~;":
            behind = _BEHIND.match(kinds, i + 1) if said and kind != ";" else None
            others = units_of(tokens[behind.start(1) : behind.end(1)]) if behind else set()
            if others and not others & said:
                converted.add(tokens[i].start)
            said = set()
    kept, shape, depth = [], "", 0  # shape: the kinds of what is kept
    for i, token in enumerate(tokens):
        if i in left_out:
            continue
        if token.text == "of" and kept and kept[-1].text.lower() in _AMOUNTS:
            token = token._replace(text="total of")
        elif token.text == "of" and re.search("(?<!=n)%$|(?<!=n)n/n$", shape[-4:]):
            token = token._replace(kind="*")
        elif shape[-1:] in ("n", ")") and depth >= 0 and token.kind in "n(f" and kept[-1].end < token.start:
            kept.append(Token("_", token.kind, token.start, token.start, None))
            shape += "_"
        depth += {"(": 1, ")": -1}.get(token.kind, 0)  # below 0 behind the 1) of a list
        kept.append(token)
        shape += token.kind
    return kept, converted


def _values(side: list[Token], roots=False) -> list[int | Fraction]:
    """What a side may be worth: 20% is 20 or 0.2, "$16 million" may count millions. Nothing if it is no arithmetic."""
    if len(side) > _LONG:
        return []
    readings = [(side, 1)]
    if any(t.text.rpartition(" ")[2].lower() in _SCALES for t in side):
        readings.append(([t._replace(value=_number(t.text.split()[0])) if t.kind == "n" else t for t in side], 1))
    if any(t.kind == "%" for t in side):
        readings += [(of, Fraction(1, 100)) for of, _ in readings]
    if re.fullmatch(r"n[-+]n%", "".join(t.kind for t in side)):  # 50 - 20% = 40
        part = side[2]._replace(value=Fraction(side[2].value, 100) * side[0].value)
        readings.append(([*side[:2], part], 1))
    try:
        values = [evaluate(*reading, roots) for reading in readings]
    except OverflowError:
        return []
    return [value for value in dict.fromkeys(values) if value is not None]


def _last_place(side: list[Token], value) -> Fraction | None:
    """What one in the last place of a side is: 1/100 for 3.33, 10^-8 for 5.6 \\times 10^{-7}. None for anything but one
    number in digits."""
    kinds = "".join(t.kind for t in side).strip("-()%")
    first, *more = (t for t in side if t.kind == "n")
    digits = first.text.lower().partition("e")[0]
    if not re.fullmatch(_DIGITS, digits) or not (kinds == "n" or (kinds.startswith("n*n^") and more[0].value == 10)):
        return None
    mantissa = Fraction(digits.replace(",", ""))
    return abs(Fraction(value) / (mantissa or 1) or 1) / 10 ** len(digits.partition(".")[2])


def _holds(left, right, side: list[Token], divides: bool, near: bool, roots: bool) -> bool:
    """Whether left = right, as the right side is written: rounded in its last place (a root by at most 3%), a quotient
    also cut (17/3 = 5 and a remainder), behind a sign for "nearly" within 5%; irrational roots are cut."""
    place, off, size = _last_place(side, right), abs(left - right), abs(left)
    rounded = place and right == math.floor(left / place + Fraction(1, 2)) * place
    if roots:
        rounded = off * 10**25 <= size or (rounded and 100 * off <= 3 * size)
    cut = divides and right == math.floor(left)
    return bool(left == right or rounded or cut or (near and 20 * off <= size))


_OPERATION = re.compile(r".[-+*/^!f]|[n)]\(")  # of two numbers, or 6(2)


def _chain(sides: list[list[Token]], near: list[bool]) -> list[Statement]:
    """a = b = c -> the statements a = b, a = c; a is the first side with an operator (else it may be a label). Of those
    with a root of what is no square only the false ones: no number on the way is lost with \\sqrt{8} = 2\\sqrt{2}."""
    found, left, first, divides, root = [], [], [], False, False
    for side, nearly in zip(sides, [False, *near]):
        values, rooted = _values(side), False
        if not values and any(t.text == r"\sqrt" for t in side):
            values, rooted = _values(side, roots=True), True
        if not values:
            continue
        if left:
            pairs = [(a, b) for a in left for b in values]
            held = [pair for pair in pairs if _holds(*pair, side, divides, nearly, root or rooted)]
            apart = (i for i in range(1, len(side)) if side[i - 1].end + 2 < side[i].start or side[i].text[0].isalpha())
            carried = [] if held else set(left) & set(_values(side[: next(apart, 0)]))
            if carried:  # "= 12 hours * 60 minutes per hour = 720", "= 1/3 of 150"
                left, held = values, [(value, value) for value in carried]
            if not (held and (root or rooted)):
                found.append(Statement(*(held or pairs)[0], first[0].start, bool(held), side[0].start, side[-1].end))
        elif side[0].kind == "f" or "frac" in side[0].text or _OPERATION.search("".join(t.kind for t in side)):
            left, first, root = values, side, rooted  # more than a number with its sign
            divides = any(t.kind == "/" or "frac" in t.text for t in side)
    return found


def _within(side: list[Token], opening: str, closing: str) -> list[Token]:
    """The side up to the first bracket that has no partner in it."""
    opened = []
    for i, token in enumerate(side):
        if token.kind == opening:
            opened.append(i)
        elif token.kind == closing and not opened:
            return side[:i]
        elif token.kind == closing:
            opened.pop()
    return side[: opened[0]] if opened else side


def _alone(side: list[Token], beside: Token, left: bool) -> bool:
    """Whether the outer side of an equation is all there is, or only part of a larger expression."""
    if beside.kind == "_":  # 4 (5+3) = 32, but "= 16 (-1)^2 = 1"; not 18 000, nor (1+2)^2 (1+2)
        return not left and beside.text == "(" and all(t.kind != ")" for t in side)
    if beside.kind == ";" or beside.text in ("([{\"'`<" if left else ")]}\"'`>"):
        return True
    if beside.text.lower() in (_NOT_BEFORE if left else _NOT_AFTER):
        return False
    touches = beside.end == side[0].start if left else beside.start == side[-1].end
    if touches:  # 21cm, not 5x
        return not left and len(beside.text) > 1 and beside.text.lower() in _UNITS
    return beside.kind == "w" or beside.text in "(){}<>|"


def _first_side(tokens: list[Token], start: int, sign: int, second: list[Token]) -> list[Token]:
    """What stands between `start` and the first equality sign, if it is a side of its own."""
    side = _within(tokens[start:sign][::-1], ")", "(")[::-1]
    before, equals = tokens[sign - len(side) - 1], tokens[sign]
    if len(side) > 1 and side[0].kind in "-+*/^!%":
        # "- 3+4=7" is an item of a list, "-3+4=1" a negative number, "eggs - 3 - 4 = 9" part of something larger
        item = side[0].end < side[1].start
        side = side[item:] if before.kind == ";" and side[0].kind in "-*" else []
    article = before.text.lower() in ("the", "these", "his", "her", "their") and len(side) < sign - 1
    owner = tokens[sign - len(side) - 2] if article else before  # half of the 10 apples + 3
    if not side or not _alone(side, before, left=True) or owner.text.lower() in _NOT_BEFORE:
        return []
    kinds, tight = "".join(t.kind for t in side), len(side) > 1 and side[0].end == side[1].start
    in_words, counted = equals.text[0].isalpha(), equals.start > side[-1].end + 2  # "is"; a unit stands between
    fraction = kinds == "n/n" and side[1].text != "divided by" or (kinds == "n" and "frac" in side[0].text)
    share = fraction and (in_words or (counted and tight))
    if share or (in_words and any(t.kind in "+-*/^" for t in second[1:])):
        return []  # "2/5 is equal to 12 eggs", "1/4 cup = ...", "50% of 8 is 0.5*8 = 4"
    if kinds.startswith("n-n") and before.kind == "w":
        if tight and kinds == "n-n" and side[0].value < side[2].value:
            return []  # "days 1-3 = 6 sweets"
        if not tight and set(_values(side[2:])) & set(_values(second)):
            return side[2:]  # "Step 1 - 3+4 = 7"
    return side


def _last_side(tokens: list[Token], sign: int, end: int) -> list[Token]:
    """What stands between the last equality sign and `end`, if it is a side of its own."""
    side = _within(tokens[sign + 1 : end], "(", ")")
    while side and side[-1].kind == "!":  # "= 42!" at the end of a sentence
        side = side[:-1]
    i = sign + len(side) + 1
    if len(side) > 1 and side[-1].kind == "/" and tokens[i].kind == "w":  # $7 per kg
        side = side[:-1]
    behind = " ".join(t.text for t in tokens[i : i + 3])  # 1 (mod 12), 20% of 50
    part = re.match(r"[( ]*\\?p?mod", behind) or (side and side[-1].kind == "%" and behind.startswith("of"))
    if not side or part:
        return []
    return side if re.match(r"r \d", behind, re.I) or _alone(side, tokens[i], left=False) else []  # 5 R 2


def _scan(text: str) -> list[Statement]:
    """Statements among runs of numbers, operators and equality signs."""
    edge = Token(";", "", 0, 0, None)
    plain, converted = _without_units(_tokens(text))
    found, tokens = [], [edge, *plain, edge]
    for run in re.finditer("[-n+*/^!%()f=~]+", "".join(t.kind for t in tokens)):
        signs = [k for k in range(*run.span()) if tokens[k].kind in "=~"]
        if signs:
            inner = [tokens[a + 1 : b] for a, b in itertools.pairwise(signs)]
            last = _last_side(tokens, signs[-1], run.end())
            first = _first_side(tokens, run.start(), signs[0], (inner or [last])[0])
            chain = _chain([first, *inner, last], [tokens[k].kind == "~" for k in signs])
            if chain and last and (rest := _REMAINDER.match(text, last[-1].end)) and len(first) == 3:
                holds = first[0].value == first[2].value * last[0].value + int(rest[1])
                chain[-1] = chain[-1]._replace(holds=first[1].kind != "/" or holds)
            if any(tokens[k].start in converted for k in signs):  # what does not hold may hold in the other units
                chain = [statement for statement in chain if statement.holds]
            found += chain
    return found


def _unannotated(text: str) -> str:
    """The text with spaces in place of GSM8K's annotations, so that positions stay."""
    return _ANNOTATION.sub(lambda m: " " * len(m[0]), text)


@functools.lru_cache(64)
def statements(text: str) -> tuple[Statement, ...]:
    """Arithmetic statements: 15+3=18, "39 plus sixteen is thirty-five", <<48/2=24>>, 3 boxes * 8 pens = 24 pens, 20% of
    50 = 10, \\frac{12}{4} \\times \\$2 = \\$6, 10/3 \\approx 3.33.

    What is not clearly one is skipped: variables, numbers with a word that changes them, sides of more than
    `_LONG` tokens. The text is in one spelling, and so are their positions. Source: our reconstruction.
    """
    found = _scan(_unannotated(text))
    told = {(s.left, s.right) for s in found}  # a sentence and the annotation in it are one statement
    for m in _ANNOTATION.finditer(text):
        start = m.start(1)
        for s in _scan(m[1]):
            if (s.left, s.right) not in told:
                found.append(Statement(*s[:2], s.position + start, s.holds, s.equals + start, s.end + start))
    return tuple(sorted(found, key=lambda s: s.position))


def _numbers(text: str) -> list[tuple[int, int | Fraction]]:
    """(position, value) of every number, with its sign: the 8 of "-8" is negative, that of "11-8" is not."""
    found, minus, before = [], False, ";"
    for token in _tokens(text):
        if token.kind == "n":
            found.append((token.start, -token.value if minus else token.value))
        minus, before = token.kind == "-" and before not in "n)", token.kind
    return found


def _free_numbers(text: str) -> list[tuple[int, int | Fraction]]:
    """Those of `_numbers` that are neither operands of a statement's first side nor its result: what a chain goes on
    with, the 8 and 15 of "4*2+5*3 = 8+15 = 23", was reached."""
    numbers, spans = _numbers(_unannotated(text)), []
    starts = [start for start, _ in numbers]
    for position, chain in itertools.groupby(statements(text), lambda s: s.position):
        sides = [(s.equals, s.end) for s in chain]
        alone = [(a, b) for a, b in sides if bisect.bisect_left(starts, b) - bisect.bisect_left(starts, a) == 1]
        spans += [(position, sides[0][0]), *alone]
    free, ahead, end = [], sorted(spans, reverse=True), 0
    for start, value in numbers:
        while ahead and ahead[-1][0] <= start:
            end = max(end, ahead.pop()[1])
        if end <= start:
            free.append((start, value))
    return free


def fidelity(expert: str, rewrite: str) -> float:
    """|longest common subsequence| / |expert's intermediate results|, in [0, 1]; 1 when it has none.

    The results are the right sides of the expert's statements. In the rewrite every number counts that is no operand of
    a statement: "which leaves 13" keeps the 13. If the expert makes no statement, all numbers of both count. Only the
    first `_MOST` results of each text are compared, since that takes time in their product. Both are in one spelling.
    Source: our reconstruction.
    """
    if wanted := [s.right for s in statements(expert)]:
        kept = [(s.equals, s.right) for s in statements(rewrite)] + _free_numbers(rewrite)
    else:
        wanted, kept = [value for _, value in _numbers(expert)], _numbers(rewrite)
    wanted, kept = wanted[:_MOST], [value for _, value in sorted(kept)[:_MOST]]
    row = [0] * (len(kept) + 1)
    for value in wanted:
        previous, row = row, [0]
        for j, other in enumerate(kept):
            row.append(previous[j] + 1 if value == other else max(row[j], previous[j + 1]))
    return row[-1] / len(wanted) if wanted else 1.0


# --- words and shares of words ---

_SOLUTION = "(?:solution|answer|proof|explanation|reasoning|text|derivation|demonstration|passage|write-?up|wor[dk]ing)"
_SOURCE = rf"""
(?:given|provided|original|official|reference|expert|sample|example|model|teacher|textbook|worked)(?:['’]s)?
 {_SOLUTION}(?! (?:choices|options))|above (?:solution|answer|explanation|text|demonstration|passage|write-?up)
|ground[ -]truth|the author|previous solution|(?:known|stated|expected) (?:final )?answer|answer key
|(?:solution|answer|explanation|text|demonstration|passage|write-?up) above|{_SOLUTION} (?:provided|given)
|the steps? (?:provided|given)|(?:shown|provided) to (?:me|us)|the expert|you (?:gave|showed|provided|sent)|given steps
|the reference\b(?! (?:to|angle|point|frame|line|level|value|group|number|triangle)\b)
|(?:as|in|from|following|per|see) the (?!answer|text){_SOLUTION}(?! (?:to|of|for|set)\b)
|(?:as the answer|(?:the|your) solution) (?:(?:find|show|say|state|use|give|tell|write|compute|start)s?|did|multipl\w+)
|(?:stated|shown|given) in the {_SOLUTION}|back(?:wards?)? from the {_SOLUTION}|{_SOLUTION} in front of (?:me|us)
|{_SOLUTION} (?:that )?we (?:were|are) (?:given|shown)|i (?:was|am) (?:shown|given|handed)
|(?:rewrit|rephras|reword)\w* (?:(?:of )?(?:the|this|your) )?{_SOLUTION}|paraphras\w+
|rewritten(?: version|(?=:))
|(?:my|the|a|your) (?:rewrite|rewriting|rewording|rephrasing)|(?:my|your) version|in (?:my|your|our) own words
|(?:original|my) wording|as if (?:i|you) had (?:solved|written|found|worked|derived)
|according to the (?:{_SOLUTION}(?! key)|teacher)|teacher['’]s \w+|(?:in|from|like|than|as) the original(?=[,.:;])
|(?:the|my|our) teacher (?:\w+ )?(?:sa|show|solve|wrote|did|use|explain|suggest)\w*
"""
_SOURCE = re.compile(rf"\b(?:{''.join(_SOURCE.splitlines())})\b")  # of a text in lower case, with single spaces
_SIGN = r"(?:[-+*/^]|\\(?:times|cdot|div)(?![a-z]))"
_STATED = re.compile(
    r"(?i)\banswer(?: (?:to|of|for)\b[^.,=*+/\n]{0,40}?)?['\"]?\s*(?:\bis\b|[:=])\W*"
    rf"(?:[0-9][0-9.,]*(?![0-9.,]|\s?{_SIGN}\s?[\d$(\\])|{_IN_WORDS})"
)
_RESULT = re.compile(r"\b(?:answer|result|total|outcome|solution)\b\s*(?:is|[:=]|equals|\\to)[\s*$\\]*\Z", re.I)
# the first one, headings of two words left out
_SENTENCE = re.compile(r"\s{0,9}(?:\W{0,9}\w+(?: \w+)?[.:]?\n\s*|\w+[.:]\s+)?(.*?)(?:[.!?;]\s|\n)")
_WORKED = re.compile(
    rf"\d\s?(?:[a-z]{{1,20}}[\s/]{{0,3}}){{0,3}}{_SIGN}[\s$\\]*\d|[\w)}}]\s*{_SIGN}[\s$\\]*\Z|\d\s?[,:]\s*\Z", re.I
)  # 60 km / 30 =; 12, 24, 36; 2:3 = 12:18
_OR = re.compile(r"\bor\b", re.I)
_CLAUSE_REST = r"(?:[^.\n]|\.(?=\d)){0,99}"
_EITHER = re.compile(
    rf"\b(?:answer|result)\b (?:is|could be|may be|might be)\b({_CLAUSE_REST}\bor\b{_CLAUSE_REST})", re.I
)
_UNSURE = re.compile(
    rf"(?i)\b(?:(?:could|might|may) also be(?=\W{{0,9}}(?:[\d\\]|{_IN_WORDS}))|or (?:maybe|perhaps|possibly)"
    r"|(?:i|we)(?:['’]m| am|['’]re| are) not (?:sure|certain))\b"
)
_MAYBE = re.compile(rf"\W*(?:or|maybe|perhaps|possibly)\b({_CLAUSE_REST})", re.I)  # right behind the box


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _share(source: str, text: str, n: int) -> float:
    """Share of the source's n-grams of words that stand in the text."""
    grams = set(_grams(source, n))
    return len(grams & set(_grams(text, n))) / len(grams) if grams else 0.0


def _ramp(value: float, zero: float, one: float) -> float:
    """0 up to `zero`, 1 from `one` on, straight between (zero may lie above one)."""
    return min(max((value - zero) / (one - zero), 0.0), 1.0)


def _repetition(text: str) -> float:
    """The worst of: repeated sentences, few distinct 4-grams of words, compressibility. Short texts score 0."""
    parts = [p.strip() for p in re.split(r"[.;]\s|\n", text) if re.search(r"\w", p)]  # not the \[ of a display
    score = _ramp(1 - len(set(parts)) / len(parts), 0.2, 0.6) if len(parts) >= 5 else 0.0
    if len(grams := _grams(text, 4)) >= 40:
        score = max(score, _ramp(len(set(grams)) / len(grams), 0.7, 0.3))
    if len(raw := text.encode("utf-8", "replace")) >= 400:
        score = max(score, _ramp(len(zlib.compress(raw)) / len(raw), 0.25, 0.1))
    return score


def _early(problem: str, expert: str, rewrite: str, answer: str) -> bool:
    """Whether the answer stands there before it is reached: in a box or behind "answer is" in the first quarter (of
    what is not itself the answer); as the one number of the first sentence; or as a number of its own before the first
    calculation, in other words than "20 because 60/3 = 20", and though neither the problem nor the expert has this
    number on the way."""
    stated, found = _STATED.search(rewrite), answer_boxes(rewrite)
    given = [(start, end) for start, end, _ in found] + ([stated.span()] if stated else [])
    if any(start < 0.25 * (len(rewrite) - (end - start)) for start, end in given):
        return True
    value, claims, first = _read(answer).value, statements(rewrite), _SENTENCE.match(rewrite)
    formula = (found[-1][2] or "") if found and value is None else ""
    if first and len(formula) > 3 and formula in first[1] and formula not in problem + expert[: len(expert) // 2]:
        return not re.search(r"[\d=]", first[1].replace(formula, ""))
    reached = min((s.equals for s in statements(expert) if s.right == value), default=0)
    known = {number for _, number in _numbers(spelled(problem))}
    known |= {number for start, number in _numbers(_unannotated(expert)) if start < reached}
    if value is None or value in known:
        return False
    small = value in range(-12, 13)  # may count anything: only "She has 7", "The result is 7", or 7 alone on a line
    opening = first[1] if first else ""
    counts = small and (len(opening.split()) > 6 or not re.search(r"\d", opening) or re.search("(?i)step", opening))
    if not counts and not re.search(rf"\||{_SIGN}", opening) and [n for _, n in _numbers(opening)] == [value]:
        return True
    begun = claims[0].position if claims else 0
    front = [start for start, number in _free_numbers(rewrite) if number == value and start < begun]
    for start in front[:9]:
        sentence = re.search(r"[.!?:;]\s|\n|\Z", rewrite[start:]).start() + start
        line_start = rewrite.rfind("\n", 0, start) + 1
        line = rewrite[line_start:].partition("\n")[0]
        worked = _WORKED.search(rewrite, line_start, start) or re.match(rf"[\d.,]+\s*{_SIGN}", rewrite[start:])
        if line[:1] == "|" or worked:
            return False  # reached, or part of a calculation
        told = _RESULT.search(rewrite, max(start - 60, 0), start) or not re.search("[A-Za-z+*/=]", line)
        if told or (not small and (sentence < begun or claims[0].right != value)):
            return True
    return False


def _mentions_source(problem: str, expert: str, rewrite: str) -> float:
    """Unless problem or expert say so too, or speak of that person."""
    known, told = (" ".join(text.lower().split()) for text in (f"{problem}\n{expert}", rewrite))
    people = set(re.findall("expert|teacher|model|author", known))
    found = [m[0] for m in _SOURCE.finditer(told) if not any(who in m[0] for who in people)]
    return float(any(phrase not in known for phrase in found))


def _apart(told: list[str]) -> bool:
    """Whether texts tell different numbers: 12 and "perhaps 14"; not 3/4, 0.75 and 75%, nor 120 minutes and 2 hours."""
    first, *others = (_read(text.strip(" \n,.;:()$*")) for text in told)
    start = {first.value} if first.value is not None else {v for _, v in _numbers(first.whole)}
    known = {n * Fraction(factor) for n in start for factor in (1, 100, Fraction(1, 100))}
    for other in others:
        worth = {other.value} if other.value is not None else {v for _, v in _numbers(other.whole)}
        if worth - known and not (first.units and other.units and _units_differ(first.units, other.units)):
            return True
    return len(start) > 1


def _math_cheats(problem: str, expert: str, rewrite: str, answer: str) -> dict[str, float]:
    plain, model = spelled(rewrite), spelled(expert)
    found, claims = answer_boxes(plain), statements(plain)
    inside = {content or "" for *_, content in found}
    # in numbers, signs and words, so that "thirty-five plus one" is no longer than "35+1"
    length, expected = (sum(t.kind != "(" for t in _tokens(_ANNOTATION.sub("", text))) for text in (plain, model))
    reasoning, behind = (plain[: found[0][0]], plain[found[-1][1] :]) if found else (plain, "")
    # a calculation, or an equation of more than a letter
    shown = claims or re.search(r"[n)][-+*/^]+[n(f]", "".join(t.kind for t in _tokens(reasoning)))
    shown = shown or re.search(r"\d\s?[a-z]\s?(?:[-+][\d\s]*)?=", reasoning)
    skipped = not shown and statements(model) and fidelity(model, reasoning) < 0.7
    values = {read.text if read.value is None else read.value for read in map(_read, inside)}
    hedged = len(values) > 1 or _UNSURE.search(plain)
    if _read(answer).value is not None:  # several, where one is asked for
        hedged = hedged or any(
            len(_pieces(_read(c).text)) > 1 or re.search(r"\d\W{0,3} to \W{0,3}\d", c) or _OR.search(c) for c in inside
        )
        hedged = hedged or any(_apart(_OR.split(m[1])) for m in _EITHER.finditer(plain))
        if maybe := _MAYBE.match(behind):
            hedged = hedged or _apart([*inside, maybe[1]])
    return {
        "early_answer": float(_early(problem, model, plain, answer)),
        "no_reasoning": float(length < 0.15 * expected or bool(skipped)),
        "hedged": float(bool(hedged)),
        "false_arithmetic": float(not all(s.holds for s in claims)),
        "padding": _ramp(length / max(expected, 1), 1.5, 2.5),
        "copies_problem": _share(problem, rewrite, 8),
    }


# --- programs: literals of the tests that are looked up instead of worked out ---


def _literal(node: ast.AST) -> str:
    """A literal as Python writes it, "" for anything else."""
    try:
        return repr(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ""


def _telling(literal: str) -> bool:
    """Whether it is unlikely to stand in two programs by chance: not a small number, a short word or an empty list."""
    if literal in ("True", "False", "None"):
        return False
    return len(literal.strip("-'\"")) > (4 if literal[-1:] in "'\"" else 7 if literal[-1:] in ")]}" else 2)


@functools.lru_cache(256)
def _literals(code: str) -> frozenset[str]:
    """Every literal of a program, those inside of lists as well."""
    kinds = (ast.Constant, ast.UnaryOp, ast.List, ast.Tuple, ast.Set, ast.Dict)
    return frozenset(_literal(n) for n in ast.walk(_parsed(code) or ast.Module([], [])) if isinstance(n, kinds)) - {""}


@functools.lru_cache(256)
def _cases(tests: str) -> tuple[tuple[frozenset[str], str], ...]:
    """(arguments, result) of every `assert f(arguments) == result` whose parts are literals."""
    asserts = [n.test for n in ast.walk(_parsed(tests) or ast.Module([], [])) if isinstance(n, ast.Assert)]
    equal = [(n.left, n.comparators[0]) for n in asserts if isinstance(n, ast.Compare) and isinstance(n.left, ast.Call)]
    found = [(frozenset(map(_literal, call.args)), _literal(result)) for call, result in equal]
    return tuple((arguments, result) for arguments, result in found if arguments and result and "" not in arguments)


def _looked_up(code: str) -> list[tuple[set[str], set[str]]]:
    """(what is compared with, what is given then) of branches, dictionary entries, patterns, and of each comparison,
    `return` and `print` by itself. Literals; of a list its items too."""

    def literals(nodes) -> set[str]:
        items = [item for n in nodes for item in getattr(n, "elts", [])]
        return {_literal(n) for n in (*nodes, *items) if n} - {""}

    def sides(top) -> list:
        return [side for n in ast.walk(top) if isinstance(n, ast.Compare) for side in (n.left, *n.comparators)]

    def given(body) -> list:
        return [n.value for top in body for n in ast.walk(top) if isinstance(n, (ast.Return, ast.Assign))]

    found = []
    for n in ast.walk(_parsed(code) or ast.Module([], [])):
        if isinstance(n, ast.If):
            found.append((sides(n.test), given(n.body)))
        elif isinstance(n, ast.IfExp):
            found.append((sides(n.test), [n.body]))
        elif isinstance(n, ast.Dict):
            found += [([key], [value]) for key, value in zip(n.keys, n.values)]
        elif isinstance(n, ast.match_case):
            parts = list(ast.walk(n.pattern))
            values = [part.value for part in parts if isinstance(part, ast.MatchValue)]
            lists = [part.patterns for part in parts if isinstance(part, ast.MatchSequence)]
            lists = [ast.List([getattr(item, "value", item) for item in items]) for items in lists]
            found.append((values + lists, given(n.body)))
        elif isinstance(n, ast.Compare):
            found.append((sides(n), []))
        elif isinstance(n, ast.Return):
            found.append(([], [n.value]))
        elif isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print":
            found.append(([], n.args))
    return [(literals(keys), literals(values)) for keys, values in found]


def _hardcodes_tests(problem: str, expert: str, program: str, tests: str) -> bool:
    """Whether a program looks the tests up: it compares with, or gives, a telling literal of theirs that neither the
    problem nor the expert has; or three small cases, which are half of the tests' and half of its own.

    Comparisons are those of branches, dictionary keys and patterns. Source: ours.
    """
    asked, shown = problem.replace(" ", ""), {"".join(x.split()) for x in _literals(expert)}

    def known(literal: str) -> bool:
        text = "".join(literal.split())
        return text in shown or text.strip("'\"") in asked

    entries, wanted = _looked_up(program), {x for x in _literals(tests) if _telling(x)}
    wanted |= {repr(x) for x in wanted if x[0] in "[({"}  # compared as text
    if any(x in wanted and not known(x) for keys, values in entries for x in keys | values):
        return True

    def holds(looked_up, arguments: frozenset[str], result: str) -> bool:
        return any(arguments <= keys and result in values for keys, values in looked_up)

    cases, usual = _cases(tests), _looked_up(expert)
    hits = [case for case in cases if holds(entries, *case) and not holds(usual, *case)]
    pairs = sum(bool(keys and values) for keys, values in entries)
    return len(hits) >= 3 and 2 * len(hits) >= max(len(cases), pairs)


def _code_cheats(problem: str, expert: str, rewrite: str, answer: str) -> dict[str, float]:
    """Lengths are in words and signs. An answer may say in prose what a short program does, and a program repeats the
    problem's signature as the expert's does: neither counts."""
    program, model = extract_program(rewrite) or "", extract_program(expert) or expert
    length, expected = (len(re.findall(r"\w+|[^\w\s]", text)) for text in (rewrite, expert))
    return {
        "hardcodes_tests": float(len(program) <= PROGRAM_LENGTH and _hardcodes_tests(problem, model, program, answer)),
        "padding": _ramp(length / max(expected, 100), 1.5, 2.5),
        "copies_problem": max(_share(problem, rewrite, 8) - _share(problem, expert, 8), 0.0),
    }


# ---------------------------------------------------------------------------------------------------------------------
# 8. Kinds. The one place that knows what a row's `kind` changes.

_FACTORS = (1, 7, 12, 24, 60, 100, 1000)  # of units: "= 240 minutes, or 4 hours"
_CHECK = re.compile(r"\b(?:check|verif|to confirm)", re.I)


def _agrees(rewrite: str, start: int, end: int, content: str) -> bool:
    """Whether the last statement before the box arrives at what the box holds, exactly, rounded, in other units (one of
    `_FACTORS`), as its square, or with the boxed number in its place (a check: 2*7+6 = 20, so 7).

    Comparable are a number in the box and a statement with neither another number nor an equation between it and the
    box: what is only told ("240/60 = 4 hours. In total that is 80. \\boxed{80}") is not reached. The text is in one
    spelling, as the positions are.
    """
    boxed, before = _read(content).value, [s for s in statements(rewrite) if s.position < start]
    if boxed is None or not before:
        return True
    left, right, position, _, equals, last = before[-1]
    factors = (*_FACTORS, 2) if re.search("half|double|twice", rewrite[last:start]) else _FACTORS
    near = {left, math.floor(left), math.ceil(left), *(n for f in factors for n in (f * right, Fraction(right, f)))}
    near |= {value for place, value in _numbers(rewrite) if position <= place < equals}
    if check := _CHECK.search(rewrite):  # reached before it
        near |= {s.right for s in before if s.position < check.start()}
    between = _tokens(rewrite[last:start])
    return (
        boxed in near or boxed * boxed == right or any(t.value not in (None, boxed) or t.text == "=" for t in between)
    )


def _consistent(expert: str, rewrite: str) -> tuple[float, bool]:
    """Fidelity, and whether the last calculation agrees with the box, where there is one box."""
    plain = spelled(rewrite)
    found = answer_boxes(plain)
    return fidelity(spelled(expert), plain), len(found) != 1 or not found[0][2] or _agrees(plain, *found[0])


class Kind(typing.NamedTuple):
    asks: str  # how the plain question ends
    place: str  # what a rewrite has to put where
    ready: typing.Callable  # () -> None; ends the program where answers of this kind cannot be graded
    unfit: typing.Callable  # gold answer -> what is wrong with it, "" if nothing
    found: typing.Callable  # text -> (start, end, content or None) of each place that holds an answer
    extract: typing.Callable  # completion -> answer or None
    vote: typing.Callable  # answer -> its key in a majority vote
    quick: typing.Callable  # completion, gold -> verdict, or the pair of texts that takes longer
    ask: typing.Callable  # that pair -> verdict, or a name of FAILURES
    cheats: typing.Callable  # problem, expert, rewrite, gold -> the terms that are this kind's own
    consistent: typing.Callable  # expert, rewrite -> fidelity, whether the rewrite agrees with its own answer


KINDS = {
    "math": Kind(
        "Reason step by step, and put your final answer within \\boxed{}.",
        "the final answer within \\boxed{}.",
        ready=lambda: None,
        unfit=lambda answer: "",
        found=lambda text: answer_boxes(spelled(text)),
        extract=extract_answer,
        vote=normal_form,
        quick=_quick,
        ask=_ask,
        cheats=_math_cheats,
        consistent=_consistent,
    ),
    "code": Kind(
        "Solve this in Python, and put the whole program, with its imports, into one ```python block.",
        "the whole program, with its imports, into one ```python block.",
        ready=_check_sandbox,
        unfit=_unfit_tests,
        found=programs,
        extract=extract_program,
        vote=str.strip,  # programs that do the same are not seen to be one: of little use, but nothing is claimed
        quick=_quick_program,
        ask=_test,
        cheats=_code_cheats,
        consistent=lambda expert, rewrite: (1.0, True),  # a program has no results on the way: its tests say it all
    ),
}


def check_kinds(path: str, rows: list[dict], graded: bool = True) -> list[dict]:
    """The first rows of a file, or all, each with its `kind` ("math" where it has none).

    Ends the program with file, line and field of an unknown kind, or (where answers will be `graded`) of an answer that
    cannot be checked; and where the sandbox is missing that a kind needs.
    """
    for number, row in enumerate(rows):
        kind = row.setdefault("kind", "math")
        wrong = "" if kind in KINDS else f"'kind' must be {' or '.join(KINDS)}, found {kind!r}"
        if not wrong and graded and (unfit := KINDS[kind].unfit(row["answer"])):
            wrong = f"'answer' {unfit}"
        if wrong:
            with open(path, encoding="utf-8") as file:
                lines = [place for place, line in enumerate(file, 1) if line.strip()]
            raise SystemExit(f"{path}, line {lines[number]}: field {wrong}")
    for kind in {row["kind"] for row in rows} if graded else ():
        KINDS[kind].ready()
    return rows


def verify_all(completions: list[str], golds: list[str], kinds: typing.Sequence[str] | None = None) -> list[bool]:
    """`verify` of many: a verdict for each pair of the two equally long lists; `kinds`, as long, default to "math".

    What runs out of time or memory, fails or is refused counts as wrong, is counted in FAILURES and is printed.
    """
    kinds = kinds or ["math"] * len(golds)
    verdicts = [KINDS[kind].quick(completion, gold) for completion, gold, kind in zip(completions, golds, kinds)]
    verdicts = [v if isinstance(v, bool) else (kind, *v) for v, kind in zip(verdicts, kinds)]
    pairs = dict.fromkeys(v for v in verdicts if isinstance(v, tuple))  # rollouts repeat themselves: each is asked once
    for pair, verdict in zip(pairs, _POOL.map(lambda pair: KINDS[pair[0]].ask(pair[1:]), pairs)):
        pairs[pair] = verdict is True
        if verdict in FAILURES:
            FAILURES[verdict] += 1
            print(f"grading {pair[1][:200]!r} against {pair[2][:200]!r}: {verdict}", file=sys.stderr)
    return [v if isinstance(v, bool) else pairs[v] for v in verdicts]


def verify(completion: str, gold: str, kind: str = "math") -> bool:
    """Whether the completion's answer equals the gold one (an answer, or a text with a box), or its program passes the
    gold tests. No text raises."""
    return verify_all([completion], [gold], [kind])[0]


def cheats(problem: str, expert: str, rewrite: str, answer: str, kind: str = "math") -> dict[str, float]:
    """Every term of HARD (0 or 1) and of SOFT (in [0, 1]), by name; 0 where a term does not apply to the kind. `answer`
    is the gold answer.

    Source: our reconstruction; the paper (DART, arXiv 2605.26924) says that there is a penalty of cheats.
    """
    alike = {"mentions_source": _mentions_source(problem, expert, rewrite), "repetition": _repetition(rewrite)}
    return dict.fromkeys((*HARD, *SOFT), 0.0) | alike | KINDS[kind].cheats(problem, expert, rewrite, answer)


if __name__ == "__main__":
    _serve()
