"""Pretraining: the world model alone, then the policy by cloning, then all; and rows without rewards."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import BOTH, fit, make_batch, make_module
from torch import Tensor

from lit_wm.errors import ConfigError
from lit_wm.noise import NoiseStreams

PARTS = {
    "dreamerv3": {
        "world_model": ("enc", "dyn", "dec", "rew", "con"),
        "actor": ("pol",),
        "critic": ("val", "slowval", "retnorm"),
    },
    "tdmpc2": {
        "world_model": ("encoder", "dynamics", "reward"),
        "actor": ("policy",),
        "critic": ("critic", "target_critic", "scale"),
    },
}


def parts(kind: str, module: Any) -> dict[str, dict[str, Tensor]]:
    state = module.model.state_dict()
    return {
        part: {k: v.clone() for k, v in state.items() if k.split(".")[0] in names}
        for part, names in PARTS[kind].items()
    }


def changed(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> set[str]:
    return {p for p, tensors in before.items() if any((after[p][k] != v).any() for k, v in tensors.items())}


@BOTH
@pytest.mark.parametrize(
    ("pretrain", "expected"),
    [
        ({"world_model": 2}, {"world_model"}),
        ({"actor": 2}, {"world_model", "actor"}),
        ({"world_model": 1, "actor": 1}, {"world_model", "actor"}),
        ({"world_model": 1}, {"world_model", "actor", "critic"}),
        (None, {"world_model", "actor", "critic"}),
    ],
)
def test_each_phase_trains_its_groups_alone(
    kind: str, pretrain: dict[str, int] | None, expected: set[str], tmp_path: Path
) -> None:
    module = make_module(kind, pretrain=pretrain)
    before = parts(kind, module)
    trainer = fit(module, tmp_path, 2)
    assert changed(before, parts(kind, module)) == expected
    assert trainer.global_step == module.updates == 2
    assert ("train/loss/bc" in module.latest) == bool(pretrain and "actor" in pretrain)


@pytest.mark.parametrize(
    ("pretrain", "said"),
    [
        ({"world_model": 100}, "actor and critic never learn: the training ends after 2 updates, .* has 100"),
        ({"world_model": 1, "actor": 1}, "the critic never learns"),
        ({"world_model": 1}, None),
    ],
)
def test_a_training_that_ends_within_pretraining_says_so(pretrain, said, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(make_module("tdmpc2", pretrain=pretrain), tmp_path, 2)
    found = [str(w.message) for w in told if "never learn" in str(w.message)]
    assert len(found) == (said is not None)
    assert not said or re.match(said, found[0])


@BOTH
def test_the_world_model_learns_as_it_does_alone(kind: str, tmp_path: Path) -> None:
    alone = make_module(kind, train_actor=False, train_critic=False)
    first = make_module(kind, pretrain={"world_model": 3})
    fit(alone, tmp_path, 3), fit(first, tmp_path, 3)
    for key, value in parts(kind, alone)["world_model"].items():
        torch.testing.assert_close(parts(kind, first)["world_model"][key], value, rtol=0, atol=0)


@BOTH
def test_cloning_makes_the_recorded_actions_likely(kind: str, tmp_path: Path) -> None:
    module = make_module(kind, pretrain={"actor": 60}, lr=3e-3)
    fit(module, tmp_path, 1)
    first = module.latest["train/loss/bc"]
    module = make_module(kind, pretrain={"actor": 60}, lr=3e-3)
    fit(module, tmp_path, 60)
    assert module.latest["train/loss/bc"] < first - 0.1


def test_dreamers_cloning_loss_is_the_likelihood_of_the_next_action() -> None:
    model, batch = make_module("dreamerv3").model, make_batch()
    out = model.loss(batch, model.initial(3), NoiseStreams(0))
    loss = model.cloning_loss(batch, out.feat)
    for b in range(3):
        for t in range(3):
            dist = model.pol(out.feat[b, t])["action"]
            normal = torch.distributions.Normal(dist.mean, dist.std)
            expected = -normal.log_prob(batch.prev_action["action"][b, t + 1]).sum()
            torch.testing.assert_close(loss[b, t], 0 * expected if batch.is_first[b, t + 1] else expected)
    recorded = torch.tensor([True, False, True])
    masked = model.cloning_loss(replace(batch, recorded=recorded), out.feat)
    torch.testing.assert_close(masked, loss * recorded.unsqueeze(1))


def test_tdmpc2s_cloning_loss_is_the_distance_of_its_mean() -> None:
    model, batch = make_module("tdmpc2").model, make_batch()
    zs = torch.rand(4, 3, 16)
    pi = model.pi(zs, None, None, torch.zeros(4, 3, 2))
    total = 0.0
    for t in range(3):
        missed = (pi.mean[t] - batch.prev_action["action"][:, t + 1]).square().sum(-1)
        total += 0.5**t * (missed * torch.tensor([1.0, 0.0, 1.0])).mean() / 3
    recorded = torch.tensor([True, False, True])
    torch.testing.assert_close(model.cloning_loss(pi, replace(batch, recorded=recorded)), total)


@BOTH
def test_a_weight_for_cloning_adds_to_the_policys_loss(kind: str, tmp_path: Path) -> None:
    option = {"loss_scales": {"bc": 0.5}} if kind == "dreamerv3" else {"bc_coef": 0.5}
    plain, cloning = make_module(kind), make_module(kind, **option)
    fit(plain, tmp_path, 1), fit(cloning, tmp_path, 1)
    assert "train/loss/bc" in cloning.latest
    assert "train/loss/bc" not in plain.latest
    assert changed(parts(kind, plain), parts(kind, cloning)) == {"actor"}


@BOTH
def test_rows_without_rewards_teach_nothing_about_rewards(kind: str) -> None:
    batch = make_batch()
    rewarded = torch.tensor([True, False, True])
    other = batch.reward.clone()
    other[1] = 1e3

    def gradients(reward: Tensor) -> list[Tensor | None]:
        model = make_module(kind).model
        some = replace(batch, reward=reward, rewarded=rewarded)
        if kind == "dreamerv3":
            model.loss(some, model.initial(3), NoiseStreams(0)).total.backward()
        else:
            model.model_loss(some, NoiseStreams(0)).total.backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(batch.reward), gradients(other), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@BOTH
@pytest.mark.parametrize("options", [{"train_world_model": False}, {"freeze": "all"}])
def test_data_without_rewards_need_a_world_model_that_learns(kind: str, options: dict[str, Any]) -> None:
    if "freeze" in options:
        options = {"freeze": make_module(kind).model.parts()["world_model"]}
    module = make_module(kind, **options)
    module.world_model_only = True
    with pytest.raises(ConfigError, match="no rewards for a critic, and train_world_model: false"):
        module.on_fit_start()
    clones = {"bc_coef": 1.0} if kind == "tdmpc2" else {"loss_scales": {"bc": 1.0}}
    module = make_module(kind, **options, **clones, train_critic=False)
    module.world_model_only = True
    assert module.learning() == {"world_model": False, "actor": True, "critic": False}
    module.on_fit_start()  # cloning alone


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrain": {"critic": 5}}, r"expected \{world_model: n, actor: m\}"),
        ({"pretrain": {"world_model": -1}}, "model.pretrain.world_model is -1"),
        ({"pretrain": {"world_model": 2}, "train_world_model": False}, "train_world_model: false freezes"),
        ({"pretrain": {"actor": 2}, "train_actor": False}, "train_actor: false or freeze keeps the actor"),
    ],
)
def test_pretraining_that_cannot_be_is_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_module(kind, **options)
