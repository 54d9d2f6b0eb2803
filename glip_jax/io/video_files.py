"""Frames of video files, by PyAV (requirements-video.txt), as RGB pixels of upright images."""

import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8

from glip_jax.io.image_files import PIXEL_LIMIT, ImageFileError

__all__ = ["ENDINGS", "Frame", "Video", "is_video"]

ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
"""Endings of files that are read as videos."""


def is_video(path: epath.Path) -> bool:
    """Whether a file is read as a video, by its ending."""
    return path.suffix.lower() in ENDINGS


class Frame(NamedTuple):
    """A decoded frame."""

    pixels: UInt8[np.ndarray, "H W 3"]
    """RGB, turned as the file says that it is shown."""
    seconds: float
    """Its time from the begin of the video's clock."""


class Video:
    """A video file, whose frames several threads may ask for, each once, in roughly ascending order.

    Frames are decoded one after the other from the begin, so their numbers are exact whatever the file says of their times. A frame
    before those that were decoded makes it begin again.
    """

    def __init__(self, path: epath.Path) -> None:
        """Counts the frames and decodes the first. Raises ImageFileError: no PyAV, no video, no frames, too large."""
        if find_spec("av") is None:
            raise ImageFileError(
                "is a video, which needs PyAV, not installed here: pip install -r requirements-video.txt", path
            )
        self.path = path
        self._lock, self._asked, self._passed = threading.Lock(), set[int](), dict[int, Frame | ImageFileError]()
        self._decoded: Iterator[Any] = iter(())
        self._next = 0
        """Number of the frame that is decoded next."""
        with self._opened() as container:
            stream = self._stream(container)
            # Packets hold one frame each; the last one is empty.
            self.count = sum(1 for packet in container.demux(stream) if packet.size)
            self.rate = float(stream.average_rate or stream.base_rate or 0)
        if not self.count:
            raise ImageFileError("has no frames: expected a video with at least one", path)
        first = self.frame(0)
        self.height, self.width = first.pixels.shape[:2]
        self._passed[0] = first

    def frame(self, number: int) -> Frame:
        """The frame of a number from 0. Raises ImageFileError if it cannot be decoded."""
        self._asked.add(number)
        with self._lock:
            if number not in self._passed:
                self._decode_to(number)
            self._asked.discard(number)
            found = self._passed.pop(number)
        if isinstance(found, ImageFileError):
            raise found
        return found

    def _decode_to(self, number: int) -> None:
        """Decodes up to a frame, and keeps those before it that another thread waits for."""
        if not self._next or number < self._next:
            self._decoded, self._next = self._frames(), 0
        while self._next <= number:
            try:
                frame = next(self._decoded, None)
            except ImageFileError as error:
                self._passed[number] = error
                return
            if frame is None:
                reason = f"ends after {self._next} frames of {self.count}, before frame {number}"
                self._passed[number] = ImageFileError(reason, self.path)
                return
            if self._next == number or self._next in self._asked:
                self._passed[self._next] = self._converted(frame)
            self._next += 1

    def _frames(self) -> Iterator[Any]:
        import av  # pyright: ignore[reportMissingImports]

        with self._opened() as container:
            stream = self._stream(container)
            stream.thread_type = "AUTO"
            try:
                yield from container.decode(stream)
            except av.FFmpegError:
                raise ImageFileError(
                    f"cannot be decoded after {self._next} frames of {self.count}: its data are damaged", self.path
                ) from None

    def _opened(self) -> Any:
        import av  # pyright: ignore[reportMissingImports]

        av.logging.set_level(None)  # what libraries print names no file
        if not self.path.exists():
            raise ImageFileError("does not exist: expected a video", self.path)
        try:
            return av.open(self.path.open("rb") if "://" in str(self.path) else str(self.path))
        except av.FFmpegError:
            raise ImageFileError(
                "is no video that can be read: expected a file that FFmpeg decodes", self.path
            ) from None

    def _stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise ImageFileError("has no pictures: expected a video, not sound alone", self.path)
        return container.streams.video[0]

    def _converted(self, frame: Any) -> Frame:
        if frame.width * frame.height > PIXEL_LIMIT:
            raise ImageFileError(
                f"is huge: {frame.width} x {frame.height} pixels, at most {PIXEL_LIMIT:,} are read", self.path
            )
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        return Frame(np.ascontiguousarray(pixels), float(frame.time or 0.0))
