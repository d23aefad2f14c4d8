#!/usr/bin/env bash
# Two figures of the method in the toy world, beside the arms of runs/toy.sh, which it starts with:
#   - choosing among K rewrites, K = 1, 2, 4, 8, 16, with the untrained and with the trained mapper: where does choosing
#     end and learning begin?
#   - DART from the mapper after 20, 40, 60, 80 and 120 steps, over seconds and tokens, beside direct GRPO's curve
# K = 8, and 0 and 120 steps, are arms of runs/toy.sh. The table grows in out/toy/report.md; the figures are in
# out/toy/report.svg.
#
#   for SEED in 0 1 2; do SEED=$SEED bash runs/curves.sh; done
if [ $# -gt 0 ]; then echo "runs/curves.sh takes no arguments" && exit 2; fi
source "$(dirname "$0")/toy.sh"

MODELS=()
# point NAME MAPPER SAMPLES "FLAGS OF TUNING": DART's choice among that mapper's rewrites, then SFT.
point() {
    rewrite "curves/$1" dart --mapper "$2" --samples "$3"
    sft "curves/$1" "$OUT/curves/$1/rewrite/train.jsonl" $4
    MODELS+=("$1=$OUT/curves/$1/sft/model")
}
for samples in 1 2 4 16; do
    point "untrained-$samples" "$BASE" "$samples" "$PROMPTED_DART_GRID"
    point "trained-$samples" "$OUT/dart/mapper/model" "$samples" "$DART_GRID"
done
for step in 20 40 60 80; do point "step-$step" "$OUT/dart/mapper/model-0000$step" 8 "$DART_GRID"; done
stage eval-curves evaluate.py --models "${MODELS[@]}" --benchmarks "${SUITE_FILES[@]}" "${EVALUATE[@]}"

report
