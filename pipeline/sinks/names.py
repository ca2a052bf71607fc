"""File names made of keys: they stay in their folder, and no two keys share one.

Most keys are names already and stay as they are. What could lead elsewhere or means something to a system is
written as ``%XX``, as in a URL; what is too long ends in ``~`` and a hash. ``urllib.parse.unquote`` gives the
key back, unless it was cut.
"""

from __future__ import annotations

import hashlib
import re

# Systems allow 255 bytes a component and S3 1,024 a name; suffixes and the folders above need some too.
COMPONENT_BYTES, NAME_BYTES, SUFFIX_BYTES = 150, 700, 90

_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|%~+]')
_UNSAFE_IN_SUFFIX = re.compile(_UNSAFE.pattern + r"|[A-Z./]")
_ESCAPE_OR_CHARACTER = re.compile(r"%[0-9A-F]{2}|.", re.DOTALL)


def member_name(key: str) -> str:
    """A name for a tar's members, to which dots and suffixes are added: it has no dot after its folders."""
    return _name(key, dots_escaped=True)


def sidecar_name(key: str) -> str:
    """A name for a file of its own, before ``.txt``: no folder of another key has the name of the file."""
    return _name(key, dots_escaped=False)


def suffix_name(prompt_id: str) -> str:
    """A part of a suffix: without dots, and in lower case, which the readers of tars turn suffixes into."""
    name = _UNSAFE_IN_SUFFIX.sub(_escaped, prompt_id).lower()
    return name if len(name.encode()) <= SUFFIX_BYTES else "~" + _hash(prompt_id)


def _name(key: str, *, dots_escaped: bool) -> str:
    *folders, last = key.split("/")
    parts = [_folder(folder) for folder in folders] + [_component(last, dots_escaped=dots_escaped)]
    name = "/".join(parts)
    return name if len(name.encode()) <= NAME_BYTES else "~" + _hash(key)


def _folder(text: str) -> str:
    name = _component(text, dots_escaped=False)
    return name[:-4] + "%2E" + name[-3:] if name.lower().endswith(".txt") else name


def _component(text: str, *, dots_escaped: bool) -> str:
    if not text:
        return "%2F"  # two slashes in a row, or one at an end
    name = _UNSAFE.sub(_escaped, text)
    if dots_escaped:
        name = name.replace(".", "%2E")
    elif name.startswith("."):  # hidden, or a way up
        name = "%2E" + name[1:]
    return name if len(name.encode()) <= COMPONENT_BYTES else _cut(name) + "~" + _hash(text)


def _escaped(match: re.Match[str]) -> str:
    return f"%{ord(match[0]):02X}"


def _cut(name: str) -> str:
    """As much of its beginning as leaves room for a hash, and no half of an escape."""
    kept, size = [], 0
    for part in _ESCAPE_OR_CHARACTER.findall(name):
        size += len(part.encode())
        if size > COMPONENT_BYTES - 40:
            break
        kept.append(part)
    return "".join(kept)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
