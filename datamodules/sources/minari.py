"""Minari datasets: HDF5, Arrow and Parquet folders, read without Minari's own loop.

Written against Minari 0.5.4, whose readers ``tests/datamodules/sources/test_minari.py`` compares with.
"""

from __future__ import annotations

import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.episodes import Episode, Source
from datamodules.sources import flat, register
from datamodules.sources.flat import dropped
from datamodules.sources.hdf5 import Dataset, child, episode_group, open_hdf5, reading
from datamodules.spaces import Columns, Leaf, leaves, schema
from lit_wm.errors import ConfigError, DataError, nearest

_SPACES = ("Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple", "Text")
_FRAMES = 16  # images that one thread decodes at a time
_BATCH = 1 << 30  # bytes of a compressed batch
_FETCH = "  Fetch the dataset again."
_AGAIN = "  Fetch the dataset again, or leave the episode out with on_bad=skip_episode."


@register("minari")
class Minari(Source):
    """A Minari dataset on disk.

    Observations, actions, ends, seeds and rewards, if there are any, are read; infos are not. A combined
    dataset is read as it is stored. One episode is in memory at a time; longer ones are cut as in
    :mod:`datamodules.sources.flat`.

    Args:
        rest: an id such as ``D4RL/door/human-v2``, or the path of a dataset's folder or its ``data`` folder.
        root: folder of the datasets; else ``$MINARI_DATASETS_PATH``, else ``~/.minari/datasets``.
        download: let Minari's client fetch an id that is not there.
        drop: observations to leave out, a list or text with commas.
        text: ``ids`` turns each string of a Text space into a class; the strings are in ``meta``.
        last_obs: for episodes that lack their last observation, see :class:`datamodules.episodes.Source`.

    Raises:
        DataError: if the dataset is absent, damaged or of a space that no model takes.
        ConfigError: for another ``text``.
    """

    _rewarded = True  # whether any episode has rewards

    def __init__(
        self,
        rest: str,
        root: str | None = None,
        download: bool = False,
        drop: str | Sequence[str] = (),
        text: str | None = None,
        last_obs: str = "error",
    ):
        if text not in (None, "ids"):
            raise ConfigError(f"text is {text!r}; expected ids, or nothing.")
        self.last_obs = last_obs
        self.data, self.name = _find(rest, root, download)
        meta = self._metadata()
        self._format = meta.get("data_format", "hdf5")
        self._jpeg = bool(meta.get("jpeg_encoding", True))
        try:
            spec = json.loads(meta.get("env_spec") or "{}")
            if not isinstance(spec, dict):
                raise ValueError("not an object")
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{self.name}: env_spec in metadata.json is not JSON ({error}).\n{_FETCH}"
            ) from error
        obs, action = (_space(meta, spec, part, self.name) for part in ("observation_space", "action_space"))
        drop = dropped(drop, [leaf.name for leaf in leaves(obs, "obs")], self.name)
        self.files, self._episodes = self._list()
        self._check_counts(meta)
        words = {}
        if text:
            texts = [("observations", x) for x in leaves(obs, "obs") if x.text and x.name not in drop]
            texts += [("actions", x) for x in leaves(action, "action") if x.text]
            words = self._words(texts)
        self._obs = Columns(obs, "obs", self.name, drop, words)
        self._action = Columns(action, "action", self.name, (), words)
        self.schema = schema(self._obs, self._action, spec.get("max_episode_steps"))
        known = {
            "format": "minari",
            "dataset_id": meta.get("dataset_id") or self.name,
            "env_id": meta.get("env_id") or spec.get("id"),  # ours: `lit-wm collect` notes it
            "env_options": meta.get("env_options"),
            "env_spec": meta.get("env_spec"),
            "ref_min_score": _finite(meta.get("ref_min_score")),
            "ref_max_score": _finite(meta.get("ref_max_score")),
            "algorithm": meta.get("algorithm_name"),
            "author": meta.get("author"),
            "combined_datasets": meta.get("combined_datasets") or None,
            "lossy_images": self._jpeg and any(map(_is_image, (*self._obs.leaves, *self._action.leaves))),
            "vocabulary": {name: list(known) for name, known in words.items()} or None,
            "start": self._obs.start | self._action.start or None,
            "requirements": meta.get("requirements") or None,
            "no_reward": None if self._rewarded else True,
        }
        self.meta = {key: value for key, value in known.items() if value is not None}

    def _metadata(self) -> dict[str, Any]:
        path = self.data / "metadata.json"
        try:
            meta = json.loads(path.read_bytes())
            if not isinstance(meta, dict):
                raise ValueError("not an object")
        except FileNotFoundError:
            raise DataError(
                f"{self.name}: {path} is missing, which holds the spaces of the dataset.\n"
                "  Restore it, or delete the folder and fetch the dataset again."
            ) from None
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}).\n  Fetch the dataset again.") from error
        if meta.get("data_format", "hdf5") not in ("hdf5", "arrow", "parquet"):
            raise DataError(
                f"{path}: data_format is {meta['data_format']!r}; expected hdf5, arrow or parquet."
            )
        return meta

    def _list(self) -> tuple[list[Path], list[int]]:
        """Files of the dataset and its episode numbers in order."""
        if self._format == "hdf5":
            path = self.data / "main_data.hdf5"
            with open_hdf5(path) as file:
                found = [match for key in file if (match := re.fullmatch(r"episode_(\d+)", key))]
                self._rewarded = not found or any(f"{match[0]}/rewards" in file for match in found)
            return [self.data / "metadata.json", path], sorted(int(match[1]) for match in found)
        inside = (p for p in self.data.iterdir() if p.is_dir() and p.name.isdecimal())
        folders = sorted(inside, key=lambda p: int(p.name))
        files = [p for folder in folders for p in sorted(folder.iterdir()) if p.name[0] not in "._"]
        tables = [p for p in files if p.suffix == f".{self._format}"]
        self._rewarded = not tables or any(map(self._has_rewards, tables))  # as a rule the first has
        return [self.data / "metadata.json", *files], [int(folder.name) for folder in folders]

    def _has_rewards(self, table: Path) -> bool:
        from pyarrow.dataset import dataset

        try:
            names = reading(lambda: dataset(table, format=self._format).schema.names, self.name, _AGAIN)
        except DataError:  # episodes() meets it again, where on_bad counts
            return False
        return "rewards" in names

    def _check_counts(self, meta: dict[str, Any]) -> None:
        found, said = len(self._episodes), meta.get("total_episodes")
        self.total_episodes = found
        steps = meta.get("total_steps")
        self.total_steps = steps if found == said and isinstance(steps, int) else None
        if not found:
            raise DataError(f"{self.name}: no episodes in {self.data}.\n  Fetch the dataset again.")
        if said is not None and found != said:
            self.report.count(
                "counts", f"{self.name}: metadata says {said} episodes, the file has {found}: using the file"
            )

    def _words(self, texts: list[tuple[str, Leaf]]) -> dict[str, list[str]]:
        words: dict[str, set[str]] = {leaf.name: set() for _, leaf in texts}
        broken = None
        for group in self._groups(texts):
            try:
                for part, leaf in texts:
                    words[leaf.name].update(group.read(part, leaf))
            except DataError as error:  # episodes() meets it again, where on_bad counts
                broken = error
        if broken and not all(words.values()):
            raise broken
        return {name: sorted(known) for name, known in words.items()}

    def _groups(self, read: Sequence[tuple[str, Leaf]]) -> Iterator[_Group]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "jpeg") as pool, ExitStack() as stack:
            path = self.data / "main_data.hdf5"
            file = stack.enter_context(open_hdf5(path)) if self._format == "hdf5" else None
            for k in self._episodes:
                where = f"{self.name}, episode {k}"
                if file is None:
                    yield _ArrowGroup(where, self._jpeg, pool, self.data / str(k), self._format, read)
                else:
                    yield _Hdf5Group(where, self._jpeg, pool, file, k)

    def episodes(self) -> Iterator[Episode]:
        """All episodes in the order of their numbers."""
        steps: int | None = 0
        read = [("observations", x) for x in self._obs.leaves]
        for group in self._groups([*read, *(("actions", x) for x in self._action.leaves)]):
            try:
                for episode in self._pieces(group):
                    steps = None if steps is None else steps + episode.steps
                    yield episode
            except DataError as error:
                steps = None
                yield Episode.unreadable(group.where, error)
        if steps is not None and steps != (said := self.total_steps) is not None:
            note = f"{self.name}: metadata says {said:,} steps, the file has {steps:,}: using the file"
            self.report.count("counts", note)

    def _pieces(self, group: _Group) -> Iterator[Episode]:
        where, row = group.where, sum(map(_bytes, self._obs.leaves))
        cuts = flat.pieces(group.steps, row, where, self.report)
        for start, stop in cuts[:-1]:
            group.rows, group.where = slice(start, stop), f"{where}, from step {start:,}"
            episode = self._episode(group)
            truncated = np.array(episode.truncated)
            truncated[-1:] = True
            yield replace(episode, truncated=truncated)
        if len(cuts) > 1:  # the last one to the very end, whatever the lengths
            group.rows, group.where = slice(cuts[-1][0], None), f"{where}, from step {cuts[-1][0]:,}"
        yield self._episode(group)

    def _episode(self, group: _Group) -> Episode:
        return Episode(
            self._obs.read(lambda leaf: group.read("observations", leaf)),
            self._action.read(lambda leaf: group.read("actions", leaf)),
            group.flag("rewards") if self._rewarded else None,
            group.flag("terminations"),
            group.flag("truncations"),
            group.where,
            group.seed,
        )


