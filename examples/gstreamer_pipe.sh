#!/usr/bin/env bash
# Raw frames of any GStreamer pipeline on standard input: one line of JSON per answer on standard output.
#
#     ./gstreamer_pipe.sh BUNDLE 640x480 v4l2src device=/dev/video0 ! jpegdec | jq -r .label
#     ./gstreamer_pipe.sh BUNDLE 320x240 videotestsrc is-live=true
#
# In short it is
#     gst-launch-1.0 -q PIPELINE ! videoconvert ! ... ! fdsink | duallora-edge run BUNDLE --source - --size WxH
# with what makes that dependable. Ctrl-C and SIGTERM end it with code 0, and so does the end of
# the pipeline. One that cannot start is an error, and GStreamer says why on standard error.
set -euo pipefail

(($# > 2)) || { echo "usage: $0 BUNDLE WxH PIPELINE..." >&2; exit 2; }
bundle=$1 size=$2 pipeline=("${@:3}")
width=${size%x*} height=${size#*x}

# GStreamer pads the rows of RGB to a multiple of four bytes, and raw frames have no padding.
((width % 4 == 0)) || { echo "$0: the width must be a multiple of 4, not $width" >&2; exit 2; }

frames() {
    # Descriptor 3, for camera drivers print messages on standard output, which would be taken for pixels.
    exec gst-launch-1.0 -q "${pipeline[@]}" ! videoconvert ! videoscale \
        ! "video/x-raw,format=RGB,width=$width,height=$height" ! fdsink fd=3 3>&1 1>&2
}

# --live: frames that come while the model is busy are dropped; leave it out to classify every frame of a file.
# exec and <(...) rather than a pipe, so that a signal to this process reaches the one that answers.
exec duallora-edge run "$bundle" --source - --size "$size" --live < <(frames)
