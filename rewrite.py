"""Stage 2: turns expert demonstrations (x, y°, a) into the training set of a method.

A model writes K texts a demonstration, under one of three prompts: a *mapper* rewrites y°, the model itself (*self*)
solves x, or it solves x *guided* by y°. The texts are graded, judged for cheats, and scored with A(y|x), the mean
log-probability of a text's tokens under the frozen target that is asked the plain question, on re-tokenised text:
exactly what fine-tuning will see. Then the method decides what is imitated:

    dart     argmax over clean y_k of  A(y_k|x) - soft_weight * sum of soft cheats;     the mapper is the trained one
             clean: ended by itself, one box, right, its last calculation agrees with the box, fidelity >=
             min_fidelity, no hard cheat (false arithmetic is one)
    map      a verified rewrite of the untrained mapper, which is the target itself (prompted rewriting)
    self     a verified solution of the target's own (rejection-sampling fine-tuning; --fallback False)
    resolve  Mind the Gap, arXiv 2509.15157: a verified solution of its own; for problems without one, a verified
             guided solution, which must stand alone (it may not mention what it was shown)
    rasft    RASFT, arXiv 2606.07006: the expert's text *and* every verified rollout of the current model, weighted by
             the problem's solvability s = verified / K  (`monotone_weights`, `released_weights`)

Verified: ended by itself, one box, right, and none of --hard_cheats, which dart applies by default and the others when
told to (with the same filter on every source, what dart gains is not merely its filter's). Where no text will do, the
expert's is kept, with source "expert". dart chooses by A whichever alignment its mapper was trained with: the "kl"
reward of a single text would prefer what the mapper finds improbable. A method is the prompts it goes through, each for
the problems that are still without a verified text, and a function `select_...(row, candidates, config) -> rows`.

Finished rows are flushed to candidates_*.rank{r}.jsonl and scored.rank{r}.jsonl; a run that is started again, on any
number of ranks, does only what is missing. At the end stand train.jsonl (for sft.py) and scored.jsonl, which holds
every candidate with all that was found out about it.

Left out: tensor parallelism (mapper and target must each fit one GPU; the target is sharded for scoring), and of
RASFT's released code top_p and the repetition penalty of its rollouts, loss-quantile routing and text heuristics.

    python rewrite.py --method dart --mapper runs/mapper/model --target runs/base --data demos.jsonl --output_dir runs/d
    torchrun --nproc-per-node 8 rewrite.py ...                                                              # one node
    torchrun --nnodes 2 --node-rank R --nproc-per-node 8 --master-addr HOST --master-port 29500 rewrite.py ...
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import common
import reward

BLOCK = 256  # rows a rank scores between two flushes


@dataclass
class Config:
    # --- what ---
    method: str = "dart"  # dart, map (prompted rewriting), self (own solutions), resolve (Mind the Gap) or rasft
    target: str = ""  # folder of the model that will be fine-tuned: its likelihood scores the texts
    mapper: str = ""  # folder of the model that writes (for rasft the current policy); empty: the target itself
    data: str = ""  # demonstrations: JSONL with id, problem, solution, answer
    output_dir: str = ""  # where train.jsonl is written; started again, only the rest is done
    limit: int = 0  # only the first rows of the data (0: all)
    share: float = 1.0  # share of the rows that are written for; the others keep the expert's text unseen
    # --- texts ---
    samples: int = 8  # texts a demonstration and prompt (K); more: a better best one, in proportion more generation
    temperature: float = 1.0  # of sampling; lower: safer and less varied texts
    max_tokens: int = 1024  # longest text; what does not end by itself is never kept
    max_model_len: int = 3072  # longest prompt and text together; a demonstration that does not fit keeps its text
    # --- selection ---
    keep: str = "first"  # which verified text: first, random or likeliest (by A); dart and rasft have their own rule
    fallback: bool = True  # without an eligible text keep the expert's; False leaves the problem out (not for rasft)
    min_fidelity: float = 0.8  # dart: share of the expert's intermediate results to be kept, in order; 0: off
    hard_cheats: list[str] | None = None  # each excludes a text; "none": none does; default: all for dart, else none
    soft_weight: float = 0.25  # dart: what each soft cheat costs, times its strength in [0, 1], in nats a token
    weights: str = "monotone"  # rasft: monotone (own solutions replace the expert's share by share) or released
    # --- machine ---
    score_tokens: int = 32768  # padded tokens a forward pass and rank when scoring; lower it when memory runs out
    gpu_memory: float = 0.9  # share of the GPU that the engine may take (it is stopped before scoring)
    seed: int = 0  # every request is seeded from (seed, prompt, id): the number of ranks does not matter

    def __post_init__(self):
        check = common.check
        check(self.method in METHODS, f"--method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("target", "data", "output_dir"):
            check(getattr(self, name), f"--{name} is needed")
        self.hard_cheats = common.chosen_cheats(self.hard_cheats, default=self.method == "dart")
        check(self.keep in KEEP, f"--keep must be one of {', '.join(KEEP)}, got {self.keep!r}")
        check(self.weights in WEIGHTS, f"--weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        for name in ("samples", "max_tokens", "score_tokens"):
            check(getattr(self, name) >= 1, f"--{name} must be at least 1, got {getattr(self, name)}")
        check(self.max_model_len >= 2, f"--max_model_len must be at least 2, got {self.max_model_len}")
        check(self.temperature > 0, f"--temperature must be above 0, got {self.temperature}")
        check(self.limit >= 0, f"--limit must not be negative, got {self.limit}")
        check(0 < self.share <= 1, f"--share must be above 0 and at most 1, got {self.share}")
        check(self.soft_weight >= 0, f"--soft_weight must not be negative, got {self.soft_weight}")
        check(0 <= self.min_fidelity <= 1, f"--min_fidelity must be between 0 and 1, got {self.min_fidelity}")
        check(0 < self.gpu_memory < 1, f"--gpu_memory must be between 0 and 1, got {self.gpu_memory}")
        self.mapper = self.mapper or self.target


# ---------------------------------------------------------------------------------------------------------------------
# Methods: a row (a demonstration with its `expert_align`) and its candidates -> training rows
# ---------------------------------------------------------------------------------------------------------------------


def training_row(row: dict, source: str, text: str, align: float, sample: int = 0, weight: float = 1.0) -> dict:
    """One text to imitate. (id, source, sample) is its key."""
    kept = {"id": row["id"], "problem": row["problem"], "solution": text, "answer": row["answer"]}
    told = {"source": source, "sample": sample, "weight": weight, "align": align, "expert_align": row["expert_align"]}
    return kept | told


def expert_row(row: dict, weight: float = 1.0) -> dict:
    return training_row(row, "expert", row["solution"], row["expert_align"], weight=weight)


def candidate_row(row: dict, candidates: list[dict], k: int, weight: float = 1.0) -> dict:
    return training_row(row, candidates[k]["source"], candidates[k]["text"], candidates[k]["align"], k, weight)


def fall_back(row: dict, candidates: list[dict], config: Config) -> list[dict]:
    """The expert's text where it may stand in, and for rows that --share has left out."""
    return [expert_row(row)] if config.fallback or not candidates else []


