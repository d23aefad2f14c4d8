"""How fast the grader is, how it compares with Math-Verify used directly, and what it says of gold solutions.

    python tests/bench_grader.py [FILE.jsonl ...]

Rows with `pred` or `completion`, `gold`, `expected` (and `kind`: "bare" answers are put into a box) are cases for both
graders.
Rows with `problem`, `solution`, `answer` are gold solutions: graded against their own answer and against another row's,
and judged for hard cheats as if they were rewrites of themselves. Without a file only speed is measured. Rates are of
one run on this machine: compare them with each other, not with other machines'.
"""

import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))
import prepare

import reward

HOSTILE = ["9^{9^{9}}", "99999999!", r"e^{\pi^{e^{\pi^{e}}}}", r"\sum_{k=1}^{10^{9}} k^{k}"]
HOSTILE += ["{" * 20_000 + "}" * 20_000]
MIXED = [("7", "7"), ("x+1", "1+x"), (r"\frac{x}{7}+\frac{2}{7}", r"\frac{x+2}{7}"), (r"2\sqrt{3}", r"\sqrt{12}")]
MIXED += [("(1,2)", "(2,1)"), ("[0,9)", "(0,9)"), (r"\{2, 1\}", r"\{1, 2\}"), ("3/4", "0.75"), ("B", "B"), ("6", "7")]


def timed(completions: list[str], golds: list[str]) -> tuple[list[bool], float]:
    started = time.perf_counter()
    verdicts = reward.verify_all(completions, golds)
    return verdicts, time.perf_counter() - started


def library(completion: str, gold: str) -> bool:
    """Math-Verify as its README uses it: a bare gold is put into dollars."""
    import math_verify

    gold = gold if "$" in gold or "boxed" in gold else f"${gold}$"
    return math_verify.verify(math_verify.parse(gold), math_verify.parse(completion))


def golds(name: str, rows: list[dict], rng: random.Random) -> None:
    """Gold solutions against their own answers, against another row's different answer, and as rewrites."""
    for row in rows:  # GSM8K's, as runs/prepare.py writes them
        row["solution"] = prepare.demonstration(row["solution"])
    boxed = [row for row in rows if reward.boxes(row["solution"])]
    right = sum(reward.verify_all([row["solution"] for row in boxed], [row["answer"] for row in boxed]))
    others = [row["answer"] for row in rng.sample(boxed, len(boxed))]
    pairs = [(row["solution"], other) for row, other in zip(boxed, others) if row["answer"] != other]
    swapped = sum(reward.verify_all(*zip(*pairs))) if pairs else 0
    found = [reward.cheats(r["problem"], r["solution"], r["solution"], r["answer"]) for r in boxed]
    rates = {cheat: sum(parts[cheat] for parts in found) / max(len(found), 1) for cheat in reward.HARD}
    flagged = sum(any(parts[cheat] for cheat in reward.HARD) for parts in found) / max(len(found), 1)
    told = ", ".join(f"{cheat} {100 * rate:.2f}%" for cheat, rate in rates.items() if rate)
    print(f"{name}: {right} of {len(boxed)} right, {swapped} of {len(pairs)} swapped accepted", end=", ")
    print(f"{100 * flagged:.2f}% cheat ({told})")


def main():
    rng = random.Random(0)
    reward.verify("\\boxed{x}", "y")  # starts a worker

    numbers = [str(rng.randrange(10**6)) for _ in range(100_000)]
    _, seconds = timed([f"So we get 3+4=7 and then \\boxed{{{n}}}." for n in numbers], numbers)
    print(f"plain numbers         {len(numbers) / seconds:>10,.0f} verdicts/s")

    files = {
        path: [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
        for path in sys.argv[1:]
    }
    for path, told in files.items():
        if "solution" in told[0]:
            golds(Path(path).stem, told, rng)
    cases = [(f"\\boxed{{{answer}}}", gold) for answer, gold in MIXED]
    rows = [row for told in files.values() for row in told if "expected" in row]
    if rows:
        texts = [row.get("completion") or row["pred"] for row in rows]
        boxed = [f"\\boxed{{{text}}}" if row.get("kind") == "bare" else text for text, row in zip(texts, rows)]
        cases = list(zip(boxed, [row["gold"] for row in rows]))
    batch = cases * 100
    _, seconds = timed(*zip(*batch))
    print(f"mixed batch           {len(batch) / seconds:>10,.0f} verdicts/s ({len(batch):,} in {seconds:.1f} s)")
    hostile = [(f"\\boxed{{{HOSTILE[i % len(HOSTILE)]}}}", "7") for i in range(len(batch) // 100)]
    mixed = batch + hostile
    rng.shuffle(mixed)
    _, seconds = timed(*zip(*mixed))
    print(f"the same, 1% hostile  {len(mixed) / seconds:>10,.0f} verdicts/s ({len(mixed):,} in {seconds:.1f} s)")

    if rows:
        ours, seconds = timed(*zip(*cases))
        right = sum(v == r["expected"] for v, r in zip(ours, rows))
        accepted = sum(v and not r["expected"] for v, r in zip(ours, rows))
        print(
            f"this grader           {right / len(rows):.3f} of {len(rows)}, {accepted} false accepts, {seconds:.1f} s"
        )
        started = time.perf_counter()
        theirs = [library(*case) for case in cases]
        seconds = time.perf_counter() - started
        right = sum(v == r["expected"] for v, r in zip(theirs, rows))
        accepted = sum(v and not r["expected"] for v, r in zip(theirs, rows))
        print(
            f"Math-Verify by itself {right / len(rows):.3f} of {len(rows)}, {accepted} false accepts, {seconds:.1f} s"
        )


if __name__ == "__main__":
    main()
