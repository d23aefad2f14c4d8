"""runs/plan.py: its memory against the measured peak of real updates, its numbers against numbers worked out by hand.

The measurement is a fresh process on the CPU: sft.load_model (FSDP2, one process), one tiny update that makes the
optimizer's state, then an update of two micro-batches, whose peak is read from the kernel (VmHWM).
"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runs")]

import plan  # noqa: E402

ROW = 256  # tokens in a row of the measured updates
MEASURED = {  # the moment that is its peak: kind, widths, rows in the micro-batch, head_chunk, checkpointing, processes
    "layers, many activations": (
        "Qwen3",
        dict(vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
             num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
        7, 256, False, 1,
    ),
    "head, many logits": (
        "Llama",
        dict(vocab_size=65536, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=4, tie_word_embeddings=True),
        3, 512, False, 1,
    ),
    "layers": (
        "Qwen2",
        dict(vocab_size=4096, hidden_size=256, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
             num_key_value_heads=4, tie_word_embeddings=False),
        10, 256, True, 1,
    ),
    "root": (
        "Qwen3",
        dict(vocab_size=65536, hidden_size=160, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=40, tie_word_embeddings=False),
        2, 64, True, 1,
    ),
}  # fmt: skip
MEASURED["root, two processes"] = (*MEASURED["root"][:-1], 2)


def status(name: str) -> int:
    """Bytes of this process: RssAnon, VmRSS (with the files it has mapped) now, VmHWM at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(folder: str, rows: int, chunk: int, recompute: bool) -> dict:
    """Bytes: `resting` (weights and optimizer's state, between two updates), `update` (what one takes beyond that)."""
    import torch

    import sft

    device = sft.init_distributed()[2]
    before = status("RssAnon")
    model = sft.load_model(folder, device, train=True, gradient_checkpointing=recompute)
    optimizer = torch.optim.AdamW(model.parameters())

    def backward(rows: int) -> None:
        input_ids = torch.randint(0, model.config.vocab_size, (rows, ROW))
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        mask[:, 0] = False
        (-model.token_logprobs(input_ids, mask, chunk=chunk).mean()).backward()

    backward(1)
    optimizer.step()
    optimizer.zero_grad()
    resting, now = status("RssAnon") - before, status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    backward(1)
    backward(rows)
    optimizer.step()
    return dict(resting=resting, update=status("VmHWM") - now)


def model_config(kind: str, **widths):
    import transformers

    return getattr(transformers, f"{kind}Config")(**widths)


@pytest.mark.parametrize("moment", MEASURED)
def test_update_memory_is_what_an_update_takes(moment, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    kind, widths, rows, chunk, recompute, processes = MEASURED[moment]
    config = model_config(kind, **widths)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    # without this glibc keeps freed blocks, and what was freed would count as used
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, __file__, tmp_path, rows, chunk, int(recompute)]
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads((tmp_path / "measured.json").read_text())

    moments = plan.update(plan.shape_of(config), processes, rows * ROW, chunk, recompute, b=4)
    name = max(moments, key=lambda name: sum(moments[name].values()))
    resting = moments[name]["weights"] + moments[name]["optimizer"]
    update = sum(moments[name].values()) - resting
    print(f"\n{moment}: MiB at rest {resting / 2**20:.0f}, measured {measured['resting'] / 2**20:.0f};", end=" ")
    print(f"{name} {update / 2**20:.0f}, measured {measured['update'] / 2**20:.0f}")
    assert name == f"update ({moment.split(',')[0]})"  # so that every moment but the optimizer's is a peak once
    assert measured["update"] > 200 * 2**20  # enough to be counted in pages
    assert measured["update"] == pytest.approx(update, rel=0.2)
    assert sum(measured.values()) == pytest.approx(update + resting, rel=0.2)


