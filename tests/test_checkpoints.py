import json
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from ddpmpp_table import deep_parameters
from safetensors import safe_open
from safetensors.torch import save_file

from coupfast import cli
from coupfast.models import registry
from coupfast.models.checkpoints import (
    CheckpointError,
    file_sha256,
    read_safetensors,
    read_torch,
    read_weights,
    state_dict_sha256,
    write_safetensors,
)
from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.dm_wide_resnet import CIFAR10_MEAN, CIFAR10_STD, DMWideResNet
from coupfast.models.from_file import classifier_from_file, convert_checkpoint, score_from_file
from coupfast.models.wide_resnet import WideResNet
from coupfast.models.zoo import load_score

CONFIG = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "image_size": 8}


def score_sde_checkpoint(shadow, names=None):
    """The layout of Song's checkpoints: weights three times over, and a numpy number in the optimizer."""
    names = names or [f"all_modules.{i}.weight" for i in range(len(shadow))]
    raw = {f"module.{name}": torch.full_like(value, -7.0) for name, value in zip(names, shadow, strict=True)}
    raw["module.sigmas"] = torch.linspace(50, 0.01, 1000, dtype=torch.float64)
    optimizer = {
        "state": {0: {"step": 950_000, "exp_avg": torch.zeros(3)}},
        "param_groups": [{"lr": np.float64(2e-4), "betas": (0.9, 0.999), "params": [0]}],
    }
    ema = {"decay": 0.9999, "num_updates": 950_000, "shadow_params": shadow}
    return {"optimizer": optimizer, "model": OrderedDict(raw), "ema": ema, "step": 950_000}


@pytest.fixture
def small_score():
    torch.manual_seed(0)
    return DDPMpp(**CONFIG).eval()


@pytest.fixture
def small_checkpoint(small_score, tmp_path):
    path = tmp_path / "checkpoint_8.pth"
    torch.save(score_sde_checkpoint([p.detach().clone() for p in small_score.parameters()]), path)
    return path


def assert_same_weights(found, expected):
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


# --- score_sde checkpoints --------------------------------------------------------------------------------------------


def test_full_size_checkpoint_becomes_safetensors(tmp_path):
    """All 956 tensors of the public network through both readers, each filled with a number of its own."""
    table = deep_parameters()
    source, converted = tmp_path / "checkpoint_8.pth", tmp_path / "score.safetensors"
    checkpoint = score_sde_checkpoint([torch.full(shape, float(i)) for i, (_, shape) in enumerate(table)])
    checkpoint["model"] = OrderedDict()  # 427 MB that the reader must not need
    torch.save(checkpoint, source)
    del checkpoint
    convert_checkpoint(source, converted)

    source.unlink()

    model = score_from_file(converted)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in table]
    for i, (name, parameter) in enumerate(model.named_parameters()):
        # Extremes, not all elements: 427 MB of comparisons would test torch.
        assert parameter.shape == table[i][1], name
        assert parameter.min() == parameter.max() == i, name
    assert converted.stat().st_size < 430e6
    converted.unlink()


