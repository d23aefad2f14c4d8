"""All four scripts, unchanged, on models of three families as users have them: a byte-level vocabulary of thousands of
tokens inside an embedding padded to 151,936 rows, tied and untied heads. The weights are random, so there is nothing to
learn; a seeded random reward then shows that trainer and engine do move, and move together."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = 151_936  # of the embedding, as in Qwen's models; the tokenizer has 8,400 ids
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
ONSETS = "b br c ch cl d dr f fl g gr h j k l m n p pl pr qu r s sh sl sp st t th tr v w z".split()
VOWELS = "a ai e ea ee i o oa oo ou u".split()
CODAS = "b ck d ft g l ll lm m mp n nd ng nt p r rk rn rt s sk st t th x".split()
PLACES = "market farm school harbour library bakery garage station museum garden office workshop".split()
WORDINGS = [
    "{name} has {a} {thing} and buys {b} more at the {place} in {town}. How many {thing} does {name} have now?",
    "On {day} the {place} of {town} sold {a} {thing}; on the next day it sold {b}. How many {thing} were sold in all?",
    "There are {a} {adjective} {thing} in a box. Together with {name}, {other} puts {b} further ones into it. "
    "What is the number of {thing} in the box?",
    "{name} and {other} walked {a} miles towards {town}, rested near a {adjective} {place}, and walked {b} miles more. "
    "How far did they walk altogether?",
]


def word(rng: random.Random, syllables: int) -> str:
    """A word that might be English."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))


def demonstrations(count: int, seed: int = 0) -> list[dict]:
    """Rows {id, problem, solution, answer}: sums told in words, about ever other people, things and towns."""
    rng = random.Random(seed)
    days = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
    rows = []
    for i in range(count):
        a, b = rng.randrange(2, 100), rng.randrange(2, 100)
        story = rng.choice(WORDINGS).format(
            name=word(rng, 1).title(), other=word(rng, 2).title(), town=word(rng, 2).title(), thing=word(rng, 1) + "s",
            adjective=word(rng, 2) + "y", place=rng.choice(PLACES), day=rng.choice(days), a=a, b=b,
        )  # fmt: skip
        solution = f"We begin with {a} and add {b} to it, which gives {a} + {b} = {a + b}. "
        solution += f"Therefore the answer is \\boxed{{{a + b}}}."
        rows.append(dict(id=f"w{i}", problem=story, solution=solution, answer=str(a + b)))
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tokenizer, demonstrations and a benchmark."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("world")
    text = [row["problem"] + "\n" + row["solution"] for row in demonstrations(9000, seed=1)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text, vocab_size=8400, min_frequency=2, special_tokens=SPECIAL, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    assert len(tokenizer) == 8400
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, count, seed in (("demos", 8, 2), ("benchmark", 16, 3)):
        rows = demonstrations(count, seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_model(family: str, world: Path, folder: Path) -> None:
    import transformers

    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, vocab_size=ROWS, max_position_embeddings=512)
    shape |= dict(tie_word_embeddings=family != "Llama", eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    if family != "Qwen2":  # there it follows from the sizes above, and is the same
        shape["head_dim"] = 32
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**shape))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(script: Path, flags: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *flags.split()]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    return done.stdout


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_known(samples: list[dict]) -> None:
    """Ids behind the tokenizer's last one, 95% of the embedding, decode to nothing: of 24 one would be left."""
    assert sum(len(s["text"]) for s in samples) > 1.5 * sum(s["tokens"] for s in samples)


RANDOM_REWARD = """
import json, random, sys
import mapper_rl, reward

rng = random.Random(0)
reward.mapper_reward = lambda *parts: rng.random()
rollouts_of = mapper_rl.rollouts_of

def noted(*given):
    rollouts = rollouts_of(*given)
    with open(sys.argv[sys.argv.index("--output_dir") + 1] + "/ids.jsonl", "a") as out:
        out.write(json.dumps([r["ids"] for r in rollouts]) + "\\n")
    return rollouts

mapper_rl.rollouts_of = noted

if __name__ == "__main__":
    mapper_rl.run(mapper_rl.main)
"""


