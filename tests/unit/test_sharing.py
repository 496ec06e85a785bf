"""What one engine stored, others find: the planner's probes, and engines over one store."""

from __future__ import annotations

from hypothesis import settings

from kvtier.testing.sharing_machine import SharingPlannerMachine, TwoEnginesMachine


class FewKnownMachine(SharingPlannerMachine):
    """The engine may know of hardly any block in the store."""

    known_blocks = 5


TestSharing = SharingPlannerMachine.TestCase
TestFewKnown = FewKnownMachine.TestCase
TestTwoEngines = TwoEnginesMachine.TestCase
TestTwoEngines.settings = settings(stateful_step_count=12, max_examples=25, deadline=None)
