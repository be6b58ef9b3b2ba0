"""TD-MPC2 (Hansen, Su, Wang 2024, "TD-MPC2: Scalable, robust world models for continuous control").

Read top to bottom: :meth:`TDMPC2Module.training_step` is one gradient step, :meth:`TDMPC2.model_loss` and
:meth:`TDMPC2.policy_loss` are its two halves, and what they call follows. Acting plans through
:mod:`lit_wm.planners` with :meth:`TDMPC2.propose` and :meth:`TDMPC2.value`. Equal to the official code
(nicklashansen/tdmpc2) up to float32 rounding; ``docs/parity.md`` lists what is compared and every knowing
deviation.

Shapes, beside those of :mod:`lit_wm.types`: ``L`` latent, ``K`` critics, ``H`` steps of a training window and
of a plan, ``A`` flat action, ``N`` environments, ``S`` candidates of a plan. Inside the losses time is the
first axis, so that every step is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_wm.distributions import categorical_entropy, symlog_two_hot_loss, symlog_two_hot_mean
from lit_wm.errors import CheckpointError, ConfigError, NotSupported, nearest, whole
from lit_wm.functional import one_hot
from lit_wm.module import Pretraining, WorldModelModule, arguments_of, give_verbs
from lit_wm.nets.coders import discrete_one_hot
from lit_wm.nets.heads import flat_action
from lit_wm.nets.normed import Layers, PixelEncoder
from lit_wm.noise import Noise
from lit_wm.planners import Planner
from lit_wm.presets import TDMPC2 as TDMPC2_PRESETS
from lit_wm.presets import tdmpc2_sizes
from lit_wm.pretrained import Meaning, Weights, entries
from lit_wm.returns import gather_values
from lit_wm.tasks import action_masks, list_tasks
from lit_wm.types import Batch, Spaces, Spec, State, States, Tensors, Trajectory
from lit_wm.world_model import WorldModel

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class TDMPC2Module(WorldModelModule):
    """TD-MPC2 under a Lightning Trainer. Every default is the reference's value.

    Args:
        spaces: observation and action entries as a plain dict; linked from the data.
        preset: sizes of all networks, 1m ... 317m or debug (see ``lit-wm presets``).
        enc_dim: width of the state encoder; None = from the preset, here and below.
        mlp_dim: width of all other networks.
        latent_dim: size L of the latent state; of images what the encoder leaves, 512 for 64x64 pixels.
        num_enc_layers: layers of the state encoder.
        num_q: critics K.
        task_dim: size of a task's embedding.
        num_channels: of the pixel encoder.
        simnorm_dim: entries of a group of the latent state.
        dropout: of the critics' first layer.
        num_bins, vmin, vmax: bins of rewards and values, in symlog space.
        log_std_min, log_std_max: bounds of the policy's standard deviation.
        horizon: steps H of a plan and of a training window, which is ``data.batch_length - 1``.
        rho: weight of each further step of a window, relative to the one before.
        consistency_coef, reward_coef, value_coef, termination_coef: weights of the losses.
        entropy_coef: weight of the policy's entropy.
        bc_coef: weight, beside the scaled values, of the squared distance of the policy's mean from recorded
            actions (the cross-entropy, if they are discrete): behaviour cloning.
        reward_scale: factor on the rewards of the data; the model's rewards and values are in its units.
        tau: share of the new values in each update of the target critics and of the value scale.
        lr: learning rate.
        enc_lr_scale: factor on it for the encoder.
        grad_clip: largest norm of the gradients of the model, and of those of the policy.
        discount: gamma, of every task if it is a list; None = by the length of an episode: with
            f = length / ``discount_denom``, (f - 1) / f within ``discount_min`` ... ``discount_max``.
        discount_denom, discount_min, discount_max: see ``discount``. An environment without a time limit
            counts as one of 1,000 decisions.
        episodic: learn and plan with terminations; needed where episodes end by themselves.
        normalize: put vector observations into units of their mean and standard deviation in the training
            rows of ``data.sources``, which are stored with the weights.
        tasks: ``data`` for those that ``data.sources`` name, ``mt30``, ``mt80`` or a list of ``{name, obs,
            action, episode_length}``; None = one task.
        task: the one of ``tasks`` that the environment is; a name that is not there is a further task.
        task_like: the task whose embedding a further one begins with; None = small random numbers.
        start_from: checkpoint or run directory whose weights a new run begins with; all but a further task's
            embedding and the value scale.
        start_partial: take from it what fits by name, shape and meaning; else all has to.
        task_embedding_policy_grad: ``official`` adds what the policy loss says of the task embedding to the
            next update of the model, as the reference does; ``none`` leaves it out.
        planner: ``mppi``, ``cem``, ``gradient``, ``random``, or ``policy`` to act without planning.
        planner_options: merged over the planner's defaults, e.g. ``{num_samples: 256}``; ``policy`` has none
            and does not read them.
        train_world_model: False freezes encoder, dynamics, reward, termination and task embedding.
        train_actor: False freezes the policy.
        train_critic: False freezes the critics.
        pretrain: updates that come first, ``{world_model: n, actor: m}``: n of the world model alone, then m
            in which the policy learns too, by behaviour cloning.
        ensemble: networks that predict the next latent state, to notice where the data say little; 0 = none.
        disagreement: what planned steps and actions of the policy cost, in reward per unit of the ensemble's
            disagreement beyond its mean in the data, which is 1; below 0 it is a bonus for exploration
            (docs/offline.md).
        disagreement_limit: plans avoid steps where the disagreement is larger, and end before them;
            None = nowhere. Needs a planner: the policy does not learn in imagination.
        freeze: names of parts that are not trained, of encoder, dynamics, reward, termination,
            task_embedding, policy and critic.
        log_every: updates between two lines of metrics.
        seed: seed of the noise streams.
    """

    model: TDMPC2
    windows = "episode"  # what it learns from, see the data module
    of_rewards = ("reward", "value")

    def __init__(
        self,
        spaces: dict[str, Any],
        preset: str = "5m",
        enc_dim: int | None = None,
        mlp_dim: int | None = None,
        latent_dim: int | None = None,
        num_enc_layers: int | None = None,
        num_q: int | None = None,
        task_dim: int | None = None,
        num_channels: int = 32,
        simnorm_dim: int = 8,
        dropout: float = 0.01,
        num_bins: int = 101,
        vmin: float = -10.0,
        vmax: float = 10.0,
        log_std_min: float = -10.0,
        log_std_max: float = 2.0,
        horizon: int = 3,
        rho: float = 0.5,
        consistency_coef: float = 20.0,
        reward_coef: float = 0.1,
        value_coef: float = 0.1,
        termination_coef: float = 1.0,
        entropy_coef: float = 1e-4,
        bc_coef: float = 0.0,
        reward_scale: float = 1.0,
        tau: float = 0.01,
        lr: float = 3e-4,
        enc_lr_scale: float = 0.3,
        grad_clip: float = 20.0,
        discount: float | list[float] | None = None,
        discount_denom: float = 5.0,
        discount_min: float = 0.95,
        discount_max: float = 0.995,
        episodic: bool = False,
        normalize: bool = False,
        tasks: str | list[dict[str, Any]] | None = None,
        task: str | None = None,
        task_like: str | None = None,
        start_from: str | None = None,
        start_partial: bool = False,
        task_embedding_policy_grad: str = "official",
        planner: str = "mppi",
        planner_options: dict[str, Any] | None = None,
        train_world_model: bool = True,
        train_actor: bool = True,
        train_critic: bool = True,
        pretrain: dict[str, int] | None = None,
        ensemble: int = 0,
        disagreement: float = 0.0,
        disagreement_limit: float | None = None,
        freeze: list[str] | None = None,
        log_every: int = 100,
        seed: int = 0,
    ):
        super().__init__(log_every=log_every, seed=seed)
        self.save_hyperparameters()
        options = arguments_of(TDMPC2Module, self.hparams, exact=False)
        sizes = tdmpc2_sizes(preset, tasks, **{k: options[k] for k in (*TDMPC2_PRESETS["5m"], "task_dim")})
        self.model = TDMPC2(Spaces.from_plain(spaces), **options | sizes)
        for name, value in {"lr": lr, "enc_lr_scale": enc_lr_scale, "grad_clip": grad_clip}.items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"model.{name} is {value}; expected more than 0")
        self.grad_clip, self.episodic = grad_clip, episodic
        self.groups = self.freeze_parts(
            freeze, world_model=train_world_model, actor=train_actor, critic=train_critic
        )
        self.trained = {"model": self.groups["world_model"] or self.groups["critic"]}
        self.trained |= {"policy": self.groups["actor"]} | ({"ensemble": True} if ensemble else {})
        self.pretraining = Pretraining.of(pretrain, self.groups, bool(bc_coef))

    @classmethod
    def from_official(cls, path: str | Path, **overrides: Any) -> TDMPC2Module:
        """A checkpoint of the official code (either of its formats) as a module of ours.

        Args:
            path: the file.
            overrides: arguments of the module that the file does not know, e.g. ``tasks`` or ``discount``.

        Raises:
            CheckpointError: for a damaged file or one of other networks.
        """
        from lit_wm.convert.official_tdmpc2 import module_from_official

        return module_from_official(path, **overrides)

    def setup(self, stage: str) -> None:
        """Beside what all modules do, ask which of several tasks the environment is, and for plans to end."""
        super().setup(stage)
        if stage == "fit" and self.model.disagreement_limit is not None and self.model.planner is None:
            raise ConfigError(
                "model.disagreement_limit ends plans, and model.planner: policy makes none: here it has no "
                "effect\nUse a planner, or model.disagreement, which the policy learns from"
            )
        env = getattr(getattr(self.trainer, "datamodule", None), "env", None)
        if self.model.tasks and self.model.task_index is None and env:
            raise ConfigError(f"model.tasks names several: say with model.task which one {env} is")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Model (the encoder at its own rate), policy, and the ensemble if there is one."""
        lr, encoder = self.hparams["lr"], list(self.model.encoder.parameters())
        rest = [p for p in self.model.group("model") if all(p is not q for q in encoder)]
        groups = [{"params": encoder, "lr": lr * self.hparams["enc_lr_scale"]}, {"params": rest}]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(groups, lr=lr, fused=True),
            torch.optim.Adam(self.model.group("policy"), lr=lr, eps=1e-5, fused=True),
        ]
        if self.model.ensemble is not None:
            optimizers.append(torch.optim.Adam(self.model.ensemble.parameters(), lr=lr, fused=True))
        return optimizers

    @property
    def window_steps(self) -> int:
        """Steps of a training window."""
        return self.model.horizon + 1

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One gradient step: the model's, then the policy's against the new critics, then the target critics.

        Args:
            batch: a :class:`Batch` of H + 1 steps, or a ticket that draws one (collecting as needed).
        """
        batch = self.draw(batch)
        learning = self.learning()  # all groups, but for the first updates of a run that pretrains
        # The model chooses each dtype itself; the Trainer's autocast would round what is meant to stay
        # float32.
        with torch.autocast(self.device.type, enabled=False):
            out = self.model.model_loss(batch, self.noise, learning)
            metrics = out.metrics
            if self.trained["model"]:
                metrics["opt/grad_norm"] = self.optimise(out.total, "model")  # backward, clip, Adam
            if learning["actor"]:
                policy_loss, more = self.model.policy_loss(
                    out.zs, batch.task, self.noise, batch, self.phase == "actor"
                )
                metrics |= more | {"opt/pi_grad_norm": self.optimise(policy_loss, "policy")}
            if self.model.ensemble is not None:
                loss, metrics["disagreement/data"] = self.model.ensemble_loss(batch, out)
                metrics["loss/ensemble"] = loss.detach()
                self.optimise(loss, "ensemble")
        metrics |= self.by_source(batch, out.rows)
        if learning["critic"]:
            self.model.update_target()
        self.finish_update(metrics)

    def held_out_losses(self, batch: Batch, noise: Noise) -> Tensors:
        """Mean losses of the model and the critics on a batch that is not trained on, by name."""
        return self.model.model_loss(batch, noise).losses

    def rank_state_dict(self) -> dict[str, Any]:
        """Beside the noise what the last policy loss left for the next step of the task embedding."""
        left = self.model.task_embedding.weight.grad if self.model.tasks else None
        return super().rank_state_dict() | {"task_grad": None if left is None else left.cpu()}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`rank_state_dict`."""
        super().load_rank_state_dict(state)
        if state["task_grad"] is not None and self.model.task_embedding.weight.requires_grad:
            self.model.task_embedding.weight.grad = state["task_grad"].to(self.device)


