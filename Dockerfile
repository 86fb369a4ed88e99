# docker build -t sid .                                                             CPU
# docker build -t sid --build-arg BASE=pytorch/pytorch:2.7.1-cuda12.6-cudnn9-runtime .    CUDA; run with --gpus=all
# docker run --rm -v "$PWD/out:/out" sid --recipe=demo --outdir=/out
ARG BASE=python:3.12-slim
FROM ${BASE}

# PyTorch's builds for CPUs need none of CUDA's libraries. A base image that has PyTorch keeps its own.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /opt/sid
COPY pyproject.toml README.md LICENSE NOTICE sid_train.py fid.py ./
COPY dnnlib dnnlib
COPY torch_utils torch_utils
COPY training training
COPY edm edm
COPY sid sid
COPY assets assets
RUN (python -c "import torch" || pip install --no-cache-dir torch --extra-index-url "$TORCH_INDEX") \
    && pip install --no-cache-dir .

ENV OMP_NUM_THREADS=1 DNNLIB_CACHE_DIR=/cache
WORKDIR /work
ENTRYPOINT ["sid-train"]
CMD ["--help"]
