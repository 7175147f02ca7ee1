"""Keeps Qdrant collections in step with Postgres pgvector tables."""

__version__ = "0.1.0"
