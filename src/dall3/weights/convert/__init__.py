"""Checkpoints of other projects to models: one file a format. What an architecture is, is read off the names and
shapes of its tensors; what they cannot tell comes from the settings beside them, or is asked for.
"""
