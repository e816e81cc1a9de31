"""The networks, a file each, with the names of their checkpoints where that is possible."""
