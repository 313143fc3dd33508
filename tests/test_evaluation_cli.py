"""`coupfast evaluate`, `plan` and `report` from the command line."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import small_score

from coupfast import Settings, cli
from coupfast.cli.spec import spec_of
from coupfast.evaluation import notes
from coupfast.evaluation import plan as planning
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.suites import RECOMMENDATION
from coupfast.methods import METHODS
from coupfast.models.checkpoints import write_safetensors
from coupfast.models.wide_resnet import WideResNet
from coupfast.solvers import SOLVERS


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Options that name a small defense and labelled 8 x 8 images."""
    folder = tmp_path_factory.mktemp("networks")
    score = small_score(torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        classifier = WideResNet(10, 1).eval()
    write_safetensors(folder / "score.safetensors", score.state_dict(), score.config)
    write_safetensors(folder / "classifier.safetensors", classifier.state_dict(), classifier.config)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        np.savez(folder / "images.npz", x=x.numpy(), y=classifier(x).argmax(dim=1).numpy())
    paths = [folder / "images.npz", "--score", folder / "score.safetensors", "--classifier", folder / "classifier.safetensors"]
    return [*map(str, paths), "--device", "cpu"]


SMALL = ["--num-steps", "2", "--t", "0.01", "--attack", "apgd-ce", "--iterations", "2", "--shard", "2", "--draws", "3"]


def run(*arguments):
    return cli.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """Another classifier than the one that is attacked."""
    path = tmp_path_factory.mktemp("guide") / "guide.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(2)
        classifier = WideResNet(10, 1).eval()
    write_safetensors(path, classifier.state_dict(), classifier.config)
    return path


def test_a_solver_with_knobs_and_a_guide_of_its_own(networks, guide, tmp_path, capsys):
    said = ["--solver", "ddim", "--eta", "0.5", "--clip-denoised", "--grid", "log-snr", "--guide", guide]
    assert run("evaluate", *networks, *SMALL, *said, "--out", tmp_path / "run") == 0
    first = capsys.readouterr().out
    assert run("evaluate", "--resume", tmp_path / "run") == 0
    assert capsys.readouterr().out == first
    with Ledger(tmp_path / "run", read_only=True) as ledger:
        defense = ledger.configuration["defense"]
    assert defense["method"]["solver"] == {"name": "ddim", "eta": 0.5, "clip_denoised": True}
    assert defense["method"]["grid"] == "log-snr"
    assert defense["guidance_sha256"] != defense["classifier_sha256"]
    for change, message in (
        (["--eta", "0.25"], "solver.eta was 0.5 and is 0.25"),
        (["--guide", networks[networks.index("--classifier") + 1]], "guidance_sha256 was"),
        (["--solver", "exponential"], "solver 'exponential' has no option `clip_denoised`"),
        (["--method", "diffpure"], "`guide` is for a method that follows a classifier, and 'diffpure' does not"),
    ):
        assert run("evaluate", "--resume", tmp_path / "run", *change) == 2
        assert message in capsys.readouterr().err
    assert run("plan", *networks, *SMALL, *said) == 0


def test_a_certificate_with_a_guide(networks, guide, capsys):
    options = ["--num-steps", "2", "--t", "0.01", "--limit", "1", "--draws", "0", "--directions", "0", "--json", "-"]
    assert run("check-gradient", *networks, *options, "--guide", guide, "--solver", "sde-dpm-solver++-2m") == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["networks"]) == {"score", "guide", "classifier"}
    assert report["networks"]["guide"]["sha256"] != report["networks"]["classifier"]["sha256"]
    assert report["certificate"]["verdict"] == "exact"
    assert run("check-gradient", *networks, *options, "--guide", guide, "--method", "diffpure") == 2
    assert "`--guide` is for a method that follows a classifier" in capsys.readouterr().err


def test_methods_are_listed(capsys):
    assert run("methods") == 0
    printed = capsys.readouterr().out
    assert all(f"| `{name}` |" in printed for name in (*METHODS, *SOLVERS))


