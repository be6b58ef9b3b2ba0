"""The size presets as frozen data; this module imports neither torch nor Lightning.

Without a preset the official defaults equal ``size200m``. An explicit argument of the module overrides its
row. The nominal names match the parameter counts only roughly (``size200m`` has 166 M trainable parameters on
images).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def _row(deter: int, hidden: int, stoch: int, classes: int, depth: int, units: int) -> Mapping[str, int]:
    return MappingProxyType(
        dict(deter=deter, hidden=hidden, stoch=stoch, classes=classes, depth=depth, units=units, blocks=8)
    )


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
# actions ...
DREAMERV3_PARAMETERS_IMAGE: Mapping[str, int] = MappingProxyType(
    {
        "size1m": 688_004,
        "size12m": 10_498_772,
        "size25m": 23_496_244,
        "size50m": 41_659_284,
        "size100m": 93_482_068,
        "size200m": 165_967_124,
        "size400m": 372_924_052,
    }
)

# ... and one vector of 39 numbers with 6 continuous actions.
DREAMERV3_PARAMETERS_VECTOR: Mapping[str, int] = MappingProxyType(
    {
        "size1m": 642_802,
        "size12m": 9_745_714,
        "size25m": 21_794_482,
        "size50m": 38_627_378,
        "size100m": 86_645_554,
        "size200m": 153_800_242,
        "size400m": 345_519_154,
    }
)


def dreamerv3_sizes(preset: str, **overrides: int | None) -> dict[str, int]:
    """Sizes of a preset; an override that is not None replaces its entry.

    Raises:
        ConfigError: for an unknown preset or a size below 1.
    """
    from lit_wm.errors import ConfigError, nearest

    name = preset.removeprefix("dreamerv3:")
    if name not in DREAMERV3:
        raise ConfigError(
            f"unknown preset {preset!r}; known: {', '.join(DREAMERV3)}{nearest(name, list(DREAMERV3))}"
        )
    sizes = dict(DREAMERV3[name]) | {k: v for k, v in overrides.items() if v is not None}
    bad = {k: v for k, v in sizes.items() if v < 1}
    if bad:
        raise ConfigError(f"model sizes must be at least 1, got {bad}")
    if sizes["deter"] % sizes["blocks"]:
        raise ConfigError(f"model.deter={sizes['deter']} must be divisible by model.blocks={sizes['blocks']}")
    return sizes
