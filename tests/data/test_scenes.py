import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glip_jax.data.scene_captions import describe, noun_phrase, plural
from glip_jax.data.scenes import Picture, SceneError, SceneStyle, draw_scene, load_pictures, make_scenes

BUNDLED = Path(__file__).resolve().parents[2] / "gcs" / "sample" / "pictures"
COLOURS = {"red square": (255, 0, 0), "green square": (0, 255, 0), "blue square": (0, 0, 255)}
STYLE = SceneStyle(height=96, width=128, objects=(3, 6), sides=(16, 40))


@pytest.fixture
def squares():
    return [Picture(name, Image.new("RGBA", (32, 32), (*colour, 255))) for name, colour in COLOURS.items()]


def test_the_same_scene_again_and_another_one(squares):
    first, again, other = (draw_scene(squares, 3, index, STYLE) for index in (5, 5, 6))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert first.caption == again.caption and first.spans == again.spans
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(first.image, draw_scene(squares, 4, 5, STYLE).image)


def test_boxes_are_those_of_the_visible_pixels(squares):
    # Without noise around them pure colours are found again: the union of a name's boxes must be exactly where it shows.
    still = SceneStyle(height=96, width=128, objects=(5, 9), sides=(16, 40), rotation=0.0, least_visible=0.3)
    covered = 0
    for index in range(20):
        scene = draw_scene(squares, 0, index, still)
        for i, colour in enumerate(COLOURS.values()):
            boxes = scene.boxes[scene.names == i]
            shown = (scene.image == np.array(colour)).all(-1)
            if not len(boxes):
                continue
            rows, columns = np.nonzero(shown)
            # Cells of noise can hit a pure colour by chance only where stripes are saturated: stay inside the boxes.
            inside = np.zeros_like(shown)
            for x1, y1, x2, y2 in boxes.astype(int):
                inside[y1:y2, x1:x2] = True
                region = shown[y1:y2, x1:x2]
                assert region.any(1)[[0, -1]].all() and region.any(0)[[0, -1]].all(), "a side of the box shows nothing"
                covered += not region.all()
            assert inside[rows, columns].mean() > 0.99
    assert covered > 5, "no scene had an overlap to look at"


def test_every_picture_stays_visible_enough(squares):
    style = SceneStyle(height=64, width=64, objects=(9, 9), sides=(30, 40), rotation=0.0, least_visible=0.6)
    for index in range(10):
        scene = draw_scene(squares, 1, index, style)
        assert 1 <= len(scene.boxes) <= 9
        for i, colour in enumerate(COLOURS.values()):
            shown = (scene.image == np.array(colour)).all(-1).sum()
            assert shown >= 0.6 * 30 * 30 * (scene.names == i).sum() * 0.9


def test_captions_speak_of_what_is_there(squares):
    for index in range(50):
        scene = draw_scene(squares, 2, index, STYLE)
        for box, name, (begin, end) in zip(scene.boxes, scene.names, scene.spans, strict=True):
            words = scene.caption[begin:end]
            if words:
                assert list(COLOURS)[name] in words
                assert box[2] > box[0] and box[3] > box[1]
        assert any(end for _, end in scene.spans)


def test_relations_hold_for_all_boxes():
    boxes = np.array([[0, 0, 20, 20], [100, 0, 120, 20], [100, 60, 120, 80]], np.float32)
    seen = set()
    for seed in range(40):
        caption, spans = describe(np.random.default_rng(seed), ["snail", "red apple", "red apple"], boxes, (10, 100))
        assert spans[1] == spans[2]
        seen.add(caption.replace("small ", ""))
    assert seen == {"a snail left of two red apples", "two red apples right of a snail"}


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("ant", 1, "an ant"), ("red apple", 2, "two red apples"), ("jeans", 3, "some jeans"), ("mouse", 4, "four mice"),
        ("bus", 2, "two buses"), ("cherries", 1, "some cherries"), ("lady", 2, "two ladies"), ("key", 12, "12 keys"),
    ],
)  # fmt: skip
def test_noun_phrases(name, count, words):
    assert noun_phrase(name, count) == words


