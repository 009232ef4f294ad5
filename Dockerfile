# The server with the models in models/. Build: docker build -t tiny-model-server .
ARG BASE=python:3.11-slim

# Only the models' requirements, so that a change of their code does not install them again.
FROM ${BASE} AS requirements
COPY models/ /models/
RUN find /models -mindepth 1 -not -name requirements.txt -not -type d -delete && \
    find /models -mindepth 1 -type d -empty -delete

FROM ${BASE}
# CPU builds of torch by default, which keep the image small. For the CUDA builds: --build-arg TORCH_INDEX=
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
COPY requirements.txt ./
RUN pip install -r requirements.txt
COPY --from=requirements /models/ /tmp/models/
RUN find /tmp/models -name requirements.txt -exec cat {} + > /tmp/models.txt && \
    pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r /tmp/models.txt

COPY server.py model_client.py model_interface.py server.proto ./
COPY tiny_model_server/ tiny_model_server/
COPY models/ models/

# The server writes to /tmp and memory only, so the container's root may be read-only.
RUN useradd --system --uid 10001 --home-dir /tmp server
USER 10001
# Callers with TMS_ADMIN_TOKEN may stop the server and change its models. If none is set, nobody may.
ENV HOME=/tmp TMS_ADMIN=token
EXPOSE 50000 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s CMD ["python", "server.py", "health"]
CMD ["python", "server.py"]
