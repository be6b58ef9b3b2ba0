"""DreamerV3's replay folders: chunks of a stream named ``time-uuid-successor-length.npz``.

The layout is that of ``embodied/core/chunk.py`` and ``replay.py`` in danijar/dreamerv3.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.episodes import Arrays, Episode, Schema, Source
from datamodules.sources import flat
from datamodules.sources.flat import dropped, from_one_hot, seen
from lit_wm.errors import DataError
from lit_wm.types import Spaces, Spec

NAME = re.compile(r"(?P<time>[0-9TF]+)-(?P<uuid>\w+)-(?P<next>\w+)-(?P<length>\d+)\.npz")
_FLAGS = ("is_first", "is_last", "is_terminal")
_OTHER = ("reward", "stepid", "reset", "consec", *_FLAGS)
_LATENT = ("dyn/", "enc/", "dec/", "log/")


class DreamerChunks(Source):
    """The streams of a Dreamer replay, each a chain of chunks; episodes run across the chunks.

    Row t holds o_t, the reward that came with it and the action chosen at it; an episode ends at ``is_last``,
    or where its chain does, which counts as truncated. Latent states and step numbers are left out. A chunk
    and an open episode are in memory at a time.

    Args:
        files: the chunks.
        tolerate: leave unreadable chunks out and count them; what they cut ends there.
        classes: number of classes of integer actions, one for all or by name; else the greatest value + 1.
        discrete: float actions are one-hot vectors of classes.
        actions: names of the action columns.
        drop: observations to leave out.

    Raises:
        DataError: if a chunk is damaged or a column missing.
        ConfigError: for names in ``drop`` that do not exist.
    """

    version = 2

    def __init__(
        self, files: Sequence[str | Path], tolerate: bool = False,
        classes: int | Mapping[str, int] | None = None, discrete: bool = False,
        actions: str | Sequence[str] = ("action",), drop: str | Sequence[str] = (),
    ):  # fmt: skip
        self._discrete, self._tolerate = discrete, tolerate
        self._actions = [actions] if isinstance(actions, str) else list(actions)
        self.files = self._unique([Path(path) for path in files])
        heads: dict[Path, Arrays] = {}
        for path in list(self.files):
            try:
                heads[path] = _read(path, self._actions if heads else None)
            except DataError as error:
                if not tolerate:
                    raise
                self.report.count("unreadable_chunks", str(error).splitlines()[0])
        if not heads:
            raise DataError(f"none of the {len(self.files)} chunks can be read, e.g. {files[:1]}.")
        self._chunks = {NAME.fullmatch(path.name)["uuid"]: path for path in heads}  # type: ignore[index]
        where, first = next(iter(heads.items()))
        _require(first, where, self._actions)
        names = [k for k in first if not (k in _OTHER or k in self._actions or k.startswith(_LATENT))]
        drop = dropped(drop, names, str(where))
        obs = {k: seen(first[k].dtype, first[k].shape[1:]) for k in names if k not in drop}
        action = {}
        for k in self._actions:
            given = classes.get(k) if isinstance(classes, Mapping) else classes
            action[k] = self._acted(k, [head[k] for head in heads.values()], given)
        self._obs = {k if len(obs) > 1 else "obs": k for k in obs}
        obs = dict(zip(self._obs, obs.values(), strict=True))
        self.schema = Schema(Spaces(obs, action))
        self.meta = {"format": "dreamer_chunks"}

    def _unique(self, files: list[Path]) -> list[Path]:
        """Files by time; of a chunk that was saved twice, the longer one."""
        best: dict[str, tuple[str, int, Path]] = {}
        for path in files:
            if (match := NAME.fullmatch(path.name)) is None:
                raise DataError(f"{path} is not named time-uuid-successor-length.npz as chunks of Dreamer.")
            if (length := int(match["length"])) > best.get(match["uuid"], ("", -1, path))[1]:
                best[match["uuid"]] = (match["time"], length, path)
        return [path for *_, path in sorted(best.values())]

    def _acted(self, name: str, parts: list[np.ndarray], classes: int | None) -> Spec:
        shape, kind = parts[0].shape[1:], parts[0].dtype.kind
        if kind == "f":
            return (
                Spec("int32", (), shape[0]) if self._discrete and len(shape) == 1 else Spec("float32", shape)
            )
        top = max(int(part.max(initial=0)) for part in parts)
        return Spec("int32", shape, classes or max(top + 1, 2))

    def _streams(self) -> Iterator[list[Path]]:
        """Chains of chunks, the oldest first."""
        after = {uuid: NAME.fullmatch(path.name)["next"] for uuid, path in self._chunks.items()}  # type: ignore[index]
        left = dict(self._chunks)
        heads = [uuid for uuid in self._chunks if uuid not in set(after.values())]
        for uuid in (*heads, *self._chunks):  # the second time finds chains that are rings
            chain = []
            while uuid in left:
                chain.append(left.pop(uuid))
                uuid = after[uuid]
            if chain:
                yield chain

    def episodes(self) -> Iterator[Episode]:
        """Episodes stream by stream."""
        for chain in self._streams():
            parts: list[Arrays] = []
            where = ""
            for path in chain:
                try:
                    chunk = _read(path, None)
                except DataError as error:
                    if not self._tolerate:
                        raise
                    self.report.count("unreadable_chunks", str(error).splitlines()[0])
                    if parts:
                        yield self._episode(parts, where)
                    parts = []
                    continue
                _require(chunk, path, (*self._obs.values(), *self._actions))
                first, last = (chunk[k].reshape(-1).astype(bool) for k in ("is_first", "is_last"))
                ends = last | np.append(first[1:], False)  # a reset ends what lacks its end mark
                start = 0
                if parts and first[0]:
                    yield self._episode(parts, where)
                    parts = []
                for stop in sorted({*(np.flatnonzero(ends) + 1).tolist(), len(ends)} - {0}):
                    where = where if parts else f"{path.name}, row {start}"
                    parts.append({k: v[start:stop] for k, v in chunk.items()})
                    if ends[stop - 1]:
                        yield self._episode(parts, where)
                        parts = []
                    elif sum(part[k].nbytes for part in parts for k in self._obs.values()) > flat.LONGEST:
                        self.report.count("too_long", f"{where}: its episode is cut, to fit into memory")
                        yield self._episode(parts, where)
                        parts = [{k: v[-1:] for k, v in parts[-1].items()}]  # the next piece begins with it
                    start = stop
            if parts:
                self.report.count("open_end", f"{where}: its stream ends before it does: taken as truncated")
                yield self._episode(parts, where)

    def _episode(self, parts: list[Arrays], where: str) -> Episode:
        rows = {k: np.concatenate([part[k] for part in parts])
                for k in (*self._obs.values(), *self._actions, "reward", *_FLAGS)}  # fmt: skip
        if not rows["is_first"].reshape(-1)[0]:
            self.report.count("no_start", f"{where}: the beginning of its episode is not there")
        action = {k: rows[k][:-1] for k in self._actions}
        for k, spec in self.schema.spaces.action.items():
            if spec.is_discrete and action[k].dtype.kind == "f":
                try:
                    action[k] = from_one_hot(action[k], f"{where}: action {k!r}")
                except DataError as error:
                    return Episode.unreadable(where, error)
        specs = self.schema.spaces.obs
        observation = {name: rows[k].reshape(-1, *specs[name].shape) for name, k in self._obs.items()}
        terminated = rows["is_terminal"][1:]
        truncated = rows["is_last"][1:].astype(bool) & ~terminated.astype(bool)
        truncated[-1:] |= ~terminated[-1:].astype(bool)
        return Episode(observation, action, rows["reward"][1:], terminated, truncated, where)


def _require(chunk: Arrays, path: Path, names: Sequence[str]) -> None:
    for name in (*names, "reward", *_FLAGS):
        if name not in chunk:
            raise DataError(f"{path} has no {name!r}; found: {', '.join(chunk)}.")


def _read(path: Path, keys: Sequence[str] | None) -> dict[str, Any]:
    """The columns of a chunk, all but latent ones or those of ``keys``, each as long as its name says."""
    length = int(NAME.fullmatch(path.name)["length"])  # type: ignore[index]
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [k for k in keys or () if k not in file]:
                raise DataError(f"{path} has no {missing[0]!r}; found: {', '.join(file)}.")
            wanted = [k for k in file if not k.startswith(_LATENT)] if keys is None else keys
            rows = {k: file[k] for k in wanted}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); {path.stat().st_size:,} bytes.\n"
            "  Restore it, or use tolerate=true, which leaves such chunks out."
        ) from error
    for k, value in rows.items():
        if value.shape[:1] != (length,):
            raise DataError(f"{path}: {k!r} has the shape {value.shape}; its name says {length} rows.")
    return rows
