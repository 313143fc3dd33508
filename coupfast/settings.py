"""How to purify, as one value: a method with its knobs, a gradient, an engine.

The only place where keywords and words of the command line become these objects, and where they become JSON and come back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import nn

from coupfast.engines import Engine, fastest_engine
from coupfast.gradients import GRADIENTS, Exact, Gradient
from coupfast.methods import COUP, METHODS, Method, StepMethod, TableMethod, method_name
from coupfast.naming import code_of, described, is_reference, name_of, resolve
from coupfast.options import Option, check_name, did_you_mean, options_of
from coupfast.sde import VPSDE, DiscreteVPSDE
from coupfast.solvers import SOLVERS, NamedSolver, as_solver, solver_name

#: The keywords that name an object, in the order in which people think of them.
KINDS = ("method", "gradient", "engine")

_SOLVERS_WITH_KNOBS: dict[str, type[NamedSolver]] = {
    name: solver for name, solver in SOLVERS.items() if isinstance(solver, type)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a purification but its networks, images and noise.

    Attributes:
        method: What is done to an image.
        gradient: What `backward` computes.
        engine: What runs the steps.

    Raises:
        ValueError: if the three do not go together; the message says why.

    Example:
        >>> import coupfast
        >>> settings = coupfast.Settings.of(method="diffpure", t=0.06, num_steps=20, gradient="bpda")
        >>> coupfast.Settings.from_dict(settings.to_dict()) == settings
        True
    """

    method: Method = COUP()
    gradient: Gradient = Exact()
    engine: Engine = Engine()

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("gradient", Gradient), ("engine", Engine)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"`{name}` is a {kind.__name__}, got {type(getattr(self, name)).__name__}")
        if isinstance(self.method, StepMethod) and self.engine.name not in ("auto", "eager"):
            raise ValueError(
                f"{type(self.method).__name__} is a step function, which PyTorch runs: engine 'eager' or 'auto', got "
                f"{self.engine.name!r}"
            )
        self.gradient.check(self.method, self.num_steps)

    @classmethod
    def of(cls, base: Settings | None = None, /, **keywords: Any) -> Settings:
        """From keywords, as `coupfast.purify` has them.

        Args:
            base: Where to take from what no keyword says.
            keywords: `method`, `gradient` and `engine` as names, objects or (the first) `package.module:NAME`, and the options
                of the chosen ones, and of the method's solver, by their keywords; see `options`.

        Raises:
            TypeError: for a keyword that nothing has.
            ValueError: for a name that does not exist, or a value out of range.

        Warns:
            UserWarning: for a keyword that the chosen objects do not have and others do: it changes nothing.
        """
        given, base = base, base or cls()
        unknown = [name for name in keywords if name not in KINDS and not any(name in kind for kind in _owners().values())]
        if unknown:
            known = [*KINDS, *(name for kind in _owners().values() for name in kind)]
            if not _is_outside(keywords.get("method")):
                raise TypeError(f"a purifier has no option {unknown[0]!r}{did_you_mean(unknown[0], known)}")
        method = _choose_method(keywords.pop("method", base.method))
        gradient = keywords.pop("gradient", base.gradient)
        gradient = GRADIENTS.get(gradient, gradient) if isinstance(gradient, str) else gradient
        if not isinstance(gradient, type):
            gradient = _choose(gradient, GRADIENTS, Gradient, "gradient")
        if given is not None:  # a word changes the kind; the options that both kinds have stay
            for named, before in ((method, given.method), (gradient, given.gradient)):
                kept = {found.keyword: getattr(before, found.field) for found in options_of(before)}
                for name in [found.keyword for found in options_of(named)] if isinstance(named, type) else []:
                    if name in kept:
                        keywords.setdefault(name, kept[name])
        if "solver" in (found.keyword for found in options_of(method)):
            had = getattr(method, "solver", None)
            solver = _choose_solver(keywords.pop("solver", had), keywords)
            if solver is not had:  # else the method would be another object, and no other
                keywords["solver"] = solver
        engine = keywords.pop("engine", base.engine)
        if isinstance(engine, str):
            keywords["engine"], engine = engine, base.engine
        elif not isinstance(engine, Engine):
            raise TypeError(f"`engine` is a name or a coupfast.Engine, got {type(engine).__name__}")
        chosen = [_with(chosen, keywords) for chosen in (method, gradient, engine)]
        for name in keywords:
            having = [word for word, options in _owners().items() if name in options]
            words = f"method {_said(method)}, gradient {_said(gradient)} and the engine have no option `{name}`"
            if not having:
                known = [option.keyword for part in (method, gradient, engine) for option in options_of(part)]
                raise TypeError(f"{words}{did_you_mean(name, known)}; they have {', '.join(known)}")
            # Said and not refused: who compares methods gives all of them the same options.
            verb = "has" if len(having) == 1 else "have"
            warnings.warn(f"{words}: it changes nothing; {', '.join(having)} {verb} it", stacklevel=3)
        return cls(method=chosen[0], gradient=chosen[1], engine=chosen[2])  # type: ignore[arg-type]

    @functools.cached_property
    def num_steps(self) -> int:
        """Steps of a run."""
        if isinstance(self.method, TableMethod):
            return self.method.recipe().table.num_steps
        assert isinstance(self.method, StepMethod)
        steps = self.method.num_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{type(self.method).__name__} has `num_steps`, an int of at least 1, got {steps!r}")
        return steps

    def engine_for(self, score: nn.Module) -> tuple[str, str | None]:
        """The engine that runs this network, and, where "auto" chose it, why it is not a faster one."""
        if isinstance(self.method, StepMethod):
            return "eager", f"{type(self.method).__name__} is a step function" if self.engine.name == "auto" else None
        return fastest_engine(score) if self.engine.name == "auto" else (self.engine.name, None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: enough for `from_dict`, and a hash of the numbers (or of the source) that the steps follow.

        Raises:
            ValueError: if no name leads back to a part of it: a lambda, a partial or an object in the place of a function, or a
                class that was made inside of a function. `describe` says of those what can be said.
        """
        return self._written(name_of)

    def describe(self) -> dict[str, Any]:
        """The same to read and to compare, of any settings: words in angle brackets stand for what no name leads back to."""
        return self._written(lambda found, option: described(found))

    def _written(self, named: Callable[..., str]) -> dict[str, Any]:
        owner = type(self.method)
        return {
            "method": {
                "name": owner.name if METHODS.get(owner.name) is owner else named(owner, option="method"),
                **_fields(self.method, named),
            },
            "gradient": {"name": self.gradient.name, **_fields(self.gradient, named)},
            "engine": _fields(self.engine, named),
            "steps_sha256": self._steps_sha256(),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Settings:
        """What `to_dict` was made of.

        Raises:
            ValueError: if the method is not there any more, if its steps are others now, or if no name leads back to a part.
        """
        method, gradient = dict(fields["method"]), dict(fields["gradient"])
        for name, value in method.items():
            if isinstance(value, str) and "<" in value:
                what = "method" if name == "name" else name
                raise ValueError(
                    f"`{what}` was {value.strip('<>')} when this was written, and no name leads back to that: make these "
                    f"settings in Python again"
                )
        named = _choose_method(method.pop("name"))
        values = _values(method)
        found = cls(
            method=named(**values) if isinstance(named, type) else dataclasses.replace(named, **values),
            gradient=_choose(gradient.pop("name"), GRADIENTS, Gradient, "gradient", **gradient),
            engine=Engine(**fields["engine"]),
        )
        if "steps_sha256" in fields and found._steps_sha256() != fields["steps_sha256"]:
            raise ValueError(f"{method_name(found.method)} takes other steps now than when this was written")
        return found

    def _steps_sha256(self) -> str:
        if isinstance(self.method, TableMethod):
            recipe = self.method.recipe()
            return hashlib.sha256(f"{recipe.table.sha256()} {recipe.noising}".encode()).hexdigest()
        return hashlib.sha256(_source(type(self.method)).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Settings({self.method!r}, {self.gradient!r}, {self.engine!r})"


def options() -> dict[str, list[Option]]:
    """Every option of a purification, by whose it is: the methods' and their solvers', the gradients', the engine's; each
    option once.
    """
    groups: dict[str, dict[str, Option]] = {"method": {}, "gradient": {}, "engine": {}}
    of_methods = (*METHODS.values(), *_SOLVERS_WITH_KNOBS.values())
    for kind, owners in (("method", of_methods), ("gradient", GRADIENTS.values()), ("engine", (Engine,))):
        for owner in owners:
            for found in options_of(owner):
                groups[kind].setdefault(found.keyword, found)
    return {kind: list(found.values()) for kind, found in groups.items()}


@functools.cache
def _owners() -> dict[str, dict[str, Option]]:
    """Options by keyword, of each method, gradient and engine."""
    named: dict[str, Any] = {f"method {name!r}": method for name, method in METHODS.items()}
    named |= {f"solver {name!r}": solver for name, solver in _SOLVERS_WITH_KNOBS.items()}
    named |= {f"gradient {name!r}": gradient for name, gradient in GRADIENTS.items()} | {"the engine": Engine}
    return {word: {found.keyword: found for found in options_of(owner)} for word, owner in named.items()}


def _source(owner: type) -> str:
    """The text of the module that a class is from; of one that was typed in (a notebook), what its functions compile to."""
    with contextlib.suppress(OSError, TypeError, KeyError):
        text = inspect.getsource(sys.modules[owner.__module__])
        if f"class {owner.__name__}" in text:
            return text
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(owner)
    return repr([code_of(value.__code__) for value in vars(owner).values() if inspect.isfunction(value)])


def _is_outside(method: Any) -> bool:
    if isinstance(method, str):
        return is_reference(method)
    owner = method if isinstance(method, type) else type(method)
    return isinstance(owner, type) and issubclass(owner, Method) and owner not in METHODS.values()


def _choose_method(given: Any) -> Any:
    """A method, or the class of one whose knobs are still to come."""
    if isinstance(given, str):
        if is_reference(given):
            return resolve(given, Method, option="method")
        check_name("method", given, METHODS)
        return METHODS[given]
    if isinstance(given, type) and issubclass(given, Method):
        return given
    if not isinstance(given, Method):
        raise TypeError(f"`method` is a name, package.module:NAME or a Method, got {type(given).__name__}")
    return given


def _choose_solver(given: Any, keywords: dict[str, Any]) -> Any:
    """A solver with its knobs, which are taken out of the keywords.

    Raises:
        ValueError: for a knob that this solver does not have and another one does: it would do nothing.
    """
    solver = as_solver(given)
    own = options_of(solver) if dataclasses.is_dataclass(solver) else []
    named = {found.keyword: name for name, other in _SOLVERS_WITH_KNOBS.items() for found in options_of(other)}
    for name in [name for name in keywords if name in named and name not in (found.keyword for found in own)]:
        having = [word for word, other in _SOLVERS_WITH_KNOBS.items() if name in (each.keyword for each in options_of(other))]
        raise ValueError(
            f"solver {solver_name(solver)!r} has no option `{name}`; {', '.join(map(repr, having))} "
            f"{'has' if len(having) == 1 else 'have'} it"
        )
    fields = {found.field: keywords.pop(found.keyword) for found in own if found.keyword in keywords}
    return dataclasses.replace(solver, **fields) if fields else solver


def _choose(given: Any, known: Mapping[str, type], kind: type, name: str, **fields: Any) -> Any:
    if isinstance(given, str):
        check_name(name, given, known)
        return known[given](**fields)
    if isinstance(given, type) and issubclass(given, kind):
        return given(**fields)
    if not isinstance(given, kind):
        raise TypeError(f"`{name}` is one of {', '.join(map(repr, known))} or an object of one, got {type(given).__name__}")
    return given


def _with(chosen: Any, keywords: dict[str, Any]) -> Any:
    """The object with those of the keywords that it has, which are taken out."""
    fields = {found.field: keywords.pop(found.keyword) for found in options_of(chosen) if found.keyword in keywords}
    if isinstance(chosen, type):
        try:
            return chosen(**fields)
        except TypeError as error:
            if "missing" in str(error):
                raise ValueError(f"method {_said(chosen)}: {error}") from error
            raise
    return dataclasses.replace(chosen, **fields) if fields else chosen


def _said(part: Any) -> str:
    if isinstance(part, Method) or (isinstance(part, type) and issubclass(part, Method)):
        return repr(method_name(part))
    return repr(part.name)


def _fields(part: Any, named: Callable[..., str]) -> dict[str, Any]:
    return {field.name: _plain(getattr(part, field.name), field.name, named) for field in dataclasses.fields(part)}


def _plain(value: Any, name: str, named: Callable[..., str]) -> Any:
    if isinstance(value, VPSDE):
        chain = {"discrete": True} if isinstance(value, DiscreteVPSDE) else {}
        return {"beta_min": value.beta_min, "beta_max": value.beta_max, **chain}
    if isinstance(value, (tuple, list)):
        return [_plain(part, name, named) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(part, name, named) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and callable(value) and not isinstance(value, type):  # a solver with knobs
        known = solver_name(value)
        return {"name": known if known in SOLVERS else named(type(value), option=name), **_fields(value, named)}
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else named(value, option=name)


def _values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a method as they were before `_plain`."""
    values = dict(fields)
    if isinstance(values.get("sde"), Mapping):
        sde = dict(values["sde"])
        values["sde"] = (DiscreteVPSDE if sde.pop("discrete", False) else VPSDE)(**sde)
    if isinstance(values.get("solver"), Mapping):
        knobs = dict(values["solver"])
        solver = as_solver(knobs.pop("name"))
        values["solver"] = dataclasses.replace(solver, **_values(knobs)) if knobs else solver
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
