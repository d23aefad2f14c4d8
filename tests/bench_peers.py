"""Ours beside TRL 1.16 and vLLM: same model, rows, lengths, dtype, processes and threads, in turn.

    python tests/bench_peers.py --data gsm8k_train.jsonl                    # all that is below; 40 minutes
    python tests/bench_peers.py --data gsm8k_train.jsonl --what sft --vocab 151936 --rows 16 --rounds 1
    python tests/bench_peers.py --data gsm8k_train.jsonl --model FOLDER     # a pretrained one

    sft     one epoch of GSM8K demonstrations in batches of --batch: sft.py, TRL's SFTTrainer padded and packed
    grpo    steps of 64 completions: rollout, update and sync of mapper_rl.py, TRL's GRPOTrainer with its HF generation,
            and with vLLM in its process, if that starts
    engine  what evaluate.py and rewrite.py take for the same requests as vLLM's own `generate`

A random Qwen3 of 3.2 million weights and a byte-level tokenizer are made for it; only the number of rows of its
embedding changes with --vocab. TRL gets an environment of its own in OUT/peer, on top of this one. Each measurement is
a fresh run: on a CPU of two processes with a thread each, in fp32; on one GPU of one process, in bf16 with fp32 master
weights (TRL's `bf16=True`). Times are those of the steps, without start and saving. `limit` is the share of what this
machine reaches in a large product of that dtype, measured at the start of the same process, the operations being those
of a model that computes every token once: 6 a weight and token, attention, no padding. Memory is the process's, or
what PyTorch allocated of the GPU's.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
GROUPS, GROUP_SIZE = 8, 8
TRL = ["trl==1.16.0", "accelerate==1.15.0"]
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


# --- what both sides are given ---
def make_model(folder: Path, vocab: int) -> str:
    """A random Qwen3 whose embedding has `vocab` rows, with a tokenizer of 256 bytes and a few more."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=letters, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    special = dict(eos_token="</s>", pad_token="<pad>", additional_special_tokens=["<s>", "<a>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, **special)
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab, **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def operations(config, lengths: list[tuple[int, int]]) -> float:
    """Operations of training on (all tokens, tokens that the head sees) of each text: three times a pass forward."""
    from types import SimpleNamespace

    c = SimpleNamespace(**config)
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    layers = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    total = 0.0
    for tokens, seen in lengths:
        total += 2 * layers * tokens + 2 * c.hidden_size * c.vocab_size * seen
        total += 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * tokens**2  # causal: half of 4 T²
    return 3 * total


def gflops() -> float:
    """10^9 operations a second of this process in a large product, with the other processes at the same."""
    import torch

    size, where = (8192, dict(device="cuda", dtype=torch.bfloat16)) if on_gpu() else (1536, {})
    a, b = torch.randn(size, size, **where), torch.randn(size, size, **where)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times) / 1e9


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def wait() -> None:
    """Until the GPU has done what it was given."""
    import torch

    if on_gpu():
        torch.cuda.synchronize()


def peer_flags(a) -> dict:
    """What both of TRL's trainers are told."""
    flags = dict(output_dir=a.out, learning_rate=1e-4, lr_scheduler_type="constant", optim="adamw_torch_fused")
    flags |= dict(use_cpu=not on_gpu(), bf16=on_gpu(), fp16=False, model_init_kwargs={"dtype": "float32"})
    return flags | dict(gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True)


def tell(out: str, **figures) -> None:
    """This rank's figures, for the parent to read."""
    import torch

    import mapper_rl

    peak = mapper_rl.peak_memory(torch.device("cuda" if on_gpu() else "cpu")) / 2**20
    text = json.dumps(figures | {"peak_mib": peak})
    Path(out, f"told-{os.environ['RANK']}.json").write_text(text)


# --- the runs, each in processes of its own ---
def ours_sft(a) -> None:
    """sft.py as it is, timed by its own log."""
    import sft

    speed = gflops()
    out = Path(a.out, "run")
    flags = dict(model=a.model, data=a.rows_file, output_dir=out, epochs=1, batch_size=a.batch, lr=1e-4)
    flags |= dict(save_every=0, max_length=2048, micro_batch_tokens=a.micro_batch_tokens)
    sys.argv = ["sft.py", *(w for k, v in flags.items() for w in (f"--{k}", str(v)))]
    sft.main()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tell(a.out, seconds=sum(row["seconds"] for row in rows), gflops=speed, loss=[rows[0]["loss"], rows[-1]["loss"]])


def timed_steps(trainer) -> list[float]:
    """Trains, and gives the seconds of every step."""
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            wait()
            times.append(time.perf_counter() - self.start)

    trainer.add_callback(Clock())
    trainer.train()
    return times


