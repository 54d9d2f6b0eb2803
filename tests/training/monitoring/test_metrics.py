"""Metrics of a run: windows, JSON lines that can be cut back, TensorBoard events, plain lines."""

import json
import math
import time
from typing import Any

import pytest

from glip_jax.training.monitoring.metrics import Progress, Window, cut_back, read
from glip_jax.training.monitoring.writer import Writer


def _metrics(loss: float, examples: int = 4, of_a: int = 4) -> dict[str, int | float]:
    return {
        "loss": loss, "loss/token": loss, "gradient_norm": 1.0, "positives": 3, "examples": examples, "rate": loss / 10,
        "dropped/boxes_over_limit": 1, "source/a/dropped/boxes_over_limit": 1, "source/a/loss/token": loss, "source/a/examples": of_a, "wait_seconds": 0.5,
    }  # fmt: skip


def test_window_means_sums_and_latest():
    window = Window()
    window.add(_metrics(1.0))
    window.add(_metrics(3.0, of_a=0))
    time.sleep(0.1)  # longer than the rounding of the seconds
    taken = window.take()
    assert taken["loss"] == 2.0 and taken["rate"] == 0.3
    assert taken["examples"] == 8 and taken["dropped/boxes_over_limit"] == 2 and taken["source/a/examples"] == 4
    assert taken["source/a/dropped/boxes_over_limit"] == 2
    assert taken["source/a/loss/token"] == 1.0, "a step without examples of the source is in no mean of it"
    assert taken["wait_seconds"] == 1.0 and taken["steps"] == 2
    assert taken["images_per_second"] == pytest.approx(8 / taken["seconds"], rel=0.05)
    window.add(_metrics(5.0))
    assert window.take()["loss"] == 5.0


def test_lines_are_cut_back_and_a_torn_line_is_dropped(tmp_path):
    with Writer(str(tmp_path), 0) as writer:
        for step in (2, 4, 6):
            writer.write(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert [line["step"] for line in read(str(tmp_path))] == [2, 4, 6]
    with Writer(str(tmp_path), 4) as writer:
        writer.write(5, {"loss": 0.2})
    assert [line["step"] for line in read(str(tmp_path))] == [2, 4, 5]
    kept = [json.loads(line) for line in cut_back(str(tmp_path), 0)]
    assert read(str(tmp_path)) == [] and [line["goodput"] for line in kept] == ["lost"] * 4
    assert not [line for line in kept if "loss" in line or line["step"]], "their times stay, at the step of the resume"


def test_damaged_lines_are_named_and_set_aside(tmp_path, caplog):
    """As a loss of power leaves them: blocks of zeros, two lines in one, bytes that are no text."""
    path = tmp_path / "metrics.jsonl"
    damaged = [b'{"step": 4, "lo{"step": 5}', b"\xff\xfe", b"7", b'{"loss": 1.0}', b"\0\0\0\0"]
    whole = [b'{"step": 2, "loss": 1.0}', b'\0\0\0{"step": 6, "loss": 2.0}']
    path.write_bytes(b"\n".join([whole[0], *damaged, whole[1], b'{"step": 8, "lo']))
    assert [line["step"] for line in read(str(tmp_path))] == [2, 6]
    start = '\'{"step": 4, "lo{"step": 5}\''
    assert f"metrics.jsonl: line 2 is damaged ({start}), and 4 more lines: left out" in caplog.text
    with Writer(str(tmp_path), 6):
        assert "and 4 more lines: set aside in" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().split(b"\n")[:-1] == damaged
    assert path.read_text() == '{"step": 2, "loss": 1.0}\n{"step": 6, "loss": 2.0}\n'


def test_values_that_are_not_finite_stay_json(tmp_path):
    with Writer(str(tmp_path), 0) as writer:
        writer.write(1, {"loss": math.nan})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "time": line["time"], "loss": "nan"}


def _events(folder) -> list[Any]:
    from tensorboardX.proto import event_pb2  # which loads torch

    kind: Any = getattr(event_pb2, "Event")  # noqa: B009 (made at run time; the checker does not see it)
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length (8), its checksum (4), message, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            events.append(kind.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_events_hold_the_scalars_and_a_resume_hides_later_ones(tmp_path):
    with Writer(str(tmp_path), 0) as writer:
        writer.write(3, {"loss": 0.5})
    with Writer(str(tmp_path), 2) as writer:
        writer.write(3, {"loss": 0.25})
    events = _events(tmp_path / "tensorboard")
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert (3, "loss", 0.5) in values and (3, "loss", 0.25) in values
    # TensorBoard drops what it read at or after the step of a START message.
    assert 3 in [e.step for e in events if e.WhichOneof("what") == "session_log"]


def test_plain_lines_without_a_terminal(capsys):
    progress = Progress(0, 10)
    window = Window()
    window.add(_metrics(1.0))
    progress.window(2, window.take(), ["a", "b"])
    progress.close()
    line = capsys.readouterr().out
    assert line.startswith("step 2/10  loss 1.0000") and "dropped 1" in line and "a 4 ex" in line and "b 0 ex" in line
    Progress(0, 10, quiet=True).log("nothing")
    assert capsys.readouterr().out == ""
