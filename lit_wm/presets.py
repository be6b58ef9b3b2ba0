"""The size presets as frozen data; this module imports neither torch nor Lightning.

Without a preset the official defaults equal ``size200m`` of DreamerV3 and ``5m`` of TD-MPC2. An explicit
argument of the module overrides its row. The nominal names match the parameter counts only roughly
(``size200m`` has 166 M trainable parameters on images).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any


def _counts(names: Sequence[str], *counts: int) -> Mapping[str, int]:
    return MappingProxyType(dict(zip(names, counts, strict=True)))


def _row(*sizes: int) -> Mapping[str, int]:
    return _counts(("deter", "hidden", "stoch", "classes", "depth", "units", "blocks"), *sizes, 8)


# Columns: deter D, hidden h, stoch S, classes C, depth d (channels of the first convolution / 2), units u.
DREAMERV3: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "debug": _row(32, 16, 4, 4, 2, 16),
        "size1m": _row(512, 64, 32, 4, 4, 64),
        "size12m": _row(2048, 256, 32, 16, 16, 256),
        "size25m": _row(3072, 384, 32, 24, 24, 384),
        "size50m": _row(4096, 512, 32, 32, 32, 512),
        "size100m": _row(6144, 768, 32, 48, 48, 768),
        "size200m": _row(8192, 1024, 32, 64, 64, 1024),
        "size400m": _row(12288, 1536, 32, 96, 96, 1536),
    }
)

# Trainable parameters of the official code (slow critic excluded): an image of 64x64x3 with 18 discrete
# actions, and one vector of 39 numbers with 6 continuous actions.
_SIZES = tuple(DREAMERV3)[1:]
DREAMERV3_PARAMETERS_IMAGE = _counts(
    _SIZES, 688_004, 10_498_772, 23_496_244, 41_659_284, 93_482_068, 165_967_124, 372_924_052
)
DREAMERV3_PARAMETERS_VECTOR = _counts(
    _SIZES, 642_802, 9_745_714, 21_794_482, 38_627_378, 86_645_554, 153_800_242, 345_519_154
)


def _tdmpc2_row(*sizes: int) -> Mapping[str, int]:
    return _counts(("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_q"), *sizes)


TDMPC2: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "debug": _tdmpc2_row(16, 24, 16, 2, 2),
        "1m": _tdmpc2_row(256, 384, 128, 2, 2),
        "5m": _tdmpc2_row(256, 512, 512, 2, 5),
        "19m": _tdmpc2_row(1024, 1024, 768, 3, 5),
        "48m": _tdmpc2_row(1792, 1792, 768, 4, 5),
        "317m": _tdmpc2_row(4096, 4096, 1376, 5, 8),
    }
)

# Trainable parameters of the official code (target critics excluded): one task with 39 numbers and 6 actions,
# the task sets, and two special cases of 5m.
TDMPC2_PARAMETERS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "vector": _counts(tuple(TDMPC2)[1:], 1_218_491, 4_964_458, 18_077_802, 47_235_178, 312_656_857),
        "mt30": _counts(tuple(TDMPC2)[1:], 1_426_427, 5_241_066, 16_031_210, 48_242_410, 317_316_889),
        "mt80": _counts(tuple(TDMPC2)[1:], 1_435_067, 5_389_930, 18_970_218, 48_791_146, 317_383_129),
    }
)
TDMPC2_PARAMETERS_EPISODIC = 5_492_331  # 39 numbers, 6 actions, with the termination head
TDMPC2_PARAMETERS_DOG = 5_159_082  # 223 numbers, 38 actions


def _sizes(
    name: str, rows: Mapping[str, Mapping[str, int]], given: Mapping[str, int | None]
) -> dict[str, int]:
    """The row of a preset with what is given; an entry of None is not."""
    from lit_wm.errors import ConfigError, nearest

    if name not in rows:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(rows)}{nearest(name, list(rows))}")
    sizes = dict(rows[name]) | {k: v for k, v in given.items() if v is not None}
    if bad := {k: v for k, v in sizes.items() if v < 1}:
        raise ConfigError(f"model sizes must be at least 1, got {bad}")
    return sizes


def dreamerv3_sizes(preset: str, **overrides: int | None) -> dict[str, int]:
    """Sizes of a preset; an override that is not None replaces its entry.

    Raises:
        ConfigError: for an unknown preset or a size below 1.
    """
    from lit_wm.errors import ConfigError

    sizes = _sizes(preset.removeprefix("dreamerv3:"), DREAMERV3, overrides)
    if sizes["deter"] % sizes["blocks"]:
        raise ConfigError(f"model.deter={sizes['deter']} must be divisible by model.blocks={sizes['blocks']}")
    return sizes


def tdmpc2_sizes(preset: str, tasks: Any = None, **overrides: int | None) -> dict[str, int]:
    """Sizes of a preset; an override that is not None replaces its entry.

    Args:
        preset: ``5m`` or ``tdmpc2:5m``.
        tasks: ``mt30``, ``mt80`` or a list, as :func:`lit_wm.tasks.task_list` takes them, or ``data``; None
            for one task, which has no use for ``task_dim``.

    Raises:
        ConfigError: for an unknown preset or task set, a size below 1, or fewer than the two critics that
            every estimate draws.
    """
    from lit_wm.errors import ConfigError
    from lit_wm.tasks import task_list

    name = preset.removeprefix("tdmpc2:")
    if tasks not in (None, "data"):
        task_list(tasks)
    official = {"task_dim": 8 if name == "debug" else 96 if tasks == "mt80" or name in ("1m", "317m") else 64}
    if tasks == "mt30" and name == "19m":
        official["latent_dim"] = 512
    sizes = _sizes(name, TDMPC2, official | {k: v for k, v in overrides.items() if v is not None})
    if sizes["num_q"] < 2:
        raise ConfigError("model.num_q=1: expected 2 or more, since every estimate draws two of the critics")
    return sizes
