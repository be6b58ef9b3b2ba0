"""``explain``: what a configuration means, before it is trained: shapes, sizes, memory, and on request time.

Nothing is guessed that can be derived. The model is built on the ``meta`` device, where tensors have shapes
and no memory, and one update is traced there; ``--measure N`` trains for N updates in a temporary folder.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_wm.dreamerv3 import DreamerV3, DreamerV3Module
from lit_wm.errors import ConfigError
from lit_wm.nets.normed import PixelEncoder
from lit_wm.planners import MPPI, Gradient, Random
from lit_wm.planners.mppi import MANY_ACTIONS, MORE_ITERATIONS
from lit_wm.tdmpc2 import TDMPC2, TDMPC2Module
from lit_wm.training_cli import TrainingCLI, guarded, read_command
from lit_wm.types import Batch, Spec

USAGE = """\
usage: lit-wm explain [--config FILE]... [--GROUP.OPTION VALUE]... [--measure N] [--json]

Says what the configuration means that 'fit' would train: shapes, sizes, updates, replay, memory.
  --measure N   train for N updates in a temporary folder and predict the time to the end
  --json        the same as JSON
"""
COLD = 2  # first updates, which are not timed: memory is being acquired


# -- arithmetic and memory of one update -------------------------------------------------------------------


def update_flops(model: DreamerV3, batch: int, length: int) -> int:
    """Arithmetic of one update by formula: matrix products and convolutions, 2 per multiply-add.

    Of the algorithm, whatever the code executes: the backward pass costs twice the forward pass of what is
    trained, the roll-out has none, and first layers need no gradient of their input.
    """
    pixels = {"imgout": 4**4}  # of each convolution's output, in units of the innermost grid
    pixels |= {f"conv{i}": 4 ** (3 - i) for i in range(3)} | {f"cnn{i}": 4 ** (4 - i) for i in range(4)}
    if model.dec.outer:
        pixels = {k: min(n, 4**3) for k, n in pixels.items()}
    if model.dec.strided:  # a quarter of the places; the outermost stage of ``outer`` has no stride
        pixels = {
            k: n // (1 if model.dec.outer and k in ("cnn0", "imgout") else 4) for k, n in pixels.items()
        }

    def count(module: nn.Module, *names: str) -> int:
        """Multiply-adds of a row, of the layers whose names begin so; all without names."""
        total = 0
        for name, p in module.named_parameters():
            if p.ndim > 1 and (not names or name.startswith(names)):
                area = prod(model.dec.minres) * pixels[name.split(".")[0]] if p.ndim == 4 else 1
                total += p.numel() * area
        return total

    core, prior, post = count(model.dyn, "dyn"), count(model.dyn, "prior"), count(model.dyn, "obs")
    enc, dec, rew, con, pol, val = map(
        count, (model.enc, model.dec, model.rew, model.con, model.pol, model.val)
    )
    first = count(model.pol, "mlp.linear0") + count(model.val, "mlp.linear0")
    H, rows, starts = model.imag_length, batch * length, batch * (model.imag_last or length)
    world = 3 * (enc + core + post + prior + dec + rew + con) - count(model.enc, "mlp0.", "cnn0.")
    replayed = world - count(model.dyn, "dynin2.") + 4 * val
    imagined = H * (core + prior + pol) + pol + (H + 1) * (rew + con + val + 3 * (pol + val) - first)
    return 2 * (rows * replayed + starts * imagined)


def tdmpc2_flops(model: TDMPC2, batch: int, drawn: int = 2) -> tuple[int, int]:
    """Arithmetic of one update and of one plan, counted likewise.

    Args:
        model: on any device. batch: windows of an update.
        drawn: critics that an estimate evaluates; the reference evaluates all and keeps two.
    """
    area, h, w = {}, *(next(iter(model.spaces.obs.values())).hwc[:2] if model.image_keys else (0, 0))
    for i, (kernel, stride) in enumerate(PixelEncoder.CONVS):
        h, w = (h - kernel) // stride + 1, (w - kernel) // stride + 1
        area[f"conv{i}"] = h * w

    def count(name: str) -> int:
        layers = {} if (part := getattr(model, name, None)) is None else dict(part.named_children())
        return sum(layer.weight.numel() * area.get(n, 1) for n, layer in layers.items())  # type: ignore[operator, union-attr]

    E, D, R, T, Pi, KQ = map(count, ("encoder", "dynamics", "reward", "termination", "policy", "critic"))
    H, A, Q = model.horizon, model.action_dim, KQ // len(model.critic.first.weight) * drawn
    tried = A if model.discrete else 1  # actions of which the policy loss asks the values
    update = 2 * H * (E + Pi + Q) + 6 * E + 6 * H * (D + R + T + KQ) + (H + 1) * (6 * Pi + 4 * tried * Q)
    planner, plan = model.planner, 2 * E
    if planner is None:
        return batch * update, plan + 2 * Pi
    h, p = planner.horizon, planner.num_pi_trajs
    plan += p * (2 * h * Pi + 2 * (h - 1) * D)
    if isinstance(planner, Gradient):  # with all critics; all evaluations but the last go backwards too
        value = 2 * (h * (R + D + T) + Pi + KQ)
        return batch * update, plan + planner.num_candidates * (3 * planner.steps + 1) * value
    assert isinstance(planner, MPPI | Random)
    more = MORE_ITERATIONS * (A >= MANY_ACTIONS)
    laps = planner.iterations + more if isinstance(planner, MPPI) else 1
    return batch * update, plan + laps * planner.num_samples * 2 * (h * (R + D + T) + Pi + Q)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of all tensors that operations make, for as long as they live.

    Attributes:
        now: bytes alive.
        peak: most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Blank:
    """Noise without values."""

    def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        return torch.empty(shape, device="meta")

    normal = uniform = exponential


def update_memory(module: DreamerV3Module | TDMPC2Module, batch: int, length: int) -> dict[str, int]:
    """Bytes of one training process by purpose, from the trace of one update on the ``meta`` device.

    Args:
        module: built on ``meta``. batch: its sequences per update. length: their steps.
    """
    model, lead, noise = module.model, (batch, length), _Blank()
    slow: nn.Module

    def blank(spec: Spec) -> Tensor:
        return torch.empty(*lead, *spec.shape, dtype=getattr(torch, spec.dtype))

    with torch.device("meta"), LiveBytes() as live:
        flag = torch.empty(lead, dtype=torch.bool)
        data = Batch(
            {k: blank(s) for k, s in model.spaces.obs.items()},
            {k: blank(s) for k, s in model.spaces.action.items()},
            torch.empty(lead),
            flag,
            flag.clone(),
            flag.clone(),
        )
        groups = [
            sum(p.nbytes for p in model.group(k) if p.requires_grad) for k, on in module.trained.items() if on
        ]
        if model.tasks and model.task_index is None:
            data.task = torch.empty(batch, dtype=torch.int64)
        if isinstance(model, DreamerV3):
            model.follow_schedules(2**62)  # imagination at its full length
            out = model.loss(data, model.initial(batch), noise, module.trained)
            out.total.backward()
            # An optimizer's step makes two more tensors of each of its parameters while the batch's results
            # live.
            peak, gradients, slow = max(live.peak, live.now + 2 * max(groups)), sum(groups), model.slowval
        else:  # two optimizers, one after the other, whose steps need no more memory
            foreseen = model.model_loss(data, noise)
            if module.trained["model"]:
                foreseen.total.backward()
            for p in model.parameters():
                p.grad = None
            if module.trained["policy"]:
                model.policy_loss(foreseen.zs, data.task, noise)[0].backward()
            peak, gradients, slow = live.peak, max(groups), model.target_critic
    weights, copy = (sum(p.nbytes for p in m.parameters()) for m in (model, slow))
    return {
        "weights": weights - copy,
        "slow critic": copy,
        "optimizer": 2 * sum(groups),
        "gradients": gradients,
        "activations": peak - gradients,
    }


# -- the configuration -------------------------------------------------------------------------------------


class _Inspection(TrainingCLI):
    """Builds what ``fit`` would train, on ``meta`` or for real, and runs nothing."""

    writes_run = False

    def __init__(self, argv: list[str], device: str):
        self.device = device
        super().__init__(read_command(["fit", *argv]))

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def instantiate_classes(self) -> None:
        with torch.device(self.device):
            super().instantiate_classes()
        options = self.config["fit"].trainer
        self.bf16 = str(options.precision).startswith("bf16")
        devices = options.devices
        count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
        self.processes = max(1, count) * options.num_nodes
        if not isinstance(self.model, DreamerV3Module | TDMPC2Module):
            kind = type(self.model).__name__
            raise ConfigError(f"explain knows lit_wm.DreamerV3Module and TDMPC2Module only, not {kind}")
        self.model.model.compute_dtype = torch.bfloat16 if self.bf16 else torch.float32
        # The share of one process: it makes every update, with a part of the batch.
        for name in ("batch_size", "num_envs", "capacity", "max_env_steps"):
            value = getattr(self.datamodule, name)
            setattr(self.datamodule, name, value and value // self.processes)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def facts(cli: _Inspection) -> dict[str, dict[str, Any]]:
    """Everything that can be said without training, in groups."""
    data: Any = cli.datamodule
    module: DreamerV3Module | TDMPC2Module = cli.model
    model, spaces = module.model, module.model.spaces
    options = cli.config["fit"].trainer
    if options.logger is not False:
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # a run holds it too
    process, P = resident_bytes() / 1e9, cli.processes
    networks = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    slow = networks.pop("slowval" if isinstance(model, DreamerV3) else "target_critic")
    batch, length = data.batch_size, data.batch_length
    per_step = Fraction(str(data.train_ratio)) / (batch * P * length)
    ready = P * (batch * length + data.num_envs * (data.window - 1))
    if data.within_episodes:  # the first episode that ends; this is the latest
        ready = P * data.num_envs * max(spaces.episode_length or 0, length)
    if data.utd is not None:
        per_step = Fraction(str(data.utd))
    first = max(data.prefill, ready)
    steps = data.max_env_steps and data.max_env_steps * P
    updates = None if steps is None else data.first_updates + int((steps - first) * per_step)
    if options.max_steps > 0 and (updates is None or updates > options.max_steps):
        updates = options.max_steps
        steps = first + max(0, int((updates - data.first_updates) / per_step))
    rows, alone = data.row_bytes(module.latent_specs()), data.env is None
    capacity = sum(map(len, data.caches)) if alone else data.capacity * P
    if alone:  # observations stay in the caches
        rows = {k: n for k, n in rows.items() if not k.startswith("observation")}
        steps = first = per_step = None
        updates = options.max_steps if options.max_steps > 0 else None
    disk = min(capacity, steps or capacity) * sum(rows.values()) / 1e9
    folder = Path(data.replay_dir or cli.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    tensors = {k: n / 1e9 for k, n in update_memory(module, batch, length).items()}
    return {
        "environment": {
            "id": "none" if alone else data.env,
            **({} if alone else {"environments": data.num_envs * P, "frames per step": data.repeat}),
            **(
                {"datasets": {s.uri: c.steps for s, c in zip(data.sources, data.caches, strict=True)}}
                if data.sources
                else {}
            ),
            **{f"observation {k}": _entry(s) for k, s in spaces.obs.items()},
            **{f"action {k}": _entry(s) for k, s in spaces.action.items()},
        },
        "model": {
            "parameters": sum(networks.values()),
            "networks": {k: n for k, n in networks.items() if n},
            "copy of the critic": slow,
            "compute": "bfloat16" if cli.bf16 else "float32",
            **_algorithm(model, batch * P, length),
        },
        "training": {
            "batch": f"{batch * P} x {length} steps, {data.replay_context} of context",
            **({} if per_step is None else _pace(data, per_step, batch * P * length, first, steps)),
            "updates": updates,
        },
        "replay": {
            "rows": capacity,
            "bytes per row": {"all": sum(rows.values()), **rows},
            "disk GB": {"used": disk, "as much for resuming": disk, "free": free},
            "in": str(folder),
            "memory": "the system's page cache as far as it is free",
        },
        "memory GB" if P == 1 else f"memory GB of 1 in {P} processes": {
            "on a CPU": process + sum(tensors.values()),
            "on a GPU": sum(tensors.values()),
            "of which CUDA's own": "comes on top; the figure has not been compared with a run",
            "the program": process,
            **({"environments": "a process each, not counted"} if data.vectorization == "async" else {}),
            "tensors": tensors,
        },
    }


def _pace(
    data: Any, per_step: Fraction, replayed: int, first: int | None, steps: int | None
) -> dict[str, Any]:
    """How updates follow the steps of environments."""
    return {
        "updates per env step": str(per_step),
        "replayed steps per env step": float(per_step * replayed),
        **({"updates at the beginning": data.first_updates} if data.first_updates > 1 else {}),
        "first update after env steps": first,
        "env steps": steps,
    }


def _algorithm(model: DreamerV3 | TDMPC2, batch: int, length: int) -> dict[str, Any]:
    """What is the algorithm's own: discount, imagination or planning, arithmetic."""
    if isinstance(model, DreamerV3):
        starts = batch * (model.imag_last or length)
        return {
            "discount": f"gamma = 1 - 1/{model.horizon:g} = {1 - 1 / model.horizon:.6f}",
            "imagination": f"{model.imag_length} steps from {starts:,} states",
            **({"planning": str(model.planner)} if model.planner else {}),
            "TFLOP per update": update_flops(model, batch, length) / 1e12,
        }
    update, plan = tdmpc2_flops(model, batch)
    gammas = " and ".join(f"{g:.6g}" for g in sorted(set(model.gammas)))
    return {
        "discount": f"gamma = {gammas}",
        **({"tasks": len(model.tasks)} if model.tasks else {}),
        "planning": str(model.planner or "none: the policy acts"),
        "TFLOP per update": update / 1e12,
        "TFLOP per plan": plan / 1e12,
    }


