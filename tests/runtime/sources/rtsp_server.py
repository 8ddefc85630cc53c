"""An RTSP server of GStreamer with a red H.264 or H.265 video and a tone: rtsp_server.py ENCODER PAYLOADER.

It prints its port, asks for a password, and is run by the Python of the system, which has GStreamer's bindings.
"""

from __future__ import annotations

import sys

import gi  # type: ignore[import-not-found]

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # type: ignore[import-not-found]  # noqa: E402

encoder, payloader = sys.argv[1:]
Gst.init(None)
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(
    "( audiotestsrc is-live=true ! alawenc ! rtppcmapay pt=97 name=pay0 "
    "videotestsrc is-live=true pattern=red ! video/x-raw,format=I420,width=320,height=240,framerate=15/1 "
    f"! {encoder} ! {payloader} name=pay1 )"
)
permissions = GstRtspServer.RTSPPermissions()
for what in ("access", "construct"):
    permissions.add_permission_for_role("viewer", f"media.factory.{what}", True)
factory.set_permissions(permissions)
token = GstRtspServer.RTSPToken()
token.set_string("media.factory.role", "viewer")
auth = GstRtspServer.RTSPAuth()
auth.add_basic(GstRtspServer.RTSPAuth.make_basic("user", "secret"), token)
server = GstRtspServer.RTSPServer(address="127.0.0.1", service="0")
server.set_auth(auth)
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
