"""What a config's mistake and its idle setting look like to the user, whatever the task."""

import logging

import pytest

from leakfree.errors import ConfigError


@pytest.fixture
def refused():
    """``refused(load, overrides, key, words)``: one line that names the key and says the words."""

    def check(load, overrides, key, words):
        with pytest.raises(ConfigError) as caught:
            load(*overrides)
        message = str(caught.value)
        assert f" {key}: " in message
        assert "\n" not in message
        assert all(word in message for word in words), message

    return check


@pytest.fixture
def warned(caplog):
    """``warned(load, overrides, key, words)``: one warning, the only one, that names the key and says the words."""

    def check(load, overrides, key, words):
        with caplog.at_level(logging.WARNING):
            load(*overrides)
        (record,) = caplog.records
        assert f" {key}: " in record.getMessage()
        assert words in record.getMessage()

    return check
