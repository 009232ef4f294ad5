# The server with the models in models/. Build: docker build -t tiny-model-server .
FROM python:3.11-slim

# An index with CPU builds of torch keeps the image small: --build-arg TORCH_INDEX=...
ARG TORCH_INDEX=""
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

# Requirements first, so that a change of code installs nothing again.
COPY requirements.txt ./
RUN pip install -r requirements.txt
COPY models/ /tmp/models/
RUN find /tmp/models -maxdepth 2 -name requirements.txt | sed 's/^/-r /' | \
    xargs -r pip install ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} && rm -rf /tmp/models

COPY server.py model_client.py model_interface.py server.proto ./
COPY tiny_model_server/ tiny_model_server/
COPY models/ models/

RUN useradd --system --uid 10001 server
USER 10001
EXPOSE 50000 8080
CMD ["python", "server.py"]
