"""One writer a run, one config a run, and small files that are always whole."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megarec
from megarec.errors import UserError
from megarec.train import run_folder
from megarec.train.run_folder import RunFolder

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def short_takeover(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_folder, "TAKEOVER_SECONDS", 0.05)


def lock_as(folder: Path, *, pid: int, host: str = HOST, age: float = 0.0) -> None:
    lock = folder / "lock"
    lock.write_text(json.dumps({"host": host, "pid": pid, "slurm_job_id": "55"}))
    os.utime(lock, (time.time() - age, time.time() - age))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_names_its_owner_and_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = RunFolder(tmp_path / "runs" / "a run \u00e9")
    run.acquire()
    owner = json.loads(run.lock.read_text())
    assert owner == {"host": HOST, "pid": os.getpid(), "slurm_job_id": "77"}
    run.release()
    assert not run.lock.exists()


@pytest.mark.parametrize("host", [HOST, "elsewhere"])
def test_a_live_lock_is_refused_in_one_line(host: str, tmp_path: Path):
    lock_as(tmp_path, pid=os.getppid(), host=host, age=3)
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).acquire()
    (line,) = caught.value.lines
    assert f"pid {os.getppid()} on host {host}" in line
    assert "Slurm job 55, last seen 3 s ago" in line


@pytest.mark.parametrize("stale", ["dead process", "old heartbeat", "half-written"])
def test_a_stale_lock_is_taken_over(stale: str, tmp_path: Path):
    if stale == "dead process":
        lock_as(tmp_path, pid=dead_pid())
    elif stale == "old heartbeat":
        lock_as(tmp_path, pid=1, host="elsewhere", age=1000)
    else:
        (tmp_path / "lock").touch()
        os.utime(tmp_path / "lock", (0, 0))
    run = RunFolder(tmp_path)
    run.acquire()
    assert json.loads(run.lock.read_text())["pid"] == os.getpid()
    run.release()


def test_of_two_that_take_over_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lock_as(tmp_path, pid=dead_pid())
    # While this run waits after its take-over, another one writes its own lock.
    monkeypatch.setattr(run_folder.time, "sleep", lambda _: lock_as(tmp_path, pid=1))
    with pytest.raises(UserError, match="in use by pid 1 "):
        RunFolder(tmp_path).acquire()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == 1


def test_the_heartbeat_keeps_a_lock_alive(tmp_path: Path):
    run = RunFolder(tmp_path, stale_after=0.4)
    run.acquire()
    os.utime(run.lock, (0, 0))
    time.sleep(0.3)
    assert time.time() - run.lock.stat().st_mtime < 0.3
    run.release()


def test_a_lock_that_was_taken_over_is_left_alone(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.acquire()
    lock_as(tmp_path, pid=1, host="elsewhere")
    run.release()
    assert run.lock.exists()


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory"):
        RunFolder(tmp_path / "file" / "run").acquire()


CONFIG = {"name": "a", "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]}, "valid": {}, "eps": 1e-8}


def test_the_same_config_may_come_again(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.write_config(CONFIG)
    before = run.config.stat().st_mtime_ns
    run.write_config(dict(reversed(CONFIG.items())))
    assert run.config.stat().st_mtime_ns == before


def test_another_config_is_refused_key_by_key_unless_forced(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.write_config(CONFIG)
    new = {"name": "a", "optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]}, "eps": 1e-8, "seed": 1}
    with pytest.raises(UserError) as caught:
        run.write_config(new)
    assert [line.split(";")[0].removeprefix(f"{run.config}: ") for line in caught.value.lines] == [
        "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]",
        "optimizer.lr: 0.0003 -> 0.001",
        "seed: absent -> 1",
        "valid: {} -> absent",
    ]
    run.write_config(new, force=True)
    run.write_config(new)


def test_info_and_status(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.write_info(device="cpu", world_size=2, parameters=123)
    info = json.loads(run.info.read_text())
    assert info["versions"]["megarec"] == megarec.__version__
    assert {"python", "torch", "numpy", "safetensors"} <= info["versions"].keys()
    assert (info["device"], info["world_size"], info["parameters"]) == ("cpu", 2, 123)
    run.write_status("preempted", 7)
    status = json.loads(run.status.read_text())
    assert (status["state"], status["step"]) == ("preempted", 7)
    assert status["time"].endswith("+00:00")
