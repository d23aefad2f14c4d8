"""The recipes from their first line to their last, with the model and the data replaced through the variables at their
top and nothing else changed: once on two nodes (two launches that meet over loopback), once on one."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, sum_demonstrations

sys.path.insert(0, str(ROOT / "runs"))
from report import Stage, lineage, rewrites

import reward

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory) -> Iterator[dict[str, str]]:
    """The variables at the top of a recipe: a small model that may read 4,096 tokens, demonstrations, benchmarks. The
    model stands in the hub's cache too, as tiny/sums."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(tiny_model, folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    cache = folder / "hub/models--tiny--sums"
    shutil.copytree(folder / "model", cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0" * 40)
    rows = sum_demonstrations(24)
    for name, part in (("demos", rows), ("one", rows[:4]), ("two", rows[4:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    benchmarks = f"{folder}/one.jsonl {folder}/two.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", f"{folder}/hub")
        yield {"MODEL": f"{folder}/model", "TRAIN": f"{folder}/demos.jsonl", "BENCHMARKS": benchmarks}


def start(recipe: str, variables: dict[str, str]) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "runs" / recipe)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/")


def is_free(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) != 0


def finish(process: subprocess.Popen) -> str:
    out = process.communicate(timeout=900)[0]
    assert process.returncode == 0, out
    return out


def summary(folder, model: str) -> dict:
    return json.loads((folder / "eval" / model / "summary.json").read_text())


def screenshot(page, scheme: str):
    """The page as headless Chromium shows it, without a network."""
    from PIL import Image

    picture = page.with_name(f"{scheme}.png")
    flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1000,3000".split()
    flags += [
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command = [CHROMIUM, *flags, f"--screenshot={picture}", f"file://{page}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return Image.open(picture).convert("RGB")


@pytest.fixture(scope="module")
def two_nodes(world, tmp_path_factory):
    """The output folder of DART, SFT and direct RL, all four stages across two nodes, of a model by its name."""
    out = tmp_path_factory.mktemp("two_nodes")
    port = str(next(first for first in range(20000, 30000, 10) if all(map(is_free, range(first, first + 6)))))
    shared = world | {
        "MODEL": "tiny/sums",
        "OUT": str(out),
        "MACHINE": "2x1",
        "HOST": "localhost",
        "PORT": port,
        "PLAN_GIB": "8",
    }
    nodes = [start("qwen3_gsm8k.sh", shared | {"NODE_RANK": str(rank)}) for rank in range(2)]
    for told in map(finish, nodes):
        assert told.count("\n--- ") == 6
    plan = [int(port) for port in re.findall(r"^torchrun .*localhost:(\d+)", told, flags=re.MULTILINE)]
    assert plan == list(range(int(port), int(port) + 6))
    return out


def test_two_nodes(two_nodes):
    for model in ("base", "sft", "dart", "grpo", "grpo-000001"):
        told = summary(two_nodes, model)["benchmarks"]
        assert {name: b["problems"] for name, b in told.items()} == {"one": 4, "two": 4}
    for stage, steps in (("sft", 2), ("dart/mapper", 1), ("dart/sft", 2), ("grpo", 2)):
        lines = (two_nodes / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1)), stage
    page = (two_nodes / "report.html").read_text()
    for section in (
        "Accuracy",
        "Accuracy against cost",
        "What the mapper learns",
        "Direct RL on the target",
        "Fine-tuning",
    ):
        assert f"<h2>{section}</h2>" in page
    assert "Missing" not in page and not re.search(r"(?:src|href)=.?https?:", page)
    assert page.count("<svg") == 4 == len(list(two_nodes.glob("figure-*.svg")))
    assert "| base | " in (two_nodes / "report.md").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="the page is not looked at: no chromium here (apt-get install chromium)")
def test_page_in_a_browser(two_nodes):
    light, dark = (screenshot(two_nodes / "report.html", scheme) for scheme in ("light", "dark"))
    assert light.getpixel((5, 5)) == (255, 255, 255) and sum(dark.getpixel((5, 5))) < 100
    for page in (light, dark):  # a table, figures and text, not an empty page
        colors = page.getcolors(1 << 24)
        assert len(colors) > 200 and 0.02 < 1 - max(count for count, _ in colors) / (1000 * 3000) < 0.5


def test_real_model_on_a_cpu(world, tmp_path):
    """runs/real.sh, whose plan is of this machine's memory; its demonstrations are no problems of the benchmarks."""
    few = {"DEMONSTRATIONS": "8", "PROBLEMS": "3", "STEPS": "1", "OUT": str(tmp_path)}
    told = finish(start("real.sh", world | few))
    assert len(re.findall("^GiB of a (?:process|GPU)", told, flags=re.MULTILINE)) == 7
    assert len(re.findall("^--- ", told, flags=re.MULTILINE)) == 7
    files = [tmp_path / "demos-8.jsonl", *map(Path, world["BENCHMARKS"].split())]
    demos, *asked = ([json.loads(line)["problem"] for line in path.read_text().splitlines()] for path in files)
    assert len(demos) == 8 and not set(demos) & set(sum(asked, []))
    for model in ("base", "expert", "untrained", "trained"):
        benchmarks = summary(tmp_path, model)["benchmarks"]
        assert {name: told["problems"] for name, told in benchmarks.items()} == {"one": 3, "two": 3}
    for arm in ("untrained", "trained"):
        assert json.loads((tmp_path / arm / "rewrite/config.json").read_text())["config"]["method"] == "dart"
    assert "Missing" not in (tmp_path / "report.md").read_text()
    assert finish(start("real.sh", world | few)).count("\n--- ") == 0  # started again, all is done
    more = start("real.sh", world | few | {"DEMONSTRATIONS": "9"})
    assert "demos-9.jsonl" in more.communicate(timeout=900)[0] and more.returncode == 1


@pytest.mark.parametrize("machine", ["8", "1x", "0x2", "x4"])
def test_machine_must_be_nodes_and_processes(world, machine):
    started = start("real.sh", world | {"MACHINE": machine, "OUT": "/nowhere"})
    assert f"MACHINE must be NODESxPROCESSES, as in 1x8, got {machine}" in started.communicate(timeout=60)[0]
    assert started.returncode == 2


def report(*arguments) -> tuple[int, str]:
    command = [str(ROOT / ".venv/bin/python"), str(ROOT / "runs/report.py"), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    return done.returncode, done.stdout


def test_page_of_what_there_is(two_nodes, tmp_path):
    """A run without its evaluation and rewrites, whose mapper's data is gone: the rest is shown, these are named. So is
    a model that is not here any more; where a model was not asked all benchmarks, its average stands in no column."""
    for stage in ("sft", "dart/mapper"):
        shutil.copytree(two_nodes / stage, tmp_path / "run" / stage, ignore=shutil.ignore_patterns("model*"))
    path = tmp_path / "run/dart/mapper/config.json"
    told = json.loads(path.read_text())
    told["config"]["data"] = str(tmp_path / "gone.jsonl")
    path.write_text(json.dumps(told))
    assert report(tmp_path / "run", "--out", tmp_path / "page")[0] == 0
    for page in ((tmp_path / "page" / f"report.{kind}").read_text() for kind in ("html", "md")):
        [missing] = [line for line in re.split(r"[\n>]", page) if line.startswith("Missing: ")]
        assert "an evaluation (evaluate.py); rewrites (rewrite.py); texts of dart/mapper: " in missing
        assert "gone.jsonl is not here" in missing and "fine-tuning" not in missing
        assert "What the mapper learns" in page and "Fine-tuning" in page and "Direct RL" not in page

    shutil.copytree(two_nodes / "eval", tmp_path / "eval")
    path = tmp_path / "eval/sft/summary.json"
    told = json.loads(path.read_text())
    del told["benchmarks"]["two"]
    path.write_text(json.dumps(told | {"model": str(tmp_path / "gone/sft/model")}))
    assert report(tmp_path / "eval")[0] == 0
    told = (tmp_path / "eval/report.md").read_text()
    assert f"what sft has left of its base: {tmp_path}/gone/sft/model is not here" in told
    cells = {line.split(" | ")[0]: line.split(" | ") for line in told.splitlines() if line.startswith("| ")}
    assert cells["| sft"][2:4] == ["-", "-"] and "-" not in cells["| dart"][1:4]

    (tmp_path / "empty").mkdir()
    code, told = report(tmp_path / "empty")
    assert code == 2 and f"{tmp_path}/empty: no stage below" in told and "Traceback" not in told
    code, told = report(tmp_path / "nothing")
    assert code == 2 and f"{tmp_path}/nothing: no such folder" in told and "Traceback" not in told


def test_what_is_left_of_the_base(two_nodes, world):
    """The column of the page against a forward pass of transformers alone, on text encoded by the tokenizer alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for name in ("one", "two") for line in (two_nodes / f"eval/base/{name}.jsonl").open()]
    answers = []
    for row in rows:
        right = [c["text"] for c in row["completions"] if c["correct"] and not c["greedy"]]
        answers += [(row["problem"], right[0])] if right else []
    lines = (two_nodes / "report.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    column = table[0].index("base's own")
    told = {row[0]: row[column] for row in table if len(row) > column}
    assert told["grpo-000001"] == "-"  # a point of a curve
    tokenizer = AutoTokenizer.from_pretrained(world["MODEL"])
    for name, folder in (("base", world["MODEL"]), ("dart", two_nodes / "dart/sft/model")):
        model, means = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
        for problem, answer in answers:
            chat = [{"role": "user", "content": reward.solve_prompt(problem)}]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
            ids[1].append(tokenizer.eos_token_id)
            with torch.no_grad():
                logprobs = model(torch.tensor([ids[0] + ids[1]])).logits[0, :-1].log_softmax(-1)
            means.append(logprobs[len(ids[0]) - 1 :].gather(1, torch.tensor(ids[1])[:, None]).mean().item())
        expected = sum(means) / len(means) if means else None
        assert (told[name] == "-") if expected is None else abs(float(told[name]) - expected) < 0.006  # two digits


def test_page_of_several_seeds(two_nodes, tmp_path):
    """What only its seed tells apart has one entry in a legend and a line for each seed; tables name the seeds."""
    drop = shutil.ignore_patterns("model*", "report*", "figure*")
    for seed in ("seed0", "seed1"):
        shutil.copytree(two_nodes, tmp_path / seed, ignore=drop)
    assert report(two_nodes, "--out", tmp_path / "one")[0] == 0
    assert report(tmp_path / "seed0", tmp_path / "seed1", "--out", tmp_path / "both")[0] == 0
    told = (tmp_path / "both/report.md").read_text()
    assert "| seed0/eval/dart | " in told and "| seed1/eval/dart | " in told
    one, both = ((tmp_path / folder / "report.html").read_text() for folder in ("one", "both"))
    losses = [re.search(r"<h2>Fine-tuning</h2>.*?</svg>", page, flags=re.DOTALL)[0] for page in (one, both)]
    for name in ("sft", "dart/sft"):
        assert [page.count(f">{name}</text>") for page in losses] == [1, 1]
    drawn = [len(re.findall(r'<g id="line2d_\d+">\s*<path [^>]*clip-path', page)) for page in losses]
    assert drawn[1] == drawn[0] + 2  # a line more for sft and for dart/sft; the grid's are as many


@pytest.mark.skipif("SLOW" not in os.environ, reason="22 stages, several minutes; SLOW=1 bash tests/run.sh runs it too")
def test_every_method(world, tmp_path):
    """Mind the Gap, RASFT, their baselines and DART, with demonstrations of a teacher."""
    variables = world | {"OUT": str(tmp_path), "TEACHER": world["MODEL"], "PLAN_GIB": "8"}
    out = finish(start("qwen25_math_numina.sh", variables))
    for model in ("base", "sft", "dft", "mtg", "mtg_dft", "rasft", "dart"):
        assert summary(tmp_path, model)["benchmarks"]["one"]["n"] == 16
        assert model in out
    teacher = [json.loads(line) for line in (tmp_path / "teacher/train.jsonl").read_text().splitlines()]
    assert 12 < len(teacher) <= 24 and {row["source"] for row in teacher} == {"self"}
    last = json.loads((tmp_path / "rasft/round-2/sft/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2  # of one schedule over both rounds


def test_a_model_costs_what_all_stages_before_it_took(tmp_path):
    """RL on a model that was fine-tuned on rewrites of a trained mapper's; the rewriting's demonstrations lie beside
    its result, the others in a folder that is no stage or no rewriting."""
    for name, script, flags in (
        ("mapper", "mapper_rl", {"data": "x/demos.jsonl", "model": "base/model"}),
        ("texts", "rewrite", {"data": "texts/demos.jsonl", "mapper": "mapper/model"}),
        ("sft", "sft", {"data": "texts/train.jsonl", "model": "base/model"}),
        ("rl", "mapper_rl", {"data": "sft/demos.jsonl", "model": "sft/model"}),
    ):
        (tmp_path / name).mkdir()
        told = {"config": {k: str(tmp_path / v) for k, v in flags.items()}, "command": [f"{script}.py"]}
        (tmp_path / name / "config.json").write_text(json.dumps(told))
    stages = {tmp_path / name: Stage(tmp_path / name, tmp_path, "") for name in ("mapper", "texts", "sft", "rl")}
    found = [stage.name for stage in lineage(str(tmp_path / "rl/model"), stages)]
    assert sorted(found) == ["mapper", "rl", "sft", "texts"]
    assert lineage(str(tmp_path / "base/model"), stages) == []


def test_a_text_of_the_first_steps_is_not_shown_as_one_after_training(tmp_path):
    demos = tmp_path / "demos.jsonl"
    demos.write_text("".join(json.dumps({"id": i, "problem": "?", "solution": "expert"}) + "\n" for i in "ab"))
    told = {"config": {"data": str(demos)}, "command": ["mapper_rl.py"]}
    (tmp_path / "config.json").write_text(json.dumps(told))
    seen = [(1, "a", "early"), (2, "b", "early"), (9, "b", "late")]  # a is not asked again: one epoch
    lines = [json.dumps({"step": step, "id": i, "text": text}) + "\n" for step, i, text in seen]
    (tmp_path / "rollouts.jsonl").write_text("".join(lines))
    mapper = Stage(tmp_path, tmp_path, "")
    [shown] = rewrites(mapper, [mapper])
    assert shown["texts"] == {"expert": "expert", "before training": "early", "after training": "late"}
