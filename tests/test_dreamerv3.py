"""The gradient step under a Trainer: what it changes, what it leaves alone, and in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lit_wm.dreamerv3 import LOSS_SCALES, DreamerV3, DreamerV3Module
from lit_wm.errors import ConfigError
from lit_wm.noise import NoiseStreams
from lit_wm.optim import LaProp, learning_rate
from lit_wm.types import Batch, Spaces, Spec

VECTOR = Spaces({"obs": Spec("float32", (5,))}, {"action": Spec("int32", (), 4)})
MIXED = Spaces(
    {"image": Spec("uint8", (48, 64, 3)), "vector": Spec("float32", (3,)), "level": Spec("int32", (), 4)},
    {"move": Spec("float32", (2,)), "gear": Spec("int32", (2,), 3)},
)
SIZES = {"deter": 32, "hidden": 16, "stoch": 4, "classes": 4, "depth": 2, "units": 16}
GROUPS = ("world_model", "actor", "critic")


def make_module(spaces: Spaces = VECTOR, **options: Any) -> DreamerV3Module:
    """Random weights everywhere: heads that start at zero would hide most mistakes."""
    torch.manual_seed(0)
    options = {"imag_length": 4, "lr": 1e-3, "warmup": 1, "log_every": 1} | options
    module = DreamerV3Module(spaces.to_plain(), "debug", **SIZES | options)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def make_batch(spaces: Spaces = VECTOR, B: int = 3, T: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def entry(spec: Spec) -> Tensor:
        if spec.is_image or spec.is_discrete:
            dtype = torch.uint8 if spec.is_image else torch.int64
            return torch.randint(
                0, spec.classes or 256, (B, T, *spec.shape), generator=generator, dtype=dtype
            )
        return torch.randn(B, T, *spec.shape, generator=generator)

    flags = torch.rand(3, B, T, generator=generator) < 0.1
    return Batch(
        {k: entry(s) for k, s in spaces.obs.items()},
        {k: entry(s) for k, s in spaces.action.items()},
        torch.randn(B, T, generator=generator),
        is_first=flags[0],
        is_last=flags[1],
        is_terminal=flags[1] & flags[2],
    )


class History(pl.Callback):
    """Keeps the metrics of every update and the first update's gradients."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.grads: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if module.updates == 0:
            for name, p in module.model.named_parameters():
                if p.grad is not None:
                    self.grads.setdefault(name, p.grad.clone())

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.metrics.append(dict(module.latest))


def fit(
    module: DreamerV3Module, folder: Path, batches: list[Batch], precision: str = "32-true"
) -> tuple[pl.Trainer, History]:
    history = History()
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        max_steps=len(batches),
        logger=False,
        callbacks=[history],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda x: x))
    return trainer, history


def snapshot(module: DreamerV3Module, group: str) -> dict[str, Tensor]:
    ids = {id(p) for p in module.model.group(group)}
    return {n: p.detach().clone() for n, p in module.model.named_parameters() if id(p) in ids}


# --- No synchronisation with the device ----------------------------------------------------------


def replace_tensors(model: DreamerV3, make: Any) -> None:
    for part in model.modules():
        for k, p in list(part._parameters.items()):
            part._parameters[k] = nn.Parameter(make(p), p.requires_grad)
        for k, b in list(part._buffers.items()):
            part._buffers[k] = make(b)


@pytest.mark.parametrize("spaces", [VECTOR, MIXED], ids=["vector", "mixed"])
def test_the_loss_runs_on_tensors_without_values(spaces: Spaces) -> None:
    model, batch = make_module(spaces).model, make_batch(spaces)
    with FakeTensorMode() as mode:
        replace_tensors(model, mode.from_tensor)
        batch = Batch(
            {k: mode.from_tensor(v) for k, v in batch.obs.items()},
            {k: mode.from_tensor(v) for k, v in batch.prev_action.items()},
            *(mode.from_tensor(v) for v in (batch.reward, batch.is_first, batch.is_last, batch.is_terminal)),
        )
        out = model.loss(batch, model.initial(3), NoiseStreams())
        out.total.backward()
    assert out.total.shape == ()
    assert all(p.grad is not None for g in GROUPS for p in model.group(g))


