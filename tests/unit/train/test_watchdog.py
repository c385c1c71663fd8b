"""A step that hangs ends the process and names the line; steps in time do not."""

import os
import subprocess
import sys
import time

SCRIPT = """
import sys, time
from megarec.train.watchdog import Watchdog

def a_step_that_hangs():
    time.sleep(20)

with Watchdog(0.4) as watchdog:
    for _ in range(4):
        watchdog.arm()
        time.sleep(0.2)
    print("steps done", flush=True)
    if sys.argv[1] == "hang":
        watchdog.arm()
        a_step_that_hangs()
time.sleep(1.2)
print("ended", flush=True)
"""


def run(mode: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, mode]
    return subprocess.run(command, capture_output=True, text=True, timeout=15)


def test_a_hanging_step_dumps_stacks_and_exits():
    result = run("hang")
    assert result.returncode == 1
    assert result.stdout == "steps done\n"
    assert result.stderr.startswith("rank 0: step timeout: no progress for 0.4 s")
    assert result.stderr.count("a_step_that_hangs") == 1


def test_steps_in_time_are_left_alone():
    result = run("finish")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "steps done\nended\n"
    assert result.stderr == ""


def test_a_locked_interpreter_ends_too():
    script = SCRIPT.replace("time.sleep(20)", "ctypes.PyDLL(None).sleep(30)")
    command = [sys.executable, "-c", f"import ctypes\n{script}", "hang"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=25)
    assert result.returncode == 1
    assert "a_step_that_hangs" in result.stderr


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
