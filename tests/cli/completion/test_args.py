"""`multilora completion`: its arguments."""

import pytest

from multilora.cli import parser as cli
from multilora.cli.completion.args import SHELLS, CompletionArgs
from multilora.errors import ConfigError


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell(shell: str) -> None:
    assert cli.parse(["completion", shell]) == CompletionArgs("completion", shell)


def test_another_shell_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="invalid choice: 'fish'"):
        cli.parse(["completion", "fish"])
