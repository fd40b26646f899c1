"""What a drop-in server must answer, one statement after the other, each with a check of its own.

A module for each part of the contract has a `Section`; a check is a function below it whose docstring is the
statement. `tests/server/test_contract.py` runs them all. A check that names `server` speaks HTTP to one real server
process (`contract.world`), which it leaves as it found it. The others need none: they parse a command line, or give
an application with a fake engine the flags that the shared server cannot have (keys, LoRA off).
"""
