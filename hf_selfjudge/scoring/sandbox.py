"""Run Python code that nobody has checked, in files one after another, like the cells of a notebook.

In: a folder of cells, the last of which are the tests. Out: a mark, if the tests pass. The code runs in a process of
its own, with limits on seconds, memory and the size of files. A supervisor (this file, run as a script) kills whatever
it leaves running. On Linux the kernel (Landlock) also keeps it from changing files outside its working folder (5.13 or
later), from TCP (6.7) and from sending signals to other processes (6.12), and takes away the capabilities of root.
Other systems give no such protection. The code can read whatever its user can. Pools and queues of `multiprocessing`
do not work in it: their locks lie outside its folder.
"""

from __future__ import annotations
import __future__

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import NoReturn


MEMORY = 2 << 30  # bytes
FILE_SIZE = 16 << 20  # bytes
# System calls of Landlock, the same on all processors; https://docs.kernel.org/userspace-api/landlock.html
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITING = 0b1111111110010  # write, remove and create files of all kinds
DEVICES = 1 << 6 | 1 << 11  # create character and block devices, which is never allowed
WRITE_FILE = 1 << 1
REFER, TRUNCATE = 1 << 13, 1 << 14  # from the second and third version on
TCP = 0b11  # bind and connect; from the fourth version on
SCOPES = 0b11  # abstract sockets and signals; from the sixth version on
NO_NEW_PRIVILEGES, CHILD_SUBREAPER = 38, 36  # options of prctl
TIMED_OUT = 124  # exit status, the same as that of the command `timeout`
FEATURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


def run(cells: Path, folder: Path, mark: Path, seconds: float) -> int:
    """
    Run the files of `cells` in the order of their names, all in one namespace. If one raises, what it has defined
    stays, and the next one runs; only the last one, the tests, must run to its end.

    The code has no input, no environment and no output. It can write only to `folder`.

    Args:
        mark (`Path`): A folder in `folder`, which is created after the last test. The code does not know its name, so
            it does not exist if the code ends the process. (Code that cheats can find the name.)
        seconds (`float`): Limit, both of the clock and of processor time.

    Returns:
        `int`: The exit status; `TIMED_OUT` after `seconds`.
    """
    nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    command = [sys.executable, "-I", __file__, str(seconds), str(cells), str(mark)]
    try:  # it ends by itself in time, unless something is wrong with it
        limit = seconds + 10
        return subprocess.run(command, cwd=folder, env={}, start_new_session=True, timeout=limit, **nothing).returncode
    except subprocess.TimeoutExpired:
        return TIMED_OUT


def _supervise(seconds: float, cells: str, mark: str) -> int:
    """Run cells in a process of its own. After some time, kill it and all processes that it has started."""
    if sys.platform.startswith("linux"):  # orphans of that process become children of this one
        _kernel().prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if not child:
        os.setsid()
        _confine(os.getcwd(), int(seconds) + 1)
        _run_cells(cells, mark)
    status, until = None, time.monotonic() + seconds
    while status is None and time.monotonic() < until:
        time.sleep(0.005)
        ended, wait_status = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(wait_status) if ended else None
    _end(child)
    return TIMED_OUT if status is None else status


def _run_cells(folder: str, mark: str) -> NoReturn:
    del sys.argv[1:], sys.orig_argv[1:]
    translate, evaluate, mkdir, leave = compile, exec, os.mkdir, os._exit  # the code may replace them
    main = sys.modules["__main__"] = types.ModuleType("__main__")  # code that looks itself up finds it there
    flags = 0

    def execute(path: Path) -> None:
        nonlocal flags
        main.__file__, sys.argv[:] = str(path), [str(path)]
        code = translate(path.read_bytes(), path, "exec", flags, dont_inherit=True)
        flags |= code.co_flags & FEATURES  # `from __future__` holds for the next cells, too
        evaluate(code, main.__dict__)

    *cells, tests = sorted(Path(folder).glob("*.py"))
    for cell in cells:
        with contextlib.suppress(BaseException):  # SystemExit, too
            execute(cell)
    execute(tests)
    mkdir(mark)
    leave(0)  # even if threads are left


def _end(child: int) -> None:
    """Kill the group of a process, and all other children: a process that left the group has become a child."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    children = Path(f"/proc/self/task/{os.getpid()}/children")  # Linux
    with contextlib.suppress(ChildProcessError):
        while children.is_file():
            for process in children.read_text().split():
                os.kill(int(process), signal.SIGKILL)
            os.waitpid(-1, 0)


def landlock() -> int:
    """The kernel's version of Landlock; 0 if it has none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, _kernel().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _kernel() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _confine(folder: str, seconds: int) -> None:
    """Limit this process and those it starts, for good."""
    import resource  # there is no such module on Windows

    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: MEMORY, resource.RLIMIT_FSIZE: FILE_SIZE}
    for limit, value in (limits | {resource.RLIMIT_CORE: 0}).items():
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
    _check(kernel.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))  # the kernel requires this first
    _check(kernel.syscall(RESTRICT_SELF, rules, ctypes.c_uint32(0)))
    os.close(rules)
    # Give up all capabilities. Without new privileges, another program does not get them back.
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _check(kernel.capset(header, none))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "the kernel refused to confine the process")


if __name__ == "__main__":
    if os.name == "posix":
        sys.exit(_supervise(float(sys.argv[1]), *sys.argv[2:]))
    _run_cells(*sys.argv[2:])
