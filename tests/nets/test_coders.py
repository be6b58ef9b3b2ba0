"""Encoder and decoder: layouts, orders of keys, kinds of observations, targets of the losses."""

from __future__ import annotations

import pytest
import torch

from lit_wm.errors import ConfigError
from lit_wm.functional import symlog
from lit_wm.nets.coders import Decoder, Encoder, discrete_one_hot, greedy, image_grid, module_key
from lit_wm.types import Spec, Tensors

D, SC = 16, 8


def make(specs: dict[str, Spec], **options: bool) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    encoder = Encoder(specs, depth=8, units=12, **options)
    options.pop("squash", None)
    return encoder, Decoder(specs, D, SC, depth=8, units=12, **options)


def state(*lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*lead, D, generator=generator), torch.randn(*lead, SC, generator=generator)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


# --- Images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"strided": True}, {"outer": True}])
@pytest.mark.parametrize("channels", [1, 3])
def test_rectangles_of_any_channels_come_back_in_their_shape(options: dict[str, bool], channels: int) -> None:
    encoder, decoder = make({"image": Spec("uint8", (64, 96, channels))}, **options)
    assert encoder({"image": pixels(2, 3, 64, 96, channels)}).shape == (2, 3, encoder.token_size)
    out = decoder(*state(2, 3))["image"]
    assert out.shape == (2, 3, 64, 96, channels)
    assert out.min() > 0
    assert out.max() < 1


def test_channels_first_and_last_give_the_same_tokens_and_losses() -> None:
    image = pixels(2, 3, 64, 96, 3)
    last, first = make({"x": Spec("uint8", (64, 96, 3))}), make({"x": Spec("uint8", (3, 64, 96))})
    for a, b in zip(last, first, strict=True):
        b.load_state_dict(a.state_dict())
    other = image.movedim(-1, -3).contiguous()
    torch.testing.assert_close(first[0]({"x": other}), last[0]({"x": image}))
    torch.testing.assert_close(
        first[1].losses(*state(2, 3), {"x": other}), last[1].losses(*state(2, 3), {"x": image})
    )


def test_two_images_enter_sorted_and_leave_in_the_order_of_the_environment() -> None:
    specs = {"right": Spec("uint8", (64, 64, 3)), "left": Spec("uint8", (64, 64, 1))}
    encoder, decoder = make(specs)
    with torch.no_grad():
        encoder.cnn0.weight[:, 0] = 0  # the first channel is the only one of "left"
        decoder.imgout.weight.zero_()
        decoder.imgout.bias.copy_(torch.tensor([10.0, 10.0, 10.0, -10.0]))
    obs = {"right": pixels(1, 64, 64, 3), "left": pixels(1, 64, 64, 1)}
    assert torch.equal(encoder(obs), encoder(obs | {"left": obs["left"] * 0}))
    assert not torch.equal(encoder(obs), encoder(obs | {"right": obs["right"] * 0}))
    out = decoder(*state(1))
    assert out["right"].shape == (1, 64, 64, 3)
    assert out["right"].min() > 0.99
    assert out["left"].shape == (1, 64, 64, 1)
    assert out["left"].max() < 0.01


def test_the_image_loss_is_the_squared_error_to_the_pixels_as_fractions() -> None:
    decoder = make({"x": Spec("uint8", (64, 64, 3))})[1]
    image = pixels(2, 1, 64, 64, 3)
    mean = decoder(*state(2, 1))["x"]
    want = (mean.double() - image.double() / 255).square().sum((-3, -2, -1))
    torch.testing.assert_close(
        decoder.losses(*state(2, 1), {"x": image})["x"].double(), want, rtol=1e-5, atol=1e-3
    )


def test_images_of_unequal_size_are_refused() -> None:
    specs = {"a": Spec("uint8", (64, 64, 3)), "b": Spec("uint8", (96, 96, 3))}
    with pytest.raises(ConfigError, match="must share one height and width"):
        make(specs)


@pytest.mark.parametrize("size", [(60, 64), (32, 32), (272, 64)])
def test_images_that_do_not_halve_to_3_to_16_pixels_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="multiples of 16 from 48 to 256"):
        image_grid({"x": Spec("uint8", (*size, 3))})


# --- Vectors and discrete entries ----------------------------------------------------------------

MIXED = {
    "scalar": Spec("float32", ()),
    "vector": Spec("float32", (3,)),
    "matrix": Spec("float32", (2, 2)),
    "one": Spec("int32", (), 4),
    "many": Spec("int32", (2,), 3),
}


