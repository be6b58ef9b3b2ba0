"""Layers against autograd in float64 and against the plain form of what they compute."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_wm.nets.layers import (
    MLP,
    PIECE,
    BlockLinear,
    Conv,
    Linear,
    RMSNorm,
    from_blocks,
    merge_phases,
    stacked_linear,
    to_blocks,
)


def norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    return F.silu(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-4) * scale)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])  # eps matters, does not matter
def test_fused_norm_and_silu_equal_autograd_in_float64(size: float) -> None:
    norm = RMSNorm(6)
    x, cotangent = (size * torch.randn(2, 3, 6)).requires_grad_(), torch.randn(2, 3, 6)
    with torch.no_grad():
        norm.scale.copy_(torch.randn(6))
    exact, scale = (v.detach().double().requires_grad_() for v in (x, norm.scale))
    ours, want = norm(x), norm_silu(exact, scale)
    ours.backward(cotangent)
    want.backward(cotangent.double())
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 / size)
    torch.testing.assert_close(norm.scale.grad.double(), scale.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_input_is_worked_on_in_pieces_with_the_same_result(dtype: torch.dtype) -> None:
    rows = 3 * PIECE // 64 + 5  # the last piece is a small one
    x, cotangent = torch.randn(rows, 64).to(dtype), torch.randn(rows, 64).to(dtype)

    def run(size: int) -> tuple[Tensor, Tensor, Tensor]:
        norm = RMSNorm(64)
        leaves = [part.clone().requires_grad_() for part in x.split(size)]
        out = torch.cat([norm(leaf) for leaf in leaves])
        out.backward(cotangent)
        return out, torch.cat([leaf.grad for leaf in leaves]), norm.scale.grad

    whole, parts = run(rows), run(1000)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[2], parts[2], rtol=1e-4, atol=1e-2)


def test_the_norm_is_computed_in_float32() -> None:
    """A bfloat16 mean of squares would be off by percents; only the result is rounded."""
    x = torch.randn(4, 1000).bfloat16()
    want = norm_silu(x.double(), torch.ones(1000, dtype=torch.float64))
    out = RMSNorm(1000)(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (4, 4), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phases_equal_upsampling_then_convolution(height: int, width: int, dtype: torch.dtype) -> None:
    conv = Conv(3, 2)
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, height, width, 3).to(dtype)
    large = F.interpolate(x.double().permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    want = F.conv2d(large, conv.weight.double(), conv.bias.double(), padding=2).permute(0, 2, 3, 1)
    ours = merge_phases(conv.upsampled(x))
    assert ours.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(ours.double(), want, rtol=limit, atol=limit)


def test_gradients_of_the_phases_equal_upsampling_then_convolution() -> None:
    conv, x, cotangent = Conv(3, 2), torch.randn(1, 3, 4, 3), torch.randn(1, 6, 8, 2)

    def plain(x: Tensor) -> Tensor:
        return conv(x.repeat_interleave(2, 1).repeat_interleave(2, 2))

    x.requires_grad_()
    inputs = [x, conv.weight, conv.bias]
    ours = torch.autograd.grad(merge_phases(conv.upsampled(x)), inputs, cotangent)
    want = torch.autograd.grad(plain(x), inputs, cotangent)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_phases_are_refused_for_other_kernels() -> None:
    with pytest.raises(ValueError, match="5x5"):
        Conv(3, 2, kernel=3).upsampled(torch.zeros(1, 4, 4, 3))


def test_strided_keeps_every_second_pixel_of_the_same_padding() -> None:
    """SAME with stride 2 pads one before and two after: it samples the plain convolution at odd places."""
    conv, x = Conv(3, 2), torch.randn(1, 8, 6, 3)
    torch.testing.assert_close(conv.strided(x), conv(x)[:, 1::2, 1::2], rtol=1e-4, atol=1e-5)


def test_transposed_sees_the_pixels_at_odd_places() -> None:
    conv, x = Conv(3, 2), torch.randn(1, 2, 3, 3)
    sparse = torch.zeros(1, 4, 6, 3)
    sparse[:, 1::2, 1::2] = x
    torch.testing.assert_close(conv.transposed(x), conv(sparse))


def test_block_linear_is_a_block_diagonal_matrix() -> None:
    layer = BlockLinear(6, 9, 3)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), x @ torch.block_diag(*layer.weight) + layer.bias)


def test_blocks_there_and_back() -> None:
    x = torch.randn(5, 12)
    assert torch.equal(from_blocks(to_blocks(x, 4)), x)
    assert torch.equal(to_blocks(x, 4)[1], x[:, 3:6])  # contiguous blocks


def test_block_sizes_must_divide() -> None:
    with pytest.raises(ValueError, match="divisible by blocks=4"):
        BlockLinear(6, 8, 4)


def test_stacked_layers_equal_each_alone() -> None:
    layers, x = [Linear(4, n) for n in (3, 1, 5)], torch.randn(2, 6, 4)
    for layer, out in zip(layers, stacked_linear(x, layers), strict=True):
        torch.testing.assert_close(out, layer(x))


def test_an_mlp_can_go_on_after_its_first_product() -> None:
    mlp, x = MLP(4, 6, 3), torch.randn(2, 4)
    assert torch.equal(mlp(mlp.layer(0)[0](x), start=1), mlp(x))


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(Linear(900, 300), 900), (BlockLinear(1024, 1024, 8), 1024), (Conv(64, 96), 25 * 64)],
)
def test_kernels_start_truncated_with_the_fan_of_the_whole_layer(layer: torch.nn.Module, fan_in: int) -> None:
    sigma = 1 / math.sqrt(fan_in)
    assert layer.weight.std().item() == pytest.approx(sigma, rel=0.02)
    assert layer.weight.abs().max().item() == pytest.approx(2 * 1.1368 * sigma, rel=0.02)
    assert layer.bias.count_nonzero() == 0
