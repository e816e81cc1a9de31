"""The process of one part of a family: python -m dall3.training.family JOB"""

import json
import sys

from dall3.training.family import Job, train_part

train_part(Job(**json.loads(sys.argv[1])))
