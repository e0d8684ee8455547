"""trt-serve: parse, serve; no logic."""

__all__ = ["main"]

import argparse
import sys
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import Parser, option_type, parse_bytes, run
from sdxl_trt.server.options import Options, read_keys

PROVIDERS = ("auto", "ort-cpu", "ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx", "openvino")
APIS = {"openai": "openai", "a1111": "a1111", "comfy": "comfyui", "comfyui": "comfyui"}
_OF_RAY = ("ray", "ray_layout", "ray_devices", "ray_address", "ray_seconds", "prompts", "out")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(argv: list[str] | None = None) -> int:
    """Run trt-serve and return its exit code."""
    return run(_parser(), _serve, argv)


def _serve(arguments: argparse.Namespace) -> None:
    options = options_of(arguments)
    _check_ray(arguments)
    if arguments.prompts is None:
        _warn(options)
    if arguments.ray:
        _serve_by_ray(arguments, options)
        return
    try:
        from sdxl_trt.server.app import create_app  # noqa: PLC0415 - --help must not wait for it
        from sdxl_trt.server.running import serve  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        raise UsageError(f"{exc.name} is missing; install it with: pip install 'sdxl-trt[server]'") from exc
    serve(create_app(options), options)


def _check_ray(arguments: argparse.Namespace) -> None:
    """Raise UsageError for options of Ray without it, and for a list of prompts without a folder."""
    if not arguments.ray:
        if arguments.prompts is not None:
            raise UsageError(f"--prompts: trt-serve draws lists with --ray; without it: trt-generate --prompts"
                             f" {arguments.prompts}")  # fmt: skip
        given = [name for name in _OF_RAY[1:] if getattr(arguments, name) not in (None, "auto")]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} goes with --ray; give both or none")
    elif (arguments.prompts is None) != (arguments.out is None):
        raise UsageError("--prompts FILE and --out DIR go together; give both or none")


