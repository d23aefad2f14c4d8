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
    KL     from the model as it was at the start, ref, over the whole vocabulary (ASFT's anchor)
    N      the *global* number of response tokens of the optimizer step, all ranks and all micro-batches: a mean of
           means would let the result depend on how many processes and micro-batches there are

    --loss   a   rho          lambda   source
    sft      0   off          0        cross entropy
    dft      1   off          0        DFT, arXiv 2508.05629; Mind the Gap's DR+DFT, arXiv 2509.15157
    asft     1   off          0.05     ASFT, arXiv 2509.23753
    rasft    1   [0.4, 1.2]   0        RASFT, arXiv 2606.07006, with the weights of `rewrite.py --method rasft`

DART is `--loss sft` on rewrite.py's mapper rewrites, Mind the Gap `--method resolve` and either loss,
rejection-sampling fine-tuning `--method self`, plain SFT the demonstrations themselves. Left out: packing (rows are
grouped by length, so little is padding), LoRA, evaluation during training (evaluate.py does that), tensor and pipeline
parallelism.

A killed run goes on from its last checkpoint when the same command is given again. `--start_from` carries model,
optimizer and step of another run on with other data, along one schedule of `--schedule_steps`.

One GPU or CPU:  python sft.py --model Qwen/Qwen3-0.6B --data train.jsonl --output_dir out/sft
One node:        torchrun --nproc-per-node 8 sft.py --model ... --data ... --output_dir ...
Several nodes:   torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 sft.py ...
                 (on every node, with --output_dir in a folder that all of them see)
"""

import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
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
    model: str  # the target: a Hugging Face folder or hub name
    data: str  # JSONL with id, problem, solution, optionally weight: a training set of rewrite.py, or demonstrations
    output_dir: str  # run folder: config.json, metrics.jsonl, checkpoint-*, and at the end model/
    start_from: str = ""  # run folder whose last checkpoint (model, optimizer, step) is carried on; leave it as it is
    max_length: int = 4096  # tokens of prompt and response; longer rows are named and dropped, never truncated
    # The loss
    loss: str = "sft"  # preset of the four fields below, which can also be moved one by one: sft, dft, asft, rasft
    power: float | None = None  # a of p_t^a: 0 imitates all tokens alike; 1 is gentle with foreign ones
    rho_low: float | None = None  # lower clip of RASFT's ratio; 1 in both: no ratio, no need for `align`
    rho_high: float | None = None  # upper clip
    anchor: float | None = None  # lambda; more: stays nearer to the start. Above 0 a frozen copy is kept
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
    save_every: int = 0  # steps between checkpoints; 0 = none during the run
    log_every: int = 1  # steps between rows of metrics.jsonl

    def __post_init__(self):
        check = common.check
        check(self.loss in PRESETS, f"--loss must be one of {', '.join(PRESETS)}, got {self.loss}")
        for name, value in PRESETS[self.loss].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check(0 <= self.power < math.inf, f"--power must be 0 or more, got {self.power}")
        check(0 <= self.anchor < math.inf, f"--anchor must be 0 or more, got {self.anchor}")
        low, high = self.rho_low, self.rho_high
        clips = 0 <= low < high < math.inf or low == high == 1
        check(clips, f"--rho_low and --rho_high must be 0 <= low < high, or both 1 (off), got {low} and {high}")
        check(0 < self.lr < 1, f"--lr must be between 0 and 1, got {self.lr}")
        check(0 < self.epochs < math.inf, f"--epochs must be above 0, got {self.epochs}")
        check(0 <= self.warmup <= 1, f"--warmup must be a share from 0 to 1, got {self.warmup}")
        check(0 <= self.min_lr_ratio <= 1, f"--min_lr_ratio must be a share from 0 to 1, got {self.min_lr_ratio}")
        check(0 <= self.weight_decay < math.inf, f"--weight_decay must be 0 or more, got {self.weight_decay}")
        check(self.max_grad_norm > 0, f"--max_grad_norm must be above 0, got {self.max_grad_norm}")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"--{name} must be from 0 to below 1, got {getattr(self, name)}")
        for name in ("batch_size", "max_length", "micro_batch_tokens", "head_chunk", "log_every"):
            check(getattr(self, name) >= 1, f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "schedule_steps", "save_every", "seed"):
            check(getattr(self, name) >= 0, f"--{name} must be 0 or more, got {getattr(self, name)}")


def token_loss(logprobs, weights, power: float):
    """- w * sg[p^a] * log p for every token; logprobs and weights are (N,)."""
    return -weights * (power * logprobs.detach()).exp() * logprobs


def ratios(logprobs, lengths: list[int], references: list[float], low: float, high: float):
    """rho_i = clip(exp(mean_t log p_ref - mean_t log p), low, high) of every row, at each of its tokens; (N,) -> (N,).

    A row has lengths[i] of the N tokens, and mean_t log p_ref = references[i]. No gradient. RASFT, arXiv 2606.07006.
    """
    means = logprobs.detach().split(lengths)
    return torch.cat([(ref - m.mean()).exp().clamp(low, high).expand(len(m)) for ref, m in zip(references, means)])


def learning_rate(config: Config, step: int, total: int) -> float:
    """Linear warm-up, then a cosine from lr down to lr * min_lr_ratio; `step` counts from 0."""
    warm = round(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> list[int]:
    """The order of an epoch, a pure function of its arguments: a resumed run finds its place without stored state."""
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def batch_rows(index: int, size: int, count: int, seed: int) -> list[int]:
    """Row numbers of batch `index` in the endless sequence of epochs, each a fresh order of `count` rows."""
    return [order(seed, place // count, count)[place % count] for place in range(index * size, (index + 1) * size)]


def deal(lengths: list[int], budget: int, world: int) -> list[list[list[int]]]:
    """Splits a batch into micro-batches of at most `budget` padded tokens: one list of equal length for each rank.

    Formed globally and dealt out in order of length, so that ranks which wait for each other in every pass have like
    work. The fewest passes are made, each as even as can be: 2 ranks share what would fit into a single micro-batch.
    """
    count = -(-len(common.micro_batches(lengths, budget)) // world) * world
    low, high = 1, budget
    while low < high:  # the smallest budget that needs no more micro-batches than these
        middle = (low + high) // 2
        if len(common.micro_batches(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    batches = common.micro_batches(lengths, high)
    batches += [[]] * (-len(batches) % world)
    return [batches[rank::world] for rank in range(world)]


def read_rows(config: Config) -> list[dict]:
    """Rows of the training set. A problem may stand several times, by source and sample."""
    fields, hint = {"id": str, "problem": str, "solution": str}, ""
    if config.rho_low < config.rho_high:
        fields["align"] = float
        hint = "; rho needs a training set of rewrite.py's"
    if config.loss == "rasft":
        fields["weight"] = float
        hint = "; --loss rasft needs a training set of `rewrite.py --method rasft`"
    return common.read_jsonl(config.data, fields, ("id", "source", "sample"), {"weight": float, "align": float}, hint)


def other_policy(config: Config) -> str:
    """Which other models RASFT's set was made with, as rewrite.py's config.json beside it tells; "" if none."""
    path = Path(config.data).parent / "config.json"
    made = json.loads(path.read_text()).get("config", {}) if path.exists() else {}
    if config.loss != "rasft" or "mapper" not in made:
        return ""
    policy = f"{config.start_from}/model" if config.start_from else config.model
    if Path(made["mapper"]).resolve() != Path(policy).resolve():
        return f"its rollouts are {made['mapper']}'s, but the policy that is trained on is {policy}"
    if Path(made["target"]).resolve() != Path(config.model).resolve():
        return f"rho compares with {made['target']}, but --model is {config.model}"
    return ""


def tokenize(tokenizer, rows: list[dict], limit: int) -> tuple[list, list[dict], list[str]]:
    """(prompt ids, response ids) of the rows that fit, these rows, and the ids of those that do not."""
    pairs, kept, dropped = [], [], []
    for row in rows:
        prompt = common.prompt_ids(tokenizer, reward.solve_prompt(row["problem"]))
        response = common.response_ids(tokenizer, row["solution"])
        if len(prompt) + len(response) > limit:
            dropped.append(row["id"])
        else:
            pairs.append((prompt, response))
            kept.append(row)
    return pairs, kept, dropped


def main():
    config = common.parse_config(Config)
    folder = Path(config.output_dir)

    # --- 1. data, checked before any model is loaded ---
    from transformers import AutoConfig

    rows = read_rows(config)
    first = 0  # the step this run starts from: its predecessor's last
    if config.start_from:
        carried = common.last_checkpoint(Path(config.start_from))
        whole = (Path(config.start_from) / "model").exists() or not carried
        common.check(whole, f"--start_from {config.start_from}: that run is not finished; start it again first")
        told = "no checkpoint there: name the run's folder, not its model/; and that run needs --schedule_steps"
        common.check(carried, f"--start_from {config.start_from}: {told}")
        first = int(carried.name.removeprefix("checkpoint-"))
    tokenizer = common.load_tokenizer(config.model)
    source = AutoConfig.from_pretrained(config.model)
    limit = min(config.max_length, source.max_position_embeddings)
    pairs, kept, dropped = tokenize(tokenizer, rows, limit)
    weights = [float(row.get("weight", 1.0)) for row in kept]
    references = [float(row.get("align", 0.0)) for row in kept]  # mean_t log p_ref, read only if rho is on
    common.check(pairs, f"{config.data}: no row fits into {limit} tokens; raise --max_length")
    steps = config.steps or math.ceil(config.epochs * len(pairs) / config.batch_size)
    end = first + steps
    total = config.schedule_steps or end
    common.check(end <= total, f"--schedule_steps must be at least {end} (steps {first} to {end}), got {total}")
    inputs = {config.data: common.data_stamp(config.data), config.model: common.weights_stamp(config.model, limit)}
    machine = ("output_dir", "micro_batch_tokens", "head_chunk", "gradient_checkpointing", "save_every")
    common.save_config(config, folder, machine, inputs)
    if (folder / "model").exists():
        return print(f"{folder / 'model'} is there: this run is finished")

    # --- 2. model and optimizer ---
    rank, world, device = common.init_distributed()
    if rank == 0 and (told := other_policy(config)):
        print(f"warning: {config.data}: {told}", flush=True)
    if rank == 0 and dropped:
        named = ", ".join(dropped[:10]) + (", ..." if len(dropped) > 10 else "")
        print(f"{len(dropped)} of {len(rows)} rows are longer than {limit} tokens and are dropped: {named}", flush=True)
    model = common.load_model(config.model, device, train=True, gradient_checkpointing=config.gradient_checkpointing)
    reference = common.load_model(config.model, device, train=False) if config.anchor > 0 else None
    parameters = list(model.parameters())
    betas = (config.beta1, config.beta2)
    groups = [
        dict(params=[p for p in parameters if p.ndim > 1], weight_decay=config.weight_decay, betas=betas),
        dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0, betas=betas),
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr)
    step = common.load_checkpoint(folder, model, optimizer)
    if not step and config.start_from:
        step = common.load_checkpoint(Path(config.start_from), model, optimizer)
        for loaded, group in zip(optimizer.param_groups, groups):
            loaded.update(weight_decay=group["weight_decay"], betas=betas)  # the flags of this run, not of the other

    metrics = folder / "metrics.jsonl"
    common.resume_metrics(folder, step)  # what a killed run wrote beyond its last checkpoint is done again

    bar = tqdm(total=end, initial=step, desc=config.loss, unit="step", disable=rank > 0)
    while step < end:
        # --- 3. one batch: which rows, which rank, how many tokens ---
        start = time.perf_counter()
        torch.manual_seed(config.seed + step)  # only a model with dropout draws from it
        batch = batch_rows(step - first, config.batch_size, len(pairs), config.seed)
        lengths = [len(pairs[i][0]) + len(pairs[i][1]) for i in batch]
        tokens = sum(len(pairs[i][1]) for i in batch)  # N, known to every rank without asking the others
        lr = learning_rate(config, step, total)

        # --- 4. gradient ---
        sums = torch.zeros(5, dtype=torch.float64, device=device)  # of loss, log p, w * p, rho and KL
        for part in deal(lengths, config.micro_batch_tokens, world)[rank]:
            chosen = [batch[i] for i in part]
            input_ids, mask = common.collate([pairs[i] for i in chosen], device)  # (B, T) both
            logprobs, kl = model.token_logprobs(input_ids, mask, chunk=config.head_chunk, reference=reference)  # (n,)
            w = torch.tensor([weights[i] for i in chosen for _ in pairs[i][1]], device=device)  # (n,)
            rho = torch.ones_like(w)
            if config.rho_low < config.rho_high and chosen:
                counts, starts = [len(pairs[i][1]) for i in chosen], [references[i] for i in chosen]
                rho = ratios(logprobs, counts, starts, config.rho_low, config.rho_high)
            if reference is None:
                kl = torch.zeros_like(logprobs)  # without one, the second is the entropy
            # L = 1/N sum [ - w_i * sg[p_t^a] * sg[rho_i] * log p_t + lambda * KL(ref || p)_t ]
            # An empty micro-batch sums to 0: it only keeps the ranks in step.
            loss = (token_loss(logprobs, w * rho, config.power) + config.anchor * kl).sum() / tokens
            loss.backward()
            with torch.no_grad():
                told = [loss * tokens, logprobs.sum(), (w * logprobs.exp()).sum(), rho.sum(), kl.sum()]
                sums += torch.stack(told)
        dist.all_reduce(sums)

        # --- 5. update ---
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).full_tensor().item()
        common.check(math.isfinite(norm), f"step {step + 1}: the gradient is not finite; lower --lr")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        # --- 6. log and save ---
        loss, logprob, prob, rho, kl = (sums / tokens).tolist()
        seconds = time.perf_counter() - start
        if rank == 0 and (step % config.log_every == 0 or step == end):
            row = dict(step=step, epoch=(step - first) * config.batch_size / len(pairs), loss=loss, logprob=logprob)
            row |= dict(weighted_prob=prob, rho=rho, kl=kl, lr=lr, grad_norm=norm, tokens=tokens, seconds=seconds)
            row |= dict(tokens_per_second=tokens / seconds, peak_memory=common.peak_memory(device))
            with metrics.open("a") as out:
                out.write(json.dumps(row) + "\n")
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update()
        # the last step needs one only if somebody will carry the schedule on
        if total > end if step == end else config.save_every and step % config.save_every == 0:
            common.save_checkpoint(folder, step, model, optimizer)
    bar.close()

    # --- 7. the trained model, a plain Hugging Face folder in the dtype it came in ---
    common.save_model(model, tokenizer, folder / "model", source.dtype or torch.float32)
    if rank == 0:
        print(f"saved {folder / 'model'}", flush=True)
    if total == end:  # else another run carries on from the checkpoint
        common.remove_checkpoints(folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    common.run(main)
