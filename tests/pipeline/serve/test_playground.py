"""What the page is made of, and what its own route says of a picture, against the method itself."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

import hired
from hired import VLM, Budget
from hired.geometry import real_patches
from hired.types import Partitions, VisualTokens
from pipeline.serve import playground
from pipeline.serve.app import create_app
from pipeline.serve.local import LocalBackend
from pipeline.serve.playground import MEDIA_TYPES, RecentPartitions
from pipeline.serve.settings import Settings

SCENES = Path(__file__).resolve().parents[3] / "examples" / "scenes"
SCENE = SCENES / "scene-008.jpg"  # four sub-images, with padding above and below
STATIC = Path(playground.__file__).parent / "static"
TEXTS = [path for path in STATIC.iterdir() if path.suffix in (".html", ".css", ".js")]
SETTINGS = Settings(model="embedded", device="cpu", dtype="float32")


def served(settings: Settings) -> TestClient:
    app = create_app(settings, LocalBackend(settings.config()))
    return TestClient(app, base_url="http://127.0.0.1")  # without keys it answers to this machine only


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with served(SETTINGS) as client:
        yield client


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return hired.load("embedded", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def partitions(vlm: VLM) -> Partitions:
    return vlm.partition(SCENE.read_bytes())


def body(picture: bytes = b"", **options: Any) -> dict[str, Any]:
    uri = f"data:image/jpeg;base64,{base64.b64encode(picture or SCENE.read_bytes()).decode()}"
    return {"image_url": {"url": uri}, **options}


def look(client: TestClient, **options: Any) -> Any:
    response = client.post("/playground/look", json=body(**options))
    assert response.status_code == 200, response.text
    return response.json()


def refusal(client: TestClient, request: dict[str, Any]) -> Any:
    response = client.post("/playground/look", json=request)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def kept(sight: Any) -> list[tuple[int, int]]:
    return [
        (number, patch) for number, partition in enumerate(sight["partitions"]) for patch in partition["kept"]
    ]


def pairs(tokens: VisualTokens) -> list[tuple[int, int]]:
    return list(zip(tokens.partition.tolist(), tokens.patch.tolist(), strict=True))


def pixels(uri: str) -> NDArray[np.int64]:
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(np.int64)


@pytest.mark.parametrize(
    ("budget", "policy", "alpha"), [(0.2, "hired", 0.5), (100, "hired", 0.1), (0.5, "scope", 0.5)]
)
def test_the_lit_patches_are_those_that_the_policy_keeps(
    client: TestClient, vlm: VLM, partitions: Partitions, budget: float, policy: str, alpha: float
) -> None:
    sight = look(client, hired={"token_budget": budget, "policy": policy, "alpha": alpha})
    amount = (
        Budget(tokens=budget, alpha=alpha) if isinstance(budget, int) else Budget(rate=budget, alpha=alpha)
    )
    [tokens] = vlm.encode([partitions], budget=amount, policy=policy)
    assert kept(sight) == pairs(tokens)


def test_without_wishes_a_picture_is_looked_at_as_a_request_would_be(client: TestClient, vlm: VLM) -> None:
    sight = look(client)
    assert sight["patches"] == {"full": 624, "kept": 124}
    [tokens] = vlm.encode([vlm.partition(SCENE.read_bytes())], budget=Budget(rate=0.2))
    [caption] = vlm.generate([tokens], "?", max_new_tokens=1)
    assert sight["tokens"] == {"full": caption.visual_tokens_full, "kept": caption.visual_tokens_kept}


def test_the_detail_of_the_image_part_sets_the_budget(client: TestClient) -> None:
    request = body()
    request["image_url"]["detail"] = "low"
    sight = client.post("/playground/look", json=request).json()
    assert sight["patches"]["kept"] == int(0.05 * 624)


def test_partitions_are_shown_as_the_model_sees_them_and_padding_is_named(
    client: TestClient, partitions: Partitions
) -> None:
    sight = look(client)
    assert sight["grid"] == {"rows": 2, "cols": 2}
    assert (sight["side"], sight["patch_size"], sight["patches_per_side"]) == (192, 16, 12)
    real = real_patches(partitions.original_size, partitions.grid, 12).numpy()
    assert len(sight["partitions"]) == 5
    for shown, own, own_real in zip(sight["partitions"], partitions.pixels, real, strict=True):
        assert np.abs(pixels(shown["picture"]) - own).mean() < 4
        assert shown["num_real"] == own_real.sum()
        assert shown["padding"] == np.flatnonzero(~own_real).tolist()
        assert not set(shown["padding"]) & set(shown["kept"])


def test_pictures_are_left_out_where_the_page_has_them_already(client: TestClient) -> None:
    assert {shown["picture"] for shown in look(client, pictures=False)["partitions"]} == {None}


def test_attention_comes_in_bytes_by_the_square_root_of_its_share(
    client: TestClient, vlm: VLM, partitions: Partitions
) -> None:
    shown = look(client, layers=[0, 4])["attention"]
    assert [each["layer"] for each in shown] == [0, 4]
    [attention] = vlm.encoder.cls_attention([partitions], layers=[0, 4])
    real = real_patches(partitions.original_size, partitions.grid, 12).numpy()
    for each in shown:
        own = np.where(real, attention[each["layer"]].numpy(), 0)
        assert each["largest"] == pytest.approx(own.max(), rel=1e-5)
        maps = np.array(each["maps"])
        assert maps.max() == 255
        assert np.abs((maps / 255) ** 2 * own.max() - own).max() < 0.005 * own.max()


def test_a_layer_that_is_not_there_is_refused(client: TestClient) -> None:
    error = refusal(client, body(layers=[6]))
    assert error["param"] == "layers"
    assert "0 to 5" in error["message"]


def test_an_unknown_policy_is_refused_with_those_that_are_known(client: TestClient) -> None:
    error = refusal(client, body(hired={"policy": "best"}))
    assert error["param"] == "hired.policy"
    assert "divprune" in error["message"]


def test_a_policy_that_cannot_be_had_by_its_name_is_refused_with_the_reason(client: TestClient) -> None:
    error = refusal(client, body(hired={"policy": "cdpruner"}))
    assert error["param"] == "hired.policy"
    assert "text tower" in error["message"]


def test_what_is_no_picture_is_refused_by_the_name_of_its_part(client: TestClient) -> None:
    error = refusal(client, body((SCENES / "broken-no-picture.jpg").read_bytes()))
    assert error["param"] == "image_url"
    assert "not an image" in error["message"]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://127.0.0.1/x.png", "https://example.com/x.png"])
def test_only_pictures_that_are_sent_are_looked_at(client: TestClient, url: str) -> None:
    assert refusal(client, {"image_url": {"url": url}})["param"] == "image_url"


@pytest.mark.parametrize(
    "request_body", [{}, {"image_url": "x"}, {"image_url": {"url": "x"}, "colour": 1}, [], "x"]
)
def test_requests_of_another_shape_are_refused_in_the_endpoints_own(
    client: TestClient, request_body: Any
) -> None:
    assert refusal(client, request_body)["type"] == "invalid_request_error"


def test_a_server_that_keeps_few_tokens_refuses_more_and_tells_the_page() -> None:
    limits = {"token_budget": 64, "low_token_budget": 16, "high_token_budget": 100, "max_token_budget": 100}
    settings = Settings(model="embedded", device="cpu", dtype="float32", **limits)
    with served(settings) as client:
        assert client.get("/playground/options").json()["most_tokens"] == 100
        assert "at most 100" in refusal(client, body(hired={"token_budget": 101}))["message"]
        assert look(client, hired={"token_budget": 90})["patches"]["kept"] == 90


def test_options_name_the_policies_that_can_be_had_and_say_what_each_does(client: TestClient) -> None:
    options = client.get("/playground/options").json()
    names = [policy["name"] for policy in options["policies"]]
    assert {"hired", "keep-all", "scope"} <= set(names)
    assert "cdpruner" not in names  # it needs a text tower and is made in Python
    assert all(policy["description"] for policy in options["policies"])
    assert (options["policy"], options["rate"], options["highest_rate"]) == ("hired", 0.2, 1.0)
    assert (options["num_layers"], options["feature_layer"]) == (6, 4)


def test_of_pictures_seen_lately_only_so_many_are_remembered(partitions: Partitions) -> None:
    cut: list[bytes] = []

    async def count(image: bytes) -> Partitions:
        cut.append(image)
        return partitions

    async def look_at(*images: bytes) -> None:
        recent = RecentPartitions(most=2)
        for image in images:
            assert await recent.of(image, count) is partitions

    asyncio.run(look_at(b"a", b"b", b"a", b"c", b"a", b"b"))
    assert cut == [b"a", b"b", b"c", b"b"]  # c pushed out b, which was used longest ago


def test_the_page_asks_for_files_that_are_there_and_for_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    wanted = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert {"playground/playground.js", "playground/playground.css"} <= set(wanted)
    for path in wanted:
        assert client.get(f"/{path}").status_code == 200, path
    for path in TEXTS:
        assert not re.search(r"https?://|//cdn|@import", path.read_text())


def test_the_policy_of_the_page_allows_no_inline_code_and_the_page_has_none(client: TestClient) -> None:
    for path in ("/", *(f"/playground/{name}" for name in MEDIA_TYPES)):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
    text = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", text)
    assert not any("innerHTML" in path.read_text() for path in TEXTS)


@pytest.mark.parametrize("path", ["index.html", "../app.py", "%2e%2e/app.py", "playground.py", ""])
def test_no_other_file_can_be_had(client: TestClient, path: str) -> None:
    assert client.get(f"/playground/{path}").status_code in (404, 405)


def test_every_file_of_the_page_is_served_and_goes_into_the_package() -> None:
    assert {path.name for path in STATIC.iterdir()} == {"index.html", *MEDIA_TYPES}
