"""The `recattn` command: one module per sub-command, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model on a real log, fused and eager side by side",
    "bench": "time operators against eager, torch.compile and installed libraries",
    "profile": "time and memory as the history grows",
    "inspect": "what the kernels compile to, for GPUs that need not be there",
    "doctor": "what is installed here, what runs on it, and what is wrong",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `recattn COMMAND ...`; returns the exit status.

    Each command's module has `add_arguments(parser)` and `run(args) -> int`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="recattn", description="Fused attention for ranking models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked_for = next((word for word in argv if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == asked_for:
            module = importlib.import_module(f"recattn.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, TypeError, FileNotFoundError, RuntimeError) as error:
        print(f"recattn {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
