"""Names that other packages and older papers give to our options: translated with a note, or refused with
the reason.

A table and the few lines that apply it; neither torch nor Lightning is imported. ``docs/migration.md`` shows
the same table to readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_wm.errors import ConfigError

GROUPS = ("model", "data")


@dataclass(frozen=True)
class Row:
    """What one old meaning is called here.

    Attributes:
        names: its old names, separated by spaces. A dash counts as an underscore.
        to: our options that receive the value, ``*`` for the same name; none if it is ignored.
        change: value -> our value.
        note: added to the printed line.
        refused: the reason why there is no such thing, and what to write instead; nothing is then translated.
    """

    names: str
    to: tuple[str, ...] = ()
    change: Callable[[Any], Any] = lambda value: value
    note: str = ""
    refused: str = ""

    def options(self, name: str) -> list[str]:
        """Our options that ``name`` stands for."""
        return [path.replace("*", name) for path in self.to]


def horizon_of(gamma: float) -> float:
    """Discount horizon of a discount factor: 1 / (1 - gamma)."""
    if not 0 < gamma < 1:
        raise ConfigError(f"a discount of {gamma} has no horizon; expected 0 < gamma < 1, or model.horizon")
    return round(1 / (1 - gamma), 6)


def _preset(size: Any) -> Any:
    return f"size{str(size).lower()}" if str(size)[:1].isdigit() else size


def _tdmpc2_preset(size: Any) -> Any:
    return f"{size}m" if str(size).isdigit() else str(size).lower()


def _return_norm(kind: Any) -> Any:
    return {"mean_std": "meanstd", "percentile": "perc", "percentiles": "perc"}.get(str(kind), kind)


def _strength(signals: Any) -> Any:
    match signals:
        case {"extrinsic": {"strength": strength, **rest}, **others} if not rest and not others:
            return number(strength)
    raise ConfigError(
        f"reward_signals: {signals}; only extrinsic.strength is known here (model.reward_scale)"
    )


def _sources(files: Any) -> list[str]:
    """URIs of files, by their endings."""
    kinds = {".npz": "npz", ".hdf5": "hdf5", ".h5": "hdf5", ".pt": "tdmpc2"}
    found = []
    for file in files if isinstance(files, list) else [files]:
        kind = kinds.get(Path(str(file)).suffix)
        if kind is None and ":" not in str(file):
            raise ConfigError(
                f"{file} could be data of any kind; write its URI: --data.sources '[npz:{file}]', minari:ID, "
                "hdf5:PATH ..."
            )
        found.append(str(file) if ":" in str(file) else f"{kind}:{file}")
    return found


KL = {"kl_scale", "kl_coef", "kl_balance"}  # they make model.loss_scales.dyn and rep together
RATIO = (
    "how often is one number: data.train_ratio, replayed steps per environment step\nUpdates per step are "
)
RATIO += "train_ratio / (batch_size * batch_length); collecting and learning take turns by it"
STEPS = "environment steps; a budget in updates is trainer.max_steps"
BOTH_KL = "both terms are KL(posterior, prior), with the gradient stopped on one side"
SAMPLED = "actions are drawn from the categorical itself and learnt by REINFORCE, without relaxation"
FIXED = "see configs/ for what can be chosen\nRemove it"

# fmt: off
TABLE = (
    # Command lines
    Row("timesteps total_timesteps max_steps steps", ("data.max_env_steps",), note=STEPS),
    Row("model_size", ("model.preset",), _preset),
    Row("train_ratio", ("data.train_ratio",), note="replayed steps per environment step, not updates"),
    Row("headless", note="nothing ever opens a window"),
    Row("demos demo_path demonstrations dataset dataset_path", ("data.sources",), _sources,
        note="their share of a batch is each source's weight, the environment's data.env_weight"),
    Row("pretrain pretrain_wm pretrain_steps", ("model.pretrain.world_model",),
        note="updates of the world model alone, before all parts learn"),
    # Replay and schedule
    Row("batch_size", ("data.batch_size",)),
    Row("sequence_length seq_len batch_length", ("data.batch_length",)),
    Row("buffer_size replay_buffer_size replay_size", ("data.capacity",), note="rows, one per step"),
    Row("buffer_init_steps prefill_steps prefill", ("data.prefill",), note="steps of random actions"),
    Row("world_model_updates policy_updates collect_steps collect_interval", refused=RATIO),
    # Sizes
    Row("latent_size", ("model.stoch",), note="deprecated: it means many things; here the categoricals"),
    Row("stoch_size rssm_stochastic", ("model.stoch",)),
    Row("rssm_classes", ("model.classes",)),
    Row("deter_size rssm_hidden", ("model.deter",), note="a multiple of model.blocks"),
    Row("hidden_size hidden_units hidden_dim", ("model.hidden",), note="the MLPs have model.units"),
    Row("cnn_depth", ("model.depth",)),
    Row("dense_layers num_layers", ("model.layers.enc", "model.layers.dec")),
    Row("encoder_layers", ("model.layers.enc",)),
    Row("decoder_layers", ("model.layers.dec",)),
    Row("reward_layers", ("model.layers.rew",)),
    Row("discount_layers continue_layers", ("model.layers.con",)),
    Row("actor_layers policy_layers", ("model.layers.pol",)),
    Row("critic_layers value_layers", ("model.layers.val",)),
    Row("embed_size embed_dim", note="the token's size follows from model.units and model.depth"),
    Row("obs_dim obs_size action_dim action_size", note="read from the environment"),
    # Losses
    Row("kl_scale kl_coef kl_balance", ("model.loss_scales.dyn", "model.loss_scales.rep")),
    Row("kl_free free_bits free_nats", ("model.free_nats",), note="of the summed KL, in nats"),
    Row("kl_forward", ("model.loss_scales.dyn",), note=BOTH_KL),
    Row("kl_backward", ("model.loss_scales.rep",), note=BOTH_KL),
    Row("recon_coef", ("model.loss_scales.rec",)),
    Row("reward_coef", ("model.loss_scales.rew",)),
    Row("continue_coef", ("model.loss_scales.con",)),
    Row("entropy_coef", ("model.actent",)),
    Row("reward_signals", ("model.reward_scale",), _strength, "changes the problem, not a loss's weight"),
    Row("reward_scale train_world_model train_actor train_critic actor_lr critic_lr", ("model.*",)),
    # Imagination and returns
    Row("imagination_horizon imag_horizon", ("model.imag_length",)),
    Row("horizon",
        refused="two things have this name\nWrite model.imag_length for the imagined steps (15), or "
        "model.horizon for the discount horizon (333): gamma = 1 - 1/horizon"),
    Row("discount gamma", ("model.horizon",), lambda gamma: horizon_of(float(gamma)), "1 / (1 - gamma)"),
    Row("lambda lambda_ lambda_coef", ("model.lam",)),
    Row("tau", ("model.slow_rate",), note="of a regulariser, not of the bootstrap; the reference has 0.02"),
    Row("return_normalization return_normalisation", ("model.return_norm",), _return_norm),
    Row("start_states num_starts imagination_starts",
        refused="a dream starts from every replayed step, batch_size * batch_length of them\nRemove it, or "
        "take the last n steps of each sequence: model.imag_last"),
    # Optimiser
    Row("learning_rate world_lr model_lr", ("model.lr",), note="of all three groups"),
    Row("adam_epsilon", ("model.eps",), note="LaProp has 1e-20: above 1e-8 small gradients move little"),
    Row("grad_clip", ("model.grad_clip",), note="of the global norm, beside model.agc of each parameter"),
    # Another algorithm
    Row("ensemble ensemble_size", ("model.ensemble",),
        note="heads beside the one world model; only model.disagreement makes use of them"),
    Row("kernel kernel_size conv_kernel conv_kernels stride conv_stride",
        refused="convolutions are 5 x 5 with stride 1, norm and pooling\nRemove it; model.strided: true "
        "halves and doubles images by strided convolutions instead"),
    Row("critic_loss value_loss", refused=f"the critic is two-hot over exponential bins, no MSE; {FIXED}"),
    Row("reward_head reward_dist reward_loss reward_transform",
        refused=f"the reward is two-hot over exponential bins, no number in symlog space; {FIXED}"),
    Row("gumbel gumbel_softmax gumbel_temperature", refused=f"{SAMPLED}; {FIXED}"),
    Row("straight_through",
        refused=f"latents always pass gradients straight through, actions never need it; {FIXED}"),
)
# fmt: on
INDEX = {name: row for row in TABLE for name in row.names.split()}
# Names of the table that say something else of TD-MPC2.
TDMPC2_TABLE = (
    Row("discount gamma", ("model.discount",)),
    Row("horizon", ("model.horizon",), note="steps of a plan; data.batch_length is one more"),
    Row("tau entropy_coef reward_coef", ("model.*",)),
    Row("model_size", ("model.preset",), _tdmpc2_preset),
    Row("latent_size embed_size embed_dim", ("model.latent_dim",)),
    Row("learning_rate model_lr", ("model.lr",)),
    Row("grad_clip", ("model.grad_clip",), note="of the model's gradients, and of the policy's"),
)
TDMPC2_INDEX = INDEX | {name: row for row in TDMPC2_TABLE for name in row.names.split()}


def old_name(path: str) -> str:
    """The table's form of a path: ``--model.init_args.kl-balance`` is ``kl_balance``."""
    keys = path.removeprefix("--").partition("=")[0].replace("-", "_").split(".")
    if keys[0] in GROUPS and len(keys) > 1:
        keys = keys[1 + (keys[1] == "init_args") :]
    return ".".join(keys)


