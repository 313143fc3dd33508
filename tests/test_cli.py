import json
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import coupfast
from coupfast import cli, doctor
from coupfast.data import load_images
from coupfast.engine.cpu import options as cpu_options
from coupfast.models.checkpoints import file_sha256, state_dict_sha256, write_safetensors
from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.wide_resnet import WideResNet

EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weight files of a score network and a classifier of 8 x 8 images, and options that name them."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        score = DDPMpp(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8)
        score.redraw_small_layers(torch.Generator().manual_seed(4))
        classifier = WideResNet(10, 1)
    write_safetensors(folder / "score.safetensors", score.state_dict(), score.config)
    write_safetensors(folder / "classifier.safetensors", classifier.state_dict(), classifier.config)
    return folder


@pytest.fixture
def networks(weights):
    score, classifier = weights / "score.safetensors", weights / "classifier.safetensors"
    return ["--score", str(score), "--classifier", str(classifier), "--num-steps", "2", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path):
    """Five photos in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    for name, image in zip("abcde", pixels, strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def run(*arguments):
    return cli.main(list(map(str, arguments)))


def expected(weights, x, **options):
    score = coupfast.load_score(weights / "score.safetensors")
    classifier = coupfast.load_classifier(weights / "classifier.safetensors")
    with torch.no_grad():
        return coupfast.purify(x, score, classifier, num_steps=2, **options)


def test_purify_writes_images_and_a_report(photos, networks, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("purify", photos, "--out", out, "--t", "0.05", "--seed", 7, *networks) == 0
    names = [f"{i:05d}-{name}.png" for i, name in enumerate("abcde")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "purify.json"]
    x, _ = load_images(photos)
    purified = expected(weights, x, t=0.05, seed=7)
    written, _ = load_images(out)
    # Half a level of 8 bits, and a hundredth for a value that lies on its edge.
    torch.testing.assert_close(written, purified, rtol=0.0, atol=0.51 / 255)

    report = json.loads((out / "purify.json").read_text())
    settings = report["settings"]
    assert (settings["seed"], settings["draws"], settings["batch"], settings["num_steps"]) == (7, [0], 20, 2)
    assert settings["engine"]["runs"] in ("eager", "cpu")  # "auto" is resolved
    expected_settings = coupfast.Settings.of(t=0.05, num_steps=2, gradient="none")
    assert coupfast.Settings.from_dict({**settings, "engine": expected_settings.to_dict()["engine"]}) == expected_settings
    score = coupfast.load_score(weights / "score.safetensors")
    assert report["networks"]["score"]["sha256"] == state_dict_sha256(score)
    assert report["networks"]["classifier"]["source"] == str(weights / "classifier.safetensors")
    assert [(row["id"], row["file"]) for row in report["images"]] == list(enumerate(names))
    assert [row["source"] for row in report["images"]] == [str(photos / f"{name}.png") for name in "abcde"]
    assert all(len(row["input_sha256"]) == len(row["output_sha256"]) == 64 for row in report["images"])
    assert report["environment"]["torch"] == torch.__version__
    assert report["command"].startswith("coupfast purify ")
    assert "Purified 5 images" in capsys.readouterr().out


def test_the_reported_command_repeats_the_run(photos, networks, tmp_path):
    def images(out):
        return json.loads((out / "purify.json").read_text())["images"]

    for name in ("first", "second"):
        assert run("purify", photos, "--out", tmp_path / name, *networks) == 0
    assert images(tmp_path / "first") == images(tmp_path / "second")
    assert run("purify", photos, "--out", tmp_path / "third", "--seed", 1, *networks) == 0
    first, third = images(tmp_path / "first"), images(tmp_path / "third")
    assert [row["input_sha256"] for row in first] == [row["input_sha256"] for row in third]
    assert not {row["output_sha256"] for row in first} & {row["output_sha256"] for row in third}


def test_batches_and_ids_do_not_matter(photos, networks, weights, tmp_path):
    exact = ["--format", "npz", *networks]
    assert run("purify", photos, "--out", tmp_path / "all", *exact) == 0
    assert run("purify", photos, "--out", tmp_path / "twos", "--batch", 2, *exact) == 0
    assert run("purify", photos / "d.png", "--out", tmp_path / "one", "--first-id", 3, *exact) == 0
    assert not list((tmp_path / "all").glob("*.png"))
    together, _ = load_images(tmp_path / "all" / "purified.npz")
    # Convolution libraries may round differently at another batch size; the noise is the same bits.
    tol = 64 * EPS32
    torch.testing.assert_close(load_images(tmp_path / "twos" / "purified.npz")[0], together, rtol=0.0, atol=tol)
    torch.testing.assert_close(load_images(tmp_path / "one" / "purified.npz")[0], together[3:4], rtol=0.0, atol=tol)
    torch.testing.assert_close(together, expected(weights, load_images(photos)[0], seed=0), rtol=0.0, atol=0.0)


def test_draws_formats_and_several_inputs(photos, networks, weights, tmp_path):
    x, _ = load_images(photos)
    archive = tmp_path / "more.npz"
    np.savez(archive, x=x[:2].numpy(), y=np.array([3, 4]))
    out = tmp_path / "out"
    inputs = [photos, archive, photos / "a.png"]
    assert run("purify", *inputs, "--limit", 2, "--draw", 0, 5, "--format", "png", "npz", "--out", out, *networks) == 0
    report = json.loads((out / "purify.json").read_text())
    assert [(row["id"], row["draw"]) for row in report["images"]] == [(i, draw) for draw in (0, 5) for i in range(5)]
    assert report["images"][2]["source"] == f"{archive}[0]"
    assert {row["label"] for row in report["images"]} == {None}  # some inputs have none
    assert len(list(out.glob("*-draw5.png"))) == 5
    images, _ = load_images(out / "purified.npz")
    both = torch.cat([x[:2], x[:2], x[:1]])
    for draw, part in ((0, images[:5]), (5, images[5:])):
        torch.testing.assert_close(part, expected(weights, both, seed=0, draw=draw), rtol=0.0, atol=0.0)

    assert run("purify", archive, "--format", "npz", "--out", tmp_path / "labelled", *networks) == 0
    assert load_images(tmp_path / "labelled" / "purified.npz")[1].tolist() == [3, 4]


def test_unguided_methods_load_no_classifier(photos, networks, tmp_path):
    arguments = networks[:2] + ["--classifier", "no-such-classifier", "--steps", "2", "--no-clamp"]
    assert run("purify", photos, "--method", "diffpure", "--out", tmp_path / "out", *arguments) == 0
    report = json.loads((tmp_path / "out" / "purify.json").read_text())
    assert list(report["networks"]) == ["score"]
    assert report["settings"]["method"]["clamp"] is False


def test_never_overwrites(photos, networks, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "00002-c.png").write_bytes(b"precious")
    assert run("purify", photos, "--out", out, *networks) == 2
    assert "00002-c.png exists" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["00002-c.png"]  # nothing was done
    assert (out / "00002-c.png").read_bytes() == b"precious"
    assert run("purify", photos, "--out", out, "--force", *networks) == 0
    assert (out / "00002-c.png").read_bytes() != b"precious"


def stop_at(monkeypatch, call, number):
    """The process gets a signal before that call of a purifier."""
    real, calls = coupfast.Purifier.forward, []

    def forward(self, *arguments, **keywords):
        calls.append(len(arguments[0]))
        if len(calls) == call:
            signal.raise_signal(number)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(coupfast.Purifier, "forward", forward)
    return calls


def content(out):
    """All that a run has written, but for the time it took."""
    report = json.loads((out / "purify.json").read_text())
    told = {name: value for name, value in report.items() if name not in ("command", "time", "seconds")}
    archive = [array.tobytes() for array in np.load(out / "purified.npz").values()] if (out / "purified.npz").exists() else []
    return told, archive, {path.name: path.read_bytes() for path in out.glob("*.png")}, sorted(p.name for p in out.iterdir())


@pytest.mark.parametrize("formats", [["png"], ["npz"], ["png", "npz"]], ids="-".join)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_purify_goes_on_after_it_was_stopped(photos, networks, tmp_path, monkeypatch, capsys, formats, number):
    command = ["purify", photos, "--batch", 2, "--draw", 0, 3, "--format", *formats, *networks]
    assert run(*command, "--out", tmp_path / "whole") == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 5, number)  # of six batches
        if number == signal.SIGTERM:
            with pytest.raises(SystemExit) as stopped:
                run(*command, "--out", out)
            assert stopped.value.code == 143
        else:
            assert run(*command, "--out", out) == 130
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("to go on: ")]
    words = shlex.split(said.removeprefix("to go on: coupfast "))
    assert words == [*map(str, command), "--out", str(out)]
    assert not (out / "purify.json").exists()
    (out / "00000-a-draw0.png").unlink(missing_ok=True)  # killed between the record and the file
    with monkeypatch.context() as patch:
        calls = stop_at(patch, 100, number)
        assert run(*words) == 0
    assert calls == [2, 1]  # the batch that was stopped, and the last
    assert content(out) == content(tmp_path / "whole")


def test_purify_goes_on_as_the_engine_was_decided(photos, networks, tmp_path, monkeypatch):
    """Last digits follow from the memory that was free when a folder was begun, not from what is free when it goes on."""
    command, out = ["purify", photos, "--batch", 2, "--draw", 0, 3, "--engine", "cpu", *networks], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(cpu_options, "available_bytes", lambda device: 0)
        assert run(*command, "--out", tmp_path / "little") == 0
        stop_at(patch, 3, signal.SIGINT)
        assert run(*command, "--out", out) == 130
    assert run(*command, "--out", out) == 0
    assert content(out) == content(tmp_path / "little")
    report = json.loads((out / "purify.json").read_text())
    assert report["settings"]["engine"]["options"] == {"largest_tile": 1}
    assert run(*command, "--out", out) == 0  # what is done is what this would do


def test_purify_skips_what_is_there(photos, networks, tmp_path, monkeypatch):
    folder, out = photos, tmp_path / "out"
    (folder / "e.png").rename(tmp_path / "e.png")
    command = ["purify", folder, "--batch", 2, "--out", out, *networks]
    assert run(*command) == 0
    before = content(out)
    calls = stop_at(monkeypatch, 100, signal.SIGINT)
    assert run(*command) == 0
    assert calls == [] and content(out) == before
    (out / "00002-c.png").unlink()  # of a batch all is made, so that it rounds as it did
    assert run(*command) == 0
    assert calls == [2] and content(out) == before
    (tmp_path / "e.png").rename(folder / "e.png")
    assert run(*command) == 0
    assert calls == [2, 1]
    assert run("purify", folder, "--batch", 2, "--out", tmp_path / "whole", *networks) == 0
    assert content(out)[1:] == content(tmp_path / "whole")[1:]
    assert content(out)[0]["images"] == content(tmp_path / "whole")[0]["images"]


@pytest.mark.parametrize("finished", [True, False])
def test_purify_in_another_way_is_refused(photos, networks, tmp_path, monkeypatch, capsys, finished):
    command = ["purify", photos, "--batch", 2, "--out", tmp_path / "out", *networks]
    with monkeypatch.context() as patch:
        stop_at(patch, 100 if finished else 3, signal.SIGINT)
        assert run(*command) == (0 if finished else 130)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert run(*command, "--seed", 5, "--t", "0.06") == 2
    error = capsys.readouterr().err
    assert "settings.seed was 0 and is 5" in error and "settings.method.t was 0.1 and is 0.06" in error and "--force" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert run(*command, "--seed", 5, "--t", "0.06", "--force") == 0
    assert run("purify", photos, "--batch", 2, "--seed", 5, "--t", "0.06", "--out", tmp_path / "whole", *networks) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_forced_purify_that_was_stopped_goes_on_without_force(photos, networks, tmp_path, monkeypatch, capsys):
    command = ["purify", photos, "--batch", 2, "--seed", 5, *networks]
    assert run("purify", photos, "--out", tmp_path / "out", *networks) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGINT)
        assert run(*command, "--out", tmp_path / "out", "--force") == 130
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("to go on: ")]
    assert "--force" not in said
    assert run(*shlex.split(said.removeprefix("to go on: coupfast "))) == 0
    assert run(*command, "--out", tmp_path / "whole") == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_images_do_not_mix(photos, networks, tmp_path, capsys):
    assert run("purify", photos, "--out", tmp_path / "out", *networks) == 0
    assert run("purify", photos / "b.png", "--out", tmp_path / "out", *networks) == 2
    assert "holds 5 images that are not among the inputs now, the first of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["purify", "cifar10-2O", "--out", "{tmp}"], "no file or folder of that name"),
        (["purify", "{photos}", "--out", "{tmp}", "--t", "3"], "`t` is continuous time in (1e-5, 1], got 3.0"),
        (["purify", "{photos}", "--out", "{tmp}", "--batch", "0"], "`--batch` is a number of images"),
        (["purify", "{photos}", "--out", "{tmp}", "--limit", "0"], "`limit` is a number of images"),
        (["purify", "{photos}", "--out", "{tmp}", "--draw", "1", "1"], "twice"),
        (["purify", "{photos}", "--out", "{tmp}", "--draw", "-1"], "[0, 2**32)"),
        (["purify", "{photos}", "--out", "{tmp}", "--first-id", "4294967295"], "`--first-id`"),
        (["purify", "{photos}", "--out", "{tmp}", "--seed", "-1"], "`seed` is an integer in [0, 2**64), got -1"),
        (["purify", "{photos}", "--out", "{photos}/a.png/x"], "a.png"),
        (["purify", "{photos}", "--out", "{tmp}", "--method", "cuop"], "got 'cuop'; did you mean 'coup'?"),
        (["purify", "{photos}", "--out", "{tmp}", "--method", "adp", "--sde", "0.1,20,discrete"], "VPSDE in continuous time"),
        (["purify", "{photos}", "--out", "{tmp}", "--guide-weights", "x.pt"], "`--guide-weights` belong to a `--guide`"),
        (["purify", "{photos}", "{large}", "--out", "{tmp}"], "are 3x9x9, those of"),
        (["purify", "{large}", "--out", "{tmp}"], "the score net is made for 8 x 8"),
        (["purify", "{photos}", "--out", "{tmp}", "--score", "{photos}/a.png"], "a.png"),
        (["purify", "{photos}", "--out", "{tmp}", "--score", "json:dumps"], "is called without arguments"),
        (["check-gradient", "{photos}", "--draws", "1"], "`draws` is at least 2"),
        (["check-gradient", "{photos}", "--memory-limit", "1e-6"], "MiB, the limit is"),
        (["convert", "{photos}/a.png", "{tmp}/x.bin"], "safetensors: give it that suffix"),
        (["convert", "{photos}/a.png", "{tmp}/x.safetensors"], "is not a torch file"),
        (["convert", "{photos}/none.pth", "{tmp}/x.safetensors"], "no weight file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_a_caller_can_put_right_is_one_line(arguments, message, photos, networks, tmp_path, capsys):
    large = tmp_path / "large.png"
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(large)
    filled = [a.format(photos=photos, large=large, tmp=tmp_path / "out") for a in arguments]
    extra = [] if filled[0] == "convert" else [a for a in networks if not (a == "--score" and "--score" in filled)]
    if "--score" in filled:
        extra = ["--device", "cpu"]
    assert run(*filled, *extra) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"coupfast {filled[0]}: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_debug_shows_the_traceback(photos, networks, tmp_path):
    with pytest.raises(ValueError, match="continuous time"):
        run("purify", photos, "--out", tmp_path / "out", "--t", "3", "--debug", *networks)


@pytest.mark.parametrize(
    "arguments", [[], ["purify", "x"], ["puriify"], ["purify", "x", "--out", "y", "--engine", "cup"]], ids=str
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 2
    assert "usage: coupfast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "word", "message"),
    [
        ("lm-coup", "--guidance-scale=math:exp", "argument --guidance-scale: 'math:exp' is none"),
        ("ld-sde", "--t=0.1,0.05", "argument --t: '0.1,0.05' is none"),
    ],
)
def test_a_word_is_read_as_the_method_takes_it(method, word, message, capsys):
    """Others take a function of t, or a grid, by the same name."""
    with pytest.raises(SystemExit):
        run("purify", "x", "--out", "y", "--method", method, word)
    assert message in capsys.readouterr().err


def test_an_option_of_another_command(photos, capsys):
    assert run("check-gradient", photos, "--defense", "mine.py:build") == 2
    error = capsys.readouterr().err
    assert error.startswith("coupfast check-gradient: error: --defense mine.py:build: not among its options")
    assert error.count("\n") == 1


def test_a_device_that_is_not_there(photos, capsys):
    for device in ["warp"] + ([] if torch.cuda.is_available() else ["cuda"]):
        with pytest.raises(SystemExit):
            run("purify", photos, "--out", "x", "--device", device)
        assert f"'{device}'" in capsys.readouterr().err


def test_interrupted(monkeypatch, capsys):
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert run("doctor") == 130
    assert "interrupted" in capsys.readouterr().err


def test_doctor(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor.engines, "cases", lambda: iter([("reverse-sde", {"method": "reverse-sde"}, "silu")]))
    target = tmp_path / "new" / "doctor.json"
    assert run("doctor", "--strict", "--json", target) == 0
    assert "All checks passed" in capsys.readouterr().out
    assert json.loads(target.read_text())["ok"]
    assert run("doctor", "--json", target) == 2
    assert "exists" in capsys.readouterr().err
    assert run("doctor", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []

    monkeypatch.setattr(doctor.shipped, "NORMALS_SHA256", "0" * 64)
    assert run("doctor") == 0
    assert "PROBLEM  noise on cpu" in capsys.readouterr().out
    assert run("doctor", "--strict") == 1


def test_check_gradient(photos, networks, tmp_path, capsys):
    target = tmp_path / "certificate.json"
    small, none = ["--images", 1, "--draws", 2, "--directions", 1], ["--draws", 0, "--directions", 0]
    assert run("check-gradient", photos, "--gradient", "bpda", *small, "--json", target, *networks) == 0
    text = capsys.readouterr().out
    report = json.loads(target.read_text())
    certificate = report["certificate"]
    assert "bpda" in text
    assert certificate["settings"]["gradient"]["name"] == "bpda"
    assert certificate["overall"]["relative_error"] > 1e-2
    assert report["images"] == [str(photos / "a.png")]
    assert set(report["networks"]) == {"score", "classifier"}
    assert run("check-gradient", photos, "--method", "reverse-sde", *small[:2], *none, "--json", "-", *networks) == 0
    certificate = json.loads(capsys.readouterr().out)["certificate"]
    assert (certificate["settings"]["gradient"]["name"], certificate["verdict"]) == ("exact", "exact")
    assert certificate["overall"]["relative_error"] < 1e-4
    assert "cross-entropy" in certificate["loss"]


def test_convert(tmp_path, capsys):
    config = {"nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "image_size": 8}
    network = DDPMpp(**config)
    checkpoint = {
        "optimizer": {},
        "model": {f"module.{name}": torch.zeros_like(p) for name, p in network.named_parameters()},
        "ema": {"decay": 0.999, "num_updates": 5, "shadow_params": [p.detach() for p in network.parameters()]},
        "step": 5,
    }
    source, target, arguments = tmp_path / "checkpoint_8.pth", tmp_path / "score.safetensors", tmp_path / "config.json"
    torch.save(checkpoint, source)
    arguments.write_text(json.dumps(config))
    assert run("convert", source, target, "--config", arguments) == 0
    digest = capsys.readouterr().out.split()[0]
    assert digest == file_sha256(target)
    loaded = coupfast.load_score(target)
    assert state_dict_sha256(loaded) == state_dict_sha256(network)
    assert run("convert", source, target, "--config", arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert run("convert", source, target, "--config", arguments, "--force") == 0
    arguments.write_text("{")
    assert run("convert", source, tmp_path / "other.safetensors", "--config", arguments) == 2
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize(
    "command",
    ["purify", "certify", "check-gradient", "evaluate", "plan", "report", "reproduce", "methods", "doctor", "convert"],
)
def test_every_option_is_explained(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(command, "--help")
    assert exit_.value.code == 0
    assert "usage: coupfast" in capsys.readouterr().out
    parser = cli.parser()
    subparser = parser._subparsers._group_actions[0].choices[command]
    for action in subparser._actions:
        assert action.help, action.option_strings


def test_what_is_not_said_is_not_there():
    """So that defaults are those of the functions, which are told nothing."""
    options = vars(cli.parser().parse_args(["purify", "x", "--out", "y"]))
    spelled = {option.keyword for kind in coupfast.settings.options().values() for option in kind} | {"method", "score"}
    assert not spelled & set(options)
    assert (options["draw"], options["seed"]) == ([0], 0)


def test_help_says_whose_an_option_is_and_every_default(capsys):
    with pytest.raises(SystemExit):
        run("purify", "--help")
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # names are broken at their hyphens
    assert "strength of the guide; 0 is none (of gdmp, gdmp-ssim; default: 60000; gdmp-ssim 70000)" in text
    assert "(default: 0.1,20; multi-stage 0.1,20,discrete)" in text
    assert "(default: adp 10, lm 5, lm-coup 5)" in text
    assert "(of adp; default: 0.001)" in text


def test_one_name_for_one_thing(capsys):
    """Every keyword of a purification is an option of that name; older spellings are taken, and not shown."""
    with pytest.raises(SystemExit):
        run("check-gradient", "--help")
    text = capsys.readouterr().out
    for kind in coupfast.settings.options().values():
        for option in kind:
            assert option.flag in text
    assert "--steps" not in text
    parse = cli.parser().parse_args
    assert parse(["purify", "x", "--out", "y", "--steps", "7"]) == parse(["purify", "x", "--out", "y", "--num-steps", "7"])
    assert parse(["evaluate", "--memory-gib", "2"]) == parse(["evaluate", "--memory-budget", "2GiB"])


def test_a_gradient_that_is_not_what_it_claims_to_be(photos, networks, monkeypatch, capsys):
    monkeypatch.setattr(coupfast.certificate.GradientCertificate, "verdict", "not exact")
    small = ["--images", 1, "--draws", 0, "--directions", 0]
    assert run("check-gradient", photos, "--method", "reverse-sde", *small, *networks) == 1
    assert "not exact" in capsys.readouterr().out


def test_python_m_coupfast():
    found = subprocess.run([sys.executable, "-m", "coupfast", "--version"], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout.strip()) == (0, f"coupfast {coupfast.__version__}")


def test_purify_one_channel_and_folders_of_any_name(tmp_path, weights):
    torch.manual_seed(0)
    score = DDPMpp(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), image_size=28, channels=1)
    write_safetensors(tmp_path / "score.safetensors", score.state_dict(), score.config)
    options = ["--score", tmp_path / "score.safetensors", "--method", "reverse-sde", "--steps", 1, "--device", "cpu"]
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "digits.npz", x=images)
    assert run("purify", tmp_path / "digits.npz", "--out", tmp_path / "npz", *options) == 0
    for i, name in enumerate(("zero", "one")):
        (tmp_path / "folder" / name).mkdir(parents=True)
        Image.fromarray(images[i, 0]).save(tmp_path / "folder" / name / "0.png")
    assert run("purify", tmp_path / "folder", "--channels", 1, "--out", tmp_path / "png", *options) == 0
    for out in ("npz", "png"):
        written = sorted((tmp_path / out).glob("*.png"))
        assert len(written) == 2
        assert Image.open(written[0]).mode == "L"
