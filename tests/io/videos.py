"""Videos for tests, made with PyAV itself: gray frames whose brightness is their number, with a red corner at the top left."""

from typing import Any

import numpy as np

STEP = 10


def write_video(path, frames=12, size=(64, 96), rate=4, codec="mpeg4", sound=False):
    """`size`: height and width; with `sound` a file of sound alone."""
    import av

    with av.open(str(path), "w") as out:
        if sound:
            stream: Any = out.add_stream("aac", rate=8000, layout="mono")
            sample = av.AudioFrame.from_ndarray(np.zeros((1, 8192), np.float32), format="fltp", layout="mono")
            sample.sample_rate = 8000
            out.mux([*stream.encode(sample), *stream.encode()])
            return path
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        out.start_encoding()  # without frames too
        for number in range(frames):
            pixels = np.full((*size, 3), STEP * number, np.uint8)
            pixels[: size[0] // 2, : size[1] // 2] = (255, 0, 0)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path
