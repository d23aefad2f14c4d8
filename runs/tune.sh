#!/usr/bin/env bash
# How the learning rates and steps in runs/toy.sh and runs/compare.sh were chosen: one grid for every arm that
# fine-tunes, equal trials for both RL runs, on seed 100, which no result uses, by accuracy on the validation split (all
# suites mixed); the mapper, which solves nothing, by the mean log-probability of the rewrites that DART chooses from it.
#
#   ACCEPT=1 bash runs/tune.sh    # the acceptance of the world, which the next line begins with, and no more
#   bash runs/tune.sh             # the arms of runs/toy.sh
#   COMPARE=1 bash runs/tune.sh   # those of runs/compare.sh: longer than that. In the first part every arm was best with
#                                 # the most steps, so all further arms get these, and the same learning rates;
#                                 # ARMS="rft rasft" tunes these alone
#
# The tables are kept as out/tune/table.md. What is finished is skipped when it is started again.
# It starts with the acceptance of the world by the arms that train no mapper: base, SFT on the expert's text, on native
# text, and on what DART would choose among the untrained mapper's rewrites, on all four suites. The world was frozen on
# that table; what comes after it must not change it.
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
source "$(dirname "$0")/stages.sh"

SEED=100 OUT=out/tune/seed100 WORLD=out/world/seed100
BASE="$WORLD/base" DEMOS="$WORLD/demos.jsonl"
LRS=(1e-4 3e-4 1e-3 3e-3 8e-3) STEPS=(100 400) # 100 steps: 5 passes over the demonstrations
RL_LRS=(3e-5 1e-4 3e-4 1e-3)
SFT=(--batch_size 32 --warmup 0.1 --micro_batch_tokens 4096)
RL=(--model "$BASE" --data "$DEMOS" --groups 24 --group_size 8 --max_tokens 128 --max_model_len 384 --warmup_steps 2
    --micro_batch_tokens 4096 --gradient_checkpointing False --rollouts_per_row 8)
REWRITE=(--samples 8 --max_tokens 128 --max_model_len 384)

# evaluate NAME BENCHMARK... -- NAME=MODEL...
evaluate() {
    local name="$1" benchmarks=()
    shift
    while [ "$1" != -- ]; do benchmarks+=("$WORLD/$1.jsonl"); shift; done
    stage "$name" evaluate.py --models "${@:2}" --benchmarks "${benchmarks[@]}" --samples 4 --greedy False \
        --max_tokens 128 --max_model_len 384
}
# grid ARM DATA LOSS...: fine-tunes with every learning rate and number of steps; scores them on the validation split.
grid() {
    local models=() lr steps name
    for lr in "${LRS[@]}"; do
        for steps in "${STEPS[@]}"; do
            name="$1-$lr-$steps"
            sft "$name" "$2" --lr "$lr" --steps "$steps" "${@:3}"
            models+=("$name=$OUT/$name/sft/model")
        done
    done
    evaluate "eval/$1" validation -- "${models[@]}"
}
# best ARM: the name of its run with the highest accuracy on the validation split.
best() {
    .venv/bin/python - "$OUT/eval/$1" <<'PY'
import json, sys
from pathlib import Path
def accuracy(path):
    return json.loads(path.read_text())["benchmarks"]["validation"]["avg@n"]["value"]
print(max(Path(sys.argv[1]).glob("*/summary.json"), key=accuracy).parent.name)
PY
}

world "$SEED"

if [ -z "${COMPARE:-}" ]; then
    # --- acceptance of the world ---
    evaluate eval/base validation -- base="$BASE"
    grid oracle "$WORLD/oracle.jsonl"
    grid sft "$DEMOS"
    rewrite prompted_dart dart
    grid prompted_dart "$OUT/prompted_dart/rewrite/train.jsonl"
    MODELS=("base=$BASE")
    for arm in sft oracle prompted_dart; do name=$(best $arm) && MODELS+=("$name=$OUT/$name/sft/model"); done
    evaluate acceptance in_distribution shorter longer reworded -- "${MODELS[@]}"
fi

if [ -n "${ACCEPT:-}" ]; then
    : # the tables below tell of it
