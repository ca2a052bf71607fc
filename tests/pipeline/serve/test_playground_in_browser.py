"""The playground as a visitor has it: a real browser, the endpoint over HTTP, the model that ships."""

from __future__ import annotations

import asyncio
import base64
import os
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, expect

from hired.errors import EngineDeadError
from hired.types import Caption, VisualTokens
from jobs.picture_playground import browser, chromium, served
from pipeline.serve.app import create_app
from pipeline.serve.backend import Query
from pipeline.serve.keys import Keys
from pipeline.serve.local import LocalBackend
from pipeline.serve.settings import Settings

pytestmark = pytest.mark.browser

SCENES = Path(__file__).resolve().parents[3] / "examples" / "scenes"
PATIENCE_MS = 30_000  # what is waited for comes at once, but on a machine that is busy with other tests
expect.set_options(timeout=PATIENCE_MS)
SETTINGS = Settings(model="embedded", device="cpu", dtype="float32")


class ScriptedBackend(LocalBackend):
    """The real stages, which can be asked to hesitate or to break down in the middle of an answer."""

    def __init__(self) -> None:
        super().__init__(SETTINGS.config())
        self.given_up = 0

    async def stream(
        self, query: Query, images: Sequence[VisualTokens], *, in_parts: bool = True
    ) -> AsyncGenerator[str | Caption, None]:
        prompt = str(query.conversation[-1].parts[-1])
        ended = False
        try:
            async for part in super().stream(query, images, in_parts=in_parts):
                yield part
                if "break down" in prompt:
                    raise EngineDeadError("the engine failed")
                if "slowly" in prompt:
                    await asyncio.sleep(30)
            ended = True
        finally:
            self.given_up += not ended


