"""Embeddings in prompts against diffusers' load_textual_inversion, and against ComfyUI's rules written down again."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.pipeline.pipeline import Pipeline

# diffusers' own warning: it passes torch tensors to np.array.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

CONDITION_TOLERANCE, LATENTS_TOLERANCE = 1e-4, 1e-3
STEPS, HANDOFF, SEED, SIDE = 5, 0.6, 11, 32
WIDTHS = {"outline": {"clip_l": 32, "clip_g": 48}, "apart": {"clip_l": 32, "clip_g": 48}}
COUNTS = {"one": 1, "four": 4, "eight": 8, "second": 2}
FOLDER = "embeddings"


def _files() -> dict[str, dict[str, np.ndarray]]:
    """Return the tensors of every file; both pairs' bases have encoders of the same widths."""
    rng = np.random.default_rng(5)
    files = {
        name: {key: 0.5 * rng.standard_normal((count, width), dtype=np.float32)
               for key, width in WIDTHS["outline"].items()}
        for name, count in COUNTS.items()
    }  # fmt: skip
    return files | {"g_only": {"clip_g": files["four"]["clip_g"]}, "l_only": {"clip_l": files["four"]["clip_l"]}}


FILES = _files()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(FOLDER)
    for name, tensors in FILES.items():
        save_file(tensors, root / f"{name}.safetensors")
    return root


@pytest.fixture(scope="module")
def opened(pairs: Callable[[str], Any]) -> Iterator[Callable[[str], Pipeline]]:
    pipelines: dict[str, Pipeline] = {}

    def get(name: str) -> Pipeline:
        if name not in pipelines:
            pipelines[name] = open_bundle(pairs(name).bundle, residency="resident")
        return pipelines[name]

    yield get
    for pipeline in pipelines.values():
        pipeline.pool.close()


@dataclass(frozen=True)
class Reference:
    """What diffusers makes: (hidden, pooled) of base and refiner by side, and the latents at the handoff and last."""

    base: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    refiner: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    handoff: np.ndarray
    final: np.ndarray


def _load(pipeline: Any, encoders: Mapping[str, tuple[Any, Any]], names: list[str]) -> None:
    import torch

    for name in names:
        for key, (encoder, tokenizer) in encoders.items():
            if key in FILES[name]:
                pipeline.load_textual_inversion(
                    torch.from_numpy(FILES[name][key]), token=f"embedding:{name}", text_encoder=encoder,
                    tokenizer=tokenizer,
                )  # fmt: skip


def _sides(pipeline: Any, prompt: str, negative: str) -> Any:
    encoded = pipeline.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative
    )
    hidden, negative_hidden, pooled, negative_pooled = (each[0].numpy() for each in encoded)
    return (hidden, pooled), (negative_hidden, negative_pooled)


def _diffusers(pair: Any, prompt: str, negative: str, names: list[str]) -> Reference:
    """Run base and refiner with the embeddings `names`, loaded in this order, on the prompts as they are written."""
    import torch
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Without a dtype, transformers loads encoders that were saved in it in fp16.
        base = StableDiffusionXLPipeline.from_pretrained(pair.base, torch_dtype=torch.float32)
        refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(pair.refiner, torch_dtype=torch.float32)
        for pipeline in (base, refiner):
            pipeline.set_progress_bar_config(disable=True)
        second = (base.text_encoder_2, base.tokenizer_2)
        _load(base, {"clip_l": (base.text_encoder, base.tokenizer), "clip_g": second}, names)
        refiner_fits = refiner.text_encoder_2.config.hidden_size == WIDTHS["outline"]["clip_g"]
        _load(refiner, {"clip_g": (refiner.text_encoder_2, refiner.tokenizer_2)} if refiner_fits else {}, names)
        generator = [torch.Generator().manual_seed(SEED)]
        settings: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative, "num_inference_steps": STEPS,
                                    "generator": generator, "guidance_scale": 5.0, "output_type": "latent"}  # fmt: skip
        handed = base(**settings, width=SIDE, height=SIDE, denoising_end=HANDOFF).images
        final = refiner(**settings, image=handed, denoising_start=HANDOFF).images
        sides = (_sides(base, prompt, negative), _sides(refiner, prompt, negative))
    return Reference(*sides, handed.numpy(), final.numpy())


def _check(pipeline: Pipeline, request: Request, reference: Reference) -> None:
    job = pipeline.start(request)
    list(pipeline.encode([job]))
    for stage, expected in (("base", reference.base), ("refiner", reference.refiner)):
        for side, (hidden, pooled) in zip(job.embeds[stage], expected, strict=True):
            np.testing.assert_allclose(side[0].hidden, hidden, rtol=0, atol=CONDITION_TOLERANCE)
            np.testing.assert_allclose(side[0].pooled, pooled, rtol=0, atol=CONDITION_TOLERANCE)
    list(pipeline.generate(request))
    run = pipeline.run
    assert run is not None
    np.testing.assert_allclose(run.handoff_latents, reference.handoff, rtol=0, atol=LATENTS_TOLERANCE)
    np.testing.assert_allclose(run.final, reference.final, rtol=0, atol=LATENTS_TOLERANCE)


