"""Contract lines 2, 5, 6 and 7 in the everything-eager debug mode: the tests of the other files, with other options.

What the mode changes on purpose is left out: no capture fails in it, and the Python of captured segments runs at each call.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_contract_aliases
import test_contract_ambient
import test_contract_order
import test_contract_random
import torch

for module in (test_contract_order, test_contract_aliases, test_contract_random, test_contract_ambient):
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_") and callable(test)}
    assert not tests.keys() & globals().keys(), module
    globals().update(tests)


@pytest.fixture
def options(device: torch.device) -> dict[str, Any]:
    """Takes the place of the fixture of that name, for all that is in this file."""
    return {"driver": "cuda" if device.type == "cuda" else "tape", "debug": "eager"}
