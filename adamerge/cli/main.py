"""From arguments to a subcommand, and from an error to one message."""

import os
import sys
from collections.abc import Callable, Sequence

from adamerge.errors import AdamergeError

USAGE = """usage: adamerge [train] [group=option] [key=value] …    learn coefficients, merge, report, export
       adamerge evaluate checkpoint=DIR [suite=…]        score a merged checkpoint
       adamerge finetune data=DIR …                      make an expert from a pretrained CLIP and labelled images
       adamerge methods | suites                         what there is
       adamerge inspect FILE|DIR                         what a checkpoint or a coefficients file holds

Example: adamerge method=adamerging_layerwise suite=folder suite.root=my_suite
`adamerge --cfg job` prints the composed configuration, `adamerge --hydra-help` Hydra's own options (-m sweeps)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; a first word without ``=`` names it, ``train`` is the default. Exits with 1 on an error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE + "\n")
        return
    named = bool(arguments) and "=" not in arguments[0] and not arguments[0].startswith(("-", "+", "~"))
    command = arguments.pop(0) if named else "train"
    try:
        _dispatch(command, arguments)
    except AdamergeError as error:
        _fail(type(error).__name__, str(error))
    except KeyboardInterrupt:
        _fail("Interrupted", "stopped by the user. If learning had begun, adamerge resume=RUN_DIR continues it.")
    except OSError as error:
        if os.environ.get("ADAMERGE_DEBUG"):
            raise
        place = f" {error.filename}" if error.filename else ""
        _fail("OSError", f"{error.strerror or error}:{place}. Check the path, its permissions and the free space.")


def _dispatch(command: str, arguments: list[str]) -> None:
    from adamerge.cli import commands

    plain: dict[str, Callable[[list[str]], None]] = {
        "methods": commands.list_methods,
        "suites": commands.list_suites,
        "inspect": commands.inspect,
    }
    configured = ("train", "evaluate", "finetune")
    if command in plain:
        plain[command](arguments)
    elif command in configured:
        _run_hydra(command, arguments)
    else:
        raise AdamergeError(f"unknown command '{command}'. Choose one of {', '.join(sorted([*plain, *configured]))}.")


def _run_hydra(command: str, arguments: list[str]) -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from adamerge.cli import commands, config

    # Hydra reads sys.argv, and so does Lightning when it starts the other processes of a distributed run.
    before = sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to `main`, which prints them its own way
    failures: list[Exception] = []

    def task(composed: DictConfig) -> None:
        try:
            getattr(commands, command)(composed)
        except (AdamergeError, OSError) as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the launcher must know that this job failed
            failures.append(error)  # past Hydra, which would print its own line about it

    try:
        if any(argument.startswith("resume=") and argument != "resume=null" for argument in arguments):
            arguments = config.resume_arguments(arguments)
        sys.argv = [sys.argv[0], *arguments]
        hydra.main(config_path=str(config.config_dir()), config_name=command, version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        causes, cause = [], error
        while cause is not None:
            causes.append(str(cause).partition("Config search path")[0].strip())
            cause = cause.__cause__
        raise AdamergeError("\n".join(dict.fromkeys(causes))) from error
    finally:
        GlobalHydra.instance().clear()
        sys.argv = before
    if failures:
        raise failures[0]


def _fail(kind: str, message: str) -> None:
    sys.stderr.write(f"{kind}: {message}\n")
    sys.exit(1)
