"""Option to run the parity tests on another directory of golden files."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)
