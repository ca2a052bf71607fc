"""Tars as the webdataset library reads them: keys, JSON and captions come back."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.columns import Failure
from pipeline.reading import ReadOptions, read
from pipeline.rows import to_items
from pipeline.sinks import SinkError
from pipeline.sinks.webdataset import WebDatasetSink
from pipeline.sources import ScanOptions, scan
from pipeline.storage import Store
from tests.pipeline.sinks.shards import GONE, UNREADABLE, Pictures, picture, shard, simple

webdataset = pytest.importorskip("webdataset")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


def samples(store: Store, name: str = "00000.tar") -> list[dict[str, Any]]:
    tar = store.uri(f"webdataset/{name}")
    return list(webdataset.WebDataset(tar, shardshuffle=False, empty_check=False))


def stats(store: Store) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(store.read("webdataset/00000_stats.json"))
    return loaded


def test_a_sample_has_the_image_the_caption_and_what_is_known_of_both(store: Store) -> None:
    images = Pictures({"000001": picture("red"), "a/b": picture("blue", "PNG")})
    WebDatasetSink().write(simple("000001", "a/b"), store, images)
    one, two = samples(store)
    assert (one["__key__"], two["__key__"]) == ("000001", "a/b")
    assert one["jpg"] == images.by_key["000001"]
    assert two["png"] == images.by_key["a/b"]
    assert one["txt"] == b"a caption of 000001"
    about = json.loads(one["json"])["hired"]
    assert (about["key"], about["index"], about["width"], about["height"]) == ("000001", 0, 16, 12)
    assert about["captions"] == [
        {
            "prompt_id": "default", "prompt": "default?", "caption": "a caption of 000001",
            "finish_reason": "stop", "prompt_tokens": 30, "visual_tokens_full": 20,
            "visual_tokens_kept": 9, "completion_tokens": 3,
        }
    ]  # fmt: skip


def test_the_library_decodes_the_samples(store: Store) -> None:
    WebDatasetSink().write(simple("a", "b"), store, Pictures({"a": picture("red"), "b": picture("blue")}))
    tar = store.uri("webdataset/00000.tar")
    decoded = webdataset.WebDataset(tar, shardshuffle=False).decode("pil").to_tuple("jpg", "txt", "json")
    sizes = [(image.size, text, about["hired"]["key"]) for image, text, about in decoded]
    assert sizes == [((16, 12), "a caption of a", "a"), ((16, 12), "a caption of b", "b")]


def test_keys_with_dots_stay_one_sample_each_and_can_be_had_back(store: Store) -> None:
    keys = ["scene.1.jpg", "scene.1.png", "../../etc/passwd", "/abs", "a b/ü.jpg"]
    WebDatasetSink().write(simple(*keys), store, Pictures(dict.fromkeys(keys, picture("red"))))
    found = samples(store)
    assert [json.loads(sample["json"])["hired"]["key"] for sample in found] == keys
    assert len({sample["__key__"] for sample in found}) == len(keys)
    with tarfile.open(store.uri("webdataset/00000.tar")) as tar:
        names = tar.getnames()
    assert "scene%2E1%2Ejpg.jpg" in names
    assert not [name for name in names if name.startswith(("/", ".")) or ".." in name]


def test_the_inputs_own_json_keeps_its_names_beside_ours(store: Store) -> None:
    own = [
        '{"url": "http://x", "similarity": 0.3, "key": "7"}',
        "[1, 2]",
        "{broken",
        None,
        '{"hired": {"key": "o"}}',
    ]
    part = shard(
        [(key, {"default": "x"}) for key in "abcde"],
        carried={
            "json": pa.array(own, pa.string()),
            "txt": pa.array(["alt", None, None, None, None], pa.string()),
            "license": pa.array(["cc0", None, None, None, None], pa.string()),
        },
        kept=["license"],
    )
    WebDatasetSink().write(part, store, Pictures(dict.fromkeys("abcde", picture("red"))))
    documents = [json.loads(sample["json"]) for sample in samples(store)]
    ours = [document.pop("hired") for document in documents]
    assert documents == [
        {"txt": "alt", "url": "http://x", "similarity": 0.3, "key": "7", "license": "cc0"},
        {"json": [1, 2], "license": None},
        {"json": "{broken", "license": None},
        {"license": None},
        {"license": None},
    ]
    assert [each["key"] for each in ours] == list("abcde")
    assert ours[4]["before"] == {"key": "o"}


def test_further_questions_have_suffixes_of_their_own(store: Store) -> None:
    part = shard(
        [
            ("a", {"short": "a sign", "Long.2": "a green sign"}),
            ("b", {"short": UNREADABLE, "Long.2": "a star"}),
        ]
    )
    WebDatasetSink("short").write(part, store, Pictures(dict.fromkeys("ab", picture("red"))))
    one, two = samples(store)
    assert (one["txt"], one["%4cong%2e2.txt"]) == (b"a sign", b"a green sign")
    assert "txt" not in two
    assert two["%4cong%2e2.txt"] == b"a star"
    about = json.loads(two["json"])["hired"]
    assert [each["prompt_id"] for each in about["captions"]] == ["Long.2"]
    assert about["failures"][0]["prompt_id"] == "short"
    assert about["failures"][0]["error_type"] == "UnreadableImageError"


def test_the_stats_account_for_every_image(store: Store) -> None:
    late = Failure("generate", "CapacityError", "too long", False)
    part = shard(
        [
            ("a", {"s": "x", "l": "y"}),
            ("b", {"s": GONE, "l": GONE}),
            ("c", {"s": UNREADABLE, "l": UNREADABLE}),
            ("d", {"s": late, "l": "z"}),
            ("e", {"s": late, "l": late}),
            ("f", {"s": "x", "l": "x"}),
        ]
    )
    images = Pictures({"a": picture("red"), "d": picture("red"), "f": GONE})
    WebDatasetSink().write(part, store, images)
    assert [sample["__key__"] for sample in samples(store)] == ["a", "d"]
    assert stats(store) == {
        "count": 6,
        "successes": 2,
        "failed_to_download": 2,
        "failed_to_resize": 1,
        "failed_to_caption": 1,
        "status_dict": {
            "success": 2,
            "generate: CapacityError": 1,
            "partition: UnreadableImageError": 1,
            "read: FileNotFoundError": 2,
        },
    }


def test_the_same_shard_has_the_same_bytes_without_time_or_owner(store: Store) -> None:
    written = []
    for _ in range(2):
        WebDatasetSink().write(simple("a", "b"), store, Pictures(dict.fromkeys("ab", picture("red"))))
        written.append([store.read(name) for name in store.list()])
    assert written[0] == written[1]
    with tarfile.open(fileobj=io.BytesIO(written[0][0])) as tar:
        assert {(each.mtime, each.uid, each.gid, each.uname, each.gname, each.mode) for each in tar} == {
            (0, 0, 0, "", "", 0o644)
        }


def test_a_shard_without_captions_is_an_empty_tar(store: Store) -> None:
    WebDatasetSink().write(shard([("a", {"default": UNREADABLE})]), store, Pictures({}))
    assert samples(store) == []
    assert stats(store)["status_dict"] == {"success": 0, "partition: UnreadableImageError": 1}


def test_no_tar_without_its_pictures(store: Store) -> None:
    with pytest.raises(SinkError, match="2 of the 2 captioned images"):
        WebDatasetSink().write(simple("a", "b"), store, Pictures(dict.fromkeys("ab", GONE)))
    assert store.list() == []


def test_datasets_load_the_tars(store: Store, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    WebDatasetSink().write(simple("a", "x/b"), store, Pictures({"a": picture("red"), "x/b": picture("blue")}))
    loaded = datasets.load_dataset(
        "webdataset",
        data_files=store.uri("webdataset/*.tar"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert [(row["__key__"], row["txt"]) for row in loaded] == [
        ("a", "a caption of a"),
        ("x/b", "a caption of x/b"),
    ]
    assert loaded[0]["jpg"].size == (16, 12)


def test_a_webdataset_that_is_captioned_keeps_its_keys_and_its_json(store: Store, tmp_path: Path) -> None:
    documents = {"000001": {"url": "http://x/1", "nested": {"a": [1, None]}}, "set 1.0/000002": {"ü": 2.5}}
    source = tmp_path / "in.tar"
    with webdataset.TarWriter(str(source)) as tar:
        for key, document in documents.items():
            tar.write({"__key__": key, "jpg": picture("red"), "json": document, "txt": f"alt of {key}"})
    rows = pa.concat_tables(scan(str(source), ScanOptions()))
    answers = [(key, {"default": f"a caption of {key}"}) for key in rows["key"].to_pylist()]
    made = shard(answers)
    numbered = rows.add_column(0, "index", made.rows["index"])
    options = ReadOptions(max_file_bytes=2**20)
    WebDatasetSink().write(replace(made, rows=numbered), store, lambda items: read(items, options))
    again = pa.concat_tables(scan(store.uri("webdataset/00000.tar"), ScanOptions()))
    assert again["key"].to_pylist() == rows["key"].to_pylist() == list(documents)
    assert again["txt"].to_pylist() == [f"a caption of {key}" for key in documents]
    for text, (key, document) in zip(again["json"].to_pylist(), documents.items(), strict=True):
        found = json.loads(text)
        assert found.pop("hired")["key"] == key
        assert found == {"txt": f"alt of {key}"} | document
    assert list(read(list(to_items(again)), options)) == [picture("red")] * 2
