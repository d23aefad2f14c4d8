"""The toy world: a small model, its problems and an expert who speaks differently, made from a seed on two CPU cores.

The papers' setting in small. A *base* model (Qwen3, about 1M parameters) is pretrained from scratch on two tasks:

    solve   problem -> solution in its native style                    "15+3=18. 18-11=7. \\boxed{7}"
            mostly short problems; the longer a problem, the more often the text on it is only a guess, "\\boxed{52}":
            the base could work it out, and seldom does
    map     problem and solution -> a rewrite, all lengths; both of the prompts that show a solution are asked alike.
            Every step has a style of its own, native, spoken or the expert's:
            "15+3=18. From 18, taking 11 gives 7. So \\boxed{7}"
            and most rewrites are careless: steps are left out, results are wrong, or the answer stands there alone.
            The base could rewrite well, and seldom does: a large model's first attempts look like that (LAZY)

The *expert* is right, but writes in words, in which the base has never solved anything:

    "fifteen plus three is eighteen; eighteen minus eleven is seven; hence \\boxed{7}"

So imitating the expert costs the base what it can do, while the same solutions in native style (the *oracle*, which a
real setting does not have) would teach it much. How much of that difference a method recovers is what the toy measures.
A rewrite of n steps is native throughout with probability 3^-n: choosing among a few does not find it, and a trained
mapper can. Pretraining planted all this: the toy shows that a method works, not how far it carries.

Written to --output_dir:
    base/                 Hugging Face folder, tokenizer and chat template included
    demos.jsonl           problems with expert solutions
    oracle.jsonl          the same problems with native solutions, as a training set (source "oracle")
    in_distribution.jsonl, shorter.jsonl, longer.jsonl, reworded.jsonl    benchmarks
    validation.jsonl      their mixture, other problems
The problem space is cut by a hash: pretraining, demonstrations and benchmarks never share a problem, and neither do the
benchmarks of tuning seeds (100 and above) and of the seeds that results are reported for.

Left out on purpose: FSDP, bf16, resuming inside pretraining (it takes minutes). Finished parts are skipped. The two
processes share out the micro-batches of a step, each with a whole model: faster than two threads of one process.

    torchrun --standalone --nproc-per-node=2 runs/toy_world.py --output_dir out/world/seed0 --seed 0
"""

import itertools
import json
import math
import random
import re
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed as dist
from tqdm import tqdm

import reward
from reward import prompt_ids, response_ids, stop_id
from sft import (
    check,
    collate,
    init_distributed,
    micro_batches,
    on_rank0,
    parse_config,
    run,
    save_config,
    token_logprobs,
    write_text,
)


@dataclass
class Config:
    output_dir: str = "out/world/seed0"  # folder of the world
    version: int = 2  # of the generator; the first one had whole texts of one style, and no careless rewrites
    seed: int = 0  # draws problems, pretraining and weights; 100 and above are for tuning, results use those below
    demos: int = 600  # demonstrations
    benchmark_rows: int = 200  # problems in each benchmark and in the validation split
    hidden_size: int = 128  # width of the model
    layers: int = 4  # depth of the model
    pretrain_tokens: int = 3_000_000  # prompt and response tokens seen in pretraining; fewer: a weaker base
    map_share: float = 0.5  # share of these tokens spent on rewriting; more: a better mapper, a weaker solver
    batch_tokens: int = 2048  # tokens in a micro-batch (padding included)
    accumulate: int = 2  # micro-batches in an optimizer step: one length each, so one alone is a biased sample
    learning_rate: float = 6e-3  # peak; warm-up over 3% of the steps, then cosine to a tenth


RANGES = {
    "[0, inf)": "seed",
    "[2, 2]": "version",
    "(0, inf)": "demos benchmark_rows hidden_size layers pretrain_tokens accumulate",
    "[512, inf)": "batch_tokens",
    "[0, 1)": "map_share",
    "(0, 1)": "learning_rate",
}


# ---------------------------------------------------------------------------------------------------------------------
# Problems: a start and a list of signed operands, every running total in 0..99. A chain of n operands has n steps.
# ---------------------------------------------------------------------------------------------------------------------

