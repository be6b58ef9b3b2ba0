"""Flat per-step columns with end marks (D4RL, npz recordings ...) as a stream of episodes.

A column is anything with a shape, a dtype and slices of rows: an h5py dataset, an array, a member of an npz.
Episodes are read in blocks of some 32 MB, so that neither their number nor the size of the file matters.
"""

from __future__ import annotations

import glob
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from datamodules.episodes import Episode, Report, Schema, Source, listed
from datamodules.sources import looked_in
from lit_wm.errors import ConfigError, DataError, nearest
from lit_wm.types import Spaces, Spec

BLOCK = 32 << 20  # bytes that are read at once
LONGEST = 128 << 20  # bytes of observations that one episode may hold in memory; a longer one is cut
_FLAGS = 1 << 20  # rows of a flag column that are read at once
_MAX_CLASSES = 256  # integers of more values are no classes, as in lit_wm.envs

NAMES = {
    "observation": ("observations", "obs", "observation", "states", "state"),
    "action": ("actions", "action"),
    "reward": ("rewards", "reward"),
    "terminated": ("terminals", "terminations", "terminated", "terminal"),
    "truncated": ("timeouts", "truncations", "truncated", "timeout"),
    "done": ("dones", "done"),
    "next": ("next_observations", "next_obs", "next_observation"),
}


