from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.views import class_index, dreamer_view, one_hot, tdmpc2_view, to_latents, to_state
from lit_wm.types import Spec, State

LATENTS = {"deter": Spec("float32", (2,)), "stoch": Spec("uint8", (3,), classes=4)}


def reference(log, start, context, length, time_limit_is_terminal):
    """The batch row that the official data contract gives, made step by step from the driver's transitions.

    ``log`` is what the driver emitted, ``start`` the position of the first trained step.
    """
    sample = log[start - context : start + length]
    first = [bool(step["is_first"]) for step in sample]
    last = [bool(step["is_last"]) for step in sample]
    first[0] = True  # the replay forces the flag on the first row of a sample
    for i in range(len(sample) - 1):
        last[i] = last[i] or first[i + 1]
    out = {"obs": [], "prev_action": [], "reward": [], "is_first": [], "is_last": [], "is_terminal": []}
    for t in range(length):
        step = log[start + t]
        out["obs"].append(step["obs"].tolist())
        before = log[start + t - 1] if start + t > 0 else None
        out["prev_action"].append(None if first[context + t] or before is None else before["action"])
        out["reward"].append(step["reward"])
        out["is_first"].append(first[context + t])
        out["is_last"].append(last[context + t])
        out["is_terminal"].append(bool(step["is_terminal"] or (time_limit_is_terminal and step["timeout"])))
    carry = log[start - 1] if context else None
    return out, carry


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), steps=st.integers(12, 90), context=st.integers(0, 3),
    length=st.integers(1, 8), timeouts=st.booleans(), broken=st.booleans(),
    mean=st.sampled_from([2.0, 5.0, 30.0]),
)  # fmt: skip
def test_the_dreamer_view_equals_the_official_contract(
    make_replay, play, seed, steps, context, length, timeouts, mean, broken
):
    replay = make_replay(capacity=60, streams=2, window=context + length, context=context)
    game = play(replay, seed, mean).run(steps)
    if broken:  # environments that vanished: the next row simply starts an episode
        for log in game.steps:
            log[-1]["is_last"] = True
        game.run(8)
        for log in game.steps:
            log[steps - 1]["is_last"] = log[steps - 1]["is_terminal"] or log[steps - 1]["timeout"]
    batch = dreamer_view(replay.sample(6), context, timeouts, LATENTS)
    for b in range(6):
        stream = int(batch.obs["obs"][b, 0, 0])
        start = int(batch.info["generation"][b, 0])
        expected, carry = reference(game.steps[stream], start, context, length, timeouts)
        assert batch.obs["obs"][b].tolist() == expected["obs"]
        for name in ("reward", "is_first", "is_last", "is_terminal"):
            assert getattr(batch, name)[b].tolist() == expected[name], name
        for got, wanted in zip(batch.prev_action["action"][b].tolist(), expected["prev_action"], strict=True):
            assert wanted is None or got == wanted  # masked by the model where an episode starts
        if context:
            assert batch.carry.deter[b].tolist() == carry["deter"].tolist()
            assert batch.carry.stoch[b].argmax(-1).tolist() == carry["stoch"].tolist()
        else:
            assert batch.carry is None
    assert batch.reward.dtype == torch.float32
    assert batch.is_first.dtype == batch.is_last.dtype == batch.is_terminal.dtype == torch.bool


def test_a_time_limit_is_terminal_only_if_asked(make_replay, play):
    replay = make_replay()
    game = play(replay, 0, 4.0).run(60)
    rows = replay.sample(64)
    plain, official = (dreamer_view(rows, 1, flag, LATENTS) for flag in (False, True))
    timeouts = torch.tensor(
        [
            [
                game.steps[int(s)][int(p)]["timeout"] and not game.steps[int(s)][int(p)]["is_terminal"]
                for s, p, _ in row
            ]
            for row in plain.obs["obs"].tolist()
        ]
    )
    assert timeouts.any()
    assert not plain.is_terminal[timeouts].any()
    assert official.is_terminal[timeouts].all()
    assert torch.equal(plain.is_last, official.is_last)


def test_the_tdmpc2_view_is_what_happened_step_by_step(make_replay, play):
    """Against the driver's log: what led to an observation stands with it, from the second on."""
    replay = make_replay(capacity=180, window=4, within_episodes=True)
    game = play(replay, 0, 6.0).run(90)
    batch = tdmpc2_view(replay.sample(200))
    assert batch.carry is None and batch.write_back is None and batch.task is None  # noqa: PT018
    ends = Counter()
    for b in range(200):
        stream, start = map(int, batch.obs["obs"][b, 0, :2])
        assert batch.info["generation"][b].tolist() == list(range(start, start + 4))
        for t in range(4):
            step, before = game.steps[stream][start + t], game.steps[stream][start + t - 1]
            assert batch.obs["obs"][b, t].tolist() == step["obs"].tolist()
            assert bool(batch.is_first[b, t]) == step["is_first"]
            assert bool(batch.is_last[b, t]) == step["is_last"]
            led = (before["action"], step["reward"], step["is_terminal"]) if t else (0, 0, False)
            got = (batch.prev_action["action"][b, t], batch.reward[b, t], batch.is_terminal[b, t])
            assert tuple(x.item() for x in got) == led
            ends["time limit" if step["timeout"] and not step["is_terminal"] else step["is_terminal"]] += 1
    assert ends["time limit"] > 5
    assert ends[True] > 5
    assert batch.reward.dtype == torch.float32
    assert batch.is_first.dtype == batch.is_last.dtype == batch.is_terminal.dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_survive_the_way_through_their_stored_form(dtype):
    specs = {"deter": Spec(str(dtype).removeprefix("torch."), (2,)), "stoch": Spec("uint8", (3,), classes=4)}
    index = torch.tensor([[0, 3, 255], [1, 255, 2]], dtype=torch.uint8)
    state = State(torch.randn(2, 2).to(dtype), one_hot(index, 4, dtype))
    assert state.stoch[0, 2].tolist() == [0, 0, 0, 0]
    stored = to_latents(state, specs)
    assert torch.equal(stored["stoch"], index)
    again = to_state(stored, specs)
    assert torch.equal(again.deter, state.deter)
    assert torch.equal(again.stoch, state.stoch)
    assert again.stoch.dtype == dtype


def test_class_index_of_a_straight_through_sample_is_its_class():
    p = torch.softmax(torch.randn(5, 3, 4), -1)
    hard = torch.nn.functional.one_hot(p.argmax(-1), 4).float()
    assert torch.equal(class_index(hard + (p - p.detach())), p.argmax(-1).to(torch.uint8))
    assert np.all(class_index(torch.zeros(2, 3, 4)).numpy() == 255)
