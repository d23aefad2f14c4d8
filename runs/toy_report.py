"""The tables of the toy world: every seed under out/toy -> report.md, report.svg (to read) and report.json (the data).

    python runs/toy_report.py [out/toy]

What it reads in a seed's folder it keeps beside it, as seed0.json and so on; the table is made from these files, so
seeds run on several machines are put together by copying theirs into one folder. It tells of the seeds that have all
arms of runs/toy.sh, and of the further arms (runs/compare.sh) that every one of these has. An arm's costs are those of
all its stages: training the mapper, rewriting, fine-tuning. Intervals and p are over seeds (t distribution,
differences paired by seed; p is not corrected for the number of arms); with one seed there are none.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from report import figure
from toy_world import Config, native_share, steps_right

import reward
from mapper_rl import check, init_distributed, load_model, read_jsonl, run, score, write_text, written_rows

ROUNDS = [f"round-{r}/{stage}" for r in range(1, 5) for stage in ("rewrite", "sft")]  # of RASFT, in runs/compare.sh
ARMS = {  # arm -> its stages
    "base": [],
    "sft": ["sft/sft"],
    "dft": ["dft/sft"],
    "asft": ["asft/sft"],
    "rft": ["rft/rewrite", "rft/sft"],
    "rft_dft": ["rft/rewrite", "rft_dft/sft"],
    "rft_filtered": ["rft_filtered/rewrite", "rft_filtered/sft"],
    "mtg": ["mtg/rewrite", "mtg/sft"],
    "mtg_dft": ["mtg/rewrite", "mtg_dft/sft"],
    "mtg_filtered": ["mtg_filtered/rewrite", "mtg_filtered/sft"],
    "rasft": [f"rasft/{stage}" for stage in ROUNDS],
    "rasft_filtered": [f"rasft_filtered/{stage}" for stage in ROUNDS],
    "prompted": ["prompted/rewrite", "prompted/sft"],
    "prompted_dart": ["prompted_dart/rewrite", "prompted_dart/sft"],
    "prompted_no_penalty": ["prompted_no_penalty/rewrite", "prompted_no_penalty/sft"],
    "prompted_no_fidelity": ["prompted_no_fidelity/rewrite", "prompted_no_fidelity/sft"],
    "prompted_neither": ["prompted_neither/rewrite", "prompted_neither/sft"],
    "dart": ["dart/mapper", "dart/rewrite", "dart/sft"],
    "dart_dft": ["dart/mapper", "dart/rewrite", "dart_dft/sft"],
    "grpo": ["grpo/solve"],
    "grpo_filtered": ["grpo_filtered/solve"],
    "oracle": ["oracle/sft"],
}
CLAIMS = [
    ("dft", "sft"),
    ("asft", "dft"),
    ("mtg", "sft"),
    ("mtg_dft", "dft"),
    ("mtg", "rft"),
    ("rasft", "sft"),
    ("rasft", "dft"),
    ("dart", "sft"),
    ("dart", "dft"),
    ("dart", "prompted"),
    ("dart", "prompted_dart"),
    ("dart", "grpo"),
    ("dart", "grpo_filtered"),
    ("dart", "rft"),
    ("dart", "rft_filtered"),
    ("dart", "mtg"),
    ("dart", "mtg_filtered"),
    ("dart", "rasft"),
    ("dart", "rasft_filtered"),
    ("dart_dft", "dart"),
    ("dart_dft", "dft"),
    ("dart_dft", "rft_dft"),
    ("dart_dft", "mtg_dft"),
    ("dart_dft", "rasft"),  # which has DFT's weights in its loss
    ("dart_dft", "rasft_filtered"),
    ("rasft", "rft_dft"),
    ("rft_filtered", "rft"),
    ("mtg_filtered", "mtg"),
    ("rasft_filtered", "rasft"),
    ("grpo_filtered", "grpo"),
]  # of the first over the second
NEEDED = ("base", "sft", "prompted", "prompted_dart", "dart", "grpo", "oracle")  # the arms of runs/toy.sh
EVALUATIONS = ("eval", "eval-compare")
SUITES = ["in_distribution", "shorter", "longer", "reworded"]
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # t, by seeds


# --- reading what the stages wrote ---


def metrics(folder: Path) -> list[dict]:
    return written_rows(folder / "metrics.jsonl")


def mean_of(rows: list[dict], name: str) -> float:
    """Mean of what the rows have of a name; nan if they have nothing."""
    values = [row[name] for row in rows if name in row]
    return float(np.mean(values)) if values else float("nan")


def accuracies(seed: Path, model: str, evaluations: tuple[str, ...] = EVALUATIONS) -> dict[str, float] | None:
    """avg@n on each suite, if this seed's model was evaluated."""
    for evaluation in evaluations:
        path = seed / evaluation / model / "summary.json"
        if path.exists():
            benchmarks = json.loads(path.read_text())["benchmarks"]
            return {suite: benchmarks[suite]["avg@n"]["value"] for suite in SUITES}


