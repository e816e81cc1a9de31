"""The community's DALLE-pytorch of 2021, refined by CLIP-guided diffusion: python examples/dalle_pytorch.py [PROMPT]"""

import sys

import torch

from dall3 import Dall3Pipeline

prompt = sys.argv[1] if len(sys.argv) > 1 else "a house by the lake in autumn"
on_gpu = torch.cuda.is_available()

pipe = Dall3Pipeline.from_pretrained(
    "dalle-pytorch-cc", device="cuda" if on_gpu else "cpu", dtype=torch.float16 if on_gpu else torch.float32
)

# Few of its draws are good, so draw many candidates; CLIP keeps the best.
out = pipe(prompt, num_images=1, num_candidates=16, seed=0)

print(f"saved {out.images[0].size} to {out.save('outputs/' + prompt.replace(' ', '_'), overwrite=True)}")
