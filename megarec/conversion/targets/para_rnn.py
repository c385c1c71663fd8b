"""ParaRNN (arXiv 2510.21450): ParaGRU and ParaLSTM, with a modeling file of ours."""

from megarec.config.model import ModelConfig
from megarec.conversion.own import OwnTarget


class ParaRNN(OwnTarget):
    """Models whose every mixer is para_gru or para_lstm, with any FFNs or none."""

    model_type = "megarec_para_rnn"
    modeling_file = "modeling_para_rnn.py"
    config_class = "ParaRNNConfig"
    model_class = "ParaRNNForCausalLM"
    mixers = {"para_gru": "mixer", "para_lstm": "mixer"}

    def notes(self, config: ModelConfig) -> list[str]:
        """Tell of padding, document boundaries and speed; see Target."""
        return [
            "Texts of unequal length in one batch: pad them on the left "
            '(`tokenizer.pad_token = tokenizer.eos_token`, `tokenizer.padding_side = "left"`) and '
            "pass the `attention_mask`. Padding changes no result.",
            "The state is not reset inside a row: run one document a row.",
            "The modeling file walks through the tokens one by one, which is exact and takes "
            "constant memory a token, but trains slowly. megarec imports this folder, and trains "
            "all tokens at once.",
        ]
