import json
import os
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from glip_jax.data.scenes import sets
from glip_jax.data.scenes.draw import SceneError, SceneStyle, draw_scene
from glip_jax.data.scenes.pictures import Picture
from glip_jax.data.scenes.sets import SceneSet, finished, make_scenes

COLORS = {"blue square": (0, 0, 255), "green square": (0, 255, 0), "red square": (255, 0, 0)}
STYLE = SceneStyle(height=96, width=128, objects=(3, 6), sides=(16.0, 40.0))


def squares():
    return [Picture(n, "detection", "plain", Image.new("RGBA", (32, 32), (*c, 255))) for n, c in COLORS.items()]


def scenes(kind: Literal["detection", "grounding", "captions"] = "detection", count=4, seed=7):
    return SceneSet(kind, count, seed, squares(), STYLE)


def read(path):
    return json.loads(path.read_text())


def test_detection_sets_are_in_coco_format(tmp_path):
    assert make_scenes(tmp_path / "det", scenes()) is True
    content = read(tmp_path / "det" / "annotations.json")
    assert [c["name"] for c in content["categories"]] == list(COLORS)
    assert len(content["images"]) == 4 and "caption" not in content["images"][0]
    scene = draw_scene(squares(), 7, 1, STYLE, captioned=False)
    rows = [a for a in content["annotations"] if a["image_id"] == 2]
    np.testing.assert_allclose([a["bbox"][:2] for a in rows], scene.boxes[:, :2])
    np.testing.assert_allclose([a["bbox"][2:] for a in rows], scene.boxes[:, 2:] - scene.boxes[:, :2])
    assert [a["category_id"] for a in rows] == (scene.pictures + 1).tolist()
    with Image.open(tmp_path / "det" / "images" / content["images"][1]["file_name"]) as image:
        assert image.size == (128, 96)
        assert np.abs(np.asarray(image, np.float32) - scene.image).mean() < 20


def test_grounding_sets_are_in_mdetr_format_with_kinds_of_phrases(tmp_path):
    make_scenes(tmp_path / "g", scenes("grounding", 12))
    content = read(tmp_path / "g" / "annotations.json")
    images = {image["id"]: image for image in content["images"]}
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"]) > 0
    phrase_spans = {i: [] for i in images}
    for annotation in content["annotations"]:
        (span,) = annotation["tokens_positive"]
        caption = images[annotation["image_id"]]["caption"]
        assert "square" in caption[slice(*span)]
        phrase_spans[annotation["image_id"]].append(span)
    kinds = set()
    for identity, image in images.items():
        assert all(
            p["span"] in phrase_spans[identity] and p["kind"] in ("plain", "relational") for p in image["phrases"]
        )
        assert len(image["phrases"]) == len({tuple(s) for s in phrase_spans[identity]})
        kinds |= {p["kind"] for p in image["phrases"]}
    assert kinds == {"plain", "relational"}


def test_caption_sets_have_no_boxes_and_a_separate_ground_truth(tmp_path):
    make_scenes(tmp_path / "c", scenes("captions"))
    captions, truth = read(tmp_path / "c" / "annotations.json"), read(tmp_path / "c" / "truth.json")
    assert set(captions) == {"info", "images", "annotations"}
    assert all(set(a) == {"id", "image_id", "caption"} for a in captions["annotations"])
    assert all("caption" not in image for image in captions["images"])
    assert [a["caption"] for a in captions["annotations"]] == [image["caption"] for image in truth["images"]]
    assert all(a["tokens_positive"] and a["bbox"] for a in truth["annotations"])


@pytest.mark.processes
def test_any_number_of_processes_gives_the_same_files(tmp_path):
    for processes in (1, 2):
        make_scenes(tmp_path / str(processes), scenes("grounding", 70), processes)
    one, two = tmp_path / "1", tmp_path / "2"
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 71
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    assert sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file()) == files


