"""What a person may choose, said once: a field of a frozen dataclass carries its help, choices and spelling.

Methods, gradients, engines and attacks are such dataclasses. The command line, error messages, help texts and the
documentation take what they say of an option from here, so that none of them spells it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")
_KEY = "option"


@dataclasses.dataclass(frozen=True)
class Option:
    """One field that people may set.

    Attributes:
        field: The field's name in its dataclass.
        keyword: Its name among the keywords of a function (`Exact.guidance` is `guidance_gradient` there).
        help: What it means, with its unit and range; without the default, which is told apart.
        default: What it is where nobody says; `dataclasses.MISSING` if it has to be given.
        parse: Makes a value of a word of the command line.
        metavar: What stands for the value in a help text.
        choices: The words that are allowed, where these are known.
    """

    field: str
    keyword: str
    help: str
    default: Any
    parse: Callable[[str], Any]
    metavar: str | None = None
    choices: tuple[str, ...] | None = None

    @property
    def flag(self) -> str:
        """The option of the command line: `--num-steps`."""
        return f"--{self.keyword.replace('_', '-')}"

    def _parsed(self, word: str) -> Any:
        try:
            return self.parse(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{word!r} is none ({error}); {self.help}") from error

    def add_to(
        self, parser: Any, *, default: Any = None, note: str = "", flag: str | None = None, dest: str | None = None
    ) -> None:
        """Add this option to an argparse parser or group: `--num-steps N`, `--clamp` and `--no-clamp`.

        Args:
            default: Its value without a word of the user's.
            note: What the help says behind this option's own.
            flag, dest: Its spelling and its name in the namespace, where these are not its own.
        """
        told: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if not isinstance(self.default, bool):
            metavar = None if self.choices else self.metavar or self.keyword.upper()
            told = {"type": self._parsed, "metavar": metavar, "choices": self.choices}
        help_text = f"{self.help}{note}".replace("%", "%%")
        parser.add_argument(flag or self.flag, dest=dest or self.keyword, default=default, help=help_text, **told)


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    parse: Callable[[str], Any] = str,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    keyword: str | None = None,
) -> Any:
    """A dataclass field that people may set; see `Option`.

    Args:
        default: Its value where nobody says; without one it has to be given.
        help: What it means, with unit and range.
        parse: Makes a value of a word of the command line.
        metavar: What stands for the value in a help text.
        choices: The words that are allowed.
        keyword: Its name among keywords and options, where the field's is another.

    Returns:
        What stands behind `=` in the dataclass.

    Example:
        >>> import dataclasses, coupfast
        >>> from coupfast.options import option
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Shrink(coupfast.StepMethod):
        ...     num_steps: int = 2
        ...     share: float = option(0.05, help="of the predicted noise", parse=float)
        ...     def step(self, k, state, noise, networks):
        ...         return (state[0] - self.share * networks.eps_hat(state[0], 0.05),)
        >>> coupfast.Settings.of(method=Shrink, share=0.1).method.share  # on the command line --share 0.1
        0.1
    """
    told = {
        "help": help,
        "parse": parse,
        "metavar": metavar,
        "choices": tuple(choices) if choices else None,
        "keyword": keyword,
    }
    if isinstance(default, (dict, list, set)):
        kept = default
        return dataclasses.field(default_factory=lambda: type(kept)(kept), metadata={_KEY: told})
    return dataclasses.field(default=default, metadata={_KEY: told})


def other_default(owner: Any, field: str, default: Any) -> Any:
    """The option of a base class with another default."""
    (found,) = [each for each in dataclasses.fields(owner) if each.name == field]
    return dataclasses.field(default=default, metadata=dict(found.metadata))


def options_of(owner: Any) -> list[Option]:
    """The options of a dataclass or of an instance of one, in the order of its fields.

    A field that was declared without `option` counts, too: its help is its name, its parser that of its default.
    """
    found = []
    for field in dataclasses.fields(owner):
        if not field.init:
            continue
        told = dict(field.metadata.get(_KEY, {}))
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        plain = type(default) if isinstance(default, (int, float)) and not isinstance(default, bool) else str
        found.append(
            Option(
                field=field.name,
                keyword=told.get("keyword") or field.name,
                help=told.get("help") or field.name.replace("_", " "),
                default=default,
                parse=told.get("parse") or plain,
                metavar=told.get("metavar"),
                choices=told.get("choices"),
            )
        )
    return found


def did_you_mean(value: Any, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" where something known has that word in it, or is spelled much like it, else nothing."""
    known = list(known)
    near = sorted((name for name in known if str(value) in re.split("[-_]", name)), key=len)
    near = near or difflib.get_close_matches(str(value), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_name(name: str, value: Any, known: Iterable[str]) -> None:
    """ValueError if `value` is none of the known words."""
    known = list(known)
    if value not in known:
        raise ValueError(f"`{name}` is one of {', '.join(map(repr, known))}, got {value!r}{did_you_mean(value, known)}")


def check_number(name: str, value: Any, *, zero: bool = True) -> float:
    """`value` as a float, or an error if it is not a finite number of at least 0 (above 0 where `zero` is none)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` is a number, got {value!r}")
    number = float(value)
    if not 0.0 <= number < math.inf or (number == 0.0 and not zero):
        raise ValueError(f"`{name}` is finite and {'at least' if zero else 'above'} 0, got {value}")
    return number


def check_flag(name: str, value: Any) -> None:
    """TypeError if `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is True or False, got {value!r}")


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int, or an error if it is not one between `least` and `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` is an int, got {value!r}")
    number = int(value)
    if number < least or (most is not None and number > most):
        raise ValueError(f"`{name}` is at least {least}{'' if most is None else f' and at most {most}'}, got {value}")
    return number


def several(kind: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """A parser for the command line: several values with commas between, as a tuple."""
    return lambda word: tuple(kind(part) for part in word.split(",") if part)


def one_or_several(kind: Callable[[str], Value]) -> Callable[[str], Value | tuple[Value, ...]]:
    """A parser for the command line: a value, or a tuple of several that have commas between."""
    return lambda word: several(kind)(word) if "," in word else kind(word)


def number_or(parse_other: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser for the command line: a number where the word is one, else what the other parser makes of it."""

    def parse(word: str) -> Any:
        try:
            return float(word)
        except ValueError:
            return parse_other(word)

    return parse
