"""DreamerV3 (Hafner et al. 2025, "Mastering diverse control tasks through world models").

Read top to bottom: :meth:`DreamerV3Module.training_step` is one gradient step, :meth:`DreamerV3.loss` shows
its three parts in the paper's order, and the loss functions follow in call order. Equal to the official code
(danijar/dreamerv3) up to float32 rounding; ``docs/parity.md`` lists what is compared and every knowing
deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_wm.distributions import (
    bernoulli_loss,
    categorical_entropy,
    categorical_kl,
    symexp_bins,
    two_hot_loss,
    two_hot_mean,
    unimix,
)
from lit_wm.errors import ConfigError, whole
from lit_wm.functional import symexp
from lit_wm.module import Pretraining, WorldModelModule, arguments_of, give_verbs
from lit_wm.nets.coders import Decoder, Encoder, greedy, module_key
from lit_wm.nets.heads import ActionDist, Head, PolicyHead, batched_heads, flat_action, sample_actions
from lit_wm.nets.layers import stacked_linear
from lit_wm.nets.multitask import TaskSpaces
from lit_wm.nets.rssm import RSSM
from lit_wm.noise import Noise
from lit_wm.optim import LaProp
from lit_wm.planners import Planner
from lit_wm.presets import DREAMERV3, dreamerv3_sizes
from lit_wm.pretrained import Meaning, Weights, entries
from lit_wm.returns import ReturnNorm, lambda_return
from lit_wm.tasks import list_tasks
from lit_wm.types import Batch, Spaces, Spec, State, States, Tensors, Trajectory
from lit_wm.world_model import WorldModel

LOSS_SCALES = {
    "rec": 1.0,  # every reconstruction key
    "rew": 1.0,
    "con": 1.0,
    "dyn": 1.0,
    "rep": 0.1,
    "policy": 1.0,
    "value": 1.0,
    "repval": 0.3,
    "bc": 0.0,  # behaviour cloning of recorded actions: our extension
}
LAYERS = {"enc": 3, "dec": 3, "rew": 1, "con": 1, "pol": 3, "val": 3}  # of each MLP


class DreamerV3Module(WorldModelModule):
    """DreamerV3 under a Lightning Trainer. Every default is the reference's value.

    Args:
        spaces: observation and action entries as a plain dict; linked from the data.
        preset: sizes of all networks, size1m ... size400m or debug (see ``lit-wm presets``).
        deter: width D of the deterministic state; None = from the preset, here and below.
        hidden: width of the recurrent model's inner layers.
        stoch: number S of categorical latents.
        classes: classes C of each.
        depth: image channels, in units of (2, 3, 4, 4).
        units: width of all MLPs.
        blocks: blocks of the GRU.
        layers: depths of the MLPs, merged over the defaults; keys enc, dec, rew, con, pol, val.
        strided: halve and double images by strided convolutions instead of pooling and upsampling.
        outer: the outermost image stage keeps the resolution.
        squash: encode symlog of the vectors instead of their values.
        imag_length: imagined steps H per start state.
        imag_warmup: updates over which H rises from 1 to ``imag_length``; 0 = there from the start. Here and
            in the other schedules those of pretraining and ``data.offline_updates`` count; rates count the
            updates of their part.
        imag_last: imagine from the last n steps of each row only, n >= 2; 0 = from all.
        horizon: discount horizon in steps, gamma = 1 - 1/horizon.
        contdisc: fold the discount into the continue head's target.
        lam: lambda of the returns.
        actent: weight of the policy's entropy.
        actent_final: weight that it changes to, linearly over ``actent_anneal`` updates; None = constant.
        actent_anneal: see ``actent_final``.
        slowreg: weight of the critic's pull towards its slow copy.
        slowtar: bootstrap from the slow critic instead of the critic.
        slow_rate: share of the new weights in each update of the slow critic.
        return_norm: scale of the advantages: ``perc`` (5th to 95th percentile), ``meanstd`` or ``none``.
        free_nats: KL below which dyn and rep give no gradient.
        mix: share of the uniform distribution in the latents.
        kl_warmup: updates over which the weights of dyn and rep rise from 0; 0 = there from the start.
        loss_scales: weights of the losses, merged over the defaults; ``rec`` stands for every observation
            key. With ``rec: 0`` nothing is reconstructed and the decoder stays untrained. ``bc`` lets the
            policy also imitate the actions of datasets.
        normalize: put vector observations into units of their mean and standard deviation in the training
            rows of ``data.sources``, which are stored with the weights.
        reward_scale: factor on the rewards of the data; the model's rewards and values are in its units.
        lr: learning rate.
        actor_lr: learning rate of the policy; None = ``lr``.
        critic_lr: learning rate of the critic; None = ``lr``.
        grad_clip: largest norm of all gradients together, before ``agc``; None = no such limit.
        warmup: updates over which it rises from 0.
        schedule: ``const`` from then on, or ``linear`` to a tenth or ``cosine`` to 0, reached at ``anneal``.
        anneal: updates at the end of a falling schedule.
        agc: adaptive gradient clipping, largest gradient norm as a share of the parameter norm.
        betas: decay of momentum and second moment.
        eps: added to the second moment's root.
        weight_decay: decoupled decay of the kernels.
        planner: ``policy`` acts as the reference does; ``mppi``, ``cem``, ``gradient`` or ``random`` search
            from it (docs/planning.md).
        planner_options: merged over the planner's defaults, e.g. ``{num_samples: 256}``; ``policy`` has none
            and does not read them.
        train_world_model: False freezes encoder, dynamics, decoder, reward and continue heads.
        train_actor: False freezes the policy.
        train_critic: False freezes the critic.
        pretrain: updates that come first, ``{world_model: n, actor: m}``: n of the world model alone, then m
            in which the policy learns too, by behaviour cloning.
        ensemble: networks that predict the next latent state, to notice where the data say little; 0 = none.
        disagreement: what imagined steps cost, in reward per unit of the ensemble's disagreement beyond its
            mean in the data, which is 1; below 0 it is a bonus for exploration (docs/offline.md).
        disagreement_limit: imagined roll-outs end, with the value there, where the disagreement is larger;
            plans avoid it. None = nowhere.
        start_from: checkpoint or run directory whose weights a new run begins with; optimisers and replay
            begin anew.
        start_partial: take from it what fits by name, shape and meaning; else all has to.
        freeze: names of parts that are not trained, of enc, dyn, dec, rew, con, pol and val.
        tasks: several, learnt from datasets: ``data`` for those that ``data.sources`` name, ``mt30``,
            ``mt80`` or a list of ``{name, obs, action, episode_length}``; None = one task.
        task_dim: size of a task's embedding.
        log_every: updates between two lines of metrics.
        seed: seed of the noise streams.
    """

    model: DreamerV3
    of_rewards = ("rew", "repval")

    def __init__(
        self,
        spaces: dict[str, Any],
        preset: str = "size200m",
        deter: int | None = None,
        hidden: int | None = None,
        stoch: int | None = None,
        classes: int | None = None,
        depth: int | None = None,
        units: int | None = None,
        blocks: int | None = None,
        layers: dict[str, int] | None = None,
        strided: bool = False,
        outer: bool = False,
        squash: bool = True,
        imag_length: int = 15,
        imag_warmup: int = 0,
        imag_last: int = 0,
        horizon: float = 333,
        contdisc: bool = True,
        lam: float = 0.95,
        actent: float = 3e-4,
        actent_final: float | None = None,
        actent_anneal: int = 0,
        slowreg: float = 1.0,
        slowtar: bool = False,
        slow_rate: float = 0.02,
        return_norm: str = "perc",
        free_nats: float = 1.0,
        mix: float = 0.01,
        kl_warmup: int = 0,
        loss_scales: dict[str, float] | None = None,
        normalize: bool = False,
        reward_scale: float = 1.0,
        lr: float = 4e-5,
        actor_lr: float | None = None,
        critic_lr: float | None = None,
        grad_clip: float | None = None,
        warmup: int = 1000,
        schedule: str = "const",
        anneal: int = 0,
        agc: float = 0.3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        weight_decay: float = 0.0,
        planner: str = "policy",
        planner_options: dict[str, Any] | None = None,
        train_world_model: bool = True,
        train_actor: bool = True,
        train_critic: bool = True,
        pretrain: dict[str, int] | None = None,
        ensemble: int = 0,
        disagreement: float = 0.0,
        disagreement_limit: float | None = None,
        start_from: str | None = None,
        start_partial: bool = False,
        freeze: list[str] | None = None,
        tasks: str | list[dict[str, Any]] | None = None,
        task_dim: int = 64,
        log_every: int = 100,
        seed: int = 0,
    ):
        super().__init__(log_every=log_every, seed=seed)
        self.save_hyperparameters()
        options = arguments_of(DreamerV3Module, self.hparams, exact=False)
        sizes = dreamerv3_sizes(preset, **{k: options[k] for k in DREAMERV3["size200m"]})
        self.model = DreamerV3(Spaces.from_plain(spaces), **options | sizes)
        self.trained = self.freeze_parts(
            freeze, world_model=train_world_model, actor=train_actor, critic=train_critic
        )
        rates = {"lr": lr, "actor_lr": lr if actor_lr is None else actor_lr}
        rates["critic_lr"] = lr if critic_lr is None else critic_lr
        for name, rate in rates.items():
            if not 0 < rate < float("inf"):
                raise ConfigError(f"model.{name} is {rate}; expected more than 0")
        if warmup < 0 or schedule not in ("const", "linear", "cosine"):
            raise ConfigError(
                f"model.warmup is {warmup} and model.schedule {schedule!r}; expected 0 updates or more, and "
                "'const', 'linear' or 'cosine'"
            )
        if schedule == "const" and anneal:
            raise ConfigError(f"model.anneal is {anneal}, but model.schedule is const: use linear or cosine")
        if schedule != "const" and anneal <= warmup:
            raise ConfigError(
                f"model.schedule {schedule!r} ends at model.anneal, which is {anneal}; expected more than "
                f"model.warmup, {warmup} updates"
            )
        self.grad_clip = grad_clip
        if grad_clip is not None and not grad_clip > 0:
            raise ConfigError(f"model.grad_clip is {grad_clip}; expected more than 0, or null for no limit")
        self.groups = dict(self.trained)
        self.trained |= {"ensemble": True} if ensemble else {}
        self.pretraining = Pretraining.of(pretrain, self.groups, bool(self.model.loss_scales["bc"]))
        self.last_carry: State | None = None

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """World model, actor, critic: together exactly the reference's one joint optimiser; and the
        ensemble's own.
        """
        hp = self.hparams
        options = {k: hp[k] for k in ("warmup", "schedule", "anneal", "agc", "betas", "eps", "weight_decay")}
        own = {"world_model": None, "actor": hp["actor_lr"], "critic": hp["critic_lr"], "ensemble": None}
        rates = {name: hp["lr"] if lr is None else lr for name, lr in own.items()}
        return [LaProp(self.model.group(name), lr=rates[name], **options) for name in self.trained]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One gradient step. All losses see the same old weights; then the three optimizers step; then the
        slow critic.

        Args:
            batch: a :class:`Batch`, or a ticket that draws one (collecting from the environment as needed).
        """
        batch = self.draw(batch)
        carry = self.model.start_carry(batch, self.last_carry)
        self.model.follow_schedules(self.updates)
        learning = self.learning()  # all groups, but for the first updates of a run that pretrains

        # The model chooses each dtype itself; the Trainer's autocast would round what is meant to stay
        # float32.
        with torch.autocast(self.device.type, enabled=False):
            out = self.model.loss(batch, carry, self.noise, learning, self.phase == "actor")
            # Backward, gradients of all processes, AGC, LaProp.
            out.metrics["opt/grad_norm"] = self.optimise(out.total, *(k for k, on in learning.items() if on))
            if self.model.ensemble is not None:
                loss, out.metrics["disagreement/data"] = self.model.ensemble_loss(batch, out)
                out.metrics["loss/ensemble"] = loss.detach()
                self.optimise(loss, "ensemble")
        out.metrics |= self.by_source(batch, out.losses)
        if learning["critic"]:
            self.model.update_slow_critic()

        self.last_carry = out.post.at(-1).detach()
        if batch.write_back is not None:
            batch.write_back(out.post.detach())
        self.finish_update(out.metrics)

    def held_out_losses(self, batch: Batch, noise: Noise) -> Tensors:
        """Mean losses of the world model on a batch that is not trained on, by name."""
        only = {"world_model": True, "actor": False, "critic": False}
        losses = self.model.loss(batch, self.model.start_carry(batch, None), noise, only).losses
        return {name: loss.mean() for name, loss in losses.items()}

    def rank_state_dict(self) -> dict[str, Any]:
        """The noise of this process, its pending metrics, and where its last batch ended."""
        carry = self.last_carry
        ended = None if carry is None else {"deter": carry.deter.cpu(), "stoch": carry.stoch.cpu()}  # type: ignore[union-attr]
        return super().rank_state_dict() | {"last_carry": ended}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`rank_state_dict`."""
        super().load_rank_state_dict(state)
        ended = state["last_carry"]
        self.last_carry = None if ended is None else State(**ended).map(lambda x: x.to(self.device))


@dataclass
class Dream:
    """Imagined roll-outs. Time is axis 0 so that each step is contiguous; N = start states."""

    feats: Tensor  # (H+1, N, F)
    actions: list[Tensors]  # H x (N, ...)
    reward: Tensor  # (H+1, N)
    cont: Tensor  # (H+1, N), a probability times the discount
    value: Tensor  # (H+1, N)
    slow: Tensor  # (H+1, N)
    value_logits: Tensor  # (H, N, bins), with autograd
    value_log_probs: Tensor  # (H, N, bins)
    policy: dict[str, ActionDist]  # of the first H steps, with autograd
    weight: Tensor  # (H+1, N)
    returns: Tensor  # (H, N)
    disagreement: Tensor | None = None  # (H, N)
    counted: Tensor | None = None  # (H, N), bool: before the end of a limited dream; None: all
    advantage: Tensor | None = None  # (H, N)


@dataclass
class LossOutput:
    """What :meth:`DreamerV3.loss` returns: the total to differentiate and everything it was made of."""

    total: Tensor
    losses: Tensors  # (B, T) each; policy and value (B, K), repval (B, K-1)
    metrics: Tensors  # scalars on the device
    post: State  # (B, T, ...)
    post_logit: Tensor  # (B, T, S, C)
    prior_logit: Tensor  # (B, T, S, C)
    feat: Tensor  # (B, T, F)
    dream: Dream | None = None
    replay_returns: Tensor | None = None  # (B, K-1)


class DreamerV3(WorldModel):
    """The networks, the losses and the verbs, free of Lightning. Arguments and defaults are those of
    :class:`DreamerV3Module`; sizes must be given.
    """

    policy_part, critic_part, slow_part = "pol", "val", "slowval"

    def __init__(self, spaces: Spaces, **options: Any):
        super().__init__(spaces, options.get("normalize", False))
        o = SimpleNamespace(**arguments_of(DreamerV3Module, options))
        self.imag_length, self.imag_warmup, self.imag_last = o.imag_length, o.imag_warmup, o.imag_last
        self.horizon, self.contdisc = o.horizon, o.contdisc
        self.lam, self.slowreg, self.slowtar = o.lam, o.slowreg, o.slowtar
        self.actent, self.actent_anneal, self.kl_warmup = o.actent, o.actent_anneal, o.kl_warmup
        self.actent_final = o.actent if o.actent_final is None else o.actent_final
        self.reward_scale = o.reward_scale
        self.slow_rate, self.free_nats, self.mix = o.slow_rate, o.free_nats, o.mix
        clash = sorted(spaces.obs.keys() & LOSS_SCALES.keys())
        if clash:
            raise ConfigError(f"observation keys {clash} are names of losses; rename them in the environment")
        if o.imag_length < 1:
            raise ConfigError(f"model.imag_length is {o.imag_length}; expected 1 imagined step or more")
        if o.imag_last < 0 or o.imag_last == 1:
            raise ConfigError(
                f"model.imag_last is {o.imag_last}; expected 0 for all steps, or 2 and more: the replay "
                "value loss needs a next step"
            )
        if not o.horizon > 1:
            raise ConfigError(
                f"model.horizon is {o.horizon}; expected more than 1 step, gamma = 1 - 1/horizon"
            )
        if min(o.imag_warmup, o.actent_anneal, o.kl_warmup) < 0:
            raise ConfigError("model.imag_warmup, actent_anneal and kl_warmup count updates; expected >= 0")
        if (o.actent_final is None) != (o.actent_anneal == 0):
            raise ConfigError(
                "model.actent_final and model.actent_anneal need each other: where to, how fast"
            )
        unknown = (o.loss_scales or {}).keys() - LOSS_SCALES.keys() - spaces.obs.keys()
        if unknown:
            known = sorted(LOSS_SCALES.keys() | spaces.obs.keys())
            raise ConfigError(f"unknown model.loss_scales {sorted(unknown)}; known: {', '.join(known)}")
        scales: dict[str, float] = LOSS_SCALES | (o.loss_scales or {})
        self.loss_scales = {k: scales.get(k, scales["rec"]) for k in spaces.obs} | scales
        self.loss_scales.pop("rec")
        if not all(
            0 <= x < float("inf") for x in self.loss_scales.values()
        ) or not 0 < o.reward_scale < float("inf"):
            raise ConfigError(
                f"model.loss_scales is {o.loss_scales} and model.reward_scale {o.reward_scale}; expected 0 "
                "or more for each loss, and more than 0"
            )
        depths = LAYERS | (o.layers or {})
        if depths.keys() != LAYERS.keys() or any(not isinstance(n, int) or n < 1 for n in depths.values()):
            raise ConfigError(
                f"model.layers is {o.layers}; expected at least 1 for some of {', '.join(LAYERS)}"
            )
        self.follow_schedules(0)

        # Several tasks: what they observe has places of its own, and an embedding stands beside every action,
        # so that each state knows its task, and with it all heads.
        self.tasks, self.task_index = list_tasks(o.tasks, None, spaces)
        self.task_spaces: TaskSpaces | None = None
        obs, action = spaces.obs, self.action_dim
        if len(self.tasks) > 1:
            self.task_spaces = TaskSpaces(self.tasks, spaces, o.task_dim)
            obs, action = self.task_spaces.specs, action + o.task_dim
        elif self.tasks:
            self.task_index = 0

        feat = o.deter + o.stoch * o.classes
        self.enc = Encoder(obs, o.depth, o.units, o.strided, o.outer, o.squash, depths["enc"])
        self.dyn = RSSM(self.enc.token_size, action, o.deter, o.hidden, o.stoch, o.classes, o.blocks, o.mix)
        self.dec = Decoder(
            obs,
            o.deter,
            o.stoch * o.classes,
            o.depth,
            o.units,
            o.strided,
            o.outer,
            layers=depths["dec"],
        )
        self.rew = Head(feat, o.units, depths["rew"], 255, "logits", outscale=0.0)
        self.con = Head(feat, o.units, depths["con"], 1, "logit", outscale=1.0)
        self.pol = PolicyHead(feat, o.units, depths["pol"], spaces.action)
        self.val = Head(feat, o.units, depths["val"], 255, "logits", outscale=0.0)
        self.slowval = Head(feat, o.units, depths["val"], 255, "logits", outscale=0.0)
        self.slowval.load_state_dict(self.val.state_dict())
        self.slowval.requires_grad_(False)
        self.retnorm = ReturnNorm(o.return_norm)
        # Last, so that nothing above depends on whether there is one.
        self.ensemble = self.make_ensemble(o, feat + action, o.stoch * o.classes, o.units)
        self.register_buffer("bins", symexp_bins(255), persistent=False)
        self.planner = self.planner_of(o.planner, o.planner_options)
        self.meanings = self.meanings_of(options | {"spaces": spaces})

    bins: Tensor

    def group(self, name: str) -> list[torch.nn.Parameter]:
        """Parameters of ``world_model``, ``actor`` or ``critic``, or of one sub-module."""
        return [p for part in self.parts().get(name, [name]) for p in self.get_submodule(part).parameters()]

    def follow_schedules(self, updates: int) -> None:
        """Set what changes with the number of ``updates`` done; with the defaults nothing does."""

        def ramp(length: int) -> float:
            return min(1.0, updates / length) if length else 1.0

        self.entropy_weight = self.actent + (self.actent_final - self.actent) * ramp(self.actent_anneal)
        self.kl_weight = ramp(self.kl_warmup)
        self.imag_steps = max(1, round(self.imag_length * ramp(self.imag_warmup)))

    # --- The loss, in the paper's order -------------------------------------------------------------

    def loss(
        self,
        batch: Batch,
        carry: State,
        noise: Noise,
        trained: dict[str, bool] | None = None,
        cloning: bool = False,
    ) -> LossOutput:
        """All losses of one batch at the current weights.

        Args:
            batch: (B, T) steps. carry: latent state before the first step, (B, ...).
            noise: streams ``posterior``, ``prior`` and ``policy/<key>``.
            trained: groups to compute losses for; None = all.
            cloning: the actor learns from recorded actions alone, and nothing is imagined.
        """
        trained = trained or {"world_model": True, "actor": True, "critic": True}
        weights = self.loss_scales | {k: self.kl_weight * self.loss_scales[k] for k in ("dyn", "rep")}
        weights |= {"bc": 1.0} if cloning else {}
        dtype = self.compute_dtype
        losses: Tensors = {}

        # 1. World model: what happened? --------------------------------------------------------------
        with torch.set_grad_enabled(trained["world_model"] and torch.is_grad_enabled()):
            task = self.task_of(batch.task, batch.reward.shape)  # (B, T), None with a single task
            obs, own = self.spread(self.normalized(batch.obs), task)
            tokens = self.enc(obs, dtype)  # (B, T, E)
            post, post_logit = self.dyn.observe(
                tokens, self.previous_action(batch), batch.is_first, carry, noise
            )
            post.task = task
            prior_logit = self.dyn.prior(post.deter)  # (B, T, S, C)
            feat = self.feat(post)  # (B, T, F)
            kl, metrics = self.kl_losses(post_logit, prior_logit)
            losses |= kl
            if any(self.loss_scales[k] for k in self.spaces.obs):
                losses |= self.dec.losses(post.deter, post.stoch.flatten(-2), obs, own)  # type: ignore[union-attr]
            if batch.fake is not None:  # of a copied observation there is nothing to learn but how it came
                losses = {k: v.masked_fill(batch.fake, 0.0) for k, v in losses.items()}
            rew_logits, con_logit = batched_heads(feat, [self.rew, self.con])
            losses["rew"] = two_hot_loss(rew_logits, self.bins, batch.reward * self.reward_scale)
            losses["con"] = bernoulli_loss(con_logit.squeeze(-1), self.continue_target(batch))
            if batch.rewarded is not None:
                losses["rew"] = losses["rew"] * batch.rewarded.unsqueeze(1)
        out = LossOutput(torch.zeros(()), losses, metrics, post, post_logit, prior_logit, feat)

        if (trained["actor"] or trained["critic"]) and not cloning:
            # 2. Imagination: what could happen? No gradient goes through the roll-out ------------------
            out.dream = dream = self.dream(post.detach(), noise)
            if self.training:
                self.retnorm.update(dream.returns, dream.counted)
            offset, scale = self.retnorm.offset_scale()
            target = dream.slow if self.slowtar else dream.value
            dream.advantage = (dream.returns - target[:-1]) / scale
            starts = (batch.reward.shape[0], -1)
            losses["policy"] = self.policy_loss(dream).mean(0).view(starts)  # (B, K)
            losses["value"] = self.value_loss(dream).mean(0).view(starts)  # (B, K)

            # 3. Replay value: keep the critic honest on real data -------------------------------------
            losses["repval"], out.replay_returns = self.replay_value_loss(
                batch, feat, dream.returns[0].view(starts)
            )
            metrics |= self.dream_metrics(dream, offset, scale)
        if trained["actor"] and weights["bc"]:
            losses["bc"] = self.cloning_loss(batch, feat.detach())

        if not trained["world_model"]:
            losses = {k: v for k, v in losses.items() if k in ("policy", "value", "repval", "bc")}
        if not trained["actor"]:
            losses.pop("policy", None)
        if not trained["critic"]:
            losses.pop("value", None), losses.pop("repval", None)
        out.losses = losses
        means = {k: v.mean() for k, v in losses.items()}
        out.total = torch.stack([weights[k] * v for k, v in means.items()]).sum()
        metrics |= {f"loss/{k}": v.detach() for k, v in means.items()} | {"opt/loss": out.total.detach()}
        return out

    def kl_losses(self, post_logit: Tensor, prior_logit: Tensor) -> tuple[Tensors, Tensors]:
        """dyn pulls the prior towards the posterior, rep the posterior towards the prior; both with free
        nats.

        (B, T, S, C) raw logits -> losses (B, T), entropy metrics. KL, like the samples, uses the mixed
        logits.
        """
        post, prior = unimix(post_logit, self.mix), unimix(prior_logit, self.mix)
        log_post, log_prior = post.log(), prior.log()
        dyn = categorical_kl(post.detach(), log_post.detach(), log_prior).sum(-1)
        rep = categorical_kl(post, log_post, log_prior.detach()).sum(-1)
        losses = {"dyn": dyn.clamp(min=self.free_nats), "rep": rep.clamp(min=self.free_nats)}
        metrics = {
            "dyn_ent": categorical_entropy(prior.detach(), log_prior.detach()).sum(-1).mean(),
            "rep_ent": categorical_entropy(post.detach(), log_post.detach()).sum(-1).mean(),
            "kl": dyn.detach().mean(),
        }
        return losses, metrics

    @torch.no_grad()
    def dream(self, post: State, noise: Noise) -> Dream:
        """Imagine H steps with the policy from every posterior state, then value them. post (B, T, ...).

        The roll-out needs no autograd; the policy and the critic are evaluated again on all its features at
        once, this time with autograd.
        """
        last = self.imag_last or post.deter.shape[1]
        start = post.map(lambda x: x[:, -last:].flatten(0, 1))  # (N, ...)
        H, N = self.imag_steps, start.deter.shape[0]
        feats = start.deter.new_empty(H + 1, N, self.dyn.deter + self.dyn.stoch * self.dyn.classes)

        mask = self.action_mask_of(start)

        def policy(feat: Tensor, t: int) -> tuple[Tensors, Tensor]:
            action = sample_actions(self.pol(feat, mask), noise, "policy", t)
            return action, self.flat(action, start.task, feat.dtype)

        actions = self.dyn.imagine_into(feats, start, policy, noise)
        rew, con, slow = batched_heads(feats, [self.rew, self.con, self.slowval])
        reward = two_hot_mean(rew.softmax(-1), self.bins)  # (H+1, N)
        slow_value = two_hot_mean(slow.softmax(-1), self.bins)
        cont = con.squeeze(-1).sigmoid()
        if not self.contdisc:
            cont = cont * (1 - 1 / self.horizon)

        with torch.enable_grad():
            pol_in, val_in = stacked_linear(feats[:-1], [self.pol.mlp.layer(0)[0], self.val.mlp.layer(0)[0]])
            dist, value_logits = self.pol.from_first(pol_in, mask), self.val.from_first(val_in)
        log_probs = value_logits.detach().log_softmax(-1)  # (H, N, bins)
        value = two_hot_mean(log_probs.exp(), self.bins)
        final = two_hot_mean(self.val(feats[-1]).softmax(-1), self.bins)
        value = torch.cat([value, final.unsqueeze(0)])  # (H+1, N)

        weight = cont.cumprod(0)
        if not self.contdisc:
            weight = weight / (1 - 1 / self.horizon)
        lam: float | Tensor = self.lam
        doubt = alive = counted = None
        if self.doubts:
            taken = torch.stack([self.flat(a, start.task, feats.dtype) for a in actions])
            x = torch.cat([feats[:-1], taken], -1)
            doubt = self.ensemble.disagreement(x)  # type: ignore[union-attr]  # (H, N)
            reward = torch.cat([reward[:1], reward[1:] - self.price(doubt)])
            if self.disagreement_limit is not None:
                # At the first step that is not trusted the return is the value there, and what comes from
                # then on does not count.
                alive = (doubt <= self.disagreement_limit).float().cumprod(0)
                alive = torch.cat([alive, alive[-1:]])
                lam, weight = alive.T * self.lam, weight * alive
        boot = slow_value if self.slowtar else value
        returns = lambda_return(reward.T, cont.T, boot.T, lam).T  # (H, N)
        if alive is not None:
            counted = alive[:-1] > 0
            returns = torch.where(counted, returns, boot[:-1])
        return Dream(
            feats, actions, reward, cont, value, slow_value, value_logits, log_probs, dist, weight, returns,
            doubt, counted,
        )  # fmt: skip

    def policy_loss(self, dream: Dream) -> Tensor:
        """REINFORCE with the scaled advantage and an entropy bonus, for discrete and continuous actions
        alike. (H, N)
        """
        log_prob: Tensor | float = 0.0
        entropy: Tensor | float = 0.0
        for k, dist in dream.policy.items():
            log_prob = log_prob + dist.log_prob(torch.stack([a[k] for a in dream.actions]))
            entropy = entropy + dist.entropy()
        advantage: Tensor = dream.advantage  # type: ignore[assignment]
        return -dream.weight[:-1] * (log_prob * advantage + self.entropy_weight * entropy)

    def value_loss(self, dream: Dream) -> Tensor:
        """Two-hot cross-entropy to the returns and to the slow critic. (H, N)"""
        loss = self.critic_loss(dream.value_logits, dream.returns, dream.slow[:-1], dream.value_log_probs)
        return dream.weight[:-1] * loss

    def critic_loss(
        self, logits: Tensor, target: Tensor, slow: Tensor, log_probs: Tensor | None = None
    ) -> Tensor:
        """L(logits, target) + slowreg * L(logits, slow). (..., bins), (...) -> (...)"""
        if self.slowreg == 1.0:
            return two_hot_loss(logits, self.bins, target, slow, log_probs=log_probs)
        loss = two_hot_loss(logits, self.bins, target, log_probs=log_probs)
        return loss + self.slowreg * two_hot_loss(logits, self.bins, slow, log_probs=log_probs)

    def replay_value_loss(self, batch: Batch, feat: Tensor, boot: Tensor) -> tuple[Tensor, Tensor]:
        """Critic loss on replayed steps, whose returns fall back on imagined ones; it trains the world model
        too.

        feat (B, T, F), boot (B, K): first imagined return of the last K steps -> loss and returns (B, K-1).
        """
        K = boot.shape[1]
        feat, reward = feat[:, -K:], batch.reward[:, -K:] * self.reward_scale
        last, term = batch.is_last[:, -K:].float(), batch.is_terminal[:, -K:].float()
        returns = lambda_return(reward, (1 - term) * (1 - 1 / self.horizon), boot, (1 - last) * self.lam)
        with torch.no_grad():
            slow = two_hot_mean(self.slowval(feat).softmax(-1), self.bins)
        loss = self.critic_loss(self.val(feat)[:, :-1], returns, slow[:, :-1])
        if batch.rewarded is not None:
            loss = loss * batch.rewarded.unsqueeze(1)
        return (1 - last[:, :-1]) * loss, returns

    def cloning_loss(self, batch: Batch, feat: Tensor) -> Tensor:
        """-log p of the recorded actions, of datasets where the batch holds other rows too. (B, T-1)"""
        taken = {k: v[:, 1:] for k, v in batch.prev_action.items()}  # a[t] lies beside o[t+1]
        task = self.task_of(batch.task, batch.reward.shape)
        mask = None if task is None else self.task_spaces.action_mask[task][:, :-1]  # type: ignore[union-attr]
        log_prob = sum(d.log_prob(taken[k]) for k, d in self.pol(feat[:, :-1], mask).items())
        known = ~batch.is_first[:, 1:]
        if batch.recorded is not None:
            known = known & batch.recorded.unsqueeze(1)
        return -torch.where(known, log_prob, 0.0)  # type: ignore[arg-type]

    def ensemble_loss(self, batch: Batch, out: LossOutput) -> tuple[Tensor, Tensor]:
        """Loss of the ensemble, which predicts the posterior's probabilities one step ahead, and its mean
        disagreement.
        """
        action = self.previous_action(batch)[:, 1:]  # zero where an episode begins, which does not count
        x = torch.cat([out.feat[:, :-1].to(action.dtype), action], -1)
        target = unimix(out.post_logit[:, 1:].detach(), self.mix).flatten(-2)
        keep = ~batch.is_first if batch.fake is None else ~(batch.is_first | batch.fake)
        return self.ensemble.loss(x, target, keep[:, 1:])  # type: ignore[union-attr]

    def continue_target(self, batch: Batch) -> Tensor:
        """1 for a step after which the episode goes on, 0 for a terminal one; times gamma with ``contdisc``.
        (B, T)
        """
        gamma = 1 - 1 / self.horizon if self.contdisc else 1.0
        return (~batch.is_terminal).float() * gamma

    @torch.no_grad()
    def dream_metrics(self, dream: Dream, offset: Tensor, scale: Tensor) -> Tensors:
        """Scalars that describe the imagined batch, on the device."""
        normed = (dream.returns - offset) / scale
        advantage: Tensor = dream.advantage  # type: ignore[assignment]
        metrics = {
            "adv": advantage.mean(),
            "adv_std": advantage.std(correction=0),
            "adv_mag": advantage.abs().mean(),
            "rew": dream.reward.mean(),
            "con": dream.cont.mean(),
            "ret": normed.mean(),
            "ret_min": normed.min(),
            "ret_max": normed.max(),
            "ret_rate": (normed.abs() >= 1).float().mean(),
            "return_scale": scale,
            "val": dream.value.mean(),
            "tar": dream.returns.mean(),
            "slowval": dream.slow.mean(),
            "weight": dream.weight.mean(),
        }
        if dream.disagreement is not None:
            metrics["disagreement/dream"] = dream.disagreement.mean()
        for k, dist in dream.policy.items():
            entropy = dist.entropy().mean()
            lo, hi = dist.entropy_range()
            metrics |= {f"ent/{k}": entropy, f"rand/{k}": (entropy - lo) / (hi - lo)}
        return metrics

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """slow <- slow_rate * critic + (1 - slow_rate) * slow."""
        slow: list[Tensor] = list(self.slowval.parameters())
        fast: list[Tensor] = list(self.val.parameters())
        torch._foreach_mul_(slow, 1 - self.slow_rate)
        torch._foreach_add_(slow, fast, alpha=self.slow_rate)

    # --- Inputs -------------------------------------------------------------------------------------

    def feat(self, state: State) -> Tensor:
        """concat(deter, flat stoch), the input of all heads. (..., F)"""
        return torch.cat([state.deter, state.stoch.flatten(-2).to(state.deter.dtype)], -1)  # type: ignore[union-attr]

    def previous_action(self, batch: Batch) -> Tensor:
        """Flat previous actions, zero where an episode begins, see :meth:`flat`. (B, T, A)"""
        task = self.task_of(batch.task, batch.reward.shape)
        return self.flat(batch.prev_action, task, self.compute_dtype, ~batch.is_first)

    def flat(
        self, action: Tensors, task: Tensor | None, dtype: torch.dtype, keep: Tensor | None = None
    ) -> Tensor:
        """Actions as the dynamics read them, zero unless ``keep``; of several tasks without padding and
        beside the embedding. (..., A)
        """
        flat = flat_action(action, self.spaces.action, dtype)
        # Masked after the one-hot: class 0 of a zeroed index is not the zero vector.
        flat = flat if keep is None else flat * keep.unsqueeze(-1).to(flat.dtype)
        return flat if self.task_spaces is None else self.task_spaces.beside(flat, task)

    def spread(self, obs: Tensors, task: Tensor | None) -> tuple[Tensors, Tensors | None]:
        """Observations as the encoder reads them, and which entries of vectors are the task's own."""
        return (obs, None) if self.task_spaces is None else self.task_spaces.spread(obs, task)

    def task_of(self, task: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
        """Task of each row and step; None with a single one. (B,) or (B, T) -> (*lead)"""
        if self.task_spaces is None:
            return None
        task = self.task_spaces.known(task).to(self.device, torch.int64)
        return task.view(*task.shape, *[1] * (len(lead) - task.ndim)).expand(lead)

    def start_carry(self, batch: Batch, last: State | None) -> State:
        """State before the batch: zeros, the stored latent, or where ``consecutive`` the end of the previous
        batch.
        """
        carry = self.initial(batch.reward.shape[0]) if batch.carry is None else batch.carry
        if batch.consecutive is not None and last is not None:
            go_on = batch.consecutive

            def pick(old: Tensor, new: Tensor) -> Tensor:
                return torch.where(go_on.view(-1, *[1] * (new.ndim - 1)), old.to(new.dtype), new)

            carry = State(pick(last.deter, carry.deter), pick(last.stoch, carry.stoch))  # type: ignore[arg-type]
        return carry

    # --- What planners need -------------------------------------------------------------------------

    def action_mask_of(self, state: State) -> Tensor | None:
        """1 for the action entries that the task has; None with a single one. (N, A)"""
        return None if self.task_spaces is None else self.task_spaces.action_mask[state.task]

    @torch.no_grad()
    def propose(self, state: State, n: int, horizon: int, noise: Noise) -> Tensor:
        """Roll out the policy ``n`` times from each state, its actions cut to -1 ... 1. (N, n, H, A)"""
        start = State(state.deter, state.stoch, task=state.task).map(lambda x: x.repeat_interleave(n, 0))
        mask = self.action_mask_of(start)
        feats = self.feat(start).to(self.compute_dtype).expand(horizon, -1, -1).clone()
        taken = []

        def policy(feat: Tensor, t: int) -> tuple[Tensors, Tensor]:
            action = sample_actions(self.pol(feat, mask), noise, "plan/propose", t)
            taken.append(flat_action(action, self.spaces.action, torch.float32).clamp(-1, 1))
            flat = taken[-1].to(feat.dtype)
            return action, flat if self.task_spaces is None else self.task_spaces.beside(flat, start.task)

        self.dyn.imagine_into(feats, start, policy, noise, "plan/proposed")
        policy(feats[-1], horizon - 1)
        return torch.stack(taken, 1).view(len(state.deter), n, horizon, -1)

    def value(
        self, state: State, actions: Tensor, noise: Noise, t: int = 0, deterministic: bool = False
    ) -> Tensor:
        """Predicted return of sequences of actions: discounted rewards, and the critic's value of where they
        end, in units of :attr:`reward_scale`.

        Args:
            state: where all sequences of a row start. (N, ...)
            actions: (N, S, H, A).
            noise: stream ``plan/prior``; ``t`` is the planner's iteration. All sequences of a row meet the
                same noise, so that they differ by their actions and not by luck.
            deterministic: the most likely latents instead of drawn ones, whose gradient is that of their
                probabilities; differentiable in the actions.

        Returns:
            (N, S)
        """
        N, S, H, _ = actions.shape
        shape = (N, 1, self.dyn.stoch, self.dyn.classes)

        def race(step: int) -> Tensor:
            if deterministic:
                return torch.ones(shape[2:], device=actions.device)
            return noise.exponential("plan/prior", shape, t * H + step).expand(-1, S, -1, -1).flatten(0, 1)

        if self.task_spaces is not None:
            actions = self.task_spaces.beside(actions, state.task.view(N, 1, 1))  # type: ignore[union-attr]
        total, weight = actions.new_zeros(()), actions.new_ones(())
        lives, within, beyond = weight, weight, total  # within: before the limit of the disagreement
        gamma = 1.0 if self.contdisc else 1 - 1 / self.horizon
        before = self.feat(state).repeat_interleave(S, 0) if self.doubts else None
        for step, feat in enumerate(self.dyn.branch(state, actions.to(self.compute_dtype), race), 1):
            if before is not None:
                x = torch.cat([before, actions[:, :, step - 1].flatten(0, 1).to(before.dtype)], -1)
                doubt = self.ensemble.disagreement(x)  # type: ignore[union-attr]
                if self.disagreement_limit is not None:  # from here on the model is not trusted
                    ends = ((doubt > self.disagreement_limit) & (lives > 0.5)).float()
                    value = two_hot_mean(self.val(before).softmax(-1), self.bins)
                    total, weight = total + weight * ends * value, weight * (1 - ends)
                    within = within * (1 - ends)
                    beyond = beyond + (1 - within)
                total, before = total - weight * self.price(doubt), feat
            heads = [self.rew, self.con] + [self.val] * (step == H)
            rew, con, *val = batched_heads(feat, heads)
            total = total + weight * two_hot_mean(rew.softmax(-1), self.bins)
            con = con.squeeze(-1).sigmoid()
            weight, lives = weight * gamma * con, lives * con
        total = total + weight * two_hot_mean(val[0].softmax(-1), self.bins)
        return self.within_limit(total.view(N, S), beyond)

    # --- The verbs ----------------------------------------------------------------------------------

    def initial(self, batch_size: int) -> State:
        """Zeros: nothing is learned here."""
        zeros = torch.zeros(batch_size, self.dyn.deter, device=self.device, dtype=self.compute_dtype)
        return State(zeros, zeros.new_zeros(batch_size, self.dyn.stoch, self.dyn.classes))

    def latent_specs(self) -> dict[str, Spec]:
        """deter in the compute dtype, stoch as class indices."""
        dtype = str(self.compute_dtype).removeprefix("torch.")
        return {
            "deter": Spec(dtype, (self.dyn.deter,)),
            "stoch": Spec("uint8", (self.dyn.stoch,), classes=self.dyn.classes),
        }

    def encode(
        self,
        obs: Tensors | Tensor,
        state: State | None = None,
        action: Tensors | Tensor | None = None,
        is_first: Tensor | None = None,
        noise: Noise | None = None,
        task: Tensor | None = None,
    ) -> State:
        """One filtering step.

        Args:
            obs: (B, ...) by key, or the bare tensor of the only key.
            state: previous state; None starts an episode.
            action: action executed since; None takes ``state.action``, the one that ``act`` chose. Without a
                state there was none.
            is_first: rows that start an episode. (B,) bool
            task: number of the task of each row, of a model of several; None = that of ``state``. (B,)
        """
        obs = self.obs_dict(obs)
        key, spec = next(iter(self.spaces.obs.items()))
        if obs[key].ndim != len(spec.shape) + 1:
            raise ValueError("encode takes one step (batch, ...), not a sequence")
        B = obs[key].shape[0]
        first = self.begins(is_first, state, B)
        task = self.task_of(state.task if task is None and state is not None else task, (B,))
        if state is None:
            state, action = self.initial(B), self.zero_action(B)
        elif (action := state.action if action is None else action) is None:
            raise ValueError("encode needs the action executed since `state`, which does not hold one itself")
        else:
            action = self.action_dict(action, B, unknown=True)
        dtype, keep = self.compute_dtype, (~first).unsqueeze(-1)
        flat = self.flat(action, task, dtype, ~first)
        stoch = state.stoch.to(dtype) * keep.unsqueeze(-1)  # type: ignore[union-attr]
        deter = self.dyn.step(State(state.deter.to(dtype) * keep, stoch), flat)
        logit = self.dyn.posterior(deter, self.enc(self.spread(obs, task)[0], dtype))
        race = self.source(noise).exponential("act/posterior", tuple(logit.shape))
        return State(deter, self.dyn.sample(logit, race, dtype), task=task)

    def act(
        self,
        obs: Tensors | Tensor,
        state: State | None = None,
        is_first: Tensor | None = None,
        mode: str = "eval",
        noise: Noise | None = None,
        planner: Planner | str | None = None,
        max_ms: float | None = None,
        task: Tensor | None = None,
    ) -> tuple[Tensors, State]:
        """Filter ``obs`` and sample an action of the policy, in ``eval`` too, as the reference does; or plan
        one. Actions (B, ...) by key; arguments as :meth:`WorldModel.act`'s; ``task`` as
        :meth:`encode`'s.
        """
        now, noise = self.encode(obs, state, None, is_first, noise, task), self.source(noise)
        found = self.search(now, state, is_first, mode, noise, planner, max_ms)
        if found is None:
            policy, plan = self.pol(self.feat(now), self.action_mask_of(now)), None
            if mode == "greedy":
                action = {k: dist.mode() for k, dist in policy.items()}
            else:
                action = sample_actions(policy, noise, "act/policy")
        else:
            action, plan = self.action_keys(found[0]), found[1]
        return action, State(now.deter, now.stoch, action, plan, now.task)

    def imagine(
        self,
        state: State,
        actions: Tensors | Tensor | None = None,
        horizon: int | None = None,
        noise: Noise | None = None,
    ) -> Trajectory:
        """Roll out given actions (B, H, ...), or the policy for ``horizon`` (or ``imag_length``) steps."""
        noise = self.source(noise)
        given = None if actions is None else self.action_dict(actions, len(state.deter), True, horizon)
        ahead = self.imag_length if horizon is None else whole("horizon", horizon)
        steps = next(iter(given.values())).shape[1] if given else ahead
        states, taken = [State(state.deter.to(self.compute_dtype), state.stoch)], []
        mask = self.action_mask_of(state)
        for t in range(steps):
            if given is None:
                action = sample_actions(self.pol(self.feat(states[-1]), mask), noise, "imagine/policy", t)
            else:
                action = {k: v[:, t] for k, v in given.items()}
            deter = self.dyn.step(states[-1], self.flat(action, state.task, self.compute_dtype))
            logit = self.dyn.prior(deter)
            race = noise.exponential("imagine/prior", tuple(logit.shape), t)
            states.append(State(deter, self.dyn.sample(logit, race, deter.dtype)))
            taken.append(action)
        stacked = State(
            torch.stack([s.deter for s in states], 1),
            torch.stack([s.stoch.to(s.deter.dtype) for s in states], 1),  # type: ignore[union-attr]
            task=None if state.task is None else state.task.unsqueeze(1).expand(-1, steps + 1),
        )
        rew, con = batched_heads(self.feat(stacked)[:, 1:], [self.rew, self.con])
        return Trajectory(
            States(stacked),
            {k: torch.stack([a[k] for a in taken], 1) for k in self.spaces.action},
            two_hot_mean(rew.softmax(-1), self.bins),
            con.squeeze(-1).sigmoid(),
        )

    def decode(self, state: State) -> Tensors:
        """Expected observations: images in 0 ... 1 in their stored layout, vectors in their own units, class
        indices.
        """
        out = self.dec(state.deter, state.stoch.to(state.deter.dtype).flatten(-2))  # type: ignore[union-attr]
        if self.task_spaces is not None:
            out = self.task_spaces.gather(out, state.task)
        out = greedy(out, self.spaces.obs)
        for k, spec in self.spaces.obs.items():
            if spec.is_image:
                out[k] = out[k].float().movedim(-1, -3) if spec.channels_first else out[k].float()
            elif not spec.is_discrete:
                out[k] = symexp(out[k])
        if self.normalizer is not None:
            out = self.normalizer.inverse(out)
            if self.task_spaces is not None:  # whose padding is zero in any units
                out = self.task_spaces.gather(self.task_spaces.spread(out, state.task)[0], state.task)
        return out

    def v(self, state: State) -> Tensor:
        """Critic's value. (...)"""
        return two_hot_mean(self.val(self.feat(state)).softmax(-1), self.bins)

    def q(self, state: State, action: Tensors | Tensor) -> Tensor:
        """reward + gamma * continue * value of the next imagined state. (B,)"""
        actions = {k: v.unsqueeze(1) for k, v in self.action_dict(action, len(state.deter)).items()}
        dream = self.imagine(state, actions)
        gamma = 1.0 if self.contdisc else 1 - 1 / self.horizon
        return dream.rewards[:, 0] + gamma * dream.continues[:, 0] * self.v(dream.states[-1])

    def gamma(self, task: Tensor | None = None) -> float:
        """Discount, 1 - 1/horizon."""
        return 1 - 1 / self.horizon

    def meanings_of(self, given: Mapping[str, Any]) -> dict[str, Meaning]:
        """Entries by name, but the decoder's images, which are in the environment's order; of several tasks
        the sizes of their vectors.
        """
        spaces = Spaces.from_plain(given["spaces"])
        o = SimpleNamespace(**arguments_of(DreamerV3Module, given, exact=False))
        sizes = dreamerv3_sizes(o.preset, **{k: getattr(o, k) for k in DREAMERV3["size200m"]})
        obs, action = dict(spaces.obs), spaces.action
        if len(tasks := list_tasks(o.tasks, None, spaces)[0]) > 1:
            places = Spec("float32", tuple(sorted({t.obs for t in tasks})))
            obs |= {k: places for k, s in obs.items() if s.dtype == "float32" and not s.is_discrete}
        vectors, images = ([k for k in obs if obs[k].is_image is image] for image in (False, True))
        table = {
            "vectors": Meaning(entries(obs, sorted(vectors)), ("enc.mlp0.weight",)),
            "images": Meaning(entries(obs, sorted(images)), ("enc.cnn0.weight",)),
            "decoded images": Meaning(entries(obs, images), ("dec.imgout.",)),
            "actions": Meaning(
                entries(action, sorted(action)), ("dyn.dynin2.weight", "ensemble.net.0.weight")
            ),
            "normalize": Meaning(bool(o.normalize), ("enc.mlp0.weight", "dec.vec.")),
            "squash": Meaning(o.squash, ("enc.mlp0.weight",)),
            "strided, outer": Meaning((o.strided, o.outer), ("enc.cnn", "dec.conv", "dec.imgout.")),
            "stoch, classes": Meaning((sizes["stoch"], sizes["classes"]), ("",)),
            "reward_scale": Meaning(float(o.reward_scale), ("rew.head.", "val.head.", "retnorm.")),
            "contdisc": Meaning(o.contdisc, ("con.head.",)),
        }
        for part, specs, keys in (("dec.vec", obs, vectors), ("pol.head", action, action)):
            for k in keys:  # the only one may have any name
                name = f"{part} {k if len(specs) > 1 else ''}".rstrip()
                table[name] = Meaning(entries({k: specs[k]}, [k]), (f"{part}.{module_key(k)}.",))
        return table

    def adapt_weights(self, found: Weights, task_like: str | None, partial: bool) -> Tensors:
        """The tensors of a file; embeddings only if its tasks are these."""
        given = found.hparams
        named = list_tasks(given.get("tasks"), None, Spaces.from_plain(given["spaces"]))[0] if given else []
        same = [t.name for t in named] == [t.name for t in self.tasks]
        return {k: v for k, v in found.tensors.items() if same or k != "task_spaces.embedding"}

    def zero_action(self, batch_size: int) -> Tensors:
        """Zeros of every action key."""
        return {
            k: torch.zeros(
                batch_size,
                *s.shape,
                dtype=torch.int64 if s.is_discrete else torch.float32,
                device=self.device,
            )
            for k, s in self.spaces.action.items()
        }


give_verbs(DreamerV3Module, DreamerV3)
