"""How one step and its transpose run: three engines behind one protocol.

    protocol    what an engine is
    eager       PyTorch, operation by operation; the others are checked against it
    cpu         this project's C++ kernels
    cuda        compiled networks, this project's kernels, CUDA graphs

The cpu and cuda engines share `partition` (what of a network its labels alone decide), `precision`, `memory` and `networks`.
"""

from coupfast.engine.protocol import BoundEngine, Cotangent, Keep, Program, State, StepMemory
from coupfast.noise import CounterNoise, Noise, ReplayedNoise

__all__ = ["CounterNoise", "Cotangent", "Keep", "Noise", "Program", "BoundEngine", "ReplayedNoise", "State", "StepMemory"]
