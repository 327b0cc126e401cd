# The daemon in a container. How to run it: docs/OPERATIONS.md, "Docker".
#
#   docker build -t tornado-bcast .
#
# Any Debian or Ubuntu with Python 3.11 or newer will do as the base: --build-arg BASE=debian:bookworm-slim
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
        gcc libc6-dev python3-dev python3-pip python3-setuptools python3-venv
WORKDIR /src
# What changes seldom comes first: the versions and hashes of requirements.lock, which CI tests with.
COPY requirements.lock ./
RUN python3 -m venv --without-pip /opt/tornado-bcast \
    && python3 -m pip --python /opt/tornado-bcast/bin/python install --no-cache-dir \
        --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml setup.py README.md LICENSE ./
COPY tornado_bcast tornado_bcast
RUN python3 -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /src/dist . \
    && python3 -m pip --python /opt/tornado-bcast/bin/python install --no-cache-dir --no-deps dist/*.whl

FROM ${BASE}
# One layer that leaves nothing of apt behind, and the directory that a new volume takes its owner from.
RUN apt-get update && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/tornado-bcast
COPY --from=build /opt/tornado-bcast /opt/tornado-bcast
# In here all addresses is right: which of the host's is published is said by `docker run -p`.
ENV PATH=/opt/tornado-bcast/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    BIND=0.0.0.0 \
    PORT=8080 \
    BCAST_ENV=production \
    STATE_DIRECTORY=/var/lib/tornado-bcast
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
VOLUME /var/lib/tornado-bcast
EXPOSE 8080
# Whether the loop turns, and no more: /health is 503 while Redis is away, and a restart would drop every client.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python3", "-I", "-c", \
    "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); c.request('GET', '/health/live'); exit(c.getresponse().status != 200)"]
# The daemon is PID 1: it handles SIGTERM and waits for every child, orphans as well, so no init is needed.
ENTRYPOINT ["tornado-bcast"]
CMD ["serve"]
