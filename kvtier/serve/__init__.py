"""The node daemon (`kvtier serve`): one process owns the tiers of a machine, and every engine on it uses them through a Unix socket."""
