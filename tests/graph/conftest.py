"""One thread, as in the laws."""

from laws.conftest import one_thread

__all__ = ["one_thread"]
