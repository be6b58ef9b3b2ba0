"""Dream video and demo report, after a real fit with evaluation."""

import re
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from PIL import Image

from lit_wm.callbacks import DemoReport, DreamVideo, Evaluate, ResumableCheckpoint
from lit_wm.callbacks.report import DemoError
from lit_wm.envs import read_spaces

ENV = "lit_wm/Dummy-v0"


class ImageData(tiny.TinyData):
    """Trains on CartPole as ever; evaluates in the dummy environment, which has an image."""

    mean = 127.0

    def __init__(self):
        super().__init__(ENV)

    def mean_frames(self):
        image = read_spaces(ENV).obs["image"]
        return {"image": torch.full(image.shape, self.mean, dtype=torch.float64)}


class DummyModule(tiny.TinyModule):
    """Acts at random in the dummy environment."""

    uses_global_random_numbers = (
        False  # as in the real modules: every new iterator of a loader draws from them
    )

    def __init__(self):
        super().__init__(read_spaces(ENV))

    def policy(self, obs, state=None, is_first=None, mode="train", noise=None):
        if mode == "train":
            return super().policy(obs, state, is_first, mode, noise)
        action = {}
        for k, s in self.model.spaces.action.items():
            race = noise.exponential(k, (len(is_first), *s.shape))
            action[k] = (race * 10).long() % s.classes if s.is_discrete else race.clamp(-1, 1)
        return action, self.model.encode(obs)


class Artifacts(tiny.pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.paths, self.metrics = [], []

    def log_artifact(self, path, folder=None):
        self.paths.append((path, folder))

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))


def fit(make_trainer, *more, max_steps=4, val_check_interval=2, data=None, **options):
    callbacks = [
        ResumableCheckpoint(every_n_minutes=0),
        Evaluate(episodes=3, windows=8, window_length=8),
        *more,
    ]
    trainer = make_trainer(*callbacks, max_steps=max_steps, val_check_interval=val_check_interval, **options)
    module = DummyModule()
    trainer.fit(module, data or ImageData())
    return trainer, module


def test_evaluation_logs_at_env_steps_and_best_is_saved(make_trainer, tmp_path):
    logger = Artifacts()
    trainer, _ = fit(make_trainer, logger=logger)
    steps = [step for step, metrics in logger.metrics if "eval/return" in metrics]
    assert steps == [2, 4]
    metrics = logger.metrics[-1][1]
    assert {"eval/length", "eval/return_std", "dream/reconstruction/image", "dream/mean_frame/image"} <= set(
        metrics
    )
    assert trainer.callback_metrics["eval/return"] == pytest.approx(metrics["eval/return"])
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_evaluation_leaves_training_as_it_was(make_trainer):
    def train(interval):
        tiny.pl.seed_everything(0)
        _, module = fit(make_trainer, max_steps=6, val_check_interval=interval)
        return module.state_dict()

    with_it, without = train(2), train(1000)
    assert all(torch.equal(with_it[k], without[k]) for k in with_it)


