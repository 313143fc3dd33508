"""A piece compared with what PyTorch finds before it is first used: nobody has tried just this GPU, driver and compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from coupfast.agreement import relative_difference, value_and_vjp
from coupfast.engine.eager import EagerProgram

# TF32 keeps 11 bits; in float32 a ReLU on its kink may fall on either side where slopes are not given.
AT_KINKS = 3e-2
ROUNDING = 1e-4

Piece = Callable[..., tuple[torch.Tensor, ...]]


def check_piece(
    name: str, piece: Piece, eager: EagerProgram, bucket: int, slopes: Sequence[torch.Tensor], *, tf32: bool
) -> None:
    """RuntimeError if a piece differs from what PyTorch finds by more than rounding does.

    Args:
        name: As `pieces` names it.
        eager: PyTorch's own step of the same networks.
        bucket: Images that the piece takes.
        slopes: Buffers that the piece will read slopes from: it is compiled for its inputs' strides.
        tf32: Whether products may be of 11 bits.
    """
    generator = torch.Generator().manual_seed(0)

    def random() -> torch.Tensor:
        made = torch.randn((bucket, *eager.image_shape), generator=generator, dtype=torch.float32)
        return made.to(eager.device).contiguous(memory_format=torch.channels_last)

    x, v = random(), random()
    as_given = x.contiguous()  # a network may ask for it, by a `view`
    if name.startswith("score"):
        # The last step's label: one that was read behind the trace's back would show.
        k = eager.table.num_steps - 1
        step = torch.full((), k, dtype=torch.int64, device=x.device)
        if name in ("score", "score keeping"):
            with torch.no_grad():
                wanted, inputs = eager.eps_hat(k, as_given), [x, step]
        else:
            wanted, inputs = value_and_vjp(lambda leaf: eager.eps_hat(k, leaf), as_given, v)[1], [x, step, v]
        kinks = tf32 or (eager.table.clips and name == "score vjp")  # a clipped x̂0 may fall on either side of 1
        _require_close(name, piece(*inputs)[0], wanted, AT_KINKS if kinks else ROUNDING)
        return
    guidance = eager.guidance
    assert guidance is not None
    if name in ("gradient", "hvp"):
        with torch.enable_grad():
            wanted = guidance.gradient(as_given)[0] if name == "gradient" else guidance.hvp(as_given, v)
        _require_close(name, piece(*([x] if name == "gradient" else [x, v]))[0], wanted, AT_KINKS)
        return
    graph = guidance.graph
    assert graph is not None
    with torch.no_grad():
        logits, found_slopes = graph.evaluate(as_given, keep_slopes=True)
    if name == "evaluate":
        found, *sides = piece(x)
        _require_close(name, found, logits, AT_KINKS if tf32 else ROUNDING)
        # Slopes by what they make of a tangent: of a maximum of equal values either index is right.
        with torch.no_grad():
            _require_close("slopes", graph.linear(v, sides), graph.linear(v, found_slopes), AT_KINKS)
        return
    sides = [torch.empty_like(buffer).copy_(slope.side()) for buffer, slope in zip(slopes, found_slopes, strict=True)]
    u = torch.randn(logits.shape, generator=generator, dtype=torch.float32).to(logits)
    product, transposed, _ = value_and_vjp(lambda leaf: graph.linear(leaf, found_slopes), v.contiguous(), u)
    wanted, given = (transposed, u) if name == "cotangent" else (product, v)
    _require_close(name, piece(given, *sides)[0], wanted, AT_KINKS if tf32 else ROUNDING)


def _require_close(name: str, found: torch.Tensor, wanted: torch.Tensor, limit: float) -> None:
    difference = relative_difference(found, wanted)
    if not difference <= limit:
        raise RuntimeError(
            f"the cuda engine's {name!r} differs from PyTorch's on this device: relative difference {difference:.3g}, "
            f"allowed {limit:g}. `coupfast doctor` finds the part that is wrong, engine_options={{'triton': False}} (or "
            f"'compile') leaves it out, engine='eager' does without all"
        )
