#!/usr/bin/env bash
# Every method of the field in the toy world: runs/toy.sh (base, SFT, prompted rewriting, DART, direct GRPO, oracle), then
# the further arms, each of them one line below. The table grows in out/toy/report.md.
#
#   for SEED in 0 1 2; do SEED=$SEED bash runs/compare.sh; done
#
# It can be stopped and started again. Same problems, steps, schedule and prompt for every arm. The learning rates of the
# further arms are those that `COMPARE=1 bash runs/tune.sh` chose (results/tune.md). Arms named *_filtered apply DART's
# hard cheats to texts of another source, at that arm's learning rate. The rft arms have rows of the problems only that
# the base solves, the others of all.
if [ $# -gt 0 ]; then echo "runs/compare.sh takes no arguments; remove the lines of arms that you do not want" && exit 2; fi
source "$(dirname "$0")/toy.sh"

DFT_GRID="--lr 1e-3 --steps 400"
ASFT_GRID="--lr 3e-3 --steps 400"
RFT_GRID="--lr 3e-4 --steps 400"
RFT_DFT_GRID="--lr 3e-4 --steps 400"
MTG_GRID="--lr 1e-4 --steps 400"
MTG_DFT_GRID="--lr 1e-4 --steps 400"
RASFT_GRID="--lr 3e-4"
DART_DFT_GRID="--lr 3e-4 --steps 400"
FILTER="--hard_cheats early_answer no_reasoning mentions_source hedged false_arithmetic"

# --- other losses on the expert's text ---
sft dft "$DEMOS" --loss dft $DFT_GRID
sft asft "$DEMOS" --loss asft $ASFT_GRID

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
rasft rasft 4 400 "$RASFT_GRID"
rasft rasft_filtered 4 400 "$RASFT_GRID" $FILTER

# --- prompted_dart, at its rate, without DART's penalty in the choice, without fidelity, without both ---
choice prompted_no_penalty --hard_cheats none --soft_weight 0
choice prompted_no_fidelity --min_fidelity 0
choice prompted_neither --hard_cheats none --soft_weight 0 --min_fidelity 0

# --- DART's rewrites under DFT; direct GRPO with DART's hard cheats in its reward ---
sft dart_dft "$OUT/dart/rewrite/train.jsonl" --loss dft $DART_DFT_GRID
stage grpo_filtered/solve mapper_rl.py --task solve --model "$BASE" --data "$DEMOS" "${RL[@]}" $GRPO_GRID \
    --steps 100000 --max_seconds "$(seconds dart/mapper dart/rewrite dart/sft)" $FILTER

# --- evaluation of the arms that are there ---
MODELS=()
for arm in dft asft rft rft_dft rft_filtered mtg mtg_dft mtg_filtered rasft rasft_filtered \
    prompted_no_penalty prompted_no_fidelity prompted_neither dart_dft grpo_filtered; do
    for model in "$OUT/$arm"/{sft,round-4/sft,solve}/model; do
        if [ -d "$model" ]; then MODELS+=("$arm=$model"); fi
    done
done
rm -f "$OUT/eval-compare/seconds" # there may be more models than last time
stage eval-compare evaluate.py --models "${MODELS[@]}" --benchmarks "${SUITE_FILES[@]}" "${EVALUATE[@]}"

report
