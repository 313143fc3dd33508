"""How long the parts of a step must take on a GPU at least: `python bench/roofline.py [--markdown]`. Arithmetic, not measured.

Counts every ATen operation of the paper's networks (DDPM++ deep, WRN-28-10) as PyTorch runs them, forwards and backwards, on
tensors without data: multiply-adds, and bytes read and written where every operation reads its arguments from memory once and
writes its result once. An operation can take no less than its FLOP over the datasheet's float32 rate, nor than its bytes over
the datasheet's bandwidth; the larger of the two is its time here.

What that leaves out: launching kernels, caches, algorithms with fewer multiplications (Winograd), tensor cores, and that no
kernel reaches a datasheet's figures. Fusion makes the elementwise part and the group norms smaller than stated, which is as
PyTorch's own operations move their tensors. `matmuls` are those of attention, of the time embedding and of the classifier's
last layer; attention's projections are 1 × 1 convolutions here.

A forward step is one pass of the score network, one forward and one backward pass of the classifier, and the guided step. A
backward step, slopes kept, is one forward and one backward pass of the score network, J v and Jᵀ u of the classifier (counted
as its forward and backward pass), and the guided step without noise.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import tables
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from coupfast.models import registry

MARK = "arithmetic, not measured"
PARTS = ("convolutions", "matmuls", "group norms", "elementwise", "guided step")
BATCHES = (1, 8, 64)

_PART_OF = {
    torch.ops.aten.convolution: "convolutions",
    torch.ops.aten.convolution_backward: "convolutions",
    torch.ops.aten.mm: "matmuls",
    torch.ops.aten.addmm: "matmuls",
    torch.ops.aten.bmm: "matmuls",
    torch.ops.aten.baddbmm: "matmuls",
    torch.ops.aten.native_group_norm: "group norms",
    torch.ops.aten.native_group_norm_backward: "group norms",
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A datasheet's figures: float32 outside of tensor cores in FLOP per second, and bytes per second."""

    name: str
    flop_per_second: float
    bytes_per_second: float
    source: str


GPUS = (
    Gpu("A100 SXM 80GB", 19.5e12, 2.039e12, "NVIDIA A100 Tensor Core GPU datasheet"),
    Gpu("H100 SXM", 67e12, 3.35e12, "NVIDIA H100 Tensor Core GPU datasheet"),
    Gpu("H200", 67e12, 4.8e12, "NVIDIA H200 Tensor Core GPU datasheet"),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """One operation: `image_flop` and `image_bytes` for each image, `weight_bytes` for all of them together."""

    part: str
    image_flop: int
    image_bytes: int
    weight_bytes: int

    def seconds(self, gpu: Gpu, batch: int) -> float:
        moved = batch * self.image_bytes + self.weight_bytes
        return max(batch * self.image_flop / gpu.flop_per_second, moved / gpu.bytes_per_second)


class Tally(TorchDispatchMode):
    """The work of everything that runs inside, at one image. Views are none; weights are what lies in these tensors."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.work: list[Work] = []
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        made = {storage: size for storage, size in outputs.items() if storage not in inputs or func._schema.is_mutable}
        if made:
            packet = func.overloadpacket
            count = flop_registry.get(packet)
            self.work.append(
                Work(
                    _PART_OF.get(packet, "elementwise"),
                    0 if count is None else count(*args, **(kwargs or {}), out_val=result),
                    sum(made.values()) + sum(size for storage, size in inputs.items() if storage not in self._weights),
                    sum(size for storage, size in inputs.items() if storage in self._weights),
                )
            )
        return result


def _tensors(values: Any) -> dict[int, int]:
    """Bytes by storage; of a tensor that repeats its values only those that there are."""
    found: dict[int, int] = {}
    for tensor in tree_leaves(values):
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            found[storage._cdata] = max(found.get(storage._cdata, 0), min(tensor.nbytes, storage.nbytes()))
    return found


def passes(network: nn.Module, *inputs: torch.Tensor) -> dict[str, list[Work]]:
    """`forward` and `backward` (with respect to the first input, frozen weights) of a network in eval mode, at one image."""
    weights = [*network.parameters(), *network.buffers()]
    x = inputs[0].detach().requires_grad_()
    with Tally(weights) as forward:
        y = network(x, *inputs[1:])
    v = torch.empty_like(y)
    with Tally(weights) as backward:
        torch.autograd.grad(y, x, v)
    return {"forward": forward.work, "backward": backward.work}


def paper_steps() -> dict[str, list[Work]]:
    """The work of a forward and a backward step of COUP with the paper's networks."""
    score, classifier = registry.skeleton("score", "cifar10-ddpmpp-deep"), registry.skeleton("classifier", "wrn-28-10")
    with torch.device("meta"):
        x, label = torch.empty(1, 3, 32, 32), torch.empty(1)
    score, classifier = (network.eval().requires_grad_(False) for network in (score, classifier))
    of_score, of_classifier = passes(score, x, label), passes(classifier, x)
    # Reads x, ε̂ and g (v, u and w), writes one of them; four products and three sums (three and two).
    update = [Work("guided step", flop * x.numel(), 4 * x.nbytes, 0) for flop in (7, 5)]
    both = of_classifier["forward"] + of_classifier["backward"]
    return {
        "forward": of_score["forward"] + both + update[:1],
        "backward": of_score["forward"] + of_score["backward"] + both + update[1:],
    }


def rows(steps: dict[str, list[Work]]) -> list[dict[str, Any]]:
    """For every GPU, batch and step: seconds of a step of the batch at least, and each part's share of them."""
    table = []
    for gpu in GPUS:
        for batch in BATCHES:
            for name, work in steps.items():
                of_part = {part: sum(w.seconds(gpu, batch) for w in work if w.part == part) for part in PARTS}
                total = sum(of_part.values())
                shares = {part: seconds / total for part, seconds in of_part.items()}
                table.append({"gpu": gpu.name, "batch": batch, "step": name, "seconds": total, "shares": shares, "basis": MARK})
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else f"{100 * share:.1g} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    markdown = parser.parse_args().markdown
    steps = paper_steps()
    print(f"COUP, DDPM++ deep and WRN-28-10, float32, operation by operation; {MARK}.\n")
    for name, work in steps.items():
        macs, moved = sum(w.image_flop for w in work) / 2e9, sum(w.image_bytes for w in work) / 2**20
        weights = sum(w.weight_bytes for w in work) / 2**20
        counts = f"{len(work)} operations, {macs:.1f} GMAC and {moved:.0f} MiB an image, {weights:.0f} MiB of weights"
        print(f"{name} step: {counts} ({MARK})")
    for gpu in GPUS:
        rates = f"{gpu.flop_per_second / 1e12:g} TFLOP/s float32, {gpu.bytes_per_second / 1e12:g} TB/s"
        print(f"{gpu.name}: {rates} ({gpu.source})")
    print()
    table = [("GPU", "batch", "step", "ms at least", *PARTS, "basis")]
    for row in rows(steps):
        shares = (_percent(row["shares"][part]) for part in PARTS)
        table.append((row["gpu"], str(row["batch"]), row["step"], f"{1e3 * row['seconds']:.2f}", *shares, row["basis"]))
    print(*tables.lines(table, markdown=markdown), sep="\n")


if __name__ == "__main__":
    main()
