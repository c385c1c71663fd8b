"""Draw the loss curves, or other logged metrics, of one or several runs to a PNG."""

import argparse
from pathlib import Path

from megarec.cli import run
from megarec.errors import UserError
from megarec.train.hooks.plot import plot_loss, plot_metrics
from megarec.train.run_folder import RunFolder


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("loss.png"), help="PNG to write")
    parser.add_argument("--metrics", nargs="+", help="keys of metrics.jsonl, in place of the loss")
    args = parser.parse_args()

    metrics = {path.name: RunFolder(path).metrics for path in args.runs}
    missing = [str(path) for path in metrics.values() if not path.is_file()]
    if missing:
        raise UserError(*(f"{path}: no such file; expected a run folder" for path in missing))
    if args.metrics:
        plot_metrics(metrics, args.metrics, args.out)
    else:
        plot_loss(metrics, args.out)
    print(args.out)


if __name__ == "__main__":
    run(main)
