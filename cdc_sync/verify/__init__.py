"""Proves that tables and collections agree, and heals what does not: data and search quality."""
