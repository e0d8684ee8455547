"""The openai package: generate, stream, edit, retries, models, and the errors that it raises."""

import base64
import io
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image, ImageDraw

SMALL = {"size": "64x64", "extra_body": {"steps": 2, "seed": 7}}


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="sk-test", max_retries=0) as client:
        yield client


def _opened(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def _file(image: Image.Image, name: str) -> tuple[str, bytes, str]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return name, buffer.getvalue(), "image/png"


def test_generate_draws_the_same_picture_for_a_seed(client: openai.OpenAI) -> None:
    first, again = (client.images.generate(prompt="a red star", **SMALL) for _ in range(2))
    assert first.data is not None
    assert again.data is not None
    assert _opened(first.data[0].b64_json).size == (64, 64)
    assert _opened(first.data[0].b64_json).tobytes() == _opened(again.data[0].b64_json).tobytes()
    assert (first.size, first.output_format, first.background, first.quality) == ("64x64", "png", "opaque", "medium")
    assert first.usage is not None
    assert first.usage.total_tokens == first.usage.input_tokens_details.text_tokens == 3
    assert first.model_extra is not None
    assert first.model_extra["seeds"] == [7]
    assert first._request_id


def test_pictures_are_files_of_the_format_that_was_asked_for(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="gpt-image-1", prompt="a blue ring", n=2, output_format="webp",
                                    output_compression=60, background="auto", moderation="low", user="u1", **SMALL)  # type: ignore[call-overload]  # fmt: skip
    assert answer.data is not None
    assert [_opened(each.b64_json).format for each in answer.data] == ["WEBP", "WEBP"]
    assert answer.model_extra["seeds"] == [7, 8]


def test_a_url_can_be_fetched(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="dall-e-3", prompt="a star", response_format="url", **SMALL)
    assert answer.data is not None
    assert answer.data[0].b64_json is None
    assert answer.data[0].url is not None
    fetched = httpx2.get(answer.data[0].url)
    assert fetched.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(fetched.content)).size == (64, 64)


def test_a_stream_shows_partial_images_and_the_picture_last(client: openai.OpenAI) -> None:
    body = {"size": "64x64", "extra_body": {"steps": 6, "seed": 7}}
    events: list[Any] = [*client.images.generate(prompt="a red star", stream=True, partial_images=2, n=2, **body)]
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"] * 2
    assert [event.partial_image_index for event in events if "partial" in event.type] == [0, 1, 0, 1]
    assert {_opened(event.b64_json).size for event in events} == {(64, 64)}
    assert events[2].usage.total_tokens == 3
    whole = client.images.generate(prompt="a red star", n=2, **body)
    assert whole.data is not None
    assert [_opened(event.b64_json).tobytes() for event in events if "completed" in event.type] == [
        _opened(each.b64_json).tobytes() for each in whole.data
    ]


def test_an_edit_changes_the_picture_or_what_the_mask_shows(client: openai.OpenAI) -> None:
    picture, mask = Image.new("RGB", (64, 64), (200, 40, 40)), Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    ImageDraw.Draw(mask).rectangle((0, 0, 31, 63), (0, 0, 0, 0))
    body = {"size": "64x64", "extra_body": {"steps": 4, "seed": 7}}
    whole = client.images.edit(prompt="a blue star", image=_file(picture, "a.png"), **body)
    part = client.images.edit(prompt="a blue star", image=[_file(picture, "a.png")], mask=_file(mask, "m.png"), **body)
    assert whole.data is not None
    assert part.data is not None
    changed, masked = (_opened(answer.data[0].b64_json).convert("RGB") for answer in (whole, part))
    assert changed.tobytes() != picture.tobytes()
    right = (48, 0, 64, 64)
    assert masked.crop(right).tobytes() == picture.crop(right).tobytes()
    assert masked.crop((0, 0, 16, 64)).tobytes() != picture.crop((0, 0, 16, 64)).tobytes()


def test_an_edit_can_be_streamed(client: openai.OpenAI) -> None:
    picture = _file(Image.new("RGB", (64, 64), (200, 40, 40)), "a.png")
    events: list[Any] = [*client.images.edit(prompt="a star", image=picture, stream=True, partial_images=1,
                                             size="64x64", extra_body={"steps": 8})]  # type: ignore[call-overload]  # fmt: skip
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[1:] == ["gpt-image-1", "dall-e-3", "dall-e-2"]
    assert client.models.retrieve(names[0]).id == names[0]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("llama")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("changed", "kind", "param", "code"),
    [
        ({"size": "100x100"}, openai.BadRequestError, "size", "invalid_value"),
        ({"extra_body": {"sed": 7}}, openai.BadRequestError, "sed", "unknown_parameter"),
        ({"background": "transparent"}, openai.BadRequestError, "background", "invalid_value"),
        ({"model": "flux"}, openai.NotFoundError, "model", "model_not_found"),
    ],
)
def test_an_error_names_the_field(
    client: openai.OpenAI, changed: dict[str, Any], kind: Any, param: str, code: str
) -> None:
    with pytest.raises(kind) as caught:
        client.images.generate(**{"prompt": "a star", **SMALL, **changed})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.request_id


def test_a_full_queue_is_tried_again_until_every_picture_is_there(serve: Any) -> None:
    refused: list[str] = []

    def seen(answer: httpx2.Response) -> None:
        if answer.status_code == 429:
            refused.append(answer.headers["retry-after"])

    http = httpx2.Client(event_hooks={"response": [seen]})
    client = openai.OpenAI(base_url=f"{serve('--queue', '1')}/v1", api_key="sk-test", max_retries=20, http_client=http)
    drawn: list[Any] = []

    def draw(number: int) -> None:
        drawn.append(client.images.generate(prompt="a star", size="64x64", extra_body={"steps": 30, "seed": number}))

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    assert sorted(answer.model_extra["seeds"][0] for answer in drawn) == list(range(4))
    assert refused
    assert all(1 <= int(seconds) <= 120 for seconds in refused)


def test_a_picture_that_takes_longer_than_the_client_waits_is_drawn_once(serve: Any) -> None:
    """The package leaves, and asks again: its next request reads the order of the first one."""
    address = serve("--on-disconnect", "finish")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="sk-test", max_retries=40, timeout=0.3) as client:
        answer = client.images.with_raw_response.generate(prompt="a star", size="128x128", extra_body={"steps": 40})
    assert answer.headers["idempotent-replayed"] == "true"
    assert len(answer.parse().data or ()) == 1
