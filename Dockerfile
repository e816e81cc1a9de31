# The web page in a container, on port 7860.
#   docker build -t dall3 .                                       CPU
#   docker build -t dall3 --build-arg TORCH=cu128 .               CUDA 12.8
#   docker run --rm -p 7860:7860 -v dall3:/cache dall3            add --gpus all for CUDA
FROM python:3.12-slim

ARG TORCH=cpu
RUN useradd --create-home --uid 1000 dall3 && mkdir /cache && chown dall3 /cache
# Versions are bounded by pyproject.toml; the newest that fit are installed.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/${TORCH}
COPY pyproject.toml README.md LICENSE weights.toml /src/
COPY src /src/src
RUN pip install --no-cache-dir "/src[web]" && rm -rf /src

USER 1000
WORKDIR /home/dall3
ENV DALL3_HOME=/cache HF_HOME=/cache/huggingface
VOLUME /cache
EXPOSE 7860
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:7860/', timeout=5)"]
ENTRYPOINT ["dall3"]
CMD ["web", "--host", "0.0.0.0"]
