"""The model section: blocks, their pattern, the head; sizes are computed without building."""

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, model_validator

from megarec.config.base import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    StrictModel,
    Tuple,
)
from megarec.config.mixer import MixerConfig


class FFNConfig(StrictModel):
    """A feed-forward network; `swiglu` is down(silu(gate x) * up x), without biases."""

    type: Literal["swiglu"] = "swiglu"
    d_ff: PositiveInt

    def num_params(self, d_model: int) -> int:
        """Return the number of parameters."""
        return 3 * d_model * self.d_ff

    def flops_per_token(self, d_model: int) -> float:
        """Return the FLOPs of the forward pass, per token."""
        return 2.0 * self.num_params(d_model)


class BlockConfig(StrictModel):
    """One kind of block: x += mixer(norm(x)); then x += ffn(norm(x)) where there is an ffn."""

    mixer: SerializeAsAny[MixerConfig]
    ffn: FFNConfig | None = None

    def num_params(self, d_model: int) -> int:
        """Return the number of parameters, norms included."""
        total = d_model + self.mixer.num_params(d_model)
        return total if self.ffn is None else total + d_model + self.ffn.num_params(d_model)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """Return the FLOPs of the forward pass, per token (norms are not counted)."""
        ffn = 0.0 if self.ffn is None else self.ffn.flops_per_token(d_model)
        return self.mixer.flops_per_token(d_model, seq_len) + ffn


class StackConfig(StrictModel):
    """How the blocks are arranged; `sequential` runs each once, in order."""

    type: Literal["sequential"] = "sequential"


class HeadConfig(StrictModel):
    """The language-model head and its loss.

    `soft_cap` c maps logits to c * tanh(logits / c); `z_loss` weighs logsumexp(logits)^2 in the
    training loss; `chunk_size` is the number of tokens whose logits exist at one time.
    """

    soft_cap: PositiveFloat | None = None
    tie_embeddings: bool = False
    z_loss: NonNegativeFloat = 0.0
    chunk_size: PositiveInt = 2048


class NormConfig(StrictModel):
    """RMSNorm, computed in float32 at least."""

    type: Literal["rms_norm"] = "rms_norm"
    eps: PositiveFloat = 1e-6


class InitConfig(StrictModel):
    """Standard deviations of the normal initialisation of weight matrices.

    `std`: a number, or `small` = sqrt(2 / (5 d_model)) (arXiv 1910.05895). `out_std`, for the
    matrices that write to the residual stream: a number, or `wang` = 2 / num_layers /
    sqrt(d_model) (mesh-transformer-jax; used by GPT-NeoX, arXiv 2204.06745).
    """

    std: PositiveFloat | Literal["small"] = "small"
    out_std: PositiveFloat | Literal["wang"] = "wang"


class ModelConfig(StrictModel):
    """The whole model; `pattern` names blocks and is cycled over the layers."""

    vocab_size: PositiveInt
    d_model: PositiveInt
    num_layers: PositiveInt
    blocks: Annotated[dict[str, BlockConfig], Field(min_length=1)]
    pattern: Annotated[tuple[str, ...], Tuple, Field(min_length=1)]
    stack: StackConfig = StackConfig()
    head: HeadConfig = HeadConfig()
    norm: NormConfig = NormConfig()
    init: InitConfig = InitConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelConfig":
        problems = [
            f"pattern: no block is called '{name}'; blocks: {', '.join(self.blocks)}"
            for name in dict.fromkeys(self.pattern)
            if name not in self.blocks
        ]
        if self.num_layers % len(self.pattern):
            problems.append(
                f"pattern: {len(self.pattern)} names do not divide num_layers={self.num_layers}; "
                "list as many as there are layers, or a divisor of it"
            )
        for name, block in self.blocks.items():
            where = f"blocks.{name}.mixer"
            problems += [f"{where}.{line}" for line in block.mixer.problems(self.d_model)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def layers(self) -> list[BlockConfig]:
        """The block of each layer, first to last."""
        return [self.blocks[self.pattern[i % len(self.pattern)]] for i in range(self.num_layers)]

    def num_params(self) -> int:
        """Return the number of parameters of the model; tied embeddings count once."""
        embedding = self.vocab_size * self.d_model
        head = 0 if self.head.tie_embeddings else embedding
        blocks = sum(block.num_params(self.d_model) for block in self.layers)
        return embedding + blocks + self.d_model + head

    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of one training step per token: forward, and twice that backward."""
        blocks = sum(block.flops_per_token(self.d_model, seq_len) for block in self.layers)
        return 3.0 * (blocks + 2.0 * self.vocab_size * self.d_model)

    def state_bytes(self, seq_len: int) -> int:
        """Return the bytes of one sequence's decoding state after seq_len tokens."""
        return sum(block.mixer.state_bytes(self.d_model, seq_len) for block in self.layers)
