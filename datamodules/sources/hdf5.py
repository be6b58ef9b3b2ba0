"""``hdf5:PATH``: HDF5 files with flat arrays per step (as D4RL), or with a group per episode (as Minari)."""

from __future__ import annotations

import errno
import math
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.episodes import Episode, Schema, Source, listed
from datamodules.sources import register
from datamodules.sources.flat import (
    NAMES,
    Column,
    Ends,
    FlatSource,
    Table,
    expand,
    fitted,
    head,
    infer,
    pieces,
    row_bytes,
)
from lit_wm.errors import ConfigError, DataError, LitWMError
from lit_wm.types import Spaces, Spec

_AGAIN = "Delete it, and fetch it again or write it again"
SUFFIXES = (".hdf5", ".h5", ".hdf")
_USED = {name for names in NAMES.values() for name in names}
DAMAGE = (OSError, LookupError, RuntimeError, ValueError, TypeError, MemoryError)  # what h5py and Arrow raise


@register("hdf5")
class HDF5(FlatSource):
    """One file, several (a pattern or a folder), or Minari's ``main_data.hdf5``.

    Flat files hold ``observations``, ``actions``, ``terminals`` and perhaps ``rewards``, ``timeouts`` and
    ``next_observations``, under any of the usual names; groups of these are nested entries. ``infos`` and
    ``metadata`` are skipped. A file of groups ``episode_K`` is read as a Minari dataset if its
    ``metadata.json`` lies beside it; else what its entries are is inferred. Bounds of actions are taken from
    attributes ``low`` and ``high`` of the actions, which hardly any file has: unknown ones are left out, and
    a rescaling to [-1, 1] then needs actions that lie there already.

    Args:
        rest: path, pattern or folder.
        last_obs, dones_are, episode_length, split: see :mod:`datamodules.sources.flat`.
        classes: number of classes of integer actions; None: as many as are found.
        discrete: false reads integer actions as vectors, true one-hot ones as classes.
        drop: observations to leave out.

    Raises:
        DataError: if a file is absent, damaged, no HDF5, lacks observations or actions, or has no episode
            end at all.
    """

    def __init__(
        self,
        rest: str,
        last_obs: str | None = None,
        dones_are: str = "ends",
        episode_length: int | None = None,
        split: str | None = None,
        classes: int | None = None,
        discrete: bool | None = None,
        drop: str | Sequence[str] = (),
    ):
        files, _ = expand("hdf5", rest, SUFFIXES)
        ends = Ends.parse(split, episode_length)
        self.drop = listed(drop)
        self._inner: Source | None = None
        self.meta: dict[str, Any] = {"format": "hdf5"}
        with open_hdf5(files[0]) as file:
            self._grouped = any(re.fullmatch(r"episode_\d+", name) for name in file)
            low_high = None if self._grouped else _bounds(file)
        if not self._grouped:
            self.setup(files, self._open, last_obs=last_obs, dones_are=dones_are, ends=ends,
                       classes=classes, discrete=discrete)  # fmt: skip
            self.take_bounds(*(low_high or (None, None)))
            return
        if len(files) > 1:
            raise ConfigError(
                f"hdf5: {rest} means {len(files)} files with groups episode_K; name one of them."
            )
        beside = (files[0].parent / "metadata.json").is_file()
        if episode_length or split or (beside and (classes or discrete is not None)):
            raise ConfigError(
                f"hdf5: {files[0]} has one group per episode{' and its spaces' if beside else ''}: "
                f"{'classes, discrete, ' if beside else ''}split and episode_length mean nothing there."
            )
        if beside:
            options: dict[str, Any] = {"drop": self.drop} if self.drop else {}
            if last_obs is not None:
                options["last_obs"] = last_obs
            from datamodules.sources.minari import Minari

            self._inner = Minari(str(files[0].parent), **options)
            # One dataset, one report, whichever of the two is asked.
            self.__dict__ |= {**vars(self._inner), "_inner": self._inner, "_report": self._inner.report}
            return
        self.files, self.last_obs = files, last_obs or "error"
        self._infer_groups(classes, discrete)

    def episodes(self) -> Iterator[Episode]:
        """All episodes in the order of the file, groups by their number."""
        if self._inner is not None:
            return self._inner.episodes()
        return self._groups() if self._grouped else super().episodes()

    def take_bounds(self, low: Any, high: Any) -> None:
        """Bounds of a single continuous action; None are unknown."""
        action = self.schema.spaces.action
        if low is None or high is None or list(action) != ["action"] or action["action"].is_discrete:
            return
        shape = action["action"].shape
        bounds = [np.broadcast_to(np.asarray(x, np.float64), shape).copy() for x in (low, high)]
        self.schema = Schema(self.schema.spaces, {"action": bounds[0]}, {"action": bounds[1]})

    @contextmanager
    def _open(self, path: Path) -> Iterator[Table]:
        with open_hdf5(path) as file:
            yield Table.find(str(path), _columns(file, str(path)), self.drop)

    def _infer_groups(self, classes: int | None, discrete: bool | None) -> None:
        specs: dict[str, dict[str, Spec]] = {"observations": {}, "actions": {}}
        bad: DataError | None = None
        with open_hdf5(self.files[0]) as file:
            episodes = _episodes(file)
            for name in episodes:
                # The type is the first episode's; only the number of classes needs all of them.
                try:
                    group = episode_group(file, name, where := f"{self.files[0]}, {name}")
                    own = [
                        (
                            found,
                            key,
                            infer(f"{where}: {role} {key!r}", column, role == "actions", classes, discrete),
                        )
                        for role, found in specs.items()
                        for key, column in self._entries(group, name, role).items()
                        if key not in found or found[key].is_discrete
                    ]
                except DataError as error:  # which reading it will say again
                    bad = bad or error
                    continue
                for found, key, spec in own:
                    if key not in found or (spec.classes or 0) > (found[key].classes or 0):
                        found[key] = spec
                if not any(spec.is_discrete for found in specs.values() for spec in found.values()):
                    break
            if bad and not specs["actions"]:
                raise bad
            self.meta |= {"no_reward": not any(f"{name}/rewards" in file for name in episodes)}
        self.schema = Schema(Spaces(specs["observations"], specs["actions"]))

    def _entries(self, group: Any, name: str, role: str) -> dict[str, Column]:
        where = f"{self.files[0]}, {name}"
        root, nodes = "obs" if role == "observations" else "action", _leaves(child(group, role, where), where)
        if not nodes:
            raise DataError(f"{where} has no {role!r}; found: {', '.join(group)}.")
        leaves = {re.sub(r"_index_(\d+)", r"\1", k) or root: c for k, c in nodes}
        return {k: c for k, c in leaves.items() if role == "actions" or k not in self.drop}

    def _groups(self) -> Iterator[Episode]:
        with open_hdf5(self.files[0]) as file:
            for name in _episodes(file):
                where = f"{self.files[0]}, episode {name.removeprefix('episode_')}"
                try:
                    yield from self._pieces(episode_group(file, name, where), name, where)
                except DataError as error:
                    yield Episode.unreadable(where, error)

    def _pieces(self, group: Any, name: str, episode: str) -> Iterator[Episode]:
        inputs, outputs = (self._entries(group, name, k) for k in ("observations", "actions"))
        steps = (*next(iter(outputs.values())).shape, 0)[0]
        cuts = pieces(steps, sum(map(row_bytes, inputs.values())), episode, self.report)
        for start, stop in cuts:
            last = stop == cuts[-1][1]
            where = f"{episode}, from step {start:,}" if start else episode
            yield self._piece(group, inputs, outputs, where, slice(start, None if last else stop))

    def _piece(
        self, group: Any, inputs: dict[str, Column], outputs: dict[str, Column], where: str, rows: slice
    ) -> Episode:
        """Some steps of an episode; without a stop all that are left, whatever the lengths."""
        specs, start, cut = self.schema.spaces, rows.start, rows.stop is not None
        more = slice(start, rows.stop + 1) if cut else rows
        seen = {k: fitted(specs.obs.get(k), np.asarray(c[more])) for k, c in inputs.items()}
        done = {
            k: self._action(f"{where}: action {k!r}", specs.action.get(k), np.asarray(c[rows]), start)
            for k, c in outputs.items()
        }
        names = ("rewards", "terminations", "truncations")
        if extra := {*seen, *done} - {*specs.obs, *specs.action}:
            raise DataError(
                f"{where} has {min(extra)!r}, which the first good episode lacks.\n  Expected the same "
                "entries in all episodes; drop= leaves observations out."
            )
        columns = {k: c for k in names if (c := child(group, k, where)) is not None}
        if "rewards" not in columns and not self.meta["no_reward"]:
            raise DataError(f"{where} has no 'rewards'; found: {', '.join(group)}.")
        steps = len(next(iter(done.values())))
        reward = columns["rewards"][rows] if "rewards" in columns else None
        no = np.zeros(steps, np.bool_)
        ends = [columns[k][rows] if k in columns else no for k in names[1:]]
        if cut:
            ends[1] = np.array(ends[1])
            ends[1][-1:] = True
        seed = group.attrs.get("seed")
        seed = int(seed) if isinstance(seed, np.integer) else None
        return Episode(seen, done, reward, ends[0], ends[1], where, seed)


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open a file for reading.

    Raises:
        DataError: if it is absent, empty, truncated, no HDF5 file, or found to be damaged while it is open.
    """
    import h5py

    with suppress(ImportError):
        import_module("hdf5plugin")  # more filters, where it is installed
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise DataError(f"{path} is missing.\n  Restore it or fetch it again.") from None
    except OSError as error:
        if error.errno == errno.EAGAIN or "unable to lock" in str(error):
            raise DataError(
                f"{path} is locked: another process is writing it.\n  Wait until it has closed the file, or, "
                "if none writes, set HDF5_USE_FILE_LOCKING=FALSE."
            ) from error
        start = head(path)
        if sizes := re.search(r"eof = (\d+).*stored_eof = (\d+)", str(error)):
            what = f"is truncated: {int(sizes[1]):,} of {int(sizes[2]):,} bytes"
        elif "HDF" not in start:
            what = start if "empty" in start else f"is not an HDF5 file ({start})"
        else:
            what = f"is damaged ({str(error).splitlines()[0][:90]})"
        fix = f"{_AGAIN}."
        if start.find("PK") >= 0:
            fix = f"It looks like an archive of NumPy: npz:{path}"
        raise DataError(f"{path} {what}.\n  {fix}") from error
    with file:
        try:
            yield file
        except DAMAGE as error:
            inside = any("h5py" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
            if isinstance(error, LitWMError) or not inside:
                raise
            raise DataError(f"{path} is damaged ({said(error)}).\n  {_AGAIN}.") from error


def said(error: BaseException) -> str:
    """What an error says, in one short line."""
    return (str(error).splitlines() or [type(error).__name__])[0].strip("'\"")[:90]


def reading(work: Callable[[], Any], what: str, fix: str) -> Any:
    """What ``work`` reads.

    Raises:
        DataError: that ``what``, for whatever the library raises.
    """
    try:
        return work()
    except LitWMError:
        raise
    except DAMAGE as error:
        raise DataError(f"{what} ({said(error)}).\n{fix}") from error


class Dataset:
    """A column of an open file. Whole ones are read past h5py's own objects, which cost more time than the
    numbers of an episode; blocks that cannot be read are named.
    """

    def __init__(self, data: Any, where: str):
        self._data, self._where, self.shape, self.dtype = data, where, data.shape, data.dtype
        if not (stored := data.get_storage_size()):  # virtual, empty, or never written
            self._check_sources()
        elif math.prod(self.shape) * self.dtype.itemsize > max(2000 * stored, 1 << 30):
            raise ValueError(f"{self.shape} values in {stored:,} bytes")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        import h5py

        every = bool(self.shape) and rows.indices(len(self)) == (0, len(self), 1)
        if not every or self.dtype.kind not in "biuf" or 0 in self.shape:
            return self.values(lambda data: data[rows])

        def whole() -> np.ndarray:
            out = np.empty(self.shape, self.dtype)
            self._data.read(h5py.h5s.ALL, h5py.h5s.ALL, out)
            return out

        return self._try(whole)

    def values(self, take: Callable[[Any], Any]) -> Any:
        """What ``take`` finds in the h5py dataset."""
        import h5py

        return self._try(lambda: take(h5py.Dataset(self._data)))

    def _try(self, read: Callable[[], Any]) -> Any:
        import h5py

        try:
            if self.shape:
                return read()
            what, cause = "is a single value; expected one per step", None
        except DAMAGE as error:
            what, cause = f"cannot be read ({said(error)}).\n  {_AGAIN}", error
            plan = self._data.get_create_plist()
            for code, _, _, name in map(plan.get_filter, range(plan.get_nfilters())):
                if not h5py.h5z.filter_avail(code):
                    what = f"needs the filter {name.decode() or code}.\n  pip install hdf5plugin"
        raise DataError(f"{self._where}: {h5py.Dataset(self._data).name} {what}.") from cause

    def _check_sources(self) -> None:
        """HDF5 itself reads zeros where the sources of a virtual dataset are missing."""
        import h5py

        data = h5py.Dataset(self._data)
        here = Path(data.file.filename)
        prefix = os.environ.get("HDF5_VDS_PREFIX", "").replace("${ORIGIN}", str(here.parent))
        folders = [here.parent, Path(), *map(Path, prefix.split(":"))]
        for pair in {(x.file_name, x.dset_name) for x in data.virtual_sources()} if data.is_virtual else ():
            file, key = (name.replace("%b", "0").replace("%%", "%") for name in pair)  # of a series the first
            places = [here] if file == "." else [at / x for at in folders for x in (file, Path(file).name)]
            if path := next(filter(Path.is_file, places), None):
                with open_hdf5(path) as source:
                    if key in source:
                        continue
            raise DataError(
                f"{self._where}: {data.name} takes its values from {key} in {file}, which is missing.\n"
                f"  Restore that file beside {here}."
            )


def child(group: Any, key: str, where: str) -> Any:
    """What lies at ``key`` of a group: a :class:`Dataset`, a group, or None.

    Raises:
        DataError: if it is there but cannot be opened.
    """
    import h5py

    def opened() -> Any:
        try:
            found = h5py.h5o.open(group.id, key.encode())
        except KeyError:
            if key in group:
                raise
            return None
        if isinstance(found, h5py.h5d.DatasetID):
            return Dataset(found, where)
        if isinstance(found, h5py.h5g.GroupID):
            return h5py.Group(found)
        raise TypeError("neither an array nor a group")

    fix = "  Fetch the file again; if it links to another one, put that beside it."
    return reading(opened, f"{where}: {key!r} cannot be opened", fix)


def episode_group(file: Any, key: str, where: str) -> Any:
    """The group of an episode.

    Raises:
        DataError: if it is something else, or cannot be opened.
    """
    if not hasattr(group := child(file, key, where), "keys"):
        what = "missing" if group is None else "an array"
        raise DataError(f"{where} is {what}; expected a group of actions, rewards ...")
    return group


def _leaves(node: Any, where: str) -> list[tuple[str, Any]]:
    if isinstance(node, Dataset):
        return [("", node)]
    inside = [(k, pair) for k in node or () for pair in _leaves(child(node, k, where), where)]
    return [(f"{k}/{inner}".rstrip("/"), column) for k, (inner, column) in inside]


def _columns(file: Any, where: str) -> dict[str, Column]:
    """Flat columns by name; what nobody reads is only named, whatever state it is in."""
    columns: dict[str, Any] = {}
    for name in file:
        leaves = _leaves(child(file, name, where), where) if name in _USED else [("", None)]
        columns |= {f"{name}/{inner}".rstrip("/"): column for inner, column in leaves}
    return columns


def _bounds(file: Any) -> tuple[Any, Any]:
    name = next((name for name in NAMES["action"] if name in file), None)
    attributes = file[name].attrs if name else {}
    return attributes.get("low"), attributes.get("high")


def _episodes(file: Any) -> list[str]:
    names = [name for name in file if re.fullmatch(r"episode_\d+", name)]
    return sorted(names, key=lambda name: int(name.removeprefix("episode_")))
