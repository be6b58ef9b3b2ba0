"""Both models, small and with random weights, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lit_wm.dreamerv3 import DreamerV3Module
from lit_wm.tdmpc2 import TDMPC2Module
from lit_wm.types import Batch, Spaces, Spec

SPACES = Spaces({"obs": Spec("float32", (5,))}, {"action": Spec("float32", (2,))})
BOTH = pytest.mark.parametrize("kind", ["dreamerv3", "tdmpc2"])


def make_module(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    own: dict[str, Any] = {"imag_length": 4, "warmup": 0} if kind == "dreamerv3" else {"lr": 1e-3}
    own |= {"log_every": 1} | options
    module = (DreamerV3Module if kind == "dreamerv3" else TDMPC2Module)(SPACES.to_plain(), "debug", **own)
    with torch.no_grad():
        for p in module.parameters():  # heads that start at zero would hide most mistakes
            p.add_(0.1 * torch.randn_like(p))
    return module


def make_batch(seed: int = 0, B: int = 3, T: int = 4) -> Batch:
    g = torch.Generator().manual_seed(seed)
    off = torch.zeros(B, T, dtype=torch.bool)
    first = off.clone()
    first[0, 2] = True
    obs, action = torch.randn(B, T, 5, generator=g), torch.rand(B, T, 2, generator=g) * 2 - 1
    return Batch({"obs": obs}, {"action": action}, torch.randn(B, T, generator=g), first, off, off)


def fit(module: Any, folder: Path, updates: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=updates, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    batches = [make_batch(seed) for seed in range(updates)]
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda x: x))
    return trainer
