"""Pieces of answers join to the answer, and text is never markup."""

import io
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.console import Console

from hf_selfjudge.utils.text import in_code, in_markdown, in_plot, in_python, in_shell, in_terminal, pieces, token_text
from tests.builders import byte_tokenizer, llama_tokenizer, tiny_tokenizer


TOKENIZERS = [llama_tokenizer(), byte_tokenizer(), tiny_tokenizer()]
HARM = [
    "[/INST] follow", "[math]", ":smile:", "a|b", "*a* **b** _c_ `d` ~~e~~", "<script>x</script> &lt; &", "[a](b)",
    "![a](b)", "__all__", "$5 and $6", r"$\frac$ and $", r"\[x\] \(y\) \|", "two\nlines\r\nand # more", "_begins_",
    "plain a_b-c=0.3",
    "\x1b[31mred\x1b[0m \x07", "it's \"so\"", "ends with \\", "```", "ä 😀 表",
]  # fmt: skip


# -- parts of an answer -----------------------------------------------------------------------------------------------


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_pieces_join_to_the_answer(data):
    tokenizer = data.draw(st.sampled_from(TOKENIZERS))
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    ends = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8))) + [len(ids)]
    found = pieces(tokenizer, ids, ends)
    assert len(found) == len(ends)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_what_was_shown_of_a_growing_answer_stays(data):
    tokenizer = data.draw(st.sampled_from(TOKENIZERS[:2]))
    text = data.draw(st.text("aé😀表 \n", max_size=12)).strip()
    ids = tokens_of(tokenizer, text)
    shown = ""
    for end in range(len(ids) + 1):
        (now,) = pieces(tokenizer, ids[:end], [end], growing=True)
        assert now.startswith(shown)
        assert "\ufffd" not in now
        shown = now
    assert shown == text


def test_characters_belong_to_the_piece_that_completes_them(byte_decoder):
    ids = tokens_of(byte_decoder, "the 😀😀 sky")
    whole = byte_decoder.decode(ids)
    assert whole == "the 😀😀 sky"
    ends = range(1, len(ids) + 1)
    found = pieces(byte_decoder, ids, ends)
    assert "\ufffd" not in "".join(found)
    assert found[-4:] == [" ", "s", "k", "y"]
    first, second = (i for i, piece in enumerate(found) if piece == "😀")
    assert second - first == 4  # bytes
    assert pieces(byte_decoder, ids, [first + 1, first + 2, len(ids)])[1:] == ["", "😀 sky"]


def test_the_text_that_a_token_adds(byte_decoder):
    before, (*half, last) = tokens_of(byte_decoder, "the"), tokens_of(byte_decoder, "x😀")[-4:]
    sky = next(i for i in range(len(byte_decoder)) if byte_decoder.convert_ids_to_tokens(i) in ("▁sky", "Ġsky"))
    assert token_text(byte_decoder, before, sky) == " sky"
    assert token_text(byte_decoder, before, half[0]) in ("<0xF0>", "ð")
    assert token_text(byte_decoder, before + half, last) == "😀"


# -- text that is no markup -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HARM)
def test_a_terminal_shows_it(text):
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    console.print(in_terminal(text))
    shown = console.file.getvalue()
    assert "\x1b" not in shown
    assert shown == text.replace("\r", "␍").replace("\x1b", "␛").replace("\x07", "␇") + "\n"


@pytest.mark.parametrize("text", HARM)
def test_markdown_shows_it(text):
    cell = in_markdown(text)
    document = f"## {cell}\n\n| {cell} | 1 |\n|---|---|\n| {in_code(text)} | {cell} |\n"
    html = MarkdownIt("gfm-like", {"linkify": False}).render(document)
    for tag in ("h2", "th", "td", "code", "p", "thead", "tbody", "tr", "table"):
        html = html.replace(f"<{tag}>", "").replace(f"</{tag}>", "")
    assert "<" not in html
    shown = html.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    line = " ".join(text.split()).replace("\x1b", "␛").replace("\x07", "␇")
    assert [part for part in shown.split("\n") if part] == [line, line, "1", line, line]


@pytest.mark.parametrize("text", HARM)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_plot_shows_it(text):
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], label=in_plot(text))
    (label,) = axis.legend().get_texts()
    figure.savefig(io.BytesIO())
    shown, mathematical = label._preprocess_math(label.get_text())
    assert not mathematical
    assert shown.strip() == " ".join(text.split()).replace("\x1b", "␛").replace("\x07", "␇")


@pytest.mark.parametrize("text", HARM)
def test_a_shell_and_python_read_it(text):
    command = in_shell(text)
    assert "\n" not in command
    assert subprocess.run(["bash", "-c", f"printf %s {command}"], capture_output=True).stdout.decode() == text
    assert eval(in_python(text)) == text
