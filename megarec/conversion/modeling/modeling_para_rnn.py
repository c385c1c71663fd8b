"""ParaRNN (arXiv 2510.21450) as a causal language model of transformers, in plain PyTorch.

All code of the model: transformers runs this file where `trust_remote_code=True` allows it. The
parameters have the names and shapes that they have in megarec, which trains these models for all
tokens at once; here the recurrence walks through the tokens, one by one, always in float32.

Shapes: B batch, T time, D hidden_size, H heads, V = 3 inputs of a channel, K slots of its state.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class ParaRNNConfig(PreTrainedConfig):
    """What a ParaRNN model is.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream, and number of channels of every recurrence.
        num_hidden_layers: number of blocks.
        blocks: each kind of block by name: its `mixer` (`type` para_gru or para_lstm, `num_heads`,
            `conv_kernel`, `norm_eps`; what else it has concerns training) and `ffn` (`type`
            swiglu, squared_relu or gelu, and `d_ff`), either of them None where it is missing,
            `residual_scale` and `learned_skip`.
        pattern: the names of the blocks from first to last, repeated for all layers.
        embedding_scale: factor of the embeddings.
        head: `logit_scale`, factor of the logits, and `soft_cap`, what they are capped at, or None.
        norm: `eps` of the norms before mixers, FFNs and the head.
        use_cache: return the state after the last token, to go on from.
        tie_word_embeddings: the head's matrix is that of the embeddings.
        kwargs: of transformers.
    """

    model_type = "megarec_para_rnn"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_hidden_layers: int = 0,
        blocks: dict[str, dict[str, Any]] | None = None,
        pattern: list[str] | None = None,
        embedding_scale: float = 1.0,
        head: dict[str, Any] | None = None,
        norm: dict[str, Any] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.blocks = blocks or {}
        self.pattern = pattern or []
        self.embedding_scale = embedding_scale
        self.head = head or {"logit_scale": 1.0, "soft_cap": None}
        self.norm = norm or {"eps": 1e-6}
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings


class ParaRNNCache(Cache):
    """What the layers keep of the tokens read so far; its size does not grow with their number.

    Attributes:
        states: number of a layer -> the last inputs of its convolution (B, kernel - 1, D), and the
            state of its recurrence (B, K, D).
        num_tokens: read so far, padding included.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read so far, padding included."""
        return self.num_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows that beam search goes on with."""
        for layer, (tail, state) in self.states.items():
            rows = beam_idx.to(state.device)
            self.states[layer] = tail.index_select(0, rows), state.index_select(0, rows)


def widen(x: Tensor) -> Tensor:
    """Return x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, each group of channels with a mean of its own."""

    def __init__(self, dim: int, eps: float, group_dim: int) -> None:
        super().__init__()
        self.eps = eps
        self.group_dim = group_dim
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise x (..., dim), or x * silu(gate) in the gate's dtype: gate first, then norm."""
        dtype, x = x.dtype, widen(x)
        if gate is not None:
            dtype, x = gate.dtype, x * F.silu(widen(gate))
        groups = x.unflatten(-1, (-1, self.group_dim))
        normed = F.rms_norm(groups, (self.group_dim,), eps=self.eps).flatten(-2)
        return normed.to(dtype) * self.weight


class Scale(nn.Module):
    """x * weight, a weight a channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (..., dim)."""
        return x * self.weight


class CausalConv(nn.Module):
    """SiLU of a depthwise convolution over each channel's last `kernel` inputs."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        bound = kernel**-0.5
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(
        self, x_BTD: Tensor, lengths_B: Tensor, tail_BKD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the convolved x, and the last kernel - 1 inputs of each row.

        Args:
            x_BTD: the inputs; in row b only the first lengths[b] count.
            lengths_B: int64.
            tail_BKD: the kernel - 1 inputs before them, None for 0.
        """
        B, _, D = x_BTD.shape
        before = self.weight.shape[-1] - 1
        if tail_BKD is None:
            tail_BKD = x_BTD.new_zeros(B, before, D)
        x_BSD = torch.cat([tail_BKD, x_BTD], 1)
        y_BDT = F.conv1d(widen(x_BSD).mT, widen(self.weight), widen(self.bias), groups=D)
        last_BK = lengths_B[:, None] + torch.arange(before, device=x_BTD.device)
        tail_BKD = x_BSD.gather(1, last_BK[..., None].expand(-1, -1, D))
        return F.silu(y_BDT).mT.to(x_BTD.dtype), tail_BKD


