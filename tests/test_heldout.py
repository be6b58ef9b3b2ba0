"""Figures of held-out episodes, on a model whose world is known, beside figures computed by hand."""

import numpy as np
import pytest
import torch

from lit_wm.heldout import calibration, foresee
from lit_wm.noise import NoiseStreams
from lit_wm.tasks import Task
from lit_wm.types import Batch, State, States, Trajectory

LENGTHS = (9, 6, 3)  # observations; the second episode is terminated, the last is short
GAMMA = 0.9


class Line:
    """A world of one number x, x' = x + a, r = 2 x', which ends where x' reaches 100.

    The model believes x' = x + a + drift, and that a reward is worth one more than it is.
    """

    decodes, reward_scale, contdisc, noise = True, 1.0, False, None
    drift, optimism, sure = 0.0, 0.0, 1.0

    def gamma(self, task):
        return GAMMA

    def encode(self, obs, state, action, is_first):
        return State(obs["x"].float())

    def imagine(self, state, actions, horizon):
        steps = (actions["a"] + self.drift).cumsum(1)
        deter = torch.cat([state.deter[:, None], state.deter[:, None] + steps], 1)
        x = deter[:, 1:, 0]
        ends = (x >= 100).float()
        goes_on = (self.sure * (1 - ends) + (1 - self.sure) * ends) * (GAMMA if self.contdisc else 1)
        return Trajectory(States(State(deter)), actions, self.reward_scale * (2 * x + self.optimism), goes_on)

    def decode(self, state):
        return {"x": state.deter}

    def q(self, state, action):
        return self.reward_scale * self.values[state.deter[:, 0].long()]


def episodes(fake=False):
    """Three episodes along x = 10 e + t (the second jumps to 100 at its end), filled up with rubbish."""
    E, T = len(LENGTHS), max(LENGTHS)
    x = torch.full((E, T, 1), 7777.0)
    action, reward = torch.full((E, T, 1), 55.0), torch.full((E, T), -999.0)
    terminal, valid = torch.zeros(E, T, dtype=torch.bool), torch.zeros(E, T, dtype=torch.bool)
    for e, n in enumerate(LENGTHS):
        x[e, :n, 0] = 10 * e + torch.arange(n)
        valid[e, :n] = True
    x[1, 5], terminal[1, 5] = 100, True
    for e, n in enumerate(LENGTHS):
        action[e, 0], reward[e, 0] = 0, 0
        action[e, 1:n] = x[e, 1:n] - x[e, : n - 1]
        reward[e, 1:n] = 2 * x[e, 1:n, 0]
    first = torch.zeros(E, T, dtype=torch.bool)
    batch = Batch({"x": x}, {"a": action}, reward, first, ~valid, terminal, info={"valid": valid})
    if fake:
        batch.fake = torch.zeros_like(valid)
        batch.fake[0, 8] = True
    return batch


def returns(batch, e, bootstrap=0.0):
    """Discounted rewards after each step of an episode."""
    G = [bootstrap]
    for r in reversed(batch.reward[e, 1 : LENGTHS[e]].tolist()):
        G.append(r + GAMMA * G[-1])
    return G[::-1]


@pytest.fixture
def model():
    line = Line()
    line.values = torch.zeros(8000)
    return line


def test_a_perfect_model_has_no_error(model):
    found = foresee(model, episodes(), horizons=(1, 2, 5, 15), context=3)
    # From step 2 of nine a dream of five reaches; none reaches 15.
    names = {f"{n}@{h}" for n in ("open_loop/x", "reward/error", "reward/relative", "continue/error")
             for h in (1, 2, 5)}  # fmt: skip
    assert {k for k in found if "@" in k} == names
    assert all(found[k] == pytest.approx(0, abs=1e-6) for k in names)


def test_errors_of_a_drifting_model_are_those_computed_by_hand(model):
    model.drift, model.optimism, model.sure = 0.5, 3.0, 0.8
    batch = episodes()
    found = foresee(model, batch, horizons=(1, 2, 5), context=3)
    valid = batch.info["valid"]
    x = batch.obs["x"][valid].numpy()
    for h in (1, 2):
        assert found[f"open_loop/x@{h}"] == pytest.approx((0.5 * h) ** 2 / x.var(), rel=1e-5)
        assert found[f"reward/error@{h}"] == pytest.approx(2 * 0.5 * h + 3)
        assert found[f"continue/error@{h}"] == pytest.approx(0.04, rel=1e-4)
    r = np.concatenate([batch.reward[e, 1:n].numpy() for e, n in enumerate(LENGTHS)])
    assert found["reward/relative@2"] == pytest.approx(5 / np.abs(r - np.median(r)).mean(), rel=1e-5)
    # What it cannot know: without drift in the action that kills, the end is missed.
    model.drift, model.sure = -1.0, 1.0
    reaching = 6 + 3 + 1  # dreams of length 1: from steps 2 to 7 of nine, 2 to 4 of six, 1 of three
    assert foresee(model, batch, context=3)["continue/error@1"] == pytest.approx(1 / reaching)