def number(word: Any) -> Any:
    """The value of a flag's word, with ``1e6`` as a whole number; other values as they are."""
    try:
        value = yaml.safe_load(word) if isinstance(word, str) else word
        value = float(value) if isinstance(value, str) else value
        return int(value) if isinstance(value, float) and value.is_integer() else value
    except (ValueError, yaml.YAMLError):
        return word


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set ``model.lr`` in a configuration, at ``model.init_args.lr``."""
    *groups, last = path.replace(".", ".init_args.", 1).split(".")
    for group in groups:
        inner = tree.get(group)
        if isinstance(inner, str):  # the class of a group, or a flag's dict: --model.loss_scales '{rew: 2}'
            inner = {"class_path": inner} if group in GROUPS else yaml.safe_load(inner)
        tree[group] = dict(inner or {})
        tree = tree[group]
    tree[last] = value


def _get(tree: Any, path: str) -> Any:
    for key in path.replace(".", ".init_args.", 1).split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _entries(tree: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Path, parent and key of what has a name of the table."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else ():
        here = f"{path}.{key}".removeprefix(".")
        if old_name(here) in INDEX:
            yield here, tree, key
        elif path in ("", *GROUPS):
            yield from _entries(value, here)


class Translator:
    """Translates the layers of one configuration, lowest first.

    Args:
        known: arguments that the classes in use take, by group. Their own names stay, and nothing is
            translated into a name that they lack.

    Attributes:
        notes: a line for each name translated.
    """

    def __init__(self, known: Mapping[str, list[str]]):
        self.known, self.notes = known, list[str]()
        self.dreamer = "imag_length" in known["model"]
        self.rows = TDMPC2_INDEX if "task_like" in known["model"] else INDEX
        self._kl: dict[str, float] = {}  # of all layers, as they multiply

    def translate(self, layer: dict[str, Any]) -> dict[str, Any]:
        """Replace the old names in ``layer``, in place; return our paths and their values.

        Raises:
            ConfigError: for a name that is refused, or that says something else than its modern name.
        """
        said: dict[str, tuple[str, Any]] = {}
        for path, tree, key in _entries(layer):
            name, shown = old_name(path), path.replace(".init_args", "")
            row = self.rows[name]
            ours = "." in path and name in self.known[path.split(".")[0]]
            if ours or not all(map(self._takes, row.options(name))) or (row.refused and not self.dreamer):
                continue
            if row.refused:
                raise ConfigError(f"'{shown}' is refused: {row.refused}")
            given = number(tree.pop(key))
            for target, value in self._values(name, row, given, shown).items():
                rival, other = said.get(target) or (target, number(_get(layer, target)))
                if other not in (None, value) and not {name, old_name(rival)} <= KL:
                    raise ConfigError(
                        f"'{shown}: {given}' means {target}: {value}, but '{rival}' says {other}\n"
                        "Remove one of them"
                    )
                said[target] = shown, value
        for target, (_, value) in said.items():
            put(layer, target, value)
        horizon = number(_get(layer, "model.horizon"))
        is_number = self.dreamer and "model.horizon" not in said and isinstance(horizon, int | float)
        if is_number and 1 < horizon <= 50:
            self.notes.append(
                f"model.horizon: {horizon} is the discount horizon, gamma = {1 - 1 / horizon:.4g}; "
                "the number of imagined steps is model.imag_length"
            )
        return {target: value for target, (_, value) in said.items()}

    def _takes(self, path: str) -> bool:
        group, key = path.split(".")[:2]
        return key in self.known[group]

    def _values(self, name: str, row: Row, given: Any, shown: str) -> dict[str, Any]:
        try:
            if name in KL:
                self._kl["balance" if name == "kl_balance" else "scale"] = float(given)
                scale, b = self._kl.get("scale", 1.0), self._kl.get("balance")
                pair = (scale, 0.1 * scale) if b is None else (scale * b, scale * (1 - b))
                values = dict(zip(row.to, (round(x, 12) for x in pair), strict=True))
            else:
                values = {target: row.change(given) for target in row.options(name)}
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{shown}: got {given!r}; expected a number") from error
        meant = ", ".join(f"{target}: {value}" for target, value in values.items()) or "ignored"
        was = shown if given is None else f"{shown}: {given}"
        self.notes.append(f"{was} -> {meant}" + f" ({row.note})" * bool(row.note))
        return values
