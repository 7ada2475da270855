# Head, CPU workers, submitter, and the engine of a cluster without GPUs. Built by deploy/build from the
# repository's root. The same pins and steps as deploy/setup cpu; no weights but the 11 MB nano checkpoint.
FROM python:3.11-slim-bookworm

# wget: KubeRay's health checks call it. rsync: Ray's cluster launcher puts its files into the container
# with it; ssh: so a head reaches its workers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ffmpeg wget rsync openssh-client \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
WORKDIR /opt/polyscribe

# What changes seldom comes first: torch, then every other package, then the code (some 100 KB).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md ./
COPY deploy/constraints.txt deploy/torchvision_cpu.py deploy/
RUN torch=$(sed -n 's/.*"torch==\([^"]*\)".*/\1/p' pyproject.toml) \
    && pip install -c deploy/constraints.txt --upgrade pip \
    && pip install --no-deps --extra-index-url "$TORCH_INDEX" "torch==$torch+cpu"
RUN mkdir operators pipeline jobs \
    && touch operators/__init__.py pipeline/__init__.py jobs/__init__.py \
    && pip install --extra-index-url "$TORCH_INDEX" -c deploy/constraints.txt '.[cpu]' \
    && pip uninstall -y polyscribe \
    # What does not load beside torch's CPU build must not stay; see deploy/setup.
    && for package in torchaudio torchcodec; do \
        python -c "import $package" 2>/dev/null || pip uninstall -y "$package"; \
    done \
    && if ! python -c 'import torchvision' 2>/dev/null; then \
        site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
        && cp deploy/torchvision_cpu.py "$site/polyscribe_torchvision_cpu.py" \
        && echo 'import polyscribe_torchvision_cpu' >"$site/polyscribe_torchvision_cpu.pth"; \
    fi

# Numbers, so that Kubernetes can see that it is not root.
RUN useradd --uid 1000 --create-home polyscribe
COPY operators operators
COPY pipeline pipeline
COPY jobs jobs
RUN pip install --no-deps .
COPY deploy/samples deploy/samples
COPY deploy/nano/checkpoint deploy/nano/checkpoint
USER 1000:1000
CMD ["polyscribe", "--help"]
