"""Report loss, perplexity and bits per byte of a checkpoint on shards."""

import argparse
import json
from pathlib import Path

from megarec.cli import run
from megarec.config.schema import SourceConfig
from megarec.conversion.load import find_tokenizer, load_model
from megarec.data.build import build_eval_sources
from megarec.data.loader import EvalLoader
from megarec.device import select_device
from megarec.errors import UserError
from megarec.evaluation.loss import evaluate_loss


def main() -> None:
    """Parse the command line, evaluate, print a line a source (and JSON on demand)."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="a run, a step folder or an HF folder")
    add("--data", nargs="*", default=[], help="shard folders (default: data.valid of the run)")
    add("--seq-len", type=int, help="default: that of the run, else 1024")
    add("--batch-size", type=int, default=8)
    add("--max-samples", type=int, help="of each source")
    add("--tokenizer", help="'byte' or a tokenizer.json (default: that of the checkpoint)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args()

    device = select_device(args.device)
    model, config = load_model(args.checkpoint, device)
    named = {str(path): SourceConfig(path=str(path)) for path in args.data}
    sources = named or (config.data.valid if config else {})
    if not sources:
        raise UserError(f"{args.checkpoint}: names no validation data; give --data FOLDER")
    seq_len = args.seq_len or (config.train.seq_len if config else 1024)
    loader = EvalLoader(
        build_eval_sources(
            sources,
            bos=config.data.bos if config else "none",
            seq_len=seq_len,
            vocab_size=model.config.vocab_size,
            tokenizer=find_tokenizer(args.checkpoint, config, args.tokenizer),
        ),
        micro_batch_size=args.batch_size,
        data_rank=0,
        data_ranks=1,
        max_samples=args.max_samples,
    )
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
