"""What came out, to read: one HTML file that needs nothing else, and its tables as Markdown."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import html
import io
import itertools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coupfast.data import CIFAR10_CLASSES, CIFAR10_SETS
from coupfast.defenses import METHODS
from coupfast.evaluation import plan, protocols
from coupfast.evaluation.attacks import ASSUMED
from coupfast.evaluation.ledger import Ledger, Record
from coupfast.evaluation.protocols import OFFICIAL, PROTOCOLS, Accuracy, Judged
from coupfast.evaluation.units import JUDGE
from coupfast.evaluation.worker import chosen

# Distinguishable also without colour vision (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MAGNIFIED = 10


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    title: str
    png: bytes
    note: str


@dataclasses.dataclass(frozen=True)
class Text:
    title: str
    lines: str


Section = Table | Picture | Text


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, read.

    Attributes:
        name: Of its folder.
        shown: Of the images whose way through the purification was kept: arrays as the judge's units have them, images along
            the axis that `Worker` says, and `images`, their numbers.
    """

    name: str
    folder: Path
    command: str
    started: str
    configuration: dict[str, Any]
    notes: dict[str, Any]
    records: dict[str, Record]
    verdicts: dict[str, Judged]
    shown: dict[str, np.ndarray]
    happened: list[plan.Stage]
    fingerprint: str

    @property
    def count(self) -> int:
        return int(self.configuration["images"]["count"])


def read(folder: str | Path) -> Run:
    """A finished run.

    Raises:
        LedgerError: if there is none, or a file of it is damaged.
        ValueError: if it is not finished.
    """
    with Ledger(folder, read_only=True) as ledger:
        verdicts = protocols.judged(ledger)
        records = ledger.done()
        parts: dict[str, list[np.ndarray]] = {}
        images: list[int] = []
        for record in records.values():
            if record.unit.stage == JUDGE:
                kept = chosen(ledger.configuration["spec"]["paths"], record.unit.images)
                images += [record.unit.images[i] for i in kept]
                for name, array in ledger.arrays(record).items() if kept else ():
                    if name.endswith("_logits"):
                        array = array[:, kept]
                    parts.setdefault(name, []).append(array)
        axis = {name: 0 if name.endswith(("_images", "_purified")) else 1 for name in parts}
        return Run(
            name=Path(folder).resolve().name,
            folder=Path(folder),
            command=ledger.command,
            started=ledger.started,
            configuration=ledger.configuration,
            notes=ledger.notes(),
            records=records,
            verdicts=verdicts,
            shown={name: np.concatenate(arrays, axis=axis[name]) for name, arrays in parts.items()}
            | {"images": np.array(images, dtype=int)},
            happened=plan.happened(ledger),
            fingerprint=ledger.fingerprint(),
        )


def write(folders: Sequence[str | Path], target: str | Path) -> tuple[Path, Path]:
    """Report on runs, side by side.

    Args:
        folders: The runs'.
        target: The HTML file; the Markdown goes beside it.

    Returns:
        Both paths.
    """
    parts = sections([read(folder) for folder in folders])
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    about = f"{len(folders)} run{'s' * (len(folders) > 1)}; reported on {today}."
    page = Path(target)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(to_html(parts, about), encoding="utf-8")
    tables = page.with_suffix(".md")
    tables.write_text(to_markdown(parts, about), encoding="utf-8")
    return page, tables


