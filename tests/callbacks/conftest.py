"""A Trainer for the tiny world of ``tiny.py``, which trains for real in a few milliseconds per update."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, max_steps=10, **options):
        defaults = {
            "default_root_dir": tmp_path,
            "max_epochs": -1,
            "max_steps": max_steps,
            "accelerator": "cpu",
            "logger": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
            "callbacks": list(callbacks),
        }
        return pl.Trainer(**(defaults | options))

    return make