class Recurrence(nn.Module):
    """state_t = step(state_{t-1}, u_t), channel by channel; it shows the last slot of its state."""

    num_slots: ClassVar[int] = 1
    rows: ClassVar[dict[str, int]] = {"A": 3}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3, dim))
        # Xavier's, normal.
        drawn = {
            name: torch.randn(n, dim) * (2 / (n + dim)) ** 0.5 for name, n in self.rows.items()
        }
        self.weights = nn.ParameterDict(drawn)

    def step(self, state_BKD: Tensor, u_BVD: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Return the state after one token (B, K, D)."""
        raise NotImplementedError

    def forward(
        self, u_BTVD: Tensor, lengths_B: Tensor, state_BKD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Walk through the tokens.

        Args:
            u_BTVD: what the inputs contribute; in row b only the first lengths[b] count.
            lengths_B: int64.
            state_BKD: the state before them, None for 0.

        Returns:
            What the states show (B, T, D) and the last of them (B, K, D), in at least float32.
        """
        u_BTVD = widen(u_BTVD) + widen(self.bias)
        weights = {name: widen(weight) for name, weight in self.weights.items()}
        B, T, _, D = u_BTVD.shape
        if state_BKD is None:
            state_BKD = u_BTVD.new_zeros(B, self.num_slots, D)
        shown_BD = []
        for t in range(T):
            new_BKD = self.step(state_BKD, u_BTVD[:, t], weights)
            state_BKD = torch.where((t < lengths_B)[:, None, None], new_BKD, state_BKD)
            shown_BD.append(state_BKD[:, -1])
        return torch.stack(shown_BD, 1), state_BKD


class ParaGRU(Recurrence):
    """Eq. 3.1a: h = (1 - z) h' + z n; rows of A and of u are those of z, r and n."""

    def step(self, state_BKD: Tensor, u_BVD: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Return h as (B, 1, D); see Recurrence."""
        h = state_BKD[:, 0]
        a_z, a_r, a_n = weights["A"]
        u_z, u_r, u_n = u_BVD.unbind(1)
        z = torch.sigmoid(a_z * h + u_z)
        r = torch.sigmoid(a_r * h + u_r)
        n = torch.tanh(a_n * h * r + u_n)
        return ((1 - z) * h + z * n)[:, None]


class ParaLSTM(Recurrence):
    """Eq. 3.1b: c = f c' + (1 - f) m, h = o tanh(c); the state is (c, h).

    Rows of A and of u are those of f, o and m. C has the peepholes, of f at c' and of o at c.
    """

    num_slots: ClassVar[int] = 2
    rows: ClassVar[dict[str, int]] = {"A": 3, "C": 2}

    def step(self, state_BKD: Tensor, u_BVD: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Return c and h as (B, 2, D); see Recurrence."""
        c_old, h_old = state_BKD.unbind(1)
        a_f, a_o, a_m = weights["A"]
        c_f, c_o = weights["C"]
        u_f, u_o, u_m = u_BVD.unbind(1)
        f = torch.sigmoid(a_f * h_old + c_f * c_old + u_f)
        m = torch.tanh(a_m * h_old + u_m)
        c = f * c_old + (1 - f) * m
        o = torch.sigmoid(a_o * h_old + c_o * c + u_o)
        return torch.stack([c, o * torch.tanh(c)], 1)


RECURRENCES: dict[str, type[Recurrence]] = {"para_gru": ParaGRU, "para_lstm": ParaLSTM}


class Mixer(nn.Module):
    """y = out_proj(norm(h * silu(z))), h what the recurrence shows for conv(x) (figure 9)."""

    def __init__(self, config: dict[str, Any], dim: int) -> None:
        super().__init__()
        num_heads = config["num_heads"]
        head_dim = dim // num_heads
        self.x = nn.Linear(dim, dim, bias=False)
        self.z = nn.Linear(dim, dim, bias=False)
        self.conv = CausalConv(dim, config["conv_kernel"])
        # Head h maps its slice of x to its slice of each of the three inputs of the cell.
        bound = (6 / head_dim) ** 0.5
        input_map = torch.empty(num_heads, head_dim, 3, head_dim).uniform_(-bound, bound)
        self.input_map = nn.Parameter(input_map)
        self.recurrence = RECURRENCES[config["type"]](dim)
        self.norm = RMSNorm(dim, config["norm_eps"], head_dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x_BTD: Tensor, lengths_B: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return y (B, T, D), and the states of convolution and recurrence after each row."""
        tail_BKD, state_BKD = state or (None, None)
        conv_BTD, tail_BKD = self.conv(self.x(x_BTD), lengths_B, tail_BKD)
        heads_BTHI = conv_BTD.unflatten(-1, (self.input_map.shape[0], -1))
        u_BTVD = torch.einsum("bthi,hivd->btvhd", heads_BTHI, self.input_map).flatten(-2)
        h_BTD, state_BKD = self.recurrence(u_BTVD, lengths_B, state_BKD)
        return self.out_proj(self.norm(h_BTD, self.z(x_BTD))), (tail_BKD, state_BKD)


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


class Block(nn.Module):
    """x = skip(x) + s mixer(norm(x)), then x = x + s ffn(norm(x)); either may be missing."""

    def __init__(self, config: dict[str, Any], dim: int, eps: float) -> None:
        super().__init__()
        self.residual_scale = config["residual_scale"]
        self.mixer = self.ffn = None
        if config["mixer"] is not None:
            self.skip = Scale(dim) if config["learned_skip"] else nn.Identity()
            self.mixer_norm = RMSNorm(dim, eps, dim)
            self.mixer = Mixer(config["mixer"], dim)
        if config["ffn"] is not None:
            self.ffn_norm = RMSNorm(dim, eps, dim)
            self.ffn = FFN(config["ffn"], dim)

    def forward(
        self, x_BTD: Tensor, lengths_B: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return x (B, T, D), and the mixer's state; see Mixer."""
        if self.mixer is not None:
            y_BTD, state = self.mixer(self.mixer_norm(x_BTD), lengths_B, state)
            x_BTD = torch.add(self.skip(x_BTD), y_BTD, alpha=self.residual_scale)
        if self.ffn is not None:
            y_BTD = self.ffn(self.ffn_norm(x_BTD))
            x_BTD = torch.add(x_BTD, y_BTD, alpha=self.residual_scale)
        return x_BTD, state


class ParaRNNForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, blocks, norm, and a head that predicts the next token."""

    config_class = ParaRNNConfig
    _is_stateful = True
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["recurrence"]
    _tied_weights_keys = {"head.weight": "embedding.weight"}

    def __init__(self, config: ParaRNNConfig) -> None:
        super().__init__(config)
        dim, eps = config.hidden_size, config.norm["eps"]
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, dim)
        self.blocks = nn.ModuleList(
            Block(config.blocks[config.pattern[i % len(config.pattern)]], dim, eps)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(dim, eps, dim)
        self.head: nn.Module = nn.Linear(dim, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() leaves it to forward() to make a cache.

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embedding = value

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
        past_key_values: ParaRNNCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
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
            use_cache: return the state after the last token; by default as the config says.
            logits_to_keep: compute only the last so many logits (0: all), or those at positions.
            return_dict: False for a tuple.
            kwargs: of the loss function.

        Returns:
            logits (B, T, vocab_size) in at least float32, the mean loss in nats a token, and the
            cache.

        Raises:
            ValueError: a mask of another shape.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = ParaRNNCache() if past_key_values is None else past_key_values

        # A row's real tokens come first: so what they compute depends on no padding.
        order_BT, lengths_B = padding_last(input_ids, attention_mask)
        x_BTD = self.embedding(input_ids.gather(1, order_BT)) * self.config.embedding_scale
        for layer, block in enumerate(self.blocks):
            x_BTD, state = block(x_BTD, lengths_B, cache.states.get(layer))
            if use_cache and state is not None:
                cache.states[layer] = state
        if use_cache:
            cache.num_tokens += input_ids.shape[1]
        x_BTD = self.norm(x_BTD)
        x_BTD = x_BTD.gather(1, order_BT.argsort(1)[..., None].expand_as(x_BTD))

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


def padding_last(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the order of each row's tokens with its padding last, and how many are no padding."""
    B, T = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.dim() != 2 or len(attention_mask) != B or attention_mask.shape[1] < T:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected ({B}, {T} or more)"
        )
    padding_BT = (attention_mask[:, -T:] == 0).int()
    return padding_BT.argsort(dim=1, stable=True), T - padding_BT.sum(1)