def costs(seed: Path, stages: list[str]) -> dict[str, float]:
    """Wall-clock seconds, in all and of generation (grading and scoring included), tokens, bytes a process."""
    told = {"seconds": 0, "generation_seconds": 0.0, "generated_tokens": 0, "peak_memory": 0}
    for stage in stages:
        rows, seconds = metrics(seed / stage), int((seed / stage / "seconds").read_text())
        told["seconds"] += seconds
        if "/rewrite" in stage:
            told["generation_seconds"] += seconds
        else:
            told["generation_seconds"] += sum(r.get(f"seconds_{p}", 0.0) for r in rows for p in ("rollout", "reward"))
        told["generated_tokens"] += rows[-1].get("generated_tokens", 0)
        told["peak_memory"] = max([told["peak_memory"], *(row.get("peak_memory", 0) for row in rows)])
    return told


def data_of(seed: Path, stages: list[str]) -> dict[str, float]:
    """What an arm was trained on: share of each source by weight; over all rows, each once, the mean log-probability
    under the target and, where texts were rewritten, the share that is right in every step by the world's own checker
    and the mean share of native steps."""
    rewriting = [stage for stage in stages if "/rewrite" in stage][-1:]  # RASFT: its last round
    if not rewriting:
        told = metrics(seed / "prompted/rewrite")[-1]  # which has scored the expert's texts
        return {"align": told["expert_align"], "weight/expert": 1.0}
    told = metrics(seed / rewriting[0])[-1]
    rows = written_rows(seed / rewriting[0] / "train.jsonl")
    return {
        "align": told["align"],
        "right": float(np.mean([steps_right(row["problem"], row["solution"]) for row in rows])),
        "native": float(np.mean([native_share(row["solution"]) for row in rows])),
    } | {k: v for k, v in told.items() if k.startswith("weight/")}


def oracle_alignment(seed: Path) -> float:
    """A(y|x) of the native solutions under the base model, which no method here sees."""
    import torch

    world = Path("out/world") / seed.name
    base = str(world / "base")
    tokenizer = reward.load_tokenizer(base)
    pairs = [
        reward.text_ids(tokenizer, r["problem"], r["solution"])
        for r in read_jsonl(str(world / "oracle.jsonl"), {"problem": str, "solution": str})
    ]
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(base, device, train=False)
    return float(np.mean([s.mean().item() for s in score(model, pairs, 4096, device)]))


def curve_points(seed: Path) -> list[dict]:
    """runs/curves.sh: accuracy, share of rows with a clean rewrite, A and costs, by mapper and K, and by its steps."""
    steps = {row["step"]: row for row in metrics(seed / "dart/mapper")}
    last = max(steps)
    start = int((seed / "dart/mapper/seconds").read_text()) - steps[last]["elapsed"]  # of processes and engine
    places = {path.name: f"curves/{path.name}" for path in (seed / "curves").iterdir()}
    places |= {"untrained-8": "prompted_dart", "trained-8": "dart", "step-0": "prompted_dart"}
    places |= {f"step-{last}": "dart"}
    points = []
    for name, place in places.items():
        model = name if place.startswith("curves") else place
        suites = accuracies(seed, model, ("eval-curves", "eval"))
        if suites is None:
            continue
        curve, at = name.split("-")
        spent = costs(seed, [f"{place}/rewrite", f"{place}/sft"])
        cost = {key: spent[key] for key in ("seconds", "generated_tokens")}
        if curve != "untrained" and place != "prompted_dart":
            row = steps[last if curve == "trained" else int(at)]
            cost["seconds"] += start + row["elapsed"]
            cost["generated_tokens"] += row["generated_tokens"]
        told = metrics(seed / place / "rewrite")[-1]
        points.append({"curve": curve, "at": int(at), "average": float(np.mean(list(suites.values())))})
        points[-1] |= {"clean rows": told["weight/mapper"], "A": told["align"], **cost}
    return sorted(points, key=lambda point: (point["curve"], point["at"]))


