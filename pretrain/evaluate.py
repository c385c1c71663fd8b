"""Report loss, perplexity and bits per byte of a checkpoint on shards."""

import argparse
import json

from megarec.cli import run
from megarec.conversion.load import load_model
from megarec.device import select_device
from megarec.evaluation.held_out import add_arguments, open_held_out
from megarec.evaluation.loss import evaluate_loss


def main() -> None:
    """Parse the command line, evaluate, print a line a source (and JSON on demand)."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args()

    device = select_device(args.device)
    model, config = load_model(args.checkpoint, device)
    loader = open_held_out(args, model, config)
    results = evaluate_loss(model, loader, device)
    if args.json:
        keys = ("loss", "perplexity", "bits_per_byte", "num_tokens")
        print(json.dumps({n: {k: getattr(r, k) for k in keys} for n, r in results.items()}))
        return
    for name, result in results.items():
        bits = f"{result.bits_per_byte:.4f}" if result.bits_per_byte is not None else "unknown"
        print(
            f"{name}: loss {result.loss:.4f}  perplexity {result.perplexity:.3f}  "
            f"bits per byte {bits}  ({result.num_tokens:,} tokens)"
        )


if __name__ == "__main__":
    run(main)
