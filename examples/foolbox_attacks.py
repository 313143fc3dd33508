# %% [markdown]
# # Foolbox on a purified classifier
#
# Needs: foolbox

# %%
import foolbox

import coupfast
from coupfast.data import load_images

x, y = load_images("cifar10-20", limit=3)
score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
defense = coupfast.PurifiedClassifier(coupfast.Purifier(score, classifier, t=0.06, num_steps=4), classifier, seed=0)

# %%
model = foolbox.PyTorchModel(defense, bounds=(0, 1), device="cpu")
attack = foolbox.attacks.LinfPGD(steps=3)
_, x_adv, fooled = attack(model, x, y, epsilons=8 / 255)
print(f"{int(fooled.sum())} of {len(x)} fooled; largest change {255 * (x_adv - x).abs().max():.1f}/255")

# %% [markdown]
# Foolbox's verdict is of one draw. On fresh draws:

# %%
logits = [defense(x_adv, draw=1000 + k) for k in range(4)]
print("right on each of four fresh draws:", [int((each.argmax(1) == y).sum()) for each in logits])
