"""Models of recurrent depth as causal language models of transformers, in plain PyTorch.

All code of the model: transformers runs this file where `trust_remote_code=True` allows it. Some
blocks run once, as prelude and coda, those between them again and again on a latent state
(arXiv 2502.05171 and its relatives). The parameters have the shapes that they have in megarec.

Shapes: B batch, T time, S tokens read before and now, D hidden_size, H heads, G heads of keys and
values, K and V their dims.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

PADDING = 2**30
"""Position of padding: no token of a text comes so late, so none sees it."""
State = tuple[Tensor, Tensor]
"""What a mixer keeps of the tokens read so far, batch first."""


class LoopedConfig(PreTrainedConfig):
    """What a looped model is.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream and of the latent state.
        num_hidden_layers: number of blocks, each counted once.
        blocks: each kind of block by name: its `mixer` (see Attention and MLSTM) and `ffn` (`type`
            swiglu, squared_relu or gelu, and `d_ff`), either of them None where it is missing,
            `norm_placement`, `residual_scale`, `layer_scale` and `learned_skip`.
        pattern: the names of the blocks from first to last, repeated for all layers.
        stack: how many of the blocks are `prelude`, `core` and `coda`, how the core is iterated
            (see Loop), and `num_recurrences`, how often; what else it has concerns training.
        embedding_scale: factor of the embeddings.
        head: `logit_scale`, factor of the logits, and `soft_cap`, what they are capped at, or None.
        norm: `eps` of the norms of blocks and before the head.
        use_cache: return what later tokens need to know of those read, to go on from.
        tie_word_embeddings: the head's matrix is that of the embeddings.
    """

    model_type = "megarec_looped"

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 0
    blocks: dict[str, Any] = field(default_factory=dict)
    pattern: list[str] = field(default_factory=list)
    stack: dict[str, Any] = field(default_factory=dict)
    embedding_scale: float = 1.0
    head: dict[str, Any] = field(default_factory=dict)
    norm: dict[str, Any] = field(default_factory=dict)
    use_cache: bool = True
    tie_word_embeddings: bool = False


class LoopedCache(Cache):
    """What each run of each mixer keeps of the tokens read so far.

    Attributes:
        states: (number of a block, of the step) -> its mixer's state.
        position_BS: of each token read in its text; PADDING for padding.
        num_steps: how often the core iterated on each.
    """

    is_croppable = False

    def __init__(self, num_steps: int) -> None:
        super().__init__(layers=[])
        self.states: dict[tuple[int, int], State] = {}
        self.position_BS: Tensor | None = None
        self.num_steps = num_steps

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read so far, padding included."""
        return 0 if self.position_BS is None else self.position_BS.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows that beam search goes on with."""
        for run, (first, second) in self.states.items():
            rows = beam_idx.to(first.device)
            self.states[run] = first.index_select(0, rows), second.index_select(0, rows)
        if self.position_BS is not None:
            rows = beam_idx.to(self.position_BS.device)
            self.position_BS = self.position_BS.index_select(0, rows)


def widen(x: Tensor) -> Tensor:
    """Return x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Scale(nn.Module):
    """x * weight, a weight a channel."""

    def __init__(self, dim: int, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (..., dim)."""
        return x * self.weight


class RMSNorm(Scale):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim)."""
        return super().forward(F.rms_norm(widen(x), x.shape[-1:], eps=self.eps).to(x.dtype))


class Gate(nn.Linear):
    """sigmoid(W x + b), the sigmoid in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., inputs) to (..., outputs)."""
        return torch.sigmoid(widen(F.linear(x, self.weight)) + widen(self.bias))


class Attention(nn.Module):
    """Softmax attention: `num_heads`, `num_kv_heads` and `head_dim`, `rope` (see rotate) or None.

    A token sees `window` tokens at most, itself included. `qk_bias` and `qk_norm` come before RoPE;
    `scale` multiplies the scores.
    """

    def __init__(self, config: dict[str, Any], dim: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config["head_dim"] or dim // config["num_heads"]
        width = config["num_heads"] * self.head_dim
        kv_width = (config["num_kv_heads"] or config["num_heads"]) * self.head_dim
        self.q_proj = nn.Linear(dim, width, bias=config["qk_bias"])
        self.k_proj = nn.Linear(dim, kv_width, bias=config["qk_bias"])
        self.v_proj = nn.Linear(dim, kv_width, bias=False)
        self.o_proj = nn.Linear(width, dim, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config["qk_norm"]:
            self.q_norm = RMSNorm(self.head_dim, config["norm_eps"])
            self.k_norm = RMSNorm(self.head_dim, config["norm_eps"])

    def forward(
        self, x_BTD: Tensor, position_BS: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        """Return y (B, T, D), and keys and values of all tokens so far, (B, S, G, K)."""
        position_BT = position_BS[:, -x_BTD.shape[1] :]
        q_BTHK = self.q_norm(self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim)))
        k_BTGK = self.k_norm(self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim)))
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.config["rope"] is not None:
            q_BTHK = rotate(q_BTHK, position_BT, self.config["rope"])
            k_BTGK = rotate(k_BTGK, position_BT, self.config["rope"])
        k_BSGK, v_BSGK = k_BTGK, v_BTGK
        if state is not None:
            k_BSGK, v_BSGK = torch.cat([state[0], k_BTGK], 1), torch.cat([state[1], v_BTGK], 1)
        # Padding sees everything, and no token sees it.
        distance_BTS = position_BT[:, :, None] - position_BS[:, None, :]
        seen_BTS = distance_BTS >= 0
        if self.config["window"] is not None:
            seen_BTS &= distance_BTS < self.config["window"]
        served = q_BTHK.shape[2] // k_BSGK.shape[2]
        y_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BSGK.repeat_interleave(served, 2).transpose(1, 2),
            v_BSGK.repeat_interleave(served, 2).transpose(1, 2),
            attn_mask=seen_BTS[:, None],
            scale=self.config["scale"],
        )
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2)), (k_BSGK, v_BSGK)


