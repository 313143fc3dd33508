"""Which networks there are: what `load_score`, `load_classifier`, `coupfast convert` and the command line's help know.

A network is added by one file, inside or outside of this package, that registers a `Family`:

    from coupfast.models.registry import register_classifier

    @register_classifier(names={"lenet-fashion": {"width": 6}}, recognise=lambda state: ...)
    class LeNet(nn.Module):
        def __init__(self, width: int = 6): ...

A file of this folder is found by itself. One outside is imported by name: ``load_classifier("package.module:lenet-fashion")``,
``--classifier package.module:lenet-fashion`` or ``--classifier folder/file.py:lenet-fashion``; importing it anyhow does, too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from coupfast.models.adapters import Normalized
from coupfast.models.defaults import plain_defaults

Kind = Literal["score", "classifier"]
Config = Mapping[str, Any]
#: What a network of the other kind should be called in a message.
KINDS: dict[Kind, str] = {"score": "score network", "classifier": "classifier"}

Network = TypeVar("Network", bound=type[nn.Module])


class CheckpointError(ValueError):
    """A weight file is damaged, not allowed, or does not fit the network.

    Example:
        >>> import pathlib, tempfile, coupfast
        >>> from coupfast.models.registry import CheckpointError
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "weights.safetensors")
        ...     _ = path.write_bytes(b"no weights")
        ...     try:
        ...         coupfast.load_score(path)
        ...     except CheckpointError as error:
        ...         print("no safetensors file" in str(error))
        True
    """


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture: how it is configured, how its checkpoints are recognised, and its random weights.

    Attributes:
        arch: Its name in configurations, ``{"arch": arch, ...}``.
        kind: ``"score"`` for (x_k, 999 t) → eps_hat, ``"classifier"`` for images in [0, 1] → logits.
        build: Keyword arguments of a configuration → the network with initial weights. TypeError and ValueError say that an
            argument is wrong. A network with the attribute `config` says its configuration with all defaults.
        names: Configurations (without `arch`) by the names that they are loaded by; they need weights.
        recognise: Names and shapes of weights, without wrappers, → the configuration (without `arch`) that they fit; None where
            they are of another family; CheckpointError where they cannot be right.
        extract: What a file holds, and its configuration if known, → the configuration and the weights by name, for a layout
            of its own; None where it is another layout.
        needs: What to say where a name is given without weights.
        rule: A name that follows a rule ("wrn-16-4") → its configuration; None for other names.
        rule_text: How the help writes the rule: ``"wrn-D-W"``.
        randomise: Redraws, with a generator, the weights that are initially zero: random ones then serve benches and plans.
        untold: Arguments that weights do not tell, and what to say where neither file nor caller does.
        completed: The configuration as the constructor takes it, once all that weights do not tell was said.
        fixed: What such an argument of other families is in this one: ``{"activation": "relu"}``.
        ignored: Names of tensors that checkpoints have and the network does not use.
        weights_only: The network has nothing but its state dict: it may be built on the meta device and filled from a file.
        adopt: An object that is no network of ours, such as another library's pipeline, → a network; None for others.
        read_folder: A folder that holds a network in another library's layout → the network; None for other folders.
    """

    arch: str
    kind: Kind
    build: Callable[..., nn.Module]
    names: Mapping[str, Config] = dataclasses.field(default_factory=dict)
    recognise: Callable[[Mapping[str, Tensor]], Config | None] | None = None
    extract: Callable[[Any, Config | None], tuple[Config, dict[str, Tensor]] | None] | None = None
    needs: str = "give `weights=` a file, or 'random'"
    rule: Callable[[str], Config | None] | None = None
    rule_text: str = ""
    randomise: Callable[[Any, torch.Generator], object] | None = None
    untold: Mapping[str, str] = dataclasses.field(default_factory=dict)
    completed: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    fixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    weights_only: bool = False
    adopt: Callable[[object], nn.Module | None] | None = None
    read_folder: Callable[[Path], nn.Module | None] | None = None

    @property
    def normalises(self) -> bool:
        """Whether the constructor takes `mean` and `std`, per channel, of images in [0, 1]."""
        return self.kind == "classifier" and {"mean", "std"} <= set(inspect.signature(self.build).parameters)

    def configured(self, config: Config, given: Mapping[str, Any], *, by_weights: bool) -> dict[str, Any]:
        """A configuration with what the caller gave for arguments that weights do not tell (None: nothing).

        Args:
            by_weights: Whether the configuration was inferred from weights, so that nothing else says those arguments.

        Raises:
            CheckpointError: if an argument is not of this family, or said by nobody.
        """
        config = {"arch": self.arch, **config}
        for name, value in given.items():
            if value is None:
                continue
            if name in self.untold:
                config[name] = value
            elif self.fixed.get(name) != value:
                others = [family.arch for family in families(self.kind) if name in family.untold]
                has = f"; a {self.arch} has {self.fixed[name]!r}" if name in self.fixed else ""
                raise CheckpointError(f"`{name}` is for {', '.join(others) or 'no known network'}, got {value!r}{has}")
        missing = [name for name in self.untold if by_weights and name not in config]
        if missing:
            raise CheckpointError(f"weights of a {self.arch} do not tell its {missing[0]}: {self.untold[missing[0]]}")
        return config if self.completed is None else self.completed(config)


