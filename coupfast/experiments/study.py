"""The study: does COUP's guidance help under an attack that follows the exact gradient, where every defense is at its best?

Of the images the first ones judge, and the others choose every defense's t*. What is compared, by which test and corrected for
how many, and what so many images can show, is written down before the first run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coupfast.evaluation import protocols
from coupfast.evaluation.drawing import COLOURS, new_figure, to_png
from coupfast.evaluation.protocols import INSIDE, OFFICIAL, PROTOCOLS, Comparison
from coupfast.evaluation.report import Picture, Run, Section, Table
from coupfast.experiments import announced, figures, tables
from coupfast.experiments.announced import Announcement
from coupfast.experiments.defenses import NAMES, RADII, threat
from coupfast.experiments.experiment import Case, Experiment, Results
from coupfast.experiments.scale import Scale
from coupfast.wording import counted, radius

_JUDGED, _CHOOSING = (0.0, 0.8), (0.8, 1.0)
#: Some of those that judge: the published gradient takes several times as long.
_CONTRASTING = (0.0, 0.2)
_NORMS, _TIMES = ("Linf", "L2"), (0.06, 0.1, 0.15)
_ATTACK = {"attack": "cascade", "mode": "fast"}
_CHOOSING_ATTACK = {"attack": "transfer", "mode": "fast"}
_UNDEFENDED = {"method": "none", "attack": "autoattack-standard"}
_REVERSE, _DIFFPURE = NAMES["reverse-sde"], NAMES["diffpure"]


def _coup(scale: float) -> str:
    return f"COUP at λ = {scale:g}"


_SCALES = (0.5, 1.0, 2.0, 4.0)
_DEFENSES: dict[str, dict[str, Any]] = {
    _DIFFPURE: {"method": "diffpure"},
    _REVERSE: {"method": "reverse-sde"},
    **{_coup(scale): {"method": "coup", "guidance_scale": scale} for scale in _SCALES},
}
_PAIRS = (*((_coup(scale), _REVERSE) for scale in _SCALES), (_coup(1.0), _DIFFPURE), (_REVERSE, _DIFFPURE))
_CONTRASTED = tuple((name, "Linf") for name in (_DIFFPURE, _REVERSE, _coup(1.0)))
#: That decides; t* is chosen by the average, which a few images tell more of.
PRIMARY, _CHOSEN_BY = "majority", "average"
_OTHERS = tuple(protocol for protocol in (OFFICIAL, *PROTOCOLS) if protocol != PRIMARY)
#: Shares of images that only one of two defenses classifies correctly, which nobody knows before.
_DISCORDANT = (0.05, 0.1, 0.2, 0.3)


@dataclasses.dataclass(frozen=True)
class Tested:
    """A comparison, its p, and that after Holm's correction."""

    found: Comparison
    p: float
    adjusted: float

    @property
    def decided(self) -> int:
        """1: the first is better, −1: the second is, 0: they cannot be told apart."""
        return int(np.sign(self.found.difference)) if self.adjusted <= announced.LEVEL else 0


