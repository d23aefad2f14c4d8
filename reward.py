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

import functools
import json
import math
import os
import re
import sys
import threading
import typing
import zlib
from fractions import Fraction

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


# ---------------------------------------------------------------------------------------------------------------------
# 2. Token ids. Training, scoring, rewriting and evaluation all turn text into ids here, and nowhere else.
# ---------------------------------------------------------------------------------------------------------------------

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
# 3. Answers. Finding the answer is ours; plain numbers and equal strings are compared here, at once and exactly; what
#    is left goes to math-verify, which may hang: only ever in worker processes, which die when their time is up.
# ---------------------------------------------------------------------------------------------------------------------

SECONDS, MEMORY = 5, 4 << 30  # for one comparison by math-verify
LONGEST, BRACKETS, NESTED = 400, 40, 10  # characters, opened brackets (in all, inside each other) of an answer; what
# has more is wrong without a look: nesting costs the parser time in powers of two
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
_COSTLY = re.compile(  # nobody writes it as an answer, and it would be worked out
    r"\d{4,}\s*[})]*!|!\s*[)}]+\s*!|\^\s*\{[^{}]*!"  # 99999999!, ((99!)!), 9^{999!}
    r"|\^\s*\{?\s*[-+]?\d{5,}|\^\s*\{[^{}]*\d\d\s*\\(?:times|cdot)\s*\d\d|[)}]\s*\^\s*\{?\s*\d{4,}"  # 9^{99999}
    r"|\^[\s{(]*\d+\s*\^[\s{(]*(?:[5-9]|\d\d)|\^[\s{(]*[^{}()]{0,9}?\d\s*\^[\s{(]*[^{}()]{0,9}?\d\s*\^"  # 9^{9^{9}}
    r"|\\[dt]?binom\s*\{?\s*\d{5,}|binom\s*\{[^{}]*\^|\^\S*\s*\\choose"
)
_RELATION = re.compile(r"\s*(<|>|≤|≥|\\[lg]eq?(?![a-z]))\s*")
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
        (r"\\varnothing(?![a-z])", r"\\emptyset"),
        (r"\\langle(?![a-z])", "("),
        (r"\\rangle(?![a-z])", ")"),
        (r"^(?:\\approx(?![a-z])|≈)", ""),
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


def normal_form(answer: str) -> str:
    """One key for all spellings of an answer that a vote shall count together: numbers by value, others normalized."""
    normal = _normal(answer)
    value = _rational(normal)
    return normal if value is None else str(value)


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


def _interval(text: str) -> str:
    """Values of x as an interval: x > 3 is (3, \\infty), 1 < x \\le 2 is (1, 2]; other texts stay as they are."""
    values, signs = _RELATION.split(text)[::2], _RELATION.split(text)[1::2]
    if {sign.startswith((">", "≥", "\\g")) for sign in signs} == {True}:  # read it from the other side
        values, signs = values[::-1], signs[::-1]
    elif any(sign.startswith((">", "≥", "\\g")) for sign in signs):
        return text
    closed = [sign != "<" and sign != ">" for sign in signs]
    if len(values) == 2 and re.fullmatch("[A-Za-z]", values[0]):
        values, closed = ["-\\infty", *values], [False, *closed]
    elif len(values) == 2:
        values, closed = [*values, "\\infty"], [*closed, False]
    if len(values) != 3 or not all(values) or not re.fullmatch("[A-Za-z]", values[1]):
        return text
    return f"{'(['[closed[0]]}{values[0]}, {values[2]}{')]'[closed[1]]}"


def _nested(text: str) -> int:
    """How deep brackets stand inside each other."""
    depth = deepest = 0
    for bracket in re.findall(r"[][(){}]", text):
        depth = depth + 1 if bracket in "[({" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def _quick(completion: str, gold: str) -> bool | tuple[str, str]:
    """The verdict, or the two spellings that math-verify has to compare."""
    answer = extract_answer(completion)
    found = boxes(gold)
    gold = (found[-1][2] or "") if found else gold.replace("−", "-")
    if answer is None or len(answer) > LONGEST:
        return False
    if len(re.findall(r"[{(\[]", answer)) > BRACKETS or _nested(answer) > NESTED:
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
        answer = re.sub(r"^([^=]+?)\s*=\s*[A-Za-z]$", r"\1", _NAME.sub(r"\1", answer))  # x = 5, 5 = x
    if re.match(r"[-\d.]+$|\\frac", gold):
        answer = re.sub(r"^\([A-J]\)\s*(?=\S)", "", answer)  # (B) 12
    if bool(_RELATION.search(answer)) != bool(_RELATION.search(gold)):
        answer, gold = _interval(answer), _interval(gold)
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
# 4. Cheats. What a rewrite can do to look good without being good, one named term each.
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
    r"(?:says|said|shows|showed|solved|wrote|did|uses|used|explain\w+|suggest\w+|solution\w*)|paraphras\w+"
    r"|as\s+(?:the\s+(?:solution|answer)\s+\w+|(?:stated|shown|given)\s+in\s+the\s+(?:solution|answer))|answer\s+key"
    r"|(?:known|stated|expected)\s+(?:final\s+)?answer|back(?:wards?)?\s+from\s+the\s+(?:answer|solution)"
    r"|the\s+steps?\s+(?:provided|given))\b",
    re.I,
)
_STATED = re.compile(
    r"\banswer(?:\s+(?:to|of|for)\b[^.,\n]{0,40}?)?\s*(?:\b(?:is|will be|must be|equals)\b|[:=])\W*"
    rf"(?:[0-9]|{_IN_WORDS}|\\boxed)",
    re.I,
)
_OR = re.compile(r"\bor\b|\beither\b", re.I)
_MAYBE = re.compile(
    r"\A\W*(?:or|maybe|perhaps|possibly|alternatively|otherwise|unless)\b", re.I
)  # right behind the box


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
    found, stated, known = boxes(rewrite), _STATED.search(rewrite), (problem + expert).lower()
    claims = statements(rewrite)
    given = [(start, end) for start, end, _ in found] + ([stated.span()] if stated else [])  # where the answer is given
    inside = {content or "" for *_, content in found}
    either = any(map(_OR.search, inside)) and not _OR.search(answer)
    length, expected = _length(rewrite), _length(expert)
    reasoning, behind = (rewrite[: found[0][0]], rewrite[found[-1][1] :]) if found else (rewrite, "")
    skipped = not claims and len(statements(expert)) >= 2 and fidelity(expert, reasoning) < 0.7
    return {
        # little before it, measured on the rest: a long answer behind a short solution is not early
        "early_answer": float(any(start < 0.25 * (len(rewrite) - (end - start)) for start, end in given)),
        "no_reasoning": float(length < 0.15 * expected or skipped),
        "mentions_source": float(any(m[0].lower() not in known for m in _SOURCE.finditer(rewrite))),
        "hedged": float(len(set(map(_normal, inside))) > 1 or either or bool(_MAYBE.search(behind))),
        "false_arithmetic": float(not all(s.holds for s in claims)),
        "padding": _ramp(length / max(expected, 1), 1.5, 2.5),
        "repetition": _repetition(rewrite),
        "copies_problem": _share(problem, rewrite, 8),
    }


# ---------------------------------------------------------------------------------------------------------------------
# 5. The reward of a rewrite: R = clean * (align - w_s * sum of soft cheats) - w_h * [a hard cheat]. Source: the paper
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


if __name__ == "__main__":
    _serve()
