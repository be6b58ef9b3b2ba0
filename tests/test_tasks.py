"""The official task sets: order, sizes, and what a list of one's own may hold."""

import pytest

from lit_wm.errors import ConfigError
from lit_wm.tasks import TASK_SETS, Task, task_list

MT30, MT80 = TASK_SETS["mt30"], TASK_SETS["mt80"]


def test_the_sets_have_their_official_lengths_and_largest_sizes():
    assert (len(MT30), len(MT80)) == (30, 80)
    assert MT80[:30] == MT30
    assert [(max(t.obs for t in s), max(t.action for t in s)) for s in (MT30, MT80)] == [(24, 6), (39, 6)]
    assert len({t.name for t in MT80}) == 80


@pytest.mark.parametrize(
    ("index", "task"),
    [
        (0, ("walker-stand", 24, 6, 500)),
        (3, ("cheetah-run", 17, 6, 500)),
        (11, ("cartpole-swingup-sparse", 5, 1, 500)),
        (16, ("fish-swim", 24, 5, 500)),
        (18, ("hopper-hop", 15, 4, 500)),
        (24, ("cheetah-jump", 17, 6, 500)),
        (29, ("pendulum-spin", 3, 1, 500)),
        (30, ("mw-assembly", 39, 4, 100)),
        (54, ("mw-peg-unplug-side", 39, 4, 100)),
        (79, ("mw-hand-insert", 39, 4, 100)),
    ],
)
def test_a_task_stands_where_the_checkpoints_expect_it(index, task):
    assert MT80[index] == task


def test_sizes_are_those_of_dm_control():
    suite = pytest.importorskip("dm_control.suite")
    checked = 0
    for task in MT30:
        domain, _, name = task.name.replace("cup-", "ball_in_cup-").partition("-")
        if (domain, name.replace("-", "_")) not in suite.ALL_TASKS:  # the authors' own variants
            continue
        env = suite.load(domain, name.replace("-", "_"))
        size = sum(int(spec.shape[0]) if spec.shape else 1 for spec in env.observation_spec().values())
        assert (size, env.action_spec().shape[0]) == (task.obs, task.action), task.name
        checked += 1
    assert checked == 19


def test_a_list_of_ones_own_is_taken_in_its_order():
    own = [dict(zip(Task._fields, row, strict=True)) for row in (("b", 3, 2, 100), ("a", 4, 1, 50))]
    assert task_list(own) == (("b", 3, 2, 100), ("a", 4, 1, 50))
    assert task_list(task_list(own)) == task_list(own)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("mt31", "unknown task set 'mt31'; did you mean 'mt30'"),
        ([], "expected one name or more"),
        ([{"name": "a", "obs": 3, "action": 2}], r"tasks\[0\] is .* expected the fields name, obs"),
        ([Task("a", 3, 2, 9), Task("a", 3, 2, 9)], "each once"),
        ([Task("a", 3, 0, 9)], r"tasks\[0\] \(a\): sizes and length must be 1 or more"),
        (["walker-walk"], r"tasks\[0\] is 'walker-walk'"),
    ],
)
def test_impossible_tasks_are_refused(tasks, message):
    with pytest.raises(ConfigError, match=message):
        task_list(tasks)
