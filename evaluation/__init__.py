"""How good are the features? `python -m evaluation --help`, or `dino-eval --help`."""
