"""Checkpoints of the official TD-MPC2 (nicklashansen/tdmpc2) to ours and back, without changing a number.

Files come in two layouts, told apart by their names: since September 2024 stacked critics
``_Qs.params.0.weight`` with copies; before, as the released files, a flat list ``_Qs.params.0`` to ``9``
(weight, bias, norm weight and norm bias of one layer after the other) and no action masks. Everything else is
read off the shapes, which must then agree with the table of :func:`layout`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_wm.errors import CheckpointError, ConfigError, LitWMError, nearest
from lit_wm.presets import TDMPC2, tdmpc2_sizes
from lit_wm.tasks import Task, action_masks, task_list
from lit_wm.types import Spaces, Spec

if TYPE_CHECKING:
    from lit_wm.tdmpc2 import TDMPC2Module

ONLINE, COPY, TARGET = CRITICS = ("_Qs.params", "_detach_Qs_params", "_target_Qs_params")
_FIELDS = ("weight", "bias", "ln.weight", "ln.bias")
# Duplicates of the critics in files between the two layouts, and a head of a branch of 2024.
_IGNORED = ("_detach_Qs.params.", "_target_Qs.params.", "_terminated.")
# Their beginnings of names and ours; the picture encoder's convolutions stand between other layers.
_NAMES = {f"_encoder.rgb.{2 * i + 2}.": f"encoder.conv{i}." for i in range(4)} | {
    "_encoder.state.": "encoder.",
    "_dynamics.": "dynamics.",
    "_reward.": "reward.",
    "_termination.": "termination.",
    "_pi.": "policy.",
    f"{ONLINE}.": "critic.",
    f"{TARGET}.": "target_critic.",
    "_task_emb.": "task_embedding.",
    "_action_masks": "action_mask",
}
Axes = tuple[str | int, ...]


def to_our_name(name: str) -> str | None:
    """``_Qs.params.0.ln.weight`` -> ``critic.0.norm.weight``; None for constants and copies."""
    for theirs, ours in _NAMES.items():
        if name.startswith(theirs):
            return (ours + name.removeprefix(theirs)).replace(".ln.", ".norm.")
    return None


def to_official_name(name: str) -> str:
    """Inverse of :func:`to_our_name`; a name without counterpart stays as it is."""
    for theirs, ours in _NAMES.items():
        if name.startswith(ours):
            return (theirs + name.removeprefix(ours)).replace(".norm.", ".ln.")
    return name


# --- The table of names and shapes ----------------------------------------------------------------


def _mlp(name: str, sizes: Sequence[str | int], norms: int, *lead: str) -> Iterator[tuple[str, Axes]]:
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        yield f"{name}.{i}.weight", (*lead, outputs, inputs)
        for field in _FIELDS[1 : 4 if i < norms else 2]:
            yield f"{name}.{i}.{field}", (*lead, outputs)


def layout(encoder_layers: int, multitask: bool, episodic: bool) -> dict[str, Axes]:
    """Names of the tensors in the new layout, each with its axes as sums of sizes: ``latent_dim+action``.

    Args:
        encoder_layers: number of linear layers of the encoder, 0 for the one of pictures.
        multitask: whether there are task embeddings and action masks.
        episodic: whether there is a termination head.
    """
    task, hidden = "+task_dim" if multitask else "", ["mlp_dim", "mlp_dim"]
    inputs = f"latent_dim{task}+action"
    out: dict[str, Axes] = {"_action_masks": ("num_tasks", "action")} if multitask else {}
    out |= {"log_std_min": (), "log_std_dif": ()}
    out |= {"_task_emb.weight": ("num_tasks", "task_dim")} if multitask else {}
    if encoder_layers:
        sizes = [f"obs{task}", *["enc_dim"] * (encoder_layers - 1), "latent_dim"]
        out |= _mlp("_encoder.state", sizes, encoder_layers)
    else:
        for name, seen, kernel in zip(
            (2, 4, 6, 8), ("obs", *["num_channels"] * 3), (7, 5, 3, 3), strict=True
        ):
            out[f"_encoder.rgb.{name}.weight"] = ("num_channels", seen, kernel, kernel)
            out[f"_encoder.rgb.{name}.bias"] = ("num_channels",)
    out |= _mlp("_dynamics", [inputs, *hidden, "latent_dim"], 3)
    out |= _mlp("_reward", [inputs, *hidden, "num_bins"], 2)
    out |= _mlp("_termination", ["latent_dim", *hidden, 1], 2) if episodic else {}
    out |= _mlp("_pi", [f"latent_dim{task}", *hidden, "action+action"], 2)
    for critic in CRITICS:
        out |= _mlp(critic, [inputs, *hidden, "num_bins"], 2, "num_q")
    return out


def _layout_of(state: Mapping[str, Tensor]) -> dict[str, Axes]:
    """The table that fits the tensors; refuse names that are missing or in excess."""
    encoder = [int(m[1]) + 1 for k in state if (m := re.fullmatch(r"_encoder\.state\.(\d+)\.weight", k))]
    images = not encoder and any(k.startswith("_encoder.rgb.") for k in state)
    episodic = any(k.startswith("_termination.") for k in state)
    names = layout(0 if images else max(2, *encoder, 2), "_task_emb.weight" in state, episodic)
    for what, wrong in (("lacks", names.keys() - state), ("has unknown tensors:", state.keys() - names)):
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(f"this TD-MPC2 checkpoint {what} {', '.join(sorted(wrong)[:5])}{more}")
    return names


def _sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes that the shapes of a file in the new layout tell, after all shapes have been compared."""
    names = _layout_of(state)
    for name, axes in names.items():
        if state[name].ndim != len(axes):
            raise CheckpointError(f"{name} has shape {tuple(state[name].shape)}; expected {len(axes)} axes")
    sizes = {"action": len(state["_pi.2.bias"]) // 2}
    if "_task_emb.weight" in names:
        sizes["num_tasks"], sizes["task_dim"] = state["_task_emb.weight"].shape
    for name in sorted(names, key=lambda name: name.startswith("_encoder")):
        for size, text in zip(state[name].shape, names[name], strict=True):
            if isinstance(text, str) and "+" not in text:
                sizes.setdefault(text, size)
    if "enc_dim" in sizes:
        sizes.setdefault("obs", state["_encoder.state.0.weight"].shape[1] - sizes.get("task_dim", 0))
        sizes["num_enc_layers"] = sum(bool(re.fullmatch(r"_encoder\.state\.\d+\.weight", k)) for k in names)
    if low := {k: v for k, v in sizes.items() if v < 1}:
        raise CheckpointError(f"this TD-MPC2 checkpoint has sizes below 1: {low}")
    for name, axes in names.items():
        shape = tuple(state[name].shape)
        for axis, text in enumerate(axes):
            parts = {} if isinstance(text, int) else {k: sizes[k] for k in dict.fromkeys(text.split("+"))}
            expected = text if isinstance(text, int) else sum(sizes[k] for k in text.split("+"))
            if shape[axis] != expected:
                of = f" of {', '.join(f'{k} {v}' for k, v in parts.items())}" if parts else ""
                raise CheckpointError(
                    f"{name} {shape}: axis {axis} is {shape[axis]}; expected {expected}{of}"
                )
    if "num_channels" in sizes and sizes["latent_dim"] != (left := 16 * sizes["num_channels"]):
        raise CheckpointError(
            f"latent_dim is {sizes['latent_dim']}; of 64x64 pictures the encoder leaves {left}, 16 times "
            "num_channels"
        )
    return sizes


# --- Official to ours -------------------------------------------------------------------------------


def _new_layout(state: Mapping[str, Any], tasks: Sequence[Task] | None) -> dict[str, Tensor]:
    """Tensors of either layout under the names of the new one, in float32, without duplicates."""
    old, out = f"{ONLINE}.0" in state, {}
    for name, value in state.items():
        if old and (m := re.fullmatch(r"_(target_)?Qs\.params\.(\d)", name)):
            name = f"{TARGET if m[1] else ONLINE}.{int(m[2]) // 4}.{_FIELDS[int(m[2]) % 4]}"
        elif name.startswith(_IGNORED) or name.endswith((".__batch_size", ".__device")):
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} is of type {type(value).__name__}; expected a tensor")
        out[name] = value.float() if value.is_floating_point() else value
    if not any(k.startswith(COPY) for k in out):
        out |= {COPY + k.removeprefix(ONLINE): v for k, v in out.items() if k.startswith(ONLINE)}
    if old:
        out |= {"log_std_min": torch.tensor(-10), "log_std_dif": torch.tensor(12)}
        out |= {"_action_masks": action_masks(tasks)} if tasks else {}
    return out


