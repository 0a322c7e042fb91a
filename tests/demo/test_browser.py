"""The page in a real browser: headless Chromium, driven by Selenium. Skipped where there is none."""

import copy
import re
import shutil
import threading
import time

import pytest

from hf_selfjudge.demo.page import build
from hf_selfjudge.models.pair import Pair
from tests.builders import Pace, random_judge


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs the programs chromium and chromedriver"),
    pytest.mark.heavy,
]
WAIT = 60  # seconds until a test gives up


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1400"):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def launched(llama, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pages = []

    def launch(tokenizer):
        target, draft = llama
        pace = Pace(target)
        pages.append(build(Pair(pace.model, draft, tokenizer), random_judge(target), "me/tiny-judge"))
        pages[-1].launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, ssr_mode=False)
        return pages[-1], pace

    yield launch
    for page in pages:
        page.close()


class Visitor:
    """What somebody does on the page, and sees."""

    def __init__(self, browser, page):
        self.browser, self.page = browser, page
        browser.get(page.local_url)
        self.arrived()

    def arrived(self):
        """The page is there."""
        self.until(lambda: self.find("#threshold input[type=range]"))

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def until(self, condition):
        end = time.monotonic() + WAIT
        while not (found := condition()):
            assert time.monotonic() < end, f"still waiting; the page says {self.find('body')[0].text!r}"
            time.sleep(0.05)
        return found

    def write(self, text):
        (box,) = self.find("#prompt textarea")
        box.clear()
        box.send_keys(text)

    def set_threshold(self, value):
        (box,) = self.find("#threshold input[type=number]")
        self.browser.execute_script("arguments[0].select()", box)
        box.send_keys(f"{value}\t")
        (slider,) = self.find("#threshold input[type=range]")
        self.until(lambda: float(slider.get_attribute("value")) == value)

    def press(self, name):
        self.until(lambda: self.find(f"#{name}"))[0].click()

    def tab(self, name):
        self.browser.find_element("xpath", f"//button[@role='tab' and normalize-space()='{name}']").click()

    def tokens(self, name="answer"):
        """What is shown, and the colour behind each part."""
        script = """return [...document.querySelectorAll(arguments[0] + ' .textfield .token')].map(
            part => [part.innerText, getComputedStyle(part).backgroundColor])"""
        return self.browser.execute_script(script, f"#{name}")

    def figures(self):
        return self.find("#figures")[0].text

    def answer(self):
        """Press the button; the figures of the whole answer."""
        before = self.figures()
        self.press("generate")
        return self.until(lambda: self.whole_answer(before))

    def whole_answer(self, before=""):
        line = self.figures()
        return line if line.startswith("96 tokens in") and line != before else None


@pytest.fixture
def visit(browser, launched, tokenizer):
    page, pace = launched(tokenizer)
    return Visitor(browser, page), pace


def test_the_first_round_is_seen_before_the_second_ends(visit):
    visitor, pace = visit
    visitor.write("why is it so?")
    visitor.set_threshold(0.5)
    pace.hold_from(2)
    visitor.press("generate")
    seen = visitor.until(visitor.tokens)
    visitor.until(lambda: pace.calls == 2)  # and it is held there
    pace.gate.set()
    visitor.until(visitor.whole_answer)
    shown = visitor.tokens()
    assert "".join(text for text, _ in shown).startswith("".join(text for text, _ in seen))
    assert len({colour for _, colour in shown}) == 3
    assert visitor.find("#judged td")


def test_the_threshold_moves_the_judged_share(visit):
    visitor, _ = visit
    visitor.write("why is it so?")
    shares = []
    for threshold in (0, 0.5, 1):
        visitor.set_threshold(threshold)
        shares.append(int(re.search(r"(\d+)% judged", visitor.answer())[1]))
    assert shares[0] == 0 < shares[1] < shares[2]


def test_stop_and_go_on(visit):
    visitor, pace = visit
    pace.hold_from(3)
    visitor.press("generate")
    visitor.until(visitor.tokens)
    visitor.until(lambda: pace.calls == 3)
    visitor.press("stop")
    visitor.until(lambda: not any(visitor.page._queue.active_jobs))  # the click has arrived
    pace.gate.set()
    visitor.until(lambda: "decode" not in {thread.name for thread in threading.enumerate()})
    assert pace.calls < 20  # of some sixty
    assert not visitor.whole_answer()
    assert visitor.answer()


def test_a_reload_in_the_middle(visit):
    visitor, pace = visit
    pace.hold_from(3)
    visitor.press("generate")
    visitor.until(visitor.tokens)
    visitor.browser.refresh()
    visitor.arrived()
    assert not visitor.tokens()
    pace.gate.set()
    assert visitor.answer()


def test_compare(visit):
    visitor, _ = visit
    visitor.write("why is it so?")
    visitor.set_threshold(1)
    visitor.tab("Compare")
    visitor.press("compare")
    visitor.until(lambda: "with judge" in visitor.find("#summary")[0].text)
    lossless, judged = visitor.tokens("lossless"), visitor.tokens("with-judge")
    assert lossless != judged
    assert len({colour for _, colour in judged}) == 2  # some differs, some does not


def test_code_to_copy(visit):
    visitor, _ = visit
    visitor.set_threshold(0.25)
    visitor.tab("Use it")
    visitor.until(lambda: 'from_pretrained(target, "me/tiny-judge", threshold=0.25)' in visitor.find("body")[0].text)


def test_a_mistake_ends_in_a_sentence_on_the_page(visit):
    visitor, _ = visit
    visitor.write(" ")
    visitor.press("generate")
    visitor.until(lambda: "Write a prompt first" in visitor.find("body")[0].text)


def test_markup_of_the_model_stays_text(browser, launched, tokenizer):
    tricky = copy.copy(tokenizer)
    tricky.decode = lambda ids, **_: "<img class='evil' src='x'>" * len(ids)
    page, _ = launched(tricky)
    visitor = Visitor(browser, page)
    visitor.set_threshold(1)
    visitor.answer()
    assert "<img class='evil' src='x'>" in visitor.tokens()[0][0]
    assert "<img class='evil' src='x'>" in visitor.find("#judged")[0].text
    visitor.tab("Compare")
    visitor.press("compare")
    visitor.until(lambda: "with judge" in visitor.find("#summary")[0].text)
    assert not visitor.find(".evil")
