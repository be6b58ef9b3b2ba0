"""Caches: a dataset as rows in memory-mapped files, written once and found again by the content of its files.

The folder of a cache is a memory-mapped TensorDict: ``TensorDict.load_memmap(folder)`` reads the rows, and
``numpy.memmap`` any column with the type and shape in ``meta.json``. Beside the columns lie ``episodes/``, a
memory-mapped TensorDict too, with one row per episode, and ``rows.json``, which says what the data are and
has size and checksums of all files.

A folder with its final name is complete: it is written under another name and renamed. A process that is
killed leaves ``NAME.tmp-*``, which the next ingest removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from tensordict import TensorDict

from datamodules import writing
from datamodules.episodes import Schema, Source, checked
from datamodules.files import sync_directory, write_json
from datamodules.sources import open_source, parse_uri
from lit_wm.errors import ConfigError, DataError

LAYOUT = 1  # of the folder; caches of another layout are refused
Progress = Callable[[int, int, int], None]  # episodes and steps so far, bytes expected in all

_WHOLE = 1 << 30  # larger files are known by samples of their content
_LOCAL = ("download", "cache_dir", "root")  # options that say where the data lie, not what they are
_TEMPORARY = re.compile(r"(.+)\.tmp-\d+-[0-9a-f]{8}")  # what a writer's folder or file is called
_log = logging.getLogger(__name__)


class Cache:
    """A dataset as rows; see :func:`open_cache` and :func:`ingest`.

    Attributes:
        folder: where it lies.
        rows: memory-mapped columns, see :func:`datamodules.rows.row_specs`.                     batch [N]
        episodes: by name, one number per episode (E,): ``start`` (first row), ``length`` (rows, T+1),
            ``return``, ``terminated``, ``fake_last`` (o_T repeats o_{T-1}), ``seed`` (-1: unknown), ``task``,
            ``crc`` (CRC-32 of its observations, actions and rewards).
        schema: entries and bounds of continuous actions, which are in the source's units.
        meta: what the source says of itself.
        report: what was noticed when it was read: ``counts`` and ``notes``.
        uri: the source, with ``options`` and ``on_bad``.
        key: digest of content and options.
        files: by path in the folder: ``bytes`` and ``crc``, one CRC-32 per 64 MB.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder, self.facts = folder, facts
        self.files: dict[str, dict[str, Any]] = facts["files"]
        self.uri, self.options, self.on_bad = facts["uri"], facts["options"], facts["on_bad"]
        self.key, self.meta, self.report = facts["key"], facts["meta"], facts["report"]
        self.schema = Schema.from_plain(facts["schema"])
        self.steps: int = facts["steps"]
        self.bytes = sum(file["bytes"] for file in self.files.values())

    @cached_property
    def rows(self) -> TensorDict:
        """The columns."""
        return TensorDict.load_memmap(self.folder)

    @cached_property
    def episodes(self) -> dict[str, np.ndarray]:
        """The table of episodes."""
        return {k: v.numpy() for k, v in TensorDict.load_memmap(self.folder / "episodes").items()}

    def __len__(self) -> int:
        return self.steps + len(self.episodes["start"])

    def verify(self, full: bool = False) -> None:
        """Compare the files with what was written: their sizes, and if ``full`` their checksums.

        Raises:
            DataError: for the first file that differs.
        """
        mend = f"run `lit-wm data verify rows:{self.folder} --repair`"
        for name, facts in self.files.items():
            path = self.folder / name
            what = f"cache {self.folder}: " + (
                f"column {unquote(name[:-7])}" if name.endswith(".memmap") else f"file {name}"
            )
            size = path.stat().st_size if path.is_file() else None
            if size != facts["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise DataError(f"{what} {found}, expected {facts['bytes']:,}:\n  {mend}")
            if full:
                for i, pair in enumerate(zip(facts["crc"], writing.block_crcs(path), strict=True)):
                    if pair[0] != pair[1]:
                        start, stop = i * writing.BLOCK, min((i + 1) * writing.BLOCK, facts["bytes"])
                        raise DataError(
                            f"{what} is not what was written: bytes {start:,} to {stop:,} do not match their "
                            f"checksum:\n  {mend}"
                        )


def cache_root(given: str | Path | None = None) -> Path:
    """The folder of all caches: ``given``, else ``$LITWM_CACHE``, else ``~/.cache/lit_wm/rows``."""
    root = Path(given or os.environ.get("LITWM_CACHE") or "~/.cache/lit_wm/rows")
    return root.expanduser().absolute()


def open_cache(folder: str | Path, verify: str = "size") -> Cache:
    """Open the folder of a cache.

    Args:
        folder: the cache itself.
        verify: ``size`` compares the sizes of all files, ``full`` their checksums too.

    Raises:
        DataError: if it is not a cache, of another layout, or damaged.
    """
    folder = Path(folder)
    facts = _facts(folder)
    if facts.get("layout") != LAYOUT:
        newer = isinstance(facts.get("layout"), int) and facts["layout"] > LAYOUT
        raise DataError(
            f"cache {folder} has layout {facts.get('layout')}, this version reads layout {LAYOUT}.\n  "
            + ("Update lit-wm, or delete" if newer else "Delete")
            + f" the folder and ingest {facts.get('uri')} again."
        )
    try:
        cache = Cache(folder, facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"cache {folder} is damaged: rows.json lacks or garbles {error}.\n  Delete the folder and ingest "
            "the source again."
        ) from None
    cache.verify(full=verify == "full")
    return cache


def rewrite(folder: str | Path, progress: Progress | None = None) -> Cache:
    """Write a cache, which may be damaged, again where it lies, from its source.

    Raises:
        DataError: if it does not name a source, or the source reads otherwise than it did; as :func:`ingest`.
    """
    folder = Path(folder).expanduser().resolve()
    facts = _facts(folder)
    if not facts.get("uri"):
        raise DataError(f"cache {folder} was not written from a source, so that it cannot be written again.")
    return ingest(facts["uri"], folder.parent, facts["on_bad"], progress, replace=folder, **facts["options"])


def find_cache(
    uri: str, cache: str | Path | None = None, on_bad: str = "error", **options: Any
) -> Cache | None:
    """The cache of a source, if there is one; arguments as for :func:`ingest`. ``rows:PATH`` is its own."""
    source = open_source(uri, **options)
    if (own := getattr(source, "cache", None)) is not None:
        return own
    return _Identity(uri, source, on_bad, options).find(cache_root(cache))


def ingest(
    uri: str,
    cache: str | Path | None = None,
    on_bad: str = "error",
    progress: Progress | None = None,
    replace: bool | Path = False,
    **options: Any,
) -> Cache:
    """Open the cache of a source, and write it first if there is none.

    Of several processes that ingest the same source one writes, and the others wait for it.

    Args:
        uri: the source, see :mod:`datamodules.sources`; ``rows:PATH`` is opened where it lies.
        cache: folder of all caches, see :func:`cache_root`.
        on_bad: see :func:`datamodules.episodes.checked`.
        progress: called before the first episode (0, 0, bytes that will be written) and after each one.
        replace: write it again, even if there is one; a path is the cache to replace.
        options: of the reader.

    Raises:
        ConfigError: for a source or an option that does not exist.
        DataError: if the data or the cache cannot be used, or the disk is too small.
    """
    source = open_source(uri, **options)
    if (own := getattr(source, "cache", None)) is not None:
        return _said(own)
    root = cache_root(cache)
    identity = _Identity(uri, source, on_bad, options)
    if not replace and (found := identity.find(root)):
        return _said(found)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise DataError(
            f"caches cannot be written to {root} ({error.strerror}).\n  Choose another folder with --cache "
            "or LITWM_CACHE."
        ) from error
    with _locked(_lock_of(root, identity.name)):
        _sweep(root, identity.name)
        if not replace and (found := identity.find(root)):
            return _said(found)
        with ThreadPoolExecutor(1) as pool:
            key = pool.submit(lambda: identity.key)  # reads the files while they are ingested

            def finish() -> tuple[Path, dict[str, Any]]:
                key.result()
                identity.unchanged()
                if not isinstance(replace, Path):
                    return root / f"{identity.name}-{identity.key[:16]}", identity.to_plain()
                if _facts(replace).get("key") != identity.key:
                    raise DataError(
                        f"cache {replace} cannot be written again: {uri}, or how it is read, has changed.\n"
                        "  Delete the folder and ingest the source anew."
                    )
                return replace, identity.to_plain()

            try:
                return _write(root, identity.name, source, on_bad, progress, finish)
            finally:
                identity.stop = True


def _said(cache: Cache) -> Cache:
    """A cache that was there, after the warnings of its reader, which spoke when it was written."""
    for sentence in cache.report.get("warnings", {}).values():
        warnings.warn(sentence, stacklevel=3)
    return cache


def lost_reward(uri: str | None, report: Mapping[str, Any], returns: np.ndarray) -> str | None:
    """A sentence if leaving out last transitions, whose ends nobody saw, lost much of all reward."""
    lost, kept = report.get("lost_reward", 0.0), float(np.abs(returns).sum())
    if lost <= 0.1 * kept:
        return None
    return (
        f"{uri}: the last transitions of {report['counts'].get('last_dropped', 0):,} episodes are left out, "
        f"as their last observations are missing, and with them rewards of {lost:g} ({kept:g} are left).\n"
        "  If the task ended there: dones_are=terminals; to keep them anyway: last_obs=repeat."
    )


def write_rows(
    source: Source, folder: str | Path, on_bad: str = "error", progress: Progress | None = None
) -> Cache:
    """Write episodes into a folder of the caller's choice, for sources that exist only once.

    Args:
        source: what to write.
        folder: the new cache; nothing may be there.
        on_bad, progress: as for :func:`ingest`.

    Raises:
        ConfigError: if the folder exists.
        DataError: as :func:`ingest`.
    """
    folder = Path(folder).expanduser().absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Any] = {
        "uri": None,
        "options": {},
        "on_bad": on_bad,
        "digest": None,
        "stamps": [],
        "key": None,
    }
    with _locked(_lock_of(folder.parent, folder.name)):
        if folder.exists():
            raise ConfigError(f"{folder} exists; expected a new folder. Delete it or give another one.")
        return _write(folder.parent, folder.name, source, on_bad, progress, lambda: (folder, plain))


