"""Stages 2 and 4 as a user starts them: rewrite.py and evaluate.py with a real engine, killed, continued, misused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, sum_demonstrations
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import evaluate
import reward
import rewrite
import sft


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(script: str, output: Path, flags: str, processes: int = 1) -> subprocess.Popen:
    """A script in a process group of its own, so that all of it can be killed. A file takes what it prints: a pipe
    that nobody reads fills up and stops it."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*python, str(ROOT / script), *flags.split(), "--output_dir", str(output)]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1"}
    with open(f"{output}.log", "w") as log:
        process = subprocess.Popen(command, env=env, start_new_session=True, stdout=log, stderr=subprocess.STDOUT)
    process.printed = Path(log.name)
    return process


def finish(process: subprocess.Popen) -> str:
    assert process.wait(timeout=500) == 0, process.printed.read_text()
    return process.printed.read_text()


def kill_once_written(script: str, output: Path, flags: str, part: str) -> list[dict]:
    """Starts a script and sends SIGKILL as soon as the first rows of a part are on disk; they are returned, and half a
    line is left behind them. On a busy machine it may end between two looks: then it is started again."""
    for _ in range(5):
        shutil.rmtree(output, ignore_errors=True)
        process, path, seen = start(script, output, flags), output / part, False
        while not seen and process.poll() is None:
            seen = path.exists() and path.stat().st_size > 0
            time.sleep(0.005)
        assert seen or process.poll() == 0, process.printed.read_text()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if path.exists():
            whole = path.read_text().rpartition("\n")[0]
            path.write_text(whole + '\n{"id": "s1", "compl')
            return [json.loads(line) for line in whole.splitlines()]
    pytest.fail(f"{script} ended five times before {part} was seen")


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "grading_timeouts"} for row in rows]


def same(a, b) -> bool:
    """Equal, but for the last digits of log-probabilities: another batch is padded otherwise."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == pytest.approx(b, abs=1e-5) if isinstance(a, float) else a == b


def fails(module, flags: str, monkeypatch) -> str:
    """The one line with which a script ends."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *flags.split()])
    with pytest.raises(SystemExit) as end:
        module.main()
    if dist.is_initialized():
        dist.destroy_process_group()
        del os.environ["RANK"]  # by which init_distributed knows whether torchrun has started it
    assert isinstance(end.value.code, str) and "\n" not in end.value.code, end.value.code
    return end.value.code


# ---------------------------------------------------------------------------------------------------------------------
# Runs that the tests below look at
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    """Two models of one shape, demonstrations, two benchmarks; the last problem of the second does not fit."""
    folder = tmp_path_factory.mktemp("world")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.6)  # flatter, so worse answers; tied, which a reload must notice
    model.save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "other")
    write(folder / "sums.jsonl", sum_demonstrations(200, seed=1))
    few = sum_demonstrations(7, seed=2)
    few[3]["answer"] = "99"  # nobody will say that
    write(folder / "few.jsonl", [*few, {"id": "long", "problem": "Add 1 and 2. " * 40, "answer": "3"}])
    # two demonstrations without room for a rewrite; the second is longer than what the target can read
    wide, giant = (few[0] | {"id": i, "solution": "1+1=2. " * n} for i, n in (("wide", 40), ("giant", 99)))
    demos = [*sum_demonstrations(150, seed=3), wide, giant]
    write(folder / "demos.jsonl", [row | {"expert_align": -9.0, "seconds": 1.0} for row in demos])  # as a teacher's are
    return folder


@pytest.fixture(scope="module")
def evaluations(world, tiny_model):
    """(folder of a run over two models, folder of a run over one that was killed and continued, its rows at the kill,
    what both printed)"""
    flags = f"--benchmarks {world}/sums.jsonl {world}/few.jsonl --samples 3 --max_tokens 30 --max_model_len 160"
    one, two = f"--models {world}/other {flags}", f"--models {tiny_model} {world}/other {flags}"
    whole, killed = world / "whole", world / "killed"
    undisturbed = start("evaluate.py", whole, two)
    rows = kill_once_written("evaluate.py", killed, one, "other/sums.rank0.jsonl")
    first = finish(undisturbed)
    return whole, killed, rows, first, finish(start("evaluate.py", killed, one, processes=2))


