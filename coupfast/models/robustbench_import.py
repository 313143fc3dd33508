"""RobustBench as it installs, made importable.

RobustBench 1.1 needs three things that installing it does not give:

* ``pkg_resources``, which setuptools ships up to version 80 only. It is asked for, not replaced.
* the package ``autoattack``, which is not on the package index. RobustBench declares `pyautoattack` instead, the same
  attacks under another import name;
* the signature of the former: ``robustbench.benchmark`` calls AutoAttack with ``log_path=`` and ``bs=`` and expects
  one tensor back, `pyautoattack` takes neither and returns two. So a plain alias imports, and fails when it is used.
"""

import importlib.util
import sys
import types
import warnings
from importlib import import_module
from typing import Any

_INSTALL = 'pip install "coupfast[zoo]"'


def import_robustbench() -> types.ModuleType:
    """Import RobustBench with `pyautoattack` in the place of a missing `autoattack`.

    The names ``autoattack`` and ``autoattack.state`` stand in ``sys.modules`` only while RobustBench is imported, and
    only if the real package is not installed: nothing else in the process sees them.

    Returns:
        The module ``robustbench``. ``robustbench.benchmark`` works (1.1.1 of the package index has it commented out); its
        ``aa_state_path`` and ``log_path`` are refused (see `autoattack_modules`).

    Raises:
        ImportError: if RobustBench, torchvision or setuptools is missing or does not fit; says what to install.
    """
    if "robustbench" in sys.modules:
        return sys.modules["robustbench"]
    if not _found("robustbench"):
        raise ImportError(f"robustbench is not installed; install it with: {_INSTALL}")
    _check_torchvision()
    if not _found("pkg_resources"):
        raise ImportError(
            "robustbench imports pkg_resources, which setuptools has up to version 80 only; "
            'install an older one with: pip install "setuptools<81"'
        )
    modules = {} if _autoattack_is_installed() else autoattack_modules()
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pkg_resources", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*pkg_resources", category=DeprecationWarning)
            return import_module("robustbench")
    except ImportError as error:
        # What the failed import left behind would make the next try end elsewhere, with a stranger message.
        for name in [name for name in sys.modules if name.partition(".")[0] == "robustbench"]:
            del sys.modules[name]
        raise ImportError(f"robustbench does not import ({error}); install what it needs with: {_INSTALL}") from error
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def autoattack_modules() -> dict[str, types.ModuleType]:
    """Modules ``autoattack`` and ``autoattack.state`` made of `pyautoattack`, with what ``robustbench.benchmark`` uses.

    Its AutoAttack takes the original's arguments and returns what the original returns, except for two that
    `pyautoattack` cannot honour and that raise ``ValueError``: ``log_path`` (progress goes to the logger
    ``auto-attack`` at level DEBUG: attach a handler) and ``state_path`` (written, but it cannot be read back).

    Raises:
        ImportError: if `pyautoattack` is not installed.
    """
    if not _found("pyautoattack"):
        raise ImportError(f"neither autoattack nor pyautoattack is installed; install the latter with: {_INSTALL}")
    pyautoattack: Any = import_module("pyautoattack")

    class AutoAttack:
        """`pyautoattack.AutoAttack` behind the signature of ``autoattack.AutoAttack``."""

        def __init__(
            self,
            model: Any,
            norm: str = "Linf",
            eps: float = 0.3,
            seed: int | None = None,
            version: str = "standard",
            device: Any = "cuda",
            log_path: str | None = None,
        ) -> None:
            if log_path is not None:
                raise ValueError(
                    f"pyautoattack writes no log file, got log_path={log_path!r}; "
                    'attach a handler to logging.getLogger("auto-attack") at level DEBUG'
                )
            self._attack = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=seed, version=version, device=device)

        def run_standard_evaluation(self, x_orig: Any, y_orig: Any, bs: int = 250, state_path: Any = None) -> Any:
            if state_path is not None:
                raise ValueError(
                    f"pyautoattack writes a state file but cannot resume from it, got state_path={str(state_path)!r} "
                    "(aa_state_path of robustbench.benchmark); leave it out"
                )
            x_adv, _ = self._attack.run_standard_evaluation(x_orig, y_orig, batch_size=bs)
            return x_adv

    package: Any = types.ModuleType("autoattack", "pyautoattack under its original name and signature")
    package.__path__ = []  # makes it a package, so that `autoattack.state` is looked for
    package.AutoAttack = AutoAttack
    package.state = state = types.ModuleType("autoattack.state")
    state.EvaluationState = import_module("pyautoattack.state").EvaluationState  # type: ignore[attr-defined]
    return {"autoattack": package, "autoattack.state": state}


def _found(name: str) -> bool:
    # A module put into sys.modules by hand has no spec, and find_spec raises for it.
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _autoattack_is_installed() -> bool:
    # A script of somebody's on the path, such as this project's own benchmark, may have the name: the attacks are a package.
    if "autoattack" in sys.modules:
        return hasattr(sys.modules["autoattack"], "AutoAttack")
    spec = importlib.util.find_spec("autoattack")
    return spec is not None and spec.submodule_search_locations is not None


def _check_torchvision() -> None:
    try:
        import_module("torchvision")
    except ModuleNotFoundError as error:
        raise ImportError(f"robustbench needs torchvision, which is missing; install it with: {_INSTALL}") from error
    except RuntimeError as error:
        # What a torchvision built for another torch raises while registering its operators.
        raise ImportError(
            f"torchvision does not work with the installed torch ({error}); install the torchvision that belongs to it"
        ) from error
