"""Rank a model's mixers by the loss without each of them: which layers a hybrid can do without.

Prints a table, least important first, and the numbers in the form that convert.py hybridize takes;
writes the same to OUT.json and a plot to OUT.png.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megarec.cli import check_new_file, run
from megarec.conversion.load import load_model
from megarec.device import select_device
from megarec.evaluation.held_out import add_arguments, open_held_out
from megarec.evaluation.layer_importance import leave_one_out, plot_importance


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("layer_importance"), help="without suffix")
    parser.add_argument("--force", action="store_true", help="replace OUT.json and OUT.png")
    args = parser.parse_args()
    table, plot = Path(f"{args.out}.json"), Path(f"{args.out}.png")
    for path in (table, plot):
        check_new_file(path, force=args.force)

    device = select_device(args.device)
    model, config = load_model(args.checkpoint, device)
    whole, importance = leave_one_out(model, open_held_out(args, model, config), device)
    print(f"whole model: loss {whole:.4f}")
    print("layer  mixer       loss without  increase")
    for layer in importance:
        print(f"{layer.layer:>5}  {layer.mixer:<10}  {layer.loss:>12.4f}  {layer.increase:>+8.4f}")
    print(f"least important first: {','.join(str(layer.layer) for layer in importance)}")
    report = {"loss": whole, "layers": [asdict(layer) for layer in importance]}
    table.write_text(json.dumps(report, indent=2) + "\n")
    plot_importance(importance, plot)
    print(f"{table}, {plot}")


if __name__ == "__main__":
    run(main)
