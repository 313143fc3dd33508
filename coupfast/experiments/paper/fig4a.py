"""Fig. 4a: robust and clean accuracy over the purification time."""

from __future__ import annotations

import functools
from typing import Any

from coupfast.experiments.defenses import NAMES
from coupfast.experiments.paper import sweep

_TIMES = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15)


def _at(method: str, t: float) -> dict[str, Any]:
    return {"method": method, "t": t}


EXPERIMENT = sweep.experiment(
    name="fig4a",
    place="Fig. 4a",
    title="accuracy over the purification time",
    asks="How do robust and clean accuracy depend on t*, from too little purification to too much?",
    setting="COUP under APGD-CE in Linf 8/255 over t*; curves without numbers, and of the best t* the number is not legible",
    across="purification time t*",
    points=_TIMES,
    lines={NAMES[method]: functools.partial(_at, method) for method in ("coup", "reverse-sde")},
    tried="The times that were tried are not legible: 0.025 to 0.15.",
)

