"""Stage 1: the loss by hand, the update against an implementation that does the obvious, whole runs with a real engine
that are shared out, killed, broken and misused."""

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
from conftest import ROOT, sum_demonstrations
from transformers import AutoModelForCausalLM, AutoTokenizer

import mapper_rl
import reward

# what differs between two runs of the same thing
TIMES = ("seconds_sync", "seconds_rollout", "seconds_reward", "seconds_update")
TIMES += ("tokens_per_second", "elapsed", "peak_memory", "grading_timeouts")


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(flags: dict) -> list[str]:
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def start(flags: dict, processes: int = 1, script: Path = ROOT / "mapper_rl.py") -> subprocess.Popen:
    """A script as a user starts it, in a process group of its own so that all of it can be killed."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*python, str(script), *command(flags)], env=env, start_new_session=True, **pipes)


def end(process: subprocess.Popen, seconds: float = 900) -> str:
    """What it printed. Processes that hang are killed, and the test fails."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, which lead groups of their own
        try:
            output = process.communicate(timeout=30)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0]
        pytest.fail(f"still running after {seconds} s:\n{output[-3000:]}")


def finish(process: subprocess.Popen) -> str:
    output = end(process)
    assert process.returncode == 0, output
    return output


def make_config(**fields) -> mapper_rl.Config:
    return mapper_rl.Config(**{"model": "m", "data": "d", "output_dir": "o", **fields})


def weights_of(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# The loss by hand
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, weight, surrogate, slope, clipped",
    [
        (1.5, 2.0, 1.0, 1.28 * 2, 0.0, 1),  # too far up already
        (1.5, -2.0, 1.0, 1.5 * -2, 1.5 * -2, 0),  # the wrong way: the whole ratio counts
        (0.5, 2.0, 1.0, 0.5 * 2, 0.5 * 2, 0),
        (0.5, -2.0, 1.0, 0.8 * -2, 0.0, 1),  # too far down already
        (1.25, 2.0, 1.0, 1.25 * 2, 1.25 * 2, 0),  # above 1.2, below 1.28: the upper clip is the wider one
        (1.0, 2.0, 0.5, 0.5 * 2, 0.5 * 2, 0),  # the engine found the token twice as likely
        (1.0, 2.0, 1.9, 1.9 * 2, 1.9 * 2, 0),
        (1.0, -2.0, 7.0, 2 * -2, 2 * -2, 0),  # truncated at 2
    ],
)
def test_one_token(ratio, advantage, weight, surrogate, slope, clipped):
    old = torch.tensor([-1.0])
    logprobs = (old + math.log(ratio)).requires_grad_()
    engine = old - math.log(weight)
    loss, stats = mapper_rl.grpo_loss(logprobs, old, engine, torch.tensor([advantage]), 10.0, make_config())
    loss.backward()
    assert loss.item() == pytest.approx(-surrogate / 10, abs=1e-6)
    assert logprobs.grad.item() == pytest.approx(-slope / 10, abs=1e-6)  # d r / d log π = r
    assert stats["clip_fraction"] == clipped
    assert stats["importance_clip_fraction"] == (weight > 2)
    assert stats["logprob_diff"] == pytest.approx(abs(math.log(weight)), abs=1e-6)


def test_tokens_are_summed_over_one_denominator_and_k3_is_added():
    old = torch.tensor([-1.0, -2.0, -3.0])
    logprobs = (old + torch.tensor([1.5, 1.0, 0.5]).log()).requires_grad_()
    ref = logprobs.detach() + torch.tensor([2.0, 1.0, 0.5]).log()
    advantages = torch.tensor([2.0, -1.0, -2.0])
    loss, stats = mapper_rl.grpo_loss(logprobs, old, old, advantages, 8.0, make_config(beta_kl=0.1), ref)
    loss.backward()
    k3 = [2 - math.log(2) - 1, 0.0, 0.5 + math.log(2) - 1]
    assert loss.item() == pytest.approx((-(2.56 - 1.0 - 1.6) + 0.1 * sum(k3)) / 8, abs=1e-6)
    # d k3 / d log π = 1 - π_ref / π
    assert logprobs.grad.tolist() == pytest.approx([-0.1 / 8, 1 / 8, 0.1 * 0.5 / 8], abs=1e-6)
    assert stats["clip_fraction"] == 2
    without, _ = mapper_rl.grpo_loss(logprobs, old, old, advantages, 8.0, make_config(beta_kl=0.1))
    assert without.item() == pytest.approx(-(2.56 - 1.0 - 1.6) / 8, abs=1e-6)