def verified(candidate: dict) -> bool:
    """Ended by itself, one box, right, none of --hard_cheats; a guided text must not mention what it was shown."""
    told = candidate["source"] == "guided" and candidate["mentions_source"]
    ended = candidate["finish"] == "stop" and len(reward.boxes(candidate["text"])) == 1
    return candidate["correct"] and ended and not candidate["cheating"] and not told


KEEP = {  # which of the verified candidates (numbers, candidates, row, config)
    "first": lambda good, candidates, row, config: good[0],
    "random": lambda good, candidates, row, config: random.Random(f"keep {config.seed} {row['id']}").choice(good),
    "likeliest": lambda good, candidates, row, config: max(good, key=lambda k: candidates[k]["align"]),
}


def select_dart(row: dict, candidates: list[dict], config: Config) -> list[dict]:
    """The clean rewrite that the target finds likeliest, less soft cheats; equals: the first; none: the expert."""
    clean = [k for k, c in enumerate(candidates) if c["clean"]]
    if not clean:
        return fall_back(row, candidates, config)

    def value(k: int) -> float:
        return candidates[k]["align"] - config.soft_weight * sum(candidates[k][name] for name in reward.SOFT)

    return [candidate_row(row, candidates, max(clean, key=value))]


def select_verified(row: dict, candidates: list[dict], config: Config) -> list[dict]:
    """One verified candidate, by --keep; none: the expert. Later prompts only ever had rows without one."""
    good = [k for k, c in enumerate(candidates) if verified(c)]
    if not good:
        return fall_back(row, candidates, config)
    return [candidate_row(row, candidates, KEEP[config.keep](good, candidates, row, config))]


def monotone_weights(k: int, n: int) -> tuple[float, float]:
    """(expert, each verified rollout) = (1 - k/n, 1/n): every trial has the same say, a verified one for itself, a
    failed one for the expert. So the expert counts fully at k = 0, not at all at k = n, and less the more is solved.

    Our rule, after the abstract's words; the released one is not monotone.
    """
    return 1 - k / n, 1 / n


