"""Convert checkpoints to Hugging Face format (to-hf), and released weights to one (from-hf).

from-hf writes a run folder without a run: model.yaml (the model section, to paste into a recipe),
tokenizer.json if there is one, and checkpoints/step_00000000 with the weights alone. Evaluate,
sample or export it like any run; train from it with train.init_from=RUN_FOLDER.
"""

import argparse
import shutil
from pathlib import Path

import yaml

from megarec.checkpoint.dcp import MODEL
from megarec.checkpoint.manager import CheckpointManager
from megarec.checkpoint.resolve import resolve_checkpoint
from megarec.cli import run
from megarec.config.schema import CheckpointConfig
from megarec.conversion import export_hf, import_hf
from megarec.conversion.load import MODEL_FILE, TOKENIZER_FILE, find_tokenizer, load_model
from megarec.conversion.model_card import read_training_record
from megarec.errors import UserError
from megarec.train.state import TrainState


def main() -> None:
    """Convert in the direction that the command line asks for."""
    args = parse_args()
    if args.direction == "to-hf":
        to_hf(args)
    else:
        from_hf(args.hf, args.out)


def to_hf(args: argparse.Namespace) -> None:
    """Export a checkpoint, with its tokenizer and how it was trained."""
    step = resolve_checkpoint(args.checkpoint)
    model, config = load_model(step)
    record = None if config is None else read_training_record(step, config)
    export_hf(
        model,
        args.out,
        find_tokenizer(step, config, args.tokenizer),
        model_type=args.model_type,
        record=record,
        license=args.license,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, from {step}")


def from_hf(hf: Path, out: Path) -> None:
    """Import released weights as step 0 of a run folder."""
    config, tensors = import_hf(hf)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / MODEL_FILE).write_text(
        yaml.safe_dump({"model": config.model_dump(mode="json")}, sort_keys=False)
    )
    if (hf / TOKENIZER_FILE).is_file():
        shutil.copyfile(hf / TOKENIZER_FILE, out / TOKENIZER_FILE)
    CheckpointManager(out / "checkpoints", CheckpointConfig()).save(
        0,
        {MODEL + name: tensor for name, tensor in tensors.items()},
        {"train": TrainState().to_json()},
    )
    print(f"{out}: {config.num_params():,} parameters; train from it with train.init_from={out}")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="direction", required=True)
    export = commands.add_parser("to-hf", help="write a folder in Hugging Face format")
    add = export.add_argument
    add("--checkpoint", required=True, type=Path, help="a run folder or a step folder")
    add("--out", required=True, type=Path, help="folder to write")
    add("--tokenizer", help="'byte' or a tokenizer.json (default: that of the run)")
    add("--model-type", help="architecture of transformers (default: the first that fits)")
    add("--license", default="unknown", help="identifier of the Hub, e.g. apache-2.0")
    add("--overwrite", action="store_true", help="replace an earlier export")
    released = commands.add_parser("from-hf", help="import a folder in Hugging Face format")
    released.add_argument("--hf", required=True, type=Path, help="the folder")
    released.add_argument("--out", required=True, type=Path, help="run folder to write")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