def test_plural_looks_at_the_last_word():
    assert plural("maple leaf") == "maple leaves"


def test_coco_form(squares, tmp_path):
    path = make_scenes(str(tmp_path / "det"), "detection", 4, 7, squares, STYLE)
    content = json.loads(path.read_text())
    assert [c["name"] for c in content["categories"]] == list(COLOURS)
    assert len(content["images"]) == 4
    scene = draw_scene(squares, 7, 1, STYLE)
    rows = [a for a in content["annotations"] if a["image_id"] == 2]
    np.testing.assert_allclose([a["bbox"][:2] for a in rows], scene.boxes[:, :2])
    np.testing.assert_allclose([a["bbox"][2:] for a in rows], scene.boxes[:, 2:] - scene.boxes[:, :2])
    assert [a["category_id"] for a in rows] == (scene.names + 1).tolist()
    with Image.open(tmp_path / "det" / "images" / content["images"][1]["file_name"]) as image:
        assert image.size == (128, 96)
        assert np.abs(np.asarray(image, np.float32) - scene.image).mean() < 20


def test_mdetr_form(squares, tmp_path):
    content = json.loads(make_scenes(str(tmp_path / "g"), "grounding", 4, 7, squares, STYLE).read_text())
    captions = {image["id"]: image["caption"] for image in content["images"]}
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"]) > 0
    for annotation in content["annotations"]:
        ((begin, end),) = annotation["tokens_positive"]
        assert "square" in captions[annotation["image_id"]][begin:end]


def test_finished_scenes_stay_and_others_are_refused(squares, tmp_path):
    out = str(tmp_path / "det")
    path = make_scenes(out, "detection", 2, 7, squares, STYLE)
    before = path.stat().mtime
    assert make_scenes(out, "detection", 2, 7, squares, STYLE).stat().mtime == before
    with pytest.raises(SceneError, match="differ in count, seed"):
        make_scenes(out, "detection", 3, 8, squares, STYLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "names.json").unlink(), "names.json is not there"),
        (lambda root: (root / "names.json").write_text("[1]"), "cannot be read"),
        (lambda root: (root / "a.png").write_bytes(b"no picture"), "'ant'.*no readable picture"),
    ],
)
def test_bad_folders_give_one_message(tmp_path, change, message):
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "names.json").write_text(json.dumps({"a.png": {"name": "ant", "split": "training"}}))
    assert [p.name for p in load_pictures(str(tmp_path))] == ["ant"]
    with pytest.raises(SceneError, match="1 pictures of split 'training', 2"):
        load_pictures(str(tmp_path), limit=2)
    change(tmp_path)
    with pytest.raises(SceneError, match=message):
        load_pictures(str(tmp_path))


def test_a_scene_needs_pictures_and_room(squares):
    with pytest.raises(SceneError, match="at least one picture"):
        draw_scene([], 0, 0)
    with pytest.raises(SceneError, match="20 x 256 is smaller"):
        draw_scene(squares, 0, 0, SceneStyle(height=20))


def test_the_bundled_pictures():
    training, held_out = (load_pictures(str(BUNDLED), split) for split in ("training", "held-out"))
    names = [p.name for p in training + held_out]
    assert len(names) == len(set(names)) == 240
    assert len(held_out) == 44
    assert {len(p.image.getbands()) for p in training} == {4}
    listing = json.loads((BUNDLED / "names.json").read_text())
    for file, entry in listing.items():
        assert int(file.removesuffix(".webp"), 16) >= 0x1F000
        assert unicodedata.name(chr(int(file.removesuffix(".webp"), 16))), entry
    assert sum(f.stat().st_size for f in BUNDLED.iterdir()) < 3e6
