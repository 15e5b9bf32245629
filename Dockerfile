# A server in a container: docker build -t hasten . && docker run -p 8000:8000 -v $PWD/models:/models hasten serve /models/NAME.hasten
# The kernels for every instruction set are in one build; the processor that runs it is looked at when it starts.
FROM python:3.12-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --wheel-dir /wheels '.[serve]'

FROM python:3.12-slim-bookworm
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-index --find-links /wheels 'hasten[serve]' \
    && rm -rf /wheels \
    && useradd --create-home hasten
USER hasten
ENV HASTEN_CACHE=/home/hasten/cache
VOLUME ["/home/hasten/cache"]
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["hasten"]
CMD ["--help"]
