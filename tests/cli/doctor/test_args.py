"""The flags of `multilora doctor`."""

import pytest

from multilora.cli import parser as cli
from multilora.cli.doctor.args import DoctorArgs
from multilora.errors import ConfigError


def test_parsed():
    assert cli.parse(["doctor"]) == DoctorArgs("doctor")
    assert cli.parse(["doctor", "--json", "--model", "m"]) == DoctorArgs("doctor", "m", True)
    with pytest.raises(ConfigError, match="see multilora doctor --help"):
        cli.parse(["doctor", "--jsn"])