def rotate(x_BTHK: Tensor, position_BT: Tensor, rope: dict[str, Any]) -> Tensor:
    """Turn pair r of the first `fraction` of each head by position * base^(-2r / size) (RoPE).

    It is dims r and r + size / 2, or where `interleaved` 2r and 2r + 1.
    """
    size = int(x_BTHK.shape[-1] * rope["fraction"])
    turning, rest = x_BTHK.split([size, x_BTHK.shape[-1] - size], -1)
    dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
    rate_R = rope["base"] ** -(torch.arange(0, size, 2, dtype=dtype, device=x_BTHK.device) / size)
    angle_BT1R = position_BT[..., None, None].to(dtype) * rate_R
    cos, sin = angle_BT1R.cos(), angle_BT1R.sin()
    interleaved = rope["interleaved"]
    pairs = turning.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack(
        [first * cos - second * sin, second * cos + first * sin], -1 if interleaved else -2
    )
    return torch.cat([turned.flatten(-2).to(x_BTHK.dtype), rest], -1)


class MLSTM(nn.Module):
    """The mLSTM of xLSTM 7B (arXiv 2503.13427): a matrix memory with exponential gates.

    `num_heads`; q and k have `qk_dim_factor`, v has `v_dim_factor` times the width of the model,
    gates are capped at `gate_soft_cap`. It walks through the tokens, one by one, in float32.
    """

    def __init__(self, config: dict[str, Any], dim: int) -> None:
        super().__init__()
        self.config = config
        heads = config["num_heads"]
        qk_dim, v_dim = int(dim * config["qk_dim_factor"]), int(dim * config["v_dim_factor"])
        self.q = nn.Linear(dim, qk_dim, bias=False)
        self.k = nn.Linear(dim, qk_dim, bias=False)
        self.v = nn.Linear(dim, v_dim, bias=False)
        self.ogate_preact = nn.Linear(dim, v_dim, bias=False)
        self.igate_preact = nn.Linear(dim, heads)
        self.fgate_preact = nn.Linear(dim, heads)
        self.multihead_norm = Scale(v_dim)
        self.out_proj = nn.Linear(v_dim, dim, bias=False)

    def forward(
        self, x_BTD: Tensor, position_BS: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        """Return y (B, T, D), memory and normaliser (B, H, K, V + 1), and the gates' maximum."""
        heads, cap = self.config["num_heads"], self.config["gate_soft_cap"]
        real_BT = position_BS[:, -x_BTD.shape[1] :] < PADDING
        q_BTHK, k_BTHK, v_BTHV = (
            widen(linear(x_BTD).unflatten(-1, (heads, -1))) for linear in (self.q, self.k, self.v)
        )
        q_BTHK = q_BTHK * q_BTHK.shape[-1] ** -0.5
        # The normaliser is the memory of a value that is always 1.
        v_BTHV = F.pad(v_BTHV, (0, 1), value=1.0)
        i_BTH, f_BTH = (
            cap * torch.tanh(F.linear(widen(x_BTD), widen(gate.weight), widen(gate.bias)) / cap)
            for gate in (self.igate_preact, self.fgate_preact)
        )
        f_BTH = F.logsigmoid(f_BTH)
        C_BHKV = i_BTH.new_zeros(len(x_BTD), heads, k_BTHK.shape[-1], v_BTHV.shape[-1])
        m_BH = i_BTH.new_zeros(len(x_BTD), heads)
        if state is not None:
            C_BHKV, m_BH = state
        shown_BHV = []
        for t in range(x_BTD.shape[1]):
            new_m_BH = torch.maximum(f_BTH[:, t] + m_BH, i_BTH[:, t])
            f_BH11 = torch.exp(f_BTH[:, t] + m_BH - new_m_BH)[..., None, None]
            i_BH11 = torch.exp(i_BTH[:, t] - new_m_BH)[..., None, None]
            kv_BHKV = k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None]
            new_C_BHKV = f_BH11 * C_BHKV + i_BH11 * kv_BHKV
            y_BHV = torch.einsum("bhk,bhkv->bhv", q_BTHK[:, t], new_C_BHKV)
            bound_BH1 = torch.maximum(y_BHV[..., -1:].abs(), torch.exp(-new_m_BH)[..., None])
            shown_BHV.append(y_BHV[..., :-1] / (bound_BH1 + 1e-6))
            real_B1 = real_BT[:, t, None]
            C_BHKV = torch.where(real_B1[..., None, None], new_C_BHKV, C_BHKV)
            m_BH = torch.where(real_B1, new_m_BH, m_BH)
        h_BTHV = torch.stack(shown_BHV, 1).to(x_BTD.dtype)
        normed = F.layer_norm(widen(h_BTHV), h_BTHV.shape[-1:], eps=self.config["norm_eps"])
        h_BTD = self.multihead_norm(normed.to(x_BTD.dtype).flatten(-2))
        return self.out_proj(torch.sigmoid(self.ogate_preact(x_BTD)) * h_BTD), (C_BHKV, m_BH)


