"""The shape of the project: each script runs alone beside reward.py, and what several scripts need is one text."""

import ast
import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, sum_demonstrations

SCRIPTS = ("mapper_rl.py", "rewrite.py", "sft.py", "evaluate.py")
OWN = {"main"}  # each script's own, under a name that all have
ALIKE = 0.8  # two functions that share more of their lines than this are twins; those that are not are below 0.6


def functions(source: str) -> dict[str, str]:
    """{name: text} of a script's functions, docstrings and comments included."""
    lines = source.splitlines()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {
        n.name: "\n".join(lines[min([n.lineno, *(d.lineno for d in n.decorator_list)]) - 1 : n.end_lineno])
        for n in nodes
    }


def twins(scripts: dict[str, str]) -> list[str]:
    """What is wrong with the functions of several scripts: one name with two texts, one text under two names."""
    found, known = [], {script: functions(source) for script, source in scripts.items()}
    pairs = [(a, b) for i, a in enumerate(known) for b in list(known)[i + 1 :]]
    for a, b in pairs:
        for name, text in known[a].items():
            if name in OWN:
                continue
            if name in known[b] and known[b][name] != text:
                found.append(f"{name} differs in {a} and {b}")
            for other, twin in known[b].items():
                body, twin_body = (t.splitlines()[1:] for t in (text, twin))
                if other == name or min(len(body), len(twin_body)) < 5:
                    continue
                if difflib.SequenceMatcher(None, body, twin_body, autojunk=False).ratio() > ALIKE:
                    found.append(f"{name} of {a} and {other} of {b} are alike")
    return found


def test_what_stands_in_several_scripts_is_equal_letter_for_letter():
    scripts = {name: (ROOT / name).read_text() for name in SCRIPTS}
    assert twins(scripts) == []
    shared = set(functions(scripts["sft.py"])) & set(functions(scripts["evaluate.py"])) - OWN
    assert {"check", "run", "parse_config", "read_jsonl", "save_config"} <= shared  # the test sees them


def test_a_changed_or_renamed_copy_is_seen():
    scripts = {name: (ROOT / name).read_text() for name in SCRIPTS}
    for old, new, seen in (
        ("a file that is there is whole", "it is whole", "write_text differs in"),
        (
            "def save_config(",
            "def keep_config(",
            "save_config of mapper_rl.py and keep_config of evaluate.py are alike",
        ),
    ):
        assert old in scripts["evaluate.py"]
        assert seen in " ".join(twins(scripts | {"evaluate.py": scripts["evaluate.py"].replace(old, new)}))


def test_every_default_stands_on_one_line_with_what_it_means():
    """The help of a flag, and what runs/stages.sh compares a finished stage with, are read from that line."""
    for name in (*SCRIPTS, "runs/toy_world.py"):
        source = (ROOT / name).read_text()
        tree = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Config")
        for node in [n for n in tree.body if isinstance(n, ast.AnnAssign)]:
            line = source.splitlines()[node.lineno - 1]
            assert node.lineno == node.end_lineno and "  # " in line, f"{name}: {line}"


def test_scripts_import_nothing_of_the_project_but_reward():
    modules = {
        path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "runs").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    }
    for name in SCRIPTS:
        imported = set()
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
        assert imported & modules == {"reward"}, name
    top = [
        node
        for node in ast.parse((ROOT / "reward.py").read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {alias.name.split(".")[0] for node in top for alias in node.names if isinstance(node, ast.Import)}
    names |= {node.module.split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert names <= {*sys.stdlib_module_names}  # grading workers start it afresh


def test_each_script_runs_alone_beside_reward(tiny_model, tmp_path):
    """Copied with reward.py into an empty folder, in a fresh interpreter with only that folder on the path."""
    demos = tmp_path / "demos.jsonl"
    demos.write_text("".join(json.dumps(row) + "\n" for row in sum_demonstrations(6)))
    out = tmp_path / "out"
    lengths = "--max_tokens 30 --max_model_len 200"
    commands = {
        "mapper_rl.py": f"--model {tiny_model} --data {demos} --steps 1 --groups 2 --group_size 4 {lengths}",
        "rewrite.py": f"--target {tiny_model} --mapper {out}/mapper_rl/model --data {demos} --samples 2 {lengths}",
        "sft.py": f"--model {tiny_model} --data {out}/rewrite/train.jsonl --steps 1 --batch_size 2",
        "evaluate.py": f"--models sft={out}/sft/model --benchmarks {demos} --samples 1 {lengths}",
    }
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE")}
    for script, flags in commands.items():
        folder = tmp_path / "alone" / Path(script).stem
        folder.mkdir(parents=True)
        for name in (script, "reward.py"):
            shutil.copy(ROOT / name, folder)
        command = [sys.executable, script, *flags.split(), "--output_dir", f"{out}/{Path(script).stem}"]
        done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    assert json.loads((out / "evaluate/sft/summary.json").read_text())["benchmarks"]["demos"]["problems"] == 6
