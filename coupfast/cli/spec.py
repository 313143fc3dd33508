"""Options that describe an evaluation, made from `Spec`, the attacks' knobs and the purifier's settings."""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from coupfast.cli.arguments import add_noise, add_purification, default_device
from coupfast.evaluation import suites
from coupfast.evaluation.attacks.knobs import names, parse_fraction
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.purification import NO_DEFENSE
from coupfast.evaluation.spec import GIVEN, MODES, SEEDINGS, Spec, paper
from coupfast.methods import method_name
from coupfast.options import Option, one_or_several, options_of

_KNOB = "knob:"  # how destinations of knobs begin, so that none meets another option


def add_spec(parser: argparse.ArgumentParser, method: str | None, attack: str | None) -> None:
    """What a `Spec` has.

    Args:
        method, attack: Those that are asked for: what somebody else's can be told is their own.
    """
    spec, none = Spec(), argparse.SUPPRESS
    add = parser.add_argument
    images = f"labelled images, as for `coupfast purify` (default: {spec.images})"
    add("images", nargs="?", default=none, metavar="IN", help=images)
    add("--limit", type=int, default=none, metavar="N", help="the first N images, which must exist")
    add(
        "--classes",
        type=lambda word: tuple(name.strip() for name in word.split(",") if name.strip()),
        default=none,
        metavar="NAME,...",
        help="names of the classes in the order of their labels, where images are in subfolders of such names (default: those "
        "of CIFAR-10)",
    )
    add(
        "--paper",
        action="store_true",
        help="the paper's images, networks, times, radii (for --norm) and seed unless given; an evaluation needs their "
        "weights: --score-weights, --classifier-weights",
    )
    add(
        "--defense",
        default=none,
        metavar="NAME",
        help="file.py:NAME or package.module:NAME of another defense, in the place of purification and networks: a module from "
        "images in [0, 1] to logits, or a function that makes one, from a device if it asks for one",
    )
    published = "settings left out are the published ones; of transfer, cascade and stadv this project's"
    group = attack_group = parser.add_argument_group(f"the attack ({published})")
    assumed = "; ".join(
        f"{name}: {', '.join(suite.assumed.values())}" for name, suite in suites.SUITES.items() if suite.assumed
    )
    group.add_argument(
        "--attack",
        default=none,
        metavar="NAME",
        help=f"{', '.join(suites.SUITES)}, or package.module:NAME of another (default: {spec.attack}; where the paper is not "
        f"legible, {assumed}). {suites.RECOMMENDED} is {suites.RECOMMENDATION.attack} with --mode "
        f"{suites.RECOMMENDATION.mode}: {suites.RECOMMENDATION.reasons}".replace("%", "%%"),
    )
    group.add_argument("--norm", choices=("Linf", "L2"), default=none, help=f"of the attack (default: {spec.norm})")
    group.add_argument(
        "--eps", type=parse_fraction, default=none, metavar="E", help="radius for images in [0, 1] (default: 8/255)"
    )
    group.add_argument(
        "--start-from",
        default=none,
        metavar="RUN",
        help="begin at the adversarial images that this finished run found, on whatever defense and in whatever ball, moved "
        "into the ball of this one; images are told by their hashes, and all of them have to be there",
    )
    group = parser.add_argument_group("the evaluation")

    def add_number(name: str, metavar: str, help: str) -> None:
        told = f"{help} (default: {getattr(spec, name)})"
        group.add_argument(f"--{name}", type=int, default=none, metavar=metavar, help=told)

    group.add_argument(
        "--seeding", choices=SEEDINGS, default=none, help=f"a seed for each unit, or AutoAttack's one (default: {spec.seeding})"
    )
    group.add_argument(
        "--mode",
        choices=MODES,
        default=none,
        help="full: every image through all of an attack; fast: images leave this project's attacks once a test with a stated "
        "error says that most draws fail, or with --drop any at the first draw that fails, which decides the worst of several; "
        f"others take their place (default: {spec.mode})",
    )
    add_number("shard", "N", "images of a unit of work, which is a batch")
    add_number("draws", "N", "fresh draws that judge each image")
    group.add_argument(
        "--paths",
        type=_paths,
        default=none,
        metavar="N|I,J,...",
        help="images whose purification the report shows: the first N, or by number from 0 (one alone: '7,'; default: "
        f"{spec.paths})",
    )
    add_number("threads", "N", "CPU threads of a worker")
    add_purification(parser, method, gradient=True, none=True)
    add_noise(parser, seeds="[0, 2**63)", seed=none)
    _add_knobs(attack_group, attack)  # last: a name that is taken gets a longer one


