"""Rows of a report, as a Markdown table and as JSON."""

import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.protocol import MAX_LOAD, Comparison, State
from megarec.device import device_name

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "mlstm_kernels",
    "fla-core",
    "mamba-ssm",
    "liger-kernel",
    "flash-attn",
    "causal-conv1d",
)


@dataclass(frozen=True)
class Row:
    """Ours against another form: how many times as long that takes, or why nobody knows.

    Attributes:
        part: of the suite.
        case: what is computed.
        ours, theirs: the forms.
        state: "measured", or what kept us from measuring.
        reason: that, in words; of a measured row a remark.
        comparison: the figures of a measured row.
        at_least, at_most: what we aim at for the ratio.
        our_fault: the state is that of our own form.
    """

    part: str
    case: str
    ours: str
    theirs: str
    state: State = "measured"
    reason: str = ""
    comparison: Comparison | None = None
    at_least: float | None = None
    at_most: float | None = None
    our_fault: bool = False

    @property
    def value(self) -> float | None:
        """The median ratio, if there is one."""
        return self.comparison and self.comparison.ratio.median

    @property
    def load(self) -> float:
        """The machine's load meanwhile."""
        return self.comparison.load if self.comparison else 0.0


@dataclass(frozen=True)
class Quantity:
    """A number with its unit; `at_least` and `at_most` are what we aim at."""

    part: str
    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    load: float = 0.0


Result = Row | Quantity


def machine(device: torch.device) -> dict[str, str]:
    """Return the hardware and the versions that figures depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = device_name(device) if device.type != "cpu" else _processor()
    return {"device": name, "python": platform.python_version(), **versions}


def _processor() -> str:
    """Return the processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, 1 thread of {len(names)}" if names else platform.machine()


def verdict(result: Result, *, on_cpu: bool) -> str:
    """Return "met", "missed" or "" where there is no target, and "void" for what does not count.

    Void is what was timed on a processor while the machine had other work.
    """
    if result.value is None:
        return ""
    if on_cpu and result.load > MAX_LOAD:
        return "void"
    low, high = result.at_least, result.at_most
    if low is None and high is None:
        return ""
    too_low = low is not None and result.value < low
    too_high = high is not None and result.value > high
    return "missed" if too_low or too_high else "met"


def markdown(results: Sequence[Result], *, on_cpu: bool) -> str:
    """Return a table of comparisons and one of quantities."""
    rows = [r for r in results if isinstance(r, Row)]
    quantities = [r for r in results if isinstance(r, Quantity)]
    lines = []
    if rows:
        lines += _table(
            ("part", "case", "ours", "ms", "other", "ms", "ratio", "min..max", "CPU ratio")
            + ("target", "load", "remark"),
            (_row_cells(row, on_cpu) for row in rows),
        )
    if rows and quantities:
        lines.append("")
    if quantities:
        lines += _table(
            ("part", "quantity", "value", "target", "load", "remark"),
            (_quantity_cells(quantity, on_cpu) for quantity in quantities),
        )
    return "\n".join(lines)


def _row_cells(row: Row, on_cpu: bool) -> tuple[str, ...]:
    target, found = _target(row), row.comparison
    if found is None:
        remark = f"{row.state}: {row.reason}" if row.reason else row.state
        return row.part, row.case, row.ours, "", row.theirs, *[""] * 4, target, "", remark
    remarks = [text for text in (verdict(row, on_cpu=on_cpu), row.reason) if text]
    return (
        *(row.part, row.case, row.ours, _ms(found.ours.median)),
        *(row.theirs, _ms(found.theirs.median), f"{found.ratio.median:.2f}"),
        f"{found.ratio.low:.2f}..{found.ratio.high:.2f}",
        *(f"{found.processor_ratio.median:.2f}", target, f"{found.load:.1f}", ", ".join(remarks)),
    )


def _quantity_cells(quantity: Quantity, on_cpu: bool) -> tuple[str, ...]:
    value = f"{quantity.value:,.0f}" if abs(quantity.value) >= 1000 else f"{quantity.value:.3g}"
    return (
        *(quantity.part, quantity.name, f"{value} {quantity.unit}".strip(), _target(quantity)),
        *(f"{quantity.load:.1f}" if quantity.load else "", verdict(quantity, on_cpu=on_cpu)),
    )


def _target(result: Result) -> str:
    bounds = ((">=", result.at_least), ("<=", result.at_most))
    return ", ".join(f"{sign} {bound:,g}" for sign, bound in bounds if bound is not None)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def as_json(
    suite: str, results: Sequence[Result], facts: dict[str, str], *, on_cpu: bool
) -> dict[str, Any]:
    """Return the report for a file."""
    return {
        "suite": suite,
        "machine": facts,
        "results": [
            {
                "kind": "comparison" if isinstance(result, Row) else "quantity",
                **asdict(result),
                "verdict": verdict(result, on_cpu=on_cpu),
            }
            for result in results
        ],
    }
