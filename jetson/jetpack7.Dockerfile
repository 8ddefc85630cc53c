# The runtime with TensorRT, for JetPack 7. Untested: no Jetson and no Docker was at hand.
#
#     pip wheel --no-deps --wheel-dir jetson/wheels .
#     docker build -f jetson/jetpack7.Dockerfile -t duallora-edge jetson     # for 7.1: --build-arg RELEASE=r38.4
#     docker run --rm --runtime nvidia -v "$PWD/bundle:/bundle:ro" -v engines:/cache duallora-edge doctor /bundle
#
# We know of no image of NVIDIA with JetPack 7's TensorRT (l4t-jetpack ends with r36.4.0), so it comes from the
# repository that a device uses. NVIDIA's CUDA images bring another repository, whose TensorRT would come first.
FROM ubuntu:24.04
ARG RELEASE=r39.2

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/*
ADD https://repo.download.nvidia.com/jetson/jetson-ota-public.asc /usr/share/keyrings/nvidia-jetson.asc
RUN chmod 644 /usr/share/keyrings/nvidia-jetson.asc \
    && echo "deb [signed-by=/usr/share/keyrings/nvidia-jetson.asc] https://repo.download.nvidia.com/jetson/common $RELEASE main" \
        > /etc/apt/sources.list.d/nvidia-jetson.list \
    && apt-get update \
    && apt-get install -y --no-install-recommends python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*

COPY constraints-jp7.txt wheels /tmp/
RUN python3 -m venv --system-site-packages /opt/duallora \
    && /opt/duallora/bin/pip install --no-cache-dir -c /tmp/constraints-jp7.txt \
        "$(ls /tmp/duallora_edge-*.whl)[cpu]" cuda-python

ENV DUALLORA_EDGE_CACHE=/cache
ENTRYPOINT ["/opt/duallora/bin/duallora-edge"]
