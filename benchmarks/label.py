"""Times labelling and bare inference of the same images: the cost of reading, phrase finding, box selection and writing.

300 JPEGs with one caption each; the demo's network with random parameters at its own size (256 pixels), because the overhead is most
visible with a fast network. There are more captions than the Detector caches, so every text is encoded again. Random parameters give
about fifty boxes per phrase; the threshold is set so that two of them are kept, as with a trained teacher.

* `label`: the job without its start: reads shards, records and JPEGs, finds phrases, selects boxes, writes pseudo shards, report
  and manifest.
* `bare`: the same Detector on the same images and prompts, decoded and prepared in advance, in the same batches, each waited for.

Throughput relative to bare inference is the inverse of the ratio. See `benchmarks/alternating.py`.

    python -m benchmarks.label --threads 2 --rounds 5
"""

import contextlib
import dataclasses
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alternating import Runs, Settings, main

CAPTIONS, BATCH, THRESHOLD = 300, 8, 0.05
WORDS = (
    "a red car",
    "two small dogs",
    "the old table",
    "a woman with a hat",
    "green bottles",
    "a cup of tea",
    "the tall tree",
)


def _captions() -> list[str]:
    """Distinct captions of three to five phrases."""
    rng = random.Random(0)
    return [f"{' near '.join(rng.sample(WORDS, rng.randint(3, 5)))} at number {i}" for i in range(CAPTIONS)]


def write_captions(folder: Path, files: int = 1, count: int = CAPTIONS) -> None:
    """Writes the shards `captions` in `folder`."""
    from benchmarks.data import pictures
    from glip_jax.data import shards
    from glip_jax.data.records import Record, boxes_array

    images = pictures()
    records = []
    for number, caption in enumerate(_captions()[:count]):
        data = images[number % len(images)]
        # Identical images would share their features; bytes after the end of a JPEG do not change the image.
        data += number.to_bytes(4, "little")
        height, width = ((480, 640), (480, 640), (640, 480))[number % len(images) % 3]
        records.append(Record(str(number), "caption", data, height, width, boxes_array(()), caption=caption))
    shards.write(iter(records), folder / "captions", name="captions", shards=files)


def teacher_and_finder() -> tuple[Any, Any]:
    """The demo's network with random parameters, and a finder."""
    import jax

    from benchmarks.sample import abstract_params
    from configs.demo import get_config
    from glip_jax.labeling.phrases.finders import phrase_finder
    from glip_jax.labeling.teacher import DetectorTeacher, detector_views

    config = get_config()
    init, _ = abstract_params(config)
    params = jax.block_until_ready(jax.jit(init)(jax.random.key(0)))
    views = detector_views(config, params, THRESHOLD, config.detection.nms_iou, False, (), BATCH)
    return DetectorTeacher(views, config.detection.nms_iou, THRESHOLD), phrase_finder("lexicon")


def threshold_of(source: Any, teacher: Any, finder: Any) -> float:
    """The score that leaves two boxes of a phrase, by the first image."""
    from glip_jax.data.records import decode_image
    from glip_jax.labeling.teacher import ImageQueries

    record = source[0]
    query = teacher.make_query(record.id, record.caption, finder.find(record.caption).spans)
    ((answer,),) = teacher.detect_async([ImageQueries(decode_image(record), [query])])()
    return float(np.median([np.sort(found.scores)[-3] for found in answer.detections]))


def _setting(folder: Path) -> tuple[Any, Any, Any]:
    """Shards of captions, a teacher and a finder."""
    from glip_jax.data import shards

    write_captions(folder)
    return shards.Shards(folder / "captions"), *teacher_and_finder()


def label_runs(_: Settings) -> Runs:
    """Labels into a new folder in each run."""
    from glip_jax.labeling.pseudo import Rules
    from glip_jax.labeling.run import Input, LabelingJob, run

    folder = Path(tempfile.mkdtemp(prefix="glip_jax_label_"))
    source, teacher, finder = _setting(folder)
    threshold = threshold_of(source, teacher, finder)
    plan = LabelingJob(
        out=str(folder), name="made", inputs=[Input(str(source.path), source)], teacher=teacher, finder=finder,
        rules=Rules(threshold), about={"teacher": "random"}, command="", code="benchmark", threads=4,
    )  # fmt: skip

    def once() -> None:
        # The two processes communicate over stdout.
        with tempfile.TemporaryDirectory(dir=folder) as out, contextlib.redirect_stdout(sys.stderr):
            run(dataclasses.replace(plan, out=f"{out}/made"))

    return {"demo": once}


def bare_runs(_: Settings) -> Runs:
    """Detects with images and prompts that are prepared in advance."""
    from glip_jax.data.records import decode_image
    from glip_jax.inference import bucket

    with tempfile.TemporaryDirectory() as name:
        source, teacher, finder = _setting(Path(name))
        detector = teacher.views[0].detector
        groups: dict[Any, list[tuple[Any, Any]]] = {}
        for index in range(len(source)):
            record = source[index]
            query = teacher.make_query(record.id, record.caption, finder.find(record.caption).spans)
            canvas = bucket(record.height, record.width, detector.config)[1]
            groups.setdefault(canvas, []).append((decode_image(record), query.plan.prompts))

    def once() -> None:
        for group in groups.values():
            for begin in range(0, len(group), BATCH):
                images, prompts = zip(*group[begin : begin + BATCH])
                detector.captions(images, prompts)

    return {"demo": once}


if __name__ == "__main__":
    main("benchmarks.label", __doc__ or "", {"label": label_runs, "bare": bare_runs}, ("demo",))
