import os
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.episodes import Schema, Source, listed
from datamodules.sources import open_source, parse_uri, register
from lit_wm.errors import ConfigError
from lit_wm.types import Spaces, Spec

MODULE = """
import numpy as np
from datamodules import Episode, Schema, Source, register
from lit_wm.types import Spaces, Spec

@register("mine")
class Mine(Source):
    def __init__(self, rest):
        self.files, self.meta, self.steps = [], {}, int(rest)
        self.schema = Schema(Spaces({"obs": Spec("float32", (3,))}, {"action": Spec("float32", (1,))}))

    def episodes(self):
        end, no = np.zeros((2, self.steps), bool)
        end[-1] = True
        obs = np.zeros((self.steps + 1, 3), np.float32)
        yield Episode({"obs": obs}, {"action": obs[:-1, :1]}, obs[:-1, 0], end, no, "mine")
"""


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("npz:a b/ä.npz", ("npz", "a b/ä.npz", {})),
        ("npz:a.npz?classes=3&form=demo", ("npz", "a.npz", {"classes": 3, "form": "demo"})),
        ("npz:a?discrete=false&drop=[x,y]", ("npz", "a", {"discrete": False, "drop": ["x", "y"]})),
        ("npz:what?.npz", ("npz", "what?.npz", {})),
        ("npz:demo?.npz?dones_are=terminals", ("npz", "demo?.npz", {"dones_are": "terminals"})),
        ("npz:a?drop=1&split=jump>1e+5|timeouts", ("npz", "a", {"drop": 1, "split": "jump>1e+5|timeouts"})),
        ("npz:a?drop=on&x=2024-01-01&y=a%20b", ("npz", "a", {"drop": "on", "x": "2024-01-01", "y": "a b"})),
        ("hdf5:C:/a.hdf5", ("hdf5", "C:/a.hdf5", {})),
        ("env:dmc:cartpole_swingup?num_envs=4", ("env", "dmc:cartpole_swingup", {"num_envs": 4})),
    ],
)  # fmt: skip
def test_a_uri_has_a_scheme_a_place_and_options(uri, parts):
    assert parse_uri(uri) == parts


def test_a_question_mark_in_the_name_of_a_folder(tmp_path):
    folder = tmp_path / "we?rd=1"
    folder.mkdir()
    assert parse_uri(f"npz:{folder}") == ("npz", str(folder), {})
    assert parse_uri(f"npz:{folder}?classes=3") == ("npz", str(folder), {"classes": 3})


def test_an_option_that_is_no_yaml_is_refused():
    with pytest.raises(ConfigError, match=r"option classes=\[1: .*\n  Expected a number"):
        parse_uri("npz:a?classes=[1")


def test_names_in_an_option():
    assert listed("a, b,") == listed(["a", " b"]) == ["a", "b"]
    assert (listed(1), listed((0, "x")), listed(None), listed(())) == (["1"], ["0", "x"], [], [])


@pytest.mark.parametrize("uri", ["", "npz", "nzp:", "nzp:a", "a/b.npz", "no_such_module:mine:3"])
def test_what_is_no_uri_is_refused_with_those_that_are(uri):
    with pytest.raises(ConfigError, match="is no source.*\n  Expected one of d4rl:..., hdf5:..."):
        open_source(uri)


@pytest.mark.parametrize("scheme", ["hdf5", "npz", "tdmpc2", "torchrl", "rows"])
def test_a_missing_path_is_said(scheme):
    with pytest.raises(ConfigError, match=f"^{scheme}: needs a path, e.g. {scheme}:[a-zF]"):
        open_source(f"{scheme}:")
    with pytest.raises(ConfigError, match="needs a path"):
        open_source(f"{scheme}:?drop=x")


def test_a_scheme_belongs_to_one_class():
    class Other(Source):
        def __init__(self, rest: str):
            self.schema = Schema(Spaces({"obs": Spec("float32", (1,))}, {}))

        def episodes(self):
            return iter(())

    open_source("npz:" + __file__.rsplit("/", 2)[0] + "/data/npz/recording.npz")  # is registered now
    with pytest.raises(ConfigError, match="'npz' is taken by datamodules.sources.npz"):
        register("npz")(Other)


def test_the_command_line_imports_the_module_that_registers_a_source(tmp_path):
    (tmp_path / "my_formats.py").write_text(MODULE)
    command = [sys.executable, "-m", "lit_wm", "data", "inspect", "my_formats:mine:7"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7: 7 to 7 an episode" in done.stdout
