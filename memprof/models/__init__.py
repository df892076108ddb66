"""Models: found by name, hub id, folder or configuration; built with random weights, a checkpoint's, or none."""
