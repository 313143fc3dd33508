"""A CUDA device that is not there, for PyTorch's compiler: it writes code for the device's properties, and nothing runs on it.

What is patched is what asks the device itself: counts, properties, streams, and the methods of tensors that look for it before
they dispatch. `generated` gives the source that the compiler would load on such a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils._triton
from graph_backend import launch
from torch._subclasses.fake_tensor import FakeTensorMode

from coupfast.engine.cuda.compiled import OPTIONS
from coupfast_kernels.convolution import gpu as convolution
from coupfast_kernels.convolution.gpu_tuning import candidates

#: What the compiler asks of an H100 (its data sheet, and the CUDA programming guide's table of capabilities).
H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid="0",
)

#: And of an A100 (the same sources): fewer processors, less shared memory.
A100 = types.SimpleNamespace(
    **{
        **vars(H100),
        "name": "NVIDIA A100-SXM4-80GB",
        "major": 8,
        "multi_processor_count": 108,
        "shared_memory_per_block_optin": 166912,
        "shared_memory_per_multiprocessor": 167936,
        "L2_cache_size": 40 << 20,
    }
)


def convolution_format(x: torch.Tensor, weight: torch.Tensor, _: Any = None) -> torch.memory_format:
    """Of a convolution's results on a GPU: channels last where either lies so."""
    formats = [t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight)]
    return torch.channels_last if any(formats) else torch.contiguous_format


@contextlib.contextmanager
def absent(gpu: types.SimpleNamespace) -> Iterator[None]:
    """PyTorch's compiler believes that this GPU is there."""
    import torch._dynamo.device_interface as interfaces
    import torch._subclasses.fake_tensor as fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    capability = 10 * gpu.major + gpu.minor
    target = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        map_python_to_cpp_type=None,
    )

    def contiguous(self: torch.Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        return torch.ops.aten.contiguous.default(self, memory_format=memory_format)

    getitem = torch.Tensor.__getitem__

    def item(self: torch.Tensor, index: Any) -> torch.Tensor:
        if isinstance(index, (list, tuple)) and any(isinstance(i, torch.Tensor) for i in index):
            return torch.ops.aten.index.Tensor(self, [i if isinstance(i, torch.Tensor) else None for i in index])
        return getitem(self, index)

    device = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: gpu,
        "get_device_capability": lambda device=None: (gpu.major, gpu.minor),
        "synchronize": lambda device=None: None,
    }
    with contextlib.ExitStack() as stack:
        # Whether there is Triton, and for which device, is remembered from the first time that anybody asks.
        for forget in (getattr(found, "cache_clear", None) for found in vars(torch.utils._triton).values()):
            if forget is not None:
                forget()
                stack.callback(forget)
        # What an operation gives is remembered too, for all tests of a process, some of which had no GPU to ask about formats.
        FakeTensorMode.cache_clear()
        stack.callback(FakeTensorMode.cache_clear)
        for name, value in device.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
            if hasattr(interfaces.CudaInterface, name):
                stack.enter_context(mock.patch.object(interfaces.CudaInterface, name, staticmethod(value)))
        patches: list[tuple[Any, str, Any]] = [
            (interfaces.CudaInterface, "get_raw_stream", staticmethod(lambda index: 0)),
            (torch.version, "cuda", "13.0"),
            (torch.Tensor, "contiguous", contiguous),
            (torch.Tensor, "copy_", lambda self, other: torch.ops.aten.copy_.default(self, other)),
            (torch.Tensor, "__getitem__", item),
            (torch._C, "_conv_determine_backend_memory_format", convolution_format),
            (driver, "_active", target),
            (fake_tensor, "init_gpu_context", lambda device: None),
            (FakeTensorMode, "avoid_device_init", property(lambda self: True)),
        ]
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value, create=not hasattr(owner, name)))
        stack.enter_context(mock.patch.dict(interfaces.caching_worker_device_properties, {"cuda": [gpu]}))
        stack.enter_context(mock.patch.dict(interfaces.caching_worker_current_devices, {"cuda": 0}))
        yield


