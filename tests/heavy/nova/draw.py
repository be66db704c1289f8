"""Draw seconds against size as an SVG.

It reads what to draw as JSON from standard input, and runs in the environment that has matplotlib.
"""

import json
import sys

import matplotlib as mpl

COLOURS = {"Nova downloads": "#b3362b", "linked before": "#1f6f4a"}
# In points: the figures of one line stand above it, those of the other below.
OFFSETS = {"Nova downloads": 8, "linked before": -17}
LABELS = {"Nova downloads": "Nova downloads the image", "linked before": "ln-images has linked it"}


def main() -> None:
    """Draw one line for each way to boot, with its name at its end."""
    mpl.use("svg")
    from matplotlib import pyplot

    figures = json.load(sys.stdin)
    mpl.rcParams.update({"svg.hashsalt": "ln-images", "font.size": 11, "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    for way, seconds in figures["lines"].items():
        axes.plot(figures["sizes"], seconds, marker="o", color=COLOURS[way], linewidth=2)
        for size, each in zip(figures["sizes"], seconds, strict=True):
            axes.annotate(
                f"{each:.1f} s",
                (size, each),
                xytext=(0, OFFSETS[way]),
                textcoords="offset points",
                ha="center",
                color=COLOURS[way],
            )
        end = (figures["sizes"][-1], seconds[-1])
        axes.annotate(
            LABELS[way],
            end,
            xytext=(-28, OFFSETS[way]),
            textcoords="offset points",
            ha="right",
            color=COLOURS[way],
            weight="bold",
        )
    axes.set_xlabel("size of the image in GiB")
    axes.set_ylabel("seconds")
    axes.set_title("First boot of an image: from POST /servers to ACTIVE", loc="left")
    axes.set_xticks(figures["sizes"])
    longest = max(figures["lines"]["Nova downloads"])
    axes.set_ylim(bottom=-0.12 * longest, top=1.2 * longest)
    axes.set_xlim(left=0, right=figures["sizes"][-1] * 1.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(figures["path"], metadata={"Date": None})


if __name__ == "__main__":
    main()
