"""Does one unit: attack, verdict, judgement. All its randomness follows from the run's seed and the unit's name."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coupfast.engine.memory import share_memory
from coupfast.evaluation.attacks import Attack, InBall, Result
from coupfast.evaluation.attacks.losses import ce
from coupfast.evaluation.building import Builder
from coupfast.evaluation.configuration import difference, environment
from coupfast.evaluation.journal import Journal, JournalError
from coupfast.evaluation.journal import path_of as journal_path
from coupfast.evaluation.ledger import DATABASE, FORM, Outcome
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.recorder import Recorder
from coupfast.evaluation.units import CLEAN, JUDGE, Unit, derive_seed
from coupfast.evaluation.views import Known

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """A unit and its images: `x` and `y`, for an attack `x_start` if it begins elsewhere, and for the judge `x_adv` where there
    was an attack. Of images that several stages made another form of, these are `form_0`, `form_1`, …, and `form_0_of`, … are
    their places in the unit."""

    unit: Unit
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a worker has to know of a run.

    Attributes:
        attacks: Stages by name.
        seed: The run's.
        attack_seed: Every attack takes the run's seed as it is, as AutoAttack does, and not one of its unit.
        draws: Fresh draws that judge each image.
        paths: Which images keep their way through the purification; see `chosen`.
        threads: Of a worker.
        environment: Where the run was started; see `configuration.environment`.
        defense: What the run was started with; see `Metered.describe`.
        folder: Of the run, where a unit that is under way keeps a journal; None keeps none.
        fast: What an attack says of who has fallen decides who goes on to the next stage, and not the official verdict.
        sharers: Workers of one machine, which share its memory.
    """

    attacks: Mapping[str, Attack]
    seed: int
    attack_seed: bool
    draws: int
    paths: int | Sequence[int]
    threads: int
    environment: Mapping[str, Any]
    defense: Mapping[str, Any]
    folder: str | None = None
    fast: bool = False
    sharers: int = 1


def chosen(paths: int | Sequence[int], images: Sequence[int]) -> list[int]:
    """Where in `images` those are that keep their way through the purification: the first ones of a run, or the ones named."""
    return [i for i, image in enumerate(images) if (image < paths if isinstance(paths, int) else image in paths)]


