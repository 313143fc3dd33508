"""Purifiers beside COUP, DiffPure and the reverse SDE: each against a loop over its paper's equations, and by certificate."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_discrete_solvers import F64, Score, images
from torch import nn

from coupfast import Purifier, check_gradient
from coupfast.cli.methods import methods_table, solvers_table
from coupfast.definition import Definition
from coupfast.doctor.engines import check_engines
from coupfast.methods import COUP, GDMP, METHODS, DiffPure, LangevinSDE, Method, MultiStage, OneStep, TableMethod
from coupfast.sde import VPSDE
from coupfast.settings import Settings
from coupfast.solvers import DDIM, SOLVERS, CoefficientTable, one_after_the_other

METHODS_HERE = {
    "multi-stage": MultiStage(levels=(0.03, 0.2), repeats=(2, 1), num_steps=(2, 4)),
    "multi-stage, two-step solver": MultiStage(levels=(0.1,), repeats=(2,), num_steps=4, solver="sde-dpm-solver++-2m"),
    "multi-stage, Euler": MultiStage(levels=(0.1,), repeats=(2,), num_steps=3, solver="euler-maruyama", sde=VPSDE()),
    "ld-sde": LangevinSDE(t=0.075, clamp=False),
    "ld-sde, strongly pulled": LangevinSDE(t=0.05, pull_variance=2e-4, rate=0.05, noise_scale=0.5),
    "gdmp": GDMP(rounds=2, noise_steps=5, guide_batch=1, image_elements=192),
    "gdmp, strongly guided": GDMP(rounds=1, noise_steps=9, guide_scale=1e5, guide_batch=1, image_elements=192, clamp=False),
    "gdmp, no guide": GDMP(rounds=1, noise_steps=4, guide_scale=0.0, image_elements=192),
    "one-step": OneStep(clamp=False),
    "one-step, twice, clipped": OneStep(t=(0.5, 0.3), clip_denoised=True),
    "consistency": OneStep(t=(0.5, 0.3), c_skip=0.4, c_out=lambda t: 0.1 - t, clip_denoised=True),
}


@pytest.mark.parametrize("name", METHODS_HERE)
@pytest.mark.parametrize("batch", [1, 3])
def test_runs_are_the_papers_loops(name, batch):
    purifier = Purifier(Score(), method=METHODS_HERE[name], engine="eager", memory_budget="least")
    definition, ids, x = Definition(purifier), torch.arange(batch) + 4, images(batch)
    noise, weights = definition.noise(x, 7, ids, 1), torch.randn_like(x)
    losses = lambda purified: (purified * weights).flatten(1).sum(1)  # noqa: E731
    leaf = x.clone().requires_grad_()
    found = purifier(leaf, seed=7, ids=ids, draw=1)
    (ours,) = torch.autograd.grad(losses(found).sum(), leaf)
    # Some ten steps of ten operations each, around a network of sums of 54 terms.
    bound = 1000 * F64
    for at_once in (None, 2):
        expected, gradient = definition.gradient(x, noise, losses, steps_at_once=at_once)
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=bound * float(expected.abs().max()))
        torch.testing.assert_close(ours, gradient, rtol=0, atol=bound * float(gradient.abs().max()))
    if batch == 1:
        return
    # An explicit path is the same, and an image is the same alone.
    rows = noise.rows if noise.second is None else torch.cat([noise.rows, noise.second])
    torch.testing.assert_close(purifier(x, noise=rows), found.detach(), rtol=0, atol=bound)
    torch.testing.assert_close(purifier(x[1:2], seed=7, ids=ids[1:2], draw=1), found.detach()[1:2], rtol=0, atol=bound)


@pytest.mark.parametrize("name", METHODS_HERE)
@pytest.mark.parametrize("batch", [1, 3])
def test_certificate(name, batch):
    purifier = Purifier(Score(), method=METHODS_HERE[name], engine="eager")
    certificate = check_gradient(purifier, images(batch), images=batch, draws=0, directions=1)
    assert certificate.verdict == "exact" and certificate.relative_error < 1e-11
    assert min(abs(row.difference - row.float64) / row.scale for row in certificate.derivatives) < 1e-6


@pytest.mark.parametrize("name", METHODS_HERE)
@pytest.mark.parametrize("batch", [1, 3])
def test_gradcheck(name, batch):
    changed = {"clamp": False, "out_of_range": "allow"}
    if isinstance(METHODS_HERE[name], GDMP):
        changed |= {"image_elements": 4, "guide_scale": METHODS_HERE[name].guide_scale * 4 / 192}  # the same pull
    purifier = Purifier(Score(1), method=dataclasses.replace(METHODS_HERE[name], **changed), engine="eager")
    x = (0.3 + 0.4 * images(batch, 1, 2)).requires_grad_()
    # Every derivative of one image; of three along one direction, which takes a twelfth of the runs.
    told = {"eps": 1e-7, "atol": 1e-6, "rtol": 1e-5, "fast_mode": batch > 1}
    assert torch.autograd.gradcheck(lambda x: purifier(x, seed=2), x, **told)


def test_engines_agree():
    """Of what is new: clipped images, steps that remember, x_in, a second noise, rows that ask nothing; in both dtypes."""
    coup = {"method": "coup", "num_steps": 4, "guidance_scale": 3.0}
    cases = [
        ("clipped", coup | {"solver": "ancestral", "clip_denoised": True}, "silu"),
        ("remembers", coup | {"solver": "dpm-solver++-2m", "clip_denoised": True}, "relu"),
        ("rounds", {"method": "multi-stage", "levels": (0.1, 0.3), "repeats": (1, 1), "num_steps": 2}, "silu"),
        ("gdmp", {"method": GDMP(rounds=1, noise_steps=4, guide_scale=1e5, guide_batch=1, image_elements=192)}, "silu"),
        ("consistency", {"method": OneStep(t=(0.5, 0.3), clip_denoised=True)}, "silu"),
    ]
    rows = list(check_engines(torch.device("cpu"), cases))
    wrong = [row for row in rows if row["status"] not in ("ok", "refused")]
    assert not wrong, wrong
    runs = {(row["engine"], row["dtype"]) for row in rows if row["status"] == "ok"}
    assert ("eager", "float64") in runs and ("eager", "float32") in runs


# --- what each of them is ---------------------------------------------------------------------------------------------------


class Zero(nn.Module):
    """No noise predicted."""

    def forward(self, x, labels):
        return 0.0 * x


TOLD: list[float] = []


class Labels(nn.Module):
    """Writes down what it is told."""

    def forward(self, x, labels):
        TOLD.append(labels[0].item())
        return 0.1 * x


def test_one_step_is_the_predicted_image():
    x, score = images(2), Score()
    purifier = Purifier(score, method=OneStep(t=0.2, clamp=False))
    z = torch.randn(2, *x.shape, dtype=torch.float64)
    alpha, sigma = float(VPSDE().alpha_bar(0.2)) ** 0.5, float(VPSDE().sigma(0.2))
    noised = alpha * (2 * x - 1) + sigma * z[0]
    image = (noised - sigma * score(noised, torch.full((2,), 199.8, dtype=torch.float64))) / alpha
    torch.testing.assert_close(2 * purifier(x, noise=z) - 1, image, rtol=1e-12, atol=1e-12)
    clipped = Purifier(score, method=OneStep(t=0.2, clamp=False, clip_denoised=True))
    torch.testing.assert_close(2 * clipped(x, noise=z) - 1, image.clamp(-1, 1), rtol=1e-12, atol=1e-12)
    assert (image.abs() > 1).any()


def test_langevin_tends_to_its_image():
    """Without score and noise: x − x_in shrinks by 1 − λh/(2σ²) a step; x_in is where it starts, so nothing moves."""
    x = images(2)
    still = Purifier(Zero().eval(), method=LangevinSDE(noise_scale=0.0))
    torch.testing.assert_close(still(x, seed=0), x, rtol=1e-12, atol=1e-12)
    table = LangevinSDE().recipe().table
    assert table.num_steps == 10 and set(table.labels) == {9.99}
    np.testing.assert_allclose(table.a, 0.95, rtol=1e-9)
    np.testing.assert_allclose(table.e, 0.05, rtol=1e-9)
    np.testing.assert_allclose(table.d, 0.05, rtol=1e-9)
    np.testing.assert_allclose(table.b, -0.5e-4 / float(VPSDE().sigma(0.01)), rtol=1e-9)


def test_what_networks_are_told():
    """GDMP: index i is t = (i + 1)/1000, 36 of them a round; multi-stage: a level's own steps."""
    x, told = images(1).float(), Labels().eval()
    purifier = Purifier(told, method=GDMP(rounds=2, image_elements=192), engine="eager")
    purifier(x, seed=0)
    np.testing.assert_allclose(TOLD[-72:], [999 * i / 1000 for i in range(36, 0, -1)] * 2, rtol=1e-6)
    purifier = Purifier(told, method=MultiStage(levels=(0.003, 0.002), repeats=(2, 1)), engine="eager")
    purifier(x, seed=0)
    np.testing.assert_allclose(TOLD[-8:], [999 * t for t in [0.003, 0.002, 0.001] * 2 + [0.002, 0.001]], rtol=1e-6)