MIXERS: dict[str, type[nn.Module]] = {"attention": Attention, "mlstm": MLSTM}


class FFN(nn.Module):
    """down(silu(gate x) * up x), or without a gate down(relu(up x)^2) or down(gelu(up x))."""

    def __init__(self, config: dict[str, Any], dim: int) -> None:
        super().__init__()
        self.activation, width = config["type"], config["d_ff"]
        if self.activation == "swiglu":
            self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.activation == "squared_relu":
            return self.down(F.relu(self.up(x)).square())
        return self.down(F.gelu(self.up(x)))


class Residual(nn.Module):
    """x + s y of a branch's output y: `post` and `sandwich` norm the sum, `peri` norms y."""

    def __init__(self, config: dict[str, Any], dim: int, eps: float) -> None:
        super().__init__()
        self.placement, self.factor = config["norm_placement"], config["residual_scale"]
        start = config["layer_scale"]
        self.norm: nn.Module = nn.Identity() if self.placement == "pre" else RMSNorm(dim, eps)
        self.scale: nn.Module = nn.Identity() if start is None else Scale(dim, start)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add y to x, both (..., D)."""
        y = self.scale(self.norm(y) if self.placement == "peri" else y)
        x = torch.add(x, y, alpha=self.factor)
        return x if self.placement == "peri" else self.norm(x)


class Block(nn.Module):
    """x = skip(x) + s mixer(norm(x)), then x = x + s ffn(norm(x)); either may be missing.

    There is no norm before the branches where `norm_placement` is `post`.
    """

    def __init__(self, config: dict[str, Any], dim: int, eps: float) -> None:
        super().__init__()

        def before() -> nn.Module:
            return nn.Identity() if config["norm_placement"] == "post" else RMSNorm(dim, eps)

        self.mixer = self.ffn = None
        if config["mixer"] is not None:
            self.skip = Scale(dim) if config["learned_skip"] else nn.Identity()
            self.mixer_norm, self.mixer_residual = before(), Residual(config, dim, eps)
            self.mixer = MIXERS[config["mixer"]["type"]](config["mixer"], dim)
        if config["ffn"] is not None:
            self.ffn_norm, self.ffn_residual = before(), Residual(config, dim, eps)
            self.ffn = FFN(config["ffn"], dim)

    def forward(
        self, x_BTD: Tensor, position_BS: Tensor, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Return x (B, T, D), and the mixer's state."""
        if self.mixer is not None:
            y_BTD, state = self.mixer(self.mixer_norm(x_BTD), position_BS, state)
            x_BTD = self.mixer_residual(self.skip(x_BTD), y_BTD)
        if self.ffn is not None:
            x_BTD = self.ffn_residual(x_BTD, self.ffn(self.ffn_norm(x_BTD)))
        return x_BTD, state


