"""Where downloads are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(kind: str) -> Path:
    """`$XDG_CACHE_HOME/coupfast/KIND`, by default below `~/.cache`; not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "coupfast" / kind
