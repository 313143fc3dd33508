"""Projected gradient ascent on the expectation over a defense's noise, images and draws in one batch.

With the purifier's gradient "bpda" this is BPDA + EOT (Athalye et al. 2018; Hill et al. 2021; Nie et al. 2022).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch.nn import functional

from coupfast.evaluation.attacks.base import Attack, Cost, Result
from coupfast.evaluation.attacks.knobs import count, knob
from coupfast.evaluation.metered import Metered


@dataclasses.dataclass(frozen=True)
class PGD(Attack):
    """PGD with EOT, in sign steps (Linf) or normalized ones (L2).

    Attributes:
        step_size: None is 2/255 in Linf, eps/5 in L2.
        mean: The loss is the mean of the draws' cross-entropies, or the cross-entropy of their mean logits.
        drop: When an image leaves the batch, its present form kept: "never"; once "any" of its draws is misclassified, which
            decides it where the worst of several draws counts; or once the "mean" logits are. An image that never leaves is
            returned where its expected loss was highest. DiffPure's published BPDA + EOT confirms a failure of the mean logits
            on 150 further draws before the image counts as fallen; "mean" does not.
        random_start: Start anywhere in the ball, uniformly, then clip to [0, 1].
    """

    norm: str = "Linf"
    eps: float = 8 / 255
    iterations: int = count(40, "steps of the attack")
    eot_iter: int = count(15, "draws of the noise that a gradient is averaged over")
    step_size: float | None = knob(
        None,
        "length of a step, for images in [0, 1]; 2/255 in Linf and eps/5 in L2",
        metavar="A",
        words="a finite number above 0 for images in [0, 1]",
        valid=lambda size: 0 < size < math.inf,
    )
    mean: Literal["losses", "logits"] = knob("losses", "the loss is of the draws' mean losses, or of their mean logits")
    drop: Literal["never", "any", "mean"] = knob(
        "never", "when an image leaves: never, once any draw is wrong, or once the mean logits are"
    )
    random_start: bool = knob(False, "start anywhere in the ball")

    def run(self, defense: Metered, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        x_k = self.start(x, seed=seed)
        best, best_loss = x_k.clone(), torch.full((len(x),), -float("inf"), dtype=x.dtype, device=x.device)
        active, curve = torch.arange(len(x), device=x.device), []
        standing = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for k in range(self.iterations + 1):
            logits, loss, gradient = self._expectation(defense, x_k[active], y[active], active, k)
            higher = loss > best_loss[active]
            best[active[higher]], best_loss[active[higher]] = x_k[active[higher]], loss[higher]
            if self.drop == "any":
                failed = (logits.argmax(dim=2) != y[active]).any(dim=0)
            else:
                failed = logits.mean(dim=0).argmax(dim=1) != y[active]
            standing[active[failed]] = False
            curve.append(int(standing.sum()))
            leaving = failed if self.drop != "never" else torch.zeros_like(failed)
            best[active[leaving]] = x_k[active[leaving]]
            active = active[~leaving]
            if gradient is None or len(active) == 0:
                break
            x_k[active] = self._step(x_k[active], x[active], gradient[~leaving])
        return Result(best, tuple(curve))

    def start(self, x: torch.Tensor, *, seed: int) -> torch.Tensor:
        """Where it begins: the images, or points in the balls around them."""
        if not self.random_start:
            return x.clone()
        generator = torch.Generator().manual_seed(seed)
        if self.norm == "Linf":
            start = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
        else:
            # Of a ball of d dimensions the share r^d lies within r of the centre; normal noise has no preferred direction.
            start = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            radius = torch.rand((len(x), 1, 1, 1), generator=generator, dtype=x.dtype) ** (1 / x[0].numel())
            start *= radius / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return self._project(x + self.eps * start.to(x.device), x)

    def _expectation(
        self, defense: Metered, x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Logits (draws, batch, classes), expected losses (batch,) and, except after the last step, their gradient."""
        n, last = len(x), k == self.iterations
        # Noise by image and step, so that an image's path does not depend on which others are still here.
        draws = (k * self.eot_iter + torch.arange(self.eot_iter, device=x.device)).repeat_interleave(n)
        with torch.set_grad_enabled(not last):
            x = x.detach().requires_grad_(not last)
            logits = defense(x.repeat(self.eot_iter, 1, 1, 1), ids=ids.repeat(self.eot_iter), draw=draws)
            logits = logits.view(self.eot_iter, n, -1)
            if self.mean == "logits":
                loss = functional.cross_entropy(logits.mean(dim=0), y, reduction="none")
            else:
                loss = functional.cross_entropy(logits.flatten(0, 1), y.repeat(self.eot_iter), reduction="none")
                loss = loss.view(self.eot_iter, n).mean(dim=0)
            gradient = None if last else torch.autograd.grad(loss.sum(), x)[0]
        return logits.detach(), loss.detach(), gradient

    def _step(self, x_k: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        if self.norm == "Linf":
            return self._project(x_k + (self.step_size or 2 / 255) * gradient.sign(), x)
        length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)
        return self._project(x_k + (self.step_size or self.eps / 5) * gradient / length, x)

    def _project(self, x_k: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        delta = x_k - x
        if self.norm == "Linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            delta = delta * (self.eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1.0).view(-1, 1, 1, 1)
        return (x + delta).clamp(0.0, 1.0)

    @property
    def replicas(self) -> int:
        return self.eot_iter

    def cost(self) -> Cost:
        return Cost(self.eot_iter, self.iterations * self.eot_iter)


@dataclasses.dataclass(frozen=True)
class BPDA(PGD):
    """BPDA + EOT as the field runs it: PGD on the mean logits of 15 draws, through the purifier's gradient "bpda"."""

    gradient = "bpda"

    mean: Literal["losses", "logits"] = knob("logits", "the loss is of the draws' mean losses, or of their mean logits")
    drop: Literal["never", "any", "mean"] = knob(
        "mean", "when an image leaves: never, once any draw is wrong, or once the mean logits are"
    )
