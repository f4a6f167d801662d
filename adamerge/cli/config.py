"""Finding, composing and checking the configuration."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra.utils
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from adamerge.cli.lightning import best_precision
from adamerge.errors import ConfigError, shortlist
from adamerge.files import write_text

CONFIG_FILE, OVERRIDES_FILE = "config.yaml", "overrides.yaml"


def config_dir() -> Path:
    """The folder of YAML groups: inside an installed package, beside it in a checkout.

    Raises:
        ConfigError: If neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError("adamerge's conf/ folder is missing. Install the package again.")


def options(group: str) -> dict[str, str]:
    """What a group offers: name and the first comment line of its file, in order of name."""
    found = {}
    for file in sorted((config_dir() / group).glob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        first = next(line for line in lines if not line.startswith("# @package"))
        found[file.stem] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found


def compose_config(name: str, overrides: Sequence[str]) -> tuple[DictConfig, Path]:
    """Compose without Hydra's command line, for use from Python; also returns the run's folder."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose(name, list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        run_dir = Path(config.hydra.run.dir)
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        OmegaConf.set_struct(config, True)
        OmegaConf.resolve(config)
    return config, run_dir


def check_complete(config: DictConfig) -> None:
    """Raise ConfigError if an option that must be given is not."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"unset: {shortlist(missing)}. Give a value on the command line: {missing[0]}=…")


def settle(config: DictConfig, run_dir: Path | None = None, *, learned: bool = False) -> None:
    """Replace each ``auto`` by what it means on this machine; a resumed run keeps what it meant when it started.

    Args:
        config: Changed in place: ``trainer.precision`` and ``bank.dtype``.
        run_dir: The run's folder.
        learned: Whether coefficients are learned; only then may τ be as narrow as what the network computes in.
    """
    before = OmegaConf.load(run_dir / CONFIG_FILE) if run_dir and config.resume else OmegaConf.create()
    if config.trainer.precision == "auto":
        make_trainer = hydra.utils.instantiate(config.trainer, precision="32-true")
        device = make_trainer(logger=False, enable_checkpointing=False).strategy.root_device
        config.trainer.precision = OmegaConf.select(before, "trainer.precision") or best_precision(device)
    if config.bank.dtype == "auto":
        narrow = learned and config.trainer.precision == "bf16-mixed"
        config.bank.dtype = OmegaConf.select(before, "bank.dtype") or ("bfloat16" if narrow else "float32")


def save_config(config: DictConfig, run_dir: Path) -> None:
    """Write the resolved configuration and, when Hydra runs, the overrides that made it."""
    write_text(run_dir / CONFIG_FILE, OmegaConf.to_yaml(config, resolve=True))
    if HydraConfig.initialized():
        write_text(run_dir / OVERRIDES_FILE, yaml.safe_dump(list(HydraConfig.get().overrides.task)))


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments that continue the run named by ``resume=DIR``: those it was started with, in its own folder.

    Raises:
        ConfigError: If there is no run, or another option given now differs from the run's.
    """
    run_dir = Path(next(a for a in arguments if a.startswith("resume=")).removeprefix("resume=").strip("'"))
    try:
        overrides = yaml.safe_load((run_dir / OVERRIDES_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{run_dir} holds no run to resume: {error.filename} is missing. Name the folder that the run printed."
        ) from error
    overrides = [item for item in overrides if not item.startswith("resume=")]
    started = _comparable(overrides)
    own = ("resume=", "hydra.")
    conflicts = [
        argument
        for argument in arguments
        if argument not in overrides and not argument.startswith(own) and _differs(started, [*overrides, argument])
    ]
    if conflicts:
        raise ConfigError(
            f"a resumed run keeps its options; {shortlist(conflicts)} differs from those in {run_dir / CONFIG_FILE}. "
            "Drop it, or start a new run."
        )
    quoted = str(run_dir).replace("'", r"\'")
    return [*overrides, f"resume='{quoted}'", f"hydra.run.dir='{quoted}'"]


def _comparable(overrides: Sequence[str]) -> dict[str, Any]:
    """What ``overrides`` compose to, without what holds the time of day."""
    config, _ = compose_config("train", overrides)
    flat = _flat(OmegaConf.to_container(config, resolve=True))
    return {key: value for key, value in flat.items() if key not in ("paths.run_dir", "paths.sweep_dir")}


def _differs(started: dict[str, Any], overrides: Sequence[str]) -> bool:
    try:
        return _comparable(overrides) != started
    except ConfigCompositionException:  # a second choice for a group, say
        return True


def check_same(config: DictConfig, run_dir: Path) -> None:
    """Raise ConfigError if a resumed run would be composed differently now than when it started."""
    before = _flat(OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG_FILE)))
    now = _flat(OmegaConf.to_container(config, resolve=True))
    own = ("resume", "paths.")
    changed = [key for key in before.keys() | now.keys() if not key.startswith(own) and before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"the configuration of {run_dir} differs from today's in {shortlist(changed)}. "
            "Resume with the version of adamerge that started it, or start a new run."
        )


def cache_dir(config: DictConfig) -> Path:
    """Where decoded images, heads and scores are kept: paths.cache_dir, $ADAMERGE_CACHE or the user's cache folder."""
    import platformdirs

    chosen = config.paths.cache_dir or os.environ.get("ADAMERGE_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("adamerge")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}
