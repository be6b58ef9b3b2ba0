"""``convert``: official TD-MPC2 checkpoints to ours and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from lit_wm.callbacks.evaluate import write_atomic
from lit_wm.convert.official_tdmpc2 import module_from_official, read, to_official
from lit_wm.errors import CheckpointError, ConfigError
from lit_wm.evaluation_cli import Parser, check_outputs, load_module
from lit_wm.tasks import TASK_SETS


def convert(argv: list[str]) -> int:
    """``lit-wm convert``: the direction follows from what the file is."""
    parser = Parser(
        prog="lit-wm convert",
        description="An official TD-MPC2 checkpoint as one of ours, for evaluate and fit; or one of ours "
        "as a file that the official code loads.",
    )
    parser.add_argument("kind", choices=["tdmpc2"], help="whose checkpoint it is")
    parser.add_argument("file", type=Path, metavar="FILE", help="the official .pt, of any date, or our .ckpt")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="the file to write")
    lengths = (
        "time limit in decisions of a single task: 100 in Meta-World, ManiSkill2, MyoSuite (500, DMControl)"
    )
    meaning = "mt30, mt80, or a YAML file with a list of {name, obs, action, episode_length}; by their number"
    parser.add_argument("--episode-length", type=int, default=500, metavar="N", help=lengths)
    parser.add_argument("--tasks", metavar="T", help=meaning)
    parser.add_argument("--task", metavar="NAME", help="the one of several tasks that is to be played")
    parser.add_argument("--force", action="store_true", help="replace OUT if there is one")
    given = parser.parse_args(argv)
    check_outputs(None, given.output)
    if given.output.exists() and not given.force:
        raise ConfigError(f"{given.output} exists; give another -o, or --force to replace it")
    loaded = read(given.file)
    back = isinstance(loaded, dict) and "hyper_parameters" in loaded
    if back:
        from lit_wm.tdmpc2 import TDMPC2Module

        module, _ = load_module(given.file)
        if not isinstance(module, TDMPC2Module):
            raise CheckpointError(f"{given.file} is of a {type(module).__name__}; expected a TDMPC2Module")
        if given.tasks or given.task:
            raise ConfigError(
                f"{given.file} is a checkpoint of ours, which knows its tasks: no --tasks, --task"
            )
        content: dict[str, Any] = {"model": to_official(module.model.state_dict(), module.hparams)}
    else:
        module = module_from_official(given.file, read_tasks(given.tasks), given.episode_length, given.task)
        content = lone_checkpoint(module)
    write_atomic(given.output, lambda part: torch.save(content, part))
    kind = "official TD-MPC2" if back else "TD-MPC2"
    print(f"{given.output}: {kind} {describe(module)}")
    return 0


def read_tasks(given: str | None) -> Any:
    """A set's name as it is; else the list in the file of that name."""
    if given is None or given in TASK_SETS:
        return given
    try:
        tasks = yaml.safe_load(Path(given).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--tasks {given}: expected mt30, mt80 or a YAML file: {error}") from error
    if not isinstance(tasks, list):
        raise ConfigError(f"--tasks {given}: expected a list of {{name, obs, action, episode_length}}")
    return tasks


def lone_checkpoint(module: Any) -> dict[str, Any]:
    """What ``lit-wm export`` would write of a module that was never trained here."""
    checkpoint = {
        "state_dict": module.state_dict(),
        "hparams_name": "kwargs",
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": 0,
    }
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def describe(module: Any) -> str:
    """Preset, tasks and sizes in one line."""
    model, chosen = module.model, module.hparams
    own = any(chosen[k] is not None for k in ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_q"))
    tasks = f"{len(model.tasks)} tasks" if model.tasks else "one task"
    gammas = sorted({round(x, 4) for x in model.discount.flatten().tolist()})
    images = [s.shape for s in model.spaces.obs.values() if s.is_image]
    return (
        f"{'own sizes' if own else chosen['preset']}, {tasks}, discount {' and '.join(map(str, gammas))}, "
        f"observation {images or model.obs_dim}, action {model.action_dim}, K {len(model.critic[0].weight)}, "
        f"L {model.latent_dim}, {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters"
    )
