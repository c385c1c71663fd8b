"""Draw the loss curves of one or several runs: plot.py RUN... --out loss.png."""

import argparse
from pathlib import Path

from megarec.cli import run
from megarec.errors import UserError
from megarec.train.hooks.plot import plot_loss
from megarec.train.run_folder import RunFolder


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("loss.png"), help="PNG to write")
    args = parser.parse_args()

    metrics = {path.name: RunFolder(path).metrics for path in args.runs}
    missing = [str(path) for path in metrics.values() if not path.is_file()]
    if missing:
        raise UserError(*(f"{path}: no such file; expected a run folder" for path in missing))
    plot_loss(metrics, args.out)
    print(args.out)


if __name__ == "__main__":
    run(main)