def test_advantages():
    assert mapper_rl.advantages_of([1, 0, 0, 1], False) == [0.5, -0.5, -0.5, 0.5]
    assert mapper_rl.advantages_of([3, 0, 0], False) == [2, -1, -1]
    assert mapper_rl.advantages_of([3, 0, 0], True) == pytest.approx([2**0.5, -(0.5**0.5), -(0.5**0.5)], abs=1e-5)
    for divide_by_std in (False, True):
        assert mapper_rl.advantages_of([0.3] * 4, divide_by_std) is None
        assert mapper_rl.advantages_of([0.1 + 0.2, 0.3], divide_by_std) is None  # equal but for the last bit
        assert mapper_rl.advantages_of([0.3, 0.30001], divide_by_std) is not None


def test_every_problem_once_an_epoch_over_steps_that_cross_epochs():
    stream = [i for step in range(5) for i in mapper_rl.rows_of_step(10, step, 4, seed=3)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert stream != [i for step in range(5) for i in mapper_rl.rows_of_step(10, step, 4, seed=4)]
    many = mapper_rl.rows_of_step(3, 1, 7, seed=0)  # places 7 to 13 of the epochs 6-8, 9-11, 12-14
    assert len(many) == 7 and sorted(many[2:5]) == [0, 1, 2]
    assert mapper_rl.rows_of_step(3, 0, 7, seed=0)[6] not in many[:2]


# ---------------------------------------------------------------------------------------------------------------------
# The update against the obvious
# ---------------------------------------------------------------------------------------------------------------------


def make_rollouts(tokenizer, count: int) -> list[dict]:
    """Rollouts of other lengths and advantages, three a prompt; from an engine that disagrees with the trainer."""
    generator = torch.Generator().manual_seed(1)
    rollouts = []
    for i in range(count):
        length = 3 + 5 * i % 17
        ids = torch.randint(0, len(tokenizer), (length,), generator=generator).tolist()
        prompt = reward.prompt_ids(tokenizer, f"Add {i // 3} and {'1' * (i // 3 + 1)}.")
        # above and below the trainer's, whatever the temperature: some importance weights reach their cap
        logprobs = (-14 + 8 * torch.randn(length, generator=generator)).clamp(max=-0.01).tolist()
        advantage = 0.3 * torch.randn((), generator=generator).item()
        rollouts.append(dict(prompt_ids=prompt, ids=ids, logprobs=logprobs, advantage=advantage))
    return rollouts


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory) -> str:
    """The tiny model with slightly other weights: a reference from which the policy differs."""
    folder = str(tmp_path_factory.mktemp("models") / "other")
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def test_rows_of_responses_behind_one_prompt():
    a, b = [5, 6, 7], [5, 6]
    pairs = [(a, [1]), (a, [2, 3]), (a, [4] * 9), (b, [1]), (b, [8]), (a, [9])]
    # lengths 2 + 2 + 3 = 7 and, with the third, 17
    assert mapper_rl.share_prompts(pairs, 8, 17) == [[0, 1, 2], [3, 4], [5]]
    assert mapper_rl.share_prompts(pairs, 8, 16) == [[0, 1], [2], [3, 4], [5]]
    assert mapper_rl.share_prompts(pairs, 2, 100) == [[0, 1], [2], [3, 4], [5]]
    assert mapper_rl.share_prompts(pairs, 1, 100) == [[i] for i in range(6)]
    assert mapper_rl.share_prompts(pairs, 8, 1) == [[i] for i in range(6)]
    assert [mapper_rl.row_length([pairs[i] for i in row]) for row in ([0], [0, 1], [0, 1, 2])] == [4, 7, 17]

    ids, mask, attention = mapper_rl.collate_shared([pairs[:2], pairs[3:4]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7, 1, 7, 2, 3, 0], [5, 6, 1, 0, 0, 0, 0, 0]]
    assert mask.int().tolist() == [[0, 0, 0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0]]
    assert attention["position_ids"][0, :7].tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert attention["attention_mask"].shape == (2, 1, 8, 8)
    seen = [[k for k in range(8) if row[k] == 0] for row in attention["attention_mask"][0, 0]]
    assert seen[:7] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]]
    assert mapper_rl.collate_shared([pairs[:1], pairs[3:4]], torch.device("cpu"))[2] == {}  # plainly causal