class _Group(ABC):
    """One episode as it is stored, or the ``rows`` of it; of observations one more is read."""

    rows = slice(None)
    path: str  #: of its file

    def __init__(self, where: str, jpeg: bool, pool: ThreadPoolExecutor):
        self.where, self._jpeg, self._pool = where, jpeg, pool

    def _safe(self, work: Callable[[], Any]) -> Any:
        return reading(work, f"{self.where}: {self.path} is damaged", _AGAIN)

    @property
    def seed(self) -> int | None:
        """Of the reset, if it was noted."""
        seed = self._safe(lambda: self.notes.get("seed"))
        whole = isinstance(seed, int | np.integer) and -(2**63) <= seed < 2**63
        return int(seed) if whole else None

    @property
    @abstractmethod
    def steps(self) -> int:
        """T, of the whole episode."""

    @property
    @abstractmethod
    def notes(self) -> Any:
        """What is noted about the episode, by name."""

    def read(self, part: str, leaf: Leaf) -> Any:
        """The values of a leaf of ``observations`` or ``actions``: an array (n, ...) or n strings."""
        return self._safe(lambda: self._read(part, leaf))

    def flag(self, name: str) -> np.ndarray:
        """One of the columns without a space, (T,)."""
        return self._safe(lambda: self._flag(name))

    @abstractmethod
    def _read(self, part: str, leaf: Leaf) -> Any: ...

    @abstractmethod
    def _flag(self, name: str) -> np.ndarray: ...

    def _some(self, part: str) -> slice:
        stop = self.rows.stop
        return slice(self.rows.start, stop + 1) if stop is not None and part == "observations" else self.rows

    def _missing(self, what: str, found: Any) -> DataError:
        return DataError(f"{self.where} has no {what!r}; found: {', '.join(found) or 'nothing'}.\n{_AGAIN}")

    def _decode(self, frames: Any, part: str, leaf: Leaf) -> np.ndarray:
        """Images (n, H, W, C) of n JPEG files, exactly as Pillow and therefore Minari sees them."""
        from PIL import Image

        images = np.empty((len(frames), *leaf.space.shape), np.uint8)  # type: ignore[misc]

        def block(start: int) -> None:
            for row in range(start, min(start + _FRAMES, len(frames))):
                name, number = leaf.name if leaf.path else "", row + (self.rows.start or 0)
                at = f"{self.where}, {part[:-1]} {name and repr(name) + ' '}row {number}: JPEG"
                try:
                    image = np.asarray(Image.open(io.BytesIO(bytes(frames[row]))), np.uint8)
                except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
                    what = str(error).splitlines()[0]
                    raise DataError(f"{at} cannot be decoded ({what}).\n{_AGAIN}") from error
                if image.size != images[row].size or image.shape[:2] != images.shape[1:3]:
                    raise DataError(f"{at} has the shape {image.shape}, its space says {images.shape[1:]}.")
                images[row] = image.reshape(images.shape[1:])

        list(self._pool.map(block, range(0, len(frames), _FRAMES)))
        return images


