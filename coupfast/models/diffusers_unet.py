"""Score networks from `diffusers`: a `UNet2DModel`, its pipeline or the folder of either as (x_k, labels) → eps_hat.

The network itself does not know what it predicts and on which noise schedule it was trained; its scheduler does. Where there
is one, a prediction of v or x₀ is turned into one of the noise (`adapters.NoiseFrom`), and a schedule other than the VP-SDE's
is refused. diffusers is imported only to build a network from a configuration.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coupfast.models.adapters import PREDICTIONS, NoiseFrom
from coupfast.models.checkpoints import CheckpointError, load_state, read_weights
from coupfast.models.defaults import plain_defaults
from coupfast.models.registry import Config, Family, register
from coupfast.models.wrappers import find_weights
from coupfast.sde import NUM_LABELS, VPSDE

_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
#: Labels at which a scheduler's ᾱ is compared, and how far its log-odds may be off. Those of the discrete chain of 1000 steps
#: are off by 0.05 at most; those of the cosine schedule by 1.5 at label 100 and 2.4 at 500.
_COMPARED_LABELS, _LOG_ODDS_TOLERANCE = (50, 100, 300, 500, 900), 0.25


class DiffusersScore(nn.Module):
    """A `diffusers.UNet2DModel` as a score network.

    The labels 999 t are passed as diffusers' timesteps as they are, fractions included: a network trained on the
    steps 0 … 999 of the linear β schedule has seen t = step / 999. One with a table of time steps gets them rounded.

    Args:
        unet: The `UNet2DModel`; its prediction must be the noise (`prediction_type="epsilon"` in its scheduler, which
            the network itself does not know), or be adapted by `NoiseFrom`.

    Raises:
        ValueError: if the network predicts a variance too, wants class labels, takes standard deviations for time steps, or has
            no square image size.

    Attributes:
        image_size, channels: From the configuration of the network.
        config: The configuration, with `arch`, as JSON-ready values.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        config: Any = unet.config
        size = config.sample_size
        sizes = {size} if isinstance(size, int) else set(size or ())
        if len(sizes) != 1:
            raise ValueError(f"the UNet needs one square `sample_size` in its config, found {size}")
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"the UNet takes {config.in_channels} channels and returns {config.out_channels}; "
                "networks that also predict a variance are not supported"
            )
        if getattr(config, "num_class_embeds", None) or getattr(config, "class_embed_type", None):
            raise ValueError("the UNet is conditioned on class labels; only unconditional networks are supported")
        if getattr(config, "time_embedding_type", "positional") == "fourier":
            raise ValueError(
                "the UNet takes the standard deviation of the noise for its time step (time_embedding_type='fourier', a "
                "variance-exploding network); purification needs one of the VP-SDE, with labels 999 t"
            )
        self.unet = unet
        self.image_size: int = sizes.pop()
        self.channels: int = config.in_channels
        self.whole_labels = getattr(config, "time_embedding_type", "positional") == "learned"
        if isinstance(config, Mapping):
            self.config: dict[str, object] = {"arch": "UNet2DModel", **_public(config)}

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """eps_hat of states x (batch, channels, height, width) in the [-1, 1] scale at labels = 999 t (batch,)."""
        return self.unet(x, labels.round().long() if self.whole_labels else labels).sample


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if key[0] != "_"}


def _build(**config: Any) -> DiffusersScore:
    return DiffusersScore(_diffusers().UNet2DModel.from_config(_public(config)))


def _diffusers() -> Any:
    try:
        diffusers = importlib.import_module("diffusers")
        _ = diffusers.UNet2DModel  # imported when it is asked for
    except (ImportError, RuntimeError) as error:  # the latter where its torchvision was made for another torch
        reason = " ".join(str(error).split())
        raise ImportError(
            f'a UNet2DModel is built by diffusers, which does not load here ({reason}): pip install "coupfast[zoo]"'
        ) from error
    return diffusers


# --- networks, pipelines, folders -------------------------------------------------------------------------------------


def _adopt(value: object) -> nn.Module | None:
    if _is(value, "UNet2DModel"):
        where = getattr(value.config, "_name_or_path", None)  # type: ignore[attr-defined]
        scheduler = _scheduler_in(Path(where)) if where and Path(where).is_dir() else None
        return _adapted(value, scheduler)
    if not _is(value, "DiffusionPipeline"):
        return None
    unet, scheduler = getattr(value, "unet", None), getattr(value, "scheduler", None)
    if not _is(unet, "UNet2DModel") or getattr(value, "vae", None) is not None or getattr(value, "vqvae", None) is not None:
        raise TypeError(
            f"a {type(value).__name__} is no score network of images: a pipeline serves whose `unet` is a UNet2DModel on "
            f"pixels, found {type(unet).__name__ if unet is not None else 'none'}"
        )
    return _adapted(unet, scheduler)


