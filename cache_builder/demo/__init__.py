"""The embedded default: a procedural world and the tiny backbones trained on it."""
