"""Chunks of prompts reused at any position, with a part of their tokens computed anew. docs/explanation/chunk-reuse.md is the guide.

What finds chunks and lays out a prompt needs no torch; entries, methods and the sparse prefill do. Nothing here knows an engine: a
model is whatever implements :class:`kvtier.blend.model.BlendModel`.
"""