class NoSync(TorchDispatchMode):
    """Fails where a step would wait for the device: values read, shapes that depend on data, copies."""

    READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        tensors = [a for a in args if isinstance(a, Tensor)]
        on_device = any(t.device.type == "meta" for t in tensors)
        if on_device and (
            name in self.READS
            or (name == "index" and any(t.dtype == torch.bool for t in args[1] if t is not None))
        ):
            raise AssertionError(f"{func} reads the device")
        target = kwargs.get("device")
        if (
            name == "_to_copy"
            and target is not None
            and any(t.device.type != torch.device(target).type for t in tensors)
        ):
            raise AssertionError(f"{func} copies between host and device")
        if name == "copy_" and args[0].device.type != args[1].device.type:
            raise AssertionError(f"{func} copies between host and device")
        return func(*args, **kwargs)


class DeviceNoise:
    def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        return torch.empty(shape, device="meta")

    normal = exponential


def on_meta(batch: Batch) -> Batch:
    return batch.to("meta")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spaces", [VECTOR, MIXED], ids=["vector", "mixed"])
def test_a_whole_update_never_waits_for_the_device(spaces: Spaces, precision: torch.dtype) -> None:
    """The meta device stands for an accelerator; its tensors have no values that could be read."""
    module, batch = make_module(spaces), on_meta(make_batch(spaces))
    model = module.model.to("meta")
    model.compute_dtype = precision
    optimizers = module.configure_optimizers()
    with NoSync():
        for _ in range(2):
            out = model.loss(batch, model.start_carry(batch, None), DeviceNoise())
            out.total.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            model.update_slow_critic()
    assert {v.device.type for v in out.metrics.values()} == {"meta"}


@pytest.mark.parametrize(
    "read",
    [lambda x: x.item(), lambda x: bool(x), lambda x: x.tolist(), lambda x: x.nonzero(), lambda x: x[x > 0]],
)
def test_the_detector_detects(read: Any) -> None:
    with pytest.raises(AssertionError, match="reads the device|copies between"), NoSync():
        read(torch.ones((), device="meta"))


def test_the_detector_detects_copies() -> None:
    host = torch.ones(2)
    with pytest.raises(AssertionError, match="between host and device"), NoSync():
        host.to("meta")


# --- Three optimizers ----------------------------------------------------------------------------


def test_three_optimizers_equal_one_joint_optimizer_bit_for_bit(tmp_path: Path) -> None:
    batches = [make_batch(seed=i) for i in range(3)]
    module = make_module(seed=7)
    fit(module, tmp_path, batches)

    joint = make_module(seed=7)
    model, noise = joint.model, NoiseStreams(7)
    optimizer = LaProp([p for p in model.parameters() if p.requires_grad], lr=1e-3, warmup=1)
    carry = None
    for batch in batches:
        out = model.loss(batch, model.start_carry(batch, carry), noise)
        out.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_slow_critic()
        carry = out.post.at(-1).detach()
    for (name, ours), want in zip(
        module.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, want), name


def test_one_update_is_one_global_step(tmp_path: Path) -> None:
    module = make_module()
    trainer, _ = fit(module, tmp_path, [make_batch(seed=i) for i in range(3)])
    assert trainer.global_step == module.updates == int(module.updates_done) == 3
    assert {int(s["step"]) for o in module.optimizers(use_pl_optimizer=False) for s in o.state.values()} == {
        3
    }


@pytest.mark.parametrize("frozen", [("world_model",), ("actor",), ("critic",), ("world_model", "critic")])
def test_a_frozen_part_keeps_every_bit_and_the_others_learn(frozen: tuple[str, ...], tmp_path: Path) -> None:
    module = make_module(**{f"train_{name}": False for name in frozen})
    before = {name: snapshot(module, name) for name in GROUPS}
    slow = [p.clone() for p in module.model.slowval.parameters()]
    trainer, _ = fit(module, tmp_path, [make_batch(seed=i) for i in range(3)])
    for name in GROUPS:
        for key, value in snapshot(module, name).items():
            assert torch.equal(value, before[name][key]) == (name in frozen), key
    same = [torch.equal(a, b) for a, b in zip(slow, module.model.slowval.parameters(), strict=True)]
    assert all(same) if "critic" in frozen else not any(same)
    assert trainer.global_step == 3


# --- Which loss reaches what ---------------------------------------------------------------------


def reached(loss: str) -> set[str]:
    """Top-level parts in which one loss has a gradient."""
    model = make_module(MIXED, free_nats=0.0).model
    batch = make_batch(MIXED)
    model.loss(batch, model.initial(3), NoiseStreams()).losses[loss].mean().backward()
    return {
        n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.count_nonzero()
    }


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        ("image", {"enc", "dyn", "dec"}),
        ("vector", {"enc", "dyn", "dec"}),
        ("level", {"enc", "dyn", "dec"}),
        ("rew", {"enc", "dyn", "rew"}),
        ("con", {"enc", "dyn", "con"}),
        ("dyn", {"dyn", "enc"}),  # through the deterministic states, whose history the encoder shaped
        ("rep", {"enc", "dyn"}),
        ("policy", {"pol"}),
        ("value", {"val"}),
        ("repval", {"enc", "dyn", "val"}),
    ],
)
def test_a_loss_reaches_its_parts_and_no_other(loss: str, parts: set[str]) -> None:
    assert reached(loss) == parts


