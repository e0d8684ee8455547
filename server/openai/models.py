"""The names by which clients ask for the bundle that is served."""

__all__ = ["ModelNames"]

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from sdxl_trt.server.http import ApiError
from sdxl_trt.server.options import Options

EMBEDDED = "sdxl-trt-embedded"
USUAL = ("gpt-image-*", "chatgpt-image-*", "dall-e-*")
"""What LibreChat, LangChain and Open WebUI send unless they are told otherwise."""
_LISTED = ("gpt-image-1", "dall-e-3", "dall-e-2")
"""Names that the patterns above match, for clients that offer what is listed."""


@dataclass(frozen=True)
class ModelNames:
    """The bundle's own name, and the `aliases` that mean it too; an alias may have `*` in it."""

    own: str
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, options: Options, folder: Path) -> "ModelNames":
        """Return the names of the bundle in `folder`: its own, `--alias`, and what clients send by default."""
        own = EMBEDDED if options.engines is None else folder.name
        return cls(own or EMBEDDED, (*options.aliases, *USUAL))

    def check(self, model: str | None) -> str:
        """Return `model`, or the bundle's own name for None. Raises ApiError (404) for a name of another model."""
        if model is None:
            return self.own
        if model == self.own or any(fnmatchcase(model, alias) for alias in self.aliases):
            return model
        raise ApiError(404, f"model: there is no model of this name here; the model is {self.own!r}", "model_not_found",
                       param="model")  # fmt: skip

    def listed(self) -> Iterator[str]:
        """Yield the names to list: the bundle's own first, then the aliases."""
        yield from dict.fromkeys((self.own, *(alias for alias in self.aliases if "*" not in alias), *_LISTED))
