"""The ``lit-wm`` command: a thin dispatcher.

``--help``, ``--version`` and ``presets`` answer before torch or Lightning is imported (Lightning alone costs
seconds); ``fit``, ``validate``, ``test`` and ``predict`` go to :mod:`lit_wm.training_cli`.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lit_wm import __version__
from lit_wm.errors import ConfigError, Interrupted, LitWMError, nearest

TRAINING_VERBS = ("fit", "validate", "test", "predict")

HELP = """\
usage: lit-wm VERB [options]

  fit        train: collect, learn, evaluate, save
  validate   evaluation episodes and the open-loop error of a checkpoint
  test       the final protocol of a checkpoint: return with its confidence interval
  predict    write the actions of a checkpoint's episodes to a file
  evaluate   a checkpoint in any environment: score, success, video, noisy observations
  export     a checkpoint's model alone, for sharing
  convert    the authors' TD-MPC2 checkpoints to ours and back
  explain    what a configuration means: shapes, sizes, memory, time
  collect    episodes of a checkpoint or of random actions, as a dataset
  data       offline datasets: ingest, inspect, verify ...
  presets    the model sizes and their parameter counts

  --help, --version

examples:
  lit-wm fit --config configs/dreamer_atari.yaml
  lit-wm fit --config configs/dreamer_cartpole.yaml --config configs/overlay/debug.yaml --model.preset size1m
  lit-wm fit --ckpt_path last                      go on with the newest run
  lit-wm test --ckpt_path runs/CartPole-v1/NAME    its best checkpoint
  lit-wm evaluate --ckpt best --episodes 20 --seed 0 --video play.gif --json result.json
  lit-wm export --ckpt best -o model.ckpt
  lit-wm convert tdmpc2 walker-walk-1.pt -o walker.ckpt
  lit-wm explain --config configs/dreamer_cartpole.yaml --measure 20
  lit-wm collect --env CartPole-v1 --policy random --episodes 100 --out minari:cartpole/random-v0
  lit-wm data inspect minari:mujoco/halfcheetah/expert-v0
  lit-wm fit --config FILE --print_config          every option with its value
  lit-wm fit --help                                every option with its meaning

Several --config are merged in order, the later wins; flags win over files. LITWM_DEBUG=1 shows tracebacks.
"""


def format_error(error: BaseException, limit: int = 5) -> str:
    """At most ``limit`` lines: what is wrong, where, what was expected, what to do."""
    lines = [line.rstrip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        lines = [type(error).__name__]
    if len(lines) > limit:
        lines = [*lines[: limit - 1], "... (LITWM_DEBUG=1 shows everything)"]
    return "error: " + "\n".join(lines)


def presets_table() -> str:
    """The preset rows with the official parameter counts."""
    from lit_wm import presets

    def table(rows: Any, **counts: Any) -> list[str]:
        widths = {column: max(8, len(column) + 1) for column in rows["debug"]}
        lines = [f"{'preset':<10}" + "".join(f"{k:>{w}}" for k, w in widths.items())]
        lines[0] += "".join(f"{name:>14}" for name in counts)
        for name, row in rows.items():
            cells = [f"{row[k]:>{w}}" for k, w in widths.items()]
            cells += [f"{format(c[name], ',') if name in c else '-':>14}" for c in counts.values()]
            lines.append(f"{name:<10}" + "".join(cells))
        return lines

    dreamer = table(
        presets.DREAMERV3,
        image=presets.DREAMERV3_PARAMETERS_IMAGE,
        vector=presets.DREAMERV3_PARAMETERS_VECTOR,
    )
    lines = [
        "DreamerV3: --model.preset NAME; any column can be overridden, e.g. --model.units 128",
        "",
        *dreamer,
        "",
        "TD-MPC2: --model.preset NAME; any column can be overridden, e.g. --model.mlp_dim 128",
        "",
        *table(presets.TDMPC2, **presets.TDMPC2_PARAMETERS),
        "",
        "image:  trainable parameters with a 64x64x3 image and 18 discrete actions",
        "vector: trainable parameters with 39 numbers and 6 continuous actions",
        "mt30, mt80: on the official task sets, with task embeddings of 64 numbers (mt80, 1m and 317m: 96);",
        "        latent_dim of 19m is 512 on mt30",
    ]
    return "\n".join(lines)


def _show_warning(others: Any) -> Any:
    """Our own warnings as one line without a place in the source; those of libraries as ever."""
    ours = tuple(str(Path(__file__).parents[1] / name) + os.sep for name in ("lit_wm", "datamodules"))

    def show(message: Any, category: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        if filename.startswith(ours) and category is UserWarning:
            print(f"warning: {message}", file=sys.stderr)
        else:
            others(message, category, filename, *args, **kwargs)

    return show


def run(argv: list[str]) -> int:
    """Run one command and let errors through."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    if verb == "--version":
        print(f"lit-wm {__version__}")
        return 0
    if verb == "presets":
        if rest and rest[0] not in ("-h", "--help"):
            raise ConfigError(f"'presets' takes no options, got {rest[0]!r}")
        print(presets_table())
        return 0
    if verb in TRAINING_VERBS:
        from lit_wm import training_cli

        return training_cli.main(argv)
    if verb in ("evaluate", "export"):
        from lit_wm import evaluation_cli

        return getattr(evaluation_cli, verb)(rest)
    if verb == "convert":
        from lit_wm.convert.command import convert

        return convert(rest)
    if verb == "collect":
        from lit_wm.collect_cli import collect

        return collect(rest)
    if verb == "explain":
        from lit_wm.explain import explain

        return explain(rest)
    if verb == "data":
        from lit_wm import data_cli

        return data_cli.main(rest)
    known = [
        *TRAINING_VERBS,
        "evaluate",
        "export",
        "convert",
        "explain",
        "collect",
        "data",
        "presets",
        "--help",
        "--version",
    ]
    raise ConfigError(f"unknown verb {verb!r}{nearest(verb, known)}\nVerbs: {', '.join(known)}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 after an error, 2 without a verb; ended early, 130 after
    Ctrl-C and 143 after SIGTERM, a training with its checkpoint saved."""
    if argv is None:  # a package beside one is found, as with `python -m`, but takes the place of no other
        sys.path.append(os.getcwd())
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("LITWM_DEBUG", "") not in ("", "0")
    if not debug:
        warnings.showwarning = _show_warning(warnings.showwarning)
    try:
        return run(argv)
    except Interrupted as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 128 + error.number
    except LitWMError as error:
        if debug:
            raise
        rank = os.environ.get("LOCAL_RANK", "0")
        # The first process says it in full; the others fail of the same cause as a rule.
        lines = format_error(error)
        print(lines if rank == "0" else f"process {rank}: {lines.splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lit-wm presets | head`
        sys.stderr.close()
        return 1
