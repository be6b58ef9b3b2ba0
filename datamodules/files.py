"""Files that are complete or not there, and checked when they are read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from lit_wm.errors import CheckpointError, DataError

_BLOCK = 1 << 24  # bytes copied or checked at a time


def copy_range(source: int, target: int, start: int, count: int) -> None:
    """Append bytes of one file to another; inside the kernel, and shared instead of copied, where it can."""
    in_kernel = hasattr(os, "copy_file_range")
    while count:
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, min(count, 1 << 30), offset_src=start)
            except OSError as error:
                if error.errno not in (
                    errno.EXDEV,
                    errno.EINVAL,
                    errno.ENOSYS,
                    errno.EOPNOTSUPP,
                    errno.EPERM,
                ):
                    raise
                in_kernel = False
                continue
        else:
            done = os.write(target, os.pread(source, min(count, _BLOCK), start))
        if done == 0:
            raise DataError("a replay file is shorter than the replay: something else has cut it.")
        start, count = start + done, count - done


def crc32(data: np.ndarray, crc: int = 0) -> int:
    """Checksum of bytes (n,) uint8, going on from ``crc``."""
    for start in range(0, len(data), _BLOCK):
        crc = zlib.crc32(data[start : start + _BLOCK].data, crc)
    return crc


def checked_file(path: Path, size: int, crc: int) -> np.ndarray:
    """The bytes of a snapshot file as a memory map, after a check of size and checksum."""
    actual = path.stat().st_size if path.is_file() else None
    if actual != size:
        found = "is missing" if actual is None else f"has {actual:,} bytes instead of {size:,}"
        raise CheckpointError(f"replay snapshot is damaged: {path} {found}.\n  Use an older checkpoint.")
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    if crc32(data) != crc:
        raise CheckpointError(
            f"replay snapshot is damaged: the content of {path} does not match its checksum.\n"
            "  Use an older checkpoint."
        )
    return data


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write plain values, synced to disk."""
    with open(path, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, like: Iterable[str]) -> dict[str, Any]:
    """Read a file of a snapshot that holds at least the keys ``like``.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text())
        if missing := sorted(set(like) - set(value)):
            raise ValueError(f"it lacks {', '.join(missing)}")
        return value
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a replay snapshot: {path.name} is missing.\n"
            "  A snapshot is a folder with manifest.json; use a checkpoint that was saved with its replay."
        ) from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"replay snapshot is damaged: {path} cannot be read: {error}.\n  Use an older checkpoint."
        ) from None


def sync_directory(path: Path) -> None:
    """Sync the names in a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(final: Path, beside: Path) -> Iterator[Path]:
    """The path of a folder or file to make, under ``beside``: it becomes ``final``, or goes after an error.

    A kill leaves ``final`` as it was; what it leaves of the new one goes with the next attempt. Raises
    DataError while another process does the same.
    """
    import fcntl

    name = quote(str(final.relative_to(beside)), safe="")
    part, old = beside / f".{name}.part", beside / f".{name}.old"
    part.mkdir(parents=True, exist_ok=True)
    handle = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{final} is being written by another process.\n  Wait for it.") from None
        try:
            for entry in part.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if old.exists() and not final.exists():  # killed between the two names
                os.rename(old, final)
            new = part / "new"
            yield new
            shutil.rmtree(old, ignore_errors=True)
            final.parent.mkdir(parents=True, exist_ok=True)
            if new.is_dir() and final.exists():
                os.rename(final, old)
            os.replace(new, final)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(handle)


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder by ``fill``, complete or not at all; one that is there is replaced."""
    work = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    work.mkdir(parents=True)
    try:
        fill(work)
        for folder in (*(path for path in work.rglob("*") if path.is_dir()), work):
            sync_directory(folder)
        old = None
        if final.exists():
            old = final.with_name(f"{work.name}.old")
            os.rename(final, old)
        os.rename(work, final)
        sync_directory(final.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if old is not None:
        shutil.rmtree(old)
