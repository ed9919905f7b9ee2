"""`aatjax summary`: trained and frozen parameters of a config."""

from aatjax.cli.arguments import config_of

HELP = """usage: aatjax summary [CONFIG] [--method NAME] [--FIELD VALUE ...]

Prints the trained and frozen parameters of what CONFIG says, module by module; trains nothing.

  --method NAME      another method: a row of `aatjax methods`, a method at its defaults, or
                     several joined by +

configs: {configs}
every field of the config is a flag: aatjax summary CONFIG --flags lists them
"""


def main(arguments: list[str]) -> None:
    """Runs `aatjax summary`."""
    config, _ = config_of("summary", arguments, HELP)
    from aatjax import petl
    from aatjax.experiments import run
    from aatjax.models.summary import summary

    classes = 10
    if config.data.format == "synthetic" or config.data.path is not None:
        classes = len(run.divide(config.data).train.classes)
    model = run.load_backbone(config.model, num_classes=classes, seed=0)
    print(summary(petl.adapt(model, config.petl)))