@pytest.fixture(scope="module")
def rewrites(world, tiny_model):
    """The same of rewrite.py, with another mapper than the target. When it goes on, 40 rows have been scored besides,
    by a third rank; their expert_align is marked."""
    flags = f"--target {tiny_model} --mapper {world}/other --data {world}/demos.jsonl --samples 4 --min_fidelity 0.5"
    flags += " --max_tokens 30 --max_model_len 200"
    whole, continued = world / "rewritten", world / "continued"
    undisturbed = start("rewrite.py", whole, flags)
    rows = kill_once_written("rewrite.py", continued, flags, "candidates_mapper.rank0.jsonl")
    first = finish(undisturbed)
    scored = [row | {"expert_align": -77.0} for row in read(whole / "scored.jsonl")[110:]]
    part = Path(write(continued / "scored.rank2.jsonl", scored))
    part.write_text(part.read_text() + '{"id": "s1", "expert_al')
    return whole, continued, rows, first, finish(start("rewrite.py", continued, flags, processes=2))


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py
# ---------------------------------------------------------------------------------------------------------------------


def test_evaluation_files(world, evaluations, tiny_model):
    folder, _, _, printed, _ = evaluations
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "metrics.jsonl", "other", "tiny"]
    problems = read(world / "sums.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    summaries = {}
    for name in ("tiny", "other"):
        assert sorted(p.name for p in (folder / name).iterdir()) == ["few.jsonl", "summary.json", "sums.jsonl"]
        rows = read(folder / name / "sums.jsonl")
        assert [row["id"] for row in rows] == [problem["id"] for problem in problems]
        right = 0
        for row, problem in zip(rows, problems):
            assert (row["benchmark"], row["problem"], row["answer"]) == ("sums", problem["problem"], problem["answer"])
            assert [c["greedy"] for c in row["completions"]] == [False, False, False, True]
            for c in row["completions"]:
                assert c["correct"] == reward.verify(c["text"], row["answer"])
                assert c["predicted"] == reward.extract_answer(c["text"])
                assert c["finish"] in ("stop", "length") and 1 <= c["tokens"] <= 30
                assert c["tokens"] == 30 or c["finish"] == "stop"
            right += sum(c["correct"] for c in row["completions"][:3])
        summary = summaries[name] = json.loads((folder / name / "summary.json").read_text())
        told = summary["benchmarks"]["sums"]
        assert told["avg@n"]["value"] == pytest.approx(right / 600)
        assert told["avg@n"]["low"] < right / 600 < told["avg@n"]["high"]
        assert told["maj@n"]["value"] <= told["pass@n"]["value"]
        assert told["generated_tokens"] == sum(c["tokens"] for row in rows for c in row["completions"])
        assert summary["left_out"] == {"few": ["long"]} and summary["benchmarks"]["few"]["problems"] == 7
        both = [summary["benchmarks"][b]["avg@n"]["value"] for b in ("sums", "few")]
        assert summary["average"]["avg@n"]["value"] == pytest.approx(sum(both) / 2)
        assert not any(c["correct"] for c in read(folder / name / "few.jsonl")[3]["completions"])
    tiny, other = (summaries[name]["benchmarks"]["sums"]["avg@n"]["value"] for name in ("tiny", "other"))
    assert tiny > other + 0.1  # so the second model's weights were really in the engine
    assert "1 prompts exceed --max_model_len 160, left out: long" in printed
    assert f"{100 * tiny:.1f} ± " in printed and f"{100 * (other - tiny):+.1f}" in printed
    # The greedy answer is the one that a plain implementation finds under the prompt that training uses.
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for row in read(folder / "tiny" / "sums.jsonl")[:3]:
        ids = torch.tensor([reward.prompt_ids(tokenizer, reward.solve_prompt(row["problem"]))])
        options = dict(do_sample=False, max_new_tokens=30, pad_token_id=2, attention_mask=torch.ones_like(ids))
        assert row["completions"][3]["text"] == tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] : -1])


def test_killed_evaluation_goes_on(evaluations):
    """One process was killed; two finish the work, repeat no row, and write what one undisturbed process writes."""
    whole, killed, kept, _, printed = evaluations
    assert 0 < len(kept) < 200  # flushed every 64 rows or after some seconds, whichever comes first
    rows = read(killed / "other/sums.jsonl")
    assert [row for row in rows if row["id"] in {k["id"] for k in kept}] == sorted(kept, key=lambda k: int(k["id"][1:]))
    for benchmark in ("sums", "few"):
        one, two = (without_times(read(folder / f"other/{benchmark}.jsonl")) for folder in (whole, killed))
        assert one == two
    assert sorted(p.name for p in (killed / "other").iterdir()) == ["few.jsonl", "summary.json", "sums.jsonl"]
    assert printed.count("avg@n in %") == 1


