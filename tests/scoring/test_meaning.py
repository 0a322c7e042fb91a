"""Do two answers say the same?"""

import pytest

from hf_selfjudge.scoring.codeblocks import has_code
from hf_selfjudge.scoring.meaning import computes_the_same, passes_tests, reconvergence


def test_reconvergence():
    original = [1, 2, 3, 4, 5, 6]
    assert reconvergence(original, original) == 1
    assert reconvergence(original, [9, 1, 2, 3, 4]) == pytest.approx(1 / 3)
    assert reconvergence(original, [9] * 6) == 0
    assert reconvergence([1, 1, 1, 1, 1], [1, 1, 1, 1]) == 0.5  # with multiplicity
    assert reconvergence([1, 2], [2, 1, 2]) == 1
    assert reconvergence([], [1]) == 1


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("Here:\n```python\ndef double(x):\n    return 2 * x\n```\nThat is all.", True),
        ("def double(x):\n    return 2 * x", True),
        ("```python\ndef double(x):\n    return x\n```", False),
        ("```python\ndef double(x) return x\n```", False),
        ("```python\nwhile True: pass\n```", False),
        ("```python\ndef double(x):\n    return 2 * x", True),  # cut off in the block
        ("```python\ndef double(x):\n    return 2 * x\n```\nUse:\n```python\ndouble(3)\n```\n```\n6\n```", True),
        ("```python\ndef double(x):\n    return 2 * x\n```\nUse:\n```python\nprint(doub", True),  # cut off after it
        ("```\ndef double(x):\n    return 2 * x\n```\nprints\n```\n6\n```", True),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("import os\nos._exit(77)", False),
        ("raise SystemExit(77)", False),
        ("def double(x):\n    return 2 * x\n\nraise SystemExit", True),
        ("def double(x):\n    raise SystemExit(77)", False),
        ("import atexit, os\natexit.register(os._exit, 77)", False),
        ("def double(x):\n    return 2 * x\0", False),
        ("def double(x):\n    return 2 * x  # \ud800", True),
        ("def double(x):\n    return 2 * x  # " + "x" * 200_000, True),
    ],
)
def test_code(answer, passes):
    assert passes_tests(answer, "assert double(2) == 4\nassert double(0) == 0", seconds=2.0) == passes


TRIPLE = "def double(x):\n    return 3 * x"


@pytest.mark.parametrize(
    ("second", "same"),
    [
        ("It triples:\n```python\ndef double(x):\n    return x + x + x\n```", True),
        ("def double(x):\n    return 3.0 * x", True),  # 6 == 6.0
        (f"{TRIPLE}\n\nraise SystemExit", True),
        ("def double(x):\n    return 4 * x", False),
        ("def double(x):\n    return 3 * x if x else None", False),
        ("def triple(x):\n    return 3 * x", False),
        ("import os\nos._exit(0)", False),
        ("while True:\n    pass", None),
    ],
)
def test_code_that_fails_its_tests_may_compute_the_same(second, same):
    tests = "import math\nassert double(2) == 4\nassert double(0) == math.floor(0.5)\nassert not double(1) - 2"
    for pair in ((TRIPLE, second), (second, TRIPLE)):
        assert computes_the_same(*pair, tests, seconds=2.0) is same


@pytest.mark.parametrize(
    "tests",
    [
        "x = [2]\nassert double(x[0]) == 4",
        "import math\nassert math.isclose(double(2), 4)",
        "assert 4 == double(2)",
        "assert [4] == [double(2)]",
        "assert double(2) == 4 and double(0) == 0",
        "assert double(2) in (4, 5)",
        "assert all(double(x) == y for x, y in [(2, 4)])",
        "assert str(double(2)).startswith('4')",
        "assert (double(2) == 4) is True",
    ],
)
def test_what_tests_are_about_is_compared(tests):
    other = "def double(x):\n    return 5 * x"
    assert computes_the_same(TRIPLE, other, tests, seconds=2.0) is False
    assert computes_the_same(TRIPLE, f"{TRIPLE}\n\ny = 1", tests, seconds=2.0) is True


def test_objects_are_compared_without_their_addresses():
    one, other = (f"class A:\n    pass\n\ndef double(x):\n    return A(), {n}" for n in (1, 2))
    assert computes_the_same(one, f"{one}\n\ny = 1", "assert double(2) == 4") is True
    assert computes_the_same(one, other, "assert double(2) == 4") is False


def test_errors_are_compared_by_their_kind():
    wrong_name, divides = "def twice(x):\n    return 2 * x", "def double(x):\n    return x / 0"
    assert computes_the_same(wrong_name, "x = 5", "assert double(2) == 4") is True
    assert computes_the_same(wrong_name, divides, "assert double(2) == 4") is False