def generated(module: torch.fx.GraphModule, inputs: list[torch.Tensor], gpu: types.SimpleNamespace) -> str:
    """The compiler's source for a flat graph on this GPU; `inputs` may lie anywhere."""
    import torch._inductor.config as config
    from torch._guards import TracingContext, tracing
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    device, mode, patches = torch.device("cuda", 0), FakeTensorMode(), OPTIONS["config_patches"]
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    module.recompile()
    with absent(gpu), torch.no_grad(), config.patch(compile_threads=1, fx_graph_cache=False, **patches):
        with mode:
            fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in inputs]
            lowered = make_fx(module, decomposition_table=select_decomp_table(), tracing_mode="fake")(*fakes)
        with tracing(TracingContext(mode)), V.set_fake_mode(mode):
            post_grad_passes(lowered, is_inference=True)
            graph = GraphLowering(lowered, is_inference=True, example_inputs=fakes)
            with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
                graph.run(*fakes)
                code = graph.codegen()[0]
    return code.value if hasattr(code, "value") else code


# --- what is done with such source where no GPU is ---------------------------------------------------------------------

_KERNELS = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)


def blocks(text: str, wide: bool = False) -> dict[str, int]:
    """Sizes of a kernel's blocks, of those that the compiler would time on the GPU: a few rows where a row is summed whole.

    `wide`: large ones, of which an interpreter has fewer to go through.
    """
    rows, two = "persistent_reduction" in text, "YBLOCK" in text
    sizes = {"XBLOCK": 1 if rows else 16 if two else 128, "YBLOCK": 16, "R0_BLOCK": 64}
    if wide:
        sizes = {"XBLOCK": 8 if rows else 64 if two else 2048, "YBLOCK": 64, "R0_BLOCK": 256}
    return {name: size for name, size in sizes.items() if f"{name} : tl.constexpr" in text}


def kernels(source: str) -> dict[str, str]:
    """The Triton kernels in generated source: name → text."""
    return dict(_KERNELS.findall(source))


def plain_kernel(name: str, text: str, folder: Path) -> Any:
    """A kernel without what launches and tunes it; it is written to a file, from which Triton reads a kernel's source."""
    text = re.sub(r"triton_helpers\.set_driver_to_gpu\(\)", "", text)
    text = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton\.jit)", "", text, flags=re.DOTALL)
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def compiled(name: str, text: str, folder: Path, capability: int) -> Any:
    """A kernel compiled to machine code for a compute capability (90: 9.0), as on the GPU but for the sizes of blocks."""
    import triton
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = re.search(r"triton_meta=(\{.*?\}),\n", text)
    assert found is not None
    meta = eval(found.group(1), {"DeviceProperties": DeviceProperties})  # the compiler's own text
    kernel = plain_kernel(name, text, folder)
    constants = meta["constants"] | blocks(text)
    source = ASTSource(
        kernel,
        meta["signature"],
        constexprs={(kernel.arg_names.index(argument),): value for argument, value in constants.items()},
        attrs=meta["configs"][0],
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 1})


@contextlib.contextmanager
def _launches_recorded() -> Iterator[None]:
    """By whichever graph is being captured, each launch in Triton's interpreter with the tensors that it is given."""
    from triton.runtime.interpreter import GridExecutor

    execute = GridExecutor.__call__

    def recorded(grid: Any, *values: Any, **constants: Any) -> None:
        launch(lambda *values: execute(grid, *values, **constants), *values)

    with mock.patch.object(GridExecutor, "__call__", recorded):
        yield


