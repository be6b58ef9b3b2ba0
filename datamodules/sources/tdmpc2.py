"""TD-MPC2's published offline sets: ``.pt`` files that hold a pickled TensorDict [episodes, T+1].

The layout is what ``tdmpc2/trainer/offline_trainer.py`` in nicklashansen/tdmpc2 reads.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.episodes import Episode, Schema, Source
from datamodules.sources import register
from lit_wm.errors import ConfigError, DataError
from lit_wm.tasks import TASK_SETS
from lit_wm.types import Spaces, Spec

_BLOCK = 1 << 25  # bytes of a file that are mapped before they are given back


class _Table(dict):
    """Takes the place of TensorDict's classes, so that a file is data whatever version has written it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state.get("_tensordict", state))


def _make(cls: type[_Table], state: dict[str, Any]) -> _Table:
    return cls(state.get("_tensordict", state))


_MODULES = ("_td", "tensordict", "utils")
_SAFE: list[Any] = [
    (_make, "tensordict._reductions._make_td"),
    *((_Table, f"tensordict.{module}.TensorDict") for module in _MODULES),
    *((OrderedDict, f"tensordict.{module}._StringOnlyDict") for module in _MODULES),
]


@register("tdmpc2")
class TDMPC2(Source):
    """The mt30 and mt80 sets and single-task files of the same form.

    Row t of a file holds o_t with the action and reward that led to it, so those of row 0, which are NaN,
    are not read. Observations and actions keep the width of the file, padded to the widest task. Memory maps
    of the files are open for one block at a time.

    Args:
        rest: a file, a folder or a pattern; chunks that are absent are noted.
        tasks: ``mt30``, ``mt80`` or names in the order of the file's numbers; else the set is known by its
            sizes, or the tasks are called ``task-0`` and so on.
        trust: let a file that holds more than tensors run code as Python's pickle does.

    Raises:
        DataError: if files are absent, damaged, or not of this form.
        ConfigError: for an unknown set of tasks.
    """

    def __init__(self, rest: str, tasks: str | Sequence[str] | None = None, trust: bool = False):
        place = Path(rest).expanduser()
        found = glob(str(place / "*.pt") if place.is_dir() else str(place))
        self.files = sorted(map(Path, found), key=_number)
        if not self.files:
            raise DataError(f"no file matches {rest!r}.\n  Expected .pt files of TD-MPC2, e.g. DIR/*.pt.")
        self._trust, self._sound = trust, set[Path]()
        if trust:
            warnings.warn("trust=true: the .pt files may run any code while they are read.", stacklevel=2)
        numbers = [n for path in self.files if (n := _number(path)[1]) >= 0]
        if len(numbers) == len(self.files) > 1 and (holes := sorted({*range(max(numbers))} - {*numbers})):
            self.report.count("missing_files", f"{rest}: no chunk {', '.join(map(str, holes))}", len(holes))
        shapes = [self._shapes(path) for path in self.files]
        for path, shape in zip(self.files, shapes, strict=True):
            if shape[1] != shapes[0][1]:
                raise DataError(f"{path} holds {shape[1]}, but {self.files[0]} {shapes[0][1]}.")
        self.total_episodes = sum(count for count, _ in shapes)
        rows, self._keys = next(iter(shapes[0][1].values()))[0][0], list(shapes[0][1])
        self.total_steps = self.total_episodes * (rows - 1)
        (_, *width), dtype = shapes[0][1]["obs"]
        image = dtype == "uint8" and len(width) == 3
        action = Spec("float32", shapes[0][1]["action"][0][1:])
        known = None
        for name, listed in TASK_SETS.items():
            sizes = [max(t.obs for t in listed)], (max(t.action for t in listed),), listed[-1].episode_length
            if sizes == (width, action.shape, rows - 1):
                known = name
        self._names = self._task_names(tasks if tasks is not None else known)
        bounds = {"action": np.ones(action.shape)} if known or isinstance(tasks, str) else {}
        obs = {"obs": Spec("uint8" if image else "float32", tuple(width))}
        self.schema = Schema(Spaces(obs, {"action": action}, rows - 1),
                             {k: -v for k, v in bounds.items()}, bounds)  # fmt: skip
        self.meta = {"format": "tdmpc2", "tasks": self._names}
        self.version = 1 if bounds else 2

    def _task_names(self, tasks: str | Sequence[str] | None) -> list[str]:
        if isinstance(tasks, str):
            if tasks not in TASK_SETS:
                raise ConfigError(f"unknown task set {tasks!r}; expected mt30, mt80 or a list of names.")
            return [task.name for task in TASK_SETS[tasks]]
        if tasks is not None:
            return [str(name) for name in tasks]
        if "task" not in self._keys:
            return []
        top = max(int(np.max(self._load(path)["task"].numpy())) for path in self.files)
        return [f"task-{i}" for i in range(top + 1)]

    def _shapes(self, path: Path) -> tuple[int, dict[str, tuple[tuple[int, ...], str]]]:
        """Episodes of a file; by column the shape (T+1, ...) of one and the type."""
        table = self._load(path)
        if missing := [key for key in ("obs", "action", "reward") if key not in table]:
            has = ", ".join(map(str, table)) or "nothing"
            raise DataError(f"{path} has no {missing[0]!r}; found: {has}.")
        kept = {k: table[k] for k in ("obs", "action", "reward", "task", "terminated") if k in table}
        heads = {k: tuple(v.shape[:2]) for k, v in kept.items()}
        if len(set(heads.values())) > 1 or min(v.ndim for v in kept.values()) < 2:
            raise DataError(f"{path}: the columns are {heads}; expected [episodes, T+1] of all.")
        return len(table["obs"]), {k: (tuple(v.shape[1:]), str(v.dtype)[6:]) for k, v in kept.items()}

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        """The columns of a file as memory maps."""
        try:
            with torch.serialization.safe_globals(_SAFE):
                data = torch.load(path, map_location="cpu", mmap=True, weights_only=not self._trust)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = found[1] if found else str(error).splitlines()[-1][:80]
            raise DataError(
                f"{path} holds more than tensors: {what}.\n"
                "  If you trust its origin, trust=true reads it and lets it run code."
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            with open(path, "rb") as file:
                head = file.read(8)
            size = path.stat().st_size
            if head.startswith(b"\x80\x02\x8a\nl\xfc"):
                raise DataError(
                    f"{path} is in the old format of torch.save, which cannot be mapped.\n"
                    "  Load it and save it again with torch.save of torch 1.6 or later."
                ) from error
            what = f"is no file of torch.save (starts with {head!r})"
            if head[:2] == b"PK":
                what = f"is truncated or damaged ({size:,} bytes: {str(error).splitlines()[0][:90]})"
            raise DataError(f"{path} {what}.\n  Delete it and fetch it again.") from error
        columns = {k: data[k] for k in data.keys()} if hasattr(data, "keys") else {}  # noqa: SIM118
        return {k: v for k, v in columns.items() if isinstance(v, torch.Tensor)}

    def _check_sums(self, path: Path) -> None:
        """Compare the checksums of the zip, which a memory map does not look at, once."""
        try:
            with zipfile.ZipFile(path) as archive:
                bad = None if path in self._sound else archive.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            bad = str(error)
        if bad is not None:
            raise DataError(f"{path} is damaged (checksum of {bad}).\n  Delete it and fetch it again.")
        self._sound.add(path)

    def episodes(self) -> Iterator[Episode]:
        """Episodes file by file, in the order of the numbers in their names."""
        for path in self.files:
            self._check_sums(path)
            table = self._load(path)
            count = len(table["obs"])
            size = sum(v.nbytes for k, v in table.items() if k in self._keys)
            step = max(1, _BLOCK * count // max(size, 1))
            for start in range(0, count, step):
                # A new map for each block: what the last one touched no longer counts as our memory.
                table = self._load(path)
                for i in range(start, min(start + step, count)):
                    parts = {k: table[k][i] for k in self._keys}
                    rows = {k: np.array((v.float() if v.dtype == torch.bfloat16 else v).numpy())
                            for k, v in parts.items()}  # fmt: skip
                    yield self._episode(rows, f"{path.name}, episode {i}")

    def _episode(self, rows: dict[str, np.ndarray], where: str) -> Episode:
        task = rows.get("task", np.zeros(1, np.int64)).reshape(-1)
        if (task != task[0]).any() or not 0 <= int(task[0]) < max(len(self._names), 1):
            error = DataError(f"{where}: tasks {task.min()} to {task.max()}; expected one below "
                              f"{len(self._names)} ({', '.join(self._names[:3])} ...).")  # fmt: skip
            return Episode.unreadable(where, error)
        obs, length = rows["obs"], len(rows["obs"])
        while obs.dtype.kind == "f" and length > 1 and np.isnan(obs[length - 1]).all():
            length -= 1  # an episode that ended early fills its row of the table with NaN
        truncated = np.zeros(length - 1, np.bool_)
        terminated = rows.get("terminated", np.zeros(length))[1:length]
        truncated[-1:] = not terminated[-1:].any()
        action, reward = {"action": rows["action"][1:length]}, rows["reward"][1:length]
        return Episode({"obs": obs[:length]}, action, reward, terminated, truncated, where, task=int(task[0]))


def _number(path: Path) -> tuple[str, int, str]:
    """Sorts ``chunk_10.pt`` after ``chunk_9.pt``."""
    match = re.search(r"(\d+)$", path.stem)
    return (path.stem[: match.start()], int(match[1]), path.name) if match else (path.stem, -1, path.name)
