"""Every configuration file trains: three updates with the debug overlay on a CPU."""

import os
import shutil
from pathlib import Path

import pytest

from lit_wm.cli import main
from lit_wm.envs import physics
from lit_wm.training_cli import config_folders, load_yaml

FOLDER = config_folders()[0]
BASE = {
    "debug_tdmpc2": "tdmpc2_cartpole",
    "demo": "dreamer_atari",
    "demo_hour": "dreamer_atari",
    "official_atari": "dreamer_atari",
}
FILES = sorted(str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*.yaml"))


DATA = Path(__file__).parent / "datamodules" / "data"


def local_source(name, folder):
    """A small set in the place of the configuration's own, of the same format."""
    if "minari" in name:
        return f"minari:{DATA}/minari/pendulum/scripted-v0"
    if "d4rl" in name:
        shutil.copy(
            DATA / "d4rl/halfcheetah_scripted-v0-notimeouts.hdf5", folder / "halfcheetah_medium-v2.hdf5"
        )
        return f"d4rl:halfcheetah-medium-v2?cache_dir={folder}"
    assert (
        main(["collect", *["--env", "lit_wm/LidarRobot-v0", "--episodes", "3", "--out", "npz:demos.npz"]])
        == 0
    )
    return "{uri: npz:demos.npz, weight: [[0, 1], [5_000, 0.1]]}"


@pytest.mark.parametrize("name", FILES)
def test_the_configuration_runs(name, tmp_path, monkeypatch):
    if "atari" in name or "atari" in BASE.get(Path(name).stem, ""):
        pytest.importorskip("ale_py", reason="needs the extra 'atari'")
    if "mujoco" in name:
        pytest.importorskip("mujoco")
    if any(word in name for word in ("dmc", "finetune", "mt30", "crafter")):
        if (
            ("vision" in name or "rgb" in name)
            and physics.choose_gl() is None
            and os.environ.get("MUJOCO_GL") == "disable"
        ):
            pytest.skip("neither EGL nor OSMesa works here")
        extra = "crafter" if "crafter" in name else "dmc"
        pytest.importorskip({"dmc": "dm_control"}.get(extra, extra), reason=f"needs the extra {extra!r}")
    monkeypatch.chdir(tmp_path)
    layers = [name, "overlay/debug_tdmpc2.yaml" if "tdmpc2" in name else "overlay/debug.yaml"]
    if name.startswith("overlay/"):
        layers = [BASE.get(Path(name).stem, "dreamer_cartpole") + ".yaml", *layers]
    # Neither the tracking nor the promises of the demo are at stake here.
    flags = ["--trainer.logger", "false", "--trainer.callbacks", "null"]
    if Path(name).stem == "bf16":
        flags += ["--trainer.precision", "bf16-mixed"]
    if any(word in name for word in ("minari", "d4rl", "demos")):
        flags += ["--data.sources", f"[{local_source(name, tmp_path)}]", "--data.cache_dir", "cache"]
    if "mt30" in name:
        flags += [
            "--data.sources",
            f"[tdmpc2:{DATA}/tdmpc2/chunk_*.pt?tasks=mt30]",
            "--data.cache_dir",
            "cache",
        ]
        flags += ["--data.eval_env", "{walker-walk: dmc:walker_walk, cup-catch: dmc:cup_catch}"]
    if "demos" in name:
        flags += ["--model.pretrain", "{world_model: 2, actor: 1}", "--data.prefill", "40"]
    if "finetune" in name:  # tests/test_tdmpc2.py begins with a file
        flags += ["--model.start_from", "null", "--model.task_like", "null"]
    if any(name.startswith(f"dreamer_{new}") for new in ("dmc", "crafter", "robot", "catch")) or (
        name.startswith("tdmpc2")
    ):
        flags += ["--trainer.max_steps", "20"]
    assert main(["fit", *(word for layer in layers for word in ("--config", layer)), *flags]) == 0
    assert list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt"))


@pytest.mark.parametrize("name", FILES)
def test_the_first_comment_is_the_command(name):
    text = (FOLDER / name).read_text()
    assert text.startswith("# lit-wm fit --config configs/")
    assert f"configs/{name}" in text.splitlines()[0]
    assert load_yaml(FOLDER / name)
