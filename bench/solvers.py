"""What few steps cost: every solver in 5 to 100 steps, beside 1000 steps of Euler-Maruyama.

    python bench/solvers.py --out bench/results/solvers            # hours of one core; goes on where it was stopped
    python bench/solvers.py --out DIR --methods coup --steps 5 10 --draws 4
    python bench/solvers.py --out DIR --gaussian --t 0.1

For each method, solver and number of steps, on the shipped networks and 20 images:

* distance of the law of purified images from that of the reference: the energy distance between draws, of each image alone,
  relative to the spread of the reference, averaged over images (0: the same law; the last rows are what two halves of the
  reference show);
* how many are classified right, a draw at a time: clean; under one fixed transfer attack (PGD through the exact gradient of the
  method in ten Euler-Maruyama steps, the same images for everybody); under a short exact attack of each row's own (PGD through
  its own gradient);
* seconds of CPU time an image takes, forwards.

And, exactly, what each makes of Gaussian data (`gaussian_law`): the Wasserstein distance of its law from the right one. ODE
solvers and SDE solvers move an image that is off by other amounts: each is compared with its own limit there, and with the
reference SDE above, where the ODE's rows do not tend to 0. `--gaussian` does this part alone, in a second.

Intervals are of 95 %, from images drawn again: images are the sample, draws of the same image say little of others. Differences
are from Euler-Maruyama in the most steps, paired by image; p is by flipped signs of images' differences, since few images that
are drawn again vary less than new ones would.

A row is a file of its own in `--out`, which is skipped where it is there. The last lines put them together: solvers.json,
solvers.md and solvers.png; with `--kept` nothing is computed, and what is there is put together.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gaussian_law import exact_law, law_after, wasserstein
from tables import lines
from timing import environment
from tqdm import tqdm

import coupfast
from coupfast.data import load_images
from coupfast.evaluation.attacks import ball
from coupfast.evaluation.drawing import COLOURS, check_matplotlib, new_figure, to_png
from coupfast.experiments.announced import sign_flips
from coupfast.experiments.defenses import NAMES
from coupfast.sde import T_END, VPSDE, time_grid
from coupfast.solvers import SOLVERS, as_solver
from coupfast_kernels.files import write_whole

METHODS = ("coup", "diffpure")
STEPS = (5, 10, 20, 50, 100)
#: Share of the SDE's noise, by which the limit of a solver is told; 1 unless it is here.
SHARES = {"probability-flow": 0.0, "ddim": 0.0, "dpm-solver++-2m": 0.0}
REFERENCE = "euler-maruyama"
_MARKS = "osD^vP*Xp"
EPS = 8 / 255
RESAMPLES = 10_000
ATTACK_DRAWS, JUDGING_DRAWS = 2**30, 2**31  # draws from here on are an attack's, and those of verdicts


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.gaussian:
        exact = gaussian_rows(options)
        return put_together(options, {"rows": [], "floor": {}, "gaussian": exact}, gaussian_text(exact))
    check_matplotlib()
    x, y = load_images("cifar10-20", limit=options.images)
    assert y is not None
    study = Study(options, x, y)
    cells = [(m, s, k) for k in options.steps for m in options.methods for s in options.solvers]
    if options.kept:
        cells = [cell for cell in cells if study.file(*cell).exists()]
        if not cells:
            raise SystemExit(f"--kept: {options.out} has no row of these options; leave it out to compute them")
    methods = [method for method in options.methods if any(method == of for of, *_ in cells)]
    for method in methods:
        study.reference(method)
        if not options.kept:
            study.transferred(method)
    for method, solver, steps in tqdm(cells, unit="row", disable=None):
        study.row(method, solver, steps)
    rows = [row for cell in cells if (row := study.row(*cell)) is not None]
    rows = with_differences(rows, options.draws)
    floors = {method: study.floor(method) for method in methods}
    exact = gaussian_rows(options)
    write_whole(options.out / "solvers.png", picture(rows, floors))
    found = {"rows": rows, "floor": floors, "gaussian": exact}
    return put_together(options, found, [*text(rows, floors), "", *gaussian_text(exact)])


def put_together(options: argparse.Namespace, found: dict[str, Any], table: list[str]) -> int:
    """Write and print what was found."""
    said = {name: value for name, value in vars(options).items() if name != "out"}
    record = {"settings": said, **found, "environment": environment(torch.device("cpu"))}
    write_whole(options.out / "solvers.json", (json.dumps(record, indent=1) + "\n").encode())
    write_whole(options.out / "solvers.md", ("\n".join(table) + "\n").encode())
    print("\n".join(table))
    return 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows; made if it does not exist")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--grid", default="time", help="time, log-snr or quadratic (default: %(default)s)")
    parser.add_argument("--t", type=float, default=0.06, help="purification time (default: %(default)s)")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--draws", type=int, default=8, help="draws of each image (default: %(default)s)")
    parser.add_argument("--reference-steps", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=10, help="of both attacks; 0 leaves them out (default: %(default)s)")
    parser.add_argument("--gaussian", action="store_true", help="only what is exact, of Gaussian data")
    parser.add_argument("--kept", action="store_true", help="put together the rows that are there, and compute no other")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    if options.draws < 2:
        parser.error(f"--draws is at least 2, of which a law has a spread, got {options.draws}")
    return options


class Study:
    """The rows of one set of options, each kept as a file.

    Args:
        x, y: Images in [0, 1] and labels.
    """

    def __init__(self, options: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> None:
        self.options, self.x, self.y = options, x, y
        self.score, self.classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
        self._stamp = f"t{options.t:g}-n{len(x)}-d{options.draws}-i{options.iterations}-r{options.reference_steps}"
        self._references: dict[str, np.ndarray] = {}

    def purifier(self, method: str, solver: str, steps: int, grid: str = "time") -> coupfast.Purifier:
        more = {"grid": grid, "solver": solver, "memory_budget": 2**30}
        return coupfast.Purifier(self.score, self.classifier, method=method, t=self.options.t, num_steps=steps, **more)

    def draws(self, purifier: coupfast.Purifier, x: torch.Tensor, count: int, first: int = 0) -> Iterator[torch.Tensor]:
        for draw in range(first, first + count):
            yield purifier(x, seed=0, draw=draw)

    def reference(self, method: str) -> np.ndarray:
        """Twice as many draws as a row has, (draws, images, elements); of other noise than the rows'."""
        if method not in self._references:
            file = self.options.out / f"reference-{method}-{self._stamp}.npz"
            kept: list[np.ndarray] = list(np.load(file)["draws"]) if file.exists() else []
            missing = range(len(kept), 2 * self.options.draws)
            purifier = self.purifier(method, REFERENCE, self.options.reference_steps) if missing else None
            for draw in tqdm(missing, desc=f"reference {method}", disable=None, leave=False):
                assert purifier is not None
                kept.append(purifier(self.x, seed=1, draw=draw).flatten(1).numpy())
                _write_arrays(file, draws=np.stack(kept))
            self._references[method] = np.stack(kept)
        return self._references[method]

    def floor(self, method: str) -> dict[str, float]:
        """The distances of the two halves of the reference."""
        half = self.options.draws
        return distances(self.reference(method)[:half], self.reference(method)[half:])

    def transferred(self, method: str) -> torch.Tensor:
        """The images of the one transfer attack."""
        if self.options.iterations == 0:
            return self.x
        file = self.options.out / f"transfer-{method}-{self._stamp}.npz"
        if not file.exists():
            attacked = self.attack(self.purifier(method, REFERENCE, 10), draw=ATTACK_DRAWS)
            _write_arrays(file, x=attacked.numpy())
        return torch.from_numpy(np.load(file)["x"])

    def attack(self, purifier: coupfast.Purifier, draw: int) -> torch.Tensor:
        """PGD, Linf 8/255, steps of a quarter of that, one fresh draw an iteration, the last point."""
        attacked = self.x.clone()
        for iteration in range(self.options.iterations):
            leaf = attacked.clone().requires_grad_()
            logits = self.classifier(purifier(leaf, seed=0, draw=draw + iteration))
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, self.y, reduction="sum"), leaf)
            attacked = ball.project(attacked + ball.ascent(gradient, "Linf", 0.25 * EPS), self.x, "Linf", EPS)
        return attacked

    def file(self, method: str, solver: str, steps: int) -> Path:
        return self.options.out / f"{method}-{solver}-{steps}-{self.options.grid}-{self._stamp}.json"

    def row(self, method: str, solver: str, steps: int) -> dict[str, Any] | None:
        """What is known of a method with a solver in so many steps; None where the solver cannot take such long ones."""
        options, file = self.options, self.file(method, solver, steps)
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text())
            return found
        try:
            purifier = self.purifier(method, solver, steps, options.grid)
        except ValueError:
            return None
        purifier(self.x[:1], seed=0)  # makes its programs
        purified, seconds = [], []
        for draw in range(options.draws):
            started = time.process_time()
            purified.append(purifier(self.x, seed=0, draw=draw))
            seconds.append((time.process_time() - started) / len(self.x))
        row = {"method": method, "solver": solver, "steps": steps, "cpu_seconds_an_image": float(np.median(seconds))}
        law = np.stack([images.flatten(1).numpy() for images in purified])
        row |= distances(law, self.reference(method)[: options.draws])
        row |= self.right("clean", purified)
        if options.iterations:
            transfer = self.draws(purifier, self.transferred(method), options.draws, JUDGING_DRAWS)
            row |= self.right("transfer", transfer)
            attacked = self.attack(purifier, ATTACK_DRAWS)
            row |= self.right("exact", self.draws(purifier, attacked, options.draws, JUDGING_DRAWS))
        write_whole(file, (json.dumps(row) + "\n").encode())
        return row

    def right(self, name: str, purified: Iterable[torch.Tensor]) -> dict[str, Any]:
        """Share of images and draws that are classified right, its interval, in %; and of each image's draws, how many are."""
        with torch.no_grad():
            right = torch.stack([self.classifier(x).argmax(1) == self.y for x in purified]).numpy()
        counts, share = right.sum(0), 100.0 * right.mean(0)
        return {name: float(share.mean()), f"{name}_95": interval(share), f"{name}_of_each_image": counts.tolist()}


