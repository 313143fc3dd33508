"""Networks on 3 x 8 x 8 images whose graphs the CPU engine's planner must follow, or leave to PyTorch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from conftest import randomize_batch_norms
from torch import nn

from coupfast.models.dm_wide_resnet import DMWideResNet
from coupfast.models.wide_resnet import WideResNet


class Net(nn.Module):
    """`forward(network, x)` with a dictionary of layers."""

    def __init__(self, layers: dict[str, nn.Module], forward: Callable) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleDict(layers), forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layers, x)


def conv(channels: int, out: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, **{"padding": kernel // 2} | options)


class TorchvisionBlock(nn.Module):
    """As torchvision's BasicBlock: in-place ReLUs, the shortcut after the main path, an in-place sum."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, out, stride=stride, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out, bias=False), nn.BatchNorm2d(out)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class TorchvisionResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layers = nn.Sequential(TorchvisionBlock(8, 8, 1), TorchvisionBlock(8, 12, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))


def _value_read_by_several(n, x):
    h = n["a"](x)
    z = F.relu(h)
    return n["b"](z) + n["c"](z) * 0.5 + h


def _concatenations(n, x):
    h, g = n["a"](x), F.relu(n["b"](x))
    inner = torch.cat([h, g, h], dim=1)  # one value twice
    return n["c"](torch.cat([inner, h, x], dim=1)) + n["d"](inner)


def _scaled(n, x):
    h = n["a"](x)
    h = (n["b"](F.silu(n["norm"](h))) + h) / 2**0.5
    return (h + n["c"](h)) * 0.25


def _scaled_relus(n, x):
    h = F.relu(n["a"](x) * 0.5)
    h = F.relu(n["b"](h) * 2.0 + h)
    return n["c"](F.relu(n["bn"](h))) / 3


def _strided_norm(n, x):
    return n["c"](F.silu(n["norm2"](n["b"](F.silu(n["norm"](n["a"](x)))))))


def _inner_products(n, x):
    h = n["a"](x)
    tokens = h.flatten(2).transpose(1, 2)
    tokens = F.scaled_dot_product_attention(tokens, tokens * 0.7, tokens)
    return n["b"](tokens.transpose(1, 2).reshape(h.shape) + h)


def _bn_read_twice(n, x):
    h = n["bn"](n["a"](x))
    return F.relu(h) + n["b"](h)


def _z_is_output_of_a_pool(n, x):
    h = F.max_pool2d(F.relu(n["a"](x)), 2)
    return F.interpolate(n["b"](h), scale_factor=2.0)


