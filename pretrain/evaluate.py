"""Report loss, perplexity and bits per byte of a checkpoint on shards, or accuracy on a task."""

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch

from megarec.cli import run
from megarec.config.loader import apply_override
from megarec.config.schema import Config
from megarec.conversion.load import load_model
from megarec.data.synthetic import make_task
from megarec.device import select_device
from megarec.evaluation.held_out import add_arguments, open_held_out
from megarec.evaluation.loss import evaluate_loss
from megarec.evaluation.task import task_accuracy
from megarec.models import Backbone


def main() -> None:
    """Parse the command line, evaluate, print a line a source or length (JSON on demand)."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--task", nargs="+", metavar=("NAME", "key=value"), help="a synthetic task instead of data")
    add("--lengths", type=int, nargs="+", help="of the task (default: --seq-len)")
    add("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args()

    device = select_device(args.device)
    model, config = load_model(args.checkpoint, device)
    if args.task:
        on_task(args, model, config, device)
    else:
        on_data(args, model, config, device)


def on_data(
    args: argparse.Namespace, model: Backbone, config: Config | None, device: torch.device
) -> None:
    """Print loss and bits per byte of each source."""
    results = evaluate_loss(model, open_held_out(args, model, config), device)
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


def on_task(
    args: argparse.Namespace, model: Backbone, config: Config | None, device: torch.device
) -> None:
    """Print the accuracy at each length."""
    name, *overrides = args.task
    sizes: dict[str, Any] = {}
    for override in overrides:
        apply_override(sizes, override)
    task = make_task(name, **sizes)
    lengths = args.lengths or [args.seq_len or (config.train.seq_len if config else 1024)]
    results = [
        task_accuracy(
            model,
            task,
            length,
            num_sequences=args.max_samples or 256,
            batch_size=args.batch_size,
            device=device,
        )
        for length in lengths
    ]
    if args.json:
        print(json.dumps({name: [asdict(result) for result in results]}))
        return
    for result in results:
        print(
            f"{name}, length {result.length}: accuracy {result.accuracy:.4f}, whole sequences "
            f"{result.sequence_accuracy:.4f}  (chance {task.chance:.4f}, "
            f"{result.num_sequences} sequences)"
        )


if __name__ == "__main__":
    run(main)
