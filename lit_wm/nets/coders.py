"""Encoder and decoder for any mix of images, vectors and discrete observations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_wm.errors import ConfigError
from lit_wm.functional import one_hot, symlog
from lit_wm.nets.layers import MLP, BlockLinear, Conv, Linear, RMSNorm, merge_phases
from lit_wm.types import Spec, Tensors

MULTS = (2, 3, 4, 4)  # channels of the four image stages, in units of ``depth``


def module_key(key: str) -> str:
    """A name that a module dict accepts for any observation or action key."""
    return "@" + key.replace(".", "~")


def image_grid(specs: dict[str, Spec], outer: bool = False) -> tuple[int, int] | None:
    """Height and width of the innermost feature map, None without images.

    Raises:
        ConfigError: if sizes differ or do not fit the halvings (four, three with ``outer``) down to 3 ... 16
            pixels.
    """
    sizes = {k: s.hwc[:2] for k, s in specs.items() if s.is_image}
    if not sizes:
        return None
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"image observations must share one height and width, got {sizes}; resize them in the environment"
        )
    (height, width) = next(iter(sizes.values()))
    stride = 2 ** (len(MULTS) - outer)
    if any(n % stride or not 3 <= n // stride <= 16 for n in (height, width)):
        raise ConfigError(
            f"image observations are {height}x{width}; height and width must be multiples of {stride} from "
            f"{3 * stride} to {16 * stride}. Resize them, e.g. to 64x64 (data.env_options.size: 64)"
        )
    return height // stride, width // stride


def to_nhwc(image: Tensor, spec: Spec) -> Tensor:
    """(..., H, W, C) or (..., C, H, W) as stored -> (N, H, W, C) without a copy."""
    flat = image.reshape(-1, *spec.shape)
    return flat.permute(0, 2, 3, 1) if spec.channels_first else flat


def discrete_one_hot(value: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    """Class indices (..., *shape) as flat one-hot vectors (..., size)."""
    return one_hot(value, spec.classes or 0, dtype).flatten(-len(spec.shape) - 1)


class Encoder(nn.Module):
    """Observations -> token (..., E): concat(vector part, image part).

    Args:
        specs: observation entries by key.
        depth: channels of the image stages in units of (2, 3, 4, 4).
        units: width of the vector part.
        strided: halve images by strided convolutions instead of max-pooling.
        outer: the first stage keeps the resolution.
        squash: symlog of the vectors.
        layers: of the vector part.
    """

    def __init__(
        self,
        specs: dict[str, Spec],
        depth: int,
        units: int,
        strided: bool = False,
        outer: bool = False,
        squash: bool = True,
        layers: int = 3,
    ):
        super().__init__()
        self.specs, self.strided, self.outer, self.squash = specs, strided, outer, squash
        self.layers = layers
        self.vector_keys = sorted(k for k, s in specs.items() if not s.is_image)
        self.image_keys = sorted(k for k, s in specs.items() if s.is_image)
        grid = image_grid(specs, outer)
        self.token_size = 0
        if self.vector_keys:
            inputs = sum(specs[k].size for k in self.vector_keys)
            for i in range(layers):
                self.add_module(f"mlp{i}", Linear(inputs if i == 0 else units, units))
                self.add_module(f"mlp{i}norm", RMSNorm(units))
            self.token_size += units
        if grid:
            channels = sum(specs[k].hwc[2] for k in self.image_keys)
            for i, mult in enumerate(MULTS):
                self.add_module(f"cnn{i}", Conv(channels, depth * mult))
                self.add_module(f"cnn{i}norm", RMSNorm(depth * mult))
                channels = depth * mult
            self.token_size += channels * grid[0] * grid[1]

    def forward(self, obs: Tensors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Observations of one common leading shape (...) -> (..., E) in ``dtype``."""
        key = next(iter(self.specs))
        lead = obs[key].shape[: obs[key].ndim - len(self.specs[key].shape)]
        parts = []
        if self.vector_keys:
            x = torch.cat([self._vector(obs[k], self.specs[k]).view(*lead, -1) for k in self.vector_keys], -1)
            x = x.to(dtype)
            for i in range(self.layers):
                x = getattr(self, f"mlp{i}norm")(getattr(self, f"mlp{i}")(x))
            parts.append(x)
        if self.image_keys:
            images = [to_nhwc(obs[k], self.specs[k]) for k in self.image_keys]
            x = (images[0] if len(images) == 1 else torch.cat(images, -1)).to(dtype).div(255).sub(0.5)
            for i in range(len(MULTS)):
                conv = getattr(self, f"cnn{i}")
                halve = conv if self.outer and i == 0 else conv.strided if self.strided else conv.pooled
                x = getattr(self, f"cnn{i}norm")(halve(x))
            parts.append(x.reshape(*lead, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _vector(self, value: Tensor, spec: Spec) -> Tensor:
        if spec.is_discrete:
            return discrete_one_hot(value, spec, torch.float32)
        return symlog(value.float()) if self.squash else value.float()


class Decoder(nn.Module):
    """Latent state -> means (or logits) of all observations.

    Args:
        specs: observation entries by key, in the order of the environment.
        deter, stoch: sizes D and S*C of the state.
        depth, units: as in the encoder.
        strided, outer: as in the encoder, mirrored.
        bspace: blocks of the first spatial layer.
        layers: of the vector part.
    """

    def __init__(
        self,
        specs: dict[str, Spec],
        deter: int,
        stoch: int,
        depth: int,
        units: int,
        strided: bool = False,
        outer: bool = False,
        bspace: int = 8,
        layers: int = 3,
    ):
        super().__init__()
        self.specs, self.depth, self.strided, self.outer, self.bspace = specs, depth, strided, outer, bspace
        self.vector_keys = [k for k, s in specs.items() if not s.is_image]
        self.image_keys = [k for k, s in specs.items() if s.is_image]
        grid = image_grid(specs, outer)
        if self.vector_keys:
            self.mlp = MLP(stoch + deter, units, layers)
            self.vec = nn.ModuleDict()
            for k in self.vector_keys:
                name = "logits" if specs[k].is_discrete else "pred"
                self.vec[module_key(k)] = nn.ModuleDict({name: Linear(units, specs[k].size)})
        if grid:
            self.minres = grid
            channels = depth * MULTS[-1]
            flat = self.minres[0] * self.minres[1] * channels
            self.sp0 = BlockLinear(deter, flat, bspace)
            self.sp1, self.sp1norm = Linear(stoch, 2 * units), RMSNorm(2 * units)
            self.sp2 = Linear(2 * units, flat)
            self.spnorm = RMSNorm(channels)
            for i in reversed(range(len(MULTS) - 1)):
                self.add_module(f"conv{i}", Conv(channels, depth * MULTS[i]))
                self.add_module(f"conv{i}norm", RMSNorm(depth * MULTS[i]))
                channels = depth * MULTS[i]
            self.imgout = Conv(channels, sum(specs[k].hwc[2] for k in self.image_keys))

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensors:
        """(..., D), (..., S*C) -> by key: symlog-space mean of a vector, logits of a discrete entry, (..., H,
        W, C) mean of an image in 0 ... 1 whatever its stored layout.
        """
        lead = deter.shape[:-1]
        out: Tensors = {}
        if self.vector_keys:
            x = self.mlp(torch.cat([stoch, deter], -1))
            for k in self.vector_keys:
                spec = self.specs[k]
                layer = self.vec[module_key(k)]["logits" if spec.is_discrete else "pred"]  # type: ignore[index]
                shape = (*spec.shape, spec.classes) if spec.is_discrete else spec.shape
                out[k] = layer(x).float().view(*lead, *shape)
        if self.image_keys:
            image = self._image(deter.flatten(0, -2), stoch.flatten(0, -2))
            image = image.view(*lead, *image.shape[1:])
            channels = [self.specs[k].hwc[2] for k in self.image_keys]
            out |= dict(zip(self.image_keys, image.split(channels, -1), strict=True))
        return out

    def losses(self, deter: Tensor, stoch: Tensor, obs: Tensors, own: Tensors | None = None) -> Tensors:
        """Reconstruction losses by key, in float32. (B, T, D), (B, T, S*C), (B, T, ...) -> (B, T) each; of
        vectors those entries alone that ``own`` marks by 1.
        """
        lead = deter.shape[:-1]
        losses: Tensors = {}
        mean = self(deter, stoch)
        for k, spec in self.specs.items():
            if spec.is_image:
                target = to_nhwc(obs[k], spec).float() / 255
                loss = (mean[k].float().reshape(target.shape) - target).square().sum((1, 2, 3)).view(lead)
            elif spec.is_discrete:
                logits, target = mean[k], obs[k].long()
                loss = -torch.log_softmax(logits, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
                loss = loss.reshape(*lead, -1).sum(-1)
            else:
                missed = (mean[k] - symlog(obs[k].float())).square()
                loss = (missed * own[k] if own and k in own else missed).reshape(*lead, -1).sum(-1)
            losses[k] = loss
        return losses

    def _image(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """(N, D), (N, S*C) -> (N, H, W, C) in 0 ... 1."""
        (h, w), g, channels = self.minres, self.bspace, self.depth * MULTS[-1]
        # Each block of the deterministic state owns a slice of the channels.
        y0 = (
            self.sp0(deter)
            .view(-1, g, h, w, channels // g)
            .permute(0, 2, 3, 1, 4)
            .reshape(-1, h, w, channels)
        )
        y1 = self.sp2(self.sp1norm(self.sp1(stoch))).view(-1, h, w, channels)
        x = self.spnorm(y0 + y1)
        for i in reversed(range(len(MULTS) - 1)):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"conv{i}norm")
            # The norm is over channels, so it may run before the phases of the upsampling are put in place.
            x = norm(conv.transposed(x)) if self.strided else merge_phases(norm(conv.upsampled(x)))
        if self.outer:
            return torch.sigmoid(self.imgout(x))
        if self.strided:
            return torch.sigmoid(self.imgout.transposed(x))
        return merge_phases(torch.sigmoid(self.imgout.upsampled(x)))


def greedy(out: Tensors, specs: dict[str, Spec]) -> Tensors:
    """Decoder outputs with the logits of discrete entries replaced by the most likely class."""
    return {k: v.argmax(-1) if specs[k].is_discrete else v for k, v in out.items()}
