"""The schema of a training run: every section, its defaults, and the rules between them."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megarec.config.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictModel,
    Tuple,
)
from megarec.config.model import ModelConfig
from megarec.config.stack import LoopedConfig


class SourceConfig(StrictModel):
    """One data source: a folder of megarec shards, or a synthetic task; `weight` mixes sources."""

    path: str | None = None
    synthetic: str | None = None
    weight: Fraction = 1.0
    args: dict[str, int | float | bool | str] = {}

    @model_validator(mode="after")
    def _one_kind(self) -> "SourceConfig":
        if (self.path is None) == (self.synthetic is None):
            raise ValueError("give either path (a folder of shards) or synthetic (a task's name)")
        if self.args and self.synthetic is None:
            raise ValueError("args are for synthetic tasks only")
        return self


class DataConfig(StrictModel):
    """Training and validation sources, by name.

    `shuffle: documents` concatenates documents in a seeded order and cuts sample i at token i*T;
    `samples` also visits the windows of each epoch in a seeded order (for few, long documents).
    `bos: eod` starts each document at the end-of-document token before it, so that its first
    token is predicted too; `none` starts it at its first token.
    """

    train: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    valid: dict[str, SourceConfig] = {}
    shuffle: Literal["documents", "samples"] = "documents"
    bos: Literal["none", "eod"] = "none"

    @model_validator(mode="after")
    def _weights(self) -> "DataConfig":
        total = sum(source.weight for source in self.train.values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the weights of train sum to {total:.6g}, expected 1")
        return self


class TokenizerConfig(StrictModel):
    """`byte` (256 bytes and one end-of-document token), or the path of a tokenizer.json."""

    path: str = "byte"


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(StrictModel):
    """The optimizer, with decoupled weight decay on matrices; `grad_clip` is a norm.

    `adamw` (arXiv 1711.05101) takes lr * `weight_decay` of a weight each step. `ellis_adam`
    (Huginn, arXiv 2502.05171) takes `weight_decay` itself at the peak learning rate, and in
    proportion elsewhere on the schedule; what is not given is 4e-5, and 1e-6 for `eps`.
    `decay_embeddings` has the embedding decay as well.

    `lr_scale` maps globs of parameter names (`blocks.3.mixer.*`) to factors on the learning rate;
    the first that matches counts, and 0 freezes.
    """

    type: Literal["adamw", "ellis_adam"] = "adamw"
    lr: PositiveFloat
    betas: Annotated[tuple[Beta, Beta], Tuple] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    decay_embeddings: bool = False
    grad_clip: PositiveFloat | None = 1.0
    lr_scale: dict[str, NonNegativeFloat] = {}

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_type(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") == "ellis_adam":
            return {"eps": 1e-6, "weight_decay": 4e-5} | values
        return values

    @model_validator(mode="after")
    def _decay_leaves_something(self) -> "OptimizerConfig":
        if self.type == "ellis_adam" and self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay={self.weight_decay:g}: ellis_adam multiplies weights by "
                "1 - weight_decay; expected a number below 1, AdamW's lr * weight_decay say"
            )
        return self


class ScheduleConfig(StrictModel):
    """Learning rate over the run: linear warm-up, a decay, and a linear cool-down to zero.

    `cosine` and `exponential` fall to lr * `final_lr_ratio` where the cool-down begins; `wsd` and
    `constant` hold the peak until then (for `wsd` the cool-down must not be empty).
    """

    type: Literal["cosine", "exponential", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    cooldown_steps: NonNegativeInt = 0
    final_lr_ratio: Fraction = 0.1

    @model_validator(mode="after")
    def _fits_the_type(self) -> "ScheduleConfig":
        if self.type == "wsd" and self.cooldown_steps == 0:
            raise ValueError("wsd needs cooldown_steps > 0; 'constant' has no cool-down")
        if self.type == "exponential" and self.final_lr_ratio == 0:
            raise ValueError("exponential never reaches final_lr_ratio=0; give a ratio above 0")
        return self


class NonFiniteConfig(StrictModel):
    """What a non-finite loss or gradient does: stop, or skip the update, so many times in a row."""

    policy: Literal["stop", "skip"] = "stop"
    max_consecutive: PositiveInt = 5


class TrainConfig(StrictModel):
    """Steps and batch. One step reads `global_batch_size` samples of `seq_len` tokens."""

    steps: PositiveInt
    seq_len: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    init_from: str | None = None
    nonfinite: NonFiniteConfig = NonFiniteConfig()
    step_timeout_seconds: PositiveInt = 1800


SAVED_OPS = (
    *("mm", "addmm", "bmm", "baddbmm"),
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    *("all_gather_into_tensor", "reduce_scatter_tensor"),
)
"""What `selective` keeps unless told: matmuls, attention, collectives; by their names in torch."""


class ParallelConfig(StrictModel):
    """The mesh, `pp` x `dp_replicate` x `dp_shard` x `cp` x `tp` processes, and what runs on it.

    Parameters are sharded `dp_shard` ways (-1: what is left) and replicated. `tp` divides heads,
    channels, FFNs and the vocabulary, and the tokens between them. `pp` splits the layers into
    `pp_stages_per_rank` stages a rank, run by `pp_schedule`. `cp` is 1: it is not built yet.
    `reshard_after_forward` frees gathered parameters after the forward pass; by default so, but
    not in a pipeline, which would gather them for each micro-batch.

    `activation_checkpointing` recomputes each block (`full`), all of it but the results of
    `saved_ops` (`selective`), or each recurrence of a looped stack as a whole (`recurrence`).
    `saved_ops` are names in torch.ops.aten or of functional collectives; ops of megarec_kernels
    with a backward of their own are recomputed whatever they consist of.
    `compile` compiles each block by torch.compile, which takes minutes at the start of a run.
    `hold_core` keeps a looped core gathered over its recurrences; false gathers each of its blocks
    anew, which costs less memory and much communication.
    """

    pp: PositiveInt = 1
    dp_replicate: PositiveInt = 1
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    cp: PositiveInt = 1
    tp: PositiveInt = 1
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"] = "1f1b"
    pp_stages_per_rank: PositiveInt | None = None
    reshard_after_forward: bool | None = None
    hold_core: bool = True
    activation_checkpointing: Literal["none", "selective", "full", "recurrence"] = "none"
    saved_ops: Annotated[tuple[str, ...], Tuple, Field(min_length=1)] = SAVED_OPS
    compile: bool = False

    @property
    def stages_per_rank(self) -> int:
        """The number of stages of a rank: as given, or the fewest that the schedule takes."""
        fewest = {"interleaved_1f1b": 2, "zbv": 2}.get(self.pp_schedule, 1)
        return self.pp_stages_per_rank or fewest

    @property
    def reshards_after_forward(self) -> bool:
        """Whether gathered parameters are freed after the forward pass."""
        given = self.reshard_after_forward
        return self.pp == 1 if given is None else given

    @model_validator(mode="after")
    def _possible(self) -> "ParallelConfig":
        problems = []
        if self.dp_shard == 0:
            problems.append("dp_shard=0: expected a positive number, or -1 for what is left")
        if self.cp > 1:
            problems.append(f"cp={self.cp}: sequence parallelism is not built yet; set cp=1")
        checkpointing = self.activation_checkpointing
        if self.saved_ops != SAVED_OPS and checkpointing != "selective":
            problems.append(
                f"saved_ops: activation_checkpointing={checkpointing} keeps none of them; set it "
                "to selective or leave saved_ops out"
            )
        schedule, stages = self.pp_schedule, self.stages_per_rank
        if schedule in ("gpipe", "1f1b") and stages > 1:
            problems.append(
                f"pp_stages_per_rank={stages}: {schedule} runs one stage a rank; "
                "set pp_schedule=interleaved_1f1b"
            )
        if schedule == "interleaved_1f1b" and stages < 2 or schedule == "zbv" and stages != 2:
            few = "2" if schedule == "zbv" else "2 or more"
            problems.append(f"pp_stages_per_rank={stages}: {schedule} runs {few} stages a rank")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class PrecisionConfig(StrictModel):
    """Compute dtype. Master weights, optimizer, reductions, gates and norms stay in float32."""

    compute: Literal["float32", "bfloat16"] = "float32"


class CheckpointConfig(StrictModel):
    """When to save, how many to keep (`keep_every`: steps kept for good), and how to verify."""

    every: PositiveInt = 1000
    keep_last: Annotated[int, Field(ge=2)] = 2
    keep_every: PositiveInt | None = None
    asynchronous: bool = False
    verify: Literal["auto", "full", "size"] = "auto"
    on_save_error: Literal["stop", "continue"] = "stop"


class EvaluationConfig(StrictModel):
    """Loss on data.valid every so many steps (null: only at the start and the end).

    `num_recurrences`: of a looped stack, also the loss at each of these.
    """

    every: PositiveInt | None = None
    max_samples: PositiveInt | None = None
    num_recurrences: Annotated[tuple[PositiveInt, ...], Tuple] = ()


class WandbConfig(StrictModel):
    """Weights & Biases; `offline` needs no network."""

    project: str
    mode: Literal["online", "offline"] = "online"


class LoggingConfig(StrictModel):
    """Metrics go to metrics.jsonl always, to the others when asked."""

    every: PositiveInt = 1
    wandb: WandbConfig | None = None
    tensorboard: bool = False


class DistillConfig(StrictModel):
    """Learn from a frozen teacher instead of the labels alone (arXiv 1503.02531).

    The loss of a token is kl_weight * t^2 * KL + ce_weight * cross-entropy, with `temperature` t
    on both models' logits, plus activation_weight times the mean over layers of the distance
    (L2 norm) between the two models' mixer outputs. `teacher` is a run, a step folder or a folder
    in Hugging Face format, with the student's vocabulary.
    """

    teacher: str
    divergence: Literal["forward_kl", "reverse_kl"] = "reverse_kl"
    temperature: PositiveFloat = 1.0
    kl_weight: NonNegativeFloat = 1.0
    ce_weight: NonNegativeFloat = 0.0
    activation_weight: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _something_to_learn(self) -> "DistillConfig":
        if self.kl_weight == self.activation_weight == 0:
            raise ValueError("kl_weight and activation_weight are both 0: the teacher has no say")
        return self


class Config(StrictModel):
    """A training run. `name` is its folder under runs/.

    `imports` names modules to import before the rest is read, which register mixers of one's own.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    imports: Annotated[tuple[str, ...], Tuple] = ()
    seed: NonNegativeInt = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    distill: DistillConfig | None = None
    hooks: Annotated[tuple[str, ...], Tuple] = ("progress", "plot")

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        ramps = self.schedule.warmup_steps + self.schedule.cooldown_steps
        # A short trial may well end inside the warm-up; a cool-down needs its whole length.
        if self.schedule.cooldown_steps and ramps > self.train.steps:
            raise ValueError(
                f"schedule: warmup_steps + cooldown_steps = {ramps} exceeds "
                f"train.steps = {self.train.steps}"
            )
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train: micro_batch_size={self.train.micro_batch_size} does not divide "
                f"global_batch_size={self.train.global_batch_size}"
            )
        of_loops = {
            "parallel.activation_checkpointing=recurrence": (
                self.parallel.activation_checkpointing == "recurrence"
            ),
            "evaluation.num_recurrences": self.evaluation.num_recurrences != (),
        }
        given = [key for key, is_given in of_loops.items() if is_given]
        if given and not isinstance(self.model.stack, LoopedConfig):
            raise ValueError(f"{', '.join(given)}: model.stack is not looped; leave it out")
        problems = self._parallel_problems()
        if problems:
            raise ValueError("\n".join(problems))
        longest = self.model.max_seq_len
        if longest is not None and self.train.seq_len > longest:
            raise ValueError(
                f"train.seq_len={self.train.seq_len}: max_seq_len={longest} of an attention mixer "
                "is shorter; raise it or shorten the samples"
            )
        return self

    def _parallel_problems(self) -> list[str]:
        """Say what of model, batch and objective does not fit the mesh, one line each."""
        tp, problems = self.parallel.tp, []
        if tp > 1:
            problems += [f"model.{line}" for line in self.model.tp_problems(tp)]
            if self.train.seq_len % tp:
                problems.append(
                    f"train.seq_len={self.train.seq_len}: parallel.tp={tp} does not divide it; "
                    "tokens between mixers are spread over the ranks"
                )
        if self.parallel.pp == tp == 1:
            return problems
        where = "parallel.pp=1 and parallel.tp=1"
        stack = self.model.stack
        if isinstance(stack, LoopedConfig) and stack.halt is not None:
            problems.append(
                f"model.stack.halt={stack.halt.type}: its losses and logits need all of the "
                f"model and of the tokens; set {where}"
            )
        if self.distill is not None:
            problems.append(
                "distill: student and teacher need all of their layers and channels in one place; "
                f"set {where}"
            )
        return problems
