"""The lowest score that `predict` writes: given, the usual one, or that of the checkpoint's report."""

import json
from types import SimpleNamespace

import pytest

from glip_jax.cli.command_line import CommandLineError
from glip_jax.cli.score_thresholds import carried_report, score_thresholds
from glip_jax.config import Config
from glip_jax.evaluation.thresholds import ThresholdError
from glip_jax.io.provenance import score_settings

CONFIG = Config()


@pytest.fixture
def checkpoint(tmp_path):
    """A working folder whose evaluation.json has thresholds at 0.05: 0.6, cats 0.4, and 0.8 for one name a prompt."""
    absence = {
        "absent_pairs": 80, "rates": {"0.05": {"threshold": 0.6}, "0.01": {"threshold": 0.7}},
        "per_name": {"cat": {"thresholds": {"0.05": 0.4}}}, "alone": {"rates": {"0.05": {"threshold": 0.8}}},
    }  # fmt: skip
    summary = {
        "step": 7,
        "parameters": "ema",
        "settings": score_settings(CONFIG),
        "sets": {"x": {"absence": absence}, "y": {}},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(summary))
    return SimpleNamespace(workdir=str(tmp_path), step=7)


def _chosen(checkpoint, phrases=("the cat", "dog"), alone=False, threshold=None, rate=None, report="", config=CONFIG):
    return score_thresholds(threshold, rate, report, checkpoint, config, phrases, alone)


def test_the_report_of_the_checkpoint_gives_the_default(checkpoint, tmp_path):
    found = _chosen(checkpoint)
    assert found.of_phrases == (0.4, 0.6) and found.threshold == 0.6
    assert "0.400 to 0.600 by name: 0.05 false alarms per image and absent name" in found.text()
    assert _chosen(checkpoint, ("cat",), alone=True).of_phrases == (0.8,), "asked alone a name is found more easily"
    assert _chosen(checkpoint, rate=0.01).of_phrases == (0.7, 0.7)
    assert _chosen(checkpoint, threshold=0.2).of_phrases == (0.2, 0.2)
    (tmp_path / "evaluation.json").rename(tmp_path / "report.json")
    assert _chosen(checkpoint).of_phrases == (0.3, 0.3), "no report"
    assert _chosen(checkpoint, report=str(tmp_path / "report.json")).of_phrases == (0.4, 0.6)
    with pytest.raises(ThresholdError, match="is no report"):
        _chosen(checkpoint, rate=0.05)


def test_a_report_of_something_else_gives_no_default(checkpoint, caplog):
    checkpoint.step = 8
    assert _chosen(checkpoint).of_phrases == (0.3, 0.3)
    assert "evaluation.json is of another step (7), so it chooses no threshold: 0.3 is taken" in caplog.text
    assert _chosen(checkpoint, rate=0.05).of_phrases == (0.4, 0.6), "what is asked for is taken, with a note"
    checkpoint.step = None
    assert _chosen(checkpoint).threshold == 0.6, "an export"


def test_an_export_carries_the_thresholds(checkpoint, tmp_path):
    carried = json.loads(carried_report(checkpoint, CONFIG))
    assert list(carried) == ["step", "parameters", "settings", "sets"] and list(carried["sets"]) == ["x"]
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "evaluation.json").write_text(json.dumps(carried))
    assert _chosen(SimpleNamespace(workdir=str(tmp_path / "export"), step=None)).of_phrases == (0.4, 0.6)
    checkpoint.step = 8
    assert carried_report(checkpoint, CONFIG) == ""


def test_flags_that_exclude_each_other_and_values_out_of_range(checkpoint):
    with pytest.raises(CommandLineError, match=r"--threshold=0.2 and --false-alarms=0.05 both choose"):
        _chosen(checkpoint, threshold=0.2, rate=0.05)
    with pytest.raises(CommandLineError, match="--false-alarms=0: expected more than 0"):
        _chosen(checkpoint, rate=0)
    with pytest.raises(ThresholdError, match=r"thresholds for 0.05, 0.01 .*, not for 0.1"):
        _chosen(checkpoint, rate=0.1)
