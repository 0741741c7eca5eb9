"""Members of a stored sample under the names that a DataModule asks for, whatever they are called in the shards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.errors import DataError
from datamodules.shards.decode import unpack
from datamodules.shards.stream import Decode

PACKED = ".gz"


def stored_name(name: str, rename: Mapping[str, str], stored: Collection[str]) -> str:
    """What a member is called in the shards: by the user's table, and packed if only that is there."""
    wanted = rename.get(name, name).lower()
    return wanted if wanted in stored or wanted + PACKED not in stored else wanted + PACKED


def open_members(fields: dict[str, bytes], rename: Mapping[str, str]) -> dict[str, bytes]:
    """Unpack `.gz` members and give members the names that are asked for.

    Args:
        fields: contents by stored name.
        rename: stored name (without `.gz`) by the name that is asked for.

    Returns:
        Contents by name; a renamed member loses its stored name.

    Raises:
        DataError: a packed member is damaged or too large, or a renamed one is missing.
    """
    members = dict(fields)
    for name in [n for n in fields if n.endswith(PACKED)]:
        if (plain := name.removesuffix(PACKED)) not in fields:
            members[plain] = unpack(name, members.pop(name))
    found = dict(members)
    for name, stored in rename.items():
        if stored.lower() not in found:
            raise DataError(
                f"the sample has no {stored} among {', '.join(sorted(found))}, which shall be {name}; mend rename"
            )
        members.pop(stored.lower(), None)
    return members | {name: found[stored.lower()] for name, stored in rename.items()}


@dataclass(frozen=True)
class MemberDecode:
    """A DataModule's `decode` behind `open_members`. Picklable, for workers."""

    decode: Decode
    rename: Mapping[str, str]

    def __call__(self, fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        """Decode one stored sample."""
        packed = any(name.endswith(PACKED) for name in fields)
        members = open_members(fields, self.rename) if packed or self.rename else fields
        return self.decode(members, key, seed)