def test_gdmp_as_published():
    method = GDMP()
    table = method.recipe().table
    assert (table.num_steps, method.score_evaluations, method.num_noises) == (148, 144, 296)
    beta = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
    alpha_bar = np.cumprod(1 - beta)
    row = table.row(0)
    np.testing.assert_allclose([row[0] ** 2, row[3] ** 2, *row[1:3], *row[4:]], [alpha_bar[36], 1 - alpha_bar[36], *[0] * 6])
    i, row = 30, table.row(6)  # after the noising, indices 35 … 0
    s = np.sqrt(1 - alpha_bar[i]) / ((2 * 8 / 255) / (3 * 60000) * np.sqrt(alpha_bar[i]))
    pull = 2 * beta[i] * s / (3072 * 100)
    np.testing.assert_allclose(row[0], 1 / np.sqrt(1 - beta[i]) - pull, rtol=1e-10)
    np.testing.assert_allclose(row[3], np.sqrt(beta[i]), rtol=1e-10)
    np.testing.assert_allclose(row[4:6], [pull * np.sqrt(alpha_bar[i]), pull * np.sqrt(1 - alpha_bar[i])], rtol=1e-10)
    assert table.row(36)[3] == 0.0 and table.row(35)[3] > 0.0
    # The factor of the batch is the method's, not that of the images that happen to run.
    strong = GDMP(guide_batch=1).recipe().table
    np.testing.assert_allclose(strong.e, 100 * table.e, rtol=1e-12)


