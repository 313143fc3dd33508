"""The cuda engine: networks as flat compiled graphs, kernels of this project where they are better, a step as one CUDA graph.

A step consists of up to six `pieces`: flat graphs of tensors (`flat`) of the networks' traces (`traced`), in which this
project's kernels take the place of convolutions and group norms (`substitution`) where `calibration` found them faster. Each is
compiled, compared with PyTorch once (`check`), and all pieces of a step are captured together with the guided step (`capture`).
`networks` holds what all batch sizes share, `program` takes the steps of one bucket of them (`columns`, where a table has more
than four), `bound` makes one for each; `support` says where the engine runs.
"""

from coupfast.engine.cuda.bound import BoundCudaEngine, prepare
from coupfast.engine.cuda.options import Options
from coupfast.engine.cuda.support import unavailable
from coupfast.engine.precision import PRECISIONS

__all__ = ["PRECISIONS", "BoundCudaEngine", "Options", "prepare", "unavailable"]
