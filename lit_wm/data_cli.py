"""``lit-wm data VERB SOURCE``: offline data on the command line.

A verb is a function with :func:`verb` above it; it gets the parsed options and returns the exit status.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import yaml

from datamodules.sources import Source, checked, open_source, parse_uri
from lit_wm.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from datamodules.cache import Cache

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
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder of the caches")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    bad = "what a bad episode does"
    parser.add_argument("--on-bad", choices=["error", "skip_episode"], default="error", help=bad)
    parser.add_argument("--download", action="store_true", help="fetch the data if they are not here")
    meaning = "option of the reader, also as SOURCE?NAME=VALUE"
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=meaning)
    for names, settings in options:
        parser.add_argument(*names, **settings)
    given = parser.parse_args(argv[1:])
    given.source = uri_of(given.source)
    return function(given)


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


@verb("ingest", "write a source into the cache, once")
def ingest(given: argparse.Namespace) -> int:
    """Write the cache, or find it, and say where it lies."""
    from datamodules.cache import ingest as write

    cache = write(given.source, given.cache, given.on_bad, progress(given), **source_options(given))
    plain = {**summary(cache, given), "cache": str(cache.folder), "key": cache.key, "rows": len(cache)}
    show(given, plain, [("cache", plain["cache"]), *described(plain)])
    return 0


@verb("inspect", "say what a source holds; nothing is written, but a cache is used if there is one")
def inspect(given: argparse.Namespace) -> int:
    """Spaces, counts, returns and what was noticed."""
    from datamodules.cache import find_cache

    options = source_options(given)
    cache = find_cache(given.source, given.cache, given.on_bad, **options)
    plain = summary(cache or open_source(given.source, **options), given)
    show(given, plain, described(plain))
    return 0


_REPAIR = option("--repair", action="store_true", help="write it again from the source if it is damaged")


@verb("verify", "compare all bytes of a cache with their checksums", _REPAIR)
def verify(given: argparse.Namespace) -> int:
    """Check a cache; ``--repair`` ingests the source again if it is damaged."""
    from datamodules import cache as caches

    uri, root, on_bad, options = given.source, given.cache, given.on_bad, source_options(given)
    repaired = False
    try:
        cache = caches.find_cache(uri, root, on_bad, **options)
        if cache is None:
            raise ConfigError(
                f"{uri} is not in {caches.cache_root(root)}.\n  Write it with `lit-wm data ingest`, or say "
                "with --cache, --on-bad and --option how that was done."
            )
        cache.verify(full=True)
    except DataError:
        if not given.repair:
            raise
        scheme, rest, _ = parse_uri(uri)
        if scheme == "rows":
            root = Path(rest).expanduser().parent
            uri, on_bad, options = caches.origin(rest)
        cache, repaired = caches.ingest(uri, root, on_bad, progress(given), replace=True, **options), True
    plain = {
        "cache": str(cache.folder),
        "files": len(cache.files),
        "bytes": cache.bytes,
        "repaired": repaired,
    }
    state = "damaged, and written again" if repaired else "as written"
    show(
        given,
        plain,
        [("cache", plain["cache"]), ("files", f"{len(cache.files)}, {_size(cache.bytes)}, {state}")],
    )
    return 0


def summary(source: Cache | Source, given: argparse.Namespace) -> dict[str, Any]:
    """What ``inspect --json`` prints, of a cache or of a source, which is read for it.

    Raises:
        DataError: if there is no episode, or a bad one.
    """
    from datamodules.cache import Cache, plan_size

    if isinstance(source, Cache):
        table = source.episodes
        steps, returns, terminated = table["length"] - 1, table["return"], table["terminated"]
        report, meta, size = source.report, source.meta, source.bytes
    else:
        tell, rows, done = progress(given), [], 0
        for e in checked(source, given.on_bad):
            reward = None if e.reward is None else e.reward.sum(dtype=np.float64)
            rows.append((e.steps, reward, e.terminated[-1]))
            tell(len(rows), done := done + e.steps, 0)
        if not rows:
            raise DataError(f"{given.source}: there is no episode with a step in it.")
        steps, returns, terminated = map(np.array, zip(*rows, strict=True))
        report, size = source.report.to_plain(), plan_size(source)
        meta = {**source.meta, **({"no_reward": True} if None in returns else {})}
    schema = source.schema.to_plain()
    action = {
        k: {**spec, "low": schema["low"].get(k), "high": schema["high"].get(k)}
        for k, spec in schema["spaces"]["action"].items()
    }
    return {
        "uri": given.source,
        "episodes": len(steps),
        "steps": int(steps.sum()),
        "terminations": int(terminated.sum()),
        "truncations": int((~terminated).sum()),
        "lengths": _statistics(steps),
        "returns": None if meta.get("no_reward") else _statistics(returns),
        "spaces": {"observation": schema["spaces"]["obs"], "action": action},
        "env_id": meta.get("env_id"),
        "meta": meta,
        "report": report,
        "bytes": size,
    }


def described(plain: dict[str, Any]) -> list[tuple[str, str]]:
    """A summary for people."""
    lengths, returns = plain["lengths"], plain["returns"]
    lines = [
        ("source", plain["uri"]),
        ("environment", plain["env_id"] or "unknown"),
        ("episodes", f"{plain['episodes']:,}: {plain['terminations']:,} terminated, {plain['truncations']:,} "
                     "truncated"),
        ("steps", f"{plain['steps']:,}: {lengths['min']:,} to {lengths['max']:,} an episode"),
        ("returns", "none: the source has no rewards" if returns is None else
                    f"{returns['mean']:,.6g} on average, {returns['min']:,.6g} to {returns['max']:,.6g}"),
        ("size", _size(plain["bytes"])),
    ]  # fmt: skip
    for kind, entries in plain["spaces"].items():
        for name, spec in entries.items():
            text = f"{name}: {spec['dtype']} ({', '.join(map(str, spec['shape'])) or 'scalar'})"
            text += f", {spec['classes']} classes" if spec["classes"] else ""
            if spec.get("low"):
                text += f", {min(map(float, spec['low'])):g} to {max(map(float, spec['high'])):g}"
            lines.append((kind, text))
    counts = ", ".join(f"{name} {n:,}" for name, n in plain["report"]["counts"].items())
    return [*lines, ("noticed", counts or "nothing"), *(("", note) for note in plain["report"]["notes"])]


def progress(given: argparse.Namespace) -> Callable[[int, int, int], None]:
    """Tells the size before rows are written, and on a terminal how far it is."""
    last = 0.0

    def tell(episodes: int, steps: int, planned: int) -> None:
        nonlocal last
        if not episodes:
            print(f"writing about {_size(planned)} of rows from {given.source}", file=sys.stderr)
        elif sys.stderr.isatty() and time.monotonic() - last > 0.2:
            last = time.monotonic()
            print(f"\r{episodes:,} episodes, {steps:,} steps ", end="\r", file=sys.stderr, flush=True)

    return tell


def _statistics(values: np.ndarray) -> dict[str, Any]:
    plain = {name: getattr(values, name)().item() for name in ("min", "max", "mean", "std")}
    return {**plain, "per_episode": values[:10_000].tolist()}


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
