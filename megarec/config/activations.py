"""What the backward pass needs of a forward pass: numbers a token, counted without building.

A part of a model counts what it reads and what it makes in between; its result is counted by who
reads it. All is of the plain PyTorch paths, in rows of several documents.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Numbers:
    """So many numbers a token.

    Attributes:
        narrow: in the compute dtype.
        wide: in float32, whatever the compute dtype is.
        copies: float32 copies of narrow ones; none where those are float32 themselves.
    """

    narrow: float = 0.0
    wide: float = 0.0
    copies: float = 0.0

    def __add__(self, other: "Numbers") -> "Numbers":
        """Add each kind to its own."""
        return Numbers(
            self.narrow + other.narrow, self.wide + other.wide, self.copies + other.copies
        )

    def __sub__(self, other: "Numbers") -> "Numbers":
        """Take each kind from its own."""
        return Numbers(
            self.narrow - other.narrow, self.wide - other.wide, self.copies - other.copies
        )

    def __truediv__(self, ranks: int) -> "Numbers":
        """Divide each kind."""
        return Numbers(self.narrow / ranks, self.wide / ranks, self.copies / ranks)

    def bytes(self, width: int) -> float:
        """Return the bytes a token, numbers of the compute dtype having `width`."""
        return width * self.narrow + 4 * self.wide + (4 * self.copies if width < 4 else 0)


@dataclass(frozen=True)
class Activations:
    """What a mixer, an FFN or a block holds for its backward pass.

    Attributes:
        kept: from the forward to the backward pass, what it reads included.
        saved: what is left of that, or besides, where all but the results of matmuls and of
            attention is computed again (`selective`).
        work: by how much its backward pass, at one time, exceeds that: by gradients, and what an op
            with a backward of its own computes anew.
    """

    kept: Numbers = Numbers()
    saved: Numbers = Numbers()
    work: Numbers = Numbers()

    def __add__(self, other: "Activations") -> "Activations":
        """Add a part that runs after this one: when this is at work, what that kept is free."""
        work = max(other.work, self.work - other.kept, key=lambda numbers: numbers.bytes(4))
        return Activations(self.kept + other.kept, self.saved + other.saved, work)


def rms_norm(width: int) -> Numbers:
    """Return what RMSNorm keeps: its input and the statistic."""
    return Numbers(narrow=width, wide=1)


def gated_group_norm(width: int, num_groups: int) -> Numbers:
    """Return what GatedGroupRMSNorm keeps beside x: the gate and the statistics.

    x is float32, and counted by who makes it.
    """
    return Numbers(narrow=width, wide=num_groups)


def causal_conv(width: int) -> Numbers:
    """Return what CausalConv keeps: its input."""
    return Numbers(narrow=width)


def linear_attention(
    num_heads: int,
    key_dim: int,
    value_dim: int,
    chunk_size: int,
    seq_len: int,
    *,
    num_groups: int | None = None,
    normalize: bool = False,
) -> Activations:
    """Return what `gated_linear_attention` keeps, y included, which its backward reads.

    The state of each chunk is kept, so small chunks cost memory; what is of size L x L is made
    anew. The gates are counted as they enter the op, and as the seven (nine) vectors it makes.
    """
    groups = num_groups or num_heads
    chunk = min(chunk_size, seq_len)
    values = value_dim + normalize
    states = num_heads * key_dim * values * (1 / chunk + 1 / seq_len)
    matrices = 3 * num_heads * chunk
    return Activations(
        kept=Numbers(
            narrow=2 * groups * key_dim + 2 * num_heads * value_dim,
            wide=states + num_heads * (9 if normalize else 7),
        ),
        work=Numbers(
            wide=states + matrices + 2 * (groups + num_heads) * key_dim + 3 * num_heads * values
        ),
    )
