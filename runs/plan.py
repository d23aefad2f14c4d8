"""Does a recipe fit the machine, and how long does it take? Tells before anything runs.

    echo "torchrun --nproc-per-node=8 sft.py --model Qwen/Qwen3-0.6B --data train.jsonl --output_dir out/sft" |
        python runs/plan.py --gpus 8 --gpu_gib 80 --rows 7473     # standard input: all stages in turn, one a line

Where there is no GPU it plans for this machine's CPU: a "GPU" is then a process, its memory an equal share of what is
free. Exit code 1 and a line for each moment that does not fit, with the numbers to lower. Memory was read off the code
and compared with updates on a CPU (tests/test_plan.py) and on one H100 (results/real.md). Hours follow from the
assumed speeds and all --steps, without prefill, grading and loading. b: bytes of a number in the forward pass (bf16: 2;
fp32, on a CPU: 4); what AdamW works on is fp32. weights = layers * layer + root; the root (embedding, final norm, head)
stays gathered through a pass.
"""

import importlib
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import sft as sft_script
from sft import check, parse_config, run

GIB = 2**30
SCORE_CHUNK = sft_script.token_logprobs.__defaults__[0]  # scoring leaves the chunk at its default
SUMS = "{:,.0f} tokens generated in {:.2f} hours, {:,.0f} trained in {:.2f} hours (with scoring)"
LOWER = "micro_batch_tokens head_chunk gpu_memory max_length max_model_len".split()  # in this order


@dataclass
class Config:
    gpus: int = 1  # GPUs of a node, one process each
    nodes: int = 1  # nodes
    gpu_gib: float = 0.0  # GiB of one GPU; 0: those of the smallest visible one, or a process's share of a CPU's memory
    spare_gib: float = 2.0  # assumed: GiB beside the trainer's tensors (CUDA context, NCCL's buffers, fragmentation)
    rows: int = 0  # rows of a data file that is not there yet
    prompt_tokens: int = 120  # assumed: mean tokens of a plain question with its template
    response_tokens: int = 250  # assumed: mean tokens of a solution, the expert's or a generated one
    tflops: float = 300.0  # assumed: peak of one GPU in bf16, 10^12 operations a second
    mfu: float = 0.3  # assumed: share of that peak that training and scoring reach
    decode_tokens_per_second: float = 8000.0  # assumed: generated tokens a second and GPU
    cpu: bool = False  # fp32; an engine keeps its memory during an update. Set where neither GPU nor --gpu_gib is there

    @property
    def b(self) -> int:
        return 4 if self.cpu else 2