def test_multi_stage_as_published():
    table = MultiStage().recipe().table
    assert table.num_steps == 4 * 31 + 2 * 51 + 2 * 126 and MultiStage().score_evaluations == 470
    assert MultiStage(num_steps=(1, 1, 5)).score_evaluations == 4 + 2 + 2 * 5
    assert MultiStage(num_steps=2).score_evaluations == 2 * (4 + 2 + 2)
    starts = [k for k in range(table.num_steps) if not table.evaluates(k)]
    np.testing.assert_allclose(table.t[1:][starts], [0.03] * 4 + [0.05] * 2 + [0.125] * 2)
    alpha_bar = np.cumprod(1 - (1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999))
    np.testing.assert_allclose(table.a[starts] ** 2, alpha_bar[[29] * 4 + [49] * 2 + [124] * 2], rtol=1e-10)


def test_tables_one_after_the_other():
    plain = CoefficientTable(np.array([0.2, 0.1]), *np.ones((4, 1)))
    clipped = dataclasses.replace(plain, m=np.ones(1), n=np.ones(1))
    assert one_after_the_other([plain, plain]).num_steps == 2
    with pytest.raises(ValueError, match="some of these tables clip"):
        one_after_the_other([plain, clipped])
    with pytest.raises(ValueError, match="columns m and n say together"):
        dataclasses.replace(plain, m=np.ones(1))
    with pytest.raises(ValueError, match="columns m and n say together"):
        dataclasses.replace(plain, m=np.ones(1), n=np.zeros(1))
    with pytest.raises(ValueError, match="column s is for what the next step reads"):
        dataclasses.replace(plain, s=np.ones(1))
    with pytest.raises(ValueError, match=r"column labels has shape \(2,\)"):
        dataclasses.replace(plain, labels=np.ones(2))
    told = dataclasses.replace(plain, labels=np.ones(1))
    assert len({table.sha256() for table in (plain, clipped, told)}) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "multi-stage", "repeats": (1,)}, ValueError, "3 `levels` need as many `repeats`, got 1"),
        ({"method": "multi-stage", "repeats": (1, 0, 1)}, ValueError, "`repeats` is at least 1, got 0"),
        ({"method": "multi-stage", "levels": ()}, ValueError, "`levels` is a sequence"),
        ({"method": "multi-stage", "levels": (0.1, 2.0, 0.1)}, ValueError, "`levels` is continuous time in .*, got 2.0"),
        ({"method": "ld-sde", "step_size": 0.0}, ValueError, "`step_size` is finite and above 0"),
        ({"method": "ld-sde", "pull_variance": float("inf")}, ValueError, "`pull_variance` is finite"),
        ({"method": "ld-sde", "noise_scale": "5"}, TypeError, "`noise_scale` is a number"),
        ({"method": "ld-sde", "sde": (0.1, 20)}, TypeError, "`sde` is a coupfast.VPSDE, got tuple"),
        ({"method": "one-step", "sde": "0.1,20"}, TypeError, "`sde` is a coupfast.VPSDE, got str"),
        ({"method": "one-step", "t": ()}, ValueError, "`t` is a time or several that fall"),
        ({"method": "one-step", "t": 0.0}, ValueError, r"`t` is continuous time in \(1e-5, 1\], got 0.0"),
        ({"method": "ld-sde", "rate": -1.0}, ValueError, "`rate` is finite and above 0"),
        ({"method": "gdmp", "rounds": 0}, ValueError, "`rounds` is at least 1, got 0"),
        ({"method": "gdmp", "guide_batch": 1.5}, TypeError, "`guide_batch` is an int"),
        ({"method": "gdmp", "noise_steps": 1001}, ValueError, "`noise_steps` is at least 2 and at most 1000"),
        ({"method": "gdmp", "guide_radius": 0.0}, ValueError, "`guide_radius` is finite and above 0"),
        ({"method": "gdmp", "gradient": "surrogate"}, ValueError, "GDMP has no coarser grid"),
        ({"method": "one-step", "gradient": "surrogate"}, ValueError, "OneStep has no coarser grid"),
        ({"method": "ld-sde", "score_time": 2}, ValueError, r"`score_time` is continuous time in \(1e-5, 1\], got 2"),
        ({"method": "ld-sde", "pull_variance": 1e-5}, ValueError, "goes 5 times the way .*take a smaller `step_size`"),
        ({"method": "lm-coup"}, ValueError, "needs `classifier`; without one use 'lm'"),
        ({"method": "coup"}, ValueError, "needs `classifier`; without one use 'reverse-sde'"),
        ({"method": "one-step", "c_skip": 1.0}, ValueError, "`c_skip` and `c_out` belong together"),
        ({"method": "one-step", "c_skip": 1.0, "c_out": 0.0}, ValueError, "`c_out` is 0 at t = 0.1"),
        ({"method": "one-step", "c_skip": 1.0, "c_out": "word"}, ValueError, "`c_out` is a number, a function of t"),
        ({"method": "one-step", "t": (0.1, 0.2)}, ValueError, "`t` is a time or several that fall"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        Purifier(Score(), **options)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"method": "one-step", "t": (0.2, 0.1)}, 2),
        ({"method": "denoised-smoothing"}, 1),
        ({"method": "multi-stage", "levels": (0.1,), "repeats": (3,), "num_steps": 4}, 12),
        ({"method": "gdmp", "rounds": 2, "noise_steps": 5, "image_elements": 192}, 8),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("budget", ["least", "activations"])
