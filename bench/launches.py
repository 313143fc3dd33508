"""How many operations a guided step and its transpose start on a GPU, counted from graphs: `python bench/launches.py`.

Counted, not measured: no GPU is needed or used. Every operation that is not a mere view is at least one kernel, and one launch
where operations are started one by one.

* "PyTorch": as the eager engine runs a step, operation by operation, its noise by the definition;
* "flat": the pieces of the CUDA engine, as `engine_options={"compile": False, "graphs": False, "triton": False}` runs them;
* "flat, fused": the same with every 3x3 convolution and group norm in this project's kernels, before a compiler fuses the rest;
* "graph": what the host launches with graphs: the recording, and the copy of the state that the caller keeps; backwards also
  that of the state that the caller has kept.

Backwards at slopes that were kept; a recording that rebuilds them has the classifier's forward operations in it, too.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from cases import load_networks, positive
from torch.utils._python_dispatch import TorchDispatchMode

from coupfast import Purifier
from coupfast.engine import CounterNoise
from coupfast.engine.cuda import BoundCudaEngine
from coupfast.engine.cuda.flat import VIEWS
from coupfast.engine.cuda.networks import CudaNetworks
from coupfast.engine.cuda.program import CudaProgram
from coupfast.engine.eager import EagerProgram
from coupfast.engine.networks import frozen
from coupfast.guidance import Guidance

GRAPH = (2, 3)  # its launch, and those of the copies


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func not in VIEWS
        return func(*args, **(kwargs or {}))


def _parts(network: str, batch: int, seed: int) -> tuple[Any, ...]:
    """What an engine's program is made of: networks, guidance, a table, states, and that guidance is differentiated."""
    networks = load_networks(network, device=torch.device("cpu"), score=None, classifier=None, seed=seed)
    score, classifier = frozen(networks.score), frozen(networks.classifier)
    table = Purifier(score, classifier, engine="eager", num_steps=2).recipe.table
    size, channels = score.image_size, score.channels
    x = torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return score, Guidance(classifier, x), table, x, True


def program(network: str, batch: int, *, fused: bool = True, seed: int = 0) -> CudaProgram:
    """The CUDA engine's program on the CPU, neither compiled nor captured; `fused`: with all of this project's kernels."""
    choose = (lambda *shape: "ieee") if fused else None
    networks = CudaNetworks(*_parts(network, batch, seed), choose=choose, fuse_norms=fused)
    return BoundCudaEngine(networks).for_batch(batch)


def rows(network: str, batch: int, seed: int = 0) -> list[dict[str, Any]]:
    """Operations of a forward and of a backward step, by how they are run."""
    parts = _parts(network, batch, seed)
    counts = {"PyTorch": _eager(EagerProgram(*parts), parts[3])}
    for name, fused in (("flat", False), ("flat, fused", True)):
        counts[name] = _flat(program(network, batch, fused=fused, seed=seed))
    counts["graph"] = GRAPH
    return [
        {"network": network, "batch": batch, "how": how, "forward": forward, "backward": backward}
        for how, (forward, backward) in counts.items()
    ]


def _eager(program: EagerProgram, x: torch.Tensor) -> tuple[int, int]:
    zeros = torch.zeros(len(x), dtype=torch.int64)
    noise = CounterNoise(0, zeros, zeros)
    program.step(0, x, noise, "slopes")  # traces the classifier
    with _Counter() as forward:
        _, saved = program.step(0, x, noise, "slopes")
    with _Counter() as backward:
        program.step_vjp(0, x, saved, x)
    return forward.count, backward.count


def _flat(program: CudaProgram) -> tuple[int, int]:
    counts = []
    forward, backward = (lambda: program._step(True)), (lambda: program._transpose(True, rebuilds=False))
    for work, step in ((forward, program.step_index), (backward, program.step_back)):
        work()  # makes pieces and buffers
        step.zero_()
        with torch.no_grad(), _Counter() as counter:
            work()
        counts.append(counter.count)
    return counts[0], counts[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["paper", "tiny"], default="paper", help="(default: the paper's)")
    parser.add_argument("--batch", type=positive, default=1, help="images (default 1; it changes no count)")
    options = parser.parse_args(arguments)
    print("counted from graphs, not measured\n")
    print("| operations a step | forward | backward |\n|---|---|---|")
    for row in rows(options.network, options.batch):
        print(f"| {row['how']} | {row['forward']} | {row['backward']} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
