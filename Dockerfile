# For a CPU:  docker build -t boardwalk .
# For CUDA:   docker build -t boardwalk --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg TORCH_INDEX= .
# The road:   docker run --rm --shm-size=8g -v "$PWD/outputs:/boardwalk/outputs" boardwalk            (add --gpus all where there are some)
# A verb:     docker run --rm --shm-size=8g -v "$PWD/outputs:/boardwalk/outputs" boardwalk python -m src.doctor
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential git python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /boardwalk
# torch's CPU build is not on PyPI; what the locks know of it is checked by its hash.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1
COPY requirements.txt requirements.lock requirements.cpu.lock requirements.cuda.lock ./
COPY scripts/env.sh scripts/
RUN bash -c 'source scripts/env.sh && make_env'
COPY . .
ENV PATH=/boardwalk/.venv/bin:${PATH}
CMD ["bash", "scripts/quickstart.sh"]
