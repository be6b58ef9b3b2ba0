"""TD-MPC2 against arrays recorded from the authors' own code: every array of every file is compared.

``pytest tests/parity/test_tdmpc2.py --golden-dir DIR`` runs the same on any directory of this format (or with
a folder ``tdmpc2`` of it): cases are the ``.pt`` files with a ``state_dict``, ``official_checkpoint_X.pt``
goes with ``expected_X.pt``. The format is in ``tests/parity/data/tdmpc2/README.md``.

Limits, relative to the largest entry of the array, or absolute:

==================  ================  ================================================================
group               limit             arrays
==================  ================  ================================================================
exact               equal             weights, masks, noise, indices
FORWARD             1e-5              networks, latents, TD targets; means, deviations and weights of a
                                      plan, each iteration from the recorded one before it
VALUES              3e-5              values of a plan's candidates, in which rewards' rounding adds up
PLANNED             2e-4 abs.         action and mean of a whole plan through ``act``
LOSS                3e-5, 5e-6 abs.   losses, norms, running scale
GRADIENT            1e-4, 1e-7 abs.   gradients before clipping, and their norms
PARAMETER           1e-6 abs.         parameters and target critics, per update done; pixels 1e-5
==================  ================  ================================================================

Limits of the second update on are ten times those of the first. A plan weighs candidates by exp(value / 2),
and values of 100 to 2,900 differ by 1e-4 and more in float32 once sums are taken in another order: the means
move by as much, and over the iterations it adds up. So only single iterations are held to FORWARD.
Adam divides a first gradient by its own size, so an entry whose gradient is rounding noise takes any step of
up to lr. A parameter may be off by three times that times ROUNDING * (largest gradient) / (its own gradient).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypedDict

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import Tapes, TorchFile, golden_dir
from torch import Tensor
from torch.utils.data import DataLoader

from lit_wm.distributions import symlog_two_hot_loss, symlog_two_hot_mean
from lit_wm.functional import symexp, symlog
from lit_wm.nets.normed import Layers, PixelEncoder, mish, random_shift, simnorm
from lit_wm.planners import MPPI
from lit_wm.tdmpc2 import TDMPC2, TDMPC2Module, termination_metrics
from lit_wm.types import Batch, State


class Limit(TypedDict):
    rtol: float
    atol: float


EXACT: Limit = {"rtol": 0, "atol": 0}
FORWARD: Limit = {"rtol": 1e-5, "atol": 0}
VALUES: Limit = {"rtol": 3e-5, "atol": 0}
LOSS: Limit = {"rtol": 3e-5, "atol": 5e-6}
GRADIENT: Limit = {"rtol": 1e-4, "atol": 1e-7}
PLANNED: Limit = {"rtol": 0, "atol": 2e-4}
LATER = 10  # times these limits, where earlier updates' rounding is in it
PARAMETER, PARAMETER_PIXELS = 1e-6, 1e-5
ROUNDING, ADAM_EPS = 1e-7, 1e-8
FILES: dict[Path, TorchFile] = {}  # read once


def find(directory: Path) -> dict[str, list[Path]]:
    """Files by what they hold."""
    found: dict[str, list[Path]] = {k: [] for k in ("case", "capturable", "units", "official")}
    for path in sorted(directory.glob("*.pt")):
        if path.name.startswith("official_checkpoint_"):
            found["official"].append(path)
        elif not path.name.startswith("expected_"):
            file = FILES.setdefault(path, TorchFile(path))
            keys = file.tree.keys()
            kinds = {"state_dict": "case", "params_after_1": "capturable", "two_hot_inv": "units"}
            kind = [v for k, v in kinds.items() if k in keys]
            if not kind:
                raise pytest.UsageError(f"{path} is no golden file of TD-MPC2: its keys are {list(keys)[:9]}")
            found[kind[0]].append(path)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    files = find(golden_dir(metafunc.config, "tdmpc2"))
    for name in files.keys() & set(metafunc.fixturenames):
        indirect = name != "official"  # which the loader reads, not the test
        ids = [p.stem for p in files[name]]
        metafunc.parametrize(name, files[name], indirect=indirect, ids=ids, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> TorchFile:
    return FILES[request.param]


capturable = units = case


# --- From the recorded format to ours ---------------------------------------------------------------


def our_name(name: str) -> str:
    """``_Qs.params.0.ln.weight`` -> ``critic.0.norm.weight``."""
    name = re.sub(r"^_encoder\.rgb\.(\d)", lambda m: f"encoder.conv{int(m[1]) // 2 - 1}", name)
    for theirs, ours in {
        "_encoder.state.": "encoder.",
        "_Qs.params.": "critic.",
        "_target_Qs_params.": "target_critic.",
        "_pi.": "policy.",
        "_task_emb.": "task_embedding.",
        "_action_masks": "action_mask",
    }.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    return name.removeprefix("_").replace(".ln.", ".norm.")


OPTIONS = re.findall(
    r"\w+",
    """enc_dim mlp_dim latent_dim num_enc_layers num_q num_channels simnorm_dim dropout num_bins vmin vmax
    log_std_min log_std_max horizon rho consistency_coef reward_coef value_coef termination_coef entropy_coef
    tau lr enc_lr_scale discount_denom discount_min discount_max episodic""",
)
PLANNER = ["num_samples", "num_elites", "num_pi_trajs", "min_std", "max_std", "temperature"]


def planner_options(file: TorchFile) -> dict[str, Any]:
    return {k: file.tree["cfg"][k] for k in PLANNER} | {"iterations": file.tree["iterations_in_config"]}


def make_module(file: TorchFile, **overrides: Any) -> TDMPC2Module:
    """The case's sizes and options, with its weights."""
    cfg = file.tree["cfg"]
    ((kind, shape),) = cfg["obs_shape"].items()
    obs = {"dtype": "uint8" if kind == "rgb" else "float32", "shape": list(shape), "classes": None}
    action = {"dtype": "float32", "shape": [cfg["action_dim"]], "classes": None}
    tasks = None
    if cfg["multitask"]:
        rows = zip(cfg["tasks"], cfg["obs_dims"], cfg["action_dims"], cfg["episode_lengths"], strict=True)
        tasks = [dict(name=n, obs=o, action=a, episode_length=e) for n, o, a, e in rows]
    module = TDMPC2Module(
        {"obs": {"obs": obs}, "action": {"action": action}, "episode_length": cfg["episode_length"]},
        **{k: cfg[k] for k in OPTIONS}
        | {"preset": "debug", "task_dim": cfg["task_dim"] or None, "tasks": tasks, "log_every": 1}
        | {"grad_clip": cfg["grad_clip_norm"], "planner": "mppi"}
        | {"planner_options": planner_options(file)}
        | overrides,
    )
    model = module.model
    file.compare("discount", model.discount, rtol=1e-7)
    if tasks:
        file.compare("state_dict/_action_masks", model.action_mask, **EXACT)
    weights = {k: v for k, v in file.tree["state_dict"].items() if not re.match("_detach|log_std", k)}
    weights = {our_name(k): v.float() for k, v in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"scale"}
    return module


