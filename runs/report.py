"""Finished or running stages -> one page to look at: report.html (self-contained, light and dark) and report.md.

    python runs/report.py out/toy/seed0                    # -> out/toy/seed0/report.html and report.md
    python runs/report.py out/kl out/nll --out out/both    # two runs beside each other: out/both/report.html
    python runs/report.py out/toy/seed? --out out/toy/all  # several seeds: a method has one colour, a seed a line

Below each RUN it finds every stage by its config.json, and shows what there is: accuracy with intervals, and against
what it cost (an arm's seconds and tokens are those of all stages that its model came from); the mapper's reward,
alignment, lengths and cheats over steps; direct RL over steps; SFT losses; and for a few problems the expert's text
beside the mapper's first and last rewrite, every token shaded by its log-probability under the target. What is missing
is named.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mapper_rl
import reward
from mapper_rl import check, init_distributed, load_model, read_jsonl, score, write_text, written_rows

PROBLEMS = 4  # whose texts are shown
OWN = 64  # right answers of the base's own, by which one sees what a model has left of it
UNLIKELY = -2.0  # nats; in Markdown, which has no shades, such tokens are bold
INK = "#808182"  # of axes and labels in the figures; the page puts its own text colour there


def without_seed(name: str) -> str:
    """The name of a stage without its folder seed0, seed1, ...: what is left is one method's."""
    return "/".join(part for part in name.split("/") if not re.fullmatch(r"seed\d+", part))


class Stage:
    """One output folder of a script: its Config, metrics, and where it came from."""

    def __init__(self, folder: Path, run: Path, label: str):
        told = json.loads((folder / "config.json").read_text())
        self.folder, self.config = folder, told["config"]
        self.script = Path(told.get("command", [""])[0]).stem
        relative = str(folder.relative_to(run))
        self.name = "/".join(filter(None, (label, "" if relative == "." else relative)))
        self.line = without_seed(self.name)  # as the figures call it
        self.rows = written_rows(folder / "metrics.jsonl")

    def series(self, name: str) -> tuple[list, list]:
        """(steps, values) of what has that name."""
        points = [(row["step"], row[name]) for row in self.rows if name in row]
        return [x for x, _ in points], [y for _, y in points]

    def seconds(self) -> float:
        """Wall-clock seconds: what the run script kept, which are those of the last attempt, or, if that is more, what
        the stage itself logged of all of them (start-up left out)."""
        kept = self.folder / "seconds"
        if self.script == "mapper_rl":
            logged = self.rows[-1]["elapsed"] if self.rows else 0.0
        elif self.script == "sft":
            logged = sum(row["seconds"] for row in self.rows)
        else:
            last = self.rows[-1] if self.rows else {}
            logged = sum(value for name, value in last.items() if name.startswith("seconds/"))
        return max(logged, float(kept.read_text()) if kept.exists() else 0.0)


def find_stages(runs: list[Path]) -> list[Stage]:
    """Every stage below the runs; several runs are told apart by what differs in their paths."""
    above = os.path.commonpath([str(run.resolve()) for run in runs]) if len(runs) > 1 else ""
    stages = []
    for run in runs:
        label = os.path.relpath(run.resolve(), above) if above else ""
        folders = sorted(path.parent for path in run.rglob("config.json"))
        stages += [Stage(f, run, label) for f in folders if "config" in json.loads((f / "config.json").read_text())]
    known = ("mapper_rl", "rewrite", "sft", "evaluate")
    stages = [stage for stage in stages if stage.script in known]
    check(stages, f"{', '.join(map(str, runs))}: no stage below (no config.json of {', '.join(known)})")
    return stages


def lineage(model: str, stages: dict[Path, Stage]) -> list[Stage]:
    """All stages that a model folder came from, as far as they stand below the runs; [] for a base model."""
    stage = stages.get(Path(model).resolve().parent)
    if stage is None:
        return []
    found, config = [stage], stage.config
    # a training set, the demonstrations it came from
    while stage := stages.get(Path(config["data"]).resolve().parent):
        if stage.script != "rewrite" or stage in found:  # demonstrations that lie in a stage's folder, or in its own
            break
        config = stage.config
        found += [stage, *lineage(config["mapper"], stages)]
    if start := found[0].config.get("start_from"):
        found += lineage(f"{start}/model", stages)
    found += lineage(found[0].config["model"], stages)
    return list(dict.fromkeys(found))


