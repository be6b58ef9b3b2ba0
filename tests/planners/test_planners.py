"""Planners on models whose best plan is known."""

import warnings
from dataclasses import asdict

import pytest
import torch

from lit_wm.errors import ConfigError
from lit_wm.noise import NoiseStreams
from lit_wm.planners import make_planner
from lit_wm.types import State

SMALL = dict(num_samples=64, num_elites=8, num_pi_trajs=4)
OPTIONS = {"mppi": SMALL, "cem": SMALL, "gradient": dict(num_candidates=8, num_pi_trajs=4, steps=30)}
REFINING = list(OPTIONS)
OPTIONS["random"] = dict(num_samples=64, num_pi_trajs=4)


class Toy:
    """x' = x + a / 2 from x = deter; the return is -|x' - goal|^2 summed, best at a = 2 (goal - x), then 0.

    The policy draws clipped noise.
    """

    def __init__(self, size=2, goal=0.3, mask=None, discrete=False, dtype=torch.float32):
        self.action_dim, self.discrete, self.mask, self.dtype = size, discrete, mask, dtype
        self.goal = torch.nn.Parameter(torch.tensor(goal))

    def action_mask_of(self, state):
        return self.mask

    def propose(self, state, n, horizon, noise):
        shape = (state.deter.shape[0], n, self.action_dim)
        steps = [noise.normal("plan/propose", shape, t) + 0 * state.deter[:, None] for t in range(horizon)]
        return torch.stack(steps, 2).clamp(-1, 1)

    def value(self, state, actions, noise, t=0, deterministic=False):
        assert actions.shape[:1] == state.deter.shape[:1]
        assert actions.shape[3] == self.action_dim
        assert self.mask is None or (actions * (1 - self.mask)[:, None, None] == 0).all()
        x, total = state.deter[:, None], 0.0
        for h in range(actions.shape[2]):
            x = x + actions[:, :, h] / 2
            total = total - (x - self.goal).square().sum(-1)
        return (
            total
            if deterministic
            else total + 0 * noise.normal("plan/terminal", (*total.shape, 1), t)[..., 0]
        )


class Chain(Toy):
    """Discrete: the return counts how many of the plan's actions are the classes 2, 0, 1."""

    wanted = torch.tensor([2, 0, 1])

    def __init__(self, size=3):
        super().__init__(size, discrete=True)

    def propose(self, state, n, horizon, noise):
        race = noise.exponential("plan/propose", (state.deter.shape[0], n, horizon, self.action_dim))
        return torch.nn.functional.one_hot(race.argmax(-1), self.action_dim).float()

    def value(self, state, actions, noise, t=0, deterministic=False):
        assert ((actions == 1).sum(-1) == 1).all()
        assert (actions.sum(-1) == 1).all()
        return (actions.argmax(-1) == self.wanted).float().sum(-1)


class PerEnv:
    """Every environment draws from streams of its own, alone or among others."""

    def __init__(self, *envs):
        self.streams = [NoiseStreams(7, rank=e) for e in envs]

    def normal(self, name, shape, t=0):
        return torch.cat([s.normal(name, (1, *shape[1:])) for s in self.streams])

    def exponential(self, name, shape, t=0):
        return torch.cat([s.exponential(name, (1, *shape[1:])) for s in self.streams])

    def uniform(self, name, shape, t=0):
        return torch.cat([s.uniform(name, (1, *shape[1:])) for s in self.streams])


class Recorded(NoiseStreams):
    """Remembers what was asked for."""

    def __init__(self):
        super().__init__(3)
        self.asked = {}

    def normal(self, name, shape, t=0):
        self.asked[name] = super().normal(name, shape, t)
        return self.asked[name]

    def exponential(self, name, shape, t=0):
        self.asked[name] = super().exponential(name, shape, t)
        return self.asked[name]

    def uniform(self, name, shape, t=0):
        self.asked[name] = super().uniform(name, shape, t)
        return self.asked[name]