def sections(runs: Sequence[Run]) -> list[Section]:
    """Everything that a report says, in order.

    Raises:
        ValueError: if a run is there twice.
    """
    runs = _told_apart(runs)
    parts: list[Section] = [_accuracies(run) for run in runs]
    for pair in itertools.combinations(runs, 2):
        parts += _comparison(*pair)
    parts += _classes(runs)
    curves = [run for run in runs if _curves(run)]
    if curves:
        parts.append(_curve_picture(curves))
    for run in runs:
        if len(run.shown["images"]):
            if "clean_confidences" in run.shown:
                parts.append(_path_picture(run))
            parts.append(_gallery(run))
    for run in runs:
        parts += [_time(run), *_certificate(run), _configuration(run), *_stages(run), _again(run)]
    return parts


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs whose folders have one name get as much of the folders above as it takes."""
    places = [run.folder.resolve().parts for run in runs]
    if len(set(places)) < len(places):
        raise ValueError("a run is to be reported on twice; name every folder once")
    names, depth = [run.name for run in runs], 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(place[-depth:]) for place in places]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


# --- tables -----------------------------------------------------------------------------------------------------------


def _cell(found: Accuracy) -> str:
    low, high = found.wilson
    text = f"{100 * found.value:.1f} % ({protocols.count(found)}), {100 * low:.1f} to {100 * high:.1f}"
    if found.bootstrap is not None:
        text += f"; {100 * found.bootstrap[0]:.1f} to {100 * found.bootstrap[1]:.1f}"
    return text


def _accuracies(run: Run) -> Table:
    draws = len(run.verdicts["clean"].logits)
    rows = [
        (protocols.describe(protocol, draws), *(_cell(protocols.accuracy(kind, protocol)) for kind in run.verdicts.values()))
        for protocol in (OFFICIAL, *PROTOCOLS)
    ]
    return Table(
        f"{run.name}: accuracy",
        ("protocol", *run.verdicts),
        rows,
        f"{_summary(run)}. Intervals of 95 %: Wilson's over images; then, from resampled images and draws, a bootstrap's. The "
        f"clean accuracy by a protocol is what its attacked accuracy is to be compared with, but for the official one."
        f"{_official(run)}{_unchanged(run)}{_assumed(run)}",
    )


def _official(run: Run) -> str:
    if "attacked" not in run.verdicts:
        return ""
    return (
        f" That is about the images that each attack returns, the others about the strongest ones that any attack tried "
        f"({protocols.official_baseline(run.verdicts)})."
    )


def _unchanged(run: Run) -> str:
    attacked = run.verdicts.get("attacked")
    return f" {protocols.unchanged(attacked)}." if attacked is not None and attacked.unchanged else ""


def _assumed(run: Run) -> str:
    spec = run.configuration["spec"]
    assumed = [words for field, words in ASSUMED.get(spec["attack"], {}).items() if spec[field] is None]
    return f" That {' and that '.join(assumed)} of this project: the paper does not state it legibly." if assumed else ""


def _summary(run: Run) -> str:
    spec, defense = run.configuration["spec"], run.configuration["defense"]
    name = "no defense"
    if defense["method"] != "none":
        name = (
            f"{defense['method']}, t = {defense['t']:g} in {defense['num_steps']} steps, gradient {defense['gradient']}"
            + (f", guidance {defense['guidance_gradient']}" if METHODS[defense["method"]].guidance else "")
        )
    attack, stages = spec["attack"], run.configuration["stages"]
    if any("eps" in fields for fields in stages.values()):  # salt and pepper knows no ball
        attack += f" {spec['norm']} {_radius(spec)}"
    sizes = "; ".join(
        f"{stage}: " + ", ".join(f"{key} {value}" for key, value in fields.items() if key not in ("class", "norm", "eps"))
        for stage, fields in stages.items()
    )
    return f"{run.count} images, {name}; {'no attack' if attack == 'none' else attack}" + (f" ({sizes})" if sizes else "")


def _radius(spec: Mapping[str, Any]) -> str:
    return f"{255 * spec['eps']:g}/255" if spec["norm"] == "Linf" else f"{spec['eps']:g}"


def _comparison(first: Run, second: Run) -> list[Section]:
    names = (first.name, second.name)
    seeds = {run.configuration["spec"]["seed"] for run in (first, second)}
    noise = "noise of their own, since their seeds differ"
    if len(seeds) == 1:
        noise = (
            "in the judge's draws common noise (the official row's follows units of work: it is common only where stage, shard "
            "and the images in it are)"
        )
    parts: list[Section] = []
    for kind in ("clean", "attacked"):
        if kind not in first.verdicts or kind not in second.verdicts:
            continue
        a, b = first.verdicts[kind], second.verdicts[kind]
        try:
            found = {protocol: protocols.compare(a, b, protocol) for protocol in (OFFICIAL, *PROTOCOLS)}
        except ValueError as error:
            return [Text(f"{names[0]} against {names[1]}", str(error))]
        rows = [
            (
                protocols.describe(protocol, len(a.logits)),
                f"{100 * c.difference:+.1f} ({100 * c.interval[0]:+.1f} to {100 * c.interval[1]:+.1f})",
                "" if c.only_first is None else f"{c.only_first} / {c.only_second}",
                "" if c.p is None else f"{c.p:.3g}",
            )
            for protocol, c in found.items()
        ]
        warnings = protocols.contradictions(names, found)
        if kind == "attacked" and first.configuration["stages"] != second.configuration["stages"]:
            warnings.insert(0, "they were not attacked in the same way")
        quiet = "No protocol contradicts another." if any(c.conclusion for c in found.values()) else "None tells them apart."
        parts.append(
            Table(
                f"{names[0]} against {names[1]}, {kind}",
                ("protocol", "difference in points (95 %)", "right in one only", "McNemar's exact p"),
                rows,
                f"The same images, {noise}. "
                + (f"Warning: {'; '.join(warnings)}." if warnings else quiet)
                + " Not corrected for testing several protocols.",
            )
        )
    return parts


def _classes(runs: Sequence[Run]) -> list[Section]:
    parts: list[Section] = []
    for run in runs:
        labels = run.verdicts["clean"].labels
        rows = []
        for label in sorted(set(labels.tolist())):
            here = labels == label
            cells = []
            for kind in run.verdicts.values():
                for protocol in (OFFICIAL, "average"):
                    low, high = protocols.wilson_interval(float(protocols.scores(kind, protocol)[here].sum()), int(here.sum()))
                    value = 100 * protocols.scores(kind, protocol)[here].mean()
                    cells.append(f"{value:.1f} % ({100 * low:.0f} to {100 * high:.0f})")
            rows.append((_class_name(run, label), str(int(here.sum())), *cells))
        columns = [f"{kind}, {protocol}" for kind in run.verdicts for protocol in (OFFICIAL, "average over draws")]
        parts.append(Table(f"{run.name}: by class", ("class", "images", *columns), rows, "Wilson's intervals of 95 %."))
    return parts


def _class_name(run: Run, label: int) -> str:
    # Other images may have ten classes, too, and these a classifier of more.
    known, classes = run.configuration["spec"]["images"] in CIFAR10_SETS, run.verdicts["clean"].logits.shape[2]
    return CIFAR10_CLASSES[label] if known and classes == len(CIFAR10_CLASSES) else str(label)


def _time(run: Run) -> Table | Text:
    predicted = run.notes.get("plan")
    if predicted is not None:
        return Text(f"{run.name}: what was planned and what it took", plan.beside(plan.Plan.from_dict(predicted), run.happened))
    rows = [
        (stage.name, str(stage.images), str(stage.forward), str(stage.gradient), plan.duration(stage.seconds))
        for stage in run.happened
    ]
    total = (sum(s.forward for s in run.happened), sum(s.gradient for s in run.happened), sum(s.seconds for s in run.happened))
    rows.append(("all", "", str(total[0]), str(total[1]), plan.duration(total[2])))
    return Table(
        f"{run.name}: what it took",
        ("stage", "images", "through the defense without gradient", "with gradient", "time"),
        rows,
        "Time of work, all workers together.",
    )


def _certificate(run: Run) -> list[Section]:
    certificate = run.notes.get("certificate")
    if certificate is None:
        return []
    fields = {**certificate, **{f"overall.{name}": value for name, value in (certificate["overall"] or {}).items()}}
    rows = [
        (name, f"{value:.3g}" if isinstance(value, float) else str(value))
        for name, value in fields.items()
        if not isinstance(value, (list, dict))
    ]
    note = f"Of {len(certificate['ids'])} images, against float64 back-propagation through the definition; see check-gradient."
    return [Table(f"{run.name}: certificate of the gradient that the attack followed", ("what", "value"), rows, note)]


def _configuration(run: Run) -> Table:
    rows = [("started", run.started), ("fingerprint of the results", run.fingerprint)]
    for section in ("environment", "defense", "images", "spec"):
        for name, value in run.configuration[section].items():
            if name != "labels" and (section, value) != ("spec", None):  # what was not set follows from the stages below
                rows.append((f"{section}.{name}", value if isinstance(value, str) else json.dumps(value)))
    return Table(f"{run.name}: configuration, versions, hashes", ("what", "value"), rows)


def _stages(run: Run) -> list[Section]:
    stages: dict[str, dict[str, Any]] = run.configuration["stages"]
    if not stages:
        return []
    fields = list(dict.fromkeys(name for stage in stages.values() for name in stage))
    rows = [(stage, *(str(values.get(name, "")) for name in fields)) for stage, values in stages.items()]
    return [Table(f"{run.name}: stages of the attack", ("stage", *fields), rows)]


def _again(run: Run) -> Text:
    words = shlex.split(run.command)
    for i, word in enumerate(words):
        # Into a folder of its own: the one that was named holds this run.
        if word == "--out" and i + 1 < len(words):
            words[i + 1] += "-again"
        elif word.startswith("--out="):
            words[i] += "-again"
    return Text(f"{run.name}: the command to repeat it", shlex.join(words) or "(started from Python)")


# --- pictures ---------------------------------------------------------------------------------------------------------


def _curves(run: Run) -> dict[str, np.ndarray]:
    """By stage: images that the attack had not yet seen fail, after each iteration, as a share of all images."""
    curves: dict[str, np.ndarray] = {}
    for stage in run.configuration["stages"]:
        units = [record.result["curve"] for record in run.records.values() if record.unit.stage == stage]
        units = [unit for unit in units if unit]
        if units:
            # An attack that has nobody left stops; its curve stays where it ended.
            length = max(map(len, units))
            curves[stage] = np.sum([unit + unit[-1:] * (length - len(unit)) for unit in units], axis=0) / run.count
    return curves


def _curve_picture(runs: Sequence[Run]) -> Picture:
    figure = _figure(7.0, 3.6)
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        for style, (stage, curve) in zip(itertools.cycle(("-", "--", ":", "-.")), _curves(run).items(), strict=False):
            label = f"{run.name}, {stage}"
            axes.plot(100 * curve, style, color=_COLOURS[number % len(_COLOURS)], label=label, linewidth=1.8)
    axes.set_xlabel("iteration of the attack (0: its starting point)")
    axes.set_ylabel("not yet seen to fail, % of all")
    axes.set_ylim(0, 102)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, loc="upper right")
    return Picture(
        "Accuracy against iterations",
        _png(figure),
        "As the attack sees it while it runs, on the draws that it uses: an image counts from the first iteration that "
        "misclassified it. The verdicts above are on fresh draws. Stages begin with the images that the one before left.",
    )


def _competitor(run: Run, number: int) -> int:
    """The likeliest class but for its own at the end of a shown image's way: attacked, where there was an attack."""
    kind = "attacked" if "attacked_confidences" in run.shown else "clean"
    last = run.shown[f"{kind}_confidences"][-1, number].copy()
    last[run.verdicts["clean"].labels[run.shown["images"][number]]] = -1
    return int(last.argmax())