def test_a_discount_in_the_continues_and_a_scale_of_rewards_are_taken_out(model):
    model.drift, model.optimism, model.sure = 0.5, 3.0, 0.8
    model.values = torch.rand(8000, generator=torch.Generator().manual_seed(0)) * 50
    plain = foresee(model, episodes(), context=3)
    model.contdisc, model.reward_scale = True, 0.25
    assert foresee(model, episodes(), context=3) == pytest.approx(plain, rel=1e-5)


def test_errors_come_from_real_frames_alone(model):
    model.drift = 0.5
    plain, batch = foresee(model, episodes(), horizons=(5,), context=3), episodes(fake=True)
    batch.obs["x"][0, 8] = 5e3
    assert foresee(model, batch, horizons=(5,), context=3)["open_loop/x@5"] < 3 * plain["open_loop/x@5"]
    batch.rewarded = torch.tensor([False, False, False])
    assert not any("reward" in k or "value" in k for k in foresee(model, batch, context=3))


def test_a_model_without_decoder_is_judged_by_its_latents(model):
    model.decodes, model.drift = False, 0.5
    batch = episodes()
    found = foresee(model, batch, horizons=(2,), context=3)
    x = batch.obs["x"][batch.info["valid"]].numpy()
    assert found["open_loop/latent@2"] == pytest.approx(1 / x.var(), rel=1e-5)
    assert "open_loop/x@2" not in found


def test_images_are_measured_in_units_of_their_variance(model):
    class Camera(Line):
        def encode(self, obs, state, action, is_first):
            return State(obs["x"].float().flatten(1)[:, :1])

        def decode(self, state):
            return {"x": (state.deter / 255)[..., None, None].expand(*state.deter.shape[:-1], 2, 2, 3)}

    batch = episodes()
    frames = batch.obs["x"].clamp(max=200)[..., None, None].expand(-1, -1, 2, 2, 3).to(torch.uint8)
    batch.obs, camera = {"x": frames}, Camera()
    camera.values, camera.drift = model.values, 0.5
    x = batch.obs["x"][batch.info["valid"]].double().numpy()
    assert foresee(camera, batch, context=3)["open_loop/x@1"] == pytest.approx(0.25 / x.var(), rel=1e-5)


def test_values_are_held_against_the_returns_that_were_observed(model):
    batch = episodes()
    true = {e: returns(batch, e, bootstrap=b) for e, b in enumerate((40.0, 0.0, 40.0))}
    for e, n in enumerate(LENGTHS):
        for t in range(n - 1):
            model.values[10 * e + t] = true[e][t]
    found = foresee(model, batch, context=3)
    assert found["value/bias"] == pytest.approx(0, abs=1e-4)
    assert found["value/correlation"] == pytest.approx(1)
    model.values += 7  # wrong by the same everywhere: seen in full, although two episodes were cut
    assert foresee(model, batch, context=3)["value/bias"] == pytest.approx(7, rel=1e-4)
    model.values *= -1
    assert foresee(model, batch, context=3)["value/correlation"] < 0


def test_a_terminated_episode_shows_the_whole_return():
    batch = episodes()
    times = torch.arange(2, 5)
    G = returns(batch, 1)
    q = torch.tensor([10.0, 20.0, 25.0])
    found = calibration(q, torch.ones(3, dtype=torch.long), times, batch, torch.full((3,), GAMMA).double())
    assert found["value/bias"] == pytest.approx(np.mean(q.numpy() - G[2:5]), rel=1e-6)
    assert found["value/correlation"] == pytest.approx(np.corrcoef(q.numpy(), G[2:5])[0, 1], rel=1e-6)
    # One cut episode, by hand: two steps until its last value.
    q = torch.tensor([50.0, 30.0, 20.0])
    cut = calibration(q, torch.zeros(3, dtype=torch.long), torch.tensor([5, 6, 7]), batch,
                      torch.full((3,), GAMMA).double())  # fmt: skip
    r = batch.reward[0].tolist()
    differences = [50 - (r[6] + 0.9 * r[7] + 0.81 * 20), 30 - (r[7] + 0.9 * 20)]
    assert cut["value/bias"] == pytest.approx(sum(differences) / (0.19 + 0.1), rel=1e-6)


def calibrated(level, value, T=201, gamma=0.99):
    """Figures of cut episodes with a constant reward each, ``level`` (B,), and values ``value`` (B,)."""
    B = len(level)
    reward = torch.tensor(level)[:, None].expand(B, T).clone()
    off = torch.zeros(B, T, dtype=torch.bool)
    batch = Batch({}, {}, reward, off, off, off, info={"valid": ~off})
    rows, times = (~off[:, :-1]).nonzero(as_tuple=True)
    return calibration(torch.tensor(value)[rows], rows, times, batch, torch.full((B,), gamma).double())


