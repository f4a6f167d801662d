"""Finding, composing, checking and resuming configurations."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf

from adamerge.cli import lightning
from adamerge.cli.config import (
    CONFIG_FILE,
    OVERRIDES_FILE,
    cache_dir,
    check_complete,
    check_same,
    compose_config,
    config_dir,
    options,
    resume_arguments,
    save_config,
    settle,
)
from adamerge.errors import ConfigError

ROOT = Path(__file__).parents[3]
# Options that belong to another command than train.
COMMANDS = {("trainer", "finetune"): "finetune", ("paths", "cache"): "finetune"}


@pytest.fixture(autouse=True)
def _no_trace_of_hydra() -> Iterator[None]:
    before = HydraConfig.instance().cfg
    yield
    HydraConfig.instance().cfg = before


def groups() -> list[tuple[str, str]]:
    return sorted((file.parent.name, file.stem) for file in config_dir().glob("*/*.yaml"))


# Finding


def test_the_checkouts_folder_is_found() -> None:
    assert config_dir() == ROOT / "conf"
    assert config_dir().is_absolute()


def test_every_yaml_file_is_an_option_a_command_or_what_options_share() -> None:
    files = {str(file.relative_to(config_dir()).with_suffix("")) for file in config_dir().rglob("*.yaml")}
    shared = {str(file.relative_to(config_dir()).with_suffix("")) for file in config_dir().glob("*/base/*.yaml")}
    assert files == {"train", "evaluate", "finetune"} | {f"{group}/{name}" for group, name in groups()} | shared
    for part in shared:
        group, name = part.split("/", 1)
        taken = re.compile(rf"^  - {name}(@\w+)?$", re.MULTILINE)
        assert any(taken.search(file.read_text("utf-8")) for file in (config_dir() / group).glob("*.yaml")), part


def test_options_are_listed_with_their_first_comment() -> None:
    methods = options("method")
    assert list(methods) == sorted(file.stem for file in (config_dir() / "method").glob("*.yaml"))
    assert methods["pretrained"] == "θ₀ as it is: a reference."
    assert options("objective")["entropy"] == "Entropy of the predictions; no labels."
    assert options("logger")["csv"] == ""
    assert options("optimizer")["adam"].startswith("The paper's recipe")
    assert options("nothing") == {}


# Composing


@pytest.mark.parametrize(("group", "name"), groups())
def test_every_option_composes(group: str, name: str) -> None:
    command = COMMANDS.get((group, name), "train")
    config, run_dir = compose_config(command, [f"{group}={name}"])
    assert "hydra" not in config
    assert isinstance(run_dir, Path)
    assert "${" not in OmegaConf.to_yaml(config)
    assert HydraConfig.get().runtime.choices[group] == name


@pytest.mark.parametrize("command", ["train", "evaluate", "finetune"])
def test_every_command_composes(command: str) -> None:
    compose_config(command, [])


def test_train_is_complete_without_any_option() -> None:
    config, run_dir = compose_config("train", [])
    check_complete(config)
    assert run_dir.parts[:3] == ("outputs", "mini", "adamerge")


def test_the_papers_settings_are_the_defaults_of_its_methods() -> None:
    # SPECS A1: Adam 1e-3, (0.9, 0.999), no decay, 500 steps, init 0.3, clip to [0, 1], two batches of 16.
    config, _ = compose_config("train", ["method=adamerging_layerwise"])
    assert config.optimizer._target_ == "torch.optim.Adam"
    assert (config.optimizer.lr, list(config.optimizer.betas), config.optimizer.weight_decay) == (1e-3, [0.9, 0.999], 0)
    assert (config.trainer.max_steps, config.trainer.limit_train_batches) == (500, 500)
    assert (config.method.init, config.method.constraint, config.method.granularity) == (0.3, "clamp", "tensor")
    assert (config.data.images_per_batch, config.data.batches_per_step) == (16, 2)
    for name in ("adamerging_layerwise_pp", "adamerging_taskwise_pp"):
        pp, _ = compose_config("train", [f"method={name}"])
        assert pp.method.transform.density == 0.2
    arithmetic, _ = compose_config("train", ["method=task_arithmetic"])
    assert arithmetic.method.scaling == 0.3
    assert list(arithmetic.method.grid) == [round(0.05 * i, 2) for i in range(21)]
    ties, _ = compose_config("train", ["method=ties"])
    assert (ties.method.density, ties.method.aggregation, ties.method.scaling) == (0.2, "sum", 0.3)


def test_the_fast_recipe_owns_steps_rate_and_schedule_and_the_command_line_beats_it() -> None:
    config, _ = compose_config("train", ["optimizer=fast"])
    assert config.trainer.max_steps == config.schedule.steps <= 60
    assert config.schedule.decay == "cosine"
    assert config.optimizer.lr > 1e-3
    config, _ = compose_config("train", ["optimizer=fast", "optimizer.lr=0.5", "trainer.max_steps=9"])
    assert (config.optimizer.lr, config.trainer.max_steps) == (0.5, 9)


def test_the_number_of_batches_follows_the_number_of_steps() -> None:
    config, _ = compose_config("train", ["trainer.max_steps=7"])
    assert config.trainer.limit_train_batches == 7


def test_a_composed_config_takes_no_new_keys() -> None:
    config, _ = compose_config("train", [])
    with pytest.raises(Exception, match="struct"):
        config.sede = 1


# Checking


def test_what_must_be_given_is_named() -> None:
    config, _ = compose_config("train", ["suite=folder"])
    with pytest.raises(ConfigError, match=r"^unset: suite\.root\. Give a value on the command line: suite\.root=…$"):
        check_complete(config)
    check_complete(compose_config("train", ["suite=folder", "suite.root=x"])[0])


def test_everything_that_must_be_given_is_named_at_once() -> None:
    config, _ = compose_config("finetune", [])
    with pytest.raises(ConfigError, match=r"unset: data\.root, model\.arch, model\.pretrained, output\."):
        check_complete(config)


def test_the_cache_is_the_options_or_the_environments_or_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = compose_config("train", [])
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    assert cache_dir(config) == tmp_path
    assert cache_dir(compose_config("train", ["paths.cache_dir=/elsewhere"])[0]) == Path("/elsewhere")
    monkeypatch.delenv("ADAMERGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir(config).name == "adamerge"


# Resuming

GIVEN = [
    "method=adamerging_taskwise",
    "suite=folder",
    "suite.root=/data/my suite",
    "optimizer.lr=0.002",
    "data.task_weights={a: 2.0}",
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder as ``save_config`` leaves it, with the overrides that Hydra's command line would have recorded."""
    config, _ = compose_config("train", GIVEN)
    save_config(config, tmp_path)
    assert (tmp_path / OVERRIDES_FILE).is_file()
    return tmp_path


