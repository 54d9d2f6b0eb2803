"""Fuzz tests: corrupted annotation files and images give counted drops or a one-line error, never another exception.

The files of each format are corrupted many times with fixed seeds: see `tests.data.importers.mutations`.
"""

import json
import random
from pathlib import Path

import pytest

from glip_jax.data import shards
from glip_jax.data.importers.entry import Report, SourceError, make_record
from glip_jax.data.records import Record, decode, encode
from tests.data.conftest import write_image
from tests.data.importers.layouts import LAYOUTS, Layout
from tests.data.importers.mutations import mutated, spoil_image
from tests.run_job import run_job

pytestmark = pytest.mark.long

EACH, MORE = (-(-number // len(LAYOUTS)) for number in (300, 2100))
"""Number of corrupted files per format: in the default tier, and with --all."""


def write_files(layout: Layout, folder: Path) -> dict[str, str]:
    (folder / "pictures").mkdir()
    for i in range(3):
        write_image(folder / "pictures" / f"img{i}.png", 24, 32, i)
    return layout.make(folder)


def imported(layout: Layout, folder: Path) -> tuple[list[Record], Report]:
    """Imports the folder, and encodes and decodes every record."""
    opened = layout.open(folder)
    records = []
    for entry in opened.entries:
        record = make_record(entry, opened.images, opened.report)
        if record is not None:
            records.append(decode(encode(record), len(opened.names)))
    return records, opened.report


def clear(line: str, folder: Path, files: dict[str, str]) -> None:
    """Checks that an error is one printable line that names a file."""
    assert line.isprintable(), line
    assert len(line) < 600, line
    names = [str(folder), *(Path(file).name for file in files), *(Path(file).stem for file in files)]
    assert any(name in line for name in names), line


@pytest.mark.parametrize(
    "numbers", [range(EACH), pytest.param(range(EACH, MORE), marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_corrupted_files_give_drops_or_a_one_line_error(name: str, numbers: range, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    files = write_files(layout, tmp_path)
    records, report = imported(layout, tmp_path)
    assert len(records) == layout.records
    assert set(report.dropped) <= {"box: crowd"}, report
    pictures = [f"pictures/{path.name}" for path in sorted((tmp_path / "pictures").iterdir())]
    whole = {file: (tmp_path / file).read_bytes() for file in [*files, *pictures]}
    outcomes = {"line": 0, "drop": 0, "kept": 0}
    for number in numbers:
        rng = random.Random(f"{name} {number}")
        file = rng.choice([*files, *files, rng.choice(pictures)])
        spoil = spoil_image(whole[file], rng) if file in pictures else mutated(whole[file], files[file], rng)
        data, done = spoil
        place = tmp_path / file
        place.unlink() if data is None else place.write_bytes(data)
        try:
            records, report = imported(layout, tmp_path)
        except SourceError as error:
            clear(str(error), tmp_path, files)
            outcomes["line"] += 1
        except Exception as error:
            raise AssertionError(f"{name} {number}: {file}, {done}: {type(error).__name__}: {error}") from error
        else:
            for reason, example in report.first.items():
                assert example.isprintable(), f"{name} {number}: {file}, {done}: {reason}: {example!r}"
            outcomes["drop" if report.dropped else "kept"] += 1
        finally:
            place.write_bytes(whole[file])
    # Most corruptions are detected; the others change a text or number into another valid one.
    assert outcomes["kept"] < 0.7 * len(numbers) + 3, outcomes
    assert len(imported(layout, tmp_path)[0]) == layout.records


REGRESSIONS = [
    ("mixed", "a.json", ["annotations", 2, "tokens_positive", 0, 1], -1),
    ("openimages", "hierarchy.json", ["Subcategory", 0, "LabelName"], [1]),
    ("lvis", "a.json", ["categories", 0, "id"], "1"),
    ("coco", "a.json", ["images", 0, "file_name"], "img0.png#99999999999999999999999+5"),
    ("mdetr", "a.json", ["images", 0, "file_name"], "img0.png#5+99999999999999999999999"),
    ("coco", "a.json", ["images", 0, "file_name"], "img0.png#3+5;base64"),
    ("caption-lines", "a.jsonl", ["caption"], "\ud800"),
]
"""Inputs for which earlier versions raised other exceptions."""


@pytest.mark.parametrize(("name", "file", "path", "value"), REGRESSIONS)
def test_regressions(name: str, file: str, path: list, value: object, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    files = write_files(layout, tmp_path)
    first, *rest = (tmp_path / file).read_text().splitlines()
    data = place = json.loads(first)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / file).write_text("\n".join([json.dumps(data), *rest]))
    try:
        _, report = imported(layout, tmp_path)
    except SourceError as error:
        clear(str(error), tmp_path, files)
    else:
        assert report.dropped or report.noted


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_job_creates_a_complete_folder_or_none(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = LAYOUTS[name]
    files = write_files(layout, tmp_path)
    whole = {file: (tmp_path / file).read_bytes() for file in files}
    command = [part.format(p=tmp_path) for part in layout.command.split()]
    for number in range(4):
        rng = random.Random(f"job {name} {number}")
        file = rng.choice(list(files))
        data = [whole[file], whole[file][: len(whole[file]) // 2], b"", b"\x00\xff" + whole[file]][number]
        (tmp_path / file).write_bytes(data)
        out = tmp_path / f"out{number}"
        code = run_job("data", [*command, f"--out={out}", "--processes=1"])
        printed = capsys.readouterr()
        (tmp_path / file).write_bytes(whole[file])
        assert code in ((0,) if number == 0 else (0, 2)), printed.err
        if code == 0:
            shards.verify(out)
            assert len(shards.Shards(out)) == layout.records or "dropped" in printed.out
        else:
            (line,) = printed.err.strip().splitlines()
            assert line.startswith("data: ")
            assert not out.exists()
        assert not (tmp_path / f".out{number}.partial").exists()
