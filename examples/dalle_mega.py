"""DALL·E Mega, refined by CLIP-guided diffusion: python examples/dalle_mega.py [PROMPT]

Downloads about 8.2 GB once (about 3.9 GB with "dalle-mini" in place of "dalle-mega"). `dall3 weights list` shows all
sets.
"""

import sys

import torch

from dall3 import Dall3Pipeline

prompt = sys.argv[1] if len(sys.argv) > 1 else "an armchair in the shape of an avocado"
on_gpu = torch.cuda.is_available()

pipe = Dall3Pipeline.from_pretrained(
    "dalle-mega", device="cuda" if on_gpu else "cpu", dtype=torch.float16 if on_gpu else torch.float32
)

# Draws eight candidates and refines the one with the highest CLIP score. The other settings are those of the weights.
out = pipe(prompt, num_images=1, num_candidates=8, seed=0)

print(f"saved {out.images[0].size} to {out.save('outputs/' + prompt.replace(' ', '_'), overwrite=True)}")
