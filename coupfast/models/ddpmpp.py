"""The DDPM++ noise-prediction network of the continuous VP-SDE, under its public parameter names.

    eps_hat = DDPMpp(x_k, 999 t),      score = -eps_hat / sigma(t)

A U-Net of BigGAN-style residual blocks without resampling filters, every residual sum divided by sqrt(2). The default
configuration is `cifar10_ddpmpp_deep_continuous`: 106,632,579 parameters in 956 tensors. The labels reach the network
only through one vector per residual block, `Dense_0(SiLU(temb))`; `time_projections` computes them, `denoise` is the
rest. Engines know nothing of that: they find in a trace of any network what its labels alone decide.

Here are also the names that it is loaded by, how its weight files are recognised (by the names and shapes of its tensors, from
which all follows but the size of the images, or as a score_sde checkpoint, whose averaged weights are a list without names),
and its random weights.

Source: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", arXiv:2011.13456.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupfast.models.checkpoints import CheckpointError, check_tensor
from coupfast.models.registry import Config, Family, build, configurations, register
from coupfast.models.unet_parts import check_images, check_labels, resampled, time_features

_SQRT_2 = math.sqrt(2.0)
_GROUP_NORM_EPS = 1e-6
# The published initialisation writes "scale 0" as 1e-10: these layers start as zero maps for every practical purpose.
_ZERO_SCALE = 1e-10


def _redraw(weight: Tensor, fan_in: int, fan_out: int, scale: float, generator: torch.Generator | None = None) -> None:
    """Variance scaling, fan_avg, uniform: variance = scale / mean(fan_in, fan_out)."""
    limit = math.sqrt(3.0 * scale / ((fan_in + fan_out) / 2))
    with torch.no_grad():
        if generator is None:
            weight.uniform_(-limit, limit)
        else:
            # Drawn where the generator lives and in one dtype, so that a seed means the same weights everywhere.
            draw = torch.empty(weight.shape, dtype=torch.float32, device=generator.device)
            weight.copy_(draw.uniform_(-limit, limit, generator=generator))


def _redraw_layer(layer: nn.Conv2d | nn.Linear | NIN, scale: float, generator: torch.Generator | None = None) -> None:
    if isinstance(layer, NIN):
        weight: Tensor = layer.W
        fan_in, fan_out = weight.shape
    else:
        weight = layer.weight
        receptive = weight[0, 0].numel() if weight.ndim == 4 else 1
        fan_out, fan_in = weight.shape[0] * receptive, weight.shape[1] * receptive
    _redraw(weight, fan_in, fan_out, scale, generator)


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, scale: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    _redraw_layer(conv, scale)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    _redraw_layer(linear, 1.0)
    nn.init.zeros_(linear.bias)
    return linear


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=_GROUP_NORM_EPS)


class NIN(nn.Module):
    """A linear map of the channels, its weight stored (in, out): the projections of `AttentionBlock`, which applies them."""

    def __init__(self, in_features: int, out_features: int, *, scale: float) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(in_features, out_features))
        self.b = nn.Parameter(torch.zeros(out_features))
        _redraw_layer(self, scale)


def _project(x: Tensor, *maps: NIN) -> Tensor:
    """Several maps of the same channels as one 1x1 convolution, their results one after the other."""
    weight = torch.cat([nin.W for nin in maps], dim=1).t()
    return F.conv2d(x, weight[:, :, None, None], torch.cat([nin.b for nin in maps]))


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the time enters between them. `resample` is None, "down" or "up"."""

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, *, resample: str | None = None, dropout: float
    ) -> None:
        super().__init__()
        self.resample = resample
        self.dropout = dropout
        # The order of these lines is the public registration order, which EMA checkpoints rely on.
        self.GroupNorm_0 = _group_norm(in_channels)
        self.Conv_0 = _conv(in_channels, out_channels, 3)
        self.Dense_0 = _linear(time_channels, out_channels)
        self.GroupNorm_1 = _group_norm(out_channels)
        self.Conv_1 = _conv(out_channels, out_channels, 3, scale=_ZERO_SCALE)
        self.Conv_2: nn.Conv2d | None = None
        if resample is not None or in_channels != out_channels:
            self.Conv_2 = _conv(in_channels, out_channels, 1)

    def time_projection(self, temb: Tensor) -> Tensor:
        """What this block adds to its features, `Dense_0(SiLU(temb))`: (batch, 4 nf) → (batch, out_channels)."""
        return self.Dense_0(F.silu(temb))

    def forward(self, x: Tensor, time_projection: Tensor) -> Tensor:
        h = resampled(F.silu(self.GroupNorm_0(x)), self.resample)
        skip = resampled(x, self.resample)
        h = self.Conv_0(h) + time_projection[:, :, None, None]
        h = F.silu(self.GroupNorm_1(h))
        h = self.Conv_1(F.dropout(h, self.dropout, self.training))
        if self.Conv_2 is not None:
            skip = self.Conv_2(skip)
        return (skip + h) / _SQRT_2


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels of a map.

    The softmax is written out because the fused attention kernels have no second derivative.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = _group_norm(channels)
        self.NIN_0 = NIN(channels, channels, scale=0.1)
        self.NIN_1 = NIN(channels, channels, scale=0.1)
        self.NIN_2 = NIN(channels, channels, scale=0.1)
        self.NIN_3 = NIN(channels, channels, scale=_ZERO_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        h = _project(self.GroupNorm_0(x), self.NIN_0, self.NIN_1, self.NIN_2)
        q, k, v = h.flatten(2).transpose(1, 2).split(channels, dim=2)  # [batch, pixels, channels] each
        weights = torch.softmax((q @ k.transpose(1, 2)) * channels**-0.5, dim=-1)  # [batch, pixels, pixels]
        h = _project((weights @ v).transpose(1, 2).reshape(x.shape), self.NIN_3)
        return (x + h) / _SQRT_2


class DDPMpp(nn.Module):
    """Noise-prediction U-Net of the VP-SDE.

    Args:
        nf: Channels of the first level; a multiple of 4, at least 4.
        ch_mult: Channels of each level as a multiple of `nf`; each level after the first halves the resolution.
        num_res_blocks: Residual blocks per level on the way down (one more on the way up), at least 1.
        attn_resolutions: Map sizes in pixels after whose residual blocks attention is applied.
        image_size: Height and width of the images in pixels; divisible by 2 ** (len(ch_mult) - 1).
        channels: Image channels.
        dropout: Probability in [0, 1) with which features are dropped in training mode; nothing in eval mode.

    Raises:
        ValueError: if an argument is out of range.

    Attributes:
        config: The arguments that fix the function (all but `dropout`), with `arch`, as JSON-ready values.
        image_size, channels: As given.
        plan: The order of the network between its first and last convolution, as (operation, index in `all_modules`):
            ("res", i), ("attention", i), ("push", -1) stores the features, ("join", -1) appends those stored last along
            the channels. The output of the first convolution counts as pushed.

    The parameter names and their order are those of the public checkpoints (`all_modules.{i}.…`). With the initial
    weights eps_hat is about 1e-5: layers that start at zero stay silent until trained; see `redraw_small_layers`.
    """

    def __init__(
        self,
        nf: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 8,
        attn_resolutions: Sequence[int] = (16,),
        image_size: int = 32,
        channels: int = 3,
        *,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        ch_mult, attn_resolutions = tuple(ch_mult), tuple(attn_resolutions)
        if nf < 4 or nf % 4:
            raise ValueError(f"`nf` must be a positive multiple of 4 (GroupNorm has nf // 4 groups), got {nf}")
        if not ch_mult or any(int(m) != m or m < 1 for m in ch_mult):
            raise ValueError(f"`ch_mult` must hold at least one positive integer, got {ch_mult}")
        if num_res_blocks < 1:
            raise ValueError(f"`num_res_blocks` must be at least 1, got {num_res_blocks}")
        if channels < 1:
            raise ValueError(f"`channels` must be at least 1, got {channels}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"`dropout` must lie in [0, 1), got {dropout}")
        levels = len(ch_mult)
        if image_size < 1 or image_size % 2 ** (levels - 1):
            raise ValueError(
                f"`image_size` must be a positive multiple of {2 ** (levels - 1)} because {levels} levels halve it "
                f"{levels - 1} times, got {image_size}"
            )
        resolutions = [image_size // 2**level for level in range(levels)]
        unknown = sorted(set(attn_resolutions) - set(resolutions))
        if unknown:
            raise ValueError(f"`attn_resolutions` {unknown} do not occur: the maps have sizes {resolutions}")
        for width in (nf * m for m in ch_mult):
            groups = min(width // 4, 32)
            if width % groups:
                raise ValueError(f"{width} channels do not divide into {groups} GroupNorm groups; change `nf`/`ch_mult`")

        self.nf, self.image_size, self.channels = nf, image_size, channels
        self.config: dict[str, object] = {
            "arch": "DDPMpp",
            "nf": nf,
            "ch_mult": list(ch_mult),
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": list(attn_resolutions),
            "image_size": image_size,
            "channels": channels,
        }

        time_channels = 4 * nf
        modules: list[nn.Module] = [_linear(nf, time_channels), _linear(time_channels, time_channels)]
        modules.append(_conv(channels, nf, 3))
        plan: list[tuple[str, int]] = []

        def add(operation: str, module: nn.Module) -> None:
            plan.append((operation, len(modules)))
            modules.append(module)

        def res(in_channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
            return ResBlock(in_channels, out_channels, time_channels, resample=resample, dropout=dropout)

        width = nf
        pushed = [nf]
        for level in range(levels):
            for _ in range(num_res_blocks):
                add("res", res(width, nf * ch_mult[level]))
                width = nf * ch_mult[level]
                if resolutions[level] in attn_resolutions:
                    add("attention", AttentionBlock(width))
                plan.append(("push", -1))
                pushed.append(width)
            if level < levels - 1:
                add("res", res(width, width, "down"))
                plan.append(("push", -1))
                pushed.append(width)

        add("res", res(width, width))
        add("attention", AttentionBlock(width))
        add("res", res(width, width))

        for level in reversed(range(levels)):
            for _ in range(num_res_blocks + 1):
                joined = width + pushed.pop()
                groups = min(joined // 4, 32)
                if joined % groups:
                    raise ValueError(f"{joined} joined channels do not divide into {groups} GroupNorm groups; change `nf`")
                plan.append(("join", -1))
                add("res", res(joined, nf * ch_mult[level]))
                width = nf * ch_mult[level]
            if resolutions[level] in attn_resolutions:
                add("attention", AttentionBlock(width))
            if level > 0:
                add("res", res(width, width, "up"))

        modules.append(_group_norm(width))
        modules.append(_conv(width, channels, 3, scale=_ZERO_SCALE))
        self.plan = tuple(plan)
        self.all_modules = nn.ModuleList(modules)

    def redraw_small_layers(self, generator: torch.Generator) -> DDPMpp:
        """Redraw the weights that start near zero at ordinary scale, so that a random network has eps_hat of order one.

        These are every Conv_1, every NIN and the output convolution. Biases and all other weights keep their values.
        `generator` fixes the draw, whatever the network's device and dtype. Returns the network itself.
        """
        for module in self.all_modules:
            if isinstance(module, ResBlock):
                _redraw_layer(module.Conv_1, 1.0, generator)
            elif isinstance(module, AttentionBlock):
                for nin in (module.NIN_0, module.NIN_1, module.NIN_2, module.NIN_3):
                    _redraw_layer(nin, 1.0, generator)
        output = self.all_modules[-1]
        assert isinstance(output, nn.Conv2d)
        _redraw_layer(output, 1.0, generator)
        return self

    def time_embedding(self, labels: Tensor) -> Tensor:
        """The embedding of labels = 999 t that all blocks share: (batch,) → (batch, 4 nf).

        Sines and cosines are taken in float32 whatever the dtype of labels and weights, as the weights were trained;
        the two linear layers then run in the dtype of the weights.
        """
        if labels.ndim != 1:
            raise ValueError(f"`labels` must have shape (batch,), got {tuple(labels.shape)}")
        features = time_features(labels, self.nf, last=self.nf // 2 - 1, cosine_first=False)
        first, second = self.all_modules[0], self.all_modules[1]
        return second(F.silu(first(features.to(first.weight.dtype))))  # type: ignore[arg-type]

    def time_projections(self, labels: Tensor) -> tuple[Tensor, ...]:
        """What each residual block adds to its features at labels = 999 t, in the order of `plan`.

        Returns one (batch, out_channels) tensor per residual block; a batch of 1 serves any batch of images.
        """
        temb = self.time_embedding(labels)
        blocks = (self.all_modules[i] for operation, i in self.plan if operation == "res")
        return tuple(block.time_projection(temb) for block in blocks)  # type: ignore[operator]

    def denoise(self, x: Tensor, time_projections: Sequence[Tensor]) -> Tensor:
        """eps_hat of states x (batch, channels, image_size, image_size), given `time_projections(labels)`."""
        check_images(x, self.channels, self.image_size)
        projections = iter(time_projections)
        h = self.all_modules[2](x)
        stored = [h]
        for operation, i in self.plan:
            if operation == "res":
                h = self.all_modules[i](h, next(projections))
            elif operation == "attention":
                h = self.all_modules[i](h)
            elif operation == "push":
                stored.append(h)
            else:
                h = torch.cat([h, stored.pop()], dim=1)
        return self.all_modules[-1](F.silu(self.all_modules[-2](h)))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The predicted noise.

        Args:
            x: States in the [-1, 1] scale, (batch, channels, image_size, image_size), in the dtype of the weights.
            labels: 999 t of every image, (batch,), or (1,) for one time for all.

        Returns:
            eps_hat, of the shape of `x`.
        """
        check_labels(labels, x)
        return self.denoise(x, self.time_projections(labels))


# --- weights ----------------------------------------------------------------------------------------------------------


def _shadow_weights(checkpoint: Any, config: Config | None) -> tuple[Config, dict[str, Tensor]] | None:
    """The configuration and the averaged weights of a score_sde checkpoint; None where it is none."""
    ema = checkpoint.get("ema") if isinstance(checkpoint, dict) else None
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, (list, tuple)):
        return None
    if config is None:
        shapes = [tuple(found.shape) if isinstance(found, Tensor) else None for found in shadow]
        fits = (named for named in configurations("DDPMpp") if list(_shapes(named).values()) == shapes)
        if (known := next(fits, None)) is not None:
            config = _with_size(known)
        else:  # what is averaged has no names, but what is not has
            raw = checkpoint.get("model")
            names = {str(name).removeprefix("module."): value for name, value in raw.items()} if isinstance(raw, dict) else {}
            config = _recognise({name: value for name, value in names.items() if isinstance(value, Tensor)}) or {}
    expected = _shapes(config)
    if len(shadow) != len(expected):
        raise CheckpointError(
            f"the network has {len(expected)} tensors, ema.shadow_params has {len(shadow)}; "
            "is it the checkpoint of another architecture (give its `config`)?"
        )
    state = {}
    for number, ((key, shape), found) in enumerate(zip(expected.items(), shadow, strict=True)):
        check_tensor(f"ema.shadow_params[{number}]", key, torch.empty(shape, device="meta"), found)
        # A copy: the read is memory-mapped, and the network must outlive the file.
        state[key] = found.detach().to(torch.float32, copy=True)
    return config, state


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    if "attn_levels" in config:  # shapes are the same at all sizes
        config = _completed({**config, "image_size": 2 ** (len(config["ch_mult"]) - 1)})
    with torch.device("meta"):
        network = build({"arch": "DDPMpp", **config})
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def _recognise(state: Mapping[str, Tensor]) -> Config | None:
    if "all_modules.0.weight" not in state:
        return None
    for config in configurations("DDPMpp"):
        if all(key in state and tuple(state[key].shape) == shape for key, shape in _shapes(config).items()):
            return _with_size(config)
    return _inferred(state)


def _inferred(state: Mapping[str, Tensor]) -> Config | None:
    """The one configuration whose tensors have these names and shapes; None if there is none, or several.

    All but the size of the images, which weights do not tell. It is needed to say at which sizes of maps attention is, and of
    what shape images are; `attn_levels` says in the meantime at which levels.
    """
    found = {key: tuple(tensor.shape) for key, tensor in state.items() if key.startswith("all_modules.")}
    first, second = found.get("all_modules.0.weight", ()), found.get("all_modules.2.weight", ())
    numbers = {int(key.split(".")[1]) for key in found if key.split(".")[1].isdecimal()}
    if len(first) != 2 or len(second) != 4 or first[0] != 4 * first[1] or first[1] == 0:
        return None
    nf, count = first[1], max(numbers) + 1
    attention = {number for number in numbers if f"all_modules.{number}.NIN_0.W" in found}
    fitting = []
    for levels, blocks in itertools.product(range(1, 9), range(1, 65)):
        # Three before, two after, three in the middle; a block more a level on the way up, and what halves and doubles.
        at = count - 8 - levels * (2 * blocks + 1) - 2 * (levels - 1)
        if at < 0 or at % (blocks + 1):
            continue
        for chosen in itertools.combinations(range(levels), at // (blocks + 1)):
            starts, where, here = [], set(), 3
            for level in range(levels):
                starts.append(here)
                for _ in range(blocks):
                    here += 1
                    if level in chosen:
                        where.add(here)
                        here += 1
                here += level < levels - 1
            widths = [found.get(f"all_modules.{start}.Conv_0.bias", (0,)) for start in starts]
            if not where <= attention or any(len(width) != 1 or width[0] % nf or not width[0] for width in widths):
                continue
            multiples = [width[0] // nf for width in widths]
            config = {"nf": nf, "ch_mult": multiples, "num_res_blocks": blocks, "channels": second[1], "attn_levels": [*chosen]}
            with contextlib.suppress(CheckpointError):  # nothing has such widths
                if _shapes(config) == found:
                    fitting.append(config)
    return fitting[0] if len(fitting) == 1 else None


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with sizes of maps in the place of levels."""
    if "attn_levels" not in config:
        return config
    size = config["image_size"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise CheckpointError(f"`image_size` is the height and width of images in pixels, an int of at least 1, got {size!r}")
    others = {name: value for name, value in config.items() if name != "attn_levels"}
    return {**others, "attn_resolutions": [size // 2**level for level in config["attn_levels"]]}


def _with_size(config: Config) -> Config:
    """A named configuration, which says the size of its images."""
    return {"image_size": inspect.signature(DDPMpp).parameters["image_size"].default, **config}


register(
    Family(
        "DDPMpp",
        "score",
        DDPMpp,
        names={"cifar10-ddpmpp-deep": {}},  # the defaults are `cifar10_ddpmpp_deep_continuous`
        needs="give `weights=` the public checkpoint_8.pth, a converted safetensors file, or 'random'",
        recognise=_recognise,
        extract=_shadow_weights,
        untold={
            "image_size": "give `config`, or `image_size` alone, their height and width in pixels, as 32 of CIFAR-10 "
            "(load_score(FILE, image_size=32); coupfast convert FILE DST.safetensors --image-size 32)"
        },
        completed=_completed,
        randomise=DDPMpp.redraw_small_layers,
        ignored=frozenset({"sigmas"}),  # a buffer of score_sde that no VP network uses
        weights_only=True,
    )
)
