"""Runs many LLM agents at once and lets any number of people watch them live."""