def _tasks_of(state: Mapping[str, Any], given: str | Sequence[Any] | None) -> str | tuple[Task, ...] | None:
    """What was given, or the official set of that many tasks."""
    embedding = state.get("_task_emb.weight")
    if not isinstance(embedding, Tensor):
        if given is not None:
            raise ConfigError("this checkpoint is of a single task; leave out tasks")
        return None
    count = len(embedding)
    tasks = {30: "mt30", 80: "mt80"}.get(count) if given is None else given
    if tasks is None:
        raise CheckpointError(
            f"it has {count} tasks, and only mt30 and mt80 are known\n"
            "Give the list: --tasks FILE.yaml with {name, obs, action, episode_length} of each"
        )
    listed = task_list(tasks)
    if len(listed) != count:
        raise CheckpointError(f"it has {count} tasks; {len(listed)} were given")
    return tasks if isinstance(tasks, str) else listed


def from_official(
    state: Mapping[str, Any], tasks: str | Sequence[Any] | None = None, episode_length: int = 500
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds -> the state dict of our model, and the inferred arguments of its module.

    Args:
        state: ``{"model": state dict}`` or a bare state dict, of either layout; floats become float32.
        tasks: as :func:`lit_wm.tasks.task_list` takes them; None for one task and for the 30 or 80 of a set.
        episode_length: decisions until the time limit of a single task, from which the discount follows; no
            file tells it. 500 in DMControl; 100 in Meta-World, ManiSkill2 and MyoSuite.

    Raises:
        CheckpointError: if it is something else, a name is missing, or a size disagrees; it says which.
        ConfigError: if ``tasks`` are impossible.
    """
    state = state.get("model", state) if isinstance(state, Mapping) else state
    names = [str(k) for k in state] if isinstance(state, Mapping) else [type(state).__name__]
    if not any(k.startswith((f"{ONLINE}.", "_dynamics.")) for k in names):
        raise CheckpointError(
            f"this is no checkpoint of the official TD-MPC2: it holds {', '.join(names[:4]) or 'nothing'}\n"
            f"Expected tensors such as _dynamics.0.weight and {ONLINE}.0.weight"
        )
    tasks = _tasks_of(state, tasks)
    listed = None if tasks is None else task_list(tasks)
    state = _new_layout(state, listed)
    sizes = _sizes_of(state)
    for name in state:
        if name.startswith(COPY) and not torch.equal(state[name], state[ONLINE + name.removeprefix(COPY)]):
            raise CheckpointError(
                f"{name} differs from what it is a copy of: the file was put together wrongly"
            )
    obs, action = sizes.pop("obs"), sizes.pop("action")
    for task, mask in zip(listed or (), state.get("_action_masks", ()), strict=True):
        if not torch.equal(mask, (torch.arange(action) < task.action).to(mask)):
            raise CheckpointError(
                f"the actions of task {task.name} are masked by {mask.tolist()}; expected {task.action} ones "
                "and then zeros"
            )
    if listed and obs != (largest := max(t.obs for t in listed)):
        raise CheckpointError(f"its largest observation has {obs} numbers; that of the tasks has {largest}")
    seen = Spec("uint8", (obs, 64, 64)) if "num_channels" in sizes else Spec("float32", (obs,))
    low = float(state["log_std_min"])
    arguments: dict[str, Any] = {
        "spaces": Spaces(
            {"obs": seen}, {"action": Spec("float32", (action,))}, None if listed else episode_length
        ).to_plain(),
        "tasks": [t._asdict() for t in tasks] if isinstance(tasks, tuple) else tasks,
        "episodic": "_termination.0.weight" in state,
        "log_std_min": low,
        "log_std_max": low + float(state["log_std_dif"]),
        "num_bins": sizes.pop("num_bins"),
    }
    arguments |= {"num_channels": sizes.pop("num_channels")} if seen.is_image else {}
    sizes.pop("num_tasks", None)
    fitting = [name for name in TDMPC2 if sizes.items() <= tdmpc2_sizes(name, arguments["tasks"]).items()]
    arguments |= {"preset": fitting[0]} if fitting else {"preset": "5m"} | sizes
    return {ours: v for k, v in state.items() if (ours := to_our_name(k))}, arguments


def read(path: str | Path) -> Any:
    """The tensors and plain values of a file of ``torch.save``; nothing in it is ever executed.

    Raises:
        CheckpointError: if it is missing, damaged, or holds anything else.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                names = archive.namelist()
                if not any(name.endswith("data.pkl") for name in names):
                    kind = "an npz of arrays" if names and names[0].endswith(".npy") else "another zip file"
                    expected = "Expected the .pt of the TD-MPC2 authors, or a .ckpt of ours"
                    raise CheckpointError(f"{path} is no checkpoint but {kind}\n{expected}")
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} holds more than tensors{f' ({found[1]})' if found else ''}; it was not opened, since "
            "that could run code\nExpected a file written by torch.save({'model': state dict})"
        ) from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:100] or type(error).__name__
        raise CheckpointError(
            f"{path} is damaged, cut short, or not written by torch.save: {reason}\nDownload it again"
        ) from error


