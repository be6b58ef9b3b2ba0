"""Parameter counts of the presets, equal to the official code's to the digit."""

from __future__ import annotations

import pytest
import torch

from lit_wm.dreamerv3 import DreamerV3
from lit_wm.errors import ConfigError
from lit_wm.presets import (
    DREAMERV3,
    DREAMERV3_PARAMETERS_IMAGE,
    DREAMERV3_PARAMETERS_VECTOR,
    TDMPC2,
    TDMPC2_PARAMETERS,
    TDMPC2_PARAMETERS_DOG,
    TDMPC2_PARAMETERS_EPISODIC,
    dreamerv3_sizes,
    tdmpc2_sizes,
)
from lit_wm.tdmpc2 import TDMPC2 as TDMPC2Model
from lit_wm.types import Spaces, Spec

IMAGE = Spaces({"image": Spec("uint8", (64, 64, 3))}, {"action": Spec("int32", (), 18)})
VECTOR = Spaces({"obs": Spec("float32", (39,))}, {"action": Spec("float32", (6,))})
PARTS = ("enc", "dyn", "dec", "rew", "con", "pol", "val")
# Parts of the official code: for an image with 18 discrete actions, for a vector with 6 continuous ones.
IMAGE_PARTS = {
    "size1m": (14_304, 377_472, 80_595, 57_663, 41_153, 50_706, 66_111),
    "size12m": (220_416, 5_982_720, 1_272_003, 721_407, 656_129, 792_594, 853_503),
    "size25m": (493_824, 13_446_912, 2_857_635, 1_573_503, 1_475_713, 1_778_706, 1_869_951),
    "size50m": (876_032, 23_892_992, 5_076_355, 2_753_279, 2_622_977, 3_158_034, 3_279_615),
    "size100m": (1_966_848, 53_730_816, 11_413_059, 6_095_871, 5_900_545, 7_096_338, 7_278_591),
    "size200m": (3_492_864, 95_496_192, 20_282_115, 10_749_183, 10_488_833, 12_607_506, 12_850_431),
    "size400m": (7_850_496, 214_809_600, 45_617_283, 23_987_967, 23_597_569, 28_348_434, 28_712_703),
}
VECTOR_PARTS = {
    "size1m": (11_072, 364_416, 52_071, 57_663, 41_153, 50_316, 66_111),
    "size12m": (142_592, 5_783_040, 797_991, 721_407, 656_129, 791_052, 853_503),
    "size25m": (312_192, 12_999_936, 1_786_791, 1_573_503, 1_475_713, 1_776_396, 1_869_951),
    "size50m": (547_328, 23_100_416, 3_168_807, 2_753_279, 2_622_977, 3_154_956, 3_279_615),
    "size100m": (1_214_208, 51_952_128, 7_112_487, 6_095_871, 5_900_545, 7_091_724, 7_278_591),
    "size200m": (2_143_232, 92_338_176, 12_629_031, 10_749_183, 10_488_833, 12_601_356, 12_850_431),
    "size400m": (4_787_712, 207_713_280, 28_380_711, 23_987_967, 23_597_569, 28_339_212, 28_712_703),
}
CASES = {
    "image": (IMAGE, IMAGE_PARTS, DREAMERV3_PARAMETERS_IMAGE),
    "vector": (VECTOR, VECTOR_PARTS, DREAMERV3_PARAMETERS_VECTOR),
}


@pytest.mark.parametrize("preset", list(IMAGE_PARTS))
@pytest.mark.parametrize("kind", list(CASES))
def test_parameters_are_the_official_ones(kind: str, preset: str) -> None:
    spaces, parts, totals = CASES[kind]
    with torch.device("meta"):
        model = DreamerV3(spaces, **dreamerv3_sizes(preset))
    counts = tuple(sum(p.numel() for p in getattr(model, name).parameters()) for name in PARTS)
    assert counts == parts[preset]
    trained = sum(p.numel() for name in ("world_model", "actor", "critic") for p in model.group(name))
    assert trained == totals[preset] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_full_preset_is_checked() -> None:
    assert set(DREAMERV3) - {"debug"} == set(IMAGE_PARTS) == set(VECTOR_PARTS)


@pytest.mark.parametrize("kind", list(CASES))
def test_debug_builds_and_is_small(kind: str) -> None:
    model = DreamerV3(CASES[kind][0], **dreamerv3_sizes("debug"))
    assert sum(p.numel() for p in model.parameters()) < 150_000


def test_an_override_replaces_its_entry_and_none_does_not() -> None:
    assert dreamerv3_sizes("size1m", units=7, depth=None) == dict(DREAMERV3["size1m"]) | {"units": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "size12"}, "did you mean 'size12m'"),
        ({"preset": "size1m", "units": 0}, "must be at least 1"),
        ({"preset": "size1m", "blocks": 7}, "deter=512 must be divisible"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dreamerv3_sizes(**arguments)


# --- TD-MPC2: tests/convert counts the official table, this the module ------------------------------------


@pytest.mark.parametrize("kind", list(TDMPC2_PARAMETERS))
@pytest.mark.parametrize("preset", list(TDMPC2)[1:])
def test_tdmpc2_has_the_official_parameters(preset: str, kind: str) -> None:
    tasks = None if kind == "vector" else kind
    spaces = Spaces({"obs": Spec("float32", (24 if tasks == "mt30" else 39,))}, VECTOR.action)
    with torch.device("meta"):
        model = TDMPC2Model(spaces, tasks=tasks, **tdmpc2_sizes(f"tdmpc2:{preset}", tasks))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == TDMPC2_PARAMETERS[kind][preset]


def test_tdmpc2_has_the_official_parameters_with_terminations_and_as_a_dog() -> None:
    dog = Spaces({"obs": Spec("float32", (223,))}, {"action": Spec("float32", (38,))})
    with torch.device("meta"):
        models = [
            TDMPC2Model(VECTOR, episodic=True, **tdmpc2_sizes("5m")),
            TDMPC2Model(dog, **tdmpc2_sizes("5m")),
        ]
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models]
    assert counts == [TDMPC2_PARAMETERS_EPISODIC, TDMPC2_PARAMETERS_DOG]


def test_tdmpc2_sizes_depend_on_the_task_set() -> None:
    latent = [tdmpc2_sizes("19m", tasks)["latent_dim"] for tasks in (None, "mt30", "mt80")]
    assert latent == [768, 512, 768]
    assert tdmpc2_sizes("19m", "mt30", latent_dim=64)["latent_dim"] == 64
    dims = {(p, t): tdmpc2_sizes(p, t)["task_dim"] for p in list(TDMPC2)[1:] for t in ("mt30", "mt80")}
    assert {k for k, v in dims.items() if v == 64} == {(p, "mt30") for p in ("5m", "19m", "48m")}
    assert set(dims.values()) == {64, 96}
    assert tdmpc2_sizes("5m", "mt80", task_dim=7)["task_dim"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "5M"}, "unknown preset '5M'; known: debug, 1m"),
        ({"preset": "5m", "tasks": "mt50"}, "unknown task set 'mt50'"),
        ({"preset": "5m", "mlp_dim": 0}, "must be at least 1"),
        ({"preset": "5m", "num_q": 1}, "num_q=1: expected 2 or more"),
    ],
)
def test_impossible_tdmpc2_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tdmpc2_sizes(**arguments)
