"""The benchmark: its statistics, what it refuses to time, and each suite at tiny sizes."""

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
from benchmarks import report
from benchmarks.protocol import (
    Clock,
    Form,
    Spread,
    Times,
    compare,
    expected_of,
    judge,
    summarize,
)
from benchmarks.race import race
from benchmarks.report import Quantity, Row, verdict

from megarec.errors import UserError

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


class Ticking(Clock):
    """Notes the order of runs; the n-th takes n seconds of wall time and 2 n of the processor's."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.order: list[Callable[[], None]] = []

    def __call__(self, run: Callable[[], None]) -> Times:
        run()
        self.order.append(run)
        return Times(len(self.order), 2 * len(self.order))


def test_runs_take_turns() -> None:
    calls: list[str] = []
    clock = Ticking()

    def ours() -> None:
        calls.append("A")

    def theirs() -> None:
        calls.append("B")

    found = compare(ours, theirs, clock, rounds=2)
    assert "".join(calls) == "AB" + "ABBA" * 2  # a warm-up, which is not timed
    # Ours took 1, 4, 5, 8 and theirs 2, 3, 6, 7: a drift of the clock leaves no trace.
    assert found.ratio == found.processor_ratio == Spread(1, 1, 1)
    assert (found.ours, found.theirs) == (Spread(4.5, 1, 8), Spread(4.5, 2, 7))


def test_the_ratio_is_of_each_round() -> None:
    def pair(wall: float, processor: float) -> tuple[Times, Times]:
        return Times(wall, processor), Times(wall, processor)

    ours = [pair(1, 1), pair(1, 1), pair(100, 1)]
    theirs = [pair(2, 4), pair(3, 4), pair(500, 4)]
    found = summarize(ours, theirs, load=0.5)
    assert found.ratio == Spread(3, 2, 5)
    assert found.processor_ratio == Spread(4, 4, 4)
    assert found.load == 0.5


def row(ratio: float, load: float, **bounds: float) -> Row:
    pairs = [(Times(1, 1), Times(1, 1))], [(Times(ratio, 1), Times(ratio, 1))]
    return Row("part", "case", "a", "b", comparison=summarize(*pairs, load), **bounds)


def test_void_above_the_load() -> None:
    assert verdict(row(2, 1.5, at_least=2), on_cpu=True) == "met"
    assert verdict(row(2, 1.51, at_least=2), on_cpu=True) == "void"
    assert verdict(row(2, 1.51), on_cpu=True) == "void"
    assert verdict(row(2, 9.0, at_least=2), on_cpu=False) == "met"
    quantity = Quantity("part", "name", 2e6, "tokens/s", at_least=1e6, load=1.6)
    assert verdict(quantity, on_cpu=True) == "void"
    table = report.markdown([row(2, 1.6), quantity], on_cpu=True)
    assert table.count("void") == 2


def test_targets() -> None:
    assert verdict(row(1.99, 0, at_least=2), on_cpu=True) == "missed"
    assert verdict(row(1.02, 0, at_most=1.03), on_cpu=True) == "met"
    assert verdict(row(1.04, 0, at_most=1.03), on_cpu=True) == "missed"
    assert verdict(row(1.04, 0), on_cpu=True) == ""
    assert verdict(Quantity("part", "name", 9e5, "tokens/s", at_least=1e6), on_cpu=True) == "missed"
    unknown = Row("part", "case", "a", "b", "failed", at_least=2)
    assert verdict(unknown, on_cpu=True) == ""


def square(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"y": x.square()}


def right_value_wrong_gradient(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"y": x.detach() * x}


def missing(x: torch.Tensor) -> dict[str, torch.Tensor]:
    raise ModuleNotFoundError("No module named 'fast'")


def failing(x: torch.Tensor) -> dict[str, torch.Tensor]:
    raise RuntimeError("out of memory")


BAD: dict[str, tuple[Callable[..., Any], str, str]] = {
    "value": (lambda x: {"y": 1.01 * x.square()}, "wrong", "is off by 1.0e-02, more than 1e-04"),
    "gradient": (right_value_wrong_gradient, "wrong", "dx is off by 5.0e-01, more than 1e-04"),
    "missing": (missing, "not installed", "No module named 'fast'"),
    "failing": (failing, "failed", "RuntimeError: out of memory"),
}


def never(run: Callable[[], None]) -> Times:
    raise AssertionError("a form that is not right was timed")


def compete(ours: Form, other: Form, clock: Any) -> list[Any]:
    inputs = {"x": torch.randn(5, generator=torch.Generator().manual_seed(0))}
    results: Iterator[Any] = race(
        "part", "case", reference=Form("reference", square), ours=ours,
        others=[other], inputs=inputs, bound=1e-4, clock=clock, rounds=1, alone=True,
    )  # fmt: skip
    return list(results)


@pytest.mark.parametrize(("run", "state", "reason"), BAD.values(), ids=BAD.keys())
def test_what_is_not_right_is_not_timed(run: Callable[..., Any], state: str, reason: str) -> None:
    bad, good = Form("bad", run), Form("good", square)
    (result,) = compete(bad, good, never)
    assert (result.state, result.our_fault) == (state, True)
    assert result.reason.endswith(reason)
    alone, result = compete(good, bad, Ticking())
    assert isinstance(alone, Quantity)
    assert (result.state, result.our_fault, result.comparison) == (state, False, None)
    assert result.reason.endswith(reason)


def test_what_is_right_is_timed() -> None:
    alone, result = compete(Form("a", square), Form("b", square), Ticking())
    assert (alone.name, result.case) == ("a: case, fwd+bwd", "case, fwd+bwd")
    assert result.comparison.ratio.median == pytest.approx(1)


def test_a_form_may_have_another_layout() -> None:
    def summed(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x.cumsum(1).square()}

    def heads_first(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x.cumsum(2).square()}

    inputs = {"x": torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))}
    expected = expected_of(Form("reference", summed), inputs)
    assert judge(Form("other", heads_first, True), inputs, expected, 1e-5).state == "measured"
    assert judge(Form("other", heads_first), inputs, expected, 1e-5).state == "wrong"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return what runs the command in this process."""

    def command(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words)])
        return benchmark.main()

    return command


