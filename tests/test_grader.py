"""The grader under generated and hostile answers: right about equal and different ones, never stuck, never fooled."""

import json
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

import reward

ROOT = Path(__file__).parents[1]
SETTINGS = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)


# --- answers: (value, spellings of it); values of one kind that differ are different answers ---

INTEGERS = st.integers(-(10**12), 10**12)
SMALL = st.integers(-99, 99)


def spell_integer(n: int) -> list[str]:
    return [str(n), f"{n:,}", f"{n}.0", f"{n}.", f"{n:,}".replace(",", "{,}"), f"\\${n}" if n >= 0 else f"{n}\\%"]


def spell_fraction(f: Fraction) -> list[str]:
    sign, a, b = "-" if f < 0 else "", abs(f.numerator), f.denominator
    mixed = [f"{sign}{a // b}\\frac{{{a % b}}}{{{b}}}", f"{sign}{a // b} {a % b}/{b}"] if a > b > 1 else []
    return [f"{sign}\\frac{{{a}}}{{{b}}}", f"{sign}{a}/{b}", f"\\dfrac{{{f.numerator}}}{{{b}}}", *mixed]


def spell_tuple(values: tuple) -> list[str]:
    return [f"({', '.join(map(str, values))})", f"\\left({','.join(map(str, values))}\\right)"]


def spell_interval(value: tuple) -> list[str]:
    left, a, b, right = value
    return [f"{left}{a}, {b}{right}", f"\\left{left}{a},{b}\\right{right}"]


def spell_matrix(rows: tuple) -> list[str]:
    body = "\\\\".join("&".join(map(str, row)) for row in rows)
    return [f"\\begin{{{kind}}}{body}\\end{{{kind}}}" for kind in ("pmatrix", "bmatrix")]


def spell_set(values: frozenset) -> list[str]:
    inside = [", ".join(map(str, sorted(values, reverse=down))) for down in (False, True)]
    return [f"\\{{{text}\\}}" for text in inside]


KINDS = {
    "integers": (INTEGERS, spell_integer),
    "fractions": (st.fractions(max_denominator=99).filter(lambda f: f.denominator > 1), spell_fraction),
    "tuples": (st.tuples(SMALL, SMALL) | st.tuples(SMALL, SMALL, SMALL), spell_tuple),
    "intervals": (
        st.tuples(st.sampled_from("(["), st.integers(-9, 0), st.integers(1, 9), st.sampled_from(")]")),
        spell_interval,
    ),
    "matrices": (st.tuples(st.tuples(SMALL, SMALL), st.tuples(SMALL, SMALL)), spell_matrix),
    "sets": (st.frozensets(SMALL, min_size=2, max_size=4), spell_set),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_and_different_answers(kind):
    values, spell = KINDS[kind]

    @SETTINGS
    @hypothesis.given(values, values, st.data())
    def check(x, y, data):
        gold, *others = spell(x)
        completions = [f"So it is \\boxed{{{text}}}." for text in (gold, *others)]
        assert reward.verify_all(completions, [gold] * len(completions)) == [True] * len(completions), (x, others)
        if x != y:
            wrong = data.draw(st.sampled_from(spell(y)))
            assert not reward.verify(f"So it is \\boxed{{{wrong}}}.", gold), (x, wrong)

    check()


# --- hostile text ---

PIECES = st.sampled_from(
    r"\boxed{ \boxed \frac \sqrt \sum_{k=1}^{99} \left( \right] \begin{pmatrix} \text{ { } $ ^ _ & \\ ! ( ) [ ] "
    r", . / = + - * 1 99 x \pi \infty answer: #### <answer> </answer> ٣ ² 😀 \int \binom{9}{3} % \\\\".split(" ")
)


@SETTINGS
@hypothesis.given(
    st.lists(PIECES | st.text(max_size=3), max_size=40).map("".join), st.sampled_from(["7", r"\frac{1}{2}"])
)
def test_no_text_raises_or_takes_long(text, gold):
    started = time.monotonic()
    assert reward.verify(text, gold) in (True, False)
    assert reward.verify(f"\\boxed{{{text}}}", gold) in (True, False)
    assert time.monotonic() - started < 2 * (reward.SECONDS + 1)


HOSTILE = [
    "1" * 100_000,
    "{" * 20_000 + "}" * 20_000,
    "9^{9^{9}}",
    "9^9^9^9",
    "99999999!",
    "((9!)!)!",
    r"\binom{10^{9}}{10^{8}}",
    r"\binom{99999999}{4999999}",
    r"\sum_{k=1}^{10^{9}} k^{k}",
    r"\prod_{k=1}^{999999999} k",
    r"(9^{9999})^{9999}",
    r"\int_0^1 x^{x^{x^{x}}} dx",
    "x" * 1_000_000,
    "٣" * 300,
    "²³" * 100,
    "__import__('os').system('touch pwned')",
    "open('pwned','w')",
    r"\input{/etc/passwd}",
    "{}[]().__class__",
    "\x00\ud800",
    r"\frac{1}{0}",
    r"\sqrt[0]{1}",
    r"0^{0^{-1}}",
]


@pytest.mark.parametrize("wrap", ["{}", r"\boxed{{{}}}"])
def test_hostile_text_is_wrong_and_quick(wrap, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reward, "SECONDS", 1)
    completions = [wrap.format(text) for text in HOSTILE]
    for completion in completions:
        started = time.monotonic()
        assert not reward.verify(completion, "7"), completion[:60]
        assert time.monotonic() - started < 6, completion[:60]  # a second; the rest starts a worker after a kill
    assert not list(tmp_path.iterdir())


WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import reward
assert reward.verify("\\\\boxed{x+1}", "1+x")  # an unguarded script
print("ready", flush=True)
reward.SECONDS = 3
if sys.argv[2] == "hang":
    reward.verify("\\\\boxed{(9^{9999})^{9999}}", "7")
"""


def workers_of(parent: int) -> list[int]:
    """Process ids of the children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.parametrize("end", ["normal", "hang"])
def test_no_process_is_left_behind(end):
    """A program that ends by itself, and one that is killed while a comparison hangs."""
    caller = subprocess.Popen([sys.executable, "-c", WORKER, str(ROOT), end], stdout=subprocess.PIPE, text=True)
    assert caller.stdout.readline()  # the first verdict is there
    workers = workers_of(caller.pid)
    if end == "hang":
        assert workers
        limits = Path(f"/proc/{workers[0]}/limits").read_text()
        assert f"Max address space         {reward.MEMORY}" in limits
        caller.send_signal(signal.SIGKILL)
    assert caller.wait(60) == (0 if end == "normal" else -signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)


def test_the_same_under_torchrun_and_in_threads(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import json, os, sys, threading\nsys.path.insert(0, {str(ROOT)!r})\nimport reward\n"
        "out = []\n"
        "def work(): out.append(reward.verify_all(['\\\\boxed{x+1}', '\\\\boxed{(9^{9999})^{9999}}'], ['1+x', '7']))\n"
        "reward.SECONDS = 1\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; work()\n"
        f"json.dump(out, open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w'))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [[[True, False]] * 4] * 2


def test_repeated_questions_are_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(reward, "_ask", lambda pair: asked.append(pair) or True)
    assert reward.verify_all([r"\boxed{x+1}", r"\boxed{1}", r"\boxed{x+1}"], ["1+x", "1", "1+x"]) == [True] * 3
    assert asked == [("x+1", "1+x")]  # plain numbers never reach a worker