def states(*rows, size=2):
    return State(torch.tensor(rows, dtype=torch.float32)[:, None].expand(-1, size).clone())


def plan(name, model, state, mean=None, t0=None, explore=False, noise=None, max_ms=None, **options):
    t0 = torch.ones(state.deter.shape[0], dtype=torch.bool) if t0 is None else torch.tensor(t0)
    planner = make_planner(name, {**OPTIONS[name], **options})
    return planner.plan(model, state, mean, t0, explore, noise or NoiseStreams(3), max_ms)


@pytest.mark.parametrize("name", REFINING)
def test_every_planner_finds_the_optimum(name):
    more = {} if name == "gradient" else dict(num_samples=512, num_elites=32, iterations=10)
    more |= dict(temperature=20.0) if name == "mppi" else {}
    result = plan(name, Toy(goal=0.3), states(0.0, 0.6), **more)
    best = torch.tensor([0.6, 0.0, 0.0])[:, None] * torch.tensor([[1.0], [-1.0]])[:, None]
    assert torch.allclose(result.mean, best.expand(2, 3, 2), atol=0.1)
    assert torch.allclose(result.action, best[:, 0].expand(2, 2), atol=0.2)
    assert result.iterations == len(result.trace) == dict(gradient=30).get(name, 10)


def test_random_shooting_takes_the_best_of_uniform_sequences_and_of_the_last_plan():
    noise, mean = Recorded(), torch.full((2, 3, 2), 0.5)
    result = plan("random", Toy(), states(0.1, -1.2), mean, [False, True], noise=noise, num_pi_trajs=0)
    drawn = 2 * noise.asked["plan/candidates"].transpose(1, 2) - 1  # (N, S, H, A)
    last = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])[:, None, :, None].expand(-1, 1, -1, 2)
    actions = torch.cat([last, drawn], 1)
    assert actions.shape == (2, 64, 3, 2)
    x = torch.tensor([0.1, -1.2])[:, None, None, None] + actions.cumsum(2) / 2
    best = (x - 0.3).square().sum((2, 3)).argmin(1)
    assert torch.equal(result.mean, torch.stack([a[i] for a, i in zip(actions, best, strict=True)]))
    assert torch.equal(result.action, result.mean[:, 0])
    assert (drawn.min() < -0.99, drawn.max() > 0.99, result.iterations) == (True, True, 1)
    kept = plan("random", Toy(goal=0.1), states(0.1), torch.zeros(1, 3, 2), [False], num_samples=9)
    assert not kept.mean.any()  # nothing beats staying where the goal is


def test_cem_is_mppi_at_temperature_zero():
    args = Toy(), states(0.1, -0.4)
    mppi, cem = plan("mppi", *args, temperature=0), plan("cem", *args)
    for a, b in zip(mppi.trace, cem.trace, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("values", "elites", "mean", "std"))
    assert torch.equal(cem.action, cem.mean[:, 0])
    assert not torch.equal(mppi.action, cem.action)  # a drawn elite


def test_a_refit_is_the_official_formula():
    """Mean, deviation and drawn elite of one iteration, recomputed from its noise in double precision."""
    noise, model = Recorded(), Toy()
    result = plan("mppi", model, states(0.1), noise=noise, iterations=1, num_pi_trajs=0)
    step = result.trace[0]
    actions = (2 * noise.asked["plan/candidates"][0].double()).clamp(-1, 1)  # (H, S, A)
    x = 0.1 + actions.cumsum(0) / 2
    values = -(x - 0.3).square().sum((0, 2))
    top, index = values.sort(descending=True)
    weight = torch.exp(0.5 * (top[:8] - top[0]))
    weight = weight / weight.sum()
    drawn = (weight / noise.asked["plan/pick"][0].double()).argmax()  # the race equals the Gumbel draw
    weight = weight[None, :, None]
    elites = actions[:, index[:8]]
    mean = (weight * elites).sum(1)
    std = (weight * (elites - mean[:, None]) ** 2).sum(1).sqrt().clamp(0.05, 2)
    assert torch.equal(step["elites"][0], index[:8])
    for ours, expected in ((step["values"], values), (step["mean"], mean), (step["std"], std)):
        assert torch.allclose(ours[0].double(), expected, atol=1e-5)
    assert drawn != 0  # else this would not tell a draw from the best
    assert torch.allclose(result.action[0].double(), elites[0, drawn], atol=1e-6)


