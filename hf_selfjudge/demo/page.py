"""In: a pair and a judge. Out: a Gradio page that streams judged text, each token coloured by who decided it; that
puts lossless and judged decoding side by side; and that shows what was measured of the judge.
"""

from __future__ import annotations

import atexit
import html
import tempfile
from pathlib import Path

import gradio as gr

from ..bench.quickstart import visible_threshold
from ..data.prompts import encode
from ..decoding.judged_model import JudgedModel
from ..decoding.rules import JudgeRule
from ..hub.publish import pull_judge
from ..judge.card import read_results
from ..judge.judge import Judge
from ..judge.threshold import PER_TOKEN, Threshold
from ..models.load import fingerprint
from ..models.pair import Pair
from ..utils.names import public_name
from ..utils.text import in_markdown, in_python
from ..utils.transfer import HubError
from .answer import (
    RecordingRule,
    StreamedAnswer,
    coloured_parts,
    judged_rows,
    marked_differences,
    measured_line,
    stream_answer,
)


LONGEST_PROMPT, LONGEST_ANSWER = 4000, 256  # characters, tokens
WAITING = 8  # visitors in the queue
COLOURS = {"draft, matched": "#2f9e44", "draft, judged": "#e8590c", "target": "#868e96"}
STEP = 0.001  # of the threshold
EXAMPLES = (
    "A baker sells 24 rolls in the morning and twice as many in the afternoon. How many rolls is that in all?",
    # With the known pair, where the page starts, one judged token changes the meaning of this answer …
    "Anna is three years older than Ben, and together they are 27. How old is Anna? Answer in one or two sentences.",
    # … and the judged tokens of this one change only its wording.
    "Tom has 15 marbles. He gives a third of them to Ann and then buys 8 more. How many marbles does he have now? "
    "Answer in one or two sentences.",
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


# The two kinds of threshold, and what the slider says about each.
RULES = {
    "judge": "Threshold: accepted below this probability of another meaning (0 is lossless)",
    "judge per token": "Threshold: accepted below this probability of another meaning for each token gained",
}
# Gradio writes black on these colours in the dark too, where they are dark themselves, breaks lines within words, and
# leaves gaps between tokens.
STYLE = """<style>
.dark .token.highlighted, .dark .legend-item { color: white !important; }
.textfield { word-break: normal !important; overflow-wrap: anywhere; }
.textfield .textspan { margin: 0 !important; padding: 0 !important; }  /* a word may consist of several tokens */
</style>"""
INTRODUCTION = """
# Judge decoding

A small **draft** model proposes tokens, the **target** checks them all at once. Stock decoding throws a draft token
away whenever the target would have chosen another. A **judge** keeps those that would not change what the answer says,
so that each check of the target yields more tokens. Orange is what it kept; the table lists what the target would have
said instead, and what the judge makes of it.
"""


class _Handlers:
    """What the page does when a visitor presses a button or changes a setting."""

    def __init__(self, pair: Pair, judge: Judge, name: str):
        self.pair, self.judge = pair, judge
        references = (pair.target.config.name_or_path, pair.draft.config.name_or_path, name)
        self.names = [public_name(reference) for reference in references]
        rule = JudgeRule(judge, allow_other_weights=True)
        self.judged = JudgedModel(pair.target, rule, "auto", pair.tokenizer)  # keeps what is measured of the machine
        # Where the slider starts for each rule. Short drafts show little of a careful threshold.
        start = visible_threshold(judge)
        self.first_rule = "judge per token" if start.per_token else "judge"
        self.starts = {"judge": 0.3, "judge per token": 0.03}
        for known in (judge.info.threshold, start):
            self.starts["judge per token" if known.per_token else "judge"] = known.limit

    def prompt_ids(self, prompt: str, length: int):
        """The prompt's tokens, of shape `(1, prompt_length)`, or an error for the visitor."""
        if not prompt.strip():
            raise gr.Error("Write a prompt first, or choose one of the examples.", duration=8)
        if len(prompt) > LONGEST_PROMPT:
            raise gr.Error(f"The prompt has {len(prompt)} characters, more than {LONGEST_PROMPT}. Shorten it.")
        try:
            return encode(self.pair.tokenizer, prompt, self.pair.context, int(length)).to(self.pair.target.device)
        except ValueError as error:  # the page shows an error as HTML
            raise gr.Error(html.escape(str(error), False)) from error

    def stream(self, ids, rule: str, threshold: float, length: int, temperature: float = 0.0):
        """See [`stream_answer`]."""
        limit = Threshold(threshold, rule == "judge per token")
        recording = RecordingRule(self.judge, limit, allow_other_weights=True)
        return stream_answer(self.pair, recording, ids, int(length), temperature, self.judged)

    def generate(self, prompt: str, rule: str, threshold: float, temperature: float, length: int):
        """Judged text as it comes: coloured parts, figures, and the judged tokens."""
        ids, tokenizer = self.prompt_ids(prompt, length), self.pair.tokenizer

        def parts(growing: bool):
            return coloured_parts(tokenizer, answer, growing), measured_line(answer), judged_rows(tokenizer, answer)

        for answer in self.stream(ids, rule, threshold, length, temperature):  # noqa: B007
            yield parts(growing=True)
        yield parts(growing=False)

    def compare(self, prompt: str, rule: str, threshold: float, length: int):
        """Lossless and judged, one after the other: both texts with the differences marked, and their figures."""
        ids = self.prompt_ids(prompt, length)
        answers = {"lossless": StreamedAnswer(), f"with {rule}": StreamedAnswer()}

        def marked(growing: bool):
            return marked_differences(self.pair.tokenizer, *(answer.ids for answer in answers.values()), growing)

        for label, limit in zip(answers, (0.0, threshold), strict=True):
            for answers[label] in self.stream(ids, rule, limit, length):
                yield *marked(growing=True), gr.skip()
        lines = [f"**{label}**: {measured_line(answer)}" for label, answer in answers.items()]
        yield *marked(growing=False), "\n\n".join(lines)

    def code(self, rule: str, threshold: float, temperature: float, length: int) -> str:
        """Python code that decodes as the page does with these settings."""
        target, draft, judge = map(in_python, self.names)
        limit = in_python(f"{threshold:g}{PER_TOKEN}") if rule == "judge per token" else f"{threshold:g}"
        sampling = f"do_sample=True, temperature={temperature:g}" if temperature else "do_sample=False"
        return f"""from hf_selfjudge import JudgedModel, load_model

target, tokenizer = load_model({target})
draft, _ = load_model({draft})
judged = JudgedModel.from_pretrained(target, {judge}, threshold={limit})
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = judged.generate(**inputs, assistant_model=draft, max_new_tokens={int(length)}, {sampling})
print(tokenizer.decode(output[0]), judged.stats)
"""

    def slider(self, rule: str):
        """The slider as it starts for a rule."""
        return gr.Slider(value=self.starts[rule], label=RULES[rule])


def build(pair: Pair, judge: Judge, name: str, folder: Path | None = None) -> gr.Blocks:
    """Build the page. `name` is what the judge is loaded by, `folder` has what was measured of it."""
    handlers = _Handlers(pair, judge, name)
    own = handlers.first_rule
    with gr.Blocks(title="Judge decoding") as page:
        gr.HTML(STYLE, visible="hidden")
        gr.Markdown(INTRODUCTION)
        prompt = gr.Textbox(label="Prompt", lines=2, max_length=LONGEST_PROMPT, value=EXAMPLES[0], elem_id="prompt")
        gr.Examples([[text] for text in EXAMPLES], prompt, label="Examples")
        with gr.Row():
            with gr.Column(scale=2, min_width=320), gr.Tabs():
                with gr.Tab("Generate"):
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Stop", elem_id="stop")
                    colours = {"color_map": COLOURS, "combine_adjacent": True, "show_legend": True}
                    text = gr.HighlightedText(label="Answer", elem_id="answer", **colours)
                    figures = gr.Markdown(elem_id="figures")
                    headers = ["place", "judged token", "the target's choice", "estimated cost"]
                    table = gr.Dataframe(headers=headers, label="Judged tokens", interactive=False, elem_id="judged")
                with gr.Tab("Compare"):
                    with gr.Row():
                        both = gr.Button("Compare", variant="primary", elem_id="compare")
                        halt = gr.Button("Stop")
                    with gr.Row():
                        marks = {"color_map": {"differs": "#e8590c"}, "show_inline_category": False}
                        lossless = gr.HighlightedText(label="Lossless", elem_id="lossless", **marks)
                        judged = gr.HighlightedText(label="With the judge", elem_id="with-judge", **marks)
                    summary = gr.Markdown(elem_id="summary")
                with gr.Tab("Curve"):
                    _curve(judge, folder)
                with gr.Tab("Use it"):
                    snippet = gr.Code(language="python", value="", label="Copy this", interactive=False)
            with gr.Column(scale=1, min_width=280):
                rule = gr.Dropdown(list(RULES), value=own, label="Rule")
                start = handlers.starts[own]
                threshold = gr.Slider(0, 1, start, step=STEP, label=RULES[own], elem_id="threshold")
                temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0 is greedy)")
                length = gr.Slider(16, LONGEST_ANSWER, 96, step=8, label="Longest answer, tokens")
        settings = [rule, threshold, temperature, length]
        aside = {"queue": False, "api_visibility": "private"}  # answered at once, however many are waiting
        rule.input(handlers.slider, rule, threshold, **aside)
        changes = [page.load, *(setting.change for setting in settings)]
        gr.on(changes, handlers.code, settings, snippet, **aside)
        alone = {"concurrency_id": "models", "concurrency_limit": 1}  # one at a time: the machine is shared
        shown = [text, figures, table]
        running = go.click(handlers.generate, [prompt, *settings], shown, api_name="generate", **alone)
        stop.click(None, cancels=[running], api_visibility="private")
        compared, shown = [prompt, rule, threshold, length], [lossless, judged, summary]
        comparing = both.click(handlers.compare, compared, shown, api_name="compare", **alone)
        halt.click(None, cancels=[comparing], api_visibility="private")
    return page.queue(max_size=WAITING)  # further visitors see that it is full


def _curve(judge: Judge, folder: Path | None) -> None:
    """The measured curves of the judge."""
    benches = {} if folder is None else read_results(folder, fingerprint(judge)).get("bench", {})
    if not benches:
        gr.Markdown("Nothing was measured of this judge yet. `hf-selfjudge bench` and `hf-selfjudge card` do that.")
    for name, bench in benches.items():
        gr.Markdown(f"### {in_markdown(name)}\n\n{in_markdown(bench['heading'])}")
        if (curve := folder / f"curve-{name}.png").is_file():
            gr.Image(str(curve), show_label=False, interactive=False)
