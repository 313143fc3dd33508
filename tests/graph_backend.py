"""A stand-in for CUDA graphs: records operations with the tensors they work on, and replays them into the same memory.

It has streams, too, which do all work in the order that it comes. That nothing depends on this is found by the events: an
operation on one stream may read or write only what every other stream has done with before an event that this one waited for.
"""

import contextlib
import weakref
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from coupfast.engine.cuda.capture import CudaBackend

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


class Stream:
    """How far it has come, and how far it knows that others have come, itself included."""

    def __init__(self):
        self.known = {}

    def does(self):
        """One more thing; returns its name."""
        self.known[self] = self.known.get(self, 0) + 1
        return self, self.known[self]

    def knows(self, done):
        stream, number = done
        return self.known.get(stream, 0) >= number

    def wait_stream(self, other):
        for stream, number in other.known.items():
            self.known[stream] = max(self.known.get(stream, 0), number)


class Streams:
    """The streams of one backend, and which of them is given work."""

    def __init__(self):
        self.current = Stream()

    @contextlib.contextmanager
    def on(self, stream):
        outer, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = outer


class Pool:
    """Memory of a recording: what is let go is handed out again, on the same stream, as within a CUDA graph's own pool."""

    def __init__(self, streams):
        self.streams = streams
        self.blocks = []  # all there are
        self.free = {}  # by stream and size
        self.handed_out = 0
        self._places = {}  # storage → block, while it lives
        self._ends = []

    def take(self, like):
        """A tensor with the shape and strides of another, full of what was there before."""
        size = max(like.untyped_storage().nbytes(), 1)
        free = self.free.setdefault((self.owner(), size), [])
        if not free:
            self.blocks.append(torch.zeros(size, dtype=torch.uint8).numpy())
            free.append(self.blocks[-1])
        block = free.pop()
        self.handed_out += 1
        tensor = self._on(block, like)
        storage = tensor.untyped_storage()
        place = storage._cdata
        self._places[place] = block

        def release(_, place=place):
            free.append(self._places.pop(place))

        self._ends.append(weakref.ref(storage, release))
        return tensor

    def owner(self):
        """Who gets memory again that was handed out now."""
        return self.streams.current

    def has(self, tensor):
        return tensor.untyped_storage()._cdata in self._places

    def name(self, tensor):
        """Of the memory that a tensor lies in: a block, or what was there before."""
        place = tensor.untyped_storage()._cdata
        return ("block", id(self._places[place])) if place in self._places else ("outside", place)

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

    def __init__(self, streams):
        self.streams, self.origin = streams, streams.current
        self.begin = self.origin.does()
        self.begun = set()  # streams with work in it
        self.written, self.read = {}, {}  # memory → by what last, and by what since
        self.calls = []
        self.pool = Pool(streams)
        self.outside = {}  # storages from before: (tensor, its contents before the capture)
        self.replays = 0

    def record(self, func, args, kwargs):
        leaves, structure = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for tensor in inputs:
            address = tensor.untyped_storage()._cdata
            if not self.pool.has(tensor) and address not in self.outside:
                self.outside[address] = (tensor, whole(tensor).clone())
        done = self._order(func, args, kwargs, inputs)
        result = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        kept = [self._alias(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        outputs, tree = tree_flatten(result)
        places = []
        for index, tensor in enumerate(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                outputs[index] = self.pool.take(tensor).copy_(tensor)
                self._write(self.pool.name(outputs[index]), done, func)
                places.append((index, self.pool.alias(outputs[index])))
        addresses = [tensor.data_ptr() for tensor in inputs]
        self.calls.append((func, kept, structure, addresses, places))
        return tree_unflatten(outputs, tree)

    def _order(self, func, args, kwargs, inputs):
        """CaptureError if an operation's stream does not know that what it reads has been written, and so on."""
        stream = self.streams.current
        if not stream.knows(self.begin):
            raise CaptureError(f"{func} is on a stream that is not being captured: it waited for none that is")
        done = stream.does()
        self.begun.add(stream)
        written = inputs  # of a kernel, whose arguments tell nothing
        if isinstance(func, torch._ops.OpOverload):
            arguments = func._schema.arguments
            given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
            written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        written = {self.pool.name(leaf) for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor)}
        for memory in {self.pool.name(tensor) for tensor in inputs} - written:
            self._after(self.written.get(memory), func, "reads what is still being written")
            self.read.setdefault(memory, []).append(done)
        for memory in written:
            self._write(memory, done, func)
        return done

    def _write(self, memory, done, func):
        self._after(self.written.get(memory), func, "writes where another one does")
        for reader in self.read.pop(memory, []):
            self._after(reader, func, "writes what is still being read")
        self.written[memory] = done

    def _after(self, before, func, otherwise):
        if before is not None and not self.streams.current.knows(before):
            raise CaptureError(f"{func} {otherwise}: its stream waited for no event of the other one's")

    def end(self):
        for stream in self.begun:
            if not self.origin.knows((stream, stream.known[stream])):
                raise CaptureError("capture ended while another stream had work that nobody waited for")

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

    device = None

    def __init__(self):
        self.graphs = []
        self.warm_ups = 0
        self.streams, self.second = Streams(), Stream()
        self.fail = None  # what the next capture raises
        self.while_capturing = lambda: None

    def capture(self, function):
        graph = Graph(self.streams)
        self.while_capturing()
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        with _Mode(graph):
            function()
        graph.end()
        graph.undo()
        self.graphs.append(graph)
        return graph

    @contextlib.contextmanager
    def side_stream(self):
        self.warm_ups += 1
        yield

    def both(self, function, beside):
        """As on a GPU, on the streams here."""
        here = {"current_stream": lambda device: self.streams.current, "stream": self.streams.on}
        with mock.patch.multiple(torch.cuda, **here):
            return CudaBackend.both(self, function, beside)

    def out_of_memory(self):
        return OutOfMemory
