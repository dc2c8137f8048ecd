"""The engine: Hugging Face models as they are, read and edited at hooks. No protobuf, no grpc."""

ENGINE_VERSION = "1"
"""Goes into every result's id: raise it whenever a number may change."""
