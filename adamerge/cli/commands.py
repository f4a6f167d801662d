"""The subcommands."""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from adamerge.cli import config as configuration


def train(config: DictConfig) -> None:
    """The main job under Hydra."""
    from hydra.core.hydra_config import HydraConfig
    from pytorch_lightning.utilities import rank_zero_only

    from adamerge.cli.job import Job

    hydra_config = HydraConfig.get()
    console = Console(quiet=rank_zero_only.rank != 0)
    Job(config, Path(hydra_config.runtime.output_dir), hydra_config.runtime.choices["method"], console).run()


def list_methods(arguments: list[str]) -> None:
    """Print the methods of conf/method."""
    _print_options("method")


def list_suites(arguments: list[str]) -> None:
    """Print the suites of conf/suite."""
    _print_options("suite")


def _print_options(group: str) -> None:
    console = Console()
    for name, description in configuration.options(group).items():
        console.print(f"[bold]{name}[/bold]  {description}", soft_wrap=True, highlight=False)


def inspect(arguments: list[str]) -> None:
    """Print what a checkpoint, a coefficients file or a run's folder holds."""
    from adamerge.cli.inspect import describe
    from adamerge.errors import ConfigError

    if len(arguments) != 1:
        raise ConfigError("adamerge inspect takes one file or folder.")
    describe(Path(arguments[0]), Console())


def evaluate(config: DictConfig) -> None:
    """Score a checkpoint on a suite."""
    from adamerge.cli.evaluate import evaluate_checkpoint

    configuration.check_complete(config)
    evaluate_checkpoint(config, Console())


def finetune(config: DictConfig) -> None:
    """Make an expert."""
    from adamerge.cli.finetune import make_expert

    configuration.check_complete(config)
    make_expert(config, Console())
