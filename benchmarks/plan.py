"""Time of TD-MPC2's update and plan, beside the same arithmetic in the order of the official code.

    python benchmarks/plan.py [--presets 1m 5m] [--threads 1 2] [--repeats N] [--out FILE]

An update is of 256 windows of 3 steps, a plan of 512 samples in 6 iterations, both of a 39-d observation
and 6 actions, on random data in memory. `plain` is ``plain_tdmpc2.py``: before timing it must give the same
losses and values as the package on shared weights, without dropout. Both, bfloat16 and a 2048-cube float32
product (the peak) are timed in turn, in one process; a ratio is the median over the turns of the two
neighbouring times. GFLOP are those of the official algorithm by formula, whatever the code executes: `plain`
executes them all, the package leaves out critics that were not drawn. Times are process CPU time with one
thread, wall time otherwise.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_tdmpc2 import PlainTDMPC2
from step import optimise, provenance, spaces, tdmpc2_optimizers
from torch import Tensor

from lit_wm.noise import NoiseStreams
from lit_wm.presets import tdmpc2_sizes
from lit_wm.tdmpc2 import TDMPC2
from lit_wm.types import Batch

BATCH, HORIZON, ITERATIONS, SAMPLES, PROPOSED = 256, 3, 6, 512, 24
COLUMNS = ("preset", "threads", "job", "code", "GFLOP", "ms_median", "ms_best", "GFLOP/s", "share",
           "times_plain", "deviation")  # fmt: skip


def flops(preset: str) -> dict[str, float]:
    """Arithmetic of an update and of one environment's plan, 2 per multiply-add, linear layers only."""
    s = tdmpc2_sizes(preset, None)
    e, M, L, K = (s[k] for k in ("enc_dim", "mlp_dim", "latent_dim", "num_q"))
    B, H, A, seen = BATCH, HORIZON, 6, 39
    hidden = max(s["num_enc_layers"] - 1, 1)
    E, body = seen * e + (hidden - 1) * e * e + e * L, (L + A) * M + M * M
    D, R, Q, Pi = body + M * L, body + M * 101, body + M * 101, L * M + M * M + M * 2 * A
    update = 2 * H * E + 6 * E + 2 * H * Pi + 2 * H * K * Q + 6 * H * (D + R + K * Q)
    update += 6 * (H + 1) * Pi + 4 * (H + 1) * K * Q
    plan = ITERATIONS * SAMPLES * (2 * H * (R + D) + 2 * Pi + 2 * K * Q)
    return {"update": B * update, "plan": plan + PROPOSED * (2 * H * Pi + 2 * (H - 1) * D) + 2 * E}


