# One image for both: docker build --build-arg HARDWARE=cuda (or tpu, or cpu) -t jflow .
# The wheels bring CUDA or libtpu along; a GPU machine needs its driver and NVIDIA's container
# toolkit, nothing else.
FROM python:3.12-slim
ARG HARDWARE=cuda
WORKDIR /jflow
COPY pyproject.toml README.md LICENSE ./
COPY jflow jflow
RUN case "$HARDWARE" in \
        cuda | tpu) extra="[$HARDWARE,gcs]" ;; \
        cpu) extra="[gcs]" ;; \
        *) echo "HARDWARE must be cuda, tpu or cpu, not $HARDWARE" >&2; exit 2 ;; \
    esac && pip install --no-cache-dir --editable ".$extra"
COPY configs configs
COPY scripts scripts
COPY train.py sample.py ./
# What jflow's plan counts with; JAX takes three quarters of a GPU.
ENV XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
# docker run jflow train.py --config ...: begins anew where it failed, and saves when it is stopped.
# Whatever else is to end with its first error: docker run --entrypoint python jflow sample.py ...
ENTRYPOINT ["scripts/until_done.sh", "python"]
CMD ["train.py", "--help"]
