"""Stage 3 against an implementation that does the obvious: whole logits, one row at a time, no chunks, no ranks."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import reward
import sft

ROOT = Path(__file__).parent.parent
TIMES = {"seconds", "tokens_per_second", "peak_memory"}


def make_rows(count: int) -> list[dict]:
    """Questions whose answers differ in length, some weighted 0 or 2."""
    rows = []
    for i in range(count):
        steps = " ".join(f"{i}+{k}={i + k}." for k in range(1 + 5 * i % 7))
        row = {"id": f"r{i}", "problem": f"Start with {i}. Add 3.", "solution": f"{steps} \\boxed{{{i + 3}}}"}
        rows.append(row | ({} if i % 4 == 3 else {"weight": float(i % 4)}))
    return rows


def write(path: Path, rows: list) -> str:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8", errors="surrogateescape")  # "\udcff": the lone byte 255
    return str(path)


def command(flags: dict) -> list[str]:
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def start(flags: dict, processes: int = 1) -> subprocess.Popen:
    """sft.py as a user starts it, in a process group of its own so that all of it can be killed."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(python + [str(ROOT / "sft.py"), *command(flags)], env=env, start_new_session=True, **pipes)


def finish(process: subprocess.Popen) -> str:
    try:
        output = process.communicate(timeout=400)[0]  # seconds, unless the machine is very busy
    finally:
        process.kill()  # nothing is left behind if it hung; torchrun's workers end with it
    assert process.returncode == 0, output
    return output


def train(monkeypatch, **flags) -> list[dict]:
    """sft.py's main in this process, a gloo group of one; returns the rows of metrics.jsonl."""
    monkeypatch.setattr(sys, "argv", ["sft.py", *command(flags)])
    try:
        sft.main()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.pop("RANK", None)  # by which init_distributed knows whether torchrun has started it
    return read_metrics(Path(flags["output_dir"]))


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(rows: list[dict], name: str = "loss") -> list[float]:
    return [row[name] for row in rows]