def test_free_nats_are_free() -> None:
    model = make_module(free_nats=1e3).model
    losses = model.loss(make_batch(), model.initial(3), NoiseStreams()).losses
    assert losses["dyn"].unique().tolist() == losses["rep"].unique().tolist() == [1e3]
    (losses["dyn"] + losses["rep"]).sum().backward()
    assert all(p.grad is None or not p.grad.count_nonzero() for p in model.parameters())


def test_losses_have_their_shapes_and_the_total_is_their_scaled_sum() -> None:
    model = make_module(MIXED, loss_scales={"rec": 0.5, "vector": 3.0, "policy": 2.0}).model
    out = model.loss(make_batch(MIXED), model.initial(3), NoiseStreams())
    assert {k: tuple(v.shape) for k, v in out.losses.items()} == {
        k: (3, 5) if k == "repval" else (3, 6) for k in out.losses
    }
    scales = LOSS_SCALES | {"image": 0.5, "level": 0.5, "vector": 3.0, "policy": 2.0}
    want = sum(scales[k] * float(v.detach().double().mean()) for k, v in out.losses.items())
    assert out.total.item() == pytest.approx(want, rel=1e-5)


def test_imagining_from_the_last_steps_only() -> None:
    model = make_module(imag_last=2).model
    out = model.loss(make_batch(), model.initial(3), NoiseStreams())
    assert out.losses["policy"].shape == out.losses["value"].shape == (3, 2)
    assert out.losses["repval"].shape == (3, 1)
    assert torch.equal(out.dream.feats[0].view(3, 2, -1), out.feat[:, -2:])


def test_evaluating_the_loss_leaves_the_return_normaliser_alone() -> None:
    model = make_module().model.eval()
    model.loss(make_batch(), model.initial(3), NoiseStreams())
    assert model.retnorm.offset_scale() == (0.0, 1.0)


def test_slow_critic_follows_by_its_rate() -> None:
    model = make_module(slow_rate=0.25).model
    before = [p.clone() for p in model.slowval.parameters()]
    model.update_slow_critic()
    for old, slow, fast in zip(before, model.slowval.parameters(), model.val.parameters(), strict=True):
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)


def test_unknown_loss_scales_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown model.loss_scales \['reward'\]; known: bc, con, "):
        make_module(loss_scales={"reward": 1.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [("imag_length", 0), ("imag_last", 1), ("imag_last", -2), ("horizon", 1), ("log_every", 0)],
)
def test_values_that_give_a_mean_of_nothing_or_divide_by_zero_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"model.{name} is {value}; expected"):
        make_module(**{name: value})


def test_an_observation_may_not_have_the_name_of_a_loss() -> None:
    """Its reconstruction loss would be overwritten by the other one without a word."""
    with pytest.raises(ConfigError, match=r"\['value'\] are names of losses"):
        make_module(Spaces({"value": Spec("float32", (2,))}, VECTOR.action))


# --- The batch -----------------------------------------------------------------------------------


def test_previous_actions_are_zero_where_an_episode_begins() -> None:
    """Also the one-hot ones: the vector of class 0 is not zero."""
    model, batch = make_module(MIXED).model, make_batch(MIXED)
    batch.is_first[0, 2] = True
    batch.is_first[0, 3] = False
    flat = model.previous_action(batch)
    assert flat[0, 2].count_nonzero() == 0
    assert flat[0, 3].count_nonzero() == 4


def test_consecutive_rows_go_on_where_the_last_batch_ended() -> None:
    model, batch = make_module().model, make_batch()
    batch.carry = model.initial(3).map(lambda x: x + 1)
    batch.consecutive = torch.tensor([True, False, True])
    last = model.initial(3).map(lambda x: x + 2)
    carry = model.start_carry(batch, last)
    assert carry.deter[:, 0].tolist() == [2.0, 1.0, 2.0]
    assert carry.stoch[:, 0, 0].tolist() == [2.0, 1.0, 2.0]
    assert torch.equal(model.start_carry(batch, None).deter, batch.carry.deter)


def test_fresh_latents_are_handed_back(tmp_path: Path) -> None:
    written = []
    batch = make_batch()
    batch.write_back = written.append
    module = make_module()
    fit(module, tmp_path, [batch])
    (state,) = written
    assert state.deter.shape == (3, 6, 32)
    assert not state.deter.requires_grad
    assert torch.equal(state.at(-1).deter, module.last_carry.deter)


