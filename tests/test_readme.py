"""The reader's path: what README.md, the docstrings and results/ say of files, flags, commands and numbers is so.

Each check takes a text and returns what is wrong in it. It is asked about the texts as they are (nothing may be wrong)
and about a text with one thing spoilt (`test_a_check_sees_what_was_spoilt`: something must be).
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

STAGES = ("mapper_rl.py", "rewrite.py", "sft.py", "evaluate.py")
FOLDERS = ("", "runs", "tests")  # where a bare name of a script is looked for
TORCHRUN = "standalone nnodes nproc-per-node node-rank rdzv-backend rdzv-endpoint master-addr master-port".split()
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # t, by seeds
NUMBER = r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?![\w]|[.,]\d)"


def page(name: str) -> str:
    return (ROOT / name).read_text()


def docstrings(path: Path) -> str:
    """All docstrings of a Python file; the comments of a shell script that have a line of their own."""
    source = path.read_text()
    if path.suffix == ".sh":
        lines = [line for line in source.splitlines() if re.match(r" *#(?!!)", line)]
        return "\n".join(re.sub(r"^ *# ?", "", line) for line in lines)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return "\n\n".join(filter(None, found))


def names() -> list[str]:
    """Every page and script whose words are checked."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("runs/*.py"), *ROOT.glob("runs/*.sh"), *ROOT.glob("results/*.md")]
    return ["README.md", *sorted(str(path.relative_to(ROOT)) for path in paths)]


def words(name: str) -> str:
    return page(name) if name.endswith(".md") else docstrings(ROOT / name)


def script(name: str) -> Path | None:
    """The file that `sft.py` or `runs/plan.py` means."""
    places = [ROOT / name] if "/" in name else [ROOT / folder / name for folder in FOLDERS]
    return next((path for path in places if path.is_file()), None)


@functools.cache
def config(name: str):
    """The Config of one of the four stages."""
    return importlib.import_module(name.removesuffix(".py")).Config


@functools.cache
def flags_of(name: str) -> set[str]:
    """Names of a script's flags, without dashes."""
    if name in STAGES:
        return {field.name for field in dataclasses.fields(config(name))} | {"help"}
    path, flags = script(name), {"help"}
    for node in ast.walk(ast.parse(path.read_text())) if path and path.suffix == ".py" else ():
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            flags |= {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            given = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            flags |= {value.lstrip("-") for value in given if value.startswith("--")}
    return flags


def blocks(text: str) -> list[str]:
    """Paragraphs, list items, rows of tables, and single lines of fenced code (with what a backslash continues)."""
    found, fenced = [""], False
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.startswith("```"):
            fenced = not fenced
            found.append("")
        elif fenced or line.startswith("|") or re.match(r"- ", line):
            found += [f"`{line}`" if fenced else line, ""] if fenced or line.startswith("|") else [line]
        elif not line.strip():
            found.append("")
        else:
            found[-1] += "\n" + line
    return [block for block in found if block.strip()]


def outside_code(text: str) -> str:
    """Prose and tables: without code, addresses of links, and numbers of papers."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "", "\n".join(line for line in text.splitlines() if not line.startswith("    ")))
    return re.sub(r"\b\d{4}\.\d{5}\b", "", re.sub(r"\]\([^)]*\)|https?://\S+", "", text))


# --- the checks: a text -> what is wrong in it ---
def missing_paths(text: str) -> list[str]:
    """Names below runs/, tests/ and results/, and bare names of scripts, that are not there."""
    text = re.sub(r"https?://\S+", "", text)
    found = re.findall(r"(?<![\w/.$-])((?:runs|tests|results)/[\w.*/-]*|[\w-]+\.(?:py|sh|toml|txt))(?!\w)", text)
    found = [name.rstrip(".-") for name in found]
    return [name for name in found if not (script(name) or any(ROOT.glob(name)))]


