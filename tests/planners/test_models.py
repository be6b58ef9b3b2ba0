"""Every planner on every model: what DreamerV3 answers planners, and what ``act`` makes of all of them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_wm.dreamerv3 import DreamerV3Module
from lit_wm.errors import ConfigError
from lit_wm.functional import one_hot
from lit_wm.module import WorldModelModule
from lit_wm.noise import NoiseStreams
from lit_wm.planners import CEM, PLANNERS, make_planner
from lit_wm.tdmpc2 import TDMPC2Module
from lit_wm.types import Spaces, Spec, State
from lit_wm.world_model import WorldModel

OBS = {"obs": Spec("float32", (5,))}
VECTOR = Spaces(OBS, {"wheel": Spec("float32", (2,)), "arm": Spec("float32", ())})
DISCRETE = Spaces(OBS, {"action": Spec("int32", (), 4)})
SEARCH = dict(num_samples=24, num_elites=6, num_pi_trajs=4, iterations=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "mppi": SEARCH,
    "cem": SEARCH,
    "gradient": dict(num_candidates=6, num_pi_trajs=2, steps=3),
    "random": dict(num_samples=24, num_pi_trajs=3),
}
MODELS = {"dreamerv3": DreamerV3Module, "tdmpc2": TDMPC2Module}
CASES = [(m, s, p) for m in MODELS for s in (VECTOR, DISCRETE) for p in OPTIONS]
CASES = [c for c in CASES if c[1:] != (DISCRETE, "gradient")]
every = pytest.mark.parametrize(
    ("kind", "spaces", "name"), CASES, ids=[f"{m}-{'d' if s is DISCRETE else 'v'}-{p}" for m, s, p in CASES]
)


def module_of(kind: str, spaces: Spaces, **options: Any) -> WorldModelModule:
    """Rewards and values of ordinary size that depend on the action: those heads start at zero."""
    torch.manual_seed(0)
    module = MODELS[kind](spaces.to_plain(), preset="debug", **options).eval()
    model: Any = module.model
    with torch.no_grad():
        if kind == "dreamerv3":
            for head in (model.rew, model.val):
                head.output.weight.normal_(std=0.5)
                head.output.bias.copy_(-0.5 * torch.linspace(-20, 20, 255).square())
            for p in model.pol.parameters():
                p.add_(0.3 * torch.randn_like(p))
        else:
            for net in (model.reward, model.critic):
                net[-1].weight.normal_(std=0.3)
    return module


class PerEnv:
    """Every environment has random numbers of its own, alone or among others; the choice of two critics is
    everyone's.
    """

    def __init__(self, *envs: int):
        self.streams, self.common = [NoiseStreams(7, rank=e) for e in envs], NoiseStreams(7)

    def draw(self, kind: str, name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "plan/q":
            return getattr(self.common, kind)(name, shape)
        part = (shape[0] // len(self.streams), *shape[1:])
        return torch.cat([getattr(s, kind)(name, part) for s in self.streams])

    def normal(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        return self.draw("normal", name, shape)

    def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        return self.draw("exponential", name, shape)

    def uniform(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        return self.draw("uniform", name, shape)


class Recorded(NoiseStreams):
    """Remembers what was drawn, by stream and time."""

    def __init__(self) -> None:
        super().__init__(3)
        self.drawn: dict[tuple[str, int], Tensor] = {}

    def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        self.drawn[name, t] = super().exponential(name, shape, t)
        return self.drawn[name, t]


def plan(model: WorldModel, name: str, state: State, noise: Any, **options: Any) -> Any:
    planner = make_planner(name, OPTIONS[name] | options)
    start = torch.ones(len(state.deter), dtype=torch.bool)
    return planner.plan(model, state, None, start, False, noise)  # type: ignore[arg-type]


def candidates(model: WorldModel, n: int, s: int, h: int) -> Tensor:
    if model.discrete:
        return one_hot(torch.randint(model.action_dim, (n, s, h)), model.action_dim)
    return 2 * torch.rand(n, s, h, model.action_dim) - 1


# --- What DreamerV3 answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("contdisc", [True, False])
@pytest.mark.parametrize("spaces", [VECTOR, DISCRETE], ids=["vector", "discrete"])
def test_a_value_is_that_of_the_same_dream_step_by_step(spaces: Spaces, contdisc: bool) -> None:
    """The discount is in the continues, or comes on top; the first reward is discounted by neither."""
    model: Any = module_of("dreamerv3", spaces, contdisc=contdisc, horizon=10).model
    state, actions, noise = model.encode(torch.randn(2, 5)), candidates(model, 2, 3, 4), Recorded()
    values = model.value(state, actions, noise, t=2)
    gamma = 1.0 if contdisc else 0.9

    for n in range(2):
        for s in range(3):

            class Same:
                def exponential(self, name: str, shape: Any, t: int = 0, n: int = n) -> Tensor:
                    assert name == "imagine/prior"
                    return noise.drawn["plan/prior", 2 * 4 + t][n]  # of all candidates

            taken = model.action_keys(actions[n, s].unsqueeze(0))
            dream = model.imagine(state[n : n + 1], taken, noise=Same())
            total, weight = 0.0, 1.0
            for reward, goes_on in zip(dream.rewards[0], dream.continues[0], strict=True):
                total = total + weight * reward.item()
                weight = weight * gamma * goes_on.item()
            total = total + weight * model.v(dream.states[-1]).item()
            assert values[n, s].item() == pytest.approx(total, rel=1e-4, abs=1e-4)
    assert values.std() > 1e-3


def test_a_deterministic_value_is_that_of_the_likeliest_latents_with_their_slope() -> None:
    """Finite differences of the surrogate: each latent moves with its probabilities around its class."""
    model: Any = module_of("dreamerv3", VECTOR).model
    state, actions = model.encode(torch.randn(1, 5)), candidates(model, 1, 1, 3).requires_grad_()
    held: list[Tensor] = []

    @torch.no_grad()
    def slow(taken: Tensor) -> float:
        deter, stoch, total, weight, first = state.deter, state.stoch, 0.0, 1.0, not held
        for t in range(3):
            deter = model.dyn.step(State(deter, stoch), taken[:, 0, t])
            probs = 0.99 * model.dyn.prior(deter).softmax(-1) + 0.01 / model.dyn.classes
            if first or len(held) <= t:
                held.append(one_hot(probs.argmax(-1), model.dyn.classes) - probs)
            stoch = probs + held[t]
            feat = torch.cat([deter, stoch.flatten(-2)], -1)
            total += weight * (model.rew(feat).softmax(-1).double() @ model.bins.double()).item()
            weight *= model.con(feat).sigmoid().item()
        return total + weight * (model.val(feat).softmax(-1).double() @ model.bins.double()).item()

    value = model.value(state, actions, None, deterministic=True)
    assert value.item() == pytest.approx(slow(actions), rel=1e-4)
    (slope,) = torch.autograd.grad(value.sum(), actions)
    for _ in range(4):
        way = torch.randn_like(slope)
        expected = (slow(actions + 2e-3 * way) - slow(actions - 2e-3 * way)) / 4e-3
        assert (slope * way).sum().item() == pytest.approx(expected, rel=0.05, abs=0.02 * slope.norm().item())
    assert slope.norm() > 1e-2


def test_proposals_are_the_policys_roll_outs() -> None:
    """As ``imagine`` rolls it out with the same noise, cut to -1 ... 1; one environment's are together."""
    model: Any = module_of("dreamerv3", VECTOR).model
    state = model.encode(torch.randn(2, 5))

    class Same:
        names = {"imagine/policy/arm": "plan/propose/arm", "imagine/policy/wheel": "plan/propose/wheel"}

        def __init__(self) -> None:
            self.streams = NoiseStreams(4)

        def normal(self, name: str, shape: Any, t: int = 0) -> Tensor:
            return self.streams.normal(self.names.get(name, name), shape)

        def exponential(self, name: str, shape: Any, t: int = 0) -> Tensor:
            return self.streams.exponential("prior", shape)

    proposed = model.propose(state, 3, 4, Same())
    each = state.map(lambda x: x.repeat_interleave(3, 0))
    dream = model.imagine(each, horizon=4, noise=Same()).actions
    expected = torch.cat([dream["arm"].unsqueeze(-1), dream["wheel"]], -1)
    assert expected.abs().max() > 1
    assert torch.equal(proposed, expected.clamp(-1, 1).view(2, 3, 4, 3))