def module_from_official(
    path: str | Path,
    tasks: str | Sequence[Any] | None = None,
    episode_length: int = 500,
    task: str | None = None,
    **overrides: Any,
) -> TDMPC2Module:
    """A module with the weights of an official file.

    Args:
        path: the file, of either layout.
        tasks, episode_length: see :func:`from_official`.
        task: the one of several tasks that is to be played; spaces are then of its sizes.
        overrides: arguments of the module in place of the inferred ones, e.g. ``discount``, or the
            ``spaces`` of an environment.

    Raises:
        CheckpointError: if the file cannot be read or does not fit the arguments.
    """
    from lit_wm.tdmpc2 import TDMPC2Module

    loaded = read(path)
    try:
        state, arguments = from_official(loaded, tasks, episode_length)
        if task is not None:
            known = {t.name: t for t in task_list(arguments["tasks"] or ())}
            if task not in known:
                raise ConfigError(f"task {task!r} is none of this checkpoint's{nearest(task, list(known))}")
            arguments |= {"task": task, "spaces": known[task].spaces().to_plain()}
        module = TDMPC2Module(**arguments | overrides)
        # No file holds the scale of the returns, which begins anew.
        module.model.load_state_dict({"scale": module.model.scale} | state)
    except (LitWMError, RuntimeError) as error:
        reason = "\n".join(str(error).strip().splitlines()[:3])
        raise CheckpointError(f"{path}: {reason}") from error
    return module


