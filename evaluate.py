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

import json
import os
import time
import typing
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch.distributed as dist

import common
import reward

RESAMPLES = 2000  # bootstrap resamples; the smallest p that can be seen is 2 / RESAMPLES
FLUSH_ROWS, FLUSH_SECONDS = 64, 5.0  # finished rows are graded and flushed when there are so many, or after so long


@dataclass
class Config:
    models: list[str] = field(default_factory=list)  # folders; NAME=FOLDER names one, else its last path part does
    benchmarks: list[str] = field(default_factory=list)  # JSONL files {id, problem, answer}; named by their file stem
    output_dir: str = ""  # where NAME/BENCHMARK.jsonl and NAME/summary.json go; started again, only the rest is done
    samples: int = 4  # n, answers sampled per problem; more narrow the intervals, but not below what the problems allow
    temperature: float = 1.0  # of the n samples; 1 is the distribution that was trained, lower ones sharpen it
    greedy: bool = True  # one greedy answer per problem besides
    max_tokens: int = 4096  # tokens of an answer, clipped to what the context leaves; too few show as truncation
    max_model_len: int = 6144  # tokens of prompt + answer; problems whose prompt does not fit are named and left out
    limit: int = 0  # only the first rows of each benchmark (0: all)
    seed: int = 0  # every request is seeded from (seed, benchmark, id): the number of ranks does not matter
    gpu_memory: float = 0.9  # share of the GPU that vLLM may take (unused on a CPU)
    compare: list[str] = field(default_factory=list)  # finished evaluations (output_dir or output_dir/NAME) to compare

    def __post_init__(self):
        common.check(self.models or self.compare, "give --models to evaluate, or --compare with finished folders")
        if self.models:
            common.check(self.benchmarks, "--benchmarks must name at least one JSONL file")
            common.check(self.output_dir, "--output_dir must be given")
        common.check(self.samples >= 1, f"--samples must be 1 or more, got {self.samples}")
        common.check(self.temperature > 0, f"--temperature must be above 0 (see --greedy), got {self.temperature}")
        common.check(self.max_tokens >= 1, f"--max_tokens must be 1 or more, got {self.max_tokens}")
        common.check(self.max_model_len >= 2, f"--max_model_len must be 2 or more, got {self.max_model_len}")
        common.check(self.limit >= 0, f"--limit must be 0 (all) or more, got {self.limit}")
        common.check(0 < self.gpu_memory <= 1, f"--gpu_memory must be in (0, 1], got {self.gpu_memory}")


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
        "p": float(np.clip(tail, 2 / RESAMPLES, 1.0)),
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
        common.check(name not in named, f"--models {model}: '{name}' is taken by {named.get(name)}; write NAME={path}")
        named[name] = path
    return named


def architecture(folder: str) -> dict:
    """The config fields that must agree for two models to share an engine: all but names, ids and training settings."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder).to_dict()
    except (OSError, ValueError) as error:
        common.die(f"{folder}: no config.json could be read ({str(error).splitlines()[0]}); give a Hugging Face folder")
    free = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range")
    return {k: v for k, v in config.items() if k not in free and not k.endswith(("_token_id", "_dropout"))}


def finish_model(folder: Path, suites: dict[str, list[dict]], head: dict, metrics: Path) -> None:
    """Merges the ranks' parts in the order of the input and writes summary.json, over every benchmark done so far."""
    path = folder / "summary.json"
    old = json.loads(path.read_text()) if path.exists() else {"benchmarks": {}, "left_out": {}}
    for benchmark, problems in suites.items():
        common.merge_parts(folder, benchmark, [problem["id"] for problem in problems])
    names = list(dict.fromkeys([*old["benchmarks"], *suites]))
    rows = {name: list(common.read_parts(folder, name).values()) for name in names}
    summary = head | {
        "intervals": f"95%, percentile bootstrap over problems (never samples), {RESAMPLES} resamples",
        "left_out": old["left_out"] | head["left_out"],
        "benchmarks": {name: summarize(rows[name]) for name in names},
        "average": intervals([[problem_scores(row) for row in rows[name]] for name in names]),
    }
    common.write_text(path, json.dumps(summary, indent=1, ensure_ascii=False))
    with open(metrics, "a", encoding="utf-8") as file:
        for name in suites:
            file.write(common.json_line({"model": folder.name, "benchmark": name, **summary["benchmarks"][name]}))


def same_problem(asked: dict[tuple, tuple], benchmark: str, row: dict, path: str) -> None:
    """Ends the program if (benchmark, id) was another problem in what was read before: they must not be paired."""
    known = asked.setdefault((benchmark, row["id"]), (row["problem"], row["answer"]))
    told = f"{path}: {row['id']!r} is another problem than in the {benchmark} that it is compared with; rename one file"
    common.check(known == (row["problem"], row["answer"]), told)


