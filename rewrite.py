"""Stage 2: turns expert demonstrations (x, y°, a) into the training set of a method.

A mapper M answers the map prompt p(x, y°) with K rewrites y_1 .. y_K of each demonstration. They are graded, judged for
cheats, and scored with A(y|x), the mean log-probability of a text's tokens under the frozen target that is asked the
plain question, on re-tokenised text: exactly what fine-tuning will see. Then the method decides what is imitated:

    dart    argmax over clean y_k of  A(y_k|x) - soft_weight * sum of soft cheats;      M is the trained mapper
            clean: ended by itself, one box, right, arithmetic holds, fidelity >= min_fidelity, no hard cheat
    map     the first y_k that ended by itself with one box and a right answer;         M is the untrained target
            (prompted rewriting knows no reward, so neither the judge nor A choose here; both are only recorded)

Where no rewrite is eligible the expert's text is kept, with source "expert". A is maximal for dart under both
alignments that a mapper can be trained with: a single text's "kl" reward would prefer what the mapper finds improbable.
A method is one function `select_...(row, candidates, config) -> training rows`.

Finished rows are flushed to candidates.rank{r}.jsonl and scored.rank{r}.jsonl; a run that is started again, on any
number of ranks, does only what is missing. At the end stand train.jsonl (for sft.py) and scored.jsonl, which holds
every candidate with all that was found out about it.

Left out: tensor parallelism (mapper and target must each fit one GPU; the target is sharded for scoring).

    python rewrite.py --method dart --mapper runs/mapper/model --target runs/base --data demos.jsonl --output_dir runs/d
    torchrun --nproc-per-node 8 rewrite.py ...                                                              # one node
    torchrun --nnodes 2 --node-rank R --nproc-per-node 8 --master-addr HOST --master-port 29500 rewrite.py ...
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import reward

if __name__ != "__mp_main__":  # grading workers re-import this file and need no torch
    import torch.distributed as dist

BLOCK = 256  # rows a rank scores between two flushes


@dataclass
class Config:
    # --- what ---
    method: str = "dart"  # dart: best clean rewrite by likelihood; map: first right rewrite (prompted rewriting)
    target: str = ""  # folder of the model that will be fine-tuned: its likelihood scores the texts
    mapper: str = ""  # folder of the model that rewrites; empty: the target itself
    data: str = ""  # demonstrations: JSONL with id, problem, solution, answer
    output_dir: str = ""  # where train.jsonl is written; started again, only the rest is done
    limit: int = 0  # only the first rows of the data (0: all)
    # --- rewrites ---
    samples: int = 8  # rewrites a demonstration (K); more: a better best one, in proportion more generation
    temperature: float = 1.0  # of sampling; lower: safer and less varied rewrites
    max_tokens: int = 1024  # longest rewrite; what does not end by itself is never kept
    max_model_len: int = 3072  # longest prompt and rewrite together; a demonstration that does not fit is dropped
    # --- selection ---
    min_fidelity: float = 0.8  # share of the expert's intermediate results that must be kept, in order; 0: off
    hard_cheats: list[str] = field(
        default_factory=lambda: list(reward.HARD)
    )  # each excludes a rewrite; "none": none does
    soft_weight: float = 0.25  # what each soft cheat costs, times its strength in [0, 1], in nats a token
    # --- machine ---
    score_tokens: int = 32768  # padded tokens a forward pass and rank when scoring; lower it when memory runs out
    gpu_memory: float = 0.9  # share of the GPU that the engine may take (it is stopped before scoring)
    seed: int = 0  # every request is seeded from (seed, id): the number of ranks does not matter

    def __post_init__(self):
        check = reward.check
        check(self.method in METHODS, f"--method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("target", "data", "output_dir"):
            check(getattr(self, name), f"--{name} is needed")
        self.hard_cheats = [name for name in self.hard_cheats if name != "none"]
        unknown = set(self.hard_cheats) - set(reward.HARD)
        check(not unknown, f"--hard_cheats knows {' '.join(reward.HARD)}, not {' '.join(sorted(unknown))}")
        for name in ("samples", "max_tokens", "score_tokens"):
            check(getattr(self, name) >= 1, f"--{name} must be at least 1, got {getattr(self, name)}")
        check(self.max_model_len >= 2, f"--max_model_len must be at least 2, got {self.max_model_len}")
        check(self.temperature > 0, f"--temperature must be above 0, got {self.temperature}")
        check(self.limit >= 0, f"--limit must not be negative, got {self.limit}")
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


def expert_row(row: dict) -> dict:
    return training_row(row, "expert", row["solution"], row["expert_align"])


def select_dart(row: dict, candidates: list[dict], config: Config) -> list[dict]:
    """The clean rewrite that the target finds likeliest, less soft cheats; equals: the first; none: the expert."""
    clean = [k for k, c in enumerate(candidates) if c["clean"]]
    if not clean:
        return [expert_row(row)]

    def value(k: int) -> float:
        return candidates[k]["align"] - config.soft_weight * sum(candidates[k][name] for name in reward.SOFT)

    best = max(clean, key=value)
    return [training_row(row, "mapper", candidates[best]["text"], candidates[best]["align"], best)]


def select_map(row: dict, candidates: list[dict], config: Config) -> list[dict]:
    """The first rewrite that ended by itself with one box and a right answer; none: the expert."""
    for k, c in enumerate(candidates):
        if c["correct"] and c["finish"] == "stop" and len(reward.boxes(c["text"])) == 1:
            return [training_row(row, "mapper", c["text"], c["align"], k)]
    return [expert_row(row)]


METHODS = {"dart": select_dart, "map": select_map}


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def generate(engine, config: Config, tokenizer, todo: list[tuple[dict, list[int]]], output: Path) -> None:
    """Samples K rewrites for this rank's (row, prompt) pairs; each finished row is flushed at once."""
    params = []
    for row, ids in todo:
        room = min(config.max_tokens, config.max_model_len - len(ids))
        seed = reward.request_seed(config.seed, row["id"])
        params.append(reward.sampling(tokenizer, config.samples, config.temperature, room, seed))
    clock = time.time()
    with reward.open_part(output, "candidates") as part:
        for i, outputs in reward.generate(engine, [ids for _, ids in todo], params, desc="rewrite"):
            candidates = [
                {"text": reward.decode(tokenizer, o.token_ids), "tokens": len(o.token_ids), "finish": o.finish_reason}
                for o in outputs
            ]
            clock, seconds = time.time(), time.time() - clock  # since the last row; they add up to the whole
            part.write(reward.json_line(todo[i][0] | {"seconds": seconds, "candidates": candidates}))


