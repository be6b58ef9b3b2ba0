"""Pictures of episodes, looked at through Pillow."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.episodes import Episode, Schema, Source
from datamodules.preview import preview
from datamodules.sources import open_source
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spaces, Spec

DATA = Path(__file__).parent / "data"
LENGTHS = [30, 4, 250]


class Frames(Source):
    """Episode e shows flat images of 20 x 24 whose red is its number + 1, green the step."""

    files: list[Path] = []
    meta: dict = {}

    def __init__(self, shape=(20, 24, 3), lengths=LENGTHS):
        entries = {"vector": Spec("float32", (2,)), "image": Spec("uint8", shape)}
        self.schema, self.lengths = Schema(Spaces(entries, {"action": Spec("int32", (), 3)})), lengths

    def episodes(self):
        for e, steps in enumerate(self.lengths):
            t, shape = np.arange(steps + 1), self.schema.spaces.obs["image"].shape
            frames = np.zeros((steps + 1, 20, 24, 3), np.uint8)
            frames[..., 0], frames[..., 1] = e + 1, t[:, None, None]
            if shape[0] == 3:
                frames = np.moveaxis(frames, -1, 1)
            elif shape[-1] != 3:
                frames = frames[..., 1:2]
            end = t[1:] == steps
            vector = np.stack([t, -t], 1) + (np.nan if e == 99 else 0)
            yield Episode(
                {"vector": vector, "image": frames}, {"action": t[1:] % 3}, t[1:], end, end & False, f"{e}"
            )


def colours(row: np.ndarray, count: int) -> list[tuple[int, ...]]:
    """Red and green in the middle of frames of 24 pixels with 2 between them."""
    return [tuple(row[10, i * 26 + 12, :2].tolist()) for i in range(count)]


@pytest.mark.parametrize("shape", [(20, 24, 3), (3, 20, 24)])
def test_a_contact_sheet(shape, tmp_path):
    path = preview(Frames(shape), tmp_path / "deep" / "a.png", episodes=5)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * 22, 10 * 26, 3)
    for e, steps in enumerate(LENGTHS):
        row, count = sheet[e * 22 :], min(10, steps + 1)
        spread = [round(x) for x in np.linspace(0, steps, count)]
        assert colours(row, count) == [(e + 1, t) for t in spread]
        assert (row[:20, count * 26 :] == 255).all()


def test_grey_frames(tmp_path):
    sheet = np.asarray(Image.open(preview(Frames((20, 24, 1)), tmp_path / "a.png", 1)))
    assert sheet[10, 9 * 26 + 12].tolist() == [30, 30, 30]


def test_a_gif_of_episodes_side_by_side(tmp_path):
    with Image.open(preview(Frames(), tmp_path / "a.GIF", 3)) as gif:
        assert (gif.n_frames, gif.size) == (200, (3 * 26, 20))
        for t in (0, 3, 100):
            gif.seek(t)
            want = [(e + 1, min(t, steps)) for e, steps in enumerate(LENGTHS)]
            found = colours(np.asarray(gif.convert("RGB")), 3)
            np.testing.assert_allclose(found, want, atol=8)  # 256 colours


def test_curves(tmp_path):
    path = preview(Frames(), tmp_path / "a.png", 2, entry="vector")
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 80, 3 * 322, 3)  # vector, action and reward of two episodes
    blue = (sheet == (31, 119, 180)).all(-1)[14:78, :320]
    top = [np.flatnonzero(column)[0] for column in blue.T[::40] if column.any()]
    assert top == sorted(top, reverse=True)  # t goes up
    assert len(set(top)) == 7
    only = preview(open_source(f"minari:{DATA}/minari/pendulum/arrow-v0"), tmp_path / "b.png", 1)
    assert np.asarray(Image.open(only)).shape == (80, 3 * 322, 3)


def test_bad_episodes_are_left_out_and_wrong_wishes_refused(tmp_path):
    source = Frames(lengths=[3] * 100)
    assert np.asarray(Image.open(preview(source, tmp_path / "a.png", 100))).shape[0] == 99 * 22
    for name, options, message in (
        ("a.jpg", {}, "expected 1 or more in a .png"),
        ("a.png", {"episodes": 0}, "0 episodes: expected 1 or more"),
        ("a.gif", {"entry": "vector"}, "or images in a .gif"),
        ("a.png", {"entry": "imag"}, "no observation 'imag'; did you mean 'image'"),
    ):
        with pytest.raises(ConfigError, match=message):
            preview(Frames(), tmp_path / name, **options)
    with pytest.raises(DataError, match="no episode to show"):
        preview(Frames(lengths=[0, 0]), tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
