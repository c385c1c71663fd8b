"""Softmax attention: grouped queries, RoPE or none, QK norm, sliding window, a cache of keys."""

from typing import Literal

import torch
from megarec_kernels.attention import attention
from megarec_kernels.rotary import rotary
from torch import Tensor, nn

from megarec.config.activations import Activations, Numbers, rms_norm
from megarec.config.base import PositiveFloat, PositiveInt
from megarec.config.mixer import MixerConfig
from megarec.models.context import Context, positions
from megarec.models.init import Initializer
from megarec.models.mixer import Mixer
from megarec.models.norm import RMSNorm
from megarec.models.rotary import RotaryConfig, rotation
from megarec.models.state import State


class AttentionConfig(MixerConfig):
    """Config of the attention mixer.

    `num_kv_heads` (default: `num_heads`) divides `num_heads` (arXiv 2305.13245); `head_dim` is
    d_model / num_heads unless given. `rope: null` means no positions. `window` is the number of
    tokens that a token sees, itself included. `qk_bias` adds a learned bias to queries and keys, at
    first 0; `qk_norm` is an RMSNorm over each head of them; both come before RoPE. `scale`
    multiplies the scores (default: head_dim ** -0.5). `max_seq_len` is the longest document that
    the cache of keys is meant for.
    """

    type: Literal["attention"] = "attention"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    rope: RotaryConfig | None = RotaryConfig()
    window: PositiveInt | None = None
    qk_bias: bool = False
    qk_norm: bool = False
    norm_eps: PositiveFloat = 1e-6
    scale: PositiveFloat | None = None
    max_seq_len: PositiveInt = 8192

    def kv_heads(self) -> int:
        """Return the number of heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    def head_width(self, d_model: int) -> int:
        """Return the width of a head."""
        return self.head_dim or d_model // self.num_heads

    def problems(self, d_model: int) -> list[str]:
        """Heads must divide, dimensions turn in pairs, and the window fit the cache."""
        problems = []
        if self.head_dim is None and d_model % self.num_heads:
            problems.append(
                f"num_heads={self.num_heads} does not divide d_model={d_model}; "
                "change it or give head_dim"
            )
        if self.num_heads % self.kv_heads():
            problems.append(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.rope is not None:
            problems += self.rope.problems(self.head_width(d_model))
        if self.window is not None and self.window > self.max_seq_len:
            problems.append(
                f"window={self.window}: the cache holds max_seq_len={self.max_seq_len} tokens; "
                "raise it or narrow the window"
            )
        return problems

    def tp_sizes(self) -> dict[str, int]:
        """Heads of queries, and of keys and values."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.kv_heads()}

    def longest_document(self) -> int:
        """Return what the cache is meant for."""
        return self.max_seq_len

    def num_params(self, d_model: int) -> int:
        """Count q, k, v, out projection, and the biases and norms if there are any."""
        width, heads = self.head_width(d_model), self.num_heads + self.kv_heads()
        norms = 2 * width if self.qk_norm else 0
        biases = width * heads if self.qk_bias else 0
        return 2 * d_model * width * heads + norms + biases

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """Count matmuls: projections, scores and sums over the keys seen, on average."""
        width = self.head_width(d_model)
        window = min(self.window or seq_len, seq_len)
        # Token t sees min(t + 1, window) keys.
        mean_keys = window - window * (window - 1) / (2 * seq_len)
        linear = 4.0 * d_model * width * (self.num_heads + self.kv_heads())
        return linear + 4.0 * self.num_heads * width * mean_keys

    def state_bytes(self, d_model: int, seq_len: int) -> int:
        """Keys and values of the tokens that the next one sees, and its position (int64)."""
        cached = seq_len if self.window is None else min(seq_len, self.window - 1)
        return 4 * 2 * self.kv_heads() * self.head_width(d_model) * cached + 8

    def activations(self, d_model: int, seq_len: int) -> Activations:
        """Count x, queries, keys, values and y; a mask is not counted, as GPUs need none."""
        width = self.head_width(d_model)
        q, kv = self.num_heads * width, self.kv_heads() * width
        angles = 0 if self.rope is None else self.rope.size(width)
        kept = Numbers(narrow=d_model + 2 * q + 2 * kv, wide=self.num_heads + angles)
        if self.qk_norm:
            kept += rms_norm(q) + rms_norm(kv)
        return Activations(
            kept=kept,
            saved=Numbers(narrow=2 * q + 2 * kv + d_model, wide=self.num_heads),
            work=Numbers(narrow=3 * q + 2 * kv),
        )

    def build(self, d_model: int) -> "Attention":
        """Build the module."""
        return Attention(self, d_model)


