"""The command line: options, subcommands, and the flags of other servers that are accepted."""
