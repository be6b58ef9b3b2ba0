"""From Gymnasium spaces, which files are described by, to a schema, and from nested arrays to its columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from datamodules.episodes import Arrays, Schema
from lit_wm.envs.wrappers import Classes, Entries, Image, Vector, entry_specs
from lit_wm.errors import DataError, EnvError
from lit_wm.types import Spaces, Spec

Path = tuple[str | int, ...]
Getter = Callable[["Leaf"], Any]


class Leaf(NamedTuple):
    """One leaf of a nested space."""

    path: Path  # keys of Dict and numbers of Tuple spaces that lead to it
    name: str  # the path joined by "/"; "obs" or "action" for a space that is not nested
    space: spaces.Space
    text: bool  # whether its values are strings


def leaves(space: spaces.Space, root: str, path: Path = ()) -> list[Leaf]:
    """All leaves of ``space`` in its own order."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        items = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        return [leaf for key, sub in items for leaf in leaves(sub, root, (*path, key))]
    return [Leaf(path, "/".join(map(str, path)) or root, space, isinstance(space, spaces.Text))]


class Columns:
    """The entries of one space, named as ``lit_wm.envs.spaces_from_gym`` does, and how data become them.

    Args:
        space: of the observations or of the actions.
        root: ``obs`` or ``action``, the name of a space that is not nested.
        where: the dataset, for messages.
        drop: names of leaves to leave out.
        words: by name of a Text leaf, its strings; their places in the list become the classes.

    Attributes:
        specs: by entry.
        low, high: of continuous actions with a finite bound, in the space's units, by entry.
        unbounded: continuous actions with an element that has no bounds.
        start: first class number of entries that do not count from 0, by leaf; 0 is it here.
        leaves: those that are read.

    Raises:
        DataError: for Text without words, Graph, Sequence and other spaces, naming the entry.
    """

    def __init__(
        self, space: spaces.Space, root: str, where: str, drop: Sequence[str] = (),
        words: Mapping[str, Sequence[str]] | None = None,
    ):  # fmt: skip
        words, known = words or {}, [leaf.name for leaf in leaves(space, root)]
        self._ids = {name: {word: i for i, word in enumerate(texts)} for name, texts in words.items()}
        drop = [name for name in drop if name in known]
        for leaf in leaves(space, root):
            if leaf.text and leaf.name not in (*words, *drop):
                raise DataError(
                    f"{where}: {'observation' if root == 'obs' else 'action'} {leaf.name!r} is Text.\n"
                    f"  Leave it out with drop={leaf.name}, or use text=ids: each string becomes a class."
                )
        try:
            entries = Entries(_numbered(space, root, words), root, where, drop=drop)
        except EnvError as error:
            hint = "\n  Leave observations out with drop=NAME." if root == "obs" else ""
            raise DataError(str(error).splitlines()[0] + hint) from error
        by_path = {leaf.path: leaf for leaf in leaves(space, root)}
        self._entries = [(by_path[path], entry) for path, entry in entries.leaves]
        self.leaves = [leaf for leaf, _ in self._entries]
        self.specs: dict[str, Spec] = entry_specs(entries.space)
        self.low: Arrays = {}
        self.high: Arrays = {}
        self.unbounded: tuple[str, ...] = ()
        self.start: dict[str, list[int]] = {}
        for leaf, entry in self._entries:
            if isinstance(entry, Classes) and entry.start.any():
                self.start[leaf.name] = entry.start.reshape(-1).tolist()
            if root == "action" and isinstance(entry, Vector):
                low, high = entry.low.astype(np.float64), entry.high.astype(np.float64)
                if np.isfinite([low, high]).any():
                    self.low[leaf.name], self.high[leaf.name] = low, high
                self.unbounded += () if entry.bounded else (leaf.name,)

    def read(self, get: Getter) -> Arrays:
        """Columns of n steps from what ``get`` returns for each leaf: an array (n, ...), or n strings.

        Numbers keep their type, so that the checks that follow see what the source holds; images get their
        third axis, classes begin at 0. Raises DataError for a string that is not among the words.
        """
        out: Arrays = {}
        for leaf, entry in self._entries:
            value = get(leaf)
            if leaf.text:
                ids = self._ids[leaf.name]
                if unknown := [word for word in value if word not in ids]:
                    raise DataError(f"{leaf.name}: {unknown[0]!r} is not among its {len(ids)} known strings.")
                value = [ids[word] for word in value]
            value = np.asarray(value)
            shape = () if leaf.text else leaf.space.shape
            if shape == () and value.shape[1:] == (1,):
                value = value[:, 0]
            if isinstance(entry, Classes):
                if entry.start.any() and value.dtype.kind in "biuf" and value.shape[1:] == shape:
                    kind = value.dtype if value.dtype.kind == "f" else np.int64
                    value = value.astype(kind) - entry.start.astype(kind)
                if entry.split and value.shape[1:] == shape:
                    elements = np.moveaxis(value.reshape(len(value), -1), 1, 0)
                    out |= dict(zip(entry.spaces, elements, strict=True))
                    continue
            elif isinstance(entry, Image) and value.ndim == 3:
                value = value[..., None]
            out |= dict.fromkeys(entry.spaces, value)
        return out


def schema(obs: Columns, action: Columns, episode_length: int | None = None) -> Schema:
    """The schema of a dataset; ``episode_length`` is its environment's time limit in decisions."""
    spaces = Spaces(obs.specs, action.specs, episode_length, action.unbounded)
    return Schema(spaces, action.low, action.high)


def _numbered(space: spaces.Space, root: str, words: Mapping[str, Any], path: Path = ()) -> spaces.Space:
    """The space with Discrete in the place of Text."""
    if isinstance(space, spaces.Dict):
        pairs = [(k, _numbered(sub, root, words, (*path, k))) for k, sub in space.spaces.items()]
        return spaces.Dict(pairs)
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_numbered(sub, root, words, (*path, i)) for i, sub in enumerate(space.spaces)])
    name = "/".join(map(str, path)) or root
    return spaces.Discrete(len(words[name])) if name in words else space
