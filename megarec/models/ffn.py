"""Feed-forward networks."""

from torch import Tensor, nn
from torch.nn import functional as F

from megarec.config.model import FFNConfig
from megarec.models.init import Initializer


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), without biases (arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: FFNConfig, d_model: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, config.d_ff, bias=False)
        self.up = nn.Linear(d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., d_model) to (..., d_model)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def init_weights(self, init: Initializer) -> None:
        """Draw gate and up with std, down with out_std."""
        init.normal(self.gate.weight, init.std)
        init.normal(self.up.weight, init.std)
        init.normal(self.down.weight, init.out_std)
