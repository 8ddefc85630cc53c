"""Text that somebody else chose: which characters a name may not hold, and how such text is shown on a terminal."""

from __future__ import annotations

import re

# Control characters (C0, C1), line and paragraph separators, what turns the direction of text round (Unicode Standard
# Annex 9, section 2), and lone surrogates. Each can make a terminal show something else than what is there.
_UNSAFE = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
UNSAFE = re.compile(f"[{_UNSAFE}]")
_UNSAFE_IN_LINES = re.compile(f"(?!\n)[{_UNSAFE}]")


def escaped(text: str) -> str:
    r"""``text`` for a terminal: unsafe characters as ``\x1b`` or ``\u202e``; line ends stay."""
    return _UNSAFE_IN_LINES.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
