"""What a check of the contract takes, a small model, and how it compares results."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from megarec_kernels.dispatch import ENVIRONMENT_VARIABLE
from torch import Tensor

from megarec.config.model import ModelConfig
from megarec.models.backbone import Backbone, build_model
from megarec.models.context import Context
from megarec.models.init import seed_from
from megarec.models.state import State

DOCUMENTS = ((8, 12), (3, 1, 16))
"""Lengths of the documents in each row of a packed batch."""

FLOAT32 = 1e-5
"""By how much float32 results may differ that are the same but for rounding."""

NUM_ROWS, NUM_TOKENS = len(DOCUMENTS), sum(DOCUMENTS[0])


def small_model(mixer: Mapping[str, Any], d_model: int = 32) -> ModelConfig:
    """Return a model of two layers, each the mixer and an FFN.

    `mixer` is the mapping that would stand in YAML, with its `type`.
    """
    return ModelConfig.model_validate(
        {
            "vocab_size": 61,
            "d_model": d_model,
            "num_layers": 2,
            "blocks": {"block": {"mixer": dict(mixer), "ffn": {"d_ff": 48}}},
            "pattern": ["block"],
        }
    )


def random_model(config: ModelConfig, seed: int = 0) -> Backbone:
    """Build a model whose every parameter is random, so that no gate or branch is shut."""
    model = build_model(config, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(seed_from(seed, name))
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A small model that the contract is checked on.

    Attributes:
        config: the model; the smaller the faster, with documents of 20 tokens in mind.
        tolerance: by how much results may differ beside rounding, relative to the largest one. 0
            unless a mixer solves adaptively: then 10 times the tolerance of its solver.
    """

    config: ModelConfig
    tolerance: float = 0.0

    def model(self, seed: int = 0) -> Backbone:
        """Build the model in float32, with every parameter random."""
        return random_model(self.config, seed)

    def narrow_model(self) -> Backbone:
        """Build it in bfloat16, but for what stays in float32."""
        model = self.model().bfloat16()
        for _, block in model.layers():
            for module in block.float32_modules():
                module.float()
        return model

    def ids(self, num_rows: int = NUM_ROWS, num_tokens: int = NUM_TOKENS, seed: int = 0) -> Tensor:
        """Draw tokens, int64 (B, T)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.config.vocab_size, (num_rows, num_tokens), generator=generator)

    def other_ids(self, ids: Tensor, changed: Tensor) -> Tensor:
        """Return ids with another token wherever `changed`, a bool tensor, is True."""
        return torch.where(changed, (ids + 1) % self.config.vocab_size, ids)

    def packed(self) -> Context:
        """Return the context of DOCUMENTS, with resets that are exact.

        They are anyway, unless a mixer has an option `document_reset` and it is `soft`: such a
        mixer owes exact ones only where the context demands it.
        """
        resets = [getattr(mixer, "document_reset", "exact") for mixer in self.config.mixers]
        return Context(Context.from_doc_ids(doc_ids()).resets, exact="soft" in resets)

    def close(self, what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        """Require what `close` does, with the case's own tolerance if it is larger."""
        close(what, found, expected, max(tolerance, self.tolerance))

    def same(self, what: str, found: Tensor, expected: Tensor) -> None:
        """Require the same bits of float32 results, though not of a solver that is adaptive.

        How often it iterates depends on all tokens: its results need only be close.
        """
        close(what, found, expected, max(FLOAT32, self.tolerance) if self.tolerance > 0 else 0)

    def close_states(self, what: str, found: State, expected: State, tolerance: float) -> None:
        """Require that two states have the same keys, and are close in each."""
        keys = f"{what}: state has keys {sorted(found)}, expected {sorted(expected)}"
        require(found.keys() == expected.keys(), keys)
        for key, value in expected.items():
            self.close(f"{what}: state {key}", found[key], value, tolerance)


def close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Require that the largest error is at most `tolerance` times the largest value.

    0 asks for the same bits. `what` begins the message.
    """
    found, expected = found.detach(), expected.detach()
    for name in ("shape", "dtype"):
        got, wanted = getattr(found, name), getattr(expected, name)
        require(got == wanted, f"{what}: {name} {got}, expected {wanted}")
    if tolerance == 0:
        number = int((found != expected).sum())
        message = f"{what}: {number} of {found.numel()} values differ; expected the same bits"
        require(torch.equal(found, expected), message)
    elif found.numel() > 0:
        error = float((found.double() - expected.double()).abs().max())
        scale = float(expected.double().abs().max())
        message = f"{what}: off by {error:.1e}, the largest value being {scale:.1e}"
        # Not the other way round: a NaN must fail.
        require(error <= tolerance * scale, f"{message}; expected {tolerance:.0e} of it")


def doc_ids() -> Tensor:
    """Return the document of each token of DOCUMENTS, int64 (B, T)."""
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS]
    return torch.stack(rows)


def documents() -> Iterator[tuple[int, slice]]:
    """Yield the row and the positions of each document of DOCUMENTS."""
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for length in lengths:
            yield row, slice(start, start + length)
            start += length


def run_steps(model: Backbone, ids: Tensor, state: State) -> tuple[Tensor, State]:
    """Decode given tokens (B, T) one by one; returns logits (B, T, V) and the last state."""
    logits = []
    for ids_B in ids.unbind(1):
        logits_BV, state = model.step(ids_B, state)
        logits.append(logits_BV)
    return torch.stack(logits, 1), state


@contextmanager
def kernels(backend: str) -> Iterator[None]:
    """Force a backend of all ops in this block."""
    with patch.dict(os.environ, {ENVIRONMENT_VARIABLE: backend}):
        yield


def require(holds: object, message: str) -> None:
    """Raise AssertionError with a message unless something holds."""
    if not holds:
        raise AssertionError(message)
