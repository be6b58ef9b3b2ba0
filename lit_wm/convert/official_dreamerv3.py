"""Parameters of the official DreamerV3 (danijar/dreamerv3) to ours and back.

The module tree has the official names, so only leaves are renamed: ``enc/cnn0/kernel`` is
``enc.cnn0.weight``. Linear kernels keep their (in, out) layout; convolution kernels go from (k, k, in, out)
to (out, in, k, k).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lit_wm.errors import CheckpointError
from lit_wm.nets.coders import module_key

# Parents whose next part is an observation or action key, which may itself contain slashes.
_KEYED = {("dec", "vec"): 2, ("pol", "head"): 2}


def to_our_name(name: str) -> str:
    """``pol/head/arm/x/mean/kernel`` -> ``pol.head.@arm/x.mean.weight``."""
    parts = name.split("/")
    if parts[-1] == "value":  # retnorm/lo/value
        return ".".join(parts[:-1])
    keyed = tuple(parts[:2]) in _KEYED
    if keyed:
        parts = [*parts[:2], module_key("/".join(parts[2:-2])), *parts[-2:]]
    parts[-1] = {"kernel": "weight"}.get(parts[-1], parts[-1])
    return ".".join(parts)


def from_official(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Official arrays by name -> a state dict for :class:`lit_wm.dreamerv3.DreamerV3`.

    Optimiser state and counters are left out (names that do not begin with one of the networks).
    """
    state = {}
    for name, array in params.items():
        if name.split("/")[0] not in ("enc", "dyn", "dec", "rew", "con", "pol", "val", "slowval", "retnorm"):
            continue
        value = torch.from_numpy(np.array(array))
        state[to_our_name(name)] = value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value
    return state


def to_official(state: Mapping[str, Tensor], names: list[str]) -> dict[str, np.ndarray]:
    """Inverse of :func:`from_official` for the official ``names``.

    Raises:
        CheckpointError: if a name has no counterpart.
    """
    out = {}
    for name in names:
        ours = to_our_name(name)
        if ours not in state:
            raise CheckpointError(f"official parameter {name!r} has no counterpart {ours!r} in this model")
        value = state[ours].detach().cpu()
        out[name] = (value.permute(2, 3, 1, 0) if value.ndim == 4 else value).numpy()
    return out
