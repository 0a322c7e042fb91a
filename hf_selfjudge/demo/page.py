"""In: a pair and a judge. Out: a Gradio page that streams judged text, each token coloured by who decided it; that
puts lossless and judged decoding side by side; and that shows what was measured of the judge.
"""

from __future__ import annotations

import atexit
import html
import tempfile
from pathlib import Path

import gradio as gr

from ..data.prompts import TooLong, encode
from ..decoding.rules import JudgeRule, KLGate, Lossless, Margin, Rule
from ..hub.publish import pull_judge
from ..judge.card import read_results
from ..judge.judge import Judge
from ..judge.threshold import PER_TOKEN, Threshold
from ..models.load import fingerprint
from ..models.pair import Pair
from ..scoring.statistics import shown
from ..utils.names import public_name
from ..utils.text import in_markdown, in_python
from ..utils.transfer import HubError
from .answer import (
    StreamedAnswer,
    coloured_parts,
    judged_rows,
    marked_differences,
    measured_line,
    plot_rounds,
    stream_answer,
)


LONGEST_PROMPT, LONGEST_ANSWER = 4000, 256  # characters, tokens
WAITING = 8  # visitors in the queue
COLOURS = {"draft, matched": "#2f9e44", "draft, judged": "#e8590c", "target": "#868e96"}
STEP = 0.001  # of the threshold
EXAMPLES = (
    "A baker sells 24 rolls in the morning and twice as many in the afternoon. How many rolls is that in all?",
    "Why is the sky blue?",
    "Write a short email to my neighbours about the street party on Saturday.",
    "Translate to German: The library is closed on Mondays, but the garden is open.",
    "Write a Python function that returns the longest word of a sentence.",
    "Summarise in one sentence: Bees carry pollen from flower to flower. Without them most plants bear no fruit.",
)


def folder_of(judge: str) -> Path:
    """The folder of a judge, with what was measured of it. A judge on the Hub is fetched into a temporary folder; see
    [`pull_judge`] for errors."""
    if Path(judge).is_dir():
        return Path(judge)
    temporary = tempfile.TemporaryDirectory()
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name) / "judge"
    try:
        pull_judge(judge, folder)
    except HubError:  # out of reach: the judge may be in the cache, what was measured of it is not
        Judge.from_pretrained(judge).save_pretrained(folder)
    return folder


# -- the page --------------------------------------------------------------------------------------------------------

# Rules that can be chosen, and what the slider of each means.
RULES = {
    "judge": "Threshold: accepted below this probability of another meaning (0 is lossless)",
    "judge per token": "Threshold: accepted below this probability of another meaning for each token gained",
    "lossless": "Threshold: none, nothing is accepted",
    "margin": "Threshold: nats that a token may be less likely than the target's",
    "KL gate": "Threshold: nats between the target's distribution and the draft's",
}
# Gradio writes black on these colours in the dark too, where they are dark themselves, and breaks lines within words.
STYLE = """<style>
.dark .token.highlighted, .dark .legend-item { color: white !important; }
.textfield { word-break: normal !important; overflow-wrap: anywhere; }
</style>"""
INTRODUCTION = """
# Judge decoding

A small **draft** model proposes tokens, the **target** checks them all at once. Stock decoding throws a draft token
away whenever the target would have chosen another. A **judge** keeps those that would not change what the answer says,
so that each check of the target yields more tokens. Orange is what it kept; the table lists what the target would have
said instead, and what the judge makes of it.
"""


def rule_of(name: str, threshold: float, judge: Judge) -> Rule:
    """The rule that a visitor chose. A `ValueError` if it is unknown or cannot have this threshold."""
    if name not in RULES:
        raise ValueError(f"`rule` must be one of {', '.join(RULES)}, got {name!r}.")
    if name in ("judge", "judge per token"):
        return JudgeRule(judge, Threshold(threshold, name != "judge"), allow_other_weights=True)
    return {"lossless": Lossless(), "margin": Margin(threshold), "KL gate": KLGate(threshold)}[name]


def code_for(names: tuple[str, str, str], rule: str, threshold: float, temperature: float, max_new_tokens: int) -> str:
    """Python code that decodes as the page does. `names` are what to load target, draft and judge by; `rule` is one of
    `RULES`."""
    target, draft, judge = map(in_python, names)
    sampling = f", do_sample=True, temperature={temperature:g}" if temperature else ", do_sample=False"
    number = f"{threshold:g}"  # while a visitor changes the rule, perhaps not one that it can have
    judged_as = {"judge": number, "judge per token": in_python(number + PER_TOKEN)}
    calls = {"lossless": "Lossless()", "margin": f"Margin({number})", "KL gate": f"KLGate({number})"}
    if rule in judged_as:
        imports, judged = "", f"JudgedModel.from_pretrained(target, {judge}, threshold={judged_as[rule]})"
    else:
        imports = f"from hf_selfjudge.rules import {calls[rule].partition('(')[0]}\n"
        judged = f"JudgedModel(target, {calls[rule]}, tokenizer=tokenizer)"
    return (
        f"from hf_selfjudge import JudgedModel, load_model\n{imports}\n"
        f"target, tokenizer = load_model({target})\ndraft, _ = load_model({draft})\njudged = {judged}\n"
        'messages = [{"role": "user", "content": "Why is the sky blue?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        f"output = judged.generate(**inputs, assistant_model=draft, max_new_tokens={max_new_tokens}{sampling})\n"
        "print(tokenizer.decode(output[0]), judged.stats)\n"
    )