# --- Ours to official -------------------------------------------------------------------------------


def to_official(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """State dict of our model and arguments of its module -> the state dict that the official code loads.

    Raises:
        CheckpointError: if the official code has no such model, e.g. one with discrete actions.
    """
    spaces = Spaces.from_plain(arguments["spaces"])
    if any(s.is_discrete for s in (*spaces.obs.values(), *spaces.action.values())):
        raise CheckpointError("the official TD-MPC2 knows no discrete observations or actions")
    if arguments.get("normalize"):
        raise CheckpointError("the official TD-MPC2 cannot normalise observations (model.normalize)")
    low, high = arguments["log_std_min"], arguments["log_std_max"]
    constants = {"log_std_min": low, "log_std_dif": high - low}
    tensors = {k: torch.tensor(int(v) if v == int(v) else v) for k, v in constants.items()}
    tensors |= {to_official_name(k): v.detach().cpu() for k, v in state.items() if k != "scale"}
    tensors |= {COPY + k.removeprefix(ONLINE): v for k, v in tensors.items() if k.startswith(ONLINE)}
    members = _sizes_of(tensors)["num_q"]
    out: dict[str, Any] = {}
    for name in _layout_of(tensors):
        out[name] = tensors[name]
        for critic in CRITICS:  # what tensordict's parameters say of themselves
            if name == f"{critic}.2.bias":
                out |= {f"{critic}.__batch_size": torch.Size([members]), f"{critic}.__device": None}
    return out
