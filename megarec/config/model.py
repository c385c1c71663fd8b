"""The model section: blocks, their pattern, the head; sizes are computed without building."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from megarec.config.activations import Activations, Numbers, rms_norm
from megarec.config.base import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    StrictModel,
)
from megarec.config.mixer import MixerConfig
from megarec.config.stack import SequentialConfig, StackConfig, repeated


def _names(value: Any) -> Any:
    """Turn a list, or a string of one-character names, into a tuple."""
    if not isinstance(value, list | tuple | str):
        raise ValueError("expected a list of block names, or a string of one-character names")
    return tuple(value)


class FFNConfig(StrictModel):
    """A feed-forward network without biases.

    `swiglu` is down(silu(gate x) * up x), `squared_relu` down(relu(up x)^2), and `gelu`
    down(gelu(up x)), with the exact (erf) gelu.
    """

    type: Literal["swiglu", "squared_relu", "gelu"] = "swiglu"
    d_ff: PositiveInt

    @property
    def gated(self) -> bool:
        """Whether there is a gate matrix beside up and down."""
        return self.type == "swiglu"

    def num_params(self, d_model: int) -> int:
        """Return the number of parameters."""
        return (2 + self.gated) * d_model * self.d_ff

    def flops_per_token(self, d_model: int) -> float:
        """Return the FLOPs of the forward pass, per token."""
        return 2.0 * self.num_params(d_model)

    def activations(self, d_model: int) -> Activations:
        """Return what the backward pass needs, a token."""
        hidden = 3 if self.gated else 2
        return Activations(
            kept=Numbers(narrow=d_model + hidden * self.d_ff),
            saved=Numbers(narrow=(1 + self.gated) * self.d_ff + d_model),
            work=Numbers(narrow=2 * self.d_ff),
        )


class BlockConfig(StrictModel):
    """One kind of block: x += s * mixer(norm(x)), then x += s * ffn(norm(x)).

    Either may be missing, as in Nemotron-H, whose every layer holds one of the two.
    `norm_placement`, n and n' being norms and f the mixer or the FFN: `pre` is x + s f(n(x));
    `post` n'(x + s f(x)), as in the first transformers; `sandwich` n'(x + s f(n(x))), as in Huginn
    (arXiv 2502.05171); `peri` x + s n'(f(n(x))) (arXiv 2502.02732), as in Gemma 2 and Ouro.
    `residual_scale` is s; `layer_scale` makes it a learned weight a channel beside, at first this
    (arXiv 2103.17239). `learned_skip` multiplies the x that the mixer's output is added to by
    a learned weight a channel, at first 1 (ParaRNN, arXiv 2510.21450, App. C.1).
    """

    mixer: SerializeAsAny[MixerConfig] | None = None
    ffn: FFNConfig | None = None
    norm_placement: Literal["pre", "post", "sandwich", "peri"] = "pre"
    residual_scale: PositiveFloat = 1.0
    layer_scale: PositiveFloat | None = None
    learned_skip: bool = False

    @model_validator(mode="after")
    def _not_empty(self) -> "BlockConfig":
        if self.mixer is None and self.ffn is None:
            raise ValueError("a block needs a mixer, an ffn or both")
        if self.mixer is None and self.learned_skip:
            raise ValueError("learned_skip=true: the block has no mixer to skip")
        return self

    def num_params(self, d_model: int) -> int:
        """Return the number of parameters, norms included."""
        parts = [part for part in (self.mixer, self.ffn) if part is not None]
        skip = d_model if self.learned_skip else 0
        norms = 2 if self.norm_placement in ("sandwich", "peri") else 1
        vectors = norms + (self.layer_scale is not None)
        return skip + sum(vectors * d_model + part.num_params(d_model) for part in parts)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """Return the FLOPs of the forward pass, per token (norms are not counted)."""
        mixer = 0.0 if self.mixer is None else self.mixer.flops_per_token(d_model, seq_len)
        return mixer + (0.0 if self.ffn is None else self.ffn.flops_per_token(d_model))

    def activations(self, d_model: int, seq_len: int, tp: int = 1) -> Activations:
        """Return what the backward pass needs, a token; what the block reads included.

        Of `tp` ranks each has some of the channels, or between mixer and FFN of the tokens. But
        each reads all tokens there, and makes outputs of all, which are yet to be added up.
        """
        whole = self._activations(d_model, seq_len)
        branches = (self.mixer is not None) + (self.ffn is not None)
        # By how much the tokens of all ranks are more than those of one.
        others = Numbers(narrow=d_model * (1 - 1 / tp))
        gathered = Numbers(narrow=branches * others.narrow)
        return Activations(
            kept=whole.kept / tp + gathered,
            saved=whole.saved / tp + gathered + gathered,
            work=whole.work / tp + others + others,
        )

    def _activations(self, d_model: int, seq_len: int) -> Activations:
        total = Activations()
        if self.mixer is not None:
            total += self._branch(d_model, self.mixer.activations(d_model, seq_len))
        if self.ffn is not None:
            total += self._branch(d_model, self.ffn.activations(d_model))
        skip = Numbers(narrow=d_model if self.learned_skip else 0)
        return total + Activations(kept=skip)

    def _branch(self, d_model: int, inner: Activations) -> Activations:
        """Add the norms and scales around a mixer or FFN, and the residual stream's gradient."""
        norms = 2 if self.norm_placement in ("sandwich", "peri") else 1
        kept = Numbers(narrow=d_model if self.layer_scale is not None else 0)
        for _ in range(norms):
            kept += rms_norm(d_model)
        work = inner.work + Numbers(narrow=2 * d_model)
        return Activations(inner.kept + kept, inner.saved, work)


