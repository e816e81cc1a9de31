"""The bundled weights draw the prompt, according to a classifier that was not used in their training."""

import sys
from pathlib import Path

import torch

from dall3 import Dall3Pipeline

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from judge import load_judge

JUDGE = Path(__file__).parent.parent / "benchmarks/judge.safetensors"
EMOJI = {"an avocado": "1F951", "a red apple": "1F34E", "a rocket": "1F680", "a soccer ball": "26BD"}
PROMPTS: dict[str, dict[str, str]] = {
    "a cube made of cloud": {"shape": "cube", "material": "cloud"},
    "a golden torus": {"shape": "torus", "material": "gold"},
    "a red cone": {"shape": "cone", "material": "red"},
    "a sphere made of wood": {"shape": "sphere", "material": "wood"},
    "a star made of grass": {"shape": "star", "material": "grass"},
    "a pyramid made of brick": {"shape": "pyramid", "material": "brick"},
    "an egg made of leather": {"shape": "egg", "material": "leather"},
    "a cylinder made of lava": {"shape": "cylinder", "material": "lava"},
    "a capsule made of water": {"shape": "capsule", "material": "water"},
    "an octahedron made of ice": {"shape": "octahedron", "material": "ice"},
    "a blue cube on a yellow background": {"shape": "cube", "material": "blue", "background": "yellow"},
    "a cube made of porcupine": {"shape": "cube", "material": "porcupine"},
    **{text: {"emoji": hexcode} for text, hexcode in EMOJI.items()},
}


def test_at_least_14_of_16_prompts_are_drawn_right():
    pipe, judge = Dall3Pipeline.from_pretrained(), load_judge(JUDGE)
    wrong = []
    for prompt, answers in PROMPTS.items():
        out = pipe(prompt, num_images=1, num_candidates=1, clip_guidance_scale=0, seed=0, progress=False)
        picture = torch.from_numpy(out.to_numpy()).permute(0, 3, 1, 2).float() / 255
        found = {head: judge.classes[head][int(judge(picture)[head].argmax())] for head in answers}
        if found != answers:
            wrong.append(f"{prompt}: {found}")
    assert len(PROMPTS) == 16 and len(wrong) <= 2, wrong
