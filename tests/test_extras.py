"""A command whose libraries are not installed says how to install them."""

from __future__ import annotations

import pytest

from offmoe.errors import ConfigError
from offmoe.extras import require


def test_what_is_missing_is_named_with_the_command() -> None:
    require("serve", "offmoe serve", "json")
    with pytest.raises(ConfigError, match=r"needs no_such_module, .* pip install 'offmoe\[serve\]'"):
        require("serve", "offmoe serve", "json", "no_such_module")
