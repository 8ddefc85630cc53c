# The runtime with TensorRT, for JetPack 6.1 and 6.2. Untested: no Jetson and no Docker was at hand.
#
#     pip wheel --no-deps --wheel-dir jetson/wheels .
#     docker build -f jetson/jetpack6.Dockerfile -t duallora-edge jetson
#     docker run --rm --runtime nvidia -v "$PWD/bundle:/bundle:ro" -v engines:/cache duallora-edge doctor /bundle
#
# NVIDIA's image holds CUDA 12.6 and TensorRT 10.3. Its TensorRT needs libnvdla_compiler.so of the device, which
# --runtime nvidia mounts, so it cannot be imported while the image is built.
FROM nvcr.io/nvidia/l4t-tensorrt:r10.3.0-runtime

ADD https://repo.download.nvidia.com/jetson/jetson-ota-public.asc /usr/share/keyrings/nvidia-jetson.asc
RUN chmod 644 /usr/share/keyrings/nvidia-jetson.asc \
    && echo "deb [signed-by=/usr/share/keyrings/nvidia-jetson.asc] https://repo.download.nvidia.com/jetson/common r36.4 main" \
        > /etc/apt/sources.list.d/nvidia-jetson.list \
    && apt-get update \
    && apt-get install -y --no-install-recommends python3-venv 'python3-libnvinfer=10.3.*' \
    && rm -rf /var/lib/apt/lists/*

COPY constraints-jp6.txt wheels /tmp/
RUN python3 -m venv --system-site-packages /opt/duallora \
    && /opt/duallora/bin/pip install --no-cache-dir -c /tmp/constraints-jp6.txt \
        "$(ls /tmp/duallora_edge-*.whl)[cpu]" cuda-python

ENV DUALLORA_EDGE_CACHE=/cache
ENTRYPOINT ["/opt/duallora/bin/duallora-edge"]
