"""Weights of your own from a folder of pictures: python examples/train_on_your_pictures.py PICTURES [WEIGHTS [STEPS]]

Every picture has a .txt of the same name, a caption a line. 200 steps of each part show that all fits together
(on a CPU 2 are enough for that); `dall3 train` with many more makes weights worth having.
"""

import sys

from dall3 import Dall3Pipeline
from dall3.training.run import TRAINABLE, train_model

pictures, weights, steps = (*sys.argv[1:], *("my-weights", 200)[len(sys.argv) - 2 :])

for model in TRAINABLE:  # tokenizer, vqgan, transformer, clip, upsampler: each needs those before it
    train_model(model, weights, data=[f"folder:{pictures}=3", "scenes=1"], steps=int(steps), every=100)

Dall3Pipeline.from_pretrained(weights)("a red cube", seed=0).save("outputs/mine", overwrite=True)
