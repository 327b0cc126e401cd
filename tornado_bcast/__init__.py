"""tornado_bcast: a daemon that gets a message to everybody who listens.

The rooms and the one way through them are described in docs/ARCHITECTURE.md.
"""

__version__ = "0.1.0"