def test_compare_prints_finished_evaluations(evaluations, monkeypatch, capsys):
    whole, killed, *_ = evaluations
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--compare", str(whole), str(killed / "other")])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.count("±") == 3] == ["whole/other", "tiny", "killed/other"]
    same = [line.split() for line in lines if line.startswith("killed/other") and "p =" in line]
    assert len(same) == 3 and all(words[2] == "+0.0" and "1.0000" in words for words in same)


def test_compare_tells_other_sampling_and_refuses_other_problems(evaluations, monkeypatch, capsys):
    whole, copy = evaluations[0], evaluations[0].parent / "copy"
    shutil.copytree(whole, copy)
    told = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(told | {"config": told["config"] | {"temperature": 0.5}}))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--compare", f"{whole}/tiny", f"{copy}/tiny"])
    evaluate.main()
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert notes == ["note: --temperature was 0.5 for copy/tiny, 1.0 for whole/tiny"]
    rows = read(copy / "tiny/few.jsonl")
    write(copy / "tiny/few.jsonl", [rows[0] | {"problem": "Add 9 and 9."}, *rows[1:]])
    message = fails(evaluate, f"--compare {whole}/tiny {copy}/tiny", monkeypatch)
    assert f"{copy}/tiny/few.jsonl" in message and repr(rows[0]["id"]) in message and "another problem" in message