def interval(values: np.ndarray) -> list[float]:
    """Of the mean over images, 95 %."""
    again = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    ends: list[float] = np.percentile(values[again].mean(1), [2.5, 97.5]).tolist()
    return ends


def with_differences(rows: list[dict[str, Any]], draws: int) -> list[dict[str, Any]]:
    """Each row with what its accuracies differ by from those of Euler-Maruyama in the most steps, on the same images."""
    found = []
    for row in rows:
        of = [each for each in rows if (each["method"], each["solver"]) == (row["method"], REFERENCE)]
        baseline = max(of, key=lambda each: each["steps"], default=None)
        more: dict[str, Any] = {} if baseline is None else {"baseline_steps": baseline["steps"]}
        for name in ("clean", "transfer", "exact"):
            if baseline is not None and name in row:
                apart = np.subtract(row[f"{name}_of_each_image"], baseline[f"{name}_of_each_image"]) * (100.0 / draws)
                more |= {f"{name}_difference": float(apart.mean()), f"{name}_difference_95": interval(apart)}
                more |= {f"{name}_difference_p": sign_flips(apart)}
        found.append(row | more)
    return found


def distances(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Of the laws of two sets of draws, (draws, images, elements), image by image, relative to the spread of the second."""
    energy = []
    for ours, theirs in zip(a.swapaxes(0, 1).astype(np.float64), b.swapaxes(0, 1).astype(np.float64), strict=True):
        within = [_mean_distance(each, each) * len(each) / max(1, len(each) - 1) for each in (ours, theirs)]
        energy.append((2.0 * _mean_distance(ours, theirs) - within[0] - within[1]) / within[1])
    return {"energy_distance": float(np.mean(energy))}


def _mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a[:, None] - b[None], axis=2).mean())


def gaussian_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    sde, rows = VPSDE(), []
    for solver in options.solvers:
        made = as_solver(solver)
        fill = SOLVERS[made] if isinstance(made, str) else made
        exact = exact_law(options.t, T_END, sde, SHARES.get(solver, 1.0))
        for grid in ("time", "log-snr", "quadratic"):
            for steps in options.steps:
                try:
                    found = law_after(fill(sde, time_grid(options.t, steps, grid=grid, sde=sde), 0.0), sde)  # type: ignore[arg-type]
                except ValueError:
                    continue
                rows.append({"solver": solver, "grid": grid, "steps": steps, "wasserstein": wasserstein(found, exact)})
    return rows


def text(rows: list[dict[str, Any]], floors: dict[str, dict[str, float]]) -> list[str]:
    names = {"energy_distance": "energy distance", "clean": "clean %"}
    names |= {"transfer": "transfer %", "exact": "exact attack %", "cpu_seconds_an_image": "CPU s an image"}
    names = {name: said for name, said in names.items() if any(name in row for row in rows)}
    table = [("method", "solver", "steps", *names.values())]
    for row in rows:
        table.append((row["method"], row["solver"], str(row["steps"]), *(_cell(row, name) for name in names)))
    for method, floor in floors.items():
        table.append((method, "the reference's halves", "", *(f"{floor[name]:.3g}" if name in floor else "" for name in names)))
    return lines(table, markdown=True)


def _cell(row: dict[str, Any], name: str) -> str:
    if (ends := row.get(f"{name}_95")) is None:
        return f"{row[name]:.3g}"
    return f"{row[name]:.1f} [{ends[0]:.0f}, {ends[1]:.0f}]"


def gaussian_text(rows: list[dict[str, Any]]) -> list[str]:
    steps = sorted({row["steps"] for row in rows})
    table = [("solver", "grid", *(f"{k} steps" for k in steps))]
    for solver, grid in dict.fromkeys((row["solver"], row["grid"]) for row in rows):
        found = {row["steps"]: row["wasserstein"] for row in rows if (row["solver"], row["grid"]) == (solver, grid)}
        table.append((solver, grid, *(f"{found[k]:.2e}" if k in found else "too long" for k in steps)))
    return lines(table, markdown=True)


def picture(rows: list[dict[str, Any]], floors: dict[str, dict[str, float]]) -> bytes:
    """Distance and accuracies over the number of steps, a column a method."""
    names = {"energy_distance": "energy distance", "clean": "clean, %"}
    names |= {"transfer": "under the transfer attack, %", "exact": "under its own attack, %"}
    panels = [name for name in names if any(name in row for row in rows)]
    figure = new_figure(4.6 * len(floors), 2.3 * len(panels) + 0.9)
    axes = figure.subplots(len(panels), len(floors), squeeze=False, sharex=True, sharey="row")
    steps = sorted({row["steps"] for row in rows})
    for column, method in enumerate(floors):
        for axis, panel in zip(axes[:, column], panels, strict=True):
            for number, solver in enumerate(dict.fromkeys(row["solver"] for row in rows)):
                found = [(r["steps"], r[panel]) for r in rows if (r["method"], r["solver"]) == (method, solver)]
                look = {"color": COLOURS[number % len(COLOURS)], "marker": _MARKS[number % len(_MARKS)], "linewidth": 1}
                look |= {"linestyle": "--" if solver in SHARES else "-"}  # of an ODE
                if found:
                    axis.plot(*zip(*found, strict=True), label=solver, **look)
            axis.set_xscale("log")
            axis.set_title(NAMES[method] if panel == panels[0] else "")
            axis.set_ylabel(names[panel] if column == 0 else "")
            axis.set_xticks(steps, [str(count) for count in steps])
            axis.minorticks_off()
            if panel == "energy_distance":
                axis.set_yscale("symlog", linthresh=0.01)
                axis.axhline(floors[method][panel], color="grey", linestyle=":")
        axes[-1, column].set_xlabel("steps")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    return to_png(figure)


def _write_arrays(file: Path, **arrays: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(file, content.getvalue())


if __name__ == "__main__":
    raise SystemExit(main())
