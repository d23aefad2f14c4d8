"""What a text is worth: how a problem is asked, how an answer is read, what a rewrite earns.

    1. prompts      the words in which a problem is put to a model
    2. token ids    the same as ids; where an answer ends
    3. answers      completion -> answer -> right or wrong
    4. cheats       what a rewrite can do to look good without being good
    5. the reward   gate, alignment, penalty (DART, arXiv 2605.26924; the formula is our reconstruction)

Nothing but the standard library is imported at the top: grading runs in worker processes that run this file afresh, and
a grader that first loads torch starts seconds late.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import typing
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

# ---------------------------------------------------------------------------------------------------------------------
# 1. Prompts. The target is asked in exactly the same way in SFT, in scoring and in evaluation: base scores move by many
#    points with the prompt, so a second wording anywhere would compare prompts and not methods.


def solve_prompt(problem: str) -> str:
    """c(x): the plain question. SFT trains on it, A(y|x) conditions on it, evaluation asks it."""
    return f"{problem}\n\nReason step by step, and put your final answer within \\boxed{{}}."


def map_prompt(problem: str, solution: str) -> str:
    """p(x, y°): problem and expert solution, for the mapper, which answers with a rewrite."""
    return (
        f"Problem:\n{problem}\n\nSolution:\n{solution}\n\n"
        "Rewrite this solution in your own words, as if you had solved the problem yourself. "
        "Keep every step, and put the final answer within \\boxed{}."
    )


def guided_prompt(problem: str, solution: str) -> str:
    """Mind the Gap's second attempt: solve the problem again, with the expert's solution in view."""
    return (
        f"Problem:\n{problem}\n\nHere is a worked solution, for you alone:\n{solution}\n\n"
        "Understand it first. Then solve the problem again in your own way, explaining each step, without copying or "
        "mentioning what you were shown. Put the final answer within \\boxed{}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# 2. Token ids. Training, scoring, rewriting and evaluation all turn text into ids here, and nowhere else.

# For every template: no thinking; and one date, since Llama 3.x writes today's into its prompt: a model that is trained
# today would be evaluated tomorrow under another prompt.
_TEMPLATE = dict(enable_thinking=False, date_string="26 Jul 2024")


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Token ids of one user turn, up to where the assistant starts to speak."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **_TEMPLATE
    )


def response_ids(tokenizer, text: str) -> list[int]:
    """Token ids of an assistant's answer with its stop id. No template renders it: templates trim and rewrite."""
    return tokenizer.encode(text, add_special_tokens=False) + [stop_id(tokenizer)]


def text_ids(tokenizer, problem: str, text: str) -> tuple[list[int], list[int]]:
    """What fine-tuning sees of a text: the ids of the plain question, and those of the text with its stop id."""
    return prompt_ids(tokenizer, solve_prompt(problem)), response_ids(tokenizer, text)


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
    ids = list(ids)
    if ids and ids[-1] in stop_ids(tokenizer):
        ids = ids[:-1]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


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
    for name, of in (
        ("vocabulary", lambda t: t.get_vocab()),
        ("chat template", lambda t: t.chat_template),
        ("end of an answer", stop_id),
    ):
        if of(one) != of(other):
            told = f"{one.name_or_path} and {other.name_or_path} must share a tokenizer"
            raise SystemExit(f"{told}; they differ in: {name}")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Answers. An answer is found in the completion, both answers are read (one spelling, and the unit apart), and the
#    first kind that knows them compares them: number, option, words, interval. What is left is a formula: those go to
#    math-verify, which may hang: only ever in worker processes, which die when their time is up.

