import pytest

from multilora.errors import ConfigError
from multilora.models.load import read_config


@pytest.mark.parametrize("path", ["/no/such/model", "./nothing", "../nothing"])
def test_a_path_that_is_no_directory_is_not_asked_of_the_hub(path):
    with pytest.raises(ConfigError, match="no such directory"):
        read_config(path)


def test_a_directory_without_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(str(tmp_path))
