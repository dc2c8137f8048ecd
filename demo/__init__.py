"""The embedded demo: a small language whose behaviours are known, and a model trained on it."""
