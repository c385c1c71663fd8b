"""How much a model needs each mixer: the loss without it (leave one out)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megarec.data.loader import EvalLoader
from megarec.evaluation.loss import evaluate_loss
from megarec.models.backbone import Backbone


@dataclass(frozen=True)
class LayerImportance:
    """A layer's mixer, and the mean loss (nats a token) of the model without it.

    Attributes:
        layer: its number, from 0.
        mixer: its type.
        loss: of the model whose layer adds nothing in the mixer's place; its FFN stays.
        increase: of the loss over that of the whole model.
    """

    layer: int
    mixer: str
    loss: float
    increase: float


def leave_one_out(
    model: Backbone, loader: EvalLoader, device: torch.device
) -> tuple[float, list[LayerImportance]]:
    """Return the loss of the whole model, and the importance of each mixer, least first.

    The criterion by which Apriel-H1 (arXiv 2511.02651) chose its first layers to replace, with
    the loss as the metric.

    Args:
        model: evaluated in eval mode.
        loader: gives the same batches each time it is iterated; sources weigh by their tokens.
        device: of the model.
    """
    whole = _mean_loss(model, loader, device)
    importance: list[LayerImportance] = []
    for name, block in model.layers():
        if block.mixer is None:
            continue
        with _silenced(block.mixer):
            loss = _mean_loss(model, loader, device)
        kind = model.config.mixers[len(importance)].type
        importance.append(LayerImportance(int(name), kind, loss, loss - whole))
    return whole, sorted(importance, key=lambda layer: layer.increase)


def plot_importance(importance: list[LayerImportance], path: Path) -> None:
    """Draw the increase of the loss by layer, a colour a type of mixer, to a PNG file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(max(6.0, 0.25 * len(importance)), 4.0), layout="constrained")
    axes = figure.subplots()
    for kind in sorted({layer.mixer for layer in importance}):
        of_kind = [layer for layer in importance if layer.mixer == kind]
        axes.bar([x.layer for x in of_kind], [x.increase for x in of_kind], label=kind)
    axes.set_xlabel("layer whose mixer is left out")
    axes.set_ylabel("increase of the loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend()
    figure.savefig(path, dpi=120)


def _mean_loss(model: Backbone, loader: EvalLoader, device: torch.device) -> float:
    results = evaluate_loss(model, loader, device).values()
    return sum(r.loss * r.num_tokens for r in results) / sum(r.num_tokens for r in results)


@contextmanager
def _silenced(mixer: nn.Module) -> Iterator[None]:
    def silence(module: nn.Module, inputs: Any, result: Any) -> Any:
        y_BTD, state = result
        return torch.zeros_like(y_BTD), state

    handle = mixer.register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()
