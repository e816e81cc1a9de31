"""Converters from the checkpoints of other projects to models, one file per format.

The architecture is inferred from the names and shapes of the tensors. What these do not determine comes from the
settings in the checkpoint, or must be given by the caller.
"""