@dataclasses.dataclass(frozen=True)
class Named:
    """One network that has a name.

    Attributes:
        name, kind: Its.
        build: The network with initial weights; `seed` fixes them where they are random.
        config: Its configuration; None where only `build` knows the architecture.
        pretrained: The network with the weights that come with the name; None where none do.
        needs: What to say where there are none.
        may_lack: Names of constants that `build` fills in itself and files may lack.
    """

    name: str
    kind: Kind
    build: Callable[[int], nn.Module]
    config: Config | None = None
    pretrained: Callable[[], nn.Module] | None = None
    needs: str = "give `weights=` a file, or 'random'"
    may_lack: frozenset[str] = frozenset()


class Names(Protocol):
    """Names that are not configurations of a family: another package's, or ones whose weights ship with this package."""

    kind: Kind
    #: How the help says names that cannot be listed without importing a package; "" where `listed` has them all.
    text: str

    def listed(self) -> Sequence[str]:
        """The names that are known without importing anything."""

    def near(self, options: Mapping[str, Any]) -> Sequence[str]:
        """All names, for a suggestion where one is misspelt. ImportError says what is missing."""

    def find(self, name: str, options: Mapping[str, Any]) -> Named | None:
        """The network of that name; `options` are those of the loader. ImportError says what is missing."""


_families: dict[str, Family] = {}
_names: list[Names] = []


def register(entry: Family | Names) -> None:
    """Make a family, or names, known to everything that loads, converts or lists networks.

    Raises:
        ValueError: if its architecture or one of its names is taken. The same file may register again (a reload).
    """
    if not isinstance(entry, Family):
        origin = (type(entry).__module__, type(entry).__qualname__, entry.kind)
        _names[:] = [other for other in _names if (type(other).__module__, type(other).__qualname__, other.kind) != origin]
        _names.append(entry)
        return
    for other in _families.values():
        if _same_source(other, entry):
            continue
        if other.arch == entry.arch:
            raise ValueError(f"the architecture {entry.arch!r} is registered already, by {_source(other)}")
        if other.kind == entry.kind and (taken := sorted(set(other.names) & set(entry.names))):
            raise ValueError(f"the {KINDS[entry.kind]} {taken[0]!r} is registered already, by {_source(other)}")
    _families[entry.arch] = entry


def register_score(arch: str | None = None, **fields: Any) -> Callable[[Network], Network]:
    """Register a class of score networks; keyword arguments are fields of its `Family`, `arch` its own name if not given.

    Args:
        arch: The name of the architecture.
        fields: `names`, `recognise`, `randomise`, …, each a field of `Family`.

    Returns:
        A decorator that leaves the class as it is.

    Raises:
        ValueError: if a name is taken.

    Example:
        >>> import torch, coupfast
        >>> from coupfast.models.registry import register_score
        >>> @register_score(names={"two-layers": {"width": 4}})
        ... class TwoLayers(torch.nn.Module):
        ...     def __init__(self, width=8):
        ...         super().__init__()
        ...         self.first, self.last = torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.Conv2d(width, 3, 3, padding=1)
        ...     def forward(self, x, labels):
        ...         return self.last(self.first(x).relu())
        >>> coupfast.load_score("two-layers", weights="random").first.out_channels
        4
    """
    return _decorator("score", arch, fields)


