"""Chat requests as tests write them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

SCENES = Path(__file__).resolve().parents[3] / "examples" / "scenes"
PICTURE = b"picture"


def data_uri(image: bytes | Path, kind: str = "image/png") -> str:
    data = image.read_bytes() if isinstance(image, Path) else image
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(image: bytes | Path | str, detail: str | None = None) -> dict[str, Any]:
    url = image if isinstance(image, str) else data_uri(image)
    return {"type": "image_url", "image_url": {"url": url} | ({"detail": detail} if detail else {})}


def asked(*images: bytes | Path | str, prompt: str = "Describe the image.", **options: Any) -> dict[str, Any]:
    """The body of a request about these images."""
    content = [{"type": "text", "text": prompt}, *map(image_part, images)]
    return {"model": "embedded", "messages": [{"role": "user", "content": content}]} | options


def events(body: str) -> list[Any]:
    """The data of server-sent events, and None for [DONE]."""
    lines = [line for line in body.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines), body
    return [None if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def text_of(chunks: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content", "") for chunk in chunks if chunk for choice in chunk.get("choices", ())
    )