def test_weights_gradients_optimizer_and_head_by_hand():
    config = model_config(
        "Qwen3", vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, tie_word_embeddings=True,
    )  # fmt: skip
    s = plan.shape_of(config)
    # q and o 64 each, k and v 32 each, their norms 4 each, MLP 3 * 128, norms 8 each; embedding 800, last norm 8
    assert (s.layer, s.root, s.weights) == (600, 808, 2008)
    one, eight = (plan.update(s, n, tokens=32, chunk=16, recompute=True) for n in (1, 8))
    for moments, n in ((one, 1), (eight, 8)):
        for parts in moments.values():
            assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (8032 / n, 8032 / n, 16064 / n)
    # bf16: the root, and one layer, or two of them on several GPUs
    assert one["update (layers)"]["gathered"] == 2 * (808 + 600)
    assert eight["update (layers)"]["gathered"] == 2 * (808 + 2 * 600)
    # an fp32 copy of the head, its fp32 gradient, a (16, 100) matrix
    assert one["update (head)"]["head"] == 4 * 800 + 4 * 800 + 4 * 16 * 100
    # reduced in fp32. Sharded: the bf16 gradient and an eighth of the sum; one GPU: input, quotient and output
    assert one["update (root)"]["buffers"] == 12 * 808
    assert eight["update (root)"]["buffers"] == 6.5 * 808
    # per token and layer in bf16: 2 norms (fp32 input, bf16 normalised, bf16 result), norms of q (8) and k (4),
    # q, k, v, output, 4 of the MLP; what stays of a recomputed layer is its bf16 input
    saved = 2 * 8 * (4 + 2 + 2) + 12 * (4 + 2) + 2 * (8 + 4 + 4 + 8) + 4 * 2 * 16
    assert plan.saved_by_layer(s, 2) == saved
    backward = 2 * 2 * (16 + 8)
    assert one["update (layers)"]["activations"] == 32 * (2 * 8 * 2 + saved + backward)
    whole = plan.update(s, 1, tokens=32, chunk=16, recompute=False)
    assert whole["update (layers)"]["activations"] == 32 * (2 * saved + backward)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(lines, flag=value, ...) -> (exit code, standard output, standard error) of plan.py, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*lines, **flags) -> tuple[int, str, str]:
        flags = dict(gpu_gib=80, rows=1000) | flags
        monkeypatch.setattr(sys, "argv", ["plan.py", *(w for k, v in flags.items() for w in (f"--{k}", str(v)))])
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        with pytest.raises(SystemExit) as end:
            plan.main()
        code, (out, err) = end.value.code, capsys.readouterr()
        if isinstance(code, str):  # as sft.run prints it
            code, err = 2, f"{err}{sys.argv[0]}: {code}\n"
        return code, out, err

    return run


