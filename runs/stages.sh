# What runs/toy.sh, runs/tune.sh and the recipes share: how a stage is run, and the methods as stages; sourced by them.
# MACHINE is NODESxPROCESSES; where it is not set, one process a GPU of this machine, or two on a CPU, one thread each:
# generation is bound by Python, so processes beat threads there. A stage is a script's run under torchrun. A stage that is
# finished is skipped when it is asked for again, unless its command or the defaults in its script's Config have changed,
# which ends the run (other edits are not noticed). With two or more nodes, start the same script on all of them at the
# same time, with OUT and data/ on a disk that all see, and HOST and NODE_RANK set.
cd "$(dirname "$0")/.."
bash runs/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that spin at barriers crawl where cores are shared
GPUS=$(nvidia-smi -L 2>/dev/null | wc -l) || GPUS=0
if [ "$GPUS" = 0 ]; then MACHINE="${MACHINE:-1x2}"; else MACHINE="${MACHINE:-1x$GPUS}"; fi
if ! [[ "$MACHINE" =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]]; then
    echo "MACHINE must be NODESxPROCESSES, as in 1x8, got $MACHINE" && exit 2
fi
NODES="${MACHINE%x*}" PROCESSES="${MACHINE#*x}" PORT="${PORT:-29500}"
LAUNCH=(--standalone --nproc-per-node="$PROCESSES")
if [ "$NODES" -gt 1 ]; then
    if [ -z "${PLAN:-}" ]; then
        : "${HOST:?with several nodes, set HOST to the first one, by the name that all of them know}"
        : "${NODE_RANK:?with several nodes, set NODE_RANK to 0 on HOST, to 1 on the next one, ...}"
    fi
    LAUNCH=(--nnodes="$NODES" --node-rank="${NODE_RANK:-R}" --nproc-per-node="$PROCESSES" --rdzv-backend=c10d)
fi

# stage NAME SCRIPT FLAGS...: runs it with --output_dir OUT/NAME once; the first node keeps its wall-clock seconds.
stage() {
    local folder="$OUT/$1" started=$SECONDS made_by launch=("${LAUNCH[@]}")
    shift
    # a port a stage: that of the stage before may still have its last listener
    if [ "$NODES" -gt 1 ]; then launch+=(--rdzv-endpoint="${HOST:-HOST}:$((PORT++))"); fi
    if [ -n "${PLANNING:-}" ]; then
        echo "torchrun ${launch[*]}$(printf ' %q' "$@" --output_dir "$folder")" && return
    fi
    made_by="$*"$'\n'"$(sed -n '/^class Config/,/^    def /s/^    \([a-z_0-9]*: [^#]*\).*/\1/p' "$1")"
    if [ -f "$folder/seconds" ]; then
        [ "$(cat "$folder/made_by")" = "$made_by" ] && return
        echo "$folder was made with other flags, or other defaults in $1:"
        diff "$folder/made_by" - <<<"$made_by" || true
        echo "choose another OUT, or remove the folder and what was made from it" && exit 1
    fi
    echo "--- $folder"
    .venv/bin/torchrun "${launch[@]}" "$@" --output_dir "$folder"
    if [ "${NODE_RANK:-0}" = 0 ]; then
        echo "$made_by" >"$folder/made_by"
        echo $((SECONDS - started)) >"$folder/seconds"
    fi
}
# data FILE FLAGS...: makes a data set that is not there, named as runs/prepare.py names it; other nodes wait for it.
data() {
    if [ -n "${PLANNING:-}" ]; then return; fi
    if [ "${NODE_RANK:-0}" = 0 ] && [ ! -f "$1" ]; then
        .venv/bin/python runs/prepare.py "$(basename "$1" .jsonl)" --out "$1" "${@:2}"
    fi
    if [ ! -f "$1" ]; then echo "waiting for $1, which the first node makes"; fi
    until [ -f "$1" ]; do sleep 5; done
}
# rows FILE: number of rows of a data set that is there, else ROWS. Ask after `data`: a second start must count the same.
rows() { if [ -f "$1" ]; then wc -l <"$1"; else echo "$ROWS"; fi; }
# recipe FUNCTION: goes through it twice. First every stage's command line is sent to runs/plan.py, which ends the run if
# a stage does not fit the GPUs (PLAN_GIB: GiB of one that is not here; without either, this machine's memory); then,
# unless PLAN is set, the stages are run.
recipe() {
    PLANNING=1 "$1" | .venv/bin/python runs/plan.py --gpus "$PROCESSES" --nodes "$NODES" --rows "$ROWS" \
        ${PLAN_GIB:+--gpu_gib "$PLAN_GIB"} "${PLAN_FLAGS[@]}"
    if [ -n "${PLAN:-}" ]; then exit; fi
    "$1"
    if [ "${NODE_RANK:-0}" = 0 ]; then .venv/bin/python runs/report.py "$OUT"; fi
}

# world SEED: the toy world out/world/seedSEED, made by two processes of any machine's CPU; another version is refused.
world() {
    (
        export CUDA_VISIBLE_DEVICES=
        OUT=out/world NODES=1 LAUNCH=(--standalone --nproc-per-node=2)
        stage "seed$1" runs/toy_world.py --seed "$1"
    )
}

# --- the methods, as stages. BASE: the target; DEMOS: the demonstrations; REWRITE, SFT: flags of all rewriting, tuning ---
# rewrite ARM METHOD FLAGS...: a training set made of the demonstrations.
rewrite() {
    stage "$1/rewrite" rewrite.py --method "$2" --target "$BASE" --data "$DEMOS" "${REWRITE[@]}" "${@:3}"
}
# sft ARM DATA FLAGS...: fine-tunes the target on a training set.
sft() { stage "$1/sft" sft.py --model "$BASE" --data "$2" "${SFT[@]}" "${@:3}"; }
# rasft ARM ROUNDS STEPS "FLAGS OF TUNING" FLAGS OF REWRITING...: rounds of rollouts with the current model and an equal
# share of the steps, along one schedule, with one optimizer. The model is ARM/round-ROUNDS/sft/model.
rasft() {
    local round folder model="$BASE" before=()
    for ((round = 1; round <= $2; round++)); do
        folder="$1/round-$round"
        rewrite "$folder" rasft --mapper "$model" --seed $((1000 * round + ${SEED:-0})) "${@:5}"
        sft "$folder" "$OUT/$folder/rewrite/train.jsonl" --loss rasft --steps $(($3 / $2)) --schedule_steps "$3" $4 \
            "${before[@]}"
        model="$OUT/$folder/sft/model" before=(--start_from "$OUT/$folder/sft")
    done
}