def test_momentum_keeps_a_share_of_the_old_mean_and_deviation():
    args = Toy(), states(0.2)
    plain, kept = (plan("cem", *args, momentum=m, iterations=1) for m in (0.0, 0.25))
    assert torch.allclose(kept.mean, 0.75 * plain.mean)
    assert torch.allclose(kept.trace[0]["std"], 0.75 * plain.trace[0]["std"] + 0.5)


@pytest.mark.parametrize("name", [*OPTIONS, "discrete"])
def test_environments_together_equal_each_alone(name):
    model, name = (Chain(), "mppi") if name == "discrete" else (Toy(), name)
    state, size = states(0.1, -0.4, 0.8, size=model.action_dim), model.action_dim
    mean = torch.rand(3, 3, size)
    together = plan(name, model, state, mean, [False, True, False], True, PerEnv(0, 1, 2))
    for e in range(3):
        alone = plan(name, model, state[e : e + 1], mean[e : e + 1], [e == 1], True, PerEnv(e))
        assert torch.allclose(together.action[e], alone.action[0], atol=1e-6)
        assert torch.allclose(together.mean[e], alone.mean[0], atol=1e-6)


@pytest.mark.parametrize("name", ["mppi", "cem"])
def test_the_warm_start_is_the_last_plan_a_step_later(name):
    """With the least possible noise the candidates are the start mean: 0 where an episode begins."""
    mean = torch.tensor([0.1, 0.2, 0.3])[None, :, None].expand(2, 3, 2)
    options = dict(num_pi_trajs=0, iterations=1, min_std=0, max_std=1e-9)
    first = plan(name, Toy(), states(0, 0), mean, [False, True], **options).mean
    assert torch.allclose(first[0, :, 0], torch.tensor([0.2, 0.3, 0.0]), atol=1e-6)
    assert torch.allclose(first[1], torch.zeros(3, 2), atol=1e-6)


def test_the_gradient_planner_starts_from_the_last_plan_too():
    """A value that is best exactly at the shifted mean: no step can improve on that candidate."""
    mean = torch.tensor([0.1, 0.6, 0.3])[None, :, None].expand(1, 3, 2)
    shifted = torch.tensor([0.6, 0.3, 0.0])[None, None, :, None]
    model = Toy()
    model.value = lambda state, actions, *_, **__: -(actions - shifted).square().sum((2, 3))
    result = plan("gradient", model, states(0), mean, [False], steps=1)
    assert torch.allclose(result.mean, shifted[0].expand(1, 3, 2), atol=1e-6)


def test_the_gradient_ascent_is_adams_on_gradients_of_norm_one_at_most():
    """Three steps from zeros by hand; inference mode does no harm and no parameter gets a gradient."""
    model = Toy(goal=5.0)
    model.value = lambda state, actions, *_, **__: -(model.goal - actions).square().sum((2, 3)) / 4
    with torch.inference_mode():
        result = plan("gradient", model, states(0), num_candidates=1, num_pi_trajs=0, steps=3, lr=0.5)
    u = m = v = torch.zeros(3, 2, dtype=torch.float64)
    for step in (1, 2, 3):
        a = u.tanh()
        g = (5 - a) / 2 * (1 - a**2)
        g = g / g.norm().clamp(min=1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        u = u + 0.5 * m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    assert torch.allclose(result.mean[0].double(), u.tanh(), atol=1e-6)
    assert model.goal.grad is None
    assert not result.mean.requires_grad


def test_the_gradient_planner_keeps_the_best_it_has_seen():
    """Steps far too large make all candidates worse; what is returned is not."""
    start = plan("gradient", Toy(), states(0.1), steps=1, lr=1e-9)
    result = plan("gradient", Toy(), states(0.1), steps=3, lr=50.0)
    assert result.trace[-1]["values"].max() < result.trace[-1]["score"].item()
    assert result.trace[-1]["score"] >= start.trace[0]["score"]


@pytest.mark.parametrize("name", ["mppi", "cem", "random"])
def test_discrete_planners_find_the_best_sequence(name):
    options = dict(num_samples=512)
    result = plan(name, Chain(), states(0, 0, size=3), **options)
    assert torch.equal(result.mean.argmax(-1), Chain.wanted.expand(2, 3))
    assert torch.equal(result.action, torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3))
    loud = plan(name, Chain(), states(0, 0, size=3), explore=True, **options)
    assert torch.equal(loud.action, result.action)


