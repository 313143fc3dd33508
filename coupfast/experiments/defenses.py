"""The paper's defenses, threats and attacks, as keywords of a run at the published size."""

from __future__ import annotations

from typing import Any

#: Purification time by norm.
TIMES = {"Linf": 0.1, "L2": 0.075}
RADII = {"Linf": 8 / 255, "L2": 0.5}
#: The paper's names.
NAMES = {"none": "undefended", "diffpure": "DiffPure", "reverse-sde": "reverse SDE", "coup": "COUP"}
#: The paper does not say how many draws an APGD-CE gradient is averaged over.
APGD_CE: dict[str, Any] = {"attack": "apgd-ce", "eot_iter": 20}
#: Of every experiment of the paper that attacks or purifies networks.
LOST = (
    "The paper's text has lost its formulas: t*, radius and λ of this setting are not legible there. Taken are those of its "
    "published code: t* = 0.1 in Linf 8/255 and 0.075 in L2 0.5, λ = 1."
)
EOT_ASSUMED = (
    "The paper does not say how many draws of the noise its APGD-CE averages a gradient over: 20, as AutoAttack's rand has."
)


def threat(norm: str) -> dict[str, Any]:
    """The ball of an attack."""
    return {"norm": norm, "eps": RADII[norm]}


def defense(method: str, norm: str = "Linf") -> dict[str, Any]:
    """A method at the paper's time for a norm."""
    return {"method": method} if method == "none" else {"method": method, "t": TIMES[norm]}
