"""What an experiment is: data. Its runs, what is measured beside them, the tables and figures made of both, published figures,
assumptions, and what may be concluded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from coupfast.evaluation import Spec
from coupfast.evaluation.report import Run, Section
from coupfast.experiments.announced import Announcement
from coupfast.experiments.scale import WHOLE, Scale

#: Beside what is measured: the environment that measured it, as JSON.
SOFTWARE = "measured by"


@dataclasses.dataclass(frozen=True)
class Case:
    """A run that an experiment is made of.

    Attributes:
        name: What tables and figures call it; unique in an experiment.
        keywords: Of `Spec.of`, at the published size.
        classifier: Role of the network that is attacked.
        part: Of the images, from and to which share of them.
    """

    name: str
    keywords: Mapping[str, Any]
    classifier: str = "classifier"
    part: tuple[float, float] = WHOLE

    def spec(self, scale: Scale) -> Spec:
        return scale.spec(self.keywords, classifier=self.classifier, part=self.part)

    @property
    def roles(self) -> tuple[str, ...]:
        """The networks that it needs."""
        return (self.classifier,) if self.keywords.get("method") == "none" else ("score", self.classifier)


@dataclasses.dataclass(frozen=True)
class Results:
    """What there is to make tables and figures of.

    Attributes:
        scale: That it was made at.
        runs: By the name of their case, in order.
        measured: See `Experiment.measure`; and under `SOFTWARE`, what measured it.
        cases: Of the runs, those of `Experiment.then` among them.
        announced: What `Experiment.announces` was written down as, with `at`, the time; empty where nothing is.
    """

    scale: Scale
    runs: Mapping[str, Run]
    measured: Mapping[str, np.ndarray]
    cases: Sequence[Case] = ()
    announced: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment of the paper.

    Attributes:
        name: As the command line has it.
        place: In the paper: "Table 1".
        title: What it is, in a few words.
        asks: What it asks, in a sentence or two.
        setting: As published, in words.
        sections: Makes tables and pictures.
        concludes: Makes sentences: what one may conclude. The first is the headline.
        cases: The runs.
        then: Makes more of them, from what the first ones found.
        announces: What is said before the first run: kept with its date.
        measure: What else is computed, arrays by name; it is given the size, and the folders of the runs. Kept, and not
            computed again for equal runs.
        version: Of `measure`: what is kept of another is computed again.
        roles: Networks that are needed beside those of the cases.
        times: That `measure` purifies from, beside those of the cases.
        assumptions: Where the paper's text lost a number or does not say it: what is assumed, and other differences that do not
            follow from the size.
        differs: What of the setting differs from the published one, whatever the size.
        simulates: Whether `Scale.paths` is a part of it, and images are not.
        images: How many the published evaluation has.
        alone: Whether it runs only if it is named: "all" leaves it out.
        lacks: What it needs that does not ship, in a few words.
        check: What must hold before any work; raises an error that says what to do.

    Raises:
        ValueError: if two of its runs have one name.
    """

    name: str
    place: str
    title: str
    asks: str
    setting: str
    sections: Callable[[Results], list[Section]]
    concludes: Callable[[Results], list[str]]
    cases: Sequence[Case] = ()
    then: Callable[[Mapping[str, Run]], Sequence[Case]] | None = None
    announces: Callable[[Scale], Announcement] | None = None
    measure: Callable[[Scale, Mapping[str, str]], dict[str, np.ndarray]] | None = None
    version: int = 1
    roles: tuple[str, ...] = ()
    times: tuple[float, ...] = ()
    assumptions: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    simulates: bool = False
    images: int = 512
    alone: bool = False
    lacks: str = ""
    check: Callable[[Scale], None] = lambda scale: None

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name} has two runs of one name: {', '.join(names)}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The networks that it needs, by role."""
        return tuple(dict.fromkeys([*(role for case in self.cases for role in case.roles), *self.roles]))