SECONDS, MEMORY = 5, 4 << 30  # seconds and bytes for one comparison by math-verify
LONGEST, BRACKETS, NESTED = 400, 40, 10  # characters, opened brackets (in all, inside each other) of an answer; what
# has more is wrong without a look: nesting costs the parser time in powers of two
FAILURES = {"timeouts": 0, "errors": 0}  # comparisons that outlasted their time, or in which math-verify failed
_POOL = ThreadPoolExecutor(min(4, os.cpu_count()))  # of threads that ask the workers; starts none before it is used
_LOCAL = threading.local()  # a thread's worker

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=(\{|$))")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_NUMBER = r"[0-9]{1,3}(?:(?:,(?:\\!)?|\{,\})[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_TOLD = (  # where an answer is given without a box
    re.compile(r"<answer>(.{0,400}?)</answer>", re.S),
    re.compile(r"####[ \t]*([^\n]+)\s*\Z"),
    # what follows lies in a lookahead, since one such phrase may stand inside another
    re.compile(r"\banswer\b(?:\s+is\b|\s*[:=])(?=(?:[:\s*]|\\\[){0,20}((?:[^\n.]|\.(?=\d)){1,400}))", re.I),
)
_FORMULA = re.compile(  # the last formula, with no number behind it
    r"(?:\$\$?([^$]{1,400})\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\])[^0-9$]{0,400}\Z", re.S
)
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")  # no command, not \text{...}
_LAST = re.compile(rf"(?:(?<![\w)])-)?\$?(?:\d+ \d+/\d+|\d*\\[dt]?frac\{{\d+\}}\{{\d+\}}|(?:{_NUMBER})(?:/\d+)?)")


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
                end = brace.end()
                content = text[match.end() + 1 : end - 1].strip()
                break
        found.append((match.start(), end, content))
    return found


def _is_bare(text: str) -> bool:
    """Whether a text is nothing but an expression, or a word or two."""
    if len(text) > 100 or not re.fullmatch(r"[^=\n]*|\W*[A-Za-z]\w?\s*=[^=\n]*", text):
        return False
    before, digit, _ = re.split(r"(\d|$)", text, maxsplit=1)
    words = _WORD.findall(text)
    return sum(map(len, words)) < 4 and not _WORD.search(before) if digit else len(words) < 3


def extract_answer(completion: str) -> str | None:
    """The last box; without one an <answer>, a ####, what follows "answer is" or "answer:", the last formula if it is
    one line, the whole of a short text that is no prose, the last number; None if there is nothing of all this.

    A box that is empty or never closed is no answer, and no number inside it becomes one.
    """
    completion = completion.replace("−", "-")
    if found := boxes(completion):
        return found[-1][2] or None
    for pattern in _TOLD:
        if found := pattern.findall(completion):
            return found[-1].strip() or None
    if found := _FORMULA.search(completion):
        answer = found[found.lastindex].strip()
        if "\n" not in answer:  # between a dollar of money and another sign, or in a text cut off, lie whole paragraphs
            return answer or None
    if _is_bare(completion):
        return completion.strip() or None
    found = _LAST.findall(completion)
    return found[-1] if found else None


# --- reading an answer: the one place where spellings that mean the same become one ---

_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ", "∞": r"\infty "}
    | {"π": r"\pi ", "∪": r"\cup ", "°": r"^\circ", "²": "^2", "³": "^3"}  # NFKC would make x2 of x²
)
_COMMANDS = dict(dfrac=r"\frac", tfrac=r"\frac", cfrac=r"\frac", varnothing=r"\emptyset", langle="(", rangle=")")
_COMMANDS |= dict(left="", right="", displaystyle="")
_LATEX = (
    (r",\\[ ;:,]", ", "),
    (r"\\([A-Za-z]+)", lambda command: _COMMANDS.get(command[1], command[0])),
    (r"(?<!\\)\\(?:!\s*|[()\[\],;: ])|\*\*|\\?\$|\^\{?\\circ\}?", ""),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
)
_WORDING = (
    (r"\s*,?\s+(?:and|or)\s+", ", "),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi"),
    (r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"^(?:\\approx|[\s+])+|(?:\\?%|[.\s])+$", ""),
    (r"(?<=\d)\s?:\s?(?=\d)", ":"),
    (r"^\(([A-Za-z])\)$", r"\1"),
)
_TEXT = r"\\(?:text[a-z]*|math(?:rm|bf|it)|mbox|rm)\s?\{"
_WRAPPED = re.compile(_TEXT + r"([^{}]*)\}")
_APART = (r"[ap]\.?m\b", "cent|dollar", "second|minute|hour|day|week|month|year", "north|south|east|west")
_QUANTITY = (  # words that change a number's value, so they are no unit
    r"(?!(?:hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?|tens|dozens?|scores?|hundreds?"
    r"|thousands?|[a-z]+illions?|squared|cubed|or|is)\b)"
)
_BEHIND, _SQUARED = r"(?:(?<=[\d})])|(?<=\\pi))\s*", r"(?:\^\{?\d\}?)?\.?\s*$"  # 17 ..., 12\pi ...; cm^2
_UNITS = [  # in \text{...} any words without a number; elsewhere plurals and known ones: single letters are variables
    re.compile(rf"{_BEHIND}{_TEXT}~?\s*+{_QUANTITY}[^{{}}\d]{{2,}}\}}{_SQUARED}"),
    re.compile(
        rf"{_BEHIND}(?:{_QUANTITY}[a-z]{{2,}}s|{'|'.join(_APART)}|(?:square|cubic) [a-z]+|[cmk]m|[km]g|feet|people"
        rf"|percent)(?:\s?(?:/|per)\s?[a-z]+)?{_SQUARED}"
    ),
]


class Answer(typing.NamedTuple):
    text: str  # in one spelling, without its unit
    unit: str  # what stood behind a number, as it was written; "" for none


@functools.lru_cache(4096)  # rollouts share their gold answers
def _read(answer: str) -> Answer:
    """An answer in one spelling; what is too long for one stays as it is."""
    if len(answer) > LONGEST:
        return Answer(answer, "")
    text, unit = answer.strip(), ""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS))
    for pattern, by in _LATEX:
        text = re.sub(pattern, by, text)
    for pattern in _UNITS:
        if found := pattern.search(text):
            text, unit = text[: found.start()], found[0]
        text = _WRAPPED.sub(r"\1", text)
    for pattern, by in _WORDING:
        text = re.sub(pattern, by, text)
    return Answer(text.strip(), unit)


