"""Report loss, perplexity and bits per byte of a checkpoint on shards, or accuracy on a task."""

import argparse
import json
from dataclasses import asdict

import torch

from megarec.cli import named_settings, positive_int, run
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
    add("--num-recurrences", type=positive_int, nargs="+", help="of a looped stack, one by one")
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
    loader = open_held_out(args, model, config)
    results = {
        depth: evaluate_loss(model, loader, device, num_recurrences=depth)
        for depth in args.num_recurrences or [None]
    }
    if args.json:
        keys = ("loss", "perplexity", "bits_per_byte", "num_tokens")
        trees = {
            depth: {name: {key: getattr(r, key) for key in keys} for name, r in by_name.items()}
            for depth, by_name in results.items()
        }
        print(json.dumps(trees if args.num_recurrences else trees[None]))
        return
    for depth, by_name in results.items():
        for name, result in by_name.items():
            where = f"{name}, {depth} recurrences" if depth else name
            bits = f"{result.bits_per_byte:.4f}" if result.bits_per_byte is not None else "unknown"
            print(
                f"{where}: loss {result.loss:.4f}  perplexity {result.perplexity:.3f}  "
                f"bits per byte {bits}  ({result.num_tokens:,} tokens)"
            )


def on_task(
    args: argparse.Namespace, model: Backbone, config: Config | None, device: torch.device
) -> None:
    """Print the accuracy at each length."""
    name, sizes = named_settings(args.task)
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
            num_recurrences=depth,
        )
        for length in lengths
        for depth in args.num_recurrences or [None]
    ]
    if args.json:
        print(json.dumps({name: [asdict(result) for result in results]}))
        return
    for result in results:
        depth = f", {result.num_recurrences} recurrences" if result.num_recurrences else ""
        print(
            f"{name}, length {result.length}{depth}: accuracy {result.accuracy:.4f}, whole "
            f"sequences {result.sequence_accuracy:.4f}  (chance {task.chance:.4f}, "
            f"{result.num_sequences} sequences)"
        )


if __name__ == "__main__":
    run(main)
