"""The command line, a file per command: parse, call, print. Everything that is computed is computed elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

import torch

import coupfast
from coupfast.cli import certify, check_gradient, convert, doctor, evaluate, methods, plan, purify, report, reproduce
from coupfast.evaluation.ledger import Ledger, LedgerError
from coupfast.evaluation.pools import UnitFailed
from coupfast.models.zoo import import_references

# What a caller can put right: a wrong argument, file, installation or size. Anything else is a bug and keeps its traceback.
_EXPECTED = (ValueError, FloatingPointError, ImportError, MemoryError, torch.OutOfMemoryError, OSError, UnitFailed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        Exit status: 0; 1 where `doctor --strict` finds a problem or `check-gradient` a gradient that is not what it claims to
        be; 2 for a wrong argument, file or setting, after one line on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: with 143, where `evaluate`, `certify`, `purify` or `reproduce` gets SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else ""
    try:
        import_references(argv)
        options, unknown = parser(argv).parse_known_args(argv)
        if unknown:
            raise ValueError(f"{' '.join(unknown)}: not among its options; `coupfast {options.command} --help` lists them")
        options.argv = argv
        status: int = options.run(options)
        return status
    except _EXPECTED as error:
        if "--debug" in argv:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"coupfast {command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"coupfast {command}: interrupted", file=sys.stderr)
        return 130


def parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """All commands. What can be told to a method or an attack of somebody else's follows from the one that `argv` names.

    Raises:
        ValueError: if it names one that cannot be found.
    """
    method, attack = _named(argv)
    found = argparse.ArgumentParser(
        prog="coupfast", description="Diffusion-based adversarial purification: fast, exact, reproducible."
    )
    found.add_argument("--version", action="version", version=f"coupfast {coupfast.__version__}")
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    purify.add(commands, method)
    certify.add(commands)
    check_gradient.add(commands, method)
    evaluate.add(commands, method, attack)
    plan.add(commands, method, attack)
    report.add(commands)
    reproduce.add(commands)
    methods.add(commands)
    doctor.add(commands)
    convert.add(commands)
    return found


def _named(argv: Sequence[str]) -> tuple[str | None, str | None]:
    """Method and attack that are asked for, or that the run to resume has."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--method", "--attack", "--resume"):
        first.add_argument(flag, nargs="?")
    asked, _ = first.parse_known_args(list(argv))
    method, attack = asked.method, asked.attack
    if asked.resume:
        with contextlib.suppress(LedgerError):  # the command says it, if it gets there
            with Ledger(asked.resume, read_only=True) as ledger:
                stored = ledger.configuration["spec"]
            attack = attack or stored["attack"]
            purifier = stored["purifier"] or {}
            method = method or (purifier["settings"]["method"]["name"] if "settings" in purifier else purifier.get("method"))
    return method, attack
