"""Weights of a checkpoint for a new model: all of them or what fits, and what became of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lit_wm.errors import CheckpointError
from lit_wm.nets.coders import module_key
from lit_wm.types import Spaces, Spec, Tensors

if TYPE_CHECKING:
    from lit_wm.world_model import WorldModel

SHOWN = 12  # names in a printed report


class Weights(NamedTuple):
    """What a checkpoint holds of a model: tensors by name, arguments of its module, and the file's notes."""

    path: str
    tensors: Tensors
    hparams: Mapping[str, Any]
    about: Mapping[str, Any]


class Meaning(NamedTuple):
    """What the entries of some tensors mean beyond their shapes: equal values, equal meaning.

    Attributes:
        value: an option's, or words.
        names: beginnings of the tensors' names.
    """

    value: Any
    names: tuple[str, ...]


def entries(specs: Mapping[str, Spec], keys: Iterable[str]) -> str:
    """Entries in words, in the order in which a network has them side by side; the only one of a space goes
    without its name.
    """
    words = []
    for key in keys:
        spec = specs[key]
        kind = f"{spec.dtype} {spec.shape}"
        if spec.is_image:
            kind = f"image {spec.hwc}"
        elif spec.is_discrete:
            kind = f"{spec.classes} classes{f' {spec.shape}' * bool(spec.shape)}"
        words.append(kind if len(specs) == 1 else f"{key} {kind}")
    return ", ".join(words) or "none"


@dataclass
class LoadReport:
    """What became of the tensors of a file and of those of the model that took them.

    Attributes:
        path: the file.
        loaded: names of the tensors that were taken.
        skipped: those of the file that were not: shape in the file, and in the model if it has one.
        fresh: those of the model that the file has not given.
        changed: what entries of tensors of the same shape mean in the file, and in the model; none of them
            is loaded.
    """

    path: str
    loaded: list[str]
    skipped: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]]
    fresh: list[str]
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} tensors loaded, {len(self.skipped)} skipped, {len(self.fresh)} fresh"
        lines = [f"{self.path}: {counts}"]
        lines += _differences(self.changed)
        for name, (there, here) in [*self.skipped.items()][:SHOWN]:
            why = "not here" if here is None else "means something else" if here == there else list(here)
            lines.append(f"  skipped {name} {list(there)}: {why}")
        if (more := len(self.skipped) - SHOWN) > 0:
            lines.append(f"  ... and {more} more")
        if alone := [name for name in self.fresh if name not in self.skipped]:
            more = len(alone) - SHOWN
            lines.append(f"  fresh {', '.join(alone[:SHOWN])}{f' ... and {more} more' if more > 0 else ''}")
        return "\n".join(lines)


def _differences(changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Lines, each difference once."""
    first: dict[tuple[Any, Any], str] = {}
    for what, pair in changed.items():
        first.setdefault(pair, what)
    return [f"  {what}: {there} in the file, {here} here" for (there, here), what in first.items()]


def newest(root: Path, name: str) -> Path | None:
    """The newest checkpoint of that name of a run directory, or of the runs in it; None if there is none."""
    found = [p for depth in ("", "*/", "*/*/") for p in root.glob(f"{depth}checkpoints/{name}.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def file_of(path: str | Path, said_by: str = "") -> Path:
    """The file itself, or the last one of a run directory. Raises CheckpointError if there is none."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{said_by}{path}: no such checkpoint\nGive a run directory or a .ckpt")
    file = newest(path, "last") if path.is_dir() else path
    if file is None:
        raise CheckpointError(
            f"{said_by}{path}: no last checkpoint under this directory\nGive a run directory or a .ckpt"
        )
    return file


def read_weights(path: str | Path, said_by: str = "") -> Weights:
    """Read a checkpoint of ours, whole or exported.

    Args:
        path: the file, or a run directory, whose last one it is.
        said_by: the option that names the file, for the message.

    Raises:
        CheckpointError: it is none.
    """
    path = file_of(path, said_by)
    try:
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = {k.removeprefix("model."): v for k, v in file["state_dict"].items() if k[:6] == "model."}
        hparams = {k: v for k, v in file.get("hyper_parameters", {}).items() if k[0] != "_"}
    except Exception as error:  # torch has no one class for these
        raise CheckpointError(
            f"{said_by}{path}: not a checkpoint of lit-wm ({(str(error) or 'empty').splitlines()[0]})\n"
            "One of the TD-MPC2 authors' becomes one by: lit-wm convert tdmpc2 FILE -o OUT.ckpt"
        ) from error
    return Weights(f"{said_by}{path}", tensors, hparams, file.get("lit_wm", {}))


