"""Stage 1: GRPO, written by hand. Trains the mapper (task="map"), or the target itself (task="solve").

task="map"    the policy M reads problem and expert solution, p(x, y°), and writes a rewrite y. The reward asks whether
              y is right, honest, and natural for the frozen target π: see `reward.judge` and `reward.mapper_reward`.
              (DART, arXiv 2605.26924. Its exact reward is not public; this one is our reconstruction.)
task="solve"  the policy reads the plain question and is rewarded for a right answer: direct RL, the baseline. Where
              --hard_cheats are named, a right answer that cheats earns nothing.

One step is: sync the engine's weights, sample G rollouts for each of `groups` problems, reward them, one update.
For rollout i with tokens t, engine log-probabilities log π_vllm and N response tokens in all kept groups of all ranks:

    A_i  = R_i - mean(R over its group)                                      [ / std, optional ]
    r_t  = exp(log π_θ(y_t) - log π_old(y_t))
    L    = - 1/N Σ_{i,t} sg[min(exp(log π_old - log π_vllm), 2)] · min(r_t A_i, clip(r_t, 1-0.2, 1+0.28) A_i)
           + beta_kl/N Σ_{i,t} k3(π_ref, π_θ),      k3 = exp(log π_ref - log π_θ) - (log π_ref - log π_θ) - 1

With one pass over each step's rollouts (the default) π_old is π_θ itself: r = 1, the clip does nothing, and the
gradient is the plain policy gradient. Only the truncated importance weight acts: engine and trainer never agree to
the last bit.

Left out: asynchronous generation, tensor parallelism, LoRA, refilling of dropped groups, a value model.

    python mapper_rl.py --model BASE --data demos.jsonl --output_dir out/mapper                      # one GPU, or a CPU
    torchrun --nproc-per-node=8 mapper_rl.py --model BASE --data demos.jsonl --output_dir out/mapper          # one node
    torchrun --nnodes=2 --node-rank=$RANK --rdzv-backend=c10d --rdzv-endpoint=$HOST:29500 --nproc-per-node=8 \\
        mapper_rl.py --model BASE --data demos.jsonl --output_dir /shared/mapper            # two nodes, a shared disk

Writes OUTPUT_DIR/model (a Hugging Face folder), metrics.jsonl (a line a step), rollouts.jsonl (some to read),
config.json.
Started again with the same flags, it goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import common
import reward


@dataclass
class Config:
    # --- what ---
    task: str = "map"  # map: train a mapper for a frozen target; solve: train the policy on correctness
    model: str = ""  # folder of the model that is trained
    target: str = ""  # folder of the frozen target whose likelihood is rewarded (map); empty: the same as model
    data: str = ""  # demonstrations: JSONL with id, problem, solution, answer
    output_dir: str = ""  # where everything is written
    # --- rollouts ---
    steps: int = 200  # optimizer steps
    groups: int = 64  # problems a step, all ranks together
    group_size: int = 8  # rollouts a problem; more: a better baseline, fewer groups without variance
    temperature: float = 1.0  # of sampling; the trainer divides its logits by it as well
    max_tokens: int = 1024  # longest response; what does not end by itself earns nothing
    max_model_len: int = 3072  # longest prompt and response together, in tokens
    # --- reward ---
    align: str = "nll"  # nll: sigmoid of the gain in mean log-probability; kl: distance between mapper and target
    kl_beta: float = 0.5  # slope of the kl alignment
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
    micro_batch_tokens: int = 16384  # padded tokens a forward pass and rank; lower it when memory runs out
    head_chunk: int = 1024  # tokens whose logits exist at the same time
    gradient_checkpointing: bool = True  # recompute layers in the backward pass: a third slower, far less memory
    gpu_memory: float = 0.4  # share of the GPU that the engine may take
    # --- run ---
    max_seconds: float = 0.0  # stop after this time of steps by the clock, saving left out; 0: only after `steps`
    save_every: int = 20  # steps between checkpoints; 0: none
    export_every: int = 0  # steps between exported models (model-000020, ...), to draw a curve from; 0: none
    show: int = 4  # rollouts written to rollouts.jsonl a step
    seed: int = 0  # of the order of the data and of sampling

    def __post_init__(self):
        check = common.check
        check(self.task in ("map", "solve"), f"--task must be map or solve, got {self.task!r}")
        for name in ("model", "data", "output_dir"):
            check(getattr(self, name), f"--{name} is needed")
        check(self.align in ("nll", "kl"), f"--align must be nll or kl, got {self.align!r}")
        check(
            self.group_size >= 2,
            f"--group_size must be at least 2, got {self.group_size}",
        )
        self.hard_cheats = common.chosen_cheats(self.hard_cheats, default=self.task == "map")
        for name in ("steps", "groups", "max_tokens", "max_model_len", "passes", "micro_batch_tokens", "head_chunk"):
            check(getattr(self, name) >= 1, f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "lr", "max_grad_norm", "importance_cap"):
            check(getattr(self, name) > 0, f"--{name} must be above 0, got {getattr(self, name)}")
        for name in ("hard_weight", "soft_weight", "beta_kl", "warmup_steps", "weight_decay", "max_seconds"):
            check(getattr(self, name) >= 0, f"--{name} must not be negative, got {getattr(self, name)}")
        check(0 <= self.kl_beta <= 0.5, f"--kl_beta must be from 0 to 0.5 (1 - kl_beta * 2 >= 0), got {self.kl_beta}")
        for name in ("save_every", "export_every", "show", "seed", "clip_high"):
            check(getattr(self, name) >= 0, f"--{name} must not be negative, got {getattr(self, name)}")
        for name in ("min_fidelity", "clip_low"):
            check(0 <= getattr(self, name) <= 1, f"--{name} must be between 0 and 1, got {getattr(self, name)}")
        check(0 < self.gpu_memory < 1, f"--gpu_memory must be between 0 and 1, got {self.gpu_memory}")
        check(
            self.max_tokens < self.max_model_len,
            f"--max_tokens {self.max_tokens} leaves no room for a prompt in --max_model_len {self.max_model_len}",
        )
        self.target = self.target or self.model


def problems_of_step(count: int, step: int, groups: int, seed: int) -> list[int]:
    """Indices of one step's problems: a pure function of the step, so that a resumed run repeats and skips nothing."""
    places = range(step * groups, (step + 1) * groups)
    orders = {e: np.random.default_rng((seed, e)).permutation(count) for e in {p // count for p in places}}
    return [int(orders[p // count][p % count]) for p in places]


def advantages_of(rewards: list[float], divide_by_std: bool) -> list[float] | None:
    """A_i = R_i - mean(R), optionally / std. None for a group without variance: it teaches nothing and is dropped."""
    r = np.asarray(rewards, dtype=np.float64)
    if r.max() - r.min() < 1e-6:
        return None
    centred = r - r.mean()
    return list(centred / (r.std() + 1e-6) if divide_by_std else centred)


def grpo_loss(logprobs, old, engine, advantages, denominator: float, config: Config, ref=None):
    """The sum of the token losses over `denominator`, and what happened to the ratios. All tensors fp32, (N,) tokens.

    `advantages` holds each token's rollout's advantage; `ref` the starting model's log-probabilities, if beta_kl > 0.
    """
    # sg[min(exp(log π_old - log π_vllm), cap)]
    weight = (old - engine).clamp(-10, 10).exp().clamp(max=config.importance_cap)
    # min(r A, clip(r, 1 - low, 1 + high) A)
    ratio = (logprobs - old).clamp(-10, 10).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -(weight * torch.minimum(ratio * advantages, clipped * advantages)).sum() / denominator
    if ref is not None:
        # k3 = exp(log π_ref - log π_θ) - (log π_ref - log π_θ) - 1
        gap = (ref - logprobs).clamp(-10, 10)
        loss = loss + config.beta_kl * (gap.exp() - gap - 1).sum() / denominator
    stats = {
        "clip_fraction": (ratio * advantages > clipped * advantages).sum().item(),
        "importance_clip_fraction": ((old - engine).exp() > config.importance_cap).sum().item(),
        "logprob_diff": (old - engine).abs().sum().item(),
    }
    return loss, stats


def update(policy, reference, optimizer, rollouts: list[dict], config: Config, vocab: int, device) -> dict[str, float]:
    """One GRPO update (`passes` optimizer steps) on this rank's kept rollouts. Collective.

    A rollout is {prompt_ids, ids, logprobs (of the engine), advantage}. Ranks may hold different numbers of rollouts:
    every rank makes as many passes through the sharded model as the busiest, with dummy rows that weigh nothing.
    """
    rows = [(r["prompt_ids"], r["ids"]) for r in rollouts]
    head = dict(temperature=config.temperature, vocab=vocab, chunk=config.head_chunk)
    tokens = torch.tensor(float(sum(len(ids) for _, ids in rows)), dtype=torch.float64)
    dist.all_reduce(tokens)
    tokens = tokens.item()
    constant = config.groups * config.group_size * config.max_tokens
    denominator = constant if config.constant_denominator else tokens
    budget = config.micro_batch_tokens
    old = common.score(policy, rows, budget, device, **head) if config.passes > 1 else None
    ref = common.score(reference, rows, budget, device, **head) if config.beta_kl > 0 else None
    batches = common.same_on_all_ranks(common.micro_batches([len(p) + len(r) for p, r in rows], budget))
    names = ["clip_fraction", "importance_clip_fraction", "logprob_diff", "entropy", "loss"]
    sums, worst, norms = dict.fromkeys(names, 0.0), 0.0, []
    for _ in range(config.passes):
        for batch in batches:
            input_ids, mask = common.collate([rows[i] for i in batch], device)
            logprobs, entropy = policy.token_logprobs(input_ids, mask, **head)  # (N,), (N,)
            if batch:
                engine = torch.cat([torch.tensor(rollouts[i]["logprobs"]) for i in batch]).to(device)
                advantages = torch.cat([torch.full((len(rows[i][1]),), rollouts[i]["advantage"]) for i in batch])
                behind = torch.cat([old[i] for i in batch]).to(device) if old else logprobs.detach()
                start = torch.cat([ref[i] for i in batch]).to(device) if ref else None
                loss, stats = grpo_loss(logprobs, behind, engine, advantages.to(device), denominator, config, start)
                for name, value in {**stats, "entropy": entropy.sum().item(), "loss": loss.item()}.items():
                    sums[name] += value
                worst = max(worst, (behind - engine).abs().max().item())
            else:
                loss = logprobs.sum() * 0.0  # a dummy row has no response: the pass only keeps the ranks in step
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        norms.append(norm.full_tensor().item())  # the same on every rank
        common.check(math.isfinite(norms[-1]), "the gradient is not finite; lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    totals = torch.tensor([sums[name] for name in names], dtype=torch.float64)
    largest = torch.tensor(worst, dtype=torch.float64)
    dist.all_reduce(totals)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    result = {name: total / (tokens * config.passes) for name, total in zip(names, totals.tolist())}
    result["loss"] = totals[names.index("loss")].item() / config.passes
    return result | {"logprob_diff_max": largest.item(), "grad_norm": float(np.mean(norms)), "kept_tokens": tokens}


def sync_weights(policy, llm, dtype) -> None:
    """Policy -> engine. Collective. A failed sync leaves the engine unusable, so every error here ends the run."""
    expected = [name for name, _ in policy.named_parameters(remove_duplicate=True)]
    sent = []

    def weights():
        for name, weight in common.full_weights(policy, dtype):
            sent.append(name)
            yield name, weight

    common.reload_engine(llm, weights_iterator=weights())
    if set(sent) != set(expected):
        raise RuntimeError(f"weight sync: sent {len(sent)} of {len(expected)} weights to the engine")


def rollouts_of(llm, tokenizer, rows: list[dict], step: int, config: Config) -> list[dict]:
    """`group_size` rollouts for each row, in one batch; ids and log-probabilities stay the engine's."""
    # Seeded by (seed, step, row): the draw depends neither on the batch around it nor on the number of ranks.
    params = [
        common.sampling(
            tokenizer,
            n=config.group_size,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            seed=common.request_seed(config.seed, step, row["id"]),
            logprobs=True,
        )
        for row in rows
    ]
    finished = dict(common.generate(llm, [row["prompt_ids"] for row in rows], params))
    return [
        {
            "row": row,
            "prompt_ids": row["prompt_ids"],
            "ids": list(output.token_ids),
            "logprobs": list(output.logprobs.logprobs),
            "ended": output.finish_reason == "stop",
            "text": common.decode(tokenizer, output.token_ids),
        }
        for i, row in enumerate(rows)
        for output in finished[i]
    ]


def add_rewards(rollouts: list[dict], target, tau: float, config: Config, device) -> None:
    """Sets `reward` and `parts` (what is logged) of every rollout. Collective for task="map", which asks the target."""
    verdicts = reward.verify_all([r["text"] for r in rollouts], [r["row"]["answer"] for r in rollouts])
    if config.task == "solve":
        for r, correct in zip(rollouts, verdicts):
            row, r["parts"] = r["row"], {"correct": float(correct)}
            if config.hard_cheats:
                found = reward.cheats(row["problem"], row["solution"], r["text"], row["answer"])
                r["parts"] |= {name: found[name] for name in config.hard_cheats}
            honest = not any(r["parts"][name] for name in config.hard_cheats)
            r["reward"] = float(correct and r["ended"] and honest)
        return
    for r, correct in zip(rollouts, verdicts):
        row = r["row"]
        r["parts"] = reward.judge(
            row["problem"], row["solution"], r["text"], row["answer"], r["ended"], correct,
            config.min_fidelity, config.hard_cheats,
        )  # fmt: skip
        r["parts"]["correct"] = float(correct)
    # The target is asked only about what passed the gate: nothing else can earn an alignment.
    passed = [r for r in rollouts if r["parts"]["gate"]]
    rows = [(r["row"]["solve_ids"], r["ids"]) for r in passed]
    for r, logprobs in zip(passed, common.score(target, rows, config.micro_batch_tokens, device)):
        parts, expert = r["parts"], r["row"]["expert_align"]
        # the metrics A, A_expert and align are means over these, the other parts over all rollouts
        parts["A"], parts["A_expert"] = logprobs.mean().item(), expert
        if config.align == "nll":
            parts["align"] = reward.align_nll(parts["A"], expert, tau)
        else:
            parts["align"] = reward.align_kl(r["logprobs"], logprobs.tolist(), config.kl_beta)
    for r in rollouts:
        align = r["parts"].get("align", 0.0)
        r["reward"] = reward.mapper_reward(r["parts"], align, config.soft_weight, config.hard_weight)


def gather(items: list) -> list:
    """Every rank's items, on every rank, in the order of ranks."""
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def means(dicts: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each key over the dicts that have it."""
    keys = dict.fromkeys(key for d in dicts for key in d)
    return {key: float(np.mean([d[key] for d in dicts if key in d])) for key in keys}


def prepare(rows: list[dict], tokenizer, config: Config, rank: int) -> list[dict]:
    """Adds the token ids of both prompts; leaves out, by name, problems that do not fit the context."""
    limit = config.max_model_len - config.max_tokens
    for row in rows:
        row["solve_ids"] = common.prompt_ids(tokenizer, reward.solve_prompt(row["problem"]))
        if config.task == "map":
            row["prompt_ids"] = common.prompt_ids(tokenizer, reward.map_prompt(row["problem"], row["solution"]))
        else:
            row["prompt_ids"] = row["solve_ids"]
    long = [row["id"] for row in rows if len(row["prompt_ids"]) > limit]
    if long and rank == 0:
        print(f"left out {len(long)} problems whose prompt is longer than {limit} tokens: {', '.join(long[:10])}")
    rows = [row for row in rows if len(row["prompt_ids"]) <= limit]
    common.check(rows, f"{config.data}: no prompt fits --max_model_len {config.max_model_len} less --max_tokens")
    return rows


def main():
    config = common.parse_config(Config)
    fields = {"id": str, "problem": str, "answer": str}
    if config.task == "map" or config.hard_cheats:  # cheats are told by comparison with the expert's text
        fields["solution"] = str
    rows = common.read_jsonl(config.data, fields)
    tokenizer = common.load_tokenizer(config.model)
    if config.task == "map":
        common.same_tokenizer(tokenizer, config.model, common.load_tokenizer(config.target), config.target)
    inputs = {folder: common.weights_stamp(folder, config.max_model_len) for folder in (config.model, config.target)}
    inputs[config.data] = common.data_stamp(config.data)
    rank, world, device = common.init_distributed()
    common.check(config.groups % world == 0, f"--groups {config.groups} must be a multiple of the {world} processes")
    out = Path(config.output_dir)
    machine = ("output_dir", "micro_batch_tokens", "head_chunk", "gradient_checkpointing", "gpu_memory", "save_every")
    common.save_config(config, out, machine, inputs)
    if (out / "model").exists():
        return print(f"{out}: finished already") if rank == 0 else None
    rows = prepare(rows, tokenizer, config, rank)

    vocab = common.used_vocabulary(tokenizer)
    llm = common.start_engine(config.model, config.max_model_len, device, vocab, config.gpu_memory, sleep=True)
    policy = common.load_model(config.model, device, train=True, gradient_checkpointing=config.gradient_checkpointing)
    target = common.load_model(config.target, device, train=False) if config.task == "map" else None
    reference = common.load_model(config.model, device, train=False) if config.beta_kl > 0 else None
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    first = common.load_checkpoint(out, policy, optimizer)
    done = common.resume_metrics(out, first)

    tau = 0.0
    if config.task == "map":
        # A(y°|x) of every demonstration, once; its spread is the unit in which a rewrite's gain is measured.
        share = [(row["solve_ids"], common.response_ids(tokenizer, row["solution"])) for row in rows[rank::world]]
        scores = common.score(target, share, config.micro_batch_tokens, device, desc="score expert texts")
        known = dict(gather([(row["id"], s.mean().item()) for row, s in zip(rows[rank::world], scores)]))
        for row in rows:
            row["expert_align"] = known[row["id"]]
        tau = max(float(np.std(list(known.values()))), 0.5)

    elapsed, generated = (done[-1]["elapsed"], done[-1]["generated_tokens"]) if done else (0.0, 0)
    from tqdm import trange

    bar = trange(first, config.steps, initial=first, total=config.steps, desc=config.task, disable=rank > 0)
    for step in bar:
        if config.max_seconds and elapsed >= config.max_seconds:
            break
        torch.manual_seed(config.seed + step)  # dropout, in models that have it
        clock = [time.perf_counter()]

        # --- 1. sync: the engine gets the policy's weights (also at the start, and after a resume) ---
        if device.type == "cuda" and step > first:
            llm.wake_up(tags=["weights"])
        sync_weights(policy, llm, common.compute_dtype(device))
        if device.type == "cuda" and step > first:
            llm.wake_up(tags=["kv_cache"])
        clock.append(time.perf_counter())

        # --- 2. rollout ---
        mine = [rows[i] for i in problems_of_step(len(rows), step, config.groups, config.seed)][rank::world]
        rollouts = rollouts_of(llm, tokenizer, mine, step, config)
        if device.type == "cuda":
            llm.sleep(level=2)
        clock.append(time.perf_counter())

        # --- 3. reward ---
        add_rewards(rollouts, target, tau, config, device)
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
        summaries = gather(
            [
                {"reward": r["reward"], **r["parts"], "tokens": len(r["ids"]), "truncated": 1.0 - r["ended"]}
                for r in rollouts
            ]
        )
        total_kept = sum(gather([len(kept)]))
        stats = update(policy, reference, optimizer, kept, config, vocab, device) if total_kept else {}
        clock.append(time.perf_counter())

        # --- 5. log and save ---
        phases = dict(zip(("sync", "rollout", "reward", "update"), np.diff(clock)))
        tokens = int(sum(s["tokens"] for s in summaries))
        elapsed = max(gather([elapsed + clock[-1] - clock[0]]))  # the same on every rank: it decides when to stop
        generated += tokens
        line = {
            "step": step + 1,
            **means(summaries),
            "dropped_groups": config.groups - total_kept // config.group_size,
            **stats,
            "lr": optimizer.param_groups[0]["lr"],
            **{f"seconds_{name}": float(seconds) for name, seconds in phases.items()},
            "tokens_per_second": tokens / (clock[-1] - clock[0]),
            "elapsed": elapsed,
            "generated_tokens": generated,
            "grading_timeouts": sum(gather([reward.FAILURES["timeouts"]])),  # since the start of the processes
            "grading_errors": sum(gather([reward.FAILURES["errors"]])),
            "peak_memory": max(gather([common.peak_memory(device)])),
        }
        if rank == 0:
            with open(out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            with open(out / "rollouts.jsonl", "a") as f:
                for r in rollouts[:: max(len(rollouts) // max(config.show, 1), 1)][: config.show]:
                    shown = {"step": step + 1, "id": r["row"]["id"], "reward": r["reward"], "text": r["text"]}
                    f.write(json.dumps(shown | {"parts": r["parts"]}) + "\n")
            bar.set_postfix(
                {k: f"{line[k]:.2f}" for k in ("reward", "clean", "correct", "A", "logprob_diff") if k in line}
            )
            if stats and stats["logprob_diff"] > 0.05:
                print(
                    f"warning: step {step + 1}: engine and trainer disagree by {stats['logprob_diff']:.3f} nats a "
                    "token (above 0.05): check dtype, chat template and weight sync before trusting this run"
                )
            if not stats:
                print(f"step {step + 1}: no group had any variance in its rewards; no update was made")
        if config.export_every and (step + 1) % config.export_every == 0:
            common.save_model(policy, tokenizer, out / f"model-{step + 1:06d}", common.source_dtype(config.model))
        if config.save_every and (step + 1) % config.save_every == 0:
            common.save_checkpoint(out, step + 1, policy, optimizer)

    # --- the end: a plain Hugging Face folder ---
    common.stop_engine(llm)
    if rank == 0 and config.task == "map":
        common.write_text(out / "mapper.json", json.dumps({"align": config.align, "tau": tau}))
    common.save_model(policy, tokenizer, out / "model", common.source_dtype(config.model))
    common.remove_checkpoints(out)
    if rank == 0:
        print(f"wrote {out / 'model'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    common.run(main)