def test_evaluate_and_resume(networks, tmp_path, capsys):
    assert run("evaluate", *networks, *SMALL, "--no-clamp", "--norm", "L2", "--eps", "1/4", "--out", tmp_path / "run") == 0
    first = capsys.readouterr().out
    assert "coup under apgd-ce, L2 0.25, 4 images; 95 % intervals" in first
    assert "official, one fresh draw a stage" in first and "worst of 3 draws" in first
    # Its own options, without naming them again, also those that are not the defaults.
    assert run("evaluate", "--resume", tmp_path / "run") == 0
    assert capsys.readouterr().out == first
    assert run("evaluate", "--resume", tmp_path / "run", "--workers", "2", "--eps", "0.25") == 0
    assert capsys.readouterr().out == first
    assert run("evaluate", "--resume", tmp_path / "run", "--eps", "8/255", "--method", "diffpure") == 2
    error = capsys.readouterr().err
    assert (
        "another configuration" in error
        and "spec.eps was 0.25 and is 0.0313" in error
        and 'defense.method.name was "coup" and is "diffpure"' in error
    )
    with Ledger(tmp_path / "run", read_only=True) as ledger:
        assert shlex.split(ledger.command)[:2] == ["coupfast", "evaluate"]
        purifier = ledger.configuration["spec"]["purifier"]  # and nothing that the engine chose by the memory that was free
        assert purifier == {"t": 0.01, "num_steps": 2, "clamp": False}
        assert ledger.configuration["defense"]["method"]["clamp"] is False
        json.dumps(ledger.configuration)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_stopped_by_a_signal_says_how_to_go_on(networks, tmp_path, monkeypatch, capsys, number, status):
    asked = ["evaluate", *networks, *SMALL]
    assert run(*asked, "--out", tmp_path / "whole") == 0
    whole = re.search("fingerprint of the results .*", capsys.readouterr().out)[0]
    folder = tmp_path / "a run"
    ask, calls = Metered.ask, []
    with monkeypatch.context() as patch:

        def strike(*arguments):
            calls.append(arguments)
            if len(calls) == 5:
                signal.raise_signal(number)
            return ask(*arguments)

        patch.setattr(Metered, "ask", strike)
        handler = signal.getsignal(signal.SIGTERM)
        if number == signal.SIGTERM:
            with pytest.raises(SystemExit) as stopped:
                run(*asked, "--out", folder)
            assert stopped.value.code == status
        else:
            assert run(*asked, "--out", folder) == status
        assert signal.getsignal(signal.SIGTERM) == handler
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("to go on: ")]
    assert said == f"to go on: coupfast evaluate --resume '{folder}'"
    assert len(list((folder / "journals").glob("apgd-ce-*.journal"))) == 1
    assert run(*shlex.split(said)[4:]) == 0
    assert re.search("fingerprint of the results .*", capsys.readouterr().out)[0] == whole


def test_sigterm_to_a_job_with_workers(networks, tmp_path):
    """As a cluster sends it, to all processes of the job."""
    asked = [*networks, *SMALL, "--certify", "0", "--shard", "1", "--iterations", "200", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "coupfast", "evaluate", *asked, "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list((tmp_path / "run").glob("journals/apgd-ce-*.journal")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 143
    assert said.splitlines()[-1] == f"to go on: coupfast evaluate --resume {tmp_path / 'run'} --workers 2 --certify 0"
    assert list((tmp_path / "run").glob("journals/apgd-ce-*.journal")) != [] and "died" not in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "say where the run is kept"),
        (("--out", "run", "--resume", "run"), "say where the run is kept"),
        (("--resume", "nowhere"), "nowhere holds no run"),
        (("--out", "run", "--eps", "8"), "8/255 is 0.0313"),
        (("--out", "run", "--eps", "0"), "above 0"),
        (("--out", "run", "--limit", "5"), "asks for 5 images, and .* has 4"),
        (("--out", "run", "--attack", "apgd-ce", "--queries", "5"), "'apgd-ce' has no queries"),
        (("--out", "run", "--workers", "0"), "`workers` is at least 1"),
        (("--out", "run", "--price", "1"), "`--price` is for --plan"),
        (("--out", "run", "--attack", "stadv", "--eps", "0.1"), "--eps: .* stadv has none: leave that out; .* --reach"),
        (("--out", "run", "--attack", "salt-and-pepper", "--norm", "L2"), "--norm: for attacks in a ball, .* are --amount$"),
        (("--out", "run", "--method", "none", "--certify", "1"), "with --method none there is none"),
    ],
)
def test_says_what_is_wrong_before_any_work(networks, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", *networks, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "attack, gradient, said",
    [
        (["bpda-eot-20", "--iterations", "2", "--eot-iter", "2"], "bpda", "coup under bpda-eot-20, Linf 8/255, 4 images;"),
        (["salt-and-pepper", "--amount", "0.2"], "exact", "coup under salt-and-pepper, 4 images;"),
    ],
)
def test_an_attack_gets_the_gradient_that_it_is_made_for(networks, tmp_path, capsys, attack, gradient, said):
    small = ["--steps", "2", "--t", "0.01", "--shard", "2", "--draws", "2"]
    assert run("evaluate", *networks, *small, "--attack", *attack, "--out", tmp_path / "run") == 0
    assert said in capsys.readouterr().out
    with Ledger(tmp_path / "run", read_only=True) as ledger:
        assert ledger.configuration["defense"]["gradient"]["name"] == gradient
        assert list(ledger.configuration["stages"]) == [attack[0]]


