"""Several processes with equal weights, where the module synchronises its own gradients."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import Module


class ReplicatedStrategy(DDPStrategy):
    """``DDPStrategy`` without the ``DistributedDataParallel`` wrapper.

    With manual optimisation the wrapper synchronises nothing on a plain ``backward()`` and says nothing about
    it; the modules here average each optimizer's gradients in one flat all-reduce instead. All that is left
    to do is to start from equal weights and buffers. Backend: nccl on GPUs, gloo on CPUs.
    """

    def _setup_model(self, model: Module) -> Any:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, src=0)
        return model

    def _register_ddp_hooks(self) -> None:
        """No wrapper, no hooks."""
