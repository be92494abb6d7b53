"""The one exception that this library raises for input it cannot use."""


class PTQError(ValueError):
    """Bad input: the message names the value, the rule it breaks and the way out."""