LARGEST, LARGEST_OPERAND = 99, 20
WORDINGS = [  # opening, addition, subtraction, question
    ("Start with {}.", " Add {}.", " Subtract {}.", " Result?"),
    ("Begin at {}", ", go up {}", ", go down {}", ". Where?"),
    ("Tom owns {} coins.", " He finds {}.", " He loses {}.", " How many now?"),
    ("A bus holds {} people.", " Then {} enter.", " Then {} leave.", " Who remains?"),
]
PLAIN, OTHER = [0, 1], [2, 3]  # wordings of the demonstrations, and those kept for the reworded benchmark
PRETRAIN_LENGTHS = {1: 0.25, 2: 0.25, 3: 0.2, 4: 0.12, 5: 0.1, 6: 0.08}  # solving; rewriting has all lengths alike
WORKED = {1: 0.95, 2: 0.8, 3: 0.35, 4: 0.2, 5: 0.2, 6: 0.2}  # share that pretraining works out; it guesses the rest
DEMO_LENGTHS = {2: 0.1, 3: 0.3, 4: 0.3, 5: 0.3}
SUITES = {  # lengths and wordings of each benchmark
    "in_distribution": (DEMO_LENGTHS, PLAIN),
    "shorter": ({1: 0.3, 2: 0.7}, PLAIN),
    "longer": ({6: 1.0}, PLAIN),
    "reworded": (DEMO_LENGTHS, OTHER),
}
BUCKETS = {"tuning": {0}, "benchmark": {1}, "demos": {2, 3}, "pretrain": {4, 5, 6, 7}}  # of the hash of a chain


def draw(rng: random.Random, length: int, buckets: set[int]) -> tuple[int, ...]:
    """A chain (start, +-operand, ...) of `length` steps whose hash falls into one of the buckets."""
    while True:
        total = rng.randint(1, LARGEST)
        chain = [total]
        for _ in range(length):
            operand = rng.choice(
                [k for k in range(-LARGEST_OPERAND, LARGEST_OPERAND + 1) if 0 <= total + k <= LARGEST and k]
            )
            chain.append(operand)
            total += operand
        if zlib.crc32(repr(chain).encode()) % 8 in buckets:
            return tuple(chain)


def pick(rng: random.Random, weights: dict):
    return rng.choices(list(weights), list(weights.values()))[0]


def word_problem(chain: tuple[int, ...], wording: int) -> str:
    opening, add, subtract, question = WORDINGS[wording]
    steps = "".join((add if k > 0 else subtract).format(abs(k)) for k in chain[1:])
    return opening.format(chain[0]) + steps + question


def read_problem(problem: str) -> tuple[int, ...]:
    """The chain behind a problem's text, in any wording."""
    start, *numbers = re.findall(r"\d+", problem)
    signs = re.findall(r"Add|Subtract|up|down|finds|loses|enter|leave", problem)
    return (int(start), *(int(k) * (1 if s in ("Add", "up", "finds", "enter") else -1) for k, s in zip(numbers, signs)))


# ---------------------------------------------------------------------------------------------------------------------
# Styles: one chain, three ways to write each step of its solution; and what a careless rewrite does to them.
# ---------------------------------------------------------------------------------------------------------------------

UNITS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
)
TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
STYLES = ("native", "expert", "spoken")
EXPERT_SOURCE = 0.6  # share of the solutions shown for rewriting that are the expert's; the others are mixed
LAZY = {"complete": 0.45, "gaps": 0.2, "alone": 0.2, "wrong": 0.15}  # what becomes of a rewrite in pretraining


