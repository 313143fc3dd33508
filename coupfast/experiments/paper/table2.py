"""Table 2."""

from coupfast.experiments.paper import autoattack
from coupfast.experiments.tables import Published

EXPERIMENT = autoattack.experiment(
    "table2",
    "L2",
    "Table 2",
    "512 images of CIFAR-10, WRN-28-10, t* = 0.075 in 75 steps, L2 0.5, the gradient of a continuous adjoint, one evaluation",
    {"none": Published(96.09, 0.0), "diffpure": Published(91.03, 78.58), "coup": Published(92.58, 83.13)},
)
