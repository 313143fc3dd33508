"""What the ways of counting are, for readers who know robust accuracy from RobustBench."""

from __future__ import annotations

from collections.abc import Sequence

from coupfast.evaluation.report.parts import Table
from coupfast.evaluation.report.read import Run


def protocols(runs: Sequence[Run]) -> Table:
    """What each protocol of these runs' tables says."""
    attacked = any("attacked" in run.verdicts for run in runs)
    rows = [
        (
            "official",
            "RobustBench's robust accuracy, as AutoAttack counts it: the share of images that the defense gets right before "
            "the attack and again after each of its stages. A defense with noise is asked once each time, so that some images "
            "fall by chance and others stand by chance.",
        ),
        (
            "one fresh draw",
            "The attacked images, classified once more on noise that no attack has seen: what a user gets who classifies each "
            "image once. The number to put beside papers that judge by one draw.",
        ),
        ("average over draws", "The same, expected: the mean over many draws of the noise. It is 1-resubmission."),
        (
            "M-resubmission",
            "An attacker may send one and the same image M times and wins if the defense errs once. Estimated without bias "
            "from all of the judge's draws, as the chance that M of them, taken at random, are all right.",
        ),
        ("worst of N draws", "An image counts as robust only if all N draws are right: N-resubmission."),
        (
            "majority of N draws",
            "The defense itself classifies N copies, with noise of their own, and answers with the class that most of them "
            "have; a tie is an error. It costs the user N times as much.",
        ),
        ("mean logits of N draws", "The same, but the copies' logits are averaged: what BPDA + EOT evaluations often attack."),
    ]
    if any("attacked" in run.verdicts and run.verdicts["attacked"].inside is not None for run in runs):
        rows.append(
            (
                "inside the attack",
                "N fresh draws at every point that the attack comes to, and the worst point counts for each image (the "
                "N-evaluation of DiffHammer). Of very many points one fails by chance: it lies below all others, also under an "
                "attack that finds nothing, and is comparable between attacks of as many points only.",
            )
        )
    note = (
        "All are shares of images. None is the robust accuracy of a defense with noise: which one counts is decided by what "
        "an attacker may do."
    )
    if attacked:
        note += " Attacks end with their budget: each figure is an upper bound of what a stronger attack would leave."
    return Table("What the protocols are", ("protocol", "what it says"), rows, note)