class Column(Protocol):
    """One value per step: ``column[a:b]`` reads rows a to b-1; the first axis is the step."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> np.dtype: ...  # noqa: D102
    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclass
class Table:
    """The columns of one file, N steps each.

    Attributes:
        where: the file, for messages.
        observation, action, next: by entry, (N, ...); ``next`` holds o_{t+1} and may be empty.
        reward, terminated, truncated, done: (N,) or (N, 1), None if absent; ``done`` marks ends of either
            kind.
        shared_last: each episode has T+1 rows, of which the last one holds only o_T.
    """

    where: str
    observation: dict[str, Column]
    action: dict[str, Column]
    next: dict[str, Column]
    reward: Column | None
    terminated: Column | None
    truncated: Column | None
    done: Column | None
    shared_last: bool = False

    def __post_init__(self) -> None:
        sizes = {name: column.shape[0] if column.shape else 0 for name, column in self.named()}
        if len(set(sizes.values())) > 1:
            raise DataError(
                f"{self.where}: the lengths differ: {', '.join(f'{k} {n:,}' for k, n in sizes.items())}.\n"
                "  Expected one row per step in each of them; the file is broken or of another format."
            )
        marks = [(k, c) for k, c in self.named() if k in ("reward", "terminated", "truncated", "done")]
        columns = [c for part in (self.observation, self.action) for c in part.values()]
        if not marks and all(len(c.shape) > 2 for c in columns):
            marks = [("action", next(iter(self.action.values())))]  # nothing else tells
        marks = marks if max(len(c.shape) for c in columns) > 2 else []
        for k, (_, *shape) in ((k, c.shape) for k, c in marks):
            width = shape[0] if shape else 1  # (N, 1) stands for (N,)
            if width > 1 and all(c.shape[1:2] in ((width,), (width + 1,)) for c in columns):
                raise DataError(
                    f"{self.where}: {k} has {width:,} values a row, as of episodes side by side.\n"
                    "  Expected all steps one after the other, without padding. Of every array\n"
                    "  np.concatenate([x[:n] for x, n in zip(array, lengths)]), and dones at the ends."
                )
        self.rows = next(iter(sizes.values()))
        if not self.rows:
            raise DataError(f"{self.where} holds no steps.")

    def named(self) -> Iterator[tuple[str, Column]]:
        """All columns with a name for messages."""
        for name in ("observation", "action", "next"):
            group = getattr(self, name)
            yield from ((name if len(group) == 1 else f"{name} {k!r}", c) for k, c in group.items())
        for name in ("reward", "terminated", "truncated", "done"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    @classmethod
    def find(cls, where: str, columns: Mapping[str, Column], drop: Sequence[str] = ()) -> Table:
        """The table that ``columns`` spell, under any of the usual names.

        Raises:
            DataError: without observations or actions, naming what was found.
            ConfigError: if ``drop`` names no observation.
        """

        def group(role: str, root: str) -> dict[str, Column]:
            for alias in NAMES[role]:
                if alias in columns:
                    return {root: columns[alias]}
                inside = {k.split("/", 1)[1]: c for k, c in columns.items() if k.startswith(f"{alias}/")}
                if inside:
                    return inside
            if role == "next":
                return {}
            taken = ", ".join("|".join(NAMES[name]) for name in ("observation", "action", "reward"))
            ends = "|".join(NAMES[name][0] for name in ("terminated", "truncated", "done"))
            raise DataError(
                f"{where} has no {NAMES[role][0]}; found: {', '.join(columns) or 'nothing'}.\n"
                f"  Expected {taken},\n  and at the ends of episodes {ends}.\n"
                "  Rename its arrays, or register a reader: docs/data.md, a source of your own."
            )

        def single(role: str) -> Column | None:
            return next((columns[alias] for alias in NAMES[role] if alias in columns), None)

        observation, following = group("observation", "obs"), group("next", "obs")
        drop = dropped(drop, list(observation), where)
        observation = {k: c for k, c in observation.items() if k not in drop}
        if following and (missing := observation.keys() - following.keys()):
            raise DataError(f"{where}: the next observations lack {min(missing)!r}; "
                            f"found: {', '.join(following)}.")  # fmt: skip
        following = {k: following[k] for k in observation} if following else {}
        for k, c in following.items():
            if c.dtype.kind not in "biuf" or np.prod(c.shape[1:]) != np.prod(observation[k].shape[1:]):
                raise DataError(f"{where}: next observation {k!r} is {c.dtype} {c.shape}, the observation "
                                f"{observation[k].dtype} {observation[k].shape}.")  # fmt: skip
        reward, *flags = (single(role) for role in ("reward", "terminated", "truncated", "done"))
        return cls(where, observation, group("action", "action"), following, reward, *flags)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Ends:
    """Where episodes end: after rows with these marks, at jumps of the first two elements (a position), or
    after so many steps.
    """

    marks: frozenset[str] = frozenset({"terminals", "timeouts"})
    jump: float | None = None
    length: int | None = None
    given: bool = False

    @classmethod
    def parse(cls, split: str | None, episode_length: int | None) -> Ends:
        """``split`` joins ``timeouts``, ``terminals``, ``jump>THR`` and ``length=K`` by ``|``;
        ``episode_length=K`` adds the last one to it, or to the marks of the file.

        Raises:
            ConfigError: for anything else.
        """
        marks, jump, length = set(), None, episode_length
        for word in split.split("|") if split else ("terminals", "timeouts"):
            word = word.replace(" ", "")
            if word in ("terminals", "timeouts"):
                marks.add(word)
            elif match := re.fullmatch(r"jump>(\d*\.?\d+(?:e[+-]?\d+)?)", word):
                jump = float(match[1])
            elif match := re.fullmatch(r"length=(\d+)", word):
                length = int(match[1])
            else:
                raise ConfigError(
                    f"split: {word!r} is no rule{nearest(word, ['timeouts', 'terminals'])}\n"
                    "  Expected timeouts, terminals, jump>NUMBER or length=STEPS, or several joined by '|'."
                )
        if length is not None and (not isinstance(length, int) or length < 1):
            raise ConfigError(f"episode_length is {length!r}; expected a number of steps from 1.")
        return cls(frozenset(marks), jump, length, split is not None)


class FlatSource(Source):
    """Episodes of one or several files of flat columns; a subclass calls :meth:`setup`."""

    def setup(
        self,
        files: list[Path],
        read: Callable[[Path], AbstractContextManager[Table]],
        *,
        last_obs: str | None = None,
        dones_are: str = "ends",
        ends: Ends | None = None,
        classes: int | None = None,
        discrete: bool | None = None,
        may_be_open: bool = False,
    ) -> None:
        """Check the options and infer the schema; ``meta`` has to be there.

        Args:
            files: in the order of their episodes.
            read: opens a file.
            last_obs: see :func:`~datamodules.episodes.completed`; None is ``terminal``, and anything but
                ``error`` ignores next observations.
            dones_are: ``ends``: ``dones`` without a second column mark cuts; ``terminals``: the task ended.
            ends: where episodes end.
            classes: number of classes of the actions; None: the largest one in the data and one.
            discrete: whether actions are classes or one-hot vectors of them; None: integers are classes.
            may_be_open: a file without any end is one truncated episode, rather than an error.
        """
        self._use_next, last_obs = last_obs in (None, "error"), last_obs or "terminal"
        for name, value, allowed in (
            ("last_obs", last_obs, ("terminal", "repeat", "drop", "error")),
            ("dones_are", dones_are, ("ends", "terminals")),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; expected {', '.join(allowed)}.")
        if classes is not None and (not isinstance(classes, int) or classes < 1):
            raise ConfigError(f"classes is {classes!r}; expected the number of actions.")
        self.files, self.last_obs = files, last_obs
        self._read, self._ends, self._dones_are = read, ends or Ends(), dones_are
        self._may_be_open, self._discrete = may_be_open, discrete
        self.total_steps = 0
        found: dict[tuple[str, str], Spec] = {}
        for file in files:
            with read(file) as table:
                self.total_steps += table.rows
                for role in ("observation", "action"):
                    for key, column in getattr(table, role).items():
                        where = f"{table.where}: {role} {key!r}"
                        spec = infer(where, column, role == "action", classes, discrete)
                        known = found.setdefault((role, key), spec)
                        if (spec.dtype, spec.shape) != (known.dtype, known.shape):
                            raise DataError(
                                f"{where} is {spec.dtype} {spec.shape},\n"
                                f"  but {known.dtype} {known.shape} in {files[0]}.\n"
                                "  Expected files of one kind; name them by a pattern."
                            )
                        if spec.classes and known.classes and spec.classes > known.classes:
                            found[role, key] = spec
                if self.meta.setdefault("no_reward", table.reward is None) != (table.reward is None):
                    raise DataError(f"{files[0]} and {table.where}: only one of them has rewards.")
        obs, action = (
            {k: s for (r, k), s in found.items() if r == role} for role in ("observation", "action")
        )
        # No bounds: nobody knows them. Whatever rescales actions to [-1, 1] has to take these as they are.
        self.schema = Schema(Spaces(obs, action))

    def episodes(self) -> Iterator[Episode]:
        """All episodes, file by file."""
        for file in self.files:
            with self._read(file) as table:
                yield from self._table(table)

    def _table(self, table: Table) -> Iterator[Episode]:
        start, stop, more, terminated, truncated = self._spans(table)
        specs = self.schema.spaces
        after = table.next if self._use_next and not table.shared_last else {}
        columns = [c for part in (table.observation, table.action, after) for c in part.values()]
        width = sum(map(row_bytes, [*columns, *([] if table.reward is None else [table.reward])]))
        found = _Following()

        def read(part: Mapping[str, Column], a: int, b: int) -> dict[str, np.ndarray]:
            return {k: fitted(specs.obs.get(k), np.asarray(c[a:b])) for k, c in part.items()}

        first, number = 0, 0
        while first < len(start):
            last = first + 1
            while last < len(start) and (stop[last] + more[last] - start[first]) * width <= BLOCK:
                last += 1
            low, high, extra = int(start[first]), int(stop[last - 1]), int(more[last - 1])
            seen = read(table.observation, low, high + extra)
            done = {}
            for k, c in table.action.items():
                where = f"{table.where}: action {k!r}"
                done[k] = self._action(where, specs.action.get(k), np.asarray(c[low:high]), low)
            reward = None if table.reward is None else np.asarray(table.reward[low:high])
            # Of an episode beyond a block only the beginning and the end are compared.
            near = read(after, low, min(high, low + max(BLOCK // width, 1)))
            found.add(seen, near, (stop[first:last] - 1 - low)[~more[first:last]])
            for i in range(first, last):
                a, b = int(start[i]) - low, int(stop[i]) - low
                observation = {k: v[a : b + int(more[i])] for k, v in seen.items()}
                for k, c in after.items() if not more[i] else ():
                    end = near[k][b - 1 : b]
                    if not len(end):
                        end = read({k: c}, int(stop[i]) - 1, int(stop[i]))[k]
                        found.add({k: seen[k][b - 1 :]}, {k: end}, np.zeros(1, np.int64))
                    observation[k] = np.concatenate([observation[k], end])
                flags = np.zeros((2, b - a), np.bool_)
                flags[0, -1:], flags[1, -1:] = terminated[i], truncated[i]
                where = f"{table.where}, episode {number}"
                action, some = {k: v[a:b] for k, v in done.items()}, None if reward is None else reward[a:b]
                yield Episode(observation, action, some, flags[0], flags[1], where)
                number += 1
            first = last
        found.judge(table.where, self.report)

    def _action(self, where: str, spec: Spec | None, value: np.ndarray, row: int) -> np.ndarray:
        if spec is None or spec.shape or not spec.is_discrete or value.ndim != 2 or value.shape[1] == 1:
            return fitted(spec, value)
        return from_one_hot(value, where, row, "\n  discrete=false reads these actions as vectors.")

    def _spans(self, table: Table) -> tuple[np.ndarray, ...]:
        """Per episode: first transition, one past the last, whether the next row is its o_T, both flags."""
        rule, report, n, where = self._ends, self.report, table.rows, table.where
        marks = {"terminals": _marked(table.terminated, where), "timeouts": _marked(table.truncated, where)}
        have = {"terminals": table.terminated is not None, "timeouts": table.truncated is not None}
        done = _marked(table.done, where)
        if table.done is not None and not all(have.values()):
            # Beside one of the two kinds, the marks of either kind say the other one.
            kind = "terminals" if have["timeouts"] or self._dones_are == "terminals" else "timeouts"
            kind = "timeouts" if have["terminals"] else kind
            marks[kind] = np.setdiff1d(done, marks["terminals" if kind == "timeouts" else "timeouts"])
            if not any(have.values()) and kind == "timeouts":
                note = "dones are ends of unknown kind, read as truncations: a continue head sees no terminal"
                self.warn("dones", f"{where}: {note}; dones_are=terminals if they are terminations.")
            have[kind] = True
        for name in sorted(rule.marks if rule.given else ()):
            if not have[name]:
                raise DataError(f"{where} has no {name} to split by; found: "
                                f"{', '.join(name for name, _ in table.named())}.")  # fmt: skip
        ends = np.unique(np.concatenate([marks[name] for name in rule.marks] or [np.empty(0, np.int64)]))
        if rule.jump is not None:
            ends = np.union1d(ends, _jumps(table, rule.jump))
        if not len(ends) and rule.length is None:
            none = f"{where}: no episode end found in {n:,} steps"
            if not self._may_be_open:
                raise DataError(f"{none}; give episode_length= or split=.")
            self.warn("no_end", f"{none}: read as one truncated episode.")
        elif rule.length is None and ends[-1] != n - 1:
            note = f"{where}: rows {ends[-1] + 1:,} to {n - 1:,} follow the last end: kept as truncated."
            self.warn("open_end", note) if self._may_be_open else report.count("open_end", note)
        if not len(ends) or ends[-1] != n - 1:
            ends = np.append(ends, n - 1)
        if rule.length is not None:
            starts = np.concatenate([[0], ends[:-1] + 1])
            cuts = [np.arange(a + rule.length - 1, b, rule.length) for a, b in zip(starts, ends, strict=True)]
            ends = np.union1d(ends, np.concatenate(cuts))
        for name, rows in marks.items():
            if name not in rule.marks and (left := len(np.setdiff1d(rows, ends))):
                note = f"{where}: {left:,} {name} in the middle of episodes are ignored, as split says"
                report.count(f"{name}_ignored", note, left)
        start, stop = np.concatenate([[0], ends[:-1] + 1]), ends + (0 if table.shared_last else 1)
        terminated, truncated = np.isin(ends, marks["terminals"]), np.isin(ends, marks["timeouts"])
        spans = (start, stop, np.full(len(ends), table.shared_last), terminated, truncated | ~terminated)
        row = sum(map(row_bytes, table.observation.values()))
        return _pieces(spans, row, where, report) if (stop - start).max() * row > LONGEST else spans

    def warn(self, name: str, note: str) -> None:
        """Note it in the report, and say the first of its kind aloud."""
        if not self.report.counts[name]:
            warnings.warn(note, stacklevel=2)
            self.report.warnings[name] = note
        self.report.count(name, note)


class _Following:
    """Whether next observations are what they say: o_{t+1} within episodes, and something at ends."""

    def __init__(self) -> None:
        self.ends = self.zero = self.inside = self.differs = self.moved = self.copies = self.rows = 0

    def add(self, seen: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], ends: np.ndarray) -> None:
        """Rows of observations and as many or fewer of the next ones; ``ends``: the last rows of episodes."""
        if not after:
            return
        n = len(next(iter(after.values())))
        last = np.isin(np.arange(n), ends)
        at = np.flatnonzero(~last & (np.arange(n) + 1 < min(len(seen[k]) for k in after)))
        ends = np.flatnonzero(last)
        # A true image may be all black, and a single number zero.
        vectors = [k for k, v in after.items() if v.dtype.kind == "f" and v[0].size > 1]
        zero, differs = np.full(len(ends), bool(vectors)), np.zeros(n, np.bool_)
        copy, moved = np.full(n, self.copies == self.rows), np.zeros(len(at), np.bool_)
        for k, value in after.items():
            here, there = (x.reshape(len(x), -1) for x in (seen[k], value))
            if copy.any():  # else it does not matter any more
                copy &= (here[:n] == there).all(1)
                moved |= (here[at + 1] != here[at]).any(1)
            if k in vectors:
                zero &= ~there[ends].any(1) & here[ends].any(1)
            odd = at[~(here[1 : n + 1] == there[: len(here) - 1]).all(1)[at]]
            if there.dtype.kind == "f":
                odd = odd[~np.isclose(here[odd + 1], there[odd], 1e-3, 1e-5, True).all(1)]
                odd = odd[np.isfinite([here[odd + 1], there[odd]]).all((0, 2))]  # else a bad episode anyway
            differs[odd] = True
        self.rows += n
        self.ends, self.inside = self.ends + len(ends), self.inside + len(at)
        for name, rows in (("zero", zero), ("differs", differs), ("moved", moved), ("copies", copy)):
            setattr(self, name, getattr(self, name) + int(rows.sum()))

    def judge(self, where: str, report: Report) -> None:
        """Refuse what is wrong everywhere, count what is wrong here and there."""
        wrong = "zero at the end of every episode" if self.ends and self.zero == self.ends else ""
        wrong = "equal to the observations" if self.moved and self.copies == self.rows else wrong
        if wrong:
            raise DataError(
                f"{where}: the next observations are {wrong}: they do not say how an episode ended.\n"
                "  Expected o_t+1 in row t; last_obs=terminal ignores them."
            )
        if self.zero:
            note = f"{where}: the next observations are zero at {self.zero:,} of {self.ends:,} ends"
            report.count("next_zero", note, self.zero)
        if self.differs:
            note = f"{where}: in {self.differs:,} of {self.inside:,} rows within episodes the next"
            report.count("next_differs", f"{note} observation is not that of the next row", self.differs)


def _pieces(spans: tuple[np.ndarray, ...], row: int, where: str, report: Report) -> tuple[np.ndarray, ...]:
    out = []
    for start, stop, more, terminated, truncated in zip(*spans, strict=True):
        for a, b in pieces(stop - start, row, where, report):
            end = start + b == stop
            more_, ended = more if end else True, terminated and end
            out.append((start + a, start + b, more_, ended, truncated if end else True))
    return tuple(np.array(column) for column in zip(*out, strict=True))


def pieces(steps: int, row: int, where: str, report: Report) -> list[tuple[int, int]]:
    """Where to cut an episode that is too long for memory: first step of each piece and one past its last.

    The last observation of a piece is the first of the next one; ``report`` counts the cuts under
    ``too_long``.

    Args:
        steps: of the episode.
        row: bytes of one step's observations.
        where, report: for the note.
    """
    limit = max(LONGEST // max(row, 1), 1)
    cuts = [*range(0, max(steps, 1), limit), steps]
    if len(cuts) > 2:
        note = f"{where}: an episode of {steps:,} steps is cut every {limit:,}, to fit into memory"
        report.count("too_long", note, len(cuts) - 2)
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def infer(
    where: str, column: Column, is_action: bool, classes: int | None = None, discrete: bool | None = None
) -> Spec:
    """What a column is, as :func:`lit_wm.envs.spaces_from_gym` would call it.

    uint8 with three axes per step (or two of at least 32) are images; integers without an axis are classes
    from 0 up to their maximum, as are integer actions with one; all else are float32 vectors.

    Raises:
        DataError: for text, objects, and actions that cannot be classes.
    """
    shape, kind = tuple(column.shape[1:]), column.dtype.kind
    if kind not in "biuf":
        raise DataError(f"{where} has the type {column.dtype}; expected numbers.")
    if not is_action and (spec := seen(column.dtype, shape)).is_image:
        return spec
    scalar = shape in ((), (1,))
    if is_action and kind == "f" and discrete and len(shape) == 1 and not scalar:
        return Spec("int32", (), shape[0])
    given = discrete if is_action else None
    wanted = given or (given is None and (kind != "f" or (is_action and classes is not None)))
    if wanted and (is_action or (kind in "iu" and scalar)):
        low, high = 0, (classes or 0) - 1
        if not (is_action and classes):
            ranges = [(v.min(), v.max()) for v in blocks(column)]
            low, high = int(min(a for a, _ in ranges)), int(max(b for _, b in ranges))
        if is_action and (low < 0 or (high >= _MAX_CLASSES and not classes and not discrete)):
            raise DataError(
                f"{where} holds integers from {low} to {high}; expected classes from 0 to {_MAX_CLASSES - 1} "
                "at most.\n  discrete=false reads them as vectors, classes=N allows more."
            )
        if is_action or (low >= 0 and high < _MAX_CLASSES):
            return Spec("int32", () if scalar else shape, high + 1)
    return Spec("float32", shape or (1,))


def seen(dtype: np.dtype, shape: tuple[int, ...]) -> Spec:
    """The entry of an observation that no space describes: images as in a space, truths, else numbers."""
    flat = dtype == np.uint8 and len(shape) == 2 and min(shape) >= 32
    if dtype == np.uint8 and (flat or len(shape) == 3):
        return Spec("uint8", (*shape, 1) if flat else shape)
    return Spec("int32", shape, 2) if dtype == np.bool_ else Spec("float32", shape)


def from_one_hot(value: np.ndarray, where: str, first: int = 0, hint: str = "") -> np.ndarray:
    """Class numbers (n,) of one-hot rows (n, classes), which are numbered from ``first`` on.

    Raises:
        DataError: if a row is not one-hot.
    """
    if len(odd := np.flatnonzero(~_one_hot(value))):
        raise DataError(f"{where}, row {first + odd[0]} is not one-hot: {value[odd[0]].tolist()}; expected "
                        f"one-hot rows: a single 1, else zeros.{hint}")  # fmt: skip
    return value.argmax(1)


def dropped(drop: str | Sequence[str], known: Sequence[str], where: str) -> list[str]:
    """The names of the option ``drop``: a list, or text with commas.

    Raises:
        ConfigError: for a name that is no observation.
    """
    wanted = listed(drop)
    if unknown := [name for name in wanted if name not in known]:
        near = nearest(unknown[0], list(known))
        raise ConfigError(f"{where}: drop names {unknown[0]!r}, which is no observation{near}\n"
                          f"  Observations: {', '.join(known)}")  # fmt: skip
    return wanted


def is_one_hot(column: Column) -> bool:
    """Whether each row has a single 1 and zeros else, in two columns or more."""
    return len(column.shape) == 2 and column.shape[1] > 1 and all(_one_hot(v).all() for v in blocks(column))


def blocks(column: Column) -> Iterator[np.ndarray]:
    """A column in pieces of bounded size."""
    rows = max(BLOCK // max(row_bytes(column), 1), 1)
    return (np.asarray(column[a : a + rows]) for a in range(0, column.shape[0], rows))


def expand(scheme: str, rest: str, suffixes: tuple[str, ...]) -> tuple[list[Path], bool]:
    """The files a path, pattern or folder means, in natural order, and whether it named them by a pattern.

    Raises:
        DataError: if there is none.
    """
    path = Path(rest).expanduser()
    if path.is_file():
        return [path], False
    if path.is_dir():
        found: Iterable[Path] = (p for p in path.rglob("*") if p.suffix in suffixes)
    else:
        found = map(Path, glob.glob(str(path), recursive=True))
    files = sorted((p for p in found if p.is_file()), key=lambda p: _natural(str(p)))
    if not files:
        beside = sorted(p.name for s in suffixes for p in path.parent.glob(f"*{s}"))
        there = f"\n  In {path.parent} there are: {', '.join(beside[:8])}" if beside else ""
        kind = "holds no " + " or ".join(suffixes) + " file" if path.is_dir() else "does not exist"
        raise DataError(f"{scheme}: {path} {kind}{nearest(path.name, beside)}{there}\n"
                        "  Expected a file, a folder or a pattern such as 'demos/*.npz'"
                        f"{looked_in(path)}.")  # fmt: skip
    return files, True


def head(path: Path) -> str:
    """How a file begins, for messages about files of another format."""
    with open(path, "rb") as file:
        start = file.read(24)
    if not start:
        return "is empty (0 bytes)"
    return f"starts with {start.decode('latin-1').splitlines()[0][:16]!r}"


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def row_bytes(column: Column) -> int:
    """Bytes of one step."""
    return int(np.prod(column.shape[1:], dtype=np.int64)) * column.dtype.itemsize


def fitted(spec: Spec | None, value: np.ndarray) -> np.ndarray:
    """The rows in the shape of their spec, if only axes of length one differ."""
    if spec and [n for n in value.shape[1:] if n != 1] == [n for n in spec.shape if n != 1]:
        return value.reshape(len(value), *spec.shape)
    return value


def _one_hot(value: np.ndarray) -> np.ndarray:
    return ((value == 0) | (value == 1)).all(1) & (value.sum(1) == 1)


def _marked(column: Column | None, where: str) -> np.ndarray:
    """Rows whose flag is set."""
    rows = [np.empty(0, np.int64)]
    for start in range(0, column.shape[0] if column is not None else 0, _FLAGS):
        flag = np.asarray(column[start : start + _FLAGS])  # type: ignore[index]
        if flag.dtype.kind not in "biuf" or flag.size != len(flag):
            raise DataError(f"{where}: an end mark has the type {flag.dtype} and the shape {column.shape}; "  # type: ignore[union-attr]
                            "expected one 0 or 1 per step.")  # fmt: skip
        flag = flag.reshape(-1)
        if len(odd := np.flatnonzero((flag != 0) & (flag != 1))):
            what = f"{where}: an end mark in row {start + odd[0]} is {flag[odd[0]]}"
            raise DataError(f"{what}; expected 0 or 1.")
        rows.append(np.flatnonzero(flag) + start)
    return np.concatenate(rows)


def _jumps(table: Table, threshold: float) -> np.ndarray:
    """Rows after which the first two elements move by more than the threshold."""
    key, column = next(iter(table.observation.items()))
    if len(table.observation) > 1 or len(column.shape) != 2 or column.dtype.kind != "f":
        raise ConfigError(f"{table.where}: split=jump>{threshold:g} needs a single vector of observations.")
    rows, last = [], np.empty((0, min(column.shape[1], 2)), column.dtype)
    start = 0
    for value in blocks(column):
        place = np.concatenate([last, value[:, :2]]).astype(np.float64)
        far = np.linalg.norm(np.diff(place, axis=0), axis=1) > threshold
        rows.append(np.flatnonzero(far) + start - len(last))
        start, last = start + len(value), value[-1:, :2]
    return np.concatenate(rows)
