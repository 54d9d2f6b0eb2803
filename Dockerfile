# glip_jax for GKE or any machine with containers: the code, its environment, and scripts/pretrain.sh as what it does.
#   docker build --tag=REGISTRY/glip_jax:TAG .                                                   TPUs
#   docker build --build-arg=REQUIREMENTS=requirements-gpu.txt --tag=REGISTRY/glip_jax:TAG .     NVIDIA GPUs
# No secrets and no data go in (.dockerignore); credentials come from the machine's account.
FROM python:3.12-slim
ARG REQUIREMENTS=requirements-tpu.txt
ENV GLIP_JAX_REQUIREMENTS=$REQUIREMENTS PYTHONUNBUFFERED=1
RUN useradd --create-home --uid=1000 glip && install --directory --owner=glip /glip_jax
USER glip
WORKDIR /glip_jax
# Before the code, so that a change of the code installs nothing again.
COPY --chown=glip requirements*.txt ./
COPY --chown=glip scripts/environment.sh scripts/
RUN bash -c 'set -euo pipefail; source scripts/environment.sh; environment "$GLIP_JAX_REQUIREMENTS"'
COPY --chown=glip . .
ENTRYPOINT ["scripts/pretrain.sh"]
