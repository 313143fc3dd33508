"""Figures and tables of the pages, read from `bench/results/` when the site is built, so that no figure is typed twice.

A page says `{{ name(...) }}`, Jinja's notation, with one of the names in `CONTEXT`. `python docs/_ext/figures.py` prints
the table that the README has a copy of.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
sys.path[:0] = [str(ROOT / "bench")]

import fit_algorithms  # noqa: E402  of bench/
from solvers import REFERENCE, SHARES  # noqa: E402  bench/solvers.py: the baseline and the ODEs
from tables import lines  # noqa: E402  bench/tables.py, as the benchmarks print theirs
from verdict import interval as interval_of  # noqa: E402  bench/verdict.py: what is compared with `rand`

from coupfast.experiments import announced  # noqa: E402
from coupfast.experiments.defenses import NAMES  # noqa: E402

Row = dict[str, Any]

_SOLVER_STUDY = "solvers-tiny-epyc-zen4.json"


@functools.cache
def results(name: str) -> Any:
    """A result file of JSON."""
    return json.loads((RESULTS / name).read_text())


def row(name: str, /, **wanted: Any) -> Row:
    """The one row of a result file that has these values.

    Raises:
        LookupError: if there is none, or several.
    """
    found = [each for each in results(name)["rows"] if all(each.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{name} has {len(found)} rows with {wanted}")
    return dict(found[0])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(lines([head, *rows], markdown=True))


def table(name: str, section: str | None = None) -> str:
    """A table of a result file that is Markdown: the first one, or the first one below a heading."""
    text = (RESULTS / name).read_text()
    if section is not None:
        _, found, text = text.partition(f"\n## {section}\n")
        if not found:
            raise LookupError(f"{name} has no section {section!r}")
    match = re.search(r"(?:^\|.*\n)+", text, re.M)
    if match is None:
        raise LookupError(f"{name} has no table{f' below {section!r}' if section else ''}")
    return match[0].rstrip()


# --- how figures are written ------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def small(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value < 0.01 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def size(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.0f} to {100 * bounds[1]:.0f} %"


def bold(text: str, really: bool = True) -> str:
    return f"**{text}**" if really and text else text


def source(name: str) -> str:
    """The file behind a table, as a link from a page, all of which lie one folder deep."""
    return f"{{download}}`{name} <../../bench/results/{name}>`"


# --- tables -----------------------------------------------------------------------------------------------------------

SPEED = (
    ("COUP, all 100 steps, not scaled", "speed-paper-b1-full-epyc-zen3.json", "coup"),
    *((NAMES[method], "speed-paper-b1-epyc-zen3.json", method) for method in ("coup", "reverse-sde", "diffpure")),
    ("COUP, batch 8", "speed-paper-b8-epyc-zen3.json", "coup"),
    ("COUP, batch 32", "speed-paper-b32-epyc-zen3.json", "coup"),
    ("COUP, the shipped small networks, all 100 steps", "speed-tiny-b1-epyc-zen3.json", "coup"),
    ("the same, batch 20, scaled from 10 steps", "speed-tiny-b20-epyc-zen3.json", "coup"),
    ("the same, batch 256, scaled from 1 step", "speed-tiny-b256-epyc-zen3.json", "coup"),
)


def speed() -> str:
    """Seconds of a purification, by engine."""
    body = []
    for label, name, method in SPEED:
        found = {each["engine"]: each for each in results(name)["rows"] if each["method"] == method}
        cpu = found["cpu"]
        body.append(
            [
                label,
                *(seconds(found[engine]["seconds_per_image"]) if engine in found else "" for engine in ("reference", "eager")),
                bold(seconds(cpu["seconds_per_image"])),
                bold(times(cpu["ratio_to_reference"])),
                bold(times(cpu["ratio_to_eager"])),
                source(name),
            ]
        )
    return markdown(
        ["seconds per image", "as published", "eager", "cpu", "published ÷ cpu", "eager ÷ cpu", "measured in"], body
    )


def speed_avx512() -> str:
    """COUP's steps on the cpu engine with AVX-512, beside eager PyTorch."""
    body = []
    for run in ("paper-b1", "paper-b8", "tiny-b1", "tiny-b20", "tiny-b256"):
        name = f"speed-{run}-epyc-zen4.json"
        eager, cpu = (row(name, engine=engine) for engine in ("eager", "cpu"))
        label = f"{'small' if 'tiny' in run else 'paper'}, batch {cpu['batch']}"
        cells = [seconds(each["seconds_per_image"]) for each in (eager, cpu)]
        body.append([label, *cells, times(cpu["ratio_to_eager"]), str(cpu["steps_timed"]), source(name)])
    return markdown(["networks", "eager, s an image", "cpu, s an image", "eager ÷ cpu", "steps timed", "measured in"], body)


