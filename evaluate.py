"""Stage 4: scores models on benchmarks with vLLM, and compares them.

Every problem is asked as in training (reward.solve_prompt), n answers are sampled at `temperature` (top_p 1) and one
more is decoded greedily. For a problem with c right answers of n:

    avg@n   c / n: the probability of a right answer, the figure to compare models by
    pass@n  1 if c > 0
    maj@n   1 if the most frequent predicted answer is right (answers are counted as strings; ties go to the first)
    greedy  1 if the greedy answer is right

A benchmark's score is the mean over its problems, the average is the unweighted mean over benchmarks. Intervals are 95%
percentile bootstraps over *problems*, never over samples: the n answers to a problem share its difficulty, so counting
them as n observations would make every interval too narrow. Two models are compared on the same problems by the paired
bootstrap: the differences problem by problem are resampled, and p = 2 min(P(d <= 0), P(d >= 0)).

Several models share one engine, whose weights are swapped (a second instead of a new start), so they must have one
architecture. Rows are shared out over ranks, each with an engine of its own; graded rows are flushed to
NAME/BENCHMARK.rank{r}.jsonl, and a run that is started again, on any number of ranks, does only what is missing.

Left out: tensor parallelism (a model must fit one GPU), few-shot prompts, verifiers of other kinds than mathematics.

    python evaluate.py --models runs/base runs/sft --benchmarks data/math500.jsonl --output_dir runs/eval   # one GPU
    torchrun --nproc-per-node 8 evaluate.py ...                                                             # one node
    torchrun --nnodes 2 --node-rank R --nproc-per-node 8 --master-addr HOST --master-port 29500 evaluate.py ...
    python evaluate.py --compare runs/eval/base runs/other/sft             # prints finished evaluations side by side
"""

from __future__ import annotations

import glob
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import reward

if __name__ != "__mp_main__":  # grading workers re-import this file and need neither
    import numpy as np
    import torch.distributed as dist

RESAMPLES = 2000  # bootstrap resamples; the smallest p that can be seen is 1 / RESAMPLES
FLUSH_ROWS, FLUSH_SECONDS = 64, 5.0  # finished rows are graded and flushed when there are so many, or after so long


@dataclass
class Config:
    models: list[str] = field(
        default_factory=list
    )  # model folders; NAME=FOLDER names one, else its last path part does
    benchmarks: list[str] = field(default_factory=list)  # JSONL files {id, problem, answer}; named by their file stem
    output_dir: str = ""  # where NAME/BENCHMARK.jsonl and NAME/summary.json go; started again, only the rest is done
    n: int = 4  # samples per problem; more narrow the interval of avg@n, but never below what the problems allow
    temperature: float = 1.0  # of the n samples; 1 is the distribution that was trained, lower ones sharpen it
    greedy: bool = True  # one greedy answer per problem besides
    max_tokens: int = 4096  # tokens of an answer, clipped to what the context leaves; too few show as truncation
    max_model_len: int = 6144  # tokens of prompt + answer; problems whose prompt does not fit are named and left out
    limit: int = 0  # only the first rows of each benchmark (0: all)
    seed: int = 0  # every request is seeded from (seed, benchmark, id): the number of ranks does not matter
    gpu_memory: float = 0.9  # share of the GPU that vLLM may take (unused on a CPU)
    compare: list[str] = field(default_factory=list)  # finished evaluations (output_dir or output_dir/NAME) to compare

    def __post_init__(self):
        reward.check(self.models or self.compare, "give --models to evaluate, or --compare with finished folders")
        if self.models:
            reward.check(self.benchmarks, "--benchmarks must name at least one JSONL file")
            reward.check(self.output_dir, "--output_dir must be given")
        reward.check(self.n >= 1, f"--n must be 1 or more, got {self.n}")
        reward.check(self.temperature > 0, f"--temperature must be above 0 (see --greedy), got {self.temperature}")
        reward.check(self.max_tokens >= 1, f"--max_tokens must be 1 or more, got {self.max_tokens}")
        reward.check(self.max_model_len >= 2, f"--max_model_len must be 2 or more, got {self.max_model_len}")
        reward.check(self.limit >= 0, f"--limit must be 0 (all) or more, got {self.limit}")
        reward.check(0 < self.gpu_memory <= 1, f"--gpu_memory must be in (0, 1], got {self.gpu_memory}")


# ---------------------------------------------------------------------------------------------------------------------
# Scores: a problem's row -> its scores -> means, intervals, differences
# ---------------------------------------------------------------------------------------------------------------------


