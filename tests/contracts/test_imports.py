"""What importing costs, and what the package promises to offer."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "lightning", "mlflow", "minari", "gymnasium", "torchrl", "tensordict", "datamodules")


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``code``."""
    script = f"{code}\nimport sys; print(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_after("import lit_wm, lit_wm.cli, lit_wm.presets, lit_wm.errors") & set(HEAVY)


def test_the_mathematics_loads_no_lightning():
    modules = ["nets.rssm", "optim", "returns", "distributions", "world_model", "noise", "types", "planners"]
    loaded = loaded_after("import " + ", ".join(f"lit_wm.{name}" for name in modules))
    assert "torch" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "mlflow", "gymnasium", "datamodules"}


def test_the_public_names():
    import lit_wm

    assert lit_wm.__all__ == [
        "Batch",
        "DreamerV3Module",
        "Spaces",
        "Spec",
        "State",
        "TDMPC2Module",
        "Trajectory",
        "__version__",
        "create_world_model",
        "run_imagination",
    ]
    for name in lit_wm.__all__:
        assert getattr(lit_wm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lit_wm.Nothing


@pytest.mark.parametrize("verb", ["encode", "imagine", "decode", "q", "act"])
def test_the_module_and_its_model_share_the_verbs(verb):
    import lit_wm
    from lit_wm.world_model import WorldModel

    assert callable(getattr(WorldModel, verb))
    assert callable(getattr(lit_wm.DreamerV3Module, verb))