# --- Memory of one of n GPUs, as {part: bytes} ---
def shape_of(source) -> SimpleNamespace:
    """Widths of a transformers config, and numbers of weights, counted on a model without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source)
    first, depth = model.model.layers[0], source.num_hidden_layers
    layer, weights = (sum(p.numel() for p in module.parameters()) for module in (first, model))
    keys, queries = (k * first.self_attn.head_dim for k in (source.num_key_value_heads, source.num_attention_heads))
    names = dict(layers=depth, layer=layer, weights=weights, root=weights - depth * layer)
    names |= dict(vocab=source.vocab_size, hidden=source.hidden_size, intermediate=source.intermediate_size)
    names |= dict(head=source.vocab_size * source.hidden_size, qk_norm=hasattr(first.self_attn, "q_norm"))
    return SimpleNamespace(**names, queries=queries, keys=keys, kv=2 * depth * keys)  # of all heads; kv: of a token


def saved_by_layer(s, b: int) -> int:
    """Bytes a token that a decoder layer keeps for its backward pass (sdpa without a mask: no T x T matrix)."""
    norms = 2 * (4 + 2 * b) * s.hidden + s.qk_norm * (4 + b) * (s.queries + s.keys)  # fp32 input, normalised, result
    attention = b * (2 * s.queries + 2 * s.keys)  # queries, keys, values, and the output, which is o_proj's input
    return norms + attention + b * 4 * s.intermediate  # gate, silu(gate), up, their product


def head_bytes(s, chunk: int, b: int, train: bool = True, models: int = 1) -> int:
    """The chunked head beside hidden states: fp32 copies of the weight, its gradient, (chunk, vocabulary) matrices."""
    copies, logits = models * (4 * s.head if b < 4 else 0), 4 * chunk * s.vocab  # .float() copies only bf16
    forward = (1 if models == 1 else 5) * logits  # one model's are worked on in place; a divergence keeps its parts
    backward = 4 * s.head + max(forward, b * s.head)  # the gradient, at last cast to b bytes
    return copies + (max(forward, backward) if train else forward)


def update(s, n: int, tokens: int, chunk: int, recompute: bool, b: int = 2, models: int = 1, **others) -> dict:
    """{moment: parts} of a step; all gradients are there from its second micro-batch on. models: 2 with a reference."""
    layer = tokens * saved_by_layer(s, b)
    saved = s.layers * (tokens * b * s.hidden if recompute else layer)
    final = models * tokens * (4 + 3 * b) * s.hidden  # the last norm, the head's input and its gradient
    passing = layer * recompute + tokens * b * 2 * (s.intermediate + s.hidden)  # in the last layer's backward
    waiting = b * (s.head + s.layer)  # gradients: that layer's, and the head's until the embedding's is there
    state = dict(weights=4 * s.weights / n, gradients=4 * s.weights / n, optimizer=8 * s.weights / n) | others
    moments = {
        "head": dict(gathered=b * s.root, activations=saved + final, head=head_bytes(s, chunk, b, models=models)),
        # on several GPUs the next layer is gathered ahead
        "layers": dict(gathered=b * (s.root + s.layer * min(n, 2)), activations=saved + passing, buffers=waiting),
        # reduction in fp32: input and a rank's share of the sum (one GPU: 3 copies)
        "root": dict(buffers=12 * s.root if n == 1 else (4 + b + 4 / n) * s.root),
        "optimizer": dict(buffers=4 * s.weights / n if b < 4 else 8 * s.head / n),  # roots of all (CPU: one) tensors
    }
    return {f"update ({name})": state | parts for name, parts in moments.items()}


def asked(s, n: int, tokens: int, b: int) -> dict:
    """A pass of a frozen model, with its root gathered: one MLP at work, the head without gradient."""
    passing = dict(activations=tokens * b * 3 * (s.intermediate + s.hidden), head=head_bytes(s, SCORE_CHUNK, b, False))
    return dict(frozen=b * s.weights / n, gathered=b * (s.root + s.layer * min(n, 2))) | passing


def cpu_engine(s) -> dict:
    """What vLLM holds on a CPU, where it does not sleep: weights, its own packing of the head, the cache."""
    cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", 1)) * GIB
    return dict(engine=4 * (s.weights + s.head), kv_cache=cache)


def engine(s, c, m: Config, passing: int = 8192, scores: bool = False) -> dict:
    """{moment: parts} of vLLM: the least it needs beside what it may not take; its share, all of which it takes."""
    # Its longest pass, estimated: `passing` tokens (start_engine's batched_tokens) with three states as wide as the MLP
    # and four hidden ones; seven fp32 copies of the logits in the sampler, for its default number of sequences; where
    # it scores, three of those of a whole pass.
    b, passing = m.b, max(passing, c.max_model_len) if m.cpu else passing
    states = passing * b * (3 * s.intermediate + 4 * s.hidden) + scores * 3 * 4 * s.vocab * passing
    working = states + 7 * 4 * s.vocab * (1024 if m.gpu_gib >= 70 and not m.cpu else 256)
    if m.cpu:
        return {"generate": cpu_engine(s) | dict(activations=working, spare=m.spare_gib * GIB)}
    held = b * s.weights + working
    sequence, share = b * s.kv * c.max_model_len, c.gpu_memory * m.gpu_gib * GIB  # one of full length must fit
    least = dict(engine=held, kv_cache=sequence, withheld=m.gpu_gib * GIB - share)
    return {"engine": least, "generate": dict(engine=held, kv_cache=share - held)}


def sharding(s, n: int, b: int) -> float:
    """Bytes while a model is sharded (load_model): one layer, or the root, is there as a whole beside shards."""
    return b * (s.weights / n + max(s.layer, s.root))


def padded(budget: int, rows: float, longest: int) -> int:
    """Tokens of one GPU's largest micro-batch: the budget, or one longest row, but no more than its rows can have."""
    return min(max(budget, longest), math.ceil(rows) * longest)