def scores(stages: list[Stage]) -> list[dict]:
    """Every evaluated model: its summary, and what it cost."""
    at = {stage.folder.resolve(): stage for stage in stages}
    found = []
    for stage in stages:
        for path in sorted(stage.folder.glob("*/summary.json")) if stage.script == "evaluate" else []:
            told = json.loads(path.read_text())
            one = {
                "name": path.parent.name,
                "long": f"{stage.name}/{path.parent.name}",
                "folder": path.parent,
                **told,
                "solve": None,
                "own": None,
            }
            history = lineage(told["model"], at)
            one["base"] = history[0].config["model"] if history else told["model"]
            one["seconds"] = sum(s.seconds() for s in history)
            one["tokens"] = sum(s.rows[-1].get("generated_tokens", 0) for s in history if s.rows)
            one["sampling"] = f"{stage.config['samples']} samples at temperature {stage.config['temperature']:g}"
            if history and history[0].script == "mapper_rl" and history[0].config["task"] == "solve":
                one["solve"] = history[0]
                step = Path(told["model"]).name.removeprefix("model-")  # exported on the way
                row = next((r for r in history[0].rows if str(r["step"]) == step.lstrip("0")), history[0].rows[-1])
                one["seconds"] += row["elapsed"] - history[0].rows[-1]["elapsed"]
                one["tokens"] += row["generated_tokens"] - history[0].rows[-1]["generated_tokens"]
            found.append(one)
    benchmarks = {name for one in found for name in one["benchmarks"]}
    for one in found:
        if one["benchmarks"].keys() != benchmarks:
            one["average"] = None  # means over other benchmarks are not compared
    longs: dict[str, list[str]] = {}
    for one in found:
        longs.setdefault(one["name"], []).append(one["long"])
    for one in found:
        same = longs[one["name"]]
        one["line"] = one["name"] if len(set(map(without_seed, same))) == 1 else without_seed(one["long"])
        if len(same) > 1 or one["long"] != without_seed(one["long"]):  # also what one seed alone has
            one["name"] = one["long"]
        if one["sampling"] != found[0]["sampling"]:  # the table's head tells of the first
            one["name"] += f" ({one['sampling']})"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Figures: SVG text
# ---------------------------------------------------------------------------------------------------------------------


