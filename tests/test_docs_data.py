"""What docs/data.md, offline.md and scripts.md show works: commands run, configurations train, scripts print
what they say; the recipe too.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensordict import TensorDict

from datamodules import ReplayBuffer, ReplayDataModule
from datamodules.sources import checked, open_source
from datamodules.sources.flat import NAMES
from lit_wm.cli import main

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "data.md").read_text()
OFFLINE = (ROOT / "docs" / "offline.md").read_text()
SCRIPTS = (ROOT / "docs" / "scripts.md").read_text()


def blocks(language, text=TEXT + OFFLINE + SCRIPTS):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]
COLLECT = [line for line in COMMANDS if line.startswith("lit-wm collect")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder where the data that the text speaks of lie."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        patch.setenv("LITWM_CACHE", str(folder / "cache"))
        for name in ("tests", "configs", "benchmarks"):
            (folder / name).symlink_to(ROOT / name)
        for command in COLLECT:
            assert main(shlex.split(command)[1:]) == 0
        (folder / "data" / "d4rl").mkdir()
        flat = "tests/datamodules/data/d4rl/pendulum_scripted-v2-nonext.hdf5"  # in the place of a large file
        shutil.copy(flat, folder / "data" / "d4rl" / "hopper_medium-v2.hdf5")
        rows = TensorDict.load_memmap(folder / "data" / "pendulum")
        here, after = rows[rows["valid"].squeeze(-1)], rows[~rows["is_init"].squeeze(-1)]
        ted = TensorDict({"observation": here["observation"], "action": here["action"], "next": here["next"]})
        ted = ted.auto_batch_size_(1).contiguous()
        ted["next", "observation"] = after["observation"].contiguous()
        ted.memmap(folder / "data" / "torchrl")
        yield folder


def small(tdmpc2):
    """Flags that leave three updates of a tiny model."""
    overlay = f"configs/overlay/debug{'_tdmpc2' * tdmpc2}.yaml"
    flags = f"--config {overlay} --model.preset debug --trainer.devices 1 --trainer.logger false"
    return flags.split()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in COLLECT])
def test_a_command_runs(command, place, capsys):
    argv = shlex.split(command)[1:]
    if argv[0] == "fit":
        argv += small("tdmpc2" in command)
        argv += [] if "--name" in argv else ["--name", f"run{COMMANDS.index(command)}"]
        argv += ["--model.pretrain", "{world_model: 2, actor: 1}"] if "demos" in command else []
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert json.loads(out) if "--json" in command else out


def test_every_verb_and_option_named_exists(capsys):
    assert main(["data", "--help"]) == 0
    verbs = set(re.findall(r"^  (\w+) ", capsys.readouterr().out, flags=re.MULTILINE))
    table = TEXT.split("## The commands")[1].split("## The cache")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == verbs
    assert {c.split()[2] for c in COMMANDS if c.startswith("lit-wm data")} == verbs


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_a_python_block_prints_what_it_says(code, place, capsys):
    exec(compile(code, "data.md", "exec"), {"__name__": "docs"})
    printed = capsys.readouterr().out
    for line in re.findall(r"print\(.*\)  # (.+)$", code, flags=re.MULTILINE):
        wanted = re.findall(r"\d+", line)
        assert wanted in [re.findall(r"\d+", text) for text in printed.splitlines()]


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda text: text.split("\n")[0][:30])
def test_a_configuration_trains_or_opens(text, place, capsys):
    given = yaml.safe_load(text)
    if "model" not in given:
        data = ReplayDataModule(**given)
        assert data.spaces["obs"]
        assert len(data.sources) == len(given["sources"])
        return
    path = place / "config.yaml"
    path.write_text(text)
    name = text.split("\n")[0].strip("# ").removesuffix(".yaml")  # two of one second would have the same
    flags = ["--name", name + "-offline" * (text in OFFLINE), *small("TDMPC2" in text)]
    assert main(["fit", "--config", str(path), *flags, "--data.prefill", "40"]) == 0
    assert ("fit: held-out episodes at update" in capsys.readouterr().out) == ("val_fraction" in text)


def test_the_table_of_arrays_is_what_the_readers_take(tmp_path):
    table = re.findall(r"^\| `(\w+)` \| \(N.*\| (`.*`) \|$", TEXT, flags=re.MULTILINE)
    names = {name: tuple(re.findall(r"`(\w+)`", others)) for name, others in table}
    assert [(name, *others) for name, others in names.items()] == list(NAMES.values())
    end = np.arange(40) % 10 == 9
    arrays = {"observations": np.zeros((40, 3)), "actions": np.zeros((40, 2)), "rewards": end * 1.0,
              "terminals": end & (np.arange(40) < 20), "timeouts": end & (np.arange(40) >= 20),
              "next_observations": np.ones((40, 3))}  # fmt: skip
    for which in range(2):  # each under its own name, and under the next one
        spelt = {(name, *names[name])[which]: value for name, value in arrays.items()}
        np.savez(tmp_path / "a.npz", **spelt)
        episodes = list(checked(open_source(f"npz:{tmp_path}/a.npz")))
        assert [(e.steps, bool(e.terminated[-1])) for e in episodes] == [(10, True)] * 2 + [(10, False)] * 2
        assert all(e.observation["obs"][-1].all() and e.reward.sum() == 1 for e in episodes)


def test_the_recipe_for_a_source_is_ten_lines_and_reads(tmp_path):
    (code,) = blocks("python", (ROOT / "CONTRIBUTING.md").read_text())
    assert len([line for line in code.split("@register")[1].splitlines() if line]) <= 10
    exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": "recipe"})
    rng = np.random.default_rng(0)
    lines = [
        (
            rng.normal(size=(n + 1, 4)).tolist(),
            rng.normal(size=(n, 1)).tolist(),
            rng.normal(size=n).tolist(),
            n > 3,
        )
        for n in (3, 5)
    ]
    (tmp_path / "demos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    buffer = ReplayBuffer.load(f"jsonl:{tmp_path}/demos.jsonl?width=4", cache_dir=tmp_path)
    for (obs, action, reward, died), e in zip(lines, buffer.episodes(), strict=True):
        np.testing.assert_array_equal(e.observation["obs"], np.float32(obs))
        np.testing.assert_array_equal(e.action["action"], np.float32(action))
        np.testing.assert_array_equal(e.reward, np.float32(reward))
        assert (e.terminated[-1], e.truncated[-1]) == (died, not died)
    assert torch.isfinite(buffer.sample_sequences(4, 2)["observation"]).all()
