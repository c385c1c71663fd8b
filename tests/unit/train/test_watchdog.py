"""A step that hangs ends the process and names the line; steps in time do not."""

import os
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import sys, time
from megarec.train.watchdog import Watchdog

def a_step_that_hangs():
    time.sleep(20)

with open(sys.argv[1], "w") as log, Watchdog(0.4, log) as watchdog:
    for _ in range(4):
        watchdog.arm()
        time.sleep(0.2)
    print("steps done", flush=True)
    if sys.argv[2] == "hang":
        watchdog.arm()
        a_step_that_hangs()
time.sleep(1.2)
print("ended", flush=True)
"""


def run(log: Path, mode: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(log), mode]
    return subprocess.run(command, capture_output=True, text=True, timeout=15)


def test_a_hanging_step_dumps_stacks_and_exits(tmp_path: Path):
    result = run(tmp_path / "rank0.log", "hang")
    assert result.returncode == 1
    assert result.stdout == "steps done\n"
    assert "a_step_that_hangs" in result.stderr
    log = (tmp_path / "rank0.log").read_text()
    assert "no progress for 0.4 s" in log and "a_step_that_hangs" in log


def test_steps_in_time_are_left_alone(tmp_path: Path):
    result = run(tmp_path / "rank0.log", "finish")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "steps done\nended\n"
    assert result.stderr == ""
    assert (tmp_path / "rank0.log").read_text() == ""


ORPHAN = """
import os, subprocess, sys, time
if sys.argv[1] == "child":
    from megarec.train.watchdog import exit_with_parent
    exit_with_parent()
    print("started", flush=True)
    time.sleep(30)
child = subprocess.Popen([sys.executable, "-c", os.environ["ORPHAN"], "child"])
time.sleep(30)
"""


def test_a_worker_ends_with_its_launcher():
    launcher = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, "launcher"],
        env=os.environ | {"ORPHAN": ORPHAN},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "started\n"
    launcher.kill()
    began = time.monotonic()
    # The worker holds the other end of the pipe: it closes when the worker is gone.
    assert launcher.stdout.read() == ""
    assert time.monotonic() - began < 10
    launcher.wait()
