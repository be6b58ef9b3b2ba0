"""Layers shared by all networks, with the reference's layouts and initialisation.

Parameters are float32; a layer computes in the dtype of its input. Kernels are stored as the reference stores
them: linear (in, out), block-linear (G, in/G, out/G); convolutions are (out, in, k, k) as torch wants them.
Images travel as (N, H, W, C), so that norms run over the contiguous axis and convolutions see channels-last
memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-4


def trunc_normal_in_(weight: Tensor, fan_in: int, outscale: float = 1.0) -> Tensor:
    """Truncated normal with standard deviation sqrt(1 / fan_in), cut at two sigma, times ``outscale``."""
    std = 1.1368 * math.sqrt(1 / fan_in)
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std).mul_(outscale)


class Linear(nn.Module):
    """y = x W + b with W (in, out)."""

    def __init__(self, inputs: int, outputs: int, outscale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        with torch.no_grad():
            trunc_normal_in_(self.weight, inputs, outscale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight.to(x.dtype).t(), self.bias.to(x.dtype))


class BlockLinear(nn.Module):
    """Block-diagonal linear layer: contiguous blocks of the input, one kernel each. W (G, in/G, out/G)."""

    def __init__(self, inputs: int, outputs: int, blocks: int):
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ValueError(
                f"BlockLinear({inputs}, {outputs}): both sizes must be divisible by blocks={blocks}"
            )
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        with torch.no_grad():
            trunc_normal_in_(self.weight, inputs)  # fan-in of the whole layer, not of a block

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        y = torch.bmm(to_blocks(x, self.blocks), self.weight.to(x.dtype))
        return from_blocks(y) + self.bias.to(x.dtype)


def to_blocks(x: Tensor, blocks: int) -> Tensor:
    """(N, D) -> (G, N, D/G), contiguous: the layout in which a batched matmul runs at full speed."""
    return x.reshape(x.shape[0], blocks, -1).transpose(0, 1).contiguous()


def from_blocks(x: Tensor) -> Tensor:
    """(G, N, D/G) -> (N, D)."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


# Entries of a large input worked on at a time, so that they stay in a CPU's cache between operations.
PIECE = 2**17


class _NormSiLU(torch.autograd.Function):
    """RMSNorm then SiLU over the last axis in float32; saves the input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.numel() <= PIECE:
            out, inv = _norm_silu(x, scale)
        else:
            flat = x.reshape(-1, x.shape[-1])
            out, inv = torch.empty_like(flat), flat.new_empty(flat.shape[0], 1, dtype=torch.float32)
            for part, *targets in zip(*(_pieces(v, x.shape[-1]) for v in (flat, out, inv)), strict=True):
                for target, value in zip(targets, _norm_silu(part, scale), strict=True):
                    target.copy_(value)
            out, inv = out.view(x.shape), inv.view(*x.shape[:-1], 1)
        ctx.save_for_backward(x, inv, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, inv, scale = ctx.saved_tensors
        flat_grad, flat, flat_inv = (v.reshape(-1, v.shape[-1]) for v in (grad, x, inv))
        if x.device.type != "cpu" or x.numel() <= PIECE:
            grad_x, grad_scale = _norm_silu_backward(flat_grad, flat, flat_inv, scale)
            return grad_x.view(x.shape), grad_scale
        grad_x, grad_scale = torch.empty_like(flat), torch.zeros_like(scale)
        tensors = (flat_grad, flat, flat_inv, grad_x)
        for g, part, i, target in zip(*(_pieces(v, x.shape[-1]) for v in tensors), strict=True):
            value, partial = _norm_silu_backward(g, part, i, scale)
            target.copy_(value)
            grad_scale += partial
        return grad_x.view(x.shape), grad_scale


def _pieces(rows: Tensor, features: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, PIECE // features))


def _norm_silu(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(..., C) -> the same shape and dtype, and 1 / rms (..., 1)."""
    x32 = x.float()
    rms = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    inv = rms.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()
    return F.silu((x32 * inv).mul_(scale).to(x.dtype)), inv


