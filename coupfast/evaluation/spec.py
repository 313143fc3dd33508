"""What to evaluate, as a value: from it follow the defense, the units and the configuration that a ledger keeps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from coupfast.data import load_images
from coupfast.defenses import METHODS
from coupfast.evaluation.attacks import Attack, attack_to_dict, suite, suite_gradient
from coupfast.evaluation.defense import NO_DEFENSE, Defense
from coupfast.evaluation.units import CLEAN, JUDGE, Schedule
from coupfast.evaluation.worker import Rules, chosen, environment
from coupfast.models.zoo import load_classifier, load_score
from coupfast.purify import PurifiedClassifier, Purifier

SEEDINGS = ("unit", "autoattack")


@dataclasses.dataclass(frozen=True)
class Spec:
    """An evaluation. The first fields are the options of `load_images`, `load_score`, `load_classifier` and `Purifier`.

    Attributes:
        method: The purifier's, or "none": the classifier alone.
        gradient: The purifier's; None takes the one that the attack is made for.
        memory_gib: GiB above the weights that a purification may take; None takes the least, which never splits a batch.
        attack: A suite of `coupfast.evaluation.attacks`.
        norm, eps: Of the attack, for images in [0, 1].
        iterations, eot_iter, queries, target_classes, step_size, drop, amount: Of the suite's stages; None as published.
        seed: All randomness follows from it.
        seeding: "unit": every unit has randomness of its own. "autoattack": every attack takes the run's seed and the images
            that still stand are batched anew before each stage, as AutoAttack does it.
        shard: Images of a unit. Results depend on it, as they do on a batch size; never on the number of workers.
        draws: Fresh draws that judge every image, clean and attacked.
        paths: Which images keep their way through the purification for the report: how many, the first ones, or their numbers.
        threads: CPU threads of a worker.
        device: "cpu" or "cuda"; with several workers each "cuda" worker has a GPU of its own.
    """

    images: str = "cifar10-20"
    limit: int | None = None
    score: str = "cifar10-tiny"
    score_weights: str | None = None
    classifier: str = "cifar10-tiny"
    classifier_weights: str | None = None
    activation: str | None = None
    method: str = "coup"
    t: float = 0.1
    num_steps: int | None = None
    guidance_scale: float = 1.0
    solver: str = "euler-maruyama"
    clamp: bool = True
    engine: str = "auto"
    precision: str = "strict"
    gradient: str | None = None
    guidance_gradient: str = "exact"
    memory_gib: float | None = None
    attack: str = "autoattack-rand"
    norm: str = "Linf"
    eps: float = 8 / 255
    iterations: int | None = None
    eot_iter: int | None = None
    queries: int | None = None
    target_classes: int | None = None
    step_size: float | None = None
    drop: str | None = None
    amount: float | None = None
    seed: int = 121
    seeding: str = "unit"
    shard: int = 16
    draws: int = 10
    paths: int | tuple[int, ...] = 4
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.method not in (NO_DEFENSE, *METHODS):
            raise ValueError(f"`method` is one of {', '.join((NO_DEFENSE, *METHODS))}, got {self.method!r}")
        if self.seeding not in SEEDINGS:
            raise ValueError(f"`seeding` is one of {', '.join(SEEDINGS)}, got {self.seeding!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(
                f"`device` is cpu or cuda, got {self.device!r}: workers take one GPU each, from the first; which those are, "
                f"CUDA_VISIBLE_DEVICES says"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` is an integer in [0, 2**63), got {self.seed!r}")
        if not isinstance(self.paths, int):
            object.__setattr__(self, "paths", tuple(sorted(set(self.paths))))  # a list, where it comes from JSON
        if self.paths != () and (self.paths if isinstance(self.paths, int) else self.paths[0]) < 0:
            raise ValueError(f"`paths` is a number of images or their numbers from 0, got {self.paths!r}")
        for name in ("limit", "shard", "draws", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` is at least 1, got {value!r}")
        stages = self.stages()
        if self.gradient == "none" and any(attack.cost().gradient for attack in stages.values()):
            raise ValueError(f"{self.attack!r} follows a gradient, and `gradient` is 'none'")

    def stages(self) -> dict[str, Attack]:
        """The attack's stages by name."""
        names = ("iterations", "eot_iter", "queries", "target_classes", "step_size", "drop", "amount")
        return suite(self.attack, self.norm, self.eps, {name: getattr(self, name) for name in names})

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels.

        Raises:
            ValueError: if there are no labels, or fewer images than `limit`.
        """
        x, y = load_images(self.images, limit=self.limit)
        if y is None:
            raise ValueError(f"{self.images} has no labels, and an accuracy needs them: use subfolders, or an .npz with `y`")
        if self.limit is not None and len(x) < self.limit:
            raise ValueError(f"`limit` asks for {self.limit} images, and {self.images} has {len(x)}")
        return x, y

    def build(self, device: str) -> Defense:
        """The defense on a device."""
        classifier = load_classifier(
            self.classifier, weights=self.classifier_weights, device=device, activation=self.activation
        )
        if self.method == NO_DEFENSE:
            return Defense(classifier)
        score = load_score(self.score, weights=self.score_weights, device=device)
        return Defense(PurifiedClassifier(self.purifier(score, classifier), classifier))

    def purifier(self, score: nn.Module, classifier: nn.Module, gradient: str | None = None) -> Purifier:
        """The purifier around networks that are there; `gradient`, if given, in the place of the run's."""
        return Purifier(
            score,
            classifier,
            method=self.method,
            t=self.t,
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            solver=self.solver,
            clamp=self.clamp,
            engine=self.engine,
            precision=self.precision,
            gradient=gradient or self.gradient or suite_gradient(self.attack),
            guidance_gradient=self.guidance_gradient,  # type: ignore[arg-type]
            memory_budget="least" if self.memory_gib is None else int(self.memory_gib * 2**30),
        )

    def schedule(self, images: int) -> Schedule:
        """The units of a run on that many images."""
        like_autoattack = self.seeding == "autoattack"
        attack_all = self.method != NO_DEFENSE and not like_autoattack
        return Schedule(images, self.shard, tuple(self.stages()), regroup=like_autoattack, attack_all=attack_all)

    def rules(self, defense: Mapping[str, Any]) -> Rules:
        """What a worker needs; `defense` describes the one that it has to build."""
        return Rules(
            attacks=self.stages(),
            seed=self.seed,
            attack_seed=self.seeding == "autoattack",
            draws=self.draws,
            paths=self.paths,
            threads=self.threads,
            environment=environment(torch.device(self.device)),
            defense=defense,
        )

    def cost(self) -> dict[str, int]:
        """Images through the defense for one image at each stage, at most."""
        stages = self.stages()
        attacks = {stage: attack.cost().forward + attack.cost().gradient + 1 for stage, attack in stages.items()}
        return {CLEAN: 1, **attacks, JUDGE: self.draws * (2 if stages else 1)}

    def path_cost(self, images: int) -> int:
        """Images that the judge purifies to show their way, in a run on that many."""
        if self.method == NO_DEFENSE:
            return 0
        # With noise and without.
        return 2 * len(chosen(self.paths, range(images))) * (2 if self.stages() else 1)


def paper(norm: str) -> dict[str, Any]:
    """The fields of a `Spec` that the paper has otherwise: its images, networks, radius and time. Weights are the reader's."""
    networks = {"score": "cifar10-ddpmpp-deep", "classifier": "wrn-28-10"}
    radius = {"eps": 8 / 255, "t": 0.1} if norm == "Linf" else {"eps": 0.5, "t": 0.075}
    return {"images": "cifar10-512", **networks, "norm": norm, **radius}


def configuration(spec: Spec, defense: Defense, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """All that a run's results depend on, as JSON has it."""
    return {
        "spec": json.loads(json.dumps(dataclasses.asdict(spec))),
        "stages": {stage: attack_to_dict(attack) for stage, attack in spec.stages().items()},
        "defense": defense.describe(),
        "images": {"count": len(x), "shape": list(x.shape[1:]), "x_sha256": _sha256(x), "labels": y.tolist()},
        "environment": environment(torch.device(spec.device)),
    }


def _sha256(tensor: torch.Tensor) -> str:
    array = np.ascontiguousarray(tensor.cpu().numpy())
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()
