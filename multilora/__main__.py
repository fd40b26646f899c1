"""`multilora` and `python -m multilora`: `serve`, and `adapters` for a look at one of them. Exit code 2 when the
arguments are wrong.

Heavy libraries are imported only once there is something to do.
"""

import sys
from collections.abc import Sequence

from multilora import logs
from multilora.cli import parser as cli
from multilora.errors import ConfigError, ModelUnsupported


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = cli.parse(sys.argv[1:] if argv is None else argv)
        logs.setup(args.log_level, role="front")
        if isinstance(args, cli.AdapterArgs):
            from multilora.cli.adapter_commands import run

            return run(args)
        config = args.config()
    except (ConfigError, ModelUnsupported) as e:
        sys.stderr.write(f"multilora: error: {e}\n")
        return 2
    from multilora.server.serve import serve

    return serve(config)


if __name__ == "__main__":
    sys.exit(main())
