"""The command line: parse, call, print. Everything that is computed is computed elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import coupfast
from coupfast import doctor
from coupfast.certificate import check_gradient
from coupfast.data import image_files, load_images, save_images
from coupfast.defenses import METHODS
from coupfast.environment import machine, version
from coupfast.evaluation import attacks, protocols
from coupfast.evaluation import plan as planning
from coupfast.evaluation import report as reporting
from coupfast.evaluation.defense import NO_DEFENSE, settings
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.pools import UnitFailed
from coupfast.evaluation.runs import CLUSTERS, evaluate
from coupfast.evaluation.spec import SEEDINGS, Spec, paper
from coupfast.models.checkpoints import file_sha256, state_dict_sha256
from coupfast.models.from_file import convert_checkpoint
from coupfast.models.registry import described
from coupfast.models.zoo import choices, import_references, load_classifier, load_score
from coupfast.purify import ENGINES, GRADIENTS, GUIDANCE_GRADIENTS, PRECISIONS, PurifiedClassifier, Purifier
from coupfast.solvers import SOLVERS

REPORT = "purify.json"
ARCHIVE = "purified.npz"

# What a caller can put right: a wrong argument, file, installation or size. Anything else is a bug and keeps its traceback.
_EXPECTED = (ValueError, FloatingPointError, ImportError, MemoryError, torch.OutOfMemoryError, OSError, UnitFailed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        Exit status: 0; 1 where `doctor --strict` finds a problem; 2 for a wrong argument, file or setting, after one line on
        stderr; 130 after Ctrl-C.
    """
    import_references(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    options.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return options.run(options)
    except _EXPECTED as error:
        if options.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"coupfast {options.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"coupfast {options.command}: interrupted", file=sys.stderr)
        return 130


# --- purify -----------------------------------------------------------------------------------------------------------


def _purify(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    if options.batch < 1:
        raise ValueError(f"`--batch` is a number of images, at least 1, got {options.batch}")
    if len(set(options.draw)) != len(options.draw):
        raise ValueError(f"`--draw` has an index twice: {' '.join(map(str, options.draw))}")
    images = _load(options.inputs, options.limit, options.channels)
    ids = torch.arange(options.first_id, options.first_id + len(images.x))
    if options.first_id < 0 or int(ids[-1]) >= 2**32:
        raise ValueError(f"`--first-id` and the ids after it are in [0, 2**32), got {options.first_id}")
    names = []  # [draws][images]
    for draw in options.draw:
        suffix = f"-draw{draw}" if len(options.draw) > 1 else ""
        names.append([f"{i:05d}-{stem}{suffix}" for i, stem in zip(ids.tolist(), images.stems, strict=True)])
    out = Path(options.out)
    targets = [out / REPORT]
    if "png" in options.format:
        targets += [out / f"{name}.png" for row in names for name in row]
    if "npz" in options.format:
        targets.append(out / ARCHIVE)
    _refuse_existing(targets, options.force)

    purifier, networks = _purifier(options)
    x = images.x.to(options.device)
    bar = tqdm(total=len(x) * len(options.draw), desc="purify", unit="image", disable=None)
    purified: list[Tensor] = []
    with torch.no_grad(), bar:
        for draw, draw_names in zip(options.draw, names, strict=True):
            for start in range(0, len(x), options.batch):
                part = slice(start, start + options.batch)
                result = purifier(x[part], seed=options.seed, ids=ids[part], draw=draw, progress=sys.stderr.isatty())
                assert isinstance(result, Tensor)
                # With --no-clamp the last step may leave the range by a little: an image file cannot.
                purified.append(result.cpu())
                if "png" in options.format:
                    save_images(result.clamp(0.0, 1.0), out, draw_names[part], overwrite=options.force)
                bar.update(len(result))
    everything = torch.cat(purified)
    out.mkdir(parents=True, exist_ok=True)
    if "npz" in options.format:
        fields: dict[str, Any] = {"images": everything.numpy(), "names": np.array([name for row in names for name in row])}
        if images.labels is not None:
            fields["labels"] = np.tile(images.labels, len(options.draw))
        np.savez_compressed(out / ARCHIVE, **fields)
    inputs, labels = images.x, images.labels
    rows = [
        {
            "id": int(ids[i]),
            "draw": draw,
            "source": images.sources[i],
            "label": None if labels is None else int(labels[i]),
            "input_sha256": _tensor_sha256(inputs[i]),
            "file": f"{names[d][i]}.png" if "png" in options.format else None,
            "output_sha256": _tensor_sha256(everything[d * len(x) + i]),
        }
        for d, draw in enumerate(options.draw)
        for i in range(len(x))
    ]
    report = {
        "command": shlex.join(["coupfast", *options.argv]),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - started,
        "settings": settings(purifier) | {"seed": options.seed, "draws": options.draw, "batch": options.batch},
        "networks": networks,
        "inputs": options.inputs,
        "limit": options.limit,
        "archive": ARCHIVE if "npz" in options.format else None,
        "hashes": "input_sha256 and output_sha256 are of the float32 values, little-endian, (channel, row, column)",
        "images": rows,
        "environment": _environment(options.device),
    }
    _write_json(report, out / REPORT)
    print(
        f"Purified {len(x)} images"
        + (f", {len(options.draw)} draws each," if len(options.draw) > 1 else "")
        + f" by {purifier.method}, t = {purifier.t:g} in {purifier.num_steps} steps, engine {purifier.engine} on "
        f"{options.device}, in {report['seconds']:.1f} s: {out}"
    )
    return 0


def _purifier(options: argparse.Namespace) -> tuple[Purifier, dict[str, Any]]:
    """The purifier that the options describe, and what identifies its networks."""
    score = load_score(options.score, weights=options.score_weights, device=options.device)
    networks = {"score": _identity(options.score, options.score_weights, score)}
    classifier = None
    if METHODS[options.method].guidance:
        classifier = _classifier(options)
        networks["classifier"] = _identity(options.classifier, options.classifier_weights, classifier)
    purifier = Purifier(
        score,
        classifier,
        method=options.method,
        t=options.t,
        guidance_scale=options.guidance_scale,
        num_steps=options.steps,
        solver=options.solver,
        engine=options.engine,
        precision=options.precision,
        gradient=getattr(options, "gradient", "none"),
        guidance_gradient=getattr(options, "guidance_gradient", "exact"),
        clamp=not options.no_clamp,
    )
    return purifier, networks


def _classifier(options: argparse.Namespace) -> nn.Module:
    return load_classifier(
        options.classifier, weights=options.classifier_weights, device=options.device, activation=options.activation
    )


def _identity(source: str, weights: str | None, network: nn.Module) -> dict[str, Any]:
    return {"source": source, "weights": weights, "sha256": state_dict_sha256(network)}


class _Images:
    """Images of all inputs, in order."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.stems: list[str] = []
        self.sources: list[str] = []
        self.label_parts: list[np.ndarray] = []

    @property
    def x(self) -> Tensor:
        return torch.cat(self.parts)

    @property
    def labels(self) -> np.ndarray | None:
        """Labels, if every input has them."""
        return np.concatenate(self.label_parts) if len(self.label_parts) == len(self.parts) else None


def _load(inputs: Sequence[str], limit: int | None, channels: int | None = None) -> _Images:
    images = _Images()
    for source in inputs:
        x, y = load_images(source, limit=limit, channels=channels, labels_needed=False)
        if images.parts and x.shape[1:] != images.parts[0].shape[1:]:
            found, first = ("x".join(map(str, shape[1:])) for shape in (x.shape, images.parts[0].shape))
            raise ValueError(f"the images of {source} are {found}, those of {inputs[0]} {first}; purify them separately")
        path = Path(source).expanduser()
        if path.is_dir():
            files = image_files(path)[: len(x)]
            images.stems += [file.stem for file in files]
            images.sources += list(map(str, files))
        elif path.is_file() and path.suffix.lower() != ".npz":
            images.stems.append(path.stem)
            images.sources.append(str(path))
        else:
            images.stems += [path.stem] * len(x)
            images.sources += [f"{source}[{i}]" for i in range(len(x))]
        images.parts.append(x)
        if y is not None:
            images.label_parts.append(y.numpy())
    return images


# --- evaluate ---------------------------------------------------------------------------------------------------------


def _evaluate(options: argparse.Namespace) -> int:
    if (options.out is None) == (options.resume is None):
        raise ValueError("say where the run is kept: --out RUN starts one, --resume RUN continues one")
    folder = options.resume or options.out
    spec = _spec(options)
    if options.price is not None and not options.plan:
        raise ValueError("`--price` is for --plan, which says what the run will cost")
    certified = options.certify
    if certified is None:
        certified = int(spec.method != NO_DEFENSE and any(attack.cost().gradient for attack in spec.stages().values()))
    if certified < 0:
        raise ValueError(f"`--certify` is a number of images, got {certified}")
    if certified and spec.method == NO_DEFENSE:
        raise ValueError("a certificate is of a purification's gradient; with --method none there is none")

    def predict() -> dict[str, Any]:
        if options.resume:
            with Ledger(folder, read_only=True) as ledger:
                if ledger.done():
                    raise ValueError(f"the run in {folder} has begun without a plan, and one made now would predict nothing")
        predicted = planning.plan(spec, workers=options.workers, price=options.price)
        print(predicted, flush=True)
        return predicted.to_dict()

    notes: dict[str, Callable[[], Any]] = {}
    if options.plan:
        notes["plan"] = predict
    if certified:
        notes["certificate"] = lambda: _certificate(spec, certified)
    with evaluate(
        spec,
        folder,
        resume=options.resume is not None,
        workers=options.workers,
        cluster=options.cluster,
        command=shlex.join(["coupfast", *options.argv]),
        notes=notes,
        progress=True,
    ) as ledger:
        count = ledger.configuration["images"]["count"]
        if options.plan:
            print(planning.beside(planning.Plan.from_dict(ledger.notes()["plan"]), planning.happened(ledger)))
        defense = "no defense" if spec.method == NO_DEFENSE else spec.method
        attack = spec.attack if spec.stages() else "no attack"
        if any(hasattr(stage, "eps") for stage in spec.stages().values()):  # salt and pepper knows no ball
            attack += f", {spec.norm} {spec.eps:.6g}"
        print(f"{defense} under {attack}, {count} images; 95 % intervals")
        print(protocols.table(protocols.judged(ledger)))
        print(f"everything is in {folder}: coupfast report {folder}; fingerprint of the results {ledger.fingerprint()[:16]}")
    return 0


def _certificate(spec: Spec, images: int) -> dict[str, Any]:
    defense = spec.build(str(torch.device(spec.device)))
    assert defense.purified is not None
    x, y = spec.load()
    count = min(images, len(x))
    print(f"certifying the gradient that the attack follows, on {count} of the images", file=sys.stderr, flush=True)
    found = check_gradient(
        defense.purified, x[:images].to(spec.device), y[:images], images=images, progress=sys.stderr.isatty()
    )
    return found.to_dict()


def _plan(options: argparse.Namespace) -> int:
    if options.run_ is not None:
        with Ledger(options.run_, read_only=True) as ledger:
            notes, found = ledger.notes(), planning.happened(ledger)
        if "plan" not in notes:
            raise ValueError(f"the run in {options.run_} was started without a plan: coupfast evaluate --plan makes one first")
        print(planning.beside(planning.Plan.from_dict(notes["plan"]), found))
        return 0
    print(
        planning.plan(
            _spec(options),
            workers=options.workers,
            probe_images=options.probe_images,
            probe_steps=options.probe_steps,
            price=options.price,
        )
    )
    return 0


def _report(options: argparse.Namespace) -> int:
    target = Path(options.out) if options.out else Path(options.runs[0]) / "report.html"
    if target.suffix != ".html":
        raise ValueError(f"{target} is written as HTML: give it that suffix; its tables go beside it, as Markdown")
    _refuse_existing([target, target.with_suffix(".md")], options.force)
    page, tables = reporting.write(options.runs, target)
    print(f"{page}\n{tables}")
    return 0


def _spec(options: argparse.Namespace) -> Spec:
    """What the options describe; where they say nothing, what the run to resume or the paper has."""
    stored: dict[str, Any] | None = None
    if getattr(options, "resume", None):
        with Ledger(options.resume, read_only=True) as ledger:
            stored = ledger.configuration["spec"]
    elif options.paper:
        stored = paper(options.norm)
    if stored is not None:
        renamed = {"num_steps": "steps", "images": "input"}
        defaults = {renamed.get(name, name): value for name, value in stored.items() if name not in ("clamp", "device")}
        defaults["no_clamp"] = not stored.get("clamp", True)
        if "device" in stored:
            defaults["device"] = _device(stored["device"])
        options = _parser({options.command: defaults}).parse_args(options.argv)
    values = vars(options) | {"num_steps": options.steps, "images": options.input, "clamp": not options.no_clamp}
    values["device"] = str(options.device)
    return Spec(**{field.name: values[field.name] for field in dataclasses.fields(Spec) if values[field.name] is not None})


# --- the other commands -----------------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    if options.json not in (None, "-"):
        _refuse_existing([Path(options.json)], options.force)
    report = doctor.run(device=options.device, progress=sys.stderr.isatty())
    if options.json == "-":
        print(json.dumps(report, indent=2))
    else:
        print(doctor.text(report))
        if options.json is not None:
            _write_json(report, Path(options.json))
    return 1 if options.strict and not report["ok"] else 0


def _check_gradient(options: argparse.Namespace) -> int:
    if options.json not in (None, "-"):
        _refuse_existing([Path(options.json)], options.force)
    images = _load([options.input], options.images)
    purifier, networks = _purifier(options)
    classifier = purifier.classifier
    if classifier is None:
        classifier = _classifier(options)
        networks["classifier"] = _identity(options.classifier, options.classifier_weights, classifier)
    certificate = check_gradient(
        PurifiedClassifier(purifier, classifier, seed=options.seed),
        images.x.to(options.device),
        None if images.labels is None else torch.from_numpy(images.labels),
        images=options.images,
        draws=options.draws,
        directions=options.directions,
        memory_limit=None if options.memory_limit is None else int(options.memory_limit * 2**30),
        progress=sys.stderr.isatty(),
    )
    report = {
        "command": shlex.join(["coupfast", *options.argv]),
        "certificate": certificate.to_dict(),
        "networks": networks,
        "images": images.sources[: options.images],
        "environment": _environment(options.device),
    }
    if options.json == "-":
        print(json.dumps(report, indent=2))
    else:
        print(certificate)
        if options.json is not None:
            _write_json(report, Path(options.json))
    return 0


def _convert(options: argparse.Namespace) -> int:
    source, target = Path(options.source), Path(options.target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} is written as safetensors: give it that suffix, so that it is read as such")
    _refuse_existing([target], options.force)
    config = None if options.config is None else json.loads(Path(options.config).read_text())
    activation = {"activation": options.activation}
    written = convert_checkpoint(source, target, config=config, name=options.network, options=activation)
    print(
        f"{file_sha256(target)}  {target}\n"
        f"{target.stat().st_size / 1e6:.0f} MB of weights of a {written['arch']}, of {source.stat().st_size / 1e6:.0f} MB in "
        f"{source}"
    )
    return 0


# --- shared -----------------------------------------------------------------------------------------------------------


def _refuse_existing(paths: Sequence[Path], force: bool) -> None:
    """Before any work: what would be lost, and what could not be written."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not a file that could be written")
        if not force and path.exists():
            others = sum(other.exists() for other in paths) - 1
            more = f" (and {others} more)" if others else ""
            raise FileExistsError(f"{path} exists{more}; choose another place, or --force to replace")


def _write_json(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def _tensor_sha256(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "coupfast": coupfast.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "torchsde", "safetensors")},
        **machine(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; say cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} was asked for, but torch {torch.__version__} sees no CUDA device")
    return device


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in every help line that has one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.required:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def _parser(defaults: Mapping[str, Mapping[str, Any]] | None = None) -> argparse.ArgumentParser:
    """The commands; `defaults` replace those of a command's options."""
    parser = argparse.ArgumentParser(
        prog="coupfast", description="Diffusion-based adversarial purification: fast, exact, reproducible."
    )
    parser.add_argument("--version", action="version", version=f"coupfast {coupfast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str, more: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=f"{summary}. {more}".strip(), formatter_class=_Formatter)
        added.set_defaults(run=run)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    purify = command(
        "purify",
        _purify,
        "Purify images and write them as files",
        f"Writes one PNG an image (ID-NAME.png) and {REPORT}, which holds all that is needed to repeat the run: settings, "
        "seed, SHA-256 of weights, inputs and outputs, versions. An image's noise depends on the seed, its id and the draw, "
        "not on the batch it stands in. Existing files are not replaced without --force.",
    )
    purify.add_argument(
        "inputs",
        nargs="+",
        metavar="IN",
        help="image files (PNG, JPEG), folders of them, .npz archives, or the names cifar10-20, cifar10-512, cifar10",
    )
    purify.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if it does not exist")
    purify.add_argument(
        "--format",
        nargs="+",
        choices=("png", "npz"),
        default=["png"],
        help=f"png: 8 bits, to look at; npz: the exact float32 values, all in {ARCHIVE}; or both",
    )
    purify.add_argument("--force", action="store_true", help="replace files that exist")
    purify.add_argument("--limit", type=int, metavar="N", help="take at most the first N images of each input")
    purify.add_argument(
        "--channels", type=int, choices=(1, 3), help="1 keeps grey image files grey; 3: RGB, of grey ones three equal channels"
    )
    purify.add_argument("--batch", type=int, default=20, metavar="N", help="images at a time; same noise, another rounding")
    purify.add_argument("--first-id", type=int, default=0, metavar="ID", help="id of the first image; the others count on")
    purify.add_argument(
        "--draw", type=int, nargs="+", default=[0], metavar="D", help="noise draws, in [0, 2**32): one purified image for each"
    )
    _add_defense(purify)

    check = command(
        "check-gradient",
        _check_gradient,
        "Compare the gradient through a purification with float64 back-propagation and finite differences",
        "Float64 passes of whole purifications are slow on a CPU: --steps 20 or fewer serves for a first look.",
    )
    check.add_argument("input", nargs="?", default="cifar10-20", metavar="IN", help="images, as for `coupfast purify`")
    check.add_argument("--images", type=int, default=2, metavar="N", help="how many images to use, the first ones")
    check.add_argument(
        "--draws", type=int, default=8, metavar="M", help="noise draws of the signal-to-noise ratio, from 2; 0: leave it out"
    )
    check.add_argument(
        "--directions",
        type=int,
        default=2,
        metavar="D",
        help="random directions of the finite differences besides the gradient's sign; 0: leave both out",
    )
    check.add_argument("--gradient", choices=GRADIENTS, default="exact", help="which gradient to check")
    check.add_argument(
        "--guidance-gradient", choices=GUIDANCE_GRADIENTS, default="exact", help="detached: the guidance taken as a constant"
    )
    check.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="GiB that float64 back-propagation may take; half of what is free"
    )
    check.add_argument("--json", metavar="FILE", help="also write everything as JSON; -: to stdout, instead of the text")
    check.add_argument("--force", action="store_true", help="replace FILE if it exists")
    _add_defense(check)

    evaluate_ = command(
        "evaluate",
        _evaluate,
        "Attack a defense and say how sure the result is; can be killed and continued at any moment",
        "The run's folder holds a ledger and the attacked images. The result depends on the options here, not on the number of "
        "workers or on interruptions.",
    )
    evaluate_.add_argument("--out", metavar="RUN", help="folder of a new run")
    evaluate_.add_argument("--resume", metavar="RUN", help="continue the run in this folder, with its own options")
    evaluate_.add_argument("--workers", type=int, default=1, metavar="N", help="units at a time; changes no bit of the result")
    evaluate_.add_argument("--plan", action="store_true", help="probe first; keep what it will take beside the run, once")
    evaluate_.add_argument("--price", type=float, metavar="P", help="with --plan: of a worker and hour, in any currency")
    evaluate_.add_argument(
        "--certify",
        type=int,
        metavar="N",
        help="keep a certificate of the gradient that the attack follows, from N images, with the run (default 1 where it "
        "follows one through a purification, else 0; a few dozen purifications in float64)",
    )
    evaluate_.add_argument("--cluster", choices=CLUSTERS, default="none", help="none: processes here; ray: on a Ray cluster")
    _add_evaluation(evaluate_)

    plan = command(
        "plan",
        _plan,
        "Say what an evaluation would take, from a short probe on this machine; or, of a run, the plan beside what happened",
        "Of networks that do not ship with the package no weights are needed: random ones take as long, and the plan says so.",
    )
    plan.add_argument("--run", dest="run_", metavar="RUN", help="compare this run with the plan that it was started with")
    plan.add_argument("--workers", type=int, default=1, metavar="N", help="that share the work")
    plan.add_argument("--probe-images", type=int, default=1, metavar="N", help="batch of the probe; a run has --shard of them")
    plan.add_argument("--probe-steps", type=int, default=2, metavar="K", help="steps of the probe's purification")
    plan.add_argument("--price", type=float, metavar="P", help="of a worker and hour, in any currency")
    _add_evaluation(plan)

    report_ = command(
        "report",
        _report,
        "Report on finished evaluations, side by side: an HTML file that needs nothing else, and its tables as Markdown",
    )
    report_.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    report_.add_argument("--out", metavar="FILE", help="the .html file to write; without it RUN/report.html")
    report_.add_argument("--force", action="store_true", help="replace what exists")

    doctor_ = command(
        "doctor",
        _doctor,
        "Say what is installed, which engines run here, and whether they compute what they should",
        "Takes 10 to 20 seconds on two cores. On a GPU its kernels and the CUDA engine are checked and timed, too.",
    )
    doctor_.add_argument("--strict", action="store_true", help="exit with status 1 if there is any problem")
    doctor_.add_argument("--json", metavar="FILE", help="also write the report as JSON; -: to stdout, instead of the text")
    doctor_.add_argument("--force", action="store_true", help="replace FILE if it exists")
    doctor_.add_argument(
        "--device", type=_device, metavar="DEVICE", help="where to try the engines; the CPU and every GPU"
    )

    convert = command(
        "convert",
        _convert,
        "Convert a checkpoint to safetensors with the weights in use only (of score_sde's checkpoint_8.pth the averaged ones)",
    )
    convert.add_argument("source", metavar="SRC", help="the checkpoint; nothing in it is executed")
    convert.add_argument("target", metavar="DST", help="the .safetensors file to write")
    convert.add_argument(
        "--config", metavar="FILE", help="JSON with the network's configuration; without it the checkpoint tells, or --network"
    )
    convert.add_argument(
        "--network",
        metavar="NAME",
        help=f"whose weights they are: {described('score')}, {described('classifier')}, or package.module:NAME",
    )
    convert.add_argument("--activation", choices=["relu", "silu"], help="of a DMWideResNet, whose weights do not tell it")
    convert.add_argument("--force", action="store_true", help="replace DST if it exists")
    for name, values in (defaults or {}).items():
        commands.choices[name].set_defaults(**values)
    return parser


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Options that a `Spec` has."""
    spec = Spec()
    parser.add_argument("input", nargs="?", default=spec.images, metavar="IN", help="labelled images, as for `coupfast purify`")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images, which must exist")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the paper's images, networks, times and radii (for --norm) unless given; an evaluation needs their weights: "
        "--score-weights, --classifier-weights",
    )
    group = parser.add_argument_group("the attack (settings left out are the published ones)")
    # No choices: `Spec` says what was meant.
    assumed = "; ".join(f"{name}: {', '.join(words.values())}" for name, words in attacks.ASSUMED.items())
    group.add_argument(
        "--attack",
        default=spec.attack,
        metavar="NAME",
        help=f"{', '.join(attacks.SUITES)} (where the paper is not legible, {assumed})".replace("%", "%%"),
    )
    group.add_argument("--norm", choices=("Linf", "L2"), default=spec.norm, help="of the attack")
    group.add_argument("--eps", type=_fraction, default="8/255", metavar="E", help="radius for images in [0, 1]")
    group.add_argument("--iterations", type=int, metavar="N", help="of APGD and FAB: 100; of PGD: 40, in bpda-eot-20: 20")
    group.add_argument(
        "--eot-iter",
        type=int,
        metavar="N",
        help="draws of the noise that a gradient is averaged over: 20 in autoattack-rand, 15 of PGD, else 1",
    )
    group.add_argument("--queries", type=int, metavar="N", help="of Square: 5000")
    group.add_argument("--target-classes", type=int, metavar="N", help="of APGD-T and FAB-T: 9")
    group.add_argument("--step-size", type=_fraction, metavar="A", help="of PGD: 2/255 in Linf, eps / 5 in L2")
    group.add_argument(
        "--drop",
        choices=("never", "any", "mean"),
        help="when PGD leaves an image: never (pgd-eot), once any draw is wrong, or the mean logits are (bpda-eot)",
    )
    group.add_argument("--amount", type=float, metavar="P", help="share of pixels that salt and pepper changes: 0.05")
    group = parser.add_argument_group("the evaluation")
    group.add_argument("--seeding", choices=SEEDINGS, default=spec.seeding, help="a seed for each unit, or AutoAttack's one")
    group.add_argument("--shard", type=int, default=spec.shard, metavar="N", help="images of a unit of work, which is a batch")
    group.add_argument("--draws", type=int, default=spec.draws, metavar="N", help="fresh draws that judge each image")
    group.add_argument(
        "--paths",
        type=_paths,
        default=spec.paths,
        metavar="N|I,J,...",
        help="images whose purification the report shows: the first N, or by number from 0 (one alone: '7,')",
    )
    group.add_argument("--threads", type=int, default=spec.threads, metavar="N", help="CPU threads of a worker")
    group.add_argument(
        "--memory-gib", type=float, metavar="GIB", help="that a purification may take above the weights; without it the least"
    )
    group.add_argument("--gradient", choices=GRADIENTS, help="that the attack follows; without it the one that it is made for")
    group.add_argument(
        "--guidance-gradient", choices=GUIDANCE_GRADIENTS, default="exact", help="detached: as COUP's published code has it"
    )
    _add_defense(parser, [*METHODS, NO_DEFENSE], seeds="[0, 2**63)")
    parser.set_defaults(seed=spec.seed)


def _paths(text: str) -> int | tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number) if "," in text else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images and no list of them; say 4 or 0,5,7") from error


def _fraction(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; say 0.5 or 8/255") from error


def _add_defense(
    parser: argparse.ArgumentParser, methods: Sequence[str] = tuple(METHODS), *, seeds: str = "[0, 2**64)"
) -> None:
    """Options of the purifier, as `coupfast.purify` has them."""
    group = parser.add_argument_group("the purification")
    group.add_argument(
        "--method", choices=methods, default="coup", help="reverse-sde is COUP without guidance, diffpure adds noise first"
    )
    group.add_argument(
        "--t", type=float, default=0.1, metavar="T", help="purification time in (1e-5, 1]; step 100 of 1000 is 0.1"
    )
    group.add_argument(
        "--steps", type=int, metavar="K", help="K equal steps; without it one step each 1e-3 of t, the last one shorter"
    )
    group.add_argument("--guidance-scale", type=float, default=1.0, metavar="L", help="the paper's lambda, at least 0")
    group.add_argument("--solver", choices=SOLVERS, default="euler-maruyama", help="how the SDE is integrated")
    group.add_argument("--no-clamp", action="store_true", help="do not clip the state to [-1, 1] (DiffPure's code does not)")
    group.add_argument("--seed", type=int, default=0, metavar="S", help=f"fixes the noise; in {seeds}")
    group.add_argument(
        "--score",
        default="cifar10-tiny",
        metavar="NAME|FILE",
        help=f"score network: {choices('score')}",
    )
    group.add_argument("--score-weights", metavar="FILE", help="weights for a NAME that does not ship with the package")
    group.add_argument(
        "--activation",
        choices=["relu", "silu"],
        help="of a DMWideResNet file, which does not tell it",
    )
    group.add_argument(
        "--classifier",
        default="cifar10-tiny",
        metavar="NAME|FILE",
        help=f"classifier: {choices('classifier')}",
    )
    group.add_argument("--classifier-weights", metavar="FILE", help="weights for a NAME that does not ship with the package")
    group.add_argument("--engine", choices=["auto", *ENGINES], default="auto", help="what runs the steps")
    group.add_argument("--precision", choices=PRECISIONS, default="strict", help="strict: float32 as IEEE 754 has it")
    group.add_argument("--device", type=_device, default=_default_device(), metavar="DEVICE", help="cpu, cuda, cuda:1, ...")
