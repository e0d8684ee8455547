"""What a client asks for with POST /prompt, from its body to a job."""

__all__ = ["Prompt", "pictures_of", "read_prompt"]

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from sdxl_trt.server.comfyui.files import Files, Stored
from sdxl_trt.server.comfyui.names import named_in_graph
from sdxl_trt.server.comfyui.validation import Fault, PromptError
from sdxl_trt.server.http import ApiError

MOST_BYTES = 4 << 20
"""The bytes of a graph with what is said beside it: the history keeps them."""
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")
LOADERS = ("LoadImage", "LoadImageMask")


@dataclass(frozen=True)
class Prompt:
    """A request for pictures; `graph` and `extra` are the JSON that the history repeats."""

    id: str
    client_id: str | None
    nodes: Mapping[str, Any]
    graph: bytes
    extra: Mapping[str, Any]
    number: float | None
    wanted: Collection[str] | None

    @property
    def previews(self) -> bool:
        """Return whether its extra data asks for previews."""
        return self.extra.get("preview_method") not in (None, "", "none", "default")

    def extra_told(self, created: int) -> bytes:
        """Return what the history repeats of the extra data."""
        known = {key: value for key, value in self.extra.items() if key not in _SECRETS}
        client = {} if self.client_id is None else {"client_id": self.client_id}
        return json.dumps(known | client | {"create_time": created}).encode()


def read_prompt(body: Mapping[str, Any]) -> Prompt:
    """Return what a body asks for. Raises PromptError, and ApiError (413) for one that is too large to keep."""
    nodes = body.get("prompt")
    if not isinstance(nodes, dict) or not nodes:
        raise PromptError(Fault("no_prompt", "No prompt provided", "No prompt provided"))
    identity = body.get("prompt_id")
    if identity is None:
        identity = str(uuid4())
    elif not isinstance(identity, str) or not _UUID.fullmatch(identity):
        raise PromptError(Fault("invalid_prompt_id", "Prompt id is not a UUID in lower case with hyphens"))
    extra = body.get("extra_data")
    extra = extra if isinstance(extra, dict) else {}
    client = body.get("client_id", extra.get("client_id"))
    graph = json.dumps(nodes).encode()
    if len(graph) + len(json.dumps(extra)) > MOST_BYTES:
        raise ApiError(413, f"prompt: is larger than {MOST_BYTES >> 20} MiB", "body_too_large", param="prompt")
    targets = body.get("partial_execution_targets")
    wanted = frozenset(map(str, targets)) if isinstance(targets, list) else None
    return Prompt(identity, client[:128] if isinstance(client, str) else None, nodes, graph, extra,
                  _number(body), wanted)  # fmt: skip


def _number(body: Mapping[str, Any]) -> float | None:
    """Return the number that a client gives its job; turns are the desk's, whatever it is."""
    number = body.get("number")
    plain = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    return number if plain else None


def pictures_of(nodes: Mapping[str, Any], files: Files, who: str) -> dict[str, Stored]:
    """Return a client's pictures that a graph names, by these names; those that are not there are left out."""
    found: dict[str, Stored] = {}
    for node in nodes.values():
        name = node["inputs"].get("image") if node["class_type"] in LOADERS and "inputs" in node else None
        key = named_in_graph(name) if isinstance(name, str) else None
        stored = None if key is None else files.find(who, key)
        if stored is not None:
            found[str(name)] = stored
    return found
