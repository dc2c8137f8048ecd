# syntax=docker/dockerfile:1
# An image for each process, from one source:
#
#   docker build --target inference .     owns the model; torch is in this one only
#   docker build --target dataset .       reads activation records
#   docker build --target explainer .     explains components, keeps explanations
#   docker build --target gateway .       the page and the JSON API
#
# TORCH_INDEX=URL takes torch from PyTorch's own wheel index: its CPU build makes the image smaller,
# its CUDA builds fit older drivers. Without it torch comes with CUDA, and runs without a GPU too.

ARG PYTHON_IMAGE=python:3.12-slim
ARG NODE_IMAGE=node:24-slim

# The page, into gateway/static.
FROM ${NODE_IMAGE} AS page
WORKDIR /source
COPY web/package.json web/package-lock.json web/
RUN --mount=type=cache,target=/root/.npm npm --prefix web ci --no-audit --no-fund
COPY buf.yaml buf.gen.yaml ./
COPY protos protos
COPY web web
RUN npm --prefix web run build

# One wheel for all: the build hook makes the stubs.
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY tools tools
COPY protos protos
COPY client client
COPY demo demo
COPY services services
COPY gateway gateway
COPY --from=page /source/gateway/static gateway/static
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS environment
RUN python -m venv /opt/tdb
ENV PATH=/opt/tdb/bin:$PATH

FROM environment AS gateway-environment
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    pip install "$(echo /wheels/*.whl)[gateway,otel]"

FROM environment AS dataset-environment
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    pip install "$(echo /wheels/*.whl)[dataset,object-stores,otel]"

FROM environment AS explainer-environment
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    pip install "$(echo /wheels/*.whl)[explainer,otel]"

# torch first and by its own line, as in the Makefile. The demo gets a path without versions in it.
FROM environment AS inference-environment
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    pip install "$(echo /wheels/*.whl)[inference,otel]"
RUN ln -s "$(python -c 'import demo; print(demo.__path__[0])')" /opt/tdb/demo

# What runs: no compiler, no root, nothing written outside /data (datasets or explanations), /hub (models) and /tmp.
# Inside a container loopback reaches nobody, so TDB_TOKENS or TDB_TRUSTED_PROXIES must be given.
FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 tdb \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tdb \
 && install --directory --owner=tdb --group=tdb --mode=0700 /data /hub
ENV PATH=/opt/tdb/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    HF_HOME=/hub \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TDB_DATA_DIR=/data \
    TDB_HOST=0.0.0.0
USER 10001:10001
WORKDIR /data
STOPSIGNAL SIGTERM

FROM runtime AS gateway
COPY --from=gateway-environment /opt/tdb /opt/tdb
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s \
    CMD ["python", "-m", "services.common.probe", "http://127.0.0.1:8080/healthz"]
CMD ["python", "-m", "gateway"]

FROM runtime AS dataset
COPY --from=dataset-environment /opt/tdb /opt/tdb
EXPOSE 50052
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s \
    CMD ["python", "-m", "services.common.probe", "127.0.0.1:50052"]
CMD ["python", "-m", "services.dataset"]

FROM runtime AS explainer
COPY --from=explainer-environment /opt/tdb /opt/tdb
EXPOSE 50053
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s \
    CMD ["python", "-m", "services.common.probe", "127.0.0.1:50053"]
CMD ["python", "-m", "services.explainer"]

FROM runtime AS inference
COPY --from=inference-environment /opt/tdb /opt/tdb
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=6s --start-period=600s \
    CMD ["python", "-m", "services.common.probe", "127.0.0.1:50051"]
CMD ["python", "-m", "services.inference"]
