"""The prompts that a model draws to measure the ranges of its activations, if its user gives none."""

__all__ = ["MINI_PROMPTS", "PROMPTS"]

# Portraits, landscapes, interiors, drawings, writing; light and dark, plain and crowded.
PROMPTS = (
    "a photograph of a red fox in the snow, golden hour, 85 mm, shallow depth of field",
    "a crowded street market at night, neon signs, rain, reflections on the pavement",
    "portrait of an old fisherman, weathered face, studio lighting, black background",
    "an oil painting of a fjord in the fog, thick brush strokes",
    "a white kitchen with a bowl of lemons on a marble table, morning light",
    "isometric illustration of a small island with a lighthouse, flat colours",
    "a macro shot of a dewdrop on a green leaf",
    "an astronaut riding a horse on the moon, cinematic, wide angle",
    "pencil sketch of a cathedral, detailed line work, white paper",
    "a bookshop window with a sign that says OPEN, warm light",
    "aerial view of a desert with long shadows at sunset",
    "a glass of water on a black table, minimal, high contrast",
)
# What the embedded pair was trained to draw.
MINI_PROMPTS = (
    "a large red star on a blue background",
    "a picture of a small green circle on a white background in the top left corner",
    "yellow square, black background on the right",
    "a drawing of a medium blue triangle at the bottom, green background",
    "there is a large white circle on a red background in the centre",
    "on a yellow background, a small black ring on the left",
    "large purple square on orange in the bottom right corner",
    "a picture of a medium orange cross on a purple background",
    "a drawing of a small white star at the top, blue background",
    "there is a green cross on a black background on the left",
    "on a white background, a large blue ring",
    "medium black triangle on yellow in the top right corner",
)