@pytest.mark.parametrize("tests", ["def check(f):\n    assert f(2) == 4\ncheck(double)", "assert double(", ""])
def test_tests_that_assert_nothing_that_can_be_compared(tests):
    assert computes_the_same(TRIPLE, "def double(x):\n    return 4 * x", tests) is None


DOUBLE = "def double(x):\n    return 2 * x\n"
INDENTED = "    ".join(("", *DOUBLE.splitlines(keepends=True)))


@pytest.mark.parametrize(
    "answer",
    [
        f"1. Write:\n\n   ```python\n{INDENTED}   ```\n2. Done.",
        f"<answer>\n```python\n{DOUBLE}```\n</answer>",
        f"x</think>\n```python\n{DOUBLE}```",
        f"<!--\n```python\n{DOUBLE}```",
        f"<div>\n```python\n{DOUBLE}```\nThat is all.",
        f"<answer>```python\n{DOUBLE}```</answer>",
        f"```python\n{DOUBLE}```<|im_end|>",
        f"```python\n{DOUBLE}``` ok\nThat is all.",
        f"```python\ndef double(x):\n    return x\n```\nBetter:\n```python\n{DOUBLE}```</answer>",
        f"- Do:\n  ```python\n{DOUBLE}  ```\n",
        f"1. Do:\n   ```python\n{DOUBLE}```\n",
        f"Do:\n\n    ```python\n{INDENTED}    ```",
        f"Do:\n\n    ```python\n{DOUBLE}    ```",
        f"```sage\n{DOUBLE}```",
        f"```bash\npip install x\n```\n```tool_code\n{DOUBLE}```",
        DOUBLE.replace("return", '"""\n    ```\n    double = 1\n    ```\n    """\n    return'),
        f"```python\n{DOUBLE}import builtins as b, os\nb.exec = b.compile = os.mkdir = os._exit = None\n```",
        f"- Write:\n    ```python\n{INDENTED}    ```",
        f"1. Write:\n   ```python\n{INDENTED}```\nDone.",
        f"The fence is ```. ```sorted``` helps.\n```sorted``` again:\n\n```python\n{DOUBLE}```",
        f"~~~python\n{DOUBLE}~~~",
        f"````python\n{DOUBLE}s = '''\n```\n'''\n````",
        f'```Python3 title="x"\n{DOUBLE}```',
        f"```{{.python}}\n{DOUBLE}```",
        f"```double.py\n{DOUBLE}```",
        f"```python\n{DOUBLE}```".replace("\n", "\r\n"),
        f"```python\n{DOUBLE}```".replace("    ", "\t"),
        f"> ```python\n> {DOUBLE.strip().replace(chr(10), chr(10) + '> ')}\n> ```",
        f"Here it is:\n\n{INDENTED}\nThat is all.",
        f"```bash\npip install x\n```\n```python\n{DOUBLE}```\n```bash\npython x.py\n```",
        f"```python\n{DOUBLE}```\n```python\ndef double(x) return\n```",
        f"```python\n{DOUBLE}```\n```python\ndouble(undefined)\n```",
        f"```python\n{DOUBLE}```\n```python\nprint(double(int(input())))\n```",
        f"```python\n{DOUBLE}```\n```python\nimport unittest\nunittest.main()\n```",
        f"```python\n{DOUBLE}```\n```python\n>>> double(2)\n4\n```",
        f"```python\n{DOUBLE}```\n```python\nfrom __future__ import annotations\nassert double(2) == 5\n```",
        f"```\n{DOUBLE}```\n```python\nprint(double(2))\n```",
        f"```python\n{DOUBLE}\nif __name__ == '__main__':\n    double()\n```",
        f"```python\n{DOUBLE}\nprint('x' * 10_000_000)\n```",
        f"```python\n{DOUBLE}\nimport threading\nthreading.Thread(target=threading.Event().wait).start()\n```",
        "```python\ndef double(x):\n    return x\n```\nBetter:\n```python\ndef double(x):\n    return x + x\n```",
        "```python\nfrom __future__ import annotations\n```\n```python\ndef double(x: Other):\n    return 2 * x\n```",
        "```python\nfrom dataclasses import dataclass\n@dataclass\nclass Two:\n    times: 'int' = 2\n```\n"
        "```python\ndef double(x):\n    return Two().times * x\n```",
        "```python\nimport inspect, pickle\ndef double(x):\n    return 2 * x\n"
        "assert pickle.loads(pickle.dumps(double)) is double and 'return' in inspect.getsource(double)\n"
        "double.checked = True\n```\n```python\nassert double.checked\n```",
    ],
)
def test_right_code_passes_with_any_text_around_it(answer):
    assert passes_tests(answer, "assert double(2) == 4")


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{DOUBLE}```\n```python\ndef double(x):\n    return x\n```",  # the last one counts
        f"```bash\n{DOUBLE}```\n```python\ndef double(x):\n    return x\n```",
        f"```python\n{DOUBLE}```\n```python\nwhile True:\n    pass\n```",
        f"```python\n{DOUBLE}```\n```python\nimport os\nos._exit(0)\n```",
        "```python\n```\nIt is `double`.",
    ],
)
def test_wrong_code_does_not_pass(answer):
    assert not passes_tests(answer, "assert double(2) == 4", seconds=2.0)


@pytest.mark.parametrize(
    "tests", ["raise SystemExit", "import os; os._exit(77)", "assert double(2) == 5", "def", "double"]
)
def test_tests_must_come_to_their_end(tests):
    assert passes_tests(DOUBLE, tests) == (tests == "double")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (f"```python\n{DOUBLE}```", True),
        (f"```python\n{DOUBLE}", False),
        (f"<answer>```python\n{DOUBLE}```</answer>", True),
        (f"<answer>```python\n{DOUBLE}", False),
        ('```json\n{"a": 1}\n```', False),
        (f"```python\n{DOUBLE}\n\n", False),
        (f"1. So:\n   ```python\n{INDENTED}", False),
        (f"1. So:\n   ```python\n{INDENTED}\nDone", True),
        (f"```python\n{DOUBLE}```\n```python\nprint(", True),
        (f"```bash\npip install x\n```\n```python\n{DOUBLE}", False),
        ("The ```sorted``` function", False),
        ("```python\n```\n", False),
        (DOUBLE, False),
    ],
)
def test_whole_code(text, whole):
    assert has_code(text) == whole