def test_conversion_keeps_the_origin(small_score, small_checkpoint, tmp_path):
    convert_checkpoint(small_checkpoint, tmp_path / "score.safetensors", config=CONFIG)
    with safe_open(tmp_path / "score.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["source"] == "checkpoint_8.pth"
    assert metadata["source_sha256"] == file_sha256(small_checkpoint)
    assert json.loads(metadata["config"]) == small_score.config
    assert_same_weights(score_from_file(tmp_path / "score.safetensors"), small_score)


def test_averaged_weights_are_read_not_the_raw_ones(small_score, small_checkpoint):
    assert_same_weights(score_from_file(small_checkpoint, config=CONFIG), small_score)


def test_weights_outlive_the_file(small_score, small_checkpoint):
    model = score_from_file(small_checkpoint, config=CONFIG)
    with small_checkpoint.open("r+b") as file:
        file.truncate(10)  # a memory-mapped tensor would now end the process
    assert_same_weights(model, small_score)


@pytest.mark.parametrize("home", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_scalars_of_both_numpy_generations(home, small_score, small_checkpoint, tmp_path):
    path = tmp_path / "other.pth"
    with zipfile.ZipFile(small_checkpoint) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.namelist():
            content = old.read(entry)
            if entry.endswith("data.pkl"):
                assert b"core.multiarray\nscalar" in content
                content = content.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
                content = content.replace(b"numpy.core.multiarray\n", home.encode() + b"\n")
            new.writestr(entry, content)
    assert read_torch(path)["optimizer"]["param_groups"][0]["lr"] == 2e-4
    assert_same_weights(score_from_file(path, config=CONFIG), small_score)


def test_old_torch_format(small_score, tmp_path):
    path = tmp_path / "old.pth"
    shadow = [p.detach() for p in small_score.parameters()]
    torch.save(score_sde_checkpoint(shadow), path, _use_new_zipfile_serialization=False)
    assert_same_weights(score_from_file(path, config=CONFIG), small_score)


def test_reading_leaves_no_permission_behind(small_checkpoint):
    before = set(torch.serialization.get_safe_globals())  # PyTorch keeps them in no order
    read_torch(small_checkpoint)
    assert set(torch.serialization.get_safe_globals()) == before


def test_count_is_checked(small_score, tmp_path):
    shadow = [p.detach() for p in small_score.parameters()]
    torch.save(score_sde_checkpoint(shadow[:-1]), tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=f"has {len(shadow)} tensors, ema.shadow_params has {len(shadow) - 1}"):
        score_from_file(tmp_path / "short.pth", config=CONFIG)


def test_shapes_are_checked(small_score, tmp_path):
    shadow = [p.detach() for p in small_score.parameters()]
    shadow[4] = torch.zeros(8, 5, 3, 3)
    torch.save(score_sde_checkpoint(shadow), tmp_path / "shape.pth")
    with pytest.raises(CheckpointError, match=r"\[4\].*all_modules.2.weight.*\(8, 3, 3, 3\).*\(8, 5, 3, 3\)"):
        score_from_file(tmp_path / "shape.pth", config=CONFIG)


def test_entries_are_tensors(small_score, tmp_path):
    shadow = [p.detach() for p in small_score.parameters()]
    checkpoint = score_sde_checkpoint(shadow)
    checkpoint["ema"]["shadow_params"] = ["weights"] * len(shadow)
    torch.save(checkpoint, tmp_path / "text.pth")
    with pytest.raises(CheckpointError, match="all_modules.0.weight.*found str"):
        score_from_file(tmp_path / "text.pth", config=CONFIG)


@pytest.mark.parametrize("content", [{"model": {}}, {"ema": {"decay": 0.999}}, [1, 2]], ids=str)
def test_other_files_are_no_score_checkpoints(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth: there is no state dict: expected names of tensors, found"):
        score_from_file(tmp_path / "other.pth")


def test_conversion_is_whole_or_nothing(small_checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "score.safetensors"
    target.write_text("what was there before")

    def full_disk(tensors, path, metadata):
        raise OSError("no space left")

    monkeypatch.setattr("coupfast.models.checkpoints.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        convert_checkpoint(small_checkpoint, target, config=CONFIG)
    assert target.read_text() == "what was there before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_8.pth", "score.safetensors"]


def test_score_safetensors(small_score, tmp_path):
    path = tmp_path / "score.safetensors"
    # Files made from the raw state dict carry score_sde's unused buffer.
    state = small_score.state_dict() | {"sigmas": torch.zeros(1000, dtype=torch.float64)}
    write_safetensors(path, state, small_score.config)
    assert_same_weights(score_from_file(path), small_score)
    with pytest.raises(CheckpointError, match="does not fit DDPMpp: missing"):
        score_from_file(path, config=CONFIG | {"num_res_blocks": 2})
    save_file(dict(small_score.state_dict()), path)
    with pytest.raises(CheckpointError, match="do not tell its image_size: give `config`"):
        score_from_file(path)
    assert_same_weights(score_from_file(path, config=CONFIG), small_score)


SIZES = [
    {"nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "image_size": 8, "channels": 3},
    {"nf": 8, "ch_mult": [1], "num_res_blocks": 2, "attn_resolutions": [], "image_size": 8, "channels": 1},
    {"nf": 4, "ch_mult": [1, 1, 2], "num_res_blocks": 2, "attn_resolutions": [16, 4], "image_size": 16, "channels": 3},
    {"nf": 8, "ch_mult": [2, 1], "num_res_blocks": 3, "attn_resolutions": [8], "image_size": 8, "channels": 3},
    {"nf": 4, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 4, "attn_resolutions": [16], "image_size": 32, "channels": 3},
]


@pytest.mark.parametrize("config", SIZES, ids=lambda config: "x".join(map(str, config["ch_mult"])))
@pytest.mark.parametrize("wrapped", ["weights", "module", "score_sde"])
def test_all_but_the_size_of_images_follows_from_weights(config, wrapped, tmp_path):
    path, model = tmp_path / "weights.pth", randomised(DDPMpp(**config))
    prefixed = {f"module.{name}": value for name, value in model.state_dict().items()}
    if wrapped == "score_sde":
        content = score_sde_checkpoint([p.detach() for p in model.parameters()])
        content["model"] = {name: torch.zeros_like(value) for name, value in prefixed.items()}  # not the averaged ones
    else:
        content = {"weights": model.state_dict(), "module": {"state_dict": prefixed, "epoch": 3}}[wrapped]
    torch.save(content, path)
    for load in (score_from_file, load_score):
        with pytest.raises(CheckpointError, match="a DDPMpp do not tell its image_size: give `config`, or `image_size`"):
            load(path)
    loaded = load_score(path, image_size=config["image_size"])
    assert loaded.config == {"arch": "DDPMpp", **config}
    assert_same_weights(loaded, model)
    # Where attention is goes with the levels, whatever the images' size.
    larger = load_score(path, image_size=2 * config["image_size"])
    assert larger.plan == model.plan and larger.image_size == 2 * config["image_size"]


def test_a_size_that_is_told_wrong(small_score, tmp_path, capsys):
    path, converted = tmp_path / "weights.pth", tmp_path / "score.safetensors"
    torch.save(small_score.state_dict(), path)
    for size, message in ((7, "must be a positive multiple of 2"), (0, "an int of at least 1, got 0"), (8.0, "got 8.0")):
        with pytest.raises(CheckpointError, match=message):
            load_score(path, image_size=size)
    assert cli.main(["convert", str(path), str(converted)]) == 2
    assert "coupfast convert FILE DST.safetensors --image-size 32" in capsys.readouterr().err
    assert cli.main(["convert", str(path), str(converted), "--image-size", "8"]) == 0
    assert load_score(converted).config == small_score.config
    with pytest.raises(CheckpointError, match="the file says image_size=8, the caller 16"):
        load_score(converted, image_size=16)
    for source in ("cifar10-tiny", "cifar10-ddpmpp-deep", small_score):
        with pytest.raises(ValueError, match="`image_size` is for the path of a weight file"):
            load_score(source, image_size=8)


def test_names_that_only_look_like_a_ddpmpp(small_score, tmp_path):
    path, state = tmp_path / "weights.pth", small_score.state_dict()
    for change in (
        {"all_modules.0.weight": torch.zeros(3)},
        {"all_modules.3.Conv_0.weight": torch.zeros(8, 8, 5, 5)},
        {"all_modules.99.Conv_0.bias": torch.zeros(8)},
        {"all_modules.x": torch.zeros(1)},
    ):
        torch.save(state | change, path)
        with pytest.raises(CheckpointError, match="unknown architecture: expected .*DDPMpp"):
            load_score(path)


def test_a_file_that_lacks_little_of_a_named_network_says_what(tmp_path):
    path, whole = tmp_path / "weights.pth", load_score("cifar10-tiny").state_dict()
    key = [key for key, value in whole.items() if value.dim() == 4][3]
    shape = tuple(whole[key].shape)
    cropped = whole[key][:-1].clone()
    without = {name: value for name, value in whole.items() if name != key}
    for state, message in (
        (without, f"nearly 'cifar10-tiny', of which '{key}' is missing: .* of another network, build the network yourself"),
        (whole | {key: cropped}, rf"'{key}' is {tuple(cropped.shape)}, not {shape}".replace("(", r"\(").replace(")", r"\)")),
    ):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=message):
            load_score(path)


def test_a_class_that_is_made_of_numbers_is_not_in_the_way_of_another_ones_file(tmp_path, monkeypatch):
    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.ones(2).sum().item()

    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(2)}, path)
    monkeypatch.setitem(registry._families, "Counted", registry.Family("Counted", "score", Counted, {"counted": {}}))
    with pytest.raises(CheckpointError, match="unknown architecture: .* found 'a';"):
        load_score(path)


# --- damaged and hostile files ----------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"ema": {"shadow_params": [h]}}, lambda h: {"fc.weight": h}])
@pytest.mark.parametrize("writer", ["zip", "old torch", "pickle"])
def test_hostile_pickles_are_not_executed(writer, wrap, tmp_path):
    path, canary = tmp_path / "weights.pt", tmp_path / "canary"
    content = wrap(Hostile(canary))
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    for read in (read_torch, score_from_file, read_weights, classifier_from_file):
        with pytest.raises(CheckpointError, match=r"weights.pt.*Nothing in it was executed"):
            read(path)
    assert not canary.exists()
    torch.load(path, weights_only=False) if writer != "pickle" else pickle.loads(path.read_bytes())
    assert canary.exists()  # the file was dangerous


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "old torch", "safetensors"])
def test_truncated_files(kind, share, small_score, tmp_path):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        write_safetensors(path, small_score.state_dict(), small_score.config)
    else:
        shadow = [p.detach() for p in small_score.parameters()]
        torch.save(score_sde_checkpoint(shadow), path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"weights\."):
        score_from_file(path)


