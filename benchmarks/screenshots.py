"""Make the screenshots of docs/web.md with the bundled weights: python benchmarks/screenshots.py [--out docs]

Needs Chromium or Chrome, and the extra "test". The page is used as a visitor would: it draws two images of its first
example, lays out a wall and selects two images on it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import gradio as gr
from playwright.sync_api import Browser, Page, expect, sync_playwright

from dall3 import Dall3Pipeline
from dall3.web import serve

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 600_000  # ms


def use_page(browser: Browser, address: str, width: int, height: int, scale: int = 1) -> Page:
    """Open the page in a window of this size, draw images, lay out a wall and select two images on it."""
    page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.locator("#draw").click()
    expect(page.locator("#status")).to_contain_text("done", timeout=TIMEOUT)
    page.locator("#lay").click()
    expect(page.locator("#wall img")).to_have_count(8, timeout=TIMEOUT)
    for number in (0, 3):
        page.locator("#wall button").nth(number).click()
        expect(page.locator("#chosen input").nth(number)).to_be_checked(timeout=TIMEOUT)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # the end of animations
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="output folder")
    out = parser.parse_args().out
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed")
    address = serve(Dall3Pipeline.from_pretrained(), port=None, block=False)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            use_page(browser, address, 1280, 900).screenshot(path=out / "web_desktop.png", full_page=True)
            use_page(browser, address, 390, 844).screenshot(path=out / "web_phone.png", full_page=True)
            browser.close()
    finally:
        gr.close_all(verbose=False)


if __name__ == "__main__":
    main()
