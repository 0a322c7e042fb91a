"""Do two answers say the same?"""

import pytest
import torch

from hf_selfjudge.meaning import differing, passes_tests, reconvergence, says_no


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
        ("```python\ndef double(x):\n    return 2 * x\n```\nUse:\n```python\nprint(doub", True),  # cut off behind it
        ("```\ndef double(x):\n    return 2 * x\n```\nprints\n```\n6\n```", True),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("def double(x):\n    return 2 * x\0", False),
        ("def double(x):\n    return 2 * x  # \ud800", True),
        ("def double(x):\n    return 2 * x  # " + "x" * 200_000, True),
    ],
)
def test_code(answer, passes):
    assert passes_tests(answer, "assert double(2) == 4\nassert double(0) == 0", seconds=2.0) == passes


def test_code_sees_neither_the_folder_nor_the_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "1")
    assert passes_tests("x = 1", "import os\nassert not os.listdir('.') and 'SECRET' not in os.environ")


def test_differing_passages():
    words = " ".join(f"w{i}" for i in range(60))
    assert differing(words, words) == (" ".join(words.split()[-12:]),) * 2
    first, second = differing(f"{words} is red {words}", f"{words} looks red {words}")
    assert first.split() == [*words.split()[-12:], "is", "red", *words.split()[:11]]
    assert second.split()[12] == "looks"
    assert differing("a b", "c d") == ("a b", "c d")
    assert differing("", "c d") == ("", "c d")


def test_the_target_is_asked(llama, tokenizer):
    """Its probability of "no" against "yes", whichever way they are spelt; none if the question is too long."""
    target, _ = llama
    target.config.max_position_embeddings = 2048
    no = says_no(target, tokenizer, "why?", "it is so", "it is not so")
    target.config.max_position_embeddings = 256
    assert 0 < no < 1
    head = target.get_output_embeddings()
    bias = torch.zeros(64)
    bias[tokenizer.encode("n")[0]] = 100.0  # one token a character: the first tells
    head.bias = torch.nn.Parameter(bias)
    target.config.max_position_embeddings = 2048
    sure = says_no(target, tokenizer, "why?", "it is so", "it is not so")
    target.config.max_position_embeddings = 256
    head.bias = None
    assert sure > 0.999
    assert says_no(target, tokenizer, "why?" * 100, "it is so", "it is not so") is None