elif [ -z "${COMPARE:-}" ]; then
    # --- the other arms of runs/toy.sh ---
    for lr in "${RL_LRS[@]}"; do
        stage "mapper-$lr" mapper_rl.py --task map --lr "$lr" --steps 60 "${RL[@]}"
        rewrite "dart-$lr" dart --mapper "$OUT/mapper-$lr/model"
        stage "grpo-$lr" mapper_rl.py --task solve --lr "$lr" --steps 100000 --max_seconds 300 "${RL[@]}"
        evaluate "eval/grpo-$lr" validation -- "grpo-$lr=$OUT/grpo-$lr/model"
    done
    # the mapper's learning rate, then its number of steps: those whose rewrites, as stage 2 chooses them, are the
    # likeliest under the base
    likeliest() {
        .venv/bin/python - "$OUT" "$@" <<'PY'
import json, sys
from pathlib import Path
def chosen(name):
    return json.loads(Path(sys.argv[1], name, "rewrite/metrics.jsonl").read_text().splitlines()[-1])["align"]
print(max(sys.argv[2:], key=chosen))
PY
    }
    MAPPER=$(likeliest "${RL_LRS[@]/#/dart-}") && MAPPER="${MAPPER#dart-}"
    stage "mapper-$MAPPER-long" mapper_rl.py --task map --lr "$MAPPER" --steps 240 --export_every 60 "${RL[@]}"
    for steps in 120 180 240; do
        rewrite "dart-$MAPPER-$steps" dart --mapper "$OUT/mapper-$MAPPER-long/model-000$steps"
    done
    MAPPER=$(likeliest "dart-$MAPPER" "dart-$MAPPER"-{120,180,240})
    echo "the mapper's learning rate and steps (60, if none are named): $MAPPER"
    grid dart "$OUT/$MAPPER/rewrite/train.jsonl"
    rewrite prompted map
    grid prompted "$OUT/prompted/rewrite/train.jsonl"
else
    # --- the arms of runs/compare.sh ---
    STEPS=("${STEPS[-1]}")  # as the first part chose them
    # texts SOURCE: its training set, OUT/SOURCE/rewrite/train.jsonl.
    texts() {
        case "$1" in
            rft) rewrite rft self --fallback False ;;
            mtg) rewrite mtg resolve ;;
        esac
    }
    for arm in ${ARMS:-dft asft rft mtg rft_dft mtg_dft dart_dft rasft}; do
        case "$arm" in
            dft | asft) grid "$arm" "$DEMOS" --loss "$arm" ;;
            rft | mtg) texts "$arm"; grid "$arm" "$OUT/$arm/rewrite/train.jsonl" ;;
            rft_dft | mtg_dft)
                texts "${arm%_dft}"
                grid "$arm" "$OUT/${arm%_dft}/rewrite/train.jsonl" --loss dft
                ;;
            dart_dft) grid "$arm" "$WORLD/oracle.jsonl" --loss dft ;; # which DART's rewrites are here, letter by letter
            rasft)
                MODELS=()
                for lr in "${LRS[@]}"; do
                    rasft "rasft-$lr-$STEPS" 4 "$STEPS" "--lr $lr"
                    MODELS+=("rasft-$lr-$STEPS=$OUT/rasft-$lr-$STEPS/round-4/sft/model")
                done
                evaluate eval/rasft validation -- "${MODELS[@]}"
                ;;
            *) echo "ARMS: no arm is called $arm" && exit 1 ;;
        esac
    done
fi

# --- the tables ---
.venv/bin/python - "$OUT" <<'PY'
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
def read(path):
    return {p.parent.name: json.loads(p.read_text())["benchmarks"] for p in sorted(out.glob(f"{path}/*/summary.json"))}
lines, accepted = [], read("acceptance")
if accepted:
    lines += ["Acceptance of the world: accuracy in %, seed 100, 200 problems a suite, 4 samples each", ""]
    suites = list(next(iter(accepted.values())))
    lines += ["| run | " + " | ".join(suites) + " | average |", "|---" * (len(suites) + 2) + "|"]
    for name, told in accepted.items():
        values = [100 * told[suite]["avg@n"]["value"] for suite in suites]
        lines.append(f"| {name} | " + " | ".join(f"{v:.1f}" for v in [*values, sum(values) / len(values)]) + " |")
    told = json.loads((out / "prompted_dart/rewrite/metrics.jsonl").read_text().splitlines()[-1])
    names = ("correct", "gate", "clean", "no_reasoning", "false_arithmetic", "early_answer")
    shares = ", ".join(f"{name} {100 * told[f'candidate/{name}']:.1f}%" for name in names)
    likely = f"A(y) {told['candidate/align']:.2f}, A(y°) {told['expert_align']:.2f}"
    lines += ["", f"The untrained mapper's rewrites: {shares}; {likely}; a clean one for {100 * told['weight/mapper']:.1f}% of the rows"]
lines += ["", "Validation accuracy in %, seed 100", "", "| run | avg@4 |", "|---|---|"]
for name, told in read("eval/*").items():
    lines.append(f"| {name} | {100 * told['validation']['avg@n']['value']:.1f} |")
table = "\n".join(lines) + "\n"
(out.parent / "table.md").write_text(table)
print(table)
PY
