"""Accuracy of looped models on a synthetic task by its depth and by the recurrences: table, plot.

Does more thinking solve deeper questions than training has shown? Three seeds of two models:

    python tools/depth.py --checkpoint gated=runs/khop_gated_0 gated=runs/khop_gated_1 \\
        plain=runs/khop_plain_0 plain=runs/khop_plain_1 --task khop num_queries=4 \\
        --depth-keys min_hops max_hops --depths 1 2 4 8 12 --num-recurrences 1 2 4 8 16 --length 64
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megarec.cli import named_settings, run
from megarec.conversion.load import load_model
from megarec.data.synthetic import make_task
from megarec.device import select_device
from megarec.errors import UserError
from megarec.evaluation.task import task_accuracy

Grid = npt.NDArray[np.float64]
"""Accuracy, (depths of the task, numbers of recurrences)."""


def main() -> None:
    """Parse the command line, measure, print a table a label, draw if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, metavar="LABEL=PATH", help="a label's: averaged")
    add("--task", nargs="+", required=True, metavar=("NAME", "key=value"))
    add("--depth-keys", nargs="+", required=True, help="sizes of the task that are set to a depth")
    add("--depths", nargs="+", type=int, required=True)
    add("--num-recurrences", nargs="+", type=int, required=True)
    add("--length", type=int, required=True, help="of the sequences, in tokens")
    add("--max-samples", type=int, default=256, help="sequences")
    add("--plot", type=Path, help="a PNG")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()

    grids: dict[str, list[Grid]] = {}
    for checkpoint in args.checkpoint:
        label, sign, path = checkpoint.partition("=")
        if not sign:
            raise UserError(f"--checkpoint {checkpoint}: expected LABEL=PATH")
        grids.setdefault(label, []).append(measure(Path(path), args))
    for label, found in grids.items():
        print(f"\n{label}, {len(found)} runs: mean accuracy (worst to best)\n")
        print(table(np.stack(found), args.depths, args.num_recurrences))
    if args.plot:
        draw({k: np.stack(v) for k, v in grids.items()}, args)


def measure(path: Path, args: argparse.Namespace) -> Grid:
    """Return the accuracy of one checkpoint at each depth and number of recurrences."""
    device = select_device(args.device)
    model, _ = load_model(path, device)
    name, sizes = named_settings(args.task)
    grid = np.empty((len(args.depths), len(args.num_recurrences)))
    for i, depth in enumerate(args.depths):
        task = make_task(name, **(sizes | dict.fromkeys(args.depth_keys, depth)))
        for j, num_recurrences in enumerate(args.num_recurrences):
            result = task_accuracy(
                model,
                task,
                args.length,
                num_sequences=args.max_samples,
                device=device,
                num_recurrences=num_recurrences,
            )
            grid[i, j] = result.accuracy
    return grid


def table(runs: npt.NDArray[np.float64], depths: Sequence[int], columns: Sequence[int]) -> str:
    """Return a Markdown table of accuracies (runs, depths, columns)."""
    lines = ["| depth | " + " | ".join(f"r={r}" for r in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for depth, cells in zip(depths, runs.transpose(1, 2, 0), strict=True):
        shown = [
            f"{c.mean():.2f}" + (f" ({c.min():.2f}-{c.max():.2f})" if np.ptp(c) >= 0.01 else "")
            for c in cells
        ]
        lines.append(f"| {depth} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw(grids: dict[str, npt.NDArray[np.float64]], args: argparse.Namespace) -> None:
    """Draw a panel a label: accuracy over the recurrences, a line a depth, shaded from worst to
    best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, row = plt.subplots(
        1, len(grids), figsize=(1 + 4 * len(grids), 4.2), sharey=True, squeeze=False
    )
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(args.depths)))
    for (label, runs), axes in zip(grids.items(), row[0], strict=True):
        for i, (depth, colour) in enumerate(zip(args.depths, colours, strict=True)):
            at_depth = runs[:, i]
            axes.plot(args.num_recurrences, at_depth.mean(0), "o-", color=colour, label=str(depth))
            low, high = at_depth.min(0), at_depth.max(0)
            axes.fill_between(args.num_recurrences, low, high, color=colour, alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set_xticks(args.num_recurrences, [str(r) for r in args.num_recurrences])
        axes.set_title(f"{label} ({len(runs)} runs)")
        axes.set_xlabel("recurrences")
        axes.grid(alpha=0.3)
    row[0, 0].set_ylabel("accuracy")
    row[0, -1].legend(
        title="depth of\nthe task", fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)
    )
    figure.tight_layout()
    figure.savefig(args.plot, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