def plain_update(folder: str, reference: str, rollouts: list[dict], config: mapper_rl.Config, lr: float):
    """The docstring's formula word for word: whole logits, one rollout at a time, double precision, plain descent."""
    model, other = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (folder, reference))
    vocab = len(AutoTokenizer.from_pretrained(folder))

    def logp(model, r):
        logits = model(torch.tensor([r["prompt_ids"] + r["ids"]])).logits[0, len(r["prompt_ids"]) - 1 : -1, :vocab]
        return (logits / config.temperature).log_softmax(-1)[range(len(r["ids"])), r["ids"]]

    count = sum(len(r["ids"]) for r in rollouts)
    n = config.groups * config.group_size * config.max_tokens if config.constant_denominator else count
    old = [logp(model, r).detach() for r in rollouts]
    stats = dict(loss=0.0, clip_fraction=0.0, importance_clip_fraction=0.0, logprob_diff=0.0)
    largest, norms = 0.0, []
    for _ in range(config.passes):
        loss = 0.0
        for r, before in zip(rollouts, old):
            now = logp(model, r)
            with torch.no_grad():
                start = logp(other, r)
            for t, mu in enumerate(r["logprobs"]):
                gap = (before[t] - mu).item()
                ratio, a = (now[t] - before[t]).exp(), r["advantage"]
                low, high = 1 - config.clip_low, 1 + config.clip_high
                clipped = low if ratio < low else high if ratio > high else ratio
                loss = loss - min(math.exp(gap), config.importance_cap) * min(ratio * a, clipped * a) / n
                if config.beta_kl:
                    d = start[t] - now[t]
                    loss = loss + config.beta_kl * (d.exp() - d - 1) / n
                stats["clip_fraction"] += float((a > 0 and ratio > high) or (a < 0 and ratio < low)) / count
                stats["importance_clip_fraction"] += float(math.exp(gap) > config.importance_cap) / count
                stats["logprob_diff"] += abs(gap) / count
                largest = max(largest, abs(gap))
        model.zero_grad()
        loss.backward()
        stats["loss"] += loss.item()
        norms.append(math.sqrt(sum(weight.grad.square().sum().item() for weight in model.parameters())))
        with torch.no_grad():
            for weight in model.parameters():
                weight -= lr * weight.grad
    stats = {name: value / config.passes for name, value in stats.items()}
    stats |= {"logprob_diff_max": largest, "grad_norm": sum(norms) / len(norms), "kept_tokens": count}
    return stats, {name: weight.detach().float() for name, weight in model.named_parameters()}


def own_update(folder: str, reference: str, rollouts: list[dict], config: mapper_rl.Config, lr: float, device):
    """mapper_rl.update with plain descent: the change of the weights is the gradient."""
    policy = mapper_rl.load_model(folder, device, train=True, gradient_checkpointing=config.gradient_checkpointing)
    other = mapper_rl.load_model(reference, device, train=False)
    vocab = reward.used_vocabulary(AutoTokenizer.from_pretrained(folder))
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    stats = mapper_rl.update(policy, other, optimizer, rollouts, config, vocab, device)
    return stats, dict(mapper_rl.full_weights(policy, torch.float32))