def judge(row: dict, candidates: list[dict], config: Config) -> list[dict]:
    """Candidates with `correct` and all that reward.judge knows of them."""
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
        judged.append(c | {"correct": right} | parts)
    return judged


def mean_align(model, tokenizer, pairs: list[tuple[str, str]], budget: int, device, desc: str) -> list[float]:
    """A(y|x) of (problem, text) pairs. Collective: every rank calls it, also with no pairs."""
    rows = [
        (reward.prompt_ids(tokenizer, reward.solve_prompt(problem)), reward.response_ids(tokenizer, text))
        for problem, text in pairs
    ]
    return [logprobs.mean().item() for logprobs in reward.score(model, rows, budget, device, desc)]


def report(scored: list[dict], train: list[dict]) -> dict:
    """Shares, rates and costs, over rows (sources) and over candidates (the rest)."""
    candidates = [c for row in scored for c in row["candidates"]]

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    sources = {row["source"] for row in train} | {"mapper", "expert"}
    names = ("correct", "gate", "clean", "cheating", *reward.HARD, *reward.SOFT, "fidelity", "length_ratio", "copy")
    return {
        "rows": len(train),
        **{f"source/{s}": mean(row["source"] == s for row in train) for s in sorted(sources)},
        "align": mean(row["align"] for row in train),
        "expert_align": mean(row["expert_align"] for row in train),
        "candidate/align": mean(c["align"] for c in candidates),
        **{f"candidate/{name}": mean(c[name] for c in candidates) for name in names},
        "candidate/truncated": mean(c["finish"] == "length" for c in candidates),
        "generated_tokens": sum(c["tokens"] for c in candidates),
        "seconds/generate": sum(row["seconds"] for row in scored),  # of all ranks added up, interruptions included
        "seconds/score": sum(row["score_seconds"] for row in scored),  # grading and judging included
    }


