"""Run configurations: `base.py` documents every key, the others change a few of them."""