def test_the_saved_configuration_is_the_composed_one(tmp_path: Path) -> None:
    config, _ = compose_config("train", GIVEN)
    save_config(config, tmp_path)
    assert OmegaConf.load(tmp_path / CONFIG_FILE) == config
    assert yaml.safe_load((tmp_path / OVERRIDES_FILE).read_text(encoding="utf-8")) == GIVEN


def test_a_resumed_run_gets_its_own_options(run_dir: Path) -> None:
    arguments = resume_arguments([f"resume={run_dir}"])
    assert arguments[: len(GIVEN)] == GIVEN
    config, folder = compose_config("train", arguments)
    assert config.resume == str(run_dir)
    assert folder == run_dir
    assert config.suite.root == "/data/my suite"
    check_same(config, run_dir)


def test_a_run_resumed_twice_is_the_same(run_dir: Path) -> None:
    first = resume_arguments([f"resume={run_dir}"])
    config, _ = compose_config("train", first)
    save_config(config, run_dir)
    check_same(compose_config("train", resume_arguments([f"resume={run_dir}"]))[0], run_dir)


@pytest.mark.parametrize(
    "name", ["a b", "it's", "a=b", "x,y", "(1)", "[1]", "{1}", "100%", "dé", "back\\slash", "$HOME"]
)
def test_any_folder_name_can_be_resumed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    config, _ = compose_config("train", [])
    save_config(config, folder)
    resumed, found = compose_config("train", resume_arguments([f"resume={folder}"]))
    assert resumed.resume == str(folder)
    assert found == folder


