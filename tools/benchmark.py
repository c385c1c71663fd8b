"""Measure training steps against transformers: the same weights, batch and optimizer on both sides.

For each recipe the model is exported, loaded in transformers (its plain torch path on a CPU), and
checked to give the same logits; then both sides take turns (A B B A) at whole training steps:
forward, backward, AdamW. What counts is the ratio of the medians.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor

from megarec.cli import check_new_file, run
from megarec.config.loader import load_config
from megarec.conversion import export_hf
from megarec.models import Backbone, build_model

RECIPES = ("quickstart.yaml", "quickstart_mamba2.yaml", "quickstart_hybrid.yaml")
GATE = 1e-4
"""Largest difference of logits (float32) at which two models count as the same."""


@dataclass(frozen=True)
class Result:
    """Training steps of one recipe, ours and theirs; seconds are medians."""

    recipe: str
    architecture: str
    parameters: int
    tokens: int
    largest_logit_difference: float
    our_seconds: float
    their_seconds: float
    ratio: float
    ratio_range: tuple[float, float]


def main() -> None:
    """Parse the command line, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=("train",), default="train")
    add("--config", nargs="*", default=RECIPES, help="recipes whose models are measured")
    add("--rounds", type=int, default=5, help="of A B B A")
    add("--threads", type=int, default=1)
    add("--out", type=Path, help="JSON file to write")
    add("--force", action="store_true", help="replace it")
    args = parser.parse_args()
    if args.out is not None:
        check_new_file(args.out, force=args.force)
    torch.set_num_threads(args.threads)

    results = [measure(recipe, args.rounds) for recipe in args.config]
    load = os.getloadavg()[0]
    machine = {
        "machine": platform.machine(),
        "threads": args.threads,
        "load": load,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(f"{', '.join(f'{key} {value}' for key, value in machine.items())}")
    print("| recipe | parameters | tokens | transformers, ms | megarec, ms | ratio | range |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r.recipe} ({r.architecture}) | {r.parameters:,} | {r.tokens:,} "
            f"| {1e3 * r.their_seconds:.0f} | {1e3 * r.our_seconds:.0f} | {r.ratio:.2f} "
            f"| {r.ratio_range[0]:.2f} to {r.ratio_range[1]:.2f} |"
        )
    if args.out is not None:
        report = {"machine": machine, "results": [asdict(result) for result in results]}
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(recipe: str, rounds: int) -> Result:
    """Compare one recipe's model with transformers' on one micro-batch of the recipe."""
    config = load_config(recipe)
    model = build_model(config.model).train()
    with tempfile.TemporaryDirectory() as folder:
        export_hf(model, Path(folder) / "export")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "export").train()
    shape = (config.train.micro_batch_size, config.train.seq_len + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model(ids) - theirs(ids).logits).abs().max().item()
    if not difference < GATE:
        raise RuntimeError(f"{recipe}: logits differ by {difference:.2g}, more than {GATE}")

    ours = trainer(model, lambda: our_loss(model, ids))
    other = trainer(theirs, lambda: their_loss(theirs, ids))
    for step in (ours, other):
        step()
    our_times, their_times, ratios = [], [], []
    for _ in range(rounds):
        first, second = timed(ours), timed(other)
        third, fourth = timed(other), timed(ours)
        our_times += [first, fourth]
        their_times += [second, third]
        ratios.append((second + third) / (first + fourth))
    return Result(
        recipe=recipe,
        architecture=type(theirs).__name__,
        parameters=config.model.num_params(),
        tokens=shape[0] * (shape[1] - 1),
        largest_logit_difference=difference,
        our_seconds=statistics.median(our_times),
        their_seconds=statistics.median(their_times),
        ratio=statistics.median(ratios),
        ratio_range=(min(ratios), max(ratios)),
    )


def our_loss(model: Backbone, ids: Tensor) -> Tensor:
    """Return the mean loss."""
    loss_sum, num_tokens = model(ids[:, :-1], ids[:, 1:].contiguous())
    return loss_sum / num_tokens


def their_loss(model: Any, ids: Tensor) -> Tensor:
    """Return the mean loss; the class shifts the labels itself."""
    return model(ids, labels=ids, use_cache=False).loss


def trainer(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a function that makes one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None]) -> float:
    """Return the seconds that one step takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


if __name__ == "__main__":
    run(main)
