"""The trainer's tiny library and model serve the demo's tests as well."""

from tests.trainer.conftest import library, tiny_model

__all__ = ["library", "tiny_model"]
