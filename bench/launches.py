"""How many operations a guided step and its transpose start on a GPU, counted from graphs: `python bench/launches.py`.

Counted, not measured: no GPU is needed or used. Every operation that is not a mere view is at least one kernel, and one launch
where operations are started one by one.

* "PyTorch": as the eager engine runs a step, operation by operation, its noise by the definition;
* "flat": the pieces of the CUDA engine, as `engine_options={"compile": False, "graphs": False, "triton": False}` runs them;
* "flat, fused": the same with every 3x3 convolution and group norm in this project's kernels, before a compiler fuses the rest;
* "graph": what the host launches with graphs: the recording, and the copy of the state that the caller keeps; backwards also
  that of the state that the caller has kept.

Backwards at slopes that were kept; a recording that rebuilds them has the classifier's forward operations in it, too.

`--bytes` counts what the score network's evaluation and its product with the transpose move, where every operation reads its
arguments from memory once and writes its results once; weights, and what a kernel keeps in the cache between its own parts, are
not counted. "norms inside": every convolution that can norm what it reads does so.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from cases import load_networks, positive
from roofline import Tally
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from coupfast import Purifier
from coupfast.engine import CounterNoise
from coupfast.engine.cuda import BoundCudaEngine
from coupfast.engine.cuda.flat import VIEWS
from coupfast.engine.cuda.networks import CudaNetworks
from coupfast.engine.cuda.program import CudaProgram
from coupfast.engine.cuda.substitution import INSIDE, Conv3x3Choice
from coupfast.engine.eager import EagerProgram
from coupfast.engine.networks import frozen
from coupfast.guidance import Guidance
from coupfast_kernels.convolution.gpu import ALGORITHMS

GRAPH = (2, 3)  # its launch, and those of the copies


def _direct(*shape: int) -> str:
    return "ieee"


def _inside(*shape: int) -> str:
    norm = len(shape) == 6
    return INSIDE if norm else "winograd" if ALGORITHMS["winograd"].suits(*shape) else "ieee"


#: Which convolutions are this project's, and its norms with them.
WAYS: dict[str, Conv3x3Choice | None] = {"flat": None, "flat, fused": _direct, "flat, fused, norms inside": _inside}


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


def program(network: str, batch: int, *, way: str = "flat, fused", seed: int = 0) -> CudaProgram:
    """The CUDA engine's program on the CPU, neither compiled nor captured, in one of `WAYS`."""
    choose = WAYS[way]
    networks = CudaNetworks(*_parts(network, batch, seed), choose=choose, fuse_norms=choose is not None)
    return BoundCudaEngine(networks).for_batch(batch)


def bytes_moved(network: str, batch: int, way: str, seed: int = 0) -> dict[str, float]:
    """Of an image, by piece of the score network; no operation runs."""
    found, pieces = {}, program(network, batch, way=way, seed=seed).networks.pieces
    for name in ("score", "score vjp"):
        graph = pieces.make(name, batch)
        with FakeTensorMode() as mode, torch.no_grad():
            inputs = [mode.from_tensor(tensor) for tensor in graph.example_inputs()]
            with Tally(inputs[graph.varying :]) as tally:
                graph.module(*inputs)
        found[name] = sum(work.image_bytes for work in tally.work) / batch
    return found


def rows(network: str, batch: int, seed: int = 0) -> list[dict[str, Any]]:
    """Operations of a forward and of a backward step, by how they are run."""
    parts = _parts(network, batch, seed)
    counts = {"PyTorch": _eager(EagerProgram(*parts), parts[3])}
    for name in ("flat", "flat, fused"):
        counts[name] = _flat(program(network, batch, way=name, seed=seed))
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
    parser.add_argument("--bytes", action="store_true", help="what the score network moves, instead of operations")
    options = parser.parse_args(arguments)
    print("counted from graphs, not measured\n")
    if options.bytes:
        print("| MiB an image | evaluation | transpose |\n|---|---|---|")
        for way in WAYS:
            moved = bytes_moved(options.network, options.batch, way)
            print(f"| {way} | {' | '.join(f'{size / 2**20:.1f}' for size in moved.values())} |")
        return 0
    print("| operations a step | forward | backward |\n|---|---|---|")
    for row in rows(options.network, options.batch):
        print(f"| {row['how']} | {row['forward']} | {row['backward']} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
