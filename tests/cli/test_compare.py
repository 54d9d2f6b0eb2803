"""The job `compare` on made evaluation.json files: groups, steps, the page, and what it refuses."""

import json

import pytest

from glip_jax import __main__ as door
from glip_jax.cli import report
from glip_jax.evaluation.comparison import ComparisonError, spread
from tests.run_job import run_job


def evaluation(folder, name, seed, value, **changes):
    """A folder with evaluation.json: AP50 of a set is `value`, every second phrase is found."""
    cells = {"kind": "detection", "hashes": {"annotations": "aa", "pictures": "pp"},
             "numbers": {"AP": value / 2, "AP50": value, "AP50_permuted": 0.01, "AP75": -1.0}}  # fmt: skip
    words = {"kind": "grounding", "hashes": {"annotations": "bb", "pictures": "qq"}, "phrases": {"": 4, "plain": 3, "relational": 1},
             "numbers": {"recall@1": 0.5, "plain/recall@1": 0.75, "relational/recall@1": value}}  # fmt: skip
    summary = {
        "format": report.FORMAT, "name": name, "seed": seed, "step": 9, "parameters": "ema", "date": "2030",
        "settings": {"model.fusion.enabled": name != "a"}, "sets": {"cells": cells, "words": words},
        "hashes": {"checkpoint": f"c{name}{seed}", "parameters": f"p{name}{seed}", "code": {"files": "ff"}},
    }  # fmt: skip
    (folder / f"{name}-{seed}").mkdir(parents=True)
    (folder / f"{name}-{seed}" / "evaluation.json").write_text(json.dumps(summary | changes))
    return str(folder / f"{name}-{seed}")


@pytest.fixture
def runs(tmp_path):
    """Two configs of two seeds; b is better by 0.1 and by 0.3. Given in no order."""
    made = [("a", 1, 0.4), ("b", 1, 0.7), ("a", 0, 0.2), ("b", 0, 0.3)]
    return [evaluation(tmp_path, *one) for one in made]


def test_seeds_are_replicas_and_steps_are_taken_seed_by_seed(runs, tmp_path, capsys):
    command = [
        "compare",
        *runs,
        f"--out={tmp_path / 'out'}",
        "--steps",
        "b/a",
        "a/b=cells/AP50,words/relational/recall@1",
    ]
    assert door.main(command) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [(run["config"], run["seed"]) for run in found["runs"]] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    cells = found["configs"]["b"]["cells/AP50"]
    assert cells["mean"] == pytest.approx(0.5) and cells["deviation"] == pytest.approx(0.08**0.5)
    assert (cells["min"], cells["max"], cells["values"]) == (0.3, 0.7, [0.3, 0.7])
    up, down = found["steps"]
    assert up["seeds"] == [0, 1] and up["differences"]["cells/AP50"]["values"] == pytest.approx([0.1, 0.3])
    assert "cells/AP50_permuted" not in up["differences"] and "cells/AP" in up["differences"]
    assert list(down["differences"]) == ["cells/AP50", "words/relational/recall@1"]
    lines = [line.split() for line in printed.splitlines()]
    for row in (["cells", "AP50", "0.3000", "±0.1414", "0.5000", "±0.2828"], ["chance", "0.0100", "±0.0000", "0.0100", "±0.0000"],
                ["relational", "0.3000", "±0.1414", "0.5000", "±0.2828"],
                ["cells", "AP50", "+0.2000", "±0.1414", "2", "of", "2", "+0.1000", "+0.3000"],
                ["words", "relational", "R@1", "-0.2000", "±0.1414", "0", "of", "2", "-0.1000", "-0.3000"]):  # fmt: skip
        assert row in lines
    assert "model.fusion.enabled: a False; b True" in printed
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob("*.unfinished"))


