"""``lit-wm data VERB SOURCE``: offline data on the command line.

A verb is a function with :func:`verb` above it; it gets the parsed options and returns the exit status.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from datamodules.sources import Source, checked, find_uri, open_source, option_value, parse_uri
from lit_wm.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from datamodules.cache import Cache

Verb = Callable[[argparse.Namespace], int]
Option = tuple[tuple[str, ...], dict[str, Any]]
VERBS: dict[str, tuple[Verb, str, tuple[Option, ...]]] = {}


class Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Every refusal as a ConfigError."""
        raise ConfigError(f"{message}\nAll options: {self.prog} --help")


def option(*names: str, **settings: Any) -> Option:
    """An option of one verb, as ``add_argument`` takes it."""
    return names, settings


def verb(name: str, meaning: str, *options: Option) -> Callable[[Verb], Verb]:
    """Decorator: make a function a verb of ``lit-wm data``, with options beside those that all verbs have."""

    def add(function: Verb) -> Verb:
        VERBS[name] = function, meaning, options
        return function

    return add


def main(argv: list[str]) -> int:
    """Run ``lit-wm data`` with the arguments behind it. Raises ConfigError for verbs, options and sources
    that do not exist, DataError for data that cannot be used.
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
    """The source, if it is a URI, else a ConfigError; for a path that is there with the URI to write."""
    if Path(source).exists():
        raise ConfigError(f"{source} is a path; expected a URI.\n  Write {find_uri(source)}")
    place, mark, options = source.rpartition("?")
    if mark and Path(place).exists():
        right = f"{find_uri(place)}?{options}"
        raise ConfigError(f"{source} is a path with options; expected a URI.\n  Write {right}")
    parse_uri(source)
    return source


def source_options(given: argparse.Namespace) -> dict[str, Any]:
    """Reader options of ``--option`` and ``--download``."""
    options: dict[str, Any] = {"download": True} if given.download else {}
    for text in given.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text}: expected NAME=VALUE")
        options[name] = option_value(name, value)
    return options


def show(given: argparse.Namespace, plain: dict[str, Any], lines: list[tuple[str, str]]) -> None:
    """Print an answer: the JSON object for machines, or aligned lines for people."""
    if given.json:
        json.dump(_finite(plain), sys.stdout, allow_nan=False)
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
            cache = caches.rewrite(rest, progress(given))
        else:
            cache = caches.ingest(uri, root, on_bad, progress(given), replace=True, **options)
        repaired = True
    folder, count = str(cache.folder), len(cache.files)
    plain = {"cache": folder, "files": count, "bytes": cache.bytes, "repaired": repaired}
    state = "damaged, and written again" if repaired else "as written"
    show(given, plain, [("cache", folder), ("files", f"{count}, {_size(cache.bytes)}, {state}")])
    return 0


@verb(
    "doctor",
    "say what is wrong with the data, and how to mend it; several sources are compared",
    option("others", metavar="SOURCE", nargs="*", help="more sources, to be mixed with the first"),
    option("--model", choices=["dreamerv3", "tdmpc2"], help="the model to train; else both are thought of"),
    option("--batch-length", type=int, metavar="L", help="rows of a window; else that of the model"),
)
def doctor(given: argparse.Namespace) -> int:
    """Findings, errors first; status 1 if there is an error. Bad episodes are findings too."""
    from datamodules.doctor import MODELS, SEVERITIES, Doctor, Finding, examine, unreadable

    models, options = [given.model] if given.model else list(MODELS), source_options(given)
    doctors: list[Doctor] = []
    found: list[Finding] = []
    for uri in (given.source, *map(uri_of, given.others)):
        try:
            source = open_source(uri, **options)
            doctors.append(Doctor(uri, source, models, given.batch_length, given.on_bad))
        except DataError as error:
            found.append(unreadable(uri, error))
    found += examine(doctors, progress(given))
    counts = {severity: sum(f.severity == severity for f in found) for severity in SEVERITIES}
    status = int(counts["error"] > 0)
    if given.json:
        steps = {d.uri: {"episodes": len(d.survey.steps), "steps": sum(d.survey.steps)} for d in doctors}
        show(given, {"findings": [asdict(f) for f in found], "counts": counts, "sources": steps}, [])
        return status
    for f in found:
        where = f.where.removeprefix(given.source).removeprefix(": ") if not given.others else f.where
        print(f"{f.severity}: {f.check.replace('_', ' ')}{where and f', {where}'}")
        print(f"  found  {f.found}\n  means  {f.meaning}" + (f"\n  mend   {f.fix}" if f.fix else ""))
    said = ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items())
    seen = sum(len(d.survey.steps) for d in doctors)
    print(f"{said} in {seen:,} episode{'s' * (seen != 1)}")
    return status


@verb("stats", "say mean, deviation, range and quantiles of every entry, or how often each class is")
def stats(given: argparse.Namespace) -> int:
    """Numbers of all rows."""
    from datamodules.survey import Survey

    source = reading(given)
    survey, tell = Survey(source.schema), progress(given)
    for episode in checked(source, given.on_bad):
        survey.add(episode)
        tell(len(survey.steps), survey.numbers["reward"].count, 0)
    if not survey.steps:
        raise DataError(f"{given.source}: there is no episode with a step in it.")
    plain = {"uri": given.source, **survey.to_plain()}
    lines = [("source", given.source), ("episodes", f"{plain['episodes']:,}, {plain['steps']:,} steps")]
    head = ["mean", "std", "min", "q01", "q50", "q99", "max"]
    lines.append(("", "".join(f"{name:>11}" for name in head)))
    for name, entry in plain["entries"].items():
        lines += _table(name, entry, head)
    show(given, plain, lines)
    return 0


@verb(
    "preview",
    "write a picture of some episodes: a contact sheet or GIF of images, or curves",
    option("-o", "--out", type=Path, metavar="FILE", help="a .png or .gif; else preview-NAME.png here"),
    option("--episodes", type=int, default=8, metavar="N", help="how many"),
    option("--entry", metavar="NAME", help="the observation to show"),
)
def preview(given: argparse.Namespace) -> int:
    """Print the path of the picture."""
    from datamodules.preview import preview as draw

    name = re.sub(r"[^A-Za-z0-9._]+", "-", parse_uri(given.source)[1]).strip("-.")[-64:]
    path = draw(reading(given), given.out or Path(f"preview-{name}.png"), given.episodes, given.entry)
    show(given, {"path": str(path)}, [("wrote", str(path))])
    return 0


def reading(given: argparse.Namespace) -> Source:
    """The cache of a source if there is one, which reads fastest, else the source."""
    from datamodules.cache import find_cache

    options = source_options(given)
    cache = find_cache(given.source, given.cache, given.on_bad, **options)
    return open_source(f"rows:{cache.folder}") if cache else open_source(given.source, **options)


def _table(name: str, entry: dict[str, Any], head: list[str]) -> list[tuple[str, str]]:
    """Lines of one entry, up to 32 elements of it."""
    if "classes" in entry:
        rows = entry["classes"] if isinstance(entry["classes"][0], list) else [entry["classes"]]
        texts = ["  " + ", ".join(f"{c}: {n:,}" for c, n in enumerate(row) if n) for row in rows[:32]]
        return [(name * (i == 0), text) for i, text in enumerate(texts)]
    rows = list(zip(*(np.ravel(entry[key]).tolist() for key in head), strict=True))
    lines = ["".join(f"{x:>11.4g}" for x in row) for row in rows[:32]]
    names = [f"{name}[{i}]" if len(rows) > 1 else name for i in range(len(lines))]
    more = [("", f"... {len(rows) - 32} more, see --json")] if len(rows) > 32 else []
    return [*zip(names, lines, strict=True), *more]


def summary(source: Cache | Source, given: argparse.Namespace) -> dict[str, Any]:
    """What ``inspect --json`` prints, of a cache or of a source, which is read for it. Raises DataError if
    there is no episode, or a bad one.
    """
    from datamodules.cache import Cache, lost_reward
    from datamodules.writing import plan_size

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
    if not meta.get("no_reward") and (sentence := lost_reward(given.source, report, returns)):
        print(f"warning: {sentence}", file=sys.stderr)
    schema = source.schema.to_plain()
    spaces = {"observation": schema["spaces"]["obs"], "action": schema["spaces"]["action"]}
    for name, spec in spaces["action"].items():
        spec |= {bound: schema[bound].get(name) for bound in ("low", "high")}
    ended = int(terminated.sum())
    return {
        "uri": given.source, "episodes": len(steps), "steps": int(steps.sum()),
        "terminations": ended, "truncations": len(steps) - ended, "lengths": _statistics(steps),
        "returns": None if meta.get("no_reward") else _statistics(returns), "spaces": spaces,
        "env_id": meta.get("env_id"), "meta": meta, "report": report, "bytes": size,
    }  # fmt: skip


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
    said = [text for name, n in plain["report"]["counts"].items() if (text := _counted(name, n))]
    noticed = [*["; ".join(said)] * bool(said), *plain["report"]["notes"]] or ["nothing"]
    return lines + [("noticed" * (i == 0), text) for i, text in enumerate(noticed)]


_WORDS = {"skipped": "bad episodes left out", "out_of_range": "action values beyond their bounds"}


def _counted(name: str, count: int) -> str:
    """What a reader counted, in the words of the doctor; nothing where its note says all."""
    from datamodules.doctor import CHECKS

    if name not in CHECKS:
        return f"{_WORDS.get(name) or name.replace('_', ' ')}: {count:,}"
    text = CHECKS[name]["found"].split("; the first")[0]
    return "" if "{first}" in text else text.format(count=count)


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
    from datamodules.survey import spread

    plain = {name: getattr(values, name)().item() for name in ("min", "max", "mean")}
    return {**plain, "std": spread(values), "per_episode": values.tolist()}


def _finite(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: None in their place."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
