# Steps that do not train (pull, register, package, deploy, check, report), and MLflow's server.
#   docker build -f deployments/images/step.Dockerfile --build-arg PYTHON_DIGEST=sha256:... -t reprise-step .
# PYTHON_DIGEST has no default, so that no build takes whatever the tag means that day. The one of today:
#   docker buildx imagetools inspect python:3.11-slim-bookworm --format '{{.Manifest.Digest}}'
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG PYTHON_DIGEST

FROM ${PYTHON_IMAGE}@${PYTHON_DIGEST} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml requirements.lock ./
# psycopg: MLflow's server speaks to PostgreSQL with it (postgresql+psycopg://), and does not bring it.
# The extra's packages without our own, in the versions that were tested together (requirements.lock as constraints).
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['step'], sep='\n')" > wanted.txt \
    && python -m venv /opt/venv \
    && /opt/venv/bin/pip install "psycopg[binary]==3.3.9" --constraint requirements.lock --requirement wanted.txt

FROM ${PYTHON_IMAGE}@${PYTHON_DIGEST}
# Not pinned: Debian keeps only the newest version of a package, and the digest above already fixes the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*
COPY --from=packages /opt/venv /opt/venv
COPY flows /app/flows
COPY tasks /app/tasks
COPY training /app/training
COPY deployments /app/deployments
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    DVC_NO_ANALYTICS=1 \
    DO_NOT_TRACK=1
WORKDIR /app
# A number, so that runAsNonRoot can be checked before the container starts; the same that ClusterPlace.user names.
USER 10001:10001
CMD ["python", "-m", "tasks.step", "--help"]
