"""Figures drawn by Matplotlib, which is imported only where one is."""

from __future__ import annotations

import io
from typing import Any

#: Distinguishable also without colour vision (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def check_matplotlib() -> None:
    """ImportError if Matplotlib is missing; the message names the extra."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f'matplotlib draws the pictures ({error}); install it with: pip install "coupfast[demo]"') from error


def new_figure(width: float, height: float) -> Any:
    """An empty Matplotlib figure, in inches.

    Raises:
        ImportError: see `check_matplotlib`.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    # Not pyplot: it keeps figures and looks for a display.
    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: Any) -> bytes:
    """A figure's file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
