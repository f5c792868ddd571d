"""Generative-vision methods as Lightning modules: one module, one YAML, one command each."""

__version__ = "0.1.0"
