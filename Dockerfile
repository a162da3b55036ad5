# clipscale in an image: docker build -t clipscale . && docker run --gpus all --shm-size=16g clipscale experiment=demo
FROM python:3.12-slim
# A compiler: torch.compile and Triton build kernels where they run.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/clipscale
COPY pyproject.toml README.md LICENSE ./
COPY clipscale clipscale
COPY conf conf
COPY launch launch
RUN pip install --no-cache-dir .
# Runs go here: mount something, or keep checkpoints in a bucket (checkpoint.dir=s3://…).
WORKDIR /work
ENTRYPOINT ["clipscale", "train"]
