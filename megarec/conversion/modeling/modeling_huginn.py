"""Huginn (arXiv 2502.05171) as a causal language model of transformers, in plain PyTorch.

All code of the model: transformers runs this file where `trust_remote_code=True` allows it. It was
written from the paper's equations. Its config and parameters have the names and shapes of the
released model (`huginn_raven`), whose weights it reads as well. With e the prelude's output, s_0 a
random state of every token, and r steps,

    s_(i+1) = core(adapter [s_i; e]);  logits = lm_head(ln_f(coda(ln_f(s_r))))

It differs from the code of that release in the following:

- A token's s_0 depends on its position alone, so that the same text always has the same result.
- `attention_mask` is obeyed, and padding on any side changes no other token's result.
- `labels` are the same tokens as `input_ids`, as everywhere in transformers; the loss shifts them.
- All steps are differentiated, and their number is never random. megarec trains these models as
  they were trained, with random depth of which the last steps are differentiated.
- RoPE is computed, not looked up: the table `freqs_cis` among the weights is not read, and
  `save_pretrained` leaves it out. The released code needs it.

Shapes: B batch, T time, S time with cached tokens, D n_embd, H heads, K head dim.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class RavenConfig(PreTrainedConfig):
    """What a Huginn model is.

    Args:
        vocab_size: number of tokens, padding of the matrix included.
        n_embd: width of the residual stream.
        n_heads: attention heads of width n_embd / n_heads.
        intermediate_size: width of the feed-forward networks.
        block_size: longest text that the model was made for.
        n_layers_in_prelude: number of blocks before the loop.
        n_layers_in_recurrent_block: number of blocks in it.
        n_layers_in_coda: number of blocks behind it.
        mean_recurrence: number of steps unless a call says `num_steps`.
        qk_bias: queries and keys have biases.
        rope_base: of the rotary positions.
        norm_eps: of all norms.
        tie_embeddings: the head's matrix is that of the embeddings.
        use_cache: return the keys and values of the tokens, to go on from.
        kwargs: of transformers, and keys of the release that change nothing here.
    """

    model_type = "huginn_raven"
    attribute_map = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(
        self,
        vocab_size: int = 65536,
        n_embd: int = 5280,
        n_heads: int = 55,
        intermediate_size: int = 17920,
        block_size: int = 4096,
        n_layers_in_prelude: int = 2,
        n_layers_in_recurrent_block: int = 4,
        n_layers_in_coda: int = 2,
        mean_recurrence: int = 32,
        qk_bias: bool = True,
        rope_base: float = 50_000.0,
        norm_eps: float = 1e-6,
        tie_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.n_embd = n_embd
        self.n_heads = n_heads
        self.intermediate_size = intermediate_size
        self.block_size = block_size
        self.n_layers_in_prelude = n_layers_in_prelude
        self.n_layers_in_recurrent_block = n_layers_in_recurrent_block
        self.n_layers_in_coda = n_layers_in_coda
        self.mean_recurrence = mean_recurrence
        self.qk_bias = qk_bias
        self.rope_base = rope_base
        self.norm_eps = norm_eps
        self.tie_embeddings = tie_embeddings
        self.use_cache = use_cache

    @property
    def num_hidden_layers(self) -> int:
        """How often a block runs: so many layers has a cache of `mean_recurrence` steps."""
        return self.num_slots(self.mean_recurrence)

    def num_slots(self, num_steps: int) -> int:
        """Return the number of layers of a cache of so many steps."""
        once = self.n_layers_in_prelude + self.n_layers_in_coda
        return once + num_steps * self.n_layers_in_recurrent_block


def widen(x: Tensor) -> Tensor:
    """Return x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim)."""
        return F.rms_norm(widen(x), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class Tokens:
    """What the blocks must know of the tokens of a call.

    Attributes:
        position_BT: of each token in its text.
        angles: cos and sin of RoPE, each (B, T, 1, K / 2).
        mask: what each token sees of the S tokens, bool (B, 1, T, S).
        cache: keys and values of the tokens before; None if there is none.
    """

    def __init__(
        self, config: RavenConfig, real_BS: Tensor, num_new: int, cache: DynamicCache | None
    ) -> None:
        S, device = real_BS.shape[1], real_BS.device
        self.cache = cache
        self.position_BT = (real_BS.cumsum(1) - 1).clamp(min=0)[:, -num_new:]
        index_S = torch.arange(S, device=device)
        index_T1 = index_S[-num_new:, None]
        # Padding sees itself, as nothing would leave it without a number.
        visible_BTS = real_BS[:, None] & (index_S <= index_T1) | (index_S == index_T1)
        self.mask = visible_BTS[:, None]
        head_dim = config.n_embd // config.n_heads
        exponent_R = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        angle = self.position_BT[..., None, None] * config.rope_base**-exponent_R
        self.angles = angle.cos(), angle.sin()


class Attention(nn.Module):
    """Softmax attention with RoPE; row by row Wqkv holds queries, keys and values."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        dim, self.num_heads = config.n_embd, config.n_heads
        self.Wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        biases = torch.zeros(2, 1, self.num_heads, dim // self.num_heads)
        self.qk_bias = nn.Parameter(biases) if config.qk_bias else None

    def forward(self, x_BTD: Tensor, tokens: Tokens, slot: int) -> Tensor:
        """Mix the tokens; `slot` is the layer of the cache."""
        q, k, v = self.Wqkv(x_BTD).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if self.qk_bias is not None:
            q, k = q + self.qk_bias[0], k + self.qk_bias[1]
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, tokens), rotate(k, tokens), v))
        if tokens.cache is not None:
            k, v = tokens.cache.update(k, v, slot)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=tokens.mask)
        return self.proj(y_BHTK.transpose(1, 2).flatten(2))