def on_page(threshold: Threshold) -> tuple[str, float]:
    """The rule and the place of the slider for a threshold of the judge."""
    return "judge per token" if threshold.per_token else "judge", threshold.limit


class _Handlers:
    """What the page does when a visitor presses a button or changes a setting."""

    def __init__(self, pair: Pair, judge: Judge, name: str):
        self.pair, self.judge = pair, judge
        references = (pair.target.config.name_or_path, pair.draft.config.name_or_path, name)
        self.names = tuple(map(public_name, references))
        self.own_rule, limit = on_page(judge.info.threshold)
        # For each rule the end of the slider, and where it starts.
        self.starts = {"judge": (1, 0.3), "judge per token": (1, 0.03)} | {self.own_rule: (1, limit)}
        self.starts |= {"lossless": (1, 0), "margin": (5, 1), "KL gate": (5, 0.5)}

    def prepared(self, prompt: str, rule: str, threshold: float, temperature: float, length: int):
        """The rule and the prompt's tokens, or an error in words."""
        if not prompt.strip():
            raise gr.Error("Write a prompt first, or choose one of the examples.", duration=8)
        if len(prompt) > LONGEST_PROMPT:
            raise gr.Error(f"The prompt has {len(prompt)} characters, more than {LONGEST_PROMPT}. Shorten it.")
        if not 0 <= temperature <= 2 or not 1 <= length <= LONGEST_ANSWER:
            raise gr.Error(f"The temperature must be in [0, 2], the length in [1, {LONGEST_ANSWER}] tokens.")
        try:
            ids = encode(self.pair.tokenizer, prompt, self.pair.context, int(length)).to(self.pair.target.device)
            return rule_of(rule, threshold, self.judge), ids
        except ValueError as error:  # what it says is shown as HTML
            too_long = "The prompt is longer than the model can read. " * isinstance(error, TooLong)
            raise gr.Error(html.escape(f"{too_long}{error}", False)) from error

    def generate(self, prompt: str, rule: str, threshold: float, temperature: float, length: int):
        """Judged text as it comes: coloured parts, figures, and the judged tokens."""
        tokenizer = self.pair.tokenizer
        chosen, ids = self.prepared(prompt, rule, threshold, temperature, length)

        def parts(growing: bool):
            tokens = answer.tokens
            return coloured_parts(tokenizer, tokens, growing), measured_line(answer), judged_rows(tokenizer, tokens)

        for answer in stream_answer(self.pair, chosen, ids, int(length), temperature):  # noqa: B007
            yield parts(growing=True)
        yield parts(growing=False)

    def compare(self, prompt: str, rule: str, threshold: float, length: int):
        """Lossless and judged, one after the other: both texts with the differences marked, and their rounds."""
        tokenizer = self.pair.tokenizer
        chosen, ids = self.prepared(prompt, rule, threshold, 0.0, length)
        rules = {"lossless": Lossless(), f"with {rule}": chosen}
        answers = {label: StreamedAnswer() for label in rules}

        def marked(growing: bool):
            return marked_differences(tokenizer, *(answer.tokens for answer in answers.values()), growing)

        for label, each in rules.items():
            for answer in stream_answer(self.pair, each, ids, int(length)):
                answers[label] = answer
                yield *marked(growing=True), gr.skip(), gr.skip()
        lines = [f"**{label}**: {measured_line(answer)}" for label, answer in answers.items()]
        bars = plot_rounds({label: answer.rounds for label, answer in answers.items()})
        yield *marked(growing=False), bars, "\n\n".join(lines)

    def code(self, rule: str, threshold: float, temperature: float, length: int) -> str:
        """What to copy for these settings."""
        return code_for(self.names, rule, threshold, temperature, int(length))

    def scaled(self, rule: str):
        """The slider for a rule."""
        most, value = self.starts[rule]
        return gr.Slider(0, most, value, step=STEP, label=RULES[rule], interactive=rule != "lossless")

    def at(self, point: str):
        """The rule, and the slider at one of the judge's operating points."""
        rule, value = on_page(self.judge.info.thresholds[point])
        return rule, gr.Slider(0, 1, value, step=STEP, label=RULES[rule], interactive=True)


