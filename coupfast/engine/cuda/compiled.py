"""Pieces compiled by Inductor, each once for a device and a version, and kept.

Not by `torch.compile`: its guards watch the whole process (the number of threads, a deterministic flag, the default dtype), and
compile a piece anew after it was checked when anything of that changes. What is compiled here is one function of its inputs. It
is kept in the user's cache, beside the choices of convolutions, since another compilation may choose other kernels and so give
other bits: the compiler's own cache, which is wiped more easily, then decides nothing.

What is left of a score network beside this project's kernels and the library's products is little: its compiled code starts
about as many kernels as its operations do. So launches are counted, before and after, and a piece that gains little stays as it
is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from coupfast.cache import cache_directory
from coupfast.engine.cuda.launches import launches_of_code, launches_of_operations
from coupfast.environment import machine_key, one_line
from coupfast_kernels.files import write_whole
from coupfast_kernels.locks import locked

logger = logging.getLogger(__name__)

FORMAT = 1
#: Deterministic: which kernels there are is decided without timing any. Graphs are captured by the engine itself, and the
#: formats of convolutions are those that calibration chose.
OPTIONS = {"config_patches": {"deterministic": True, "triton.cudagraphs": False, "layout_optimization": False}}
#: A piece is worth its compiled code if that starts at most so many kernels for each that the operations start.
WORTH = 0.75
PATIENCE_SECONDS = 1200.0  # wait so long for another process that compiles the same piece, then compile it, too

#: Kernels that a piece starts compiled, and operation by operation.
Launches = tuple[int, int]
_COMPILING = threading.Lock()  # the compiler tells all who compile where to leave its code

#: (module, inputs like those to come) → what computes the module's results on such inputs.
Compiler = Callable[[fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Any]]


class Inductor:
    """Compiles modules of ATen operations for one device.

    Args:
        device: Where they run.
        folder: Where they are kept; None takes `compiled` in the user's cache (`coupfast.cache`).
        always: Whether to compile what is not worth it (`WORTH`), too, rather than leave it as it is.

    Processes may compile at once: the first one's result is everyone's.
    """

    def __init__(self, device: torch.device | str, folder: str | Path | None = None, *, always: bool = True) -> None:
        self.device, self.always = torch.device(device), always
        self.folder = Path(folder) if folder is not None else cache_directory("compiled")

    def __call__(self, module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        """The compiled module, or the module itself; a minute for a large one that is not there yet.

        Raises:
            Exception: whatever the compiler raises.
        """
        file = self.folder / f"{self._digest(module, inputs)}.bin"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(file.with_suffix(".lock"), work="compiles a piece of a network", patience=PATIENCE_SECONDS):
                return self._chosen(module, inputs, file)
        except OSError as error:
            logger.warning(
                "compiled pieces cannot be kept in %s (%s); every process compiles them anew, and bits may differ between two; "
                "set XDG_CACHE_HOME to a folder that can be written",
                self.folder,
                error,
            )
        return self._chosen(module, inputs, None)

    def _chosen(self, module: fx.GraphModule, inputs: Sequence[torch.Tensor], file: Path | None) -> Callable[..., Any]:
        """What is compiled, or the module where that is not worth it; as it was chosen before, if it was."""
        if self.always:
            return _made(module, inputs, file)
        launches = None if file is None else _read_launches(file)
        if launches is not None:
            return _made(module, inputs, file) if _is_worth(launches) else module
        with _shown_code() as sources:
            made = _made(module, inputs, file)
        try:
            if not sources:
                raise ValueError("this PyTorch does not show what it compiled")
            launches = sum(map(launches_of_code, sources)), launches_of_operations(module, inputs)
        except ValueError as error:
            logger.warning("%s: a piece's launches are not counted, and it is taken as it was compiled", error)
            return made
        logger.info("a piece starts %d kernels compiled, %d operation by operation", *launches)
        if file is not None:
            write_whole(file.with_suffix(".json"), (json.dumps(launches) + "\n").encode())
        return made if _is_worth(launches) else module

    def _digest(self, module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> str:
        """Of all that the result depends on: the operations, the inputs' formats, device, versions and options."""
        formats = [[str(t.dtype), list(t.shape), list(t.stride()), t.device.type] for t in inputs]
        operations = [
            [node.name, node.op, str(node.target), repr(node.args), repr(sorted(node.kwargs.items()))]
            for node in module.graph.nodes
        ]
        key = [FORMAT, machine_key(self.device), OPTIONS, formats, operations]
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _compile(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
    with torch.no_grad():
        return torch._inductor.standalone_compile(
            module, list(inputs), dynamic_shapes="from_example_inputs", options=OPTIONS
        )


def _made(module: fx.GraphModule, inputs: Sequence[torch.Tensor], file: Path | None) -> Any:
    """The compiled module, from its file if it has one."""
    found = None if file is None else _load(file)
    if found is None:
        found = _compile(module, inputs)
        if file is not None:
            _save(found, file)
    return found


def _is_worth(launches: Launches) -> bool:
    compiled, operations = launches
    return compiled <= WORTH * operations


@contextlib.contextmanager
def _shown_code() -> Iterator[list[str]]:
    """The code of what this thread compiles or loads inside."""
    from torch._inductor.graph import GraphLowering  # takes seconds, which only those who compile should

    sources: list[str] = []
    thread = threading.get_ident()

    def show(code: str) -> None:
        if threading.get_ident() == thread:  # others compile meanwhile that ask for no count
            sources.append(code)

    with _COMPILING:
        before, GraphLowering.save_output_code = GraphLowering.save_output_code, show
        try:
            yield sources
        finally:
            GraphLowering.save_output_code = before


def _read_launches(file: Path) -> Launches | None:
    """What was counted beside a kept piece; None where nothing was, or it cannot be read."""
    try:
        compiled, operations = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        return int(compiled), int(operations)
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        logger.warning("%s is damaged (%s); what it tells is counted anew", file.with_suffix(".json"), one_line(error))
        return None


def _load(file: Path) -> Any:
    """A kept piece; None where there is none, or one that cannot be used."""
    if not file.exists():
        return None
    try:
        return torch._inductor.CompiledArtifact.load(path=str(file), format="binary")
    except Exception as error:  # half a file, or one of another build of the same version
        logger.warning("%s cannot be used (%s); the piece is compiled anew", file, one_line(error))
        return None


def _save(compiled: Any, file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / file.name
        try:
            compiled.save(path=str(made), format="binary")
        except OSError:
            raise
        except Exception as error:  # what the compiler cannot write down
            logger.warning("a compiled piece cannot be kept (%s); every process compiles it anew", one_line(error))
        else:
            write_whole(file, made.read_bytes())
