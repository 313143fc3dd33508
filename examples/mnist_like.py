# %% [markdown]
# # Grey 28 × 28 images, two classes, everything trained here
#
# Nothing in coupfast knows CIFAR-10: sizes, channels and classes follow from your networks. Here are grey images of
# disks and squares, a classifier and a score network, both trained in a few seconds.

# %%
import math

import torch
from torch import nn

import coupfast
from coupfast.sde import VPSDE


# %%
def shapes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey images in [0, 1], shape (count, 1, 28, 28), and labels: 0 for a disk, 1 for a square."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (count,), generator=generator)
    centre = 10 + 8 * torch.rand(count, 2, 1, 1, generator=generator)
    size = (4 + 4 * torch.rand(count, 1, 1, generator=generator))
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    dy, dx = rows - centre[:, 0], columns - centre[:, 1]
    distance = torch.where(y[:, None, None] == 0, torch.hypot(dy, dx), torch.maximum(dy.abs(), dx.abs()))
    return torch.sigmoid(2 * (size - distance))[:, None], y


# %%
torch.manual_seed(0)
classifier = nn.Sequential(
    *(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(256, 2)),
)
optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
for step in range(60):
    x, y = shapes(64, step)
    loss = nn.functional.cross_entropy(classifier(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
classifier.eval()

# %% [markdown]
# A score network learns the noise in x_t = sqrt(ᾱ) x_0 + σ ε, with x_0 in [-1, 1]. `VPSDE` has ᾱ and σ.


# %%
class Score(nn.Module):
    image_size, channels = 28, 1

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first, self.time = nn.Conv2d(1, width, 5, padding=2), nn.Linear(1, width)
        self.middle, self.last = nn.Conv2d(width, width, 5, padding=2), nn.Conv2d(width, 1, 5, padding=2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = nn.functional.silu(self.first(x) + self.time(labels[:, None] / 999)[:, :, None, None])
        return self.last(nn.functional.silu(self.middle(h)))


# %%
sde, score = VPSDE(), Score()
optimizer = torch.optim.Adam(score.parameters(), lr=3e-3)
for step in range(80):
    x, _ = shapes(32, 1000 + step)
    t = 0.001 + 0.2 * torch.rand(len(x))
    alpha_bar = torch.exp(-0.5 * (sde.beta_max - sde.beta_min) * t**2 - sde.beta_min * t)[:, None, None, None]
    eps = torch.randn_like(x)
    loss = (score((2 * x - 1) * alpha_bar.sqrt() + (1 - alpha_bar).sqrt() * eps, 999 * t) - eps).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"error of the predicted noise: {math.sqrt(loss.item()):.2f} (1 would be no prediction at all)")
score.eval()

# %%
x, y = shapes(8, 5000)
purifier = coupfast.Purifier(coupfast.load_score(score), classifier, t=0.06, num_steps=6)
defense = coupfast.PurifiedClassifier(purifier, classifier)
result = coupfast.evaluate(defense, x, y, attack="pgd-eot", iterations=3, eot_iter=2, eps=0.2, draws=5, shard=8)
print(result.table())
