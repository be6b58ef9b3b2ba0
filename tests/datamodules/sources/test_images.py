import numpy as np
import pytest
from made import made_cache
from PIL import Image

from datamodules.episodes import checked
from datamodules.sources import open_source
from lit_wm.errors import ConfigError

DATA = __file__.rsplit("/", 2)[0] + "/data"


def test_images_are_resized_and_grayed_as_environments_do_it():
    plain, small = (
        list(checked(open_source(f"npz:{DATA}/npz/atari_breakout.npz{q}"))) for q in ("", "?size=20")
    )
    gray = list(checked(open_source(f"npz:{DATA}/npz/atari_breakout.npz", size=[20, 32], gray=True)))
    for a, b, c in zip(plain, small, gray, strict=True):
        frame = np.moveaxis(a.observation["obs"][5], 0, -1)
        expected = np.asarray(Image.fromarray(frame).resize((20, 20), Image.Resampling.BILINEAR))
        assert np.array_equal(np.moveaxis(b.observation["obs"][5], 0, -1), expected)
        wide = np.asarray(Image.fromarray(frame).resize((32, 20), Image.Resampling.BILINEAR)).astype(float)
        luma = wide @ [0.299, 0.587, 0.114]
        assert c.observation["obs"].shape[1:] == (1, 20, 32)
        assert (np.abs(c.observation["obs"][5, 0] - luma) <= 1).all()
        assert np.array_equal(a.reward, b.reward)


def test_a_cache_of_another_size_is_another_cache(tmp_path):
    large, small = (made_cache(tmp_path, [4, 2], image=8, **o) for o in ({}, {"size": 4}))
    assert large.folder != small.folder
    assert small.rows["observation"].shape == (8, 4, 4, 3)
    again = made_cache(tmp_path, [4, 2], image=8, size=4)
    assert again.folder == small.folder
    back = list(checked(open_source(f"rows:{large.folder}?size=4")))
    assert np.array_equal(back[0].observation["obs"], small.rows["observation"].numpy()[:5])


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("made:3?size=4", "need an image; the observations of this Made source are obs"),
        ("made:3?image=8&size=0", "size=0; expected a number of pixels"),
        ("made:3?image=8&sise=4", "did you mean 'size'"),
    ],
)
def test_impossible_sizes_are_one_clear_error(uri, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        open_source(uri)
