"""The networks, one file each. Modules keep the parameter names of the published checkpoints where possible."""
