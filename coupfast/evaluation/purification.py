"""The purifier that an evaluation builds and what is said of one: the evaluation's only place that looks into `Settings`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from coupfast.gradients import GRADIENTS, Adjoint, NoGradient
from coupfast.methods import METHODS, DiffusionMethod, Method, MultiStage, TableMethod, method_name
from coupfast.naming import is_reference, resolve
from coupfast.options import options_of
from coupfast.purify import Purifier
from coupfast.settings import KINDS, Settings, options
from coupfast.wording import counted

NO_DEFENSE = "none"  # the method of a classifier alone

#: How to purify: all of it, or keywords of `Settings.of` for what is not its default. None: not at all.
Asked: TypeAlias = Settings | Mapping[str, Any]


def keywords(method: Any = None) -> list[str]:
    """What a purification can be told in flat keywords; a method of somebody else's has its own."""
    known = dict.fromkeys([*KINDS, *(option.keyword for kind in options().values() for option in kind)])
    if is_reference(method):
        method = resolve(method, Method, option="method")
    if isinstance(method, Method) or (isinstance(method, type) and issubclass(method, Method)):
        known |= dict.fromkeys(option.keyword for option in options_of(method))
    return list(known)


def of_method(method: Any) -> list[str]:
    """What a method, by its name, class or object, can be told by itself; None is the default one."""
    if isinstance(method, str):
        method = METHODS.get(method) or (resolve(method, Method, option="method") if is_reference(method) else None)
    elif method is None:
        method = type(Settings().method)
    known = isinstance(method, Method) or (isinstance(method, type) and issubclass(method, Method))
    return [option.keyword for option in options_of(method)] if known else []


def settings_of(asked: Asked, *, made_for: str) -> Settings:
    """All settings. Where keywords do not name a gradient it is the one that the attack is made for, and where nothing is said
    of its memory that is "whole", which never splits a batch, whatever the machine has left.

    Raises:
        ValueError, TypeError: see `Settings.of`.
    """
    if isinstance(asked, Settings):
        return _unsplit(asked)
    gradient = asked.get("gradient") or made_for
    kind = GRADIENTS.get(gradient) if isinstance(gradient, str) else None
    whole = {"memory_budget": "whole"} if kind and "memory_budget" in (o.keyword for o in options_of(kind)) else {}
    return _unsplit(Settings.of(**{**whole, **asked, "gradient": gradient}))


def _unsplit(settings: Settings) -> Settings:
    """The same without "auto", by which a batch may be split as memory is free: a run's bits must not follow that."""
    if getattr(settings.gradient, "memory_budget", None) != "auto":
        return settings
    return Settings.of(settings, memory_budget="whole")


def to_json(asked: Asked | None, *, made_for: str) -> dict[str, Any] | None:
    """As JSON has it: the keywords where they are words and numbers, else all settings."""
    if asked is None:
        return None
    if not isinstance(asked, Settings):
        try:
            plain: dict[str, Any] = json.loads(json.dumps(dict(asked)))
            return plain
        except TypeError:  # objects among them
            pass
    return {"settings": settings_of(asked, made_for=made_for).to_dict()}


def from_json(fields: Mapping[str, Any] | None) -> Asked | None:
    """What `to_json` was made of."""
    if fields is not None and "settings" in fields:
        return Settings.from_dict(fields["settings"])
    return fields


def begun(settings: Settings, num_steps: int) -> Settings | None:
    """The first steps of the same, to time them; None where the method cannot say it."""
    method = settings.method
    if not isinstance(method, DiffusionMethod):
        return shortened(settings, num_steps)
    # On its own grid: a solver may refuse steps that are longer than those of the run.
    times = tuple(method.times[: num_steps + 1].tolist())
    return dataclasses.replace(settings, method=dataclasses.replace(method, t=times, num_steps=None, grid="time"))


def shortened(settings: Settings, num_steps: int) -> Settings | None:
    """The same in fewer steps of the same time; None where the method cannot say it."""
    method = settings.method
    if not isinstance(getattr(method, "t", None), float) or not any(o.field == "num_steps" for o in options_of(method)):
        return None
    return dataclasses.replace(settings, method=dataclasses.replace(method, num_steps=num_steps))  # type: ignore[call-arg]


