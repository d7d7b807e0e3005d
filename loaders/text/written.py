"""Whether what a template was given stands in what it wrote, for many values, without a search of all for each."""

from __future__ import annotations

import json
from typing import Any

from afina.errors import DataError

MAX_SCANNED = 1 << 29  # characters that are looked through for one conversation: about half a second
_NEAR = 4096  # characters behind the last value found, where the next one stands as a rule


class Search:
    """Looks for values in the texts of one conversation; ``left``: characters that may yet be looked through."""

    def __init__(self) -> None:
        self.left = MAX_SCANNED
        self._text, self._place = "", 0

    def into(self, text: str) -> None:
        """Go on in another text, from its beginning."""
        self._text, self._place = text, 0

    def holds(self, value: Any) -> bool:
        """Whether ``value`` stands in the text, as it is or as JSON spells it. Raises DataError past the limit."""
        if isinstance(value, str):
            spelled = {value, *(json.dumps(value, ensure_ascii=flag)[1:-1] for flag in (False, True))}
        else:
            spelled = {json.dumps(value), str(value)}
        for near in (True, False):
            for one in spelled:
                if self._find(one, near=near):
                    return True
        return False

    def _find(self, one: str, *, near: bool) -> bool:
        start, end = (self._place, self._place + len(one) + _NEAR) if near else (0, len(self._text))
        found = self._text.find(one, start, end)
        self.left -= (min(end, len(self._text)) if found < 0 else found) - start + len(one)
        if self.left < 0:
            raise DataError(
                "a conversation with so many and so long calls or tools that looking for them in what the chat "
                "template writes takes too long: split it"
            )
        if found >= 0:
            self._place = found
        return found >= 0
