# %% [markdown]
# # Evaluate networks of your own
#
# You have a classifier and a network that predicts noise, both plain PyTorch modules. This goes from there to a
# verdict. The networks here are random and tiny, so that it runs in seconds; put yours in their place.

# %%
import torch
from torch import nn

import coupfast

# %% [markdown]
# ## A classifier
#
# Any module from images in [0, 1], shape (batch, channels, height, width), to logits. If yours wants normalised
# images, normalise in its `forward`.


# %%
class Classifier(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        convolutions = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 32, 3, stride=2)
        self.features = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU())
        self.head = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - 0.5) / 0.25
        return self.head(self.features(x).mean(dim=(2, 3)))


# %% [markdown]
# ## A score network
#
# Any module that is called with states in the [-1, 1] scale and `labels` = 999 t, a float for each image, and returns
# the noise that it sees in them. `load_score` adapts others: `prediction="v_prediction"` or `"sample"`,
# `labels="rounded"` for a table of time steps, `learned_variance=True`. `coupfast.Purifier` says so if the answer
# cannot be a noise.


# %%
class Score(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.time = nn.Linear(1, width)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.first(x) + self.time(labels[:, None] / 999)[:, :, None, None]
        return self.last(nn.functional.silu(h))


# %%
torch.manual_seed(0)
classifier, score = Classifier().eval(), coupfast.load_score(Score())
x, y = torch.rand(6, 3, 32, 32), torch.arange(6)

# %% [markdown]
# ## Purify, and look at the plan first

# %%
purifier = coupfast.Purifier(score, classifier, method="coup", t=0.05, num_steps=4)
print(purifier.plan(len(x), image_shape=(3, 32, 32)))
x_pure = purifier(x, seed=0)
print(f"purified images in [{x_pure.min():.2f}, {x_pure.max():.2f}], engine {purifier.engine}")

# %% [markdown]
# ## Is the gradient right?
#
# The certificate compares it with back-propagation in float64 through the definition.

# %%
defense = coupfast.PurifiedClassifier(purifier, classifier, seed=0)
certificate = coupfast.check_gradient(defense, x, images=1, draws=0, directions=1)
print(certificate)
assert certificate.holds

# %% [markdown]
# ## Attack and judge

# %%
result = coupfast.evaluate(defense, x, y, attack="apgd-ce", iterations=3, eps=8 / 255, draws=4, shard=6)
print(result.table())
