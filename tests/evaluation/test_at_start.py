"""What is known of evaluation sets before the first step of a training that evaluates them."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from glip_jax.cli import train as job
from glip_jax.config import CheckpointConfig, Config, ConfigError, EvaluationConfig, EvaluationSet, TextConfig
from glip_jax.evaluation.at_start import MissingImagesError
from glip_jax.evaluation.evaluate import EvaluationError
from tests.tiny_run import VOCABULARY


@pytest.fixture
def config(tmp_path):
    """Four images, of which the last one is not evaluated; a box of 20 x 10 in each, so no large and no medium one."""
    (tmp_path / "images").mkdir()
    images = [{"id": k, "file_name": f"{k}.png", "height": 40, "width": 60} for k in range(4)]
    for entry in images:
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "images" / entry["file_name"])
    boxes = [{"id": k + 1, "image_id": k, "category_id": k % 2 + 1, "bbox": [1, 1, 20, 10]} for k in range(4)]
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "white"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    phrases = {
        "images": [entry | {"caption": "red and white"} for entry in images],
        "annotations": [{"id": k, "image_id": k, "bbox": [1, 1, 20, 10], "tokens_positive": [[0, 3]]} for k in range(4)],
        "categories": [{"id": 1, "name": "object"}],
    }  # fmt: skip
    (tmp_path / "phrases.json").write_text(json.dumps(phrases))
    sets = {
        "set": EvaluationSet(str(tmp_path / "a.json"), str(tmp_path / "images")),
        "phrases": EvaluationSet(str(tmp_path / "phrases.json"), str(tmp_path / "images"), kind="grounding"),
    }
    evaluation = EvaluationConfig(sets=sets, max_images=3)
    text = TextConfig(vocabulary=str(VOCABULARY), vocabulary_size=512)
    base = Config(evaluation=evaluation)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, text=text))


def _with_sets(config, *names):
    sets = {name: config.evaluation.sets[name] for name in names}
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, sets=sets))


@pytest.mark.parametrize("kind", ["set", "phrases"])
def test_every_image_is_looked_for_before_the_first_step(config, tmp_path, kind):
    config = _with_sets(config, kind)
    job._evaluator(config, str(tmp_path / "run"))
    (tmp_path / "images" / "3.png").unlink()  # not among the first `max_images`
    job._evaluator(config, str(tmp_path / "run"))
    (tmp_path / "images" / "1.png").unlink()
    (tmp_path / "images" / "2.png").write_bytes(b"")
    with pytest.raises(
        MissingImagesError, match=r"evaluation.sets.\w+: 2 of 3 images .* 1.png is missing, 2.png is empty"
    ):
        job._evaluator(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("metric", "hint"),
    [("AP55", "did you mean AP"), ("APl", "give AP, AP50, AP75, APs, AR1"), ("recall@1", "give AP"), ("APs", "")],
)
def test_the_metric_of_the_best_checkpoint_is_known_before_the_first_step(config, tmp_path, metric, hint):
    best = CheckpointConfig(best=1, best_by=f"evaluation/set/{metric}")
    config = dataclasses.replace(_with_sets(config, "set"), checkpoint=best)
    if not hint:
        job._evaluator(config, str(tmp_path / "run"))
        return
    with pytest.raises(ConfigError, match=f"best_by is 'evaluation/set/{metric}': evaluations of set give .*{hint}" if "mean" in hint
                       else f"best_by is 'evaluation/set/{metric}': evaluations of set {hint}"):  # fmt: skip
        job._evaluator(config, str(tmp_path / "run"))


def test_metrics_of_a_grounding_set_are_known(config, tmp_path):
    config = _with_sets(config, "phrases")
    for metric in ("recall@1", "merged_recall@10"):
        best = CheckpointConfig(best=1, best_by=f"evaluation/phrases/{metric}")
        job._evaluator(dataclasses.replace(config, checkpoint=best), str(tmp_path / "run"))
    wrong = dataclasses.replace(config, checkpoint=CheckpointConfig(best=1, best_by="evaluation/phrases/AP"))
    with pytest.raises(ConfigError, match="evaluations of phrases give recall@1"):
        job._evaluator(wrong, str(tmp_path / "run"))


def test_after_a_failed_evaluation_it_is_said_what_is_saved_and_how_to_measure_it(config, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise EvaluationError("2.png cannot be decoded")

    monkeypatch.setattr(job, "evaluate", fails)
    monkeypatch.setattr(job, "Detector", lambda *_: SimpleNamespace(use=lambda _: None))
    evaluate = job._evaluator(_with_sets(config, "set"), str(tmp_path / "run"))
    with pytest.raises(
        EvaluationError, match=r"2.png cannot be decoded; .* saved at step 1000: `python -m glip_jax evaluate "
    ):
        evaluate({}, 1000, contextlib.nullcontext)
    with pytest.raises(EvaluationError, match=r"the evaluation after step 10 failed, and no step is saved yet"):
        evaluate({}, 10, contextlib.nullcontext)
