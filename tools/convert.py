"""Convert checkpoints to Hugging Face format (to-hf), and released weights to one (from-hf).

hybridize replaces attention layers of a transformer by Mamba-2 layers that start from them, to be
distilled from it. It and from-hf write a run folder without a run: model.yaml (the model section,
to paste into a recipe), tokenizer.json if there is one, and checkpoints/step_00000000 with the
weights alone. Evaluate, sample or export it like any run; train from it with
train.init_from=RUN_FOLDER.
"""

import argparse
import shutil
from pathlib import Path

import yaml
from torch import Tensor

from megarec.checkpoint.dcp import MODEL
from megarec.checkpoint.manager import CheckpointManager
from megarec.checkpoint.resolve import resolve_checkpoint
from megarec.cli import run
from megarec.config.model import ModelConfig
from megarec.config.schema import CheckpointConfig
from megarec.conversion import export_hf, import_hf
from megarec.conversion.hybridize import hybridize, parse_layout
from megarec.conversion.load import (
    MODEL_FILE,
    TOKENIZER_FILE,
    find_tokenizer,
    load_model,
    read_weights,
)
from megarec.conversion.model_card import read_training_record
from megarec.errors import UserError
from megarec.train.state import TrainState


def main() -> None:
    """Do what the command line asks for."""
    args = parse_args()
    args.convert(args)


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


def from_hf(args: argparse.Namespace) -> None:
    """Import released weights as step 0 of a run folder."""
    write_weights(args.out, *import_hf(args.hf), args.hf)


def hybridize_transformer(args: argparse.Namespace) -> None:
    """Write the hybrid as step 0 of a run folder."""
    config, tensors = read_weights(args.hf)
    layers = parse_layout(args.layout, config.num_layers)
    hybrid = hybridize(
        config,
        tensors,
        layers,
        seed=args.seed,
        from_attention=args.init == "mil",
        previous=None if args.previous is None else read_weights(args.previous),
    )
    write_weights(args.out, *hybrid, args.hf)


def write_weights(out: Path, config: ModelConfig, tensors: dict[str, Tensor], source: Path) -> None:
    """Write a run folder with weights alone, and the tokenizer that lies beside their source."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / MODEL_FILE).write_text(
        yaml.safe_dump({"model": config.model_dump(mode="json")}, sort_keys=False)
    )
    if (source / TOKENIZER_FILE).is_file():
        shutil.copyfile(source / TOKENIZER_FILE, out / TOKENIZER_FILE)
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
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("to-hf", help="write a folder in Hugging Face format")
    add = export.add_argument
    add("--checkpoint", required=True, type=Path, help="a run folder or a step folder")
    add("--out", required=True, type=Path, help="folder to write")
    add("--tokenizer", help="'byte' or a tokenizer.json (default: that of the run)")
    add("--model-type", help="architecture of transformers (default: the first that fits)")
    add("--license", default="unknown", help="identifier of the Hub, e.g. apache-2.0")
    add("--overwrite", action="store_true", help="replace an earlier export")
    export.set_defaults(convert=to_hf)
    released = commands.add_parser("from-hf", help="import a folder in Hugging Face format")
    hybrid = commands.add_parser("hybridize", help="replace attention layers by Mamba-2 layers")
    for command, source in (
        (released, "the folder"),
        (hybrid, "the transformer: a folder in Hugging Face format, or a run"),
    ):
        command.add_argument("--hf", required=True, type=Path, help=source)
        command.add_argument("--out", required=True, type=Path, help="run folder to write")
    released.set_defaults(convert=from_hf)
    add = hybrid.add_argument
    add(
        "--layout",
        required=True,
        help="a letter a layer, M to replace it and * to keep it (M*M*); or the numbers of the "
        "layers to replace (0,2); or none",
    )
    add(
        "--init",
        choices=("mil", "random"),
        default="mil",
        help="start the new mixers from the attention they replace (default), or at random",
    )
    add(
        "--previous",
        type=Path,
        help="an earlier hybrid with fewer layers replaced, whose training is taken over",
    )
    add("--seed", type=int, default=0, help="of what attention has no counterpart of")
    hybrid.set_defaults(convert=hybridize_transformer)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
