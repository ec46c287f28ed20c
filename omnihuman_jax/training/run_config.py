"""config.json of a run, and which config changes matter when a run continues."""

import hashlib
import json
from typing import Any

from omnihuman_jax import stores
from omnihuman_jax.sharding.processes import log
from omnihuman_jax.stores import AnyPath

# Keys that do not change what is trained: where and how fast it runs, what is logged, kept and shown.
SAFE = (
    "simulated_devices",
    "compilation_cache",
    "mesh.",
    "checkpoint.",
    "log_every",
    "sample.",
    "guidance.",
    "faults.",
    "evaluation.",
    "profile.",
    "plan.",
    "data.log_records",
    "data.cache_mb",
    "data.omit_absent",
    "data.dir",
    "vae.checkpoint",
    "model.attention",
    "model.remat",
    "model.scan_blocks",
    "optimizer.accumulate",
)


# Keys that may differ between hosts, such as paths.
LOCAL = ("compilation_cache", "data.dir", "vae.checkpoint", ".init_from", "encoder_from", "loss.lpips")


def shared_digest(plain_config: dict[str, Any]) -> str:
    """sha256 of the keys that must be equal in all processes of a run."""
    return config_digest({k: v for k, v in flatten(plain_config).items() if not k.endswith(LOCAL)})


def config_digest(plain_config: dict[str, Any]) -> str:
    """sha256 of a config of plain JSON types."""
    return hashlib.sha256(json.dumps(plain_config, sort_keys=True).encode()).hexdigest()


def write_config(workdir: AnyPath, plain_config: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Writes config.json; logs the keys that differ from the checkpoint's, `before`, and whether they are safe."""
    path = workdir / "config.json"
    if before is not None:
        before, after = flatten(before), flatten(json.loads(json.dumps(plain_config)))  # tuples become lists
        changed = [k for k in sorted(before | after) if before.get(k) != after.get(k)]
        for heading, safe in (("changes what is trained", False), ("safe", True)):
            lines = [f"{k}: {before.get(k)} -> {after.get(k)}" for k in changed if k.startswith(SAFE) == safe]
            if lines:
                log(f"config differs from the checkpoint's ({heading}): {'; '.join(lines)}")
    stores.write_whole(path, (json.dumps(plain_config, indent=2) + "\n").encode())


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a config of plain types."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
