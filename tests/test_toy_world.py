"""The toy world's own rules: its checker knows right from wrong in every style, no suite shares a problem, and its
optimizer is Muon."""

import random
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "runs"))
import toy_world as world

import reward

CHAIN = (15, 3, -11)
PROBLEM = world.word_problem(CHAIN, 0)


@pytest.mark.parametrize("wording", range(len(world.WORDINGS)))
def test_a_problem_can_be_read_back(wording):
    rng = random.Random(1)
    for _ in range(50):
        chain = world.draw(rng, rng.randint(1, 8), {0, 1, 2, 3})
        assert world.read_problem(world.word_problem(chain, wording)) == chain


def test_the_checker_accepts_every_style():
    rng = random.Random(2)
    for _ in range(50):
        chain = world.draw(rng, rng.randint(1, 8), {0, 1, 2, 3})
        mixed = [rng.choice(world.STYLES) for _ in chain[1:]]
        for style in (*world.STYLES, mixed):
            assert world.steps_right(world.word_problem(chain, 0), world.solution(chain, style))


@pytest.mark.parametrize(
    "text",
    [
        "15+3=18. 18-11=8. \\boxed{7}",  # a wrong result
        "15+3=17. 17-11=7. \\boxed{7}",  # two errors that cancel
        "15+3=18. \\boxed{7}",  # a step left out
        "18-11=7. 15+3=18. \\boxed{7}",  # the wrong order
        "15+3=18. 18-11=7. \\boxed{8}",  # another answer than the last result
        "15+3=18. 18-11=7. 7+1=8. \\boxed{7}",  # a step too many
        "\\boxed{7}",
    ],
)
def test_the_checker_refuses(text):
    assert world.steps_right(PROBLEM, "15+3=18. 18-11=7. \\boxed{7}")
    assert not world.steps_right(PROBLEM, text)


def test_native_steps_are_told_apart():
    assert world.native_share(world.solution(CHAIN, "native")) == 1
    assert world.native_share(world.solution(CHAIN, "expert")) == 0
    assert world.native_share(world.solution(CHAIN, ["spoken", "native"])) == 0.5
    assert world.native_share("\\boxed{7}") == 0


def test_rewrites_are_as_careless_as_the_world_says():
    rng, found, native = random.Random(4), [], []
    chain = (15, 3, -11, 4, 6)
    for _ in range(4000):
        text = world.rewrite(rng, chain)
        right = world.steps_right(world.word_problem(chain, 0), text)
        found.append((right, text.startswith("\\boxed"), reward.verify(text, "17")))
        native.append(world.native_share(text) if right else None)
    right, alone, verified = np.mean(found, axis=0)
    lazy = world.LAZY
    assert right == pytest.approx(lazy["complete"] + lazy["gaps"] / 2**4, abs=0.03)
    assert alone == pytest.approx(lazy["alone"] + lazy["gaps"] / 2**4, abs=0.03)
    assert verified == pytest.approx(1 - lazy["wrong"] / 4, abs=0.03)  # the last of four results is the answer
    native = [share for share in native if share is not None]
    assert np.mean(native) == pytest.approx(1 / 3, abs=0.05)  # every step has a style of its own, so
    assert np.mean([share == 1 for share in native]) < 0.04  # few texts are native throughout: 3^-4


def test_the_grader_knows_the_expert_and_native_texts_as_honest():
    rng = random.Random(3)
    for _ in range(50):
        chain = world.draw(rng, rng.randint(2, 6), {0, 1, 2, 3})
        problem, answer = world.word_problem(chain, 0), str(sum(chain))
        expert, native = world.solution(chain, "expert"), world.solution(chain, "native")
        told = reward.judge(problem, expert, native, answer, True, reward.verify(native, answer), 0.8)
        assert told["clean"] == 1.0 and told["fidelity"] == 1.0, native


def test_no_problem_stands_in_two_files():
    def chains(seed):
        files = world.data_files(world.Config(seed=seed, demos=60, benchmark_rows=40))
        return {name: {world.read_problem(r["problem"]) for r in rows} for name, rows in files.items()}, files

    result, files = chains(0)
    tuning, _ = chains(100)
    suites = [f"{suite}.jsonl" for suite in world.SUITES]
    for suite in suites:
        assert len(result[suite]) == 40
        assert not result[suite] & result["demos.jsonl"]
        assert not result[suite] & result["validation.jsonl"]
        assert not result[suite] & tuning[suite]  # nothing was tuned on a problem that is reported
    assert result["demos.jsonl"] == result["oracle.jsonl"]
    for row in files["demos.jsonl"] + files["oracle.jsonl"]:
        assert world.steps_right(row["problem"], row["solution"]) and reward.verify(row["solution"], row["answer"])


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_muon_takes_the_step_that_its_formula_says(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    momentum = torch.zeros(shape)
    expected, average = weight.detach().double(), momentum.double()
    for rate in (0.01, 0.02):  # the second step has a momentum
        weight.grad = torch.randn(shape, generator=generator)
        before = expected
        world.muon_step(weight, momentum, rate)
        gradient = weight.grad.double()
        average = 0.95 * average + 0.05 * gradient
        x0 = 0.05 * gradient + 0.95 * average
        x0 = x0 / (x0**2).sum().sqrt()
        x1 = 3.4445 * x0 - 4.7750 * x0 @ x0.T @ x0 + 2.0315 * x0 @ x0.T @ x0 @ x0.T @ x0
        x2 = 3.4445 * x1 - 4.7750 * x1 @ x1.T @ x1 + 2.0315 * x1 @ x1.T @ x1 @ x1.T @ x1
        x3 = 3.4445 * x2 - 4.7750 * x2 @ x2.T @ x2 + 2.0315 * x2 @ x2.T @ x2 @ x2.T @ x2
        x4 = 3.4445 * x3 - 4.7750 * x3 @ x3.T @ x3 + 2.0315 * x3 @ x3.T @ x3 @ x3.T @ x3
        x5 = 3.4445 * x4 - 4.7750 * x4 @ x4.T @ x4 + 2.0315 * x4 @ x4.T @ x4 @ x4.T @ x4
        expected = before - 0.1 * rate * before - 0.2 * max(shape) ** 0.5 * rate * x5
        error = (weight.detach().double() - expected).norm() / (expected - before).norm()
        assert error < 1e-4  # of the step; products rounded to bf16 give 1e-2
