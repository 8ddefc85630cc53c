"""Where frames come from: cameras, streams, videos, folders, raw bytes, arrays; all behind `open_source`."""
