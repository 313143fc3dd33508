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
EOT_ASSUMED = (
    "The paper does not say how many draws of the noise its APGD-CE averages a gradient over: 20, as AutoAttack's rand has."
)


def threat(norm: str) -> dict[str, Any]:
    """The ball of an attack."""
    return {"norm": norm, "eps": RADII[norm]}


def defense(method: str, norm: str = "Linf") -> dict[str, Any]:
    """A method at the paper's time for a norm."""
    return {"method": method} if method == "none" else {"method": method, "t": TIMES[norm]}
