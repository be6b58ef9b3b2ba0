"""TD-MPC2 under a Trainer: what an update does and leaves alone, the verbs on all kinds of inputs, resuming
within several processes, and one clear sentence for each thing it cannot do.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import ReplayDataModule
from lit_wm.callbacks.evaluate import run_episodes
from lit_wm.cli import main
from lit_wm.errors import CheckpointError, ConfigError, LitWMError, NotSupported
from lit_wm.nets.normed import Layers
from lit_wm.noise import NoiseStreams
from lit_wm.strategy import ReplicatedStrategy
from lit_wm.tdmpc2 import TDMPC2Module
from lit_wm.types import Batch, Spaces, Spec, State

BOX = {"action": Spec("float32", (3,))}
VECTOR = Spaces({"obs": Spec("float32", (5,))}, BOX)
DISCRETE = Spaces(VECTOR.obs, {"action": Spec("int32", (), 4)})
MIXED = Spaces(
    {"speed": Spec("float32", (2,)), "rays": Spec("float32", (2, 3)), "gear": Spec("int32", (), 3)},
    {"wheel": Spec("float32", (2,)), "arm": Spec("float32", (1,))},
)
HWC = Spaces({"image": Spec("uint8", (64, 64, 3))}, BOX)
CHW = Spaces({"image": Spec("uint8", (9, 64, 64))}, BOX)
LARGE = Spaces({"a": Spec("uint8", (84, 84, 1)), "b": Spec("uint8", (3, 84, 84))}, BOX)
TASKS = [
    {"name": "small", "obs": 3, "action": 1, "episode_length": 100},
    {"name": "large", "obs": 5, "action": 3, "episode_length": 500},
]
# Spaces, and what a model of them needs beside.
KINDS: dict[str, tuple[Spaces, dict[str, Any]]] = {
    "vector": (VECTOR, {}),
    "episodic": (VECTOR, {"episodic": True}),
    "dict": (MIXED, {}),
    "hwc": (HWC, {"num_channels": 2, "latent_dim": 32}),
    "chw": (CHW, {"num_channels": 2, "latent_dim": 32}),
    "84": (LARGE, {"num_channels": 2, "latent_dim": 72}),
    "discrete": (DISCRETE, {"episodic": True}),
    "tasks": (VECTOR, {"tasks": TASKS}),
}
SEARCH = {"num_samples": 16, "num_elites": 4, "num_pi_trajs": 4, "iterations": 2}


def make_module(spaces: Spaces = VECTOR, **options: Any) -> TDMPC2Module:
    """Random weights everywhere: heads that start at zero would hide most mistakes."""
    torch.manual_seed(0)
    options = {"planner_options": SEARCH, "log_every": 1} | options
    module = TDMPC2Module(spaces.to_plain(), "debug", **options)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def of_kind(kind: str, **options: Any) -> TDMPC2Module:
    spaces, needed = KINDS[kind]
    return make_module(spaces, **needed | options)


def entry(spec: Spec, *lead: int, generator: torch.Generator | None = None) -> Tensor:
    if spec.is_image or spec.is_discrete:
        dtype = torch.uint8 if spec.is_image else torch.int64
        return torch.randint(0, spec.classes or 256, (*lead, *spec.shape), generator=generator, dtype=dtype)
    return torch.rand(*lead, *spec.shape, generator=generator) * 2 - 1


def make_batch(spaces: Spaces = VECTOR, B: int = 6, T: int = 4, seed: int = 0, tasks: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    off = torch.zeros(B, T, dtype=torch.bool)
    terminal = off.clone()
    terminal[::3, -1] = True
    obs = {k: entry(s, B, T, generator=generator) for k, s in spaces.obs.items()}
    action = {k: entry(s, B, T, generator=generator) for k, s in spaces.action.items()}
    reward, task = torch.randn(B, T, generator=generator), None
    if tasks:
        task = torch.arange(B) * 2 // B
        obs["obs"][task == 0, :, 3:], action["action"][task == 0, :, 1:] = 0, 0
    return Batch(obs, action, reward, off, terminal, terminal, task=task)


def batch_of(kind: str, **options: Any) -> Batch:
    return make_batch(KINDS[kind][0], tasks=kind == "tasks", **options)


class History(pl.Callback):
    """The metrics of every update."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.metrics.append(dict(module.latest))


def fit(
    module: TDMPC2Module, folder: Path, batches: list[Batch], precision: str = "32-true"
) -> tuple[pl.Trainer, list[dict[str, float]]]:
    history = History()
    trainer = pl.Trainer(
        accelerator="cpu", precision=precision, max_steps=len(batches), logger=False, callbacks=[history],  # type: ignore[arg-type]
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda x: x))
    return trainer, history.metrics


def decoded(logits: Tensor, model: Any) -> Tensor:
    mean = (logits.softmax(-1) * torch.linspace(-10, 10, model.bins.numel())).sum(-1)
    return mean.sign() * (mean.abs().exp() - 1)


