"""What is wrong with a dataset, found before training: what it means, and how to mend it.

The sentences are in ``doctor.yaml``, by the name of the check.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from datamodules.cache import lost_reward
from datamodules.episodes import Episode, Source, checked
from datamodules.selection import common_spaces
from datamodules.survey import Sample, Survey
from lit_wm.errors import DataError
from lit_wm.types import Spec

SEVERITIES = ("error", "warning", "note")
CHECKS: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
# Environments that never end by themselves.
_ENDLESS = r"dm_control|.*Pendulum-v|HalfCheetah|Swimmer|Reacher|Pusher|Fetch|PointMaze|MountainCarContinuous"
_SKIP = "--on-bad skip_episode leaves these episodes out (in data.sources on_bad: skip_episode)"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, in sentences."""

    severity: str  # one of SEVERITIES
    check: str  # a name in CHECKS
    where: str  # source and entry
    found: str
    meaning: str
    fix: str  # may be empty: what was found says it


@dataclass(frozen=True)
class Model:
    """What a model asks of data."""

    name: str
    window: int  # rows of a training window
    crosses: bool  # whether it runs across the ends of episodes
    top: float  # greatest value in the bins
    spacing: float  # of the bins after symlog

    def discount(self, limit: int | None) -> float:
        """Gamma by default, in episodes of up to ``limit`` steps."""
        return 1 - 1 / 333 if self.crosses else float(np.clip(1 - 5 / (limit or 1000), 0.95, 0.995))


# Bins are those of lit_wm.distributions.symexp_bins(255), and of TD-MPC2's num_bins, vmin and vmax.
MODELS = {
    "dreamerv3": Model("DreamerV3", 64, True, float(np.expm1(20)), 40 / 254),
    "tdmpc2": Model("TD-MPC2", 4, False, float(np.expm1(10)), 20 / 100),
}


