"""Models of several tasks, and the official sets of TD-MPC2 as data; imports neither torch nor Lightning.

The order is that of the checkpoints: row i of a task embedding belongs to task i of its set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_wm.errors import ConfigError, nearest

if TYPE_CHECKING:  # types need torch
    from torch import Tensor

    from lit_wm.types import Spaces, Spec, Tensors


class Task(NamedTuple):
    """One task: its name, sizes of its observation (of its vectors; 0 if it has images alone) and action (the
    classes, if it is discrete), and decisions until its time limit.
    """

    name: str
    obs: int
    action: int
    episode_length: int

    def spaces(self) -> Spaces:
        """One vector in, one out, as the official programs show the task."""
        from lit_wm.types import Spaces, Spec

        obs, action = Spec("float32", (self.obs,)), Spec("float32", (self.action,))
        return Spaces({"obs": obs}, {"action": action}, self.episode_length)


def _dmc(names: str, obs: int, action: int) -> list[Task]:
    return [Task(name, obs, action, 500) for name in names.split()]


_MT30 = (
    *_dmc("walker-stand walker-walk walker-run", 24, 6),
    *_dmc("cheetah-run", 17, 6),
    *_dmc("reacher-easy reacher-hard", 6, 2),
    *_dmc("acrobot-swingup", 6, 1),
    *_dmc("pendulum-swingup", 3, 1),
    *_dmc("cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse", 5, 1),
    *_dmc("cup-catch", 8, 2),
    *_dmc("finger-spin", 9, 2),
    *_dmc("finger-turn-easy finger-turn-hard", 12, 2),
    *_dmc("fish-swim", 24, 5),
    *_dmc("hopper-stand hopper-hop", 15, 4),
    *_dmc("walker-walk-backwards walker-run-backwards", 24, 6),
    *_dmc("cheetah-run-backwards cheetah-run-front cheetah-run-back cheetah-jump", 17, 6),
    *_dmc("hopper-hop-backwards", 15, 4),
    *_dmc("reacher-three-easy reacher-three-hard", 8, 3),
    *_dmc("cup-spin", 8, 2),
    *_dmc("pendulum-spin", 3, 1),
)
_METAWORLD = """
    assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall
    coffee-button coffee-pull coffee-push dial-turn disassemble door-open door-close drawer-close drawer-open
    faucet-open faucet-close hammer handle-press-side handle-press handle-pull-side handle-pull lever-pull
    peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side
    plate-slide-back plate-slide-back-side push-back push push-wall reach reach-wall shelf-place soccer
    stick-push stick-pull sweep-into sweep window-open window-close bin-picking box-close door-lock
    door-unlock hand-insert