def figure(panels: list[tuple[str, str, list[tuple[str, list, list]]]], columns: int = 2, legend: bool = False) -> str:
    """SVG of panels side by side: (title, name of the x axis, [(label, x, y)]); those without a point are left out.

    Lines of one panel with the same label, which are a method's seeds, have one colour and one entry in the legend.
    `legend`: one for all panels, below them, instead of one in each.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(title, x, [line for line in lines if line[1]]) for title, x, lines in panels]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return ""
    ink = {f"{k}.color": INK for k in ("text", "xtick", "ytick", "grid")}
    ink |= {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "svg.fonttype": "none",
        "font.size": 9,
        "legend.fontsize": 7.5,
    }
    ink |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25, "legend.framealpha": 0}
    with plt.rc_context(ink):
        columns = min(len(panels), columns)
        rows = -(-len(panels) // columns)
        drawn, axes = plt.subplots(rows, columns, figsize=(8.8, 2.9 * rows), squeeze=False, layout="constrained")
        for axis, (title, x, lines) in zip(axes.flat, panels):
            labels = list(dict.fromkeys(label for label, _, _ in lines))
            colors, width = plt.get_cmap("tab20" if len(labels) > 10 else "tab10"), 1.4 if len(lines) < 10 else 0.8
            for i, (label, xs, ys) in enumerate(lines):
                style = {"color": colors(labels.index(label) % colors.N), "lw": width, "ms": 6}
                named = label if label not in [earlier for earlier, _, _ in lines[:i]] else None
                axis.plot(xs, ys, ".-" if len(xs) < 25 else "-", label=named, **style)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(x)
            axis.grid(True)
            if not legend and len(labels) > 1:
                axis.legend(ncols=1 + len(labels) // 7)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        if legend:
            handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels())}
            drawn.legend(handles.values(), handles, loc="outside lower center", ncols=4)
        text = io.StringIO()
        drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plt.close(drawn)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def smooth(points: tuple[list, list], window: int) -> tuple[list, list]:
    """Moving average over the last `window` points."""
    xs, ys = points
    return xs, [float(np.mean(ys[max(0, i - window + 1) : i + 1])) for i in range(len(ys))]


def figures(stages: list[Stage], found: list[dict], levels: dict[str, float]) -> list[tuple[str, str, str]]:
    """(title, what one sees, SVG) of every figure that there is something for."""

    def of(script: str, task: str = "") -> list[Stage]:
        return [s for s in stages if s.script == script and (not task or s.config["task"] == task) and s.rows]

    mappers, solvers, tuned = of("mapper_rl", "map"), of("mapper_rl", "solve"), of("sft")
    cost = []
    for axis, key in (("seconds", "seconds"), ("generated tokens", "tokens")):
        lines = []
        for solver in dict.fromkeys(one["solve"] for one in found):
            some = [one for one in found if one["solve"] == solver and one["average"]]
            points = [(one[key], 100 * one["average"]["avg@n"]["value"], one["line"]) for one in some]
            if solver is None:
                lines += [(line, [x], [y]) for x, y, line in points]
            elif points:
                lines.append((f"{solver.line} (direct RL)", *map(list, zip(*[(x, y) for x, y, _ in sorted(points)]))))
        cost.append((f"accuracy (%) against {axis}", axis, lines))

    def over_steps(group: list[Stage], title: str, names: dict[str, str], window: int = 3) -> list:
        """Panels of metrics (`names`: metric -> word): of one stage all in one panel, of several one panel a metric."""
        lines = {}
        for metric, word in names.items():
            told = [(stage.line, *smooth(stage.series(metric), window)) for stage in group]
            if any(any(ys) for _, _, ys in told):  # a cheat that never occurs needs no line
                lines[word] = told
        if len(group) > 1:
            return [(f"{title}: {word}" if len(names) > 1 else title, "step", told) for word, told in lines.items()]
        return [(title, "step", [(word, xs, ys) for word, [(_, xs, ys)] in lines.items()])]

    aligned = over_steps(mappers, "mean log-probability", {"A": "A(y)", "A_expert": "A(y°)"})
    several = len(set(map(without_seed, levels))) > 1
    for target, level in levels.items() if aligned else ():
        last = max((s.rows[-1]["step"] for s in mappers if s.config["target"] == target), default=1)
        own = "the target's own right answers" + (f" ({without_seed(target)})" if several else "")
        aligned[0][2].append((own, [1, last], [level, level]))
    cheats = {name: name.replace("_", " ") for name in (*reward.HARD, *reward.SOFT)}
    learnt = [
        *over_steps(mappers, "reward", {"reward": "reward", "align": "align"}),
        *over_steps(mappers, "rates", {"gate": "gate", "clean": "clean", "correct": "correct", "copy": "copied"}),
        *aligned,
        *over_steps(mappers, "length / expert's length", {"length_ratio": "length"}),
        *over_steps(mappers, "cheats", cheats),
        *over_steps(mappers, "entropy (nats)", {"entropy": "entropy"}),
    ]
    direct = [
        *over_steps(solvers, "direct RL: correct", {"correct": "correct"}),
        *over_steps(solvers, "direct RL: tokens an answer", {"tokens": "tokens"}),
    ]
    losses = [("mean of 20 steps", "step", [(s.line, *smooth(s.series("loss"), 20)) for s in tuned])]
    told = [
        (
            "Accuracy against cost",
            "Mean over benchmarks; an arm's cost is that of all its stages.",
            figure(cost, legend=True),
        ),
        (
            "What the mapper learns",
            "Means of 3 steps; of hard cheats the rate, of soft ones (padding and the like) the strength.",
            figure(learnt, columns=2 + (len(mappers) > 1), legend=len(mappers) > 1),
        ),
        ("Direct RL on the target", "Means of 3 steps.", figure(direct, legend=len(solvers) > 1)),
        (
            "Fine-tuning",
            "Losses of different training texts are not comparable in height.",
            figure(losses, columns=1, legend=True),
        ),
    ]
    return [one for one in told if one[2]]


# ---------------------------------------------------------------------------------------------------------------------
# Texts under the target's eyes
# ---------------------------------------------------------------------------------------------------------------------


def rewrites(mapper: Stage, stages: list[Stage]) -> list[dict]:
    """Problems with the expert's text, a rewrite of the first five steps, and the one that was trained on, else the
    last that a later step has kept."""
    first, last = {}, {}
    for row in written_rows(mapper.folder / "rollouts.jsonl"):
        if row["step"] <= 5:
            first.setdefault(row["id"], row["text"])
        else:  # of a run of one epoch no problem comes again: the rewriting stage has them all
            last[row["id"]] = row["text"]
    data, fields = mapper.config["data"], {"id": str, "problem": str, "solution": str}
    rows = reward.check_kinds(data, read_jsonl(data, fields, optional={"kind": str}), graded=False)
    demos = {row["id"]: row for row in rows}
    mine = (mapper.folder / "model").resolve()
    for stage in stages:
        if stage.script == "rewrite" and Path(stage.config["mapper"]).resolve() == mine:
            chosen = written_rows(stage.folder / "train.jsonl")
            last |= {row["id"]: row["solution"] for row in chosen if row["source"] == "mapper"}
    shown = [i for i in first if i in demos and i in last and first[i].strip()][:PROBLEMS]
    texts = [{"expert": demos[i]["solution"], "before training": first[i], "after training": last[i]} for i in shown]
    return [{name: demos[i][name] for name in ("problem", "kind")} | {"texts": told} for i, told in zip(shown, texts)]


def own_answers(base: str, found: list[dict]) -> list[tuple[str, str, str]]:
    """(problem, answer, kind) of right answers that the base sampled when it was evaluated: the first of a problem, at
    most OWN of them."""
    path = Path(base).resolve()
    folder = next((one["folder"] for one in found if Path(one["model"]).resolve() == path), None)
    answers = []
    for row in [row for file in sorted(folder.glob("*.jsonl")) for row in written_rows(file)] if folder else []:
        right = [c["text"] for c in row["completions"] if c["correct"] and not c["greedy"]][:1]
        answers += [(row["problem"], text, row.get("kind", "math")) for text in right]
    return answers[:: max(1, len(answers) // OWN)][:OWN]


def gone(model: str) -> bool:
    """Whether a folder was removed; a name on the hub (OWNER/NAME) has no folder here."""
    folder = Path(model)
    return not folder.is_dir() and (folder.parent.is_dir() or len(folder.parts) != 2)


def measure_own(found: list[dict], device) -> list[str]:
    """one["own"]: mean over `own_answers` of the mean log-probability of their tokens under the evaluated model.
    Returns what is missing: models that are not here any more."""
    missing = []
    for base in dict.fromkeys(one["base"] for one in found):
        answers = own_answers(base, found)
        for one in found if answers else ():
            exported = Path(one["model"]).name.startswith("model-")  # points of a curve, one of each would take long
            if one["base"] != base or exported:
                continue
            if gone(one["model"]):
                missing.append(f"what {one['name']} has left of its base: {one['model']} is not here")
            else:
                tokenizer, model = reward.load_tokenizer(one["model"]), load_model(one["model"], device, train=False)
                rows = [reward.text_ids(tokenizer, *answer) for answer in answers]
                one["own"] = float(np.mean([logprobs.mean().item() for logprobs in score(model, rows, 8192, device)]))
    return missing


def look(stages: list[Stage], found: list[dict]) -> tuple[dict[str, float], list[dict], list[str]]:
    """Asks every mapper's target: ({target: its own level}, problems with tokens as (text, logp), what is missing)."""
    import torch

    shown: list[dict] = []
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    missing = measure_own(found, device)
    own = {Path(one["model"]).resolve(): one["own"] for one in found if one["own"] is not None}
    targets = dict.fromkeys(s.config["target"] for s in stages if s.script == "mapper_rl" and s.config["task"] == "map")
    levels = {target: own[Path(target).resolve()] for target in targets if Path(target).resolve() in own}
    for mapper in [s for s in stages if s.script == "mapper_rl" and s.config["task"] == "map" and s.rows]:
        target = mapper.config["target"]
        if gone(target) or not Path(mapper.config["data"]).is_file():
            missing.append(f"texts of {mapper.name}: {target} or {mapper.config['data']} is not here")
            continue
        tokenizer, model = reward.load_tokenizer(target), load_model(target, device, train=False)

        problems = rewrites(mapper, stages)
        if not problems:
            missing.append(f"texts of {mapper.name}: no rollout of the first steps has a later rewrite yet")
        for one in problems:
            pairs = [reward.text_ids(tokenizer, one["problem"], text, one["kind"]) for text in one["texts"].values()]
            tokens = {}
            for source, (_, row), logprobs in zip(one["texts"], pairs, score(model, pairs, 8192, device)):
                ends = [len(tokenizer.decode(row[:i])) for i in range(len(row))]
                whole = tokenizer.decode(row[:-1])
                pieces = [whole[a:b] for a, b in zip(ends, ends[1:])] + ["⏎"]  # the stop token is scored too
                tokens[source] = list(zip(pieces, logprobs.tolist()))
            shown.append({"run": mapper.name, "problem": one["problem"], "tokens": tokens})
    return levels, shown, missing


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1f2328; --faint: #6e7781; --line: #d8dee4;
  --shade: 214, 69, 65 }