def spec_of(options: argparse.Namespace) -> Spec:
    """What the options describe; where they say nothing, what the run to resume or the paper has.

    Raises:
        ValueError: if they contradict the run to resume where nothing else would notice, or give a ball to an attack that has
            none; the message says what it has.
    """
    given, knobs = said(options)
    if getattr(options, "resume", None):
        base, given, knobs = _continued(options.resume, given, knobs, paper_too=options.paper)
    else:
        base = Spec.of(device=str(default_device()))
        if options.paper:
            base = base.but(**_paper(given.get("norm", "Linf"), alone="defense" in given))
    spec = base.but(**given)
    spec = dataclasses.replace(spec, attack_options={**spec.attack_options, **knobs}) if knobs else spec
    ball, stages = [name for name in ("norm", "eps") if name in given], spec.stages()
    if ball and stages and not any(set(ball) <= set(names(attack)) for attack in stages.values()):
        raise ValueError(
            f"{' and '.join(map(flag, ball))}: for attacks in a ball, and {spec.suite.name} has none: leave that out; its "
            f"own options are {', '.join(map(flag, spec.suite.options())) or 'none'}"
        )
    return spec


def said(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was typed of a spec, and of the attack's knobs."""
    knobs = {name.removeprefix(_KNOB): value for name, value in vars(options).items() if name.startswith(_KNOB)}
    given = {name: value for name, value in vars(options).items() if name not in _OTHERS and not name.startswith(_KNOB)}
    knobs |= dict(given.pop("stage", ()))
    if "device" in given:
        given["device"] = str(given["device"])
    return given, knobs


def flag(name: str) -> str:
    """An option as it is typed."""
    if "." in name:  # a knob of one stage
        return "--stage"
    return "IN" if name == "images" else f"--{name.replace('_', '-')}"


def _paper(norm: str, *, alone: bool) -> dict[str, Any]:
    """What the paper has; `alone` without the networks and the purification, where a defense is given in their place."""
    found = paper(norm)
    return {name: value for name, value in found.items() if name in ("images", "norm", "eps", "seed")} if alone else found


def _continued(
    folder: str, given: dict[str, Any], knobs: dict[str, Any], *, paper_too: bool
) -> tuple[Spec, dict[str, Any], dict[str, Any]]:
    """The spec of the run in a folder, and what is given beside it that it does not have already."""
    base, decided = _stored(folder)
    stages = base.stages()

    def has(name: str, value: Any) -> bool:
        return bool(_of(base, decided, name) == value)

    if paper_too:
        published = _paper(str(given.get("norm", base.norm)), alone=base.defense is not None)
        if base.purifier is None:
            published.pop("t")
        others = [name for name, value in published.items() if name not in given and not has(name, value)]
        if others:
            kept = ", ".join(f"{name} {_of(base, decided, name)}" for name in others)
            wanted = ", ".join(f"{name} {published[name]}" for name in others)
            raise ValueError(f"--paper asks for {wanted}, and the run in {folder} has {kept}, with which it goes on: {_LEAVE}")
    recommended = suites.RECOMMENDATION
    if given.get("attack") == suites.RECOMMENDED and base.attack == recommended.attack:
        if given.get("mode", recommended.mode) == base.mode:
            del given["attack"]  # the run has what the name stood for
    given = {name: value for name, value in given.items() if not has(name, value)}
    for name in ("defense", "engine_options"):  # of which a configuration would tell in words that nobody typed, or nothing
        if name in given:
            kept = _of(base, decided, name)
            what = "networks of its own" if name == "defense" and kept is None else kept
            asked = f"{flag(name)} is {given[name]}"
            raise ValueError(f"{asked}, and the run in {folder} has {what}, with which it goes on: {_LEAVE}")
    if "attack" not in given:
        knobs = {name: value for name, value in knobs.items() if _values(stages, name) != {value}}
    return base, given, knobs


def _values(stages: Mapping[str, Any], knob: str) -> set[Any]:
    """What stages have for a knob, "STAGE.KNOB" for one stage's."""
    alone, _, name = knob.rpartition(".")
    return {getattr(attack, name) for stage, attack in stages.items() if stage == (alone or stage) and hasattr(attack, name)}


_LEAVE = "leave it out, or start another run with --out"


def _of(base: Spec, decided: dict[str, Any], name: str) -> Any:
    """What a run has for an option, said or not."""
    if name == "engine_options":
        return decided
    if name in (field.name for field in dataclasses.fields(Spec)):
        return getattr(base, name)
    settings = base.settings()
    if settings is None:
        return NO_DEFENSE if name == "method" and base.purifier is None else None
    if name == "method":
        return method_name(settings.method)
    for part in (settings.method, settings.gradient, settings.engine):
        for option in options_of(part):
            if option.keyword == name:
                return getattr(part, option.field)
    return settings.gradient.name if name == "gradient" else None


# What commands have beside the options of a spec.
_OTHERS = {
    *("command", "run", "run_", "argv", "debug", "out", "resume", "workers", "plan", "price", "certify", "cluster", "paper"),
    *("probe_images", "probe_steps", "pilot"),
}


def _stored(folder: str) -> tuple[Spec, dict[str, Any]]:
    """The spec of a run, and the options of its engine as they were decided when it began."""
    with Ledger(folder, read_only=True) as ledger:
        fields, defense = ledger.configuration["spec"], ledger.configuration["defense"]
    given = [name for name in ("images", "defense") if fields[name] == GIVEN]
    if given:
        raise ValueError(
            f"the run in {folder} was started from Python with {' and '.join(given)} of its own; continue it there, with "
            f"evaluate(..., resume=True)"
        )
    return Spec.from_dict(fields), defense.get("engine", {}).get("options", {})


def _add_knobs(group: Any, attack: str | None) -> None:
    """An option for each knob of the suites that ship, and of the attack that is asked for."""
    found: dict[str, Option] = {}
    published: dict[str, dict[str, list[Any]]] = collections.defaultdict(dict)
    chosen = [] if attack is None or attack in (*suites.SUITES, suites.RECOMMENDED) else [suites.find(attack)]
    for suite in [*chosen, *suites.SUITES.values()]:
        for name, options in suite.options().items():
            found.setdefault(name, options[0])
            published[name][suite.name] = [option.default for option in options]
    for name, option in found.items():
        taken = option.flag in group._option_string_actions  # by another option
        option.add_to(
            group,
            default=argparse.SUPPRESS,
            note=_told(published[name]),
            flag=f"--attack-{option.flag.removeprefix('--')}" if taken else None,
            dest=_KNOB + name,
        )

    def of_one_stage(word: str) -> tuple[str, Any]:
        key, given, value = word.partition("=")
        stage, _, name = key.rpartition(".")
        if not (stage and given and name in found):
            raise argparse.ArgumentTypeError(f"{word!r} is no STAGE.KNOB=VALUE; say exact.iterations=20")
        try:
            return key, _truth(value) if isinstance(found[name].default, bool) else found[name].parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{word!r}: {error}; {found[name].help}") from error

    group.add_argument(
        "--stage",
        type=of_one_stage,
        action="append",
        default=argparse.SUPPRESS,
        metavar="STAGE.KNOB=VALUE",
        help="one of these in one stage of the attack alone (exact.iterations=20); may be said several times",
    )


def _truth(word: str) -> bool:
    if word not in ("true", "false"):
        raise ValueError(f"true or false, got {word!r}")
    return word == "true"


def _told(published: dict[str, list[Any]]) -> str:
    """In words, what suites have for a knob where nothing is said."""
    by_value: dict[str, list[str]] = {}
    for suite, values in published.items():
        said = "/".join(map(str, dict.fromkeys(value for value in values if value is not None)))
        if said:
            by_value.setdefault(said, []).append(suite)
    if not by_value:
        return ""
    return " (" + "; ".join(f"{value} in {', '.join(names)}" for value, names in by_value.items()) + ")"


def _paths(text: str) -> int | tuple[int, ...]:
    try:
        return one_or_several(int)(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images and no list of them; say 4 or 0,5,7") from error
