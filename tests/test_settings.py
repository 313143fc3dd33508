"""Keywords, words of the command line and JSON become one object, and what is wrong with them is said."""

import argparse
import dataclasses
import functools
import inspect
import json
import re

import numpy as np
import pytest
import torch
from conftest import relu_classifier, small_score

import coupfast
from coupfast import BPDA, COUP, VPSDE, DiffPure, Engine, Exact, Purifier, ReverseSDE, Settings, Surrogate, evaluation
from coupfast.gradients import GRADIENTS
from coupfast.methods import METHODS, DiffusionMethod
from coupfast.options import options_of
from coupfast.settings import options
from coupfast.solvers import SOLVERS


def test_keywords_become_objects():
    found = Settings.of(
        method="coup", t=0.06, num_steps=20, guidance_scale=2, gradient="surrogate", surrogate_steps=5, engine="eager"
    )
    assert found.method == COUP(t=0.06, num_steps=20, guidance_scale=2.0)
    assert found.gradient == Surrogate(steps=5)
    assert found.engine == Engine(name="eager")
    assert Settings.of() == Settings()
    assert Settings.of(method=DiffPure, t=0.05).method == DiffPure(t=0.05)
    assert Settings.of(method=COUP(t=0.05), num_steps=3).method == COUP(t=0.05, num_steps=3)
    assert Settings.of(Settings(method=COUP(t=0.05)), gradient="bpda") == Settings(method=COUP(t=0.05), gradient=BPDA())


@pytest.mark.parametrize("method", [COUP(t=0.05), DiffPure(solver="reverse-diffusion"), DiffPure(solver="ddim")])
def test_a_method_that_no_keyword_is_about_stays_the_same_object(method):
    assert Settings.of(Settings(method=method), memory_budget="least").method is method


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if issubclass(method, DiffusionMethod)])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_json_and_back(method, gradient):
    keywords = {"surrogate_steps": 3} if gradient == "surrogate" else {}
    settings = Settings.of(
        method=method, gradient=gradient, t=0.05, num_steps=7, sde=VPSDE(0.2, 15.0), clamp=False, engine="eager", **keywords
    )
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_every_option_is_in_the_json():
    """What a ledger keeps, so that a run that is continued under another option is noticed."""
    found = Settings.of(gradient="surrogate", surrogate_steps=3, engine_options={"graphs": False}, engine="cuda").to_dict()
    for part, owner in (("method", COUP), ("gradient", Surrogate), ("engine", Engine)):
        assert {option.field for option in options_of(owner)} <= set(found[part])
    assert found["gradient"]["steps"] == 3 and found["engine"]["options"] == {"graphs": False}
    assert found["method"]["sde"] == {"beta_min": 0.1, "beta_max": 20.0}


def test_steps_have_a_hash():
    hashes = [
        Settings.of(**each).to_dict()["steps_sha256"]
        for each in ({}, {"guidance_scale": 2.0}, {"method": "reverse-sde"}, {"method": "diffpure"}, {"sde": VPSDE(0.1, 19.0)})
    ]
    assert len(set(hashes)) == 5
    assert Settings.of(gradient="bpda").to_dict()["steps_sha256"] == hashes[0]