def _entry(spec: Spec) -> str:
    shape = "x".join(map(str, spec.shape)) or "one"
    return f"{spec.dtype} {shape}" + (f", {spec.classes} classes" if spec.classes else "")


# -- measurement -------------------------------------------------------------------------------------------


class _Stopwatch(pl.Callback):
    """Times updates and, apart from them, the collecting that happens inside: (wall, processor) seconds."""

    def __init__(self) -> None:
        self.updates: list[np.ndarray] = []
        self.collects: list[np.ndarray] = []
        self.rows: list[int] = []
        self._begin = _now()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        collector = trainer.datamodule.collector  # type: ignore[attr-defined]
        collect: Callable[..., int] = collector.collect

        def timed(*args: Any) -> int:
            begin, random = _now(), collector.prefilling
            rows = collect(*args)
            self._begin = self._begin + (took := _now() - begin)
            if not random:  # as most of the run will be
                self.rows.append(rows)
                self.collects.append(took)
            return rows

        collector.collect = timed

    def on_train_batch_start(self, *args: Any) -> None:
        self._begin = _now()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.updates.append(_now() - self._begin)


def _now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def measure(argv: list[str], count: int, training: dict[str, Any]) -> dict[str, Any]:
    """Train for ``count`` updates after a few cold ones, in one process, and predict the whole run."""
    cli = _Inspection(argv, "cpu")
    data: Any = cli.datamodule
    options, evaluate, watch = cli.config["fit"].trainer, cli.config_init["fit"].evaluate, _Stopwatch()
    steps = training["first update after env steps"]
    steps += int((count + COLD) / Fraction(training["updates per env step"])) + 3 * data.num_envs
    data.first_updates = 1  # steps between the updates, as later on
    data.capacity = min(data.capacity, 2 * steps)  # what is measured fits into the temporary folder
    with tempfile.TemporaryDirectory() as folder:
        data.replay_dir = folder
        trainer = pl.Trainer(
            accelerator=options.accelerator, precision=options.precision, devices=1, max_steps=count + COLD,
            max_epochs=-1, default_root_dir=folder, logger=False, enable_checkpointing=False,
            limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
        )  # fmt: skip
        try:
            trainer.fit(cli.model, data)
            lengths = [length for _, length in data.pop_finished()]
        finally:
            data.close()
    update: np.ndarray = np.median(watch.updates[COLD:], axis=0)
    cold = len(watch.rows) // 10
    step: np.ndarray = np.sum(watch.collects[cold:], axis=0) / sum(watch.rows[cold:])
    result = {
        "on": f"{cli.model.device}, {torch.get_num_threads()} threads, {len(watch.updates) - COLD} updates",
        "seconds per update": {"median": update[0], "of the processor": update[1]},
        "env steps per second": cli.processes / step[0],
    }
    if (updates := training["updates"]) is None:
        return result
    every = options.val_check_interval
    episodes = evaluate.episodes * (updates // every if isinstance(every, int) else 0)
    length = min(float(np.mean(lengths)) if lengths else 0.0, evaluate.max_episode_steps)
    parts = {
        "collecting": training["env steps"] / cli.processes * step,
        "updates": updates * update,
        "evaluation" if lengths else "evaluation (not counted: no episode ended)": episodes * length * step,
    }
    wall, processor = sum(parts.values()) / 3600
    shares = {k: v[0] / 3600 for k, v in parts.items()}
    return result | {"hours to finish": {"in all": wall, **shares, "of the processor": processor}}


# -- printing ----------------------------------------------------------------------------------------------


def text(known: dict[str, dict[str, Any]]) -> str:
    """The facts for people."""
    lines = [
        f"{'' if i else group:<14}{name:<30}{_shown(value)}"
        for group, entries in known.items()
        for i, (name, value) in enumerate(entries.items())
    ]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    match value:
        case dict():
            return "  ".join(f"{k} {_shown(v)}" for k, v in value.items())
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
    return "no limit" if value is None else str(value)


def explain(argv: list[str]) -> int:
    """The command; returns its exit status.

    Raises:
        LitWMError: for a configuration that ``fit`` would refuse too.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return 0
    argv, as_json, count = list(argv), "--json" in argv, 0
    argv = [word for word in argv if word != "--json"]
    if "--measure" in argv:
        at = argv.index("--measure")
        word = argv[at + 1] if at + 1 < len(argv) else ""
        if not word.isdigit() or not int(word):
            raise ConfigError(f"--measure {word}: expected the number of updates to time, 1 or more")
        count = int(word)
        del argv[at : at + 2]

    def body() -> None:
        known = facts(_Inspection(argv, "meta"))
        known["time"] = {"not measured": "add --measure N"}
        if count:
            known["time"] = measure(argv, count, known["training"])
        print(json.dumps(known, indent=1) if as_json else text(known))

    return guarded(body)