def released_weights(k: int, n: int) -> tuple[float, float]:
    """The same by RASFT's released code. With s = k/n, rewards R_E = 1 + 2 (1 - s) for the expert, 1 and 0 for verified
    and failed rollouts, and z-scores in the group of all n + 1,  A = tanh(0.4 z):

        expert A_E / (1 + k),   rollout 0.25 * clip(A_+ / (1 + k), 0.02, 0.15);   k = 0 or k = n: expert 1, rollouts 0

    (at k = n all rewards are equal, which its code treats as nothing learnt).
    """
    if k in (0, n):
        return 1.0, 0.0
    expert = 1 + 2 * (1 - k / n)
    mean = (expert + k) / (n + 1)
    std = math.sqrt(((expert - mean) ** 2 + k * (1 - mean) ** 2 + (n - k) * mean**2) / (n + 1))
    expert, rollout = (math.tanh(0.4 * (value - mean) / std) / (1 + k) for value in (expert, 1))
    return expert, 0.25 * min(max(rollout, 0.02), 0.15)


WEIGHTS = {"monotone": monotone_weights, "released": released_weights}


def select_rasft(row: dict, candidates: list[dict], config: Config) -> list[dict]:
    """The expert's text and every verified rollout, as far as their weights are above 0."""
    if not candidates:
        return fall_back(row, candidates, config)
    good = [k for k, c in enumerate(candidates) if verified(c)]
    expert, rollout = WEIGHTS[config.weights](len(good), len(candidates))
    rows = [expert_row(row, expert)] + [candidate_row(row, candidates, k, rollout) for k in good]
    return [r | {"solvability": len(good) / len(candidates)} for r in rows if r["weight"] > 0]


PROMPTS = {  # source of a text -> how it is asked for
    "mapper": lambda row: reward.map_prompt(row["problem"], row["solution"]),
    "self": lambda row: reward.solve_prompt(row["problem"]),
    "guided": lambda row: reward.guided_prompt(row["problem"], row["solution"]),
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


def generate(engine, config: Config, tokenizer, todo: list[tuple[dict, list[int]]], source: str, output: Path) -> dict:
    """K texts for each (row, prompt): {id: row with candidates}; each finished row is flushed at once."""
    params = []
    for row, ids in todo:
        room = min(config.max_tokens, config.max_model_len - len(ids))
        seed = common.request_seed(config.seed, source, row["id"])
        params.append(common.sampling(tokenizer, config.samples, config.temperature, room, seed))
    clock, finished = time.time(), {}
    with common.open_part(output, f"candidates_{source}") as part:
        for i, outputs in common.generate(engine, [ids for _, ids in todo], params, desc=source):
            candidates = [
                {"text": common.decode(tokenizer, o.token_ids), "tokens": len(o.token_ids), "finish": o.finish_reason}
                for o in outputs
            ]
            clock, seconds = time.time(), time.time() - clock  # since the last row; they add up to the whole
            row = finished[todo[i][0]["id"]] = todo[i][0] | {"seconds": seconds, "candidates": candidates}
            part.write(common.json_line(row))
    return finished


def judge(row: dict, candidates: list[dict], source: str, config: Config) -> list[dict]:
    """Candidates with `source`, `correct` and all that reward.judge knows of them."""
    correct = reward.verify_all([c["text"] for c in candidates], [row["answer"]] * len(candidates))
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
        )
        judged.append(c | {"source": source, "correct": right} | parts)
    return judged


def mean_align(model, tokenizer, pairs: list[tuple[str, str]], budget: int, device, desc: str) -> list[float]:
    """A(y|x) of (problem, text) pairs. Collective: every rank calls it, also with no pairs."""
    rows = [
        (common.prompt_ids(tokenizer, reward.solve_prompt(problem)), common.response_ids(tokenizer, text))
        for problem, text in pairs
    ]
    return [logprobs.mean().item() for logprobs in common.score(model, rows, budget, device, desc)]


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


