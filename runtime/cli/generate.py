"""trt-generate: parse, call, report; no logic."""

__all__ = ["main"]

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import one_line, print_json, run
from sdxl_trt.runtime.cli.options import check_alone_with_workflow, expand_preset, make_parser, stated_settings

if TYPE_CHECKING:
    from sdxl_trt.engines.bundle import Bundle, Workload
    from sdxl_trt.runtime.cli.series import Series
    from sdxl_trt.runtime.comfyui import Workflow
    from sdxl_trt.runtime.images import InputMask, InputPicture, Picture
    from sdxl_trt.runtime.pipeline import Batch, Chain, Pipeline, Run
    from sdxl_trt.runtime.request import Request


def main(argv: list[str] | None = None) -> int:
    """Run trt-generate and return its exit code."""
    return run(make_parser(), lambda arguments: _run(arguments, argv), argv)


def _run(arguments: argparse.Namespace, argv: list[str] | None) -> None:
    if arguments.preset is not None:
        argv = expand_preset(arguments.preset, argv)
        arguments = make_parser().parse_args(argv)
    if arguments.source is not None:
        from sdxl_trt.runtime.cli.repeat import repeated  # noqa: PLC0415 - --help must not wait for it

        arguments = repeated(argv)
    if arguments.schema:
        print_json(_schema())
    elif arguments.plan:
        _plan(arguments)
    elif all(given is None for given in (arguments.prompt, arguments.prompts, arguments.workflow)):
        raise UsageError("a PROMPT is missing: say what the picture shows")
    else:
        _generate(arguments)


def _schema() -> dict[str, Any]:
    """Return the JSON schema of a request, of the settings that have an option."""
    import msgspec  # noqa: PLC0415

    from sdxl_trt.runtime.request import Request, record_fields, settings_of  # noqa: PLC0415

    stated = [each for name, each in settings_of(Request).items() if name == "prompt" or each.group]
    kind = msgspec.defstruct("Request", record_fields(stated), kw_only=True, forbid_unknown_fields=True)
    (schema,), definitions = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": definitions}


def _plan(arguments: argparse.Namespace) -> None:
    """Print the memory plan for this machine, or for a device of another size."""
    from sdxl_trt.runtime.cli.memory import estimate_run  # noqa: PLC0415
    from sdxl_trt.runtime.pipeline import find_bundle  # noqa: PLC0415

    bundle, from_image = find_bundle(arguments.engines), arguments.image is not None or arguments.refine is not None
    changed = _changed_by_loras(arguments, bundle)
    plan = estimate_run(bundle, arguments.provider, arguments.residency, arguments.vram, arguments.width,
                        arguments.height, workload=_workload(arguments, bundle, changed, from_image=from_image),
                        compute_precision=arguments.compute_precision)  # fmt: skip
    if arguments.json:
        import msgspec  # noqa: PLC0415

        print_json(msgspec.to_builtins(plan) | ({"changed_by_loras": changed} if changed else {}))
    else:
        lines = [*plan.lines(), *(_told_of_loras(plan.provider, name, size) for name, size in changed.items())]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    plan.check()


def _told_of_loras(provider: str, name: str, size: int) -> str:
    """Return what the LoRAs of a component take, of which they change `size` bytes."""
    from sdxl_trt.engines.host import format_bytes  # noqa: PLC0415

    if not provider.startswith("tensorrt"):
        what = "OpenVINO" if provider == "openvino" else "ONNX Runtime"
        return f"LoRAs change {format_bytes(size)} of {name}, which {what} holds a second time in host memory" + (
            " while it loads" if what == "ONNX Runtime" else ""
        )
    return f"LoRAs change {name}: its plan is one for LoRAs, with inputs for the largest rank that it takes"


def _changed_by_loras(arguments: argparse.Namespace, bundle: "Bundle") -> dict[str, int]:
    """Return the bytes of each component that the LoRAs of the command line and of its prompt change."""
    from sdxl_trt.runtime.adapters import tags_of  # noqa: PLC0415
    from sdxl_trt.runtime.cli.memory import changed_weights  # noqa: PLC0415
    from sdxl_trt.runtime.request import Request  # noqa: PLC0415

    request = Request(**stated_settings(arguments), lora_dir=arguments.lora_dir)
    prompts = (request.prompt, request.prompt_2 or "")
    if not (request.loras or request.refiner_loras or any(map(tags_of, prompts))):
        return {}
    return changed_weights(request, bundle)


