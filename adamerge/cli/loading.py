"""From a configuration to a problem."""

from omegaconf import DictConfig

from adamerge.cli.config import cache_dir
from adamerge.tasks.corruptions import Corruption
from adamerge.tasks.problem import Problem, load_problem, suite_named


def load(config: DictConfig) -> Problem:
    """Read what ``suite``, ``model``, ``bank`` and ``data`` name."""
    cache = cache_dir(config)
    tasks = list(config.suite.tasks) if config.suite.tasks is not None else None
    data = config.data
    return load_problem(
        suite_named(config.suite.name, config.suite.root, tasks, cache),
        cache_dir=cache,
        include=config.model.include,
        exclude=config.model.exclude,
        strict_dtype=config.bank.strict_dtype,
        dtype=config.bank.dtype,
        device=config.bank.device,
        adapt=data.adapt,
        split_seed=data.split_seed,
        fraction=data.fraction,
        images_per_task=data.images_per_task,
        corruption=Corruption(data.corruption, data.severity) if data.corruption else None,
        corrupt=data.corrupt,
    )
