"""The table of the toy world: every seed under out/toy -> report.md (to read) and report.json (the figures' data).

    python runs/toy_report.py [out/toy]

An arm's seconds and generated tokens are those of all its stages: training the mapper, rewriting, fine-tuning.
Intervals are over seeds (t distribution, differences paired by seed); with one seed there is none, and the table says
so.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toy_world import steps_right, style

import reward

ARMS = {  # arm -> its stages
    "base": [],
    "sft": ["sft/sft"],
    "prompted": ["prompted/rewrite", "prompted/sft"],
    "dart": ["dart/mapper", "dart/rewrite", "dart/sft"],
    "grpo": ["grpo/solve"],
    "oracle": ["oracle/sft"],
}
SUITES = ["in_distribution", "shorter", "longer", "reworded"]
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # t quantiles, by number of seeds


def metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def generated(folder: Path) -> int:
    """Tokens that a stage let a model generate: its last running total (fine-tuning generates none)."""
    rows = metrics(folder)
    return rows[-1].get("generated_tokens", 0) if rows else 0


def accuracies(seed: Path, model: str, evaluation: str = "eval") -> dict[str, float]:
    benchmarks = json.loads((seed / evaluation / model / "summary.json").read_text())["benchmarks"]
    return {suite: benchmarks[suite]["avg@n"]["value"] for suite in SUITES}


def interval(values: list[float]) -> str:
    """mean ± half of the 95% interval over seeds."""
    if len(values) not in T95:
        return f"{np.mean(values):+.1f} (no interval: {len(values)} seed)"
    half = T95[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):+.1f} ± {half:.1f}"


def spread(values: list[float]) -> str:
    """mean ± standard deviation over seeds, in percent."""
    deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation}"


def oracle_alignment(seed: Path) -> float:
    """A(y|x) of the native solutions under the base model, which no method here sees."""
    rows = [json.loads(line) for line in (seed / "world/oracle.jsonl").read_text().splitlines()]
    base = str(seed / "world/base")
    tokenizer = reward.load_tokenizer(base)
    pairs = [
        (reward.prompt_ids(tokenizer, reward.solve_prompt(r["problem"])), reward.response_ids(tokenizer, r["solution"]))
        for r in rows
    ]
    import torch

    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = reward.load_model(base, device, train=False)
    return float(np.mean([s.mean().item() for s in reward.score(model, pairs, 4096, device)]))


def dart_checks(arm: Path) -> dict[str, float]:
    """What a mapper learnt, and whether its texts are honest by the world's own checker."""
    steps = metrics(arm / "mapper")
    first, last = steps[0], steps[-5:]
    rows = [json.loads(line) for line in (arm / "rewrite/train.jsonl").read_text().splitlines()]
    mapped = [r for r in rows if r["source"] == "mapper"]
    right = [r for r in mapped if steps_right(r["problem"], r["solution"])]

    def end(name: str) -> float:
        return float(np.mean([row[name] for row in last if name in row]))

    return {
        "rows from the mapper": len(mapped) / len(rows),
        "rows from the mapper and right in every step": len(right) / len(rows),
        "rows in native style": float(np.mean([style(r["solution"]) == "native" for r in rows])),
        "gate rate, first step": first["gate"],
        "gate rate, last 5 steps": end("gate"),
        "gate rate less hard cheats, first step": first["clean"],
        "gate rate less hard cheats, last 5 steps": end("clean"),
        "A(y°), expert's text": float(np.mean([r["expert_align"] for r in rows])),
        "A(y), first step": first["A"],
        "A(y), last 5 steps": end("A"),
        "A of the training set": float(np.mean([r["align"] for r in rows])),
    }


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/toy")
    seeds = sorted(path.parent for path in out.glob("seed*/eval") if list(path.glob("*/summary.json")))
    reward.check(seeds, f"{out}: no finished evaluation below it; run `bash runs/toy.sh` first")
    reward.init_distributed()

    # --- 1. collect ---
    arms: dict = {}
    for arm, stages in ARMS.items():
        scores = [accuracies(seed, arm) for seed in seeds]
        arms[arm] = {
            "suites": {suite: [s[suite] for s in scores] for suite in SUITES},
            "average": [float(np.mean(list(s.values()))) for s in scores],
            "seconds": [sum(int((seed / s / "seconds").read_text()) for s in stages) for seed in seeds],
            "generated_tokens": [sum(generated(seed / s) for s in stages) for seed in seeds],
        }
    curves = []
    for seed in seeds:
        rows = {row["step"]: row for row in metrics(seed / "grpo/solve")}
        names = {int(p.name.removeprefix("grpo-")): p.name for p in sorted((seed / "eval").glob("grpo-*"))}
        names[max(rows)] = "grpo"
        for step, name in sorted(names.items()):
            average = float(np.mean(list(accuracies(seed, name).values())))
            cost = {"seconds": rows[step]["elapsed"], "generated_tokens": rows[step]["generated_tokens"]}
            curves.append({"seed": seed.name, "step": step, "average": average, **cost})
    checks = [dart_checks(seed / "dart") | {"A of native text (oracle)": oracle_alignment(seed)} for seed in seeds]
    ablations = {}
    for path in sorted(seeds[0].glob("eval-ablation/*/summary.json")):
        name = path.parent.name
        told = dart_checks(seeds[0] / ("dart" if name == "dart" else f"ablation/{name}"))
        average = float(np.mean(list(accuracies(seeds[0], name, "eval-ablation").values())))
        ablations[name] = {"average": average, **told}

    # --- 2. write ---
    average = {arm: np.array(told["average"]) for arm, told in arms.items()}
    lines = [
        f"# Toy world, {len(seeds)} seed(s): {', '.join(seed.name for seed in seeds)}",
        "",
        "Accuracy in % (4 samples a problem at temperature 1; mean ± standard deviation over seeds); difference to SFT "
        "in points with its 95% interval over seeds.",
        "",
        "| arm | " + " | ".join(SUITES) + " | average | minus SFT | seconds | generated tokens |",
        "|---" * (len(SUITES) + 5) + "|",
    ]
    for arm, told in arms.items():
        cells = [spread(told["suites"][suite]) for suite in SUITES] + [spread(told["average"])]
        cells += ["" if arm == "sft" else interval(list(100 * (average[arm] - average["sft"])))]
        cells += [f"{np.mean(told['seconds']):.0f}", f"{np.mean(told['generated_tokens']):,.0f}"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    gain = (average["dart"] - average["sft"]).mean() / (average["oracle"] - average["sft"]).mean()
    lines += ["", f"DART recovers {100 * gain:.0f}% of what native text (the oracle) gains over SFT.", ""]
    lines += [
        "| what the mapper learnt | " + " | ".join(seed.name for seed in seeds) + " |",
        "|---" * (1 + len(seeds)) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(f"{c[name]:.3f}" for c in checks) + " |" for name in checks[0]]
    lines += ["", "Direct GRPO over time (average accuracy; DART's total is in the table above):", ""]
    lines += ["| seed | step | seconds | generated tokens | average |", "|---|---|---|---|---|"]
    for c in curves:
        told = f"{c['seconds']:.0f} | {c['generated_tokens']:,} | {100 * c['average']:.1f}"
        lines.append(f"| {c['seed']} | {c['step']} | {told} |")
    if ablations:
        lines += ["", f"One part of the reward changed at a time ({seeds[0].name} alone):", ""]
        lines += ["| | " + " | ".join(ablations) + " |", "|---" * (1 + len(ablations)) + "|"]
        for name in next(iter(ablations.values())):
            lines.append(f"| {name} | " + " | ".join(f"{told[name]:.3f}" for told in ablations.values()) + " |")
    table = "\n".join(lines) + "\n"
    reward.write_text(out / "report.md", table)
    data = {"arms": arms, "grpo_curve": curves, "dart": checks, "ablations": ablations}
    reward.write_text(out / "report.json", json.dumps(data, indent=1))
    print(f"\n{table}\nwrote {out / 'report.md'} and {out / 'report.json'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