# --- comparing: each kind says True or False, or None where it does not know both answers ---

_VALUE = re.compile(  # 7, -1,234.50, 3/4, 1 3/4, 1\frac{3}{4}, \frac{-3}{4}, 1.5e3, 1.5\times 10^{3}
    rf"(?P<sign>[+-]?)\s?(?:(?P<whole>\d+)(?:\s|(?=\\)))?(?:(?P<number>{_NUMBER})(?:/(?P<under>\d+))?"
    r"|\\frac\s?\{(?P<above>-?\d+)\}\s?\{(?P<below>\d+)\})"
    r"(?:(?:[eE]|\s*\\(?:times|cdot)\s*10\^)\{?(?P<power>[+-]?\d{1,3})\}?)?"
)
_RELATION = re.compile(r"\s*(<|>|\\[lg]eq?(?![a-z]))\s*")
_NAME = re.compile(  # in front of a value: x =, f(2) =, \angle ABC =, x \in
    r"(^|,\s*)(?:[A-Za-z](?:_\{?\w+\}?|\w)?(?:\([\w, ]*\))?|m?\s*\\angle\s*[A-Z]+)\s*(?:=|\\in\b)\s*"
)
_OPTION = re.compile(  # B, b, Option B, (B) 300, B because ..., not B or C, not A-B; A and I are words as well
    r"\W*(?:[Oo]ption\s+)?([A-J]|[a-j](?=\W*$))(?:\W*$|[).:,\]}]+\s*(?!\W*[A-J]\b)|(?<![AI])\s+(?:-\s+)?[a-z]{2,})"
)
_COSTLY = re.compile(  # nobody writes it as an answer, and it would be worked out
    r"\d{4,}\s*[})]*!|!\s*[)}]+\s*!|\^\s*\{[^{}]*!"  # 99999999!, ((99!)!), 9^{999!}
    r"|\^\s*\{?\s*[-+]?\d{5,}|\^\s*\{[^{}]*\d\d\s*\\(?:times|cdot)\s*\d\d|[)}]\s*\^\s*\{?\s*\d{4,}"  # 9^{99999}
    r"|\^[\s{(]*\d+\s*\^[\s{(]*(?:[5-9]|\d\d)|\^[\s{(]*[^{}()]{0,9}?\d\s*\^[\s{(]*[^{}()]{0,9}?\d\s*\^"  # 9^{9^{9}}
    r"|\\[dt]?binom\s*\{?\s*\d{5,}|binom\s*\{[^{}]*\^|\^\S*\s*\\choose"
)


def _value(text: str) -> Fraction | None:
    """The exact value of a plain number, in any spelling of _VALUE."""
    if len(text) > LONGEST or not (match := _VALUE.fullmatch(text)):
        return None
    part = match.groupdict()
    above, below = part["number"] or part["above"], int(part["under"] or part["below"] or 1)
    if not below or (part["whole"] and below == 1):  # 1/0; "1 3" is two numbers
        return None
    value = Fraction(re.sub(r"[^0-9.-]", "", above)) / below + int(part["whole"] or 0)
    return value * Fraction(10) ** int(part["power"] or 0) * (-1 if part["sign"] == "-" else 1)


def _unnamed(text: str) -> str:
    """The value alone: of x = 5, of 5 = x, of x \\in (0, 1)."""
    return re.sub(r"^([^=]+?)\s*=\s*[A-Za-z]$", r"\1", _NAME.sub(r"\1", text))


def normal_form(answer: str) -> str:
    """An answer's key in a majority vote: a number's exact value (1/2 for \\frac{1}{2} and 0.5), else its one spelling.

    Names in front and units behind are left out. Equal keys are equal answers, but not the other way round: that x+1
    is 1+x only `verify` finds out.
    """
    text = _unnamed(_read(answer).text)
    value = _value(text)
    return text if value is None else str(value)


def _rounds(decimal: str, fraction: Fraction) -> bool:
    """Whether a decimal of six places or more is what a fraction without end, cut or rounded, looks like: 0.083333."""
    places = len(decimal.partition(".")[2])
    if places < 6 or not 10**LONGEST % fraction.denominator:
        return False
    cut = (abs(fraction) - abs(_value(decimal))) * 10**places  # what is missing, in units of the last place
    return decimal.startswith("-") == (fraction < 0) and (0 <= cut < 1 or abs(2 * cut) <= 1)


