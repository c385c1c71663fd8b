"""Feed-forward networks."""

from megarec_kernels.swiglu import swiglu
from torch import Tensor, nn
from torch.nn import functional as F

from megarec.config.model import FFNConfig
from megarec.models.init import Initializer


class FFN(nn.Module):
    """down(act(up x)), or gated down(silu(gate x) * up x), without biases.

    The kinds of FFNConfig: SwiGLU (arXiv 2002.05202, eq. 6), squared ReLU (arXiv 2109.08668,
    section 3.1) and GELU (arXiv 1606.08415).
    """

    def __init__(self, config: FFNConfig, d_model: int) -> None:
        super().__init__()
        self.activation = config.type
        self.gate = nn.Linear(d_model, config.d_ff, bias=False) if config.gated else None
        self.up = nn.Linear(d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., d_model) to (..., d_model)."""
        hidden = self.up(x)
        if self.gate is not None:
            hidden = swiglu(self.gate(x), hidden)
        elif self.activation == "squared_relu":
            hidden = F.relu(hidden).square()
        else:
            hidden = F.gelu(hidden)
        return self.down(hidden)

    def tp_plan(self) -> dict[str, str]:
        """Split by channels between the layers; see Mixer.tp_plan."""
        return {"gate.weight": "column", "up.weight": "column", "down.weight": "row"}

    def init_weights(self, init: Initializer) -> None:
        """Draw gate and up with std, down with out_std."""
        for linear in (self.gate, self.up):
            if linear is not None:
                init.normal(linear.weight, init.std)
        init.normal(self.down.weight, init.out_std)
