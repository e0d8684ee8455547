"""What the options of trt-serve state, once for every wing."""

__all__ = ["Disconnect", "Options", "read_keys"]

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import read_capped

KEYS_BYTES = 1 << 20

Disconnect = Literal["cancel", "finish", "finish-if-started"]


@dataclass(frozen=True)
class Options:
    """The options of trt-serve, checked by its command line; the defaults are its defaults.

    `engines` None is the embedded pair. Sizes are bytes, durations seconds. `keys` are the API keys that are accepted,
    none if authentication is off; `open_apis` take no key even so. `on_disconnect` None is each API's own default.
    """

    engines: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8188
    provider: str = "auto"
    compute_precision: str = "auto"
    residency: str = "auto"
    vram: int | None = None
    queue: int = 32
    queue_pictures: int = 128
    deadline: float = 600.0
    max_body: int = 32 << 20
    max_pixels: int = 1 << 24
    keys: frozenset[str] = frozenset()
    open_apis: frozenset[str] = frozenset()
    on_disconnect: Disconnect | None = None
    cors_origins: frozenset[str] = frozenset()
    allowed_hosts: frozenset[str] = frozenset()
    grace: float = 60.0
    fixed_batch: bool = False
    lora_dir: Path | None = None
    embedding_dir: Path | None = None
    aliases: tuple[str, ...] = ()
    lenient: bool = False
    round_sizes: bool = False
    allow_options: bool = False
    interrupt_all: bool = False
    previews: bool = False
    docs: bool = True
    metrics_port: int | None = None
    traces: bool = False
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()
    rate_requests: int | None = None
    """Requests a minute of one key, or peer without keys; None is no limit."""
    rate_seconds: float | None = None
    """Predicted seconds of the device a minute of one key; None is no limit."""
    quality_steps: dict[str, float] = field(
        default_factory=lambda: {"low": 0.5, "medium": 1.0, "high": 1.5, "hd": 1.5, "xhigh": 1.5, "max": 1.5}
    )
    """Factors of the usual number of steps for OpenAI's `quality`; others are 1."""

    def without_folders(self, message: str) -> str:
        """Return a message of the runtime without the folders of this machine that the options name."""
        for folder in (self.lora_dir, self.embedding_dir, self.engines):
            if folder is not None:
                message = message.replace(f"{folder}/", "").replace(str(folder), "the server's folder")
        return message


def read_keys(path: Path) -> frozenset[str]:
    """Return the keys of a file: one a line; empty lines and those that begin with # are none. Raises UsageError."""
    try:
        lines = read_capped(path, KEYS_BYTES, "--api-key-file").decode().splitlines()
    except UnicodeDecodeError as exc:
        raise UsageError(f"--api-key-file {path}: is not UTF-8 text; give one key a line") from exc
    keys = frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UsageError(f"--api-key-file {path}: has no key; write one a line")
    return keys
