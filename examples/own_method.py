# %% [markdown]
# # A method of your own
#
# A method that is linear in each step is a table of numbers, any other is a step function. Both are frozen
# dataclasses; both have the exact gradient, a certificate, a plan, all attacks and the command line without another
# line of code.

# %%
import dataclasses

import numpy as np
import torch

import coupfast
from coupfast.data import load_images
from coupfast.methods import Networks, Recipe
from coupfast.options import option

# %% [markdown]
# ## A table
#
# x' = a x + b ε̂(x, t) + c g(x) + d z, and here + e x_in: each step is pulled back to the image by a share of the
# distance.


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tethered(coupfast.TableMethod):
    """The reverse SDE, tied to the image that came in."""

    num_steps: int = option(4, help="steps from t to 0", parse=int)
    t: float = option(0.06, help="purification time, in (1e-5, 1]", parse=float)
    pull: float = option(0.02, help="share of the way back to the image in each step, in [0, 1)", parse=float)

    def __post_init__(self) -> None:
        if not 0 <= self.pull < 1:
            raise ValueError(f"`pull` is in [0, 1), got {self.pull}")

    def recipe(self) -> Recipe:
        sde = coupfast.VPSDE()
        t = np.linspace(self.t, 1e-5, self.num_steps + 1)  # falling
        h, beta, sigma = t[:-1] - t[1:], sde.beta(t[:-1]), sde.sigma(t[:-1])
        a, b, d = 1 + beta * h / 2, -beta * h / sigma, np.sqrt(beta * h)
        keep = 1 - self.pull
        c, e = np.zeros_like(a), np.full_like(a, self.pull)
        return Recipe(coupfast.CoefficientTable(t, keep * a, keep * b, c, keep * d, e=e))


# %% [markdown]
# ## A step function
#
# Anything differentiable. All randomness comes from `noise`, and nothing is written into the state.


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class Careful(coupfast.StepMethod):
    """Steps whose length depends on how much noise the network sees in each image."""

    num_steps: int = 3

    def step(self, k: int, state: tuple[torch.Tensor, ...], noise, networks: Networks) -> tuple[torch.Tensor, ...]:
        (x,) = state
        eps_hat = networks.eps_hat(x, 0.05)
        length = 0.05 / (1 + eps_hat.square().mean(dim=(1, 2, 3), keepdim=True))
        return (x - length * eps_hat + 0.01 * noise.z(k, x),)


# %%
x, y = load_images("cifar10-20", limit=2)
score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
for method in (Tethered(pull=0.1), Careful()):
    defense = coupfast.PurifiedClassifier(coupfast.Purifier(score, method=method), classifier, seed=0)
    certificate = coupfast.check_gradient(defense, x, images=1, draws=0, directions=0)
    print(f"{type(method).__name__}: {certificate.verdict}, engine {defense.purifier.engine}")
    assert certificate.holds

# %% [markdown]
# On the command line, from a file that can be imported: `coupfast purify IN --out DIR --method own_method:Tethered
# --pull 0.1`.
