"""Mergers x compressions x seeds on the same work: what to run, running it, measuring it."""