def register_classifier(arch: str | None = None, **fields: Any) -> Callable[[Network], Network]:
    """Register a class of classifiers; keyword arguments are fields of its `Family`, `arch` its own name if not given.

    Args:
        arch: The name of the architecture.
        fields: `names`, `recognise`, `randomise`, …, each a field of `Family`.

    Returns:
        A decorator that leaves the class as it is.

    Raises:
        ValueError: if a name is taken.

    Example:
        >>> import torch, coupfast
        >>> from coupfast.models.registry import register_classifier
        >>> @register_classifier(names={"mean-colour": {"classes": 10}})
        ... class MeanColour(torch.nn.Module):
        ...     def __init__(self, classes=10):
        ...         super().__init__()
        ...         self.head = torch.nn.Linear(3, classes)
        ...     def forward(self, x):
        ...         return self.head(x.mean(dim=(2, 3)))
        >>> coupfast.load_classifier("mean-colour", weights="random").head.out_features
        10
    """
    return _decorator("classifier", arch, fields)


def _decorator(kind: Kind, arch: str | None, fields: Mapping[str, Any]) -> Callable[[Network], Network]:
    def decorate(network: Network) -> Network:
        register(Family(arch or network.__name__, kind, network, **fields))
        return network

    return decorate


def families(kind: Kind | None = None) -> list[Family]:
    """The registered families, of one kind or all."""
    _import_own()
    return [family for family in _families.values() if kind in (None, family.kind)]


def family_of(arch: object) -> Family:
    """The family of an architecture's name.

    Raises:
        CheckpointError: if there is none; the message lists those that there are.
    """
    _import_own()
    if not isinstance(arch, str) or arch not in _families:
        raise CheckpointError(
            f"unknown architecture {arch!r}; known are {sorted(_families)}. One of another file is known once that is "
            "imported: name it as package.module:NAME"
        )
    return _families[arch]


def configurations(arch: str) -> list[Config]:
    """The configurations of an architecture (without `arch`) that have names."""
    family = family_of(arch)
    known = [named.config for source in sources(family.kind) for name in source.listed() if (named := source.find(name, {}))]
    of_names = [config for config in known if config is not None and config["arch"] == arch]
    return [*family.names.values(), *({key: value for key, value in config.items() if key != "arch"} for config in of_names)]


def named_configuration(arch: str, state: Mapping[str, Tensor], told: Config | None = None) -> Config | None:
    """The configuration of a name of a family whose network has such tensors, by their names and shapes; None of no name.

    Args:
        told: Arguments that the weights tell, in the place of the name's.
    """
    for config in configurations(arch):
        found = {**config, **(told or {})}
        with torch.device("meta"):
            expected = build({"arch": arch, **found}).state_dict()
        if all(key in state and state[key].shape == value.shape for key, value in expected.items()):
            return found
    return None


def recognised(state: Mapping[str, Tensor]) -> tuple[Family, Config] | None:
    """The family and the configuration (without `arch`) of weights, by their names and shapes; None where no family knows them.

    Raises:
        CheckpointError: if the names are a family's, and the shapes cannot be.
    """
    for family in families():
        if family.recognise is not None and (config := family.recognise(state)) is not None:
            return family, config
    return None


def with_arch(config: Config) -> Config:
    """A configuration that may lack `arch`, with the one of the family whose constructor takes exactly such arguments.

    Raises:
        CheckpointError: if that is none, or several.
    """
    if "arch" in config:
        return config
    fits = []
    for family in families():
        parameters = inspect.signature(family.build).parameters
        if config.keys() <= parameters.keys():
            fits.append(family.arch)
    if len(fits) != 1:
        raise CheckpointError(
            f"the configuration {dict(config)} has no `arch`, and is one of {', '.join(fits) if fits else 'no known family'}; "
            f"known are {sorted(_families)}"
        )
    return {"arch": fits[0], **config}


def sources(kind: Kind) -> list[Names]:
    """Where names of other origins come from."""
    _import_own()
    return [source for source in _names if source.kind == kind]


def listed(kind: Kind) -> list[str]:
    """The names of networks of a kind that can be told without importing other packages, sorted."""
    of_families = [name for family in families(kind) for name in family.names]
    return sorted({*of_families, *(name for source in sources(kind) for name in source.listed())})


def described(kind: Kind) -> str:
    """The same for a line of help, with the rules that further names follow."""
    rules = [family.rule_text for family in families(kind) if family.rule_text]
    return ", ".join([*listed(kind), *rules, *(source.text for source in sources(kind) if source.text)])


def find_known(kind: Kind, name: str, options: Mapping[str, Any] | None = None) -> Named | None:
    """The network of a name that needs no other package to be looked up; None where there is none.

    Args:
        options: What the loader was given for arguments that some families or names have (`activation`, `threat_model`).

    Raises:
        CheckpointError: if an option is not one of that network.
    """
    for family in families(kind):
        config = family.names.get(name)
        if config is None and family.rule is not None:
            config = family.rule(name)
        if config is not None:
            return configured(kind, name, {"arch": family.arch, **config}, options or {})
    for source in sources(kind):
        if name in source.listed():
            return source.find(name, options or {})
    return None


