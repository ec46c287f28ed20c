"""A whole training run shrunk to seconds: the demo preset with a tiny network, on fake records."""

from pathlib import Path

from ml_collections import ConfigDict

from data_pipelines.input_pipeline.pipeline import InputPipeline
from data_pipelines.schema import Dataset
from experiments.common import cli
from experiments.configs import demo
from omnihuman_jax.stores import AnyPath
from omnihuman_jax.training import loop
from omnihuman_jax.training.stages import curriculum
from omnihuman_jax.training.tasks.omnihuman import OmniHumanTask
from tests.data_pipelines.fake_dataset import write_fake_dataset


def tiny_config(data: Path, steps: tuple[int, int, int] = (3, 3, 3)) -> ConfigDict:
    """The demo preset with a network of two narrow blocks and the fake data's feature sizes."""
    config = demo.get_config()
    config.global_batch_size = 8
    config.mesh.update({"data": 2, "fsdp": -1})
    config.model.update({"hidden_size": 32, "num_heads": 2, "mlp_hidden": 64, "num_dual_blocks": 1})
    config.model.update({"num_single_blocks": 1, "audio_tokens": 2, "audio_hidden": 16, "text_len": 8})
    config.model.update(
        {"pose_widths": (4, 8), "pose_channels": 4, "latent_channels": 4, "audio_dim": 6, "text_dim": 5}
    )
    config.data.update({"dir": str(data), "latent_frames": 3, "log_records": True})
    for name, count in zip(("stage1", "stage2", "stage3"), steps, strict=True):
        config.stages[name].update({"steps": count, "warmup_steps": 2})
    config.stages.stage1.init_from = ""  # of another network
    config.stages.stage3_warmup.steps = 0
    config.stages.stage2_warmup.steps = 0  # the fake data have no crops of faces
    config.evaluation.gain_every = 0
    config.checkpoint.update({"every": 2, "keep": 2})
    config.log_every = 1
    config.sample.at_stage_end = False
    return config


def tiny_data(directory: Path) -> Dataset:
    """Fake records of one shape, so that one compiled step serves every stage."""
    return write_fake_dataset(directory, 12, shapes=((7, 4, 4),))


def train_tiny(config: ConfigDict, workdir: AnyPath, dataset: Dataset) -> None:
    """What `experiments.train` does, in this process."""
    workdir = cli.make_workdir(workdir)
    input_pipeline = InputPipeline.from_config(config, curriculum(config), dataset)
    loop.train(OmniHumanTask(config, input_pipeline), config, cli.to_plain(config), workdir)
