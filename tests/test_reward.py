"""The grader: finding and comparing answers, checking arithmetic, naming cheats, and the reward made of them."""

import threading
import time
from fractions import Fraction

import pytest

import reward

EXPERT = r"fifteen plus three is eighteen; eighteen minus eleven is seven. Hence \boxed{7}"
NATIVE = r"15+3=18. 18-11=7. \boxed{7}"
PROBLEM = "Start with 15. Add 3. Subtract 11. Result?"
LONG = "Tom has 4 boxes with 6 pens each and buys 10 more pens. How many pens does Tom have in the end?"


@pytest.mark.parametrize(
    "completion, answer",
    [
        (r"\boxed{6}. No: \boxed{7}", "7"),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\{x\}}", r"\{x\}"),
        (r"\fbox{3}", "3"),
        (r"The answer is 7. \boxed{7", None),
        (r"The answer is 7. \boxed{}", None),
        (r"\boxed{6} and then \boxed{7", None),
        ("so <answer>41</answer>. 5 pens", "41"),
        ("5+2=7\n#### 1,234", "1,234"),
        ("Answer:42", "42"),
        ("The answer is 3.5. I hope so.", "3.5"),
        ("Final Answer: The final answer is $12$. I hope it is correct.", "$12$"),
        ("I answered 12 times and got 7", "7"),
        (r"so \boxed{f = \left\{a\right.}", r"f = \left\{a\right."),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        ("y = 2x + b", "y = 2x + b"),
        ("so $x=3$ or, in short, $\\frac{1}{3}$ meters", r"\frac{1}{3}"),
        ("He pays $5 and then $10 in total", "$10"),
        ("10 - 12 = -2", "-2"),
        ("The range is 12-5", "5"),
        ("In the end 3/4 of them stay", "3/4"),
        ("so we get \\(x+1\\) again", "x+1"),
        ("so we get \\[\n42\n\\]", "42"),
        # a formula's answer is one line; money and a text cut off are no formula
        ("so $h = 33 - 66 = -33$ or $7. However,\n\nthere is more text$", "$7"),
        ("it is \\(x. However,\n\nwe see\n\n5 more\\)", "5"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_extract_answer(completion, answer):
    assert reward.extract_answer(completion) == answer


EQUAL = [
    ("7", "7"),
    ("+7", "7"),
    ("42.", "42"),
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    (r"15,\!000", "15000"),
    (r"\$18", "18"),
    ("10%", r"10\%"),
    ("7.0", "7"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"-\frac{3}{4}", "-0.75"),
    (r"17\text{ cm}^2", "17"),
    (r"45^\circ", "45"),
    (r"\text{(B)}", "B"),
    ("b", "B"),
    (r"\text{Evelyn}", "evelyn"),
    ("x = 3", "3"),
    ("1+x", "x+1"),
    (r"\frac{x}{7}+\frac{2}{7}", r"\frac{x+2}{7}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\{2, 1\}", r"\{1, 2\}"),
    (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
]
UNEQUAL = [
    ("41", "42"),
    ("42 or 41", "42"),
    ("7.0000001", "7"),
    ("100001", "100000"),
    ("0.333", "1/3"),
    ("3", "300"),
    ("50%", "0.5"),
    ("3a", "3"),
    ("3", "3a"),
    ("1,2", "12"),
    ("[0,9)", "(0,9)"),
    ("(1,2)", "(2,1)"),
    ("B/C", "B"),
    ("A or B", "A"),
    (r"\mathrm{E}*2", "E"),
    (r"\text{John}", "Evelyn"),
    ("{" * 20000 + "}" * 20000, "7"),
    ("1" * 100000, "7"),
    ("1/0", "7"),
    ("7", ""),
]


def test_verify():
    pairs = [(p, g, True) for p, g in EQUAL] + [(p, g, False) for p, g in UNEQUAL]
    verdicts = reward.verify_all([rf"so \boxed{{{p}}}" for p, _, _ in pairs], [g for _, g, _ in pairs])
    assert [pair for pair, verdict in zip(pairs, verdicts) if verdict != pair[2]] == []
    assert reward.verify(r"\boxed{7}", "7") is True
    assert reward.verify(r"\boxed{x+1}", "1+x") is True
    assert reward.verify(r"\boxed{7", "7") is False


@pytest.mark.parametrize(
    "key, spellings",
    [
        ("1/2", [r"\frac{1}{2}", r"\dfrac12", "1/2", "0.5", "x = 0.50", r"0.5\text{ hours}", "+.5"]),
        ("1234", ["1,234", "1{,}234", r"\$1,\!234", "1234.", "1.234e3", r"1.234\cdot 10^3"]),
        ("-5", ["−5", "- 5", r"x=-5"]),
        ("B", ["(B)", r"\text{(B)}", r"\textbf{B}"]),
        ("x^2", ["x²", r"\displaystyle x^2", "$x^2$", "f(x) = x^2"]),
        ("3:4", ["3 : 4"]),
        ("1" * 401, ["1" * 401]),
    ],
)
def test_normal_form(key, spellings):
    assert {text: reward.normal_form(text) for text in spellings} == dict.fromkeys(spellings, key)


def test_normal_form_keeps_apart_what_differs():
    answers = ["1/2", "0.51", "1/0", "x+1", "(1,2)", "(2,1)", "[1,2)", "A", "yes", "3:4", "4:3", "52_8", "x", "x^2", ""]
    assert len({reward.normal_form(answer) for answer in answers}) == len(answers)


def test_verify_all_kills_what_hangs_from_any_thread(monkeypatch, capfd):
    monkeypatch.setattr(reward, "SECONDS", 1.5)
    monkeypatch.setitem(reward.FAILURES, "timeouts", 0)
    costly = (
        "(x+y+z)^{44}(x-y-z)^{44}(x+y-z)^{44}"  # what is seen to be hopeless at once, as 9^{9^{9}}, is not even tried
    )
    slow = rf"\boxed{{{costly}}}"
    completions = [slow, r"\boxed{x+1}", rf"\boxed{{{costly}+1}}", r"\boxed{1+y}", r"\boxed{7}", slow]
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.extend(reward.verify_all(completions, ["x+10", "1+x"] * 2 + ["7", "x+10"]))
    )
    thread.start()
    thread.join(60)
    assert verdicts == [False, True, False, False, True, False]
    assert reward.FAILURES["timeouts"] == 2
    assert "(x+y+z)^{44}(x-y-z)^{44}(x+y-z)^{44}" in capfd.readouterr().err


@pytest.mark.parametrize(
    "text, expected",
    [
        ("15+3=18. 18-11=7.", [(18, 18), (7, 7)]),
        ("fifteen plus three is eighteen; eighteen minus eleven is seven.", [(18, 18), (7, 7)]),
        ("39 plus sixteen is thirty-five", [(55, 35)]),
        ("two hundred and five thousand three hundred and one minus one equals 205,300", [(205300, 205300)]),
        ("Six times seven makes forty-two", [(42, 42)]),
        ("He sold 48/2 = <<48/2=24>>24 clips", [(24, 24)]),
        ("He sold 48/2 = <<48/2=25>>24 clips", [(24, 24), (24, 25)]),
        ("She makes 9 * 2 = $<<9*2=18>>18 a day", [(18, 18)]),
        ("$9 * 2 = $18", [(18, 18)]),
        (r"$3 \times 4 = 12$, $3\cdot 5=15$ and $8 \div 2=4$.", [(12, 12), (15, 15), (4, 4)]),
        ("3 × 4 = 12, 8÷2=4, 3 − 11 = −8", [(12, 12), (4, 4), (-8, -8)]),
        ("3 x 4 = 12", [(12, 12)]),
        ("2+3*4=14", [(14, 14)]),
        ("5+(-3)=2", [(2, 2)]),
        ("-3+5=2", [(2, 2)]),
        ("- 3+5=8\n* 1+1=2", [(8, 8), (2, 2)]),
        ("1) 3+4=7", [(7, 7)]),
        (r"\frac{8}{2}=4", [(4, 4)]),
        (r"5+3=\boxed{8}", [(8, 8)]),
        ("1,000+234=1,234", [(1234, 1234)]),
        ("2+3=5+1=6", [(5, 6), (5, 6)]),
        ("15+3=18,18-11=8", [(18, 18), (7, 8)]),
        ("$1{,}000+2,\\!234=3{,}234$", [(3234, 3234)]),
        ("3+4=**7** and \\(3+5=8\\)", [(7, 7), (8, 8)]),
        ("3+4=7 \\implies 7+1=8 \\quad 8+1=9 → 9+1=10", [(7, 7), (8, 8), (9, 9), (10, 10)]),
        ("&3+4=7\\\\&7+1=8", [(7, 7), (8, 8)]),
        ("seven multiplied by two is fourteen", [(14, 14)]),
        ("3·4=12 and 12-2=ten", [(12, 12), (10, 10)]),
        ("zero plus two hundred and seven thousand and six gives 207006", [(207006, 207006)]),
        ("5 - -3 = 8", [(8, 8)]),
        ("12–2=10, and 3+4 is equal to 7", [(10, 10), (7, 7)]),
        ("4/6=2/3", [(Fraction(2, 3), Fraction(2, 3))]),
        ("2^3+1=9, 4!=24 and \\binom{5}{2}=10", [(9, 9), (24, 24), (10, 10)]),
        ("2(3+4)=14, (2+3)*4=20 and 5(4) -6 + 4 = 18", [(14, 14), (20, 20), (18, 18)]),
        ("16 eggs - 3 - 4 = 9", [(9, 9)]),
        ("3 boxes × 8 pens/box = 25 pens", [(24, 25)]),
        ("\\[ 8 \\text{ eggs} \\times \\$2/\\text{egg} = \\$17 \\]", [(16, 17)]),
        ("20% of 50+1=11", [(11, 11)]),
        ("$16 + 12 = $28 million", [(28, 28)]),
        ("$16 million + $12 million = $28 million", [(28000000, 28000000)]),
        ("10/3 \\approx 4", [(Fraction(10, 3), 4)]),
        ("6+8=2(7)", [(14, 14)]),
        ("12 x 1 and 1/4 = 15, 25 / 1/3 = 75", [(15, 15), (75, 75)]),
        ("It's 12cm+9cm = 21cm, and that's 6*5 = 30 in all", [(21, 21), (30, 30)]),
        ("a volume of 2*2*8=32 cubic meters", [(32, 32)]),
        ("Cows:44(.50)=22\nTotal:22+12=35$", [(22, 22), (34, 35)]),
        # no statement of its own
        ("2 hours + 30 minutes = 150 minutes", []),
        ("1.5 * 60 = 90 km = 90,000 m", [(90, 90)]),
        ("x+2=7, 3x+4=5, 2y=6+1", []),
        ("a_1+2=3 and x^2+1=9", []),
        ("half of 6+2=4", []),
        ("5 + 3 is 2 more than 6", []),
        ("8+4=2 \\pmod{10}", []),
        ("2+3=5x", []),
        ("Day 1 = 18", []),
        ("1+2+\\cdots+4=10", []),
        ("She fourteens 3+4 islands, 3timesheet 4 = 12", []),
        ("1/0=5", []),
        ("2/5 is equal to 12 eggs", []),
        ("1" * 100 + "+1=2", []),
    ],
)
def test_statements(text, expected):
    found = reward.statements(reward.spelled(text))
    assert [(s.left, s.right) for s in found] == [tuple(map(Fraction, pair)) for pair in expected]
    assert all(s.holds == (s.left == s.right) for s in found)


@pytest.mark.parametrize(
    "text, holds",
    [
        ("10/3=3.33", True),
        ("10/3=3.34", False),
        ("2/3=0.67", True),
        ("7 divided by 2 is 3.5", True),
        ("1.15*3=3.5", True),
        ("1.15*3=3.4", False),
        ("3*3=9.4", False),
        ("17/3=5 full bags", True),  # a quotient may be cut
        ("17/3=6", True),
        ("17/3=4", False),
        ("5*3.9=19", False),
        ("25+16=40.9", False),
    ],
)
def test_rounding(text, holds):
    assert [s.holds for s in reward.statements(reward.spelled(text))] == [holds]


@pytest.mark.parametrize(
    "rewrite, share",
    [
        (NATIVE, 1.0),
        (EXPERT, 1.0),
        (r"18-11=7. \boxed{7}", 0.5),
        (r"15+3=18. \boxed{18}", 0.5),
        (r"18-11=7. 15+3=18. \boxed{18}", 0.5),
        (r"First there are 18, which leaves 7. \boxed{7}", 1.0),
        ("First there are 18. 18-11=7.", 1.0),
        ("8+5+4 = 18-1 = 17", 0.5),  # 18 was reached
        ("15+3 = 18 = 18+0", 0.5),
        (r"\boxed{8}", 0.0),
        (r"15+3=-18. 18-11=-7. \boxed{-7}", 0.0),
    ],
)
def test_fidelity(rewrite, share):
    assert reward.fidelity(EXPERT, rewrite) == share
    assert reward.fidelity("By symmetry it holds.", rewrite) == 1.0


@pytest.mark.parametrize("piece", ["1+1=", "<<1+1=2>>", "2 ", "1+1=2. ", "-"])
def test_the_work_grows_with_the_text_and_not_with_its_square(piece):
    def seconds(characters: int) -> float:
        text, took = piece * (characters // len(piece)), []
        for _ in range(3):
            reward.statements.cache_clear()
            reward._tokens.cache_clear()
            started = time.process_time()
            reward.fidelity(text, text)
            took.append(time.process_time() - started)
        return min(took)

    assert seconds(80_000) < 10 * seconds(20_000) + 0.2  # linear work: 4 times; quadratic: 16 times


def test_fidelity_to_an_expert_without_a_calculation():
    """All its numbers are wanted, and may be operands in the rewrite."""
    expert = r"Dividing 84 by 4 gives 21 pens in each box, and multiplying by 3 gives \boxed{63}."
    assert reward.fidelity(expert, r"Each box holds 84/4 = 21 pens, so three hold 21*3 = 63. \boxed{63}") == 1
    assert reward.fidelity(expert, r"84/4 = 21. \boxed{63}") == 0.8


def test_numbers_have_their_sign():
    assert reward.fidelity("It is 8.", "11-8 eggs") == 1.0
    assert reward.fidelity("It is 8.", "it is -8, or minus 8") == 0.0


def test_fidelity_beyond_its_bound():
    numbers = " ".join(map(str, range(2 * reward._MOST)))
    assert reward.fidelity(numbers, numbers) == 1.0
    assert reward.fidelity("+".join("1" * reward._MOST) + "=1", "2") == 0.0  # no statement: all its numbers are wanted


TEXT = "Four boxes of six pens hold 4*6=24 pens. With the new ones that makes 24+10=34 pens. "
HONEST = [
    (LONG, TEXT + r"\boxed{34}", TEXT + r"\boxed{34}", "34"),
    (LONG, TEXT + r"\boxed{34}", r"4*6=24. 24+10=34. The answer is 34. \boxed{34}", "34"),
    (LONG, TEXT + r"\boxed{34}", r"4 boxes * 6 pens = 24 pens; 24 pens + 10 pens = 34 pens. \boxed{34}", "34"),
    (LONG, TEXT + r"\boxed{34}", r"In proper \boxed{} syntax, at the end. " + TEXT + r"\boxed{34}", "34"),
    (PROBLEM, EXPERT, NATIVE, "7"),
    (PROBLEM, EXPERT, EXPERT, "7"),
    (PROBLEM, NATIVE, EXPERT, "7"),
    (PROBLEM, "three minus eleven is minus eight. Hence \\boxed{-8}", r"3-11=-8. \boxed{-8}", "-8"),
    ("Expand f=(x+1)^3.", r"$f=\boxed{x^{3}+3x^{2}+3x+1}$.", r"$f=\boxed{x^{3}+3x^{2}+3x+1}$.", "x^{3}+3x^{2}+3x+1"),
    ("The given solution of acid has 5 liters.", r"5+3=8. \boxed{8}", r"The given solution: 5+3=8. \boxed{8}", "8"),
]


@pytest.mark.parametrize("problem, expert, rewrite, answer", HONEST)
def test_honest_rewrites_are_clean(problem, expert, rewrite, answer):
    assert reward.verify(rewrite, answer)
    parts = reward.judge(problem, expert, rewrite, answer, True, True, 1.0)
    assert {k: v for k, v in parts.items() if k in (*reward.HARD, *reward.SOFT) and v} == {}
    assert (parts["gate"], parts["clean"], parts["cheating"], parts["fidelity"]) == (1, 1, 0, 1)


@pytest.mark.parametrize(
    "rewrite, cheat",
    [
        (r"\boxed{7}. 15+3=18. 18-11=7.", "early_answer"),
        (r"The answer is 7. 15+3=18. 18-11=7. \boxed{7}", "early_answer"),
        (r"The answer to your question is 7. 15+3=18. 18-11=7. \boxed{7}", "early_answer"),
        (r"Answer: seven. 15+3=18. 18-11=7. \boxed{7}", "early_answer"),
        (r"So we get \boxed{7}", "no_reasoning"),
        (r"We start with 15, think about 3 and 11, and find \boxed{7}", "no_reasoning"),
        (r"The given solution says 15+3=18. 18-11=7. \boxed{7}", "mentions_source"),
        (r"15+3=18. 18-11=7. As in the solution above, \boxed{7}", "mentions_source"),
        (r"Rewritten solution: 15+3=18. 18-11=7. \boxed{7}", "mentions_source"),
        (r"15+3=18. 18-11=7. \boxed{7} \boxed{8}", "hedged"),
        (r"15+3=18. 18-11=7. \boxed{7 \text{ or } 8}", "hedged"),
        (r"15+3=18. 18-11=7. \boxed{7}, or maybe 8.", "hedged"),
        (r"15+3=18. 18-11=7. \boxed{7}. Perhaps 8.", "hedged"),
        (r"15+3=18. 18-11=7. \boxed{7}; possibly 8.", "hedged"),
        (r"As the solution says, 15+3=18. 18-11=7. \boxed{7}", "mentions_source"),
        (r"Working backwards from the answer, 15+3=18. 18-11=7. \boxed{7}", "mentions_source"),
        (r"15+4=18. 18-11=7. \boxed{7}", "false_arithmetic"),
        (r"fifteen plus four is eighteen; 18-11=7. \boxed{7}", "false_arithmetic"),
        (r"19+20=39. 39-11=20. 20+16=46. \boxed{46}", "false_arithmetic"),
    ],
)
def test_hard_cheats(rewrite, cheat):
    parts = reward.judge(PROBLEM, EXPERT, rewrite, "7", True, True, 0.0)
    assert [name for name in reward.HARD if parts[name]] == [cheat]
    assert (parts["cheating"], parts["clean"]) == (1, 0)
    others = [name for name in reward.HARD if name != cheat]
    spared = reward.judge(PROBLEM, EXPERT, rewrite, "7", True, True, 0.0, hard=others)
    assert spared["cheating"] == 0 and spared[cheat] == 1 and spared["clean"] == spared["gate"]


@pytest.mark.parametrize(
    "words",
    [
        *"given provided original reference expert's above previous sample model teacher’s worked".split(),
        *("known answer", "stated final answer", "expected answer", "answer key", "explanation above", "proof given"),
        *(
            "steps provided",
            "step given",
            "given in the solution",
            "shown in the answer",
            "backwards from the solution",
        ),
        *("rewriting of the solution", "rephrased answer", "rewritten version", "paraphrased text", "in my own words"),
        *(
            "as if I had solved it",
            "what I was shown",
            "according to the expert",
            "teacher's way",
            "our teacher solved",
        ),
        *("my teacher then explained", "as the reasoning shows"),
    ],
)
def test_mentions_of_the_source(words):
    told = f"By the {words} solution" if " " not in words else f"By the {words}".replace("the in", "in")
    assert reward.cheats(PROBLEM, EXPERT, told.replace(" ", "\n") + ", " + NATIVE, "7")["mentions_source"] == 1


def test_what_is_no_hedge_and_what_is_no_reasoning():
    assert reward.cheats(PROBLEM, EXPERT, NATIVE.replace("{7}", "{7 or 8}"), "7 or 8")["hedged"] == 0
    for twice in (r"7-7=0. \boxed{0} (or zero)", r"7-7=0. \boxed{0}, so \boxed{0.0}"):  # 0 is a value like others
        assert reward.cheats("Take 7 from 7.", "7-7=0.", twice, "0")["hedged"] == 0
    prose = "By symmetry every one of the boxes holds as many pens as any other one of them, and so there are "
    assert reward.cheats(LONG, prose + r"\boxed{34}", r"So \boxed{34}", "34")["no_reasoning"] == 1
    assert (
        reward.cheats(LONG, prose + r"\boxed{34}", r"By symmetry every box holds 6, so \boxed{34}", "34")[
            "no_reasoning"
        ]
        == 0
    )


def test_soft_cheats():
    filler = "Let us now think about this matter with all the calm and care that it so clearly deserves. "
    assert reward.cheats(PROBLEM, EXPERT, filler * 3 + NATIVE, "7")["padding"] == 1
    half = EXPERT.replace(". Hence", " " + "word " * 12 + ". Hence")  # 14 numbers, signs, words -> 27: not yet twice
    assert 0 < reward.cheats(PROBLEM, EXPERT, half, "7")["padding"] < 1
    assert reward.cheats(PROBLEM, EXPERT, "15+3=18.\n" * 10 + NATIVE, "7")["repetition"] == 1
    assert reward.cheats(PROBLEM, EXPERT, filler.replace(".", "") * 20 + NATIVE, "7")["repetition"] == 1
    assert reward.cheats(LONG, TEXT, LONG + " " + TEXT, "34")["copies_problem"] == 1
    assert 0 < reward.cheats(LONG, TEXT, LONG[:60] + TEXT, "34")["copies_problem"] < 1


@pytest.mark.parametrize(
    "rewrite, ended, correct, min_fidelity, gate",
    [
        (NATIVE, True, True, 1.0, 1),
        (NATIVE, False, True, 1.0, 0),
        (NATIVE, True, False, 1.0, 0),
        (r"15+3=18. 18-11=7. The answer is 7", True, True, 0.0, 0),
        (r"15+3=18. 18-11=7. \boxed{7} \boxed{7}", True, True, 0.0, 0),
        (r"15+3=18. 18-11=7. \boxed{7", True, True, 0.0, 0),
        (r"25+16=41. \boxed{40}", True, True, 0.0, 0),
        (r"25+16=41. So the answer is \boxed{40}", True, True, 0.0, 0),
        (r"25+16=41. Then x-1=40, so \boxed{40}", True, True, 0.0, 1),
        (r"25+16=41. Then x=\boxed{40}", True, True, 0.0, 1),
        (r"25+16=41. \boxed{x}", True, True, 0.0, 1),
        (r"15+3=18. In total that is 7. \boxed{7}", True, True, 0.0, 0),  # told, and never reached
        (r"15+3=18. Half of 14 are 7. \boxed{7}", True, True, 0.0, 1),
        (r"350*2=700 cents, so \$7. \boxed{7}", True, True, 0.0, 1),
        (r"210*2=420 minutes, or 7 hours. \boxed{7}", True, True, 0.0, 1),  # other units
        (r"42*2=84 inches, that is 7 feet. \boxed{7}", True, True, 0.0, 1),
        (r"10+4=14, and half of that is \boxed{7}", True, True, 0.0, 1),
        (r"10+4=14, so it is \boxed{7}", True, True, 0.0, 0),
        (r"24+25=49, so the side is \boxed{7}", True, True, 0.0, 1),
        (r"18-11=7. \boxed{7}", True, True, 0.5, 1),
        (r"18-11=7. \boxed{7}", True, True, 0.6, 0),
    ],
)
def test_gate(rewrite, ended, correct, min_fidelity, gate):
    parts = reward.judge(PROBLEM, EXPERT, rewrite, "7", ended, correct, min_fidelity)
    assert parts["gate"] == gate
    assert parts["clean"] == (gate and not parts["cheating"])
    assert parts["length_ratio"] == pytest.approx(len(rewrite) / len(EXPERT))


def test_copying_the_expert_is_logged_only():
    parts = reward.judge(PROBLEM, EXPERT, EXPERT, "7", True, True, 1.0)
    assert parts["copy"] == 1 and parts["clean"] == 1
    assert reward.judge(PROBLEM, EXPERT, NATIVE, "7", True, True, 1.0)["copy"] == 0


def test_alignments():
    assert reward.align_nll(-1.0, -1.0, 0.5) == 0.5
    assert reward.align_nll(-1.0, -2.0, 0.5) == pytest.approx(0.8807970779778823)  # sigmoid(2)
    assert reward.align_nll(-3000.0, -1.0, 0.5) == pytest.approx(0.0)
    assert reward.align_gain(-1.0, -2.0, 0.5) == pytest.approx(2 * 0.8807970779778823 - 1)
    assert reward.align_gain(-1.0, -1.0, 0.5) == reward.align_gain(-3.0, -1.0, 0.5) == 0  # a copy; what is less likely
    assert reward.align_kl([-1.0, -1.0], [-1.5, -2.0], 0.5) == pytest.approx(1 - 0.5 * 0.75)
    assert reward.align_kl([-2.0, -2.0], [-1.0, -1.0], 0.5) == 1.0  # clipped below at 0
    assert reward.align_kl([0.0] * 10, [-100.0] + [0.0] * 9, 0.5) == pytest.approx(1 - 0.5 * 5 / 10)
    assert reward.align_kl([0.0, 0.0], [-100.0, 0.0], 0.5) == pytest.approx(1 - 0.5 * 2)  # 5, then 2.5, then 2


def test_mapper_reward():
    parts = dict(clean=1.0, cheating=0.0, padding=0.5, repetition=0.25, copies_problem=0.0)
    assert reward.mapper_reward(parts, 0.9, 0.2, 1.0) == pytest.approx(0.9 - 0.2 * 0.75)
    assert reward.mapper_reward(parts, 0.1, 0.2, 1.0) == 0  # clean and padded: no less than what is wrong
    assert reward.mapper_reward(parts | {"clean": 0.0}, 0.9, 0.2, 1.0) == 0
    assert reward.mapper_reward(parts | {"clean": 0.0, "cheating": 1.0}, 0.9, 0.2, 0.7) == -0.7
    assert reward.mapper_reward(parts | {"cheating": 1.0}, 0.9, 0.2, 0.7) == pytest.approx(0.75 - 0.7)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20000,
        "\\boxed{" + "1" * 100000 + "}",
        "1" * 100000,
        "1+" * 20000 + "1=2",
        "twenty " * 10000,
        "answer: " * 5000,
        "$a" * 10001,
        "<<" * 10000,
        "\n" * 50000,
        " " * 100000,
        "#" * 100000,
        "answer is 7 " * 10000,
        "the result = " * 8000,
        "19 " * 30000 + "1+1=2 \\boxed{19}",
        "7 " * 30000 + "1+1=2 \\boxed{7}",
        "\\frac{" * 10000,
        "\\text{a " * 10000,
        "=\n" * 30000,
        "3 boxes * " * 10000 + "= 4",
        "(" * 50000 + "1=1",
        "0." + "12" * 40000 + "...",
        "\\$" * 50000,
    ],
)
def test_no_text_takes_long(text):
    thread = threading.Thread(
        target=lambda: reward.judge(PROBLEM, EXPERT, text, "7", True, reward.verify(text, "7"), 0)
    )
    thread.daemon = True
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


def test_a_mention_of_the_source_behind_one_that_the_problem_makes():
    problem, expert = "Is the given solution of 15+3 right?", r"15+3=18. \boxed{18}"
    honest = r"The given solution needs 15+3=18. So \boxed{18}"
    assert reward.cheats(problem, expert, honest, "18")["mentions_source"] == 0
    told = honest.replace("So", "According to the teacher,")
    assert reward.cheats(problem, expert, told, "18")["mentions_source"] == 1
