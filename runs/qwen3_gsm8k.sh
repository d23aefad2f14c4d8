#!/usr/bin/env bash
# DART, SFT and direct RL with Qwen3-0.6B on GSM8K, on six benchmarks. We could not read DART's own settings (README):
# these are ours, and nothing of this recipe has been run on the model that it names.
#
#   PLAN=1 bash runs/qwen3_gsm8k.sh                          # what it will do, need and take; nothing is run
#   bash runs/qwen3_gsm8k.sh                                 # one GPU
#   MACHINE=1x8 bash runs/qwen3_gsm8k.sh                     # eight
#   MACHINE=2x8 HOST=node0 NODE_RANK=0 bash runs/qwen3_gsm8k.sh   # two nodes of eight; NODE_RANK=1 on the other
set -euo pipefail
MACHINE="${MACHINE:-1x1}"                          # nodes x GPUs of each
MODEL="${MODEL:-Qwen/Qwen3-0.6B}"                  # or a local folder
TRAIN="${TRAIN:-data/gsm8k_train.jsonl}"           # demonstrations; made by runs/prepare.py if they are not there
BENCHMARKS="${BENCHMARKS:-data/gsm8k_test.jsonl data/math500.jsonl data/minerva_math.jsonl data/olympiadbench.jsonl
    data/amc23.jsonl data/aime24.jsonl}"
OUT="${OUT:-out/qwen3_gsm8k}"
source "$(dirname "$0")/stages.sh"

ROWS=7473 # what the plan takes TRAIN to have before it is there
SFT=(--lr 1e-5 --epochs 3 --batch_size 64 --warmup 0.05 --gradient_checkpointing True --save_every 100)
EVALUATE=(--samples 8 --max_tokens 2048 --max_model_len 3072)
# what the plan assumes: lengths, and an H100's speeds as measured with another model of this size (results/real.md)
PLAN_FLAGS=(--prompt_tokens 110 --response_tokens 180 --tflops 784 --mfu 0.1 --decode_tokens_per_second 13000)

qwen3_gsm8k() {
    for file in $BENCHMARKS; do data "$file"; done
    data "$TRAIN" --decontaminate $BENCHMARKS
    local rows mapper_steps grpo_steps export_every step
    rows=$(rows "$TRAIN")
    mapper_steps=$(((2 * rows + 63) / 64)) # two passes over the problems, 64 a step
    grpo_steps=$((2 * mapper_steps))       # more than all of DART generates; accuracy over cost is in the report

    # --- SFT on the expert's text ---
    stage sft sft.py --model "$MODEL" --data "$TRAIN" "${SFT[@]}"

    # --- DART ---
    stage dart/mapper mapper_rl.py --task map --model "$MODEL" --data "$TRAIN" --steps "$mapper_steps" --lr 1e-6
    stage dart/rewrite rewrite.py --method dart --mapper "$OUT/dart/mapper/model" --target "$MODEL" --data "$TRAIN"
    stage dart/sft sft.py --model "$MODEL" --data "$OUT/dart/rewrite/train.jsonl" "${SFT[@]}"

    # --- direct RL on the target ---
    export_every=$((grpo_steps / 4 + 1))
    stage grpo mapper_rl.py --task solve --model "$MODEL" --data "$TRAIN" --steps "$grpo_steps" --lr 1e-6 \
        --export_every "$export_every"

    # --- evaluation ---
    MODELS=("base=$MODEL" "sft=$OUT/sft/model" "dart=$OUT/dart/sft/model" "grpo=$OUT/grpo/model")
    for ((step = export_every; step <= grpo_steps; step += export_every)); do
        MODELS+=("$(printf "grpo-%06d=$OUT/grpo/model-%06d" "$step" "$step")")
    done
    stage eval evaluate.py --models "${MODELS[@]}" --benchmarks $BENCHMARKS "${EVALUATE[@]}"
}
recipe qwen3_gsm8k
