"""comfy-api-simplified and comfy-api-client, two clients of ComfyUI's API, and the pixels of the other APIs."""

import asyncio
import base64
import io
from collections.abc import Callable
from typing import Any

import openai
import pytest
from comfy_api_client import create_client
from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper
from PIL import Image


def _graph(model: str, steps: int = 2) -> dict[str, Any]:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}

    return {
        "3": node("KSampler", seed=7, steps=steps, cfg=7.0, sampler_name="euler", scheduler="normal", denoise=1.0,
                  model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
        "4": node("CheckpointLoaderSimple", ckpt_name=model),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "6": node("CLIPTextEncode", text="a red star", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blur", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }  # fmt: skip


@pytest.fixture
def wrapper(server: str, mounted: Callable[[str], None]) -> ComfyApiWrapper:
    mounted("/object_info")
    return ComfyApiWrapper(server)


@pytest.fixture
def graph(server: str, wrapper: ComfyApiWrapper) -> dict[str, Any]:
    info = wrapper.get_object_info(node_type="CheckpointLoaderSimple")
    names = info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
    return _graph(names[0])


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_comfy_api_simplified_draws_a_graph(wrapper: ComfyApiWrapper, graph: dict[str, Any]) -> None:
    pictures = wrapper.queue_and_wait_images(ComfyWorkflowWrapper(graph), "SaveImage")
    assert [_opened(data).size for data in pictures.values()] == [(64, 64)]


def test_comfy_api_simplified_uploads_a_picture(wrapper: ComfyApiWrapper, tmp_path: Any) -> None:
    Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / "cat.png")
    answer = wrapper.upload_image(str(tmp_path / "cat.png"))
    assert answer["type"] == "input"
    assert answer["name"].endswith(".png")


def test_comfy_api_client_draws_a_graph(server: str, graph: dict[str, Any]) -> None:
    async def draw() -> Any:
        async with create_client(server, start_state_tracker="http") as client:
            queued = await client.submit_workflow(graph)
            return await asyncio.wait_for(queued.future, 60)

    result = asyncio.run(draw())
    assert [item.image.size for item in result.output_images] == [(64, 64)]


def test_openai_in_comfyuis_way_has_the_graphs_pixels(
    server: str, wrapper: ComfyApiWrapper, graph: dict[str, Any]
) -> None:
    (drawn,) = wrapper.queue_and_wait_images(ComfyWorkflowWrapper(graph), "SaveImage").values()
    more = {"compat": "comfyui", "sampler": "euler", "scheduler": "normal", "steps": 2, "guidance_scale": 7.0,
            "seed": 7, "negative_prompt": "blur", "handoff": None}  # fmt: skip
    with openai.OpenAI(base_url=f"{server}/v1", api_key="sk-test", max_retries=0) as client:
        answer = client.images.generate(prompt="a red star", size="64x64", extra_body=more)
    assert answer.data is not None
    assert _opened(base64.b64decode(answer.data[0].b64_json or "")).tobytes() == _opened(drawn).tobytes()