def _numbers_equal(answer: str, gold: str) -> bool | None:
    """Exactly: there is no tolerance, but for a fraction that a decimal cannot hold."""
    left, right = _value(answer), _value(gold)
    if left is None or right is None:
        return None
    return left == right or _rounds(answer, right) or _rounds(gold, left)


def _options_equal(answer: str, gold: str) -> bool | None:
    option = re.fullmatch("[A-J]", gold) and _OPTION.match(answer)
    return option[1].upper() == gold if option else None


def _words_equal(answer: str, gold: str) -> bool | None:
    """Words, times and ratios are equal or not: math-verify would multiply the letters."""
    words = re.fullmatch(r"(?=.*[A-Za-z]{3}|[Nn]o$)[A-Za-z' -]+|\d+(?::\d+)+", gold)
    return answer.lower() == gold.lower() if words else None


def _interval(text: str) -> str:
    """Values of x as an interval: x > 3 is (3, \\infty), 1 < x \\le 2 is (1, 2]; other texts stay as they are."""
    parts = _RELATION.split(text)  # value, sign, value, ...
    greater = {sign.startswith((">", "\\g")) for sign in parts[1::2]}
    if greater == {True}:  # read it from the other side
        parts.reverse()
    names = [i for i, part in enumerate(parts) if re.fullmatch("[A-Za-z]", part)]
    if len(greater) != 1 or len(names) != 1 or names[0] > 2 or len(parts) > names[0] + 3 or "" in parts:
        return text
    below, above = parts[: names[0]], parts[names[0] + 1 :]
    low = f"{'(' if below[1] in '<>' else '['}{below[0]}" if below else "(-\\infty"
    high = f"{above[1]}{')' if above[0] in '<>' else ']'}" if above else "\\infty)"
    return f"{low}, {high}"


def _intervals_equal(answer: str, gold: str) -> bool | tuple[str, str] | None:
    """Where one side is an interval and the other an inequality; two of a kind are formulas."""
    if bool(_RELATION.search(answer)) == bool(_RELATION.search(gold)):
        return None
    return _formulas_equal(_interval(answer), _interval(gold))


