"""The demo in a real browser, driven by script: each tab once, an example, an upload that is no picture.

Slow, and skipped without a Chromium of the system and Playwright, whose own browser is not needed:

    apt-get install chromium && pip install playwright && pytest -m slow tests/demo/test_browser.py

With DEMO_SCREENSHOTS=folder the pictures of the documentation are made on the way, with DEMO_MODEL of that model.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_mm


pytest.importorskip("gradio", reason='the demo needs Gradio: pip install -e ".[demo]"')
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
]
MODEL = os.environ.get("DEMO_MODEL", str(hf_mm.DEFAULT_CHECKPOINT))
START = "import hf_mm_command; hf_mm_command.main()"
PATIENCE_MS = 180_000


@pytest.fixture(scope="module")
def address():
    command = [sys.executable, "-c", START, "demo", "--model", MODEL, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def tab(address):
    """The page, open in a browser."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1100, "height": 820})
        tab.set_default_timeout(PATIENCE_MS)
        tab.goto(address)
        yield tab
        browser.close()


def show(tab, name):
    """Keeps a picture of the page for the documentation, where asked to."""
    if folder := os.environ.get("DEMO_SCREENSHOTS"):
        for note in tab.locator(".toast-close").all() if name != "error" else ():
            note.click()
        tab.evaluate("window.scrollTo(0, 0)")
        tab.wait_for_timeout(1500)
        tab.screenshot(path=Path(folder) / f"demo_{name}.png")


def open_tab(tab, name):
    tab.get_by_role("tab", name=name).click()


def wait_for(tab, place, text):
    playwright.expect(tab.locator(place)).to_contain_text(text, timeout=PATIENCE_MS)


def test_an_upload_that_is_no_picture_is_answered_with_a_line(tab, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    open_tab(tab, "Caption")
    with tab.expect_response(re.compile("/upload")):
        tab.locator("#caption-picture input[type=file]").set_input_files(tmp_path / "a.png")
    tab.locator("#caption-picture img").wait_for(state="attached")
    tab.locator("#caption-button").click()
    tab.get_by_text("is no picture in a format").wait_for()
    assert "Traceback" not in tab.locator("body").inner_text()
    show(tab, "error")


def test_pictures_are_drawn_on_the_way_and_to_the_end(tab):
    open_tab(tab, "Draw")
    tab.locator("#draw-prompt textarea").fill("a red star on a white background")
    tab.locator("#draw-seed input").fill("5")
    tab.locator("#draw-number input[type=number]").fill("2")
    tab.locator("#draw-button").click()
    wait_for(tab, "#draw-status", "Step ")
    wait_for(tab, "#draw-status", "Done. Seed: 5, 6")
    playwright.expect(tab.locator("#draw-pictures img")).to_have_count(2)
    show(tab, "draw")


def test_an_example_is_one_click_and_draws_with_a_new_seed(tab):
    open_tab(tab, "Draw")
    tab.locator("#draw-seed input").fill("")
    tab.locator("#draw-examples button", has_text="a purple moon").click()
    wait_for(tab, "#draw-status", "Step ")
    wait_for(tab, "#draw-status", "Done. Seed: ")
    assert tab.locator("#draw-prompt textarea").input_value() == "a purple moon"
    seeds = re.findall(r"\d+", tab.locator("#draw-status").inner_text())
    assert seeds and seeds[0] not in ("0", "5")


def test_what_was_drawn_is_captioned(tab):
    open_tab(tab, "Draw")
    tab.locator("#draw-to-caption").click()
    tab.locator("#caption-picture img").wait_for()
    tab.locator("#caption-button").click()
    text = tab.locator("#caption-text textarea")
    playwright.expect(text).to_have_value(re.compile("moon"), timeout=PATIENCE_MS)
    show(tab, "caption")


def test_an_example_is_edited(tab):
    open_tab(tab, "Edit")
    tab.locator("#edit-seed input").fill("3")
    tab.locator("#edit-examples tbody tr").first.click()
    wait_for(tab, "#edit-status", "Done. Seed: 3")
    playwright.expect(tab.locator("#edit-pictures img")).to_have_count(1)
    show(tab, "edit")


def test_a_conversation_has_two_turns(tab):
    open_tab(tab, "Chat")
    tab.locator("#chat-seed input").fill("3")
    tab.locator("#chat-examples button").first.click()
    wait_for(tab, "#chat-status", "Seed: 3")
    tab.locator("#chat-seed input").fill("4")
    tab.locator("#chat-message textarea").fill("make it blue")
    tab.locator("#chat-message textarea").press("Enter")
    wait_for(tab, "#chat-status", "Seed: 4")
    wait_for(tab, "#chat-shown", "make it blue")
    show(tab, "chat")
