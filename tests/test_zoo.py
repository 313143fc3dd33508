import types
from importlib.resources import files

import pytest
import torch
from torch import nn

from coupfast.models import registry, robustbench_import, tiny
from coupfast.models.checkpoints import CheckpointError, file_sha256, state_dict_sha256, write_safetensors
from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.diffusers_unet import DiffusersScore
from coupfast.models.dm_wide_resnet import DMWideResNet
from coupfast.models.wide_resnet import WideResNet
from coupfast.models.zoo import load_classifier, load_score


def assert_frozen(model):
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def small_score():
    return DDPMpp(8, (1, 2), 1, (4,), 8)


def x_k(t, images, seed=0):
    """A noised image at time t, and its noise."""
    alpha_bar = torch.exp(torch.tensor(-0.5 * 19.9 * t**2 - 0.1 * t))
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return alpha_bar.sqrt() * (2 * images - 1) + (1 - alpha_bar).sqrt() * eps, eps


@pytest.fixture(scope="module")
def cifar10():
    pytest.importorskip("foolbox")
    from coupfast.data import load_images

    return load_images("cifar10-20")


# --- shipped networks -------------------------------------------------------------------------------------------------


def test_shipped_score_network_predicts_noise(cifar10):
    model = load_score("cifar10-tiny")
    assert_frozen(model)
    assert (model.image_size, model.channels) == (32, 3)
    for t, bound in [(0.01, 0.7), (0.06, 0.2), (0.15, 0.1)]:
        x, eps = x_k(t, cifar10[0])
        mse = (model(x, torch.full((20,), 999 * t)) - eps).square().mean().item()
        # The README's figures for these images, and room for 20 of them (standard error about 5 %). Zero would give 1.
        assert mse < bound


@pytest.mark.parametrize(("name", "correct"), [("cifar10-tiny", 15), ("resnet18-at", 20)])
def test_shipped_classifiers_classify(name, correct, cifar10):
    if name == "resnet18-at":
        pytest.importorskip("pyautoattack")
    model = load_classifier(name)
    assert_frozen(model)
    x, y = cifar10
    assert (model(x).argmax(1) == y).sum() >= correct


def test_shipped_files_are_verified(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "cifar10-tiny-score.safetensors").write_bytes(b"something else")
    (folder / "SHA256SUMS").write_text("0" * 64 + "  cifar10-tiny-score.safetensors\n")
    monkeypatch.setattr(tiny, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="cifar10-tiny-score.*SHA-256.*install coupfast again"):
        load_score("cifar10-tiny")


def test_weights_readme_names_the_shipped_files():
    folder = files("coupfast.models") / "weights"
    readme = (folder / "README.md").read_text()
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert f"| {name} | {digest} |" in readme
        assert file_sha256(folder / name) == digest


# --- names, files, modules --------------------------------------------------------------------------------------------


def test_score_by_path_and_by_name_with_weights(tmp_path):
    model = small_score().redraw_small_layers(torch.Generator().manual_seed(0))
    path = tmp_path / "score.safetensors"
    write_safetensors(path, model.state_dict(), model.config)
    for source in (path, str(path)):
        loaded = load_score(source, dtype=torch.float64)
        assert_frozen(loaded)
        torch.testing.assert_close(loaded.state_dict(), model.double().state_dict(), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="does not fit DDPMpp"):
        load_score("cifar10-tiny", weights=path)
    with pytest.raises(ValueError, match="`weights` is for networks given by name"):
        load_score(path, weights="random")


def test_public_score_network_needs_weights():
    with pytest.raises(ValueError, match="checkpoint_8.pth.*'random'"):
        load_score("cifar10-ddpmpp-deep")


def test_random_weights_follow_the_seed():
    global_state = torch.get_rng_state()
    a, b, c = (load_score("cifar10-tiny", weights="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert state_dict_sha256(a) == state_dict_sha256(b) != state_dict_sha256(c)
    assert_frozen(a)
    eps_hat = a(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([50.0]))
    assert 0.2 < eps_hat.std() < 3.0
    k, m = (load_classifier("wrn-10-1", weights="random", seed=seed) for seed in (1, 1))
    assert state_dict_sha256(k) == state_dict_sha256(m)


def test_modules_are_frozen_as_they_are():
    score, classifier = small_score().train(), WideResNet(10, 1).train()
    assert load_score(score) is score
    assert load_classifier(classifier, dtype=torch.float64) is classifier
    assert classifier.fc.weight.dtype == torch.float64
    assert_frozen(score)
    assert_frozen(classifier)
    with pytest.raises(TypeError, match=r"forward\(x, labels\)"):
        load_score(classifier)
    with pytest.raises(TypeError, match=r"forward\(x\)"):
        load_classifier(score)
    with pytest.raises(ValueError, match="a module has its own"):
        load_classifier(classifier, weights="random")


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("wrn-16-3", WideResNet, {"depth": 16, "widen_factor": 3}),
        ("dm-wrn-10-1", DMWideResNet, {"depth": 10, "width": 1, "activation": "silu"}),
    ],
)
def test_wide_resnets_by_name(name, kind, config, tmp_path):
    model = load_classifier(name, weights="random", seed=3)
    assert_frozen(model)
    assert isinstance(model, kind)
    assert config.items() <= model.config.items()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pt")
    assert state_dict_sha256(load_classifier(name, weights=tmp_path / "w.pt")) == state_dict_sha256(model)
    if kind is DMWideResNet:
        assert load_classifier(name, weights="random", activation="relu").config["activation"] == "relu"
        loaded = load_classifier(tmp_path / "w.pt", activation="silu")
    else:
        with pytest.raises(ValueError, match="WideResNet has 'relu'"):
            load_classifier(name, weights="random", activation="silu")
        loaded = load_classifier(tmp_path / "w.pt")
    assert state_dict_sha256(loaded) == state_dict_sha256(model)
    with pytest.raises(ValueError, match="does not ship"):
        load_classifier(name)