@pytest.fixture(scope="module", params=["Qwen3", "Qwen2", "Llama"])
def model(request, world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    make_model(request.param, world, folder)
    return folder


LENGTHS = "--max_tokens 24 --max_model_len 320"


def test_four_stages(model, world, tmp_path):
    demos = f"--data {world}/demos.jsonl"
    run(ROOT / "mapper_rl.py", f"--model {model} {demos} --steps 1 --groups 2 --group_size 2 {LENGTHS} --save_every 0 "
        f"--output_dir {tmp_path}/mapper")  # fmt: skip
    [line] = read(tmp_path / "mapper/metrics.jsonl")
    assert line["step"] == 1 and line["tokens"] > 20 and line["gate"] == 0 and line["tau"] >= 0.5

    run(ROOT / "rewrite.py", f"--mapper {tmp_path}/mapper/model --target {model} {demos} --samples 2 {LENGTHS} "
        f"--output_dir {tmp_path}/rewrites")  # fmt: skip
    train, scored = read(tmp_path / "rewrites/train.jsonl"), read(tmp_path / "rewrites/scored.jsonl")
    given = {row["id"]: row for row in demonstrations(8, 2)}
    assert [row["id"] for row in train] == [row["id"] for row in scored] == list(given)
    for row in train:  # nothing was right: the experts' texts are kept
        assert row["source"] == "expert" and row["solution"] == given[row["id"]]["solution"]
        assert -13 < row["expert_align"] < -10  # uniform over 151,936 rows: -11.9
    assert all(len(row["candidates"]) == 2 for row in scored)
    assert_known([c for row in scored for c in row["candidates"]])

    run(ROOT / "sft.py", f"--model {model} --data {tmp_path}/rewrites/train.jsonl --steps 2 --batch_size 4 --lr 1e-2 "
        f"--warmup 0 --output_dir {tmp_path}/sft")  # fmt: skip
    losses = [row["loss"] for row in read(tmp_path / "sft/metrics.jsonl")]
    assert len(losses) == 2 and losses[0] == pytest.approx(math.log(ROWS), abs=0.5) and losses[1] < losses[0] - 0.2
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "sft/model")
    assert tuned.get_input_embeddings().weight.shape == (ROWS, 64)
    assert (tuned.lm_head.weight is tuned.model.embed_tokens.weight) == tuned.config.tie_word_embeddings

    run(ROOT / "evaluate.py", f"--models base={model} sft={tmp_path}/sft/model --benchmarks {world}/benchmark.jsonl "
        f"--samples 1 {LENGTHS} --output_dir {tmp_path}/eval")  # fmt: skip
    for name in ("base", "sft"):
        rows = read(tmp_path / f"eval/{name}/benchmark.jsonl")
        assert [row["id"] for row in rows] == [f"w{i}" for i in range(16)]
        completions = [c for row in rows for c in row["completions"]]
        assert len(completions) == 32 and all(0 < c["tokens"] <= 24 for c in completions)
        assert sum(c["correct"] for c in completions) <= 1
        if name == "base":
            assert_known(completions)
        assert (tmp_path / f"eval/{name}/summary.json").exists()


def test_trainer_and_engine_move_together(model, world, tmp_path):
    """With this learning rate an engine that keeps its weights is 0.16 nats a token away after one step."""
    (tmp_path / "driver.py").write_text(RANDOM_REWARD)
    (tmp_path / "out").mkdir()
    run(tmp_path / "driver.py", f"--model {model} --data {world}/demos.jsonl --steps 3 --groups 4 --group_size 4 "
        f"{LENGTHS} --lr 1e-2 --warmup_steps 1 --save_every 0 --output_dir {tmp_path}/out")  # fmt: skip
    metrics = read(tmp_path / "out/metrics.jsonl")
    assert len(metrics) == 3
    for row in metrics:
        assert row["dropped_groups"] == 0 and row["grad_norm"] > 0
        assert row["logprob_diff"] < 0.05 and row["logprob_diff_max"] < 0.5
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert (before[name] - after[name]).abs().max() > 5e-3, name
    steps = read(tmp_path / "out/ids.jsonl")
    known = len(AutoTokenizer.from_pretrained(model))
    assert len(steps) == 3 and all(max(ids) < known for rollouts in steps for ids in rollouts)
    assert len({i for rollouts in steps for ids in rollouts for i in ids}) > 100