def test_a_grid_is_what_it_says():
    times = [0.1, 0.05, 0.01, 1e-5]
    purifier = Purifier(small_score(), method="reverse-sde", t=times)
    assert purifier.num_steps == 3
    np.testing.assert_array_equal(purifier.recipe.table.t, times)
    equal = Purifier(small_score(), method="reverse-sde", t=np.linspace(0.1, 1e-5, 4))
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    other = Purifier(small_score(), method="reverse-sde", t=0.1, num_steps=3)
    torch.testing.assert_close(equal(x, seed=0), other(x, seed=0), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"guidence_scale": 2.0}, TypeError, "no option 'guidence_scale'; did you mean 'guidance_scale'"),
        ({"steps": 3}, TypeError, "no option 'steps'"),
        ({"method": 3}, TypeError, "`method` is a name, package.module:NAME or a Method, got int"),
        ({"gradient": 3}, TypeError, "`gradient` is one of 'exact', .* or an object of one, got int"),
        ({"engine": 3}, TypeError, "`engine` is a name or a coupfast.Engine, got int"),
        ({"t": [0.1, 0.2]}, ValueError, "falls from at most 1 to above 0.*; got 0.1, 0.2"),
        ({"t": [0.1]}, ValueError, "two finite times or more"),
        ({"t": [0.1, 0.0]}, ValueError, "above 0"),
        ({"t": [0.1, 0.05], "num_steps": 4}, ValueError, "`t` is a grid of 1 steps already; leave `num_steps` out, got 4"),
        ({"solver": 3}, TypeError, "`solver` is a name or a function"),
        ({"sde": 3}, TypeError, "`sde` is a coupfast.VPSDE, got int"),
        ({"guidance_scale": lambda t: -t}, ValueError, "`guidance_scale` is a finite number >= 0, got -0.1 at t = 0.1"),
        ({"guidance_scale": "2"}, ValueError, "or a function of t, got '2'"),
        ({"out_of_range": "wrap"}, ValueError, "`out_of_range` is one of 'refuse', 'clip', 'allow', got 'wrap'"),
        ({"precision": "tf32", "engine": "eager"}, ValueError, "'tf32' is for the cuda engine"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense(keywords, error, message):
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(error, match=message):
        Purifier(small_score(), relu_classifier(), **keywords)(x)


def test_an_option_of_others_is_said_to_change_nothing():
    with pytest.warns(UserWarning, match="no option `guidance_scale`: it changes nothing; method 'coup'.* ha(s|ve) it"):
        settings = Settings.of(method="reverse-sde", guidance_scale=2.0)
    assert settings.method == ReverseSDE()


def test_signatures_and_documentation_have_every_option():
    found = {option.keyword for kind in options().values() for option in kind}
    assert {"t", "num_steps", "solver", "guidance_scale", "memory_budget", "guidance_gradient", "engine", "precision"} <= found
    for function in (coupfast.purify, Purifier):
        assert found | {"method", "gradient"} <= set(inspect.signature(function).parameters)
    assert all(f"{keyword} (" in coupfast.purify.__doc__ for keyword in found)


def test_options_parse_words():
    parser = argparse.ArgumentParser()
    for kind in options().values():
        for option in kind:
            option.add_to(parser, default=argparse.SUPPRESS)
    words = "--t 0.1,0.05,0.001 --guidance-scale 2 --sde 0.2,15 --no-clamp --memory-budget 1.5GiB --engine eager"
    found = vars(parser.parse_args(words.split()))
    assert found == {
        "t": (0.1, 0.05, 0.001),
        "guidance_scale": 2.0,
        "sde": VPSDE(0.2, 15.0),
        "clamp": False,
        "memory_budget": 3 * 2**29,
        "engine": "eager",
    }
    assert Settings.of(**found).gradient == Exact(memory_budget=3 * 2**29)
    assert vars(parser.parse_args(["--engine-options", "graphs=false"])) == {"engine_options": {"graphs": False}}
    assert "lambda" in parser.format_help() and "--clamp, --no-clamp" in parser.format_help()


def test_text_is_short():
    purifier = Purifier(small_score(), relu_classifier(), num_steps=3)
    defense = coupfast.PurifiedClassifier(purifier, relu_classifier())
    certificate = coupfast.check_gradient(purifier, torch.rand(1, 3, 8, 8).double(), draws=0)
    for thing in (purifier, defense, purifier.plan(3), purifier.settings, certificate):
        assert len(repr(thing).splitlines()) <= 6
    assert "coup" in repr(purifier) and "3 steps" in repr(purifier) and "guidance_scale=1.0" in repr(purifier)
    assert "next draw 0" in repr(defense)


def test_a_word_over_settings_keeps_what_both_kinds_have():
    base = Settings.of(t=0.06, num_steps=3, guidance_scale=2.0, memory_budget="least", guidance_gradient="detached")
    assert Settings.of(base, method="coup") == base
    assert Settings.of(base, method="diffpure").method == DiffPure(t=0.06, num_steps=3)
    assert Settings.of(base, gradient="exact") == base
    assert Settings.of(base, gradient="surrogate", surrogate_steps=2).gradient == Surrogate(
        steps=2, memory_budget="least", guidance="detached"
    )


def test_settings_of_a_purifier_cannot_be_swapped():
    purifier = Purifier(small_score(), method="reverse-sde", num_steps=2)
    with pytest.raises(AttributeError):
        purifier.settings = Settings.of(t=0.3)


def test_words_that_do_not_parse_say_what_is_meant(capsys):
    parser = argparse.ArgumentParser()
    for option in options()["engine"] + options()["gradient"]:
        option.add_to(parser)
    for words, message in (
        (["--engine-options", "compile=no"], "no list of NAME=true"),
        (["--memory-budget", "2GB"], "2GiB, 500MiB"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert message in capsys.readouterr().err


def test_a_method_that_was_typed_in_has_a_hash():
    namespace: dict = {"coupfast": coupfast, "__name__": "__main__"}
    code = """
class Typed(coupfast.StepMethod):
    num_steps = 1

    def step(self, k, state, noise, networks):
        return (FACTOR * state[0],)
"""
    hashes = []
    for factor in ("0.5", "0.25"):
        exec(code.replace("FACTOR", factor), namespace)
        hashes.append(Settings.of(method=namespace["Typed"]).to_dict()["steps_sha256"])
    assert hashes[0] != hashes[1]


# --- what no name leads back to ----------------------------------------------------------------------------------------------


def rising(t, by=1.0):
    return 1.0 + by * t


class Schedule:
    def __call__(self, t):
        return 1.0 + t

    def at(self, t):
        return 1.0 + t


def typed_solver(sde, t, guidance_scale):
    return SOLVERS["euler-maruyama"](sde, t, guidance_scale)


def made_inside():
    def inside(t):
        return 1.0 + t

    return inside


UNNAMED = [
    ("guidance_scale", lambda t: 1.0 + t, r"test_settings:lambda \w{16}"),
    ("guidance_scale", functools.partial(rising, by=2.0), "a partial of test_settings:rising with by=2.0"),
    ("guidance_scale", Schedule(), "an object of test_settings:Schedule"),
    ("guidance_scale", Schedule().at, "test_settings:Schedule.at, which is something else there"),
    ("guidance_scale", made_inside(), r"test_settings:made_inside.locals.inside \w{16}"),
    ("solver", functools.partial(typed_solver), "a partial of test_settings:typed_solver with "),
    ("solver", lambda *given: typed_solver(*given), r"test_settings:lambda \w{16}"),
]


@pytest.mark.parametrize("option, value, words", UNNAMED)
def test_what_no_name_leads_back_to(option, value, words):
    """It purifies; where a name is needed, one line says that there is none."""
    settings = Settings.of(t=0.1, num_steps=2, **{option: value})
    with pytest.raises(ValueError, match=f"^`{option}` is {words}, and no name leads back to that, .* into a module or a file"):
        settings.to_dict()
    described = settings.describe()
    assert json.loads(json.dumps(described)) == Settings.of(t=0.1, num_steps=2, **{option: value}).describe()
    assert re.fullmatch(f"<{words}>", described["method"][option])
    with pytest.raises(ValueError, match=f"^`{option}` was {words} when this was written, and no name leads back to that"):
        Settings.from_dict(described)


def test_settings_that_have_no_name_purify_and_are_certified(images):
    classifier = relu_classifier()
    purifier = Purifier(small_score(), classifier, num_steps=1, t=0.01, guidance_scale=lambda t: 1.0 + t)
    assert torch.equal(
        purifier(images, seed=0),
        Purifier(small_score(), classifier, num_steps=1, t=0.01, guidance_scale=rising)(images, seed=0),
    )
    found = coupfast.check_gradient(purifier, images, images=1, draws=0, directions=0)
    assert found.holds and "locals.lambda" in found.to_json()


def test_a_class_that_was_made_inside_of_a_function_has_no_name():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Inside(coupfast.COUP):
        pass

    settings = Settings.of(method=Inside(num_steps=1))
    with pytest.raises(ValueError, match="^`method` is test_settings:test_a_class.*locals.Inside, and no name leads back"):
        settings.to_dict()
    with pytest.raises(ValueError, match="^`method` was test_settings:test_a_class.*locals.Inside when this was written"):
        Settings.from_dict(settings.describe())


def test_functions_with_names_come_back():
    settings = Settings.of(t=0.1, num_steps=2, guidance_scale=rising, solver=typed_solver)
    assert settings.to_dict() == settings.describe()
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))).to_dict() == settings.to_dict()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_needs_names(tmp_path, workers):
    spec = evaluation.Spec(purifier={"num_steps": 1, "guidance_scale": lambda t: 1.0}, attack="none", limit=1, draws=1)
    with pytest.raises(ValueError, match=r"`guidance_scale` is test_settings:.*lambda \w{16}, and no name leads back to that"):
        evaluation.evaluate(spec, out=tmp_path / "run", workers=workers)
    assert not (tmp_path / "run").exists()