@pytest.mark.parametrize("gamma", [0.9, 0.99, 0.995, 0.999])
def test_time_left_is_no_correlation(gamma):
    """Cut after as many steps, predicted and observed both grow with them, whatever the critic."""
    level = np.random.default_rng(0).uniform(0.5, 1.5, 12).astype(np.float32)
    for constant in (100.0, -100.0, 0.0):
        found = calibrated(level, np.full(12, constant, np.float32), gamma=gamma)
        assert found.keys() == {"value/bias"}
        assert found["value/bias"] == pytest.approx(constant - level.mean() / (1 - gamma), rel=1e-4)
    right = level / (1 - gamma)
    assert calibrated(level, right, gamma=gamma)["value/correlation"] == pytest.approx(1, abs=1e-5)
    backwards = right.max() + right.min() - right  # as large, and ranks the episodes the other way round
    assert calibrated(level, backwards, gamma=gamma)["value/correlation"] == pytest.approx(-1, abs=1e-5)
    noise = np.random.default_rng(1).permutation(right)
    assert abs(calibrated(level, noise, gamma=gamma)["value/correlation"]) < 0.7
    assert calibrated(np.ones(12, np.float32), right, gamma=gamma).keys() == {"value/bias"}


def test_each_task_is_measured_by_its_own_spread_and_entries(model):
    """Guessing the mean of each task is no better than that, however far apart the tasks are."""

    class Two(Line):
        tasks = Task("near", 1, 1, 9), Task("far", 2, 1, 9)

        def initial(self, batch):
            return State(torch.zeros(batch, 1))

        def encode(self, obs, state, action, is_first):
            return State(obs["x"][:, :1].float(), task=state.task)

        def gamma(self, task):
            return torch.tensor([0.9, 0.5])[task]

        def imagine(self, state, actions, horizon):
            dream, task = super().imagine(state, actions, horizon), state.task[:, None]
            dream.states.stacked.task = task.expand(-1, horizon + 1)
            dream.rewards = torch.where(task == 1, 1050.0, 2.0).expand(-1, horizon)
            return dream

        def decode(self, state):
            guess = torch.tensor([[4.0, 77.0], [504.0, 1.0]])  # near has no second entry
            return {"x": guess[state.task]}

    rng, T = np.random.default_rng(0), 60
    x = np.zeros((4, T, 2), np.float32)
    x[:2, :, 0] = rng.permutation(np.resize([3.0, 5.0], (2, T)), axis=1)
    x[2:, :, 0] = rng.permutation(np.resize([494.0, 514.0], (2, T)), axis=1)
    x[2:, :, 1] = rng.permutation(np.resize([0.0, 2.0], (2, T)), axis=1)
    reward = torch.from_numpy(np.where(np.arange(4)[:, None] < 2, x[..., 0] - 2, 1050 + (x[..., 0] - 504)))
    off, task = torch.zeros(4, T, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    batch = Batch({"x": torch.from_numpy(x)}, {"a": torch.zeros(4, T, 1)}, reward, off, off, off, task=task,
                  info={"valid": ~off})  # fmt: skip
    two = Two()
    two.values = torch.arange(8000.0)
    found = foresee(two, batch, horizons=(1, 5))
    for name in ("open_loop/x@1", "open_loop/x@5", "reward/relative@5"):
        assert [found[f"{task}{name}"] for task in ("near/", "far/", "")] == pytest.approx([1] * 3, abs=0.04)
    assert found["near/reward/error@1"] == pytest.approx(1)
    assert found["far/reward/error@1"] == pytest.approx(10)
    assert found["reward/error@1"] == pytest.approx(5.5)
    for n, name in enumerate(("near", "far")):
        rows = {"x": batch.obs["x"][task == n]}
        part = Batch(rows, {"a": torch.zeros(2, T, 1)}, reward[task == n], off[:2], off[:2], off[:2],
                     task=task[task == n], info={"valid": ~off[:2]})  # fmt: skip
        alone = foresee(two, part, horizons=(1, 5))
        mine = {k: v for k, v in found.items() if k.startswith(name)}
        assert mine == pytest.approx({k: v for k, v in alone.items() if k.startswith(name)})


def test_what_cannot_be_measured_is_left_out(model):
    batch = episodes()
    batch.reward[:] = 0
    found = foresee(model, batch, context=3)
    assert "reward/relative@1" not in found
    assert "value/correlation" not in found
    assert found["value/bias"] == 0
    assert foresee(model, batch, horizons=(15,)) == {}


def test_the_models_own_noise_is_not_touched(model):
    model.noise = own = NoiseStreams(3)
    drawn = []

    def q(state, action):
        drawn.append(model.noise.normal("q", (len(state.deter),)))
        return drawn[-1]

    model.q = q
    one, two = (foresee(model, episodes(), NoiseStreams(0)) for _ in range(2))
    assert one == two
    assert torch.equal(drawn[0], drawn[1])
    assert model.noise is own
    assert not own.used
