"""What to evaluate, as a value: from it follow the defense, the attacks and the units of work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch

from coupfast.data import CIFAR10_CLASSES, load_images
from coupfast.environment import machine
from coupfast.evaluation import purification, suites
from coupfast.evaluation.attacks import PGD, Attack, Cost, InBall, Iterative, knobs
from coupfast.evaluation.building import Builder, Named, Networks
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.purification import NO_DEFENSE
from coupfast.evaluation.units import CLEAN, JUDGE, Schedule
from coupfast.evaluation.worker import chosen
from coupfast.gradients import NoGradient
from coupfast.methods import method_name
from coupfast.naming import reference_to
from coupfast.options import check_name, did_you_mean
from coupfast.settings import Settings

SEEDINGS = ("unit", "autoattack")
MODES = ("full", "fast")
#: What a ledger says in the place of a name, where images or a defense were objects that Python had.
GIVEN = "given from Python"
#: Names that other libraries have for what attacks are told.
_ELSEWHERE = {"n_iter": "iterations", "n_queries": "queries", "epsilon": "eps"}
AUTO = "auto"  # as many workers as fit
#: Fields of a defense that is built from networks here.
NETWORKS = ("score", "score_weights", "classifier", "classifier_weights", "activation", "guide", "guide_weights")


@dataclasses.dataclass(frozen=True)
class Spec:
    """An evaluation. The first fields are the options of `load_images`, `load_score` and `load_classifier`.

    Attributes:
        classes: Names of the classes in the order of their labels, for images in subfolders; None takes CIFAR-10's.
        purifier: `Settings`, or those keywords of `Settings.of` that are not its defaults (the gradient's is the one that the
            attack is made for, in as much memory as half of what is free, no batch split). None: the classifier alone.
        guide, guide_weights: The classifier that a guided method follows, in the place of the one that is attacked.
        defense: The name of a defense in the place of networks and purifier, "file.py:build" or "package.module:NAME".
        attack: A suite's name, "package.module:NAME" of an attack or a suite, or the object itself. "recommended" is what
            `suites.RECOMMENDATION` says and why: an attack and a mode, which the spec has in the place of that name.
        attack_options: Knobs of the attack to set, in every stage that has them, or as "STAGE.KNOB" in one stage; the others as
            published.
        norm, eps: Of the attack, for images in [0, 1]; None takes those of an attack that is given as an object, else Linf and
            8/255.
        start_from: Folder of a finished run that attacked these images, as their hashes say, on whatever defense and in
            whatever ball: every stage begins at the strongest images that were found there, moved to the nearest point of its
            own ball, and not at the clean ones (further restarts do). For attacks of this project in a ball.
        seed: All randomness follows from it.
        seeding: "unit": every unit has randomness of its own. "autoattack": every attack takes the run's seed and the images
            that still stand are batched anew before each stage, as AutoAttack does it.
        mode: "full": every image goes through all of an attack, and on to the next stage if one fresh draw after it is right.
            "fast": an image leaves an attack of this project's once a test says that most draws fail (`drop` "majority", with
            its stated error), another one of its unit takes its place (`batch`, a quarter of a unit unless set), and all others
            go on to the next stage, whatever one draw says. Where `drop` is set, images leave by that rule. Attacks that know
            the judge's noise (`dw_box`), and those that are given as objects, keep to their knobs; AutoAttack's are the same in
            both. None is "full", or what is recommended with the attack "recommended".
        shard: Images of a unit. Results depend on it, as they do on a batch size; never on the number of workers.
        draws: Fresh draws that judge every image, clean and attacked.
        paths: Which images keep their way through the purification for the report: how many, the first ones, or their numbers.
        threads: CPU threads of a worker.
        device: "cpu" or "cuda"; with several workers each "cuda" worker has a GPU of its own.

    Raises:
        ValueError: if a field has a value that makes no sense, or two of them contradict each other.

    Example:
        >>> import coupfast
        >>> spec = coupfast.Spec.of(images="cifar10-20", t=0.06, num_steps=20, attack="autoattack-rand", iterations=10)
        >>> spec.purifier, spec.attack_options
        ({'num_steps': 20, 't': 0.06}, {'iterations': 10})
    """

    images: str = "cifar10-20"
    limit: int | None = None
    classes: tuple[str, ...] | None = None
    score: str = "cifar10-tiny"
    score_weights: str | None = None
    classifier: str = "cifar10-tiny"
    classifier_weights: str | None = None
    activation: str | None = None
    guide: str | None = None
    guide_weights: str | None = None
    purifier: purification.Asked | None = dataclasses.field(default_factory=dict)
    defense: str | None = None
    attack: suites.Asked = "autoattack-rand"
    attack_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    norm: str | None = None
    eps: float | None = None
    start_from: str | None = None
    seed: int = 0
    seeding: str = "unit"
    mode: str | None = None
    shard: int = 16
    draws: int = 10
    paths: int | tuple[int, ...] = 4
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.seeding not in SEEDINGS:
            raise ValueError(f"`seeding` is one of {', '.join(SEEDINGS)}, got {self.seeding!r}")
        if self.attack == suites.RECOMMENDED:
            said = suites.RECOMMENDATION
            own = {name: value for name, value in self.attack_options.items() if value is not None}
            self._set(attack=said.attack, mode=self.mode or said.mode, attack_options={**said.options, **own})
        self._set(mode=self.mode or "full")
        check_name("mode", str(self.mode), MODES)
        if self.mode == "fast" and self.seeding == "autoattack":
            raise ValueError("`seeding` 'autoattack' attacks what AutoAttack would, and `mode` 'fast' does not: choose one")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(
                f"`device` is cpu or cuda, got {self.device!r}: workers take one GPU each, from the first; which those are, "
                f"CUDA_VISIBLE_DEVICES says"
            )
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` is an integer in [0, 2**63), got {self.seed!r}")
        if self.classes is not None:
            self._set(classes=tuple(self.classes))
        if not isinstance(self.paths, int):
            self._set(paths=tuple(sorted(set(self.paths))))  # a list, where it comes from JSON
        if self.paths != () and (self.paths if isinstance(self.paths, int) else self.paths[0]) < 0:
            raise ValueError(f"`paths` is a number of images or their numbers from 0, got {self.paths!r}")
        for name in ("limit", "shard", "draws", "threads"):
            if (value := getattr(self, name)) is not None and (not _is_int(value) or value < 1):
                raise ValueError(f"`{name}` is at least 1 and a whole number, got {value!r}")
        if isinstance(self.purifier, Mapping):
            others = {name for name in self.purifier if name != "method"}
            if others and self.purifier.get("method") == NO_DEFENSE:
                raise ValueError(f"{_list(sorted(others))} of a purifier, and with method {NO_DEFENSE!r} there is none")
            self._set(purifier=None if self.purifier.get("method") == NO_DEFENSE else dict(self.purifier))
        if self.defense is not None:
            self.refuse_own_defense()
        self._set(attack_options={name: value for name, value in self.attack_options.items() if value is not None})
        ball: dict[str, Any] = {}
        if isinstance(self.attack, Attack):
            ball = {name: getattr(self.attack, name) for name in ("norm", "eps") if name in knobs.names(self.attack)}
        for key, published in (("norm", "Linf"), ("eps", 8 / 255)):
            value = getattr(self, key)
            if value is None:
                self._set(**{key: ball.get(key, published)})
            elif value != ball.get(key, value):
                raise ValueError(f"`{key}` is {value!r}, and the attack that is given has {ball[key]!r}: say it there only")
        stages = self.stages()
        if "error" in self.attack_options and all(getattr(attack, "drop", None) != "majority" for attack in stages.values()):
            raise ValueError(
                "`error` is of a test by which images leave, and no stage has it: set `mode` to 'fast', or `drop` to 'majority'"
            )
        if self.start_from is not None:
            self._set(start_from=str(self.start_from))
            _check_begins_elsewhere(stages)
        settings = self.settings()
        if self.guide is not None and not (settings and settings.method.guided):
            what = "no method does here" if settings is None else f"{method_name(settings.method)!r} does not"
            raise ValueError(f"`guide` is for a method that follows a classifier, and {what}")
        if self.guide_weights is not None and self.guide is None:
            raise ValueError("`guide_weights` belong to a `guide`, and none is named")
        if settings and settings.gradient.name == NoGradient.name and any(attack.cost().gradient for attack in stages.values()):
            raise ValueError(f"{self.suite.name!r} follows a gradient, and `gradient` is 'none'")

    @classmethod
    def of(cls, **keywords: Any) -> Spec:
        """A spec from flat keywords: its fields, a purifier's (`t`, `num_steps`, …; `method="none"` for the classifier alone)
        and the attack's knobs (`iterations`, …), each put where it belongs. None is what is not said. What an attack calls as
        some method does (`step_size`, `rate`, `rounds`) is the method's if the one that is asked for has it, and then the
        attack's is said in `attack_options`; else it is the attack's.

        Raises:
            ValueError: if nothing has a keyword, or two contradict each other.
        """
        said = {name: value for name, value in keywords.items() if value is not None or name == "purifier"}
        fields = {field.name for field in dataclasses.fields(cls)}
        base = said.get("purifier")
        named = base.method if isinstance(base, Settings) else (base or {}).get("method")
        known = purification.keywords(said.get("method", named))
        attack = suites.find(said.get("attack", cls.attack))
        of_attack = set(attack.options()) - set(purification.of_method(said.get("method", named)))
        known = [name for name in known if name not in of_attack]
        if flat := {name: said.pop(name) for name in known if name in said and name not in fields}:
            base = said.get("purifier") or {}
            if flat.get("method") == NO_DEFENSE:
                said["purifier"] = flat
            else:
                said["purifier"] = Settings.of(base, **flat) if isinstance(base, Settings) else {**base, **flat}
        knobs_of_attacks = {name for suite in (attack, *suites.SUITES.values()) for name in suite.options()}
        of_attacks = [name for name in said if name not in fields and (name in knobs_of_attacks or "." in name)]
        options = {name: said.pop(name) for name in of_attacks}
        if options:
            said["attack_options"] = {**said.get("attack_options", {}), **options}
        if unknown := sorted(set(said) - fields):
            hint = did_you_mean(_ELSEWHERE.get(unknown[0], unknown[0]), [*fields, *known, *attack.options()])
            raise ValueError(f"an evaluation has no {', '.join(unknown)} to set{hint}")
        return cls(**said)

    def but(self, **keywords: Any) -> Spec:
        """This one with flat keywords (see `of`) in the place of what it has."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if keywords.get("attack") == suites.RECOMMENDED:  # with the mode that goes with it
            fields |= {"mode": None}
        if keywords.get("attack") not in (None, self.attack):  # what was set was the other attack's
            fields |= {"attack_options": {}}
            if isinstance(self.attack, Attack) or isinstance(keywords["attack"], Attack):
                fields |= {"norm": None, "eps": None}
        said = {name: value for name, value in keywords.items() if value is not None or name == "purifier"}
        return Spec.of(**{**fields, **said})

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it. An attack that is an object becomes its name and its knobs."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        attack = self.attack
        if isinstance(attack, Attack):
            values = {name: getattr(attack, name) for name in knobs.names(attack) if name not in ("norm", "eps")}
            fields["attack_options"] = {**values, **self.attack_options}
            attack = type(attack)
        if isinstance(attack, type):
            fields["attack"] = reference_to(attack)
        elif not isinstance(attack, str):
            fields["attack"] = attack.name
        fields["purifier"] = purification.to_json(self.purifier, made_for=self.suite.gradient)
        made: dict[str, Any] = json.loads(json.dumps(fields))
        return made

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Spec:
        """What `to_dict` was made of, as far as names lead there.

        Raises:
            ValueError: if an attack or a method is not where it was.
        """
        return cls(**{**fields, "purifier": purification.from_json(fields["purifier"])})

    def settings(self) -> Settings | None:
        """How the defense that is built here purifies; None where it does not, or another one is given."""
        if self.purifier is None or self.defense is not None:
            return None
        return purification.settings_of(self.purifier, made_for=self.suite.gradient)

    @property
    def suite(self) -> suites.Suite:
        return suites.find(self.attack)

    def stages(self) -> dict[str, Attack]:
        """The attack's stages by name."""
        assert self.norm is not None and self.eps is not None  # `__post_init__`
        stages = self.suite.stages(self.norm, self.eps, self.attack_options)
        if self.mode == "fast":
            return {stage: self._fast(stage, attack) for stage, attack in stages.items()}
        return stages

    def _fast(self, stage: str, attack: Attack) -> Attack:
        if not isinstance(attack, Iterative) or isinstance(self.attack, Attack) or attack.dw_box:
            return attack
        said = self.attack_options.keys() & {"drop", f"{stage}.drop"}
        drop = attack.drop if said else "majority"
        if drop == "never":
            return attack
        return dataclasses.replace(attack, drop=drop, batch=attack.batch or max(1, self.shard // 4))

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels.

        Raises:
            ValueError: if there are no labels, or fewer images than `limit`.
        """
        x, y = load_images(self.images, limit=self.limit, classes=self.classes or CIFAR10_CLASSES)
        if y is None:
            raise ValueError(f"{self.images} has no labels, and an accuracy needs them: use subfolders, or an .npz with `y`")
        if self.limit is not None and len(x) < self.limit:
            raise ValueError(f"`limit` asks for {self.limit} images, and {self.images} has {len(x)}")
        return x, y

    def builder(self) -> Builder:
        """What builds the defense on a device; it can be sent to other processes."""
        return self.networks() if self.defense is None else Named(self.defense)

    def networks(self) -> Networks:
        """What builds the defense from the networks."""
        return Networks(**{name: getattr(self, name) for name in NETWORKS}, settings=self.settings())

    def build(self, device: str) -> Metered:
        """The defense on a device."""
        return Metered(self.builder()(device))

    def refuse_own_defense(self) -> None:
        """ValueError if there are options of a defense that is built from networks here, beside one that is given."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        said = [name for name in NETWORKS if getattr(self, name) != default[name]]
        said += list(self.purifier) if isinstance(self.purifier, Mapping) else ["purifier"]
        if said:
            raise ValueError(
                f"{_list(said)} of a defense that is built here, and `defense` gives another one: set them where that is made"
            )

    def schedule(self, images: int, *, attack_all: bool) -> Schedule:
        """The units of a run on that many images; `attack_all` where the defense has noise."""
        regroup = self.seeding == "autoattack"
        return Schedule(images, self.shard, tuple(self.stages()), regroup=regroup, attack_all=attack_all and not regroup)

    def fitting(self, workers: int | str, images: int) -> int:
        """How many workers a run on that many images has. "auto": a CPU's cores by `threads`, or all GPUs, but none without a
        unit: several workers with a thread each do more than one with several threads (`bench/workers.py`).
        """
        if isinstance(workers, int):
            return workers
        places = machine()["cores"] // self.threads if self.device == "cpu" else torch.cuda.device_count()
        return max(1, min(places, -(-images // self.shard)))

    def costs(self) -> dict[str, Cost]:
        """What one image takes at each stage, at most; of an attack with the verdict on one fresh draw that follows it, of the
        judge with the draws on which it chooses among several stages' forms."""
        stages = self.stages()
        attacks = {stage: attack.cost() for stage, attack in stages.items()}
        attacks = {stage: dataclasses.replace(cost, forward=cost.forward + 1) for stage, cost in attacks.items()}
        chooses = self.draws * len(stages) if len(stages) > 1 else 0
        return {CLEAN: Cost(1, 0), **attacks, JUDGE: Cost(self.draws * (2 if stages else 1), 0, again=chooses)}

    def path_cost(self, images: int) -> int:
        """Images that the judge of a purifier purifies to show their way, in a run on that many."""
        # With noise and without.
        return 2 * len(chosen(self.paths, range(images))) * (2 if self.stages() else 1)

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)


def in_fast_mode(configuration: Mapping[str, Any]) -> str:
    """Behind an attack's name, that the mode is the fast one; "" where it is not, or no stage lets an image go. Of a ledger's
    configuration."""
    drops = any(stage.get("drop", "never") != "never" for stage in configuration["stages"].values())
    return " in fast mode" if drops and configuration["spec"].get("mode") == "fast" else ""


def checked_workers(workers: int | str) -> int | str:
    """A number of workers as it came in, or ValueError."""
    if workers != AUTO and (not isinstance(workers, int) or workers < 1):
        raise ValueError(f"`workers` is at least 1, or {AUTO!r}, got {workers!r}")
    return workers


def paper(norm: str) -> dict[str, Any]:
    """Keywords of `Spec.of` that the paper has otherwise: images, networks, radius, time, seed. Weights are the reader's."""
    networks = {"score": "cifar10-ddpmpp-deep", "classifier": "wrn-28-10"}
    radius = {"eps": 8 / 255, "t": 0.1} if norm == "Linf" else {"eps": 0.5, "t": 0.075}
    return {"images": "cifar10-512", **networks, "norm": norm, **radius, "seed": 121}


def _check_begins_elsewhere(stages: Mapping[str, Attack]) -> None:
    """ValueError if an attack cannot begin at images of another run."""
    if not stages:
        raise ValueError("`start_from` is where an attack begins, and there is none")
    for stage, attack in stages.items():
        if not isinstance(attack, InBall):
            raise ValueError(
                f"`start_from` is for attacks of this project in a ball (pgd-eot, diffhammer, transfer, cascade, bpda-eot), "
                f"and {stage} is {type(attack).__name__}, which begins by itself"
            )
        if isinstance(attack, PGD) and attack.random_start:
            raise ValueError(f"`random_start` of {stage} and `start_from` both say where it begins: choose one")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list(names: Any) -> str:
    names = list(names)
    return f"`{'`, `'.join(names)}` {'is' if len(names) == 1 else 'are'}"
