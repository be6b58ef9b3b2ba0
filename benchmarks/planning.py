"""Return and latency of every planner on every model.

    python benchmarks/planning.py --ckpt dreamer-a.ckpt tdmpc2-a.ckpt dreamer-b.ckpt tdmpc2-b.ckpt
        [--episodes 20] [--planners policy mppi ...] [--options '{mppi: {num_samples: 256}}']
        [--horizon 3] [--max-ms 50] [--device cpu]

writes benchmarks/results/planning.md, after every row. Each checkpoint plays in the environment that it was
trained in, one environment at a time, the same episodes with every planner: the seeds are those of
``lit-wm evaluate``. A planner has the checkpoint's options if it is the checkpoint's own, else its defaults,
--options over both. Latency is the time of an act: filtering the observation, planning, and bringing the
action to the host; process CPU time with one thread on a CPU, wall time otherwise; the first three acts are
not counted. The interval is a bootstrap over episodes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from step import provenance

from lit_wm.callbacks.evaluate import run_episodes
from lit_wm.envs import make_vector_env
from lit_wm.evaluation_cli import load_module
from lit_wm.noise import NoiseStreams, stream_seed
from lit_wm.planners import PLANNERS

OUT = Path(__file__).parent / "results" / "planning.md"
COLUMNS = ("environment", "model", "updates", "planner", "return", "95 % interval", "episodes", "ms per act",
           "95th percentile", "options")  # fmt: skip
COLD = 3


def alone(args: argparse.Namespace) -> bool:
    """Whether the processor's time of this process is the time that an act takes."""
    return args.device == "cpu" and torch.get_num_threads() == 1


def play(path: Path, name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """The row of one checkpoint and planner; None where there can be none."""
    if name == "gradient" and load_module(path, args.device)[0].model.discrete:
        return None
    module, about = load_module(path, args.device, name)
    model, hp = module.model, dict(module.hparams)
    options = (hp.get("planner_options") or {}) if name == hp["planner"] else {}
    given = {"horizon": args.horizon} if args.horizon else {}
    model.planner = model.planner_of(name, options | given | args.options.get(name, {}))
    env = make_vector_env(about["env"], 1, [0], **(about["env_options"] or {}))
    noise, times = NoiseStreams(args.seed, 0, args.device), []
    clock = time.process_time if alone(args) else time.perf_counter

    @torch.inference_mode()
    def timed(obs: Any, state: Any, is_first: Any) -> Any:
        begin = clock()
        action, state = model.act(obs, state, is_first, "eval", noise, max_ms=args.max_ms)
        action = {k: v.cpu() for k, v in action.items()}
        times.append(1e3 * (clock() - begin))
        return action, state

    seed = stream_seed(args.seed, 0, "evaluate") % 2**30
    try:
        played = run_episodes(
            timed, env, args.episodes, seed, device=args.device, max_steps=args.max_episode_steps
        )
    finally:
        env.close()
    score, warm = played.summary(""), np.array(times[COLD:] or times)
    interval = "{return_low:.4g} to {return_high:.4g}".format(**score) if "return_low" in score else ""
    planner = "" if model.planner is None else repr(model.planner).partition("(")[2].removesuffix(")")
    return dict(zip(COLUMNS, (
        about["env"], type(module).__name__.removesuffix("Module"), f"{about['updates']:,}", name,
        f"{score['return']:.4g}", interval, len(played.returns), f"{np.median(warm):.1f}",
        f"{np.quantile(warm, 0.95):.1f}", planner,
    ), strict=True))  # fmt: skip


def main() -> None:
    """Print the table as it grows, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", nargs="+", required=True, type=Path)
    parser.add_argument("--planners", nargs="+", default=["policy", *PLANNERS])
    parser.add_argument("--options", type=yaml.safe_load, default={}, metavar="{PLANNER: {K: V}}")
    parser.add_argument("--horizon", type=int, default=None, help="of all planners")
    parser.add_argument("--max-ms", type=float, default=None, help="time for planning")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--max-episode-steps", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    head = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"
    print(head, flush=True)
    lines, notes = [], []
    about = provenance()
    told = ", ".join(f"{k} {about[k]}" for k in ("commit", "python", "torch", "cpu", "cores", "load"))
    budget = "" if args.max_ms is None else f", {args.max_ms:g} ms for planning"
    title = f"# Return and latency of planners\n\n`benchmarks/planning.py`, {args.device}, "
    title += f"{torch.get_num_threads()} threads, seed {args.seed}{budget}, "
    title += f"{'processor' if alone(args) else 'wall'} time: {told}.\n\n{head}\n"
    for path in args.ckpt:
        for name in args.planners:
            row = play(path, name, args)
            if row is None:
                notes.append(f"{path.name}: `gradient` has no gradient of a choice.")
                print(notes[-1], flush=True)
            else:
                lines.append("| " + " | ".join(str(row[c]) for c in COLUMNS) + " |")
                print(lines[-1], flush=True)
            args.out.write_text(title + "\n".join(lines + [""] * bool(notes) + notes) + "\n")


if __name__ == "__main__":
    main()
