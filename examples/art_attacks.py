# %% [markdown]
# # The Adversarial Robustness Toolbox on a purified classifier
#
# Needs: art

# %%
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier

import coupfast
from coupfast.data import load_images

x, y = load_images("cifar10-20", limit=3)
score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
defense = coupfast.PurifiedClassifier(coupfast.Purifier(score, classifier, t=0.06, num_steps=4), classifier, seed=0)

# %%
wrapped = PyTorchClassifier(
    defense,
    loss=torch.nn.CrossEntropyLoss(),
    input_shape=(3, 32, 32),
    nb_classes=10,
    clip_values=(0.0, 1.0),
    device_type="cpu",
)
attack = ProjectedGradientDescent(wrapped, eps=8 / 255, eps_step=2 / 255, max_iter=3, verbose=False)
x_adv = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
right = (defense(x_adv).argmax(dim=1) == y).tolist()  # on one fresh draw
print(f"largest change {255 * (x_adv - x).abs().max():.1f}/255; right: {right}")