def _formulas_equal(answer: str, gold: str) -> bool | tuple[str, str]:
    """What is left for math-verify, unless it would cost too much or only one side has letters (not \\pi, e or i)."""
    letters = [bool(re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+|\b[ei]\b", "", side))) for side in (answer, gold)]
    return False if _COSTLY.search(f"{answer} {gold}") or letters == [True, False] else (answer, gold)


_KINDS = (_numbers_equal, _options_equal, _words_equal, _intervals_equal, _formulas_equal)


def _units_differ(one: str, other: str) -> bool:
    """10 cents and 10 dollars, a.m. and p.m.; a unit of another sort, or none, is no contradiction."""
    sides = [unit.lower().replace(".", "") for unit in (one, other)]
    named = [[set(re.findall(rf"\b(?:{words})", side)) for side in sides] for words in _APART]
    return any(a and b and not a & b for a, b in named)


def _quick(completion: str, gold: str) -> bool | tuple[str, str]:
    """The verdict, or the two spellings that math-verify has to compare."""
    answer = extract_answer(completion)
    if answer is None or len(answer) > LONGEST:
        return False
    brackets = [1 if bracket in "[({" else -1 for bracket in re.findall(r"[][(){}]", answer)]
    if brackets.count(1) > BRACKETS or max(itertools.accumulate(brackets), default=0) > NESTED:
        return False
    found = boxes(gold)
    (answer, unit), (gold, gold_unit) = _read(answer), _read((found[-1][2] or "") if found else gold)
    if not gold or _units_differ(unit, gold_unit):
        return False
    if not re.search(r"=|\\in\b", gold):
        answer = _unnamed(answer)
    if re.match(r"[-\d.]+$|\\frac", gold):
        answer = re.sub(r"^\([A-J]\)\s*(?=\S)", "", answer)  # (B) 12
    if answer == gold:
        return True
    return next(verdict for kind in _KINDS if (verdict := kind(answer, gold)) is not None)


def _serve() -> None:
    """A worker: reads [seconds, answer, gold], writes verdicts. The kernel ends it when a comparison outlasts its time:
    an alarm without a handler also stops C code, needs no signal in the caller, and leaves nobody behind if that dies.
    """
    import resource  # not on Windows; the caller needs none of it

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not a verdict
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    _compare("1+x", "x+1")  # imports and builds its parser: no question pays for that with its time
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        seconds, answer, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = _compare(answer, gold)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=out, flush=True)


def _compare(answer: str, gold: str) -> bool | None:
    """math-verify on the two answers alone, in a worker; None if it fails. Its own time-outs need SIGALRM: off."""
    from math_verify import LatexExtractionConfig, parse, verify

    try:
        sides = [
            parse(f"${side}$", [LatexExtractionConfig()], "no_fallback", "first_match", None, raise_on_error=True)
            for side in (gold, answer)
        ]
        return bool(all(sides) and verify(*sides, timeout_seconds=None, raise_on_error=True))
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
        return "timeouts" if worker.returncode == -signal.SIGALRM else "errors"
    return {"true": True, "false": False}.get(verdict.strip(), "errors")


def verify_all(completions: list[str], golds: list[str]) -> list[bool]:
    """`verify` of many: a verdict for each pair of the two equally long lists.

    A comparison that runs out of time or memory counts as wrong, is counted in FAILURES and is printed.
    """
    verdicts = [_quick(completion, gold) for completion, gold in zip(completions, golds)]
    pairs = dict.fromkeys(v for v in verdicts if isinstance(v, tuple))  # rollouts repeat themselves: each is asked once
    for pair, verdict in zip(pairs, _POOL.map(_ask, pairs)):
        pairs[pair] = verdict is True
        if verdict in FAILURES:
            FAILURES[verdict] += 1
            print(f"grading {pair[0][:200]!r} against {pair[1][:200]!r}: {verdict}", file=sys.stderr)
    return [v if isinstance(v, bool) else pairs[v] for v in verdicts]


def verify(completion: str, gold: str) -> bool:
    """Whether the completion's answer equals the gold one (an answer, or a text with a box). No text raises."""
    return verify_all([completion], [gold])[0]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Cheats. What a rewrite can do to look good without being good, one named term each.

HARD = ("early_answer", "no_reasoning", "mentions_source", "hedged", "false_arithmetic")  # 0 or 1: worth nothing
SOFT = ("padding", "repetition", "copies_problem")  # in [0, 1]: worth less
_MOST = 1000  # tokens of a side, results of a text: more are not looked at, since that would take more than linear time

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_SMALL += ["seventeen", "eighteen", "nineteen"]
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: n for n, word in enumerate(_SMALL)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})[-\s](?:{'|'.join(_SMALL[1:10])})(?!\w)|(?:{'|'.join(_WORDS)})(?!\w))"
_IN_WORDS = rf"{_BELOW_100}(?:\s(?:hundred|thousand)(?!\w)(?:,?\s(?:and\s)?{_BELOW_100})?)*"
_OPERATORS = {"plus": "+", "minus": "-", "−": "-", "–": "-", "times": "*", "multiplied by": "*", "\\times": "*"}
_OPERATORS |= {"×": "*", "\\cdot": "*", "·": "*", "x": "*", "divided by": "/", "÷": "/", "\\div": "/"}
_TOKEN = re.compile(
    "|".join(
        rf"(?P<{name}>{pattern})"
        for name, pattern in dict(
            skip=r"[^\S\n]+|\*\*|\\?\$|&|\\[(),;:!\[\]]|\\boxed\{",  # spaces, dollars, mathematical delimiters
            stop=r"\n|\\\\|[;?!]|[.:](?![0-9])|,(?![0-9]{3})|\\(?:implies|Rightarrow|q?quad)(?![a-z])|[⇒→]|=>",
            number=rf"\(-(?:{_NUMBER})\)|{_NUMBER}|\\[dt]?frac\{{-?[0-9]+\}}\{{0*[1-9][0-9]*\}}",
            words=_IN_WORDS,
            operator=r"\\times|\\cdot|\\div|[-+*/×·÷−–]|(?:plus|minus|times|(?:divided|multiplied)\sby)(?!\w)"
            r"|(?<=[\d\s])x(?=\s?\$?\d)",
            equals=r"=|(?:is\sequal\sto|equals|is|makes|gives)(?!\w)",
            word=r"[^\W\d_]{2,}",
            other=r"\\[a-z]+|.",
        ).items()
    ),
    re.I | re.S,
)
_ANNOTATION = re.compile("<<([^<>]*)>>")  # GSM8K's 48/2 = <<48/2=24>>24
_KIND = dict(stop=";", number="n", words="n", equals="=", word="w", other="?")  # an operator's kind is its sign
_NOT_BEFORE = frozenset("of half twice double third quarter sin cos tan log ln sqrt percent".split())
_NOT_AFTER = frozenset("more less fewer greater percent hundred thousand million billion dozen half mod modulo".split())


class Token(typing.NamedTuple):
    kind: str  # of _KIND, or + - * /
    text: str
    start: int  # characters from the beginning of the text
    end: int
    value: int | Fraction | None  # of a number, in digits or in words


class Statement(typing.NamedTuple):
    left: int | Fraction
    right: int | Fraction
    position: int  # where the left side begins, in characters
    holds: bool
    equals: int  # where the right side begins
    end: int