# --- Stages: flags c, shapes and rows r of the files they name -> moments, generated and trained tokens, operations ---
def mapper_rl(c, r, m: Config, n: int) -> tuple:
    s, maps, rollouts, spare = r.model, c.task == "map", c.groups * c.group_size, m.spare_gib * GIB
    expert = asked(r.target, n, padded(c.micro_batch_tokens, r.data / n, c.max_model_len), m.b)
    frozen = expert["frozen"] * maps + asked(s, n, 0, m.b)["frozen"] * (c.beta_kl > 0)
    moments, state = engine(s, c, m), dict(weights=4 * s.weights / n, optimizer=8 * s.weights / n)
    spared = dict(spare=spare) | (cpu_engine(s) if m.cpu else {})  # beside an update
    awake = moments["generate"]  # until the first update; a run that is resumed has its optimizer by then
    moments["load"] = awake | dict(weights=sharding(s, n, 4), spare=spare)
    moments["generate"] = awake | state | dict(frozen=frozen, buffers=(4 + 2) * s.head, spare=spare)  # sync: embedding
    moments |= {"score": awake | state | expert | dict(frozen=frozen, spare=spare)} if maps else {}
    tokens = padded(c.micro_batch_tokens, rollouts / n, c.max_model_len)
    row = min(c.micro_batch_tokens, c.max_model_len + (c.rollouts_per_row - 1) * c.max_tokens)
    mask = 2 * tokens * row * (c.rollouts_per_row > 1)  # which tokens of its row each token sees
    moments |= update(s, n, tokens, c.head_chunk, c.gradient_checkpointing, m.b, frozen=frozen, mask=mask, **spared)
    text = min(m.response_tokens, c.max_tokens)
    prompt = m.prompt_tokens + m.response_tokens * maps  # the mapper is shown the expert's solution
    length = prompt / min(c.rollouts_per_row, c.group_size) + text
    again = 2 * (c.passes > 1) + 2 * (c.beta_kl > 0)  # scored before the update, each rollout behind its own prompt
    work = (6 + 2 * c.gradient_checkpointing) * c.passes * length + again * (prompt + text)
    # operations a step, and of the experts' texts before the first one
    step = rollouts * (work * s.weights + 2 * r.target.weights * (m.prompt_tokens + text) * maps)
    experts = 2 * r.target.weights * r.data * (m.prompt_tokens + m.response_tokens) * maps
    seconds = rollouts * text / (m.decode_tokens_per_second * n) + step / (m.tflops * 1e12 * m.mfu * n)
    steps = min(c.steps, math.ceil(c.max_seconds / seconds) if c.max_seconds else math.inf)
    return moments, steps * rollouts * text, steps * rollouts * c.passes * length, steps * step + experts


def rewrite(c, r, m: Config, n: int) -> tuple:
    data, text = min(r.data, c.limit or math.inf), min(m.response_tokens, c.max_tokens)
    each = c.samples * (2 if c.method == "resolve" else 1)  # at most: the second prompt is for the unsolved only
    moments = engine(r.mapper, c, m, passing=2048, scores=True)
    if c.mapper != c.target:  # another engine takes the first one's place
        moments |= {f"{k} (score)": parts for k, parts in engine(r.target, c, m, passing=2048, scores=True).items()}
    scored = data * (c.share * each * (m.prompt_tokens + text) + m.prompt_tokens + m.response_tokens)
    return moments, data * c.share * each * text, 0, 2 * r.target.weights * scored