def test_neither_attack_nor_defense(networks, tmp_path, capsys):
    assert run("evaluate", *networks, "--method", "none", "--attack", "none", "--draws", "1", "--out", tmp_path / "run") == 0
    assert "no defense under no attack, 4 images; 95 % intervals" in capsys.readouterr().out


def test_a_gpu_by_its_number_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run("evaluate", "--device", "cuda:1", "--out", "run") == 2
    assert "got 'cuda:1': workers take one GPU each" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "plan"])
def test_unknown_attack(command, capsys):
    assert run(command, "--attack", "autoatack-rand", *(["--out", "run"] if command == "evaluate" else [])) == 2
    assert "got 'autoatack-rand'; did you mean 'autoattack-rand'?" in capsys.readouterr().err


def test_help_says_what_is_published_and_what_is_assumed(capsys):
    with pytest.raises(SystemExit):
        run("evaluate", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "(default: 8/255)",
        "steps of the attack (100 in autoattack-standard, autoattack-rand, apgd-ce, fixed-autoattack, transfer, stadv;",
        "; 40 in bpda-eot; 20 in",
        "2/255 in Linf and eps/5 in L2",
        "share of pixels that is changed (0.05 in",
        "queries for an image (5000 in autoattack-standard, square)",
        "in [0, 2**63) (default: 0)",
        "5 % of pixels is an assumption",
        "EOT 15 is an assumption",
        "least keeps nothing but states, else bytes (2GiB, 500MiB) (default: whole)",
    ):
        assert words in text


@pytest.mark.parametrize("text, paths", [("4", 4), ("0,5,7", (0, 5, 7)), ("7,", (7,))])
def test_paths_are_a_number_or_numbers(text, paths):
    assert cli.parser().parse_args(["evaluate", "--paths", text]).paths == paths


def test_the_papers_options():
    def spec_of_words(*words):
        return spec_of(cli.parser().parse_args(["evaluate", "--paper", *words]))

    spec = spec_of_words("--norm", "L2", "--out", "run", "--score-weights", "random")
    assert (spec.images, spec.purifier, spec.eps, spec.norm, spec.seed) == ("cifar10-512", {"t": 0.075}, 0.5, "L2", 121)
    assert spec_of_words("--seed", "3", "--t", "0.05").seed == 3 and spec_of_words("--t", "0.05").purifier == {"t": 0.05}
    assert spec_of_words("--method", "none").purifier is None
    assert (spec.score, spec.classifier, spec.score_weights) == ("cifar10-ddpmpp-deep", "wrn-28-10", "random")


