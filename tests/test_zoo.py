import types
from importlib.resources import files

import pytest
import torch
from conftest import LabelTable
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


@pytest.mark.parametrize(("name", "correct"), [("cifar10-tiny", 15), ("cifar10-tiny-silu", 15), ("resnet18-at", 20)])
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


# --- what is missing, swapped, or not what it is taken for -------------------------------------------------------------


@pytest.mark.parametrize("load", [load_score, load_classifier])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("weights.pt", "no weight file 'weights.pt'"),
        ("no_folder/weights.safetensors", "no weight file .*there is no folder 'no_folder'"),
        ("{tmp}/other.pt", "no weight file .*has 'there.pt'"),
        ("{tmp}/name-without-suffix", "no weight file"),
        ("{tmp}", "that is a folder, with 'there.pt'"),
        ("~/no-such-file-at-all.ckpt", "no weight file"),
        ("C:\\\\weights\\\\model.bin", "no weight file"),
    ],
)
def test_a_missing_file_is_no_unknown_name(load, source, message, tmp_path):
    (tmp_path / "there.pt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=message):
        load(source.format(tmp=tmp_path))
    with pytest.raises(FileNotFoundError, match="no weight file"):
        load(tmp_path / "none")


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_score, "wrn-28-10", "'wrn-28-10' is a classifier, not a score network: it is for load_classifier"),
        (load_score, "dm-wrn-10-1", "is a classifier"),
        (load_score, "resnet18-at", "is a classifier"),
        (load_classifier, "cifar10-ddpmpp-deep", "is a score network, not a classifier: it is for load_score"),
        (load_classifier, "", "unknown classifier"),
        (load_score, "", "unknown score network"),
    ],
)
def test_swapped_names(load, name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


class OptionalSecond(nn.Module):
    """Can be called as either kind; what it returns tells."""

    def __init__(self, pooled):
        super().__init__()
        self.conv, self.pooled = nn.Conv2d(3, 3, 3, padding=1), pooled

    def forward(self, x, extra=None):
        h = self.conv(x)
        return h.mean(dim=(2, 3)) if self.pooled else h


def test_swapped_modules():
    with pytest.raises(TypeError, match="WideResNet is a classifier: are score network and classifier swapped"):
        load_score(WideResNet(10, 1))
    with pytest.raises(TypeError, match="DDPMpp is a score network: are"):
        load_classifier(small_score())
    with pytest.raises(TypeError, match=r"makes \(1, 3\): are .* swapped"):
        load_score(OptionalSecond(pooled=True))
    with pytest.raises(TypeError, match=r"makes \(1, 3, 32, 32\): are .* swapped"):
        load_classifier(OptionalSecond(pooled=False))
    load_score(OptionalSecond(pooled=False))
    load_classifier(OptionalSecond(pooled=True))
    for value in (None, 3, WideResNet):
        with pytest.raises(TypeError, match="is a name, the path of a file or an nn.Module"):
            load_classifier(value)


@pytest.mark.parametrize("seed", [1])
def test_torch_defaults_do_not_change_what_is_loaded(seed, tmp_path):
    def networks():
        yield load_score("cifar10-tiny")
        yield load_score("cifar10-tiny", weights="random", seed=seed)
        yield load_classifier("cifar10-tiny")
        yield load_classifier("dm-wrn-10-1", weights="random", seed=seed)
        yield load_classifier(tmp_path / "w.pt")

    model = WideResNet(10, 1, mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1)).double()
    weights = {f"1.{k}": v for k, v in model.state_dict().items()}
    torch.save({"0.mean": model.mean, "0.std": model.std} | weights, tmp_path / "w.pt")
    expected = [state_dict_sha256(network) for network in networks()]
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        with torch.inference_mode():
            found = list(networks())
        assert torch.get_default_dtype() == torch.float64 and torch.empty(1).device.type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for network, digest in zip(found, expected, strict=True):
        assert_frozen(network)
        for value in [*network.parameters(), *network.buffers()]:
            assert value.device.type == "cpu" and not value.is_inference()
            assert value.dtype == torch.float32 or not value.is_floating_point()
        assert state_dict_sha256(network) == digest


