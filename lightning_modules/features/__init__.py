"""Representations of a split: extracted once, kept on disk, and summed up in second moments."""