def _is(value: object, name: str) -> bool:
    # By name, so that diffusers is never imported by somebody who does not use it.
    return any(c.__name__ == name and c.__module__.startswith("diffusers.") for c in type(value).__mro__)


def _adapted(unet: Any, scheduler: Any) -> nn.Module:
    network = DiffusersScore(unet)
    if scheduler is None:
        return network
    prediction = prediction_of(scheduler)
    return network if prediction == "epsilon" else NoiseFrom(network, prediction=prediction)


def prediction_of(scheduler: Any) -> str:
    """What a network predicts, as its diffusers scheduler says: one of `PREDICTIONS`.

    Raises:
        ValueError: if it is something else, or the schedule is not that of the VP-SDE with β from 0.1 to 20 and 1000 steps.
    """
    config = getattr(scheduler, "config", {})
    name = type(scheduler).__name__
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"the scheduler {name} says prediction_type={prediction!r}; served are {', '.join(PREDICTIONS)}")
    sde = VPSDE()
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        if (config.get("beta_min"), config.get("beta_max")) != (sde.beta_min, sde.beta_max):
            raise ValueError(
                f"the scheduler {name} has no variance-preserving schedule of discrete steps, nor β from 0.1 to 20: the "
                "network belongs to another process than the VP-SDE"
            )
        return prediction
    for label in _COMPARED_LABELS:
        expected = float(sde.alpha_bar(label / NUM_LABELS))
        found = float(alphas[label]) if label < len(alphas) else 0.0
        odds = math.log(found / (1 - found)) if 0.0 < found < 1.0 else -math.inf
        if not abs(odds - math.log(expected / (1 - expected))) <= _LOG_ODDS_TOLERANCE:
            raise ValueError(
                f"the scheduler {name} (beta_schedule={config.get('beta_schedule')!r}, {len(alphas)} steps) has "
                f"ᾱ = {found:.4g} at step {label}, where the VP-SDE has {expected:.4g}: labels 999 t would mean other noise to "
                "this network. Wrap it in a module that translates the labels to steps of equal ᾱ"
            )
    return prediction


def _read_folder(folder: Path) -> nn.Module | None:
    """The network of a folder that `save_pretrained` of a UNet2DModel or of its pipeline wrote; None for other folders."""
    inner = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    if not (inner / "config.json").is_file():
        return None
    config = _json(inner / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        return None
    path = next((inner / name for name in _WEIGHT_FILES if (inner / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{inner} has a config.json of a UNet2DModel and no weights: {' or '.join(_WEIGHT_FILES)}")
    with plain_defaults():
        content, _ = read_weights(path)
        network = _build(**config)
        extracted = _extract(content, {})
        if extracted is None:
            raise CheckpointError(f"{path} holds no weights of a UNet2DModel")
        load_state(network, extracted[1], path)
    return _adapted(network.unet, _scheduler_in(inner))


def _scheduler_in(folder: Path) -> Any:
    """The scheduler that was saved with a network; None where there is none."""
    name = "scheduler_config.json"
    for path in (folder / "scheduler" / name, folder / name, folder.parent / "scheduler" / name):
        if path.is_file():
            config = _json(path)
            kind = getattr(_diffusers(), str(config.get("_class_name")), None)
            if kind is None:
                raise ValueError(f"{path} names the scheduler {config.get('_class_name')!r}, which diffusers does not have")
            return kind.from_config(config)
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return config


def _extract(content: Any, config: Config | None) -> tuple[Config, dict[str, Tensor]] | None:
    keys = ("conv_in.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight", "conv_out.weight")
    weights = find_weights(content, lambda state: True if all(key in state for key in keys) else None)
    if weights is None:
        return None
    if config is None:
        raise CheckpointError(
            "weights of a diffusers UNet2DModel do not tell its configuration: give the folder that has its config.json, too"
        )
    return config, {f"unet.{key}": value for key, value in (weights.state | weights.rest).items()}


register(Family("UNet2DModel", "score", _build, extract=_extract, adopt=_adopt, read_folder=_read_folder))
