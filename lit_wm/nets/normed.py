"""Layers of TD-MPC2: linear, LayerNorm and Mish or SimNorm, single or stacked as an ensemble.

Parameters are float32 and stored as PyTorch stores them, (out, in), with an axis of members in front for an
ensemble; a layer multiplies in the dtype of its input, and normalises in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_wm.nets.layers import PIECE

NORM_EPS = 1e-5


def mish(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x tanh(ln(1 + e^x)), by one exponential: the tanh is h / (h + 1) with h = e^x + e^2x / 2."""
    e = x.clamp(max=20.0).exp_()
    h = torch.addcmul(e, e, e, value=0.5)
    torch.add(h, 1.0, out=e)
    return torch.div(h, e, out=out).mul_(x)


def _mish_slope(x: Tensor) -> Tensor:
    """Derivative of :func:`mish`: q (h + x h' q) with q = 1 / (h + 1) and h' = 2 h - e^x."""
    e = x.clamp(max=20.0).exp_()
    h = torch.addcmul(e, e, e, value=0.5)
    q = h.add(1.0).reciprocal_()
    return h.sub_(e.sub_(h, alpha=2.0).mul_(q).mul_(x)).mul_(q)


class _NormMish(torch.autograd.Function):
    """LayerNorm then Mish over the last axis, for a CPU: piece by piece, so that what passes from one to the
    other stays in its cache. Saves the input and two numbers per row, not the rest.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))
        for part, w, b, y, m, r in _pieces(x, weight, bias, out, mean, rstd):
            normed, m_, r_ = torch.native_layer_norm(part.float(), w.shape, w, b, NORM_EPS)
            if y.dtype == torch.float32:
                mish(normed, out=y)
            else:
                y.copy_(mish(normed))
            m.copy_(m_), r.copy_(r_)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad_x, grad_w, grad_b = torch.empty_like(grad), torch.zeros_like(weight), torch.zeros_like(bias)
        pieces = _pieces(x, weight, bias, grad, mean, rstd, grad_x, affine=(grad_w, grad_b))
        for part, w, b, g, m, r, gx, gw, gb in pieces:
            part = part.float()
            slope = _mish_slope(torch.native_layer_norm(part, w.shape, w, b, NORM_EPS)[0]).mul_(g)
            gx_, gw_, gb_ = torch.ops.aten.native_layer_norm_backward(
                slope, part, w.shape, m, r, w, b, (True, True, True)
            )
            gx.copy_(gx_), gw.add_(gw_), gb.add_(gb_)
        return grad_x, grad_w, grad_b


def _pieces(
    x: Tensor, weight: Tensor, bias: Tensor, *rows: Tensor, affine: tuple[Tensor, ...] = ()
) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of the rows of x (..., C) or (K, N, C), each with its weights."""
    stacked = weight.ndim > 1
    count = max(1, PIECE // x.shape[-1])
    for k in range(len(weight) if stacked else 1):
        w, b, *more = (v[k] if stacked else v for v in (weight, bias, *affine))
        flat = [(v[k] if stacked else v).reshape(-1, v.shape[-1]) for v in (x, *rows)]
        for first, *others in zip(*(v.split(count) for v in flat), strict=True):
            yield first, w, b, *others, *more


def norm_mish(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mish of LayerNorm over the last axis, computed in float32, in the dtype of x.

    Args:
        x: (..., C), or (K, N, C) for an ensemble.
        weight, bias: of the LayerNorm, (C,) or (K, C).
    """
    if x.device.type == "cpu":
        return _NormMish.apply(x, weight, bias)
    if weight.ndim == 1:  # elsewhere few kernels count
        normed = F.layer_norm(x.float(), weight.shape, weight, bias, NORM_EPS)
    else:
        normed = F.layer_norm(x.float(), weight.shape[1:], eps=NORM_EPS)
        normed = torch.addcmul(bias.unsqueeze(1), normed, weight.unsqueeze(1))
    return F.mish(normed).to(x.dtype)


class _SimNorm(torch.autograd.Function):
    """Softmax of groups. Written out: torch's own over eight entries takes ten times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int) -> Tensor:
        groups = x.reshape(*x.shape[:-1], -1, width)
        probs = (groups - groups.amax(-1, keepdim=True)).exp_()
        probs /= probs.sum(-1, keepdim=True)
        ctx.save_for_backward(probs)
        return probs.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (probs,) = ctx.saved_tensors
        grad = grad.reshape(probs.shape) * probs
        return grad.addcmul_(probs, grad.sum(-1, keepdim=True), value=-1.0).view(*probs.shape[:-2], -1), None


def simnorm(x: Tensor, width: int = 8) -> Tensor:
    """Simplicial normalisation: a softmax over each group of ``width`` entries of the last axis, float32."""
    return _SimNorm.apply(x.float(), width)


class Norm(nn.Module):
    """Weight and bias of a LayerNorm, of each member of an ensemble."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))


class Layer(nn.Module):
    """act(LayerNorm(dropout(W x + b))), or W x + b alone.

    Args:
        inputs, outputs: sizes.
        act: ``"mish"``, ``"simnorm"`` or None for a plain linear layer without a norm.
        members: K stacked layers; 0 = one without that axis.
        zero: start with zero weights.
        width: group size of SimNorm.
    """

    def __init__(
        self, inputs: int, outputs: int, act: str | None, members: int = 0, zero: bool = False, width: int = 8
    ):
        super().__init__()
        lead = (members,) if members else ()
        self.act, self.width = act, width
        self.weight = nn.Parameter(torch.zeros(*lead, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(*lead, outputs))
        self.norm = None if act is None else Norm(*lead, outputs)
        if not zero:  # the reference cuts at +-2, a hundred standard deviations: never
            nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out); of an ensemble (K, N, in), or (N, in) for all members, -> (K, N, out).

        ``keep``: factors of the dropout on W x + b, 0 or 1/(1-p).
        """
        return self.finish(self.linear(x), keep)

    def linear(self, x: Tensor) -> Tensor:
        """W x + b."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        if x.ndim == 2:
            x = x.expand(len(weight), *x.shape)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    def finish(self, y: Tensor, keep: Tensor | None = None) -> Tensor:
        """Dropout, norm and activation of W x + b; logits in float32."""
        if keep is not None:
            y = y * keep
        if self.norm is None:
            return y.float()
        if self.act == "mish":
            return norm_mish(y, self.norm.weight, self.norm.bias)
        return simnorm(
            F.layer_norm(y.float(), y.shape[-1:], self.norm.weight, self.norm.bias, NORM_EPS), self.width
        )


class Layers(nn.Sequential):
    """Layers one behind the other: Mish inside, ``act`` (or nothing) at the end.

    Args:
        sizes: of the input and of the output of each layer.
        act, members, zero, width: see :class:`Layer`; ``zero`` is of the last one.
    """

    def __init__(
        self, *sizes: int, act: str | None = None, members: int = 0, zero: bool = False, width: int = 8
    ):
        last = len(sizes) - 2
        super().__init__(
            *(
                Layer(n, m, act if i == last else "mish", members, zero and i == last, width)
                for i, (n, m) in enumerate(zip(sizes, sizes[1:], strict=False))
            )
        )

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out); ``keep`` is the dropout of the first layer."""
        return self.after_first(self.first.linear(x), keep)

    @property
    def first(self) -> Layer:
        """The first layer."""
        return cast(Layer, self[0])

    def after_first(self, y: Tensor, keep: Tensor | None = None) -> Tensor:
        """The same from the first layer's W x + b."""
        dtype = y.dtype
        for i, layer in enumerate(cast(Iterator[Layer], self)):
            y = layer.finish(y if i == 0 else layer.linear(y.to(dtype)), keep if i == 0 else None)
        return y

    def chosen(self, index: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Members ``index`` (k,) of an ensemble, whose parameters get no gradient. (N, in) -> (k, N, out)"""
        y, every = x.expand(len(index), *x.shape), len(self.first.weight) == len(index)
        for i, layer in enumerate(self):
            # If it is all of them, in any order, nothing needs to be copied.
            params = (p.detach() for p in layer.parameters())
            weight, bias, *norm = (p if every else p.index_select(0, index) for p in params)
            y = torch.baddbmm(bias.to(x.dtype).unsqueeze(1), y, weight.to(x.dtype).transpose(1, 2))
            if norm:
                y = norm_mish(y if keep is None or i else y * keep, *norm)
        return y.float()


def random_shift(images: Tensor, u: Tensor, pad: int = 3) -> Tensor:
    """Shift each image by -pad ... pad whole pixels in x and y; the border is repeated.

    Args:
        images: (N, C, H, W), any dtype.
        u: uniform noise, x and y.                                                              (N, 2)

    Source: tdmpc2 ``ShiftAug``, whose bilinear sampling at whole pixels reads one pixel too.
    """
    n, c, h, w = images.shape
    shift = (u * (2 * pad + 1)).long() - pad
    x = (torch.arange(w, device=u.device) + shift[:, :1]).clamp_(0, w - 1)  # (N, W)
    y = (torch.arange(h, device=u.device) + shift[:, 1:]).clamp_(0, h - 1)  # (N, H)
    place = (y.unsqueeze(2) * w + x.unsqueeze(1)).view(n, 1, -1).expand(n, c, -1)
    return images.flatten(2).gather(2, place).view(images.shape)


class PixelEncoder(nn.Module):
    """Random shift, 0 ... 255 to -0.5 ... 0.5, four convolutions, flatten, SimNorm.

    Args:
        shape: channels, height and width; at least 47 x 47. Any number of channels, so any frame stack.
        channels: of every convolution.
        width: group size of SimNorm.

    The latent size is what remains: channels x height x width of the last feature map, 512 for the
    reference's 64 x 64 images and 32 channels. Other sizes are a generalisation of ours.
    """

    CONVS = ((7, 2), (5, 2), (3, 2), (3, 1))

    def __init__(self, shape: tuple[int, int, int], channels: int = 32, width: int = 8):
        super().__init__()
        self.width = width
        inputs = shape[0]
        for i, (kernel, stride) in enumerate(self.CONVS):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, channels, kernel, stride))
            inputs = channels

    @classmethod
    def feature_map(cls, height: int, width: int) -> tuple[int, int]:
        """Height and width of the last feature map; not positive where the image is too small."""
        for kernel, stride in cls.CONVS:
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        return height, width

    def forward(self, images: Tensor, u: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (N, C, H, W) and the shifts' noise (N, 2) -> (N, latent) float32."""
        x = random_shift(images, u).to(dtype).div_(255.0).sub_(0.5)
        for i in range(len(self.CONVS)):
            conv: nn.Conv2d = getattr(self, f"conv{i}")
            assert conv.bias is not None
            x = F.conv2d(F.relu(x) if i else x, conv.weight.to(dtype), conv.bias.to(dtype), conv.stride)
        return simnorm(x.flatten(1), self.width)
