# %% [markdown]
# # A defense under RobustBench's data and model conventions
#
# Needs: robustbench
#
# RobustBench's classifiers take images in [0, 1] and return logits, as coupfast's do, so they work behind a purifier,
# and a purified classifier works in RobustBench's own functions. `coupfast.load_classifier("Standard")` fetches
# RobustBench's weights; here its architecture gets random ones, so that nothing is fetched.

# %%
import coupfast
from coupfast.data import load_images
from coupfast.models.robustbench_import import import_robustbench

robustbench = import_robustbench()
from robustbench.utils import clean_accuracy  # noqa: E402

x, y = load_images("cifar10-20", limit=4)
score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
defense = coupfast.PurifiedClassifier(coupfast.Purifier(score, classifier, t=0.06, num_steps=4), classifier, seed=0)

# %%
print(f"clean accuracy by RobustBench: {clean_accuracy(defense, x, y, batch_size=4):.2f}")

# %% [markdown]
# The same for a network in RobustBench's architecture behind the same purifier, without guidance:

# %%
standard = coupfast.load_classifier("wrn-16-2", weights="random", seed=0)
behind = coupfast.PurifiedClassifier(coupfast.Purifier(score, method="reverse-sde", t=0.06, num_steps=4), standard, seed=0)
print(f"of random weights: {clean_accuracy(behind, x, y, batch_size=4):.2f}")

# %% [markdown]
# `robustbench.benchmark(defense, dataset="cifar10", threat_model="Linf", eps=8 / 255)` runs AutoAttack `standard` on
# the CIFAR-10 test set, which it downloads. A randomized defense wants AutoAttack `rand`: `coupfast.evaluate(defense,
# x, y, attack="autoattack-rand")`.
