"""Fetch large files: resumable, checked, and complete or not there. Only the standard library is needed."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lit_wm.errors import DataError

_PIECE = 1 << 20
_TRIES = 5  # in a row that bring no new byte
_WAIT = 1.0  # seconds before the second try; doubles


def command(url: str, path: Path) -> str:
    """What fetches the file on another machine, and goes on where it stopped."""
    return f"curl -fL -C - --create-dirs -o {shlex.quote(str(path))} {shlex.quote(url)}"


def download(
    url: str, path: Path, sha256: str | None = None, magic: bytes = b"", timeout: float = 30
) -> Path:
    """Fetch a file, unless it is there.

    What has arrived stays in ``NAME.part`` until it is complete; the next call goes on from there if the
    server still has the same file. The checksum is written to ``NAME.sha256`` (``sha256sum -c`` reads it).

    Args:
        url: http or https.
        path: where the file goes.
        sha256: its checksum in hexadecimal, if known.
        magic: how such a file begins; anything else, e.g. a page that says "not found", is refused.
        timeout: seconds to wait for the server.

    Raises:
        DataError: if the server cannot be reached or answers something else, the checksum is wrong, the disk
            is too small or another process fetches the same file.
    """
    if path.exists():
        return verify(path, sha256)
    if not re.match(r"https?://", url):
        raise DataError(f"{url} is no address; expected http:// or https://.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            what = f"another process is fetching {path} ({part.name} is locked)"
            raise DataError(f"{what}; wait for it.") from None
        if path.exists():
            return verify(path, sha256)
        try:
            _fetch(url, path, file, magic, timeout)
        except BaseException:
            if not part.exists() or not file.seek(0, os.SEEK_END):
                _forget(part)  # nothing to go on from
            raise
        file.flush()
        os.fsync(file.fileno())
        found = digest(part)
        if sha256 and found != sha256.lower():
            _forget(part)
            raise DataError(
                f"{url}: the checksum is {found}, expected {sha256.lower()}; the file is deleted.\n"
                "  Try again, or correct sha256= if the publisher has replaced the file."
            )
        os.replace(part, path)
        _forget(part)
    _sums(path).write_text(f"{found}  {path.name}\n")
    return path


def verify(path: Path, sha256: str | None = None) -> Path:
    """Check a file that was fetched before.

    Against ``sha256``; else against ``NAME.sha256`` if the file has changed since that was written. Raises
    DataError if it is another file.
    """
    sums = _sums(path)
    recorded = sums.is_file() and path.stat().st_mtime_ns > sums.stat().st_mtime_ns
    expected = sha256.lower() if sha256 else sums.read_text().split()[0] if recorded else None
    if expected and (found := digest(path)) != expected:
        raise DataError(
            f"{path} has the checksum {found}, expected {expected}.\n  The file is damaged or was "
            f"changed: delete it and fetch it again{'' if sha256 else f'; {sums.name} holds the sum'}."
        )
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url: str, path: Path, file: IO[bytes], magic: bytes, timeout: float) -> None:
    """Append to the open ``.part`` file until it is whole."""
    part, failures = Path(file.name), 0
    while True:
        have = file.seek(0, os.SEEK_END)
        try:
            _piece(url, path, file, magic, timeout)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                _forget(part)
                raise DataError(f"{url}: the server answers {error.code} {error.reason}.\n"
                                "  The file has moved or needs an account; fetch it by hand to "
                                f"{path}") from error  # fmt: skip
            reason = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (28, 122):  # no space, quota
                what = f"{path}: {error.strerror}"
                raise DataError(f"{what}; the next call goes on from {part.name}.") from error
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if file.seek(0, os.SEEK_END) > have else failures + 1
        # Nothing has come so far: most likely there is no network, and waiting does not bring one.
        if failures >= (_TRIES if have else 2):
            have = file.seek(0, os.SEEK_END)
            kept = f" after {have:,} bytes, which are kept" if have else ""
            raise DataError(
                f"{url} cannot be fetched{kept} ({reason}).\n  Try again, or run where there is a network\n"
                f"    {command(url, path)}\n  and bring the file to {path}"
            )
        time.sleep(min(_WAIT * 2 ** max(failures - 1, 0), 30))


def _piece(url: str, path: Path, file: IO[bytes], magic: bytes, timeout: float) -> None:
    """One answer of the server, appended to the file."""
    part = Path(file.name)
    note, known = part.with_name(part.name + ".json"), dict[str, Any]()
    with suppress(OSError, ValueError):
        known = json.loads(note.read_text())
    have = file.seek(0, os.SEEK_END) if known.get("url") == url else 0
    request = urllib.request.Request(url, headers={"User-Agent": "lit-wm", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if known.get("tag"):
            request.add_header("If-Range", known["tag"])
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if total and int(total[1]) == have == known.get("size", have):
            return  # it was whole already
        file.truncate(0)
        raise http.client.HTTPException("the server has another file by now") from error
    with answer:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        size: int | None = None  # of the whole file, if the server says it
        if span and span[2] != "*":
            size = int(span[2])
        elif length := answer.headers.get("Content-Length"):
            size = int(length) + (have if answer.status == 206 else 0)
        tag = answer.headers.get("ETag")  # tells this file from a later one: a strong one, else the date
        tag = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified")
        same = size in (None, known.get("size")) and tag in (None, known.get("tag"))
        if have and (answer.status != 206 or not span or int(span[1]) != have or not same):
            have = 0  # the whole file comes, or another one than before
            file.truncate(0)
            if answer.status == 206:
                raise http.client.HTTPException("the server sent another part than was asked for")
        file.truncate(have)
        if "text/html" in answer.headers.get("Content-Type", ""):
            _refuse(url, part, "a web page (text/html)")
        if size is not None and (free := shutil.disk_usage(path.parent).free) < size - have:
            need = f"{path} needs {size - have:,} bytes"
            raise DataError(f"{need}, {path.parent} has {free:,} free; make room.")
        note.write_text(json.dumps({"url": url, "size": size, "tag": tag}))
        while data := answer.read(_PIECE):
            if not have and (data[:64].lstrip()[:1] == b"<" or not data.startswith(magic)):
                _refuse(url, part, f"something else: {data[:16]!r}")
            file.write(data)
            have += len(data)
        file.flush()
        if size is not None and have < size:
            raise http.client.IncompleteRead(b"", size - have)


def _refuse(url: str, part: Path, what: str) -> None:
    _forget(part)
    raise DataError(
        f"{url}: the server sent {what} instead of the data.\n"
        "  Open the address in a browser to see why; a proxy or a login page may stand in between."
    )


def _forget(part: Path) -> None:
    for path in (part, part.with_name(part.name + ".json")):
        path.unlink(missing_ok=True)


def _sums(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
