"""Time of one update of DreamerV3, and its share of this machine's matrix-product rate.

    python benchmarks/step.py [CASE ...] [--precision 32-true|bf16-mixed] [--threads N] [--repeats N] [--out
    FILE]

Cases are PRESET/KIND, e.g. size12m/vector; default: size1m/vector size12m/vector size12m/image. A batch is 16
x 64 steps of random data, already in memory; an update is loss, backward, clipping, three optimizers and the
slow critic. GFLOP are those of the algorithm by formula (matrix products and convolutions, 2 per
multiply-add; the derivation is below), whatever the code executes. The peak is a 2048-cube float32 product
timed between the updates, in this process. Times are process CPU time with one thread, wall time otherwise;
medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lit_wm.dreamerv3 import DreamerV3
from lit_wm.noise import NoiseStreams
from lit_wm.optim import LaProp
from lit_wm.presets import dreamerv3_sizes
from lit_wm.tdmpc2 import TDMPC2
from lit_wm.types import Batch, Spaces, Spec

CASES = ("size1m/vector", "size12m/vector", "size12m/image")
BATCH, LENGTH = 16, 64


def spaces(kind: str) -> Spaces:
    """One 39-d vector with 6 continuous actions, or a 64x64 colour image with 18 discrete ones."""
    if kind == "vector":
        return Spaces({"obs": Spec("float32", (39,))}, {"action": Spec("float32", (6,))})
    return Spaces({"obs": Spec("uint8", (64, 64, 3))}, {"action": Spec("int32", (), 18)})


def flops(preset: str, kind: str, horizon: int = 15, rows: int = BATCH * LENGTH) -> float:
    """Arithmetic of one update: backward twice forward for what is trained, roll-out without backward."""
    s = dreamerv3_sizes(preset)
    D, h, S, C, d, u, g = (s[k] for k in ("deter", "hidden", "stoch", "classes", "depth", "units", "blocks"))
    SC, F, V = S * C, D + S * C, 39
    A, out = (6, 2 * u * 6) if kind == "vector" else (18, u * 18)
    E = u if kind == "vector" else 64 * d
    core = h * (D + SC + A) + D * (D // g + 3 * h) + 3 * D * D // g
    prior, post = D * h + h * h + h * SC, (D + E) * h + h * SC
    rew, con, pol, val = F * u + 255 * u, F * u + u, F * u + 2 * u * u + out, F * u + 2 * u * u + 255 * u
    if kind == "vector":
        enc, dec, enc0 = V * u + 2 * u * u, F * u + 2 * u * u + u * V, V * u
    else:
        enc0 = 25 * 64**2 * 3 * 2 * d
        enc = enc0 + 25 * (32**2 * 6 + 16**2 * 12 + 8**2 * 16) * d * d
        dec = 64 * d * D // g + 2 * u * SC + 128 * u * d
        dec += 25 * (8**2 * 16 * d * d + 16**2 * 12 * d * d + 32**2 * 6 * d * d + 64**2 * 6 * d)
    world = 3 * (enc + core + post + prior + dec + rew + con) - enc0 - h * A + 4 * val
    roll = horizon * (core + prior + pol) + pol
    imagined = (horizon + 1) * (rew + con + val) + (horizon + 1) * (3 * (pol + val) - 2 * F * u)
    return 2.0 * rows * (world + roll + imagined)


def make_update(preset: str, kind: str, precision: str) -> tuple[DreamerV3, Callable[[], torch.Tensor]]:
    """A model and its update on fixed random data; an update returns its total loss."""
    torch.manual_seed(0)
    model = DreamerV3(spaces(kind), **dreamerv3_sizes(preset))
    model.compute_dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    B, T = BATCH, LENGTH
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, 0] = True
    if kind == "vector":
        obs, action = torch.randn(B, T, 39), torch.randn(B, T, 6)
    else:
        obs = torch.randint(0, 256, (B, T, 64, 64, 3), dtype=torch.uint8)
        action = torch.randint(0, 18, (B, T))
    batch = Batch(
        {"obs": obs},
        {"action": action},
        torch.randn(B, T),
        first,
        torch.zeros_like(first),
        torch.zeros_like(first),
    )
    optimizers = [LaProp(model.group(name)) for name in ("world_model", "actor", "critic")]
    noise = NoiseStreams()

    def update() -> torch.Tensor:
        total = model.loss(batch, model.initial(B), noise).total
        total.backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        model.update_slow_critic()
        return total.detach()

    return model, update


def tdmpc2_optimizers(model: TDMPC2) -> list[torch.optim.Optimizer]:
    """Those of ``TDMPC2Module``, for a model without a Trainer: of the model and of the policy."""
    encoder = list(model.encoder.parameters())
    rest = [p for p in model.group("model") if all(p is not q for q in encoder)]
    groups = [{"params": encoder, "lr": 9e-5}, {"params": rest}]
    policy = torch.optim.Adam(model.group("policy"), lr=3e-4, eps=1e-5, fused=True)
    return [torch.optim.Adam(groups, lr=3e-4, fused=True), policy]


def optimise(loss: torch.Tensor, opt: torch.optim.Optimizer, clip: float = 20.0) -> None:
    """Backward, clipping and step, as ``WorldModelModule.optimise``."""
    loss.backward()
    grads = [p.grad for g in opt.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(grads)).square().sum().sqrt()
    torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0))
    opt.step()
    opt.zero_grad(set_to_none=True)


def measure(case: str, precision: str, threads: int, repeats: int) -> dict[str, object]:
    """Median time of an update and of a 2048-cube product, taken in turn."""
    preset, kind = case.split("/")
    clock = time.process_time if threads == 1 else time.perf_counter
    model, update = make_update(preset, kind, precision)
    x = torch.randn(2048, 2048)
    update(), x @ x
    steps, products = [], []
    for _ in range(repeats):
        begin = clock()
        update()
        steps.append(clock() - begin)
        begin = clock()
        for _ in range(3):
            x @ x
        products.append((clock() - begin) / 3)
    gflop, seconds = flops(preset, kind) / 1e9, statistics.median(steps)
    peak = 2 * 2048**3 / statistics.median(products) / 1e9
    return {
        "case": case,
        "precision": precision,
        "threads": threads,
        "parameters": sum(
            p.numel() for name in ("world_model", "actor", "critic") for p in model.group(name)
        ),
        "GFLOP": round(gflop, 1),
        "ms_median": round(1000 * seconds, 1),
        "ms_min": round(1000 * min(steps), 1),
        "ms_max": round(1000 * max(steps), 1),
        "GFLOP/s": round(gflop / seconds, 1),
        "peak_GFLOP/s": round(peak, 1),
        "share": round(gflop / seconds / peak, 3),
        "peak_rss_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def provenance() -> dict[str, object]:
    """What a figure needs to be repeated: commit, versions, machine and how busy it was."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "bf16_instructions": any("avx512_bf16" in line for line in lines),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Print the table, and append it with commit, versions and machine to a JSON-lines file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", default="", help="what was changed since the last line")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = (
        "case",
        "precision",
        "threads",
        "GFLOP",
        "ms_median",
        "ms_min",
        "ms_max",
        "GFLOP/s",
        "peak_GFLOP/s",
        "share",
        "peak_rss_MB",
    )
    print("  ".join(f"{c:>13}" for c in columns))
    for case in args.cases:
        row = measure(case, args.precision, args.threads, args.repeats)
        print("  ".join(f"{row[c]!s:>13}" for c in columns), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row | provenance() | {"note": args.note}) + "\n")


if __name__ == "__main__":
    main()