def _serve_by_ray(arguments: argparse.Namespace, options: Options) -> None:
    try:
        from sdxl_trt.server.app import create_app, open_engines  # noqa: PLC0415
        from sdxl_trt.server.comfyui import run_graph  # noqa: PLC0415
        from sdxl_trt.server.ray import Cluster, Parts, serve_by_ray  # noqa: PLC0415
        from sdxl_trt.server.ray.lists import draw_list  # noqa: PLC0415

        cluster = Cluster(arguments.ray_layout, arguments.ray_devices, arguments.ray_address, arguments.ray_seconds)
        if arguments.prompts is not None:
            draw_list(options, cluster, arguments.prompts, arguments.out, open_engines)
        else:
            serve_by_ray(options, cluster, Parts(create_app, open_engines, run_graph))
    except ModuleNotFoundError as exc:
        raise UsageError(f"{exc.name} is missing; install it with: pip install 'sdxl-trt[server,ray]'") from exc


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the options that a command line states; raises UsageError for a key file or folder that is none."""
    stated = {name: value for name, value in vars(arguments).items() if name not in ("api_key_file", "debug", *_OF_RAY)}
    for name in ("lora_dir", "embedding_dir"):
        folder = stated[name]
        if folder is not None and not folder.is_dir():
            raise UsageError(f"--{name.replace('_', '-')} {folder}: is not a folder; give the one that holds the files")
    if arguments.api_key_file is not None:
        stated["keys"] = read_keys(arguments.api_key_file)
    for name in ("open_apis", "cors_origins", "allowed_hosts"):
        stated[name] = frozenset(stated[name])
    for name in ("aliases", "trusted_proxies"):
        stated[name] = tuple(stated[name])
    return Options(**stated)


def _warn(options: Options) -> None:
    if options.host not in _LOOPBACK and not options.keys:
        sys.stderr.write("note: whoever reaches this port may draw; --api-key-file FILE asks for a key\n")


def _parser() -> Parser:
    parser = Parser(prog="trt-serve", description="Serve pictures to the clients of OpenAI, AUTOMATIC1111 and ComfyUI.")
    parser.add_argument("engines", nargs="?", type=Path, metavar="BUNDLE", help="exported folder (default: the embedded"
                        " pair)")  # fmt: skip
    _add_network(parser.add_argument_group("network"))
    _add_limits(parser.add_argument_group("limits"))
    _add_drawing(parser.add_argument_group("drawing"))
    _add_apis(parser.add_argument_group("APIs"))
    _add_ray(parser.add_argument_group("several devices, with Ray (the extra [ray])"))
    parser.add_argument("--debug", action="store_true", help="add the traceback to an error that ends the server")
    return parser


def _add_network(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=option_type(_port), default=8188, help="port, 0 for a free one (default:"
                       " %(default)s)")  # fmt: skip
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that are accepted, one a line (default:"
                       " none is asked for)")  # fmt: skip
    group.add_argument("--open", dest="open_apis", type=option_type(_apis), default=(), metavar="API,…",
                       help="APIs that need no key all the same: openai, a1111, comfy")  # fmt: skip
    group.add_argument("--cors-origin", dest="cors_origins", type=option_type(_origin), action="append", default=[],
                       metavar="ORIGIN", help="a web page's origin that may use the server; repeatable")  # fmt: skip
    group.add_argument("--allowed-hosts", type=_listed, default=(), metavar="NAME,…", help="names by which clients may"
                       " call the server (default: on a loopback address loopback names, else any)")  # fmt: skip
    group.add_argument("--trusted-proxy", dest="trusted_proxies", type=option_type(_network), action="append",
                       default=[], metavar="ADDRESS", help="a proxy whose X-Forwarded-For says who calls: an address or"
                       " a network such as 10.0.0.0/8; repeatable")  # fmt: skip
    group.add_argument("--metrics-port", type=option_type(_port), metavar="PORT", help="serve /metrics on this port,"
                       " without a key, and not on the other")  # fmt: skip
    group.add_argument("--traces", action="store_true", help="send OpenTelemetry spans; the variables OTEL_… say where"
                       " to (needs the extra otel)")  # fmt: skip
    group.add_argument("--no-docs", dest="docs", action="store_false", help="do not serve /docs and /openapi.json")


def _add_limits(group: Any) -> None:
    counts, seconds = option_type(_count), option_type(_seconds)
    sizes = option_type(parse_bytes)
    group.add_argument("--queue", type=counts, default=32, metavar="N", help="requests that may wait (default: 32)")
    group.add_argument("--queue-pictures", type=counts, default=128, metavar="N", help="pictures that may wait"
                       " (default: 128)")  # fmt: skip
    group.add_argument("--deadline", type=seconds, default=600.0, metavar="S", help="seconds within which a request"
                       " must be drawn (default: 600)")  # fmt: skip
    group.add_argument("--grace", type=seconds, default=60.0, metavar="S", help="seconds that running requests have"
                       " after SIGTERM (default: 60)")  # fmt: skip
    group.add_argument("--max-body", type=sizes, default=32 << 20, metavar="SIZE", help="longest body (default: 32MiB)")
    group.add_argument("--max-pixels", type=counts, default=1 << 24, metavar="N", help="most pixels of a picture that"
                       " is sent (default: 16777216)")  # fmt: skip
    group.add_argument("--rate-requests", type=counts, metavar="N", help="requests that one key may send a minute"
                       " (default: any number)")  # fmt: skip
    group.add_argument("--rate-seconds", type=seconds, metavar="S", help="predicted seconds of drawing that one key may"
                       " ask for a minute (default: any)")  # fmt: skip
    group.add_argument("--on-disconnect", choices=("cancel", "finish", "finish-if-started"), help="what becomes of a"
                       " request whose client left (default: cancel; ComfyUI's jobs finish)")  # fmt: skip


def _add_drawing(group: Any) -> None:
    group.add_argument("--provider", choices=PROVIDERS, default="auto", help="what runs the graphs")
    group.add_argument("--compute-precision", choices=("auto", "fp32", "bf16"), default="auto",
                       help="what openvino computes in (default: bf16 where the CPU has it)")  # fmt: skip
    group.add_argument("--residency", choices=("auto", "resident", "swap", "stream"), default="auto",
                       help="what is in memory at once; see trt-generate --help")  # fmt: skip
    group.add_argument("--vram", type=option_type(parse_bytes), metavar="SIZE", help="limit memory to 12GB, 16GiB, …")
    group.add_argument("--fixed-batch", action="store_true", help="always draw with full batches: the same bits, alone"
                       " or with others")  # fmt: skip
    group.add_argument("--lora-dir", type=Path, metavar="DIR", help="folder of the LoRAs that requests may name")
    group.add_argument("--embedding-dir", type=Path, metavar="DIR", help="folder of the embeddings that prompts may"
                       " name")  # fmt: skip


def _add_apis(group: Any) -> None:
    group.add_argument("--alias", dest="aliases", action="append", default=[], metavar="NAME", help="another name of"
                       " the model; repeatable")  # fmt: skip
    group.add_argument("--quality-steps", type=option_type(_qualities), default=Options().quality_steps,
                       metavar="NAME=FACTOR,…", help="OpenAI: how many times the usual steps a quality takes (default:"
                       " low=0.5,medium=1,high=1.5,…)")  # fmt: skip
    group.add_argument("--lenient", action="store_true", help="OpenAI: warn of unknown fields rather than refuse them")
    group.add_argument("--round-sizes", action="store_true", help="AUTOMATIC1111: round sizes down to what the models"
                       " take")  # fmt: skip
    group.add_argument("--allow-options", action="store_true", help="AUTOMATIC1111: let clients change options")
    group.add_argument("--interrupt", dest="interrupt_all", type=option_type(_interrupts), default=False,
                       metavar="own|all", help="whose job an interrupt without an id stops (default: own)")  # fmt: skip
    group.add_argument("--previews", action="store_true", help="ComfyUI: send previews to clients that did not ask")


def _add_ray(group: Any) -> None:
    group.add_argument("--ray", action="store_true", help="draw on the devices of a Ray cluster")
    group.add_argument("--ray-layout", choices=("auto", "split", "together"), default="auto", help="give base and"
                       " refiner devices of their own, or each device both (default: what draws more)")  # fmt: skip
    group.add_argument("--ray-devices", type=option_type(_count), metavar="N", help="devices to use (default: the"
                       " cluster's GPUs)")  # fmt: skip
    group.add_argument("--ray-address", metavar="ADDRESS", help="a cluster that runs, or auto (default: start one"
                       " here)")  # fmt: skip
    group.add_argument("--ray-seconds", metavar="B,R,D,S", help="seconds of a picture's base steps, refiner steps and"
                       " decoding, and of a change of UNets, for --ray-layout auto")  # fmt: skip
    group.add_argument("--prompts", type=Path, metavar="FILE", help="draw a list and end: one prompt a line, or JSON")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder of the list's pictures; what is there stays")


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _count(text: str) -> int:
    return _whole(text, 1, 1 << 40)


def _whole(text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text[:20]) <= most:
        raise UsageError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 86400:
        raise UsageError(f"{text!r} is not a number of seconds above 0, at most 86400")
    return seconds


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _apis(text: str) -> tuple[str, ...]:
    if unknown := [name for name in _listed(text) if name not in APIS]:
        raise UsageError(f"{unknown[0]!r} is no API; give some of openai, a1111, comfy")
    return tuple(APIS[name] for name in _listed(text))


def _origin(text: str) -> str:
    scheme, found, host = text.partition("://")
    if scheme not in ("http", "https") or not found or not host or "/" in host or "*" in host:
        raise UsageError(f"{text!r} is not an origin; give one like https://example.org")
    return text


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text, strict=False)
    except ValueError as exc:
        raise UsageError(f"{text!r} is no address; give one like 10.0.0.2 or 10.0.0.0/8") from exc


def _qualities(text: str) -> dict[str, float]:
    factors = dict(Options().quality_steps)
    for word in _listed(text):
        name, _, factor = word.partition("=")
        if name not in (*factors, "auto", "standard"):
            raise UsageError(f"{name!r} is no quality; give some of {', '.join(factors)}, auto, standard")
        try:
            factors[name] = float(factor)
        except ValueError:
            factors[name] = 0.0
        if not 0 < factors[name] <= 10:
            raise UsageError(f"{word!r}: give a factor above 0, at most 10, such as {name}=0.5")
    return factors


def _interrupts(text: str) -> bool:
    if text not in ("own", "all"):
        raise UsageError(f"{text!r} is neither own nor all")
    return text == "all"


if __name__ == "__main__":
    sys.exit(main())
