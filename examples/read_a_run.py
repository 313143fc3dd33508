# %% [markdown]
# # Read a run with pandas
#
# Needs: pandas
#
# A run's folder has a ledger (SQLite) and a file of images and logits for each unit. `Evaluation` opens it; `to_csv`
# and `to_dict` give what pandas reads.

# %%
import io
import tempfile
from pathlib import Path

import pandas

import coupfast
from coupfast.data import load_images

folder = Path(tempfile.mkdtemp()) / "run"
x, y = load_images("cifar10-20", limit=4)
score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
defense = coupfast.PurifiedClassifier(coupfast.Purifier(score, classifier, t=0.06, num_steps=4), classifier, seed=0)
coupfast.evaluate(defense, x, y, attack="apgd-ce", iterations=2, draws=5, shard=2, out=folder).close()

# %% [markdown]
# ## Accuracies, a row for each kind of image and protocol

# %%
with coupfast.Evaluation(folder, x=x) as run:
    accuracies = pandas.read_csv(io.StringIO(run.to_csv()))
    images = run.to_dict()
    print(run.title)
print(accuracies[["kind", "protocol", "draws", "accuracy", "low", "high"]].to_string(index=False))

# %% [markdown]
# ## Every image and draw

# %%
attacked = pandas.DataFrame(images["attacked"]["predictions"])  # a row an image, a column a draw
attacked["label"] = images["labels"]
right = attacked.drop(columns="label").eq(attacked["label"], axis=0)
print(pandas.DataFrame({"right on draws": right.sum(axis=1), "right on the worst": right.all(axis=1)}))

# %% [markdown]
# ## Where the time went

# %%
with coupfast.Evaluation(folder, x=x) as run:
    units = pandas.DataFrame(
        {"unit": name, "stage": record.unit.stage, "seconds": record.seconds, "gradients": record.gradient_images}
        for name, record in run.ledger.done().items()
    )
print(units.groupby("stage", sort=False)[["seconds", "gradients"]].sum())
