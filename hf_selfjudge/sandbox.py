"""Run Python code that nobody has read.

In: a script. Out: its exit status. It runs in a process of its own (this file is what that process starts with), with
limits on seconds, memory and the size of files. On Linux from 5.13 on the kernel (Landlock) also keeps it from
changing any file but those in its working folder, and from 6.7 on from the network; elsewhere nothing does. It can
read whatever its user can.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path


MEMORY = 2 << 30  # bytes
FILE_SIZE = 16 << 20  # bytes
# System calls of Landlock, the same on all processors; https://docs.kernel.org/userspace-api/landlock.html
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITING = 0b1111111110010  # write, remove and make files of all kinds
REFER, TRUNCATE = 1 << 13, 1 << 14  # known from the second and third version on
TCP = 0b11  # bind and connect; from the fourth


def run(script: Path, folder: Path, seconds: float) -> int | None:
    """
    Run `script` in `folder`, the only one it may write to, with no input, no environment, and output to nowhere.

    Returns:
        `int`: Its exit status; `None` if it did not end within `seconds` (of the clock, and of the processor).
    """
    process = subprocess.Popen(
        [sys.executable, "-I", __file__, str(script), str(int(seconds) + 1)],
        cwd=folder,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # with whatever it has started
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


@lru_cache(maxsize=1)
def landlock() -> int:
    """The kernel's version of Landlock; 0 if it has none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, _kernel().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _kernel() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _confine(folder: str, seconds: int) -> None:
    """Limit this process and those it starts, for good."""
    if os.name == "posix":
        import resource  # there only

        for limit, value in {
            resource.RLIMIT_CPU: seconds,
            resource.RLIMIT_AS: MEMORY,
            resource.RLIMIT_FSIZE: FILE_SIZE,
            resource.RLIMIT_CORE: 0,
        }.items():
            resource.setrlimit(limit, (value, value))
    version = landlock()
    if not version:
        return

    class Ruleset(ctypes.Structure):
        _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64))

    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))

    kernel = _kernel()
    files = WRITING | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    ruleset = Ruleset(files, TCP)
    size = ctypes.sizeof(Ruleset) if version >= 4 else 8
    rules = kernel.syscall(CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), ctypes.c_uint32(0))
    beneath = Beneath(files, os.open(folder, os.O_PATH))
    for failed in (
        rules < 0,
        kernel.syscall(ADD_RULE, rules, 1, ctypes.byref(beneath), ctypes.c_uint32(0)),
        kernel.prctl(38, 1, 0, 0, 0),  # no new privileges, without which nobody may confine himself
        kernel.syscall(RESTRICT_SELF, rules, ctypes.c_uint32(0)),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "the kernel refused to confine the process")
    os.close(rules)
    os.close(beneath.folder)


if __name__ == "__main__":
    _confine(os.getcwd(), int(sys.argv[2]))
    sys.argv = sys.argv[1:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
