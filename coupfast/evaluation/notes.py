"""What is kept beside a run's results: what it was to take, and a certificate of the gradient that its attack follows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coupfast.evaluation import journal
from coupfast.evaluation.configuration import environment, images_sha256
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.plan import Plan, plan
from coupfast.evaluation.recorder import Steps
from coupfast.evaluation.spec import Spec
from coupfast.gradient_check import check_gradient
from coupfast.tape import kept_on


def certified_by_default(spec: Spec) -> int:
    """Of how many images an evaluation's gradient is certified: 1 where the attack follows one through a purification."""
    follows = any(attack.cost().gradient for attack in spec.stages().values())
    return int(spec.settings() is not None and follows)


def check_certified(spec: Spec, images: int) -> None:
    """ValueError if the gradient of so many images cannot be certified."""
    if images < 0:
        raise ValueError(f"`--certify` is a number of images, got {images}")
    if images and spec.purifier is None:
        raise ValueError("a certificate is of a purification's gradient; with --method none there is none")


def certificate(spec: Spec, images: int, *, folder: Path | None = None, progress: bool = False) -> dict[str, Any]:
    """A certificate of a run's gradient, of its first images, as JSON has it.

    Args:
        folder: The run's. The certificate is then of the purification as the run has it; and where it is stopped, the next one
            there goes on: what is lost is the pass that was under way (of a couple of dozen, see `check_gradient`), and of one
            in float32 a step.

    Raises:
        ValueError: if the defense is no purification.
    """
    device = torch.device(spec.device)
    defense = spec.build(str(device))
    if defense.purified is None:
        raise ValueError("a certificate is of a purification's gradient, and this defense is no coupfast.PurifiedClassifier")
    x, y = (tensor[:images] for tensor in spec.load())
    with contextlib.ExitStack() as stack:
        if folder is not None:
            with Ledger(folder, read_only=True) as ledger:
                defense.settle(ledger.configuration["defense"])
            about = {"images": images_sha256(x), "labels": y.tolist(), "seed": defense.purified.seed}
            about |= {"defense": defense.describe(), "environment": environment(device)}
            kept = journal.steps_path(folder, "certificate")
            steps = Steps(kept, about, device)
            stack.callback(steps.close)
            stack.enter_context(kept_on(steps))
        found = check_gradient(defense.purified, x.to(device), y, images=images, progress=progress).to_dict()
    if folder is not None:
        journal.remove(folder, "certificate")
    return found


def predict(
    spec: Spec, *, workers: int | str, price: float | None, resumed: Path | None, say: Callable[[Plan], object]
) -> dict[str, Any]:
    """What a run is to take, as JSON has it.

    Args:
        spec: The run's.
        workers: That share it.
        price: Of a worker and hour.
        resumed: Its folder, if it has begun.
        say: Told of the plan.

    Raises:
        ValueError: if units are done already.
    """
    if resumed is not None:
        with Ledger(resumed, read_only=True) as ledger:
            if ledger.done():
                raise ValueError(f"the run in {resumed} has begun without a plan, and one made now would predict nothing")
    found = plan(spec, workers=workers, price=price)
    say(found)
    return found.to_dict()
