"""Public data -> JSONL: demonstrations (id, problem, solution, answer) and benchmarks (id, problem, answer).

    python runs/prepare.py gsm8k_train --decontaminate data/gsm8k_test.jsonl        # -> data/gsm8k_train.jsonl
    python runs/prepare.py math500 aime24 aime25                                    # several at once
    python runs/prepare.py gsm8k_train --local DIR_OR_FILE                          # a copy instead of the hub
    python runs/prepare.py mine.csv --problem question --solution reasoning --answer final --limit 1000 --out mine.jsonl
    python runs/prepare.py mbpp_train --decontaminate data/mbpp_plus.jsonl data/humaneval.jsonl     # code

One line of SOURCES is one data set; add yours there, or name a local JSONL, Parquet or CSV file and its columns. A row
is left out, and counted, if a field is missing or empty, or if its answer is not verifiable: the grader must accept the
answer against itself. Where a data set has no column of answers, the answer is what the grader reads in the solution
(the last box, or GSM8K's "####"). An id is NAME-ROW, or your file's own, where every row has another text as `id`.

Of code (kind "code") the answer is a test program, and a row's own program must pass it; those that do not are named. A
problem of HumanEval is asked as it stands and answered with the whole function; what its prompt has besides (imports,
helper functions) stands in front of the tests, whose imports a program may leave out. A problem of MBPP is asked with
the first of its tests, which tells the function's name. MBPP+ has problems of MBPP's training split: `--decontaminate`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reward
from rewrite import check, json_line, read_jsonl, run, write_text

BLOCK = 2000  # rows graded at a time
GRAM = 13  # words in a row that a training problem and a benchmark may not share
FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # endings, and what reads them
SHOWN = "Your code should pass this test:"  # ours, in every problem of MBPP


class Source(NamedTuple):
    hub: str  # id on the hub
    revision: str | None  # commit of the data set; None: the newest
    config: str | None
    split: str
    problem: str  # its column; "a+b" joins two
    solution: str | None  # None: a benchmark without solutions
    answer: str | None  # None: read in the solution
    strip: str = ""  # what is taken off an answer (a pattern)
    kind: str = "math"  # of reward.KINDS


SOURCES = {
    # --- demonstrations ---
    "gsm8k_train": Source(
        "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main", "train", "question", "answer", None
    ),
    "math_train": Source(
        "DigitalLearningGmbH/MATH-lighteval", "0530c78699ea5e8eb5530600900e1f328b48acad", "default", "train",
        "problem", "solution", None,
    ),
    "numina_cot": Source(
        "AI-MO/NuminaMath-CoT", "9d8d210c9f6a36c8f3cd84045668c9b7800ef517", None, "train", "problem", "solution", None
    ),
    "mbpp_train": Source(
        "google-research-datasets/mbpp", "4bb6404fdc6cacfda99d4ac4205087b89d32030c", "full", "train",
        "text", "code", "test_list", kind="code",
    ),
    # --- benchmarks ---
    "gsm8k_test": Source(
        "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main", "test", "question", "answer", None
    ),
    "math500": Source(
        "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", None, "test",
        "problem", "solution", "answer",
    ),
    "minerva_math": Source(
        "math-ai/minervamath", "ee46ddc498933b1977577953250ca5c66be64f96", None, "test", "question", None, "answer"
    ),
    "olympiadbench": Source(  # 674 rows: English, text only, open-ended mathematics of competitions
        "Hothan/OlympiadBench", "91184b52131e7fc9455fef848035173aea8cc01a", "OE_TO_maths_en_COMP", "train",
        "question", "solution", "final_answer",
    ),
    "amc23": Source(
        "math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", None, "test", "question", None, "answer"
    ),
    "aime24": Source(
        "HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", None, "train",
        "problem", "solution", "answer",
    ),
    "aime25": Source(
        "math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", None, "test", "problem", None, "answer"
    ),
    # --- benchmarks of code ---
    "humaneval": Source(
        "openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", "openai_humaneval", "test",
        "prompt", "canonical_solution", "test", kind="code",
    ),
    "humaneval_plus": Source(
        "evalplus/humanevalplus", "d32357cf319e50e9c8d8dab5ea876c72b0fd321b", None, "test",
        "prompt", "canonical_solution", "test", kind="code",
    ),
    "mbpp": Source(
        "google-research-datasets/mbpp", "4bb6404fdc6cacfda99d4ac4205087b89d32030c", "sanitized", "test",
        "prompt", "code", "test_list", kind="code",
    ),
    "mbpp_plus": Source(
        "evalplus/mbppplus", "b2d74c91837c3f2a20c1299ae98133cbe7cfa077", None, "test",
        "prompt", "code", "test", kind="code",
    ),
    # --- out of domain ---
    "svamp": Source(
        "ChilleD/SVAMP", "5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef", "default", "test", "Body+Question", None, "Answer"
    ),
    "asdiv": Source(  # answers like "9 (apples)"
        "EleutherAI/asdiv", "8f95807222d87b4c688c3c22a6ba2801e1fa03e2", "asdiv", "validation",
        "body+question", None, "answer", r" \(.*$",
    ),
    "college_math": Source("di-zhang-fdu/College_Math_Test", None, None, "test", "question", None, "answer"),
}  # fmt: skip


def load(source: Source, local: str | None):
    """The data set, from the hub or a copy: a folder laid out like the hub's, or one JSONL, Parquet or CSV file."""
    import datasets

    place = local or source.hub
    own = Path(place).is_file()
    try:
        if own:
            kind = FILES[Path(place).suffix]
            text = {"keep_default_na": False} if kind == "csv" else {}  # "None" and "NA" may be answers
            return datasets.load_dataset(kind, data_files=place, split="train", **text)
        revision = None if local else source.revision
        return datasets.load_dataset(place, source.config, split=source.split, revision=revision)
    except (
        OSError,
        ValueError,
        datasets.exceptions.DatasetsError,
    ) as error:  # not there, gated, no network, no such split, a broken line
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        hint = "if the hub cannot be reached or asks for a login, fetch it elsewhere and give the folder or file with "
        hint = "mend the file" if own else hint + "--local"
        raise SystemExit(f"{place}: cannot be loaded ({reason}); {hint}") from None