def dart_checks(arm: Path) -> dict[str, float]:
    """What a mapper learnt, and whether its texts are honest by the world's own checker."""
    steps = metrics(arm / "mapper")
    first, last = steps[:1], steps[-5:]
    rows = read_jsonl(str(arm / "rewrite/train.jsonl"), {"source": str, "problem": str, "solution": str})
    mapped = [r for r in rows if r["source"] == "mapper"]
    right = [r for r in mapped if steps_right(r["problem"], r["solution"])]
    return {
        "rows from the mapper": len(mapped) / len(rows),
        "rows from the mapper and right in every step": len(right) / len(rows),
        "native share of the steps": float(np.mean([native_share(r["solution"]) for r in rows])),
        "gate rate, first step": mean_of(first, "gate"),
        "gate rate, last 5 steps": mean_of(last, "gate"),
        "gate rate less hard cheats, first step": mean_of(first, "clean"),
        "gate rate less hard cheats, last 5 steps": mean_of(last, "clean"),
        "A(y°), expert's text": mean_of(rows, "expert_align"),
        "A(y), first step": mean_of(first, "A"),
        "A(y), last 5 steps": mean_of(last, "A"),
        "A of the training set": mean_of(rows, "align"),
    }


# --- telling it ---


def p_value(values: list[float]) -> float:
    """Two-sided t test of mean 0 over seeds."""
    import mpmath

    n, deviation = len(values), np.std(values, ddof=1)
    t2 = float(len(values) * np.mean(values) ** 2 / max(deviation**2, 1e-30))
    return float(mpmath.betainc((n - 1) / 2, 0.5, 0, (n - 1) / (n - 1 + t2), regularized=True))


def half_interval(values: list[float]) -> float:
    """Half of the 95% interval of the mean over seeds (t); T95 must know their number."""
    return T95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5


def interval(values: list[float]) -> str:
    """mean ± half of the 95% interval over seeds, p."""
    if len(values) not in T95:
        return f"{np.mean(values):+.1f} (no interval; seeds: {len(values)})"
    return f"{np.mean(values):+.1f} ± {half_interval(values):.1f}, p {p_value(values):.3f}"


def spread(values: list[float]) -> str:
    """mean ± standard deviation over seeds, in percent."""
    deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)] + [""]


def collect(seed: Path) -> dict:
    """Everything that the table needs of one seed's folder."""
    arms: dict = {}
    for arm, stages in ARMS.items():
        suites = accuracies(seed, arm)
        if suites is None:
            continue
        arms[arm] = {"suites": suites, "average": float(np.mean(list(suites.values()))), **costs(seed, stages)}
        if stages and arm != "oracle" and "solve" not in stages[0]:
            arms[arm]["data"] = data_of(seed, stages)

    curve = []
    rows = {row["step"]: row for row in metrics(seed / "grpo/solve")}
    names = {int(p.name.removeprefix("grpo-")): p.name for p in sorted((seed / "eval").glob("grpo-*"))}
    names[max(rows)] = "grpo"
    start = int((seed / "grpo/solve/seconds").read_text()) - rows[max(rows)]["elapsed"]  # of processes and engine
    for step, name in sorted(names.items()):
        if step not in rows:
            continue  # exported by an attempt that was killed before its next checkpoint
        average = float(np.mean(list(accuracies(seed, name).values())))
        cost = {"seconds": start + rows[step]["elapsed"], "generated_tokens": rows[step]["generated_tokens"]}
        curve.append({"seed": seed.name, "step": step, "average": average, **cost})

    ablations = {}
    for path in sorted(seed.glob("eval-ablation/*/summary.json")):
        name = path.parent.name
        told = dart_checks(seed / ("dart" if name == "dart" else f"ablation/{name}"))
        average = float(np.mean(list(accuracies(seed, name, ("eval-ablation",)).values())))
        ablations[name] = {"average accuracy": average, **told}
    dart = dart_checks(seed / "dart") | {"A of native text (oracle)": oracle_alignment(seed)}
    world = json.loads(Path("out/world", seed.name, "config.json").read_text())["config"]["version"]
    told = {"curves": curve_points(seed)} if (seed / "eval-curves").exists() else {}
    return told | {"world": world, "arms": arms, "grpo_curve": curve, "dart": dart, "ablations": ablations}


