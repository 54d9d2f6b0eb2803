#!/usr/bin/env bash
# Self-training on synthetic scenes: a teacher is trained on boxes and on captions with boxes, labels captions without boxes, and
# a student is trained on all three. Ends with a table and an HTML report that compare the two.
#   scripts/self_training.sh            about 32 minutes on two CPU cores; all files are in runs/self_training
#   scripts/self_training.sh --short    the same with tens of scenes and 8 steps, to check that everything works
# The same command resumes an interrupted run. Ctrl-C is safe.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

folder=runs/self_training form="" threshold=0.3
scenes=(--count=8000 --captions=4000)
case "${1:-}" in
"") ;;
--short)
    # All scores are low after 8 steps: with a higher threshold no caption would be labelled.
    folder=runs/self_training-short form=_short threshold=0
    scenes=(--count=40 --captions=16 --validation=8)
    ;;
-h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
*)
    echo "self_training.sh: expected nothing or --short, found: $*" >&2
    exit 2
    ;;
esac

if [ $# -gt 1 ]; then
    echo "self_training.sh: expected nothing or --short, found: $*" >&2
    exit 2
fi

trap 'echo "stopped; the same command resumes from here" >&2; exit 130' INT
environment requirements.txt

job() {
    .venv/bin/python -m glip_jax "$@"
}
teacher=(--config="configs/self_training/teacher$form.py" --workdir="$folder/teacher")
student=(--config="configs/self_training/student$form.py" --workdir="$folder/student")

job scenes --out="$folder/scenes" "${scenes[@]}"
job data coco-captions "$folder/scenes/captions/annotations.json" --images="$folder/scenes/captions/images" \
    --out="$folder/scenes/shards/captions" --shards=8 --licence="as the scenes': gcs/sample/pictures/LICENSES.md"
job train "${teacher[@]}"
job evaluate "${teacher[@]}" --unless-done
# A low threshold, so that training can choose a higher one (data.sources.pseudo.threshold), and the table below shows both.
job label "$folder/scenes/shards/captions" --workdir="$folder/teacher" --out="$folder/pseudo" --threshold="$threshold"
.venv/bin/python -m benchmarks.pseudo_labels "$folder/pseudo" "$folder/scenes/captions/truth.json" \
    --names="$folder/scenes/validation_caption_names/annotations.json" --plot="$folder/pseudo/quality.png"
job train "${student[@]}"
job evaluate "${student[@]}" --unless-done
job compare "$folder/teacher" "$folder/student" --out="$folder" --steps "student${form/_/-}/teacher${form/_/-}"
