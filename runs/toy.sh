#!/usr/bin/env bash
# DART from end to end in a world that two CPU cores can build: does rewriting the demonstrations help?
#
#   bash runs/toy.sh                  # seed 0; the table is printed and kept as out/toy/report.md,
#                                     # the figures are out/toy/seed0/report.html
#   for SEED in 0 1 2; do SEED=$SEED bash runs/toy.sh; done        # the table then has means and intervals
#   ABLATE=1 bash runs/toy.sh         # adds DART with one part of its reward changed at a time
#   OUT=out/kl bash runs/toy.sh dart  # after an edit of a script: this arm alone, in the same world; both on one page:
#   .venv/bin/python runs/report.py out/toy/seed0 out/kl/seed0 --out out/both
#
# A stage that is finished is skipped when this is started again; one that was killed goes on where it was. Its seconds
# are then those of its last attempt, and direct GRPO's time too, if it was DART's. After an edit of a script choose
# another OUT; after one of a prompt or of toy_world.py remove out/world too. What is set below wins over the scripts'
# defaults. Every arm has the same problems, schedule and prompt. runs/tune.sh chose learning rates and steps on seed
# 100, which no result uses, from one grid for all arms that fine-tune and one for both RL runs (results/tune.md).
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
source "$(dirname "$0")/stages.sh"

SEED="${SEED:-0}"
OUT="${OUT:-out/toy}/seed$SEED" WORLD="out/world/seed$SEED"
BASE="$WORLD/base" DEMOS="$WORLD/demos.jsonl"
ALL=(sft oracle prompted prompted_dart dart grpo)
ARMS=("${@:-${ALL[@]}}")
for arm in "${ARMS[@]}"; do
    if [[ " ${ALL[*]} " != *" $arm "* ]]; then echo "no arm is called $arm; there are ${ALL[*]}" && exit 2; fi
done
SFT=(--batch_size 32 --warmup 0.1 --micro_batch_tokens 4096 --seed "$SEED")
SFT_GRID="--lr 1e-3 --steps 400"      # expert text
PROMPTED_GRID="--lr 3e-4 --steps 400" # untrained mapper's rewrites
PROMPTED_DART_GRID="--lr 1e-3 --steps 400" # those that DART would choose
DART_GRID="--lr 3e-4 --steps 400"     # trained mapper's rewrites
ORACLE_GRID="--lr 3e-4 --steps 400"   # native text
RL=(--groups 24 --group_size 8 --max_tokens 128 --max_model_len 384 --warmup_steps 2 --micro_batch_tokens 4096
    --gradient_checkpointing False --rollouts_per_row 8 --seed "$SEED")
MAPPER_GRID="--lr 1e-4 --steps 120 --export_every 20"
GRPO_GRID="--lr 1e-4"
REWRITE=(--samples 8 --max_tokens 128 --max_model_len 384 --seed "$SEED")
EVALUATE=(--samples 4 --greedy False --limit 100 --max_tokens 128 --max_model_len 384 --seed "$SEED")
SUITES=(in_distribution shorter longer reworded)

# seconds STAGE...: what they took together.
seconds() { local sum=0 name; for name in "$@"; do sum=$((sum + $(cat "$OUT/$name/seconds"))); done; echo "$sum"; }
# dart ARM "FLAGS OF MAPPER AND REWRITING" "FLAGS OF THE MAPPER": DART's three stages.
dart() {
    stage "$1/mapper" mapper_rl.py --task map --model "$BASE" --data "$DEMOS" "${RL[@]}" $MAPPER_GRID ${2:-} ${3:-}
    rewrite "$1" dart --mapper "$OUT/$1/mapper/model" ${2:-}
    sft "$1" "$OUT/$1/rewrite/train.jsonl" $DART_GRID
}
# choice ARM FLAGS...: DART's choice among the untrained mapper's rewrites, and SFT on it.
choice() { rewrite "$1" dart "${@:2}"; sft "$1" "$OUT/$1/rewrite/train.jsonl" $PROMPTED_DART_GRID; }

# --- the world: base model, demonstrations in the expert's words, benchmarks ---
world "$SEED"

# --- the arms ---
MODELS=("base=$BASE")
for arm in "${ARMS[@]}"; do
    case "$arm" in
        # SFT on the expert's text, and on native text, which only a toy can have
        sft) sft sft "$DEMOS" $SFT_GRID ;;
        oracle) sft oracle "$WORLD/oracle.jsonl" $ORACLE_GRID ;;
        # prompted rewriting: the base model as an untrained mapper, then SFT
        prompted) rewrite prompted map; sft prompted "$OUT/prompted/rewrite/train.jsonl" $PROMPTED_GRID ;;
        # the same with DART's choice among the untrained mapper's rewrites
        prompted_dart) choice prompted_dart ;;
        # DART: train the mapper, rewrite, SFT
        dart) dart dart ;;
        # direct GRPO on the target, for as long as all of DART took
        grpo)
            [ -f "$OUT/dart/sft/seconds" ] || { echo "grpo takes as long as dart did: name dart before it" && exit 2; }
            stage grpo/solve mapper_rl.py --task solve --model "$BASE" --data "$DEMOS" "${RL[@]}" $GRPO_GRID \
                --steps 100000 --max_seconds "$(seconds dart/mapper dart/rewrite dart/sft)" --export_every 40
            MODELS+=("grpo=$OUT/grpo/solve/model")
            for path in "$OUT"/grpo/solve/model-??????; do
                if [ -d "$path" ]; then MODELS+=("grpo-${path##*-}=$path"); fi
            done
            continue
            ;;
    esac
    MODELS+=("$arm=$OUT/$arm/sft/model")
done

# --- evaluation: all models in one engine ---
SUITE_FILES=()
for suite in "${SUITES[@]}"; do SUITE_FILES+=("$WORLD/$suite.jsonl"); done
rm -f "$OUT/eval/seconds" # there may be more models than last time; those that are done are skipped
stage eval evaluate.py --models "${MODELS[@]}" --benchmarks "${SUITE_FILES[@]}" "${EVALUATE[@]}"

# --- ablations: DART with a part of its reward changed, in one two (where a cheat is allowed, rewriting allows it too) ---
ablation() { dart "ablation/$1" "${@:2}"; MODELS+=("$1=$OUT/ablation/$1/sft/model"); }
if [ -n "${ABLATE:-}" ]; then
    MODELS=("dart=$OUT/dart/sft/model")
    ablation no-penalty "--hard_cheats none --soft_weight 0"
    ablation no-false-arithmetic "--hard_cheats early_answer no_reasoning mentions_source hedged"
    ablation no-fidelity "--min_fidelity 0"
    ablation no-gate "" "--gate False"
    ablation no-gate-no-penalty "--hard_cheats none --soft_weight 0" "--gate False"
    ablation kl "" "--align kl"
    ablation nll "" "--align nll"
    ablation group "" "--align group"
    ablation tau-1 "" "--tau 1"
    ablation tau-2 "" "--tau 2"
    stage eval-ablation evaluate.py --models "${MODELS[@]}" --benchmarks "${SUITE_FILES[@]}" "${EVALUATE[@]}"
fi

# --- the table over all seeds, and this seed's page of figures ---
report() {
    if [ "${ARMS[*]}" = "${ALL[*]}" ]; then .venv/bin/python runs/toy_report.py "${OUT%/*}"; fi
    .venv/bin/python runs/report.py "$OUT"
}
if [ "${BASH_SOURCE[0]}" = "$0" ]; then report; fi  # runs/compare.sh goes on from here