@pytest.mark.parametrize(
    "same",
    [
        "optimizer.lr=0.002",
        "optimizer.lr=2e-3",
        "optimizer.weight_decay=0",
        "seed=0",
        "method=adamerging_taskwise",
        "objective=entropy",
        "suite.root='/data/my suite'",
        "data.task_weights={a:2.0}",
        "suite.tasks=null",
        "data.fuse_tasks='auto'",
        "++seed=0",
        "hydra.job.chdir=false",
    ],
)
def test_an_option_that_says_the_same_may_be_repeated(run_dir: Path, same: str) -> None:
    assert resume_arguments([f"resume={run_dir}", same])


@pytest.mark.parametrize(
    "other",
    [
        "optimizer.lr=0.001",
        "seed=1",
        "method=adamerging_layerwise",
        "suite.root=elsewhere",
        "data.fuse_tasks=false",
        "trainer.max_steps=600",
        "data.task_weights={a: 3.0}",
        "no.such.key=1",
    ],
)
def test_an_option_that_differs_is_refused(run_dir: Path, other: str) -> None:
    with pytest.raises(ConfigError, match="a resumed run keeps its options") as found:
        resume_arguments([f"resume={run_dir}", other])
    assert other.split("=")[0] in str(found.value)
    assert str(run_dir) in str(found.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run to resume: .*\.yaml is missing"):
        resume_arguments([f"resume={tmp_path}"])


def test_an_option_that_cannot_be_parsed_is_refused_with_a_message(run_dir: Path) -> None:
    with pytest.raises((ConfigError, HydraException), match=r"\[a"):
        resume_arguments([f"resume={run_dir}", "suite.tasks=[a"])


def test_a_run_of_another_version_is_not_continued(run_dir: Path) -> None:
    config, _ = compose_config("train", [*GIVEN, "data.batches_per_step=3"])
    with pytest.raises(ConfigError, match=r"differs from today's in data\.batches_per_step"):
        check_same(config, run_dir)


class TestSettle:
    """``auto`` is what the machine has, once, and then stands in the run's folder."""

    def settled(self, *overrides: str, run_dir: Path | None = None, learned: bool = True) -> tuple[str, str]:
        config, _ = compose_config("train", ["trainer.accelerator=cpu", *overrides])
        settle(config, run_dir, learned=learned)
        return config.trainer.precision, config.bank.dtype

    @pytest.fixture
    def features(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
        found: dict[str, bool] = {}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
        monkeypatch.setattr(lightning, "made_by_intel", lambda: False)
        return found

    def test_float32_without_bf16_units(self, features: dict[str, bool]) -> None:
        assert self.settled() == ("32-true", "float32")

    def test_bf16_with_them(self, features: dict[str, bool]) -> None:
        features["avx512_bf16"] = True
        assert self.settled() == ("bf16-mixed", "bfloat16")

    def test_float32_where_bf16_units_are_slow(
        self, features: dict[str, bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lightning, "made_by_intel", lambda: True)
        features["avx512_bf16"] = True
        assert self.settled() == ("32-true", "float32")
        features["amx_bf16"] = True
        assert self.settled() == ("bf16-mixed", "bfloat16")

    def test_static_merges_keep_float32_task_vectors(self, features: dict[str, bool]) -> None:
        features["amx_bf16"] = True
        assert self.settled(learned=False) == ("bf16-mixed", "float32")

    def test_what_is_named_stays(self, features: dict[str, bool]) -> None:
        features["avx512_bf16"] = True
        assert self.settled("trainer.precision=32-true") == ("32-true", "float32")
        assert self.settled("bank.dtype=int8") == ("bf16-mixed", "int8")

    def test_a_resumed_run_keeps_what_it_had(self, features: dict[str, bool], tmp_path: Path) -> None:
        config, _ = compose_config("train", ["trainer.accelerator=cpu"])
        settle(config, tmp_path, learned=True)
        save_config(config, tmp_path)
        features["avx512_bf16"] = True
        assert self.settled(f"resume={tmp_path}", run_dir=tmp_path) == ("32-true", "float32")
