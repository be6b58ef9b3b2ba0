"""Open-loop prediction, its errors and its picture, on a model whose world is known."""

import numpy as np
import pytest
import torch
from PIL import Image

from lit_wm.functional import symlog
from lit_wm.openloop import (
    open_loop,
    open_loop_errors,
    posterior,
    reconstruct,
    video_grid,
    write_gif,
)
from lit_wm.types import State, States, Trajectory


class Counter:
    """A world whose state is one number: what it saw last, plus the sum of the actions since."""

    def encode(self, obs, state, action, is_first):
        return State(obs["image"].float().flatten(1)[:, :1])

    def imagine(self, state, actions, horizon):
        steps = actions["action"].float().cumsum(1)
        deter = torch.cat([state.deter[:, None], state.deter[:, None] + steps], 1)
        zeros = torch.zeros(deter.shape[0], horizon)
        return Trajectory(States(State(deter)), actions, zeros, zeros)

    def decode(self, state):
        return {"image": (state.deter / 255)[..., None, None].expand(*state.deter.shape[:-1], 4, 4, 3)}


def window(batch=2, length=8):
    """Frames whose brightness is the running sum of the actions, so that the dream can be right."""
    action = torch.full((batch, length, 1), 3.0)
    level = 10 + action.cumsum(1)
    image = level[..., None, None].expand(batch, length, 4, 4, 3).to(torch.uint8)
    is_first = torch.zeros(batch, length, dtype=torch.bool)
    is_first[:, 0] = True
    return {"image": image}, {"action": action}, is_first


def test_the_dream_follows_the_recorded_actions():
    obs, action, is_first = window()
    prediction = open_loop(Counter(), obs, action, is_first, context=3)
    torch.testing.assert_close(prediction["image"] * 255, obs["image"].float())


def test_the_dream_never_sees_the_frames_after_its_context():
    obs, action, is_first = window()
    before = open_loop(Counter(), obs, action, is_first, context=3)["image"]
    obs["image"][:, 3:] = 0
    assert torch.equal(before, open_loop(Counter(), obs, action, is_first, context=3)["image"])


def test_posterior_stacks_time_on_axis_one():
    obs, action, is_first = window(batch=2, length=5)
    assert posterior(Counter(), obs, action, is_first).deter.shape == (2, 5, 1)


@pytest.mark.parametrize("context", [0, 8, 9])
def test_a_context_without_seen_or_dreamed_frames_is_refused(context):
    obs, action, is_first = window()
    with pytest.raises(ValueError, match="context must be at least 1 and less than the 8 frames"):
        open_loop(Counter(), obs, action, is_first, context)


def test_errors_of_a_perfect_model_are_zero_and_of_the_baselines_as_computed_by_hand():
    obs, action, is_first = window(batch=1, length=8)
    levels = torch.arange(13, 37, 3).float()  # 13 .. 34
    mean = {"image": torch.full((4, 4, 3), float(levels.mean()) / 255)}
    model = Counter()
    errors = open_loop_errors(
        obs,
        reconstruct(model, obs, action, is_first),
        open_loop(model, obs, action, is_first, 3),
        context=3,
        horizons=(2, 5, 15),
        mean=mean,
    )
    assert errors["reconstruction/image"] == pytest.approx(0, abs=1e-12)
    assert errors["open_loop_5/image"] == pytest.approx(0, abs=1e-12)
    assert errors["repeat_last_2/image"] == pytest.approx((6 / 255) ** 2, rel=1e-5)
    assert errors["repeat_last_5/image"] == pytest.approx((15 / 255) ** 2, rel=1e-5)
    assert errors["mean_frame/image"] == pytest.approx(float(levels.var(correction=0)) / 255**2, rel=1e-5)
    assert errors["mean_frame_5/image"] == pytest.approx(
        float(levels[7] - levels.mean()) ** 2 / 255**2, rel=1e-5
    )
    assert "open_loop_15/image" not in errors  # beyond the window
    assert not any(name.startswith("moving/") for name in errors)  # nothing is further than 0.1 from the mean


def test_moving_pixels_are_those_far_from_the_mean_frame():
    truth = torch.zeros(1, 4, 4, 4, 3, dtype=torch.uint8)
    truth[:, :, 1, 2, 0] = 255  # one pixel, one channel
    guess = torch.zeros(1, 4, 4, 4, 3)
    errors = open_loop_errors(
        {"image": truth}, {"image": guess}, {"image": guess}, 1, (1,), {"image": guess[0, 0]}
    )
    assert errors["moving/reconstruction/image"] == pytest.approx(
        1 / 3
    )  # one of the pixel's three channels is wrong
    assert errors["reconstruction/image"] == pytest.approx(1 / 48)
    first = {"image": truth.permute(0, 1, 4, 2, 3).repeat(1, 1, 1, 8, 8)}  # channels first
    guess = {"image": torch.zeros(1, 4, 3, 32, 32)}
    errors = open_loop_errors(first, guess, guess, 1, (1,), {"image": guess["image"][0, 0]})
    assert errors["moving/open_loop_1/image"] == pytest.approx(1 / 3)


