r"""Captions that name things that are not in their image, as alternative texts of the web do, for measuring `label --verifier`.

    python -m benchmarks.absent_captions ANNOTATIONS.json --out=captions.json --present=2 --absent=2
    python -m glip_jax data coco-captions captions.json --images=IMAGES --out=shards/mixed
    python -m benchmarks.pseudo_labels LABELLED ANNOTATIONS.json --before=LABELLED_WITHOUT_VERIFIER

ANNOTATIONS is COCO's format. A caption lists names of the image in random order ("a kite, a snail and an owl"): `--present` of those
that have a box, and `--absent` of `known_absent` where the image lists them, otherwise of all that have no box there. Images with
fewer of either get as many as there are; those without a box get no caption.
The captions that are made hold no relations and no adjectives beyond the names' own.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["mixed_captions"]


def mixed_captions(annotations: Mapping[str, Any], present: int, absent: int, seed: int) -> dict[str, Any]:
    """COCO's captions JSON for the images of an annotation file: at most one caption each."""
    names = {item["id"]: item["name"] for item in annotations["categories"]}
    shown: defaultdict[Any, set[str]] = defaultdict(set)
    for box in annotations["annotations"]:
        shown[box["image_id"]].add(names[box["category_id"]])
    rng, notes = random.Random(seed), []
    for image in annotations["images"]:
        here = sorted(shown[image["id"]])
        missing = image.get("known_absent") or sorted({*names.values()} - shown[image["id"]])
        if not here:
            continue
        chosen = rng.sample(here, min(present, len(here))) + rng.sample(missing, min(absent, len(missing)))
        rng.shuffle(chosen)
        said = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in chosen]
        caption = " and ".join(filter(None, (", ".join(said[:-1]), said[-1])))
        notes.append({"id": len(notes) + 1, "image_id": image["id"], "caption": caption})
    return {"images": annotations["images"], "annotations": notes}


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("annotations", type=Path, help="COCO's annotations with boxes")
    parser.add_argument("--out", type=Path, required=True, help="captions to write")
    parser.add_argument("--present", type=int, default=2, help="names of a caption that the image shows")
    parser.add_argument("--absent", type=int, default=2, help="names of a caption that it does not show")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    made = mixed_captions(json.loads(given.annotations.read_text()), given.present, given.absent, given.seed)
    given.out.write_text(json.dumps(made))
    print(f"{given.out}: {len(made['annotations'])} captions, first: {made['annotations'][0]['caption']}")


if __name__ == "__main__":
    main()