def make_batch(file: TorchFile) -> Batch:
    """Batch first, with a row 0 of what led to the first observation: not finite, since it is never read."""
    raw = file.tree["batch"]

    def rows(x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x[:1], torch.nan), x]).transpose(0, 1)

    reward, over = rows(raw["reward"]).squeeze(-1), rows(raw["terminated"]).squeeze(-1)
    false = torch.zeros_like(over, dtype=torch.bool)
    return Batch(
        obs={"obs": raw["obs"].transpose(0, 1)},
        prev_action={"action": rows(raw["action"])},
        reward=reward,
        is_first=false,
        is_last=false,
        is_terminal=over != 0,  # the first of NaN: True
        task=raw.get("task"),
    )


def draws(index: Tensor, members: int) -> Tensor:
    """Uniform noise (..., K) whose two smallest entries stand at ``index`` (..., 2), in that order."""
    u = torch.linspace(0.5, 0.9, members).repeat(*index.shape[:-1], 1)
    return u.scatter(-1, index, torch.tensor([0.1, 0.3]).expand(index.shape))


def shifts(shift: Tensor) -> Tensor:
    """Uniform noise that gives the integers 0 ... 6."""
    return (shift + 0.5) / 7


Names = dict[str, tuple[str, str, str]]  # recorded name -> our stream, kind, what was recorded
UPDATE: Names = {
    "td_pi_eps": ("td/policy", "normal", ""),
    "td_qidx": ("td/q", "uniform", "pair"),
    "pi_eps": ("policy", "normal", ""),
    "pi_qidx": ("policy/q", "uniform", "pair"),
    "shift_next": ("shift/next", "uniform", "shift"),
    "shift_first": ("shift/first", "uniform", "shift"),
}
PLAN: Names = {
    "pi_eps": ("plan/propose", "normal", "stepped"),
    "mppi_eps": ("plan/candidates", "normal", "stepped"),
    "terminal_pi_eps": ("plan/terminal", "normal", "stepped"),
    "terminal_qidx": ("plan/q", "uniform", "pair stepped"),
    "gumbel_exponential": ("plan/pick", "exponential", ""),
    "explore_eps": ("plan/explore", "normal", ""),
    "shift": ("plan/shift", "uniform", "shift"),
}


def make_tapes(noise: dict[str, Tensor], names: Names, members: int, batched: bool = False) -> Tapes:
    """Streams of the recorded ``noise``; where ``batched``, with an axis for the one environment."""
    tapes = {}
    for key, x in noise.items():
        stream, kind, what = names[key]
        if "pair" in what:
            x = draws(x, members)
        elif "shift" in what:
            x = shifts(x)
            if batched:
                x = x.view(-1, *x.shape[-3:])
        elif batched:
            x = x.unsqueeze(1 if "stepped" in what else 0)
        tapes[stream] = (kind, x, "stepped" in what)
    return Tapes(tapes)


def check_tapes(file: TorchFile, prefix: str, tapes: Tapes, names: Names) -> None:
    """All was drawn, and what was handed out leads back to the recorded noise."""
    tapes.check_all_drawn()
    for key in file.keys(prefix):
        if key not in names:
            continue
        stream, _, what = names[key]
        x = tapes.tapes[stream][1]
        if "pair" in what:
            x = x.argsort(-1)[..., :2]
        elif "shift" in what:
            x = (7 * x).floor()
        file.compare(prefix + key, x.reshape(file.data[prefix + key].shape), **EXACT)


# --- Cases ------------------------------------------------------------------------------------------


def test_weights(case: TorchFile) -> None:
    """Names, shapes, masks and discounts; every official tensor has its place."""
    model = make_module(case).model
    own = model.state_dict()
    for key in case.keys("state_dict/"):
        if key.startswith("log_std"):
            limits = {"log_std_min": model.log_std_min, "log_std_dif": model.log_std_max - model.log_std_min}
            case.compare(f"state_dict/{key}", torch.tensor(limits[key]).long(), **EXACT)
        else:  # the detached critics are the critics
            name = our_name(key.replace("_detach_Qs_params.", "_Qs.params."))
            case.compare(f"state_dict/{key}", own[name], **EXACT)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    constants = r"_detach|_target|_action_masks|log_std"
    assert trainable == sum(
        case.data[f"state_dict/{k}"].size for k in case.keys("state_dict/") if not re.match(constants, k)
    )