def speed_error() -> str:
    """The largest error of the cpu engine in the rows of `speed`, as a multiple of eager's in the same row."""
    found = [row(name, engine="cpu", method=method) for _, name, method in SPEED]
    return times(max(each["error_float64"] / each["error_float64_eager"] for each in found))


MODES = {
    "published": "as published: `sdeint_adjoint`, nothing frozen",
    "frozen": "the same, networks frozen, `adjoint_params=()`",
    "back-propagation": "back-propagation through every step, float32",
    "double-backward": "one step rebuilt at a time, double backward",
    "exact": "**coupfast, exact**",
    "detached": "coupfast, guidance detached",
}


def gradient_times() -> str:
    name = "gradient-paper-b1-epyc-zen3.json"
    body = []
    for mode, label in MODES.items():
        found = row(name, mode=mode)
        cells = [seconds(found["seconds_per_image"]), times(found["ratio_to_published"]), size(found["peak_bytes"])]
        body.append([label, *(bold(cell, mode == "exact") for cell in cells)])
    return markdown(
        ["forward and backward", "seconds per image, scaled from 2 steps", "times faster than published", "peak memory"], body
    )


def gradient_engines() -> str:
    name = "gradient-paper-b1-cpu-engine-epyc-zen3.json"
    body = []
    for mode, engine in (("published", "torchsde"), ("frozen", "torchsde"), ("exact", "eager"), ("exact", "cpu")):
        found = row(name, mode=mode, engine=engine)
        ours = engine == "cpu"
        body.append(
            [
                f"{MODES[mode].strip('*')}{f', engine {engine}' if mode == 'exact' else ''}",
                bold(seconds(found["seconds_per_image"]), ours),
                bold(times(found["ratio_to_published"]), ours),
                bold(times(found["ratio_to_frozen"]), ours),
            ]
        )
    return markdown(
        ["forward and backward", "seconds per image, scaled from 2 steps", "× published", "× published, frozen"], body
    )


def gradient_errors() -> str:
    name = "gradient-tiny-b1-epyc-zen3.json"
    body = []
    for mode in ("published", "frozen", "back-propagation", "exact", "detached"):
        found = row(name, mode=mode)
        cells = [
            small(found["rel_error"]),
            f"{found['cosine']:.3f}" if found["cosine"] < 0.9999 else f"{found['cosine']:.6f}",
            percent(found["sign_agreement"]),
            size(found["peak_bytes"]),
        ]
        body.append([MODES[mode], *(bold(cell, mode == "exact") for cell in cells)])
    return markdown(["gradient", "relative error", "cosine", "equal signs", "peak memory"], body)


def adjoint_errors() -> str:
    """How wrong torchsde's adjoint is, by its steps."""
    body = []

    def add(found: Row, label: str, errors: Row, after: Row | None) -> None:
        body.append(
            [
                f"{found['t']:.2g}",
                label,
                f"{found['stiffness']:.2g}" if found["stiffness"] < 100 else f"{found['stiffness']:.0f}",
                f"{errors['cosine']:.3f}",
                f"{errors['rel_error']:.3g}",
                percent(errors["sign_agreement"]),
                "" if after is None else f"{after['cosine']:.3f}",
            ]
        )

    for found in results("adjoint_error.json")["rows"].values():
        if "walked_back" in found:  # published code itself, which another row's numbers stand for
            continue
        end = f", ending at t = {found['t_end']:.0e}".replace("e-0", "e-") if found["steps"] == "cut" else ""
        steps = "equal ones" if found["steps"] == "equal" else "of 1e-3"
        after = found.get("after_first_step")
        add(found, f"{found['num_steps']} {steps}{end}", found, after)
        if "shifted" in found:
            add(found, f"as published: {found['num_steps']} of 1e-3 on a shifted grid", found["shifted"], None)
    head = ["t", "steps", "h β/σ² of the first backward step", "cosine", "relative error", "equal signs"]
    return markdown([*head, "cosine, that step taken exactly"], body)


def kept() -> str:
    """What keeping activations is worth."""
    body = []
    for label, name in (
        ("the paper's networks, batch 1, scaled from 1 step", "gradient-paper-b1-kept-zen4.json"),
        ("the same, batch 8, scaled from 1 step", "gradient-paper-b8-kept-zen4.json"),
        ("the shipped small networks, batch 1, scaled from 10 steps", "gradient-tiny-b1-kept-zen4.json"),
        ("the same, batch 20, scaled from 2 steps", "gradient-tiny-b20-kept-zen4.json"),
        ("the same, batch 256, scaled from 1 step", "gradient-tiny-b256-kept-zen4.json"),
    ):
        none, all_ = (row(name, engine="cpu", memory_budget=budget) for budget in ("least", "activations"))
        cells = [
            times(none["seconds_per_image"] / all_["seconds_per_image"]),
            f"{none['ratio_to_eager_engine']:.2f}",
            f"{all_['ratio_to_eager_engine']:.2f}",
        ]
        body.append([label, *cells, source(name)])
    head = ["exact gradient", "cpu that keeps none ÷ cpu that keeps all", "eager ÷ cpu, neither keeps"]
    return markdown([*head, "eager ÷ cpu, both keep", "measured in"], body)


