"""ruDALL-E Malevich, a Russian prompt to 512 px: python examples/rudalle.py [PROMPT]

Fetches 5.1 GB once. "rudalle-emojich" draws emoji, "rudalle-surrealist" surreal paintings.
"""

import sys

import torch

from dall3 import Dall3Pipeline

prompt = sys.argv[1] if len(sys.argv) > 1 else "рыжий кот на луне"
on_gpu = torch.cuda.is_available()

pipe = Dall3Pipeline.from_pretrained(
    "rudalle-malevich", device="cuda" if on_gpu else "cpu", dtype=torch.float16 if on_gpu else torch.float32
)

# These weights keep 1,024 of 8,192 codes, and of those the likeliest whose probability passes 0.99; fewer are calmer.
out = pipe(prompt, num_images=4, top_k=512, top_p=0.97, seed=0)

print(f"saved {len(out)} pictures to {out.save('outputs/' + prompt.replace(' ', '_'), overwrite=True)}")