class Doctor:
    """Looks at one source; damaged episodes and files are findings.

    Args:
        uri: its name in findings.
        source: read once, in bounded memory.
        models: names in :data:`MODELS`; what a single one cannot use is an error, else a warning.
        batch_length: rows of a training window; None for each model's own.
        on_bad: ``skip_episode``: that bad episodes are left out is known, and no error.
    """

    def __init__(
        self, uri: str, source: Source, models: Iterable[str] = MODELS, batch_length: Any = None,
        on_bad: str = "error",
    ):  # fmt: skip
        self.uri, self.source, self.batch_length, self.on_bad = uri, source, batch_length, on_bad
        self.models = [MODELS[name] for name in models]
        self._beyond = "error" if len(self.models) == 1 else "warning"  # what one model of several cannot use
        self.findings: list[Finding] = []
        self.survey = Survey(source.schema)
        limit = source.schema.spaces.episode_length
        self.limit = limit if isinstance(limit, int) else None  # what a file says may be anything
        if self.limit is None and source.meta.get("format") == "d4rl":
            from datamodules.sources.d4rl import table

            self.limit = int(table()[source.meta["dataset_id"]]["steps"] or 0) or None
        self._bad: dict[str, tuple[int, DataError]] = {}
        self._values = {m.name: [0.0, np.inf, -np.inf] for m in self.models}
        self._steps, self._blocks = Sample(1 << 13), 0

    def add(self, check: str, entry: str = "", severity: str = "", **values: Any) -> None:
        """Note a finding at an entry, with the values that its sentences name."""
        text, where = CHECKS[check], f"{self.uri}: {entry}" if entry else self.uri
        found, meaning, fix = (text[k].format(**values) for k in ("found", "meaning", "fix"))
        self.findings.append(Finding(severity or text["severity"], check, where, found, meaning, fix))

    def examine(self, tell: Callable[[int, int, int], None] | None = None) -> list[Finding]:
        """Read the source and say what was found."""
        try:
            if cache := getattr(self.source, "cache", None):
                cache.verify(full=True)
                self.source.report.counts.update(cache.report["counts"])
                self.source.report.first.update(cache.report.get("warnings", {}))
                self.source.report.lost_reward = cache.report.get("lost_reward", 0.0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of readers: they are findings
                for episode in checked(self.source, "skip_episode", self._left_out):
                    self.survey.add(episode)
                    self._look(episode)
                    if tell:
                        tell(len(self.survey.steps), self.survey.numbers["reward"].count, 0)
        except DataError as error:
            self.damage("unreadable", error)
        for check, (count, first) in self._bad.items():
            before = f"{count:,} episodes; the first: " if count > 1 else ""
            if self.on_bad == "skip_episode":
                self.damage(check, first, f"left out: {before}", severity="warning")
            else:
                self.damage(check, first, before, _SKIP)
        if self.survey.steps:
            for look in (self._episodes, self._windows, self._rewards, self._actions, self._observations):
                look()
        elif not any(f.severity == "error" for f in self.findings):
            self.add("nothing")
        report = self.source.report
        for name, count in report.counts.items():
            note = report.first.get(name, f"{count:,} times {name}")
            if name not in ("skipped", "out_of_range"):
                self.add(name if name in CHECKS else "noticed", count=count, first=note, found=note)
        return self.findings

    def damage(
        self, check: str, error: DataError, before: str = "", more: str = "", severity: str = ""
    ) -> None:
        """Note an error as a finding: its first line is what was found, the others how to mend it."""
        first, *rest = str(error).splitlines()
        fix = [line.strip() for line in rest if "on_bad=" not in line]
        self.add(check, "", severity, found=before + first, fix=" ".join([*fix, more]).strip())

    def _left_out(self, error: DataError) -> None:
        named = (k for k, text in CHECKS.items() if re.search(text.get("pattern", "$^"), str(error)))
        check = next(named, "unreadable")
        count, first = self._bad.get(check, (0, error))
        self._bad[check] = count + 1, first

    def _look(self, episode: Episode) -> None:
        """What only whole episodes show: values, and steps for the prediction of rewards."""
        reward, n = episode.reward, episode.steps
        if reward is None:
            return
        for model in self.models:
            gamma = model.discount(self.limit)
            # What follows a cut is not known; the mean reward for ever is of the right size.
            after = 0.0 if episode.terminated[-1] else float(reward.mean(dtype=np.float64)) / (1 - gamma)
            value = discounted(reward, gamma, after)
            old, size = self._values[model.name], max(np.abs(value).max(), np.abs(reward).max())
            self._values[model.name] = [max(old[0], size), min(old[1], value.min()), max(old[2], value.max())]
        spaces = self.source.schema.spaces
        seen = [(s, episode.observation[k]) for k, s in spaces.obs.items() if not s.is_image]
        acts = [(s, episode.action[k]) for k, s in spaces.action.items()]
        if n < 3 or not seen or sum(s.size for s, _ in (*seen, *seen, *acts)) > 1000:
            return

        def rows(index: np.ndarray) -> np.ndarray:
            t = index + 1
            columns = [_floats(s, v[t]) for s, v in (*seen, *acts)] + [_floats(s, v[t + 1]) for s, v in seen]
            held = (self._blocks + t[:, None] // 64) % 2  # every other block of 64 steps
            return np.concatenate([*columns, reward[t[:, None] + [-1, 0, 1]], held], 1)

        self._steps.add(n - 2, rows)
        self._blocks += 1 + n // 64

    def _episodes(self) -> None:
        steps, ended = np.array(self.survey.steps), np.array(self.survey.terminated)
        count, longest, done, limit = len(steps), int(steps.max()), int(ended.sum()), self.limit
        if count < 10:
            self.add("few_episodes", severity="warning" * (count == 1), count=count, steps=steps.sum())
        if same := count - len(set(self.survey.digests)):
            first: dict[bytes, int] = {}
            pairs = ((i, first.setdefault(digest, i)) for i, digest in enumerate(self.survey.digests))
            b, a = next((i, at) for i, at in pairs if i != at)
            self.add("duplicates", same=same, count=count, a=a, b=b)
        if limit and longest > limit:
            self.add("wrong_length", count=(steps > limit).sum(), limit=limit, longest=longest)
        # Without a known limit only a round length, of all terminated episodes and of no other, is suspect.
        known, limit = bool(limit), limit or longest
        at = int((steps[ended] == limit).sum())
        if at and at == (steps == limit).sum() and (known or (limit % 50 == 0 and 1 < at == done)):
            how = "the time limit" if known else "which looks like a time limit"
            self.add("terminal_is_limit", "terminated", count=at, limit=limit, known=how)
        if done and any(not m.crosses for m in self.models):
            self.add("episodic", "terminated", done=done, count=count)
        env = self.source.meta.get("env_id") or ""
        unknown = self.source.report.counts.keys() & {"dones", "no_end"}  # findings of their own
        if not (done or unknown or re.match(_ENDLESS, env)):
            self.add("no_terminations", "terminated", count=count, env=env or "the task")

    def _windows(self) -> None:
        rows = np.array(self.survey.steps) + 1
        for model in self.models:
            length = self.batch_length or model.window
            # Windows that cross ends need a row before them too.
            short = np.full(len(rows), rows.sum() < length + 1) if model.crosses else rows < length
            if short.any():
                longest = rows.sum() if model.crosses else rows.max()
                check, severity = ("no_window", self._beyond) if short.all() else ("short_episodes", "")
                self.add(check, "", severity, short=short.sum(), count=len(rows), length=length,
                         model=model.name, longest=longest, steps=(rows[short] - 1).sum())  # fmt: skip

    def _rewards(self) -> None:
        reward = self.survey.numbers["reward"]
        if not reward.count:
            return self.add("no_rewards", "reward")
        low, high = float(reward.min[0]), float(reward.max[0])
        constant = low == high and (low == 0 or not any(self.survey.terminated))
        if lost := lost_reward(self.uri, self.source.report.to_plain(), np.array(self.survey.returns)):
            said, fix = lost.removeprefix(f"{self.uri}: ").split("\n  ")
            self.add("lost_reward", "reward", found=said, fix=fix)
        elif constant:
            self.add("constant_reward", "reward", "note" * (low != 0), count=reward.count, low=low)
        if constant:
            return
        for model in self.models:
            most, least, greatest = map(float, self._values[model.name])
            about: dict[str, Any] = {"gamma": model.discount(self.limit), "model": model.name}
            width = (min(abs(least), abs(greatest)) * (least * greatest > 0) + 1) * np.expm1(model.spacing)
            part = (greatest - least) / width
            if most > model.top:
                scale = 10 ** np.floor(np.log10(model.top / most))
                about |= {"most": most, "top": model.top, "scale": scale}
                self.add("two_hot_range", "reward", self._beyond, **about)
            elif part < 0.1 if most < 1 else part < 0.02:
                how = f"shift: {-(low + high) / 2:.4g}"
                how = f"scale: {10 ** np.round(-np.log10(most)):g}" if most < 1 else how
                self.add("two_hot_resolution", "reward", least=least, greatest=greatest, part=part, how=how,
                         **about)  # fmt: skip
        found = shifted(self._steps.rows)
        if found is not None and found.argmin() != 1 and 3 * found.min() < found[1] and found.min() < 0.5:
            way, other = ("late", "t+1") if found.argmin() == 2 else ("early", "t-1")
            self.add("reward_shift", "reward", way=way, other=other, times=found[1] / found.min(),
                     best=found.min(), here=found[1])  # fmt: skip

    def _actions(self) -> None:
        schema = self.source.schema
        for key, spec in schema.spaces.action.items():
            numbers, where = self.survey.numbers[f"action {key}"], f"action {key!r}"
            if spec.is_discrete:
                unused = np.argwhere(numbers.counts == 0)
                if len(unused):
                    which = _some(f"{i}: {c}" if spec.shape else c for i, c in unused)
                    self.add("unused_classes", where, which=which, count=numbers.counts.size)
                continue
            nobody = np.full(spec.shape, np.nan)
            low, high = (bounds.get(key, nobody).reshape(-1) for bounds in (schema.low, schema.high))
            known, least, most = np.isfinite(low) & np.isfinite(high), numbers.min, numbers.max
            span = np.where(known, high - low, 2.0)
            wide = ~known & (np.maximum(-least, most) > 1 + 1e-5)
            beyond = known & ((least < low - 1e-5 * span) | (most > high + 1e-5 * span))
            moves = most > least
            if wide.any():
                self.add("unbounded_action", where, most=np.maximum(-least, most)[wide].max())
            if beyond.any():
                self.add("action_range", where, count=self.source.report.counts["out_of_range"],
                         least=least[beyond].min(), most=most[beyond].max(), low=low[beyond].min(),
                         high=high[beyond].max())  # fmt: skip
            if not moves.all():
                self.add("constant_action", where, which=_some(np.flatnonzero(~moves)))
            if not wide.any() and 0 < (part := ((most - least) / span).max()) < 0.1:
                self.add("narrow_action", where, least=least.min(), most=most.max(), part=part)

    def _observations(self) -> None:
        for key, spec in self.source.schema.spaces.obs.items():
            numbers, where = self.survey.numbers[f"observation {key}"], f"observation {key!r}"
            if not spec.is_image:
                one = (numbers.counts > 0).sum(1) == 1 if spec.is_discrete else numbers.min == numbers.max
                if one.any():
                    which = _some(np.flatnonzero(one))
                    self.add("constant_column", where, which=which, count=len(one), name=key)
                if len(spec.shape) == 3 and min(spec.shape[:2]) > 16 and not spec.is_discrete:
                    self.add("image_type", where, shape=spec.shape)
                continue
            black, values = self.survey.black[key], np.flatnonzero(numbers.counts)
            if (spec.shape[0] > 16) == (spec.shape[2] > 16):
                axis = "first" if spec.channels_first else "last"
                self.add("image_layout", where, shape=spec.shape, axis=axis)
            if len(values) == 1 or values[-1] == 1:
                self.add("image_values", where, low=values[0], high=values[-1])
            elif black:
                severity = "note" * (black < numbers.count / 10)
                self.add("black_frames", where, severity, black=black, count=numbers.count, uri=self.uri)
        obs = self.source.schema.spaces.obs
        images = [k for k, spec in obs.items() if spec.is_image]
        if 0 < len(images) < len(obs) and any(not m.crosses for m in self.models):
            others = [k for k in obs if k not in images]
            found = {"images": _some(images), "others": _some(others), "some": others[0]}
            self.add("mixed_obs", "", self._beyond, **found)
        if self.source.meta.get("lossy_images"):
            self.add("lossy_images")


def examine(sources: Sequence[Doctor], tell: Callable[[int, int, int], None] | None = None) -> list[Finding]:
    """All findings about sources that are meant to be mixed, errors first."""
    found = [finding for doctor in sources for finding in doctor.examine(tell)]
    if len(sources) > 1:
        both = Doctor(", ".join(d.uri for d in sources), sources[0].source)
        schemas = {d.uri: d.source.schema for d in sources}
        try:
            common_spaces({uri: schema.spaces for uri, schema in schemas.items()})
        except DataError as error:
            *lines, fix = str(error).splitlines()
            both.add("spaces", found="\n".join(lines), fix=fix.strip())
        for key in sorted({k for s in schemas.values() for k in s.low}):
            known = {uri: (s.low[key], s.high[key]) for uri, s in schemas.items() if key in s.low}
            rest = [uri for uri, s in schemas.items() if key in s.spaces.action and uri not in known]
            scaled = [f"{u}: {np.min(a):g} to {np.max(b):g}" for u, (a, b) in known.items()
                      if (a != -1).any() or (b != 1).any()]  # fmt: skip
            if rest and scaled:
                both.add("bounds", f"action {key!r}", rest=_some(rest), scaled=_some(scaled))
        found += both.findings
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def unreadable(uri: str, error: DataError) -> Finding:
    """A source that cannot be opened."""
    first, *rest = str(error).splitlines()
    fix, meaning = " ".join(map(str.strip, rest)), CHECKS["unreadable"]["meaning"]
    return Finding("error", "unreadable", uri, first, meaning, fix)


def discounted(reward: np.ndarray, gamma: float, after: float) -> np.ndarray:
    """Sum of discounted rewards from each step on, if ``after`` is the value behind the last. (T,) float64"""
    out, gap = np.empty(len(reward)), np.arange(128) - np.arange(128)[:, None]
    powers = np.triu(gamma ** np.maximum(gap, 0.0))
    for stop in range(len(reward), 0, -128):
        start = max(stop - 128, 0)
        n = stop - start
        out[start:stop] = powers[:n, :n] @ reward[start:stop] + after * gamma ** np.arange(n, 0, -1)
        after = out[start]
    return out


def shifted(rows: np.ndarray) -> np.ndarray | None:
    """How badly o_t, a_t and o_t+1 predict the rewards stored at t-1, t and t+1, on steps held out.

    Ridge regression on features, squares and, where steps abound, products.

    Args:
        rows: features, the three rewards, and whether the step is held out.                        (n, F + 4)

    Returns:
        Squared errors relative to the variance of each, (3,); None with too few steps or constant rewards.
    """
    held = rows[:, -1].astype(bool)
    fit, features = ~held, rows.shape[1] - 4
    if min(held.sum(), fit.sum()) < 100 or 3 * features > fit.sum():
        return None
    x, y = rows[:, :-4].astype(np.float64), rows[:, -4:-1].astype(np.float64)
    x = np.clip((x - x[fit].mean(0)) / np.maximum(x[fit].std(0), 1e-6), -10, 10)
    i, j = np.triu_indices(features)
    if 4 * (features + len(i)) > fit.sum():
        i = j = np.arange(features if 8 * features < fit.sum() else 0)
    x = np.concatenate([x, x[:, i] * x[:, j]], 1)
    centre, mean = x[fit].mean(0), y[fit].mean(0)
    a, b, variance = x[fit] - centre, y[fit] - mean, y[held].var(0)
    if variance.min() < 1e-12:
        return None
    weights = np.linalg.solve(a.T @ a + 1e-3 * len(a) * np.eye(a.shape[1]), a.T @ b)
    return np.maximum((((x[held] - centre) @ weights + mean - y[held]) ** 2).mean(0) / variance, 1e-6)


def _floats(spec: Spec, value: np.ndarray) -> np.ndarray:
    """Vectors as they are, classes one-hot. (n, F) float32"""
    value = value[..., None] == np.arange(spec.classes) if spec.classes is not None else value
    return value.reshape(len(value), -1).astype(np.float32)


def _some(items: Iterable[Any]) -> str:
    words = list(map(str, items))
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
