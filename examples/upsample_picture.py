"""A small picture of your own to a fine one, through the codes: python examples/upsample_picture.py PICTURE [PROMPT]"""

import sys

from PIL import Image

from dall3 import Dall3Pipeline
from dall3.images import to_pil

path, prompt = sys.argv[1], " ".join(sys.argv[2:])
pipe = Dall3Pipeline.from_pretrained()

# What CLIP pulls towards, where a prompt says; without one it is not asked.
guidance = {"prompt": prompt, "clip_guidance_scale": 1000} if prompt else {}
fine = pipe.upsample(image=Image.open(path), seed=0, **guidance)
to_pil(fine)[0].save("fine.png")
print("saved fine.png")
