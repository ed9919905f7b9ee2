"""Counts the trainable and frozen parameters of a config, module by module."""

import dataclasses
from json import dumps

from aatjax.cli.arguments import ConfigArguments

GROUP = "plan"


def main(config: ConfigArguments, *, fields: list[str], json: bool = False) -> None:
    """Run `aatjax summary`.

    Args:
        json: print one JSON object
    """
    settings = config.load("summary", fields)
    from aatjax import petl
    from aatjax.experiments.partition import list_partition
    from aatjax.experiments.run import load_backbone
    from aatjax.models.summary import summary

    classes = 10
    if settings.data.format == "synthetic" or settings.data.path is not None:
        classes = len(list_partition(settings.data).train.classes)
    model = load_backbone(settings.model, num_classes=classes, seed=0)
    found = summary(petl.adapt(model, settings.petl))
    print(dumps(dataclasses.asdict(found)) if json else found)