PEERS = "peers-paper-epyc-zen3.json"


def fastest_peer(batch: int) -> Row:
    """The other runtime that comes nearest to the cpu engine, by ratios within pairs."""
    others = (row(PEERS, batch=batch, runtime=runtime) for runtime in ("OpenVINO", "ONNX Runtime"))
    return max(others, key=lambda each: each["ratio_to_engine"])


def peers() -> str:
    body = []
    for batch in (1, 8):
        found = {each["runtime"]: each for each in results(PEERS)["rows"] if each["batch"] == batch}
        cells = [times(found[runtime]["ratio_to_eager"]) for runtime in ("OpenVINO", "ONNX Runtime", "cpu engine")]
        body.append([f"batch {batch}", *cells[:2], bold(cells[2]), bold(times(1 / fastest_peer(batch)["ratio_to_engine"]))])
    return markdown(["× eager PyTorch", "OpenVINO", "ONNX Runtime", "cpu engine", "cpu engine × the faster of both"], body)


def autoattack() -> str:
    """Seconds of one attack with the published gradient and with ours."""
    body = []
    for label, name in (
        ("the shipped small networks, t = 0.06, all 60 steps, 4 images, 3 iterations", "autoattack-tiny-epyc-zen3.json"),
        ("the paper's networks, t = 0.1, 1 image, 10 iterations, scaled", "autoattack-paper-epyc-zen3.json"),
    ):
        published, eager, cpu = (row(name, engine=engine) for engine in ("torchsde", "eager", "cpu"))
        body.append(
            [
                label,
                *(seconds(found["seconds"]) for found in (published, eager)),
                bold(seconds(cpu["seconds"])),
                bold(times(cpu["ratio_to_published"])),
                source(name),
            ]
        )
    return markdown(["seconds", "as published", "exact, eager", "exact, cpu", "published ÷ cpu", "measured in"], body)


def attack_gradients() -> str:
    """What each gradient is worth to an attack."""
    found = results("attack_gradients.json")
    n, draws = found["settings"]["images"], found["settings"]["judging_draws"]
    paired = {each["mode"]: each["one_draw"] for each in found["paired"]}
    body = []
    for each in found["rows"]:
        against = paired.get(each["mode"])
        body.append(
            [
                "as published (adjoint in 60 steps, guidance detached)" if each["mode"] == "published" else each["mode"],
                f"{each['one_draw']}/{n} ({interval(each['wilson_95'])})",
                percent(each["mean"]),
                f"{each['worst_of_draws']}/{n}",
                "" if against is None else f"{against['only_mode']} / {against['only_exact']}, {against['p']:.2g}",
            ]
        )
    head = ["the attacker follows", "correct, one draw (95 % interval)", f"average of {draws} draws", f"worst of {draws} draws"]
    return markdown([*head, "against exact: right in it only / in exact only, p"], body)


def solvers() -> str:
    """Distance from the solver's own limit on Gaussian data, equal steps of time."""
    found = [each for each in results("solvers-gaussian.json")["gaussian"] if each["grid"] == "time"]
    steps = sorted({each["steps"] for each in found})
    body = []
    for solver in dict.fromkeys(each["solver"] for each in found):
        by_steps = {each["steps"]: each["wasserstein"] for each in found if each["solver"] == solver}
        body.append([_solver_name(solver), *(f"{by_steps[count]:.1e}".replace("e-0", "e-") for count in steps)])
    return markdown(["solver", *(f"{count} steps" for count in steps)], body)


def solver_distances() -> str:
    """How far from the law of the reference few steps are on images."""
    found = results(_SOLVER_STUDY)
    steps = {method: _solver_steps(method) for method in found["settings"]["methods"]}
    body = []
    for solver in dict.fromkeys(each["solver"] for each in found["rows"]):
        rows = [_solver_row(method, solver, count) for method, counts in steps.items() for count in counts]
        body.append([_solver_name(solver), *("–" if each is None else f"{each['energy_distance']:.3f}" for each in rows)])
    halves = [f"{found['floor'][method]['energy_distance']:.3f}" for method, counts in steps.items() for _ in counts]
    head = ["solver", *(f"{NAMES[method]}, {count}" for method, counts in steps.items() for count in counts)]
    return markdown(head, [*body, ["the reference's halves", *halves]])


