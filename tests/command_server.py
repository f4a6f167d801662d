"""Runs command lines in forks of one process that has the libraries imported, so that a test costs no import.

Reads one JSON object a line: ``{"arguments", "cwd", "stdout", "stderr"}``; answers with the exit code.
"""

import json
import os
import sys


def main() -> None:
    import datasets  # noqa: F401
    import hydra  # noqa: F401
    import open_clip  # noqa: F401

    import adamerge.cli.job  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _serve(request)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _serve(request: dict) -> None:
    from adamerge.cli import main

    os.chdir(request["cwd"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["adamerge", *request["arguments"]]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
