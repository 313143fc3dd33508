"""Options that several commands have. Where nothing is said, an option is not there: what follows then, others say."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from coupfast.evaluation.purification import keywords
from coupfast.gradients import GRADIENTS
from coupfast.methods import METHODS, Method, method_name
from coupfast.models.checkpoints import state_dict_sha256
from coupfast.models.registry import Kind
from coupfast.models.zoo import choices, load_classifier, load_score
from coupfast.naming import is_reference, resolve
from coupfast.options import Option, options_of
from coupfast.purify import Purifier
from coupfast.sde import VPSDE, DiscreteVPSDE
from coupfast.settings import Settings, options
from coupfast.solvers import NamedSolver, solver_name

DEFAULT_NETWORK = "cifar10-tiny"
#: Methods that an option's help names beside it.
FEW = 3


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in every help line that has one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.required:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


Command = Callable[[argparse.Namespace], int]


def add_command(commands: Any, name: str, run: Command, summary: str, more: str = "") -> argparse.ArgumentParser:
    """A command's parser, with what all of them have."""
    added: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary}. {more}".strip(), formatter_class=Formatter
    )
    added.set_defaults(run=run)
    added.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return added


def add_workers(group: Any, what: str) -> None:
    group.add_argument(
        "--workers",
        type=lambda said: int(said) if said.lstrip("-").isdigit() else said,
        default=1,
        metavar="N",
        help=f"{what}; auto: one for as many --threads of this machine's cores, or for each GPU",
    )


def add_option(group: Any, option: Option, *, note: str | None = None) -> None:
    """An option that is in the namespace only where it is given."""
    told = f" (default: {spelled(option.default)})" if _is_told(option.default) else ""
    option.add_to(group, default=argparse.SUPPRESS, note=told if note is None else note)


def spelled(value: Any) -> str:
    """A default as it is typed."""
    if isinstance(value, NamedSolver):
        return solver_name(value)
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, VPSDE):
        return f"{value.beta_min:g},{value.beta_max:g}{',discrete' if isinstance(value, DiscreteVPSDE) else ''}"
    return str(value)


def _is_told(default: Any) -> bool:
    return default is not None and default is not dataclasses.MISSING and not isinstance(default, (bool, dict))


def _of_methods(option: Option) -> str:
    """Which methods have an option, where few do and its help does not say so, and its defaults, where they are not one."""
    owned = {name: {own.keyword: own.default for own in options_of(method)} for name, method in METHODS.items()}
    found = {name: own[option.keyword] for name, own in owned.items() if option.keyword in own}
    few = 0 < len(found) <= FEW and not any(name in option.help for name in found)
    said = [f"of {', '.join(found)}"] if few else []
    first = option.default
    defaults = [f"default: {spelled(first)}"] if _is_told(first) else []
    others = [f"{name} {spelled(own)}" for name, own in found.items() if own != first and _is_told(own)]
    if others:
        defaults.append(f"{'' if defaults else 'default: '}{', '.join(others)}")
    said += defaults
    return f" ({'; '.join(said)})" if said else ""


