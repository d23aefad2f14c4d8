"""How fast programs are tested, and what the sandbox says of right and wrong ones.

    python runs/prepare.py humaneval && python tests/bench_code.py data/humaneval.jsonl

Each row of kind "code" is tried four times: its own program (must pass), the same with the tests of the row behind it,
an empty one, and one that is cut off in the middle of what the problem does not show (must fail). Also told: how many
programs would count as cheats if they were rewrites of themselves, or had no expert beside them.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import reward


def cut(row: dict) -> str:
    """The program without the second half of what stands behind the problem's own lines."""
    program = reward.extract_program(row["solution"])
    shown = len(reward.extract_program(row["problem"]) or "")
    return program[: shown + max(len(program) - shown, 0) // 2]


def main():
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    reward.check_kinds(sys.argv[1], rows)
    programs = [reward.extract_program(row["solution"]) for row in rows]
    tests = [row["answer"] for row in rows]
    tries = {
        "its own tests": (programs, tests, True),
        "another row's tests": (programs, tests[1:] + tests[:1], False),
        "empty": ([""] * len(rows), tests, False),
        "cut off": ([cut(row) for row in rows], tests, False),
    }
    print(f"{len(rows)} programs, {reward._POOL._max_workers} at a time on {os.cpu_count()} cores")
    for name, (tried, against, expected) in tries.items():
        started = time.perf_counter()
        texts = [f"```python\n{program}\n```" for program in tried]
        verdicts = reward.verify_all(texts, against, ["code"] * len(rows))
        seconds = time.perf_counter() - started
        agree = sum(verdict is expected for verdict in verdicts)
        told = "pass" if expected else "fail"
        print(f"{name:<20} {agree} of {len(rows)} {told}  {seconds:6.1f} s  {len(rows) / seconds:6.1f} a second")
    print(f"failures {reward.FAILURES}")
    for name, expert in (("themselves", None), ("nothing", "")):
        found = [
            reward.cheats(r["problem"], r["solution"] if expert is None else expert, r["solution"], r["answer"], "code")
            for r in rows
        ]
        terms = ("hardcodes_tests", "mentions_source", "repetition")
        print(f"beside {name}: " + ", ".join(f"{term} {sum(parts[term] > 0 for parts in found)}" for term in terms))


if __name__ == "__main__":
    main()
