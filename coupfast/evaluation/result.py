"""What an evaluation found, from its folder."""

from __future__ import annotations

import csv
import functools
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from coupfast.evaluation import protocols, purification
from coupfast.evaluation.configuration import images_sha256
from coupfast.evaluation.gradients import Gradients, followed
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.protocols import INSIDE, OFFICIAL, PROTOCOLS, RESUBMISSION, Accuracy, Judged
from coupfast.evaluation.spec import GIVEN, Spec, in_fast_mode
from coupfast.wording import counted, radius
from coupfast_kernels.files import write_whole

_COLUMNS = ("run", "kind", "protocol", "accuracy", "images", "draws", "low", "high", "bootstrap_low", "bootstrap_high")


class Evaluation:
    """A finished run. Accuracies are shares of images in [0, 1].

    Args:
        folder: The run's.
        x: Its clean images; None reads those that the run names when they are needed.
        temporary: What removes the folder, if it goes with this object.

    Attributes:
        folder: The run's.
        ledger: Behind it all, open for reading.

    Raises:
        LedgerError: if there is no run, or it is another version's.

    Example:
        >>> import torch, coupfast
        >>> classifier, x = coupfast.load_classifier("cifar10-tiny"), torch.rand(4, 3, 32, 32)
        >>> result = coupfast.evaluate(classifier, x, classifier(x).argmax(dim=1), attack="none", draws=2)
        >>> result.accuracies["clean"]["worst"].value, result.to_dict()["accuracies"][0]["protocol"]
        (1.0, 'official')
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        x: torch.Tensor | None = None,
        temporary: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.ledger = Ledger(folder, read_only=True)
        self._x, self._temporary = x, temporary

    @functools.cached_property
    def verdicts(self) -> dict[str, Judged]:
        """ "clean" and, where there was an attack, "attacked": official verdicts, and logits (draws, images, classes)."""
        return protocols.judged(self.ledger)

    @functools.cached_property
    def accuracies(self) -> dict[str, dict[str, Accuracy]]:
        """By "clean" and "attacked" and by protocol, with intervals of 95 %; see `protocols`."""
        return {
            kind: {protocol: protocols.accuracy(found, protocol) for protocol in (OFFICIAL, *PROTOCOLS)}
            for kind, found in self.verdicts.items()
        }

    @functools.cached_property
    def resubmission(self) -> dict[str, list[Accuracy]]:
        """By "clean" and "attacked", robust accuracy where an attacker has M = 1, 2, … of the judge's draws; see
        `protocols.resubmissions`."""
        return {kind: protocols.resubmissions(found) for kind, found in self.verdicts.items()}

    @functools.cached_property
    def inside(self) -> dict[str, Accuracy]:
        """What attacks saw themselves on fresh draws at each of their points, by the worst one for each image; empty if none
        tells."""
        attacked = self.verdicts.get("attacked")
        if attacked is None or attacked.inside is None:
            return {}
        return {protocol: protocols.accuracy(attacked, protocol) for protocol in INSIDE}

    @property
    def accuracy(self) -> float:
        """As AutoAttack counts it: right at one fresh draw before the attack and after each of its stages; without an attack,
        the clean accuracy."""
        return float(self.verdicts.get("attacked", self.verdicts["clean"]).official.mean())

    @property
    def clean_accuracy(self) -> float:
        """At one fresh draw."""
        return float(self.verdicts["clean"].official.mean())

    @functools.cached_property
    def gradients(self) -> dict[str, Gradients]:
        """Of every stage that follows a gradient: how many came back, and how many of them led nowhere."""
        return followed(self.ledger.done().values())

    @functools.cached_property
    def x_adv(self) -> torch.Tensor:
        """The images that were judged as attacked, in order; see `Ledger.attacked_images`.

        Raises:
            ValueError: if the clean ones cannot be found again.
        """
        x = self._x
        if x is None:
            fields = self.ledger.configuration["spec"]
            if fields["images"] == GIVEN:
                raise ValueError(f"the run in {self.folder} was given its images from Python; give them again as `x`")
            x, _ = Spec(images=fields["images"], limit=fields["limit"]).load()
            if images_sha256(x) != self.ledger.configuration["images"]["x_sha256"]:
                raise ValueError(f"the images of the run in {self.folder} were not {fields['images']} as it is now; give `x`")
        return torch.from_numpy(self.ledger.attacked_images(range(len(x)), x.numpy()))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all results: equal for runs that are equal bit for bit."""
        return self.ledger.fingerprint()

    @property
    def title(self) -> str:
        """In words, what was evaluated."""
        fields, count = self.ledger.configuration, len(self.verdicts["clean"].labels)
        spec, stages = fields["spec"], fields["stages"]
        built = None if spec["defense"] == GIVEN else spec["defense"]
        defense = purification.name(fields["defense"], built=built, alone=spec["purifier"] is None)
        attack = f"{spec['attack']}{in_fast_mode(fields)}" if stages else "no attack"
        if any("eps" in stage for stage in stages.values()):  # salt and pepper knows no ball
            attack += f", {spec['norm']} {radius(spec['norm'], spec['eps'])}"
        if spec.get("start_from") is not None:
            attack += f", begun from the adversarial images of {spec['start_from']}"
        return f"{defense} under {attack}, {counted(count, 'image')}"

    def table(self) -> str:
        """Accuracies by every protocol, with Wilson's intervals of 95 %, in text; below it what speaks against them."""
        warnings = [f"Warning: {found.warning}." for found in self.gradients.values() if found.useless]
        return "\n".join([protocols.table(self.verdicts), *warnings])

    def to_dict(self) -> dict[str, Any]:
        """Configuration, accuracies, gradients that attacks followed, and of every image the predictions of the judge's draws,
        as JSON has them."""
        images = {
            kind: {"official": found.official.tolist(), "predictions": found.logits.argmax(axis=2).T.tolist()}
            for kind, found in self.verdicts.items()
        }
        return {
            "accuracy": self.accuracy,
            "clean_accuracy": self.clean_accuracy,
            "accuracies": self._rows(),
            "labels": self.verdicts["clean"].labels.tolist(),
            **images,
            "gradients": [found.to_dict() for found in self.gradients.values()],
            "fingerprint": self.fingerprint,
            "command": self.ledger.command,
            "started": self.ledger.started,
            "configuration": self.ledger.configuration,
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` in text; written to `path`, too, if there is one."""
        return _kept(json.dumps(self.to_dict(), indent=1) + "\n", path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """A row for each kind of image and protocol, accuracies and ends of intervals in [0, 1]; written to `path`, too."""
        return _kept(csv_of({self.folder.resolve().name: self.to_dict()}), path)

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for kind, by_protocol in self.accuracies.items():
            used = {OFFICIAL: self.verdicts[kind].looks, "single": 1}
            for protocol, found in by_protocol.items():
                rows.append(row(kind, protocol, used.get(protocol, len(self.verdicts[kind].logits)), found))
        for kind, points in self.resubmission.items():
            rows += [row(kind, RESUBMISSION, m, found) for m, found in enumerate(points, start=1)]
        for protocol, found in self.inside.items():
            rows.append(row("attacked", protocol, self.verdicts["attacked"].inside_draws, found))
        return rows

    def close(self) -> None:
        """Close the ledger; a temporary folder goes."""
        self.ledger.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        attacked = f", attacked {100 * self.accuracy:.1f} %" if "attacked" in self.verdicts else ""
        return f"<Evaluation in {self.folder}: {self.title}; official: clean {100 * self.clean_accuracy:.1f} %{attacked}>"


def row(kind: str, protocol: str, draws: int, found: Accuracy) -> dict[str, Any]:
    """One accuracy as JSON and CSV have it."""
    return {
        "kind": kind,
        "protocol": protocol,
        "accuracy": found.value,
        "images": found.images,
        "draws": draws,
        "low": found.wilson[0],
        "high": found.wilson[1],
        "bootstrap_low": None if found.bootstrap is None else found.bootstrap[0],
        "bootstrap_high": None if found.bootstrap is None else found.bootstrap[1],
    }


def csv_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracies of runs, `to_dict` by name, as CSV: a row for each run, kind of image and protocol."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, run in found.items():
        writer.writerows({"run": name, **row} for row in run["accuracies"])
    return text.getvalue()


def _kept(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_whole(Path(path), text.encode())
    return text
