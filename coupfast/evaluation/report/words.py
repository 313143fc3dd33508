"""What the ways of counting and the attacks are, for readers who know robust accuracy and AutoAttack from RobustBench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coupfast.evaluation import attacks as kinds
from coupfast.evaluation.report.parts import Section, Table
from coupfast.evaluation.report.read import Run
from coupfast.wording import counted


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
                "N fresh draws at every point where the attack looks at the defense, and the worst of them counts for each "
                "image (the N-evaluation of DiffHammer). Most attacks look at every point that they come to: of very many one "
                "fails by chance, also under an attack that finds nothing. Attacks through a coarser purification (transfer, "
                "and so the first stages of cascade) look where an image leaves them and at their last point. Comparable "
                "between attacks of as many points only.",
            )
        )
    note = (
        "All are shares of images. None is the robust accuracy of a defense with noise: which one counts is decided by what "
        "an attacker may do."
    )
    if attacked:
        note += " Attacks end with their budget: each figure is an upper bound of what a stronger attack would leave."
    return Table("What the protocols are", ("protocol", "what it says"), rows, note)


_ATTACKS: dict[type[kinds.Attack], str] = {
    kinds.APGD: "One of AutoAttack's attacks, in its authors' code: gradient ascent whose steps shrink by themselves, on the "
    "cross-entropy (ce) or on a difference of logits that knows no scale (dlr). Of a defense with noise each gradient is "
    "the mean over eot_iter draws (EOT), of which AutoAttack's version rand takes 20.",
    kinds.TargetedAPGD: "One of AutoAttack's attacks, in its authors' code: APGD towards each of the likeliest other "
    "classes in turn.",
    kinds.FABTargeted: "One of AutoAttack's attacks, in its authors' code: it looks for the nearest image of each of the "
    "likeliest other classes.",
    kinds.Square: "One of AutoAttack's attacks, in its authors' code: it changes random squares and keeps what raises the "
    "loss, and needs no gradient. A defense with noise is asked eot_iter times a query.",
    kinds.PGD: "Projected gradient ascent in steps of one length, each along the mean gradient of eot_iter draws. With 200 "
    "steps of 20 draws it is what papers on purification run beside AutoAttack.",
    kinds.BPDA: "Projected gradient ascent without a gradient through the purification, which is taken for the identity "
    "(BPDA + EOT). Cheap, and blind to all that the purification does.",
    kinds.Transfer: "Projected gradient ascent on the same defense in coarse_steps steps only, by the exact gradient of those. "
    "What it makes is judged on the defense as it is.",
    kinds.DiffHammer: "At each point eot_iter draws, of which those count most that can be made to fail together, and one "
    "gradient through one of the purifications: an attacker who may try again needs some draws to fail, not their mean.",
    kinds.StAdv: "Pixels are moved a little and keep their values: the image is bent. It knows no radius, so that its "
    "figures do not stand beside those of a ball.",
    kinds.SaltAndPepper: "No adversary: a share of pixels turns black or white at random.",
}


def attacks(runs: Sequence[Run]) -> list[Section]:
    """What each attack of these runs does, and what was asked of it beside."""
    stages = {f"{run.name}: {stage}": fields for run in runs for stage, fields in run.configuration["stages"].items()}
    rows = []
    for kind, text in _ATTACKS.items():
        if named := [stage for stage, fields in stages.items() if fields["class"] == kind.__name__]:
            rows.append((", ".join(named), text))
    for stage, fields in stages.items():
        if said := _besides(fields):
            rows.append((f"{stage}, besides", " ".join(said)))
    if not rows:
        return []
    note = (
        "Stages of one attack run one after the other on the images that still stand, as AutoAttack's do. The attacker knows "
        "the defense and its weights."
    )
    return [Table("What the attacks are", ("run and stage", "what it does"), rows, note)]


def _besides(fields: Mapping[str, Any]) -> list[str]:
    """What options of a stage mean, where they are not off."""
    said = []
    if fields.get("drop") == "majority":
        said.append(
            f"An image leaves once so many fresh draws at one point failed, and none was right, that one which more than half "
            f"of all draws classify correctly would leave with a probability of {fields['error']:g} at most."
        )
    elif "coarse_steps" in fields and fields.get("drop") in ("any", "mean"):
        coarse = {"any": "any draw", "mean": "the mean logits"}[fields["drop"]]
        said.append(f"An image leaves once {coarse} of the coarser purification and then a fresh draw of the defense failed.")
    elif fields.get("drop") == "any":
        said.append("An image leaves once any draw fails, which decides it by the worst of several draws only.")
    elif fields.get("drop") == "mean":
        said.append("An image leaves once the mean logits of the draws fail.")
    if fields.get("looks"):
        kept = ", and the point where most of them failed is kept (as in Fixed-AutoAttack)" if _keeps_worst(fields) else ""
        said.append(f"Every point is looked at on {counted(fields['looks'], 'fresh draw')}{kept}.")
    if fields.get("dw_box"):
        said.append("The attacker knows the noise of the judge's draws (DW-box), as no real one does.")
    if fields.get("eot_first") is not None:
        said.append(f"Gradients are means of {counted(fields['eot_first'], 'draw')} at first, and of eot_iter at the end.")
    return said


def _keeps_worst(fields: Mapping[str, Any]) -> bool:
    return fields.get("keep", "accuracy") == "accuracy"  # AutoAttack's have no other way