def test_missing_files(tmp_path):
    for read in (read_torch, read_safetensors, score_from_file, classifier_from_file):
        with pytest.raises(FileNotFoundError, match=r"no\.pt"):
            read(tmp_path / "no.pt")


# --- classifiers ------------------------------------------------------------------------------------------------------


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model.eval()


FORMATS = {
    "plain": lambda s: s,
    "RobustBench": lambda s: {"state_dict": s, "epoch": 200, "best_acc": 0.9},
    "DataParallel": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "Gowal": lambda s: {"model_state_dict": {f"module.0.{k}": v for k, v in s.items()}, "epoch": 1},
    "wrn-70-16-dropout": lambda s: OrderedDict((f"module.{k}", v) for k, v in s.items()),
    "attribute": lambda s: {f"model.module.{k}": v for k, v in s.items()},
}


@pytest.mark.parametrize("wrap", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("family", ["WideResNet", "DMWideResNet"])
def test_classifier_formats(family, wrap, tmp_path):
    path = tmp_path / "weights.pt"
    if family == "WideResNet":
        model = randomised(WideResNet(16, 2, 7))
    else:
        model = randomised(DMWideResNet(10, 1, 100, "silu"))
    torch.save(wrap(model.state_dict()), path)
    loaded = classifier_from_file(path, activation=None if family == "WideResNet" else "silu")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


def test_normalisation_is_given_not_guessed(tmp_path):
    path = tmp_path / "weights.pt"
    model = randomised(WideResNet(10, 1, 10, mean=CIFAR10_MEAN, std=CIFAR10_STD))
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, path)
    assert classifier_from_file(path).mean is None
    loaded = classifier_from_file(path, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(loaded.eval()(x), model(x), rtol=0, atol=0)


def test_activation_is_given_not_guessed(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(DMWideResNet(10, 1).state_dict(), path)
    with pytest.raises(CheckpointError, match="weights.pt.*activation='silu'"):
        classifier_from_file(path)
    assert classifier_from_file(path, activation="relu").config["activation"] == "relu"
    torch.save(WideResNet(10, 1).state_dict(), path)
    with pytest.raises(CheckpointError, match="WideResNet has 'relu'"):
        classifier_from_file(path, activation="silu")


def test_classifier_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = randomised(DMWideResNet(10, 1, 3, "relu", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)))
    write_safetensors(path, model.state_dict(), model.config)
    loaded = classifier_from_file(path)
    assert loaded.config == model.config
    torch.testing.assert_close(loaded.mean, model.mean, rtol=0, atol=0)
    assert_same_weights(loaded, model)


def test_batch_norm_counters_may_be_missing(tmp_path):
    path, model = tmp_path / "weights.pt", randomised(WideResNet(10, 1))
    torch.save({k: v for k, v in model.state_dict().items() if "num_batches" not in k}, path)
    assert_same_weights(classifier_from_file(path), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("block2.layer.0.bn1.weight"), "missing 'block2.layer.0.bn1.weight'"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected 'extra'"),
        (lambda s: s.update({"bn1.bias": torch.zeros(3)}), r"bn1.bias has shape \(64,\), found \(3,\)"),
        (lambda s: s.update({"bn1.bias": torch.zeros(64, dtype=torch.long)}), "bn1.bias has dtype.*int64"),
        (lambda s: s.pop("fc.weight"), "unknown architecture"),
        (lambda s: s.update({"fc.weight": torch.zeros(3)}), "not the shapes of a WideResNet"),
        (lambda s: s.update({"fc.weight": "text"}), "no state dict"),
        (lambda s: s.clear(), "no state dict"),
    ],
    ids=range(8),
)
def test_classifiers_that_do_not_fit(change, message, tmp_path):
    path, state = tmp_path / "weights.pt", dict(WideResNet(10, 1).state_dict())
    change(state)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=f"weights.pt.*{message}"):
        classifier_from_file(path)


