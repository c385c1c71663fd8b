"""Recurrent depth (arXiv 2502.05171 and relatives), with a modeling file of ours."""

from megarec.config.model import ModelConfig
from megarec.config.stack import LoopedConfig
from megarec.conversion.own import OwnTarget
from megarec.models.mixers.attention import AttentionConfig


class Looped(OwnTarget):
    """Looped stacks of attention and mLSTM in any pattern, with any FFNs or none."""

    model_type = "megarec_looped"
    modeling_file = "modeling_looped.py"
    config_class = "LoopedConfig"
    model_class = "LoopedForCausalLM"
    mixers = {"attention": "mixer", "mlstm": "mixer"}
    stacks = ("looped",)
    norm_placements = ("pre", "post", "sandwich", "peri")
    has_layer_scale = True

    def obstacles(self, config: ModelConfig) -> list[str]:
        """Name what the modeling file does not have; see Target."""
        problems = super().obstacles(config)
        for name in dict.fromkeys(config.pattern):
            mixer = config.blocks[name].mixer
            if not isinstance(mixer, AttentionConfig) or mixer.rope is None:
                continue
            if mixer.rope.scaling is not None:
                problems.append(
                    f"blocks.{name}.mixer.rope.scaling.type={mixer.rope.scaling.type}: "
                    f"{self.modeling_file} has RoPE without scaling only"
                )
        if isinstance(config.stack, LoopedConfig):
            known = {"update": ("euler", "gated", "normed"), "halt": ("act", "exit_gate")}
            for key, types in known.items():
                rule = getattr(config.stack, key)
                if rule is not None and rule.type not in types:
                    problems.append(
                        f"stack.{key}.type={rule.type}: {self.modeling_file} has "
                        f"{', '.join(types)} only"
                    )
        return problems

    def notes(self, config: ModelConfig) -> list[str]:
        """Tell of depth, padding, document boundaries and speed; see Target."""
        assert isinstance(config.stack, LoopedConfig)
        notes = [
            f"The core iterates {config.stack.num_recurrences} times; `model(..., num_steps=n)` "
            "and `model.generate(..., num_steps=n)` choose another number.",
            "The cache holds every iteration of every token.",
            "Texts of unequal length in one batch: pad them on the left "
            '(`tokenizer.pad_token = tokenizer.eos_token`, `tokenizer.padding_side = "left"`) and '
            "pass the `attention_mask`. Padding changes no result.",
            "Documents are not kept apart inside a row: run one document a row.",
        ]
        if any(mixer.type == "mlstm" for mixer in config.mixers):
            notes.append(
                "The modeling file walks through the tokens one by one where a layer is an mLSTM, "
                "which is exact, but trains slowly. megarec imports this folder, and trains all "
                "tokens at once."
            )
        return notes
