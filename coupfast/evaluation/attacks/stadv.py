"""StAdv (Xiao et al., ICLR 2018): pixels are moved, and not changed in value.

Pixel p of the attacked image is the clean one's value at p + f(p), bilinearly between its four neighbours. The flow f, in
pixels, climbs

    loss(x_adv) − τ Σ_p Σ_{q ∈ N(p)} sqrt(‖f(p) − f(q)‖² + δ),        N(p): the neighbours above, below, left and right

There is no ball: what is small is the unevenness of the flow. The paper climbs by L-BFGS, which needs one and the same loss at
every call; a defense with noise has another one each time, so it is Adam here.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn import functional

from coupfast.evaluation.attacks.iterative import Asked
from coupfast.evaluation.attacks.knobs import count, knob, positive
from coupfast.evaluation.attacks.losses import losses_knob
from coupfast.evaluation.attacks.pgd import Expectation

_DELTA = 1e-8  # squared pixels: the root has a slope at 0
_DECAY, _SQUARE_DECAY, _LEAST = 0.9, 0.999, 1e-8  # Adam's


@dataclasses.dataclass(frozen=True)
class StAdv(Expectation):
    """StAdv in steps of Adam on the expected loss.

    Attributes:
        smoothness: τ.
        rate: Adam's, in pixels.
        reach: Of a displacement in either direction; None leaves it to the penalty, as the paper does.
    """

    iterations: int = count(100, "steps of the attack")
    losses: str = losses_knob("cw")
    smoothness: float = knob(
        0.05,
        "weight of the flow's unevenness against the loss",
        metavar="TAU",
        words="a finite number from 0",
        valid=lambda value: 0 <= value < math.inf,
    )
    rate: float = positive(0.05, "Adam's learning rate, in pixels", metavar="PX")
    reach: float | None = positive(None, "largest displacement in either direction, in pixels", metavar="PX")

    def memory(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: x.new_zeros(len(x), 2, *x.shape[2:]) for name in ("flow", "mean", "square")}

    def step(self, memory: dict[str, torch.Tensor], asked: Asked, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        flow, mean, square = (memory[name][asked.images] for name in ("flow", "mean", "square"))
        with torch.enable_grad():
            leaf = flow.clone().requires_grad_()
            climbed = (moved(x, leaf) * gradient).sum() - self.smoothness * unevenness(leaf).sum()
            (g,) = torch.autograd.grad(climbed, leaf)
        mean = _DECAY * mean + (1 - _DECAY) * g
        square = _SQUARE_DECAY * square + (1 - _SQUARE_DECAY) * g * g
        times = (asked.number % (self.iterations + 1) + 1).to(x.dtype).view(-1, 1, 1, 1)
        root = (square / (1 - _SQUARE_DECAY**times)).sqrt()
        flow = flow + self.rate * mean / (1 - _DECAY**times) / (root + _LEAST)
        if self.reach is not None:
            flow = flow.clamp(-self.reach, self.reach)
        memory["flow"][asked.images], memory["mean"][asked.images], memory["square"][asked.images] = flow, mean, square
        return moved(x, flow).clamp(0.0, 1.0)


def moved(x: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Images (n, channels, height, width) sampled at every pixel's place and its flow (n, 2, height, width), to the right and
    down in pixels. Beyond the border are its own values."""
    height, width = x.shape[2:]
    right = torch.arange(width, dtype=x.dtype, device=x.device) + flow[:, 0]
    down = torch.arange(height, dtype=x.dtype, device=x.device)[:, None] + flow[:, 1]
    places = torch.stack([2 * right / max(width - 1, 1) - 1, 2 * down / max(height - 1, 1) - 1], dim=3)
    return functional.grid_sample(x, places, mode="bilinear", padding_mode="border", align_corners=True)


def unevenness(flow: torch.Tensor) -> torch.Tensor:
    """Σ_p Σ_{q ∈ N(p)} sqrt(‖f(p) − f(q)‖² + δ) of flows (n, 2, height, width): every pair of neighbours counts twice."""
    pairs = (flow[:, :, 1:] - flow[:, :, :-1], flow[:, :, :, 1:] - flow[:, :, :, :-1])
    lengths = [(pair.square().sum(dim=1) + _DELTA).sqrt().flatten(1).sum(dim=1) for pair in pairs]
    return 2 * (lengths[0] + lengths[1])
