"""A stand-in for CUDA graphs: records operations with the tensors they work on, and replays them into the same memory."""

import contextlib
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

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


_capturing = []  # the graph that records now, and the mode that it records by


def launch(function, *tensors):
    """What PyTorch's dispatcher does not see, as a Triton kernel's launch: done now, and recorded where a capture is on."""
    if not _capturing:
        return function(*tensors)
    with _disable_current_modes():
        return _capturing[-1].record(function, tensors, {})


class _Mode(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __enter__(self):
        _capturing.append(self.graph)
        return super().__enter__()

    def __exit__(self, *error):
        _capturing.pop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in FORBIDDEN:
            raise CaptureError(f"operation not permitted when stream is capturing: {func}")
        return self.graph.record(func, args, kwargs or {})


class Pool:
    """Memory of a recording: what is let go is handed out again, as within a CUDA graph's own pool."""

    def __init__(self):
        self.blocks = []  # all there are
        self.free = {}  # by size
        self.handed_out = 0
        self._places = {}  # storage → block, while it lives
        self._ends = []

    def take(self, like):
        """A tensor with the shape and strides of another, full of what was there before."""
        size = max(like.untyped_storage().nbytes(), 1)
        free = self.free.setdefault(size, [])
        if not free:
            self.blocks.append(torch.zeros(size, dtype=torch.uint8).numpy())
            free.append(self.blocks[-1])
        block = free.pop()
        self.handed_out += 1
        tensor = self._on(block, like)
        storage = tensor.untyped_storage()
        place = storage._cdata
        self._places[place] = block

        def release(_, place=place, size=size):
            self.free[size].append(self._places.pop(place))

        self._ends.append(weakref.ref(storage, release))
        return tensor

    def has(self, tensor):
        return tensor.untyped_storage()._cdata in self._places

    def alias(self, tensor):
        """The same memory in a tensor of its own, which keeps none of it from being handed out again."""
        return self._on(self._places[tensor.untyped_storage()._cdata], tensor)

    def poison(self):
        """NaN as a number of either size, and no index."""
        for block in self.blocks:
            block.fill(0xFF)

    def _on(self, block, like):
        flat = torch.from_numpy(block[: block.size // like.element_size() * like.element_size()]).view(like.dtype)
        return torch.as_strided(flat, like.shape, like.stride(), like.storage_offset())


class Graph:
    """One recording.

    What its operations return, and what is allocated while it records, lies in a pool of its own, which holds NaN (or an index
    that fits nowhere) when a replay begins: an operation that read it before it was written in the same replay would show, as
    would one that read what had been let go.
    """

    def __init__(self):
        self.calls = []
        self.pool = Pool()
        self.outside = {}  # storages from before: (tensor, its contents before the capture)
        self.replays = 0

    def record(self, func, args, kwargs):
        leaves, structure = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for tensor in inputs:
            address = tensor.untyped_storage()._cdata
            if not self.pool.has(tensor) and address not in self.outside:
                self.outside[address] = (tensor, whole(tensor).clone())
        result = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        kept = [self._alias(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        outputs, tree = tree_flatten(result)
        places = []
        for index, tensor in enumerate(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                outputs[index] = self.pool.take(tensor).copy_(tensor)
                places.append((index, self.pool.alias(outputs[index])))
        addresses = [tensor.data_ptr() for tensor in inputs]
        self.calls.append((func, kept, structure, addresses, places))
        return tree_unflatten(outputs, tree)

    def _alias(self, tensor):
        return self.pool.alias(tensor) if self.pool.has(tensor) else tensor

    def undo(self):
        """Recorded, not run: what was there before is there again."""
        for tensor, before in self.outside.values():
            whole(tensor).copy_(before)

    def replay(self):
        self.replays += 1
        self.pool.poison()
        for func, kept, structure, addresses, places in self.calls:
            assert [leaf.data_ptr() for leaf in kept if isinstance(leaf, torch.Tensor)] == addresses
            args, kwargs = tree_unflatten(kept, structure)
            results = tree_leaves(func(*args, **kwargs), is_leaf=lambda leaf: leaf is None)
            for index, place in places:
                place.copy_(results[index])

    @property
    def operations(self):
        return [call[0] for call in self.calls]


def whole(tensor):
    """A tensor's storage, flat."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor.detach(), (size,), (1,), 0)


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
