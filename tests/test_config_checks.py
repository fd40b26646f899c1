import pytest

from multilora.config import Config
from multilora.errors import ConfigError


def test_the_smallest_match_is_not_longer_than_the_longest():
    assert Config.make(speculative_algorithm="NGRAM").speculative_algorithm == "ngram"  # as SGLang writes it
    with pytest.raises(
        ConfigError, match=r"min-match-window-size \(5\) must be at most .*max-match-window-size \(4\)"
    ):
        Config(speculative_ngram_min_match_window_size=5, speculative_ngram_max_match_window_size=4)


def test_algorithms_that_are_not_there_are_refused_by_name():
    with pytest.raises(ConfigError, match="--speculative-algorithm must be one of ngram, is 'eagle3'"):
        Config.make(speculative_algorithm="EAGLE3")