"""

TASK_SETS: Mapping[str, tuple[Task, ...]] = MappingProxyType(
    {"mt30": _MT30, "mt80": _MT30 + tuple(Task(f"mw-{name}", 39, 4, 100) for name in _METAWORLD.split())}
)


def action_masks(tasks: Sequence[Task]) -> Tensor:
    """1 where an action entry belongs to the task, else 0. (tasks, A) float32"""
    import torch

    sizes = torch.tensor([t.action for t in tasks])
    return (torch.arange(max(t.action for t in tasks)) < sizes[:, None]).float()


def task_list(tasks: str | Sequence[Task | Mapping[str, Any]]) -> tuple[Task, ...]:
    """The tasks of a set's name, or of a list of ``{name, obs, action, episode_length}``.

    Raises:
        ConfigError: for an unknown set, an entry with other fields or sizes below 1, or a name given twice.
    """
    if isinstance(tasks, str):
        if tasks not in TASK_SETS:
            raise ConfigError(
                f"unknown task set {tasks!r}{nearest(tasks, [*TASK_SETS, 'data'])}; known: mt30, mt80, data "
                "(those of data.sources), or a list of {name, obs, action, episode_length}"
            )
        return TASK_SETS[tasks]
    out: list[Task] = []
    for i, given in enumerate(tasks):
        fields = given._asdict() if isinstance(given, Task) else given
        sizes = [fields.get(k) for k in Task._fields[1:]] if isinstance(fields, Mapping) else []
        if not sizes or set(fields) != set(Task._fields) or not isinstance(fields["name"], str):
            raise ConfigError(f"tasks[{i}] is {given!r}; expected the fields {', '.join(Task._fields)}")
        if not all(type(n) is int and n >= low for n, low in zip(sizes, (0, 1, 1), strict=True)):
            raise ConfigError(
                f"tasks[{i}] ({fields['name']}): sizes and length must be 1 or more, got {sizes}"
            )
        out.append(Task(**fields))
    if not out or len({t.name for t in out}) < len(out):
        raise ConfigError(f"tasks: expected one name or more, each once, got {[t.name for t in out]}")
    return tuple(out)


def list_tasks(
    tasks: str | list[dict[str, Any]] | None, task: str | None, spaces: Spaces
) -> tuple[list[Task], int | None]:
    """The tasks of a model, ``data`` for those that its sources name, and the number of the environment's."""
    if tasks == "data":
        if not spaces.tasks:
            raise ConfigError(
                "model.tasks: data, but no source names its task: write task: NAME in the entries of "
                "data.sources, and pad: true\nWithout data, list them: {name, obs, action, episode_length}"
            )
        tasks = list(spaces.tasks)
    if tasks is None:
        if task is not None:
            raise ConfigError(f"model.task is {task!r}, but model.tasks names no tasks")
        return [], None
    known = list(task_list(tasks))
    names = [t.name for t in known]
    if task is None:
        return known, None
    if task not in names:
        obs, action = (sum(s.size for s in part.values()) for part in (spaces.obs, spaces.action))
        known.append(Task(task, obs, action, spaces.episode_length or 1000))
        names.append(task)
    return known, names.index(task)


# --- A task in its own environment --------------------------------------------------------------------------


def open_tasks(model: Any) -> list[str]:
    """Names of a model's tasks, in their order, unless its environment is one of them."""
    tasks = getattr(model, "tasks", [])
    return [t.name for t in tasks] if getattr(model, "task_index", None) is None else []


def misfit(task: Task, model: Spaces, env: Spaces) -> str | None:
    """What keeps a model of several tasks from playing one in an environment; None if nothing does."""
    vectors, others = _split(env.obs)
    seen, acts = sum(s.size for s in vectors.values()), sum(s.size for s in env.action.values())
    if (seen, acts) != (task.obs, task.action):
        return f"observes {seen} numbers and acts by {acts}; {task.name} has {task.obs} and {task.action}"
    if others != _split(model.obs)[1] or env.action.keys() != model.action.keys():
        keys = ", ".join([*model.obs, *model.action])
        return f"has {', '.join([*env.obs, *env.action])}; the model knows {keys}"
    return None


def ordered(env: Spaces, order: Sequence[str] | None) -> Spaces:
    """An environment's spaces, its vectors in the order of a dataset if that has them: Minari sorts."""
    vectors, others = _split(env.obs)
    if order is None or sorted(order) != sorted(vectors):
        return env
    return replace(env, obs=others | {k: vectors[k] for k in order})


def as_seen(obs: Tensors, env: Mapping[str, Spec], model: Mapping[str, Spec]) -> Tensors:
    """An environment's observation as a model of several tasks sees it: its vectors side by side in one,
    which is filled up with zeros. (N, *shape) each
    """
    import torch
    from torch.nn.functional import pad

    (vectors, others), wide = _split(env), _split(model)[0]
    out = {k: obs[k] for k in others}
    for name, spec in wide.items():
        flat = torch.cat([obs[k].float().flatten(1) if env[k].shape else obs[k][:, None] for k in vectors], 1)
        out[name] = pad(flat, (0, spec.size - flat.shape[1]))
    return out


def as_taken(action: Tensors, env: Mapping[str, Spec]) -> Tensors:
    """The entries of a model's action that an environment has. (N, *shape) each"""
    return {k: v if env[k].is_discrete else v[:, : env[k].size].reshape(-1, *env[k].shape)
            for k, v in action.items()}  # fmt: skip


def _split(obs: Mapping[str, Spec]) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """Vectors, and all else."""
    vectors = {k: s for k, s in obs.items() if s.dtype == "float32" and not s.is_discrete}
    return vectors, {k: s for k, s in obs.items() if k not in vectors}
