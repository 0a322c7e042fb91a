"""Run Python code that nobody has checked.

In: a script and its arguments. Out: its exit status. It runs in a process of its own, with limits on seconds, memory
and the size of files; a supervisor (what this file starts as) ends whatever it leaves running. On Linux the kernel
(Landlock) also keeps it from changing what is in any file but those in its working folder (from 5.13 on), from TCP
(6.7), and from signalling processes outside (6.12), and takes root's capabilities away; on other
systems there is no such protection. It can read whatever its user can. Pools and queues of `multiprocessing` do not
work in it: their locks lie outside its folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import NoReturn


MEMORY = 2 << 30  # bytes
FILE_SIZE = 16 << 20  # bytes
# System calls of Landlock, the same on all processors; https://docs.kernel.org/userspace-api/landlock.html
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITING = 0b1111111110010  # write, remove and make files of all kinds
DEVICES = 1 << 6 | 1 << 11  # to make character and block devices, which is never allowed
WRITE_FILE = 1 << 1
REFER, TRUNCATE = 1 << 13, 1 << 14  # known from the second and third version on
TCP = 0b11  # bind and connect; from the fourth
SCOPES = 0b11  # abstract sockets and signals; from the sixth
NO_NEW_PRIVILEGES, CHILD_SUBREAPER = 38, 36  # of prctl
TIMED_OUT = 124  # exit status of the supervisor, as of `timeout`


def run(script: Path, folder: Path, seconds: float, *arguments: str) -> int | None:
    """
    Run `script` with `arguments` in `folder`, the only one it may write to, with no input, no environment, and output
    to nowhere.

    Returns:
        `int`: Its exit status; `None` if it did not end within `seconds` (of the clock, and of the processor).
    """
    process = subprocess.Popen(
        [sys.executable, "-I", __file__, str(seconds), str(script), *arguments],
        cwd=folder,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = process.wait(seconds + 10)  # it ends by itself, unless something is wrong with it
    except subprocess.TimeoutExpired:
        status = TIMED_OUT
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    return None if status == TIMED_OUT else status


def _supervise(seconds: float, command: list[str]) -> int:
    """Run a script with its arguments in a process of its own and end that, with all that it has started, after some
    time."""
    if sys.platform.startswith("linux"):  # processes that outlive it become ours
        _kernel().prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if not child:
        os.setsid()
        _confine(os.getcwd(), int(seconds) + 1)
        _run(command)
    status, until = None, time.monotonic() + seconds
    while status is None and time.monotonic() < until:
        time.sleep(0.005)
        ended, wait_status = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(wait_status) if ended else None
    _end(child)
    return TIMED_OUT if status is None else status


def _run(command: list[str]) -> NoReturn:
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()


def _end(child: int) -> None:
    """Kill the group of a process, and all other children of this one: what left that group became one of them."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    children = Path(f"/proc/self/task/{os.getpid()}/children")  # Linux
    with contextlib.suppress(ChildProcessError):
        while children.is_file():
            for process in children.read_text().split():
                os.kill(int(process), signal.SIGKILL)
            os.waitpid(-1, 0)


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
        _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))

    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = (("allowed", ctypes.c_uint64), ("path", ctypes.c_int32))

    kernel = _kernel()
    truncate = TRUNCATE if version >= 3 else 0
    files = WRITING | (REFER if version >= 2 else 0) | truncate
    ruleset = Ruleset(files, TCP, SCOPES)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = kernel.syscall(CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), ctypes.c_uint32(0))
    _check(rules)
    for path, allowed in ((folder, files & ~DEVICES), (os.devnull, WRITE_FILE | truncate)):
        beneath = Beneath(allowed, os.open(path, os.O_PATH))
        _check(kernel.syscall(ADD_RULE, rules, 1, ctypes.byref(beneath), ctypes.c_uint32(0)))
        os.close(beneath.path)
    _check(kernel.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))  # the kernel requires it of a process that confines itself
    _check(kernel.syscall(RESTRICT_SELF, rules, ctypes.c_uint32(0)))
    os.close(rules)
    # No capabilities, those of root among them; no new privileges: none come back with another program.
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _check(kernel.capset(header, none))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "the kernel refused to confine the process")


if __name__ == "__main__":
    if os.name == "posix":
        sys.exit(_supervise(float(sys.argv[1]), sys.argv[2:]))
    _run(sys.argv[2:])