@dataclass
class ModelLoss:
    """What :meth:`TDMPC2.model_loss` returns: the total to differentiate and what it was made of."""

    total: Tensor
    losses: Tensors  # scalars, not weighted
    metrics: Tensors  # scalars on the device
    zs: Tensor  # (H+1, B, L), with autograd
    next_z: Tensor  # (H, B, L), encoded
    td_target: Tensor  # (H, B)
    rows: Tensors  # (B,) the losses of each window, without rho
    emb: Tensor | None  # (B, T) of the task, with autograd


class Policy(NamedTuple):
    """What the policy says of some latent states."""

    action: Tensor  # (..., A) a sample; one-hot if actions are discrete
    mean: Tensor  # (..., A) in -1 ... 1; the likeliest class, one-hot
    entropy: Tensor  # (...) of the sample
    scaled_entropy: Tensor  # (...) what the loss rewards
    log_std: Tensor | None = None  # (..., A)
    probs: Tensor | None = None  # (..., A) of the classes


class TDMPC2(WorldModel):
    """The networks, the losses and the verbs, free of Lightning. Arguments and defaults are those of
    :class:`TDMPC2Module`; sizes must be given.

    Actions are vectors in -1 ... 1, or one discrete entry, which is an extension of ours: a categorical
    policy whose loss is the exact expectation over the classes, and one-hot vectors everywhere else.
    """

    decodes = False
    policy_part, critic_part, slow_part = "policy", "critic", "target_critic"
    anew = ("scale", "action_mask")  # of this run and of this configuration

    def __init__(self, spaces: Spaces, **options: Any):
        super().__init__(spaces, options.get("normalize", False))
        o = SimpleNamespace(**arguments_of(TDMPC2Module, options))
        self.latent_dim, self.simnorm_dim, self.dropout = o.latent_dim, o.simnorm_dim, o.dropout
        self.vmin, self.vmax, self.log_std_min, self.log_std_max = (
            o.vmin,
            o.vmax,
            o.log_std_min,
            o.log_std_max,
        )
        self.horizon, self.entropy_coef, self.tau = o.horizon, o.entropy_coef, o.tau
        self.coefs = {"consistency": o.consistency_coef, "reward": o.reward_coef, "value": o.value_coef}
        self.coefs |= {"termination": o.termination_coef} if o.episodic else {}
        self.episodic = o.episodic
        self.bc_coef, self.reward_scale = o.bc_coef, o.reward_scale
        inf = float("inf")
        coefs = (*self.coefs, "termination", "entropy", "bc")
        bounds = dict.fromkeys([f"{k}_coef" for k in coefs], (0.0, inf)) | {
            "horizon": (1, inf), "num_q": (2, inf), "num_bins": (2, inf), "num_channels": (1, inf),
            "simnorm_dim": (2, inf), "dropout": (0.0, 0.99), "tau": (0.0, 1.0), "rho": (0.0, 1.0),
            "reward_scale": (1e-9, inf),
            "discount_denom": (1e-6, inf), "discount_min": (0.0, o.discount_max), "discount_max": (0.0, 1.0),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            value = getattr(o, name)
            whole = isinstance(least, int) and not isinstance(value, int)
            if whole or isinstance(value, bool) or not least <= value <= most or value == inf:
                kind = "a whole number" if isinstance(least, int) else "a number"
                raise ConfigError(f"model.{name} is {value}; expected {kind} of {least} to {most}")
        if not o.vmin < o.vmax or not o.log_std_min < o.log_std_max:
            raise ConfigError("model.vmin and log_std_min must be below vmax and log_std_max")
        if o.task_embedding_policy_grad not in ("official", "none"):
            raise ConfigError(
                f"model.task_embedding_policy_grad is {o.task_embedding_policy_grad!r}; expected 'official' "
                "or 'none'"
            )
        self.task_embedding_policy_grad = o.task_embedding_policy_grad
        self.image_keys = [k for k, s in spaces.obs.items() if s.is_image]
        self._check_spaces()

        # Tasks: sizes are those of the largest, the others are filled up with zeros.
        self.tasks, self.task_index = list_tasks(o.tasks, o.task, spaces)
        own = sum(s.size for s in spaces.obs.values()), sum(s.size for s in spaces.action.values())
        self.obs_dim, self.action_dim = own
        if self.tasks:
            if self.image_keys or o.episodic or self.discrete:
                raise ConfigError(
                    "several tasks (model.tasks) go with vector observations, continuous actions and "
                    "episodic: false; the reference has no other"
                )
            largest = max(t.obs for t in self.tasks), max(t.action for t in self.tasks)
            fits = [largest] if self.task_index is None else [self.tasks[self.task_index][1:3], largest]
            if own not in fits:
                sizes = " or ".join(f"{obs} and {action}" for obs, action in fits)
                raise ConfigError(
                    f"the data has {own[0]} observed numbers and {own[1]} action numbers; expected {sizes}, "
                    f"as {f'the task {o.task} or ' if o.task else ''}the largest of model.tasks\n"
                    "Say with model.task which task it is or a new name, or fill the data up to the largest"
                )
            self.obs_dim, self.action_dim = largest
            self.task_embedding = nn.Embedding(len(self.tasks), o.task_dim)
            nn.init.uniform_(self.task_embedding.weight, -0.02, 0.02)
            self.register_buffer("action_mask", action_masks(self.tasks))
        lengths = [t.episode_length for t in self.tasks] or [spaces.episode_length or 1000]
        gammas = [min(max(1 - o.discount_denom / n, o.discount_min), o.discount_max) for n in lengths]
        if o.discount is not None:
            gammas = o.discount if isinstance(o.discount, list) else [o.discount] * len(lengths)
        if len(gammas) != len(lengths) or not all(0 <= g <= 1 and g is not True for g in gammas):
            raise ConfigError(
                f"model.discount is {o.discount}, discount_min {o.discount_min} and discount_max "
                f"{o.discount_max}; expected numbers of 0 to 1, one or {len(lengths)} for the tasks"
            )
        self.gammas = gammas
        discounts = torch.tensor(gammas, dtype=torch.float32)
        self.register_buffer("discount", discounts if self.tasks else discounts[0], persistent=False)

        T = o.task_dim if self.tasks else 0
        L, A, M = o.latent_dim, self.action_dim, o.mlp_dim
        if L % o.simnorm_dim:
            raise ConfigError(f"model.latent_dim is {L}; expected a multiple of simnorm_dim, {o.simnorm_dim}")
        if self.image_keys:
            self.encoder: nn.Module = self._pixel_encoder(o.num_channels)
        else:
            hidden = [o.enc_dim] * max(o.num_enc_layers - 1, 1)
            self.encoder = Layers(self.obs_dim + T, *hidden, L, act="simnorm", width=o.simnorm_dim)
        self.dynamics = Layers(L + T + A, M, M, L, act="simnorm", width=o.simnorm_dim)
        self.reward = Layers(L + T + A, M, M, o.num_bins, zero=True)
        if o.episodic:
            self.termination = Layers(L, M, M, 1)
        self.policy = Layers(L + T, M, M, A if self.discrete else 2 * A)
        self.critic = Layers(L + T + A, M, M, o.num_bins, members=o.num_q, zero=True)
        self.target_critic = Layers(L + T + A, M, M, o.num_bins, members=o.num_q, zero=True)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("bins", torch.linspace(o.vmin, o.vmax, o.num_bins), persistent=False)
        self.register_buffer("percentiles", torch.tensor([0.05, 0.95]), persistent=False)
        self.register_buffer("rhos", o.rho ** torch.arange(o.horizon + 1.0), persistent=False)
        self.planner = self.planner_of(o.planner, o.planner_options)
        self.meanings = self.meanings_of(options | {"spaces": spaces})
        # Last, so that nothing above depends on whether there is one.
        self.ensemble = self.make_ensemble(o, L + T + A, L, M)

    bins: Tensor
    scale: Tensor
    discount: Tensor
    percentiles: Tensor
    rhos: Tensor
    action_mask: Tensor

    def _check_spaces(self) -> None:
        obs = self.spaces.obs
        if self.image_keys and len(self.image_keys) < len(obs):
            others = sorted(obs.keys() - set(self.image_keys))
            raise ConfigError(
                f"TD-MPC2 encodes vectors or images, not both: {self.image_keys} and {others}\n"
                "Leave some out: data.env_options.drop: [NAME], of datasets 'URI?drop=NAME,NAME'"
            )
        _ = self.discrete  # refuses actions that cannot be searched

    def _pixel_encoder(self, channels: int) -> PixelEncoder:
        """The encoder of images, if its output has the size of the latent state."""
        sizes = {k: self.spaces.obs[k].hwc for k in self.image_keys}
        if len({s[:2] for s in sizes.values()}) > 1:
            raise ConfigError(f"images must share one height and width, got {sizes}")
        height, width, _ = next(iter(sizes.values()))
        h, w = PixelEncoder.feature_map(height, width)
        there, cells = min(h, w) > 0, h * w
        if not there or channels * cells != self.latent_dim:
            left = f"{channels} x {h} x {w} = {channels * cells} numbers" if there else "nothing"
            fits = f"{self.latent_dim // cells}" if there and self.latent_dim % cells == 0 else ""
            others = [k for k, v in TDMPC2_PRESETS.items() if v["latent_dim"] == channels * cells]
            raise ConfigError(
                f"the pixel encoder leaves {left} of {height}x{width} images, model.latent_dim is "
                f"{self.latent_dim}; they must be equal\n"
                + (f"Use model.num_channels: {fits}, or " if fits else "Use ")
                + (f"model.latent_dim: {channels * cells}" if there else "at least 47x47 pixels")
                + f", or the size {' or '.join(others)}" * (there and bool(others))
            )
        return PixelEncoder((sum(s[2] for s in sizes.values()), height, width), channels, self.simnorm_dim)

    @property
    def planner_defaults(self) -> dict[str, Any]:
        """It looks as far ahead as it was trained to."""
        return {"horizon": self.horizon}

    def group(self, name: str) -> list[nn.Parameter]:
        """Parameters of ``model`` (all that the first optimizer steps), ``policy`` or ``ensemble``."""
        if name == "ensemble" and self.ensemble is not None:
            return list(self.ensemble.parameters())
        if name == "policy":
            return list(self.policy.parameters())
        apart = [m for m in (self.policy, self.target_critic, self.ensemble) if m is not None]
        others = {id(p) for m in apart for p in m.parameters()}
        return [p for p in self.parameters() if id(p) not in others]

    # --- The losses, in the paper's order -----------------------------------------------------------

    def model_loss(self, batch: Batch, noise: Noise, trained: dict[str, bool] | None = None) -> ModelLoss:
        """Latent consistency, rewards, values and terminations of one batch at the current weights.

        Args:
            batch: (B, H+1) steps of which none but the last ends an episode.
            noise: streams ``shift/next``, ``shift/first``, ``td/policy``, ``td/q``, ``dropout/model``.
            trained: whether ``world_model`` and ``critic`` learn; None = both.
        """
        trained = trained or {"world_model": True, "critic": True}
        obs = self.observations(self.normalized(batch.obs))
        action = self.actions(batch.prev_action)
        obs, action = obs.transpose(0, 1), action[:, 1:].transpose(0, 1)  # (H+1, B, ...), (H, B, A)
        reward = batch.reward[:, 1:].T * self.reward_scale  # (H, B)
        terminated = batch.is_terminal[:, 1:].T.float()  # (H, B)
        H, B = reward.shape
        if self.horizon != H:
            raise ConfigError(
                f"data.batch_length is {H + 1}; expected {self.horizon + 1}, one more than model.horizon"
            )
        world_model, critic = trained["world_model"], trained["critic"]
        task = self.task_of(batch.task, B)
        with torch.set_grad_enabled(world_model and torch.is_grad_enabled()):
            emb = self.embed(task, training=True)  # (B, T)

        # 1. What the steps lead to: encoded latents, and the values that they promise --------------------
        with torch.no_grad():
            next_z = self.latents(obs[1:], emb, noise, "shift/next")  # (H, B, L)
            td_target = self.td_target(next_z, reward, terminated, task, emb, noise)  # (H, B)

        # 2. What the model foresees: a roll-out in latent space ------------------------------------------
        with torch.set_grad_enabled(world_model and torch.is_grad_enabled()):
            z = self.latents(obs[0], emb, noise, "shift/first")  # (B, L)
            steps = [z]
            for t in range(H):
                z = self.dynamics(self.inputs(z, emb, action[t]))
                steps.append(z)
            zs = torch.stack(steps)  # (H+1, B, L)
        known = self.inputs(zs[:-1], emb, action).flatten(0, 1)  # (H*B, L+T+A)

        # 3. Losses; a step counts rho times the one before ------------------------------------------------
        rho = self.rhos[:-1].unsqueeze(1)  # (H, 1)
        losses: Tensors = {}
        metrics: Tensors = {}
        rows: Tensors = {}
        if world_model:
            # Means over the batch, sums over time.
            missed = (zs[1:] - next_z).square().mean(-1)  # (H, B)
            if batch.fake is not None:  # copied observations, which no dynamics leads to
                missed = missed.masked_fill(batch.fake[:, 1:].T, 0.0)
            rows["consistency"] = missed.mean(0)
            losses["consistency"] = (rho * missed).mean()
            reward_logits = self.reward(known).view(H, B, -1)
            reward_loss = symlog_two_hot_loss(reward_logits, reward, self.vmin, self.vmax)
            if batch.rewarded is not None:
                reward_loss = reward_loss * batch.rewarded
            losses["reward"] = (rho * reward_loss).mean()
            rows["reward"] = reward_loss.mean(0)
            if self.episodic:
                logit = self.termination(zs[1:].to(self.compute_dtype)).squeeze(-1)  # (H, B)
                losses["termination"] = F.binary_cross_entropy_with_logits(logit, terminated)
                metrics |= termination_metrics(logit.detach()[-1], terminated[-1])
        if critic:
            keep = self.dropout_of(noise, "dropout/model", known, len(self.critic.first.weight))
            q_logits = self.critic(known, keep).unflatten(1, (H, B))  # (K, H, B, bins)
            value_loss = symlog_two_hot_loss(q_logits, td_target, self.vmin, self.vmax)
            if batch.rewarded is not None:
                value_loss = value_loss * batch.rewarded
            losses["value"] = (rho * value_loss).mean()
            rows["value"] = value_loss.mean((0, 1))
        total = torch.stack([zs.new_zeros(()), *(self.coefs[k] * v for k, v in losses.items())]).sum()
        metrics |= {f"loss/{k}": v.detach() for k, v in losses.items()} | {"opt/loss": total.detach()}
        return ModelLoss(total, losses, metrics, zs, next_z, td_target, rows, emb)

    def td_target(
        self, next_z: Tensor, reward: Tensor, terminated: Tensor, task: Tensor | None, emb: Tensor | None,
        noise: Noise,
    ) -> Tensor:  # fmt: skip
        """r + gamma (1 - terminated) min of two target critics at an action of the policy. (H, B)"""
        pi = self.pi(next_z, emb, task, self.policy_noise(noise, "td/policy", next_z.shape[:-1]))
        x = self.inputs(next_z, emb, pi.action).flatten(0, 1)
        value = self.drawn_values(self.target_critic, x, noise, "td/q").amin(0)
        value = (value - self.penalty(x)).view(reward.shape)
        return reward + self.gamma(task) * (1 - terminated) * value

    def policy_loss(
        self,
        zs: Tensor,
        task: Tensor | None,
        noise: Noise,
        batch: Batch | None = None,
        cloning: bool = False,
    ) -> tuple[Tensor, Tensors]:
        """-(Q / scale + entropy) of the policy at the latents of the model's roll-out.

        Args:
            zs: (H+1, B, L); no gradient reaches them, nor the critics.
            noise: streams ``policy``, ``policy/q``, ``dropout/policy``.
            batch: its actions are imitated, with ``bc_coef``.
            cloning: imitate them and do nothing else.
        """
        zs = zs.detach()
        steps, B = zs.shape[:2]
        task = self.task_of(task, B)
        emb = self.embed(task, training=True)
        if emb is not None and self.task_embedding_policy_grad == "none":
            emb = emb.detach()
        pi = self.pi(zs, emb, task, self.policy_noise(noise, "policy", zs.shape[:-1]))
        if cloning:
            loss = self.cloning_loss(pi, batch)  # type: ignore[arg-type]
            return loss, {"loss/bc": loss.detach()}
        if pi.probs is None:
            x = self.inputs(zs, emb, pi.action).flatten(0, 1)
            q = self.drawn_values(self.critic, x, noise, "policy/q", "dropout/policy").mean(0)
            q = (q - self.penalty(x)).view(steps, B)
        else:  # every class, weighted by its probability
            classes = torch.eye(self.action_dim, device=zs.device).expand(steps, B, -1, -1)
            each = zs.unsqueeze(2).expand(-1, -1, self.action_dim, -1)
            x = self.inputs(each, None, classes).flatten(0, 2)
            values = self.drawn_values(self.critic, x, noise, "policy/q", "dropout/policy").mean(0)
            values = values - self.penalty(x)
            q = (pi.probs * values.view(steps, B, -1)).sum(-1)
        self.update_scale(q[0])
        gain = q / self.scale + self.entropy_coef * pi.scaled_entropy  # (H+1, B)
        loss = -(self.rhos * gain.mean(1)).mean()
        metrics = {"loss/policy": loss.detach(), "pi/entropy": pi.entropy.detach().mean()}
        metrics |= {"pi/scaled_entropy": pi.scaled_entropy.detach().mean(), "pi/scale": self.scale[0].clone()}
        if self.bc_coef and batch is not None:
            imitation = self.cloning_loss(pi, batch)
            loss, metrics["loss/bc"] = loss + self.bc_coef * imitation, imitation.detach()
        return loss, metrics

    def cloning_loss(self, pi: Policy, batch: Batch) -> Tensor:
        """Distance of the policy at the latents of a window from the actions recorded there, of datasets
        where the batch holds other rows too.
        """
        action = self.actions(batch.prev_action)[:, 1:].transpose(0, 1)  # (H, B, A)
        if pi.probs is None:
            missed = (pi.mean[:-1] - action).square().sum(-1)
        else:
            missed = -(pi.probs[:-1].clamp(min=1e-9).log() * action).sum(-1)
        if batch.recorded is not None:
            missed = missed * batch.recorded
        return (self.rhos[:-1].unsqueeze(1) * missed).mean()

    def ensemble_loss(self, batch: Batch, out: ModelLoss) -> tuple[Tensor, Tensor]:
        """Loss of the ensemble, which predicts the encoded latents one step ahead, and its mean
        disagreement.
        """
        z = torch.cat([out.zs[:1], out.next_z[:-1]]).detach()  # (H, B, L)
        emb = None if out.emb is None else out.emb.detach()  # embedding anew would shorten what is kept
        action = self.actions(batch.prev_action)[:, 1:].transpose(0, 1)
        keep = torch.ones_like(z[..., 0]) if batch.fake is None else ~batch.fake[:, 1:].T
        x = self.inputs(z, emb, action)
        return self.ensemble.loss(x, out.next_z, keep)  # type: ignore[union-attr]

    def penalty(self, x: Tensor) -> Tensor | float:
        """What the ensemble's disagreement about a state and an action costs, see :meth:`inputs`. (...)"""
        if self.ensemble is None or not self.disagreement:
            return 0.0
        return self.price(self.ensemble.disagreement(x))

    @torch.no_grad()
    def update_scale(self, q: Tensor) -> None:
        """Move the scale towards the range from the 5th to the 95th percentile of ``q``, at least 1."""
        low, high = torch.quantile(gather_values(q), self.percentiles)
        self.scale.lerp_((high - low).clamp(min=1.0).view(1), self.tau)

    @torch.no_grad()
    def update_target(self) -> None:
        """target <- target + tau (critic - target)."""
        torch._foreach_lerp_(list(self.target_critic.parameters()), list(self.critic.parameters()), self.tau)

    # --- The networks on latents --------------------------------------------------------------------

    def inputs(self, *parts: Tensor | None) -> Tensor:
        """The parts that there are, side by side in the compute dtype; shorter ones at every step."""
        there = [p for p in parts if p is not None]
        lead = there[0].shape[:-1]
        return torch.cat([p.expand(*lead, p.shape[-1]).to(self.compute_dtype) for p in there], -1)

    def latents(self, obs: Tensor, emb: Tensor | None, noise: Noise, stream: str) -> Tensor:
        """Flat observations (..., O) or images (..., C, H, W) -> latent states (..., L)."""
        if not self.image_keys:
            return self.encoder(self.inputs(obs, emb))
        lead = obs.shape[:-3]
        shifts = noise.uniform(stream, (*lead, 1, 1, 2)).view(-1, 2)
        return self.encoder(obs.reshape(-1, *obs.shape[-3:]), shifts, self.compute_dtype).view(*lead, -1)

    def pi(self, z: Tensor, emb: Tensor | None, task: Tensor | None, eps: Tensor) -> Policy:
        """The policy at latent states (..., L).

        Args:
            eps: standard normal noise, or exponential noise if actions are discrete. (..., A)
        """
        out = self.policy(self.inputs(z, emb))
        if self.discrete:
            log_p = torch.log_softmax(out, -1)
            probs = log_p.exp()
            sample, best = (probs.detach() / eps).argmax(-1), probs.argmax(-1)
            entropy = categorical_entropy(probs, log_p)
            action, mode = one_hot(sample, self.action_dim), one_hot(best, self.action_dim)
            return Policy(action, mode, entropy, entropy, probs=probs)
        mean, raw = out.chunk(2, -1)
        log_std = self.log_std_min + 0.5 * (self.log_std_max - self.log_std_min) * (raw.tanh() + 1)
        size: Tensor | int = self.action_dim
        if task is not None:
            mask = self.action_mask[task]
            mean, log_std, eps, size = mean * mask, log_std * mask, eps * mask, mask.sum(-1)
        gauss = (-0.5 * eps.square() - log_std - LOG_SQRT_2PI).sum(-1)
        action = torch.tanh(mean + eps * log_std.exp())
        log_prob = gauss - torch.log(F.relu(1 - action.square()) + 1e-6).sum(-1)
        # -size * gauss but for rounding; written, and differentiated, as the reference does, except at its
        # pole: there one sample with log_prob ~ 1e-7 has ten thousand times the gradient of a whole batch.
        near = log_prob.masked_fill(log_prob.abs() < 1e-3, 1e-3)
        scaled = -near * (size * gauss / (near + 1e-8))
        return Policy(action, mean.tanh(), -log_prob, scaled, log_std=log_std)

    def policy_noise(self, noise: Noise, stream: str, lead: tuple[int, ...], t: int = 0) -> Tensor:
        """What :meth:`pi` needs for a sample. (*lead, A)"""
        draw = noise.exponential if self.discrete else noise.normal
        return draw(stream, (*lead, self.action_dim), t)

    def drawn_values(
        self, critics: Layers, x: Tensor, noise: Noise, stream: str, dropout: str | None = None, t: int = 0
    ) -> Tensor:
        """Values of two critics drawn for all rows, in whose parameters no gradient is wanted. (2, N)

        Only these two are evaluated; the reference evaluates all and picks.
        """
        drawn = noise.uniform(stream, (len(critics.first.weight),), t).argsort()[:2]
        keep = self.dropout_of(noise, dropout, x, 2) if dropout else None
        return symlog_two_hot_mean(critics.chosen(drawn, x, keep), self.bins)

    def dropout_of(self, noise: Noise, stream: str, x: Tensor, members: int) -> Tensor | None:
        """Factors on the first layer's outputs, for each member and row. (members, N, M)"""
        if not self.dropout:
            return None
        u = noise.uniform(stream, (members, x.shape[0], self.critic.first.weight.shape[1]))
        return (u >= self.dropout).to(x.dtype).mul_(1 / (1 - self.dropout))

    def gamma(self, task: Tensor | None) -> Tensor:
        """Discount, of each row of a multi-task batch."""
        return self.discount if task is None else self.discount[task]

    # --- Inputs -------------------------------------------------------------------------------------

    def observations(self, obs: Tensors) -> Tensor:
        """All keys in one row in the environment's order, filled up with zeros to the largest task (..., O);
        or all images (..., C, H, W).
        """
        if self.image_keys:
            images = []
            for k in self.image_keys:
                images.append(obs[k] if self.spaces.obs[k].channels_first else obs[k].movedim(-1, -3))
            return images[0] if len(images) == 1 else torch.cat(images, -3)
        parts = []
        for k, spec in self.spaces.obs.items():
            if spec.is_discrete:
                parts.append(discrete_one_hot(obs[k], spec, torch.float32))
            else:
                lead = obs[k].shape[: obs[k].ndim - len(spec.shape)]
                parts.append(obs[k].float().reshape(*lead, -1))
        flat = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        missing = self.obs_dim - flat.shape[-1]
        return F.pad(flat, (0, missing)) if missing else flat

    def actions(self, actions: Tensors) -> Tensor:
        """All keys in one row, discrete ones one-hot, filled up with zeros to the largest task. (..., A)"""
        flat = flat_action(actions, self.spaces.action, torch.float32)
        return (
            F.pad(flat, (0, self.action_dim - flat.shape[-1])) if flat.shape[-1] < self.action_dim else flat
        )

    def task_of(self, task: Tensor | None, rows: int) -> Tensor | None:
        """Task of each row: that of the data, or the environment's; None with a single task. (rows,)"""
        if not self.tasks:
            return None
        if task is not None:
            return task.to(self.device, torch.int64)
        if self.task_index is None:
            raise ConfigError(
                f"this model has {len(self.tasks)} tasks: say which, by model.task or the argument `task`"
            )
        return torch.full((rows,), self.task_index, device=self.device)

    def embed(self, task: Tensor | None, training: bool = False) -> Tensor | None:
        """Task embeddings (rows, T). Those longer than 1 are shortened in place, as the reference does; in
        ``training`` those of all processes, so that their weights stay equal.
        """
        if task is None:
            return None
        weight, rows = self.task_embedding.weight, gather_values(task).long() if training else task
        if not weight.requires_grad:  # frozen: what is used is shortened, what is kept is not
            weight = weight.clone()
        torch.embedding_renorm_(weight.detach(), rows, 1.0, 2.0)
        return F.embedding(task, weight)

    # --- What planners need -------------------------------------------------------------------------

    def action_mask_of(self, state: State) -> Tensor | None:
        """1 for the action entries that the task has. (N, A)"""
        return None if state.task is None else self.action_mask[state.task]

    def propose(self, state: State, n: int, horizon: int, noise: Noise) -> Tensor:
        """Roll out the policy ``n`` times from each state. (N, n, H, A)"""
        z, task = state.deter.repeat_interleave(n, 0), state.task
        task = None if task is None else task.repeat_interleave(n, 0)
        emb, actions = self.embed(task), []
        for t in range(horizon):
            lead = (len(state.deter), n)
            eps = self.policy_noise(noise, "plan/propose", lead, t).flatten(0, 1)
            actions.append(self.pi(z, emb, task, eps).action)
            if t < horizon - 1:
                z = self.dynamics(self.inputs(z, emb, actions[-1]))
        return torch.stack(actions, 1).view(len(state.deter), n, horizon, -1)

    def value(
        self, state: State, actions: Tensor, noise: Noise, t: int = 0, deterministic: bool = False
    ) -> Tensor:
        """Predicted return of sequences of actions: discounted rewards, and the value of where they end.

        Args:
            state: where all sequences of a row start. (N, L)
            actions: (N, S, H, A).
            noise: streams ``plan/terminal`` and ``plan/q``; ``t`` is the planner's iteration.
            deterministic: differentiable in the actions: the policy's mean, all critics, and terminations as
                probabilities; else a sampled action, two critics and a yes or no.

        Returns:
            (N, S)
        """
        N, S, H, A = actions.shape
        a = actions.permute(2, 0, 1, 3).reshape(H, N * S, A).to(self.compute_dtype)
        emb, task, gamma = self.embed(state.task), state.task, self.gamma(state.task)
        if task is not None:
            gamma = gamma.repeat_interleave(S)
            task = task.repeat_interleave(S)
        # The first layers of reward and dynamics by the parts of their input: what does not differ between
        # candidates (the start, the task) is multiplied once.
        L, parts = self.latent_dim, []
        for net in (self.reward, self.dynamics):
            weight, bias = (p.to(self.compute_dtype) for p in (net.first.weight, net.first.bias))
            if emb is not None:
                bias = F.linear(emb.to(self.compute_dtype), weight[:, L:-A], bias)
            parts.append((net, weight[:, :L], weight[:, -A:], bias.view(-1, 1, len(weight))))
        rows = None if emb is None else emb.repeat_interleave(S, 0)

        def value_at(z: Tensor, t: int, stream: str = "plan") -> Tensor:
            """Value of latent states (N*S, L) at the policy's action."""
            if deterministic:
                pi = self.pi(z, rows, task, torch.ones_like(a[0], dtype=torch.float32))
                x = self.inputs(z, rows, pi.mean)
                values = symlog_two_hot_mean(self.critic(x), self.bins).mean(0)
            else:
                eps = self.policy_noise(noise, f"{stream}/terminal", (N, S), t).flatten(0, 1)
                x = self.inputs(z, rows, self.pi(z, rows, task, eps).action)
                values = self.drawn_values(self.critic, x, noise, f"{stream}/q", t=t).mean(0)
            return values - self.penalty(x)

        z, total = state.deter, a.new_zeros((), dtype=torch.float32)
        discount = lives = within = torch.ones_like(total)  # within: before the limit of the disagreement
        beyond = torch.zeros_like(total)
        for step in range(H):
            z, out, cost = z.to(self.compute_dtype), [], torch.zeros_like(total)
            if self.doubts:
                here = z if step else z.repeat_interleave(S, 0)
                x = self.inputs(here, rows, a[step])
                doubt = self.ensemble.disagreement(x)  # type: ignore[union-attr]
                cost = self.price(doubt)
                if self.disagreement_limit is not None:  # from here on the model is not trusted
                    ends = ((doubt > self.disagreement_limit) & (lives > 0.5)).float()
                    value = value_at(here, t * H + step, "plan/ended")
                    total = total + discount * lives * within * ends * value
                    within = within * (1 - ends)
                    beyond = beyond + (1 - within)
            for net, w_z, w_a, bias in parts:
                h = F.linear(a[step], w_a).view(N, S, -1)
                h = h.add_(F.linear(z, w_z).unsqueeze(1) + bias if step == 0 else bias).view(N * S, -1)
                out.append(net.after_first(h if step == 0 else h.addmm_(z, w_z.T)))
            reward, z = symlog_two_hot_mean(out[0], self.bins), out[1]
            total = total + discount * lives * within * (reward - cost)
            discount = discount * gamma
            if self.episodic:
                ends = self.termination(z.to(self.compute_dtype)).squeeze(-1).sigmoid()
                lives = lives * (1 - (ends if deterministic else (ends > 0.5).float()))
        total = total + discount * lives * within * value_at(z, t)
        return self.within_limit(total.view(N, S), beyond)

    # --- The verbs ----------------------------------------------------------------------------------

    def initial(self, batch_size: int) -> State:
        """Zeros; nothing depends on them, as the state is what the last observation says."""
        return State(torch.zeros(batch_size, self.latent_dim, device=self.device))

    def latent_specs(self) -> dict[str, Spec]:
        """None: states are encoded anew from every observation."""
        return {}

    def encode(
        self,
        obs: Tensors | Tensor,
        state: State | None = None,
        action: Tensors | Tensor | None = None,
        is_first: Tensor | None = None,
        noise: Noise | None = None,
        task: Tensor | None = None,
    ) -> State:
        """The latent state of an observation; the past plays no part.

        Args:
            obs: (B, ...) by key, or the bare tensor of the only key.
            task: number of the task of each row, of a multi-task model; None = that of ``state`` or of the
                environment. (B,)
        """
        obs = self.obs_dict(obs)
        key, spec = next(iter(self.spaces.obs.items()))
        if obs[key].ndim != len(spec.shape) + 1:
            raise ValueError("encode takes one step (batch, ...), not a sequence")
        self.begins(is_first, state, len(obs[key]))  # refuses those of another batch
        if task is None and state is not None:
            task = state.task
        task = self.task_of(task, len(obs[key]))
        z = self.latents(self.observations(obs), self.embed(task), self.source(noise), "plan/shift")
        return State(z, task=task)

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
        """Encode ``obs`` and plan; without a planner the policy acts, but in ``train`` by its mean.

        Other arguments are :meth:`WorldModel.act`'s and, ``task``, :meth:`encode`'s.
        """
        noise = self.source(noise)
        now = self.encode(obs, state, None, is_first, noise, task)
        found = self.search(now, state, is_first, mode, noise, planner, max_ms)
        if found is None:
            eps = self.policy_noise(noise, "act/policy", (len(now.deter),))
            pi = self.pi(now.deter, self.embed(now.task), now.task, eps)
            found = (pi.action if mode == "train" else pi.mean), None
        action = self.action_keys(found[0])
        return action, State(now.deter, None, action, found[1], now.task)

    def imagine(
        self,
        state: State,
        actions: Tensors | Tensor | None = None,
        horizon: int | None = None,
        noise: Noise | None = None,
    ) -> Trajectory:
        """Roll out given actions (B, H, ...), or the policy's samples for ``horizon`` (or the model's) steps.

        ``continues`` is the probability that the episode goes on, 1 for a model that is not ``episodic``.
        """
        noise = self.source(noise)
        ahead, given = self.horizon if horizon is None else whole("horizon", horizon), None
        if actions is not None:
            given = self.actions(self.action_dict(actions, len(state.deter), True, horizon))
        steps = ahead if given is None else given.shape[1]
        emb, zs, taken = self.embed(state.task), [state.deter], []
        for t in range(steps):
            if given is None:
                eps = self.policy_noise(noise, "imagine/policy", zs[-1].shape[:-1], t)
                taken.append(self.pi(zs[-1], emb, state.task, eps).action)
            else:
                taken.append(given[:, t])
            zs.append(self.dynamics(self.inputs(zs[-1], emb, taken[-1])))
        stacked, flat = torch.stack(zs, 1), torch.stack(taken, 1)
        every = None if emb is None else emb.unsqueeze(1).expand(-1, steps, -1)
        reward = symlog_two_hot_mean(self.reward(self.inputs(stacked[:, :-1], every, flat)), self.bins)
        goes_on = torch.ones_like(reward)
        if self.episodic:
            ends = self.termination(stacked[:, 1:].to(self.compute_dtype)).squeeze(-1)
            goes_on = (-ends).sigmoid()
        task = None if state.task is None else state.task.unsqueeze(1).expand(-1, steps + 1)
        return Trajectory(States(State(stacked, task=task)), self.action_keys(flat), reward, goes_on)

    def decode(self, state: State) -> Tensors:
        """Refused: TD-MPC2 learns no decoder."""
        raise NotSupported("TD-MPC2 has no decoder: its latent states predict rewards and values only")

    def q(self, state: State, action: Tensors | Tensor, reduce: str | None = "mean") -> Tensor:
        """Predicted return of ``action``: ``mean`` or ``min`` of the critics (B,); None: each (K, B)."""
        if reduce not in ("mean", "min", None):
            raise ValueError(f"reduce is {reduce!r}; expected 'mean', 'min' or None")
        action = self.actions(self.action_dict(action, len(state.deter)))
        x = self.inputs(state.deter, self.embed(state.task), action)
        values = symlog_two_hot_mean(self.critic(x), self.bins)  # (K, B)
        return values if reduce is None else values.mean(0) if reduce == "mean" else values.amin(0)

    def meanings_of(self, given: Mapping[str, Any]) -> dict[str, Meaning]:
        """Observations in the environment's order and actions by name; of several tasks those of the largest.
        The only one may have any name: no network knows it.
        """
        spaces = Spaces.from_plain(given["spaces"])
        o = SimpleNamespace(**arguments_of(TDMPC2Module, given, exact=False))
        obs, action = spaces.obs, spaces.action
        if tasks := list_tasks(o.tasks, o.task, spaces)[0]:
            obs = {"obs": Spec("float32", (max(t.obs for t in tasks),))}
            action = {"action": Spec("float32", (max(t.action for t in tasks),))}
        first, heads = ("encoder.0.weight", "encoder.conv0.weight"), ("reward.2.", "critic.2.")
        readers = tuple(f"{name}.0.weight" for name in ("dynamics", "reward", "critic", "ensemble.net"))
        return {
            "observations": Meaning(entries(obs, obs), first),
            "actions": Meaning(entries(action, sorted(action)), (*readers, "policy.2.")),
            "normalize": Meaning(bool(o.normalize), first[:1]),
            "simnorm_dim": Meaning(o.simnorm_dim, ("",)),
            "reward_scale": Meaning(float(o.reward_scale), heads),
            "vmin, vmax": Meaning((float(o.vmin), float(o.vmax)), heads),
        }

    def adapt_weights(self, found: Weights, task_like: str | None, partial: bool) -> Tensors:
        """The tensors of a file with a row for a further task, the last; with ``partial`` rows by task name.

        Raises:
            CheckpointError: if the tasks are others.
            ConfigError: for a ``task_like`` that is none of the checkpoint's, or without a further task.
        """
        state, given = dict(found.tensors), found.hparams
        rows, names = state.get("task_embedding.weight"), [t.name for t in self.tasks]
        further = rows is not None and len(rows) == len(names) - 1  # a new task, the last
        named = (given.get("tasks"), given.get("task"), Spaces.from_plain(given["spaces"])) if given else None
        before = [t.name for t in list_tasks(*named)[0]] if self.tasks and named else []
        if before and before != names[: len(names) - further] and not partial:
            raise CheckpointError(
                f"{found.path} has the tasks {', '.join(before[:4])} ...; expected those of model.tasks, in "
                "the same order"
            )
        if task_like is not None and (not further or task_like not in names[:-1]):
            close = nearest(task_like, names[:-1]) if further else "; model.task is no new task"
            raise ConfigError(f"model.task_like is {task_like!r}: no task of the checkpoint{close}")
        if rows is None or not self.tasks or rows.shape[1:] != self.task_embedding.weight.shape[1:]:
            return state
        before = before or names[: len(rows)]
        new = self.task_embedding.weight.detach().cpu().clone()
        for i, name in enumerate(names):
            if (source := name if name in before else task_like) in before:
                new[i] = rows[before.index(source)]
        if partial or further:
            state["task_embedding.weight"] = new
        return state


def termination_metrics(logit: Tensor, terminated: Tensor) -> Tensors:
    """Share of terminations, and the F1 score of predicting them. (B,), (B,)"""
    predicted = (logit > 0).float()
    hits = (predicted * terminated).sum()
    f1 = 2 * hits / (predicted.sum() + terminated.sum()).clamp(min=1e-9)
    return {"termination/rate": terminated.mean(), "termination/f1": f1}


give_verbs(TDMPC2Module, TDMPC2)
