"""Where episodes come from: one reader per format, chosen by the scheme of a URI.

``minari:ID``, ``d4rl:NAME``, ``hdf5:PATH``, ``npz:PATH`` (a file, a folder or a pattern), ``tdmpc2:PATTERN``,
``torchrl:PATH`` and ``rows:PATH``; ``MODULE:SCHEME:REST`` first imports a module that registers more. Options
of a reader follow as ``?name=value&name=value``, or by keyword.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from datetime import date
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import yaml

from datamodules.episodes import Episode, Report, Schema, Source, checked
from lit_wm.errors import ConfigError, DataError, nearest

__all__ = ["Episode", "Report", "Schema", "Source", "checked", "find_uri", "open_source", "parse_uri",
           "register"]  # fmt: skip

_HOME = {  # readers with an example of what follows
    "minari": "D4RL/door/human-v2",
    "d4rl": "hopper-medium-v2",
    "hdf5": "demos/*.hdf5",
    "npz": "demos/*.npz",
    "tdmpc2": "mt30/*.pt",
    "torchrl": "FOLDER",
    "rows": "FOLDER",
}
# What a path is: by suffix, and by what lies in a folder.
_SUFFIXES = {".npz": "npz", ".hdf5": "hdf5", ".h5": "hdf5", ".pt": "tdmpc2"}
_FOLDERS = {"rows.json": "rows", "metadata.json": "minari", "data/metadata.json": "minari"}
_FOLDERS |= {"meta.json": "torchrl", "*.npz": "npz", "*.hdf5": "hdf5", "*.pt": "tdmpc2"}
_READERS: dict[str, Callable[..., Source]] = {}
_S = TypeVar("_S", bound=type[Source])


def register(scheme: str) -> Callable[[_S], _S]:
    """Class decorator: ``scheme:REST?option=value`` opens as ``cls(REST, option=value)``.

    Raises:
        ConfigError: if another class has the scheme.
    """

    def add(cls: _S) -> _S:
        known = _READERS.setdefault(scheme, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"the source {scheme!r} is taken by {known.__module__}.{known.__qualname__}.")
        _READERS[scheme] = cls
        return cls

    return add


def find_uri(source: str | Path) -> str:
    """The URI of a file or folder named by its path; a URI is returned as it is.

    Raises:
        DataError: if nothing is there, or of no known kind.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if ":" in str(source):
            return str(source)
        place, mark, options = str(source).rpartition("?")
        hint = f"\n  Options need a URI: {find_uri(place)}?{options}" if mark and Path(place).exists() else ""
        raise DataError(
            f"{source} does not exist; expected a file, a folder or a URI such as minari:ID"
            f"{looked_in(path)}.{hint}"
        )
    if path.is_file():
        scheme = _SUFFIXES.get(path.suffix)
    else:
        scheme = next((kind for what, kind in _FOLDERS.items() if any(path.glob(what))), None)
    if scheme is None:
        raise DataError(
            f"{source} is no data of a known kind; expected {', '.join(_SUFFIXES)}, or the folder of a "
            "cache, a Minari dataset or such files.\n  Say its kind, as in hdf5:PATH."
        )
    return f"{scheme}:{path}"


def looked_in(path: Path) -> str:
    """The part of a message that says where a relative path was looked for."""
    return "" if path.is_absolute() else f"; a relative path counts from the working directory, {Path.cwd()}"


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def parse_uri(uri: str) -> tuple[str, str, dict[str, Any]]:
    """Scheme, the rest, and the options after ``?`` as numbers, booleans, lists or text.

    Raises:
        ConfigError: without a known scheme, or with nothing after it.
    """
    scheme, colon, rest = uri.partition(":")
    if ":" in rest and scheme not in {*_HOME, *_READERS, "env"} and _is_module(scheme):
        import_module(scheme)  # it registers what follows, as Gymnasium's module:ID does
        return parse_uri(rest)
    if colon and scheme in _HOME and (not rest or re.match(r"\?[A-Za-z_]\w*=", rest)):
        what = "an id" if scheme in ("minari", "d4rl") else "a path"
        raise ConfigError(f"{scheme}: needs {what}, e.g. {scheme}:{_HOME[scheme]}")
    known = sorted({*_HOME, *_READERS})
    if not colon or not rest or scheme not in (*known, "env"):
        raise ConfigError(
            f"{uri!r} is no source{nearest(scheme, known)}\n"
            f"  Expected one of {', '.join(f'{name}:...' for name in known)}."
        )
    place, _, query = rest.rpartition("?")
    # A question mark may also belong to a pattern, or to the name of a file or folder that is there.
    if not place or not re.match(r"[A-Za-z_]\w*=", query) or Path(rest).expanduser().exists():
        return scheme, rest, {}
    pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)
    return scheme, place, {k: option_value(k, v) for k, v in pairs}


def option_value(name: str, text: str) -> Any:
    """What an option says: numbers, ``true`` and ``false``, lists as in YAML, or text.

    Raises:
        ConfigError: for brackets without their other half and the like.
    """
    try:
        value = yaml.safe_load(text) if text else text
    except yaml.YAMLError as error:
        what = getattr(error, "problem", None) or "no YAML"
        raise ConfigError(
            f"option {name}={text}: {what}.\n  Expected a number, true, false, text or a list [a,b]."
        ) from None
    # YAML also takes on, no and 2024-01-01 for something else than the text that they are.
    odd = isinstance(value, date) or (isinstance(value, bool) and text.lower() not in ("true", "false"))
    return text if odd else value


def open_source(uri: str, **options: Any) -> Source:
    """Open a dataset for reading.

    Args:
        uri: ``scheme:REST``, with options as ``?name=value``.
        options: of the reader, see its class, and of all with images ``size`` and ``gray``, see
            :class:`~datamodules.sources.images.Resized`; they win over those of the URI.

    Raises:
        ConfigError: for a scheme or option that does not exist.
        DataError: if the data cannot be read.
    """
    scheme, rest, given = parse_uri(uri)
    if scheme == "env":
        raise ConfigError(
            f"{uri} is an environment, not data to read.\n  Name it as data.env, or collect from it."
        )
    if scheme not in _READERS:
        import_module(f"datamodules.sources.{scheme}")
    reader, given = _READERS[scheme], {**given, **options}
    parameters = [*list(inspect.signature(reader).parameters)[1:], "size", "gray"]
    if unknown := [key for key in given if key not in parameters]:
        raise ConfigError(
            f"{scheme}: has no option {unknown[0]!r}{nearest(unknown[0], parameters)}\n"
            f"  Its options: {', '.join(parameters)}"
        )
    size, gray = given.pop("size", None), given.pop("gray", False)
    try:
        source = reader(rest, **given)
    except PermissionError as error:
        raise DataError(
            f"{error.filename or rest} may not be read ({error.strerror}).\n  Expected data that you may "
            "read: change its permissions, or ask its owner."
        ) from error
    if size is None and not gray:
        return source
    from datamodules.sources.images import Resized

    return Resized(source, size, gray)