@dataclasses.dataclass(frozen=True)
class Design:
    """What is compared with what.

    Attributes:
        defenses: Keywords of a purification by name; `t` is chosen.
        pairs: That are compared, in each norm.
        norms: "Linf", "L2".
        times: That `t` is chosen from.
        attack: Keywords of the one that judges.
        choosing_attack: Keywords of the one that `t` is chosen under.
        contrasted: Defenses and norms that are attacked along the published gradient, too, on fewer images.
    """

    defenses: Mapping[str, Mapping[str, Any]]
    pairs: Sequence[tuple[str, str]]
    norms: Sequence[str]
    times: Sequence[float]
    attack: Mapping[str, Any]
    choosing_attack: Mapping[str, Any]
    contrasted: Sequence[tuple[str, str]]

    @property
    def compared(self) -> list[tuple[str, str, str]]:
        return [(first, second, norm) for norm in self.norms for first, second in self.pairs]

    def choices(self) -> list[Case]:
        return [
            Case(_at(name, norm, t), {**purifier, "t": t, **self.choosing_attack, **threat(norm)}, part=_CHOOSING)
            for norm in self.norms
            for name, purifier in self.defenses.items()
            for t in self.times
        ]

    def chosen(self, runs: Mapping[str, Run], name: str, norm: str) -> float:
        """The time of the highest robust accuracy; of equal ones, of the highest clean accuracy, and then the shortest."""

        def worth(t: float) -> tuple[float, float, float]:
            found = runs[_at(name, norm, t)].accuracies
            return found["attacked"][_CHOSEN_BY].value, found["clean"][_CHOSEN_BY].value, -t

        return max(self.times, key=worth)

    def judged(self, runs: Mapping[str, Run]) -> list[Case]:
        return self._judged({(name, norm): self.chosen(runs, name, norm) for norm in self.norms for name in self.defenses})

    def _judged(self, times: Mapping[tuple[str, str], float]) -> list[Case]:
        """With t* by defense and norm."""
        found = []
        for norm in self.norms:
            found.append(Case(_of(NAMES["none"], norm), {**_UNDEFENDED, **threat(norm)}, part=_JUDGED))
            for name, purifier in self.defenses.items():
                keywords = {**purifier, "t": times[name, norm], **self.attack, **threat(norm)}
                found.append(Case(_of(name, norm), keywords, part=_JUDGED))
                if (name, norm) in self.contrasted:
                    detached = {"guidance_gradient": "detached"} if purifier["method"] == "coup" else {}
                    published = {**keywords, "gradient": "adjoint", **detached}
                    found.append(Case(_published(name, norm), published, part=_CONTRASTING))
        return found

    def check(self, scale: Scale) -> None:
        """That the runs can begin: a stage through few steps needs a purification of more at every t* that may be chosen.

        Raises:
            ValueError: if it is not so, or if another gradient is asked for.
        """
        if scale.gradient is not None:
            raise ValueError(
                "study compares the exact gradient with the published one itself, and --gradient would put "
                f"{scale.gradient!r} in the place of both: leave it out"
            )
        for name, purifier in self.defenses.items():
            for t, attack in itertools.product(self.times, (self.choosing_attack, self.attack)):
                spec = Case(name, {**purifier, "t": t, **attack, **threat(self.norms[0])}).spec(scale)
                most = max((getattr(stage, "coarse_steps", 0) for stage in spec.stages().values()), default=0)
                if scale.steps_of(t) <= most:
                    raise ValueError(
                        f"{spec.attack} goes through {counted(most, 'step')}, and a purification from t = {t:g} has "
                        f"{scale.steps_of(t)} here: take more (--steps)"
                    )

    def announces(self, scale: Scale) -> Announcement:
        # Of every run that there may be, whatever t* is chosen.
        possible = [self._judged(dict.fromkeys(itertools.product(self.defenses, self.norms), t)) for t in self.times]
        cases = [*self.choices(), *itertools.chain.from_iterable(possible)]
        said = [tables.attacks(scale, cases), *self._announced(scale)]
        return Announcement(said, [case.spec(scale) for case in cases], self.compared, PRIMARY)

    def _announced(self, scale: Scale) -> list[Table]:
        """The comparisons, and what so many images can show."""
        start, stop = scale.part(_JUDGED)
        levels = (announced.LEVEL, announced.LEVEL / len(self.compared))
        times = ", ".join(f"{t:g}" for t in self.times)
        return [
            Table(
                "Announced comparisons",
                ("first", "second", "ball"),
                [(first, second, f"{norm}, {radius(norm, RADII[norm])}") for first, second, norm in self.compared],
                f"Of robust accuracy by {PRIMARY}, under {self.attack['attack']} along the exact gradient, each defense at the "
                f"t* of {times} that has the highest robust accuracy on other images, under {self.choosing_attack['attack']}. "
                f"McNemar's exact test, two-sided, at {announced.LEVEL:.0%} with Holm's correction over these "
                f"{len(self.compared)}.",
            ),
            Table(
                f"What {counted(stop - start, 'image')} can show",
                ("right by one defense only", *(f"at {level:.2g}" for level in levels)),
                [
                    (f"{share:.0%} of images", *(_points(announced.detectable(stop - start, share, level)) for level in levels))
                    for share in _DISCORDANT
                ],
                f"The smallest difference of two accuracies, in points, that the test finds with a chance of "
                f"{announced.POWER:.0%}: without correction, and with the strictest one of Holm's. It depends on how many "
                f"images only one of the two classifies correctly, which nobody knows before.",
            ),
        ]

    def sections(self, results: Results) -> list[Section]:
        date = announced.dated(results.announced["at"], min(run.started for run in results.runs.values()))
        kept = map(tables.from_dict, results.announced["tables"])
        own = {table.title for table in self._announced(results.scale)}
        said = [dataclasses.replace(table, note=f"{table.note} {date}") for table in kept if table.title in own]
        groups = {
            norm: {name: results.runs[_of(name, norm)].accuracies["attacked"][PRIMARY] for name in self.defenses}
            for norm in self.norms
        }
        note = f"By {PRIMARY}, each defense at its t*; lines are intervals of 95 % over images."
        return [
            *said,
            self._choice(results),
            self._accuracies(results),
            figures.bars("Robust accuracy", groups, note),
            _differences(self.tested(results)),
            *(_tested(self.tested(results, protocol), protocol) for protocol in (PRIMARY, *_OTHERS)),
            self._gradients(results),
        ]

    def _choice(self, results: Results) -> Table:
        rows = []
        for norm in self.norms:
            for name in self.defenses:
                runs = [results.runs[_at(name, norm, t)] for t in self.times]
                cells = [f"{tables.robust(run, _CHOSEN_BY)}; {tables.clean(run, _CHOSEN_BY)}" for run in runs]
                chosen = self.chosen(results.runs, name, norm)
                ends = {min(self.times): ", the shortest", max(self.times): ", the longest"}
                rows.append((name, norm, *cells, f"{chosen:g}{ends.get(chosen, '')}"))
        start, stop = results.scale.part(_CHOOSING)
        return Table(
            "Choice of t*",
            ("defense", "norm", *(f"robust; clean at t* = {t:g}" for t in self.times), "chosen"),
            rows,
            f"In %, with 95 % intervals over {counted(stop - start, 'image')} that judge nothing; the average over the "
            "judge's draws. Where it is the shortest or longest that was tried, one beyond may be better still.",
        )

    def _accuracies(self, results: Results) -> Table:
        shown = (OFFICIAL, *PROTOCOLS, *INSIDE)
        rows = []
        for norm in self.norms:
            for name in (NAMES["none"], *self.defenses):
                run = results.runs[_of(name, norm)]
                rows.append((name, norm, tables.clean(run, PRIMARY), *(_robust(run, protocol) for protocol in shown)))
        return Table(
            "Accuracies",
            ("defense", "norm", f"clean, {PRIMARY}", *shown),
            rows,
            "In %, with 95 % intervals over images. Robust, under the exact gradient, by every protocol; inside: at the worst "
            f"point that the attack saw for each image, of {self._looked(results)} there. The undefended classifier is under "
            "AutoAttack's standard.",
        )

    def _looked(self, results: Results) -> str:
        """How many draws the verdicts inside of the attack are of."""
        found = {
            results.runs[_of(name, norm)].verdicts["attacked"].inside_draws for norm in self.norms for name in self.defenses
        }
        least, most = min(found), max(found)
        return counted(most, "fresh draw") if least == most else f"{least} to {counted(most, 'fresh draw')}"

    def _gradients(self, results: Results) -> Table:
        by = (PRIMARY, _CHOSEN_BY)
        rows = []
        for name, norm in self.contrasted:
            pair = protocols.common(*(results.runs[of(name, norm)].verdicts["attacked"] for of in (_of, _published)))
            cells = [tables.accuracy(protocols.accuracy(verdicts, protocol)) for protocol in by for verdicts in pair]
            rows.append((name, norm, *cells, tables.points(protocols.compare(*pair, PRIMARY))))
        start, stop = results.scale.part(_CONTRASTING)
        return Table(
            "What the attack's gradient finds",
            (
                "defense",
                "norm",
                *(f"{protocol}, {gradient}" for protocol in by for gradient in ("exact", "published")),
                f"exact − published, {PRIMARY}",
            ),
            rows,
            f"Robust accuracy in %, with 95 % intervals over the first {counted(stop - start, 'image')}, of one attack along "
            "two gradients: the exact one of the steps that run, and a continuous adjoint with the guidance taken for a "
            "constant, as published code has it. Differences in points.",
        )

    def tested(self, results: Results, protocol: str = PRIMARY) -> dict[str, Tested]:
        """What was found, by comparison."""
        found: dict[str, Comparison] = {}
        p: dict[str, float] = {}
        for first, second, norm in self.compared:
            pair = _of(first, norm), _of(second, norm)
            name = f"{first} − {second}, {norm}"
            found[name] = tables.compare(results, *pair, protocol)
            p[name] = _flipped(results, *pair, protocol) if (exact := found[name].p) is None else exact
        adjusted = announced.holm(p)
        return {name: Tested(found[name], p[name], adjusted[name]) for name in found}

    def concludes(self, results: Results) -> list[str]:
        tested = self.tested(results)
        decided = {name: one for name, one in tested.items() if one.decided}
        told = "; ".join(f"{name}: {tables.points(one.found)} points" for name, one in decided.items())
        start, stop = results.scale.part(_JUDGED)
        share, level = _DISCORDANT[1], announced.LEVEL / len(self.compared)
        least, images = announced.detectable(stop - start, share, level), counted(stop - start, "image", "show")
        least_told = "no difference" if least is None else f"no less than {100 * least:.1f} points"
        shows = f"{images} {least_told} at the strictest level"
        said = [
            f"Of {len(self.compared)} announced comparisons {len(decided)} can be told apart by {PRIMARY} after Holm's "
            f"correction{f' ({told})' if told else ''}.",
            f"What cannot be told apart is not equal: where {share:.0%} of images are right by one defense only, {shows} "
            f"(with a chance of {announced.POWER:.0%}). {_disagreed(tested)}",
        ]
        for protocol in _OTHERS:
            other = self.tested(results, protocol)
            against = [name for name, one in decided.items() if one.decided == -other[name].decided]
            said += [f"By {protocol} it is the other way round: {'; '.join(against)}."] if against else []
            more = [f"{name}: {tables.points(one.found)}" for name, one in other.items() if one.decided and name not in decided]
            said += [f"By {protocol}, which was not announced as decisive, also {'; '.join(more)} points."] if more else []
        times = {(name, norm): self.chosen(results.runs, name, norm) for norm in self.norms for name in self.defenses}
        ends = [f"{name} in {norm}" for (name, norm), t in times.items() if t in (min(self.times), max(self.times))]
        if ends:
            said.append(f"At the shortest or longest t* that was tried, so that another may serve better: {', '.join(ends)}.")
        return said + [
            "This is of these networks, of few steps and of one attack: a stronger one can change the order of defenses."
        ]

    def experiment(self) -> Experiment:
        return Experiment(
            name="study",
            place="Study",
            title="guidance under an exact adaptive attack",
            asks="Does COUP's guidance help under an attack that follows the exact gradient, if every defense is taken at the "
            "t* that serves it best?",
            setting="Not of the paper, whose attacks follow another gradient: a question of this project's",
            cases=self.choices(),
            then=self.judged,
            announces=self.announces,
            sections=self.sections,
            concludes=self.concludes,
            alone=True,
            check=self.check,
            assumptions=(
                f"The first {_JUDGED[1]:.0%} of the images judge, and the others choose t*, under a cheaper attack than the "
                "verdict's: accuracies of the one do not compare with those of the other.",
                "The cascade's first stages follow the exact gradient of a purification of fewer steps, and its last one that "
                "of the purification that judges: an image that falls in an early stage never meets the last one's.",
                "The choosing attack goes through as few steps at every t*, and the defense has more at a longer one: the "
                "attack may find less there, and long times be chosen for it.",
                "The published gradient is as published to about 1 % only in the published steps of 1e-3; in fewer it is the "
                "same rule with another error, which the attack's coarse stages have, too.",
                f"The {PRIMARY} decides; other protocols are corrected each for itself, and were not announced as decisive.",
            ),
        )