def test_vectors_are_compared_in_symlog_units_and_classes_by_share():
    obs = {"speed": torch.tensor([[[100.0], [100.0]]]), "card": torch.tensor([[1, 2]], dtype=torch.int32)}
    guess = {"speed": torch.tensor([[[100.0], [0.0]]]), "card": torch.tensor([[1, 1]])}
    errors = open_loop_errors(obs, guess, guess, 1, (1,))
    assert errors["open_loop_1/speed"] == pytest.approx(float(symlog(torch.tensor(100.0))) ** 2, rel=1e-5)
    assert errors["reconstruction/card"] == pytest.approx(0.5)
    assert errors["open_loop_1/card"] == pytest.approx(1.0)
    assert errors["repeat_last_1/speed"] == 0


def test_frames_that_do_not_exist_do_not_count():
    obs, _, _ = window(batch=1, length=4)
    guess = {"image": obs["image"].float() / 255}
    guess["image"][:, 2:] = 7.0
    valid = torch.tensor([[True, True, False, False]])
    errors = open_loop_errors(obs, guess, guess, 1, (1, 2), valid=valid)
    assert errors["reconstruction/image"] == pytest.approx(0, abs=1e-12)
    assert "open_loop_2/image" not in errors


def test_video_grid_has_the_official_layout():
    truth = torch.randint(0, 256, (3, 12, 6, 5, 3), dtype=torch.uint8)
    pred = torch.rand(3, 12, 6, 5, 3)
    grid = video_grid(truth, pred, context=6)
    assert grid.dtype == torch.uint8
    assert grid.shape == (22, 3 * 6 + 4, 3 * (5 + 4), 3)
    assert (grid[12:] == 0).all()
    assert (grid[:6, 0] == torch.tensor([0, 255, 0])).all()
    assert (grid[6:12, :, 1] == torch.tensor([255, 0, 0])).all()
    for row in range(3):
        cell = grid[:12, 2:-2, row * 9 + 2 : row * 9 + 7]
        shown = (pred[row] * 255).to(torch.uint8)
        error = ((shown.int() - truth[row].int() + 255) / 2).to(torch.uint8)
        assert torch.equal(cell, torch.cat([truth[row], shown, error], 1))


def test_video_grid_appends_no_more_black_frames_than_there_are_frames_and_shows_gray_as_rgb():
    truth = torch.full((1, 4, 2, 2, 1), 9, dtype=torch.uint8)
    grid = video_grid(truth, truth, context=2)
    assert grid.shape == (8, 10, 6, 3)
    assert (grid[0, 2:4, 2:4] == 9).all()


def test_video_grid_refuses_float_truth():
    with pytest.raises(ValueError, match="must be uint8"):
        video_grid(torch.zeros(1, 4, 2, 2, 3), torch.zeros(1, 4, 2, 2, 3), 2)


def test_gif_is_endless_and_runs_at_fifteen_frames_per_second(tmp_path):
    video = torch.randint(0, 256, (30, 8, 8, 3), dtype=torch.uint8)
    path = write_gif(tmp_path / "videos" / "dream.gif", video)
    with Image.open(path) as gif:
        assert gif.n_frames == 30
        assert gif.info["loop"] == 0
        total = 0
        for frame in range(gif.n_frames):
            gif.seek(frame)
            total += gif.info["duration"]
    assert total == 2000
    assert [p.name for p in path.parent.iterdir()] == ["dream.gif"]


def test_video_grid_equals_the_official_picture(golden):
    video = golden["report/openloop/image"]  # (T + 6, 3H + 4, B * (W + 4), 3) of 2 x 6 frames, context 3
    cells = torch.from_numpy(video[:6].reshape(6, 196, 2, 68, 3).transpose(2, 0, 1, 3, 4).copy())
    inner = cells[:, :, 2:-2, 2:-2]
    assert np.array_equal(video_grid(inner[:, :, :64], inner[:, :, 64:128], context=3).numpy(), video)


@pytest.fixture
def golden():
    from pathlib import Path

    path = Path(__file__).parents[1] / "parity" / "data" / "dreamerv3" / "img_forward.npz"
    with np.load(path, allow_pickle=False) as data:
        yield data
