"""Recipes (YAML) and model configs (JSON): data, found by name through `--config` and `--model_config`."""
