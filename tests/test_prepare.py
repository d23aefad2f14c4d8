"""runs/prepare.py on data sets laid out like the hub's: folders named like its ids, found by the real loading code."""

import io
import json
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "runs"))
import prepare as script  # noqa: E402

GSM8K = [
    {
        "question": "Ann has 16 eggs and eats 3 of them every single morning; how many eggs are left for her friends?",
        "answer": "She has 16 - 3 = <<16-3=13>>13 eggs.\n#### 13",
    },
    {"question": "Bob buys a car.", "answer": "It costs $1,200 in all.\n#### 1,200"},
    {"question": "What is left?", "answer": "There are 3 apples, but no final line."},
    {"question": "", "answer": "Nothing is asked.\n#### 1"},
]


def prepare(folder, *args: str) -> SimpleNamespace:
    """The script in this process (it takes seconds to import), started in that folder."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with chdir(folder), redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", *args])
        try:
            script.main()
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # as run() prints it
                print(code, file=err)
                code = 2
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def hub(tmp_path):
    """A working folder in which openai/gsm8k and others stand as the hub lays them out: Parquet, a README."""
    import datasets

    def add(name: str, config: str, split: str, rows: list[dict]) -> None:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{config}/{split}-00000-of-00001.parquet")
        files = f"  data_files:\n  - split: {split}\n    path: {config}/{split}-*\n"
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n{files}---\n")

    add("openai/gsm8k", "main", "train", GSM8K)
    olympiad = {"question": "Find all $n$.", "solution": ["By parity, $n=2$.", "another"], "final_answer": ["$2$"]}
    add("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", [olympiad])
    svamp = {"Body": "Ann has 3 pens.", "Question": "How many after 2 more?", "Answer": "5.0"}
    add("ChilleD/SVAMP", "default", "test", [svamp])
    asdiv = {"body": "Seven apples and two.", "question": "How many?", "answer": "9 (apples)"}
    add("EleutherAI/asdiv", "asdiv", "validation", [asdiv])
    return tmp_path


def test_demonstrations_of_gsm8k(hub):
    """Calculator marks go, the answer moves into a box, rows without an answer or a problem are counted."""
    done = prepare(hub, "gsm8k_train")
    assert done.returncode == 0, done.stderr
    first, second = rows_of(hub / "data/gsm8k_train.jsonl")
    assert first["solution"] == "She has 16 - 3 = 13 eggs.\nThe answer is \\boxed{13}."
    assert first["id"] == "gsm8k_train-0" and first["problem"] == GSM8K[0]["question"] and first["answer"] == "13"
    assert second["answer"].replace(",", "") == "1200" and second["solution"].endswith("\\boxed{1,200}.")
    assert "4 of 4 rows read, left out 2 without a problem, a solution or an answer, 0 whose" in done.stdout


def test_benchmarks(hub):
    """Lists, joined columns, dollars and units as each data set has them; several in one call."""
    done = prepare(hub, "olympiadbench", "svamp", "asdiv")
    assert done.returncode == 0, done.stderr
    [olympiad], [svamp], [asdiv] = (rows_of(hub / f"data/{n}.jsonl") for n in ("olympiadbench", "svamp", "asdiv"))
    assert olympiad["answer"] == "2" and olympiad["solution"] == "By parity, $n=2$."
    assert svamp["problem"] == "Ann has 3 pens. How many after 2 more?" and svamp["answer"] == "5.0"
    assert asdiv["answer"] == "9" and "solution" not in asdiv


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_own_file_with_named_columns(tmp_path, suffix):
    import datasets

    data = datasets.Dataset.from_list([{"q": f"What is {i}+1?", "a": f"It is \\boxed{{{i + 1}}}"} for i in range(40)])
    writer = {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[suffix]
    writer(tmp_path / f"mine.{suffix}")
    done = prepare(tmp_path, f"mine.{suffix}", "--problem", "q", "--solution", "a")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "data/mine.jsonl")
    assert len(rows) == 40 and rows[7] == dict(
        id="mine-7", problem="What is 7+1?", solution="It is \\boxed{8}", answer="8"
    )
    args = (f"mine.{suffix}", "--problem", "q", "--solution", "a", "--limit", "10", "--out")
    draws = []
    for out, seed in (("a.jsonl", "1"), ("b.jsonl", "1"), ("c.jsonl", "2")):
        assert prepare(tmp_path, *args, out, "--seed", seed).returncode == 0
        draws.append([row["id"] for row in rows_of(tmp_path / out)])
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) == 10


def test_local_copy_of_a_named_set(tmp_path):
    write(tmp_path / "copy.jsonl", GSM8K[:2])
    done = prepare(tmp_path, "gsm8k_train", "--local", "copy.jsonl")
    assert done.returncode == 0, done.stderr
    assert [row["answer"] for row in rows_of(tmp_path / "data/gsm8k_train.jsonl")] == ["13", "1,200"]


def test_decontamination(hub):
    """13 words in a row, whatever case and punctuation; a short problem only as a whole; 12 words are no match."""
    long = "ann HAS 16 eggs, and eats 3 of them every single morning!"  # 12 words: no match
    write(hub / "near.jsonl", [{"id": "0", "problem": long, "answer": "1"}])
    write(hub / "long.jsonl", [{"id": "0", "problem": f"Yes: {long} how", "answer": "1"}])
    write(hub / "short.jsonl", [{"id": "0", "problem": "Bob buys a CAR", "answer": "1"}])
    done = prepare(hub, "gsm8k_train", "--decontaminate", "near.jsonl", "--out", "all.jsonl")
    assert [row["answer"] for row in rows_of(hub / "all.jsonl")] == ["13", "1,200"], done.stderr
    done = prepare(hub, "gsm8k_train", "--decontaminate", "long.jsonl", "short.jsonl", "--out", "none.jsonl")
    assert done.returncode == 2 and not (hub / "none.jsonl").exists()
    assert (
        "1 that share 13 words with long.jsonl, 1 that share 13 words with short.jsonl; nothing is left" in done.stderr
    )


def test_the_words_that_mbpp_is_given_by_us_are_not_shared():
    asked = [
        f"Write a function to {what} of a list of numbers.\nYour code should pass this test:\n\nassert f([1]) == {n}"
        for what, n in (("get the sum", 1), ("say what is the longest prime", 7))
    ]
    assert len(script.grams(asked[0])) > 1 and not script.grams(asked[0]) & script.grams(asked[1])


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["gsm8k_tran"], "did you mean gsm8k_train?"),
        (["aime24", "nowhere.csv"], "nowhere.csv: neither a known data set nor a file"),
        (["math500"], "HuggingFaceH4/MATH-500: cannot be loaded ("),
        (["gsm8k_train", "--problem", "text"], "openai/gsm8k: no column 'text', it has question, answer"),
        (["gsm8k_train", "--local", "notes.txt"], "a file must end in .jsonl"),
        (["notes.txt"], "--problem must name the column"),
        (["gsm8k_train", "svamp", "--out", "x.jsonl"], "one data set at a time"),
        (["gsm8k_train", "--decontaminate", "none.jsonl"], "none.jsonl: no such file"),
        (["gsm8k_train", "--local", "nowhere"], "--local nowhere: no such file or folder"),
        (["mine.jsonl", "--problem", "q", "--answer", "a", "--local", "mine.jsonl"], "mine.jsonl is a file itself"),
        (["mine.jsonl", "--problem", "q", "--answer", "a", "--out", "openai"], "--out openai is a folder"),
        (["mine.jsonl", "--problem", "q", "--answer", "a", "--out", "mine.jsonl"], "mine.jsonl is read and would be"),
        (["gsm8k_train", "--decontaminate", "mine.jsonl", "--out", "./mine.jsonl"], "mine.jsonl is read and would be"),
        (["mine.jsonl", "sub/mine.jsonl", "--problem", "q", "--answer", "a"], "would both become data/mine.jsonl"),
        (["gsm8k_train", "mine.jsonl", "--problem", "q", "--solution", "a", "--kind", "code"], "column of the tests"),
        (["blank.jsonl", "--problem", "q", "--answer", "a"], "blank.jsonl is empty"),
        (["cut.jsonl", "--problem", "q", "--answer", "a"], "row 1); mend the file"),
    ],
)
def test_bad_input(hub, args, told):
    """One line that says what and what to do; nothing is written, not even of the data set that is named first."""
    (hub / "notes.txt").write_text("x")
    row = {"id": "0", "problem": "p", "q": "1+1?", "a": "2"}
    for name in ("mine.jsonl", "sub/mine.jsonl"):
        write(hub / name, [row])
    (hub / "blank.jsonl").write_text("\n")
    (hub / "cut.jsonl").write_text(json.dumps(row) + '\n{"q": "1+')
    done = prepare(hub, *args)
    assert done.returncode == 2 and told in done.stderr
    assert not (hub / "data").exists() and not (hub / "x.jsonl").exists()
    assert rows_of(hub / "mine.jsonl") == [row]


def test_own_file_keeps_its_ids_and_words(tmp_path):
    """Its `id` where every row has its own; "NA" and "None" in CSV are text; two empty columns are no problem."""
    rows = [dict(id=f"r{i}", q=f"What is {i}+1?", more="Really?", a=str(i + 1)) for i in range(3)]
    asked = ("--problem", "q+more", "--answer", "a")
    done = prepare(tmp_path, write(tmp_path / "own.jsonl", [*rows, dict(id="r3", q="", more="", a="1")]), *asked)
    assert "left out 1 without a problem" in done.stdout
    made = [(row["id"], row["problem"]) for row in rows_of(tmp_path / "data/own.jsonl")]
    assert made == [(f"r{i}", f"What is {i}+1? Really?") for i in range(3)]
    rows[2]["id"] = "r0"
    prepare(tmp_path, write(tmp_path / "twice.jsonl", rows), *asked)
    assert [row["id"] for row in rows_of(tmp_path / "data/twice.jsonl")] == ["twice-0", "twice-1", "twice-2"]
    (tmp_path / "words.csv").write_text("q,a\nWhich element is Na?,NA\nIs there one?,None\nNothing,\n")
    done = prepare(tmp_path, "words.csv", "--problem", "q", "--answer", "a")
    assert [row["answer"] for row in rows_of(tmp_path / "data/words.jsonl")] == ["NA", "None"], done.stdout


def test_own_code(tmp_path):
    """Joined columns, tests and solutions as lists, without MBPP's columns."""
    row = dict(what="Write f.", how="It adds 1.", tests=["assert f(1) == 2", "assert f(2) == 3"])
    write(tmp_path / "own.jsonl", [row | {"program": ["def f(x):\n    return x + 1", "f = 1"]}])
    flags = ("--problem", "what+how", "--solution", "program", "--answer", "tests", "--kind", "code")
    done = prepare(tmp_path, "own.jsonl", *flags)
    [made] = rows_of(tmp_path / "data/own.jsonl") if not done.returncode else [done.stderr]
    assert made["problem"] == "Write f. It adds 1." and made["answer"] == "assert f(1) == 2\nassert f(2) == 3\n"