def trl_sft(a) -> None:
    """TRL's SFTTrainer on the same prompts and responses; --packed packs them into rows of 1024."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import reward

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    rows = [json.loads(line) for line in Path(a.rows_file).read_text().splitlines()]
    ids = [reward.text_ids(tokenizer, row["problem"], row["solution"]) for row in rows]
    data = Dataset.from_list(
        [dict(input_ids=p + r, completion_mask=[0] * len(p) + [1] * len(r), labels=[-100] * len(p) + r) for p, r in ids]
    )
    world, speed, losses = int(os.environ["WORLD_SIZE"]), gflops(), []

    class Losses(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    flags = peer_flags(a) | dict(num_train_epochs=1, logging_steps=1)
    flags |= dict(per_device_train_batch_size=a.batch // world if not a.packed else max(1, a.batch // world // 2))
    flags |= dict(max_length=1024 if a.packed else 2048, packing=a.packed, completion_only_loss=True)
    trainer = SFTTrainer(a.model, args=SFTConfig(**flags), train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(Losses())
    times = timed_steps(trainer)
    tell(a.out, seconds=sum(times), gflops=speed, loss=[losses[0], losses[-1]])


def grpo_prompts(tokenizer, length: int) -> list[list[int]]:
    """As many prompts of `length` tokens as a step has groups, of letters that the tokenizer gives back."""
    generator = random.Random(0)
    texts = ["".join(generator.choice("abcdefgh 123") for _ in range(4 * length)) for _ in range(GROUPS)]
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts]


def ours_grpo(a) -> None:
    """Steps of mapper_rl.py's own functions with advantages that cost nothing and drop no group."""
    import torch
    import torch.distributed as dist
    from transformers import AutoTokenizer

    import mapper_rl
    import reward

    *_, device = mapper_rl.init_distributed()
    rank, world, speed = dist.get_rank(), dist.get_world_size(), gflops()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    flags = dict(model=a.model, data="none", output_dir=a.out, groups=GROUPS, group_size=GROUP_SIZE, lr=1e-4)
    flags |= dict(max_tokens=a.completion, max_model_len=a.prompt + a.completion + 8, gradient_checkpointing=False)
    flags |= dict(micro_batch_tokens=a.micro_batch_tokens, rollouts_per_row=a.rollouts_per_row)
    config = mapper_rl.Config(**flags)
    vocab = reward.used_vocabulary(tokenizer)
    llm = mapper_rl.start_engine(a.model, config.max_model_len, device, vocab, 0.4, 0)
    policy = mapper_rl.load_model(a.model, device, train=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=True)
    rows = [{"prompt_ids": ids} for ids in grpo_prompts(tokenizer, a.prompt)]
    times = []
    for step in range(a.steps):
        clock = [time.perf_counter()]
        mapper_rl.sync_weights(policy, llm, mapper_rl.compute_dtype(device))
        wait()
        clock.append(time.perf_counter())
        places = list(range(step * GROUPS, (step + 1) * GROUPS))
        mine = list(range(GROUPS))[rank::world]
        rollouts = mapper_rl.rollouts_of(llm, tokenizer, rows, places[rank::world], mine, config)
        clock.append(time.perf_counter())
        rollouts = mapper_rl.gather(rollouts)
        generator = random.Random(step)
        rollouts = [r | {"advantage": generator.gauss(0, 1)} for r in rollouts]
        mapper_rl.update(policy, None, optimizer, rollouts, config, vocab, device)
        wait()
        clock.append(time.perf_counter())
        times.append([b - a for a, b in zip(clock, clock[1:])])
    sync, rollout, update = (statistics.mean(t[k] for t in times[1:]) for k in range(3))
    figures = dict(seconds=sync + rollout + update, sync=sync, rollout=rollout, update=update, gflops=speed)
    tell(a.out, **figures, first=sum(times[0]))
    dist.barrier()
    dist.destroy_process_group()


