#!/usr/bin/env bash
# The paper's ablation on synthetic scenes: A (detection without fusion), B (A with fusion), C (B with grounding), T (C with captions
# that C labelled), each with every seed and the same number of training images. Ends with a table, a plot and an HTML report.
#   scripts/ablate.sh                      seeds 0, 1 and 2: about three hours on two CPU cores; all files are in runs/ablations
#   scripts/ablate.sh 0 1                  these seeds
#   scripts/ablate.sh --absence [SEED...]  a second table: what has been shown to pay since, each setting alone with the first seed, C and
#                                          D (what paid) with every seed: false alarms, AP at their rates, never-seen names, relations
#   scripts/ablate.sh --short              the second table of C and D with tens of scenes and 8 steps, to check that everything works
# The same command resumes an interrupted run, and adds further seeds. Ctrl-C is safe.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

folder=runs/ablations table=paper alone=() short=()
scenes=(--count=8000 --captions=4000)
case "${1:-}" in
-h | --help)
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
--absence)
    table=absence
    alone=(empty negatives presence presence_negatives light_fusion descriptions positions)
    shift
    ;;
--short)
    folder=runs/ablations-short table=absence
    scenes=(--count=40 --captions=0 --validation=8)
    short=(--config.train.steps=8 --config.train.batch-size=4 --config.checkpoint.every=8)
    # The configs name the scenes of the long form.
    for source in detection grounding; do
        short+=("--config.data.sources.$source.path=$folder/scenes/shards/$source")
    done
    for part in scenes style grounding_names caption_names unseen absent phrases; do
        set=$folder/scenes/validation_$part
        [ "$part" != scenes ] || set=$folder/scenes/validation
        short+=("--config.evaluation.sets.$part.annotations=$set/annotations.json" "--config.evaluation.sets.$part.images=$set/images")
    done
    shift
    if [ $# -gt 0 ]; then
        echo "ablate.sh: expected nothing behind --short, found: $*" >&2
        exit 2
    fi
    set -- 0
    ;;
esac
[ $# -gt 0 ] || set -- 0 1 2
for seed in "$@"; do
    if ! [[ $seed =~ ^[0-9]+$ ]]; then
        echo "ablate.sh: expected --absence, --short or seeds, such as 0 1 2, found: $*" >&2
        exit 2
    fi
done

trap 'echo "stopped; the same command resumes from here" >&2; exit 130' INT
environment requirements.txt

job() {
    .venv/bin/python -m glip_jax "$@"
}
# run NAME SEED [SETTING...]: trains and evaluates a run unless it is complete. Its sources are in the folder of the ablation.
run() {
    local name=$1 seed=$2
    local settings=(--config="configs/ablations/scenes_$name.py" --workdir="$folder/$name-$seed" --config.train.seed="$seed" "${short[@]}" "${@:3}")
    job train "${settings[@]}"
    job evaluate "${settings[@]}" --unless-done
}

job scenes --out="$folder/scenes" "${scenes[@]}"
runs=()
if [ "$table" = paper ]; then
    job data coco-captions "$folder/scenes/captions/annotations.json" --images="$folder/scenes/captions/images" \
        --out="$folder/scenes/shards/captions" --shards=8 --licence="as the scenes': gcs/sample/pictures/LICENSES.md"
    for seed in "$@"; do
        for letter in a b c; do
            run "$letter" "$seed"
        done
        # Each student has a teacher of the same seed. Labels with a threshold of 0.3; training uses those above 0.45.
        pseudo=$folder/pseudo-$seed
        job label "$folder/scenes/shards/captions" --workdir="$folder/c-$seed" --out="$pseudo" --threshold=0.3
        .venv/bin/python -m benchmarks.pseudo_labels "$pseudo" "$folder/scenes/captions/truth.json" \
            --names="$folder/scenes/validation_caption_names/annotations.json" --plot="$pseudo/quality.png"
        run t "$seed" --config.data.sources.pseudo.path="$pseudo"
        for letter in a b c t; do
            runs+=("$folder/$letter-$seed")
        done
    done
    everywhere=unseen/AP50,style/AP50,phrases/recall@1
    job compare "${runs[@]}" --out="$folder" --steps \
        "B/A=phrases/relational/recall@1,scenes/AP,scenes/AP50,$everywhere" \
        "C/B=grounding_names/AP50,scenes/AP50,$everywhere" \
        "T/C=caption_names/AP50,scenes/AP50,$everywhere"
else
    # again CONFIG RUN SEED OUT [SETTING...]: a network under other settings of inference.
    again() {
        job evaluate --config="configs/ablations/scenes_$1.py" --checkpoint="$folder/$2-$3" --config.train.seed="$3" "${short[@]}" \
            --out="$folder/$4-$3" --unless-done "${@:5}"
        runs+=("$folder/$4-$3")
    }
    for name in "${alone[@]}"; do
        run "$name" "$1"
        runs+=("$folder/$name-$1")
    done
    names=$(.venv/bin/python -c 'import json, sys; print(",".join(c["name"] for c in json.load(open(sys.argv[1]))["categories"]))' \
        "$folder/scenes/validation/annotations.json")
    for seed in "$@"; do
        for name in c absence; do
            run "$name" "$seed"
            runs+=("$folder/$name-$seed")
        done
        if [ ${#short[@]} = 0 ]; then # to check that it works, one network under other settings is enough
            again c c "$seed" competing --config.name="C competing" --config.detection.name-decay=2
            again phrase_mask absence "$seed" phrase_mask # D is trained so
        fi
        again absence absence "$seed" rivals --config.name="D with rivals" --config.detection.rivals="$names"
    done
    # Sinks belong to inference: C with them.
    .venv/bin/python -m benchmarks.sinks --checkpoint="$folder/c-$1" --set=absent --images=64 --seeds 0
    numbers=scenes/AP50,scenes/AP_at_0.01,scenes/AP_at_0.05,scenes/false_alarms,scenes/absent_found,scenes/present_found,scenes/alone/absent_found
    numbers+=,scenes/alone/present_found,style/AP50,caption_names/AP50,unseen/AP50,phrases/relational/recall@1
    job compare "${runs[@]}" --out="$folder/absence" --steps "D/C=$numbers" "D with rivals/C=$numbers"
fi
