"""Libraries of optional features: asked for before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec

from offmoe.errors import ConfigError


def require(extra: str, use: str, *modules: str, python: str = "") -> None:
    """Refuse a command whose libraries are not installed.

    Args:
        extra: The extra of the package that installs them.
        use: What needs them, as the message begins.
        modules: Names of their modules.
        python: What the extra asks of Python; "" for nothing.

    Raises:
        ConfigError: One of them is not installed; the message has the command that installs it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise ConfigError(
                f"{use} needs {module}, which is not installed;{python} install it with: pip install 'offmoe[{extra}]'"
            )
