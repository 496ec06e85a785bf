"""Blocks in object storage: S3 and what speaks its protocol, GCS, Azure, a local folder, memory."""

from __future__ import annotations

from kvtier.tiers.object.client import ObjectAccess, ObjectClient

__all__ = ["ObjectAccess", "ObjectClient"]