def in_words(number: int) -> str:
    if number < 20:
        return UNITS[number]
    return TENS[number // 10 - 2] + (f"-{UNITS[number % 10]}" if number % 10 else "")


ENDING = {"native": "", "expert": "hence ", "spoken": "So "}  # before the box, in the last step's style


def step(before: int, operand: int, after: int, name: str) -> str:
    """One step in one of STYLES; `after` is what it claims before + operand to be."""
    size = abs(operand)
    if name == "native":
        return f"{before}{'+' if operand > 0 else '-'}{size}={after}. "
    if name == "expert":
        return f"{in_words(before)} {'plus' if operand > 0 else 'minus'} {in_words(size)} is {in_words(after)}; "
    return f"From {before}, {'adding' if operand > 0 else 'taking'} {size} gives {after}. "


def solution(chain: tuple[int, ...], names: str | list[str]) -> str:
    """The solution of a chain in one of STYLES, or with a style for each step."""
    names = [names] * (len(chain) - 1) if isinstance(names, str) else names
    totals = list(itertools.accumulate(chain))
    return "".join(map(step, totals, chain[1:], totals[1:], names)) + f"{ENDING[names[-1]]}\\boxed{{{totals[-1]}}}"


def rewrite(rng: random.Random, chain: tuple[int, ...]) -> str:
    """A rewrite as the base learns it: a style for each step, and one of LAZY."""
    lazy, names = pick(rng, LAZY), [rng.choice(STYLES) for _ in chain[1:]]
    totals = list(itertools.accumulate(chain))
    claimed = totals[1:]
    if lazy == "wrong":  # one result is off; what follows goes on from the right one
        place = rng.randrange(len(claimed))
        errors = [k for k in (-10, -2, -1, 1, 2, 10) if 0 <= claimed[place] + k <= LARGEST]
        claimed[place] += rng.choice(errors)
    steps = list(map(step, totals, chain[1:], claimed, names))
    if lazy == "gaps":
        steps = [text for text in steps if rng.random() < 0.5]
    if lazy == "alone":
        steps = []
    return "".join(steps) + f"{ENDING[names[-1]] if steps else ''}\\boxed{{{claimed[-1]}}}"


def native_share(text: str) -> float:
    """Share of a text's steps that are written in native style; 0 for a text without steps."""
    steps = re.findall(r"[^.;]+[.;]", text.partition("\\boxed")[0])
    return sum(bool(re.fullmatch(r"\s*\d+[+-]\d+=\d+\.", text)) for text in steps) / max(len(steps), 1)


VALUES = {in_words(n): n for n in range(100)}
SIGNS = {"+": "+", "plus": "+", "adding": "+", "-": "-", "minus": "-", "taking": "-"}
SYMBOL = re.compile(r"\d+|" + "|".join(sorted((*VALUES, *SIGNS), key=len, reverse=True)).replace("+", r"\+"))


def steps_right(problem: str, text: str) -> bool:
    """Whether every step of a solution is there, in order and right, in digits or words, and the box at its end too.

    The world knows its own problems, so this judges strictly what a general grader can only sample. Reduced to numbers
    and signs, a right step reads "total sign operand result"; the total may be left out, being the last result.
    """
    chain = read_problem(problem)
    found = " ".join(str(VALUES.get(s, SIGNS.get(s, s))) for s in SYMBOL.findall(text.lower()))
    total, pattern = chain[0], ""
    for k in chain[1:]:
        pattern += rf"({total} )?{re.escape('+' if k > 0 else '-')} {abs(k)} {total + k} "
        total += k
    return re.fullmatch(pattern + str(total), found) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model.
# ---------------------------------------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A digit is a token of its own; a space goes with the word behind it, or, before a digit, with what stands before it.
PIECES = r"\n|\d| ?\\boxed\{| ?[A-Za-z]+(?: (?=\d))?| ?[^\sA-Za-z\d]+(?: (?=\d))?|\s"


def build_tokenizer(rng: random.Random):
    """Byte-level BPE trained on the world's text. The fixed sentences of the prompts are one token each: they carry no
    information here, and would be half of all tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["user\nassistant\nsystem"] * 100 + [f"{a}+{b}={c}. {a}-{b}={c}." for a, b, c in ["123", "456", "789"]]
    for _ in range(2000):
        chain = draw(rng, rng.randint(1, 6), BUCKETS["pretrain"])
        texts += [word_problem(chain, w) for w in range(len(WORDINGS))] + [solution(chain, s) for s in STYLES]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=20,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    prompts = reward.solve_prompt("@"), reward.map_prompt("@", "@"), reward.guided_prompt("@", "@")
    fixed = [piece for prompt in prompts for piece in prompt.split("@")]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(fixed) if piece])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=CHAT
    )


def build_model(config: Config, tokenizer):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(config.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.hidden_size // 32,
            num_key_value_heads=config.hidden_size // 32,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stop_id(tokenizer),
            bos_token_id=None,
        )
    )
    for field in ("eos_token_id", "pad_token_id"):
        setattr(model.generation_config, field, getattr(model.config, field))
    model.generation_config.do_sample = True
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining.
# ---------------------------------------------------------------------------------------------------------------------


def solve_row(rng: random.Random) -> tuple[str, str]:
    """A problem, worked out in native style or answered by a guess: the longer it is, the lazier the text on it."""
    chain = draw(rng, pick(rng, PRETRAIN_LENGTHS), BUCKETS["pretrain"])
    worked = rng.random() < WORKED[len(chain) - 1]
    answer = solution(chain, "native") if worked else f"\\boxed{{{rng.randint(0, LARGEST)}}}"
    return reward.solve_prompt(word_problem(chain, rng.randrange(len(WORDINGS)))), answer


def map_row(rng: random.Random) -> tuple[str, str]:
    """A problem with a solution in view, under either of the prompts that show one, and a rewrite."""
    chain = draw(rng, rng.randint(1, 6), BUCKETS["pretrain"])
    shown = "expert" if rng.random() < EXPERT_SOURCE else [rng.choice(STYLES) for _ in chain[1:]]
    prompt = rng.choice([reward.map_prompt, reward.guided_prompt])
    return prompt(word_problem(chain, rng.randrange(len(WORDINGS))), solution(chain, shown)), rewrite(rng, chain)


def encode(tokenizer, rows: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """What prompt_ids and response_ids give, for many rows at once (a template a row is slow)."""
    before, after = tokenizer.apply_chat_template(
        [{"role": "user", "content": "@"}], add_generation_prompt=True, tokenize=False
    ).split("@")
    prompts = tokenizer([before + p + after for p, _ in rows], add_special_tokens=False)["input_ids"]
    responses = tokenizer([r for _, r in rows], add_special_tokens=False)["input_ids"]
    encoded = [(p, r + [stop_id(tokenizer)]) for p, r in zip(prompts, responses)]
    first = (prompt_ids(tokenizer, rows[0][0]), response_ids(tokenizer, rows[0][1]))
    check(encoded[0] == first, "the toy's tokenizer and reward.py disagree on a prompt: the world is broken")
    return encoded


def batches(config: Config, tokenizer, rng: random.Random):
    """Endless micro-batches. Rows are drawn 200k tokens at a time, so that rows of one length meet in one batch."""
    share = config.map_share
    while True:
        rows: list = []
        for kind, part in ((solve_row, 1 - share), (map_row, share)):
            tokens = 0
            while tokens < part * 200_000:
                fresh = encode(tokenizer, [kind(rng) for _ in range(200)])
                rows += fresh
                tokens += sum(len(p) + len(r) for p, r in fresh)
        groups = micro_batches([len(p) + len(r) for p, r in rows], config.batch_tokens)
        rng.shuffle(groups)
        for group in groups:
            yield [rows[i] for i in group]


def muon_step(weight, momentum, rate: float) -> None:
    """One step of Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon) on a matrix that has a gradient.

    Five Newton-Schulz steps bring all singular values of the update near 1; its scale and the decay of the weight are
    those of arXiv 2502.16982, so that `rate` is one for AdamW. torch.optim.Muon is the same in bf16, which a processor
    without bf16 units is slow at; here all is in fp32.
    """
    with torch.no_grad():
        momentum.lerp_(weight.grad, 1 - 0.95)
        update = weight.grad.lerp(momentum, 0.95)  # Nesterov
        x = update.T if len(update) > update.shape[1] else update  # the smaller Gram matrix
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        update = x.T if len(update) > update.shape[1] else x
        weight.mul_(1 - 0.1 * rate).sub_(update, alpha=0.2 * max(weight.shape) ** 0.5 * rate)


def pretrain(config: Config, model, tokenizer) -> None:
    """Next-token cross-entropy on responses; the learning rate follows the share of tokens that was seen.

    Every rank draws the same micro-batches, computes its own, and makes the same step on the sum of all gradients.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    source = batches(config, tokenizer, random.Random(f"pretrain {config.seed}"))
    # Muon learns the hidden matrices in about half the tokens that AdamW needs; embedding and norms stay with AdamW.
    hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    momenta = [torch.zeros_like(p) for p in hidden]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    seen, steps, average, started = 0, 0, None, time.perf_counter()
    with tqdm(total=config.pretrain_tokens, desc="pretraining", unit="tok", unit_scale=True, disable=rank > 0) as bar:
        while seen < config.pretrain_tokens:
            done = seen / config.pretrain_tokens
            rate = config.learning_rate * min(1, (done + 1e-3) / 0.03) * (0.55 + 0.45 * math.cos(math.pi * done))
            adamw.param_groups[0]["lr"] = rate
            parts = [next(source) for _ in range(config.accumulate)]
            count = sum(len(r) for part in parts for _, r in part)
            loss = torch.zeros(1)
            for part in parts[rank::world]:
                input_ids, mask = collate(part, "cpu")
                logprobs = token_logprobs(model, input_ids, mask, chunk=4096)
                part_loss = -logprobs.sum() / count
                part_loss.backward()
                loss += part_loss.detach()
            sums = torch.cat([loss, *(p.grad.flatten() for p in parameters)])  # one message for all
            dist.all_reduce(sums)
            loss, *gradients = sums.split([1, *sizes])
            for p, gradient in zip(parameters, gradients):
                p.grad.copy_(gradient.view_as(p))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for weight, momentum in zip(hidden, momenta):
                muon_step(weight, momentum, rate)
            adamw.step()
            model.zero_grad()
            tokens = sum(len(p) + len(r) for part in parts for p, r in part)
            seen, steps = seen + tokens, steps + 1
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            bar.update(tokens)
            bar.set_postfix(loss=f"{average:.3f}", lr=f"{rate:.1e}")
    seconds = time.perf_counter() - started
    if rank == 0:
        speed = f"{seen:,} tokens, {seconds:.0f} s, {seen / seconds:,.0f} tokens/s"
        print(f"pretraining: {steps} steps, {speed}, {average=:.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# Data files.
# ---------------------------------------------------------------------------------------------------------------------


def unique(rng: random.Random, count: int, lengths: dict, buckets: set[int], taken: set) -> list[tuple[int, ...]]:
    """`count` chains that are not in `taken`, which they join."""
    chains = []
    while len(chains) < count:
        chain = draw(rng, pick(rng, lengths), buckets)
        if chain not in taken:
            taken.add(chain)
            chains.append(chain)
    return chains


def data_files(config: Config) -> dict[str, list[dict]]:
    """File name -> rows."""
    rng, taken = random.Random(f"data {config.seed}"), set()
    files: dict[str, list[dict]] = {"demos.jsonl": [], "oracle.jsonl": [], "validation.jsonl": []}
    for i, chain in enumerate(unique(rng, config.demos, DEMO_LENGTHS, BUCKETS["demos"], taken)):
        row = {"id": f"demo-{i}", "problem": word_problem(chain, PLAIN[i % 2]), "answer": str(sum(chain))}
        files["demos.jsonl"].append({**row, "solution": solution(chain, "expert")})
        oracle = {"source": "oracle", "sample": 0, "weight": 1.0}
        files["oracle.jsonl"].append({**row, "solution": solution(chain, "native"), **oracle})
    buckets = BUCKETS["tuning" if config.seed >= 100 else "benchmark"]
    for suite, (lengths, wordings) in SUITES.items():
        chains = unique(rng, config.benchmark_rows + config.benchmark_rows // len(SUITES), lengths, buckets, taken)
        rows = [
            {
                "id": f"{suite}-{i}",
                "problem": word_problem(chain, wordings[i % len(wordings)]),
                "answer": str(sum(chain)),
            }
            for i, chain in enumerate(chains)
        ]
        files[f"{suite}.jsonl"] = rows[: config.benchmark_rows]
        files["validation.jsonl"] += rows[config.benchmark_rows :]
    return files


def main():
    config = parse_config(Config, RANGES)
    check(config.hidden_size % 64 == 0, f"--hidden_size must be a multiple of 64, got {config.hidden_size}")
    folder = Path(config.output_dir)
    save_config(config, folder)
    rank, world, _ = init_distributed()
    check(world <= config.accumulate, f"--accumulate {config.accumulate} is too few for {world} processes")
    started = time.perf_counter()

    # --- 1. data ---
    for name, rows in data_files(config).items() if rank == 0 else ():
        if not (folder / name).exists():
            write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    # --- 2. base model ---
    base = folder / "base"
    if on_rank0(base.exists):
        if rank == 0:
            print(f"{base} is there already")
        return
    tokenizer = build_tokenizer(random.Random(f"tokenizer {config.seed}"))
    model = build_model(config, tokenizer)
    if rank == 0:
        print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(config, model, tokenizer)
    if rank == 0:  # all ranks have the same weights
        beside = base.with_name("base.partial")
        shutil.rmtree(beside, ignore_errors=True)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.rename(base)
        print(f"world: {time.perf_counter() - started:.0f} s, in {folder}")
    dist.barrier()


if __name__ == "__main__":
    run(main)