#: name → (layers, forward): images → images or logits.
GRAPHS: dict[str, tuple[Callable[[], dict[str, nn.Module]], Callable]] = {
    "one convolution": (lambda: {"a": conv(3, 5)}, lambda n, x: n["a"](x)),
    "without a bias": (lambda: {"a": conv(3, 5, bias=False)}, lambda n, x: n["a"](x)),
    "convolution and relu": (lambda: {"a": conv(3, 5)}, lambda n, x: F.relu(n["a"](x))),
    "no convolution": (lambda: {"fc": nn.Linear(192, 10)}, lambda n, x: n["fc"](torch.sin(x).flatten(1))),
    "only elementwise": (lambda: {"i": nn.Identity()}, lambda n, x: x * x.flip(3)),
    "the image itself": (lambda: {"i": nn.Identity()}, lambda n, x: x),
    "batch norm without relu": (
        lambda: {"a": conv(3, 9), "bn": nn.BatchNorm2d(9), "b": conv(9, 4, 1)},
        lambda n, x: n["b"](torch.tanh(n["bn"](n["a"](x)))),
    ),
    "batch norm and relu": (
        lambda: {"a": conv(3, 9, bias=False), "bn": nn.BatchNorm2d(9), "b": conv(9, 4, 1)},
        lambda n, x: n["b"](F.relu(n["bn"](n["a"](x)))),
    ),
    "batch norm without parameters": (
        lambda: {"a": conv(3, 9), "bn": nn.BatchNorm2d(9, affine=False), "b": conv(9, 4)},
        lambda n, x: n["b"](F.relu(n["bn"](n["a"](x)))),
    ),
    "batch norm read twice": (lambda: {"a": conv(3, 9), "bn": nn.BatchNorm2d(9), "b": conv(9, 9)}, _bn_read_twice),
    "value read by several": (lambda: {"a": conv(3, 7), "b": conv(7, 7), "c": conv(7, 7, 1)}, _value_read_by_several),
    "concatenations": (
        lambda: {"a": conv(3, 5), "b": conv(3, 6), "c": conv(24, 4), "d": conv(16, 4, 1)},
        _concatenations,
    ),
    "residual first": (
        lambda: {"a": conv(3, 8), "b": conv(8, 8)},
        lambda n, x: (lambda h: h + n["b"](F.relu(h)))(n["a"](x)),
    ),
    "residual last": (
        lambda: {"a": conv(3, 8), "b": conv(8, 8)},
        lambda n, x: (lambda h: n["b"](F.relu(h)) + h)(n["a"](x)),
    ),
    "sum with itself": (lambda: {"a": conv(3, 8), "b": conv(8, 3)}, lambda n, x: n["b"](F.relu((lambda h: h + h)(n["a"](x))))),
    "sum with a constant": (lambda: {"a": conv(3, 8), "b": conv(8, 3)}, lambda n, x: n["b"](n["a"](x) + 1.0)),
    "broadcast sum": (
        lambda: {"a": conv(3, 8), "b": conv(3, 8)},
        lambda n, x: n["a"](x) + n["b"](x).mean(dim=(2, 3), keepdim=True),
    ),
    "times zero": (lambda: {"a": conv(3, 8), "b": conv(8, 8)}, lambda n, x: (n["a"](x) * 0.0) + n["b"](n["a"](x))),
    "scales": (lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 8), "norm": nn.GroupNorm(4, 8)}, _scaled),
    "scaled relus": (lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 2), "bn": nn.BatchNorm2d(8)}, _scaled_relus),
    "group norm before a stride": (
        lambda: {
            "a": conv(3, 8),
            "b": conv(8, 12, stride=2),
            "c": conv(12, 5),
            "norm": nn.GroupNorm(2, 8),
            "norm2": nn.GroupNorm(3, 12),
        },
        _strided_norm,
    ),
    "relu before a stride": (
        lambda: {"a": conv(3, 8), "b": conv(8, 12, stride=2), "bn": nn.BatchNorm2d(12), "c": conv(12, 17, 1, stride=2)},
        lambda n, x: F.relu(n["c"](F.relu(n["bn"](n["b"](F.relu(n["a"](x))))))),
    ),
    "group norm without silu": (
        lambda: {"a": conv(3, 8), "b": conv(8, 3), "norm": nn.GroupNorm(8, 8)},
        lambda n, x: n["b"](n["norm"](n["a"](x))),
    ),
    "attention": (lambda: {"a": conv(3, 8), "b": conv(8, 3)}, _inner_products),
    "max-pool": (lambda: {"a": conv(3, 8), "b": conv(8, 3)}, _z_is_output_of_a_pool),
    "group convolution": (
        lambda: {"a": conv(3, 8), "b": conv(8, 8, groups=4), "c": conv(8, 3)},
        lambda n, x: n["c"](F.relu(n["b"](F.relu(n["a"](x))))),
    ),
    "dilated convolution": (
        lambda: {"a": conv(3, 8), "b": nn.Conv2d(8, 8, 3, padding=2, dilation=2), "c": conv(8, 3)},
        lambda n, x: n["c"](F.relu(n["b"](F.relu(n["a"](x))))),
    ),
    "transposed convolution": (
        lambda: {"a": conv(3, 8, stride=2), "b": nn.ConvTranspose2d(8, 8, 2, stride=2), "c": conv(8, 3)},
        lambda n, x: n["c"](F.relu(n["b"](F.relu(n["a"](x))))),
    ),
    "other kernels": (
        lambda: {
            "a": conv(3, 6, 5),
            "b": conv(6, 7, 1, padding=1),
            "c": conv(7, 4, 3, padding=0),
            "d": conv(4, 3, 2, padding=0),
        },
        lambda n, x: n["d"](F.relu(n["c"](n["b"](F.relu(n["a"](x)))))),
    ),
    "oblong kernel": (
        lambda: {"a": nn.Conv2d(3, 6, (1, 3), padding=(0, 1)), "b": conv(6, 3)},
        lambda n, x: n["b"](n["a"](x)),
    ),
    "a weight in two places": (
        lambda: {"a": conv(3, 8), "b": conv(8, 8)},
        lambda n, x: n["b"](F.relu(n["b"](F.relu(n["a"](x))))),
    ),
    "dead ends": (
        lambda: {"a": conv(3, 8), "b": conv(8, 8)},
        lambda n, x: (lambda h: (n["b"](h).detach(), F.relu(h))[1])(n["a"](x)),
    ),
    "a detached part": (
        lambda: {"a": conv(3, 8), "b": conv(8, 8)},
        lambda n, x: (lambda h: n["b"](F.relu(h)) * torch.sigmoid(h.detach()))(n["a"](x)),
    ),
    "in place": (
        lambda: {"a": conv(3, 8), "b": conv(8, 8), "bn": nn.BatchNorm2d(8)},
        lambda n, x: F.relu_(n["b"](F.relu_(n["bn"](n["a"](x)))).add_(1.0).mul_(0.5)),
    ),
    "torchvision": (lambda: {"net": TorchvisionResNet()}, lambda n, x: n["net"](x)),
    "WideResNet": (lambda: {"net": WideResNet(10, 1)}, lambda n, x: n["net"](x)),
    "DMWideResNet relu": (lambda: {"net": DMWideResNet(10, 1, activation="relu")}, lambda n, x: n["net"](x)),
    "DMWideResNet silu": (lambda: {"net": DMWideResNet(10, 1)}, lambda n, x: n["net"](x)),
}


def network(name: str) -> nn.Module:
    """One of `GRAPHS` with weights of ordinary size and batch norms as after training, float32."""
    layers, forward = GRAPHS[name]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        made = Net(layers(), forward)
        randomize_batch_norms(made, torch.Generator().manual_seed(12))
        for module in made.modules():
            if isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
    return made.eval().requires_grad_(False)


def moved(network: nn.Module, offset: int) -> nn.Module:
    """The network with its weights at so many bytes after a cache line."""
    for tensor in [*network.parameters(), *network.buffers()]:
        size = tensor.element_size()
        room = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
        start = -room.data_ptr() % 64 + offset // size * size
        place = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        tensor.data = place
    return network
