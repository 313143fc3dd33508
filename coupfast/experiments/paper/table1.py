"""Table 1."""

from coupfast.experiments.paper import autoattack
from coupfast.experiments.tables import Published

EXPERIMENT = autoattack.experiment(
    "table1",
    "Linf",
    "Table 1",
    "512 images of CIFAR-10, WRN-28-10, t* = 0.1 in 100 steps, Linf 8/255, the gradient of a continuous adjoint, one "
    "evaluation",
    {"none": Published(96.09, 0.0), "diffpure": Published(89.02, 70.64), "coup": Published(90.04, 73.05)},
)