def _of(name: str, norm: str) -> str:
    return f"{name}, {norm}"


def _published(name: str, norm: str) -> str:
    return f"{name}, {norm}, published gradient"


def _at(name: str, norm: str, t: float) -> str:
    return f"{name}, {norm}, choosing t* = {t:g}"


def _points(difference: float | None) -> str:
    return "none" if difference is None else f"{100 * difference:.1f}"


def _robust(run: Run, protocol: str) -> str:
    attacked = run.verdicts["attacked"]
    if protocol in INSIDE and attacked.inside is None:
        return tables.NONE
    return tables.accuracy(protocols.accuracy(attacked, protocol))


def _flipped(results: Results, first: str, second: str, protocol: str) -> float:
    """p where images' differences are shares, which McNemar's test does not take."""
    pair = protocols.common(results.runs[first].verdicts["attacked"], results.runs[second].verdicts["attacked"])
    one, other = (protocols.scores(verdicts, protocol) for verdicts in pair)
    return announced.sign_flips(one - other)


def _disagreed(tested: Mapping[str, Tested]) -> str:
    """In a sentence, on how many images two compared defenses disagreed."""
    shares = [((one.found.only_first or 0) + (one.found.only_second or 0)) / one.found.images for one in tested.values()]
    return f"Of the images {min(shares):.0%} to {max(shares):.0%} were right by one of a pair only."


