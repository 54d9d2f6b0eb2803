import json
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glip_jax.data.scenes.pictures import PictureError, color_of, load_pictures

BUNDLED = Path(__file__).resolve().parents[3] / "gcs" / "sample" / "pictures"
STYLES = ("fluent", "noto", "twemoji")


@pytest.fixture
def folder(tmp_path):
    names = ["cow", "ant", "dog", "bee", "elk", "fox"]
    entries = {f"{i:x}": {"name": n, "split": "detection" if i < 4 else "unseen"} for i, n in enumerate(names)}
    for style in ("flat", "round"):
        (tmp_path / style).mkdir()
        for code in entries:
            Image.new("RGBA", (8, 8), (10, 200, 10, 255)).save(tmp_path / style / f"{code}.webp")
    (tmp_path / "names.json").write_text(json.dumps(entries))
    return tmp_path


def test_limits_are_per_split_evenly_spaced_and_equal_across_styles(folder):
    def names(**more):
        return [(p.name, p.split, p.style) for p in load_pictures(folder, **{"styles": ["flat"], **more})]

    assert [n for n, _, _ in names()] == ["ant", "bee", "cow", "dog"]
    assert [n for n, _, _ in names(limit=2)] == ["cow", "dog"]
    two = names(styles=["flat", "round"], splits=["detection", "unseen"], limit={"detection": 2, "unseen": 1})
    assert two == [
        ("cow", "detection", "flat"), ("cow", "detection", "round"), ("dog", "detection", "flat"),
        ("dog", "detection", "round"), ("elk", "unseen", "flat"), ("elk", "unseen", "round"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda root: (root / "names.json").unlink(), {}, "names.json does not exist"),
        (lambda root: (root / "names.json").write_text("[1]"), {}, "cannot be read"),
        (lambda root: (root / "flat" / "0.webp").write_bytes(b"no picture"), {}, "'cow'.*not a readable picture"),
        (lambda root: None, {"styles": ["flet"]}, "styles: flat, round"),
        (lambda root: None, {"limit": 9}, "4 names of split 'detection', expected 9"),
        (lambda root: None, {"splits": ["captions"]}, "0 names of split 'captions', expected 1"),
        (lambda root: (root / "names.json").write_text('{"1": {"name": "a", "split": "b"}}'), {}, "split 'b'"),
    ],
)
def test_invalid_folders_give_a_one_line_error(folder, change, settings, message):
    change(folder)
    with pytest.raises(PictureError, match=message) as raised:
        load_pictures(folder, **{"styles": ["flat"], **settings})
    assert "\n" not in str(raised.value)


def test_the_bundled_names():
    listing = json.loads((BUNDLED / "names.json").read_text())
    names = [entry["name"] for entry in listing.values()]
    assert len(names) == len(set(names)) >= 650
    counts = Counter(entry["split"] for entry in listing.values())
    assert counts["detection"] >= 400
    assert min(counts["grounding"], counts["captions"], counts["unseen"]) >= 80
    for code, entry in listing.items():
        official = unicodedata.name(chr(int(code, 16))).lower()
        assert not any(word in official for word in ("clock face", "keycap", "squared", "regional")), entry
        assert entry["name"] == entry["name"].lower().strip() and entry["name"].isascii()
    for style in STYLES:
        assert {p.stem for p in (BUNDLED / style).iterdir()} == set(listing), style
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) < 8e6
    assert len(list(BUNDLED.glob("LICENSE-*.txt"))) == 3


def test_bundled_pictures_are_not_empty():
    for style in STYLES:
        pictures = load_pictures(BUNDLED, [style], ["unseen"], 12)
        assert len(pictures) == 12
        for picture in pictures:
            alpha = np.asarray(picture.image)[..., 3]
            assert picture.image.size in ((128, 128), (64, 64)) and (alpha > 128).mean() > 0.05


@pytest.mark.parametrize(
    ("rgb", "color"),
    [
        ((230, 30, 30), "red"), ((250, 140, 20), "orange"), ((250, 220, 40), "yellow"), ((40, 170, 60), "green"),
        ((40, 90, 220), "blue"), ((130, 50, 200), "purple"), ((250, 130, 180), "pink"), ((130, 80, 40), "brown"),
        ((250, 250, 250), ""), ((128, 128, 128), ""), ((10, 10, 10), ""),
    ],
)  # fmt: skip
def test_color_of_plain_pictures(rgb, color):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[..., :3] = rgb
    pixels[0, :, 3] = 0
    pixels[0, :, :3] = 0, 255, 0
    assert color_of(pixels) == color


def test_pictures_without_a_dominant_color():
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:5, :, :3], pixels[5:, :, :3] = (230, 30, 30), (40, 90, 220)
    assert color_of(pixels) == ""
    pixels[4:, :2, :3], pixels[4:, 2:5, :3], pixels[4:, 5:, :3] = (40, 90, 220), (40, 170, 60), (250, 220, 40)
    assert color_of(pixels) == "", "half of it is red, no other color comes near"
    assert color_of(np.zeros((8, 8, 4), np.uint8)) == ""


def test_colors_of_known_pictures():
    known = {"lemon": "yellow", "tomato": "red", "broccoli": "green", "blue circle": "blue", "dolphin": "blue"}
    pictures = {p.name: p for p in load_pictures(BUNDLED, ["noto"], ["detection", "grounding", "captions", "unseen"])}
    assert {name: pictures[name].color for name in known} == known
    assert not pictures["zebra"].color and not pictures["panda"].color
