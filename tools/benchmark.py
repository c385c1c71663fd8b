"""Measure megarec: ops and models on a CPU, kernels on a GPU, a recipe's training speed.

    python tools/benchmark.py --suite cpu                       # one thread, some 6 minutes
    python tools/benchmark.py --suite gpu --out gpu.json        # meant to take under 8 minutes
    python tools/benchmark.py --suite train --config xlstm_7b.yaml model.num_layers=4

Each form is checked against a slow one in float64 before it is timed, and timed in turns with ours
(tools/benchmarks/protocol.py). The exit code is 1 where one of ours is wrong or fails.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks import report
from benchmarks.protocol import MAX_LOAD, Clock, load_average
from benchmarks.report import Result, Row
from megarec_kernels.check import first_line
from megarec_kernels.dispatch import ENVIRONMENT_VARIABLE

from megarec.errors import EXIT_USER_ERROR, UserError

Parts = Mapping[str, Callable[[], Iterator[Result]]]


def main() -> int:
    """Parse the command line, measure, print tables, write JSON; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=("cpu", "gpu", "train"), required=True)
    add("--parts", nargs="+", help="of the suite: these alone")
    add("--smoke", action="store_true", help="the same code at tiny sizes, on the CPU")
    add("--config", default="quickstart.yaml", help="of the train suite: a recipe")
    add("--steps", type=int, default=10, help="of the train suite: how many are measured")
    add("overrides", nargs="*", metavar="key=value", help="of the recipe")
    add("--out", type=Path, help="JSON file to write")
    add("--force", action="store_true", help="replace it")
    args = parser.parse_args()
    if args.out is not None and args.out.exists() and not args.force:
        raise UserError(f"--out {args.out}: exists; give another name, or --force to replace it")
    if args.overrides and args.suite != "train":
        raise UserError(f"{args.overrides[0]}: only --suite train takes key=value")
    if forced := os.environ.get(ENVIRONMENT_VARIABLE):
        raise UserError(f"{ENVIRONMENT_VARIABLE}={forced} makes all forms that one; unset it")

    device = _device(args)
    if args.suite == "cpu":
        torch.set_num_threads(1)
    parts = _parts(args, Clock(device))
    unknown = sorted(set(args.parts or ()) - parts.keys())
    if unknown:
        raise UserError(f"--parts {unknown[0]}: expected some of {', '.join(parts)}")
    facts = report.machine(device)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    print(f"load: {load_average():.1f}", flush=True)

    results: list[Result] = []
    for name, part in parts.items():
        if args.parts is None or name in args.parts:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            results += _measured(name, part)
    on_cpu = device.type == "cpu"
    print(f"\n{report.markdown(results, on_cpu=on_cpu)}")
    if any(report.verdict(result, on_cpu=on_cpu) == "void" for result in results):
        print(f"\nvoid: measured at a load above {MAX_LOAD}; run it again on a quiet machine")
    if args.out is not None:
        text = json.dumps(report.as_json(args.suite, results, facts, on_cpu=on_cpu), indent=2)
        args.out.write_text(text + "\n")
    return 1 if any(isinstance(r, Row) and r.our_fault for r in results) else 0


def _device(args: argparse.Namespace) -> torch.device:
    found = torch.accelerator.current_accelerator()
    if args.smoke or args.suite == "cpu":
        return torch.device("cpu")
    if found is None and args.suite == "gpu":
        raise UserError("--suite gpu: no GPU here; --smoke tries the same code on the CPU")
    return found or torch.device("cpu")


def _parts(args: argparse.Namespace, clock: Clock) -> Parts:
    """Return what the suite measures; modules are imported here, since a suite needs its own."""
    if args.suite == "train":
        from benchmarks.running import train

        return {"train": lambda: train(args.config, args.overrides, args.steps)}
    suite: Any
    if args.suite == "cpu":
        from benchmarks import cpu as suite
    else:
        from benchmarks import gpu as suite
    sizes = suite.SMOKE if args.smoke else suite.Sizes()
    return {
        name: lambda measure=measure: measure(sizes, clock) for name, measure in suite.PARTS.items()
    }


def _measured(name: str, part: Callable[[], Iterator[Result]]) -> list[Result]:
    """Return a part's results, and its failure as one of them: the other parts go on."""
    results: list[Result] = []
    try:
        for result in part():
            results.append(result)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        # A machine that measures kernels alone need not have what models need.
        results.append(Row(name, "all", "", "", "not installed", first_line(error)))
    except Exception as error:
        results.append(Row(name, "all", "", "", "failed", first_line(error), our_fault=True))
    return results


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        # As megarec.cli.run, whose imports a machine that measures kernels alone may lack.
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