def test_discrete_candidates_keep_a_chance_for_every_class():
    """A certain, wrong plan is left since each class keeps min_prob / A; without that it never is."""
    wrong = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 2]]), 3).float()[:, :3]
    options = dict(mean=wrong.roll(1, 1), t0=[False], num_samples=512, num_pi_trajs=0)
    noise = NoiseStreams(5)
    model = Chain()
    assert torch.equal(
        plan("cem", model, states(0, size=3), noise=noise, **options).mean.argmax(-1)[0], model.wanted
    )
    stuck = plan("cem", model, states(0, size=3), min_prob=0, **options).mean[0]
    assert torch.equal(stuck[:2].argmax(-1), torch.tensor([0, 1]))  # the last row starts uniform


@pytest.mark.parametrize("name", ["mppi", "cem"])
@pytest.mark.parametrize(("size", "expected"), [(19, 4), (20, 6)])
def test_many_actions_get_two_more_iterations_each_time(name, size, expected):
    planner = make_planner(name, SMALL | dict(iterations=4))
    before = asdict(planner)
    for _ in range(2):
        args = Toy(size), states(0, size=size), None, torch.tensor([True]), False, NoiseStreams()
        assert planner.plan(*args).iterations == expected
    assert asdict(planner) == before


@pytest.mark.parametrize("name", REFINING)
def test_a_budget_ends_the_search_but_one_iteration_is_done(name, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(
        "lit_wm.planners.protocol.time.perf_counter", lambda: next(clock) / 100
    )  # 10 ms a look
    with pytest.warns(UserWarning, match=f"planner {name}: the first iteration, which is always done, ended"):
        assert plan(name, Toy(), states(0.1), max_ms=5, num_pi_trajs=1).iterations == 1
    some = plan(name, Toy(), states(0.1), max_ms=45)
    assert some.iterations == len(some.trace) == 3
    assert torch.isfinite(some.action).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_planner_says_once_that_its_first_iteration_is_too_slow(name, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("lit_wm.planners.protocol.time.perf_counter", lambda: next(clock) / 100)
    monkeypatch.setattr("lit_wm.planners.protocol.LATE", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plan(name, Toy(), states(0.1), max_ms=21)  # the start, 10 ms to the first iteration, 10 ms of it
        assert not said
        for _ in range(2):
            plan(name, Toy(), states(0.1), max_ms=19)
        count = "num_candidates" if name == "gradient" else "num_samples"
        (one,) = [str(w.message) for w in said]
        assert one.endswith(f"ended after 20 ms, max_ms is 19: lower {count} or horizon")
        plan(name, Toy(), states(0.1), max_ms=19, horizon=2)
        assert len(said) == 2


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), True, "50", [50]])
def test_a_budget_is_a_time(bad):
    with pytest.raises(ConfigError, match="max_ms is .*; expected milliseconds, a finite number above 0"):
        plan("mppi", Toy(), states(0.1), max_ms=bad)


def test_without_a_budget_the_clock_is_not_read(monkeypatch):
    monkeypatch.setattr("lit_wm.planners.protocol.time.perf_counter", lambda: pytest.fail("read"))
    assert plan("mppi", Toy(), states(0.1)).iterations == 6


