"""Frames of videos by number, for several threads; and what is no video."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from etils import epath

from glip_jax.io import video_files
from glip_jax.io.image_files import ImageFileError
from glip_jax.io.video_files import Video
from tests.io.videos import STEP, write_video

needs_av = pytest.mark.skipif(
    importlib.util.find_spec("av") is None, reason="PyAV is not installed: pip install -r requirements-video.txt"
)


def number_of(frame):
    """The number of a frame by its brightness."""
    assert abs(frame.pixels[4, 4].astype(int) - (255, 0, 0)).max() < 30, "upright, and red is red"
    return round(frame.pixels[48:, 64:].mean() / STEP)


@needs_av
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mkv", "mpeg2video"), ("a.webm", "libvpx")])
def test_a_frame_has_its_number_and_time(tmp_path, name, codec):
    video = Video(epath.Path(write_video(tmp_path / name, rate=25 if codec == "mpeg2video" else 4, codec=codec)))
    assert (video.count, video.height, video.width) == (12, 64, 96)
    for number in (0, 3, 9, 5):  # back again too
        frame = video.frame(number)
        assert (number_of(frame), frame.seconds) == (number, pytest.approx(number / video.rate, abs=0.002))


@needs_av
def test_threads_ask_in_any_order(tmp_path, monkeypatch):
    """A frame that is passed while another thread waits for it is kept: the video is decoded once."""
    video, begun = Video(epath.Path(write_video(tmp_path / "a.mp4"))), []
    frames = Video._frames
    monkeypatch.setattr(Video, "_frames", lambda self: begun.append(self) or frames(self))
    video._asked.add(2)  # another thread, which waits
    assert [number_of(video.frame(number)) for number in (11, 2)] == [11, 2]
    assert not begun and not video._asked and set(video._passed) == {0}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(video.frame, (1, 0, 3, 2, 7, 5, 11)))
    assert [number_of(frame) for frame in found] == [1, 0, 3, 2, 7, 5, 11] and not video._asked


@needs_av
def test_a_turned_video_is_upright(tmp_path):
    """As phones write it: the pixels lie, and a matrix says how they are shown."""
    import av  # pyright: ignore[reportMissingImports]

    write_video(tmp_path / "plain.mp4")
    data = (tmp_path / "plain.mp4").read_bytes()
    one, place = (1 << 16).to_bytes(4, "big"), data.index(b"tkhd") + 4 + 40
    minus = (-(1 << 16)).to_bytes(4, "big", signed=True)
    # Columns of the matrix: x' = -y, y' = x, a quarter turn clockwise.
    turned = bytes(4) + one + bytes(4) + minus + bytes(8) + bytes(8) + (1 << 30).to_bytes(4, "big")
    (tmp_path / "turned.mp4").write_bytes(data[:place] + turned + data[place + 36 :])
    with av.open(str(tmp_path / "turned.mp4")) as container:
        assert abs(next(container.decode(video=0)).rotation) == 90
    plain, found = (Video(epath.Path(tmp_path / f"{name}.mp4")).frame(3).pixels for name in ("plain", "turned"))
    np.testing.assert_array_equal(found, np.rot90(plain, -1))


@needs_av
@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("bad.mp4", lambda path: path.write_bytes(b"text"), "is no video that can be read"),
        ("bad.mp4", lambda path: path.write_bytes(b""), "is no video that can be read"),
        ("bad.mp4", lambda path: path, "does not exist: expected a video"),
        ("bad.mp4", lambda path: write_video(path, sound=True), "has no pictures: expected a video, not sound alone"),
        ("bad.avi", lambda path: write_video(path, frames=0), "has no frames: expected a video with at least one"),
    ],
    ids=["text", "empty", "missing", "sound", "no frames"],
)
def test_what_is_no_video_is_said(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ImageFileError, match=f"{name} {message}"):
        Video(epath.Path(tmp_path / name))


@needs_av
def test_a_video_that_is_cut_names_the_frames_that_are_lost(tmp_path):
    path = write_video(tmp_path / "a.mkv", frames=20, codec="mpeg4")
    video = Video(epath.Path(path))
    video.count += 5  # packets that hold no frame
    assert number_of(video.frame(19)) == 19
    with pytest.raises(ImageFileError, match="ends after 20 frames of 25, before frame 22"):
        video.frame(22)
    assert number_of(video.frame(4)) == 4


def test_without_pyav_the_command_that_installs_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(video_files, "find_spec", lambda name: None)
    with pytest.raises(
        ImageFileError, match=r"a\.mp4 is a video, which needs PyAV, not installed here: pip install -r"
    ):
        Video(epath.Path(tmp_path / "a.mp4"))
