"""A few steps of each training script on synthetic images."""

import importlib
import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from coupfast.models.zoo import load_classifier, load_score

Image = pytest.importorskip("PIL.Image")

SCRIPTS = Path(__file__).parent.parent / "scripts"

SMALL_SCORE = [
    "--nf",
    "8",
    "--ch-mult",
    "1",
    "2",
    "--attn-resolutions",
    "4",
    "--image-size",
    "8",
    "--dropout",
    "0.1",
    "--mosaics",
    "0.5",
]
SMALL_CLASSIFIER = ["--depth", "10", "--widen-factor", "1", "--num-classes", "2"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def data(tmp_path):
    """24 JPEG images of 8×8 pixels; light ones have label 1, dark ones 0."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    files = []
    for label in labels:
        buffer = io.BytesIO()
        pixels = rng.integers(0, 80, (8, 8, 3)) + 150 * label
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    path = tmp_path / "data.npz"
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=labels)
    return path


def train(module, data, run, *options):
    module.main(["train", "--data", str(data), "--run", str(run), "--batch", "4", "--log-steps", "1", *options])


@pytest.mark.parametrize(
    ("name", "size"), [("train_score", SMALL_SCORE), ("train_classifier", SMALL_CLASSIFIER)], ids=lambda v: str(v)[:8]
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(name, size, script, data, tmp_path, monkeypatch, capsys):
    module, training = script(name), script("training")
    options = ["--images", "40", "--warmup", "0.2", *size]
    train(module, data, tmp_path / "whole", *options)

    batch_indices = training.batch_indices

    def stop_at_the_fourth_batch(position, *args):
        if position == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_indices(position, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "batch_indices", stop_at_the_fourth_batch)
        train(module, data, tmp_path / "parts", *options)
    assert '"done": false' in capsys.readouterr().out
    train(module, data, tmp_path / "parts", *options)
    report = json.loads(capsys.readouterr().out)
    assert report["done"] is True
    assert report["images"] == 40

    whole = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)
    parts = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    for entry in ("model", "average", "generator", "position"):
        torch.testing.assert_close(parts[entry], whole[entry], rtol=0, atol=0)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == list(range(4, 44, 4))
    assert not list(tmp_path.glob("*/*.partial"))


def test_score_run_continues_from_weights_and_is_judged(script, data, tmp_path, capsys):
    module = script("train_score")
    train(module, data, tmp_path / "first", "--images", "16", *SMALL_SCORE)
    first = tmp_path / "first" / "weights.safetensors"
    train(module, data, tmp_path / "second", "--images", "8", "--lr", "0", "--init", str(first))
    second = tmp_path / "second" / "weights.safetensors"
    torch.testing.assert_close(load_score(second).state_dict(), load_score(first).state_dict())  # lr 0 keeps them

    capsys.readouterr()
    judge = ["evaluate", "--data", str(data), "--weights", str(first), "--count", "10", "--batch", "3"]
    module.main([*judge, "--t", "0.05", "0.1"])
    report = json.loads(capsys.readouterr().out)
    assert [row["t"] for row in report["results"]] == [0.05, 0.1]
    # Nearly untrained: eps_hat is about 0, so the error is that of predicting nothing. 1920 squared normals.
    for row in report["results"]:
        assert abs(row["eps_mse"] - 1.0) < 0.2
    module.main([*judge, "--t", "0.05"])
    assert json.loads(capsys.readouterr().out)["results"] == report["results"][:1]
    with pytest.raises(SystemExit, match="24 images, not 100"):
        module.main([*judge[:-3], "100", "--t", "0.1"])


def test_classifier_learns_light_from_dark(script, data, tmp_path, capsys):
    module = script("train_classifier")
    options = ["--images", "160", "--lr", "0.05", "--shift", "1", "--ema", "0.8", *SMALL_CLASSIFIER]
    train(module, data, tmp_path / "run", *options)
    weights = tmp_path / "run" / "weights.safetensors"
    assert load_classifier(weights).config["num_classes"] == 2
    capsys.readouterr()
    module.main(["evaluate", "--data", str(data), "--weights", str(weights)])
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == [0, 24]
    assert report["accuracy"] == report["correct"] / 24 >= 0.9


def test_mosaics_hold_halved_images(script):
    x = torch.rand(5, 3, 8, 8)
    found = script("train_score").halved_mosaics(x)
    half = x.reshape(5, 3, 4, 2, 4, 2).mean(dim=(3, 5))
    tol = 4 * torch.finfo(torch.float32).eps
    for quarter, number in [((0, 0), 2), ((0, 4), 1), ((4, 0), 0), ((4, 4), 4)]:
        top, left = quarter
        torch.testing.assert_close(found[2, :, top : top + 4, left : left + 4], half[number], rtol=tol, atol=tol)


def test_shifts_are_those_of_the_padded_image(script):
    module = script("train_classifier")
    x = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).reshape(2, 3, 5, 4) + 1
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randint(0, 5, (2, 2), generator=torch.Generator().manual_seed(0))
    found = module.shifted(x, 2, generator)
    for image, row, column, original in zip(found, rows, columns, x, strict=True):
        padded = torch.nn.functional.pad(original, (2, 2, 2, 2))
        torch.testing.assert_close(image, padded[:, row : row + 5, column : column + 4], rtol=0, atol=0)


def test_every_image_comes_once_per_epoch(script):
    training = script("training")
    epochs = torch.cat([training.batch_indices(position, 7, 24, 3) for position in range(0, 49, 7)])[:48].reshape(2, 24)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(24))
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("length", [[], ["--images", "8", "--minutes", "1"]], ids=str)
def test_a_run_has_one_length(length, script, data, tmp_path):
    with pytest.raises(SystemExit, match="exactly one of --images and --minutes"):
        train(script("train_score"), data, tmp_path / "run", *length, *SMALL_SCORE)


@pytest.mark.parametrize("name", ["train_score", "train_classifier"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help(name, command, script, capsys):
    with pytest.raises(SystemExit) as ended:
        script(name).main([command, "--help"])
    assert ended.value.code == 0
    assert "--data" in capsys.readouterr().out