def test_a_network_made_in_inference_mode_gets_ordinary_weights():
    with torch.inference_mode():
        network = WideResNet(10, 1)
    loaded = load_classifier(network)
    assert loaded is network
    x = torch.rand(1, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(loaded(x).sum(), x)
    assert gradient.abs().max() > 0


def test_weights_of_any_precision_become_float32(tmp_path):
    score, classifier = small_score(), WideResNet(10, 1)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        write_safetensors(tmp_path / "s.safetensors", score.to(dtype).state_dict(), score.config)
        write_safetensors(tmp_path / "c.safetensors", classifier.to(dtype).state_dict(), classifier.config)
        for network in (load_score(tmp_path / "s.safetensors"), load_classifier(tmp_path / "c.safetensors")):
            assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_networks_of_another_prediction():
    """Each turned into what it predicts and back: ε̂ is that of the network it was made of."""
    score = small_score().redraw_small_layers(torch.Generator().manual_seed(0)).double().eval()

    def rates(labels):
        t = labels[:, None, None, None] / 999
        alpha_bar = torch.exp(-0.5 * 19.9 * t**2 - 0.1 * t)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    class Other(nn.Module):
        def __init__(self, prediction):
            super().__init__()
            self.score, self.prediction = score, prediction

        def forward(self, x, labels):
            alpha, sigma = rates(labels)
            eps = self.score(x, labels)
            x0 = (x - sigma * eps) / alpha
            return alpha * eps - sigma * x0 if self.prediction == "v_prediction" else x0

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([20.0, 500.0], dtype=torch.float64)
    for prediction in ("v_prediction", "sample"):
        adapted = load_score(Other(prediction), prediction=prediction)
        assert_frozen(adapted)
        # A dozen roundings; x0 of small sigma is divided by 0.04 of alpha, and by sigma.
        tol = 1e4 * torch.finfo(torch.float64).eps
        torch.testing.assert_close(adapted(x, labels), score(x, labels), rtol=tol, atol=tol)
    with pytest.raises(ValueError, match="one of epsilon, v_prediction, sample, got 'x0'"):
        load_score(small_score(), prediction="x0")
    with pytest.raises(ValueError, match="adapted already"):
        load_score(load_score(Other("sample"), prediction="sample"), prediction="sample")


def test_a_table_of_time_steps_gets_whole_labels():
    table, x = LabelTable(), torch.zeros(2, 3, 4, 4)
    score = load_score(table, whole_labels=True)
    found = score(x, torch.tensor([99.9, 3.2]))
    torch.testing.assert_close(found, table(x, torch.tensor([100, 3])), rtol=0, atol=0)


# --- diffusers, as the adapter sees it: stand-ins that run where it does not load ----------------------------------------


def stand_in(name, *bases):
    return type(name, bases, {"__module__": "diffusers.stand_in"})


class FakeScheduler:
    """What a scheduler says: its configuration, and ᾱ of its steps if it has any."""

    def __init__(self, betas=(1e-4, 0.02, 1000), **config):
        self.config = config
        if betas is not None:
            self.alphas_cumprod = torch.cumprod(1 - torch.linspace(*betas), dim=0)


def fake_pipeline(scheduler, **parts):
    pipeline = stand_in("SomePipeline", stand_in("DiffusionPipeline", object))()
    pipeline.unet, pipeline.scheduler = stand_in("UNet2DModel", FakeUNet)(), scheduler
    for name, part in parts.items():
        setattr(pipeline, name, part)
    return pipeline


def test_what_a_scheduler_says_is_heeded():
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0])
    plain = load_score(fake_pipeline(FakeScheduler()))
    torch.testing.assert_close(plain(x, labels), 2 * x + labels[:, None, None, None], rtol=0, atol=0)
    assert (plain.image_size, plain.channels) == (8, 3)
    for prediction in ("v_prediction", "sample"):
        adapted = load_score(fake_pipeline(FakeScheduler(prediction_type=prediction)))
        assert (adapted.prediction, adapted.image_size) == (prediction, 8)
        expected = load_score(DiffusersScore(FakeUNet()), prediction=prediction)
        torch.testing.assert_close(adapted(x, labels), expected(x, labels), rtol=0, atol=0)
    load_score(fake_pipeline(FakeScheduler(betas=None, beta_min=0.1, beta_max=20)))
    with pytest.raises(TypeError, match="SomePipeline is a score network, not a classifier"):
        load_classifier(fake_pipeline(FakeScheduler()))