def test_wrong_depth(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(WideResNet(16, 1).state_dict(), path)
    with pytest.raises(CheckpointError, match="unexpected 'block1.layer.1"):
        classifier_from_file(path, config={"arch": "WideResNet", "depth": 10, "widen_factor": 1})
    with pytest.raises(CheckpointError, match="unknown architecture 'VGG'"):
        classifier_from_file(path, config={"arch": "VGG"})
    with pytest.raises(CheckpointError, match="does not take"):
        classifier_from_file(path, config={"arch": "WideResNet", "width": 3})


def test_large_architectures_are_inferred():
    with torch.device("meta"):
        for model in (WideResNet(28, 10), DMWideResNet(70, 16, 100, "silu"), WideResNet(70, 16)):
            family, config = registry.recognised(model.state_dict())
            told = {k: v for k, v in model.config.items() if k not in ("mean", "std", "activation")}
            assert {"arch": family.arch, **config} == told


# --- what lies around the weights -------------------------------------------------------------------------------------


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def averaged(state):
    """What `torch.optim.swa_utils.AveragedModel` has."""
    return {"n_averaged": torch.tensor(5), **prefixed("module.", state)}


AROUND = {
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "compiled inside DataParallel": lambda s: prefixed("module._orig_mod.", s),
    "compiled part": lambda s: {k.replace("block1.", "block1._orig_mod."): v for k, v in s.items()},
    "FSDP": lambda s: {k.replace("block1.", "_fsdp_wrapped_module.block1._fsdp_wrapped_module."): v for k, v in s.items()},
    "SWA": averaged,
    "SWA of DataParallel": lambda s: averaged(prefixed("module.", s)),
    "SWA under an entry": lambda s: {"model": averaged(s), "epoch": 3},
    "accuracy": lambda s: {"net": s, "acc": 94.2, "epoch": 199},
    "float32 beside": lambda s: {"net": s, "acc": np.float32(94.2)},
    "int64 and bool beside": lambda s: {"state_dict": s, "epoch": np.int64(3), "best": np.bool_(True)},
    "float16 and uint8 beside": lambda s: {"weights": s, "a": np.float16(1.0), "b": np.uint8(3)},
    "numbers among the weights": lambda s: {**s, "acc": np.float64(94.2), "epoch": 3, "name": "best"},
    "nested wrappers": lambda s: prefixed("module.basic_net.", s),
    "a longer nesting": lambda s: {"net": prefixed("module.model.module.net.", s)},
    "Lightning": lambda s: {"state_dict": prefixed("classifier.", s), "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
    "optimizer beside": lambda s: {
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "model": s,
        "amp": {"scale": torch.tensor(1.0)},
    },
    "unaveraged beside": lambda s: {"model_state_dict": s, "unaveraged_model_state_dict": {k: v + 1 for k, v in s.items()}},
    "nested entries": lambda s: {"checkpoint": {"model": {"state_dict": s}}},
}


@pytest.mark.parametrize("wrap", AROUND.values(), ids=AROUND)
def test_what_lies_around_the_weights_is_dropped(wrap, tmp_path):
    path, model = tmp_path / "weights.pt", randomised(WideResNet(10, 1, 7))
    torch.save(wrap(dict(model.state_dict())), path)
    for loaded in (classifier_from_file(path), classifier_from_file(path, config=model.config)):
        assert loaded.config == model.config
        assert_same_weights(loaded, model)


MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
NORMALISED = {
    "Sequential": lambda s: {"0.mean": MEAN, "0.std": STD, **prefixed("1.", s)},
    "shaped": lambda s: {"0.mean": MEAN[None, :, None, None], "0.std": STD[None, :, None, None], **prefixed("1.", s)},
    "mu, sigma beside a wrapper": lambda s: {"mu": MEAN[:, None, None], "sigma": STD[:, None, None], **prefixed("model.", s)},
    "mu, sigma among the weights": lambda s: {"mu": MEAN, "sigma": STD, **s},
    "named layer": lambda s: {"state_dict": prefixed("module.", {"normalize.mean": MEAN, "normalize.std": STD} | s)},
    "averaged": lambda s: averaged({"0.mean": MEAN, "0.std": STD, **prefixed("1.", s)}),
    "means, sds": lambda s: {"norm.means": MEAN, "norm.sds": STD, **prefixed("net.", s)},
}


@pytest.mark.parametrize("wrap", NORMALISED.values(), ids=NORMALISED)
@pytest.mark.parametrize("family", ["WideResNet", "DMWideResNet"])
def test_a_normalisation_in_front_becomes_mean_and_std(wrap, family, tmp_path):
    path = tmp_path / "weights.pt"
    if family == "WideResNet":
        model, activation = randomised(WideResNet(10, 1, 7, mean=MEAN.tolist(), std=STD.tolist())), None
    else:
        model, activation = randomised(DMWideResNet(10, 1, 7, "silu", MEAN.tolist(), STD.tolist())), "silu"
    torch.save(wrap(dict(model.state_dict())), path)
    x = torch.rand(2, 3, 8, 8)
    for loaded in (
        classifier_from_file(path, activation=activation),
        classifier_from_file(path, config={k: v for k, v in model.config.items() if k not in ("mean", "std")}),
    ):
        assert loaded.config == model.config
        torch.testing.assert_close(loaded.eval()(x), model(x), rtol=0, atol=0)


def test_a_normalisation_in_front_contradicts_another(tmp_path):
    torch.save({"0.mean": MEAN, "0.std": STD, **prefixed("1.", WideResNet(10, 1).state_dict())}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="w.pt: the file normalises with mean=.*the caller says"):
        classifier_from_file(tmp_path / "w.pt", mean=CIFAR10_MEAN, std=CIFAR10_STD)
    assert classifier_from_file(tmp_path / "w.pt", mean=MEAN.tolist(), std=STD.tolist()).config["mean"] == MEAN.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {"net": s, "ema": {k: v + 1 for k, v in s.items()}}, "several networks .* under 'net' and 'ema'"),
        (lambda s: {"a": s, "b": dict(s)}, "several networks .* under 'a' and 'b'"),
        (lambda s: prefixed("student.", s) | prefixed("teacher.", s), "under 'student' and 'teacher'"),
        (lambda s: {"0.mean": 255 * MEAN, "0.std": 255 * STD, **prefixed("1.", s)}, "do not normalise images in .0, 1."),
        (lambda s: {"0.mean": MEAN, "0.std": STD * 0, **prefixed("1.", s)}, "do not normalise images in .0, 1."),
        (lambda s: {"0.mean": MEAN, **prefixed("1.", s)}, "unexpected '0.mean'"),
        (lambda s: prefixed("module.", s) | {"criterion.weight": torch.zeros(3)}, "unexpected 'criterion.weight'"),
    ],
    ids=range(7),
)
def test_what_could_mean_something_is_refused(content, message, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(content(dict(WideResNet(10, 1).state_dict())), path)
    with pytest.raises(CheckpointError, match=f"weights.pt.*{message}"):
        classifier_from_file(path)


def test_score_networks_have_such_files_too(tmp_path):
    model = randomised(DDPMpp(32, (1, 2, 2), 1))  # of the name cifar10-tiny
    path = tmp_path / "score.pt"
    for content in (
        {"model": prefixed("module._orig_mod.", model.state_dict()), "acc": np.float32(0.1)},
        {"model": averaged(model.state_dict())},
        score_sde_checkpoint([parameter.detach() for parameter in model.parameters()]),
    ):
        torch.save(content, path)
        for loaded in (score_from_file(path, config=model.config), score_from_file(path)):
            assert_same_weights(loaded, model)


def test_swapped_files_are_named(tmp_path):
    classifier, score = tmp_path / "classifier.pt", tmp_path / "checkpoint_8.pth"
    torch.save({"net": WideResNet(10, 1).state_dict()}, classifier)
    torch.save(score_sde_checkpoint([parameter.detach() for parameter in DDPMpp(32, (1, 2, 2), 1).parameters()]), score)
    with pytest.raises(CheckpointError, match=r"classifier.pt.*weights of a classifier \(WideResNet\), not of a score network"):
        score_from_file(classifier)
    with pytest.raises(CheckpointError, match=r"checkpoint_8.pth.*weights of a score network \(DDPMpp\), not of a classifier"):
        classifier_from_file(score)
    with pytest.raises(CheckpointError, match="does not fit WideResNet: these are weights of a DDPMpp"):
        classifier_from_file(score, config={"depth": 10, "widen_factor": 1})
    write_safetensors(tmp_path / "c.safetensors", WideResNet(10, 1).state_dict(), WideResNet(10, 1).config)
    with pytest.raises(CheckpointError, match="load_classifier"):
        score_from_file(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="file says arch|`activation` is for DMWideResNet"):
        classifier_from_file(tmp_path / "c.safetensors", activation="silu")
    dm = DMWideResNet(10, 1, activation="relu")
    write_safetensors(tmp_path / "d.safetensors", dm.state_dict(), dm.config)
    with pytest.raises(CheckpointError, match="file says activation='relu', the caller 'silu'"):
        classifier_from_file(tmp_path / "d.safetensors", activation="silu")


def test_converted_classifiers_keep_everything(tmp_path):
    model = randomised(WideResNet(10, 1, 7, mean=MEAN.tolist(), std=STD.tolist()))
    torch.save({"net": {"0.mean": MEAN, "0.std": STD, **prefixed("1.", model.state_dict())}}, tmp_path / "w.pt")
    assert convert_checkpoint(tmp_path / "w.pt", tmp_path / "w.safetensors") == model.config
    loaded = classifier_from_file(tmp_path / "w.safetensors")
    assert state_dict_sha256(loaded) == state_dict_sha256(model)
    torch.save(DMWideResNet(10, 1).state_dict(), tmp_path / "d.pt")
    with pytest.raises(CheckpointError, match="do not tell its activation"):
        convert_checkpoint(tmp_path / "d.pt", tmp_path / "d.safetensors")
    convert_checkpoint(tmp_path / "d.pt", tmp_path / "d.safetensors", options={"activation": "silu"})
    assert classifier_from_file(tmp_path / "d.safetensors").config["activation"] == "silu"
    convert_checkpoint(tmp_path / "d.pt", tmp_path / "n.safetensors", name="dm-wrn-10-1")
    with pytest.raises(ValueError, match="'dm-wrn' names no network"):
        convert_checkpoint(tmp_path / "d.pt", tmp_path / "e.safetensors", name="dm-wrn")


def test_a_full_disk_is_one_line(small_checkpoint, tmp_path):
    """The operating system refuses files above a size, as it does on a full disk."""
    code = f"""
        import resource, signal, sys
        from coupfast import cli
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        sys.exit(cli.main(["convert", {str(small_checkpoint)!r}, "out.safetensors", "--config", "config.json"]))
    """
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert found.returncode == 2, found.stderr
    assert found.stderr.startswith("coupfast convert: error: out.safetensors could not be written (")
    assert found.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_8.pth", "config.json"]


def test_tied_weights_are_written(tmp_path):
    weight = torch.rand(4, 4)
    state = {"a": weight, "b": weight, "c": weight[:2], "d": torch.rand(3)}
    write_safetensors(tmp_path / "tied.safetensors", state, {})
    found, _ = read_safetensors(tmp_path / "tied.safetensors")
    for name, value in state.items():
        assert torch.equal(found[name], value)


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_hash_depends_on_values_only():
    model = randomised(WideResNet(10, 1, 3))
    digest = state_dict_sha256(model)
    assert len(digest) == 64
    model.bn1.num_batches_tracked += 5
    assert state_dict_sha256(model.to(memory_format=torch.channels_last)) == digest
    assert state_dict_sha256(randomised(WideResNet(10, 1, 3))) == digest
    normalised = WideResNet(10, 1, 3, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    normalised.load_state_dict(model.state_dict())
    assert state_dict_sha256(normalised) != digest  # another function of the image
    with torch.no_grad():
        model.fc.bias[0] = torch.nextafter(model.fc.bias[0], torch.tensor(9.0))
    assert state_dict_sha256(model) != digest
    assert len(state_dict_sha256(model.bfloat16())) == 64


def test_a_dictionary_without_names_is_no_state_dict(tmp_path):
    torch.save({0: torch.zeros(3)}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError):
        classifier_from_file(tmp_path / "odd.pt")


def test_a_refused_pickle_is_not_recommended_for_unsafe_loading(tmp_path):
    torch.save({"a": PurePosixPath("x")}, tmp_path / "path.pt")
    with pytest.raises(CheckpointError) as caught:
        classifier_from_file(tmp_path / "path.pt")
    assert "weights_only" not in str(caught.value)
