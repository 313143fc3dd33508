"""Table 4: seconds of a purification. `bench/speed.py` measures; this calls it."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import coupfast
from coupfast.evaluation.drawing import COLOURS, new_figure, to_png
from coupfast.evaluation.report import Picture, Section, Table
from coupfast.experiments.defenses import NAMES
from coupfast.experiments.experiment import Experiment, Results
from coupfast.experiments.scale import SETS, Scale
from coupfast.experiments.tables import NONE
from coupfast.wording import counted

_TIMES = (0.0, 0.001, 0.05, 0.1, 0.15)
_PUBLISHED = {
    "diffpure": (0.006, 0.140, 3.056, 5.770, 8.648),
    "reverse-sde": (0.006, 0.148, 3.032, 6.930, 8.732),
    "coup": (0.006, 0.170, 3.894, 7.662, 11.134),
}
_CLASSIFIER = "classifier alone"


def _bench() -> Path:
    return Path(coupfast.__file__).resolve().parents[1] / "bench" / "speed.py"


def _check(scale: Scale) -> None:
    own = SETS[scale.networks].networks
    for role in EXPERIMENT.needs:
        if (name := scale.network(role).name) != own[role].name:
            raise ValueError(
                f"table4 is measured on a set's own networks, and --{role} names {name}: give weights of {own[role].name} with "
                f"--{role}-weights, or leave it out"
            )
    if not _bench().is_file():
        raise ValueError(
            "table4 is measured by bench/speed.py, which is in the repository and in the source distribution and not in an "
            "installed wheel: clone the repository, or unpack the source distribution, and "
            "run it there"
        )


def _batch(scale: Scale) -> int:
    return min(scale.images or 1, 8)


def _repeats(scale: Scale) -> int:
    return max(2, round(5 * scale.budget))


def options(scale: Scale) -> list[str]:
    """What bench/speed.py is asked for."""
    words = ["--t", *map(str, _TIMES), "--methods", *_PUBLISHED]
    words += ["--network", scale.networks, "--device", scale.device, "--threads", str(scale.threads)]
    words += ["--batch", str(_batch(scale)), "--repeats", str(_repeats(scale))]
    words += ["--steps-timed", str(scale.steps)] if scale.steps else []
    for role in ("score", "classifier"):
        weights = scale.network(role).weights
        words += [f"--{role}", weights] if weights else []
    return words


def _measure(scale: Scale, folders: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Seconds for an image: by method, engine and time, as bench/speed.py writes them; of few steps, and scaled."""
    with tempfile.TemporaryDirectory(prefix="coupfast-") as folder:
        target = Path(folder) / "speed.json"
        words = [sys.executable, str(_bench()), *options(scale), "--json", str(target)]
        # What it prints is for whoever runs it, and standard output is this command's own.
        status = subprocess.run(words, stdout=sys.stderr, check=False).returncode
        if status and not target.is_file():
            raise OSError(f"bench/speed.py failed with status {status}; what it said stands above")
        found = json.loads(target.read_text())
    where = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), **found["environment"]}
    return {"rows": np.array(json.dumps(found["rows"])), "environment": np.array(json.dumps(where))}


def _rows(results: Results) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(str(results.measured["rows"]))
    return found


