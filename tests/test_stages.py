"""runs/stages.sh: when a stage is run, skipped or refused."""

import subprocess

import pytest
from conftest import ROOT

SCRIPT = """import sys
class Config:
    steps: int = 5  # of training
    lr: float = 0.1
    def __post_init__(self):
        pass
open(sys.argv[sys.argv.index("--output_dir") + 1] + ".ran", "a").write("x")
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with a script of one stage, started with the project's own environment and stages.sh."""
    (tmp_path / "runs").mkdir()
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / "out/a").mkdir(parents=True)
    for name in ("setup.sh", "stages.sh"):
        (tmp_path / "runs" / name).write_text((ROOT / "runs" / name).read_text())
    (tmp_path / "runs/run.sh").write_text(
        'set -euo pipefail\nMACHINE=1x1 OUT=out\nsource "$(dirname "$0")/stages.sh"\nstage a script.py "$@"\necho end\n'
    )
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def test_run_once_skipped_then_refused(checkout):
    """Skipped with the same flags and defaults; refused, by name, after either has changed; comments do not count."""

    def run(*flags: str) -> tuple[int, str, int]:
        command = ["bash", str(checkout / "runs/run.sh"), *flags]
        done = subprocess.run(command, cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout, len((checkout / "out/a.ran").read_text())

    for _ in range(2):
        code, told, times = run("--steps", "3")
        assert code == 0 and told.endswith("end\n") and times == 1, told
    (checkout / "script.py").write_text(SCRIPT.replace("of training", "optimizer steps"))
    assert run("--steps", "3")[::2] == (0, 1)
    (checkout / "script.py").write_text(SCRIPT.replace("0.1", "0.2"))
    code, told, times = run("--steps", "3")
    assert (
        code == 1 and "< lr: float = 0.1" in told and "> lr: float = 0.2" in told and "end" not in told and times == 1
    )
    (checkout / "script.py").write_text(SCRIPT)
    code, told, times = run("--steps", "4")
    assert code == 1 and "< script.py --steps 3" in told and times == 1