def test_a_plan_counts_what_networks_are_asked(options, asked, budget):
    """Rows that add noise ask for nothing, in either direction."""
    calls = []

    class Counted(Score):
        def forward(self, x, labels):
            calls.append(1)
            return super().forward(x, labels)

    purifier = Purifier(Counted(), memory_budget=2**30 if budget == "activations" else "least", engine="eager", **options)
    x = images(2).requires_grad_()
    plan = purifier.plan(2, image_shape=tuple(x.shape[1:]))
    purifier(x, seed=0).sum().backward()
    calls.clear()
    purifier(x, seed=0).sum().backward()
    assert purifier.settings.method.score_evaluations == asked
    assert len(calls) == asked * (2 if budget == "least" else 1)
    assert plan.evaluations == {"score forward": len(calls), "score backward": asked}


def test_gdmp_needs_its_size():
    with pytest.raises(ValueError, match=r"`image_elements` = 3072, and images of shape \(3, 8, 8\) have 192"):
        Purifier(Score(), method="gdmp")(images(1), seed=0)


KEPT = [
    Settings.of(method="diffpure", solver="ddim", eta=0.5, grid="log-snr", num_steps=7),
    Settings.of(method="coup", solver=DDIM(clip_denoised=True)),
    Settings.of(method="multi-stage", solver="dpm-solver++-2m", lower_order_final=False, levels=(0.1,), repeats=(3,)),
    Settings.of(method="gdmp", rounds=2),
    Settings.of(method="ld-sde"),
    Settings.of(method="one-step", t=(0.2, 0.1), clip_denoised=True),
]


