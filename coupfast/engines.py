"""Which engine runs: a choice of the user's, and what `"auto"` makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from coupfast.engine import BoundEngine, cpu, cuda, eager
from coupfast.engine.networks import dtype_and_device
from coupfast.engine.precision import FLOAT32_PRECISIONS, PRECISIONS
from coupfast.options import check_name, option

ENGINES: dict[str, Callable[..., BoundEngine]] = {"eager": eager.prepare, "cpu": cpu.prepare, "cuda": cuda.prepare}
#: What can be chosen about each engine that has something to choose.
OPTIONS: dict[str, Any] = {"cpu": cpu.Options, "cuda": cuda.Options}


def _choices(word: str) -> dict[str, bool | int]:
    """compile=false,largest_tile=2 → {"compile": False, "largest_tile": 2}"""
    values = {"true": True, "false": False}
    pairs = [part.partition("=") for part in word.split(",") if part]
    if not all(value in values or value.isdecimal() for _, _, value in pairs):
        raise ValueError(f"{word!r} is no list of NAME=true, NAME=false and NAME=number")
    return {name: values[value] if value in values else int(value) for name, _, value in pairs}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """How the steps run.

    Attributes:
        name: `"eager"`, PyTorch operation by operation; `"cpu"`, this project's kernels for float32 on a CPU; `"cuda"`,
            compiled networks, this project's kernels and CUDA graphs for float32 on a GPU; `"auto"` takes the fastest one that
            can run here and logs which.
        precision: `"strict"`: fp32 as IEEE 754 has it (or float64, as given), whatever the caller's autocast and TF32 settings,
            and nothing with more than four times PyTorch's own rounding error. `"fast"` allows fp32 algorithms with errors up
            to 1e-5. `"3xtf32"` and `"tf32"` use a GPU's tensor cores (engine `"cuda"` only): with every product of the 3x3
            convolutions split in three, close to fp32; and with products of 11 bits.
        options: Of the cuda engine, parts to switch off, to find out which is at fault: `compile`, `graphs`, `triton` and
            `beside`, see `coupfast.engine.cuda.Options`. Of the cpu engine `largest_tile`, see `coupfast.engine.cpu.Options`.

    Raises:
        ValueError: if a name is unknown, or an option belongs to no engine or has a value that it does not take.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method="reverse-sde", engine=coupfast.Engine(name="eager")).engine
        'eager'
    """

    name: str = option("auto", keyword="engine", choices=("auto", *ENGINES), help="what runs the steps")
    precision: str = option("strict", choices=PRECISIONS, help="strict: float32 as IEEE 754 has it")
    options: Mapping[str, bool | int] = option(
        {},
        keyword="engine_options",
        help="of the cuda engine, parts to switch off: compile=false,graphs=false,triton=false,beside=false; of the cpu "
        "engine: largest_tile=2",
        parse=_choices,
        metavar="NAME=VALUE,...",
    )

    def __post_init__(self) -> None:
        check_name("engine", self.name, ("auto", *ENGINES))
        check_name("precision", self.precision, PRECISIONS)
        object.__setattr__(self, "options", dict(self.options or {}))
        owners = [engine for engine in OPTIONS if set(self.options) <= self._known(engine)]
        OPTIONS[owners[0] if owners else "cuda"].of(self.options)

    def prepare(
        self,
        name: str,
        score: nn.Module,
        classifier: nn.Module | None,
        table: Any,
        example: torch.Tensor,
        differentiate_guidance: bool,
    ) -> BoundEngine:
        """The engine that `name` is, after a look at whether it has what these settings ask for."""
        extra: dict[str, Any] = {"precision": self.precision} if name == "cuda" else {}
        if name != "cuda" and self.precision not in FLOAT32_PRECISIONS:
            raise ValueError(f"{self.precision!r} is for the cuda engine; this purifier runs on {name!r}")
        self._check_options(name)
        if self.options:
            extra["options"] = self.options
        return ENGINES[name](score, classifier, table, example, differentiate_guidance=differentiate_guidance, **extra)

    def decided(self, name: str, score: nn.Module, classifier: nn.Module | None) -> Engine:
        """The same with what its options leave open decided, as the engine `name` would decide it now on these networks.

        Runs that are given it have the same bits, whatever memory is free when they are made.
        """
        self._check_options(name)
        if name != "cpu":
            return self
        options = cpu.Options.of(self.options).decided(score, classifier)
        return dataclasses.replace(self, options=dataclasses.asdict(options))

    def _check_options(self, name: str) -> None:
        if not set(self.options) <= self._known(name):
            owner = next(engine for engine in OPTIONS if set(self.options) <= self._known(engine))
            raise ValueError(f"engine_options={self.options} is for the {owner} engine; this purifier runs on {name!r}")

    @staticmethod
    def _known(name: str) -> set[str]:
        return {field.name for field in dataclasses.fields(OPTIONS[name])} if name in OPTIONS else set()


def fastest_engine(score: nn.Module) -> tuple[str, str | None]:
    """The fastest engine for this network, and why it is not a faster one."""
    found = dtype_and_device(score)
    fast = {"cpu": ("cpu", cpu.unavailable), "cuda": ("cuda", cuda.unavailable)}
    if found is None:
        return "eager", "the score net has no weights to go by"
    mixed = {parameter.dtype for parameter in score.parameters() if parameter.is_floating_point()} != {found[0]}
    if mixed:
        return "eager", "the score net has weights of several dtypes"
    if found[1].type not in fast or found[0] != torch.float32:
        return "eager", f"the others run float32 on {' or '.join(fast)}, not {found[0]} on {found[1].type}"
    engine, unavailable = fast[found[1].type]
    reason = unavailable(*found)
    return ("eager", reason) if reason else (engine, None)