def load(model: WorldModel, weights: Weights, given: Tensors, partial: bool) -> LoadReport:
    """Copy into ``model`` the tensors ``given``, those of ``weights`` as the model wants them.

    The normaliser of observations is taken as a whole, if the entries are the same; a tensor of the slow
    critic only together with its critic's, else it is the critic's. The only observation, and the only
    action, may have another name here. A file without arguments says nothing of meanings.

    Args:
        partial: leave out what does not fit by name, shape and meaning, instead of refusing it.

    Raises:
        CheckpointError: the file is of another model, or something does not fit.
    """
    there = Spaces.from_plain(weights.hparams["spaces"]) if weights.hparams.get("spaces") else None
    same_obs = there is None or there.obs == model.spaces.obs
    if there is not None:
        for old, new, parts in (
            (there.obs, model.spaces.obs, ("dec.", "normalizer.")),
            (there.action, model.spaces.action, ("pol.",)),
        ):
            if len(old) == len(new) == 1:
                a, b = (f"{module_key(key)}." for specs in (old, new) for key in specs)
                given = {
                    f"{k}.".replace(a, b)[:-1] if k.startswith(parts) else k: v for k, v in given.items()
                }
                same_obs |= parts[0] == "dec." and [*old.values()] == [*new.values()]
    own, named = model.state_dict(), {k: tuple(v.shape) for k, v in given.items() if k not in model.anew}
    here = {k: tuple(v.shape) for k, v in own.items() if k not in model.anew}
    if not any(name.startswith(f"{model.critic_part}.") for name in named):
        kind = str(weights.about.get("class_path", "another model")).rpartition(".")[2]
        raise CheckpointError(
            f"{weights.path} is a checkpoint of {kind}, which shares no parts with {type(model).__name__}\n"
            "Use one of the same model"
        )
    before = model.meanings_of(weights.hparams) if there else {}
    changed = {
        what: (before[what].value, now.value)
        for what, now in model.meanings.items()
        if what in before and before[what].value != now.value
    }
    if changed and not partial:
        shown = "\n".join(_differences(changed)[:3])
        raise CheckpointError(
            f"{weights.path}: its tensors mean something else than this configuration's\n{shown}\n"
            "Use the same entries and options, or take what still means the same: model.start_partial: true"
        )
    fits = {name for name in here.keys() & named.keys() if here[name] == named[name]}
    gone = tuple(name for what in changed for name in model.meanings[what].names)
    fits = {name for name in fits if not name.startswith(gone)}
    if not partial and (wrong := sorted((here.keys() | named.keys()) - fits)):
        shown = ", ".join(f"{k} {named.get(k, 'missing')}, here {here.get(k, 'none')}" for k in wrong[:4])
        raise CheckpointError(
            f"{weights.path}: other networks than this configuration's, in {shown}"
            f"{' ...' if len(wrong) > 4 else ''}\nUse the same preset, sizes, tasks and kind of observation, "
            "or take what fits: model.start_partial: true"
        )
    statistics = {name for name in here.keys() | named.keys() if name.startswith("normalizer.")}
    if not statistics <= fits or not same_obs:
        fits -= statistics
    alone = {}  # tensors of the slow critic that go without the file's
    for name in [k for k in here if k.startswith(f"{model.slow_part}.")]:
        critic = model.critic_part + name.removeprefix(model.slow_part)
        if not {name, critic} <= fits:
            fits.discard(name)
            alone[name] = critic
    with torch.no_grad():
        for name in fits:
            own[name].copy_(given[name])
        for name, critic in alone.items():
            own[name].copy_(own[critic])
    return LoadReport(
        weights.path,
        [name for name in own if name in fits],
        {name: (named[name], here.get(name)) for name in named if name not in fits},
        [name for name in own if name not in fits],
        changed,
    )