@pytest.mark.parametrize("settings", KEPT, ids=lambda settings: settings.method.name)
def test_settings_come_back(settings):
    kept = json.loads(json.dumps(settings.to_dict()))
    assert Settings.from_dict(kept) == settings
    assert type(Settings.from_dict(kept).method.__dict__.get("sde")) is type(settings.method.__dict__.get("sde"))


def test_knobs_of_solvers_are_options():
    changed = Settings.of(KEPT[0], eta=1.0)
    assert changed.method.solver == DDIM(eta=1.0) and changed.method.grid == "log-snr"
    assert Settings.of(KEPT[0], method="coup").method == COUP(solver=DDIM(eta=0.5), grid="log-snr", num_steps=7)
    assert Settings.of(KEPT[0], solver="ancestral").method.solver.name == "ancestral"
    assert Settings.of(method=DiffPure(solver=DDIM()), eta=0.25).method.solver == DDIM(eta=0.25)
    with pytest.warns(UserWarning, match="method 'gdmp'.* no option `eta`: it changes nothing; solver 'ddim' has it"):
        Settings.of(method="gdmp", eta=0.5)


def test_tables_list_them():
    solvers = {row.split("`")[1]: row for row in solvers_table().splitlines()[2:]}
    assert solvers.keys() == SOLVERS.keys() and all("arXiv:" in row for row in solvers.values())
    for name, method in METHODS.items():
        assert issubclass(method, Method) and method.reference and f"`{name}`" in methods_table()
        if issubclass(method, TableMethod):
            assert method().score_evaluations >= 1
