#!/usr/bin/env bash
# Mind the Gap, RASFT and their baselines with Qwen2.5-Math-1.5B on 10,000 problems of NuminaMath-CoT, beside DART: their
# papers' settings as far as they are known (lr 5e-5, batches of 256, one epoch, weight decay 0.01, warm-up 10%, cosine;
# avg@16 at temperature 1). Nothing of this recipe has been run on the model that it names.
#
#   PLAN=1 bash runs/qwen25_math_numina.sh                          # what it will do, need and take; nothing is run
#   bash runs/qwen25_math_numina.sh                                 # one GPU
#   MACHINE=1x8 bash runs/qwen25_math_numina.sh                     # eight
#   MACHINE=2x8 HOST=node0 NODE_RANK=0 bash runs/qwen25_math_numina.sh   # two nodes of eight; NODE_RANK=1 on the other
#
# With TEACHER set (say to Qwen/Qwen2.5-Math-7B-Instruct), the expert's solutions are the teacher's own verified ones.
set -euo pipefail
MACHINE="${MACHINE:-1x1}"                              # nodes x GPUs of each
MODEL="${MODEL:-Qwen/Qwen2.5-Math-1.5B}"               # or a local folder
TEACHER="${TEACHER:-}"                                 # empty: the solutions of the data set
TRAIN="${TRAIN:-data/numina_cot.jsonl}"                # made by runs/prepare.py if it is not there
BENCHMARKS="${BENCHMARKS:-data/math500.jsonl data/minerva_math.jsonl data/olympiadbench.jsonl data/aime24.jsonl
    data/amc23.jsonl data/aime25.jsonl}"
OUT="${OUT:-out/qwen25_math_numina}"
source "$(dirname "$0")/stages.sh"

ROWS=10000 # what the plan takes TRAIN to have before it is there
SFT=(--lr 5e-5 --batch_size 256 --weight_decay 0.01 --warmup 0.1 --max_length 2048 --gradient_checkpointing True
    --save_every 20)
LENGTHS=(--max_tokens 1024 --max_model_len 4096)
REWRITE=(--samples 4 "${LENGTHS[@]}") # a prompt of Mind the Gap's; RASFT has 3, DART 8
EVALUATE=(--samples 16 --greedy True --max_tokens 4096 --max_model_len 4096) # the model reads no more than 4096
# what the plan assumes: lengths, and speeds of one GPU of the H100 class, not measured by us
PLAN_FLAGS=(--prompt_tokens 150 --response_tokens 400 --tflops 400 --mfu 0.35 --decode_tokens_per_second 6000)

qwen25_math_numina() {
    for file in $BENCHMARKS; do data "$file"; done
    data "$TRAIN" --decontaminate $BENCHMARKS --limit 10000
    local rows steps
    BASE="$MODEL" DEMOS="$TRAIN"
    if [ -n "$TEACHER" ]; then
        stage teacher rewrite.py --method self --target "$TEACHER" --data "$TRAIN" "${REWRITE[@]}" --fallback False
        DEMOS="$OUT/teacher/train.jsonl"
    fi
    rows=$(rows "$DEMOS")
    steps=$(((rows + 511) / 512 * 2)) # of every arm: one epoch of the demonstrations, in two rounds for RASFT

    # --- imitation, with two losses ---
    sft sft "$DEMOS" --loss sft --steps "$steps"
    sft dft "$DEMOS" --loss dft --steps "$steps"

    # --- Mind the Gap ---
    rewrite mtg resolve
    sft mtg "$OUT/mtg/rewrite/train.jsonl" --loss sft --steps "$steps"
    sft mtg_dft "$OUT/mtg/rewrite/train.jsonl" --loss dft --steps "$steps"

    # --- RASFT: two rounds, along one schedule, with one optimizer ---
    rasft rasft 2 "$steps" "" --samples 3 --temperature 0.9

    # --- DART ---
    stage dart/mapper mapper_rl.py --task map --model "$MODEL" --data "$DEMOS" --steps "$(((rows + 63) / 64))" \
        --lr 1e-6 "${LENGTHS[@]}"
    rewrite dart dart --mapper "$OUT/dart/mapper/model" --samples 8
    sft dart "$OUT/dart/rewrite/train.jsonl" --loss sft --steps "$steps"

    # --- evaluation ---
    MODELS=("base=$MODEL" "rasft=$OUT/rasft/round-2/sft/model")
    for name in sft dft mtg mtg_dft dart; do MODELS+=("$name=$OUT/$name/sft/model"); done
    stage eval evaluate.py --models "${MODELS[@]}" --benchmarks $BENCHMARKS "${EVALUATE[@]}"
}
recipe qwen25_math_numina