class Interpreted:
    """Generated source on CPU tensors: Triton kernels in its interpreter, every buffer full of NaN before it is written.

    The process has to have TRITON_INTERPRET=1 from its start.

    Args:
        convolutions: Whether this project's are run by their kernels, too, in place of their operator's definition: a tenth of
            a second each, the most of one by Winograd's.

    Attributes:
        launches: Names of the kernels that ran.
    """

    def __init__(self, source: str, folder: Path, *, convolutions: bool = False) -> None:
        self.launches: list[str] = []
        self.folder = folder
        names: dict[str, Any] = {"__name__": "generated", "__file__": str(folder / "generated.py"), "_here": self}
        replacements = {
            "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = lambda index: 0",
            "empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda": "empty_strided_cuda = _here.poisoned",
            "async_compile = AsyncCompile()": "async_compile = _here",
            "torch.ops.aten.convolution_backward.default(": "_here.convolution_backward(",
            "torch.cuda.set_device(0)": "pass",
        }
        if convolutions:
            replacements["torch.ops.coupfast.conv3x3.default("] = "_here.conv3x3("
        for old, new in replacements.items():
            source = source.replace(old, new)
        source = re.sub(r"with torch\.cuda\._DeviceGuard\(0\):", "if True:", source)
        # A GPU adds one value at every address; the interpreter at the first alone.
        one_value = r"tl\.atomic_add\((\w+) \+ \((.+?)\), (\w+), "
        source = re.sub(one_value, r"tl.atomic_add(\1 + (\2), \3 + 0.0 * (\2).to(tl.float32), ", source)
        exec(compile(source, "generated", "exec"), names)
        self._call = names["call"]

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), _launches_recorded():
            return tuple(self._call(list(inputs)))

    # What the generated module asks for.

    def triton(self, name: str, text: str, **_: Any) -> types.SimpleNamespace:
        import triton

        # The interpreter has no library of the device; Triton's own functions are the same ones, but for a power (of positive
        # numbers here).
        plain = re.sub(r"\blibdevice\.pow\(", "_power(", text)
        power = "@triton.jit\ndef _power(a, b):\n    return tl.exp2(b * tl.log2(a))\n\n\n"
        plain = plain.replace("@triton.jit", f"{power}@triton.jit")
        kernel = plain_kernel(name, re.sub(r"\blibdevice\.(?=\w+\()", "tl.", plain), self.folder)
        signature = re.search(rf"def {name}\((.*?)\):", text)
        assert signature is not None
        arguments = [argument.strip() for argument in signature.group(1).split(",")]
        sizes = blocks(text, wide=True)
        given = [argument for argument in arguments if "constexpr" not in argument]

        def run(*values: Any, stream: int = 0) -> None:
            self.launches.append(name)
            named = dict(zip(given, values, strict=True))
            grid = [triton.cdiv(named.get(f"{axis}numel", 1), sizes.get(f"{axis.upper()}BLOCK", 1)) for axis in "xy"]
            kernel[(*grid, 1)](*values, **sizes)

        return types.SimpleNamespace(run=run)

    def wait(self, names: dict[str, Any]) -> None:
        pass

    def poisoned(self, shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype).fill_(float("nan") if dtype.is_floating_point else 1)

    def conv3x3(self, x: torch.Tensor, packed: torch.Tensor, packed_vjp: None, *added: Any) -> torch.Tensor:
        """By the first of the configs that the tuner would time."""
        *_, algorithm = added
        y = convolution._new(x, packed.shape[convolution.ALGORITHMS[algorithm].out_axis]).fill_(float("nan"))
        config, *_ = candidates(x.numel() // x.shape[1], y.shape[1], algorithm)
        self.launches.append(algorithm)
        convolution._launch(y, x, packed, *added, config)
        return y

    def convolution_backward(self, *arguments: Any) -> tuple[torch.Tensor | None, ...]:
        """In the format that the library has on a GPU for such inputs."""
        _, x, weight, *_ = arguments
        format = convolution_format(x, weight)
        results = torch.ops.aten.convolution_backward.default(*arguments)
        return tuple(None if r is None else r.contiguous(memory_format=format) for r in results)
