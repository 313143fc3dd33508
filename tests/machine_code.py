"""Which kernels Triton would compile on a GPU for what runs on the CPU: launches recorded instead of made."""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coupfast_kernels.convolution import gpu as convolution
from coupfast_kernels.convolution import gpu_normed, gpu_tuning
from coupfast_kernels.group_norm import gpu as group_norm
from coupfast_kernels.guided_step import gpu as guided_step
from coupfast_kernels.noise import gpu as noise

LAUNCHERS = {
    "coupfast::conv3x3": convolution._on_cuda,
    "coupfast::conv3x3_normed": gpu_normed._on_cuda,
    "coupfast::group_norm_silu": group_norm._launch,
    "coupfast::group_norm_silu_vjp": group_norm._launch_vjp,
    "coupfast::group_norm_statistics": group_norm._launch_statistics,
    "coupfast::guided_step_out": guided_step._launch,
    "coupfast::standard_normal": noise._launch,
}


class MachineCode(TorchDispatchMode):
    """Calls the launchers of this project's operators beside their definitions.

    Attributes:
        found: Kernel, and what its machine code depends on.
    """

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        launcher = LAUNCHERS.get(func._schema.name)
        if launcher is not None:
            with self._recording():
                launcher(*args, **(kwargs or {}))
        elif func.namespace == "coupfast":
            raise NotImplementedError(f"a launcher of {func}")
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def _recording(self):
        from triton.runtime.jit import JITFunction

        def run(kernel, *args, grid, warmup, **kwargs):
            given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            self.found.add((kernel.fn.__name__, *sorted((name, _kind(kernel, name, value)) for name, value in given.items())))

        seconds = lambda launch: launch() or 1.0  # noqa: E731
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(gpu_tuning, "_seconds", seconds),
            mock.patch.object(gpu_tuning, "_chosen", {}),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        ):
            yield


def _kind(kernel, name, value):
    """What of an argument is compiled in: a constant's value, of an integer whether it is 1 or a multiple of 16."""
    parameters = {parameter.name: parameter for parameter in kernel.params}
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if name not in parameters or parameters[name].is_constexpr or value is None:
        return str(value)
    if isinstance(value, int) and not parameters[name].do_not_specialize:
        return f"int, {'1' if value == 1 else 'of 16' if value % 16 == 0 else 'any'}"
    return type(value).__name__
