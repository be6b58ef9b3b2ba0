"""Normalised scores: against figures worked out by hand, and of no environment that nobody has scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest

from datamodules import ReplayDataModule
from lit_wm.callbacks.evaluate import EpisodeResults, Evaluate
from lit_wm.cli import main
from lit_wm.errors import DataError
from lit_wm.scores import Reference, d4rl_table, normalized_score, reference_of
from lit_wm.tdmpc2 import TDMPC2Module

MINARI = Path(__file__).parent / "datamodules" / "data" / "minari" / "pendulum" / "parquet-v0"


@pytest.mark.parametrize(
    ("name", "value", "score"),
    [
        ("halfcheetah-medium-v2", 6000.0, 50.584683),  # (6000 + 280.178953) / (12135 + 280.178953)
        ("d4rl:hopper-medium-replay-v2", 1634.0, 50.829177),  # (1634 + 20.272305) / (3234.3 + 20.272305)
        ("kitchen-mixed-v0", 2.0, 50.0),
        ("antmaze-umaze-v2", 0.35, 35.0),
        ("walker2d-expert-v1", 1.629008, 0.0),
        ("pen-human-v1", 3076.8331017826877, 100.0),
    ],
)
def test_a_score_is_what_the_published_returns_make_it(name: str, value: float, score: float) -> None:
    assert normalized_score(name, value) == pytest.approx(score, abs=1e-6)
    np.testing.assert_allclose(normalized_score(name, [value, value]), [score, score], atol=1e-6)


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "halfcheetah", "hopper-medium-v5", "maze2d-umaze-v0"])
def test_names_are_not_guessed(name: str) -> None:
    with pytest.raises(DataError, match=f"'{name}' is no row of D4RL's table that has scores") as error:
        normalized_score(name, 1.0)
    assert len(str(error.value).splitlines()) <= 5
    assert reference_of("", {}, name) is None


def test_the_dataset_comes_before_the_environment() -> None:
    d4rl = {
        "format": "d4rl",
        "dataset_id": "hopper-medium-v2",
        "ref_min_score": -20.272305,
        "ref_max_score": 3234.3,
    }
    found = reference_of("d4rl:hopper-medium-v2", d4rl, "Hopper-v5")
    assert found == Reference(-20.272305, 3234.3, "row hopper-medium-v2 of D4RL's table")
    own = {"format": "minari", "env_id": "Pendulum-v1", "ref_min_score": -1200.0, "ref_max_score": -150.0}
    assert reference_of("minari:a", own, "Pendulum-v1") == Reference(-1200.0, -150.0, "metadata of minari:a")
    assert reference_of("minari:a", own, "some.package:Pendulum-v1") is not None
    assert reference_of("minari:a", own, "Pendulum-v0") is None  # of another environment
    assert reference_of("minari:a", own | {"ref_max_score": None}, "Pendulum-v1") is None
    assert reference_of("minari:a", own | {"ref_max_score": -1200.0}, "Pendulum-v1") is None
    placeholder = own | {"ref_min_score": 0, "ref_max_score": 1}
    with pytest.warns(UserWarning, match="0 and 1 are 0 and 100, its own episodes return -1,600 to -200.\n"):
        assert reference_of("minari:a", placeholder, "Pendulum-v1", np.array([-1600.0, -200])) is None
    near = reference_of("minari:a", placeholder, "Pendulum-v1", np.array([-9.0, 1]))
    assert near is not None
    assert near.high == 1
    game = {"env_id": "ALE/Breakout-v5", "ref_min_score": 1.7, "ref_max_score": 30.5}  # of random and a human
    assert reference_of("minari:b", game, "ALE/Breakout-v5", np.array([350.0, 420])) == Reference(
        1.7, 30.5, "metadata of minari:b"
    )
    for returns in ([-1600.0, -200], [np.nan], []):  # one is near, or nobody knows
        assert reference_of("minari:a", own, "Pendulum-v1", np.array(returns)) is not None
    assert reference_of("minari:a", own | {"ref_max_score": -1300.0}, "Pendulum-v1") is None
    row = reference_of("", {}, "hopper-medium-v2")  # D4RL registers environments under these names
    assert row is not None
    assert row.high == 3234.3


def test_the_table_says_where_it_is_from() -> None:
    first = (Path(__file__).parent.parent / "lit_wm" / "d4rl.csv").read_text().splitlines()[0]
    assert first.startswith("# From D4RL, https://github.com/Farama-Foundation/D4RL")
    assert sum(bool(row["ref_min"]) for row in d4rl_table().values()) == 147


def test_a_summary_has_a_score_with_a_reference_alone() -> None:
    results = EpisodeResults([1.0, 2.0], [5, 5], [True, True], reference=Reference(1.0, 5.0, "somebody"))
    assert results.summary()["eval/normalized"] == 12.5
    results.cut = [False, True]  # its return is not what those of the reference are
    assert "eval/normalized" not in results.summary()
    results.cut, results.reference = [False, False], None
    assert "eval/normalized" not in results.summary()


def test_a_run_and_its_checkpoint_know_their_score(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "set" / "data"
    shutil.copytree(MINARI / "data", folder)
    meta = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(
        json.dumps(meta | {"ref_min_score": -1200.0, "ref_max_score": -150.0})
    )
    data = ReplayDataModule(
        sources=[f"minari:{folder.parent}"], cache_dir=str(tmp_path / "cache"), eval_env="Pendulum-v1",
        windows="episode", batch_size=4, batch_length=4, replay_dir=str(tmp_path / "replay"), prefetch=0,
    )  # fmt: skip
    module, evaluate = TDMPC2Module(data.spaces, "debug", planner="policy"), Evaluate(1, test_episodes=2)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, val_check_interval=1, logger=False, callbacks=[evaluate],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    assert (
        capsys.readouterr().err.count("eval/normalized: 0 is a return of -1,200.00, 100 one of -150.00: meta")
        == 1
    )
    trainer.test(module, data, verbose=False)
    report = json.loads((tmp_path / "test.json").read_text())
    want = (report["metrics"]["test/return"] + 1200) / 1050 * 100
    assert report["metrics"]["test/normalized"] == pytest.approx(want)
    assert report["reference"] == {
        "low": -1200.0,
        "high": -150.0,
        "source": f"metadata of minari:{folder.parent}",
    }
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    data.close()
    argv = [
        "evaluate",
        "--ckpt",
        str(tmp_path / "a.ckpt"),
        "--episodes",
        "1",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert main(argv) == 0
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["reference"] == report["reference"]
    assert told["metrics"]["normalized"] == pytest.approx((told["metrics"]["return"] + 1200) / 1050 * 100)
    assert "played in Pendulum-v1" in capsys.readouterr().out
    assert main([*argv, "--max-episode-steps", "20"]) == 0
    printed = capsys.readouterr().out
    assert "(1 cut at --max-episode-steps)" in printed
    assert "normalized: none: some episodes were cut" in printed
    assert "normalized" not in json.loads((tmp_path / "a.json").read_text())["metrics"]
    assert main([*argv, "--env-options", "{time_limit: 20}"]) == 0  # another task: no score
    assert json.loads((tmp_path / "a.json").read_text())["reference"] is None