def mixed(*lead: int) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    out = {
        k: torch.randn(*lead, *s.shape, generator=generator) * 5
        for k, s in MIXED.items()
        if not s.is_discrete
    }
    out |= {
        k: torch.randint(0, s.classes, (*lead, *s.shape), generator=generator)
        for k, s in MIXED.items()
        if s.is_discrete
    }
    return out


@pytest.mark.parametrize("key", list(MIXED))
def test_every_kind_of_entry_reaches_the_token(key: str) -> None:
    encoder, obs = make(MIXED)[0], mixed(2, 3)
    changed = (obs[key] + 1) % MIXED[key].classes if MIXED[key].is_discrete else obs[key] + 1
    assert ((encoder(obs) != encoder(obs | {key: changed})).any(-1)).all()


def test_the_vector_input_is_sorted_and_squashed() -> None:
    encoder, obs = make(MIXED)[0], mixed(2)
    flat = {
        k: (discrete_one_hot(v, MIXED[k], torch.float32) if MIXED[k].is_discrete else symlog(v)).view(2, -1)
        for k, v in obs.items()
    }
    x = torch.cat([flat[k] for k in sorted(MIXED)], -1)
    for i in range(3):
        x = getattr(encoder, f"mlp{i}norm")(getattr(encoder, f"mlp{i}")(x))
    torch.testing.assert_close(encoder(obs), x)


def test_squash_can_be_turned_off() -> None:
    specs, x = {"x": Spec("float32", (2,))}, torch.tensor([[5.0, -5.0]])
    plain, squashed = make(specs, squash=False)[0], make(specs)[0]
    torch.testing.assert_close(plain({"x": symlog(x)}), squashed({"x": x}))


def test_vector_losses_are_distances_in_symlog_space_and_cross_entropies() -> None:
    decoder, obs = make(MIXED)[1], mixed(2, 3)
    out, losses = decoder(*state(2, 3)), decoder.losses(*state(2, 3), obs)
    for k, spec in MIXED.items():
        if spec.is_discrete:
            want = torch.distributions.Categorical(logits=out[k]).log_prob(obs[k]).neg()
        else:
            want = (out[k] - symlog(obs[k])).square()
        torch.testing.assert_close(losses[k], want.reshape(2, 3, -1).sum(-1))


def test_outputs_have_the_shape_of_the_entry() -> None:
    out = greedy(make(MIXED)[1](*state(2, 3)), MIXED)
    assert {k: tuple(v.shape) for k, v in out.items()} == {k: (2, 3, *s.shape) for k, s in MIXED.items()}


def test_the_decoder_reads_the_stochastic_part_first() -> None:
    decoder = make({"x": Spec("float32", (2,))})[1]
    deter, stoch = state(4)
    with torch.no_grad():
        decoder.mlp.linear0.weight[:SC] = 0
    assert torch.equal(decoder(deter, stoch)["x"], decoder(deter, stoch * 0)["x"])
    assert not torch.equal(decoder(deter, stoch)["x"], decoder(deter * 0, stoch)["x"])


@pytest.mark.parametrize("key", ["camera/front", "robot.arm", "type", "parameters"])
def test_keys_may_be_any_words(key: str) -> None:
    encoder, decoder = make({key: Spec("float32", (2,))})
    assert encoder({key: torch.zeros(3, 2)}).shape == (3, 12)
    assert decoder(*state(3))[key].shape == (3, 2)
    assert "." not in module_key(key)


def test_images_and_vectors_together() -> None:
    specs = {"image": Spec("uint8", (64, 64, 3)), "vector": Spec("float32", (3,))}
    encoder, decoder = make(specs)
    obs = {"image": pixels(2, 3, 64, 64, 3), "vector": torch.randn(2, 3, 3)}
    token = encoder(obs)
    alone = Encoder({"vector": specs["vector"]}, 8, 12)
    alone.load_state_dict({k: v for k, v in encoder.state_dict().items() if k.startswith("mlp")})
    torch.testing.assert_close(token[..., :12], alone(obs))  # the vector part comes first
    assert decoder.losses(*state(2, 3), obs).keys() == specs.keys()


def test_in_bfloat16_losses_stay_float32() -> None:
    encoder, decoder = make({"image": Spec("uint8", (64, 64, 3)), "x": Spec("float32", (3,))})
    obs = {"image": pixels(1, 2, 64, 64, 3), "x": torch.randn(1, 2, 3)}
    assert encoder(obs, torch.bfloat16).dtype == torch.bfloat16
    losses = decoder.losses(*(v.bfloat16() for v in state(1, 2)), obs)
    assert {v.dtype for v in losses.values()} == {torch.float32}
