"""gated_linear_attention: an argument that does not fit is named, with what was expected."""

import pytest
import torch
from gla_cases import make_inputs
from megarec_kernels.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_step,
    initial_state,
)

STATE = initial_state(2, 2, 3, 4, gate="exp", normalize=False)

BAD = {
    "v dims": (
        {"v": torch.zeros(2, 13, 4)},
        r"v: got shape \(2, 13, 4\), expected \(B, T, H, Dv\)",
    ),
    "q tokens": (
        {"q": torch.zeros(2, 12, 2, 3)},
        r"q: got shape \(2, 12, 2, 3\), expected \(2, 13",
    ),
    "k shape": ({"k": torch.zeros(2, 13, 2, 5)}, r"k: got shape .* the shape of q"),
    "heads": (
        {"q": torch.zeros(2, 13, 4, 3), "k": torch.zeros(2, 13, 4, 3)},
        r"q: got 4 heads, expected a number that divides the 2 heads of v",
    ),
    "log_f shape": ({"log_f": torch.zeros(2, 13, 1)}, r"log_f: got shape .*expected \(2, 13, 2\)"),
    "log_i dtype": ({"log_i": torch.zeros(2, 13, 2).long()}, r"log_i: got torch.int64"),
    "k dtype": ({"k": torch.zeros(2, 13, 2, 3).bfloat16()}, r"k: got torch.bfloat16.*dtype of v"),
    "resets dtype": ({"resets": torch.zeros(2, 13)}, r"resets: got torch.float32.*torch.bool"),
    "resets shape": ({"resets": torch.zeros(2, 12).bool()}, r"resets: got .*\(2, 12\)"),
    "chunk size": ({"chunk_size": 0}, r"chunk_size: got 0, expected at least 1"),
    "gate": ({"gate": "sigmoid"}, r"gate: got 'sigmoid', expected 'exp' or 'plain'"),
    "state key": (
        {"state": {"C": STATE["C"]}},
        r"state: got keys \['C'\], expected \['C', 'm'\] for gate='exp', normalize=False",
    ),
    "state shape": (
        {"state": STATE | {"m": torch.zeros(2)}},
        r"state\['m'\]: got shape \(2,\), expected \(2, 2\)",
    ),
    "backend": ({"backend": "cuda"}, r"backend: got 'cuda', expected one of 'auto'"),
    "gpu and float64": (
        {"backend": "gpu", "v": torch.zeros(2, 13, 2, 4).double()}
        | {name: torch.zeros(2, 13, 2, 3).double() for name in ("q", "k")},
        r"backend='gpu': the kernels compute in float32 and refuse float64; use 'eager'",
    ),
    "gpu and wide heads": (
        {"backend": "gpu", "v": torch.zeros(2, 13, 2, 513)},
        r"backend='gpu': the kernels take head dims up to 512, got 513; use 'eager'",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument(change, message):
    with pytest.raises(ValueError, match=f"^gated_linear_attention: {message}"):
        gated_linear_attention(**(make_inputs(dtype=torch.float32) | change))


def test_bad_step_argument():
    inputs = {key: x[:, 0] for key, x in make_inputs().items()}
    with pytest.raises(
        ValueError, match=r"state: got keys \['C', 'm'\], expected \['C', 'm', 'n'\]"
    ):
        gated_linear_attention_step(**inputs, state=STATE, normalize=True)
