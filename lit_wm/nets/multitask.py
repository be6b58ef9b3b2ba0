"""How one model knows several tasks: an embedding of each, and where its observations and actions lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_wm.errors import ConfigError
from lit_wm.tasks import Task, action_masks
from lit_wm.types import Spaces, Spec, Tensors


class TaskSpaces(nn.Module):
    """What differs between tasks whose entries are filled up with zeros to those of the largest.

    Tasks that observe the same number of entries share an observation space. Each space has a place of its
    own in one long vector, which the encoder reads and the decoder predicts: so it has its own first and last
    layer, and its padding has none. Images and classes are shared. Rows of the embedding start with norm 1,
    so that the first update can tell tasks apart, and are never used with a larger one, as in TD-MPC2.

    Args:
        tasks: two or more.
        spaces: of the data.
        dim: size E of a task's embedding.

    Attributes:
        specs: observations as encoder and decoder have them.

    Raises:
        ConfigError: if the spaces are not those of the largest task, or have several vectors or actions.
    """

    def __init__(self, tasks: Sequence[Task], spaces: Spaces, dim: int):
        super().__init__()
        vectors = [k for k, s in spaces.obs.items() if s.dtype == "float32" and not s.is_discrete]
        (action,) = spaces.action.values() if len(spaces.action) == 1 else (None,)
        if len(vectors) > 1 or action is None or len(action.shape) != int(not action.is_discrete):
            raise ConfigError(
                "several tasks (model.tasks) have one vector to observe and one action, vector or choice; "
                f"got {', '.join(vectors) or 'no vector'} and {', '.join(spaces.action)}\n"
                "data.pad: true puts the vectors of datasets side by side"
            )
        widest = max(t.obs for t in tasks)
        own = sum(spaces.obs[k].size for k in vectors), action.size
        if own != (widest, max(t.action for t in tasks)):
            raise ConfigError(
                f"the data has {own[0]} observed numbers and {own[1]} action numbers; expected {widest} and "
                f"{max(t.action for t in tasks)}, as the largest of model.tasks\nFill up with data.pad: true"
            )
        self.key = vectors[0] if widest else ""
        starts, total = dict[int, int](), 0
        for size in sorted({t.obs for t in tasks}):
            starts[size], total = total, total + size
        place = torch.full((len(tasks), widest), total)  # padding goes to an entry that is cut off
        for row, task in zip(place, tasks, strict=True):
            row[: task.obs] = starts[task.obs] + torch.arange(task.obs)
        self.specs = spaces.obs | ({self.key: Spec("float32", (total,))} if widest else {})
        self.embedding = nn.Parameter(F.normalize(torch.randn(len(tasks), dim), dim=-1))
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("action_mask", action_masks(tasks), persistent=False)

    place: Tensor
    action_mask: Tensor

    def known(self, task: Tensor | None) -> Tensor:
        """The task, if there is one. Raises ConfigError."""
        if task is None:
            raise ConfigError(f"this model has {len(self.place)} tasks: say which by the argument `task`")
        return task

    def spread(self, obs: Tensors, task: Tensor | None) -> tuple[Tensors, Tensors]:
        """Observations (..., O) of tasks (...) at the places of their spaces, and 1 where one has entries.
        (..., total) both
        """
        if not self.key:
            return obs, {}
        place, size = self.place[self.known(task)], self.specs[self.key].size
        empty = torch.zeros(*place.shape[:-1], size + 1, device=place.device)
        keep = empty.scatter(-1, place, 1.0)[..., :-1]
        return obs | {self.key: empty.scatter(-1, place, obs[self.key].float())[..., :-1]}, {self.key: keep}

    def gather(self, obs: Tensors, task: Tensor | None) -> Tensors:
        """Inverse of :meth:`spread`: (..., total) -> (..., O), filled up with zeros."""
        if not self.key:
            return obs
        return obs | {self.key: F.pad(obs[self.key], (0, 1)).gather(-1, self.place[self.known(task)])}

    def beside(self, flat: Tensor, task: Tensor | None) -> Tensor:
        """Flat actions (..., A) without their padding, beside the embedding. (..., A + E)"""
        row = self.embedding / self.embedding.norm(dim=-1, keepdim=True).clamp(min=1)
        task = self.known(task)
        emb = row[task].to(flat.dtype).expand(*flat.shape[:-1], -1)
        return torch.cat([flat * self.action_mask[task].to(flat.dtype), emb], -1)
