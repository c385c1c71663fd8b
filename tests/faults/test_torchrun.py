"""Faults under a real torchrun: killed and hanging workers."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import losses, session
from safetensors.torch import load_file
from small import model_tree

from megarec.errors import RunError

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from e2e_runs import session
sections = {"train": {"step_timeout_seconds": 8}} | json.loads(sys.argv[3])
sys.exit(session(Path(sys.argv[2]), "run", **sections))
"""


def torchrun(
    folder: Path, fault: str | None = None, **sections: Any
) -> subprocess.CompletedProcess[str]:
    """Run the tiny recipe on two ranks with a fault."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    environment = {"MEGAREC_FAULT": fault} if fault else {}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(Path(__file__).parents[1]), str(folder), json.dumps(sections)],
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("golden")
    assert torchrun(folder).returncode == 0
    return folder


def test_a_killed_rank_ends_the_run_and_resume_is_bitwise(tmp_path: Path, golden: Path) -> None:
    began = time.monotonic()
    killed = torchrun(tmp_path, "after_backward:7:1:kill9")
    assert killed.returncode != 0 and time.monotonic() - began < 60
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text())["state"] != "done"
    assert (run / "checkpoints/latest").read_text().strip() == "step_00000004"
    # Killed while it saves step 8, it resumes from 4 again; then it ends.
    assert torchrun(tmp_path, "ckpt_before_manifest:8:0:kill9").returncode != 0
    assert list((run / "checkpoints").glob("*.tmp-*"))
    assert torchrun(tmp_path).returncode == 0
    assert not list((run / "checkpoints").glob("*.tmp-*"))
    assert losses(tmp_path, "run") == losses(golden, "run")
    for shard in (golden / "run/checkpoints/step_00000012").glob("*.safetensors"):
        ours = load_file(run / shard.relative_to(golden / "run"))
        assert all(torch.equal(ours[name], tensor) for name, tensor in load_file(shard).items())


def test_a_hanging_rank_is_reported_with_the_stacks_of_all(tmp_path: Path) -> None:
    began = time.monotonic()
    hung = torchrun(tmp_path, "before_optim:2:1:hang")
    assert hung.returncode != 0 and time.monotonic() - began < 60
    for rank in (0, 1):
        assert f"rank {rank}: step timeout: no progress for 8 s" in hung.stderr
    # One hangs in the fault, the other in the collective that waits for it.
    assert "faults.py" in hung.stderr and "environment.py" in hung.stderr


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "point",
    [
        "step_begin",
        "data_next",
        "before_optim",
        "ckpt_shard_written",
        "ckpt_before_rename",
        "ckpt_after_rename",
    ],
)
def test_killed_anywhere_it_resumes_bitwise(
    tmp_path: Path, golden: Path, point: str, rank: int
) -> None:
    # Only rank 0 publishes: a fault there on rank 1 never fires, and the run simply ends.
    torchrun(tmp_path, f"{point}:8:{rank}:kill9")
    assert torchrun(tmp_path).returncode == 0
    assert losses(tmp_path, "run") == losses(golden, "run")


@pytest.mark.faults
@pytest.mark.parametrize("point", ["ckpt_shard_written", "ckpt_before_rename"])
def test_killed_in_a_background_save_it_resumes_bitwise(
    tmp_path: Path, golden: Path, point: str
) -> None:
    checkpoint = {"every": 4, "asynchronous": True}
    torchrun(tmp_path, f"{point}:8:0:kill9", checkpoint=checkpoint)
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_00000004"
    assert torchrun(tmp_path, checkpoint=checkpoint).returncode == 0
    assert losses(tmp_path, "run") == losses(golden, "run")


@pytest.mark.faults
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_a_rank_that_raises_ends_all(tmp_path: Path, parallel: dict[str, int]) -> None:
    # The step timeout is long: it must not be what ends the others.
    failed = torchrun(
        tmp_path,
        "after_backward:3:1:raise",
        parallel=parallel,
        model=model_tree(vocab_size=64),
        train={"step_timeout_seconds": 1000},
    )
    assert failed.returncode != 0
    first = next(line for line in failed.stderr.splitlines() if "Error" in line)
    assert "injected fault" in first
    assert "step timeout" not in failed.stderr


@pytest.mark.faults
def test_bad_steps_in_a_row_stop(tmp_path: Path) -> None:
    policy = {"nonfinite": {"policy": "skip", "max_consecutive": 2}}
    with pytest.raises(RunError, match="2 steps in a row were skipped already"):
        session(tmp_path, "inf", optimizer={"lr": 1e30, "grad_clip": None}, train=policy)
