"""`multilora` and `python -m multilora`: `serve`, `demo`, `adapters` to examine one adapter, and `keys` to make keys.
The exit code is 2 if the arguments are wrong.

Heavy libraries are imported only by the command that needs them.
"""

import sys
from collections.abc import Sequence

from multilora import logs
from multilora.cli import parser as cli
from multilora.errors import ConfigError, ModelUnsupported
from multilora.private_directory import end_process


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of `sys.argv`, and return its exit code."""
    try:
        args = cli.parse(sys.argv[1:] if argv is None else argv)
        logs.setup(args.log_level, role="front", form=args.log_format)
        if isinstance(args, cli.AdapterArgs):
            from multilora.cli.adapter_commands import run

            return run(args)
        if isinstance(args, cli.KeyArgs):
            from multilora.cli import key_commands

            return key_commands.run(args)
        if isinstance(args, cli.DemoArgs):
            from multilora.cli.demo import command

            return command.run()
        config = args.config()
    except (ConfigError, ModelUnsupported) as e:
        sys.stderr.write(f"multilora: error: {e}\n")
        return 2
    from multilora.server.serve import serve

    code = serve(config)
    if argv is None:  # it is this process's own command, so nothing comes after it
        end_process(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
