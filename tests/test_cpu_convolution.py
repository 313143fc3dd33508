"""The C++ convolutions, norms and elementwise kernels: against float64, to counted roundings, on awkward shapes."""

import math
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import under_sanitizers

from coupfast_kernels import native, operations
from coupfast_kernels.convolution import cpu as kernels
from coupfast_kernels.convolution.definition import conv2d_ref

REASON = native.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

EPS = torch.finfo(torch.float32).eps
DIRECT, F2, F4 = kernels.DIRECT, kernels.F2, kernels.F4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def place(shape: tuple[int, ...], pixel: int = 0, start: int = 0) -> torch.Tensor:
    """A map (batch, channels, height, width) of NaN that ends with its memory: `start` floats in, `pixel` floats a pixel."""
    batch, channels, height, width = shape
    pixel = pixel or channels
    memory = torch.full((start + (batch * height * width - 1) * pixel + channels,), float("nan"))
    return memory.as_strided(shape, (height * width * pixel, 1, width * pixel, pixel), start)


def placed(value: torch.Tensor, pixel: int = 0, start: int = 0) -> torch.Tensor:
    return place(tuple(value.shape), pixel, start).copy_(value)


def untouched(view: torch.Tensor) -> bool:
    """Whether all memory around a map from `place` is still NaN."""
    memory = torch.as_strided(view, (view.untyped_storage().nbytes() // 4,), (1,), 0)
    return int(memory.isnan().sum()) == memory.numel() - view.numel()


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def bits(mask: torch.Tensor) -> torch.Tensor:
    """(batch, channels, height, width) bool → (batch, height, width, bytes) uint8, as the kernels keep masks."""
    mask = F.pad(mask.permute(0, 2, 3, 1), (0, -mask.shape[1] % 8)).unflatten(-1, (-1, 8))
    return (mask.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8).contiguous()


@dataclass(frozen=True)
class Case:
    tile: int
    kernel: int
    channels: int
    out_channels: int
    height: int
    width: int
    batch: int = 2
    stride: int = 1
    padding: int | None = None
    transposed: bool = False  # of a convolution with this stride
    extra: int = 0  # rows and columns of a strided convolution's input that its kernel never reaches

    @property
    def convolution_padding(self) -> int:
        return self.kernel // 2 if self.padding is None else self.padding

    @property
    def pad(self) -> int:
        return self.kernel - 1 - self.convolution_padding if self.transposed else self.convolution_padding

    @property
    def out_size(self) -> tuple[int, int]:
        if self.transposed:
            outside = self.kernel - 2 * self.convolution_padding + self.extra
            return tuple((size - 1) * self.stride + outside for size in (self.height, self.width))
        return tuple((size + 2 * self.pad - self.kernel) // self.stride + 1 for size in (self.height, self.width))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x and the weights, those of the untransposed convolution."""
        channels = (self.channels, self.out_channels) if self.transposed else (self.out_channels, self.channels)
        x = normal(self.batch, self.channels, self.height, self.width, seed=1)
        return x, normal(*channels, self.kernel, self.kernel, seed=2) / math.sqrt(self.channels * self.kernel**2)

    def exact(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x, weight = x.double(), weight.double()
        if self.transposed:
            return F.conv_transpose2d(
                x, weight, stride=self.stride, padding=self.convolution_padding, output_padding=self.extra
            )
        return F.conv2d(x, weight, stride=self.stride, padding=self.pad)

    def roundings(self) -> int:
        """Of any term on its way into a sum: a run (twice, without fma), the runs' total, and both transforms.

        Winograd's runs have 32 terms. Direct ones have at most 128 and end with the taps of a row of the kernel, or of several
        where these are few. Sums to few outputs are taken in at least eight parts, a run a row, which are added at the end.
        """
        if self.tile != DIRECT:
            return 2 * 32 + -(-self.channels // 32) + 20 + 2
        row = self.kernel * self.channels
        return 2 * max(min(128, self.kernel * row), -(-row // 8)) + self.kernel * -(-row // 128) + 3 + 2

    def magnitude(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The sum of all terms' absolute values, which a rounding is relative to."""
        if self.tile == DIRECT:
            return self.exact(x.abs(), weight.abs())
        if self.transposed:
            weight = weight.flip(2, 3).transpose(0, 1)
        points = (1.0,) if self.tile == F2 else (0.625, 1.5)
        to_v, to_u, to_y = winograd(points)
        m, (height, width) = self.tile, self.out_size
        rows, columns = -(-height // m), -(-width // m)
        x = F.pad(x.double(), (1, columns * m - width + 1, 1, rows * m - height + 1))
        tiles = x.abs().unfold(2, m + 2, m).unfold(3, m + 2, m)
        u = torch.einsum("ia,ocab,jb->ocij", to_u.abs(), weight.double().abs(), to_u.abs())
        v = torch.einsum("ia,ncrsab,jb->ncrsij", to_v.abs(), tiles, to_v.abs())
        y = torch.einsum("ai,nrsoij,bj->norasb", to_y.abs(), torch.einsum("ncrsij,ocij->nrsoij", v, u), to_y.abs())
        return y.reshape(len(x), -1, rows * m, columns * m)[:, :, :height, :width]


def winograd(points: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bᵀ, G and Aᵀ at 0, ±points and infinity, from the definition: Lagrange interpolation (Toom-Cook)."""
    finite = [0.0, *(sign * p for p in points for sign in (1, -1))]
    n = len(finite) + 1  # inputs of a tile
    powers = lambda p, count: [p**i for i in range(count)]  # noqa: E731
    g = [[v / math.prod(p - q for q in finite if q != p) for v in powers(p, 3)] for p in finite] + [[0.0, 0.0, 1.0]]
    a = [powers(p, n - 2) for p in finite] + [[0.0] * (n - 3) + [1.0]]
    b = []
    for index in range(n):
        polynomial = torch.ones(1, dtype=torch.float64)
        for j, q in enumerate(finite):
            if j != index:
                polynomial = F.pad(polynomial, (1, 0)) - q * F.pad(polynomial, (0, 1))
        b.append(F.pad(polynomial, (0, n - len(polynomial))))
    double = lambda rows: torch.tensor(rows, dtype=torch.float64)  # noqa: E731
    return torch.stack(b), double(g), double(a).T.contiguous()


def run(
    case: Case,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    threads: int = 1,
    block_rows: int = 0,
    alone: bool | None = None,
    **fields,
) -> torch.Tensor:
    """The kernel's y (or what `y` and `z` among the fields hold), on scratch memory full of NaN."""
    height, width = case.out_size
    tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor) or value is None}
    numbers = {name: value for name, value in fields.items() if name not in tensors}
    y = tensors.pop("y") if "y" in tensors else place((case.batch, case.out_channels, height, width))
    spread = case.stride if case.transposed else 1
    packed = kernels.pack_weights(
        weight, case.tile, transposed=case.transposed, stride=spread, padding=case.convolution_padding
    )
    conv = operations.Conv(
        tile=case.tile,
        batch=case.batch,
        height=case.height,
        width=case.width,
        channels=case.channels,
        out_height=height,
        out_width=width,
        out_channels=case.out_channels,
        kernel_height=case.kernel,
        kernel_width=case.kernel,
        stride=1 if case.transposed else case.stride,
        pad_top=case.pad,
        pad_left=case.pad,
        spread=spread,
        x_pixel=x.stride(3),
        x=x.data_ptr(),
        weights=packed.data_ptr(),
        y=address(y),
        **({"scale": 1.0} | numbers),
    )
    conv.block_rows, conv.alone = kernels.schedule(conv, packed.nbytes, threads)
    conv.block_rows = block_rows or conv.block_rows
    conv.alone = conv.alone if alone is None else alone
    for name, tensor in tensors.items():
        setattr(conv, name, address(tensor))
    for name, tensor in (("y", y), ("z", tensors.get("z")), ("residual", tensors.get("residual"))):
        if tensor is not None:
            setattr(conv, f"{name}_pixel", tensor.stride(3))
    # A NaN in the rest of a map's last vector must not get in either: the scratch memory ends where it is said to.
    scratch = torch.full((kernels.scratch_floats(conv, threads),), float("nan"))
    conv.scratch = scratch.data_ptr()
    operations.Operations([conv]).run(threads)
    return y


def assert_within(found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """|found − exact| <= bound, element by element, and neither is NaN."""
    error = (found.double() - exact) / bound.clamp_min(1e-30)
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1.0)


SHAPES = [
    Case(DIRECT, 1, 3, 5, 1, 1),
    Case(DIRECT, 1, 64, 32, 4, 5, batch=3),  # in place: channels fill vectors
    Case(DIRECT, 1, 100, 37, 7, 9),
    Case(DIRECT, 1, 16, 17, 9, 8, stride=2),
    Case(DIRECT, 1, 5, 4, 3, 3, padding=1),
    Case(DIRECT, 3, 1, 1, 1, 1),
    Case(DIRECT, 3, 3, 64, 33, 31, batch=1),
    Case(DIRECT, 3, 37, 17, 8, 5, stride=2),
    Case(DIRECT, 3, 64, 100, 9, 9, stride=2, batch=3),
    Case(DIRECT, 3, 17, 5, 6, 6, padding=0),
    Case(DIRECT, 3, 8, 8, 5, 7, stride=2, padding=0),
    Case(DIRECT, 3, 130, 3, 4, 4),
    # Few outputs, whole vectors of terms and ragged ones; half panels, alone and behind others; groups across rows and images.
    Case(DIRECT, 3, 32, 3, 7, 9),
    Case(DIRECT, 3, 16, 4, 4, 12, stride=2),
    Case(DIRECT, 1, 32, 1, 3, 5),
    Case(DIRECT, 3, 32, 2, 1, 1, batch=5),
    Case(DIRECT, 3, 3, 16, 8, 8),
    Case(DIRECT, 3, 16, 48, 4, 4, batch=5),
    Case(DIRECT, 3, 7, 40, 6, 8),
    Case(DIRECT, 1, 24, 8, 2, 2, batch=13),
    Case(DIRECT, 1, 20, 16, 9, 12, stride=2),
    Case(DIRECT, 3, 12, 16, 17, 8, stride=3, padding=2),
    Case(DIRECT, 7, 3, 20, 12, 10, stride=2),
    Case(DIRECT, 5, 3, 17, 7, 11),
    Case(DIRECT, 5, 17, 3, 9, 10, stride=2),
    Case(DIRECT, 2, 5, 6, 4, 4, padding=0, stride=2),
    Case(DIRECT, 3, 17, 5, 6, 7, transposed=True),
    Case(DIRECT, 1, 32, 3, 5, 6, transposed=True),
    Case(DIRECT, 3, 9, 20, 5, 4, padding=0, transposed=True),
    Case(DIRECT, 5, 4, 3, 6, 6, padding=1, transposed=True),
    Case(DIRECT, 1, 4, 3, 6, 6, padding=1, transposed=True),  # which pads by −1
    # Transposes of strided ones, with rows of the result that no tap reaches, and others beyond the last tap.
    Case(DIRECT, 3, 17, 20, 4, 4, stride=2, transposed=True),
    Case(DIRECT, 3, 17, 20, 4, 5, stride=2, extra=1, transposed=True),
    Case(DIRECT, 3, 32, 3, 5, 4, stride=2, extra=1, batch=3, transposed=True),
    Case(DIRECT, 1, 16, 33, 4, 3, stride=2, extra=1, transposed=True),
    Case(DIRECT, 1, 16, 3, 4, 3, stride=3, extra=2, transposed=True),
    Case(DIRECT, 5, 3, 17, 3, 4, stride=2, padding=1, transposed=True),
    Case(DIRECT, 4, 6, 9, 3, 4, stride=3, padding=1, extra=2, transposed=True),
    Case(DIRECT, 3, 9, 8, 3, 3, stride=2, padding=0, extra=1, transposed=True),
    Case(DIRECT, 3, 9, 8, 3, 3, stride=2, padding=2, transposed=True),
    *(
        Case(tile, 3, channels, out, height, width, batch, transposed=transposed)
        for tile in (F2, F4)
        for channels, out, height, width, batch, transposed in (
            (1, 1, 1, 1, 1, False),
            (3, 5, 2, 3, 2, False),
            (5, 3, 7, 4, 3, True),
            (17, 37, 5, 9, 2, False),
            (37, 17, 8, 8, 2, True),
            (64, 100, 11, 6, 1, False),
            (100, 64, 4, 13, 2, True),
            (16, 32, 33, 33, 1, False),
            (3, 4, 4, 4, 33, False),
            (130, 70, 6, 6, 1, False),
        )
    ),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_matches_float64(case, isa):
    x, weight = case.tensors()
    source = placed(x, pixel=case.channels + 3, start=1)  # unaligned, inside a wider map, NaN on both sides
    y = place((case.batch, case.out_channels, *case.out_size), pixel=case.out_channels + 5, start=3)
    run(case, source, weight, y=y)
    assert untouched(y) and untouched(source)
    assert_within(y, case.exact(x, weight), case.roundings() * EPS * case.magnitude(x, weight))


@pytest.mark.parametrize("tile", [F2, F4])
def test_transforms_are_winograds(tile):
    """The definition's matrices give the convolution, in float64: `magnitude` speaks of the algorithm that runs."""
    to_v, to_u, to_y = winograd((1.0,) if tile == F2 else (0.625, 1.5))
    d, g = (torch.randn(size, dtype=torch.float64, generator=generator()) for size in (tile + 2, 3))
    expected = F.conv1d(d[None, None], g[None, None])[0, 0]
    torch.testing.assert_close(to_y @ ((to_u @ g) * (to_v @ d)), expected, rtol=0, atol=1e-13)


EPILOGUES = [
    {"bias"},
    {"bias", "image_bias"},
    {"image_bias_shared", "residual"},
    {"mask"},
    {"mask", "mask_factor", "residual"},
    {"bias", "residual", "scale"},
    {"bias", "scale"},
    {"z"},
    {"z", "bias", "relu", "z_mask"},
    {"z", "relu", "z_multiply", "z_add", "z_mask"},
    {"z", "silu", "z_add", "residual"},
    {"z", "z_multiply", "z_slopes", "scale"},
    {"z", "relu", "z_multiply", "z_add", "z_mask", "no_y", "bias", "image_bias", "mask", "mask_factor", "residual", "scale"},
]
CASES = [
    Case(DIRECT, 3, 5, 37, 5, 6, stride=2),
    Case(DIRECT, 1, 32, 20, 3, 5),
    # Whole vectors, which the product finishes itself where it can: several runs, a half panel, a strided transpose.
    Case(DIRECT, 1, 300, 48, 4, 7, batch=3),
    Case(DIRECT, 3, 50, 16, 5, 8, stride=2),
    Case(DIRECT, 3, 9, 32, 4, 4, stride=2, extra=1, transposed=True),
    Case(DIRECT, 3, 33, 3, 5, 6),
    Case(DIRECT, 3, 9, 17, 3, 4, stride=2, extra=1, transposed=True),
    Case(F2, 3, 9, 21, 5, 3, batch=3),
    Case(F4, 3, 6, 100, 7, 5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("parts", EPILOGUES, ids=lambda parts: "+".join(sorted(parts)))
def test_epilogues(case, parts, isa):
    x, weight = case.tensors()
    shape = (case.batch, case.out_channels, *case.out_size)
    out = case.out_channels
    vector = lambda seed: normal(out, seed=seed)  # noqa: E731
    fields: dict = {}
    exact, size = case.exact(x, weight), case.roundings() * case.magnitude(x, weight)
    if "bias" in parts:
        fields["bias"] = vector(3)
    if "image_bias" in parts:
        fields |= {"image_bias": normal(case.batch, out, seed=4), "image_bias_image": out}
    if "image_bias_shared" in parts:
        fields |= {"image_bias": vector(4), "image_bias_image": 0}
    for name in ("bias", "image_bias"):
        if name in fields:
            added = fields[name].double().view(-1, out, 1, 1)
            exact, size = exact + added, size + 2 * (exact.abs() + added.abs())
    if "mask" in parts:
        chosen = torch.rand(shape, generator=generator(5)) < 0.5
        fields["mask"] = bits(chosen)
        factor = torch.ones(out)
        if "mask_factor" in parts:
            factor = fields["mask_factor"] = vector(6)
        factor = factor.double().view(1, -1, 1, 1) * chosen
        exact, size = exact * factor, (size + exact.abs()) * factor.abs()
    if "residual" in parts:
        residual = normal(*shape, seed=7)
        fields |= {"residual": placed(residual, out + 2, 1), "residual_factor": -0.7}
        term = -0.7 * residual.double()
        exact, size = exact + term, size + exact.abs() + 3 * term.abs()
    if "scale" in parts:
        fields["scale"] = 0.3
        exact, size = 0.3 * exact, 0.3 * (size + 2 * exact.abs())
    y = None if "no_y" in parts else place(shape, pixel=out + 1, start=2)
    fields["y"] = y
    if "z" not in parts:
        run(case, placed(x), weight, **fields)
        assert untouched(y)
        assert_within(y, exact, EPS * size)
        return
    z = fields["z"] = place(shape, pixel=out + 3, start=1)
    multiply, add = torch.ones(out), torch.zeros(out)
    if "z_multiply" in parts:
        multiply = fields["z_multiply"] = vector(8)
    if "z_add" in parts:
        add = fields["z_add"] = vector(9)
    fields["z_activation"] = operations.RELU if "relu" in parts else operations.SILU if "silu" in parts else operations.IDENTITY
    if "z_mask" in parts:
        fields["z_mask"] = torch.full((*shape[:1], *shape[2:], -(-out // 8)), 0xFF, dtype=torch.uint8)
    chosen = torch.rand(shape, generator=generator(10)) < 0.5
    if "z_slopes" in parts:
        fields["z_slopes"] = bits(chosen)
    run(case, placed(x), weight, **fields)
    assert untouched(z)
    if y is not None:
        assert untouched(y)
        assert_within(y, exact, EPS * size)
        # What follows y is the same two roundings in PyTorch; bits of the mask near zero are y's own, therefore.
        v = y * multiply.view(1, -1, 1, 1) + add.view(1, -1, 1, 1)
        if "z_mask" in parts:
            torch.testing.assert_close(fields["z_mask"], bits(v > 0), rtol=0, atol=0)
        if "silu" not in parts:
            expected = v * chosen if "z_slopes" in parts else v.relu() if "relu" in parts else v
            torch.testing.assert_close(z.contiguous(), expected.contiguous(), rtol=0, atol=0)
    exact = exact * multiply.double().view(1, -1, 1, 1)
    size = size * multiply.double().abs().view(1, -1, 1, 1) + exact.abs()
    exact, size = exact + add.double().view(1, -1, 1, 1), size + exact.abs() + add.double().abs().view(1, -1, 1, 1)
    if "z_slopes" in parts:
        exact = exact * chosen
    if "relu" in parts:
        exact = exact.relu()
        if "z_mask" in parts:
            torch.testing.assert_close(fields["z_mask"], bits(z > 0), rtol=0, atol=0)
    if "silu" in parts:  # of derivative below 1.1, taken with a handful of roundings
        exact, size = F.silu(exact), 1.1 * size + 8 * exact.abs()
    assert_within(z, exact, EPS * size)


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_maps(case, activation, per_image, isa):
    """activation((x − subtract) multiply + add) comes in; the border stays zero."""
    x, weight = case.tensors()
    rows = case.batch if per_image else 1
    subtract, multiply, add = (normal(rows, case.channels, seed=seed) for seed in (3, 4, 5))
    fields = {"subtract": subtract, "multiply": multiply, "add": add, "affine_image": case.channels if per_image else 0}
    number = {"identity": operations.IDENTITY, "relu": operations.RELU, "silu": operations.SILU}[activation]
    y = run(case, placed(x, case.channels + 1), weight, activation=number, **fields)
    view = lambda v: v.double().view(rows, -1, 1, 1)  # noqa: E731
    v = (x.double() - view(subtract)) * view(multiply) + view(add)
    size = 4 * ((x.double().abs() + view(subtract).abs()) * view(multiply).abs() + view(add).abs()) + 8 * v.abs()
    v = {"identity": v, "relu": v.relu(), "silu": F.silu(v)}[activation]
    # The input's own roundings go through the convolution as its terms do.
    bound = case.roundings() * case.magnitude(v, weight) + 1.1 * case.magnitude(size, weight)
    assert_within(y, case.exact(v, weight), EPS * bound)


@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        Case(F4, 3, 70, 70, 9, 9, batch=3),
        Case(DIRECT, 3, 70, 70, 9, 9),
        Case(DIRECT, 3, 3, 16, 8, 8, batch=3),
        Case(DIRECT, 1, 20, 40, 4, 4, batch=7),
    ],
    ids=str,
)
def test_threads_blocks_and_neighbours_change_no_bit(case, isa):
    x, weight = case.tensors()
    expected = run(case, placed(x), weight).contiguous()
    for alone in (False, True):
        for threads, block_rows in ((2, 0), (3, 1), (1, 1), (2, 3), (2, 1000)):
            found = run(case, placed(x), weight, threads=threads, block_rows=block_rows, alone=alone)
            torch.testing.assert_close(found.contiguous(), expected, rtol=0, atol=0)
    alone = Case(**(vars(case) | {"batch": 1}))
    for image in range(case.batch):
        found = run(alone, placed(x[image : image + 1]), weight)
        torch.testing.assert_close(found[0].contiguous(), expected[image], rtol=0, atol=0)


@pytest.mark.parametrize("tile", [DIRECT, F2, F4])
@pytest.mark.parametrize(("channels", "size", "batch"), [(128, 32, 1), (256, 8, 4), (64, 16, 2), (32, 16, 2), (16, 32, 2)])
def test_error_is_within_four_times_that_of_pytorch(tile, channels, size, batch):
    case = Case(tile, 3, channels, channels, size, size, batch)
    x, weight = case.tensors()
    for image in (x, x.relu(), F.silu(x)):
        exact = case.exact(image, weight)
        ours = (run(case, placed(image), weight).double() - exact).norm()
        theirs = (F.conv2d(image, weight, padding=1).double() - exact).norm()
        assert float(ours) <= 4.0 * float(theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tile", [DIRECT, F2, F4])
def test_what_is_not_finite_stays_so_and_stays_where_it_is(tile, value, isa):
    case = Case(tile, 3, 5, 20, 12, 12)
    x, weight = case.tensors()
    x[0, 2, 5, 5] = value
    y = run(case, placed(x), weight)
    exact = case.exact(x, weight)
    assert not bool(y.isfinite()[~exact.isfinite()].any())
    rows = slice(4 // tile * tile, 6 // tile * tile + tile)  # the tiles that see it
    inside = torch.zeros_like(exact, dtype=torch.bool)
    inside[0, :, rows, rows] = True
    assert bool(y.isfinite()[~inside].all())
    if tile == DIRECT:
        torch.testing.assert_close(y.contiguous().double(), exact, rtol=1e-3, atol=1e-3, equal_nan=True)


def activated(v: torch.Tensor, activation: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The kernels' activation of a row of numbers, by a 1 x 1 convolution with weight one."""
    case = Case(DIRECT, 1, 1, 1, 1, len(v), batch=1)
    z = place((1, 1, 1, len(v)))
    run(case, placed(v.view(1, 1, 1, -1)), torch.ones(1, 1, 1, 1), y=None, z=z, z_activation=activation, z_mask=mask)
    return z.view(-1)


def test_silu_of_everything(isa):
    v = torch.cat(
        [
            torch.linspace(-120, 120, 4001),
            torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, -3e38, 3e38, math.inf, -math.inf, math.nan]),
        ]
    )
    exact = F.silu(v.double())
    found = activated(v, operations.SILU)
    # exp within 2 ulp of an argument clamped at 87, below which nothing is left.
    torch.testing.assert_close(found.double(), exact, rtol=8 * EPS, atol=121 * math.exp(-87), equal_nan=True)


def test_relu_is_pytorchs(isa):
    v = torch.tensor([-1.0, -0.0, 0.0, 2.0, math.inf, -math.inf, math.nan, 1e-40])
    mask = torch.full((len(v),), 0xFF, dtype=torch.uint8)
    torch.testing.assert_close(activated(v, operations.RELU, mask), v.relu(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mask, (v > 0).to(torch.uint8), rtol=0, atol=0)  # nothing passes at the kink itself


# --- GroupNorm ---------------------------------------------------------------------------------------------------------


def affine(x: torch.Tensor, groups: int, gamma: torch.Tensor, beta: torch.Tensor, eps: float, threads: int = 1) -> torch.Tensor:
    """(subtract, multiply, add, inverse), each (batch, channels)."""
    batch, channels, height, width = x.shape
    result = torch.full((4, batch, channels), float("nan"))
    norm = operations.GroupNormAffine(
        batch=batch,
        channels=channels,
        groups=groups,
        pixels=height * width,
        x_pixel=x.stride(3),
        eps=eps,
        x=x.data_ptr(),
        gamma=gamma.data_ptr(),
        beta=beta.data_ptr(),
        **{name: result[i].data_ptr() for i, name in enumerate(("subtract", "multiply", "add", "inverse"))},
    )
    operations.Operations([norm]).run(threads)
    return result


NORMS = [(1, 1), (3, 3), (5, 1), (16, 4), (36, 12), (60, 4), (100, 25), (130, 2), (256, 32), (96, 96)]


@pytest.mark.parametrize(("channels", "groups"), NORMS)
@pytest.mark.parametrize("size", [(1, 2), (5, 7), (16, 9)])
def test_group_norm(channels, groups, size, isa):
    x = normal(3, channels, *size, seed=1) * 2 + 0.5
    gamma, beta = normal(channels, seed=2), normal(channels, seed=3)
    found = affine(placed(x, channels + 3, 1), groups, gamma, beta, 1e-5)
    subtract, multiply, add, inverse = (row.double()[..., None, None] for row in found)
    exact = F.group_norm(x.double(), groups, gamma.double(), beta.double(), 1e-5)
    grouped = x.double().view(3, groups, -1)
    deviation = (grouped.var(dim=2, correction=0) + 1e-5).sqrt().repeat_interleave(channels // groups, 1)[..., None, None]
    scale = gamma.double().abs().view(-1, 1, 1) / deviation
    # Sums of squares of x − x₀ over 32 pixels round 32 times, where |x − x₀| is at most the group's range; the mean once.
    reach = (grouped.amax(2) - grouped.amin(2)).repeat_interleave(channels // groups, 1)[..., None, None]
    centred = (x.double() - subtract).abs()
    bound = EPS * scale * (x.double().abs().amax() + 34 * reach + centred * (4 + 34 * (reach / deviation) ** 2))
    assert_within((x.double() - subtract) * multiply + add, exact, bound)
    torch.testing.assert_close(
        inverse * deviation, torch.ones_like(deviation), rtol=0, atol=float((EPS * (4 + 34 * (reach / deviation) ** 2)).max())
    )
    again = affine(placed(x, channels + 3, 1), groups, gamma, beta, 1e-5, threads=2)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_group_norm_of_a_large_mean_is_no_worse_than_pytorchs(offset):
    x = normal(2, 32, 8, 8) + offset
    ones, zeros = torch.ones(32), torch.zeros(32)
    exact = F.group_norm(x.double(), 8)
    subtract, multiply, _, _ = affine(placed(x), 8, ones, zeros, 1e-5)[..., None, None]
    ours = ((x - subtract) * multiply - exact).abs().max()
    assert float(ours) <= float((F.group_norm(x, 8) - exact).abs().max())


def test_group_norm_of_a_constant_and_of_nan():
    ones, zeros = torch.ones(8), torch.zeros(8)
    x = torch.full((2, 8, 4, 4), 3.0)
    x[1, 5, 2, 2] = float("nan")
    found = affine(placed(x), 4, ones, zeros, 1e-5)
    torch.testing.assert_close(found[0, 0], torch.full((8,), 3.0), rtol=EPS, atol=0)
    torch.testing.assert_close(found[3, 0], torch.full((8,), 1e-5**-0.5), rtol=1e-6, atol=0)
    finite = found.isfinite().all(dim=0)
    assert finite.tolist() == [[True] * 8, [True] * 4 + [False] * 2 + [True] * 2]


@pytest.mark.parametrize("activation", [operations.IDENTITY, operations.SILU])
@pytest.mark.parametrize("form", ["plain", "residual", "in place"])
@pytest.mark.parametrize(("channels", "groups"), NORMS)
def test_group_norm_vjp(channels, groups, form, activation, isa):
    shape = (2, channels, 5, 7)
    x, dh, residual = normal(*shape, seed=1) + 0.5, normal(*shape, seed=2), normal(*shape, seed=3)
    gamma, beta = normal(channels, seed=4), normal(channels, seed=5)
    source, cotangent = placed(x, channels + 1), placed(dh, channels + 2, 1)
    rows = affine(source, groups, gamma, beta, 1e-5)
    dx = cotangent if form == "in place" else place(shape, channels + 3, 2)
    added = placed(residual, channels + 4)
    vjp = operations.GroupNormVjp(
        batch=2,
        channels=channels,
        groups=groups,
        activation=activation,
        pixels=35,
        x_pixel=source.stride(3),
        dh_pixel=cotangent.stride(3),
        dx_pixel=dx.stride(3),
        x=source.data_ptr(),
        gamma=gamma.data_ptr(),
        dh=cotangent.data_ptr(),
        dx=dx.data_ptr(),
        **{name: rows[i].data_ptr() for i, name in enumerate(("subtract", "multiply", "add", "inverse"))},
    )
    if form == "residual":
        vjp.residual, vjp.residual_pixel, vjp.residual_factor = added.data_ptr(), added.stride(3), 0.3
    operations.Operations([vjp]).run(1)
    assert untouched(dx)
    leaf = x.double().requires_grad_()
    n = F.group_norm(leaf, groups, gamma.double(), beta.double(), 1e-5)
    h = F.silu(n) if activation == operations.SILU else n
    (exact,) = torch.autograd.grad(h, leaf, dh.double())
    spread = lambda v: v.repeat_interleave(channels // groups, 1)[..., None, None]  # noqa: E731
    grouped = x.double().view(2, groups, -1)
    inverse = spread((grouped.var(2, correction=0) + 1e-5).rsqrt())
    normalised = (x.double() - spread(grouped.mean(2))).abs() * inverse
    d = 1.1 * dh.double().abs() * gamma.double().abs().view(-1, 1, 1)
    mean = lambda v: spread(v.reshape(2, groups, -1).mean(2))  # noqa: E731
    terms = inverse * (d + mean(d) + normalised * mean(d * normalised))
    # 32 roundings of either sum, a dozen of everything else, and what n's own error does to the sigmoid in it.
    n_size = 1 + n.detach().abs() + normalised * gamma.double().abs().view(-1, 1, 1)
    bound = EPS * ((32 + 16) * terms + 40 * inverse * (d * n_size + mean(d * n_size) * (1 + normalised) ** 2))
    if form == "residual":
        exact, bound = exact + 0.3 * residual.double(), bound + EPS * residual.double().abs()
    assert_within(dx, exact, bound)


# --- elementwise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 8, 17, 37])
@pytest.mark.parametrize("with_b", [False, True])
def test_sum(channels, with_b, isa):
    a, b = normal(2, channels, 3, 5, seed=1), normal(2, channels, 3, 5, seed=2)
    views = placed(a, channels + 1, 1), placed(b, channels + 2), place((2, channels, 3, 5), channels + 3, 2)
    total = operations.Sum(
        pixels=30,
        channels=channels,
        a_pixel=channels + 1,
        b_pixel=channels + 2,
        y_pixel=channels + 3,
        factor_a=0.7,
        factor_b=-1.3,
        a=views[0].data_ptr(),
        b=views[1].data_ptr() if with_b else None,
        y=views[2].data_ptr(),
    )
    operations.Operations([total]).run(2)
    assert untouched(views[2])
    expected = 0.7 * a.double() - (1.3 * b.double() if with_b else 0.0)
    assert_within(views[2], expected, 4 * EPS * (a.double().abs() + 1.3 * b.double().abs()))


@pytest.mark.parametrize("channels", [1, 3, 8, 17, 37])
@pytest.mark.parametrize("form", ["plain", "multiply", "residual", "both"])
def test_masked(channels, form, isa):
    shape = (2, channels, 3, 5)
    d, residual, multiply = normal(*shape, seed=1), normal(*shape, seed=2), normal(channels, seed=3)
    chosen = torch.rand(shape, generator=generator(4)) < 0.5
    d[~chosen] = float("inf")  # what the mask stops stays outside
    mask, views = bits(chosen), (placed(d, channels + 1), place(shape, channels + 2, 1), placed(residual, channels + 3))
    masked = operations.Masked(
        pixels=30,
        channels=channels,
        d_pixel=channels + 1,
        y_pixel=channels + 2,
        d=views[0].data_ptr(),
        mask=mask.data_ptr(),
        y=views[1].data_ptr(),
    )
    expected = torch.where(chosen, d.double(), 0.0)
    if form in ("multiply", "both"):
        masked.multiply = multiply.data_ptr()
        expected = expected * multiply.double().view(-1, 1, 1)
    if form in ("residual", "both"):
        masked.residual, masked.residual_pixel, masked.residual_factor = views[2].data_ptr(), channels + 3, 0.3
        expected = expected + 0.3 * residual.double()
    operations.Operations([masked]).run(2)
    assert untouched(views[1])
    assert_within(views[1], expected, 4 * EPS * (expected.abs() + residual.double().abs()))


# --- packing and the operator --------------------------------------------------------------------------------------------


def test_pack_weights_refuses():
    weight = normal(4, 3, 3, 3)
    for bad in (weight.double(), weight[0]):
        with pytest.raises(ValueError, match="float32 on the CPU with four axes"):
            kernels.pack_weights(bad, DIRECT)
    for bad, tile in ((weight, 3), (normal(4, 3, 5, 5), F2), (normal(4, 3, 1, 1), F4)):
        with pytest.raises(ValueError, match="`tile` is 1, or 2 or 4 for 3 x 3 kernels"):
            kernels.pack_weights(bad, tile)
    for tile, transposed, stride in ((F2, True, 2), (DIRECT, False, 2), (DIRECT, True, 0)):
        with pytest.raises(ValueError, match="`stride` above 1 is that of a transpose"):
            kernels.pack_weights(weight, tile, transposed=transposed, stride=stride)


def test_packing_reads_any_layout():
    weight = normal(20, 9, 3, 3)
    for tile in (DIRECT, F2, F4):
        expected = kernels.pack_weights(weight, tile)
        for other in (weight.to(memory_format=torch.channels_last), weight.transpose(0, 1).contiguous().transpose(0, 1)):
            torch.testing.assert_close(kernels.pack_weights(other, tile), expected, rtol=0, atol=0)
        turned = weight.flip(2, 3).transpose(0, 1)
        torch.testing.assert_close(kernels.pack_weights(weight, tile, transposed=True), kernels.pack_weights(turned, tile))


@pytest.mark.parametrize(("tile", "kernel", "stride"), [(DIRECT, 1, 1), (DIRECT, 3, 2), (DIRECT, 5, 1), (F2, 3, 1), (F4, 3, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_conv2d(tile, kernel, stride, with_bias):
    x, weight, bias = normal(2, 5, 9, 7), normal(6, 5, kernel, kernel), normal(6) if with_bias else None
    packed = kernels.pack_weights(weight, tile)
    arguments = (x, packed, bias, 6, kernel, stride, tile)
    exact = conv2d_ref(x.double(), weight.double(), None if bias is None else bias.double(), stride)
    for image in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        y = kernels.packed_conv2d(image, *arguments[1:])
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    for index, bad, message in (
        (0, x.double(), "`x` is float32 with four axes"),
        (0, x[:0], "not empty"),
        (1, packed[:-1], "`packed` is contiguous float32 with"),
        (1, packed.double(), "`packed` is contiguous float32 with"),
        (2, normal(5), "`bias` is contiguous float32 with 6 values"),
        (2, normal(12)[::2], "`bias` is contiguous float32 with 6 values"),
        (3, 60, "`packed` is contiguous float32 with"),
        (5, 0, "`tile` is 1, or 2 or 4 for"),
        (6, 3, "`tile` is 1, or 2 or 4 for"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.packed_conv2d(*arguments[:index], bad, *arguments[index + 1 :])


@pytest.mark.parametrize(
    ("tile", "kernel", "stride"), [(DIRECT, 1, 1), (DIRECT, 3, 2), (DIRECT, 1, 2), (DIRECT, 5, 3), (F2, 3, 1), (F4, 3, 1)]
)
@pytest.mark.parametrize("size", [(9, 7), (8, 6)])
def test_packed_conv2d_vjp(tile, kernel, stride, size):
    x, weight = normal(2, 5, *size).double().requires_grad_(), normal(6, 5, kernel, kernel)
    y = conv2d_ref(x, weight.double(), stride=stride)
    dy = normal(*y.shape, seed=1)
    (exact,) = torch.autograd.grad(y, x, dy.double())
    packed = kernels.pack_weights(weight, tile, transposed=True, stride=stride)
    dx = kernels.packed_conv2d_vjp(dy, packed, (5, *size), kernel, stride, tile)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(dx.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    with pytest.raises(ValueError, match=r"gives \(.*\) of stride .*, `dy` has"):
        kernels.packed_conv2d_vjp(dy, packed, (5, 20, 20), kernel, stride, tile)


def test_packed_conv2d_says_that_it_has_no_gradient_and_which_call_is_the_transpose():
    x, weight = normal(2, 5, 9, 7), normal(6, 5, 3, 3)
    with pytest.raises(NotImplementedError, match="packed_conv2d has no gradient.*packed_conv2d_vjp.*transposed=True"):
        kernels.packed_conv2d(x.clone().requires_grad_(), kernels.pack_weights(weight, F2), None, 6, 3, 1, F2)


@pytest.mark.parametrize("case", [Case(DIRECT, 1, 16, 48, 106, 104), Case(DIRECT, 3, 3, 40, 113, 120)], ids=str)
def test_results_larger_than_caches(case, isa):
    """Whose stores may go past them; above 4 MiB, aligned and not, in whole vectors and not."""
    x, weight = case.tensors()
    shape = (case.batch, case.out_channels, *case.out_size)
    exact = case.exact(x, weight)
    for pixel in (case.out_channels, case.out_channels + 1, 48):
        y = place(shape, pixel=pixel)
        run(case, placed(x), weight, y=y, threads=2, bias=torch.zeros(case.out_channels))
        assert untouched(y)
        assert_within(y, exact, case.roundings() * EPS * case.magnitude(x, weight))


@pytest.mark.parametrize("case", [Case(DIRECT, 3, 16, 16, 8, 8), Case(F4, 3, 16, 32, 16, 16)], ids=str)
def test_more_threads_than_cores_give_the_same_bits(case):
    x, weight = case.tensors()
    expected = run(case, placed(x), weight).contiguous()
    for alone in (False, True):
        found = run(case, placed(x), weight, threads=4 * (os.cpu_count() or 1), block_rows=1, alone=alone)
        torch.testing.assert_close(found.contiguous(), expected, rtol=0, atol=0)


# --- memory ---------------------------------------------------------------------------------------------------------------


def test_under_sanitizers():
    """Kernels on maps that end with their memory, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    done = under_sanitizers("import test_cpu_convolution; test_cpu_convolution.for_sanitizers()")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all kernels ran" in done.stdout
    overrun = under_sanitizers("import test_cpu_convolution; test_cpu_convolution.overrun()")
    assert overrun.returncode != 0 and "heap-buffer-overflow" in overrun.stderr, "the sanitizer does not look"


def for_sanitizers() -> None:
    for case in SHAPES:
        x, weight = case.tensors()
        run(case, placed(x), weight)
    for case in CASES:
        for parts in EPILOGUES:
            test_epilogues(case, parts, None)
    for channels, groups in NORMS:
        for form in ("plain", "in place", "residual"):
            test_group_norm_vjp(channels, groups, form, operations.SILU, None)
    for channels in (1, 3, 17):
        test_sum(channels, True, None)
        test_masked(channels, "both", None)
    print("all kernels ran")


def overrun() -> None:
    """Reads one float beyond a map."""
    case = Case(DIRECT, 3, 5, 3, 4, 4, batch=1)
    x, weight = case.tensors()
    wide = Case(DIRECT, 3, 6, 3, 4, 4, batch=1)
    run(wide, placed(x), wide.tensors()[1])