@pytest.fixture
def base(tmp_path) -> str:
    """A folder with the config of Qwen3-0.6B, no weights: 751,632,384 - 155,582,464 of them, for it ties its head."""
    model_config(
        "Qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "base")  # fmt: skip
    return "base"


WEIGHTS = 596_049_920  # of Qwen3-0.6B


def hours(output: str) -> list[list[float]]:
    """[tokens generated, hours, tokens trained, hours] of each stage and of all."""
    found = re.findall(r"([\d,]+) tokens generated in ([\d.,]+) hours, ([\d,]+) trained in ([\d.,]+) hours", output)
    return [[float(number.replace(",", "")) for number in numbers] for numbers in found]


def test_kv_cache_and_sequences_by_hand(run, base):
    line = f"evaluate.py --models {base} --benchmarks b.jsonl --output_dir e --gpu_memory 0.5 --max_model_len 4096"
    code, out, _ = run(line, gpu_gib=40)
    assert code == 0
    token = 2 * 28 * 8 * 128 * 2  # keys and values, layers, heads, head_dim, bytes
    workspace = 8192 * 2 * (3 * 3072 + 4 * 1024) + 256 * 151936 * 4 * 7
    sequences = (20 * 2**30 - 2 * WEIGHTS - workspace) / (token * 4096)
    assert f"KV cache: {sequences:.1f} sequences of max_model_len, {token} bytes a token" in out


def misfit(out: str) -> str:
    """What the last line tells to take."""
    return out.rstrip().splitlines()[-1].partition(": take ")[2]


@pytest.mark.parametrize(
    "line, flags, named",
    [
        ("sft.py --data d --output_dir o --max_length 1024", dict(gpu_gib=24), "--micro_batch_tokens"),
        ("sft.py --data d --output_dir o --micro_batch_tokens 64 --max_length 64 --head_chunk 32768",
         dict(gpu_gib=24), "--head_chunk"),
        ("sft.py --data d --output_dir o --max_length 64 --batch_size 1024 --micro_batch_tokens 2048 "
         "--head_chunk 16384", dict(gpus=8, gpu_gib=15), "--micro_batch_tokens"),  # either flag would do
        ("rewrite.py --target base --data d --output_dir o --gpu_memory 0.05", dict(gpu_gib=14), "--gpu_memory"),
        ("mapper_rl.py --task solve --data d --output_dir o --gpu_memory 0.9", dict(gpus=8, gpu_gib=24),
         "--gpu_memory"),
        ("mapper_rl.py --data d --output_dir o --gpu_memory 0.05", dict(gpus=8, gpu_gib=24), "--gpu_memory"),
        ("sft.py --data d --output_dir o --micro_batch_tokens 64 --max_length 64 --head_chunk 1", dict(gpu_gib=11), ""),
    ],
)  # fmt: skip
def test_a_misfit_names_the_number_to_lower_and_with_it_the_recipe_fits(run, base, line, flags, named):
    script = line.split()[0]
    line = line if script == "rewrite.py" else f"{line} --model {base}"
    code, out, _ = run(line, **flags)
    told = out.rstrip().splitlines()[-1]
    assert code == 1 and told.startswith(script.removesuffix(".py"))
    need, there = map(float, re.search(r": needs ([\d.]+) GiB, there are ([\d.]+):", told).groups())
    assert need > there == flags["gpu_gib"]
    if not named:  # no flag of the stage helps
        gpus = re.fullmatch(r"(\d+) GPUs", misfit(out))[1]
        assert run(line, **flags | dict(gpus=gpus))[0] == 0
        assert run(line, **flags | dict(gpus=int(gpus) // 2))[0] == 1
        return
    flag, value = misfit(out).split()
    assert flag == named
    code, out, _ = run(f"{line} {flag} {value}", **flags)
    assert code == 0 and "needs" not in out
    if flag != "--gpu_memory":  # and it is no lower than need be
        assert run(f"{line} {flag} {2 * int(value)}", **flags)[0] == 1


def test_what_a_plan_refuses(run, base):
    line = f"sft.py --model {base} --data d --output_dir o"
    for bad, flags, told in (
        (
            f"torchrun --standalone --nproc-per-node=8 {line} --head_chunks 3",
            dict(gpus=8),
            "sft.py: unknown flag: --head",
        ),
        (f"torchrun --nproc-per-node 4 {line}", dict(gpus=8), "--gpus 8 is not what this asks for"),
        (f"{line} --batch_size 0", {}, "--batch_size must be in [1, inf)"),
        ("sft.py --model nowhere/at_all --data d --output_dir o", {}, "nowhere/at_all: no such model"),
        (line, dict(rows=0), "give --rows"),
        ("python train.py", {}, "no stage in this line"),
        (line, dict(mfu=0), "--mfu must be in (0, inf)"),
    ):
        code, _, error = run(bad, **flags)
        assert code == 2 and told in error and error.count("\n") == 1, (bad, error)


def test_tokens_and_hours_by_hand(run, base, tmp_path):
    Path("two.jsonl").write_text("{}\n{}\n\n")
    machine = dict(gpus=4, nodes=2, tflops=0.1, mfu=0.5, decode_tokens_per_second=10, prompt_tokens=100)
    machine |= dict(response_tokens=200, rows=640)
    rate, decode = 8 * 0.1e12 * 0.5 * 3600, 8 * 10 * 3600  # an hour, on 8 GPUs
    code, out, _ = run(
        f"mapper_rl.py --model {base} --data demos --output_dir out/m --steps 10 --groups 8 --group_size 4 "
        "--rollouts_per_row 3",
        f"mapper_rl.py --task solve --model {base} --data demos --output_dir out/r --steps 10 --groups 8 "
        "--group_size 4 --gradient_checkpointing False --rollouts_per_row 1",
        f"rewrite.py --mapper out/m/model --target {base} --data demos --output_dir out/w --samples 4 --limit 100",
        f"sft.py --model {base} --data out/w/train.jsonl --output_dir out/s --epochs 2 --batch_size 32",
        f"sft.py --model {base} --data demos --output_dir out/t --steps 5 --gradient_checkpointing True --loss asft",
        f"evaluate.py --models base={base} s=out/s/model --benchmarks two.jsonl there --output_dir e --max_tokens 50",
        **machine,
    )
    assert code == 0
    assert "there is not there yet: taken to have 500 rows" in out and "two.jsonl is not" not in out
    rollouts = 10 * 8 * 4
    expected = [  # tokens generated, trained, operations a weight
        # three rollouts share the 300 tokens of a prompt in the update
        (rollouts * 200, rollouts * 300, 8 * rollouts * 300 + 2 * rollouts * 300 + 2 * 640 * 300),
        (rollouts * 200, rollouts * 300, 6 * rollouts * 300),
        (100 * 4 * 200, 0, 2 * 100 * 5 * 300),
        (0, 7 * 32 * 300, 6 * 7 * 32 * 300),  # two epochs of the 100 rows that rewriting leaves
        (0, 5 * 32 * 300, (6 + 2 + 2) * 5 * 32 * 300),
        (2 * 502 * 5 * 50, 0, 0),
    ]
    rows = [(g, g / decode, t, operations * WEIGHTS / rate) for g, t, operations in expected]
    assert hours(out) == [[g, round(a, 2), t, round(b, 2)] for g, a, t, b in [*rows, map(sum, zip(*rows))]]


def test_steps_end_with_their_time_and_rasft_trains_on_more_rows(run, base):
    machine = dict(gpus=1, tflops=1, mfu=0.5, decode_tokens_per_second=100, prompt_tokens=100, response_tokens=200)
    line = f"mapper_rl.py --task solve --model {base} --data d --output_dir out/r --groups 8 --group_size 4 --steps 50"
    line += " --rollouts_per_row 1 --gradient_checkpointing False --max_seconds"
    generated, trained = 32 * 200, 32 * 300
    step = generated / 100 + 6 * WEIGHTS * trained / 0.5e12  # seconds: 64 + 69
    for limit, steps in ((0, 50), (0.9 * step, 1), (1.1 * step, 2), (1000 * step, 50)):
        _, out, _ = run(f"{line} {limit}", **machine)
        assert hours(out)[0][0::2] == [steps * generated, steps * trained]
    _, out, _ = run(
        f"rewrite.py --method rasft --mapper {base} --target {base} --data d --output_dir out/w --samples 3 --limit 64",
        f"sft.py --model {base} --data out/w/train.jsonl --output_dir out/s --epochs 1 --batch_size 32",
        **machine,
    )
    assert "taken to have 256 rows" in out and hours(out)[1][2] == 4 * 64 * 300


def parts(out: str) -> list[dict[str, dict[str, float]]]:
    """{moment: {part: GiB}} of each stage."""
    stages = []
    for block in out.split("GiB of a ")[1:]:
        head, *lines = block.splitlines()
        rows = [re.split(r"\s{2,}", line.strip()) for line in lines if re.search(r" \d+\.\d\d$", line)]
        columns = head.split()[1:]
        stages.append({row[0]: dict(zip(columns, map(float, row[1:]))) for row in rows if len(row) == len(columns) + 1})
    return stages


def test_a_cpu_has_fp32_and_an_engine_that_stays(run, base):
    lines = [
        f"mapper_rl.py --model {base} --data d --output_dir out/m",
        f"evaluate.py --models {base} --benchmarks d --output_dir e",
    ]
    code, out, _ = run(*lines, cpu=True, gpu_gib=60, gpus=2)
    assert code == 0 and out.count("GiB of a process") == 2
    held = 4 * (WEIGHTS + 155_582_464) / 2**30  # and the head, packed
    mapper, evaluation = parts(out)
    assert [*evaluation] == ["generate"]
    for moment, row in (*mapper.items(), *evaluation.items()):
        assert (row["engine"], row["kv_cache"]) == (pytest.approx(held, abs=0.006), 1.0), moment
        assert row["sum"] == pytest.approx(sum(v for k, v in row.items() if k != "sum"), abs=0.05)
    assert mapper["update (head)"]["frozen"] == pytest.approx(4 * WEIGHTS / 2 / 2**30, abs=0.006)  # half a target
    # its memory is a share of what is free; where it does not suffice, more processes do not help
    code, out, _ = run(lines[0], cpu=True, gpu_gib=0, gpus=2)
    free = 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) / 2 / 2**30
    assert float(re.search(r"gpu_gib ([\d.]+),", out)[1]) == pytest.approx(free, rel=0.3)
    code, out, _ = run(lines[0], cpu=True, gpu_gib=4)
    assert code == 1 and misfit(out) == "more memory or a smaller model"


def test_a_whole_recipe_fits(run, base):
    start = "torchrun --standalone --nproc-per-node=8 "
    lines = [
        start + f"mapper_rl.py --task map --model {base} --data demos.jsonl --output_dir out/mapper --steps 100",
        start + f"rewrite.py --mapper out/mapper/model --target {base} --data demos.jsonl --output_dir out/rewrites",
        start + f"sft.py --model {base} --data out/rewrites/train.jsonl --output_dir out/dart",
        start + f"evaluate.py --models base={base} dart=out/dart/model --benchmarks m.jsonl --output_dir out/eval",
    ]
    code, out, _ = run(*lines, gpus=8)
    assert code == 0 and all(line in out for line in lines)
    assert "assumed: gpus 8, nodes 1, gpu_gib 80" in out


if __name__ == "__main__":
    found = measure(sys.argv[1], *map(int, sys.argv[2:]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "measured.json").write_text(json.dumps(found))
