"""Train a model: torchrun pretrain/train.py --config NAME [key=value ...]."""

import argparse
import os
import sys
from pathlib import Path

try:
    from megarec.config.loader import load_config
except ModuleNotFoundError as error:
    if error.name != "megarec":
        raise
    sys.exit("megarec is not installed: run `pip install -e .` in the repository first")

from megarec.cli import print_error
from megarec.errors import EXIT_USER_ERROR, RunError, UserError
from megarec.parallel.describe import describe
from megarec.train.session import Options, run
from megarec.train.watchdog import exit_with_parent


def main() -> int:
    """Parse the command line, train, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", required=True, help="a YAML file, or the name of one in configs/"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--resume", type=Path, help="a step folder (default: the run's newest)")
    parser.add_argument(
        "--force", action="store_true", help="resume although the config or the data changed"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the run would need, and stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=3e-4")
    args = parser.parse_args()

    is_main = int(os.environ.get("RANK", 0)) == 0
    code = train(args, is_main)
    # torchrun returns 1 whatever its workers return; launch/torchrun.sh reads the code from here.
    if is_main and "MEGAREC_EXIT_CODE_FILE" in os.environ:
        Path(os.environ["MEGAREC_EXIT_CODE_FILE"]).write_text(str(code))
    return code


def train(args: argparse.Namespace, is_main: bool) -> int:
    """Run what was asked for; bad input is one line each on rank 0."""
    try:
        config = load_config(args.config, args.overrides)
        if not args.dry_run:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                exit_with_parent()
            return run(config, Options(args.runs, args.resume, args.force))
        if is_main:
            print(describe(config, int(os.environ.get("WORLD_SIZE", 1))))
        return 0
    except (UserError, RunError, ArithmeticError) as error:
        if os.environ.get("MEGAREC_DEBUG") == "1":
            raise
        # Bad input is the same on all ranks; a layer may fail on one alone.
        if is_main or isinstance(error, ArithmeticError):
            print_error(error)
        return EXIT_USER_ERROR if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