def find(kind: Kind, name: str, options: Mapping[str, Any] | None = None) -> Named | None:
    """The network of a name; None where nothing here knows it. Arguments as for `find_known`.

    Raises:
        CheckpointError: if an option is not one of that network.
        ImportError: if a package is missing that might know the name.
    """
    if (known := find_known(kind, name, options)) is not None:
        return known
    missing: ImportError | None = None
    for source in sources(kind):
        try:
            if (found := source.find(name, options or {})) is not None:
                return found
        except ImportError as error:
            missing = error
    if missing is not None:
        raise missing
    return None


def configured(kind: Kind, name: str, config: Config, options: Mapping[str, Any], **fields: Any) -> Named:
    """The named network of a configuration."""
    family = family_of(config["arch"])
    given = {option: options.get(option) for option in _untold(kind)}
    full = family.configured({key: value for key, value in config.items() if key != "arch"}, given, by_weights=False)
    return Named(name, kind, functools.partial(random_network, full), full, needs=family.needs, **fields)


def build(config: Config) -> nn.Module:
    """The network of a configuration, as `network.config` has it, with initial weights.

    `mean` and `std` go to a family that normalises by itself; the networks of others stand behind a `Normalized`.

    Raises:
        CheckpointError: if `arch` is unknown or its constructor refuses the arguments.
    """
    family = family_of(config.get("arch"))
    arguments = {key: value for key, value in config.items() if key != "arch"}
    front = {}
    if "mean" in arguments and not family.normalises:
        front = {name: arguments.pop(name) for name in ("mean", "std")}
    try:
        network = family.build(**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{family.arch} does not take the configuration {arguments}: {error}") from error
    return Normalized(network, **front) if front else network


def random_network(config: Config, seed: int) -> nn.Module:
    """The network of a configuration with random weights of ordinary scale, which `seed` fixes: float32, on the CPU."""
    with plain_defaults(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
        if (randomise := family_of(config.get("arch")).randomise) is not None:
            randomise(model, torch.Generator().manual_seed(seed))
    return model


def skeleton(kind: Kind, name: str) -> nn.Module:
    """The network of a name on the meta device: shapes without weights, for counting.

    Raises:
        ValueError: if nothing here knows the name.
    """
    found = find(kind, name)
    if found is None or found.config is None:
        raise ValueError(f"{name!r} names no {KINDS[kind]} with a configuration; such are {', '.join(listed(kind))}")
    with torch.device("meta"):
        return build(found.config)


def adopted(kind: Kind, value: object) -> nn.Module | None:
    """The network made of an object that another library has; None where no family knows it."""
    made = (family.adopt(value) for family in families(kind) if family.adopt is not None)
    return next((network for network in made if network is not None), None)


def from_folder(kind: Kind, folder: Path) -> nn.Module | None:
    """The network in a folder of another library's layout; None where no family knows it."""
    read = (family.read_folder(folder) for family in families(kind) if family.read_folder is not None)
    return next((network for network in read if network is not None), None)


def kind_of(network: nn.Module) -> Kind | None:
    """The kind of a registered family's network; None of any other."""
    for family in families():
        if inspect.isclass(family.build) and isinstance(network, family.build):
            return family.kind
    return None


def _untold(kind: Kind) -> Iterator[str]:
    yield from dict.fromkeys(name for family in families(kind) for name in family.untold)


@functools.cache
def _import_own() -> None:
    """The families of this folder, which register when they are imported."""
    package = importlib.import_module("coupfast.models")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"coupfast.models.{module.name}")


def _source(family: Family) -> str:
    return f"{getattr(family.build, '__module__', '?')}.{getattr(family.build, '__qualname__', family.build)}"


def _same_source(one: Family, other: Family) -> bool:
    if one.arch != other.arch:
        return False
    # By file and name: a file that is loaded again, perhaps under another module name, makes another class.
    return _file(one) is not None and (_file(one), _qualified(one)) == (_file(other), _qualified(other))


def _file(family: Family) -> str | None:
    try:
        return inspect.getfile(family.build)  # type: ignore[arg-type]
    except (TypeError, OSError):
        return None


def _qualified(family: Family) -> str | None:
    return getattr(family.build, "__qualname__", None)