def measured(path: Path) -> list[dict[str, Any]]:
    results = json.loads(path.read_text())["results"]
    states = [r["state"] for r in results if r["kind"] == "comparison"]
    assert set(states) <= {"measured", "not installed"}, results
    return results


def test_the_cpu_suite(run: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    assert run("--suite", "cpu", "--smoke", "--out", out) == 0
    results = measured(out)
    assert all(r["state"] == "measured" for r in results if r["kind"] == "comparison")
    others = {r["theirs"] for r in results if r["kind"] == "comparison"}
    assert others >= {"sequential", "quadratic", "chunks by autograd", "loop over time", "nn.GRU"}
    assert others >= {"transformers BambaForCausalLM", "trainer", "beside a background save"}
    with pytest.raises(UserError, match="exists; give another name"):
        run("--suite", "cpu", "--smoke", "--out", out)


def test_the_gpu_suite(run: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert run("--suite", "gpu", "--smoke", "--out", out) == 0
    names = {r["part"] for r in measured(out)}
    assert names == {"calibration", "cells", "conv", "pointwise", "loss", "block"}


def test_the_train_suite(run: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    words = ("--config", "tiny/xlstm.yaml", "--steps", 2, "model.num_layers=1")
    assert run("--suite", "train", *words, "--out", out) == 0
    speed = measured(out)[0]
    assert speed["unit"] == "tokens/s" and speed["value"] > 0
    assert speed["name"] == "tiny/xlstm.yaml, 230,660 parameters, T 64: tokens/s"  # of one layer


def test_a_wrong_form_of_ours_is_the_exit_code(
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = sys.modules["megarec_kernels.causal_conv1d"]
    right = module.FORMS["eager"]

    def wrong(*arguments: Any) -> Any:
        y, tail = right(*arguments)
        return 1.1 * y, tail

    monkeypatch.setitem(module.FORMS, "eager", wrong)
    words = ("--suite", "gpu", "--smoke", "--parts", "conv")
    assert run(*words) == 1
    output = capsys.readouterr().out
    assert "| megarec eager |  |  |  |  |  |  |  |  | wrong: " in output

    def fails(*arguments: Any) -> Any:
        raise ZeroDivisionError("never")

    monkeypatch.setattr("benchmarks.gpu.PARTS", {"conv": fails})
    assert run(*words) == 1
    assert "failed: ZeroDivisionError: never" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "gpu"], "--suite gpu: no GPU here; --smoke tries"),
        (["--suite", "cpu", "--parts", "cells"], "--parts cells: expected some of attention, "),
        (["--suite", "cpu", "train.steps=3"], "train.steps=3: only --suite train takes key=value"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/benchmark.py"), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_forced_backend_would_compare_a_form_with_itself(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAREC_KERNELS", "eager")
    with pytest.raises(UserError, match="MEGAREC_KERNELS=eager makes all forms that one"):
        run("--suite", "cpu", "--smoke")
