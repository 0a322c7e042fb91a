"""Numbers as answers write them: the value of a whole number, or nothing."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_selfjudge.scoring.final_answers import final_number


# A value, and texts that end in it.
READ = r"""
7 ¦ so 3 + 4 = 7. ¦ 7. ¦ 7.00 ¦ 07 ¦ 007 ¦ \fbox{7} ¦ 2 or 3, then 7 ¦ 7 (seven) ¦ step 1. 7 ¦ 7, that is
7 ¦ x = {7} ¦ \underline{7} ¦ \color{red}{7} ¦ \textcolor{red}{7} ¦ \{7\} ¦ \bf{7} ¦ \boxed{\bf 7} ¦ {\large 7}
7 ¦ \mathbf 7 ¦ \begin{aligned} x &= 3+4 \\ &= 7 \end{aligned} ¦ Total: ___7___ ¦ No.7 ¦ 7\n ¦ \boxed{x = 3 + 4 = 7}
12 ¦ a \boxed{12} b 13 ¦ \boxed{3} \boxed{12\text{ apples}} ¦ \boxed{x = 12} ¦ \boxed {\text{12}} ¦ \boxed{3 + 9 = 12}
12 ¦ \boxed{12\text{ m}^2} ¦ \boxed{\boxed{12}} ¦ 12-pack ¦ \(12\) ¦ <b>12</b> ¦ 12 m² ¦ 12 cm^2 ¦ 12 m/s^2
5 ¦ 5^{\text{th}} ¦ 5^{th} ¦ USD5 ¦ EUR5 ¦ Rs.5 ¦ $\boxed 5$ is 6
5 ¦ 5 apples ¦ - 5 apples ¦ * 5 apples ¦ + 5 ¦ – 5 apples ¦ +5 ¦ 5kg ¦ 5m ¦ 5th ¦ 5/hour ¦ $x$ is$5$ ¦ 5! ¦ 共5个
5 ¦ 5% ¦ 5 % ¦ \boxed{5\%} ¦ 5° ¦ 5^\circ ¦ 5€ ¦ €5 ¦ US$5 ¦ {"answer": 5} ¦ 4 $5 bills ¦ 10 (5 more)
-5 ¦ -5 ¦ −5 ¦ it falls to -5 ¦ ﹣5 ¦ －5 ¦ –5 ¦ -$5 ¦ $-5 ¦ -\$5 ¦ -US$5 ¦ $-5$ ¦ (-5) ¦ x=-5 ¦ x = - 5 ¦ x = − 5
-5 ¦ -$ 5 ¦ **-5** ¦ *-5* ¦ - -5 ¦ 答案是-5
-5 ¦ \boxed{- 5} ¦ \boxed{-\,5} ¦ \boxed{-~5} ¦ \boxed{- \$5} ¦ \boxed{x = - 5}
4 ¦ GPT-4 ¦ 48/2 = $<<48/12=4>>4 ¦ 8 / 2 ¦ 8 ÷ 2 ¦ 5 - 1 = 4
18 ¦ \boxed{{18}} ¦ \boxed 18 ¦ 1.5 dozen
18 ¦ **18** ¦ *18* ¦ _18_ ¦ __18__ ¦ `18` ¦ **$18** ¦ $**18** ¦ #### 18 ¦ １８ ¦ ١٨ ¦ 𝟏𝟖
1000 ¦ 1,000 ¦ 1{,}000 ¦ 1,\!000 ¦ 1\,000 ¦ 1~000 ¦ 1 000 ¦ 1'000 ¦ 1’000 ¦ 1_000 ¦ 1\_000 ¦ 1٬000 ¦ 1k ¦ 1 thousand
1000 ¦ \boxed{\$1{,}000} ¦ 1e3 ¦ 1E+03 ¦ 10^3 ¦ 10^{3} ¦ 10³ ¦ 10**3 ¦ 10<sup>3</sup> ¦ 1.0x10^3 ¦ 1.0 \times 10^{3}
100000 ¦ 1,00,000 ¦ 100 000 ¦ 1 lakh ¦ 100,000. ¦ $0.1m
5000000 ¦ 5\text{ million} ¦ $5 \text{ million}$ ¦ \boxed{5 \text{ million}} ¦ \boxed{5~\text{million}}
3000000000 ¦ $3 bn ¦ $3 B ¦ $3B ¦ $3bn
1500000 ¦ 1.5 million ¦ $1.5M ¦ $1.5 M ¦ $1.5m ¦ 1,500,000 ¦ 1 500 000 ¦ 1.5-million-dollar ¦ 1.5 × 10⁶ ¦ 1.5\cdot10^6
1/2 ¦ .5 ¦ 0.50 ¦ $.50 ¦ ½ ¦ ½ cup ¦ 1/2 ¦ 1⁄2 ¦ 1∕2 ¦ \frac{1}{2} ¦ \frac12 ¦ \tfrac 12 ¦ 5e-1 ¦ 2^-1
-1/2 ¦ -.5 ¦ -½ ¦ -1/2 ¦ −1/2 ¦ -\dfrac{1}{2} ¦ \frac{-1}{2}
3/4 ¦ \boxed{\frac{3}{4}} ¦ $\frac{3}{4}$ ¦ ¾ ¦ 3 / 4
7/2 ¦ 3½ ¦ 3 ½ ¦ 3 1/2 ¦ 3\frac{1}{2} ¦ 3 \frac12 ¦ 3.5
1234.5 ¦ The total is $1,234.50 for 3 days: 1,234.50 ¦ 1 234.5
"""
SPACED = [f"1{space}000" for space in "\xa0\u2007\u2009\u202f\u200b"]
UNKNOWN = r"""
no number ¦ twelve
\boxed{none} 5 ¦ 5 \boxed{1 ¦ \boxed{\frac{1}{2} ¦ 5 \boxed{\pi} ¦ \boxed{5, 6} ¦ \boxed{(5, 6)}
\boxed{x^2} ¦ \boxed{5 \text{ or } 6} ¦ \boxed{2\text{ h }30\text{ min}}
\boxed{x=2\text{ or }x=3} ¦ \boxed{x=2, y=3} ¦ \boxed{x<3} ¦ \boxed{x \le 3} ¦ \boxed{[3,\infty)} ¦ \boxed{(-\infty,3]}
\boxed{|-5|} ¦ \boxed{\text{negative } 5} ¦ minus 5
\boxed{3!} ¦ \boxed{3e} ¦ \boxed{3'} ¦ \boxed{\sin(3)} ¦ \boxed{\max(3)} ¦ \boxed{f(3)} ¦ sqrt(3)
\log_{10} 100 ¦ \log_2 8 ¦ \begin{pmatrix} 1 \\ 2 \end{pmatrix} ¦ \boxed{\begin{aligned}x&=2\\y&=3\end{aligned}}
Room 7B ¦ 7B ¦ 1.5M ¦ \boxed 1, 2 ¦ \sqrt {3} ¦ \frac{x} {2}
It takes 10-15 minutes ¦ 10–15 ¦ 10 – 15 ¦ 10—15 ¦ $10-$15 ¦ $10$-$15$ ¦ 10%-15% ¦ \(10\)-\(15\) ¦ 10..15 ¦ 10~15
10kg-15kg ¦ 2 million-3 million ¦ 1/2-3/4 ¦ 10 ± 2
1.000,50 ¦ 1,5 ¦ 1,2,3 ¦ 12,34 ¦ 1,0000 ¦ 1.000.000 ¦ 0,500 ¦ 1, 000 ¦ 1，000 ¦ 1 2 ¦ 1 0000 ¦ 1'00
2024-05-12 ¦ 12/05/2024 ¦ 3:30 ¦ 3 : 5 ¦ 1.2.3 ¦ 5'3" ¦ 2h30m ¦ 0x1F ¦ 101_2 ¦ 101₂ ¦ H2O ¦ x1 ¦ v2.0
2\sqrt{3} ¦ √3 ¦ 3√2 ¦ 5\pi ¦ 5 \pi ¦ 25π ¦ 5 pi ¦ 2x ¦ 2 x ¦ 3x^2 ¦ e^2 ¦ 2x+3 ¦ x-5 ¦ x - 5 ¦ \binom{5}{2} ¦ \frac123
\frac{x}{2} ¦ \frac{2}{x} ¦ \frac{\sqrt{3}}{2} ¦ \frac{x-2}{y} ¦ 2\frac{x}{y} ¦ \frac{}{2}
5 + 3 ¦ 5+3 ¦ 5 - 3 ¦ 3 * 4 ¦ 3 x 4 ¦ 3x4 ¦ (3+4)/2 ¦ (3+4) * 2 ¦ 2(3) ¦ 2*(3) ¦ 2 - (3) ¦ 5 apples - 3 ¦ the total - 5
3 and 1/2 ¦ 3 and a half ¦ 3 5/4 ¦ 33.33... ¦ 0.\overline{3} ¦ 5/0 ¦ 0^-1 ¦ \frac{1}{0} ¦ 5万
10^999999999 ¦ 1e99999 ¦ 10^{10^{10}}
"""
HUGE = ["9" * 10_000, "1" + ",000" * 10_000, "9" * 150 + "^999999"]
ROWS = [row.split(" ¦ ") for row in READ.strip().splitlines()]
CASES = [(text, Fraction(value)) for value, *texts in ROWS for text in texts] + [(text, 1000) for text in SPACED]
CASES += [(text, None) for row in UNKNOWN.strip().splitlines() for text in row.split(" ¦ ")]
CASES += [(text, None) for text in HUGE]


@pytest.mark.parametrize(("text", "number"), CASES, ids=[text[:40] for text, _ in CASES])
def test_a_number_as_a_whole_or_not_at_all(text, number):
    assert final_number(text) == number
    if any(character.isnumeric() for character in text) or "boxed" in text:
        assert final_number(f"9\n{text}") == number  # no other number stands in for one that cannot be read


@settings(derandomize=True, deadline=None)
@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 4),
    st.sampled_from(
        ["{}", "It is {}.", "**{}**", "${}$", r"\boxed{{{}}}", "5 - 3 = {}", "#### {}", "a: {} kg", "({})"]
    ),
    st.sampled_from([",", "", " ", "{,}", r"\,", "\xa0", "'", "_"]),
    st.sampled_from("-−–"),
)
def test_numbers_as_they_are_written(units, places, frame, mark, minus):
    written = f"{abs(units) // 10**places:,}".replace(",", mark)
    written += f".{abs(units) % 10**places:0{places}}" if places else ""
    written = (minus if units < 0 else "") + written
    assert final_number(frame.format(written)) == Fraction(units, 10**places)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.text() | st.text("0123456789.,:/-+*^_ \\{}()$%xek½³⟨−∕&=\nboxedfrac"))
def test_any_text_has_a_number_or_none(text):
    for part in (text, f"\\boxed{{{text}}}", f"\\frac{{{text}}}{{{text}}}"):
        assert final_number(part) is None or isinstance(final_number(part), Fraction)


LONG = [
    "1",
    "1,",
    "1 ",
    "1:",
    " ",
    "-",
    "- ",
    "*",
    "^ ",
    "$1",
    "_1",
    "=1",
    "½",
    "<b>",
    "{",
    r"\boxed{",
    r"\text{",
    r"\frac{1}",
]


@pytest.mark.parametrize("part", LONG)
def test_long_text_is_read(part):
    """What takes the square of its length never ends."""
    assert final_number(part * 100_000 + "\nIt is 5") == (None if "boxed" in part else 5)
