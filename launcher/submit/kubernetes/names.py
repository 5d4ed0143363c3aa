"""What the objects of a run are called, and how they are told from others."""

import re
from typing import Any

from trainer.config import RunConfig, UserError

LONGEST = 47
"""Characters of a RayJob's name: KubeRay's MaxRayJobNameLength, since names of clusters and pods are made of it."""

MANAGED_BY = "app.kubernetes.io/managed-by"
PART_OF = "app.kubernetes.io/part-of"
US = "broadgauge"
RUN_LABEL = "broadgauge/run"
RUN_ANNOTATION = "broadgauge/run-name"
"""The run's name as its config has it; the object's may differ."""
CONFIG_ANNOTATION = "broadgauge/config"
"""Of the head's pod: the config, which the pod sees as a file."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def object_name(config: RunConfig) -> str:
    """The run's name as a DNS label: lower case, hyphens for anything that is no letter or digit, a letter first.

    Raises:
        UserError: it is too long.
    """
    name = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    if len(name) > LONGEST:
        raise UserError(
            f"name {config.name} makes a RayJob's name of {len(name)} characters, and KubeRay takes {LONGEST} at most; "
            f"use one such as {name[:LONGEST].strip('-')}"
        )
    return name


def labels(name: str) -> dict[str, str]:
    """Of the RayJob and of every pod."""
    return {MANAGED_BY: US, PART_OF: US, RUN_LABEL: name}


def labelled(metadata: dict[str, Any] | None, more: dict[str, str]) -> dict[str, Any]:
    """Metadata with more labels."""
    metadata = metadata or {}
    return {**metadata, "labels": {**metadata.get("labels", {}), **more}}