def _workload(
    arguments: argparse.Namespace, bundle: "Bundle", changed: Iterable[str] = (), *, from_image: bool
) -> "Workload":
    """Return what memory is planned for; `changed` are the components that LoRAs change.

    A workflow names its ControlNets when it is compared with the bundle; a sweep loads what its variants need.
    """
    from dataclasses import replace  # noqa: PLC0415

    from sdxl_trt.runtime.request import Request, workload_of  # noqa: PLC0415

    request = Request(**stated_settings(arguments), refine=arguments.refine is not None)
    return replace(workload_of(request, bundle.manifest), from_image=from_image, adapted=(*changed,))


def _generate(arguments: argparse.Namespace) -> None:
    from sdxl_trt.engines.host import check_inputs  # noqa: PLC0415
    from sdxl_trt.runtime.cli.outputs import check_outputs, picture_files, save_latents  # noqa: PLC0415 - not for --help
    from sdxl_trt.runtime.cli.preview import Preview  # noqa: PLC0415
    from sdxl_trt.runtime.cli.progress import ProgressBar  # noqa: PLC0415
    from sdxl_trt.runtime.images import warn_of_another_bundle  # noqa: PLC0415
    from sdxl_trt.runtime.pipeline import find_bundle, open_bundle  # noqa: PLC0415

    started = time.perf_counter()
    check_outputs(arguments)
    check_inputs(arguments)
    if arguments.lora_dir is not None and not arguments.lora_dir.is_dir():
        raise UsageError(f"--lora-dir {arguments.lora_dir}: is not a folder; give the one that holds your LoRAs")
    asked = _request(arguments) if arguments.workflow is None else _workflow(arguments)
    bundle = find_bundle(arguments.engines)
    with open_bundle(
        bundle, provider=arguments.provider, residency=arguments.residency, available=arguments.vram,
        plan_for=_workload(arguments, bundle, from_image=_loads_image(asked)), once=True,
        compute_precision=arguments.compute_precision,
    ) as pipeline:  # fmt: skip
        if arguments.source is not None:
            warn_of_another_bundle(arguments.made_with, pipeline.manifest, arguments.recorded.computed,
                                   pipeline.pool.computes)  # fmt: skip
        batch, series = _work(asked, arguments, pipeline)
        places = picture_files(arguments.out, arguments.format, batch.runs, _prefixes(asked),
                               sheet=series.sweep is not None)  # fmt: skip
        files = places[0][0]
        if not arguments.json and pipeline.manifest.note:
            sys.stderr.write(f"note: {one_line(pipeline.manifest.note)}\n")
        images = []
        wanted = arguments.preview or arguments.preview_method is not None
        preview = Preview(files.preview if wanted else None, pipeline.pool.bundle, arguments.preview_method or "linear")
        with ProgressBar() as bar, preview:
            for number, step in batch.steps():
                bar.show(step.stage, step.index, step.total, step.seconds)
                preview.show(step)
                if step.picture is not None:
                    place, index = places[number]
                    path = place.save(step.picture, index, step.pictures.start, metadata=not arguments.no_metadata)
                    images.append(_image(step.picture, path) | series.told(number))
                    series.keep(number, step.picture)
        save_latents(arguments.save_latents, batch.runs[0])
        report = _report(pipeline, batch.runs, images, time.perf_counter() - started)
        report |= series.finish(files, batch.runs, metadata=not arguments.no_metadata)
    if arguments.json:
        print_json(report)
    else:
        _tell(report)


def _request(arguments: argparse.Namespace) -> "Request":
    from sdxl_trt.runtime.cli.outputs import load_latents  # noqa: PLC0415
    from sdxl_trt.runtime.request import Request  # noqa: PLC0415

    return Request(
        **stated_settings(arguments),
        latents=load_latents(arguments.latents),
        image=_image_given(arguments),
        embedding_dir=arguments.embedding_dir,
        lora_dir=arguments.lora_dir,
        mask=_mask_given(arguments),
        refine=arguments.refine is not None,
    )


