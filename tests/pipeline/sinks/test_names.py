"""Names made of keys stay below their folder, differ whenever keys do, and mostly are the keys themselves."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sinks.names import member_name, sidecar_name, suffix_name

# Slashes, dots and escapes are what collides, so they come often.
KEYS = st.text(st.sampled_from("ab./%~+\\:A") | st.characters(codec="utf-8"), max_size=300)


@pytest.mark.parametrize("key", ["000001", "shard/000001", "photos 2024/Zürich/鯨", "v1.2/a-b_c"])
def test_ordinary_keys_of_samples_stay_as_they_are(key: str) -> None:
    assert member_name(key) == key
    assert sidecar_name(key) == key


def test_dots_stay_in_file_names_and_go_from_members() -> None:
    assert sidecar_name("day 1/scene.v2.jpg") == "day 1/scene.v2.jpg"
    assert member_name("day 1/scene.v2.jpg") == "day 1/scene%2Ev2%2Ejpg"


@pytest.mark.parametrize("name", [member_name, sidecar_name])
@given(key=KEYS)
def test_no_key_leads_out_of_its_folder(name: object, key: str) -> None:
    made = PurePosixPath("txt", name(key) + ".txt")  # type: ignore[operator]
    assert made.parts[0] == "txt"
    assert not {"..", "."} & set(made.parts)
    assert all(0 < len(part.encode()) <= 255 and not part.startswith(".") for part in made.parts)
    assert not re.search(r"[\x00-\x1f\\]", str(made))
    assert len(str(made).encode()) < 1024


@pytest.mark.parametrize("name", [member_name, sidecar_name])
@given(keys=st.lists(KEYS, min_size=2, max_size=8, unique=True))
def test_no_two_keys_share_a_name_or_take_each_others_folder(name: object, keys: list[str]) -> None:
    files = [PurePosixPath(name(key) + ".txt") for key in keys]  # type: ignore[operator]
    assert len(set(files)) == len(keys)
    folders = {folder for file in files for folder in file.parents}
    assert not folders & set(files)


@given(key=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(lambda key: "/" not in key))
def test_the_key_comes_back_by_unquoting(key: str) -> None:
    assert unquote(member_name(key), errors="strict") == key or "~" in member_name(key)


def test_long_keys_are_cut_and_still_differ() -> None:
    url = "https://example.org/" + "x" * 400
    one, two = sidecar_name(url + "1"), sidecar_name(url + "2")
    assert one != two
    assert one.startswith("https%3A/%2F/example.org/xxx")
    assert len(member_name("/".join(["folder"] * 1000)).encode()) < 100


def test_suffixes_are_in_lower_case_without_dots() -> None:
    assert suffix_name("short-2_b") == "short-2_b"
    assert suffix_name("v1.2/A") == "v1%2e2%2f%41"
    assert unquote(suffix_name("v1.2/A")) == "v1.2/A"
    assert len({suffix_name(name) for name in ("A", "a", "%41", "a" * 200, "a" * 201)}) == 5
