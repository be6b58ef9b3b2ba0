"""Every preset has exactly the parameters of the official code."""

import pytest
import torch

from lit_wm.dreamerv3 import DreamerV3
from lit_wm.errors import ConfigError
from lit_wm.presets import DREAMERV3_PARAMETERS_IMAGE, DREAMERV3_PARAMETERS_VECTOR, dreamerv3_sizes
from lit_wm.types import Spaces, Spec

IMAGE = Spaces({"image": Spec("uint8", (64, 64, 3))}, {"action": Spec("int32", (), classes=18)})
VECTOR = Spaces({"vector": Spec("float32", (39,))}, {"action": Spec("float32", (6,))})


def parameters(preset, spaces):
    with torch.device("meta"):  # shapes only: size400m would take gigabytes
        model = DreamerV3(spaces, **dreamerv3_sizes(preset))
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("slowval"))


@pytest.mark.parametrize("preset", DREAMERV3_PARAMETERS_IMAGE)
def test_parameter_counts_equal_the_official_ones(preset):
    assert parameters(preset, IMAGE) == DREAMERV3_PARAMETERS_IMAGE[preset]
    assert parameters(preset, VECTOR) == DREAMERV3_PARAMETERS_VECTOR[preset]


def test_an_override_replaces_its_entry():
    assert dreamerv3_sizes("size1m", units=128, deter=None)["units"] == 128
    assert dreamerv3_sizes("size1m", units=128, deter=None)["deter"] == 512


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="size12m"):
        dreamerv3_sizes("size13m")
