"""The paper's experiments: each is data, and one command runs any of them at any size.

scale        on which networks and images, and with how much of the published attack; what weights are missing
experiment   what an experiment is
making       its runs, each made once for all experiments, and what is measured beside them
defenses     the paper's methods and threats; images: what purifications make of attacked images; two_gaussians: toy data
tables, figures, pages  what came out, to read
announced    what is said before: Holm's correction, and what so many images can show
paper/       the experiments, one a file; study: one of this project's
"""

from __future__ import annotations

import importlib

from coupfast.experiments import study
from coupfast.experiments.experiment import Case, Experiment, Results
from coupfast.experiments.making import check, make
from coupfast.experiments.pages import Page
from coupfast.experiments.scale import DEFAULTS, QUICK, ROLES, SETS, MissingNetworks, Network, Scale

_MODULES = (
    *("table1", "table2", "table2c", "table3", "cifar100", "fig2a", "fig2b", "fig3b", "fig4a", "fig4b", "fig5", "fig6"),
    *("tablee1", "table4", "appendix_b_c"),
)
_FOUND = (*(importlib.import_module(f"{__name__}.paper.{name}").EXPERIMENT for name in _MODULES), study.EXPERIMENT)
#: All experiments by name; a new one is a file with an `EXPERIMENT` and one entry in `_MODULES`.
EXPERIMENTS: dict[str, Experiment] = {found.name: found for found in _FOUND}

__all__ = [
    "DEFAULTS",
    "EXPERIMENTS",
    "QUICK",
    "ROLES",
    "SETS",
    "Case",
    "Experiment",
    "MissingNetworks",
    "Network",
    "Page",
    "Results",
    "Scale",
    "check",
    "make",
]
