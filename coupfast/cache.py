"""Where files are kept that can be had again: downloads, and what was measured on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(kind: str) -> Path:
    """`$XDG_CACHE_HOME/coupfast/KIND`, by default below `~/.cache`; not made here.

    A variable that is empty or no absolute path counts as unset, as the XDG specification has it.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", "")).expanduser()
    return (chosen if chosen.is_absolute() else Path("~/.cache").expanduser()) / "coupfast" / kind