def solver_accuracies(method: str, name: str = "exact") -> str:
    """What few steps leave right, in bold where it is told apart from the baseline."""
    body = []
    for solver in dict.fromkeys(each["solver"] for each in results(_SOLVER_STUDY)["rows"]):
        cells = []
        for count in _solver_steps(method):
            if (found := _solver_row(method, solver, count)) is None:
                cells.append("–")
                continue
            ends = ", ".join(f"{end:.0f}" for end in found[f"{name}_95"])
            cells.append(bold(f"{found[name]:.1f} [{ends}]", found[f"{name}_difference_p"] <= announced.LEVEL))
        body.append([_solver_name(solver), *cells])
    return markdown([NAMES[method], *(f"{count} steps" for count in _solver_steps(method))], body)


def solver_share(name: str, method: str, solver: str, steps: int) -> str:
    """One of the study's figures."""
    if (found := _solver_row(method, solver, steps)) is None:
        raise LookupError(f"the solver study has no {solver} of {method} in {steps} steps")
    if name.endswith("_p"):
        return f"{found[name]:.2g}"
    said = {"energy_distance": f"{found[name]:.3f}", "cpu_seconds_an_image": f"{found[name]:.3f} s"}
    return said.get(name, f"{found[name]:.1f} %")


def solver_least_p(name: str = "exact") -> str:
    """Of all comparisons with the baseline, after Holm's correction over them."""
    rows = results(_SOLVER_STUDY)["rows"]
    others = [row for row in rows if (row["solver"], row["steps"]) != (REFERENCE, row["baseline_steps"])]
    return f"{min(announced.holm({i: row[f'{name}_difference_p'] for i, row in enumerate(others)}).values()):.2g}"


def solver_baseline() -> str:
    """Steps of Euler-Maruyama that accuracies are paired with."""
    (steps,) = {each["baseline_steps"] for each in results(_SOLVER_STUDY)["rows"]}
    return str(steps)


def _solver_steps(method: str) -> list[int]:
    return sorted({each["steps"] for each in results(_SOLVER_STUDY)["rows"] if each["method"] == method})


def _solver_row(method: str, solver: str, steps: int) -> Row | None:
    wanted = (method, solver, steps)
    return next((r for r in results(_SOLVER_STUDY)["rows"] if (r["method"], r["solver"], r["steps"]) == wanted), None)


def _solver_name(solver: str) -> str:
    return f"`{solver}`{' (ODE)' if solver in SHARES else ''}"


def winograd() -> str:
    found = results("winograd-points.json")["relative_error"]
    direct = found["direct sum, one run"]
    return markdown(
        [f"one layer, {results('winograd-points.json')['channels']} channels, against float64", "relative error", "× direct"],
        [
            [label.replace("4x4", "4 × 4"), f"{error:.1e}".replace("e-0", "e-"), f"{error / direct:.2g}"]
            for label, error in found.items()
        ],
    )


def layers(*names: str) -> str:
    """Single convolutions: times faster than the faster of PyTorch's, the algorithm, its share of a matrix product's rate."""
    columns = [results(name)["rows"] for name in names]
    body = []
    for each in columns[0]:
        if each["kind"] != "layer" or not each["chosen"]:
            continue
        key = {k: each[k] for k in ("network", "direction", "layer")}
        cells = []
        for rows in columns:
            other = next(r for r in rows if r["kind"] == "layer" and r["chosen"] and all(r[k] == v for k, v in key.items()))
            faster = min(other["ratio_to_eager"], other["ratio_to_channels_last"])
            algorithm = {"F2": "F(2 × 2)", "F4": "F(4 × 4)"}.get(other["algorithm"], other["algorithm"])
            cells.append(f"{faster:.2f} ({algorithm}, {percent(other['share_of_sgemm'], 0)})")
        body.append([each["network"], each["layer"].replace("x", " × ").replace("->", "→"), each["direction"], *cells])
    batches = [rows[0]["batch"] for rows in columns]
    heads = ["AVX2" if "avx2" in name else "AVX-512" for name in names]
    if len(set(batches)) > 1:
        heads = [f"batch {batch}" for batch in batches]
    return markdown(["network", "convolution", "pass", *heads], body)


def slower(name: str) -> dict[str, str]:
    """How many convolutions of a file are slower than the faster of PyTorch's, of how many, and the least ratio."""
    ratios = [
        min(each["ratio_to_eager"], each["ratio_to_channels_last"])
        for each in results(name)["rows"]
        if each["kind"] == "layer" and each["chosen"]
    ]
    return {"count": str(sum(r < 1 for r in ratios)), "all": str(len(ratios)), "least": f"{min(ratios):.2f}"}


