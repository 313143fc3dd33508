"""The cpu engine: Winograd convolutions with everything around them fused in, one call per network and step.

Networks are traced once (`coupfast.tracing`), cut into large operations (`fusion` and `attention` make `parts`), bound to
memory for each batch size (`network_program`: `passes` writes down `instructions`, `placement` gives their values places,
`regions` runs what remains PyTorch's) and run by the C++ kernels of `coupfast_kernels`. `networks` holds what all batch sizes
share, `program` takes the steps of one, `bound` makes one for each.

Which algorithm a convolution takes follows from its shape and the batch (`algorithms`): runs give the same bits whatever the
number of threads, and nothing depends on how a trial was timed. Where less memory is free than twice what all packed weights
take, the largest are left out, which is said and gives other bits; `options` makes that a choice that can be kept.
"""

from coupfast.engine.cpu.bound import BoundCpuEngine, prepare, unavailable
from coupfast.engine.cpu.options import Options

__all__ = ["BoundCpuEngine", "Options", "prepare", "unavailable"]
