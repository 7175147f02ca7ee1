"""Runs a command and turns whatever happens into a message and an exit code.

Errors of the tree in ``errors.py`` become ``error: ...`` with the remedy, anything else one line
and exit code 1; the trace only with ``--debug`` or log level debug. Secrets are masked in all of
it, the command line's own words included: what somebody typed in the wrong place may be one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from collections.abc import Sequence

import typer

from cdc_sync.cli.app import Invocation, app, config_app, dlq_app, verify_app
from cdc_sync.cli.baseline import baseline
from cdc_sync.cli.bench import bench
from cdc_sync.cli.check import check
from cdc_sync.cli.config_init import config_init
from cdc_sync.cli.config_reference import config_reference
from cdc_sync.cli.config_show import config_show
from cdc_sync.cli.demo import demo
from cdc_sync.cli.dlq import dlq_drop, dlq_list, dlq_retry, dlq_show
from cdc_sync.cli.migrate import migrate
from cdc_sync.cli.official import MigrateCommand
from cdc_sync.cli.options import SwitchCommand
from cdc_sync.cli.plan import plan
from cdc_sync.cli.rebuild import rebuild
from cdc_sync.cli.resync import resync
from cdc_sync.cli.run import run
from cdc_sync.cli.status import status
from cdc_sync.cli.uninstall import uninstall
from cdc_sync.cli.verify import verify_data
from cdc_sync.cli.verify_search import verify_search
from cdc_sync.cli.version import version
from cdc_sync.errors import CdcSyncError, ExitCode

_INTERRUPTED = 130

# The order is that of the help.
app.command(cls=SwitchCommand)(run)
app.command(cls=MigrateCommand, context_settings={"help_option_names": ["--help", "-h"]})(migrate)
app.command(cls=SwitchCommand)(plan)
app.command(cls=SwitchCommand)(resync)
app.command(cls=SwitchCommand)(rebuild)
app.command(cls=SwitchCommand)(baseline)
verify_app.command("data", cls=SwitchCommand)(verify_data)
verify_app.command("search", cls=SwitchCommand)(verify_search)
app.add_typer(verify_app, name="verify")
dlq_app.command("list", cls=SwitchCommand)(dlq_list)
dlq_app.command("show", cls=SwitchCommand)(dlq_show)
dlq_app.command("retry", cls=SwitchCommand)(dlq_retry)
dlq_app.command("drop", cls=SwitchCommand)(dlq_drop)
app.add_typer(dlq_app, name="dlq")
app.command(cls=SwitchCommand)(check)
app.command(cls=SwitchCommand)(bench)
app.command()(status)
app.command(cls=SwitchCommand)(uninstall)
app.command()(demo)
app.command()(version)
config_app.command("init")(config_init)
config_app.command("show", cls=SwitchCommand)(config_show)
config_app.command("reference")(config_reference)
app.add_typer(config_app, name="config")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``arguments`` default to ``sys.argv[1:]``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    invocation = Invocation(given)
    try:
        code = app(args=given, prog_name="cdc-sync", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
    except CdcSyncError as error:
        _trace(invocation)
        _say("error", error.message)
        _say("try", error.remedy)
        return error.policy.exit_code
    except typer.TyperException as error:
        return _usage_error(error)
    except (KeyboardInterrupt, typer.Abort):
        _say("error", "Interrupted.")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does. Python would complain at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except Exception as error:  # noqa: BLE001 - the outermost frame: reported, and exit code 1
        _trace(invocation)
        _say("error", f"Unexpected {type(error).__name__}: {error}")
        again = "Run again as cdc-sync --debug ..., and report the trace."
        _say("try", "Report this with the trace." if invocation.debug else again)
        return ExitCode.BUG
    return int(code or ExitCode.OK)


def _usage_error(error: typer.TyperException) -> int:
    _say("error", error.format_message())
    context = getattr(error, "ctx", None)
    path = context.command_path if isinstance(context, typer.Context) else "cdc-sync"
    _say("try", f"{path} --help")
    return error.exit_code


def _trace(invocation: Invocation) -> None:
    """Show the exception being handled, in debug mode."""
    if invocation.debug:
        import traceback

        _write(traceback.format_exc())


def _say(label: str, text: str) -> None:
    """Write ``label: text``; more lines of text are indented below it."""
    indent = " " * (len(label) + 2)
    _write(f"{label}: {textwrap.indent(text, indent).removeprefix(indent)}\n")


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads: the exit code still tells
        sys.stderr.write(_redact(text))
        sys.stderr.flush()


def _redact(text: str) -> str:
    from cdc_sync.ops.redaction import redact

    return redact(text)
