"""`multilora` and `python -m multilora`: `serve`, `cluster`, `demo`, `doctor`, `plan`, `adapters` for work on
adapters, `keys` to make keys and `completion` for shells. The exit code is 2 if the arguments are wrong.

Heavy libraries are imported only by the command that needs them.
"""

import sys
from collections.abc import Sequence

from multilora import logs
from multilora.cli import parser as cli
from multilora.errors import ConfigError, ModelUnsupported, OutOfMemory
from multilora.private_directory import end_process


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of `sys.argv`, and return its exit code."""
    try:
        args = cli.parse(sys.argv[1:] if argv is None else argv)
        logs.setup(args.log_level, role="front", form=args.log_format)
        if not isinstance(args, cli.ServeArgs):
            return _run(args)
        config = args.config()
    except (ConfigError, ModelUnsupported, OutOfMemory) as e:
        sys.stderr.write(f"multilora: error: {e}\n")
        return 2
    from multilora.server.serve import serve

    code = serve(config)
    if argv is None:  # it is this process's own command, so nothing comes after it
        end_process(code)
    return code


def _run(args: cli.OtherArgs) -> int:
    """Run a command that is not `serve`."""
    if isinstance(args, cli.AdapterArgs):
        from multilora.cli import adapter_commands

        return adapter_commands.run(args)
    if isinstance(args, cli.AdapterWorkArgs):
        from multilora.cli import adapter_work_commands

        return adapter_work_commands.run(args)
    if isinstance(args, cli.KeyArgs):
        from multilora.cli import key_commands

        return key_commands.run(args)
    if isinstance(args, cli.DoctorArgs):
        from multilora.cli.doctor import command as doctor

        return doctor.run(args)
    if isinstance(args, cli.CompletionArgs):
        from multilora.cli.completion import command as completion

        return completion.run(args)
    if isinstance(args, cli.PlanArgs):
        from multilora.cli.plan import command as plan

        return plan.run(args)
    if isinstance(args, cli.ClusterArgs):
        from multilora.cli.cluster import command as cluster

        return cluster.run(args)
    from multilora.cli.demo import command as demo

    return demo.run(args)


if __name__ == "__main__":
    sys.exit(main())
