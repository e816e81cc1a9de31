"""Weights of your own from a folder of pictures: python examples/train_on_your_pictures.py PICTURES [WEIGHTS [STEPS]]

Each picture needs a .txt of the same name with one caption a line. 200 steps of each part show that everything fits
together (on a CPU, 2 are enough); `dall3 train` with many more steps makes useful weights. docs/training.md has the
settings.
"""

import sys

from dall3 import Dall3Pipeline
from dall3.training.run import TRAINABLE, train_model

pictures, weights, steps = (*sys.argv[1:], *("my-weights", 200)[len(sys.argv) - 2 :])

for model in TRAINABLE:  # tokenizer, vqgan, transformer, clip, upsampler: each part may need those before it
    how = {"steps": int(steps)} if model == "tokenizer" else {"steps": int(steps), "batch_size": 8, "every": 100}
    train_model(model, weights, data=[f"folder:{pictures}=3", "scenes=1"], **how)

Dall3Pipeline.from_pretrained(weights)("a red cube", seed=0).save("outputs/mine", overwrite=True)
