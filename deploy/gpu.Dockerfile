# GPU workers. Built by deploy/build from the repository's root. The same pins and steps as deploy/setup
# gpu; CUDA's libraries come with the wheels, the driver from the node, the weights from a volume.
FROM python:3.11-slim-bookworm

# gcc: Triton compiles its launchers on the node. wget: KubeRay's health checks call it. rsync: Ray's
# cluster launcher puts its files into the container with it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ffmpeg wget rsync gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/polyscribe

# What changes seldom comes first: every package, then the code (some 100 KB).
COPY pyproject.toml README.md ./
COPY deploy/constraints.txt deploy/
RUN mkdir operators pipeline jobs \
    && touch operators/__init__.py pipeline/__init__.py jobs/__init__.py \
    && pip install -c deploy/constraints.txt --upgrade pip \
    && pip install -c deploy/constraints.txt '.[gpu]' \
    && pip uninstall -y polyscribe

# Numbers, so that Kubernetes can see that it is not root.
RUN useradd --uid 1000 --create-home polyscribe
COPY operators operators
COPY pipeline pipeline
COPY jobs jobs
RUN pip install --no-deps .
USER 1000:1000
CMD ["polyscribe", "--help"]
