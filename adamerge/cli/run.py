"""The main job from Python."""

from rich.console import Console

from adamerge.cli.config import compose_config
from adamerge.cli.job import Job, Outcome
from adamerge.errors import AdamergeError


def run(*overrides: str, quiet: bool = False) -> Outcome:
    """Do what ``adamerge`` does on the command line, and return it.

    Args:
        overrides: The command line's options, such as ``"method=ties"`` and ``"suite.tasks=[letters,clocks]"``.
        quiet: Print nothing.

    Raises:
        AdamergeError: A child of it for everything that is wrong with options or files.
    """
    from hydra.core.hydra_config import HydraConfig

    config, run_dir = compose_config("train", overrides)
    outcome = Job(config, run_dir, HydraConfig.get().runtime.choices["method"], Console(quiet=quiet)).run()
    if outcome is None:
        raise AdamergeError(
            "a distributed run returns nothing on its helper processes. Start it from the command line."
        )
    return outcome