@media (prefers-color-scheme: dark) {
  :root { --back: #0f1318; --ink: #e3e8ee; --faint: #9aa4af; --line: #2b323b; --shade: 240, 100, 90 }
}
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem }
p, li { max-width: 46rem } .faint { color: var(--faint) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
svg { width: 100%; height: auto; color: var(--ink) }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; margin: .4rem 0 1.6rem }
.texts div { white-space: pre-wrap; overflow-wrap: anywhere } .texts h4 { margin: 0 0 .2rem; font-weight: 600 }
"""


def arms(found: list[dict]) -> list[list[str]]:
    """Head and rows of the table of models: avg@n with half of its 95% interval over problems, what is left of the
    base, and the costs."""
    benchmarks = list(dict.fromkeys(name for one in found for name in one["benchmarks"]))
    rows = [["model", *benchmarks, "average", "base's own", "seconds", "generated tokens"]]
    for one in found:
        cells = [one["benchmarks"].get(name, {}).get("avg@n") for name in benchmarks]
        cells.append(one["average"] and one["average"]["avg@n"])
        told = [f"{100 * c['value']:.1f} ± {50 * (c['high'] - c['low']):.1f}" if c else "-" for c in cells]
        own = "-" if one["own"] is None else f"{one['own']:.2f}"
        rows.append([one["name"], *told, own, f"{one['seconds']:,.0f}", f"{one['tokens']:,}"])
    return rows


def shaded(tokens: list[tuple[str, float]]) -> str:
    """HTML: the redder, the less likely under the target; nothing at 0 nats, full at -6."""
    spans = []
    for piece, logprob in tokens:
        depth = min(max(-logprob, 0.0) / 6, 1) * 0.75
        text = html.escape(piece)
        spans.append(f'<span title="{logprob:.2f}" style="background:rgba(var(--shade),{depth:.2f})">{text}</span>')
    return "".join(spans)


def bold(tokens: list[tuple[str, float]]) -> str:
    """Markdown: unlikely tokens are bold."""
    told = "".join(f"**{t.strip()}** " if logprob < UNLIKELY and t.strip() else t for t, logprob in tokens)
    return told.replace("|", "\\|").replace("\n", "<br>")


def page(title: str, found: list[dict], drawn: list, shown: list[dict], missing: list[str]) -> str:
    """The HTML, nothing of which is fetched."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if missing:
        parts.append('<p class="faint">Missing: ' + html.escape("; ".join(missing)) + ".</p>")
    if found:
        head, *rows = arms(found)
        cell = lambda tag, values: "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values)  # noqa: E731
        table = "".join(f"<tr>{cell('td', row)}</tr>" for row in rows)
        parts.append(f"<h2>Accuracy</h2><p class=faint>{html.escape(TABLE.format(found[0]['sampling']))}</p>")
        parts.append(f"<div class=wide><table><tr>{cell('th', head)}</tr>{table}</table></div>")
    for name, told, svg in drawn:
        parts.append(f"<h2>{name}</h2><p class=faint>{told}</p>{svg.replace(INK, 'currentColor')}")
    if shown:
        parts.append(f"<h2>Texts under the target's eyes</h2><p class=faint>{TEXTS} The redder, the less likely.</p>")
    for one in shown:
        parts.append(f"<p><b>{html.escape(one['problem'])}</b> <span class=faint>{html.escape(one['run'])}</span></p>")
        columns = "".join(
            f"<div><h4>{source} <span class=faint>{mean(tokens):.2f}</span></h4>{shaded(tokens)}</div>"
            for source, tokens in one["tokens"].items()
        )
        parts.append(f"<div class=texts>{columns}</div>")
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
    return f"<!doctype html><html lang=en>{head}<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"


