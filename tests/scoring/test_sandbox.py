"""What code may do that nobody has read."""

import sys

import pytest

from hf_selfjudge.scoring import sandbox


def run(tmp_path, code, seconds=10.0):
    cells, work = tmp_path / "cells", tmp_path / "work"
    for folder in (cells, work):
        folder.mkdir(exist_ok=True)
    (cells / "tests.py").write_text(f"{code}\nraise SystemExit(7)\n")
    return sandbox.run(cells, work, work / "mark", seconds)


def test_it_works_in_its_folder(tmp_path):
    code = "import os\nopen('a', 'w').write('x')\nos.mkdir('d')\nos.rename('a', 'd/a')"
    assert run(tmp_path, code) == 7
    assert (tmp_path / "work" / "d" / "a").read_text() == "x"


@pytest.mark.skipif(not sandbox.landlock(), reason="the kernel cannot confine a process")
@pytest.mark.parametrize(
    "code",
    [
        "open('{there}/new', 'w')",
        "open('{there}/old', 'a').write('x')",
        "import os\nos.truncate('{there}/old', 0)",
        "import os\nos.remove('{there}/old')",
        "import os\nos.mkdir('{there}/new')",
        "import os\nos.mkfifo('{there}/new')",
        "import os, stat\nos.mknod('device', stat.S_IFCHR | 0o600, os.makedev(1, 3))",
        "import os\nos.symlink('x', '{there}/new')",
        "import os\nos.link('{there}/old', 'linked')\nopen('linked', 'w')",
        "import os\nos.rename('{there}/old', 'here')",
        "import os\nos.symlink('{there}/old', 'linked')\nopen('linked', 'w')",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'open(\"{there}/new\", \"w\")'], check=True)",
    ],
)
def test_it_changes_nothing_elsewhere(tmp_path, code):
    there = tmp_path / "there"
    there.mkdir()
    (there / "old").write_text("kept")
    assert run(tmp_path, code.format(there=there)) == 1
    assert [(path.name, path.read_text()) for path in there.iterdir()] == [("old", "kept")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux alone")
def test_root_is_root_no_longer(tmp_path):
    assert (
        run(tmp_path, "if int(open('/proc/self/status').read().split('CapEff:')[1].split()[0], 16): raise OSError")
        == 7
    )


@pytest.mark.skipif(not sandbox.landlock(), reason="the kernel cannot confine a process")
@pytest.mark.parametrize(("kind", "status"), [("Queue()", 1), ("Pool(1)", 1), ("Process()", 7)])
def test_processes_share_no_locks(tmp_path, kind, status):
    assert run(tmp_path, f"import multiprocessing\nmultiprocessing.{kind}") == status


@pytest.mark.skipif(sandbox.landlock() < 6, reason="the kernel does not keep signals in")
def test_it_cannot_end_what_watches_it(tmp_path):
    assert run(tmp_path, "import os\nos.kill(os.getppid(), 9)") == 1


def test_output_to_nowhere_is_harmless(tmp_path):
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True, stdout=subprocess.DEVNULL)"
    assert run(tmp_path, code) == 7


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", sandbox.TIMED_OUT),
        ("import time; time.sleep(60)", sandbox.TIMED_OUT),
        (f"bytearray({2 * sandbox.MEMORY})", 1),
        (f"open('big', 'wb').write(bytes({2 * sandbox.FILE_SIZE}))", 1),
    ],
)
def test_limits(tmp_path, code, status):
    assert run(tmp_path, code, seconds=2.0) == status


@pytest.mark.parametrize("leave", ["pass", "os.setsid()"])
def test_nothing_is_left_running(tmp_path, leave):
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        f"    {leave}\n"
        "    for _ in range(200):\n        open('beat', 'a').write('x'); time.sleep(0.05)\n"
        "time.sleep(1)"
    )
    assert run(tmp_path, code) == 7
    beats = (tmp_path / "work" / "beat").read_text()
    assert beats
    assert run(tmp_path, "import time; time.sleep(1)") == 7
    assert (tmp_path / "work" / "beat").read_text() == beats