def agree(got: tuple, expected: tuple, start: dict, tolerance: float) -> None:
    """Statistics and weights agree, to a share of their size: of how far a step of plain descent has moved the weights,
    since fp32 sums in another order (another processor's) are off by a share of what is summed."""
    assert got[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert got[0][name] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), name
    assert got[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        moved, rounding = (weight - start[name]).abs().max(), 1e-6 * weight.abs().max()
        assert moved > 20 * rounding, name  # the gradient is far larger than what rounding can do, everywhere
        assert (got[1][name] - weight).abs().max() < tolerance * moved + rounding, name


CASES = {
    "plain": {},
    "micro-batches": {"micro_batch_tokens": 90, "head_chunk": 7},
    "own prompts": {"rollouts_per_row": 1},
    "two a row": {"rollouts_per_row": 2, "micro_batch_tokens": 300},
    "checkpointing": {"micro_batch_tokens": 400, "gradient_checkpointing": True},
    "cold": {"temperature": 0.6},
    "constant denominator": {"constant_denominator": True, "groups": 1, "group_size": 7, "max_tokens": 5},
    "kl": {"beta_kl": 0.3, "micro_batch_tokens": 90},
    "two passes": {"passes": 2, "micro_batch_tokens": 90},
    "two passes, kl": {"passes": 2, "beta_kl": 0.3},
}


@pytest.mark.parametrize("case", CASES)
def test_update_equals_the_plain_one(tiny_model, other_model, case):
    defaults = {"temperature": 1.3, "max_grad_norm": 1e9, "gradient_checkpointing": False}
    config = make_config(**(defaults | CASES[case]))
    rollouts = make_rollouts(AutoTokenizer.from_pretrained(tiny_model), 7)
    *_, device = mapper_rl.init_distributed()
    lr = 1.0 if config.passes == 1 else 0.02  # a first pass that does not leave the neighbourhood
    got = own_update(tiny_model, other_model, rollouts, config, lr, device)
    expected = plain_update(tiny_model, other_model, rollouts, config, lr)
    agree(got, expected, weights_of(tiny_model), 1e-3)
    assert 0 < expected[0]["importance_clip_fraction"] < 1
    if config.passes > 1:
        assert 0 < expected[0]["clip_fraction"] < 1


def test_gradient_is_clipped_to_a_global_norm(tiny_model, other_model):
    rollouts = make_rollouts(AutoTokenizer.from_pretrained(tiny_model), 4)
    *_, device = mapper_rl.init_distributed()
    stats, after = own_update(tiny_model, other_model, rollouts, make_config(max_grad_norm=0.01), 1.0, device)
    before = weights_of(tiny_model)
    moved = math.sqrt(sum((after[name] - before[name]).square().sum().item() for name in after))
    assert moved == pytest.approx(0.01, rel=1e-3) and stats["grad_norm"] > 0.05


def test_no_weight_becomes_nan(tiny_model, other_model):
    rollouts = make_rollouts(AutoTokenizer.from_pretrained(tiny_model), 4)
    rollouts[2]["advantage"] = math.nan
    *_, device = mapper_rl.init_distributed()
    with pytest.raises(SystemExit, match="the gradient is not finite"):
        own_update(tiny_model, other_model, rollouts, make_config(), 1.0, device)


def test_a_head_with_more_than_a_weight_is_refused(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    PhiForCausalLM(PhiConfig(**sizes)).save_pretrained(tmp_path)
    *_, device = mapper_rl.init_distributed()
    with pytest.raises(SystemExit, match=f"{tmp_path}: no support for lm_head.bias"):
        mapper_rl.load_model(str(tmp_path), device, train=False)


SHARES = """
import json, sys
import torch
import mapper_rl, reward, test_mapper_rl

def main():
    folder, reference, out = sys.argv[1:]
    rank, world, device = mapper_rl.init_distributed()
    rollouts = json.load(open(out + "/rollouts.json"))
    for name, (case, kept) in json.load(open(out + "/cases.json")).items():
        config = test_mapper_rl.make_config(**case)
        result = test_mapper_rl.own_update(folder, reference, [rollouts[i] for i in kept], config, 0.1, device)
        if rank == 0:
            torch.save(result, f"{out}/{name}.pt")

if __name__ == "__main__":
    mapper_rl.run(main)
"""


def test_update_is_the_same_on_two_processes(tiny_model, other_model, tmp_path):
    rollouts = make_rollouts(AutoTokenizer.from_pretrained(tiny_model), 7)
    hot = {"temperature": 1.3, "max_grad_norm": 1e9, "micro_batch_tokens": 90, "passes": 2, "beta_kl": 0.3}
    cases = {  # with one rollout, the second rank has none, and still takes part in every pass
        "all": (hot, list(range(7))),
        "few": (hot, [5, 0]),
        "one": (hot, [3]),
        "one_pass": (hot | {"passes": 1, "beta_kl": 0.0}, [3]),
    }
    (tmp_path / "rollouts.json").write_text(json.dumps(rollouts))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "shares.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{SHARES}")
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(tmp_path / "shares.py"), tiny_model, other_model, str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finish(subprocess.Popen(python + arguments, env=env, start_new_session=True, **pipes))
    *_, device = mapper_rl.init_distributed()
    before = weights_of(tiny_model)
    for name, (case, kept) in cases.items():
        config = make_config(**case)
        alone = own_update(tiny_model, other_model, [rollouts[i] for i in kept], config, 0.1, device)
        agree(torch.load(tmp_path / f"{name}.pt"), alone, before, 1e-3)


def test_rewards_ask_the_target_the_plain_question_at_temperature_one(tiny_model):
    tokenizer = reward.load_tokenizer(tiny_model)
    *_, device = mapper_rl.init_distributed()
    target = mapper_rl.load_model(tiny_model, device, train=False)
    rows = [row | {"kind": "math"} for row in sum_demonstrations(1)]
    [row] = mapper_rl.prepare(rows, tokenizer, make_config(max_tokens=50, max_model_len=300), 0)
    row["expert_align"] = -7.0  # below A, so that there is a gain
    a, b, c = row["problem"][4], row["problem"][10], row["answer"]
    texts = [f"{a}+{b}={c}. \\boxed{{{c}}}", f"{a}+{b}={c}0. \\boxed{{{c}}}", f"{a}+{b}={c}. So it is {c}."]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for align in ("gain", "nll", "kl"):
        config = make_config(align=align, temperature=1.0 if align == "kl" else 0.5, hard_weight=0.7)
        rollouts = []
        for text in texts:
            ids = reward.response_ids(tokenizer, text)
            shared = dict(row=0, prompt_ids=row["prompt_ids"], ids=ids, logprobs=[-0.5] * len(ids), text=text)
            rollouts += [shared | {"ended": True}, shared | {"ended": False}]
        mapper_rl.add_parts(rollouts, [row], config)
        mapper_rl.add_rewards(rollouts, [row], target, 0.8, config, device)
        first, *others = rollouts
        question = f"{row['problem']}\n\nReason step by step, and put your final answer within \\boxed{{}}."
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        asked = tokenizer.encode(prompt, add_special_tokens=False)
        with torch.no_grad():
            logp = model(torch.tensor([asked + first["ids"]])).logits[0].log_softmax(-1)
        scores = [logp[len(asked) + t - 1, token].item() for t, token in enumerate(first["ids"])]
        A = sum(scores) / len(scores)
        if align != "kl":
            expected = 1 / (1 + math.exp(-(A + 7) / 0.8))
            expected = 2 * expected - 1 if align == "gain" else expected
        else:
            gaps = [max(-5, min(5, -0.5 - s)) for s in scores]
            expected = 1 - 0.5 * max(0, min(2, sum(gaps) / len(gaps)))
        assert first["parts"]["gate"] == 1 and first["parts"]["A"] == pytest.approx(A, abs=1e-5)
        expected -= 0.25 * sum(first["parts"][name] for name in reward.SOFT)
        assert first["reward"] == pytest.approx(expected, abs=1e-5)
        # cut off; a false statement, whole and cut off; no box, whole and cut off
        assert [r["reward"] for r in others] == [0, -0.7, -0.7, 0, 0]


def test_a_gain_over_the_group_is_measured_in_the_spread_of_its_clean_rewrites(monkeypatch):
    """Mean -1.5 and population deviation 0.5 of the two clean ones of the first group; its third passed the gate by a
    cheat. The second group is of the same problem, and one alone is its own mean."""
    A = [-1.0, -2.0, -0.2, -3.0]
    monkeypatch.setattr(mapper_rl, "score", lambda *_, **__: [torch.tensor([a, a]) for a in A])
    clean = dict.fromkeys((*reward.HARD, *reward.SOFT), 0.0) | {"gate": 1.0, "clean": 1.0, "cheating": 0.0}
    sigmoid = [1 / (1 + math.exp(-z)) for z in (1.0, -1.0)]
    for gate in (True, False):  # without it the same earn as texts that fail it
        parts = [dict(clean), dict(clean), clean | {"clean": 0.0, "cheating": 1.0}, dict(clean)]
        fails = {} if gate else {"gate": 0.0, "clean": 0.0}
        rollouts = [dict(row=0, ids=[1, 2], parts=p | fails) for p in parts]
        config = make_config(align="group", hard_weight=0.5, gate=gate, group_size=3)
        mapper_rl.add_rewards(rollouts, [{"solve_ids": [0], "expert_align": -9.0}], None, 0.7, config, None)
        assert [r["reward"] for r in rollouts] == pytest.approx([*sigmoid, -0.5, 0.5])


def test_without_the_gate_a_wrong_text_earns_its_likelihood(monkeypatch):
    monkeypatch.setattr(mapper_rl, "score", lambda _, pairs, *__, **___: [torch.tensor([-1.0])] * len(pairs))
    fails = dict.fromkeys((*reward.HARD, *reward.SOFT), 0.0) | {"gate": 0.0, "clean": 0.0, "cheating": 0.0}
    for gate, expected in ((True, [0, -0.5]), (False, [math.tanh(1), -0.5])):  # 2 sigmoid(2) - 1
        rollouts = [dict(row=0, ids=[1], parts=dict(fails)), dict(row=0, ids=[1], parts=fails | {"cheating": 1.0})]
        config = make_config(gate=gate, hard_weight=0.5)
        mapper_rl.add_rewards(rollouts, [{"solve_ids": [0], "expert_align": -2.0}], None, 0.5, config, None)
        assert [r["reward"] for r in rollouts] == pytest.approx(expected)


def test_direct_rl_rewards_right_answers_and_cheats_only_where_told_to_look():
    row = dict(problem="Start with 1. Add 2. Add 4.", solution="1+2=3. 3+4=7. \\boxed{7}", answer="7", kind="math")
    texts = ["1+2=3. 3+4=7. \\boxed{7}", "1+2=4. 4+4=7. \\boxed{7}", "\\boxed{7}", "1+2=3. 3+4=8. \\boxed{8}"]
    rollouts = [dict(row=0, text=text, ended=ended) for ended in (True, False) for text in texts]
    config = make_config(task="solve")
    assert config.hard_cheats == [] and make_config(task="map").hard_cheats == list(reward.HARD)
    mapper_rl.add_parts(rollouts, [row], config)
    mapper_rl.add_rewards(rollouts, [row], None, 0.0, config, None)
    assert [r["reward"] for r in rollouts] == [1, 1, 1, 0] + [0] * 4
    assert [r["parts"] for r in rollouts[:4]] == [{"correct": c} for c in (1, 1, 1, 0)]
    config = make_config(task="solve", hard_cheats=list(reward.HARD))
    mapper_rl.add_parts(rollouts, [row], config)
    mapper_rl.add_rewards(rollouts, [row], None, 0.0, config, None)
    assert [r["reward"] for r in rollouts] == [1, 0, 0, 0] + [0] * 4
    assert [r["parts"]["false_arithmetic"] for r in rollouts[:4]] == [0, 1, 0, 1]
    assert rollouts[2]["parts"]["no_reasoning"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tiny_model, tmp_path_factory):
    """(flags, metrics) of one uninterrupted run of one process, by which the others are measured."""
    folder = tmp_path_factory.mktemp("straight")
    data = write(folder / "data.jsonl", sum_demonstrations(14))
    flags = dict(model=tiny_model, data=data, task="map", steps=4, groups=4, group_size=8, max_tokens=30)
    flags |= dict(max_model_len=160, lr=1e-3, warmup_steps=1, save_every=2, head_chunk=100, seed=1)
    flags["output_dir"] = folder / "out"
    finish(start(flags))
    return flags, read(folder / "out/metrics.jsonl")


def untimed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_map_run(straight, tiny_model):
    flags, metrics = straight
    out = flags["output_dir"]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    judged = ["reward", "gate", "clean", "cheating", "correct", "fidelity", "copy", *reward.HARD, *reward.SOFT]
    aligned = ["align", "A", "A_expert", "length_ratio", "tokens", "truncated", "dropped_groups"]
    updated = ["loss", "entropy", "grad_norm", "clip_fraction", "importance_clip_fraction", "logprob_diff"]
    for row in metrics:
        names = [*judged, *aligned, *updated, "logprob_diff_max", "lr", "generated_tokens", *TIMES]
        assert all(math.isfinite(row[name]) for name in names), row
        assert 0 < row["logprob_diff"] < 1e-4 and row["logprob_diff_max"] < 1e-3  # the engine has the policy's weights
        assert row["clip_fraction"] == row["importance_clip_fraction"] == 0  # one pass: the ratio is 1
        assert row["dropped_groups"] < 4 and row["grad_norm"] > 0 and row["lr"] == 1e-3
        assert row["peak_memory"] > 1e8 and row["tokens_per_second"] > 1
        assert row["elapsed"] >= sum(row[name] for name in TIMES[:4]) - 1e-6
    rollouts = read(out / "rollouts.jsonl")
    assert [r["step"] for r in rollouts] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert any(r["parts"]["gate"] for r in rollouts) and all(r["text"] for r in rollouts)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert model.generation_config.eos_token_id == [reward.stop_id(tokenizer)]
    assert distance(model.state_dict(), weights_of(tiny_model)) > 1e-3
    assert all(row["tau"] == 0.5 for row in metrics)  # of one-digit sums: all are about as likely
    assert json.loads((out / "config.json").read_text())["config"]["lr"] == 1e-3
    assert not list(out.glob("checkpoint-*")) and not list(out.glob("*.partial"))


def test_two_processes_do_the_same(straight, tmp_path):
    flags, expected = straight
    finish(start(flags | {"output_dir": tmp_path / "out"}, processes=2))
    got = read(tmp_path / "out/metrics.jsonl")
    assert [row.keys() for row in got] == [row.keys() for row in expected]
    for a, b in zip(untimed(got), untimed(expected)):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-4)
    assert distance(weights_of(tmp_path / "out/model"), weights_of(flags["output_dir"] / "model")) < 2e-4


