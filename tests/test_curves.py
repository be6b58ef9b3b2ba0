"""The published curves are those of the repositories, and environments of ours find theirs."""

from __future__ import annotations

import numpy as np
import pytest

from lit_wm.curves import curves, published, task_name
from lit_wm.errors import ConfigError
from lit_wm.tasks import task_list


# Means over tasks at the last logged point of every seed, from a reading of the repository's own files.
@pytest.mark.parametrize(
    ("model", "prefix", "tasks", "final"),
    [
        ("tdmpc2", "", 39, 887.3), ("tdmpc", "", 39, 730.2), ("dreamerv3", "", 39, 682.2),
        ("sac", "", 39, 590.9),
        ("tdmpc2", "mw-", 50, 0.957), ("tdmpc", "mw-", 50, 0.905), ("dreamerv3", "myo-", 10, 0.083),
    ],
)  # fmt: skip
def test_the_curves_end_where_the_published_ones_do(model, prefix, tasks, final):
    metric = "success" if prefix else "return"
    ends = [
        c.mean[-1] for c in curves()
        if c.model == model and c.metric == metric and c.task.startswith(prefix) and not c.pixels
        and c.source == "nicklashansen/tdmpc2"
    ]  # fmt: skip
    assert len(ends) == tasks
    assert np.mean(ends) == pytest.approx(final, rel=0.005)  # the last points of seeds lie some steps apart


def test_a_curve_is_the_published_one_point_by_point():
    curve = published("tdmpc2", "dmc:cartpole_swingup")
    assert curve.steps[:4].tolist() == [0, 100_000, 200_000, 300_000]
    assert curve.mean[:2].tolist() == [2.767, 839.4]
    assert curve.std[:2].tolist() == [1.452, 35.202]
    assert curve.seeds[:2].tolist() == [3, 3]
    assert curve.steps[-1] == 4_000_000


def test_all_suites_are_there_and_rise_in_steps():
    own = [c for c in curves() if c.source == "danijar/dreamerv3"]
    assert len(own) == 18 + 20 + 26
    assert sum(c.task.startswith("atari-") for c in own) == 26
    assert sum(c.pixels for c in own) == 20
    assert sum(c.pixels and c.model == "tdmpc2" for c in curves()) == 12
    for curve in curves():
        assert (np.diff(curve.steps) > 0).all()
        assert np.isfinite(curve.mean).all()
        assert (np.isfinite(curve.std) == (curve.seeds > 1)).all()


def test_the_curve_of_a_model_is_its_authors_own_if_they_have_one():
    assert published("dreamerv3", "dmc:walker_walk").source == "danijar/dreamerv3"
    assert published("dreamerv3", "dmc:dog_run").source == "nicklashansen/tdmpc2"
    assert published("dreamerv3", "dmc:walker_walk").steps[-1] == 500_000
    assert published("dreamerv3", "dmc:walker_walk", pixels=True).steps[-1] == 1_000_000
    assert published("dreamerv3", "atari100k:pong").steps[-1] == 400_000


def test_names_of_environments_are_names_of_curves():
    assert task_name("dmc:ball_in_cup_catch") == task_name("dmc:cup_catch") == "cup-catch"
    for task in task_list("mt80"):
        assert published("tdmpc2", task.name).seeds.max() == 3


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("dreamer", "dmc:walker_walk"), "did you mean 'dreamerv3'"),
        (("tdmpc2", "dmc:walker_wlk"), "did you mean 'walker-walk'"),
        (("tdmpc2", "dmc:fish_swim", True), "one with False"),
        (("dreamerv3", "Pendulum-v1"), "has no published curve on 'Pendulum-v1'"),
    ],
)
def test_a_name_without_a_curve_is_refused_with_a_suggestion(asked, words):
    with pytest.raises(ConfigError, match=words) as error:
        published(*asked)
    assert len(str(error.value).splitlines()) <= 5
