from functools import reduce
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from datamodules.sources.flat import dropped, from_one_hot, seen
from datamodules.spaces import Columns, schema
from lit_wm.envs import spaces_from_gym
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spec

NESTED = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (3, 64, 64), np.uint8),
        "screen": spaces.Box(0, 255, (48, 40), np.uint8),
        "arm": spaces.Dict({"angle": spaces.Box(-1, 1, (2, 3)), "on": spaces.Box(0, 1, (2,), bool)}),
        "pair": spaces.Tuple((spaces.Discrete(3, start=-1), spaces.MultiBinary(4))),
        "clock": spaces.Box(0, 2**40, (), np.int64),
        "board": spaces.Box(2, 5, (2, 2), np.int8),
        "dice": spaces.MultiDiscrete([2, 6], start=[0, 1]),
        "same": spaces.MultiDiscrete([3, 3]),
        "nothing": spaces.Box(-1, 1, (0,), np.float32),
    }
)


def stack(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {k: stack([v[k] for v in values]) for k in values[0]}
    if isinstance(values[0], tuple):
        return tuple(stack(list(part)) for part in zip(*values, strict=True))
    return np.stack(values)


def read(columns: Columns, values: Any) -> Any:
    return columns.read(lambda leaf: reduce(lambda value, key: value[key], leaf.path, values))


def test_nested_steps_become_the_columns_that_an_environment_shows() -> None:
    NESTED.seed(0)
    steps = [NESTED.sample() for _ in range(5)]
    columns = Columns(NESTED, "obs", "set")
    assert columns.specs == spaces_from_gym(NESTED, spaces.Discrete(2)).obs
    got = read(columns, stack(steps))
    assert set(got) == set(columns.specs)
    for i, step in enumerate(steps):
        want = {
            "camera": step["camera"], "screen": step["screen"][..., None], "arm/angle": step["arm"]["angle"],
            "arm/on": step["arm"]["on"], "pair/0": step["pair"][0] + 1, "pair/1": step["pair"][1],
            "clock": step["clock"], "board": step["board"] - 2, "dice/0": step["dice"][0],
            "dice/1": step["dice"][1] - 1, "same": step["same"],
        }  # fmt: skip
        for key, value in want.items():
            np.testing.assert_array_equal(got[key][i], value, key)
    assert columns.start == {"pair/0": [-1], "board": [2] * 4, "dice": [0, 1]}
    assert {got[k].dtype.name for k in ("camera", "screen")} == {"uint8"}


def test_bounds_of_actions_stay_in_the_units_of_the_environment() -> None:
    box = spaces.Box(np.array([-2, -np.inf]), np.array([3, np.inf]), dtype=np.float64)
    free = spaces.Box(-np.inf, np.inf, (2,))
    space = spaces.Dict({"a": box, "b": free, "c": spaces.Box(0, 7, (1,)), "d": spaces.Discrete(3)})
    got = schema(Columns(spaces.Discrete(2), "obs", "x"), Columns(space, "action", "x"), 50)
    assert got.spaces.unbounded == ("a", "b")
    assert got.spaces.episode_length == 50
    assert {k: v.tolist() for k, v in got.low.items()} == {"a": [-2, -np.inf], "c": [0]}
    assert {k: v.tolist() for k, v in got.high.items()} == {"a": [3, np.inf], "c": [7]}


def test_text_is_refused_dropped_or_numbered() -> None:
    space = spaces.Dict({"say": spaces.Text(9), "x": spaces.Box(-1, 1, (1,))})
    with pytest.raises(DataError, match="set: observation 'say' is Text.\n.*drop=say.*text=ids"):
        Columns(space, "obs", "set")
    assert list(Columns(space, "obs", "set", ["say"]).specs) == ["x"]
    columns = Columns(space, "obs", "set", words={"say": ["go", "stop"]})
    assert columns.specs["say"] == Spec("int32", (), 2)
    values: dict[str, Any] = {"say": ["stop", "go", "stop"], "x": np.zeros((3, 1), np.float32)}
    assert read(columns, values)["say"].tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="'run' is not among its 2"):
        read(columns, values | {"say": ["run"]})
    with pytest.raises(ConfigError, match="'sya', which is no observation; did you mean 'say'"):
        dropped("say, sya", ["say", "x"], "set")


@pytest.mark.parametrize(
    ("space", "text"),
    [(spaces.Graph(spaces.Discrete(2), None), "Graph"), (spaces.Sequence(spaces.Discrete(2)), "Sequence"),
     (spaces.Box(0, 1, (4, 4, 3), np.float32), "images must be uint8")],
)  # fmt: skip
def test_other_spaces_are_refused_by_name(space: spaces.Space, text: str) -> None:
    with pytest.raises(DataError, match=f"set: observation 'a/b' is a.*{text}(?s:.*)drop=NAME"):
        Columns(spaces.Dict({"a": spaces.Dict({"b": space})}), "obs", "set")


def test_numbers_keep_what_a_check_must_see() -> None:
    columns = Columns(spaces.Discrete(3, start=1), "action", "x")
    assert read(columns, np.array([1.5, 3.0]))["action"].tolist() == [
        0.5,
        2.0,
    ]  # no class: for the check to refuse
    assert read(columns, np.array([[1], [3]]))["action"].tolist() == [0, 2]
    uneven = read(Columns(spaces.MultiDiscrete([2, 3]), "action", "x"), np.zeros((4, 3), int))
    assert uneven["action/1"].shape == (4, 3)  # of the wrong width: for the check to refuse


def test_arrays_without_a_space() -> None:
    assert seen(np.dtype("uint8"), (64, 48)) == Spec("uint8", (64, 48, 1))
    assert seen(np.dtype("uint8"), (3, 8, 8)) == Spec("uint8", (3, 8, 8))
    assert seen(np.dtype("uint8"), (8, 8)) == Spec("float32", (8, 8))
    assert seen(np.dtype("bool"), ()) == Spec("int32", (), 2)
    assert from_one_hot(np.eye(3)[[2, 0]], "x").tolist() == [2, 0]
    with pytest.raises(DataError, match="x, row 1 is not one-hot"):
        from_one_hot(np.array([[0, 1], [0.5, 0.5]]), "x")