TABLE = "Mean over {} of each problem, in %, ± half of the 95% interval over problems. "
TABLE += f"Base's own: mean log-probability of a token of {OWN} right answers (or as many as the base sampled)."
TEXTS = "Each token by its log-probability under the target that is asked the plain question; the mean beside the name."


def mean(tokens: list[tuple[str, float]]) -> float:
    return float(np.mean([logprob for _, logprob in tokens]))


def markdown(title: str, found: list[dict], drawn: list, shown: list[dict], missing: list[str], folder: Path) -> str:
    """The same as Markdown; its figures are files beside it."""
    lines = [f"# {title}", ""]
    lines += [f"Missing: {'; '.join(missing)}.", ""] if missing else []
    if found:
        head, *rows = arms(found)
        lines += ["## Accuracy", "", TABLE.format(found[0]["sampling"]), ""]
        lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]
    for number, (name, told, svg) in enumerate(drawn, 1):
        write_text(folder / f"figure-{number}.svg", svg)
        lines += [f"## {name}", "", told, "", f"![{name}](figure-{number}.svg)", ""]
    lines += ["## Texts under the target's eyes", "", f"{TEXTS} Below {UNLIKELY:g}: bold.", ""] if shown else []
    for one in shown:
        lines += [f"{one['problem']} ({one['run']})".replace("\n", " "), "", "| text | mean | |", "|---|---|---|"]
        lines += [f"| {source} | {mean(tokens):.2f} | {bold(tokens)} |" for source, tokens in one["tokens"].items()]
        lines += [""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(usage="%(prog)s RUN ... [--out FOLDER]", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder with stages somewhere below")
    parser.add_argument("--out", type=Path, help="where report.html and report.md go; default: the (first) RUN")
    args = parser.parse_args()
    for run in args.runs:
        check(run.is_dir(), f"{run}: no such folder; name the output folder of a stage, or one above several")
    stages = find_stages(args.runs)
    found = scores(stages)
    kinds = {(s.script, s.config.get("task")) for s in stages if s.rows}
    wanted = {
        "evaluate": "an evaluation (evaluate.py)",
        "mapper_rl": "a mapper's training (mapper_rl.py --task map)",
        "rewrite": "rewrites (rewrite.py)",
        "sft": "fine-tuning (sft.py)",
    }
    missing = [told for script, told in wanted.items() if script not in {s for s, task in kinds if task != "solve"}]
    init_distributed()
    levels, shown, gaps = look(stages, found)
    drawn = figures(stages, found, levels)
    out = args.out or args.runs[0]
    out.mkdir(parents=True, exist_ok=True)
    title = " and ".join(str(run) for run in args.runs)
    write_text(out / "report.html", page(title, found, drawn, shown, missing + gaps))
    write_text(out / "report.md", markdown(title, found, drawn, shown, missing + gaps, out))
    print(f"wrote {out / 'report.html'} and report.md")


if __name__ == "__main__":
    mapper_rl.run(main)
