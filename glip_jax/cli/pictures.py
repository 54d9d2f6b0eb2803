"""The images that `predict` detects in: files, folders and frames of videos, measured, read, and left out with a reason."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8

from glip_jax import UserError
from glip_jax.cli.command_line import CommandLineError
from glip_jax.config import Config
from glip_jax.io.image_files import ImageFileError, listed, measured, read_upright
from glip_jax.io.video_files import Video, is_video

__all__ = ["Picture", "PredictError", "ReadPicture", "file_stamp", "find_pictures", "leave_out", "read_picture"]

logger = logging.getLogger(__name__)


class PredictError(UserError, ValueError):
    """An image, a folder or a setting that prediction cannot work with."""


class Picture(NamedTuple):
    """An image file whose header was read, or a frame of a video."""

    path: epath.Path
    height: int
    width: int
    exif_rotated: bool
    """Its EXIF orientation rotates or mirrors the stored pixels; height and width are those after that."""
    alone: bool
    """It was named itself, not by a folder."""
    drawn: str
    """Name of the file with its detections drawn."""
    video: Video | None = None
    frame: int = 0
    """Number of the frame in the video, from 0."""


class ReadPicture(NamedTuple):
    """An image file that was decoded."""

    stamp: list[int]
    pixels: UInt8[np.ndarray, "H W 3"]
    notes: tuple[str, ...]
    seconds: float = 0.0
    """Of a frame: its time in the video."""


def read_picture(picture: Picture) -> ReadPicture | ImageFileError:
    """The image, or why it is left out. Raises ImageFileError for one that was named itself."""
    try:
        stamp = file_stamp(picture.path)
        if picture.video is None:
            return ReadPicture(stamp, *read_upright(picture.path))
        frame = picture.video.frame(picture.frame)
        if frame.pixels.shape[:2] != (picture.height, picture.width):
            found = " x ".join(map(str, frame.pixels.shape[1::-1]))
            return ImageFileError(
                f"has {found} pixels in frame {picture.frame}, {picture.width} x {picture.height} in the first"
            )
        return ReadPicture(stamp, frame.pixels, (), round(frame.seconds, 3))
    except (ImageFileError, FileNotFoundError) as error:
        if picture.alone:
            raise
        return ImageFileError(str(error))


def file_stamp(path: epath.Path) -> list[int]:
    """Size and time of a file, which tell whether it has changed."""
    found = path.stat()
    return [int(found.length), int(found.mtime)]


def find_pictures(
    given: Sequence[str], config: Config, log: bool, every: int = 0
) -> tuple[list[Picture], list[dict[str, str]]]:
    """The images of files and folders, their sizes read from their headers, and those of folders that are left out, which `log` names.

    Files that are named themselves are decoded here; of a video the first frame is. `every`: of videos every n-th frame is taken, 0: one a
    second. Raises ImageFileError or PredictError for those that cannot be used, and if no image is left; CommandLineError for `every`
    without a video.
    """
    paths: list[tuple[epath.Path, bool]] = []
    for name in given:
        images, skipped = listed(epath.Path(name))
        if skipped and log:
            logger.info(f"{name}: images {len(images)}, files with other endings skipped {skipped}")
        paths += [(path, len(images) == 1 and str(path) == name) for path in images]
    if every and not any(is_video(path) for path, _ in paths):
        raise CommandLineError(f"--every={every} has no meaning without a video: leave it out")
    pictures, taken = list[Picture](), set[str]()
    left_out: list[dict[str, str]] = []
    refused: list[UserError] = []
    for path, alone in paths:
        try:
            if is_video(path):
                pictures += _frames(path, config, every, taken, log)
                continue
            if alone and len(paths) > 1:
                read_upright(path)
            height, width, exif_rotated = measured(path)
            _check_shape(path, height, width, config)
        except (ImageFileError, PredictError) as error:
            if alone:
                refused.append(error)
            else:
                leave_out(left_out, path, error, log)
            continue
        pictures.append(Picture(path, height, width, exif_rotated, alone, _free_name(path.stem, taken)))
    if len(refused) > 1:
        raise PredictError(f"{len(refused)} of the images cannot be used: {'; '.join(map(str, refused))}")
    if refused:
        raise refused[0]
    if not pictures:
        raise PredictError(f"none of the {len(paths)} images can be used; the first: {' '.join(left_out[0].values())}")
    return pictures, left_out


def _frames(path: epath.Path, config: Config, every: int, taken: set[str], log: bool) -> list[Picture]:
    """The frames of a video that are detected in."""
    video = Video(path)
    _check_shape(path, video.height, video.width, config)
    every = every or max(1, round(video.rate))
    frames = [
        Picture(
            path, video.height, video.width, False, False, _free_name(f"{path.stem}_{frame:06d}", taken), video, frame
        )
        for frame in range(0, video.count, every)
    ]
    if log:
        logger.info(
            f"{path}: {video.count} frames, {video.rate:g} a second; one of {every} is taken, images {len(frames)}"
        )
    return frames


def _free_name(stem: str, taken: set[str]) -> str:
    """A name for a drawn image that no other has, whatever the case of its letters; added to `taken`."""
    names = (f"{stem}{f'_{number}' if number else ''}.png" for number in range(len(taken) + 1))
    drawn = next(name for name in names if name.casefold() not in taken)
    taken.add(drawn.casefold())
    return drawn


def _check_shape(path: epath.Path, height: int, width: int, config: Config) -> None:
    """PredictError for an image that is too long and narrow."""
    from glip_jax.inference import bucket

    longest = max(bucket(height, width, config)[1])
    if longest > 2 * config.evaluation.long_side:
        raise PredictError(
            f"{path} has {width} x {height} pixels: too long and narrow, it would be resized to a side of "
            f"{longest} pixels where evaluation.long_side is {config.evaluation.long_side}; cut it into pieces"
        )


def leave_out(left_out: list[dict[str, str]], path: epath.Path, error: UserError, log: bool = True) -> None:
    """Names an image that is not used, and adds it to `left_out`."""
    reason = str(error).removeprefix(f"{path} ")
    left_out.append({"file": str(path), "reason": reason})
    if log:
        logger.warning(f"left out: {path} {reason}")