def main():
    config = reward.parse_config(Config)

    # --- 1. prompts ---
    rows = reward.read_jsonl(config.data, dict.fromkeys(("id", "problem", "solution", "answer"), str))
    rows = rows[: config.limit or None]
    tokenizer = reward.load_tokenizer(config.target)
    reward.same_tokenizer(reward.load_tokenizer(config.mapper), config.mapper, tokenizer, config.target)
    stamps = [reward.weights_stamp(folder, config.max_model_len) for folder in (config.mapper, config.target)]
    prompts = {
        row["id"]: reward.prompt_ids(tokenizer, reward.map_prompt(row["problem"], row["solution"])) for row in rows
    }
    dropped = [i for i, ids in prompts.items() if len(ids) + 1 > config.max_model_len]
    rows = [row | {"weights": stamps} for row in rows if row["id"] not in dropped]
    reward.check(rows, f"{config.data}: no demonstration's prompt fits --max_model_len {config.max_model_len}")
    output = Path(config.output_dir)
    reward.save_config(config, output, resumable=("output_dir", "score_tokens", "gpu_memory"))
    scored = reward.read_parts(output, "scored", rows)
    known = reward.read_parts(output, "candidates", rows)
    rank, world, device = reward.init_distributed()
    if dropped and rank == 0:
        print(f"{len(dropped)} prompts exceed --max_model_len {config.max_model_len}, dropped: {' '.join(dropped)}")

    # --- 2. generate ---
    dist.barrier()  # all have read what earlier runs left before anyone adds to it: all share out the same rows
    todo = [(row, prompts[row["id"]]) for row in rows if row["id"] not in known.keys() | scored.keys()]
    if todo:
        vocab = reward.used_vocabulary(tokenizer)
        engine = reward.start_engine(config.mapper, config.max_model_len, device, vocab, config.gpu_memory)
        generate(engine, config, tokenizer, todo[rank::world], output)
        reward.stop_engine(engine)
    dist.barrier()
    known = reward.read_parts(output, "candidates")

    # --- 3. grade and judge, 4. score, in blocks, so that a kill costs no more than one block ---
    rest = [row for row in rows if row["id"] not in scored]
    if rest:
        model = reward.load_model(config.target, device, train=False)
        with reward.open_part(output, "scored") as part:
            for start in range(0, len(rest), BLOCK * world):
                block = rest[start : start + BLOCK * world][rank::world]
                clock = time.time()
                judged = [judge(row, known[row["id"]]["candidates"], config) for row in block]
                pairs = [(row["problem"], row["solution"]) for row in block]
                pairs += [(row["problem"], c["text"]) for row, candidates in zip(block, judged) for c in candidates]
                desc = f"score {start}-{min(start + BLOCK * world, len(rest))} of {len(rest)}"
                aligns = iter(mean_align(model, tokenizer, pairs, config.score_tokens, device, desc))
                experts = [next(aligns) for _ in block]
                seconds = (time.time() - clock) / max(len(block), 1)
                for row, expert, candidates in zip(block, experts, judged):
                    told = {"expert_align": expert, "seconds": known[row["id"]]["seconds"], "score_seconds": seconds}
                    told["candidates"] = [c | {"align": next(aligns)} for c in candidates]
                    part.write(reward.json_line(row | told))
    dist.barrier()

    # --- 5. select ---
    if rank == 0:
        reward.merge_parts(output, "scored", [row["id"] for row in rows])
        scored = list(reward.read_parts(output, "scored").values())
        train = [chosen for row in scored for chosen in METHODS[config.method](row, row["candidates"], config)]
        reward.write_text(output / "train.jsonl", "".join(map(reward.json_line, train)))
        for path in reward.part_files(output, "candidates"):
            path.unlink()  # scored.jsonl holds them
        told = report(scored, train) | {"dropped": len(dropped), **reward.FAILURES}
        reward.write_text(output / "metrics.jsonl", reward.json_line(told))
        for name, value in told.items():
            print(f"{name:<28}{value:.4g}" if isinstance(value, float) else f"{name:<28}{value}")
        print(f"wrote {output / 'train.jsonl'}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    reward.run(main)
