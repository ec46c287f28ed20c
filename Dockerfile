# The image of a training job: the runtime and this repository. tpu/README.md says how to build and push it.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app
# Before the code, so that a change of the code does not install everything again.
COPY requirements.txt .
RUN pip install -r requirements.txt

COPY omnihuman_jax omnihuman_jax
COPY data_pipelines data_pipelines
COPY experiments experiments
COPY tpu tpu

# 1000 is also the user of the preflight (tpu/jobs/jobset.py).
RUN useradd --create-home --uid 1000 trainer
USER trainer

CMD ["python", "-m", "experiments.train", "--help"]