def _norm_silu_backward(grad: Tensor, x: Tensor, inv: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`_norm_silu` by x (N, C) and by scale (C,)."""
    unit = x.float() * inv
    grad = torch.ops.aten.silu_backward(grad, (unit * scale).to(x.dtype)).float()
    grad_scale = (grad * unit).sum(0)
    grad = grad * scale
    dot = (grad * unit).mean(-1, keepdim=True)
    return grad.addcmul_(unit, dot, value=-1).mul_(inv).to(x.dtype), grad_scale


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis in float32, eps 1e-4; ``forward`` goes on with SiLU."""

    def __init__(self, features: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """SiLU(norm(x)), same shape and dtype."""
        return _NormSiLU.apply(x, self.scale)

    def norm(self, x: Tensor) -> Tensor:
        """The norm alone."""
        x32 = x.float()
        return (x32 * (torch.rsqrt(x32.square().mean(-1, keepdim=True) + NORM_EPS) * self.scale)).to(x.dtype)


class MLP(nn.Module):
    """``layers`` times linear, RMSNorm, SiLU."""

    def __init__(self, inputs: int, units: int, layers: int):
        super().__init__()
        self.layers = layers
        for i in range(layers):
            self.add_module(f"linear{i}", Linear(inputs if i == 0 else units, units))
            self.add_module(f"norm{i}", RMSNorm(units))

    def layer(self, i: int) -> tuple[Linear, RMSNorm]:
        """Linear and norm of layer ``i``."""
        return getattr(self, f"linear{i}"), getattr(self, f"norm{i}")

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """(..., in) -> (..., units). With ``start=1`` the input is the first linear layer's output."""
        if start:
            x = self.layer(0)[1](x)
        for i in range(start, self.layers):
            linear, norm = self.layer(i)
            x = norm(linear(x))
        return x


def stacked_linear(x: Tensor, layers: Sequence[Linear]) -> list[Tensor]:
    """Outputs of several linear layers on the same input, computed as one matrix product."""
    weight = torch.cat([m.weight for m in layers], 1).to(x.dtype)
    bias = torch.cat([m.bias for m in layers]).to(x.dtype)
    y = F.linear(x, weight.t(), bias)
    return list(y.split([m.bias.shape[0] for m in layers], -1))


class Conv(nn.Module):
    """5x5 convolution, stride 1, SAME, on (N, H, W, C)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        with torch.no_grad():
            trunc_normal_in_(self.weight, kernel * kernel * inputs)
        # On the device once and for all: copying it there in every update would synchronise with it.
        self.register_buffer("taps", torch.tensor(_PHASE_TAPS), persistent=False)

    taps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, in) -> (N, H, W, out)."""
        return _conv_nhwc(x, self.weight, self.bias, self.weight.shape[-1] // 2)

    def pooled(self, x: Tensor) -> Tensor:
        """Convolution, then 2x2 max-pooling. (N, H, W, in) -> (N, H/2, W/2, out)."""
        return F.max_pool2d(self(x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)

    def strided(self, x: Tensor) -> Tensor:
        """Convolution with stride 2, SAME: one pixel of padding before, two after. (N, H, W, in) -> (N, H/2,
        W/2, out).
        """
        return _conv_nhwc(F.pad(x, (0, 0, 1, 2, 1, 2)), self.weight, self.bias, 0, stride=2)

    def transposed(self, x: Tensor) -> Tensor:
        """Convolution of the image with zeros between its pixels, which sit at odd places. -> (N, 2H, 2W,
        out).
        """
        n, h, w, c = x.shape
        sparse = x.new_zeros(n, h, 2, w, 2, c)
        sparse[:, :, 1, :, 1] = x
        return self(sparse.view(n, 2 * h, 2 * w, c))

    def upsampled(self, x: Tensor) -> Tensor:
        """Nearest 2x upsampling, then the convolution, as the four phases of each input pixel.

        An output pixel of phase (a, b) sees only 3x3 different input pixels, each weighted by a sum of 5x5
        taps. So one 3x3 convolution with four times the channels at the low resolution gives the same result
        (up to the order of the sums) for 36 % of the arithmetic, and the upsampled image is never built.

        (N, H, W, in) -> (N, H, W, 2, 2, out); :func:`merge_phases` arranges the pixels.
        """
        k = self.weight.shape[-1]
        if k != 5:
            raise ValueError(f"upsampled() is written for 5x5 kernels, this one is {k}x{k}")
        weight = torch.einsum("aiy,oryx,bjx->aborij", self.taps, self.weight, self.taps)
        n, h, w, _ = x.shape
        y = _conv_nhwc(x, weight.flatten(0, 2), self.bias.repeat(4), 1)
        return y.reshape(n, h, w, 2, 2, -1)


# Taps of a 5-wide kernel that fall on the same source pixel after nearest 2x upsampling: [phase, 3 pixels, 5
# taps].
_PHASE_TAPS = (
    ((1.0, 1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0, 0.0), (0.0, 0.0, 0.0, 0.0, 1.0)),
    ((1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0, 1.0)),
)


def merge_phases(x: Tensor) -> Tensor:
    """(N, H, W, 2, 2, C) -> (N, 2H, 2W, C)."""
    n, h, w, _, _, c = x.shape
    return x.permute(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c)


def _conv_nhwc(x: Tensor, weight: Tensor, bias: Tensor, padding: int, stride: int = 1) -> Tensor:
    # The permuted view is channels-last memory already.
    nchw = x.permute(0, 3, 1, 2)
    weight = weight.to(x.dtype).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(nchw, weight, bias.to(x.dtype), stride, padding)
    return y.permute(0, 2, 3, 1)