def problem_scores(row: dict) -> dict[str, float]:
    """avg@n, pass@n, maj@n and, where there is one, greedy of one problem."""
    sampled = [c for c in row["completions"] if not c["greedy"]]
    votes = Counter(c["predicted"] for c in sampled if c["predicted"] is not None)  # no answer, no vote
    winner = votes.most_common(1)[0][0] if votes else None  # the first met among equals
    scores = {
        "avg@n": sum(c["correct"] for c in sampled) / len(sampled),
        "pass@n": float(any(c["correct"] for c in sampled)),
        "maj@n": float(next((c["correct"] for c in sampled if votes and c["predicted"] == winner), False)),
    }
    greedy = [c for c in row["completions"] if c["greedy"]]
    return scores | ({"greedy": float(greedy[0]["correct"])} if greedy else {})


def bootstrap(suites: list, seed: int = 0):
    """[(problems, ...) scores per benchmark] -> (RESAMPLES, ...): unweighted means over benchmarks of resampled means.

    Problems are drawn with replacement inside each benchmark.
    """
    rng = np.random.default_rng(seed)
    means = []
    for scores in suites:
        drawn = rng.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), size=RESAMPLES)
        means.append(drawn @ scores / len(scores))
    return np.mean(means, axis=0)


def intervals(suites: list[list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Value and 95% interval of each score, over one benchmark ([scores]) or averaged over several."""
    names = [name for name in suites[0][0] if all(name in scores for suite in suites for scores in suite)]
    arrays = [np.array([[scores[name] for name in names] for scores in suite]) for suite in suites]
    value = np.mean([array.mean(0) for array in arrays], axis=0)
    low, high = np.quantile(bootstrap(arrays), [0.025, 0.975], axis=0)
    return {n: dict(value=float(v), low=float(a), high=float(b)) for n, v, a, b in zip(names, value, low, high)}


def paired(first: list[dict[str, float]], other: list[dict[str, float]]) -> dict[str, float]:
    """avg@n of `other` minus `first` ({id: avg@n} per benchmark) on the ids that both have: value, interval, p."""
    shared = [[i for i in a if i in b] for a, b in zip(first, other)]
    differences = [np.array([b[i] - a[i] for i in ids]) for a, b, ids in zip(first, other, shared) if ids]
    if not differences:
        return {}
    resampled = bootstrap(differences)
    low, high = np.quantile(resampled, [0.025, 0.975])
    tail = 2 * min((resampled <= 0).mean(), (resampled >= 0).mean())
    return {
        "difference": float(np.mean([d.mean() for d in differences])),
        "low": float(low),
        "high": float(high),
        "p": float(np.clip(tail, 1 / RESAMPLES, 1.0)),
        "problems": sum(map(len, shared)),
    }


def summarize(rows: list[dict]) -> dict:
    """Everything that is told of one model on one benchmark."""
    sampled = [c for row in rows for c in row["completions"] if not c["greedy"]]
    return {
        "problems": len(rows),
        "n": len(sampled) // len(rows),
        **intervals([[problem_scores(row) for row in rows]]),
        "mean_tokens": sum(c["tokens"] for c in sampled) / len(sampled),
        "truncated": sum(c["finish"] == "length" for c in sampled) / len(sampled),
        "no_answer": sum(c["predicted"] is None for c in sampled) / len(sampled),
        "generated_tokens": sum(c["tokens"] for row in rows for c in row["completions"]),
        "seconds": sum(row["seconds"] for row in rows),  # of all engines together, grading included
        "grading_timeouts": sum(row["grading_timeouts"] for row in rows),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Models and files
# ---------------------------------------------------------------------------------------------------------------------


def name_models(models: list[str]) -> dict[str, str]:
    """["runs/base", "tuned=runs/b/final"] -> {"base": "runs/base", "tuned": "runs/b/final"}."""
    named: dict[str, str] = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or "/" in name:
            name, path = Path(os.path.abspath(model)).name, model
        reward.check(name not in named, f"--models {model}: '{name}' is taken by {named.get(name)}; write NAME={path}")
        named[name] = path
    return named


def architecture(folder: str) -> dict:
    """The config fields that must agree for two models to share an engine: all but names, ids and training settings."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder).to_dict()
    except (OSError, ValueError) as error:
        reward.die(f"{folder}: no config.json could be read ({str(error).splitlines()[0]}); give a Hugging Face folder")
    free = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range")
    return {k: v for k, v in config.items() if k not in free and not k.endswith(("_token_id", "_dropout"))}


def weights_stamp(folder: str) -> float:
    """Time of the newest weight file: tells an evaluation of older weights in the same folder. 0 for a hub name."""
    if not Path(folder).is_dir():
        return 0.0
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]
    reward.check(files, f"{folder}: no weights (*.safetensors) in this folder")
    return max(file.stat().st_mtime for file in files)


def read_rows(path: Path) -> list[dict]:
    """Whole lines of a file of ours: a killed process may leave half a line at the end."""
    return [json.loads(line) for line in path.read_bytes().decode().splitlines(keepends=True) if line.endswith("\n")]


def parts_of(folder: Path, benchmark: str) -> list[Path]:
    return [Path(p) for p in sorted(glob.glob(f"{glob.escape(str(folder / benchmark))}.rank*.jsonl"))]


def finished(folder: Path, benchmark: str, problems: list[dict]) -> dict[str, dict]:
    """{id: row} of what earlier runs left; rows must be of the same problems."""
    rows = {}
    for path in [folder / f"{benchmark}.jsonl", *parts_of(folder, benchmark)]:
        for row in read_rows(path) if path.exists() else []:
            rows[row["id"]] = row
    asked = {problem["id"]: problem for problem in problems}
    for row in rows.values():
        same = asked.get(row["id"], {})
        if any(same.get(name) != row[name] for name in ("problem", "answer")):
            reward.die(f"{folder}: problem {row['id']!r} of {benchmark} has changed since; remove {folder} to redo it")
    return rows


def append_rows(path: Path, rows: list[dict]) -> None:
    """Appends lines that are on disk when this returns, after cutting off half a line that a kill may have left."""
    with open(path, "ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def finish_model(folder: Path, suites: dict[str, list[dict]], head: dict, metrics: Path) -> None:
    """Merges the ranks' parts in the order of the input and writes summary.json, over every benchmark done so far."""
    for benchmark, problems in suites.items():
        if parts := parts_of(folder, benchmark):
            rows = finished(folder, benchmark, problems)
            ordered = [json.dumps(rows[p["id"]], ensure_ascii=False) + "\n" for p in problems if p["id"] in rows]
            reward.write_text(folder / f"{benchmark}.jsonl", "".join(ordered))
            for part in parts:
                part.unlink()
    old = json.loads((folder / "summary.json").read_text())
    names = list(dict.fromkeys([*old["benchmarks"], *suites]))
    rows = {name: read_rows(folder / f"{name}.jsonl") for name in names}
    summary = head | {
        "intervals": f"95%, percentile bootstrap over problems (never samples), {RESAMPLES} resamples",
        "left_out": old.get("left_out", {}) | head["left_out"],
        "benchmarks": {name: summarize(rows[name]) for name in names},
        "average": intervals([[problem_scores(row) for row in rows[name]] for name in names]),
    }
    reward.write_text(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
    with open(metrics, "a", encoding="utf-8") as file:
        for name in suites:
            told = {"model": folder.name, "benchmark": name, **summary["benchmarks"][name]}
            file.write(json.dumps(told) + "\n")


def load_evaluations(folder: str) -> dict[str, dict[str, dict[str, dict]]]:
    """A finished evaluation (NAME's folder, or one of several NAMEs) -> {name: {benchmark: {id: scores}}}."""
    found = [Path(folder)] if (Path(folder) / "summary.json").exists() else [*sorted(Path(folder).glob("*/"))]
    found = [path for path in found if (path / "summary.json").exists()]
    reward.check(found, f"{folder}: no finished evaluation (no summary.json here or one level below)")
    result = {}
    for path in found:
        done = json.loads((path / "summary.json").read_text())["benchmarks"]
        reward.check(done, f"{path}: this evaluation has not finished; start it again with its flags")
        rows = {name: read_rows(path / f"{name}.jsonl") for name in done}
        result[os.path.abspath(path)] = {b: {row["id"]: problem_scores(row) for row in rows[b]} for b in rows}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def print_tables(evaluations: dict[str, dict[str, dict[str, dict]]]) -> None:
    """avg@n of every model on every benchmark, and every model against the first."""
    labels = {path: Path(path).name for path in evaluations}
    for path, label in labels.items():
        if list(labels.values()).count(label) > 1:
            labels[path] = f"{Path(path).parent.name}/{label}"
    benchmarks = list(dict.fromkeys(b for suites in evaluations.values() for b in suites))
    shared = [b for b in benchmarks if all(b in suites for suites in evaluations.values())]
    columns = [(b, [b]) for b in benchmarks] + [("average", shared)] * (len(shared) > 1)
    width = max(map(len, ["model", *labels.values()])) + 2
    cell_width = max(14, *(len(name) for name, _ in columns)) + 2

    def line(head: str, cells: list[str]) -> None:
        print(f"{head:<{width}}" + "".join(f"{cell:>{cell_width}}" for cell in cells))

    print("\navg@n in %, with half the 95% interval (bootstrap over problems)")
    line("model", [name for name, _ in columns])
    for path, suites in evaluations.items():
        cells = []
        for _, names in columns:
            score = intervals([list(suites[b].values()) for b in names])["avg@n"] if names[0] in suites else None
            half = (score["high"] - score["low"]) / 2 if score else 0
            cells.append(f"{100 * score['value']:.1f} ± {100 * half:.1f}" if score else "-")
        line(labels[path], cells)
    first, *others = evaluations
    if not others:
        return
    print(f"\ndifference to {labels[first]} in points, 95% interval (paired bootstrap over problems), p")
    for path in others:
        for name, names in columns:
            pairs = [
                [{i: s["avg@n"] for i, s in evaluations[p].get(b, {}).items()} for b in names] for p in (first, path)
            ]
            if d := paired(*pairs):
                value, low, high = (f"{100 * d[k]:+.1f}" for k in ("difference", "low", "high"))
                line(labels[path], [name, value, f"[{low}, {high}]", f"p = {d['p']:.4f}", f"{d['problems']} problems"])


# ---------------------------------------------------------------------------------------------------------------------


def main():
    config = reward.parse_config(Config)
    compared = {k: v for folder in config.compare for k, v in load_evaluations(folder).items()}
    if not config.models:
        return print_tables(compared)

    # --- 1. read and check everything before a model is loaded ---
    output = Path(config.output_dir)
    models = name_models(config.models)
    suites: dict[str, list[dict]] = {}
    for path in config.benchmarks:
        name = Path(path).stem
        reward.check(name not in suites, f"--benchmarks {path}: another file is called {name} too; rename one")
        suites[name] = reward.read_jsonl(path, {"id": str, "problem": str, "answer": str})[: config.limit or None]
        for row in suites[name]:
            kind = row.get("kind", "math")
            reward.check(kind == "math", f"{path}: id {row['id']!r} has kind {kind!r}; only 'math' can be graded")
    tokenizers = {name: reward.load_tokenizer(path) for name, path in models.items()}
    stamps = {name: weights_stamp(path) for name, path in models.items()}
    first, *others = models
    shapes = {name: architecture(path) | {"used tokens": reward.used_vocabulary(tokenizers[name])} for name, path in models.items()}
    for name in others:
        for key in sorted(shapes[first].keys() | shapes[name].keys()):
            a, b = shapes[first].get(key), shapes[name].get(key)
            reward.check(
                a == b, f"{models[name]}: {key} is {b}, but {a} in {models[first]}; evaluate it by a call of its own"
            )
    reward.save_config(config, output, resumable=("models", "benchmarks", "compare"))

    # --- 2. prompts, and what is already done ---
    rank, world, device = reward.init_distributed()
    prompts: dict[tuple[str, str, str], list[int]] = {}  # (model, benchmark, id) -> token ids
    left_out: dict[str, dict[str, list[str]]] = {name: {} for name in models}
    work: dict[str, list[tuple[str, dict]]] = {name: [] for name in models}  # (benchmark, row) not done yet
    for name in models:
        folder = output / name
        if (folder / "summary.json").exists():
            old = json.loads((folder / "summary.json").read_text())
            same = old["model"] == os.path.abspath(models[name]) and old["weights"] == stamps[name]
            reward.check(
                same, f"{folder} holds an evaluation of {old['model']} with other weights; remove it or rename"
            )
        for benchmark, rows in suites.items():
            done = finished(folder, benchmark, rows)
            for row in rows:
                ids = reward.prompt_ids(tokenizers[name], reward.solve_prompt(row["problem"]))
                if len(ids) + 1 > config.max_model_len:
                    left_out[name].setdefault(benchmark, []).append(row["id"])
                elif row["id"] not in done:
                    prompts[name, benchmark, row["id"]] = ids
                    work[name].append((benchmark, row))
            missing = left_out[name].get(benchmark, [])
            if missing and rank == 0:
                print(f"{name}, {benchmark}: {len(missing)} prompts exceed --max_model_len, left out: {missing}")
            reward.check(
                len(missing) < len(rows), f"{benchmark}: no prompt fits --max_model_len {config.max_model_len}"
            )
    dist.barrier()  # all have read what earlier runs left before anyone adds to it: all share out the same rows

    # --- 3. one engine for all models ---
    engine, loaded = None, ""
    for name, path in models.items():
        folder = output / name
        if rank == 0:
            folder.mkdir(exist_ok=True)
            head = {"model": os.path.abspath(path), "weights": stamps[name], "benchmarks": {}}
            if not (folder / "summary.json").exists():
                reward.write_text(folder / "summary.json", json.dumps(head))
        dist.barrier()
        if work[name] and engine is None:
            engine = reward.start_engine(path, config.max_model_len, device, shapes[name]["tokens"], config.gpu_memory)
        elif work[name] and loaded != name:
            engine.collective_rpc("reload_weights", kwargs=dict(weights_path=path))
            engine.reset_prefix_cache()
        loaded = name

        # --- 4. generate, grade, flush ---
        mine = work[name][rank::world]
        evaluate(engine, config, tokenizers[name], prompts, name, mine, folder, rank)
        dist.barrier()

        # --- 5. merge and summarize ---
        if rank == 0:
            finish_model(folder, suites, head | {"left_out": left_out[name]}, output / "metrics.jsonl")
    if engine is not None:
        reward.stop_engine(engine)
    if rank == 0:
        own = {k: v for name in models for k, v in load_evaluations(str(output / name)).items()}
        print_tables(own | compared)
    dist.barrier()
    dist.destroy_process_group()


def evaluate(engine, config: Config, tokenizer, prompts, name: str, work: list, folder: Path, rank: int) -> None:
    """Answers and grades this rank's (benchmark, row) pairs and flushes them to the benchmark's part of this rank."""
    requests = []  # (index into work, greedy, prompt, parameters)
    for i, (benchmark, row) in enumerate(work):
        ids = prompts[name, benchmark, row["id"]]
        room = min(config.max_tokens, config.max_model_len - len(ids))
        seed = reward.request_seed(config.seed, benchmark, row["id"])
        requests.append((i, False, ids, reward.sampling(tokenizer, config.n, config.temperature, room, seed)))
        if config.greedy:
            requests.append((i, True, ids, reward.sampling(tokenizer, 1, 0.0, room, seed)))
    parts: list[list[dict]] = [[] for _ in work]  # completions of each row so far
    waiting: list[int] = []  # rows that are complete and not graded yet
    clock = time.time()
    for count, (r, outputs) in enumerate(
        reward.generate(engine, [r[2] for r in requests], [r[3] for r in requests], desc=name) if requests else [], 1
    ):
        i, greedy = requests[r][:2]
        for output in outputs:
            text = reward.decode(tokenizer, output.token_ids)
            end = dict(tokens=len(output.token_ids), finish=output.finish_reason, greedy=greedy)
            parts[i].append(dict(text=text, predicted=reward.extract_answer(text), correct=False) | end)
        if len(parts[i]) == config.n + config.greedy:
            waiting.append(i)
        if len(waiting) >= FLUSH_ROWS or time.time() - clock > FLUSH_SECONDS or count == len(requests):
            clock = flush(work, parts, waiting, folder, rank, clock)
            waiting = []


def flush(work: list, parts: list, waiting: list[int], folder: Path, rank: int, clock: float) -> float:
    """Grades the waiting rows and appends them to their benchmarks' files; returns the time when it is done."""
    for i in waiting:
        parts[i].sort(key=lambda c: c["greedy"])  # the samples in order, then the greedy one
    flat = [(c, work[i][1]["answer"]) for i in waiting for c in parts[i]]
    for (completion, _), correct in zip(flat, reward.verify_all([c["text"] for c, _ in flat], [a for _, a in flat])):
        completion["correct"] = correct
    now = time.time()
    tokens = sum(c["tokens"] for c, _ in flat)
    rows: dict[str, list[dict]] = {}
    for i in waiting:
        benchmark, row = work[i]
        share = sum(c["tokens"] for c in parts[i]) / tokens  # of the time since the last flush
        told = {"id": row["id"], "benchmark": benchmark, "problem": row["problem"], "answer": row["answer"]}
        told |= {"completions": parts[i], "seconds": round((now - clock) * share, 4), "grading_timeouts": 0}
        rows.setdefault(benchmark, []).append(told)
    for benchmark, added in rows.items():
        append_rows(folder / f"{benchmark}.rank{rank}.jsonl", added)
    return now


if __name__ == "__main__":
    reward.run(main)