def check_forward(
    file: TorchFile, prefix: str, model: TDMPC2, z: Tensor, action: Tensor, task: Tensor | None
) -> None:
    """What the networks say of latent states and actions, both of any leading axes."""
    names, lead = file.keys(prefix), action.shape[:-1]
    emb = model.embed(task)
    after = None if emb is None else emb.expand(*lead, -1)
    every = None if task is None else task.expand(lead).flatten()
    starts = State(z[: lead[0]].flatten(0, -2), task=every)
    with torch.no_grad():
        one = model.imagine(starts, action.flatten(0, -2).unsqueeze(1))  # one step
        file.compare(f"{prefix}next", one.states[1].deter.view(*lead, -1), **FORWARD)
        x = model.inputs(z[: lead[0]], after, action)
        logits = {"reward_logits": model.reward(x)}
        for key, critic in (("Q", model.critic), ("target_Q", model.target_critic)):
            logits[f"{key}_all_logits"] = critic(x.flatten(0, -2)).unflatten(1, lead)
        for key, value in logits.items():  # a large case has kept a part
            theirs = file.data[prefix + key].shape
            file.compare(prefix + key, value[tuple(slice(n) for n in theirs)], **FORWARD)
        if "detach_Q_all_logits" in names:
            file.compare(f"{prefix}detach_Q_all_logits", logits["Q_all_logits"], **FORWARD)
        if "reward_value" in names:
            file.compare(f"{prefix}reward_value", one.rewards.view(*lead, 1), **FORWARD)
            values = model.q(starts, action.flatten(0, -2), reduce=None)
            file.compare(f"{prefix}Q_all_values", values.view(-1, *lead, 1), **FORWARD)
            values = symlog_two_hot_mean(logits["target_Q_all_logits"], model.bins)
            file.compare(f"{prefix}target_Q_all_values", values.unsqueeze(-1), **FORWARD)
            check_drawn(file, prefix, model, x.flatten(0, -2))
        if "termination_logits" in names:
            logit = model.termination(z)
            file.compare(f"{prefix}termination_logits", logit, **FORWARD)
            file.compare(f"{prefix}termination_prob", logit.sigmoid(), **FORWARD)
            going_on = one.continues.view(*lead, 1)
            ends = model.termination(one.states[1].deter).sigmoid().view(*lead, 1)
            torch.testing.assert_close(going_on, 1 - ends)
        pi = model.pi(z, emb, task, file.tensor(f"{prefix}pi_eps"))
    for key in ("action", "mean", "log_std"):
        file.compare(f"{prefix}pi_{key}", getattr(pi, key), **FORWARD)
    for key in ("entropy", "scaled_entropy"):
        if f"pi_{key}" in names:
            file.compare(f"{prefix}pi_{key}", getattr(pi, key).unsqueeze(-1), **FORWARD)
    file.inputs(f"{prefix}pi_eps")


def check_drawn(file: TorchFile, prefix: str, model: TDMPC2, x: Tensor) -> None:
    """Least and mean of the two drawn critics, of both sets."""
    for key, critics in (("Q", model.critic), ("target_Q", model.target_critic)):
        for how in ("min", "avg"):
            name = f"{prefix}{key}_{how}"
            index = file.tensor(f"{name}_qidx")
            tape = Tapes({"q": ("uniform", draws(index, len(file.data[f"{prefix}{key}_all_values"])), False)})
            values = model.drawn_values(critics, x, tape, "q")  # (2, N)
            value = values.amin(0) if how == "min" else values.mean(0)
            file.compare(name, value.view(file.data[name].shape), **FORWARD)
            file.inputs(f"{name}_qidx")


def test_forward(case: TorchFile) -> None:
    """Every network at the initial weights, and the task embeddings, which a look-up shortens."""
    model, raw = make_module(case).model.eval(), case.tree["batch"]
    rows, task = raw["obs"].shape[:2], raw.get("task")
    tape = Tapes({})
    if "encode_shift" in case.tree["forward"]:
        shift = shifts(case.tree["forward"]["encode_shift"]).flatten(0, 1)
        tape = Tapes({"plan/shift": ("uniform", shift, False)})
        case.inputs("forward/encode_shift")
    every = None if task is None else task.expand(rows).flatten()
    with torch.no_grad():
        z = model.encode({"obs": raw["obs"].flatten(0, 1)}, noise=tape, task=every).deter.view(*rows, -1)
    tape.check_all_drawn()
    case.compare("forward/encode", z, **FORWARD)
    check_forward(case, "forward/", model, z, raw["action"], task)
    if "task_emb_after_forward" in case.data:
        case.compare("task_emb_after_forward", model.task_embedding.weight, **FORWARD)


def test_td_target(case: TorchFile) -> None:
    """The target and what it is made of, at the initial weights."""
    model, K = make_module(case).model, case.tree["cfg"]["num_q"]
    names = {"pi_eps": UPDATE["td_pi_eps"], "qidx": UPDATE["td_qidx"], "shift_next": UPDATE["shift_next"]}
    noise = {k: v for k, v in case.tree["td"].items() if k in names}
    first = case.tree["updates"][0]["noise"]
    if "shift_first" in first:  # of the prediction, not of the target
        names["shift_first"], noise["shift_first"] = UPDATE["shift_first"], first["shift_first"]
    tapes = make_tapes(noise, names, K)
    model.train()
    out = model.model_loss(make_batch(case), tapes)
    check_tapes(case, "td/", tapes, names)
    case.compare("td/next_z", out.next_z, **FORWARD)
    case.compare("td/td_target", out.td_target.unsqueeze(-1), **FORWARD)


INFO = {
    "consistency_loss": "loss/consistency",
    "reward_loss": "loss/reward",
    "value_loss": "loss/value",
    "termination_loss": "loss/termination",
    "total_loss": "opt/loss",
    "grad_norm": "opt/grad_norm",
    "pi_loss": "loss/policy",
    "pi_grad_norm": "opt/pi_grad_norm",
    "pi_entropy": "pi/entropy",
    "pi_scaled_entropy": "pi/scaled_entropy",
    "pi_scale": "pi/scale",
    "termination_rate": "termination/rate",
    "termination_f1": "termination/f1",
}


