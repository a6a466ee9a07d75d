# opsin's server on the CPU: docker build -t opsin . && docker run --rm -p 8000:8000 opsin
# Nobody has built this where opsin is developed, which has no Docker; it is linted, and its commands are tested.
FROM python:3.12-slim-bookworm AS build
# A compiler for the CPU's own kernels; without one torch's operators would serve.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /opt/opsin \
    && /opt/opsin/bin/pip install --no-cache-dir "./all[demo,video]" -c constraints.txt \
       --extra-index-url https://download.pytorch.org/whl/cpu

FROM python:3.12-slim-bookworm
# The compiled kernels need OpenMP.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home opsin
COPY --from=build /opt/opsin /opt/opsin
USER opsin
WORKDIR /home/opsin
ENV PATH=/opt/opsin/bin:$PATH \
    HF_HOME=/home/opsin/models
# Checkpoints from the hub: docker run -v opsin-models:/home/opsin/models ...
VOLUME /home/opsin/models
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["opsin"]
# Whoever can reach the port may ask: give the server keys (OPSIN_API_KEY) before it is published.
CMD ["serve", "opsin/tiny-qwen2vl", "--host", "0.0.0.0"]
