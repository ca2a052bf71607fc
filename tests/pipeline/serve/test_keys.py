"""Keys are read from where they are said to be, and only their holders are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from hired.errors import ConfigurationError
from pipeline.serve.keys import Keys

ONE, TWO = "one-key-of-a-server", "two-keys-of-a-server"


def test_keys_come_from_the_environment_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# for the team\n\n{TWO}\n")
    keys = Keys.read({"HIRED_API_KEY": f" {ONE}, "}, file)

    holders = [keys.holder(f"Bearer {key}".encode()) for key in (ONE, TWO)]
    assert None not in holders
    assert len(set(holders)) == 2
    assert not any(ONE in str(holder) for holder in holders)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {ONE}",
        f"bearer{ONE}",
        f"Bearer {ONE}x",
        f"Bearer {ONE[:-1]}",
        ONE,
        "Bearer é",
    ],
)
def test_other_headers_are_nobodys(header: str) -> None:
    assert Keys.of([ONE]).holder(header.encode()) is None


def test_without_any_there_are_none() -> None:
    assert not Keys.read({}, None)


def test_keys_themselves_are_not_kept() -> None:
    assert ONE not in repr(Keys.of([ONE]))


@pytest.mark.parametrize(
    "key", ["short", "with a blank in the middle", "ünïcode-is-no-header", "x" * 20 + "\x07"]
)
def test_keys_that_are_easily_guessed_or_cannot_be_sent_are_refused(key: str) -> None:
    with pytest.raises(ConfigurationError, match="openssl") as raised:
        Keys.of([key])
    assert key not in str(raised.value)


def test_a_file_without_keys_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(ConfigurationError, match="holds none"):
        Keys.read({}, tmp_path / "keys")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Keys.read({}, tmp_path / "nowhere")
