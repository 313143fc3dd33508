"""Small random networks that every test can afford."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from coupfast import Purifier
from coupfast.data import load_images
from coupfast.engine import BoundEngine
from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.zoo import load_score
from coupfast_kernels import native, operations

# Networks of this size lose more to threads than they gain, the more so where another process wants the cores.
torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, *scope):
        """Its integers are arrays of one element. Triton before 3.7 hands them to `int`, which NumPy from 2.4 on refuses."""
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor_and_index


def randomize_batch_norms(network: nn.Module, generator: torch.Generator) -> None:
    """Statistics and affine parts as after training: an untouched batch norm is almost the identity."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape
            module.running_mean.copy_(0.2 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            if module.affine:
                module.weight.data.copy_(0.7 + 0.6 * torch.rand(shape, generator=generator))
                module.bias.data.copy_(0.2 * torch.randn(shape, generator=generator))


def small_score(dtype: torch.dtype = torch.float64) -> DDPMpp:
    """DDPM++ on 3 x 8 x 8 images with attention, a down- and an upsampling level; eps_hat of order one."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        score = DDPMpp(nf=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8)
    return score.redraw_small_layers(generator).eval().to(dtype)


def relu_classifier(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A wide residual network on 3 x 8 x 8 images (its last pool takes what is there)."""
    generator = torch.Generator().manual_seed(8)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        network = SmallResidual(nn.ReLU)
        randomize_batch_norms(network, generator)
    return network.eval().to(dtype)


def silu_classifier(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same with a smooth activation."""
    network = SmallResidual(nn.SiLU)
    network.load_state_dict(relu_classifier().state_dict())
    return network.eval().to(dtype)


class SmallResidual(nn.Module):
    """Conv, two pre-activation residual blocks (one strided with a shortcut), pool, linear."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.activation = activation()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        h = h + self.conv1(self.activation(self.bn1(h)))
        h = self.conv2(self.activation(self.bn2(h))) + self.shortcut(h)
        return 4.0 * self.linear(self.activation(h).mean(dim=(2, 3)))


class LabelTable(nn.Module):
    """A score network with an entry for every time step, as of DDPM's discrete ones: it takes whole labels only."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return x + self.time(labels)[:, :, None, None]


def allows_tf32() -> bool:
    """Whether PyTorch may take TF32 in a float32 operation on CUDA right now."""
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    return any(owner.fp32_precision != "ieee" for owner in owners)


def bound_of(purifier: Purifier, x: torch.Tensor) -> BoundEngine:
    """What an engine made of a purifier's networks for images like `x`: for tests of engines that look inside."""
    return purifier._prepare(x).bound


def under_sanitizers(code: str) -> subprocess.CompletedProcess[str]:
    """A process that runs `code` beside the tests, its kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = native.describe()["compiler"].split()[0]
    # Without the second one the first does not find how exceptions are thrown, and stops at the first one of any library.
    preloaded = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(map(os.path.isabs, preloaded)):
        pytest.skip("this compiler has no libasan, or its libstdc++ cannot be loaded first")
    environment = os.environ | {
        "COUPFAST_CXXFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1",
        "LD_PRELOAD": " ".join(map(os.path.realpath, preloaded)),
        "ASAN_OPTIONS": "detect_leaks=0,verify_asan_link_order=0",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def squares_gradient(purify, x: torch.Tensor, **options) -> torch.Tensor:
    """Of the sum of the squares of what a purifier, or a classifier behind it, makes of `x`."""
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(purify(x, **options).square().sum(), x)
    return found


def explicit_noise(purifier: Purifier, batch: torch.Tensor) -> torch.Tensor:
    """Noise for a batch, a row for each that the method reads, as a leaf that has a gradient."""
    shape = (purifier.settings.method.num_noises, *batch.shape)
    noise = 0.5 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return noise.requires_grad_()


@pytest.fixture(autouse=True)
def _interrupts_arrive():
    """Ctrl-C raises KeyboardInterrupt, also where a shell started the tests in the background and so had it ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=native.isas())
def isa(request, monkeypatch):
    """Each of this machine's instruction sets in turn."""
    monkeypatch.setenv("COUPFAST_CPU_ISA", request.param)
    operations.compiled.cache_clear()
    yield request.param
    operations.compiled.cache_clear()


@pytest.fixture
def score() -> nn.Module:
    return small_score()


@pytest.fixture
def classifier() -> nn.Module:
    return relu_classifier()


@pytest.fixture
def images() -> torch.Tensor:
    """Five random images, 3 x 8 x 8, float64."""
    return torch.rand(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The score network that is shipped."""
    return load_score("cifar10-tiny")


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Twenty photos of CIFAR-10."""
    pytest.importorskip("foolbox")
    return load_images("cifar10-20")[0]