def text_of(value) -> str:
    """A field as text: a list is what stands in it, side by side; 18.0 is 18."""
    if isinstance(value, list):
        return ", ".join(text_of(one) for one in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def lines_of(value) -> str:
    """A field of code as it stands: a list is lines."""
    return "" if value is None else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def demonstration(solution: str) -> str:
    """GSM8K's solutions as a model would write them: no calculator marks, the answer in a box. Others stay as is."""
    solution = re.sub(r"<<[^<>\n]*>>", "", solution)
    return re.sub(r"\n#### *(.+)$", r"\nThe answer is \\boxed{\1}.", solution)


def read(row: dict, source: Source) -> tuple[str, str | None, str]:
    """(problem, solution, answer without dollars around it) of a row; an empty one where there is none."""
    problem = " ".join(text_of(row[column]) for column in source.problem.split("+")).strip()
    solution = row[source.solution] if source.solution else None
    solution = text_of(solution[0] if isinstance(solution, list) and solution else solution)
    if source.answer is None:
        boxed = reward.boxes(solution) or re.search(r"^#### *\S", solution, re.M)  # a number somewhere is no answer
        answer = (reward.extract_answer(solution) or "") if boxed else ""
    else:
        answer = re.sub(source.strip, "", text_of(row[source.answer]))
        answer = re.sub(r"^\$([^$]*)\$$", r"\1", answer)
    return problem, demonstration(solution), answer


def read_code(row: dict, source: Source) -> tuple[str, str | None, str]:
    """(problem, solution, tests) of a row of code; an empty one where there is none.

    Known by their columns are HumanEval's (entry_point) and MBPP's (test_list); others are taken as they are.
    """
    problem = " ".join(lines_of(row[column]) for column in source.problem.split("+"))
    tests = lines_of(row[source.answer])
    program = row[source.solution] if source.solution else None
    program = lines_of(program[0] if isinstance(program, list) and program else program)
    if name := row.get("entry_point"):
        try:
            stands = ast.parse(problem).body
        except SyntaxError:  # no function to be completed
            return "", "", ""
        beside = [ast.get_source_segment(problem, node) for node in stands if getattr(node, "name", "") != name]
        tests = "\n".join([*beside, tests, f"check({name})"]) if tests else ""
        program = problem + program if program else ""
        problem = f"Complete this function:\n\n```python\n{problem.strip()}\n```"
    elif shown := row.get("test_list"):
        imports = row.get("test_imports") or [row.get("test_setup_code") or ""]
        tests = "\n".join([*imports, tests]).strip()
        problem = f"{problem.strip()}\n{SHOWN}\n\n{shown[0]}"
    if program and not reward.programs(program):
        program = f"```python\n{program.strip()}\n```"
    return problem.strip(), program, tests.strip() + "\n" if tests else ""


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def grams(text: str) -> set[tuple[str, ...]]:
    """Every 13 words in a row; of a shorter text the whole."""
    found = words(text.replace(SHOWN, ""))
    return {tuple(found[i : i + GRAM]) for i in range(max(1, len(found) - GRAM + 1))}


def main():
    parser = argparse.ArgumentParser(usage="%(prog)s NAME_OR_FILE ... [--flag value ...]", allow_abbrev=False)
    parser.add_argument("names", nargs="+", metavar="NAME_OR_FILE", help=f"of {', '.join(SOURCES)}, or a local file")
    parser.add_argument("--out", help="the file to write; default data/NAME.jsonl")
    parser.add_argument(
        "--local", help="a copy of the data set: a folder as on the hub, or one JSONL, Parquet or CSV file"
    )
    parser.add_argument("--problem", help="column of the problem (a+b joins two); default: the data set's")
    parser.add_argument("--solution", help="column of the solution")
    parser.add_argument("--answer", help="column of the answer; without one the answer is read in the solution")
    parser.add_argument(
        "--kind", choices=reward.KINDS, help="of a local file without such a column; code: tests are the answer"
    )
    parser.add_argument("--limit", type=int, default=0, help="keep so many rows, drawn at random (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="BENCHMARK",
        help="JSONL benchmarks: drop problems that share 13 words in a row (if shorter, the whole text) with them",
    )
    args = parser.parse_args()
    check(args.limit >= 0, f"--limit must not be negative, got {args.limit}")
    alone = len(args.names) == 1
    check(alone or not (args.out or args.local), "--out and --local are for one data set at a time")
    given = {field: getattr(args, field) for field in ("problem", "solution", "answer", "kind") if getattr(args, field)}
    jobs: dict[Path, tuple[str, Source, str | None]] = {}
    for name in args.names:  # all of them, before anything is loaded
        near = difflib.get_close_matches(name, SOURCES, 1, 0.5)
        guess = f"; did you mean {near[0]}?" if near else ""
        known = f"known are {', '.join(SOURCES)}, and files that end in {', '.join(FILES)}"
        check(name in SOURCES or Path(name).is_file(), f"{name}: neither a known data set nor a file{guess} ({known})")
        check(name in SOURCES or args.problem, f"{name}: --problem must name the column of the problem")
        check(name in SOURCES or args.solution or args.answer, f"{name}: --solution or --answer must name a column")
        check(name in SOURCES or not args.local, f"{name} is a file itself; --local is a copy of a known data set")
        local = args.local if name in SOURCES else name
        check(not local or Path(local).exists(), f"--local {local}: no such file or folder")
        if local and Path(local).is_file():
            check(Path(local).suffix in FILES, f"{local}: a file must end in {', '.join(FILES)}")
            with open(local, "rb") as file:
                check(file.read(1 << 16).strip(), f"{local} is empty")
        source = SOURCES.get(name) or Source(name, None, None, "train", "", None, None)
        source = source._replace(**given)
        check(source.answer or source.kind != "code", f"{name}: --answer must name the column of the tests")
        reward.KINDS[source.kind].ready()
        out = Path(args.out or f"data/{Path(name).stem}.jsonl")
        check(not out.is_dir(), f"--out {out} is a folder; name a file in it")
        check(
            out not in jobs,
            f"{name} and {jobs.get(out, [''])[0]} would both become {out}; make one at a time, with --out",
        )
        taken = [path for path in (local, *args.decontaminate) if path and Path(path).resolve() == out.resolve()]
        check(not taken, f"{out} is read and would be written over; name another file with --out")
        jobs[out] = (name, source, local)
    benchmarks = {path: read_jsonl(path, {"id": str, "problem": str}) for path in args.decontaminate}
    held_out = {gram: path for path, rows in benchmarks.items() for row in rows for gram in grams(row["problem"])}
    for out, (name, source, local) in jobs.items():
        prepare(name, source, local, out, args, held_out)


def prepare(
    name: str, source: Source, local: str | None, out: Path, args, held_out: dict[tuple[str, ...], str]
) -> None:
    """Writes one data set; `held_out` holds what a problem may not share, and with which benchmark."""
    from tqdm import tqdm

    stem = Path(name).stem
    data = load(source, local)
    asked = [*source.problem.split("+"), *filter(None, (source.solution, source.answer))]
    for column in asked:
        check(
            column in data.column_names,
            f"{local or source.hub}: no column '{column}', it has {', '.join(data.column_names)}; name the right one "
            "with --problem, --solution or --answer",
        )
    kinds = [source.kind] * len(data)
    if name not in SOURCES and not args.kind and "kind" in data.column_names:
        kinds = [kind or source.kind for kind in data["kind"]]
        for kind in dict.fromkeys(kinds):
            check(kind in reward.KINDS, f"{name}: column 'kind' must hold {' or '.join(reward.KINDS)}, found {kind!r}")
            check(source.answer or kind != "code", f"{name}: --answer must name the column of the tests")
            reward.KINDS[kind].ready()

    ids = [f"{stem}-{i}" for i in range(len(data))]
    own = (
        list(data["id"]) if local == name and "id" in data.column_names else []
    )  # rewrites are found by it in the file
    if own and all(isinstance(one, str) and one for one in own) and len(set(own)) == len(own):
        ids = own

    order = list(range(len(data)))
    if args.limit:
        random.Random(args.seed).shuffle(order)
    kept, incomplete, unverifiable, shared = {}, 0, [], dict.fromkeys(held_out.values(), 0)
    bar = tqdm(total=len(order), desc=stem, unit="row")
    for start in range(0, len(order), BLOCK):
        rows = {}
        for i in order[start : start + BLOCK]:
            bar.update()
            problem, solution, answer = (read_code if kinds[i] == "code" else read)(data[i], source)
            if not problem or not answer or (source.solution and not solution):
                incomplete += 1
            elif found := next((held_out[gram] for gram in grams(problem) if gram in held_out), None):
                shared[found] += 1
            else:
                texts = {"solution": solution} if solution else {}
                kind = {"kind": "code"} if kinds[i] == "code" else {}
                rows[i] = {"id": ids[i], **kind, "problem": problem, **texts, "answer": answer}
        sound = {i for i, row in rows.items() if not reward.KINDS[kinds[i]].unfit(row["answer"])}
        # of code the row's own program is tried, where it has one
        proofs = {i: f"\\boxed{{{rows[i]['answer']}}}" for i in sound if kinds[i] == "math"}
        proofs |= {i: rows[i]["solution"] for i in sound if kinds[i] == "code" and "solution" in rows[i]}
        answers = [rows[i]["answer"] for i in proofs]
        verdicts = reward.verify_all([*proofs.values()], answers, [kinds[i] for i in proofs])
        sound -= {i for i, right in zip(proofs, verdicts) if not right}
        unverifiable += [row["id"] for i, row in rows.items() if i not in sound]
        kept |= {i: row for i, row in rows.items() if i in sound}
        if args.limit and len(kept) >= args.limit:
            break
    bar.close()
    chosen = sorted(list(kept)[: args.limit or None])
    read_rows = incomplete + len(unverifiable) + sum(shared.values()) + len(kept)
    named = f" ({' '.join(unverifiable[:10])}{' ...' * (len(unverifiable) > 10)})" if unverifiable else ""
    reasons = {"math": "answer the grader cannot verify", "code": "program fails its tests"}
    reason = " or ".join(reasons[kind] for kind in dict.fromkeys(kinds))
    left_out = [
        f"{incomplete} without a problem, a solution or an answer",
        f"{len(unverifiable)} whose {reason}{named}",
    ]
    left_out += [f"{count} that share {GRAM} words with {path}" for path, count in shared.items()]
    told = f"{stem}: {read_rows} of {len(data)} rows read, left out {', '.join(left_out)}"
    check(chosen, f"{told}; nothing is left")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json_line(kept[i]) for i in chosen))
    print(f"{told}; wrote {len(chosen)} to {out}")


if __name__ == "__main__":
    run(main)