class Attention(Mixer):
    """y = out_proj(softmax(scale q k^T) v) over the tokens of the document so far.

    Shapes: B batch, T time, S cached and new tokens, D d_model, H heads, G heads of keys and
    values, K head dim.
    """

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_width(d_model)
        width, kv_width = config.num_heads * self.head_dim, config.kv_heads() * self.head_dim
        self.q = nn.Linear(d_model, width, bias=config.qk_bias)
        self.k = nn.Linear(d_model, kv_width, bias=config.qk_bias)
        self.v = nn.Linear(d_model, kv_width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.out_proj = nn.Linear(width, d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mix a sequence; see Mixer."""
        T = x_BTD.shape[1]
        first_B = x_BTD.new_zeros(len(x_BTD), dtype=torch.int64) if state is None else state["pos"]
        position_BT = positions(T, ctx.resets, first_B)
        q_BTHK = self.q(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTGK = self.k(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTGK = self.v(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if self.config.rope is not None:
            angles = rotation(self.config.rope, self.head_dim, position_BT, x_BTD.dtype)
            q_BTHK, k_BTGK = (
                rotary(x, angles, interleaved=self.config.rope.interleaved)
                for x in (q_BTHK, k_BTGK)
            )
        # Copies, also without a cache: what is returned as state must be no view.
        cached = [] if state is None else [(state["k"], state["v"])]
        k_BSGK = torch.cat([*(k.to(k_BTGK.dtype) for k, _ in cached), k_BTGK], 1)
        v_BSGK = torch.cat([*(v.to(v_BTGK.dtype) for _, v in cached), v_BTGK], 1)
        y_BTHK = attention(
            q_BTHK,
            k_BSGK,
            v_BSGK,
            resets=ctx.resets,
            num_cached=first_B if k_BSGK.shape[1] > T else None,
            window=self.config.window,
            scale=self.config.scale,
        )
        window = self.config.window
        if window is not None and k_BSGK.shape[1] >= window:
            # The next token sees itself and window - 1 others.
            oldest = k_BSGK.shape[1] - (window - 1)
            k_BSGK, v_BSGK = k_BSGK[:, oldest:].clone(), v_BSGK[:, oldest:].clone()
        after = {"k": k_BSGK, "v": v_BSGK, "pos": position_BT[:, -1] + 1}
        return self.out_proj(y_BTHK.flatten(2)), after

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token; see Mixer. The cache of keys grows by one token, up to the window."""
        y_BTD, state = self(x_BD[:, None], Context(), state)
        return y_BTD[:, 0], state

    def init_state(self, batch_size: int, device: torch.device) -> State:
        """Return empty k and v, (B, 0, G, K), and pos (B,) int64, the position of the next token.

        Keys are kept as they are after RoPE. Of a row's cached keys the last `pos` count: those
        before are of padding or another document.
        """
        shape = (batch_size, 0, self.config.kv_heads(), self.head_dim)
        return {
            "k": torch.empty(shape, dtype=self.k.weight.dtype, device=device),
            "v": torch.empty(shape, dtype=self.v.weight.dtype, device=device),
            "pos": torch.zeros(batch_size, dtype=torch.int64, device=device),
        }

    def inherit(self, before: State, deeper: State, num_tokens: int) -> State:
        """Append the deepest keys and values of the tokens; see Mixer."""
        keep = None if self.config.window is None else self.config.window - 1
        after = {"pos": deeper["pos"]}
        for key in ("k", "v"):
            new = deeper[key][:, max(deeper[key].shape[1] - num_tokens, 0) :]
            whole = torch.cat([before[key].to(new.dtype), new], 1)
            after[key] = whole if keep is None else whole[:, max(whole.shape[1] - keep, 0) :]
        return after

    def init_weights(self, init: Initializer) -> None:
        """Draw q, k and v with std, the out projection with out_std; biases are 0."""
        for linear in (self.q, self.k, self.v):
            init.normal(linear.weight, init.std)
            if linear.bias is not None:
                init.constant(linear.bias, 0.0)
        init.normal(self.out_proj.weight, init.out_std)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.init_weights(init)

    def tp_plan(self) -> dict[str, str]:
        """Split by heads: projections by column, the out projection by row."""
        norms = {"[qk]_norm.weight": "replicate"} if self.config.qk_norm else {}
        biases = {"[qk].bias": "column"} if self.config.qk_bias else {}
        return {"[qkv].weight": "column", "out_proj.weight": "row"} | norms | biases

    def hf_names(self) -> dict[str, str]:
        """Name the parameters as transformers' attention layers do."""
        names = {f"{part}.weight": f"{part}_proj.weight" for part in "qkv"}
        names["out_proj.weight"] = "o_proj.weight"
        if self.config.qk_norm:
            names |= {f"{part}_norm.weight": f"{part}_norm.weight" for part in "qk"}
        if self.config.qk_bias:
            names |= {f"{part}.bias": f"{part}_proj.bias" for part in "qk"}
        return names