@dataclass
class Visit:
    """A page, and what must not happen on it."""

    page: Page
    url: str
    refused: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._see_request)
        self.page.on("response", self._see_response)
        self.page.goto(self.url)

    def _hear(self, message: ConsoleMessage) -> None:
        # The browser's line about a status is no fault of the page's; the statuses are looked at themselves.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)

    def _see_request(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def _see_response(self, response: Response) -> None:
        if response.status >= 400:
            self.refused.append(response.status)

    def wait_until_ready(self) -> None:
        expect(self.page.get_by_label("Policy")).to_have_value("hired")

    def choose(self, path: Path) -> None:
        self.page.get_by_label("Choose a picture").set_input_files(path)

    def show(self, path: Path) -> None:
        self.choose(path)
        expect(self.page.locator("figure[data-kept]").first).to_be_visible()

    def ask(self, prompt: str) -> None:
        self.page.get_by_label("Prompt").fill(prompt)
        self.page.get_by_role("button", name="Ask").click()

    def set_budget(self, percent: int) -> None:
        """By the keyboard: a page of the slider is ten steps."""
        slider = self.page.get_by_label("Token budget")
        slider.press("Home")
        for _ in range(percent - 1):
            slider.press("ArrowRight")

    def written(self) -> list[int]:
        """How many tokens each partition says it keeps."""
        counts = self.page.locator("figure .count b").all_text_contents()
        return [int(count.replace(",", "")) for count in counts]

    def lit(self) -> list[int]:
        """How many patches of each partition are drawn in colour, if the picture is red all over."""
        counts: list[int] = self.page.evaluate(
            """(patches) => [...document.querySelectorAll("figure canvas")].map((canvas) => {
                 const size = canvas.width / patches, pen = canvas.getContext("2d");
                 return Array.from({length: patches ** 2}, (_, patch) => {
                   const at = [patch % patches, Math.floor(patch / patches)].map((n) => (n + 0.5) * size);
                   const [red, green] = pen.getImageData(...at, 1, 1).data;
                   return red - green > 80;
                 }).filter(Boolean).length;
               })""",
            12,
        )
        return counts


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    path = chromium()
    if path is None and os.environ.get("CI"):
        pytest.fail("CI drives the playground with chromium, which is not here; .ci/chromium installs it")
    if path is None:
        pytest.skip("needs chromium, on the PATH or named by HIRED_CHROMIUM")
    with browser(path) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture(scope="module")
def url(backend: ScriptedBackend) -> Iterator[str]:
    with served(create_app(SETTINGS, backend)) as url:
        yield url


@contextmanager
def visit(chrome: Browser, url: str, *, ready: bool = True, **options: Any) -> Iterator[Visit]:
    context = chrome.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    seen = Visit(context.new_page(), url)
    if ready:
        seen.wait_until_ready()
    yield seen
    context.close()
    assert seen.errors == []
    assert seen.elsewhere == []


@pytest.fixture
def page(chrome: Browser, url: str) -> Iterator[Visit]:
    with visit(chrome, url, viewport={"width": 1280, "height": 900}) as page:
        yield page


@pytest.fixture
def phone(chrome: Browser, url: str) -> Iterator[Visit]:
    with visit(chrome, url, viewport={"width": 360, "height": 740}, has_touch=True) as phone:
        yield phone


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """A picture of one colour: its sub-images fill a canvas of two by two."""
    path = tmp_path / "red.png"
    Image.new("RGB", (600, 600), (220, 20, 20)).save(path)
    return path


def drop(page: Page, path: Path) -> None:
    """A file dragged from the desktop: trusted events, so the page has to allow the drop as for a visitor."""
    box = page.locator("#seen").bounding_box()
    assert box is not None
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send(
            "Input.dispatchDragEvent",
            {
                "type": kind,
                "x": box["x"] + 50,
                "y": box["y"] + 50,
                "data": {"items": [], "files": [str(path)], "dragOperationsMask": 1},
            },
        )


def test_a_dropped_picture_is_cut_up_and_a_smaller_budget_lights_fewer_of_its_tokens(
    page: Visit, red: Path
) -> None:
    drop(page.page, red)
    expect(page.page.locator("figure[data-kept]")).to_have_count(5)
    expect(page.page.get_by_text("144 tokens")).to_be_visible()  # a fifth of 5 x 144
    before = page.lit()
    assert before == page.written()
    assert sum(before) == 144

    slider = page.page.get_by_label("Token budget")
    slider.press("ArrowLeft")
    for _ in range(9):
        slider.press("ArrowLeft")
    expect(page.page.locator("#kept-detail")).to_contain_text("72 patches of 720")
    after = page.lit()
    assert after == page.written()
    assert sum(after) == 72
    assert page.refused == []


def test_a_picture_can_be_pasted(page: Visit, red: Path) -> None:
    page.page.evaluate(
        """(data) => {
          const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
          const clipboardData = new DataTransfer();
          clipboardData.items.add(new File([bytes], "image.png", {type: "image/png"}));
          document.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
        }""",
        base64.b64encode(red.read_bytes()).decode(),
    )
    expect(page.page.locator("figure[data-kept]")).to_have_count(5)
    assert page.refused == []


def test_the_answer_streams_in_and_is_the_one_that_the_endpoint_gives(page: Visit) -> None:
    scene = SCENES / "scene-008.jpg"
    page.show(scene)
    page.page.evaluate(
        """() => {
          window.lengths = [];
          const note = () => window.lengths.push(document.querySelector(".said")?.textContent.length ?? 0);
          const answers = document.querySelector("#answers");
          new MutationObserver(note).observe(answers, {childList: true, subtree: true});
        }"""
    )
    page.ask("Describe the image.")
    card = page.page.locator("article")
    expect(card).to_have_attribute("aria-busy", "false")
    text = card.locator(".said").text_content()
    assert len({length for length in page.page.evaluate("window.lengths") if length}) > 3

    answer = completion(page.url, scene, "Describe the image.", 0.2)
    assert text == answer["choices"][0]["message"]["content"]
    usage = answer["usage"]
    kept, full = usage["visual_tokens_kept"], usage["visual_tokens_full"]
    expect(card.locator(".visual")).to_have_text(f"{kept} of {full}")
    expect(page.page.locator("#total")).to_have_text(
        f"{kept} of {full} visual tokens reach the language model"
    )
    expect(card.locator(".prompt")).to_have_text(str(usage["prompt_tokens"]))
    expect(card.locator(".first")).to_contain_text("s")
    expect(card.locator(".speed")).to_have_text(re.compile(r"\d+"))
    assert page.refused == []


def completion(url: str, picture: Path, prompt: str, token_budget: float) -> Any:
    uri = f"data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": prompt}]
    body = {
        "model": "embedded",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 96,
        "hired": {"token_budget": token_budget},
    }
    response = httpx.post(f"{url}v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


def test_all_tokens_answer_beside_the_kept_ones_when_asked_for(page: Visit) -> None:
    page.show(SCENES / "scene-008.jpg")
    page.page.get_by_label("Compare with all tokens").check()
    page.ask("What does the green sign say?")
    dropping, everything = page.page.locator("article").nth(0), page.page.locator("article").nth(1)
    expect(everything.get_by_role("heading")).to_have_text("All tokens")
    expect(everything.locator(".visual")).to_have_text("644 of 644")
    expect(dropping.locator(".visual")).to_have_text("139 of 644")
    for card in (dropping, everything):
        assert card.locator(".said").text_content()
    assert page.refused == []


def test_a_budget_of_all_tokens_keeps_every_one(page: Visit) -> None:
    page.show(SCENES / "scene-008.jpg")
    page.page.get_by_label("Token budget").press("End")
    expect(page.page.locator("#kept-detail")).to_contain_text("624 patches of 624")
    page.ask("What does the green sign say?")
    expect(page.page.locator("article .visual")).to_have_text("644 of 644")


def test_another_policy_keeps_other_tokens(page: Visit) -> None:
    page.show(SCENES / "scene-008.jpg")
    page.page.get_by_label("Policy").select_option("thumbnail")
    expect(page.page.locator("figure[data-kept='0']")).to_have_count(4)
    assert page.written() == [124, 0, 0, 0, 0]


def test_the_attention_of_a_layer_is_laid_over_the_partitions(page: Visit) -> None:
    page.show(SCENES / "scene-008.jpg")
    pixels = "() => document.querySelector('figure canvas').toDataURL()"
    kept = page.page.evaluate(pixels)
    page.page.get_by_label("Attention", exact=True).check(force=True)
    seen = page.page.locator("#seen")
    expect(seen).to_have_attribute("data-shows", "attention 4")
    last = page.page.evaluate(pixels)
    page.page.get_by_label("Attention of CLS in layer").select_option("0")
    expect(seen).to_have_attribute("data-shows", "attention 0")
    assert len({kept, last, page.page.evaluate(pixels)}) == 3


def test_everything_can_be_done_with_the_keyboard(page: Visit) -> None:
    keyboard = page.page.keyboard
    page.page.get_by_role("button", name="Example picture").focus()
    keyboard.press("Enter")
    expect(page.page.locator("figure[data-kept]").first).to_be_visible()
    keyboard.press("Tab")
    expect(page.page.get_by_label("Prompt")).to_be_focused()
    keyboard.press("Control+Enter")
    expect(page.page.locator("article")).to_have_attribute("aria-busy", "false")
    expect(page.page.locator("article .said")).to_have_text("LLAMA")
    expect(page.page.locator("#status")).to_contain_text("LLAMA")


def test_an_answer_stopped_in_the_middle_leaves_the_batch(page: Visit, backend: ScriptedBackend) -> None:
    page.show(SCENES / "scene-008.jpg")
    before = backend.given_up
    page.ask("Describe the image slowly.")
    expect(page.page.locator("article .said")).not_to_have_text("")
    page.page.get_by_role("button", name="Stop").click()
    expect(page.page.get_by_text("Stopped.")).to_be_visible()
    expect(page.page.get_by_role("button", name="Ask")).to_be_enabled()
    for _ in range(100):
        if backend.given_up > before:
            break
        page.page.wait_for_timeout(50)
    assert backend.given_up == before + 1


def test_an_answer_that_breaks_off_is_told_and_no_empty_one(page: Visit) -> None:
    page.show(SCENES / "scene-008.jpg")
    page.ask("Describe the image, then break down.")
    expect(page.page.get_by_role("alert")).to_contain_text("try again")
    expect(page.page.locator("article")).to_contain_text("Broken off")


def test_what_is_no_picture_is_told_in_the_servers_words(page: Visit) -> None:
    page.choose(SCENES / "broken-no-picture.jpg")
    expect(page.page.get_by_role("alert")).to_contain_text(
        "broken-no-picture.jpg: not an image in a supported format"
    )
    expect(page.page.locator("figure")).to_have_count(0)
    page.ask("What is it?")
    expect(page.page.locator("article")).to_contain_text("No answer.")
    assert page.refused == [400, 400]


def test_a_server_that_is_busy_is_asked_again_when_it_said(page: Visit) -> None:
    refusal = {
        "error": {"message": "the server is busy", "type": "server_error", "param": None, "code": None}
    }
    page.page.route(
        "**/playground/look",
        lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, json=refusal),
        times=1,
    )
    page.choose(SCENES / "scene-008.jpg")
    expect(page.page.get_by_role("alert")).to_contain_text("the server is busy. Try again in 1 s.")
    expect(page.page.locator("figure[data-kept]")).to_have_count(5)
    expect(page.page.get_by_role("alert")).to_be_empty()