class Recorder(pl.Callback):
    """Puts the recorded noise in place of the streams and compares after every call of ``training_step``."""

    def __init__(self, file: TorchFile):
        self.file = file
        self.cfg = file.tree["cfg"]
        self.per_update = PARAMETER_PIXELS if self.cfg["obs"] == "rgb" else PARAMETER
        self.calls = 0

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Keep what the losses are given and return, and the gradients as each backward pass left them."""
        model = module.model
        model_loss, policy_loss = model.model_loss, model.policy_loss

        def model_loss_(*args: Any, **kwargs: Any) -> Any:
            self.passes.append({})
            self.out = model_loss(*args, **kwargs)
            return self.out

        def policy_loss_(zs: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.passes.append({})
            self.zs = zs.detach().clone()
            return policy_loss(zs, *args, **kwargs)

        model.model_loss, model.policy_loss = model_loss_, policy_loss_
        for name, p in ((n, p) for n, p in model.named_parameters() if p.requires_grad):

            def keep(p: Tensor, name: str = name) -> None:
                self.passes[-1][name] = p.grad.clone()

            p.register_post_accumulate_grad_hook(keep)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, batch_idx: int) -> None:
        self.passes: list[dict[str, Tensor]] = []
        noise = self.file.tree["updates"][self.calls]["noise"]
        self.tapes = module.noise = module.model.noise = make_tapes(noise, UPDATE, self.cfg["num_q"])

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        file, model, prefix = self.file, module.model, f"updates/{self.calls}/"
        recorded = file.tree["updates"][self.calls]
        check_tapes(file, f"{prefix}noise/", self.tapes, UPDATE)
        file.compare(f"{prefix}td_target", self.out.td_target.unsqueeze(-1), **self.times(FORWARD))
        file.compare(f"{prefix}running_scale", model.scale.view(1), **self.times(LOSS))
        if "zs" in recorded:
            file.compare(f"{prefix}zs", self.zs, **self.times(FORWARD))
        for key in recorded["info"]:
            value = module.latest.get(f"train/{INFO[key]}", 0.0 if key == "termination_loss" else None)
            file.compare(f"{prefix}info/{key}", value, **self.times(LOSS))
        self.check_gradients(prefix, recorded, model)
        self.check_parameters(prefix, recorded, model.state_dict())
        self.calls += 1
        assert trainer.global_step == self.calls

    def check_gradients(self, prefix: str, recorded: dict[str, Any], model: TDMPC2) -> None:
        file = self.file
        assert len(self.passes) == 2
        policy = {n for n, _ in model.named_parameters() if n.startswith("policy.")}
        grads = {"model": self.passes[0], "pi": {k: v for k, v in self.passes[1].items() if k in policy}}
        assert not policy & self.passes[0].keys(), "the model's loss reaches the policy"
        for part_, found in grads.items():
            names = recorded[f"grad_norms_{part_}"]
            assert {our_name(k) for k in names} == found.keys()
            for key in names:
                grad = found[our_name(key)]
                file.compare(f"{prefix}grad_norms_{part_}/{key}", grad.norm(), **self.times(GRADIENT))
                if f"grad_{part_}" in recorded:
                    file.compare(f"{prefix}grad_{part_}/{key}", grad, **self.times(GRADIENT))
                if f"grad_{part_}_every97" in recorded:
                    file.compare(
                        f"{prefix}grad_{part_}_every97/{key}", grad.flatten()[::97], **self.times(GRADIENT)
                    )
        # What the policy's loss leaves in the model, and what of it is still there for the next update.
        during = {k: v for k, v in self.passes[1].items() if k not in policy}
        after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for when, found in (("during_pi_step", during), ("after_update", after)):
            names = recorded[f"leftover_grads_{when}"]
            assert {our_name(k) for k in names} == found.keys()
            for key in names:
                file.compare(
                    f"{prefix}leftover_grads_{when}/{key}", found[our_name(key)], **self.times(GRADIENT)
                )

    @property
    def parameter(self) -> float:
        """What every entry may be off by now."""
        return self.per_update * (self.calls + 1)

    def times(self, limit: Limit) -> Limit:
        """The limit for the update at hand."""
        factor = LATER if self.calls else 1
        return {"rtol": factor * limit["rtol"], "atol": factor * limit["atol"]}

    def limit(self, key: str) -> np.ndarray:
        """How far each entry of a parameter may be off, see the top of this file."""
        first, online = self.file.tree["updates"][0], key.replace("_target_Qs_params.", "_Qs.params.")
        share = 3 * self.cfg["lr"] * (1 if key == online else 3 * self.cfg["tau"])  # of three steps
        for name in ("grad_model", "grad_pi", "grad_model_every97", "grad_pi_every97"):
            if online in first.get(name, ()):
                largest = max(g.abs().max() for g in first[name].values())
                noise = ROUNDING * largest / (first[name][online].abs() + ADAM_EPS)
                return (self.parameter + share * noise.clamp(max=1)).numpy()
        return np.full((), self.parameter)

    def check_parameters(self, prefix: str, recorded: dict[str, Any], own: dict[str, Tensor]) -> None:
        file = self.file
        for key in recorded.get("params_after", ()):
            file.compare(f"{prefix}params_after/{key}", own[our_name(key)], 0, self.limit(key))
        for key in recorded.get("params_after_every97", ()):
            value = own[our_name(key)].flatten()
            file.compare(f"{prefix}params_after_every97/{key}", value[::97], 0, self.limit(key))
            # Rounding adds up like a random walk.
            limit = self.parameter * value.numel() ** 0.5
            file.compare(f"{prefix}params_after_sum_f64/{key}", value.double().sum(), 0, limit)


class AgainstCapturable(Recorder):
    """The same updates, compared with those of the optimizer setting that the authors use on a GPU."""

    def __init__(self, file: TorchFile, case: TorchFile):
        super().__init__(case)
        self.other = file

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        for key in self.other.tree["infos"][self.calls]:
            value = module.latest.get(f"train/{INFO[key]}", 0.0 if key == "termination_loss" else None)
            self.other.compare(f"infos/{self.calls}/{key}", value, **self.times(LOSS))
        own, name = module.model.state_dict(), f"params_after_{self.calls + 1}"
        for key in self.other.tree.get(name, ()):
            self.other.compare(f"{name}/{key}", own[our_name(key)], 0, self.limit(key))
        self.calls += 1


def fit(recorder: Recorder, file: TorchFile, path: Path) -> None:
    """As many calls of ``training_step`` under a Trainer as updates were recorded."""
    module, count = make_module(file), len(file.tree["updates"])
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=count,
        logger=False,
        callbacks=[recorder],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
    )
    batches = [make_batch(file) for _ in range(count)]
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda x: x))
    assert recorder.calls == count


def test_updates(case: TorchFile, tmp_path: Path) -> None:
    """Consecutive updates: losses, latents, gradients, parameters, targets and scale after each."""
    fit(Recorder(case), case, tmp_path)
    case.inputs("batch/")


def test_capturable(capturable: TorchFile, tmp_path: Path) -> None:
    """The case with the same seed and options, see :class:`AgainstCapturable`."""
    options = {**capturable.tree["cfg"], "adam_capturable": False}
    cases = [f for f in FILES.values() if f.tree.get("cfg") == options and "updates" in f.tree]
    cases = [f for f in cases if f.tree["seed"] == capturable.tree["seed"]]
    assert len(cases) == 1, f"{capturable.path.name} needs the one case it repeats beside it"
    fit(AgainstCapturable(capturable, cases[0]), cases[0], tmp_path)
    assert capturable.unused() == []


def test_dropout(case: TorchFile) -> None:
    """The first update with dropout: value loss and policy loss as plain arithmetic has them. Recorded are
    its latents, target, actions and scale; in the target there is no dropout.
    """
    cfg, first, p = case.tree["cfg"], case.tree["updates"][0], 0.25
    if "zs" not in first:
        pytest.skip("no latents were recorded")
    module, batch, noise = make_module(case, dropout=p), make_batch(case), first["noise"]
    model, (H, B, A) = module.model.train(), case.data["batch/action"].shape
    K, M = cfg["num_q"], cfg["mlp_dim"]
    uniform = {"model": torch.rand(K, H * B, M), "policy": torch.rand(2, (H + 1) * B, M)}
    tapes = make_tapes(noise, UPDATE, K)
    tapes.tapes |= {f"dropout/{k}": ("uniform", u, False) for k, u in uniform.items()}
    out = model.model_loss(batch, tapes)
    case.compare("updates/0/td_target", out.td_target.unsqueeze(-1), **FORWARD)

    def critics(x: Tensor, u: Tensor, members: Tensor) -> Tensor:
        """Linear, dropout, LayerNorm, Mish; again without dropout; logits. (k, N, 101)"""
        w = {k: case.tensor(f"state_dict/_Qs.params.{k}")[members] for k in Q_NAMES}
        for i in range(3):
            x = torch.einsum("koi,kni->kno" if x.ndim == 3 else "koi,ni->kno", w[f"{i}.weight"], x)
            x = x + w[f"{i}.bias"][:, None]
            x = x * (u > p) / (1 - p) if i == 0 else x
            if i < 2:
                scale, shift = w[f"{i}.ln.weight"][:, None], w[f"{i}.ln.bias"][:, None]
                x = F.mish(F.layer_norm(x, x.shape[-1:]) * scale + shift)
        return x

    task, zs, rho = case.tree["batch"].get("task"), first["zs"], cfg["rho"] ** torch.arange(H + 1)
    emb = [] if task is None else [case.tensor("task_emb_after_forward")[task]]

    def rows(z: Tensor, action: Tensor) -> Tensor:
        return torch.cat([z, *(e.expand(len(z), -1, -1) for e in emb), action], -1).flatten(0, 1)

    logits = critics(rows(zs[:-1], case.tree["batch"]["action"]), uniform["model"], torch.arange(K))
    # Cross-entropy with the two bins around the target.
    y = first["td_target"].flatten()
    place = (y.sign() * y.abs().log1p() + 10).clamp(0, 20) / 0.2
    low, log_p = place.floor().long().clamp(max=99), logits.log_softmax(-1)
    at = [log_p.gather(-1, (low + i).expand(K, -1).unsqueeze(-1)).squeeze(-1) for i in (0, 1)]
    loss = -(at[0] * (1 - place + low) + at[1] * (place - low)).view(K, H, B)
    torch.testing.assert_close(out.losses["value"], (rho[:-1, None] * loss).mean(), **LOSS)

    loss, _ = model.policy_loss(zs, task, tapes)  # the critics are still those of the start
    tapes.check_all_drawn()
    w = {k: case.tensor(f"state_dict/_pi.{k}") for k in Q_NAMES}
    x = torch.cat([zs, *(e.expand(len(zs), -1, -1) for e in emb)], -1)
    for i in range(3):
        x = x @ w[f"{i}.weight"].T + w[f"{i}.bias"]
        x = F.mish(F.layer_norm(x, x.shape[-1:], w[f"{i}.ln.weight"], w[f"{i}.ln.bias"])) if i < 2 else x
    mask = torch.ones(A) if task is None else case.tensor("state_dict/_action_masks")[task]
    mean, log_std = x[..., :A] * mask, (-10 + 6 * (x[..., A:].tanh() + 1)) * mask
    action = (mean + noise["pi_eps"] * mask * log_std.exp()).tanh()
    gauss = (-((noise["pi_eps"] * mask) ** 2) / 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    logits = critics(rows(zs, action), uniform["policy"], noise["pi_qidx"])
    q = logits.softmax(-1) @ torch.linspace(-10, 10, 101)
    q = (q.sign() * q.abs().expm1()).mean(0).view(H + 1, B)
    low, high = np.percentile(q[0].numpy(), [5, 95])
    scale = 1 + cfg["tau"] * (max(high - low, 1) - 1)
    gain = q / scale - cfg["entropy_coef"] * mask.sum(-1) * gauss
    torch.testing.assert_close(loss, -(rho[:, None] * gain).mean(), rtol=1e-4, atol=1e-6)


Q_NAMES = [f"{i}.{k}" for i in (0, 1) for k in ("weight", "bias", "ln.weight", "ln.bias")]
Q_NAMES += ["2.weight", "2.bias"]


# --- Plans ------------------------------------------------------------------------------------------


class Guide:
    """A model that compares each answer with the recorded one and gives that: rounding does not add up from
    one iteration to the next, and the first that deviates is the one that fails.
    """

    def __init__(self, model: TDMPC2, file: TorchFile, prefix: str):
        self.model, self.file, self.prefix = model, file, prefix
        self.candidates: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def value(self, state: State, actions: Tensor, noise: Tapes, t: int) -> Tensor:
        """The recorded values (1, S) of iteration ``t``."""
        self.candidates.append(actions[0].clone())
        values = self.model.value(state, actions, noise, t=t)
        self.file.compare(f"{self.prefix}values", values[0], **VALUES, index=t)
        return self.file.tensor(f"{self.prefix}values")[t].unsqueeze(0)


def start_state(model: TDMPC2, plan: dict[str, Any]) -> State:
    """What the step before has left: its plan."""
    task = torch.tensor([plan["task"]]) if model.tasks else None
    mean = plan.get("prev_mean_in")
    return State(
        torch.zeros(1, model.latent_dim), plan=None if mean is None else mean[None].clone(), task=task
    )


def check_plan(file: TorchFile, prefix: str, model: TDMPC2, plan: dict[str, Any]) -> None:
    """The whole of it through ``act``; before that iteration by iteration, to find the first deviation."""
    K = len(model.critic[0].weight)
    t0 = torch.tensor([plan.get("t0", True)])
    mode = "eval" if plan.get("eval_mode", True) else "train"
    if "values" in plan:
        check_iterations(file, prefix, model, plan, t0, mode == "train")
    tapes = make_tapes(plan["noise"], PLAN, K, batched=True)
    with torch.no_grad():
        action, state = model.act({"obs": plan["obs"][None]}, start_state(model, plan), t0, mode, noise=tapes)
    check_tapes(file, f"{prefix}noise/", tapes, PLAN)
    file.compare(f"{prefix}prev_mean_out", state.plan[0], **PLANNED)
    file.compare(f"{prefix}action", action["action"][0], **PLANNED)
    file.inputs(f"{prefix}obs")


def check_iterations(
    file: TorchFile, prefix: str, model: TDMPC2, plan: dict[str, Any], t0: Tensor, explore: bool
) -> None:
    noise, guide = plan["noise"], Guide(model, file, prefix)
    shift = {"plan/shift": ("uniform", shifts(noise["shift"]), False)} if "shift" in noise else {}
    start = start_state(model, plan)
    with torch.no_grad():
        z = model.encode({"obs": plan["obs"][None]}, noise=Tapes(shift), task=start.task).deter
        tapes = {k: v for k, v in noise.items() if k != "shift"}
        tapes = make_tapes(tapes, PLAN, len(model.critic[0].weight), batched=True)
        now = State(z, task=start.task)
        planner = MPPI(horizon=file.tree["cfg"]["horizon"], **planner_options(file))
        found = planner.plan(guide, now, start.plan, t0, explore, tapes)
    tapes.check_all_drawn()
    assert found.iterations == len(found.trace) == file.tree["iterations_effective"] == len(plan["values"])
    candidates, P = torch.stack(guide.candidates), noise["pi_eps"].shape[1]  # (I, S, H, A)
    assert (candidates[:, :P] == candidates[0, :P]).all()  # the policy's, in all iterations
    # The others: the recorded mean and std of each iteration, moved by the recorded noise.
    ours = candidates[:, P:].transpose(1, 2)
    mean, std, eps = plan["mean_per_iter"], plan["std_per_iter"], noise["mppi_eps"]
    expected = (mean[:-1, :, None] + std[:-1, :, None] * eps).clamp(-1, 1)
    if model.tasks:
        expected *= file.tensor("state_dict/_action_masks")[plan["task"]]
    torch.testing.assert_close(ours, expected, rtol=0, atol=5 * FORWARD["rtol"])
    for i, step in enumerate(found.trace):
        values = plan["values"][i]
        assert torch.equal(values[step["elites"][0]], values[plan["elite_idxs"][i]])  # equal but for ties
        file.compare(f"{prefix}mean_per_iter", step["mean"][0], **FORWARD, index=i + 1)
        file.compare(f"{prefix}std_per_iter", step["std"][0], **FORWARD, index=i + 1)
    file.compare(f"{prefix}score", found.trace[-1]["score"][0], **FORWARD)
    file.compare(f"{prefix}prev_mean_out", found.mean[0], **FORWARD)
    file.compare(f"{prefix}action", found.action[0], **FORWARD)
    file.inputs(f"{prefix}elite_idxs", f"{prefix}prev_mean_in")


def test_plans(case: TorchFile) -> None:
    """Every plan: values, elites, means, spreads, weights, action."""
    model = make_module(case).model.eval()
    for i, plan in enumerate(case.tree["plans"]):
        check_plan(case, f"plans/{i}/", model, plan)


def test_acting_without_planning(case: TorchFile) -> None:
    """The policy's sample, and its mean in evaluation."""
    model = make_module(case, planner="policy").model.eval()
    names: Names = {"pi_eps": ("act/policy", "normal", ""), "shift": ("plan/shift", "uniform", "shift")}
    for i, entry in enumerate(case.tree["act_without_mpc"]):
        tapes = make_tapes({k: v for k, v in entry.items() if k in names}, names, 2)
        task = torch.tensor([entry.get("task", 0)]) if model.tasks else None
        mode = "eval" if entry["eval_mode"] else "train"
        with torch.no_grad():
            action, state = model.act({"obs": entry["obs"][None]}, mode=mode, noise=tapes, task=task)
        assert state.plan is None
        check_tapes(case, f"act_without_mpc/{i}/", tapes, names)
        case.compare(f"act_without_mpc/{i}/action", action["action"][0], **FORWARD)
        case.inputs(f"act_without_mpc/{i}/obs")


