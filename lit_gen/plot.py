"""Plots of a sweep's measures over the values it went over."""

from __future__ import annotations

from pathlib import Path

from lit_gen.errors import UserError

try:
    import matplotlib
except ImportError:
    raise UserError("the report has plots, which need matplotlib: pip install 'lit-gen[plots]'") from None

matplotlib.use("agg")  # no display is needed
matplotlib.rcParams["svg.hashsalt"] = "lit_gen"  # the same plot is the same file
matplotlib.rcParams["svg.fonttype"] = "none"  # letters stay letters: smaller, and can be searched for

import matplotlib.pyplot as plt  # noqa: E402

from lit_gen.metrics.scores import Estimate  # noqa: E402

_MARKERS = "osD^vP*X"


def draw(series: dict[str, dict[float, Estimate]], over: str, measure: str, file: Path, log: bool = True) -> None:
    """Write a plot of a measure with its intervals, one line for each series, as svg or png by the file's name.

    Args:
        series: name -> value -> mean and interval.
        over: what the values are.
        measure: what was measured.
        log: spread the values by their logarithm.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    colours = plt.get_cmap("tab10")
    for i, (name, points) in enumerate(series.items()):
        values = sorted(points)
        means = [points[value].mean for value in values]
        low = [points[value].low for value in values]
        high = [points[value].high for value in values]
        style = {"color": colours(i % 10), "linestyle": "-" if i < 10 else "--"}
        axes.plot(values, means, label=name, marker=_MARKERS[i % len(_MARKERS)], markersize=4, linewidth=1.4, **style)
        axes.fill_between(values, low, high, color=style["color"], alpha=0.12, linewidth=0)
    if log:
        axes.set_xscale("log")
        ticks = sorted({value for points in series.values() for value in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(xlabel=over, ylabel=measure)
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)
    plt.close(figure)
