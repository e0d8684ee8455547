"""From a graph to pictures: checked before it is queued, and drawn by the worker's thread, node by node."""

__all__ = ["Asked", "Checked", "check_graph", "run_graph"]

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdxl_trt.engines import SdxlTrtError, UsageError
from sdxl_trt.runtime import Batch, Pipeline, Request, Step
from sdxl_trt.runtime.comfyui import (
    Decoded,
    Encoded,
    Experts,
    LoraFiles,
    Sampled,
    Workflow,
    ancestry,
    check_workflow,
    pair_request,
    settle_pair,
    workflow_of,
)
from sdxl_trt.runtime.pipeline import Chain, check_chain
from sdxl_trt.runtime.request import ResolvedRequest
from sdxl_trt.server.comfyui.heard import heard, quietly
from sdxl_trt.server.comfyui.validation import Fault, NodeFaults, PromptError
from sdxl_trt.server.desk import Drawn, Graph, Stepped, Ticket
from sdxl_trt.server.options import Options

WHERE = "prompt"
ENCODERS = ("CLIPTextEncode", "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner")


@dataclass(frozen=True)
class Asked(Graph):
    """A graph, the outputs that are to be drawn, and the files of its pictures by their names in it."""

    outputs: Sequence[str] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Checked:
    """What is wrong with single outputs of a graph, and what is to be told of the others.

    `copies` are the outputs that show another one's picture.
    """

    faults: Mapping[str, NodeFaults]
    warnings: Sequence[str]
    copies: Mapping[str, str]


def check_graph(pipeline: Pipeline, asked: Asked) -> Checked:
    """Return what is to be told of a graph, without touching the state of the pipeline; callable from any thread.

    Raises PromptError with the error at its node if no output can be drawn.
    """
    with heard() as lines:
        workflow, faults = _read(asked)
        try:
            resolved = _resolved(pipeline, workflow, asked)
        except SdxlTrtError as exc:
            message = without_paths(str(exc), asked)
            raise _refused(asked, {asked.outputs[0]: [message]}) from exc
    notes = [note for each in resolved for note in each.notes]
    warnings = [*dict.fromkeys(without_paths(line, asked) for line in (*lines, *notes))]
    return Checked(faults, warnings, workflow.copies)


def run_graph(pipeline: Pipeline, graph: Graph, ticket: Ticket) -> Iterator[Stepped | Drawn]:
    """Draw a graph; yield a Stepped for every unit of work, with its node, and a Drawn for every picture.

    The desk's thread calls it, and may leave it between two events. Raises SdxlTrtError.
    """
    assert isinstance(graph, Asked)  # noqa: S101 - no other part makes graphs
    return quietly(_drawn(pipeline, graph, estimates=ticket.order.wants_estimates))


def _drawn(pipeline: Pipeline, asked: Asked, *, estimates: bool) -> Iterator[Stepped | Drawn]:
    try:
        workflow, _ = _read(asked)
    except PromptError as exc:
        raise UsageError(str(exc)) from exc
    request, found, files = _prepared(pipeline, workflow, asked)
    nodes = _Nodes(workflow, asked.nodes, chain=request is None)
    yield from nodes.before()
    work: Batch | Chain
    if request is None:
        work = Chain(pipeline, workflow, found, asked.pictures, _change(asked), files)
    else:
        work = Batch(pipeline, [request])
    shown = 0
    for number, step in work.steps():
        latents = step.denoised.copy() if estimates and step.denoised is not None else None
        yield from nodes.told(step, number, latents)
        if step.picture is not None:
            yield Drawn(shown, step.picture, workflow.outputs[number].node)
            shown += 1


def _read(asked: Asked) -> tuple[Workflow, dict[str, NodeFaults]]:
    """Return the workflow of the outputs that can be read, and what is wrong with the others."""
    try:
        workflow, problems = workflow_of(asked.nodes, WHERE, asked.outputs)
    except UsageError as exc:
        raise PromptError(Fault("prompt_outputs_failed_validation", str(exc))) from exc
    if workflow is None:
        raise _refused(asked, problems)
    return workflow, _faults(asked, problems)


def _prepared(pipeline: Pipeline, workflow: Workflow, asked: Asked) -> tuple[Request | None, Experts, LoraFiles]:
    """Return the request of a graph that is a single one, else None; which expert each checkpoint is; and its LoRAs."""
    files = LoraFiles(asked.options.lora_dir)
    found = check_workflow(workflow, pipeline.manifest, files)
    request = pair_request(workflow, pipeline.manifest, found, asked.pictures, files)
    return (None if request is None else _change(asked)(request)), found, files


def _change(asked: Asked) -> Callable[[Request], Request]:
    return lambda request: replace(request, embedding_dir=asked.options.embedding_dir)


def _resolved(pipeline: Pipeline, workflow: Workflow, asked: Asked) -> list[ResolvedRequest]:
    request, found, files = _prepared(pipeline, workflow, asked)
    if request is None:
        return check_chain(pipeline, workflow, found, asked.pictures, _change(asked), files)
    pool = pipeline.pool
    # The first names the node of what is wrong, the second looks for room and for engines too.
    settle_pair(request, workflow, pipeline.manifest, pool.limits, pool.bundle, seed_given=False)
    return [pipeline.resolve(request)]


