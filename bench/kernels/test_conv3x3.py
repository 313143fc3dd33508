"""A 3 × 3 convolution with its epilogue: PyTorch's (cuDNN's), channels last and contiguous, and the fused kernel's.

Bound by arithmetic: judge it by multiplications and additions a second, those with the padding's zeros included. PyTorch's are
in float32, with TF32 off; `tf32` is compared too, and computes something else.
"""

import pytest
import torch

from coupfast.engine.precision import strict_float32
from coupfast_kernels.conv3x3 import PRECISIONS, conv3x3, conv3x3_ref, pack_weight

# DDPM++ deep's most frequent layers, and a WRN-28-10's.
LAYERS = [
    (128, 128, 32),
    (256, 256, 16),
    (512, 256, 16),
    (256, 256, 8),
    (256, 256, 4),
    (160, 160, 32),
    (320, 320, 16),
    (640, 640, 8),
]

# Relative errors of one product (see `tf32x3_ref`; of `tf32`: hardware that cuts a factor's last bits off), beside the sum's.
PRODUCT = {"ieee": 2.0**-24, "tf32x3": 2.0**-21, "tf32": 2.0**-9}


@pytest.mark.parametrize("implementation", ["ref, contiguous", "ref, channels_last", *PRECISIONS])
@pytest.mark.parametrize(("in_channels", "out_channels", "size"), LAYERS, ids=str)
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_conv3x3(batch, in_channels, out_channels, size, implementation, device, measure, benchmark, monkeypatch):
    if implementation in PRECISIONS and device.type == "cpu":
        pytest.skip("on the CPU the operator is the definition")
    if device.type == "cpu" and batch > 1:
        pytest.skip("the definition on a CPU is timed by bench/layers.py")
    generator = torch.Generator().manual_seed(0)
    layout = torch.contiguous_format if implementation == "ref, contiguous" else torch.channels_last

    def image(channels):
        return torch.randn(batch, channels, size, size, generator=generator).to(device).contiguous(memory_format=layout)

    x, residual = image(in_channels), image(out_channels)
    weight = torch.randn(out_channels, in_channels, 3, 3, generator=generator).to(device) / (9 * in_channels) ** 0.5
    bias, image_bias = (
        torch.randn(*shape, generator=generator).to(device) for shape in ((out_channels,), (batch, out_channels))
    )
    added = dict(image_bias=image_bias, residual=residual, scale=0.5)
    packed, in_layout = pack_weight(weight), weight.contiguous(memory_format=layout)

    def ref():
        return conv3x3_ref(x, in_layout, bias, **added)

    def fused():
        return conv3x3(x, packed, None, bias, **added, precision=implementation)

    function = fused if implementation in PRECISIONS else ref
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # PyTorch's fastest too
    with strict_float32(device.type):
        y = function()
    doubles = dict(image_bias=image_bias.double(), residual=residual.double(), scale=0.5)
    exact = conv3x3_ref(x.double(), weight.double(), bias.double(), **doubles)
    sizes = {name: abs(value) for name, value in doubles.items()}
    size_of_sum = conv3x3_ref(x.double().abs(), weight.double().abs(), bias.double().abs(), **sizes)
    # A product's error, as many roundings as there are sums, whatever their order, and the epilogue's four. Twice, since tensor
    # cores cut off where others round to nearest.
    bound = PRODUCT.get(implementation, 2.0**-24) + 2 * (9 * in_channels + 4) * 2.0**-24
    assert bool(((y.double() - exact).abs() <= bound * size_of_sum).all()), "further from float64 than its roundings allow"

    benchmark.group = f"conv3x3 B={batch} {in_channels}->{out_channels} {size}x{size} fp32 {device.type}"
    with strict_float32(device.type):
        measure(
            function,
            bytes_moved=x.nbytes + weight.nbytes + residual.nbytes + y.nbytes,
            flops=2 * 9 * in_channels * out_channels * batch * size * size,
        )