def test_absent_names_are_compared(tmp_path, capsys):
    def found(share, **more):
        thresholds = {"0.3": {"alarmed_pairs": share, "found_pairs": 0.9, "false_alarms": 2 * share}}
        return {"thresholds": thresholds, "rates": {rate: {"AP": share / 2} for rate in ("0.01", "0.05")}, **more}

    folders = []
    for seed, share in ((0, 0.2), (1, 0.4)):
        folder = evaluation(tmp_path, "a", seed, 0.5)
        path = tmp_path / f"a-{seed}" / "evaluation.json"
        summary = json.loads(path.read_text())
        summary["sets"]["cells"]["absence"] = found(share, alone=found(share + 0.2))
        path.write_text(json.dumps(summary))
        folders.append(folder)
    assert run_job("compare", [*folders, f"--out={tmp_path / 'out'}"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for row in (
        "false alarms 0.6000 ±0.2828",
        "absent, found 0.3000 ±0.1414",
        "AP at 0.05 0.1500 ±0.0707",
        "alone absent, found 0.5000 ±0.1414",
    ):
        assert row in lines


def test_one_network_under_two_settings_and_the_seconds_of_its_steps(tmp_path, capsys):
    run = evaluation(tmp_path, "a", 0, 0.5)
    seconds = [
        {"step": 20, "step_seconds": 9.0},
        {"step": 40, "step_seconds": 1.0},
        {"step": 60, "step_seconds": 2.0},
        {"step": 60, "loss": 1.0},
    ]
    (tmp_path / "a-0" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in seconds))
    hashes = json.loads((tmp_path / "a-0" / "evaluation.json").read_text())["hashes"]
    other = evaluation(tmp_path, "competing", 0, 0.6, hashes=hashes, workdir=run)
    assert run_job("compare", [run, other, f"--out={tmp_path / 'out'}", "--steps=competing/a=cells/AP50"]) == 0
    assert "train seconds a step 2.0000 2.0000" in [
        " ".join(line.split()) for line in capsys.readouterr().out.splitlines()
    ]


def test_the_page_needs_no_other_file_and_escapes(tmp_path):
    runs = [evaluation(tmp_path, "<b>", 0, 0.5), evaluation(tmp_path, "a", 0, 0.4)]
    assert run_job("compare", [*runs, f"--out={tmp_path / 'out'}"]) == 0
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "&lt;b&gt;" in page and "<b></th>" not in page
    assert 'src="data:image/svg' in page and "http" not in page.replace("http://www.w3.org", "")
    assert "One run each" in page and "±" not in page


def test_a_single_value_has_no_spread():
    assert spread([0.5]).deviation is None


def _other_sets(folder):
    sets = json.loads((folder / "a-0" / "evaluation.json").read_text())["sets"]
    return sets, evaluation(folder, "b", 0, 0.3, sets=sets | {"more": sets["cells"]})


def _other_annotations(folder):
    sets = json.loads((folder / "a-0" / "evaluation.json").read_text())["sets"]
    sets["cells"]["hashes"]["annotations"] = "cc"
    return evaluation(folder, "b", 0, 0.3, sets=sets)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "empty").mkdir() or [folder / "empty"], "empty holds no evaluation.json"),
        (lambda folder: [folder / "a-0" / "evaluation.json"], "holds no evaluation.json"),
        (lambda folder: [_other_sets(folder)[1]], r"different sets \(more, first only in"),
        (lambda folder: [_other_annotations(folder)], r"different annotations of the set cells \(hashes aa and cc\)"),
        (lambda folder: [folder / "x" / ".." / "a-0"], "the same folder: expected each run once"),
        (lambda folder: [evaluation(folder / "x", "a", 0, 0.3, hashes={"checkpoint": "z", "parameters": "z"})],
         "both of config a with seed 0"),
        (lambda folder: [evaluation(folder, "b", 0, 0.3, hashes={"checkpoint": "z", "parameters": "pa0"}, settings={"model.fusion.enabled": False})],
         r"both of the same parameters \(pa0\) and settings"),
        (lambda folder: [evaluation(folder, "b", 0, 0.3, format=1)], "another version of glip_jax: run `evaluate` again"),
        (lambda folder: [evaluation(folder, "b", 0, 0.3, sets={"cells": {}})], "cannot be read .*: run `evaluate` again"),
        (lambda folder: ["--steps", "b/a"], "step b/a: no run is of config b; there are a"),
        (lambda folder: ["--steps", "b"], "--steps b: expected NEW/OLD"),
        (lambda folder: ["--steps", "a/a=cells/AP60"], "cells/AP60 is not measured; there are cells/AP50"),
        (lambda folder: [evaluation(folder, "b", 1, 0.3), "--steps", "b/a"], "b has 1 and a 0: expected a common one"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys, make, message):
    (tmp_path / "x").mkdir()
    first = evaluation(tmp_path, "a", 0, 0.2)
    assert run_job("compare", [first, *map(str, make(tmp_path)), f"--out={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare: ")
    with pytest.raises(ComparisonError, match=message):
        raise ComparisonError(line)
    assert not list((tmp_path / "out").glob("*"))


def test_nothing_to_compare_and_nowhere_to_write(tmp_path, capsys):
    assert run_job("compare", [f"--out={tmp_path / 'out'}"]) == 2 and "no runs to compare" in capsys.readouterr().err
    assert run_job("compare", [str(tmp_path)]) == 2 and "no folder to write to" in capsys.readouterr().err
