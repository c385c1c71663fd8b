"""What megarec_kernels.check runs: a few small uses of every op."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megarec_kernels.affine_scan import affine_scan
from megarec_kernels.attention import attention
from megarec_kernels.causal_conv1d import causal_conv1d
from megarec_kernels.gated_linear_attention import gated_linear_attention
from megarec_kernels.grouped_norm import grouped_norm
from megarec_kernels.linear_cross_entropy import VocabularyPart, linear_cross_entropy
from megarec_kernels.linear_distillation import linear_distillation
from megarec_kernels.newton_rnn import Cell, ParaGRUCell, ParaLSTMCell, Solver, newton_rnn
from megarec_kernels.rotary import rotary
from megarec_kernels.swiglu import swiglu

Tensors = dict[str, Tensor]
Draw = Callable[..., Tensor]
"""Called with sizes: a normal tensor of that shape, float64."""

B, T = 2, 130
"""Rows and tokens of the cases: two chunks of 64, and a bit."""


@dataclass(frozen=True)
class Case:
    """A small use of an op.

    Attributes:
        op: its name; its package lists its forms in `FORMS`.
        run: (backend, **inputs) -> outputs by name.
        inputs: of numbers drawn in float64; those of a float dtype are rounded, and are
            differentiated.
        bounds: dtypes that are checked, and the largest error in each.
        variant: what is special about it.
    """

    op: str
    run: Callable[..., Tensors]
    inputs: Callable[[Draw], Tensors]
    bounds: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.bfloat16: 2**-6}
    )
    variant: str = ""

    @property
    def name(self) -> str:
        """The op, and its variant in brackets."""
        return f"{self.op} ({self.variant})" if self.variant else self.op


def _gated_linear_attention(backend: str, **inputs: Any) -> Tensors:
    state: Tensors = {key: inputs.pop(key) for key in ("C", "n", "m") if key in inputs}
    y, after, log_decay = gated_linear_attention(
        **inputs,
        state=state or None,
        gate="exp" if state else "plain",
        normalize=bool(state),
        backend=backend,
    )
    # No gradient flows through m, which is the unit of C and n.
    after = {key: x.detach() if key == "m" else x for key, x in after.items()}
    return {"y": y, "log_decay": log_decay} | {f"final {key}": x for key, x in after.items()}


def _gates(draw: Draw, heads: int) -> Tensors:
    return {
        "log_f": F.logsigmoid(draw(B, T, heads) + 2),
        "log_i": draw(B, T, heads),
        "resets": _resets(),
    }


def _mlstm_inputs(draw: Draw) -> Tensors:
    tokens = {"q": draw(B, T, 2, 16), "k": draw(B, T, 2, 16), "v": draw(B, T, 2, 32)}
    state = {"C": draw(B, 2, 16, 32), "n": draw(B, 2, 16), "m": draw(B, 2)}
    return tokens | _gates(draw, heads=2) | state


def _mamba2_inputs(draw: Draw) -> Tensors:
    tokens = {"q": draw(B, T, 2, 16), "k": draw(B, T, 2, 16), "v": draw(B, T, 4, 32)}
    return tokens | _gates(draw, heads=4)


def _causal_conv1d(backend: str, **inputs: Tensor) -> Tensors:
    y, tail = causal_conv1d(**inputs, activation="silu", backend=backend)
    return {"y": y, "tail after": tail}


def _rotary(backend: str, x: Tensor, position: Tensor, *, interleaved: bool) -> Tensors:
    # Angles of float64 for every dtype: they are no part of the op.
    angle = position.cpu().double()[..., None, None] * 10 ** -torch.arange(6, dtype=torch.float64)
    rotation = torch.stack([angle.cos(), angle.sin()])
    rotation = rotation.to(torch.promote_types(x.dtype, torch.float32)).to(x.device)
    return {"y": rotary(x, rotation, interleaved=interleaved, backend=backend)}


def _rotary_case(variant: str, interleaved: bool) -> Case:
    def inputs(draw: Draw) -> Tensors:
        # The rows start at different positions; 4 dimensions of 16 stay.
        return {"x": draw(B, T, 3, 16), "position": torch.arange(B * T).view(B, T)}

    return Case(
        "rotary", functools.partial(_rotary, interleaved=interleaved), inputs, variant=variant
    )


def _newton_rnn(cell: Cell, backend: str, u: Tensor, state: Tensor, **inputs: Tensor) -> Tensors:
    params = {key: inputs[key] for key in cell.recurrent}
    # Iterations enough for the bounds: what is left is rounding.
    solver = Solver(iterations=12, tolerance=1e-5)
    h, last, _ = newton_rnn(
        cell, u, params, state=state, resets=inputs["resets"], solver=solver, backend=backend
    )
    return {"h": h, "last": last}


def _newton_inputs(cell: Cell, draw: Draw) -> Tensors:
    params = {name: 0.5 * draw(rows, 24).tanh() for name, rows in cell.recurrent.items()}
    state = draw(B, cell.num_slots, 24).tanh()
    return {"u": draw(B, T, cell.num_inputs, 24), "state": state, "resets": _resets()} | params


def _newton_case(variant: str, cell: Cell) -> Case:
    return Case(
        "newton_rnn",
        functools.partial(_newton_rnn, cell),
        functools.partial(_newton_inputs, cell),
        variant=variant,
    )


def _cross_entropy(vocabulary: VocabularyPart | None, backend: str, **inputs: Any) -> Tensors:
    options: dict[str, Any] = {"soft_cap": 5.0, "z_loss": 1e-2, "chunk_size": 64}
    loss = linear_cross_entropy(**inputs, **options, vocabulary=vocabulary, backend=backend)
    return {"loss": loss}


def _cross_entropy_case(variant: str, vocabulary: VocabularyPart | None, vocab_size: int) -> Case:
    return Case(
        "linear_cross_entropy",
        functools.partial(_cross_entropy, vocabulary),
        lambda draw: {
            "x": draw(B, T, 32),
            "weight": 0.3 * draw(99, 32),
            "labels": _labels(vocab_size),
        },
        variant=variant,
    )


def _distillation(backend: str, **inputs: Any) -> Tensors:
    teacher = {key: inputs.pop(key).detach() for key in ("teacher_x", "teacher_weight")}
    losses = linear_distillation(
        **inputs,
        **teacher,
        temperature=1.7,
        ce_weight=0.4,
        soft_cap=5.0,
        chunk_size=64,
        backend=backend,
    )
    return losses._asdict()


def _resets() -> Tensor:
    """Return resets (B, T): documents of all kinds in the first row, one in the others."""
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, [0, 1, 63, 64, 100]] = True
    return resets


def _labels(vocab_size: int) -> Tensor:
    labels = torch.arange(B * T) * 7 % vocab_size
    labels[::5] = -100
    return labels.view(B, T)


def _linear_attention_case(variant: str, inputs: Callable[[Draw], Tensors]) -> Case:
    # Where a normaliser is near 0 it magnifies the rounding of what it divides.
    bounds = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
    return Case("gated_linear_attention", _gated_linear_attention, inputs, bounds, variant)


CASES = (
    _linear_attention_case("mLSTM", _mlstm_inputs),
    _linear_attention_case("Mamba-2", _mamba2_inputs),
    Case(
        "causal_conv1d",
        _causal_conv1d,
        lambda draw: {
            "x": draw(B, T, 48),
            "weight": draw(48, 4),
            "bias": draw(48),
            "tail": draw(B, 3, 48),
            "resets": _resets(),
        },
    ),
    Case(
        "grouped_norm",
        lambda backend, **inputs: {
            "y": grouped_norm(**inputs, eps=1e-6, group_dim=24, backend=backend)
        },
        lambda draw: {"x": draw(B, T, 48), "weight": draw(48), "gate": draw(B, T, 48)},
        variant="gated RMSNorm",
    ),
    Case(
        "grouped_norm",
        lambda backend, **inputs: {
            "y": grouped_norm(**inputs, eps=1e-6, group_dim=24, center=True, backend=backend)
        },
        lambda draw: {"x": draw(B, T, 48), "weight": draw(48), "output_gate": draw(B, T, 48)},
        variant="LayerNorm, then a gate",
    ),
    Case(
        "swiglu",
        lambda backend, **inputs: {"y": swiglu(**inputs, backend=backend)},
        lambda draw: {"gate": draw(B, T, 48), "up": draw(B, T, 48)},
    ),
    _rotary_case("halves", interleaved=False),
    _rotary_case("neighbours", interleaved=True),
    Case(
        "attention",
        lambda backend, **inputs: {"y": attention(**inputs, window=60, backend=backend)},
        lambda draw: {
            "q": draw(B, T, 4, 16),
            "k": draw(B, T, 2, 16),
            "v": draw(B, T, 2, 32),
            "resets": _resets(),
        },
    ),
    Case(
        "affine_scan",
        lambda backend, **inputs: {"h": affine_scan(**inputs, backend=backend)},
        lambda draw: {
            "A": 0.9 * draw(B, T, 3, 24).tanh(),
            "b": draw(B, T, 3, 24),
            "state": draw(B, 3, 24),
            "resets": _resets(),
        },
        variant="diagonal",
    ),
    Case(
        "affine_scan",
        lambda backend, **inputs: {"h": affine_scan(**inputs, reverse=True, backend=backend)},
        lambda draw: {
            "A": 0.5 * draw(B, T, 2, 2, 24).tanh(),
            "b": draw(B, T, 2, 24),
            "state": draw(B, 2, 24),
            "resets": _resets(),
        },
        variant="2x2, reverse",
    ),
    _newton_case("ParaGRU", ParaGRUCell()),
    _newton_case("ParaLSTM", ParaLSTMCell()),
    _cross_entropy_case("", None, 99),
    # One rank, which meets no other: some labels are not in its part.
    _cross_entropy_case("vocabulary part", VocabularyPart(50, lambda x: x, lambda x: x), 200),
    Case(
        "linear_distillation",
        _distillation,
        lambda draw: {
            "x": draw(B, T, 32),
            "weight": 0.3 * draw(99, 32),
            "teacher_x": draw(B, T, 16),
            "teacher_weight": 0.3 * draw(99, 16),
            "labels": _labels(99),
        },
    ),
)