def lost_by_choosing() -> str:
    """What choosing convolutions by the formula loses against the best choice for each."""
    rows = [json.loads(line) for line in (RESULTS / "algorithms-epyc-zen4.jsonl").read_text().splitlines()]
    lost, _ = fit_algorithms.losses([each for each in rows if "F4" in each["microseconds"]])
    return percent(lost)


SIGNAL = "gradient-signal-epyc-zen4.json"


def gradient_signal() -> str:
    """Signal to noise of the gradients that attacks follow, for the work that they take."""
    body = []
    for each in results(SIGNAL)["rows"]:
        low, _, high = statistics.quantiles(each["each_signal_to_noise"], n=4)
        cells = [str(each["work"]), f"{each['signal_to_noise']:.2f} ({low:.2f} to {high:.2f})"]
        cells += [f"{each['per_1000']:.1f}", f"{each['cosine']:.2f}" if each["gradient"] != "exact" else ""]
        cells += [f"{each[name]:.1f}" for name in ("fresh", "common")]
        body.append([NAMES[each["defense"]], f"`{each['gradient']}`", *cells])
    signal = ["signal ÷ noise (quartiles)", "for 1000 image-steps"]
    return markdown(["defense", "gradient", "image-steps", *signal, "cosine", "new draws", "kept draws"], body)


def signal_against(gradient: str, name: str = SIGNAL) -> dict[str, str]:
    """Of a gradient beside the exact one, over the defenses: its signal to noise for the same work, and its cosine."""
    rows = {(each["defense"], each["gradient"]): each for each in results(name)["rows"]}
    pairs = [(rows[defense, gradient], rows[defense, "exact"]) for defense, kind in rows if kind == gradient]
    ratios, cosines = [one["per_1000"] / exact["per_1000"] for one, exact in pairs], [one["cosine"] for one, _ in pairs]
    found = (("times", ratios), ("cosines", cosines))
    return {what: f"{min(values):.2f} to {max(values):.2f}" for what, values in found}


def kept_draws() -> dict[str, str]:
    """In how many rows kept draws give more signal to noise than new ones, of how many, and between which shares of theirs."""
    shares = [each["common"] / each["fresh"] for each in results(SIGNAL)["rows"]]
    more = sum(share > 1 for share in shares)
    return {"more": str(more or "none"), "all": str(len(shares)), "shares": f"{min(shares):.2f} to {max(shares):.2f}"}


VERDICT = "verdict-100-epyc-zen4.json"


def verdict(name: str = VERDICT, *, beside: str = "") -> str:
    """What each attack found, and its work as a share of `rand`'s, which may be in another file."""
    rows, sizes = results(name)["rows"], results(name)["settings"]["sizes"]
    reference = {each["defense"]: each for each in results(beside or name)["rows"] if each["curve"] == "rand"}
    body = []
    for each in rows:
        full = reference[each["defense"]]
        whole = sizes * each["share"] == 1
        label = each["curve"] if whole else f"{each['curve']}, {each['attack']['iterations']} iterations"
        cells = [f"{each['image_steps'] / full['image_steps']:.3f}"]
        for protocol in ("official", "average", "worst", "majority"):
            found = each["robust"][protocol]
            cells.append(f"{percent(found['value'])} ({interval(interval_of(found))})")
        body.append([NAMES[each["defense"]], label, *cells])
    return markdown(["defense", "attack", "image-steps", "official", "average", "worst of ten", "majority"], body)


def verdict_against(curve: str, share: float = 1) -> dict[str, str]:
    """Of an attack at a share of its largest size beside `rand`: its share of the image-steps, and by how many points of the
    average it leaves more.
    """
    at = {(each["defense"], each["curve"], each["share"]): each for each in results(VERDICT)["rows"]}
    pairs = [(at[defense, curve, share], at[defense, "rand", 1]) for defense in dict.fromkeys(defense for defense, *_ in at)]
    shares = [one["image_steps"] / rand["image_steps"] for one, rand in pairs]
    points = [100 * (one["robust"]["average"]["value"] - rand["robust"]["average"]["value"]) for one, rand in pairs]
    return {
        "shares": f"{min(shares):.2f} to {max(shares):.2f}",
        "points": f"{min(points):+.1f} to {max(points):+.1f}".replace("-", "−"),
    }


def verdict_goal(name: str = VERDICT) -> str:
    """On each defense the cheapest attack that leaves no more than the upper ends of `rand`'s intervals, its share, and by
    which counts it leaves no more than `rand` itself.
    """
    found = [
        f"{NAMES[each['defense']]} {each['ratio']:.3f} ({each['curve']}, {each['attack']['iterations']} iterations; no more "
        f"than `rand` itself by {', '.join(each['lower_or_equal_in_value']) or 'none'})"
        for each in results(name)["goal"]
    ]
    return "; ".join(found)