def test_no_array_was_left_out(case: TorchFile, request: pytest.FixtureRequest) -> None:
    """Runs after all tests of the case: an array that no comparison has read is a failure."""
    ran = [i for i in request.session.items if i.fspath == request.node.fspath]
    if len([i for i in ran if f"[{case.path.stem}]" in i.name]) < 8:
        pytest.skip("only a part of the tests was selected")
    print("", case.report(), sep="\n")
    assert case.unused() == []


# --- Official checkpoints ---------------------------------------------------------------------------


def test_official_checkpoint(official: Path) -> None:
    """The loader's module computes what the official code does after loading the same file."""
    file = TorchFile(official.with_name(official.name.replace("official_checkpoint", "expected")))
    tree = file.tree
    loaded = {k: v for k, v in tree["converted_state_dict"].items() if isinstance(v, Tensor)}
    options: dict[str, Any] = {"discount": 0.99}
    if "task" in tree:  # the file knows neither the observations of each task nor the actions of an old one
        sizes = loaded["_action_masks"].sum(1).int().tolist()
        row = {"obs": tree["obs"].shape[-1], "episode_length": 500}
        options = {"tasks": [{"name": f"task{i}", "action": n} | row for i, n in enumerate(sizes)]}
    model = TDMPC2Module.from_official(official, **options).model.eval()
    if "task" in tree:
        file.compare("task_emb_before", model.task_embedding.weight, **EXACT)
        file.inputs("task")
    with torch.no_grad():
        z = model.encode({"obs": tree["obs"]}, task=tree.get("task")).deter
    file.compare("encode", z, **FORWARD)
    check_forward(file, "", model, z, tree["action"], tree.get("task"))
    check_plan(file, "plan/", model, tree["plan"])
    own = model.state_dict()
    for key in loaded:
        name = f"converted_state_dict/{key}"
        if key.startswith("log_std"):
            assert {"log_std_min": model.log_std_min, "log_std_dif": model.log_std_max - model.log_std_min}[
                key
            ] == file.data[name]
            file.inputs(name)
        else:
            key = our_name(key.replace("_detach_Qs_params.", "_Qs.params."))
            file.compare(name, own[key], **(FORWARD if key.startswith("task_emb") else EXACT))
    file.inputs("obs", "action")
    print("", file.report(), sep="\n")
    assert file.unused() == []