@pytest.fixture(scope="module")
def begun(networks, tmp_path_factory):
    """A run with a plan and a certificate, and the paper's radius, time and seed."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    own = [*SMALL, "--t", "0.1", "--seed", "121", "--engine", "cpu", "--plan", "--price", "2"]
    assert run("evaluate", *networks, *own, "--out", folder) == 0
    return folder


def resumed_spec(folder, *words):
    argv = ["evaluate", "--resume", str(folder), *words]
    return spec_of(cli.parser(argv).parse_args(argv))


def test_what_the_run_has_may_be_said_again(begun, networks, capsys):
    own = resumed_spec(begun)
    for words in (
        (*networks, *SMALL, "--t", "0.1"),
        ("--eps", "8/255", "--norm", "Linf", "--seeding", "unit", "--threads", "1", "--attack", "apgd-ce", "--device", "cpu"),
        ("--method", "coup", "--gradient", "exact", "--guidance-gradient", "exact", "--engine", "cpu"),
        ("--memory-budget", "whole", "--guidance-scale", "1", "--precision", "strict", "--eot-iter", "1", "--loss", "ce"),
        ("--engine-options", "largest_tile=4"),  # as it was decided
        ("--stage", "apgd-ce.iterations=2"),
        ("--paper", *networks),
    ):
        assert resumed_spec(begun, *words) == own, words


@pytest.mark.parametrize(
    "words, message",
    [
        (["--paper"], "--paper asks for images cifar10-512, score cifar10-ddpmpp-deep, classifier wrn-28-10, and the run in .*"
         " has images .*, score .*, classifier .*, with which it goes on: leave it out, or start another"),
        (["--engine-options", "largest_tile=2"], "--engine-options is {'largest_tile': 2}, and the run in .* has "
         "{'largest_tile': 4}, with which it goes on"),
        (["--defense", "my.py:build"], "--defense is my.py:build, and the run in .* has networks of its own, with which it"),
        (["--certify", "2"], "--certify is 2, and the run in .* has a certificate of images: 1; a run has one of it"),
        (["--plan", "--price", "3"], "--price is 3.0, and the run in .* has a plan at a price: 2.0"),
        (["--iterations", "7"], "another configuration: .*iterations was 2 and is 7"),
        (["--stage", "apgd-ce.iterations=7"], "another configuration: .*iterations was 2 and is 7"),
        (["--memory-budget", "auto"], 'another configuration: spec.purifier.memory_budget was null and is "auto"'),
        (["--seed", "1"], "another configuration: spec.seed was 121 and is 1"),
        (["--limit", "3"], "another configuration: .*spec.limit was null and is 3"),
    ],
)  # fmt: skip
def test_what_contradicts_the_run_is_refused(begun, words, message, capsys):
    assert run("evaluate", "--resume", begun, *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line)


@pytest.mark.parametrize(
    "word, message",
    [
        ("exact=7", "'exact=7' is no STAGE.KNOB=VALUE; say exact.iterations=20"),
        ("exact.iterations", "'exact.iterations' is no STAGE.KNOB=VALUE"),
        ("exact.iterations=many", "'exact.iterations=many': invalid literal .* 'many'; steps"),
        ("exact.dw_box=7", "'exact.dw_box=7': true or false, got '7'; the attacker knows"),
    ],
)
def test_a_knob_of_one_stage_says_what_it_is(word, message, capsys):
    with pytest.raises(SystemExit):
        run("evaluate", "--attack", "cascade", "--stage", word)
    assert re.search(f"argument --stage: {message}", capsys.readouterr().err)


def test_options_of_a_method_that_the_run_has_as_an_object(tmp_path):
    (tmp_path / "my_method.py").write_text(
        "import dataclasses\nimport coupfast\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\nclass Mine(coupfast.COUP):\n    strength: float = 0.5\n"
    )
    method = f"{tmp_path}/my_method.py:Mine"
    settings = Settings.of(method=method, strength=0.25, num_steps=1, guidance_scale=rising)
    said = {"attack": "none", "purifier": {"settings": settings.to_dict()}}
    Ledger.create(tmp_path / "run", {"spec": said}, command="", started="").close()
    argv = ["evaluate", "--resume", str(tmp_path / "run"), "--strength", "0.75"]
    assert cli.parser(argv).parse_args(argv).strength == 0.75


def rising(t):
    return 1.0 + t


def test_a_plan_of_a_run_takes_no_other_options(begun, capsys):
    assert run("plan", "--run", begun, "--eps", "1/255", "--paper", "--probe-steps", "3", "--iterations", "4") == 2
    said = "--run tells of a run as it was planned and as it went: leave out --eps, --iterations, --paper, --probe-steps"
    assert said in capsys.readouterr().err
    assert run("plan", "--run", begun) == 0


def test_the_paper_with_another_defense():
    argv = ["evaluate", "--out", "run", "--paper", "--norm", "L2", "--defense", "my.py:build"]
    spec = spec_of(cli.parser(argv).parse_args(argv))
    assert (spec.images, spec.eps, spec.norm, spec.seed, spec.defense) == ("cifar10-512", 0.5, "L2", 121, "my.py:build")
    argv += ["--t", "0.2"]
    with pytest.raises(ValueError, match="^`t` is of a defense that is built here, and `defense` gives another one"):
        spec_of(cli.parser(argv).parse_args(argv))


def test_plan_before_and_after(networks, tmp_path, monkeypatch, capsys):
    assert run("plan", *networks, *SMALL, "--probe-steps", "1", "--workers", "3", "--price", "2") == 0
    assert re.search(r"apgd-ce +4 +36 +12 ", capsys.readouterr().out)
    assert run("evaluate", *networks, *SMALL, "--plan", "--price", "2", "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert run("plan", "--run", tmp_path / "run") == 0
    found = capsys.readouterr().out
    assert "what happened, at the probe's speed" in found and "cost at 2 a worker and hour: at most " in found
    # The prediction is the one that the run was started with.
    monkeypatch.setattr(planning, "probe", lambda *_, **__: pytest.fail("planned again"))
    assert run("evaluate", "--resume", tmp_path / "run", "--plan") == 0
    assert capsys.readouterr().out.startswith(found)
    assert run("evaluate", *networks, *SMALL, "--out", tmp_path / "other") == 0
    capsys.readouterr()
    assert run("plan", "--run", tmp_path / "other") == 2
    assert "started without a plan" in capsys.readouterr().err
    assert run("evaluate", "--resume", tmp_path / "other", "--plan") == 2
    assert "has begun without a plan, and one made now would predict nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--out", "taken"), "holds a run already"),
        (("--out", "file/run"), "cannot be made a run's folder"),
        (("--resume", "taken", "--t", "0.02"), "started with another configuration"),
        (("--out", "run", "--limit", "5"), "asks for 5 images"),
        (("--out", "run", "--workers", "0"), "`workers` is at least 1"),
        (("--out", "run", "--attack", "autoattack-standard", "--target-classes", "10"), "`target_classes` is at most 9"),
        (("--out", "run", "--certify", "-1"), "`--certify` is a number of images"),
        (("--out", "run", "--method", "none"), "`num_steps`, `t` are of a purifier, and with method 'none' there is none"),
    ],
)
def test_plans_and_certifies_nothing_that_it_cannot_run(networks, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    if "taken" in arguments:
        assert run("evaluate", *networks, *SMALL, "--out", "taken") == 0
    monkeypatch.setattr(notes, "plan", lambda *_, **__: pytest.fail("planned"))
    monkeypatch.setattr(notes, "check_gradient", lambda *_, **__: pytest.fail("certified"))
    small = SMALL if "--attack" not in arguments else SMALL[:4]
    assert run("evaluate", *networks, *small, "--plan", "--certify", "1", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_pilot_with_growing_draws_says_what_survives(networks, tmp_path, capsys):
    """On half of the images, with a quarter of the iterations."""
    attack = ["--num-steps", "2", "--t", "0.01", "--attack", "pgd-eot", "--mode", "fast", "--eot-iter", "4", "--eot-first", "1"]
    attack += ["--shard", "2", "--draws", "1", "--paths", "0"]
    pilot = ["--limit", "2", "--iterations", "2", "--certify", "0", "--out", tmp_path / "pilot"]
    assert run("evaluate", *networks, *attack, *pilot) == 0
    with Ledger(tmp_path / "pilot", read_only=True) as ledger:
        assert ledger.configuration["stages"]["pgd-eot"]["eot_first"] == 1
        took = {record.unit.stage: record for record in ledger.done().values()}["pgd-eot"]
    capsys.readouterr()
    assert run("plan", *networks, *attack, "--iterations", "8", "--probe-steps", "1", "--pilot", tmp_path / "pilot") == 0
    said, expected = capsys.readouterr().out.split("with the survival of ")
    assert expected.startswith(f"{tmp_path / 'pilot'} (there iterations 2):\n")
    most = 4 * sum(round(4 ** (k / 8)) for k in range(8))  # draws of the gradients, from 1 to 4
    assert re.search(rf"\bpgd-eot +4 +[0-9]+ +{most} ", said)
    share = took.gradient_images / (2 * (1 + 2))  # of at most 1 draw at the first point, 2 at the second
    assert re.search(rf"\bpgd-eot +4 +[0-9]+ +{math.ceil(share * most)} ", expected)
    assert run("plan", *networks, *attack[:-2], "--mode", "full", "--pilot", tmp_path / "pilot") == 2
    assert "images left pgd-eot otherwise: `drop` was 'majority' there and is 'never' here" in capsys.readouterr().err
    assert run("plan", *networks, *attack, "--pilot", tmp_path / "none") == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_report(networks, tmp_path, capsys):
    assert run("evaluate", *networks, *SMALL, "--out", tmp_path / "run") == 0  # certified by default
    assert "certifying the gradient that the attack follows, on 1 of the images" in capsys.readouterr().err
    for without in (("--attack", "salt-and-pepper"), ("--attack", "apgd-ce", "--certify", "0")):
        assert run("evaluate", *networks, *SMALL[:4], *without, "--draws", "1", "--out", tmp_path / without[1]) == 0
        assert "certifying" not in capsys.readouterr().err
    capsys.readouterr()
    assert run("report", tmp_path / "run") == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "run" / f"report.{suffix}") for suffix in ("html", "md", "json", "csv")
    ]
    assert "| overall.cosine |" in (tmp_path / "run" / "report.md").read_text()
    assert run("report", tmp_path / "run") == 2
    assert "--force" in capsys.readouterr().err
    assert run("report", tmp_path / "run", "--out", "report.pdf") == 2
    assert "written as HTML" in capsys.readouterr().err


def test_images_in_folders_of_other_classes(tmp_path):
    """Labels follow from `--classes`; without it the folders' names are asked for."""
    from coupfast.data import load_images, save_images

    x, _ = load_images("cifar10-20", limit=2)
    for i, name in enumerate(("tabby", "pug")):
        save_images(x[i : i + 1], tmp_path / "images" / name, ["0"])
    options = [tmp_path / "images", "--attack", "none", "--method", "none", "--draws", 1, "--out", tmp_path / "run"]
    assert run("evaluate", *options) == 2
    assert run("evaluate", *options, "--classes", "pug,tabby") == 0
    with Ledger(tmp_path / "run", read_only=True) as ledger:
        assert ledger.configuration["spec"]["classes"] == ["pug", "tabby"]
        assert sorted(ledger.configuration["images"]["labels"]) == [0, 1]
    assert run("evaluate", "--resume", tmp_path / "run") == 0


