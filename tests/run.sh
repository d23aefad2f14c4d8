#!/usr/bin/env bash
# Style and tests, with the environment that runs/setup.sh makes. Arguments go to pytest: bash tests/run.sh -k grpo
set -euo pipefail
cd "$(dirname "$0")/.."
bash runs/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that spin at barriers crawl where cores are shared
.venv/bin/python -m pytest tests -q --durations=8 -n 2 --dist loadfile --no-loadscope-reorder "$@"