def test_a_server_with_keys_is_used_with_one_that_only_this_tab_remembers(chrome: Browser) -> None:
    key = "a-key-of-this-server"
    app = create_app(SETTINGS, LocalBackend(SETTINGS.config()), Keys.of([key]))
    with served(app) as url, visit(chrome, url, ready=False) as page:
        alert, field = page.page.get_by_role("alert"), page.page.get_by_label("API key")
        expect(alert).to_contain_text("asks for an API key")
        expect(field).to_be_focused()
        field.fill("another-key-than-its-own")
        field.press("Tab")
        expect(alert).to_contain_text("does not know that API key")
        field.fill(key)
        field.press("Tab")
        page.wait_until_ready()
        expect(alert).to_be_empty()
        page.page.reload()
        page.wait_until_ready()
        page.show(SCENES / "scene-008.jpg")
        page.ask("What does the green sign say?")
        expect(page.page.locator("article .said")).to_have_text("SOCKS")
        assert page.page.evaluate("localStorage.length + document.cookie.length") == 0
        assert page.refused == [401, 401]


def test_a_question_without_a_picture_asks_for_one(page: Visit) -> None:
    page.ask("What is it?")
    expect(page.page.get_by_role("alert")).to_contain_text("Choose a picture first")
    page.page.get_by_role("button", name="Close").click()
    expect(page.page.get_by_role("alert")).to_be_empty()


