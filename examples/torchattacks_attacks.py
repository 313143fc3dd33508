# %% [markdown]
# # torchattacks on a purified classifier
#
# Needs: torchattacks
#
# torchattacks pins an old `requests`: `pip install --no-deps torchattacks` leaves yours alone. The wheel of 3.5.1 also
# has a package `robustbench`, which overwrites RobustBench's: use an environment without that.

# %%
import torchattacks

import coupfast
from coupfast.data import load_images

x, y = load_images("cifar10-20", limit=3)
score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
defense = coupfast.PurifiedClassifier(coupfast.Purifier(score, classifier, t=0.06, num_steps=4), classifier, seed=0)

# %%
x_adv = torchattacks.PGD(defense, eps=8 / 255, alpha=2 / 255, steps=3)(x, y)
right = (defense(x_adv).argmax(dim=1) == y).tolist()  # on one fresh draw
print(f"largest change {255 * (x_adv - x).abs().max():.1f}/255; right: {right}")