def add_purification(parser: argparse.ArgumentParser, method: str | None = None, *, gradient: bool, none: bool = False) -> None:
    """Options of the purifier, as `coupfast.Settings` has them, and of its networks.

    Args:
        method: The one that is asked for, whose options are read as it has them.
        gradient: Whether gradients matter.
        none: Whether the method may be none.
    """
    group = parser.add_argument_group("the purification")
    more = ", none: the classifier alone" if none else ""
    group.add_argument(
        "--method",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help=f"{', '.join(METHODS)} (reverse-sde is COUP without guidance, diffpure adds noise first){more}, or "
        f"package.module:NAME of another (default: coup)",
    )
    known = options()
    chosen = list(known["method"])
    if is_reference(method):
        chosen += options_of(resolve(str(method), Method, option="method"))
    elif method in METHODS:  # which reads a word in its own way: one time, where others take a grid
        chosen = [*options_of(METHODS[str(method)]), *chosen]
    if gradient:
        group.add_argument(
            "--gradient",
            choices=tuple(GRADIENTS),
            default=argparse.SUPPRESS,
            help="what the backward pass computes; an adjoint's error depends on the steps "
            f"(default: {'the one that the attack is made for' if none else 'exact'})",
        )
        chosen += known["gradient"]
    seen = set()
    for option in [*chosen, *known["engine"]]:
        if option.keyword not in seen:
            # No machine may split an evaluation's batches otherwise than another.
            note = _of_methods(option) if option in known["method"] else None
            add_option(group, option, note=" (default: whole)" if none and option.keyword == "memory_budget" else note)
        seen.add(option.keyword)
    # Older spellings.
    group.add_argument("--steps", dest="num_steps", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    if gradient:
        group.add_argument("--memory-gib", dest="memory_budget", type=_gib, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_networks(group)


def add_networks(group: Any) -> None:
    """Which score network and which classifier."""
    named: tuple[tuple[Kind, str], ...] = (("score", "score network"), ("classifier", "classifier"))
    for kind, name in named:
        group.add_argument(
            f"--{kind}",
            default=argparse.SUPPRESS,
            metavar="NAME|FILE",
            help=f"{name}: {choices(kind)} (default: {DEFAULT_NETWORK})",
        )
        group.add_argument(
            f"--{kind}-weights",
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="weights for a NAME that does not ship with the package",
        )
    group.add_argument(
        "--guide",
        default=argparse.SUPPRESS,
        metavar="NAME|FILE",
        help="classifier that a guided method follows, in the place of the one that classifies",
    )
    group.add_argument(
        "--guide-weights", default=argparse.SUPPRESS, metavar="FILE", help="weights for such a NAME that does not ship"
    )
    group.add_argument(
        "--activation",
        choices=["relu", "silu"],
        default=argparse.SUPPRESS,
        help="of a DMWideResNet file, which does not tell it",
    )


def add_noise(parser: argparse.ArgumentParser, *, seeds: str = "[0, 2**64)", seed: Any = 0) -> None:
    """Seed and device."""
    told = "" if seed is not argparse.SUPPRESS else " (default: 0)"
    parser.add_argument("--seed", type=int, default=seed, metavar="S", help=f"fixes the noise; in {seeds}{told}")
    device = argparse.SUPPRESS if seed is argparse.SUPPRESS else default_device()
    parser.add_argument("--device", type=parse_device, default=device, metavar="DEVICE", help="cpu, cuda, cuda:1, ...")


def load_purifier(given: argparse.Namespace, **fixed: Any) -> tuple[Purifier, dict[str, Any]]:
    """The purifier that the options describe, and what identifies its networks; `fixed` keywords in the place of options."""
    said = vars(given)
    settings = Settings.of(**{**{name: said[name] for name in keywords(said.get("method")) if name in said}, **fixed})
    if hasattr(given, "guide_weights") and not hasattr(given, "guide"):
        raise ValueError("`--guide-weights` belong to a `--guide`, and none is named")
    source, weights = getattr(given, "score", DEFAULT_NETWORK), getattr(given, "score_weights", None)
    score = load_score(source, weights=weights, device=given.device)
    networks = {"score": identity(source, weights, score)}
    classifier = None
    if settings.method.guided:
        kind: Literal["guide", "classifier"] = "guide" if hasattr(given, "guide") else "classifier"
        classifier, networks[kind] = load_given_classifier(given, kind)
    elif hasattr(given, "guide"):
        raise ValueError(f"`--guide` is for a method that follows a classifier, and {method_name(settings.method)!r} does not")
    return Purifier(score, classifier, settings=settings), networks


def load_given_classifier(
    given: argparse.Namespace, kind: Literal["classifier", "guide"] = "classifier"
) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier that the options name, the one to judge or the one to follow, and what identifies it."""
    source, weights = getattr(given, kind, DEFAULT_NETWORK), getattr(given, f"{kind}_weights", None)
    activation = getattr(given, "activation", None)
    found = load_classifier(source, weights=weights, device=given.device, activation=activation)
    return found, identity(source, weights, found)


def identity(source: str, weights: str | None, network: nn.Module) -> dict[str, Any]:
    return {"source": source, "weights": weights, "sha256": state_dict_sha256(network)}


def parse_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; say cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} was asked for, but torch {torch.__version__} sees no CUDA device")
    return device


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _gib(text: str) -> int:
    return int(float(text) * 2**30)
