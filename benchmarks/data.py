"""Times JPEG to training batch at 800 x 1333: the mixture and a PyTorch DataLoader with the preprocessing of the original.

200 JPEGs of COCO's sizes (generated, or photographs in GLIP_JAX_PHOTOGRAPHS=DIR), batches of 8 at the largest scale, all on the
given number of cores:

* `glip_jax`: `Mixture.batches` of a detection source: record, decode, resize, flip, caption, tokens, one uint8 batch.
  Normalisation is part of the step, on the device.
* `bare codec`: only decode and resize with the fastest maintained codec, in threads: no boxes, no text, no batch. Each image in a
  new array, or `in place`, into the same memory.
* `torch DataLoader`: PIL decode, bilinear resize, flip, normalise in float32, pad, as the original; one worker per core.

Seconds are per 100 batches, including the start. See `benchmarks/alternating.py`.

    python -m benchmarks.data --threads 1 2 --rounds 5
"""

import io
import itertools
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.alternating import Runs, Settings, main

SHORT, LONG, BATCH, BATCHES, IMAGES, RECORDS = 800, 1333, 8, 100, 200, 1600
MEAN, STD = np.array([103.53, 116.28, 123.675], np.float32), np.array([57.375, 57.12, 58.395], np.float32)


def pictures() -> list[bytes]:
    """JPEG files: photographs, or generated ones of 480 x 640 and 640 x 480 pixels with noise, 155 kB each (COCO: 163 kB)."""
    folder = os.environ.get("GLIP_JAX_PHOTOGRAPHS")
    if folder:
        files = sorted(Path(folder).glob("*.jpg"))
        if not files:
            raise SystemExit(f"GLIP_JAX_PHOTOGRAPHS={folder} has no .jpg files")
        return [file.read_bytes() for file in itertools.islice(itertools.cycle(files), IMAGES)]
    from glip_jax.data.scenes.backgrounds import background

    made = []
    for number in range(IMAGES):
        height, width = ((480, 640), (480, 640), (640, 480))[number % 3]
        rng = np.random.default_rng(number)
        pixels = background(rng, height, width) + rng.normal(0, 14, (height, width, 3))
        stream = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        made.append(stream.getvalue())
    return made


def _size(height: int, width: int) -> tuple[int, int]:
    from glip_jax.structures.canvas import target_size

    return target_size(height, width, SHORT, LONG)


def glip_runs(settings: Settings) -> Runs:
    """The mixture with one source."""
    from configs.demo import get_config
    from glip_jax.config import CaptionConfig, DataConfig, SourceConfig, TrainConfig
    from glip_jax.data import shards
    from glip_jax.data.mixture import Mixture
    from glip_jax.data.records import Record

    base = get_config()
    names = tuple(f"thing {number}" for number in range(80))
    folder = Path(tempfile.mkdtemp()) / "shards"
    rng = np.random.default_rng(0)

    def record(number: int, image: bytes) -> Record:
        with Image.open(io.BytesIO(image)) as opened:
            width, height = opened.size
        corner = rng.uniform(0, 0.5, (7, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.45, (7, 2))], 1) * [width, height, width, height]
        labels = tuple(rng.integers(0, 80, 7).tolist())
        return Record(str(number), "detection", image, height, width, boxes.astype(np.float32), labels)

    # Grain's shuffle is slow only for a few hundred records.
    files = itertools.islice(itertools.cycle(pictures()), RECORDS)
    shards.write((record(*pair) for pair in enumerate(files)), folder, name="benchmark", names=names)
    config = base.__class__(
        name="benchmark",
        model=base.model,
        data=DataConfig(
            sources={"photographs": SourceConfig(str(folder))},
            captions=CaptionConfig(max_negatives=20),
            short_sides=(SHORT,),
            long_side=LONG,
            threads=settings.threads,
            prefetch=2,
        ),
        train=TrainConfig(batch_size=BATCH),
    )
    mixture, step = Mixture(config), 0

    def run() -> None:
        # A new stream per run: prefetching between runs would cost this side nothing, and slow down the others.
        nonlocal step
        batches = mixture.batches(step)
        step += BATCHES
        for _ in range(BATCHES):
            next(batches)
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]

    return {"batches": run}


def codec_runs(settings: Settings, reuse: bool = False) -> Runs:
    """Only libjpeg-turbo and OpenCV's resize; with `reuse` into existing memory."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    files = itertools.cycle(pictures())
    memory = threading.local()

    def one(file: bytes) -> Any:
        image: Any = simplejpeg.decode_jpeg(file, "RGB")
        height, width = _size(*image.shape[:2])
        if not reuse:
            return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        if not hasattr(memory, "canvas"):
            memory.canvas = np.zeros((LONG + 1, LONG + 1, 3), np.uint8)
        target = memory.canvas[:height, :width]
        return cv2.resize(image, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)

    pool = ThreadPoolExecutor(settings.threads)

    def run() -> None:
        for _ in range(BATCHES):
            list(pool.map(one, itertools.islice(files, BATCH)))

    return {"batches": run}


def codec_alone_runs(settings: Settings) -> Runs:
    """The same, without a new array per image."""
    return codec_runs(settings, reuse=True)


def torch_runs(settings: Settings) -> Runs:
    """The preprocessing of the original's loader, collated and padded to a multiple of 32."""
    import torch

    files = pictures()

    class Photographs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> torch.Tensor:
            with Image.open(io.BytesIO(files[index % len(files)])) as opened:
                image = opened.convert("RGB")
            height, width = _size(image.height, image.width)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            if index % 2:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
            tensor = tensor[[2, 1, 0]] * 255
            return (tensor - torch.from_numpy(MEAN)[:, None, None]) / torch.from_numpy(STD)[:, None, None]

    def collate(images: list[torch.Tensor]) -> torch.Tensor:
        height, width = (-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (1, 2))
        batch = torch.zeros(len(images), 3, height, width)
        for place, image in zip(batch, images):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
        return batch

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(Photographs(), BATCH, num_workers=settings.threads, collate_fn=collate)

    def run() -> None:
        batches = iter(loader)
        for _ in range(BATCHES):
            next(batches)
        del batches  # ends its workers

    return {"batches": run}


if __name__ == "__main__":
    sides = {
        "glip_jax": glip_runs,
        "bare codec": codec_runs,
        "bare codec, in place": codec_alone_runs,
        "torch DataLoader": torch_runs,
    }
    main("benchmarks.data", __doc__ or "", sides, ("batches",))
