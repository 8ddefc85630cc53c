"""What of an address may be shown."""

from __future__ import annotations

import pytest

from duallora_edge.runtime.sources.capture import mask


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://camera:554/live", "rtsp://camera:554/live"),
        ("rtsp://admin:secret@camera:554/live", "rtsp://***@camera:554/live"),
        ("rtsp://admin:se@cr/et@camera/live", "rtsp://***@camera/live"),
        ("cannot open 'http://u:secret@h/x' now", "cannot open 'http://***@h/x' now"),
        ("http://h/x?user=u&password=secret&n=1", "http://h/x?user=u&password=***&n=1"),
        ("http://h/x?Token=secret", "http://h/x?Token=***"),
        ("gst://rtspsrc location=rtsp://h user-pw=secret ! x", "gst://rtspsrc location=rtsp://h user-pw=*** ! x"),
        ("/data/video@home.mp4", "/data/video@home.mp4"),
        ("CSI://0?mode=1920x1080@30", "CSI://0?mode=1920x1080@30"),
    ],
)
def test_passwords_are_masked(text: str, shown: str) -> None:
    assert mask(text) == shown
