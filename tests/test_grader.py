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


# --- whole completions, by what can go wrong with them ---

WRONG = [  # completion, gold
    ("\\boxed{A-B}", "A"),
    ("\\boxed{A \\cup B}", "A"),
    ("\\boxed{A; B}", "A"),
    ("\\boxed{A B}", "A"),
    ("\\boxed{A < B}", "A"),
    ("\\boxed{A\\sqrt{2}}", "A"),
    ("\\boxed{E(x)}", "E"),
    ("The answer is A careful count gives B", "A"),
    ("The answer is I believe B", "I"),
    ("\\boxed{3\\mathbf{i}+5\\mathbf{j}}", "3\\mathbf{i}+5\\mathbf{k}"),
    ("\\boxed{3\\mathrm{i}}", "3"),
    ("\\boxed{5\\text{x}}", "5"),
    ("\\boxed{2\\text{ million}}", "2"),
    ("\\boxed{3\\text{ dozen}}", "3"),
    ("\\boxed{2\\text{ hundred}}", "2"),
    ("\\boxed{5\\text{ or more}}", "5"),
    ("\\boxed{5 tens}", "5"),
    ("\\boxed{2 scores}", "2"),
    ("\\boxed{3:30\\text{ a.m.}}", "3:30\\text{ p.m.}"),
    ("\\boxed{10\\text{ cents}}", "10\\text{ dollars}"),
    ("\\boxed{2 hours}", "2 minutes"),
    ("\\boxed{40^\\circ\\text{ west}}", "40^\\circ\\text{ east}"),
    ("\\boxed{1 or 234}", "1234"),
    ("\\boxed{10 and 100}", "10100"),
    ("The temperature at midnight was −5", "5"),
    ("It takes 3 1/2 hours in all", "1/2"),
    ("The result is \\frac{1}{2}", "2"),
    ("\\boxed{0.142858}", "1/7"),
    ("\\boxed{0.333334}", "1/3"),
    ("\\boxed{3 halves}", "3"),
    ("\\boxed{5 million}", "5"),
    ("\\boxed{7x}", "7"),
    ("\\boxed{A or B}", "A"),
    ("Answer: A/B/C", "A"),
    ("\\boxed{-0.333333}", "1/3"),
    ("\\boxed{x\\ge 5}", "(5,\\infty)"),
    ("\\boxed{-1<x<2}", "[-1,2]"),
    ("\\boxed{x<3}", "(3,\\infty)"),
    ("\\boxed{x>3}", "3"),
    ("\\boxed{-1<x>2}", "(-1,2)"),
    ("\\boxed{\\approx 3.14}", "\\pi"),
    ("\\boxed{(B) 12}", "13"),
    ("\\boxed{\\text{5 cents}}", "\\text{5 dollars}"),
    ("\\boxed{5\\text{ multiplied by 3}}", "5"),
    ("\\boxed{2\\text{ hours and 30 minutes}}", "2"),
    ("\\boxed{5\\text{ (or maybe 6)}}", "5"),
    ("\\boxed{x>3>2}", "(3,\\infty)"),
    ("\\boxed{-\\frac{-3}{4}}", "-0.75"),
]
WRONG += [
    (f"\\boxed{{3 {words}}}", "3")
    for words in "thirds quarters fourths fifths sixths sevenths eighths ninths tenths halves tens dozens scores "
    "hundreds thousands millions squared cubed".split()
]
RIGHT = [  # completion, gold
    ("\\boxed{2+3\\mathrm{i}}", "2+3i"),
    ("\\boxed{5 months}", "5"),
    ("The answer is 5 months.", "5"),
    ("\\boxed{\\text{5 months}}", "5"),
    ("\\boxed{3 brothers}", "3"),
    ("\\boxed{12 others}", "12"),
    ("\\boxed{5 lessons}", "5"),
    ("\\boxed{8 quarts}", "8"),
    ("\\boxed{4 islands}", "4"),
    ("\\boxed{x - y}", "x-y"),
    ("\\boxed{n-k}", "n - k"),
    ("\\boxed{- x}", "-x"),
    ("\\boxed{-y+x}", "x-y"),
    ("\\boxed{ba}", "ab"),
    ("\\boxed{10\\text{ and }100}", "10, 100"),
    ("\\boxed{10,\\ 100}", "10, 100"),
    ("\\boxed{x \\in (0, 1)}", "(0,1)"),
    ("\\boxed{x = 1, x = 2}", "1, 2"),
    ("\\boxed{x=1 \\text{ or } x=2}", "1,2"),
    ("\\boxed{P(A)=1/2}", "\\frac{1}{2}"),
    ("\\boxed{\\angle ABC = 60^\\circ}", "60"),
    ("\\boxed{pi/2}", "\\frac{\\pi}{2}"),
    ("\\boxed{sqrt(2)}", "\\sqrt{2}"),
    ("\\boxed{12\\pi\\text{ cm}^2}", "12\\pi"),
    ("\\boxed{60 km/h}", "60"),
    ("\\boxed{60\\,\\text{km}/\\text{h}}", "60"),
    ("The answer is 60 miles per hour.", "60"),
    ("#### Step 1\n6*7 = 42\n\nThe answer is 42.", "42"),
    ("#### Answer\n18", "18"),
    ("**Final Answer:**\n42", "42"),
    ("The answer is:\n\\[\n42\n\\]", "42"),
    ("I got 7", "7"),
    ("It's 7.", "7"),
    ("So 42.", "42"),
    ("Yes, 7", "7"),
    ("The temperature at midnight was −5", "-5"),
    ("\\boxed{−5}", "-5"),
    ("It takes 3 1/2 hours in all", "3.5"),
    ("The result is \\frac{1}{2}", "0.5"),
    ("\\boxed{0.142857}", "1/7"),
    ("\\boxed{0.333333}", "1/3"),
    ("\\boxed{-0.666667}", "-2/3"),
    ("\\boxed{2 hours}", "2"),
    ("\\boxed{2 hrs}", "2 hours"),
    ("\\boxed{No}", "no"),
    ("\\boxed{B}", "B"),
    ("Answer: B but not A", "B"),
    ("\\boxed{5 cm}", "5"),
    ("\\boxed{3:30}", "3:30"),
    ("x = 5", "5"),
    ("#### 42", "42"),
    ("blah\n#### 1,042\n", "1042"),
    ("\\boxed{1, 2, and 3}", "1,2,3"),
    ("\\boxed{12\\text{ cm}^2}", "12"),
    ("\\boxed{(3, 4)}", "(3,4)"),
    ("\\boxed{f(x)=2x}", "2x"),
    ("\\boxed{\\varnothing}", "\\emptyset"),
    ("\\boxed{y=2x+1}", "2x+1"),
    ("\\boxed{5=x}", "5"),
    ("\\boxed{x\\ge 5}", "[5,\\infty)"),
    ("\\boxed{-1<x<2}", "(-1,2)"),
    ("\\boxed{2 > x \\geq -1}", "[-1,2)"),
    ("\\boxed{2 \\geq x}", "(-\\infty,2]"),
    ("\\boxed{(3,\\infty)}", "x > 3"),
    ("\\boxed{\\langle 1,2\\rangle}", "(1,2)"),
    ("\\boxed{\\approx 3.14}", "3.14"),
    ("\\boxed{\\textbf{(B) }12}", "12"),
    ("\\boxed{2^3 \\cdot 5}", "40"),
    ("\\boxed{(2/3)^{20}}", "\\frac{2^{20}}{3^{20}}"),
    ("\\boxed{x^{2^n}}", "x^{(2^n)}"),
    ("\\boxed{x_1 = 5}", "5"),
    ("\\boxed{x \\in (-\\infty, 0]}", "(-\\infty, 0]"),
    ("\\boxed{AB = 5}", "5"),
    ("\\boxed{1 hour}", "1"),
    ("\\boxed{5 kg}", "5"),
    ("\\boxed{5 feet}", "5"),
    ("\\boxed{5\\mbox{ apples left}}", "5"),
    ("\\boxed{5\\,\\rm{cm}}", "5"),
    ("\\boxed{3 : 4}", "3:4"),
    ("\\boxed{b}", "B"),
    ("The correct answer is option B.", "B"),
    ("\\boxed{\\text{Option C}}", "C"),
    ("\\boxed{\\text{(C) a right triangle}}", "C"),
    ("\\boxed{(-∞, 1) ∪ (2, ∞)}", "(-\\infty,1)\\cup(2,\\infty)"),
    ("\\boxed{x ≥ 3}", "[3,\\infty)"),
    ("\\boxed{25π}", "25\\pi"),
    ("\\boxed{x² + 1}", "x^2+1"),
    ("\\boxed{4.5 × 10^33}", "4.5e33"),
    ("\\boxed{4.5\\cdot 10^{33}}", "4.5e33"),
    ("\\boxed{11{,}111{,}100}", "11,\\! 111,\\! 100"),
    ("\\boxed{62.5\\%.}", "62.5\\%"),
    ("\\boxed{\\frac{-3}{4}}", "-0.75"),
    ("\\boxed{60^\\circ}", "60°"),
    ("\\boxed{\\mathit{x}+1}", "x+1"),
]


