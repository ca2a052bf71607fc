"""Pictures of the playground for the README, by driving the page in a browser without a window.

python jobs/picture_playground.py --output docs/images

Needs chromium, on the PATH or named by HIRED_CHROMIUM. The endpoint runs in this process, with the model that
ships.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from starlette.types import ASGIApp

from pipeline.serve.app import create_app
from pipeline.serve.local import LocalBackend
from pipeline.serve.settings import Settings

# A browser that asks nobody for updates; root, as in containers, has no sandbox.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass(frozen=True, slots=True)
class Shot:
    """A picture to take: the file's name, the window's width, the colours, and whether to show attention."""

    name: str
    width: int
    scheme: Literal["light", "dark"]
    attention: bool = False


SHOTS = (
    Shot("playground-light", 1280, "light"),
    Shot("playground-dark", 1280, "dark"),
    Shot("playground-attention", 1280, "light", attention=True),
    Shot("playground-phone", 360, "light"),
)


def main() -> int:
    options = _parser().parse_args()
    browser_path = chromium()
    if browser_path is None:
        print("no chromium: install it, or name it in HIRED_CHROMIUM", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    settings = Settings(model="embedded", device="cpu", dtype="float32")
    app = create_app(settings, LocalBackend(settings.config()))
    with served(app) as url, browser(browser_path) as chrome:
        for shot in SHOTS:
            path = options.output / f"{shot.name}.png"
            take(chrome, url, shot, path)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0


def chromium() -> str | None:
    """Where chromium is, if it is here."""
    return os.environ.get("HIRED_CHROMIUM") or shutil.which("chromium")


@contextmanager
def browser(path: str) -> Iterator[Browser]:
    """A browser with a profile of its own, closed at the end."""
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        try:
            yield chrome
        finally:
            chrome.close()


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The application's address while it is served on this machine."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, name="endpoint", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the endpoint did not start; its log says why")
        time.sleep(0.02)
    try:
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}/"
    finally:
        server.should_exit = True
        thread.join()


def take(chrome: Browser, url: str, shot: Shot, path: Path) -> None:
    """The page with the example asked about, with and without dropping."""
    page = chrome.new_page(
        viewport={"width": shot.width, "height": 900}, color_scheme=shot.scheme, reduced_motion="reduce"
    )
    page.goto(url)
    page.get_by_role("button", name="Example picture").click()
    page.locator("figure[data-kept]").first.wait_for()
    page.get_by_label("Compare with all tokens").check()
    for _ in range(2):  # the first answer of a new endpoint takes longer than those after it
        page.get_by_role("button", name="Ask").click()
        page.locator("article[aria-busy=false]").nth(1).wait_for()
    if shot.attention:
        page.get_by_label("Attention", exact=True).check(force=True)
        page.locator("#seen[data-shows^=attention]").wait_for()
    _settle(page, shot.width)
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    # A third of the bytes; nobody sees that there are 256 colours only.
    image.quantize(256, kmeans=4, dither=Image.Dither.NONE).save(path, optimize=True)
    page.close()


def _settle(page: Page, width: int) -> None:
    """Nothing pointed at, and a window as high as the page: what sticks to its edge lies where it belongs."""
    page.mouse.move(0, 0)
    height = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size({"width": width, "height": int(height)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
