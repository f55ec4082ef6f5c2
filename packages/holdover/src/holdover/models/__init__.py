"""Adapters of known models, and the search for the blocks of unknown ones."""
