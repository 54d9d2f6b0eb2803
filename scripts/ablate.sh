#!/usr/bin/env bash
# The paper's ablation on synthetic scenes: A (detection without fusion), B (A with fusion), C (B with grounding), T (C with captions
# that C labelled), each with every seed and the same number of training images. Ends with a table, a plot and an HTML report.
#   scripts/ablate.sh              seeds 0, 1 and 2: about three hours on two CPU cores; all files are in runs/ablations
#   scripts/ablate.sh 0 1          these seeds
# The same command resumes an interrupted run, and adds further seeds. Ctrl-C is safe.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

case "${1:-}" in
-h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
[ $# -gt 0 ] || set -- 0 1 2
for seed in "$@"; do
    if ! [[ $seed =~ ^[0-9]+$ ]]; then
        echo "ablate.sh: expected seeds, such as 0 1 2, found: $*" >&2
        exit 2
    fi
done

trap 'echo "stopped; the same command resumes from here" >&2; exit 130' INT
environment requirements.txt

folder=runs/ablations
job() {
    .venv/bin/python -m glip_jax "$@"
}
# run LETTER SEED [SETTING...]: trains and evaluates a run unless it is complete.
run() {
    local letter=$1 seed=$2
    local settings=(--config="configs/ablations/scenes_$letter.py" --workdir="$folder/$letter-$seed" --config.train.seed="$seed" "${@:3}")
    job train "${settings[@]}"
    job evaluate "${settings[@]}" --unless-done
}

job scenes --out="$folder/scenes" --count=8000 --captions=4000
job data coco-captions "$folder/scenes/captions/annotations.json" --images="$folder/scenes/captions/images" \
    --out="$folder/scenes/shards/captions" --shards=8 --licence="as the scenes': gcs/sample/pictures/LICENSES.md"
runs=()
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
