"""A stand-in for CUDA graphs: records operations with the tensors they work on, and replays them into the same memory."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

aten = torch.ops.aten

#: What waits for the device, or makes a shape of values: a graph cannot hold it.
FORBIDDEN = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten._to_copy.default,  # between devices; between dtypes on one device it would be allowed, and nothing here does it
}


class CaptureError(RuntimeError):
    pass


class OutOfMemory(RuntimeError):
    pass


class _Mode(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in FORBIDDEN:
            raise CaptureError(f"operation not permitted when stream is capturing: {func}")
        return self.graph.record(func, args, kwargs or {})


class Graph:
    """One recording.

    What its operations return lives in memory of its own, which holds NaN (or an index that fits nowhere) when a replay begins:
    an operation that read it before it was written in the same replay would show.
    """

    def __init__(self):
        self.calls = []
        self.own = {}  # storages made inside, by address
        self.outside = {}  # storages from before: (tensor, its contents before the capture)
        self.replays = 0

    def record(self, func, args, kwargs):
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        for tensor in inputs:
            address = tensor.untyped_storage()._cdata
            if address not in self.own and address not in self.outside:
                self.outside[address] = (tensor, whole(tensor).clone())
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        for tensor in new:
            self.own[tensor.untyped_storage()._cdata] = tensor
        addresses = [tensor.data_ptr() for tensor in inputs]
        self.calls.append((func, args, kwargs, inputs, addresses, outputs, bool(new)))
        return result

    def undo(self):
        """Recorded, not run: what was there before is there again."""
        for tensor, before in self.outside.values():
            whole(tensor).copy_(before)

    def replay(self):
        self.replays += 1
        for tensor in self.own.values():
            poison(tensor)
        for func, args, kwargs, inputs, addresses, outputs, makes_memory in self.calls:
            assert [tensor.data_ptr() for tensor in inputs] == addresses
            result = func(*args, **kwargs)
            if makes_memory:
                results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                for kept, found in zip(outputs, results, strict=True):
                    kept.copy_(found)

    @property
    def operations(self):
        return [call[0] for call in self.calls]


def whole(tensor):
    """A tensor's storage, flat."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor.detach(), (size,), (1,), 0)


def poison(tensor):
    flat = whole(tensor)
    if tensor.dtype == torch.bool:
        flat.logical_not_()
    else:
        flat.fill_(float("nan") if tensor.is_floating_point() else 2**40 if tensor.dtype == torch.int64 else 255)


class StandIn:
    """A backend of `coupfast.engine.cuda.capture` on the CPU."""

    def __init__(self):
        self.graphs = []
        self.warm_ups = 0
        self.fail = None  # what the next capture raises
        self.while_capturing = lambda: None

    def capture(self, function):
        graph = Graph()
        self.while_capturing()
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        with _Mode(graph):
            function()
        graph.undo()
        self.graphs.append(graph)
        return graph

    @contextlib.contextmanager
    def side_stream(self):
        self.warm_ups += 1
        yield

    def out_of_memory(self):
        return OutOfMemory
