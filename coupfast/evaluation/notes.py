"""What is kept beside a run's results: what it was to take, and a certificate of the gradient that its attack follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.plan import Plan, plan
from coupfast.evaluation.spec import Spec
from coupfast.gradient_check import check_gradient


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


def certificate(spec: Spec, images: int, *, progress: bool = False) -> dict[str, Any]:
    """A certificate of a run's gradient, of its first images, as JSON has it.

    Raises:
        ValueError: if the defense is no purification.
    """
    device = str(torch.device(spec.device))
    defense = spec.build(device)
    if defense.purified is None:
        raise ValueError("a certificate is of a purification's gradient, and this defense is no coupfast.PurifiedClassifier")
    x, y = spec.load()
    found = check_gradient(defense.purified, x[:images].to(device), y[:images], images=images, progress=progress)
    return found.to_dict()


def predict(
    spec: Spec, *, workers: int, price: float | None, resumed: Path | None, say: Callable[[Plan], object]
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