def test_diffpure_checkpoints_have_their_own_architectures():
    names = ("wrn-70-16-dropout", "wideresnet-70-16")
    with torch.device("meta"):
        dropout, robust = (registry.build(registry.find("classifier", name).config) for name in names)
    assert isinstance(dropout, WideResNet)
    assert dropout.mean is not None
    assert isinstance(robust, DMWideResNet)
    assert robust.config["activation"] == "silu"
    assert sum(parameter.numel() for parameter in robust.parameters()) == 266_796_506


@pytest.mark.parametrize(
    ("load", "name", "near"),
    [
        (load_score, "cifar10-tny", "cifar10-tiny"),
        (load_score, "CIFAR10-DDPM++-deep", "cifar10-ddpmpp-deep"),
        (load_classifier, "resnet18", "resnet18-at"),
        (load_classifier, "WRN-28-10.", "wrn-28-10"),
    ],
)
def test_unknown_names(load, name, near, monkeypatch):
    def no_robustbench():
        raise ImportError("robustbench is not installed")

    monkeypatch.setattr(robustbench_import, "import_robustbench", no_robustbench)
    with pytest.raises(ValueError, match=f"unknown.*nearest: .*{near}"):
        load(name)
    with pytest.raises(ValueError, match="unknown.*known: .*cifar10-tiny"):
        load("???")


# --- other packages ---------------------------------------------------------------------------------------------------


class FakeUNet(nn.Module):
    """What the adapter sees of a diffusers network."""

    def __init__(self, **config):
        super().__init__()
        defaults = {"sample_size": 8, "in_channels": 3, "out_channels": 3}
        self.config = types.SimpleNamespace(**(defaults | config))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, sample, timestep):
        return types.SimpleNamespace(sample=self.scale * sample + timestep[:, None, None, None])


def test_diffusers_adapter():
    score = load_score(DiffusersScore(FakeUNet()))
    assert_frozen(score)
    assert (score.image_size, score.channels) == (8, 3)
    x = torch.randn(2, 3, 8, 8)
    labels = torch.tensor([1.0, 99.9])
    torch.testing.assert_close(score(x, labels), 2 * x + labels[:, None, None, None], rtol=0, atol=0)
    assert DiffusersScore(FakeUNet(sample_size=(16, 16))).image_size == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": (8, 16)}, "square"),
        ({"sample_size": None}, "square"),
        ({"out_channels": 6}, "variance"),
        ({"num_class_embeds": 10}, "class labels"),
    ],
    ids=str,
)
def test_diffusers_networks_that_do_not_serve(config, message):
    with pytest.raises(ValueError, match=message):
        DiffusersScore(FakeUNet(**config))


def test_real_diffusers_network():
    diffusers = pytest.importorskip("diffusers")
    try:
        network = diffusers.UNet2DModel
    except RuntimeError as error:  # it imports torchvision, which may have been made for another torch
        pytest.skip(f"diffusers does not load here: {' '.join(str(error).split())}")
    unet = network(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    score = load_score(unet)
    assert isinstance(score, DiffusersScore)
    assert_frozen(score)
    x = torch.randn(2, 3, 8, 8)
    found = score(x, torch.tensor([3.0, 50.0]))
    torch.testing.assert_close(found, unet(x, torch.tensor([3.0, 50.0])).sample, rtol=0, atol=0)
    assert not torch.equal(found, score(x, torch.tensor([3.5, 50.0])))  # fractions of a step reach the network


@pytest.fixture
def robustbench():
    # Not importorskip: as it installs, RobustBench does not import without help.
    try:
        return robustbench_import.import_robustbench()
    except ImportError as error:
        pytest.skip(str(error))


def test_robustbench_names(robustbench, tmp_path):
    theirs = load_classifier("Standard", weights="random", seed=4)
    assert_frozen(theirs)
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "Standard.pt")
    again = load_classifier("Standard", weights=tmp_path / "Standard.pt")
    ours = load_classifier("wrn-28-10", weights=tmp_path / "Standard.pt")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), theirs(x), rtol=0, atol=0)
    # The same operations on the same weights; only the average over 64 pixels is another sum.
    tol = 64 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours(x), theirs(x), rtol=tol, atol=tol * theirs(x).abs().max().item())
    with pytest.raises(ValueError, match="nearest: .*Standard"):
        load_classifier("Standrd")
    with pytest.raises(ValueError, match="threat_model"):
        load_classifier("Standard", threat_model="L3")


def test_robustbench_dm_network_is_ours(robustbench):
    from robustbench.model_zoo.architectures.dm_wide_resnet import DMWideResNet as Theirs
    from robustbench.model_zoo.architectures.dm_wide_resnet import Swish

    torch.manual_seed(0)
    theirs, ours = Theirs(depth=16, width=1, activation_fn=Swish).eval(), DMWideResNet(16, 1, activation="silu").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 32, 32)
    tol = 64 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours(x), theirs(x), rtol=tol, atol=tol * theirs(x).abs().max().item())
