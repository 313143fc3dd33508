"""Verdicts over images and draws, with intervals.

A randomized defense has no single accuracy. `PROTOCOLS` are the ways of counting that people use, each a function from what
the judge saw to one number per image; they can disagree, and `contradictions` says where they do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from coupfast.evaluation.configuration import image_keys
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.units import CLEAN, JUDGE
from coupfast.wording import counted

RESAMPLES = 2000


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 % for the default `z`, as fractions in [0, 1].

    `successes` may be a sum of numbers in [0, 1]: they vary less than successes and failures would, so it is too wide then.

    Args:
        successes: How many, in [0, trials].
        trials: Out of how many, above 0.
        z: Half the interval's width, in standard deviations of a normal distribution.

    Returns:
        Its lower and upper end.

    Raises:
        ValueError: if not 0 <= successes <= trials and trials > 0.

    Example:
        >>> from coupfast.evaluation.protocols import wilson_interval
        >>> low, high = wilson_interval(10, 20)
        >>> f"{low:.2f} to {high:.2f}"
        '0.30 to 0.70'
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"a proportion needs 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    p, z2 = successes / trials, z * z
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    # At 0 and at all successes one end is exactly 0 or 1; rounding would put it a little beside.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a run knows of its images, clean or attacked.

    Attributes:
        official: Right at the evaluation's own verdicts, bool (images,): clean, one fresh draw; attacked, one fresh draw
            after each stage, and right at all of them, as AutoAttack counts.
        logits: Of the judge's fresh draws, (draws, images, classes).
        labels: (images,).
        looks: How many draws the official verdict asks for: one, and of attacked images one more for each stage.
        unchanged: Of attacked images, how many are as they came, since no attack got to try anything else.
        sha256: Of each clean image: by these, two runs know which images both have.
        inside: Of attacked images, the largest share of `looks` fresh draws that was misclassified at one point of the attack,
            (images,); None where no attack tells.
        inside_draws: How many fresh draws that were.
        left: Of attacked images, how many are right at the official verdict that was not asked for after every stage: a test of
            the attack (`mode` "fast") had them fall before the last one, which then did not attack them.
    """

    official: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    looks: int = 1
    unchanged: int = 0
    sha256: tuple[str, ...] = ()
    inside: np.ndarray | None = None
    inside_draws: int = 0
    left: int = 0


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A share of images, with two intervals of 95 %, all as fractions in [0, 1].

    Attributes:
        value: The share.
        images: Of how many.
        wilson: Over images, the draws as they fell. For an average over draws it is wider than it has to be.
        bootstrap: Percentiles over resampled images and draws ("worst" and "resubmission": images only); None for the official
            verdict, which has one draw.
    """

    value: float
    images: int
    wilson: tuple[float, float]
    bootstrap: tuple[float, float] | None


def single(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The first of the judge's draws.

    Args:
        logits: (draws, images, classes).
        labels: (images,).

    Returns:
        1.0 where right, 0.0 where not, (images,).

    Example:
        >>> import numpy as np
        >>> from coupfast.evaluation import protocols
        >>> logits = np.array([[[2, 0, 1], [0, 1, 3]], [[1, 0, 0], [5, 1, 2]], [[3, 0, 1], [0, 2, 1]]])  # 3 draws, 2 images
        >>> protocols.single(logits, np.array([0, 2])).tolist()
        [1.0, 1.0]
    """
    return (logits[0].argmax(axis=1) == labels).astype(float)


