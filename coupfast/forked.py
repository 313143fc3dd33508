"""Threads do not survive a fork: a child of a process whose threads have run waits for them for ever. Say so instead."""

from __future__ import annotations

import os

import torch

_ran = False  # whether a purification ran here on several threads
_orphaned = False  # whether this process is a fork of one where that is so


def _after_fork() -> None:
    global _orphaned
    _orphaned = _orphaned or _ran


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_threads() -> None:
    """Before work on a CPU: RuntimeError in a fork of a process that has run PyTorch's threads, unless one thread is enough."""
    global _ran
    if torch.get_num_threads() == 1:
        return
    if _orphaned:
        raise RuntimeError(
            "this process was forked from one whose threads have run, and threads do not survive a fork: PyTorch would wait "
            "for them for ever. Start processes with multiprocessing's 'spawn' or 'forkserver', or call "
            "torch.set_num_threads(1) in this one"
        )
    _ran = True