def verdict_growing(name: str) -> dict[str, str]:
    """Of `pgd-eot` with few draws early, in twice the iterations of one with all draws always: its share of the image-steps,
    and by how many points of the average it leaves more, by defense.
    """
    at = {(each["defense"], each["curve"], each["share"]): each for each in results(name)["rows"]}
    of = list(dict.fromkeys(defense for defense, _, _ in at))
    pairs = [(at[each, "pgd-eot, growing", 0.1], at[each, "pgd-eot, fast", 0.05]) for each in of]
    shares = [one["image_steps"] / other["image_steps"] for one, other in pairs]
    points = [100 * (one["robust"]["average"]["value"] - other["robust"]["average"]["value"]) for one, other in pairs]
    told = ", ".join(f"{NAMES[each]} {value:+.1f}".replace("-", "−") for each, value in zip(of, points, strict=True))
    return {"shares": f"{min(shares):.2f} to {max(shares):.2f}", "points": told}


def verdict_averages(name: str) -> str:
    """Of every run the average and the image-steps, in words."""
    return ", and ".join(
        f"“{each['curve']}” leaves {percent(each['robust']['average']['value'])} by the average in {each['image_steps']:,} "
        "image-steps"
        for each in results(name)["rows"]
    )


def verdict_pace(name: str, *, stage: str = "") -> float:
    """Image-steps in a second of work, of a file's only run or one of its stages."""
    (found,) = results(name)["rows"]
    if stage:
        (found,) = (each for each in found["stages"] if each["name"] == stage)
    return float(found["image_steps"] / found["seconds"])


def verdict_stages(curve: str) -> str:
    """How many images each stage of an attack was left, and how many stand by the official verdict at the end."""
    rows = [each for each in results(VERDICT)["rows"] if each["curve"] == curve and each["share"] == 1]
    names = [stage["name"] for stage in rows[0]["stages"]]
    body = []
    for each in rows:
        images = [f"{stage['images']}" for stage in each["stages"]]
        standing = each["robust"]["official"]["value"] * each["images"]
        body.append([NAMES[each["defense"]], *images, f"{standing:.0f}"])
    return markdown(["defense", *(f"attacked by {name}" for name in names), "still standing"], body)


def study(title: str) -> str:
    """One of the tables of `coupfast reproduce study`."""
    (found,) = [each for each in results("study.json")["study"]["tables"] if each["title"] == title]
    return markdown(found["header"], found["rows"])


def study_headline() -> str:
    return str(results("study.json")["study"]["headline"])


LAYERS = tuple(
    f"layers-{run}-epyc-zen4.json"
    for run in ("tiny-b1", "tiny-b8", "tiny-b20", "tiny-b20-t1", "tiny-b20-avx2", "tiny-b64", "paper-b1", "paper-b8")
)


def whole_networks() -> str:
    """Of every run of `bench/layers.py`: whole networks, times faster than eager PyTorch, and how many layers are slower."""
    body = []
    for name in LAYERS:
        rows = [each for each in results(name)["rows"] if each["kind"] == "network"]
        first, found = rows[0], slower(name)
        label = f"{'small' if 'tiny' in name else 'paper'}, batch {first['batch']}"
        cells = ["AVX2" if "avx2" in name else "AVX-512", str(first["threads"])]
        body.append([label, *cells, *(f"{each['ratio_to_eager']:.2f}" for each in rows)])
        body[-1] += [f"{found['count']} of {found['all']}", found["least"], source(name)]
    networks = ["score, forward", "with vjp", "classifier, forward", "with vjp"]
    return markdown(["networks", "kernels", "threads", *networks, "slower alone", "the least", "measured in"], body)


def worst_error(name: str) -> str:
    """The largest error of a chosen convolution in units of eager's on the same images."""
    rows = [each for each in results(name)["rows"] if each["kind"] == "layer" and each["chosen"]]
    return f"{max(each['relative_error'] / each['relative_error_eager'] for each in rows):.1f}"


def step_shares(*names: str) -> str:
    """What a step of COUP and its transpose spend their time on, by kernel."""
    columns = [(each["shares"], name) for name in names for each in results(name)["rows"]]
    parts = dict.fromkeys(part for shares, _ in columns for part in shares)
    body = [[part, *(percent(shares.get(part, 0.0)) for shares, _ in columns)] for part in parts]
    networks = {name: "small" if "tiny" in name else "paper" for name in names}
    heads = [f"{networks[name]}, batch {each['batch']}, {each['step']}" for name in names for each in results(name)["rows"]]
    return markdown(["part", *heads], body)