def _sections(results: Results) -> list[Section]:
    seconds: dict[tuple[str, str], dict[float, str]] = {}
    for row in _rows(results):
        value = row["seconds_per_image"]
        told = NONE if value is None else f"{float(str(value)):.4g}{'*' if row['scaled'] else ''}"
        seconds.setdefault((str(row["method"]), str(row["engine"])), {})[float(str(row["t"]))] = told
    where = json.loads(str(results.measured["environment"]))
    alone = seconds.pop((_CLASSIFIER, "eager"), {}).get(0.0, NONE)
    steps = results.scale.steps
    fewer = f"; *: scaled from {counted(steps, 'step')}" if steps else ""
    table = []
    for method, published in _PUBLISHED.items():
        table.append((NAMES[method], "published, V100", *(f"{value:.3f}" for value in published)))
        for (name, engine), by_time in seconds.items():
            if name == method:
                table.append((NAMES[method], engine, alone, *(by_time.get(t, NONE) for t in _TIMES[1:])))
    return [
        Table(
            "Seconds for an image, published beside measured",
            ("method", "where", *(f"t* = {t:g}" for t in _TIMES)),
            table,
            "At t* = 0 the classifier alone. reference: the published way of computing, here. Median of "
            f"{counted(_repeats(results.scale), 'run')} of {counted(_batch(results.scale), 'image')} at once{fewer}. Measured "
            f"on {where['date']}: {where['cpu'] if where['gpu'] is None else where['device']}, "
            f"{counted(where['threads'], 'thread')}, torch {where['torch']}.",
        ),
        _picture(seconds),
    ]


def _picture(seconds: Mapping[tuple[str, str], Mapping[float, str]]) -> Picture:
    """Of every method, published and measured seconds of an image over t*."""
    times = _TIMES[1:]
    engines = list(dict.fromkeys(engine for _, engine in seconds))
    figure = new_figure(9.6, 3.6)
    panels = figure.subplots(1, len(_PUBLISHED), sharey=True)
    for panel, (method, published) in zip(panels, _PUBLISHED.items(), strict=True):
        panel.plot(times, published[1:], "kD--", markersize=5, label="published, V100")
        for number, engine in enumerate(engines):
            found = {t: float(told.rstrip("*")) for t, told in seconds.get((method, engine), {}).items() if t and told != NONE}
            look = {"color": COLOURS[number % len(COLOURS)], "marker": "os^v"[number % 4], "markersize": 5}
            panel.plot(list(found), list(found.values()), label=engine, **look)
        panel.set_yscale("log")
        panel.set_title(NAMES[method], fontsize=9)
        panel.set_xlabel("purification time t*")
    panels[0].set_ylabel("seconds for an image")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    ends = "; ".join(
        f"{NAMES[method]} {engine} {found[max(found)]} at {max(found):g}" for (method, engine), found in seconds.items()
    )
    return Picture(
        "Seconds over t*, published beside measured",
        to_png(figure),
        "Of other machines and networks: slopes and distances between curves of one machine can be compared.",
        f"A panel for each method, seconds in powers of ten over t*, a curve for each engine and the published one: {ends}.",
    )


def _concludes(results: Results) -> list[str]:
    best: dict[str, list[float]] = {}
    for row in _rows(results):
        value, t = row["seconds_per_image"], float(str(row["t"]))
        if value is not None and t == 0.1 and row["engine"] != "reference":
            best.setdefault(str(row["method"]), []).append(float(str(value)))
    told = {method: min(values) for method, values in best.items()}
    if not {"coup", "reverse-sde"} <= set(told):
        return ["No engine within its error bound was timed at t* = 0.1."]
    return [
        f"At t* = 0.1 an image takes {told['coup']:.3g} s with guidance and {told['reverse-sde']:.3g} s without, "
        f"{told['coup'] / told['reverse-sde']:.2f} times as much (published: {7.662 / 6.930:.2f} times).",
        "Published and measured seconds are of other machines and networks; ratios between methods on one machine can be "
        "compared. Times are worth what the machine was idle.",
    ]


EXPERIMENT = Experiment(
    name="table4",
    place="Table 4",
    title="seconds of a purification",
    asks="How long does an image take, without and with guidance, over t*?",
    setting="One V100, seconds of inference for t* = 0, 0.001, 0.05, 0.1 and 0.15",
    measure=_measure,
    version=2,
    sections=_sections,
    concludes=_concludes,
    roles=("score", "classifier"),
    assumptions=(
        "The table's header is not legible: the times are inferred from the entries.",
        "How many images at once the published seconds are of is not said: here the table says how many.",
    ),
    differs=("seconds of the machine that the table names, and not of a V100: they are not to be compared",),
    check=_check,
)
