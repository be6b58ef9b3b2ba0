"""DreamerV3 against arrays recorded from the authors' own code: every array of every file is compared.

``pytest tests/parity/test_dreamerv3.py --golden-dir DIR`` runs the same on any directory of this format. The
format, the noise protocol and the limits are in ``tests/parity/data/dreamerv3/README.md``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from golden import (
    FORWARD,
    GRADIENT,
    PARAMETER,
    ROUNDING,
    Arrays,
    GoldenSet,
    Greedy,
    ReplayedNoise,
    find_sets,
    golden_dir,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lit_wm.convert.official_dreamerv3 import from_official, to_official, to_our_name
from lit_wm.distributions import (
    bernoulli_loss,
    bounded_normal,
    categorical_entropy,
    categorical_index,
    categorical_kl,
    categorical_log_prob,
    normal_entropy,
    normal_log_prob,
    straight_through,
    symexp_bins,
    two_hot_loss,
    two_hot_mean,
    unimix,
)
from lit_wm.dreamerv3 import LOSS_SCALES, DreamerV3Module, LossOutput
from lit_wm.functional import symexp, symlog
from lit_wm.nets.coders import module_key
from lit_wm.nets.heads import ActionDist, PolicyHead, flat_action, sample_actions
from lit_wm.nets.layers import BlockLinear, Conv, Linear, RMSNorm, merge_phases
from lit_wm.openloop import open_loop, video_grid
from lit_wm.optim import LaProp, clip_agc_
from lit_wm.returns import ReturnNorm, lambda_return
from lit_wm.types import Batch, Spaces, Spec, State

FLAGS = ("is_first", "is_last", "is_terminal", "reward")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    directory = golden_dir(metafunc.config, "dreamerv3")
    if "set_name" in metafunc.fixturenames:
        metafunc.parametrize("set_name", find_sets(directory), scope="module")
    if "units_file" in metafunc.fixturenames:
        files = sorted(directory.glob("*units.npz"))
        metafunc.parametrize("units_file", files, ids=[f.name for f in files], scope="module")


def variants(units: Arrays, pattern: str) -> list[str]:
    """What stands in the group of ``pattern`` in the names of the arrays: sizes and cases of this file."""
    found = sorted({m.group(1) for name in units.data if (m := re.match(pattern, name))})
    assert found, f"{units.path.name} has no arrays like {pattern}"
    return found


@pytest.fixture(scope="module")
def golden(set_name: str, pytestconfig: pytest.Config) -> GoldenSet:
    return GoldenSet(golden_dir(pytestconfig, "dreamerv3"), set_name)


@pytest.fixture(scope="module")
def units(units_file: Path) -> Arrays:
    return Arrays(units_file)


# --- From the recorded format to ours ---------------------------------------------------------------


def spaces_of(meta: dict[str, Any]) -> Spaces:
    def entry(dtype: str, shape: list[int], classes: int | None) -> Spec:
        discrete = dtype.startswith("int")
        return Spec(dtype, tuple(shape), classes if discrete else None)

    obs = {k: entry(*v) for k, v in meta["obs_space"].items() if k not in FLAGS}
    action = {k: entry(*v) for k, v in meta["act_space"].items() if k != "reset"}
    return Spaces(obs, action)


def make_module(golden: GoldenSet) -> DreamerV3Module:
    meta = golden.meta
    known = {
        "imag_last",
        "contdisc",
        "slowtar",
        "slowreg",
        "slow_rate",
        "horizon",
        "lam",
        "actent",
        "free_nats",
        "mix",
        "squash",
        "strided",
        "outer",
    }
    extra = {k: v for k, v in meta.get("extra", {}).items() if k in known}
    assert extra.keys() == meta.get("extra", {}).keys(), (
        f"unknown options in {golden.name}_meta.json: {meta['extra']}"
    )
    module = DreamerV3Module(
        spaces_of(meta).to_plain(),
        preset="debug",
        **meta["size"],
        imag_length=meta["H"],
        loss_scales={k: v for k, v in meta["scales"].items() if k in LOSS_SCALES or k in meta["obs_space"]},
        **meta["opt"],
        **extra,
        log_every=1,
    )
    params = {k: v for k, v in golden.params.data.items()}
    missing, unexpected = module.model.load_state_dict(from_official(params), strict=False)
    assert not unexpected
    assert set(missing) <= {"retnorm.corr"}
    return module


def make_batch(golden: GoldenSet, index: int) -> Batch:
    """The replay sample ``batch{index}`` after the replay context is taken off (dreamerv3
    ``apply_replay_context``).
    """
    raw, K, spaces = golden.files[f"batch{index}"], golden.meta["K"], spaces_of(golden.meta)
    now = slice(K, None)
    return Batch(
        obs={k: raw.tensor(k)[:, now] for k in spaces.obs},
        prev_action={k: raw.tensor(k)[:, K - 1 : -1] for k in spaces.action},
        reward=raw.tensor("reward")[:, now],
        is_first=raw.tensor("is_first")[:, now],
        is_last=raw.tensor("is_last")[:, now],
        is_terminal=raw.tensor("is_terminal")[:, now],
        carry=State(raw.tensor("dyn/deter")[:, K - 1], raw.tensor("dyn/stoch")[:, K - 1]),
        consecutive=raw.tensor("consec")[:, K] > 0,
    )


def training_noise(golden: GoldenSet, call: int) -> ReplayedNoise:
    file, prefix = golden.train_noise, f"n{call}/"
    tapes: dict[str, tuple[Tensor, int | None]] = {
        "posterior": (file.tensor(f"{prefix}post_gumbel"), None),
        "prior": (file.tensor(f"{prefix}prior_gumbel"), 1),
    }
    for key in file.keys(f"{prefix}action/"):
        tapes[f"policy/{key}"] = (file.tensor(f"{prefix}action/{key}"), 1)
    return ReplayedNoise(tapes)


def check_noise(golden: GoldenSet, noise: ReplayedNoise, call: int) -> None:
    """What the streams handed out is what was recorded; the last action of a roll-out is never needed."""
    for name, served in noise.served.items():
        ours = {"posterior": "post_gumbel", "prior": "prior_gumbel"}.get(
            name, "action/" + name.removeprefix("policy/")
        )
        tape = noise.tapes[name][0]
        if name.startswith("policy/"):
            assert served[:, -1].isnan().all()
            served[:, -1] = tape[:, -1]
        golden.train_noise.compare(f"n{call}/{ours}", served, rtol=1e-5)


def batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


# --- The sets ----------------------------------------------------------------------------------------


def test_weights_round_trip(golden: GoldenSet) -> None:
    """Official names and layouts map to ours and back, and the parameter count is the official one."""
    model = make_module(golden).model
    networks = [k for k in golden.params.data if k != "slowval_count/value"]
    for name, value in to_official(model.state_dict(), networks).items():
        golden.params.compare(name, value, rtol=0)
    golden.params.compare("slowval_count/value", np.int32(0))
    count = sum(p.numel() for group in ("world_model", "actor", "critic") for p in model.group(group))
    assert count == golden.meta["param_count"]


def test_inputs(golden: GoldenSet) -> None:
    """The replay context gives the carry and the previous actions."""
    K = golden.meta["K"]
    for i in (1, 2, 3):
        raw, batch = golden.files[f"batch{i}"], make_batch(golden, i)
        context = {k: raw.tensor(k)[:, :K] for k in raw.data}
        columns = batch.obs | {k: getattr(batch, k) for k in FLAGS}
        for k, v in columns.items():
            raw.compare(k, torch.cat([context[k], v], 1))
        for k, v in batch.prev_action.items():
            raw.compare(k, torch.cat([context[k][:, : K - 1], v, raw.tensor(k)[:, -1:]], 1))
        assert (raw.data["consec"] == raw.data["consec"][:, :1]).all()
        raw.compare("consec", batch.consecutive[:, None].int().expand(raw.data["consec"].shape))
        if i == 1:
            file = golden.forward
            for k, v in columns.items():
                file.compare(f"in/obs/{k}", v)
            for k, v in batch.prev_action.items():
                file.compare(f"in/prevact/{k}", v)
            file.compare("in/carry_in/deter", batch.carry.deter)
            file.compare("in/carry_in/stoch", batch.carry.stoch)


def test_forward_and_gradients(golden: GoldenSet) -> None:
    """Every quantity of one loss, and the gradient of every tensor."""
    module = make_module(golden)
    model, file = module.model, golden.forward
    noise, batch = training_noise(golden, 1), make_batch(golden, 1)
    before = model.retnorm.offset_scale()
    out = model.loss(batch, model.start_carry(batch, None), noise)
    check_noise(golden, noise, 1)
    for k in file.keys("noise/"):
        recorded = "action/" + k.split("/", 1)[1] if k.startswith("action") else k
        file.compare(f"noise/{k}", golden.train_noise.tensor(f"n1/{recorded}"), rtol=0)

    with torch.no_grad():
        check_world_model(golden, model, out, batch)
        check_dream(golden, model, out, before)
    for k, v in out.losses.items():
        file.compare(f"loss/{k}", v)
    assert not set(file.keys("loss/")) - out.losses.keys()
    file.compare("total_loss", out.total)
    file.compare("retnorm_after/lo", model.retnorm.lo)
    file.compare("retnorm_after/hi", model.retnorm.hi)

    check_gradient_norms(golden, module, out)
    out.total.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    names = [k for k in golden.grads.data if not k.startswith("norm/")]
    assert {to_our_name(k) for k in names} == grads.keys()
    for name, value in to_official(grads, names).items():
        golden.grads.compare(name, value, rtol=GRADIENT)


def check_world_model(golden: GoldenSet, model: Any, out: LossOutput, batch: Batch) -> None:
    file, post, feat = golden.forward, out.post, out.feat
    file.compare("enc/tokens", model.enc(batch.obs))
    file.compare("obs_rollout/deter", post.deter)
    file.compare("obs_rollout/stoch", post.stoch)
    file.compare("obs_rollout/logit", out.post_logit)
    file.compare("carry_out/deter", post.at(-1).deter)
    file.compare("carry_out/stoch", post.at(-1).stoch)
    file.compare("heads/feat", feat)
    file.compare("heads/prior_logit", out.prior_logit)
    p, q = unimix(out.post_logit, model.mix), unimix(out.prior_logit, model.mix)
    file.compare("heads/kl_unclipped", categorical_kl(p, p.log(), q.log()).sum(-1))
    file.compare("heads/post_entropy", categorical_entropy(p, p.log()).sum(-1))
    file.compare("heads/prior_entropy", categorical_entropy(q, q.log()).sum(-1))
    for k, v in model.dec(post.deter, post.stoch.flatten(-2)).items():
        spec = model.spaces.obs[k]
        if spec.is_discrete:
            v = v.argmax(-1)
        elif spec.channels_first:
            v = v.movedim(-1, -3)
        file.compare(f"heads/dec/{k}", v)
    for name in ("rew", "val", "slowval"):
        check_critic(golden, model, f"heads/{name}", getattr(model, name)(feat))
    con = model.con(feat).squeeze(-1)
    file.compare("heads/con/logit", con)
    file.compare("heads/con/prob1", con.sigmoid())
    file.compare("heads/con/pred", con.sigmoid() > 0.5)
    check_policy(golden, "heads/pol", model.pol, model.pol.mlp(feat))


def check_critic(golden: GoldenSet, model: Any, prefix: str, logits: Tensor) -> None:
    golden.forward.compare(f"{prefix}/logits", logits)
    golden.forward.compare(f"{prefix}/pred", two_hot_mean(logits.softmax(-1), model.bins), rtol=2 * FORWARD)


def check_policy(golden: GoldenSet, prefix: str, head: PolicyHead, hidden: Tensor) -> None:
    file = golden.forward
    for k, dist in head.from_hidden(hidden).items():
        if dist.log_p is not None:
            raw = head.head[module_key(k)]["logits"](hidden).view(dist.log_p.shape)
            file.compare(f"{prefix}/{k}/logits", raw)
            file.compare(f"{prefix}/{k}/pred", dist.log_p.argmax(-1))
        else:
            file.compare(f"{prefix}/{k}/mean", dist.mean)
            file.compare(f"{prefix}/{k}/stddev", dist.std)
            file.compare(f"{prefix}/{k}/pred", dist.mean)


def check_dream(golden: GoldenSet, model: Any, out: LossOutput, before: tuple[Tensor, Tensor]) -> None:
    file, dream, D = golden.forward, out.dream, model.dyn.deter
    S, C = model.dyn.stoch, model.dyn.classes
    feats = batch_first(dream.feats)  # (N, H+1, F)
    deter, stoch = feats[..., :D], feats[..., D:].unflatten(-1, (S, C))
    file.compare("imag/start_deter", deter[:, 0])
    file.compare("imag/start_stoch", stoch[:, 0])
    file.compare("imag/roll_deter", deter[:, 1:])
    file.compare("imag/roll_stoch", stoch[:, 1:])
    file.compare("imag/roll_logit", model.dyn.prior(deter[:, 1:]))

    # The last action leads nowhere, so the loss does not draw it: draw it here.
    H = golden.meta["H"]
    final = sample_actions(model.pol(feats[:, H]), training_noise(golden, 1), "policy", H)
    policy = model.pol(feats)
    for k, dist in policy.items():
        action = torch.stack([*(a[k] for a in dream.actions), final[k]], 1)
        file.compare(f"imag/act/{k}", action)
        file.compare(f"imag/logp/{k}", dist.log_prob(action))
        file.compare(f"imag/ent/{k}", dist.entropy())
    check_policy(golden, "imag/policy", model.pol, model.pol.mlp(feats))
    file.compare("imag/rew", batch_first(dream.reward), rtol=2 * FORWARD)
    gamma = 1.0 if model.contdisc else 1 - 1 / model.horizon  # recorded without a discount
    file.compare("imag/con", batch_first(dream.cont) / gamma)
    file.compare("imag/weight", batch_first(dream.weight))
    check_critic(golden, model, "imag/slowvalue", model.slowval(feats))
    file.compare("imag/slowvalue/pred", batch_first(dream.slow), rtol=2 * FORWARD)
    value_logits = torch.cat([batch_first(dream.value_logits), model.val(feats[:, H:])], 1)
    check_critic(golden, model, "imag/value", value_logits)
    file.compare("imag/value/pred", batch_first(dream.value), rtol=2 * FORWARD)
    file.compare("imag/ret", batch_first(dream.returns))
    file.compare("imag/adv", batch_first(dream.advantage))
    after = model.retnorm.offset_scale()
    for when, (offset, scale) in (("before", before), ("after", after)):
        file.compare(f"imag/retnorm_offset_{when}", offset)
        file.compare(f"imag/retnorm_scale_{when}", scale)
    file.compare("imag/loss_policy", batch_first(model.policy_loss(dream)))
    file.compare("imag/loss_value", batch_first(model.value_loss(dream)))

    shape = out.losses["policy"].shape
    file.compare("repl/boot", dream.returns[0].view(shape))
    feat = out.feat[:, -shape[1] :]
    check_critic(golden, model, "repl/value", model.val(feat))
    check_critic(golden, model, "repl/slowvalue", model.slowval(feat))
    file.compare("repl/ret", out.replay_returns)
    file.compare("repl/loss_repval", out.losses["repval"])


def check_gradient_norms(golden: GoldenSet, module: DreamerV3Module, out: LossOutput) -> None:
    """Which loss reaches which network, and how strongly."""
    names = golden.grads.keys("norm/")
    model, alone = module.model, ("policy", "value", "repval")
    for group in sorted({n.split("|")[0] for n in names}):
        keys = [group] if group in alone else [k for k in out.losses if k not in alone]
        loss = sum(model.loss_scales[k] * out.losses[k].mean() for k in keys)
        params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
        for name in names:
            if name.split("|")[0] == group:
                part = name.split("|")[1]
                norms = [
                    g.norm()
                    for n, g in zip(params, grads, strict=True)
                    if g is not None and n.split(".")[0] == part
                ]
                norm = torch.stack(norms).norm() if norms else torch.zeros(())
                golden.grads.compare(f"norm/{name}", norm, rtol=GRADIENT)


def flipped_signs(golden: GoldenSet, module: DreamerV3Module) -> dict[str, np.ndarray]:
    """After the first update: entries whose gradient is rounding noise and has the other sign than recorded.

    LaProp divides the first gradient by its own size, so there it steps by the learning rate the other way.
    """
    optimizers: Any = module.optimizers(use_pl_optimizer=False)
    state = {id(p): s for opt in optimizers for p, s in opt.state.items()}
    names = [k for k in golden.grads.data if not k.startswith("norm/")]
    params = dict(module.model.named_parameters())
    ours = {to_our_name(n): state[id(params[to_our_name(n)])]["momentum"] for n in names}
    masks = {}
    for name, momentum in to_official(ours, names).items():
        grad = golden.grads.data[name]
        tiny = np.abs(grad) < ROUNDING * np.abs(grad).max(initial=0.0)
        masks[name] = tiny & (np.sign(momentum) != np.sign(grad))
        assert masks[name].sum() <= 1e-3 * grad.size, f"{name}: {masks[name].sum()} signs differ"
    return masks


class Recorder(pl.Callback):
    """Puts the recorded noise in place of the streams and compares after every call of ``training_step``."""

    def __init__(self, golden: GoldenSet):
        self.golden = golden
        self.calls = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, batch_idx: int) -> None:
        self.noise = module.noise = training_noise(self.golden, self.calls + 1)
        self.before = {n: p.detach().clone() for n, p in module.model.named_parameters()}
        raw, K = self.golden.files[f"batch{self.calls + 1}"], self.golden.meta["K"]
        rows = {raw.data["stepid"][b, t].tobytes(): (b, t) for b, t in np.ndindex(*raw.data["consec"].shape)}
        self.step_ids = np.zeros_like(raw.data["stepid"])
        for key, place in rows.items():
            self.step_ids[place] = np.frombuffer(key, np.uint8)
        self.replay = {name: raw.tensor(f"dyn/{name}") for name in ("deter", "stoch")}

        def write_back(state: State) -> None:
            """As a replay does: find each row by its step id and replace its latent."""
            for name, store in self.replay.items():
                value = getattr(state, name)
                for b, t in np.ndindex(*value.shape[:2]):
                    store[rows[raw.data["stepid"][b, t + K].tobytes()]] = value[b, t]

        batch.write_back = write_back

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.calls += 1
        n, file, model = self.calls, self.golden.train, module.model
        check_noise(self.golden, self.noise, n)
        if n == 1:
            self.flipped = flipped_signs(self.golden, module)
        names = [k for k in file.keys(f"s{n}/") if k != "slowval_count/value"]
        for name, value in to_official(model.state_dict(), names).items():
            flipped = self.flipped.get(name.removeprefix("slow"), False)  # the slow critic follows the critic
            limit = np.where(flipped, 4 * module.hparams.lr, PARAMETER)
            rtol = FORWARD if name.startswith("retnorm/") else 0.0  # of the size of the returns
            file.compare(f"s{n}/{name}", value, rtol, limit)
        file.compare(f"s{n}/slowval_count/value", np.int32(module.updates))
        for k in file.keys(f"s{n}carry/"):
            file.compare(f"s{n}carry/{k}", getattr(module.last_carry, k), atol=PARAMETER)
        raw, K = self.golden.files[f"batch{n}"], self.golden.meta["K"]
        for k in file.keys(f"s{n}replay/"):
            file.compare(f"s{n}replay/{k}", self.replay[k][:, K:], atol=PARAMETER)
            untouched = torch.cat([self.replay[k][:, :K], raw.tensor(f"dyn/{k}")[:, K:]], 1)
            raw.compare(f"dyn/{k}", untouched, rtol=0)
        raw.compare("stepid", self.step_ids)  # the comparison above found every row by them
        self.check_metrics(file, n, module)
        assert trainer.global_step == n

    def check_metrics(self, file: Arrays, n: int, module: Any) -> None:
        metrics = module.latest
        moved = [p - self.before[k] for k, p in module.model.named_parameters() if p.requires_grad]
        rms = torch.cat([m.detach().flatten() for m in moved]).double().square().mean().sqrt()
        for k in file.keys(f"s{n}metric/"):
            if k == "update_rms":
                file.compare(f"s{n}metric/{k}", rms, rtol=1e-3, atol=1e-9)
            else:
                ours = {"total_loss": "train/opt/loss", "grad_norm": "train/opt/grad_norm"}.get(
                    k, f"train/{k}"
                )
                file.compare(
                    f"s{n}metric/{k}", metrics[ours], rtol=GRADIENT if k == "grad_norm" else 2 * FORWARD
                )


def test_three_training_calls(golden: GoldenSet, tmp_path: Path) -> None:
    """Three calls of ``training_step`` under a Trainer, with its own three optimizers."""
    module = make_module(golden)
    batches = [make_batch(golden, i) for i in (1, 2, 3)]
    recorder = Recorder(golden)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        callbacks=[recorder],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda x: x))
    assert recorder.calls == 3

    file = golden.train
    optimizers = module.optimizers(use_pl_optimizer=False)
    state = {id(p): s for opt in optimizers for p, s in opt.state.items()}
    params = dict(module.model.named_parameters())
    for entry, key in (("1", "rms"), ("2", "momentum")):
        names = file.keys(f"s3state/opt/state/{entry}/1/")
        ours = {to_our_name(n): state[id(params[to_our_name(n)])][key] for n in names}
        for name, value in to_official(ours, names).items():
            rtol, atol = 2 * GRADIENT, np.zeros(())
            if key == "momentum":  # of size one, and noisy where the gradient is tiny
                rtol, atol = 0.0, np.where(recorder.flipped[name], 0.2, 1e-2)
            file.compare(f"s3state/opt/state/{entry}/1/{name}", value, rtol, atol)
    steps = {int(s["step"]) for s in state.values()}
    assert len(steps) == 1
    for name in ("state/1/0", "state/2/0", "state/3/count", "step/value"):
        file.compare(f"s3state/opt/{name}", np.int32(next(iter(steps))))


def test_given_actions(golden: GoldenSet) -> None:
    """A roll-out of given actions, through ``imagine``."""
    model, file = make_module(golden).model, golden.forward
    actions = {k: file.tensor(f"given/action/{k}") for k in file.keys("given/action/")}
    noise = ReplayedNoise({"imagine/prior": (file.tensor("given/noise_gumbel"), 1)})
    start = State(file.tensor("given/start_deter"), file.tensor("given/start_stoch"))
    with torch.no_grad():
        states = model.imagine(start, actions, noise=noise).states.stacked
        file.compare("given/logit", model.dyn.prior(states.deter[:, 1:]))
    file.compare("given/start_deter", states.deter[:, 0])
    file.compare("given/start_stoch", states.stoch[:, 0])
    file.compare("given/deter", states.deter[:, 1:])
    file.compare("given/stoch", states.stoch[:, 1:])
    file.compare("given/noise_gumbel", noise.served["imagine/prior"], rtol=1e-5)
    for k, v in actions.items():
        size = model.spaces.action[k]
        hot = flat_action({k: v}, {k: size}, torch.float32)
        if size.is_discrete:
            hot = hot.unflatten(-1, (*size.shape, size.classes))
            back = torch.where(hot.any(-1), hot.argmax(-1), -1)  # no class: marked as missing
        else:
            back = hot.view(v.shape)
        file.compare(f"given/action/{k}", back)


def test_acting_step(golden: GoldenSet) -> None:
    """One step of the policy, through ``act``."""
    model, file = make_module(golden).model, golden.forward
    keys = sorted(model.spaces.action)
    tapes: dict[str, tuple[Tensor, int | None]] = {
        "act/posterior": (file.tensor("policy/noise0_gumbel"), None)
    }
    files = {}
    for i, k in enumerate(keys, 1):
        kind = "gumbel" if model.spaces.action[k].is_discrete else "normal"
        files[f"act/policy/{k}"] = f"policy/noise{i}_{kind}"
        tapes[f"act/policy/{k}"] = (file.tensor(f"policy/noise{i}_{kind}"), None)
    noise = ReplayedNoise(tapes)
    obs = {k: file.tensor(f"in/obs/{k}")[:, 0] for k in model.spaces.obs}
    prev = {k: file.tensor(f"in/prevact/{k}")[:, 0] for k in keys}
    carry = State(file.tensor("in/carry_in/deter"), file.tensor("in/carry_in/stoch"), prev)
    with torch.no_grad():
        action, state = model.act(obs, carry, file.tensor("policy/is_first"), noise=noise)
        fresh = model.act(obs, carry, torch.ones_like(file.tensor("policy/is_first")), noise=noise)[1].deter
        going_on = model.act(obs, carry, torch.zeros_like(file.tensor("policy/is_first")), noise=noise)[
            1
        ].deter
    file.compare("policy/deter", state.deter)
    file.compare("policy/stoch", state.stoch)
    for k, v in action.items():
        file.compare(f"policy/action/{k}", v)
    file.compare("policy/noise0_gumbel", noise.served["act/posterior"], rtol=1e-5)
    for stream, name in files.items():
        file.compare(name, noise.served[stream], rtol=1e-5)
    # The flag, found again from the state it led to: a reset state differs from one that goes on.
    assert (fresh != going_on).any(-1).all()
    file.compare("policy/is_first", (state.deter == fresh).all(-1))


def test_open_loop_video(golden: GoldenSet) -> None:
    """The video of the report, pixel by pixel; every sample is the most likely class."""
    file, names = golden.forward, golden.forward.keys("report/openloop/")
    if not any(s.is_image for s in spaces_of(golden.meta).obs.values()):
        assert not names
        return
    model, batch = make_module(golden).model, make_batch(golden, 1)
    T, rows = batch.reward.shape[1], min(6, batch.reward.shape[0])

    def cut(x: Tensor) -> Tensor:
        return x[:rows]

    with torch.no_grad():
        pred = open_loop(
            model,
            {k: cut(v) for k, v in batch.obs.items()},
            {k: cut(v) for k, v in batch.prev_action.items()},
            cut(batch.is_first),
            T // 2,
            batch.carry.map(cut),
            Greedy(),
        )
    for k in names:
        truth, dream = cut(batch.obs[k]), pred[k]
        if model.spaces.obs[k].channels_first:
            truth, dream = truth.movedim(2, -1), dream.movedim(2, -1)
        file.compare_pixels(f"report/openloop/{k}", video_grid(truth, dream, T // 2))


def test_no_array_was_left_out(golden: GoldenSet, request: pytest.FixtureRequest) -> None:
    """Runs after all tests of the set: an array that no comparison has read is a failure."""
    ran = [i for i in request.session.items if i.fspath == request.node.fspath and golden.name in i.name]
    if len(ran) < 8:
        pytest.skip("only a part of the set was selected")
    print("", *(file.report() for file in golden.files.values()), sep="\n")
    assert golden.unused() == []


# --- Plain functions ---------------------------------------------------------------------------------


def test_symlog(units: Arrays) -> None:
    x = units.tensor("symlog/x").requires_grad_()
    y = symlog(x)
    y.sum().backward()
    units.compare("symlog/y", y)
    units.compare("symlog/grad", x.grad)
    units.compare("symlog/symexp_y", symexp(y.detach()))
    units.compare("symlog/x", symexp(units.tensor("symlog/y")), rtol=1e-5)
    units.compare("symexp/y", symexp(units.tensor("symexp/x")))
    units.compare("symexp/x", symlog(units.tensor("symexp/y")), rtol=1e-5)


def test_two_hot(units: Arrays) -> None:
    for n in variants(units, r"twohot(\d+)/"):
        check_two_hot(units, int(n))


def check_two_hot(units: Arrays, n: int) -> None:
    prefix = f"twohot{n}"
    bins = symexp_bins(n)
    units.compare(f"{prefix}/bins", bins)
    logits, target = units.tensor(f"{prefix}/logits").requires_grad_(), units.tensor(f"{prefix}/target")
    loss = two_hot_loss(logits, bins, target)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    units.compare(f"{prefix}/loss", loss)
    units.compare(f"{prefix}/loss_grad_logits", grad, rtol=GRADIENT)
    pred = two_hot_mean(logits.softmax(-1), bins)
    (grad,) = torch.autograd.grad(pred.sum(), logits)
    units.compare(f"{prefix}/pred", pred, rtol=2 * FORWARD)
    units.compare(f"{prefix}/pred_grad_logits", grad, rtol=GRADIENT)
    uniform = two_hot_mean(torch.zeros(1, n).softmax(-1), bins)
    assert uniform.item() == 0.0
    units.compare(f"{prefix}/pred_uniform", uniform, rtol=0)
    # Two targets at once are the sum of the two losses, here against the recorded one twice.
    both = two_hot_loss(logits, bins, target, target)
    units.compare(f"{prefix}/loss", both / 2)
    # The recorded inputs: a target is the mean of its own two-hot distribution, logits of their
    # log-probabilities.
    units.compare(f"{prefix}/logits", logits.log_softmax(-1) + logits.logsumexp(-1, keepdim=True))
    inside = target.clamp(bins[0], bins[-1])
    from lit_wm.distributions import two_hot_weights

    below, above, w_below, w_above = two_hot_weights(target, bins)
    mean = w_below * bins[below] + w_above * bins[above]
    units.compare(f"{prefix}/target", mean + (target - inside), rtol=1e-5)


def test_lambda_return(units: Arrays) -> None:
    for case in variants(units, r"lambda_(\w+)/disc_lam"):
        check_lambda_return(units, case)


def check_lambda_return(units: Arrays, case: str) -> None:
    disc, lam = units.tensor(f"lambda_{case}/disc_lam").tolist()
    reward, boot = units.tensor("lambda/rew"), units.tensor("lambda/boot")
    last, term = units.tensor("lambda/last").float(), units.tensor("lambda/term").float()
    ret = lambda_return(reward, (1 - term) * disc, boot, (1 - last) * lam)
    units.compare(f"lambda_{case}/ret", ret)
    # Each input enters: the derivative of a return by it is what the recursion says.
    units.compare(f"lambda_{case}/disc_lam", np.array([disc, lam]))
    units.compare("lambda/last", last > 0)
    units.compare("lambda/term", term > 0)
    zero = torch.zeros_like(reward)
    only_reward = lambda_return(reward, zero, boot, lam)
    units.compare("lambda/rew", torch.cat([reward[:, :1], only_reward], 1))
    only_boot = lambda_return(zero, zero + 1, boot, 0.0)
    units.compare("lambda/boot", torch.cat([boot[:, :1], only_boot], 1))


def test_lambda_return_with_soft_continues(units: Arrays) -> None:
    term = units.tensor("lambda_soft/term")
    ret = lambda_return(units.tensor("lambda/rew"), 1 - term, units.tensor("lambda/boot"), 0.95)
    units.compare("lambda_soft/ret", ret)
    gamma = lambda_return(torch.zeros_like(term), 1 - term, torch.ones_like(term), 0.0)
    units.compare("lambda_soft/term", torch.cat([term[:, :1], 1 - gamma], 1), rtol=1e-5)


def load(layer: Any, units: Arrays, prefix: str) -> Any:
    kernel = units.tensor(f"{prefix}/kernel")
    kernel = kernel.permute(3, 2, 0, 1) if isinstance(layer, Conv) else kernel
    layer.load_state_dict({"weight": kernel, "bias": units.tensor(f"{prefix}/bias")})
    official = to_official({"a.weight": layer.weight, "a.bias": layer.bias}, ["a/kernel", "a/bias"])
    units.compare(f"{prefix}/kernel", official["a/kernel"], rtol=0)
    units.compare(f"{prefix}/bias", official["a/bias"], rtol=0)
    return layer


def test_linear(units: Arrays) -> None:
    x, y = units.tensor("linear/x"), units.tensor("linear/y")
    layer = load(Linear(x.shape[-1], y[0, 0].numel()), units, "linear")
    units.compare("linear/y", layer(x).view(y.shape))
    # The input, found again from the output by least squares: nothing of it was ignored.
    weight = torch.cat([layer.weight, torch.eye(x.shape[-1])], 1).detach()
    out = torch.cat([layer(x) - layer.bias, x], -1).detach()
    units.compare(
        "linear/x", torch.linalg.lstsq(weight.t(), out.flatten(0, 1).t()).solution.t().view(x.shape)
    )


def test_block_linear(units: Arrays) -> None:
    for g in variants(units, r"blocklinear_g(\d+)/"):
        check_block_linear(units, int(g))


def check_block_linear(units: Arrays, g: int) -> None:
    x, y = units.tensor(f"blocklinear_g{g}/x"), units.tensor(f"blocklinear_g{g}/y")
    layer = load(BlockLinear(x.shape[-1], y.shape[-1], g), units, f"blocklinear_g{g}")
    out = layer(x.flatten(0, 1)).view(y.shape)
    units.compare(f"blocklinear_g{g}/y", out)
    eye = BlockLinear(x.shape[-1], x.shape[-1], g)
    eye.load_state_dict(
        {"weight": torch.eye(x.shape[-1] // g).expand(g, -1, -1), "bias": torch.zeros(x.shape[-1])}
    )
    units.compare(f"blocklinear_g{g}/x", eye(x.flatten(0, 1)).view(x.shape))


def test_rms_norm(units: Arrays) -> None:
    norm = RMSNorm(units.tensor("rmsnorm/scale").shape[0])
    norm.load_state_dict({"scale": units.tensor("rmsnorm/scale")})
    x, cotangent = units.tensor("rmsnorm/x").requires_grad_(), units.tensor("rmsnorm/cotangent")
    y = norm.norm(x)
    y.backward(cotangent)
    units.compare("rmsnorm/y", y)
    units.compare("rmsnorm/grad_x", x.grad, rtol=GRADIENT)
    units.compare("rmsnorm/grad_scale", norm.scale.grad, rtol=GRADIENT)
    units.compare("rmsnorm/scale", norm.scale)
    # The fused norm and SiLU of the networks has the same value and gradients as SiLU of the recorded norm.
    fused_x = units.tensor("rmsnorm/x").requires_grad_()
    fused = norm(fused_x)
    want = torch.nn.functional.silu(y.detach().requires_grad_())
    torch.testing.assert_close(fused, want, rtol=1e-5, atol=1e-6)
    norm.scale.grad = None
    y = units.tensor("rmsnorm/y").requires_grad_()
    torch.nn.functional.silu(y).sum().backward()
    fused.backward(cotangent / y.grad)  # undoes SiLU: the cotangent of the norm is the recorded one
    units.compare("rmsnorm/grad_x", fused_x.grad, rtol=GRADIENT)
    units.compare("rmsnorm/grad_scale", norm.scale.grad, rtol=1e-2)  # ill-conditioned where SiLU is flat
    back = y.detach() / norm.scale.detach()  # unit RMS up to eps: scaled by the RMS it is the input
    rms = (units.tensor("rmsnorm/x").square().mean(-1, keepdim=True) + 1e-4).sqrt()
    units.compare("rmsnorm/x", back * rms, rtol=1e-5)
    units.compare("rmsnorm/cotangent", (cotangent / y.grad) * y.grad)


def test_convolutions(units: Arrays) -> None:
    x = units.tensor("conv/x")
    kernel = units.tensor("conv/kernel")
    layer = load(Conv(kernel.shape[2], kernel.shape[3], kernel.shape[0]), units, "conv")
    with torch.no_grad():
        units.compare("conv/y_stride1", layer(x))
        units.compare("conv/y_maxpool2", layer.pooled(x))
        units.compare("conv/y_stride2", layer.strided(x))
        units.compare("conv/y_transp2", layer.transposed(x))
        units.compare("conv/y_upsample_then_conv", merge_phases(layer.upsampled(x)))
        eye = Conv(x.shape[-1], x.shape[-1])
        eye.weight.zero_()
        eye.weight[range(x.shape[-1]), range(x.shape[-1]), 2, 2] = 1
        units.compare("conv/x", eye(x))


def test_bounded_normal(units: Arrays) -> None:
    raw_mean = units.tensor("bounded_normal/raw_mean").requires_grad_()
    raw_std = units.tensor("bounded_normal/raw_std").requires_grad_()
    event, eps = units.tensor("bounded_normal/event"), units.tensor("bounded_normal/eps")
    mean, std = bounded_normal(raw_mean, raw_std)
    logp = normal_log_prob(event, mean, std)
    logp.sum().backward()
    units.compare("bounded_normal/mean", mean)
    units.compare("bounded_normal/std", std)
    units.compare("bounded_normal/logp", logp)
    units.compare("bounded_normal/grad_logp_raw_mean", raw_mean.grad, rtol=GRADIENT)
    units.compare("bounded_normal/grad_logp_raw_std", raw_std.grad, rtol=GRADIENT)
    dist = ActionDist(Spec("float32", (event.shape[-1],)), mean=mean, std=std)
    units.compare("bounded_normal/entropy", dist.entropy())
    noise = ReplayedNoise({"policy": (eps, None)})
    sample = dist.sample(noise, "policy")
    units.compare("bounded_normal/sample", sample)
    units.compare("bounded_normal/eps", (sample - mean) / std, rtol=1e-5)
    lo, hi = ActionDist(Spec("float32", (1,))).entropy_range()
    units.compare("bounded_normal/minent_per_dim", np.float32(lo))
    units.compare("bounded_normal/maxent_per_dim", np.float32(hi))
    assert float(normal_entropy(torch.tensor(1.0))) == pytest.approx(hi)
    mean64, std64 = mean.double().detach(), std.double().detach()
    # The recorded inputs, from what they led to.
    units.compare("bounded_normal/raw_mean", torch.atanh(mean64), rtol=1e-2)
    units.compare("bounded_normal/raw_std", torch.logit((std64 - 0.1) / 0.9) - 2, rtol=1e-4)
    units.compare("bounded_normal/event", mean64 + std64 * ((event.double() - mean64) / std64))


def test_bernoulli(units: Arrays) -> None:
    logit, target = units.tensor("binary/logit"), units.tensor("binary/target")
    units.compare("binary/loss", bernoulli_loss(logit, target))
    units.compare("binary/prob1", logit.sigmoid())
    units.compare("binary/logit", units.tensor("binary/prob1").double().logit(), rtol=1e-4)
    # The loss is linear in the target.
    at0, at1 = bernoulli_loss(logit.double(), target * 0), bernoulli_loss(logit.double(), target * 0 + 1)
    units.compare("binary/target", (units.tensor("binary/loss") - at0) / (at1 - at0), rtol=1e-4)


def test_unimix_categorical(units: Arrays) -> None:
    for mix in variants(units, r"onehot_unimix([\d.]+)/"):
        check_unimix_categorical(units, f"onehot_unimix{mix}", float(mix))


def check_unimix_categorical(units: Arrays, prefix: str, mix: float) -> None:
    left = units.tensor("onehot/logits_left").requires_grad_()
    right = units.tensor("onehot/logits_right").requires_grad_()
    p, q = unimix(left, mix), unimix(right, mix)
    units.compare(f"{prefix}/logits_mixed", p.log() if mix else left)
    units.compare(f"{prefix}/entropy", categorical_entropy(p, p.log()))
    kl = categorical_kl(p, p.log(), q.log())
    grads = torch.autograd.grad(kl.sum(), (left, right))
    units.compare(f"{prefix}/kl", kl)
    units.compare(f"{prefix}/kl_grad_left", grads[0], rtol=GRADIENT)
    units.compare(f"{prefix}/kl_grad_right", grads[1], rtol=GRADIENT)
    noise = torch.exp(-units.tensor(f"{prefix}/gumbel"))
    index = categorical_index(p, noise)
    units.compare(f"{prefix}/sample_index", index.int())
    units.compare(f"{prefix}/logp_of_sample", categorical_log_prob(p.log(), index))
    p = unimix(left, mix)
    sample = straight_through(p, noise, torch.float32)
    assert torch.equal(sample.argmax(-1), index)
    assert torch.equal(sample.sum(-1), torch.ones_like(sample[..., 0]))
    cotangent = units.tensor(f"{prefix}/st_cotangent")
    (grad,) = torch.autograd.grad(sample, left, cotangent, retain_graph=True)
    units.compare(f"{prefix}/st_grad_logits", grad, rtol=GRADIENT)
    (to_probs,) = torch.autograd.grad(sample, p, cotangent)
    units.compare(f"{prefix}/st_cotangent", to_probs, rtol=0)
    units.compare(f"{prefix}/gumbel", -noise.log(), rtol=1e-5)
    units.compare("onehot/logits_left", left.log_softmax(-1) + left.logsumexp(-1, keepdim=True))
    units.compare("onehot/logits_right", right.log_softmax(-1) + right.logsumexp(-1, keepdim=True))


def test_free_nats(units: Arrays) -> None:
    factor = float(units.data["freenats/logit_factor"])
    p, q = (unimix(factor * units.tensor(f"onehot/logits_{side}"), 0.01) for side in ("left", "right"))
    clipped = categorical_kl(p, p.log(), q.log()).sum(-1).clamp(min=1.0)
    units.compare("freenats/kl_clipped", clipped)
    units.compare("freenats/logit_factor", np.float32(factor))


def test_return_normalisers(units: Arrays) -> None:
    x = units.tensor("normalize/x")
    cases = {
        "retnorm": ReturnNorm(),
        "perc_debias": ReturnNorm("perc", limit=1e-8, debias=True),
        "meanstd_debias": ReturnNorm("meanstd", limit=1e-8, debias=True),
    }
    names = {"final_lo": "lo", "final_hi": "hi", "final_mean": "lo", "final_sqrs": "hi", "final_corr": "corr"}
    for case, norm in cases.items():
        after = []
        for part in x:
            norm.update(part)
            after.append(torch.stack(norm.offset_scale()))
        units.compare(f"normalize_{case}/offset_scale_after_each", torch.stack(after))
        for k in units.keys(f"normalize_{case}/final_"):
            units.compare(f"normalize_{case}/final_{k}", getattr(norm, names[f"final_{k}"]))
    quantiles = []
    for part in x:
        norm = ReturnNorm(rate=1.0)  # keeps the newest percentiles only
        norm.update(part)
        quantiles.append(torch.stack([norm.lo, norm.hi]))
    units.compare("normalize/perc5_95", torch.stack(quantiles))
    ends = []
    for i in range(x.shape[0]):
        rows = []
        for value in x[i].flatten():
            norm = ReturnNorm(rate=1.0)
            norm.update(value)
            rows.append(norm.lo)
        ends.append(torch.stack(rows).view(x.shape[1:]))
    units.compare("normalize/x", torch.stack(ends))


def test_optimizer(units: Arrays) -> None:
    names = units.keys("opt/param0/")
    initial = {k: units.tensor(f"opt/param0/{k}") for k in names}
    grads = {k: units.tensor(f"opt/grads/{k}") for k in names}
    cases = {
        "official": {"lr": 4e-5, "warmup": 1000},
        "fast": {"lr": 1e-2, "warmup": 3},
        "nowarm_wd": {"lr": 1e-2, "warmup": 0, "weight_decay": 0.1},
        "nesterov": {"lr": 1e-2, "warmup": 0, "nesterov": True},
        "cosine": {"lr": 1e-2, "warmup": 2, "anneal": 6, "schedule": "cosine"},
        "linear": {"lr": 1e-2, "warmup": 2, "anneal": 6, "schedule": "linear"},
    }
    for case in variants(units, r"opt/(\w+)/params_after_each/"):
        options = cases[case]
        params = {k: torch.nn.Parameter(v.clone()) for k, v in initial.items()}
        optimizer = LaProp(params.values(), **options)
        after: dict[str, list[Tensor]] = {k: [] for k in names}
        for n in range(len(grads[names[0]])):
            for k, p in params.items():
                p.grad = grads[k][n].clone()
            optimizer.step()
            for k, p in params.items():
                after[k].append(p.detach().clone())
        for k in names:
            units.compare(
                f"opt/{case}/params_after_each/{k}", torch.stack(after[k]), rtol=0, atol=PARAMETER / 10
            )
            if options["warmup"]:  # the first update has learning rate 0
                units.compare(f"opt/param0/{k}", after[k][0], rtol=0)
    clipped = [grads[k][0].clone() for k in names]
    clip_agc_([initial[k] for k in names], clipped, 0.3)
    for k, grad in zip(names, clipped, strict=True):
        units.compare(f"agc/update/{k}", grad)
    for k in names:  # without momentum, RMS and clipping the update is the gradient
        p = torch.nn.Parameter(torch.zeros_like(initial[k]))
        found = []
        for grad in grads[k]:
            one = LaProp([p], lr=1.0, betas=(0.0, 0.0), eps=1.0, agc=0.0, warmup=0)
            p.grad = grad.clone().double().float()
            before = p.detach().clone()
            one.step()
            moved = (before - p.detach()).double()  # g / (|g| + 1)
            found.append(moved / (1 - moved.abs()))
            p.data.zero_()
        units.compare(f"opt/grads/{k}", torch.stack(found), rtol=1e-4)


def test_no_unit_array_was_left_out(units: Arrays, request: pytest.FixtureRequest) -> None:
    """Runs after all tests of the file: an array that no comparison has read is a failure."""
    ran = [i for i in request.session.items if i.fspath == request.node.fspath and units.path.name in i.name]
    if len(ran) < 15:
        pytest.skip("only a part of the file was selected")
    print("", units.report(), sep="\n")
    assert units.unused() == []