class HeadConfig(StrictModel):
    """The language-model head and its loss.

    `logit_scale` multiplies the logits; then `soft_cap` c maps them to c * tanh(logits / c).
    `z_loss` weighs logsumexp(logits)^2 in the training loss; `chunk_size` is the number of tokens
    whose logits exist at one time.
    """

    logit_scale: PositiveFloat = 1.0
    soft_cap: PositiveFloat | None = None
    tie_embeddings: bool = False
    z_loss: NonNegativeFloat = 0.0
    chunk_size: PositiveInt = 2048


class NormConfig(StrictModel):
    """RMSNorm, computed in float32 at least."""

    type: Literal["rms_norm"] = "rms_norm"
    eps: PositiveFloat = 1e-6


class InitConfig(StrictModel):
    """The normal initialisation of weight matrices, `cut` at so many standard deviations if at all.

    `std`: a number, or `small` = sqrt(2 / (5 d_model)) (arXiv 1910.05895). `out_std`, for the
    matrices that write to the residual stream: a number, `wang` = 2 / num_layers / sqrt(d_model)
    (mesh-transformer-jax; used by GPT-NeoX, arXiv 2204.06745), or `depth` = std /
    sqrt(2 num_layers) (GPT-2; used by Megatron-LM). In a looped stack a layer counts as often as
    it runs (arXiv 2502.05171, section 4.1).
    """

    std: PositiveFloat | Literal["small"] = "small"
    out_std: PositiveFloat | Literal["wang", "depth"] = "wang"
    cut: PositiveFloat | None = None