def winograd_gap(steps: str, convolutions: str) -> float:
    """The part of a step and its transpose that F(4 × 4) spends on running below the rate of a matrix product."""
    rows = [each for each in results(convolutions)["rows"] if each["kind"] == "layer" and each["algorithm"] == "F4"]
    spent = sum(each["seconds"] * each["count"] for each in rows if each["chosen"])
    needed = sum(each["seconds"] * each["count"] * each["share_of_sgemm"] for each in rows if each["chosen"])
    whole = sum(each["seconds"] for each in results(steps)["rows"])
    tiles = sum(each["seconds"] * each["shares"]["F(4x4)"] for each in results(steps)["rows"])
    return float(tiles / whole * (1 - needed / spent))


def workers() -> str:
    name = "workers-epyc-zen4.json"
    found = results(name)
    body = [
        [
            f"{each['workers']} × {each['threads']}",
            *(seconds(each[name]) for name in ("seconds", "work_seconds")),
            size(each["peak_bytes"]),
        ]
        for each in found["rows"]
    ]
    return markdown(["workers × threads", "seconds", "in the units", "memory of all"], body)


def oversubscribed() -> str:
    """What another busy process costs."""
    labels = {"threads": "a thread for each core", "passive": "the same, `OMP_WAIT_POLICY=passive`"}
    labels["one less"] = "a core left to it"
    body = [
        [labels[each["name"]], *(times(each[work]["ratio"]) for work in ("forward", "gradient"))]
        for each in results("oversubscribed-epyc-zen4.json")["rows"]
    ]
    return markdown(["COUP, small networks", "forward, times as long", "with its gradient"], body)


def guided_step_cpu() -> str:
    name = "cpu-guided-step-epyc-zen3.json"
    body = []
    for batch in (1, 8):
        for layout in ("contiguous", "channels_last"):
            ref, call, among = (
                row(name, name=f"test_cpu_guided_step[cpu-{batch}-forward-{layout}-{kind}]")["min_us"]
                for kind in ("ref", "call", "structure")
            )
            label = f"{batch}, {layout.replace('_', '-')}"
            body.append([label, f"{ref:.0f} µs", f"{call:.0f} µs", f"{among:.1f} µs", f"{ref / among:.0f}"])
    head = ["batch, format", "noise and step, eager", "`guided_step_cpu`", "among a program's operations"]
    return markdown([*head, "eager ÷ operations"], body)


def _kernel_medians() -> dict[str, dict[str, float]]:
    """Microseconds of "kernel", "definition" and "pytorch" by case."""
    medians: dict[str, dict[str, float]] = {}
    for each in results("kernels-epyc-zen4.json")["benchmarks"]:
        *case, kind, _ = each["name"].removeprefix("test_kernel[").removesuffix("]").replace(", fused", "").split(", ")
        medians.setdefault(", ".join(case).replace("_cpu", ""), {})[kind] = 1e6 * each["stats"]["median"]
    return medians


def absent_columns() -> dict[str, str]:
    """Microseconds of the guided step with four columns, before and after there were eight: from the least to the most."""
    found = {when: results("absent-columns-epyc-zen4.json")[when]["microseconds"] for when in ("before", "after")}
    return {when: f"{min(those):.0f} to {max(those):.0f}" for when, those in found.items()}


def kernel_times() -> str:
    """Attention, norms, sums and masks of the CPU engine beside their definitions, and PyTorch's own where it has one."""
    body = []
    for case, found in _kernel_medians().items():
        others = [f"{found[kind]:.0f} µs" if kind in found else "" for kind in ("definition", "pytorch")]
        ratios = [times(found[kind] / found["kernel"]) if kind in found else "" for kind in ("definition", "pytorch")]
        body.append([case, *others, f"{found['kernel']:.0f} µs", *ratios])
    return markdown(["operation", "definition", "PyTorch's own", "kernel", "definition ÷ kernel", "PyTorch's ÷ kernel"], body)


def slower_kernels() -> dict[str, str]:
    """In how many rows of `kernel_times` PyTorch's own operation is the faster one, of how many that have one."""
    medians = _kernel_medians().values()
    faster = [found["pytorch"] < found["kernel"] for found in medians if "pytorch" in found]
    return {"count": str(sum(faster)), "all": str(len(faster))}


def files() -> str:
    """Every result file of JSON: what ran on what."""
    body = []
    for path in sorted(RESULTS.glob("*.json")):
        found = results(path.name)
        environment = found.get("environment") if isinstance(found, dict) else None
        if not environment:  # pytest-benchmark's files say less, and studies of numbers nothing
            machine = found.get("machine_info") if isinstance(found, dict) else None
            cells = [machine["cpu"]["brand_raw"], "", "", f"`{found['commit_info']['id'][:9]}`"] if machine else [""] * 4
            body.append([source(path.name), *cells])
            continue
        body.append(
            [
                source(path.name),
                f"{environment.get('gpu') or environment['cpu']}, {environment['cpu_capability']}",
                str(environment["threads"]),
                str(environment["torch"]),
                f"`{str(environment['commit'])[:9]}`{'+' if environment['uncommitted_changes'] else ''}",
            ]
        )
    return markdown(["file", "machine", "threads", "torch", "commit"], body)


