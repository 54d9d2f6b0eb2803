"""Captions without boxes, in the formats of CC3M, CC12M, SBU, img2dataset and COCO."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from glip_jax.data.importers.caption_files import open_caption_lines, open_caption_tsv, open_sbu, open_webdataset
from glip_jax.data.importers.entry import ImportSource, SourceError, make_record
from glip_jax.data.records import Record
from glip_jax.data.shards import Shards
from tests.data.conftest import write_image
from tests.run_job import run_job


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        write_image(tmp_path / "pictures" / f"img{i}.jpg", 24, 32, i)
    return tmp_path


def records(opened: ImportSource) -> list[Record]:
    done = [make_record(entry, opened.images, opened.report) for entry in opened.entries]
    return [record for record in done if record is not None]


def ids_and_captions(opened: ImportSource) -> list[tuple[str, str]]:
    return [(record.id, record.caption) for record in records(opened)]


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def img2dataset(place: Path) -> list[tuple[str, bytes]]:
    members = []
    for i in range(3):
        about = {"caption": f"a dog {i}", "url": "http://x/y.jpg", "key": f"{i:09d}", "status": "success", "width": 32}
        members += [
            (f"{i:09d}.jpg", (place / "pictures" / f"img{i}.jpg").read_bytes()),
            (f"{i:09d}.json", json.dumps(about).encode()),
            (f"{i:09d}.txt", f"a dog {i}".encode()),
        ]
    return members


def test_tsv_of_cc3m_and_of_cc12m(place: Path) -> None:
    (place / "cc3m.tsv").write_text("a red dog\timg0.jpg\nthe cat \N{SNOWMAN}\timg1.jpg\n")
    opened = open_caption_tsv(place / "cc3m.tsv", place / "pictures")
    first, second = records(opened)
    assert (first.kind, first.id, first.caption, first.height, len(first.boxes)) == ("caption", "1", "a red dog", 24, 0)
    assert second.caption == "the cat \N{SNOWMAN}"
    assert opened.report.kept["images"] == 2 and not opened.report.dropped
    # CC12M: URL, caption. --files gives the names of the image files.
    (place / "cc12m.tsv.gz").write_bytes(gzip.compress(b"http://x.org/a/img2.jpg?w=1\ta bird\n"))
    cc12m = {"captions": place / "cc12m.tsv.gz", "images": place / "pictures", "columns": "image,caption"}
    assert ids_and_captions(open_caption_tsv(**cc12m, files="{name}")) == [("1", "a bird")]
    assert ids_and_captions(open_caption_tsv(**cc12m, files="img{row}.jpg")) == [("1", "a bird")]
    opened = open_caption_tsv(**cc12m)
    assert not records(opened)
    assert opened.report.dropped == {"image: address without a file": 1}
    (entry,) = open_caption_tsv(**cc12m, files="{row:04d}/{path}").entries
    assert entry.image == "0000/_a_img2.jpg"
    (entry,) = open_caption_tsv(**cc12m, files="{md5}").entries
    assert entry.image == hashlib.md5(b"http://x.org/a/img2.jpg?w=1").hexdigest()


def test_invalid_lines_are_counted(place: Path) -> None:
    lines = [b"one column", b"a\timg0.jpg\tmore", b"\xff\timg0.jpg", b" \timg0.jpg", b"a dog\t", b"a dog\timg1.jpg",
             b"a dog\tabsent.jpg"]  # fmt: skip
    (place / "a.tsv").write_bytes(b"\r\n".join(lines))
    opened = open_caption_tsv(place / "a.tsv", place / "pictures")
    assert ids_and_captions(opened) == [("6", "a dog")]
    assert opened.report.dropped == {
        "image: other columns": 2, "image: not UTF-8": 1, "image: caption empty": 1,
        "image: no picture named": 1, "image: file missing": 1,
    }  # fmt: skip
    assert "a.tsv line 1 has 1 columns, expected 2 (caption,image)" in opened.report.first["image: other columns"]
    with pytest.raises(SourceError, match="other columns"):
        records(open_caption_tsv(place / "a.tsv", place / "pictures", strict=True))


def test_json_lines_with_one_caption_or_several(place: Path) -> None:
    lines = [
        {"image": "img0.jpg", "caption": "a dog"}, {"image": "img1.jpg", "caption": ["a cat", "the cat", 3]},
        {"image": "img1.jpg"}, [1], {"image": 5, "caption": "x"},
    ]  # fmt: skip
    (place / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n{broken\nnull\n")
    opened = open_caption_lines(place / "a.jsonl", place / "pictures")
    assert ids_and_captions(opened) == [("1", "a dog"), ("2", "a cat"), ("2.1", "the cat")]
    assert opened.report.dropped == {
        "image: caption no text": 1, "image: caption or picture missing": 3, "image: no picture named": 1, "image: no JSON": 1,
    }  # fmt: skip
    (place / "b.jsonl").write_text(json.dumps({"file": "img0.jpg", "text": "a dog"}))
    named = open_caption_lines(place / "b.jsonl", place / "pictures", caption_key="text", image_key="file")
    assert ids_and_captions(named) == [("1", "a dog")]


def test_sbu_as_two_text_files_and_as_json(place: Path) -> None:
    (place / "SBU_captioned_photo_dataset_urls.txt").write_text("http://f.com/1/img0.jpg\nhttp://f.com/2/img1.jpg\n")
    (place / "SBU_captioned_photo_dataset_captions.txt").write_text("a dog\nthe cat\n")
    assert ids_and_captions(open_sbu(place, place / "pictures")) == [("1", "a dog"), ("2", "the cat")]
    data = {"image_urls": ["http://f.com/1/img0.jpg", 4], "user_ids": ["a", "b"], "captions": ["a dog", "the cat"]}
    (place / "sbu-captions-all.json").write_text(json.dumps(data))
    opened = open_sbu(place / "sbu-captions-all.json", place / "pictures")
    assert ids_and_captions(opened) == [("1", "a dog")]
    assert opened.report.dropped == {"image: no picture named": 1}
    for broken, message in [
        ({"image_urls": ["x"], "captions": []}, "the captions end after 0"),
        ({"image_urls": ["x"]}, "the captions end after 0"),
        ([], "expected URLs and captions, found none"),
        ("{", "not JSON|found none"),
    ]:
        text = broken if isinstance(broken, str) else json.dumps(broken)
        (place / "sbu-captions-all.json").write_text(text)
        with pytest.raises(SourceError, match=message):
            records(open_sbu(place / "sbu-captions-all.json", place / "pictures"))
    (place / "SBU_captioned_photo_dataset_captions.txt").write_text("a dog\n")
    with pytest.raises(SourceError, match="the captions end after 1, the others go on"):
        records(open_sbu(place, place / "pictures"))


def test_webdataset_tars(place: Path) -> None:
    (place / "cc").mkdir()
    tar_of(place / "cc" / "00000.tar", img2dataset(place))
    only_json = [m for m in img2dataset(place)[:3] if not m[0].endswith(".txt")]
    tar_of(place / "cc" / "00001.tar", [(f"sub/9{name}", data) for name, data in only_json])
    opened = open_webdataset(place / "cc")
    found = records(opened)
    assert [record.id for record in found] == ["000000000", "000000001", "000000002", "sub/9000000000"]
    assert [record.caption for record in found] == ["a dog 0", "a dog 1", "a dog 2", "a dog 0"]
    assert found[1].image == (place / "pictures" / "img1.jpg").read_bytes()
    assert not opened.report.dropped
    assert len(records(open_webdataset(place / "cc" / "00000.tar"))) == 3


def test_invalid_tars_are_counted(place: Path) -> None:
    members = img2dataset(place)
    faulty = [("a.jpg", members[0][1]), ("b.txt", b"x"), ("c.jpg", b"no image"), ("c.txt", b"x"),
              ("d.jpg", members[0][1]), ("d.json", b"{"), ("e.jpg", members[0][1]), ("e.json", b"null")]  # fmt: skip
    opened = open_webdataset(tar_of(place / "a.tar", [*faulty, *members]))
    assert len(records(opened)) == 3
    assert opened.report.dropped == {
        "image: caption no text": 2, "image: no picture in the tar": 1, "image: cannot be decoded": 1,
        "image: no JSON": 1,
    }  # fmt: skip
    whole = tar_of(place / "b.tar", members).read_bytes()
    # Without its end mark, within a header, within a picture, empty.
    end = 9 * 512 + sum(-(-len(data) // 512) * 512 for _, data in members)
    for cut, count, reason in [
        (end, 3, "breaks off"), (end - 512 - 100, 3, "breaks off"), (700, 0, "cannot be read"), (0, 0, "cannot be read"),
    ]:  # fmt: skip
        (place / "b.tar").write_bytes(whole[:cut])
        opened = open_webdataset(place / "b.tar")
        assert (len(records(opened)), opened.report.dropped) == (count, {f"tar: {reason}": 1}), cut
    (place / "b.tar").write_bytes(gzip.compress(whole))
    opened = open_webdataset(place / "b.tar")
    assert not records(opened)
    assert "expected an uncompressed tar" in opened.report.first["tar: cannot be read"]


def test_the_job_imports_caption_records(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a.tsv").write_text("0\t7\ta dog\n1\t8\tthe cat\n9\t8\tno picture\n")
    command = ["caption-tsv", f"{place}/a.tsv", f"--images={place}/pictures", "--columns=image,-,caption"]
    assert run_job("data", [*command, "--files=img{name}.jpg", f"--out={place}/out", "--processes=1"]) == 0
    manifest = Shards(place / "out").manifest
    assert manifest.kinds == {"caption": 2}
    assert manifest.drops == {"image: file missing": 1}
    assert Shards(place / "out")[1].caption == "the cat"
    assert run_job("data", [*command, "--files={no}", f"--out={place}/other"]) == 2
    assert "files is '{no}'" in capsys.readouterr().err
    assert not (place / "other").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: open_caption_tsv(p / "absent", p / "pictures"), "does not exist"),
        (lambda p: open_caption_tsv(p / "pictures", p / "absent"), "image folder"),
        (lambda p: open_caption_tsv(p / "pictures", p / "pictures", columns="image"), "columns is 'image'"),
        (lambda p: open_caption_tsv(p / "pictures", p / "pictures", files="{rwo}"), "files is '{rwo}'"),
        (lambda p: open_caption_tsv(p / "pictures", p / "pictures", files="{"), "files is '{'"),
        (lambda p: list(open_caption_tsv(p / "pictures", p / "pictures").entries), "cannot be read"),
        (lambda p: open_sbu(p, p / "pictures"), "has no SBU_captioned_photo_dataset_urls.txt"),
        (lambda p: open_webdataset(p), r"has no \*.tar"),
        (lambda p: open_webdataset(p / "absent"), "does not exist"),
    ],
)
def test_errors_of_the_whole_file_are_refused(place: Path, call: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        call(place)


def test_a_truncated_gzip_file_is_refused(place: Path) -> None:
    data = gzip.compress("".join(f"a dog {i * i}\timg0.jpg\n" for i in range(3000)).encode())
    (place / "a.tsv.gz").write_bytes(data[:4000])
    with pytest.raises(SourceError, match="cannot be unpacked after line"):
        list(open_caption_tsv(place / "a.tsv.gz", place / "pictures").entries)