# --- Precision -----------------------------------------------------------------------------------


def test_bfloat16_losses_stay_within_two_percent_for_three_updates(tmp_path: Path) -> None:
    """Same noise, real training steps. A loss of mixed sign is measured by the size of its elements."""
    batches = [make_batch(MIXED, B=16, T=16, seed=i) for i in range(3)]
    runs = {}
    for precision in ("32-true", "bf16-mixed"):
        module = make_module(MIXED, lr=4e-5, free_nats=0.0)
        runs[precision] = fit(module, tmp_path, batches, precision)[1].metrics
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert module.model.compute_dtype == torch.bfloat16
    for n, (exact, rough) in enumerate(zip(*runs.values(), strict=True)):
        for key in (k for k in exact if k.startswith("train/loss/")):
            assert rough[key] == pytest.approx(exact[key], rel=0.02), f"{key} of update {n + 1}"


def test_in_bfloat16_all_losses_and_logits_stay_float32() -> None:
    model = make_module(MIXED).model
    model.compute_dtype = torch.bfloat16
    out = model.loss(make_batch(MIXED), model.initial(3), NoiseStreams())
    assert out.post.deter.dtype == out.feat.dtype == torch.bfloat16
    numbers = [
        out.total,
        out.post_logit,
        out.prior_logit,
        out.dream.value_logits,
        out.dream.returns,
        *out.losses.values(),
    ]
    assert {v.dtype for v in numbers} == {torch.float32}


def test_the_trainers_autocast_changes_nothing(tmp_path: Path) -> None:
    """The model chooses dtypes itself: under autocast, sums that it keeps in float32 would be rounded."""
    module = make_module(MIXED, seed=7)
    history = fit(module, tmp_path, [make_batch(MIXED)], "bf16-mixed")[1]
    model = make_module(MIXED).model
    model.compute_dtype = torch.bfloat16
    model.loss(make_batch(MIXED), model.initial(3), NoiseStreams(7)).total.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(history.grads[name], p.grad), name


def test_other_precisions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected '32-true' or 'bf16-mixed'"):
        fit(make_module(), tmp_path, [make_batch()], "64-true")


# --- Checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_loads_without_pickle_and_answers_the_same(tmp_path: Path) -> None:
    module = make_module(MIXED, loss_scales={"vector": 2.0}, horizon=100)
    trainer, _ = fit(module, tmp_path, [make_batch(MIXED)])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = DreamerV3Module.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.updates == 1
    assert dict(loaded.hparams) == dict(module.hparams)
    obs = {k: v[:, 0] for k, v in make_batch(MIXED).obs.items()}
    results = []
    for m in (module, loaded):
        m.model.noise = NoiseStreams(3)
        with torch.no_grad():
            action, state = m.act(obs)
            dream = m.imagine(state, horizon=3)
            results.append(
                [*action.values(), state.deter, dream.rewards, *m.decode(state).values(), m.q(state, action)]
            )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_freezing_everything_is_refused() -> None:
    from lit_wm.errors import ConfigError

    frozen = {"train_world_model": False, "train_actor": False, "train_critic": False}
    with pytest.raises(ConfigError, match="nothing would be trained"):
        DreamerV3Module(
            Spaces({"obs": Spec("float32", (3,))}, {"action": Spec("int32", (), 2)}).to_plain(),
            "debug",
            **frozen,
        )


def test_the_replay_stores_latents_in_the_compute_dtype(tmp_path: Path) -> None:
    """The data module asks for them in its ``setup``, which Lightning runs before the module's."""
    module = make_module()
    module.trainer = pl.Trainer(
        precision="bf16-mixed", accelerator="cpu", logger=False, default_root_dir=tmp_path
    )
    assert module.latent_specs()["deter"].dtype == "bfloat16"
    module.trainer = pl.Trainer(
        precision="32-true", accelerator="cpu", logger=False, default_root_dir=tmp_path
    )
    assert module.latent_specs()["deter"].dtype == "float32"


# --- Options that are off by default ---------------------------------------------------------------


