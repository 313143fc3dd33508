"""Table 2."""

from coupfast.evaluation.report.published import TABLE_2
from coupfast.experiments.paper import autoattack

EXPERIMENT = autoattack.experiment(
    "table2",
    "L2",
    "Table 2",
    "512 images of CIFAR-10, WRN-28-10, t* = 0.075 in 75 steps, L2 0.5, the gradient of a continuous adjoint, one evaluation",
    TABLE_2,
)