def test_completions_that_only_look_right_or_wrong():
    cases = [(c, g, False) for c, g in WRONG] + [(c, g, True) for c, g in RIGHT]
    verdicts = reward.verify_all([c for c, _, _ in cases], [g for _, g, _ in cases])
    assert [case for case, verdict in zip(cases, verdicts) if verdict != case[2]] == []


# --- hostile text ---

COSTLY = "9^{(9^{9})} 2^{3^{4^{4}}} 9^{9999\\cdot9999} 9^{999!} ((99!)!) (9^{9999})^{9999} (x+y)^{9999}".split()
COSTLY += "99999999! 9^{99999} 9^{9999\\times9999} 9^9^9^9 9^{3^{99}} ((9!)!)!".split() + [r"\binom{99999999}{4999999}"]
COSTLY += [r"\binom{9^9}{9^8}", r"{9999^9 \choose 9999^8}", "{" * 20 + "2" + "}" * 20, r"\sin(" * 15 + "2" + ")" * 15]


@pytest.mark.parametrize("answer", COSTLY)
def test_costly_answers_never_reach_a_worker(answer):
    assert reward._quick(f"\\boxed{{{answer}}}", r"x+\sqrt{12}") is False


PIECES = st.sampled_from(
    r"\boxed{ \boxed \frac \sqrt \sum_{k=1}^{99} \left( \right] \begin{pmatrix} \text{ { } $ ^ _ & \\ ! ( ) [ ] "
    r", . / = + - * 1 99 x \pi \infty answer: #### <answer> </answer> ٣ ² 😀 \int \binom{9}{3} % \\\\".split(" ")
    + ["3 1/2", "3 AND 1/2", r"\FRAC{1}{2}", "2.5\nmillion", "THIRTY-five Thousand", "1.5E3"]
)