@pytest.mark.parametrize("place", ["an episode", "held-out batches", "the update before"])
def test_an_evaluation_that_a_signal_prevents_comes_when_training_goes_on(make_trainer, tmp_path, place):
    class Module(DummyModule):
        def policy(self, obs, state=None, is_first=None, mode="train", noise=None):
            told("an episode" if mode == "eval" else "training")
            return super().policy(obs, state, is_first, mode, noise)

        def validation_step(self, batch, batch_idx):
            told("held-out batches")

    class Update(tiny.pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            told("the update before" if pl_module.updates == 2 else "another")

    def told(where):
        if where == place and signals:
            signal.raise_signal(signals.pop())

    def train(name, ckpt=None):
        logger, data = Artifacts(), ImageData()
        evaluate = Evaluate(episodes=3, windows=8, window_length=8)
        trainer = make_trainer(
            Update(), evaluate, ResumableCheckpoint(every_n_minutes=0), logger=logger,
            max_steps=6, val_check_interval=2, default_root_dir=tmp_path / name,
        )  # fmt: skip
        tiny.pl.seed_everything(0)
        module = Module()
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
        seen = [(step, m["eval/return"]) for step, m in logger.metrics if "eval/return" in m]
        return trainer, seen, module.state_dict()

    signals = []
    trainer, whole, expected = train("whole")
    assert [step for step, _ in whole] == [2, 4, 6]
    counted = trainer.fit_loop.epoch_loop._batches_that_stepped
    signals = [signal.SIGTERM]
    trainer, seen, _ = train("stopped")
    assert trainer.global_step == 2  # before another update
    assert not signals
    assert not seen
    trainer, seen, weights = train("stopped", tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert seen == whole
    assert all(torch.equal(weights[k], expected[k]) for k in expected)
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == counted


def test_dream_videos_are_written_at_evaluation_and_for_the_report(make_trainer, tmp_path):
    logger = Artifacts()
    video = DreamVideo(rows=3)
    fit(make_trainer, video, max_steps=5, logger=logger)
    names = sorted(p.name for p in (tmp_path / "videos").iterdir())
    assert names == ["dream-000000002.gif", "dream-000000004.gif"]  # no evaluation of its own at the end
    fit(make_trainer, video := DreamVideo(rows=3), DemoReport(), max_steps=5, logger=logger)
    names = sorted(p.name for p in (tmp_path / "videos").iterdir())
    assert names == ["dream-000000002.gif", "dream-000000004.gif", "dream-000000005.gif"]
    assert [folder for _, folder in logger.paths] == ["videos"] * 5
    assert video.paths == [tmp_path / "videos" / names[-1]]
    height, width, _ = read_spaces(ENV).obs["image"].hwc
    with Image.open(video.paths[0]) as gif:
        assert gif.size == (3 * (width + 4), 3 * height + 4)


def test_a_video_that_fails_is_a_warning(make_trainer, monkeypatch):
    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr("lit_wm.callbacks.video.write_gif", broken)
    with pytest.warns(UserWarning, match="no dream video: OSError: disk full"):
        _, module = fit(make_trainer, DreamVideo())
    assert module.updates == 4


def test_the_report_prints_the_errors_and_five_true_lines(make_trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit(make_trainer, DreamVideo(), DemoReport(max_ratio=1e9))
    text = capsys.readouterr().out
    assert re.search(r"reconstruction +\d\.\d{6} +[\d.]+ x mean frame \d\.\d{6}", text)
    lines = text.strip().splitlines()[-5:]
    assert [line.split(":")[0] for line in lines] == ["results", "MLflow", "resume", "evaluate", "full size"]
    checkpoint, video = re.search(r"checkpoint (\S+), dream video (\S+)", lines[0]).groups()
    assert (tmp_path / checkpoint).is_file()
    assert (tmp_path / video).is_file()
    assert lines[2].endswith(f"-m lit_wm fit --ckpt_path {checkpoint} --trainer.max_steps 8")
    python = next(word for word in lines[2].split()[1:] if "=" not in word)
    assert subprocess.run([python, "--version"], check=True, capture_output=True).stdout.startswith(b"Python")
    assert sys.executable.endswith(python.lstrip("./"))


def test_a_broken_promise_is_an_error_after_the_report(make_trainer, capsys):
    with pytest.raises(
        DemoError, match=r"reconstruction error of 'image' is [\d.]+ times .* at most 1e-06 was promised"
    ):
        fit(make_trainer, DemoReport(max_ratio=1e-6))
    assert "full size:" in capsys.readouterr().out


def test_a_promise_that_cannot_be_checked_is_broken(make_trainer):
    data = ImageData()
    data.mean_frames = dict
    with pytest.raises(DemoError, match="could not be measured"):
        fit(make_trainer, DemoReport(max_moving_ratio=0.6), data=data)


def test_without_any_evaluation_the_report_measures_by_itself(make_trainer, capsys):
    fit(make_trainer, DemoReport(), val_check_interval=1000)
    assert "x mean frame" in capsys.readouterr().out


def test_test_and_predict_write_their_files(make_trainer, tmp_path, capsys):
    import json

    import numpy as np

    evaluate = Evaluate(test_episodes=5, predict_episodes=2, windows=4, window_length=8)
    trainer = make_trainer(evaluate)
    module = DummyModule()
    trainer.test(module, ImageData(), verbose=False)
    report = json.loads((tmp_path / "test.json").read_text())
    assert len(report["returns"]) == len(report["lengths"]) == 5
    low, high = report["metrics"]["test/return_low"], report["metrics"]["test/return_high"]
    assert low <= report["metrics"]["test/return"] <= high
    assert "95 % interval" in capsys.readouterr().out
    trainer.predict(module, ImageData())
    with np.load(tmp_path / "episodes.npz", allow_pickle=False) as rows:
        assert set(rows["episode"]) == {0, 1}
        assert rows["obs/image"].dtype == np.uint8
