#!/usr/bin/env bash
# DART on a small pretrained model, on a laptop's CPU or on one GPU: does the mapper learn to rewrite, and what do SFT on
# the expert's text, on the untrained mapper's rewrites and on the trained one's leave of the model? The sizes stand below.
#
#   MODEL=FOLDER PLAN=1 bash runs/real.sh                                   # memory, tokens, hours; nothing is run
#   MODEL=FOLDER bash runs/real.sh                                          # GSM8K, made by runs/prepare.py
#   MODEL=FOLDER TRAIN=my.jsonl BENCHMARKS="a.jsonl b.jsonl" bash runs/real.sh
#   MODEL=FOLDER BENCHMARKS="data/gsm8k_test.jsonl data/humaneval.jsonl" bash runs/real.sh    # and what is forgotten
#   MODEL=FOLDER DEMONSTRATIONS=512 STEPS=128 bash runs/real.sh             # longer
#
# It can be stopped and started again. A stage's seconds (of its last attempt) are in OUT/STAGE/seconds, its tokens in
# metrics.jsonl; the page of figures is OUT/report.html. On a CPU one process has all cores: two would hold engine, target
# and head twice.
set -euo pipefail
export PYTHONWARNINGS=ignore OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
MODEL="${MODEL:?a folder with a pretrained model that follows instructions, or its name on the hub}"
TRAIN="${TRAIN:-data/gsm8k_train.jsonl}"
BENCHMARKS="${BENCHMARKS:-data/gsm8k_test.jsonl}"
OUT="${OUT:-out/real}" MACHINE="${MACHINE:-1x1}"
source "$(dirname "$0")/stages.sh"

# Sizes, and speeds for the plan, of half a billion weights: on two cores; on an H100, measured (results/real.md)
if [ "$GPUS" = 0 ]; then
    demonstrations=128 problems=200 steps=32 groups=4 tokens=1024 save=4
    PLAN_FLAGS=(--tflops 0.2 --mfu 0.5 --decode_tokens_per_second 100)
else
    demonstrations=1024 problems=500 steps=40 groups=32 tokens=16384 save=20
    PLAN_FLAGS=(--tflops 784 --mfu 0.1 --decode_tokens_per_second 13000)
fi
ROWS="${DEMONSTRATIONS:-$demonstrations}"    # drawn from TRAIN
PROBLEMS="${PROBLEMS:-$problems}"            # of each benchmark
STEPS="${STEPS:-$steps}"                     # of the mapper, with 8 rewrites each of `groups` demonstrations
LR="${LR:-5e-6}"                             # of the mapper
PLAN_FLAGS+=(--prompt_tokens 110 --response_tokens 180)

BASE="$MODEL" DEMOS="$OUT/$(basename "$TRAIN" .jsonl)-$ROWS.jsonl"
LENGTHS=(--max_tokens 400 --max_model_len 1024)
MAPPER=(--groups "$groups" --group_size 8 --lr "$LR" --warmup_steps 2 --gradient_checkpointing True
    --micro_batch_tokens "$tokens" --save_every "$save" "${LENGTHS[@]}")
REWRITE=(--samples 4 "${LENGTHS[@]}")
SFT=(--lr 1e-5 --epochs 3 --batch_size 16 --warmup 0.1 --micro_batch_tokens "$tokens" --save_every $((5 * save)))
EVALUATE=(--samples 4 --limit "$PROBLEMS" "${LENGTHS[@]}")

real() {
    for file in "$TRAIN" $BENCHMARKS; do data "$file"; done
    if [ -z "${PLANNING:-}" ] && [ ! -f "$DEMOS" ]; then
        .venv/bin/python runs/prepare.py "$TRAIN" --problem problem --solution solution --answer answer \
            --limit "$ROWS" --decontaminate $BENCHMARKS --out "$DEMOS"
    fi

    # --- the mapper; DART's choice among the rewrites of the untrained and of the trained one ---
    rewrite untrained dart
    stage trained/mapper mapper_rl.py --task map --model "$MODEL" --data "$DEMOS" --steps "$STEPS" "${MAPPER[@]}"
    rewrite trained dart --mapper "$OUT/trained/mapper/model"

    # --- SFT on three texts of the same problems ---
    sft expert "$DEMOS"
    sft untrained "$OUT/untrained/rewrite/train.jsonl"
    sft trained "$OUT/trained/rewrite/train.jsonl"

    # --- evaluation ---
    MODELS=("base=$MODEL")
    for arm in expert untrained trained; do MODELS+=("$arm=$OUT/$arm/sft/model"); done
    stage eval evaluate.py --models "${MODELS[@]}" --benchmarks $BENCHMARKS "${EVALUATE[@]}"
}
recipe real