class _Hdf5Group(_Group):
    def __init__(self, where: str, jpeg: bool, pool: ThreadPoolExecutor, file: Any, k: int):
        super().__init__(where, jpeg, pool)
        self._file, self._key, self.path = file, f"episode_{k}", file.filename

    @cached_property
    def _group(self) -> Any:
        return episode_group(self._file, self._key, self.where)

    @property
    def steps(self) -> int:
        def shape() -> tuple[int, ...]:
            return self._dataset("rewards" if "rewards" in self._group else "terminations").shape

        return self._safe(lambda: (*shape(), 0)[0])

    @property
    def notes(self) -> Any:
        return self._group.attrs

    def _dataset(self, key: str) -> Dataset:
        item, part = child(self._group, key, self.where), key.partition("/")[0]
        if item is None:
            if part in self._group:
                raise self._missing(key, self._names(part))
            raise self._missing(part, self._group)
        if not isinstance(item, Dataset):
            raise DataError(
                f"{self.where}: {key!r} is a group of {', '.join(item)}; its space says an array."
            )
        return item

    def _names(self, part: str) -> list[str]:
        names: list[str] = []
        if hasattr(self._group[part], "visit"):
            self._group[part].visit(lambda name: names.append(f"{part}/{name}"))
        return names or [part]

    def _flag(self, name: str) -> np.ndarray:
        return self._dataset(name)[self.rows]

    def _read(self, part: str, leaf: Leaf) -> Any:
        import h5py

        key = "/".join((part, *(f"_index_{k}" if isinstance(k, int) else k for k in leaf.path)))
        column = self._dataset(key)
        if leaf.text:
            if not h5py.check_string_dtype(column.dtype):
                raise DataError(f"{self.where}: {key!r} does not hold strings, but {column.dtype}.")
            return column.values(lambda item: item.asstr()[self._some(part)]).tolist()
        value = column[self._some(part)]
        # Frames of equal size make a rectangle (n, bytes): the space alone tells what is a picture.
        if self._jpeg and value.ndim <= 2 and _is_image(leaf):
            return self._decode(value, part, leaf)
        return value


