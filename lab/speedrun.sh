#!/bin/sh
# From an empty folder to a student: records clips, trains autoencoders, teacher and student, evaluates the student.
#
#     lab/speedrun.sh                                       the shipped size: clips of the simulator (`make simulator`)
#     SIZE=tiny lab/speedrun.sh                             a smaller model, a quarter of the steps
#     DATA=data/train HELDOUT=data/heldout lab/speedrun.sh  clips that are recorded already
#     STEPS=1 SIZE=tiny lab/speedrun.sh                     one step of each stage, to test the script
#
# The numbers of each stage are in holdover_world.training.recipes. Results are under OUT; an interrupted run continues.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} SIZE=${SIZE:-small} STEPS=${STEPS:-}
OUT=${OUT:-runs/$SIZE}

world() {
    echo "holdover world $*"
    "$PYTHON" -m holdover world "$@"
}

record() { # FOLDER CLIPS SEED
    for scenario in urban highway uturn straight; do
        world record --scenario "$scenario" --out "$1" --clips "$2" --seed "$3"
    done
}

autoencoder() { # NAME OPTIONS...
    folder=$1 && shift
    world train-autoencoder --size "$SIZE" --data "$DATA" --heldout "$HELDOUT" --out "$OUT/$folder" "$@" \
        ${STEPS:+--steps "$STEPS"}
}

train() { # NAME OPTIONS...
    name=$1 && shift
    world train --recipe "$name" --size "$SIZE" --data "$DATA" --heldout "$HELDOUT" --out "$OUT/$name" "$@" \
        ${STEPS:+--steps "$STEPS"}
}

if [ -z "${DATA:-}" ]; then
    DATA=$OUT/clips HELDOUT=$OUT/heldout
    case $SIZE in tiny) clips=8 heldout=1 ;; *) clips=90 heldout=6 ;; esac
    record "$DATA" "$clips" 0
    record "$HELDOUT" "$heldout" 900000
fi
HELDOUT=${HELDOUT:-$DATA}

autoencoder autoencoders --modality depth
autoencoder first --modality colour
autoencoder autoencoders --modality colour --start-from "$OUT/first/colour"
train teacher --autoencoders "$OUT/autoencoders"
train long --start-from "$OUT/teacher"
world mix "$OUT/teacher" "$OUT/long" --out "$OUT/mixed"
train student --teacher "$OUT/mixed"
train roads --start-from "$OUT/student"
train agree --teacher "$OUT/roads"
world eval --model "$OUT/agree" --clips "$HELDOUT" --data "$DATA" --out "$OUT" \
    ${STEPS:+--per-scenario 1 --chunks 12 --reader-steps "$STEPS"}