def _tested(found: Mapping[str, Tested], protocol: str) -> Table:
    rows = []
    for name, one in found.items():
        only = tables.NONE if one.found.p is None else f"{one.found.only_first} and {one.found.only_second}"
        rows.append((name, tables.points(one.found), only, f"{one.p:.3g}", f"{one.adjusted:.3g}"))
    test = f"{announced.FLIPS:,} flips of the signs of images' differences" if protocol == "average" else "McNemar's exact test"
    return Table(
        f"Differences of robust accuracy, {protocol}",
        ("comparison", "points [95 %]", "right by one only", "p", "p after Holm"),
        rows,
        "Paired: the same images, and of the judge the same noise. Intervals from resampled images and draws, not corrected; "
        f"p by {test}, two-sided.",
    )


def _differences(found: Mapping[str, Tested]) -> Picture:
    axes = new_figure(7.4, 0.42 * len(found) + 1.1).add_subplot()
    rows = np.arange(len(found))[::-1]
    for row, one in zip(rows, found.values(), strict=True):
        colour, mark = COLOURS[bool(one.decided)], "D" if one.decided else "o"
        axes.plot([100 * end for end in one.found.interval], [row, row], "-", color=colour, linewidth=2)
        axes.plot([100 * one.found.difference], [row], mark, color=colour, markersize=6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(rows, list(found), fontsize=8)
    axes.set_xlabel("difference of robust accuracy, points")
    return Picture(
        f"Announced differences, {PRIMARY}",
        to_png(axes.figure),
        "Intervals of 95 %, not corrected. Orange diamonds: told apart after Holm's correction.",
        "A row for each comparison, a difference with its interval, in points: "
        f"{'; '.join(f'{name} {tables.points(one.found)}' for name, one in found.items())}.",
    )


EXPERIMENT = Design(_DEFENSES, _PAIRS, _NORMS, _TIMES, _ATTACK, _CHOOSING_ATTACK, _CONTRASTED).experiment()