# --- The verbs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vector", "tasks"])
def test_no_gradient_explodes_where_the_references_entropy_has_a_pole(kind: str) -> None:
    model, z = of_kind(kind).model, torch.full((1, 16), 1 / 8)
    z = z[:, :1].expand(1, model.latent_dim)
    task = torch.tensor([0]) if kind == "tasks" else None  # one of the three action entries
    emb, A = (None, 3) if task is None else (model.embed(task), 1)

    def policy(eps: float) -> Any:  # farther from the mean: less likely
        return model.pi(z, emb, task, torch.full((1, 3), eps))

    low, high = 0.0, 6.0
    assert policy(low).entropy < 0 < policy(high).entropy
    for _ in range(60):  # to the neighbours in float32
        middle = (low + high) / 2
        low, high = (middle, high) if policy(middle).entropy < 0 else (low, middle)
    found = policy(low)
    assert found.entropy.abs() < 3e-6
    log_std = found.log_std.sum(-1)  # 0 of masked entries
    gauss = -0.5 * A * low**2 - log_std - 3 * math.log(2 * math.pi) / 2
    torch.testing.assert_close(found.scaled_entropy, -A * gauss, rtol=1e-4, atol=1e-5)
    weights = list(model.policy.parameters())
    got = torch.autograd.grad(found.scaled_entropy.sum(), weights, retain_graph=True)
    expected = torch.autograd.grad(A * log_std.sum(), weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_verbs_on_every_kind_of_input(kind: str) -> None:
    module, (spaces, _) = of_kind(kind), KINDS[kind]
    B, L, H = 3, module.model.latent_dim, 4
    obs = {k: entry(s, B) for k, s in spaces.obs.items()}
    more = {"task": torch.tensor([0, 1, 1])} if kind == "tasks" else {}
    with torch.no_grad():
        state = module.encode(obs, **more)
        dream = module.imagine(state, horizon=H)
        again = module.imagine(state, dream.actions)
    assert state.deter.shape == (B, L)
    assert state.stochastic is None
    groups = state.deterministic.view(B, -1, module.model.simnorm_dim)
    torch.testing.assert_close(groups.sum(-1), torch.ones(groups.shape[:-1]))
    assert len(dream.states) == H + 1
    assert torch.equal(dream.states[0].deter, state.deter)
    for key, spec in spaces.action.items():
        value = dream.actions[key]
        assert value.shape == (B, H, *spec.shape)
        low, high = (0, spec.classes - 1) if spec.classes else (-1, 1)
        assert low <= float(value.min()) <= float(value.max()) <= high
    if kind == "tasks":  # a task without an entry never moves it
        assert float(dream.actions["action"][0, :, 1:].abs().max()) == 0
        assert float(dream.actions["action"][1:, :, 1:].abs().min()) > 0
    assert torch.equal(again.rewards, dream.rewards)
    assert torch.equal(again.states.stacked.deter, dream.states.stacked.deter)
    episodic = module.model.episodic
    assert bool((dream.continues < 1).all()) is episodic
    first = {k: v[:, 0] for k, v in dream.actions.items()}
    every = module.model.q(state, first, reduce=None)
    assert every.shape == (2, B)
    torch.testing.assert_close(module.q(state, first), every.mean(0))
    torch.testing.assert_close(module.model.q(state, first, reduce="min"), every.amin(0))
    for mode in ("train", "eval"):
        action, after = module.act(obs, None, mode=mode, **more)
        assert {k: v.shape for k, v in action.items()} == {k: (B, *s.shape) for k, s in spaces.action.items()}
        assert after.plan.shape == (B, 3, module.model.action_dim)
        action, _ = module.act(obs, after, torch.zeros(B, dtype=torch.bool), mode)
    with pytest.raises(NotSupported, match="no decoder"):
        module.decode(state)


def test_dictionaries_are_concatenated_in_the_environments_order() -> None:
    model = of_kind("dict").model
    obs = {k: entry(s, 2) for k, s in MIXED.obs.items()}
    hot = nn.functional.one_hot(obs["gear"], 3).float()
    assert torch.equal(model.observations(obs), torch.cat([obs["speed"], obs["rays"].flatten(1), hot], 1))
    action = {"wheel": torch.rand(2, 2), "arm": torch.rand(2, 1)}
    flat = model.actions(action)
    assert flat.shape == (2, 3)
    back = model.action_keys(flat)
    assert list(back) == ["wheel", "arm"]
    assert all(torch.equal(back[k], action[k]) for k in action)


def test_images_are_the_same_in_either_layout() -> None:
    first, last = (
        of_kind("chw"),
        make_module(Spaces({"image": Spec("uint8", (64, 64, 9))}, BOX), num_channels=2, latent_dim=32),
    )
    image = torch.randint(0, 256, (2, 9, 64, 64), dtype=torch.uint8)
    states = [m.encode(x, noise=NoiseStreams(1)) for m, x in ((first, image), (last, image.movedim(1, -1)))]
    torch.testing.assert_close(states[0].deter, states[1].deter)
    assert not torch.equal(first.encode(image, noise=NoiseStreams(2)).deter, states[0].deter)  # other shifts


@pytest.mark.parametrize("kind", ["vector", "discrete", "tasks"])
def test_an_episodes_beginning_forgets_only_its_own_plan(kind: str) -> None:
    free = SEARCH | {"num_pi_trajs": 0}  # those do not depend on the plan
    module, spaces = of_kind(kind, planner_options=free), KINDS[kind][0]
    obs = {k: entry(s, 3) for k, s in spaces.obs.items()}
    more = {"task": torch.tensor([0, 1, 1])} if kind == "tasks" else {}
    _, before = module.act(obs, noise=NoiseStreams(5), **more)
    before.plan = torch.rand_like(before.plan)

    def plans(is_first: list[bool] | None) -> Tensor:
        flags = None if is_first is None else torch.tensor(is_first)
        return module.act(obs, before, flags, noise=NoiseStreams(6), **more)[1].plan

    kept, middle, fresh = plans([False] * 3), plans([False, True, False]), plans([True] * 3)
    assert torch.equal(plans(None), kept)
    assert torch.equal(middle[[0, 2]], kept[[0, 2]])
    assert torch.equal(middle[1], fresh[1])
    assert (kept != fresh).flatten(1).any(1).all()
    assert torch.equal(fresh, module.act(obs, None, noise=NoiseStreams(6), **more)[1].plan)


def test_without_a_planner_the_policy_acts() -> None:
    module = make_module(planner="policy")
    obs = torch.rand(4, 5)
    action, state = module.act(obs, noise=NoiseStreams(1))
    assert state.plan is None
    mean = module.model.pi(module.encode(obs).deter, None, None, torch.zeros(4, 3)).mean
    assert torch.equal(action["action"], mean)
    sampled, _ = module.act(obs, mode="train", noise=NoiseStreams(1))
    assert not torch.equal(sampled["action"], mean)


# --- The losses -----------------------------------------------------------------------------------------


def test_consistency_reaches_the_encoder_through_every_step() -> None:
    """Linear encoder W and dynamics z' = D z + E a, worked out by hand: z[t] depends on W by D^t W o[0]."""
    module, batch = make_module(rho=0.7), make_batch(B=4)
    model, L = module.model, 16
    W, D, E = (0.3 * torch.randn(L, n, dtype=torch.float64) for n in (5, L, 3))
    model.encoder, model.dynamics = nn.Linear(5, L, bias=False), nn.Linear(L + 3, L, bias=False)
    model.encoder.weight.data, model.dynamics.weight.data = W.float(), torch.cat([D, E], 1).float()
    out = model.model_loss(batch, NoiseStreams())
    out.losses["consistency"].backward()

    obs, action = batch.obs["obs"].double(), batch.prev_action["action"].double()
    z, through, loss, grad = obs[:, 0] @ W.T, torch.eye(L, dtype=torch.float64), 0.0, torch.zeros_like(W)
    for t in range(3):
        z, through = z @ D.T + action[:, t + 1] @ E.T, D @ through
        miss = z - obs[:, t + 1] @ W.T  # the target's own W gets no gradient
        loss += 0.7**t * float(miss.square().mean()) / 3
        grad += 0.7**t * 2 / (3 * 4 * L) * through.T @ miss.T @ obs[:, 0]
    assert float(out.losses["consistency"].detach()) == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(model.encoder.weight.grad.double(), grad, rtol=1e-4, atol=1e-6)


def test_the_target_stops_at_terminations_and_only_there() -> None:
    model, batch = of_kind("episodic").model, make_batch()
    out = model.model_loss(batch, NoiseStreams())
    ended, reward = batch.is_terminal[:, 1:].T, batch.reward[:, 1:].T
    assert torch.equal(out.td_target[ended], reward[ended])
    assert (out.td_target[~ended] != reward[~ended]).all()
    broken_off = replace(
        batch, is_terminal=torch.zeros_like(batch.is_terminal)
    )  # is_last stays: a time limit
    target = model.model_loss(broken_off, NoiseStreams()).td_target
    assert torch.equal(target[~ended], out.td_target[~ended])
    assert (target[ended] != reward[ended]).all()


def test_what_led_to_a_windows_first_observation_is_not_read() -> None:
    model, batch = of_kind("episodic").model, make_batch()
    action, reward, terminal = (
        batch.prev_action["action"].clone(),
        batch.reward.clone(),
        batch.is_terminal.clone(),
    )
    action[:, 0], reward[:, 0], terminal[:, 0] = float("nan"), float("nan"), True
    other = replace(batch, prev_action={"action": action}, reward=reward, is_terminal=terminal)
    totals = [model.model_loss(b, NoiseStreams()).total for b in (batch, other)]
    assert torch.equal(*totals)


def test_the_policy_loss_of_discrete_actions_is_the_expectation() -> None:
    model = of_kind("discrete", dropout=0.0, entropy_coef=0.03, rho=0.7).model
    zs = torch.rand(4, 6, 16)
    loss, metrics = model.policy_loss(zs, None, NoiseStreams())
    log_p = model.policy(zs).log_softmax(-1)
    values = torch.zeros(4, 6, 4)
    for c in range(4):
        x = torch.cat([zs, torch.eye(4)[c].expand(4, 6, 4)], -1).flatten(0, 1)
        values[..., c] = decoded(model.critic(x), model).mean(0).view(4, 6)
    q = (log_p.exp() * values.detach()).sum(-1)
    low, high = torch.quantile(q[0].detach(), torch.tensor([0.05, 0.95]))
    scale = 1 + 0.01 * (max(float(high - low), 1.0) - 1)
    assert float(metrics["pi/scale"]) == pytest.approx(scale)
    entropy = -(log_p.exp() * log_p).sum(-1)
    want = -(torch.tensor([0.7**t for t in range(4)]) * (q / scale + 0.03 * entropy).mean(1)).mean()
    torch.testing.assert_close(loss, want)
    params = model.group("policy")
    for our, theirs in zip(*(torch.autograd.grad(v, params) for v in (loss, want)), strict=True):
        torch.testing.assert_close(our, theirs, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("length", "gamma"), [(100, 0.95), (200, 0.975), (250, 0.98), (500, 0.99), (1000, 0.995), (None, 0.995)]
)
def test_the_discount_follows_the_episodes_length(length: int | None, gamma: float) -> None:
    spaces = replace(VECTOR, episode_length=length)
    assert make_module(spaces).model.discount == pytest.approx(gamma)
    assert make_module(spaces, discount_max=0.98).model.discount == pytest.approx(min(gamma, 0.98))
    assert make_module(spaces, discount=0.9).model.discount == pytest.approx(0.9)


def test_tasks_have_a_discount_each() -> None:
    model = of_kind("tasks").model
    torch.testing.assert_close(model.discount, torch.tensor([0.95, 0.99]))
    torch.testing.assert_close(of_kind("tasks", discount=[0.5, 0.6]).model.discount, torch.tensor([0.5, 0.6]))
    zs, reward, ended = torch.rand(3, 2, 16), torch.zeros(3, 2), torch.zeros(3, 2)
    task = torch.tensor([0, 1])
    with torch.no_grad():
        emb = model.embed(task)
        target = model.td_target(zs, reward, ended, task, emb, NoiseStreams(3))
        model.discount[:] = 1
        whole = model.td_target(zs, reward, ended, task, emb, NoiseStreams(3))
    torch.testing.assert_close(target, whole * torch.tensor([0.95, 0.99]))


def test_the_dropout_is_the_critics_and_of_its_rate() -> None:
    model = make_module(dropout=0.25).model
    keep = model.dropout_of(NoiseStreams(), "dropout/model", torch.zeros(500, 4), 2)
    assert keep.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((keep == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(keep[0], keep[1])
    assert model.dropout_of(NoiseStreams(), "dropout/model", torch.zeros(5, 4), 2) is not None
    z, action = torch.rand(4, 16), torch.rand(4, 3)
    assert torch.equal(model.q(State(z), action), model.q(State(z), action))  # none outside of updates


@pytest.mark.parametrize("tasks", [None, TASKS])
def test_every_weight_begins_as_the_reference_has_it(tasks: list | None) -> None:
    torch.manual_seed(0)
    model = TDMPC2Module(VECTOR.to_plain(), "1m", tasks=tasks).model
    for name, part in model.named_children():
        if not isinstance(part, Layers):
            continue
        zero = name in ("reward", "critic", "target_critic")
        for i, layer in enumerate(part):
            for weight in layer.weight.detach() if layer.weight.ndim == 3 else [layer.weight.detach()]:
                want = 0.0 if zero and i == len(part) - 1 else 0.02
                assert float(weight.std()) == pytest.approx(want, rel=0.1), f"{name}.{i}"
    for ours, theirs in zip(model.critic.parameters(), model.target_critic.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    if tasks:
        assert 0.015 < float(model.task_embedding.weight.detach().abs().max()) <= 0.02


# --- Updates under a Trainer --------------------------------------------------------------------------------

PARTS = {
    "train_world_model": ("encoder.", "dynamics.", "reward.", "termination.", "task_embedding."),
    "train_actor": ("policy.",),
    "train_critic": ("critic.", "target_critic."),
}


@pytest.mark.parametrize("kind", ["episodic", "chw", "tasks", "discrete"])
@pytest.mark.parametrize("frozen", [(), *((k,) for k in PARTS), ("train_world_model", "train_critic")])
def test_a_flag_freezes_its_part_bit_for_bit_and_no_other(kind: str, frozen: tuple, tmp_path: Path) -> None:
    module = of_kind(kind, **dict.fromkeys(frozen, False))
    before = {k: v.clone() for k, v in module.model.state_dict().items()}
    trainer, _ = fit(module, tmp_path, [batch_of(kind, seed=i) for i in range(3)])
    assert module.updates == trainer.global_step == int(module.updates_done) == 3
    for name, value in module.model.state_dict().items():
        part = next((k for k, names in PARTS.items() if name.startswith(names)), None)
        if part is not None:
            assert torch.equal(value, before[name]) is (part in frozen), name


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing would be trained"):
        make_module(**dict.fromkeys(PARTS, False))


@pytest.mark.parametrize("grad", ["official", "none"])
def test_the_policy_leaves_a_gradient_in_the_task_embedding(grad: str, tmp_path: Path) -> None:
    """One update: what is left for the next one."""
    module = of_kind("tasks", task_embedding_policy_grad=grad)
    fit(module, tmp_path, [batch_of("tasks")])
    left = module.model.task_embedding.weight.grad
    assert (left is not None and float(left.abs().max()) > 0) is (grad == "official")
    assert all(p.grad is None for n, p in module.model.named_parameters() if not n.startswith("task_emb"))


@pytest.mark.parametrize("kind", ["vector", "discrete"])
def test_a_fixed_batch_is_learnt(kind: str, tmp_path: Path) -> None:
    spaces, needed = KINDS[kind]
    torch.manual_seed(0)
    module = TDMPC2Module(spaces.to_plain(), "debug", lr=3e-3, log_every=1, **needed)
    _, metrics = fit(module, tmp_path, [make_batch(spaces)] * 60)
    first, last = metrics[0], metrics[-1]
    for name in ("reward", "value", *(["termination"] if "episodic" in needed else [])):
        assert last[f"train/loss/{name}"] < 0.8 * first[f"train/loss/{name}"], name
    assert last["train/opt/loss"] < 0.8 * first["train/opt/loss"]


@pytest.mark.parametrize("kind", ["episodic", "chw", "discrete", "tasks"])
def test_bfloat16_stays_near_float32(kind: str, tmp_path: Path) -> None:
    full, half = (
        fit(of_kind(kind), tmp_path, [batch_of(kind)] * 2, precision)[1][-1]
        for precision in ("32-true", "bf16-mixed")
    )
    names = [k for k in full if k.startswith(("train/loss", "train/opt/loss", "train/pi/scale"))]
    assert len(names) >= 6
    for name in names:
        assert half[name] == pytest.approx(full[name], rel=0.03, abs=0.003), name
    assert any(half[k] != full[k] for k in names)


# --- Two processes ----------------------------------------------------------------------------------------

ROWS = {"td/policy": 1, "policy": 1, "shift/next": 1, "shift/first": 0}  # the batch's axis
UPDATES = 4


class SharedNoise:
    """The noise of one rank: its rows of what is drawn for the whole batch, so that ranks can be compared."""

    def __init__(self, update: int, rank: int, world: int, batch: int):
        self.update, self.rank, self.world, self.batch = update, rank, world, batch

    def normal(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(100 * self.update + len(name))
        draw = torch.rand if name.startswith(("shift", "dropout")) or name.endswith("/q") else torch.randn
        if name.endswith("/q"):  # the same critics everywhere
            return draw(shape, generator=generator)
        parts = list(shape)
        if name.startswith("dropout"):  # (K, time * batch, units)
            parts[1:2] = [shape[1] // self.batch, self.batch]
        axis = ROWS.get(name, 2)
        parts[axis] *= self.world
        whole = draw(parts, generator=generator)
        return whole.narrow(axis, self.rank * self.batch, self.batch).reshape(shape)

    uniform = normal

    def state_dict(self) -> dict[str, Any]:
        return {}


class Feed(pl.Callback):
    """Sets the noise of each update, and writes what the process has become."""

    def __init__(self, folder: Path, whole: int):
        self.folder, self.whole = folder, whole

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        world = trainer.world_size
        module.noise = SharedNoise(batch_idx, trainer.global_rank, world, self.whole // world)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        grad = module.model.task_embedding.weight.grad
        result = {"state": module.state_dict(), "left": grad, "metrics": module.latest}
        torch.save(result, self.folder / f"rank{trainer.global_rank}of{trainer.world_size}.pt")


class Data(pl.LightningDataModule):
    """The same whole batches in every process, of which each takes its rows."""

    def train_dataloader(self) -> DataLoader:
        B = 6 // self.trainer.world_size
        rows = slice(self.trainer.global_rank * B, (self.trainer.global_rank + 1) * B)
        return DataLoader(
            [
                Batch(
                    {"obs": b.obs["obs"][rows]}, {"action": b.prev_action["action"][rows]}, b.reward[rows],
                    b.is_first[rows], b.is_last[rows], b.is_terminal[rows], task=b.task[rows],
                )
                for b in (batch_of("tasks", seed=i) for i in range(UPDATES))
            ],
            batch_size=None, collate_fn=lambda x: x,
        )  # fmt: skip


def shared_module() -> TDMPC2Module:
    module = of_kind("tasks", lr=1e-4)
    with torch.no_grad():  # longer than 1, and each process has batches of one task alone
        module.model.task_embedding.weight.mul_(20)
        module.model.critic[2].weight.mul_(30)  # values over which the scale moves
    return module


def train_shared(folder: Path, devices: int) -> None:
    fork = ReplicatedStrategy(start_method="fork", process_group_backend="gloo")
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=fork if devices > 1 else "auto", max_steps=UPDATES,
        logger=False, callbacks=[Feed(folder, 6)], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(shared_module(), datamodule=Data())


def test_two_processes_equal_one(tmp_path: Path) -> None:
    train_shared(tmp_path, 1)
    train_shared(tmp_path, 2)
    one = torch.load(tmp_path / "rank0of1.pt", weights_only=True)
    two = [torch.load(tmp_path / f"rank{r}of2.pt", weights_only=True) for r in range(2)]
    start = shared_module().state_dict()
    for key, value in one["state"].items():
        assert torch.equal(two[0]["state"][key], two[1]["state"][key]), f"{key} differs between the ranks"
        error = float((two[0]["state"][key].double() - value.double()).abs().max())
        assert error <= 2e-6, f"{key} differs by {error:.2e} from one process"
        if value.is_floating_point() and key not in ("model.action_mask",):
            least = 1e-7 if key.startswith("model.target_critic") else 5e-5
            assert float((value - start[key]).abs().max()) > least, f"{key} was not trained"
    assert float(one["state"]["model.scale"]) != 1
    # What the policy has left in the embedding for the next update is each process's own: their mean counts.
    assert float(one["left"].abs().max()) > 0
    torch.testing.assert_close((two[0]["left"] + two[1]["left"]) / 2, one["left"], rtol=1e-3, atol=1e-7)


# --- Environments -----------------------------------------------------------------------------------------


def pendulum(**options: Any) -> ReplayDataModule:
    options = {"batch_size": 4, "batch_length": 4, "windows": "episode", "utd": 1, "prefill": 24,
               "capacity": 400, "env_options": {"time_limit": 20}} | options  # fmt: skip
    return ReplayDataModule(options.pop("env", "Pendulum-v1"), **options)


def run_fit(data: ReplayDataModule, folder: Path, steps: int = 5, **options: Any) -> TDMPC2Module:
    module = TDMPC2Module(data.spaces, "debug", planner_options=SEARCH, log_every=1, **options)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    try:
        trainer.fit(module, data)
    finally:
        data.close()
    assert module.updates == trainer.global_step == steps
    return module


def test_it_trains_and_is_evaluated_in_an_environment(tmp_path: Path) -> None:
    data = pendulum(num_envs=2)
    module = run_fit(data, tmp_path)
    assert module.model.discount == pytest.approx(0.95)  # 20 decisions
    envs = data.make_envs(2, [1, 2])
    results = run_episodes(module.policy, envs, 4, 7)
    envs.close()
    assert results.lengths == [20] * 4
    assert all(-400 < r < 0 for r in results.returns)
    assert all(x > 0 for x in results.jitter)


# --- One clear sentence each ------------------------------------------------------------------------------


def spaces_of(obs: Spec | None = None, action: Spec | None = None) -> Spaces:
    return Spaces({"obs": obs or VECTOR.obs["obs"]}, {"action": action or BOX["action"]})


IMAGE = Spec("uint8", (64, 64, 3))
WRONG: dict[str, tuple[Spaces, dict[str, Any], str]] = {
    "latent": (spaces_of(IMAGE), {"preset": "5m", "num_channels": 16},
               r"leaves 16 x 4 x 4 = 256 numbers of 64x64 .*latent_dim is 512(?s:.)*num_channels: 32"),
    "latent-odd": (spaces_of(IMAGE), {"preset": "1m", "num_channels": 3},
                   "num_channels: 8, or model.latent_dim: 48"),
    "small": (spaces_of(Spec("uint8", (32, 32, 3))), {}, "nothing of 32x32 images(?s:.)*at least 47x47"),
    "image-and-vector": (Spaces(VECTOR.obs | {"image": IMAGE}, BOX), {},
                         r"vectors or images, not both: \['image'\] and \['obs'\](?s:.)*drop: \[NAME\]"),
    "two-sizes": (Spaces({"a": IMAGE, "b": Spec("uint8", (84, 84, 3))}, BOX), {}, "must share one height"),
    "multi-discrete": (spaces_of(action=Spec("int32", (2,), 3)), {}, "vectors or by one discrete choice"),
    "two-kinds": (Spaces(VECTOR.obs, {"move": Spec("float32", (2,)), "gear": Spec("int32", (), 3)}), {},
                  r"not by \['gear', 'move'\] with discrete \['gear'\]"),
    "task-alone": (VECTOR, {"task": "small"}, "model.task is 'small', but model.tasks names no tasks"),
    "task-set": (VECTOR, {"tasks": "mt3"}, "unknown task set 'mt3'"),
    "task-sizes": (
        spaces_of(Spec("float32", (6,))),
        {"tasks": TASKS, "task": "small"},
        "data has 6 observed numbers and 3 action numbers; expected 3 and 1 or 5 and 3, as the task small or",
    ),
    "task-other": (
        spaces_of(Spec("float32", (3,)), Spec("float32", (2,))),
        {"tasks": TASKS, "task": "small"},
        "data has 3 observed numbers and 2 action numbers; expected 3 and 1 or 5 and 3",
    ),
    "task-unsaid": (
        spaces_of(Spec("float32", (3,))),
        {"tasks": TASKS},
        "expected 5 and 3, as the largest of model.tasks(?s:.)*Say with model.task which task it is",
    ),
    "task-images": (spaces_of(IMAGE), {"tasks": TASKS}, "several tasks(?s:.)*vector observations"),
    "discounts": (VECTOR, {"tasks": TASKS, "discount": [0.9]}, "one or 2 for the tasks"),
    "simnorm": (VECTOR, {"simnorm_dim": 7}, "model.latent_dim is 16; expected a multiple of simnorm_dim, 7"),
    "horizon": (VECTOR, {"horizon": 0}, "model.horizon is 0"),
    "grad": (VECTOR, {"task_embedding_policy_grad": "some"}, "expected 'official' or 'none'"),
    "planner": (VECTOR, {"planner": "mpc"}, "unknown planner 'mpc'(?s:.)*mppi, cem, gradient"),
    "option": (VECTOR, {"planner_options": {"num_sample": 3}}, "'num_sample'(?s:.)*num_samples"),
    "lr": (VECTOR, {"lr": 0.0}, "model.lr is 0.0; expected more than 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_explained(case: str) -> None:
    spaces, options, message = WRONG[case]
    with pytest.raises(LitWMError, match=message) as caught:
        TDMPC2Module(spaces.to_plain(), **{"preset": "debug"} | options)
    assert len(str(caught.value).splitlines()) <= 5


def test_observations_of_another_shape_are_explained() -> None:
    module = make_module()
    for obs, message in (
        (torch.zeros(2, 6), r"observation 'obs' has shape \(2, 6\); expected \(batch, 5\)"),
        (torch.zeros(2, 64, 64, 3, dtype=torch.uint8), r"has shape \(2, 64, 64, 3\); expected \(batch, 5\)"),
        (torch.zeros(2, 4, 5), "one step"),
        ({"pixels": torch.zeros(2, 5)}, r"observation keys \['obs'\] are missing; got \['pixels'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            module.act(obs)
    with pytest.raises(ValueError, match="expected an image of uint8"):
        of_kind("hwc").act(torch.zeros(2, 64, 64, 3))
    with pytest.raises(ConfigError, match="2 tasks: say which, by model.task or the argument `task`"):
        of_kind("tasks").act(torch.zeros(2, 5))


def test_a_window_of_another_length_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.batch_length is 6; expected 4, one more than model.horizon"):
        run_fit(pendulum(batch_length=6), tmp_path)


def test_windows_across_episodes_are_refused(tmp_path: Path) -> None:
    data = pendulum(windows="stream", batch_length=5, capacity=400)
    with pytest.raises(ConfigError, match="data.windows is 'stream', but TDMPC2Module learns from 'episode'"):
        run_fit(data, tmp_path, horizon=4)


def test_an_end_by_itself_needs_a_termination_head(tmp_path: Path) -> None:
    data = pendulum(env="CartPole-v1", prefill=40, env_options={}, capacity=600)
    with pytest.raises(ConfigError, match="Set model.episodic: true"):
        run_fit(data, tmp_path)


def test_an_action_space_without_bounds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "endless.py").write_text(
        "import gymnasium as gym\nimport numpy as np\n"
        "class Endless(gym.Env):\n"
        "    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)\n"
        "    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)\n"
        "gym.register('Endless-v0', entry_point=Endless)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = ["fit", "--config", "tdmpc2_pendulum", "--data.env", "endless:Endless-v0"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "TD-MPC2 and planners search actions between bounds; action has none" in error
    assert len(error.strip().splitlines()) <= 5


# --- A further task for a converted checkpoint --------------------------------------------------------------

GOLDEN = Path(__file__).parent / "parity" / "data" / "tdmpc2" / "official_checkpoint_old_format_multitask.pt"
OFFICIAL = [  # the file's three tasks, of which it tells the largest alone
    {"name": "a", "obs": 3, "action": 1, "episode_length": 100},
    {"name": "b", "obs": 8, "action": 4, "episode_length": 100},
    {"name": "c", "obs": 6, "action": 3, "episode_length": 1000},
]


class Start(pl.Callback):
    """The weights before the first update, and what it looked up."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.state = {k: v.clone() for k, v in module.model.state_dict().items()}


@pytest.mark.parametrize(("task", "like"), [("swing", None), ("swing", "b"), ("a", None)])
def test_a_converted_checkpoint_is_finetuned(task: str, like: str | None, tmp_path: Path) -> None:
    file, data, start = tmp_path / "ours.ckpt", pendulum(), Start()
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(yaml.safe_dump(OFFICIAL))
    assert main(["convert", "tdmpc2", str(GOLDEN), "-o", str(file), "--tasks", str(tasks)]) == 0
    theirs = torch.load(file, weights_only=True)
    given = {k.removeprefix("model."): v for k, v in theirs["state_dict"].items() if k.startswith("model.")}
    sizes = {k: theirs["hyper_parameters"][k] for k in ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers",
                                                        "num_q", "task_dim", "num_bins")}  # fmt: skip
    module = TDMPC2Module(
        data.spaces, "debug", **sizes, tasks=OFFICIAL, task=task, task_like=like, start_from=str(file),
        planner_options=SEARCH, log_every=1,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, logger=False, callbacks=[start], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    try:
        trainer.fit(module, data)
    finally:
        data.close()
    row, new, old = {"swing": 3, "a": 0}[task], task == "swing", "task_embedding.weight"
    assert module.model.task_index == row
    assert start.state.keys() == given.keys()
    for name, value in given.items():
        if name not in (old, "action_mask"):
            assert torch.equal(start.state[name], value), name
    rows, after = start.state[old], module.model.task_embedding.weight.detach()
    assert torch.equal(rows[:3], given[old])
    assert len(rows) == 3 + new
    if like:
        assert torch.equal(rows[3], given[old][1])
    elif new:
        assert float(rows[3].abs().max()) <= 0.02
    moved = [bool((a != b).any()) for a, b in zip(after, rows, strict=True)]
    assert moved == [i == row for i in range(len(rows))]
    # One action of the largest task's four.
    mask = module.model.action_mask
    assert mask.sum(1).tolist() == [1, 4, 3] + [1] * new
    _, state = module.act(torch.zeros(1, 3))
    assert state.task.tolist() == [row]
    assert state.plan.shape == (1, 3, 4)
    assert float(state.plan[..., 0].abs().min()) > 0 == float(state.plan[..., 1:].abs().max())
    assert module.model.discount[row] == pytest.approx(0.95)


def test_weights_of_other_networks_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    torch.save({"state_dict": make_module().state_dict()}, file)
    for options, message in (
        ({"mlp_dim": 25}, "other networks than this configuration's, in critic.0.bias"),
        ({"tasks": TASKS, "task": "large"}, "other networks.*task_embedding|other networks.*critic.0.weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            make_module(**options).model.load_weights(file)
    (tmp_path / "b.ckpt").write_text("nothing")
    for name, why in {"b.ckpt": "not a checkpoint of lit-wm", "c.ckpt": "no such checkpoint\n"}.items():
        with pytest.raises(CheckpointError, match=f"model.start_from .*{name}: {why}"):
            make_module().model.load_weights(tmp_path / name)
    torch.save({"state_dict": of_kind("tasks").state_dict()}, file)
    further = make_module(tasks=TASKS, task="new").model
    with pytest.raises(ConfigError, match="model.task_like is 'lrge': no task of the checkpoint.*large"):
        further.load_weights(file, "lrge")
    with pytest.raises(ConfigError, match="model.task_like is 'large'.*model.task is no new task"):
        of_kind("tasks").model.load_weights(file, "large")
    saved = of_kind("tasks")
    saved.model.scale.fill_(7)
    torch.save({"state_dict": saved.state_dict(), "hyper_parameters": dict(saved.hparams)}, file)
    further.load_weights(file, "large")
    assert further.scale == 1  # begins anew, as optimisers and replay do
    with pytest.raises(CheckpointError, match=r"other networks .*task_embedding.weight|critic.0.weight"):
        make_module(tasks=TASKS, task="new", task_dim=7).model.load_weights(file)
    with pytest.raises(CheckpointError, match=r"has the tasks .* in the same order"):
        make_module(tasks=TASKS[::-1], task="new").model.load_weights(file)


def test_a_checkpoint_is_evaluated_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layers = ["--config", "tdmpc2_cartpole", "--config", "overlay/debug_tdmpc2"]
    assert main(["fit", *layers, "--trainer.logger", "false", "--name", "one"]) == 0
    run = "runs/CartPole-v1/one"
    scores = []
    for file in ("a.json", "b.json"):
        assert main(["evaluate", "--ckpt", run, "--episodes", "3", "--json", file]) == 0
        scores.append(json.loads(Path(file).read_text()))
    assert scores[0]["returns"] == scores[1]["returns"]
    assert len(scores[0]["returns"]) == 3
    assert scores[0]["class_path"] == "lit_wm.tdmpc2.TDMPC2Module"
    assert main(["export", "--ckpt", run, "-o", "alone.ckpt"]) == 0
    module = TDMPC2Module.load_from_checkpoint("alone.ckpt", weights_only=True)
    assert module.model.episodic
    assert module.model.discrete


def test_a_reward_scale_is_a_factor_on_the_rewards() -> None:
    batch = make_batch()
    plain, scaled = make_module(), make_module(reward_scale=20.0)
    expected = plain.model.model_loss(replace(batch, reward=20 * batch.reward), NoiseStreams(0))
    found = scaled.model.model_loss(batch, NoiseStreams(0))
    assert torch.equal(found.total, expected.total)
    assert not torch.equal(found.total, plain.model.model_loss(batch, NoiseStreams(0)).total)
    with pytest.raises(ConfigError, match="model.reward_scale is 0"):
        make_module(reward_scale=0.0)
