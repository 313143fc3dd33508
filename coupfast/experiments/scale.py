"""How large an experiment is run: on which networks and images, and with how much of the published attack."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from coupfast.data import load_images
from coupfast.evaluation import Spec, suites
from coupfast.evaluation.purification import NO_DEFENSE
from coupfast.models.zoo import load_classifier, load_score, needs_weights

#: What networks there are in an experiment, in words.
ROLES = {
    "score": "score network",
    "classifier": "classifier",
    "second": "second classifier",
    "robust": "adversarially trained classifier",
}
#: Knobs of attacks whose product is the work for an image, with the least that a budget leaves of each; and queries.
_COUNTS = {"iterations": 2, "eot_iter": 1, "target_classes": 1}
_QUERIES = {"queries": 10}
#: Gradients of a continuous adjoint, as published code follows them.
ADJOINTS = ("adjoint", "adjoint-parameters")
#: All images.
WHOLE = (0.0, 1.0)
#: The published number of steps at t = 0.1, one every 1e-3.
PUBLISHED_STEPS, PUBLISHED_T = 100, 0.1


@dataclasses.dataclass(frozen=True)
class Network:
    """A name or file, and the weights of a name that has none; see `load_score` and `load_classifier`."""

    name: str
    weights: str | None = None


@dataclasses.dataclass(frozen=True)
class NetworkSet:
    """Networks that belong together.

    Attributes:
        networks: By role.
        data: Images, as `load_images` takes them.
        sources: Where weights come from that do not ship, by role.
        told: What it is, in words.
    """

    networks: Mapping[str, Network]
    data: str
    sources: Mapping[str, str]
    told: str


SETS = {
    "tiny": NetworkSet(
        {
            "score": Network("cifar10-tiny"),
            "classifier": Network("cifar10-tiny"),
            "second": Network("cifar10-tiny-silu"),
            "robust": Network("resnet18-at"),
        },
        "cifar10-20",
        {},
        "the networks that ship with the package, of which no published figure is: they compare methods with each other",
    ),
    "paper": NetworkSet(
        {
            "score": Network("cifar10-ddpmpp-deep"),
            "classifier": Network("wrn-28-10"),
            "second": Network("wrn-70-16-dropout"),
            "robust": Network("Wang2023Better_WRN-28-10"),
        },
        "cifar10-512",
        {
            "score": "checkpoint_8.pth of vp/cifar10_ddpmpp_deep_continuous, which the authors of Score SDE publish (1.7 GB; "
            "the score_sde repository says where)",
            "classifier": "RobustBench's `Standard` on CIFAR-10, Standard.pt",
            "second": "DiffPure's checkpoint of that name (its repository says where)",
            "robust": "RobustBench's model of that name on CIFAR-10, Linf, which RobustBench downloads",
        },
        "the networks of the paper",
    ),
}


class MissingNetworks(ValueError):
    """Weights that an experiment needs are not there."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """A size to run experiments at. With everything as it is for the set "paper" it is the paper's.

    Attributes:
        networks: Name of the set: "tiny" or "paper".
        roles: Networks in the place of the set's, by role.
        data: Images, as `load_images` takes them; None: the set's.
        images: The first so many; None: all.
        budget: Share of the published work of an attack for an image, in (0, 1]. The counts whose product that work is
            (iterations, draws of a gradient, target classes) are each multiplied by the same root of it, queries by itself.
        steps: Of a purification from t = 0.1, and from other times in proportion; None: as published, one every 1e-3.
        draws: Fresh draws that judge an image.
        paths: Simulated paths of a point, where an experiment simulates.
        gradient: Of the purification, that attacks follow, but for BPDA's, which keep it; None: the one that each is made for.
            The published ones are the adjoints, which take COUP's guidance for a constant.
        seed: All randomness follows from it.
        shard: Images of a unit of work.
        threads, device: See `Spec`.

    Raises:
        ValueError: if a number is out of range or a set or role is unknown.
    """

    networks: str = "tiny"
    roles: Mapping[str, Network] = dataclasses.field(default_factory=dict)
    data: str | None = None
    images: int | None = None
    budget: float = 1.0
    steps: int | None = None
    draws: int = 10
    paths: int = 100_000
    gradient: str | None = None
    seed: int = 121
    shard: int = 16
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.networks not in SETS:
            raise ValueError(f"`networks` is one of {', '.join(SETS)}, got {self.networks!r}")
        if unknown := set(self.roles) - set(ROLES):
            raise ValueError(f"an experiment has no network {sorted(unknown)[0]!r}; it has {', '.join(ROLES)}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"`budget` is the share of the published work, above 0 and at most 1, got {self.budget:g}")
        for name in ("images", "steps", "draws", "paths"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` is at least 1, got {value}")

    @property
    def source(self) -> str:
        """The images."""
        return self.data or SETS[self.networks].data

    def network(self, role: str) -> Network:
        return self.roles.get(role, SETS[self.networks].networks[role])

    @functools.cached_property
    def _loaded(self) -> set[tuple[str, Network]]:
        """Kinds and networks that have loaded."""
        return set()

    def steps_of(self, t: float) -> int:
        """Steps of a purification from time t."""
        return max(1, round((self.steps or PUBLISHED_STEPS) * t / PUBLISHED_T))

    def spec(self, keywords: Mapping[str, Any], *, classifier: str = "classifier", part: tuple[float, float] = WHOLE) -> Spec:
        """A run at this size.

        Args:
            keywords: Of `Spec.of`, as published; `t` among them sets the steps, and the root of the budget of `draws` is the
                least.
            classifier: The role of the network that is attacked.
            part: Of the images, from and to which share of them.
        """
        attacked, score = self.network(classifier), self.network("score")
        said: dict[str, Any] = {
            **self._images(part),
            "classifier": attacked.name,
            "classifier_weights": attacked.weights,
            "seed": self.seed,
            "shard": self.shard,
            "paths": 0,
            "threads": self.threads,
            "device": self.device,
            **keywords,
        }
        said["draws"] = max(self.draws, self.share_of(keywords.get("draws", 1)))
        if keywords.get("method") != NO_DEFENSE:
            # BPDA is its gradient: with another one it would be another attack, by the same name.
            made_for = suites.find(keywords.get("attack", Spec.attack)).gradient
            gradient = None if made_for == "bpda" else self.gradient
            said |= {"score": score.name, "score_weights": score.weights, "gradient": keywords.get("gradient", gradient)}
            if said["gradient"] in ADJOINTS and keywords.get("method") == "coup":
                # As published: COUP's code takes its guidance for a constant there.
                said.setdefault("guidance_gradient", "detached")
            if "t" in keywords:
                said["num_steps"] = self.steps_of(keywords["t"])
        spec = Spec.of(**said)
        return dataclasses.replace(spec, attack_options={**spec.attack_options, **self.scaled(spec)})

    def _images(self, part: tuple[float, float]) -> dict[str, Any]:
        if part == WHOLE:
            return {"images": self.source, "limit": self.images}
        start, stop = self.part(part)
        return {"images": f"{self.source}[{start}:{stop}]", "limit": None}

    def part(self, part: tuple[float, float]) -> tuple[int, int]:
        """The images from one share of them to another.

        Raises:
            ValueError: if there are none in it.
        """
        count = self.images or len(load_images(self.source)[0])
        start, stop = (round(count * share) for share in part)
        if start == stop:
            raise ValueError(f"of {count} images none is between {part[0]:.0%} and {part[1]:.0%} of them: take more (--images)")
        return start, stop

    def scaled(self, spec: Spec) -> dict[str, int]:
        """What the budget leaves of an attack's counts, by knob, and by "STAGE.KNOB" where stages differ; nothing where it is
        the published work."""
        if self.budget == 1:
            return {}
        full, least = sizes(spec), _COUNTS | _QUERIES
        multiplied = [name for name in _COUNTS if full.get(name, 1) > 1]
        share = self.budget ** (1 / max(1, len(multiplied)))
        parts = {name: share for name in multiplied} | {name: self.budget for name in _QUERIES if name in full}
        found: dict[str, int] = {}
        by_stage = sizes_of_stages(spec)
        for name, part in parts.items():
            stages = {stage: counts[name] for stage, counts in by_stage.items() if name in counts}
            left = {stage: min(count, max(least[name], round(count * part))) for stage, count in stages.items()}
            if len(set(left.values())) == 1:
                found[name] = next(iter(left.values()))
            else:
                found |= {f"{stage}.{name}": count for stage, count in left.items()}
        return found

    def share_of(self, count: int) -> int:
        """Of a number of draws, what the budget leaves, as the root of it for two counts."""
        return max(1, round(count * math.sqrt(self.budget)))

    def check(self, roles: Iterable[str], *, experiment: str, otherwise: str) -> None:
        """Load every network once, and none a second time for another experiment.

        Args:
            roles: That are needed.
            experiment: Its name.
            otherwise: What the shipped networks would do instead, in words.

        Raises:
            MissingNetworks: if weights are not there; the message says which, where they come from, how to give them, and what
                the shipped networks would do.
        """
        missing = []
        for role in roles:
            network = self.network(role)
            flag, kind = f"--{role}-weights", "score" if role == "score" else "classifier"
            source = SETS[self.networks].sources.get(role) if role not in self.roles else None
            if (kind, network) in self._loaded:
                continue
            try:
                if network.weights is None and needs_weights(network.name):
                    missing.append(f"{ROLES[role]} {network.name} ({flag} FILE{f'; it is {source}' if source else ''})")
                    continue
                (load_score if kind == "score" else load_classifier)(network.name, weights=network.weights)
                self._loaded.add((kind, network))
            except (ImportError, OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                missing.append(f"{ROLES[role]} {network.name}: {reason}{f' ({flag} FILE; it is {source})' if source else ''}")
        if missing:
            raise MissingNetworks(f"{experiment} lacks weights: {'; '.join(missing)}.{otherwise}")


def sizes_of_stages(spec: Spec) -> dict[str, dict[str, int]]:
    """An attack's counts by stage and knob."""
    return {
        stage: {name: value for name in (*_COUNTS, *_QUERIES) if isinstance(value := getattr(attack, name, None), int)}
        for stage, attack in spec.stages().items()
    }


def sizes(spec: Spec) -> dict[str, int]:
    """An attack's counts by knob, the largest of its stages."""
    found: dict[str, int] = {}
    for counts in sizes_of_stages(spec).values():
        for name, value in counts.items():
            found[name] = max(value, found.get(name, 1))
    return found


QUICK: dict[str, Any] = {"images": 8, "budget": 0.01, "steps": 10, "draws": 4, "paths": 20_000}
#: Where nothing is said, for each set: hours of a core for what attacks much, or the paper's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {"images": 20, "budget": 0.04, "steps": 20, "draws": 10, "paths": 100_000},
    "paper": {"images": 512, "budget": 1.0, "steps": None, "draws": 10, "paths": 100_000},
}
