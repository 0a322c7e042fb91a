"""Run files of Python one after the other, like the cells of a notebook.

In: a folder with the code of an answer in files, the last of which are its tests. Out: a folder that is made if they
pass. `sandbox.py` runs this file by itself: it needs nothing but the standard library.
"""

from __future__ import annotations
import __future__

import contextlib
import os
import sys
import types
from pathlib import Path


FEATURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


def run(folder: str, mark: str) -> None:
    """
    Run the files of `folder` in the order of their names, all in one namespace. One that raises stops there, what
    it has defined stays, and the next one runs; only the last one, the tests, must run to its end.

    Args:
        mark (`str`): A folder to make behind the last test. The code does not know its name: if it ends the process
            before, there is no such folder. (Code that cheats can find the name in this frame.)

    Raises:
        BaseException: What the tests raise.
    """
    translate, evaluate, make, leave = compile, exec, os.mkdir, os._exit  # the code may replace them
    main = sys.modules["__main__"] = types.ModuleType("__main__")  # where code that looks itself up finds it
    flags = 0

    def execute(path: Path) -> None:
        nonlocal flags
        main.__file__, sys.argv[:] = str(path), [str(path)]
        code = translate(path.read_bytes(), path, "exec", flags, dont_inherit=True)
        flags |= code.co_flags & FEATURES  # `from __future__` holds for what follows, too
        evaluate(code, main.__dict__)

    *cells, tests = sorted(Path(folder).glob("*.py"))
    for cell in cells:
        with contextlib.suppress(BaseException):  # SystemExit, too
            execute(cell)
    execute(tests)
    make(mark)
    leave(0)  # whatever threads are left


if __name__ == "__main__":
    arguments = sys.argv[1:]
    del sys.argv[1:], sys.orig_argv[1:]
    run(*arguments)