# --- Plain functions --------------------------------------------------------------------------------


def test_symlog(units: TorchFile) -> None:
    units.compare("symlog/symlog", symlog(units.tensor("symlog/x")), **FORWARD)
    units.compare("symlog/symexp_of_clamped", symexp(units.tensor("symlog/x_clamped")), **FORWARD)
    units.inputs("symlog/x")


def test_two_hot(units: TorchFile) -> None:
    logits, x = torch.zeros(len(units.data["two_hot/x"]), 101, requires_grad=True), units.tensor("two_hot/x")
    symlog_two_hot_loss(logits, x.squeeze(-1), -10.0, 10.0).sum().backward()
    units.compare("two_hot/out", 1 / 101 - logits.grad, **FORWARD)  # softmax minus target
    bins, logits = units.tensor("two_hot_inv/bins"), units.tensor("two_hot_inv/logits")
    units.compare("two_hot_inv/out", symlog_two_hot_mean(logits, bins).unsqueeze(-1), **FORWARD)
    units.compare("two_hot_inv/bins", unit_model().bins, **FORWARD)
    units.inputs("two_hot/x", "two_hot_inv/logits")


def test_soft_ce(units: TorchFile) -> None:
    logits, target = units.tensor("soft_ce/logits").requires_grad_(), units.tensor("soft_ce/target")
    loss = symlog_two_hot_loss(logits, target.squeeze(-1), -10.0, 10.0)
    loss.mean().backward()
    units.compare("soft_ce/out", loss.unsqueeze(-1), **FORWARD)
    units.compare("soft_ce/grad_of_mean", logits.grad, rtol=1e-4, atol=1e-8)
    units.inputs("soft_ce/logits", "soft_ce/target")