PROMPTS = {
    "one vector": ("a red embedding:one fox in the snow", "", ["one"]),
    "four vectors and a comma": ("embedding:four, a red fox", "blurry", ["four"]),
    "in the negative": ("a red fox", "blurry, embedding:four", ["four"]),
    "in brackets": ("a red fox (embedding:four)", "", ["four"]),
    "cut through the vectors": ("a " * 73 + "embedding:four fox", "a " * 75 + "embedding:one", ["four", "one"]),
    "several": ("embedding:four fox embedding:second embedding:four", "embedding:one", ["four", "second", "one"]),
    "the last one cut off": ("embedding:second " + "a " * 80 + "embedding:four", "", ["second", "four"]),
    "for one encoder": ("a embedding:g_only fox", "embedding:l_only star", ["g_only", "l_only"]),
    "with its ending": ("a red fox embedding:four.safetensors", "", []),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_a_run_is_that_of_load_textual_inversion(
    name: str, pairs: Callable[[str], Any], opened: Callable[[str], Pipeline], folder: Path
) -> None:
    prompt, negative, names = PROMPTS[name]
    request = Request(prompt, negative=negative, steps=STEPS, handoff=HANDOFF, seed=SEED, width=SIDE, height=SIDE,
                      embedding_dir=folder)  # fmt: skip
    written = prompt.replace(".safetensors", "")
    reference = _diffusers(pairs("outline"), written, negative, names or ["four"])
    _check(opened("outline"), request, reference)


@dataclass(frozen=True)
class Named:
    """An embedding in a prompt that is written as segments."""

    name: str


Segments = list[tuple[str | Named, float]]
# A prompt in ComfyUI's syntax, and its segments as ComfyUI 0.18 tokenizes them, found by hand.
COMFYUI: dict[str, tuple[str, Segments]] = {
    "one vector": ("a red embedding:one fox", [("a red", 1), (Named("one"), 1), ("fox", 1)]),
    "a comma": ("a red fox, embedding:four, blue", [("a red fox,", 1), (Named("four"), 1), (", blue", 1)]),
    "with its ending": ("embedding:four.safetensors fox", [(Named("four"), 1), ("fox", 1)]),
    "a weight": ("(embedding:four:1.3) fox (snow:0.7)",
                 [(Named("four"), 1.3), ("fox", 1), ("snow", 0.7)]),
    "a weight around words": ("((blue embedding:one star)) fox",
                              [("blue", 1.1 * 1.1), (Named("one"), 1.1 * 1.1), ("star", 1.1 * 1.1), ("fox", 1)]),
    "a bracket": ("embedding:one[red fox", [(Named("one"), 1), ("[red fox", 1)]),
    "moved to the second chunk": ("a " * 72 + "embedding:four fox", [("a " * 72, 1), (Named("four"), 1), ("fox", 1)]),
    "split between chunks": ("a " * 72 + "embedding:eight fox", [("a " * 72, 1), (Named("eight"), 1), ("fox", 1)]),
    "not found": ("a embedding:nothing, red fox", [("a", 1), (", red fox", 1)]),
    "twice": ("embedding:four embedding:four", [(Named("four"), 1), (Named("four"), 1)]),
    # The first encoder drops its four places; the weight stays at the place of the snow.
    "for one encoder": ("embedding:g_only fox (snow:1.4)", [(Named("g_only"), 1), ("fox", 1), ("snow", 1.4)]),
}  # fmt: skip


class ComfyUI:
    """An encoder of transformers with ComfyUI's rules (comfy/sd1_clip.py) on top, for prompts given as segments."""

    def __init__(self, encoder: Any, words: Any, pad: int, key: str) -> None:
        self.encoder, self.words, self.pad, self.key = encoder, words, pad, key
        self.start, self.end = words.bos_token_id, words.eos_token_id
        self.added: list[np.ndarray] = []
        self.size = encoder.get_input_embeddings().weight.shape[0]

    def _groups(self, segments: Segments) -> Iterator[list[tuple[Any, float]]]:
        for what, weight in segments:
            if isinstance(what, Named):
                tensors = FILES[what.name]
                for_all = tensors.get(self.key, next(iter(tensors.values())))
                yield [(vector, weight) for vector in for_all]
            else:
                yield [(token, weight) for token in self.words(what, add_special_tokens=False).input_ids]

    def chunks(self, segments: Segments) -> list[list[tuple[Any, float]]]:
        batches: list[list[tuple[Any, float]]] = [[(self.start, 1.0)]]
        for group in self._groups(segments):
            large, rest = len(group) >= 8, group
            while rest:
                if len(rest) + len(batches[-1]) <= 76:
                    batches[-1] += rest
                    break
                if large:
                    taken = 76 - len(batches[-1])
                    batches[-1] += rest[:taken]
                    rest = rest[taken:]
                batches[-1].append((self.end, 1.0))
                batches.append([(self.start, 1.0)])
        batches[-1].append((self.end, 1.0))
        return [batch + [(self.pad, 1.0)] * (77 - len(batch)) for batch in batches]

    def _row(self, batch: list[tuple[Any, float]]) -> tuple[list[int], int]:
        """Return ids, of which those of vectors lie behind the table, and the number of tokens up to the end."""
        width = self.encoder.config.hidden_size
        ids = []
        for token, _ in batch:
            if isinstance(token, int):
                ids.append(token)
            elif token.shape[-1] == width:
                ids.append(self.size + len(self.added))
                self.added.append(token)
        return ids + [self.pad] * (77 - len(ids)), ids.index(self.end) + 1

    def encode(self, segments: Segments, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return hidden states (tokens, width) of at least `count` chunks, and the pooled vector of the first."""
        import torch

        batches = self.chunks(segments)
        batches += (count - len(batches)) * self.chunks([])
        weighted = any(weight != 1 for batch in batches for _, weight in batch)
        rows = [self._row(batch) for batch in [*batches, *self.chunks([])]]
        self.encoder.resize_token_embeddings(self.size + len(self.added), mean_resizing=False)
        for number, vector in enumerate(self.added, start=self.size):
            self.encoder.get_input_embeddings().weight.data[number] = torch.from_numpy(vector)
        out = self.encoder(torch.tensor([ids for ids, _ in rows]), output_hidden_states=True)
        hidden, empty = out.hidden_states[-2][:-1].numpy().copy(), out.hidden_states[-2][-1].numpy()
        if weighted:
            scale = np.array([[weight for _, weight in batch] for batch in batches], np.float32)[..., None]
            hidden = (hidden - empty) * scale + empty
        last = out.last_hidden_state[0, rows[0][1] - 1]
        projected = self.encoder.text_projection(last).numpy() if hasattr(self.encoder, "text_projection") else None
        return hidden.reshape(-1, hidden.shape[-1]), projected


def _comfyui(pair: Any, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """Return hidden states of both encoders and the second's pooled vector: CLIPTextEncode on SDXL's base."""
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = CLIPTokenizer.from_pretrained(pair.base / "tokenizer")
        first = CLIPTextModel.from_pretrained(pair.base / "text_encoder", dtype=torch.float32)
        second = CLIPTextModelWithProjection.from_pretrained(pair.base / "text_encoder_2", dtype=torch.float32)
        both = [ComfyUI(first, words, words.eos_token_id, "clip_l"), ComfyUI(second, words, 0, "clip_g")]
        count = max(len(each.chunks(segments)) for each in both)
        (left, _), (right, pooled) = (each.encode(segments, count) for each in both)
    return np.concatenate([left, right], axis=-1), pooled


@pytest.mark.parametrize("name", COMFYUI)
def test_a_prompt_is_encoded_by_comfyuis_rules(
    name: str, pairs: Callable[[str], Any], opened: Callable[[str], Pipeline], folder: Path
) -> None:
    prompt, segments = COMFYUI[name]
    request = Request("a fox", negative=prompt, steps=1, handoff=None, seed=SEED, width=SIDE, height=SIDE,
                      compat="comfyui", embedding_dir=folder)  # fmt: skip
    pipeline = opened("outline")
    job = pipeline.start(request)
    list(pipeline.encode([job]))
    _, (negative,) = job.embeds["base"]
    hidden, pooled = _comfyui(pairs("outline"), segments)
    np.testing.assert_allclose(negative.hidden, hidden, rtol=0, atol=CONDITION_TOLERANCE)
    np.testing.assert_allclose(negative.pooled, pooled, rtol=0, atol=CONDITION_TOLERANCE)


def test_an_encoder_whose_config_knows_the_end_token_pools_there(
    pairs: Callable[[str], Any], opened: Callable[[str], Pipeline], folder: Path
) -> None:
    """The config of the other pair states the end token's id, and its refiner's encoder has another width."""
    request = Request("a red embedding:four fox", negative="embedding:second", steps=STEPS, handoff=HANDOFF, seed=SEED,
                      width=SIDE, height=SIDE, embedding_dir=folder)  # fmt: skip
    reference = _diffusers(pairs("apart"), request.prompt, str(request.negative), ["four", "second"])
    _check(opened("apart"), request, reference)