def test_a_warm_start_is_named_kept_and_refused(networks, tmp_path, capsys):
    small = [*SMALL[:4], "--attack", "pgd-eot", "--iterations", "1", "--eot-iter", "1", "--shard", "4", "--draws", "1"]
    small += ["--paths", "0", "--certify", "0"]
    assert run("evaluate", *networks, *small, "--method", "reverse-sde", "--out", tmp_path / "first") == 0
    begin = ["--start-from", tmp_path / "first"]
    assert run("evaluate", *networks, *small, *begin, "--norm", "L2", "--eps", "0.1", "--out", tmp_path / "second") == 0
    first = capsys.readouterr().out
    assert f"coup under pgd-eot, L2 0.1, begun from the adversarial images of {tmp_path / 'first'}, 4 images" in first
    assert run("evaluate", "--resume", tmp_path / "second", *begin) == 0
    assert run("evaluate", "--resume", tmp_path / "second", "--start-from", tmp_path / "second") == 2
    assert "spec.start_from was" in capsys.readouterr().err
    assert run("evaluate", *networks, *small, *begin, "--attack", "autoattack-rand", "--out", tmp_path / "third") == 2
    assert "`start_from` is for attacks of this project in a ball" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_what_is_recommended_is_told_kept_and_continued(networks, tmp_path, capsys):
    small = ["--num-steps", "2", "--t", "0.01", "--iterations", "1", "--eot-iter", "1", "--shard", "4", "--draws", "1"]
    small += ["--coarse-steps", "1", "--paths", "0", "--certify", "0", "--attack", "recommended"]
    assert run("evaluate", *networks, *small, "--out", tmp_path / "run") == 0
    with Ledger(tmp_path / "run", read_only=True) as ledger:
        spec = ledger.configuration["spec"]
    assert (spec["attack"], spec["mode"]) == (RECOMMENDATION.attack, RECOMMENDATION.mode)
    assert f"under {RECOMMENDATION.attack}" in capsys.readouterr().out
    assert run("evaluate", "--resume", tmp_path / "run", "--attack", "recommended") == 0
    with pytest.raises(SystemExit):
        run("evaluate", "--help")
    told = " ".join(capsys.readouterr().out.split())
    assert f"recommended is {RECOMMENDATION.attack} with --mode {RECOMMENDATION.mode}" in told