@pytest.mark.parametrize("scene", ["scene-001.jpg", "scene-006.webp", "scene-008.jpg"])
def test_a_phone_shows_every_grid_without_scrolling_sideways(phone: Visit, scene: str) -> None:
    phone.show(SCENES / scene)
    phone.page.get_by_label("Compare with all tokens").check()
    phone.ask("What does the green sign say?")
    expect(phone.page.locator("article").nth(1)).to_have_attribute("aria-busy", "false")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 360
    for canvas in phone.page.locator("figure canvas").all():
        box = canvas.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["width"] > 80


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_people_with_disabilities_out(chrome: Browser, url: str, scheme: str) -> None:
    with visit(chrome, url, color_scheme=scheme, reduced_motion="reduce") as page:
        page.page.get_by_text("More settings").click()
        assert violations(page.page) == []
        page.show(SCENES / "scene-008.jpg")
        page.page.get_by_label("Attention", exact=True).check(force=True)
        page.ask("What does the green sign say?")
        expect(page.page.locator("article")).to_have_attribute("aria-busy", "false")
        page.choose(SCENES / "broken-no-picture.jpg")
        expect(page.page.get_by_role("alert")).not_to_be_empty()
        assert violations(page.page) == []


def violations(page: Page) -> list[tuple[str, str]]:
    found = Axe().run(page).response["violations"]
    return [(each["id"], node["html"]) for each in found for node in each["nodes"]]