def _number(text: str) -> int | Fraction | None:
    """7, 1,234.5, (-3), \\frac{3}{4}, thirty-five; nothing for digits without end."""
    if len(text) > 80:
        return None
    if text.isdigit():
        return int(text)  # equal to the Fraction, and much faster
    if re.search(r"\d", text):
        return Fraction(re.sub(r"[^0-9./-]", "", text.replace("}{", "/")))
    total = part = 0
    for word in re.findall(r"[a-z]+", text.lower()):
        if word == "hundred":
            part *= 100
        elif word == "thousand":
            total, part = part * 1000, 0
        else:
            part += _WORDS.get(word, 0)  # "and" adds nothing
    return total + part


@functools.lru_cache(64)
def _tokens(text: str) -> tuple[Token, ...]:
    """Numbers, operators, equality signs and words, in digits or in words; spaces and dollar signs are left out."""
    found = []
    for m in _TOKEN.finditer(text):
        name, value = m.lastgroup, None
        if name in ("number", "words"):
            value = _number(m[0])
            name = "number" if value is not None else "other"
        kind = _KIND.get(name) or _OPERATORS.get(" ".join(m[0].lower().split()), m[0])
        if name != "skip":
            found.append(Token(kind, m[0], m.start(), m.end(), value))
    return tuple(found)


def _evaluate(side: list[Token]) -> int | Fraction | None:
    """number (operator number)*, products first, exactly; a number may have a minus. None: not of this form."""
    if len(side) > _MOST or not re.fullmatch("-?n(?:[-+*/]-?n)*", "".join(t.kind for t in side)):
        return None
    terms, operator, sign, after_number = [0], "+", 1, False
    for token in side:
        if token.kind != "n":
            operator, sign = (token.kind, 1) if after_number else (operator, -1)
        elif operator in "+-":
            terms.append(token.value * sign * (1 if operator == "+" else -1))
        elif operator == "*":
            terms[-1] *= token.value * sign
        elif token.value:
            terms[-1] = Fraction(terms[-1]) / (token.value * sign)
        else:
            return None
        after_number = token.kind == "n"
    return sum(terms)


def _chain(sides: list[list[Token]]) -> list[Statement]:
    """a = b = c -> the statements a = b, a = c; a is the first side with an operator (else it may be a label).

    A quotient or decimals may be rounded as the right side is written, a quotient also down: 10/3=3.33, 17/3=6 or 5.
    """
    found, left, start, divides = [], None, 0, False
    for side in sides:
        if (value := _evaluate(side)) is None:
            continue
        if left is not None:
            places = 10 ** len(side[-1].text.partition(".")[2])  # 3.33 -> 100
            rounded = value * places == math.floor(left * places + Fraction(1, 2))
            holds = value == left or rounded or (divides and value == math.floor(left))
            found.append(Statement(left, value, start, holds, side[0].start, side[-1].end))
        elif len(side) > 2 or side[0].text[0] == "\\":  # has an operator that is no sign, or is a fraction
            left, start = value, side[0].start
            divides = any(t.kind == "/" or "frac" in t.text for t in side)
    return found


def _alone(side: list[Token], beside: Token, left: bool) -> bool:
    """Whether the outer side of an equation is all there is, or only part of a larger expression."""
    if beside.kind == ";" or beside.text in ("([{\"'<" if left else ")]}\"'>"):
        return True
    if beside.text.lower() in (_NOT_BEFORE if left else _NOT_AFTER):
        return False
    touches = beside.end == side[0].start if left else beside.start == side[-1].end
    return not touches and (beside.kind == "w" or beside.text in "()<>")


def _scan(text: str) -> list[Statement]:
    """Statements among runs of numbers, operators and equality signs."""
    edge = Token(";", "", 0, 0, None)
    found, tokens = [], [edge, *_tokens(text), edge]
    for run in re.finditer("[-n+*/=]+", "".join(t.kind for t in tokens)):
        i, j = run.span()
        signs = [k for k in range(i, j) if tokens[k].kind == "="]
        if not signs:
            continue
        sides = [tokens[a + 1 : b] for a, b in itertools.pairwise([i - 1, *signs, j])]
        if len(sides[0]) > 1 and sides[0][0].kind != "n":
            # "- 3+4=7" is an item of a list, "-3+4=1" a negative number, "eggs - 3 - 4 = 9" part of something larger
            item = sides[0][0].end < sides[0][1].start
            sides[0] = sides[0][item:] if tokens[i - 1].kind == ";" else []
        first, last = sides[0], sides[-1]
        share = tokens[signs[0]].text != "=" and len(first) == 3 and first[1].text == "/"  # "2/5 is equal to 12 eggs"
        if first and (share or not _alone(first, tokens[i - 1], left=True)):
            sides[0] = []
        if last and not _alone(last, tokens[j], left=False):
            sides[-1] = []
        found += _chain(sides)
    return found


def _unannotated(text: str) -> str:
    """The text with spaces in place of GSM8K's annotations, so that positions stay."""
    return _ANNOTATION.sub(lambda m: " " * len(m[0]), text)


