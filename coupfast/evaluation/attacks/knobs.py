"""Knobs: what can be set of an attack, declared with its fields. Checks, the command line and the help follow from them.

    @dataclasses.dataclass(frozen=True)
    class FGSM(Attack):
        eps: float = 8 / 255
        iterations: int = count(1, "steps of equal size")
        share: float = knob(0.5, "of the radius, first", words="a share in (0, 1]", valid=lambda v: 0 < v <= 1)

A field without `knob` is one, too: its type is checked, and the command line has it without an explanation.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any

from coupfast.options import Option, option, options_of

_KEY = "knob"


@dataclasses.dataclass(frozen=True)
class _Range:
    words: str
    valid: Callable[[Any], bool]
    parse: Callable[[str], Any] | None = None


def knob(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    words: str = "",
    valid: Callable[[Any], bool] = lambda value: True,
) -> Any:
    """A field of an attack.

    Args:
        default: Its value where nothing is said; it has to be given without one.
        help: What it is, with its unit.
        metavar: What stands for the value in a help text.
        parse: Makes a value of a word of the command line, where the field's type is no number, text or choice of them.
        words: What values are valid: "at least 1".
        valid: Whether a value is; asked after the type was checked, and not about None.

    Returns:
        What stands behind `=` in the dataclass. A value that is not valid is a ValueError when an attack is made.

    Example:
        >>> import dataclasses
        >>> from coupfast.evaluation import knob
        >>> @dataclasses.dataclass(frozen=True)
        ... class Knobs:
        ...     decay: float = knob(0.9, "share of the last step", words="in [0, 1]", valid=lambda value: 0 <= value <= 1)
        >>> Knobs().decay
        0.9
    """
    field = option(default, help=help, metavar=metavar)
    return dataclasses.field(default=default, metadata={**field.metadata, _KEY: _Range(words, valid, parse)})


def count(default: int, help: str) -> Any:
    """A knob that counts something, at least 1.

    Args:
        default: How many where nothing is said.
        help: What is counted.

    Returns:
        What stands behind `=` in the dataclass; see `knob`.

    Example:
        >>> import dataclasses
        >>> from coupfast.evaluation import count
        >>> @dataclasses.dataclass(frozen=True)
        ... class Knobs:
        ...     iterations: int = count(20, "steps of the attack")
        >>> Knobs().iterations
        20
    """
    return knob(default, help, metavar="N", words="at least 1", valid=lambda value: value >= 1)


def positive(default: float | None, help: str, *, metavar: str, scale: str = "") -> Any:
    """A knob that is a finite number above 0, of a scale: "for images in [0, 1]"."""
    words = f"a finite number above 0{scale and f' {scale}'}"
    return knob(default, help, metavar=metavar, words=words, valid=lambda value: 0 < value < math.inf)


def step_size_knob(linf: str) -> Any:
    """The length of an attack's steps, with what it is in Linf where nothing is said."""
    help = f"length of a step, for images in [0, 1]; {linf} in Linf and eps/5 in L2"
    return positive(None, help, metavar="A", scale="for images in [0, 1]")


def looks_knob() -> Any:
    """Fresh draws at every point of an attack."""
    help = "fresh draws at every point, without a gradient: the report has the worst point by these (N-evaluation)"
    return knob(0, help, metavar="N", words="at least 0", valid=lambda value: value >= 0)


def dw_box_knob() -> Any:
    """Whether the attacker knows the judge's noise."""
    return knob(False, "the attacker knows the noise of the judge's draws (DW-box), and takes these in turn")


def names(attack: Any) -> list[str]:
    """The fields of an attack, a class or an object."""
    return [field.name for field in dataclasses.fields(attack)]


def options(attack: Any) -> list[Option]:
    """What of an attack, a class or an object, can be set in a word: fields of numbers, texts and choices, and those that say
    how a word is read.

    The defaults of an object are its values.
    """
    kind = attack if isinstance(attack, type) else type(attack)
    hints, found = _hints(kind), []
    ranges = {field.name: field.metadata.get(_KEY) for field in dataclasses.fields(kind)}
    for said in options_of(attack):
        allowed, simple = ranges[said.field], _simple(hints.get(said.field))
        parse, choices = allowed and allowed.parse, None
        if simple is not None:
            parse, choices = parse_fraction if simple[0] is float else simple[0], simple[1]
        if parse is not None:
            default = said.default if isinstance(attack, type) else getattr(attack, said.field)
            found.append(dataclasses.replace(said, default=default, parse=parse, choices=choices))
    return found


def parse_fraction(word: str) -> float:
    """The number of a word of the command line, "0.5" or "8/255"."""
    numerator, _, denominator = word.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{word!r} is no number; say 0.5 or 8/255") from error


def check(attack: Any) -> None:
    """ValueError if a field of an attack has a value that its type or its knob does not allow; integers and floats of other
    libraries become Python's."""
    hints = _hints(type(attack))
    for field in dataclasses.fields(attack):
        value, simple = getattr(attack, field.name), _simple(hints.get(field.name))
        if simple is not None and not (value is None and simple[2]):
            value = _typed(field.name, value, simple[0], simple[1])
            object.__setattr__(attack, field.name, value)
        allowed = field.metadata.get(_KEY)
        if value is not None and allowed is not None and not allowed.valid(value):
            raise ValueError(f"`{field.name}` is {allowed.words or 'something else'}, got {value!r}")


def check_ball(norm: str, eps: float) -> None:
    """ValueError if these are no norm and radius of an attack on images in [0, 1]."""
    if norm not in ("Linf", "L2"):
        raise ValueError(f"`norm` is 'Linf' or 'L2', got {norm!r}")
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not 0 < eps < math.inf:
        raise ValueError(f"`eps` is a finite radius above 0 for images in [0, 1], got {eps!r}; 8/255 is {8 / 255:.6f}")
    if norm == "Linf" and eps >= 1:
        raise ValueError(f"`eps` = {eps:g} reaches every image in [0, 1]; in 0-255 units? {eps:g}/255 is {eps / 255:.6f}")
    if norm == "L2" and eps >= 8:
        published = "published radii are 0.5 to 3"
        raise ValueError(f"`eps` = {eps:g} in L2, where {published}; in 0-255 units? {eps:g}/255 is {eps / 255:.6f}")


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except NameError:  # imported for type checkers only: nothing is known of them here
        return {}


def _simple(hint: Any) -> tuple[type, tuple[Any, ...] | None, bool] | None:
    """The type of a hint, its choices and whether None is one; None where it is no number, text or choice of them."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        optional = len(inner) < len(typing.get_args(hint))
        hint = inner[0] if len(inner) == 1 else None
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), choices, optional
    return (hint, None, optional) if hint in (int, float, str, bool) else None


def _typed(name: str, value: Any, kind: type, choices: tuple[Any, ...] | None) -> Any:
    if choices is not None:
        if value not in choices:
            raise ValueError(f"`{name}` is one of {', '.join(map(str, choices))}, got {value!r}")
        return value
    if kind is bool or isinstance(value, bool):
        fits = kind is bool and isinstance(value, bool)
    else:
        fits = isinstance(value, numbers.Integral if kind is int else numbers.Real if kind is float else kind)
    if not fits:
        what = {int: "an integer", float: "a number", str: "a text", bool: "True or False"}[kind]
        raise ValueError(f"`{name}` is {what}, got {value!r}")
    return kind(value)
