"""Evaluating defenses: attacks cut into units of work, a ledger that survives, verdicts and how sure they are.

    spec       what to run, as a value; the networks and the configuration that follow from it
    runs       start or continue a run
    attacks/   one class an attack
    units      which units of work there are and which can start
    worker     does one unit
    pools      where workers are: in this process, in several, on a Ray cluster (`cluster`)
    ledger     what is done, on disk
    runner     hands units to workers and results to the ledger
    protocols  verdicts over images and draws
    plan       what a run will take
    report     what came out
"""

from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.runs import evaluate
from coupfast.evaluation.spec import Spec

__all__ = ["Ledger", "Spec", "evaluate"]
