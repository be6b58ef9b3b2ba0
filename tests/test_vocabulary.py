"""Names of other packages: every row of the table is translated with a note, or refused with the reason."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_wm.cli import main
from lit_wm.errors import ConfigError
from lit_wm.tracking import flatten
from lit_wm.training_cli import DEFAULT_CLASSES, arguments_of, read_command
from lit_wm.vocabulary import INDEX, number, old_name

OURS = {group: arguments_of(path) for group, path in DEFAULT_CLASSES.items()}
DYN, REP = "model.loss_scales.dyn", "model.loss_scales.rep"

# Old name, its value, what it becomes.
TRANSLATED = [
    ("batch_size", 50, {"data.batch_size": 50}),
    ("sequence_length", 64, {"data.batch_length": 64}),
    ("seq_len", 32, {"data.batch_length": 32}),
    ("batch_length", 32, {"data.batch_length": 32}),
    ("buffer_size", 1e6, {"data.capacity": 1_000_000}),
    ("replay_buffer_size", 500_000, {"data.capacity": 500_000}),
    ("replay_size", 500_000, {"data.capacity": 500_000}),
    ("buffer_init_steps", 1000, {"data.prefill": 1000}),
    ("prefill_steps", 5000, {"data.prefill": 5000}),
    ("prefill", 2500, {"data.prefill": 2500}),
    ("tau", 0.005, {"model.slow_rate": 0.005}),
    ("imagination_horizon", 15, {"model.imag_length": 15}),
    ("imag_horizon", 10, {"model.imag_length": 10}),
    ("kl_scale", 0.5, {DYN: 0.5, REP: 0.05}),
    ("kl_coef", 2.0, {DYN: 2.0, REP: 0.2}),
    ("kl_balance", 0.8, {DYN: 0.8, REP: 0.2}),
    ("kl_free", 1.5, {"model.free_nats": 1.5}),
    ("free_bits", 1.0, {"model.free_nats": 1.0}),
    ("free_nats", 1.0, {"model.free_nats": 1.0}),
    ("kl_forward", 0.6, {DYN: 0.6}),
    ("kl_backward", 0.3, {REP: 0.3}),
    ("discount", 0.99, {"model.horizon": 100}),
    ("gamma", 0.997, {"model.horizon": 333.333333}),
    ("lambda", 0.9, {"model.lam": 0.9}),
    ("lambda_", 0.95, {"model.lam": 0.95}),
    ("lambda_coef", 0.95, {"model.lam": 0.95}),
    ("adam_epsilon", 1e-5, {"model.eps": 1e-5}),
    ("grad_clip", 100.0, {"model.grad_clip": 100.0}),
    ("learning_rate", 3e-4, {"model.lr": 3e-4}),
    ("world_lr", 1e-4, {"model.lr": 1e-4}),
    ("model_lr", 1e-4, {"model.lr": 1e-4}),
    ("actor_lr", 3e-5, {"model.actor_lr": 3e-5}),
    ("critic_lr", 3e-5, {"model.critic_lr": 3e-5}),
    ("latent_size", 32, {"model.stoch": 32}),
    ("stoch_size", 32, {"model.stoch": 32}),
    ("rssm_stochastic", 32, {"model.stoch": 32}),
    ("rssm_classes", 32, {"model.classes": 32}),
    ("deter_size", 256, {"model.deter": 256}),
    ("rssm_hidden", 4096, {"model.deter": 4096}),
    ("hidden_size", 256, {"model.hidden": 256}),
    ("hidden_units", 512, {"model.hidden": 512}),
    ("hidden_dim", 512, {"model.hidden": 512}),
    ("reward_layers", 2, {"model.layers.rew": 2}),
    ("discount_layers", 2, {"model.layers.con": 2}),
    ("continue_layers", 2, {"model.layers.con": 2}),
    ("actor_layers", 2, {"model.layers.pol": 2}),
    ("policy_layers", 2, {"model.layers.pol": 2}),
    ("critic_layers", 2, {"model.layers.val": 2}),
    ("value_layers", 2, {"model.layers.val": 2}),
    ("cnn_depth", 48, {"model.depth": 48}),
    ("dense_layers", 2, {"model.layers.enc": 2, "model.layers.dec": 2}),
    ("num_layers", 3, {"model.layers.enc": 3, "model.layers.dec": 3}),
    ("encoder_layers", 2, {"model.layers.enc": 2}),
    ("decoder_layers", 2, {"model.layers.dec": 2}),
    ("train_world_model", True, {"model.train_world_model": True}),
    ("train_actor", False, {"model.train_actor": False}),
    ("train_critic", False, {"model.train_critic": False}),
    ("reward_scale", 0.1, {"model.reward_scale": 0.1}),
    ("reward_signals", {"extrinsic": {"strength": 0.5}}, {"model.reward_scale": 0.5}),
    ("timesteps", 1e5, {"data.max_env_steps": 100_000}),
    ("total_timesteps", 1e5, {"data.max_env_steps": 100_000}),
    ("max_steps", 100_000, {"data.max_env_steps": 100_000}),
    ("steps", 100_000, {"data.max_env_steps": 100_000}),
    ("train_ratio", 64, {"data.train_ratio": 64}),
    ("entropy_coef", 1e-3, {"model.actent": 1e-3}),
    ("recon_coef", 2.0, {"model.loss_scales.rec": 2.0}),
    ("reward_coef", 2.0, {"model.loss_scales.rew": 2.0}),
    ("continue_coef", 2.0, {"model.loss_scales.con": 2.0}),
    ("return_normalization", "mean_std", {"model.return_norm": "meanstd"}),
    ("return_normalisation", "percentile", {"model.return_norm": "perc"}),
    ("model_size", "12M", {"model.preset": "size12m"}),
    ("model-size", "size200m", {"model.preset": "size200m"}),
    ("headless", True, {}),
    ("embed_size", 1024, {}),
    ("embed_dim", 1024, {}),
    ("demos", "a.npz", {"data.sources": ["npz:a.npz"]}),
    ("demo_path", ["a.npz", "minari:b"], {"data.sources": ["npz:a.npz", "minari:b"]}),
    ("demonstrations", "b.hdf5", {"data.sources": ["hdf5:b.hdf5"]}),
    ("pretrain", 50, {"model.pretrain.world_model": 50}),
    ("pretrain_wm", 50, {"model.pretrain.world_model": 50}),
    ("pretrain_steps", 50, {"model.pretrain.world_model": 50}),
    ("ensemble", 5, {"model.ensemble": 5}),
    ("ensemble_size", 5, {"model.ensemble": 5}),
    ("dataset", "minari:b", {"data.sources": ["minari:b"]}),
    ("dataset_path", "c.pt", {"data.sources": ["tdmpc2:c.pt"]}),
    ("obs_dim", 34, {}),
    ("obs_size", 34, {}),
    ("action_dim", 2, {}),
    ("action_size", 2, {}),
]

# Old names, and what the refusal says.
REFUSED = [
    ("horizon", ["model.imag_length", "model.horizon", "1 - 1/horizon"]),
    ("world_model_updates policy_updates collect_steps collect_interval", ["data.train_ratio"]),
    ("kernel kernel_size conv_kernel conv_kernels stride conv_stride", ["5 x 5", "model.strided"]),
    ("critic_loss value_loss", ["two-hot", "no MSE"]),
    ("reward_head reward_dist reward_loss reward_transform", ["two-hot", "symlog"]),
    ("gumbel gumbel_softmax gumbel_temperature", ["REINFORCE"]),
    ("straight_through", ["straight through"]),
    ("start_states num_starts imagination_starts", ["every replayed step", "model.imag_last"]),
]
REFUSED = [(name, parts) for names, parts in REFUSED for name in names.split()]


def said(*flags, file=None, tmp_path=None):
    """The flat configuration that the files and the translated flags make."""
    argv = ["fit", "--data.env", "CartPole-v1"]
    if file is not None:
        (tmp_path / "old.yaml").write_text(yaml.safe_dump(file))
        argv += ["--config", str(tmp_path / "old.yaml")]
    command = read_command([*argv, *flags])
    return {k: v for k, v in flatten(command.config).items() if v != {} and not k.endswith("class_path")}


def test_every_name_of_the_table_is_tested_here():
    assert {old_name(name) for name, *_ in [*TRANSLATED, *REFUSED]} == INDEX.keys()


@pytest.mark.parametrize(("name", "value", "becomes"), TRANSLATED, ids=[row[0] for row in TRANSLATED])
def test_an_old_name_is_translated_with_a_note(name, value, becomes, tmp_path, capsys):
    places = [{name: value}]
    for group in ("model", "data"):
        if name not in OURS[group]:
            places += [{group: {name: value}}, {group: {"init_args": {name: value}}}]
    for place in places:
        assert said(file=place, tmp_path=tmp_path) == becomes
        assert [
            line for line in capsys.readouterr().err.splitlines() if f"{name}: " in line and " -> " in line
        ]
    flags = ["--" + ".".join(key for key in flatten(place)) for place in places]
    word = next(iter(flatten({"": value}).values()))
    for flag in flags:
        assert said(flag, str(word)) == becomes
        assert said(f"{flag}={word}", "--name", "x") == becomes
        notes = capsys.readouterr().err
        assert f"{name}: " in notes
        assert all(f"{k}: {number(v)}" in notes for k, v in becomes.items())


@pytest.mark.parametrize(("name", "parts"), REFUSED, ids=[row[0] for row in REFUSED])
def test_an_old_name_is_refused_with_the_reason(name, parts, tmp_path, capsys):
    group = "data" if name == "horizon" else "model"
    for words in ([f"--{name}", "5"], [f"--{group}.{name}=5"]):
        assert main(["fit", "--config", "dreamer_cartpole", *words]) == 1
        error = capsys.readouterr().err
        assert f"{name}' is refused" in error
        assert len(error.strip().splitlines()) <= 5
        assert all(part in error for part in parts)
    with pytest.raises(ConfigError, match="is refused"):
        said(file={group: {"init_args": {name: 5}}}, tmp_path=tmp_path)


def test_the_command_takes_what_was_translated(tmp_path, monkeypatch, capsys):
    """All names at once, one for each of our options, through jsonargparse."""
    monkeypatch.chdir(tmp_path)
    flags, expected = ["--headless"], {}
    for name, value, becomes in TRANSLATED:
        if becomes and not becomes.keys() & expected.keys() and not isinstance(value, dict):
            flags += [f"--{name}", str(value)]
            expected |= becomes
    with pytest.raises(SystemExit):
        main(["fit", "--config", "dreamer_cartpole", *flags, "--print_config"])
    printed = capsys.readouterr()
    config = flatten(yaml.safe_load(printed.out))
    assert {key: config[key] for key in expected} == expected
    assert len(printed.err.splitlines()) == (len(flags) - 1) // 2 + 1


def test_a_command_line_of_another_package_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(
        "model: {kl_balance: 0.7}\ndata: {buffer_size: 1e3}\nimagination_horizon: 4\n"
    )
    words = "--headless --timesteps 1e4 --model-size debug --train-ratio 16 --trainer.logger false"
    layers = ["dreamer_cartpole", "overlay/debug", "old.yaml"]
    assert main(["fit", *(w for name in layers for w in ("--config", name)), *words.split()]) == 0
    notes = capsys.readouterr().err
    assert "imagination_horizon: 4 -> model.imag_length: 4\n" in notes
    (written,) = Path("runs").glob("*/*/config.yaml")
    config = flatten(yaml.safe_load(written.read_text()))
    expected = {
        "data.max_env_steps": 10_000, "model.preset": "debug", "data.train_ratio": 16.0,
        "data.capacity": 1000, "model.imag_length": 4, DYN: 0.7, REP: 0.3,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_scale_and_balance_multiply(tmp_path):
    expected = {DYN: 1.6, REP: 0.4}
    assert said("--kl_scale", "2", "--kl_balance", "0.8") == expected
    assert said("--kl_balance", "0.8", "--kl_scale", "2") == expected
    assert said("--kl_balance", "0.8", file={"model": {"kl_scale": 2}}, tmp_path=tmp_path) == expected


def test_two_values_for_one_option_are_an_error_unless_a_flag_is_over_a_file(tmp_path):
    both = {"model": {"init_args": {"imagination_horizon": 10, "imag_length": 15}}}
    with pytest.raises(
        ConfigError, match=r"imagination_horizon: 10' means model.imag_length: 10.*\n.*Remove"
    ):
        said(file=both, tmp_path=tmp_path)
    with pytest.raises(ConfigError, match="but 'free_bits' says 1"):
        said("--free_bits", "1", "--kl_free", "2")
    with pytest.raises(ConfigError, match="but 'model.lr' says 0.1"):
        said("--model.lr", "0.1", "--learning_rate", "0.2")
    both["model"]["init_args"]["imag_length"] = 10.0
    assert said(file=both, tmp_path=tmp_path) == {"model.imag_length": 10}
    both = {"model": {"init_args": {"imag_length": 12}}}
    assert said("--imagination_horizon", "9", file=both, tmp_path=tmp_path) == {"model.imag_length": 9}


def test_our_own_names_stay_and_print_nothing(capsys):
    words = ["--data.batch_size", "4", "--model.horizon", "100", "--model.train_actor", "false"]
    assert read_command(["fit", "--config", "dreamer_cartpole", *words]).flags == words
    assert capsys.readouterr().err == ""


def test_a_short_discount_horizon_is_pointed_out(capsys):
    read_command(["fit", "--config", "dreamer_cartpole", "--model.horizon", "15"])
    assert "model.horizon: 15 is the discount horizon, gamma = 0.9333" in capsys.readouterr().err
    read_command(["fit", "--config", "dreamer_cartpole", "--gamma", "0.9"])
    assert capsys.readouterr().err == "gamma: 0.9 -> model.horizon: 10.0 (1 / (1 - gamma))\n"


@pytest.mark.parametrize(("words", "part"), [
    (["--gamma", "1"], "no horizon"),
    (["--gamma", "high"], "expected a number"),
    (["--kl_balance", "strong"], "kl_balance: got 'strong'; expected a number"),
    (["--reward_signals.curiosity.strength", "1"], "only extrinsic.strength"),
])  # fmt: skip
def test_a_value_that_has_no_translation_is_an_error(words, part):
    with pytest.raises(ConfigError, match=part):
        said(*words)


def test_names_of_another_model_class_are_its_own():
    words = ["--model", "lightning.pytorch.demos.boring_classes.BoringModel", "--model.tau", "0.1"]
    assert read_command(["fit", "--config", "dreamer_cartpole", *words]).flags == words


def test_the_table_needs_no_torch():
    code = "import sys, lit_wm.vocabulary; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_has_every_name_and_names_only_what_exists():
    page = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
    words = re.findall(r"`([^`\n]+)`", page)
    shown = {old_name(word.split()[0]) for word in words}
    assert INDEX.keys() <= shown | {"reward_signals"}
    ours = {m for word in words for m in re.findall(r"\b(model|data)\.(\w+)", word)}
    assert len(ours) > 30
    known = OURS | {"model": [*OURS["model"], *arguments_of("lit_wm.TDMPC2Module"), "class_path"]}
    for group, key in ours:
        assert key in known[group], f"{group}.{key}"


@pytest.mark.parametrize(
    ("flags", "key", "meant"),
    [
        (
            ["--model.loss_scales", "{dyn: 0.5}", "--kl_backward", ".3"],
            "model.loss_scales",
            {"dyn": 0.5, "rep": 0.3},
        ),
        (["--reward_layers", "2", "--model.layers", "{pol: 2}"], "model.layers", {"pol": 2, "rew": 2}),
    ],
)
def test_a_flag_with_a_dict_and_an_old_name_are_merged(flags, key, meant):
    config = said(*flags)
    assert {k.removeprefix(f"{key}."): v for k, v in config.items() if k.startswith(key)} == meant


@pytest.mark.parametrize(("name", "value", "becomes"), [
    ("gamma", 0.97, {"model.discount": 0.97}),  # not the horizon 1 / (1 - gamma), which is of a plan here
    ("discount", 0.97, {"model.discount": 0.97}),
    ("horizon", 5, {"model.horizon": 5}),
    ("tau", 0.005, {"model.tau": 0.005}),
    ("entropy_coef", 1e-3, {"model.entropy_coef": 1e-3}),
    ("reward_coef", 0.2, {"model.reward_coef": 0.2}),
    ("model_size", 19, {"model.preset": "19m"}),
    ("model_size", "5M", {"model.preset": "5m"}),
    ("latent_size", 64, {"model.latent_dim": 64}),
    ("learning_rate", 1e-3, {"model.lr": 1e-3}),
    ("grad_clip", 10.0, {"model.grad_clip": 10.0}),
    ("batch_size", 64, {"data.batch_size": 64}),
    ("steps", 5000, {"data.max_env_steps": 5000}),
])  # fmt: skip
def test_old_names_of_tdmpc2_are_its_own_options(name, value, becomes):
    flags = ["--model", "lit_wm.TDMPC2Module", f"--{name}", str(value)]
    assert said(*flags) == becomes
    ((path, _),) = becomes.items()
    flags[2] = f"--{path.split('.')[0]}.{name}"
    assert said(*flags) == ({} if flags[2] == f"--{path}" else becomes)  # an own name stays a flag


@pytest.mark.parametrize("name", ["kl_scale", "imag_horizon", "rssm_hidden", "cnn_depth", "recon_coef"])
def test_dreamers_names_mean_nothing_to_tdmpc2(name, capsys):
    assert said("--model", "lit_wm.TDMPC2Module", f"--model.{name}", "3") == {}  # fit refuses the flag
    assert capsys.readouterr().err == ""
