"""How fast the grader is, and how it compares with Math-Verify used directly.

    python tests/bench_grader.py [CASES.jsonl]

CASES.jsonl has rows with `pred`, `gold`, `expected` (and `kind`; "bare" predictions are put into a box). Without a file
only speed is measured. Rates are of one run on this machine: compare them with each other, not with other machines'.
"""

import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import reward

HOSTILE = ["9^{9^{9}}", "99999999!", "(9^{9999})^{9999}", r"\sum_{k=1}^{10^{9}} k^{k}", "{" * 20_000 + "}" * 20_000]
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


def main():
    rng = random.Random(0)
    reward.verify("\\boxed{x}", "y")  # starts a worker

    numbers = [str(rng.randrange(10**6)) for _ in range(100_000)]
    _, seconds = timed([f"So we get 3+4=7 and then \\boxed{{{n}}}." for n in numbers], numbers)
    print(f"plain numbers         {len(numbers) / seconds:>10,.0f} verdicts/s")

    cases = [(f"\\boxed{{{answer}}}", gold) for answer, gold in MIXED]
    rows = [json.loads(line) for path in sys.argv[1:] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if rows:
        cases = [(f"\\boxed{{{r['pred']}}}" if r.get("kind") == "bare" else r["pred"], r["gold"]) for r in rows]
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
