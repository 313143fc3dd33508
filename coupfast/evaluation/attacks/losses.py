"""What an attack climbs: losses by name, each from logits (batch, classes) and labels (batch,) to numbers (batch,).

    ce       cross-entropy, −log p_y; its gradient vanishes where a logit dominates
    margin   max_{j≠y} z_j − z_y: above 0 where the image is misclassified
    cw       min(margin, 0) (Carlini and Wagner 2017, f_6 at confidence 0): a draw that fails already pulls no more
    dlr      margin / (z_(1) − z_(3)), z_(i) the i-th largest logit (Croce and Hein 2020): the same for logits of any scale

A larger loss is a worse classification. An attack that takes losses by these names has the knob `losses`, in which several are
restarts, one with each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from coupfast.evaluation.attacks.knobs import knob

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ce(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, y, reduction="none")


def margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    ours = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, y[:, None], True)
    return logits.masked_fill(ours, -float("inf")).amax(dim=1) - logits.gather(1, y[:, None])[:, 0]


def cw(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return margin(logits, y).clamp_max(0.0)


def dlr(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    ordered = logits.topk(3, dim=1).values
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


LOSSES: dict[str, Loss] = {"ce": ce, "margin": margin, "cw": cw, "dlr": dlr}


def split(losses: str) -> list[str]:
    """The names in a knob."""
    return [name.strip() for name in losses.split(",")]


def losses_knob(default: str) -> Any:
    """A knob that names losses."""
    return knob(
        default,
        f"losses that it climbs, of {', '.join(LOSSES)}; several with commas between are restarts, one with each",
        metavar="LOSS,...",
        words=f"one or several of {', '.join(LOSSES)}, with commas between",
        valid=lambda said: all(name in LOSSES for name in split(said)),
    )


def least_classes(losses: str) -> int:
    """Classes that these are defined for."""
    return 3 if "dlr" in split(losses) else 2