def sft(c, r, m: Config, n: int) -> tuple:
    s, anchored, recompute, spare = r.model, c.anchor > 0, c.gradient_checkpointing, m.spare_gib * GIB
    # the reference's root stays gathered: its head is used behind its pass
    frozen = anchored * (asked(s, n, 0, m.b)["frozen"] + m.b * s.root)
    tokens = padded(c.micro_batch_tokens, c.batch_size / n, c.max_length)
    moments = update(s, n, tokens, c.head_chunk, recompute, m.b, 1 + anchored, frozen=frozen, spare=spare)
    moments["load"] = dict(weights=sharding(s, n, 4), spare=spare)
    length, steps = m.prompt_tokens + m.response_tokens, c.steps or math.ceil(c.epochs * r.data / c.batch_size)
    trained = steps * c.batch_size * length
    return moments, 0, trained, (6 + 2 * recompute + 2 * anchored) * s.weights * trained


def evaluate(c, r, m: Config, n: int) -> tuple:
    check(c.models, "evaluate.py without --models only compares: leave this line out")
    answers = sum(min(count, c.limit or count) for count in r.benchmarks) * len(r.models) * (c.samples + c.greedy)
    return engine(r.models[0], c, m), answers * min(m.response_tokens, c.max_tokens), 0, 0


def read_line(line: str, m: Config) -> tuple:
    """A command line -> function above and Config of its stage, which itself refuses flags that it does not have."""
    words, stages = shlex.split(line), {f"{stage.__name__}.py": stage for stage in (mapper_rl, rewrite, sft, evaluate)}
    script = next((word for word in words if Path(word).name in stages), None)
    check(script, f"no stage in this line, it must start one of {', '.join(stages)}: {line}")
    processes = re.search(r"--nproc[-_]per[-_]node[= ](\d+)", line)
    check(not processes or int(processes[1]) == m.gpus, f"--gpus {m.gpus} is not what this asks for: {line}")
    sys.argv = words[words.index(script) :]
    module = importlib.import_module(Path(script).stem)
    return stages[Path(script).name], parse_config(module.Config, module.RANGES)


def read_files(c, m: Config, written: dict) -> SimpleNamespace:
    """Shapes of the models and rows of the data that a stage's flags name. `written`: {output_dir: shape}, and {path:
    most rows} of training sets, so far."""

    def shape(folder: str):
        try:
            return written.get(Path(folder).parent) or shape_of(AutoConfig.from_pretrained(folder))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SystemExit(f"{folder}: no such model, and no stage before writes it ({reason})") from None

    def rows(path: str, otherwise: int) -> int:
        if Path(path).is_file():
            return sum(bool(line.strip()) for line in Path(path).read_bytes().split(b"\n"))
        check(otherwise, f"{path} is not there yet: give --rows, the number of rows that it will have")
        print(f"    {path} is not there yet: taken to have {otherwise} rows")
        return otherwise

    r = SimpleNamespace(**{k: shape(v) for k, v in vars(c).items() if k in ("model", "target", "mapper")})
    r.models = [shape(model.partition("=")[2] or model) for model in getattr(c, "models", [])]
    r.benchmarks = [rows(path, 500) for path in getattr(c, "benchmarks", [])]
    r.data = rows(c.data, written.get(Path(c.data)) or m.rows) if hasattr(c, "data") else 0
    written[Path(c.output_dir)] = getattr(r, "model", None)
    if hasattr(c, "method"):  # rewrite.py; RASFT may keep the expert's text and all rollouts
        rows_each = 1 + c.samples * (c.method == "rasft")
        written[Path(c.output_dir) / "train.jsonl"] = min(r.data, c.limit or r.data) * rows_each
    return r


