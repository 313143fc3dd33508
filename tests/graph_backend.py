"""A stand-in for CUDA graphs: records operations with the tensors they work on, and replays them into the same memory.

It has streams, too, which do all work in the order that it comes. That nothing depends on this is found by the events: an
operation on one stream may read or write only what every other stream has done with before an event that this one waited for.
Within a recording `Graph` keeps this account, outside of recordings `Ordered`.
"""

import contextlib
import weakref
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
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
    """What CUDA refuses in a capture, or does in no certain order."""


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
        self.wait_event(other)

    def wait_event(self, event):
        for stream, number in event.known.items():
            self.known[stream] = max(self.known.get(stream, 0), number)


class Event:
    """What a stream knew when it was recorded."""

    def record(self, stream):
        self.known = dict(stream.known)

    def synchronize(self):
        pass


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


class Account:
    """What was done with which memory by whom: an operation whose stream knows nothing of it is a CaptureError.

    Args:
        name: What names the memory of a tensor.
    """

    def __init__(self, streams, name):
        self.streams, self.name = streams, name
        self.written, self.read = {}, {}  # memory → by what last, and by what since

    def operation(self, func, args, kwargs, inputs):
        """Before an operation, which gets its name here; what it returns in memory of its own is `write`'s."""
        done = self.streams.current.does()
        written = inputs  # of a kernel, whose arguments tell nothing
        if isinstance(func, torch._ops.OpOverload):
            arguments = func._schema.arguments
            given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
            written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        names = {self.name(tensor) for tensor in inputs}
        written = names & {self.name(leaf) for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor)}
        for memory in names - written:
            self._after(self.written.get(memory), func, "reads what is still being written")
            self.read.setdefault(memory, []).append(done)
        for memory in written:
            self.write(memory, done, func)
        return done

    def write(self, memory, done, func):
        self._after(self.written.get(memory), func, "writes where another one does")
        for reader in self.read.pop(memory, []):
            self._after(reader, func, "writes what is still being read")
        self.written[memory] = done

    def _after(self, before, func, otherwise):
        if before is not None and not self.streams.current.knows(before):
            raise CaptureError(f"{func} {otherwise}: its stream waited for no event of the other one's")


class Ordered(TorchDispatchMode):
    """Refuses what one stream does with memory that another one may still be at work on; of all operations within."""

    def __init__(self, streams):
        super().__init__()
        self.account = Account(streams, self._name)
        self._ends = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = self._real((args, kwargs))
        done = self.account.operation(func, args, kwargs, inputs)
        result = func(*args, **kwargs)
        for memory in {self._name(tensor) for tensor in self._real(result)} - {self._name(tensor) for tensor in inputs}:
            self.account.write(memory, done, func)
        return result

    def _name(self, tensor):
        """Its address, as long as it is there. On a GPU what is let go is handed out on the same stream again."""
        storage = tensor.untyped_storage()
        memory = storage._cdata
        if memory not in self._ends:
            self._ends[memory] = weakref.ref(storage, lambda _: self._forget(memory))
        return memory

    def _real(self, tree):
        """Tensors with data: what is traced meanwhile has none."""
        leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor))
        return [leaf for leaf in leaves if leaf.device.type != "meta"]

    def _forget(self, memory):
        for known in (self.account.written, self.account.read, self._ends):
            known.pop(memory, None)


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
        self.calls = []
        self.pool = Pool(streams)
        self.account = Account(streams, self.pool.name)
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
                self.account.write(self.pool.name(outputs[index]), done, func)
                places.append((index, self.pool.alias(outputs[index])))
        addresses = [tensor.data_ptr() for tensor in inputs]
        self.calls.append((func, kept, structure, addresses, places))
        return tree_unflatten(outputs, tree)

    def _order(self, func, args, kwargs, inputs):
        """CaptureError if an operation's stream does not know that what it reads has been written, and so on."""
        stream = self.streams.current
        if not stream.knows(self.begin):
            raise CaptureError(f"{func} is on a stream that is not being captured: it waited for none that is")
        self.begun.add(stream)
        return self.account.operation(func, args, kwargs, inputs)

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
