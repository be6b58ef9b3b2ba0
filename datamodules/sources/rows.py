"""``rows:PATH``: a cache as a source of episodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datamodules.cache import open_cache
from datamodules.episodes import Episode, Source
from datamodules.rows import row_key
from datamodules.sources import register


@register("rows")
class Rows(Source):
    """The episodes that a cache was written from, value by value.

    Args:
        rest: the folder of the cache.

    Raises:
        DataError: if it is not a cache or damaged.
    """

    def __init__(self, rest: str):
        self.cache = open_cache(Path(rest).expanduser())
        self.schema, self.meta = self.cache.schema, dict(self.cache.meta)
        self.files = [self.cache.folder / name for name in self.cache.files]
        self.total_episodes, self.total_steps = len(self.cache.episodes["start"]), self.cache.steps

    def episodes(self) -> Iterator[Episode]:
        """Episodes as views of the memory maps."""
        rows, table, spaces = self.cache.rows, self.cache.episodes, self.schema.spaces
        observation = {k: rows[row_key("observation", k, spaces.obs)].numpy() for k in spaces.obs}
        action = {k: rows[row_key("action", k, spaces.action)].numpy() for k in spaces.action}
        reward, terminated, truncated = (
            rows["next", name].numpy()[:, 0] for name in ("reward", "terminated", "truncated")
        )
        for i, (start, length) in enumerate(zip(table["start"], table["length"], strict=True)):
            all_, steps = slice(start, start + length), slice(start, start + length - 1)
            yield Episode(
                {k: v[all_] for k, v in observation.items()},
                {k: v[steps] for k, v in action.items()},
                None if self.meta.get("no_reward") else reward[steps],
                terminated[steps],
                truncated[steps],
                f"{self.cache.folder}, episode {i}",
                None if table["seed"][i] < 0 else int(table["seed"][i]),
                int(table["task"][i]),
                bool(table["fake_last"][i]),
            )
