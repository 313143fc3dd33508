"""Units of work: a shard of images and a stage. Which there are follows from what earlier ones found."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

CLEAN, JUDGE = "clean", "judge"


@dataclasses.dataclass(frozen=True)
class Unit:
    """One shard at one stage.

    Attributes:
        stage: `CLEAN`, an attack's stage, or `JUDGE`.
        index: Which shard of the stage.
        images: The images (by position in the run's set) that it works on.
    """

    stage: str
    index: int
    images: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.index:05d}"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order of the work.

    Images that a stage fooled are not attacked again. Every shard runs through the stages by itself, so a shard is attacked
    in the same company wherever and whenever it runs. With `regroup`, a stage starts when the one before is done for all
    images, and shards are cut from those that still stand, as AutoAttack cuts its batches.

    Attributes:
        images: How many images.
        shard: Images of a shard.
        attacks: Stages of the attack, in order; `CLEAN` comes before and `JUDGE`, on all images, after them.
        regroup: Cut the standing images into new shards before every stage.
        attack_all: Attack images that the clean verdict found misclassified, too: a randomized defense may be right about them
            in the next draw, and is judged on many.
    """

    images: int
    shard: int
    attacks: tuple[str, ...]
    regroup: bool = False
    attack_all: bool = False

    def ready(self, standing: Mapping[str, Sequence[int]]) -> list[Unit]:
        """Units that are not done and whose images are known.

        Args:
            standing: For every unit that is done, by name, those of its images that go on: that were not fooled.
        """
        units: list[Unit] = []
        everything = tuple(range(self.images))
        groups = [everything] if self.regroup else _cut(everything, self.shard)
        for number, group in enumerate(groups):
            left = group
            for stage in (CLEAN, *self.attacks, JUDGE):
                images = group if stage == JUDGE else left
                stage_units = [Unit(stage, number + i, part) for i, part in enumerate(_cut(images, self.shard))]
                waiting = [unit for unit in stage_units if unit.name not in standing]
                units += waiting
                if waiting:
                    break
                if stage != CLEAN or not self.attack_all:
                    left = tuple(image for unit in stage_units for image in standing[unit.name])
        return units


def derive_seed(seed: int, *names: str) -> int:
    """63 bits from a run's seed and names: the same on every machine and in every Python."""
    text = "/".join([str(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _cut(images: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return [images[start : start + size] for start in range(0, len(images), size)]
