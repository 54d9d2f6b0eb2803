"""A folder of small images, for annotation files that tests write."""

from pathlib import Path

import pytest

from tests.data.conftest import write_image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """img0.png to img3.png, 24 x 32 pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        write_image(folder / f"img{i}.png", 24, 32, i)
    return folder
