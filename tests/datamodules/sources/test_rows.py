from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datamodules.cache import ingest, write_rows
from datamodules.episodes import Episode, Schema, Source, checked
from datamodules.sources import open_source
from lit_wm.errors import DataError
from lit_wm.types import Spaces, Spec


class Random(Source):
    def __init__(self, reward: bool):
        self.reward, self.files, self.meta = reward, [], {"env_id": "Random-v0"}
        spaces = Spaces({"obs": Spec("uint8", (2, 3, 1))}, {"action": Spec("int32", (2,), 3)}, 12)
        self.schema = Schema(spaces)

    def episodes(self) -> Iterator[Episode]:
        r = np.random.default_rng(0)
        for i, steps in enumerate((1, 9, 4)):
            ends = np.zeros((2, steps), bool)
            ends[i % 2, -1] = True
            obs = r.integers(0, 256, (steps + 1, 2, 3, 1), np.uint8)
            action, reward = r.integers(0, 3, (steps, 2), np.int32), r.random(steps, np.float32)
            seed = 7 * i or None
            yield Episode({"obs": obs}, {"action": action}, reward if self.reward else None, *ends, f"{i}",
                          seed, i, i == 2)  # fmt: skip


@pytest.mark.parametrize("reward", [True, False])
def test_episodes_come_back_as_they_went_in(tmp_path: Path, reward: bool):
    cache = write_rows(Random(reward), tmp_path / "one")
    source = open_source(f"rows:{tmp_path / 'one'}")
    assert (source.total_episodes, source.total_steps) == (3, 14)
    assert source.schema == Random(reward).schema
    assert source.schema.spaces.episode_length == 12
    assert source.meta == {"env_id": "Random-v0"} | ({} if reward else {"no_reward": True})
    for old, new in zip(Random(reward).episodes(), checked(source), strict=True):
        assert (old.seed, old.task, old.fake_last) == (new.seed, new.task, new.fake_last)
        pairs = [
            (old.observation["obs"], new.observation["obs"]),
            (old.action["action"], new.action["action"]),
        ]
        pairs += [(old.terminated, new.terminated), (old.truncated, new.truncated)]
        assert (new.reward is None) == (old.reward is None)
        pairs += [] if old.reward is None else [(old.reward, new.reward)]
        for a, b in pairs:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    again = write_rows(source, tmp_path / "two")
    assert again.files == cache.files  # sizes and checksums of all columns
    assert ingest(f"rows:{tmp_path / 'one'}", tmp_path / "root").folder == cache.folder
    assert not (tmp_path / "root").exists()


def test_a_damaged_cache_is_no_source(tmp_path: Path):
    cache = write_rows(Random(True), tmp_path / "one")
    (cache.folder / "observation.memmap").unlink()
    with pytest.raises(DataError, match="column observation is missing"):
        open_source(f"rows:{tmp_path / 'one'}")