def _refused(asked: Asked, problems: Mapping[str, Sequence[str]]) -> PromptError:
    faults = _faults(asked, problems)
    lines = [f"* {each.class_type} {key}: {fault.details}" for key, each in faults.items() for fault in each.faults]
    return PromptError(Fault("prompt_outputs_failed_validation", "Prompt outputs failed validation",
                             "\n".join(lines)), faults)  # fmt: skip


def _faults(asked: Asked, problems: Mapping[str, Sequence[str]]) -> dict[str, NodeFaults]:
    """Return the problems of outputs as faults of the nodes that their messages name."""
    found: dict[str, NodeFaults] = {}
    for output, lines in problems.items():
        for line in lines:
            node = _blamed(asked.nodes, line) or output
            fault = Fault("custom_validation_failed", "Custom validation failed for node", without_paths(line, asked))
            before = found.get(node, NodeFaults(asked.nodes[node]["class_type"], (), ()))
            more = [] if fault in before.faults else [fault]
            outputs = [*dict.fromkeys((*before.outputs, output))]
            found[node] = replace(before, faults=[*before.faults, *more], outputs=outputs)
    return found


def _blamed(nodes: Mapping[str, Any], message: str) -> str:
    """Return the node that a message begins with, "" if it names none."""
    starts = [key for key in nodes if re.match(rf"node {re.escape(key[:20])}\b(?: \(|:)", message)]
    return starts[0] if starts else ""


def without_paths(message: str, asked: Asked) -> str:
    """Return a message of the runtime without the folders of this machine; pictures have their names in the graph."""
    for name, path in asked.pictures.items():
        message = message.replace(str(path), name)
    for folder in (asked.options.lora_dir, asked.options.embedding_dir, asked.options.engines):
        if folder is not None:
            message = message.replace(f"{folder}/", "").replace(str(folder), "the server's folder")
    return message


@dataclass
class _Nodes:
    """Which node of a graph works, step by step; `chain` says whether it is drawn in several runs."""

    workflow: Workflow
    nodes: Mapping[str, Any]
    chain: bool

    def before(self) -> Iterator[Stepped]:
        """Yield what works first: the prompts, which are all encoded together."""
        yield Stepped("encode", 0, 1, node=next(iter(self._encoders()), self.workflow.outputs[0].node))

    def _encoders(self) -> list[str]:
        kept = json.loads(self.workflow.graph)
        return [key for key, node in kept.items() if node["class_type"] in ENCODERS]

    def told(self, step: Step, number: int, estimate: Any) -> Iterator[Stepped]:
        """Yield a step of output `number` with its node, and for an end the node that works next."""
        first = step.pictures.start or 0
        if step.stage == "encode":
            encoders = self._encoders()
            for index, key in enumerate(encoders or [""], start=1):
                yield Stepped("encode", index, max(len(encoders), 1), first, node=key)
        else:
            pictures = max((step.pictures.stop or 0) - first, 1)
            yield Stepped(step.stage, step.index, step.total, first, estimate, self._node(step, number), pictures,
                          step.seconds)  # fmt: skip
        following = self._following(step, number)
        if following:
            yield Stepped("load", 0, 1, first, node=following)

    def _node(self, step: Step, number: int) -> str:
        if step.node or step.stage == "load":
            return step.node
        output, samplers = self.workflow.outputs[number], self._samplers(number)
        if step.stage in ("base", "refiner"):
            return samplers[0] if step.stage == "base" else samplers[-1]
        if step.stage == "picture":
            encoded = [each.node for each in ancestry(output.image) if isinstance(each, Encoded)]
            return next(iter(encoded), samplers[0])
        return output.image.node if isinstance(output.image, Decoded) else output.node

    def _samplers(self, number: int) -> list[str]:
        single = replace(self.workflow, outputs=(self.workflow.outputs[number],))
        return [sampling.node for sampling in single.samplings]

    def _following(self, step: Step, number: int) -> str:
        """Return the node that works after `step`, if `step` is the last of its node's; "" where that is not known."""
        # A single run has encoded its picture before its prompts, and a chain encodes one when it comes to it.
        row = [each for each in self._row(number) if self.chain or not isinstance(each, Encoded)]
        works = [each.sampling.node if isinstance(each, Sampled) else each.node for each in row]
        if step.stage == "encode":
            return works[0]
        here = self._node(step, number)
        if step.stage not in ("base", "refiner") or step.index < step.total or here not in works:
            return ""
        return next(iter(works[works.index(here) + 1 :]), "")

    def _row(self, number: int) -> list[Encoded | Sampled | Decoded]:
        """Return what needs an engine of the way to an output, in order."""
        way = reversed(ancestry(self.workflow.outputs[number].image))
        return [each for each in way if isinstance(each, Encoded | Sampled | Decoded)]
