"""Prompts as token ids, ends of answers, and the engine that keeps to them."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, sum_demonstrations
from transformers import AutoTokenizer, GenerationConfig

import mapper_rl
import reward
import rewrite


@pytest.fixture(scope="module")
def dotted(tiny_model, tmp_path_factory) -> str:
    """The tiny model with a second end in its generation_config, as base models have: here the full stop."""
    folder = tmp_path_factory.mktemp("models") / "dotted"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [dot] = tokenizer.encode(".", add_special_tokens=False)
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, dot]).save_pretrained(folder)
    return str(folder)


def test_every_end_of_the_model_ends_an_answer(tiny_model, dotted):
    plain, tokenizer = reward.load_tokenizer(tiny_model), reward.load_tokenizer(dotted)
    [dot] = tokenizer.encode(".", add_special_tokens=False)
    assert reward.stop_ids(plain) == {reward.stop_id(plain)}
    assert reward.stop_ids(tokenizer) == {reward.stop_id(plain), dot}
    assert reward.stop_id(tokenizer) == reward.stop_id(plain) != dot  # training still teaches one
    ids = tokenizer.encode("1+2=3", add_special_tokens=False)
    assert reward.decode(tokenizer, [*ids, dot]) == "1+2=3" and reward.decode(plain, [*ids, dot]) == "1+2=3."
    tokenizer.chat_template = "{{ messages[-1].content }}\n"  # puts nothing of its own behind an answer
    assert reward.stop_id.__wrapped__(tokenizer) == tokenizer.eos_token_id


def test_template_that_is_suggested_begins_with_bos(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.bos_token = "<|im_start|>"
    shutil.rmtree(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit) as refused:
        reward.load_tokenizer(str(tmp_path / "base"))
    template = re.search(r"for plain text: (.*)", refused.value.code)[1].replace("\\n", "\n")
    (tmp_path / "base/chat_template.jinja").write_text(template)
    ids = reward.prompt_ids(reward.load_tokenizer(str(tmp_path / "base")), "Add 1 and 2.")
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == "Add 1 and 2.\n\n"


def test_prompt_is_the_same_on_every_day(tiny_model):
    """Llama 3.x writes `date_string`, today's if none is given, into its prompt."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ date_string or strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    assert tokenizer.decode(reward.prompt_ids(tokenizer, "Q")) == "26 Jul 2024: Q"


def test_seeds_of_requests_differ_and_fit_what_a_cpu_keeps():
    seeds = [mapper_rl.request_seed(0, place) for place in range(20_000)]
    assert max(seeds) < 2**32 and len(set(seeds)) > 19_990  # by chance 0.05 of them meet
    assert mapper_rl.request_seed(0, "guided", "a") != mapper_rl.request_seed(1, "guided", "a")
    assert sum(abs(a - b) < 8 for a, b in zip(sorted(seeds), sorted(seeds)[1:])) < 10  # nor do their samples


ENGINE = """
import json, sys
import torch
import mapper_rl, reward, rewrite

def main():
    dotted, other, out = sys.argv[1:]
    rank, world, device = rewrite.init_distributed()
    tokenizer = reward.load_tokenizer(dotted)
    flags = dict(device=device, vocab=reward.used_vocabulary(tokenizer), gpu_memory=0.5, seed=0)
    engine = rewrite.start_engine(dotted, 160, **flags)
    found = dict(precision=torch.get_float32_matmul_precision())
    prompt = reward.prompt_ids(tokenizer, reward.solve_prompt("Add 1 and 2."))
    [(_, output)] = rewrite.generate(engine, [prompt], [rewrite.sampling(tokenizer, 3, 1.0, 60, 5)])
    found["texts"] = [reward.decode(tokenizer, o.token_ids) for o in output.outputs]
    found["ends"] = [o.finish_reason for o in output.outputs]
    rewrite.stop_engine(engine)

    # another engine in the same process; then the trainer's forward on the same texts
    rows = json.loads(open(out + "/texts.json").read())
    engine = rewrite.start_engine(other, 400, **flags)
    found["engine"] = dict(rewrite.mean_aligns(engine, tokenizer, rows, 400))
    rewrite.stop_engine(engine)
    model = mapper_rl.load_model(other, device, train=False)
    pairs = [reward.text_ids(tokenizer, *row) for row in rows]
    found["trainer"] = [logprobs.mean().item() for logprobs in mapper_rl.score(model, pairs, 2000, device)]
    open(out + "/found.json", "w").write(json.dumps(found))

if __name__ == "__main__":
    rewrite.run(main)
"""


def test_engine_ends_answers_scores_as_the_trainer_does_and_can_be_started_again(tiny_model, dotted, tmp_path):
    rows = [
        (row["problem"], text) for row in sum_demonstrations(40) for text in (row["solution"], row["solution"][::-1])
    ]
    rows += [("Add 1 and 2.", ""), ("Add 1 and 2.", "1+2=3. " * 40)]  # nothing but the stop id; a long one
    (tmp_path / "texts.json").write_text(json.dumps(rows))
    (tmp_path / "driver.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{ENGINE}")
    command = [sys.executable, str(tmp_path / "driver.py"), dotted, tiny_model, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["precision"] == "high"  # vLLM would set it back to "highest"
    assert found["ends"] == ["stop"] * 3 and not any("." in text for text in found["texts"])
    assert len(found["engine"]) == len(rows) == len(found["trainer"])
    # A(y|x): stage 2's is stage 1's, in fp32
    differences = [abs(found["engine"][str(i)] - a) for i, a in enumerate(found["trainer"])]
    assert sum(differences) / len(rows) < 1e-5, max(differences)
    assert torch.tensor(found["trainer"]).std() > 0.5  # they are no constant


def test_rows_that_no_rank_has_written_are_named(tmp_path):
    rows = [{"id": f"r{i}", "value": i} for i in range(5)]
    for rank, part in ((0, rows[:2]), (1, rows[2:4])):
        (tmp_path / f"scored.rank{rank}.jsonl").write_text("".join(map(rewrite.json_line, part)))
    with pytest.raises(SystemExit, match="1 rows are in no scored.rank.*jsonl .r4."):
        rewrite.merge_parts(tmp_path, "scored", [row["id"] for row in rows], patience=0)
    assert len(list(tmp_path.glob("scored.rank*.jsonl"))) == 2 and not (tmp_path / "scored.jsonl").exists()
    assert rewrite.merge_parts(tmp_path, "scored", ["r3", "r0"], patience=0) == [rows[3], rows[0]]
    assert [json.loads(line)["id"] for line in (tmp_path / "scored.jsonl").read_text().splitlines()] == ["r3", "r0"]
    assert not list(tmp_path.glob("scored.rank*.jsonl"))