def main():
    config = common.parse_config(Config)
    sources, select = METHODS[config.method]

    # --- 1. prompts ---
    fields = dict.fromkeys(("id", "problem", "solution", "answer"), str)
    rows = common.read_jsonl(config.data, fields)[: config.limit or None]
    tokenizer = common.load_tokenizer(config.target)
    common.same_tokenizer(common.load_tokenizer(config.mapper), config.mapper, tokenizer, config.target)
    stamps = [common.weights_stamp(folder, config.max_model_len) for folder in (config.mapper, config.target)]
    prompts = {s: {row["id"]: common.prompt_ids(tokenizer, PROMPTS[s](row)) for row in rows} for s in sources}
    longest = {row["id"]: max(len(prompts[s][row["id"]]) for s in sources) for row in rows}
    rows = [{name: row[name] for name in fields} | {"weights": stamps} for row in rows]  # ours go beside these four
    long = {i for i, length in longest.items() if length + 1 > config.max_model_len}
    common.check(len(long) < len(rows), f"{config.data}: no prompt fits --max_model_len {config.max_model_len}")
    written = {r["id"] for r in rows if random.Random(f"share {config.seed} {r['id']}").random() < config.share} - long
    common.check(written, f"--share {config.share}: none of the {len(rows)} rows falls into it; raise it")
    output = Path(config.output_dir)
    common.save_config(config, output, resumable=("output_dir", "score_tokens", "gpu_memory"))
    scored = common.read_parts(output, "scored", rows)
    known = {source: common.read_parts(output, f"candidates_{source}", rows) for source in sources}
    rank, world, device = common.init_distributed()
    if long and rank == 0:
        told = f"{len(long)} prompts exceed --max_model_len {config.max_model_len}; nothing is written for"
        print(f"{told} {' '.join(row['id'] for row in rows if row['id'] in long)}")

    # --- 2. generate, grade and judge: a further prompt only where no text is verified yet ---
    dist.barrier()  # all have read what earlier runs left before anyone adds to it: all share out the same rows
    rest = [row for row in rows if row["id"] not in scored]
    mine, engine = rest[rank::world], None
    if any(row["id"] in written and row["id"] not in known[source] for row in rest for source in sources):
        vocab = common.used_vocabulary(tokenizer)
        engine = common.start_engine(config.mapper, config.max_model_len, device, vocab, config.gpu_memory)
    judged: dict[str, list[dict]] = {row["id"]: [] for row in mine}
    seconds = dict.fromkeys(judged, 0.0)
    for source in sources:
        open_rows = [r for r in mine if r["id"] in written and not any(map(verified, judged[r["id"]]))]
        todo = [(row, prompts[source][row["id"]]) for row in open_rows if row["id"] not in known[source]]
        if todo:
            known[source] |= generate(engine, config, tokenizer, todo, source, output)
        for row in open_rows:
            told = known[source][row["id"]]
            judged[row["id"]] += judge(row, told["candidates"], source, config)
            seconds[row["id"]] += told["seconds"]
    if engine is not None:
        dist.barrier()
        common.stop_engine(engine)

    # --- 3. score, in blocks, so that a kill costs no more than one block ---
    if rest:
        model = common.load_model(config.target, device, train=False)
        with common.open_part(output, "scored") as part:
            for start in range(0, len(rest), BLOCK * world):
                block = mine[start // world :][:BLOCK]
                clock = time.time()
                pairs = [(row["problem"], row["solution"]) for row in block]
                pairs += [(row["problem"], c["text"]) for row in block for c in judged[row["id"]]]
                desc = f"score {start}-{min(start + BLOCK * world, len(rest))} of {len(rest)}"
                aligns = iter(mean_align(model, tokenizer, pairs, config.score_tokens, device, desc))
                experts = [next(aligns) for _ in block]
                per_row = (time.time() - clock) / max(len(block), 1)
                for row, expert in zip(block, experts):
                    told = {"expert_align": expert, "seconds": seconds[row["id"]], "score_seconds": per_row}
                    told["candidates"] = [c | {"align": next(aligns)} for c in judged[row["id"]]]
                    part.write(common.json_line(row | told))
    dist.barrier()

    # --- 4. select ---
    failures = torch.tensor(list(reward.FAILURES.values()), device=device)
    dist.all_reduce(failures)
    if rank == 0:
        common.merge_parts(output, "scored", [row["id"] for row in rows])
        scored = list(common.read_parts(output, "scored").values())
        train = [chosen for row in scored for chosen in select(row, row["candidates"], config)]
        common.check(
            train,
            f"{config.data}: no problem has a text to keep; in a new --output_dir allow --fallback, or raise --samples",
        )
        common.write_text(output / "train.jsonl", "".join(map(common.json_line, train)))
        for path in [path for source in sources for path in common.part_files(output, f"candidates_{source}")]:
            path.unlink()  # scored.jsonl holds them
        told = report(scored, train, config, world) | {"too_long": len(long)}
        told |= dict(zip(reward.FAILURES, failures.tolist()))  # of this start of the processes
        common.write_text(output / "metrics.jsonl", common.json_line(told))
        for name, value in told.items():
            print(f"{name:<28}{value:.4g}" if isinstance(value, float) else f"{name:<28}{value}")
        print(f"wrote {output / 'train.jsonl'}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    common.run(main)
