"""The progress line: the units that matter, readable in a terminal and in a log."""

import io
from types import SimpleNamespace

import pytest
import tiny

from lit_wm.callbacks.progress import RLProgressBar


class Screen(io.StringIO):
    def __init__(self, tty):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


@pytest.fixture
def shown(monkeypatch, make_trainer):
    def run(tty, **options):
        screen = Screen(tty)
        monkeypatch.setattr("sys.stderr", screen)
        data = tiny.TinyData()
        data.max_env_steps = 1000
        bar = RLProgressBar(**options)
        trainer = make_trainer(bar, max_steps=8, limit_val_batches=0, enable_progress_bar=True)
        trainer.fit(tiny.TinyModule(), data)
        return screen.getvalue()

    return run


def test_a_log_gets_whole_lines_with_counts_rates_and_time_left(shown):
    lines = [line for line in shown(tty=False, log_every_s=0).splitlines() if "env steps" in line]
    assert len(lines) == 9  # eight updates and the end
    assert lines[-1].startswith("env steps 8/1,000 1% | updates 8/8 100% | ")
    assert "env steps/s" in lines[-1]
    assert "updates/s" in lines[-1]
    assert "ETA 0:00:00" in lines[-1]
    assert "\r" not in "".join(lines)


def test_a_log_is_not_flooded(shown):
    lines = [line for line in shown(tty=False).splitlines() if "env steps" in line]
    assert 1 <= len(lines) <= 3


def test_a_terminal_gets_one_line_rewritten(shown):
    text = shown(tty=True, refresh_s=0)
    lines = [line for line in text.split("\n") if "env steps" in line]
    assert len(lines) == 1
    assert lines[0].count("\r") >= 8


def test_the_eta_is_of_the_budget_that_ends_first(make_trainer):
    bar = RLProgressBar()
    trainer = make_trainer(max_steps=100)
    data = tiny.TinyData()
    data.max_env_steps = 1000
    trainer.datamodule = data
    bar._history.extend([(0.0, 0, 0), (10.0, 100, 20)])
    bar.last_return = 21.0
    assert bar.line(trainer) == (
        "env steps 100/1,000 10% | updates 20/100 20% | return 21.0 | "
        "10 env steps/s 2 updates/s | ETA 0:00:40"
    )


def test_rates_are_left_out_until_they_are_known(make_trainer):
    bar, trainer = RLProgressBar(), make_trainer(max_steps=6)
    trainer.datamodule = tiny.TinyData()
    bar._history.append((0.0, 8, 1))
    assert bar.line(trainer) == "env steps 8 | updates 1/6 17%"


def test_episodes_in_a_log_begin_with_their_number_and_in_a_terminal_with_counts(monkeypatch):
    for tty, first in ((False, "playing 2 episodes ...\n"), (True, "\repisodes 0/2 | 1 step")):
        screen = Screen(tty)
        monkeypatch.setattr("sys.stderr", screen)
        bar = RLProgressBar(log_every_s=0)
        bar.episodes(0, 2, 1)
        assert screen.getvalue() == first
        bar._shown = -1e9
        bar.episodes(1, 2, 9)
        assert "episodes 1/2 | 9 steps" in screen.getvalue()


def test_an_episode_that_ends_with_a_line_of_metrics_is_shown():
    bar, trainer = (
        RLProgressBar(),
        SimpleNamespace(datamodule=SimpleNamespace(collector=SimpleNamespace(finished=[]))),
    )
    bar._is_due = lambda now: False
    module = SimpleNamespace(env_steps=10, updates=5, latest={"train/return": -150.0})
    bar.on_train_batch_end(trainer, module, None, None, 0)
    assert bar.last_return == -150.0
    trainer.datamodule.collector.finished = [(-3.0, 7)]
    bar.on_train_batch_end(trainer, module, None, None, 0)
    assert bar.last_return == -3.0