def trl_grpo(a) -> None:
    """TRL's GRPOTrainer on the same prompts, with a reward that costs nothing and drops no group."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    prompts = [tokenizer.decode(ids) for ids in grpo_prompts(tokenizer, a.prompt)] * a.steps
    world, speed = int(os.environ["WORLD_SIZE"]), gflops()

    def chance(completions, **_) -> list[float]:
        return [random.random() for _ in completions]

    flags = peer_flags(a) | dict(max_steps=a.steps, shuffle_dataset=False)
    flags |= dict(per_device_train_batch_size=GROUPS * GROUP_SIZE // world, num_generations=GROUP_SIZE, beta=0.0)
    flags |= dict(max_completion_length=a.completion, temperature=1.0, top_k=0)
    if a.vllm:
        flags |= dict(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3)
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = GRPOTrainer(a.model, chance, args=GRPOConfig(**flags), train_dataset=data, processing_class=tokenizer)
    times = timed_steps(trainer)
    tell(a.out, seconds=statistics.mean(times[1:]), first=times[0], gflops=speed)


def engine(a) -> None:
    """Seconds of one engine for the same requests: vLLM's `generate`, then the stages' own loops, in turn."""
    from types import SimpleNamespace

    import torch.distributed as dist

    import evaluate
    import reward
    import rewrite

    rank, world, device = evaluate.init_distributed()
    speed, tokenizer = gflops(), reward.load_tokenizer(a.model)
    vocab = reward.used_vocabulary(tokenizer)
    llm = evaluate.start_engine(a.model, 2048, device, vocab, 0.4, 0)
    rows = [json.loads(line) for line in Path(a.rows_file).read_text().splitlines()][rank::world]
    config = SimpleNamespace(max_tokens=128, max_model_len=2048, samples=4, temperature=1.0, greedy=False, seed=0)
    prompts = [reward.prompt_ids(tokenizer, reward.solve_prompt(row["problem"])) for row in rows]
    seeds = [evaluate.request_seed(0, row["id"]) for row in rows]
    params = [evaluate.sampling(tokenizer, 4, 1.0, 128, seed) for seed in seeds]
    expert = [(row["problem"], row["solution"]) for row in rows]
    scored = [sum(reward.text_ids(tokenizer, *pair), []) for pair in expert]
    out = Path(a.out, f"rank{rank}")
    out.mkdir()
    from vllm import SamplingParams

    score = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)

    def raw(ids, params):
        llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)

    jobs = [("bench", row | {"weights": ""}, ids) for row, ids in zip(rows, prompts)]
    mine = {
        "vllm, generating": lambda: raw(prompts, params),
        "evaluate.py": lambda: evaluate.evaluate(llm, config, tokenizer, jobs, out),
        "rewrite.py, generating": lambda: rewrite.write_texts(
            llm, config, tokenizer, list(zip(rows, prompts)), "self", out
        ),
        "vllm, scoring": lambda: raw(scored, score),
        "rewrite.py, scoring": lambda: list(rewrite.mean_aligns(llm, tokenizer, expert, 2048)),
    }
    raw(prompts[:8], params[:8])
    figures = {}
    for name, work in mine.items():
        llm.reset_prefix_cache()
        dist.barrier()
        start = time.perf_counter()
        work()
        figures[name] = time.perf_counter() - start
    tell(a.out, gflops=speed, **figures)
    dist.barrier()
    dist.destroy_process_group()


# --- the parent: makes what they need, runs them in turn, prints ---
def peer_python(out: Path) -> str:
    """An interpreter that has TRL on top of this environment's packages."""
    import sysconfig

    folder = out / "peer"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print("installing TRL ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        [packages] = folder.glob("lib/python3*/site-packages")
        (packages / "below.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps", *TRL]
        subprocess.run(pip, check=True)
        (folder / "complete").touch()
    return str(python)


def measure(python: str, child: str, out: Path, **flags) -> dict | None:
    """Runs a child in its processes and returns what they tell: the slowest's seconds, the largest's memory."""
    folder = out / "now"
    subprocess.run(["rm", "-rf", folder], check=True)
    folder.mkdir(parents=True)
    words = [w for k, v in flags.items() for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    launch = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={1 if on_gpu() else 2}"]
    command = [*launch, __file__, "--child", child, "--out", str(folder), *words]
    env = os.environ | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    env |= dict(OMP_WAIT_POLICY="PASSIVE", ACCELERATE_USE_CPU=str(not on_gpu()).lower())
    with open(out / "log.txt", "a") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    told = [json.loads(path.read_text()) for path in sorted(folder.glob("told-*.json"))]
    if done.returncode or not told:
        print(f"{child} {flags} failed: see {out / 'log.txt'}", flush=True)
        return None
    numbers = {k: max(t[k] for t in told) for k, v in told[0].items() if isinstance(v, float)}
    return told[0] | numbers | {"gflops": sum(t["gflops"] for t in told)}


def show(title: str, results: dict[str, list[dict]], columns: list[str]) -> None:
    """Medians and ranges; seconds also over the first system's, round by round."""
    print(f"\n{title}")
    first = next(iter(results))
    for name, runs in results.items():
        if not runs:
            print(f"  {name:<28} did not run")
            continue
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            if values:
                low, high = min(values), max(values)
                cells.append(f"{column} {statistics.median(values):.3g} [{low:.3g}, {high:.3g}]")
        ratios = [run["seconds"] / base["seconds"] for run, base in zip(runs, results[first])]
        told = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"  {name:<28} x {told}  " + "  ".join(cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="demonstrations: JSONL with id, problem, solution, answer")
    parser.add_argument("--model", default="", help="folder of a model; else random ones are made")
    parser.add_argument("--what", nargs="+", default=["sft", "grpo", "engine"])
    parser.add_argument("--vocab", nargs="+", type=int, default=[285, 32000])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of GRPO; the first is not counted")
    parser.add_argument("--batch", type=int, default=8, help="demonstrations in a batch of SFT")
    parser.add_argument("--micro_batch_tokens", type=int, default=4096)
    parser.add_argument("--rollouts_per_row", type=int, default=8)
    parser.add_argument("--out", default="out/peers")
    for flag in ("--child", "--rows_file"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--prompt", "--completion"):
        parser.add_argument(flag, type=int, help=argparse.SUPPRESS)
    for flag in ("--packed", "--vllm"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        globals()[a.child](a)
        sys.stdout.flush()
        os._exit(0)  # without what an engine that is alive does at Python's end

    import torch

    import reward

    out = Path(a.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    trl, own = peer_python(out), sys.executable
    rows_file = out / "rows.jsonl"
    chosen = Path(a.data).read_text(encoding="utf-8").splitlines()[: a.rows]
    rows_file.write_text("".join(line + "\n" for line in chosen))
    rows = [json.loads(line) for line in chosen]
    machine = torch.cuda.get_device_name() if on_gpu() else torch.backends.cpu.get_cpu_capability()
    print(f"{len(rows)} rows, {a.rounds} rounds, {machine}", flush=True)

    def keep(row: dict) -> None:
        with open(out / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def rounds(title: str, systems: dict, columns: list[str], lengths: list | None = None) -> None:
        results: dict[str, list[dict]] = {name: [] for name in systems}
        for _ in range(a.rounds):
            for name, (python, child, flags) in list(systems.items()):
                told = measure(python, child, out, **flags)
                if told is None:
                    del systems[name]  # nor will it run in the next round
                    continue
                if lengths:
                    told["limit"] = operations(shape, lengths) / told["seconds"] / told["gflops"] / 1e9
                results[name].append(told)
                keep(dict(title=title, name=name, **told))
        show(title, results, columns)

    for vocab in a.vocab if not a.model else [0]:
        folder = a.model or make_model(out / f"model-{vocab}", vocab)
        shape = json.loads(Path(folder, "config.json").read_text())
        tokenizer = reward.load_tokenizer(folder)
        flags = dict(model=folder, micro_batch_tokens=a.micro_batch_tokens)
        if "sft" in a.what:
            pairs = [reward.text_ids(tokenizer, row["problem"], row["solution"]) for row in rows]
            lengths = [(len(p) + len(r), len(r)) for p, r in pairs]
            data = flags | dict(rows_file=rows_file, batch=a.batch)
            systems = {"sft.py": (own, "ours_sft", data), "TRL, padded": (trl, "trl_sft", data)}
            systems["TRL, packed"] = (trl, "trl_sft", data | dict(packed=True))
            title = f"SFT, {shape['vocab_size']} columns, {sum(t for t, _ in lengths)} tokens"
            rounds(title, systems, ["seconds", "peak_mib", "limit"], lengths)
        for prompt, completion in ((100, 64), (300, 256)) if "grpo" in a.what else ():
            step = flags | dict(prompt=prompt, completion=completion, steps=a.steps)
            systems = {
                "mapper_rl.py": (own, "ours_grpo", step | dict(rollouts_per_row=a.rollouts_per_row)),
                "  its prompts once a rollout": (own, "ours_grpo", step | dict(rollouts_per_row=1)),
                "TRL, HF generation": (trl, "trl_grpo", step),
                "TRL, vLLM": (trl, "trl_grpo", step | dict(vllm=True)),
            }
            title = f"GRPO step, {shape['vocab_size']} columns, 64 completions of {completion}, prompts of {prompt}"
            rounds(title, systems, ["seconds", "rollout", "update", "sync", "first", "peak_mib"])
    if "engine" in a.what:
        folder = a.model or make_model(out / "model-285", 285)
        results = [measure(own, "engine", out, model=folder, rows_file=rows_file) for _ in range(a.rounds)]
        print("\nthe same requests")
        for name in results[0]:
            if "vllm" in name or ".py" in name:
                base = "vllm, scoring" if "scoring" in name else "vllm, generating"
                ratios, seconds = [r[name] / r[base] for r in results], [r[name] for r in results]
                told = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
                print(f"  {name:<28} x {told}  seconds {statistics.median(seconds):.3g}")
        keep(dict(title="engine", runs=results))


if __name__ == "__main__":
    main()
