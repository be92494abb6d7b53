"""The one exception that this library raises for input it cannot use, and those that are no input's fault."""

import torch

# What a device says of itself, and not of what it was given.
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)


class PTQError(ValueError):
    """Bad input: the message names the value, the rule it breaks and the way out."""


class NoValidationImages(PTQError):
    """The folder of validation images is missing, which what needs calibration images only goes without."""