def draw(kept: list[dict]) -> str:
    """SVG: accuracy, clean rows and A over K; accuracy over seconds and tokens, of DART by its mapper's steps beside
    direct GRPO; all arms over seconds. A line or a point for each seed; curves are of the seeds that have them."""
    with_curves = [one for one in kept if one.get("curves")]

    def lines(label: str, curve: str, x: str, y: str, scale: float) -> list[tuple]:
        found = [[point for point in one["curves"] if point["curve"] == curve] for one in with_curves]
        return [(label, [point[x] for point in of], [scale * point[y] for point in of]) for of in found]

    panels = []
    for y, scale, title in (("average", 100, "accuracy, %"), ("clean rows", 100, "clean rows, %"), ("A", 1, "A")):
        both = [line for name in ("untrained", "trained") for line in lines(f"{name} mapper", name, "at", y, scale)]
        panels.append((title, "K, rewrites to choose from", both))
    for x in ("seconds", "generated_tokens"):
        both = lines("DART, mapper's steps", "step", x, "average", 100)
        for one in with_curves or kept:
            points = one["grpo_curve"]
            both.append(("direct GRPO", [p[x] for p in points], [100 * p["average"] for p in points]))
        panels.append(("accuracy, %", x.replace("_", " "), both))
    arms = [(arm, [of["seconds"]], [100 * of["average"]]) for one in kept for arm, of in one["arms"].items()]
    panels.append(("accuracy of all arms, %", "seconds", arms))
    return figure(panels, columns=3)


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/toy")
    init_distributed()

    # --- 1. collect ---
    for path in sorted(out.glob("seed*/eval")):
        if all((path / arm / "summary.json").exists() for arm in NEEDED):
            write_text(out / f"{path.parent.name}.json", json.dumps(collect(path.parent), indent=1))
    kept = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("seed*.json"))}
    check(kept, f"{out}: no finished evaluation below it; run `bash runs/toy.sh` first")
    for name, one in kept.items():
        other = f"{out}/{name}.json tells of world {one.get('world', 1)}, this is world {Config.version}"
        check(one.get("world") == Config.version, f"{other}: their figures do not meet in one table; remove it")
    seeds = list(kept)
    arms: dict = {}
    for arm in ARMS:
        each = [one["arms"][arm] for one in kept.values() if arm in one["arms"]]
        if len(each) == len(seeds):
            arms[arm] = {name: [one[name] for one in each] for name in each[0]}
            arms[arm]["suites"] = {suite: [one["suites"][suite] for one in each] for suite in SUITES}
    curves = [point for one in kept.values() for point in one["grpo_curve"]]
    checks = [one["dart"] for one in kept.values()]
    by_curve: dict = {}  # (curve, K or step) -> a point a seed
    for one in kept.values():
        for point in one.get("curves", []):
            by_curve.setdefault((point["curve"], point["at"]), []).append(point)
    ablations = {f"{name}, {seed}": a for seed, one in kept.items() for name, a in one["ablations"].items()}

    # --- 2. write ---
    average = {arm: np.array(told["average"]) for arm, told in arms.items()}
    lines = [f"# Toy world, {len(seeds)} seed(s): {', '.join(seeds)}", ""]
    lines += [
        "Accuracy in % (4 samples a problem at temperature 1; mean ± standard deviation over seeds), the average also "
        "with its 95% interval over seeds (t); difference to SFT in points, with its interval and p (t, paired by "
        "seed; not corrected for the number of arms).",
        "",
    ]
    rows = []
    for arm, told in arms.items():
        cells = [spread(told["suites"][suite]) for suite in SUITES] + [spread(told["average"])]
        cells += [f"± {100 * half_interval(told['average']):.1f}" if len(seeds) in T95 else ""]
        rows.append([arm, *cells, "" if arm == "sft" else interval(list(100 * (average[arm] - average["sft"])))])
    lines += table(["arm", *SUITES, "average", "its interval", "minus SFT"], rows)
    claims = [(a, b) for a, b in CLAIMS if a in arms and b in arms]
    rows = []
    for a, b in claims:
        points = list(100 * (average[a] - average[b]))
        rows.append([a, b, ", ".join(f"{point:+.1f}" for point in points), interval(points)])
    lines += ["Differences between arms in points:", ""]
    lines += table(["arm", "minus", "by seed", "mean"], rows)
    gain = (average["dart"] - average["sft"]).mean() / (average["oracle"] - average["sft"]).mean()
    lines += [f"DART recovers {100 * gain:.0f}% of what native text (the oracle) gains over SFT.", ""]
    lines += [
        "What it cost, and what it forgot (shorter problems, points against the base). Seconds by the clock; of "
        "generation: rewriting with its start, scoring and grading, and an RL run's rollouts and rewards; of training: "
        "the rest. Memory of the largest training process; a rewriting process is not counted.",
        "",
    ]
    rows = []
    for arm, told in arms.items():
        seconds, generation = np.mean(told["seconds"]), np.mean(told["generation_seconds"])
        forgot = 100 * (np.mean(told["suites"]["shorter"]) - np.mean(arms["base"]["suites"]["shorter"]))
        cells = [f"{seconds:.0f}", f"{generation:.0f}", f"{seconds - generation:.0f}"]
        cells += [f"{np.mean(told['generated_tokens']):,.0f}", f"{max(told['peak_memory']) / 2**20:,.0f} MiB"]
        rows.append([arm, *cells, f"{forgot:+.1f}"])
    head = ["seconds", "of generation", "of training", "generated tokens", "memory", "shorter, minus base"]
    lines += table(["arm", *head], rows)
    lines += [
        "What it learnt from (RASFT: in its last round): share of each source by weight; mean over rows of the "
        "log-probability under the base; rows right in every step by the world's own checker; share of native steps:",
        "",
    ]
    rows = []
    for arm, told in arms.items():
        if data := told.get("data"):
            sources = [name for name in data[0] if name.startswith("weight/")]
            shares = [f"{k.removeprefix('weight/')} {100 * np.mean([one[k] for one in data]):.0f}%" for k in sources]
            cells = [spread([one[k] for one in data]) if k in data[0] else "" for k in ("right", "native")]
            rows.append([arm, ", ".join(shares), f"{mean_of(data, 'align'):.2f}", *cells])
    lines += table(["arm", "sources", "A", "right in every step", "native steps"], rows)
    rows = [[name, *(f"{c[name]:.3f}" for c in checks)] for name in checks[0]]
    lines += table(["what the mapper learnt", *seeds], rows)
    lines += ["Direct GRPO over time (average accuracy; DART's total is in the table above):", ""]
    rows = [
        [c["seed"], str(c["step"]), f"{c['seconds']:.0f}", f"{c['generated_tokens']:,}", f"{100 * c['average']:.1f}"]
        for c in curves
    ]
    lines += table(["seed", "step", "seconds", "generated tokens", "average"], rows)
    if by_curve:
        lines += [
            "DART's choice among K rewrites of the untrained and of the trained mapper, and of the mapper after some "
            "steps (K = 8). Clean rows: demonstrations that have a clean rewrite; A: of the training set.",
            "",
        ]
        rows = []
        for (curve, at), points in by_curve.items():
            cells = [spread([p["average"] for p in points]), spread([p["clean rows"] for p in points])]
            cells += [f"{np.mean([p['A'] for p in points]):.2f}", f"{np.mean([p['seconds'] for p in points]):.0f}"]
            rows.append(
                [curve, str(at), str(len(points)), *cells, f"{np.mean([p['generated_tokens'] for p in points]):,.0f}"]
            )
        head = ["curve", "K or step", "seeds", "average", "clean rows", "A", "seconds", "generated tokens"]
        lines += table(head, rows)
    if ablations:
        lines += ["One part of the reward changed at a time, in no-gate-no-penalty two:", ""]
        rows = [[name, *(f"{a[name]:.3f}" for a in ablations.values())] for name in next(iter(ablations.values()))]
        lines += table(["", *ablations], rows)
    text = "\n".join(lines)
    write_text(out / "report.md", text)
    write_text(out / "report.svg", draw(list(kept.values())))
    data = {"arms": arms, "grpo_curve": curves, "dart": checks, "ablations": ablations}
    data["curves"] = [point for points in by_curve.values() for point in points]
    write_text(out / "report.json", json.dumps(data, indent=1))
    print(f"\n{text}\nwrote report.md, report.svg (figures) and report.json in {out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