@SETTINGS
@hypothesis.given(
    st.lists(PIECES | st.text(max_size=3), max_size=40).map("".join), st.sampled_from(["7", r"\frac{1}{2}"])
)
def test_no_text_raises_or_takes_long(text, gold):
    started = time.monotonic()
    assert reward.verify(text, gold) in (True, False)
    assert reward.verify(f"\\boxed{{{text}}}", gold) in (True, False)
    assert time.monotonic() - started < 2 * (reward.SECONDS + 10)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("3 AND 1/2", "7/2"), (r"\FRAC{1}{2}", "1/2"), ("5\nmillion", "5000000"), ("Greater than 3", "x > 3")],
)
def test_capitals_and_line_breaks_in_numbers(answer, gold):
    assert reward.verify(f"\\boxed{{{answer}}}", gold) and not reward.verify(f"\\boxed{{{answer}}}", "7")


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
    r"e^{\pi^{e^{\pi^{e}}}}",
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
        assert time.monotonic() - started < 20, completion[:60]  # a second, and a busy machine's start of a worker
    assert not list(tmp_path.iterdir())


WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import reward
assert reward.verify("\\\\boxed{x+1}", "1+x")  # an unguarded script
print("ready", flush=True)
reward.SECONDS = 3
if sys.argv[2] == "hang":
    reward.verify("\\\\boxed{(x+y+z)^{44}(x-y-z)^{44}(x+y-z)^{44}}", "x+7")
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
        "texts = ['\\\\boxed{x+1}', '\\\\boxed{(x+y+z)^{44}(x-y-z)^{44}(x+y-z)^{44}}']\n"
        "def work(): out.append(reward.verify_all(texts, ['1+x', 'x+7']))\n"
        "reward.SECONDS = 1\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; work()\n"
        f"json.dump(out, open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w'))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [[[True, False]] * 4] * 2


def test_a_gold_answer_with_a_box_or_without_an_answer():
    golds = [r"so \boxed{7}", "7", r"\boxed{}", "", "$"]
    assert reward.verify_all([r"\boxed{7}"] * 5, golds) == [True, True, False, False, False]


def test_repeated_questions_are_asked_once(monkeypatch):
    asked = []
    kind = reward.KINDS["math"]._replace(ask=lambda pair: asked.append(pair) or True)
    monkeypatch.setitem(reward.KINDS, "math", kind)
    assert reward.verify_all([r"\boxed{x+1}", r"\boxed{1}", r"\boxed{x+1}"], ["1+x", "1", "1+x"]) == [True] * 3
    assert asked == [("x+1", "1+x")]  # plain numbers never reach a worker
