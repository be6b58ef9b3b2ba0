"""A source whose every value says where it belongs, and caches of it."""

import numpy as np

from datamodules.cache import ingest
from datamodules.episodes import Episode, Schema, Source
from datamodules.sources import register
from lit_wm.types import Spaces, Spec

BOUNDS = -2.0, 4.0  # of actions


@register("made")
class Made(Source):
    """``made:LENGTHS``, joined by commas; every third episode ``terminates``.

    Episode e has observations (e, t, width-2 zeros), actions (e + t / 1000) / 10 - 2 and rewards 100 e + t.
    """

    def __init__(self, rest: str, width: int = 2, image: int = 0, seed: int = 0, bounds: bool = True,
                 actions: int = 2, spread: float = 1.0, terminates: bool = True):  # fmt: skip
        self.lengths, self.width, self.image = [int(x) for x in rest.split(",")], width, image
        obs = {"obs": Spec("uint8", (image, image, 3))} if image else {"obs": Spec("float32", (width,))}
        self.actions, self.spread, self.terminates = actions, spread, terminates
        low, high = ({"action": np.full(actions, x)} for x in BOUNDS)
        spaces = Spaces(obs, {"action": Spec("float32", (actions,))})
        self.schema = Schema(spaces, low, high) if bounds else Schema(spaces)
        self.files, self.meta = [], {}

    def episodes(self):
        for e, steps in enumerate(self.lengths):
            t = np.arange(steps + 1)
            if self.image:
                obs = np.zeros((steps + 1, self.image, self.image, 3), np.uint8)
                obs[:, 0, 0, 0], obs[:, 0, 0, 1] = e, t
            else:
                obs = np.zeros((steps + 1, self.width))
                obs[:, 0], obs[:, 1] = e, t
            end = t[:-1] == steps - 1
            done = end if e % 3 == 0 and self.terminates else end & False
            action = (np.stack([e + t[:-1] / 1000] * self.actions, 1) / 10 - 2) * self.spread
            yield Episode(
                {"obs": obs}, {"action": action}, 100 * e + t[:-1], done, end & ~done, f"episode {e}"
            )


def scaled_action(e, t):
    """What the model sees of action a_t of episode e."""
    low, high = BOUNDS
    return ((e + t / 1000) / 10 - 2 - low) / (high - low) * 2 - 1


def made_cache(folder, lengths, **options):
    return ingest(f"made:{','.join(map(str, lengths))}", folder, **options)
