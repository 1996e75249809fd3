# Two stages: the first compiles and installs into /opt/venv, the second runs it as a user without privileges.
#   docker build -t neox .
#   docker run --rm -it --shm-size=1g neox make quickstart
# For NVIDIA GPUs, give a CUDA development image (DeepSpeed compiles kernels with nvcc):
#   docker build -t neox --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 .
ARG BASE=debian:trixie-slim

FROM ${BASE} AS system
ENV DEBIAN_FRONTEND=noninteractive
# The compiler stays in the final image: DeepSpeed builds its operators at first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates g++ git make openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM system AS build
WORKDIR /opt/neox
COPY pyproject.toml setup.py LICENSE README.md Makefile ./
COPY requirements requirements
COPY megatron megatron
RUN PIP_NO_CACHE_DIR=1 make install VENV=/opt/venv

FROM system
RUN useradd --create-home --shell /bin/bash neox
COPY --from=build --chown=neox:neox /opt/venv /opt/venv
COPY --chown=neox:neox . /opt/neox
RUN chown neox:neox /opt/neox && touch /opt/venv/.base-installed
ENV PATH=/opt/venv/bin:${PATH} VENV=/opt/venv PYTHONUNBUFFERED=1
USER neox
WORKDIR /opt/neox
CMD ["python", "deepy.py", "--help"]
