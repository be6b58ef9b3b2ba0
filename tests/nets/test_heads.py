"""Heads: batched first layers, kinds of actions, missing actions."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td

from lit_wm.nets.heads import ActionDist, Head, PolicyHead, batched_heads, flat_action, sample_actions
from lit_wm.noise import NoiseStreams
from lit_wm.types import Spec

ACTIONS = {
    "steer": Spec("float32", (3,)),
    "brake": Spec("float32", ()),
    "grid": Spec("float32", (2, 2)),
    "gear": Spec("int32", (), 5),
    "arm.buttons/all": Spec("int32", (2,), 3),
}


def policy(*lead: int) -> dict[str, ActionDist]:
    torch.manual_seed(0)
    return PolicyHead(6, 8, 2, ACTIONS, outscale=1.0)(torch.randn(*lead, 6))


def reference(dist: ActionDist) -> td.Distribution:
    if dist.spec.is_discrete:
        return td.Independent(td.Categorical(logits=dist.log_p), len(dist.spec.shape))
    return td.Independent(td.Normal(dist.mean, dist.std), len(dist.spec.shape))


@pytest.mark.parametrize("key", list(ACTIONS))
def test_log_prob_and_entropy_are_sums_over_the_dimensions(key: str) -> None:
    dist = policy(2, 4)[key]
    action = dist.sample(NoiseStreams(), "x")
    assert action.shape == (2, 4, *ACTIONS[key].shape)
    torch.testing.assert_close(dist.log_prob(action), reference(dist).log_prob(action))
    torch.testing.assert_close(dist.entropy(), reference(dist).entropy())


@pytest.mark.parametrize("key", list(ACTIONS))
def test_the_entropy_range_holds_every_entropy(key: str) -> None:
    dist = policy(50)[key]
    lo, hi = dist.entropy_range()
    assert lo <= dist.entropy().min()
    assert dist.entropy().max() <= hi + 1e-5
    if dist.spec.is_discrete:
        uniform = ActionDist(dist.spec, log_p=torch.zeros_like(dist.log_p).log_softmax(-1))
        assert uniform.entropy()[0].item() == pytest.approx(hi, rel=1e-5)
    else:
        widest = ActionDist(dist.spec, mean=dist.mean, std=torch.ones_like(dist.std))
        assert widest.entropy()[0].item() == pytest.approx(hi, rel=1e-5)


def test_continuous_samples_are_not_clipped() -> None:
    spec = Spec("float32", (1,))
    dist = ActionDist(spec, mean=torch.full((2000, 1), 0.9), std=torch.ones(2000, 1))
    assert dist.sample(NoiseStreams(), "x").max() > 2


def test_adding_a_key_leaves_the_draws_of_the_others_alone() -> None:
    dists = policy(4)
    alone = sample_actions({"gear": dists["gear"]}, NoiseStreams(), "policy")
    assert torch.equal(sample_actions(dists, NoiseStreams(), "policy")["gear"], alone["gear"])


def test_batched_heads_equal_each_alone() -> None:
    heads = [Head(6, 8, n, o, "out", 1.0) for n, o in ((1, 255), (1, 1), (3, 7))]
    feat = torch.randn(2, 3, 6)
    for head, out in zip(heads, batched_heads(feat, heads), strict=True):
        torch.testing.assert_close(out, head(feat))


def test_outputs_are_float32_in_bfloat16() -> None:
    head = Head(6, 8, 1, 3, "out", 1.0)
    assert head(torch.randn(2, 6).bfloat16()).dtype == torch.float32
    dist = PolicyHead(6, 8, 1, ACTIONS)(torch.randn(2, 6).bfloat16())
    assert {v.dtype for d in dist.values() for v in (d.log_p, d.mean, d.std) if v is not None} == {
        torch.float32
    }


def test_zero_outscale_starts_uniform() -> None:
    assert Head(6, 8, 1, 3, "out", 0.0)(torch.randn(2, 6)).count_nonzero() == 0


# --- Flat actions --------------------------------------------------------------------------------


def test_a_flat_action_has_sorted_keys_and_one_hot_classes() -> None:
    action = {
        "steer": torch.tensor([[0.1, 0.2, 7.0]]),
        "brake": torch.tensor([-3.0]),
        "grid": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]),
        "gear": torch.tensor([3]),
        "arm.buttons/all": torch.tensor([[2, 0]]),
    }
    want = [0, 0, 1, 1, 0, 0] + [-3] + [0, 0, 0, 1, 0] + [1, 2, 3, 4] + [0.1, 0.2, 7.0]
    torch.testing.assert_close(flat_action(action, ACTIONS, torch.float32), torch.tensor([want]))


@pytest.mark.parametrize(
    ("spec", "missing"),
    [
        (Spec("int32", (), 3), [-1]),
        (Spec("int32", (2,), 3), [1, -1]),
        (Spec("int32", (2,), 3), [-1, -1]),
        (Spec("float32", ()), [-torch.inf]),
        (Spec("float32", (2,)), [0.5, -torch.inf]),
        (Spec("float32", (2, 1)), [-torch.inf, -torch.inf]),
    ],
)
def test_one_missing_entry_makes_the_key_of_that_step_zero(spec: Spec, missing: list) -> None:
    here = torch.tensor(missing).view(spec.shape)
    action = torch.stack([here, torch.ones_like(here)])
    flat = flat_action({"a": action}, {"a": spec}, torch.float32)
    assert flat[0].count_nonzero() == 0
    assert flat[1].count_nonzero() == max(1, here.numel())


def test_a_missing_key_leaves_the_others_alone() -> None:
    specs = {"a": Spec("int32", (), 2), "b": Spec("float32", (1,))}
    flat = flat_action({"a": torch.tensor([-1]), "b": torch.tensor([[0.5]])}, specs, torch.float32)
    assert flat.tolist() == [[0.0, 0.0, 0.5]]