def broken_links(text: str, folder: Path = ROOT) -> list[str]:
    """Links that lead to no file."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [link for link in links if not link.startswith("http") and not (folder / link).exists()]


def unknown_flags(text: str, own: tuple[str, ...] = ()) -> list[str]:
    """Flags that are not fields of the script they are named with: the script before them in the same line of code;
    else one of those in the same block, or of the `own` ones; where there are none, any."""
    faults = []
    for block in blocks(text):
        named = {Path(name).name for name in re.findall(r"[\w/]+\.py\b", block)} | set(own)
        named = {name for name in named if flags_of(name) != {"help"}}
        for i, piece in enumerate(block.split("`")):
            for line in piece.splitlines():
                code, before = i % 2 or re.search(r"^    |\b(?:python|torchrun)\b", line), None
                for name, flag in re.findall(r"([\w/]+\.py)\b|(?<![\w-])--([a-z][\w-]*)", line):
                    if name:
                        before = Path(name).name if code else None
                        continue
                    allowed = [before] if before else named or {*STAGES, "plan.py", "prepare.py", "report.py"}
                    known = set().union(*map(flags_of, allowed)) | (set() if before else set(TORCHRUN))
                    if flag not in known:
                        faults.append(f"--{flag} of {', '.join(sorted(allowed))}")
    return faults


def unknown_fields(text: str) -> list[str]:
    """In the table of ablations (its second column names scripts): what is to be changed and is not there."""
    faults, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        inside = line.startswith("|") and (inside or cells[:2] == ["question", "script"])
        if not inside or set(line) <= set("|-") or cells[0] == "question":
            continue
        scripts = re.findall(r"`(\w+\.py)`", cells[1])
        fields = re.findall(r"`([a-z_]+)(?: = ([^`]*))?`", cells[2])
        if not scripts or not fields:
            faults.append(f"no script or no field: {line}")
        for field, value in fields:
            modules = [importlib.import_module(name.removesuffix(".py")) for name in scripts]
            if not any(hasattr(module, field) or field in flags_of(s) for module, s in zip(modules, scripts)):
                faults.append(f"{field} of {', '.join(scripts)}")
            elif value and (fault := refused(scripts[0], [f"--{field}", str(ast.literal_eval(value))])):
                faults.append(fault)
    return faults


def refused(name: str, arguments: list[str]) -> str:
    """Why a stage refuses these arguments, if it does: as it reads its command line."""
    module = importlib.import_module(name.removesuffix(".py"))
    needed = ["models", "benchmarks", "output_dir"] if name == "evaluate.py" else module.RANGES["needed"].split()
    given = [word for flag in needed if f"--{flag}" not in arguments for word in (f"--{flag}", "x")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as error:
        patch.setattr(sys, "argv", [name, *given, *arguments])
        try:
            module.parse_config(module.Config, module.RANGES)
        except SystemExit as end:
            return f"{name} refuses {' '.join(arguments)}: {end.code} {error.getvalue()}"
    return ""


def commands(text: str) -> list[tuple[dict[str, str], list[str]]]:
    """(variables, words) of each command in the bash blocks and in code within sentences."""
    found, kept = [], {}
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ").splitlines()
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += re.findall(r"`((?:[A-Z_]+=\S+ )*(?:bash|python|torchrun) [^`]*)`", rest)
    for line in lines:
        for name, value in kept.items():
            line = re.sub(rf"\${name}\b", value, line)
        for part in re.split(r" && ", line):
            parts, env = shlex.split(part, comments=True), {}
            while parts and re.match(r"[A-Z_]+=", parts[0]):
                name, _, env[name] = parts.pop(0).partition("=")
            if parts and parts[0] not in ("source", "export"):
                found.append((env, parts))
            else:
                kept |= env
    return found


def broken_commands(text: str) -> list[str]:
    """Commands whose script, flags, values, arms or variables are unknown."""
    faults = []
    for env, parts in commands(text):
        at = next((i for i, part in enumerate(parts) if re.fullmatch(r"[\w/.-]+\.(py|sh)", part)), None)
        path = script(parts[at]) if at is not None else None
        if path is None:
            faults.append(f"no script in: {shlex.join(parts)}")
            continue
        before, rest, name = parts[:at], parts[at + 1 :], path.name
        if before[:1] not in (["bash"], ["torchrun"], ["python"], [".venv/bin/python"]):
            faults.append(f"not a way to start {name}: {shlex.join(before)}")
        flags = [word[2:].partition("=")[0] for word in before if word.startswith("--")]
        faults += [f"torchrun has no --{flag}" for flag in flags if flag not in TORCHRUN]
        if path.suffix == ".sh":
            if subprocess.run(["bash", "-n", str(path)]).returncode:
                faults.append(f"{name} is not a shell script")
            source = path.read_text() + page("runs/stages.sh")
            faults += [f"{name} reads no {key}" for key in env if not re.search(rf"\$\{{?{key}\b", source)]
            arms = re.search(r"^ALL=\((.*)\)", source, flags=re.MULTILINE)
            if "tests" not in path.parts:
                known = arms[1].split() if arms else []
                faults += [f"{name} has no arm {word}" for word in rest if word not in known]
        elif "--help" not in rest:
            faults += [f"{name} has no {w}" for w in rest if w.startswith("--") and w[2:] not in flags_of(name)]
            if name in STAGES and (fault := refused(name, rest)):
                faults.append(fault)
    return faults


def spread(values: list[float]) -> list[float]:
    """Mean and standard deviation over seeds, in percent."""
    return [100 * statistics.fmean(values), 100 * statistics.stdev(values)]


def difference(a: list[float], b: list[float]) -> list[float]:
    """Mean, in points, and half of its 95% interval over seeds (t, paired)."""
    points = [100 * (x - y) for x, y in zip(a, b)]
    return [statistics.fmean(points), T95[len(points)] * statistics.stdev(points) / len(points) ** 0.5]


def prints(text: str, values: list[float], between: str = " ± ") -> bool:
    """Whether the text is these values with one digit each (either digit, if a value lies between two)."""
    parts = text.split(between) if text else []
    return len(parts) == len(values) and all(
        re.fullmatch(r"[+-]?\d+\.\d", part) and abs(float(part) - value) < 0.05 + 1e-9
        for part, value in zip(parts, values)
    )


def wrong_cells(text: str) -> list[str]:
    """Cells of the table of arms (rows that name an arm in brackets) that results/toy.json does not have."""
    arms, faults, seen = json.loads(page("results/toy.json"))["arms"], [], []
    head = next(line for line in text.splitlines() if line.startswith("| arm |"))
    columns = [cell.strip().replace(" ", "_") for cell in head.strip("|").split("|")][1:]
    for line in text.splitlines():
        if not (row := re.match(r"\|[^|]*\(`(\w+)`\) \|(.*)\|$", line)):
            continue
        arm, cells = row[1], [cell.strip() for cell in row[2].split("|")]
        if arm not in arms:
            faults.append(f"no arm {arm}")
            continue
        seen.append(arm)
        values = arms[arm]["suites"] | {"average": arms[arm]["average"]}
        expected = [spread(values[name]) for name in columns if name in values]
        expected.append([] if arm == "sft" else difference(arms[arm]["average"], arms["sft"]["average"]))
        faults += [f"{arm}: {c!r}, not {true}" for c, true in zip(cells, expected, strict=True) if not prints(c, true)]
    if seen != ["base", "sft", "prompted", "prompted_dart", "dart", "grpo", "oracle"]:
        faults.append(f"the table has the arms {seen}")
    return faults


def wrong_orders(text: str, data: str = "results/toy.json") -> list[str]:
    """Rows of the table of differences on a results page that its data does not have."""
    arms, faults = json.loads(page(data))["arms"], []
    rows = re.findall(r"\| (\w+) \| (\w+) \| ([^|]*) \| ([^|]*), p [\d.]+ \|", text)
    for a, b, seeds, mean in rows:
        one, two = arms[a]["average"], arms[b]["average"]
        by_seed = [100 * (x - y) for x, y in zip(one, two)]
        if not (prints(seeds, by_seed, ", ") and prints(mean, difference(one, two))):
            faults.append(f"{a} - {b}: {seeds}; {mean}, not {by_seed}; {difference(one, two)}")
    return faults if rows else ["no rows"]


def numbers(text: str) -> list[str]:
    """Numbers without signs; those that belong together, as 1.1 ± 6.6 or 20 to 24 do, together."""
    return re.findall(rf"{NUMBER}(?: (?:±|to|of) [+-]?{NUMBER})*", text)


def known_numbers(*paths: Path) -> set[str]:
    text = "\n".join(path.read_text() for path in paths)
    return {*numbers(text), *re.findall(NUMBER, text)}


def unsourced_numbers(text: str) -> list[str]:
    """Numbers that do not stand in the pages and scripts that their block names; where it names none, in no page of
    results/ and no script."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("runs/*"), *ROOT.glob("results/*.md")]
    everywhere, faults = known_numbers(*filter(Path.is_file, files)), []
    for block in blocks(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"\|[^|]*\(`\w+`\) \|", block):  # the table of arms: wrong_cells
            continue
        named = [ROOT / link for link in re.findall(r"\]\((results/\w+\.md)\)", block)]
        named += filter(None, map(script, re.findall(r"`([\w/]+\.(?:py|sh))`", block))) if named else []
        known = known_numbers(*filter(Path.is_file, named)) if named else everywhere
        faults += [number for number in numbers(outside_code(block)) if number not in known]
    return faults


def too_long(text: str) -> list[str]:
    lines = text.splitlines()
    faults = [line for line in lines if len(line) > 120 and not line.startswith("|")]
    return faults + ([f"{len(lines)} lines"] if len(lines) > 200 else [])


# --- the texts as they are ---
@pytest.mark.parametrize("name", names())
def test_paths_exist(name):
    assert missing_paths(words(name)) == []


@pytest.mark.parametrize("name", [name for name in names() if name.endswith(".md")])
def test_links_resolve(name):
    assert broken_links(page(name), (ROOT / name).parent) == []


@pytest.mark.parametrize("name", names())
def test_flags_are_fields(name):
    own = {".": (name,), "runs": (Path(name).name, *STAGES)}  # what is in runs/ speaks of all stages
    assert unknown_flags(words(name), () if name.endswith(".md") else own[str(Path(name).parent)]) == []


def test_ablations_name_fields():
    assert unknown_fields(page("README.md")) == []


def test_commands_can_be_given():
    assert len(commands(page("README.md"))) >= 15
    assert broken_commands(page("README.md")) == []


def test_free_commands_run(tmp_path):
    """Those that cost nothing, with this environment's python; a recipe's plan with a model's shape and no weights."""
    shape = dict(
        model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=151936, hidden_size=1024,
        intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        tie_word_embeddings=True, max_position_embeddings=40960,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    free = [(env, parts) for env, parts in commands(page("README.md")) if "--help" in parts or "PLAN" in env]
    assert len(free) >= 2
    for env, parts in free:
        if "PLAN" in env and not (ROOT / ".venv/complete").exists():
            continue  # it would install the environment first
        python = [sys.executable, *parts[1:]] if parts[0] == "python" else parts
        env = os.environ | env | {"MODEL": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(python, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (parts, done.stdout[-2000:], done.stderr[-2000:])
        assert ("GiB" if "PLAN" in env else "usage") in done.stdout


def test_table_of_arms():
    assert wrong_cells(page("README.md")) == []


def test_orders_of_arms():
    assert wrong_orders(page("results/toy.md")) == []
    assert wrong_orders(page("results/compare.md"), "results/compare.json") == []


def test_numbers_have_a_source():
    assert unsourced_numbers(page("README.md")) == []


def test_length():
    assert too_long(page("README.md")) == []


# --- and with one thing spoilt ---
SPOILT = [
    (missing_paths, "README.md", "`runs/plan.py`", "`runs/plans.py`"),
    (missing_paths, "README.md", "`reward.py`", "`rewards.py`"),
    (missing_paths, "README.md", "(results/tune.md)", "(results/tunes.md)"),
    (broken_links, "README.md", "(results/toy.svg)", "(results/toys.svg)"),
    (broken_links, "README.md", "(LICENSE)", "(LICENCE)"),
    (unknown_flags, "README.md", "`--micro_batch_tokens`", "`--micro_batch`"),
    (unknown_flags, "README.md", "rewrite.py --method map", "sft.py --method map"),
    (unknown_flags, "README.md", "--method self --fallback", "--method self --fall_back"),
    (unknown_flags, "README.md", "--nproc-per-node", "--procs-per-node"),
    (unknown_flags, "README.md", "`sft.py --loss rasft --start_from", "`sft.py --loss rasft --starts_from"),
    (unknown_fields, "README.md", "`divide_by_std`", "`divide_by_deviation`"),
    (unknown_fields, "README.md", '`keep = "random"`', '`keep = "randomly"`'),
    (unknown_fields, "README.md", "`solve_prompt`", "`solving_prompt`"),
    (unknown_fields, "README.md", "| `mapper_rl.py` | `model`", "| | `model`"),
    (broken_commands, "README.md", "$RUN sft.py --model", "$RUN sft.py --models"),
    (broken_commands, "README.md", "$RUN sft.py", "$RUN tune.py"),
    (broken_commands, "README.md", "rewrite.py --method dart --mapper out/mapper/model --target",
     "rewrite.py --method darts --mapper out/mapper/model --target"),
    (broken_commands, "README.md", "torchrun --standalone", "torchrun --stand-alone"),
    (broken_commands, "README.md", "runs/toy.sh dart ", "runs/toy.sh dirt "),
    (broken_commands, "README.md", "\nPLAN=1 ", "\nPLANS=1 "),
    (broken_commands, "README.md", "bash runs/setup.sh", "bash runs/set_up.sh"),
    (wrong_cells, "README.md", "| 74.4 ± 27.2 |", "| 74.5 ± 27.2 |"),
    (wrong_cells, "README.md", "+26.6 ± 21.3", "+26.6 ± 21.2"),
    (wrong_cells, "README.md", "(`prompted`) |", "(`prompting`) |"),
    (wrong_orders, "results/toy.md", "+1.1, +32.5, +14.6, +20.4, +1.3 |", "+1.1, +32.5, +14.6, +20.4, +1.4 |"),
    (wrong_orders, "results/toy.md", "| +13.9 ± 16.6,", "| +13.9 ± 1.6,"),
    (unsourced_numbers, "README.md", "+45.4 ± 19.6", "+45.9 ± 19.6"),
    (unsourced_numbers, "README.md", "43 minutes", "97 minutes"),
    (unsourced_numbers, "README.md", "-1.74", "-1.73"),
    (unsourced_numbers, "README.md", "The usual", "The 987 usual"),
    (too_long, "README.md", "\n\n## The map", "\n" * 200 + "## The map"),
]  # fmt: skip


@pytest.mark.parametrize("check, name, old, new", SPOILT)
def test_a_check_sees_what_was_spoilt(check, name, old, new):
    text = page(name)
    assert old in text, f"{name} has no {old!r} to spoil: choose something else in SPOILT"
    assert len(check(text.replace(old, new))) > len(check(text))