def _image_given(arguments: argparse.Namespace) -> "InputPicture | None":
    from sdxl_trt.runtime.images import read_input  # noqa: PLC0415

    if arguments.refine is not None:
        return read_input(arguments.refine, "--refine")
    return None if arguments.image is None else read_input(arguments.image)


def _mask_given(arguments: argparse.Namespace) -> "InputMask | None":
    from sdxl_trt.runtime.images import read_mask  # noqa: PLC0415

    return None if arguments.mask is None else read_mask(arguments.mask)


def _workflow(arguments: argparse.Namespace) -> "Workflow":
    from sdxl_trt.runtime.comfyui import read_workflow  # noqa: PLC0415

    check_alone_with_workflow(arguments)
    return read_workflow(arguments.workflow)


def _loads_image(asked: "Request | Workflow") -> bool:
    from sdxl_trt.runtime.request import Request  # noqa: PLC0415

    return asked.image is not None if isinstance(asked, Request) else asked.loads_image


def _prefixes(asked: "Request | Workflow") -> list[str]:
    """Return what a workflow's pictures are called."""
    from sdxl_trt.runtime.request import Request  # noqa: PLC0415

    return [] if isinstance(asked, Request) else [output.prefix for output in asked.outputs]


def _work(
    asked: "Request | Workflow", arguments: argparse.Namespace, pipeline: "Pipeline"
) -> "tuple[Batch | Chain, Series]":
    """Return what draws the pictures, and what they are a series of."""
    from sdxl_trt.runtime.cli.repeat import check_embeddings, check_repeated  # noqa: PLC0415
    from sdxl_trt.runtime.cli.series import Series  # noqa: PLC0415
    from sdxl_trt.runtime.pipeline import Batch  # noqa: PLC0415
    from sdxl_trt.runtime.request import Request  # noqa: PLC0415

    if isinstance(asked, Request):
        series = Series(asked, arguments)
        batch = Batch(pipeline, series.requests)
        if arguments.source is not None:
            check_embeddings(arguments, batch)
        return batch, series
    work, series = _of_workflow(asked, arguments, pipeline)
    if arguments.source is not None:
        check_repeated(arguments, work)
    return work, series


def _of_workflow(
    asked: "Workflow", arguments: argparse.Namespace, pipeline: "Pipeline"
) -> "tuple[Batch | Chain, Series]":
    """Return what draws a workflow's pictures, and what they are a series of."""
    from sdxl_trt.runtime.cli.series import Series  # noqa: PLC0415
    from sdxl_trt.runtime.comfyui import LoraFiles, check_workflow, pair_request, settle_pair  # noqa: PLC0415
    from sdxl_trt.runtime.pipeline import Batch, Chain  # noqa: PLC0415

    folder = arguments.workflow.parent
    files = LoraFiles(arguments.lora_dir, getattr(arguments, "lora_files", {}))
    found = check_workflow(asked, pipeline.manifest, files)
    request = pair_request(asked, pipeline.manifest, found, folder, files)
    seed_given = arguments.seed is not None
    if request is None:
        _check_chain(arguments)
        chain = Chain(pipeline, asked, found, folder, lambda one: _changed(one, arguments), files,
                      seed_given=seed_given)  # fmt: skip
        return chain, Series(chain.runs[0].asked, arguments)
    changed = _changed(request, arguments)
    settle_pair(changed, asked, pipeline.manifest, pipeline.pool.limits, pipeline.pool.bundle, seed_given=seed_given)
    series = Series(changed, arguments)
    return Batch(pipeline, series.requests), series


def _changed(request: "Request", arguments: argparse.Namespace) -> "Request":
    """Return a workflow's request with what is given beside the workflow."""
    from dataclasses import replace  # noqa: PLC0415

    from sdxl_trt.runtime.cli.outputs import load_latents  # noqa: PLC0415
    from sdxl_trt.runtime.comfyui import with_seed  # noqa: PLC0415
    from sdxl_trt.runtime.request import Request, settings_of  # noqa: PLC0415

    if arguments.seed is not None:
        request = with_seed(request, arguments.seed)
    beside = {name: value for name, value in stated_settings(arguments).items()
              if settings_of(Request)[name].workflow == "beside"}  # fmt: skip
    beside["tile"] |= request.tile
    files = {"latents": load_latents(arguments.latents), "embedding_dir": arguments.embedding_dir}
    return replace(request, **beside, **files)