def test_simnorm(units: TorchFile) -> None:
    x = units.tensor("simnorm/x").requires_grad_()
    out = simnorm(x, units.tree["simnorm"]["simnorm_dim"])
    (out * units.tensor("simnorm/w")).sum().backward()
    units.compare("simnorm/out", out, **FORWARD)
    units.compare("simnorm/grad_of_sum_w_out", x.grad, **GRADIENT)
    units.inputs("simnorm/x", "simnorm/w")


def test_mish(units: TorchFile) -> None:
    units.compare("mish/out", mish(units.tensor("mish/x")), **FORWARD)
    units.inputs("mish/x")


def test_normed_linear_with_dropout(units: TorchFile) -> None:
    """One layer, and the same as a member of an ensemble, by both ways through one."""
    raw = units.tree["normed_linear_dropout"]
    one, two = (Layers(6, 10, act="mish", members=k) for k in (0, 2))
    for layers in (one, two):
        for p, key in zip(layers.parameters(), ("weight", "bias", "ln_weight", "ln_bias"), strict=True):
            p.data.copy_(raw[key])
    mask, x, prefix = raw["scaled_mask"], raw["x"], "normed_linear_dropout/"
    for name, keep in (("out_train_with_mask", mask), ("out_eval", None)):
        many = None if keep is None else keep.expand(2, *keep.shape)
        for out in (one(x, keep), *two(x, many), *two.chosen(torch.tensor([1, 0]), x, many)):
            units.compare(prefix + name, out, **FORWARD)
    # The factors, from the noise: dropped where it is below the rate.
    model = unit_model(dropout=1 - 1 / float(mask.max()), mlp_dim=10)
    u = torch.where(mask == 0, model.dropout - 1e-4, model.dropout + 1e-4).expand(2, *mask.shape)
    keep = model.dropout_of(Tapes({"d": ("uniform", u, False)}), "d", x, 2)
    units.compare(f"{prefix}scaled_mask", keep[1], **FORWARD)
    units.inputs(prefix)


