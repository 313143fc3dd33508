"""DiffHammer (Wang et al., NeurIPS 2024): E–M over draws, whose gradients at the purified images cost a classifier each.

At a point, N draws n have purified images, losses l_n and gradients g_n = ∂l_n / ∂(purified image). What one step of size ε
along r does to them is l_n + ε ⟨dir r, g_n⟩ to first order, dir being the direction of steepest ascent in the norm. Then

    selection   j = argmax_a Σ_n ELU(l_n + ε ⟨dir g_a, g_n⟩),   r = g_j
    E           w_n = sigmoid(λ (l_n + ε ⟨dir r, g_n⟩))
    M           r = Σ w_n g_n / Σ w_n,                           E and M in turn until the weights settle

and r is pulled back to the image through the one purification j. The mean over draws, which EOT follows, vanishes where draws
fail in different directions; r does not: it leaves the draws alone that cannot be made to fail along with the others.

The published code's E–M never updates r, leaves ε out of the weights, and pulls back through a purification whose noise is not
that of j. Here noise is named, so it is j's to the bit.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from coupfast.evaluation.attacks import ball
from coupfast.evaluation.attacks.base import Cost
from coupfast.evaluation.attacks.iterative import Answer, Asked, InBall
from coupfast.evaluation.attacks.knobs import count, positive, step_size_knob
from coupfast.evaluation.attacks.losses import losses_knob
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.views import View

_SETTLED = 1e-3  # of a weight in [0, 1]


@dataclasses.dataclass(frozen=True)
class DiffHammer(InBall):
    """Three restarts of 50 iterations, with the losses of Carlini and Wagner (without their hinge), CE and DLR.

    The gradient is averaged as g_i = i^−½ (new) + (1 − i^−½) g_{i−1} before a step in its direction.

    Attributes:
        sharpness: λ of the weights.
        rounds: E–M rounds at most at a point.
    """

    iterations: int = count(50, "steps of the attack")
    eot_iter: int = count(10, "draws of the noise that a gradient is averaged over")
    losses: str = losses_knob("margin,ce,dlr")
    step_size: float | None = step_size_knob("0.007")
    sharpness: float = positive(
        5.0, "lambda of the draws' weights, which tell apart those that can fail together", metavar="L"
    )
    rounds: int = count(20, "rounds at most, at a point, in which it finds the draws that can fail together")

    def check(self, defense: Metered) -> None:
        if defense.purified is None:
            raise ValueError(
                f"diffhammer needs gradients at purified images, and {type(defense.model).__name__} is no "
                f"coupfast.PurifiedClassifier"
            )

    def ask(self, defense: Metered, asked: Asked) -> Answer:
        n, draws, ids = len(asked.x), self.draws(asked), asked.images
        purified = View(classified=False)
        with torch.no_grad():
            copies = asked.x.repeat(asked.draws, 1, 1, 1)
            x_pure = defense(copies, ids=ids.repeat(asked.draws), draw=draws, view=purified)
        with torch.set_grad_enabled(asked.follow):
            x_pure = x_pure.detach().requires_grad_(asked.follow)
            logits = defense.classify(x_pure).view(asked.draws, n, -1)
            losses = self.climbed(logits, asked)
        gradient = None
        if asked.follow:
            (g,) = torch.autograd.grad(losses.sum(), x_pure)
            chosen, r = self.grafted(losses.detach(), g.view(asked.draws, n, *asked.x.shape[1:]))
            with torch.enable_grad():
                x = asked.x.detach().requires_grad_()
                own = draws.view(asked.draws, n).gather(0, chosen[None])[0]
                (gradient,) = torch.autograd.grad(defense(x, ids=ids, draw=own, view=purified), x, r)
        logits = logits.detach()
        wrong, failed = self.failing(logits, asked)
        return Answer(wrong, failed, self.cross_entropy(logits, asked), gradient)

    def grafted(self, losses: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of losses (draws, n) and gradients (draws, n, channels, height, width): the draw j of each image, (n,), and its r."""
        draws, n = losses.shape
        flat = g.flatten(2)  # [draws, n, values]
        directions = ball.ascent(g.flatten(0, 1), self.norm).view_as(flat)
        gains = self.eps * torch.einsum("anv,bnv->abn", directions, flat)  # of draw b, a step in the direction of draw a
        chosen = functional.elu(losses + gains).sum(dim=1).argmax(dim=0)  # [n]
        r = flat.gather(0, chosen.view(1, n, 1).expand(1, n, flat.shape[2]))[0]
        weights = torch.zeros_like(losses)
        for _ in range(self.rounds):
            direction = ball.ascent(r.view(n, *g.shape[2:]), self.norm).flatten(1)
            gain = self.eps * torch.einsum("nv,bnv->bn", direction, flat)
            before, weights = weights, torch.sigmoid(self.sharpness * (losses + gain))
            moving = (weights - before).abs().amax(dim=0) >= _SETTLED  # [n]
            if not bool(moving.any()):
                break
            mean = torch.einsum("bn,bnv->nv", weights, flat) / weights.sum(dim=0).clamp_min(1e-12)[:, None]
            r = torch.where(moving[:, None], mean, r)
        return chosen, r.view(n, *g.shape[2:])

    def memory(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"momentum": torch.zeros_like(x)}

    def step(self, memory: dict[str, torch.Tensor], asked: Asked, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        share = (asked.number % (self.iterations + 1) + 1).to(gradient.dtype).rsqrt().view(-1, 1, 1, 1)
        moved = share * gradient + (1 - share) * memory["momentum"][asked.images]
        memory["momentum"][asked.images] = moved
        size = self.step_size or (0.007 if self.norm == "Linf" else self.eps / 5)
        return ball.project(asked.x + ball.ascent(moved, self.norm, size), x, self.norm, self.eps)

    @property
    def gradient_replicas(self) -> int:
        return 1

    def cost(self) -> Cost:
        restarts = self.points // (self.iterations + 1)
        forward = restarts * sum(self.schedule) + self.looks * self.points
        return Cost(forward, restarts * self.iterations, again=self.again)