def readme() -> str:
    """What coupfast measures against what else exists: the README's table."""
    full, wide = "speed-paper-b1-full-epyc-zen3.json", "speed-paper-b1-epyc-zen4.json"
    engines = "gradient-paper-b1-cpu-engine-epyc-zen3.json"
    errors = "gradient-tiny-b1-epyc-zen3.json"
    memory = "gradient-paper-b1-epyc-zen3.json"
    attack = "autoattack-paper-epyc-zen3.json"
    peer = fastest_peer(batch=1)
    speed_cpu = row(full, engine="cpu")
    gradient_cpu = row(engines, mode="exact", engine="cpu")

    def of(name: str, page: str) -> str:
        return f"[{page}](docs/measured/{page}.md), [file](bench/results/{name})"

    body = [
        [
            "purify an image with COUP, 100 steps",
            f"{seconds(row(full, engine='reference')['seconds_per_image'])} s, the published way",
            f"{seconds(speed_cpu['seconds_per_image'])} s",
            f"{times(speed_cpu['ratio_to_reference'])} ×",
            of(full, "speed"),
        ],
        [
            "its gradient",
            f"{seconds(row(engines, mode='published')['seconds_per_image'])} s, torchsde's adjoint as published",
            f"{seconds(gradient_cpu['seconds_per_image'])} s",
            f"{times(gradient_cpu['ratio_to_published'])} ×",
            of(engines, "gradients"),
        ],
        [
            "its gradient, networks frozen",
            f"{seconds(row(engines, mode='frozen')['seconds_per_image'])} s, torchsde's adjoint",
            f"{seconds(gradient_cpu['seconds_per_image'])} s",
            f"{times(gradient_cpu['ratio_to_frozen'])} ×",
            of(engines, "gradients"),
        ],
        [
            "relative error of the gradient, small networks",
            f"{small(row(errors, mode='published')['rel_error'])}, torchsde's adjoint as published",
            small(row(errors, mode="exact")["rel_error"]),
            "",
            of(errors, "gradients"),
        ],
        [
            "memory of an exact gradient, 100 steps",
            f"{size(row(memory, mode='back-propagation')['peak_bytes'])}, back-propagation",
            size(row(memory, mode="exact")["peak_bytes"]),
            f"{row(memory, mode='back-propagation')['peak_bytes'] / row(memory, mode='exact')['peak_bytes']:.0f} ×",
            of(memory, "gradients"),
        ],
        [
            "APGD-CE, 10 iterations, one image",
            f"{seconds(row(attack, engine='torchsde')['seconds'])} s, the published way",
            f"{seconds(row(attack, engine='cpu')['seconds'])} s",
            f"{times(row(attack, engine='cpu')['ratio_to_published'])} ×",
            of(attack, "attacks"),
        ],
        [
            "the score network alone",
            f"{seconds(peer['seconds_per_image'])} s, {peer['runtime']}",
            f"{seconds(row(PEERS, runtime='cpu engine', batch=1)['seconds_per_image'])} s",
            f"{times(1 / peer['ratio_to_engine'])} ×",
            of(PEERS, "speed"),
        ],
        [
            "purify an image with COUP, AVX-512",
            f"{seconds(row(wide, engine='eager')['seconds_per_image'])} s, eager PyTorch",
            f"{seconds(row(wide, engine='cpu')['seconds_per_image'])} s",
            f"{times(row(wide, engine='cpu')['ratio_to_eager'])} ×",
            of(wide, "speed"),
        ],
    ]
    return markdown(["what", "else", "coupfast", "ratio", "measured"], body)


CONTEXT: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(results, row, table, seconds, times, percent, small, size, interval, source),
        *(speed, speed_avx512, speed_error, gradient_times, gradient_engines, gradient_errors, adjoint_errors, kept),
        *(peers, autoattack, attack_gradients, verdict, verdict_against, verdict_goal, verdict_pace, verdict_stages),
        *(verdict_growing, verdict_averages),
        *(study, study_headline, gradient_signal, signal_against, kept_draws),
        *(solvers, solver_distances, solver_accuracies, solver_share, solver_least_p, solver_baseline),
        *(winograd, lost_by_choosing, layers, whole_networks, worst_error, step_shares, winograd_gap),
        *(workers, oversubscribed, guided_step_cpu, absent_columns, kernel_times, slower_kernels, files),
    )
}

if __name__ == "__main__":
    print(readme())