def unit_model(action: int = 3, episode_length: int = 500, **options: Any) -> TDMPC2:
    spec = {"dtype": "float32", "shape": [action], "classes": None}
    spaces = {"obs": {"obs": spec}, "action": {"action": spec}, "episode_length": episode_length}
    return TDMPC2Module(spaces, preset="debug", **options).model


def test_policy_head(units: TorchFile) -> None:
    raw, A = units.tree["policy_head"], units.data["policy_head/eps"].shape[-1]
    model = unit_model(A)
    model.policy = torch.nn.Identity()  # its output is given
    pi = model.pi(torch.cat([raw["mean_pre_tanh"], raw["raw_log_std"]], -1), None, None, raw["eps"])
    for key in ("action", "mean", "log_std"):
        units.compare(f"policy_head/{key}", getattr(pi, key), **FORWARD)
    units.compare("policy_head/entropy", pi.entropy.unsqueeze(-1), **FORWARD)
    units.compare("policy_head/log_prob_squashed", -pi.entropy.unsqueeze(-1), **FORWARD)
    units.compare("policy_head/scaled_entropy", pi.scaled_entropy.unsqueeze(-1), **FORWARD)
    units.compare("policy_head/gaussian_logprob", -pi.scaled_entropy.unsqueeze(-1) / A, **LOSS)
    units.inputs("policy_head/")


def test_running_scale(units: TorchFile) -> None:
    raw, after = units.tree["running_scale"], []
    model, newest = unit_model(tau=raw["tau"]), unit_model(tau=1.0)
    for x, (low, high) in zip(raw["inputs"], raw["percentiles_5_95"], strict=True):
        model.update_scale(x.squeeze(-1))
        after.append(model.scale.clone())
        newest.update_scale(1000 * x.squeeze(-1))  # so large that the least range of 1 is no matter
        torch.testing.assert_close(newest.scale[0], 1000 * (high - low), rtol=1e-5, atol=0)
    units.compare("running_scale/value_after", torch.cat(after), **FORWARD)
    units.inputs("running_scale/")


def test_discount(units: TorchFile) -> None:
    raw = units.tree["discount"]
    ours = [float(unit_model(episode_length=n).discount) for n in raw["episode_length"]]
    units.compare("discount/discount", ours, rtol=0, atol=1e-7)


def test_random_shift(units: TorchFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official sampling is bilinear at whole pixels: up to 2e-3 of 255 off."""
    raw = units.tree["shift_aug"]
    u = shifts(raw["shift"]).view(-1, 2)
    out = random_shift(raw["img"], u)
    units.compare("shift_aug/out_every7", out.flatten()[::7], rtol=0, atol=2e-3)
    units.compare("shift_aug/out_first_image_ch0", out[0, 0], rtol=0, atol=2e-3)
    seen = []
    with monkeypatch.context() as patch:
        conv = F.conv2d
        patch.setattr(F, "conv2d", lambda x, *args: seen.append(x) or conv(x, *args))
        PixelEncoder((9, 64, 64), 2)(raw["img"], u)
    units.compare("shift_aug/preprocessed_every7", seen[0].flatten()[::7], rtol=0, atol=2e-3 / 255)
    units.inputs("shift_aug/")


def test_gumbel_pick(units: TorchFile) -> None:
    """Which elite is executed: the elites' first actions are their numbers."""
    p, e = units.tensor("gumbel_pick/p"), units.tensor("gumbel_pick/exponential")
    first = torch.arange(float(len(p))).view(1, -1, 1).expand(len(e), -1, 1)
    tape = Tapes({"plan/pick": ("exponential", e, False)})
    picked = MPPI()._pick(first, p.expand(e.shape), torch.zeros(len(e), 1), False, tape)
    units.compare("gumbel_pick/index", picked.squeeze(-1).long(), **EXACT)
    units.inputs("gumbel_pick/")


def test_termination_statistics(units: TorchFile) -> None:
    prob, target = (units.tensor(f"termination_statistics/{k}").squeeze(-1) for k in ("prob", "target"))
    found = termination_metrics(prob.logit(), target)
    for key in ("rate", "f1"):
        units.compare(f"termination_statistics/termination_{key}", found[f"termination/{key}"], **FORWARD)
    units.inputs("termination_statistics/")


def test_no_unit_array_was_left_out(units: TorchFile, request: pytest.FixtureRequest) -> None:
    """Runs after all tests of the file; ``buffer`` is compared in ``tests/datamodules``."""
    ran = [i for i in request.session.items if i.fspath == request.node.fspath]
    if len([i for i in ran if f"[{units.path.stem}]" in i.name]) < 13:
        pytest.skip("only a part of the tests was selected")
    print("", units.report(), sep="\n")
    assert [k for k in units.unused() if not k.startswith("buffer/")] == []
