"""Hypothesis profiles. ``KVTIER_HYPOTHESIS_PROFILE`` chooses: ``ci`` (default; the same examples each time) or ``nightly``."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, max_examples=60, deadline=None, print_blob=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("KVTIER_HYPOTHESIS_PROFILE", "ci"))
