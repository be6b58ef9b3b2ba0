"""``npz:PATH|PATTERN|FOLDER``: recordings in npz files, of four forms that are told apart by their keys.

- demo: ``observations``, ``actions``, ``rewards``, ``dones`` (or the usual other names), flat, in one file or
  one per episode;
- replay (WorldFlux, worldloom): ``obs``, ``actions``, ``rewards``, ``dones`` with ``obs_shape`` and
  ``action_dim``; one-hot actions become classes;
- OGBench: ``observations``, ``actions``, ``terminals``, no rewards; T+1 rows per episode, ``terminals`` cuts;
- Dreamer chunks: ``is_first``, ``is_last``, ``is_terminal``.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.episodes import Episode, Schema, Source, listed
from datamodules.files import replacing
from datamodules.rows import row_key
from datamodules.sources import register
from datamodules.sources.flat import NAMES, Column, Ends, FlatSource, Table, expand, head, is_one_hot
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spec

_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError)
_PIECE = 1 << 20  # bytes taken from a compressed stream at once
_READ = [*(alias for aliases in NAMES.values() for alias in aliases), "schema", "obs_shape", "action_dim",
         "capacity"]  # fmt: skip
FORMS = ("demo", "replay", "ogbench", "dreamer")


@register("npz")
class NPZ(FlatSource):
    """Recordings in npz files. Nothing is unpickled, and no array is held in memory as a whole. A file of T+1
    observations and T actions is one episode.

    Args:
        rest: a file, a pattern or a folder; ``*-val.npz`` are left out unless the pattern says ``-val``.
        last_obs, dones_are, classes: see :meth:`~datamodules.sources.flat.FlatSource.setup`.
        episode_length, split: see :meth:`~datamodules.sources.flat.Ends.parse`.
        discrete: whether actions are classes or one-hot; None: integers, and one-hot rows in the replay form.
        drop: observations to leave out.
        form: ``demo``, ``replay``, ``ogbench`` or ``dreamer`` where the keys would be misread.
        tolerate, actions: of :class:`~datamodules.sources.dreamer_chunks.DreamerChunks`.

    Raises:
        DataError: if a file is absent, damaged, pickled, or lacks observations or actions.
    """

    def __init__(
        self, rest: str, last_obs: str | None = None, dones_are: str = "ends",
        episode_length: int | None = None, split: str | None = None, classes: int | None = None,
        discrete: bool | None = None, drop: str | Sequence[str] = (), form: str | None = None,
        tolerate: bool = False, actions: str | Sequence[str] | None = None,
    ):  # fmt: skip
        files, pattern = expand("npz", rest, (".npz",))
        if pattern and "-val" not in Path(rest).name:
            train = [file for file in files if not file.stem.endswith("-val")]
            if len(train) < len(files):
                note = f"{len(files) - len(train)} *-val.npz of {rest} are left out; name them to read them"
                self.report.count("validation_files", note)
            files = train or files
        if form not in (None, *FORMS):
            raise ConfigError(f"npz: form is {form!r}; expected {', '.join(FORMS)}.")
        self.drop = listed(drop)
        self._inner: Source | None = None
        with open_npz(files[0]) as members:
            self._form, self._said = form or _form(members), form is not None
            said = str(members["schema"].value()[0]) if "schema" in members else None
            spare = [k for k in members if k.split("/")[0] not in _READ]
        self.files = files
        self.meta: dict[str, Any] = {"format": f"npz-{self._form}"}
        if self._form == "dreamer":
            if episode_length is not None or split is not None:
                wrong = "split" if episode_length is None else "episode_length"
                raise ConfigError(f"npz: {files[0]} is a Dreamer chunk; {wrong} means nothing there.")
            from datamodules.sources.dreamer_chunks import DreamerChunks

            acts = actions or ("action",)
            inner: Source = DreamerChunks(files, tolerate, classes, bool(discrete), acts, self.drop)
            self.__dict__ |= {**vars(inner), "_inner": inner, "_report": inner.report}
            self.version = inner.version
            return
        if tolerate or actions:
            raise ConfigError(f"npz: tolerate and actions are for Dreamer chunks; {files[0]} is none.")
        if spare:
            note = f"{files[0]}: arrays that are not read: {', '.join(spare)}"
            near = [(k, close[0]) for k in spare if (close := get_close_matches(k, _READ, 1, 0.8))]
            if near:
                note += f"; did you mean {near[0][1]!r} by {near[0][0]!r}?"
                warnings.warn(note, stacklevel=3)
            self.report.count("unused_arrays", note)
        if self._form == "replay" and discrete is None:
            discrete = all(_replay_is_one_hot(file) for file in files) or None
        ends = Ends.parse(split, episode_length)
        self.setup(files, self._open, last_obs=last_obs, dones_are=dones_are, ends=ends, classes=classes,
                   discrete=discrete, may_be_open=True)  # fmt: skip
        if said is not None and classes is None and discrete is None:
            self.schema = self._stated(said)

    def _stated(self, text: str) -> Schema:
        """The schema that :func:`write_npz` wrote, without what is dropped."""
        try:
            schema = Schema.from_plain(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.files[0]}: schema cannot be read ({error}).\n"
                            "  Delete it from the file, or write the file again.") from error  # fmt: skip
        obs = {k: s for k, s in schema.spaces.obs.items() if k not in self.drop}
        found = self.schema.spaces
        if (obs.keys(), schema.spaces.action.keys()) != (found.obs.keys(), found.action.keys()):
            raise DataError(f"{self.files[0]}: schema names other entries than the file: {', '.join(obs)}.")
        return replace(schema, spaces=replace(schema.spaces, obs={k: obs[k] for k in found.obs}))

    def episodes(self) -> Iterator[Episode]:
        """All episodes, file by file."""
        return self._inner.episodes() if self._inner is not None else super().episodes()

    @contextmanager
    def _open(self, path: Path) -> Iterator[Table]:
        with open_npz(path) as members:
            if not self._said and (form := _form(members)) != self._form:
                raise DataError(
                    f"{path} is of the {form} form, {self.files[0]} of the {self._form} form.\n"
                    "  Expected files of one kind; name them by a pattern, or say form=."
                )
            table = Table.find(str(path), _aligned(path, members), self.drop)
            if self._form == "replay":
                _agree(path, members, table)
            if self._form == "ogbench" and not table.next:
                # The last row of an episode holds o_T and an action that nobody took; its mark is a cut.
                table.truncated, table.terminated, table.shared_last = table.terminated, None, True
            yield table


def write_npz(source: Source, path: Path) -> None:
    """Write episodes in the demo form with all observations, complete or not at all; a file is replaced.

    Beside the arrays stands ``schema``, JSON, which says what they do not show: classes and bounds. The
    episodes are read once per array, and must all have rewards or none. Raises DataError while another
    process writes the same file.
    """
    spaces, flag = source.schema.spaces, Spec("bool", ())

    def columns(e: Episode) -> dict[str, tuple[Spec, Any]]:
        found: dict[str, tuple[Spec, Any]] = {}
        for k, spec in spaces.obs.items():
            name = "/".join(("observations", *row_key("observation", k, spaces.obs)[1:]))
            found[name] = spec, e.observation[k][:-1]
            found[f"next_{name}"] = spec, e.observation[k][1:]
        for k, spec in spaces.action.items():
            found["/".join(("actions", *row_key("action", k, spaces.action)[1:]))] = spec, e.action[k]
        if e.reward is not None:
            found["rewards"] = Spec("float32", ()), e.reward
        return found | {"terminations": (flag, e.terminated), "truncations": (flag, e.truncated)}

    steps = sum(e.steps for e in source.episodes())
    with replacing(path, path.parent) as part, open(part, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, (spec, _) in columns(next(source.episodes())).items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    shape, dtype = (steps, *spec.shape), np.dtype(spec.dtype)
                    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    for e in source.episodes():
                        member.write(np.ascontiguousarray(columns(e)[name][1], dtype).tobytes())
            with archive.open("schema.npy", "w") as member:
                text = np.array(json.dumps(source.schema.to_plain()))
                np.lib.format.write_array(member, text, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


class Member:
    """An array of an npz, read forwards by slices of rows; going back starts it anew.

    Stored and compressed arrays go the same way, since it checks the sums of the zip.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str, stack: ExitStack):
        self._archive, self._name, self._stack = archive, name, stack
        self._where = f"{archive.filename}: {name.removesuffix('.npy')}"
        self._file: Any = None
        self._used = False
        self._start()

    def again(self) -> Member:
        """The same array, read from its start."""
        return Member(self._archive, self._name, self._stack)

    def _start(self) -> None:
        fmt = np.lib.format
        try:
            self._stream = self._stack.enter_context(self._archive.open(self._name))
            version = fmt.read_magic(self._stream)
            if version not in ((1, 0), (2, 0)):
                raise DataError(f"{self._where} is an array of format {version}; expected 1.0 or 2.0.")
            read = fmt.read_array_header_1_0 if version == (1, 0) else fmt.read_array_header_2_0
            self.shape, fortran, self.dtype = read(self._stream)
        except _BROKEN as error:
            raise self._damaged(error) from error
        if self.dtype.hasobject:
            raise DataError(
                f"{self._where} is an array of objects: it needs pickle; refused.\n"
                "  Save numbers: episodes of several lengths one after the other, with dones at their ends,\n"
                "  by np.concatenate(list(array)); anything else as array.astype('float32')."
            )
        self._width = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._row, self._last = 0, np.empty((0, *self.shape[1:]), self.dtype)
        self._fortran = fortran and len(self.shape) > 1

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        self._used = True
        start, stop, _ = rows.indices(self.shape[0])
        stop = max(start, stop)
        if self._fortran:
            return np.array(self._unpacked()[start:stop], order="C")
        if start < self._row - len(self._last):
            self._stream.close()
            self._start()
        again = self._last[: stop - start] if start < self._row else self._last[:0]
        while self._row < start:  # what nobody asked for
            self._take(min(start - self._row, max(_PIECE // max(self._width, 1), 1)))
        value = self._take(stop - start - len(again))
        value = np.concatenate([again, value]) if len(again) else value
        self._last = value[-1:].copy() if len(value) else self._last
        return value

    def value(self) -> np.ndarray:
        """A small array without rows, e.g. a number."""
        return np.frombuffer(self._bytes(self._width * (self.shape[0] if self.shape else 1)), self.dtype)

    def finish(self) -> None:
        """Read what is left, if any of it was used, so that the sum of the zip is checked."""
        if self._used and not self._fortran and self.shape:
            self[self.shape[0] : self.shape[0]]
            if self._bytes(1, exact=False):
                raise DataError(f"{self._where} holds more bytes than its header says; the file is damaged.")

    def _take(self, count: int) -> np.ndarray:
        out = np.empty((count, *self.shape[1:]), self.dtype)
        view, at = out.reshape(-1).view(np.uint8), 0
        while at < len(view):
            part = self._bytes(min(_PIECE, len(view) - at))
            view[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
        self._row += count
        self._last = out[-1:].copy() if count else self._last
        return out

    def _bytes(self, count: int, exact: bool = True) -> bytes:
        try:
            part = self._stream.read(count)
            if exact and len(part) < count:
                raise EOFError(f"it ends {count - len(part)} bytes early")
            return part
        except _BROKEN as error:
            raise self._damaged(error) from error

    def _unpacked(self) -> np.ndarray:
        """An array stored column by column has no rows to stream; it is unpacked into a temporary file."""
        if self._file is None:
            file = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            while part := self._bytes(_PIECE, exact=False):
                file.write(part)
            file.flush()
            self._file = file
        try:  # a new map each time: what the last one touched no longer counts as our memory
            return np.memmap(self._file, self.dtype, "r", shape=self.shape, order="F")
        except ValueError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self._where} cannot be read ({str(error)[:90] or type(error).__name__}).\n"
                         "  The file is damaged; delete it and download or record it again.")  # fmt: skip


@contextmanager
def open_npz(path: Path) -> Iterator[dict[str, Member]]:
    """The arrays of a file by name; those that were read are checked to the end when the block ends. Raises
    DataError if the file is absent, truncated, no npz, or holds pickled objects.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
        except _BROKEN as error:
            start = head(path)
            with open(path, "rb") as file:
                zipped = file.read(4) == b"PK\x03\x04"
            what = start if "empty" in start else f"is not an npz file ({start})"
            if zipped:
                what = f"is truncated: {path.stat().st_size:,} bytes, no zip directory at the end"
            raise DataError(f"{path} {what}; delete it and download or record it again.") from error
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        members = {name.removesuffix(".npy"): Member(archive, name, stack) for name in names}
        yield members
        for member in members.values():
            member.finish()


@dataclass
class _Rows:
    """Some rows of an array."""

    member: Member
    first: int
    count: int

    def __post_init__(self) -> None:
        self.shape, self.dtype = (self.count, *self.member.shape[1:]), self.member.dtype

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(self.count)
        return self.member[self.first + start : self.first + stop]


def _aligned(path: Path, members: dict[str, Member]) -> Mapping[str, Column]:
    """T+1 observations beside T actions are one episode with its end: T of them, and as many that follow."""
    by_role = {role: [k for k in members if k.split("/")[0] in NAMES[role]] for role in NAMES}
    steps = {members[k].shape[:1] for k in by_role["action"]}
    count = min(steps)[0] if len(steps) == 1 and () not in steps else 0
    seen = by_role["observation"]
    if by_role["next"] or not count or {members[k].shape[:1] for k in seen} != {(count + 1,)}:
        return members
    for name in (k for role in ("terminated", "truncated", "done") for k in by_role[role]):
        if np.any(members[name][: count - 1]):
            raise DataError(
                f"{path}: {count + 1:,} observations for {count:,} actions, but {name} ends several episodes."
                "\n  Expected as many of both, or a file per episode."
            )
    out: dict[str, Column] = {**members}
    for name in seen:
        alias, slash, rest = name.partition("/")
        after = f"next_{alias if alias == 'obs' else 'observations'}{slash}{rest}"
        out[name], out[after] = _Rows(members[name], 0, count), _Rows(members[name].again(), 1, count)
    return out


def _form(members: dict[str, Member]) -> str:
    found = members.keys()
    if {"is_first", "is_last", "is_terminal"} <= found:
        return "dreamer"
    if {"obs", "actions", "obs_shape"} <= found:
        return "replay"
    other = {"rewards", "reward", "timeouts", "truncations", "dones", "next_observations"}
    return "ogbench" if {"observations", "actions", "terminals"} <= found and not other & found else "demo"


def _replay_is_one_hot(path: Path) -> bool:
    with open_npz(path) as members:
        actions = members.get("actions")
        return actions is not None and actions.dtype.kind == "f" and is_one_hot(actions)


def _agree(path: Path, members: dict[str, Any], table: Table) -> None:
    """The replay form says what its arrays are; believe it only if they are."""
    has = {"obs_shape": tuple(next(iter(table.observation.values())).shape[1:])}
    if "action_dim" in members and len(table.action["action"].shape) == 2:
        has["action_dim"] = table.action["action"].shape[1:]
    for name, shape in has.items():
        if (said := tuple(members[name].value().tolist())) != shape:
            shown = [" x ".join(map(str, x)) or "a number" for x in (said, shape)]
            raise DataError(f"{path}: {name} says {shown[0]}, the array has {shown[1]} per step.")
