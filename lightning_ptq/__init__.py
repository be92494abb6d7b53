"""Post-training quantization of vision networks as a LightningModule."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_ptq.public import *  # noqa: F403 (what type checkers see)

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        """Names come with the first that is asked for: torch and Lightning take seconds, and `--help` needs neither."""
        if name not in ("__all__", "__version__"):
            if name.startswith("__") or not name.isidentifier():  # what Python and its tools look for
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            if find_spec(f"{__name__}.{name}"):
                return import_module(f"{__name__}.{name}")
        public = import_module(f"{__name__}.public")
        globals().update({each: getattr(public, each) for each in (*public.__all__, "__all__", "__version__")})
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
