"""Fig. 4b: robust and clean accuracy over the guidance scale."""

from __future__ import annotations

from typing import Any

from coupfast.experiments.defenses import defense
from coupfast.experiments.paper import sweep

_SCALES = (0.0, 0.5, 1.0, 2.0, 4.0)


def _at(scale: float) -> dict[str, Any]:
    # λ = 0 and λ = 1 as other figures have them, so that there is one run of each.
    usual = {0.0: defense("reverse-sde"), 1.0: defense("coup")}
    return usual.get(scale, {**defense("coup"), "guidance_scale": scale})


EXPERIMENT = sweep.experiment(
    name="fig4b",
    place="Fig. 4b",
    title="accuracy over the guidance scale",
    asks="How do robust and clean accuracy depend on λ? At λ = 0 there is no guidance.",
    setting="COUP under APGD-CE in Linf 8/255 over λ, best where score and classifier weigh the same; curves without numbers",
    across="guidance scale λ",
    points=_SCALES,
    lines={"COUP": _at},
    tried="The scales that were tried are not legible: 0 to 4. The same weight is λ = 1, and t* that of Linf.",
)