def test_finished_scenes_are_kept_and_other_settings_are_refused(tmp_path):
    out = tmp_path / "det"
    assert make_scenes(out, scenes()) and finished(out, scenes())
    before = (out / "annotations.json").stat().st_mtime_ns
    assert make_scenes(out, scenes()) is False
    assert (out / "annotations.json").stat().st_mtime_ns == before
    with pytest.raises(SceneError, match="differ in count, seed"):
        make_scenes(out, scenes(count=5, seed=8))
    # As earlier versions wrote it.
    written = read(out / "annotations.json")
    written["info"]["style"]["least_visible"] = written["info"]["style"].pop("min_visible")
    (out / "annotations.json").write_text(json.dumps(written))
    assert make_scenes(out, scenes()) is False
    other = squares()
    other[0].image.putpixel((0, 0), (9, 9, 9, 255))
    with pytest.raises(SceneError, match="differ in pictures:"):
        make_scenes(out, SceneSet("detection", 4, 7, other, STYLE))


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "det").mkdir()
    (tmp_path / "det" / "mine.txt").write_text("mine")
    with pytest.raises(SceneError, match="holds no finished scenes"):
        make_scenes(tmp_path / "det", scenes())
    assert (tmp_path / "det" / "mine.txt").read_text() == "mine"


def test_an_interrupted_set_is_removed_and_drawn_again(tmp_path, monkeypatch):
    made = sets.draw_scene

    def stops(pictures, seed, index, *args, **kwargs):
        if index == 2:
            raise KeyboardInterrupt
        return made(pictures, seed, index, *args, **kwargs)

    monkeypatch.setattr(sets, "draw_scene", stops)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "det", scenes())
    assert not list(tmp_path.iterdir())
    # What a killed process leaves does not count either.
    (tmp_path / ".det.partial" / "images").mkdir(parents=True)
    (tmp_path / ".det.partial" / "images" / "999999.jpg").write_bytes(b"half")
    monkeypatch.undo()
    assert make_scenes(tmp_path / "det", scenes())
    assert sorted(os.listdir(tmp_path)) == ["det"] and len(os.listdir(tmp_path / "det" / "images")) == 4


@pytest.mark.parametrize(("count", "processes", "message"), [(0, 1, "count is 0"), (4, -1, "processes is -1")])
def test_invalid_settings_are_refused(tmp_path, count, processes, message):
    with pytest.raises(SceneError, match=message):
        make_scenes(tmp_path / "det", scenes(count=count), processes)


def test_absent_names_are_listed_also_those_that_differ_in_the_color(tmp_path):
    """Two squares are shown at most; a third name is a look-alike of both, and so are colors that no picture has."""
    pictures = [
        *squares()[:2],
        Picture("blue ring", "detection", "plain", Image.new("RGBA", (32, 32), (0, 0, 255, 255))),
    ]
    chosen = SceneSet("detection", 6, 7, pictures, STYLE, known_absent=True, look_alikes=True)
    make_scenes(tmp_path / "det", chosen)
    content = read(tmp_path / "det" / "annotations.json")
    assert [c["name"] for c in content["categories"]] == [
        "blue square", "green square", "blue ring", "orange square", "red square", "orange ring",
    ]  # fmt: skip
    names = {c["id"]: c["name"] for c in content["categories"]}
    seen = set()
    for image in content["images"]:
        shown = {names[a["category_id"]] for a in content["annotations"] if a["image_id"] == image["id"]}
        assert shown.isdisjoint(image["known_absent"]) and shown | set(image["known_absent"]) == set(names.values())
        things = {name.split(" ")[1] for name in shown}
        assert image["look_alikes"] == [n for n in image["known_absent"] if n.split(" ")[1] in things]
        seen |= shown
    assert seen == {"blue square", "green square", "blue ring"}
    plain = SceneSet("detection", 6, 7, pictures, STYLE)
    make_scenes(tmp_path / "plain", plain)
    assert not {"known_absent", "look_alikes"} & set(read(tmp_path / "plain" / "annotations.json")["images"][0])


def test_a_name_that_may_be_true_of_what_is_shown_is_not_absent():
    found = sets._absent(
        ["police car", "red apple"], ["car", "police car", "red apple", "green apple", "dog"], ["yellow apple"]
    )
    assert found == {
        "known_absent": ["green apple", "dog", "yellow apple"],
        "look_alikes": ["green apple", "yellow apple"],
    }