def test_killed_and_started_again(straight, tmp_path):
    flags, expected = straight
    out = tmp_path / "out"
    flags = flags | {"output_dir": out}
    process = start(flags)
    deadline = time.monotonic() + 600
    # Three steps are logged and two are saved: the third is to be made, and logged, again.
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "model").exists(), "the run was over before it was killed"
    assert mapper_rl.last_checkpoint(out).name == "checkpoint-000002"
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "rew')  # a line that the kill cut short
    finish(start(flags))
    assert untimed(read(out / "metrics.jsonl")) == untimed(expected)
    assert (out / "rollouts.jsonl").read_text() == (Path(straight[0]["output_dir"]) / "rollouts.jsonl").read_text()
    assert distance(weights_of(out / "model"), weights_of(straight[0]["output_dir"] / "model")) == 0
    assert "finished already" in finish(start(flags)) and len(read(out / "metrics.jsonl")) == 4


def test_solve_run_and_problems_that_are_too_long(straight, tmp_path):
    flags, _ = straight
    rows = [{k: row[k] for k in ("id", "problem", "answer")} for row in sum_demonstrations(9)]
    rows[4] |= {"id": "giant", "problem": "Add 1 and 2. " * 60}
    flags = flags | {"task": "solve", "steps": 3, "data": write(tmp_path / "d.jsonl", rows)}
    output = finish(start(flags | {"output_dir": tmp_path / "out", "show": 99, "passes": 2}))
    assert "left out 1 problems" in output and "giant" in output
    metrics = read(tmp_path / "out/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert 0 < row["reward"] <= row["correct"] < 1 and row["grad_norm"] > 0 and row["logprob_diff"] < 1e-3
        assert "gate" not in row
    rollouts = read(tmp_path / "out/rollouts.jsonl")
    answers = {row["id"]: row["answer"] for row in rows}
    assert len(rollouts) == 3 * 32 and len({r["id"] for r in rollouts}) == 8  # all but the giant one
    for r in rollouts:
        assert r["reward"] in (0.0, float(reward.verify(r["text"], answers[r["id"]])))
    assert any(r["reward"] for r in rollouts)
    assert len({r["text"] for r in rollouts}) > 10  # the samples of a request differ


DRIVER = """
import sys
import mapper_rl, reward

{change}

if __name__ == "__main__":
    mapper_rl.run(mapper_rl.main)
"""

CONSTANT = """
calls, real = [], reward.mapper_reward

def mapper_reward(*given):  # every rank rewards all rollouts: four groups of eight a step
    step, i = len(calls) // 32 + 1, len(calls) % 32
    calls.append(given)
    constant = step == 2 or (step == 3 and i >= 8)
    return 0.25 if constant else i % 2 + 0.01 * real(*given)

reward.mapper_reward = mapper_reward
"""


def test_steps_and_ranks_without_variance(straight, tmp_path):
    """Step 2 has no variance anywhere and is skipped; in step 3 one of four groups has any, which both ranks share."""
    flags, _ = straight
    (tmp_path / "driver.py").write_text(DRIVER.format(change=CONSTANT))
    flags = flags | {"output_dir": tmp_path / "out", "micro_batch_tokens": 200}
    output = finish(start(flags, 2, tmp_path / "driver.py"))
    assert "step 2: no group had any variance" in output
    metrics = read(tmp_path / "out/metrics.jsonl")
    assert [row["dropped_groups"] for row in metrics] == [0, 4, 3, 0]
    assert ["grad_norm" in row for row in metrics] == [True, False, True, True]
    assert metrics[1]["reward"] == 0.25 and "loss" not in metrics[1] and metrics[1]["generated_tokens"] > 0
    assert all(row["logprob_diff"] < 1e-3 for row in metrics if "logprob_diff" in row)


BROKEN = """
calls, real = [], reward.judge

def judge(*given):
    import os
    calls.append(given)
    if os.environ["RANK"] == "1" and len(calls) > 16:  # in step 2
        raise ArithmeticError("the judge has left the room")
    return real(*given)

reward.judge = judge
"""


def test_exception_on_one_rank_ends_all(straight, tmp_path):
    flags, _ = straight
    (tmp_path / "driver.py").write_text(DRIVER.format(change=BROKEN))
    process = start(flags | {"output_dir": tmp_path / "out"}, 2, tmp_path / "driver.py")
    deadline = time.monotonic() + 600
    metrics = tmp_path / "out/metrics.jsonl"
    while not metrics.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    output = end(process, 60)  # from the end of step 1 on, most of it torchrun's patience with the other rank
    assert process.returncode != 0
    assert "ArithmeticError: the judge has left the room" in output
    assert len(read(metrics)) == 1 and not (tmp_path / "out/model").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Misuse
# ---------------------------------------------------------------------------------------------------------------------


def fails(flags: dict, monkeypatch) -> str:
    """The one line with which the script ends."""
    monkeypatch.setattr(sys, "argv", ["mapper_rl.py", *command(flags)])
    with pytest.raises(SystemExit) as stop:
        mapper_rl.main()
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, stop.value.code
    return stop.value.code


@pytest.fixture(scope="module")
def bad_models(tiny_model, tmp_path_factory) -> dict[str, str]:
    folders = {}
    for name in ("bare", "silent", "foreign", "sliding"):
        folders[name] = str(tmp_path_factory.mktemp("bad") / name)
        shutil.copytree(tiny_model, folders[name])
    for path in Path(folders["bare"]).iterdir():  # no tokenizer
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            path.unlink()
    config = Path(folders["sliding"], "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_sliding_window": True, "sliding_window": 64}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    shutil.rmtree(folders["silent"])
    shutil.copytree(folders["bare"], folders["silent"])
    tokenizer.save_pretrained(folders["silent"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folders["foreign"])
    return folders


GOOD = sum_demonstrations(3)
BAD = [  # flags, rows of the data, what the line names
    ({"data": "nowhere.jsonl"}, GOOD, ["nowhere.jsonl", "no such file"]),
    ({}, [], ["data.jsonl", "empty"]),
    ({}, [GOOD[0], "{oops"], ["data.jsonl, line 2", "not JSON"]),
    ({}, [GOOD[0], {"id": "x", "problem": "p", "answer": "3"}], ["line 2", "'solution'", "missing"]),
    ({}, [GOOD[0] | {"answer": 7}], ["line 1", "'answer'", "str", "7"]),
    ({}, [GOOD[0], GOOD[1], GOOD[0]], ["line 3", "'s0'", "line 1"]),
    ({"group_size": 1}, GOOD, ["--group_size", "1"]),
    ({"align": "kl", "temperature": 0.5}, GOOD, ["--align kl", "--temperature 0.5"]),
    ({"temperature": 0}, GOOD, ["--temperature", "0"]),
    ({"temperature": "nan"}, GOOD, ["--temperature", "nan"]),
    ({"lr": -1}, GOOD, ["--lr", "-1"]),
    ({"steps": 0}, GOOD, ["--steps", "0"]),
    ({"clip_low": 1.5}, GOOD, ["--clip_low", "1.5"]),
    ({"kl_beta": 0.6}, GOOD, ["--kl_beta", "0.6"]),  # the alignment would leave [0, 1]
    ({"seed": -1}, GOOD, ["--seed", "-1"]),
    ({"max_tokens": 160}, GOOD, ["--max_tokens 160", "--max_model_len 160"]),
    ({"max_model_len": 4096}, GOOD, ["--max_model_len 4096", "512"]),
    ({"max_model_len": 40}, GOOD, ["data.jsonl", "no prompt fits"]),
    ({"task": "dance"}, GOOD, ["--task", "map", "solve", "dance"]),
    ({"align": "kll"}, GOOD, ["--align", "gain", "kll"]),
    ({"hard_cheats": "hedged"}, GOOD, None),  # a good one: the next is not refused for its flag
    ({"hard_cheats": "hedgehog"}, GOOD, ["--hard_cheats", "hedged", "hedgehog"]),
    ({"step": 7}, GOOD, ["--step 7"]),
    ({"colour": "red"}, GOOD, ["--colour red"]),
    ({"model": "nowhere"}, GOOD, ["nowhere"]),
    ({"model": "bare"}, GOOD, ["bare", "tokenizer"]),
    ({"model": "silent"}, GOOD, ["silent", "chat template"]),
    ({"model": "sliding"}, GOOD, ["sliding window", "--rollouts_per_row 1"]),
    ({"task": "solve", "target": "foreign"}, GOOD, ["--task solve", "--target"]),
    ({"target": "foreign"}, GOOD, ["tiny", "foreign", "share a tokenizer"]),
]


@pytest.mark.parametrize("flags, rows, words", BAD, ids=[f"{next(iter(b[0]), 'data')}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_ends_at_once_with_one_line(tiny_model, bad_models, tmp_path, monkeypatch, flags, rows, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl", rows)
    flags = {"model": tiny_model, "data": "data.jsonl", "output_dir": "out", "max_tokens": 24, **flags}
    flags = {"max_model_len": 160} | {k: bad_models.get(v, v) for k, v in flags.items()}
    if words is None:
        monkeypatch.setattr(sys, "argv", ["mapper_rl.py", *command(flags)])
        assert mapper_rl.parse_config(mapper_rl.Config, mapper_rl.RANGES).hard_cheats == ["hedged"]
        return
    line = fails(flags, monkeypatch)
    assert all(word in line for word in words), line


def test_folder_of_another_config_is_refused(straight, monkeypatch):
    flags, expected = straight
    line = fails(flags | {"lr": 2e-3}, monkeypatch)
    assert "--lr 0.001" in line and "0.002" in line and str(flags["output_dir"]) in line
    assert "--steps 4, not 8" in fails(flags | {"steps": 8}, monkeypatch)  # finished: nothing would be trained
    assert read(flags["output_dir"] / "metrics.jsonl") == expected


def test_fewer_steps_than_a_killed_run_has_made_are_refused(straight, tmp_path, monkeypatch):
    flags, _ = straight
    (tmp_path / "checkpoint-000004").mkdir()
    line = fails(flags | {"steps": 3, "output_dir": tmp_path}, monkeypatch)
    assert f"{tmp_path} has done 4 steps, more than --steps 3" in line and not (tmp_path / "config.json").exists()


def test_other_data_under_the_same_name_is_refused(straight, monkeypatch):
    flags, expected = straight
    data = Path(flags["data"])
    old = data.read_bytes()
    data.write_bytes(old + b"\n")
    assert f"{data} has changed since {flags['output_dir']} was begun" in fails(flags, monkeypatch)
    data.write_bytes(old)
    assert read(flags["output_dir"] / "metrics.jsonl") == expected


def test_groups_must_be_shared_evenly(straight, tmp_path):
    process = start(straight[0] | {"groups": 3, "output_dir": tmp_path / "out"}, 2)
    output = end(process, 300)
    assert process.returncode != 0 and output.count("--groups 3 must be a multiple of the 2 processes") == 1
    assert not (tmp_path / "out").exists()
