"""Encode an image to tokens and refine it by diffusion: python examples/upsample_picture.py IMAGE [PROMPT]"""

import sys

from PIL import Image

from dall3 import Dall3Pipeline
from dall3.images import to_pil

path, prompt = sys.argv[1], " ".join(sys.argv[2:])
pipe = Dall3Pipeline.from_pretrained()

# CLIP guides the denoising towards the prompt. Without a prompt, guidance is off.
guidance = {"prompt": prompt, "clip_guidance_scale": 1000} if prompt else {}
fine = pipe.upsample(image=Image.open(path), seed=0, **guidance)
to_pil(fine)[0].save("fine.png")
print("saved fine.png")