def _path_picture(run: Run) -> Picture:
    images, labels = run.shown["images"], run.verdicts["clean"].labels
    columns = min(len(images), 2)
    rows = -(-len(images) // columns)
    figure = _figure(3.7 * columns + 1.2, 2.5 * rows + 0.3)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel in panels[len(images) :]:
        panel.set_axis_off()
    for number, image in enumerate(images):
        panel, competitor = panels[number], _competitor(run, number)
        for colour, of in zip(_COLOURS, (labels[image], competitor), strict=False):
            for kind, style in (("attacked", "-"), ("clean", ":")):
                if f"{kind}_confidences" in run.shown:
                    confidence = run.shown[f"{kind}_confidences"][:, number, of]
                    label = f"{_class_name(run, of)}{' (the label)' if of == labels[image] else ''}, {kind}"
                    panel.plot(confidence, style, color=colour, label=label, linewidth=1.5)
        panel.set_title(f"image {image}", fontsize=9)
        panel.set_ylim(-0.02, 1.02)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend(fontsize=6, loc="best")
    figure.supxlabel("step of the purification", fontsize=9)
    figure.supylabel("confidence", fontsize=9)
    noiseless = "Without noise, as in the paper's Fig. 2a"
    if METHODS[run.configuration["defense"]["method"]].forward_noising:
        noiseless += " (nor any before the first step, which this method has otherwise)"
    return Picture(
        f"{run.name}: confidence along the purification",
        _png(figure),
        f"{noiseless}: of the label, and of the class that comes nearest to it or beats it at the end. The classifier sees the "
        "state as it is.",
    )


def _gallery(run: Run) -> Picture:
    shown, count = run.shown, len(run.shown["images"])
    x = shown["clean_images"]
    columns: list[tuple[str, np.ndarray, str | None]] = [("clean", x, None)]
    if "clean_purified" in shown:
        columns.append(("clean, purified", shown["clean_purified"], "clean"))
    if "attacked_images" in shown:
        magnified = 0.5 + _MAGNIFIED * (shown["attacked_images"] - x)
        columns += [(f"perturbation × {_MAGNIFIED}", magnified, None), ("attacked", shown["attacked_images"], None)]
    if "attacked_purified" in shown:
        columns.append(("attacked, purified", shown["attacked_purified"], "attacked"))
    if "clean_purified" not in shown:  # nothing is purified: what the classifier says stands below the images themselves
        columns = [(title, images, title if title in ("clean", "attacked") else kind) for title, images, kind in columns]
    figure = _figure(1.6 * len(columns), 1.95 * count + 0.2)
    axes = np.atleast_2d(figure.subplots(count, len(columns)).reshape(count, len(columns)))
    labels = run.verdicts["clean"].labels
    for row, image in enumerate(shown["images"]):
        for column, (title, images, kind) in enumerate(columns):
            panel = axes[row, column]
            panel.imshow(images[row].transpose(1, 2, 0).clip(0, 1), interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            if row == 0:
                panel.set_title(title, fontsize=9)
            if column == 0 and kind is None:
                panel.set_xlabel(f"{_class_name(run, labels[image])} ({image})", fontsize=8)
            if kind is not None:
                logits = shown[f"{kind}_logits"][0, row]
                predicted = int(logits.argmax())
                confidence = float(np.exp(logits[predicted] - logits.max()) / np.exp(logits - logits.max()).sum())
                colour = "#009e73" if predicted == labels[image] else "#d55e00"
                panel.set_xlabel(f"{_class_name(run, predicted)} {confidence:.2f}", fontsize=8, color=colour)
    return Picture(
        f"{run.name}: gallery",
        _png(figure),
        "Below: the class that the defense says and its confidence, at the judge's first draw (green: right).",
    )


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(f'matplotlib draws the pictures ({error}); install it with: pip install "coupfast[demo]"') from error
    # Not pyplot: it keeps figures and looks for a display.
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# --- rendering --------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
table { border-collapse: collapse; font-size: .86rem; } th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #1a1a1a; } td { border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
p { color: #444; max-width: 50rem; } img { max-width: 100%; } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
"""


def to_html(parts: Sequence[Section], about: str) -> str:
    """A page that needs no other file."""
    render: dict[type, Callable[[Any], str]] = {Table: _html_table, Picture: _html_picture, Text: _html_text}
    body = "\n".join(f"<h2>{html.escape(part.title)}</h2>\n{render[type(part)](part)}" for part in parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>coupfast report</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>Evaluation of purification defenses</h1>\n"
        f"<p>{html.escape(about)}</p>\n{body}\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    note = f"<p>{html.escape(table.note)}</p>\n" if table.note else ""
    rows = "\n".join([row("th", table.header), *(row("td", cells) for cells in table.rows)])
    return f"{note}<table>\n{rows}\n</table>"


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<p>{html.escape(picture.note)}</p>\n<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{data}">'


def _html_text(text: Text) -> str:
    return f"<pre>{html.escape(text.lines)}</pre>"


def to_markdown(parts: Sequence[Section], about: str) -> str:
    """The tables and texts; pictures are in the HTML."""
    blocks = []
    for part in parts:
        if isinstance(part, Table):
            lines = [part.header, ("---",) * len(part.header), *part.rows]
            rows = "\n".join("| " + " | ".join(map(_escaped, cells)) + " |" for cells in lines)
            blocks.append(f"## {part.title}\n\n" + (f"{part.note}\n\n" if part.note else "") + rows)
        elif isinstance(part, Text):
            blocks.append(f"## {part.title}\n\n```\n{part.lines}\n```")
    return "\n\n".join(["# Evaluation of purification defenses", about, *blocks]) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
