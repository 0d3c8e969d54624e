"""The loss curve of a run, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# Averages over fewer points than this look like the points themselves.
_SMOOTH_FROM = 20


def draw_loss_curve(
    steps: Sequence[int],
    losses: Sequence[float],
    path: Path,
    title: str,
    *,
    held_out: Sequence[tuple[int, float]] = (),
) -> bool:
    """Draw training loss over steps into a PNG, and the loss on held-out data beside it.

    Long runs get a running mean over a twentieth of the run, at least 5 points, beside the points.

    Args:
        steps: optimizer steps, ascending.
        losses: the mean loss logged at each, in nats a token.
        path: of the PNG.
        title: above the picture.
        held_out: steps and the loss on held-out data after them.

    Returns:
        False if matplotlib is not installed; nothing is drawn then.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # A figure without pyplot: no window system and no global state.
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    smooth = len(losses) >= _SMOOTH_FROM
    axes.plot(
        steps,
        losses,
        color="tab:blue",
        alpha=0.35 if smooth else 1.0,
        linewidth=1.2,
        marker="o" if len(losses) == 1 else None,
        label="each logged step",
    )
    if smooth:
        window = max(5, len(losses) // 20)
        axes.plot(
            steps,
            running_mean(losses, window),
            color="tab:blue",
            linewidth=1.8,
            label=f"mean of the last {window}",
        )
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="tab:orange", marker="o", label="held-out data"
        )
    if smooth or held_out:
        axes.legend(frameon=False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
    return True


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to ``window - 1`` before it."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means
