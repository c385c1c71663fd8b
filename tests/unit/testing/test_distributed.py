"""The gloo harness returns results by rank, and reports the first failure without orphans."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarec.testing.distributed import RankFailed, run_ranks


def reduce(rank: int, world_size: int, width: int):
    total = torch.full((width,), float(rank), dtype=torch.bfloat16)
    dist.all_reduce(total)
    return {
        "total": total,
        "env": [os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MARK"]],
        "threads": torch.get_num_threads(),
    }


def test_results_come_by_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MARK", "here")
    results = run_ranks(reduce, 3, 2)
    assert [result["env"] for result in results] == [[str(r), "3", "here"] for r in range(3)]
    for result in results:
        assert torch.equal(result["total"], torch.full((2,), 3.0, dtype=torch.bfloat16))
        assert result["threads"] == 1


def misbehave(rank: int, world_size: int, how: str, folder: str):
    (Path(folder) / str(os.getpid())).touch()
    dist.barrier()
    if rank == 1 and how == "raise":
        raise ValueError("this line")
    if rank == 1 and how == "die":
        os._exit(7)
    if rank == 1 and how == "hang":
        time.sleep(100)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"rank 1 failed:[\s\S]*ValueError: this line"),
        ("die", "rank 1 died with exit code 7"),
        ("hang", "ranks 0, 1 did not end in time"),
    ],
)
def test_a_failure_is_reported_and_no_process_is_left(how: str, message: str, tmp_path: Path):
    start = time.monotonic()
    with pytest.raises(RankFailed, match=message):
        run_ranks(misbehave, 2, how, str(tmp_path), timeout=3)
    assert time.monotonic() - start < 8
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