def test_finished_evaluation_refuses_other_flags_and_inputs(
    world, evaluations, tiny_model, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "copy"
    shutil.copytree(evaluations[0], folder)
    flags = f"--samples 3 --max_tokens 30 --max_model_len 160 --output_dir {folder} --models {tiny_model}"
    message = fails(evaluate, f"{flags} --benchmarks {world}/sums.jsonl --seed 1", monkeypatch)
    assert "--seed 0" in message and str(folder) in message
    rows = read(world / "sums.jsonl")
    changed = write(tmp_path / "sums.jsonl", [rows[0] | {"answer": "17"}, *rows[1:]])
    message = fails(evaluate, f"{flags} --benchmarks {changed}", monkeypatch)
    assert "answer" in message and "s0" in message
    other = flags.replace(tiny_model, f"tiny={world}/other")
    for benchmark in ("sums", "few", "demos"):  # the last is new: the other two would be averaged with it
        message = fails(evaluate, f"{other} --benchmarks {world}/{benchmark}.jsonl", monkeypatch)
        assert f"{folder}/tiny has results of other weights than {world}/other's" in message


def completion(predicted, correct, greedy=False) -> dict:
    return dict(text="", predicted=predicted, correct=correct, tokens=1, finish="stop", greedy=greedy)


@pytest.mark.parametrize(
    "answers, expected",
    [
        ("7+ 7+ 8- 9-", (0.5, 1, 1)),  # two votes for 7
        ("8- 7+ 8- 7+", (0.5, 1, 0)),  # a tie: 8 came first
        ("7+ 8- 7+ 8-", (0.5, 1, 1)),
        ("8- 8- 8- 7+", (0.25, 1, 0)),
        ("1/2+ \\frac{1}{2}+ 0.5+ 3- 3-", (0.6, 1, 1)),  # three votes for one number
        ("5\\,kg- 5\\,km+ 5\\,km+ 3-", (0.5, 1, 1)),  # a vote leaves units out: most of these three are right
        (". . . 7+", (0.25, 1, 1)),  # no answer is no vote
        (". . . .", (0, 0, 0)),
    ],
)
def test_scores_of_a_problem(answers, expected):
    row = {"completions": [completion(a[:-1] or None, a.endswith("+")) for a in answers.split()]}
    scores = evaluate.problem_scores(row)
    assert (scores["avg@n"], scores["pass@n"], scores["maj@n"]) == expected and "greedy" not in scores
    row["completions"].append(completion("7", True, greedy=True))
    assert evaluate.problem_scores(row) == scores | {"greedy": 1.0}  # and it is no sample


def test_intervals_are_over_problems():
    # Half of 100 problems solved: standard error sqrt(0.25 / 100) = 0.05, half interval 1.96 * 0.05.
    suite = [{"avg@n": float(i % 2)} for i in range(100)]
    told = evaluate.intervals([suite])["avg@n"]
    assert told["value"] == 0.5
    assert (told["high"] - told["low"]) / 2 == pytest.approx(0.098, abs=0.012)
    # The average weighs benchmarks, not problems; two independent ones: sqrt(2) / 2 of the width.
    both = evaluate.intervals([suite, [{"avg@n": 1.0}] * 3])["avg@n"]
    assert both["value"] == 0.75
    assert (both["high"] - both["low"]) / 2 == pytest.approx(0.049, abs=0.006)
    two = evaluate.intervals([suite, suite])["avg@n"]
    assert (two["high"] - two["low"]) / 2 == pytest.approx(0.098 / 2**0.5, abs=0.009)


def test_paired_differences_by_hand():
    # Differences 0 and 1: the resampled mean is 0, 1/2, 1 with probability 1/4, 1/2, 1/4. Either sign is as large.
    told = evaluate.paired([{"a": 0.5, "b": 0.0, "c": 1.0}], [{"b": 1.0, "a": 0.5, "d": 0.0}])
    assert (told["difference"], told["low"], told["high"], told["problems"]) == (0.5, 0.0, 1.0, 2)
    assert told["p"] == 1.0
    # The same difference everywhere: no spread, however different the problems are. Of 2^n signs two are as large.
    first = {str(i): i / 20 for i in range(3)}
    told = evaluate.paired([first], [{i: v + 0.25 for i, v in first.items()}])
    assert [told[k] for k in ("difference", "low", "high")] == pytest.approx([0.25, 0.25, 0.25])
    assert told["p"] == pytest.approx(2 / 8, abs=0.05)
    # differences 0.2, -0.1 and 0.2 of one benchmark, 0.2 of another: (0.1 + 0.2) / 2; 4 of 16 are as large
    a, b = {"x": 0.3, "y": 0.2, "z": 0.1}, {"x": 0.5, "y": 0.1, "z": 0.3}
    assert evaluate.paired([a, {"w": 0.0}], [b, {"w": 0.2}])["p"] == pytest.approx(4 / 16, abs=0.05)
    first = {str(i): i / 80 for i in range(40)}
    assert evaluate.paired([first], [{i: v + 0.25 for i, v in first.items()}])["p"] == 1 / 2001
    assert evaluate.paired([first], [first])["p"] == 1.0
    assert evaluate.paired([first], [{"z": 1.0}]) == {}
    # Two benchmarks: the mean of their mean differences.
    assert evaluate.paired([{"a": 0.0}, {"b": 0.0, "c": 0.0}], [{"a": 1.0}, {"b": 0.0, "c": 0.0}])["difference"] == 0.5


def test_bootstrap_of_arrays_is_reproducible():
    scores = np.random.default_rng(0).random((50, 3))
    assert (evaluate.bootstrap([scores]) == evaluate.bootstrap([scores])).all()
    assert evaluate.bootstrap([scores]).shape == (evaluate.RESAMPLES, 3)


# ---------------------------------------------------------------------------------------------------------------------
# rewrite.py
# ---------------------------------------------------------------------------------------------------------------------


def test_rewrite_files(world, rewrites, tiny_model):
    folder, _, _, printed, _ = rewrites
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "metrics.jsonl", "scored.jsonl", "train.jsonl"]
    demos = {row["id"]: row for row in read(world / "demos.jsonl")}
    train, scored = read(folder / "train.jsonl"), read(folder / "scored.jsonl")
    assert [row["id"] for row in train] == [row["id"] for row in scored] == [i for i in demos if i != "giant"]
    assert "1 prompts (mapper) exceed --max_model_len 200, left out: wide" in printed
    assert "1 rows do not fit into the 512 tokens that the target reads, left out: giant" in printed
    assert train[-1]["source"] == "expert" and not scored[-1]["candidates"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def plain_align(problem: str, text: str) -> float:
        prompt = reward.prompt_ids(tokenizer, reward.solve_prompt(problem))
        ids = torch.tensor([prompt + tokenizer.encode(text) + [tokenizer.convert_tokens_to_ids("<|im_end|>")]])
        with torch.no_grad():
            logp = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        return logp.gather(-1, ids[0, len(prompt) :, None]).mean().item()

    for row, chosen in list(zip(scored, train))[:8]:
        assert row["expert_align"] == pytest.approx(plain_align(row["problem"], row["solution"]), abs=1e-4)
        assert chosen["align"] == pytest.approx(plain_align(row["problem"], chosen["solution"]), abs=1e-4)
        assert len(row["candidates"]) == 4
        for c in row["candidates"]:
            assert c["align"] == pytest.approx(plain_align(row["problem"], c["text"]), abs=1e-4)
    for row, chosen in zip(scored, train):
        demo, clean = demos[row["id"]], [c["align"] for c in row["candidates"] if c["clean"]]
        assert set(chosen) == {
            "id",
            "kind",
            "problem",
            "solution",
            "answer",
            "source",
            "sample",
            "weight",
            "align",
            "expert_align",
        }
        assert (chosen["problem"], chosen["answer"], chosen["weight"]) == (demo["problem"], demo["answer"], 1.0)
        if chosen["source"] == "expert":
            assert not clean and chosen["solution"] == demo["solution"] and chosen["align"] == row["expert_align"]
        else:
            assert chosen["solution"] == row["candidates"][chosen["sample"]]["text"] and chosen["align"] in clean
            assert reward.verify(chosen["solution"], demo["answer"])
    told = json.loads((folder / "metrics.jsonl").read_text())
    share = sum(row["source"] == "mapper" for row in train) / len(train)
    assert 0 < share < 1 and told["source/mapper"] == share and told["source/expert"] == pytest.approx(1 - share)
    assert told["generated_tokens"] == sum(c["tokens"] for row in scored for c in row["candidates"])
    assert told["candidate/clean"] == np.mean([c["clean"] for row in scored for c in row["candidates"]])


def test_killed_rewriting_goes_on(rewrites):
    """One process was killed; two finish the work, repeat nothing, and write what one undisturbed process writes."""
    whole, continued, kept, *_ = rewrites
    assert 0 < len(kept) < 150
    rows, reference = read(continued / "scored.jsonl"), read(whole / "scored.jsonl")
    times, again = ({row["id"]: row["seconds"] for row in part} for part in (kept, rows[:110]))
    shared = times.keys() & again.keys()
    assert shared and all(times[i] == again[i] for i in shared)  # not generated again
    assert rows[110:] == [row | {"expert_align": -77.0} for row in reference[110:]]  # nor scored again
    assert same(without_times(rows[:110]), without_times(reference[:110]))
    assert same(read(continued / "train.jsonl")[:110], read(whole / "train.jsonl")[:110])
    assert sorted(p.name for p in continued.iterdir()) == sorted(p.name for p in whole.iterdir())


def candidate(text="1+2=3. \\boxed{3}", clean=1.0, align=-1.0, correct=True, finish="stop", **other) -> dict:
    told = dict(text=text, clean=clean, align=align, correct=correct, finish=finish, source="mapper", cheating=0.0)
    told["one_answer"] = float(len(reward.boxes(text)) == 1)
    return told | dict.fromkeys((*reward.SOFT, *reward.HARD), 0.0) | other


def config(**fields) -> rewrite.Config:
    return rewrite.Config(target="t", data="d", output_dir="o", **fields)


ROW = dict(
    id="a",
    kind="math",
    problem="Add 1 and 2.",
    solution="One plus two is three: \\boxed{3}",
    answer="3",
    expert_align=-4.0,
    in_share=True,
)


def test_dart_keeps_the_likeliest_clean_rewrite():
    candidates = [candidate(align=-0.1, clean=0.0), candidate(align=-2.0), candidate(align=-1.0), candidate(align=-1.0)]
    (chosen,) = rewrite.select_dart(ROW, candidates, config())
    kept = {k: ROW[k] for k in ("id", "kind", "problem", "answer", "expert_align")}
    told = dict(solution=candidates[2]["text"], source="mapper", sample=2, weight=1.0, align=-1.0)
    assert chosen == kept | told
    candidates[2]["padding"] = candidates[2]["repetition"] = candidates[3]["copies_problem"] = 1.0
    candidates[3]["align"] = -1.6
    assert rewrite.select_dart(ROW, candidates, config())[0]["sample"] == 2  # -1.5 before -1.85 and -2
    assert rewrite.select_dart(ROW, candidates, config(soft_weight=0.9))[0]["sample"] == 1
    (kept,) = rewrite.select_dart(ROW, candidates[:1], config())
    assert (kept["source"], kept["solution"], kept["align"], kept["sample"]) == ("expert", ROW["solution"], -4.0, 0)


UNFIT = [
    candidate(correct=False),
    candidate(finish="length"),
    candidate("\\boxed{3} so \\boxed{3}"),
    candidate("it is 3"),
    candidate(cheating=1.0),
    candidate(source="guided", mentions_source=1.0),
]


def test_other_methods_keep_a_verified_text():
    fit = [candidate(align=-9.0, clean=0.0, mentions_source=1.0), candidate(align=-1.0, source="self")]
    for method in ("map", "self", "resolve"):  # no judge and no likelihood chooses here, unless it is told to
        (first,) = rewrite.select_verified(ROW, UNFIT + fit, config(method=method))
        assert (first["sample"], first["source"], first["align"]) == (6, "mapper", -9.0)
        (kept,) = rewrite.select_verified(ROW, UNFIT, config(method=method))
        assert (kept["source"], kept["solution"], kept["align"]) == ("expert", ROW["solution"], -4.0)
        alone = config(method=method, fallback=False)
        assert rewrite.select_verified(ROW, UNFIT, alone) == rewrite.select_verified(ROW, [], alone) == []
        (kept,) = rewrite.select_verified(ROW | {"in_share": False}, [], alone)
        assert kept["source"] == "expert"
    (best,) = rewrite.select_verified(ROW, UNFIT + fit, config(method="self", keep="likeliest"))
    assert (best["sample"], best["source"]) == (7, "self")
    drawn = [
        rewrite.select_verified(ROW | {"id": str(i)}, UNFIT + fit, config(method="self", keep="random", seed=seed))
        for seed in (0, 0, 1)
        for i in range(30)
    ]
    samples = [row["sample"] for (row,) in drawn]
    assert set(samples) == {6, 7} and samples[:30] == samples[30:60] != samples[60:]


def test_rasft_weighs_the_expert_against_verified_rollouts():
    good, bad = candidate(source="self"), candidate(source="self", correct=False)

    def weights(group, **fields):
        rows = rewrite.select_rasft(ROW, group, config(method="rasft", **fields))
        assert all(row["solvability"] == group.count(good) / len(group) for row in rows)
        assert len({(row["source"], row["sample"]) for row in rows}) == len(rows)
        return [(row["source"], row["sample"], pytest.approx(row["weight"], abs=6e-4)) for row in rows]

    # every trial has the same say
    assert weights([bad, bad, bad]) == [("expert", 0, 1.0)]
    assert weights([bad, good, bad]) == [("expert", 0, 0.667), ("self", 1, 0.333)]
    assert weights([good, good, bad]) == [("expert", 0, 0.333), ("self", 0, 0.333), ("self", 1, 0.333)]
    assert weights([good, good, good]) == [("self", 0, 0.333), ("self", 1, 0.333), ("self", 2, 0.333)]
    # what the authors' code gives
    assert weights([bad, bad, bad], weights="released") == [("expert", 0, 1.0)]
    assert weights([bad, good, bad], weights="released") == [("expert", 0, 0.278), ("self", 1, 0.0087)]
    told = [("expert", 0, 0.155), ("self", 0, 0.005), ("self", 1, 0.005)]
    assert weights([good, good, bad], weights="released") == told
    assert weights([good, good, good], weights="released") == [("expert", 0, 1.0)]
    # at most three failures enter its z-score
    assert weights([good] + [bad] * 7, weights="released") == [("expert", 0, 0.316), ("self", 0, 0.0116)]
    # a row that nobody wrote for
    for fallback in (True, False):
        assert rewrite.select_rasft(ROW, [], config(method="rasft", fallback=fallback)) == [rewrite.expert_row(ROW)]


def test_default_filter_is_darts_alone():
    assert config().hard_cheats == list(reward.HARD) and config(hard_cheats=["none"]).hard_cheats == []
    for method in ("map", "self", "resolve", "rasft"):
        assert config(method=method).hard_cheats == []
        assert config(method=method, hard_cheats=["hedged"]).hard_cheats == ["hedged"]


def test_mind_the_gap_goes_on_where_the_model_fails(world, tiny_model):
    """Two processes: own solutions for all, guided ones for problems without a verified own one, then the expert. The
    last row has room for the question, and none for the expert's solution behind it."""
    folder = world / "resolved"
    data = write(world / "some.jsonl", [*read(world / "demos.jsonl")[:59], read(world / "demos.jsonl")[150]])
    flags = f"--method resolve --target {tiny_model} --data {data} --samples 2 --temperature 1.5"
    flags += " --max_tokens 30 --max_model_len 200 --keep likeliest"
    printed = finish(start("rewrite.py", folder, flags, processes=2))
    scored, train = read(folder / "scored.jsonl"), {row["id"]: row for row in read(folder / "train.jsonl")}
    assert len(scored) == len(train) == 60
    assert "1 prompts (guided) exceed --max_model_len 200, left out: wide" in printed and "(self)" not in printed
    for row in scored:
        own, guided = ([c for c in row["candidates"] if c["source"] == source] for source in ("self", "guided"))
        asked_again = row["id"] != "wide" and not any(map(rewrite.verified, own))
        assert len(own) == 2 and len(guided) == 2 * asked_again
        assert [c["text"] for c in own] != [c["text"] for c in guided]  # another prompt, other seeds
        good = [c["align"] for c in row["candidates"] if rewrite.verified(c)]
        chosen = train[row["id"]]
        assert chosen["align"] == (max(good) if good else row["expert_align"])
        assert (chosen["source"] == "expert") == (not good)
    sources = [row["source"] for row in train.values()]
    told = json.loads((folder / "metrics.jsonl").read_text())
    for source in ("self", "guided", "expert"):
        assert sources.count(source) > 0  # else this test shows nothing
        assert told[f"source/{source}"] == pytest.approx(sources.count(source) / 60)
        assert f"source/{source}" in printed
    assert not list(folder.glob("candidates*"))


def test_rasft_rolls_out_a_share_with_the_current_model(world, tiny_model):
    folder = world / "rolled"
    flags = f"--method rasft --target {tiny_model} --mapper {world}/other --data {world}/demos.jsonl --samples 3"
    flags += " --temperature 0.6"  # at which the flat model is the one that it was made from: often right
    finish(start("rewrite.py", folder, f"{flags} --share 0.5 --limit 60 --max_tokens 30 --max_model_len 200"))
    scored, train = read(folder / "scored.jsonl"), read(folder / "train.jsonl")
    asked = {row["id"] for row in scored if row["candidates"]}
    assert 15 < len(asked) < 45
    for row in scored:
        rows = [r for r in train if r["id"] == row["id"]]
        assert sum(r["weight"] for r in rows) == pytest.approx(1)
        assert (row["id"] in asked) == ("solvability" in rows[0])
        right = [c["text"] for c in row["candidates"] if rewrite.verified(c)]
        assert [r["solution"] for r in rows if r["source"] == "self"] == right
    told = json.loads((folder / "metrics.jsonl").read_text())
    assert 0 < told["weight/self"] < 1 and told["weight/self"] + told["weight/expert"] == pytest.approx(1)
    # sft.py takes them all: a problem may stand several times
    sft_rows = sft.read_jsonl(str(folder / "train.jsonl"), {"align": float}, ("id", "source", "sample"))
    assert len(sft_rows) == len(train) > len(scored)


def test_judged_candidates():
    row = dict(ROW, problem="Start with 1. Add 2. Add 4.", solution="1+2=3. 3+4=7. \\boxed{7}", answer="7")
    steps = ("1+2=3. Then 3+4=7", 7), ("1+2=4. Then 3+4=7", 7), ("1+2=3. Then 3+4=8", 8)
    texts = [f"We add: {step}. So \\boxed{{{answer}}}" for step, answer in steps]
    raw = [dict(text=text, tokens=9, finish="stop") for text in texts] + [
        dict(text=texts[0], tokens=9, finish="length")
    ]

    def clean(**fields) -> list[float]:
        judged = rewrite.judge(row, raw, "mapper", config(**fields))
        assert [c["correct"] for c in judged] == [True, True, False, True]
        return [c["clean"] for c in judged]

    assert clean() == [1, 0, 0, 0]
    assert clean(hard_cheats=["hedged"], min_fidelity=0.0) == [1, 1, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Misuse
# ---------------------------------------------------------------------------------------------------------------------

GOOD = '{"id": "a", "problem": "p", "solution": "s", "answer": "1"}'


@pytest.mark.parametrize(
    "lines, named",
    [
        (None, "no such file"),
        ([], "empty"),
        ([GOOD, "{not json"], "line 2: not JSON"),
        ([GOOD, GOOD], "line 2: id 'a' already stands in line 1"),
        (['{"id": "a", "problem": "p", "solution": "s"}'], "line 1: field 'answer' is missing"),
        (['{"id": "a", "problem": " ", "solution": "s", "answer": "1"}'], "line 1: field 'problem' is empty"),
        (['{"id": "a", "problem": "p", "solution": "s", "answer": 1}'], "line 1: field 'answer' must be str"),
    ],
)
def test_bad_files(lines, named, tmp_path, tiny_model, monkeypatch, capsys):
    path = tmp_path / "data.jsonl"
    if lines is not None:
        write(path, lines)
    flags = f"--models {tiny_model} --benchmarks {path} --output_dir {tmp_path}/out"
    message = fails(evaluate, flags, monkeypatch)
    assert str(path) in message and named in message
    message = fails(rewrite, f"--target {tiny_model} --data {path} --output_dir {tmp_path}/out", monkeypatch)
    assert str(path) in message and named in message
    assert not (tmp_path / "out").exists()


def test_bad_flags_and_models(tmp_path, tiny_model, monkeypatch, capsys):
    data = write(tmp_path / "data.jsonl", [GOOD])
    good = f"--models {tiny_model} --benchmarks {data} --output_dir {tmp_path}/out --max_model_len 100"
    write(tmp_path / "kind.jsonl", [json.dumps(json.loads(GOOD) | {"kind": "poem"})])
    no_tokenizer, no_weights, llama = (tmp_path / name for name in ("no_tokenizer", "no_weights", "llama"))
    shutil.copytree(tiny_model, no_tokenizer, ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    shutil.copytree(tiny_model, no_weights, ignore=lambda *_: ["model.safetensors"])
    shape = dict(hidden_size=64, num_attention_heads=2, head_dim=32, num_hidden_layers=2, intermediate_size=128)
    LlamaForCausalLM(LlamaConfig(vocab_size=400, **shape)).save_pretrained(llama)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(llama)
    for flags, *named in (
        (f"{good} --sed 1", "unknown flag", "--sed"),
        (f"{good} --colour red", "unknown flag", "--colour"),
        (f"{good} --samples 0", "--samples"),
        (f"{good} --temperature 0", "--temperature"),
        (f"{good} --benchmarks {tmp_path}/kind.jsonl", "kind.jsonl, line 1", "'kind'", "'poem'"),
        (f"{good} --max_model_len 1000", "--max_model_len 1000", "512"),
        (f"{good} --models {no_tokenizer}", str(no_tokenizer), "tokenizer"),
        (f"{good} --models {no_weights}", str(no_weights), "weights"),
        (f"{good} --models {tmp_path}/none", f"{tmp_path}/none"),
        (f"{good} --models {tiny_model} {tiny_model}", "tiny", "NAME="),
        (f"{good} --models {tiny_model} {llama}", str(llama), "architectures", "LlamaForCausalLM", "Qwen3ForCausalLM"),
        (f"--compare {tmp_path}", str(tmp_path), "summary.json"),
        ("", "--models", "--compare"),
    ):
        message = fails(evaluate, flags, monkeypatch)
        assert all(name in message for name in named), message
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    good = f"--target {tiny_model} --data {data} --output_dir {tmp_path}/out --max_model_len 400"
    for flags, *named in (
        (f"{good} --method polish", "--method", "polish", "dart"),
        (f"{good} --hard_cheats hedged lying", "--hard_cheats", "lying"),
        (f"{good} --keep best", "--keep", "best"),
        (f"{good} --weights mine", "--weights", "mine"),
        (f"{good} --share 0", "--share", "0"),
        (f"{good} --sample 3", "unknown flag", "--sample"),
        (f"{good} --min_fidelity 1.5", "--min_fidelity", "1.5"),
        (f"{good} --mapper {other}", str(other), tiny_model, "tokenizer"),
        (f"{good} --max_model_len 20", data, "--max_model_len 20"),
        (f"--data {data} --output_dir x", "--target"),
    ):
        message = fails(rewrite, flags, monkeypatch)
        assert all(name in message for name in named), message
    assert not (tmp_path / "out").exists()
