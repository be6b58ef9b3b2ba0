"""Every notebook runs from top to bottom, each in a process of its own, without a Jupyter kernel."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
ALONE = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "MLFLOW_DISABLE_TELEMETRY": "true"}
seconds: dict[str, float] = {}  # of processor time


def children() -> float:
    """Processor time of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs_and_is_stored_without_outputs(path: Path, tmp_path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)
    assert "You will see" in "".join(cells[0]["source"])
    if "dmc:" in path.read_text():
        pytest.importorskip("dm_control", reason="needs the extra 'dmc'")
    script, before = tmp_path / f"{path.stem}.py", children()
    script.write_text("\n\n".join("".join(c["source"]) for c in code))
    result = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | ALONE,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip()
    seconds[path.name] = children() - before


def test_all_notebooks_together_take_three_minutes() -> None:
    if len(seconds) < len(NOTEBOOKS):
        pytest.skip("only a part of the notebooks was selected")
    assert sum(seconds.values()) < 180, seconds