def remedy(stage, c, r, m: Config, n: int) -> str:
    """Numbers with which a stage fits: of LOWER in turn what helps, as little as need be, then more GPUs."""

    def lacking(flags: dict, n: int) -> float:
        moments = stage(SimpleNamespace(**vars(c) | flags), r, m, n)[0]
        return sum(max(sum(parts.values()) - m.gpu_gib * GIB, 0) for parts in moments.values())

    flags: dict = {}
    for flag in filter(vars(c).get, LOWER):
        shares = sorted([i / 20 for i in range(1, 20)], key=lambda share: abs(share - getattr(c, flag)))
        values = shares if flag == "gpu_memory" else [getattr(c, flag) // 2**i or 1 for i in range(12)]
        flags[flag] = min(values, key=lambda value: lacking(flags | {flag: value}, n))
    enough = next((n << i for i in range(1 if m.cpu else 11) if not lacking(flags, n << i)), 0)
    for flag in reversed(list(flags)):
        if not lacking({k: v for k, v in flags.items() if k != flag}, enough or n):
            del flags[flag]
    told = [f"--{flag} {value}" for flag, value in flags.items()] + [f"{enough} GPUs"] * (enough > n)
    return "take " + (" ".join(told) if enough else f"{'more memory' if m.cpu else 'larger GPUs'} or a smaller model")


def main():
    m = parse_config(Config, {"(0, inf)": "gpus nodes tflops mfu decode_tokens_per_second"})
    visible = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    m.cpu = m.cpu or not (visible or m.gpu_gib)
    enough = m.cpu or m.gpu_gib or m.gpus <= len(visible)
    check(enough, f"there are {len(visible)} GPUs here, not {m.gpus}: lower --gpus (in a recipe MACHINE=NODESxGPUS)")
    if not m.gpu_gib:
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
        m.gpu_gib = (free / m.gpus if m.cpu else min(visible)) / GIB
    n, written, misfits, totals = m.gpus * m.nodes, {}, [], [0.0] * 4
    for line in filter(str.strip, sys.stdin):
        print(f"\n{line.strip()}")
        stage, c = read_line(line, m)
        r = read_files(c, m, written)
        moments, generated, trained, operations = stage(c, r, m, n)
        columns = list(dict.fromkeys(part for parts in moments.values() for part in parts))
        head = f"GiB of a {'process' if m.cpu else 'GPU'}"
        print(f"{head:<20}" + "".join(f"{part:>12}" for part in [*columns, "sum"]))
        for moment, parts in moments.items():
            need = sum(parts.values()) / GIB
            cells = [parts.get(part, 0) / GIB for part in columns] + [need]
            print(f"{moment:<20}" + "".join(f"{cell:>12.2f}" for cell in cells))
            if need > m.gpu_gib:
                told = remedy(stage, c, r, m, n)
                misfits.append(f"{stage.__name__}, {moment}: needs {need:.1f} GiB, there are {m.gpu_gib:.1f}: {told}")
        if "engine" in moments:  # on a GPU
            one, cache = (moments[moment]["kv_cache"] for moment in ("engine", "generate"))
            print(f"KV cache: {cache / one:.1f} sequences of max_model_len, {one / c.max_model_len:.0f} bytes a token")
        training = operations / (m.tflops * 1e12 * m.mfu * n) / 3600
        work = [generated, generated / (m.decode_tokens_per_second * n) / 3600, trained, training]
        totals = [a + b for a, b in zip(totals, work)]
        print(SUMS.format(*work))
    print("\nIn all: " + SUMS.format(*totals))
    print("assumed: " + ", ".join(f"{name} {value:g}" for name, value in vars(m).items()), *misfits, sep="\n")
    sys.exit(bool(misfits))


if __name__ == "__main__":
    run(main)