class _Identity:
    """What a cache is known by: content of the files, and the options that they are read with."""

    def __init__(self, uri: str, source: Source, on_bad: str, options: Mapping[str, Any]):
        scheme, rest, given = parse_uri(uri)
        path = Path(rest).expanduser()
        if path.exists() or any(sign in rest for sign in "*?["):
            path = Path(os.path.abspath(path))  # one name however the same place is written
            uri = uri.replace(f"{scheme}:{rest}", f"{scheme}:{path}", 1)
        words = [scheme, *([path.name] if path.is_absolute() else path.parts[-3:])]
        self.uri, self.options, self.on_bad, self.stop = uri, dict(options), on_bad, False
        self.name = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words))[-64:].strip("-.")
        self.files = [Path(file).absolute() for file in source.files]
        options = {k: v for k, v in sorted({**given, **options}.items()) if k not in _LOCAL}
        settings = {"layout": LAYOUT, "scheme": scheme, "on_bad": on_bad, "options": options}
        # What a name stands for may decide how the same file is read, as with D4RL's.
        settings |= {"version": source.version, "dataset_id": getattr(source, "meta", {}).get("dataset_id")}
        settings |= {} if self.files else {"rest": rest}
        self.settings = json.dumps(settings, sort_keys=True, default=str)
        self.stamps = self._stamps()
        # A file may change twice within one tick of its clock: wait until the next change would show.
        age = time.time() - max((max(stamp[2:4]) for stamp in self.stamps), default=0) / 1e9
        time.sleep(0.05 - age if 0 <= age < 0.05 else 0)

    def _stamps(self) -> list[list[Any]]:
        stats = [(path, path.stat()) for path in self.files]
        return [[str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for path, s in stats]

    def unchanged(self) -> None:
        """Whether the files are still the same ones."""
        for old, new in zip(self.stamps, self._stamps(), strict=True):
            if old != new:
                raise DataError(
                    f"{old[0]} changed while it was read.\n  Ingest it again once it is complete."
                )

    @cached_property
    def digest(self) -> str:
        """Of all files, with their names if there are several."""
        whole = hashlib.blake2b(digest_size=16)
        common = os.path.commonpath([path.parent for path in self.files]) if self.files else ""
        for path, stamp in zip(self.files, self.stamps, strict=True):
            if len(self.files) > 1:
                whole.update(f"{path.relative_to(common)}\0{stamp[1]}\0".encode())
            one, size = hashlib.blake2b(digest_size=16), stamp[1]
            if size <= _WHOLE:
                for block in writing.blocks(path, 4 << 20):
                    if self.stop:
                        raise InterruptedError
                    one.update(block)
            else:
                one.update(f"{size} {stamp[2]}".encode())
                with open(path, "rb") as file:
                    for at in np.linspace(0, size - (1 << 20), 66).astype(int).tolist():
                        file.seek(at)
                        one.update(file.read(1 << 20))
            whole.update(one.digest())
        return whole.hexdigest()

    @cached_property
    def key(self) -> str:
        """Of content and options."""
        return hashlib.blake2b(f"{self.settings}\n{self.digest}".encode(), digest_size=16).hexdigest()

    def find(self, root: Path) -> Cache | None:
        """The cache in ``root``; files are read only if they look other than at the last time."""
        known = {}
        for folder in root.glob(self.name + "-" + "[0-9a-f]" * 16):
            try:
                known[folder] = _facts(folder)
            except DataError as error:  # it may be another's; if it is ours the digest will lead to it
                _log.warning("%s", error)
                known[folder] = {}
        for folder, facts in known.items():
            if (facts.get("stamps"), facts.get("settings")) == (self.stamps, self.settings) and self.stamps:
                return open_cache(folder)
        folder = root / f"{self.name}-{self.key[:16]}" if known else root
        if folder not in known:
            return None
        cache = open_cache(folder)
        try:
            part = root / f"{folder.name}.json.tmp-{os.getpid()}-{secrets.token_hex(4)}"
            write_json(part, {**cache.facts, "stamps": self.stamps})
            os.replace(part, folder / "rows.json")
        except OSError:  # someone else's cache: it is only slower to find
            pass
        return cache

    def to_plain(self) -> dict[str, Any]:
        """For ``rows.json``."""
        sampled = any(stamp[1] > _WHOLE for stamp in self.stamps)
        return {
            "uri": self.uri, "options": self.options, "on_bad": self.on_bad, "settings": self.settings,
            "key": self.key, "digest": {"kind": "sampled" if sampled else "full", "blake2b": self.digest},
            "stamps": self.stamps,
        }  # fmt: skip


def _write(
    root: Path,
    name: str,
    source: Source,
    on_bad: str,
    progress: Progress | None,
    finish: Callable[[], tuple[Path, dict[str, Any]]],
) -> Cache:
    """Stream a source into a new folder and rename it to what ``finish`` says."""
    planned, free = writing.plan_size(source), shutil.disk_usage(root).free
    if planned > free:
        raise DataError(
            f"{root}: the rows need {planned / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free.\n"
            "  Make room, or choose another disk with --cache or LITWM_CACHE."
        )
    if progress:
        progress(0, 0, planned)
    part = root / f"{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    part.mkdir()
    writer = None
    try:
        writer = writing.RowWriter(part, source.schema.spaces)
        for number, episode in enumerate(checked(source, on_bad), 1):
            writer.add(episode)
            if progress:
                progress(number, writer.steps, planned)
        try:
            facts = writer.finish()
        except DataError as error:
            raise DataError(
                f"{', '.join(map(str, source.files[:1])) or name}: {error}\n  {_counts(source)}"
            ) from None
        folder, more = finish()
        meta = {**source.meta, **({"no_reward": True} if writer.no_reward else {})}
        facts |= {"layout": LAYOUT, "schema": source.schema.to_plain(), "meta": meta, **more}
        write_json(part / "rows.json", {**facts, "report": source.report.to_plain()})
        for path in (*(p for p in part.rglob("*") if p.is_dir()), part):
            sync_directory(path)
        if folder.exists():
            old = root / f"{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
            os.rename(folder, old)
            os.rename(part, folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(part, folder)
        sync_directory(root)
    except BaseException as error:
        if writer is not None:
            writer.close()
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(root).free
            raise DataError(
                f"{root}: the disk is full: the rows need about {planned / 1e9:,.2f} GB, now that what was "
                f"written is removed {free / 1e9:,.2f} GB are free.\n"
                "  Make room, or choose another disk with --cache or LITWM_CACHE."
            ) from error
        raise
    return open_cache(folder)


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, which is gone afterwards; the kernel frees it when its process dies."""
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                os.close(handle)
                yield False
                return
            _log.warning("waiting for another process that holds %s", path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            if os.fstat(handle).st_ino == path.stat().st_ino:  # else its holder removed it meanwhile
                break
        except FileNotFoundError:
            pass
        os.close(handle)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _sweep(root: Path, mine: str) -> None:
    """Remove what killed processes left; ``mine`` is the name whose lock is held."""
    for part in root.glob("*.tmp-*"):
        if not (match := _TEMPORARY.fullmatch(part.name)):
            continue  # somebody else's
        name = match[1]
        if name == mine:
            _remove(part)
        else:
            with _locked(_lock_of(root, name), wait=False) as free:
                if free:
                    _remove(part)
    for lock in root.glob(_lock_of(root, "*").name):
        with _locked(lock, wait=False):
            pass


def _lock_of(root: Path, name: str) -> Path:
    """A name that nobody else gives to files in a folder that may not be ours alone."""
    return root / f".lit_wm-{name}.lock"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "rows.json"
    try:
        facts = json.loads(path.read_text())
        if not isinstance(facts, dict):
            raise ValueError("it is no object")
    except FileNotFoundError:
        what = "has no rows.json" if folder.is_dir() else "is not there"
        raise DataError(f"{folder} {what}; expected the folder of a cache, as `lit-wm data ingest` prints "
                        "it.") from None  # fmt: skip
    except (ValueError, OSError) as error:
        raise DataError(f"cache {folder} is damaged: rows.json cannot be read: {error}.\n"
                        "  Delete the folder and ingest the source again.") from None  # fmt: skip
    return facts


def _counts(source: Source) -> str:
    counts = ", ".join(f"{name} {n:,}" for name, n in source.report.counts.items())
    first = f"; the first note: {source.report.notes[0]}" if source.report.notes else ""
    return f"Found: {counts or 'nothing'}{first}"
