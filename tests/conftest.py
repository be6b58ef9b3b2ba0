"""Options and fixtures of all tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--golden-dir DIR``: run the parity tests on another directory of golden files."""
    parser.addoption("--golden-dir", default=None, help="directory of golden files for tests/parity")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    import torch

    torch.manual_seed(0)
