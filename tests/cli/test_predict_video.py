"""`predict video.mp4`: every n-th frame, numbered and timed, alone and beside images, stopped and continued."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from glip_jax.cli.coco_files import annotation_file
from glip_jax.io import video_files
from tests.io.videos import write_video
from tests.run_job import run_job

needs_av = pytest.mark.skipif(
    importlib.util.find_spec("av") is None, reason="PyAV is not installed: pip install -r requirements-video.txt"
)


@pytest.fixture
def predict(trained, tmp_path):
    """Runs the job on arguments with an exit code; returns the content of predictions.json."""

    def run(*arguments, code=0):
        out = tmp_path / "out"
        common = (f"--workdir={trained.workdir}", "--names=cat,dog", f"--out={out}", "--threshold=0.02")
        assert run_job("predict", [*arguments, *common]) == code
        return json.loads((out / "predictions.json").read_text()) if out.exists() else None

    return run


@needs_av
@pytest.mark.compiles
def test_every_third_frame_and_an_image(predict, tmp_path, capsys):
    """A frame has the boxes of the same pixels as an image."""
    from glip_jax.io.video_files import Video

    path, found = write_video(tmp_path / "clip.mp4", frames=8, size=(96, 64)), tmp_path / "found.json"
    Image.fromarray(Video(path).frame(3).pixels).save(tmp_path / "third.png")
    content = predict(path, tmp_path / "third.png", "--every=3", f"--coco={found}")
    assert "8 frames, 4 a second; one of 3 is taken, images 3" in capsys.readouterr().out
    *frames, image = content["images"]
    assert [(f["frame"], f["seconds"], f["file"], f["drawn"]) for f in frames] == [
        (n, n / 4, str(path), f"pictures/clip_{n:06d}.png") for n in (0, 3, 6)
    ]
    assert frames[1]["detections"] == image["detections"] != [] and "frame" not in image
    assert sorted(each.name for each in (tmp_path / "out" / "pictures").iterdir()) == [
        "clip_000000.png", "clip_000003.png", "clip_000006.png", "third.png",
    ]  # fmt: skip
    images = json.loads(annotation_file(str(found)).read_text())["images"]
    assert images[1] == {
        "id": 2,
        "file_name": "clip_000003.png",
        "height": 96,
        "width": 64,
        "frame": 3,
        "seconds": 0.75,
        "video": str(path),
    }
    assert images[3]["file_name"] == "third.png"
    assert [frame["frame"] for frame in predict(path)["images"]] == [0, 4], "one a second"


@needs_av
@pytest.mark.compiles
def test_frames_that_cannot_be_decoded_are_left_out(predict, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video_files.Video, "count", property(lambda self: 8, lambda self, _: None), raising=False)
    content = predict(write_video(tmp_path / "clip.mp4", frames=4), "--every=2")
    assert [entry["frame"] for entry in content["images"]] == [0, 2]
    assert [entry["reason"] for entry in content["left_out"]] == [
        f"ends after 4 frames of 8, before frame {number}" for number in (4, 6)
    ]
    assert "left out 2 of 4 images" in capsys.readouterr().err


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bad.mp4", (), "bad.mp4 is no video that can be read"),
        ("a.png", ("--every=2",), "--every=2 has no meaning without a video: leave it out"),
    ],
)
def test_a_mistake_gets_one_line(predict, tmp_path, capsys, name, arguments, message):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    if name == "bad.mp4" and importlib.util.find_spec("av") is None:
        message = "bad.mp4 is a video, which needs PyAV, not installed here: pip install -r requirements-video.txt"
    capsys.readouterr()
    predict(tmp_path / name, *arguments, code=2)
    error = capsys.readouterr().err
    assert message in error and error.startswith("predict: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