@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_waits_for_the_device(deterministic: bool) -> None:
    class Nothing:
        def normal(self, name: str, shape: Any, t: int = 0) -> Tensor:
            return torch.empty(shape, device="meta")

        exponential = normal

    model: Any = module_of("dreamerv3", VECTOR).model.to("meta")
    state = model.initial(2)
    assert model.propose(state, 3, 4, Nothing()).shape == (2, 3, 4, 3)
    actions = torch.empty(2, 5, 4, 3, device="meta")
    assert model.value(state, actions, Nothing(), deterministic=deterministic).shape == (2, 5)


# --- All planners on both models ------------------------------------------------------------------------


@every
def test_environments_together_equal_each_alone(kind: str, spaces: Spaces, name: str) -> None:
    model = module_of(kind, spaces).model
    with torch.no_grad():
        state = model.encode({"obs": torch.randn(3, 5)})
    together = plan(model, name, state, PerEnv(0, 1, 2))
    for e in range(3):
        alone = plan(model, name, state[e : e + 1], PerEnv(e))
        torch.testing.assert_close(together.action[e], alone.action[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(together.mean[e], alone.mean[0], rtol=1e-3, atol=1e-4)


@every
def test_a_plan_is_better_than_what_the_policy_would_do(kind: str, spaces: Spaces, name: str) -> None:
    """In a world that is nearly certain: else luck with the latents of a few samples decides."""
    model: Any = module_of(kind, spaces).model
    with torch.no_grad():
        if kind == "dreamerv3":
            model.dyn.priorlogit.weight.mul_(30)
        state = model.encode({"obs": torch.randn(4, 5)})
        mean = plan(model, name, state, NoiseStreams(1)).mean
        mean = one_hot(mean.argmax(-1), model.action_dim) if model.discrete else mean
        planned = model.value(state, mean.unsqueeze(1), NoiseStreams(2), deterministic=True)
        usual = model.propose(state, 64, 3, NoiseStreams(3))
        usual = model.value(state, usual, NoiseStreams(2), deterministic=True)
    assert (planned.mean() - usual.mean()) > 0.2 * usual.std(1).mean()


@every
def test_the_next_search_starts_from_the_plan_in_the_state(kind: str, spaces: Spaces, name: str) -> None:
    """But not where an episode begins; what depends on the plan least is left out of the search."""
    few = {"num_pi_trajs": 0} | {"random": {"num_samples": 1}, "gradient": {"steps": 1}}.get(name, {})
    module = module_of(kind, spaces, planner=name, planner_options=OPTIONS[name] | few)
    obs = {"obs": torch.randn(3, 5)}
    with torch.no_grad():
        _, before = module.act(obs, noise=PerEnv(0, 1, 2))
        assert before.plan.shape == (3, 3, 4 if spaces is DISCRETE else 3)
        before.plan = candidates(module.model, 3, 1, 3).squeeze(1)

        def plans(first: list[bool] | None) -> Tensor:
            flags = None if first is None else torch.tensor(first)
            return module.act(obs, before, flags, noise=PerEnv(0, 1, 2))[1].plan

        kept, middle, fresh = plans([False] * 3), plans([False, True, False]), plans([True] * 3)
    assert torch.equal(plans(None), kept)
    torch.testing.assert_close(middle[[0, 2]], kept[[0, 2]])
    torch.testing.assert_close(middle[1], fresh[1])
    if name == "random":  # its only candidate
        assert torch.equal(kept[:, 0], before.plan[:, 1])
    assert (kept != fresh).any()


@every
def test_only_training_explores_and_a_tiny_budget_still_acts(kind: str, spaces: Spaces, name: str) -> None:
    module = module_of(kind, spaces, planner=name, planner_options=OPTIONS[name])
    obs = {"obs": torch.randn(2, 5)}
    played, explored = (module.policy(obs, mode=m, noise=NoiseStreams(1)) for m in ("eval", "train"))
    assert torch.equal(played[1].plan, explored[1].plan)
    same = all(torch.equal(v, explored[0][k]) for k, v in played[0].items())
    assert same == (spaces is DISCRETE)  # whose draws explore enough
    again = module.policy(obs, mode="eval", noise=NoiseStreams(1))
    assert all(torch.equal(v, again[0][k]) for k, v in played[0].items())
    with torch.no_grad():
        hurried, state = module.act(obs, planner=name, max_ms=1e-3)
        assert plan(module.model, name, module.encode(obs), NoiseStreams()).mean.shape == state.plan.shape
    for k, spec in spaces.action.items():
        assert hurried[k].shape == (2, *spec.shape)
        assert torch.isfinite(hurried[k]).all()
        assert (hurried[k] < 4).all() if spec.is_discrete else (hurried[k].abs() <= 1).all()


@every
def test_bfloat16_plans(kind: str, spaces: Spaces, name: str) -> None:
    module = module_of(kind, spaces, planner=name, planner_options=OPTIONS[name])
    module.model.compute_dtype = torch.bfloat16
    action, state = module.policy({"obs": torch.randn(2, 5)}, noise=NoiseStreams(1))
    assert state.plan.dtype == torch.float32
    assert all(torch.isfinite(v.float()).all() for v in action.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_entries_that_a_task_lacks_stay_zero(name: str) -> None:
    box = Spaces(OBS, {"action": Spec("float32", (3,))})
    tasks = [{"name": "a", "obs": 3, "action": 1, "episode_length": 100}]
    tasks += [{"name": "b", "obs": 5, "action": 3, "episode_length": 100}]
    module = module_of("tdmpc2", box, tasks=tasks, planner=name, planner_options=OPTIONS[name])
    with torch.no_grad():
        action, state = module.act({"obs": torch.randn(2, 5)}, mode="train", task=torch.tensor([0, 1]))
    assert not action["action"][0, 1:].any()
    assert not state.plan[0, :, 1:].any()
    assert action["action"][1].all()


def test_the_policy_is_the_default_of_dreamerv3_and_a_choice_of_both() -> None:
    obs = {"obs": torch.randn(2, 5)}
    module = module_of("dreamerv3", VECTOR)
    with torch.no_grad():
        usual, state = module.act(obs, noise=NoiseStreams(1))
        assert (module.model.planner, state.plan) == (None, None)
        planning = module_of("dreamerv3", VECTOR, planner="cem", planner_options=OPTIONS["cem"])
        asked, _ = planning.act(obs, noise=NoiseStreams(1), planner="policy")
        planned, _ = planning.act(obs, noise=NoiseStreams(1))
    assert all(torch.equal(v, asked[k]) for k, v in usual.items())
    assert not torch.equal(planned["wheel"], usual["wheel"])


@pytest.mark.parametrize(
    ("action", "unbounded", "message"),
    [
        ({"a": Spec("int32", (2,), 3)}, (), r"one discrete choice, not by \['a'\] with discrete \['a'\]"),
        (VECTOR.action | {"gear": Spec("int32", (), 3)}, (), r"with discrete \['gear'\]"),
        (DISCRETE.action | {"more": Spec("int32", (), 3)}, (), r"with discrete \['action', 'more'\]"),
        (VECTOR.action, ("wheel",), "between bounds; wheel has none"),
    ],
)
def test_actions_that_cannot_be_searched_are_refused(action: Any, unbounded: Any, message: str) -> None:
    spaces = Spaces(OBS, action, unbounded=unbounded)
    with pytest.raises(ConfigError, match=message) as caught:
        DreamerV3Module(spaces.to_plain(), preset="debug", planner="cem")
    assert len(str(caught.value).splitlines()) <= 5
    module = module_of("dreamerv3", spaces)
    for planner in ("random", CEM()):
        with pytest.raises(ConfigError, match=message), torch.no_grad():
            module.act({"obs": torch.randn(2, 5)}, planner=planner)


@pytest.mark.parametrize("kind", MODELS)
def test_no_gradient_of_discrete_actions(kind: str) -> None:
    with pytest.raises(ConfigError, match="gradient needs continuous actions"):
        MODELS[kind](DISCRETE.to_plain(), preset="debug", planner="gradient")


def test_the_documentation_runs_and_names_every_option() -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, "planning.md", "exec"), found)
    assert found["state"].plan is None  # the policy's is the last act
    assert found["action"]["action"].shape == (1, 6)
    for name, kind in PLANNERS.items():
        assert all(f"`{word}`" in text for word in (name, *(f.name for f in fields(kind) if f.init)))