def load_evaluations(folder: str, asked: dict[tuple, tuple]) -> dict[str, dict[str, dict[str, dict]]]:
    """A finished evaluation (NAME's folder, or one of several NAMEs) -> {name: {benchmark: {id: scores}}}.

    `asked` remembers what every (benchmark, id) was.
    """
    found = [Path(folder)] if (Path(folder) / "summary.json").exists() else [*sorted(Path(folder).glob("*/"))]
    found = [path for path in found if (path / "summary.json").exists()]
    common.check(found, f"{folder}: no finished evaluation (no summary.json here or one level below)")
    result = {}
    for path in found:
        benchmarks = json.loads((path / "summary.json").read_text())["benchmarks"]
        rows = {name: common.read_parts(path, name) for name in benchmarks}
        for benchmark in rows:
            for row in rows[benchmark].values():
                same_problem(asked, benchmark, row, f"{path / benchmark}.jsonl")
        result[os.path.abspath(path)] = {b: {i: problem_scores(row) for i, row in rows[b].items()} for b in rows}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def print_tables(evaluations: dict[str, dict[str, dict[str, dict]]]) -> None:
    """avg@n of every model on every benchmark, and every model against the first."""
    names, above = Counter(Path(path).name for path in evaluations), os.path.commonpath(evaluations)
    labels = {p: Path(p).name if names[Path(p).name] == 1 else os.path.relpath(p, above) for p in evaluations}
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
    flags = {path: Path(path).parent / "config.json" for path in evaluations}  # not beside a copy of a NAME's folder
    told = {path: json.loads(file.read_text())["config"] for path, file in flags.items() if file.exists()}
    for path in others:
        for name in ("samples", "temperature", "max_tokens", "max_model_len"):
            a, b = (told.get(p, {}).get(name) for p in (first, path))
            if a != b:
                print(f"note: --{name} was {b} for {labels[path]}, {a} for {labels[first]}")
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
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def read_benchmarks(config: Config) -> dict[str, list[dict]]:
    """{benchmark: rows}, checked."""
    suites: dict[str, list[dict]] = {}
    for path in config.benchmarks:
        name = Path(path).stem
        common.check(name not in suites, f"--benchmarks {path}: another file is called {name} too; rename one")
        rows = common.read_jsonl(path, dict.fromkeys(("id", "problem", "answer"), str))
        suites[name] = rows[: config.limit or None]
        for row in suites[name]:
            kind = row.get("kind", "math")
            common.check(kind == "math", f"{path}: id {row['id']!r} has kind {kind!r}; only 'math' can be graded")
    return suites


def answer_all(engine, config: Config, tokenizer, jobs: list, desc: str) -> typing.Iterator[tuple[int, list[dict]]]:
    """Yields (index of the job, its n + 1 completions, not graded yet) as each (benchmark, row, prompt) finishes."""
    requests = []  # (job, greedy, prompt, parameters)
    for j, (benchmark, row, ids) in enumerate(jobs):
        room = min(config.max_tokens, config.max_model_len - len(ids))
        seed = common.request_seed(config.seed, benchmark, row["id"])
        requests.append((j, False, ids, common.sampling(tokenizer, config.samples, config.temperature, room, seed)))
        if config.greedy:
            requests.append((j, True, ids, common.sampling(tokenizer, 1, 0.0, room, seed)))
    completions: list[list[dict]] = [[] for _ in jobs]
    for r, outputs in common.generate(engine, [r[2] for r in requests], [r[3] for r in requests], desc):
        j, greedy = requests[r][:2]
        for output in outputs:
            text = common.decode(tokenizer, output.token_ids)
            told = {"text": text, "predicted": reward.extract_answer(text), "correct": False}
            told |= {"tokens": len(output.token_ids), "finish": output.finish_reason, "greedy": greedy}
            completions[j].append(told)
        if len(completions[j]) == config.samples + config.greedy:
            yield j, sorted(completions[j], key=lambda c: c["greedy"])  # the samples in their order, then the greedy


def evaluate(engine, config: Config, tokenizer, jobs: list, folder: Path) -> None:
    """Answers and grades this rank's jobs; appends them to the parts of their benchmarks, some rows at a time.

    The engine waits while answers are graded, so few large batches are graded rather than each row by itself.
    """
    waiting: list[tuple[int, list[dict]]] = []
    clock, left = time.time(), len(jobs)
    parts = {benchmark: common.open_part(folder, benchmark) for benchmark in dict.fromkeys(b for b, _, _ in jobs)}
    for finished in answer_all(engine, config, tokenizer, jobs, folder.name):
        waiting.append(finished)
        left -= 1
        if left and len(waiting) < FLUSH_ROWS and time.time() - clock < FLUSH_SECONDS:
            continue
        flat = [(c, jobs[j][1]["answer"]) for j, completions in waiting for c in completions]
        timeouts = reward.FAILURES["timeouts"]
        for (c, _), correct in zip(flat, reward.verify_all([c["text"] for c, _ in flat], [a for _, a in flat])):
            c["correct"] = correct
        timeouts = reward.FAILURES["timeouts"] - timeouts
        clock, seconds = time.time(), time.time() - clock
        for j, completions in waiting:
            benchmark, row, _ = jobs[j]
            told = {"id": row["id"], "benchmark": benchmark, "problem": row["problem"], "answer": row["answer"]}
            share = sum(c["tokens"] for c in completions) / sum(c["tokens"] for c, _ in flat)
            told |= {"completions": completions, "weights": row["weights"], "seconds": round(seconds * share, 4)}
            parts[benchmark].write(common.json_line(told | {"grading_timeouts": timeouts}))
            timeouts = 0  # of the whole batch: told once
        waiting = []