class ModelConfig(StrictModel):
    """The whole model.

    `pattern` names the block of each layer, and is cycled over the layers if it is shorter. A
    string is a name a character, as in Nemotron-H's `M-M*-`. `embedding_scale` multiplies the
    embeddings.
    """

    vocab_size: PositiveInt
    d_model: PositiveInt
    num_layers: PositiveInt
    blocks: Annotated[dict[str, BlockConfig], Field(min_length=1)]
    pattern: Annotated[tuple[str, ...], BeforeValidator(_names), Field(min_length=1)]
    embedding_scale: PositiveFloat = 1.0
    stack: SerializeAsAny[StackConfig] = SequentialConfig()
    head: HeadConfig = HeadConfig()
    norm: NormConfig = NormConfig()
    init: InitConfig = InitConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelConfig":
        problems = self._pattern_problems()
        problems += [f"stack.{line}" for line in self.stack.problems(self.num_layers)]
        for name, block in self.blocks.items():
            if block.mixer is not None:
                where = f"blocks.{name}.mixer"
                problems += [f"{where}.{line}" for line in block.mixer.problems(self.d_model)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _pattern_problems(self) -> list[str]:
        count, unknown = len(self.pattern), [n for n in self.pattern if n not in self.blocks]
        if unknown and "".join(self.pattern) in self.blocks:
            name = "".join(self.pattern)
            return [f"pattern: '{name}' is read as {count} one-character names; write [{name}]"]
        problems = []
        if unknown:
            names = ", ".join(f"'{name}'" for name in dict.fromkeys(unknown))
            problem = f"pattern: no block is called {names}; blocks: {', '.join(self.blocks)}"
            if all(len(name) == 1 for name in self.pattern):
                problem += "; a string is one block name a character, a list takes any names"
            problems.append(problem)
        if self.num_layers % count:
            problems.append(
                f"pattern: {count} names do not divide num_layers={self.num_layers}; "
                "list as many as there are layers, or a divisor of it"
            )
        return problems

    @property
    def mixers(self) -> list[MixerConfig]:
        """The mixer of each layer that has one, first to last."""
        return [block.mixer for block in self.layers if block.mixer is not None]

    @property
    def max_seq_len(self) -> int | None:
        """The longest document that every mixer can hold; None where there is no bound."""
        bounds = [mixer.longest_document() for mixer in self.mixers]
        return min((bound for bound in bounds if bound is not None), default=None)

    @property
    def layers(self) -> list[BlockConfig]:
        """The block of each layer, first to last."""
        return [self.blocks[self.pattern[i % len(self.pattern)]] for i in range(self.num_layers)]

    @property
    def runs(self) -> list[BlockConfig]:
        """The block of each run of a forward pass; a looped core's stand here several times."""
        times = self.stack.times_run(self.num_layers)
        return [block for block, n in zip(self.layers, times, strict=True) for _ in range(int(n))]

    def tp_problems(self, tp: int) -> list[str]:
        """Say what `tp` ranks cannot divide evenly, one line each; empty when all is well."""
        problems = []
        for name in dict.fromkeys(self.pattern):
            block, sizes = self.blocks[name], {}
            if block.mixer is not None:
                of_mixer = block.mixer.tp_sizes()
                if of_mixer is None:
                    problems.append(
                        f"blocks.{name}.mixer: {block.mixer.type} does not say what tensor "
                        "parallelism may divide (tp_sizes); set parallel.tp=1"
                    )
                sizes = {f"mixer.{key}": size for key, size in (of_mixer or {}).items()}
            if block.ffn is not None:
                sizes["ffn.d_ff"] = block.ffn.d_ff
            problems += [
                f"blocks.{name}.{key}={size}: parallel.tp={tp} does not divide it"
                for key, size in sizes.items()
                if size % tp
            ]
        if self.vocab_size % tp:
            problems.append(
                f"vocab_size={self.vocab_size}: parallel.tp={tp} does not divide it; "
                f"{-(-self.vocab_size // tp) * tp} does, with ids that no text uses"
            )
        return problems

    def num_params(self) -> int:
        """Return the number of parameters of the model; tied embeddings count once."""
        embedding = self.vocab_size * self.d_model
        head = 0 if self.head.tie_embeddings else embedding
        blocks = sum(block.num_params(self.d_model) for block in self.layers)
        beside = self.stack.num_params(self.d_model) + self.d_model
        return embedding + blocks + beside + head

    def flops_per_token(self, seq_len: int, num_recurrences: float | None = None) -> float:
        """Return the FLOPs of one training step per token: forward, and twice that backward.

        `num_recurrences` is that of a looped stack, by default its mean in training.
        """
        stack, depth = self.stack, self.num_layers
        if num_recurrences is None:
            num_recurrences = stack.training_recurrences()
        blocks = [block.flops_per_token(self.d_model, seq_len) for block in self.layers]
        forward = repeated(blocks, stack.times_run(depth, num_recurrences))
        trained = repeated(blocks, stack.times_trained(depth, num_recurrences))
        beside = stack.flops_per_token(self.d_model, num_recurrences)
        beside += 2.0 * self.vocab_size * self.d_model
        return forward + 2.0 * trained + 3.0 * beside

    def state_bytes(self, seq_len: int) -> int:
        """Return the bytes of one sequence's decoding state after seq_len tokens."""
        blocks = [
            0 if block.mixer is None else block.mixer.state_bytes(self.d_model, seq_len)
            for block in self.layers
        ]
        kept = self.stack.states_kept(self.num_layers)
        return sum(b * n for b, n in zip(blocks, kept, strict=True)) + self.stack.state_bytes()