USES = "def count(x: List[int]) -> int:\n    return math.floor(len(x))\n"
IMPORTS = "from typing import (\n    List,\n    Dict,\n)\nimport math\n"


@pytest.mark.parametrize(
    ("prompt", "passes"),
    [
        (f'{IMPORTS}\n\ndef count(x: List[int]) -> int:\n    """How many?"""\n', True),
        (f"Complete this, please:\n\n{IMPORTS}\n\ndef count(x: List[int]) -> int:", True),
        (f"Complete:\n```python\n{IMPORTS}\ndef count(x: List[int]) -> int:\n```", True),
        (f"Complete:\n\n1. this\n   ```\n   {IMPORTS.replace(chr(10), chr(10) + '   ')}\n   ```", True),
        (f"import no_such_module\nimport taxes are high\n{IMPORTS}", True),
        (f"try:\n    import no_such_module\nexcept ImportError:\n    import math\n{IMPORTS}", True),
        ("from __future__ import annotations\nimport math\n", True),
        (f"from here on (it is\nopen\n\n{IMPORTS}", True),
        ("How many?", False),
        (f"```bash\n{IMPORTS}```", False),
        (f"```python\nx = 1\n```\n{IMPORTS}", True),
        (f"{IMPORTS}\ndef count(x: List[int]) -> int:\n\nExample:\n```\ncount([1]) == 1\n```\n", True),
        ("from typing import List  # (for x\nimport math  # too\n\ndef count(x: List[int]) -> int:", True),
        (f"\0{IMPORTS}", False),
    ],
)
def test_the_prompts_imports_are_there(prompt, passes):
    conversation = [{"role": "user", "content": prompt}]
    assert passes_tests(USES, "assert count([7, 8]) == 2", conversation) == passes
    later = [{"role": "system", "content": "x"}, *conversation, {"role": "assistant", "content": ""}]
    assert passes_tests(USES, "assert count([7, 8]) == 2", [*later, {"role": "user", "content": "Go."}]) == passes


def test_only_imports_are_taken_from_a_prompt():
    conversation = [{"role": "user", "content": f"```python\nimport math\n{DOUBLE}```\nIs it right?"}]
    assert not passes_tests("Yes.", "assert double(2) == 4", conversation)
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"```python\n{IMPORTS}```"}]
    assert not passes_tests(USES, "assert count([7]) == 1", [*conversation, {"role": "user", "content": "?"}])


def test_code_sees_neither_the_folder_nor_the_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "1")
    assert passes_tests("x = 1", "import os\nassert not os.listdir('.') and 'SECRET' not in os.environ")


def test_no_argument_is_the_mark():
    assert passes_tests("x = 1", "import sys\nassert len(sys.argv) == len(sys.orig_argv) == 1")
