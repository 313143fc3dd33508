"""How one step and its transpose run: three engines behind one protocol.

    protocol    what an engine is
    eager       PyTorch, operation by operation; the others are checked against it
    cpu         this project's C++ kernels
    cuda        compiled networks, this project's kernels, CUDA graphs

They share `rows` (the columns of a table beside the first four); the cpu and cuda engines also `partition` (what of a network
its labels alone decide). Around them, `networks` freezes and checks what an engine is bound to, `precision` sets which
arithmetic float32 operations take, `memory` counts what is allocated and what is free, and `rates` is what this machine can do
at best.
"""

from coupfast.engine.protocol import BoundEngine, Cotangent, Keep, Program, State, StepMemory
from coupfast.noise import CounterNoise, Noise, ReplayedNoise

__all__ = ["CounterNoise", "Cotangent", "Keep", "Noise", "Program", "BoundEngine", "ReplayedNoise", "State", "StepMemory"]
