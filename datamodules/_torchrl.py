"""TorchRL's replay classes, imported without its side effects."""

from __future__ import annotations

import multiprocessing
import warnings

_start_method = multiprocessing.get_start_method(allow_none=True)
with warnings.catch_warnings():
    # TorchRL warns about its compiled extension, which nothing here needs, and changes how processes start.
    warnings.simplefilter("ignore")
    from torchrl.data.replay_buffers import ReplayBuffer
    from torchrl.data.replay_buffers.samplers import Sampler
    from torchrl.data.replay_buffers.storages import Storage
    from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter, Writer
multiprocessing.set_start_method(_start_method, force=True)

__all__ = ["ImmutableDatasetWriter", "ReplayBuffer", "Sampler", "Storage", "Writer"]
