"""Formats by name: parquet first in any case, nothing written outside what a format owns."""

from __future__ import annotations

from pathlib import Path

import pytest

from hired.errors import ConfigurationError
from pipeline.sinks import FORMATS, check_columns, sinks, taken
from pipeline.storage import Store
from tests.pipeline.s3 import S3Server, s3  # noqa: F401
from tests.pipeline.sinks.shards import Pictures, picture, simple


def test_parquet_comes_first_in_any_case() -> None:
    assert [sink.name for sink in sinks([], keep_images=False)] == ["parquet"]
    assert [sink.name for sink in sinks(["txt", "parquet", "coco"], keep_images=False)] == [
        "parquet",
        "coco",
        "txt",
    ]


@pytest.mark.parametrize(
    ("formats", "keep_images", "needed"),
    [
        ((), False, False),
        ((), True, True),
        (("webdataset",), False, True),
        (("jsonl", "coco", "txt"), False, False),
    ],
)
def test_images_are_read_again_only_where_a_format_holds_them(
    formats: tuple[str, ...], keep_images: bool, needed: bool
) -> None:
    assert any(sink.needs_images for sink in sinks(formats, keep_images=keep_images)) is needed


def test_an_unknown_format_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="--formats cocoa: there are parquet, webdataset"):
        sinks(["cocoa"], keep_images=False)


def test_all_formats_together_write_what_they_own_and_nothing_else(tmp_path: Path) -> None:
    store, every = Store(tmp_path / "out"), sinks(FORMATS, keep_images=True)
    assert taken(store, every) == []
    for sink in every:
        sink.write(simple("a"), store, Pictures({"a": picture("red")}))
    for sink in every:
        sink.finish(store)
    owned = {name for sink in every for name in sink.owns}
    assert {name.split("/")[0] for name in store.list()} <= owned
    assert taken(store, every) == [
        "captions",
        "dead_letters",
        "webdataset",
        "jsonl",
        "captions.coco.json",
        "txt",
    ]


def test_columns_of_the_input_never_take_the_place_of_ours() -> None:
    check_columns(["url", "image"], keep_images=False)
    with pytest.raises(
        ConfigurationError, match="--keep-columns caption: captions have a column of that name"
    ):
        check_columns(["url", "caption"], keep_images=False)
    with pytest.raises(ConfigurationError, match="image"):
        check_columns(["image"], keep_images=True)


def test_the_formats_are_the_same_in_s3(tmp_path: Path, s3: S3Server) -> None:  # noqa: F811
    local, remote = Store(tmp_path / "out"), Store(f"{s3.make_bucket()}/run/out", s3.options)
    every = sinks(FORMATS, keep_images=True)
    for store in (local, remote):
        for sink in every:
            sink.write(
                simple("a", "day/b.jpg"), store, Pictures(dict.fromkeys(("a", "day/b.jpg"), picture("red")))
            )
        for sink in every:
            sink.finish(store)
    assert remote.list() == local.list()
    assert len(local.list()) == 8
    assert all(remote.read(name) == local.read(name) for name in local.list())
    assert taken(remote, every) == taken(local, every)