@pytest.mark.parametrize("name", OPTIONS)
def test_entries_that_a_task_lacks_stay_zero(name):
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    result = plan(name, Toy(mask=mask), states(0.0, 0.0), explore=True)
    assert (result.action[0, 1], result.mean[0, :, 1].abs().sum()) == (0, 0)
    assert all(step["std"][0, :, 1].abs().sum() == 0 for step in result.trace)
    assert (result.action[1] != 0).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_exploration_is_the_first_deviation_times_the_noise(name):
    noise = Recorded()
    args = Toy(goal=0.1), states(-1.0, 0.05)
    calm, loud = plan(name, *args), plan(name, *args, explore=True, noise=noise)
    added = loud.trace[-1]["std"][:, 0] * noise.asked["plan/explore"]
    assert torch.allclose(loud.action, (calm.action + added).clamp(-1, 1))
    assert torch.equal(loud.mean, calm.mean)
    far = [plan(name, Toy(goal=9.0), states(0), explore=True, noise=NoiseStreams(s)) for s in range(4)]
    assert max(result.action.max() for result in far) == 1
    quiet = Recorded()
    plan(name, *args, noise=quiet)
    assert "plan/explore" not in quiet.asked


@pytest.mark.parametrize("name", [*OPTIONS, "discrete"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_observation_spoils_only_its_own_action(name, bad):
    model, name = (Chain(), "cem") if name == "discrete" else (Toy(), name)
    good, broken = (states(0.1, x, size=model.action_dim) for x in (0.2, bad))
    a, b = (plan(name, model, s, noise=PerEnv(0, 1)) for s in (good, broken))
    assert torch.equal(a.action[0], b.action[0])
    assert torch.isfinite(b.action).all()
    assert torch.isfinite(b.mean).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_no_environment_is_no_action(name):
    result = plan(name, Toy(), State(torch.zeros(0, 2)), explore=True)
    assert (result.action.shape, result.mean.shape) == ((0, 2), (0, 3, 2))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mpi", {}, "unknown planner 'mpi'; did you mean 'mppi'"),
        ("cem", dict(temperature=1.0), "unknown option 'temperature'"),
        ("mppi", dict(num_sample=5), "unknown option 'num_sample'; did you mean 'num_samples'"),
        ("mppi", dict(max_ms=0), "max_ms is no option but an argument of act"),
        ("mppi", dict(horizon=0), "horizon is 0; expected an integer in 1 ... inf"),
        ("mppi", dict(iterations=2.5), "iterations is 2.5; expected an integer"),
        ("mppi", dict(num_elites=600), "num_elites is 600; expected at most num_samples, which is 512"),
        ("cem", dict(momentum=1.5), "momentum is 1.5; expected a number in 0 ... 1"),
        ("cem", dict(min_std=3.0), "min_std is 3.0; expected at most max_std"),
        ("gradient", dict(num_candidates=24), "num_pi_trajs is 24; expected less than num_candidates"),
        ("gradient", dict(lr="fast"), "lr is 'fast'; expected a number"),
        ("mppi", dict(temperature=float("nan")), "temperature is nan"),
    ],
)
def test_what_cannot_be_is_refused(name, options, message):
    with pytest.raises(ConfigError) as error:
        make_planner(name, options)
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "lacks"), [("mppi", "momentum"), ("cem", "temperature")])
def test_a_planner_shows_the_options_that_it_has(name, lacks):
    shown = repr(make_planner(name))
    assert lacks not in shown
    assert {"momentum", "temperature"} - {lacks} < {
        word.split("=")[0] for word in shown[:-1].split("(")[1].split(", ")
    }


def test_plans_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="discrete actions have no gradient"):
        plan("gradient", Chain(), states(0, size=3))
    with pytest.raises(ConfigError, match=r"shape \(1, 5, 2\), expected \(1, 3, 2\) [^\0]*state.plan = None"):
        plan("mppi", Toy(), states(0), torch.zeros(1, 5, 2), [False])