def _check_chain(arguments: argparse.Namespace) -> None:
    """Raise UsageError for an option that needs a single run, beside a workflow that takes several."""
    from sdxl_trt.runtime.request import Request, settings_of  # noqa: PLC0415

    given = [each.word for name, each in settings_of(Request).items()
             if not each.several_runs and not each.is_default(getattr(arguments, name))]  # fmt: skip
    given += [option for option, value in (("--sweep", arguments.sweep), ("--save-latents", arguments.save_latents))
              if value]  # fmt: skip
    if given:
        raise UsageError(f"{given[0]} goes with a workflow of one sampler, or of a base's and a refiner's on one grid;"
                         " this one takes several runs: leave it out")  # fmt: skip


def _image(picture: "Picture", path: Path) -> dict[str, Any]:
    from sdxl_trt.runtime.request import Request, settings_of  # noqa: PLC0415

    width, height = picture.image.size
    several = [name for name, each in settings_of(Request).items() if each.several]
    adapters = {name: picture.metadata[name] for name in several if name in picture.metadata}
    return {"path": str(path), "seed": picture.seed, "width": width, "height": height} | adapters


def _report(
    pipeline: "Pipeline", runs: "Sequence[Run]", images: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    pool, components = pipeline.pool, pipeline.manifest.components
    timings: dict[str, list[float]] = {}
    for stage, each in (item for one in runs for item in one.timings.items()):
        timings.setdefault(stage, []).extend(each)
    place = runs[0].handoff if len(runs) == 1 else None
    return {
        "images": images,
        "timings": {
            "total": seconds,
            **{stage: {"seconds": sum(each), "steps": each} for stage, each in timings.items()},
        },
        "handoff": {"step": place.step, "timestep": place.timestep, "sigma": place.sigma} if place else None,
        "cache": _cached(runs[0]) if len(runs) == 1 else None,
        "engines": [
            {
                "component": name,
                "provider": pool.provider,
                "precision": components[name].precision,
                "computes": pool.computes or components[name].precision,
                "digest": components[name].graph.sha256,
            }
            for name in pool.loads
        ],
        "residency": pool.residency,
        "note": pipeline.manifest.note,
    }


def _cached(run: "Run") -> dict[str, Any] | None:
    """Return the intervals of a run's step cache, and how many of its steps were full; None without a cache."""
    request = run.request
    if not request.caches:
        return None
    policies = {name: request.cache_of(name) for name in run.full_steps}
    every = {name: 1 if policy is None else policy.every for name, policy in policies.items()}
    steps = sum(request.denoising_of(name)[1].steps for name in run.full_steps)
    return {"every": every, "full_steps": sum(run.full_steps.values()), "steps": steps}


def _told_of_cache(cache: dict[str, Any] | None) -> str:
    if cache is None:
        return ""
    first, *others = cache["every"].values()
    interval = f"{first}" if {*others} <= {first} else f"{first}, of the refiner {others[0]}"
    return f"cache {interval}: {cache['full_steps']} of {cache['steps']} steps full; "


def _tell(report: dict[str, Any]) -> None:
    for image in report["images"]:
        sys.stdout.write(f"{image['path']}  seed {image['seed']}  {image['width']}x{image['height']}\n")
    if sheet := report.get("sheet"):
        sys.stdout.write(f"{sheet}  sheet of {len(report['images'])}\n")
    place = report["handoff"]
    single = not {"sweep", "prompt"} & set(report["images"][0])
    drew = [name for name in ("base", "refiner") if name in report["timings"]]
    alone = f"{drew[0]} alone; " if len(drew) == 1 else "base and refiner, each on a grid of its own; "
    how = f"handoff after step {place['step']} at sigma {place['sigma']:.3f}; " if place else alone * single
    engines = report["engines"]
    where = f", computed in {engines[0]['computes']} by OpenVINO" * (
        bool(engines) and engines[0]["provider"] == "openvino"
    )
    sys.stderr.write(f"{how}{_told_of_cache(report['cache'])}{report['timings']['total']:.1f} s{where}\n")


if __name__ == "__main__":
    sys.exit(main())
