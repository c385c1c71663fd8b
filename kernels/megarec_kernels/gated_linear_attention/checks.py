"""Argument checks of gated_linear_attention, shared by every form."""

import torch
from torch import Tensor

GATES = ("exp", "plain")


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    log_i: Tensor | None,
    resets: Tensor | None,
    state: dict[str, Tensor] | None,
    gate: str,
    normalize: bool,
    chunk_size: int,
) -> None:
    """Raise ValueError, naming the argument, unless a whole sequence's arguments fit together."""
    check_tokens(q, k, v, log_f, log_i, state, gate, normalize, dims="(B, T, H, Dv)")
    if v.shape[1] == 0:
        _fail("v", "0 tokens", "at least one")
    if resets is not None and (resets.shape != v.shape[:2] or resets.dtype != torch.bool):
        _fail("resets", f"{resets.dtype} {tuple(resets.shape)}", f"torch.bool {tuple(v.shape[:2])}")
    if chunk_size < 1:
        _fail("chunk_size", str(chunk_size), "at least 1")


def check_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    log_i: Tensor | None,
    state: dict[str, Tensor] | None,
    gate: str,
    normalize: bool,
    dims: str = "(B, H, Dv)",
) -> None:
    """Raise ValueError unless the tensors fit together; ``dims`` says what v looks like."""
    if v.dim() != len(dims.split()):
        _fail("v", f"shape {tuple(v.shape)}", dims)
    if q.dim() != v.dim() or q.shape[:-2] != v.shape[:-2]:
        _fail("q", f"shape {tuple(q.shape)}", f"({', '.join(map(str, v.shape[:-2]))}, G, Dk)")
    H, Dv = v.shape[-2:]
    G, Dk = q.shape[-2:]
    if k.shape != q.shape:
        _fail("k", f"shape {tuple(k.shape)}", f"the shape of q, {tuple(q.shape)}")
    if H % G:
        _fail("q", f"{G} heads", f"a number that divides the {H} heads of v")
    if not v.is_floating_point():
        _fail("v", str(v.dtype), "a float dtype")
    for name, x in (("q", q), ("k", k)):
        if x.dtype != v.dtype:
            _fail(name, str(x.dtype), f"the dtype of v, {v.dtype}")
    for name, gate_tensor in (("log_f", log_f), ("log_i", log_i)):
        if gate_tensor is None:
            continue
        if gate_tensor.shape != v.shape[:-1]:
            _fail(name, f"shape {tuple(gate_tensor.shape)}", f"{tuple(v.shape[:-1])}")
        if not gate_tensor.is_floating_point():
            _fail(name, str(gate_tensor.dtype), "a float dtype")
    if gate not in GATES:
        _fail("gate", repr(gate), "'exp' or 'plain'")
    if state is not None:
        _check_state(state, v.shape[0], H, Dk, Dv, gate, normalize)


def _check_state(
    state: dict[str, Tensor], B: int, H: int, Dk: int, Dv: int, gate: str, normalize: bool
) -> None:
    expected: dict[str, tuple[int, ...]] = {"C": (B, H, Dk, Dv)}
    if normalize:
        expected["n"] = (B, H, Dk)
    if gate == "exp":
        expected["m"] = (B, H)
    if state.keys() != expected.keys():
        _fail(
            "state",
            f"keys {sorted(state)}",
            f"{sorted(expected)} for gate={gate!r}, normalize={normalize}",
        )
    for name, shape in expected.items():
        if state[name].shape != shape:
            _fail(f"state[{name!r}]", f"shape {tuple(state[name].shape)}", f"{shape}")


def _fail(argument: str, got: str, expected: str) -> None:
    raise ValueError(f"gated_linear_attention: {argument}: got {got}, expected {expected}")
