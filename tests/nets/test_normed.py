"""TD-MPC2's layers against torch's own composition: values, gradients, members, crops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_wm.nets.layers import PIECE
from lit_wm.nets.normed import Layer, Layers, PixelEncoder, mish, random_shift, simnorm


def shaken(layers: nn.Module) -> Any:
    """Random values everywhere: norms that start at one and zero would hide mistakes."""
    with torch.no_grad():
        for p in layers.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return layers


def composed(layer: Layer, x: Tensor, k: int | None = None, keep: Tensor | None = None) -> Tensor:
    """act(LayerNorm(dropout(W x + b))) of one member, in the dtype of x."""
    weight, bias, *norm = (p.to(x.dtype) if k is None else p[k].to(x.dtype) for p in layer.parameters())
    y = F.linear(x, weight, bias)
    y = y if keep is None else y * keep
    if not norm:
        return y
    y = F.layer_norm(y, y.shape[-1:], *norm, 1e-5)
    return F.mish(y) if layer.act == "mish" else y.unflatten(-1, (-1, layer.width)).softmax(-1).flatten(-2)


def test_mish_is_torchs_from_deep_below_zero_to_far_above() -> None:
    x = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([-1e30, 1e30, float("inf")])])
    torch.testing.assert_close(mish(x.clone()), F.mish(x.double()).float(), rtol=1e-5, atol=1e-7)
    assert mish(torch.tensor(float("nan"))).isnan()


@pytest.mark.parametrize("act", ["mish", "simnorm", None])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])  # eps matters; Mish is straight
def test_values_and_gradients_of_a_layer_equal_autograds_in_float64(act: str | None, size: float) -> None:
    layer = shaken(Layer(5, 16, act))
    with torch.no_grad():
        layer.weight.mul_(size)
    x, cotangent = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 16)
    keep = 2.0 * (torch.rand(2, 3, 16) < 0.5)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x, keep), leaves, cotangent)
    exact_layer = Layer(5, 16, act).double()
    exact_layer.load_state_dict(layer.state_dict())
    exact = x.detach().double().requires_grad_()
    value = composed(exact_layer, exact, keep=keep.double())
    wanted = torch.autograd.grad(value, [exact, *exact_layer.parameters()], cotangent.double())
    torch.testing.assert_close(layer(x, keep).double(), value, rtol=1e-5, atol=1e-5)
    for our, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(our.double(), want, rtol=1e-4, atol=2e-5 * float(want.abs().max() + 1))


def test_simnorm_is_a_softmax_of_groups_and_keeps_its_gradient() -> None:
    x = (10 * torch.randn(3, 4, 12)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    cotangent = torch.randn(3, 4, 12)
    ours, want = simnorm(x, 4), exact.view(3, 4, 3, 4).softmax(-1).view(3, 4, 12)
    ours.backward(cotangent)
    want.backward(cotangent.double())
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert simnorm(torch.full((8,), 3e38)).sum() == pytest.approx(1)
    assert simnorm(torch.randn(8).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("members", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_worked_on_in_pieces_with_the_same_result(members: int, dtype: torch.dtype) -> None:
    rows = 2 * PIECE // 64 + 7  # the last piece is a small one
    layer = shaken(Layer(4, 64, "mish", members))
    x, cotangent = torch.randn(rows, 4).to(dtype), torch.randn(*([members] * bool(members)), rows, 64)
    whole = layer(x)
    parts = torch.cat([layer(part) for part in x.split(1000)], -2)
    assert whole.dtype == dtype
    torch.testing.assert_close(whole, parts)
    grads = [torch.autograd.grad(y, layer.parameters(), cotangent.to(dtype)) for y in (whole, parts)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-3 * float(other.abs().max()))


def test_each_member_of_a_stack_is_a_network_of_its_own() -> None:
    net = shaken(Layers(4, 6, 6, 5, members=3))
    x, apart = torch.randn(7, 4), torch.randn(3, 7, 4)
    for given in (x, apart):
        out = net(given)
        grads = torch.autograd.grad(out.sum(), net.parameters())
        for k in range(3):
            y = given if given.ndim == 2 else given[k]
            for layer in net:
                y = composed(layer, y, k)
            torch.testing.assert_close(out[k], y, rtol=1e-5, atol=1e-5)
            for grad, want in zip(grads, torch.autograd.grad(y.sum(), net.parameters()), strict=True):
                torch.testing.assert_close(grad[k], want[k], rtol=1e-4, atol=1e-4)
    out = net(x)
    with torch.no_grad():  # they share nothing
        net[1].bias[1] += 1
    changed = [bool((net(x)[k] != out[k]).any()) for k in range(3)]
    assert changed == [False, True, False]


@pytest.mark.parametrize("index", [[2, 0], [4, 3], [1, 1]])
def test_chosen_members_are_those_of_the_whole(index: list[int]) -> None:
    net, x = shaken(Layers(4, 6, 6, 5, members=5)), torch.randn(7, 4, requires_grad=True)
    keep = 2.0 * (torch.rand(5, 7, 6) < 0.5)
    which, cotangent = torch.tensor(index), torch.randn(2, 7, 5)
    whole, chosen = net(x, keep)[which], net.chosen(which, x, keep[which])
    torch.testing.assert_close(chosen, whole, rtol=1e-5, atol=1e-6)
    ours, want = (torch.autograd.grad(y, x, cotangent, retain_graph=True)[0] for y in (chosen, whole))
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    chosen.sum().backward()
    assert all(p.grad is None for p in net.parameters())


def test_choosing_all_of_them_gives_all_in_some_order() -> None:
    net, x = shaken(Layers(4, 6, 5, members=2)), torch.randn(7, 4)
    values = net.chosen(torch.tensor([1, 0]), x)
    torch.testing.assert_close(values.sum(0), net(x).sum(0), rtol=1e-5, atol=1e-5)
    assert not torch.equal(values[0], values[1])


def test_every_weight_begins_with_a_deviation_of_002_and_the_last_critics_with_zero() -> None:
    net = Layers(200, 300, 250, 101, members=4, zero=True).requires_grad_(False)
    for layer in list(net)[:-1]:
        for k in range(4):
            assert float(layer.weight[k].std()) == pytest.approx(0.02, rel=0.03)
            assert abs(float(layer.weight[k].mean())) < 3e-4
        assert not torch.equal(layer.weight[0], layer.weight[1])
        assert float(layer.norm.weight.min()) == float(layer.norm.weight.max()) == 1
    assert float(net[2].weight.abs().max()) == 0
    assert all(float(layer.bias.abs().max()) == 0 for layer in net)
    assert float(Layers(200, 300, 101)[1].weight.detach().std()) == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("shape", [(2, 3, 8, 11), (5, 9, 64, 64)])
def test_a_shift_is_a_crop_of_the_image_with_repeated_borders(shape: tuple[int, ...]) -> None:
    n, _, h, w = shape
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    u = torch.rand(n, 2)
    u[0], u[1] = torch.tensor([0.0, 0.9999]), torch.tensor([3.5 / 7, 3.5 / 7])
    padded = F.pad(images.float(), (3, 3, 3, 3), mode="replicate")
    shifted = random_shift(images, u)
    for i in range(n):  # one shift for all channels
        left, top = (int(v) for v in (u[i] * 7).floor())
        assert torch.equal(shifted[i].float(), padded[i, :, top : top + h, left : left + w])
    assert torch.equal(shifted[1], images[1])
    assert shifted.dtype == torch.uint8


@pytest.mark.parametrize(("shape", "latent"), [((9, 64, 64), 64), ((3, 64, 64), 64), ((4, 84, 84), 144)])
def test_the_pixel_encoder_is_four_convolutions(shape: tuple[int, int, int], latent: int) -> None:
    net, images = PixelEncoder(shape, 4, 4), torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    u = torch.full((2, 2), 0.5)  # no shift
    out = net(images, u)
    assert (out.shape, out.dtype) == ((2, latent), torch.float32)
    h, w = PixelEncoder.feature_map(*shape[1:])
    assert 4 * h * w == latent
    x = images / 255 - 0.5
    for i, stride in enumerate((2, 2, 2, 1)):
        conv = getattr(net, f"conv{i}")
        x = F.conv2d(F.relu(x) if i else x, conv.weight, conv.bias, stride)
    torch.testing.assert_close(out, x.flatten(1).unflatten(1, (-1, 4)).softmax(-1).flatten(1))
    assert not torch.equal(net(images, torch.zeros(2, 2)), out)