@pytest.mark.parametrize(
    ("pipeline", "error", "message"),
    [
        (lambda: fake_pipeline(FakeScheduler((1e-4, 0.012, 1000))), ValueError, "where the VP-SDE has"),
        (lambda: fake_pipeline(FakeScheduler((1e-4, 0.02, 4000))), ValueError, "4000 steps"),
        (lambda: fake_pipeline(FakeScheduler((1e-4, 0.02, 100))), ValueError, "100 steps"),
        (lambda: fake_pipeline(FakeScheduler(None, sigma_max=1348.0)), ValueError, "another process than the VP-SDE"),
        (lambda: fake_pipeline(FakeScheduler(prediction_type="flow")), ValueError, "=.flow.; served are epsilon"),
        (lambda: fake_pipeline(FakeScheduler(), vae=nn.Identity()), TypeError, "is no score network of images"),
        (lambda: fake_pipeline(FakeScheduler(), unet=None), TypeError, "found none"),
        (lambda: fake_pipeline(FakeScheduler(), unet=nn.Identity()), TypeError, "found Identity"),
    ],
)
def test_pipelines_that_do_not_serve(pipeline, error, message):
    with pytest.raises(error, match=message):
        load_score(pipeline())


def test_time_steps_of_another_kind():
    table = DiffusersScore(FakeUNet(time_embedding_type="learned"))
    x = torch.zeros(2, 3, 8, 8)
    found = table(x, torch.tensor([99.9, 3.2]))[:, 0, 0, 0]
    assert found.tolist() == [100.0, 3.0]
    with pytest.raises(ValueError, match="standard deviation of the noise"):
        DiffusersScore(FakeUNet(time_embedding_type="fourier"))


# --- diffusers, as it is installed -------------------------------------------------------------------------------------


@pytest.fixture
def diffusers():
    package = pytest.importorskip("diffusers")
    try:
        _ = package.UNet2DModel, package.DDPMPipeline, package.DDPMScheduler
    except RuntimeError as error:
        pytest.skip(f"diffusers does not load here: {' '.join(str(error).split())}")
    return package


def small_unet(diffusers, **options):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4}
    network = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, **blocks, **options)
    return network.requires_grad_(False)  # the same convolution as in a frozen network, to the bit


@pytest.fixture
def unet(diffusers):
    return small_unet(diffusers)


def test_a_pipeline_says_what_its_network_predicts(diffusers, unet):
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0])
    for kind in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        plain = load_score(diffusers.DDPMPipeline(unet, kind()))
        torch.testing.assert_close(plain(x, labels), unet(x, labels).sample, rtol=0, atol=0)
        other = load_score(diffusers.DDPMPipeline(unet, kind(prediction_type="v_prediction")))
        expected = load_score(unet, prediction="v_prediction")
        torch.testing.assert_close(other(x, labels), expected(x, labels), rtol=0, atol=0)
        assert load_score(diffusers.DDPMPipeline(unet, kind(prediction_type="sample"))).prediction == "sample"
    with pytest.raises(TypeError, match="DDPMPipeline is a score network, not a classifier"):
        load_classifier(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()))
    with pytest.raises(TypeError, match="UNet2DModel is a score network, not a classifier"):
        load_classifier(unet)


