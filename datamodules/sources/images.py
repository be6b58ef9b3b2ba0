"""Images of any source in another size, or gray, before they are written to the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from datamodules.episodes import Episode, Report, Source
from lit_wm.envs.images import check_size, resize, to_gray
from lit_wm.errors import ConfigError


class Resized(Source):
    """The images of a source as an environment's options ``size`` and ``gray`` show them.

    Args:
        source: any source with images.
        size: pixels of both sides, or (height, width), Pillow bilinear; None leaves it.
        gray: luma instead of red, green and blue.

    Raises:
        ConfigError: without an image, or for an impossible size.
    """

    def __init__(self, source: Source, size: int | Sequence[int] | None, gray: bool):
        spaces, name = source.schema.spaces, type(source).__name__
        self._keys = {k: s.channels_first for k, s in spaces.obs.items() if s.is_image}
        if not self._keys:
            raise ConfigError(
                f"the options size and gray need an image; the observations of this {name} source are "
                f"{', '.join(spaces.obs)}."
            )
        self._source, self._size, self._gray = source, None if size is None else check_size(size, name), gray
        obs = dict(spaces.obs)
        for key, first in self._keys.items():
            height, width, channels = obs[key].hwc
            if gray and channels not in (1, 3):
                raise ConfigError(
                    f"observation {key!r} has {channels} channels; gray needs red, green and blue."
                )
            height, width = self._size or (height, width)
            channels = 1 if gray else channels
            shape = (channels, height, width) if first else (height, width, channels)
            obs[key] = replace(obs[key], shape=shape)
            if obs[key].channels_first != first:
                raise ConfigError(
                    f"observation {key!r} of shape {shape} looks like another layout of channels."
                )
        self.schema = replace(source.schema, spaces=replace(spaces, obs=obs))
        self.files, self.meta, self.last_obs = source.files, source.meta, source.last_obs
        self.total_episodes, self.total_steps = source.total_episodes, source.total_steps

    @property
    def report(self) -> Report:
        """That of the source itself."""
        return self._source.report

    def episodes(self) -> Iterator[Episode]:
        """All episodes; what is no image of the expected shape is left for the checks to complain about."""
        before = self._source.schema.spaces.obs
        for episode in self._source.episodes():
            obs = dict(episode.observation)
            for key, first in self._keys.items():
                value = np.asarray(obs.get(key))
                if value.dtype == np.uint8 and value.shape[1:] == before[key].shape:
                    obs[key] = np.stack([self._change(image, first) for image in value])
            yield replace(episode, observation=obs)

    def _change(self, image: np.ndarray, first: bool) -> np.ndarray:
        image = np.moveaxis(image, 0, -1) if first else image
        image = resize(np.ascontiguousarray(image), self._size) if self._size else image
        image = to_gray(image) if self._gray and image.shape[-1] == 3 else image
        return np.moveaxis(image, -1, 0) if first else image
