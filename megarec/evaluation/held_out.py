"""The held-out data that a checkpoint is evaluated on by the command-line tools."""

import argparse
from pathlib import Path

from megarec.config.schema import Config, SourceConfig
from megarec.conversion.load import find_tokenizer
from megarec.data.build import build_eval_sources
from megarec.data.loader import EvalLoader
from megarec.errors import UserError
from megarec.models.backbone import Backbone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `open_held_out` reads."""
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="a run, a step folder or an HF folder")
    add("--data", nargs="*", default=[], help="shard folders (default: data.valid of the run)")
    add("--seq-len", type=int, help="default: that of the run, else 1024")
    add("--batch-size", type=int, default=8)
    add("--max-samples", type=int, help="of each source")
    add("--tokenizer", help="'byte' or a tokenizer.json (default: that of the checkpoint)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))


def open_held_out(args: argparse.Namespace, model: Backbone, config: Config | None) -> EvalLoader:
    """Open the data for a model and the config of its run, if it has one.

    Raises:
        UserError: no data is named, or it does not fit the model.
    """
    named = {str(path): SourceConfig(path=str(path)) for path in args.data}
    sources = named or (config.data.valid if config else {})
    if not sources:
        raise UserError(f"{args.checkpoint}: names no validation data; give --data FOLDER")
    return EvalLoader(
        build_eval_sources(
            sources,
            bos=config.data.bos if config else "none",
            seq_len=args.seq_len or (config.train.seq_len if config else 1024),
            vocab_size=model.config.vocab_size,
            tokenizer=find_tokenizer(args.checkpoint, config, args.tokenizer),
        ),
        micro_batch_size=args.batch_size,
        data_rank=0,
        data_ranks=1,
        max_samples=args.max_samples,
    )
