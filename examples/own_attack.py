# %% [markdown]
# # An attack of your own
#
# An attack is a frozen dataclass with `run` and `cost`. Its fields are its knobs: they become options of the command
# line and are kept in the ledger. `run` gets the defense, whose noise the evaluation has set, and returns images.

# %%
import dataclasses

import torch

import coupfast
from coupfast.data import load_images
from coupfast.evaluation import Attack, Cost, Result, count, knob


# %%
@dataclasses.dataclass(frozen=True)
class Momentum(Attack):
    """Signed steps along a running mean of the gradient."""

    norm: str = "Linf"
    eps: float = 8 / 255
    iterations: int = count(3, "steps")
    decay: float = knob(0.75, "of the running mean, a step", metavar="D", words="in [0, 1)", valid=lambda d: 0 <= d < 1)

    def run(self, defense, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        x_adv, mean = x.clone(), torch.zeros_like(x)
        for _ in range(self.iterations):
            leaf = x_adv.detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(defense(leaf), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
            mean = self.decay * mean + (1 - self.decay) * gradient
            x_adv = x_adv + 1.5 * self.eps / self.iterations * mean.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp(0, 1)
        return Result(x_adv)

    def cost(self) -> Cost:
        """Images through the defense for one image: none without a gradient, one a step with it."""
        return Cost(0, self.iterations)


# %%
x, y = load_images("cifar10-20", limit=3)
score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
defense = coupfast.PurifiedClassifier(coupfast.Purifier(score, classifier, t=0.06, num_steps=4), classifier, seed=0)
result = coupfast.evaluate(defense, x, y, attack=Momentum(iterations=2, decay=0.5), draws=4, shard=3)
print(result.table())

# %% [markdown]
# On the command line, from a file that can be imported: `coupfast evaluate IN --attack own_attack:Momentum --decay
# 0.5 --out RUN`.