@functools.lru_cache(64)
def statements(text: str) -> tuple[Statement, ...]:
    """Arithmetic statements: 15+3=18, "fifteen plus three is eighteen", "39 plus sixteen is thirty-five", <<48/2=24>>.

    What is not clearly one is skipped: variables, exponents, per cent, parentheses, units between the numbers. So is a
    side of more than `_MOST` tokens. Source: our reconstruction.
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
    found, minus, before = [], False, None
    for token in _tokens(text):
        if token.kind == "n":
            found.append((token.start, -token.value if minus else token.value))
        minus = token.kind == "-" and (before is None or before.kind != "n")
        before = token
    return found


def fidelity(expert: str, rewrite: str) -> float:
    """|longest common subsequence| / |expert's intermediate results|, in [0, 1]; 1 when it has none.

    The results are the right sides of the expert's statements, or all its numbers if it makes none. In the rewrite
    every number counts that is no operand of a statement: "which leaves 13" keeps the 13. Only the first `_MOST`
    results of each text are compared, since that takes time in their product. Source: our reconstruction.
    """
    wanted = [s.right for s in statements(expert)] or [value for _, value in _numbers(expert)]
    found = statements(rewrite)
    kept = [(s.equals, s.right) for s in found]
    starts, ends = [s.position for s in found], list(itertools.accumulate((s.end for s in found), max))
    for start, value in _numbers(_unannotated(rewrite)):
        i = bisect.bisect_right(starts, start)
        if not i or ends[i - 1] <= start:  # no statement reaches over it
            kept.append((start, value))
    wanted, kept = wanted[:_MOST], [value for _, value in sorted(kept)[:_MOST]]
    row = [0] * (len(kept) + 1)
    for value in wanted:
        previous, row = row, [0]
        for j, other in enumerate(kept):
            row.append(previous[j] + 1 if value == other else max(row[j], previous[j + 1]))
    return row[-1] / len(wanted) if wanted else 1.0


_SOLUTION = "(?:solution|answer|proof|explanation|reasoning)"
_SOURCE = re.compile(  # in lower case, with single spaces
    r"\b(?:(?:given|provided|original|reference|expert|above|previous|sample|model|teacher|worked)(?:['’]s)? "
    + rf"{_SOLUTION}|(?:known|stated|expected) (?:final )?answer|answer key|{_SOLUTION} (?:above|provided|given)"
    + rf"|the steps? (?:provided|given)|as the {_SOLUTION} \w+|(?:stated|shown|given) in the {_SOLUTION}"
    + rf"|back(?:wards?)? from the {_SOLUTION}|re(?:writ|phras)\w* (?:(?:of )?(?:the|this|your) )?{_SOLUTION}"
    + r"|rewritten version|paraphras\w+|in (?:my|your) own words|as if (?:i|you) had|i was (?:shown|given)"
    + rf"|according to the (?:{_SOLUTION}|teacher|expert)|teacher['’]s \w+"
    + r"|(?:the|my|our) teacher (?:\w+ )?(?:sa|show|solve|wrote|did|use|explain|suggest)\w*)\b"
)
_STATED = re.compile(rf"\banswer(?: (?:to|of|for)\b[^.,\n]{{0,40}}?)?\s*(?:\bis\b|[:=])\W*(?:[0-9]|{_IN_WORDS})", re.I)
_OR = re.compile(r"\bor\b", re.I)
_MAYBE = re.compile(r"\W*(?:or|maybe|perhaps|possibly)\b", re.I)  # right behind the box


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
    parts = [p for p in (p.strip() for p in re.split(r"[.;]\s|\n", text)) if p]
    score = _ramp(1 - len(set(parts)) / len(parts), 0.2, 0.6) if len(parts) >= 5 else 0.0
    if len(grams := _grams(text, 4)) >= 40:
        score = max(score, _ramp(len(set(grams)) / len(grams), 0.7, 0.3))
    if len(raw := text.encode()) >= 400:
        score = max(score, _ramp(len(zlib.compress(raw)) / len(raw), 0.25, 0.1))
    return score


def cheats(problem: str, expert: str, rewrite: str, answer: str) -> dict[str, float]:
    """Every term of HARD (0 or 1) and of SOFT (in [0, 1]), by name. `answer` is the gold answer.

    Source: our reconstruction; the paper (DART, arXiv 2605.26924) says that there is a penalty of cheats.
    """
    found, stated, claims = boxes(rewrite), _STATED.search(rewrite), statements(rewrite)
    given = [(start, end) for start, end, _ in found] + ([stated.span()] if stated else [])  # where the answer is given
    inside = {content or "" for *_, content in found}
    known, told = (" ".join(text.lower().split()) for text in (f"{problem}\n{expert}", rewrite))
    either = any(map(_OR.search, inside)) and not _OR.search(answer)
    # in numbers, signs and words, so that "thirty-five plus one" is no longer than "35+1"
    length, expected = (len(_tokens(_ANNOTATION.sub("", text))) for text in (rewrite, expert))
    reasoning, behind = (rewrite[: found[0][0]], rewrite[found[-1][1] :]) if found else (rewrite, "")
    skipped = not claims and len(statements(expert)) >= 2 and fidelity(expert, reasoning) < 0.7
    return {
        # little before it, measured on the rest: a long answer behind a short solution is not early
        "early_answer": float(any(start < 0.25 * (len(rewrite) - (end - start)) for start, end in given)),
        "no_reasoning": float(length < 0.15 * expected or skipped),
        "mentions_source": float(any(m[0] not in known for m in _SOURCE.finditer(told))),
        "hedged": float(len({_read(content).text for content in inside}) > 1 or either or bool(_MAYBE.match(behind))),
        "false_arithmetic": float(not all(s.holds for s in claims)),
        "padding": _ramp(length / max(expected, 1), 1.5, 2.5),
        "repetition": _repetition(rewrite),
        "copies_problem": _share(problem, rewrite, 8),
    }


# ---------------------------------------------------------------------------------------------------------------------
# 5. The reward of a rewrite: R = clean * (align - w_s * sum of soft cheats) - w_h * [a hard cheat]. Source: DART (arXiv
#    2605.26924) names the three parts, likelihood, correctness and penalty. Its text and a link to its code are public,
#    but we could not read them: the formula is our reconstruction.


def _agrees(rewrite: str, start: int, end: int, content: str) -> bool:
    """Whether the last statement before the box arrives at what the box holds.

    Comparable are a number in the box and a statement with neither number nor equation between it and the box.
    """
    boxed = _value(_read(content).text)
    last = [s for s in statements(rewrite) if s.position < start][-1:]
    if boxed is None or not last:
        return True
    between = _tokens(rewrite[last[0].end : start])
    return last[0].right == boxed or any(t.value is not None or t.text == "=" for t in between)


def judge(
    problem: str,
    expert: str,
    rewrite: str,
    answer: str,
    ended: bool,
    correct: bool,
    min_fidelity: float,
    hard: typing.Sequence[str] = HARD,
) -> dict[str, float]:
    """All that is to be known of a rewrite but its likelihood. Source: our reconstruction.

    gate = ended, exactly one box, correct, the last arithmetic statement agrees with the box, fidelity >= min_fidelity.
    `hard` names the terms that count as hard cheats; another name is a KeyError. All values are numbers: 0 or 1 for
    hard terms, gate, cheating and clean; [0, 1] for soft terms, fidelity and copy; a ratio of characters.
    """
    parts = cheats(problem, expert, rewrite, answer)
    parts["fidelity"] = fidelity(expert, rewrite)
    found = boxes(rewrite)
    one_box = len(found) == 1 and bool(found[0][2])
    agrees = not one_box or _agrees(rewrite, *found[0])
    gate = ended and correct and one_box and agrees and parts["fidelity"] >= min_fidelity
    cheating = any(parts[name] for name in hard)
    return parts | {
        "gate": float(gate),
        "cheating": float(cheating),
        "clean": float(gate and not cheating),
        "length_ratio": len(rewrite) / max(len(expert), 1),
        "copy": _share(expert, rewrite, 4),
    }


def align_nll(A: float, A_expert: float, tau: float) -> float:
    """sigmoid((A(y|x) - A(y°|x)) / tau), in (0, 1): how much likelier than the expert's text.

    A are mean log-probabilities of a token in nats, tau > 0 likewise. Source: our reconstruction.
    """
    return 0.5 + 0.5 * math.tanh((A - A_expert) / (2 * tau))  # sigmoid(z) = 1/2 + 1/2 tanh(z/2), never overflows


def align_kl(mapper_logprobs: typing.Sequence[float], target_logprobs: typing.Sequence[float], beta: float) -> float:
    """1 - beta * clip(D, 0, 2), D = mean_t clip(log M(y_t|p,y_<t) - log pi(y_t|c,y_<t), -5, 5): one sample of
    KL(M || pi), the mapper's own entropy included. Both: (T,) log-probabilities in nats of the rewrite's T >= 1 tokens
    (ZeroDivisionError for none). Source: our reconstruction."""
    gaps = [min(max(float(m) - float(t), -5.0), 5.0) for m, t in zip(mapper_logprobs, target_logprobs)]
    return 1 - beta * min(max(sum(gaps) / len(gaps), 0.0), 2.0)


def mapper_reward(parts: dict, align: float, soft_weight: float, hard_weight: float) -> float:
    """R = clean * (align - w_s * sum_k soft_k) - w_h * [a hard cheat]; `parts` is what `judge` returns.

    Source: our reconstruction."""
    soft = sum(parts[name] for name in SOFT)
    return parts["clean"] * (align - soft_weight * soft) - hard_weight * parts["cheating"]


if __name__ == "__main__":
    _serve()
