import numpy as np
import pytest
from PIL import Image

from glip_jax.data.scenes import draw as scenes
from glip_jax.data.scenes.backgrounds import Light, background, light
from glip_jax.data.scenes.draw import SceneError, SceneStyle, draw_scene
from glip_jax.data.scenes.pictures import Picture

COLORS = {"red square": (255, 0, 0), "green square": (0, 255, 0), "blue square": (0, 0, 255)}
STYLE = SceneStyle(height=96, width=128, objects=(3, 6), sides=(16.0, 40.0))


@pytest.fixture
def squares():
    return [
        Picture(name, "detection", "plain", Image.new("RGBA", (32, 32), (*color, 255)))
        for name, color in COLORS.items()
    ]


def test_scenes_are_deterministic(squares):
    first, again, other = (draw_scene(squares, 3, index, STYLE) for index in (5, 5, 6))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert first.caption == again.caption and first.phrases == again.phrases
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(first.image, draw_scene(squares, 4, 5, STYLE).image)


def test_boxes_are_tight_around_the_visible_pixels(squares):
    # Without light and rotation pure colors are found again: a name's boxes must be exactly around where they show.
    still = SceneStyle(
        height=96, width=128, objects=(5, 9), sides=(16.0, 40.0), rotation=0.0, min_visible=0.3, light=False
    )
    covered = 0
    for index in range(20):
        scene = draw_scene(squares, 0, index, still, captioned=index % 2 == 0)
        for i, color in enumerate(COLORS.values()):
            boxes = scene.boxes[scene.pictures == i]
            shown = (scene.image == np.array(color)).all(-1)
            if not len(boxes):
                continue
            rows, columns = np.nonzero(shown)
            # Cells of noise can hit a pure color by chance only where stripes are saturated: stay inside the boxes.
            inside = np.zeros_like(shown)
            for x1, y1, x2, y2 in boxes.astype(int):
                inside[y1:y2, x1:x2] = True
                region = shown[y1:y2, x1:x2]
                assert region.any(1)[[0, -1]].all() and region.any(0)[[0, -1]].all(), "a side of the box shows nothing"
                covered += not region.all()
            assert inside[rows, columns].mean() > 0.99
    assert covered > 5, "no scene had an overlap to look at"


def test_every_picture_stays_visible_enough(squares):
    style = SceneStyle(
        height=64, width=64, objects=(9, 9), sides=(30.0, 40.0), rotation=0.0, min_visible=0.6, light=False
    )
    for index in range(10):
        scene = draw_scene(squares, 1, index, style)
        assert 1 <= len(scene.boxes) <= 9
        for i, color in enumerate(COLORS.values()):
            shown = (scene.image == np.array(color)).all(-1).sum()
            assert shown >= 0.6 * 30 * 30 * (scene.pictures == i).sum() * 0.9


def test_light_changes_pixels_and_no_box(squares):
    dark = [draw_scene(squares, 1, index, STYLE) for index in range(4)]
    plain = [
        draw_scene(squares, 1, index, SceneStyle(96, 128, (3, 6), (16.0, 40.0), light=False)) for index in range(4)
    ]
    for lit, unlit in zip(dark, plain):
        np.testing.assert_array_equal(lit.boxes, unlit.boxes)
        assert (lit.image != unlit.image).any()


def test_light_keeps_colors_and_darkens_on_the_far_side():
    for seed in range(20):
        shine = light(np.random.default_rng(seed), 32, 48)
        assert shine.gain.shape == (32, 48, 3) and 0.6 < shine.gain.min() and shine.gain.max() < 1.4
        cast = shine.gain.max(-1) / shine.gain.min(-1)
        assert cast.max() < 1.13
    assert background(np.random.default_rng(0), 20, 30).shape == (20, 30, 3)


def test_shadows_darken_only_the_surroundings_of_an_object(squares, monkeypatch):
    def shine(strength):
        return lambda rng, height, width: Light(np.ones((height, width, 3), np.float32), (strength, 6.0, 6.0, 3.0))

    drawn = []
    for strength in (0.0, 0.8):
        monkeypatch.setattr(scenes, "light", shine(strength))
        drawn.append(draw_scene(squares, 1, 0, SceneStyle(96, 128, (1, 1), (30.0, 40.0), relational=0.0)))
    (x1, y1, x2, y2) = drawn[0].boxes[0].astype(int)
    change = drawn[0].image.astype(int).sum(-1) - drawn[1].image.astype(int).sum(-1)
    assert change.min() >= 0 and change[y2 : y2 + 3, x1 + 10 : x2].mean() > 10
    assert change[y1 + 12 : y2 - 12, x1 + 12 : x2 - 12].max() == 0


def test_styles_of_one_name_mix(squares):
    other = [Picture(p.name, p.split, "other", p.image.transpose(Image.Transpose.ROTATE_90)) for p in squares]
    both = sorted(squares + other, key=lambda picture: picture.name)
    shown = {both[i].style for index in range(6) for i in draw_scene(both, 0, index, STYLE).pictures}
    assert shown == {"plain", "other"}
    scene = draw_scene(both, 0, 0, STYLE)
    assert scene.names == tuple(both[i].name for i in scene.pictures)


def test_missing_pictures_and_small_canvases_are_refused(squares):
    with pytest.raises(SceneError, match="at least one picture"):
        draw_scene([], 0, 0)
    with pytest.raises(SceneError, match="20 x 256 is smaller"):
        draw_scene(squares, 0, 0, SceneStyle(height=20))


def test_a_scene_of_a_single_name(squares):
    scene = draw_scene(squares[:1], 0, 0, STYLE)
    assert set(scene.names) == {"red square"} and scene.caption
