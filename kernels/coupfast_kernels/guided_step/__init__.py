"""One step of a table of linear rows: `definition`, and the same bits from one kernel in `gpu` and in `cpu`."""

from coupfast_kernels.guided_step.definition import guided_step_ref
from coupfast_kernels.guided_step.gpu import DeviceNoise, guided_step

__all__ = ["DeviceNoise", "guided_step", "guided_step_ref"]