class Loop(nn.Module):
    """s' = update(core(inject(s, e) + signal(step)), s), e being the prelude's output.

    `inject`: A [s; e] (concat), s + e (add) or s (none). `step_signal`: a learned vector a step, or
    sinusoids of position and step. `update`: F, the core's output, alone; (1 - dt) s + dt F
    (euler); z F + (1 - z) s, z = sigmoid(W [F; s] + b) (gated); RMSNorm(F) (normed).
    `initial_state`: random, by position and channel; zero; or e. `halt`: see forward.
    """

    def __init__(self, config: dict[str, Any], dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.rule = config["update"] or {"type": None}
        self.halting = config["halt"] or {"type": None}
        if config["inject"] == "concat":
            self.adapter = nn.Linear(2 * dim, dim, bias=False)
        if config["step_signal"] == "learned":
            self.step_embedding = nn.Embedding(config["num_step_embeddings"], dim)
        if self.rule["type"] == "gated":
            self.update = nn.ModuleDict({"gate": Gate(2 * dim, dim)})
        if self.rule["type"] == "normed":
            self.update = nn.ModuleDict({"norm": RMSNorm(dim, self.rule["eps"])})
        if config["halt"] is not None:
            self.halt = nn.ModuleDict({"unit": Gate(dim, 1)})

    def forward(
        self,
        e_BTD: Tensor,
        position_BT: Tensor,
        num_steps: int,
        core: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """Iterate `core`, a function of its input and the step; returns what the coda reads.

        With adaptive computation time (`act`, arXiv 1603.08983) that is the mean of a token's
        states, weighted by p = sigmoid(w s + b) until that sums to 1 - eps; the last one gets what
        is left of 1. With an `exit_gate` (arXiv 2510.25741) a token stops once it has left with a
        probability above the threshold, leaving by p at each step. What has stopped stays as it
        is, and is seen so by others.
        """
        s_BTD = self.initial_state(e_BTD, position_BT)
        running_BT1 = torch.ones_like(position_BT, dtype=torch.bool)[..., None]
        left_BT1 = torch.ones_like(running_BT1, dtype=widen(e_BTD).dtype)
        mean_BTD = torch.zeros_like(widen(e_BTD))
        for step in range(num_steps):
            new_BTD = core(self.inject(s_BTD, e_BTD, position_BT, step), step)
            s_BTD = torch.where(running_BT1, self.combine(new_BTD, s_BTD), s_BTD)
            if self.halting["type"] == "act":
                p_BT1 = self.halt["unit"](s_BTD)
                stops_BT1 = left_BT1 - p_BT1 < self.halting["eps"]
                weight_BT1 = torch.where(stops_BT1, left_BT1, p_BT1) * running_BT1
                mean_BTD = mean_BTD + weight_BT1 * s_BTD
                left_BT1 = left_BT1 - weight_BT1
                running_BT1 = running_BT1 & ~stops_BT1
            elif self.halting["type"] == "exit_gate":
                left_BT1 = left_BT1 * (1 - self.halt["unit"](s_BTD))
                running_BT1 = running_BT1 & (left_BT1 >= 1 - self.halting["threshold"])
        if self.halting["type"] == "act":
            return (mean_BTD + left_BT1 * s_BTD).to(s_BTD.dtype)
        return s_BTD

    def initial_state(self, e_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """Return s before the first step."""
        if self.config["initial_state"] == "embedding":
            return e_BTD
        if self.config["initial_state"] == "zero":
            return torch.zeros_like(e_BTD)
        return random_latent(position_BT, self.dim, self.config["initial_std"]).to(e_BTD.dtype)

    def inject(self, s_BTD: Tensor, e_BTD: Tensor, position_BT: Tensor, step: int) -> Tensor:
        """Return what the core reads."""
        if self.config["inject"] == "concat":
            s_BTD = self.adapter(torch.cat([s_BTD, e_BTD], -1))
        elif self.config["inject"] == "add":
            s_BTD = s_BTD + e_BTD
        if self.config["step_signal"] == "learned":
            last = self.step_embedding.num_embeddings - 1
            return s_BTD + self.step_embedding.weight[min(step, last)]
        if self.config["step_signal"] == "sinusoid":
            number = torch.tensor(step + 1, device=s_BTD.device)
            wave_BTD = sinusoid(position_BT, self.dim) + sinusoid(number, self.dim)
            return s_BTD + wave_BTD.to(s_BTD.dtype)
        return s_BTD

    def combine(self, new: Tensor, old: Tensor) -> Tensor:
        """Return the next s from the core's output and s."""
        if self.rule["type"] == "euler":
            return torch.lerp(old, new, self.rule["dt"])
        if self.rule["type"] == "gated":
            z = self.update["gate"](torch.cat([new, old], -1))
            return torch.lerp(widen(old), widen(new), z).to(new.dtype)
        return self.update["norm"](new) if self.rule["type"] == "normed" else new


def sinusoid(number: Tensor, dim: int) -> Tensor:
    """Return sin and cos, in turn, of number * 10000^(-2j / dim), j the pair: (..., dim)."""
    channel_D = torch.arange(dim, device=number.device)
    rate_D = 10_000.0 ** (-(channel_D - channel_D % 2) / dim)
    angle = number[..., None] * rate_D
    return torch.where(channel_D % 2 == 0, angle.sin(), angle.cos())


def random_latent(position_BT: Tensor, dim: int, std: float) -> Tensor:
    """Draw from N(0, std^2), cut at 3 std: numbers that hang on position and channel alone."""
    digest = hashlib.blake2b(b"latent", digest_size=8).digest()
    key = mix(torch.tensor(int.from_bytes(digest, "little") >> 1, device=position_BT.device))
    channel_D = torch.arange(dim, device=position_BT.device)
    bits_BTD = mix(mix(key ^ position_BT)[..., None] ^ channel_D)
    # The upper 23 bits are a float32 in (0, 1), the half keeping it off both ends.
    uniform_BTD = ((bits_BTD >> 41 & 0x7FFFFF).float() + 0.5) / 2**23
    inside = math.erf(3 / 2**0.5)
    return std * 2**0.5 * torch.erfinv(inside * (2 * uniform_BTD - 1))


def mix(x: Tensor) -> Tensor:
    """Return splitmix64's output function of int64 numbers, which stand for unsigned ones."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return x >> bits & (1 << 64 - bits) - 1  # without the sign, which >> brings in

    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ shifted(x, 31)


class LoopedForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, blocks, some of them in a loop, norm, and a head that predicts the next token."""

    config_class = LoopedConfig
    _is_stateful = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["igate_preact", "fgate_preact"]
    _tied_weights_keys = {"head.weight": "embedding.weight"}

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        dim, eps = config.hidden_size, config.norm["eps"]
        self.embedding = nn.Embedding(config.vocab_size, dim)
        self.blocks = nn.ModuleList(
            Block(config.blocks[config.pattern[i % len(config.pattern)]], dim, eps)
            for i in range(config.num_hidden_layers)
        )
        self.stack = Loop(config.stack, dim)
        self.norm = RMSNorm(dim, eps)
        self.head: nn.Module = nn.Linear(dim, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() leaves it to forward() to make a cache.

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LoopedCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits, and with labels the loss.

        Args:
            input_ids: int64 (B, T).
            attention_mask: (B, T), or longer by tokens that were read before: 0 for padding, on
                any side, which changes no other token's result.
            past_key_values: what an earlier call returned, to go on from it.
            labels: int64 (B, T), the same tokens as input_ids, -100 for those that do not count.
            use_cache: return what later tokens need; by default as the config says.
            num_steps: how often the core iterates; by default the config's `num_recurrences`. With
                a cache it must be that of the tokens before.
            logits_to_keep: compute only the last so many logits (0: all), or those at positions.
            return_dict: False for a tuple.
            kwargs: of the loss function.

        Returns:
            logits (B, T, vocab_size) in at least float32, the mean loss in nats a token, and the
            cache.

        Raises:
            ValueError: a mask of another shape, or a number of steps that does not fit.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        num_steps = self.config.stack["num_recurrences"] if num_steps is None else num_steps
        cache = LoopedCache(num_steps) if past_key_values is None else past_key_values
        if num_steps < 1 or num_steps != cache.num_steps:
            expected = "at least 1" if num_steps < 1 else f"{cache.num_steps}, as in the cache"
            raise ValueError(f"num_steps: got {num_steps}, expected {expected}")
        position_BS = positions(input_ids, attention_mask, cache.position_BS)

        def run(layers: range, x_BTD: Tensor, step: int = 0) -> Tensor:
            for layer in layers:
                state = cache.states.get((layer, step))
                x_BTD, state = self.blocks[layer](x_BTD, position_BS, state)
                if use_cache and state is not None:
                    cache.states[layer, step] = state
            return x_BTD

        first = self.config.stack["prelude"]
        last = len(self.blocks) - self.config.stack["coda"]
        x_BTD = run(range(first), self.embedding(input_ids) * self.config.embedding_scale)
        x_BTD = self.stack(
            x_BTD,
            position_BS[:, -input_ids.shape[1] :],
            num_steps,
            lambda u_BTD, step: run(range(first, last), u_BTD, step),
        )
        if self.config.stack["norm_core_output"]:
            x_BTD = self.norm(x_BTD)
        x_BTD = self.norm(run(range(last, len(self.blocks)), x_BTD))
        if use_cache:
            cache.position_BS = position_BS

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = widen(self.head(x_BTD[:, kept] * self.config.head["logit_scale"]))
        cap = self.config.head["soft_cap"]
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache if use_cache else None
        )
        return output.to_tuple() if return_dict is False else output


def positions(input_ids: Tensor, attention_mask: Tensor | None, before_BS: Tensor | None) -> Tensor:
    """Append the positions of new tokens to those of the tokens before; padding has PADDING."""
    B, T = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.dim() != 2 or len(attention_mask) != B or attention_mask.shape[1] < T:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected ({B}, {T} or more)"
        )
    if before_BS is None:
        before_BS = input_ids.new_empty(B, 0)
    real_BT = attention_mask[:, -T:] != 0
    num_read_B1 = (before_BS < PADDING).sum(1, keepdim=True)
    position_BT = num_read_B1 + real_BT.cumsum(1) - 1
    return torch.cat([before_BS, position_BT.where(real_BT, PADDING)], 1)