def rotate(x_BTHK: Tensor, tokens: Tokens) -> Tensor:
    """Turn dimensions 2r and 2r + 1 of each head by position * base^(-2r / K)."""
    cos, sin = tokens.angles
    first, second = x_BTHK.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.flatten(-2).to(x_BTHK.dtype)


class MLP(nn.Module):
    """proj(silu(a) * b), a and b being the halves of fc x."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        a, b = self.fc(x).chunk(2, -1)
        return self.proj(F.silu(a) * b)


class Block(nn.Module):
    """x = norm_2(x + attn(norm_1 x)); x = norm_4(x + mlp(norm_3 x))."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        dim, eps = config.n_embd, config.norm_eps
        self.norm_1, self.norm_2 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.norm_3, self.norm_4 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, tokens: Tokens, slot: int) -> Tensor:
        """Return x (B, T, D); `slot` is the layer of the cache."""
        x_BTD = self.norm_2(x_BTD + self.attn(self.norm_1(x_BTD), tokens, slot))
        return self.norm_4(x_BTD + self.mlp(self.norm_3(x_BTD)))


class RavenForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, prelude, the looped core, coda, norm, and a head that predicts the next token."""

    config: RavenConfig
    config_class = RavenConfig
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _keys_to_ignore_on_load_unexpected = ["freqs_cis"]

    def __init__(self, config: RavenConfig) -> None:
        super().__init__(config)
        dim = config.n_embd

        def blocks(number: int) -> nn.ModuleList:
            return nn.ModuleList(Block(config) for _ in range(number))

        self.transformer: Any = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, dim),
                "prelude": blocks(config.n_layers_in_prelude),
                "adapter": nn.Linear(2 * dim, dim, bias=False),
                "core_block": blocks(config.n_layers_in_recurrent_block),
                "coda": blocks(config.n_layers_in_coda),
                "ln_f": RMSNorm(dim, config.norm_eps),
            }
        )
        self.lm_head: nn.Module = nn.Linear(dim, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # Its size depends on num_steps: forward() makes it.

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_steps: int | None = None,
        input_states: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits, and with labels the loss.

        Args:
            input_ids: int64 (B, T).
            attention_mask: (B, S), of the cached tokens and these: 0 for padding, on any side.
            past_key_values: what an earlier call with as many steps returned, to go on from it.
            labels: int64 (B, T), the same tokens as input_ids, -100 for those that do not count.
            use_cache: return keys and values; by default as the config says.
            logits_to_keep: compute only the last so many logits (0: all), or those at positions.
            return_dict: False for a tuple.
            num_steps: how often the core runs; by default mean_recurrence.
            input_states: s_0 of these tokens, (B, T, D); by default drawn from their positions.
            kwargs: of the loss function.

        Returns:
            logits (B, T, vocab_size) in at least float32, the mean loss in nats a token, and the
            cache.

        Raises:
            ValueError: a mask or states of another shape, no step, or not as many as in the cache.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        num_steps = self.config.mean_recurrence if num_steps is None else num_steps
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        num_slots = self._check_steps(num_steps, cache)
        real_BS = real_tokens(input_ids, attention_mask, cache)
        tokens = Tokens(self.config, real_BS, input_ids.shape[1], cache)

        parts = self.transformer
        e_BTD = parts.wte(input_ids) * self.config.n_embd**0.5
        for slot, block in enumerate(parts.prelude):
            e_BTD = block(e_BTD, tokens, slot)
        s_BTD = initial_states(tokens.position_BT, e_BTD) if input_states is None else input_states
        if s_BTD.shape != e_BTD.shape:
            raise ValueError(
                f"input_states: got shape {tuple(s_BTD.shape)}, expected {tuple(e_BTD.shape)}"
            )
        s_BTD, slot = s_BTD.to(e_BTD.dtype), len(parts.prelude)
        for _ in range(num_steps):
            s_BTD = parts.adapter(torch.cat([s_BTD, e_BTD], -1))
            for block in parts.core_block:
                s_BTD = block(s_BTD, tokens, slot)
                slot += 1
        x_BTD = parts.ln_f(s_BTD)
        for slot, block in enumerate(parts.coda, num_slots - len(parts.coda)):
            x_BTD = block(x_BTD, tokens, slot)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = widen(self.lm_head(parts.ln_f(x_BTD)[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache if use_cache else None
        )
        return output.to_tuple() if return_dict is False else output

    def _check_steps(self, num_steps: int, cache: DynamicCache | None) -> int:
        """Return the number of slots that so many steps need of a cache."""
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: expected at least 1")
        num_slots = self.config.num_slots(num_steps)
        held = 0 if cache is None else len(cache.layers)
        if held not in (0, num_slots):
            raise ValueError(
                f"num_steps={num_steps}: needs a cache of {num_slots} layers, this one has {held}; "
                "go on with as many steps as before"
            )
        return num_slots


def real_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, cache: DynamicCache | None
) -> Tensor:
    """Return which of the cached tokens and the new ones are no padding, bool (B, S)."""
    B, T = input_ids.shape
    S = T + (0 if cache is None else cache.get_seq_length())
    if attention_mask is None:
        return torch.ones(B, S, dtype=torch.bool, device=input_ids.device)
    if attention_mask.shape != (B, S):
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected ({B}, {S}): one "
            "number for each token, cached ones too"
        )
    return attention_mask != 0


def initial_states(position_BT: Tensor, like_BTD: Tensor) -> Tensor:
    """Draw s_0 (B, T, D) from a normal of variance 2/5, cut at 3 standard deviations.

    Its bits come from hashes (splitmix64's) of position and channel, and nothing else: megarec
    evaluates models with the same numbers.
    """
    key = mix(torch.tensor(2742620967322205866, device=position_BT.device)) ^ position_BT
    channel_D = torch.arange(like_BTD.shape[-1], device=key.device)
    bits = mix(mix(key)[..., None] ^ channel_D)
    # 23 bits make a float32 in (0, 1) exactly, the half keeping it off both ends.
    uniform = ((bits >> 41 & 0x7FFFFF).float() + 0.5) / 2**23
    return math.sqrt(2 / 5 * 2) * torch.erfinv(math.erf(3 / math.sqrt(2)) * (2 * uniform - 1))


def mix(x: Tensor) -> Tensor:
    """Return splitmix64's output function of int64 numbers, seen as unsigned ones."""
    x = x * -7046029254386353131
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right, zeros coming in from the left."""
    return x >> bits & (1 << 64 - bits) - 1
