"""``lit-wm data VERB SOURCE``: offline data on the command line.

A verb is a function with :func:`verb` above it; it gets the parsed options and returns the exit status.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from datamodules.sources import parse_uri
from lit_wm.errors import ConfigError, nearest

Verb = Callable[[argparse.Namespace], int]
VERBS: dict[str, tuple[Verb, str, tuple[tuple[tuple[str, ...], dict[str, Any]], ...]]] = {}


class Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Every refusal as a ConfigError."""
        raise ConfigError(f"{message}\nAll options: {self.prog} --help")


def option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An option of one verb, as ``add_argument`` takes it."""
    return names, settings


def verb(name: str, meaning: str, *options: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[Verb], Verb]:
    """Decorator: make a function a verb of ``lit-wm data``, with options beside those that all verbs have."""

    def add(function: Verb) -> Verb:
        VERBS[name] = function, meaning, options
        return function

    return add


def main(argv: list[str]) -> int:
    """Run ``lit-wm data`` with the arguments behind it.

    Raises:
        ConfigError: for verbs, options and sources that do not exist.
        DataError: for data that cannot be used.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<9}{meaning}" for name, (_, meaning, _) in VERBS.items()]
        print("usage: lit-wm data VERB SOURCE [options]\n", *lines, f"\nSOURCE: {_SOURCE}", sep="\n")
        return 0 if argv else 2
    if argv[0] not in VERBS:
        known = list(VERBS)
        raise ConfigError(f"unknown verb {argv[0]!r}{nearest(argv[0], known)}\nVerbs: {', '.join(known)}")
    function, meaning, options = VERBS[argv[0]]
    parser = Parser(prog=f"lit-wm data {argv[0]}", description=f"{meaning}.")
    parser.add_argument("source", metavar="SOURCE", type=uri_of, help=_SOURCE)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder of the caches")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    bad = "what a bad episode does"
    parser.add_argument("--on-bad", choices=["error", "skip_episode"], default="error", help=bad)
    parser.add_argument("--download", action="store_true", help="fetch the data if they are not here")
    meaning = "option of the reader, also as SOURCE?NAME=VALUE"
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=meaning)
    for names, settings in options:
        parser.add_argument(*names, **settings)
    return function(parser.parse_args(argv[1:]))


_SOURCE = "minari:ID, d4rl:NAME, hdf5:PATH, npz:PATH, tdmpc2:PATTERN, torchrl:PATH or rows:PATH"


def uri_of(source: str) -> str:
    """The source, if it is a URI.

    Raises:
        ConfigError: if not; a path that is there gets the URI to write for it.
    """
    path = Path(source)
    if source.partition(":")[0] != source and not path.exists():
        parse_uri(source)
        return source
    scheme = {".hdf5": "hdf5", ".h5": "hdf5", ".npz": "npz", ".pt": "tdmpc2"}.get(path.suffix)
    if path.is_dir():
        minari = (path / "data" / "metadata.json").exists() or (path / "metadata.json").exists()
        chunks = "npz" if any(path.glob("*.npz")) else None
        scheme = "rows" if (path / "rows.json").exists() else "minari" if minari else chunks
    if scheme and path.exists():
        raise ConfigError(f"{source} is a path; expected a URI.\n  Write {scheme}:{source}")
    parse_uri(source)
    return source


def source_options(given: argparse.Namespace) -> dict[str, Any]:
    """Reader options of ``--option`` and ``--download``."""
    options: dict[str, Any] = {"download": True} if given.download else {}
    for text in given.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text}: expected NAME=VALUE")
        options[name] = yaml.safe_load(value)
    return options


def show(given: argparse.Namespace, plain: dict[str, Any], lines: list[tuple[str, str]]) -> None:
    """Print an answer: the JSON object for machines, or aligned lines for people."""
    if given.json:
        json.dump(plain, sys.stdout, allow_nan=False)
        print()
        return
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