@pytest.mark.parametrize(
    "schedule",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear"},
        {"beta_end": 0.012},
        {"num_train_timesteps": 4000},
        {"num_train_timesteps": 100},
    ],
    ids=str,
)
def test_another_noise_schedule_is_refused(schedule, diffusers, unet):
    with pytest.raises(ValueError, match="where the VP-SDE has"):
        load_score(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**schedule)))


def test_variance_exploding_networks_are_refused(diffusers, unet):
    with pytest.raises(ValueError, match="another process than the VP-SDE"):
        load_score(diffusers.DDPMPipeline(unet, diffusers.ScoreSdeVeScheduler()))
    with pytest.raises(ValueError, match="standard deviation of the noise"):
        load_score(small_unet(diffusers, time_embedding_type="fourier"))


def test_learned_time_embeddings_get_whole_steps(diffusers):
    learned = small_unet(diffusers, time_embedding_type="learned", num_train_timesteps=1000)
    x = torch.randn(2, 3, 8, 8)
    found = load_score(learned)(x, torch.tensor([99.9, 3.0]))
    torch.testing.assert_close(found, learned(x, torch.tensor([100, 3])).sample, rtol=0, atol=0)


def test_folders_of_diffusers(diffusers, unet, tmp_path):
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0])
    unet.save_pretrained(tmp_path / "unet")
    unet.save_pretrained(tmp_path / "bin", safe_serialization=False)
    for name in ("unet", "bin"):
        torch.testing.assert_close(load_score(tmp_path / name)(x, labels), unet(x, labels).sample, rtol=0, atol=0)
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "v")
    expected = load_score(unet, prediction="v_prediction")(x, labels)
    of_its_folder = diffusers.UNet2DModel.from_pretrained(tmp_path / "v", subfolder="unet")
    for source in (tmp_path / "v", tmp_path / "v" / "unet", of_its_folder):
        torch.testing.assert_close(load_score(source)(x, labels), expected, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="give the folder that has its config.json"):
        load_score(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    score = load_score(unet)
    write_safetensors(tmp_path / "converted.safetensors", score.state_dict(), score.config)
    torch.testing.assert_close(load_score(tmp_path / "converted.safetensors")(x, labels), score(x, labels), rtol=0, atol=0)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights: diffusion_pytorch_model.safetensors"):
        load_score(tmp_path / "unet")


# --- RobustBench, as it is installed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Rice2020Overfitting", "Augustin2020Adversarial", "Wong2020Fast"])
def test_robustbench_files_may_lack_the_normalisation_that_the_model_has(name, robustbench, tmp_path):
    threat_model = "L2" if name.startswith("Augustin") else "Linf"
    options = {"threat_model": threat_model}
    theirs = load_classifier(name, weights="random", seed=4, **options)
    constants = {key for key in theirs.state_dict() if key.rpartition(".")[2] in ("mu", "sigma", "mean", "std")}
    assert constants
    state = {f"module.{key}": value for key, value in theirs.state_dict().items() if key not in constants}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    again = load_classifier(name, weights=tmp_path / "w.pt", **options)
    assert state_dict_sha256(again) == state_dict_sha256(theirs)
    first = next(iter(state))
    del state[first]
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=f"missing '{first.removeprefix('module.')}'"):
        load_classifier(name, weights=tmp_path / "w.pt", **options)


def test_a_download_that_fails_says_what_to_put_where(robustbench, tmp_path, monkeypatch):
    from robustbench import utils

    def offline(*arguments):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(utils, "download_gdrive_new", offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(OSError, match=r"'Standard' \(Name or service.*put its file at .*robustbench/cifar10/Linf/Standard.pt"):
        load_classifier("Standard")
