"""The simulator: replays recorded workloads through the control plane that serves, with a clock of its own."""
