#!/usr/bin/env bash
# Every method of the field in the toy world: runs/toy.sh (base, SFT, prompted rewriting, DART, direct GRPO, oracle), then
# the further arms, each of them one line below. The table grows in out/toy/report.md.
#
#   for SEED in 0 1 2; do SEED=$SEED bash runs/compare.sh; done
#
# It can be stopped and started again. Same problems, steps, schedule and prompt for every arm. The learning rates of the
# further arms were chosen by `COMPARE=1 bash runs/tune.sh` on seed 100 from one grid (results/tune.md), but for RASFT's,
# which is DART's until its cells have been run. Arms named *_filtered apply DART's hard cheats to texts of another source;
# prompted_dart is DART's whole choice of rewrites with the untrained mapper, so that one sees what its training adds;
# dart_kl is DART with the other alignment.
source "$(dirname "$0")/toy.sh"

DFT_GRID="--lr 1e-3 --steps 400"
ASFT_GRID="--lr 3e-4 --steps 400"
RFT_GRID="--lr 3e-4 --steps 400"
RFT_DFT_GRID="--lr 3e-4 --steps 400"
MTG_GRID="--lr 1e-3 --steps 400"
MTG_DFT_GRID="--lr 1e-3 --steps 400"
RASFT_GRID="3e-4 400"
DART_DFT_GRID="--lr 3e-4 --steps 400"
FILTER="--hard_cheats early_answer no_reasoning mentions_source hedged false_arithmetic"

# rewrite ARM METHOD FLAGS...: a training set of the base model's own texts.
rewrite() {
    stage "$1/rewrite" rewrite.py --method "$2" --target "$BASE" --data "$WORLD/demos.jsonl" "${REWRITE[@]}" "${@:3}"
}
# rasft ARM LR STEPS FLAGS...: four rounds of rollouts with the current model and a quarter of the steps each, along one
# schedule, with one optimizer.
rasft() {
    local arm="$1" lr="$2" steps="$3" round model="$BASE" before=()
    shift 3
    for round in 1 2 3 4; do
        stage "$arm/rewrite-$round" rewrite.py --method rasft --mapper "$model" --target "$BASE" \
            --data "$WORLD/demos.jsonl" "${REWRITE[@]}" --seed $((1000 * round + SEED)) "$@"
        stage "$arm/sft-$round" sft.py --loss rasft --model "$BASE" --data "$OUT/$arm/rewrite-$round/train.jsonl" \
            "${SFT_STEPS[@]}" --lr "$lr" --steps $((steps / 4)) --schedule_steps "$steps" "${before[@]}"
        model="$OUT/$arm/sft-$round/model" before=(--start_from "$OUT/$arm/sft-$round")
    done
    MODELS+=("$arm=$model")
}

# --- other losses on the expert's text ---
MODELS=()
sft dft "$WORLD/demos.jsonl" --loss dft $DFT_GRID
sft asft "$WORLD/demos.jsonl" --loss asft $ASFT_GRID

# --- rejection sampling: the base's own right solutions ---
rewrite rft self --fallback False
sft rft "$OUT/rft/rewrite/train.jsonl" $RFT_GRID
sft rft_dft "$OUT/rft/rewrite/train.jsonl" --loss dft $RFT_DFT_GRID
rewrite rft_filtered self --fallback False $FILTER
sft rft_filtered "$OUT/rft_filtered/rewrite/train.jsonl" $RFT_GRID

# --- Mind the Gap: own solutions, guided ones, the expert's ---
rewrite mtg resolve
sft mtg "$OUT/mtg/rewrite/train.jsonl" $MTG_GRID
sft mtg_dft "$OUT/mtg/rewrite/train.jsonl" --loss dft $MTG_DFT_GRID
rewrite mtg_filtered resolve $FILTER
sft mtg_filtered "$OUT/mtg_filtered/rewrite/train.jsonl" $MTG_GRID

# --- RASFT ---
rasft rasft $RASFT_GRID
rasft rasft_filtered $RASFT_GRID $FILTER

# --- DART's choice without its training, with the other alignment, its rewrites under DFT; direct GRPO that refuses what
# DART refuses ---
rewrite prompted_dart dart
sft prompted_dart "$OUT/prompted_dart/rewrite/train.jsonl" $DART_GRID
stage dart_kl/mapper mapper_rl.py --task map --align kl --model "$BASE" --data "$WORLD/demos.jsonl" "${RL[@]}" $MAPPER_GRID
stage dart_kl/rewrite rewrite.py --method dart --mapper "$OUT/dart_kl/mapper/model" --target "$BASE" \
    --data "$WORLD/demos.jsonl" "${REWRITE[@]}"
sft dart_kl "$OUT/dart_kl/rewrite/train.jsonl" $DART_GRID
sft dart_dft "$OUT/dart/rewrite/train.jsonl" --loss dft $DART_DFT_GRID
stage grpo_filtered/solve mapper_rl.py --task solve --model "$BASE" --data "$WORLD/demos.jsonl" "${RL[@]}" $GRPO_GRID \
    --steps 100000 --max_seconds "$(seconds dart/mapper dart/rewrite dart/sft)" $FILTER

# --- evaluation ---
for arm in dft asft rft rft_dft rft_filtered mtg mtg_dft mtg_filtered prompted_dart dart_kl dart_dft; do
    MODELS+=("$arm=$OUT/$arm/sft/model")
done
stage eval-compare evaluate.py --models "${MODELS[@]}" "grpo_filtered=$OUT/grpo_filtered/solve/model" \
    --benchmarks "${SUITE_FILES[@]}" "${EVALUATE[@]}"
stage eval-half evaluate.py --models "sft_half_temperature=$OUT/sft/sft/model" --benchmarks "${SUITE_FILES[@]}" \
    "${EVALUATE[@]}" --temperature 0.5

report
