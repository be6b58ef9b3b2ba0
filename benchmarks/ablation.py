"""What each optimisation of the DreamerV3 update is worth: the update with one of them taken back, in turn.

    python benchmarks/ablation.py [CASE ...] [--precision 32-true|bf16-mixed] [--repeats N]

Every plain form computes the same loss (last column: relative difference in the first update; but the samples
of torch.distributions are others). Updates with and without are timed in turn, in one process, in CPU time of
one thread; medians. Share is of the float32 matrix-product rate, as in ``benchmarks/step.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributions as td
import torch.nn.functional as F
from step import CASES, flops, make_update
from torch import Tensor
from torch.distributions import OneHotCategoricalStraightThrough as Straight

from lit_wm import dreamerv3
from lit_wm.distributions import two_hot_weights
from lit_wm.nets import coders, heads, layers, rssm
from lit_wm.nets.deferred import DeferredWeights
from lit_wm.noise import NoiseStreams


def upsample_then_convolve(self: layers.Conv, x: Tensor) -> Tensor:
    large = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    return self(large.permute(0, 2, 3, 1))


def norm_then_silu(x: Tensor, scale: Tensor) -> Tensor:
    x32 = x.float()
    normed = x32 * (torch.rsqrt(x32.square().mean(-1, keepdim=True) + layers.NORM_EPS) * scale)
    return F.silu(normed.to(x.dtype))


def core_with_repeated_input(
    self: rssm.RSSM, w: rssm.CoreWeights, deter: Tensor, stoch: Tensor, action_in: Tensor, flat: Tensor
) -> Tensor:
    """As the reference orders it: the shared input is repeated for every block."""
    x = torch.cat([self.dynin0norm(self.dynin0(flat)), self.dynin1norm(self.dynin1(stoch)), action_in], -1)
    blocks = torch.cat(
        [flat.unflatten(-1, (self.blocks, -1)), x.unsqueeze(1).expand(-1, self.blocks, -1)], -1
    )
    x = torch.einsum("ngi,gio->ngo", blocks, self.dynhid0.weight.to(x.dtype)).flatten(1)
    x = self.dynhid0norm(x + self.dynhid0.bias.to(x.dtype)).unflatten(-1, (self.blocks, -1))
    gates = torch.einsum("ngi,gio->ngo", x, self.dyngru.weight.to(x.dtype)).flatten(1)
    gates = (gates + self.dyngru.bias.to(x.dtype)).unflatten(-1, (self.blocks, -1))
    reset, cand, update = gates.transpose(0, 1).chunk(3, -1)
    update = torch.sigmoid(update - 1)
    return update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * deter


def dense_two_hot(logits: Tensor, bins: Tensor, *targets: Tensor, log_probs: Tensor | None = None) -> Tensor:
    dense = torch.zeros(())
    for below, above, w_below, w_above in (two_hot_weights(target, bins) for target in targets):
        dense = dense + F.one_hot(below, len(bins)) * w_below.unsqueeze(-1)
        dense = dense + F.one_hot(above, len(bins)) * w_above.unsqueeze(-1)
    return -(dense * torch.log_softmax(logits, -1)).sum(-1)


def torch_sample(self: heads.ActionDist, noise: Any, stream: str, t: int = 0) -> Tensor:
    dist = td.Normal(self.mean, self.std) if self.log_p is None else td.Categorical(logits=self.log_p)
    return dist.sample()


def nchw_convolution(x: Tensor, weight: Tensor, bias: Tensor, padding: int, stride: int = 1) -> Tensor:
    x = x.permute(0, 3, 1, 2).contiguous()
    y = F.conv2d(x, weight.to(x.dtype).contiguous(), bias.to(x.dtype), stride, padding)
    return y.permute(0, 2, 3, 1).contiguous()


ABLATIONS: dict[str, list[tuple[Any, str, Any]]] = {
    "deferred weight gradients": [(DeferredWeights, "hold", lambda self, weight: weight)],
    "split block GRU": [(rssm.RSSM, "_core", core_with_repeated_input)],
    "fused norm and SiLU": [(m, "_NormSiLU", SimpleNamespace(apply=norm_then_silu)) for m in (layers, rssm)],
    "batched first layers": [
        (m, "stacked_linear", lambda x, linears: [f(x) for f in linears]) for m in (heads, dreamerv3)
    ],
    "two-hot by gather": [(dreamerv3, "two_hot_loss", dense_two_hot)],
    "exponential race": [
        (rssm, "straight_through", lambda p, _, dtype: Straight(probs=p).rsample().to(dtype)),
        (heads.ActionDist, "sample", torch_sample),
        (NoiseStreams, "exponential", lambda self, name, shape, t=0: torch.empty(shape)),
    ],
    "softmax and mix in one node": [
        (m, "unimix", lambda x, mix: (1 - mix) * x.float().softmax(-1) + mix / x.shape[-1])
        for m in (rssm, dreamerv3)
    ],
    "sub-pixel convolution": [
        (layers.Conv, "upsampled", upsample_then_convolve),
        (coders, "merge_phases", lambda x: x),
    ],
    "channels-last images": [(layers, "_conv_nhwc", nchw_convolution)],
}
IMAGE_ONLY = ("sub-pixel convolution", "channels-last images")


@contextmanager
def without(name: str) -> Iterator[None]:
    """The plain form in place of one optimisation; the empty name changes nothing."""
    with ExitStack() as stack:
        for owner, attribute, plain in ABLATIONS.get(name, []):
            stack.callback(setattr, owner, attribute, vars(owner)[attribute])
            setattr(owner, attribute, plain)
        yield


def measure(case: str, precision: str, repeats: int, names: list[str]) -> None:
    """Print a row for the update as it is, then one for each optimisation taken back."""
    preset, kind = case.split("/")
    updates = {n: make_update(preset, kind, precision)[1] for n in ["", *names]}
    totals, times, products = {}, {n: [] for n in updates}, []
    for name, update in updates.items():
        with without(name):
            totals[name] = float(update())
    x = torch.randn(2048, 2048)
    for _ in range(repeats):
        for name, update in updates.items():
            begin = time.process_time()
            with without(name):
                update()
            times[name].append(time.process_time() - begin)
        begin = time.process_time()
        x @ x
        products.append(time.process_time() - begin)
    rate = flops(preset, kind) * statistics.median(products) / (2 * 2048**3)
    medians = {n: statistics.median(t) for n, t in times.items()}
    print(f"{case} {precision}\n{'without':<30}{'ms':>10}{'share':>8}{'ratio':>8}{'loss diff':>12}")
    for name, seconds in medians.items():
        ratio, difference = seconds / medians[""], abs(totals[name] / totals[""] - 1)
        print(
            f"{name or '-':<30}{1000 * seconds:>10.1f}{rate / seconds:>8.3f}{ratio:>8.3f}{difference:>12.1e}"
        )


def main() -> None:
    """Print one table per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for case in args.cases:
        image = case.endswith("image")
        measure(case, args.precision, args.repeats, [n for n in ABLATIONS if image or n not in IMAGE_ONLY])


if __name__ == "__main__":
    main()