class _ArrowGroup(_Group):
    """The record batches of an episode in order, of which those with the ``rows`` are held."""

    def __init__(
        self,
        where: str,
        jpeg: bool,
        pool: ThreadPoolExecutor,
        folder: Path,
        kind: str,
        read: Sequence[tuple[str, Leaf]],
    ):
        super().__init__(where, jpeg, pool)
        self._folder, self._kind, self._stream = folder, kind, self._batches()
        self._columns = [".".join((part, *map(str, leaf.path))) for part, leaf in read]
        self._most = min(max(flat.LONGEST // max(8 * sum(_bytes(leaf) for _, leaf in read), 1), 1), 1 << 16)
        self._held: list[Any] = []
        self._first = 0  # row of the first batch that is held
        self._kept: Any = (None, None)  # which compressed batch is in memory, and itself

    @cached_property
    def _files(self) -> list[str]:
        files = sorted(str(p) for p in self._folder.glob(f"*.{self._kind}"))
        if not files:
            raise DataError(f"{self.where}: no .{self._kind} file in {self._folder}.\n{_AGAIN}")
        return files

    @property
    def path(self) -> str:  # type: ignore[override]
        return self._files[0]

    def _batches(self) -> Iterator[Any]:
        """All rows, some MB at a time."""
        for path in self._files:
            if self._kind == "parquet":
                from pyarrow.parquet import ParquetFile

                # Else it keeps whole columns; while they are read, nested ones take nine times their size.
                with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                    columns = [*self._columns, "rewards", "terminations", "truncations"]
                    rows = max(self._most // 8, 1)
                    yield from file.iter_batches(rows, columns=columns, use_threads=False)
                continue
            for i in range(self._mapped(path).num_record_batches):
                start, rows = 0, 1
                while start < rows:  # Minari writes one batch
                    batch = self._batch(path, i)
                    rows = batch.num_rows
                    yield batch.slice(start, self._most)
                    start += self._most

    def _hold(self, start: int, stop: int) -> None:
        """Let go of batches before ``start``, and read on until ``stop``."""
        while self._held and self._first + len(self._held[0]) <= start:
            self._first += len(self._held.pop(0))
        while self._first + sum(map(len, self._held)) < stop:
            if (batch := next(self._stream, None)) is None:
                raise IndexError("fewer rows than it says")
            self._held.append(batch)

    @cached_property
    def notes(self) -> Any:
        try:
            notes = json.loads((self._folder / "metadata.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def _mapped(self, path: str) -> Any:
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(path))

    def _batch(self, path: str, i: int, file: Any = None) -> Any:
        """A batch, mapped anew, so that pages that were read go; a compressed one is kept."""
        import pyarrow as pa

        if self._kept[0] != (path, i):
            self._kept = (None, None)  # it goes before memory is measured
            before = pa.total_allocated_bytes()
            batch = (file or self._mapped(path)).get_batch(i)
            if not (size := pa.total_allocated_bytes() - before) or size < batch.nbytes // 2:
                return batch
            if size > _BATCH:
                raise DataError(
                    f"{self.where}: a compressed batch of {path} takes {size >> 20:,} MB in memory, more "
                    f"than {_BATCH >> 20:,}.\n  Write the file in smaller batches, or without compression."
                )
            self._kept = (path, i), batch
        return self._kept[1]

    def _count(self) -> int:
        if self._kind == "parquet":
            from pyarrow.parquet import read_metadata

            return sum(read_metadata(path).num_rows for path in self._files)
        files = [(path, self._mapped(path)) for path in self._files]
        each = (self._batch(path, i, file) for path, file in files for i in range(file.num_record_batches))
        return sum(batch.num_rows for batch in each)

    @cached_property
    def _rows(self) -> int:
        if not (rows := self._safe(self._count)):
            raise DataError(f"{self.where}: {self._files[0]} holds no rows.\n{_AGAIN}")
        return rows

    @cached_property
    def steps(self) -> int:
        # Minari fills all columns up to the length of the observations and cuts one row when it reads.
        return self._rows if self.notes.get("total_steps") == self._rows else self._rows - 1

    def _column(self, key: Sequence[str]) -> Any:
        import pyarrow as pa

        start, stop, _ = self._some(key[0]).indices(self._rows if key[0] == "observations" else self.steps)
        self._hold(start, max(stop, start + 1))
        arrays, first = [], self._first
        for batch in self._held:
            arrays.append(self._field(batch, key, max(start - first, 0), max(stop - first, 0), first))
            first += len(batch)
        return pa.concat_arrays(arrays) if len(arrays) > 1 else arrays[0]

    def _field(self, batch: Any, key: Sequence[str], start: int, stop: int, first: int) -> Any:
        column, fields = batch, batch.schema.names
        for i, name in enumerate(key):
            if name not in fields:
                raise self._missing("/".join(key[: i + 1]), fields)
            column = column.field(name) if i else column.column(name)[start:stop]
            if column.null_count:  # of a Dict too, whose entries then hold anything
                row = first + start + column.is_null().index(True).as_py()
                raise DataError(f"{self.where}: {'/'.join(key[: i + 1])!r} has none in row {row}.\n{_AGAIN}")
            fields = [field.name for field in column.type] if hasattr(column, "field") else []
        return column

    def _flag(self, name: str) -> np.ndarray:
        return self._column([name]).to_numpy(zero_copy_only=False)

    def _read(self, part: str, leaf: Leaf) -> Any:
        import pyarrow as pa

        key = [part, *map(str, leaf.path)]
        column, at = self._column(key), f"{self.where}: {'/'.join(key)!r}"
        kind = column.type
        text = "string" in str(kind) and not pa.types.is_nested(kind)
        if pa.types.is_struct(kind) or leaf.text > text:
            raise DataError(
                f"{at} is stored as {kind}; its space says {'text' if leaf.text else 'an array'}.\n{_AGAIN}"
            )
        if leaf.text:
            return column.to_pylist()
        if self._jpeg and _is_image(leaf):
            return self._decode(column.to_pylist(), part, leaf)
        if not hasattr(column, "flatten"):  # Discrete
            return column.to_numpy(zero_copy_only=False)
        if not pa.types.is_fixed_size_list(kind):
            sizes = column.value_lengths().to_numpy()
            if len(other := np.flatnonzero(sizes != sizes[:1])):
                row = other[0] + (self.rows.start or 0)
                raise DataError(
                    f"{at} has {sizes[other[0]]} values in row {row}, {sizes[0]} before.\n{_AGAIN}"
                )
        flat, shape = column.flatten().to_numpy(zero_copy_only=False), leaf.space.shape or ()
        fits = len(flat) == len(column) * int(np.prod(shape))
        return flat.reshape((len(column), *shape) if fits else (len(column), -1))


def _bytes(leaf: Leaf) -> int:
    """Of one value, as it is decoded."""
    return 1 if leaf.text else int(np.prod(leaf.space.shape or ())) * np.dtype(leaf.space.dtype).itemsize


def _is_image(leaf: Leaf) -> bool:
    from minari.dataset.minari_storage import is_image_space

    return is_image_space(leaf.space)


def _finite(score: Any) -> float | None:
    """A reference score, None for anything that is not a finite number."""
    return score if isinstance(score, int | float) and np.isfinite(score) else None


def _space(meta: dict[str, Any], spec: dict[str, Any], part: str, where: str) -> Any:
    """The space as Minari reads it, from the environment if the metadata lack it."""
    from minari.serialization import deserialize_space

    text = meta.get(part)
    if text is None:
        import gymnasium as gym

        # Only what is registered here is made: entry point and arguments of the file could run any code.
        name = str(spec.get("id"))
        if (known := gym.registry.get(name)) is None:
            raise DataError(
                f"{where}: metadata.json has no {part}, and no environment {name} is registered here.\n"
                f"  Add {part} to it (minari.serialization.serialize_space), or import the package that "
                "registers the environment first."
            )
        try:
            return getattr(gym.make(known), part)
        except Exception as error:
            raise DataError(
                f"{where}: its metadata have no {part}, and its environment {name} cannot be made "
                f"({type(error).__name__}: {error}).\n  Install what the environment needs."
            ) from error
    try:
        return deserialize_space(text)
    except Exception as error:
        other = [kind for kind in re.findall(r'"type": ?"(\w+)"', str(text)) if kind not in _SPACES]
        what = f"a {other[0]} space, which no model here can take" if other else f"unreadable ({error})"
        raise DataError(f"{where}: {part} in metadata.json is {what}.") from error


def _find(rest: str, root: str | None, download: bool) -> tuple[Path, str]:
    """The data folder and the name of a dataset."""
    place = Path(root or os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()
    name = rest.split("://", 1)[1].partition("/")[2] if "://" in rest else rest
    here = Path(rest).expanduser()
    for folder in (place / name, here):
        if (folder / "data").is_dir():
            return folder / "data", name if folder != here else folder.name
        if folder.is_dir() and (
            (folder / "metadata.json").is_file() or (folder / "main_data.hdf5").is_file()
        ):
            return folder, folder.parent.name if folder.name == "data" else folder.name
    if here.exists():
        raise DataError(
            f"{here} is no Minari dataset: it holds neither data/ nor metadata.json.\n"
            "  Expected the folder of a dataset, or an id such as D4RL/door/human-v2."
        )
    if rest.startswith(("/", "~", ".")):
        raise DataError(
            f"{here} does not exist.\n  Expected the folder of a dataset, which holds data/, or an id such "
            "as D4RL/door/human-v2."
        )
    command = f"minari download {rest}"
    if root is not None:
        command = f"MINARI_DATASETS_PATH={place} {command}"
    if download:
        _download(rest, place, command)
        return place / name / "data", name
    there = _installed(place)
    listed = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    near = nearest(name, there, 1)
    more = "If it is another one" if near else f"There are: {listed or 'none'}\n  To fetch it"
    raise DataError(f"minari dataset {rest!r} not found under {place}{near}\n"
                    f"  {more}: {command}   (or the option download=true)")  # fmt: skip


def _download(rest: str, place: Path, command: str) -> None:
    import minari

    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(place)  # Minari knows no other way
    try:
        minari.download_dataset(rest)
    except Exception as error:  # each of its remotes has errors of its own
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"minari dataset {rest!r} could not be fetched: {what}\n"
            f"  On a machine with a network run: {command}\n"
            f"  and copy the folder of the dataset to {place}."
        ) from error
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _installed(place: Path) -> list[str]:
    """Ids of the datasets under ``place``, without creating it."""
    found = []
    for folder, names, _ in os.walk(place):
        if "data" in names:
            found.append(Path(folder).relative_to(place).as_posix())
            names.clear()
    return sorted(found)