def weights_of(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def distance(a, b) -> float:
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def plain_training(model_folder: str, batches: list[list[dict]], lrs: list[float], power=0, clip=None, anchor=0):
    """The whole of stage 3 in its plainest form, in double precision. Returns losses, gradient norms and the model."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model, start = (AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    losses, norms = [], []
    for batch, lr in zip(batches, lrs):
        total, tokens = 0.0, 0
        for row in batch:
            question = (
                f"<|im_start|>user\n{row['problem']}\n\nReason step by step, and put your final answer within "
                "\\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
            )
            prompt = tokenizer.encode(question, add_special_tokens=False)
            answer = tokenizer.encode(row["solution"] + "<|im_end|>", add_special_tokens=False)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            logp = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            ref = start(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1).detach()
            mean = sum(logp[t, token].item() for t, token in zip(places, answer)) / len(answer)
            rho = min(max(math.exp(row["align"] - mean), clip[0]), clip[1]) if clip else 1.0
            for t, token in zip(places, answer):
                lp = logp[t, token]
                total = total - row.get("weight", 1.0) * rho * math.exp(power * lp.item()) * lp
                total = total + anchor * sum(ref[t].exp() * (ref[t] - logp[t]))
                tokens += 1
        loss = total / tokens
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, model


# --- the loss ---


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"loss": "sft"}, {}),
        ({"loss": "dft"}, dict(power=1)),
        ({"loss": "asft"}, dict(power=1, anchor=0.05)),
        ({"loss": "rasft"}, dict(power=1, clip=(0.4, 1.2))),
        ({"loss": "rasft", "power": 0.5, "anchor": 0.3, "rho_low": 0.1}, dict(power=0.5, anchor=0.3, clip=(0.1, 1.2))),
    ],
    ids=["sft", "dft", "asft", "rasft", "moved"],
)
def test_equals_plain_training(tiny_model, tmp_path, monkeypatch, flags, parts):
    # ratios below, inside and above the clips, which are reached through what the rows tell of the reference
    rows = [{"weight": 1.0, "align": (-8.0, -2.5, -0.1)[i % 3]} | row for i, row in enumerate(make_rows(7))]
    data = write(tmp_path / "data.jsonl", rows)
    flags = dict(model=tiny_model, data=data, steps=4, batch_size=3, lr=1e-3, warmup=0.5, seed=5) | flags
    got = train(monkeypatch, output_dir=tmp_path / "out", micro_batch_tokens=150, head_chunk=7, **flags)

    order = [[int(i) for i in sft.np.random.default_rng((5, epoch)).permutation(7)] for epoch in (0, 1)]
    stream = order[0] + order[1]
    batches = [[rows[i] for i in stream[3 * k : 3 * k + 3]] for k in range(4)]
    lrs = [0.5e-3, 1e-3, 1e-3, 0.55e-3]  # two steps of warm-up; the cosine at 0 and half way from 1e-3 to 1e-4
    losses, norms, model = plain_training(tiny_model, batches, lrs, **parts)
    assert curve(got, "lr") == pytest.approx(lrs, rel=1e-6)
    assert curve(got) == pytest.approx(losses, abs=2e-5)
    assert curve(got, "grad_norm") == pytest.approx(norms, rel=1e-3)
    trained = weights_of(tmp_path / "out/model")
    for name, weight in model.state_dict().items():
        assert (trained[name] - weight).abs().max() < 2e-4, name


def test_dft_is_ce_times_probability_with_the_gradient_of_minus_p():
    logprobs = torch.tensor([-0.1, -2.0, -7.0], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 0.5])
    loss = sft.token_loss(logprobs, weights, 1.0)
    assert torch.allclose(loss, -weights * logprobs.exp() * logprobs)
    loss.sum().backward()
    got, logprobs.grad = logprobs.grad, None
    (-weights * logprobs.exp()).sum().backward()
    assert torch.allclose(got, logprobs.grad)
    assert torch.equal(sft.token_loss(logprobs, weights, 0.0), -weights * logprobs)


def test_ratio_is_one_at_the_start_and_moves(tiny_model, tmp_path, monkeypatch):
    """RASFT's reference is one number a row, rewrite.py's A(y|x); while the model is still the reference, rho = 1."""
    tokenizer, rows = reward.load_tokenizer(tiny_model), [{"weight": 1.0} | row for row in make_rows(6)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for row in rows:
        prompt = reward.prompt_ids(tokenizer, reward.solve_prompt(row["problem"]))
        input_ids, mask = sft.collate([(prompt, reward.response_ids(tokenizer, row["solution"]))], "cpu")
        row["align"] = sft.token_logprobs(model, input_ids, mask).mean().item()
    flags = dict(model=tiny_model, data=write(tmp_path / "data.jsonl", rows), steps=5, batch_size=6, lr=1e-2)
    got = train(monkeypatch, loss="rasft", output_dir=tmp_path / "rasft", **flags)
    dft = train(monkeypatch, loss="dft", output_dir=tmp_path / "dft", **flags)
    assert got[0]["rho"] == pytest.approx(1, abs=1e-5)
    assert got[0]["loss"] == pytest.approx(dft[0]["loss"], rel=1e-5)
    assert got[0]["grad_norm"] == pytest.approx(dft[0]["grad_norm"], rel=1e-4)
    assert max(abs(rho - 1) for rho in curve(got, "rho")) > 0.1 and curve(dft, "rho") == [1.0] * 5


def test_weight_multiplies_the_numerator_only(tiny_model, tmp_path, monkeypatch):
    one, two = make_rows(7)[4:6]
    flags = dict(model=tiny_model, steps=1, lr=1e-3)

    def first(name, rows):
        data = write(tmp_path / f"{name}.jsonl", rows)
        return train(monkeypatch, data=data, output_dir=tmp_path / name, batch_size=len(rows), **flags)[0]

    alone = first("alone", [one | {"weight": 1.0}])
    other = first("other", [two | {"weight": 1.0}])
    mixed = first("mixed", [one | {"weight": 2.0}, two | {"weight": 0.0}])
    assert mixed["tokens"] == alone["tokens"] + other["tokens"]
    assert mixed["loss"] * mixed["tokens"] == pytest.approx(2 * alone["loss"] * alone["tokens"], rel=1e-5)
    assert mixed["grad_norm"] * mixed["tokens"] == pytest.approx(2 * alone["grad_norm"] * alone["tokens"], rel=1e-4)


def test_stop_is_learnt_and_padding_is_not(tiny_model):
    tokenizer = reward.load_tokenizer(tiny_model)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = [(reward.prompt_ids(tokenizer, "Q"), reward.response_ids(tokenizer, text)) for text in ("1+1=2", "7")]
    rows.append(([5, 6], [0, 7, 0]))  # a response may hold the very id that pads
    input_ids, mask = sft.collate(rows, "cpu")
    for i, (_, response) in enumerate(rows):
        assert input_ids[i][mask[i]].tolist() == response
    assert [response[-1] for _, response in rows[:2]] == [stop, stop]
    assert mask.sum() == sum(len(response) for _, response in rows) < mask.numel()


# --- the chunked head ---


@pytest.mark.parametrize("temperature, cut", [(1.0, 0), (0.7, 0), (1.3, 8)])
def test_chunked_head_equals_whole_logits(tiny_model, temperature, cut):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    vocab = model.config.vocab_size - cut
    input_ids = torch.randint(0, vocab, (3, 24))
    mask = torch.rand(3, 24) < 0.6
    mask[:, 0] = False
    coefficient = torch.rand(int(mask.sum()))

    logits = model(input_ids).logits[:, :-1, :vocab] / temperature
    plain = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0][mask[:, 1:]]
    (coefficient * plain).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    got = sft.token_logprobs(model, input_ids, mask, 5, temperature, vocab if cut else None)
    (coefficient * got).mean().backward()
    assert (got - plain).abs().max() < 1e-5
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).abs().max() < 1e-5, name


def test_chunked_divergence_equals_whole_logits():
    """KL(reference || policy), forward and over all of the vocabulary, with its gradient."""
    torch.manual_seed(0)
    hidden, head, ref_hidden, ref_head = (torch.randn(n, 16) for n in (11, 40, 11, 40))
    targets, a, b = torch.randint(0, 40, (11,)), torch.rand(11), torch.rand(11)
    leaves = [hidden.requires_grad_(), head.requires_grad_()]

    policy, ref = (hidden @ head.T).log_softmax(-1), (ref_hidden @ ref_head.T).log_softmax(-1)
    plain = torch.nn.functional.kl_div(policy, ref, log_target=True, reduction="none").sum(-1)
    chosen = policy.gather(-1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((a * chosen + b * plain).sum(), leaves)

    logprobs = sft.head_logprobs(hidden, head, targets, chunk=4)
    kl = sft.divergence(hidden, head, ref_hidden, ref_head, chunk=4)
    assert torch.allclose(kl, plain, atol=1e-5) and torch.allclose(logprobs, chosen, atol=1e-5)
    for got, want in zip(torch.autograd.grad((a * logprobs + b * kl).sum(), leaves), expected):
        assert torch.allclose(got, want, atol=1e-4)


def test_head_is_fp32_for_bf16_states():
    torch.manual_seed(0)
    hidden, head = torch.randn(20, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    targets = torch.randint(0, 500, (20,))
    got = sft.head_logprobs(hidden, head, targets, chunk=6)
    expected = (hidden.double() @ head.double().T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert got.dtype == torch.float32 and (got - expected).abs().max() < 1e-4


# --- batches ---


def test_every_epoch_is_its_own_permutation():
    batches = [sft.rows_of_step(10, k, 4, seed=3) for k in range(5)]
    stream = [i for batch in batches for i in batch]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert batches != [sft.rows_of_step(10, k, 4, seed=4) for k in range(5)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 90, 100000])
def test_deal_gives_every_row_once_and_every_rank_as_many_passes(world, budget):
    lengths = [10 + 7 * i % 31 for i in range(19)]
    ranks = sft.deal(lengths, budget, world)
    assert len(ranks) == world and len({len(batches) for batches in ranks}) == 1
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(19))
    for batch in (batch for batches in ranks for batch in batches if len(batch) > 1):
        assert len(batch) * max(lengths[i] for i in batch) <= budget
    if budget == 100000:  # what would fit into one micro-batch is still shared
        work = [sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) for batches in ranks]
        assert len(ranks[0]) == 1 and max(work) < 1.5 * sum(lengths) / world + 2 * max(lengths)


def test_micro_batches_do_not_change_the_result(tiny_model, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", make_rows(8))
    flags = dict(model=tiny_model, data=data, steps=3, batch_size=8, lr=1e-3)
    whole = train(monkeypatch, output_dir=tmp_path / "whole", **flags)
    single = train(monkeypatch, output_dir=tmp_path / "single", micro_batch_tokens=1, **flags)
    some = train(
        monkeypatch, output_dir=tmp_path / "some", micro_batch_tokens=200, gradient_checkpointing=True, **flags
    )
    for name in ("loss", "logprob", "grad_norm", "tokens"):
        assert curve(single, name) == pytest.approx(curve(whole, name), rel=1e-4)
        assert curve(some, name) == pytest.approx(curve(whole, name), rel=1e-4)
    assert distance(tmp_path / "single/model", tmp_path / "whole/model") < 1e-4


# --- processes, kills, continuations ---


@pytest.fixture(scope="module")
def straight(tiny_model, tmp_path_factory):
    """One uninterrupted run of one process, that the others are measured by; 5 rows over 2 ranks need a dummy."""
    folder = tmp_path_factory.mktemp("straight")
    data = write(folder / "data.jsonl", make_rows(12))
    flags = dict(model=tiny_model, data=data, steps=40, batch_size=5, lr=1e-3, loss="dft", save_every=7)
    flags |= dict(micro_batch_tokens=120, weight_decay=0.1)
    flags["output_dir"] = folder / "out"
    finish(start(flags))
    return flags, read_metrics(folder / "out")


def kill_after(process: subprocess.Popen, folder: Path, rows: int) -> None:
    """SIGKILL to the whole process group once metrics.jsonl holds so many rows."""
    metrics = folder / "metrics.jsonl"
    limit = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_text().count("\n") >= rows):
        assert process.poll() is None and time.monotonic() < limit, "the run ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()}:  # torchrun's workers lead own groups
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if f"--output_dir\0{folder}\0" in arguments:
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (folder / "model").exists(), "the run was finished before it was killed"


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(straight, tmp_path, processes):
    flags, expected = straight
    flags = flags | {"output_dir": tmp_path / "out"}
    kill_after(start(flags, processes), tmp_path / "out", 10)
    checkpoint = sft.last_checkpoint(tmp_path / "out")
    assert checkpoint and int(checkpoint.name[-6:]) % 7 == 0
    with (tmp_path / "out/metrics.jsonl").open("a") as out:
        out.write('{"step": 39, "lo')  # a row that the kill cut short
    finish(start(flags, processes))
    got = read_metrics(tmp_path / "out")
    assert curve(got, "step") == list(range(1, 41))
    if processes == 1:  # the very same numbers
        assert [{k: v for k, v in row.items() if k not in TIMES} for row in got] == [
            {k: v for k, v in row.items() if k not in TIMES} for row in expected
        ]
        assert distance(tmp_path / "out/model", straight[0]["output_dir"] / "model") == 0
    else:  # sums in another order
        for name in ("loss", "logprob", "weighted_prob", "grad_norm", "tokens", "lr"):
            assert curve(got, name) == pytest.approx(curve(expected, name), rel=1e-3, abs=1e-4), name
        assert distance(tmp_path / "out/model", straight[0]["output_dir"] / "model") < 2e-4
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_anchored_run_is_the_same_on_two_processes(tiny_model, tmp_path, monkeypatch):
    """ASFT's frozen reference is sharded as well, and its head is needed after its forward has returned."""
    flags = dict(model=tiny_model, data=write(tmp_path / "data.jsonl", make_rows(7)), steps=4, batch_size=5, lr=3e-3)
    flags |= dict(loss="asft", anchor=0.5, micro_batch_tokens=120)
    one = train(monkeypatch, output_dir=tmp_path / "one", **flags)
    finish(start(flags | {"output_dir": tmp_path / "two"}, 2))
    two = read_metrics(tmp_path / "two")
    assert one[0]["kl"] == pytest.approx(0, abs=1e-6) and one[-1]["kl"] > 0.01
    for name in ("loss", "kl", "grad_norm"):
        assert curve(two, name) == pytest.approx(curve(one, name), rel=1e-4, abs=1e-6), name


def test_finished_run_says_so(straight, tmp_path, monkeypatch, capsys):
    flags, expected = straight
    assert train(monkeypatch, **flags) == expected
    assert "finished" in capsys.readouterr().out


def test_start_from_carries_model_optimizer_and_schedule(tiny_model, tmp_path, monkeypatch):
    rows = make_rows(20)
    flags = dict(model=tiny_model, batch_size=4, lr=1e-3, warmup=0.3, loss="dft")
    data = write(tmp_path / "one.jsonl", rows)
    whole = train(monkeypatch, data=data, steps=10, output_dir=tmp_path / "whole", **flags)
    # the second file in such an order that its first epoch is the first file's second one
    second = [None] * 20
    for place, i in zip(sft.epoch_order(20, 0, 0), sft.epoch_order(20, 1, 0)):
        second[place] = rows[i]
    flags |= dict(steps=5, schedule_steps=10)
    train(monkeypatch, data=data, output_dir=tmp_path / "a", **flags)
    assert [p.name for p in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-000005"]
    assert (tmp_path / "a/model/config.json").exists()
    flags |= dict(start_from=tmp_path / "a", data=write(tmp_path / "two.jsonl", second))
    train(monkeypatch, output_dir=tmp_path / "b", **flags)
    joined = read_metrics(tmp_path / "a") + read_metrics(tmp_path / "b")
    for name in ("step", "loss", "lr", "grad_norm"):
        assert curve(joined, name) == curve(whole, name)
    assert distance(tmp_path / "b/model", tmp_path / "whole/model") == 0
    assert not list((tmp_path / "b").glob("checkpoint-*"))
    (tmp_path / "a/model").rename(tmp_path / "a/later")  # as if it had been killed at that checkpoint
    with pytest.raises(SystemExit, match=f"--start_from {tmp_path / 'a'}: that run is not finished"):
        train(monkeypatch, output_dir=tmp_path / "c", **flags)


# --- what comes out ---


def test_final_folder_is_a_plain_model_in_the_dtype_it_came_in(tiny_model, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    given = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    ends = [7, given.generation_config.eos_token_id]  # as base models have more than one
    given.generation_config.eos_token_id = ends
    given.save_pretrained(source)
    data = write(tmp_path / "data.jsonl", make_rows(4))
    train(monkeypatch, model=source, data=data, output_dir=tmp_path / "out", lr=1e-2, epochs=2, batch_size=3)
    assert len(read_metrics(tmp_path / "out")) == 3  # 8 rows in threes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/model")
    before = AutoModelForCausalLM.from_pretrained(source)
    assert model.dtype == before.dtype == torch.bfloat16
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters()))
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert model.generation_config.eos_token_id == sorted(ends)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert json.loads((tmp_path / "out/config.json").read_text())["config"]["lr"] == 1e-2


def test_long_rows_are_named_and_dropped_whole(tiny_model, tmp_path, monkeypatch, capsys):
    rows = make_rows(4)
    data = write(tmp_path / "short.jsonl", rows)
    short = train(monkeypatch, model=tiny_model, data=data, output_dir=tmp_path / "short", steps=1, batch_size=4)
    data = write(tmp_path / "long.jsonl", [*rows, rows[0] | {"id": "giant", "solution": "1+1=2. " * 200}])
    capsys.readouterr()
    long = train(monkeypatch, model=tiny_model, data=data, output_dir=tmp_path / "long", steps=1, batch_size=4)
    assert "1 of 5 rows" in (said := capsys.readouterr().out) and "giant" in said
    assert long[0]["loss"] == short[0]["loss"] and long[0]["tokens"] == short[0]["tokens"]


GOOD = make_rows(3)
BAD = [
    ({"data": "nowhere.jsonl"}, None, ["nowhere.jsonl", "no such file"]),
    ({}, [], ["data.jsonl", "empty"]),
    ({}, [GOOD[0], "{oops"], ["data.jsonl, line 2", "not JSON"]),
    ({}, [GOOD[0], "\udcff"], ["data.jsonl, line 2", "not UTF-8"]),
    ({}, [GOOD[0], {"id": "x", "problem": "p"}], ["line 2", "'solution'", "missing"]),
    ({}, [GOOD[0] | {"problem": " "}], ["line 1", "'problem'", "empty"]),
    ({}, [GOOD[0] | {"solution": 7}], ["line 1", "'solution'", "str", "7"]),
    ({}, [GOOD[0] | {"weight": "heavy"}], ["line 1", "'weight'", "float", "heavy"]),
    ({}, [GOOD[0] | {"weight": math.nan}], ["line 1", "'weight'", "nan"]),
    ({}, [GOOD[0] | {"align": None}], ["line 1", "'align'", "float", "None"]),
    ({}, [GOOD[0] | {"problem": "1 \ud83d"}], ["line 1", "'problem'", "half a character"]),
    ({}, [GOOD[0], GOOD[1], GOOD[0]], ["line 3", "r0", "line 1"]),
    ({"max_length": 5}, GOOD, ["no row fits", "--max_length"]),
    ({"model": "nowhere"}, GOOD, ["nowhere", "tokenizer"]),
    ({"data": ""}, GOOD, ["--data is needed"]),
    ({"loss": "mse"}, GOOD, ["--loss", "sft", "dft", "mse"]),
    ({"loss": "rasft"}, GOOD, ["data.jsonl, line 1", "'align'", "missing", "rewrite.py --method rasft"]),
    (
        {"loss": "rasft"},
        [make_rows(4)[3] | {"align": -1.0}],
        ["data.jsonl, line 1", "'weight'", "missing", "--method rasft"],
    ),
    ({"rho_low": 0.5, "rho_high": 2}, GOOD, ["data.jsonl, line 1", "'align'", "missing", "rewrite.py"]),
    ({"power": -1}, GOOD, ["--power", "-1"]),
    ({"anchor": -1}, GOOD, ["--anchor", "-1"]),
    ({"rho_low": 2}, GOOD, ["--rho_low", "2"]),
    ({"lr": 0}, GOOD, ["--lr", "0"]),
    ({"lr": "nan"}, GOOD, ["--lr", "nan"]),
    ({"warmup": 1.5}, GOOD, ["--warmup", "1.5"]),
    ({"batch_size": 0}, GOOD, ["--batch_size", "0"]),
    ({"beta2": 1}, GOOD, ["--beta2", "1"]),
    ({"schedule_steps": 1, "steps": 2}, GOOD, ["--schedule_steps", "2"]),
    ({"start_from": "nowhere"}, GOOD, ["--start_from", "nowhere", "checkpoint"]),
    ({"los": "sft"}, GOOD, ["--los"]),
]


@pytest.mark.parametrize("flags, rows, words", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_ends_at_once_and_names_what(tiny_model, tmp_path, monkeypatch, capsys, flags, rows, words):
    monkeypatch.chdir(tmp_path)
    if rows is not None:
        write(tmp_path / "data.jsonl", rows)
    with pytest.raises((SystemExit, ValueError)) as stop:
        train(monkeypatch, **({"model": tiny_model, "data": "data.jsonl", "output_dir": "out"} | flags))
    said = capsys.readouterr().err + str(stop.value)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists() and not dist.is_initialized()  # no model was loaded: that comes later


def test_rows_of_one_problem_are_told_apart_by_source_and_sample(tmp_path):
    row = GOOD[0] | {"source": "self", "sample": 0}
    config = sft.Config("m", write(tmp_path / "d.jsonl", [row, row | {"sample": 1}, row | {"source": "expert"}]), "o")
    assert [r["weight"] for r in sft.read_rows(config)] == [0.0] * 3
    config.data = write(tmp_path / "d.jsonl", [row, row])
    with pytest.raises(SystemExit):
        sft.read_rows(config)
    named = [row | {"source": {"name": "a"}}, row | {"source": {"name": "b"}, "kind": "sum"}]
    config.data = write(tmp_path / "d.jsonl", named)
    with pytest.raises(SystemExit, match="line 2: field 'kind' must be math or code, found 'sum'"):
        sft.read_rows(config)


def test_rollouts_of_another_policy_are_told(tmp_path):
    """RASFT's set names the models it was made with; the loss assumes the one that is trained on, and the start."""

    def told(made: dict, **flags) -> str:
        (tmp_path / "config.json").write_text(json.dumps({"config": made}))
        return sft.other_policy(sft.Config(data=f"{tmp_path}/train.jsonl", output_dir="o", **flags))

    base, other = f"{tmp_path}/base", f"{tmp_path}/other"
    assert told({"mapper": base, "target": base}, model=f"{tmp_path}/../{tmp_path.name}/base", loss="rasft") == ""
    said = told({"mapper": other, "target": base}, model=base, loss="rasft")
    assert f"rollouts are {other}'s" in said and f"is {base}" in said
    said = told({"mapper": base, "target": other}, model=base, loss="rasft")
    assert f"compares with {other}" in said and f"--model is {base}" in said
    second = dict(model=base, loss="rasft", start_from=f"{tmp_path}/round-1")
    assert told({"mapper": f"{tmp_path}/round-1/model", "target": base}, **second) == ""
    assert "round-1/model" in told({"mapper": base, "target": base}, **second)
    assert told({"mapper": other, "target": other}, model=base, loss="dft") == ""
    assert "compares with" in told(
        {"mapper": other, "target": other}, model=base, loss="dft", rho_low=0.4, rho_high=1.2
    )
    (tmp_path / "config.json").unlink()
    assert sft.other_policy(sft.Config(model=base, data=f"{tmp_path}/x", output_dir="o", loss="rasft")) == ""


def test_a_folder_of_another_config_is_refused(straight, monkeypatch):
    flags, expected = straight
    with pytest.raises(SystemExit, match="--lr 0.001, not 0.002"):
        train(monkeypatch, **flags | {"lr": 2e-3})
    assert read_metrics(flags["output_dir"]) == expected


def test_a_finished_run_is_another_one_with_other_data_but_not_with_smaller_micro_batches(straight, monkeypatch):
    flags, expected = straight
    data = Path(flags["data"])
    assert train(monkeypatch, **flags | {"micro_batch_tokens": 60}) == expected
    old = data.read_bytes()
    write(data, make_rows(11))
    with pytest.raises(SystemExit, match=f"{data} has changed since {flags['output_dir']} was begun"):
        train(monkeypatch, **flags)
    data.write_bytes(old)
    assert train(monkeypatch, **flags) == expected