class Ours:
    """The package's update and plan, as the module and the collector call them."""

    def __init__(self, preset: str):
        torch.manual_seed(0)
        self.model = TDMPC2(spaces("vector"), **tdmpc2_sizes(preset, None), dropout=0.0, discount=0.99)
        for net in (self.model.reward, self.model.critic, self.model.target_critic):  # zero at the start
            torch.nn.init.normal_(net[-1].weight, std=0.05)
        self.optimizers = tdmpc2_optimizers(self.model)

    def update(self, batch: Batch, noise: NoiseStreams) -> dict[str, Tensor]:
        """One gradient step; its losses."""
        out = self.model.model_loss(batch, noise)
        optimise(out.total, self.optimizers[0])
        policy, _ = self.model.policy_loss(out.zs, None, noise)
        optimise(policy, self.optimizers[1])
        self.model.update_target()
        return {k: v.detach() for k, v in out.losses.items()} | {"policy": policy.detach()}

    @torch.inference_mode()
    def plan(
        self, obs: Tensor, noise: NoiseStreams, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """First step of an episode: the action (N, A) and the last values (N, S)."""
        model, first = self.model, torch.ones(len(obs), dtype=torch.bool)
        model.compute_dtype = dtype
        assert model.planner is not None
        plan = model.planner.plan(model, model.encode({"obs": obs}, noise=noise), None, first, False, noise)
        model.compute_dtype = torch.float32
        return plan.action, plan.trace[-1]["values"]

    @torch.inference_mode()
    def first_values(self, obs: Tensor, actions: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of given actions: what a lower precision alone changes, before another elite wins."""
        self.model.compute_dtype = dtype
        values = self.model.value(self.model.encode({"obs": obs}), actions, NoiseStreams())
        self.model.compute_dtype = torch.float32
        return values


def agree(name: str, ours: Tensor, plain: Tensor, tolerance: float) -> float:
    """Largest deviation, relative to the largest value; refuses to time different arithmetic."""
    deviation = ((ours - plain).abs().max() / plain.abs().max()).item()
    assert deviation <= tolerance, f"{name} differs from the plain form by {deviation:.1e}"
    return deviation


def measure(preset: str, threads: int, repeats: int, environments: list[int]) -> list[dict[str, Any]]:
    """All rows of one preset."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    ours = Ours(preset)
    plain = PlainTDMPC2(ours.model.state_dict(), ours.model.discount.item(), dropout=0.0)
    noise, generator = NoiseStreams(), torch.Generator().manual_seed(0)
    no = torch.zeros(BATCH, HORIZON + 1, dtype=torch.bool)
    obs = torch.randn(BATCH, HORIZON + 1, 39, generator=generator)
    action = torch.randn(BATCH, HORIZON + 1, 6, generator=generator).tanh()
    reward = torch.randn(BATCH, HORIZON + 1, generator=generator)
    batch = Batch({"obs": obs}, {"action": action}, reward, no, no, no)
    moved = obs.transpose(0, 1), action[:, 1:].transpose(0, 1), reward[:, 1:].T.unsqueeze(-1)

    # The same numbers, before anything is timed.
    some, deviation = obs[:4, 0], {}
    a, v = ours.plan(some, NoiseStreams())
    plain_a, plain_v = plain.plan(some, NoiseStreams())
    agree("action", a, plain_a, 1e-3)  # a rounding of values can draw another elite; then values tell
    deviation["plan"] = agree("value", v, plain_v, 1e-4)
    one, two = NoiseStreams(), NoiseStreams()
    for _ in range(3):
        theirs = plain.update(*moved, two)
        both = [(k, loss, theirs[k]) for k, loss in ours.update(batch, one).items()]
        deviation["update"] = max(agree(k, x, y, 1e-4) for k, x, y in both)
    candidates = torch.randn(4, SAMPLES, HORIZON, 6, generator=generator).clamp(-1, 1)
    full, half = (ours.first_values(some, candidates, d) for d in (torch.float32, torch.bfloat16))
    bf16 = {"value": ((half - full).abs().max() / full.abs().max()).item()}
    bf16["action"] = (
        (ours.plan(some, NoiseStreams(), torch.bfloat16)[0] - ours.plan(some, NoiseStreams())[0])
        .abs()
        .max()
        .item()
    )
    ours.model.dropout = plain.dropout = 0.01

    def half_update() -> None:
        ours.model.compute_dtype = torch.bfloat16
        ours.update(batch, noise)
        ours.model.compute_dtype = torch.float32

    jobs: dict[tuple[str, str], Callable[[], Any]] = {
        ("update", "lit_wm"): lambda: ours.update(batch, noise),
        ("update", "plain"): lambda: plain.update(*moved, noise),
        ("update", "bfloat16"): half_update,
    }
    for n in environments:
        x = obs[:n, 0]
        jobs[f"plan {n}", "lit_wm"] = lambda x=x: ours.plan(x, noise)
        jobs[f"plan {n}", "plain"] = lambda x=x: plain.plan(x, noise)
        jobs[f"plan {n}", "bfloat16"] = lambda x=x: ours.plan(x, noise, torch.bfloat16)
    x = torch.randn(2048, 2048, generator=generator)
    jobs["peak", ""] = lambda: x @ x
    times: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    for i in range(repeats + 1):
        for key, job in jobs.items():
            n = int(key[0].partition(" ")[2] or 1)
            if n > 1 and i > max(2, repeats // n):  # long ones less often; each once unmeasured
                continue
            begin = clock()
            job()
            if i:
                times[key].append(1e3 * (clock() - begin))
    peak = 2 * 2048**3 / statistics.median(times["peak", ""]) / 1e6
    work, rows = flops(preset), []
    for (name, code), spent in times.items():
        kind, _, n = name.partition(" ")
        if kind == "peak":
            continue
        gflop, median = work[kind] * int(n or 1) / 1e9, statistics.median(spent)
        pairs = zip(times[name, "plain"], spent, strict=True)
        off = {"lit_wm": f"{deviation[kind]:.0e}", "plain": ""}
        off["bfloat16"] = f"value {bf16['value']:.0e} action {bf16['action']:.0e}" if n else ""
        rows.append({
            "preset": preset, "threads": threads, "job": name, "code": code, "GFLOP": round(gflop, 1),
            "ms_median": round(median, 1), "ms_best": round(min(spent), 1), "samples": len(spent),
            "GFLOP/s": round(1e3 * gflop / median, 1), "peak_GFLOP/s": round(peak, 1),
            "share": round(1e3 * gflop / median / peak, 2),
            "times_plain": round(statistics.median(p / s for p, s in pairs), 2),
            "times_one_env": round(median / statistics.median(times["plan 1", code]), 1) if n else None,
            "deviation": off[code],
            "peak_rss_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        })  # fmt: skip
    return rows


def main() -> None:
    """Print a table in Markdown, and append its rows with commit, versions and machine to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["1m", "5m"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--environments", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--note", default="", help="what was changed since the last rows")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    columns = (*COLUMNS, "times_one_env")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for threads in args.threads:
        for preset in args.presets:
            for row in measure(preset, threads, args.repeats, sorted({1, *args.environments})):
                print(
                    "| " + " | ".join("" if row[c] is None else str(row[c]) for c in columns) + " |",
                    flush=True,
                )
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(row | provenance() | {"note": args.note}) + "\n")


if __name__ == "__main__":
    main()