def test_schedules_move_between_their_ends_and_the_defaults_stand_still() -> None:
    options = {"actent": 0.1, "actent_final": 0.02, "actent_anneal": 8, "kl_warmup": 4, "imag_warmup": 6}
    model = make_module(**options, imag_length=3).model
    seen = []
    for updates in (0, 2, 4, 6, 8, 100):
        model.follow_schedules(updates)
        seen.append((round(model.entropy_weight, 9), model.kl_weight, model.imag_steps))
    assert seen == [
        (0.1, 0.0, 1), (0.08, 0.5, 1), (0.06, 1.0, 2), (0.04, 1.0, 3), (0.02, 1.0, 3), (0.02, 1.0, 3)
    ]  # fmt: skip
    plain = make_module().model
    for updates in (0, 1, 1000):
        plain.follow_schedules(updates)
        assert (plain.entropy_weight, plain.kl_weight, plain.imag_steps) == (3e-4, 1.0, 4)


def test_the_loss_follows_its_schedules(tmp_path: Path) -> None:
    module = make_module(kl_warmup=4, imag_warmup=4, free_nats=0.0)
    batches = [make_batch(seed=i) for i in range(3)]
    _, history = fit(module, tmp_path, batches)
    scales = module.model.loss_scales
    for update, metrics in enumerate(history.metrics):
        weights = scales | {k: scales[k] * update / 4 for k in ("dyn", "rep")}
        total = sum(weights[k] * metrics[f"train/loss/{k}"] for k in weights if f"train/loss/{k}" in metrics)
        assert metrics["train/opt/loss"] == pytest.approx(total, rel=1e-5)
    module.model.follow_schedules(2)
    out = module.model.loss(batches[0], module.model.initial(3), NoiseStreams(0))
    assert out.dream is not None
    assert out.dream.returns.shape[0] == 2


def test_without_reconstruction_the_decoder_is_left_alone(tmp_path: Path) -> None:
    module = make_module(MIXED, loss_scales={"rec": 0.0})
    before = {n: p.clone() for n, p in module.model.named_parameters()}
    _, history = fit(module, tmp_path, [make_batch(MIXED, seed=i) for i in range(2)])
    changed = {n.split(".")[0] for n, p in module.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"enc", "dyn", "rew", "con", "pol", "val", "slowval"}
    assert "train/loss/vector" not in history.metrics[0]


def test_actor_and_critic_can_have_learning_rates_of_their_own(tmp_path: Path) -> None:
    module = make_module(lr=1e-3, actor_lr=2e-3, critic_lr=5e-4)
    rates = [opt.param_groups[0]["lr"] for opt in module.configure_optimizers()]
    assert rates == [1e-3, 2e-3, 5e-4]
    with pytest.raises(ConfigError, match="critic_lr"):
        make_module(critic_lr=0.0)


def test_the_learning_rate_can_fall() -> None:
    (group,) = make_module(schedule="linear", anneal=11).configure_optimizers()[1].param_groups
    assert [round(learning_rate(group, n), 9) for n in (1, 2, 7, 12, 99)] == [0, 1e-3, 5.5e-4, 1e-4, 1e-4]
    with pytest.raises(ConfigError, match="anneal"):
        make_module(schedule="cosine")
    with pytest.raises(ConfigError, match="schedule"):
        make_module(schedule="step")


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_the_global_clip_limits_the_norm_of_all_gradients(limit: float, tmp_path: Path) -> None:
    _, free = fit(make_module(), tmp_path, [make_batch()])
    _, clipped = fit(make_module(grad_clip=limit), tmp_path, [make_batch()])
    norm = torch.stack([g.norm() for g in free.grads.values()]).norm()
    assert norm > 0.5
    factor = min(1.0, limit / norm.item())
    for name, grad in free.grads.items():
        torch.testing.assert_close(clipped.grads[name], grad * factor, rtol=1e-5, atol=1e-12)


def test_the_reward_scale_multiplies_the_rewards_and_nothing_else() -> None:
    module, batch = make_module(reward_scale=4.0), make_batch()
    plain, scaled = make_module(), make_batch()
    scaled.reward = 4 * batch.reward
    one = module.model.loss(batch, module.model.initial(3), NoiseStreams(0))
    two = plain.model.loss(scaled, plain.model.initial(3), NoiseStreams(0))
    assert torch.equal(one.total, two.total)


def test_layers_can_be_chosen_and_misspelt_ones_are_named() -> None:
    layers = {"enc": 1, "dec": 2, "rew": 3, "con": 2, "pol": 1, "val": 2}
    model = make_module(MIXED, layers=layers).model
    batch = make_batch(MIXED)
    assert model.loss(batch, model.initial(3), NoiseStreams(0)).total.isfinite()

    assert not hasattr(model.enc, "mlp1")
    assert [head.mlp.layers for head in (model.rew, model.con, model.pol, model.val)] == [3, 2, 1, 2]
    with pytest.raises(ConfigError, match="layers"):
        make_module(layers={"policy": 2})
