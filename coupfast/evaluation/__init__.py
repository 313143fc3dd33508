"""Evaluating defenses: attacks cut into units of work, a ledger that survives, verdicts and how sure they are.

spec           what to run, as a value
attacks/       one class an attack; its fields are its knobs
suites         which attacks run one after the other
building       how a worker comes by its defense; purification: the purifier of one that is built here
metered        a defense whose noise can be set and whose work is counted; views: what else can be seen of one
launch         start or continue a run
checks         what must fit before any work; gradients: whether an attack had any to follow
configuration  all that results depend on; starts: the adversarial images of an earlier run that attacks begin from
units          which units of work there are and which can start
dispatch       hands units to workers and results to the ledger; progress says how far it is
worker         does one unit; recorder: what was answered once is not computed again, and journal has it on disk
pools          where workers are: in this process, in several, on a Ray cluster (`cluster`)
ledger         what is done, on disk; notes: what is kept beside it
protocols      verdicts over images and draws
certify        certified radii of denoised smoothing
result         what came out, as an object
plan           what a run will take
report/        what came out, to read; drawing: figures by Matplotlib
"""

from coupfast.evaluation.attacks import Attack, Cost, Result, count, knob
from coupfast.evaluation.certify import Certification, certify
from coupfast.evaluation.launch import evaluate
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.result import Evaluation
from coupfast.evaluation.spec import Spec
from coupfast.evaluation.suites import Suite

__all__ = [
    "Attack",
    "Certification",
    "Cost",
    "Evaluation",
    "Ledger",
    "Result",
    "Spec",
    "Suite",
    "certify",
    "count",
    "evaluate",
    "knob",
]