def build(pair: Pair, judge: Judge, name: str, folder: Path | None = None) -> gr.Blocks:
    """Build the page. `name` is what the judge is loaded by, `folder` the judge's, for what was measured of it."""
    handlers, points = _Handlers(pair, judge, name), [*judge.info.thresholds]
    own = handlers.own_rule
    with gr.Blocks(title="Judge decoding") as page:
        gr.HTML(STYLE, visible="hidden")
        gr.Markdown(INTRODUCTION)
        prompt = gr.Textbox(label="Prompt", lines=2, max_length=LONGEST_PROMPT, value=EXAMPLES[0], elem_id="prompt")
        gr.Examples([[text] for text in EXAMPLES], prompt, label="Examples")
        with gr.Row():
            with gr.Column(scale=2, min_width=320), gr.Tabs():
                with gr.Tab("Generate"):
                    go, stop, answer = _generate_tab()
                with gr.Tab("Compare"):
                    both, halt, comparison = _compare_tab()
                with gr.Tab("Curve"):
                    _curve(judge, folder)
                with gr.Tab("Use it"):
                    snippet = gr.Code(language="python", value="", label="Copy this", interactive=False)
            with gr.Column(scale=1, min_width=280):
                rule = gr.Dropdown(list(RULES), value=own, label="Rule")
                point = gr.Radio(points, label="Operating point", visible=bool(points))
                start = handlers.starts[own][1]
                threshold = gr.Slider(0, 5, start, step=STEP, label=RULES[own], elem_id="threshold")
                temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0 is greedy)")
                length = gr.Slider(16, LONGEST_ANSWER, 96, step=8, label="Longest answer, tokens")
                settings = [rule, threshold, temperature, length]
        aside = {"queue": False, "api_visibility": "private"}  # answered at once, however many are waiting
        rule.input(handlers.scaled, rule, threshold, **aside)
        point.input(handlers.at, point, [rule, threshold], **aside)
        for setting in settings:
            setting.change(handlers.code, settings, snippet, **aside)
        page.load(handlers.scaled, rule, threshold, **aside)
        page.load(handlers.code, settings, snippet, **aside)
        alone = {"concurrency_id": "models", "concurrency_limit": 1}  # one at a time: the machine is shared
        running = go.click(handlers.generate, [prompt, *settings], answer, api_name="generate", **alone)
        stop.click(None, cancels=[running], api_visibility="private")
        compared = [prompt, rule, threshold, length]
        comparing = both.click(handlers.compare, compared, comparison, api_name="compare", **alone)
        halt.click(None, cancels=[comparing], api_visibility="private")
    return page.queue(max_size=WAITING)  # further visitors are told that it is full


def _generate_tab() -> tuple[gr.Button, gr.Button, list]:
    """Buttons to start and stop, and where the answer, its figures and the judged tokens are shown."""
    with gr.Row():
        go = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Stop", elem_id="stop")
    colours = {"color_map": COLOURS, "combine_adjacent": True, "show_legend": True}
    text = gr.HighlightedText(label="Answer", elem_id="answer", **colours)
    line = gr.Markdown(elem_id="figures")
    headers = ["place", "judged token", "the target's choice", "estimated cost"]
    table = gr.Dataframe(headers=headers, label="Judged tokens", interactive=False, elem_id="judged")
    return go, stop, [text, line, table]


def _compare_tab() -> tuple[gr.Button, gr.Button, list]:
    """Buttons to start and stop, and where both answers, their rounds and their figures are shown."""
    with gr.Row():
        both = gr.Button("Compare", variant="primary", elem_id="compare")
        halt = gr.Button("Stop")
    with gr.Row():
        marks = {"color_map": {"differs": "#e8590c"}, "show_inline_category": False}
        first = gr.HighlightedText(label="Lossless", elem_id="lossless", **marks)
        second = gr.HighlightedText(label="With the rule", elem_id="ruled", **marks)
    bars = gr.Plot(show_label=False, elem_id="rounds")
    return both, halt, [first, second, bars, gr.Markdown(elem_id="summary")]


def _curve(judge: Judge, folder: Path | None) -> None:
    """What was measured of the judge."""
    benches = {} if folder is None else read_results(folder, fingerprint(judge)).get("bench", {})
    if not benches:
        gr.Markdown("Nothing was measured of this judge yet. `hf-selfjudge bench` and `hf-selfjudge card` do that.")
    for name, bench in benches.items():
        gr.Markdown(f"### {in_markdown(name)}\n\n{in_markdown(bench['heading'])}")
        if (picture_file := folder / f"curve-{name}.png").is_file():
            gr.Image(str(picture_file), show_label=False, interactive=False)
        figures = ("tokens_per_round", "speed", "retention")
        rows = [[row["setting"], *(shown(row[key]) for key in figures)] for row in bench["settings"]]
        headers = ["decoding", "tokens a round", "× lossless", "retention"]
        gr.Dataframe(rows, headers=headers, interactive=False)
