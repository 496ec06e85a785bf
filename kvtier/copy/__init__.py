"""Moves blocks between an engine's paged KV memory and the arena: ``base`` has the contract, the other modules keep it."""
