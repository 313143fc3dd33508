"""Table 1."""

from coupfast.evaluation.report.published import TABLE_1
from coupfast.experiments.paper import autoattack

EXPERIMENT = autoattack.experiment(
    "table1",
    "Linf",
    "Table 1",
    "512 images of CIFAR-10, WRN-28-10, t* = 0.1 in 100 steps, Linf 8/255, the gradient of a continuous adjoint, one "
    "evaluation",
    TABLE_1,
)