def coarsened(settings: Settings, steps: int | tuple[int, ...]) -> Settings | None:
    """The same purification in fewer steps, for an attack to go through; None where the method cannot say it.

    Args:
        steps: Of the purification; of each round where it has several, one number for all or one a level.

    Raises:
        ValueError: if there are several numbers, and the method has another number of levels.
    """
    method = settings.method
    levels = len(method.levels) if isinstance(method, MultiStage) else 1
    if isinstance(steps, tuple) and len(steps) != levels:
        raise ValueError(
            f"{method_name(method)!r} has {counted(levels, 'level')}, got {counted(len(steps), 'number')} of steps: {steps}; "
            "set `coarse_steps`"
        )
    if isinstance(method, MultiStage):
        return dataclasses.replace(settings, method=dataclasses.replace(method, num_steps=steps))
    return shortened(settings, steps[0] if isinstance(steps, tuple) else steps)


def coarse_count(defense: Mapping[str, Any], steps: int | Sequence[int]) -> int:
    """How many steps `coarsened` leaves in all, of a defense as `describe` has it."""
    method = defense.get("method", {})
    if not {"levels", "repeats"} <= method.keys():  # of `MultiStage`, or of what is made of it
        return steps if isinstance(steps, int) else steps[0]
    each = [steps] * len(method["repeats"]) if isinstance(steps, int) else steps
    return sum(count * (1 + own) for count, own in zip(method["repeats"], each, strict=True))  # a round begins with noise


def without_gradient(settings: Settings) -> Settings:
    return dataclasses.replace(settings, gradient=NoGradient())


def plans_memory(settings: Settings) -> bool:
    """Whether the memory of a run can be told: a continuous adjoint's is torchsde's."""
    return not isinstance(settings.gradient, Adjoint)


def settled(purifier: Purifier, recorded: Mapping[str, Any] | None) -> Settings:
    """A purifier's settings with everything decided that would follow from the state of the machine.

    Args:
        recorded: What `describe` said of it when the run began: what is open is taken from there. None decides it now.
    """
    settings = _unsplit(purifier.settings)
    engine, before = settings.engine, (recorded or {}).get("engine", {})
    if before.get("runs") == purifier.engine:  # else what was decided was another engine's, and the run says so
        said = {name: value for name, value in engine.options.items() if value is not None}
        engine = dataclasses.replace(engine, options={**before["options"], **said})
    return dataclasses.replace(settings, engine=engine.decided(purifier.engine, purifier.score, purifier.classifier))


def describe(purifier: Purifier) -> dict[str, Any]:
    """What decides a purifier's output and gradient beside its networks and the noise, as JSON has it."""
    settings = purifier.settings
    fields: dict[str, Any] = settings.describe()
    return {
        **fields,
        "engine": {**fields["engine"], "runs": purifier.engine},
        "num_steps": purifier.num_steps,
        "guided": settings.method.guided,
        "noises_first": isinstance(settings.method, TableMethod) and settings.method.recipe().noising is not None,
    }


def name(defense: Mapping[str, Any], *, built: str | None, alone: bool) -> str:
    """In a word, a defense that `Metered.describe` describes.

    Args:
        defense: The description.
        built: The name that it was built by, if by one.
        alone: Whether a classifier alone was asked for.
    """
    if built is None and "method" in defense:
        return str(defense["method"]["name"])
    return "no defense" if alone else built or str(defense["class"]).rpartition(":")[2]


def words(defense: Mapping[str, Any], *, built: str | None, alone: bool) -> str:
    """In words, the same."""
    if "method" not in defense:
        return name(defense, built=built, alone=alone)
    method, gradient = defense["method"], defense["gradient"]
    t = f", t = {method['t']:g}" if isinstance(method.get("t"), float) else ""
    guidance = f", guidance {gradient['guidance']}" if defense["guided"] and "guidance" in gradient else ""
    text = f"{method['name']}{t} in {counted(defense['num_steps'], 'step')}, gradient {gradient['name']}{guidance}"
    return f"{built}: {text}" if built else text


def short(purifier: Purifier) -> str:
    """A purifier in a word."""
    return method_name(purifier.settings.method)