def main():
    config = common.parse_config(Config)
    asked: dict[tuple, tuple] = {}
    compared = {k: v for folder in config.compare for k, v in load_evaluations(folder, asked).items()}
    if not config.models:
        return print_tables(compared)

    # --- 1. read and check everything before a model is loaded ---
    output = Path(config.output_dir)
    models = name_models(config.models)
    suites = read_benchmarks(config)
    for path, benchmark in zip(config.benchmarks, suites):
        for row in suites[benchmark]:
            same_problem(asked, benchmark, row, path)
    tokenizers = {name: common.load_tokenizer(path) for name, path in models.items()}
    stamps = {name: common.weights_stamp(path, config.max_model_len) for name, path in models.items()}
    vocab = {name: common.used_vocabulary(tokenizer) for name, tokenizer in tokenizers.items()}
    shapes = {name: architecture(path) | {"used vocabulary": vocab[name]} for name, path in models.items()}
    first, *others = models
    for name in others:
        for key in sorted(shapes[first].keys() | shapes[name].keys()):
            a, b = shapes[first].get(key), shapes[name].get(key)
            told = f"{models[name]}: {key} is {b}, but {a} in {models[first]}"
            common.check(a == b, f"{told}; models of one call share an engine, give this one a call of its own")
    common.save_config(config, output, resumable=("models", "benchmarks", "compare", "output_dir", "gpu_memory"))

    # --- 2. prompts, and what is already done ---
    left_out: dict[str, dict[str, list[str]]] = {name: {} for name in models}
    work: dict[str, list[tuple[str, dict, list[int]]]] = {name: [] for name in models}  # (benchmark, row, prompt)
    for name, path in models.items():
        told = output / name / "summary.json"  # over all benchmarks so far, also those that are not asked for now
        same = not told.exists() or json.loads(told.read_text()).get("weights") == stamps[name]
        common.check(
            same, f"{told.parent} has results of other weights than {path}'s; remove it or choose another name"
        )
        for benchmark, rows in suites.items():
            rows = [{k: row[k] for k in ("id", "problem", "answer")} | {"weights": stamps[name]} for row in rows]
            done = common.read_parts(output / name, benchmark, rows)
            prompts = [common.prompt_ids(tokenizers[name], reward.solve_prompt(row["problem"])) for row in rows]
            fits = [len(ids) + 1 <= config.max_model_len for ids in prompts]
            work[name] += [(benchmark, r, p) for r, p, fit in zip(rows, prompts, fits) if fit and r["id"] not in done]
            if not all(fits):
                missing = left_out[name][benchmark] = [row["id"] for row, fit in zip(rows, fits) if not fit]
                told = f"{name}, {benchmark}: {len(missing)} prompts exceed --max_model_len {config.max_model_len}"
                common.check(any(fits), told)
                if os.environ.get("RANK", "0") == "0":
                    print(f"{told}, left out: {' '.join(missing)}", flush=True)
    rank, world, device = common.init_distributed()
    dist.barrier()  # all have read what earlier runs left before anyone adds to it: all share out the same rows

    engine = None
    for name, path in models.items():
        folder = output / name
        folder.mkdir(exist_ok=True)
        if work[name]:
            # --- 3. the first model starts the engine, the others take their place in it ---
            if engine is None:
                engine = common.start_engine(path, config.max_model_len, device, vocab[name], config.gpu_memory)
            else:
                common.reload_engine(engine, weights_path=path)

            # --- 4. generate, grade, flush ---
            evaluate(engine, config, tokenizers[name], work[name][rank::world], folder)
            dist.barrier()

        # --- 5. merge and summarize ---
        if rank == 0:
            head = {"model": os.path.abspath(path), "weights": stamps[name], "left_out": left_out[name]}
            finish_model(folder, suites, head, output / "metrics.jsonl")
    if engine is not None:
        common.stop_engine(engine)
    if rank == 0:
        own = {k: v for name in models for k, v in load_evaluations(str(output / name), asked).items()}
        print_tables(own | compared)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    common.run(main)