class Worker:
    """Builds its defense once, then does units.

    Args:
        rules: The run's.
        build: Makes the defense on a device; every worker calls it for itself.
        device: Where.

    Raises:
        ValueError: if its weights, software or processor would not give the bits that the run has.
    """

    def __init__(self, rules: Rules, build: Builder, device: str) -> None:
        self.rules, self.device = rules, torch.device(device)
        share_memory(rules.sharers)
        with self._settings():
            self.defense = Metered(build(device))
            self.defense.settle(rules.defense)
        wanted = {"environment": dict(rules.environment), "defense": dict(rules.defense)}
        if changed := difference(wanted, {"environment": environment(self.device), "defense": self.defense.describe()}):
            raise ValueError(
                f"this worker would not give the same bits: {changed}; all workers of a run need equal weights, software and "
                f"processors of one kind"
            )

    def execute(self, task: Task, passed: Callable[[int], object] | None = None) -> Outcome:
        """The same task gives the same bits on every worker. `passed` is told of images that are through the defense."""
        started = time.monotonic()
        self.defense.reset()
        self.defense.passed = passed
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._settings():
            # What comes through shared memory, as Ray's does, cannot be written to, and an attack may work in place.
            own = {name: array if array.flags.writeable else array.copy() for name, array in task.arrays.items()}
            inputs = {name: torch.from_numpy(array).to(self.device) for name, array in own.items()}
            do = self._judge if task.unit.stage == JUDGE else self._attack
            with self._recorded(task, inputs["x"]) as before:
                result, tensors = do(task.unit, inputs)
        return Outcome(
            name=task.unit.name,
            result=result,
            arrays={name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()},
            forward_images=self.defense.forward_images,
            gradient_images=self.defense.gradient_images,
            seconds=before + time.monotonic() - started,
            peak_bytes=self._peak_bytes(),
            gradients=self.defense.gradients,
            zero_gradients=self.defense.zero_gradients,
            nonfinite_gradients=self.defense.nonfinite_gradients,
        )

    @contextlib.contextmanager
    def _recorded(self, task: Task, x: torch.Tensor) -> Iterator[float]:
        """The defense's answers go into the unit's journal, and come from it as far as it goes; gives the seconds before it."""
        journal = self._journal(task)
        if journal is None:
            yield 0.0
            return
        try:
            # Of a single call nothing is mixed: there is no need to know the defense again.
            probe = None if task.unit.stage == CLEAN else x[:1]
            with contextlib.closing(Recorder(self.defense, journal, self.device, probe)) as recorder:
                self.defense.recorder = recorder
                yield journal.seconds_before
        finally:
            self.defense.recorder = None
            journal.close()

    def _journal(self, task: Task) -> Journal | None:
        folder = self.rules.folder
        if folder is None:
            return None
        if not (Path(folder) / DATABASE).is_file():
            logger.warning(
                "a worker cannot reach %s from where it runs, which is no file system that it shares with the run: units there "
                "begin again if they are stopped",
                folder,
            )
            return None
        rules = self.rules
        attack = rules.attacks.get(task.unit.stage)
        about = {
            "unit": dataclasses.asdict(task.unit),
            "arrays": {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in task.arrays.items()},
            "attack": None if attack is None else attack.to_dict(),
            "seed": rules.seed,
            "attack_seed": rules.attack_seed,
            "fast": rules.fast,
            "draws": rules.draws,
            "paths": rules.paths,
            "threads": rules.threads,
            "environment": dict(rules.environment),
            "defense": dict(rules.defense),
        }
        try:
            # A worker that this one replaces may take a moment to die.
            return Journal(journal_path(folder, task.unit.name), about, patience=30.0)
        except JournalError:
            raise
        except OSError as error:
            logger.warning("unit %s keeps no journal (%s): it begins again if it is stopped", task.unit.name, error)
            return None

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # which only POSIX systems have, as a run needs it

        # In KiB but for macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _attack(self, unit: Unit, inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        x, y, seed = inputs["x"], inputs["y"], self.rules.seed
        found, fresh, attack = Result(x), True, self.rules.attacks.get(unit.stage)
        if attack is not None:
            noise = derive_seed(seed, unit.name, "defense")
            if attack.knows_noise:
                noise, fresh = derive_seed(seed, JUDGE), False  # of such draws no verdict inside of the attack is told
                self.defense.known = Known(noise, unit.images, self.rules.draws)
            self.defense.reseed(noise)
            attack_seed = seed if self.rules.attack_seed else derive_seed(seed, unit.name, "attack")
            try:
                if (x_start := inputs.get("x_start")) is None:
                    found = attack.run(self.defense, x, y, seed=attack_seed)
                else:
                    assert isinstance(attack, InBall)  # a spec with other attacks has no start
                    found = attack.run(self.defense, x, y, seed=attack_seed, x_start=x_start)
            finally:
                self.defense.known = None
        # One draw that the attack has not seen; where it knows the judge's, the first of these.
        names: dict[str, Any] = {} if fresh else {"ids": torch.tensor(unit.images), "draw": 0}
        self.defense.reseed(derive_seed(seed, unit.name, "verdict") if fresh else derive_seed(seed, JUDGE))
        with torch.no_grad():
            logits = self.defense(found.x_adv, **names)
        predictions = logits.argmax(dim=1)
        right = (predictions == y).tolist()
        result = {
            "predictions": predictions.tolist(),
            "standing": [image for image, stands in zip(unit.images, right, strict=True) if stands],
            "curve": list(found.curve),
        }
        if self.rules.fast and found.left is not None and getattr(attack, "drop", None) != "never":
            result["onward"] = [image for image, left in zip(unit.images, found.left.tolist(), strict=True) if not left]
        if found.looked is not None and fresh:
            result |= {"looked": found.looked.tolist(), "looks": found.looks}
        tensors = {"logits": logits} | ({} if unit.stage == CLEAN else {"x_adv": found.x_adv})
        if found.strongest is not None and found.loss is not None and found.failed is not None:
            tensors |= {"x_strongest": found.strongest, "loss": found.loss, "failed": found.failed}
        return result, tensors

    def _judge(self, unit: Unit, inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        # By image and draw and nothing else: two defenses in runs of equal seeds meet the same noise.
        seed = derive_seed(self.rules.seed, JUDGE)
        ids = torch.tensor(unit.images)
        result: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        if "form_0" in inputs:
            tensors[FORM], x_adv = self._strongest(ids, inputs)
            inputs = {**inputs, "x_adv": x_adv}
        for kind, name in (("clean", "x"), ("attacked", "x_adv")):
            if name not in inputs:
                continue
            logits = self._draw(inputs[name], ids, seed)
            tensors[f"{kind}_logits"] = logits
            if kind == "attacked":
                same = (inputs["x"] == inputs["x_adv"]).flatten(1).all(dim=1).tolist()
                result["unchanged"] = [image for image, is_same in zip(unit.images, same, strict=True) if is_same]
            result[kind] = logits.argmax(dim=2).tolist()
            shown = chosen(self.rules.paths, unit.images)
            if shown:
                path = self._path(kind, inputs[name][shown], ids[shown], seed)
                tensors |= {f"{kind}_{name}": tensor for name, tensor in path.items()}
        return result, tensors

    def _draw(self, x: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
        """Logits of the judge's draws, (draws, images, classes)."""
        rows = []
        for draw in range(self.rules.draws):
            self.defense.reseed(seed, draw)
            with torch.no_grad():
                if self.defense.purified is None:
                    torch.manual_seed(derive_seed(seed, str(draw)))
                rows.append(self.defense(x, ids=ids, draw=draw))
        return torch.stack(rows)

    def _strongest(self, ids: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Which form of each image is judged, −1 where there is one only, and the images in these forms.

        Stages saw their forms on draws of their own, and each chose among other numbers of points, of which the luckiest seems
        the strongest. So all forms of an image meet as many fresh draws, and of a purification the same ones, which judge
        nothing: the one goes on of which most fail, of equal ones that of the highest mean cross-entropy. An attack that knows
        the judge's draws chooses by these.
        """
        known = any(attack.knows_noise for attack in self.rules.attacks.values())
        seed = derive_seed(self.rules.seed, JUDGE, *([] if known else ["forms"]))
        x_adv, y = inputs["x_adv"].clone(), inputs["y"]
        chosen = torch.full_like(y, -1)
        most_failed = torch.full(y.shape, -1.0, device=y.device)
        highest = torch.full(y.shape, -math.inf, device=y.device)
        for number in itertools.takewhile(lambda number: f"form_{number}" in inputs, itertools.count()):
            x, places = inputs[f"form_{number}"], inputs[f"form_{number}_of"]
            logits = self._draw(x, ids[places.cpu()], seed)
            failed = (logits.argmax(dim=2) != y[places]).float().mean(dim=0)
            loss = torch.stack([ce(each.float(), y[places]) for each in logits]).mean(dim=0)
            stronger = (failed > most_failed[places]) | (failed == most_failed[places]) & (loss > highest[places])
            these = places[stronger]
            chosen[these], x_adv[these] = number, x[stronger]
            most_failed[these], highest[these] = failed[stronger], loss[stronger]
        return chosen, x_adv

    def _path(self, kind: str, x: torch.Tensor, ids: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
        """Images through the purification: what comes out at draw 0, and confidences on the way without noise."""
        purified = self.defense.purified
        if purified is None:
            return {"images": x}
        self.defense.forward_images += 2 * len(x)  # past the defense's own count

        def purify() -> list[torch.Tensor]:
            return [purified.purifier(x, seed=seed, ids=ids, draw=0)]

        def follow() -> list[torch.Tensor]:
            # As in the paper's Fig. 2a: "to focus on the purification process, we do not consider Brownian motion".
            silence = x.new_zeros(purified.purifier.settings.method.num_noises, *x.shape)
            _, states = purified.purifier(x, noise=silence, return_trajectory=True)
            return [torch.stack([purified.classifier(((x_k + 1) / 2).clamp(0, 1)).softmax(dim=1) for x_k in states])]

        with torch.no_grad():
            (x_pure,) = self._made(f"{kind} purified", purify)
            (confidences,) = self._made(f"{kind} confidences", follow)  # [steps + 1, images, classes]
        return {"images": x, "purified": x_pure, "confidences": confidences}

    def _made(self, name: str, make: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        recorder = self.defense.recorder
        return make() if recorder is None else recorder.made(name, make)

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """The run's threads, and torch's global generators left as they were found."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.rules.threads)
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            torch.set_num_threads(threads)