def worst(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Right in every draw.

    Args:
        logits: (draws, images, classes).
        labels: (images,).

    Returns:
        1.0 where right, 0.0 where not, (images,).

    Example:
        >>> import numpy as np
        >>> from coupfast.evaluation import protocols
        >>> logits = np.array([[[2, 0, 1], [0, 1, 3]], [[1, 0, 0], [5, 1, 2]], [[3, 0, 1], [0, 2, 1]]])  # 3 draws, 2 images
        >>> protocols.worst(logits, np.array([0, 2])).tolist()
        [1.0, 0.0]
    """
    return (logits.argmax(axis=2) == labels).all(axis=0).astype(float)


def majority(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """More draws vote for the label than for any other class; a tie is wrong.

    Args:
        logits: (draws, images, classes).
        labels: (images,).

    Returns:
        1.0 where right, 0.0 where not, (images,).

    Example:
        >>> import numpy as np
        >>> from coupfast.evaluation import protocols
        >>> logits = np.array([[[2, 0, 1], [0, 1, 3]], [[1, 0, 0], [5, 1, 2]], [[3, 0, 1], [0, 2, 1]]])  # 3 draws, 2 images
        >>> protocols.majority(logits, np.array([0, 2])).tolist()
        [1.0, 0.0]
    """
    votes = (logits.argmax(axis=2)[:, :, None] == np.arange(logits.shape[2])).sum(axis=0)  # [images, classes]
    ours = np.take_along_axis(votes, labels[:, None], axis=1)[:, 0]
    np.put_along_axis(votes, labels[:, None], -1, axis=1)
    return (ours > votes.max(axis=1)).astype(float)


def mean_logits(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The draws' mean logits are right, as in BPDA + EOT.

    Args:
        logits: (draws, images, classes).
        labels: (images,).

    Returns:
        1.0 where right, 0.0 where not, (images,).

    Example:
        >>> import numpy as np
        >>> from coupfast.evaluation import protocols
        >>> logits = np.array([[[2, 0, 1], [0, 1, 3]], [[1, 0, 0], [5, 1, 2]], [[3, 0, 1], [0, 2, 1]]])  # 3 draws, 2 images
        >>> protocols.mean_logits(logits, np.array([0, 2])).tolist()
        [1.0, 1.0]
    """
    return (logits.mean(axis=0).argmax(axis=1) == labels).astype(float)


def average(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of draws that are right: what one draw gives on average.

    Args:
        logits: (draws, images, classes).
        labels: (images,).

    Returns:
        Shares in [0, 1], (images,).

    Example:
        >>> import numpy as np
        >>> from coupfast.evaluation import protocols
        >>> logits = np.array([[[2, 0, 1], [0, 1, 3]], [[1, 0, 0], [5, 1, 2]], [[3, 0, 1], [0, 2, 1]]])  # 3 draws, 2 images
        >>> protocols.average(logits, np.array([0, 2])).tolist()
        [1.0, 0.3333333333333333]
    """
    return (logits.argmax(axis=2) == labels).mean(axis=0)


#: How the judge's draws become one number per image.
PROTOCOLS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "single": single,
    "worst": worst,
    "majority": majority,
    "mean logits": mean_logits,
    "average": average,
}
OFFICIAL = "official"
#: Verdicts of the attack itself, at its worst point for each image, from the largest share of draws that failed at one point
#: (DiffHammer's N-evaluation).
INSIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "inside average": lambda share: 1.0 - share,
    "inside worst": lambda share: (share == 0).astype(float),
}


#: An attacker may send an image M times, fresh noise each time, and wins if any of them is misclassified.
RESUBMISSION = "resubmission"


def survival(failures: np.ndarray, draws: int, m: int) -> np.ndarray:
    """Of images that failed in so many of N = `draws` draws, (images,), the estimated chance that none of M = `m` fails.

    C(N − n, M) / C(N, M): of the subsets of M draws the share that has no failure. It is unbiased for (1 − p)^M, where each
    draw fails with probability p; (1 − n/N)^M would be biased upwards. M = 1 is the average over draws, M = N their worst.

    Raises:
        ValueError: if not 1 <= m <= draws: of fewer draws than `m` there is no unbiased estimate.
    """
    if not 1 <= m <= draws:
        raise ValueError(f"M-resubmission is estimated for M in [1, {draws}], the judge's draws, got {m}")
    table = np.array([math.comb(draws - n, m) / math.comb(draws, m) for n in range(draws + 1)])
    chances: np.ndarray = table[np.asarray(failures)]
    return chances


def resubmissions(verdicts: Judged) -> list[Accuracy]:
    """Robust accuracy under M-resubmission for M = 1 … N.

    The bootstrap is over images with their draws as they fell. Images are the sample: each one's estimate is unbiased, and how
    it scatters over images has both parts in it, that images differ and that each had so many draws only, which are its own.
    (Draws with repetition would show fewer different ones, and so be another quantity.)

    Args:
        verdicts: What the judge saw: N draws of every image.

    Returns:
        An accuracy with intervals for each M, the first of them the average over draws, the last the worst of them.

    Example:
        >>> import numpy as np
        >>> from coupfast.evaluation.protocols import Judged, resubmissions
        >>> logits = np.array([[[2, 0], [0, 1]], [[1, 0], [5, 1]]])  # two draws; the second image is right in the first one
        >>> [found.value for found in resubmissions(Judged(np.array([True, True]), logits, np.array([0, 1])))]
        [0.75, 0.5]
    """
    draws = len(verdicts.logits)
    failures = (verdicts.logits.argmax(axis=2) != verdicts.labels).sum(axis=0)
    each = np.stack([survival(failures, draws, m) for m in range(1, draws + 1)], axis=1)  # [images, M]
    resampled = np.stack([each[images].mean(axis=0) for images, _ in _resamples(RESUBMISSION, len(each), draws)])
    return [
        Accuracy(
            value=float(column.mean()),
            images=len(column),
            wilson=wilson_interval(min(float(column.sum()), len(column)), len(column)),
            bootstrap=_percentiles(resampled[:, m].tolist()),
        )
        for m, column in enumerate(each.T)
    ]


def told(draws: int) -> list[int]:
    """The M of M-resubmission that a table has; a plot has all."""
    return [m for m in (2, 3, 5, 10, 20, 50) if m < draws]


def describe(protocol: str, draws: int) -> str:
    """A protocol's name with its number of draws."""
    of = counted(draws, "draw")
    names = {OFFICIAL: "official, one fresh draw a stage", "single": "one fresh draw", "worst": f"worst of {of}"}
    names |= {"majority": f"majority of {of}", "average": f"average over {of}"}
    names |= {RESUBMISSION: f"{draws}-resubmission, all {draws} right"}
    names |= {protocol: f"inside the attack, {protocol.split()[1]} of {draws}" for protocol in INSIDE}
    return names.get(protocol, f"{protocol} of {of}")


def judged(ledger: Ledger) -> dict[str, Judged]:
    """Clean and, where there was an attack, attacked verdicts of a run.

    Raises:
        ValueError: if the run is not finished; the message says how far it is.
    """
    count = int(ledger.configuration["images"]["count"])
    records = list(ledger.done().values())
    official = {"clean": np.ones(count, dtype=bool), "attacked": np.ones(count, dtype=bool)}
    logits: dict[str, dict[int, np.ndarray]] = {"clean": {}, "attacked": {}}
    as_they_came = {"clean": 0, "attacked": 0}
    inside, inside_draws = np.full(count, np.nan), 0
    left = np.zeros(count, dtype=bool)
    last = [CLEAN, *ledger.configuration["stages"]][-1]
    for record in records:
        if record.unit.stage == JUDGE:
            arrays = ledger.arrays(record)
            as_they_came["attacked"] += len(record.result.get("unchanged", ()))
            for kind in logits:
                if f"{kind}_logits" in arrays:
                    columns = arrays[f"{kind}_logits"].swapaxes(0, 1)
                    logits[kind] |= dict(zip(record.unit.images, columns, strict=True))
        else:
            if "looked" in record.result:
                inside_draws = max(inside_draws, record.result["looks"])
                images = list(record.unit.images)
                inside[images] = np.fmax(inside[images], np.array(record.result["looked"]) / record.result["looks"])
            fallen = sorted(set(record.unit.images) - set(record.result["standing"]))
            official["attacked"][fallen] = False
            if record.unit.stage != last and "onward" in record.result:
                left[sorted(set(record.unit.images) - set(record.onward))] = True
            if record.unit.stage == CLEAN:
                official["clean"][fallen] = False
    # Who was not attacked inside of an attack that tells had fallen before.
    shares = np.where(np.isnan(inside), 1.0, inside) if inside_draws else None
    if len(logits["clean"]) != count:
        raise ValueError(
            f"the run in {ledger.folder} is not finished: {len(logits['clean'])} of {count} images are judged; "
            f"continue it with: coupfast evaluate --resume {ledger.folder}"
        )
    return {
        kind: Judged(
            official=official[kind],
            logits=np.stack([rows[image] for image in range(count)], axis=1),
            labels=np.array(ledger.configuration["images"]["labels"]),
            looks=1 + (len(ledger.configuration["stages"]) if kind == "attacked" else 0),
            unchanged=as_they_came[kind],
            sha256=tuple(ledger.configuration["images"]["sha256"]),
            inside=shares if kind == "attacked" else None,
            inside_draws=inside_draws if kind == "attacked" else 0,
            left=int((left & official["attacked"]).sum()) if kind == "attacked" else 0,
        )
        for kind, rows in logits.items()
        if rows
    }


def table(verdicts: Mapping[str, Judged]) -> str:
    """Accuracies of a run by every protocol, in text."""
    draws = len(verdicts["clean"].logits)
    lines = [f"{'':34s}" + "".join(f"{kind:38s}" for kind in verdicts)]
    for protocol in (OFFICIAL, *PROTOCOLS):
        lines.append(_line(describe(protocol, draws), [accuracy(kind, protocol) for kind in verdicts.values()]))
    curves = [resubmissions(kind) for kind in verdicts.values()]
    for m in told(draws):
        lines.append(_line(describe(RESUBMISSION, m), [curve[m - 1] for curve in curves]))
    if "attacked" in verdicts:
        for protocol in INSIDE if verdicts["attacked"].inside is not None else ():
            name = describe(protocol, verdicts["attacked"].inside_draws)
            lines.append(_line(name, [None, accuracy(verdicts["attacked"], protocol)]))
        lines.append(official_baseline(verdicts))
        if verdicts["attacked"].unchanged:
            lines.append(unchanged(verdicts["attacked"]))
    return "\n".join(line.rstrip() for line in lines)


def _line(name: str, cells: Sequence[Accuracy | None]) -> str:
    texts = []
    for found in cells:
        if found is None:
            texts.append("")
            continue
        low, high = found.wilson
        texts.append(f"{100 * found.value:5.1f} % {f'({count(found)})':13s} [{100 * low:5.1f}, {100 * high:5.1f}]")
    return f"{name:34s}" + "".join(f"{text:38s}" for text in texts)


def count(found: Accuracy) -> str:
    """Of how many images how many; an average over draws need not be whole."""
    right = found.value * found.images
    return f"{right:.0f}/{found.images}" if abs(right - round(right)) < 1e-6 else f"{right:.1f}/{found.images}"


def official_baseline(verdicts: Mapping[str, Judged]) -> str:
    """In words, what the official verdict on attacked images would be if the attack changed nothing: it asks more than once."""
    clean, looks = verdicts["clean"], verdicts["attacked"].looks
    said = f"official: {looks} draws must all be right where there was an attack, one where there was none"
    if left := verdicts["attacked"].left:
        said += (
            f" ({counted(left, 'image')} that stand{'s' * (left == 1)} here had fallen by the test of an attack: fewer "
            f"draws, and no later attack)"
        )
    if len(clean.logits) < looks:
        return f"{said}; what {looks} draws alone cost, {looks} or more of the judge's would tell"
    passed = int(worst(clean.logits[:looks], clean.labels).sum())
    low, high = wilson_interval(passed, len(clean.labels))
    share = f"{100 * passed / len(clean.labels):.1f} % ({passed}/{len(clean.labels)}) [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{said}; of clean images {share} are right in {looks} of the judge's draws"


def unchanged(attacked: Judged) -> str:
    """In words, how many attacked images are no other than clean ones."""
    are, were = ("is a clean one", "it was") if attacked.unchanged == 1 else ("are clean ones", "they were")
    of = f"{attacked.unchanged} of {counted(len(attacked.labels), 'attacked image')}"
    return f"{of} {are}: misclassified at every first look, {were} not attacked"


def scores(verdicts: Judged, protocol: str) -> np.ndarray:
    """(images,) numbers in [0, 1]."""
    if protocol == OFFICIAL:
        return verdicts.official.astype(float)
    if protocol in INSIDE:
        if verdicts.inside is None:
            raise ValueError(f"{protocol!r} is a verdict of attacks that look at their own points, and here is none")
        return INSIDE[protocol](verdicts.inside)
    return PROTOCOLS[protocol](verdicts.logits, verdicts.labels)


def accuracy(verdicts: Judged, protocol: str) -> Accuracy:
    """A protocol's accuracy and how sure it is."""
    each = scores(verdicts, protocol)
    bootstrap = None
    if protocol in INSIDE:
        bootstrap = _percentiles([each[images].mean() for images, _ in _resamples(protocol, len(each), 1)])
    elif protocol != OFFICIAL:
        resampled = [
            PROTOCOLS[protocol](verdicts.logits[draws][:, images], verdicts.labels[images]).mean()
            for images, draws in _resamples(protocol, len(each), len(verdicts.logits))
        ]
        bootstrap = _percentiles(resampled)
    return Accuracy(
        value=float(each.mean()),
        images=len(each),
        wilson=wilson_interval(min(float(each.sum()), len(each)), len(each)),
        bootstrap=bootstrap,
    )


# --- two attacks ---------------------------------------------------------------------------------------------------------


def lower(first: Judged, second: Judged, protocol: str) -> tuple[Accuracy, Accuracy]:
    """One defense under two attacks: the lower of the two accuracies, and the share of images that is right under both.

    DiffPure and COUP report the former, of AutoAttack's `rand` and `standard`; AutoAttack itself counts its attacks in the
    latter way, which is never higher. For protocols that give shares the latter is the mean of the lower ones.
    The bootstrap takes the minimum anew in every resample, of the same images and draws under both.

    Raises:
        ValueError: see `common`.
    """
    pair = common(first, second)
    each = [scores(one, protocol) for one in pair]
    images = len(each[0])
    means, boths = [], []
    for chosen, draws in _resamples(protocol, images, len(pair[0].logits)):
        if protocol == OFFICIAL:
            resampled = [one[chosen] for one in each]
        else:
            resampled = [PROTOCOLS[protocol](one.logits[draws][:, chosen], one.labels[chosen]) for one in pair]
        means.append(min(one.mean() for one in resampled))
        boths.append(np.minimum(*resampled).mean())
    found = []
    for value, bootstrap in ((min(one.mean() for one in each), means), (np.minimum(*each).mean(), boths)):
        value = float(value)
        interval = wilson_interval(min(value * images, images), images)
        found.append(Accuracy(value, images, interval, _percentiles(bootstrap)))
    return found[0], found[1]


# --- two defenses -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two defenses on the same images by one protocol.

    In the judge's draws they meet the same noise where their runs have one seed. The official verdicts' noise follows units, so
    it is common only to units of one name that hold the same images.

    Attributes:
        difference: Accuracy of the first minus that of the second.
        interval: 95 %, from resampled images and draws, the same for both.
        only_first, only_second: Images that only one of them classifies correctly; None for "average".
        p: Of McNemar's exact test of equal accuracy; None for "average".
        images, draws: How many were compared: those that both have.
    """

    difference: float
    interval: tuple[float, float]
    only_first: int | None
    only_second: int | None
    p: float | None
    images: int = 0
    draws: int = 0

    @property
    def conclusion(self) -> int:
        """1: the first is better, −1: the second is, 0: undecided at 5 %."""
        decided = self.p < 0.05 if self.p is not None else not self.interval[0] <= 0 <= self.interval[1]
        return int(math.copysign(1, self.difference)) if decided and self.difference else 0


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of equal accuracies, given the images that only one of two classifies correctly (McNemar 1947).

    Args:
        only_first: Images that only the first one classifies correctly.
        only_second: Those that only the second one does.

    Returns:
        p in (0, 1]; 1 where there is no image of either kind.

    Example:
        >>> from coupfast.evaluation.protocols import mcnemar
        >>> mcnemar(6, 0), mcnemar(4, 4)
        (0.03125, 1.0)
    """
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(discordant, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**discordant)


def compare(first: Judged, second: Judged, protocol: str) -> Comparison:
    """Paired comparison by one protocol, on the images and the first draws that both have.

    Raises:
        ValueError: if they have no image in common.
    """
    first, second = common(first, second)
    a, b = scores(first, protocol), scores(second, protocol)
    differences = []
    for images, draws in _resamples(protocol, len(a), len(first.logits)):
        if protocol == OFFICIAL:
            differences.append((a - b)[images].mean())
        else:
            pair = (PROTOCOLS[protocol](v.logits[draws][:, images], v.labels[images]).mean() for v in (first, second))
            differences.append(next(pair) - next(pair))
    whole = protocol != "average"
    only = (int((a > b).sum()), int((a < b).sum())) if whole else (None, None)
    return Comparison(
        difference=float((a - b).mean()),
        interval=_percentiles(differences),
        only_first=only[0],
        only_second=only[1],
        p=mcnemar(*only) if only[0] is not None and only[1] is not None else None,
        images=len(a),
        draws=len(first.logits),
    )


def common(first: Judged, second: Judged) -> tuple[Judged, Judged]:
    """Two runs' verdicts on the images, and the first draws, that both have.

    Raises:
        ValueError: if there is no such image, or the two have other labels for one.
    """
    mine, theirs = ({key: i for i, key in enumerate(image_keys(verdicts.sha256))} for verdicts in (first, second))
    shared = [key for key in mine if key in theirs]
    if not shared:
        raise ValueError(
            f"a paired comparison needs the same images, and of {len(mine)} and {len(theirs)} images none is in both runs"
        )
    draws = min(len(first.logits), len(second.logits))
    pair = [
        dataclasses.replace(
            verdicts,
            official=verdicts.official[chosen],
            logits=verdicts.logits[:draws, chosen],
            labels=verdicts.labels[chosen],
            sha256=tuple(key for key, _ in shared),
        )
        for verdicts, chosen in ((first, [mine[key] for key in shared]), (second, [theirs[key] for key in shared]))
    ]
    if not np.array_equal(pair[0].labels, pair[1].labels):
        wrong = int((pair[0].labels != pair[1].labels).sum())
        raise ValueError(f"a paired comparison needs the same labels, and {wrong} of {len(shared)} images have others")
    return pair[0], pair[1]


def contradictions(names: tuple[str, str], comparisons: Mapping[str, Comparison]) -> list[str]:
    """In words, conclusions of one protocol that another does not bear out."""
    decided = {protocol: c.conclusion for protocol, c in comparisons.items() if c.conclusion}
    warnings = []
    for (one, sign), (other, opposite) in itertools.combinations(decided.items(), 2):
        if sign != opposite:
            better, contrary = (names[0] if s > 0 else names[1] for s in (sign, opposite))
            warnings.append(f"{better} is better by {one!r}, {contrary} by {other!r}")
    undecided = [protocol for protocol in comparisons if protocol not in decided]
    if decided and undecided and not warnings:
        better = names[0] if next(iter(decided.values())) > 0 else names[1]
        warnings.append(
            f"{better} is better by {', '.join(map(repr, decided))}, which {', '.join(map(repr, undecided))} cannot confirm"
        )
    return warnings


@functools.lru_cache(maxsize=4)  # a report asks for the same ones dozens of times
def _resamples(protocol: str, images: int, draws: int) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """Images and draws with repetition: the same ones at every call."""
    rng = np.random.Generator(np.random.Philox(0))
    chosen = [(rng.integers(images, size=images), rng.integers(draws, size=draws)) for _ in range(RESAMPLES)]
    # The worst of fewer distinct draws is another quantity, and a better one: its N stays as it is.
    fixed = protocol in ("worst", RESUBMISSION)
    return [(image, np.arange(draws)) for image, _ in chosen] if fixed else chosen


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(np.asarray(values), [2.5, 97.5])
    return float(low), float(high)
