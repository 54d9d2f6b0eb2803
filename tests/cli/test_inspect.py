"""The job `inspect`: a page of records and of training examples, whole, escaped, in one file."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from glip_jax.cli.reports.card import Chip
from glip_jax.cli.reports.drawing import hex_color
from glip_jax.cli.reports.inspect_cards import count_records, example_cards, record_cards, spread
from glip_jax.data import shards
from tests import tiny_run
from tests.run_job import run_job

BAD = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return tiny_run.write_sources(tmp_path_factory.mktemp("sources"))


def test_indices_are_spread():
    assert spread(10, 3) == [0, 3, 6] and spread(3, 10) == spread(3, 0) == [0, 1, 2] and spread(5, 5) == [*range(5)]


def test_counts_of_records(sources):
    counts = count_records(shards.Shards(sources["boxes"].path), 0)
    assert counts.records == 8 and counts.boxes == [1, 2, 3, 1, 2, 3, 1, 2]
    assert len(counts.sides) == len(counts.words) == sum(counts.phrases.values()) == 15
    assert set(counts.phrases) <= set(tiny_run.NAMES) and counts.negatives == [] and counts.corrupt == []
    assert all(16 / 64 < side < 30 / 64 for side in counts.sides)
    assert count_records(shards.Shards(sources["boxes"].path), 3).records == 3


def test_a_report_of_shards_alone(sources, tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    assert run_job("inspect", [sources["boxes"].path, sources["captions"].path, f"--out={out}", "--records=2"]) == 0
    assert capsys.readouterr().out == f"HTML report: {out}\n"
    page = out.read_text()
    assert page.count("data:image/jpeg") == 4 and page.count("data:image/svg+xml") == 4
    assert "Training examples" not in page and "Token budget" not in page
    assert "d0, detection, 64 × 64" in page and "g4, grounding" in page and "record 4" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs no other file"


def test_a_page_of_a_config_shows_examples(sources, tmp_path):
    config = tiny_run.config_file(tmp_path, sources)
    out = tmp_path / "page.html"
    command = [f"--config={config}", f"--out={out}", "--examples=10", "--config.data.max_boxes=2", "--records=3"]
    assert run_job("inspect", command) == 0
    page = out.read_text()
    assert page.count("data:image/jpeg") == 10 + 2 * 3 and page.count("data:image/svg+xml") == 6
    assert "step 1, " in page and "step 2, " in page and "boxes_over_limit" in page
    assert "shares of examples: boxes 50.0%, captions 50.0%" in page
    # Folders beside a config take the place of its sources.
    assert run_job("inspect", [sources["boxes"].path, *command]) == 0
    assert "captions" not in re.findall(r'<span class="name">(.*?)</span>', out.read_text())


def test_tokens_have_the_color_of_their_box(sources):
    from glip_jax.data.mixture import Mixture

    config = tiny_run.replace(tiny_run.config(sources), "data", flip=0.0)
    batches = Mixture(config).batches()
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    vocabulary = tiny_run.VOCABULARY.read_text().splitlines()
    known = batch.token_loss_mask.copy()
    known[:, 1] = False
    cards = example_cards(batch._replace(token_loss_mask=known), vocabulary, ("boxes", "captions"), 8, 5)
    assert len(cards) == 8
    for index, card in enumerate(cards):
        colored = {piece.color: piece.text for piece in card.caption if piece.color}
        assert {box.text for box in card.boxes} == set(colored.values())
        assert all(colored[box.color] == box.text for box in card.boxes)
        assert len(card.boxes) == batch.box_mask[index].sum()
        assert card.caption[0].state == "unlabelled" and not any(
            piece.state == "unlabelled" for piece in card.caption[3:]
        )
        text = "".join(piece.text for piece in card.caption)
        assert "[CLS]" not in text and "[SEP]" not in text and "[PAD]" not in text
        assert card.file.startswith("step 5, ")


def test_pieces_of_words_are_joined():
    from glip_jax.cli.reports.inspect_cards import _token_pieces

    vocabulary = ["[CLS]", "[SEP]", "app", "##les", "red", "."]
    tokens, mask = np.array([0, 4, 2, 3, 5, 2, 3, 1, 0], np.int32), np.arange(9) < 8
    owner = np.array([-1, -1, 0, 0, -1, -1, -1, -1, -1])
    pieces = _token_pieces(tokens, mask, owner, np.arange(9) != 1, vocabulary)
    assert "".join(piece.text for piece in pieces) == "red apples. apples"
    assert [piece.text for piece in pieces if piece.color] == ["apples"]
    assert [piece.text for piece in pieces if piece.state == "unlabelled"] == ["red"]


def test_foreign_text_is_escaped_and_corrupt_records_shown(tmp_path):
    good = tiny_run._record(0, "detection")
    records = [
        good, tiny_run.dataclasses.replace(good, id=BAD, image=good.image[:60], known_absent=(BAD,)),
        tiny_run.dataclasses.replace(good, id="n", known_absent=(BAD,), not_exhaustive=("dog",)),
    ]  # fmt: skip
    shards.write(records, tmp_path / "s", name="s", names=(BAD, BAD, BAD))
    cards = record_cards(shards.Shards(tmp_path / "s"), 3)
    assert cards[1].uri == "" and "corrupt: record" in cards[1].chips[0].text
    assert Chip("not all dog have boxes") in cards[2].chips and cards[2].boxes[0].color == hex_color(0)
    assert run_job("inspect", [str(tmp_path / "s"), f"--out={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert BAD not in page and "&lt;script&gt;" in page and "no image" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to inspect: expected a folder of shards or --config=FILE.py"),
        (["nowhere"], "nowhere does not exist: expected a folder of shards"),
        (["x", "--recrods=3"], "unknown option --recrods; did you mean --records"),
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
    ],
)
def test_what_does_not_fit_gets_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_job("inspect", arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("inspect: ") and message in error and error.count("\n") == 1
    assert not list(Path(tmp_path).iterdir())


def test_histograms_hold_every_value():
    from glip_jax.cli.reports.drawing import draw_histogram

    edges = (2.0 ** np.arange(-3, 0.01, 0.5)).tolist()
    one = draw_histogram({"a": [0.001, 0.3, 5.0], "none": []}, edges, "sides", logarithmic=True)
    assert one == draw_histogram({"a": [0.125, 0.3, 1.0], "none": []}, edges, "sides", logarithmic=True)
    assert one.startswith(b"<?xml") and one != draw_histogram({"a": [0.2, 0.3, 1.0]}, edges, "sides", logarithmic=True)


def test_unlabelled_phrases_are_named(tmp_path):

    record = tiny_run._record(0, "grounding")
    caption = f"{record.caption} and a tree"
    tree = ((len(caption) - 6, len(caption)),)
    shards.write([dataclasses.replace(record, caption=caption, unknown=(tree,))], tmp_path / "x", name="x")
    (card,) = record_cards(shards.Shards(tmp_path / "x"), 1)
    assert Chip("unlabelled: a tree") in card.chips
