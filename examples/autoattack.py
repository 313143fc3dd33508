# %% [markdown]
# # AutoAttack on a purified classifier
#
# Needs: pyautoattack
#
# A `PurifiedClassifier` is an `nn.Module` from images to logits whose gradient is exact, so any attack for PyTorch
# runs on it unchanged. Each call takes a fresh draw of the noise, however often the attack reseeds torch.

# %%
import torch
from pyautoattack.autopgd_base import APGDAttack

import coupfast
from coupfast.data import load_images

x, y = load_images("cifar10-20", limit=3)
score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
defense = coupfast.PurifiedClassifier(coupfast.Purifier(score, classifier, t=0.06, num_steps=4), classifier, seed=0)

# %%
attack = APGDAttack(defense, n_iter=3, norm="Linf", eps=8 / 255, loss="ce", eot_iter=2, seed=0, device="cpu")
x_adv = attack.perturb(x, y).detach()
with torch.no_grad():
    right = defense(x_adv).argmax(dim=1) == y
print(f"{int(right.sum())} of {len(x)} still right; largest change {255 * (x_adv - x).abs().max():.1f}/255")

# %% [markdown]
# `coupfast.evaluate` runs the same code, keeps a ledger, goes on after a kill and judges on draws that no attack saw.

# %%
result = coupfast.evaluate(defense, x, y, attack="autoattack-rand", iterations=2, eot_iter=2, draws=4, shard=3)
print(result.table())
